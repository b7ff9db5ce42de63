//! `farcall bench`: what calls cost between two processes, or more, on one machine.
//!
//! The launcher starts the workers, shows what the first of them says it measured, and ends all of them, whatever happens: they
//! end with their standard input. Nothing is measured in the launcher itself.

mod functions;
mod measure;
mod plan;
mod report;
mod table;

use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::process::{ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::ValueEnum;
use farcall::Channel;
use plan::{Memory, Op, Plan, Size};
use report::{Event, Machine, Report, SCHEMA};

use crate::Failure;
use crate::launch::{Interrupted, Workers, this_program, told_to_end};

/// How often signals are looked at.
const TICK: Duration = Duration::from_millis(20);
/// How long a worker may take to end in order.
const GRACE: Duration = Duration::from_secs(5);

const USAGE: u8 = 2;
const UNMET: u8 = 3;

/// Measures calls between processes: latency by percentiles, bandwidth, and whether the data is right.
#[derive(Debug, clap::Args)]
pub(crate) struct BenchArgs {
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
    /// Whether waiting calls spin
    #[arg(long, value_enum, default_value_t = Spin::Auto)]
    spin: Spin,
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

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Spin {
    /// As the library sees fit
    Auto,
    On,
    Off,
}

pub(crate) fn run(args: &BenchArgs) -> Result<ExitCode, Failure> {
    let plan = match args.plan() {
        Ok(plan) => plan,
        Err(message) => {
            eprintln!("farcall bench: {message}");
            return Ok(ExitCode::from(USAGE));
        }
    };
    let told_to_end = told_to_end()?;
    let mut report = args.report(&plan);
    print!("{}", table::header(&report, &plan));
    let ended = Session::start(args, &plan)?.follow(&told_to_end, &mut report, args.progress())?;
    print!("{}", table::footer(&report));
    Ok(match ended {
        Ended::Complete if report.rows.iter().any(|row| row.wrong.is_some_and(|wrong| wrong > 0)) => ExitCode::FAILURE,
        Ended::Complete => ExitCode::SUCCESS,
        Ended::Interrupted(interrupted) => {
            eprintln!("farcall bench: interrupted, the results are partial");
            ExitCode::from(interrupted.exit_code())
        }
        Ended::Unmet { required, path } => {
            eprintln!(
                "farcall bench: --require {required}: the path is {path}; `farcall explain host host 1MiB` says why"
            );
            ExitCode::from(UNMET)
        }
        Ended::Failed(message) => {
            eprintln!("farcall bench: {message}");
            ExitCode::FAILURE
        }
    })
}

/// A worker that `run` started: the one that measures if there is a plan.
pub(crate) fn work(plan: Option<&str>) -> Result<(), Failure> {
    plan.map_or_else(measure::serve, measure::measure)
}

impl BenchArgs {
    fn plan(&self) -> Result<Plan, String> {
        if self.local < 2 {
            return Err(format!("--local {}: at least 2 workers are needed", self.local));
        }
        if self.spin == Spin::On {
            return Err("--spin on: this version's calls never spin, they sleep until an answer comes".to_owned());
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
            require: self.require.map(|channel| channel.name().to_owned()),
            plant: self.plant_wrong_byte,
        })
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
            workers: self.local,
            rows: Vec::new(),
        }
    }

    fn progress(&self) -> Progress {
        match (self.quiet, std::io::stderr().is_terminal()) {
            (true, _) => Progress::Silent,
            (false, true) => Progress::Line,
            (false, false) => Progress::Silent,
        }
    }
}

/// How the progress is shown, on standard error.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Progress {
    Silent,
    /// On a terminal: one line that is written over.
    Line,
}

impl Progress {
    fn show(self, text: &str) {
        if self == Self::Line {
            eprint!("\r\x1b[K{text}");
            let _ = std::io::stderr().flush();
        }
    }
}

/// How a session ended.
enum Ended {
    Complete,
    Interrupted(Interrupted),
    Unmet { required: String, path: String },
    Failed(String),
}

/// Workers, and what the measuring one says.
struct Session {
    workers: Workers,
    events: Receiver<Result<Event, String>>,
}

impl Session {
    fn start(args: &BenchArgs, plan: &Plan) -> Result<Self, Failure> {
        let (program, plan) = (this_program()?, serde_json::to_string(plan)?);
        let mut workers = Workers::start(args.local, |rank| {
            let mut command = std::process::Command::new(program.get_program());
            command.arg("bench-worker").stdin(Stdio::piped());
            if rank == 0 {
                command.arg("--plan").arg(&plan).stdout(Stdio::piped());
            }
            command.envs(args.devices.iter().map(|devices| ("FARCALL_DEVICES", devices)));
            command.envs(args.streams.iter().map(|streams| ("FARCALL_CPU_STREAMS", streams)));
            command.envs(args.transport.iter().map(|transport| ("FARCALL_TRANSPORT", transport)));
            command
        })?;
        let output = workers.take_output().ok_or("the measuring worker has no output")?;
        let (sender, events) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                let event = serde_json::from_str(&line).map_err(|error| format!("{error}: {line}"));
                if sender.send(event).is_err() {
                    break;
                }
            }
        });
        Ok(Self { workers, events })
    }

    /// Takes what is measured into the report, and shows it.
    fn follow(
        mut self,
        told_to_end: &Arc<AtomicUsize>,
        report: &mut Report,
        progress: Progress,
    ) -> Result<Ended, Failure> {
        let mut interrupted: Option<(usize, Instant)> = None;
        let mut ended = None;
        loop {
            match self.events.recv_timeout(TICK) {
                Ok(Ok(Event::Begins { cell, cells, op, size_bytes })) => {
                    progress.show(&format!("[{}/{cells}] {op} {}", cell + 1, Size(size_bytes)));
                }
                Ok(Ok(Event::Row(row))) => {
                    progress.show("");
                    print!("{}", table::row(&row));
                    let _ = std::io::stdout().flush();
                    report.rows.push(row);
                }
                Ok(Ok(Event::Unmet { required, path })) => ended = Some(Ended::Unmet { required, path }),
                Ok(Ok(Event::Failed { message })) => ended = Some(Ended::Failed(message)),
                Ok(Ok(Event::Complete)) => ended = Some(Ended::Complete),
                Ok(Err(message)) => {
                    return Err(format!("the measuring worker said what it should not: {message}").into());
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            match (told_to_end.load(Ordering::SeqCst), &interrupted) {
                (0, _) => {}
                (signal, None) => {
                    self.workers.tell("stop");
                    interrupted = Some((signal, Instant::now() + GRACE));
                }
                (_, Some((_, deadline))) if Instant::now() > *deadline => break,
                _ => {}
            }
        }
        progress.show("");
        self.end(interrupted.is_some());
        let ended = match (interrupted, ended) {
            (Some((signal, _)), _) => Ended::Interrupted(Interrupted(signal)),
            (None, Some(ended)) => ended,
            (None, None) => Ended::Failed("the measuring worker ended before it was done".to_owned()),
        };
        report.complete = matches!(ended, Ended::Complete);
        Ok(ended)
    }

    /// Waits for the workers, who leave by themselves, for [`GRACE`].
    fn end(&mut self, at_once: bool) {
        let deadline = Instant::now() + GRACE;
        while !at_once && Instant::now() < deadline {
            match self.workers.next_until(deadline) {
                Some(_) => {}
                None => break,
            }
        }
        self.workers.end();
    }
}
