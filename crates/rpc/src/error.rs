//! The errors of calls: what a caller sees, what a handler returns, and what travels between them.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use farcall_device::{CodecError, Device, DeviceError};
use farcall_schema::NoMatch;
use farcall_transport::{CloseCause, StoreError, TransferError};
use serde::{Deserialize, Serialize};

use crate::DeviceMap;
use crate::settings::SettingsError;

/// What a handler fails with: any error, kept with its sources, for the caller to read as [`CallError::Remote`].
///
/// Like `anyhow::Error` it converts from every error and so is none itself.
pub struct Error(Box<dyn std::error::Error + Send + Sync>, &'static str);

/// What a handler returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error that is only a message.
    pub fn msg(message: impl fmt::Display) -> Self {
        Self(message.to_string().into(), "message")
    }

    pub(crate) fn into_failure(self) -> Failure {
        let mut chain = Vec::new();
        let mut source = self.0.source();
        // A cycle or a very long chain is cut: the message is what counts.
        while let Some(error) = source.filter(|_| chain.len() < 16) {
            chain.push(error.to_string());
            source = error.source();
        }
        Failure::Handler(RemoteError { message: self.0.to_string(), type_name: self.1.to_owned(), chain })
    }
}

impl<E: std::error::Error + Send + Sync + 'static> From<E> for Error {
    fn from(error: E) -> Self {
        Self(Box::new(error), std::any::type_name::<E>())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A handler's error as its caller sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoteError {
    /// The error's text.
    pub message: String,
    /// The error's Rust type on the callee, to match on.
    pub type_name: String,
    /// The texts of its sources, outermost first.
    pub chain: Vec<String>,
}

impl fmt::Display for RemoteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.message)?;
        self.chain.iter().try_for_each(|source| write!(f, ": {source}"))
    }
}

/// The metadata of an Error frame.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Failure {
    UnknownFunction { nearest: Option<String> },
    Signature { callee: String },
    BadArguments { message: String },
    Handler(RemoteError),
    Panicked { message: String },
    Reply { message: String },
    Cancelled,
    Types { caller: String, callee: String },
    Corrupt { tensor: u32, start: u64, end: u64 },
}

/// How far a call had come when it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stage {
    /// No connection to the worker yet.
    Connecting,
    /// Not sent yet: its tensors are not ready, or earlier calls fill what may be on the wire to that worker.
    Queued,
    /// Sent, or queued behind other frames; no answer yet.
    Waiting,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connecting => "connecting",
            Self::Queued => "waiting to be sent, behind its tensors or earlier calls",
            Self::Waiting => "waiting for the reply",
        })
    }
}

/// The call that an error is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallId {
    /// The worker that was called.
    pub worker: Arc<str>,
    /// The function's name.
    pub function: &'static str,
}

impl fmt::Display for CallId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on {}", self.function, self.worker)
    }
}

/// Why a call gave no value. Programs match the variant; people read the text.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the messages name the fields")]
pub enum CallError {
    /// No worker of the group has that name or rank.
    #[error("no worker {target} in this group; there are {known:?}")]
    NoSuchWorker { target: String, known: Vec<Arc<str>> },
    /// The callee has no function of that name.
    #[error("{call}: no such function there{}", .nearest.as_ref().map(|name| format!("; did you mean {name}?")).unwrap_or_default())]
    UnknownFunction { call: CallId, nearest: Option<String> },
    /// No builtin of that name is known to the caller, which matches the arguments.
    #[error("no builtin {name} to call on {worker}{}", did_you_mean(.nearest))]
    UnknownBuiltin { worker: Arc<str>, name: String, nearest: Vec<&'static str> },
    /// No overload of the builtin takes the arguments.
    #[error("{call}: {source}")]
    NoMatch { call: CallId, source: NoMatch },
    /// Both sides have the function, with other types.
    #[error("{call}: the caller has {caller}, the callee {callee}; build both from the same source")]
    SignatureMismatch { call: CallId, caller: &'static str, callee: String },
    /// Both sides have the function, with types of the same names that are made of something else.
    #[error(
        "{call}: its types are the same by name, and not by what is in them: the caller has {caller}, the callee {callee}; \
         build both from the same source"
    )]
    TypesMismatch { call: CallId, caller: String, callee: String },
    /// The arguments could not be read as the function's types.
    #[error("{call}: arguments: {message}")]
    BadArguments { call: CallId, message: String },
    /// The handler returned an error.
    #[error("{call} failed: {error}")]
    Remote { call: CallId, error: RemoteError },
    /// The handler panicked; the callee lives on.
    #[error("{call} panicked: {message}")]
    Panicked { call: CallId, message: String },
    /// The handler's value could not be sent or read.
    #[error("{call}: reply: {message}")]
    BadReply { call: CallId, message: String },
    /// The reply's tensors are not those that its parameters can hold; none was touched.
    #[error("{call}: the reply's tensors do not fit the parameters: {misfit}")]
    Misfit { call: CallId, misfit: Misfit },
    /// A tensor's bytes are not those that were sent, as its digests tell: of the arguments if `at` is the callee, else of the value.
    /// Nobody was given them.
    #[error("{call}: bytes {} to {} of tensor {tensor} were changed on their way to {at}", .bytes.start, .bytes.end)]
    Corrupt { call: CallId, tensor: usize, bytes: Range<u64>, at: Arc<str> },
    /// The call that made this one was cancelled, or lost its caller.
    #[error("{call}: cancelled, as nobody waits for its value any more")]
    Cancelled { call: CallId },
    /// No reply in time. The handler is told, but may run on.
    #[error("{call}: deadline of {after:?} passed while {stage}")]
    Deadline { call: CallId, after: Duration, stage: Stage },
    /// The worker died, was cut off, shut down or never answered.
    #[error("{call}: lost {} while {stage}: {cause}", .call.worker)]
    PeerLost { call: CallId, stage: Stage, cause: Arc<CloseCause> },
    /// The arguments could not be sent.
    #[error("{call}: {source}")]
    Send { call: CallId, source: TransferError },
    /// The arguments could not be encoded.
    #[error("{call}: {source}")]
    Encode { call: CallId, source: CodecError },
    /// A tensor's device has no counterpart in the map for this worker.
    #[error("{call}: {device} is not mapped to a device there; the map is: {map}")]
    Unmapped { call: CallId, device: Device, map: DeviceMap },
    /// Too many calls wait for this worker already.
    #[error("{call}: {in_flight} calls in flight to {}; wait for some first", .call.worker)]
    Overloaded { call: CallId, in_flight: usize },
    /// This agent shuts down.
    #[error("{call}: this agent has shut down")]
    ShutDown { call: CallId },
    /// This process was forked from one that had joined: it has no agent.
    #[error(
        "{call}: this process was forked from one that uses farcall; start a program of its own (exec) to join a group"
    )]
    ForkedProcess { call: CallId },
    /// A value on a device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// What does not fit in [`CallError::Misfit`].
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the messages name the fields")]
pub enum Misfit {
    /// More or fewer tensors than parameters.
    #[error("there are {found}, for {expected} parameters")]
    Count { expected: usize, found: usize },
    /// A tensor of another dtype or shape than its parameter.
    #[error("tensor {tensor}: {source}")]
    Tensor { tensor: usize, source: DeviceError },
}

fn did_you_mean(nearest: &[&str]) -> String {
    if nearest.is_empty() {
        return "; `farcall schema list` has all".to_owned();
    }
    format!("; did you mean {}?", nearest.join(" or "))
}

/// Why an agent did not start, or did not shut down as a group.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the messages name the fields")]
pub enum JoinError {
    /// A setting is missing or cannot be read.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// An option cannot be as it is; the variable is its setting's.
    #[error("{variable}: {message}")]
    Setting { variable: &'static str, message: String },
    /// This process was forked from one that had joined: it has no agent, and cannot join.
    #[error("this process was forked from one that uses farcall; start a program of its own (exec) to join a group")]
    ForkedProcess,
    /// Two registered functions have one name.
    #[error("two functions are named {name}; give one of them `name = \"…\"`")]
    DuplicateFunction { name: &'static str },
    /// Two workers of the group have one name.
    #[error("ranks {ranks:?} are both named {name}")]
    DuplicateWorker { name: Arc<str>, ranks: [u32; 2] },
    /// Another process holds this rank, and does not end.
    #[error("rank {rank} is held by {holder}; end that process first, or give each worker a rank of its own")]
    RankTaken { rank: u32, holder: String },
    /// A device map that cannot be.
    #[error("device map for {worker}: {message}")]
    DeviceMap { worker: String, message: String },
    /// The store could not be reached, or not all workers came.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What another worker published cannot be read.
    #[error("worker {rank} published an unreadable address: {message}")]
    Malformed { rank: u32, message: String },
    /// The driver could not start.
    #[error(transparent)]
    Transport(#[from] TransferError),
    /// A thread could not be started, or ended early.
    #[error("{what}: {message}")]
    Thread { what: &'static str, message: String },
}
