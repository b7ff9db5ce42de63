//! `farcall sim`: groups of workers on a simulated network, seed by seed.

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use farcall_sim::Report;

/// Violations that are printed of one seed.
const VIOLATIONS_SHOWN: usize = 8;
/// Failing seeds that are printed.
const FAILURES_SHOWN: usize = 20;

/// What the threads share.
#[derive(Default)]
struct Sweep {
    next: AtomicU64,
    done: AtomicU64,
    /// All numbers, and the seeds that failed with what they found.
    total: Mutex<(Report, Vec<(u64, Report)>)>,
}

/// Runs `seeds` seeds from `from` on.
pub(crate) fn sweep(from: u64, seeds: u64, jobs: Option<usize>) -> ExitCode {
    let jobs = jobs.or_else(|| thread::available_parallelism().ok().map(usize::from)).unwrap_or(1).max(1);
    let start = Instant::now();
    let sweep = Sweep::default();
    thread::scope(|scope| {
        let threads: Vec<_> = (0..jobs).map(|_| scope.spawn(|| work(&sweep, from, seeds))).collect();
        let mut shown = start;
        while threads.iter().any(|thread| !thread.is_finished()) {
            thread::park_timeout(Duration::from_millis(50));
            if shown.elapsed() > Duration::from_secs(10) {
                shown = Instant::now();
                let done = sweep.done.load(Ordering::Relaxed);
                println!("{done} of {seeds} seeds, {:.0} s", start.elapsed().as_secs_f64());
            }
        }
    });
    let (total, mut failed) = sweep.total.into_inner().unwrap_or_else(PoisonError::into_inner);
    failed.sort_by_key(|(seed, _)| *seed);
    for (seed, report) in failed.iter().take(FAILURES_SHOWN) {
        println!("\nseed {seed} FAILED:");
        show_violations(report);
        println!("  repeat with: farcall sim --seed {seed} --trace");
    }
    println!();
    for (title, counts) in [("faults", &total.faults), ("calls", &total.calls)] {
        for (name, count) in counts {
            println!("{title:<7} {name:<26} {count:>10}");
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let calls: u64 = total.calls.values().sum();
    println!(
        "\n{seeds} seeds, {} failed; {calls} calls, {} events in {seconds:.1} s on {jobs} threads",
        failed.len(),
        total.events
    );
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn work(sweep: &Sweep, from: u64, seeds: u64) {
    loop {
        let index = sweep.next.fetch_add(1, Ordering::Relaxed);
        if index >= seeds {
            return;
        }
        let seed = from.wrapping_add(index);
        let report = farcall_sim::run(seed, None);
        sweep.done.fetch_add(1, Ordering::Relaxed);
        let (total, failed) = &mut *sweep.total.lock().unwrap_or_else(PoisonError::into_inner);
        total.add(&report);
        if !report.violations.is_empty() {
            failed.push((seed, report));
        }
    }
}

/// Runs one seed twice; both times must be the same.
pub(crate) fn replay(seed: u64, trace: bool) -> ExitCode {
    let print = || Box::new(|line: &str| println!("{line}")) as farcall_sim::Print;
    let report = farcall_sim::run(seed, trace.then(print));
    let again = farcall_sim::run(seed, None);
    show_violations(&report);
    println!("seed {seed}: {} events, trace {:016x}", report.events, report.hash);
    if again.hash != report.hash {
        println!("the second time it was {:016x}: the simulation is not deterministic", again.hash);
    }
    if report.violations.is_empty() && again.hash == report.hash { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn show_violations(report: &Report) {
    for violation in report.violations.iter().take(VIOLATIONS_SHOWN) {
        println!("  {violation}");
    }
    if report.violations.len() > VIOLATIONS_SHOWN {
        println!("  and {} more", report.violations.len() - VIOLATIONS_SHOWN);
    }
}
