//! One call's life on the caller: its slot in the table of its endpoint, and the future that waits for it.
//!
//! Invariant C1: a slot is completed once; what comes later finds it gone. Invariant C2: every slot in a table has a
//! deadline, and ends by its reply, its deadline or its endpoint's close. Invariant READY: a [`Reply`] resolves when
//! every storage of the value is complete; with [`Reply::on`], when the stream waits for them.

use std::fmt;
use std::future::Future;
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use farcall_device::codec::decode;
use farcall_device::{DeviceFuture, Encoded, Fences, Ready, Storages, Stream};
use farcall_transport::Endpoint;
use serde::de::DeserializeOwned;

use crate::error::Stage;
use crate::link::reached;
use crate::{CallError, CallId};

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Longer deadlines mean this one: a bound (BOUNDED), and far from where clocks overflow.
const DEADLINE_MAX: Duration = Duration::from_secs(365 * 24 * 3600);

enum State {
    Waiting(Option<Waker>),
    /// As `Waiting`, with a thread in [`Slot::park`].
    Parked,
    Done(Result<Encoded, CallError>),
    Taken,
}

impl State {
    fn is_waiting(&self) -> bool {
        matches!(self, Self::Waiting(_) | Self::Parked)
    }
}

/// Where a call's outcome arrives.
pub(crate) struct Slot {
    pub(crate) id: CallId,
    pub(crate) signature: &'static str,
    pub(crate) after: Duration,
    pub(crate) deadline: Instant,
    state: Mutex<State>,
    parked: Condvar,
}

impl Slot {
    pub(crate) fn new(id: CallId, signature: &'static str, after: Duration) -> Arc<Self> {
        let after = after.min(DEADLINE_MAX);
        let deadline = Instant::now() + after;
        Arc::new(Self {
            id,
            signature,
            after,
            deadline,
            state: Mutex::new(State::Waiting(None)),
            parked: Condvar::new(),
        })
    }

    /// Sets the outcome, unless there is one (C1), and wakes the waiter.
    pub(crate) fn complete(&self, outcome: Result<Encoded, CallError>) {
        let mut state = lock(&self.state);
        if !state.is_waiting() {
            return;
        }
        let before = std::mem::replace(&mut *state, State::Done(outcome));
        drop(state);
        match before {
            State::Waiting(Some(waker)) => waker.wake(),
            State::Parked => self.parked.notify_one(),
            _ => {}
        }
    }

    pub(crate) fn expire(&self, stage: Stage) {
        self.complete(Err(CallError::Deadline { call: self.id.clone(), after: self.after, stage }));
    }

    pub(crate) fn is_done(&self) -> bool {
        !lock(&self.state).is_waiting()
    }

    fn poll(&self, waker: &Waker) -> Poll<Result<Encoded, CallError>> {
        let mut state = lock(&self.state);
        match &mut *state {
            State::Waiting(old) => {
                if !old.as_ref().is_some_and(|old| old.will_wake(waker)) {
                    *old = Some(waker.clone());
                }
                Poll::Pending
            }
            State::Done(_) => match std::mem::replace(&mut *state, State::Taken) {
                State::Done(outcome) => Poll::Ready(outcome),
                _ => unreachable!("matched above"),
            },
            State::Parked | State::Taken => unreachable!("a reply has one waiter, and resolves once"),
        }
    }

    /// Sleeps until the outcome is there, at most until the deadline.
    fn park(&self, stage: impl Fn() -> Stage) -> Result<Encoded, CallError> {
        let mut state = lock(&self.state);
        while state.is_waiting() {
            *state = State::Parked;
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                *state = State::Taken;
                return Err(CallError::Deadline { call: self.id.clone(), after: self.after, stage: stage() });
            }
            state = match self.parked.wait_timeout(state, left) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        match std::mem::replace(&mut *state, State::Taken) {
            State::Done(outcome) => outcome,
            _ => unreachable!("a reply waited for after it resolved"),
        }
    }
}

/// The calls that wait for replies on one endpoint.
///
/// An id is an index and a generation, so that a reply that comes after its call's end meets no other call.
#[derive(Default)]
pub(crate) struct CallTable {
    entries: Vec<(u32, Option<Arc<Slot>>)>,
    free: Vec<u32>,
}

impl CallTable {
    pub(crate) fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    pub(crate) fn insert(&mut self, slot: Arc<Slot>) -> u64 {
        let index = self.free.pop().unwrap_or_else(|| {
            self.entries.push((0, None));
            (self.entries.len() - 1) as u32
        });
        let (generation, entry) = &mut self.entries[index as usize];
        *entry = Some(slot);
        u64::from(*generation) << 32 | u64::from(index)
    }

    pub(crate) fn remove(&mut self, call: u64) -> Option<Arc<Slot>> {
        let (generation, entry) = self.entries.get_mut(call as u32 as usize)?;
        if u64::from(*generation) != call >> 32 {
            return None;
        }
        let slot = entry.take()?;
        *generation = generation.wrapping_add(1);
        self.free.push(call as u32);
        Some(slot)
    }

    /// Takes the calls whose deadline has passed; gives the next deadline (C2).
    pub(crate) fn take_overdue(&mut self, now: Instant) -> (Vec<Arc<Slot>>, Option<Instant>) {
        let mut overdue = Vec::new();
        let mut next: Option<Instant> = None;
        for index in 0..self.entries.len() {
            let (generation, Some(slot)) = &self.entries[index] else { continue };
            let deadline = slot.deadline;
            if deadline <= now {
                let call = u64::from(*generation) << 32 | index as u64;
                overdue.extend(self.remove(call));
            } else {
                next = Some(next.map_or(deadline, |next| next.min(deadline)));
            }
        }
        (overdue, next)
    }

    pub(crate) fn take_all(&mut self) -> Vec<Arc<Slot>> {
        let slots = self.entries.iter_mut().filter_map(|(_, slot)| slot.take()).collect();
        self.entries.clear();
        self.free.clear();
        slots
    }
}

/// A call that was sent: a future of its value.
///
/// Awaited, it resolves when every storage of the value is complete; [`Reply::on`] hands the value over as soon as it
/// is ordered on a stream; [`Reply::wait`] blocks the thread and reads the connection itself, which is the fastest way
/// to wait for one call.
/// # Cancel safety
/// Dropping it abandons the value; the handler runs on. Nothing else is lost.
#[must_use = "a call's failure is seen only by waiting for its reply"]
pub struct Reply<T> {
    slot: Arc<Slot>,
    endpoint: Option<Arc<Endpoint>>,
    value: PhantomData<fn() -> T>,
}

impl<T> fmt::Debug for Reply<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reply").field("call", &self.slot.id).field("done", &self.slot.is_done()).finish()
    }
}

impl<T: DeserializeOwned> Reply<T> {
    pub(crate) fn new(slot: Arc<Slot>, endpoint: Option<Arc<Endpoint>>) -> Self {
        Self { slot, endpoint, value: PhantomData }
    }

    /// Whether waiting would return at once.
    pub fn is_done(&self) -> bool {
        self.slot.is_done()
    }

    /// Blocks until the value is ready, at most until the call's deadline.
    ///
    /// # Errors
    /// As awaiting it: see [`CallError`].
    pub fn wait(self) -> Result<T, CallError> {
        let encoded = self.wait_encoded()?;
        Fences::of(&encoded.tensors).block_until(self.slot.deadline)?;
        self.read(&encoded)
    }

    fn wait_encoded(&self) -> Result<Encoded, CallError> {
        if let Some(endpoint) = &self.endpoint {
            endpoint.drive_until(&|| self.slot.is_done(), self.slot.deadline);
        }
        self.slot.park(|| self.endpoint.as_ref().map_or(Stage::Waiting, |endpoint| reached(endpoint)))
    }

    /// The value as soon as it can be ordered on `stream`: that stream waits for its storages, no thread does.
    ///
    /// # Errors
    /// As awaiting it: see [`CallError`].
    pub async fn on(self, stream: &Stream) -> Result<T, CallError> {
        self.on_each(std::slice::from_ref(stream)).await
    }

    /// As [`Reply::on`] for values on several devices: each storage is ordered on the streams of its device, or on all of
    /// `streams` if none is its device's.
    ///
    /// # Errors
    /// As awaiting it: see [`CallError`].
    pub async fn on_each(self, streams: &[Stream]) -> Result<T, CallError> {
        let Encoded { metadata, tensors } = std::future::poll_fn(|cx| self.slot.poll(cx.waker())).await?;
        let tensors = Ready::new(tensors).on_each(streams);
        self.read(&Encoded { metadata, tensors })
    }

    /// The reply as a [`DeviceFuture`], to map, share, join or order later.
    pub fn future(self) -> DeviceFuture<T, CallError>
    where
        T: Storages + Send + 'static,
    {
        DeviceFuture::from_future(async move {
            let encoded = std::future::poll_fn(|cx| self.slot.poll(cx.waker())).await?;
            self.read(&encoded)
        })
    }

    fn read(&self, encoded: &Encoded) -> Result<T, CallError> {
        decode(&encoded.metadata, &encoded.tensors)
            .map_err(|error| CallError::BadReply { call: self.slot.id.clone(), message: error.to_string() })
    }
}

/// Awaiting: [`Reply`] resolves when the value's storages are complete.
pub struct ReplyFuture<T> {
    reply: Reply<T>,
    state: ReadyState,
}

enum ReadyState {
    Call,
    /// The reply, and what its storages still wait for.
    Storages(Encoded, Fences),
}

impl<T: DeserializeOwned> IntoFuture for Reply<T> {
    type Output = Result<T, CallError>;
    type IntoFuture = ReplyFuture<T>;
    fn into_future(self) -> ReplyFuture<T> {
        ReplyFuture { reply: self, state: ReadyState::Call }
    }
}

impl<T> Unpin for ReplyFuture<T> {}

impl<T: DeserializeOwned> Future for ReplyFuture<T> {
    type Output = Result<T, CallError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        loop {
            match &mut this.state {
                ReadyState::Call => match this.reply.slot.poll(cx.waker()) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                    Poll::Ready(Ok(encoded)) => {
                        let fences = Fences::of(&encoded.tensors);
                        this.state = ReadyState::Storages(encoded, fences);
                    }
                },
                ReadyState::Storages(encoded, fences) => {
                    std::task::ready!(Pin::new(fences).poll(cx))?;
                    return Poll::Ready(this.reply.read(encoded));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(after: Duration) -> Arc<Slot> {
        Slot::new(CallId { worker: "w1".into(), function: "f" }, "()", after)
    }

    fn empty() -> Encoded {
        Encoded { metadata: Vec::new(), tensors: Vec::new() }
    }

    /// C1: the first outcome stays.
    #[test]
    fn a_slot_is_completed_once() {
        let slot = slot(Duration::from_secs(5));
        slot.expire(Stage::Waiting);
        slot.complete(Ok(empty()));
        assert!(matches!(slot.park(|| Stage::Waiting), Err(CallError::Deadline { .. })));
    }

    #[test]
    fn a_late_reply_meets_no_later_call() {
        let mut table = CallTable::default();
        let first = table.insert(slot(Duration::from_secs(5)));
        assert!(table.remove(first).is_some());
        let second = table.insert(slot(Duration::from_secs(5)));
        assert_eq!(first as u32, second as u32, "the index is used again");
        assert!(table.remove(first).is_none());
        assert!(table.remove(u64::MAX).is_none());
        assert_eq!(table.len(), 1);
    }

    /// C2: the overdue ones are taken, the next deadline is that of the earliest left.
    #[test]
    fn overdue_calls_are_taken_and_the_next_deadline_is_known() {
        let mut table = CallTable::default();
        let slots: Vec<_> = [3_u64, 1, 2].map(|secs| slot(Duration::from_secs(secs))).into();
        for slot in &slots {
            table.insert(Arc::clone(slot));
        }
        let (overdue, next) = table.take_overdue(slots[1].deadline);
        assert!(overdue.len() == 1 && Arc::ptr_eq(&overdue[0], &slots[1]));
        assert_eq!(next, Some(slots[2].deadline));
        assert_eq!(table.take_all().len(), 2);
    }

    #[test]
    fn waiting_is_bounded_by_the_deadline() {
        assert!(matches!(slot(Duration::ZERO).park(|| Stage::Waiting), Err(CallError::Deadline { .. })));
    }
}
