//! Views travel as what they are: the callee sees the caller's elements in the caller's order.

use farcall::Tensor;

use crate::functions::{echo, elements, layout};
use crate::harness::{Group, bounded, counting};

/// The callee sees `expected` in row-major order, and so does the caller in the echo.
fn travels(x: &Tensor, expected: &[f32]) -> (Vec<usize>, Vec<i64>) {
    let group = Group::new(2);
    let w1 = group.agents[0].to("w1");
    assert_eq!(w1.call(elements, (x,)).wait().expect("elements"), expected);
    let back = w1.call(echo, (x,)).wait().expect("an echo");
    assert_eq!((back.shape(), &back.to_vec::<f32>().expect("f32")[..]), (x.shape(), expected));
    let seen = w1.call(layout, (x,)).wait().expect("a layout");
    assert_eq!(seen.0, x.shape());
    group.shutdown();
    seen
}

#[test]
fn a_contiguous_matrix_stays_one() {
    bounded(|| {
        let (_, strides) = travels(&counting(&[2, 3]), &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        assert_eq!(strides, [3, 1]);
    });
}

#[test]
fn a_transposed_matrix_keeps_its_strides() {
    bounded(|| {
        let x = counting(&[2, 3]).transpose(0, 1).expect("two dimensions");
        let (_, strides) = travels(&x, &[0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
        assert_eq!(strides, [1, 3], "not packed: the same bytes travel");
    });
}

#[test]
fn a_broadcast_row_is_sent_once_and_seen_by_every_index() {
    bounded(|| {
        // 8 bytes stand for 8 GiB, which is what one frame may stand for; sent packed, this would take its time.
        let row = counting(&[1, 2]);
        let group = Group::new(2);
        let x = row.broadcast_to(&[1 << 30, 2]).expect("a broadcast");
        let (shape, strides) = group.agents[0].to("w1").call(layout, (&x,)).wait().expect("a layout");
        assert_eq!((shape, strides), (vec![1 << 30, 2], vec![0, 1]));
        let x = row.broadcast_to(&[(1 << 30) + 1, 2]).expect("a broadcast");
        let error = group.agents[0].to("w1").call(layout, (&x,)).wait().expect_err("more than that").to_string();
        assert!(error.contains("tensor bytes exceed the limit of 8589934592"), "{error}");
        group.answers();
        group.shutdown();
        let x = counting(&[1, 2]).broadcast_to(&[3, 2]).expect("a broadcast");
        let (_, strides) = travels(&x, &[0.0, 1.0, 0.0, 1.0, 0.0, 1.0]);
        assert_eq!(strides, [0, 1], "the row travels once");
    });
}

#[test]
fn a_narrowed_view_with_gaps_arrives_without_them() {
    bounded(|| {
        let x = counting(&[3, 4]).narrow(1, 1, 2).expect("in range");
        let (_, strides) = travels(&x, &[1.0, 2.0, 5.0, 6.0, 9.0, 10.0]);
        assert_eq!(strides, [2, 1], "packed before it left");
    });
}

#[test]
fn a_narrowed_view_without_gaps_leaves_the_rest_of_its_storage_at_home() {
    bounded(|| {
        let x = counting(&[4, 2]).narrow(0, 1, 2).expect("in range");
        travels(&x, &[2.0, 3.0, 4.0, 5.0]);
    });
}

#[test]
fn a_gapped_transposed_broadcast_view_arrives_in_order() {
    bounded(|| {
        let x = counting(&[3, 4]).narrow(1, 0, 2).expect("in range").transpose(0, 1).expect("two dimensions");
        let x = x.unsqueeze(0).expect("a new dimension").broadcast_to(&[2, 2, 3]).expect("a broadcast");
        let one = [0.0, 4.0, 8.0, 1.0, 5.0, 9.0];
        travels(&x, &[one, one].concat());
    });
}

#[test]
fn a_scalar_is_a_tensor_of_rank_0() {
    bounded(|| {
        let (shape, strides) = travels(&Tensor::scalar(2.5_f32).expect("a scalar"), &[2.5]);
        assert!(shape.is_empty() && strides.is_empty());
    });
}

#[test]
fn empty_tensors_keep_their_shape() {
    bounded(|| {
        for shape in [&[0][..], &[0, 7], &[3, 0, 5], &[0, 0]] {
            let (seen, _) = travels(&counting(shape), &[]);
            assert_eq!(seen, shape);
        }
    });
}

#[test]
fn sixteen_dimensions_travel_straight_and_reversed() {
    bounded(|| {
        let shape = [1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2];
        let x = counting(&shape);
        let straight: Vec<f32> = (0..256).map(|index| index as f32).collect();
        travels(&x, &straight);
        let dims: Vec<usize> = (0..16).rev().collect();
        // Eight dimensions of 2, reversed: the index with its eight bits reversed.
        let reversed: Vec<f32> = (0..=255_u8).map(|index| f32::from(index.reverse_bits())).collect();
        travels(&x.permute(&dims).expect("a permutation"), &reversed);
    });
}

#[test]
fn large_views_travel_on_the_bulk_connection_as_small_ones_do() {
    bounded(|| {
        let x = counting(&[300, 400]);
        let transposed: Vec<f32> =
            (0..400).flat_map(|column| (0..300).map(move |row| (row * 400 + column) as f32)).collect();
        travels(&x.transpose(0, 1).expect("two dimensions"), &transposed);
        let gapped: Vec<f32> =
            (0..300).flat_map(|row| (1..399).map(move |column| (row * 400 + column) as f32)).collect();
        travels(&x.narrow(1, 1, 398).expect("in range"), &gapped);
    });
}
