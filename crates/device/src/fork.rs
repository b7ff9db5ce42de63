//! What becomes of this process's memory and connections in a child that it forks.
//!
//! `fork` copies descriptors and memory, and of the threads only the one that calls it. So a child can neither drive a connection
//! nor take a lock that some other thread held. It is refused instead ([`is_forked_child`]), its copies of the descriptors
//! are replaced by harmless ones before `fork` returns in it, and slabs are not copied (`MADV_DONTFORK`): else the parent's peers
//! would not see the parent's end, and its memory would outlive it.
//! Invariant FORK: a child of a process that uses farcall holds no connection and no memory of it, and none of its calls waits.
//!
//! Source: POSIX, `pthread_atfork`; madvise(2).
#![expect(unsafe_code, reason = "handlers that the C library calls around a fork")]

use std::cell::UnsafeCell;
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, IntoRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

static CHILD: AtomicBool = AtomicBool::new(false);
/// What takes the place of a descriptor in a child: `/dev/null`, open for ever.
static NULL: AtomicI32 = AtomicI32::new(-1);
static OPEN: Mutex<BTreeSet<RawFd>> = Mutex::new(BTreeSet::new());
static HELD: Held = Held(UnsafeCell::new(None));

/// The lock of `OPEN`, held by the forking thread from before the fork until after it, in both processes.
struct Held(UnsafeCell<Option<MutexGuard<'static, BTreeSet<RawFd>>>>);

// SAFETY: reached only by `before` and what follows it on the same thread, while that thread holds the lock.
unsafe impl Sync for Held {}

/// Whether this process was forked from one that used farcall, and so has nothing of it: neither memory nor connections.
#[must_use]
pub fn is_forked_child() -> bool {
    CHILD.load(Ordering::Relaxed)
}

/// A descriptor that no child keeps. To be dropped before the descriptor is closed.
#[derive(Debug)]
pub struct Kept(RawFd);

impl Kept {
    /// From now on no child has it.
    #[must_use]
    pub fn new(descriptor: &impl AsFd) -> Self {
        watch();
        let number = descriptor.as_fd().as_raw_fd();
        lock().insert(number);
        Self(number)
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        if !is_forked_child() {
            lock().remove(&self.0);
        }
    }
}

/// From now on forks are noticed.
pub(crate) fn watch() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let watched = File::open("/dev/null").and_then(|null| {
            // SAFETY: the handlers are functions for ever, and do what a handler may: see each.
            match unsafe { libc::pthread_atfork(Some(before), Some(in_parent), Some(in_child)) } {
                0 => {
                    NULL.store(null.into_raw_fd(), Ordering::SeqCst);
                    Ok(())
                }
                code => Err(io::Error::from_raw_os_error(code)),
            }
        });
        if let Err(error) = watched {
            tracing::warn!(%error, "a forked child will hold this process's connections open, and crash if it touches a tensor");
        }
    });
}

fn lock() -> MutexGuard<'static, BTreeSet<RawFd>> {
    OPEN.lock().unwrap_or_else(PoisonError::into_inner)
}

extern "C" fn before() {
    let guard = lock();
    // SAFETY: this thread holds the lock, so no other is between here and the end of its own fork.
    unsafe { *HELD.0.get() = Some(guard) };
}

extern "C" fn in_parent() {
    // SAFETY: the thread that ran `before`, which holds the lock.
    let guard = unsafe { (*HELD.0.get()).take() };
    drop(guard);
}

extern "C" fn in_child() {
    CHILD.store(true, Ordering::SeqCst);
    // SAFETY: the child's only thread, the copy of the one that ran `before`.
    let guard = unsafe { (*HELD.0.get()).take() };
    let null = NULL.load(Ordering::SeqCst);
    for descriptor in guard.iter().flat_map(|open| open.iter()) {
        // The number stays taken, so that whoever drops its owner closes nothing else.
        // SAFETY: a system call on numbers, safe in a child of a threaded process.
        unsafe { libc::dup3(null, *descriptor, libc::O_CLOEXEC) };
    }
}
