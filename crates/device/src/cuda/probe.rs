//! Is there a driver, and can it be used? Asked once a process, at the first need of a CUDA device.
//!
//! Invariant P1: whatever this machine lacks is an [`Unavailable`]: nothing panics, nothing is printed, no call is made that the
//! library may not have. Without a driver the answer takes well under 5 ms.
//! Invariant P2: the library is never unloaded, and its calls stay valid for the life of the process.

use std::ffi::{CStr, c_char};
use std::fmt;
use std::sync::{Arc, OnceLock};

use libloading::Library;

use super::check;
use super::context::Context;
use super::sys::{self, Calls, Status, attribute};
use crate::DeviceError;

/// The driver's library, by the name under which the driver installs it. Not `libcuda.so`: that may be the toolkit's stub.
const LIBRARY: &str = "libcuda.so.1";
/// The oldest version of the driver's interface that is used, as the driver counts: CUDA 12.0.
const NEEDED_VERSION: i32 = 12_000;

/// Why CUDA devices cannot be used. Each text says what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unavailable {
    /// There is no driver library, or it cannot be loaded.
    #[error(
        "no driver (libcuda.so.1 not found): install the NVIDIA driver, or start the container with its GPUs; \
         the loader says: {reason}"
    )]
    NoDriver {
        /// What the loader said.
        reason: Arc<str>,
    },
    /// The library lacks a call: it is too old, or no driver at all.
    #[error("libcuda.so.1 has no {name}: update the NVIDIA driver to version 525 or newer")]
    MissingSymbol {
        /// The call.
        name: &'static str,
    },
    /// The driver refused to start.
    #[error("the driver does not start: {name} ({code}): {advice}", advice = advice(*code))]
    Driver {
        /// Its status.
        code: u32,
        /// The status' name.
        name: &'static str,
    },
    /// The driver is older than the oldest one that is supported.
    #[error("the driver is for CUDA {found}, {needed} is needed: update the NVIDIA driver to version 525 or newer")]
    TooOld {
        /// The version that it has.
        found: Version,
        /// The version that is needed.
        needed: Version,
    },
    /// The driver works and has no device for this process.
    #[error("the driver shows no device: look at `nvidia-smi`, and at CUDA_VISIBLE_DEVICES")]
    NoDevice,
    /// The configuration says so.
    #[error("switched off: set FARCALL_CUDA=auto or `Config::cuda` to use it")]
    Off,
    /// The configuration has devices emulated, which takes their names.
    #[error("devices are emulated: unset FARCALL_DEVICES, or set `Config::emulated_devices` to 0, to use real ones")]
    Emulated,
}

fn advice(code: Status) -> &'static str {
    match code {
        34 => "this is the toolkit's stub of the driver: take its folder out of LD_LIBRARY_PATH",
        46 => "another process has the device for itself",
        802 => "wait for, or start, the fabric manager",
        803 => "library and kernel module differ in version: reboot, or restart the container",
        _ => "`nvidia-smi` should say more",
    }
}

/// A version of the driver's interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// 12 in 12.4.
    pub major: u32,
    /// 4 in 12.4.
    pub minor: u32,
}

impl Version {
    /// Of the driver's number: 12040 is 12.4.
    fn of(number: i32) -> Self {
        let number = number.max(0).unsigned_abs();
        Self { major: number / 1000, minor: number % 1000 / 10 }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// What the driver says about a device.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceInfo {
    /// The product's name.
    pub name: String,
    /// The compute capability: 9.0 for Hopper.
    pub capability: Version,
    /// Bytes of device memory.
    pub memory_bytes: usize,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
}

/// A driver that works, and its devices.
pub(crate) struct Driver {
    calls: Calls,
    version: Version,
    devices: Box<[Slot]>,
}

/// A device, and its context once somebody needs it.
struct Slot {
    info: DeviceInfo,
    context: OnceLock<Result<Context, DeviceError>>,
}

impl Driver {
    pub(crate) fn version(&self) -> Version {
        self.version
    }

    pub(crate) fn infos(&self) -> impl ExactSizeIterator<Item = &DeviceInfo> {
        self.devices.iter().map(|slot| &slot.info)
    }

    /// The context of a device, made current nowhere; `None` for an index that is not there.
    pub(crate) fn context(&'static self, index: u16) -> Option<Result<&'static Context, DeviceError>> {
        let slot = self.devices.get(usize::from(index))?;
        let context = slot.context.get_or_init(|| Context::retain(&self.calls, index, slot.info.capability));
        Some(context.as_ref().map_err(Clone::clone))
    }
}

/// The process's driver, or why there is none.
pub(crate) fn driver() -> Result<&'static Driver, &'static Unavailable> {
    static DRIVER: OnceLock<Result<Driver, Unavailable>> = OnceLock::new();
    DRIVER.get_or_init(load).as_ref()
}

/// The driver's version and devices, or why CUDA cannot be used.
///
/// # Errors
/// [`Unavailable`], the same at each call: the answer is that of the first one.
/// # Cost
/// The first call loads the library and starts the driver, which takes a part of a second where there is a GPU, and well under
/// 5 ms where there is no driver.
pub fn probe() -> Result<(Version, Vec<DeviceInfo>), Unavailable> {
    let driver = driver().map_err(Clone::clone)?;
    Ok((driver.version(), driver.infos().cloned().collect()))
}

fn load() -> Result<Driver, Unavailable> {
    // SAFETY: loading runs the library's initialisers; by this name it is the system's driver.
    let library = unsafe { Library::new(LIBRARY) };
    let library = library.map_err(|error| {
        let said = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
        Unavailable::NoDriver { reason: said.into() }
    })?;
    // SAFETY: the library is a driver's by its name, and it is never unloaded (below, P2).
    let calls = unsafe { Calls::look_up(&library) };
    // A driver that is unloaded while threads of its own run takes the process with it. So it stays, usable or not.
    std::mem::forget(library);
    let calls = calls.map_err(|name| Unavailable::MissingSymbol { name })?;
    let check = |status: Status| match status {
        sys::SUCCESS => Ok(()),
        sys::NO_DEVICE => Err(Unavailable::NoDevice),
        code => Err(Unavailable::Driver { code, name: check::name_of(code) }),
    };
    // The version first: it may be asked before the start, and an old driver may refuse to start.
    let mut number = 0;
    // SAFETY: `number` is a live out pointer.
    check(unsafe { (calls.cuDriverGetVersion)(&raw mut number) })?;
    if number < NEEDED_VERSION {
        return Err(Unavailable::TooOld { found: Version::of(number), needed: Version::of(NEEDED_VERSION) });
    }
    // SAFETY: flags must be 0.
    check(unsafe { (calls.cuInit)(0) })?;
    let mut count = 0;
    // SAFETY: `count` is a live out pointer.
    check(unsafe { (calls.cuDeviceGetCount)(&raw mut count) })?;
    let count = u16::try_from(count).unwrap_or(0);
    if count == 0 {
        return Err(Unavailable::NoDevice);
    }
    let mut devices = Vec::with_capacity(usize::from(count));
    for ordinal in 0..i32::from(count) {
        let (info, status) = describe(&calls, ordinal);
        check(status)?;
        devices.push(Slot { info, context: OnceLock::new() });
    }
    Ok(Driver { calls, version: Version::of(number), devices: devices.into() })
}

fn describe(calls: &Calls, ordinal: i32) -> (DeviceInfo, Status) {
    let mut device = 0;
    let mut name = [0 as c_char; 256];
    let mut memory_bytes = 0;
    // SAFETY: `device` is a live out pointer.
    let mut status = unsafe { (calls.cuDeviceGet)(&raw mut device, ordinal) };
    if status == sys::SUCCESS {
        // SAFETY: at most `name.len()` bytes are written, the terminator among them.
        status = unsafe { (calls.cuDeviceGetName)(name.as_mut_ptr(), name.len() as i32, device) };
    }
    if status == sys::SUCCESS {
        // SAFETY: `memory_bytes` is a live out pointer.
        status = unsafe { (calls.cuDeviceTotalMem_v2)(&raw mut memory_bytes, device) };
    }
    let mut ask = |attribute| {
        let mut value = 0;
        if status == sys::SUCCESS {
            // SAFETY: `value` is a live out pointer.
            status = unsafe { (calls.cuDeviceGetAttribute)(&raw mut value, attribute, device) };
        }
        u32::try_from(value).unwrap_or(0)
    };
    let (major, minor) = (ask(attribute::COMPUTE_CAPABILITY_MAJOR), ask(attribute::COMPUTE_CAPABILITY_MINOR));
    let multiprocessors = ask(attribute::MULTIPROCESSOR_COUNT);
    let name = name.map(|byte| byte as u8);
    let name = CStr::from_bytes_until_nul(&name).map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    (DeviceInfo { name, capability: Version { major, minor }, memory_bytes, multiprocessors }, status)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_names_its_remedy() {
        let (found, needed) = (Version::of(11_080), Version::of(NEEDED_VERSION));
        assert_eq!((found.to_string(), needed.to_string()), ("11.8".to_owned(), "12.0".to_owned()));
        for (reason, says) in [
            (Unavailable::NoDriver { reason: "no such file".into() }, "install the NVIDIA driver"),
            (Unavailable::MissingSymbol { name: "cuInit" }, "libcuda.so.1 has no cuInit: update"),
            (
                Unavailable::Driver { code: 34, name: check::name_of(34) },
                "STUB_LIBRARY (34): this is the toolkit's stub",
            ),
            (Unavailable::Driver { code: 999, name: check::name_of(999) }, "UNKNOWN (999): `nvidia-smi`"),
            (Unavailable::TooOld { found, needed }, "for CUDA 11.8, 12.0 is needed: update"),
            (Unavailable::NoDevice, "CUDA_VISIBLE_DEVICES"),
            (Unavailable::Off, "FARCALL_CUDA=auto"),
            (Unavailable::Emulated, "unset FARCALL_DEVICES"),
        ] {
            assert!(reason.to_string().contains(says), "{reason}");
        }
    }
}
