//! What a handler knows of the call it serves. Arguments of the request, never thread-locals.

use std::sync::Arc;
use std::time::{Duration, Instant};

use farcall_device::{Device, DeviceError, Stream};
use farcall_transport::WorkerId;

use crate::Agent;

/// The call a handler serves: who called, until when, and streams to work on.
#[derive(Clone, Debug)]
pub struct Call {
    pub(crate) agent: Agent,
    pub(crate) caller: Arc<WorkerId>,
    pub(crate) function: &'static str,
    pub(crate) deadline: Option<Instant>,
}

impl Call {
    /// The worker that called.
    pub fn caller(&self) -> &WorkerId {
        &self.caller
    }

    /// This worker's agent, for calls of its own.
    pub fn agent(&self) -> &Agent {
        &self.agent
    }

    /// The name under which the function was called.
    pub fn function(&self) -> &'static str {
        self.function
    }

    /// How long the caller still waits; `None` for as long as it takes.
    pub fn remaining(&self) -> Option<Duration> {
        self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()))
    }

    /// A stream of `device`, on which the tensors among the arguments are ready.
    ///
    /// # Errors
    /// [`DeviceError::Unavailable`] if this worker has no such device.
    pub fn stream(&self, device: Device) -> Result<Stream, DeviceError> {
        self.agent.runtime().stream(device)
    }
}
