//! The errors of this crate: what a peer did wrong, and why a connection ended.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use farcall_device::{DType, DeviceError, LayoutError};

use crate::frame::Kind;
use crate::{Route, WorkerId};

/// What a peer sent that it must not: a bug, another version, or an attack. The connection ends; the worker lives on.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the messages name the fields")]
pub enum ProtocolError {
    /// The first bytes are not farcall's: something else dialed this port.
    #[error("not a farcall frame: magic {found:#010x}")]
    Magic { found: u32 },
    /// The peer speaks another framing version.
    #[error("framing version {found} where {supported} is supported; run the same farcall on every worker")]
    Version { found: u8, supported: u8 },
    /// The peer's hello or welcome offers no version that this side speaks.
    #[error("the peer speaks framing versions {} to {}, this worker {ours}; run the same farcall on every worker", .theirs[0], .theirs[1])]
    NoCommonVersion { theirs: [u8; 2], ours: u8 },
    /// An unknown frame kind.
    #[error("unknown frame kind {found}")]
    Kind { found: u8 },
    /// A known frame kind at the wrong time or on the wrong connection.
    #[error("{kind:?} frame where {expected} is expected")]
    Unexpected { kind: Kind, expected: &'static str },
    /// Bits that this version requires to be zero.
    #[error("reserved bits set in a {kind:?} frame")]
    ReservedBits { kind: Kind },
    /// Bits of a tensor descriptor that this version requires to be zero.
    #[error("reserved bits set in a tensor descriptor")]
    ReservedDescriptorBits,
    /// A length or count above its limit; nothing was allocated for it.
    #[error("{found} {what} exceed the limit of {max}")]
    Limit { what: &'static str, found: u64, max: u64 },
    /// The frame ended inside its descriptors.
    #[error("the frame ends inside its tensor descriptors")]
    TruncatedDescriptors,
    /// The descriptors and the lengths in the header disagree.
    #[error("{found} bytes of {what} where the descriptors account for {expected}")]
    Accounting { what: &'static str, found: u64, expected: u64 },
    /// An unknown dtype code.
    #[error("unknown dtype code {found}")]
    DType { found: u8 },
    /// An unknown device kind.
    #[error("unknown device kind {found}")]
    DeviceKind { found: u8 },
    /// An unknown payload mode.
    #[error("unknown payload mode {found}")]
    Mode { found: u8 },
    /// A dimension that is no size.
    #[error("a dimension of {found}")]
    Dimension { found: i64 },
    /// A shape whose arithmetic overflows or that is otherwise impossible.
    #[error("impossible tensor: {0}")]
    Layout(#[from] LayoutError),
    /// Strides that overlap or leave gaps; senders pack such tensors.
    #[error("strides {strides:?} of shape {shape:?} overlap or leave gaps")]
    Strides { shape: Vec<usize>, strides: Vec<i64> },
    /// Dtype and shape give another byte count than the descriptor says.
    #[error("{announced_bytes} bytes announced for {dtype} {shape:?}, which holds {expected_bytes}")]
    SizeMismatch { dtype: DType, shape: Vec<usize>, expected_bytes: u64, announced_bytes: u64 },
    /// A chunk outside its transfer, out of order, or for a transfer that is complete.
    #[error("chunk at {offset} of {len} bytes does not continue transfer {transfer} at {expected}")]
    Chunk { transfer: u64, offset: u64, len: u64, expected: u64 },
    /// A tensor's list of digests that is not the one that was sent.
    #[error("a tensor's list of digests does not have the digest that its descriptor says")]
    DigestList,
    /// A transfer id used twice.
    #[error("transfer {transfer} was announced twice")]
    DuplicateTransfer { transfer: u64 },
    /// A slab that cannot be mapped safely, or not at all.
    #[error("slab {slab} is refused: {reason}")]
    Slab { slab: u64, reason: &'static str },
    /// A tensor in a slab that was never passed, or was retired: ids are not used again.
    #[error("a tensor lies in slab {slab}, which is not there (any more)")]
    UnknownSlab { slab: u64 },
    /// A tensor that is not all in its slab.
    #[error("a tensor of {len} bytes at {offset} of slab {slab}, which has {slab_bytes}")]
    OutsideSlab { slab: u64, offset: u64, len: u64, slab_bytes: u64 },
    /// Rings that cannot be mapped safely, or into which somebody has written.
    #[error("the rings are refused: {reason}")]
    Rings { reason: &'static str },
    /// A lease returned, or its tensor sent back, that was not out.
    #[error("lease {lease} came back, and is not out")]
    Lease { lease: u64 },
    /// A tensor that lands in its slab backwards, beyond its end, or that nobody waits for.
    #[error("lease {lease} has landed {bytes} bytes, after {landed} of {len}")]
    Landed { lease: u64, bytes: u64, landed: u64, len: u64 },
    /// The hello could not be read.
    #[error("malformed {what}: {message}")]
    Malformed { what: &'static str, message: String },
    /// The dialer belongs to another group of workers.
    #[error("the peer belongs to group {found:?}, this worker to {expected:?}")]
    Group { found: String, expected: String },
    /// The dialer wanted another worker than the one at this address.
    #[error("worker {found} answered where {expected} was dialed")]
    WrongWorker { found: String, expected: String },
    /// A process that another one of the same name has replaced.
    #[error("{worker} was started again: this is its life {life}, and life {newest} has joined")]
    EarlierLife { worker: String, life: u64, newest: u64 },
    /// A bulk connection for an endpoint that is not there.
    #[error("bulk connection with an unknown key")]
    UnknownBulkKey,
    /// The connection ended inside a frame.
    #[error("the connection ended inside a frame, {missing_bytes} bytes short")]
    TruncatedFrame { missing_bytes: u64 },
    /// A started frame or handshake did not go on in time.
    #[error("no complete {what} within {timeout:?}")]
    Stalled { what: &'static str, timeout: Duration },
    /// A connection too many that is not let in yet; this one waited longest.
    #[error("{max} connections are in their greeting; this one was the oldest")]
    Crowded { max: usize },
    /// Without the job's key.
    #[error(transparent)]
    Auth(#[from] AuthError),
}

/// Why a peer was not let in, or not trusted: each side of a refused connection has its own.
///
/// Whoever cannot prove the key learns nothing else: neither this worker's name nor its group.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the messages name the fields")]
pub enum AuthError {
    /// The peer has a key, this worker none.
    #[error("{peer} asks for a job key; set FARCALL_KEY or FARCALL_KEY_FILE as the launcher does")]
    KeyWanted { peer: String },
    /// This worker has a key, the peer none.
    #[error("{peer} has no job key, this worker has one; set FARCALL_KEY or FARCALL_KEY_FILE there as it is here")]
    NoKey { peer: String },
    /// A Unix socket between two users.
    #[error(
        "{peer} is another user's; Unix sockets are for one user's workers, FARCALL_TRANSPORT=tcp is for several users"
    )]
    OtherUser { peer: String },
    /// The peer uses TLS, this worker does not.
    #[error("{peer} asks for TLS; set FARCALL_TLS_CERT, FARCALL_TLS_KEY and FARCALL_TLS_CA as it has them")]
    TlsWanted { peer: String },
    /// This worker uses TLS, the peer does not.
    #[error(
        "{peer} does not use TLS, this worker does; set FARCALL_TLS_CERT, FARCALL_TLS_KEY and FARCALL_TLS_CA there"
    )]
    NoTls { peer: String },
    /// A certificate that one of the sides does not take.
    #[error("{peer}: {message}")]
    Certificate { peer: String, message: String },
    /// Both have a key, not the same one; or the peer's proof was not made for this connection.
    #[error(
        "{peer} and this worker have different job keys; give all workers the same FARCALL_KEY or FARCALL_KEY_FILE"
    )]
    WrongKey { peer: String },
}

/// Why an endpoint closed. Every waiter on it gets this, once, in bounded time.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the messages name the fields")]
pub enum CloseCause {
    /// The peer's process or connection is gone, without a word.
    #[error("the peer's connection ended without a goodbye: its process died or was cut off")]
    PeerLost { source: Option<Arc<io::Error>> },
    /// The peer's process on this host died.
    #[error("the peer's process died")]
    Died,
    /// Not a byte from the peer for so long, though a living one sends some all the time.
    #[error("nothing was heard from the peer for {silent:?}: it is stopped, starved of processors or cut off")]
    Silent { silent: Duration },
    /// The peer said goodbye: it shuts down.
    #[error("the peer shut down: {text}")]
    PeerShutdown { text: String },
    /// The peer refused what this side sent.
    #[error("the peer refused this connection: {text}")]
    Refused { text: String },
    /// The peer broke the protocol.
    #[error("the peer broke the protocol: {0}")]
    Protocol(ProtocolError),
    /// One side did not prove the job's key.
    #[error(transparent)]
    Auth(AuthError),
    /// The worker was started again; this connection was to its earlier process.
    #[error("the worker was started again, as its life {life}; this connection was to an earlier one")]
    Replaced { life: u64 },
    /// No connection came about.
    #[error("cannot connect to {route}: {source}")]
    Connect { route: Route, source: Arc<io::Error> },
    /// No connection came about in time.
    #[error("no connection to {route} within {timeout:?}")]
    ConnectTimeout { route: Route, timeout: Duration },
    /// Memory for a tensor could not be had.
    #[error("cannot place a received tensor: {0}")]
    Device(#[from] DeviceError),
    /// This side shut down.
    #[error("this worker shut down")]
    LocalShutdown,
}

impl From<ProtocolError> for CloseCause {
    fn from(error: ProtocolError) -> Self {
        match error {
            ProtocolError::Auth(error) => Self::Auth(error),
            error => Self::Protocol(error),
        }
    }
}

/// Why the transport could not start or send.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the messages name the fields")]
pub enum TransferError {
    /// The endpoint is closed; `cause` is why.
    #[error("endpoint closed: {cause}")]
    Closed { cause: Arc<CloseCause> },
    /// The frame is larger than the peer would accept; nothing was sent.
    #[error("{found} {what} exceed the limit of {max}; send less per call, or raise the limit on both sides")]
    TooLarge { what: &'static str, found: u64, max: u64 },
    /// Digests were asked for, and the peer's build knows none.
    #[error("{worker} cannot compare digests: run the same farcall on every worker, or ask for none")]
    NoDigests { worker: WorkerId },
    /// A tensor could not be read on its device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A system call failed.
    #[error("{call}: {source}")]
    Os { call: &'static str, source: Arc<io::Error> },
    /// A bind beyond loopback without a job key.
    #[error(
        "refusing to listen on {address} without a job key or TLS: anyone who reaches it could call this worker; set \
         FARCALL_KEY or FARCALL_KEY_FILE (made by `openssl rand -hex 32`, the same for all workers), or bind to \
         127.0.0.1 or [::1]"
    )]
    NotLoopback { address: SocketAddr },
    /// Dialing failed at once.
    #[error("cannot connect to {route}: {source}")]
    Connect { route: Route, source: Arc<io::Error> },
    /// Only Unix sockets are to be used, and none leads there.
    #[error(
        "{worker} cannot be reached by a Unix socket: it runs on another host or in another container, as another user, or \
         with FARCALL_TRANSPORT=tcp; set FARCALL_TRANSPORT=auto here"
    )]
    Elsewhere { worker: WorkerId },
    /// Listening on all addresses, without one to tell the others.
    #[error("listening on {address}, but under which address do others reach it? Set FARCALL_ADVERTISE to it")]
    Unaddressed { address: SocketAddr },
}

impl TransferError {
    pub(crate) fn os(call: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Os { call, source: Arc::new(source) }
    }
}
