//! A peer that writes bytes: frames, descriptors and postcard built by hand, from the tables in the crates' headers.

use std::io::{ErrorKind, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use farcall::JobKey;
use farcall::prelude::*;
use hmac::{Hmac, KeyInit, Mac};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use sha2::Sha256;

use crate::functions::add;
use crate::harness::{Group, step};

pub(crate) const HELLO: u8 = 1;
pub(crate) const WELCOME: u8 = 2;
pub(crate) const FUNCTION: u8 = 3;
pub(crate) const REQUEST: u8 = 4;
pub(crate) const REPLY: u8 = 5;
pub(crate) const ERROR: u8 = 6;
pub(crate) const CANCEL: u8 = 7;
pub(crate) const CLOSE: u8 = 8;
pub(crate) const OPEN_BULK: u8 = 9;
pub(crate) const CHUNK: u8 = 10;
pub(crate) const PING: u8 = 11;
pub(crate) const SLAB: u8 = 12;
pub(crate) const RETIRE: u8 = 13;
pub(crate) const RELEASE: u8 = 14;
pub(crate) const RINGS: u8 = 15;
pub(crate) const LANDED: u8 = 16;
pub(crate) const CHALLENGE: u8 = 20;
pub(crate) const PROOF: u8 = 21;

// Where header fields are.
pub(crate) const AT_VERSION: usize = 4;
pub(crate) const AT_KIND: usize = 5;
pub(crate) const AT_FLAGS: usize = 6;
pub(crate) const AT_META_LEN: usize = 20;
pub(crate) const AT_TABLE_LEN: usize = 24;
pub(crate) const AT_TENSORS: usize = 28;
pub(crate) const AT_EXT_LEN: usize = 30;
pub(crate) const AT_PAYLOAD_LEN: usize = 32;
pub(crate) const AT_CREDIT: usize = 56;
pub(crate) const AT_RESERVED: usize = 60;

/// How long an answer may take that needs no timeout of the worker.
const PATIENCE: Duration = Duration::from_secs(15);

// ---- building ----

/// What a frame is made of; its lengths follow.
#[derive(Clone, Default)]
pub(crate) struct Frame {
    pub(crate) kind: u8,
    pub(crate) call: u64,
    pub(crate) function: u32,
    pub(crate) offset: u64,
    pub(crate) table: Vec<u8>,
    pub(crate) tensors: u16,
    pub(crate) metadata: Vec<u8>,
    pub(crate) payload: Vec<u8>,
}

impl Frame {
    pub(crate) fn new(kind: u8) -> Self {
        Self { kind, ..Self::default() }
    }

    /// 64 bytes of header, then descriptors, metadata and payload.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = b"FCL1\x01".to_vec();
        bytes.push(self.kind);
        bytes.extend(0_u16.to_le_bytes()); // flags
        bytes.extend(self.call.to_le_bytes());
        bytes.extend(self.function.to_le_bytes());
        bytes.extend((self.metadata.len() as u32).to_le_bytes());
        bytes.extend((self.table.len() as u32).to_le_bytes());
        bytes.extend(self.tensors.to_le_bytes());
        bytes.extend(0_u16.to_le_bytes()); // ext_len
        bytes.extend((self.payload.len() as u64).to_le_bytes());
        bytes.extend(0_u64.to_le_bytes()); // deadline_us
        bytes.extend(self.offset.to_le_bytes());
        bytes.extend(0_u64.to_le_bytes()); // credit, reserved
        assert_eq!(bytes.len(), 64);
        for part in [&self.table, &self.metadata, &self.payload] {
            bytes.extend(part);
        }
        bytes
    }

    /// The bytes with `value` written over those at `at`.
    pub(crate) fn patched(&self, at: usize, value: &[u8]) -> Vec<u8> {
        let mut bytes = self.bytes();
        bytes[at..at + value.len()].copy_from_slice(value);
        bytes
    }
}

/// A tensor's descriptor, all of whose fields can lie.
#[derive(Clone)]
pub(crate) struct Descriptor {
    pub(crate) dtype: u8,
    pub(crate) mode: u8,
    pub(crate) flags: u8,
    pub(crate) device: (u8, u16),
    pub(crate) transfer: u64,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) slab: u64,
    pub(crate) shape: Vec<i64>,
    pub(crate) strides: Vec<i64>,
}

pub(crate) const U8: u8 = 1;
pub(crate) const F32: u8 = 11;

impl Descriptor {
    /// A contiguous inline tensor on the host.
    pub(crate) fn inline(dtype: u8, shape: &[i64], len: u64) -> Self {
        let shape = shape.to_vec();
        let (transfer, offset, slab) = (0, 0, 0);
        Self { dtype, mode: 0, flags: 0, device: (0, 0), transfer, offset, len, slab, shape, strides: Vec::new() }
    }

    /// A vector of bytes on the host that travels on the bulk connection.
    pub(crate) fn bulk(transfer: u64, len: u64) -> Self {
        Self { mode: 1, transfer, ..Self::inline(U8, &[len as i64], len) }
    }

    /// A vector of bytes on the host that lies in a slab.
    pub(crate) fn lent(slab: u64, offset: u64, len: u64, lease: u64) -> Self {
        Self { mode: 2, transfer: lease, offset, slab, ..Self::inline(U8, &[len as i64], len) }
    }

    /// The same, whose bytes are still to land.
    pub(crate) fn landing(slab: u64, offset: u64, len: u64, lease: u64) -> Self {
        Self { mode: 4, ..Self::lent(slab, offset, len, lease) }
    }

    /// A vector of bytes that the target has lent.
    pub(crate) fn back(lease: u64, offset: u64, len: u64) -> Self {
        Self { mode: 3, transfer: lease, offset, ..Self::inline(U8, &[len as i64], len) }
    }

    pub(crate) fn strided(mut self, strides: &[i64]) -> Self {
        (self.flags, self.strides) = (1, strides.to_vec());
        self
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![self.dtype, self.shape.len() as u8, self.mode, self.flags, self.device.0, 0];
        bytes.extend(self.device.1.to_le_bytes());
        bytes.extend(self.transfer.to_le_bytes());
        bytes.extend(self.offset.to_le_bytes());
        bytes.extend(self.len.to_le_bytes());
        bytes.extend(self.slab.to_le_bytes());
        bytes.extend([0; 8]); // digest
        assert_eq!(bytes.len(), 48);
        bytes.extend(self.shape.iter().chain(&self.strides).flat_map(|value| value.to_le_bytes()));
        bytes
    }
}

pub(crate) fn varint(mut value: u128) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

pub(crate) fn text(text: &str) -> Vec<u8> {
    [varint(text.len() as u128), text.as_bytes().to_vec()].concat()
}

/// What a hello offers: versions 1 to 1, no features, no nonce.
pub(crate) const OFFER: [u8; 4] = [1, 1, 0, 0];

/// The metadata of a hello: group, worker (name, rank, address, pid, incarnation, no Unix socket), role, and what it offers.
pub(crate) fn hello_metadata(group: &str, name: &str, rank: u32, role: &[u8]) -> Vec<u8> {
    let address = [&[0, 127, 0, 0, 1][..], &varint(1)].concat(); // V4, octets, port
    let worker = [text(name), varint(rank.into()), address, varint(77), varint(1), vec![0]].concat();
    [text(group), worker, role.to_vec(), OFFER.to_vec()].concat()
}

/// The role of a control connection to the worker `target`.
pub(crate) fn control(target: Option<&str>) -> Vec<u8> {
    target.map_or_else(|| vec![0, 0], |target| [vec![0, 1], text(target)].concat())
}

/// The role of the bulk connection of this key.
pub(crate) fn bulk_role(key: u128) -> Vec<u8> {
    [vec![1], varint(key)].concat()
}

pub(crate) fn hello(group: &str, role: &[u8]) -> Frame {
    Frame { metadata: hello_metadata(group, "raw", 99, role), ..Frame::new(HELLO) }
}

/// A function whose types are made of what its signature says, in serde's words.
pub(crate) fn announcement(function: u32, name: &str, signature: &str) -> Frame {
    let types = signature.replace("String", "str").replace("usize", "u64");
    let metadata = [vec![USER], text(name), text(signature), text(&types)].concat();
    Frame { function, metadata, ..Frame::new(FUNCTION) }
}

/// An operator of this full name, by its signature's text.
pub(crate) fn builtin_announcement(function: u32, name: &str, signature: &str) -> Frame {
    Frame {
        function,
        metadata: [vec![BUILTIN], text(name), text(signature), text("")].concat(),
        ..Frame::new(FUNCTION)
    }
}

/// Kinds of functions, the first byte of an announcement's metadata.
const USER: u8 = 0;
const BUILTIN: u8 = 1;

/// `test::echo`, function 0, of the tensor that `descriptor` and `payload` make; its metadata is the tensor's index.
pub(crate) fn echo_request(call: u64, descriptor: &Descriptor, payload: &[u8]) -> Frame {
    let (table, payload) = (descriptor.bytes(), payload.to_vec());
    Frame { call, table, tensors: 1, metadata: vec![0], payload, ..Frame::new(REQUEST) }
}

/// `test::add(2, 3)`, function 1: zigzag makes them 4 and 6.
pub(crate) fn add_request(call: u64) -> Frame {
    Frame { call, function: 1, metadata: vec![4, 6], ..Frame::new(REQUEST) }
}

pub(crate) fn chunk(transfer: u64, offset: u64, payload: &[u8]) -> Frame {
    Frame { call: transfer, offset, payload: payload.to_vec(), ..Frame::new(CHUNK) }
}

/// A hello that asks for the proof of a job key.
pub(crate) fn with_nonce(hello: &Frame, nonce: [u8; 32]) -> Frame {
    let mut hello = hello.clone();
    assert_eq!(hello.metadata.pop(), Some(0), "no nonce");
    hello.metadata.push(1);
    hello.metadata.extend(nonce);
    hello
}

/// What a proof covers, as `transport::auth` has it in its header.
#[derive(Clone)]
pub(crate) struct Transcript {
    key: Vec<u8>,
    bytes: Vec<u8>,
}

impl Transcript {
    pub(crate) fn worker(key: &JobKey) -> Self {
        let hex = key.to_hex();
        let key = (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).expect("digits"));
        Self { key: key.collect(), bytes: b"farcall 1 worker\0".to_vec() }
    }

    pub(crate) fn with(mut self, message: &[u8]) -> Self {
        self.bytes.extend((message.len() as u32).to_le_bytes());
        self.bytes.extend(message);
        self
    }

    pub(crate) fn proof(&self, role: &str) -> Vec<u8> {
        let mac = Hmac::<Sha256>::new_from_slice(&self.key).expect("any length");
        mac.chain_update(&self.bytes).chain_update(role).finalize().into_bytes().to_vec()
    }
}

// ---- reading ----

/// A frame that arrived.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Arrived {
    pub(crate) kind: u8,
    pub(crate) call: u64,
    pub(crate) offset: u64,
    pub(crate) table: Vec<u8>,
    pub(crate) metadata: Vec<u8>,
    pub(crate) payload: Vec<u8>,
}

impl Arrived {
    /// The next frame of a stream, or `None` once that ended.
    pub(crate) fn read(stream: &mut impl Read) -> Option<Self> {
        let mut head = [0; 64];
        match stream.read_exact(&mut head) {
            Ok(()) => {}
            Err(error) if matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset) => return None,
            Err(error) => panic!("no frame and no end within {PATIENCE:?}: {error}"),
        }
        assert_eq!(&head[..5], b"FCL1\x01");
        let mut read = |len: usize| {
            let mut bytes = vec![0; len];
            stream.read_exact(&mut bytes).expect("a whole frame");
            bytes
        };
        let table = read(u32_at(&head, AT_TABLE_LEN) as usize);
        let metadata = read(u32_at(&head, AT_META_LEN) as usize);
        let payload = read(u64_at(&head, AT_PAYLOAD_LEN) as usize);
        Some(Self { kind: head[AT_KIND], call: u64_at(&head, 8), offset: u64_at(&head, 48), table, metadata, payload })
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// Postcard's values off the front of bytes.
pub(crate) struct Cursor<'a>(pub(crate) &'a [u8]);

impl Cursor<'_> {
    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        let (head, rest) = self.0.split_at(len);
        self.0 = rest;
        head.to_vec()
    }

    pub(crate) fn varint(&mut self) -> u128 {
        let mut value = 0;
        for shift in (0..).step_by(7) {
            let byte = self.bytes(1)[0];
            value |= u128::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                break;
            }
        }
        value
    }

    pub(crate) fn text(&mut self) -> String {
        let len = self.varint() as usize;
        String::from_utf8(self.bytes(len)).expect("UTF-8")
    }
}

// ---- the peer ----

/// A TCP connection to a worker's port.
pub(crate) struct RawPeer {
    stream: TcpStream,
}

impl RawPeer {
    pub(crate) fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).expect("the port accepts");
        stream.set_nodelay(true).expect("a socket option");
        Self::on(stream)
    }

    /// The same on any stream socket.
    pub(crate) fn on(stream: TcpStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket option");
        stream.set_write_timeout(Some(PATIENCE)).expect("a socket option");
        Self { stream }
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("the worker reads");
    }

    /// Sends bytes, and descriptors with the first of them.
    pub(crate) fn send_with(&mut self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(descriptors)));
        let sent = rustix::net::sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL);
        assert_eq!(sent.expect("the worker reads"), bytes.len());
    }

    /// Sends what the worker may refuse to read to its end.
    pub(crate) fn try_send(&mut self, bytes: &[u8]) -> bool {
        self.stream.write_all(bytes).is_ok()
    }

    /// Ends this side's direction.
    pub(crate) fn finish(&mut self) {
        // The worker may have closed already.
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// The next frame, or `None` once the connection ended. Pings are answered meanwhile: whoever listens lives.
    pub(crate) fn receive(&mut self) -> Option<Arrived> {
        loop {
            let frame = self.receive_any()?;
            if frame.kind != PING {
                return Some(frame);
            }
            // Whoever closes meanwhile says so in the frames that follow.
            self.try_send(&Frame::new(PING).bytes());
        }
    }

    fn receive_any(&mut self) -> Option<Arrived> {
        Arrived::read(&mut self.stream)
    }

    /// The socket.
    pub(crate) fn stream(&mut self) -> &mut TcpStream {
        &mut self.stream
    }

    /// The next frame, which must be of `kind`.
    pub(crate) fn expect(&mut self, kind: u8) -> Arrived {
        let frame = self.receive().expect("a frame, not the end");
        assert_eq!(frame.kind, kind, "{:?}", String::from_utf8_lossy(&frame.metadata));
        frame
    }

    /// Reads on until the worker says why it closes; then the connection must end.
    pub(crate) fn close_text(&mut self) -> String {
        let (reason, text) = self.close();
        assert_eq!(reason, 1, "the reason is: refused");
        text
    }

    /// The same for any reason; gives its number, and the text.
    pub(crate) fn close(&mut self) -> (u128, String) {
        loop {
            let frame = self.receive().expect("a Close frame before the end");
            if frame.kind == CLOSE {
                assert_eq!(self.receive(), None, "nothing follows a Close");
                let mut metadata = Cursor(&frame.metadata);
                return (metadata.varint(), metadata.text());
            }
        }
    }

    /// One byte if it comes within `timeout`; `Some(0)` at the end.
    pub(crate) fn peek(&mut self, timeout: Duration) -> Option<usize> {
        self.stream.set_read_timeout(Some(timeout)).expect("a socket option");
        let peeked = self.stream.peek(&mut [0]);
        self.stream.set_read_timeout(Some(PATIENCE)).expect("a socket option");
        peeked.ok()
    }

    /// Says hello to the worker of this name and rank and reads its welcome; gives the bulk key.
    pub(crate) fn greet(&mut self, group: &str, target: &str, rank: u128, key: Option<&JobKey>) -> u128 {
        self.greet_offering(0, group, (target, rank), key)
    }

    /// The same with these features, which the worker has, too.
    fn greet_offering(
        &mut self,
        features: u8,
        group: &str,
        (target, rank): (&str, u128),
        key: Option<&JobKey>,
    ) -> u128 {
        let mut hello = hello(group, &control(Some(target)));
        let offer = hello.metadata.len() - 2;
        hello.metadata[offer] = features;
        let transcript = self.introduce(&hello, key);
        let mut welcome = self.expect(WELCOME).metadata;
        if let Some(transcript) = transcript {
            let proof = welcome.split_off(welcome.len() - 32);
            assert_eq!(transcript.with(&welcome).proof("welcome"), proof, "the worker proves its welcome");
        }
        let mut metadata = Cursor(&welcome);
        assert_eq!((metadata.text().as_str(), metadata.varint()), (target, rank), "name and rank");
        assert_eq!(metadata.bytes(5), [0, 127, 0, 0, 1], "its address");
        for _port_pid_incarnation in 0..3 {
            metadata.varint();
        }
        if metadata.varint() == 1 {
            let [_name, _boot] = [metadata.text(), metadata.text()];
            let [_network, _user] = [metadata.varint(), metadata.varint()];
            if metadata.varint() == 1 {
                let [_page, _id] = [metadata.varint(), metadata.varint()];
            }
        }
        let key = metadata.varint();
        assert_eq!(metadata.0, [1, features], "the version and the features to go on with");
        key
    }

    /// Says hello and, with a key, proves it and has the worker prove it.
    pub(crate) fn introduce(&mut self, hello: &Frame, key: Option<&JobKey>) -> Option<Transcript> {
        let Some(key) = key else {
            self.send(&hello.bytes());
            return None;
        };
        let hello = with_nonce(hello, [7; 32]);
        self.send(&hello.bytes());
        let challenge = self.expect(CHALLENGE).metadata;
        assert_eq!(challenge.len(), 64);
        let transcript = Transcript::worker(key).with(&hello.metadata).with(&challenge[..32]);
        assert_eq!(transcript.proof("challenge"), challenge[32..], "the worker proves its key");
        let transcript = transcript.with(&challenge[32..]);
        let metadata = transcript.proof("proof");
        self.send(&Frame { metadata: metadata.clone(), ..Frame::new(PROOF) }.bytes());
        Some(transcript.with(&metadata))
    }

    /// Announces `test::echo` as 0 and `test::add` as 1.
    pub(crate) fn announce(&mut self) {
        self.send(&announcement(0, "test::echo", "(Tensor) -> Tensor").bytes());
        self.send(&announcement(1, "test::add", "(i64, i64) -> i64").bytes());
    }

    /// The worker still answers on this very connection.
    pub(crate) fn adds(&mut self, call: u64) {
        self.send(&add_request(call).bytes());
        let reply = self.expect(REPLY);
        assert_eq!((reply.call, &reply.metadata[..]), (call, &[10][..]), "zigzag of 5");
    }
}

/// The worker under attack, w0, and w1, which must not notice.
pub(crate) struct Target {
    group: Group,
}

impl Target {
    pub(crate) fn new() -> Self {
        Self::with_key(None)
    }

    /// The same with other limits, say.
    pub(crate) fn with(change: impl Fn(&mut Options)) -> Self {
        let group = Group::with(2, change);
        group.answers();
        Self { group }
    }

    /// The same in a group with a job key.
    pub(crate) fn with_key(key: Option<JobKey>) -> Self {
        Self::with_options(key, |_| {})
    }

    pub(crate) fn with_options(key: Option<JobKey>, change: impl Fn(&mut Options)) -> Self {
        let group = Group::with_key(2, key, change);
        group.answers();
        Self { group }
    }

    pub(crate) fn job_key(&self) -> Option<&JobKey> {
        self.group.key.as_ref()
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.group.address(0)
    }

    pub(crate) fn group_name(&self) -> &str {
        &self.group.name
    }

    pub(crate) fn agent(&self) -> &Agent {
        &self.group.agents[0]
    }

    /// w1 is served by w0, on the connection they had before; so is a new peer.
    pub(crate) fn serves_others(&self) {
        step("a healthy peer's call");
        let sum = self.group.agents[1].to("w0").deadline(PATIENCE).call(add, (2, 3)).wait();
        assert_eq!(sum.expect("a healthy peer is served"), 5);
        let mut other = self.peer();
        other.adds(1);
    }

    /// A connection that has said nothing.
    pub(crate) fn stranger(&self) -> RawPeer {
        RawPeer::connect(self.address())
    }

    /// A peer that is welcome and has announced its functions.
    pub(crate) fn peer(&self) -> RawPeer {
        self.peer_with_key().0
    }

    pub(crate) fn peer_with_key(&self) -> (RawPeer, u128) {
        self.peer_offering(0)
    }

    pub(crate) fn peer_offering(&self, features: u8) -> (RawPeer, u128) {
        let mut peer = self.stranger();
        let key = peer.greet_offering(features, &self.group.name, ("w0", 0), self.job_key());
        peer.announce();
        (peer, key)
    }

    /// The bulk connection of a peer's key.
    pub(crate) fn bulk(&self, key: u128) -> RawPeer {
        let mut bulk = self.stranger();
        bulk.introduce(&hello(&self.group.name, &bulk_role(key)), self.job_key());
        bulk
    }

    /// First bytes are refused with this text, and nobody else notices.
    pub(crate) fn refuses_first(&self, bytes: &[u8], why: &str) {
        step(format_args!("refusing a first frame: {why}"));
        let mut peer = self.stranger();
        peer.send(bytes);
        assert_says(&peer.close_text(), why);
        self.serves_others();
    }

    /// A frame of a welcome peer is refused with this text, and nobody else notices.
    pub(crate) fn refuses(&self, bytes: &[u8], why: &str) {
        step(format_args!("refusing a frame: {why}"));
        let mut peer = self.peer();
        peer.send(bytes);
        assert_says(&peer.close_text(), why);
        self.serves_others();
    }

    pub(crate) fn shutdown(self) {
        self.group.shutdown();
    }
}

pub(crate) fn assert_says(text: &str, why: &str) {
    assert!(text.contains(why), "the worker said {text:?}, expected was {why:?}");
}

/// How long `run` took.
pub(crate) fn timed(run: impl FnOnce()) -> Duration {
    let started = Instant::now();
    run();
    started.elapsed()
}
