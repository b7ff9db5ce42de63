//! Frames of a control connection and the chunks of its bulk connection, as one stream.
//!
//! A chunk's header where a frame could start goes to the bulk side, all else to the control side: so an input is what
//! travels, and an order in which it may arrive.

use std::ops::Range;

use farcall_device::{Config, DType, Device, Runtime, Tensor};

use super::descriptors::is_same_tensor;
use super::{Golden, Numbers, TENSOR_BYTES_MAX, limits};
use crate::digest::Digests;
use crate::endpoint::{Outbound, encode_frame};
use crate::frame::{HEADER_BYTES, Header, Kind, MAGIC};
use crate::receive::{Received, Receiver, Transfers, Unanswered};
use crate::{CloseCause, Frame};

/// The same frames come out however the bytes are cut; they are sent on and received as they were; memory comes back.
pub fn frames(input: &[u8]) -> bool {
    thread_local! {
        // Its own pool, so that what is in use is this thread's.
        static RUNTIME: Runtime = match Runtime::new(Config { idle_bytes_max: Some(64 << 20), ..Config::default() }) {
            Ok(runtime) => runtime,
            Err(error) => panic!("{error}"),
        };
    }
    RUNTIME.with(|runtime| {
        let decoded = check(runtime, input);
        assert_eq!(runtime.stats().live_bytes, 0, "a storage outlived its frame");
        decoded
    })
}

fn check(runtime: &Runtime, input: &[u8]) -> bool {
    let whole = receive(runtime, input, |left| left);
    let mut numbers = Numbers::of(input);
    let by_pieces = receive(runtime, input, |left| numbers.up_to(left.min(100)));
    assert_same(&whole, &by_pieces);
    if input.len() <= 512 {
        assert_same(&whole, &receive(runtime, input, |_| 1));
    }
    // LIMITS: none of these requests is answered; one may be as large as a frame may be, more share the peer's bytes.
    let (requests, bytes) = whole.frames.iter().fold((0, 0), |(requests, bytes), frame| {
        let more = frame.unanswered.bytes();
        (requests + u64::from(more > 0), bytes + more)
    });
    assert!(requests < 2 || bytes <= limits().request_bytes_max, "{bytes} bytes of {requests} unanswered requests");
    for frame in &whole.frames {
        sent_on(runtime, frame);
    }
    !whole.frames.is_empty()
}

/// What came of an input.
struct Seen {
    frames: Vec<Frame>,
    end: End,
}

#[derive(Debug, PartialEq)]
enum End {
    /// Between two frames; so many wait for chunks.
    Clean,
    /// Within a frame that misses at least so many bytes, or within a chunk.
    Within(u64),
    /// A chunk that no frame announced so far: its connection waits for the frame.
    Stalled,
    /// The error's text.
    Refused(String),
}

/// Receives `input` in pieces, whose sizes `piece` chooses from 1 to what is left.
fn receive(runtime: &Runtime, input: &[u8], piece: impl FnMut(usize) -> usize) -> Seen {
    let mut frames = Vec::new();
    let end = receive_into(&mut frames, runtime, input, piece).unwrap_or_else(|cause| End::Refused(cause.to_string()));
    Seen { frames, end }
}

fn receive_into(
    frames: &mut Vec<Frame>,
    runtime: &Runtime,
    input: &[u8],
    mut piece: impl FnMut(usize) -> usize,
) -> Result<End, CloseCause> {
    let mut receiver = Receiver::new(limits(), runtime.clone());
    receiver.take_digests();
    let mut transfers = Transfers::default();
    let mut rest = input;
    while !rest.is_empty() {
        if receiver.missing_bytes() == 0 && is_chunk(rest) {
            let Some((head, behind)) = rest.split_first_chunk::<HEADER_BYTES>() else {
                return Ok(End::Within((HEADER_BYTES - rest.len()) as u64));
            };
            let (header, _) = Header::parse(head, &limits())?;
            let Some(mut chunk) = transfers.begin(&header)? else { return Ok(End::Stalled) };
            rest = behind;
            while !chunk.target()?.is_empty() {
                if rest.is_empty() {
                    return Ok(End::Within(chunk.target()?.len() as u64));
                }
                let target = chunk.target()?;
                let len = piece(rest.len()).min(target.len());
                target[..len].copy_from_slice(&rest[..len]);
                chunk.advance(len);
                rest = &rest[len..];
            }
            frames.extend(transfers.end(chunk)?);
            continue;
        }
        let (missing, len) = (receiver.missing_bytes(), piece(rest.len()));
        let mut part = &rest[..len];
        // Never of single bytes: what is read without a copy is compared with what is read with one.
        let received = match receiver.small(&mut part) {
            Some(small) => Some(Received::Frame(small.to_frame())),
            None => receiver.feed(&mut part)?,
        };
        let taken = len - part.len();
        assert!(taken > 0, "no byte was taken");
        assert!(received.is_none() || taken as u64 >= missing, "a frame ended {missing} bytes before its end");
        assert!(received.is_some() || part.is_empty(), "bytes were left and no frame given");
        assert!(received.is_some() || receiver.missing_bytes() > 0, "a complete frame was kept back");
        assert!(received.is_none() || receiver.missing_bytes() == 0, "the next frame began early");
        rest = &rest[taken..];
        match received {
            Some(Received::Frame(frame)) => frames.push(frame),
            Some(Received::Waiting(partial)) => transfers.park(partial)?,
            Some(Received::Landed { lease, bytes }) => frames.extend(transfers.land(lease, bytes)?),
            None => {}
        }
    }
    Ok(match receiver.missing_bytes() {
        0 => End::Clean,
        missing => End::Within(missing),
    })
}

fn is_chunk(bytes: &[u8]) -> bool {
    bytes.starts_with(&MAGIC.to_le_bytes()) && bytes.get(5) == Some(&(Kind::Chunk as u8))
}

fn assert_same(whole: &Seen, cut: &Seen) {
    assert_eq!(whole.end, cut.end);
    assert_eq!(whole.frames.len(), cut.frames.len());
    for (a, b) in whole.frames.iter().zip(&cut.frames) {
        assert_same_frame(a, b);
        let layouts = |frame: &Frame| frame.tensors.iter().map(|tensor| tensor.layout().clone()).collect::<Vec<_>>();
        assert_eq!(layouts(a), layouts(b));
    }
}

fn assert_same_frame(a: &Frame, b: &Frame) {
    let rest = |frame: &Frame| (frame.kind, frame.call, frame.function, frame.deadline_us, frame.devices.clone());
    assert_eq!(rest(a), rest(b));
    assert_eq!(a.metadata, b.metadata);
    assert_eq!(a.tensors.len(), b.tensors.len());
    for (a, b) in a.tensors.iter().zip(&b.tensors) {
        assert!(is_same_tensor(a.layout(), b.layout()), "{a:?}, {b:?}");
        assert_eq!(bytes(a), bytes(b), "{a:?}");
    }
}

fn bytes(tensor: &Tensor) -> &[u8] {
    // READY: a frame that is handed out is complete.
    let bytes = tensor.storage().as_bytes().unwrap_or_else(|error| panic!("{tensor:?}: {error}"));
    &bytes[tensor.layout().byte_span()]
}

/// A frame that came in can be sent on, and its target sees the same.
fn sent_on(runtime: &Runtime, frame: &Frame) {
    assert!(frame.tensors.iter().map(|tensor| bytes(tensor).len() as u64).sum::<u64>() <= TENSOR_BYTES_MAX);
    assert!(frame.devices.is_empty() || frame.devices.len() == frame.tensors.len());
    let wire = wire(frame, 0..usize::MAX);
    let again = receive(runtime, &wire, |left| left);
    assert_eq!(again.end, End::Clean, "sent on from {frame:?}");
    let [again] = again.frames.as_slice() else { panic!("{} frames of one: {frame:?}", again.frames.len()) };
    assert_same_frame(frame, again);
    assert_eq!(wire, self::wire(again, 0..usize::MAX));
}

/// A frame with the chunks of its bulk payload behind it, of at most 1,000 bytes each; of all that, the chunks in `range`.
fn wire(frame: &Frame, range: Range<usize>) -> Vec<u8> {
    let outbound = Outbound {
        kind: frame.kind,
        call: frame.call,
        function: frame.function,
        deadline_us: frame.deadline_us,
        metadata: &frame.metadata,
        tensors: &frame.tensors,
        devices: &frame.devices,
        digests: None,
        lands: false,
    };
    let mut wire = Vec::new();
    let bulk = encode_frame(&outbound, limits().inline_bytes_max, &mut 1, &mut wire, |_, _| None);
    let bulk = bulk.unwrap_or_else(|error| panic!("{frame:?} cannot be sent on: {error}"));
    let mut chunks = Vec::new();
    for (transfer, tensor) in &bulk {
        for (index, piece) in bytes(tensor).chunks(1000).enumerate() {
            chunks.push([chunk(*transfer, index as u64 * 1000, piece.len()).as_slice(), piece].concat());
        }
    }
    let end = range.end.min(chunks.len());
    chunks[range.start.min(end)..end].iter().for_each(|chunk| wire.extend_from_slice(chunk));
    wire
}

fn chunk(transfer: u64, offset: u64, len: usize) -> [u8; HEADER_BYTES] {
    let header = Header { call: transfer, offset, payload_len: len as u64, ..Header::new(Kind::Chunk) };
    *header.as_bytes()
}

/// Frames of every kind; tensors of every kind of layout, inline and in chunks.
pub fn golden() -> Vec<Golden> {
    let frame = |kind, metadata: &[u8], tensors: Vec<Tensor>| Frame {
        kind,
        call: 7,
        function: 3,
        deadline_us: 1_000_000,
        metadata: metadata.to_vec(),
        tensors,
        unanswered: Unanswered::default(),
        devices: Vec::new(),
        digests: Digests::default(),
    };
    let all = |frame: &Frame| wire(frame, 0..usize::MAX);
    let counting = |shape: &[usize]| {
        let numbers: Vec<u32> = (0..shape.iter().product::<usize>() as u32).collect();
        Tensor::from_slice(&numbers, shape).expect("a small tensor")
    };
    let zeros = |dtype, shape: &[usize]| Tensor::zeros(dtype, shape).expect("a small tensor");
    let transposed = counting(&[2, 3]).transpose(0, 1).expect("two dimensions");
    let broadcast = counting(&[1, 4]).broadcast_to(&[3, 4]).expect("a size of 1");
    let request = frame(Kind::Request, b"metadata", vec![counting(&[5]), transposed, broadcast]);
    let on_devices = Frame {
        devices: vec![Device::Cuda(1), Device::HOST],
        ..frame(Kind::Reply, b"", vec![counting(&[2]), counting(&[])])
    };
    let announced =
        [all(&frame(Kind::Function, b"name", vec![])), all(&request), all(&frame(Kind::Error, b"no", vec![]))];
    // Above the inline limit, so that they travel in chunks; as small as a descriptor allows in the second input.
    let large = frame(Kind::Request, b"", vec![zeros(DType::F32, &[20_000])]);
    let mut small_bulk = all(&frame(Kind::Request, b"m", vec![counting(&[4]), counting(&[1])]));
    let (first, second) = (HEADER_BYTES, HEADER_BYTES + 56);
    (small_bulk[first + 2], small_bulk[first + 8]) = (1, 5);
    (small_bulk[second + 2], small_bulk[second + 8]) = (1, 6);
    small_bulk[32] = 0; // no inline payload
    small_bulk.truncate(HEADER_BYTES + 2 * 56 + 1);
    let interleaved = [
        small_bulk.as_slice(),
        &chunk(5, 0, 6),
        &[1; 6],
        &chunk(6, 0, 4),
        &[2; 4],
        &all(&frame(Kind::OpenBulk, b"", vec![])),
        &chunk(5, 6, 10),
        &[3; 10],
    ]
    .concat();
    let early = [&chunk(5, 0, 16)[..], &[1; 16], small_bulk.as_slice()].concat();
    let mut extended = all(&request);
    extended[30] = 4;
    extended.splice(HEADER_BYTES..HEADER_BYTES, [1, 2, 3, 4]);
    vec![
        ("request", all(&request)),
        ("reply-to-devices", all(&on_devices)),
        ("no-tensors", all(&frame(Kind::Reply, &[0; 300], vec![]))),
        (
            "empty-tensors",
            all(&frame(Kind::Request, b"x", vec![zeros(DType::I8, &[0]), zeros(DType::C64, &[3, 0, 2])])),
        ),
        ("several", announced.concat()),
        ("extended", extended),
        (
            "two-chunks",
            [wire(&large, 0..0), wire(&large, 0..2).split_off(wire(&large, 0..0).len()), all(&request)].concat(),
        ),
        ("interleaved-chunks", interleaved),
        ("refused-early-chunk", early),
        ("ping", all(&frame(Kind::Ping, b"", vec![]))),
        ("close", all(&frame(Kind::Close, &[0, 0], vec![]))),
    ]
}
