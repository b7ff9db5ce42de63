//! A stream of the driver, and which of its tickets have passed.
//!
//! An operation gets a ticket; an event of the driver is recorded only where somebody asks for a point: [`Stream::record`],
//! a freeze, another stream's wait, a waiter on the host. It covers all tickets up to then.
//! Invariant S1: a mark is recorded after all work up to its ticket was given to the driver, so that it passes no earlier.
//! Invariant S2: marks are looked at in the order of the stream; only the oldest is asked about.
//! Invariant S3: callbacks of waiters run on the notifier's thread, never on a thread that merely looked.
//!
//! [`Stream::record`]: crate::Stream::record

use std::collections::VecDeque;
use std::ffi::c_void;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use super::context::{Context, Handle};
use super::event::CudaEvent;
use super::memory::Space;
use super::notifier::Notifier;
use super::sys::{self, CUstream, Memcpy2D, Status};
use super::{lock, notifier};
use crate::progress::Progress;
use crate::{Device, DeviceError};

/// Marks from which on passed ones are dropped although nobody asks.
const MARKS_MAX: usize = 32;
/// A kernel that keeps a stream busy ends after this long: nothing else would end it.
const DELAY_MAX: Duration = Duration::from_secs(10);

/// A leased stream. It goes back to its context when the lease and all events of it are gone.
pub(crate) struct CudaStream {
    context: &'static Context,
    raw: CUstream,
    progress: Arc<Progress>,
    /// Tickets whose work the driver has.
    submitted: AtomicU64,
    /// Recorded points that have not been seen to pass, oldest first.
    marks: Mutex<VecDeque<Mark>>,
    /// The highest ticket that somebody on the host waits for.
    wanted: AtomicU64,
}

struct Mark {
    ticket: u64,
    event: Arc<CudaEvent>,
}

/// A copy of `count` rows of `len` bytes. One row is a plain copy.
#[derive(Clone, Copy)]
pub(crate) struct Rows {
    pub(crate) count: usize,
    pub(crate) len: usize,
    /// Bytes from one row of the source to the next.
    pub(crate) source_step: usize,
}

// SAFETY: a stream handle has no thread affinity, and the driver locks inside its calls.
unsafe impl Send for CudaStream {}
// SAFETY: as above; what is ours is locked or atomic.
unsafe impl Sync for CudaStream {}

impl CudaStream {
    /// A stream on which nothing is pending.
    pub(crate) fn lease(context: &'static Context, progress: Arc<Progress>) -> Result<Arc<Self>, DeviceError> {
        context.expect_alive()?;
        let _current = context.make_current()?;
        let raw = match Self::idle(context) {
            Some(raw) => raw,
            None => {
                let mut raw = ptr::null_mut();
                // SAFETY: `raw` is a live out pointer, and the context is current.
                let status = unsafe { (context.calls.cuStreamCreate)(&raw mut raw, sys::STREAM_NON_BLOCKING) };
                context.check("cuStreamCreate", status)?;
                raw
            }
        };
        let stream = Arc::new(Self {
            context,
            raw,
            progress,
            submitted: AtomicU64::new(0),
            marks: Mutex::default(),
            wanted: AtomicU64::new(0),
        });
        context.adopt(&stream);
        // Lost in between, it would not be failed.
        context.expect_alive()?;
        Ok(stream)
    }

    /// A stream that was given back and has done its work: a busy one would delay its next user.
    fn idle(context: &'static Context) -> Option<CUstream> {
        let mut idle = lock(&context.idle_streams);
        // SAFETY: idle streams are alive; a query needs no more.
        let at =
            idle.iter().position(|handle| unsafe { (context.calls.cuStreamQuery)(handle.raw()) } == sys::SUCCESS)?;
        Some(idle.swap_remove(at).raw())
    }

    pub(super) fn raw(&self) -> CUstream {
        self.raw
    }

    pub(crate) fn context(&self) -> &'static Context {
        self.context
    }

    /// Notes that the driver has all work up to `ticket`.
    pub(crate) fn note_submitted(&self, ticket: u64) {
        self.submitted.fetch_max(ticket, Ordering::Release);
    }

    /// Has later work here run after `ticket` of `other`, on the device.
    pub(crate) fn wait_for(&self, other: &Self, ticket: u64) -> Result<(), DeviceError> {
        self.context.expect_alive()?;
        let Some(event) = other.mark(ticket)? else { return Ok(()) };
        let _current = self.context.make_current()?;
        // SAFETY: stream and event are alive; they may be of different contexts. Flags must be 0.
        let status = unsafe { (self.context.calls.cuStreamWaitEvent)(self.raw, event.raw(), 0) };
        self.context.check("cuStreamWaitEvent", status)
    }

    /// An event that covers `ticket`: one that is there, or a new one. `None` if the ticket has passed.
    fn mark(&self, ticket: u64) -> Result<Option<Arc<CudaEvent>>, DeviceError> {
        if self.progress.has_passed(ticket) {
            return Ok(None);
        }
        let _current = self.context.make_current()?;
        let mut marks = lock(&self.marks);
        let covers = |mark: &&Mark| mark.ticket >= ticket;
        if let Some(mark) = marks.iter().find(covers) {
            return Ok(Some(Arc::clone(&mark.event)));
        }
        let covered = self.submitted.load(Ordering::Acquire);
        let event = Arc::new(CudaEvent::record(self.context, self.raw)?);
        marks.push_back(Mark { ticket: covered.max(ticket), event: Arc::clone(&event) });
        if marks.len() >= MARKS_MAX {
            self.look_at(marks)?;
        }
        Ok(Some(event))
    }

    /// Records a point for `ticket`, so that later work is not waited for with it.
    pub(crate) fn note_point(&self, ticket: u64) {
        if let Err(error) = self.mark(ticket) {
            self.give_up(&error);
        }
    }

    /// Looks whether `ticket` has passed. Never waits.
    pub(crate) fn look(&self, ticket: u64) {
        if self.progress.has_passed(ticket) {
            return;
        }
        let looked = self.mark(ticket).and_then(|_| self.look_at(lock(&self.marks)));
        if let Err(error) = looked {
            self.give_up(&error);
        }
    }

    /// Has the notifier see to it that the end of `ticket` is noticed.
    pub(crate) fn watch(self: &Arc<Self>, ticket: u64) {
        if self.progress.has_passed(ticket) {
            return;
        }
        self.wanted.fetch_max(ticket, Ordering::AcqRel);
        let watched = self.mark(ticket).and_then(|_| notifier::start()).map(|notifier| notifier.watch(self));
        if let Err(error) = watched {
            self.give_up(&error);
        }
    }

    /// Looks on behalf of the notifier; whether anything has passed.
    pub(super) fn look_for_notifier(&self) -> bool {
        match self.look_at(lock(&self.marks)) {
            Ok(passed) => passed,
            Err(error) => {
                self.give_up(&error);
                true
            }
        }
    }

    /// Whether somebody on the host waits for what has not passed.
    pub(super) fn is_wanted(&self) -> bool {
        !self.progress.has_passed(self.wanted.load(Ordering::Acquire))
    }

    /// Points of this stream cannot be told any more, so that nothing can be ordered after them: the device is lost.
    pub(crate) fn give_up(&self, error: &DeviceError) -> DeviceError {
        self.context.give_up(|| error.to_string())
    }

    /// Everything that is pending, and all that comes, fails.
    pub(super) fn fail(&self, error: &DeviceError) {
        let callbacks = self.progress.fail(error.clone()).into_callbacks();
        Notifier::run_elsewhere(&self.progress, callbacks);
    }

    fn look_at(&self, mut marks: MutexGuard<'_, VecDeque<Mark>>) -> Result<bool, DeviceError> {
        let mut passed = Vec::new();
        let mut failed = None;
        while let Some(mark) = marks.front() {
            match mark.event.query() {
                Ok(true) => passed.extend(marks.pop_front()),
                Ok(false) => break,
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            }
        }
        let Some(last) = passed.last().map(|mark| mark.ticket) else { return failed.map_or(Ok(false), Err) };
        drop(marks);
        let callbacks = self.progress.advance(last, Ok(())).into_callbacks();
        Notifier::run_elsewhere(&self.progress, callbacks);
        failed.map_or(Ok(true), Err)
    }

    /// Copies `len` bytes. Both places are alive and used by nobody else until the stream has passed it: the caller's fences.
    pub(crate) fn copy(&self, source: Space, target: Space, rows: Rows) -> Result<(), DeviceError> {
        if rows.count > 1 {
            return self.copy_rows(source, target, rows);
        }
        let (calls, len) = (self.context.calls, rows.len);
        self.submit(|stream| match (source, target) {
            (Space::Host(source), Space::Device(target, _)) => {
                // SAFETY: the source holds `len` bytes and the target has room for them, by the storages' lengths; fences keep both.
                let status = unsafe { (calls.cuMemcpyHtoDAsync_v2)(target, source.cast(), len, stream) };
                ("cuMemcpyHtoDAsync", status)
            }
            (Space::Device(source, _), Space::Host(target)) => {
                // SAFETY: as above.
                let status = unsafe { (calls.cuMemcpyDtoHAsync_v2)(target.cast(), source, len, stream) };
                ("cuMemcpyDtoHAsync", status)
            }
            (Space::Device(source, from), Space::Device(target, to)) if ptr::eq(from, to) => {
                // SAFETY: as above.
                let status = unsafe { (calls.cuMemcpyDtoDAsync_v2)(target, source, len, stream) };
                ("cuMemcpyDtoDAsync", status)
            }
            (Space::Device(source, from), Space::Device(target, to)) => {
                // SAFETY: as above; both contexts are retained for ever.
                let status = unsafe { (calls.cuMemcpyPeerAsync)(target, to.raw(), source, from.raw(), len, stream) };
                ("cuMemcpyPeerAsync", status)
            }
            (Space::Host(_), Space::Host(_)) => ("cuMemcpyAsync", sys::NOT_SUPPORTED),
        })
    }

    fn copy_rows(&self, source: Space, target: Space, rows: Rows) -> Result<(), DeviceError> {
        let mut copy = Memcpy2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: sys::MEMORY_DEVICE,
            srcHost: ptr::null(),
            srcDevice: 0,
            srcArray: ptr::null_mut(),
            srcPitch: rows.source_step,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: sys::MEMORY_DEVICE,
            dstHost: ptr::null_mut(),
            dstDevice: 0,
            dstArray: ptr::null_mut(),
            dstPitch: rows.len,
            WidthInBytes: rows.len,
            Height: rows.count,
        };
        match source {
            Space::Host(source) => (copy.srcMemoryType, copy.srcHost) = (sys::MEMORY_HOST, source.cast()),
            Space::Device(source, _) => copy.srcDevice = source,
        }
        match target {
            Space::Host(target) => (copy.dstMemoryType, copy.dstHost) = (sys::MEMORY_HOST, target.cast()),
            Space::Device(target, _) => copy.dstDevice = target,
        }
        self.submit(|stream| {
            // SAFETY: the rows lie in their storages, which the caller's fences keep; the description is read before the call ends.
            let status = unsafe { (self.context.calls.cuMemcpy2DAsync_v2)(&raw const copy, stream) };
            ("cuMemcpy2DAsync", status)
        })
    }

    /// Sets `len` bytes of the device.
    pub(crate) fn fill(&self, target: Space, byte: u8, len: usize) -> Result<(), DeviceError> {
        let Space::Device(target, _) = target else { return Err(self.unsupported("filling host memory")) };
        self.submit(|stream| {
            // SAFETY: the target has `len` bytes, which the caller's fences keep.
            ("cuMemsetD8Async", unsafe { (self.context.calls.cuMemsetD8Async)(target, byte, len, stream) })
        })
    }

    /// As [`CudaStream::fill`], by this crate's own kernel.
    pub(crate) fn fill_by_kernel(&self, target: Space, byte: u8, len: usize) -> Result<(), DeviceError> {
        let Space::Device(mut target, _) = target else { return Err(self.unsupported("filling host memory")) };
        let kernels = self.context.kernels()?;
        // A block for each 16 KiB leaves a thread four stores of 16 bytes; the kernel steps on by the grid.
        let blocks = len.div_ceil(16 << 10).clamp(1, 1024) as u32;
        let (mut byte, mut len) = (byte, len as u64);
        let mut arguments =
            [(&raw mut target).cast::<c_void>(), (&raw mut byte).cast::<c_void>(), (&raw mut len).cast::<c_void>()];
        self.launch(kernels.fill, blocks, 256, &mut arguments)
    }

    /// Keeps the stream busy.
    pub(crate) fn delay(&self, duration: Duration) -> Result<(), DeviceError> {
        let kernels = self.context.kernels()?;
        let mut nanoseconds = duration.min(DELAY_MAX).as_nanos() as u64;
        self.launch(kernels.delay, 1, 1, &mut [(&raw mut nanoseconds).cast()])
    }

    /// `arguments` point to values of the kernel's own parameter types, in order.
    fn launch(
        &self,
        function: super::module::Function,
        blocks: u32,
        threads: u32,
        arguments: &mut [*mut c_void],
    ) -> Result<(), DeviceError> {
        self.submit(|stream| {
            // SAFETY: function and stream are of this context; the driver copies the arguments before the call ends, as many as the
            // kernel has, of its types: `module` loads the text that says so.
            let status = unsafe {
                (self.context.calls.cuLaunchKernel)(
                    function.raw(),
                    blocks,
                    1,
                    1,
                    threads,
                    1,
                    1,
                    0,
                    stream,
                    arguments.as_mut_ptr(),
                    ptr::null_mut(),
                )
            };
            ("cuLaunchKernel", status)
        })
    }

    fn submit(&self, call: impl FnOnce(CUstream) -> (&'static str, Status)) -> Result<(), DeviceError> {
        self.context.expect_alive()?;
        let _current = self.context.make_current()?;
        let (name, status) = call(self.raw);
        self.context.check(name, status)
    }

    fn unsupported(&self, what: &'static str) -> DeviceError {
        DeviceError::Unsupported { what, device: self.device() }
    }

    pub(crate) fn device(&self) -> Device {
        self.context.device
    }
}

impl Drop for CudaStream {
    fn drop(&mut self) {
        lock(&self.context.idle_streams).push(Handle::stream(self.raw));
    }
}
