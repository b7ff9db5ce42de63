//! `farcall bench`: what calls cost between two processes, or more, on one machine.
//!
//! The launcher starts the workers, shows what the first of them says it measured, and ends all of them, whatever happens: they
//! end with their standard input. Nothing is measured in the launcher itself.

mod baseline;
mod csv;
mod functions;
mod futex;
mod html;
mod limits;
mod measure;
mod output;
mod plan;
mod plot;
mod report;
mod serve;
mod session;
mod table;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::ValueEnum;
use farcall::Channel;
use output::Output;
use plan::{Memory, Op, Plan};
pub(crate) use plan::{Size, device};
use report::{Machine, Report, SCHEMA};
use session::{Ended, Session};

use crate::Failure;
use crate::launch::told_to_end;

const USAGE: u8 = 2;
const UNMET: u8 = 3;

/// What is written, in short; the page `bench.md` has all of it.
const FORMATS: &str = "\
Columns: p50, p99, p99.9 and the shortest of single calls in microseconds (- where too few calls make a percentile), payload in
GB/s (10^9 bytes, both ways for echo) and calls/s in the time of all calls, the path by the library's name, #wrong bytes and
answers; with --limits the median of what a row cannot beat and the ratio to it; with --repeat the spread of the runs.
JSON: schema farcall-bench/1 with machine, rows and limits; CSV: the same rows, their columns named in the first line.
Exit codes: 0 ok, 1 wrong data, a regression or a failure, 2 usage, 3 --require not met, 130 or 143 interrupted.";

/// Measures calls between processes: latency by percentiles, bandwidth, and whether the data is right.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, after_help = FORMATS)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    command: Option<BenchCommand>,
    /// Measure calls to another host, on which `farcall bench serve` runs, in place of processes of this one
    #[arg(value_name = "HOST:PORT", conflicts_with = "local")]
    target: Option<String>,
    /// How many workers on this machine: one measures, the others answer in turns
    #[arg(long, value_name = "N", default_value_t = 2)]
    local: u32,
    /// What to measure
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Op::Call, Op::Sink, Op::Read, Op::Echo, Op::Rate])]
    op: Vec<Op>,
    /// The smallest size
    #[arg(short, value_name = "SIZE", default_value = "8")]
    begin: Size,
    /// The largest size
    #[arg(short, value_name = "SIZE", default_value = "16M")]
    end: Size,
    /// Each size is so many times the one before
    #[arg(short, value_name = "N", default_value_t = 8)]
    factor: u64,
    /// Calls to measure for each line [default: as many as 0.4 s takes, 20 to 100,000]
    #[arg(short = 'n', long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    iterations: Option<u32>,
    /// Calls before that [default: as many as 0.1 s takes, at least 4]
    #[arg(short, long, value_name = "N")]
    warmup: Option<u32>,
    /// Calls in flight for `rate`
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4096))]
    outstanding: u32,
    /// Where the caller's bytes come from
    #[arg(long, value_enum, default_value_t = Memory::Slab)]
    memory: Memory,
    /// Where the tensors are: `host`, or `cuda:0` and so on
    #[arg(long, value_name = "DEVICE", default_value = "host")]
    device: String,
    /// Give each worker emulated GPUs: `emulated:N`
    #[arg(long, value_name = "emulated:N")]
    devices: Option<String>,
    /// How streams of the CPU run: `inline`, `threads:SEED` or `chaos:SEED`
    #[arg(long, value_name = "MODE")]
    streams: Option<String>,
    /// Which sockets to use: `auto`, `tcp` or `unix`
    #[arg(long, value_name = "NAME")]
    transport: Option<String>,
    /// End with code 3 unless the bytes take this path: `cuda_ipc`, `shm`, `ucx`, `unix` or `tcp`
    #[arg(long, value_name = "PATH")]
    require: Option<Channel>,
    /// Whether threads look for work before they sleep, on both sides; with `on`, calls are compared with a word that is polled
    #[arg(long, value_enum, default_value_t = Spin::Auto)]
    spin: Spin,
    /// Measure what the machine can do without farcall, too: copies, a futex, raw sockets; and give each row's ratio to it
    #[arg(long)]
    limits: bool,
    /// Do all that with so many fresh groups of processes, and give the medians
    #[arg(long, value_name = "R", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeat: u32,
    /// Keep worker 0, 1 and so on to these processors
    #[arg(long, value_name = "CPU,CPU", value_delimiter = ',')]
    cpus: Vec<usize>,
    /// What is written to standard output
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
    /// Write the results to a file, too, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw latency and bandwidth by size into a file, as SVG
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// Write charts, figures, machine and versions to a file, as a page of HTML that loads nothing
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,
    /// Compare with results of before, and end with code 1 if a row is worse by more than the tolerance
    #[arg(long, value_name = "FILE")]
    baseline: Option<PathBuf>,
    /// How much worse, in percent
    #[arg(long, value_name = "PERCENT", default_value_t = 15.0)]
    tolerance: f64,
    /// Do not check the data
    #[arg(long)]
    no_check: bool,
    /// Say nothing of the progress
    #[arg(short, long)]
    quiet: bool,
    /// Make a byte of every tensor wrong
    #[arg(long, hide = true)]
    plant_wrong_byte: bool,
}

#[derive(Debug, clap::Subcommand)]
enum BenchCommand {
    /// Wait for `farcall bench HOST:PORT` from other hosts, and print the command to run there
    Serve {
        /// Where: beyond loopback, a job key is made unless the environment has one
        #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:0")]
        listen: std::net::SocketAddr,
    },
}

/// How results are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Lines as nccl-tests writes them
    Table,
    /// One object, `farcall-bench/1`
    Json,
    /// A line for each row, the names of the columns first
    Csv,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Spin {
    /// As the library sees fit
    Auto,
    On,
    Off,
}

impl Spin {
    /// As the setting says it.
    fn text(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::On => "on",
            Self::Off => "off",
        }
    }
}

pub(crate) fn run(args: &BenchArgs) -> Result<ExitCode, Failure> {
    if let Some(BenchCommand::Serve { listen }) = args.command {
        return serve::serve(listen);
    }
    let (plan, baseline) = match args.plan().and_then(|plan| Ok((plan, args.baseline()?))) {
        Ok(given) => given,
        Err(message) => {
            eprintln!("farcall bench: {message}");
            return Ok(ExitCode::from(USAGE));
        }
    };
    let told_to_end = told_to_end()?;
    let mut report = args.report(&plan);
    let output = Output::new(args, &plan);
    output.begin(&report)?;
    let mut runs = Vec::new();
    let mut ended = Ended::Complete;
    for run in 1..=args.repeat {
        let (rows, end) = match Session::start(args, &plan, &told_to_end)? {
            Ok(mut session) => {
                session.follow(&told_to_end, &mut report, |report, event| output.show(run, report, event))?
            }
            Err(interrupted) => (Vec::new(), Ended::Interrupted(interrupted)),
        };
        runs.push(rows);
        ended = end;
        if !matches!(ended, Ended::Complete) {
            break;
        }
    }
    report.complete = matches!(ended, Ended::Complete);
    report.runs = runs.len() as u32;
    report.rows = report::merge(&runs);
    output.end(&report)?;
    let regressed = match &baseline {
        Some(baseline) => output.compare(baseline, &report, args.tolerance)?,
        None => false,
    };
    Ok(match ended {
        Ended::Complete if regressed || report.wrong() > 0 => ExitCode::FAILURE,
        Ended::Complete => ExitCode::SUCCESS,
        Ended::Interrupted(interrupted) => {
            eprintln!("farcall bench: interrupted, the results are partial");
            ExitCode::from(interrupted.exit_code())
        }
        Ended::Unmet { required, path } => {
            eprintln!("farcall bench: --require {required}: the path is {path}; `farcall explain` says why");
            ExitCode::from(UNMET)
        }
        Ended::Failed(message) => {
            eprintln!("farcall bench: {message}");
            ExitCode::FAILURE
        }
    })
}

/// A worker that `run` started: the one that measures if there is a plan.
pub(crate) fn work(plan: Option<&str>, cpu: Option<usize>) -> Result<(), Failure> {
    if let Some(cpu) = cpu {
        // Threads that are started later stay there, too.
        let mut set = rustix::thread::CpuSet::new();
        set.set(cpu);
        rustix::thread::sched_setaffinity(None, &set)?;
    }
    plan.map_or_else(measure::serve, measure::measure)
}

impl BenchArgs {
    fn plan(&self) -> Result<Plan, String> {
        if self.local < 2 {
            return Err(format!("--local {}: at least 2 workers are needed", self.local));
        }
        if !self.tolerance.is_finite() || self.tolerance < 0.0 {
            return Err(format!("--tolerance {}: percent from 0 on are expected", self.tolerance));
        }
        let processors = std::thread::available_parallelism().map_or(1, Into::into);
        if let Some(cpu) = self.cpus.iter().find(|cpu| **cpu >= processors) {
            return Err(format!("--cpus {cpu}: there are the processors 0 to {}", processors - 1));
        }
        if let Some(transport) = &self.transport {
            transport
                .parse::<farcall::Transport>()
                .map_err(|expected| format!("--transport {transport}: {expected}"))?;
        }
        plan::device(&self.device).map_err(|error| format!("--device {}: {error}", self.device))?;
        for (name, value, variable) in
            [("--devices", &self.devices, "FARCALL_DEVICES"), ("--streams", &self.streams, "FARCALL_CPU_STREAMS")]
        {
            let Some(value) = value else { continue };
            let given = |asked: &str| (asked == variable).then(|| value.clone());
            farcall::device::Config::from_variables(given).map_err(|error| format!("{name}: {error}"))?;
        }
        Ok(Plan {
            ops: self.op.clone(),
            sizes: plan::sizes(self.begin, self.end, self.factor)?,
            iterations: self.iterations,
            warmup: self.warmup,
            outstanding: self.outstanding,
            memory: self.memory,
            device: self.device.clone(),
            check: !self.no_check,
            limits: self.limits,
            same_host: true,
            spins: self.spin == Spin::On,
            require: self.require.map(|channel| channel.name().to_owned()),
            plant: self.plant_wrong_byte,
        })
    }

    fn baseline(&self) -> Result<Option<Report>, String> {
        self.baseline.as_deref().map(baseline::read).transpose()
    }

    fn report(&self, plan: &Plan) -> Report {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
        Report {
            schema: SCHEMA.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            command: std::env::args().collect::<Vec<_>>().join(" "),
            started_at: since_1970.map_or(0, |age| age.as_secs()),
            complete: false,
            machine: Machine::this(),
            memory: plan.memory,
            device: plan.device.clone(),
            target: self.target.clone(),
            peer: None,
            workers: self.local,
            runs: 0,
            rows: Vec::new(),
            limits: Vec::new(),
            limits_skipped: Vec::new(),
        }
    }
}
