//! A device's primary context: the one that other libraries of the process use too, so that their pointers, streams and events
//! are ours. Retained once, never released: the driver ends it with the process.

use std::ffi::c_void;
use std::ptr;
use std::sync::{Arc, Mutex, OnceLock, Weak};

use super::module::Kernels;
use super::stream::CudaStream;
use super::sys::{self, CUcontext, CUdevice, CUevent, CUstream, Calls, Status};
use super::{Version, check, lock};
use crate::{Device, DeviceError};

/// The primary context of one device.
pub(crate) struct Context {
    pub(super) calls: &'static Calls,
    pub(super) device: Device,
    pub(super) ordinal: CUdevice,
    pub(super) capability: Version,
    raw: CUcontext,
    /// Why the device is lost (K1).
    lost: OnceLock<DeviceError>,
    /// Streams that are leased, or whose events are held.
    streams: Mutex<Vec<Weak<CudaStream>>>,
    pub(super) idle_streams: Mutex<Vec<Handle>>,
    pub(super) idle_events: Mutex<Vec<Handle>>,
    pub(super) kernels: OnceLock<Result<Kernels, DeviceError>>,
}

/// A stream or an event of the driver that nobody uses now.
pub(super) struct Handle(*mut c_void);

// SAFETY: handles of streams and events have no thread affinity; the driver locks inside its calls.
unsafe impl Send for Handle {}

impl Handle {
    pub(super) fn stream(raw: CUstream) -> Self {
        Self(raw)
    }

    pub(super) fn event(raw: CUevent) -> Self {
        Self(raw)
    }

    pub(super) fn raw(&self) -> *mut c_void {
        self.0
    }
}

// SAFETY: a context handle has no thread affinity: being current is per thread, and set by `make_current`.
unsafe impl Send for Context {}
// SAFETY: as above; the driver locks inside its calls, the rest is locked here.
unsafe impl Sync for Context {}

impl Context {
    pub(super) fn retain(calls: &'static Calls, index: u16, capability: Version) -> Result<Self, DeviceError> {
        let mut context = Self {
            calls,
            device: Device::Cuda(index),
            ordinal: 0,
            capability,
            raw: ptr::null_mut(),
            lost: OnceLock::new(),
            streams: Mutex::default(),
            idle_streams: Mutex::default(),
            idle_events: Mutex::default(),
            kernels: OnceLock::new(),
        };
        // SAFETY: `ordinal` is a live out pointer.
        let status = unsafe { (calls.cuDeviceGet)(&raw mut context.ordinal, i32::from(index)) };
        context.check("cuDeviceGet", status)?;
        // SAFETY: `raw` is a live out pointer.
        let status = unsafe { (calls.cuDevicePrimaryCtxRetain)(&raw mut context.raw, context.ordinal) };
        context.check("cuDevicePrimaryCtxRetain", status)?;
        Ok(context)
    }

    /// The raw handle, for copies between contexts.
    pub(super) fn raw(&self) -> CUcontext {
        self.raw
    }

    /// Makes this context the thread's until the guard is dropped (K3).
    pub(super) fn make_current(&self) -> Result<Current<'_>, DeviceError> {
        let mut previous = ptr::null_mut();
        // SAFETY: `previous` is a live out pointer.
        self.check("cuCtxGetCurrent", unsafe { (self.calls.cuCtxGetCurrent)(&raw mut previous) })?;
        if previous == self.raw {
            return Ok(Current { context: self, previous: None });
        }
        // SAFETY: the primary context is retained for ever.
        self.check("cuCtxSetCurrent", unsafe { (self.calls.cuCtxSetCurrent)(self.raw) })?;
        // A thread that had none does not miss it: ours stays, which saves two calls next time.
        Ok(Current { context: self, previous: Some(previous).filter(|previous| !previous.is_null()) })
    }

    /// The result of a call of the driver.
    pub(super) fn check(&self, call: &'static str, status: Status) -> Result<(), DeviceError> {
        if status == sys::SUCCESS {
            return Ok(());
        }
        let name = check::name_of(status);
        if check::is_fatal(status) {
            return Err(self.lose(call, status));
        }
        Err(DeviceError::Driver { device: self.device, call, code: status, name })
    }

    /// Refuses if the device is lost (K1).
    pub(crate) fn expect_alive(&self) -> Result<(), DeviceError> {
        self.lost.get().map_or(Ok(()), |lost| Err(lost.clone()))
    }

    /// Marks the device lost and fails all that is pending on it (K1).
    pub(super) fn lose(&self, call: &'static str, status: Status) -> DeviceError {
        self.give_up(|| format!("{} ({status}), reported by {call}", check::name_of(status)))
    }

    /// As [`Context::lose`], for any reason: a driver that cannot record or enqueue a wait leaves no way to keep an order.
    pub(super) fn give_up(&self, reason: impl FnOnce() -> String) -> DeviceError {
        let lost = self.lost.get_or_init(|| {
            let reason = reason();
            tracing::error!(device = %self.device, reason, "device lost");
            DeviceError::Lost { device: self.device, reason: reason.into() }
        });
        // Each time: a stream may have been leased while the first loser went through the list.
        let streams: Vec<_> = lock(&self.streams).iter().filter_map(Weak::upgrade).collect();
        streams.iter().for_each(|stream| stream.fail(lost));
        lost.clone()
    }

    /// Has a stream fail with the device.
    pub(super) fn adopt(&self, stream: &Arc<CudaStream>) {
        let mut streams = lock(&self.streams);
        if streams.len() == streams.capacity() {
            streams.retain(|stream| stream.strong_count() > 0);
        }
        streams.push(Arc::downgrade(stream));
    }
}

/// The thread's context is ours while this lives.
pub(super) struct Current<'a> {
    context: &'a Context,
    previous: Option<CUcontext>,
}

impl Drop for Current<'_> {
    fn drop(&mut self) {
        if let Some(previous) = self.previous {
            // SAFETY: it was the thread's own before; whoever set it keeps it alive.
            let status = unsafe { (self.context.calls.cuCtxSetCurrent)(previous) };
            if status != sys::SUCCESS {
                tracing::error!(status, "a thread's own context could not be made current again");
            }
        }
    }
}
