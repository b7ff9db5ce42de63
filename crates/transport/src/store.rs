//! The store: a small table of keys where the workers of a job find each other.
//!
//! Rank 0 hosts a [`StoreServer`]; every worker, rank 0 too, reaches it through [`EmbeddedStore`]. Another table, such as
//! the one torchrun keeps, stands behind the same [`Store`] trait. It carries addresses and barriers, never payload.
//! With a job key, who cannot prove it reads and writes nothing; without one, whoever can dial the store can, and only
//! loopback is listened on. It holds no secrets in either case, and what is found here (an address, say) is still proven
//! when it is dialed. Its limits keep a broken or hostile client from hurting the others.
//!
//! Invariant S1: every operation ends, by an answer, its deadline or a fixed timeout; nothing waits without a bound.
//! Invariant S2: keys are never removed, so a key that was waited for can be read.
//! Invariant S3: a client that ends without [`Store::close`] leaves the key [`gone_key`] behind, also while it waits itself.
//! Invariant S4: each wait is answered exactly once, by whoever takes it out of the table: a `set`, its deadline or its end.
//! Invariant S5: dropping the server ends and joins all its threads, whatever its clients do.
//! Invariant S6: a client can spend no more of the server than [`StoreLimits`] allow; a length it claims costs nothing.
//!
//! `store/`: `wire.rs` the bytes between client and server, `table.rs` the keys and who waits for them (pure),
//! `server.rs` threads and sockets, `client.rs` the worker's side.

mod client;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod server;
mod table;
mod wire;

use std::fmt;
use std::io;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::AuthError;

pub use client::EmbeddedStore;
pub use server::StoreServer;

/// A table of keys that all workers of a job see.
///
/// An object is shared by threads, but a wait occupies it until it ends: who waits in one thread while another sets keys
/// opens a second one.
pub trait Store: Send + Sync {
    /// Gives `key` this value, in place of any it had, and wakes who waits for it.
    ///
    /// # Errors
    /// [`StoreError::Refused`] beyond a limit of the store, else the connection's errors.
    fn set(&self, key: &str, value: &[u8]) -> Result<(), StoreError>;

    /// The value of `key`, if it has one.
    ///
    /// # Errors
    /// As for [`Store::set`].
    fn get(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError>;

    /// Waits until all of `keys` exist and returns their values, in the order of `keys`.
    ///
    /// # Errors
    /// [`StoreError::Missing`] names the keys that did not exist at `deadline`; a deadline in the past checks once.
    fn wait(&self, keys: &[&str], deadline: Instant) -> Result<Vec<Vec<u8>>, StoreError>;

    /// Waits until at least one key of every group exists: "each rank is done or gone".
    ///
    /// # Errors
    /// [`StoreError::Missing`] names the groups that had no key at `deadline`, their keys joined by " or ".
    fn wait_each(&self, groups: &[&[&str]], deadline: Instant) -> Result<(), StoreError>;

    /// Adds `amount` to the number at `key` (0 when it has no value) and returns the sum.
    ///
    /// The number is stored as decimal text, so that [`Store::get`] and [`Store::wait`] read it too.
    ///
    /// # Errors
    /// [`Refusal::NotANumber`] when the value is other text or the sum exceeds 64 bits, else as for [`Store::set`].
    fn add(&self, key: &str, amount: i64) -> Result<i64, StoreError>;

    /// Leaves in good order, so that no [`gone_key`] appears. Operations after it are [`StoreError::Closed`].
    ///
    /// # Errors
    /// The connection's; the store is closed on this side all the same. Closing twice is no error.
    fn close(&self) -> Result<(), StoreError>;
}

/// The key that appears when the client of this identity ends without [`Store::close`]: `gone/<identity>`.
///
/// Keys stay, so an identity names one life of a worker: a restarted one needs another. Who learns by other means that
/// a worker is gone, such as a launcher, may set the key itself.
#[must_use]
pub fn gone_key(identity: &str) -> String {
    format!("gone/{identity}")
}

/// What one server grants to all its clients. Beyond it they get a [`Refusal`] and the others notice nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoreLimits {
    /// Clients at a time, those still greeting included.
    pub connections: usize,
    /// Clients that are still greeting, half of `connections` at most. Beyond it the oldest has to go, of the address that
    /// has most of them; an honest one dials again.
    pub greetings: usize,
    /// Bytes of one key, and of an identity's [`gone_key`].
    pub key_bytes: usize,
    /// Bytes of one value.
    pub value_bytes: usize,
    /// Bytes of all keys and values, with [`StoreLimits::ENTRY_BYTES`] more for each key.
    pub total_bytes: usize,
    /// Keys in one wait.
    pub wait_keys: usize,
    /// The longest wait that a client may ask for.
    pub wait: Duration,
    /// Time for a client to send its whole greeting.
    pub hello: Duration,
    /// Time for a client to send the rest of a request it began, or to take a reply.
    pub frame: Duration,
}

impl StoreLimits {
    /// What a key costs beside its own bytes and its value's, so that many small ones are bounded too.
    pub const ENTRY_BYTES: usize = 64;
}

impl Default for StoreLimits {
    fn default() -> Self {
        Self {
            connections: 4096,
            greetings: 256,
            key_bytes: 1 << 10,
            value_bytes: 1 << 20,
            total_bytes: 256 << 20,
            wait_keys: 1 << 15,
            wait: Duration::from_secs(3600),
            hello: Duration::from_secs(5),
            frame: Duration::from_secs(10),
        }
    }
}

/// Why a store did not do what was asked. Programs match the variant; people read the text.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the messages name the fields")]
pub enum StoreError {
    /// The server could not listen.
    #[error("cannot host the store at {address} ({source}); choose a free port of an address of this machine")]
    Bind { address: String, source: io::Error },
    /// A bind beyond loopback without a job key, where anyone could read and write the store.
    #[error(
        "refusing to host the store at {address} without a job key: anyone who reaches it could read and write it; set \
         FARCALL_KEY or FARCALL_KEY_FILE (made by `openssl rand -hex 32`, the same for all workers), or use 127.0.0.1 \
         or [::1]"
    )]
    NotLoopback { address: String },
    /// The store did not prove the job's key.
    #[error("the store at {address}: {source}")]
    Unproven { address: String, source: AuthError },
    /// Nothing answered until the deadline.
    #[error(
        "no store answers at {address} after {waited_ms} ms ({source}); start the worker that hosts it (rank 0), then \
         check the address and that a firewall lets its port through"
    )]
    Unreachable { address: String, waited_ms: u128, source: io::Error },
    /// Something answered, but no store.
    #[error("what answers at {address} is not a farcall store; check the address and its port")]
    NotAStore { address: String },
    /// A store of another version.
    #[error("the store at {address} has version {theirs}, this worker {ours}; run one farcall version in a job")]
    Version { address: String, ours: u8, theirs: u8 },
    /// The deadline passed before all keys, or a key of each group, existed.
    #[error("after {waited_ms} ms the store at {address} still misses {}", Listed(.missing))]
    Missing { address: String, waited_ms: u128, missing: Vec<String> },
    /// The store said no.
    #[error("the store at {address} refused: {refusal}")]
    Refused { address: String, refusal: Refusal },
    /// The connection ended, or an answer did not come in time. Later operations are `Closed`.
    #[error("lost the store at {address} ({source}); the worker that hosts it (rank 0) may have ended")]
    Lost { address: String, source: io::Error },
    /// Used after [`Store::close`], or after the connection was lost.
    #[error("the connection to the store at {address} is closed")]
    Closed { address: String },
}

/// Why a store said no. It travels as part of the answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the messages name the fields")]
pub enum Refusal {
    /// The first bytes are no greeting of this version.
    #[error("the greeting is not a farcall store's")]
    Greeting,
    /// The store has a job key, the client said hello without one.
    #[error("it asks for a job key; set FARCALL_KEY or FARCALL_KEY_FILE as the launcher does")]
    KeyWanted,
    /// The client has a job key, the store none.
    #[error(
        "it has no job key, this worker has one; set FARCALL_KEY or FARCALL_KEY_FILE where the store is hosted, too"
    )]
    NoKey,
    /// The client's proof is wrong.
    #[error("it has another job key; give all workers the same FARCALL_KEY or FARCALL_KEY_FILE")]
    WrongKey,
    /// The greeting, or the rest of a request, did not come in time.
    #[error("the rest of the message did not come within {limit_ms} ms")]
    Slow { limit_ms: u64 },
    /// Its message does not decode.
    #[error("the message cannot be decoded")]
    Malformed,
    /// A request came before the last one was answered.
    #[error("a request came before the last one was answered")]
    Pipelined,
    /// A message larger than any that the limits allow.
    #[error("a message of {bytes} bytes, the limit is {limit_bytes}")]
    Message { bytes: u64, limit_bytes: u64 },
    /// As many clients as the store takes.
    #[error("{limit} clients are connected, the limit")]
    Connections { limit: u64 },
    /// A key that is empty or too long.
    #[error("a key of {bytes} bytes, allowed are 1 to {limit_bytes}")]
    Key { bytes: u64, limit_bytes: u64 },
    /// A value that is too large; large data does not belong in a store.
    #[error("a value of {bytes} bytes, the limit is {limit_bytes}")]
    Value { bytes: u64, limit_bytes: u64 },
    /// All keys and values together.
    #[error("the store is full: the limit is {limit_bytes} bytes in all")]
    Full { limit_bytes: u64 },
    /// Too many keys in one wait.
    #[error("a wait for {keys} keys, the limit is {limit}")]
    WaitKeys { keys: u64, limit: u64 },
    /// A wait for a group without keys, which could never end.
    #[error("a wait for a group without keys")]
    EmptyGroup,
    /// A deadline too far away.
    #[error("a wait of {ms} ms, the limit is {limit_ms} ms")]
    Wait { ms: u64, limit_ms: u64 },
    /// `add` to something else, or beyond 64 bits.
    #[error("the value of {key:?} is not a number that this amount can be added to")]
    NotANumber { key: String },
}

/// The first few of many names, and how many more.
struct Listed<'a>(&'a [String]);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 8;
        for (index, name) in self.0.iter().take(SHOWN).enumerate() {
            write!(f, "{}{name}", if index == 0 { "" } else { ", " })?;
        }
        match self.0.len().saturating_sub(SHOWN) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

#[cfg(test)]
mod tests;
