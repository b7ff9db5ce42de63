//! Whether a process of this host lives, told by the kernel the moment it dies.
//!
//! Each process shares a page with a robust futex: a word that holds the id of a thread which does nothing but live. When that
//! thread dies, by whatever signal (after the core dump, if there is one), the kernel marks the word and wakes who sleeps on it, before it takes the process's memory
//! and descriptors apart. A socket's end comes later: after gigabytes were freed, or never, while a forked child holds a copy.
//! Peers open the page through the process's entry in `/proc`, read-only, and one thread of this process sleeps on all of them.
//!
//! Invariant: a word that is not what it was at first means the end. So a peer that writes nonsense ends its own connections.
//! Invariant: pages are sealed, so that no peer can cut one off under its reader.
//! Not here: processes that are stopped or out of reach, of other users or process namespaces: heartbeats tell (`endpoint`).
//!
//! Source: Linux kernel documentation, "The robust futex ABI"; futex_waitv(2).
#![expect(unsafe_code, reason = "a page shared with other processes, and a list that the kernel reads")]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};
use rustix::thread::ClockId;
use rustix::thread::futex::{self, Flags, OWNER_DIED, WAITERS, Wait, WaitFlags, WaitPtr, WaitvFlags};
use serde::{Deserialize, Serialize};

use crate::endpoint::{Endpoint, lock};
use crate::key::fresh;
use crate::shm::memory_file;

/// Of a page: the futex's word, then the process's id in this protocol.
const ID_AT: usize = 16;
const PAGE_BYTES: usize = 4096;
/// Words that one `futex_waitv` takes, the bell's included.
const WAITS_MAX: usize = 128;
/// How often words are looked at where they cannot all be slept on.
const POLL: Duration = Duration::from_millis(50);
/// How long a dead peer's last words may take to be read.
const LAST_WORDS: Duration = Duration::from_millis(30);
const STACK_BYTES: usize = 64 << 10;

/// Where a process's page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LifeAddress {
    /// The page's descriptor in that process.
    pub descriptor: u32,
    /// What the page says, so that no other process is taken for this one.
    pub id: u128,
}

/// The page of this process, shared from its first use on; `None` where that cannot be.
pub(crate) fn own() -> Option<LifeAddress> {
    static OWN: OnceLock<Option<(OwnedFd, u128)>> = OnceLock::new();
    let own = OWN.get_or_init(|| {
        live()
            .inspect_err(|error| tracing::warn!(%error, "no page to live on: peers learn of a death by the socket"))
            .ok()
    });
    own.as_ref().map(|(page, id)| LifeAddress { descriptor: page.as_raw_fd().unsigned_abs(), id: *id })
}

/// Makes the page, and starts the thread that holds its futex for as long as the process lives.
fn live() -> io::Result<(OwnedFd, u128)> {
    let fd = memory_file(c"farcall-life")?;
    rustix::fs::ftruncate(&fd, PAGE_BYTES as u64)?;
    let page = Page::map(&fd, ProtFlags::READ | ProtFlags::WRITE)?;
    let mut id = [0; 16];
    id.copy_from_slice(&fresh()?[..16]);
    // SAFETY: the mapping is a page, this process's alone so far, and `ID_AT + 16` lies in it.
    unsafe { page.start.byte_add(ID_AT).cast::<[u8; 16]>().write(id) };
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE | SealFlags::SEAL)?;
    let (ready, is_ready) = sync_channel(1);
    thread::Builder::new().name("farcall-life".into()).stack_size(STACK_BYTES).spawn(move || {
        let held = hold(&page);
        let failed = held.is_err();
        let _ = ready.send(held);
        if failed {
            return;
        }
        loop {
            thread::park();
        }
    })?;
    is_ready.recv().map_err(io::Error::other)??;
    Ok((fd, u128::from_le_bytes(id)))
}

/// What the kernel reads of a thread's robust futexes: a ring of nodes, each at a fixed distance from its word.
#[repr(C)]
struct RobustList {
    first: *const *const RobustList,
    futex_offset: isize,
    pending: *const u8,
    /// The only node: its `next`, which leads back to the head.
    node: *const RobustList,
}

/// Has the word of `page` hold this thread's id until it dies. The page must stay mapped for as long.
fn hold(page: &Page) -> io::Result<()> {
    let list = Box::leak(Box::new(RobustList {
        first: ptr::null(),
        futex_offset: 0,
        pending: ptr::null(),
        node: ptr::null(),
    }));
    list.first = &raw const list.node;
    list.node = &raw const *list;
    list.futex_offset = page.start.as_ptr().addr().wrapping_sub(list.first.addr()) as isize;
    // The head is the first three fields.
    let head_bytes = 3 * size_of::<usize>();
    // SAFETY: the list is leaked, so the kernel finds it whenever the thread ends; it replaces the C library's list of this
    // thread, which locks no robust mutex.
    let done = unsafe { libc::syscall(libc::SYS_set_robust_list, &raw const *list, head_bytes) };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    let thread = rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs();
    // With `WAITERS` the kernel wakes whoever sleeps on it.
    page.word().store(thread | WAITERS, Ordering::SeqCst);
    Ok(())
}

/// A mapped page.
struct Page {
    start: NonNull<u8>,
}

// SAFETY: an address; the word behind it is atomic, and the rest is written before others can read it.
unsafe impl Send for Page {}
// SAFETY: as above.
unsafe impl Sync for Page {}

impl Page {
    fn map(fd: &OwnedFd, access: ProtFlags) -> io::Result<Self> {
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no memory that exists.
        let start = unsafe { rustix::mm::mmap(ptr::null_mut(), PAGE_BYTES, access, MapFlags::SHARED, fd, 0)? };
        Ok(Self { start: NonNull::new(start.cast()).ok_or(Errno::NOMEM)? })
    }

    /// The page of a process: read-only, sealed, and of that id.
    fn open(process: u32, address: LifeAddress) -> io::Result<Self> {
        let path = format!("/proc/{process}/fd/{}", address.descriptor);
        // Whatever it is: opening it must not wait.
        let fd = rustix::fs::open(
            path,
            OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY,
            Mode::empty(),
        )?;
        let seals = rustix::fs::fcntl_get_seals(&fd)?;
        let size = rustix::fs::fstat(&fd)?.st_size;
        if !seals.contains(SealFlags::SHRINK | SealFlags::GROW) || size != PAGE_BYTES as i64 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is not a sealed page"));
        }
        let page = Self::map(&fd, ProtFlags::READ)?;
        // SAFETY: sealed to be a page, so these bytes are mapped; a peer that writes them meanwhile gets what it deserves, an
        // id that is not its own, or its own.
        let id = unsafe { page.start.byte_add(ID_AT).cast::<[u8; 16]>().as_ptr().read_volatile() };
        if u128::from_le_bytes(id) != address.id {
            return Err(io::Error::new(io::ErrorKind::NotFound, "it is another process's page"));
        }
        Ok(page)
    }

    fn word(&self) -> &AtomicU32 {
        // SAFETY: page-aligned, mapped for as long as `self`, and only ever used as an atomic.
        unsafe { AtomicU32::from_ptr(self.start.as_ptr().cast()) }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: our mapping, and no reference to it outlives `self`.
        if let Err(error) = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), PAGE_BYTES) } {
            tracing::error!(%error, "munmap");
        }
    }
}

/// A process that is watched.
struct Watched {
    id: u128,
    page: Page,
    /// The word while its process lives.
    alive: u32,
    endpoints: Vec<Weak<Endpoint>>,
}

impl Watched {
    fn is_dead(&self) -> bool {
        self.page.word().load(Ordering::SeqCst) != self.alive
    }

    fn is_wanted(&mut self) -> bool {
        self.endpoints.retain(|endpoint| endpoint.upgrade().is_some_and(|endpoint| endpoint.closed().is_none()));
        !self.endpoints.is_empty()
    }
}

/// The processes that this one watches. Its thread alone removes, so that it may sleep on what it has seen here.
struct Watch {
    watched: Mutex<Vec<Watched>>,
    /// Rung when there is more to watch.
    bell: AtomicU32,
}

static WATCH: OnceLock<io::Result<&'static Watch>> = OnceLock::new();

/// Whether that process is known to be dead: it is watched, and its word says so.
pub(crate) fn is_dead(address: LifeAddress) -> bool {
    let Some(Ok(watch)) = WATCH.get() else { return false };
    lock(&watch.watched).iter().any(|watched| watched.id == address.id && watched.is_dead())
}

/// Closes `endpoint` when that process dies.
///
/// # Errors
/// Its page cannot be opened, or is none: the process is gone, of another process namespace, or lies.
pub(crate) fn watch(endpoint: &Arc<Endpoint>, process: u32, address: LifeAddress) -> io::Result<()> {
    let watch = WATCH.get_or_init(|| {
        let watch: &Watch = Box::leak(Box::new(Watch { watched: Mutex::default(), bell: AtomicU32::new(0) }));
        thread::Builder::new().name("farcall-deaths".into()).spawn(move || watch.run())?;
        Ok(watch)
    });
    let watch = watch.as_ref().map_err(|error| io::Error::from(error.kind()))?;
    let mut watched = lock(&watch.watched);
    if let Some(known) = watched.iter_mut().find(|known| known.id == address.id) {
        known.endpoints.push(Arc::downgrade(endpoint));
        // It may have been on its way out.
        watch.ring();
        return Ok(());
    }
    let page = Page::open(process, address)?;
    let alive = page.word().load(Ordering::SeqCst);
    if alive & OWNER_DIED != 0 || alive & WAITERS == 0 {
        return Err(io::Error::new(io::ErrorKind::NotFound, "nobody lives there"));
    }
    watched.push(Watched { id: address.id, page, alive, endpoints: vec![Arc::downgrade(endpoint)] });
    drop(watched);
    watch.ring();
    Ok(())
}

impl Watch {
    fn ring(&self) {
        self.bell.fetch_add(1, Ordering::SeqCst);
        let _ = futex::wake(&self.bell, Flags::PRIVATE, 1);
    }

    fn run(&self) {
        loop {
            let bell = self.bell.load(Ordering::SeqCst);
            let mut waits = vec![wait_for(&self.bell, bell, WaitFlags::PRIVATE)];
            let (mut dead, mut too_many) = (Vec::new(), false);
            {
                let mut watched = lock(&self.watched);
                dead.extend(watched.extract_if(.., |watched| watched.is_dead()));
                watched.retain_mut(Watched::is_wanted);
                for watched in &*watched {
                    if waits.len() == WAITS_MAX {
                        too_many = true;
                        break;
                    }
                    waits.push(wait_for(watched.page.word(), watched.alive, WaitFlags::empty()));
                }
            }
            if !dead.is_empty() {
                bury(dead);
                continue;
            }
            sleep(&waits, too_many, &self.bell, bell);
        }
    }
}

fn wait_for(word: &AtomicU32, value: u32, flags: WaitFlags) -> Wait {
    let mut wait = Wait::new();
    wait.val = u64::from(value);
    wait.uaddr = WaitPtr::new(word.as_ptr().cast());
    wait.flags = WaitFlags::SIZE_U32 | flags;
    wait
}

/// Sleeps until a word changes; a while only, where not all can be slept on.
fn sleep(waits: &[Wait], too_many: bool, bell: &AtomicU32, rung: u32) {
    let poll = rustix::time::Timespec { tv_sec: 0, tv_nsec: POLL.as_nanos() as i64 };
    let slept = if too_many {
        Err(Errno::NOSYS)
    } else {
        futex::waitv(waits, WaitvFlags::empty(), None, ClockId::Monotonic).map(drop)
    };
    match slept {
        // Something changed, or the caller looks whether it did.
        Ok(()) | Err(Errno::AGAIN | Errno::INTR) => {}
        // Linux before 5.16, a filter of system calls, or too many processes: look now and then, if there is anything to see.
        Err(_) => drop(futex::wait(bell, Flags::PRIVATE, rung, (waits.len() > 1).then_some(&poll))),
    }
}

/// Ends what the dead have left here.
fn bury(dead: Vec<Watched>) {
    let until = Instant::now() + LAST_WORDS;
    for watched in &dead {
        // The kernel has woken one sleeper, perhaps of another process.
        let _ = futex::wake(watched.page.word(), Flags::empty(), i32::MAX.unsigned_abs());
    }
    for endpoint in dead.iter().flat_map(|watched| watched.endpoints.iter().filter_map(Weak::upgrade)) {
        // A goodbye, or replies, may have come before the end: whoever reads this connection is about to.
        while endpoint.has_unread() && endpoint.closed().is_none() && Instant::now() < until {
            thread::sleep(Duration::from_millis(1));
        }
        // Foreign code hears of it: wakers, releases of memory.
        if catch_unwind(AssertUnwindSafe(|| endpoint.on_death())).is_err() {
            crate::limited!(error, "a panic while a connection was closed");
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::MemfdFlags;

    use super::*;

    /// The word of a thread's page tells its death, and wakes who sleeps on it.
    #[test]
    fn the_kernel_marks_the_word_of_a_thread_that_ends() {
        let fd = rustix::fs::memfd_create(c"life", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, PAGE_BYTES as u64).unwrap();
        let page = Arc::new(Page::map(&fd, ProtFlags::READ | ProtFlags::WRITE).unwrap());
        let seen = Page::map(&fd, ProtFlags::READ).unwrap();
        let (end, ends) = sync_channel::<()>(0);
        let held = Arc::clone(&page);
        let thread = thread::spawn(move || {
            hold(&held).unwrap();
            ends.recv().unwrap_err();
        });
        while seen.word().load(Ordering::SeqCst) == 0 {
            thread::yield_now();
        }
        let alive = seen.word().load(Ordering::SeqCst);
        assert!(alive & WAITERS != 0 && alive & OWNER_DIED == 0);
        let sleeper = thread::spawn(move || {
            let waits = [wait_for(seen.word(), alive, WaitFlags::empty())];
            let bell = AtomicU32::new(0);
            while seen.word().load(Ordering::SeqCst) == alive {
                sleep(&waits, false, &bell, 0);
            }
            seen.word().load(Ordering::SeqCst)
        });
        drop(end);
        thread.join().unwrap();
        assert_eq!(sleeper.join().unwrap(), OWNER_DIED | WAITERS);
    }

    #[test]
    fn a_page_is_opened_by_its_address_and_by_no_other() {
        let own = own().expect("a page");
        let process = std::process::id();
        let page = Page::open(process, own).unwrap();
        assert!(page.word().load(Ordering::SeqCst) & WAITERS != 0);
        let refused = |process, address| Page::open(process, address).err().map(|error| error.kind());
        assert_eq!(refused(process, LifeAddress { id: own.id + 1, ..own }), Some(io::ErrorKind::NotFound));
        assert_eq!(refused(process, LifeAddress { descriptor: 1 << 20, ..own }), Some(io::ErrorKind::NotFound));
        let unsealed = rustix::fs::memfd_create(c"life", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&unsealed, PAGE_BYTES as u64).unwrap();
        let descriptor = unsealed.as_raw_fd().unsigned_abs();
        assert_eq!(refused(process, LifeAddress { descriptor, ..own }), Some(io::ErrorKind::InvalidData));
        let no_file = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        assert!(refused(process, LifeAddress { descriptor: no_file.as_raw_fd().unsigned_abs(), ..own }).is_some());
    }
}
