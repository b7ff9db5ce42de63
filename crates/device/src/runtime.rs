//! The process's devices: their memory and their streams.

use std::fmt;
use std::sync::{Arc, OnceLock};

use crate::pool::{HostPool, PoolStats};
use crate::{Device, DeviceError, StorageMut, Stream};

/// What a [`Runtime`] is made with. Reading the environment is the caller's business.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// Bytes of unused large slabs that stay mapped for reuse; by default a quarter of the cgroup's or machine's memory.
    pub idle_bytes_max: Option<usize>,
    /// How many devices `cuda:0`… are emulated on the CPU, for running multi-device programs without any.
    pub emulated_devices: u16,
}

/// Devices, their memory pools and their streams. Cheap to clone.
#[derive(Clone)]
pub struct Runtime(Arc<Parts>);

struct Parts {
    host: HostPool,
    devices: Vec<Device>,
    emulated_devices: u16,
}

static GLOBAL: OnceLock<Runtime> = OnceLock::new();

impl Runtime {
    /// A runtime of its own.
    ///
    /// # Errors
    /// None so far; a required device that is absent, once there are real ones.
    pub fn new(config: Config) -> Result<Self, DeviceError> {
        Ok(Self::with(&config))
    }

    /// The runtime of this process, made with the default [`Config`] at first use.
    #[must_use]
    pub fn global() -> &'static Self {
        GLOBAL.get_or_init(|| Self::with(&Config::default()))
    }

    /// Makes this the runtime of the process.
    ///
    /// # Errors
    /// Gives it back if the process has one already: call this before anything uses [`Runtime::global`].
    pub fn set_global(self) -> Result<(), Self> {
        GLOBAL.set(self)
    }

    fn with(config: &Config) -> Self {
        let emulated_devices = config.emulated_devices;
        let devices = [Device::HOST].into_iter().chain((0..emulated_devices).map(Device::Cuda)).collect();
        Self(Arc::new(Parts { host: HostPool::new(config.idle_bytes_max), devices, emulated_devices }))
    }

    /// The devices that work can run on; the host is the first.
    #[must_use]
    pub fn devices(&self) -> &[Device] {
        &self.0.devices
    }

    /// Whether `device` is emulated on the CPU.
    #[must_use]
    pub fn is_emulated(&self, device: Device) -> bool {
        matches!(device, Device::Cuda(index) if index < self.0.emulated_devices)
    }

    /// A stream of `device`.
    ///
    /// # Errors
    /// [`DeviceError::Unavailable`] if this process has no such device.
    pub fn stream(&self, device: Device) -> Result<Stream, DeviceError> {
        self.check(device)?;
        Ok(Stream::new(self.clone(), device))
    }

    /// Memory on `device`, at least 64-byte aligned. Its contents are unspecified.
    ///
    /// # Errors
    /// [`DeviceError::Unavailable`], [`DeviceError::OutOfMemory`].
    pub fn alloc(&self, device: Device, len: usize) -> Result<StorageMut, DeviceError> {
        self.check(device)?;
        if len == 0 {
            return Ok(StorageMut::empty(device));
        }
        let block = self.0.host.alloc(len).map_err(|error| match error {
            DeviceError::OutOfMemory { want_bytes, mapped_bytes, .. } => {
                DeviceError::OutOfMemory { device, want_bytes, mapped_bytes }
            }
            other => other,
        })?;
        Ok(StorageMut::pooled(block, len, device))
    }

    /// Host memory: what a socket's bytes are received into. Its contents are unspecified.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    pub fn alloc_host(&self, len: usize) -> Result<StorageMut, DeviceError> {
        self.alloc(Device::HOST, len)
    }

    /// The pool of host memory.
    #[must_use]
    pub fn host_pool(&self) -> &HostPool {
        &self.0.host
    }

    /// What the pool of host memory holds and has done.
    #[must_use]
    pub fn stats(&self) -> PoolStats {
        self.0.host.stats()
    }

    fn check(&self, device: Device) -> Result<(), DeviceError> {
        if self.0.devices.contains(&device) {
            return Ok(());
        }
        let reason = match device {
            Device::Cpu(_) => "the host is one device: cpu:0",
            Device::Cuda(_) if self.0.emulated_devices > 0 => "fewer devices are emulated",
            Device::Cuda(_) => "this build has no CUDA backend yet; emulate devices with `Config::emulated_devices`",
        };
        Err(DeviceError::Unavailable { device, reason: reason.into() })
    }
}

impl fmt::Debug for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runtime").field("devices", &self.0.devices).field("host", &self.0.host).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absent_devices_are_named() {
        let runtime = Runtime::new(Config { emulated_devices: 2, ..Config::default() }).unwrap();
        assert_eq!(runtime.devices(), [Device::HOST, Device::Cuda(0), Device::Cuda(1)]);
        assert!(runtime.is_emulated(Device::Cuda(1)) && !runtime.is_emulated(Device::HOST));
        for device in [Device::Cuda(2), Device::Cpu(1)] {
            let error = runtime.stream(device).unwrap_err();
            assert!(error.to_string().starts_with(&format!("{device} is not available: ")), "{error}");
            assert!(runtime.alloc(device, 1).is_err());
        }
    }

    #[test]
    fn the_global_runtime_is_made_once() {
        assert!(std::ptr::eq(Runtime::global(), Runtime::global()));
        let second = Runtime::new(Config::default()).unwrap();
        assert!(second.set_global().is_err(), "in use already");
    }
}
