//! Who a worker is and where it can be dialed; the first frames of a connection.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::DriverConfig;
use crate::frame::{FEATURES, VERSION};

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
    /// Where its listener is.
    pub address: SocketAddr,
    /// The process's id on its host, for people and tools.
    pub pid: u32,
    /// Differs between two lives of one worker.
    pub incarnation: u64,
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
        }
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
    /// What the dialer can do beyond them, a bit each; none is defined yet.
    pub(crate) features: u64,
}

impl Hello {
    pub(crate) fn new(config: &DriverConfig, role: Role) -> Self {
        let (group, worker) = (config.group.clone(), config.worker.clone());
        Self { group, worker, role, versions: [VERSION; 2], features: FEATURES }
    }
}

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
}
