//! Rings that lie: files that could shrink, positions that cannot be, frames by the wrong way, and an end in the middle.
//!
//! The peer here reads and writes the file of the rings by its descriptor, at the places that `transport::shm::ring` documents.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, OwnedFd};

use farcall::Transport;
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};

use super::auth::by_unix;
use super::raw::{
    Arrived, CLOSE, Cursor, Frame, REPLY, RINGS, RawPeer, Target, WELCOME, add_request, announcement, assert_says,
    control, hello,
};
use crate::harness::{bounded, step};

const RING: u64 = 128 << 10;
const LEN: u64 = 4096 + 2 * RING;
/// Of a lane: the words, from its start.
const TAIL: u64 = 0;
const HEAD: u64 = 128;
const WAITING: u64 = 256;
const LANE: u64 = 640;
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

fn target() -> Target {
    Target::with_options(None, |options| (options.transport, options.tls) = (Transport::Auto, None))
}

/// A peer at the worker's Unix socket that offers these features, a bit each: 1 for slabs, 4 for rings.
fn near(target: &Target, features: u8) -> RawPeer {
    let stream = by_unix(target).expect("connects");
    let mut peer = RawPeer::on(TcpStream::from(OwnedFd::from(stream)));
    let mut hello = hello(target.group_name(), &control(Some("w0")));
    let at = hello.metadata.len() - 2;
    hello.metadata[at] = features;
    peer.send(&hello.bytes());
    assert!(peer.expect(WELCOME).metadata.ends_with(&[1, features]), "version 1, and what was offered");
    peer
}

fn file(len: u64, seals: SealFlags) -> OwnedFd {
    let file = rustix::fs::memfd_create(c"rings", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).expect("a memfd");
    rustix::fs::ftruncate(&file, len).expect("memory");
    rustix::fs::fcntl_add_seals(&file, seals).expect("seals");
    file
}

fn rings() -> Vec<u8> {
    Frame::new(RINGS).bytes()
}

/// A dialer whose frames go by rings.
struct RingPeer {
    peer: RawPeer,
    file: OwnedFd,
    tail: u64,
    head: u64,
}

impl RingPeer {
    fn new(target: &Target) -> Self {
        let (mut peer, file) = (near(target, 5), file(LEN, SEALS));
        peer.send_with(&rings(), &[file.as_fd()]);
        peer.expect(RINGS);
        let mut peer = Self { peer, file, tail: 0, head: 0 };
        peer.send(&announcement(1, "test::add", "(i64, i64) -> i64").bytes());
        peer
    }

    fn set(&self, at: u64, value: &[u8]) {
        assert_eq!(rustix::io::pwrite(&self.file, value, at), Ok(value.len()));
    }

    fn word(&self, at: u64) -> u64 {
        let mut word = [0; 8];
        assert_eq!(rustix::io::pread(&self.file, &mut word, at), Ok(8));
        u64::from_le_bytes(word)
    }

    fn bell(&mut self) {
        // The worker may have closed already.
        let _ = self.peer.stream().write_all(&[0]);
    }

    /// Writes bytes to the ring; here they never reach its end.
    fn put(&mut self, bytes: &[u8]) {
        self.set(4096 + self.tail, bytes);
        self.tail += bytes.len() as u64;
        self.set(TAIL, &self.tail.to_le_bytes());
    }

    fn send(&mut self, bytes: &[u8]) {
        self.put(bytes);
        self.bell();
    }

    fn adds(&mut self, call: u64) {
        self.send(&add_request(call).bytes());
        let reply = Arrived::read(self).expect("a reply");
        assert_eq!((reply.kind, reply.call, &reply.metadata[..]), (REPLY, call, &[10][..]), "zigzag of 5");
    }

    fn close_text(&mut self) -> String {
        loop {
            let frame = Arrived::read(self).expect("a Close frame before the end");
            if frame.kind == CLOSE {
                let mut metadata = Cursor(&frame.metadata);
                assert_eq!(metadata.varint(), 1, "the reason is: refused");
                return metadata.text();
            }
        }
    }
}

/// Reads the ring; sleeps as a driver does, on the socket.
impl Read for RingPeer {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut ended = false;
        loop {
            self.set(LANE + WAITING, &1_u32.to_le_bytes());
            let there = (self.word(LANE + TAIL) - self.head) as usize;
            if there > 0 || ended {
                let at = self.head % RING;
                let len = there.min(buffer.len()).min((RING - at) as usize);
                assert_eq!(rustix::io::pread(&self.file, &mut buffer[..len], 4096 + RING + at), Ok(len));
                self.head += len as u64;
                self.set(LANE + HEAD, &self.head.to_le_bytes());
                return Ok(len);
            }
            ended = self.peer.stream().read(&mut [0])? == 0;
        }
    }
}

/// By hand, both ways, around the ring's end, and with heartbeats that are a word in its page.
#[test]
fn calls_by_hand_are_answered_in_the_ring() {
    bounded(|| {
        let target = target();
        let mut peer = RingPeer::new(&target);
        (1..=20).for_each(|call| peer.adds(call));
        // Two frames with one bell, and half a frame with another.
        let [first, second, third] = [21, 22, 23].map(|call| add_request(call).bytes());
        peer.put(&first);
        peer.put(&second);
        peer.send(&third[..30]);
        for call in [21, 22] {
            assert_eq!(Arrived::read(&mut peer).expect("a reply").call, call);
        }
        peer.send(&third[30..]);
        assert_eq!(Arrived::read(&mut peer).expect("a reply").call, 23);
        target.serves_others();
        target.shutdown();
    });
}

/// What is sent before the rings are there is refused by the socket.
fn refused(features: u8, send: impl FnOnce(&mut RawPeer) + Send + 'static, why: &'static str) {
    bounded(move || {
        step(why);
        let target = target();
        let mut peer = near(&target, features);
        send(&mut peer);
        assert_says(&peer.close_text(), why);
        target.serves_others();
        target.shutdown();
    });
}

#[test]
fn rings_without_a_descriptor_are_refused() {
    refused(5, |peer| peer.send(&rings()), "no descriptor came with them");
}

#[test]
fn rings_that_are_no_memory_file_are_refused() {
    let null = std::fs::File::open("/dev/null").expect("a file");
    refused(5, move |peer| peer.send_with(&rings(), &[null.as_fd()]), "no memory file");
}

/// It could end its reader by SIGBUS.
#[test]
fn rings_that_can_shrink_are_refused() {
    let seals = SealFlags::GROW | SealFlags::SEAL;
    refused(5, move |peer| peer.send_with(&rings(), &[file(LEN, seals).as_fd()]), "it could shrink");
}

#[test]
fn rings_whose_seals_could_change_are_refused() {
    let seals = SealFlags::GROW | SealFlags::SHRINK;
    refused(5, move |peer| peer.send_with(&rings(), &[file(LEN, seals).as_fd()]), "not sealed as it must be");
}

#[test]
fn rings_that_cannot_be_written_are_refused() {
    refused(
        5,
        |peer| peer.send_with(&rings(), &[file(LEN, SEALS | SealFlags::WRITE).as_fd()]),
        "not sealed as it must be",
    );
}

#[test]
fn rings_of_another_size_are_refused() {
    for len in [0, 4096, LEN - 1, LEN + 4096] {
        refused(5, move |peer| peer.send_with(&rings(), &[file(len, SEALS).as_fd()]), "of another size");
    }
}

#[test]
fn rings_that_were_never_spoken_of_are_served_like_others() {
    bounded(|| {
        // Offered or not: the worker would have them.
        let target = target();
        let (mut peer, file) = (near(&target, 1), file(LEN, SEALS));
        peer.send_with(&rings(), &[file.as_fd()]);
        peer.expect(RINGS);
        target.serves_others();
        target.shutdown();
    });
}

/// What is wrong in the ring itself is told in the ring.
fn refused_in_ring(spoil: impl FnOnce(&mut RingPeer) + Send + 'static, why: &'static str) {
    bounded(move || {
        step(why);
        let target = target();
        let mut peer = RingPeer::new(&target);
        peer.adds(1);
        spoil(&mut peer);
        peer.bell();
        assert_says(&peer.close_text(), why);
        target.serves_others();
        target.shutdown();
    });
}

#[test]
fn a_tail_that_cannot_be_ends_the_connection() {
    for tail in [u64::MAX, 0, RING + 1000, 1 << 63] {
        refused_in_ring(move |peer| peer.set(TAIL, &tail.to_le_bytes()), "a position in them cannot be");
    }
}

/// Bytes are written only where they were read, so nobody hears of it: not even that it was refused.
#[test]
fn a_head_that_cannot_be_ends_the_connection() {
    bounded(|| {
        let target = target();
        let mut peer = RingPeer::new(&target);
        peer.adds(1);
        // Far ahead: as if more were read than was written. Looked at when there is no room by what was seen last.
        peer.set(LANE + HEAD, &u64::MAX.to_le_bytes());
        // Without arguments: what is wrong with them is longer than they are.
        for call in 2..900 {
            peer.put(&Frame { metadata: Vec::new(), ..add_request(call) }.bytes());
        }
        peer.bell();
        let mut rest = Vec::new();
        // The worker's end of the connection, without a deadline of this test's: it has nothing more to say.
        peer.peer.stream().read_to_end(&mut rest).expect("the end");
        assert!(rest.iter().all(|byte| *byte == 0), "bells, no frames");
        target.serves_others();
        target.shutdown();
    });
}

#[test]
fn frames_by_the_socket_after_the_last_are_refused() {
    refused_in_ring(|peer| peer.peer.send(&add_request(2).bytes()), "frames by the socket, after the last that should");
}

#[test]
fn rings_in_rings_are_refused() {
    refused_in_ring(|peer| peer.send(&rings()), "Rings frame where no rings on this connection is expected");
}

#[test]
fn bytes_that_are_no_frame_are_refused() {
    refused_in_ring(|peer| peer.send(&[7; 64]), "not a farcall frame");
}

/// Zeros take the place of bytes before they are published.
#[test]
fn a_hole_in_the_ring_is_no_frame() {
    refused_in_ring(
        |peer| {
            let frame = add_request(2).bytes();
            peer.set(4096 + peer.tail, &frame);
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&peer.file, flags, 4096, RING).expect("a hole");
            // Now, as the worker may be looking all the time.
            peer.tail += frame.len() as u64;
            peer.set(TAIL, &peer.tail.to_le_bytes());
        },
        "not a farcall frame",
    );
}

/// The socket ends in the middle of a frame.
#[test]
fn an_end_in_the_middle_of_a_frame_is_told_as_one() {
    bounded(|| {
        let target = target();
        let mut peer = RingPeer::new(&target);
        peer.put(&add_request(2).bytes());
        peer.put(&add_request(3).bytes()[..40]);
        peer.peer.stream().shutdown(Shutdown::Write).expect("a socket");
        assert_says(&peer.close_text(), "inside a frame");
        target.serves_others();
        target.shutdown();
    });
}

/// Whatever the word says that tells who sleeps: the worker goes on, and wakes nobody it should not.
#[test]
fn nonsense_about_who_sleeps_harms_nobody() {
    bounded(|| {
        let target = target();
        let mut peer = RingPeer::new(&target);
        for (call, word) in [(1, 0_u32), (2, 2), (3, 77), (4, u32::MAX)] {
            peer.set(WAITING, &word.to_le_bytes());
            peer.adds(call);
        }
        target.serves_others();
        target.shutdown();
    });
}
