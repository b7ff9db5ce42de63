//! Digests that lie, bytes that were changed on their way, and digests that nobody agreed to.

use xxhash_rust::xxh3::xxh3_64;

use crate::harness::bounded;

use super::raw::{AT_FLAGS, Descriptor, ERROR, Frame, REPLY, REQUEST, Target, U8, assert_says, chunk, varint};

const CHUNK: usize = 64 << 10;
const LEN: usize = 2 * CHUNK + 1000;

fn pattern() -> Vec<u8> {
    (0..LEN).map(|index| (index % 251) as u8).collect()
}

/// The same descriptor with digests behind it, of these bytes.
fn with_digests(descriptor: &Descriptor, bytes: &[u8]) -> Vec<u8> {
    let list: Vec<u8> = bytes.chunks(CHUNK).flat_map(|chunk| xxh3_64(chunk).to_le_bytes()).collect();
    let mut table = descriptor.bytes();
    table[3] |= 2;
    table[40..48].copy_from_slice(&xxh3_64(&list).to_le_bytes());
    table.extend(list);
    table
}

fn echo(call: u64, table: Vec<u8>, payload: &[u8]) -> Frame {
    Frame { call, table, tensors: 1, metadata: vec![0], payload: payload.to_vec(), ..Frame::new(REQUEST) }
}

const DIGESTS: u8 = 2;

/// By hand, both ways: digests of a request are compared, and those of its answer come when they are asked for.
#[test]
fn digests_by_hand_are_compared_and_answered() {
    bounded(|| {
        let target = Target::new();
        let (mut peer, key) = target.peer_offering(DIGESTS);
        let mut bulk = target.bulk(key);
        let small = Descriptor::inline(U8, &[1000], 1000);
        let payload = &pattern()[..1000];
        peer.send(&echo(1, with_digests(&small, payload), payload).bytes());
        let reply = peer.expect(REPLY);
        assert_eq!((reply.call, &reply.table, &reply.payload[..]), (1, &small.bytes(), payload), "none were asked for");
        peer.send(&echo(2, with_digests(&small, payload), payload).patched(AT_FLAGS, &[1, 0]));
        let reply = peer.expect(REPLY);
        assert_eq!((reply.call, reply.table), (2, with_digests(&small, payload)));
        let bytes = pattern();
        peer.send(&echo(3, with_digests(&Descriptor::bulk(9, LEN as u64), &bytes), &[]).patched(AT_FLAGS, &[1, 0]));
        bulk.send(&chunk(9, 0, &bytes[..CHUNK + 5]).bytes());
        bulk.send(&chunk(9, CHUNK as u64 + 5, &bytes[CHUNK + 5..]).bytes());
        let reply = peer.expect(REPLY);
        let transfer = u64::from_le_bytes(reply.table[8..16].try_into().expect("eight bytes"));
        assert_eq!((reply.call, reply.table), (3, with_digests(&Descriptor::bulk(transfer, LEN as u64), &bytes)));
        target.serves_others();
        target.shutdown();
    });
}

/// One byte of a tensor is changed on its way: the handler does not run, its caller is told where, and the connection goes on.
#[test]
fn bytes_that_were_changed_reach_no_handler() {
    bounded(|| {
        let target = Target::new();
        let (mut peer, key) = target.peer_offering(DIGESTS);
        let mut bulk = target.bulk(key);
        let bytes = pattern();
        for (call, at) in [(1, 0), (2, CHUNK - 1), (3, CHUNK), (4, LEN - 1)] {
            let mut changed = bytes.clone();
            changed[at] ^= 0x10;
            let transfer = 100 + call;
            peer.send(&echo(call, with_digests(&Descriptor::bulk(transfer, LEN as u64), &bytes), &[]).bytes());
            bulk.send(&chunk(transfer, 0, &changed).bytes());
            let start = at / CHUNK * CHUNK;
            let end = (start + CHUNK).min(LEN);
            let corrupt = [vec![8, 0], varint(start as u128), varint(end as u128)].concat();
            let error = peer.expect(ERROR);
            assert_eq!((error.call, error.metadata), (call, corrupt), "byte {at}");
        }
        let payload = &bytes[..1000];
        let mut changed = payload.to_vec();
        changed[500] ^= 1;
        peer.send(&echo(5, with_digests(&Descriptor::inline(U8, &[1000], 1000), payload), &changed).bytes());
        assert_eq!(peer.expect(ERROR).metadata, [vec![8, 0, 0], varint(1000)].concat());
        peer.adds(6);
        target.serves_others();
        target.shutdown();
    });
}

/// A list that is not what its descriptor says, too short, or not agreed to ends the connection.
#[test]
fn lists_of_digests_that_lie_are_refused() {
    let payload = &pattern()[..1000];
    let good = with_digests(&Descriptor::inline(U8, &[1000], 1000), payload);
    let mut other = good.clone();
    *other.last_mut().expect("a digest") ^= 1;
    let mut sealed = good.clone();
    sealed[40] ^= 1;
    let short = good[..good.len() - 1].to_vec();
    let mut unflagged = good[..56].to_vec();
    unflagged[3] = 0;
    let cases = [
        (DIGESTS, other, "a tensor's list of digests does not have the digest"),
        (DIGESTS, sealed, "a tensor's list of digests does not have the digest"),
        (DIGESTS, short, "the frame ends inside its tensor descriptors"),
        (DIGESTS, unflagged, "reserved bits set in a tensor descriptor"),
        (0, good, "reserved bits set in a tensor descriptor"),
    ];
    for (features, table, why) in cases {
        let payload = payload.to_vec();
        bounded(move || {
            let target = Target::new();
            let (mut peer, _) = target.peer_offering(features);
            peer.send(&echo(1, table, &payload).bytes());
            assert_says(&peer.close_text(), why);
            target.serves_others();
            target.shutdown();
        });
    }
}
