//! Settings: what may be set without changing the program, from where, and what it comes to.
//!
//! Each setting ([`SETTINGS`]) has a key in a TOML file and a variable. A later layer counts:
//! 1. its default;
//! 2. what a launcher tells (torchrun, Slurm, Open MPI, PMI, PMIx, Kubernetes), where `rank` is set nowhere else, and for
//!    `interface` `NCCL_SOCKET_IFNAME`;
//! 3. the file that `FARCALL_CONFIG` names; without it no file is read, so that none that happens to lie around changes a job;
//! 4. the variable;
//! 5. code: the fields of [`Options`].
//!
//! Invariant G1: nothing is passed over: an unknown key or `FARCALL_*` variable, a wrong type or unit is an error that names
//! its place, what is expected and the nearest name. Invariant G2: the job's key is in no output and no file of settings.

mod error;
mod file;
mod launcher;
mod table;
mod value;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use farcall_device::{Config, Runtime};
use farcall_transport::{JobKey, KeyError, Limits, Tls, Transport};

pub use error::SettingsError;
use launcher::Launch;
use table::{Draft, NO_SETTINGS, TLS_KEYS};
pub use table::{Kind, LogFormat, SETTINGS, Setting};

use crate::Options;
use crate::nearest::nearest;

/// What the variables of settings begin with.
const PREFIX: &str = "FARCALL_";
/// More is no file of settings.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Of a value, in messages.
const SHOWN_CHARS_MAX: usize = 80;

/// What the process's device runtime was made with, if it was made here.
static MADE: Mutex<Option<Config>> = Mutex::new(None);

/// Where a setting's value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Origin {
    /// Nobody set it.
    Default,
    /// The launcher of this process told it, by this variable.
    Launcher {
        /// Its name.
        launcher: &'static str,
        /// The launcher's variable.
        variable: &'static str,
    },
    /// A file of settings.
    File {
        /// As it was given.
        path: Arc<Path>,
        /// From 1.
        line: usize,
    },
    /// The setting's own variable.
    Variable(&'static str),
}

impl Origin {
    /// A later one counts.
    fn layer(&self) -> u8 {
        match self {
            Self::Default => 0,
            Self::Launcher { .. } => 1,
            Self::File { .. } => 2,
            Self::Variable(_) => 3,
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::Launcher { launcher, variable } => write!(f, "{launcher}, {variable}"),
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Variable(variable) => write!(f, "variable {variable}"),
        }
    }
}

/// A setting's value and where it comes from.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The setting.
    pub setting: &'static Setting,
    /// As it was written; `None` where nobody set it and there is no default, and for what is secret.
    pub text: Option<String>,
    /// Where.
    pub origin: Origin,
}

/// All settings of this process, read and checked.
#[derive(Clone, Debug)]
pub struct Settings {
    entries: Vec<Entry>,
    draft: Draft,
    launch: Option<Arc<Launch>>,
}

impl Settings {
    /// Reads the environment, and the file that `FARCALL_CONFIG` names.
    ///
    /// # Errors
    /// [`SettingsError`]: the first thing that is wrong.
    pub fn from_env() -> Result<Self, SettingsError> {
        let mut variables = BTreeMap::new();
        for (name, value) in std::env::vars_os() {
            // What is not UTF-8 must not count as not set.
            let (name, text) = (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned());
            if value.to_str().is_none() && name.starts_with(PREFIX) {
                return Err(match SETTINGS.iter().find(|setting| setting.variable == name) {
                    Some(setting) => wrong_value(setting, Origin::Variable(setting.variable), &text),
                    None => unknown(&name),
                });
            }
            variables.insert(name, text);
        }
        Self::from_variables(&variables)
    }

    /// As [`Settings::from_env`], with these variables alone.
    ///
    /// # Errors
    /// As [`Settings::from_env`].
    pub fn from_variables(variables: &BTreeMap<String, String>) -> Result<Self, SettingsError> {
        let in_kubernetes = variables.contains_key("KUBERNETES_SERVICE_HOST");
        for name in variables.keys().filter(|name| name.starts_with(PREFIX)) {
            let is_known = SETTINGS.iter().any(|setting| setting.variable == name)
                || NO_SETTINGS.iter().any(|(known, _)| known == name)
                || (in_kubernetes && is_of_a_service(name));
            if !is_known {
                return Err(unknown(name));
            }
        }
        let mut settings = Self::defaults();
        let file = match variables.get("FARCALL_CONFIG").filter(|path| !path.is_empty()) {
            Some(path) => read(path.as_ref())?,
            None => Vec::new(),
        };
        settings.apply_launcher(variables, &file)?;
        settings.apply_file(file)?;
        for (index, setting) in SETTINGS.iter().enumerate() {
            let Some(text) = variables.get(setting.variable) else { continue };
            // The device runtime, which reads them itself, takes empty ones for unset.
            if text.is_empty() && setting.is_of_devices() {
                continue;
            }
            settings.apply(index, text, Origin::Variable(setting.variable))?;
        }
        settings.complete()
    }

    /// Reads a file alone, as if no variable were set.
    ///
    /// # Errors
    /// As [`Settings::from_env`].
    pub fn from_file(path: &Path) -> Result<Self, SettingsError> {
        let mut settings = Self::defaults();
        settings.apply_file(read(path)?)?;
        settings.complete()
    }

    /// Every setting, its value and where it comes from, in the order of [`SETTINGS`].
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The options for [`Agent::join`](crate::Agent::join).
    ///
    /// If the file has settings of devices, the process's [`Runtime`] is made with them here: programs read their settings
    /// before they make their first tensor.
    ///
    /// # Errors
    /// [`SettingsError`]: a setting that has no default is missing, the key cannot be read, or the runtime is there already.
    pub fn options(&self) -> Result<Options, SettingsError> {
        let mut options = self.draft.options.clone();
        let is_set = |key| self.entries.iter().any(|entry| entry.setting.key == key && entry.origin != Origin::Default);
        let missing = |variable| {
            let remedy = "start this program with `farcall run -n N -- …` or another launcher, or set it".to_owned();
            Err(SettingsError::Missing { variable, remedy })
        };
        if !is_set("rank") {
            return missing("FARCALL_RANK");
        }
        if !is_set("world_size") {
            return match &self.launch {
                Some(launch) => Err(launch.without_size()),
                None => missing("FARCALL_WORLD_SIZE"),
            };
        }
        if options.store.is_empty() {
            return match &self.launch {
                Some(launch) => launch.store(None).map(|_| options),
                None => missing("FARCALL_STORE"),
            };
        }
        if options.rank >= options.world_size {
            let message = format!("rank {} of {} workers", options.rank, options.world_size);
            return Err(self.wrong("rank", message));
        }
        options.host_store = self.draft.host_store.unwrap_or(options.rank == 0);
        options.key = self.key()?;
        options.tls = self.tls()?;
        self.make_runtime()?;
        Ok(options)
    }

    /// The job's key, if there is one.
    ///
    /// # Errors
    /// [`SettingsError::Wrong`] says what is wrong with it or its file.
    pub fn key(&self) -> Result<Option<JobKey>, SettingsError> {
        let bad = |key| move |error: KeyError| self.wrong(key, error);
        match (&self.draft.key, &self.draft.key_file) {
            (None, None) => Ok(None),
            (Some(key), _) => JobKey::from_hex(&key.0).map(Some).map_err(bad("key")),
            (None, Some(path)) => JobKey::from_file(path.as_ref()).map(Some).map_err(bad("key_file")),
        }
    }

    /// The certificate for TLS, if there is one.
    fn tls(&self) -> Result<Option<Tls>, SettingsError> {
        match &self.draft.tls {
            [None, None, None] => Ok(None),
            [Some(certificate), Some(key), Some(ca)] => {
                let tls = Tls::from_files(certificate.as_ref(), key.as_ref(), ca.as_ref());
                tls.map(Some).map_err(|error| self.wrong(TLS_KEYS[0], error))
            }
            given => {
                let missing =
                    given.iter().zip(TLS_KEYS).find(|(file, _)| file.is_none()).map_or(TLS_KEYS[0], |(_, key)| key);
                let remedy =
                    format!("TLS needs all of {}", TLS_KEYS.map(|key| SETTINGS[index_of(key)].variable).join(", "));
                Err(SettingsError::Missing { variable: SETTINGS[index_of(missing)].variable, remedy })
            }
        }
    }

    /// What the device runtime is made with.
    ///
    /// # Errors
    /// [`SettingsError::Wrong`]; each value has been checked by itself.
    pub fn device(&self) -> Result<Config, SettingsError> {
        let config = Config::from_variables(|name| self.draft.device.get(name).cloned());
        config.map_err(|error| self.wrong("devices", error))
    }

    /// Which log lines are wanted, as a filter, and where that is said.
    #[must_use]
    pub fn log(&self) -> (&str, Origin) {
        (&self.draft.log, self.origin("log"))
    }

    /// How log lines are written.
    #[must_use]
    pub fn log_format(&self) -> LogFormat {
        self.draft.log_format
    }

    /// Which sockets are used.
    #[must_use]
    pub fn transport(&self) -> Transport {
        self.draft.options.transport
    }

    /// Whether tensors pass in shared memory, where they can.
    #[must_use]
    pub fn slabs(&self) -> bool {
        self.draft.options.slabs
    }

    /// Bounds on what peers may send.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.draft.options.limits
    }

    /// This worker's rank, if it is known.
    #[must_use]
    pub fn rank(&self) -> Option<u32> {
        (self.origin("rank") != Origin::Default).then_some(self.draft.options.rank)
    }

    fn defaults() -> Self {
        let entry = |setting: &'static Setting| Entry { setting, text: None, origin: Origin::Default };
        let mut settings = Self { entries: SETTINGS.iter().map(entry).collect(), draft: Draft::new(), launch: None };
        for (index, setting) in SETTINGS.iter().enumerate().filter(|(_, setting)| !setting.default.is_empty()) {
            let set = settings.apply(index, setting.default, Origin::Default);
            debug_assert!(set.is_ok(), "the default of {setting:?}");
        }
        settings
    }

    fn apply(&mut self, index: usize, text: &str, origin: Origin) -> Result<(), SettingsError> {
        let setting = &SETTINGS[index];
        if (setting.set)(&mut self.draft, text).is_none() {
            return Err(wrong_value(setting, origin, text));
        }
        let text = (setting.kind != Kind::Secret).then(|| text.to_owned());
        self.entries[index] = Entry { setting, text, origin };
        Ok(())
    }

    fn apply_file(&mut self, file: Vec<(file::Entry, Arc<Path>)>) -> Result<(), SettingsError> {
        for (entry, path) in file {
            let origin = Origin::File { path, line: entry.line };
            self.apply(index_of(entry.setting.key), &entry.text, origin)?;
        }
        Ok(())
    }

    /// Takes over what a launcher tells, for who has not set a rank otherwise.
    fn apply_launcher(
        &mut self,
        variables: &BTreeMap<String, String>,
        file: &[(file::Entry, Arc<Path>)],
    ) -> Result<(), SettingsError> {
        let get = |name: &str| variables.get(name).cloned();
        if let Some(interface) = get("NCCL_SOCKET_IFNAME").filter(|names| !names.is_empty()) {
            let origin = Origin::Launcher { launcher: "NCCL", variable: "NCCL_SOCKET_IFNAME" };
            self.apply(index_of("interface"), &interface, origin)?;
        }
        let has_rank =
            variables.contains_key("FARCALL_RANK") || file.iter().any(|(entry, _)| entry.setting.key == "rank");
        let Some(launch) = launcher::detect(&get).filter(|_| !has_rank) else { return Ok(()) };
        let told = [("rank", Some(&launch.rank)), ("world_size", launch.world_size.as_ref())];
        for (key, told) in told.into_iter().chain([("local_rank", launch.local_rank.as_ref())]) {
            let Some((text, variable)) = told else { continue };
            let origin = Origin::Launcher { launcher: launch.launcher, variable };
            self.apply(index_of(key), text.trim(), origin)?;
        }
        // What is missing is told by who needs it.
        if let Ok((store, variable)) = launch.store(None) {
            let origin = Origin::Launcher { launcher: launch.launcher, variable };
            self.apply(index_of("store"), &store, origin)?;
        }
        self.launch = Some(Arc::new(launch));
        Ok(())
    }

    /// What can be known to be wrong of settings that are right by themselves.
    fn complete(mut self) -> Result<Self, SettingsError> {
        if let Some(port) = self.draft.options.store.strip_prefix(':') {
            let Some(launch) = &self.launch else {
                return Err(self.wrong("store", "no launcher tells the host; set HOST:PORT"));
            };
            let store = launch.store(Some(port))?.0;
            self.apply(index_of("store"), &store, self.origin("store"))?;
        }
        // NCCL's is for jobs on several hosts, and may be set wherever people log in.
        let is_nccls = matches!(self.origin("interface"), Origin::Launcher { .. });
        if is_nccls && is_on_loopback(&self.draft.options.store) {
            self.unset("interface");
        }
        self.keep_one("bind", "interface")?;
        if self.draft.options.bind.is_some_and(|bind| bind.port() != 0) {
            self.keep_one("ports", "bind")?;
        }
        self.keep_one("key", "key_file")?;
        Ok(self)
    }

    /// Of two settings that exclude each other the one of the later layer counts.
    fn keep_one(&mut self, one: &'static str, other: &'static str) -> Result<(), SettingsError> {
        match [one, other].map(|key| self.origin(key).layer()) {
            [0, _] | [_, 0] => {}
            [a, b] if a == b => return Err(self.wrong(one, format!("`{other}` is set, too; set one of them"))),
            [a, b] => self.unset(if a < b { one } else { other }),
        }
        Ok(())
    }

    /// As if nobody had set it.
    fn unset(&mut self, key: &str) {
        let index = index_of(key);
        self.entries[index] = Entry { setting: &SETTINGS[index], text: None, origin: Origin::Default };
        let Draft { options, key: secret, key_file, .. } = &mut self.draft;
        match key {
            "bind" => options.bind = None,
            "interface" => options.interface = None,
            "ports" => options.ports = None,
            "key" => *secret = None,
            "key_file" => *key_file = None,
            _ => unreachable!("{key} excludes no other setting"),
        }
    }

    /// Makes the process's runtime, if the file says more of it than the environment, from which it is made otherwise.
    fn make_runtime(&self) -> Result<(), SettingsError> {
        let of_file = |entry: &&Entry| entry.setting.is_of_devices() && matches!(entry.origin, Origin::File { .. });
        let Some(entry) = self.entries.iter().find(of_file) else { return Ok(()) };
        let wrong = |message: String| self.wrong(entry.setting.key, message);
        let config = self.device()?;
        let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
        if made.as_ref() == Some(&config) || Config::from_env().is_ok_and(|of_variables| of_variables == config) {
            return Ok(());
        }
        let runtime = Runtime::new(config.clone()).map_err(|error| wrong(error.to_string()))?;
        runtime.set_global().map_err(|_| {
            let message = "this process has a device runtime already; read the settings before any tensor is made";
            wrong(format!("{message}, or set {}", entry.setting.variable))
        })?;
        *made = Some(config);
        Ok(())
    }

    fn origin(&self, key: &str) -> Origin {
        self.entries.iter().find(|entry| entry.setting.key == key).map_or(Origin::Default, |entry| entry.origin.clone())
    }

    fn wrong(&self, key: &'static str, message: impl fmt::Display) -> SettingsError {
        let origin = match self.origin(key) {
            // Who is told by a variable's name can set it.
            Origin::Default => Origin::Variable(SETTINGS[index_of(key)].variable),
            origin => origin,
        };
        SettingsError::Wrong { origin, key, message: message.to_string() }
    }
}

/// Whether a store's address is this host's loopback, as it is written.
fn is_on_loopback(store: &str) -> bool {
    let host = store.rsplit_once(':').map_or(store, |(host, _)| host).trim_matches(['[', ']']);
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Every key that is named in this file is in the table.
fn index_of(key: &str) -> usize {
    SETTINGS.iter().position(|setting| setting.key == key).unwrap_or_else(|| unreachable!("no setting {key}"))
}

fn wrong_value(setting: &'static Setting, origin: Origin, text: &str) -> SettingsError {
    let shown: String = text.chars().take(SHOWN_CHARS_MAX).collect();
    let value = if setting.kind == Kind::Secret { "…".to_owned() } else { format!("{shown:?}") };
    SettingsError::Value { origin, key: setting.key, value, expected: setting.kind.to_string() }
}

fn unknown(variable: &str) -> SettingsError {
    let known = SETTINGS.iter().map(|setting| setting.variable);
    let known = known.chain(NO_SETTINGS.iter().map(|(variable, _)| *variable));
    SettingsError::UnknownVariable { variable: variable.to_owned(), nearest: nearest(variable, known) }
}

/// Kubernetes describes each service in variables that begin with its name, which may well be `farcall` or `farcall-…`.
fn is_of_a_service(name: &str) -> bool {
    let port = |name: &str| name.rsplit_once("_PORT").is_some_and(|(_, rest)| rest.is_empty() || rest.starts_with('_'));
    name.ends_with("_SERVICE_HOST") || name.contains("_SERVICE_PORT") || port(name)
}

/// The settings in a file, each with the file's path.
fn read(path: &Path) -> Result<Vec<(file::Entry, Arc<Path>)>, SettingsError> {
    use std::io::{Error, ErrorKind, Read};
    let error = |source| SettingsError::File { path: path.to_owned(), source };
    // Not to be kept waiting by a pipe, nor filled by a device.
    if !std::fs::metadata(path).map_err(error)?.is_file() {
        return Err(error(Error::new(ErrorKind::InvalidInput, "not a file")));
    }
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(error)?;
    if file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(error)? as u64 > FILE_BYTES_MAX {
        return Err(error(Error::new(ErrorKind::FileTooLarge, format!("more than {FILE_BYTES_MAX} bytes"))));
    }
    let shared: Arc<Path> = path.into();
    Ok(file::parse(path, &text)?.into_iter().map(|entry| (entry, Arc::clone(&shared))).collect())
}

#[cfg(test)]
mod tests;
