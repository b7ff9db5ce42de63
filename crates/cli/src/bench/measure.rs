//! The process that measures: makes the calls, times them, and says what it found, a line of JSON each.
//!
//! Invariant M1: nothing but the call is timed: data is checked between the calls, and in calls of their own.
//! Invariant M2: it ends soon after it is told to, or its launcher is gone; what was measured by then has been said.

use std::collections::VecDeque;
use std::io::BufRead;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use farcall::prelude::*;
use farcall::settings::Settings;
use farcall::{Channel, Reply, Runtime, TensorMut};
use hdrhistogram::Histogram;

use super::functions::{self, Pattern, on_host};
use super::limits::Limits;
use super::plan::{Memory, Op, Plan, device};
use super::report::{Event, Machine, Row};
use crate::Failure;

/// Without `-n`: until both are reached, or the last.
const TIME_MIN: Duration = Duration::from_millis(400);
const CALLS_MIN: u64 = 20;
const CALLS_MAX: u64 = 100_000;
/// Without `-w`: the same.
const WARMUP_MIN: Duration = Duration::from_millis(100);
const WARMUP_CALLS_MIN: u64 = 4;
/// Longer calls count as this long, nanoseconds: an hour.
const LONGEST_NS: u64 = 3_600_000_000_000;

/// A worker that serves: it ends with the group, or with its standard input.
pub(crate) fn serve() -> Result<(), Failure> {
    listen_to_launcher(Arc::default())?;
    join()?.serve_blocking()?;
    Ok(())
}

/// The worker that measures.
pub(crate) fn measure(plan: &str) -> Result<(), Failure> {
    let plan: Plan = serde_json::from_str(plan)?;
    let stop = Arc::new(AtomicBool::new(false));
    listen_to_launcher(Arc::clone(&stop))?;
    let agent = join()?;
    let device = device(&plan.device)?;
    let mut bench = Bench { agent: &agent, plan: &plan, stop: &stop, device, calls: 0, limits: None };
    match bench.run() {
        Ok(()) => agent.shutdown_blocking()?,
        Err(error) => {
            say(&Event::Failed { message: chain(&*error) })?;
            agent.abort();
        }
    }
    Ok(())
}

fn join() -> Result<Agent, Failure> {
    let settings = Settings::from_env()?;
    let options = settings.options()?;
    // One voice for a device that cannot be had, before anything uses the process's runtime.
    drop(Runtime::new(settings.device()?)?.set_global());
    Ok(Agent::join_blocking(options)?)
}

/// Ends this process with its standard input, and sets `stop` when a line comes. Signals of the terminal are the launcher's.
fn listen_to_launcher(stop: Arc<AtomicBool>) -> Result<(), Failure> {
    signal_hook::flag::register(signal_hook::consts::SIGINT, Arc::default())?;
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            match line {
                Ok(_) => stop.store(true, Ordering::Relaxed),
                Err(_) => break,
            }
        }
        std::process::exit(1);
    });
    Ok(())
}

/// What a worker runs on.
#[farcall::function(name = "bench::machine")]
fn machine() -> Machine {
    Machine::this()
}

fn say(event: &Event) -> Result<(), Failure> {
    println!("{}", serde_json::to_string(event)?);
    Ok(())
}

/// An error and its causes.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}; because: {cause}"))
}

struct Bench<'a> {
    agent: &'a Agent,
    plan: &'a Plan,
    stop: &'a AtomicBool,
    device: Device,
    limits: Option<Limits>,
    /// So far: chooses the worker to call, and the byte to look at.
    calls: u64,
}

/// What the caller sends.
struct Source {
    len: usize,
    pattern: Pattern,
    sum: u64,
    foreign: Vec<u8>,
    tensor: Tensor,
}

impl Bench<'_> {
    fn run(&mut self) -> Result<(), Failure> {
        // Connects, too, so that the path is known.
        say(&Event::Peer(self.agent.to(1).call(machine, ()).wait()?))?;
        if let Some(required) = &self.plan.require {
            // Of the largest tensor: small ones may have a shorter way.
            let path = self.path(self.plan.cells().map(|(_, size_bytes)| size_bytes).max().unwrap_or(0));
            if *required != path {
                return say(&Event::Unmet { required: required.clone(), path });
            }
        }
        if self.plan.limits {
            self.measure_limits()?;
        }
        let cells: Vec<(Op, u64)> = self.plan.cells().collect();
        for (cell, (op, size_bytes)) in cells.iter().copied().enumerate() {
            say(&Event::Begins { cell, cells: cells.len(), op, size_bytes })?;
            let limit = match (&mut self.limits, self.agent.to(1).channel(size_bytes)) {
                (Some(limits), Some(channel)) => {
                    limits.of_row(op, size_bytes, channel, self.plan.spins, self.plan.memory)?
                }
                _ => None,
            };
            match self.cell(op, size_bytes)? {
                Some(row) => say(&Event::Row(Box::new(row.with_limit(limit))))?,
                None => return Ok(()),
            }
        }
        say(&Event::Complete)
    }

    fn measure_limits(&mut self) -> Result<(), Failure> {
        let mut sizes: Vec<u64> = self.plan.cells().map(|(_, size_bytes)| size_bytes).collect();
        sizes.sort_unstable();
        sizes.dedup();
        let limits =
            self.limits.insert(Limits::connect(self.agent, sizes.last().copied().unwrap_or(0), self.plan.same_host));
        let skipped = limits.skipped.iter().map(|(name, why)| ((*name).to_owned(), why.clone())).collect();
        let limits = limits.table(&sizes)?;
        say(&Event::Limits { limits, skipped })
    }

    /// The library's name of the way that a tensor of that size takes to the first of the others.
    fn path(&self, size_bytes: u64) -> String {
        self.agent.to(1).channel(size_bytes).map_or("none", Channel::name).to_owned()
    }

    /// The next worker to be called: each of the others in its turn.
    fn next_target(&mut self) -> u32 {
        self.calls += 1;
        1 + (self.calls % (self.agent.workers().len() as u64 - 1)) as u32
    }

    /// `None` if it was told to stop before there was a result.
    fn cell(&mut self, op: Op, size_bytes: u64) -> Result<Option<Row>, Failure> {
        if op == Op::Rate {
            return self.rate();
        }
        let source = self.source(size_bytes as usize)?;
        let mut wrong = 0;
        self.repeat(self.plan.warmup.map(u64::from), (WARMUP_CALLS_MIN, WARMUP_MIN), |bench| {
            bench.timed(op, &source).map(drop)
        })?;
        let mut times = Times::new()?;
        self.repeat(self.plan.iterations.map(u64::from), (CALLS_MIN, TIME_MIN), |bench| {
            let (took, answer) = bench.timed(op, &source)?;
            times.record(took);
            wrong += bench.check(&source, &answer)?;
            Ok(())
        })?;
        if self.plan.check {
            wrong += self.check_fully(op, &source)?;
        }
        let wrong = self.plan.check.then_some(wrong);
        Ok(times.row(op, size_bytes, 1, self.path(size_bytes), times.busy, wrong))
    }

    /// Runs `call` as often as asked for, or by default at least that often and that long.
    fn repeat(
        &mut self,
        count: Option<u64>,
        (calls_min, time_min): (u64, Duration),
        mut call: impl FnMut(&mut Self) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let started = Instant::now();
        for done in 0..count.unwrap_or(CALLS_MAX) {
            let enough = count.is_none() && done >= calls_min && started.elapsed() >= time_min;
            if enough || self.stop.load(Ordering::Relaxed) {
                break;
            }
            call(self)?;
        }
        Ok(())
    }

    fn source(&self, len: usize) -> Result<Source, Failure> {
        let pattern = Pattern::new(len);
        let mut foreign = vec![0; len];
        pattern.fill(&mut foreign);
        if self.plan.plant && len > 0 {
            foreign[len / 2] ^= 0x10;
        }
        let mut tensor = TensorMut::empty(DType::U8, &[len])?;
        tensor.as_mut_slice::<u8>()?.copy_from_slice(&foreign);
        let mut tensor = tensor.freeze_ready();
        if self.device != Device::HOST {
            let stream = self.agent.runtime().stream(self.device)?;
            tensor = stream.pack(&tensor, self.device)?;
            stream.synchronize(Duration::from_secs(60))?;
        }
        let sum = pattern.sum(len);
        if self.plan.memory == Memory::Slab {
            foreign = Vec::new();
        }
        Ok(Source { len, pattern, sum, foreign, tensor })
    }

    /// M1: from the caller's bytes to the value, complete.
    fn timed(&mut self, op: Op, source: &Source) -> Result<(Duration, Answer), Failure> {
        let (target, at) = (self.next_target(), self.calls);
        let to = self.agent.to(target);
        let copied;
        let started = Instant::now();
        let tensor = match self.plan.memory {
            Memory::Slab => &source.tensor,
            Memory::Foreign => {
                copied = Tensor::from_slice(&source.foreign, &[source.len])?;
                &copied
            }
        };
        let answer = match op {
            Op::Call | Op::Rate => Answer::Number { at, found: to.call(functions::call, (at,)).wait()? },
            Op::Sink => Answer::Sample { at, found: to.call(functions::sink, (tensor, at)).wait()? },
            Op::Read => Answer::Sum { found: to.call(functions::read, (tensor,)).wait()? },
            Op::Echo => Answer::Bytes { at, found: to.call(functions::echo, (tensor,)).wait()? },
        };
        Ok((started.elapsed(), answer))
    }

    /// Wrong answers, 0 or 1: what can be told at no cost.
    fn check(&self, source: &Source, answer: &Answer) -> Result<u64, Failure> {
        let is_right = match answer {
            _ if !self.plan.check => true,
            Answer::Number { at, found } => *found == at.wrapping_add(1),
            Answer::Sum { found } => *found == source.sum,
            Answer::Sample { .. } if self.device != Device::HOST => true,
            Answer::Sample { at, found } => *found == source.pattern.sample(source.len, *at),
            Answer::Bytes { found, .. } if found.shape() != [source.len] || found.device() != self.device => false,
            Answer::Bytes { .. } if self.device != Device::HOST => true,
            Answer::Bytes { at, found } => {
                functions::sample(found.as_slice()?, *at) == source.pattern.sample(source.len, *at)
            }
        };
        Ok(u64::from(!is_right))
    }

    /// Wrong bytes of one more call to each worker.
    fn check_fully(&self, op: Op, source: &Source) -> Result<u64, Failure> {
        let mut wrong = 0;
        for target in 1..self.agent.workers().len() as u32 {
            let to = self.agent.to(target);
            wrong += match op {
                Op::Call | Op::Rate => 0,
                Op::Sink | Op::Read => to.call(functions::verify, (&source.tensor,)).wait()?,
                Op::Echo => {
                    let back = to.call(functions::echo, (&source.tensor,)).wait()?;
                    on_host(&back, |bytes| source.pattern.count_wrong(bytes)).map_err(|error| error.to_string())?
                }
            };
        }
        Ok(wrong)
    }

    /// Small calls, as many outstanding as asked for; the oldest is waited for. Its latency counts from its sending.
    fn rate(&mut self) -> Result<Option<Row>, Failure> {
        let mut waiting: VecDeque<(u64, Instant, Reply<u64>)> = VecDeque::new();
        let mut wrong = 0;
        // Of a rate, a look at the clock is a part: one a call, from when the last has ended.
        let mut now = Instant::now();
        let mut turn = |bench: &mut Self, times: Option<&mut Times>| -> Result<(), Failure> {
            while waiting.len() < bench.plan.outstanding as usize {
                let (target, at) = (bench.next_target(), bench.calls);
                waiting.push_back((at, now, bench.agent.to(target).call(functions::call, (at,))));
            }
            let Some((at, sent, reply)) = waiting.pop_front() else { return Ok(()) };
            wrong += u64::from(reply.wait()? != at.wrapping_add(1));
            now = Instant::now();
            if let Some(times) = times {
                times.record(now.saturating_duration_since(sent));
            }
            Ok(())
        };
        self.repeat(self.plan.warmup.map(u64::from), (WARMUP_CALLS_MIN, WARMUP_MIN), |bench| turn(bench, None))?;
        let mut times = Times::new()?;
        let started = Instant::now();
        self.repeat(self.plan.iterations.map(u64::from), (CALLS_MIN, TIME_MIN), |bench| turn(bench, Some(&mut times)))?;
        let elapsed = started.elapsed();
        for (at, _, reply) in waiting {
            wrong += u64::from(reply.wait()? != at.wrapping_add(1));
        }
        let wrong = self.plan.check.then_some(wrong);
        Ok(times.row(Op::Rate, 8, self.plan.outstanding, self.path(8), elapsed, wrong))
    }
}

/// What a call gave, and what it is checked with.
enum Answer {
    Number { at: u64, found: u64 },
    Sample { at: u64, found: u64 },
    Sum { found: u64 },
    Bytes { at: u64, found: Tensor },
}

/// The times of calls, to three digits.
pub(super) struct Times {
    histogram: Histogram<u64>,
    pub(super) busy: Duration,
}

impl Times {
    pub(super) fn new() -> Result<Self, Failure> {
        Ok(Self { histogram: Histogram::new_with_bounds(1, LONGEST_NS, 3)?, busy: Duration::ZERO })
    }

    pub(super) fn record(&mut self, took: Duration) {
        self.busy += took;
        self.histogram.saturating_record((took.as_nanos() as u64).max(1));
    }

    /// Over `elapsed`, in which all calls were made; `None` if there were none.
    pub(super) fn row(
        &self,
        op: Op,
        size_bytes: u64,
        outstanding: u32,
        path: String,
        elapsed: Duration,
        wrong: Option<u64>,
    ) -> Option<Row> {
        let calls = self.histogram.len();
        let us = |ns: u64| ns as f64 / 1e3;
        let quantile =
            |quantile, calls_min| (calls >= calls_min).then(|| us(self.histogram.value_at_quantile(quantile)));
        let seconds = elapsed.as_secs_f64();
        let bytes = (op.crossings() * size_bytes * calls) as f64;
        (calls > 0).then(|| Row {
            op,
            size_bytes,
            outstanding,
            path,
            calls,
            min_us: us(self.histogram.min()),
            p50_us: us(self.histogram.value_at_quantile(0.5)),
            p99_us: quantile(0.99, 100),
            p999_us: quantile(0.999, 1000),
            max_us: us(self.histogram.max()),
            mean_us: self.busy.as_secs_f64() * 1e6 / calls as f64,
            calls_per_s: calls as f64 / seconds,
            gb_per_s: (bytes > 0.0).then(|| bytes / seconds / 1e9),
            wrong,
            limit: None,
            ratio: None,
            runs_p50_us: vec![us(self.histogram.value_at_quantile(0.5))],
        })
    }
}
