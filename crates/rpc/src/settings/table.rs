//! The table of all settings: the one place where a setting has its name, type, default and meaning.
//!
//! The documentation and `farcall config show` are made from it. Invariant T1: a variable is `FARCALL_` and its key in
//! capitals, `_` for `.`. Invariant T2: a default here is the default of [`Options`]. Both are tested.

use std::collections::BTreeMap;
use std::fmt;

use farcall_device::{Config, units};

use super::value;
use crate::Options;

/// What a setting's value looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// A whole number.
    Count,
    /// A whole number above 0.
    Positive,
    /// Yes or no.
    Flag,
    /// A time, with its unit.
    Duration,
    /// Bytes, with or without a unit.
    Size,
    /// Text of which this is expected.
    Text(&'static str),
    /// Text that is not shown, and not taken from a file.
    Secret,
}

impl fmt::Display for Kind {
    /// What is expected, for messages.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count => f.write_str("a whole number"),
            Self::Positive => f.write_str("a whole number above 0"),
            Self::Flag => f.write_str("`true` or `false`; in a variable, `1` or `0`, too"),
            Self::Duration => f.write_str(value::DURATION),
            Self::Size => f.write_str(units::BYTES),
            Self::Text(expected) => f.write_str(expected),
            Self::Secret => f.write_str("hexadecimal digits"),
        }
    }
}

/// One setting.
#[derive(Clone, Copy)]
pub struct Setting {
    /// Its name in a file: `limits.requests` is `requests` in the table `[limits]`.
    pub key: &'static str,
    /// Its name in the environment.
    pub variable: &'static str,
    /// What is expected.
    pub kind: Kind,
    /// The value of who sets nothing, as it would be written; empty if there is none.
    pub default: &'static str,
    /// What it is for, in a line.
    pub meaning: &'static str,
    /// Takes over a value; `None` if it is not what is expected.
    pub(super) set: fn(&mut Draft, &str) -> Option<()>,
}

impl Setting {
    /// Whether it is one of the device runtime, which also reads it by itself.
    pub(super) fn is_of_devices(&self) -> bool {
        DEVICE_KEYS.contains(&self.key)
    }
}

impl fmt::Debug for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Setting({})", self.key)
    }
}

/// What the values taken over so far come to.
#[derive(Clone, Debug)]
pub(super) struct Draft {
    pub(super) options: Options,
    /// Unless given, rank 0 hosts the store.
    pub(super) host_store: Option<bool>,
    /// The job's key is read once all settings are known.
    pub(super) key: Option<Hidden>,
    pub(super) key_file: Option<String>,
    /// The files of [`TLS_KEYS`].
    pub(super) tls: [Option<String>; 3],
    /// Variables of [`Config`] and their values.
    pub(super) device: BTreeMap<&'static str, String>,
    pub(super) log: String,
    pub(super) log_format: LogFormat,
}

impl Draft {
    pub(super) fn new() -> Self {
        Self {
            options: Options::new(0, 0, ""),
            host_store: None,
            key: None,
            key_file: None,
            tls: [None, None, None],
            device: BTreeMap::new(),
            log: String::new(),
            log_format: LogFormat::Text,
        }
    }

    /// Takes over a setting of the device runtime, if it understands it by itself.
    fn device(&mut self, variable: &'static str, text: &str) -> Option<()> {
        Config::from_variables(|name| (name == variable).then(|| text.to_owned())).ok()?;
        self.device.insert(variable, text.to_owned());
        Some(())
    }
}

/// Text that `Debug` does not show.
#[derive(Clone)]
pub(super) struct Hidden(pub(super) String);

impl fmt::Debug for Hidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hidden(…)")
    }
}

/// How log lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LogFormat {
    /// A line for people.
    Text,
    /// A JSON object a line.
    Json,
}

/// Variables with the prefix of settings that are none.
pub(super) const NO_SETTINGS: &[(&str, &str)] = &[("FARCALL_CONFIG", "the file that settings are read from")];

/// The settings that [`Config::from_env`] reads.
const DEVICE_KEYS: &[&str] = &["devices", "cuda", "cpu_streams", "check", "idle_bytes"];

/// The settings of TLS: all or none.
pub(super) const TLS_KEYS: [&str; 3] = ["tls_cert", "tls_key", "tls_ca"];
const PEM: Kind = Kind::Text("the path of a PEM file");

const INTERFACE: Kind = Kind::Text(
    "names or beginnings of names of interfaces, such as `eth0` or `eth,ib`; `=eth0` for that name alone; `^docker,lo` for all \
     but those",
);

/// A row of the table; its default is set like any value.
macro_rules! settings {
    ($($key:literal, $variable:literal, $kind:expr, $default:literal, $meaning:literal, $set:expr;)*) => {
        /// All settings, in the order in which they are shown.
        pub const SETTINGS: &[Setting] = &[$(Setting {
            key: $key, variable: $variable, kind: $kind, default: $default, meaning: $meaning, set: $set,
        },)*];
    };
}

settings! {
    "rank", "FARCALL_RANK", Kind::Count, "",
        "this worker's number, 0 to `world_size` − 1; launchers set it",
        |draft, text| value::number(text).map(|rank| draft.options.rank = rank);
    "world_size", "FARCALL_WORLD_SIZE", Kind::Count, "",
        "how many workers there are; launchers set it",
        |draft, text| value::number(text).map(|world_size| draft.options.world_size = world_size);
    "local_rank", "FARCALL_LOCAL_RANK", Kind::Count, "",
        "this worker's number on its host, for programs that choose a device by it; launchers set it",
        |draft, text| value::number(text).map(|local_rank| draft.options.local_rank = Some(local_rank));
    "name", "FARCALL_NAME", Kind::Text("a name"), "",
        "this worker's name; `w` and its rank if there is none",
        |draft, text| value::text(text).map(|name| draft.options.name = Some(name));
    "group", "FARCALL_GROUP", Kind::Text("a name"), "farcall",
        "told apart from other groups that use the same store or ports",
        |draft, text| value::text(text).map(|group| draft.options.group = group);
    "store", "FARCALL_STORE", Kind::Text("`HOST:PORT`, or `:PORT` with a launcher that tells the host"), "",
        "where the workers meet: an address of rank 0's host and a free port there",
        |draft, text| value::store(text).map(|store| draft.options.store = store);
    "host_store", "FARCALL_HOST_STORE", Kind::Flag, "",
        "host the store in this process; rank 0 does unless told otherwise",
        |draft, text| value::flag(text).map(|host| draft.host_store = Some(host));
    "key", "FARCALL_KEY", Kind::Secret, "",
        "the job's key, needed beyond loopback; a variable only, never in a file of settings",
        |draft, text| { draft.key = Some(Hidden(text.to_owned())); Some(()) };
    "key_file", "FARCALL_KEY_FILE", Kind::Text("the path of a file"), "",
        "a file with the job's key that nobody else can read",
        |draft, text| value::text(text).map(|path| draft.key_file = Some(path));
    "tls_cert", "FARCALL_TLS_CERT", PEM, "",
        "a certificate for TLS over TCP, then its chain; all three or none, in builds with the feature `tls`",
        |draft, text| value::text(text).map(|path| draft.tls[0] = Some(path));
    "tls_key", "FARCALL_TLS_KEY", PEM, "",
        "the certificate's private key",
        |draft, text| value::text(text).map(|path| draft.tls[1] = Some(path));
    "tls_ca", "FARCALL_TLS_CA", PEM, "",
        "the authority that all workers' certificates are of",
        |draft, text| value::text(text).map(|path| draft.tls[2] = Some(path));
    "transport", "FARCALL_TRANSPORT", Kind::Text("`auto`, `tcp` or `unix`"), "auto",
        "which sockets are used: Unix sockets between one user's workers on one host and TCP else, or one kind alone",
        |draft, text| text.parse().ok().map(|transport| draft.options.transport = transport);
    "shm", "FARCALL_SHM", Kind::Text("`auto` or `off`"), "auto",
        "tensors pass in shared memory between one user's workers on one host, without a copy, or through sockets",
        |draft, text| {
            draft.options.slabs = match text { "auto" => true, "off" => false, _ => return None };
            Some(())
        };
    "spin", "FARCALL_SPIN", Kind::Text("`auto`, `on` or `off`"), "auto",
        "threads look for work a while before they sleep: while it is seen to pay, always, or never",
        |draft, text| text.parse().ok().map(|spin| draft.options.spin = spin);
    "digests", "FARCALL_DIGESTS", Kind::Flag, "false",
        "tensors are sent with digests, which their receivers compare: bytes that a network or a memory has changed are an error",
        |draft, text| value::flag(text).map(|digests| draft.options.digests = digests);
    "interface", "FARCALL_INTERFACE", INTERFACE, "",
        "the network interface whose address this worker listens on; `NCCL_SOCKET_IFNAME` if there is none",
        |draft, text| text.parse().ok().map(|interface| draft.options.interface = Some(interface));
    "bind", "FARCALL_BIND", Kind::Text("an address and a port, such as `10.0.0.1:0` or `[::1]:0`"), "",
        "where this worker listens, port 0 for any; by default on the address from which it reaches the store",
        |draft, text| text.parse().ok().map(|bind| draft.options.bind = Some(bind));
    "ports", "FARCALL_PORTS", Kind::Text("a port such as `20000`, or a range such as `20000-20100`"), "",
        "the ports to listen on: the first that is free",
        |draft, text| value::ports(text).map(|ports| draft.options.ports = Some(ports));
    "advertise", "FARCALL_ADVERTISE", Kind::Text("an address such as `10.0.0.1` or `2001:db8::1`"), "",
        "under which address the others reach this worker, if it is another than it listens on",
        |draft, text| text.parse().ok().map(|address| draft.options.advertise = Some(address));
    "deadline", "FARCALL_DEADLINE", Kind::Duration, "60s",
        "how long a call waits for its reply unless told otherwise",
        |draft, text| value::duration(text).map(|deadline| draft.options.deadline = deadline);
    "join_timeout", "FARCALL_JOIN_TIMEOUT", Kind::Duration, "60s",
        "how long joining may take",
        |draft, text| value::duration(text).map(|timeout| draft.options.join_timeout = timeout);
    "connect_timeout", "FARCALL_CONNECT_TIMEOUT", Kind::Duration, "1600ms",
        "how long a connection to another worker may take, its welcome included",
        |draft, text| value::duration(text).map(|timeout| draft.options.connect_timeout = timeout);
    "peer_timeout", "FARCALL_PEER_TIMEOUT", Kind::Duration, "1600ms",
        "how long another worker may be silent until it counts as lost; the same on all workers",
        |draft, text| value::duration(text).map(|timeout| draft.options.peer_timeout = timeout);
    "shutdown_timeout", "FARCALL_SHUTDOWN_TIMEOUT", Kind::Duration, "60s",
        "how long leaving waits for calls in flight and for the others",
        |draft, text| value::duration(text).map(|timeout| draft.options.shutdown_timeout = timeout);
    "handlers_max", "FARCALL_HANDLERS_MAX", Kind::Positive, "1024",
        "handlers that run at a time; those that wait for a reply are not counted",
        |draft, text| value::above_zero(text).map(|handlers| draft.options.handlers_max = handlers);
    "limits.metadata_bytes", "FARCALL_LIMITS_METADATA_BYTES", Kind::Size, "1MiB",
        "of one frame: what is not tensors",
        |draft, text| value::bytes(text).map(|bytes| draft.options.limits.metadata_bytes_max = bytes);
    "limits.extension_bytes", "FARCALL_LIMITS_EXTENSION_BYTES", Kind::Size, "1KiB",
        "of one frame: extensions",
        |draft, text| value::bytes(text).map(|bytes| draft.options.limits.extension_bytes_max = bytes);
    "limits.tensors", "FARCALL_LIMITS_TENSORS", Kind::Count, "4096",
        "tensors in one frame",
        |draft, text| value::number(text).map(|tensors| draft.options.limits.tensors_max = tensors);
    "limits.tensor_bytes", "FARCALL_LIMITS_TENSOR_BYTES", Kind::Size, "8GiB",
        "of all tensors of one frame",
        |draft, text| value::bytes(text).map(|bytes| draft.options.limits.tensor_bytes_max = bytes);
    "limits.inline_bytes", "FARCALL_LIMITS_INLINE_BYTES", Kind::Size, "64KiB",
        "of payload inside a control frame; larger tensors take the bulk connection",
        |draft, text| value::bytes(text).map(|bytes| draft.options.limits.inline_bytes_max = bytes);
    "limits.chunk_bytes", "FARCALL_LIMITS_CHUNK_BYTES", Kind::Size, "4MiB",
        "of one chunk on the bulk connection",
        |draft, text| value::some_bytes(text).map(|bytes| draft.options.limits.chunk_bytes_max = bytes);
    "limits.requests", "FARCALL_LIMITS_REQUESTS", Kind::Positive, "4096",
        "requests of one peer that are not answered; more wait at the caller",
        |draft, text| value::above_zero(text).map(|requests| draft.options.limits.requests_max = requests);
    "limits.request_bytes", "FARCALL_LIMITS_REQUEST_BYTES", Kind::Size, "4GiB",
        "of tensors in one peer's requests that are not answered, or one larger request alone",
        |draft, text| value::bytes(text).map(|bytes| draft.options.limits.request_bytes_max = bytes);
    "limits.backlog_bytes", "FARCALL_LIMITS_BACKLOG_BYTES", Kind::Size, "64MiB",
        "that wait to be taken by one peer, beside tensors: from then on nothing is read from it",
        |draft, text| {
            let bytes = value::some_bytes(text)?.try_into().ok()?;
            draft.options.limits.backlog_bytes_max = bytes;
            Some(())
        };
    "devices", "FARCALL_DEVICES", Kind::Text("`emulated:N`"), "",
        "emulate N devices on the CPU, as `cuda:0` to `cuda:N-1`, in place of real ones",
        |draft, text| draft.device("FARCALL_DEVICES", text);
    "cuda", "FARCALL_CUDA", Kind::Text("`auto`, `off` or `require`"), "auto",
        "whether CUDA devices are used: those that are there, none, or at least one",
        |draft, text| draft.device("FARCALL_CUDA", text);
    "cpu_streams", "FARCALL_CPU_STREAMS", Kind::Text("`inline`, `threads:SEED` or `chaos:SEED`"), "inline",
        "how streams of the CPU and of emulated devices run: at once, on threads, or not until they must",
        |draft, text| draft.device("FARCALL_CPU_STREAMS", text);
    "check", "FARCALL_CHECK", Kind::Text("`off`, `report` or `panic`"), "",
        "whether uses of storages are checked to be ordered; `off` for inline streams, else `panic`",
        |draft, text| draft.device("FARCALL_CHECK", text);
    "idle_bytes", "FARCALL_IDLE_BYTES", Kind::Size, "",
        "of unused large blocks that stay mapped for reuse; a quarter of the memory if not set",
        |draft, text| draft.device("FARCALL_IDLE_BYTES", text);
    "log", "FARCALL_LOG", Kind::Text("a level, or a filter such as `warn,farcall_rpc=debug`"), "warn",
        "which log lines `farcall::log::init` and the tools write, to standard error",
        |draft, text| value::text(text).map(|filter| draft.log = filter);
    "log_format", "FARCALL_LOG_FORMAT", Kind::Text("`text` or `json`"), "text",
        "how: a line for people, or a JSON object a line",
        |draft, text| value::log_format(text).map(|format| draft.log_format = format);
}

/// The setting of this name in a file.
pub(super) fn by_key(key: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|setting| setting.key == key)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::BTreeSet;

    use super::*;

    /// T1.
    #[test]
    fn variables_are_made_of_their_keys() {
        for setting in SETTINGS {
            let made = format!("FARCALL_{}", setting.key.replace('.', "_").to_uppercase());
            assert_eq!(setting.variable, made);
        }
        let keys: BTreeSet<&str> = SETTINGS.iter().map(|setting| setting.key).collect();
        assert_eq!(keys.len(), SETTINGS.len(), "a key is there twice");
    }

    /// T2: setting every default changes nothing.
    #[test]
    fn defaults_are_those_of_the_options() {
        let untouched = Draft::new();
        let mut set = untouched.clone();
        for setting in SETTINGS.iter().filter(|setting| !setting.default.is_empty()) {
            (setting.set)(&mut set, setting.default).unwrap_or_else(|| panic!("the default of {setting:?}"));
        }
        assert_eq!(format!("{:#?}", set.options), format!("{:#?}", untouched.options));
        let device = Config::from_variables(|name| set.device.get(name).cloned()).expect("defaults");
        assert_eq!(device, Config::default());
    }

    /// Whatever the device runtime reads from the environment is a setting.
    #[test]
    fn every_variable_of_the_device_runtime_is_in_the_table() {
        let asked = RefCell::new(BTreeSet::new());
        Config::from_variables(|name| {
            asked.borrow_mut().insert(name.to_owned());
            None
        })
        .expect("nothing is set");
        assert!(asked.borrow().len() > 3);
        for name in asked.into_inner() {
            let setting = SETTINGS.iter().find(|setting| setting.variable == name);
            let setting =
                setting.unwrap_or_else(|| panic!("{name} is read by `Config::from_env` and is not in the table"));
            assert!(setting.is_of_devices(), "{name} is not among `DEVICE_KEYS`");
        }
    }
}
