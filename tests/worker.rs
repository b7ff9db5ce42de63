//! A worker process for the tests: joins by its environment and serves the test functions.
//!
//! `farcall-test-worker MODE`: `serve` until the others leave, `leave` calls everybody once and shuts down, `stay` never
//! shuts down. `TEST_JOIN_MS` and `TEST_SHUTDOWN_MS` change those timeouts. It ends when its standard input does.

mod foreign;
mod functions;

use std::io::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use farcall::prelude::*;

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> ExitCode {
    std::thread::spawn(|| {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::exit(3);
    });
    let mode = std::env::args().nth(1).unwrap_or_default();
    match work(&mode) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "{error}");
            ExitCode::FAILURE
        }
    }
}

fn millis(variable: &str) -> Result<Option<Duration>, Failure> {
    let text = std::env::var(variable).ok();
    Ok(text.map(|text| text.parse()).transpose()?.map(Duration::from_millis))
}

fn work(mode: &str) -> Result<(), Failure> {
    farcall::log::init()?;
    let mut options = Options::from_env()?;
    options.registry = Some(functions::registry());
    options.join_timeout = millis("TEST_JOIN_MS")?.unwrap_or(options.join_timeout);
    options.shutdown_timeout = millis("TEST_SHUTDOWN_MS")?.unwrap_or(options.shutdown_timeout);
    let agent = Agent::join_blocking(options)?;
    match mode {
        "serve" => agent.serve_blocking()?,
        "leave" => {
            for worker in agent.workers() {
                let sum = agent.to(&worker.id).call(functions::add, (2, 3)).wait()?;
                writeln!(std::io::stdout(), "{} answered {sum}", worker.id)?;
            }
            agent.shutdown_blocking()?;
        }
        "stay" => loop {
            std::thread::park();
        },
        other => return Err(format!("no mode {other:?}").into()),
    }
    Ok(())
}
