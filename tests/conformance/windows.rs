//! How much may be on the wire to one worker; what is more waits at the caller, and is told why.

use std::time::Duration;

use farcall::prelude::*;
use farcall::{Stage, Transport};

use crate::functions::{add, bytes_inline, echo, gate, hash_after, hold, hold_async, pattern, relay, spin_inline};
use crate::harness::{Group, block_on, bounded, counting, eventually, step, unique};

fn with_window(requests: usize, bytes: u64) -> Group {
    Group::with(2, |options| {
        options.limits.requests_max = requests;
        options.limits.request_bytes_max = bytes;
    })
}

#[test]
fn calls_beyond_the_window_wait_and_complete_in_order() {
    bounded(|| {
        let group = with_window(8, 1 << 30);
        let (w1, key) = (group.agents[0].to("w1"), unique("window"));
        let held: Vec<_> = (0..20).map(|index| w1.call(hold_async, (&key, index)).into_future()).collect();
        assert!(gate(&key).wait_arrived(8));
        // A round trip later no more have come.
        assert_eq!(group.agents[1].to("w0").call(add, (1, 2)).wait().expect("the other direction is free"), 3);
        assert_eq!((gate(&key).arrived(), group.agents[0].in_flight()), (8, 20));

        step("a deadline while waiting for a place");
        let error = w1.deadline(Duration::from_millis(50)).call(add, (1, 2)).wait().expect_err("no place");
        let CallError::Deadline { stage, .. } = &error else { panic!("{error}") };
        assert_eq!(*stage, Stage::Queued, "{error}");
        let error =
            block_on(w1.deadline(Duration::from_millis(50)).call(add, (1, 2)).into_future()).expect_err("no place");
        assert!(matches!(error, CallError::Deadline { stage: Stage::Queued, .. }), "{error}");
        step("cancelled while waiting for a place");
        drop(w1.call(hold, (&key,)));

        gate(&key).open();
        for (index, held) in held.into_iter().enumerate() {
            assert_eq!(block_on(held).expect("its turn came"), index as i64);
        }
        assert_eq!(gate(&key).arrived(), 20, "the cancelled one was never sent");
        assert_eq!(group.agents[0].in_flight(), 0);
        group.answers();
        group.shutdown();
    });
}

#[test]
fn requests_wait_for_bytes_and_a_single_one_may_have_more() {
    bounded(|| {
        let group = with_window(100, 1 << 20);
        let (w1, key) = (group.agents[0].to("w1"), unique("bytes"));
        let half = pattern::run(384 << 10, 1).expect("memory");
        let whole = counting(&[1 << 20]); // 4 MiB
        let held: Vec<_> = (0..5).map(|_| w1.call(hash_after, (&key, &half))).collect();
        assert!(gate(&key).wait_arrived(2));
        assert_eq!(gate(&key).arrived(), 2, "a third would be above one MiB");
        let large = w1.call(echo, (&whole,));
        gate(&key).open();
        for held in held {
            held.wait().expect("its turn came");
        }
        assert_eq!(large.wait().expect("alone").to_vec::<f32>().expect("f32"), whole.to_vec::<f32>().expect("f32"));
        group.answers();
        group.shutdown();
    });
}

#[test]
fn ten_thousand_calls_of_one_caller_at_once_complete() {
    bounded(|| {
        let group = Group::new(2);
        let w1 = group.agents[0].to("w1");
        for round in 0..3 {
            step(format_args!("round {round}"));
            let calls: Vec<_> = (0..10_000).map(|index| w1.call(add, (index, 1)).into_future()).collect();
            for (index, call) in calls.into_iter().enumerate() {
                assert_eq!(block_on(call).expect("a sum"), index as i64 + 1);
            }
            assert_eq!(group.agents[0].in_flight(), 0);
        }
        group.shutdown();
    });
}

#[test]
fn more_calls_than_may_wait_are_refused_at_once() {
    bounded(|| {
        let group = with_window(1, 1 << 30);
        let (w1, key) = (group.agents[0].to("w1"), unique("full"));
        let mut held: Vec<_> = (0..1_i64 << 16).map(|index| w1.call(hold_async, (&key, index))).collect();
        let error = w1.call(add, (1, 2)).wait().expect_err("too many");
        assert!(matches!(error, CallError::Overloaded { in_flight: 65536, .. }), "{error}");
        // Dropped unsent, all but the first: they leave nothing behind.
        held.truncate(1);
        gate(&key).open();
        assert_eq!(held.remove(0).wait().expect("the first"), 0);
        eventually("no call is in flight", Duration::from_secs(5), || group.agents[0].in_flight() == 0);
        assert_eq!(gate(&key).arrived(), 1);
        group.answers();
        group.shutdown();
    });
}

#[test]
fn handlers_beyond_their_limit_wait_for_a_turn() {
    bounded(|| {
        let group = Group::with(2, |options| options.handlers_max = 2);
        let (w1, key) = (group.agents[0].to("w1"), unique("handlers"));
        let held: Vec<_> = (0..6).map(|_| w1.call(hold, (&key,))).collect();
        assert!(gate(&key).wait_arrived(2));
        // Inline handlers, and those that hold no thread, need none.
        assert!(w1.call(spin_inline, (0,)).wait().expect("inline"));
        assert_eq!(gate(&key).arrived(), 2);
        gate(&key).open();
        assert!(held.into_iter().all(|held| held.wait().expect("its turn came")));
        group.shutdown();
    });
}

/// Each of the 64 waits for the next in its thread, and there is room for one.
#[test]
fn nested_calls_complete_with_a_single_handler_at_a_time() {
    bounded(|| {
        let group = Group::with(2, |options| options.handlers_max = 1);
        let through: Vec<String> = (0..64).map(|depth| format!("w{}", depth % 2)).collect();
        assert_eq!(group.agents[0].to("w1").call(relay, (&through, 0)).wait().expect("a sum"), 65);
        // All to oneself, by no socket.
        let through: Vec<String> = vec!["w1".to_owned(); 64];
        assert_eq!(group.agents[0].to("w1").call(relay, (&through, 0)).wait().expect("a sum"), 65);
        group.shutdown();
    });
}

/// Over TCP, calls that are made at once leave together. Nobody waits for these, and no answer comes that would take them along.
#[test]
fn calls_that_nobody_waits_for_leave_soon_though_many_are_made_at_once() {
    bounded(|| {
        let group = Group::with(2, |options| options.transport = Transport::Tcp);
        let (w1, key) = (group.agents[0].to("w1"), unique("gathered"));
        for round in 1..=5 {
            (0..100).for_each(|index| w1.call(hold_async, (&key, index)).detach());
            assert!(gate(&key).wait_arrived(100 * round), "{}", gate(&key).arrived());
        }
        // A call behind them, and a task that waits for one.
        (0..100).for_each(|index| w1.call(hold_async, (&key, index)).detach());
        assert_eq!(w1.call(add, (1, 2)).wait().expect("a sum"), 3);
        (0..100).for_each(|index| w1.call(hold_async, (&key, index)).detach());
        assert_eq!(block_on(w1.call(add, (1, 2)).into_future()).expect("a sum"), 3);
        assert!(gate(&key).wait_arrived(700));
        gate(&key).open();
        group.answers();
        group.shutdown();
    });
}

/// Answers of one batch that fill a ring to its last byte, for tasks that wait: whoever brings them must be woken.
#[test]
fn answers_that_fill_a_ring_are_told_of() {
    bounded(|| {
        let group = Group::new(2);
        let w1 = group.agents[0].to("w1");
        assert_eq!(w1.call(bytes_inline, (1_usize,)).wait().expect("bytes"), [7]);
        for round in 0..10 {
            step(format_args!("round {round}"));
            // All the others wait to be read meanwhile.
            let first = w1.call(spin_inline, (20,)).into_future();
            // With its header, and the bytes of its length, an answer has 4096 bytes: 32 are 128 KiB, the first two together are one.
            let lens = std::iter::once(4030 - 65).chain([4030; 40]);
            let calls: Vec<_> = lens.map(|len| (len, w1.call(bytes_inline, (len,)).into_future())).collect();
            assert!(block_on(first).expect("an answer"));
            for (len, call) in calls {
                assert_eq!(block_on(call).expect("bytes").len(), len);
            }
        }
        group.shutdown();
    });
}

/// Much waits on both sides for the other to read: neither may stop reading for that.
#[test]
fn two_workers_that_flood_each_other_lose_nothing() {
    // The first calls go while slabs and rings are being agreed on, in an order of chance.
    (0..6).for_each(|_| bounded(flood_each_other));
}

fn flood_each_other() {
    let group = Group::with(2, |options| options.limits.backlog_bytes_max = 256 << 10);
    let x = counting(&[15 << 10]); // 60 KiB: inline
    let flood = |from: usize, to: &'static str| -> Vec<_> {
        (0..1000).map(|_| group.agents[from].to(to).call(echo, (&x,)).into_future()).collect()
    };
    let calls = [flood(0, "w1"), flood(1, "w0")];
    for call in calls.into_iter().flatten() {
        assert_eq!(block_on(call).expect("an echo").numel(), 15 << 10);
    }
    group.shutdown();
}

/// Cancelled at every moment between their making and their answer, calls leave no place taken.
#[test]
fn calls_that_are_dropped_at_any_moment_keep_no_place() {
    bounded(|| {
        let group = with_window(2, 1 << 30);
        let w1 = group.agents[0].to("w1");
        let flooding = std::thread::spawn({
            let agent = group.agents[0].clone();
            move || {
                for round in 0..5000_i64 {
                    let reply = agent.to("w1").call(add, (round, 1));
                    if round % 3 == 0 {
                        std::thread::yield_now();
                    }
                    drop(reply);
                }
            }
        });
        for round in 0..3000 {
            assert_eq!(w1.call(add, (round, 1)).wait().expect("a place"), round + 1);
        }
        flooding.join().expect("no panic");
        group.answers();
        group.shutdown();
    });
}
