//! An ordered queue of work on one device.
//!
//! On the CPU, inline, an operation runs on the calling thread when it is enqueued, so events are born complete and cost no memory. In the
//! queued modes (see [`CpuMode`](crate::CpuMode)) it runs later: kernels own what they capture, and events are waited for.
//! On a CUDA device it is the driver's: waits for other CUDA streams are enqueued, and for anything else that is pending the
//! enqueuing thread blocks, as inline.
//! Invariant S1: an operation runs after everything its stream was told to wait for, and after the fences of its storages.
//! Invariant S2: tickets of one stream grow by one with each operation; an event covers all tickets up to its own. Where clocks
//! are kept, the first point after a wait takes a ticket too, so that equal tickets mean equal clocks.
//! Invariant S3: what lies before a stream's next operation is its clock, joined at each wait; a wait for what the clock or the
//! host covers is left out.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::checker::Race;
use crate::clock::{self, Clock};
use crate::cpu::{self, Engine, Op, Wait, Work};
use crate::cuda::{CudaStream, Rows};
use crate::event::Lane;
use crate::progress::Progress;
use crate::{Access, Device, DeviceError, Event, Runtime, Storage, StorageMut, Tensor};

mod on_cuda;

/// How long an inline operation, or one of a CUDA device, waits for an event that another device has not completed.
const INLINE_WAIT_MAX: Duration = Duration::from_secs(30);
/// Reads of one operation that need no heap memory.
const INLINE_READS: usize = 8;

static NEXT_STREAM_ID: AtomicU64 = AtomicU64::new(1);

/// The number of a stream in this process; never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct StreamId(u64);

impl StreamId {
    /// Of work that the host did itself, on no stream.
    pub const HOST: Self = Self(0);

    pub(crate) fn fresh() -> Self {
        Self(NEXT_STREAM_ID.fetch_add(1, Ordering::Relaxed))
    }
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
    order: Mutex<Order>,
    /// `None` while nothing is queued or checked: no clocks are kept then.
    tracked: Option<Tracked>,
    /// Of a stream of the CPU: those that copy from and to CUDA devices for it.
    copiers: Mutex<Vec<Stream>>,
}

/// What the next operation comes after.
#[derive(Default)]
struct Order {
    /// Events that it must wait for. Inline: none, unless another device is behind.
    waits: Vec<Event>,
    clock: Option<Arc<Clock>>,
    /// The clock has grown since the last ticket.
    has_joined: bool,
}

impl Order {
    fn await_too(&mut self, event: &Event) {
        // A later point of the same CUDA stream stands for the earlier: what nobody looks at must not pile up.
        if let Some((cuda, ticket)) = event.on_cuda() {
            let same = |other: &&mut Event| other.on_cuda().is_some_and(|(other, _)| Arc::ptr_eq(other, cuda));
            if let Some(other) = self.waits.iter_mut().find(same) {
                if other.ticket() < ticket {
                    *other = event.clone();
                }
                return;
            }
        }
        self.waits.push(event.clone());
    }
}

struct Tracked {
    engine: Arc<Engine>,
    lane: Arc<Lane>,
    place: Place,
}

/// Where operations run.
enum Place {
    /// On the thread that enqueues them.
    Inline,
    /// On the CPU, later.
    Queued(Arc<Work>),
    /// On a CUDA device.
    Cuda(Arc<CudaStream>),
}

/// Who asks for a wait.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Edge {
    /// This crate, for a fence: mutants leave these out.
    Fence,
    User,
}

impl Stream {
    pub(crate) fn new(runtime: Runtime, device: Device) -> Result<Self, DeviceError> {
        let id = StreamId::fresh();
        let tracked = match (runtime.cuda_context(device)?, runtime.engine()) {
            (Some(context), _) => Some(Tracked::on_cuda(id, &runtime, context)?),
            (None, None) => None,
            (None, Some(engine)) => {
                let engine = Arc::clone(engine);
                let progress = Progress::new(false);
                let place = engine.lease(id, device, &progress)?.map_or(Place::Inline, Place::Queued);
                let lane = Arc::new(Lane { progress, engine: Some(Arc::clone(&engine)), cuda: None });
                Some(Tracked { engine, lane, place })
            }
        };
        let (tickets, order, copiers) = (AtomicU64::new(0), Mutex::default(), Mutex::default());
        Ok(Self(Arc::new(Queue { id, device, runtime, tickets, order, tracked, copiers })))
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
        self.record_in(&mut self.order())
    }

    /// Has later work on this stream run after `event`. Blocks no thread; a failed event fails that later work.
    pub fn wait(&self, event: &Event) {
        self.follow(&mut self.order(), event, Edge::User);
    }

    /// Has later work on this stream run after a storage's write.
    pub(crate) fn wait_for(&self, storage: &Storage) {
        self.follow(&mut self.order(), storage.ready_event(), Edge::Fence);
    }

    /// Copies all bytes of `source` to `target`, from any device to any.
    ///
    /// # Errors
    /// [`DeviceError::LengthMismatch`] if the sizes differ; [`DeviceError::NotHost`] for memory out of the CPU's reach;
    /// [`DeviceError::Unsupported`] for a copy within the host on a stream of a CUDA device.
    /// # Cost
    /// From or to a CUDA device the host is free meanwhile if its side is pinned ([`Runtime::alloc_pinned`]); other host memory the
    /// driver copies through buffers of its own, for which this call may wait.
    pub fn copy(&self, source: &Storage, target: &mut StorageMut) -> Result<(), DeviceError> {
        if source.len() != target.len() {
            let what = "bytes of the copy's target";
            return Err(DeviceError::LengthMismatch { what, expected: source.len(), found: target.len() });
        }
        if source.is_cuda() || target.is_cuda() || self.on_cuda().is_some() {
            let device = if source.is_cuda() { source.device() } else { target.device() };
            let rows = Rows { count: 1, len: source.len(), source_step: source.len() };
            return self.through_cuda(device, |stream| stream.copy_rows("copy", source, 0, target, rows));
        }
        self.run("copy", &[source], &mut [target], |sources, targets| {
            targets[0].copy_from_slice(sources[0]);
            Ok(())
        })
    }

    /// Sets every byte of `target`.
    ///
    /// # Errors
    /// [`DeviceError::WrongDevice`] if it is not on the stream's device.
    pub fn fill(&self, target: &mut StorageMut, byte: u8) -> Result<(), DeviceError> {
        self.expect_own(target.device())?;
        if let Some((tracked, cuda)) = self.on_cuda() {
            let (space, len) = (target.space_mut()?, target.len());
            return self.run_on_cuda(tracked, cuda, "fill", &[], target, || cuda.fill(space, byte, len));
        }
        self.run("fill", &[], &mut [target], move |_, targets| {
            targets[0].fill(byte);
            Ok(())
        })
    }

    /// As [`Stream::fill`], by this crate's own kernel on a CUDA device: for tests of the kernel.
    #[doc(hidden)]
    pub fn fill_by_kernel(&self, target: &mut StorageMut, byte: u8) -> Result<(), DeviceError> {
        self.expect_own(target.device())?;
        let Some((tracked, cuda)) = self.on_cuda() else { return self.fill(target, byte) };
        let (space, len) = (target.space_mut()?, target.len());
        self.run_on_cuda(tracked, cuda, "fill", &[], target, || cuda.fill_by_kernel(space, byte, len))
    }

    /// Keeps the stream busy for a time, at most 10 s: in tests and benches, it makes a missing wait show.
    ///
    /// # Errors
    /// On a CUDA device those of its driver, such as [`DeviceError::Driver`] if it cannot compile the kernel; otherwise as
    /// [`Stream::launch`].
    pub fn delay(&self, duration: Duration) -> Result<(), DeviceError> {
        // No bytes are touched: an empty storage stands for them.
        let mut nothing = StorageMut::empty(self.0.device);
        if let Some((tracked, cuda)) = self.on_cuda() {
            return self.run_on_cuda(tracked, cuda, "delay", &[], &mut nothing, || cuda.delay(duration));
        }
        let duration = duration.min(Duration::from_secs(10));
        self.run("delay", &[], &mut [&mut nothing], move |_, _| {
            std::thread::sleep(duration);
            Ok(())
        })
    }

    /// Runs `kernel` on the bytes of `reads` and `write`, in stream order and after the fences of all of them.
    ///
    /// This is how operators for the CPU, and for emulated devices, are built. The kernel owns what it captures, since in queued
    /// modes it runs later, on another thread. It must not wait for work on streams.
    ///
    /// # Errors
    /// [`DeviceError::WrongDevice`] if a storage is not on the stream's device; [`DeviceError::Unsupported`] on a real CUDA device,
    /// which runs no Rust; inline, the failure of work that is waited for,
    /// which in queued modes is the failure of the event behind this operation.
    pub fn launch<F>(&self, reads: &[&Storage], write: &mut StorageMut, kernel: F) -> Result<(), DeviceError>
    where
        F: FnOnce(&[&[u8]], &mut [u8]) + Send + 'static,
    {
        for device in reads.iter().map(|storage| storage.device()).chain([write.device()]) {
            self.expect_own(device)?;
        }
        if self.on_cuda().is_some() {
            return Err(DeviceError::Unsupported { what: "a kernel of the CPU", device: self.0.device });
        }
        self.run("launch", reads, &mut [write], |reads, writes| {
            kernel(reads, writes[0]);
            Ok(())
        })
    }

    /// As [`Stream::launch`], for a kernel that writes any number of storages and may find that its bytes cannot be worked on,
    /// such as an index that is out of range. Races are reported under the name `op`.
    ///
    /// # Errors
    /// Those of [`Stream::launch`], and what the kernel returned: inline, from this call; in queued modes it is the failure of the
    /// event behind the operation and, as any failure of a queued stream, of that stream's later work.
    pub fn launch_many<F>(
        &self,
        op: &'static str,
        reads: &[&Storage],
        writes: &mut [&mut StorageMut],
        kernel: F,
    ) -> Result<(), DeviceError>
    where
        F: FnOnce(&[&[u8]], &mut [&mut [u8]]) -> Result<(), DeviceError> + Send + 'static,
    {
        let devices = reads.iter().map(|storage| storage.device());
        for device in devices.chain(writes.iter().map(|storage| storage.device())) {
            self.expect_own(device)?;
        }
        if self.on_cuda().is_some() {
            return Err(DeviceError::Unsupported { what: op, device: self.0.device });
        }
        self.run(op, reads, writes, kernel)
    }

    /// Copies a view's elements, in row-major order, to fresh memory on `device`: a contiguous tensor of the same shape.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`], [`DeviceError::NotHost`] for memory out of the CPU's reach; [`DeviceError::Unsupported`] on a
    /// CUDA device for a view whose elements are not rows at one distance: there is no kernel for it yet.
    /// # Cost
    /// One pass over the elements; rows that are contiguous are copied whole.
    pub fn pack(&self, tensor: &Tensor, device: Device) -> Result<Tensor, DeviceError> {
        let layout = tensor.layout().clone();
        let packed = layout.packed();
        if tensor.storage().is_cuda() || self.0.runtime.cuda_context(device)?.is_some() {
            return self.pack_on_cuda(tensor, device);
        }
        let mut target = self.0.runtime.alloc(device, packed.size_bytes())?;
        self.run("pack", &[tensor.storage()], &mut [&mut target], move |sources, targets| {
            crate::pack::pack(&layout, sources[0], targets[0]);
            Ok(())
        })?;
        Tensor::from_storage(target.freeze(self), packed)
    }

    /// As [`Stream::pack`], into memory that is there and has exactly the size of the elements.
    ///
    /// # Errors
    /// [`DeviceError::LengthMismatch`] if the sizes differ; else those of [`Stream::pack`] and [`Stream::copy`].
    /// # Cost
    /// As [`Stream::pack`]; with a CUDA device, a view with gaps is packed to memory of its own first.
    pub fn pack_into(&self, tensor: &Tensor, target: &mut StorageMut) -> Result<(), DeviceError> {
        let layout = tensor.layout().clone();
        let packed = layout.packed();
        let (expected, found) = (packed.size_bytes(), target.len());
        if expected != found {
            let what = "bytes of the memory to pack into";
            return Err(DeviceError::LengthMismatch { what, expected, found });
        }
        if packed == layout && tensor.storage().len() == expected {
            return self.copy(tensor.storage(), target);
        }
        if tensor.storage().is_cuda() || target.is_cuda() || self.on_cuda().is_some() {
            let packed = self.pack_on_cuda(tensor, target.device())?;
            return self.copy(packed.storage(), target);
        }
        self.run("pack", &[tensor.storage()], &mut [target], move |sources, targets| {
            crate::pack::pack(&layout, sources[0], targets[0]);
            Ok(())
        })
    }

    /// Blocks this thread until all work enqueued so far is done, at most for `timeout`.
    ///
    /// # Errors
    /// [`DeviceError::Timeout`], or the failure of work that is waited for.
    pub fn synchronize(&self, timeout: Duration) -> Result<(), DeviceError> {
        if self.0.tracked.is_some() { self.record().block(timeout) } else { self.await_others(timeout) }
    }

    /// Inline, blocks until all that was waited for is over.
    fn await_others(&self, timeout: Duration) -> Result<(), DeviceError> {
        let pending = self.order().waits.clone();
        if pending.is_empty() {
            return Ok(());
        }
        let deadline = Instant::now().checked_add(timeout);
        for event in pending {
            event
                .block(deadline.map_or(Duration::MAX, |deadline| deadline.saturating_duration_since(Instant::now())))?;
        }
        Ok(())
    }

    /// The fence of a storage that `writer` wrote, once its holder freezes it here.
    pub(crate) fn take_over(&self, written: &Event, writer: Access) -> Event {
        let mut order = self.order();
        self.follow(&mut order, written, Edge::Fence);
        let event = self.record_in(&mut order);
        let later = Access { op: "freeze", stream: self.0.id, ticket: event.ticket() };
        drop(self.check(order, later, [(writer, true)]));
        event
    }

    /// The point up to which this stream reads a storage whose write it waited for.
    pub(crate) fn record_read_of(&self, storage: &Storage) -> Event {
        let mut order = self.order();
        let event = self.record_in(&mut order);
        let later = Access { op: "read", stream: self.0.id, ticket: event.ticket() };
        drop(self.check(order, later, [(storage.writer(), true)]));
        event
    }

    pub(crate) fn engine(&self) -> Option<&Arc<Engine>> {
        self.0.tracked.as_ref().map(|tracked| &tracked.engine)
    }

    fn record_in(&self, order: &mut Order) -> Event {
        let ticket = self.0.tickets.load(Ordering::Acquire);
        let Some(tracked) = &self.0.tracked else {
            order.waits.retain(|event| !event.is_complete());
            if order.waits.is_empty() {
                return Event::complete_at(self.0.id, ticket);
            }
            return Event::all_at(self.0.id, ticket, &order.waits, None, None);
        };
        let ticket = match &tracked.place {
            Place::Cuda(cuda) => return self.record_on_cuda(tracked, cuda, order),
            Place::Inline => {
                let ticket = if order.has_joined { self.pass_inline(tracked, order) } else { ticket };
                order.waits.retain(|event| !event.is_complete());
                if !order.waits.is_empty() {
                    let engine = Some(Arc::clone(&tracked.engine));
                    return Event::all_at(self.0.id, ticket, &order.waits, order.clock.clone(), engine);
                }
                ticket
            }
            Place::Queued(work) if order.has_joined || !order.waits.is_empty() => {
                self.enqueue(tracked, work, order, "wait", None)
            }
            Place::Queued(_) => ticket,
        };
        Event::at(self.0.id, ticket, Arc::clone(&tracked.lane), order.clock.clone())
    }

    /// Puts the next operation after `event`.
    fn follow(&self, order: &mut Order, event: &Event, edge: Edge) {
        // Its own events are in order already, unless they stand for waits that are pending anyway.
        if event.stream() == self.0.id {
            return;
        }
        let Some(tracked) = &self.0.tracked else {
            if !event.is_complete() {
                order.await_too(event);
            }
            return;
        };
        let host = tracked.engine.host();
        let (stream, ticket) = (event.stream(), event.ticket());
        let covered = order.clock.as_ref().is_some_and(|clock| clock.covers(stream, ticket));
        if !covered && !host.knows(stream, ticket) {
            if edge == Edge::Fence && !tracked.engine.keeps_edge() {
                return;
            }
            clock::join_shared(&mut order.clock, event, &host);
            order.has_joined = true;
        } else if !matches!(tracked.place, Place::Inline) && !event.is_by_hand() {
            return;
        }
        // A ticket says all only about a queued stream's work, so other events are asked. A failed one is waited for: it fails us.
        if !event.is_complete() {
            order.await_too(event);
        }
    }

    /// Reports earlier uses that nothing orders before `later`, which comes next.
    fn check<'a>(
        &self,
        order: MutexGuard<'a, Order>,
        later: Access,
        earlier: impl IntoIterator<Item = (Access, bool)>,
    ) -> MutexGuard<'a, Order> {
        let Some(engine) = self.engine().filter(|engine| engine.is_checked()) else { return order };
        let host = engine.host();
        let covers = |access: &Access| {
            access.stream == self.0.id
                || order.clock.as_ref().is_some_and(|clock| clock.covers(access.stream, access.ticket))
                || host.covers(access.stream, access.ticket)
        };
        let uncovered = earlier.into_iter().filter(|(earlier, _)| !covers(earlier));
        let races: Vec<_> = uncovered.map(|(earlier, is_write)| Race { earlier, is_write, later }).collect();
        drop(host);
        if let Some(text) = engine.note(races) {
            drop(order);
            panic!("{text}");
        }
        order
    }

    fn run<F>(
        &self,
        op: &'static str,
        reads: &[&Storage],
        writes: &mut [&mut StorageMut],
        kernel: F,
    ) -> Result<(), DeviceError>
    where
        F: FnOnce(&[&[u8]], &mut [&mut [u8]]) -> Result<(), DeviceError> + Send + 'static,
    {
        let mut order = self.order();
        for storage in reads {
            self.follow(&mut order, storage.ready_event(), Edge::Fence);
        }
        for fence in writes.iter_mut().flat_map(|storage| storage.fences()) {
            self.follow(&mut order, fence, Edge::Fence);
        }
        let Some(tracked) = &self.0.tracked else {
            self.run_now(order, reads, writes, kernel)?;
            let ticket = self.0.tickets.fetch_add(1, Ordering::AcqRel) + 1;
            // What was waited for is over, and nobody checks: the reads need no fence.
            for write in writes {
                write.record_write(Event::complete_at(self.0.id, ticket), op);
            }
            return Ok(());
        };
        tracked.engine.raise();
        let later = Access { op, stream: self.0.id, ticket: self.0.tickets.load(Ordering::Acquire) + 1 };
        let writers = reads.iter().map(|storage| (storage.writer(), true));
        let users = writes.iter_mut().flat_map(|storage| storage.users());
        let mut order = self.check(order, later, writers.chain(users));
        let event = match &tracked.place {
            // Kernels of the CPU were refused, and all else does not come here.
            Place::Cuda(_) => return Err(DeviceError::Unsupported { what: op, device: self.0.device }),
            Place::Inline => {
                self.run_now(order, reads, writes, kernel)?;
                let mut order = self.order();
                let ticket = self.pass_inline(tracked, &mut order);
                Event::at(self.0.id, ticket, Arc::clone(&tracked.lane), order.clock.clone())
            }
            Place::Queued(work) => {
                let sources = reads.iter().map(|storage| storage.span()).collect::<Result<_, _>>()?;
                let targets = writes.iter().map(|storage| storage.span()).collect::<Result<_, _>>()?;
                let body = cpu::body(sources, targets, kernel);
                let ticket = self.enqueue(tracked, work, &mut order, op, Some(body));
                Event::at(self.0.id, ticket, Arc::clone(&tracked.lane), order.clock.clone())
            }
        };
        for write in writes {
            write.record_write(event.clone(), op);
        }
        for storage in reads {
            storage.push_reader(event.clone(), op, Some(&tracked.engine));
        }
        Ok(())
    }

    /// Runs one operation on this thread (S1): inline, the enqueuing thread is the device. It waits for other devices here.
    fn run_now(
        &self,
        mut order: MutexGuard<'_, Order>,
        reads: &[&Storage],
        writes: &mut [&mut StorageMut],
        kernel: impl FnOnce(&[&[u8]], &mut [&mut [u8]]) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        order.waits.retain(|event| !event.is_complete());
        let behind = !order.waits.is_empty();
        drop(order);
        if behind {
            self.await_others(INLINE_WAIT_MAX)?;
        }
        let (mut one, mut several);
        let targets: &mut [&mut [u8]] = if let [write] = writes {
            one = [write.device_bytes_mut()?];
            &mut one
        } else {
            let all = writes.iter_mut().map(|storage| storage.device_bytes_mut());
            several = all.collect::<Result<Vec<_>, _>>()?;
            &mut several
        };
        let mut inline: [&[u8]; INLINE_READS] = [&[]; INLINE_READS];
        if let Some(slices) = inline.get_mut(..reads.len()) {
            for (slice, storage) in slices.iter_mut().zip(reads) {
                *slice = storage.device_bytes()?;
            }
            kernel(slices, targets)
        } else {
            let slices = reads.iter().map(|storage| storage.device_bytes()).collect::<Result<Vec<_>, _>>()?;
            kernel(&slices, targets)
        }
    }

    /// The ticket of what is over already.
    fn pass_inline(&self, tracked: &Tracked, order: &mut Order) -> u64 {
        let ticket = self.0.tickets.fetch_add(1, Ordering::AcqRel) + 1;
        order.has_joined = false;
        // Nobody waits for an inline stream's ticket before it has passed.
        tracked.lane.progress.advance(ticket, Ok(())).run();
        ticket
    }

    /// Enqueues one operation after all that is waited for; its ticket.
    fn enqueue(
        &self,
        tracked: &Tracked,
        work: &Work,
        order: &mut Order,
        name: &'static str,
        body: Option<cpu::Body>,
    ) -> u64 {
        let ticket = self.0.tickets.fetch_add(1, Ordering::AcqRel) + 1;
        order.has_joined = false;
        let waits = order.waits.drain(..).filter_map(|event| Wait::on(&event, &tracked.engine)).collect();
        tracked.engine.push(work, Op { name, ticket, waits, body });
        ticket
    }

    fn expect_own(&self, found: Device) -> Result<(), DeviceError> {
        let expected = self.0.device;
        if found == expected { Ok(()) } else { Err(DeviceError::WrongDevice { expected, found }) }
    }

    fn order(&self) -> MutexGuard<'_, Order> {
        self.0.order.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // What is enqueued still runs.
        if let Some(tracked) = &self.tracked {
            tracked.engine.end_lease(self.id);
            if let Place::Queued(work) = &tracked.place {
                work.close();
            }
        }
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
    fn a_worker_thread_ends_when_its_lease_has_ended_and_its_work_is_done() {
        let cpu = crate::CpuMode::Threads { seed: 0 };
        let runtime = Runtime::new(Config { cpu, ..Config::default() }).unwrap();
        let stream = runtime.stream(Device::HOST).unwrap();
        let Place::Queued(work) = &stream.0.tracked.as_ref().unwrap().place else {
            panic!("a stream of its own thread")
        };
        let work = Arc::downgrade(work);
        let mut target = stream.alloc(1).unwrap();
        stream.fill(&mut target, 3).unwrap();
        let target = target.freeze(&stream);
        drop(stream);
        target.ready_event().block(Duration::from_secs(60)).unwrap();
        assert_eq!(target.as_bytes().unwrap(), [3]);
        let started = Instant::now();
        while work.strong_count() > 0 {
            assert!(started.elapsed() < Duration::from_secs(60), "the thread still holds its queue");
            std::thread::yield_now();
        }
    }

    #[test]
    fn s2_equal_tickets_mean_equal_clocks() {
        let config = Config { check: crate::Check::Report, ..Config::default() };
        let runtime = Runtime::new(config).unwrap();
        let [first, second, third] = [(); 3].map(|()| runtime.stream(Device::HOST).unwrap());
        let before = second.record();
        let mut bytes = first.alloc(1).unwrap();
        first.fill(&mut bytes, 1).unwrap();
        second.wait(&first.record());
        let after = second.record();
        assert_eq!((before.ticket(), after.ticket(), second.record().ticket()), (0, 1, 1));
        // Through the second stream alone the third is ordered after the first's work.
        third.wait(&before);
        third.wait(&after);
        third.fill(&mut bytes, 2).unwrap();
        assert_eq!(runtime.races(), []);
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
