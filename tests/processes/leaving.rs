//! Leaving together, with or without those who died or never leave.

use std::time::{Duration, Instant};

use farcall::JoinError;
use farcall::transport::StoreError;

use crate::functions::{add, gate, hold};
use crate::harness::{Group, bounded, step, unique};

use super::spawn::Processes;

/// They call each other first, so that every connection is open when they leave.
#[test]
fn four_processes_leave_together() {
    bounded(|| {
        let mut processes = Processes::start(&[Some("leave"); 4], &[]);
        for worker in processes.workers.iter_mut().filter_map(Option::take) {
            let ended = worker.end();
            assert_eq!(ended.status.code(), Some(0), "{ended:?}");
            assert_eq!(ended.stdout, "w0 answered 5\nw1 answered 5\nw2 answered 5\nw3 answered 5\n");
            assert_eq!(ended.stderr, "");
        }
    });
}

#[test]
fn a_worker_that_was_killed_before_is_not_waited_for() {
    bounded(|| {
        let (mut processes, agent) = Processes::serving(3);
        for rank in 1..4 {
            assert_eq!(agent.to(rank).call(add, (2, 3)).wait().expect("it lives"), 5);
        }
        processes.kill(2);
        let started = Instant::now();
        processes.shutdown(&agent);
        println!("left within {:?}", started.elapsed());
        assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    });
}

#[test]
fn a_worker_that_is_killed_while_others_leave_is_not_waited_for() {
    bounded(|| {
        let mut processes = Processes::start(&[None, Some("stay"), Some("serve")], &[]);
        let agent = processes.join(|_| {});
        let leaving = std::thread::spawn(move || agent.shutdown_blocking());
        // w2 serves until all others leave or die.
        processes.kill(1);
        step("the shutdown of the others");
        leaving.join().expect("no panic").expect("leaves in order");
        assert!(processes.workers[2].take().expect("a process").end().status.success());
    });
}

#[test]
fn a_worker_that_never_leaves_is_named_in_time() {
    bounded(|| {
        let processes = Processes::start(&[None, Some("stay"), Some("serve")], &[]);
        let agent = processes.join(|options| options.shutdown_timeout = Duration::from_millis(500));
        let started = Instant::now();
        let error = agent.shutdown_blocking().expect_err("w1 does not leave");
        assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
        let JoinError::Store(StoreError::Missing { missing, .. }) = &error else { panic!("{error}") };
        assert!(missing.len() == 1 && missing[0].contains("/done/1"), "{missing:?}");
        let error = agent.to("w2").call(add, (2, 3)).wait().expect_err("closed all the same");
        assert!(error.to_string().contains("shut down"), "{error}");
    });
}

/// A worker process whose own timeout passes says so and fails.
#[test]
fn a_process_that_cannot_leave_in_time_fails_with_the_name_of_who_stays() {
    bounded(|| {
        let mut processes = Processes::start(&[Some("leave"), Some("stay")], &[("TEST_SHUTDOWN_MS", "300")]);
        let ended = processes.workers[0].take().expect("a process").end();
        assert_eq!(ended.status.code(), Some(1));
        assert!(ended.stderr.contains("/done/1"), "{}", ended.stderr);
    });
}

/// Leaving waits for this worker's own calls, and serves the others' meanwhile.
#[test]
fn a_worker_that_leaves_finishes_its_own_calls_and_serves_others() {
    bounded(|| {
        let group = Group::new(2);
        let key = unique("leaving");
        let held = group.agents[0].to("w1").call(hold, (&key,));
        assert!(gate(&key).wait_arrived(1));
        let leaving = std::thread::spawn({
            let agent = group.agents[0].clone();
            move || agent.shutdown_blocking()
        });
        for _ in 0..20 {
            assert_eq!(group.agents[1].to("w0").call(add, (2, 3)).wait().expect("served while it leaves"), 5);
        }
        assert!(!leaving.is_finished());
        gate(&key).open();
        group.agents[1].shutdown_blocking().expect("leaves in order");
        leaving.join().expect("no panic").expect("leaves in order");
        assert!(held.wait().expect("the reply came before the end"));
    });
}
