//! Tensors between workers of one host: passed in slabs, not copied, and given back.

use std::time::Duration;

use farcall::device::DeviceError;
use farcall::prelude::*;
use farcall::transport::{NoSlabs, Passing};
use farcall::{TensorMut, Transport};

use crate::foreign::Foreign;
use crate::functions::{
    echo, forget, gate, hash, hash_after, keep, kept_hash, own_and_fill, own_and_fill_kept, own_fill_and_echo, pattern,
    rows_from,
};
use crate::harness::{Group, bounded, eventually, step, unique};

/// Two workers that pass slabs, whatever the suite's sockets are.
fn group() -> Group {
    Group::with(2, |options| (options.transport, options.tls) = (Transport::Auto, None))
}

fn given_back(agent: &Agent, to: &str) {
    eventually("every lease is given back", Duration::from_secs(5), || agent.to(to).lent() == 0);
}

/// READY, FENCE: whole, wherever in a slab it lies; the bulk connection is not even opened. Given back after its last use.
#[test]
fn a_tensor_is_borrowed_while_the_callee_has_it() {
    bounded(|| {
        let group = group();
        let (agent, w1) = (&group.agents[0], group.agents[0].to("w1"));
        group.answers();
        assert_eq!(w1.passing(), Some(Passing::Slabs));
        for len in [1, 4095, 4096, 4097, 65_537, 1 << 20, 3 << 20, 70 << 20] {
            step(format_args!("{len} bytes"));
            let key = unique("borrowed");
            let x = pattern::run(len, len as u64).expect("memory");
            let expected = hash::run(x.clone()).expect("bytes");
            let reply = w1.call(hash_after, (&key, &x));
            assert!(gate(&key).wait_arrived(1));
            assert_eq!(w1.lent(), usize::from(len >= 4096), "{len}: shorter ones travel in the frame");
            let x = x.storage().clone().try_unique().expect_err("nobody writes it meanwhile");
            gate(&key).open();
            assert_eq!(reply.wait().expect("a hash"), expected, "{len}");
            given_back(agent, "w1");
            drop(x);
        }
        group.shutdown();
    });
}

#[test]
fn results_and_echoes_and_views_are_whole() {
    bounded(|| {
        let group = group();
        let w1 = group.agents[0].to("w1");
        let bytes = |x: &Tensor| x.to_vec::<u8>().expect("u8");
        for len in [5000, 100_000, 2 << 20] {
            let expected = pattern::run(len, 3).expect("memory");
            let made = w1.call(pattern, (len, 3)).wait().expect("a result");
            assert!(bytes(&made) == bytes(&expected));
            // A borrowed tensor goes back, and on.
            let again = w1.call(echo, (&made,)).wait().expect("an echo");
            assert!(bytes(&again) == bytes(&expected));
            assert!(
                bytes(&group.agents[1].to("w0").call(echo, (&again,)).wait().expect("an echo")) == bytes(&expected)
            );
            let half = expected.narrow(0, len / 2, len / 2).expect("a view");
            assert!(bytes(&w1.call(echo, (&half,)).wait().expect("an echo")) == bytes(&half));
            let square = expected.narrow(0, 0, 4900).and_then(|x| x.reshape(&[70, 70])).expect("a view");
            let turned = square.transpose(0, 1).expect("a view");
            assert_eq!(bytes(&w1.call(echo, (&turned,)).wait().expect("an echo")), bytes(&turned));
        }
        given_back(&group.agents[0], "w1");
        given_back(&group.agents[1], "w0");
        group.shutdown();
    });
}

/// What was borrowed goes back by its lease: nothing is copied, either way, whatever its size.
#[test]
fn an_echo_is_the_callers_own_memory() {
    bounded(|| {
        let group = group();
        let w1 = group.agents[0].to("w1");
        group.answers();
        for len in [4096, 5000, 1 << 20, 3 << 20, 70 << 20] {
            step(format_args!("{len} bytes"));
            let x = pattern::run(len, 3).expect("memory");
            let back = w1.call(echo, (&x,)).wait().expect("an echo");
            assert!(back.storage().as_ptr() == x.storage().as_ptr() && back.shape() == [len]);
            drop(x);
            assert_eq!(
                hash::run(back).expect("bytes"),
                hash::run(pattern::run(len, 3).expect("memory")).expect("bytes")
            );
            // The other way: it is `w1` whose memory goes to and fro.
            let made = w1.call(pattern, (len, 4)).wait().expect("a result");
            let again = w1.call(echo, (&made,)).wait().expect("an echo");
            assert_eq!(again.storage().as_ptr(), made.storage().as_ptr());
        }
        given_back(&group.agents[0], "w1");
        given_back(&group.agents[1], "w0");
        group.shutdown();
    });
}

#[test]
fn a_part_goes_back_as_a_view_and_what_was_written_as_a_copy() {
    bounded(|| {
        let group = group();
        let w1 = group.agents[0].to("w1");
        group.answers();
        let elements: Vec<f64> = (0..100 * 90).map(f64::from).collect();
        let whole = Tensor::from_slice(&elements, &[100, 90]).expect("memory");
        let x = whole.narrow(0, 3, 90).expect("a view");
        for start in [0, 1, 50] {
            let back = w1.call(rows_from, (&x, start)).wait().expect("rows");
            assert_eq!(back.storage().as_ptr(), x.storage().as_ptr());
            assert_eq!((back.shape(), back.strides()), (&[90, 90 - start][..], &[1, 90][..]));
            let expected = x.narrow(0, start, 90 - start).and_then(|rows| rows.transpose(0, 1)).expect("a view");
            assert_eq!(back.to_vec::<f64>().expect("f64"), expected.to_vec::<f64>().expect("f64"));
        }
        // A small part is worth a copy: the whole would be kept for it.
        let back = w1.call(rows_from, (&x, 83)).wait().expect("rows");
        assert_ne!(back.storage().as_ptr(), x.storage().as_ptr());
        // Who receives it may write it as any other, and as an argument, too; nobody else's bytes change.
        let x = pattern::run(100_000, 6).expect("memory");
        let before = hash::run(x.clone()).expect("bytes");
        let back = w1.call(echo, (&x,)).wait().expect("an echo");
        let mut view = back.into_storage().try_unique().expect("alone with what came back");
        view.as_bytes_mut().expect("written").fill(9);
        assert_eq!(hash::run(x.clone()).expect("bytes"), before);
        let made = w1.call(pattern, (100_000, 7)).wait().expect("a result");
        let expected = hash::run(made.clone()).expect("bytes");
        assert_eq!(w1.call(own_and_fill, (&made, 3_u8)).wait().expect("its own, come back"), (expected, true));
        assert_eq!(hash::run(made).expect("bytes"), expected);
        // Written by the callee: its own, whole, and the caller's as it was.
        for len in [5000, 1 << 20] {
            let x = pattern::run(len, 5).expect("memory");
            let before = x.to_vec::<u8>().expect("u8");
            let filled = w1.call(own_fill_and_echo, (&x, 9_u8)).wait().expect("filled");
            assert!(!filled.storage().is_same(x.storage()));
            assert!(filled.to_vec::<u8>().expect("u8").iter().all(|byte| *byte == 9));
            assert_eq!(x.to_vec::<u8>().expect("u8"), before);
        }
        given_back(&group.agents[0], "w1");
        group.shutdown();
    });
}

/// SNAPSHOT: a callee writes its own view, for that borrow alone. At the same offset it receives the caller's bytes again.
#[test]
fn a_callee_that_writes_in_place_changes_nothing_of_the_callers() {
    bounded(|| {
        let group = group();
        let (agent, w1) = (&group.agents[0], group.agents[0].to("w1"));
        let x = pattern::run(1 << 20, 1).expect("memory");
        let expected = hash::run(x.clone()).expect("bytes");
        for round in 0..5 {
            step(format_args!("round {round}"));
            let found = w1.call(own_and_fill, (&x, 0xee_u8)).wait().expect("written in place");
            assert_eq!(found, (expected, true), "the caller's bytes, then its own");
            assert_eq!(hash::run(x.clone()).expect("bytes"), expected);
            given_back(agent, "w1");
        }
        // Kept and written, while the caller's memory goes on.
        let key = unique("kept");
        w1.call(own_and_fill_kept, (&key, &x, 7_u8)).wait().expect("kept");
        assert_eq!(w1.lent(), 1, "the pages that were not written are the caller's");
        w1.call(forget, (&key,)).wait().expect("dropped");
        given_back(agent, "w1");
        group.shutdown();
    });
}

/// SNAPSHOT: a caller that leaves takes its tensors back from nobody: what others have kept stays as it is.
#[test]
fn what_is_kept_outlives_the_callers_agent_and_the_reuse_of_its_memory() {
    bounded(|| {
        let group = group();
        let key = unique("outlives");
        let [w0, w1] = [0, 1].map(|rank| group.agents[rank].clone());
        for len in [5000, 3 << 20] {
            let x = pattern::run(len, 9).expect("memory");
            let expected = hash::run(x.clone()).expect("bytes");
            let held = x.storage().clone();
            w0.to("w1").call(keep, (&key, x)).wait().expect("kept");
            if len > 5000 {
                w0.abort();
                // Nor does who has held it all the time write it.
                drop(held.try_unique().expect_err("the other one may read it"));
            }
            for _ in 0..8 {
                let mut other = TensorMut::empty(DType::U8, &[len]).expect("memory");
                other.fill(0xee_u8).expect("bytes");
                drop(other.freeze_ready());
            }
            assert_eq!(w1.to("w1").call(kept_hash, (&key,)).wait().expect("as it was"), expected);
        }
        w1.to("w1").call(forget, (&key,)).wait().expect("dropped");
        w1.abort();
    });
}

/// SNAPSHOT: by value, whatever the caller does once `call` has returned: here the callee has not begun.
#[test]
fn foreign_memory_is_copied_before_the_call_returns() {
    bounded(|| {
        let group = group();
        let (agent, w1) = (&group.agents[0], group.agents[0].to("w1"));
        group.answers();
        for len in [100, 5000, 100_000, 1 << 20, 20 << 20] {
            step(format_args!("{len} bytes"));
            let key = unique("foreign");
            let expected = pattern::run(len, 8).and_then(hash::run).expect("bytes");
            let bytes = pattern::run(len, 8).expect("memory").to_vec::<u8>().expect("u8");
            let foreign = Foreign::new(bytes);
            let reply = w1.call(hash_after, (&key, foreign.tensor()));
            foreign.fill(0xee);
            gate(&key).open();
            assert_eq!(reply.wait().expect("a hash"), expected, "{len}");
        }
        given_back(agent, "w1");
        group.shutdown();
    });
}

/// The way is chosen once, in the greeting, and each obstacle has a name.
#[test]
fn without_slabs_tensors_are_copied_and_the_reason_is_told() {
    bounded(|| {
        type Case = (fn(&mut Options), Passing, Passing);
        let cases: [Case; 3] = [
            (
                |options| options.slabs = options.rank == 0,
                Passing::Sockets(NoSlabs::RefusedThere),
                Passing::Sockets(NoSlabs::Off),
            ),
            (
                |options| options.transport = if options.rank == 0 { Transport::Auto } else { Transport::Tcp },
                Passing::Sockets(NoSlabs::TcpThere),
                Passing::Sockets(NoSlabs::TcpHere),
            ),
            (|_| {}, Passing::Slabs, Passing::Slabs),
        ];
        for (change, at_w0, at_w1) in cases {
            let group = Group::with(2, |options| {
                (options.transport, options.tls) = (Transport::Auto, None);
                change(options);
            });
            group.answers();
            for (agent, to, expected) in [(&group.agents[0], "w1", at_w0), (&group.agents[1], "w0", at_w1)] {
                assert_eq!(agent.to(to).passing(), Some(expected));
                let x = pattern::run(1 << 20, 4).expect("memory");
                let hashed = agent.to(to).call(hash, (&x,)).wait().expect("a hash");
                assert_eq!(hashed, hash::run(x).expect("bytes"));
            }
            group.shutdown();
        }
    });
}

/// Memory that a peer has is unmapped there, too, once it is unmapped here.
#[test]
fn a_slab_that_is_unmapped_is_retired_at_the_peer() {
    bounded(|| {
        let runtime = farcall::Runtime::new(farcall::device::Config::default()).expect("a runtime");
        let group = group();
        let w1 = group.agents[0].to("w1");
        group.answers();
        let maps = |slab: u64| {
            let text = std::fs::read_to_string("/proc/self/maps").expect("maps");
            text.lines()
                .filter(|line| line.contains("memfd:farcall-slab") && line.contains(&format!(" {slab} ")))
                .count()
        };
        let mut bytes = runtime.alloc_host(20 << 20).expect("memory");
        bytes.as_bytes_mut().expect("host").fill(5);
        let storage = bytes.freeze_ready();
        let inode = {
            use std::os::fd::AsFd;
            rustix::fs::fstat(storage.slab().expect("a slab").fd().expect("a file").as_fd()).expect("a file").st_ino
        };
        let layout = farcall::Layout::contiguous(DType::U8, &[20 << 20]).expect("a small layout");
        let x = Tensor::from_storage(storage, layout).expect("fits");
        assert_eq!(maps(inode), 1);
        w1.call(hash, (&x,)).wait().expect("a hash");
        assert_eq!(maps(inode), 2, "both agents are of this process");
        given_back(&group.agents[0], "w1");
        drop(x);
        assert!(runtime.trim() >= 20 << 20);
        eventually("the peer has unmapped it", Duration::from_secs(5), || maps(inode) == 0);
        group.shutdown();
    });
}

/// The views of a forked child are told by name; see `processes::death`. Here: what is foreign and no file stays read-only.
#[test]
fn a_private_view_is_only_for_who_is_alone() {
    bounded(|| {
        let group = group();
        let made = group.agents[0].to("w1").call(pattern, (5000, 3)).wait().expect("a result");
        let storage = made.storage().clone().try_unique().expect_err("the tensor shares it");
        drop(made);
        let mut alone = storage.try_unique().expect("a view");
        alone.as_bytes_mut().expect("host").fill(1);
        assert_eq!(
            alone.freeze_ready().as_bytes().map(<[u8]>::len).map_err(|error: DeviceError| error.to_string()),
            Ok(5000)
        );
        given_back(&group.agents[1], "w0");
        group.shutdown();
    });
}
