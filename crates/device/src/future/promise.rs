//! The one producer and the one consumer of a value, and the slot between them.

use std::fmt;
use std::task::{Context, Poll, Waker};

use crate::DeviceError;
use crate::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The producer's end of a [`DeviceFuture`](crate::DeviceFuture). Dropped without a value, the future fails with
/// [`DeviceError::BrokenPromise`].
#[must_use = "dropping a promise fails its future"]
pub struct Promise<T, E = DeviceError> {
    /// Taken by completion.
    slot: Option<Arc<Slot<T, E>>>,
}

/// The consumer's end.
pub(super) struct Receiver<T, E> {
    slot: Arc<Slot<T, E>>,
}

struct Slot<T, E>(Mutex<State<T, E>>);

enum State<T, E> {
    Waiting {
        waker: Option<Waker>,
        on_abandon: Option<Box<dyn FnOnce() + Send>>,
    },
    Complete(Result<T, E>),
    Broken,
    /// The value was taken, or the receiver went away.
    Over,
}

pub(super) fn pair<T, E>() -> (Promise<T, E>, Receiver<T, E>) {
    let slot = Arc::new(Slot(Mutex::new(State::Waiting { waker: None, on_abandon: None })));
    (Promise { slot: Some(Arc::clone(&slot)) }, Receiver { slot })
}

impl<T, E> Promise<T, E> {
    /// Hands the value over. Work that writes its storages must be enqueued and their fences recorded: storages carry them.
    pub fn complete(mut self, value: T) {
        self.finish(State::Complete(Ok(value)));
    }

    /// Fails the future.
    pub fn fail(mut self, error: E) {
        self.finish(State::Complete(Err(error)));
    }

    /// Completes or fails the future.
    pub fn finish_with(mut self, result: Result<T, E>) {
        self.finish(State::Complete(result));
    }

    /// Whether the future was dropped: no one wants the value any more.
    #[must_use]
    pub fn is_abandoned(&self) -> bool {
        self.slot.as_ref().is_some_and(|slot| matches!(*slot.lock(), State::Over))
    }

    /// Calls `callback` when the future is dropped before the value came; at once if it was. Replaces an earlier callback.
    ///
    /// It runs on the thread that drops the future and must not block.
    pub fn on_abandon(&self, callback: impl FnOnce() + Send + 'static) {
        let Some(slot) = &self.slot else { return };
        let mut state = slot.lock();
        match &mut *state {
            State::Waiting { on_abandon, .. } => {
                let replaced = on_abandon.replace(Box::new(callback));
                drop(state);
                drop(replaced);
            }
            State::Over => {
                drop(state);
                callback();
            }
            State::Complete(_) | State::Broken => {}
        }
    }

    fn finish(&mut self, end: State<T, E>) {
        let Some(slot) = self.slot.take() else { return };
        let mut state = slot.lock();
        // What is replaced, or comes too late, is dropped after the lock: dropping runs foreign code.
        if let State::Waiting { .. } = *state {
            let before = std::mem::replace(&mut *state, end);
            drop(state);
            if let State::Waiting { waker: Some(waker), .. } = before {
                waker.wake();
            }
        } else {
            drop(state);
            drop(end);
        }
    }
}

impl<T, E> Drop for Promise<T, E> {
    fn drop(&mut self) {
        self.finish(State::Broken);
    }
}

impl<T, E> fmt::Debug for Promise<T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Promise").field("abandoned", &self.is_abandoned()).finish()
    }
}

impl<T, E> Receiver<T, E> {
    pub(super) fn is_complete(&self) -> bool {
        !matches!(*self.slot.lock(), State::Waiting { .. })
    }

    pub(super) fn poll_value(&mut self, cx: &mut Context<'_>) -> Poll<Result<T, E>>
    where
        E: From<DeviceError>,
    {
        let mut state = self.slot.lock();
        if let State::Waiting { waker, .. } = &mut *state {
            if waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
                return Poll::Pending;
            }
            let replaced = waker.replace(cx.waker().clone());
            drop(state);
            drop(replaced);
            return Poll::Pending;
        }
        let end = std::mem::replace(&mut *state, State::Over);
        drop(state);
        Poll::Ready(match end {
            State::Complete(result) => result,
            _ => Err(DeviceError::BrokenPromise.into()),
        })
    }
}

impl<T, E> Drop for Receiver<T, E> {
    fn drop(&mut self) {
        let before = std::mem::replace(&mut *self.slot.lock(), State::Over);
        if let State::Waiting { on_abandon: Some(callback), .. } = before {
            callback();
        }
    }
}

impl<T, E> Slot<T, E> {
    fn lock(&self) -> MutexGuard<'_, State<T, E>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
