//! The one thread that tells the host when work of CUDA streams is over.
//!
//! It asks about the oldest recorded point of each stream that somebody waits for, and of no other. It spins while that is likely
//! to pay, then yields, then sleeps; it is parked while nobody waits.
//! Invariant N1: whoever waits for a ticket is told within [`SLEEP_MAX`] of its end, and a process without waiters costs nothing.
//! Invariant N2: callbacks run under no lock, and one that panics takes nobody else's with it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::lock;
use super::stream::CudaStream;
use crate::DeviceError;
use crate::progress::{Callback, Progress};

/// How long the thread asks without a pause after something has passed, or came to be waited for.
const SPIN: Duration = Duration::from_micros(20);
/// How long it then gives its processor to others between questions.
const YIELD: Duration = Duration::from_micros(100);
/// The shortest pause after that; it doubles up to `SLEEP_MAX`.
const SLEEP_MIN: Duration = Duration::from_micros(20);
/// The longest pause.
const SLEEP_MAX: Duration = Duration::from_micros(200);

/// What the thread is told.
pub(super) struct Notifier {
    told: Mutex<Told>,
    news: Condvar,
}

#[derive(Default)]
struct Told {
    watched: Vec<Arc<CudaStream>>,
    due: Vec<Due>,
    /// Counts what was told: a pause ends with the next.
    news: u64,
}

/// Callbacks that another thread found due.
struct Due {
    progress: Arc<Progress>,
    callbacks: Vec<(u64, Callback)>,
}

/// The process's notifier, started at its first use.
pub(super) fn start() -> Result<&'static Notifier, DeviceError> {
    static NOTIFIER: OnceLock<Result<&'static Notifier, DeviceError>> = OnceLock::new();
    let started = NOTIFIER.get_or_init(|| {
        let notifier: &'static Notifier =
            Box::leak(Box::new(Notifier { told: Mutex::default(), news: Condvar::new() }));
        let thread = std::thread::Builder::new().name("farcall-cuda".to_owned());
        let spawned = thread.spawn(|| notifier.run());
        spawned.map(|_| notifier).map_err(|error| DeviceError::os("spawn", error))
    });
    started.clone()
}

impl Notifier {
    /// Watches a stream until all that is wanted of it has passed.
    pub(super) fn watch(&self, stream: &Arc<CudaStream>) {
        let mut told = lock(&self.told);
        if !told.watched.iter().any(|watched| Arc::ptr_eq(watched, stream)) {
            told.watched.push(Arc::clone(stream));
        }
        told.news += 1;
        drop(told);
        self.news.notify_one();
    }

    /// Runs callbacks on the notifier's thread; here if there is none.
    pub(super) fn run_elsewhere(progress: &Arc<Progress>, callbacks: Vec<(u64, Callback)>) {
        if callbacks.is_empty() {
            return;
        }
        let due = Due { progress: Arc::clone(progress), callbacks };
        match start() {
            Ok(notifier) => {
                let mut told = lock(&notifier.told);
                told.due.push(due);
                told.news += 1;
                drop(told);
                notifier.news.notify_one();
            }
            Err(_) => due.run(),
        }
    }

    fn run(&self) {
        let mut quiet_since = Instant::now();
        let mut pause = SLEEP_MIN;
        let mut seen = 0;
        let mut watched: Vec<Arc<CudaStream>> = Vec::new();
        loop {
            watched.clear();
            let mut told = lock(&self.told);
            told.watched.retain(|stream| stream.is_wanted());
            while told.watched.is_empty() && told.due.is_empty() {
                told = self.news.wait(told).unwrap_or_else(PoisonError::into_inner);
            }
            if told.news != seen {
                (seen, quiet_since, pause) = (told.news, Instant::now(), SLEEP_MIN);
            }
            let due = std::mem::take(&mut told.due);
            watched.extend_from_slice(&told.watched);
            drop(told);
            due.into_iter().for_each(Due::run);
            let mut passed = false;
            for stream in &watched {
                passed |= stream.look_for_notifier();
            }
            if passed {
                (quiet_since, pause) = (Instant::now(), SLEEP_MIN);
                continue;
            }
            let quiet = quiet_since.elapsed();
            if quiet < SPIN {
                std::hint::spin_loop();
            } else if quiet < YIELD {
                std::thread::yield_now();
            } else {
                let told = lock(&self.told);
                if told.news == seen {
                    drop(self.news.wait_timeout(told, pause));
                    pause = (2 * pause).min(SLEEP_MAX);
                }
            }
        }
    }
}

impl Due {
    fn run(self) {
        for (ticket, callback) in self.callbacks {
            let outcome = self.progress.outcome(ticket).unwrap_or(Ok(()));
            if catch_unwind(AssertUnwindSafe(|| callback(outcome))).is_err() {
                tracing::error!("a callback panicked");
            }
        }
    }
}
