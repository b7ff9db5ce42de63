//! Log lines that somebody else can cause again and again: the first of a kind, then a count.
//!
//! Invariant L1: beyond [`LINES`] in [`WINDOW`], a place in the code writes nothing until the window is over; its next line
//! says how many it left out.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const WINDOW: Duration = Duration::from_secs(10);
const LINES: u64 = 16;

/// How often one place of the code has been there to write a line: for [`limited!`](crate::limited).
#[doc(hidden)]
#[derive(Debug)]
pub struct Repeats(Mutex<Counts>);

#[derive(Debug)]
struct Counts {
    /// When the window began; `None` before the first line.
    since: Option<Instant>,
    /// In the window, those that were not written included.
    asked: u64,
}

impl Repeats {
    /// None yet.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "made in statics")]
    pub const fn new() -> Self {
        Self(Mutex::new(Counts { since: None, asked: 0 }))
    }

    /// Whether to write a line now; if so, how many were left out before it, if any were.
    pub fn admit(&self) -> Option<Option<u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).admit(Instant::now())
    }
}

impl Counts {
    fn admit(&mut self, now: Instant) -> Option<Option<u64>> {
        if self.since.is_some_and(|since| now.saturating_duration_since(since) < WINDOW) {
            self.asked += 1;
            return (self.asked <= LINES).then_some(None);
        }
        let left_out = self.asked.saturating_sub(LINES);
        *self = Self { since: Some(now), asked: 1 };
        Some((left_out > 0).then_some(left_out))
    }
}

/// As `tracing::$level!`, for what a peer can repeat as often as it likes (L1). Not for programs.
#[doc(hidden)]
#[macro_export]
macro_rules! limited {
    ($level:ident, $($line:tt)+) => {{
        static REPEATS: $crate::Repeats = $crate::Repeats::new();
        if let Some(left_out) = REPEATS.admit() {
            tracing::$level!(left_out, $($line)+);
        }
    }};
}

#[cfg(test)]
mod tests {
    use super::*;

    /// L1.
    #[test]
    fn a_flood_is_counted_and_told_with_the_next_line() {
        let start = Instant::now();
        let mut counts = Counts { since: None, asked: 0 };
        let written = |counts: &mut Counts, at: Duration, times: u64| {
            (0..times).filter_map(|_| counts.admit(start + at)).collect::<Vec<_>>()
        };
        assert_eq!(written(&mut counts, Duration::ZERO, 16), vec![None; 16]);
        assert_eq!(written(&mut counts, Duration::from_millis(9_999), 1_000), []);
        assert_eq!(written(&mut counts, Duration::from_secs(10), 2), [Some(1_000), None]);
        // A quiet window has left out nothing.
        assert_eq!(written(&mut counts, Duration::from_secs(30), 17), vec![None; 16]);
        assert_eq!(written(&mut counts, Duration::from_secs(40), 1), [Some(1)]);
    }
}
