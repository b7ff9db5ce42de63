//! Real worker processes: killed, stopped, leaving without a word, leaving together.

mod builtins;
mod death;
mod descriptors;
mod joining;
mod leaving;
mod logs;
mod memory;
mod restarts;
pub(crate) mod spawn;
