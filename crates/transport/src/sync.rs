//! The atomics of what is model-checked: `tests/model.rs` compiles those modules against loom's instead.

pub(crate) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
