//! One call's life on the caller: its slot, and the future that waits for it.
//!
//! Invariant C1: a slot is completed once; what comes later finds it gone. Invariant READY: a [`Reply`] resolves when
//! every storage of the value is complete; with [`Reply::on`], when the stream waits for them.

use std::cell::RefCell;
use std::fmt;
use std::future::Future;
use std::ops::Deref;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use farcall_device::codec::decode;
use farcall_device::{DeviceFuture, Encoded, Fences, Param, Ready, Storages, Stream};
use farcall_schema::{FromValue, Value, ValueError};
use farcall_transport::{Corrupt, Digests, Endpoint, is_forked_child};
use serde::de::DeserializeOwned;

use crate::agent::Inner;
use crate::error::Stage;
use crate::filling::{Filling, Targets};
use crate::link::{Sent, reached};
use crate::scope::Scope;
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
    /// It took its place on the wire.
    sent: AtomicBool,
    /// Its tensors, and those of its value, are sent with digests.
    wants_digests: AtomicBool,
    /// What the value's tensors are compared with, by who waits.
    digests: Mutex<Option<Digests>>,
    /// This worker.
    here: OnceLock<Arc<str>>,
    /// Of a call to this worker itself, once it is in a table.
    local: OnceLock<Here>,
    /// Where the reply's tensors go, if the caller has said so.
    targets: OnceLock<Arc<Targets>>,
    state: Mutex<State>,
    /// `state` waits no more.
    done: AtomicBool,
    parked: Condvar,
}

thread_local! {
    /// Slots that this thread has done with.
    static SPARE: RefCell<Vec<Arc<Slot>>> = const { RefCell::new(Vec::new()) };
}

/// How many slots a thread keeps: a burst of calls allocates once.
const SPARE_MAX: usize = 2048;

/// A waiter's hold on a slot: the last one lets this thread use it again.
pub(crate) struct Held(Option<Arc<Slot>>);

impl Held {
    pub(crate) fn slot(&self) -> &Arc<Slot> {
        match &self.0 {
            Some(slot) => slot,
            None => unreachable!("taken when it is dropped"),
        }
    }
}

impl Deref for Held {
    type Target = Slot;

    fn deref(&self) -> &Slot {
        self.slot()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let Some(mut slot) = self.0.take() else { return };
        // Whoever completes it may hold it still: then it goes with them.
        let Some(last) = Arc::get_mut(&mut slot) else { return };
        // What it holds is dropped now, before the list is borrowed.
        last.clear();
        let _ = SPARE.try_with(|spare| {
            if let Ok(mut spare) = spare.try_borrow_mut()
                && spare.len() < SPARE_MAX
            {
                spare.push(slot);
            }
        });
    }
}

/// Who works on a call to this worker itself, and under which number.
pub(crate) struct Here {
    pub(crate) agent: Weak<Inner>,
    pub(crate) scope: Arc<Scope>,
    pub(crate) call: u64,
}

impl Slot {
    pub(crate) fn new(id: &CallId, signature: &'static str, after: Duration, now: Instant) -> Arc<Self> {
        Self::of(&id.worker, id.function, signature, after, now)
    }

    /// The slot of a call of `function` on `worker`.
    pub(crate) fn of(
        worker: &Arc<str>,
        function: &'static str,
        signature: &'static str,
        after: Duration,
        now: Instant,
    ) -> Arc<Self> {
        let after = after.min(DEADLINE_MAX);
        let deadline = now + after;
        // A thread that ends has none.
        let spare = SPARE.try_with(|spare| spare.try_borrow_mut().ok()?.pop()).ok().flatten();
        if let Some(mut spare) = spare
            && let Some(slot) = Arc::get_mut(&mut spare)
        {
            // Often it is the same as the last time.
            if !Arc::ptr_eq(&slot.id.worker, worker) {
                slot.id.worker = Arc::clone(worker);
            }
            (slot.id.function, slot.signature, slot.after, slot.deadline) = (function, signature, after, deadline);
            return spare;
        }
        let id = CallId { worker: Arc::clone(worker), function };
        Arc::new(Self {
            id,
            signature,
            after,
            deadline,
            sent: AtomicBool::new(false),
            wants_digests: AtomicBool::new(false),
            digests: Mutex::default(),
            here: OnceLock::new(),
            local: OnceLock::new(),
            targets: OnceLock::new(),
            state: Mutex::new(State::Waiting(None)),
            done: AtomicBool::new(false),
            parked: Condvar::new(),
        })
    }

    /// As new, but for its call.
    fn clear(&mut self) {
        self.sent = AtomicBool::new(false);
        self.wants_digests = AtomicBool::new(false);
        *self.digests.get_mut().unwrap_or_else(PoisonError::into_inner) = None;
        self.here.take();
        self.local.take();
        self.targets.take();
        *self.state.get_mut().unwrap_or_else(PoisonError::into_inner) = State::Waiting(None);
        self.done = AtomicBool::new(false);
    }

    pub(crate) fn made_at(&self) -> Instant {
        self.deadline - self.after
    }

    pub(crate) fn set_sent(&self) {
        self.sent.store(true, Ordering::Relaxed);
    }

    /// Has digests sent with its tensors and its value's; `here` is this worker's name.
    pub(crate) fn ask_digests(&self, here: &Arc<str>) {
        // Once, before it is sent.
        let _ = self.here.set(Arc::clone(here));
        self.wants_digests.store(true, Ordering::Relaxed);
    }

    pub(crate) fn wants_digests(&self) -> bool {
        self.wants_digests.load(Ordering::Relaxed)
    }

    /// Before the value is there.
    pub(crate) fn compare_with(&self, digests: Digests) {
        *lock(&self.digests) = Some(digests);
    }

    pub(crate) fn corrupt(&self, corrupt: Corrupt) -> CallError {
        let Corrupt { tensor, start, end } = corrupt;
        let at = self.here.get().map_or_else(|| "this worker".into(), Arc::clone);
        CallError::Corrupt { call: self.id.clone(), tensor, bytes: start..end, at }
    }

    /// The outcome as it is given: with its bytes compared.
    fn compared(&self, outcome: Result<Encoded, CallError>) -> Result<Encoded, CallError> {
        if !self.wants_digests() {
            return outcome;
        }
        let digests = lock(&self.digests).take();
        let encoded = outcome?;
        match digests.map_or(Ok(()), |digests| digests.compare()) {
            Ok(()) => Ok(encoded),
            Err(corrupt) => Err(self.corrupt(corrupt)),
        }
    }

    /// How far the call has come, on an endpoint that has come to `reached`.
    fn stage(&self, reached: Stage) -> Stage {
        if reached == Stage::Waiting && !self.sent.load(Ordering::Relaxed) { Stage::Queued } else { reached }
    }

    pub(crate) fn targets(&self) -> Option<&Arc<Targets>> {
        self.targets.get()
    }

    /// From now on; a reply that begins before goes there once it has come.
    fn set_targets(&self, targets: Arc<Targets>) {
        // A reply is given targets once: that takes it.
        let _ = self.targets.set(targets);
    }

    pub(crate) fn set_here(&self, here: Here) {
        // A call is made once.
        let _ = self.local.set(here);
    }

    /// Sets the outcome and wakes the waiter; `false` if there is an outcome already (C1).
    pub(crate) fn complete(&self, outcome: Result<Encoded, CallError>) -> bool {
        if let Some(targets) = self.targets() {
            // Before the waiter wakes; without this slot's lock, as others may wait for the parameters.
            targets.end(outcome.as_ref().ok());
        }
        let mut state = lock(&self.state);
        if !state.is_waiting() {
            return false;
        }
        let before = std::mem::replace(&mut *state, State::Done(outcome));
        self.done.store(true, Ordering::Release);
        drop(state);
        match before {
            State::Waiting(Some(waker)) => waker.wake(),
            State::Parked => self.parked.notify_one(),
            _ => {}
        }
        true
    }

    /// Nobody waits for the value any more: whoever works on it is told, of a call to a peer by what it was `sent`. Nothing, if
    /// there is an outcome.
    pub(crate) fn cancel(&self, sent: Option<&Sent>) {
        if is_forked_child() || (self.is_done() && self.targets().is_none()) {
            return;
        }
        if !self.complete(Err(CallError::Cancelled { call: self.id.clone() })) {
            return;
        }
        if let Some(Sent { connection, call }) = sent {
            connection.link.abandon(&connection.endpoint, *call);
        }
        if let Some(Here { agent, call, .. }) = self.local.get() {
            if let Some(agent) = agent.upgrade() {
                let slot = lock(&agent.local).remove(*call);
                drop(slot);
            }
            self.stop_handler();
        }
    }

    /// Cancels the handler of a call to oneself.
    pub(crate) fn stop_handler(&self) {
        if let Some(Here { scope, .. }) = self.local.get() {
            scope.cancel();
        }
    }

    pub(crate) fn expire(&self, reached: Stage) {
        let stage = self.stage(reached);
        let _ = self.complete(Err(CallError::Deadline { call: self.id.clone(), after: self.after, stage }));
    }

    pub(crate) fn is_done(&self) -> bool {
        self.done.load(Ordering::Acquire)
    }

    fn is_failed(&self) -> bool {
        matches!(*lock(&self.state), State::Done(Err(_)))
    }

    pub(crate) fn poll(&self, waker: &Waker) -> Poll<Result<Encoded, CallError>> {
        if is_forked_child() {
            return Poll::Ready(Err(CallError::ForkedProcess { call: self.id.clone() }));
        }
        let mut state = lock(&self.state);
        match &mut *state {
            State::Waiting(old) => {
                if !old.as_ref().is_some_and(|old| old.will_wake(waker)) {
                    *old = Some(waker.clone());
                }
                Poll::Pending
            }
            State::Done(_) => match std::mem::replace(&mut *state, State::Taken) {
                State::Done(outcome) => {
                    drop(state);
                    Poll::Ready(self.compared(outcome))
                }
                _ => unreachable!("matched above"),
            },
            State::Parked | State::Taken => unreachable!("a reply has one waiter, and resolves once"),
        }
    }

    /// Sleeps until the outcome is there, at most until the deadline.
    fn park(&self, reached: impl Fn() -> Stage) -> Result<Encoded, CallError> {
        let mut state = lock(&self.state);
        while state.is_waiting() {
            *state = State::Parked;
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                *state = State::Taken;
                self.done.store(true, Ordering::Release);
                let stage = self.stage(reached());
                return Err(CallError::Deadline { call: self.id.clone(), after: self.after, stage });
            }
            state = match self.parked.wait_timeout(state, left) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        match std::mem::replace(&mut *state, State::Taken) {
            State::Done(outcome) => {
                drop(state);
                self.compared(outcome)
            }
            _ => unreachable!("a reply waited for after it resolved"),
        }
    }
}

/// A call that was sent: a future of its value.
///
/// Awaited, it resolves when every storage of the value is complete; [`Reply::on`] hands the value over as soon as it
/// is ordered on a stream; [`Reply::wait`] blocks the thread and reads the connection itself, which is the fastest way
/// to wait for one call.
/// # Cancel safety
/// Dropping it cancels the call: one that was not sent is not, a handler that did not start does not, an async handler is
/// dropped at its next `.await`, and calls that they made by [`Call::to`](crate::Call::to) are cancelled, too. A sync handler
/// that runs is only told. [`Reply::detach`] lets the call go on.
#[must_use = "a call's failure is seen only by waiting for its reply"]
pub struct Reply<T> {
    slot: Held,
    /// Of a call to a peer.
    sent: Option<Sent>,
    detached: bool,
    read: Reader<T>,
}

/// Makes a reply's bytes and tensors a value; an error's text says why not.
type Reader<T> = fn(&Encoded) -> Result<T, String>;

impl<T> Drop for Reply<T> {
    fn drop(&mut self) {
        if !self.detached {
            self.slot.cancel(self.sent.as_ref());
        }
    }
}

impl<T> fmt::Debug for Reply<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reply").field("call", &self.slot.id).field("done", &self.slot.is_done()).finish()
    }
}

impl<T> Reply<T> {
    pub(crate) fn new(slot: Arc<Slot>, sent: Option<Sent>) -> Self
    where
        T: DeserializeOwned,
    {
        let read = |encoded: &Encoded| decode(&encoded.metadata, &encoded.tensors).map_err(|error| error.to_string());
        Self { slot: Held(Some(slot)), sent, detached: false, read }
    }

    /// A reply whose value travels as a [`Value`].
    pub(crate) fn of_value(slot: Arc<Slot>, sent: Option<Sent>) -> Self
    where
        T: FromValue,
    {
        let read = |encoded: &Encoded| {
            let value: Value = decode(&encoded.metadata, &encoded.tensors).map_err(|error| error.to_string())?;
            value.to().map_err(|error: ValueError| error.to_string())
        };
        Self { slot: Held(Some(slot)), sent, detached: false, read }
    }

    /// Polls for the outcome; who has to wait for it waits for no other call to leave.
    pub(crate) fn poll_slot(&self, waker: &Waker) -> Poll<Result<Encoded, CallError>> {
        let polled = self.slot.poll(waker);
        if let (Poll::Pending, Some(endpoint)) = (&polled, self.endpoint()) {
            endpoint.flush_gathered();
        }
        polled
    }

    fn endpoint(&self) -> Option<&Arc<Endpoint>> {
        self.sent.as_ref().map(|sent| &sent.connection.endpoint)
    }

    /// The worker that was called, by its name.
    pub fn worker(&self) -> &Arc<str> {
        &self.slot.id.worker
    }

    /// Has the reply's tensor come into memory that is there: `param`'s, where nobody reads it. See [`Reply::into_each`].
    ///
    /// ```no_run
    /// # use farcall_device::{Param, Tensor};
    /// # use farcall_rpc::{Agent, CallError, Function};
    /// # async fn example<F>(agent: &Agent, fetch: F, weights: &Param) -> Result<(), CallError>
    /// # where F: Function<Args = (String,), Output = Tensor> {
    /// agent.to("w0").call(fetch, ("encoder.0.weight",)).into(weights).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn into(self, param: &Param) -> Filling<T> {
        self.into_each(std::slice::from_ref(param))
    }

    /// Has the reply's tensors, in the order in which its value names them, come into `params`, as many as there are.
    ///
    /// They are all compared with the parameters first: one of another dtype or shape, or another number of them, is
    /// [`CallError::Misfit`], and no parameter is touched. Each value then is written in place, unless somebody holds it
    /// ([`Param::value`]) or its bytes lie in no memory of this worker: then memory from the pool becomes the parameter's.
    /// Tensors of any device go to where the parameters are, on a stream behind the fences of both. The value of the call holds
    /// the parameters' new values: dropped, it does not keep the next write from being in place.
    ///
    /// # Errors
    /// [`CallError::Misfit`], else as for the reply. After an error each parameter has its old value, or its new one as a whole, or
    /// is *torn*: bytes of a socket had begun to land in it, and did not all come. Each use of a torn value is
    /// [`DeviceError::Torn`](farcall_device::DeviceError::Torn), until it is received, copied or written whole.
    /// # Cancel safety
    /// As of the reply; a parameter whose bytes were on their way is torn. Until a value that lands in place is there, or the call
    /// has ended, [`Param::value`] and steps on it wait: never ask in an inline handler.
    /// # Cost
    /// Bytes of a socket land in the parameter's memory, if they are in row-major order and it is on the host; it is too late for
    /// that if the reply has begun before `into` was called. Tensors of slabs and of this worker itself are copied once, by whoever
    /// waits.
    pub fn into_each(self, params: &[Param]) -> Filling<T> {
        let targets = Arc::new(Targets::new(params.to_vec()));
        self.slot.set_targets(Arc::clone(&targets));
        if self.slot.is_failed() {
            // It failed before anybody was told of the targets.
            targets.end(None);
        }
        Filling::new(self, targets)
    }

    /// Lets the call go on without a waiter: its value and its failure are nobody's. One that was made by
    /// [`Call::to`](crate::Call::to) still ends with the call in whose name it was made.
    pub fn detach(mut self) {
        self.detached = true;
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
        let value = self.read(&encoded);
        encoded.recycle();
        value
    }

    pub(crate) fn wait_encoded(&self) -> Result<Encoded, CallError> {
        if is_forked_child() {
            // Whoever was to bring the reply is a thread of the parent.
            return Err(CallError::ForkedProcess { call: self.slot.id.clone() });
        }
        if self.slot.is_done() {
            return self.slot.park(|| Stage::Waiting);
        }
        // A handler that waits here leaves its place to another, which may be the one that it waits for.
        match (self.endpoint(), self.slot.local.get()) {
            (Some(endpoint), _) => endpoint.driver().blocking(|| self.sleep()),
            (None, Some(Here { agent, .. })) => match agent.upgrade() {
                Some(agent) => agent.driver.blocking(|| self.sleep()),
                None => self.sleep(),
            },
            _ => self.sleep(),
        }
    }

    fn sleep(&self) -> Result<Encoded, CallError> {
        if let Some(endpoint) = self.endpoint() {
            endpoint.drive_until(&|| self.slot.is_done(), self.slot.deadline);
        }
        self.slot.park(|| self.endpoint().map_or(Stage::Waiting, |endpoint| reached(endpoint)))
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
        let Encoded { metadata, tensors } = std::future::poll_fn(|cx| self.poll_slot(cx.waker())).await?;
        let tensors = Ready::new(tensors).on_each(streams);
        self.read(&Encoded { metadata, tensors })
    }

    /// The reply as a [`DeviceFuture`], to map, share, join or order later.
    pub fn future(self) -> DeviceFuture<T, CallError>
    where
        T: Storages + Send + 'static,
    {
        DeviceFuture::from_future(async move {
            let encoded = std::future::poll_fn(|cx| self.poll_slot(cx.waker())).await?;
            self.read(&encoded)
        })
    }

    pub(crate) fn slot(&self) -> &Arc<Slot> {
        self.slot.slot()
    }

    pub(crate) fn read(&self, encoded: &Encoded) -> Result<T, CallError> {
        (self.read)(encoded).map_err(|message| CallError::BadReply { call: self.slot.id.clone(), message })
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

impl<T> IntoFuture for Reply<T> {
    type Output = Result<T, CallError>;
    type IntoFuture = ReplyFuture<T>;
    fn into_future(self) -> ReplyFuture<T> {
        ReplyFuture { reply: self, state: ReadyState::Call }
    }
}

impl<T> Unpin for ReplyFuture<T> {}

impl<T> Future for ReplyFuture<T> {
    type Output = Result<T, CallError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        loop {
            match &mut this.state {
                ReadyState::Call => match this.reply.poll_slot(cx.waker()) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                    Poll::Ready(Ok(encoded)) => {
                        let fences = Fences::of(&encoded.tensors);
                        this.state = ReadyState::Storages(encoded, fences);
                    }
                },
                ReadyState::Storages(encoded, fences) => {
                    std::task::ready!(Pin::new(fences).poll(cx))?;
                    let value = this.reply.read(encoded);
                    std::mem::take(encoded).recycle();
                    return Poll::Ready(value);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use farcall_device::Tensor;
    use farcall_transport::digests;

    use super::*;

    fn slot(after: Duration) -> Arc<Slot> {
        Slot::of(&"w1".into(), "f", "()", after, Instant::now())
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

    /// Neither a thread nor a task that waits is given bytes that are not those that were sent.
    #[test]
    fn a_value_that_was_changed_on_its_way_is_given_to_nobody() {
        let tensor = |byte: u8| Tensor::full(byte, &[100_000]).unwrap();
        let sent = digests(&[tensor(1)]).unwrap().remove(0);
        for (byte, waits) in [(1, true), (1, false), (2, true), (2, false)] {
            let slot = slot(Duration::from_secs(5));
            slot.ask_digests(&"w0".into());
            slot.compare_with(Digests::new(true, vec![(3, tensor(byte), sent.clone())]));
            slot.complete(Ok(empty()));
            let outcome = if waits {
                slot.park(|| Stage::Waiting)
            } else {
                match slot.poll(Waker::noop()) {
                    Poll::Ready(outcome) => outcome,
                    Poll::Pending => panic!("it is there"),
                }
            };
            match outcome {
                Ok(_) => assert_eq!(byte, 1),
                Err(error) => {
                    let text = "f on w1: bytes 0 to 65536 of tensor 3 were changed on their way to w0";
                    assert_eq!((byte, error.to_string().as_str()), (2, text));
                }
            }
        }
    }

    #[test]
    fn waiting_is_bounded_by_the_deadline() {
        assert!(matches!(slot(Duration::ZERO).park(|| Stage::Waiting), Err(CallError::Deadline { .. })));
    }
}
