//! Real worker processes: killed, stopped, leaving without a word, leaving together.

mod builtins;
mod death;
mod descriptors;
mod into;
mod joining;
mod leaving;
mod logs;
mod memory;
mod restarts;
mod scale;
mod slabs;
pub(crate) mod spawn;
