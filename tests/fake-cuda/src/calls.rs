//! The calls of the driver that `farcall-device` makes, and one to count them.
//!
//! Handles are addresses of boxes that are never freed, but for events; a caller who invents one gets what it deserves, as from the
//! driver. Contexts are small numbers.
#![allow(non_snake_case, reason = "the names of the driver's own documentation")]
#![expect(clippy::missing_safety_doc, reason = "the driver's documentation says what each pointer must be")]
#![expect(missing_docs, reason = "as above")]

use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use crate::machine::{Event, INVALID_VALUE, OUT_OF_MEMORY, Op, Place, Stream, lock, machine};
use crate::settings::Settings;

type Status = u32;

const SUCCESS: Status = 0;
const NO_DEVICE: Status = 100;
const INVALID_DEVICE: Status = 101;
const INVALID_IMAGE: Status = 200;
const INVALID_CONTEXT: Status = 201;
const INVALID_HANDLE: Status = 400;
const NOT_FOUND: Status = 500;
const NOT_READY: Status = 600;
const NOT_SUPPORTED: Status = 801;

thread_local! {
    /// The current context: a device's number and one.
    static CURRENT: Cell<usize> = const { Cell::new(0) };
}

static COUNTS: OnceLock<Mutex<HashMap<&'static str, u64>>> = OnceLock::new();

/// A kernel by its name.
enum Kernel {
    Delay,
    Fill,
}

struct RecordedEvent {
    device: usize,
    event: Arc<Event>,
}

/// Counts a call; the status with which it is refused.
fn enter(name: &'static str) -> Result<(), Status> {
    *lock(COUNTS.get_or_init(Mutex::default)).entry(name).or_default() += 1;
    let settings = Settings::of_process();
    let refused = settings.refused.iter().find(|(call, _)| call == name).map(|(_, status)| *status);
    refused.or((settings.init != 0 && settings.init != NO_DEVICE).then_some(settings.init)).map_or(Ok(()), Err)
}

/// As [`enter`], for what needs a context: the device that is current.
fn enter_device(name: &'static str) -> Result<usize, Status> {
    enter(name)?;
    let device = CURRENT.get().checked_sub(1).ok_or(INVALID_CONTEXT)?;
    match machine().devices[device].fault() {
        SUCCESS => Ok(device),
        fault => Err(fault),
    }
}

fn status(result: Result<(), Status>) -> Status {
    result.err().unwrap_or(SUCCESS)
}

/// # Safety
/// `out` must be null or valid for a write.
unsafe fn put<T>(out: *mut T, value: T) -> Result<(), Status> {
    if out.is_null() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: the caller's promise.
    unsafe { out.write(value) };
    Ok(())
}

/// # Safety
/// `handle` must be null or one that `cuStreamCreate` gave.
unsafe fn stream_of<'a>(handle: *mut c_void, device: usize) -> Result<&'a Stream, Status> {
    // SAFETY: streams are never freed.
    let stream = unsafe { handle.cast::<Stream>().as_ref() }.ok_or(INVALID_HANDLE)?;
    // Stricter than a driver: whoever enqueues must have the stream's own context current.
    if stream.device == device { Ok(stream) } else { Err(INVALID_CONTEXT) }
}

/// # Safety
/// `handle` must be null or one that `cuEventCreate` gave and nobody destroyed.
unsafe fn event_of<'a>(handle: *mut c_void) -> Result<&'a RecordedEvent, Status> {
    // SAFETY: the caller's promise.
    unsafe { handle.cast::<RecordedEvent>().as_ref() }.ok_or(INVALID_HANDLE)
}

fn on_device(address: u64, len: usize) -> Result<Place, Status> {
    machine().owner(address, len).map(|_| Place::Device(address)).ok_or(INVALID_VALUE)
}

fn on_host(pointer: *const c_void) -> Result<Place, Status> {
    if pointer.is_null() { Err(INVALID_VALUE) } else { Ok(Place::Host(pointer as u64)) }
}

/// Defines a call: its name is counted, its body gives a `Result`.
macro_rules! call {
    (fn $name:ident($($argument:ident: $type:ty),* $(,)?) $body:block) => {
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($argument: $type),*) -> Status {
            status(enter(stringify!($name)).and_then(|()| $body))
        }
    };
    (fn $name:ident($($argument:ident: $type:ty),* $(,)?) on $device:ident $body:block) => {
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($argument: $type),*) -> Status {
            status(enter_device(stringify!($name)).and_then(|$device| $body))
        }
    };
}

/// How often the call of this name was made.
///
/// # Safety
/// `name` must be a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fake_cuda_count(name: *const c_char) -> u64 {
    // SAFETY: the caller's promise.
    let name = unsafe { CStr::from_ptr(name) }.to_string_lossy();
    lock(COUNTS.get_or_init(Mutex::default)).get(&*name).copied().unwrap_or(0)
}

call! { fn cuInit(flags: u32) {
    match Settings::of_process().init {
        0 if flags == 0 => Ok(()),
        0 => Err(INVALID_VALUE),
        init => Err(init),
    }
} }

call! { fn cuDriverGetVersion(version: *mut c_int) {
    // SAFETY: the driver's contract.
    unsafe { put(version, Settings::of_process().version) }
} }

call! { fn cuDeviceGetCount(count: *mut c_int) {
    // SAFETY: the driver's contract.
    unsafe { put(count, Settings::of_process().devices) }
} }

call! { fn cuDeviceGet(device: *mut c_int, ordinal: c_int) {
    if !(0..Settings::of_process().devices).contains(&ordinal) {
        return Err(INVALID_DEVICE);
    }
    // SAFETY: the driver's contract.
    unsafe { put(device, ordinal) }
} }

call! { fn cuDeviceGetName(name: *mut c_char, len: c_int, _device: c_int) {
    let text = c"Fake GPU".to_bytes_with_nul();
    if name.is_null() || (len as usize) < text.len() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: the driver's contract: `len` bytes, which are enough.
    unsafe { std::ptr::copy_nonoverlapping(text.as_ptr(), name.cast(), text.len()) };
    Ok(())
} }

call! { fn cuDeviceGetAttribute(value: *mut c_int, attribute: u32, _device: c_int) {
    let answer = match attribute {
        75 => 9,
        76 => 0,
        16 => 4,
        41 => 1,
        _ => 0,
    };
    // SAFETY: the driver's contract.
    unsafe { put(value, answer) }
} }

call! { fn cuDeviceTotalMem_v2(bytes: *mut usize, _device: c_int) {
    // SAFETY: the driver's contract.
    unsafe { put(bytes, Settings::of_process().memory_bytes) }
} }

call! { fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) on device {
    // SAFETY: the driver's contract.
    unsafe { put(free, machine().devices[device].free_bytes()) }?;
    // SAFETY: as above.
    unsafe { put(total, Settings::of_process().memory_bytes) }
} }

call! { fn cuDevicePrimaryCtxRetain(context: *mut *mut c_void, device: c_int) {
    // SAFETY: the driver's contract.
    unsafe { put(context, (device as usize + 1) as *mut c_void) }
} }

call! { fn cuCtxGetCurrent(context: *mut *mut c_void) {
    // SAFETY: the driver's contract.
    unsafe { put(context, CURRENT.get() as *mut c_void) }
} }

call! { fn cuCtxSetCurrent(context: *mut c_void) {
    if context as usize > machine().devices.len() {
        return Err(INVALID_CONTEXT);
    }
    CURRENT.set(context as usize);
    Ok(())
} }

call! { fn cuStreamCreate(stream: *mut *mut c_void, flags: u32) on device {
    // A blocking stream would be ordered with the default one, which nobody wants.
    if flags != 1 {
        return Err(INVALID_VALUE);
    }
    let started = Stream::start(device).map_err(|_| OUT_OF_MEMORY)?;
    // SAFETY: the driver's contract.
    unsafe { put(stream, Box::into_raw(Box::new(started)).cast()) }
} }

call! { fn cuStreamQuery(stream: *mut c_void) {
    // SAFETY: the driver's contract.
    let stream = unsafe { stream.cast::<Stream>().as_ref() }.ok_or(INVALID_HANDLE)?;
    match machine().devices[stream.device].fault() {
        SUCCESS if stream.is_idle() => Ok(()),
        SUCCESS => Err(NOT_READY),
        fault => Err(fault),
    }
} }

call! { fn cuStreamWaitEvent(stream: *mut c_void, event: *mut c_void, _flags: u32) on device {
    // SAFETY: the driver's contract.
    let (stream, event) = unsafe { (stream_of(stream, device)?, event_of(event)?) };
    if !Settings::of_process().ignore_waits {
        stream.enqueue(Op::Wait(Arc::clone(&event.event), event.event.recorded()));
    }
    Ok(())
} }

call! { fn cuEventCreate(event: *mut *mut c_void, flags: u32) on device {
    // Timing is off: it costs.
    if flags & 2 == 0 {
        return Err(INVALID_VALUE);
    }
    let created = RecordedEvent { device, event: Arc::default() };
    // SAFETY: the driver's contract.
    unsafe { put(event, Box::into_raw(Box::new(created)).cast()) }
} }

call! { fn cuEventDestroy_v2(event: *mut c_void) {
    if event.is_null() {
        return Err(INVALID_HANDLE);
    }
    // SAFETY: the driver's contract: `cuEventCreate` gave it, and it is not used again.
    drop(unsafe { Box::from_raw(event.cast::<RecordedEvent>()) });
    Ok(())
} }

call! { fn cuEventRecord(event: *mut c_void, stream: *mut c_void) on device {
    // SAFETY: the driver's contract.
    let (stream, event) = unsafe { (stream_of(stream, device)?, event_of(event)?) };
    if event.device != stream.device {
        return Err(INVALID_HANDLE);
    }
    let point = event.event.record();
    stream.enqueue(Op::Record(Arc::clone(&event.event), point));
    Ok(())
} }

call! { fn cuEventQuery(event: *mut c_void) {
    // SAFETY: the driver's contract.
    let event = unsafe { event_of(event)? };
    match machine().devices[event.device].fault() {
        SUCCESS if event.event.is_reached() => Ok(()),
        SUCCESS => Err(NOT_READY),
        fault => Err(fault),
    }
} }

call! { fn cuMemAlloc_v2(address: *mut u64, len: usize) on device {
    let allocated = machine().devices[device].alloc(len)?;
    // SAFETY: the driver's contract.
    unsafe { put(address, allocated) }
} }

call! { fn cuMemFree_v2(address: u64) {
    let device = machine().owner(address, 1).ok_or(INVALID_VALUE)?;
    machine().devices[device].free(address)
} }

call! { fn cuMemHostAlloc(pointer: *mut *mut c_void, len: usize, flags: u32) on _device {
    // Not write-combined: the host reads it. Portable: every device copies from it.
    if len == 0 || flags != 1 {
        return Err(INVALID_VALUE);
    }
    let memory = vec![0_u64; len.div_ceil(8)].into_boxed_slice();
    // Kept for ever: what a test leaks, the driver would too.
    // SAFETY: the driver's contract.
    unsafe { put(pointer, Box::leak(memory).as_mut_ptr().cast()) }
} }

call! { fn cuMemFreeHost(pointer: *mut c_void) {
    on_host(pointer).map(drop)
} }

call! { fn cuMemcpyHtoDAsync_v2(to: u64, from: *const c_void, len: usize, stream: *mut c_void) on device {
    let op = Op::Copy { from: on_host(from)?, from_step: 0, to: on_device(to, len)?, to_step: 0, len, rows: 1 };
    // SAFETY: the driver's contract.
    unsafe { stream_of(stream, device)? }.enqueue(op);
    Ok(())
} }

call! { fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: u64, len: usize, stream: *mut c_void) on device {
    let op = Op::Copy { from: on_device(from, len)?, from_step: 0, to: on_host(to)?, to_step: 0, len, rows: 1 };
    // SAFETY: the driver's contract.
    unsafe { stream_of(stream, device)? }.enqueue(op);
    Ok(())
} }

call! { fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, len: usize, stream: *mut c_void) on device {
    let op = Op::Copy { from: on_device(from, len)?, from_step: 0, to: on_device(to, len)?, to_step: 0, len, rows: 1 };
    // SAFETY: the driver's contract.
    unsafe { stream_of(stream, device)? }.enqueue(op);
    Ok(())
} }

call! { fn cuMemcpyPeerAsync(
    to: u64,
    to_context: *mut c_void,
    from: u64,
    from_context: *mut c_void,
    len: usize,
    stream: *mut c_void,
) on device {
    let owned = |address, context: *mut c_void| machine().owner(address, len) == (context as usize).checked_sub(1);
    if !owned(to, to_context) || !owned(from, from_context) {
        return Err(INVALID_VALUE);
    }
    let op = Op::Copy { from: on_device(from, len)?, from_step: 0, to: on_device(to, len)?, to_step: 0, len, rows: 1 };
    // SAFETY: the driver's contract.
    unsafe { stream_of(stream, device)? }.enqueue(op);
    Ok(())
} }

/// `CUDA_MEMCPY2D`.
#[repr(C)]
pub struct Copy2D {
    from_x: usize,
    from_y: usize,
    from_kind: u32,
    from_host: *const c_void,
    from_device: u64,
    from_array: *mut c_void,
    from_pitch: usize,
    to_x: usize,
    to_y: usize,
    to_kind: u32,
    to_host: *mut c_void,
    to_device: u64,
    to_array: *mut c_void,
    to_pitch: usize,
    width: usize,
    height: usize,
}

call! { fn cuMemcpy2DAsync_v2(copy: *const Copy2D, stream: *mut c_void) on device {
    // SAFETY: the driver's contract.
    let copy = unsafe { copy.as_ref() }.ok_or(INVALID_VALUE)?;
    let place = |kind, host, address, pitch: usize| match kind {
        1 => on_host(host),
        2 => on_device(address, pitch * copy.height.saturating_sub(1) + copy.width),
        _ => Err(INVALID_VALUE),
    };
    if copy.from_pitch < copy.width || copy.to_pitch < copy.width {
        return Err(INVALID_VALUE);
    }
    let op = Op::Copy {
        from: place(copy.from_kind, copy.from_host, copy.from_device, copy.from_pitch)?,
        from_step: copy.from_pitch,
        to: place(copy.to_kind, copy.to_host, copy.to_device, copy.to_pitch)?,
        to_step: copy.to_pitch,
        len: copy.width,
        rows: copy.height,
    };
    // SAFETY: the driver's contract.
    unsafe { stream_of(stream, device)? }.enqueue(op);
    Ok(())
} }

call! { fn cuMemsetD8Async(to: u64, byte: u8, len: usize, stream: *mut c_void) on device {
    // SAFETY: the driver's contract.
    unsafe { stream_of(stream, device)? }.enqueue(Op::Fill { to: on_device(to, len)?, byte, len });
    Ok(())
} }

call! { fn cuModuleLoadData(module: *mut *mut c_void, image: *const c_void) on _device {
    if image.is_null() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: the driver's contract: text that ends with a zero.
    let text = unsafe { CStr::from_ptr(image.cast()) }.to_string_lossy().into_owned();
    if !text.contains(".version") || !text.contains(".target sm_") {
        return Err(INVALID_IMAGE);
    }
    // SAFETY: the driver's contract.
    unsafe { put(module, Box::into_raw(Box::new(text)).cast()) }
} }

call! { fn cuModuleGetFunction(function: *mut *mut c_void, module: *mut c_void, name: *const c_char) on _device {
    // SAFETY: the driver's contract.
    let (text, name) = unsafe { (module.cast::<String>().as_ref(), CStr::from_ptr(name)) };
    let text = text.ok_or(INVALID_HANDLE)?;
    let name = name.to_str().map_err(|_| NOT_FOUND)?;
    if !text.contains(&format!(".entry {name}(")) {
        return Err(NOT_FOUND);
    }
    let kernel = match name {
        "farcall_delay" => Kernel::Delay,
        "farcall_fill" => Kernel::Fill,
        _ => return Err(NOT_FOUND),
    };
    // SAFETY: the driver's contract.
    unsafe { put(function, Box::into_raw(Box::new(kernel)).cast()) }
} }

call! { fn cuLaunchKernel(
    function: *mut c_void,
    grid_x: u32,
    grid_y: u32,
    grid_z: u32,
    block_x: u32,
    block_y: u32,
    block_z: u32,
    _shared_bytes: u32,
    stream: *mut c_void,
    arguments: *mut *mut c_void,
    _extra: *mut *mut c_void,
) on device {
    if [grid_x, grid_y, grid_z, block_x, block_y, block_z].contains(&0) || block_x * block_y * block_z > 1024 {
        return Err(INVALID_VALUE);
    }
    // SAFETY: the driver's contract.
    let (kernel, stream) = unsafe { (function.cast::<Kernel>().as_ref(), stream_of(stream, device)?) };
    // SAFETY: the driver's contract: a pointer to each of the kernel's parameters.
    let argument = |index| unsafe { *arguments.add(index) };
    let op = match kernel.ok_or(INVALID_HANDLE)? {
        // SAFETY: the kernel's parameter is a u64.
        Kernel::Delay => Op::Delay(Duration::from_nanos(unsafe { argument(0).cast::<u64>().read() })),
        Kernel::Fill => {
            // SAFETY: the kernel's parameters are an address, a byte and a length.
            let (to, byte, len) = unsafe {
                (argument(0).cast::<u64>().read(), argument(1).cast::<u8>().read(), argument(2).cast::<u64>().read())
            };
            // A kernel's bad address is found when it runs.
            Op::Fill { to: Place::Device(to), byte, len: len as usize }
        }
    };
    stream.enqueue(op);
    Ok(())
} }

call! { fn cuDeviceCanAccessPeer(can: *mut c_int, _device: c_int, _peer: c_int) {
    // SAFETY: the driver's contract.
    unsafe { put(can, 0) }
} }

call! { fn cuIpcGetMemHandle(_handle: *mut [u8; 64], _address: u64) {
    Err(NOT_SUPPORTED)
} }

call! { fn cuIpcGetEventHandle(_handle: *mut [u8; 64], _event: *mut c_void) {
    Err(NOT_SUPPORTED)
} }

call! { fn cuMemHostRegister_v2(_pointer: *mut c_void, _len: usize, _flags: u32) {
    Ok(())
} }

call! { fn cuMemHostUnregister(_pointer: *mut c_void) {
    Ok(())
} }
