//! What peers must not do, byte by byte: each fault is named to who made it, and hurts nobody else.
//!
//! Bytes are written out here, from the tables in `transport::frame` and `transport::descriptor`, not by their encoders.

mod auth;
mod bulk;
mod connections;
mod descriptors;
mod digests;
mod frames;
mod greeting;
pub(crate) mod raw;
mod rings;
mod session;
mod slabs;
#[cfg(feature = "tls")]
pub(crate) mod tls;
