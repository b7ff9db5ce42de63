//! Requests of a peer at their callee: which are worked on, where a handler runs, and its one answer.
//!
//! Invariant: a request is answered once, whatever becomes of its handler, unless its endpoint has closed.
//! Invariant LIMITS: what a request takes of its peer's share is given back before its answer leaves.

use std::collections::{BTreeMap, BTreeSet};
use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use farcall_device::Encoded;
use farcall_device::codec::recycle;
use farcall_transport::frame::Kind;
use farcall_transport::{
    Endpoint, Job, Outbound, ProtocolError, Staged, TransferError, Turn, Unanswered, digests, stage,
};

use crate::call::lock;
use crate::context::Call;
use crate::error::Failure;
use crate::function::{AnswerFuture, HandlerKind, SyncHandler};
use crate::registry::Registered;
use crate::scope::Scope;
use crate::sim::Census;

/// The calls of the peer that are worked on here, without those of inline handlers: they are answered where they are read.
#[derive(Default)]
pub(crate) struct Serving(Mutex<Served>);

#[derive(Default)]
struct Served {
    /// In order, so that a simulation cancels them in the same order each time.
    open: BTreeMap<u64, Arc<Scope>>,
    /// Cancelled while their payload was on its way.
    cancelled_early: BTreeSet<u64>,
    /// The endpoint has closed: nobody waits for any answer.
    closed: bool,
}

impl Serving {
    /// A request has come: the scope of its handler.
    fn begin(&self, call: u64) -> Result<Arc<Scope>, ProtocolError> {
        let mut served = lock(&self.0);
        let scope = Arc::new(Scope::default());
        if served.open.insert(call, Arc::clone(&scope)).is_some() {
            let message = format!("call {call} was made twice");
            return Err(ProtocolError::Malformed { what: "request", message });
        }
        if served.closed {
            scope.cancel();
        }
        Ok(scope)
    }

    /// A request has come; gives whether it was cancelled on its way.
    pub(crate) fn on_request(&self, call: u64, untaken: usize, max: usize) -> Result<bool, ProtocolError> {
        let mut served = lock(&self.0);
        let unanswered = served.open.len() + untaken;
        if unanswered >= max {
            let (found, max) = (unanswered as u64 + 1, max as u64);
            return Err(ProtocolError::Limit { what: "unanswered requests", found, max });
        }
        Ok(served.cancelled_early.remove(&call))
    }

    fn end(&self, call: u64) {
        let scope = lock(&self.0).open.remove(&call);
        drop(scope);
    }

    /// Nobody waits for that call: not begun, it will not be; an async handler ends. Its payload may still be on its way, if
    /// `is_receiving` says so.
    pub(crate) fn cancel(&self, call: u64, is_receiving: impl FnOnce() -> bool) {
        let scope = {
            let mut served = lock(&self.0);
            let scope = served.open.get(&call).cloned();
            if scope.is_none() && is_receiving() {
                served.cancelled_early.insert(call);
            }
            scope
        };
        // Answered meanwhile, if there is none: the two have crossed.
        if let Some(scope) = scope {
            scope.cancel();
        }
    }

    /// The endpoint has closed: nobody waits for the answers, and the handlers need not go on.
    pub(crate) fn close(&self) {
        let scopes = {
            let mut served = lock(&self.0);
            served.closed = true;
            std::mem::take(&mut served.open)
        };
        scopes.values().for_each(|scope| scope.cancel());
    }

    /// Adds what is worked on here.
    pub(crate) fn count(&self, census: &mut Census) {
        let served = lock(&self.0);
        census.serving += served.open.len();
        census.serving_max = census.serving_max.max(served.open.len());
        census.cancelled_early += served.cancelled_early.len();
    }
}

/// Runs a handler where its kind belongs: inline, on the pool, or on the runtime; `reply` gets its answer.
pub(crate) fn run<R>(registered: Arc<Registered>, cx: Call, encoded: Encoded, turn: &mut Turn, reply: R)
where
    R: FnOnce(Result<Encoded, Failure>, Option<&mut Turn>) + Send + 'static,
{
    match &registered.handler.0 {
        HandlerKind::Sync(handler) if registered.inline => {
            let answer = handle(handler, &cx, encoded);
            reply(answer, Some(turn));
        }
        HandlerKind::Sync(_) => turn.spawn(Job::new(&Arc::clone(&registered.cost), move |turn| {
            if cx.is_cancelled() {
                return reply(Err(Failure::Cancelled), Some(turn));
            }
            let HandlerKind::Sync(handler) = &registered.handler.0 else { unreachable!("matched above") };
            let answer = handle(handler, &cx, encoded);
            reply(answer, Some(turn));
        })),
        HandlerKind::Future(_) => turn.spawn(Job::new(&Arc::clone(&registered.cost), move |turn| {
            let HandlerKind::Future(handler) = &registered.handler.0 else { unreachable!("matched above") };
            let runtime = match cx.agent().async_runtime() {
                Ok(runtime) => runtime,
                Err(message) => return reply(Err(Failure::Panicked { message }), Some(turn)),
            };
            if cx.is_cancelled() {
                return reply(Err(Failure::Cancelled), Some(turn));
            }
            let scope = cx.scope.clone();
            // The handler's first statements may use the runtime, too.
            let entered = runtime.enter();
            let mut future = handler(cx, encoded);
            // Many a handler never waits: it needs no task. Polled again by its task, it registers the right waker.
            let first = future.as_mut().poll(&mut Context::from_waker(Waker::noop()));
            drop(entered);
            match first {
                Poll::Ready(answer) => reply(answer, Some(turn)),
                Poll::Pending => runtime.spawn(async move { reply(unless_cancelled(future, scope).await, None) }),
            }
        })),
    }
}

fn handle(handler: &SyncHandler, cx: &Call, encoded: Encoded) -> Result<Encoded, Failure> {
    let Encoded { metadata, tensors } = encoded;
    let answer = handler(cx, &metadata, tensors);
    recycle(metadata);
    answer
}

/// The future's answer, unless the call is cancelled: then the future is dropped.
async fn unless_cancelled(future: AnswerFuture, scope: Option<Arc<Scope>>) -> Result<Encoded, Failure> {
    let mut future = Some(future);
    poll_fn(|cx| {
        let cancelled = scope.as_ref().is_some_and(|scope| scope.register(cx.waker()));
        match &mut future {
            Some(running) if !cancelled => running.as_mut().poll(cx),
            _ => {
                // Its own calls hear of it by its end, if not by the scope.
                let ended = catch_unwind(AssertUnwindSafe(|| drop(future.take())));
                if ended.is_err() {
                    farcall_transport::limited!(error, "a handler panicked while it was cancelled");
                }
                Poll::Ready(Err(Failure::Cancelled))
            }
        }
    })
    .await
}

/// The one answer to a request.
pub(crate) struct ReplyTo {
    endpoint: Arc<Endpoint>,
    call: u64,
    answered: bool,
    unanswered: Unanswered,
    /// Where the call is listed while it is worked on.
    serving: Option<Arc<Serving>>,
    /// Its caller asks for digests of the value's tensors.
    digests: bool,
}

impl Drop for ReplyTo {
    /// A handler's task that ends with its runtime answers nothing: its caller hears of that now, not at its deadline.
    fn drop(&mut self) {
        if !self.answered {
            self.send_failure(&Failure::Reply { message: "the handler was dropped before it ended".to_owned() }, None);
        }
    }
}

impl ReplyTo {
    /// Gives back what the request took of its peer's share; with `digests` of the value's tensors, if its caller asked.
    pub(crate) fn new(endpoint: &Arc<Endpoint>, call: u64, unanswered: Unanswered, digests: bool) -> Self {
        Self { endpoint: Arc::clone(endpoint), call, answered: false, unanswered, serving: None, digests }
    }

    /// Lists the call as worked on, until its answer leaves; the scope of its handler.
    pub(crate) fn list(&mut self, serving: &Arc<Serving>) -> Result<Arc<Scope>, ProtocolError> {
        let scope = serving.begin(self.call)?;
        self.serving = Some(Arc::clone(serving));
        Ok(scope)
    }

    /// Sends the answer, a value once its tensors are ready.
    pub(crate) fn send(mut self, answer: Result<Encoded, Failure>, turn: Option<&mut Turn>) {
        let Encoded { metadata, tensors } = match answer {
            Ok(encoded) => encoded,
            Err(failure) => {
                self.answered = true;
                return self.send_failure(&failure, turn);
            }
        };
        let endpoint = &self.endpoint;
        let config = endpoint.driver().config();
        let (runtime, inline) = (&config.runtime, config.limits.inline_bytes_max);
        match stage(runtime, tensors, endpoint.lends(), !self.digests, inline, |tensor| endpoint.is_peers(tensor)) {
            Ok(staged) if staged.pending.is_empty() => {
                self.send_value(&metadata, &staged, turn);
                Encoded { metadata, tensors: staged.tensors }.recycle();
            }
            Ok(mut staged) => {
                let pending = std::mem::take(&mut staged.pending);
                pending.on_ready(move |ready| match ready {
                    Ok(()) => self.send_value(&metadata, &staged, None),
                    Err(error) => self.send_unsent(&error),
                });
            }
            Err(error) => self.send_unsent(&error),
        }
    }

    fn send_value(mut self, metadata: &[u8], staged: &Staged, turn: Option<&mut Turn>) {
        let digests = match self.digests.then(|| digests(&staged.tensors)).transpose() {
            Ok(digests) => digests,
            Err(error) => return self.send_unsent(&error),
        };
        let outbound = Outbound {
            call: self.call,
            tensors: &staged.tensors,
            devices: &staged.devices,
            digests: digests.as_deref(),
            lands: staged.lands,
            ..Outbound::new(Kind::Reply, metadata)
        };
        match self.send_frame(&outbound, turn) {
            Ok(()) | Err(TransferError::Closed { .. }) => self.answered = true,
            Err(error) => self.send_unsent(&error),
        }
    }

    /// The value cannot be sent, for this reason.
    pub(crate) fn send_unsent(mut self, error: &dyn std::error::Error) {
        self.answered = true;
        self.send_failure(&Failure::Reply { message: error.to_string() }, None);
    }

    fn send_failure(&mut self, failure: &Failure, turn: Option<&mut Turn>) {
        let metadata = match postcard::to_stdvec(failure) {
            Ok(metadata) => metadata,
            Err(error) => unreachable!("plain enums always encode: {error}"),
        };
        let outbound = Outbound { call: self.call, ..Outbound::new(Kind::Error, &metadata) };
        match self.send_frame(&outbound, turn) {
            Ok(()) | Err(TransferError::Closed { .. }) => {}
            // A text longer than a frame may be: the caller gets the short form.
            Err(error) => {
                let short = Failure::Reply { message: format!("its error could not be sent: {error}") };
                if let Ok(metadata) = postcard::to_stdvec(&short) {
                    let outbound = Outbound { call: self.call, ..Outbound::new(Kind::Error, &metadata) };
                    drop(self.send_frame(&outbound, None));
                }
            }
        }
    }

    fn send_frame(&mut self, outbound: &Outbound<'_>, turn: Option<&mut Turn>) -> Result<(), TransferError> {
        // Before the answer leaves: its caller may fill the place at once.
        drop(std::mem::take(&mut self.unanswered));
        if let Some(serving) = self.serving.take() {
            serving.end(self.call);
        }
        match turn {
            Some(turn) => self.endpoint.send_in(outbound, turn),
            None => self.endpoint.send(outbound),
        }
    }
}
