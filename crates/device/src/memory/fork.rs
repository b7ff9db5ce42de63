//! Whether this process was forked from one that had slabs: then it has none (M4).
//!
//! Source: madvise(2), `MADV_DONTFORK`; POSIX, `pthread_atfork`.

use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

static CHILD: AtomicBool = AtomicBool::new(false);

/// Whether this process was forked from one that had memory of this crate, none of which is mapped here.
pub fn is_forked_child() -> bool {
    CHILD.load(Ordering::Relaxed)
}

/// From now on forks are noticed.
pub(super) fn watch() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the handler is a function for ever, and only stores to an atomic.
        let code = unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
        if code != 0 {
            tracing::warn!(code, "a forked child that touches a tensor will crash");
        }
    });
}

extern "C" fn in_child() {
    CHILD.store(true, Ordering::Relaxed);
}
