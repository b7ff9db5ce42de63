//! The ways to wait for a reply.

use std::pin::pin;
use std::time::Duration;

use farcall::device::join_all;
use farcall::{Device, Tensor};

use crate::functions::{add, echo, gate, hold, hold_async, parse};
use crate::harness::{Group, block_on, bounded, counting, unique};

#[test]
fn on_gives_a_value_ordered_on_a_stream() {
    bounded(|| {
        let group = Group::new(2);
        let (agent, x) = (&group.agents[0], counting(&[2, 3]));
        let stream = agent.runtime().stream(Device::HOST).expect("a host stream");
        let y: Tensor = block_on(agent.to("w1").call(echo, (&x,)).on(&stream)).expect("an echo");
        let y = y.transpose(0, 1).expect("two dimensions").contiguous(&stream).expect("a copy in stream order");
        stream.synchronize(Duration::from_secs(10)).expect("the stream's work ends");
        assert_eq!(y.as_slice::<f32>().expect("f32"), [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
        let error = block_on(agent.to("w1").call(parse, ("x",)).on(&stream));
        assert!(error.is_err(), "errors come this way too");
        group.shutdown();
    });
}

#[test]
fn on_each_orders_a_value_on_several_streams() {
    bounded(|| {
        let group = Group::new(2);
        let agent = &group.agents[0];
        let streams = [(); 2].map(|()| agent.runtime().stream(Device::HOST).expect("a host stream"));
        let y = block_on(agent.to("w1").call(echo, (counting(&[3]),)).on_each(&streams)).expect("an echo");
        assert_eq!(y.as_slice::<f32>().expect("f32"), [0.0, 1.0, 2.0]);
        group.shutdown();
    });
}

#[test]
fn a_future_is_mapped_before_it_is_awaited() {
    bounded(|| {
        let group = Group::new(2);
        let w1 = group.agents[0].to("w1");
        let mapped = w1.call(add, (2, 3)).future().map(|sum| sum * 10);
        assert_eq!(block_on(mapped).expect("a product"), 50);
        let row = w1.call(echo, (counting(&[2, 3]),)).future().map(|y| y.select(0, 1));
        let row = row.map_result(|row| row.and_then(|row| Ok(row?)));
        assert_eq!(row.wait(Duration::from_secs(10)).expect("a row").as_slice::<f32>().expect("f32"), [3.0, 4.0, 5.0]);
        let failed = w1.call(parse, ("x",)).future().map(|number| number + 1);
        assert!(block_on(failed).is_err());
        group.shutdown();
    });
}

#[test]
fn join_all_gives_all_values_in_order() {
    bounded(|| {
        let group = Group::new(3);
        let futures = (0..100_u32).map(|index| group.agents[0].to(index % 3).call(add, (i64::from(index), 1)).future());
        let sums = block_on(join_all(futures)).expect("sums");
        assert!(sums.into_iter().eq(1..=100));
        group.shutdown();
    });
}

#[test]
fn join_all_gives_the_first_failure() {
    bounded(|| {
        let group = Group::new(2);
        let (w1, key) = (group.agents[0].to("w1"), unique("join"));
        let held = w1.call(hold_async, (&key, 1)).future();
        let failing = w1.call(parse, ("x",)).future().map(i64::from);
        let error = block_on(join_all([held, failing])).expect_err("one fails, one never ends");
        assert!(error.to_string().contains("invalid digit"), "{error}");
        gate(&key).open();
        group.shutdown();
    });
}

/// Losing a `select!` loses neither the call nor its value.
#[test]
fn a_reply_is_polled_by_reference_until_it_is_there() {
    bounded(|| {
        let group = Group::new(2);
        let (w1, key) = (group.agents[0].to("w1"), unique("select"));
        block_on(async {
            let mut reply = pin!(w1.call(hold, (&key,)).into_future());
            for _ in 0..3 {
                tokio::select! {
                    biased;
                    _ = &mut reply => panic!("the gate is closed"),
                    () = tokio::task::yield_now() => {}
                }
            }
            gate(&key).open();
            assert!(reply.await.expect("an answer"));
        });
        group.shutdown();
    });
}

#[test]
fn a_reply_may_be_waited_for_on_another_thread_than_it_was_called_on() {
    bounded(|| {
        let group = Group::new(2);
        let replies: Vec<_> = (0..16).map(|x| group.agents[0].to("w1").call(add, (x, 1))).collect();
        let threads: Vec<_> = replies.into_iter().map(|reply| std::thread::spawn(move || reply.wait())).collect();
        for (thread, x) in threads.into_iter().zip(0..) {
            assert_eq!(thread.join().expect("no panic").expect("a sum"), x + 1);
        }
        group.shutdown();
    });
}
