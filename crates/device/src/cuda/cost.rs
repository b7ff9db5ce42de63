//! What single calls of the driver cost, so that a bench can tell our own share from the driver's.

use std::time::Instant;

use super::context::Context;
use super::driver;
use super::event::CudaEvent;
use super::stream::CudaStream;
use super::sys::{self, Status};
use crate::progress::Progress;
use crate::{Device, DeviceError};

/// Bytes of the allocations that are timed.
const BYTES: usize = 1 << 20;
/// Calls of one batch.
const BATCH: u32 = 100;

/// The median cost of single driver calls in nanoseconds, over `batches` of 100 calls each, on an idle stream. A call that the
/// driver refuses or does not have is left out.
///
/// # Errors
/// [`DeviceError::Unavailable`], or the failure of what every device must do.
pub fn driver_costs(device: Device, batches: usize) -> Result<Vec<(&'static str, f64)>, DeviceError> {
    let unavailable = |reason: String| DeviceError::Unavailable { device, reason: reason.into() };
    let driver = driver().map_err(|reason| unavailable(reason.to_string()))?;
    let context = match device {
        Device::Cuda(index) => driver.context(index),
        Device::Cpu(_) => None,
    };
    let context = context.ok_or_else(|| unavailable("there is no such CUDA device".to_owned()))??;
    let stream = CudaStream::lease(context, Progress::new(false))?;
    let _current = context.make_current()?;
    let event = CudaEvent::record(context, stream.raw())?;
    let calls = context.calls;
    let mut current = std::ptr::null_mut();
    let mut costs = Vec::new();
    let mut time = |name, call: &mut dyn FnMut() -> Option<Status>| {
        if let Some(cost) = median_ns(context, &stream, batches, call) {
            costs.push((name, cost));
        }
    };
    // SAFETY: a live out pointer.
    time("cuCtxGetCurrent", &mut || Some(unsafe { (calls.cuCtxGetCurrent)(&raw mut current) }));
    // SAFETY: event and stream are alive and of the current context; nobody else has the event.
    time("cuEventRecord", &mut || Some(unsafe { (calls.cuEventRecord)(event.raw(), stream.raw()) }));
    // SAFETY: as above.
    time("cuEventQuery", &mut || Some(unsafe { (calls.cuEventQuery)(event.raw()) }).map(|_| sys::SUCCESS));
    // SAFETY: as above.
    time("cuStreamWaitEvent", &mut || Some(unsafe { (calls.cuStreamWaitEvent)(stream.raw(), event.raw(), 0) }));
    time("cuMemAlloc and cuMemFree, 1 MiB", &mut || {
        let mut address = 0;
        // SAFETY: a live out pointer.
        let allocated = unsafe { (calls.cuMemAlloc_v2)(&raw mut address, BYTES) };
        // SAFETY: it was just allocated, and nothing uses it.
        if allocated == sys::SUCCESS { Some(unsafe { (calls.cuMemFree_v2)(address) }) } else { None }
    });
    if let (Some(alloc), Some(free)) = (calls.cuMemAllocAsync, calls.cuMemFreeAsync) {
        time("cuMemAllocAsync and cuMemFreeAsync, 1 MiB", &mut || {
            let mut address = 0;
            // SAFETY: a live out pointer, and a stream that is alive.
            let allocated = unsafe { alloc(&raw mut address, BYTES, stream.raw()) };
            // SAFETY: it was just allocated, on the same stream, and nothing uses it.
            if allocated == sys::SUCCESS { Some(unsafe { free(address, stream.raw()) }) } else { None }
        });
    }
    Ok(costs)
}

/// The median of batches, between which the stream gets idle; `None` once the call fails.
fn median_ns(
    context: &'static Context,
    stream: &CudaStream,
    batches: usize,
    call: &mut dyn FnMut() -> Option<Status>,
) -> Option<f64> {
    let mut costs = Vec::with_capacity(batches);
    for _ in 0..batches.max(1) {
        let started = Instant::now();
        for _ in 0..BATCH {
            if call()? != sys::SUCCESS {
                return None;
            }
        }
        costs.push(started.elapsed().as_nanos() as f64 / f64::from(BATCH));
        // SAFETY: the stream is alive. A bench may wait; it is bounded by what was enqueued above.
        while unsafe { (context.calls.cuStreamQuery)(stream.raw()) } == sys::NOT_READY {
            std::thread::yield_now();
        }
    }
    costs.sort_by(f64::total_cmp);
    Some(costs[costs.len() / 2])
}
