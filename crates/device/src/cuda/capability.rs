//! What a driver can do beside what the backend needs: asked one by one, so that a refusal is an answer.
//!
//! For reports of machines that are seen for the first time. Each question cleans up after itself.

use std::ffi::c_void;
use std::os::fd::{FromRawFd as _, OwnedFd};
use std::ptr;

use super::context::Context;
use super::sys::{self, IpcHandle, Status, attribute};
use super::{check, driver};
use crate::{Device, DeviceError};

/// A question and its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capability {
    /// What was asked, in snake case.
    pub name: &'static str,
    /// What came of it.
    pub answer: Answer,
}

/// What a driver said to a question.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Answer {
    /// It did it.
    Works,
    /// A number: an attribute, 0 for no.
    Value(i64),
    /// It refused.
    Refused {
        /// Its status.
        code: u32,
        /// The status' name.
        name: &'static str,
    },
    /// The library has no such call.
    Missing,
}

impl Answer {
    fn of(status: Option<Status>) -> Self {
        match status {
            None => Self::Missing,
            Some(sys::SUCCESS) => Self::Works,
            Some(code) => Self::Refused { code, name: check::name_of(code) },
        }
    }
}

/// Bytes of the memory that questions are asked about: a page of the device.
const BYTES: usize = 2 << 20;

/// Asks everything of one device.
///
/// # Errors
/// [`DeviceError::Unavailable`] without a driver or such a device, or the failure of what every device must do.
/// # Cost
/// Tens of milliseconds; it allocates, and some calls wait for the device.
pub fn capabilities(device: Device) -> Result<Vec<Capability>, DeviceError> {
    let unavailable = |reason: String| DeviceError::Unavailable { device, reason: reason.into() };
    let driver = driver().map_err(|reason| unavailable(reason.to_string()))?;
    let context = match device {
        Device::Cuda(index) => driver.context(index),
        Device::Cpu(_) => None,
    };
    let context = context.ok_or_else(|| unavailable("there is no such CUDA device".to_owned()))??;
    let _current = context.make_current()?;
    let mut found = context.attributes();
    let mut add = |name, answer| found.push(Capability { name, answer });
    let devices = driver.infos().len();
    add("driver_version_major", Answer::Value(i64::from(driver.version().major)));
    add("driver_version_minor", Answer::Value(i64::from(driver.version().minor)));
    add("peer_access_devices", context.peers(devices));
    add("free_memory_bytes", context.free_memory());
    add("default_memory_pool", context.default_pool());
    add("stream_ordered_alloc", context.stream_ordered_alloc());
    add("host_register", context.host_register());
    add("ipc_event_handle", context.ipc_event());
    add("kernels_compile", Answer::of(Some(context.kernels().map_or_else(|error| code_of(&error), |_| sys::SUCCESS))));
    context.with_memory(|address| {
        add("ipc_memory_handle", context.ipc_memory(address));
        add("dma_buf_export", context.dma_buf(address));
        add("stream_write_value_64", context.write_value(address));
    })?;
    Ok(found)
}

fn code_of(error: &DeviceError) -> Status {
    match error {
        DeviceError::Driver { code, .. } => *code,
        _ => sys::NOT_SUPPORTED,
    }
}

impl Context {
    fn attributes(&self) -> Vec<Capability> {
        let asked = [
            ("compute_capability_major", attribute::COMPUTE_CAPABILITY_MAJOR),
            ("compute_capability_minor", attribute::COMPUTE_CAPABILITY_MINOR),
            ("multiprocessors", attribute::MULTIPROCESSOR_COUNT),
            ("unified_addressing", attribute::UNIFIED_ADDRESSING),
            ("host_register_supported", attribute::HOST_REGISTER_SUPPORTED),
            ("virtual_memory_management", attribute::VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED),
            ("handle_type_posix_fd", attribute::HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED),
            ("memory_pools_supported", attribute::MEMORY_POOLS_SUPPORTED),
            ("gpu_direct_rdma", attribute::GPU_DIRECT_RDMA_SUPPORTED),
            ("gpu_direct_rdma_writes_ordering", attribute::GPU_DIRECT_RDMA_WRITES_ORDERING),
            ("stream_memory_operations_64", attribute::CAN_USE_64_BIT_STREAM_MEM_OPS),
            ("dma_buf_supported", attribute::DMA_BUF_SUPPORTED),
            ("ipc_event_supported", attribute::IPC_EVENT_SUPPORTED),
        ];
        let ask = |(name, attribute)| {
            let mut value = 0;
            // SAFETY: `value` is a live out pointer.
            let status = unsafe { (self.calls.cuDeviceGetAttribute)(&raw mut value, attribute, self.ordinal) };
            let answer = if status == sys::SUCCESS { Answer::Value(value.into()) } else { Answer::of(Some(status)) };
            Capability { name, answer }
        };
        asked.into_iter().map(ask).collect()
    }

    /// How many other devices this one reaches directly.
    fn peers(&self, devices: usize) -> Answer {
        let Some(call) = self.calls.cuDeviceCanAccessPeer else { return Answer::Missing };
        let mut count = 0;
        for other in (0..devices as i32).filter(|other| *other != self.ordinal) {
            let mut can = 0;
            // SAFETY: `can` is a live out pointer.
            let status = unsafe { call(&raw mut can, self.ordinal, other) };
            if status != sys::SUCCESS {
                return Answer::of(Some(status));
            }
            count += i64::from(can != 0);
        }
        Answer::Value(count)
    }

    fn free_memory(&self) -> Answer {
        let Some(call) = self.calls.cuMemGetInfo_v2 else { return Answer::Missing };
        let (mut free, mut total) = (0, 0);
        // SAFETY: both are live out pointers, and the context is current.
        match unsafe { call(&raw mut free, &raw mut total) } {
            sys::SUCCESS => Answer::Value(free as i64),
            status => Answer::of(Some(status)),
        }
    }

    fn default_pool(&self) -> Answer {
        let mut pool = ptr::null_mut();
        // SAFETY: `pool` is a live out pointer; the pool is the driver's own.
        Answer::of(self.calls.cuDeviceGetDefaultMemPool.map(|call| unsafe { call(&raw mut pool, self.ordinal) }))
    }

    /// On the legacy default stream, which exists in every context.
    fn stream_ordered_alloc(&self) -> Answer {
        let (Some(alloc), Some(free)) = (self.calls.cuMemAllocAsync, self.calls.cuMemFreeAsync) else {
            return Answer::Missing;
        };
        let mut address = 0;
        // SAFETY: `address` is a live out pointer; a null stream is the default one.
        let mut status = unsafe { alloc(&raw mut address, BYTES, ptr::null_mut()) };
        if status == sys::SUCCESS {
            // SAFETY: the memory was just allocated, and nothing uses it.
            status = unsafe { free(address, ptr::null_mut()) };
        }
        Answer::of(Some(status))
    }

    fn host_register(&self) -> Answer {
        let (Some(register), Some(unregister)) = (self.calls.cuMemHostRegister_v2, self.calls.cuMemHostUnregister)
        else {
            return Answer::Missing;
        };
        let mut memory = match crate::Slab::create(BYTES) {
            Ok(memory) => memory,
            Err(_) => return Answer::of(Some(sys::OUT_OF_MEMORY)),
        };
        let start = memory.bytes_mut().as_mut_ptr().cast::<c_void>();
        // SAFETY: whole pages of our own mapping, which outlives the registration.
        let mut status = unsafe { register(start, BYTES, sys::PORTABLE) };
        if status == sys::SUCCESS {
            // SAFETY: it was just registered, and nothing uses it.
            status = unsafe { unregister(start) };
        }
        Answer::of(Some(status))
    }

    fn ipc_event(&self) -> Answer {
        let Some(export) = self.calls.cuIpcGetEventHandle else { return Answer::Missing };
        let mut event = ptr::null_mut();
        let flags = sys::EVENT_DISABLE_TIMING | sys::EVENT_INTERPROCESS;
        // SAFETY: `event` is a live out pointer, and the context is current.
        let mut status = unsafe { (self.calls.cuEventCreate)(&raw mut event, flags) };
        if status == sys::SUCCESS {
            let mut handle: IpcHandle = [0; 64];
            // SAFETY: the event was just created; `handle` has a handle's size.
            status = unsafe { export(&raw mut handle, event) };
            // SAFETY: nobody else has the event.
            let _ = unsafe { (self.calls.cuEventDestroy_v2)(event) };
        }
        Answer::of(Some(status))
    }

    /// Runs `ask` over fresh device memory.
    fn with_memory(&self, ask: impl FnOnce(u64)) -> Result<(), DeviceError> {
        let mut address = 0;
        // SAFETY: `address` is a live out pointer, and the context is current.
        self.check("cuMemAlloc", unsafe { (self.calls.cuMemAlloc_v2)(&raw mut address, BYTES) })?;
        ask(address);
        // SAFETY: the memory was allocated above; what was asked is over, since freeing waits for the device.
        self.check("cuMemFree", unsafe { (self.calls.cuMemFree_v2)(address) })
    }

    fn ipc_memory(&self, address: u64) -> Answer {
        let mut handle: IpcHandle = [0; 64];
        // SAFETY: `handle` has a handle's size, the memory is alive.
        Answer::of(self.calls.cuIpcGetMemHandle.map(|call| unsafe { call(&raw mut handle, address) }))
    }

    fn dma_buf(&self, address: u64) -> Answer {
        let Some(call) = self.calls.cuMemGetHandleForAddressRange else { return Answer::Missing };
        let mut fd: i32 = -1;
        let kind = sys::RANGE_HANDLE_DMA_BUF_FD;
        // SAFETY: for this kind of handle a descriptor is written, which `fd` has room for; the range is the whole allocation.
        let status = unsafe { call((&raw mut fd).cast::<c_void>(), address, BYTES, kind, 0) };
        if status == sys::SUCCESS && fd >= 0 {
            // SAFETY: the driver made the descriptor for us, and nobody else has it.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
        }
        Answer::of(Some(status))
    }

    fn write_value(&self, address: u64) -> Answer {
        // SAFETY: eight aligned bytes of the memory; a null stream is the default one.
        Answer::of(self.calls.cuStreamWriteValue64_v2.map(|call| unsafe { call(ptr::null_mut(), address, 1, 0) }))
    }
}
