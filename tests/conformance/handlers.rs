//! Handlers of every kind, alone, nested and many at once.

use std::thread;
use std::time::Duration;

use crate::functions::{
    add, caller, echo, echo_async, echo_inline, echo_later, gate, hold, hold_async, meet, relay, relay_async, remaining,
};
use crate::harness::{Group, block_on, bounded, counting, step, unique};

#[test]
fn sync_inline_and_async_handlers_answer() {
    bounded(|| {
        let group = Group::new(2);
        let (w1, x) = (group.agents[0].to("w1"), counting(&[3]));
        let blocking = [
            w1.call(echo, (&x,)).wait(),
            w1.call(echo_inline, (&x,)).wait(),
            w1.call(echo_async, (&x,)).wait(),
            w1.call(echo_later, (&x,)).wait(),
        ];
        let awaited = block_on(async {
            [
                w1.call(echo, (&x,)).await,
                w1.call(echo_inline, (&x,)).await,
                w1.call(echo_async, (&x,)).await,
                w1.call(echo_later, (&x,)).await,
            ]
        });
        for y in blocking.into_iter().chain(awaited) {
            assert_eq!(y.expect("an echo").as_slice::<f32>().expect("f32"), [0.0, 1.0, 2.0]);
        }
        group.shutdown();
    });
}

#[test]
fn a_worker_is_called_by_name_by_rank_and_by_id() {
    bounded(|| {
        let group = Group::with(3, |options| options.name = Some(format!("worker-{}", options.rank)));
        let agent = &group.agents[0];
        let w2 = agent.workers().nth(2).expect("w2");
        for to in [agent.to("worker-2"), agent.to(2), agent.to(&w2.id)] {
            assert_eq!(to.call(relay, (Vec::new(), 0)).wait().expect("an answer"), 1);
        }
        let (name, rank, function) = agent.to("worker-2").call(caller, ()).wait().expect("a caller");
        assert_eq!((name.as_str(), rank, function.as_str()), ("worker-0", 0, "test::caller"));
        let (name, rank, _) = group.agents[2].to(0).call(caller, ()).wait().expect("a caller");
        assert_eq!((name.as_str(), rank), ("worker-2", 2));
        group.shutdown();
    });
}

#[test]
fn a_worker_calls_itself() {
    bounded(|| {
        let group = Group::new(1);
        let me = group.agents[0].to("w0");
        assert_eq!(me.call(add, (2, 3)).wait().expect("a sum"), 5);
        assert_eq!(block_on(me.call(add, (2, 3)).into_future()).expect("a sum"), 5);
        assert_eq!(me.call(caller, ()).wait().expect("a caller").0, "w0");
        let x = counting(&[100_000]);
        let y = me.call(echo_later, (&x,)).wait().expect("an echo");
        assert!(y.storage().is_same(x.storage()), "no byte was copied");
        let through = vec!["w0".to_owned(); 4];
        assert_eq!(me.call(relay, (&through, 0)).wait().expect("through itself"), 5);
        assert_eq!(me.call(relay_async, (&through, 0)).wait().expect("through itself"), 5);
        group.shutdown();
    });
}

#[test]
fn the_callee_knows_how_long_its_caller_waits() {
    bounded(|| {
        let group = Group::new(2);
        for to in ["w0", "w1"] {
            let to = group.agents[0].to(to).deadline(Duration::from_secs(20));
            let left = to.call(remaining, ()).wait().expect("a number").expect("a deadline");
            assert!((1_000_000..=20_000_000).contains(&left), "{left} µs of 20 s");
        }
        group.shutdown();
    });
}

/// w0 → w1 → w0 → w1 …, each blocking its thread in `wait`, while w0's own caller blocks too.
#[test]
fn workers_call_back_while_their_callers_block() {
    bounded(|| {
        let group = Group::new(2);
        let through: Vec<String> = (0..10).map(|hop| format!("w{}", hop % 2)).collect();
        assert_eq!(group.agents[0].to("w1").call(relay, (&through, 0)).wait().expect("there and back"), 11);
        assert_eq!(group.agents[0].to("w1").call(relay_async, (&through, 0)).wait().expect("there and back"), 11);
        // Eight at once, both ways.
        let replies: Vec<_> = (0..8)
            .map(|from| {
                (from % 2, group.agents[from % 2].to(1 - from as u32 % 2).call(relay, (&through[from % 2..], 0)))
            })
            .collect();
        for (from, reply) in replies {
            step(format_args!("a chain of calls from w{from}"));
            assert_eq!(reply.wait().expect("there and back"), 11 - from as i64);
        }
        group.shutdown();
    });
}

#[test]
fn handlers_that_wait_for_each_other_all_run() {
    bounded(|| {
        let group = Group::new(2);
        for count in [8, 32] {
            let key = unique("meet");
            let replies: Vec<_> = (0..count).map(|_| group.agents[0].to("w1").call(meet, (&key, count))).collect();
            for reply in replies {
                assert!(reply.wait().expect("an answer"), "{count} handlers met");
            }
        }
        group.shutdown();
    });
}

/// A function that was always quick, and so ran on the thread that reads, blocks all of a sudden.
#[test]
fn handlers_that_were_quick_so_far_may_block() {
    bounded(|| {
        let group = Group::new(2);
        let (w1, key) = (group.agents[0].to("w1"), unique("quick"));
        for _ in 0..200 {
            assert!(w1.call(meet, (&key, 0)).wait().expect("an answer"));
        }
        let replies: Vec<_> = (0..8).map(|_| w1.call(meet, (&key, 8))).collect();
        for reply in replies {
            assert!(reply.wait().expect("an answer"), "eight handlers met");
        }
        group.shutdown();
    });
}

/// The requests are read, several at a time, by the thread that waits for a reply, while other threads idle.
#[test]
fn handlers_that_wait_for_each_other_run_while_a_caller_reads_for_them() {
    bounded(|| {
        let group = Group::new(2);
        let held = unique("held");
        thread::scope(|scope| {
            let waiting = group.agents[0].to("w1").call(hold, (&held,));
            scope.spawn(move || assert!(waiting.wait().expect("an answer")));
            assert!(gate(&held).wait_arrived(1));
            for round in 0..100 {
                step(format_args!("round {round}"));
                let key = unique("meet");
                let replies: Vec<_> = (0..6).map(|_| group.agents[1].to("w0").call(meet, (&key, 6))).collect();
                for reply in replies {
                    let met = reply.wait().expect("an answer");
                    if !met {
                        gate(&held).open();
                    }
                    assert!(met, "six handlers met in round {round}");
                }
            }
            gate(&held).open();
        });
        group.shutdown();
    });
}

/// The same between a worker and itself, where no frame is read.
#[test]
fn handlers_of_calls_to_oneself_that_wait_for_each_other_all_run() {
    bounded(|| {
        let group = Group::new(1);
        let (me, key) = (group.agents[0].to(0), unique("meet"));
        for _ in 0..200 {
            assert!(me.call(meet, (&key, 0)).wait().expect("an answer"));
        }
        let replies: Vec<_> = (0..8).map(|_| me.call(meet, (&key, 8))).collect();
        for reply in replies {
            assert!(reply.wait().expect("an answer"), "eight handlers met");
        }
        group.shutdown();
    });
}

#[test]
fn sixty_four_threads_share_one_connection() {
    bounded(|| {
        let group = Group::new(2);
        thread::scope(|scope| {
            for thread in 0..64_i64 {
                let w1 = group.agents[0].to("w1");
                scope.spawn(move || {
                    for call in 0..100_i64 {
                        let sum = w1.call(add, (thread * 1000, call)).wait().expect("a sum");
                        assert_eq!(sum, thread * 1000 + call, "thread {thread}");
                    }
                });
            }
        });
        assert_eq!(group.agents[0].in_flight(), 0);
        group.shutdown();
    });
}

#[test]
fn a_thousand_calls_are_in_flight_from_one_thread() {
    bounded(|| {
        let group = Group::new(2);
        let key = unique("thousand");
        block_on(async {
            let replies: Vec<_> =
                (0..1000).map(|index| group.agents[0].to("w1").call(hold_async, (&key, index)).into_future()).collect();
            assert!(gate(&key).wait_arrived(1000), "all handlers run at once");
            assert_eq!(group.agents[0].in_flight(), 1000);
            gate(&key).open();
            for (index, reply) in replies.into_iter().enumerate() {
                assert_eq!(reply.await.expect("an answer"), index as i64);
            }
        });
        assert_eq!(group.agents[0].in_flight(), 0);
        group.shutdown();
    });
}

/// The callee may be called before its own `join` has returned; its handlers can call on all the same.
#[test]
fn handlers_call_on_as_soon_as_the_group_is_complete() {
    bounded(|| {
        for round in 0..30 {
            step(format_args!("round {round}"));
            // `Group::new` waits for everybody: here each goes on as soon as its own join returns.
            let store = farcall::StoreServer::bind("127.0.0.1:0").expect("a store");
            let (group, address) = (unique("early"), store.address().to_string());
            let workers: Vec<_> = (0..2)
                .map(|rank| {
                    let mut options = farcall::Options::new(rank, 2, address.clone());
                    (options.host_store, options.group) = (false, group.clone());
                    thread::spawn(move || {
                        let agent = farcall::Agent::join_blocking(options).expect("joins");
                        let other = agent.to(1 - rank);
                        let back = vec![format!("w{rank}")];
                        let outcome = other.call(relay, (&back, 0)).wait();
                        agent.shutdown_blocking().expect("leaves");
                        outcome.expect("there and back")
                    })
                })
                .collect();
            for worker in workers {
                assert_eq!(worker.join().expect("no panic"), 2);
            }
        }
    });
}

/// Each dials the other at the same moment; whichever connections come of it, both calls are answered.
#[test]
fn workers_that_call_each_other_first_at_the_same_time_are_both_answered() {
    bounded(|| {
        for round in 0..60 {
            step(format_args!("round {round}"));
            let group = Group::new(2);
            let start = std::sync::Barrier::new(4);
            thread::scope(|scope| {
                for index in 0..4_u32 {
                    let (to, start) = (group.agents[index as usize % 2].to(1 - index % 2), &start);
                    scope.spawn(move || {
                        start.wait();
                        assert_eq!(to.call(add, (2, 3)).wait().expect("a sum"), 5);
                    });
                }
            });
            group.answers();
        }
    });
}
