//! Tensors in memory that both sides see: a payload is then (slab, offset, length), whatever its size.
//!
//! Host memory comes from slabs: memory files. Over a Unix socket each side passes the descriptors of its own, one by one as
//! they are first needed, and the other side maps them once, to be read. A tensor that lies in one is *lent*: its descriptor in
//! the frame says where it is and under which lease, the sender's [`Lender`] keeps its storage, and the receiver's tensor gives
//! the lease back after its last use. Leases are returned in batches, with the next frame or soon.
//!
//! ```text
//! lender                                        borrower
//!   Slab  (id, bytes, + the descriptor)   →       checks seals and size, maps
//!   Request or Reply (slab, offset, lease) →      borrows: `Storage::external`
//!   Landed (lease, bytes), if it is copied →      has the whole frame with the last byte
//!     once the frame is sent
//!   finds its own storage                 ←       Request or Reply (lease, offset): sends it back
//!   keeps the storage                     ←       Release (leases)
//!   Retire (id), once it is unmapped      →       unmaps after the last use
//! ```
//!
//! A slab's id is never used again, so it is its generation, too. Metadata never lies in a slab: the lender could change it
//! after it was checked. So can a lender that lies change a tensor while it is read; it is a process of the same user.
//!
//! Invariant L1 (SNAPSHOT): memory that is lent is neither written nor handed out again before its lease is returned or the
//! borrower is dead. If a borrower is lost but may live, the memory is given up instead ([`Storage::abandon`]).
//! Invariant L2: only files that can neither shrink nor be written by anyone later are mapped, and only offsets inside are read:
//! no read of a peer's tensor faults, whatever the peer does or however it dies.
//! Invariant L3: a mapping lives as long as its last tensor, also after the peer has died.
//! Invariant LIMITS: a peer's slabs are mapped up to [`Limits::slabs_max`](crate::Limits) and `slab_bytes_max`; who lends keeps
//! to the same, and copies beyond.
//!
//! Source: memfd_create(2), fcntl(2) "File Sealing", unix(7) `SCM_RIGHTS`.
#![expect(unsafe_code, reason = "maps memory of other processes")]

mod borrower;
mod lane;
mod lender;
mod ring;

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;

use farcall_device::{DescriptorPermit, Device, DeviceError, Kept, Release, Slab, Storage, is_forked_child};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

pub(crate) use borrower::{Borrower, Returns, read_release};
pub(crate) use lender::Lender;
pub(crate) use ring::{RingReader, RingWriter, Rings, Sleeper};

use crate::descriptor::Lent;
use crate::{CloseCause, NoSlabs, ProtocolError};

/// Tensors of so many bytes pass in slabs, where slabs pass. Shorter ones travel in their frame: a lease and its return cost about as much as this many bytes twice through a socket
/// (`benches`, `calls`).
pub const LENT_BYTES_MIN: u64 = 4 << 10;

/// Foreign tensors from so many bytes on are copied while the peer wakes, and it is told as they land (`endpoint::landing`).
/// Shorter ones are copied before their frame: telling of them would cost more than the peer gains.
pub(crate) const LANDED_BYTES_MIN: u64 = 256 << 10;

/// Why this process passes no slabs to anyone, tried for real; `None` if it does, and they are `wanted`.
pub fn no_slabs(wanted: bool) -> Option<NoSlabs> {
    if !wanted {
        return Some(NoSlabs::Off);
    }
    let slab = Slab::create(1).map_err(|error| error.to_string());
    let shared = slab
        .and_then(|slab| slab.slab().fd().map(drop).map_err(|error| format!("its memory cannot be shared: {error}")));
    shared.err().map(|reason| NoSlabs::Refused { reason })
}

/// An empty file in memory that can be sealed.
pub(crate) fn memory_file(name: &CStr) -> Result<OwnedFd, Errno> {
    // MFD_NOEXEC_SEAL (Linux 6.3), which rustix does not name yet; some systems refuse a memfd without it.
    const NOEXEC_SEAL: MemfdFlags = MemfdFlags::from_bits_retain(0x0008);
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    match rustix::fs::memfd_create(name, flags | NOEXEC_SEAL) {
        Err(Errno::INVAL) => rustix::fs::memfd_create(name, flags),
        created => created,
    }
}

/// A peer's slab, mapped to be read.
pub(crate) struct Mapping {
    start: NonNull<u8>,
    len: usize,
    /// For private views, while there are descriptors for them. A child would keep the memory by it.
    file: Option<(Kept, OwnedFd, DescriptorPermit)>,
}

// SAFETY: an address range with no thread affinity, which is only read.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps a file that the peer says is a slab of `len` bytes (L2).
    fn open(slab: u64, file: OwnedFd, len: u64) -> Result<Self, CloseCause> {
        let refused = |reason| CloseCause::Protocol(ProtocolError::Slab { slab, reason });
        let failed = |call, errno: Errno| {
            let source = Arc::new(io::Error::from(errno));
            CloseCause::Device(DeviceError::Os { call, source })
        };
        // Only memory files have seals.
        let seals = rustix::fs::fcntl_get_seals(&file).map_err(|_| refused("its descriptor is no memory file"))?;
        if !seals.contains(SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE | SealFlags::SEAL) {
            return Err(refused("it is not sealed: it could shrink, or be written by anyone"));
        }
        let size = rustix::fs::fstat(&file).map_err(|errno| failed("fstat", errno))?.st_size;
        let len = usize::try_from(len).ok().filter(|len| *len > 0 && i64::try_from(*len) == Ok(size));
        let len = len.ok_or_else(|| refused("its descriptor is of another size than announced"))?;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no memory that exists.
        let start = unsafe { rustix::mm::mmap(ptr::null_mut(), len, ProtFlags::READ, MapFlags::SHARED, &file, 0) };
        let start = start.map_err(|errno| failed("mmap of a peer's slab", errno))?.cast::<u8>();
        let start = NonNull::new(start).ok_or_else(|| failed("mmap of a peer's slab", Errno::NOMEM))?;
        // SAFETY: our mapping, of which nobody has a reference yet; the advice changes no contents.
        if let Err(errno) = unsafe { rustix::mm::madvise(start.as_ptr().cast(), len, Advice::LinuxDontFork) } {
            tracing::debug!(%errno, "a forked child will hold a peer's slab");
        }
        let file = DescriptorPermit::take().map(|permit| (Kept::new(&file), file, permit));
        Ok(Self { start, len, file })
    }

    /// The bytes from `offset` on as a storage, whose end returns `lease`. The caller has checked that they lie in the mapping.
    fn storage(self: &Arc<Self>, offset: usize, len: usize, lease: u64, returns: &Arc<Returns>) -> Storage {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len), "checked by the caller");
        let borrowed = Borrowed {
            mapping: Arc::clone(self),
            offset: offset as u64,
            bytes: len as u64,
            lease,
            returns: Arc::clone(returns),
        };
        // SAFETY: `offset + len` lies in the mapping.
        let start = unsafe { self.start.add(offset) };
        // SAFETY: mapped for as long as `borrowed` holds the mapping (L3), sealed to stay readable (L2), and not written by a
        // lender that keeps to the protocol before `lease` is returned (L1).
        unsafe { Storage::external(start, len, Device::HOST, Arc::new(borrowed)) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if is_forked_child() {
            return;
        }
        // SAFETY: our mapping, and no storage is left that could reach it (L3).
        if let Err(errno) = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) } {
            tracing::error!(%errno, "munmap failed: a peer's slab stays mapped");
        }
    }
}

/// The lease under which the peer behind `returns` has lent these bytes, and where in its slab they start.
pub(crate) fn lent_by(returns: &Arc<Returns>, storage: &Storage) -> Option<Lent> {
    let borrowed = storage.owner()?.downcast_ref::<Borrowed>()?;
    let Borrowed { lease, offset, .. } = *borrowed;
    Arc::ptr_eq(&borrowed.returns, returns).then_some(Lent { lease, offset })
}

/// What a borrowed storage holds.
struct Borrowed {
    mapping: Arc<Mapping>,
    offset: u64,
    bytes: u64,
    lease: u64,
    returns: Arc<Returns>,
}

impl Release for Borrowed {
    fn release(&self) {
        self.returns.push(self.lease, self.bytes);
    }

    /// L1.
    fn is_constant(&self) -> bool {
        true
    }

    fn file(&self) -> Option<(BorrowedFd<'_>, u64)> {
        self.mapping.file.as_ref().map(|(_, file, _)| (file.as_fd(), self.offset))
    }
}
