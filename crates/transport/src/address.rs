//! Who a worker is and where it can be dialed; the first frames of a connection.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::auth::{Dialer, Realm};
use crate::endpoint::encoded;
use crate::error::AuthError;
use crate::frame::VERSION;
use crate::key::Nonce;
use crate::{Channel, CloseCause, DriverConfig, LocalAddress};

/// One worker of a group: its name and its rank.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct WorkerId {
    /// Unique in the group; what [`fmt::Display`] prints.
    pub name: Arc<str>,
    /// 0 to world size − 1.
    pub rank: u32,
}

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.name)
    }
}

/// What a worker publishes so that others can dial it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerInfo {
    /// Its name and rank.
    pub id: WorkerId,
    /// Where its listener is, for TCP.
    pub address: SocketAddr,
    /// The process's id on its host, for people and tools.
    pub pid: u32,
    /// Which life of this worker: a later one has a greater number.
    pub incarnation: u64,
    /// Where workers of the same user on the same host find it; the driver that listens there sets it.
    pub local: Option<LocalAddress>,
}

/// How a connection was dialed.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Route {
    /// Over TCP.
    Tcp(SocketAddr),
    /// By a Unix socket on this host.
    Unix(Arc<LocalAddress>),
}

impl Route {
    /// The channel that it leads over.
    #[must_use]
    pub fn channel(&self) -> Channel {
        match self {
            Self::Tcp(_) => Channel::Tcp,
            Self::Unix(_) => Channel::Unix,
        }
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "{address}"),
            Self::Unix(address) => write!(f, "{address}"),
        }
    }
}

/// Bounds on what a peer may send; both sides of a connection should agree.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Metadata of one frame, bytes. Default 1 MiB.
    pub metadata_bytes_max: u64,
    /// Extensions of one frame, bytes. Default 1 KiB.
    pub extension_bytes_max: u64,
    /// Tensors in one frame. Default 4,096.
    pub tensors_max: u64,
    /// Bytes of all tensors of one frame. Default 8 GiB.
    pub tensor_bytes_max: u64,
    /// Payload inside a control frame, bytes; larger tensors take the bulk connection. Default 64 KiB.
    pub inline_bytes_max: u64,
    /// Payload of one chunk on the bulk connection, bytes. Default 4 MiB.
    pub chunk_bytes_max: u64,
    /// Requests of one peer that are not answered. More wait at the caller. Default 4,096.
    pub requests_max: usize,
    /// Tensor bytes of one peer's requests that are not answered, unless it is a single request. More wait at the caller.
    /// Default 4 GiB.
    pub request_bytes_max: u64,
    /// Slabs of one peer on this host that are mapped. Tensors in more are copied. Default 1,024.
    pub slabs_max: usize,
    /// Their bytes: a bound of address space, and of what a peer can borrow. Tensors from 1 to 32 MiB lie in slabs of 128 MiB, and are
    /// copied with less. Default 256 GiB.
    pub slab_bytes_max: u64,
    /// Bytes that wait to be taken by one peer, beside tensors: with more, it is lost if it takes nothing for as long as it may be
    /// silent. Default 64 MiB.
    pub backlog_bytes_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            metadata_bytes_max: 1 << 20,
            extension_bytes_max: 1 << 10,
            tensors_max: 4096,
            tensor_bytes_max: 8 << 30,
            inline_bytes_max: 64 << 10,
            chunk_bytes_max: 4 << 20,
            requests_max: 4096,
            request_bytes_max: 4 << 30,
            slabs_max: 1024,
            slab_bytes_max: 256 << 30,
            backlog_bytes_max: 64 << 20,
        }
    }
}

impl Limits {
    /// What a peer may send that has not welcomed us yet: a greeting, and nothing that takes memory.
    pub(crate) fn of_greeting(&self) -> Self {
        let metadata_bytes_max = self.metadata_bytes_max.min(16 << 10);
        Self { metadata_bytes_max, extension_bytes_max: 0, tensors_max: 0, inline_bytes_max: 0, ..self.clone() }
    }
}

/// What a dialer wants a connection to be.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Role {
    /// Control frames; the dialer expects to reach `target`.
    Control { target: Option<Arc<str>> },
    /// Chunks of the endpoint whose Welcome carried `key`.
    Bulk { key: u128 },
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Hello {
    pub(crate) group: String,
    pub(crate) worker: WorkerInfo,
    pub(crate) role: Role,
    /// The framing versions the dialer speaks, oldest and newest. Greetings themselves keep version 1's framing.
    pub(crate) versions: [u8; 2],
    /// What the dialer can do beyond them on this connection, a bit each.
    pub(crate) features: u64,
    /// Fresh; present when the dialer has a job key.
    pub(crate) nonce: Option<Nonce>,
}

impl Hello {
    /// A hello, encoded, and the dialer's side of the proof that goes on from it, with `peer` for errors.
    pub(crate) fn encode(
        config: &DriverConfig,
        role: Role,
        peer: String,
        features: u64,
        fresh: impl FnOnce() -> io::Result<Nonce>,
    ) -> io::Result<(Vec<u8>, Option<Dialer>)> {
        let (group, worker) = (config.group.clone(), config.worker.clone());
        let nonce = config.key.as_ref().map(|_| fresh()).transpose()?;
        let hello = encoded(&Self { group, worker, role, versions: [VERSION; 2], features, nonce });
        let dialer = config.key.as_ref().map(|key| Dialer::new(key, Realm::Worker, &hello, peer));
        Ok((hello, dialer))
    }
}

/// With a job key, 32 bytes of proof follow it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Welcome {
    pub(crate) worker: WorkerInfo,
    pub(crate) bulk_key: u128,
    /// The version both go on in: the newest that both speak.
    pub(crate) version: u8,
    /// The features both have.
    pub(crate) features: u64,
}

/// Metadata of a Close frame.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Goodbye {
    pub(crate) reason: Reason,
    pub(crate) text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Reason {
    Shutdown,
    Refused,
    /// The sender has a job key, the receiver said hello without one.
    KeyWanted,
    /// The sender has no job key, the receiver's hello asks for one.
    NoKey,
    /// The receiver's proof is wrong.
    WrongKey,
    /// The receiver's process is another user's.
    OtherUser,
    /// The sender uses TLS, the receiver does not.
    TlsWanted,
    /// The sender uses no TLS, the receiver does.
    NoTls,
    /// A TLS session ended: a certificate, or the bytes, are refused. Of this process, not from the wire.
    Certificate,
    /// The network's side of a TLS session failed. Of this process, too.
    Unreachable,
}

impl Goodbye {
    /// What the receiver is told of `cause`, if it is to be told.
    pub(crate) fn of(cause: &CloseCause) -> Option<Self> {
        let (reason, text) = match cause {
            CloseCause::LocalShutdown => (Reason::Shutdown, cause.to_string()),
            CloseCause::Protocol(error) => (Reason::Refused, error.to_string()),
            CloseCause::Device(error) => (Reason::Refused, error.to_string()),
            // For a process that was stopped and goes on.
            CloseCause::Silent { silent } => {
                (Reason::Refused, format!("nothing was heard from this worker for {silent:?}, so it counted as lost"))
            }
            CloseCause::Replaced { life } => {
                (Reason::Refused, format!("this worker was started again, as its life {life}"))
            }
            // To each side its own words; these would name the receiver to itself.
            CloseCause::Auth(error) => (error.reason(), String::new()),
            _ => return None,
        };
        Some(Self { reason, text })
    }

    /// Why the connection ends, for who is told so by `peer`.
    pub(crate) fn cause(self, peer: impl FnOnce() -> String) -> CloseCause {
        match self.reason {
            Reason::Shutdown => CloseCause::PeerShutdown { text: self.text },
            Reason::Refused => CloseCause::Refused { text: self.text },
            Reason::KeyWanted => CloseCause::Auth(AuthError::KeyWanted { peer: peer() }),
            Reason::NoKey => CloseCause::Auth(AuthError::NoKey { peer: peer() }),
            Reason::WrongKey => CloseCause::Auth(AuthError::WrongKey { peer: peer() }),
            Reason::OtherUser => CloseCause::Auth(AuthError::OtherUser { peer: peer() }),
            Reason::TlsWanted => CloseCause::Auth(AuthError::TlsWanted { peer: peer() }),
            Reason::NoTls => CloseCause::Auth(AuthError::NoTls { peer: peer() }),
            Reason::Certificate => CloseCause::Auth(AuthError::Certificate { peer: peer(), message: self.text }),
            Reason::Unreachable => {
                let source = Some(Arc::new(io::Error::other(self.text)));
                CloseCause::PeerLost { source }
            }
        }
    }
}

impl AuthError {
    /// The same from the other side.
    fn reason(&self) -> Reason {
        match self {
            Self::NoKey { .. } => Reason::KeyWanted,
            Self::KeyWanted { .. } => Reason::NoKey,
            Self::WrongKey { .. } => Reason::WrongKey,
            Self::OtherUser { .. } => Reason::OtherUser,
            Self::NoTls { .. } => Reason::TlsWanted,
            Self::TlsWanted { .. } => Reason::NoTls,
            Self::Certificate { .. } => Reason::Certificate,
        }
    }
}
