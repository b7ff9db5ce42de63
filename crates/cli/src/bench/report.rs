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
    /// The other host, as it was named, if there is one.
    #[serde(default)]
    pub(crate) target: Option<String>,
    /// What the first of the called workers runs on.
    #[serde(default)]
    pub(crate) peer: Option<Machine>,
    /// Fresh groups of processes that each figure is the median of.
    pub(crate) runs: u32,
    pub(crate) rows: Vec<Row>,
    /// What the machine can do without farcall, if it was asked for.
    #[serde(default)]
    pub(crate) limits: Vec<Limit>,
    /// Limits that could not be measured, and why.
    #[serde(default)]
    pub(crate) limits_skipped: Vec<(String, String)>,
}

impl Report {
    /// Bytes and answers that were not as expected.
    pub(crate) fn wrong(&self) -> u64 {
        self.rows.iter().filter_map(|row| row.wrong).sum()
    }
}

/// A physical limit: the median time of one round.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Limit {
    pub(crate) name: String,
    pub(crate) size_bytes: u64,
    pub(crate) p50_us: f64,
    /// Of those that move bytes.
    pub(crate) gb_per_s: Option<f64>,
}

/// The limit of a row, measured right before it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct RowLimit {
    /// Those that it consists of.
    pub(crate) name: String,
    pub(crate) p50_us: f64,
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
    /// If limits were asked for and there is one.
    #[serde(default)]
    pub(crate) limit: Option<RowLimit>,
    /// How many times its limit it takes: of several runs, the median of their ratios.
    #[serde(default)]
    pub(crate) ratio: Option<f64>,
    /// `p50_us` of each run.
    pub(crate) runs_p50_us: Vec<f64>,
}

impl Row {
    /// What tells it from other rows of a report.
    pub(crate) fn key(&self) -> (Op, u64, u32) {
        (self.op, self.size_bytes, self.outstanding)
    }

    /// The row with its limit.
    pub(crate) fn with_limit(self, limit: Option<RowLimit>) -> Self {
        let ratio = limit.as_ref().map(|limit| self.p50_us / limit.p50_us);
        Self { limit, ratio, ..self }
    }

    /// The slowest run's median by the fastest's.
    pub(crate) fn spread(&self) -> f64 {
        let fold = |pick: fn(f64, f64) -> f64| self.runs_p50_us.iter().copied().reduce(pick).unwrap_or(1.0);
        fold(f64::max) / fold(f64::min)
    }

    /// Of the same row of several runs, the median of each figure; of wrong answers and calls, all.
    pub(crate) fn median(runs: &[Self]) -> Option<Self> {
        let mut row = runs.first()?.clone();
        let of = |figure: fn(&Self) -> f64| median(runs.iter().map(figure).collect());
        let of_some = |figure: fn(&Self) -> Option<f64>| {
            let figures: Option<Vec<f64>> = runs.iter().map(figure).collect();
            figures.map(median)
        };
        row.calls = runs.iter().map(|run| run.calls).sum();
        row.min_us = of(|run| run.min_us);
        row.p50_us = of(|run| run.p50_us);
        row.p99_us = of_some(|run| run.p99_us);
        row.p999_us = of_some(|run| run.p999_us);
        row.max_us = of(|run| run.max_us);
        row.mean_us = of(|run| run.mean_us);
        row.calls_per_s = of(|run| run.calls_per_s);
        row.gb_per_s = of_some(|run| run.gb_per_s);
        row.wrong = runs.iter().map(|run| run.wrong).sum();
        let us = of_some(|run| run.limit.as_ref().map(|limit| limit.p50_us));
        row.limit = row.limit.zip(us).map(|(limit, p50_us)| RowLimit { p50_us, ..limit });
        row.ratio = of_some(|run| run.ratio);
        row.runs_p50_us = runs.iter().map(|run| run.p50_us).collect();
        Some(row)
    }
}

/// The rows of several runs as one: in the order of the first run that has them.
pub(crate) fn merge(runs: &[Vec<Row>]) -> Vec<Row> {
    let mut groups: Vec<Vec<Row>> = Vec::new();
    for row in runs.iter().flatten() {
        match groups.iter_mut().find(|group| group[0].key() == row.key()) {
            Some(group) => group.push(row.clone()),
            None => groups.push(vec![row.clone()]),
        }
    }
    groups.iter().filter_map(|group| Row::median(group)).collect()
}

/// The middle one; of an even number, the mean of the two in the middle.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match (values.len(), values.len() / 2) {
        (0, _) => 0.0,
        (len, middle) if len % 2 == 1 => values[middle],
        (_, middle) => f64::midpoint(values[middle - 1], values[middle]),
    }
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
    /// What the first of the called workers runs on.
    Peer(Machine),
    /// It begins with a cell, the one of this number of all.
    Begins { cell: usize, cells: usize, op: Op, size_bytes: u64 },
    /// It has measured a cell.
    Row(Box<Row>),
    /// It has measured the limits, but for some.
    Limits { limits: Vec<Limit>, skipped: Vec<(String, String)> },
    /// The required path was not taken.
    Unmet { required: String, path: String },
    /// It cannot go on.
    Failed { message: String },
    /// All was measured.
    Complete,
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn row(p50_us: f64) -> Row {
        Row {
            op: Op::Sink,
            size_bytes: 8,
            outstanding: 1,
            path: "tcp".to_owned(),
            calls: 10,
            min_us: 1.0,
            p50_us,
            p99_us: None,
            p999_us: None,
            max_us: 9.0,
            mean_us: p50_us,
            calls_per_s: 1e6 / p50_us,
            gb_per_s: Some(1.0),
            wrong: Some(1),
            limit: Some(RowLimit { name: "raw tcp".to_owned(), p50_us: 2.0 }),
            ratio: Some(p50_us / 2.0),
            runs_p50_us: vec![p50_us],
        }
    }

    pub(crate) fn report(rows: Vec<Row>) -> Report {
        Report {
            schema: SCHEMA.to_owned(),
            version: "0".to_owned(),
            command: "farcall bench".to_owned(),
            started_at: 0,
            complete: true,
            machine: Machine::this(),
            memory: Memory::Slab,
            device: "host".to_owned(),
            workers: 2,
            target: None,
            peer: None,
            runs: 1,
            rows,
            limits: Vec::new(),
            limits_skipped: Vec::new(),
        }
    }

    #[test]
    fn several_runs_become_their_medians() {
        let mut runs = [4.0, 2.0, 8.0].map(row);
        runs[1].p99_us = Some(5.0);
        let row = Row::median(&runs).expect("three runs");
        assert_eq!((row.p50_us, row.mean_us, row.calls, row.wrong), (4.0, 4.0, 30, Some(3)));
        assert_eq!(row.p99_us, None, "not every run has one");
        assert_eq!((row.ratio, row.spread()), (Some(2.0), 4.0));
        runs[2].wrong = None;
        assert_eq!(Row::median(&runs).expect("three runs").wrong, None, "one was not checked");
        assert!(Row::median(&[]).is_none());
        assert_eq!(median(vec![1.0, 2.0]), 1.5);
    }
}
