//! Events of the driver, pooled: creating one costs more than recording it.

use std::ptr;

use super::context::{Context, Handle};
use super::lock;
use super::sys::{self, CUevent, CUstream};
use crate::DeviceError;

/// A point of a CUDA stream. Not recorded again before its last holder drops it, so that a wait for it means what it says.
pub(super) struct CudaEvent {
    raw: CUevent,
    context: &'static Context,
}

// SAFETY: an event handle has no thread affinity, and the driver locks inside each event call.
unsafe impl Send for CudaEvent {}
// SAFETY: as above.
unsafe impl Sync for CudaEvent {}

impl CudaEvent {
    /// Records the work that `stream` was given so far. The context must be current.
    pub(super) fn record(context: &'static Context, stream: CUstream) -> Result<Self, DeviceError> {
        let idle = lock(&context.idle_events).pop();
        let event = match idle {
            Some(handle) => Self { raw: handle.raw(), context },
            None => {
                let mut raw = ptr::null_mut();
                // SAFETY: `raw` is a live out pointer, and the caller has made the context current.
                let status = unsafe { (context.calls.cuEventCreate)(&raw mut raw, sys::EVENT_DISABLE_TIMING) };
                context.check("cuEventCreate", status)?;
                Self { raw, context }
            }
        };
        // SAFETY: event and stream are alive and of this context, which is current.
        context.check("cuEventRecord", unsafe { (context.calls.cuEventRecord)(event.raw, stream) })?;
        Ok(event)
    }

    /// Whether it has passed.
    pub(super) fn query(&self) -> Result<bool, DeviceError> {
        // SAFETY: the event is alive; a query needs no current context.
        match unsafe { (self.context.calls.cuEventQuery)(self.raw) } {
            sys::SUCCESS => Ok(true),
            sys::NOT_READY => Ok(false),
            // Whatever else: the work before it failed, and nobody will know more.
            status => Err(self.context.lose("cuEventQuery", status)),
        }
    }

    pub(super) fn raw(&self) -> CUevent {
        self.raw
    }
}

impl Drop for CudaEvent {
    fn drop(&mut self) {
        // Waits that were enqueued keep what they wait for: the driver took the event's state when they were.
        lock(&self.context.idle_events).push(Handle::event(self.raw));
    }
}
