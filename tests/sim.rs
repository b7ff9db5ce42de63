//! Agents on the simulated network: a few hundred seeds here, ten thousand by `cargo xtask sim`.
//!
//! A failing seed is replayed by `farcall sim --seed SEED --trace`.

use farcall_sim::planted::{self, Bug};
use farcall_sim::{Report, run};

/// Within so many seeds each planted bug is found.
const SEEDS_TO_FIND: u64 = 300;

fn assert_holds(seed: u64, report: &Report) {
    let violations = report.violations.join("\n");
    assert!(violations.is_empty(), "seed {seed}:\n{violations}\nreplay with: farcall sim --seed {seed} --trace");
}

#[test]
fn what_must_hold_holds_whatever_breaks() {
    let mut total = Report::default();
    for seed in 0..300 {
        let report = run(seed, None);
        assert_holds(seed, &report);
        total.add(&report);
    }
    // None of it holds for want of trying.
    assert_eq!(total.faults.len(), 8, "every kind of fault was done: {:?}", total.faults);
    for outcome in ["value", "peer lost", "deadline passed", "handler's error", "dropped or detached", "caller died"] {
        let calls = total.calls.get(outcome).copied().unwrap_or_default();
        assert!(calls >= 100, "{calls} calls ended with: {outcome}");
    }
}

/// S1. In threads of their own: nothing of a thread or of a process must count.
#[test]
fn the_same_seed_gives_the_same_trace() {
    let hashes = || {
        let traces = || (1000..1040).map(|seed| run(seed, None)).map(|report| (report.hash, report.events));
        std::thread::spawn(move || traces().collect::<Vec<_>>()).join().expect("no panic")
    };
    let (first, second) = (hashes(), hashes());
    assert_eq!(first, second);
    let distinct: std::collections::BTreeSet<u64> = first.iter().map(|(hash, _)| *hash).collect();
    assert_eq!(distinct.len(), first.len(), "each seed goes its own way");
}

#[test]
fn every_planted_bug_is_found_and_replayed() {
    for bug in Bug::ALL {
        let with_bug = |seed| planted::with(bug, || run(seed, None));
        let found =
            (0..SEEDS_TO_FIND).map(|seed| (seed, with_bug(seed))).find(|(_, report)| !report.violations.is_empty());
        let Some((seed, report)) = found else { panic!("{bug:?} is not found in {SEEDS_TO_FIND} seeds") };
        println!("{bug:?}: seed {seed}: {}", report.violations[0]);
        let again = with_bug(seed);
        assert_eq!((again.hash, &again.violations), (report.hash, &report.violations), "{bug:?} is replayed");
        assert_holds(seed, &run(seed, None));
    }
}
