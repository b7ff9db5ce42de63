//! How many descriptors memory may take of those that a process has: sockets and files need the most.
//!
//! Each slab has one, and so has each slab of a peer. A process may have a thousand descriptors by default, and more tensors than
//! that. Beyond the budget memory is used without one: it is shared with nobody, or viewed by nobody.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::process::{Resource, getrlimit};

static TAKEN: AtomicUsize = AtomicUsize::new(0);

/// The right to one descriptor for memory, given back when dropped.
#[derive(Debug)]
pub struct DescriptorPermit(());

impl DescriptorPermit {
    /// `None`: memory has its share, a quarter of the process's limit (`ulimit -n`) at its first need.
    #[must_use]
    pub fn take() -> Option<Self> {
        static MAX: OnceLock<usize> = OnceLock::new();
        let max = *MAX.get_or_init(|| {
            let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
            usize::try_from(limit / 4).unwrap_or(usize::MAX)
        });
        // Not `then_some`: what is refused must not be made, as its end would give one back.
        Self::take_of(&TAKEN, max).then(|| Self(()))
    }

    fn take_of(taken: &AtomicUsize, max: usize) -> bool {
        let more = |taken| (taken < max).then_some(taken + 1);
        taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }
}

impl Drop for DescriptorPermit {
    fn drop(&mut self) {
        TAKEN.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_takes_no_more_than_its_share() {
        let taken = AtomicUsize::new(0);
        let all: Vec<_> = (0..5).map(|_| DescriptorPermit::take_of(&taken, 3)).collect();
        assert_eq!(all, [true, true, true, false, false]);
        let permit = DescriptorPermit::take().expect("the process has some left");
        assert!(TAKEN.load(Ordering::Relaxed) >= 1);
        drop(permit);
    }
}
