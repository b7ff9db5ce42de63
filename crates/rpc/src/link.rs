//! One endpoint as the agent sees it: the calls that wait on it, and the functions its peer has announced.

use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use farcall_device::Encoded;
use farcall_transport::frame::Kind;
use farcall_transport::{
    CloseCause, Endpoint, Frame, Job, Outbound, Peer, ProtocolError, Staged, TransferError, Turn, WorkerId, stage,
};
use serde::{Deserialize, Serialize};

use crate::agent::{Agent, Inner, Interned};
use crate::call::{CallTable, Slot, lock};
use crate::context::Call;
use crate::device_map::{DeviceMap, place};
use crate::error::{Failure, Stage};
use crate::function::HandlerKind;
use crate::registry::{Registered, Registry};
use crate::{CallError, CallId};

/// Functions one peer may announce on one connection.
const FUNCTIONS_MAX: usize = 1 << 16;
/// Calls that may wait for one peer.
const CALLS_MAX: usize = 1 << 16;

/// Metadata of a Function frame.
#[derive(Serialize, Deserialize)]
pub(crate) struct Announcement<'a> {
    pub(crate) name: &'a str,
    pub(crate) signature: &'a str,
}

/// What a peer's interned id stands for here: a function, or what its callers are told.
type Target = Result<Arc<Registered>, Failure>;

/// See the module.
pub(crate) struct Link {
    agent: Weak<Inner>,
    worker: Arc<WorkerId>,
    devices: DeviceMap,
    calls: Mutex<CallTable>,
    functions: Mutex<Vec<Option<Target>>>,
}

impl Link {
    pub(crate) fn new(agent: &Weak<Inner>, worker: WorkerId) -> Arc<Self> {
        Arc::new(Self {
            agent: Weak::clone(agent),
            devices: agent.upgrade().map(|agent| agent.device_map(&worker.name)).unwrap_or_default(),
            worker: Arc::new(worker),
            calls: Mutex::default(),
            functions: Mutex::default(),
        })
    }

    /// Calls that wait for a reply.
    pub(crate) fn in_flight(&self) -> usize {
        lock(&self.calls).len()
    }

    /// Sends a request once its tensors are ready; its outcome, a failure to send included, arrives in `slot`.
    ///
    /// FENCE: a call whose tensors are not ready waits here, before it takes a place on the wire, and delays no later call.
    pub(crate) fn request(
        self: &Arc<Self>,
        endpoint: &Arc<Endpoint>,
        slot: &Arc<Slot>,
        function: &Arc<Interned>,
        encoded: Encoded,
    ) {
        let Encoded { metadata, tensors } = encoded;
        let mut staged = match stage(&endpoint.driver().config().runtime, tensors) {
            Ok(staged) => staged,
            Err(error) => return slot.complete(Err(error.into())),
        };
        for device in &mut staged.devices {
            let Some(there) = self.devices.there(*device) else {
                let (call, map) = (slot.id.clone(), self.devices.clone());
                return slot.complete(Err(CallError::Unmapped { call, device: *device, map }));
            };
            *device = there;
        }
        let call = {
            let mut calls = lock(&self.calls);
            let in_flight = calls.len();
            if in_flight >= CALLS_MAX {
                return slot.complete(Err(CallError::Overloaded { call: slot.id.clone(), in_flight }));
            }
            calls.insert(Arc::clone(slot))
        };
        endpoint.driver().schedule(slot.deadline);
        if staged.pending.is_empty() {
            return self.send_request(endpoint, slot, function, call, &metadata, &staged);
        }
        let (link, endpoint) = (Arc::clone(self), Arc::clone(endpoint));
        let (slot, function) = (Arc::clone(slot), Arc::clone(function));
        let pending = std::mem::take(&mut staged.pending);
        pending.on_ready(move |ready| match ready {
            Ok(()) if !slot.is_done() => link.send_request(&endpoint, &slot, &function, call, &metadata, &staged),
            // Its deadline passed, or the endpoint closed.
            Ok(()) => {}
            Err(error) => {
                lock(&link.calls).remove(call);
                slot.complete(Err(error.into()));
            }
        });
    }

    fn send_request(
        &self,
        endpoint: &Arc<Endpoint>,
        slot: &Arc<Slot>,
        function: &Interned,
        call: u64,
        metadata: &[u8],
        staged: &Staged,
    ) {
        let left = slot.deadline.saturating_duration_since(Instant::now());
        let request = Outbound {
            kind: Kind::Request,
            call,
            function: function.id,
            deadline_us: u64::try_from(left.as_micros()).unwrap_or(u64::MAX).max(1),
            metadata,
            tensors: &staged.tensors,
            devices: &staged.devices,
        };
        if let Err(error) = endpoint.send_to_function(&request, &function.announcement) {
            // Its close may have taken the slot already; a slot is completed once.
            lock(&self.calls).remove(call);
            slot.complete(Err(send_error(&slot.id, endpoint, error)));
        }
        if let Some(cause) = endpoint.closed() {
            // Closed between the insertion and now: `on_closed` may have run before it.
            lock(&self.calls).remove(call);
            slot.complete(Err(lost(&slot.id, endpoint, cause)));
        }
    }

    fn on_announcement(&self, frame: &Frame) -> Result<(), ProtocolError> {
        let malformed = |message: String| ProtocolError::Malformed { what: "function announcement", message };
        let announced: Announcement<'_> =
            postcard::from_bytes(&frame.metadata).map_err(|error| malformed(error.to_string()))?;
        let index = frame.function as usize;
        if index >= FUNCTIONS_MAX {
            return Err(malformed(format!("function id {index} of at most {FUNCTIONS_MAX}")));
        }
        let Some(agent) = self.agent.upgrade() else { return Ok(()) };
        let target = resolve(&agent.registry, &announced);
        let mut functions = lock(&self.functions);
        if functions.len() <= index {
            functions.resize(index + 1, None);
        }
        functions[index] = Some(target);
        Ok(())
    }

    fn on_request(&self, endpoint: &Arc<Endpoint>, mut frame: Frame, turn: &mut Turn) -> Result<(), ProtocolError> {
        let Some(target) = lock(&self.functions).get(frame.function as usize).cloned().flatten() else {
            let message = format!("request for function id {}, which was not announced", frame.function);
            return Err(ProtocolError::Malformed { what: "request", message });
        };
        let reply = ReplyTo { endpoint: Arc::clone(endpoint), call: frame.call, answered: false };
        let Some(agent) = self.agent.upgrade() else { return Ok(()) };
        let registered = match target {
            Ok(registered) => registered,
            Err(failure) => {
                reply.send(Err(failure), Some(turn));
                return Ok(());
            }
        };
        if let Err(message) = place(&agent.driver.config().runtime, &mut frame.tensors, &frame.devices) {
            reply.send(Err(Failure::BadArguments { message }), Some(turn));
            return Ok(());
        }
        let cx = Call {
            agent: Agent::from_inner(agent),
            caller: Arc::clone(&self.worker),
            function: registered.name,
            deadline: (frame.deadline_us > 0).then(|| Instant::now() + Duration::from_micros(frame.deadline_us)),
        };
        let encoded = Encoded { metadata: frame.metadata, tensors: frame.tensors };
        run(registered, cx, encoded, turn, move |answer, turn| reply.send(answer, turn));
        Ok(())
    }

    /// Puts a result's tensors where the map's inverse says.
    fn place_result(&self, endpoint: &Endpoint, frame: &mut Frame) -> Result<(), String> {
        for device in &mut frame.devices {
            let unmapped =
                || format!("{device} of {} stands for no device here; the map is: {}", self.worker, self.devices);
            *device = self.devices.here(*device).ok_or_else(unmapped)?;
        }
        place(&endpoint.driver().config().runtime, &mut frame.tensors, &frame.devices)
    }

    fn on_answer(&self, endpoint: &Endpoint, mut frame: Frame) -> Result<(), ProtocolError> {
        // Gone: its deadline passed. The late answer is nobody's.
        let Some(slot) = lock(&self.calls).remove(frame.call) else { return Ok(()) };
        let outcome = if let Err(message) = self.place_result(endpoint, &mut frame) {
            Err(CallError::BadReply { call: slot.id.clone(), message })
        } else if frame.kind == Kind::Reply {
            Ok(Encoded { metadata: frame.metadata, tensors: frame.tensors })
        } else {
            match postcard::from_bytes::<Failure>(&frame.metadata) {
                Ok(failure) => Err(call_error(&slot, failure)),
                Err(error) => Err(CallError::BadReply { call: slot.id.clone(), message: error.to_string() }),
            }
        };
        slot.complete(outcome);
        Ok(())
    }
}

/// The function of that name, if it is registered here with that signature.
pub(crate) fn resolve(registry: &Registry, announced: &Announcement<'_>) -> Result<Arc<Registered>, Failure> {
    let Some(registered) = registry.find(announced.name) else {
        return Err(Failure::UnknownFunction { nearest: registry.nearest(announced.name).map(str::to_owned) });
    };
    if registered.signature != announced.signature {
        return Err(Failure::Signature { callee: registered.signature.to_owned() });
    }
    Ok(Arc::clone(registered))
}

/// Runs a handler where its kind belongs: inline, on the pool, or on the runtime; `reply` gets its answer.
pub(crate) fn run<R>(registered: Arc<Registered>, cx: Call, encoded: Encoded, turn: &mut Turn, reply: R)
where
    R: FnOnce(Result<Encoded, Failure>, Option<&mut Turn>) + Send + 'static,
{
    match &registered.handler.0 {
        HandlerKind::Sync(handler) if registered.inline => {
            let answer = handler(&cx, encoded);
            reply(answer, Some(turn));
        }
        HandlerKind::Sync(_) => turn.spawn(Job::new(&Arc::clone(&registered.cost), move |turn| {
            let HandlerKind::Sync(handler) = &registered.handler.0 else { unreachable!("matched above") };
            let answer = handler(&cx, encoded);
            reply(answer, Some(turn));
        })),
        HandlerKind::Future(_) => turn.spawn(Job::new(&Arc::clone(&registered.cost), move |turn| {
            let HandlerKind::Future(handler) = &registered.handler.0 else { unreachable!("matched above") };
            let runtime = match cx.agent().async_runtime() {
                Ok(runtime) => runtime,
                Err(message) => return reply(Err(Failure::Panicked { message }), Some(turn)),
            };
            // The handler's first statements may use the runtime, too.
            let entered = runtime.enter();
            let mut future = handler(cx, encoded);
            // Many a handler never waits: it needs no task. Polled again by its task, it registers the right waker.
            let first = future.as_mut().poll(&mut Context::from_waker(Waker::noop()));
            drop(entered);
            match first {
                Poll::Ready(answer) => reply(answer, Some(turn)),
                Poll::Pending => drop(runtime.spawn(async move { reply(future.await, None) })),
            }
        })),
    }
}

/// The one answer to a request.
struct ReplyTo {
    endpoint: Arc<Endpoint>,
    call: u64,
    answered: bool,
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
    /// Sends the answer, a value once its tensors are ready.
    fn send(mut self, answer: Result<Encoded, Failure>, turn: Option<&mut Turn>) {
        let Encoded { metadata, tensors } = match answer {
            Ok(encoded) => encoded,
            Err(failure) => {
                self.answered = true;
                return self.send_failure(&failure, turn);
            }
        };
        match stage(&self.endpoint.driver().config().runtime, tensors) {
            Ok(staged) if staged.pending.is_empty() => self.send_value(&metadata, &staged, turn),
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
        let outbound = Outbound {
            call: self.call,
            tensors: &staged.tensors,
            devices: &staged.devices,
            ..Outbound::new(Kind::Reply, metadata)
        };
        match self.send_frame(&outbound, turn) {
            Ok(()) | Err(TransferError::Closed { .. }) => self.answered = true,
            Err(error) => self.send_unsent(&error),
        }
    }

    /// The value cannot be sent, for this reason.
    fn send_unsent(mut self, error: &dyn std::error::Error) {
        self.answered = true;
        self.send_failure(&Failure::Reply { message: error.to_string() }, None);
    }

    fn send_failure(&self, failure: &Failure, turn: Option<&mut Turn>) {
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
                    drop(self.endpoint.send(&outbound));
                }
            }
        }
    }

    fn send_frame(&self, outbound: &Outbound<'_>, turn: Option<&mut Turn>) -> Result<(), TransferError> {
        match turn {
            Some(turn) => self.endpoint.send_in(outbound, turn),
            None => self.endpoint.send(outbound),
        }
    }
}

pub(crate) fn call_error(slot: &Slot, failure: Failure) -> CallError {
    let call = slot.id.clone();
    match failure {
        Failure::UnknownFunction { nearest } => CallError::UnknownFunction { call, nearest },
        Failure::Signature { callee } => CallError::SignatureMismatch { call, caller: slot.signature, callee },
        Failure::BadArguments { message } => CallError::BadArguments { call, message },
        Failure::Handler(error) => CallError::Remote { call, error },
        Failure::Panicked { message } => CallError::Panicked { call, message },
        Failure::Reply { message } => CallError::BadReply { call, message },
    }
}

fn send_error(call: &CallId, endpoint: &Endpoint, error: TransferError) -> CallError {
    match error {
        TransferError::Closed { cause } => lost(call, endpoint, &cause),
        source => CallError::Send { call: call.clone(), source },
    }
}

fn lost(call: &CallId, endpoint: &Endpoint, cause: &Arc<CloseCause>) -> CallError {
    CallError::PeerLost { call: call.clone(), stage: reached(endpoint), cause: Arc::clone(cause) }
}

/// How far calls on `endpoint` can have come.
pub(crate) fn reached(endpoint: &Endpoint) -> Stage {
    if endpoint.remote().is_some() { Stage::Waiting } else { Stage::Connecting }
}

impl Peer for Link {
    fn on_opened(self: Arc<Self>, endpoint: &Arc<Endpoint>) {
        if let Some(agent) = self.agent.upgrade() {
            agent.adopt(&self.worker, endpoint, &self);
        }
    }

    fn on_frame(&self, endpoint: &Arc<Endpoint>, frame: Frame, turn: &mut Turn) -> Result<(), ProtocolError> {
        match frame.kind {
            Kind::Request => self.on_request(endpoint, frame, turn),
            Kind::Reply | Kind::Error => self.on_answer(endpoint, frame),
            Kind::Function => self.on_announcement(&frame),
            kind => Err(ProtocolError::Unexpected { kind, expected: "a frame of a call" }),
        }
    }

    fn on_closed(&self, endpoint: &Arc<Endpoint>, cause: &Arc<CloseCause>) {
        for slot in lock(&self.calls).take_all() {
            slot.complete(Err(lost(&slot.id, endpoint, cause)));
        }
        if let Some(agent) = self.agent.upgrade() {
            agent.forget(&self.worker, endpoint);
        }
        match **cause {
            CloseCause::LocalShutdown | CloseCause::PeerShutdown { .. } => {
                tracing::debug!(peer = %self.worker, %cause, "endpoint closed");
            }
            _ => tracing::info!(peer = %self.worker, %cause, "endpoint closed"),
        }
    }

    fn on_timer(&self, endpoint: &Arc<Endpoint>, now: Instant) -> Option<Instant> {
        let (overdue, next) = lock(&self.calls).take_overdue(now);
        for slot in overdue {
            slot.expire(reached(endpoint));
        }
        next
    }
}
