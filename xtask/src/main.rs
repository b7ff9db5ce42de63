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

use steps::{STEPS, TOOLS};

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
    let (first, options) = arguments.split_first().map_or(("help", &[][..]), |(first, rest)| (first.as_str(), rest));
    let command = arguments.join(" ");
    if command == "test" {
        let steps: Vec<Work<'_>> =
            STEPS.iter().map(|step| (step.title, &step.run as &dyn Fn() -> StepResult)).collect();
        return run(&steps);
    }
    if let Some(step) = STEPS.iter().find(|step| step.command == Some(&command)) {
        return run(&[(step.title, &step.run)]);
    }
    if let Some(tool) = TOOLS.iter().find(|tool| tool.command == first) {
        return run(&[(tool.title, &|| (tool.run)(options))]);
    }
    let asked = matches!(command.as_str(), "" | "help" | "--help" | "-h");
    if !asked {
        println!("there is no `cargo xtask {command}`\n");
    }
    help();
    ExitCode::from(if asked { 0 } else { 2 })
}

fn help() {
    println!(
        "usage: cargo xtask COMMAND\n\n  {:<19}  this list\n  {:<19}  all of the following, in order",
        "help", "test"
    );
    for step in STEPS {
        println!("  {:<19}  {}", step.command.unwrap_or("-"), step.title);
    }
    println!("\nnot part of `test`:\n");
    for tool in TOOLS {
        println!("  {:<19}  {}", tool.command, tool.title);
    }
}

/// A title, and what to do.
type Work<'a> = (&'static str, &'a dyn Fn() -> StepResult);

/// Runs `steps` up to the first that fails, and closes with the count.
fn run(steps: &[Work<'_>]) -> ExitCode {
    let start = Instant::now();
    let mut passed = 0;
    let mut skipped = Vec::new();
    let mut failure = None;
    for (index, (title, work)) in steps.iter().enumerate() {
        println!("\n== {}/{} {}", index + 1, steps.len(), title);
        let step_start = Instant::now();
        let outcome = work();
        let seconds = step_start.elapsed().as_secs_f64();
        match outcome {
            Ok(Outcome::Passed) => {
                passed += 1;
                println!("== passed in {seconds:.1} s");
            }
            Ok(Outcome::Skipped(reason)) => {
                println!("== skipped after {seconds:.1} s: {reason}");
                skipped.push((title, reason));
            }
            Err(error) => {
                println!("== FAILED after {seconds:.1} s: {}\n   repeat with: {}", error.what, error.repeat);
                failure = Some(title);
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
