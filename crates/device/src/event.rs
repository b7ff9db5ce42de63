//! A point in a stream's order: has the work before it completed?
//!
//! Invariant E1: an event completes once, with one outcome that every waiter and callback gets.
//! Invariant E2: callbacks and wakers run under no lock. A callback registered after completion runs at once.
//! An event of a stream is a ticket and the stream's [`Progress`]: recording one takes no memory.

use std::fmt;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use crate::clock::Clock;
use crate::cpu::{Engine, Patience};
use crate::cuda::CudaStream;
use crate::progress::{Outcome, Progress};
use crate::waiter::Waiter;
use crate::{DeviceError, Runtime, StreamId};

/// All work enqueued on a stream before the event was recorded. Cheap to clone.
#[derive(Clone)]
#[must_use]
pub struct Event {
    stream: StreamId,
    ticket: u64,
    /// `None` if it was complete when it was recorded and nothing keeps clocks.
    point: Option<Point>,
}

#[derive(Clone)]
struct Point {
    lane: Arc<Lane>,
    /// What lies before, on other streams.
    clock: Option<Arc<Clock>>,
}

/// What the events of one stream share.
pub(crate) struct Lane {
    pub(crate) progress: Arc<Progress>,
    pub(crate) engine: Option<Arc<Engine>>,
    /// The stream of a CUDA device whose driver knows how far it is.
    pub(crate) cuda: Option<Arc<CudaStream>>,
}

impl Event {
    /// An event of no stream that is complete: the fence of bytes that the host wrote itself.
    pub fn complete() -> Self {
        Self::complete_at(StreamId::HOST, 0)
    }

    /// An event that is completed by hand: the fence of bytes that something other than a stream writes, such as a socket.
    ///
    /// # Waiting
    /// Who makes a token must see to it that it is completed or dropped in bounded time, since streams wait for it: inline, the
    /// thread that enqueues work behind it blocks, at most for 30 s; in other modes the stream stands still, not the thread.
    pub fn token(runtime: &Runtime) -> (Token, Self) {
        let (trigger, event) = Self::by_hand(StreamId::fresh(), 1, None, runtime.engine().cloned());
        (Token(trigger), event)
    }

    /// The event of a write that failed.
    pub(crate) fn failed(error: DeviceError) -> Self {
        let (trigger, event) = Self::by_hand(StreamId::fresh(), 1, None, None);
        trigger.complete(Err(error));
        event
    }

    pub(crate) fn complete_at(stream: StreamId, ticket: u64) -> Self {
        Self { stream, ticket, point: None }
    }

    /// The point of a stream after `ticket` operations.
    pub(crate) fn at(stream: StreamId, ticket: u64, lane: Arc<Lane>, clock: Option<Arc<Clock>>) -> Self {
        Self { stream, ticket, point: Some(Point { lane, clock }) }
    }

    /// An event that its [`Trigger`] completes.
    #[cfg(test)]
    pub(crate) fn pending_at(stream: StreamId, ticket: u64) -> (Trigger, Self) {
        Self::by_hand(stream, ticket, None, None)
    }

    fn by_hand(
        stream: StreamId,
        ticket: u64,
        clock: Option<Arc<Clock>>,
        engine: Option<Arc<Engine>>,
    ) -> (Trigger, Self) {
        let progress = Progress::new(true);
        let trigger = Trigger { progress: Some(Arc::clone(&progress)), ticket: ticket.max(1) };
        // A ticket of 0 has always passed: such an event is told apart by a progress of its own.
        let lane = Arc::new(Lane { progress, engine, cuda: None });
        (trigger, Self { stream, ticket, point: Some(Point { lane, clock }) })
    }

    /// An event that completes when all of `events` have, with the first error if there is one.
    pub(crate) fn all_at(
        stream: StreamId,
        ticket: u64,
        events: &[Self],
        clock: Option<Arc<Clock>>,
        engine: Option<Arc<Engine>>,
    ) -> Self {
        let (trigger, joined) = Self::by_hand(stream, ticket, clock, engine);
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

    /// This event, once `earlier` has completed too.
    pub(crate) fn after(self, earlier: &Self) -> Self {
        let mut clock = self.clock().cloned().unwrap_or_default();
        clock.join(earlier);
        let engine = self.lane().and_then(|lane| lane.engine.clone());
        Self::all_at(self.stream, self.ticket, &[earlier.clone(), self], Some(Arc::new(clock)), engine)
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

    /// Whether the work has completed; never waits. In chaos mode it runs work until it is, unless that waits for a token.
    ///
    /// # Errors
    /// The work's own failure, such as [`DeviceError::Lost`]; [`DeviceError::Deadlock`] in chaos mode.
    pub fn query(&self) -> Result<bool, DeviceError> {
        if self.point.is_none() {
            return Ok(true);
        }
        self.drive(Patience::None)?;
        self.known().map_or(Ok(false), |outcome| outcome.map(|()| true))
    }

    /// Blocks this thread until the work has completed, at most for `timeout`.
    ///
    /// # Errors
    /// [`DeviceError::Timeout`], or the work's own failure; [`DeviceError::Deadlock`] in chaos mode.
    pub fn block(&self, timeout: Duration) -> Result<(), DeviceError> {
        let Some(point) = &self.point else { return Ok(()) };
        let deadline = Instant::now().checked_add(timeout);
        self.drive(Patience::Until(deadline, timeout))?;
        self.watch();
        let outcome = point.lane.progress.block(self.slot(), deadline);
        self.learn(outcome.as_ref());
        outcome.unwrap_or(Err(DeviceError::Timeout { what: "an event", waited: timeout }))
    }

    /// A future of the completion, known to the host.
    ///
    /// # Cancel safety
    /// Dropping it changes nothing; the work goes on.
    pub fn host_ready(&self) -> EventReady {
        EventReady { event: self.clone(), waiter: Waiter::default(), asked: false }
    }

    /// Calls `callback` with the outcome once: now if the event is complete, else on the thread that learns of it.
    ///
    /// The callback must be short and must not block: it may run on the one thread that watches all devices.
    pub fn on_ready(&self, callback: impl FnOnce(Result<(), DeviceError>) + Send + 'static) {
        let Some(point) = &self.point else { return callback(Ok(())) };
        if let Err(deadlock) = self.drive(Patience::None) {
            return callback(Err(deadlock));
        }
        if self.is_over() {
            return callback(self.known().unwrap_or(Ok(())));
        }
        // What is stored must not keep the runtime alive that completes it: the clock is enough, and weakly the engine.
        let (stream, ticket, clock) = (self.stream, self.ticket, point.clock.clone());
        let engine = point.lane.engine.as_ref().map(Arc::downgrade);
        point.lane.progress.on_passed(self.slot(), move |outcome| {
            if outcome.is_ok()
                && let Some(engine) = engine.and_then(|engine| engine.upgrade())
            {
                engine.host().learn(stream, ticket, clock.as_deref());
            }
            callback(outcome);
        });
        self.want();
    }

    /// As [`Event::on_ready`], for the order of work alone: asks for nothing to be run and tells the host nothing.
    pub(crate) fn on_over(&self, callback: impl FnOnce() + Send + 'static) {
        match &self.point {
            None => callback(),
            Some(point) => {
                point.lane.progress.on_passed(self.slot(), move |_| callback());
                self.watch();
            }
        }
    }

    /// Asks a CUDA device's driver whether the work is over: what [`Event::is_over`] says next. Never waits.
    pub(crate) fn look(&self) {
        if let Some((cuda, ticket)) = self.on_cuda() {
            cuda.look(ticket);
        }
    }

    /// On a CUDA device, has the end of the work noticed: nobody else asks the driver.
    pub(crate) fn watch(&self) {
        if let Some((cuda, ticket)) = self.on_cuda() {
            cuda.watch(ticket);
        }
    }

    /// The stream and the ticket, if a CUDA device's driver knows about them.
    pub(crate) fn on_cuda(&self) -> Option<(&Arc<CudaStream>, u64)> {
        Some((self.lane()?.cuda.as_ref()?, self.ticket))
    }

    /// This event without its runtime: for those whom the runtime itself keeps.
    pub(crate) fn detached(&self) -> Self {
        let point = self.point.as_ref().map(|Point { lane, clock }| {
            let lane = Lane { progress: Arc::clone(&lane.progress), engine: None, cuda: lane.cuda.clone() };
            Point { lane: Arc::new(lane), clock: clock.clone() }
        });
        Self { point, ..*self }
    }

    /// Whether nothing will happen any more: completed or failed. Asks for nothing to be run and tells the host nothing.
    pub(crate) fn is_over(&self) -> bool {
        self.point.as_ref().is_none_or(|point| point.lane.progress.has_passed(self.slot()))
    }

    /// Whether the work has completed without failure; like [`Event::is_over`].
    pub(crate) fn is_complete(&self) -> bool {
        matches!(self.outcome(), Some(Ok(())))
    }

    /// The outcome if it is there, for the host: asks for nothing to be run.
    pub(crate) fn known(&self) -> Option<Outcome> {
        let outcome = self.outcome();
        self.learn(outcome.as_ref());
        outcome
    }

    /// Whether the host knows that the work has completed. Asks for nothing to be run: in chaos mode it knows only what it has
    /// waited for, or asked by [`Event::query`], since what ran by luck must not hide a forgotten wait.
    ///
    /// # Errors
    /// The work's own failure.
    pub fn is_known(&self) -> Result<bool, DeviceError> {
        match self.outcome() {
            None => Ok(false),
            Some(Err(error)) => Err(error),
            Some(Ok(())) => {
                let engine =
                    self.lane().filter(|lane| !lane.progress.is_by_hand()).and_then(|lane| lane.engine.as_ref());
                match engine {
                    Some(engine) if engine.is_chaos() => Ok(engine.host().knows(self.stream, self.ticket)),
                    _ => {
                        self.learn(Some(&Ok(())));
                        Ok(true)
                    }
                }
            }
        }
    }

    pub(crate) fn clock(&self) -> Option<&Clock> {
        self.point.as_ref()?.clock.as_deref()
    }

    pub(crate) fn lane(&self) -> Option<&Lane> {
        self.point.as_ref().map(|point| &*point.lane)
    }

    /// Whether something other than a stream completes it, so that its ticket alone says nothing.
    pub(crate) fn is_by_hand(&self) -> bool {
        self.lane().is_some_and(|lane| lane.progress.is_by_hand())
    }

    fn outcome(&self) -> Option<Outcome> {
        self.point.as_ref().map_or(Some(Ok(())), |point| point.lane.progress.outcome(self.slot()))
    }

    fn learn(&self, outcome: Option<&Outcome>) {
        if let (Some(Ok(())), Some(point)) = (outcome, &self.point)
            && let Some(engine) = &point.lane.engine
        {
            engine.host().learn(self.stream, self.ticket, point.clock.as_deref());
        }
    }

    /// In chaos mode, runs the work before the event; on a CUDA device, asks whether it is over.
    fn drive(&self, patience: Patience) -> Result<(), DeviceError> {
        match &self.point {
            Some(Point { lane, .. }) if lane.cuda.is_some() => {
                self.look();
                Ok(())
            }
            Some(Point { lane, .. }) if !lane.progress.is_by_hand() => match &lane.engine {
                Some(engine) if engine.is_chaos() => engine.drive(&lane.progress, self.ticket, patience),
                _ => Ok(()),
            },
            _ => Ok(()),
        }
    }

    fn want(&self) {
        self.watch();
        if let Some(Point { lane, .. }) = &self.point
            && let Some(engine) = &lane.engine
            && lane.cuda.is_none()
            && !lane.progress.is_by_hand()
        {
            engine.want(&lane.progress, self.ticket);
        }
    }

    /// The ticket of its progress.
    fn slot(&self) -> u64 {
        if self.ticket == 0 && self.is_by_hand() { 1 } else { self.ticket }
    }
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match self.outcome() {
            Some(Ok(())) => "complete",
            None => "pending",
            Some(Err(_)) => "failed",
        };
        write!(f, "Event({:?} at {}, {state})", self.stream, self.ticket)
    }
}

/// Completes an event by hand: see [`Event::token`]. Dropped without doing so, the event fails with [`DeviceError::Cancelled`].
#[must_use = "dropping a token fails its event"]
pub struct Token(Trigger);

impl Token {
    /// The bytes are there.
    pub fn complete(self) {
        self.0.complete(Ok(()));
    }

    /// They will not come: everything that waits for the event fails with `error`.
    pub fn fail(self, error: DeviceError) {
        self.0.complete(Err(error));
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token").finish_non_exhaustive()
    }
}

/// Completes an event. Dropped without doing so, the event is cancelled: no waiter is left behind.
pub(crate) struct Trigger {
    progress: Option<Arc<Progress>>,
    ticket: u64,
}

impl Trigger {
    pub(crate) fn complete(mut self, outcome: Outcome) {
        self.finish(outcome);
    }

    fn finish(&mut self, outcome: Outcome) {
        if let Some(progress) = self.progress.take() {
            progress.advance(self.ticket, outcome).run();
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
    waiter: Waiter,
    /// It was polled before.
    asked: bool,
}

impl EventReady {
    pub(crate) fn event(&self) -> &Event {
        &self.event
    }
}

impl Future for EventReady {
    type Output = Result<(), DeviceError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if let Some(outcome) = self.event.known() {
            return Poll::Ready(outcome);
        }
        let first = !std::mem::replace(&mut self.asked, true);
        let engine = self.event.lane().and_then(|lane| lane.engine.as_ref());
        if first && engine.is_some_and(|engine| engine.yields()) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        if let Err(deadlock) = self.event.drive(Patience::None) {
            return Poll::Ready(Err(deadlock));
        }
        if let Some(outcome) = self.event.known() {
            return Poll::Ready(outcome);
        }
        if let Some(wake) = self.waiter.register(cx.waker()) {
            self.event.on_over(wake);
            self.event.want();
        }
        // The event may have completed between the first look and the waker's arrival in the slot (E3).
        self.event.known().map_or(Poll::Pending, Poll::Ready)
    }
}

impl fmt::Debug for EventReady {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("EventReady").field(&self.event).finish()
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
        let joined = Event::all_at(StreamId::HOST, 2, &[event_a, event_b, Event::complete()], None, None);
        b.complete(Err(DeviceError::BrokenPromise));
        assert!(!joined.query().unwrap(), "one is pending still");
        a.complete(Ok(()));
        assert!(matches!(joined.query(), Err(DeviceError::BrokenPromise)));
    }
}
