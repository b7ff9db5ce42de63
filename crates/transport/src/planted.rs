//! Bugs that are put in on purpose, to see that the simulation finds them. Without the feature `planted` there are none, and
//! asking costs nothing.

#[cfg(feature = "planted")]
use std::cell::Cell;

/// What can be wrong. The last was a real one, found by the simulation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Bug {
    /// An answer that nobody waits for does not free its request's place in the window.
    PlaceKept,
    /// One waiter is not told that the connection has closed.
    WaiterForgotten,
    /// A chunk goes to another transfer.
    ChunkMisplaced,
    /// A request that had to wait for its turn is sent twice.
    SentTwice,
    /// A silent peer is not missed if it is the one that dialed.
    SilenceIgnored,
    /// A closed connection is used again.
    RouteKept,
    /// The window is not looked at.
    WindowIgnored,
    /// The end of the bulk connection ends the other one, whose goodbye is on its way.
    BulkEndsAll,
}

impl Bug {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::PlaceKept,
        Self::WaiterForgotten,
        Self::ChunkMisplaced,
        Self::SentTwice,
        Self::SilenceIgnored,
        Self::RouteKept,
        Self::WindowIgnored,
        Self::BulkEndsAll,
    ];
}

#[cfg(feature = "planted")]
thread_local! {
    static PLANTED: Cell<Option<Bug>> = const { Cell::new(None) };
}

/// Runs `f` with that bug in all that it does on this thread.
#[cfg(feature = "planted")]
pub fn with<R>(bug: Bug, f: impl FnOnce() -> R) -> R {
    PLANTED.set(Some(bug));
    let result = f();
    PLANTED.set(None);
    result
}

/// Whether this thread has that bug.
#[cfg(feature = "planted")]
pub fn has(bug: Bug) -> bool {
    PLANTED.get() == Some(bug)
}

/// Never.
#[cfg(not(feature = "planted"))]
#[inline(always)]
pub const fn has(_: Bug) -> bool {
    false
}
