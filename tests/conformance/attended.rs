//! A thread that stays with one ring, as calls come by it one after the other: nothing waits for that thread alone.

use std::time::{Duration, Instant};

use farcall::{Spin, To, Transport};

use crate::functions::{add, gate, hold};
use crate::harness::{Group, bounded, eventually, step, unique};

/// Two workers with a ring between them, whatever the suite's sockets are, that `w1` attends; threads sleep as soon as they may. In a
/// busy minute it may go: `attend` has it come again.
fn attended() -> Group {
    let group = Group::with(2, |options| {
        (options.transport, options.tls, options.spin) = (Transport::Auto, None, Spin::Off);
    });
    attend(&group, &group.agents[0].to("w1"));
    group
}

/// Calls until `w1` attends, by a function that its jobs' cost knows to be short.
fn attend(group: &Group, w1: &To<'_>) {
    let open = unique("open");
    gate(&open).open();
    let deadline = Instant::now() + Duration::from_secs(30);
    while !group.agents[1].attends() {
        assert!(Instant::now() < deadline, "nobody attends a ring that wakes the leader again and again");
        (0..64).for_each(|_| assert!(w1.call(hold, (&open,)).wait().expect("an answer")));
    }
}

#[test]
fn a_short_job_that_turns_out_long_delays_no_other_call() {
    bounded(|| {
        let group = attended();
        let w1 = group.agents[0].to("w1");
        for round in 0..10 {
            step(format_args!("round {round}"));
            let key = unique("long");
            attend(&group, &w1);
            let long = w1.call(hold, (&key,));
            assert!(gate(&key).wait_arrived(1));
            (0..20).for_each(|index| assert_eq!(w1.call(add, (index, 3)).wait().expect("a sum"), index + 3));
            assert!(!long.is_done());
            gate(&key).open();
            assert!(long.wait().expect("an answer"));
        }
        group.shutdown();
    });
}

#[test]
fn both_sides_call_each_other_beside_an_attendant() {
    bounded(|| {
        let group = attended();
        for round in 0..20 {
            step(format_args!("round {round}"));
            attend(&group, &group.agents[0].to("w1"));
            std::thread::scope(|scope| {
                for (from, to) in [(0, "w1"), (1, "w0"), (1, "w0")] {
                    let to = group.agents[from].to(to);
                    scope.spawn(move || {
                        for index in 0..100 {
                            assert_eq!(to.call(add, (index, 1)).wait().expect("a sum"), index + 1);
                        }
                    });
                }
            });
        }
        group.shutdown();
    });
}

#[test]
fn many_calls_at_once_and_silence_end_the_stay() {
    bounded(|| {
        let group = attended();
        let w1 = group.agents[0].to("w1");
        let calls: Vec<_> = (0..1000).map(|index| (index, w1.call(add, (index, 1)))).collect();
        for (index, call) in calls {
            assert_eq!(call.wait().expect("a sum"), index + 1);
        }
        attend(&group, &w1);
        eventually("the attendant of a silent ring goes", Duration::from_secs(5), || !group.agents[1].attends());
        group.answers();
        group.shutdown();
    });
}

#[test]
fn an_attendant_goes_with_its_peer_and_with_its_own_agent() {
    bounded(|| {
        let group = attended();
        group.agents[0].abort();
        eventually("the attendant of a lost peer goes", Duration::from_secs(5), || !group.agents[1].attends());
        let group = attended();
        group.shutdown();
    });
}
