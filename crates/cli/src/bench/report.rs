//! What a bench found: the data that all formats are made of, and the messages between its processes.

use std::fs;

use serde::{Deserialize, Serialize};

use super::plan::{Memory, Op};

/// The name and version of the JSON format. A field may be added to a version; what changes in meaning makes a new one.
pub(crate) const SCHEMA: &str = "farcall-bench/1";

/// A whole run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) schema: String,
    /// farcall's version.
    pub(crate) version: String,
    /// As it was started.
    pub(crate) command: String,
    /// Seconds since 1970.
    pub(crate) started_at: u64,
    /// `false` if it was interrupted or failed: rows are missing.
    pub(crate) complete: bool,
    pub(crate) machine: Machine,
    pub(crate) memory: Memory,
    pub(crate) device: String,
    pub(crate) workers: u32,
    pub(crate) rows: Vec<Row>,
}

/// One line of the table: all calls of an operation with one size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Row {
    pub(crate) op: Op,
    pub(crate) size_bytes: u64,
    /// Calls in flight.
    pub(crate) outstanding: u32,
    /// The library's name of the way that the bytes took.
    pub(crate) path: String,
    /// Calls that were measured.
    pub(crate) calls: u64,
    pub(crate) min_us: f64,
    pub(crate) p50_us: f64,
    /// With fewer than 100 calls it would be the slowest of them.
    pub(crate) p99_us: Option<f64>,
    /// The same with fewer than 1,000.
    pub(crate) p999_us: Option<f64>,
    pub(crate) max_us: f64,
    pub(crate) mean_us: f64,
    /// Of all calls, in the time of all of them.
    pub(crate) calls_per_s: f64,
    /// Payload, both ways, in the time of all calls; 10⁹ bytes. Of operations with tensors.
    pub(crate) gb_per_s: Option<f64>,
    /// Bytes, and answers, that were not as expected; `None` if the data was not checked.
    pub(crate) wrong: Option<u64>,
}

/// Where the measuring process ran.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Machine {
    pub(crate) host: String,
    pub(crate) processor: String,
    pub(crate) processors: usize,
    pub(crate) memory_bytes: u64,
    pub(crate) system: String,
}

impl Machine {
    /// This one. What it does not tell is empty.
    pub(crate) fn this() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name));
            line.and_then(|line| line.split_once(':')).map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
        };
        let kernel = |name: &str| read(&format!("/proc/sys/kernel/{name}")).trim().to_owned();
        let kib = field(&read("/proc/meminfo"), "MemTotal").trim_end_matches(" kB").parse::<u64>().unwrap_or(0);
        Self {
            host: kernel("hostname"),
            processor: field(&read("/proc/cpuinfo"), "model name"),
            processors: std::thread::available_parallelism().map_or(0, Into::into),
            memory_bytes: kib << 10,
            system: format!("{} {} {}", kernel("ostype"), kernel("osrelease"), std::env::consts::ARCH),
        }
    }
}

/// A line on the measuring process's output.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Event {
    /// It begins with a cell, the one of this number of all.
    Begins { cell: usize, cells: usize, op: Op, size_bytes: u64 },
    /// It has measured a cell.
    Row(Row),
    /// The required path was not taken.
    Unmet { required: String, path: String },
    /// It cannot go on.
    Failed { message: String },
    /// All was measured.
    Complete,
}
