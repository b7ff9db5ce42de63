//! One call at its callee: whether anybody still waits for its answer, and who must hear of it when nobody does.
//!
//! A call is cancelled by its caller, by the loss of its caller, or by the cancellation of the call that made it.
//! Invariant: what is added to a scope after its cancellation is cancelled at once; nothing is told twice.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::task::Waker;

use crate::call::{Slot, lock};
use crate::link::{Connection, Sent};

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
    /// Calls that the handler makes; most have ended.
    calls: Vec<Adopted>,
}

/// A call that a handler makes.
struct Adopted {
    slot: Weak<Slot>,
    /// Of a call to a peer: where it was sent, and its number there.
    to: Option<Weak<Connection>>,
    call: u64,
}

impl Adopted {
    fn cancel(&self) {
        let Some(slot) = self.slot.upgrade() else { return };
        let connection = self.to.as_ref().and_then(Weak::upgrade);
        slot.cancel(connection.map(|connection| Sent { connection, call: self.call }).as_ref());
    }
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
        calls.iter().for_each(Adopted::cancel);
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
            state.calls.retain(|call| call.slot.strong_count() > 0);
        }
        state.calls.push(Adopted {
            slot: Arc::downgrade(slot),
            to: sent.map(|sent| Arc::downgrade(&sent.connection)),
            call: sent.map_or(0, |sent| sent.call),
        });
    }
}

impl fmt::Debug for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scope").field("cancelled", &self.is_cancelled()).finish_non_exhaustive()
    }
}
