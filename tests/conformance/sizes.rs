//! Any size travels, in both directions, on either side of the inline limit.

use farcall::Tensor;

use crate::functions::{echo, echo_all, hash, pattern};
use crate::harness::{Group, bounded, bytes_of, step};

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

fn made(len: usize, seed: u64) -> Tensor {
    pattern::run(len, seed).expect("memory")
}

/// `len` bytes as an argument, as a result, and as both.
fn travels(group: &Group, len: usize) {
    step(format_args!("{len} bytes"));
    let w1 = group.agents[0].to("w1");
    let x = made(len, 7);
    let here = hash::run(x.clone()).expect("bytes");
    assert_eq!(w1.call(hash, (&x,)).wait().expect("a hash"), here, "as an argument");
    let result = w1.call(pattern, (len, 7)).wait().expect("a tensor");
    assert_eq!(hash::run(result).expect("bytes"), here, "as a result");
    let echoed = w1.call(echo, (&x,)).wait().expect("an echo");
    assert!(bytes_of(&echoed) == bytes_of(&x), "as both");
}

#[test]
fn every_size_around_the_inline_limit_travels_both_ways() {
    bounded(|| {
        let group = Group::new(2);
        for len in [0, 1, 64 * KIB - 1, 64 * KIB, 64 * KIB + 1, MIB] {
            travels(&group, len);
        }
        group.shutdown();
    });
}

#[test]
fn chunk_limits_are_no_limits_of_a_tensor() {
    bounded(|| {
        let group = Group::new(2);
        for len in [4 * MIB - 1, 4 * MIB, 4 * MIB + 1, 8 * MIB + 1] {
            travels(&group, len);
        }
        group.shutdown();
    });
}

#[test]
fn sixty_four_mebibytes_travel_both_ways() {
    bounded(|| {
        let group = Group::new(2);
        travels(&group, 64 * MIB);
        group.shutdown();
    });
}

#[test]
fn inline_and_bulk_tensors_of_one_call_keep_their_order() {
    bounded(|| {
        let group = Group::new(2);
        // The inline limit is on all inline payload of a frame, so equal sizes go either way.
        let lens = [10, 64 * KIB + 1, 100, 70_000, 0, 40 * KIB, 40 * KIB, 3 * MIB, 1, 9 * MIB];
        let tensors: Vec<Tensor> = lens.iter().zip(1..).map(|(len, seed)| made(*len, seed)).collect();
        for _ in 0..3 {
            let back = group.agents[0].to("w1").call(echo_all, (&tensors,)).wait().expect("an echo");
            assert_eq!(back.len(), tensors.len());
            for (index, (back, sent)) in back.iter().zip(&tensors).enumerate() {
                assert!(bytes_of(back) == bytes_of(sent), "tensor {index}");
            }
        }
        group.shutdown();
    });
}

#[test]
fn as_many_tensors_as_a_frame_may_hold_travel_in_one_call() {
    bounded(|| {
        let group = Group::new(2);
        let tensors: Vec<Tensor> = (0..4096).map(|index| Tensor::scalar(index as u32).expect("a scalar")).collect();
        let back = group.agents[0].to("w1").call(echo_all, (&tensors,)).wait().expect("an echo");
        let elements: Vec<u32> = back.iter().map(|tensor| tensor.item().expect("u32")).collect();
        assert!(elements.iter().copied().eq(0..4096));
        group.shutdown();
    });
}

#[test]
fn large_calls_of_both_directions_at_once_do_not_wait_for_each_other() {
    bounded(|| {
        let group = Group::new(2);
        let (there, back) = (made(16 * MIB, 1), made(16 * MIB, 2));
        let replies: Vec<_> = (0..3)
            .map(|_| (group.agents[0].to("w1").call(echo, (&there,)), group.agents[1].to("w0").call(echo, (&back,))))
            .collect();
        for (first, second) in replies {
            assert!(bytes_of(&first.wait().expect("an echo")) == bytes_of(&there));
            assert!(bytes_of(&second.wait().expect("an echo")) == bytes_of(&back));
        }
        group.shutdown();
    });
}
