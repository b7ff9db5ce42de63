//! Calls between workers: functions, agents, calls and their errors. Knows no socket and no driver of a device.
//!
//! - [`Agent`]: a worker's runtime. [`Agent::to`] chooses a worker, [`To::call`] calls a function on it.
//! - [`To::builtin`], [`Builtin`]: functions that are called by name, such as `aten::add`, with values that know their types.
//! - [`Agent::to_all`]: one call to several workers, whose arguments are packed and encoded once; [`Replies`] has an outcome of each.
//! - [`Function`], [`Handler`], [`Registry`]: what `#[farcall::function]` makes, and where it is found.
//! - [`Reply`]: a call's value to come. [`CallError`]: why there is none.
//! - [`settings`]: what may be set by a file, by variables and by launchers.
//! - [`Call`]: what a handler knows of the call it serves.
//!
//! Dropping a call's future cancels the call, at its callee and down the chain of calls that [`Call::to`] makes.
//!
//! Invariants, named where they are kept: READY (a value is reached when its storages are complete), ONCE (a request is
//! sent once; nothing retries it), REGISTERED (only registered functions run), BOUNDED (every call, join and shutdown
//! has a deadline), C1 and C2 (a call has one outcome, and has one in time).

mod agent;
mod builtin;
mod call;
mod context;
mod device_map;
mod error;
mod filling;
mod function;
mod interned;
mod join;
mod link;
mod lives;
mod nearest;
mod parcel;
mod registry;
mod replies;
mod scope;
mod serve;
pub mod settings;
pub mod sim;
mod table;
mod to_all;

pub use agent::{Agent, Target, To};
pub use builtin::{Builtin, BuiltinError};
pub use call::{Reply, ReplyFuture};
pub use context::Call;
pub use device_map::DeviceMap;
pub use error::{CallError, CallId, Error, JoinError, Misfit, RemoteError, Result, Stage};
pub use filling::{Filling, FillingFuture};
pub use function::{Arg, Args, Function, Handler, Outcome};
#[doc(hidden)]
pub use interned::FunctionCell;
pub use inventory;
pub use join::Options;
pub use registry::{Registration, Registry};
pub use replies::{Outcomes, Replies, RepliesFuture, SomeFailed};
pub use to_all::ToAll;
