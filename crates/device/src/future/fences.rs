//! The waits for a value's storages: of the host, and of streams.
//!
//! Every such wait of this workspace is made here, so that mutants can leave each of them out once.

use std::fmt;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Instant;

use super::Storages;
use crate::event::EventReady;
use crate::{DeviceError, Event, Storage, Stream};

/// The fences of a value that the host does not know to be complete: a future of its readiness, without the value.
///
/// # Cancel safety
/// Dropping it changes nothing; the work goes on.
#[must_use = "a future does nothing until it is awaited"]
#[derive(Default)]
pub struct Fences(Vec<EventReady>);

impl Fences {
    /// The fences of `value`. Takes memory only for those that are pending.
    pub fn of(value: &impl Storages) -> Self {
        let mut fences = Vec::new();
        value.visit(&mut |storage| {
            let event = storage.ready_event();
            // A failed fence is kept too: its poll gives the error.
            if !matches!(event.known(), Some(Ok(()))) && keeps_wait(storage) {
                fences.push(event.host_ready());
            }
        });
        Self(fences)
    }

    /// Whether nothing is pending.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Blocks this thread until all are complete, at most until `deadline`.
    ///
    /// # Errors
    /// [`DeviceError::Timeout`], or the failure of the work behind one of them.
    pub fn block_until(self, deadline: Instant) -> Result<(), DeviceError> {
        let left = || deadline.saturating_duration_since(Instant::now());
        self.0.iter().try_for_each(|fence| fence.event().block(left()))
    }

    /// Calls `then` once, when all are complete or one has failed: under no lock, on the thread that learns of it. It must be
    /// short and must not block.
    pub fn on_ready(self, then: impl FnOnce(Result<(), DeviceError>) + Send + 'static) {
        if self.0.is_empty() {
            return then(Ok(()));
        }
        let left = Arc::new(AtomicUsize::new(self.0.len()));
        let then = Arc::new(Mutex::new(Some(then)));
        let events: Vec<Event> = self.0.iter().map(|fence| fence.event().clone()).collect();
        for event in events {
            let (left, then) = (Arc::clone(&left), Arc::clone(&then));
            event.on_ready(move |outcome| {
                let last = left.fetch_sub(1, Ordering::AcqRel) == 1;
                if last || outcome.is_err() {
                    // The first failure takes it; the others find it gone.
                    let then = then.lock().unwrap_or_else(PoisonError::into_inner).take();
                    if let Some(then) = then {
                        then(outcome);
                    }
                }
            });
        }
    }
}

impl Future for Fences {
    type Output = Result<(), DeviceError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        while let Some(fence) = self.0.last_mut() {
            std::task::ready!(Pin::new(fence).poll(cx))?;
            self.0.pop();
        }
        Poll::Ready(Ok(()))
    }
}

impl fmt::Debug for Fences {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Fences").field(&self.0).finish()
    }
}

/// Has `streams` wait for the value's fences, and notes them as its readers.
pub(super) fn order(value: &impl Storages, streams: &[Stream]) {
    value.visit(&mut |storage| {
        let own = |stream: &&Stream| stream.device() == storage.device();
        let any_own = streams.len() > 1 && streams.iter().any(|stream| own(&stream));
        for stream in streams.iter().filter(|stream| !any_own || own(stream)) {
            stream.wait_for(storage);
            storage.record_reader(stream);
        }
    });
}

/// A mutant leaves one wait of the host out.
fn keeps_wait(storage: &Storage) -> bool {
    let engine = storage.ready_event().lane().and_then(|lane| lane.engine.as_ref());
    engine.is_none_or(|engine| engine.keeps_edge())
}
