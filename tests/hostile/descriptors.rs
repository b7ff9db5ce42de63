//! Tensor descriptors that lie. Nothing is allocated for them.

use crate::harness::bounded;

use super::raw::{AT_TABLE_LEN, Descriptor, ERROR, F32, Frame, REPLY, REQUEST, Target, U8, echo_request};

/// Each request is refused with its text.
fn refused(requests: impl IntoIterator<Item = (Frame, &'static str)> + Send + 'static) {
    bounded(|| {
        let target = Target::new();
        for (request, why) in requests {
            target.refuses(&request.bytes(), why);
        }
        target.shutdown();
    });
}

/// An f32 matrix of 2 × 3 with its 24 bytes.
fn matrix() -> Descriptor {
    Descriptor::inline(F32, &[2, 3], 24)
}

fn request(descriptor: Descriptor) -> Frame {
    echo_request(1, &descriptor, &[0; 24])
}

/// The request with one byte of its descriptor changed.
fn with_byte(at: usize, value: u8) -> Frame {
    let mut request = request(matrix());
    request.table[at] = value;
    request
}

#[test]
fn the_descriptor_that_is_changed_below_is_valid() {
    bounded(|| {
        let target = Target::new();
        let mut peer = target.peer();
        for descriptor in [matrix(), matrix().strided(&[3, 1]), matrix().strided(&[1, 2])] {
            let payload: Vec<u8> = (0..24).collect();
            peer.send(&echo_request(1, &descriptor, &payload).bytes());
            let reply = peer.expect(super::raw::REPLY);
            // The wire's canonical form leaves out row-major strides.
            let table = if descriptor.strides == [1, 2] { descriptor.bytes() } else { matrix().bytes() };
            assert_eq!((reply.table, reply.metadata, reply.payload), (table, vec![0], payload));
        }
        target.shutdown();
    });
}

#[test]
fn unknown_dtypes_are_refused() {
    refused([(with_byte(0, 17), "unknown dtype code 17"), (with_byte(0, 255), "unknown dtype code 255")]);
}

#[test]
fn bytes_that_disagree_with_dtype_and_shape_are_refused() {
    refused([
        (request(Descriptor { len: 23, ..matrix() }), "23 bytes announced for f32 [2, 3], which holds 24"),
        (request(Descriptor { len: 0, ..matrix() }), "0 bytes announced for f32 [2, 3]"),
        (request(Descriptor { dtype: 12, ..matrix() }), "24 bytes announced for f64 [2, 3], which holds 48"),
        (request(Descriptor { shape: vec![2, 4], ..matrix() }), "24 bytes announced for f32 [2, 4], which holds 32"),
        (request(Descriptor { shape: vec![0, 3], ..matrix() }), "24 bytes announced for f32 [0, 3], which holds 0"),
    ]);
}

#[test]
fn shapes_that_overflow_are_refused() {
    let shaped = |shape: &[i64]| request(Descriptor { shape: shape.to_vec(), ..matrix() });
    refused([
        (shaped(&[i64::MAX, 2]), "impossible tensor"),
        (shaped(&[1 << 32, 1 << 32]), "impossible tensor"),
        (shaped(&[1 << 62]), "impossible tensor"),
        (shaped(&[i64::MAX; 16]), "impossible tensor"),
    ]);
}

#[test]
fn negative_dimensions_are_refused() {
    refused([
        (request(Descriptor { shape: vec![-2, 3], ..matrix() }), "a dimension of -2"),
        (request(Descriptor { shape: vec![2, i64::MIN], ..matrix() }), "a dimension of -9223372036854775808"),
    ]);
}

#[test]
fn overlapping_strides_are_refused() {
    refused([
        (request(matrix().strided(&[1, 1])), "strides [1, 1] of shape [2, 3] overlap or leave gaps"),
        (request(matrix().strided(&[2, 1])), "overlap or leave gaps"),
    ]);
}

#[test]
fn negative_strides_are_refused() {
    refused([
        (request(matrix().strided(&[3, -1])), "stride -1 is negative"),
        (request(matrix().strided(&[i64::MIN, 1])), "is negative"),
    ]);
}

#[test]
fn gapped_strides_are_refused() {
    refused([
        (request(matrix().strided(&[4, 1])), "strides [4, 1] of shape [2, 3] overlap or leave gaps"),
        (request(matrix().strided(&[6, 2])), "overlap or leave gaps"),
        (request(matrix().strided(&[i64::MAX, 1])), "impossible tensor"),
    ]);
}

/// A broadcast of few bytes to more elements than a frame may hold would be a bomb for who packs it.
#[test]
fn broadcasts_to_more_than_a_frame_may_hold_are_refused() {
    let bomb = Descriptor { shape: vec![1 << 40, 6], ..matrix() }.strided(&[0, 1]);
    refused([(request(bomb), "bytes of one tensor exceed the limit")]);
}

#[test]
fn rank_17_is_refused() {
    refused([
        (request(Descriptor { shape: vec![1; 17], ..matrix() }), "17 tensor rank exceed the limit of 16"),
        (with_byte(1, 255), "255 tensor rank exceed the limit of 16"),
    ]);
}

#[test]
fn unknown_kinds_of_devices_are_refused() {
    refused([(request(Descriptor { device: (9, 0), ..matrix() }), "unknown device kind 9")]);
}

/// Another machine has other devices: the call fails, the connection goes on.
#[test]
fn a_tensor_for_a_device_that_is_not_there_fails_its_call_only() {
    bounded(|| {
        let target = Target::new();
        let mut peer = target.peer();
        for (device, name) in [((1, 77), "cuda:77"), ((0, 3), "cpu:3")] {
            peer.send(&request(Descriptor { device, ..matrix() }).bytes());
            let error = peer.expect(ERROR);
            let text = String::from_utf8_lossy(&error.metadata).into_owned();
            assert!(text.contains(&format!("a tensor is for {name}")), "{text}");
        }
        peer.send(&request(matrix()).bytes());
        peer.expect(REPLY);
        target.serves_others();
        target.shutdown();
    });
}

#[test]
fn reserved_bits_of_a_descriptor_must_be_zero() {
    // Flags but the first, the zero byte, offset, slab and digest.
    let why = "reserved bits set in a tensor descriptor";
    refused(
        [(3, 2), (3, 0x80), (5, 1), (16, 1), (23, 1), (32, 1), (39, 1), (40, 1), (47, 1)]
            .map(|(at, value)| (with_byte(at, value), why)),
    );
}

#[test]
fn unknown_payload_modes_are_refused() {
    refused([
        (with_byte(2, 2), "unknown payload mode 2"),
        // An inline tensor has no transfer.
        (with_byte(8, 1), "unknown payload mode 0"),
    ]);
}

#[test]
fn descriptors_and_the_headers_lengths_must_agree() {
    bounded(|| {
        let target = Target::new();
        let good = request(matrix());
        let mut long = good.clone();
        long.table.extend([0; 8]);
        target.refuses(&long.bytes(), "72 bytes of descriptors where the descriptors account for 64");
        let mut two = good.clone();
        two.tensors = 2;
        target.refuses(&two.bytes(), "the frame ends inside its tensor descriptors");
        // A table that ends within the shape; its last bytes become metadata.
        target.refuses(
            &good.patched(AT_TABLE_LEN, &56_u32.to_le_bytes()),
            "the frame ends inside its tensor descriptors",
        );
        let more = Frame { payload: vec![0; 25], ..good.clone() };
        target.refuses(&more.bytes(), "25 bytes of inline payload where the descriptors account for 24");
        let less = Frame { payload: vec![0; 23], ..good };
        target.refuses(&less.bytes(), "24 inline payload bytes exceed the limit of 23");
        target.shutdown();
    });
}

#[test]
fn tensors_larger_than_a_frame_may_hold_are_refused() {
    let bytes = 9_i64 << 30;
    let one = Descriptor::bulk(1, bytes as u64);
    refused([(echo_request(1, &one, &[]), "bytes of one tensor exceed the limit of 8589934592")]);
}

/// Tensors that the metadata does not name, or names too often, are the caller's error, not the connection's.
#[test]
fn tensors_and_metadata_that_disagree_are_an_error_of_the_call() {
    bounded(|| {
        let target = Target::new();
        let mut peer = target.peer();
        let good = request(matrix());
        for metadata in [vec![1], vec![], vec![0, 0], vec![0xff, 0xff, 0xff, 0xff, 0x0f]] {
            peer.send(&Frame { metadata, ..good.clone() }.bytes());
            let error = peer.expect(super::raw::ERROR);
            assert_eq!((error.call, error.metadata[0]), (1, 2), "bad arguments");
        }
        let none = Frame { metadata: vec![0], function: 0, call: 3, ..Frame::new(REQUEST) };
        peer.send(&none.bytes());
        assert_eq!(peer.expect(super::raw::ERROR).call, 3);
        // A bool that is neither 0 nor 1 is a value like any other until it is read as one.
        peer.send(&echo_request(4, &Descriptor::inline(0, &[1], 1), &[2]).bytes());
        assert_eq!(peer.expect(super::raw::REPLY).payload, [2]);
        peer.send(&echo_request(5, &Descriptor::inline(U8, &[0], 0), &[]).bytes());
        assert_eq!(peer.expect(super::raw::REPLY).payload, []);
        target.serves_others();
        target.shutdown();
    });
}
