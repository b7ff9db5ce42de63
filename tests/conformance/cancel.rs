//! Calls that nobody waits for any more: they end, at the callee and down the chain.

use std::time::{Duration, Instant};

use farcall::prelude::*;

use crate::functions::{add, blocked_in, gate, hold_async, linger, remaining, remaining_there, until_cancelled};
use crate::harness::{Group, block_on, bounded, counting, eventually, unique};

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn settles(group: &Group) {
    for agent in &group.agents {
        eventually("no call is in flight", Duration::from_secs(5), || agent.in_flight() == 0);
    }
    group.answers();
}

#[test]
fn a_dropped_reply_ends_the_handlers_of_the_whole_chain() {
    bounded(|| {
        let group = Group::new(3);
        let key = unique("chain");
        let reply = group.agents[0].to("w1").call(linger, (names(&["w2"]), &key));
        let gates = ["w1", "w2"].map(|worker| gate(&format!("{key} {worker}")));
        assert!(gates.iter().all(|gate| gate.wait_arrived(1)));
        drop(reply);
        assert!(gates.iter().all(|gate| gate.wait_open()), "both handlers were dropped");
        settles(&group);
        group.shutdown();
    });
}

#[test]
fn a_dropped_call_to_oneself_ends_its_handler() {
    bounded(|| {
        let group = Group::new(2);
        let key = unique("self");
        let future = group.agents[0].to("w0").call(linger, (names(&["w1"]), &key)).into_future();
        let gates = ["w0", "w1"].map(|worker| gate(&format!("{key} {worker}")));
        assert!(gates.iter().all(|gate| gate.wait_arrived(1)));
        drop(future);
        assert!(gates.iter().all(|gate| gate.wait_open()), "both handlers were dropped");
        settles(&group);
        group.shutdown();
    });
}

#[test]
fn a_handler_that_blocks_is_told() {
    bounded(|| {
        let group = Group::new(3);
        let w1 = group.agents[0].to("w1");
        let (computing, blocked) = (unique("computing"), unique("blocked"));
        let there = gate(&format!("{blocked} there"));
        let replies = [w1.call(until_cancelled, (&computing,)), w1.call(blocked_in, ("w2", &blocked))];
        assert!(gate(&computing).wait_arrived(1) && there.wait_arrived(1));
        drop(replies);
        assert!(gate(&computing).wait_open(), "it was told when it asked");
        assert!(gate(&blocked).wait_open(), "its own call was cancelled");
        there.open();
        settles(&group);
        group.shutdown();
    });
}

#[test]
fn a_deadline_cancels_at_the_callee() {
    bounded(|| {
        let group = Group::new(2);
        let key = unique("deadline");
        let w1 = group.agents[0].to("w1").deadline(Duration::from_millis(100));
        let outcome = w1.call(linger, (names(&[]), &key)).wait();
        assert!(matches!(outcome, Err(CallError::Deadline { .. })), "{outcome:?}");
        assert!(gate(&format!("{key} w1")).wait_open(), "its handler was dropped");
        let outcome = block_on(w1.call(until_cancelled, (&key,)).into_future());
        assert!(matches!(outcome, Err(CallError::Deadline { .. })), "{outcome:?}");
        assert!(gate(&key).wait_open());
        settles(&group);
        group.shutdown();
    });
}

#[test]
fn handlers_end_when_their_caller_leaves_without_them() {
    bounded(|| {
        let group = Group::new(2);
        let key = unique("caller");
        let reply = group.agents[0].to("w1").call(linger, (names(&[]), &key));
        let gate = gate(&format!("{key} w1"));
        assert!(gate.wait_arrived(1));
        group.agents[0].abort();
        assert!(gate.wait_open(), "its handler was dropped");
        assert!(reply.wait().is_err());
    });
}

#[test]
fn a_detached_call_goes_on() {
    bounded(|| {
        let group = Group::new(2);
        let key = unique("detached");
        group.agents[0].to("w1").call(hold_async, (&key, 1)).detach();
        assert!(gate(&key).wait_arrived(1));
        group.answers();
        assert_eq!(group.agents[0].in_flight(), 1);
        gate(&key).open();
        settles(&group);
        group.shutdown();
    });
}

/// Before its payload is in, a request is known to the callee's connection only.
#[test]
fn requests_that_are_cancelled_while_their_payload_travels_leave_nothing_behind() {
    bounded(|| {
        let group = Group::new(2);
        let w1 = group.agents[0].to("w1");
        let x = counting(&[4 << 20]);
        for round in 0..20 {
            let reply = w1.call(crate::functions::echo, (&x,));
            if round % 2 == 0 {
                w1.call(add, (1, 2)).wait().expect("a sum");
            }
            drop(reply);
        }
        settles(&group);
        group.shutdown();
    });
}

#[test]
fn deadlines_shrink_along_nested_calls() {
    bounded(|| {
        let group = Group::new(3);
        let w1 = group.agents[0].to("w1").deadline(Duration::from_secs(20));
        let started = Instant::now();
        let direct = w1.call(remaining, ()).wait().expect("a time").expect("a deadline");
        let nested = w1.call(remaining_there, ("w2",)).wait().expect("a time").expect("a deadline");
        let most = Duration::from_secs(20).as_micros() as u64;
        assert!(nested <= most && direct <= most, "{nested} {direct}");
        let least = most.saturating_sub(started.elapsed().as_micros() as u64);
        assert!(nested >= least, "{nested} of at least {least}");
        group.shutdown();
    });
}

#[test]
fn a_call_that_is_made_in_the_name_of_a_cancelled_one_is_cancelled() {
    bounded(|| {
        let group = Group::new(2);
        let key = unique("blocked");
        let reply = group.agents[0].to("w1").call(blocked_in, ("w1", &key));
        let there = gate(&format!("{key} there"));
        assert!(there.wait_arrived(1));
        drop(reply);
        assert!(gate(&key).wait_open());
        there.open();
        settles(&group);
        group.shutdown();
    });
}
