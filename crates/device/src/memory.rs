//! Slabs: mapped memory that storages are cut from, and the exclusive ranges of them.
//!
//! Not a pool: [`HostPool`](crate::HostPool) decides which range is handed out again.
//! Invariant M1: a [`SlabRange`] is the only one to reach its bytes. Ranges come from [`Slab::create`] and are only ever split,
//! and joined again, so exclusive access follows from ownership; a range is shared by sharing a reference to it.
//! Invariant M2: a slab is unmapped when its last range and its last handle are gone, never earlier. Ids are never used again.
//! Invariant M3 (SNAPSHOT): other processes can map a slab, but only to read: a descriptor is given out only of memory that is
//! sealed against resizing, and against all writes but those of our own mapping (Linux 5.1).
//! Invariant M4 (FORK): a forked child has no slab: its copies of the mappings would keep the parent's memory. It is told so.
#![expect(unsafe_code, reason = "maps memory and hands out slices of it")]

mod budget;
mod copy;
mod slab_copy;
mod view;

use std::any::Any;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use rustix::process::{Resource, getrlimit};

pub use budget::DescriptorPermit;
pub use copy::copy;
pub use slab_copy::SlabCopy;
pub(crate) use view::View;

use crate::fork::{self, Kept, is_forked_child};
use crate::{Device, DeviceError};

/// Every storage from a slab starts at a multiple of this: a cache line, and the widest vector register.
pub const ALIGN_BYTES: usize = 64;

/// Ranges from this size on ask for huge pages: fewer faults and fewer TLB misses. Shorter ones would waste most of a page.
const HUGE_PAGE_BYTES: usize = 2 << 20;

static NEXT_SLAB_ID: AtomicU64 = AtomicU64::new(1);

/// A mapping that storages are cut from: a memfd that peers on this host can map too, or anonymous memory.
pub struct Slab {
    id: u64,
    base: NonNull<u8>,
    len: usize,
    /// Or why other processes cannot map it. A child would keep the memory by it.
    fd: Result<(Kept, OwnedFd, DescriptorPermit), Errno>,
    retired: AtomicBool,
}

// SAFETY: a slab is an address range with no thread affinity; its bytes are reached only through `SlabRange` (M1).
unsafe impl Send for Slab {}
// SAFETY: as above; `&Slab` gives out numbers and a descriptor, no bytes.
unsafe impl Sync for Slab {}

impl Slab {
    /// Maps `len` bytes of zeros, rounded up to whole pages, and returns the range that covers them all.
    ///
    /// Where the system refuses a memfd or its seals, the memory is this process's alone, and [`Slab::fd`] says why.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] if the system has no such memory; [`DeviceError::Os`] if it refuses for another reason.
    pub fn create(len: usize) -> Result<SlabRange, DeviceError> {
        let out_of_memory = || DeviceError::OutOfMemory { device: Device::HOST, want_bytes: len, mapped_bytes: 0 };
        let len = len.max(1).checked_next_multiple_of(rustix::param::page_size()).ok_or_else(out_of_memory)?;
        if len > isize::MAX as usize {
            return Err(out_of_memory());
        }
        let failed = |call, errno| match errno {
            Errno::NOMEM | Errno::NOSPC | Errno::FBIG | Errno::OVERFLOW | Errno::INVAL | Errno::AGAIN => {
                out_of_memory()
            }
            other => DeviceError::os(call, other),
        };
        fork::watch();
        let permit = DescriptorPermit::take();
        let fd = match permit.as_ref().map_or(Err(Errno::MFILE), |_| create_memfd(len)) {
            // A sandbox, or too many descriptors: there is memory all the same.
            Err(errno @ (Errno::PERM | Errno::ACCESS | Errno::NOSYS | Errno::MFILE | Errno::NFILE)) => Err(errno),
            other => Ok(other.map_err(|errno| failed("memfd_create", errno))?),
        };
        let base = map(len, fd.as_ref().ok()).map_err(|errno| failed("mmap", errno))?;
        // Our own mapping stays writable. The seals stop resizing (a reader would get SIGBUS), holes and later writers (M3).
        let fd = fd.and_then(sealed);
        if let Err(errno) = &fd {
            warn_unshared(*errno);
        }
        // SAFETY: our mapping, of which nobody has a reference yet; the advice changes no contents.
        if let Err(errno) = unsafe { rustix::mm::madvise(base.as_ptr().cast(), len, Advice::LinuxDontFork) } {
            tracing::debug!(%errno, "a forked child will hold a slab's memory");
        }
        let id = NEXT_SLAB_ID.fetch_add(1, Ordering::Relaxed);
        let fd = match (fd, permit) {
            (Ok(fd), Some(permit)) => Ok((Kept::new(&fd), fd, permit)),
            (Ok(_), None) => Err(Errno::MFILE),
            (Err(errno), _) => Err(errno),
        };
        let slab = Arc::new(Self { id, base, len, fd, retired: AtomicBool::new(false) });
        Ok(SlabRange { slab, offset: 0, len })
    }

    /// The number that names this slab in this process; no other slab ever has it.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Mapped bytes.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a slab is never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The memory's descriptor, to be passed to a peer that maps it read-only.
    ///
    /// # Errors
    /// Why the memory is this process's alone: the system refused a memfd, or the seals that a peer relies on.
    pub fn fd(&self) -> io::Result<BorrowedFd<'_>> {
        self.fd.as_ref().map(|(_, fd, _)| fd.as_fd()).map_err(|errno| (*errno).into())
    }

    /// Takes the slab out of use; `false` if it is already.
    pub(crate) fn retire(&self) -> bool {
        !self.retired.swap(true, Ordering::Relaxed)
    }

    /// Whether it was retired.
    pub(crate) fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Relaxed)
    }

    /// The address of the first byte: for registering the slab with a NIC or a driver.
    #[must_use]
    pub fn as_ptr(&self) -> *const u8 {
        self.base.as_ptr()
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        if is_forked_child() {
            // Not mapped here (M4); something else may be, by now.
            return;
        }
        // SAFETY: `base` and `len` are those of our mapping, and no range is left that could reach it (M2).
        if let Err(errno) = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) } {
            tracing::error!(%errno, slab = self.id, "munmap failed: the memory leaks");
        }
    }
}

impl fmt::Debug for Slab {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { id, len, fd, .. } = self;
        let fd = fd.as_ref().map(|(_, fd, _)| fd);
        f.debug_struct("Slab").field("id", id).field("len", len).field("fd", &fd).finish_non_exhaustive()
    }
}

/// A range of a slab that belongs to its holder alone (M1).
pub struct SlabRange {
    slab: Arc<Slab>,
    offset: usize,
    len: usize,
}

impl SlabRange {
    /// The slab this range is cut from.
    #[must_use]
    pub fn slab(&self) -> &Arc<Slab> {
        &self.slab
    }

    /// Bytes from the slab's start.
    #[must_use]
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// The range's bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is left of the range.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Cuts the first `len` bytes off; `None` if the range is shorter.
    #[must_use]
    pub fn split_front(&mut self, len: usize) -> Option<Self> {
        let rest = self.len.checked_sub(len)?;
        let front = Self { slab: Arc::clone(&self.slab), offset: self.offset, len };
        self.offset += len;
        self.len = rest;
        Some(front)
    }

    /// This range and `next` as one.
    ///
    /// # Errors
    /// Both, as they were, unless `next` begins in the same slab where this range ends.
    pub fn join(mut self, next: Self) -> Result<Self, (Self, Self)> {
        if !Arc::ptr_eq(&self.slab, &next.slab) || self.offset + self.len != next.offset {
            return Err((self, next));
        }
        self.len += next.len;
        Ok(self)
    }

    /// The bytes, shared.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the range lies in the mapping, which lives as long as `self.slab` (M2), holds initialised bytes (zeros, or
        // what a holder wrote), and is written by none while it is borrowed: not here (M1), not by another process (M3).
        unsafe { std::slice::from_raw_parts(self.start().as_ptr(), self.len) }
    }

    /// The bytes, to be written.
    #[must_use]
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; `&mut self` is the only way to these bytes (M1).
        unsafe { std::slice::from_raw_parts_mut(self.start().as_ptr(), self.len) }
    }

    /// Has the kernel provide all pages now, so that the first write of each costs no fault.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] if it cannot. A kernel without the call (before 5.14) is no error.
    pub fn populate(&mut self) -> Result<(), DeviceError> {
        self.prefer_huge_pages();
        self.populate_end(self.len)
    }

    /// Asks for huge pages where they fit. For a whole slab it leaves one mapping, for a part it makes more.
    pub(crate) fn prefer_huge_pages(&mut self) {
        if self.len >= HUGE_PAGE_BYTES {
            let start = self.start().as_ptr().cast();
            // SAFETY: the range lies in our mapping; the advice changes no contents. It is a wish: refusal is fine.
            let _ = unsafe { rustix::mm::madvise(start, self.len, Advice::LinuxHugepage) };
        }
    }

    /// As [`SlabRange::populate`], the last `len` bytes alone, which start at a page.
    pub(crate) fn populate_end(&mut self, len: usize) -> Result<(), DeviceError> {
        assert!(len <= self.len, "the end of the range");
        let start = self.start().as_ptr().wrapping_add(self.len - len).cast();
        // SAFETY: the bytes lie in our mapping; populating faults pages in and changes no contents.
        match unsafe { rustix::mm::madvise(start, len, Advice::LinuxPopulateWrite) } {
            Ok(()) | Err(Errno::INVAL | Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(_) => Err(DeviceError::OutOfMemory { device: Device::HOST, want_bytes: len, mapped_bytes: 0 }),
        }
    }

    /// The first `len` bytes by address.
    pub(crate) fn span(&self, len: usize) -> Span {
        assert!(len <= self.len, "a storage lies in its block");
        Span { start: self.start(), len }
    }

    fn start(&self) -> NonNull<u8> {
        assert!(!is_forked_child(), "a forked child has none of its parent's slabs");
        // SAFETY: `offset + len <= slab.len` since creation, through every split and every join.
        unsafe { self.slab.base.add(self.offset) }
    }
}

impl fmt::Debug for SlabRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "slab {} {}..{}", self.slab.id, self.offset, self.offset + self.len)
    }
}

/// Bytes by address, for an enqueued operation: it holds nothing, and says nothing about who else uses them.
#[derive(Clone, Copy)]
pub(crate) struct Span {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: an address and a length have no thread affinity; whoever turns them into a slice vouches for the access.
unsafe impl Send for Span {}

impl Span {
    pub(crate) const EMPTY: Self = Self { start: NonNull::dangling(), len: 0 };

    pub(crate) fn new(start: NonNull<u8>, len: usize) -> Self {
        Self { start, len }
    }

    /// `len` of the bytes, from `start` on.
    ///
    /// # Safety
    /// They must be bytes of this span.
    unsafe fn part(self, start: usize, len: usize) -> Self {
        // SAFETY: the caller's promise.
        Self { start: unsafe { self.start.add(start) }, len }
    }

    /// # Safety
    /// While the slice lives the memory must stay mapped, and nothing may write it.
    pub(crate) unsafe fn bytes<'a>(self) -> &'a [u8] {
        // SAFETY: the caller's promise; slabs and foreign memory are initialised, and an empty span is aligned and not null.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    /// # Safety
    /// While the slice lives the memory must stay mapped, be writable, and be reached by nothing else.
    pub(crate) unsafe fn bytes_mut<'a>(self) -> &'a mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl From<Span> for crate::cuda::Space {
    fn from(span: Span) -> Self {
        Self::Host(span.start.as_ptr())
    }
}

/// Told once, at the last drop of a foreign storage and after the work that uses it, that its memory is no longer needed.
pub trait Release: Any + Send + Sync {
    /// Gives the memory back to its owner. Runs on whichever thread dropped last: it must not block and must not panic.
    fn release(&self);

    /// Nobody writes the bytes before the release, their owner neither: to keep them is enough, no copy is needed.
    fn is_constant(&self) -> bool {
        false
    }

    /// The memory file that holds the bytes, and where in it they start, if a holder that is alone may write a private view of
    /// it: pages are copied as they are written. The file must not be written before the release, by nobody.
    fn file(&self) -> Option<(BorrowedFd<'_>, u64)> {
        None
    }
}

/// Memory that something else owns: a peer's slab, a NumPy array, another library's tensor. Read-only for us.
pub(crate) struct ForeignBytes {
    start: NonNull<u8>,
    len: usize,
    owner: Arc<dyn Release>,
}

// SAFETY: the constructor's contract makes the bytes readable from any thread until `release`, and `owner` is Send and Sync.
unsafe impl Send for ForeignBytes {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for ForeignBytes {}

impl ForeignBytes {
    /// # Safety
    /// `start` must be valid for reads of `len` initialised bytes on its device, from any thread, and nothing may write them,
    /// until `owner.release()` is called.
    pub(crate) unsafe fn new(start: NonNull<u8>, len: usize, owner: Arc<dyn Release>) -> Self {
        Self { start, len, owner }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn is_constant(&self) -> bool {
        self.owner.is_constant()
    }

    pub(crate) fn owner(&self) -> &dyn Any {
        &*self.owner
    }

    /// The bytes of foreign *host* memory: the caller checks the device first.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: the contract of `new`; `self` borrows the owner, so `release` was not called.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    /// The bytes of foreign host memory, by address.
    pub(crate) fn span(&self) -> Span {
        if self.len == 0 { Span::EMPTY } else { Span { start: self.start, len: self.len } }
    }

    pub(crate) fn as_ptr(&self) -> *const u8 {
        self.start.as_ptr()
    }

    /// A view of the bytes that can be written, in place of the bytes themselves.
    pub(crate) fn into_view(self) -> Result<View, Self> {
        let Some((file, offset)) = self.owner.file() else { return Err(self) };
        match View::map(file, offset, self.len) {
            Ok(view) => Ok(view.of(self)),
            Err(errno) => {
                tracing::debug!(%errno, "no private view of a file");
                Err(self)
            }
        }
    }
}

impl Drop for ForeignBytes {
    fn drop(&mut self) {
        self.owner.release();
    }
}

/// Once: what refused one memfd refuses the next.
fn warn_unshared(errno: Errno) {
    static WARNED: AtomicBool = AtomicBool::new(false);
    if !WARNED.swap(true, Ordering::Relaxed) {
        tracing::warn!(
            %errno,
            "memory that other processes cannot map: its tensors are copied to peers on this host; for descriptors, raise `ulimit -n`"
        );
    }
}

/// With every seal. Not inlined: the branch on the descriptor would be taken before it is known that there is one, which valgrind
/// calls an error.
#[inline(never)]
fn sealed(fd: OwnedFd) -> Result<OwnedFd, Errno> {
    let seals = SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL | SealFlags::FUTURE_WRITE;
    rustix::fs::fcntl_add_seals(&fd, seals).map(|()| fd)
}

fn create_memfd(len: usize) -> rustix::io::Result<OwnedFd> {
    // Beyond the limit `ftruncate` raises SIGXFSZ, too, which ends the process.
    if getrlimit(Resource::Fsize).current.is_some_and(|limit| len as u64 > limit) {
        return Err(Errno::FBIG);
    }
    // MFD_NOEXEC_SEAL (Linux 6.3), which rustix does not name yet; some systems refuse a memfd without it.
    const NOEXEC_SEAL: MemfdFlags = MemfdFlags::from_bits_retain(0x0008);
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = match rustix::fs::memfd_create(c"farcall-slab", flags | NOEXEC_SEAL) {
        Err(Errno::INVAL) => rustix::fs::memfd_create(c"farcall-slab", flags)?,
        other => other?,
    };
    rustix::fs::ftruncate(&fd, len as u64)?;
    Ok(fd)
}

fn map(len: usize, fd: Option<&OwnedFd>) -> rustix::io::Result<NonNull<u8>> {
    let access = ProtFlags::READ | ProtFlags::WRITE;
    let start = match fd {
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no memory that exists.
        Some(fd) => unsafe { rustix::mm::mmap(ptr::null_mut(), len, access, MapFlags::SHARED, fd, 0)? },
        // SAFETY: as above.
        None => unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), len, access, MapFlags::PRIVATE)? },
    };
    NonNull::new(start.cast()).ok_or(Errno::NOMEM)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn m1_split_ranges_are_disjoint_and_cover_the_slab() {
        let mut rest = Slab::create(1).unwrap();
        let page = rustix::param::page_size();
        assert_eq!(rest.len(), page, "rounded up to a page");
        let mut front = rest.split_front(64).unwrap();
        front.bytes_mut().fill(1);
        rest.bytes_mut().fill(2);
        assert_eq!((front.offset(), front.len(), rest.offset(), rest.len()), (0, 64, 64, page - 64));
        assert_eq!(front.bytes(), [1; 64]);
        assert!(rest.split_front(page).is_none(), "longer than what is left");
        assert_eq!(rest.len(), page - 64, "a refused split changes nothing");
    }

    #[test]
    fn m1_neighbours_of_one_slab_are_joined_and_others_come_back() {
        let mut rest = Slab::create(4096).unwrap();
        let [first, second] = [64, 128].map(|len| rest.split_front(len).unwrap());
        let (first, rest) = first.join(rest).expect_err("a gap between them");
        let (second, first) = second.join(first).expect_err("the wrong way round");
        let whole = first.join(second).and_then(|both| both.join(rest)).expect("neighbours");
        assert_eq!((whole.offset(), whole.len()), (0, whole.slab().len()));
        let mut other = Slab::create(8192).unwrap();
        let _front = other.split_front(whole.len()).unwrap();
        whole.join(other).expect_err("of another slab");
    }

    #[test]
    fn m2_ids_grow_and_the_last_range_unmaps() {
        let first = Slab::create(64).unwrap();
        let second = Slab::create(64).unwrap();
        assert!(second.slab().id() > first.slab().id());
        let watch = Arc::downgrade(first.slab());
        drop(first);
        assert!(watch.upgrade().is_none());
    }

    #[test]
    fn m3_a_peer_can_map_to_read_and_not_to_write_or_resize() {
        let mut range = Slab::create(4096).unwrap();
        range.bytes_mut()[..5].copy_from_slice(b"hello");
        let fd = range.slab().fd().unwrap();
        let mut seen = [0; 5];
        rustix::io::pread(fd, &mut seen, 0).unwrap();
        assert_eq!(&seen, b"hello");
        assert!(rustix::io::pwrite(fd, b"x", 0).is_err(), "sealed against writers");
        assert!(rustix::fs::ftruncate(fd, 0).is_err(), "sealed against truncation");
        let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        assert!(rustix::fs::fallocate(fd, punch, 0, 4096).is_err(), "sealed against holes");
    }

    struct File(OwnedFd);

    impl Release for File {
        fn release(&self) {}

        fn file(&self) -> Option<(BorrowedFd<'_>, u64)> {
            Some((self.0.as_fd(), 5000))
        }
    }

    #[test]
    fn v1_writes_stay_in_a_private_view() {
        let mut range = Slab::create(8192).unwrap();
        range.bytes_mut().fill(7);
        let file = range.slab().fd().unwrap().try_clone_to_owned().unwrap();
        let start = NonNull::from(&range.bytes()[5000]);
        // SAFETY: the range outlives both views, and nothing writes it meanwhile.
        let foreign = || unsafe { ForeignBytes::new(start, 3000, Arc::new(File(file.try_clone().unwrap()))) };
        for _ in 0..2 {
            let Ok(mut view) = foreign().into_view() else { panic!("a view of a file") };
            assert_eq!(view.bytes(), [7; 3000], "the owner's bytes, not an earlier view's");
            view.bytes_mut().fill(9);
            assert_eq!(view.bytes(), [9; 3000]);
            assert!(range.bytes().iter().all(|byte| *byte == 7));
        }
    }

    #[test]
    fn a_fresh_slab_is_zero_and_can_be_populated() {
        let mut range = Slab::create(1 << 20).unwrap();
        range.populate().unwrap();
        assert!(range.bytes().iter().all(|byte| *byte == 0));
    }

    #[test]
    fn impossible_sizes_are_out_of_memory() {
        for len in [usize::MAX, isize::MAX as usize, 1 << 60] {
            assert!(matches!(Slab::create(len), Err(DeviceError::OutOfMemory { .. })), "{len}");
        }
    }
}
