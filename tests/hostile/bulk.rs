//! The bulk connection: chunks for transfers that frames have announced.

use crate::functions::gate;
use crate::harness::{bounded, unique};

use super::raw::{
    CHUNK, Descriptor, Frame, OPEN_BULK, REPLY, REQUEST, Target, add_request, announcement, assert_says, chunk,
    echo_request, text, varint,
};

const LEN: usize = 100_000;

fn pattern() -> Vec<u8> {
    (0..LEN).map(|index| (index % 251) as u8).collect()
}

/// Frames and chunks by hand, both directions. R1: while the transfer is half there, smaller calls are answered.
#[test]
fn a_transfer_by_hand_delays_no_call_and_comes_back_whole() {
    bounded(|| {
        let target = Target::new();
        let (mut peer, key) = target.peer_with_key();
        let mut bulk = target.bulk(key);
        let bytes = pattern();
        peer.send(&echo_request(1, &Descriptor::bulk(9, LEN as u64), &[]).bytes());
        bulk.send(&chunk(9, 0, &bytes[..60_000]).bytes());
        peer.adds(2);
        bulk.send(&chunk(9, 60_000, &bytes[60_000..]).bytes());
        let reply = peer.expect(REPLY);
        assert_eq!((reply.call, &reply.metadata[..], reply.payload.len()), (1, &[0][..], 0));
        let transfer = u64::from_le_bytes(reply.table[8..16].try_into().expect("eight bytes"));
        assert_eq!(reply.table, Descriptor::bulk(transfer, LEN as u64).bytes());
        // Nobody has read the bulk connection yet, and still calls are answered.
        peer.adds(3);
        let mut received = Vec::new();
        while received.len() < LEN {
            let arrived = bulk.expect(CHUNK);
            assert_eq!((arrived.call, arrived.offset), (transfer, received.len() as u64));
            received.extend(arrived.payload);
        }
        assert!(received == bytes);
        target.serves_others();
        target.shutdown();
    });
}

/// R1 in the other direction: a reply of 64 MiB that its caller does not read delays none of its other replies.
#[test]
fn a_large_reply_that_is_not_read_delays_no_other_reply() {
    bounded(|| {
        let target = Target::new();
        let (mut peer, key) = target.peer_with_key();
        let _bulk = target.bulk(key);
        peer.send(&announcement(2, "test::pattern", "(usize, u64) -> Tensor").bytes());
        let metadata = [varint(64 << 20), varint(1)].concat();
        peer.send(&Frame { call: 1, function: 2, metadata, ..Frame::new(REQUEST) }.bytes());
        assert_eq!(peer.expect(REPLY).call, 1);
        for call in 2..50 {
            peer.adds(call);
        }
        target.serves_others();
        target.shutdown();
    });
}

/// A callee that has something large to say asks its caller for the bulk connection.
#[test]
fn a_worker_asks_for_the_bulk_connection_that_it_needs() {
    bounded(|| {
        let target = Target::new();
        let (mut peer, key) = target.peer_with_key();
        peer.send(&announcement(2, "test::pattern", "(usize, u64) -> Tensor").bytes());
        let metadata = [varint(70_000), varint(1)].concat();
        peer.send(&Frame { call: 1, function: 2, metadata, ..Frame::new(REQUEST) }.bytes());
        let mut kinds = [peer.receive().expect("a frame").kind, peer.receive().expect("a frame").kind];
        kinds.sort_unstable();
        assert_eq!(kinds, [REPLY, OPEN_BULK]);
        let arrived = target.bulk(key).expect(CHUNK);
        assert_eq!(arrived.payload.len(), 70_000);
        target.shutdown();
    });
}

/// A transfer of `LEN` bytes is announced, then `chunks` are sent; the endpoint ends, and says why.
fn refused(chunks: impl FnOnce() -> Vec<Vec<u8>> + Send + 'static, why: &'static str) {
    bounded(move || {
        let target = Target::new();
        let (mut peer, key) = target.peer_with_key();
        let mut bulk = target.bulk(key);
        peer.send(&echo_request(1, &Descriptor::bulk(9, LEN as u64), &[]).bytes());
        // The announcement is read before what comes after its answer.
        peer.adds(2);
        for chunk in chunks() {
            bulk.try_send(&chunk);
        }
        assert_says(&peer.close_text(), why);
        assert_eq!(bulk.receive(), None, "the bulk connection ends with the endpoint");
        target.serves_others();
        target.shutdown();
    });
}

#[test]
fn a_chunk_out_of_order_is_refused() {
    refused(
        || vec![chunk(9, 50_000, &pattern()[50_000..60_000]).bytes()],
        "chunk at 50000 of 10000 bytes does not continue transfer 9 at 0",
    );
}

#[test]
fn a_chunk_beyond_its_transfer_is_refused() {
    refused(
        || vec![chunk(9, 0, &[1; LEN + 1]).bytes()],
        "chunk at 0 of 100001 bytes does not continue transfer 9 at 0",
    );
}

#[test]
fn a_chunk_whose_end_overflows_is_refused() {
    refused(
        || vec![chunk(9, u64::MAX, &[1; 2]).bytes()],
        "chunk at 18446744073709551615 of 2 bytes does not continue transfer 9 at 0",
    );
}

#[test]
fn a_chunk_that_comes_twice_is_refused() {
    refused(
        || vec![chunk(9, 0, &[1; 1000]).bytes(), chunk(9, 0, &[1; 1000]).bytes()],
        "chunk at 0 of 1000 bytes does not continue transfer 9 at 1000",
    );
}

#[test]
fn a_chunk_without_bytes_is_refused() {
    refused(|| vec![chunk(9, 0, &[]).bytes()], "chunk at 0 of 0 bytes does not continue transfer 9 at 0");
}

#[test]
fn a_chunk_above_its_limit_is_refused() {
    refused(
        || vec![chunk(9, 0, &[]).patched(32, &(4_194_305_u64).to_le_bytes())],
        "4194305 payload bytes in one frame exceed the limit of 4194304",
    );
}

#[test]
fn other_frames_on_the_bulk_connection_are_refused() {
    refused(|| vec![add_request(3).bytes()], "Request frame where a chunk is expected");
}

#[test]
fn garbage_on_the_bulk_connection_is_refused() {
    refused(|| vec![vec![0xab; 64]], "not a farcall frame: magic 0xabababab");
}

#[test]
fn a_chunk_that_is_cut_off_ends_the_endpoint() {
    bounded(|| {
        let target = Target::new();
        let (mut peer, key) = target.peer_with_key();
        let mut bulk = target.bulk(key);
        peer.send(&echo_request(1, &Descriptor::bulk(9, LEN as u64), &[]).bytes());
        peer.adds(2);
        bulk.send(&chunk(9, 0, &pattern()).bytes()[..50_000]);
        drop(bulk);
        // The peer is gone as far as the worker knows: nothing needs to be said.
        while peer.receive().is_some() {}
        target.serves_others();
        target.shutdown();
    });
}

/// Chunks of a transfer that is complete, or was never announced, wait for its frame; not for ever.
#[test]
fn a_chunk_of_no_transfer_is_refused_in_time() {
    bounded(|| {
        let target = Target::new();
        let (mut peer, key) = target.peer_with_key();
        let mut bulk = target.bulk(key);
        bulk.send(&chunk(77, 0, &[1; 10]).bytes());
        peer.adds(1);
        assert_says(&peer.close_text(), "no complete frame for a bulk chunk within 10s");
        target.serves_others();
        target.shutdown();
    });
}

/// The frame may come after its chunks: they wait for it.
#[test]
fn a_chunk_that_overtakes_its_frame_waits_for_it() {
    bounded(|| {
        let target = Target::new();
        let (mut peer, key) = target.peer_with_key();
        let mut bulk = target.bulk(key);
        for round in 0..20 {
            bulk.send(&chunk(round, 0, &pattern()).bytes());
            peer.adds(1000 + round);
            peer.send(&echo_request(round, &Descriptor::bulk(round, LEN as u64), &[]).bytes());
            assert_eq!(peer.expect(REPLY).call, round);
            assert!(bulk.expect(CHUNK).payload == pattern());
        }
        target.shutdown();
    });
}

#[test]
fn a_transfer_announced_twice_is_refused() {
    bounded(|| {
        let target = Target::new();
        let descriptor = Descriptor::bulk(9, LEN as u64);
        let request = echo_request(1, &descriptor, &[]).bytes();
        target.refuses(&[&request[..], &request].concat(), "transfer 9 was announced twice");
        let table = [descriptor.bytes(), descriptor.bytes()].concat();
        let twice = Frame { table, tensors: 2, ..echo_request(1, &descriptor, &[]) };
        target.refuses(&twice.bytes(), "transfer 9 was announced twice");
        target.shutdown();
    });
}

/// Transfers that never come are forgotten with their endpoint; their memory is used again.
#[test]
fn transfers_that_never_come_are_forgotten_with_their_peer() {
    bounded(|| {
        let target = Target::new();
        for _ in 0..200 {
            let mut peer = target.peer();
            for transfer in 0..10 {
                peer.send(&echo_request(1, &Descriptor::bulk(transfer, 1 << 20), &[]).bytes());
            }
            peer.adds(2);
        }
        // 2 GB were announced; 10 MiB at a time.
        let mapped = target.agent().runtime().stats().mapped_bytes;
        assert!(mapped < 1 << 30, "{mapped} bytes are mapped");
        target.serves_others();
        target.shutdown();
    });
}

/// A second bulk connection of one key must not disturb the worker: the first one is not forgotten in the driver.
#[test]
fn a_second_bulk_connection_of_one_key_leaves_no_connection_behind() {
    bounded(|| {
        let target = Target::new();
        let (mut peer, key) = target.peer_with_key();
        let mut first = target.bulk(key);
        let mut second = target.bulk(key);
        // Whatever the worker makes of it: it serves others, and all ends with the endpoint.
        first.try_send(&chunk(9, 0, &[1; 10]).bytes());
        second.try_send(&chunk(9, 0, &[1; 10]).bytes());
        target.serves_others();
        peer.try_send(&[0; 64]);
        while peer.receive().is_some() {}
        assert_eq!((first.receive(), second.receive()), (None, None));
        target.serves_others();
        target.shutdown();
    });
}

/// An endpoint that ends while its handler holds a bulk argument leaves nothing behind.
#[test]
fn a_peer_that_leaves_after_its_transfer_hurts_nobody() {
    bounded(|| {
        let target = Target::new();
        let held = unique("held");
        let (mut peer, key) = target.peer_with_key();
        let mut bulk = target.bulk(key);
        peer.send(&announcement(2, "test::hash_after", "(String, Tensor) -> (usize, u64)").bytes());
        let descriptor = Descriptor::bulk(1, LEN as u64);
        let metadata = [text(&held), vec![0]].concat();
        peer.send(&Frame { function: 2, metadata, ..echo_request(1, &descriptor, &[]) }.bytes());
        bulk.send(&chunk(1, 0, &pattern()).bytes());
        assert!(gate(&held).wait_arrived(1));
        drop((peer, bulk));
        target.serves_others();
        gate(&held).open();
        target.serves_others();
        target.shutdown();
    });
}
