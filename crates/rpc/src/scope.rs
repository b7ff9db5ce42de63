//! One call at its callee: whether anybody still waits for its answer, and who must hear of it when nobody does.
//!
//! A call is cancelled by its caller, by the loss of its caller, or by the cancellation of the call that made it.
//! Invariant: what is added to a scope after its cancellation is cancelled at once; nothing is told twice.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::task::Waker;

use crate::call::{Slot, lock};
use crate::link::Sent;

/// See the module.
#[derive(Default)]
pub(crate) struct Scope {
    cancelled: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Of the handler's task.
    waker: Option<Waker>,
    /// Calls that the handler makes, and what was sent of those to peers.
    calls: Vec<(Weak<Slot>, Option<Sent>)>,
}

impl Scope {
    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    /// Nobody waits any more: the handler's task is woken to end, its own calls are cancelled.
    pub(crate) fn cancel(&self) {
        let State { waker, calls } = {
            let mut state = lock(&self.state);
            self.cancelled.store(true, Ordering::Release);
            std::mem::take(&mut *state)
        };
        if let Some(waker) = waker {
            waker.wake();
        }
        for (slot, sent) in calls {
            if let Some(slot) = slot.upgrade() {
                slot.cancel(sent.as_ref());
            }
        }
    }

    /// Leaves the waker of the handler's task; `true` if the call is cancelled already.
    pub(crate) fn register(&self, waker: &Waker) -> bool {
        let mut state = lock(&self.state);
        if !self.is_cancelled() && !state.waker.as_ref().is_some_and(|known| known.will_wake(waker)) {
            let replaced = state.waker.replace(waker.clone());
            drop(state);
            drop(replaced);
        }
        self.is_cancelled()
    }

    /// Has `slot` end with this call.
    pub(crate) fn adopt(&self, slot: &Arc<Slot>, sent: Option<&Sent>) {
        let mut state = lock(&self.state);
        if self.is_cancelled() {
            drop(state);
            return slot.cancel(sent);
        }
        // Those that have ended go whenever the list would grow.
        if state.calls.len() == state.calls.capacity() {
            state.calls.retain(|(call, _)| call.strong_count() > 0);
        }
        state.calls.push((Arc::downgrade(slot), sent.cloned()));
    }
}

impl fmt::Debug for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scope").field("cancelled", &self.is_cancelled()).finish_non_exhaustive()
    }
}
