//! `farcall run`: N workers of any program on this machine.

use std::process::{Command, ExitCode};

use crate::Failure;
use crate::launch::{Workers, exit_code};

/// Starts the workers and gives the code of the first that fails.
pub(crate) fn run(n: u32, program: &[String]) -> Result<ExitCode, Failure> {
    if n == 0 {
        eprintln!("farcall run: -n must be at least 1");
        return Ok(ExitCode::from(2));
    }
    let mut workers = Workers::start(n, |_| {
        let mut command = Command::new(&program[0]);
        command.args(&program[1..]);
        command
    })?;
    loop {
        match workers.next() {
            Ok(None) => return Ok(ExitCode::SUCCESS),
            Ok(Some(ended)) if ended.status.success() => {}
            Ok(Some(ended)) => {
                eprintln!("farcall run: worker {} ended with {}; ending the others", ended.rank, ended.status);
                workers.end();
                return Ok(ExitCode::from(exit_code(ended.status)));
            }
            Err(interrupted) => {
                workers.end();
                return Ok(ExitCode::from(interrupted.exit_code()));
            }
        }
    }
}
