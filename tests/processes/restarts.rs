//! Workers that are started again: reachable under their names, and nobody mistakes one life for another.

use std::time::{Duration, Instant};

use farcall::prelude::*;
use farcall::{CloseCause, Reply, Stage};
use rustix::process::Signal;

use crate::functions::{add, add_there, arrived, hold_async, hold_there, keep_mib, open};
use crate::harness::{block_on, bounded, bounded_by, eventually, step, unique};

use super::spawn::Processes;

/// How soon a worker is reached that has joined again.
const REACHED_WITHIN: Duration = Duration::from_secs(10);

/// Calls a worker from here, and from another one, until there are answers.
fn reach(agent: &Agent, worker: &str, from: &str) {
    let until = Instant::now() + REACHED_WITHIN;
    step(format_args!("reaching {worker} again"));
    while let Err(error) = agent.to(worker).call(add, (2, 3)).wait() {
        assert!(matches!(error, CallError::PeerLost { .. }), "{error}");
        assert!(Instant::now() < until, "{error}");
    }
    step(format_args!("reaching {worker} again from {from}"));
    loop {
        let text = agent.to(from).call(add_there, (worker,)).wait().expect("it lives");
        if text == "no error" {
            return;
        }
        assert!(text.starts_with(&format!("test::add on {worker}: lost {worker} while")), "{text}");
        assert!(Instant::now() < until, "{text}");
    }
}

fn life(agent: &Agent, rank: usize) -> u64 {
    agent.workers().nth(rank).expect("a worker").incarnation
}

fn a_killed_worker_is_reached_again(start: fn(usize) -> (Processes, Agent)) {
    let (mut processes, agent) = start(2);
    for lives in 1..=3 {
        reach(&agent, "w1", "w2");
        assert_eq!(life(&agent, 1), lives);
        let waiting = agent.to("w1").call(hold_async, (unique("never"), 1));
        processes.kill(1);
        assert!(matches!(waiting.wait(), Err(CallError::PeerLost { .. })));
        processes.workers[1] = Some(processes.spawn(1, "serve", &[]));
    }
    reach(&agent, "w1", "w2");
    assert_eq!((life(&agent, 1), life(&agent, 2)), (4, 1));
    processes.shutdown(&agent);
}

#[test]
fn a_worker_that_was_killed_and_started_again_is_reached_under_its_name() {
    bounded(|| a_killed_worker_is_reached_again(Processes::serving));
}

#[test]
fn a_worker_that_was_started_again_is_reached_over_tcp_too() {
    bounded(|| a_killed_worker_is_reached_again(Processes::serving_over_tcp));
}

/// The others wait for its newest life to be done, not for the one that is gone.
#[test]
fn a_group_is_left_together_with_a_worker_that_was_started_again() {
    bounded(|| {
        let (mut processes, agent) = Processes::serving(1);
        processes.kill(1);
        processes.workers[1] = Some(processes.spawn(1, "leave", &[]));
        // It calls this worker, which never dialed it.
        eventually("w1 dials", REACHED_WITHIN, || life(&agent, 1) == 2);
        agent.shutdown_blocking().expect("leaves in order");
        let ended = processes.workers[1].take().expect("a process").end();
        assert!(ended.status.success() && ended.stdout.contains("w0 answered 5"), "{ended:?}");
    });
}

/// L2: the second process of a rank is told who holds it, and the first goes on.
#[test]
fn a_rank_that_is_held_is_refused_to_another_process() {
    bounded(|| {
        let (processes, agent) = Processes::serving(2);
        let second = processes.spawn(1, "serve", &[("TEST_JOIN_MS", "300")]).end();
        assert!(!second.status.success());
        let pid = agent.workers().nth(1).expect("w1").pid;
        let expected = format!("rank 1 is held by w1 (process {pid} at 127.0.0.1:");
        assert!(second.stderr.contains(&expected) && second.stderr.contains("end that process first"), "{second:?}");
        reach(&agent, "w1", "w2");
        assert_eq!(life(&agent, 1), 1);
        processes.shutdown(&agent);
    });
}

// ---- rounds ----

/// Rounds of the run in every suite; `TEST_ROUNDS=200` asks for more.
const ROUNDS: usize = 8;
/// Calls in flight when a worker is killed or stopped.
const CALLS: usize = 1_000;
/// What the killed hold, of memory that they have written.
const KEPT_MIB: usize = 1_024;
/// How soon everyone who waits is told of a death on this host, and of a process that was stopped.
const TOLD_WITHIN: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(2)];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Blow {
    Kill,
    /// Stopped, counted as lost, and killed then.
    StopAndKill,
    /// Stopped, counted as lost, and let go on.
    StopAndGoOn,
}

/// One round: gives how long it took until the last of those who waited for `victim` was told.
fn round(processes: &mut Processes, agent: &Agent, victim: usize, blow: Blow) -> Duration {
    let workers = processes.workers.len() - 1;
    let (name, key) = (format!("w{victim}"), unique("round"));
    step(format_args!("{blow:?}: {name} writes {KEPT_MIB} MiB"));
    agent.to(victim as u32).call(keep_mib, (KEPT_MIB,)).wait().expect("memory");
    let mut lost: Vec<Reply<i64>> = Vec::new();
    let mut kept: Vec<Reply<i64>> = Vec::new();
    let mut through: Vec<Reply<String>> = Vec::new();
    for call in 0..CALLS {
        let rank = 1 + call % workers;
        let to = agent.to(rank as u32);
        match (rank == victim, call % 10) {
            (true, _) => lost.push(to.call(hold_async, (&key, 1))),
            (false, 0) => through.push(to.call(hold_there, (&name, &key))),
            (false, _) => kept.push(to.call(hold_async, (&key, 1))),
        }
    }
    let waits = lost.len() + through.len();
    step(format_args!("{blow:?}: {waits} calls arrive at {name}, {} elsewhere", kept.len()));
    assert!(agent.to(victim as u32).call(arrived, (&key, waits)).wait().expect("it lives"));
    step(format_args!("{blow:?}: those who wait for {name}"));
    let struck = Instant::now();
    match blow {
        Blow::Kill => processes.worker(victim).signal(Signal::KILL),
        Blow::StopAndKill | Blow::StopAndGoOn => processes.worker(victim).signal(Signal::STOP),
    }
    for reply in lost {
        let error = block_on(reply.into_future()).expect_err("its worker is dead or stopped");
        let CallError::PeerLost { call, stage, cause } = &error else { panic!("{error}") };
        assert_eq!((&*call.worker, call.function, *stage), (&*name, "test::hold_async", Stage::Waiting), "{error}");
        let fits = match blow {
            Blow::Kill => matches!(**cause, CloseCause::Died | CloseCause::PeerLost { .. }),
            Blow::StopAndKill | Blow::StopAndGoOn => matches!(**cause, CloseCause::Silent { .. }),
        };
        assert!(fits, "{blow:?}: {cause}");
    }
    for reply in through {
        let text = block_on(reply.into_future()).expect("a live worker");
        assert!(text.starts_with(&format!("test::hold on {name}: lost {name} while waiting for the reply")), "{text}");
    }
    let told = struck.elapsed();
    step(format_args!("{blow:?}: those who wait for others than {name}"));
    for rank in (1..=workers).filter(|rank| *rank != victim) {
        agent.to(rank as u32).call(open, (&key,)).wait().expect("it lives");
    }
    for reply in kept {
        assert_eq!(reply.wait().expect("it lives"), 1);
    }
    match blow {
        Blow::Kill | Blow::StopAndKill => {
            processes.kill(victim);
            processes.workers[victim] = Some(processes.spawn(victim, "serve", &[]));
        }
        Blow::StopAndGoOn => processes.worker(victim).signal(Signal::CONT),
    }
    reach(agent, &name, &format!("w{}", 1 + victim % workers));
    assert_eq!(agent.in_flight(), 0);
    told
}

#[test]
fn whoever_waits_for_a_worker_that_is_struck_down_is_told_round_after_round() {
    let rounds = std::env::var("TEST_ROUNDS").map_or(ROUNDS, |rounds| rounds.parse().expect("a number of rounds"));
    bounded_by(Duration::from_secs(60 + 5 * rounds as u64), move || {
        let (mut processes, agent) = Processes::serving_near(7);
        let mut told: [Vec<Duration>; 2] = Default::default();
        for number in 0..rounds {
            let blow = match number % 8 {
                3 => Blow::StopAndKill,
                7 => Blow::StopAndGoOn,
                _ => Blow::Kill,
            };
            // Each of them, and each in every way: 7 and 8 have no common factor.
            let within = round(&mut processes, &agent, 1 + number % 7, blow);
            told[usize::from(blow != Blow::Kill)].push(within);
        }
        for ((what, told), bound) in ["killed", "stopped"].iter().zip(&mut told).zip(TOLD_WITHIN) {
            told.sort();
            let (median, last) = (told[told.len() / 2], told[told.len() - 1]);
            println!("{} {what}: told within {median:?} (median), {last:?} (all)", told.len());
            assert!(last <= bound, "{what}: {told:?}");
        }
        processes.shutdown(&agent);
    });
}
