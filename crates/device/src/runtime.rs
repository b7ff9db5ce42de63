//! The process's devices: their memory and their streams.

use std::fmt;
use std::sync::{Arc, OnceLock};

use crate::checker::{self, Race};
use crate::cpu::Engine;
use crate::cuda::{self, Context, Driver, Kind, Pool, Unavailable};
use crate::pack::pack;
use crate::pool::{HostPool, PoolStats};
use crate::{Check, CpuMode, Device, DeviceError, Layout, SlabCopy, StorageMut, Stream, Tensor, copy, units};

/// What a [`Runtime`] is made with. The default reads no environment; [`Config::from_env`] does.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Config {
    /// Bytes of unused large blocks (above 1 MiB) that stay mapped for reuse; by default a quarter of the cgroup's or machine's memory.
    pub idle_bytes_max: Option<usize>,
    /// How many devices `cuda:0`… are emulated on the CPU, for running multi-device programs without any.
    pub emulated_devices: u16,
    /// Whether CUDA devices are used.
    pub cuda: Cuda,
    /// How streams of the CPU and of emulated devices run their work.
    pub cpu: CpuMode,
    /// Whether uses of storages are checked to be ordered. If so, fresh and freed memory is poisoned too.
    pub check: Check,
}

/// Whether a [`Runtime`] uses the CUDA devices of this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Cuda {
    /// Those that are there. The driver is looked for when a device is first asked for, so that a program for the CPU never loads it.
    #[default]
    Auto,
    /// None: the driver is not even looked for.
    Off,
    /// At least one, else [`Runtime::new`] fails. Emulated devices are none.
    Require,
}

impl Config {
    /// The default, changed by the variables that are set:
    /// - `FARCALL_CPU_STREAMS=inline|threads:SEED|chaos:SEED` sets [`Config::cpu`];
    /// - `FARCALL_CUDA=auto|off|require` sets [`Config::cuda`];
    /// - `FARCALL_DEVICES=emulated:N` has N devices emulated, which are `cuda:0` and so on, and take the place of real ones;
    /// - `FARCALL_CHECK=off|report|panic` sets [`Config::check`]; without it, streams that are not inline are checked;
    /// - `FARCALL_IDLE_BYTES` (such as `4GiB`) sets [`Config::idle_bytes_max`].
    ///
    /// # Errors
    /// [`DeviceError::InvalidSetting`].
    pub fn from_env() -> Result<Self, DeviceError> {
        Self::from_variables(|name| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned()))
    }

    /// As [`Config::from_env`], with variables from elsewhere: `variable` is asked for each, by name.
    ///
    /// # Errors
    /// [`DeviceError::InvalidSetting`].
    pub fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Self, DeviceError> {
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
        if let Some(cuda) = set(&variable, "FARCALL_CUDA", "`auto`, `off` or `require`", |value| match value {
            "auto" => Some(Cuda::Auto),
            "off" => Some(Cuda::Off),
            "require" => Some(Cuda::Require),
            _ => None,
        })? {
            config.cuda = cuda;
        }
        if let Some(check) = set(&variable, "FARCALL_CHECK", "`off`, `report` or `panic`", |value| match value {
            "off" => Some(Check::Off),
            "report" => Some(Check::Report),
            "panic" => Some(Check::Panic),
            _ => None,
        })? {
            config.check = check;
        }
        let idle_bytes = |value: &str| usize::try_from(units::parse_bytes(value)?).ok();
        config.idle_bytes_max = set(&variable, "FARCALL_IDLE_BYTES", units::BYTES, idle_bytes)?;
        Ok(config)
    }
}

/// Devices, their memory pools and their streams. Cheap to clone.
#[derive(Clone)]
pub struct Runtime(Arc<Parts>);

struct Parts {
    host: HostPool,
    /// Known once they are asked for: that is when a driver is looked for.
    devices: OnceLock<Vec<Device>>,
    emulated_devices: u16,
    /// `None` while streams run inline and unchecked.
    engine: Option<Arc<Engine>>,
    cuda: CudaParts,
}

/// What a runtime has of CUDA; driver and contexts are the process's.
struct CudaParts {
    setting: Cuda,
    driver: OnceLock<Result<&'static Driver, Unavailable>>,
    /// Keeps the clocks of CUDA streams if nothing else needs an engine.
    engine: OnceLock<Arc<Engine>>,
    /// The memory of each device.
    pools: Pools,
    /// Pinned memory, taken through the first device that is not lost.
    pinned: Pools,
}

/// A pool for each CUDA device, made when it is first needed.
type Pools = OnceLock<Box<[OnceLock<Arc<Pool>>]>>;

static GLOBAL: OnceLock<Runtime> = OnceLock::new();

impl Runtime {
    /// A runtime of its own.
    ///
    /// # Errors
    /// [`DeviceError::Unavailable`] if CUDA is required and absent.
    pub fn new(config: Config) -> Result<Self, DeviceError> {
        let runtime = Self::with(&config);
        if config.cuda == Cuda::Require
            && let Some(absent) = runtime.cuda_absent()
        {
            return Err(DeviceError::Unavailable { device: Device::Cuda(0), reason: absent.to_string().into() });
        }
        Ok(runtime)
    }

    /// The runtime of this process, made by [`Config::from_env`] at first use.
    ///
    /// # Panics
    /// If the environment has a value that means nothing, or requires a device that is absent. To get it as an error, use
    /// [`Runtime::set_global`] first.
    #[must_use]
    pub fn global() -> &'static Self {
        GLOBAL.get_or_init(|| match Config::from_env().and_then(Self::new) {
            Ok(runtime) => runtime,
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
        let plain = config.cpu == CpuMode::Inline && config.check == Check::Off;
        let engine = (!plain).then(|| Engine::new(config.cpu, config.check));
        let cuda = CudaParts {
            setting: config.cuda,
            driver: OnceLock::new(),
            engine: OnceLock::new(),
            pools: OnceLock::new(),
            pinned: OnceLock::new(),
        };
        let host = HostPool::new(config.idle_bytes_max);
        Self(Arc::new(Parts { host, devices: OnceLock::new(), emulated_devices, engine, cuda }))
    }

    /// The devices that work can run on; the host is the first.
    ///
    /// # Cost
    /// The first call of the process looks for a driver, and starts it if there is one: see [`cuda::probe`].
    #[must_use]
    pub fn devices(&self) -> &[Device] {
        self.0.devices.get_or_init(|| {
            let real = self.driver().map_or(0, |driver| driver.infos().len() as u16);
            let count = self.0.emulated_devices.max(real);
            [Device::HOST].into_iter().chain((0..count).map(Device::Cuda)).collect()
        })
    }

    /// Why there are no CUDA devices; `None` if there are. Looks for the driver, like [`Runtime::devices`].
    #[must_use]
    pub fn cuda_absent(&self) -> Option<&Unavailable> {
        self.driver().err()
    }

    /// What the driver says about a real CUDA device.
    #[must_use]
    pub fn cuda_info(&self, device: Device) -> Option<&cuda::DeviceInfo> {
        let Device::Cuda(index) = device else { return None };
        self.driver().ok()?.infos().nth(usize::from(index))
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
        let context = self.cuda_context(device)?;
        if len == 0 {
            return Ok(StorageMut::empty(device));
        }
        if let Some(context) = context {
            let (block, fences) = self.pool_of(&self.0.cuda.pools, device, context, Kind::Device).alloc(len)?;
            return Ok(StorageMut::on_cuda(block, len, device, self.clone(), fences));
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

    /// The tensor in a slab of this runtime, or of another one of this process: what a peer on this host can be lent. Itself if it
    /// is there; else, for a dense or broadcast tensor on the host, a copy, made now if the bytes are written, and behind their
    /// write if not. Else itself, too: it must be packed first.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`], or the failure of the work that writes the bytes.
    /// # Cost
    /// One pass over the bytes: see [`copy`](crate::copy).
    pub fn in_slab(&self, tensor: &Tensor) -> Result<Tensor, DeviceError> {
        let (storage, layout) = (tensor.storage(), tensor.layout());
        let is_shared = storage.slab().is_some_and(|slab| slab.fd().is_ok());
        if is_shared || storage.device() != Device::HOST || !layout.is_dense_or_broadcast() || layout.numel() == 0 {
            return Ok(tensor.clone());
        }
        let source = match storage.as_bytes() {
            Ok(bytes) => &bytes[layout.byte_span()],
            Err(DeviceError::NotReady { .. }) => return self.stream(Device::HOST)?.pack(tensor, Device::HOST),
            Err(error) => return Err(error),
        };
        let mut target = self.alloc_host(source.len())?;
        copy(target.as_bytes_mut()?, source);
        let layout = Layout::strided(layout.dtype(), layout.shape(), layout.strides(), 0)?;
        Tensor::from_storage(target.freeze_ready(), layout)
    }

    /// The tensor, or a copy of it as it is now, if it lies in memory of the host whose owner may write it
    /// ([`Storage::may_change`](crate::Storage::may_change)). Never behind a stream.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    /// # Cost
    /// Of a copy, one pass over its elements.
    pub fn snapshot(&self, tensor: &Tensor) -> Result<Tensor, DeviceError> {
        let (storage, layout) = (tensor.storage(), tensor.layout());
        if !storage.may_change() || !storage.device().is_host() || layout.is_dense_or_broadcast() {
            return if storage.may_change() { self.in_slab(tensor) } else { Ok(tensor.clone()) };
        }
        let packed = layout.packed();
        let mut target = self.alloc_host(packed.size_bytes())?;
        pack(layout, storage.as_bytes()?, target.as_bytes_mut()?);
        Tensor::from_storage(target.freeze_ready(), packed)
    }

    /// Memory in a slab for a copy of `tensor`, which is to be made by [`SlabCopy::run`]: until then whoever wants its bytes waits.
    /// `None` if there is nothing to copy now: it lies in a slab, is not dense or broadcast on the host, or not written yet.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`], or the failure of the work that writes the bytes.
    pub fn begin_slab_copy(&self, tensor: &Tensor) -> Result<Option<SlabCopy>, DeviceError> {
        let (storage, layout) = (tensor.storage(), tensor.layout());
        let is_shared = storage.slab().is_some_and(|slab| slab.fd().is_ok());
        let is_plain = storage.device() == Device::HOST && layout.is_dense_or_broadcast() && layout.numel() > 0;
        if is_shared || !is_plain || !storage.is_ready()? {
            return Ok(None);
        }
        SlabCopy::begin(self, tensor).map(Some)
    }

    /// Host memory that CUDA devices copy from and to without the host's help; without such a device, as [`Runtime::alloc_host`].
    /// Its contents are unspecified.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    pub fn alloc_pinned(&self, len: usize) -> Result<StorageMut, DeviceError> {
        let Some((device, context)) = (len > 0).then(|| self.first_alive()).flatten() else {
            return self.alloc_host(len);
        };
        let pool = self.pool_of(&self.0.cuda.pinned, device, context, Kind::Pinned);
        // Pinned memory comes back after its fences: there are none to wait for.
        let (mut block, _) = pool.alloc(len)?;
        let engine = self.0.engine.as_ref();
        if engine.is_some_and(|engine| engine.is_checked()) {
            checker::poison(block.host_bytes_mut(len), checker::FRESH);
        }
        Ok(StorageMut::pinned(block, len, engine.is_some().then(|| self.clone())))
    }

    /// What the pool of a CUDA device's memory holds and has done; `None` if none was taken, or for another device.
    ///
    /// Memory that was given back counts as idle, although its last use may be pending.
    #[must_use]
    pub fn cuda_stats(&self, device: Device) -> Option<PoolStats> {
        let Device::Cuda(index) = device else { return None };
        Some(self.0.cuda.pools.get()?.get(usize::from(index))?.get()?.stats())
    }

    /// What the pool of pinned host memory holds and has done; `None` if none was taken.
    #[must_use]
    pub fn pinned_stats(&self) -> Option<PoolStats> {
        // One pool, but for the time after a device was lost.
        self.0.cuda.pinned.get()?.iter().filter_map(OnceLock::get).map(|pool| pool.stats()).next_back()
    }

    /// Gives idle memory back to the system and to the driver, which may wait for its devices; returns how many bytes that was.
    pub fn trim(&self) -> usize {
        let pools = [&self.0.cuda.pools, &self.0.cuda.pinned];
        let pools = pools.into_iter().filter_map(OnceLock::get).flatten().filter_map(OnceLock::get);
        let cuda: usize = pools.map(|pool| pool.trim()).sum();
        self.0.host.trim() + cuda
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

    /// The engine that orders the work on `device`.
    pub(crate) fn engine_of(&self, device: Device) -> Option<&Arc<Engine>> {
        let own = self.0.engine.as_ref();
        if own.is_some() || device.is_host() { own } else { self.0.cuda.engine.get() }
    }

    /// The engine of CUDA streams: they keep clocks in any case.
    pub(crate) fn cuda_engine(&self) -> &Arc<Engine> {
        let fresh = || Engine::new(CpuMode::Inline, Check::Off);
        self.0.engine.as_ref().unwrap_or_else(|| self.0.cuda.engine.get_or_init(fresh))
    }

    /// The context of a real CUDA device; `None` for the host and emulated devices, which are there.
    pub(crate) fn cuda_context(&self, device: Device) -> Result<Option<&'static Context>, DeviceError> {
        let Device::Cuda(index) = device else { return Ok(None) };
        if self.0.emulated_devices > 0 {
            return Ok(None);
        }
        let absent = |reason: String| DeviceError::Unavailable { device, reason: reason.into() };
        let driver = self.driver().map_err(|reason| absent(reason.to_string()))?;
        let few = || absent(format!("the driver shows {} CUDA devices, from cuda:0 on", driver.infos().len()));
        driver.context(index).ok_or_else(few)?.map(Some)
    }

    fn first_alive(&self) -> Option<(Device, &'static Context)> {
        let driver = self.driver().ok()?;
        let contexts = (0..driver.infos().len() as u16).map(|index| (Device::Cuda(index), driver.context(index)));
        let mut usable = contexts.filter_map(|(device, context)| Some((device, context?.ok()?)));
        usable.find(|(_, context)| context.expect_alive().is_ok())
    }

    fn pool_of<'a>(&self, pools: &'a Pools, device: Device, context: &'static Context, kind: Kind) -> &'a Arc<Pool> {
        let count = self.driver().map_or(0, |driver| driver.infos().len());
        let pools = pools.get_or_init(|| (0..count).map(|_| OnceLock::new()).collect());
        pools[usize::from(device.index())].get_or_init(|| Pool::new(context, kind))
    }

    fn driver(&self) -> Result<&'static Driver, &Unavailable> {
        let driver = self.0.cuda.driver.get_or_init(|| match self.0.cuda.setting {
            _ if self.0.emulated_devices > 0 => Err(Unavailable::Emulated),
            Cuda::Off => Err(Unavailable::Off),
            Cuda::Auto | Cuda::Require => cuda::driver().map_err(Clone::clone),
        });
        driver.as_ref().copied()
    }

    fn check(&self, device: Device) -> Result<(), DeviceError> {
        let reason = match device {
            Device::HOST => return Ok(()),
            Device::Cuda(index) if index < self.0.emulated_devices => return Ok(()),
            Device::Cpu(_) => "the host is one device: cpu:0",
            Device::Cuda(_) if self.0.emulated_devices > 0 => "fewer devices are emulated",
            // The driver is asked for its context next.
            Device::Cuda(_) => return Ok(()),
        };
        Err(DeviceError::Unavailable { device, reason: reason.into() })
    }
}

impl fmt::Debug for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runtime").field("devices", &self.0.devices.get()).field("host", &self.0.host).finish()
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
    fn a_device_that_is_switched_off_says_so() {
        let runtime = Runtime::new(Config { cuda: Cuda::Off, ..Config::default() }).unwrap();
        assert_eq!((runtime.devices(), runtime.cuda_absent()), (&[Device::HOST][..], Some(&Unavailable::Off)));
        let error = runtime.stream(Device::Cuda(0)).unwrap_err().to_string();
        assert!(error.starts_with("cuda:0 is not available: switched off: set FARCALL_CUDA=auto"), "{error}");
    }

    #[test]
    fn emulated_devices_are_not_taken_for_required_ones() {
        let emulated = Runtime::new(Config { emulated_devices: 1, ..Config::default() }).unwrap();
        assert_eq!(emulated.cuda_absent(), Some(&Unavailable::Emulated));
        let required = Runtime::new(Config { emulated_devices: 1, cuda: Cuda::Require, ..Config::default() });
        assert!(matches!(required, Err(DeviceError::Unavailable { device: Device::Cuda(0), .. })));
    }

    #[test]
    fn settings_are_read_and_nonsense_is_refused() {
        let config = |pairs: &[(&str, &str)]| {
            let find = |name: &str| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
            Config::from_variables(find)
        };
        let set = config(&[("FARCALL_CPU_STREAMS", "chaos:7"), ("FARCALL_DEVICES", "emulated:4")]).unwrap();
        assert_eq!((set.cpu, set.emulated_devices, set.check), (CpuMode::Chaos { seed: 7 }, 4, Check::Panic));
        let set = config(&[("FARCALL_CUDA", "require")]).unwrap();
        assert_eq!((set.cuda, Config::default().cuda), (Cuda::Require, Cuda::Auto));
        let set = config(&[("FARCALL_CPU_STREAMS", "threads:0"), ("FARCALL_CHECK", "off")]).unwrap();
        assert_eq!((set.cpu, set.check), (CpuMode::Threads { seed: 0 }, Check::Off));
        assert_eq!(config(&[("FARCALL_CPU_STREAMS", "")]).unwrap().cpu, CpuMode::Inline);
        assert_eq!(config(&[("FARCALL_IDLE_BYTES", "3MiB")]).unwrap().idle_bytes_max, Some(3 << 20));
        for (name, value) in [
            ("FARCALL_CPU_STREAMS", "chaos"),
            ("FARCALL_CPU_STREAMS", "inline:1"),
            ("FARCALL_DEVICES", "4"),
            ("FARCALL_CUDA", "on"),
            ("FARCALL_CHECK", "yes"),
            ("FARCALL_IDLE_BYTES", "much"),
        ] {
            let error = config(&[(name, value)]).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{name}={value} is not understood: expected ")), "{error}");
        }
    }

    #[test]
    fn the_global_runtime_is_made_once() {
        assert!(std::ptr::eq(Runtime::global(), Runtime::global()));
        let second = Runtime::new(Config::default()).unwrap();
        assert!(second.set_global().is_err(), "in use already");
    }
}
