//! The `farcall` command.
//!
//! Exit codes: 0 ok, 1 failed, 2 usage, 3 requirement not met.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command speaks to a person")]

mod bench;
mod config;
mod demo;
mod doctor;
mod explain;
mod launch;
mod run;
mod schema;
mod sim;
mod weights;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Tensor calls between processes.
#[derive(Parser)]
#[command(name = "farcall", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Four worker processes on this machine show what farcall does, failures included.
    Demo {
        /// Publish this safetensors checkpoint from one worker to the others, version after version into the same memory, and
        /// compare every tensor's digest.
        #[arg(long, value_name = "FILE")]
        weights: Option<PathBuf>,
        /// How many versions.
        #[arg(long, value_name = "N", default_value_t = 20, requires = "weights", value_parser = clap::value_parser!(u64).range(1..))]
        rounds: u64,
        /// Give each worker emulated GPUs: `emulated:N` makes `cuda:0` to `cuda:N-1` on the CPU.
        #[arg(long, value_name = "emulated:N")]
        devices: Option<String>,
        /// How streams run: `inline`, `threads:SEED`, or `chaos:SEED`, where nothing runs until it must.
        #[arg(long, value_name = "MODE")]
        streams: Option<String>,
    },
    /// Start N workers of a program on this machine, their environment set for `Options::from_env`, a job key included.
    Run {
        /// How many workers.
        #[arg(short, long, value_name = "N", default_value_t = 2)]
        n: u32,
        /// The program and its arguments, after `--`.
        #[arg(last = true, required = true, value_name = "PROGRAM")]
        program: Vec<String>,
    },
    /// Measure calls: latency, bandwidth, rate, and whether the data is right.
    Bench(Box<bench::BenchArgs>),
    /// Settings: which there are, their values, and where these come from.
    Config {
        #[command(subcommand)]
        command: config::ConfigCommand,
    },
    /// Simulate groups of workers on a network that breaks, in virtual time, and check what must hold all the same.
    Sim {
        /// How many seeds.
        #[arg(long, value_name = "N", default_value_t = 1000)]
        seeds: u64,
        /// The first of them.
        #[arg(long, value_name = "SEED", default_value_t = 0)]
        from: u64,
        /// Threads. Default: one for each processor.
        #[arg(long, value_name = "J")]
        jobs: Option<usize>,
        /// This seed alone, twice: the second time must go as the first.
        #[arg(long, value_name = "SEED", conflicts_with_all = ["seeds", "from", "jobs"])]
        seed: Option<u64>,
        /// Print every event of that seed.
        #[arg(long, requires = "seed")]
        trace: bool,
    },
    /// Functions that can be called by name, such as `aten::add`: which there are, and what they take.
    Schema {
        #[command(subcommand)]
        command: schema::SchemaCommand,
    },
    /// Say what this machine offers to farcall, what it lacks, and how to get it.
    Doctor(doctor::DoctorArgs),
    /// Say which way a tensor takes from one device to another, and why every other way is not taken.
    Explain(explain::ExplainArgs),
    /// Reads its parent's memory, for `doctor`.
    #[command(hide = true)]
    DoctorChild { pid: u32, address: u64, expected: String },
    /// One worker of a bench.
    #[command(hide = true)]
    BenchWorker {
        #[arg(long)]
        plan: Option<String>,
        #[arg(long)]
        cpu: Option<usize>,
    },
    /// One worker of the demo.
    #[command(hide = true)]
    DemoWorker {
        #[arg(long)]
        weights: Option<PathBuf>,
        #[arg(long, default_value_t = 1)]
        rounds: u64,
    },
}

/// What ends a command early.
pub(crate) type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> ExitCode {
    // Usage errors end here with code 2.
    let cli = Cli::parse();
    // `config` and `doctor` are what is asked when settings are wrong; a simulation's workers lose each other all the time.
    let is_quiet = matches!(cli.command, Command::Config { .. } | Command::Doctor(_) | Command::DoctorChild { .. })
        || matches!(cli.command, Command::Sim { .. }) && std::env::var_os("FARCALL_LOG").is_none();
    let log = if is_quiet { Ok(()) } else { farcall::log::init() };
    log.map_err(Into::into).and_then(|()| run(cli.command)).unwrap_or_else(|error| {
        eprintln!("farcall: {error}");
        let mut source = error.source();
        while let Some(cause) = source {
            eprintln!("  because: {cause}");
            source = cause.source();
        }
        ExitCode::FAILURE
    })
}

fn run(command: Command) -> Result<ExitCode, Failure> {
    match command {
        Command::Bench(args) => bench::run(&args),
        Command::BenchWorker { plan, cpu } => bench::work(plan.as_deref(), cpu).map(|()| ExitCode::SUCCESS),
        Command::Doctor(args) => doctor::run(&args),
        Command::DoctorChild { pid, address, expected } => doctor::child(pid, address, &expected),
        Command::Explain(args) => explain::run(&args),
        Command::Config { command } => config::run(&command),
        Command::Schema { command } => schema::run(&command),
        Command::Demo { weights, rounds, devices, streams } => {
            demo::launch(weights.as_deref(), rounds, devices, streams)
        }
        Command::Run { n, program } => run::run(n, &program),
        Command::Sim { seed: Some(seed), trace, .. } => Ok(sim::replay(seed, trace)),
        Command::Sim { seeds, from, jobs, .. } => Ok(sim::sweep(from, seeds, jobs)),
        Command::DemoWorker { weights, rounds } => demo::work(weights.as_deref(), rounds).map(|()| ExitCode::SUCCESS),
    }
}
