//! What is known of each call, from outside, and what must hold of it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use farcall_rpc::CallError;
use farcall_transport::{CloseCause, ProtocolError};

use crate::plan::{Fault, FaultKind};

/// What the network and the processes may add to a bound, drifting clocks aside.
const SLACK: Duration = Duration::from_millis(600);
/// A lost peer is noticed by then.
const NOTICED: Duration = Duration::from_millis(2_000);
/// By how much a clock may be off, of a thousand.
const DRIFT_PER_MILLE: u32 = 11;

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) enum Outcome {
    Value {
        right: bool,
    },
    Error(CallError),
    /// The reply was dropped, or nobody waits for it.
    Dropped,
}

pub(crate) struct Record {
    pub(crate) what: &'static str,
    pub(crate) caller: u32,
    pub(crate) callee: u32,
    /// The caller's life.
    pub(crate) process: usize,
    pub(crate) issued: Duration,
    pub(crate) deadline: Duration,
    /// The tokens of the calls that it makes on its way.
    pub(crate) inner: Vec<u64>,
    /// It is to give an error of its own.
    pub(crate) fails: bool,
    pub(crate) after_healing: bool,
    pub(crate) runs: u32,
    pub(crate) outcome: Option<(Duration, Outcome)>,
}

/// See the module. Tokens are indices.
#[derive(Default)]
pub(crate) struct Model {
    pub(crate) calls: Vec<Record>,
    /// For the trace.
    pub(crate) log: Vec<String>,
    pub(crate) violations: Vec<String>,
}

impl Model {
    pub(crate) fn add(&mut self, record: Record) -> u64 {
        self.calls.push(record);
        self.calls.len() as u64 - 1
    }

    pub(crate) fn runs(&mut self, token: u64, rank: u32) {
        self.log.push(format!("call {token} runs on w{rank}"));
        let Some(record) = self.calls.get_mut(token as usize) else {
            return self.violations.push(format!("w{rank} was given a call {token} that nobody made"));
        };
        record.runs += 1;
        if record.runs > 1 || record.callee != rank {
            let (runs, callee) = (record.runs, record.callee);
            self.violations.push(format!("ONCE: call {token} to w{callee} ran on w{rank}, for the {runs}th time"));
        }
    }

    pub(crate) fn resolve(&mut self, token: u64, at: Duration, outcome: Outcome) {
        let text = match &outcome {
            Outcome::Value { right } => format!("a value, right: {right}"),
            Outcome::Error(error) => error.to_string(),
            Outcome::Dropped => "dropped".to_owned(),
        };
        self.log.push(format!("call {token} gives {text}"));
        let Some(record) = self.calls.get_mut(token as usize) else { return };
        if record.outcome.replace((at, outcome)).is_some() {
            self.violations.push(format!("call {token} has two outcomes"));
        }
    }

    /// Calls of processes that live which have no outcome.
    pub(crate) fn pending(&self, alive: impl Fn(usize) -> bool) -> usize {
        self.calls.iter().filter(|record| record.outcome.is_none() && alive(record.process)).count()
    }

    /// Looks at every call. `alive` is of processes.
    pub(crate) fn check(&self, faults: &[Fault], alive: impl Fn(usize) -> bool) -> Vec<String> {
        let mut violations = self.violations.clone();
        for (token, record) in self.calls.iter().enumerate() {
            if let Err(violation) = self.check_call(record, faults, &alive) {
                let Record { what, caller, callee, issued, .. } = record;
                violations.push(format!("call {token} ({what}, w{caller} to w{callee}, at {issued:?}): {violation}"));
            }
        }
        violations
    }

    fn check_call(&self, record: &Record, faults: &[Fault], alive: &impl Fn(usize) -> bool) -> Result<(), String> {
        let Some((at, outcome)) = &record.outcome else {
            let lives = alive(record.process) && record.deadline > Duration::ZERO;
            return if lives { Err("BOUNDED: it has no outcome".to_owned()) } else { Ok(()) };
        };
        if *at > bound(record, faults) {
            return Err(format!("BOUNDED: its outcome came at {at:?}, its deadline is {:?}", record.deadline));
        }
        let error = match outcome {
            Outcome::Dropped => return Ok(()),
            Outcome::Value { right: false } => return Err("its value is wrong".to_owned()),
            Outcome::Value { right: true } => {
                let inner = record.inner.iter().map(|token| self.calls[*token as usize].runs);
                let ran: Vec<u32> = std::iter::once(record.runs).chain(inner).collect();
                return if ran.iter().all(|runs| *runs == 1) && !record.fails {
                    Ok(())
                } else {
                    Err(format!("ONCE: it gave a value and ran {ran:?} times"))
                };
            }
            Outcome::Error(error) => error,
        };
        if record.after_healing {
            return Err(format!("once all is healed: {error}"));
        }
        if let Some(late) = noticed_late(record, *at, faults) {
            return Err(format!("BOUNDED: {late}; its outcome came at {at:?}: {error}"));
        }
        self.check_error(record, *at, error, faults)
    }

    /// The error is one that what was done can cause.
    fn check_error(&self, record: &Record, at: Duration, error: &CallError, faults: &[Fault]) -> Result<(), String> {
        let (caller, callee) = (record.caller, record.callee);
        let fits = match error {
            CallError::PeerLost { cause, .. } => fits(cause, caller, callee, at, faults),
            // The time of a call that would take 20 s is never up: what is broken ends it before, or is healed.
            CallError::Deadline { .. } => {
                let early = record.deadline - record.deadline * DRIFT_PER_MILLE / 1000;
                let leapt = |fault: &&Fault| matches!(fault.kind, FaultKind::Leap(_));
                let leaps = faults.iter().any(|fault| leapt(&fault) && fault.machine == caller);
                record.deadline < Duration::from_secs(10) && (leaps || at >= record.issued + early)
            }
            CallError::Remote { .. } if record.fails => record.runs == 1,
            // A relay's, because the next hop failed.
            CallError::Remote { .. } => !record.inner.is_empty(),
            _ => false,
        };
        if fits { Ok(()) } else { Err(format!("nothing that was done explains, at {at:?}: {error}")) }
    }
}

/// When the call must have its outcome: by its deadline, on its caller's clock, while its caller runs.
fn bound(record: &Record, faults: &[Fault]) -> Duration {
    let slow = record.deadline * DRIFT_PER_MILLE / 1000;
    let mut bound = record.issued + record.deadline + slow;
    for fault in faults {
        let stops = fault.kind == FaultKind::Stop && fault.machine == record.caller;
        // Stopped between the timer and the waiter's turn, too.
        if stops && fault.from <= bound + SLACK && record.issued <= fault.until {
            bound = bound.max(fault.until);
        }
    }
    bound + SLACK
}

/// The callee, another worker, was lost for long, and nothing else happened to the two: the caller must have noticed in time.
fn noticed_late(record: &Record, at: Duration, faults: &[Fault]) -> Option<String> {
    let (caller, callee) = (record.caller, record.callee);
    let within = NOTICED + NOTICED * DRIFT_PER_MILLE / 1000 + SLACK;
    let mut touching = faults.iter().filter(|fault| fault.touches(caller, callee));
    let (Some(lost), None) = (touching.next(), touching.next()) else { return None };
    if caller == callee {
        return None;
    }
    let since = lost.from.max(record.issued);
    let lasts = since < at && lost.until >= since + within;
    let within = match lost.kind {
        // It is gone for good; another life begins with other connections.
        FaultKind::Kill { with_machine } if lost.machine == callee && record.issued < lost.from && lost.from < at => {
            if with_machine {
                within
            } else {
                SLACK
            }
        }
        FaultKind::Kill { .. } | FaultKind::Stop if lost.machine == callee && lasts => within,
        FaultKind::Cut { .. } if lasts => within,
        _ => return None,
    };
    (at > since + within).then(|| format!("its callee was lost at {:?} ({})", lost.from, lost.kind.name()))
}

/// Whether something was done to the two, lately enough, that can end their connection with that cause.
pub(crate) fn fits(cause: &CloseCause, one: u32, other: u32, at: Duration, faults: &[Fault]) -> bool {
    // What is cut off is missed only after a while, a connect that does not come about, too.
    let lately = NOTICED + SLACK;
    // Who was stopped itself, or busy, meets what it missed when it goes on.
    let hindered = |fault: &&Fault| {
        let held_up = matches!(fault.kind, FaultKind::Stop | FaultKind::Busy) && fault.machine == one;
        held_up && fault.from <= at && at <= fault.until + lately
    };
    let since = faults.iter().filter(hindered).map(|fault| fault.from).min().unwrap_or(at);
    let any = |kinds: fn(FaultKind) -> bool| {
        let in_time = |fault: &Fault| fault.from <= at && since <= fault.until + lately;
        faults.iter().any(|fault| kinds(fault.kind) && fault.touches(one, other) && in_time(fault))
    };
    let silences =
        |kind| matches!(kind, FaultKind::Stop | FaultKind::Cut { .. } | FaultKind::Kill { with_machine: true });
    let delays = |kind| silences_or_leaps(kind);
    let ends = |kind| !matches!(kind, FaultKind::Busy | FaultKind::Leap(_));
    match cause {
        CloseCause::Silent { .. } => any(silences),
        CloseCause::PeerLost { .. } => any(ends),
        // Whenever the two next meet.
        CloseCause::Replaced { .. } => faults
            .iter()
            .any(|fault| matches!(fault.kind, FaultKind::Kill { .. }) && fault.machine == other && fault.until <= at),
        CloseCause::Connect { .. } => any(|kind| matches!(kind, FaultKind::Kill { .. } | FaultKind::Reset { .. })),
        CloseCause::ConnectTimeout { .. } => any(delays),
        CloseCause::Protocol(ProtocolError::TruncatedFrame { .. } | ProtocolError::UnknownBulkKey) => any(ends),
        CloseCause::Protocol(ProtocolError::Stalled { .. }) => any(delays),
        CloseCause::Refused { text } => {
            let silent = text.starts_with("nothing was heard") && any(silences);
            let stalled = text.starts_with("no complete") && any(delays);
            let unknown = (text.contains("unknown key") || text.contains("the bulk connection")) && any(ends);
            silent || stalled || unknown
        }
        _ => false,
    }
}

fn silences_or_leaps(kind: FaultKind) -> bool {
    matches!(
        kind,
        FaultKind::Stop | FaultKind::Cut { .. } | FaultKind::Kill { with_machine: true } | FaultKind::Leap(_)
    )
}

/// The log since it was last taken.
pub(crate) fn take_log(model: &Arc<Mutex<Model>>) -> Vec<String> {
    std::mem::take(&mut lock(model).log)
}
