//! A point in a stream's order: has the work before it completed?
//!
//! Invariant E1: an event completes once, with one outcome that every waiter and callback gets.
//! Invariant E2: callbacks and wakers run under no lock. A callback registered after completion runs at once.

use std::fmt;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use crate::{DeviceError, StreamId};

type Outcome = Result<(), DeviceError>;
type Callback = Box<dyn FnOnce(Outcome) + Send>;

/// All work enqueued on a stream before the event was recorded. Cheap to clone.
#[derive(Clone)]
#[must_use]
pub struct Event {
    stream: StreamId,
    ticket: u64,
    /// `None` if it was complete when it was recorded: no memory is needed then.
    signal: Option<Arc<Signal>>,
}

impl Event {
    /// An event of no stream that is complete: the fence of bytes that the host wrote itself.
    pub fn complete() -> Self {
        Self::complete_at(StreamId::HOST, 0)
    }

    pub(crate) fn complete_at(stream: StreamId, ticket: u64) -> Self {
        Self { stream, ticket, signal: None }
    }

    /// An event that its [`Trigger`] completes.
    pub(crate) fn pending_at(stream: StreamId, ticket: u64) -> (Trigger, Self) {
        let signal = Arc::new(Signal::default());
        (Trigger { signal: Some(Arc::clone(&signal)) }, Self { stream, ticket, signal: Some(signal) })
    }

    /// An event that completes when all of `events` have, with the first error if there is one.
    pub(crate) fn all_at(stream: StreamId, ticket: u64, events: &[Self]) -> Self {
        let (trigger, joined) = Self::pending_at(stream, ticket);
        let state = Arc::new((AtomicUsize::new(events.len()), Mutex::new((Some(trigger), Ok(())))));
        for event in events {
            let state = Arc::clone(&state);
            event.on_ready(move |outcome| {
                let (left, end) = &*state;
                let mut end = lock(end);
                if end.1.is_ok() {
                    end.1 = outcome;
                }
                if left.fetch_sub(1, Ordering::AcqRel) == 1 {
                    let (trigger, outcome) = (end.0.take(), end.1.clone());
                    drop(end);
                    if let Some(trigger) = trigger {
                        trigger.complete(outcome);
                    }
                }
            });
        }
        joined
    }

    /// The stream whose order the event is a point of.
    #[must_use]
    pub fn stream(&self) -> StreamId {
        self.stream
    }

    /// How many operations of the stream lie before the event: its component of the vector clock.
    #[must_use]
    pub fn ticket(&self) -> u64 {
        self.ticket
    }

    /// Whether the work has completed; never waits.
    ///
    /// # Errors
    /// The work's own failure, such as [`DeviceError::Lost`].
    pub fn query(&self) -> Result<bool, DeviceError> {
        match &self.signal {
            None => Ok(true),
            Some(signal) => lock(&signal.state).outcome.clone().map_or(Ok(false), |outcome| outcome.map(|()| true)),
        }
    }

    /// Blocks this thread until the work has completed, at most for `timeout`.
    ///
    /// # Errors
    /// [`DeviceError::Timeout`], or the work's own failure.
    pub fn block(&self, timeout: Duration) -> Result<(), DeviceError> {
        let Some(signal) = &self.signal else { return Ok(()) };
        let deadline = Instant::now().checked_add(timeout);
        let mut state = lock(&signal.state);
        loop {
            if let Some(outcome) = &state.outcome {
                return outcome.clone();
            }
            state = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                None => signal.completed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => return Err(DeviceError::Timeout { what: "an event", waited: timeout }),
                Some(left) => signal.completed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0,
            };
        }
    }

    /// A future of the completion, known to the host.
    ///
    /// # Cancel safety
    /// Dropping it changes nothing; the work goes on.
    pub fn host_ready(&self) -> EventReady {
        EventReady { event: self.clone(), waker: None }
    }

    /// Calls `callback` with the outcome once: now if the event is complete, else on the thread that learns of it.
    ///
    /// The callback must be short and must not block: it may run on the one thread that watches all devices.
    pub fn on_ready(&self, callback: impl FnOnce(Result<(), DeviceError>) + Send + 'static) {
        let Some(signal) = &self.signal else { return callback(Ok(())) };
        let mut state = lock(&signal.state);
        match state.outcome.clone() {
            None => state.callbacks.push(Box::new(callback)),
            Some(outcome) => {
                drop(state);
                callback(outcome);
            }
        }
    }

    /// Whether nothing will happen any more: completed or failed.
    pub(crate) fn is_over(&self) -> bool {
        !matches!(self.query(), Ok(false))
    }
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match self.query() {
            Ok(true) => "complete",
            Ok(false) => "pending",
            Err(_) => "failed",
        };
        write!(f, "Event({:?} at {}, {state})", self.stream, self.ticket)
    }
}

#[derive(Default)]
struct Signal {
    state: Mutex<State>,
    completed: Condvar,
}

#[derive(Default)]
struct State {
    outcome: Option<Outcome>,
    callbacks: Vec<Callback>,
}

/// Completes an event. Dropped without doing so, the event is cancelled: no waiter is left behind.
pub(crate) struct Trigger {
    signal: Option<Arc<Signal>>,
}

impl Trigger {
    pub(crate) fn complete(mut self, outcome: Outcome) {
        self.finish(outcome);
    }

    fn finish(&mut self, outcome: Outcome) {
        let Some(signal) = self.signal.take() else { return };
        let mut state = lock(&signal.state);
        state.outcome = Some(outcome.clone());
        let callbacks = std::mem::take(&mut state.callbacks);
        drop(state);
        signal.completed.notify_all();
        for callback in callbacks {
            callback(outcome.clone());
        }
    }
}

impl Drop for Trigger {
    fn drop(&mut self) {
        self.finish(Err(DeviceError::Cancelled));
    }
}

/// The future of [`Event::host_ready`].
#[must_use]
pub struct EventReady {
    event: Event,
    /// The newest waker, shared with the callback that was registered at the first pending poll.
    waker: Option<Arc<Mutex<Option<Waker>>>>,
}

impl Future for EventReady {
    type Output = Result<(), DeviceError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if self.event.is_over() {
            return Poll::Ready(self.event.query().map(drop));
        }
        if let Some(slot) = &self.waker {
            let mut waker = lock(slot);
            if !waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
                let replaced = waker.replace(cx.waker().clone());
                drop(waker);
                drop(replaced);
            }
        } else {
            let slot = Arc::new(Mutex::new(Some(cx.waker().clone())));
            self.waker = Some(Arc::clone(&slot));
            self.event.on_ready(move |_| {
                let waker = lock(&slot).take();
                if let Some(waker) = waker {
                    waker.wake();
                }
            });
        }
        // The event may have completed between the query and the waker's arrival in the slot.
        if self.event.is_over() { Poll::Ready(self.event.query().map(drop)) } else { Poll::Pending }
    }
}

impl fmt::Debug for EventReady {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("EventReady").field(&self.event).finish()
    }
}

impl Drop for EventReady {
    fn drop(&mut self) {
        // The callback stays registered until the event completes; the task it would wake need not.
        if let Some(slot) = &self.waker {
            let waker = lock(slot).take();
            drop(waker);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::CountingWaker;

    fn pending() -> (Trigger, Event) {
        Event::pending_at(StreamId::HOST, 1)
    }

    #[test]
    fn e1_every_waiter_gets_the_one_outcome() {
        let (trigger, event) = pending();
        let seen = Arc::new(Mutex::new(Vec::new()));
        for _ in 0..2 {
            let seen = Arc::clone(&seen);
            event.on_ready(move |outcome| seen.lock().unwrap().push(outcome.is_ok()));
        }
        assert!(!event.query().unwrap());
        assert!(matches!(event.block(Duration::ZERO), Err(DeviceError::Timeout { .. })));
        trigger.complete(Ok(()));
        assert_eq!(*seen.lock().unwrap(), [true, true]);
        assert!(event.query().unwrap());
        event.block(Duration::ZERO).unwrap();
    }

    #[test]
    fn e1_a_dropped_trigger_cancels() {
        let (trigger, event) = pending();
        drop(trigger);
        assert!(matches!(event.query(), Err(DeviceError::Cancelled)));
        assert!(matches!(event.block(Duration::MAX), Err(DeviceError::Cancelled)));
    }

    #[test]
    fn e2_callbacks_may_use_the_event() {
        let (trigger, event) = pending();
        let again = event.clone();
        let ran = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&ran);
        event.on_ready(move |_| {
            let counter = Arc::clone(&counter);
            again.on_ready(move |_| {
                counter.fetch_add(1, Ordering::Relaxed);
            });
        });
        trigger.complete(Ok(()));
        assert_eq!(ran.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_blocked_thread_is_released() {
        let (trigger, event) = pending();
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| event.block(Duration::from_secs(60)));
            trigger.complete(Ok(()));
            waiter.join().unwrap().unwrap();
        });
    }

    #[test]
    fn the_newest_waker_is_woken_once_and_a_dropped_future_wakes_none() {
        let (trigger, event) = pending();
        let (first, second, dropped) = (CountingWaker::new(), CountingWaker::new(), CountingWaker::new());
        let mut ready = event.host_ready();
        assert!(Pin::new(&mut ready).poll(&mut first.context()).is_pending());
        assert!(Pin::new(&mut ready).poll(&mut second.context()).is_pending());
        let mut other = event.host_ready();
        assert!(Pin::new(&mut other).poll(&mut dropped.context()).is_pending());
        drop(other);
        trigger.complete(Ok(()));
        assert_eq!([first.wakes(), second.wakes(), dropped.wakes()], [0, 1, 0]);
        assert!(matches!(Pin::new(&mut ready).poll(&mut first.context()), Poll::Ready(Ok(()))));
    }

    #[test]
    fn a_joined_event_waits_for_all_and_keeps_the_first_error() {
        let ((a, event_a), (b, event_b)) = (pending(), pending());
        let joined = Event::all_at(StreamId::HOST, 2, &[event_a, event_b, Event::complete()]);
        b.complete(Err(DeviceError::BrokenPromise));
        assert!(!joined.query().unwrap(), "one is pending still");
        a.complete(Ok(()));
        assert!(matches!(joined.query(), Err(DeviceError::BrokenPromise)));
    }
}
