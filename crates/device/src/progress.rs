//! How far a stream has come, and who waits for it: the one slot behind all its events, so that an event needs none of its own.
//!
//! An event that is completed by hand has a progress to itself.
//! Invariant E1: a ticket passes once, with one outcome that every waiter and callback gets. After a failure all later ones fail.
//! Invariant E2: callbacks run under no lock. One that is registered after its ticket passed runs at once.

use std::time::{Duration, Instant};

use crate::DeviceError;
use crate::sync::{Arc, AtomicU64, Condvar, Mutex, MutexGuard, Ordering, PoisonError};

pub(crate) type Outcome = Result<(), DeviceError>;
pub(crate) type Callback = Box<dyn FnOnce(Outcome) + Send>;

pub(crate) struct Progress {
    /// Tickets up to this one have passed. Written under the lock, after `failed_from`.
    done: AtomicU64,
    /// The first ticket that failed; `u64::MAX` if none has.
    failed_from: AtomicU64,
    /// Whether something outside the runtime's streams completes it.
    by_hand: bool,
    waiting: Mutex<Waiting>,
    passed: Condvar,
}

#[derive(Default)]
struct Waiting {
    error: Option<DeviceError>,
    callbacks: Vec<(u64, Callback)>,
}

impl Progress {
    pub(crate) fn new(by_hand: bool) -> Arc<Self> {
        Arc::new(Self {
            done: AtomicU64::new(0),
            failed_from: AtomicU64::new(u64::MAX),
            by_hand,
            waiting: Mutex::new(Waiting::default()),
            passed: Condvar::new(),
        })
    }

    pub(crate) fn is_by_hand(&self) -> bool {
        self.by_hand
    }

    pub(crate) fn has_passed(&self, ticket: u64) -> bool {
        self.done.load(Ordering::Acquire) >= ticket
    }

    /// The stream's failure: no later work of it runs.
    pub(crate) fn failure(&self) -> Option<DeviceError> {
        if self.failed_from.load(Ordering::Acquire) == u64::MAX { None } else { self.lock().error.clone() }
    }

    /// `None` while the ticket has not passed.
    pub(crate) fn outcome(&self, ticket: u64) -> Option<Outcome> {
        if !self.has_passed(ticket) {
            return None;
        }
        if ticket < self.failed_from.load(Ordering::Acquire) {
            return Some(Ok(()));
        }
        Some(self.lock().error.clone().map_or(Ok(()), Err))
    }

    /// Lets tickets up to this one pass. The caller runs what is due, under no lock.
    pub(crate) fn advance(&self, ticket: u64, outcome: Outcome) -> Due<'_> {
        let mut waiting = self.lock();
        if let Err(error) = outcome
            && waiting.error.is_none()
        {
            waiting.error = Some(error);
            self.failed_from.store(ticket, Ordering::Release);
        }
        self.done.fetch_max(ticket, Ordering::Release);
        let callbacks = waiting.callbacks.extract_if(.., |(due, _)| *due <= ticket).collect();
        drop(waiting);
        self.passed.notify_all();
        Due { progress: self, callbacks }
    }

    /// Fails all tickets that have not passed, and those that will come. The caller runs what is due, under no lock.
    pub(crate) fn fail(&self, error: DeviceError) -> Due<'_> {
        let mut waiting = self.lock();
        if waiting.error.is_none() {
            waiting.error = Some(error);
            self.failed_from.store(self.done.load(Ordering::Acquire) + 1, Ordering::Release);
        }
        self.done.fetch_max(u64::MAX - 1, Ordering::Release);
        let callbacks = std::mem::take(&mut waiting.callbacks);
        drop(waiting);
        self.passed.notify_all();
        Due { progress: self, callbacks }
    }

    /// Blocks this thread until the ticket has passed; `None` if `deadline` came first.
    pub(crate) fn block(&self, ticket: u64, deadline: Option<Instant>) -> Option<Outcome> {
        if let Some(outcome) = self.outcome(ticket) {
            return Some(outcome);
        }
        let mut waiting = self.lock();
        while !self.has_passed(ticket) {
            waiting = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                None => self.passed.wait(waiting).unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => return None,
                Some(left) => self.passed.wait_timeout(waiting, left).unwrap_or_else(PoisonError::into_inner).0,
            };
        }
        drop(waiting);
        self.outcome(ticket)
    }

    /// Calls `callback` once: now if the ticket has passed, else on the thread that lets it pass.
    pub(crate) fn on_passed(&self, ticket: u64, callback: impl FnOnce(Outcome) + Send + 'static) {
        if !self.has_passed(ticket) {
            let mut waiting = self.lock();
            if !self.has_passed(ticket) {
                waiting.callbacks.push((ticket, Box::new(callback)));
                return;
            }
        }
        callback(self.outcome(ticket).unwrap_or(Ok(())));
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Callbacks whose ticket has passed.
#[must_use = "waiters are left behind unless it is run"]
pub(crate) struct Due<'a> {
    progress: &'a Progress,
    callbacks: Vec<(u64, Callback)>,
}

impl Due<'_> {
    /// The callbacks, for another thread to call.
    pub(crate) fn into_callbacks(self) -> Vec<(u64, Callback)> {
        self.callbacks
    }

    pub(crate) fn run(self) {
        for (ticket, callback) in self.callbacks {
            callback(self.progress.outcome(ticket).unwrap_or(Ok(())));
        }
    }
}
