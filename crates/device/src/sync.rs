//! The locks and atomics of what is model-checked: `tests/model.rs` compiles those modules against loom's instead.

pub(crate) use std::sync::atomic::{AtomicU64, Ordering};
pub(crate) use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
