//! Headers of a welcome peer that lie.

use crate::harness::bounded;

use super::raw::{
    AT_CREDIT, AT_EXT_LEN, AT_FLAGS, AT_KIND, AT_META_LEN, AT_PAYLOAD_LEN, AT_RESERVED, AT_TABLE_LEN, AT_TENSORS,
    AT_VERSION, Descriptor, F32, Target, add_request, assert_says, echo_request,
};

/// Each patch of a valid request's header is refused with its text.
fn refused(patches: impl IntoIterator<Item = (usize, Vec<u8>, &'static str)> + Send + 'static) {
    bounded(|| {
        let target = Target::new();
        let request = echo_request(1, &Descriptor::inline(F32, &[2, 3], 24), &[0; 24]);
        for (at, value, why) in patches {
            // Only what the worker must read to refuse it.
            target.refuses(&request.patched(at, &value)[..64], why);
        }
        target.shutdown();
    });
}

#[test]
fn wrong_magic_version_and_kind_close_a_session_too() {
    refused([
        (0, b"GET ".to_vec(), "not a farcall frame"),
        (AT_VERSION, vec![9], "framing version 9 where 1 is supported"),
        (AT_KIND, vec![99], "unknown frame kind 99"),
    ]);
}

#[test]
fn metadata_above_its_limit_is_refused() {
    refused([
        (AT_META_LEN, 1_048_577_u32.to_le_bytes().to_vec(), "1048577 metadata bytes exceed the limit of 1048576"),
        (AT_META_LEN, u32::MAX.to_le_bytes().to_vec(), "metadata bytes exceed the limit"),
    ]);
}

#[test]
fn more_tensors_than_allowed_are_refused() {
    refused([
        (AT_TENSORS, 4097_u16.to_le_bytes().to_vec(), "4097 tensors exceed the limit of 4096"),
        (AT_TENSORS, u16::MAX.to_le_bytes().to_vec(), "65535 tensors exceed the limit of 4096"),
    ]);
}

#[test]
fn more_descriptor_bytes_than_the_tensors_can_need_are_refused() {
    // The largest descriptor has 48 + 16 × 16 bytes; digests, which were not agreed on, could make it longer.
    refused([
        (AT_TABLE_LEN, 305_u32.to_le_bytes().to_vec(), "305 descriptor bytes exceed the limit of 304"),
        (AT_TABLE_LEN, u32::MAX.to_le_bytes().to_vec(), "4294967295 descriptor bytes exceed the limit of "),
    ]);
}

#[test]
fn extensions_above_their_limit_are_refused() {
    refused([(AT_EXT_LEN, 1025_u16.to_le_bytes().to_vec(), "1025 extension bytes exceed the limit of 1024")]);
}

#[test]
fn inline_payload_above_its_limit_is_refused() {
    refused([
        (
            AT_PAYLOAD_LEN,
            65_537_u64.to_le_bytes().to_vec(),
            "65537 payload bytes in one frame exceed the limit of 65536",
        ),
        (AT_PAYLOAD_LEN, u64::MAX.to_le_bytes().to_vec(), "payload bytes in one frame exceed the limit"),
    ]);
}

#[test]
fn reserved_bits_of_a_header_must_be_zero() {
    refused([
        (AT_FLAGS, vec![1, 0], "reserved bits set in a Request frame"),
        (AT_FLAGS, vec![0, 0x80], "reserved bits set in a Request frame"),
        (AT_CREDIT, vec![1], "reserved bits set in a Request frame"),
        (AT_RESERVED, vec![1], "reserved bits set in a Request frame"),
    ]);
}

#[test]
fn known_kinds_at_the_wrong_time_are_refused() {
    bounded(|| {
        let target = Target::new();
        for (kind, why) in [
            (2, "Welcome frame where a frame of an open endpoint is expected"),
            (9, "OpenBulk frame where a frame of an open endpoint is expected"),
            (10, "Chunk frame where a control frame is expected"),
        ] {
            target.refuses(&add_request(1).patched(AT_KIND, &[kind]), why);
        }
        target.shutdown();
    });
}

/// Extensions are skipped, whatever they say: a later version may add some.
#[test]
fn unknown_extensions_are_skipped() {
    bounded(|| {
        let target = Target::new();
        let mut peer = target.peer();
        let request = add_request(5).patched(AT_EXT_LEN, &3_u16.to_le_bytes());
        peer.send(&[&request[..64], &[1, 2, 3], &request[64..]].concat());
        assert_eq!(peer.expect(super::raw::REPLY).metadata, [10]);
        target.shutdown();
    });
}

/// However a valid frame is cut by the network, it is understood; cut off for good, the missing bytes are counted.
#[test]
fn a_truncated_frame_is_told_how_much_is_missing() {
    bounded(|| {
        let target = Target::new();
        let request = echo_request(1, &Descriptor::inline(F32, &[2, 3], 24), &[0; 24]).bytes();
        // Header 64, descriptor 48 + 16, metadata 1, payload 24. Before the header is whole, only its rest is known.
        for (cut, missing) in [(1, 63), (63, 1), (64, 89), (100, 53), (128, 25), (129, 24), (152, 1)] {
            let mut peer = target.peer();
            peer.adds(9);
            peer.send(&request[..cut]);
            peer.finish();
            let why = format!("the connection ended inside a frame, {missing} bytes short");
            assert_says(&peer.close_text(), &why);
            target.serves_others();
        }
        // The end between two frames is no fault: the peer is gone, nothing is said.
        let mut peer = target.peer();
        peer.adds(9);
        peer.finish();
        assert_eq!(peer.receive(), None);
        target.serves_others();
        target.shutdown();
    });
}
