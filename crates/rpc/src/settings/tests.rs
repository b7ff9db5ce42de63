//! Tests of all layers together, and of the documentation's table.

use std::fmt::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::*;

const WHOLE: &[(&str, &str)] =
    &[("FARCALL_RANK", "1"), ("FARCALL_WORLD_SIZE", "4"), ("FARCALL_STORE", "127.0.0.1:2950")];
const TORCHRUN: &[(&str, &str)] =
    &[("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "node7"), ("MASTER_PORT", "29500")];

fn settings(variables: &[(&str, &str)]) -> Result<Settings, SettingsError> {
    let pairs = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    Settings::from_variables(&pairs.collect())
}

fn options(variables: &[(&str, &str)]) -> Options {
    let options = settings(variables).and_then(|settings| settings.options());
    options.unwrap_or_else(|error| panic!("{error}"))
}

fn error(variables: &[(&str, &str)]) -> String {
    settings(variables).and_then(|settings| settings.options()).expect_err("something is wrong").to_string()
}

/// A file that is removed in the end.
struct TempFile(PathBuf);

impl TempFile {
    fn new(text: &str) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!("farcall-settings-{}-{}.toml", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, text).expect("a file");
        Self(path)
    }

    fn path(&self) -> &str {
        self.0.to_str().expect("UTF-8")
    }

    /// With this file and these variables; the file's path is taken out of the error.
    fn error(&self, variables: &[(&str, &str)]) -> String {
        error(&[&[("FARCALL_CONFIG", self.path())], variables].concat()).replace(self.path(), "FILE")
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// The origin and text of a setting.
fn entry(settings: &Settings, key: &str) -> (String, String) {
    let entry = settings.entries().iter().find(|entry| entry.setting.key == key).expect("a setting");
    (entry.origin.to_string(), entry.text.clone().unwrap_or_default())
}

#[test]
fn variables_become_options() {
    let options = options(
        &[
            WHOLE,
            &[
                ("FARCALL_NAME", "trainer"),
                ("FARCALL_HOST_STORE", "1"),
                ("FARCALL_BIND", "[::1]:0"),
                ("FARCALL_PORTS", "20000-20100"),
                ("FARCALL_DEADLINE", "400ms"),
                ("FARCALL_LIMITS_REQUEST_BYTES", "64MiB"),
                ("FARCALL_LIMITS_REQUESTS", "16"),
                ("FARCALL_HANDLERS_MAX", "8"),
            ],
        ]
        .concat(),
    );
    assert_eq!((options.rank, options.world_size, options.store.as_str()), (1, 4, "127.0.0.1:2950"));
    assert_eq!((options.name.as_deref(), options.host_store), (Some("trainer"), true));
    assert_eq!(options.bind, Some("[::1]:0".parse().expect("an address")));
    assert_eq!(options.ports, Some(20000..=20100));
    assert_eq!(options.deadline, Duration::from_millis(400));
    assert_eq!((options.limits.request_bytes_max, options.limits.requests_max), (64 << 20, 16));
    assert_eq!((options.handlers_max, options.join_timeout), (8, Duration::from_secs(60)));
}

#[test]
fn rank_0_hosts_the_store_unless_told_otherwise() {
    let hosts = |more: &[(&str, &str)]| {
        let rank_0 = [("FARCALL_RANK", "0"), ("FARCALL_WORLD_SIZE", "4"), ("FARCALL_STORE", "a:1")];
        options(&[&rank_0, more].concat()).host_store
    };
    assert!(hosts(&[]) && !hosts(&[("FARCALL_HOST_STORE", "0")]) && !options(WHOLE).host_store);
}

#[test]
fn what_is_missing_is_named_with_the_remedy() {
    for (missing, _) in WHOLE {
        let rest: Vec<_> = WHOLE.iter().copied().filter(|(name, _)| name != missing).collect();
        let error = error(&rest);
        assert!(error.starts_with(&format!("{missing}: not set; start this program with `farcall run")), "{error}");
    }
    assert!(error(&[]).starts_with("FARCALL_RANK: not set"));
    let too_high = error(&[&[("FARCALL_RANK", "4")], &WHOLE[1..]].concat());
    assert_eq!(too_high, "variable FARCALL_RANK: rank: rank 4 of 4 workers");
}

/// G1.
#[test]
fn a_variable_that_is_no_setting_is_refused_with_the_nearest_name() {
    let text = error(&[WHOLE, &[("FARCALL_TRANSPRT", "tcp")]].concat());
    let expected = "FARCALL_TRANSPRT: no setting has this variable, the nearest is `FARCALL_TRANSPORT`";
    assert!(text.starts_with(expected), "{text}");
    let text = error(&[WHOLE, &[("FARCALL_SOMETHING_ELSE_ENTIRELY", "1")]].concat());
    assert!(
        text.starts_with("FARCALL_SOMETHING_ELSE_ENTIRELY: no setting has this variable; `farcall config"),
        "{text}"
    );
    // What does not have the prefix is not looked at.
    options(&[WHOLE, &[("FARCALLS", "1"), ("XFARCALL_RANK", "x")]].concat());
}

/// A service named `farcall` or `farcall-store` makes such variables in every pod of its namespace.
#[test]
fn variables_of_kubernetes_services_are_no_settings() {
    let service = [
        ("FARCALL_SERVICE_HOST", "10.0.0.1"),
        ("FARCALL_SERVICE_PORT_RPC", "29500"),
        ("FARCALL_STORE_PORT", "tcp://10.0.0.1:29500"),
        ("FARCALL_STORE_PORT_29500_TCP_ADDR", "10.0.0.1"),
    ];
    options(&[WHOLE, &service, &[("KUBERNETES_SERVICE_HOST", "10.0.0.2")]].concat());
    assert!(error(&[WHOLE, &service].concat()).contains("no setting has this variable"));
    let wrong = [WHOLE, &[("KUBERNETES_SERVICE_HOST", "10.0.0.2"), ("FARCALL_RNAK", "1")]].concat();
    assert!(error(&wrong).starts_with("FARCALL_RNAK: "));
}

/// G1.
#[test]
fn a_wrong_value_is_named_with_what_is_expected() {
    for (variable, value, expected) in [
        ("FARCALL_RANK", "first", "a whole number"),
        ("FARCALL_RANK", "-1", "a whole number"),
        ("FARCALL_RANK", "", "a whole number"),
        ("FARCALL_HOST_STORE", "yes", "`true` or `false`"),
        ("FARCALL_BIND", "localhost", "an address and a port"),
        ("FARCALL_ADVERTISE", "host", "an address such as"),
        ("FARCALL_INTERFACE", "^", "names or beginnings of names"),
        ("FARCALL_PORTS", "5-4", "a port such as"),
        ("FARCALL_TRANSPORT", "udp", "`auto`, `tcp` or `unix`"),
        ("FARCALL_DEADLINE", "30", "a time such as"),
        ("FARCALL_LIMITS_REQUESTS", "0", "a whole number above 0"),
        ("FARCALL_LIMITS_TENSOR_BYTES", "8gigs", "a size such as"),
        ("FARCALL_STORE", "node1", "`HOST:PORT`"),
        ("FARCALL_CPU_STREAMS", "chaos", "`inline`, `threads:SEED`"),
        ("FARCALL_LOG_FORMAT", "xml", "`text` or `json`"),
    ] {
        let text = error(&[WHOLE, &[(variable, value)]].concat());
        let named = format!("variable {variable}: ");
        assert!(text.starts_with(&named) && text.contains(&format!("= {value:?}: expected {expected}")), "{text}");
    }
    let long = error(&[WHOLE, &[("FARCALL_BIND", &"x".repeat(10_000))]].concat());
    assert!(long.len() < 300, "{long}");
}

#[test]
fn a_file_is_read_where_a_variable_names_it_and_variables_count_more() {
    let file = TempFile::new(
        "# a job's settings\nname = \"trainer\"\ndeadline = \"5m\"\nports = 20000\ninterface = [\"eth\", \"ib\"]\nhost_store = true\n\n\
         [limits]\nrequests = 16\nrequest_bytes = \"1GiB\"\nlimits_of_others = 1\n",
    );
    assert!(file.error(WHOLE).starts_with("FILE:11: no setting is named `limits.limits_of_others`; "));

    let file = TempFile::new(
        &std::fs::read_to_string(&file.0).expect("a file").replace("limits_of_others = 1", "tensors = 7"),
    );
    let variables = [WHOLE, &[("FARCALL_CONFIG", file.path()), ("FARCALL_DEADLINE", "7s")]].concat();
    let settings = settings(&variables).expect("settings");
    let options = settings.options().expect("options");
    assert_eq!((options.name.as_deref(), options.deadline), (Some("trainer"), Duration::from_secs(7)));
    assert_eq!(
        (options.limits.requests_max, options.limits.request_bytes_max, options.limits.tensors_max),
        (16, 1 << 30, 7)
    );
    assert_eq!((options.host_store, options.ports), (true, Some(20000..=20000)));
    let place = |line| format!("{}:{line}", file.path());
    assert_eq!(entry(&settings, "name"), (place(2), "trainer".into()));
    assert_eq!(entry(&settings, "limits.requests"), (place(9), "16".into()));
    assert_eq!(entry(&settings, "deadline"), ("variable FARCALL_DEADLINE".into(), "7s".into()));
    assert_eq!(entry(&settings, "join_timeout"), ("default".into(), "60s".into()));
    // An empty variable names no file.
    assert_eq!(super::tests::options(&[WHOLE, &[("FARCALL_CONFIG", "")]].concat()).name, None);
}

/// G1.
#[test]
fn what_is_wrong_in_a_file_is_named_by_its_line() {
    for (text, expected) in [
        ("\n\nnmae = \"x\"", "FILE:3: no setting is named `nmae`, the nearest is `name`"),
        ("[limits]\n\nrequest = 1", "FILE:3: no setting is named `limits.request`, the nearest is `limits.requests`"),
        ("limits = 1", "FILE:1: no setting is named `limits`"),
        ("[limit]\nrequests = 1", "FILE:1: no setting is named `limit`"),
        ("rank = \"3\"", "FILE:1: rank = \"3\": expected a whole number"),
        ("rank = 3.0", "FILE:1: rank = 3.0: expected a whole number"),
        ("rank = -3", "FILE:1: rank = \"-3\": expected a whole number"),
        ("rank = 0x3", "FILE:1: rank = 0x3: expected a whole number"),
        ("\ndeadline = 30", "FILE:2: deadline = 30: expected a time such as"),
        ("deadline = \"30\"", "FILE:1: deadline = \"30\": expected a time such as"),
        ("host_store = 1", "FILE:1: host_store = 1: expected `true` or `false`"),
        ("[limits]\nrequests = 0", "FILE:2: limits.requests = \"0\": expected a whole number above 0"),
        ("name = [1]", "FILE:1: name = [1]: expected a name"),
        ("name = { a = 1 }", "FILE:1: name = { a = 1 }: expected a name"),
        ("name = \"a\"\nname = \"b\"", "FILE:2: duplicate key"),
        ("\n\nname = ", "FILE:3: "),
        ("key = \"00\"", "FILE:1: key: files of settings are shown and passed on; set FARCALL_KEY_FILE or FARCALL_KEY"),
    ] {
        let error = TempFile::new(text).error(WHOLE);
        assert!(error.starts_with(expected), "{text}: {error}");
    }
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let nowhere = error(&[WHOLE, &[("FARCALL_CONFIG", "/nowhere/farcall.toml")]].concat());
    assert!(nowhere.starts_with("cannot read the settings in /nowhere/farcall.toml: No such file"), "{nowhere}");
    let folder = error(&[WHOLE, &[("FARCALL_CONFIG", "/")]].concat());
    assert!(folder.starts_with("cannot read the settings in /: not a file"), "{folder}");
    let large = TempFile::new(&"#".repeat(FILE_BYTES_MAX as usize + 1)).error(WHOLE);
    assert!(large.starts_with("cannot read the settings in FILE: more than 1048576 bytes"), "{large}");
    let binary = TempFile::new("");
    std::fs::write(&binary.0, [0xff, 0xfe]).expect("a file");
    assert!(binary.error(WHOLE).contains("UTF-8"));
}

/// G2.
#[test]
fn a_key_is_read_from_one_place_and_shown_in_none() {
    const HEX: &str = "5ec2e75ec2e75ec2e75ec2e75ec2e75ec2e7";
    let with = |more: &[(&str, &str)]| settings(&[WHOLE, more].concat()).expect("settings");
    assert!(with(&[]).key().expect("none").is_none());
    let given = with(&[("FARCALL_KEY", HEX)]);
    assert_eq!(given.key().expect("a key").expect("a key").to_hex(), HEX);
    assert_eq!(entry(&given, "key"), ("variable FARCALL_KEY".into(), String::new()));
    assert!(!format!("{given:?} {:?}", given.options().expect("options")).contains("5ec2"));

    let file = TempFile::new(HEX);
    std::fs::set_permissions(&file.0, std::fs::Permissions::from_mode(0o600)).expect("a mode");
    let key = options(&[WHOLE, &[("FARCALL_KEY_FILE", file.path())]].concat()).key.expect("a key");
    assert_eq!(key.to_hex(), HEX);

    let both = error(&[WHOLE, &[("FARCALL_KEY", HEX), ("FARCALL_KEY_FILE", "/a")]].concat());
    assert_eq!(both, "variable FARCALL_KEY: key: `key_file` is set, too; set one of them");
    for (variable, value) in
        [("FARCALL_KEY", ""), ("FARCALL_KEY", "5ec2e7 hexadecimal"), ("FARCALL_KEY_FILE", "/nowhere/farcall-key")]
    {
        let error = error(&[WHOLE, &[(variable, value)]].concat());
        assert!(error.starts_with(&format!("variable {variable}: ")) && !error.contains("5ec2"), "{error}");
    }
}

#[test]
fn tls_needs_all_of_its_files() {
    let cert = ("FARCALL_TLS_CERT", "/nowhere/cert.pem");
    let all = "TLS needs all of FARCALL_TLS_CERT, FARCALL_TLS_KEY, FARCALL_TLS_CA";
    assert_eq!(error(&[WHOLE, &[cert]].concat()), format!("FARCALL_TLS_KEY: not set; {all}"));
    let files = [cert, ("FARCALL_TLS_KEY", "/nowhere/key.pem"), ("FARCALL_TLS_CA", "/nowhere/ca.pem")];
    // The file is missing, or TLS is not built in.
    let error = error(&[WHOLE, &files].concat());
    assert!(error.starts_with("variable FARCALL_TLS_CERT: tls_cert: "), "{error}");
}

#[test]
fn a_launcher_counts_where_no_rank_is_set() {
    let told = settings(TORCHRUN).expect("settings");
    assert_eq!(entry(&told, "rank"), ("torchrun, RANK".into(), "5".into()));
    assert_eq!(entry(&told, "world_size"), ("torchrun, WORLD_SIZE".into(), "8".into()));
    assert_eq!(entry(&told, "store"), ("torchrun, MASTER_ADDR".into(), "node7:29501".into()));
    let options = told.options().expect("options");
    assert_eq!((options.rank, options.local_rank, options.host_store), (5, Some(1), false));

    // `farcall run` within torchrun: its workers are those that count.
    let own = settings(&[WHOLE, TORCHRUN].concat()).expect("settings");
    assert_eq!((entry(&own, "rank").1, entry(&own, "store").1), ("1".into(), "127.0.0.1:2950".into()));
    assert_eq!(entry(&own, "local_rank").0, "default");
    let without = error(&[&WHOLE[..1], TORCHRUN].concat());
    assert!(without.starts_with("FARCALL_WORLD_SIZE: not set"), "{without}");

    // One's own port with the launcher's host.
    let port = settings(&[TORCHRUN, &[("FARCALL_STORE", ":7000")]].concat()).expect("settings");
    assert_eq!(entry(&port, "store"), ("variable FARCALL_STORE".into(), "node7:7000".into()));
    let nobody = error(&[WHOLE, &[("FARCALL_STORE", ":7000")]].concat());
    assert!(nobody.starts_with("variable FARCALL_STORE: store: no launcher tells the host"), "{nobody}");

    // A file counts more than the launcher.
    let file = TempFile::new("store = \"head:1\"");
    let filed = settings(&[TORCHRUN, &[("FARCALL_CONFIG", file.path())]].concat()).expect("settings");
    assert_eq!(entry(&filed, "store").1, "head:1");
}

#[test]
fn what_a_launcher_does_not_tell_is_asked_for() {
    let index = [("JOB_COMPLETION_INDEX", "3")];
    let size = error(&index);
    assert!(size.starts_with("FARCALL_WORLD_SIZE: not set; a Kubernetes indexed job does not tell how many"), "{size}");
    let store = error(&[&index[..], &[("FARCALL_WORLD_SIZE", "4")]].concat());
    assert!(
        store.starts_with("FARCALL_STORE: not set; a Kubernetes indexed job does not tell where rank 0"),
        "{store}"
    );
    let port = error(&[&index[..], &[("FARCALL_WORLD_SIZE", "4"), ("FARCALL_STORE", ":7")]].concat());
    assert!(port.starts_with("FARCALL_STORE: not set; a Kubernetes indexed job does not tell where rank 0"), "{port}");
    let complete = [&index[..], &[("FARCALL_WORLD_SIZE", "4"), ("FARCALL_STORE", "job-0.svc:7")]].concat();
    assert_eq!((options(&complete).rank, options(&complete).store), (3, "job-0.svc:7".to_owned()));
    let bad = error(&[&[("RANK", "x")], TORCHRUN].concat().into_iter().rev().collect::<Vec<_>>());
    assert!(bad.starts_with("torchrun, RANK: rank = \"x\": expected a whole number"), "{bad}");
}

#[test]
fn nccls_interface_is_a_fallback_for_jobs_on_several_hosts() {
    let nccl = ("NCCL_SOCKET_IFNAME", "=eth0");
    let interface =
        |more: &[(&str, &str)]| entry(&settings(&[TORCHRUN, more].concat()).expect("settings"), "interface");
    assert_eq!(interface(&[nccl]), ("NCCL, NCCL_SOCKET_IFNAME".into(), "=eth0".into()));
    assert_eq!(interface(&[nccl, ("FARCALL_INTERFACE", "ib0")]).1, "ib0");
    assert_eq!(interface(&[nccl, ("FARCALL_BIND", "10.0.0.1:0")]), ("default".into(), String::new()));
    for store in ["127.0.0.1:1", "localhost:1", "[::1]:1"] {
        assert_eq!(interface(&[nccl, ("FARCALL_STORE", store)]).1, "", "{store}");
    }
    let both = error(&[TORCHRUN, &[("FARCALL_INTERFACE", "ib0"), ("FARCALL_BIND", "10.0.0.1:0")]].concat());
    assert_eq!(both, "variable FARCALL_BIND: bind: `interface` is set, too; set one of them");
    let ports = error(&[TORCHRUN, &[("FARCALL_PORTS", "1-2"), ("FARCALL_BIND", "10.0.0.1:7")]].concat());
    assert!(ports.starts_with("variable FARCALL_PORTS: ports: `bind` is set, too"), "{ports}");
}

#[test]
fn of_settings_that_exclude_each_other_the_later_layer_counts() {
    let file = TempFile::new("interface = \"ib0\"\nports = \"1-2\"\nkey_file = \"/nowhere/farcall-key\"\n");
    let config = ("FARCALL_CONFIG", file.path());
    let key = ("FARCALL_KEY", "00112233445566778899aabbccddeeff");
    let settings = settings(&[WHOLE, &[config, key, ("FARCALL_BIND", "10.0.0.1:7")]].concat()).expect("settings");
    for unset in ["interface", "ports", "key_file"] {
        assert_eq!(entry(&settings, unset), ("default".into(), String::new()), "{unset}");
    }
    let options = settings.options().expect("options");
    assert_eq!((options.interface, options.ports, options.key.is_some()), (None, None, true));
    assert_eq!(options.bind, Some("10.0.0.1:7".parse().expect("an address")));
    let any = super::tests::options(&[WHOLE, &[config, key, ("FARCALL_BIND", "10.0.0.1:0")]].concat());
    assert_eq!(any.ports, Some(1..=2), "the port is not the address");
    let file = TempFile::new("interface = \"ib0\"\n\nbind = \"[::1]:0\"\n");
    assert_eq!(file.error(WHOLE), "FILE:3: bind: `interface` is set, too; set one of them");
}

#[test]
fn devices_of_a_file_are_those_of_the_device_runtime() {
    let file = TempFile::new("devices = \"emulated:2\"\nidle_bytes = \"1GiB\"\n");
    let variables =
        [WHOLE, &[("FARCALL_CONFIG", file.path()), ("FARCALL_CHECK", "report"), ("FARCALL_DEVICES", "")]].concat();
    let config = settings(&variables).expect("settings").device().expect("a configuration");
    assert_eq!((config.emulated_devices, config.idle_bytes_max), (2, Some(1 << 30)));
    assert_eq!(config.check, farcall_device::Check::Report);
}

#[test]
fn a_file_is_checked_alone() {
    let file = TempFile::new("name = \"a\"\n");
    assert_eq!(entry(&Settings::from_file(&file.0).expect("settings"), "name").1, "a");
    let file = TempFile::new("mane = \"a\"\n");
    assert!(Settings::from_file(&file.0).is_err());
}

const BEGIN: &str =
    "<!-- table: made from crates/rpc/src/settings/table.rs; WRITE_DOCS=1 cargo test -p farcall-rpc settings -->\n";
const END: &str = "<!-- end of table -->\n";

/// The documentation shows the table as it is.
#[test]
fn the_documentation_has_every_setting() {
    let mut table = String::from("| key | variable | value | default | meaning |\n|---|---|---|---|---|\n");
    for Setting { key, variable, kind, default, meaning, .. } in SETTINGS {
        let default = if default.is_empty() { String::new() } else { format!("`{default}`") };
        let _ = writeln!(table, "| `{key}` | `{variable}` | {kind} | {default} | {meaning} |");
    }
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../farcall/docs/settings.md");
    let page = std::fs::read_to_string(&path).expect("the page");
    let (before, rest) = page.split_once(BEGIN).expect("the table's beginning");
    let (shown, after) = rest.split_once(END).expect("the table's end");
    if std::env::var_os("WRITE_DOCS").is_some() {
        std::fs::write(&path, [before, BEGIN, &table, END, after].concat()).expect("the page is written");
    } else {
        assert!(shown == table, "{} is older than the table of settings: WRITE_DOCS=1 writes it", path.display());
    }
}
