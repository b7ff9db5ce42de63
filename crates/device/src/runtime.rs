//! The process's devices: their memory and their streams.

use std::fmt;
use std::sync::{Arc, OnceLock};

use crate::checker::{self, Race};
use crate::cpu::Engine;
use crate::pool::{HostPool, PoolStats};
use crate::{Check, CpuMode, Device, DeviceError, StorageMut, Stream};

/// What a [`Runtime`] is made with. The default reads no environment; [`Config::from_env`] does.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// Bytes of unused large slabs that stay mapped for reuse; by default a quarter of the cgroup's or machine's memory.
    pub idle_bytes_max: Option<usize>,
    /// How many devices `cuda:0`… are emulated on the CPU, for running multi-device programs without any.
    pub emulated_devices: u16,
    /// How streams of the CPU and of emulated devices run their work.
    pub cpu: CpuMode,
    /// Whether uses of storages are checked to be ordered. If so, fresh and freed memory is poisoned too.
    pub check: Check,
}

impl Config {
    /// The default, changed by the variables that are set:
    /// - `FARCALL_CPU_STREAMS=inline|threads:SEED|chaos:SEED` sets [`Config::cpu`];
    /// - `FARCALL_DEVICES=emulated:N` has N devices emulated, which are `cuda:0` and so on: the same program runs unchanged;
    /// - `FARCALL_CHECK=off|report|panic` sets [`Config::check`]; without it, streams that are not inline are checked.
    ///
    /// # Errors
    /// [`DeviceError::InvalidSetting`].
    pub fn from_env() -> Result<Self, DeviceError> {
        Self::from_variables(|name| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned()))
    }

    fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Self, DeviceError> {
        fn set<T>(
            variable: impl Fn(&str) -> Option<String>,
            name: &'static str,
            expected: &'static str,
            parse: impl FnOnce(&str) -> Option<T>,
        ) -> Result<Option<T>, DeviceError> {
            let Some(value) = variable(name).filter(|value| !value.is_empty()) else { return Ok(None) };
            let parsed = parse(&value);
            parsed.map(Some).ok_or(DeviceError::InvalidSetting { variable: name, value: value.into(), expected })
        }
        let mut config = Self::default();
        let modes = "`inline`, `threads:SEED` or `chaos:SEED`";
        if let Some(cpu) = set(&variable, "FARCALL_CPU_STREAMS", modes, |value| match value.split_once(':') {
            None => (value == "inline").then_some(CpuMode::Inline),
            Some(("threads", seed)) => Some(CpuMode::Threads { seed: seed.parse().ok()? }),
            Some(("chaos", seed)) => Some(CpuMode::Chaos { seed: seed.parse().ok()? }),
            Some(_) => None,
        })? {
            config.cpu = cpu;
            if cpu != CpuMode::Inline {
                config.check = Check::Panic;
            }
        }
        let emulated = |value: &str| value.strip_prefix("emulated:")?.parse().ok();
        if let Some(count) = set(&variable, "FARCALL_DEVICES", "`emulated:N`", emulated)? {
            config.emulated_devices = count;
        }
        if let Some(check) = set(&variable, "FARCALL_CHECK", "`off`, `report` or `panic`", |value| match value {
            "off" => Some(Check::Off),
            "report" => Some(Check::Report),
            "panic" => Some(Check::Panic),
            _ => None,
        })? {
            config.check = check;
        }
        Ok(config)
    }
}

/// Devices, their memory pools and their streams. Cheap to clone.
#[derive(Clone)]
pub struct Runtime(Arc<Parts>);

struct Parts {
    host: HostPool,
    devices: Vec<Device>,
    emulated_devices: u16,
    /// `None` while streams run inline and unchecked.
    engine: Option<Arc<Engine>>,
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

    /// The runtime of this process, made by [`Config::from_env`] at first use.
    ///
    /// # Panics
    /// If the environment has a value that means nothing. To get it as an error, use [`Runtime::set_global`] first.
    #[must_use]
    pub fn global() -> &'static Self {
        GLOBAL.get_or_init(|| match Config::from_env() {
            Ok(config) => Self::with(&config),
            Err(error) => panic!("{error}"),
        })
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
        let plain = config.cpu == CpuMode::Inline && config.check == Check::Off;
        let engine = (!plain).then(|| Engine::new(config.cpu, config.check));
        Self(Arc::new(Parts { host: HostPool::new(config.idle_bytes_max), devices, emulated_devices, engine }))
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
        Stream::new(self.clone(), device)
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
        let mut block = self.0.host.alloc(len).map_err(|error| match error {
            DeviceError::OutOfMemory { want_bytes, mapped_bytes, .. } => {
                DeviceError::OutOfMemory { device, want_bytes, mapped_bytes }
            }
            other => other,
        })?;
        let engine = self.0.engine.as_ref();
        if engine.is_some_and(|engine| engine.is_checked()) {
            checker::poison(block.bytes_mut(), checker::FRESH);
        }
        let home = (engine.is_some() || !device.is_host()).then(|| self.clone());
        Ok(StorageMut::pooled(block, len, device, home))
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

    /// The races found since the last call: see [`Check`].
    #[must_use]
    pub fn races(&self) -> Vec<Race> {
        self.0.engine.as_ref().map_or_else(Vec::new, |engine| engine.take_races())
    }

    /// Whether operations run later than they are enqueued.
    pub(crate) fn is_queued(&self) -> bool {
        self.0.engine.as_ref().is_some_and(|engine| !engine.is_inline())
    }

    pub(crate) fn engine(&self) -> Option<&Arc<Engine>> {
        self.0.engine.as_ref()
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
    fn settings_are_read_and_nonsense_is_refused() {
        let config = |pairs: &[(&str, &str)]| {
            let find = |name: &str| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
            Config::from_variables(find)
        };
        let set = config(&[("FARCALL_CPU_STREAMS", "chaos:7"), ("FARCALL_DEVICES", "emulated:4")]).unwrap();
        assert_eq!((set.cpu, set.emulated_devices, set.check), (CpuMode::Chaos { seed: 7 }, 4, Check::Panic));
        let set = config(&[("FARCALL_CPU_STREAMS", "threads:0"), ("FARCALL_CHECK", "off")]).unwrap();
        assert_eq!((set.cpu, set.check), (CpuMode::Threads { seed: 0 }, Check::Off));
        assert_eq!(config(&[("FARCALL_CPU_STREAMS", "")]).unwrap().cpu, CpuMode::Inline);
        for (name, value) in [
            ("FARCALL_CPU_STREAMS", "chaos"),
            ("FARCALL_CPU_STREAMS", "inline:1"),
            ("FARCALL_DEVICES", "4"),
            ("FARCALL_CHECK", "yes"),
        ] {
            let error = config(&[(name, value)]).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{name}={value} is not understood: expected `")), "{error}");
        }
    }

    #[test]
    fn the_global_runtime_is_made_once() {
        assert!(std::ptr::eq(Runtime::global(), Runtime::global()));
        let second = Runtime::new(Config::default()).unwrap();
        assert!(second.set_global().is_err(), "in use already");
    }
}
