//! One call to several workers: packed once, each with an outcome of its own.

use std::sync::Arc;
use std::time::Duration;

use farcall::device::Config;
use farcall::prelude::*;
use farcall::{DeviceMap, Outcomes, Runtime, Stage};

use crate::functions::{add, device_of, gate, hash, hold, hold_async, pattern};
use crate::harness::{Group, block_on, bounded, eventually, step, unique};

fn values<T>(outcomes: Outcomes<T>) -> Vec<T> {
    outcomes.into_values().expect("all succeed").into_iter().map(|(_, value)| value).collect()
}

/// Workers of which each has its own memory, so that what one does to it is counted.
fn group(n: u32, emulated_devices: u16) -> Group {
    Group::with(n, |options| {
        let config = Config { emulated_devices, ..Config::default() };
        options.device_runtime = Some(Runtime::new(config).expect("a runtime"));
        if options.rank == 0 && emulated_devices > 1 {
            let turned = [(Device::Cuda(0), Device::Cuda(1)), (Device::Cuda(1), Device::Cuda(0))];
            options.device_maps.insert("w2".to_owned(), DeviceMap::new(turned).expect("one to one"));
        }
    })
}

#[test]
fn each_worker_answers_under_its_name_in_the_order_of_the_call() {
    bounded(|| {
        let group = group(4, 0);
        let agent = &group.agents[0];
        let outcomes = agent.to_all(["w3", "w1", "w2"]).call(add, (2, 3)).wait();
        let named: Vec<_> = outcomes.iter().map(|(worker, sum)| (&**worker, *sum.as_ref().expect("a sum"))).collect();
        assert_eq!(named, [("w3", 5), ("w1", 5), ("w2", 5)]);
        step("by rank, awaited, this worker among them, one twice");
        let outcomes = block_on(agent.to_all([0, 1, 1, 2]).call(add, (4, 5)).into_future());
        let named: Vec<_> = outcomes.into_values().expect("all succeed");
        assert_eq!(named, ["w0", "w1", "w1", "w2"].map(|worker| (Arc::from(worker), 9)));
        assert!(agent.to_all(<[u32; 0]>::default()).call(add, (1, 1)).wait().is_empty());
        step("one by one");
        for reply in agent.to_all(["w1", "w2"]).call(add, (1, 1)) {
            let worker = Arc::clone(reply.worker());
            assert_eq!(reply.wait().expect("a sum"), 2, "{worker}");
        }
        group.shutdown();
    });
}

/// What is packed, copied from a device or copied into a slab: as many allocations for three workers as for one.
#[test]
fn a_tensor_is_packed_once_for_all() {
    bounded(|| {
        for devices in [0, 1] {
            let group = group(4, devices);
            let agent = &group.agents[0];
            group.answers();
            let device = if devices == 0 { Device::HOST } else { Device::Cuda(0) };
            for side in [300, 1000] {
                step(format_args!("{side} × {side} on {device}"));
                let x = pattern::run(side * side, 7).and_then(|x| Ok(x.reshape(&[side, side])?)).expect("memory");
                let stream = agent.runtime().stream(device).expect("a device");
                let square = stream.pack(&x, device).expect("a copy");
                // With gaps, so it is packed; on a device it is copied, too, in the same pass.
                let narrow = square.narrow(1, 1, side - 2).expect("a view");
                let expected =
                    hash::run(x.narrow(1, 1, side - 2).and_then(|x| x.contiguous(&host(agent))).expect("packed"))
                        .expect("bytes");
                let allocations = |workers: &[&str]| {
                    let before = agent.runtime().stats().allocations;
                    for (worker, found) in agent.to_all(workers.iter().copied()).call(hash_here, (&narrow,)).wait() {
                        assert_eq!(found.expect("a hash"), expected, "{worker}");
                    }
                    agent.runtime().stats().allocations - before
                };
                assert_eq!(allocations(&["w1"]), 1, "packed");
                assert_eq!(allocations(&["w1", "w2", "w3"]), 1, "packed once");
                assert_eq!(allocations(&["w1", "w2", "w3", "w3", "w1"]), 1, "packed once");
            }
            group.shutdown();
        }
    });
}

fn host(agent: &Agent) -> Stream {
    agent.runtime().stream(Device::HOST).expect("the host")
}

/// The hash of a tensor of any device.
#[farcall::function(name = "test::hash_here")]
fn hash_here(cx: &Call, x: Tensor) -> farcall::Result<(usize, u64)> {
    let stream = cx.stream(x.device())?;
    let host = stream.pack(&x, Device::HOST)?;
    host.storage().ready_event().block(Duration::from_secs(10))?;
    hash::run(host)
}

/// Fails on this worker alone.
#[farcall::function(name = "test::fail_on")]
fn fail_on(cx: &Call, worker: String) -> farcall::Result<()> {
    if *cx.agent().worker().name == *worker { Err(farcall::Error::msg("as told")) } else { Ok(()) }
}

#[test]
fn each_worker_has_its_own_map_of_devices() {
    bounded(|| {
        let group = group(3, 2);
        let agent = &group.agents[0];
        let x = pattern::run(10_000, 1).expect("memory");
        let x = agent.runtime().stream(Device::Cuda(0)).and_then(|stream| stream.pack(&x, Device::Cuda(0)));
        let there = agent.to_all(["w1", "w2"]).call(device_of, (x.expect("a copy"),)).wait();
        assert_eq!(values(there), ["cuda:0", "cuda:1"]);
        group.shutdown();
    });
}

#[test]
fn a_worker_that_fails_is_named_and_fails_nobody_else() {
    bounded(|| {
        let group = group(4, 0);
        let agent = &group.agents[0];
        step("a handler's error, and a name that nobody has");
        let outcomes = agent.to_all(["w1", "w2", "nobody", "w3"]).call(fail_on, ("w2",)).wait();
        let ok: Vec<_> = outcomes.iter().map(|(worker, outcome)| (&**worker, outcome.is_ok())).collect();
        assert_eq!(ok, [("w1", true), ("w2", false), ("nobody", false), ("w3", true)]);
        let failed = outcomes.into_values().expect_err("two failed");
        assert_eq!(failed.succeeded, ["w1", "w3"].map(Arc::from));
        assert!(matches!(failed.failed[0], (_, CallError::Remote { .. })), "{failed}");
        assert!(matches!(failed.failed[1], (_, CallError::NoSuchWorker { .. })), "{failed}");
        assert!(failed.to_string().starts_with("2 of 4 workers failed; w2: test::fail_on on w2 failed: "), "{failed}");

        step("a deadline");
        let key = unique("many");
        let replies = agent.to_all(["w1", "w2"]).deadline(Duration::from_millis(50)).call(hold, (&key,));
        for (worker, outcome) in replies.wait() {
            let error = outcome.expect_err("held");
            assert!(matches!(error, CallError::Deadline { stage: Stage::Waiting, .. }), "{worker}: {error}");
        }
        gate(&key).open();

        step("a worker that left");
        group.agents[2].abort();
        let x = pattern::run(3 << 20, 5).expect("memory");
        let expected = hash::run(x.clone()).expect("bytes");
        for (worker, outcome) in agent.to_all(["w1", "w2", "w3"]).call(hash, (&x,)).wait() {
            match (&*worker, outcome) {
                ("w2", outcome) => assert!(matches!(outcome, Err(CallError::PeerLost { .. })), "{outcome:?}"),
                (_, found) => assert_eq!(found.expect("a hash"), expected, "{worker}"),
            }
        }
        for agent in &group.agents {
            agent.abort();
        }
    });
}

/// Dropping what waits for several calls cancels each of them.
#[test]
fn dropping_the_replies_cancels_the_calls() {
    bounded(|| {
        let group = group(3, 0);
        let agent = &group.agents[0];
        let key = unique("dropped");
        let replies = agent.to_all(["w1", "w2"]).call(hold_async, (&key, 1));
        assert!(gate(&key).wait_arrived(2));
        assert_eq!(agent.in_flight(), 2);
        drop(replies);
        eventually("no call waits", Duration::from_secs(5), || agent.in_flight() == 0);
        group.answers();
        group.shutdown();
    });
}
