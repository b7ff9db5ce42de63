//! Counts the bytes that a thread holds, and stops an input that asks for far too many.
//!
//! Per thread, so that tests running beside each other do not count each other's memory. What is freed by another thread
//! than allocated it is counted wrongly; the checks start no threads. Slabs are mapped, not allocated: a target that has any
//! bounds them itself.

#![expect(unsafe_code, reason = "an allocator cannot be implemented without")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// The system's allocator, counting. To be a program's `#[global_allocator]`.
#[derive(Debug)]
pub struct CountingAllocator;

/// No allocation is larger, or it fails, which ends the process: far above any target's bound, far below what hurts.
const ALLOCATION_BYTES_MAX: usize = 1 << 30;

thread_local! {
    // Constants without destructors: reading them allocates nothing, at any time of a thread's life.
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(change: isize) {
    let live = LIVE.get().wrapping_add(change);
    LIVE.set(live);
    PEAK.set(PEAK.get().max(live));
}

/// Runs `f`; gives the bytes that this thread held during it beyond those before, at most. 0 without the allocator.
pub(crate) fn peak_bytes<T>(f: impl FnOnce() -> T) -> (T, usize) {
    let before = LIVE.get();
    PEAK.set(before);
    let value = f();
    (value, PEAK.get().wrapping_sub(before).max(0) as usize)
}

/// Runs `f` without counting what it holds only for a while: what a check compares with is not what it checks.
pub(crate) fn uncounted<T>(f: impl FnOnce() -> T) -> T {
    let peak = PEAK.get();
    let value = f();
    PEAK.set(peak.max(LIVE.get()));
    value
}

// SAFETY: every call goes to the system's allocator unchanged, or fails as an allocator may; counting does not allocate.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.size() > ALLOCATION_BYTES_MAX {
            return std::ptr::null_mut();
        }
        count(layout.size() as isize);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if layout.size() > ALLOCATION_BYTES_MAX {
            return std::ptr::null_mut();
        }
        count(layout.size() as isize);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if size > ALLOCATION_BYTES_MAX {
            return std::ptr::null_mut();
        }
        // While it moves, both are held.
        count(size as isize);
        count(-(layout.size() as isize));
        // SAFETY: as above.
        unsafe { System.realloc(memory, layout, size) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }
}
