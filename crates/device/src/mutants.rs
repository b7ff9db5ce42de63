//! Tests of the tests: what happens if this crate forgets one wait?
//!
//! Each place that puts an operation, a freeze or the end of a memory behind a fence asks here, unless a clock makes the wait
//! redundant. Waits that the user inserts are not counted: they are not ours to forget.
//!
//! For streams in chaos mode, on one thread: there a forgotten wait gives wrong bytes, and no access is concurrent.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::Runtime;

/// Counts a runtime's waits.
pub(crate) struct Edges {
    asked: AtomicUsize,
    /// The wait that is left out; `usize::MAX` for none.
    without: AtomicUsize,
}

impl Default for Edges {
    fn default() -> Self {
        Self { asked: AtomicUsize::new(0), without: AtomicUsize::new(usize::MAX) }
    }
}

impl Edges {
    pub(crate) fn keeps_next(&self) -> bool {
        self.asked.fetch_add(1, Ordering::Relaxed) != self.without.load(Ordering::Relaxed)
    }
}

/// Runs `f`, leaving out the n-th wait, from 0, that it causes on streams and storages of `runtime`.
///
/// # Panics
/// If the runtime's streams are not in chaos mode.
pub fn without_edge<R>(runtime: &Runtime, n: usize, f: impl FnOnce() -> R) -> R {
    let engine = runtime.engine().filter(|engine| engine.is_chaos()).expect("mutants run in chaos mode");
    engine.edges.asked.store(0, Ordering::Relaxed);
    engine.edges.without.store(n, Ordering::Relaxed);
    let result = f();
    engine.edges.without.store(usize::MAX, Ordering::Relaxed);
    result
}

/// Runs `f` and counts the waits that it causes; 0 for an unchecked inline runtime, which keeps no clocks.
pub fn count_edges<R>(runtime: &Runtime, f: impl FnOnce() -> R) -> (R, usize) {
    let asked = || runtime.engine().map_or(0, |engine| engine.edges.asked.load(Ordering::Relaxed));
    let before = asked();
    let result = f();
    (result, asked() - before)
}

#[cfg(test)]
mod tests;
