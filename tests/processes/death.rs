//! Workers that die: everyone who waits for them is told what was lost, soon; nobody else notices.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use farcall::prelude::*;
use farcall::{CloseCause, Stage};
use rustix::process::Signal;

use crate::functions::{
    add, arrived, fork, hash, hold, hold_there, keep_mib, leave_an_heir, open, pattern, pattern_there, quit, spin,
    spin_inline,
};
use crate::harness::{block_on, bounded, eventually, step, unique};

use super::spawn::Processes;

/// How soon a death must be told. Unix sockets and futexes will do better; this bound is for any machine.
const TOLD_WITHIN: Duration = Duration::from_secs(2);
const BIG: usize = 64 << 20;

fn assert_lost<T: std::fmt::Debug>(outcome: Result<T, CallError>, function: &str, stage: Stage) -> CallError {
    let error = outcome.expect_err("its worker is dead");
    let CallError::PeerLost { call, stage: found, .. } = &error else { panic!("{error}") };
    assert_eq!((&*call.worker, call.function, *found), ("w1", function, stage), "{error}");
    assert!(error.to_string().starts_with(&format!("{function} on w1: lost w1 while {stage}: ")), "{error}");
    error
}

fn address(agent: &Agent, rank: usize) -> SocketAddr {
    agent.workers().nth(rank).expect("a worker").address
}

/// Bytes that wait in the kernel, unread, on connections to or from this port of the loopback interface.
fn unread_bytes(port: u16) -> u64 {
    let table = std::fs::read_to_string("/proc/net/tcp").expect("the kernel's table");
    let end = format!("0100007F:{port:04X}");
    let rows = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    rows.filter(|row| row.len() > 4 && (row[1] == end || row[2] == end))
        .filter_map(|row| u64::from_str_radix(row[4].split(':').nth(1)?, 16).ok())
        .sum()
}

fn halfway(port: u16) {
    eventually("a part of the transfer waits in the kernel", Duration::from_secs(10), || unread_bytes(port) > 100_000);
}

#[test]
fn a_worker_killed_in_mid_call_fails_every_waiter() {
    bounded(|| {
        let (mut processes, agent) = Processes::serving(2);
        let key = unique("killed");
        let w1 = agent.to("w1");
        let waiting: Vec<_> = (0..4).map(|_| w1.call(hold, (&key,))).collect();
        let awaited: Vec<_> = (0..4).map(|_| w1.call(hold, (&key,)).into_future()).collect();
        let elsewhere = agent.to("w2").call(hold_there, ("w1", &key));
        assert!(w1.call(arrived, (&key, 9)).wait().expect("w1 lives"));
        let waiters: Vec<_> =
            waiting.into_iter().map(|reply| std::thread::spawn(move || (reply.wait(), Instant::now()))).collect();
        let killed = Instant::now();
        processes.kill(1);
        step("those who wait for the dead worker");
        let mut latest = Duration::ZERO;
        for waiter in waiters {
            let (outcome, at) = waiter.join().expect("no panic");
            assert_lost(outcome, "test::hold", Stage::Waiting);
            latest = latest.max(at - killed);
        }
        for reply in awaited {
            assert_lost(block_on(reply), "test::hold", Stage::Waiting);
            latest = latest.max(killed.elapsed());
        }
        let text = elsewhere.wait().expect("w2 lives");
        assert!(text.starts_with("test::hold on w1: lost w1 while waiting for the reply"), "{text}");
        println!(
            "a death was told to eight waiters here within {latest:?}, to w2 and back within {:?}",
            killed.elapsed()
        );
        assert!(latest < TOLD_WITHIN && killed.elapsed() < TOLD_WITHIN, "{latest:?} {:?}", killed.elapsed());
        assert_eq!(agent.in_flight(), 0);

        step("the next call");
        let started = Instant::now();
        let error = assert_lost(agent.to("w1").call(add, (2, 3)).wait(), "test::add", Stage::Connecting);
        assert!(started.elapsed() < TOLD_WITHIN);
        let CallError::PeerLost { cause, .. } = error else { unreachable!("checked above") };
        assert!(matches!(*cause, CloseCause::Connect { .. }), "{cause}");
        assert_eq!(agent.to("w2").call(add, (2, 3)).wait().expect("w2 lives"), 5);
        processes.shutdown(&agent);
    });
}

#[test]
fn a_worker_killed_while_it_receives_64_mib_fails_the_call() {
    bounded(|| {
        let (mut processes, agent) = Processes::serving_over_tcp(2);
        assert_eq!(agent.to("w1").call(add, (2, 3)).wait().expect("w1 lives"), 5);
        // The bulk connection is open: a stopped worker could not prove its key.
        let first = pattern::run(1 << 20, 2).expect("memory");
        agent.to("w1").call(hash, (&first,)).wait().expect("w1 lives");
        // Stopped, it takes only what the kernel buffers: the transfer is under way and cannot end.
        processes.worker(1).stop();
        let big = pattern::run(BIG, 1).expect("memory");
        let reply = agent.to("w1").call(hash, (&big,));
        halfway(address(&agent, 1).port());
        let killed = Instant::now();
        processes.kill(1);
        assert_lost(reply.wait(), "test::hash", Stage::Waiting);
        println!("told within {:?}", killed.elapsed());
        assert!(killed.elapsed() < TOLD_WITHIN, "{:?}", killed.elapsed());
        // The storage is the caller's again, and others take it whole.
        let expected = hash::run(big.clone()).expect("bytes");
        assert_eq!(agent.to("w2").call(hash, (&big,)).wait().expect("w2 lives"), expected);
        eventually("nobody but this test holds the tensor", Duration::from_secs(5), {
            let mut held = Some(big);
            move || {
                let (layout, storage) =
                    held.take().map(|big| (big.layout().clone(), big.storage().clone())).expect("held");
                match storage.try_unique() {
                    Ok(_) => true,
                    Err(storage) => {
                        held = Some(Tensor::from_storage(storage, layout).expect("as before"));
                        false
                    }
                }
            }
        });
        processes.shutdown(&agent);
    });
}

#[test]
fn a_worker_killed_while_it_sends_64_mib_fails_the_call() {
    bounded(|| {
        let (mut processes, agent) = Processes::serving_over_tcp(2);
        // Once before, so that the bulk connection is open: a stopped caller would not open it.
        let key = unique("sends");
        agent.to("w1").call(open, (&key,)).wait().expect("w1 lives");
        let opened = agent.to("w2").call(pattern_there, ("w1", &key, 100_000)).wait();
        assert_eq!(opened.expect("w2 lives"), "no error");
        let key = unique("sends");
        let reply = agent.to("w2").call(pattern_there, ("w1", &key, BIG));
        assert!(agent.to("w1").call(arrived, (&key, 1)).wait().expect("w1 lives"));
        // Its caller is stopped: what w1 sends stays in the kernel's buffers, and w1 in the middle of it.
        processes.worker(2).signal(Signal::STOP);
        agent.to("w1").call(open, (&key,)).wait().expect("w1 lives");
        halfway(address(&agent, 1).port());
        processes.kill(1);
        let killed = Instant::now();
        processes.worker(2).signal(Signal::CONT);
        let text = reply.wait().expect("w2 lives");
        println!("told within {:?}: {text}", killed.elapsed());
        assert!(text.starts_with("test::pattern_after on w1: lost w1 while waiting for the reply"), "{text}");
        assert!(killed.elapsed() < TOLD_WITHIN, "{:?}", killed.elapsed());
        let back = agent.to("w2").call(pattern, (BIG, 2)).wait().expect("w2 lives");
        assert_eq!(hash::run(back).expect("bytes"), hash::run(pattern::run(BIG, 2).expect("memory")).expect("bytes"));
        processes.shutdown(&agent);
    });
}

#[test]
fn a_worker_that_exits_without_a_word_is_a_lost_one() {
    bounded(|| {
        let (mut processes, agent) = Processes::serving(2);
        let key = unique("exits");
        let waiting = agent.to("w1").call(hold, (&key,));
        assert!(agent.to("w1").call(arrived, (&key, 1)).wait().expect("w1 lives"));
        let started = Instant::now();
        assert_lost(agent.to("w1").call(quit, (0,)).wait(), "test::quit", Stage::Waiting);
        assert_lost(waiting.wait(), "test::hold", Stage::Waiting);
        assert!(started.elapsed() < TOLD_WITHIN, "{:?}", started.elapsed());
        assert!(processes.workers[1].take().expect("a process").end().status.success());
        assert_lost(agent.to("w1").call(add, (2, 3)).wait(), "test::add", Stage::Connecting);
        assert_eq!(agent.to("w2").call(add, (2, 3)).wait().expect("w2 lives"), 5);
        processes.shutdown(&agent);
    });
}

/// How soon the kernel tells a death on this host, whatever the dead leave behind.
const DIED_WITHIN: Duration = Duration::from_millis(100);

/// Kills a worker; gives how soon those who wait for it were told.
fn told_of_death(processes: &mut Processes, agent: &Agent, killed: usize) -> Duration {
    let key = unique("at-once");
    let target = agent.to(killed as u32);
    let waiting = target.call(hold, (&key,));
    let awaited = target.call(hold, (&key,)).into_future();
    assert!(target.call(arrived, (&key, 2)).wait().expect("it lives"));
    let waiter = std::thread::spawn(move || (waiting.wait(), Instant::now()));
    let started = Instant::now();
    processes.worker(killed).signal(Signal::KILL);
    let awaited = block_on(awaited);
    let told = started.elapsed();
    let (waited, at) = waiter.join().expect("no panic");
    for outcome in [waited, awaited] {
        let error = assert_lost(outcome, "test::hold", Stage::Waiting);
        let CallError::PeerLost { cause, .. } = &error else { unreachable!("checked above") };
        assert!(matches!(**cause, CloseCause::Died | CloseCause::PeerLost { .. }), "{cause}");
    }
    told.max(at - started)
}

#[test]
fn a_death_is_told_at_once_though_a_gibibyte_is_to_be_freed() {
    bounded(|| {
        let (mut processes, agent) = Processes::serving_near(2);
        agent.to("w1").call(keep_mib, (1024,)).wait().expect("memory");
        let told = told_of_death(&mut processes, &agent, 1);
        println!("told within {told:?}");
        assert!(told < DIED_WITHIN, "{told:?}");
        processes.kill(1);
        processes.shutdown(&agent);
    });
}

/// The dead worker's sockets live on in a child: no connection ends.
#[test]
fn a_death_is_told_at_once_though_a_child_holds_the_sockets() {
    bounded(|| {
        let (mut processes, agent) = Processes::serving_near(2);
        let heir = agent.to("w1").call(leave_an_heir, ()).wait().expect("a child");
        let told = told_of_death(&mut processes, &agent, 1);
        println!("told within {told:?}");
        assert!(told < DIED_WITHIN, "{told:?}");
        let heir = rustix::process::Pid::from_raw(heir as i32).expect("a process");
        rustix::process::kill_process(heir, Signal::KILL).expect("it lives on");
        processes.kill(1);
        processes.shutdown(&agent);
    });
}

/// FORK: the child has no agent, and holds no connection of its parent, whose death is seen by any socket.
#[test]
fn a_forked_child_is_refused_and_keeps_no_connection() {
    bounded(|| {
        let (mut processes, agent) = Processes::serving_over_tcp(2);
        let (child, found) = agent.to("w1").call(fork, (unique("fork"),)).wait().expect("a fork");
        let calls = "wait: refused, call: refused, shutdown: refused, join: refused";
        assert_eq!(found, format!("{calls}, tensor: refused, memory: refused, slabs: refused"));
        assert_eq!(agent.to("w1").call(add, (2, 3)).wait().expect("the parent goes on"), 5);
        let told = told_of_death(&mut processes, &agent, 1);
        println!("told within {told:?}");
        assert!(told < DIED_WITHIN, "{told:?}");
        let child = rustix::process::Pid::from_raw(child).expect("a process");
        rustix::process::kill_process(child, Signal::KILL).expect("it lives on");
        processes.kill(1);
        processes.shutdown(&agent);
    });
}

/// A stopped process keeps its connections, and says nothing: that is how it is known. It is served again when it goes on.
#[test]
fn a_stopped_worker_is_lost_within_two_seconds_until_it_goes_on() {
    bounded(|| {
        let (processes, agent) = Processes::serving(2);
        let key = unique("stopped");
        let w1 = agent.to("w1");
        let waiting = w1.call(hold, (&key,));
        let awaited = w1.call(hold, (&key,)).into_future();
        assert!(w1.call(arrived, (&key, 2)).wait().expect("w1 lives"));
        let stopped = Instant::now();
        processes.worker(1).stop();
        let error = w1.deadline(Duration::from_millis(200)).call(add, (2, 3)).wait();
        assert!(matches!(error, Err(CallError::Deadline { .. })), "{error:?}");
        let waiter = std::thread::spawn(move || waiting.wait());
        for outcome in [block_on(awaited), waiter.join().expect("no panic")] {
            let error = assert_lost(outcome, "test::hold", Stage::Waiting);
            let CallError::PeerLost { cause, .. } = &error else { unreachable!("checked above") };
            assert!(matches!(**cause, CloseCause::Silent { .. }), "{cause}");
        }
        println!("a stop was told within {:?}", stopped.elapsed());
        assert!(stopped.elapsed() < TOLD_WITHIN, "{:?}", stopped.elapsed());

        step("a call to the stopped worker");
        let called = Instant::now();
        let error = assert_lost(w1.call(add, (2, 3)).wait(), "test::add", Stage::Connecting);
        println!("{error}, within {:?}", called.elapsed());
        assert!(called.elapsed() < TOLD_WITHIN, "{:?}", called.elapsed());
        assert_eq!(agent.to("w2").call(add, (2, 3)).wait().expect("w2 lives"), 5);
        processes.worker(1).signal(Signal::CONT);
        assert_eq!(w1.call(add, (2, 3)).wait().expect("w1 goes on"), 5);
        w1.call(open, (&key,)).wait().expect("w1 goes on");
        processes.shutdown(&agent);
    });
}

/// Heartbeats depend on no handler: not on one that computes, nor on one that computes where frames are read.
#[test]
fn a_worker_that_computes_for_longer_than_the_timeout_lives() {
    bounded(|| {
        let (processes, agent) = Processes::serving(2);
        let spinning = agent.to("w1").call(spin, (2500,));
        let spinning_inline = agent.to("w2").call(spin_inline, (2500,));
        assert_eq!(agent.to("w1").call(add, (2, 3)).wait().expect("w1 lives"), 5);
        assert!(spinning.wait().expect("w1 lives"));
        assert!(spinning_inline.wait().expect("w2 lives"));
        processes.shutdown(&agent);
    });
}
