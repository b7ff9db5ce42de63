//! Memory of a device, and pinned memory of the host, recycled by size class: after warm-up nothing is asked of the driver.
//!
//! Classes are four to a doubling, all multiples of 512 bytes. Those up to [`SMALL_BYTES_MAX`] are cut from shared slabs, a larger
//! block is a slab of its own. Slabs are of `cuMemAlloc`: other processes and NICs can reach such memory, pool memory they cannot.
//! Invariant G1: a block is in one place: with its holder, in its class's free list, or not yet cut from a slab.
//! Invariant G2: device memory is reused in the order of its fences: a free block carries those that are pending, and its next
//! holder's streams wait for them. Where those are not the device's own, such as a token, and for pinned memory, which the host
//! reaches too, a block comes back after its fences.
//! Invariant G3: the driver frees memory only in `trim`, when memory runs out, and when a pool ends, each behind its fences.

use std::collections::{HashMap, VecDeque};
use std::ffi::c_void;
use std::fmt;
use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::context::Context;
use super::sys::{self, CUdeviceptr};
use super::{check, lock};
use crate::memory::Span;
use crate::pool::{class_bytes, class_of};
use crate::{Device, DeviceError, Event, PoolStats};

/// Every block starts at a multiple of this: what the driver itself promises, and a multiple of a DRAM burst.
const ALIGN_BYTES: usize = 512;
/// The host's classes start at 64 bytes, these at 512.
const SCALE: usize = ALIGN_BYTES / crate::ALIGN_BYTES;
/// The largest class that is cut from shared slabs.
const SMALL_BYTES_MAX: usize = 8 << 20;
/// A shared slab of a device: a mapping that a peer or a NIC opens once.
const DEVICE_SLAB_BYTES: usize = 64 << 20;
/// A shared slab of pinned memory: pinning is slow, and takes memory from everybody else.
const PINNED_SLAB_BYTES: usize = 16 << 20;

/// Free blocks of a class that an allocation looks at before it takes other memory: those that were freed first.
const LOOKED_AT_MAX: usize = 8;
/// How long an allocation waits for memory that is free but still in use, once the device has no other.
const RECLAIM_WAIT_MAX: Duration = Duration::from_secs(1);

/// Which memory a pool recycles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Device,
    /// Of the host, reached by every device's copy engines; cached, not write-combined: the host reads it.
    Pinned,
}

/// Where bytes start, for the driver. It holds nothing: fences keep the memory.
#[derive(Clone, Copy)]
pub(crate) enum Space {
    Host(*mut u8),
    Device(CUdeviceptr, &'static Context),
}

impl Space {
    /// Memory of a device that another library allocated.
    pub(crate) fn foreign(device: Device, start: *const u8) -> Result<Self, DeviceError> {
        let unavailable = |reason: &str| DeviceError::Unavailable { device, reason: reason.into() };
        let driver = super::driver().map_err(|reason| unavailable(&reason.to_string()))?;
        let context = driver.context(device.index()).ok_or_else(|| unavailable("there is no such device"))??;
        Ok(Self::Device(start as CUdeviceptr, context))
    }

    /// The place `offset` bytes on, which must lie in the same memory.
    pub(crate) fn offset(self, offset: usize) -> Self {
        match self {
            Self::Host(start) => Self::Host(start.wrapping_add(offset)),
            Self::Device(start, context) => Self::Device(start + offset as u64, context),
        }
    }
}

/// A pool of one kind of memory.
pub(crate) struct Pool {
    context: &'static Context,
    kind: Kind,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Free blocks by class, the one that was freed first at the front.
    free: HashMap<usize, VecDeque<Free>>,
    /// What is left of the newest shared slab.
    uncut: Option<Range>,
    slabs: usize,
    mapped_bytes: usize,
    live_bytes: usize,
    allocations: u64,
    recycled: u64,
}

struct Free {
    range: Range,
    /// What must be over before the bytes are used again.
    fences: Vec<Event>,
}

impl Free {
    fn is_ready(&self) -> bool {
        self.fences.iter().all(Event::is_over)
    }
}

/// A part of a slab that belongs to its holder alone.
struct Range {
    slab: Arc<CudaSlab>,
    offset: usize,
    len: usize,
}

/// One allocation of the driver.
struct CudaSlab {
    context: &'static Context,
    kind: Kind,
    /// An address of the device, or of the host if pinned.
    base: u64,
    len: usize,
}

impl CudaSlab {
    fn create(context: &'static Context, kind: Kind, len: usize) -> Result<Self, DeviceError> {
        context.expect_alive()?;
        let _current = context.make_current()?;
        let (call, status, base) = match kind {
            Kind::Device => {
                let mut base: CUdeviceptr = 0;
                // SAFETY: `base` is a live out pointer, and the context is current.
                let status = unsafe { (context.calls.cuMemAlloc_v2)(&raw mut base, len) };
                ("cuMemAlloc", status, base)
            }
            Kind::Pinned => {
                let mut base: *mut c_void = ptr::null_mut();
                // SAFETY: as above.
                let status = unsafe { (context.calls.cuMemHostAlloc)(&raw mut base, len, sys::PORTABLE) };
                ("cuMemHostAlloc", status, base as u64)
            }
        };
        context.check(call, status)?;
        Ok(Self { context, kind, base, len })
    }
}

impl Drop for CudaSlab {
    fn drop(&mut self) {
        let freed = self.context.make_current().map(|_current| match self.kind {
            // SAFETY: the address is of this slab's own allocation, no range of it is left, and nothing on the device uses it (G3).
            Kind::Device => unsafe { (self.context.calls.cuMemFree_v2)(self.base) },
            // SAFETY: as above.
            Kind::Pinned => unsafe { (self.context.calls.cuMemFreeHost)(self.base as *mut c_void) },
        });
        // Of a lost device everything fails; its memory goes with the process.
        match freed {
            Ok(sys::SUCCESS) => {}
            Ok(status) => tracing::debug!(status, name = check::name_of(status), "memory could not be freed"),
            Err(error) => tracing::debug!(%error, "memory could not be freed"),
        }
    }
}

impl Pool {
    pub(crate) fn new(context: &'static Context, kind: Kind) -> Arc<Self> {
        Arc::new(Self { context, kind, state: Mutex::default() })
    }

    /// A block of at least `len` bytes, and what its next user has to wait for (G2).
    pub(crate) fn alloc(self: &Arc<Self>, len: usize) -> Result<(Block, Vec<Event>), DeviceError> {
        self.context.expect_alive()?;
        let out_of_memory =
            |mapped_bytes| DeviceError::OutOfMemory { device: self.device(), want_bytes: len, mapped_bytes };
        if len > isize::MAX as usize / 2 {
            return Err(out_of_memory(lock(&self.state).mapped_bytes));
        }
        let class = class_of(len.div_ceil(SCALE));
        let size = class_bytes(class) * SCALE;
        if let Some(free) = self.take_ready(class) {
            return Ok(self.hand_out(class, free, true));
        }
        let mut state = lock(&self.state);
        if size <= SMALL_BYTES_MAX
            && let Some(range) = state.uncut.as_mut().and_then(|rest| rest.split_front(size))
        {
            drop(state);
            return Ok(self.hand_out(class, Free { range, fences: Vec::new() }, false));
        }
        // Its next user waits for the fences on the device: better than more memory.
        if let Some(free) = state.free.get_mut(&class).and_then(VecDeque::pop_front) {
            drop(state);
            return Ok(self.hand_out(class, free, true));
        }
        drop(state);
        let range = match self.fresh(size) {
            Err(DeviceError::Driver { code: sys::OUT_OF_MEMORY, .. }) => {
                self.trim();
                self.fresh(size)
            }
            other => other,
        };
        let range = match range {
            Err(DeviceError::Driver { code: sys::OUT_OF_MEMORY, .. }) => {
                self.await_free(RECLAIM_WAIT_MAX);
                self.trim();
                self.fresh(size)
            }
            other => other,
        };
        match range {
            Ok(range) => Ok(self.hand_out(class, Free { range, fences: Vec::new() }, false)),
            Err(DeviceError::Driver { code: sys::OUT_OF_MEMORY, .. }) => {
                Err(out_of_memory(lock(&self.state).mapped_bytes))
            }
            Err(error) => Err(error),
        }
    }

    /// A free block whose fences are over.
    fn take_ready(&self, class: usize) -> Option<Free> {
        let take = || {
            let mut state = lock(&self.state);
            let free = state.free.get_mut(&class)?;
            let at = free.iter().take(LOOKED_AT_MAX).position(Free::is_ready)?;
            free.remove(at)
        };
        if let Some(free) = take() {
            return Some(free);
        }
        // Nobody may have asked the driver yet. Of those that were freed first that is most likely to say yes.
        let oldest = lock(&self.state).free.get(&class)?.front()?.fences.clone();
        oldest.iter().for_each(Event::look);
        take()
    }

    fn fresh(&self, size: usize) -> Result<Range, DeviceError> {
        let shared = match self.kind {
            Kind::Device => DEVICE_SLAB_BYTES,
            Kind::Pinned => PINNED_SLAB_BYTES,
        };
        let small = size <= SMALL_BYTES_MAX;
        let created = match CudaSlab::create(self.context, self.kind, if small { shared } else { size }) {
            // A device that has little left may have enough for this.
            Err(DeviceError::Driver { code: sys::OUT_OF_MEMORY, .. }) if small => {
                CudaSlab::create(self.context, self.kind, size)
            }
            other => other,
        };
        let slab = Arc::new(created?);
        let len = slab.len;
        let mut rest = Range { slab, offset: 0, len };
        let range = rest.split_front(size);
        let mut state = lock(&self.state);
        state.slabs += 1;
        state.mapped_bytes += len;
        if rest.len > 0 {
            let rest = state.uncut.replace(rest);
            state.shelve(rest);
        }
        range.ok_or(DeviceError::Unsupported { what: "a slab shorter than its block", device: self.device() })
    }

    fn hand_out(self: &Arc<Self>, class: usize, free: Free, recycled: bool) -> (Block, Vec<Event>) {
        let mut state = lock(&self.state);
        state.allocations += 1;
        state.recycled += u64::from(recycled);
        state.live_bytes += free.range.len;
        drop(state);
        let mut fences = free.fences;
        fences.retain(|fence| !fence.is_over());
        (Block { range: Some(free.range), class, pool: Arc::clone(self) }, fences)
    }

    /// The fences of all free blocks.
    fn fences(&self) -> Vec<Event> {
        lock(&self.state).free.values().flatten().flat_map(|free| free.fences.clone()).collect()
    }

    /// Waits for the last uses of free blocks.
    fn await_free(&self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        for fence in self.fences() {
            // Failed or late: such a block stays where it is.
            let _ = fence.block(deadline.saturating_duration_since(Instant::now()));
        }
    }

    /// Gives memory of which nothing is in use back to the driver; returns how many bytes that was. This can wait for the device.
    pub(crate) fn trim(&self) -> usize {
        self.fences().iter().for_each(Event::look);
        let mut state = lock(&self.state);
        let mut free_bytes: HashMap<*const CudaSlab, usize> = HashMap::new();
        let ready = state.free.values().flatten().filter(|free| free.is_ready()).map(|free| &free.range);
        for range in ready.chain(&state.uncut) {
            *free_bytes.entry(Arc::as_ptr(&range.slab)).or_default() += range.len;
        }
        let unused = |range: &Range| free_bytes.get(&Arc::as_ptr(&range.slab)) == Some(&range.slab.len);
        let mut freed = Vec::new();
        for list in state.free.values_mut() {
            let (gone, kept): (VecDeque<_>, _) = std::mem::take(list).into_iter().partition(|free| unused(&free.range));
            *list = kept;
            freed.extend(gone.into_iter().map(|free| free.range));
        }
        freed.extend(state.uncut.take_if(|range| unused(range)));
        let mut slabs: Vec<_> = freed.into_iter().map(|range| range.slab).collect();
        slabs.sort_unstable_by_key(Arc::as_ptr);
        slabs.dedup_by_key(|slab| Arc::as_ptr(slab));
        let bytes = slabs.iter().map(|slab| slab.len).sum();
        state.slabs -= slabs.len();
        state.mapped_bytes -= bytes;
        // The driver is called without the lock.
        drop(state);
        bytes
    }

    pub(crate) fn stats(&self) -> PoolStats {
        let state = lock(&self.state);
        PoolStats {
            slabs: state.slabs,
            mapped_bytes: state.mapped_bytes,
            live_bytes: state.live_bytes,
            idle_bytes: state.mapped_bytes - state.live_bytes,
            allocations: state.allocations,
            recycled: state.recycled,
        }
    }

    fn device(&self) -> Device {
        match self.kind {
            Kind::Device => self.context.device,
            Kind::Pinned => Device::HOST,
        }
    }
}

impl State {
    /// Puts the end of a shared slab into the free lists of the classes that fit it.
    fn shelve(&mut self, rest: Option<Range>) {
        let Some(mut rest) = rest else { return };
        while rest.len >= ALIGN_BYTES {
            let mut class = class_of(rest.len.div_ceil(SCALE));
            if class_bytes(class) * SCALE > rest.len {
                class -= 1;
            }
            let Some(range) = rest.split_front(class_bytes(class) * SCALE) else { return };
            self.free.entry(class).or_default().push_back(Free { range, fences: Vec::new() });
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner);
        for free in std::mem::take(&mut state.free).into_values().flatten().filter(|free| !free.is_ready()) {
            // G3: each pending fence holds the range; the last to pass lets go of the slab.
            let range = Arc::new(free.range);
            for fence in free.fences {
                let range = Arc::clone(&range);
                fence.on_over(move || drop(range));
            }
        }
    }
}

impl Range {
    fn split_front(&mut self, len: usize) -> Option<Self> {
        let rest = self.len.checked_sub(len)?;
        let front = Self { slab: Arc::clone(&self.slab), offset: self.offset, len };
        self.offset += len;
        self.len = rest;
        Some(front)
    }
}

/// A block of a [`Pool`], back in its free list when dropped.
pub(crate) struct Block {
    /// Taken only by `drop` and `give_back_behind`.
    range: Option<Range>,
    class: usize,
    pool: Arc<Pool>,
}

impl Block {
    /// Where the bytes start.
    pub(crate) fn space(&self) -> Space {
        match self.pool.kind {
            Kind::Device => Space::Device(self.address(), self.pool.context),
            Kind::Pinned => Space::Host(self.address() as *mut u8),
        }
    }

    /// Bytes of the block: its class's size.
    pub(crate) fn len(&self) -> usize {
        self.range.as_ref().map_or(0, |range| range.len)
    }

    /// The first `len` bytes of pinned memory.
    pub(crate) fn host_bytes(&self, len: usize) -> &[u8] {
        // SAFETY: the block is its holder's alone (G1), and its memory stays while it does. The system hands such pages out zeroed,
        // so all bytes are initialised; writers hold `&mut`, or a fence that keeps readers away.
        unsafe { self.host_span(len).bytes() }
    }

    /// As [`Block::host_bytes`], to be written.
    pub(crate) fn host_bytes_mut(&mut self, len: usize) -> &mut [u8] {
        // SAFETY: as above; `&mut self` is the only way to these bytes.
        unsafe { self.host_span(len).bytes_mut() }
    }

    /// The first `len` bytes of pinned memory, by address; none of a device's.
    pub(crate) fn host_span(&self, len: usize) -> Span {
        assert!(len <= self.len() && self.pool.kind == Kind::Pinned, "a host storage lies in its pinned block");
        NonNull::new(self.address() as *mut u8).map_or(Span::EMPTY, |start| Span::new(start, len))
    }

    pub(crate) fn address(&self) -> u64 {
        self.range.as_ref().map_or(0, |range| range.slab.base + range.offset as u64)
    }

    /// Whether the next holder's streams can wait for all `fences` on the device, and none can fail but with the device itself.
    pub(crate) fn can_follow(&self, fences: &[Event]) -> bool {
        let own =
            |fence: &Event| fence.on_cuda().is_some_and(|(stream, _)| ptr::eq(stream.context(), self.pool.context));
        fences.iter().all(own)
    }

    /// Gives device memory back before its `fences` are over: its next holder waits for them (G2).
    pub(crate) fn give_back_behind(mut self, fences: Vec<Event>) {
        self.give_back(fences);
    }

    fn give_back(&mut self, fences: Vec<Event>) {
        let Some(range) = self.range.take() else { return };
        let mut state = lock(&self.pool.state);
        state.live_bytes -= range.len;
        state.free.entry(self.class).or_default().push_back(Free { range, fences });
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.give_back(Vec::new());
    }
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} memory at {:#x}", self.pool.kind, self.address())
    }
}
