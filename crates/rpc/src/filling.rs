//! Replies whose tensors come into parameters that their caller has.
//!
//! The endpoint asks for places when a reply begins, and bytes of a socket land there; whatever did not is copied once by who
//! waits for the call. Invariant: no parameter is touched before all tensors are known to fit. Invariant: a landing ends with its
//! call, so that nobody waits for a parameter longer than for the call (BOUNDED).

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::Mutex;
use std::task::{Context, Poll, ready};

use farcall_device::{Encoded, Fences, Landing, Layout, Param, StorageMut, Tensor};
use farcall_transport::{Arriving, Placer};

use crate::call::lock;
use crate::error::Misfit;
use crate::{CallError, Reply};

/// Where a reply's tensors go.
pub(crate) struct Targets {
    params: Vec<Param>,
    state: Mutex<State>,
}

enum State {
    /// No byte has come yet.
    Open,
    /// By tensor: those that land in place, or in memory that becomes their parameter's.
    Landing(Vec<Option<Landing>>),
    /// Which have landed.
    Ended(Vec<bool>),
}

impl Targets {
    pub(crate) fn new(params: Vec<Param>) -> Self {
        Self { params, state: Mutex::new(State::Open) }
    }

    fn expect_fit<'a>(&self, layouts: impl ExactSizeIterator<Item = &'a Layout>) -> Result<(), Misfit> {
        let (expected, found) = (self.params.len(), layouts.len());
        if expected != found {
            return Err(Misfit::Count { expected, found });
        }
        for (tensor, (param, layout)) in self.params.iter().zip(layouts).enumerate() {
            param.expect_fit(layout).map_err(|source| Misfit::Tensor { tensor, source })?;
        }
        Ok(())
    }

    /// The call has its outcome: what has landed is the parameters' value, or they are torn. Once; later ones change nothing.
    pub(crate) fn end(&self, value: Option<&Encoded>) {
        let landings = {
            let mut state = lock(&self.state);
            match std::mem::replace(&mut *state, State::Ended(Vec::new())) {
                State::Open => return,
                State::Landing(landings) => landings,
                ended @ State::Ended(_) => {
                    *state = ended;
                    return;
                }
            }
        };
        let Some(Encoded { tensors, .. }) = value else { return drop(landings) };
        let complete = |(landing, tensor): (Option<Landing>, &Tensor)| {
            // Of the landing's own size, as that was compared when it was placed.
            landing.is_some_and(|landing| landing.complete(tensor.storage().clone()).is_ok())
        };
        let landed = landings.into_iter().zip(tensors).map(complete).collect();
        *lock(&self.state) = State::Ended(landed);
    }

    /// Copies what has not landed, once all fits; the value's tensors become the parameters'.
    fn fill(&self, tensors: &mut [Tensor]) -> Result<(), Filled> {
        self.expect_fit(tensors.iter().map(Tensor::layout)).map_err(Filled::Misfit)?;
        let landed = match &*lock(&self.state) {
            State::Ended(landed) => landed.clone(),
            _ => Vec::new(),
        };
        for (index, (param, tensor)) in self.params.iter().zip(tensors).enumerate() {
            if !landed.get(index).is_some_and(|landed| *landed) {
                param.copy_from(tensor).map_err(Filled::Device)?;
            }
            *tensor = param.value();
        }
        Ok(())
    }
}

/// Why parameters were not filled.
enum Filled {
    Misfit(Misfit),
    Device(farcall_device::DeviceError),
}

impl Placer for Targets {
    fn place(&self, tensors: &[Arriving]) -> Vec<Option<StorageMut>> {
        let mut state = lock(&self.state);
        // What does not fit is told to the waiter, when it has come.
        if !matches!(*state, State::Open) || self.expect_fit(tensors.iter().map(|tensor| &tensor.layout)).is_err() {
            return Vec::new();
        }
        let land = |(param, tensor): (&Param, &Arriving)| {
            // On another device, or in another order: copied later.
            tensor.travels.then(|| param.land(&tensor.layout).ok()).flatten()
        };
        let mut landings: Vec<Option<Landing>> = self.params.iter().zip(tensors).map(land).collect();
        let places = landings.iter_mut().map(|landing| landing.as_mut().map(Landing::take_memory)).collect();
        *state = State::Landing(landings);
        places
    }
}

/// A call whose reply's tensors come into parameters: a future of its value, as [`Reply`] is.
///
/// See [`Reply::into_each`] for what holds.
#[must_use = "a call's failure is seen only by waiting for its reply"]
pub struct Filling<T> {
    reply: Reply<T>,
    targets: Arc<Targets>,
}

impl<T> Filling<T> {
    pub(crate) fn new(reply: Reply<T>, targets: Arc<Targets>) -> Self {
        Self { reply, targets }
    }

    /// Whether the reply is there, or the call has failed.
    pub fn is_done(&self) -> bool {
        self.reply.is_done()
    }

    /// Blocks until the parameters have their new values, at most until the call's deadline.
    ///
    /// # Errors
    /// As awaiting it.
    pub fn wait(self) -> Result<T, CallError> {
        let mut encoded = self.reply.wait_encoded()?;
        self.fill(&mut encoded)?;
        Fences::of(&encoded.tensors).block_until(self.reply.slot().deadline)?;
        self.reply.read(&encoded)
    }

    fn fill(&self, encoded: &mut Encoded) -> Result<(), CallError> {
        self.targets.fill(&mut encoded.tensors).map_err(|filled| match filled {
            Filled::Misfit(misfit) => CallError::Misfit { call: self.reply.slot().id.clone(), misfit },
            Filled::Device(error) => error.into(),
        })
    }
}

impl<T> fmt::Debug for Filling<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Filling").field(&self.reply).finish()
    }
}

impl<T> IntoFuture for Filling<T> {
    type Output = Result<T, CallError>;
    type IntoFuture = FillingFuture<T>;

    fn into_future(self) -> FillingFuture<T> {
        FillingFuture { filling: self, filled: None }
    }
}

/// Awaiting a [`Filling`]: resolves when the parameters' new values are complete.
pub struct FillingFuture<T> {
    filling: Filling<T>,
    /// The reply, and what the parameters still wait for.
    filled: Option<(Encoded, Fences)>,
}

impl<T> Unpin for FillingFuture<T> {}

impl<T> Future for FillingFuture<T> {
    type Output = Result<T, CallError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Self { filling, filled } = &mut *self;
        if filled.is_none() {
            let mut encoded = ready!(filling.reply.poll_slot(cx.waker()))?;
            filling.fill(&mut encoded)?;
            let fences = Fences::of(&encoded.tensors);
            *filled = Some((encoded, fences));
        }
        let Some((encoded, fences)) = filled else { unreachable!("filled above") };
        ready!(Pin::new(fences).poll(cx))?;
        Poll::Ready(filling.reply.read(encoded))
    }
}
