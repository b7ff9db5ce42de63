//! What a seed decides: the group, the network, the calls and the faults, and when.

use std::time::Duration;

use farcall_transport::Limits;
use farcall_transport::sim::{Conditions, Random};

/// How long calls are made and faults done.
pub(crate) const ACTIVE: Duration = Duration::from_secs(6);

pub(crate) struct Plan {
    pub(crate) workers: u32,
    pub(crate) conditions: Conditions,
    pub(crate) limits: Limits,
    /// The workers have a job key.
    pub(crate) key: bool,
    /// The clocks' drifts, of a million.
    pub(crate) drifts_ppm: Vec<i64>,
    /// In order of time.
    pub(crate) calls: Vec<(Duration, PlannedCall)>,
    pub(crate) faults: Vec<Fault>,
}

#[derive(Clone, Debug)]
pub(crate) struct PlannedCall {
    pub(crate) caller: u32,
    pub(crate) callee: u32,
    pub(crate) what: What,
    pub(crate) deadline: Duration,
    pub(crate) waiter: Waiter,
}

#[derive(Clone, Debug)]
pub(crate) enum What {
    Echo,
    Work,
    Fail,
    Nap(Duration),
    /// The ranks after the callee.
    Relay(Vec<u32>),
    /// Numbers in the tensor.
    Shift(usize),
}

/// What becomes of the reply.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Waiter {
    Stays,
    DropsAfter(Duration),
    Detaches,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FaultKind {
    /// The process dies, with its machine or alone. `until`: another life begins.
    Kill {
        with_machine: bool,
    },
    Stop,
    Busy,
    Leap(Duration),
    /// Nothing gets from the machine to the other.
    Cut {
        to: u32,
        both: bool,
    },
    Reset {
        other: u32,
    },
}

impl FaultKind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Kill { with_machine: false } => "process killed, restarted",
            Self::Kill { with_machine: true } => "machine lost, restarted",
            Self::Stop => "process stopped, continued",
            Self::Busy => "threads busy",
            Self::Leap(_) => "clock leapt",
            Self::Cut { both: false, .. } => "cut one way, healed",
            Self::Cut { both: true, .. } => "cut both ways, healed",
            Self::Reset { .. } => "connections reset",
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    pub(crate) machine: u32,
    pub(crate) kind: FaultKind,
    pub(crate) from: Duration,
    pub(crate) until: Duration,
}

impl Fault {
    /// Whether it keeps one of the two from the other, or from itself.
    pub(crate) fn touches(&self, one: u32, other: u32) -> bool {
        match self.kind {
            FaultKind::Cut { to, .. } | FaultKind::Reset { other: to } => {
                (self.machine, to) == (one, other) || (self.machine, to) == (other, one)
            }
            _ => self.machine == one || self.machine == other,
        }
    }
}

impl Plan {
    pub(crate) fn of(seed: u64) -> Self {
        let random = &mut Random::new(seed ^ 0x5eed_f00d);
        let workers = random.between(3, 6) as u32;
        let drifts_ppm = (0..workers).map(|_| random.between(0, 20_000) as i64 - 10_000).collect();
        Self {
            workers,
            conditions: conditions(random),
            limits: limits(random),
            key: random.per_mille(300),
            drifts_ppm,
            calls: calls(random, workers),
            faults: faults(random, workers),
        }
    }
}

fn micros(random: &mut Random, least: u64, most: u64) -> Duration {
    Duration::from_micros(random.between(least, most))
}

fn millis(random: &mut Random, least: u64, most: u64) -> Duration {
    micros(random, least * 1000, most * 1000)
}

fn conditions(random: &mut Random) -> Conditions {
    let latency = Duration::from_micros(*random.pick(&[5, 50, 500, 5_000]));
    Conditions {
        latency,
        jitter: latency * *random.pick(&[0, 1, 4]),
        late_per_mille: *random.pick(&[0, 0, 2, 20]),
        late_by: Duration::from_millis(200),
        wake: Duration::from_micros(*random.pick(&[1, 20, 1_000])),
        job: Duration::from_micros(*random.pick(&[1, 50, 3_000])),
        capacity_bytes: *random.pick(&[4 << 10, 16 << 10, 256 << 10]),
        lose_per_mille: *random.pick(&[0, 50, 300]),
        double_per_mille: *random.pick(&[0, 100]),
    }
}

fn limits(random: &mut Random) -> Limits {
    Limits {
        inline_bytes_max: *random.pick(&[0, 256, 2 << 10]),
        chunk_bytes_max: *random.pick(&[300, 4 << 10]),
        requests_max: *random.pick(&[1, 4, 16]),
        request_bytes_max: *random.pick(&[20 << 10, 64 << 10]),
        backlog_bytes_max: *random.pick(&[2 << 10, 64 << 10]),
        ..Limits::default()
    }
}

fn calls(random: &mut Random, workers: u32) -> Vec<(Duration, PlannedCall)> {
    let mut calls = Vec::new();
    for _ in 0..random.between(60, 120) {
        let at = micros(random, 0, ACTIVE.as_micros() as u64);
        let (caller, callee) = pair(random, workers);
        calls.push((at, call(random, workers, caller, callee)));
    }
    // More at once than a window takes.
    for _ in 0..random.between(1, 3) {
        let at = micros(random, 0, ACTIVE.as_micros() as u64);
        let (caller, callee) = pair(random, workers);
        for _ in 0..random.between(10, 40) {
            let after = micros(random, 0, 2_000);
            calls.push((at + after, call(random, workers, caller, callee)));
        }
    }
    calls.sort_by_key(|(at, _)| *at);
    calls
}

/// Mostly of two workers; now and then a worker calls itself.
fn pair(random: &mut Random, workers: u32) -> (u32, u32) {
    let caller = random.below(u64::from(workers)) as u32;
    let other = (caller + 1 + random.below(u64::from(workers) - 1) as u32) % workers;
    (caller, if random.per_mille(30) { caller } else { other })
}

fn call(random: &mut Random, workers: u32, caller: u32, callee: u32) -> PlannedCall {
    let what = match random.below(10) {
        0 | 1 => What::Echo,
        2 | 3 => What::Work,
        4 => What::Fail,
        5 | 6 => What::Nap(micros(random, 1, 150_000)),
        // Upwards only: calls that come back to a window which is full of those that wait for them wait for ever.
        7 => What::Relay((callee + 1..workers).filter(|_| random.per_mille(600)).collect()),
        // Up to 16 KiB: less than any limit on bytes.
        _ => {
            let most = *random.pick(&[8, 600, 4_000]);
            What::Shift(random.between(0, most) as usize)
        }
    };
    let deadline = match random.below(10) {
        0 => micros(random, 0, 1_000),
        1 => millis(random, 1, 60),
        2 => millis(random, 60, 2_000),
        _ => Duration::from_secs(20),
    };
    let waiter = match random.below(10) {
        0 => Waiter::DropsAfter(Duration::ZERO),
        1 => Waiter::DropsAfter(micros(random, 1, 100_000)),
        2 => Waiter::Detaches,
        _ => Waiter::Stays,
    };
    PlannedCall { caller, callee, what, deadline, waiter }
}

/// At most one fault of a process to each machine, and a few of the network.
fn faults(random: &mut Random, workers: u32) -> Vec<Fault> {
    let mut faults = Vec::new();
    let mut add = |random: &mut Random, machine, kind, lasts: Duration| {
        let from = millis(random, 200, 4_500);
        faults.push(Fault { machine, kind, from, until: (from + lasts).min(ACTIVE) });
    };
    for machine in 0..workers {
        match random.below(12) {
            0 | 1 => {
                let lasts = millis(random, 1, 3_500);
                let with_machine = random.per_mille(400);
                add(random, machine, FaultKind::Kill { with_machine }, lasts);
            }
            2 => {
                let lasts = millis(random, 10, 4_000);
                add(random, machine, FaultKind::Stop, lasts);
            }
            3 => {
                let lasts = millis(random, 10, 3_000);
                add(random, machine, FaultKind::Busy, lasts);
            }
            4 => {
                let by = millis(random, 1, 1_000);
                add(random, machine, FaultKind::Leap(by), Duration::ZERO);
            }
            _ => {}
        }
    }
    for _ in 0..random.below(3) {
        let (machine, to) = loop {
            let (one, other) = pair(random, workers);
            if one != other {
                break (one, other);
            }
        };
        let lasts = millis(random, 10, 4_000);
        match random.below(3) {
            0 => add(random, machine, FaultKind::Reset { other: to }, Duration::ZERO),
            both => add(random, machine, FaultKind::Cut { to, both: both == 1 }, lasts),
        }
    }
    faults
}
