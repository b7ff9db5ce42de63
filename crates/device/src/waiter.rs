//! Where one waiter leaves its newest waker for the callback that will wake it.
//!
//! Invariant E3: after [`Waiter::register`] the waiter looks once more; whoever completes the event then either finds the waker
//! in the slot, or was early enough for that look to see it.

use std::task::Waker;

use crate::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A waiter's end of the slot. Dropped, it takes the waker back: the task it would wake need not run.
#[derive(Default)]
pub(crate) struct Waiter(Option<Arc<Slot>>);

struct Slot(Mutex<Option<Waker>>);

impl Waiter {
    /// Leaves `waker` in the slot. The first time it gives the callback to call when the event is over.
    pub(crate) fn register(&mut self, waker: &Waker) -> Option<impl FnOnce() + Send + 'static> {
        let Some(slot) = &self.0 else {
            let slot = Arc::new(Slot(Mutex::new(Some(waker.clone()))));
            self.0 = Some(Arc::clone(&slot));
            return Some(move || {
                let waker = slot.lock().take();
                if let Some(waker) = waker {
                    waker.wake();
                }
            });
        };
        let mut kept = slot.lock();
        if !kept.as_ref().is_some_and(|kept| kept.will_wake(waker)) {
            let replaced = kept.replace(waker.clone());
            // Dropping a waker may run a task's destructor: not under the lock.
            drop(kept);
            drop(replaced);
        }
        None
    }
}

impl Slot {
    fn lock(&self) -> MutexGuard<'_, Option<Waker>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        if let Some(slot) = &self.0 {
            let waker = slot.lock().take();
            drop(waker);
        }
    }
}
