//! Workers that die with each other's memory mapped: nobody else is hurt, and nothing is left.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::spawn::Processes;
use crate::functions::{add, mapped_slabs, sends_without_descriptors, trade};
use crate::harness::{bounded, eventually, step};

/// Workers that die in one group.
const VICTIMS: usize = 6;
/// From a death to the end of those who waited, with the machine's other tests around. Alone it is a few milliseconds.
const TOLD_WITHIN: Duration = Duration::from_millis(500);

/// SNAPSHOT: what cannot be lent as no descriptor is left is copied, and travels.
#[test]
fn foreign_memory_is_copied_where_no_descriptor_is_left() {
    bounded(|| {
        let (processes, agent) = Processes::serving_near(2);
        for len in [300_000, 40 << 20] {
            let as_it_was = agent.to("w1").call(sends_without_descriptors, ("w2", len)).wait();
            assert!(as_it_was.expect("w1 lives"), "{len} bytes");
        }
        processes.shutdown(&agent);
    });
}

/// L1, L2, L3: a survivor trades tensors with workers that are killed at random points, as their sender and as their receiver.
/// `TEST_KILL_ROUNDS` is how many die (default 6); the seed is printed.
#[test]
fn workers_killed_with_mapped_slabs_hurt_nobody_and_leave_nothing() {
    let rounds: usize = std::env::var("TEST_KILL_ROUNDS").map_or(VICTIMS, |text| text.parse().expect("a number"));
    let mut seed = std::env::var("TEST_SEED").map_or(7, |text| text.parse().expect("a number")) | 1_u64;
    println!("TEST_SEED={seed}");
    let (mut latest, mut calls) = (Duration::ZERO, 0);
    for first in (0..rounds).step_by(VICTIMS) {
        let victims = VICTIMS.min(rounds - first);
        let next = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let (told, made) = {
            let (sender, outcome) = std::sync::mpsc::channel();
            bounded(move || sender.send(group(victims, seed)).expect("the test waits"));
            outcome.recv().expect("an outcome")
        };
        (latest, calls, seed) = (latest.max(told), calls + made, next | 1);
    }
    println!("{rounds} deaths, {calls} calls with tensors, each death told within {latest:?}");
    assert!(latest < TOLD_WITHIN, "{latest:?}");
    assert!(calls > 0, "somebody traded before they died");
}

/// One survivor, w1, and so many that die one after the other.
fn group(victims: usize, mut seed: u64) -> (Duration, u64) {
    let (mut processes, agent) = Processes::serving_near(1 + victims);
    let survivor = agent.to("w1");
    survivor.call(add, (2, 3)).wait().expect("w1 lives");
    let (mut latest, mut calls) = (Duration::ZERO, 0);
    let mut descriptors = None;
    for victim in 2..2 + victims {
        let name = format!("w{victim}");
        agent.to(&*name).call(add, (2, 3)).wait().expect("it lives so far");
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        step(format_args!("the death of {name}, seed {seed}"));
        let trading = survivor.call(trade, (&name, seed >> 32));
        // A random point of its life, no wait for anything.
        let until = Instant::now() + Duration::from_micros((seed >> 33) % 60_000);
        while Instant::now() < until {
            std::hint::spin_loop();
        }
        let worker = processes.workers[victim].take().expect("a process");
        let killed = Instant::now();
        worker.signal(Signal::KILL);
        calls += trading.wait().expect("w1 lives, and all it has is as it was");
        latest = latest.max(killed.elapsed());
        assert!(!worker.end().status.success());
        assert_eq!(survivor.call(add, (2, 3)).wait().expect("w1 lives"), 5);
        eventually("nothing of the dead is mapped", Duration::from_secs(5), || {
            survivor.call(mapped_slabs, ()).wait().expect("w1 lives") == 0
        });
        let open = || processes.worker(1).descriptors();
        // The first leaves what is made once: own slabs.
        match descriptors {
            None => descriptors = Some(open() + 4),
            Some(most) => eventually("nothing of the dead is open", Duration::from_secs(5), || open() <= most),
        }
    }
    processes.shutdown(&agent);
    (latest, calls)
}
