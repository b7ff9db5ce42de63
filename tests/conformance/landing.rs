//! Foreign tensors that are announced before they are copied: whole, by value, whatever holds their call up.

use std::time::Duration;

use farcall::prelude::*;
use farcall::transport::Passing;
use farcall::{Stage, Transport};

use crate::foreign::Foreign;
use crate::functions::{add, foreign_pattern, gate, hash, hash_after, hash_all, hold, pattern};
use crate::harness::{Group, bounded, eventually, step, unique};

/// Sizes around those from which tensors land, and in several parts.
const SIZES: [usize; 7] = [(256 << 10) - 1, 256 << 10, 300_000, 4 << 20, (4 << 20) + 1, 13 << 20, 40 << 20];

fn group(change: impl Fn(&mut Options)) -> Group {
    Group::with(2, |options| {
        (options.transport, options.tls) = (Transport::Auto, None);
        change(options);
    })
}

fn bytes(len: usize, seed: u64) -> Vec<u8> {
    pattern::run(len, seed).expect("memory").to_vec::<u8>().expect("u8")
}

fn hashed(len: usize, seed: u64) -> (usize, u64) {
    pattern::run(len, seed).and_then(hash::run).expect("bytes")
}

fn all_given_back(group: &Group) {
    for (agent, to) in [(&group.agents[0], "w1"), (&group.agents[1], "w0")] {
        eventually("every lease is given back", Duration::from_secs(5), || agent.to(to).lent() == 0);
    }
}

#[test]
fn foreign_tensors_come_whole_and_go_back_whole() {
    bounded(|| {
        let group = group(|_| {});
        let w1 = group.agents[0].to("w1");
        group.answers();
        assert_eq!(w1.passing(), Some(Passing::Slabs));
        for len in SIZES {
            step(format_args!("{len} bytes"));
            let x = Foreign::new(bytes(len, 8));
            let reply = w1.call(hash, (x.tensor(),));
            x.fill(0xee);
            assert_eq!(reply.wait().expect("a hash"), hashed(len, 8), "{len}");
            let made = w1.call(foreign_pattern, (len, 9)).wait().expect("a result");
            assert_eq!(hash::run(made).expect("bytes"), hashed(len, 9), "{len}");
        }
        all_given_back(&group);
        group.shutdown();
    });
}

/// Those that lie in slabs, those that travel in the frame and those that land, of one call.
#[test]
fn a_call_has_tensors_of_every_kind() {
    bounded(|| {
        let group = group(|_| {});
        let w1 = group.agents[0].to("w1");
        group.answers();
        let sizes = [100, 1 << 20, 5000, 300_000, 9 << 20, 2 << 20];
        let foreign: Vec<_> = sizes.iter().map(|len| Foreign::new(bytes(*len, 1))).collect();
        let mut xs: Vec<Tensor> = foreign.iter().map(Foreign::tensor).collect();
        xs.push(pattern::run(1 << 20, 1).expect("memory"));
        xs.push(foreign[4].tensor().narrow(0, 1 << 20, 3 << 20).expect("a view"));
        let expected: Vec<_> = xs.iter().map(|x| hash::run(x.clone()).expect("bytes")).collect();
        for _ in 0..3 {
            assert_eq!(w1.call(hash_all, (xs.clone(),)).wait().expect("hashes"), expected);
        }
        all_given_back(&group);
        group.shutdown();
    });
}

/// SNAPSHOT: a call that has no place on the wire yet has copied all the same.
#[test]
fn a_call_that_waits_for_a_place_has_copied() {
    bounded(|| {
        let group = group(|options| options.limits.requests_max = 1);
        let w1 = group.agents[0].to("w1");
        group.answers();
        let key = unique("place");
        let held = w1.call(hold, (&key,));
        assert!(gate(&key).wait_arrived(1));
        let x = Foreign::new(bytes(3 << 20, 5));
        let waiting = w1.call(hash, (x.tensor(),));
        let late = w1.deadline(Duration::from_millis(50)).call(hash, (x.tensor(),));
        x.fill(0xee);
        let error = late.wait().expect_err("no place");
        assert!(matches!(error, CallError::Deadline { stage: Stage::Queued, .. }), "{error}");
        gate(&key).open();
        held.wait().expect("its gate is open");
        assert_eq!(waiting.wait().expect("a hash"), hashed(3 << 20, 5));
        all_given_back(&group);
        group.shutdown();
    });
}

/// SNAPSHOT: nor does one whose tensor goes by the bulk connection, as the peer maps no more slabs.
#[test]
fn a_tensor_that_the_peer_cannot_map_is_copied_and_travels() {
    bounded(|| {
        let group = group(|options| options.limits.slab_bytes_max = 32 << 20);
        let w1 = group.agents[0].to("w1");
        group.answers();
        let x = Foreign::new(bytes(48 << 20, 5));
        let key = unique("travels");
        let reply = w1.call(hash_after, (&key, x.tensor()));
        x.fill(0xee);
        gate(&key).open();
        assert_eq!(reply.wait().expect("a hash"), hashed(48 << 20, 5));
        step("views of one memory, each with bytes of its own");
        let x = Foreign::new(bytes(80 << 20, 6));
        let whole = x.tensor();
        let views = [(0, 40 << 20), (40 << 20, 40 << 20), (1, 34 << 20)];
        let views = views.map(|(start, len)| whole.narrow(0, start, len).expect("a view"));
        let expected = views.each_ref().map(|view| hash::run(view.clone()).expect("bytes"));
        let reply = w1.call(hash_all, (views.to_vec(),));
        x.fill(0xee);
        assert_eq!(reply.wait().expect("hashes"), expected);
        all_given_back(&group);
        group.shutdown();
    });
}

/// SNAPSHOT: by value over sockets, too, and with the first call of a connection, before it is known what passes there.
#[test]
fn foreign_memory_is_by_value_whatever_the_way() {
    bounded(|| {
        for (transport, slabs) in [(Transport::Tcp, true), (Transport::Auto, false), (Transport::Auto, true)] {
            for (len, count) in [(100, 1), (60_000, 1), (60_000, 5), (300_000, 1), (24 << 20, 1)] {
                step(format_args!("{transport:?}, {slabs}: {count} tensors of {len} bytes"));
                let group = Group::with(2, |options| {
                    (options.transport, options.slabs, options.tls) = (transport, slabs, None);
                });
                let w1 = group.agents[0].to("w1");
                for _ in 0..2 {
                    let xs: Vec<_> = (0..count).map(|seed| Foreign::new(bytes(len, seed))).collect();
                    let reply = w1.call(hash_all, (xs.iter().map(Foreign::tensor).collect::<Vec<_>>(),));
                    xs.iter().for_each(|x| x.fill(0xee));
                    let expected: Vec<_> = (0..count).map(|seed| hashed(len, seed)).collect();
                    assert_eq!(reply.wait().expect("hashes"), expected);
                }
                group.shutdown();
            }
        }
    });
}

/// SNAPSHOT: nor does it matter what the call waits for, or that it goes to this worker itself, or to all.
#[test]
fn foreign_memory_is_by_value_whatever_the_call_waits_for() {
    bounded(|| {
        for transport in [Transport::Tcp, Transport::Auto] {
            let group = Group::with(2, |options| {
                (options.transport, options.tls, options.limits.requests_max) = (transport, None, 1)
            });
            let agent = &group.agents[0];
            group.answers();
            for len in [100, 300_000, 3 << 20] {
                step(format_args!("{transport:?}: {len} bytes"));
                let (key, x) = (unique("waits"), Foreign::new(bytes(len, 5)));
                let rows =
                    x.tensor().narrow(0, 0, len / 10 * 10).and_then(|x| x.reshape(&[10, len / 10])).expect("a view");
                let columns = rows.narrow(1, 1, len / 20).expect("a view with gaps");
                let packed = Tensor::from_slice(&columns.to_vec::<u8>().expect("u8"), columns.shape()).expect("memory");
                let expected = [hashed(len, 5), hash::run(packed).expect("bytes")];
                let held = agent.to("w1").call(hold, (&key,));
                assert!(gate(&key).wait_arrived(1));
                let queued = agent.to("w1").call(hash_all, (vec![x.tensor(), columns.clone()],));
                let here = agent.to("w0").call(hash_after, (&key, x.tensor()));
                let with_gaps = agent.to("w0").call(hash_after, (&key, &columns));
                let to_all = agent.to_all(["w0", "w1"]).call(hash_all, (vec![x.tensor(), columns],));
                x.fill(0xee);
                gate(&key).open();
                held.wait().expect("its gate is open");
                assert_eq!(queued.wait().expect("hashes"), expected);
                assert_eq!([here.wait().expect("a hash"), with_gaps.wait().expect("a hash")], expected);
                for found in to_all.wait().into_values().expect("hashes") {
                    assert_eq!(found.1, expected);
                }
            }
            group.shutdown();
        }
    });
}

/// What a peer has lent is nobody's to write: it is sent on without a copy.
#[test]
fn what_was_borrowed_is_not_copied_again() {
    bounded(|| {
        let group = group(|_| {});
        let w1 = group.agents[0].to("w1");
        group.answers();
        let made = w1.call(pattern, (3 << 20, 4)).wait().expect("a result");
        assert!(!made.storage().may_change());
        let runtime = farcall::Runtime::global();
        let kept = runtime.snapshot(&made).expect("the same");
        assert_eq!(kept.storage().as_ptr(), made.storage().as_ptr());
        let foreign = Foreign::new(bytes(5000, 4)).tensor();
        assert!(foreign.storage().may_change());
        assert_ne!(runtime.snapshot(&foreign).expect("a copy").storage().as_ptr(), foreign.storage().as_ptr());
        group.shutdown();
    });
}

/// Nobody waits: the callee does not begin, the memory comes back.
#[test]
fn calls_that_are_cancelled_or_late_give_their_memory_back() {
    bounded(|| {
        let group = group(|_| {});
        let w1 = group.agents[0].to("w1");
        group.answers();
        for round in 0..20 {
            let x = Foreign::new(bytes(2 << 20, round));
            drop(w1.call(hash, (x.tensor(),)));
            let late = w1.deadline(Duration::from_micros(10 * round)).call(hash, (x.tensor(),));
            match late.wait() {
                Ok(found) => assert_eq!(found, hashed(2 << 20, round)),
                Err(error) => assert!(matches!(error, CallError::Deadline { .. }), "{error}"),
            }
            assert_eq!(w1.call(add, (2, 3)).wait().expect("a sum"), 5);
        }
        all_given_back(&group);
        group.shutdown();
    });
}

/// Many threads at once, of one connection: what lands is told among other calls' frames.
#[test]
fn calls_of_many_threads_land_among_each_other() {
    bounded(|| {
        let group = group(|_| {});
        let w1 = &group.agents[0].to("w1");
        group.answers();
        std::thread::scope(|scope| {
            for thread in 0..4_u64 {
                scope.spawn(move || {
                    for round in 0..12 {
                        let len = SIZES[(thread + round) as usize % 5];
                        let x = Foreign::new(bytes(len, round));
                        let reply = w1.call(hash, (x.tensor(),));
                        assert_eq!(w1.call(add, (2, 3)).wait().expect("a sum"), 5);
                        assert_eq!(reply.wait().expect("a hash"), hashed(len, round));
                    }
                });
            }
        });
        all_given_back(&group);
        group.shutdown();
    });
}
