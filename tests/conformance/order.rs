//! What delays what: nothing waits behind a large payload, a slow handler or a lost reply.

use std::time::Duration;

use crate::functions::{add, gate, hold, order, order_with, pattern};
use crate::harness::{Group, bounded, step, unique};

/// R1. The handler of a call starts when its bytes are there, so the order of starts tells who waited for whom.
#[test]
fn a_small_call_overtakes_a_large_one_sent_before_it() {
    bounded(|| {
        // In a slab the large one would be there first.
        let group = Group::with(2, |options| options.slabs = false);
        let w1 = group.agents[0].to("w1");
        let large = pattern::run(64 << 20, 1).expect("memory");
        // Should this thread be put aside between the two calls, the large one may win; never if small ones overtook.
        let overtook = (0..5).any(|_| {
            let key = unique("order");
            let large = w1.call(order_with, (&key, &large));
            let small = w1.call(order, (&key,)).wait().expect("a number");
            let large = large.wait().expect("a number");
            assert_eq!(small + large, 3);
            small < large
        });
        assert!(overtook, "the small call waited for the large one in all rounds");
        group.shutdown();
    });
}

#[test]
fn a_slow_handler_delays_no_other_call() {
    bounded(|| {
        let group = Group::new(2);
        let (w1, key) = (group.agents[0].to("w1"), unique("slow"));
        let slow = w1.call(hold, (&key,));
        assert!(gate(&key).wait_arrived(1));
        for _ in 0..100 {
            assert_eq!(w1.call(add, (2, 3)).wait().expect("a sum"), 5);
        }
        assert!(!slow.is_done());
        gate(&key).open();
        assert!(slow.wait().expect("an answer"));
        group.shutdown();
    });
}

#[test]
fn calls_of_one_thread_reach_the_callee_in_their_order() {
    bounded(|| {
        let group = Group::new(2);
        let (w1, key) = (group.agents[0].to("w1"), unique("sequence"));
        // One at a time: the next is sent when the last one's reply is there.
        let seen: Vec<u64> = (0..50).map(|_| w1.call(order, (&key,)).wait().expect("a number")).collect();
        assert!(seen.iter().copied().eq(1..=50));
        group.shutdown();
    });
}

#[test]
fn a_reply_that_nobody_wants_or_that_came_too_late_disturbs_no_later_call() {
    bounded(|| {
        let group = Group::new(2);
        let (w1, key) = (group.agents[0].to("w1"), unique("late"));
        for _ in 0..10 {
            w1.call(hold, (&key,)).detach();
        }
        let late = w1.deadline(Duration::from_millis(300)).call(hold, (&key,));
        assert!(gate(&key).wait_arrived(11));
        assert!(late.wait().is_err());
        // The late replies arrive among these.
        gate(&key).open();
        for index in 0..1000 {
            step(format_args!("call {index}"));
            assert_eq!(w1.call(add, (index, 1)).wait().expect("a sum"), index + 1);
        }
        group.shutdown();
    });
}
