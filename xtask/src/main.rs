//! `cargo xtask test` runs all checks of this repository, `cargo xtask help` lists the single ones.
//!
//! With next to no dependencies, so that it builds in a second. `steps.rs` holds the checks, `shell.rs` runs programs.
//!
//! Invariant X1: a step passes, fails or is skipped with a reason; the closing line counts each, and nothing else does.
//! Invariant X2: a failure names the one command that repeats it.

#![expect(clippy::print_stdout, reason = "a command-line program: standard output is its purpose")]

mod gpu_pack;
mod nvrtc;
mod ptx;
mod shell;
mod steps;
mod wheel;

use std::process::ExitCode;
use std::time::Instant;

use steps::{STEPS, Step, TOOLS};

/// How a step ended, when it did not fail.
enum Outcome {
    Passed,
    /// Something that this machine lacks, and no fault of the code.
    Skipped(String),
}

/// A step that failed.
struct Failure {
    what: String,
    /// What to type to see it again.
    repeat: String,
}

type StepResult = Result<Outcome, Failure>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let command = arguments.join(" ");
    match (command.as_str(), STEPS.iter().chain(TOOLS).find(|step| step.command == Some(&command))) {
        ("test", _) => run(STEPS),
        ("" | "help" | "--help" | "-h", _) => {
            help();
            ExitCode::SUCCESS
        }
        (_, Some(step)) => run(std::slice::from_ref(step)),
        (unknown, None) => {
            println!("there is no `cargo xtask {unknown}`\n");
            help();
            ExitCode::from(2)
        }
    }
}

fn help() {
    println!("usage: cargo xtask COMMAND\n\n  help         this list\n  test         all of the following, in order");
    for step in STEPS {
        println!("  {:<11}  {}", step.command.unwrap_or("-"), step.title);
    }
    println!("\nnot checks, and not part of `test`:\n");
    for tool in TOOLS {
        println!("  {:<11}  {}", tool.command.unwrap_or("-"), tool.title);
    }
}

/// Runs `steps` up to the first that fails, and closes with the count.
fn run(steps: &[Step]) -> ExitCode {
    let start = Instant::now();
    let mut passed = 0;
    let mut skipped = Vec::new();
    let mut failure = None;
    for (index, step) in steps.iter().enumerate() {
        println!("\n== {}/{} {}", index + 1, steps.len(), step.title);
        let step_start = Instant::now();
        let outcome = (step.run)();
        let seconds = step_start.elapsed().as_secs_f64();
        match outcome {
            Ok(Outcome::Passed) => {
                passed += 1;
                println!("== passed in {seconds:.1} s");
            }
            Ok(Outcome::Skipped(reason)) => {
                println!("== skipped after {seconds:.1} s: {reason}");
                skipped.push((step.title, reason));
            }
            Err(error) => {
                println!("== FAILED after {seconds:.1} s: {}\n   repeat with: {}", error.what, error.repeat);
                failure = Some(step.title);
                break;
            }
        }
    }
    println!();
    for (title, reason) in &skipped {
        println!("skipped: {title}: {reason}");
    }
    if let Some(title) = failure {
        println!("failed: {title}");
    }
    let (failed, skipped) = (usize::from(failure.is_some()), skipped.len());
    let seconds = start.elapsed().as_secs_f64();
    println!("{passed} steps passed, {failed} failed, {skipped} skipped in {seconds:.0} s");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
