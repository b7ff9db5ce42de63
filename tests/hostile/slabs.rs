//! Slabs that lie: unsealed, of another size, not there, given back twice. And slabs that change while they are read.

use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use farcall::Transport;
use farcall::device::{Slab, SlabRange};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};

use super::auth::by_unix;
use super::raw::{
    Arrived, CANCEL, Descriptor, ERROR, Frame, LANDED, PING, RELEASE, REPLY, REQUEST, RETIRE, RawPeer, SLAB, Target,
    WELCOME, announcement, assert_says, control, echo_request, hello, varint,
};
use crate::harness::{bounded, step};

const LEN: u64 = 1 << 20;

fn target() -> Target {
    Target::with_options(None, |options| (options.transport, options.tls) = (Transport::Auto, None))
}

/// A peer at the worker's Unix socket that passes and takes slabs.
fn near(target: &Target) -> RawPeer {
    let stream = by_unix(target).expect("connects");
    let mut peer = RawPeer::on(TcpStream::from(OwnedFd::from(stream)));
    let mut hello = hello(target.group_name(), &control(Some("w0")));
    let features = hello.metadata.len() - 2;
    hello.metadata[features] = 1;
    peer.send(&hello.bytes());
    assert!(peer.expect(WELCOME).metadata.ends_with(&[1, 1]), "version 1, and slabs");
    peer.announce();
    peer
}

fn pass(id: u64, len: u64) -> Vec<u8> {
    Frame { call: id, offset: len, ..Frame::new(SLAB) }.bytes()
}

fn retire(id: u64) -> Vec<u8> {
    Frame { call: id, ..Frame::new(RETIRE) }.bytes()
}

fn release(leases: &[u64]) -> Vec<u8> {
    Frame { metadata: leases.iter().flat_map(|lease| lease.to_le_bytes()).collect(), ..Frame::new(RELEASE) }.bytes()
}

fn echo(call: u64, slab: u64, offset: u64, len: u64) -> Vec<u8> {
    echo_request(call, &Descriptor::lent(slab, offset, len, call), &[]).bytes()
}

/// A slab as workers make them.
fn slab() -> SlabRange {
    let mut slab = Slab::create(LEN as usize).expect("memory");
    slab.bytes_mut().iter_mut().enumerate().for_each(|(index, byte)| *byte = (index % 251) as u8);
    slab
}

fn file(slab: &SlabRange) -> BorrowedFd<'_> {
    slab.slab().fd().expect("a file")
}

fn unsealed(seals: SealFlags) -> OwnedFd {
    let file = rustix::fs::memfd_create(c"slab", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).expect("a memfd");
    rustix::fs::ftruncate(&file, LEN).expect("memory");
    rustix::fs::fcntl_add_seals(&file, seals).expect("seals");
    file
}

/// By hand, both ways: what is passed once is read at any place; leases go back, and are counted.
#[test]
fn a_tensor_in_a_slab_by_hand_is_echoed_and_given_back() {
    bounded(|| {
        let target = target();
        let mut peer = near(&target);
        let slab = slab();
        peer.send_with(&pass(7, LEN), &[file(&slab)]);
        for (call, offset) in [(1, 0), (2, 64), (3, LEN - 1000)] {
            peer.send(&echo(call, 7, offset, 1000));
            let mut released = Vec::new();
            loop {
                let frame = peer.receive().expect("a frame");
                match frame.kind {
                    RELEASE => released.extend(frame.metadata),
                    REPLY => {
                        assert_eq!(frame.payload, slab.bytes()[offset as usize..][..1000]);
                        break;
                    }
                    other => panic!("a frame of kind {other}"),
                }
            }
            // The echo itself holds the tensor until it is written: its lease comes with what is said next.
            while released.is_empty() {
                let frame = peer.receive().expect("a frame");
                assert_eq!(frame.kind, RELEASE);
                released.extend(frame.metadata);
            }
            assert_eq!(released, call.to_le_bytes());
        }
        peer.send(&retire(7));
        peer.adds(9);
        target.serves_others();
        target.shutdown();
    });
}

fn refused(send: impl FnOnce(&mut RawPeer) + Send + 'static, why: &'static str) {
    bounded(move || {
        step(why);
        let target = target();
        let mut peer = near(&target);
        send(&mut peer);
        assert_says(&peer.close_text(), why);
        target.serves_others();
        target.shutdown();
    });
}

fn landed(lease: u64, bytes: u64) -> Vec<u8> {
    Frame { call: lease, offset: bytes, ..Frame::new(LANDED) }.bytes()
}

fn echo_of_landing(call: u64, lease: u64) -> Vec<u8> {
    echo_request(call, &Descriptor::landing(7, 0, 1000, lease), &[]).bytes()
}

/// R1: what lands delays nobody; cancelled meanwhile, it is not worked on; and who dies meanwhile hurts nobody.
#[test]
fn a_tensor_that_lands_by_hand_is_echoed_once_it_has() {
    bounded(|| {
        let target = target();
        let mut peer = near(&target);
        let slab = slab();
        peer.send_with(&pass(7, LEN), &[file(&slab)]);
        peer.send(&echo_of_landing(1, 5));
        peer.send(&echo_of_landing(2, 6));
        for (call, bytes) in [(11, 1), (12, 400), (13, 999)] {
            peer.adds(call);
            peer.send(&landed(5, bytes));
        }
        peer.send(&Frame { call: 2, ..Frame::new(CANCEL) }.bytes());
        peer.send(&landed(6, 1000));
        peer.send(&landed(5, 1000));
        let (mut replies, mut cancelled) = (Vec::new(), false);
        while replies.is_empty() || !cancelled {
            let frame = peer.receive().expect("a frame");
            match frame.kind {
                RELEASE => assert_eq!(frame.metadata, 6_u64.to_le_bytes(), "of the cancelled one"),
                REPLY => replies.push(frame),
                ERROR => {
                    assert_eq!(frame.call, 2);
                    cancelled = true;
                }
                other => panic!("a frame of kind {other}"),
            }
        }
        assert_eq!((replies[0].call, &replies[0].payload[..]), (1, &slab.bytes()[..1000]));
        peer.send(&echo_of_landing(3, 8));
        drop(peer);
        target.serves_others();
        target.shutdown();
    });
}

/// The other way: a foreign tensor is announced, then told as it lands, here by the socket.
#[test]
fn a_foreign_result_lands_at_a_peer_by_hand() {
    bounded(|| {
        let target = target();
        let mut peer = near(&target);
        peer.send(&announcement(2, "test::foreign_pattern", "(usize, u64) -> Tensor").bytes());
        for (call, len) in [(1, 256_u64 << 10), (2, 3 << 20)] {
            let metadata = [varint(len.into()), varint(1)].concat();
            peer.send(&Frame { call, function: 2, metadata, ..Frame::new(REQUEST) }.bytes());
            let mut frames = Vec::new();
            while frames.last().is_none_or(|frame: &Arrived| frame.kind != LANDED || frame.offset < len) {
                frames.push(peer.receive().expect("a frame"));
            }
            let reply = frames.iter().position(|frame| frame.kind == REPLY).expect("before its bytes land");
            assert_eq!((frames[reply].table[2], frames[reply].payload.len()), (4, 0), "landing");
            let lease = u64::from_le_bytes(frames[reply].table[8..16].try_into().expect("eight bytes"));
            assert!(frames[reply + 1..].iter().all(|frame| frame.kind == LANDED && frame.call == lease));
            peer.send(&release(&[lease]));
        }
        peer.adds(9);
        target.serves_others();
        target.shutdown();
    });
}

#[test]
fn what_lands_otherwise_than_it_must_is_refused() {
    let cases: [(&[(u64, u64)], &str); 6] = [
        (&[(6, 10)], "lease 6 has landed 10 bytes, after 0 of 0"),
        (&[(5, 1001)], "lease 5 has landed 1001 bytes, after 0 of 1000"),
        (&[(5, u64::MAX)], "after 0 of 1000"),
        (&[(5, 0)], "lease 5 has landed 0 bytes, after 0 of 1000"),
        (&[(5, 400), (5, 400)], "lease 5 has landed 400 bytes, after 400 of 1000"),
        (&[(5, 1000), (5, 1000)], "lease 5 has landed 1000 bytes, after 0 of 0"),
    ];
    for (told, why) in cases {
        refused(
            move |peer| {
                peer.send_with(&pass(7, LEN), &[file(&slab())]);
                peer.send(&echo_of_landing(1, 5));
                for (lease, bytes) in told {
                    // Refused before the last, maybe.
                    peer.try_send(&landed(*lease, *bytes));
                }
            },
            why,
        );
    }
    let twice = |peer: &mut RawPeer| {
        peer.send_with(&pass(7, LEN), &[file(&slab())]);
        peer.send(&echo_of_landing(1, 5));
        peer.send(&echo_of_landing(2, 5));
    };
    refused(twice, "transfer 5 was announced twice");
    let more = Frame { call: 5, offset: 10, metadata: vec![1], ..Frame::new(LANDED) };
    refused(move |peer| peer.send(&more.bytes()), "reserved");
}

#[test]
fn a_tensor_that_was_never_lent_is_not_taken_back() {
    for (lease, offset) in [(1, 0), (0, 64), (u64::MAX, u64::MAX)] {
        refused(
            move |peer| peer.send(&echo_request(1, &Descriptor::back(lease, offset, 1000), &[]).bytes()),
            "came back, and is not out",
        );
    }
    let in_a_slab = Descriptor { slab: 1, ..Descriptor::back(1, 0, 1000) };
    refused(move |peer| peer.send(&echo_request(1, &in_a_slab, &[]).bytes()), "reserved");
}

#[test]
fn a_slab_without_a_descriptor_is_refused() {
    refused(|peer| peer.send(&pass(7, LEN)), "no descriptor came with it");
}

#[test]
fn a_slab_that_is_no_memory_file_is_refused() {
    refused(
        |peer| {
            let null = std::fs::File::open("/dev/null").expect("a file");
            peer.send_with(&pass(7, LEN), &[null.as_fd()]);
        },
        "no memory file",
    );
}

/// Each of them could end its reader by SIGBUS.
#[test]
fn a_slab_that_can_shrink_is_refused() {
    let seals = SealFlags::GROW | SealFlags::FUTURE_WRITE | SealFlags::SEAL;
    refused(move |peer| peer.send_with(&pass(7, LEN), &[unsealed(seals).as_fd()]), "it is not sealed");
}

#[test]
fn a_slab_that_anyone_can_write_is_refused() {
    let seals = SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    refused(move |peer| peer.send_with(&pass(7, LEN), &[unsealed(seals).as_fd()]), "it is not sealed");
}

#[test]
fn a_slab_of_another_size_is_refused() {
    refused(|peer| peer.send_with(&pass(7, 2 * LEN), &[file(&slab())]), "another size than announced");
}

#[test]
fn a_slab_beyond_the_limit_is_refused_before_it_is_mapped() {
    refused(|peer| peer.send_with(&pass(7, 1 << 50), &[file(&slab())]), "bytes of slabs exceed the limit");
}

#[test]
fn an_id_that_is_passed_twice_is_refused() {
    refused(
        |peer| {
            peer.send_with(&pass(7, LEN), &[file(&slab())]);
            peer.send_with(&pass(7, LEN), &[file(&slab())]);
        },
        "slab 7 is refused: it was passed twice",
    );
}

#[test]
fn descriptors_that_belong_to_no_frame_are_refused() {
    refused(
        |peer| {
            for _ in 0..5 {
                peer.send_with(&Frame::new(PING).bytes(), &[file(&slab())]);
            }
        },
        "descriptors without a frame exceed the limit",
    );
}

#[test]
fn a_tensor_in_no_slab_is_refused() {
    refused(|peer| peer.send(&echo(1, 7, 0, 1000)), "slab 7, which is not there");
}

#[test]
fn a_tensor_outside_its_slab_is_refused() {
    refused(
        |peer| {
            peer.send_with(&pass(7, LEN), &[file(&slab())]);
            peer.send(&echo(1, 7, LEN - 999, 1000));
        },
        "a tensor of 1000 bytes at 1047577 of slab 7, which has 1048576",
    );
}

#[test]
fn a_tensor_at_an_offset_that_overflows_is_refused() {
    refused(
        |peer| {
            peer.send_with(&pass(7, LEN), &[file(&slab())]);
            peer.send(&echo(1, 7, u64::MAX - 10, 1000));
        },
        "of slab 7, which has 1048576",
    );
}

/// Ids are not used again: this is what a stale generation would be.
#[test]
fn a_tensor_in_a_slab_that_was_retired_is_refused() {
    refused(
        |peer| {
            peer.send_with(&pass(7, LEN), &[file(&slab())]);
            peer.send(&retire(7));
            peer.send(&echo(1, 7, 0, 1000));
        },
        "slab 7, which is not there (any more)",
    );
}

#[test]
fn a_lease_that_is_not_out_is_refused() {
    refused(|peer| peer.send(&release(&[99])), "lease 99 came back, and is not out");
}

#[test]
fn half_a_lease_is_refused() {
    let half = Frame { metadata: vec![0; 7], ..Frame::new(RELEASE) };
    refused(move |peer| peer.send(&half.bytes()), "7 bytes are no leases");
}

/// A lease is one borrow: given back twice, it could free what another call has borrowed.
#[test]
fn a_lease_that_is_returned_twice_is_refused() {
    refused(
        |peer| {
            peer.send(&announcement(2, "test::pattern", "(usize, u64) -> Tensor").bytes());
            let metadata = [varint(100_000), varint(1)].concat();
            peer.send(&Frame { call: 1, function: 2, metadata, ..Frame::new(REQUEST) }.bytes());
            assert_eq!(peer.receive().expect("its slab").kind, SLAB);
            let reply = peer.expect(REPLY);
            assert_eq!((reply.table[2], reply.payload.len()), (2, 0), "in a slab");
            let lease = u64::from_le_bytes(reply.table[8..16].try_into().expect("eight bytes"));
            peer.send(&release(&[lease]));
            peer.adds(2);
            peer.send(&release(&[lease]));
        },
        "came back, and is not out",
    );
}

/// Who has not agreed to slabs is told that they are none of this connection's.
#[test]
fn slabs_are_refused_where_they_were_not_agreed_on() {
    bounded(|| {
        let target = target();
        target.refuses(&pass(7, LEN), "Slab frame where no slab on this connection is expected");
        target.refuses(&retire(7), "Retire frame where no slab on this connection is expected");
        target.refuses(&echo(1, 7, 0, 1000), "unknown payload mode 2");
        target.refuses(&echo_of_landing(1, 5), "unknown payload mode 4");
        target.refuses(&landed(5, 10), "lease 5 has landed 10 bytes");
        target.shutdown();
    });
}

/// Sealed, it can neither be cut nor emptied by whoever has it; its maker can still change it, and harms nobody but the call.
#[test]
fn a_slab_that_is_rewritten_while_it_is_read_harms_only_its_call() {
    bounded(|| {
        let target = target();
        let mut peer = near(&target);
        let mut slab = slab();
        peer.send_with(&pass(7, LEN), &[file(&slab)]);
        peer.send(&announcement(2, "test::hash", "(Tensor) -> (usize, u64)").bytes());
        let hash = |call| {
            let table = Descriptor::lent(7, 0, LEN, call).bytes();
            Frame { call, function: 2, table, tensors: 1, metadata: vec![0], ..Frame::new(REQUEST) }.bytes()
        };
        for call in 1..50 {
            peer.send(&hash(call));
            slab.bytes_mut().fill(call as u8);
            assert!(rustix::fs::ftruncate(file(&slab), 0).is_err());
            let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            assert!(rustix::fs::fallocate(file(&slab), punch, 0, LEN).is_err());
            while peer.receive().expect("a frame").kind != REPLY {}
        }
        // Gone without a word, with a tensor under way.
        peer.send(&hash(50));
        drop((peer, slab));
        target.serves_others();
        target.shutdown();
    });
}

/// A borrower that returns nothing takes what it was lent with it, and nothing else.
#[test]
fn a_borrower_that_returns_nothing_costs_its_own_tensors_only() {
    bounded(|| {
        let target = target();
        for _ in 0..3 {
            let mut peer = near(&target);
            peer.send(&announcement(2, "test::pattern", "(usize, u64) -> Tensor").bytes());
            for call in 1..20 {
                let metadata = [varint(2 << 20), varint(1)].concat();
                peer.send(&Frame { call, function: 2, metadata, ..Frame::new(REQUEST) }.bytes());
                while peer.receive().expect("a frame").kind != REPLY {}
            }
            drop(peer);
            target.serves_others();
        }
        target.shutdown();
    });
}
