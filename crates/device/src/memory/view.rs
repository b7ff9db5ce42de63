//! A private, writable view of memory that something else owns: copy-on-write, for one holder.
//!
//! Invariant V1: writes stay in the view. The file's owner never sees them, nor does who maps the file after the view is gone.
//! Invariant V2: pages that were not written still are the owner's, so it is released only after the view.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};

use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::{ForeignBytes, Span};
use crate::fork::is_forked_child;

/// See the module.
pub(crate) struct View {
    pages: Pages,
    /// Of the bytes in the pages.
    start: usize,
    len: usize,
    _owner: Option<ForeignBytes>,
}

struct Pages {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: a private mapping is memory like any other, with one owner.
unsafe impl Send for View {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for View {}

impl View {
    /// Maps the pages of `file` that hold `len` bytes from `offset` on.
    pub(super) fn map(file: BorrowedFd<'_>, offset: u64, len: usize) -> rustix::io::Result<Self> {
        let page = rustix::param::page_size() as u64;
        let start = offset % page;
        let mapped = (start as usize).checked_add(len.max(1)).ok_or(rustix::io::Errno::NOMEM)?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no memory that exists.
        let base =
            unsafe { rustix::mm::mmap(ptr::null_mut(), mapped, access, MapFlags::PRIVATE, file, offset - start)? };
        let base = NonNull::new(base.cast::<u8>()).ok_or(rustix::io::Errno::NOMEM)?;
        // SAFETY: our mapping, of which nobody has a reference yet. It is a wish: what was not written is shared anyway.
        let _ = unsafe { rustix::mm::madvise(base.as_ptr().cast(), mapped, Advice::LinuxDontFork) };
        Ok(Self { pages: Pages { base, len: mapped }, start: start as usize, len, _owner: None })
    }

    /// Keeps `owner` for as long as the view (V2).
    pub(super) fn of(self, owner: ForeignBytes) -> Self {
        Self { _owner: Some(owner), ..self }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: the pages are mapped for as long as `self`, and hold what the file or a holder wrote; the file does not change
        // while its owner is not released (V2), and nothing here writes while this is borrowed.
        unsafe { std::slice::from_raw_parts(self.first().as_ptr(), self.len) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; `&mut self` is the only way to write them.
        unsafe { std::slice::from_raw_parts_mut(self.first().as_ptr(), self.len) }
    }

    pub(crate) fn span(&self) -> Span {
        Span::new(self.first(), self.len)
    }

    pub(crate) fn as_ptr(&self) -> *const u8 {
        self.first().as_ptr()
    }

    fn first(&self) -> NonNull<u8> {
        assert!(!is_forked_child(), "a forked child has none of its parent's memory");
        // SAFETY: `start + len` is the length of the mapping.
        unsafe { self.pages.base.add(self.start) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        if is_forked_child() {
            return;
        }
        // SAFETY: our mapping, and the view that could reach it is being dropped.
        if let Err(errno) = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) } {
            tracing::error!(%errno, "munmap failed: a private view leaks");
        }
    }
}

impl fmt::Debug for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("private view")
    }
}
