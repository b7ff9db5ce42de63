//! How far a round is, on one line of a terminal; nothing where no person watches.

use std::io::{IsTerminal, Write, stdout};

/// A line that is written over, and gone when this is dropped.
pub(super) struct Progress {
    title: String,
    done: usize,
    all: usize,
    shown: bool,
}

impl Progress {
    pub(super) fn new(round: u64, rounds: u64, all: usize) -> Self {
        let progress = Self { title: format!("round {round}/{rounds}"), done: 0, all, shown: stdout().is_terminal() };
        progress.show();
        progress
    }

    pub(super) fn advance(&mut self) {
        self.done += 1;
        self.show();
    }

    fn show(&self) {
        if self.shown {
            print!("\r\x1b[K{}", self.line());
            // A terminal that is gone ends the program elsewhere.
            let _ = stdout().flush();
        }
    }

    fn line(&self) -> String {
        let (done, left) = ("#".repeat(self.done), ".".repeat(self.all.saturating_sub(self.done)));
        format!("  {} [{done}{left}] {} of {} parts there", self.title, self.done, self.all)
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.shown {
            print!("\r\x1b[K");
            let _ = stdout().flush();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_how_far_it_is() {
        let mut progress = Progress { title: "round 3/20".to_owned(), done: 0, all: 3, shown: false };
        progress.advance();
        assert_eq!(progress.line(), "  round 3/20 [#..] 1 of 3 parts there");
    }
}
