//! What the driver is like, from the environment, read once.

use std::sync::OnceLock;

/// Devices, versions and faults.
#[derive(Debug)]
pub struct Settings {
    /// `FAKE_CUDA_DEVICES`: how many there are. Default 2.
    pub devices: i32,
    /// `FAKE_CUDA_VERSION`: as the driver counts. Default 13000.
    pub version: i32,
    /// `FAKE_CUDA_INIT`: the status of every call before there is a device. 100 is a machine without one, 34 the toolkit's stub.
    pub init: u32,
    /// `FAKE_CUDA_MEMORY_BYTES`: of each device. Default 1 GiB.
    pub memory_bytes: usize,
    /// `FAKE_CUDA_FAULT_AFTER`: so many operations of the first device run, then it has accessed an illegal address.
    pub fault_after: Option<u64>,
    /// `FAKE_CUDA_SEED`: of the pauses that streams make between operations. Default 1; 0 for none.
    pub seed: u64,
    /// `FAKE_CUDA_IGNORE_WAITS`: if set, streams do not wait for events. A test of order that passes then tests nothing.
    pub ignore_waits: bool,
    /// `FAKE_CUDA_REFUSE`: `call=status`, separated by commas: those calls always answer so.
    pub refused: Vec<(String, u32)>,
}

impl Settings {
    /// Those of this process.
    pub fn of_process() -> &'static Self {
        static SETTINGS: OnceLock<Settings> = OnceLock::new();
        SETTINGS.get_or_init(|| Self {
            devices: number("DEVICES").unwrap_or(2),
            version: number("VERSION").unwrap_or(13_000),
            init: number("INIT").unwrap_or(0),
            memory_bytes: number("MEMORY_BYTES").unwrap_or(1 << 30),
            fault_after: number("FAULT_AFTER"),
            seed: number("SEED").unwrap_or(1),
            ignore_waits: std::env::var_os("FAKE_CUDA_IGNORE_WAITS").is_some(),
            refused: refused(&std::env::var("FAKE_CUDA_REFUSE").unwrap_or_default()),
        })
    }
}

/// # Panics
/// If the variable is set to something else than a number: the test that did so means another.
fn number<T: std::str::FromStr>(name: &str) -> Option<T> {
    let text = std::env::var(format!("FAKE_CUDA_{name}")).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("FAKE_CUDA_{name}={text} is no number")))
}

fn refused(text: &str) -> Vec<(String, u32)> {
    let parse = |entry: &str| {
        let (call, status) = entry.split_once('=').unwrap_or_else(|| panic!("FAKE_CUDA_REFUSE has {entry}"));
        let status = status.parse().unwrap_or_else(|_| panic!("FAKE_CUDA_REFUSE has {entry}"));
        (call.to_owned(), status)
    };
    text.split(',').filter(|entry| !entry.is_empty()).map(parse).collect()
}
