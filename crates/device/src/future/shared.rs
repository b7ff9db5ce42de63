//! One future, many waiters.
//!
//! Whichever waiter is polled drives the inner future, outside the lock; the others leave a waker.
//! Invariant: a wake that comes while a waiter drives makes it drive again, so that none is lost.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use super::{DeviceFuture, Storages, block_on};
use crate::DeviceError;
use crate::sync::{Mutex, MutexGuard, PoisonError};

/// A [`DeviceFuture`] for any number of waiters, each of which gets a clone of the value. Ready has the same meaning.
#[must_use = "a future does nothing until it is awaited"]
pub struct SharedFuture<T, E = DeviceError> {
    hub: Arc<Hub<T, E>>,
    /// This waiter's waker in the hub.
    key: Option<u64>,
}

struct Hub<T, E>(Mutex<State<T, E>>);

struct State<T, E> {
    stage: Stage<T, E>,
    wakers: Vec<(u64, Waker)>,
    next_key: u64,
}

enum Stage<T, E> {
    Idle(DeviceFuture<T, E>),
    /// A waiter has taken the future out to poll it; `again` if it must poll once more before it stops.
    Driven {
        again: bool,
    },
    Done(Arc<Result<T, E>>),
}

impl<T, E> SharedFuture<T, E> {
    pub(super) fn new(future: DeviceFuture<T, E>) -> Self {
        let state = State { stage: Stage::Idle(future), wakers: Vec::new(), next_key: 0 };
        Self { hub: Arc::new(Hub(Mutex::new(state))), key: None }
    }
}

impl<T, E> SharedFuture<T, E>
where
    T: Storages + Clone + Send + Sync + 'static,
    E: From<DeviceError> + Clone + Send + Sync + 'static,
{
    /// Blocks this thread until the value is ready, at most for `timeout`. May be called again.
    ///
    /// # Errors
    /// [`DeviceError::Timeout`], or the producer's failure.
    pub fn wait(&self, timeout: Duration) -> Result<T, E> {
        block_on(self.clone(), timeout)
    }
}

impl<T, E> Clone for SharedFuture<T, E> {
    fn clone(&self) -> Self {
        Self { hub: Arc::clone(&self.hub), key: None }
    }
}

impl<T, E> Future for SharedFuture<T, E>
where
    T: Storages + Clone + Send + Sync + 'static,
    E: From<DeviceError> + Clone + Send + Sync + 'static,
{
    type Output = Result<T, E>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let hub = Arc::clone(&self.hub);
        let mut state = hub.lock();
        if !matches!(state.stage, Stage::Done(_)) {
            let (key, replaced) = state.store(self.key, cx.waker().clone());
            drop(state);
            drop(replaced);
            self.key = Some(key);
            drive(&hub, key);
            state = hub.lock();
        }
        let Stage::Done(result) = &state.stage else { return Poll::Pending };
        let result = Arc::clone(result);
        drop(state);
        Poll::Ready((*result).clone())
    }
}

/// Polls the inner future until it is done, or pending with no wake since.
fn drive<T, E>(hub: &Arc<Hub<T, E>>, key: u64)
where
    T: Storages + Send + Sync + 'static,
    E: From<DeviceError> + Send + Sync + 'static,
{
    let mut state = hub.lock();
    let mut future = match std::mem::replace(&mut state.stage, Stage::Driven { again: false }) {
        Stage::Idle(future) => future,
        Stage::Driven { .. } => {
            // The driver may be about to stop: its next poll covers ours.
            state.stage = Stage::Driven { again: true };
            return;
        }
        done @ Stage::Done(_) => {
            state.stage = done;
            return;
        }
    };
    drop(state);
    // If the poll panics, the other waiters must not wait for ever.
    let finish = Finish { hub, key };
    let waker = Waker::from(Arc::clone(hub));
    loop {
        let polled = Pin::new(&mut future).poll(&mut Context::from_waker(&waker));
        let mut state = hub.lock();
        match polled {
            Poll::Ready(result) => {
                state.stage = Stage::Done(Arc::new(result));
                break;
            }
            Poll::Pending if matches!(state.stage, Stage::Driven { again: true }) => {
                state.stage = Stage::Driven { again: false };
            }
            Poll::Pending => {
                state.stage = Stage::Idle(future);
                drop(state);
                std::mem::forget(finish);
                return;
            }
        }
    }
    drop(finish);
}

/// Ends the driving: wakes the other waiters, with a broken promise if there is no result.
struct Finish<'a, T, E: From<DeviceError>> {
    hub: &'a Hub<T, E>,
    /// The waiter that drives.
    key: u64,
}

impl<T, E: From<DeviceError>> Drop for Finish<'_, T, E> {
    fn drop(&mut self) {
        let mut state = self.hub.lock();
        if !matches!(state.stage, Stage::Done(_)) {
            state.stage = Stage::Done(Arc::new(Err(DeviceError::BrokenPromise.into())));
        }
        let wakers = std::mem::take(&mut state.wakers);
        drop(state);
        for (_, waker) in wakers.into_iter().filter(|(key, _)| *key != self.key) {
            waker.wake();
        }
    }
}

impl<T: Send + Sync + 'static, E: Send + Sync + 'static> Wake for Hub<T, E> {
    fn wake(self: Arc<Self>) {
        let mut state = self.lock();
        if let Stage::Driven { again } = &mut state.stage {
            *again = true;
            return;
        }
        // Any waiter can drive; all are woken, since one that was dropped meanwhile would drive nothing.
        let wakers = std::mem::take(&mut state.wakers);
        drop(state);
        for (_, waker) in wakers {
            waker.wake();
        }
    }
}

impl<T, E> Hub<T, E> {
    fn lock(&self) -> MutexGuard<'_, State<T, E>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T, E> State<T, E> {
    /// Stores a waiter's newest waker; returns its key and the waker that was replaced.
    fn store(&mut self, key: Option<u64>, waker: Waker) -> (u64, Option<Waker>) {
        let key = key.unwrap_or_else(|| {
            self.next_key += 1;
            self.next_key
        });
        if let Some((_, slot)) = self.wakers.iter_mut().find(|(other, _)| *other == key) {
            return (key, Some(std::mem::replace(slot, waker)));
        }
        self.wakers.push((key, waker));
        (key, None)
    }
}

impl<T, E> Drop for SharedFuture<T, E> {
    fn drop(&mut self) {
        let Some(key) = self.key else { return };
        let mut state = self.hub.lock();
        let at = state.wakers.iter().position(|(other, _)| *other == key);
        let removed = at.map(|at| state.wakers.swap_remove(at));
        drop(state);
        drop(removed);
    }
}

impl<T, E> fmt::Debug for SharedFuture<T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let done = matches!(self.hub.lock().stage, Stage::Done(_));
        f.debug_struct("SharedFuture").field("done", &done).finish()
    }
}
