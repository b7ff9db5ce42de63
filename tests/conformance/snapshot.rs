//! SNAPSHOT: the callee sees the caller's value as it was, whatever the caller does once `call` has returned.

use farcall::{DType, TensorMut};

use crate::functions::{echo, gate, hash, hash_after, pattern};
use crate::harness::{Group, bounded, step, unique};

/// Takes memory of the size just freed from the pool, and writes over it.
fn overwrite(len: usize) {
    for _ in 0..4 {
        let mut other = TensorMut::empty(DType::U8, &[len]).expect("memory");
        other.fill(0xee_u8).expect("bytes");
        drop(other.freeze_ready());
    }
}

#[test]
fn an_argument_outlives_the_callers_tensor_and_the_reuse_of_its_memory() {
    bounded(|| {
        let group = Group::new(2);
        let w1 = group.agents[0].to("w1");
        for (round, len) in [100, 60 << 10, 100 << 10, 1 << 20, 5 << 20].into_iter().cycle().take(20).enumerate() {
            step(format_args!("round {round}, {len} bytes"));
            let key = unique("snapshot");
            let x = pattern::run(len, round as u64).expect("memory");
            let expected = hash::run(x.clone()).expect("bytes");
            let reply = w1.call(hash_after, (&key, x));
            overwrite(len);
            gate(&key).open();
            assert_eq!(reply.wait().expect("a hash"), expected);
        }
        group.shutdown();
    });
}

/// The first large call: its bytes leave only when the bulk connection is open, long after `call` returned.
#[test]
fn an_argument_that_could_not_leave_yet_is_kept() {
    bounded(|| {
        for round in 0..10 {
            step(format_args!("round {round}"));
            let group = Group::new(2);
            let x = pattern::run(2 << 20, round).expect("memory");
            let expected = hash::run(x.clone()).expect("bytes");
            let reply = group.agents[0].to("w1").call(hash, (x,));
            overwrite(2 << 20);
            assert_eq!(reply.wait().expect("a hash"), expected);
            group.shutdown();
        }
    });
}

/// A worker that calls itself shares the storage, which nobody can write.
#[test]
fn a_shared_storage_is_not_written_while_the_callee_holds_it() {
    bounded(|| {
        let group = Group::new(1);
        let key = unique("shared");
        let x = pattern::run(1000, 5).expect("memory");
        let expected = hash::run(x.clone()).expect("bytes");
        let reply = group.agents[0].to(0).call(hash_after, (&key, &x));
        assert!(gate(&key).wait_arrived(1));
        assert!(x.storage().clone().try_unique().is_err());
        drop(x);
        overwrite(1000);
        gate(&key).open();
        assert_eq!(reply.wait().expect("a hash"), expected);
        group.shutdown();
    });
}

#[test]
fn a_result_stays_what_it_was_while_later_results_arrive() {
    bounded(|| {
        let group = Group::new(2);
        let w1 = group.agents[0].to("w1");
        for len in [1000, 200 << 10] {
            let sent: Vec<_> = (0..20).map(|seed| pattern::run(len, seed).expect("memory")).collect();
            let kept: Vec<_> = sent.iter().map(|x| w1.call(echo, (x,)).wait().expect("an echo")).collect();
            for (sent, kept) in sent.iter().zip(kept) {
                assert!(kept.as_slice::<u8>().expect("u8") == sent.as_slice::<u8>().expect("u8"));
            }
        }
        group.shutdown();
    });
}
