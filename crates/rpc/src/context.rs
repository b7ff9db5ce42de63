//! What a handler knows of the call it serves. Arguments of the request, never thread-locals.

use std::sync::Arc;
use std::time::{Duration, Instant};

use farcall_device::{Device, DeviceError, Stream};
use farcall_transport::WorkerId;

use crate::scope::Scope;
use crate::{Agent, Target, To, ToAll};

/// The call a handler serves: who called, until when, and streams to work on.
#[derive(Clone, Debug)]
pub struct Call {
    pub(crate) agent: Agent,
    pub(crate) caller: Arc<WorkerId>,
    pub(crate) function: &'static str,
    pub(crate) deadline: Option<Instant>,
    /// `None` for inline handlers, which end before anybody could cancel them.
    pub(crate) scope: Option<Arc<Scope>>,
}

impl Call {
    /// The worker that called.
    pub fn caller(&self) -> &WorkerId {
        &self.caller
    }

    /// Chooses a worker to call in the name of this call: what is left of its deadline bounds the new call's, and with it that
    /// one is cancelled, too.
    pub fn to<'a>(&'a self, worker: impl Into<Target<'a>>) -> To<'a> {
        self.agent.to(worker).within(self)
    }

    /// As [`Call::to`], for several workers at once: see [`Agent::to_all`].
    pub fn to_all<'a, W: Into<Target<'a>>>(&'a self, workers: impl IntoIterator<Item = W>) -> ToAll<'a> {
        ToAll::new(workers.into_iter().map(|worker| self.to(worker)).collect())
    }

    /// Whether nobody waits for the value any more: the caller has dropped the reply's future, or is gone, or its deadline has
    /// passed. An async handler is dropped then, at its next `.await`; a sync one that computes for long should ask.
    pub fn is_cancelled(&self) -> bool {
        self.scope.as_ref().is_some_and(|scope| scope.is_cancelled())
    }

    /// This worker's agent, for calls that go on whatever becomes of this one.
    pub fn agent(&self) -> &Agent {
        &self.agent
    }

    /// The name under which the function was called.
    pub fn function(&self) -> &'static str {
        self.function
    }

    /// How long the caller still waits; `None` for as long as it takes.
    pub fn remaining(&self) -> Option<Duration> {
        self.deadline.map(|deadline| deadline.saturating_duration_since(self.agent.inner().driver.now()))
    }

    /// A stream of `device`, on which the tensors among the arguments are ready.
    ///
    /// # Errors
    /// [`DeviceError::Unavailable`] if this worker has no such device.
    pub fn stream(&self, device: Device) -> Result<Stream, DeviceError> {
        self.agent.runtime().stream(device)
    }
}
