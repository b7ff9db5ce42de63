//! CUDA devices: the second backend of streams, events and storages. **Not run on a GPU yet**; tested against a fake driver.
//!
//! The driver is found at run time ([`probe()`]); nothing of CUDA is needed to build. What the modules hold:
//! - `sys`, `check`: the driver's calls, and what its statuses mean;
//! - `probe`: is there a driver ([`Unavailable`])?
//! - `context`: one device's primary context, which PyTorch and others share;
//! - `event`, `stream`: pooled events and streams; which tickets of a stream have passed;
//! - `notifier`: the one thread that watches events for the host;
//! - `memory`: device and pinned memory by size class;
//! - `module`: this crate's kernels, compiled by the driver at their first use;
//! - `capability`, `cost`: what else a driver can do, and what its calls cost, for reports.
//!
//! Invariant K1: a device that failed is lost for good: all pending events fail with [`Lost`](crate::DeviceError::Lost), new work is refused.
//! Invariant K2: no call that waits for the device is made to order work: events are recorded, waited for on streams, and queried.
//! Memory is freed by `trim`, when memory runs out, and at the end of a runtime, nowhere else.
//! Invariant K3: every call that needs a context has it current, and leaves the caller's own current afterwards.
#![expect(unsafe_code, reason = "calls the driver")]

mod capability;
mod check;
mod context;
mod cost;
mod event;
mod memory;
mod module;
mod notifier;
mod probe;
mod stream;
mod sys;

pub use capability::{Answer, Capability, capabilities};
pub(crate) use context::Context;
pub use cost::driver_costs;
pub(crate) use memory::{Block, Kind, Pool, Space};
pub use probe::{DeviceInfo, Unavailable, Version, probe};
pub(crate) use probe::{Driver, driver};
pub(crate) use stream::{CudaStream, Rows};

use std::sync::{Mutex, MutexGuard, PoisonError};

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
