//! An ordered queue of work on one device.
//!
//! In the inline mode, the only one so far, an operation runs on the calling thread when it is enqueued, so events are born
//! complete and cost no memory. The signatures are those of queued modes: kernels own what they capture, events are waited for.
//! Invariant S1: an operation runs after everything its stream was told to wait for, and after the fences of its storages.
//! Invariant S2: tickets of one stream grow by one with each operation; an event covers all tickets up to its own.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::{Device, DeviceError, Event, Runtime, Storage, StorageMut, Tensor};

/// How long an inline operation waits for an event that another device has not completed.
const INLINE_WAIT_MAX: Duration = Duration::from_secs(30);
/// Reads of one operation that need no heap memory.
const INLINE_READS: usize = 8;

static NEXT_STREAM_ID: AtomicU64 = AtomicU64::new(1);

/// The number of a stream in this process; never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamId(u64);

impl StreamId {
    /// Of work that the host did itself, on no stream.
    pub const HOST: Self = Self(0);
}

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A queue of work on one device: first in, first out. Clones are the same queue.
#[derive(Clone)]
pub struct Stream(Arc<Queue>);

struct Queue {
    id: StreamId,
    device: Device,
    runtime: Runtime,
    /// Operations enqueued so far.
    tickets: AtomicU64,
    /// Events that the next operation must wait for: none, unless another device is behind.
    waits: Mutex<Vec<Event>>,
}

impl Stream {
    pub(crate) fn new(runtime: Runtime, device: Device) -> Self {
        let id = StreamId(NEXT_STREAM_ID.fetch_add(1, Ordering::Relaxed));
        Self(Arc::new(Queue { id, device, runtime, tickets: AtomicU64::new(0), waits: Mutex::default() }))
    }

    /// The device whose work this is.
    #[must_use]
    pub fn device(&self) -> Device {
        self.0.device
    }

    /// The number of this stream.
    #[must_use]
    pub fn id(&self) -> StreamId {
        self.0.id
    }

    /// The runtime that the stream belongs to, whose memory its results are made of.
    #[must_use]
    pub fn runtime(&self) -> &Runtime {
        &self.0.runtime
    }

    /// Memory on this stream's device. Its contents are unspecified.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    pub fn alloc(&self, len: usize) -> Result<StorageMut, DeviceError> {
        self.0.runtime.alloc(self.0.device, len)
    }

    /// The point after all work enqueued so far.
    pub fn record(&self) -> Event {
        let ticket = self.0.tickets.load(Ordering::Acquire);
        let mut waits = self.waits();
        waits.retain(|event| !matches!(event.query(), Ok(true)));
        if waits.is_empty() {
            return Event::complete_at(self.0.id, ticket);
        }
        let pending = waits.clone();
        drop(waits);
        Event::all_at(self.0.id, ticket, &pending)
    }

    /// Has later work on this stream run after `event`. Blocks no thread; a failed event fails that later work.
    pub fn wait(&self, event: &Event) {
        // Its own events are in order already, unless they stand for waits that are pending anyway.
        if event.stream() != self.0.id && !matches!(event.query(), Ok(true)) {
            self.waits().push(event.clone());
        }
    }

    /// Copies all bytes of `source` to `target`, from any device to any.
    ///
    /// # Errors
    /// [`DeviceError::LengthMismatch`] if the sizes differ; [`DeviceError::NotHost`] for memory out of the CPU's reach.
    pub fn copy(&self, source: &Storage, target: &mut StorageMut) -> Result<(), DeviceError> {
        if source.len() != target.len() {
            let what = "bytes of the copy's target";
            return Err(DeviceError::LengthMismatch { what, expected: source.len(), found: target.len() });
        }
        self.run(&[source], target, |sources, target| target.copy_from_slice(sources[0]))
    }

    /// Sets every byte of `target`.
    ///
    /// # Errors
    /// [`DeviceError::WrongDevice`] if it is not on the stream's device.
    pub fn fill(&self, target: &mut StorageMut, byte: u8) -> Result<(), DeviceError> {
        self.launch(&[], target, move |_, target| target.fill(byte))
    }

    /// Runs `kernel` on the bytes of `reads` and `write`, in stream order and after the fences of all of them.
    ///
    /// This is how operators for the CPU, and for emulated devices, are built. The kernel owns what it captures, since in other
    /// modes it runs later, on another thread.
    ///
    /// # Errors
    /// [`DeviceError::WrongDevice`] if a storage is not on the stream's device; the failure of work that is waited for.
    pub fn launch<F>(&self, reads: &[&Storage], write: &mut StorageMut, kernel: F) -> Result<(), DeviceError>
    where
        F: FnOnce(&[&[u8]], &mut [u8]) + Send + 'static,
    {
        let mut devices = reads.iter().map(|storage| storage.device()).chain([write.device()]);
        if let Some(found) = devices.find(|device| *device != self.0.device) {
            return Err(DeviceError::WrongDevice { expected: self.0.device, found });
        }
        self.run(reads, write, kernel)
    }

    /// Copies a view's elements, in row-major order, to fresh memory on `device`: a contiguous tensor of the same shape.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`], [`DeviceError::NotHost`] for memory out of the CPU's reach.
    /// # Cost
    /// One pass over the elements; rows that are contiguous are copied whole.
    pub fn pack(&self, tensor: &Tensor, device: Device) -> Result<Tensor, DeviceError> {
        let layout = tensor.layout().clone();
        let packed = layout.packed();
        let mut target = self.0.runtime.alloc(device, packed.size_bytes())?;
        self.run(&[tensor.storage()], &mut target, move |sources, target| {
            crate::pack::pack(&layout, sources[0], target)
        })?;
        Tensor::from_storage(target.freeze(self), packed)
    }

    /// Blocks this thread until all work enqueued so far is done, at most for `timeout`.
    ///
    /// # Errors
    /// [`DeviceError::Timeout`], or the failure of work that is waited for.
    pub fn synchronize(&self, timeout: Duration) -> Result<(), DeviceError> {
        let deadline = Instant::now().checked_add(timeout);
        let pending = self.waits().clone();
        for event in pending {
            event
                .block(deadline.map_or(Duration::MAX, |deadline| deadline.saturating_duration_since(Instant::now())))?;
        }
        Ok(())
    }

    /// Runs one operation now (S1).
    fn run(
        &self,
        reads: &[&Storage],
        write: &mut StorageMut,
        kernel: impl FnOnce(&[&[u8]], &mut [u8]),
    ) -> Result<(), DeviceError> {
        for fence in reads.iter().map(|storage| storage.ready_event()).chain(write.fences()) {
            self.wait(fence);
        }
        // Inline, the enqueuing thread is the device: it waits for other devices here, and only here.
        self.synchronize(INLINE_WAIT_MAX)?;
        let target = write.device_bytes_mut()?;
        let mut inline: [&[u8]; INLINE_READS] = [&[]; INLINE_READS];
        if let Some(slices) = inline.get_mut(..reads.len()) {
            for (slice, storage) in slices.iter_mut().zip(reads) {
                *slice = storage.device_bytes()?;
            }
            kernel(slices, target);
        } else {
            let slices = reads.iter().map(|storage| storage.device_bytes()).collect::<Result<Vec<_>, _>>()?;
            kernel(&slices, target);
        }
        self.0.tickets.fetch_add(1, Ordering::AcqRel);
        write.record_write(self.record());
        for storage in reads {
            storage.record_reader(self);
        }
        Ok(())
    }

    fn waits(&self) -> MutexGuard<'_, Vec<Event>> {
        self.0.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PartialEq for Stream {
    fn eq(&self, other: &Self) -> bool {
        self.0.id == other.0.id
    }
}

impl Eq for Stream {}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Stream({} on {})", self.0.id, self.0.device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Config;

    fn runtime() -> Runtime {
        Runtime::new(Config { emulated_devices: 1, ..Config::default() }).unwrap()
    }

    #[test]
    fn s1_work_waits_for_what_the_stream_was_told() {
        let stream = runtime().stream(Device::HOST).unwrap();
        let (trigger, other) = Event::pending_at(StreamId::HOST, 1);
        stream.wait(&other);
        let after = stream.record();
        assert!(!after.query().unwrap());
        assert!(matches!(stream.synchronize(Duration::ZERO), Err(DeviceError::Timeout { .. })));
        let mut target = stream.alloc(4).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| trigger.complete(Ok(())));
            stream.fill(&mut target, 9).unwrap();
        });
        assert!(other.query().unwrap(), "the fill ran after it");
        assert!(after.query().unwrap());
        assert_eq!(target.freeze(&stream).as_bytes().unwrap(), [9; 4]);
    }

    #[test]
    fn s1_a_failed_wait_fails_the_work_behind_it() {
        let stream = runtime().stream(Device::HOST).unwrap();
        let (trigger, other) = Event::pending_at(StreamId::HOST, 1);
        stream.wait(&other);
        drop(trigger);
        let mut target = stream.alloc(4).unwrap();
        assert!(matches!(stream.fill(&mut target, 9), Err(DeviceError::Cancelled)));
        assert!(matches!(stream.record().query(), Err(DeviceError::Cancelled)));
    }

    #[test]
    fn s2_tickets_count_operations() {
        let stream = runtime().stream(Device::HOST).unwrap();
        let mut target = stream.alloc(4).unwrap();
        let before = stream.record();
        stream.fill(&mut target, 1).unwrap();
        stream.fill(&mut target, 2).unwrap();
        let after = stream.record();
        assert_eq!((before.ticket(), after.ticket()), (0, 2));
        assert_eq!((after.stream(), after.query().unwrap()), (stream.id(), true));
    }

    #[test]
    fn a_copy_goes_from_device_to_device_and_a_kernel_stays_on_its_own() {
        let runtime = runtime();
        let (host, cuda) = (runtime.stream(Device::HOST).unwrap(), runtime.stream(Device::Cuda(0)).unwrap());
        let mut bytes = cuda.alloc(3).unwrap();
        assert!(matches!(host.fill(&mut bytes, 5), Err(DeviceError::WrongDevice { .. })));
        cuda.fill(&mut bytes, 5).unwrap();
        let on_cuda = bytes.freeze(&cuda);
        assert!(matches!(on_cuda.as_bytes(), Err(DeviceError::NotHost { device: Device::Cuda(0) })));
        let mut on_host = host.alloc(3).unwrap();
        host.copy(&on_cuda, &mut on_host).unwrap();
        assert_eq!(on_host.freeze(&host).as_bytes().unwrap(), [5; 3]);
        let mut short = host.alloc(2).unwrap();
        assert!(matches!(
            host.copy(&on_cuda, &mut short),
            Err(DeviceError::LengthMismatch { expected: 3, found: 2, .. })
        ));
    }

    #[test]
    fn a_kernel_reads_any_number_of_storages() {
        let stream = runtime().stream(Device::HOST).unwrap();
        for count in [0, 1, 8, 9, 20] {
            let storages: Vec<_> = (0..count)
                .map(|index| {
                    let mut bytes = stream.alloc(1).unwrap();
                    stream.fill(&mut bytes, index).unwrap();
                    bytes.freeze(&stream)
                })
                .collect();
            let mut sum = stream.alloc(1).unwrap();
            let add = |reads: &[&[u8]], target: &mut [u8]| target[0] = reads.iter().map(|read| read[0]).sum();
            stream.launch(&storages.iter().collect::<Vec<_>>(), &mut sum, add).unwrap();
            assert_eq!(sum.freeze(&stream).as_bytes().unwrap(), [(0..count).sum::<u8>()]);
        }
    }
}
