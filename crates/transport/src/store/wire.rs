//! The bytes between a store's client and its server.
//!
//! ```text
//! client → server   GREETING (8 bytes: "FCSTORE", version), then a frame with a Hello
//! server → client   GREETING, then, with a job key, a frame with a challenge (see `auth`)
//! client → server   with a job key, a frame with the proof
//! server → client   a frame with Reply::Done or Reply::Refused, which may come in place of the challenge, too
//! then, in turns    a frame with a Request, a frame with its Reply
//! frame             u32 little-endian length, that many bytes of postcard
//! ```
//! A reader takes memory as bytes arrive, never for a length that was merely claimed, and every read and write of more
//! than a first byte has a deadline of its own, so that a peer that sends a byte at a time gains nothing.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::Refusal;
use crate::key::Nonce;

/// Bumped whenever the messages below change: they are not self-describing.
pub(super) const VERSION: u8 = 2;
pub(super) const GREETING: [u8; 8] = [b'F', b'C', b'S', b'T', b'O', b'R', b'E', VERSION];

/// The largest frame either side accepts: a value with its key, or the keys of a large wait.
pub(super) const FRAME_BYTES_MAX: usize = 4 << 20;

/// The largest frame of a greeting. An identity's limit is a key's.
pub(super) const HELLO_BYTES_MAX: usize = 16 << 10;

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Hello<'a> {
    pub(super) identity: &'a str,
    /// Fresh; present when the client has a job key.
    pub(super) nonce: Option<Nonce>,
}

/// What a server says first: its frame's payload has a first byte that a [`Reply`] cannot have, as it has fewer variants.
pub(super) const CHALLENGE: u8 = 0xff;

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Request<'a> {
    Set {
        key: &'a str,
        value: &'a [u8],
    },
    /// Answered by as many values, from the first key on, as fit in a frame: at least one.
    Get {
        #[serde(borrow)]
        keys: Vec<&'a str>,
    },
    Add {
        key: &'a str,
        amount: i64,
    },
    /// Answered by `Done` once each group has a key, by `Missing` after `timeout_ms`.
    Wait {
        #[serde(borrow)]
        groups: Vec<Vec<&'a str>>,
        timeout_ms: u64,
    },
    Leave,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Reply<'a> {
    Done,
    Values(#[serde(borrow)] Vec<Option<&'a [u8]>>),
    Sum(i64),
    /// The groups without a key, by their position in the request.
    Missing(Vec<u32>),
    Refused(Refusal),
}

/// `Reply::Done` as a frame, for who must not fail.
pub(super) const DONE_FRAME: [u8; 5] = [1, 0, 0, 0, 0];

/// `message` as a frame, length first.
pub(super) fn frame(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let bytes = postcard::to_extend(message, vec![0; 4]).map_err(io::Error::other)?;
    framed(bytes)
}

/// `payload` as a frame of just these bytes.
pub(super) fn raw_frame(payload: &[u8]) -> io::Result<Vec<u8>> {
    framed([&[0; 4], payload].concat())
}

/// Fills in the length of a frame whose first four bytes were kept free for it.
fn framed(mut bytes: Vec<u8>) -> io::Result<Vec<u8>> {
    let len = bytes.len() - 4;
    match u32::try_from(len) {
        Ok(prefix) if len <= FRAME_BYTES_MAX => {
            bytes[..4].copy_from_slice(&prefix.to_le_bytes());
            Ok(bytes)
        }
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, TooLarge(len as u64))),
    }
}

pub(super) fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Option<T> {
    match postcard::take_from_bytes(bytes) {
        Ok((message, [])) => Some(message),
        _ => None,
    }
}

/// The error inside an [`io::Error`] for a frame beyond [`FRAME_BYTES_MAX`].
#[derive(Debug, thiserror::Error)]
#[error("a message of {0} bytes is beyond the limit")]
pub(super) struct TooLarge(u64);

impl TooLarge {
    /// The size, when this is why `error` happened.
    pub(super) fn bytes(error: &io::Error) -> Option<u64> {
        error.get_ref()?.downcast_ref::<Self>().map(|too_large| too_large.0)
    }
}

/// Reads exactly `N` bytes until `deadline`.
pub(super) fn read_array<const N: usize>(stream: &TcpStream, deadline: Instant) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        filled += read_some(stream, &mut bytes[filled..], deadline)?;
    }
    Ok(bytes)
}

/// Reads one frame's payload until `deadline`.
pub(super) fn read_frame(stream: &TcpStream, deadline: Instant) -> io::Result<Vec<u8>> {
    read_frame_of(stream, FRAME_BYTES_MAX, deadline)
}

/// The same for a frame of at most `bytes_max`.
pub(super) fn read_frame_of(stream: &TcpStream, bytes_max: usize, deadline: Instant) -> io::Result<Vec<u8>> {
    let len = u32::from_le_bytes(read_array(stream, deadline)?) as usize;
    if len > bytes_max {
        return Err(io::Error::new(io::ErrorKind::InvalidData, TooLarge(len as u64)));
    }
    const STEP_BYTES: usize = 64 << 10;
    let mut bytes = Vec::new();
    while bytes.len() < len {
        let start = bytes.len();
        bytes.resize(len.min(start + STEP_BYTES), 0);
        let read = read_some(stream, &mut bytes[start..], deadline)?;
        bytes.truncate(start + read);
    }
    Ok(bytes)
}

/// Reads whatever comes next, up to 4 KiB, and forgets it.
pub(super) fn discard(stream: &TcpStream, deadline: Instant) -> io::Result<()> {
    read_some(stream, &mut [0; 4096], deadline).map(drop)
}

/// One read, of at least a byte.
fn read_some(mut stream: &TcpStream, bytes: &mut [u8], deadline: Instant) -> io::Result<usize> {
    loop {
        stream.set_read_timeout(Some(time_left(deadline)?))?;
        match stream.read(bytes) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => return Ok(read),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // A socket's timeout surfaces as either kind, by platform.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(io::ErrorKind::TimedOut.into()),
            Err(error) => return Err(error),
        }
    }
}

/// Writes all of `bytes` until `deadline`.
pub(super) fn write(mut stream: &TcpStream, mut bytes: &[u8], deadline: Instant) -> io::Result<()> {
    while !bytes.is_empty() {
        stream.set_write_timeout(Some(time_left(deadline)?))?;
        match stream.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(io::ErrorKind::TimedOut.into()),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn time_left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes are fixed: a change of this test is a change of [`VERSION`].
    #[test]
    fn messages_have_the_documented_bytes() {
        let set = frame(&Request::Set { key: "a/0", value: &[7, 8] }).unwrap();
        assert_eq!(set, [8, 0, 0, 0, 0, 3, b'a', b'/', b'0', 2, 7, 8]);
        let wait = frame(&Request::Wait { groups: vec![vec!["d", "g"]], timeout_ms: 300 }).unwrap();
        assert_eq!(wait, [9, 0, 0, 0, 3, 1, 2, 1, b'd', 1, b'g', 0xac, 2]);
        let values = frame(&Reply::Values(vec![None, Some(&[1])])).unwrap();
        assert_eq!(values, [6, 0, 0, 0, 1, 2, 0, 1, 1, 1]);
        assert_eq!(frame(&Reply::Done).unwrap(), DONE_FRAME);
        assert_eq!(raw_frame(b"r0").unwrap(), [2, 0, 0, 0, b'r', b'0']);
    }

    #[test]
    fn a_message_with_bytes_behind_it_does_not_decode() {
        assert!(decode::<Request<'_>>(&[4]).is_some_and(|request| matches!(request, Request::Leave)));
        assert!(decode::<Request<'_>>(&[4, 0]).is_none());
        assert!(decode::<Request<'_>>(&[]).is_none());
    }

    #[test]
    fn a_frame_beyond_the_limit_is_not_made() {
        let error = raw_frame(&vec![0; FRAME_BYTES_MAX + 1]).unwrap_err();
        assert_eq!(TooLarge::bytes(&error), Some(FRAME_BYTES_MAX as u64 + 1));
    }
}
