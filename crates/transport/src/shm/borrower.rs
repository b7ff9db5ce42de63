//! A peer's slabs as this side has mapped them, and the leases that go back.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};

use farcall_device::{Layout, Storage};

use super::{Lender, Mapping};
use crate::descriptor::{Lent, Place};
use crate::endpoint::{Endpoint, lock};
use crate::frame::{Header, Kind, limit};
use crate::{CloseCause, Limits, ProtocolError};

/// From so many leases, or bytes, on they go back soon instead of with the next frame or heartbeat.
const RETURNS_MAX: usize = 64;
const RETURN_BYTES_MAX: u64 = 1 << 20;

/// One peer's slabs.
pub(crate) struct Borrower {
    limits: Limits,
    slabs: HashMap<u64, Arc<Mapping>>,
    mapped_bytes: u64,
    returns: Arc<Returns>,
    /// What this side has lent to that peer.
    lender: Arc<Mutex<Lender>>,
}

impl Borrower {
    pub(crate) fn new(limits: Limits, returns: Arc<Returns>, lender: Arc<Mutex<Lender>>) -> Self {
        Self { limits, slabs: HashMap::new(), mapped_bytes: 0, returns, lender }
    }

    /// The peer passes a slab of `len` bytes, with its descriptor.
    pub(crate) fn on_slab(&mut self, slab: u64, len: u64, descriptor: Option<OwnedFd>) -> Result<(), CloseCause> {
        limit("slabs", self.slabs.len() as u64 + 1, self.limits.slabs_max as u64)?;
        limit("bytes of slabs", self.mapped_bytes.saturating_add(len), self.limits.slab_bytes_max)?;
        let refused = |reason| ProtocolError::Slab { slab, reason };
        let descriptor = descriptor
            .ok_or(refused("no descriptor came with it; if this process has none left, raise `ulimit -n`"))?;
        if self.slabs.contains_key(&slab) {
            return Err(refused("it was passed twice").into());
        }
        let mapping = Mapping::open(slab, descriptor, len)?;
        self.mapped_bytes += len;
        self.slabs.insert(slab, Arc::new(mapping));
        Ok(())
    }

    /// The peer has unmapped a slab.
    pub(crate) fn on_retire(&mut self, slab: u64) -> Result<(), ProtocolError> {
        let mapping = self.slabs.remove(&slab).ok_or(ProtocolError::UnknownSlab { slab })?;
        self.mapped_bytes -= mapping.len as u64;
        Ok(())
    }

    /// A tensor's bytes, where the peer says that they are.
    pub(crate) fn borrow(&self, place: Place, len: u64) -> Result<Storage, ProtocolError> {
        let Place { slab, offset, lease } = place;
        let mapping = self.slabs.get(&slab).ok_or(ProtocolError::UnknownSlab { slab })?;
        let slab_bytes = mapping.len as u64;
        if offset.checked_add(len).is_none_or(|end| end > slab_bytes) {
            return Err(ProtocolError::OutsideSlab { slab, offset, len, slab_bytes });
        }
        Ok(mapping.storage(offset as usize, len as usize, lease, &self.returns))
    }

    /// A tensor of this side's own that the peer had borrowed: its storage, and `layout` where it lies in that.
    pub(crate) fn take_back(&self, lent: Lent, layout: &Layout, len: u64) -> Result<(Storage, Layout), CloseCause> {
        let (storage, start) = lock(&self.lender).sent_back(lent, len)?;
        let size = layout.dtype().size_bytes() as u64;
        if !start.is_multiple_of(size) {
            let message = format!("{} that start at byte {start} of what was lent", layout.dtype());
            return Err(ProtocolError::Malformed { what: "descriptor", message }.into());
        }
        let offset = (start / size) as usize;
        let layout = Layout::strided(layout.dtype(), layout.shape(), layout.strides(), offset);
        Ok((storage, layout.map_err(ProtocolError::from)?))
    }
}

/// Leases whose tensors are dropped, on their way back to the peer.
#[derive(Default)]
pub(crate) struct Returns {
    queue: Mutex<Queue>,
    /// The queue's leases; who drops a tensor and then sends sees its own.
    waiting: AtomicUsize,
    endpoint: OnceLock<Weak<Endpoint>>,
}

#[derive(Default)]
struct Queue {
    leases: Vec<u64>,
    bytes: u64,
    /// Somebody was asked to send them soon.
    hurried: bool,
}

impl Returns {
    /// Where they go.
    pub(crate) fn attach(&self, endpoint: Weak<Endpoint>) {
        // An endpoint is opened once.
        let _ = self.endpoint.set(endpoint);
    }

    /// A tensor was dropped, by any thread: nothing here blocks.
    pub(super) fn push(&self, lease: u64, bytes: u64) {
        let Some(endpoint) = self.endpoint.get().and_then(Weak::upgrade) else { return };
        if endpoint.closed().is_some() {
            return;
        }
        let hurry = {
            let mut queue = lock(&self.queue);
            queue.leases.push(lease);
            self.waiting.store(queue.leases.len(), Ordering::Relaxed);
            queue.bytes += bytes;
            let much = queue.leases.len() >= RETURNS_MAX || queue.bytes >= RETURN_BYTES_MAX;
            let asked = queue.hurried;
            queue.hurried |= much;
            much && !asked
        };
        if hurry {
            endpoint.driver().flush_soon(&endpoint);
        }
    }

    /// There are none to return.
    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) == 0
    }

    /// Appends the frames that return them all.
    pub(crate) fn write(&self, limits: &Limits, wire: &mut Vec<u8>) {
        if self.is_empty() {
            return;
        }
        let mut queue = lock(&self.queue);
        self.waiting.store(0, Ordering::Relaxed);
        for leases in queue.leases.chunks((limits.metadata_bytes_max as usize / 8).max(1)) {
            let header = Header { meta_len: 8 * leases.len() as u32, ..Header::new(Kind::Release) };
            wire.extend_from_slice(header.as_bytes());
            wire.extend(leases.iter().flat_map(|lease| lease.to_le_bytes()));
        }
        queue.leases.clear();
        (queue.bytes, queue.hurried) = (0, false);
    }
}

/// The leases that a frame returns.
pub(crate) fn read_release(metadata: &[u8]) -> Result<impl Iterator<Item = u64>, ProtocolError> {
    let (leases, rest) = metadata.as_chunks::<8>();
    if !rest.is_empty() {
        let message = format!("{} bytes are no leases of 8 bytes each", metadata.len());
        return Err(ProtocolError::Malformed { what: "release", message });
    }
    Ok(leases.iter().map(|lease| u64::from_le_bytes(*lease)))
}

#[cfg(test)]
mod tests {
    use farcall_device::{Slab, SlabRange};
    use rustix::fs::{MemfdFlags, SealFlags};

    use super::*;

    const ALL: SealFlags =
        SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL).union(SealFlags::FUTURE_WRITE);

    fn borrower(limits: Limits) -> Borrower {
        Borrower::new(limits, Arc::default(), Arc::default())
    }

    fn file(len: u64, seals: SealFlags) -> OwnedFd {
        let file = rustix::fs::memfd_create(c"slab", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&file, len).unwrap();
        rustix::fs::fcntl_add_seals(&file, seals).unwrap();
        file
    }

    fn slab() -> (SlabRange, OwnedFd) {
        let mut range = Slab::create(8192).unwrap();
        range.bytes_mut()[4000..4005].copy_from_slice(b"hello");
        let file = range.slab().fd().unwrap().try_clone_to_owned().unwrap();
        (range, file)
    }

    #[test]
    fn a_tensor_is_read_where_it_lies_and_its_lease_goes_back() {
        let mut borrower = borrower(Limits::default());
        let (range, file) = slab();
        borrower.on_slab(7, 8192, Some(file)).unwrap();
        let storage = borrower.borrow(Place { slab: 7, offset: 4000, lease: 3 }, 5).unwrap();
        assert_eq!(storage.as_bytes().unwrap(), b"hello");
        // L3: what is borrowed stays, whatever becomes of its owner and of its name.
        drop(range);
        borrower.on_retire(7).unwrap();
        assert_eq!(borrower.mapped_bytes, 0);
        assert_eq!(storage.as_bytes().unwrap(), b"hello");
        assert_eq!(borrower.on_retire(7), Err(ProtocolError::UnknownSlab { slab: 7 }));
    }

    /// L2: each of these could end the reader by SIGBUS, or change under it.
    #[test]
    fn l2_files_that_could_shrink_or_be_written_are_refused() {
        let no_file = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        let cases = [
            (None, "no descriptor came with it"),
            (Some(no_file), "no memory file"),
            (Some(file(4096, SealFlags::empty())), "not sealed"),
            (Some(file(4096, ALL.difference(SealFlags::SHRINK))), "not sealed"),
            (Some(file(4096, ALL.difference(SealFlags::FUTURE_WRITE))), "not sealed"),
            (Some(file(4096, ALL.difference(SealFlags::SEAL))), "not sealed"),
            (Some(file(8192, ALL)), "another size"),
            (Some(file(0, ALL)), "another size"),
        ];
        for (file, why) in cases {
            let mut borrower = borrower(Limits::default());
            let Err(CloseCause::Protocol(error)) = borrower.on_slab(1, 4096, file) else { panic!("{why}") };
            assert!(error.to_string().contains(why), "{error}");
            assert_eq!((borrower.slabs.len(), borrower.mapped_bytes), (0, 0));
        }
        assert!(borrower(Limits::default()).on_slab(1, 0, Some(file(0, ALL))).is_err());
    }

    #[test]
    fn places_outside_a_slab_or_in_none_are_refused() {
        let mut borrower = borrower(Limits::default());
        borrower.on_slab(7, 8192, Some(slab().1)).unwrap();
        let borrow = |slab, offset, len| borrower.borrow(Place { slab, offset, lease: 1 }, len).map(drop);
        assert_eq!(borrow(7, 8191, 1), Ok(()));
        assert_eq!(borrow(8, 0, 1), Err(ProtocolError::UnknownSlab { slab: 8 }));
        for (offset, len) in [(8192, 1), (8191, 2), (0, 8193), (u64::MAX, 1), (1, u64::MAX)] {
            let outside = ProtocolError::OutsideSlab { slab: 7, offset, len, slab_bytes: 8192 };
            assert_eq!(borrow(7, offset, len), Err(outside));
        }
    }

    #[test]
    fn limits_slabs_are_counted_before_they_are_mapped() {
        let few = Limits { slabs_max: 1, ..Limits::default() };
        let small = Limits { slab_bytes_max: 10_000, ..Limits::default() };
        for (limits, what) in [(few, "slabs"), (small, "bytes of slabs")] {
            let mut borrower = borrower(limits);
            borrower.on_slab(1, 8192, Some(slab().1)).unwrap();
            let refused = borrower.on_slab(2, 8192, Some(slab().1));
            assert!(
                matches!(refused, Err(CloseCause::Protocol(ProtocolError::Limit { what: found, .. })) if found == what)
            );
            borrower.on_retire(1).unwrap();
            borrower.on_slab(2, 8192, Some(slab().1)).unwrap();
        }
        let mut borrower = borrower(Limits::default());
        borrower.on_slab(1, 8192, Some(slab().1)).unwrap();
        assert!(borrower.on_slab(1, 8192, Some(slab().1)).is_err(), "ids are not used again");
    }

    #[test]
    fn returns_are_frames_of_leases() {
        let returns = Returns::default();
        lock(&returns.queue).leases.extend([1, 2, 3]);
        returns.waiting.store(3, Ordering::Relaxed);
        let mut wire = Vec::new();
        let limits = Limits { metadata_bytes_max: 16, ..Limits::default() };
        returns.write(&limits, &mut wire);
        assert_eq!(wire.len(), 2 * 64 + 3 * 8, "two frames");
        assert_eq!(read_release(&wire[64..80]).unwrap().collect::<Vec<_>>(), [1, 2]);
        assert!(read_release(&wire[64..75]).is_err());
        wire.clear();
        returns.write(&limits, &mut wire);
        assert!(wire.is_empty());
    }
}
