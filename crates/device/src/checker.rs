//! The happens-before checker: are two uses of a storage ordered, whatever the timing?
//!
//! It works when an operation is enqueued, on clocks alone, so it needs no unlucky timing, and a race is reported under every
//! schedule. Of correct code with the waits that this crate inserts it never says anything: it is there for the crate's own
//! mistakes, and for work that is ordered by hand around [`Storage::record_reader`](crate::Storage::record_reader).
//! The host's clock is one for the whole runtime: what one task has seen complete counts for all.

use std::fmt;

use crate::StreamId;

/// Fills memory that was handed out and not written yet: NaN in every float dtype.
pub(crate) const FRESH: u8 = 0xff;
/// Fills memory that was given back.
pub(crate) const FREED: u8 = 0xdb;
/// Of longer memory only this much at both ends is poisoned.
const POISON_BYTES: usize = 4 << 20;

/// Whether uses of storages are checked to be ordered, and what happens when they are not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Check {
    /// No checks: in production.
    Off,
    /// Each race is kept for [`Runtime::races`](crate::Runtime::races).
    Report,
    /// The operation that races panics before it is enqueued. A free, which must not panic, leaves it to the next operation.
    Panic,
}

impl Default for Check {
    /// `Panic` in builds with debug assertions, else `Off`.
    fn default() -> Self {
        if cfg!(debug_assertions) { Self::Panic } else { Self::Off }
    }
}

/// One operation's use of a storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Access {
    /// What it was: `copy`, `fill`, `delay`, `launch`, `pack`, `read`, `freeze`, `token`, `free`, `host`, or the name
    /// given to [`Stream::launch_many`](crate::Stream::launch_many).
    pub op: &'static str,
    /// The stream it was enqueued on.
    pub stream: StreamId,
    /// Its place there, from 1.
    pub ticket: u64,
}

impl Access {
    /// Of the host, before anything was enqueued: ordered before everything.
    pub(crate) const HOST: Self = Self { op: "host", stream: StreamId::HOST, ticket: 0 };
    /// The end of a storage's memory.
    pub(crate) const FREE: Self = Self { op: "free", stream: StreamId::HOST, ticket: 0 };
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.stream {
            StreamId::HOST => write!(f, "`{}` by the host", self.op),
            stream => write!(f, "`{}` on stream {stream} at {}", self.op, self.ticket),
        }
    }
}

/// Two uses of one storage, at least one of which writes or frees it, that nothing orders.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Race {
    /// The use that was enqueued first: a write if `is_write`.
    pub earlier: Access,
    /// Whether the earlier use wrote the bytes.
    pub is_write: bool,
    /// The use that does not wait for it.
    pub later: Access,
}

impl fmt::Display for Race {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { earlier, later, is_write } = self;
        let earlier_use = if *is_write { "the write" } else { "the read" };
        write!(f, "race: {later} is not ordered after {earlier_use} of the same bytes, {earlier}")
    }
}

/// Overwrites bytes that nobody may rely on.
pub(crate) fn poison(bytes: &mut [u8], pattern: u8) {
    if bytes.len() <= 2 * POISON_BYTES {
        return bytes.fill(pattern);
    }
    let tail = bytes.len() - POISON_BYTES;
    bytes[..POISON_BYTES].fill(pattern);
    bytes[tail..].fill(pattern);
}
