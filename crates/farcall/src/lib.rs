#![doc = include_str!("../../../README.md")]
//!
//! # This crate
//! What Rust programs depend on: the public items of the crates below, and [`log`]. Operators on tensors are in [`ops`]:
//! ```
//! use farcall::{Device, Runtime, Tensor, ops};
//!
//! let stream = Runtime::global().stream(Device::HOST)?;
//! let x = Tensor::from_slice(&[1.0_f32, 2.0, 3.0], &[3])?;
//! let y = ops::sum(&ops::mul(&x, 2.0, &stream)?, &[], false, &stream)?.host().wait(std::time::Duration::from_secs(5))?;
//! assert_eq!(y.as_slice::<f32>()?, [12.0]);
//! # Ok::<(), ops::OpError>(())
//! ```
//!
//! [`architecture`] is the map of the whole, [`gotchas`] what surprised us about drivers, [`bench_page`] how to measure.

#[cfg(feature = "log")]
pub mod log;

pub use farcall_device::{
    self as device, DType, Device, DeviceError, DeviceFuture, Layout, Param, Promise, Runtime, Storage, Stream, Tensor,
    TensorMut,
};
pub use farcall_macros::{Value, function};
#[doc(inline)]
pub use farcall_ops as ops;
pub use farcall_rpc::{
    Agent, Builtin, BuiltinError, Call, CallError, CallId, DeviceMap, Error, Filling, Function, JoinError, Misfit,
    Options, Outcomes, Registry, RemoteError, Replies, Reply, Result, SomeFailed, Stage, To, ToAll, settings,
};
pub use farcall_schema::{
    self as schema, FromValue, Kwargs, NoMatch, Ref, Refused, Schema, Value, ValueError, args, kwargs,
};
pub use farcall_transport::{
    self as transport, Channel, CloseCause, Decision, JobKey, Limits, Route, Spin, StoreServer, Tls, Transport,
    WorkerId, WorkerInfo,
};

/// What a program that calls and serves functions needs.
pub mod prelude {
    pub use crate::{Agent, Call, CallError, DType, Device, Options, Stream, Tensor, Value, args, function, kwargs};
}

#[doc = include_str!("../docs/architecture.md")]
pub mod architecture {}

#[doc = include_str!("../docs/gotchas.md")]
pub mod gotchas {}
#[doc = include_str!("../docs/settings.md")]
pub mod settings_page {}

#[doc = include_str!("../docs/bench.md")]
pub mod bench_page {}

/// What `#[farcall::function]` expands to; not for programs.
#[doc(hidden)]
pub mod __private {
    pub use farcall_rpc::{Call, Function, FunctionCell, Handler, Outcome, Registration, inventory};
    pub use farcall_schema::fields;
}
