//! What the driver's threads run, and what they gather while they run it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use crate::Driver;
use crate::endpoint::Endpoint;

/// A job up to this long is short: a switch of threads would cost about as much.
const SHORT: Duration = Duration::from_micros(50);
/// Short runs in a row after a long one until a job counts as short again.
const PROBATION: u8 = 4;

/// Work for the pool: usually a handler with its call.
pub struct Job {
    run: Box<dyn FnOnce(&mut Turn) + Send>,
    pub(super) cost: Arc<JobCost>,
}

impl Job {
    /// A job of the kind that `cost` keeps account of.
    pub fn new(cost: &Arc<JobCost>, run: impl FnOnce(&mut Turn) + Send + 'static) -> Self {
        Self { run: Box::new(run), cost: Arc::clone(cost) }
    }

    /// Whatever the job does, the thread and its role survive. Handlers' panics are caught, and reported to their callers,
    /// before they get here.
    pub(super) fn run(self, turn: &mut Turn) {
        let started = Instant::now();
        if catch_unwind(AssertUnwindSafe(|| (self.run)(turn))).is_err() {
            crate::limited!(error, "a job of the driver panicked");
        }
        self.cost.record(started.elapsed());
    }
}

/// What jobs of one kind, such as the calls of one function, have cost lately: short enough for the leader, or not.
#[derive(Debug)]
pub struct JobCost {
    /// Short runs still to come before the kind counts as short. A race of two updates loses one of them: harmless.
    probation: AtomicU8,
}

impl Default for JobCost {
    /// Unknown: the first run decides.
    fn default() -> Self {
        Self { probation: AtomicU8::new(1) }
    }
}

impl JobCost {
    pub(super) fn is_short(&self) -> bool {
        self.probation.load(Ordering::Relaxed) == 0
    }

    fn record(&self, took: Duration) {
        let left = self.probation.load(Ordering::Relaxed);
        let next = if took > SHORT { PROBATION } else { left.saturating_sub(1) };
        if next != left {
            self.probation.store(next, Ordering::Relaxed);
        }
    }
}

/// What one thread has gathered to do before it sleeps again.
#[derive(Default)]
pub struct Turn {
    pub(super) jobs: Vec<Job>,
    pub(super) dirty: Vec<Arc<Endpoint>>,
    /// When the frames at hand were read.
    now: Option<Instant>,
}

impl Turn {
    /// Runs `job` on the pool once the frames at hand are read.
    pub fn spawn(&mut self, job: Job) {
        self.jobs.push(job);
    }

    /// When the frames at hand were read: one look at the clock for all of them.
    pub fn now(&mut self, driver: &Driver) -> Instant {
        *self.now.get_or_insert_with(|| driver.now())
    }

    /// Other frames are read than before.
    pub(crate) fn begin_batch(&mut self) {
        self.now = None;
    }

    /// Jobs were gathered.
    pub(crate) fn has_jobs(&self) -> bool {
        !self.jobs.is_empty()
    }

    /// Nothing was gathered.
    pub(crate) fn is_empty(&self) -> bool {
        self.jobs.is_empty() && self.dirty.is_empty()
    }

    pub(crate) fn flush_later(&mut self, endpoint: &Arc<Endpoint>) {
        if !self.dirty.iter().any(|dirty| Arc::ptr_eq(dirty, endpoint)) {
            self.dirty.push(Arc::clone(endpoint));
        }
    }

    pub(crate) fn flush(&mut self) {
        for endpoint in self.dirty.drain(..) {
            endpoint.flush();
        }
    }
}
