//! Whether it pays to look for work a while before sleeping.
//!
//! A sleeper is woken in 5 to 80 µs, by a system call of the one that has work for it; one that looks finds it in a tenth of a
//! microsecond. But looking takes a processor from whoever could do the work. So each place where threads wait keeps an average of
//! how long they did, asleep or not: who expects work within about the time that a sleep and a wake cost looks for it, twice that
//! long at most, and is never more than that behind who knew better. A thread that was interrupted while it looked knows that
//! processors are short, and nobody looks here for a while, for longer each time that it happens again.
//!
//! Source: Karlin, Manasse, McGeoch, Owicki, "Competitive randomized algorithms for nonuniform problems" (1994), for why a wait as
//! long as what it avoids is never bad by more than a factor.

use std::str::FromStr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use std::{fs, hint, thread};

/// Whether threads look for work before they sleep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Spin {
    /// While it is seen to pay, and never where there is one processor.
    #[default]
    Auto,
    /// Never: the least processor time.
    Off,
    /// Always, and longer: for machines that have nothing else to do.
    On,
}

impl FromStr for Spin {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            "on" => Ok(Self::On),
            _ => Err(()),
        }
    }
}

/// Work that is expected within this time is looked for: a sleep and a wake cost no more, on machines whose idle processors halt.
const SOON_NS: u64 = 100_000;
/// How long to look if always.
const ON_NS: u64 = 400_000;
/// A wait counts for no more, so that a few short ones make up for a long one.
const WAIT_NS_MAX: u64 = 4 * SOON_NS;
/// Of the average, the share of one wait is 1 / 2^this.
const SHARE: u32 = 2;
/// Looks between two readings of the clock, which takes as long as some looks.
const LOOKS: u32 = 8;
/// Who did not run for so long was interrupted.
const INTERRUPTED: Duration = Duration::from_micros(60);
/// How long nobody looks after that, at first and at most.
const REST_NS: u64 = 10_000_000;
const REST_NS_MAX: u64 = 1_000_000_000;

/// What one place has seen of waiting. Updates that race may be lost: it is an estimate.
#[derive(Debug)]
pub(crate) struct Seen {
    mode: Spin,
    /// Nanoseconds of a wait, on average.
    wait_ns: AtomicU64,
    /// Nanoseconds after `start` until which nobody looks.
    resting_until_ns: AtomicU64,
    rest_ns: AtomicU64,
    start: Instant,
}

impl Seen {
    pub(crate) fn new(mode: Spin) -> Self {
        Self {
            mode: if several_processors() { mode } else { Spin::Off },
            // Short: the first waits decide.
            wait_ns: AtomicU64::new(SOON_NS / 2),
            resting_until_ns: AtomicU64::new(0),
            rest_ns: AtomicU64::new(REST_NS),
            start: Instant::now(),
        }
    }

    /// Looks for work by `look` for a while from `started`, which is now, if some is expected soon; whether it found some.
    #[inline]
    pub(crate) fn look(&self, started: Instant, mut look: impl FnMut() -> bool) -> bool {
        let look_ns = match self.mode {
            Spin::Off => return false,
            Spin::On => ON_NS,
            Spin::Auto => 2 * self.wait_ns.load(Ordering::Relaxed).max(SOON_NS / 8),
        };
        if self.mode == Spin::Auto && look_ns > 2 * SOON_NS {
            return false;
        }
        if self.mode == Spin::Auto && self.since_start(started) < self.resting_until_ns.load(Ordering::Relaxed) {
            return false;
        }
        let mut before = started;
        loop {
            for _ in 0..LOOKS {
                if look() {
                    return true;
                }
                hint::spin_loop();
            }
            let now = Instant::now();
            if now - before > INTERRUPTED {
                self.rest(now);
                return look();
            }
            if (now - started).as_nanos() as u64 >= look_ns {
                return false;
            }
            before = now;
        }
    }

    /// A wait has ended that began at `began`.
    pub(crate) fn waited(&self, began: Instant) {
        let waited = (began.elapsed().as_nanos() as u64).min(WAIT_NS_MAX);
        let average = self.wait_ns.load(Ordering::Relaxed);
        self.wait_ns.store(average - (average >> SHARE) + (waited >> SHARE), Ordering::Relaxed);
    }

    fn rest(&self, now: Instant) {
        let (now, until) = (self.since_start(now), self.resting_until_ns.load(Ordering::Relaxed));
        let rest = self.rest_ns.load(Ordering::Relaxed);
        // Soon after the last time: it was too short.
        let rest = if until > 0 && now < until + rest { (2 * rest).min(REST_NS_MAX) } else { REST_NS };
        self.rest_ns.store(rest, Ordering::Relaxed);
        self.resting_until_ns.store(now + rest, Ordering::Relaxed);
    }

    fn since_start(&self, when: Instant) -> u64 {
        when.saturating_duration_since(self.start).as_nanos() as u64
    }
}

/// Of the machine: a process that is held to one of them may well wait for one on another.
fn several_processors() -> bool {
    static SEVERAL: OnceLock<bool> = OnceLock::new();
    *SEVERAL.get_or_init(|| match fs::read_to_string("/sys/devices/system/cpu/online") {
        Ok(online) => online.contains(['-', ',']),
        Err(_) => thread::available_parallelism().is_ok_and(|count| count.get() > 1),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_millis(5);

    /// As on a machine with several processors, whatever this one is.
    fn seen(mode: Spin) -> Seen {
        Seen { mode, ..Seen::new(mode) }
    }

    fn looks(seen: &Seen) -> bool {
        let mut looked = false;
        seen.look(Instant::now(), || {
            looked = true;
            true
        });
        looked
    }

    fn wait(seen: &Seen, waited: Duration) {
        seen.waited(Instant::now().checked_sub(waited).unwrap());
    }

    #[test]
    fn who_waits_long_does_not_look() {
        let seen = seen(Spin::Auto);
        (0..8).for_each(|_| wait(&seen, LONG));
        assert!(!looks(&seen));
    }

    #[test]
    fn a_few_short_waits_make_up_for_a_long_time() {
        let seen = seen(Spin::Auto);
        (0..100).for_each(|_| wait(&seen, LONG));
        let shorts = (0..100).take_while(|_| !looks(&seen)).map(|_| wait(&seen, Duration::ZERO)).count();
        assert!(shorts <= 8, "{shorts} short waits");
    }

    #[test]
    fn who_is_interrupted_rests_and_longer_each_time() {
        let seen = seen(Spin::Auto);
        let now = Instant::now();
        seen.rest(now);
        assert!(!looks(&seen));
        let first = seen.resting_until_ns.load(Ordering::Relaxed);
        seen.rest(now + Duration::from_nanos(REST_NS));
        assert_eq!(seen.resting_until_ns.load(Ordering::Relaxed), first + REST_NS + REST_NS);
        // Long afterwards it begins anew.
        seen.rest(now + Duration::from_secs(100));
        assert_eq!(seen.rest_ns.load(Ordering::Relaxed), REST_NS);
    }

    #[test]
    fn off_means_off() {
        assert!(!looks(&seen(Spin::Off)));
    }
}
