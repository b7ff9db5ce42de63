//! Moves bytes between workers: endpoints, channels and the driver. Knows no functions and no references.
//!
//! - [`Driver`]: one per agent. Sockets in one epoll set, led by one thread of a small pool at a time; a caller that
//!   blocks for a reply drives its own endpoint instead. It accepts, dials, keeps time and runs jobs.
//! - [`Endpoint`]: the control path to one peer, by a socket or by rings of shared memory (`shm::ring`), and its bulk connection
//!   for payload above the inline limit.
//! - [`Passing`]: how tensors reach a peer: in slabs that both processes map (`shm`), else through sockets.
//! - [`Frame`], [`Outbound`]: what arrives and what is sent; [`frame::Header`] is the wire.
//! - [`Store`]: where workers find each other.
//! - [`negotiate()`]: which [`Channel`] takes the bytes to a peer, and why the others do not.
//! - [`probe`]: what this machine offers, tried for real.
//! - [`InterfaceChoice`]: which of the host's addresses a worker listens on.
//! - [`JobKey`]: what the workers of a job share, proven by both sides of each connection before anything else (PEERS).
//!
//! Invariants, named where they are kept: LIMITS (checked before allocation), BOUNDED (every wait ends), W1 (wire
//! layout), R1 (a large payload delays no later frame), D1 (one thread reads a connection at a time), D2 (the leading
//! role is taken from a thread that is busy in a handler), E1 (every waiter hears of a close, once).

mod address;
mod auth;
mod descriptor;
mod digest;
mod driver;
mod endpoint;
mod error;
pub mod frame;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
mod interface;
mod key;
mod life;
mod local;
mod negotiate;
mod passing;
#[doc(hidden)]
pub mod planted;
pub mod probe;
mod receive;
mod repeats;
mod shm;
pub mod sim;
mod socket;
mod store;
mod strangers;
mod sync;
mod tcp;
#[cfg(feature = "tls")]
mod tls;
#[cfg(not(feature = "tls"))]
#[path = "tls/none.rs"]
mod tls;
mod tls_error;

pub use address::{Limits, Route, WorkerId, WorkerInfo};
pub use digest::{Corrupt, DIGEST_CHUNK_BYTES, DigestList, Digests, digests};
pub use driver::{Driver, DriverConfig, Job, JobCost, Peer, Service, Spin, Turn};
pub use endpoint::{Endpoint, Outbound, Staged, stage};
pub use error::{AuthError, CloseCause, ProtocolError, TransferError};
pub use farcall_device::is_forked_child;
pub use interface::{InterfaceAddress, InterfaceChoice, InterfaceError, addresses as interface_addresses};
pub use key::{JobKey, KeyError};
pub use life::LifeAddress;
pub use local::{LocalAddress, Transport};
pub use negotiate::{Carriage, Channel, Decision, End, Obstacle, Verdict, negotiate};
pub use passing::{NoSlabs, Passing};
pub use receive::{Arriving, Frame, Placer, Small, Unanswered};
#[doc(hidden)]
pub use repeats::Repeats;
pub use shm::{LENT_BYTES_MIN, no_slabs};
pub use store::*;
pub use tls::Tls;
pub use tls_error::TlsError;
