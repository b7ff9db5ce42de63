//! One endpoint as the agent sees it: the calls that wait on it, and the functions its peer has announced.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use farcall_device::codec::{recycle, spare_buffer};
use farcall_device::{Device, DeviceError, Encoded};
use farcall_transport::frame::Kind;
use farcall_transport::planted::{self, Bug};
use farcall_transport::{
    CloseCause, Corrupt, Endpoint, Frame, Job, Outbound, Peer, Placer, ProtocolError, Small, TransferError, Turn,
    Unanswered, WorkerId,
};
use serde::{Deserialize, Serialize};

use crate::agent::{Agent, Inner};
use crate::call::{Slot, lock};
use crate::context::Call;
use crate::device_map::{DeviceMap, place};
use crate::error::{Failure, Stage};
use crate::function::HandlerKind;
use crate::interned::Interned;
use crate::parcel::{Contents, Parcel};
use crate::registry::{FunctionKind, Registered, Registry};
use crate::serve::{ReplyTo, Serving, run};
use crate::sim::Census;
use crate::table::{Abandoned, Admission, CallTable, Overdue, Window};
use crate::{CallError, CallId};

/// Functions one peer may announce on one connection.
const FUNCTIONS_MAX: usize = 1 << 16;
/// So many calls on their way are many; those that are made within that time of each other are made at once.
const MANY: usize = 8;
const AT_ONCE: Duration = Duration::from_micros(20);
/// Calls that may wait for one peer.
const CALLS_MAX: usize = 1 << 16;

/// Metadata of a Function frame.
#[derive(Serialize, Deserialize)]
pub(crate) struct Announcement<'a> {
    pub(crate) kind: FunctionKind,
    pub(crate) name: &'a str,
    pub(crate) signature: &'a str,
    /// What the signature's types are made of; empty for builtins.
    pub(crate) types: &'a str,
}

/// What a peer's interned id stands for here: a function, or what its callers are told.
type Target = Result<Arc<Registered>, Failure>;

/// Where calls to one worker go: an endpoint, and what is known of the calls on it.
pub(crate) struct Connection {
    pub(crate) endpoint: Arc<Endpoint>,
    pub(crate) link: Arc<Link>,
}

impl Connection {
    /// As [`Link::request`].
    pub(crate) fn request(&self, slot: &Arc<Slot>, function: &'static Interned, encoded: Encoded) -> Option<u64> {
        self.link.request(&self.endpoint, slot, function, encoded)
    }

    /// As [`Link::post`].
    pub(crate) fn post(&self, slot: &Arc<Slot>, function: &'static Interned, parcel: Parcel) -> Option<u64> {
        self.link.post(&self.endpoint, slot, function, parcel)
    }
}

/// A call to a peer: where it was sent, or waits to be, and its number there.
pub(crate) struct Sent {
    pub(crate) connection: Arc<Connection>,
    pub(crate) call: u64,
}

/// See the module.
pub(crate) struct Link {
    agent: Weak<Inner>,
    worker: Arc<WorkerId>,
    devices: DeviceMap,
    calls: Mutex<Calls>,
    functions: Mutex<Vec<Option<Target>>>,
    serving: Arc<Serving>,
}

/// The calls of this side.
struct Calls {
    table: CallTable,
    /// Requests for which the window has no room yet, in the order in which they were made.
    queue: VecDeque<Request>,
    /// Requests of the queue whose calls have ended.
    ended: usize,
    /// A thread sends from the queue: others add to its end, so that the order stays.
    draining: bool,
    /// When the last call without tensors was made.
    made_at: Option<Instant>,
}

impl Calls {
    /// Whether a call that is made at `now` is one of many at once, which may leave together: others are on their way, so answers
    /// come, and the last was made just now.
    fn is_one_of_many(&mut self, now: Instant) -> bool {
        let last = self.made_at.replace(now);
        let at_once = last.is_some_and(|last| now.saturating_duration_since(last) < AT_ONCE);
        at_once && self.table.sent() >= MANY
    }
}

/// A request that is fit to be sent.
struct Request {
    slot: Arc<Slot>,
    call: u64,
    function: &'static Interned,
    contents: Contents,
    /// Of its tensors, there.
    devices: Vec<Device>,
    /// Some are foreign and lent: copied once it is sent, or before it waits.
    lands: bool,
    /// What their owners may write was copied: it may wait.
    copied: bool,
}

impl Request {
    /// Whether the peer can compare digests is known with its greeting.
    fn must_wait(&self, endpoint: &Endpoint) -> bool {
        self.slot.wants_digests() && endpoint.remote().is_none()
    }

    /// Copies what was to be copied once it is sent: it waits, and the caller goes on.
    fn snapshot(&mut self, endpoint: &Endpoint) -> Result<(), DeviceError> {
        (self.lands, self.copied) = (false, true);
        self.contents.snapshot(endpoint)
    }

    /// What it takes of the window.
    fn bytes(&self) -> u64 {
        self.contents.encoded.tensors.iter().map(|tensor| tensor.layout().size_bytes() as u64).sum()
    }
}

impl Link {
    pub(crate) fn new(agent: &Weak<Inner>, worker: WorkerId) -> Arc<Self> {
        let upgraded = agent.upgrade();
        let limits = upgraded.as_ref().map(|agent| agent.driver.config().limits.clone()).unwrap_or_default();
        let window = Window { requests: limits.requests_max, bytes: limits.request_bytes_max };
        let link = Arc::new(Self {
            agent: Weak::clone(agent),
            devices: upgraded.as_ref().map(|agent| agent.device_map(&worker.name)).unwrap_or_default(),
            worker: Arc::new(worker),
            calls: Mutex::new(Calls {
                table: CallTable::new(window),
                queue: VecDeque::new(),
                ended: 0,
                draining: false,
                made_at: None,
            }),
            functions: Mutex::default(),
            serving: Arc::default(),
        });
        if let Some(agent) = upgraded {
            agent.note_link(&link);
        }
        link
    }

    /// Calls that wait for a reply.
    pub(crate) fn in_flight(&self) -> usize {
        lock(&self.calls).table.waiting()
    }

    /// Adds what this link holds.
    pub(crate) fn count(&self, census: &mut Census) {
        let calls = lock(&self.calls);
        census.waiting += calls.table.waiting();
        census.sent += calls.table.sent();
        census.queued += calls.queue.len();
        self.serving.count(census);
    }

    /// Sends a request once its tensors are ready; its outcome, a failure to send included, arrives in `slot`. Gives its number,
    /// unless it has failed.
    ///
    /// FENCE: a call whose tensors are not ready waits here, before it takes a place on the wire, and delays no later call.
    fn request(
        self: &Arc<Self>,
        endpoint: &Arc<Endpoint>,
        slot: &Arc<Slot>,
        function: &'static Interned,
        encoded: Encoded,
    ) -> Option<u64> {
        if encoded.tensors.is_empty() && !slot.wants_digests() {
            return self.request_small(endpoint, slot, function, encoded.metadata);
        }
        match Parcel::new(endpoint, encoded, !slot.wants_digests()) {
            Ok(parcel) => self.post(endpoint, slot, function, parcel),
            Err(error) => {
                slot.complete(Err(error.into()));
                None
            }
        }
    }

    /// As [`Link::request`], of arguments that are fit for the wire.
    fn post(
        self: &Arc<Self>,
        endpoint: &Arc<Endpoint>,
        slot: &Arc<Slot>,
        function: &'static Interned,
        parcel: Parcel,
    ) -> Option<u64> {
        let Parcel { contents, mut devices, lands, pending } = parcel;
        for device in &mut devices {
            let Some(there) = self.devices.there(*device) else {
                let (call, map) = (slot.id.clone(), self.devices.clone());
                slot.complete(Err(CallError::Unmapped { call, device: *device, map }));
                return None;
            };
            *device = there;
        }
        let mut calls = lock(&self.calls);
        let inserted = insert(&mut calls, slot);
        drop(calls);
        let call = inserted.filter(|call| self.keep_time(endpoint, slot, *call))?;
        let request = Request { slot: Arc::clone(slot), call, function, contents, devices, lands, copied: false };
        if pending.is_empty() {
            self.send_request(endpoint, request);
            return Some(call);
        }
        let (link, endpoint) = (Arc::clone(self), Arc::clone(endpoint));
        pending.on_ready(move |ready| match ready {
            Ok(()) if !request.slot.is_done() => link.send_request(&endpoint, request),
            // Its deadline passed, it was cancelled, or the endpoint closed.
            Ok(()) => {}
            Err(error) => {
                lock(&link.calls).table.remove(call);
                request.slot.complete(Err(error.into()));
            }
        });
        Some(call)
    }

    /// As [`Link::request`], without tensors: there is nothing to wait for but a place.
    fn request_small(
        &self,
        endpoint: &Arc<Endpoint>,
        slot: &Arc<Slot>,
        function: &'static Interned,
        metadata: Vec<u8>,
    ) -> Option<u64> {
        let mut calls = lock(&self.calls);
        let call = insert(&mut calls, slot)?;
        let first = calls.queue.is_empty() && !calls.draining;
        let admission = first.then(|| calls.table.admit(call, 0));
        let gathers = calls.is_one_of_many(slot.made_at());
        drop(calls);
        if !self.keep_time(endpoint, slot, call) {
            return None;
        }
        if admission != Some(Admission::Sent) {
            let contents = Contents::own(Encoded { metadata, tensors: Vec::new() });
            let slot = Arc::clone(slot);
            let request = Request { slot, call, function, contents, devices: Vec::new(), lands: false, copied: true };
            self.send_request(endpoint, request);
            return Some(call);
        }
        let deadline_us = u64::try_from(slot.after.as_micros()).unwrap_or(u64::MAX).max(1);
        let outbound = Outbound { call, function: function.id, deadline_us, ..Outbound::new(Kind::Request, &metadata) };
        self.send(endpoint, slot, function, &outbound, gathers);
        recycle(metadata);
        self.look_after(endpoint, slot, call).then_some(call)
    }

    /// The call in the table has an end: its deadline, or that of its endpoint. `false` if that has closed.
    fn keep_time(&self, endpoint: &Endpoint, slot: &Slot, call: u64) -> bool {
        endpoint.driver().schedule(slot.deadline);
        // Closed between the choice of the route and now, if it is: nobody keeps its time any more.
        self.look_after(endpoint, slot, call)
    }

    /// Ends the call if the endpoint has closed: `on_closed` may have run before it was inserted.
    fn look_after(&self, endpoint: &Endpoint, slot: &Slot, call: u64) -> bool {
        let Some(cause) = endpoint.closed() else { return true };
        lock(&self.calls).table.remove(call);
        slot.complete(Err(lost(&slot.id, endpoint, cause)));
        false
    }

    /// Sends the request if there is room in the window, behind those that wait for some already; else it waits, too.
    fn send_request(&self, endpoint: &Arc<Endpoint>, mut request: Request) {
        let (slot, call) = (Arc::clone(&request.slot), request.call);
        let mut calls = lock(&self.calls);
        let first = calls.queue.is_empty() && !calls.draining && !request.must_wait(endpoint);
        match first.then(|| calls.table.admit(call, request.bytes())) {
            Some(Admission::Sent) => {
                drop(calls);
                self.transmit(endpoint, &request);
                request.contents.recycle();
            }
            // Cancelled, or its deadline passed, meanwhile.
            Some(Admission::Over) => drop(calls),
            Some(Admission::Full) | None if !request.copied && (request.lands || request.contents.may_change()) => {
                drop(calls);
                return match request.snapshot(endpoint) {
                    Ok(()) => self.send_request(endpoint, request),
                    Err(error) => {
                        lock(&self.calls).table.remove(call);
                        slot.complete(Err(error.into()));
                    }
                };
            }
            Some(Admission::Full) | None => {
                calls.queue.push_back(request);
                drop(calls);
            }
        }
        self.look_after(endpoint, &slot, call);
    }

    fn transmit(&self, endpoint: &Arc<Endpoint>, request: &Request) {
        let Request { slot, call, function, contents, devices, lands, .. } = request;
        let left = slot.deadline.saturating_duration_since(endpoint.driver().now());
        let digests = if slot.wants_digests() { contents.digests().map(Some) } else { Ok(None) };
        let digests = match digests {
            Ok(digests) => digests,
            Err(error) => {
                lock(&self.calls).table.remove(*call);
                slot.complete(Err(error.into()));
                return self.send_queued(endpoint);
            }
        };
        let outbound = Outbound {
            kind: Kind::Request,
            call: *call,
            function: function.id,
            deadline_us: u64::try_from(left.as_micros()).unwrap_or(u64::MAX).max(1),
            metadata: &contents.encoded.metadata,
            tensors: &contents.encoded.tensors,
            devices,
            digests,
            lands: *lands,
        };
        self.send(endpoint, slot, function, &outbound, false);
    }

    fn send(&self, endpoint: &Arc<Endpoint>, slot: &Slot, function: &Interned, outbound: &Outbound<'_>, gathers: bool) {
        let call = outbound.call;
        let sent = if gathers {
            endpoint.gather_to_function(outbound, &function.announcement)
        } else {
            endpoint.send_to_function(outbound, &function.announcement)
        };
        if let Err(error) = sent {
            // Its close may have taken the slot already; a slot is completed once.
            lock(&self.calls).table.remove(call);
            slot.complete(Err(send_error(&slot.id, endpoint, error)));
            // Its place is another's.
            self.send_queued(endpoint);
        } else if slot.is_done() && lock(&self.calls).table.is_abandoned(call) {
            // Its cancellation may have overtaken it.
            send_cancel(endpoint, call);
        }
    }

    /// Sends what waits, as far as the window lets it, in the order in which it was made.
    fn send_queued(&self, endpoint: &Arc<Endpoint>) {
        {
            let mut calls = lock(&self.calls);
            if calls.draining || calls.queue.is_empty() {
                return;
            }
            calls.draining = true;
        }
        loop {
            let mut calls = lock(&self.calls);
            let Calls { table, queue, ended, draining, .. } = &mut *calls;
            let next = queue.front().filter(|next| !next.must_wait(endpoint));
            let admission = next.map(|next| table.admit(next.call, next.bytes()));
            let request = match admission {
                Some(Admission::Sent | Admission::Over) => queue.pop_front(),
                Some(Admission::Full) | None => None,
            };
            if admission == Some(Admission::Over) {
                *ended = ended.saturating_sub(1);
            }
            *draining = request.is_some();
            drop(calls);
            match request {
                Some(request) if admission == Some(Admission::Sent) => {
                    self.transmit(endpoint, &request);
                    if planted::has(Bug::SentTwice) {
                        self.transmit(endpoint, &request);
                    }
                }
                Some(ended) => drop(ended),
                None => return,
            }
        }
    }

    /// Nobody waits for the call's answer any more.
    pub(crate) fn abandon(&self, endpoint: &Arc<Endpoint>, call: u64) {
        let abandoned = lock(&self.calls).table.abandon(call);
        match abandoned {
            Abandoned::Sent => send_cancel(endpoint, call),
            Abandoned::NotSent => self.forget_ended(endpoint, 1),
            Abandoned::Over => {}
        }
    }

    /// So many more calls of the queue have ended: what they hold goes, once that is worth a look at all, and those behind them
    /// have their turn.
    fn forget_ended(&self, endpoint: &Arc<Endpoint>, more: usize) {
        let gone: VecDeque<Request> = {
            let mut calls = lock(&self.calls);
            calls.ended += more;
            if 2 * calls.ended < calls.queue.len() {
                return;
            }
            calls.ended = 0;
            let (gone, left) = calls.queue.drain(..).partition(|request: &Request| request.slot.is_done());
            calls.queue = left;
            gone
        };
        drop(gone);
        self.send_queued(endpoint);
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
        let target = resolve(&agent.registry, &announced, SameTypes::Compare);
        let mut functions = lock(&self.functions);
        if functions.len() <= index {
            functions.resize(index + 1, None);
        }
        functions[index] = Some(target);
        Ok(())
    }

    /// The function of that id; none was announced, if there is none.
    fn target(&self, function: u32) -> Result<Target, ProtocolError> {
        let known = lock(&self.functions).get(function as usize).cloned().flatten();
        known.ok_or_else(|| {
            let message = format!("request for function id {function}, which was not announced");
            ProtocolError::Malformed { what: "request", message }
        })
    }

    /// Whether the request that has come was cancelled on its way.
    fn count_request(&self, endpoint: &Endpoint, call: u64) -> Result<bool, ProtocolError> {
        let max = endpoint.driver().config().limits.requests_max;
        let counted = self.serving.on_request(call, endpoint.untaken_answers(), max);
        // The answer that made room may have arrived before it was counted.
        counted.or_else(|_| self.serving.on_request(call, endpoint.count_untaken_answers(), max))
    }

    /// A request of an inline function, without tensors: answered here and now.
    fn on_small_request(
        &self,
        endpoint: &Arc<Endpoint>,
        small: &Small<'_>,
        turn: &mut Turn,
    ) -> Result<(), ProtocolError> {
        let target = self.target(small.function)?;
        let (Ok(registered), false) = (&target, small.wants_digests) else {
            return self.on_request(endpoint, small.to_frame(), turn);
        };
        let (HandlerKind::Sync(handler), true) = (&registered.handler.0, registered.inline) else {
            return self.on_request(endpoint, small.to_frame(), turn);
        };
        let cancelled = self.count_request(endpoint, small.call)?;
        let Some(agent) = self.agent.upgrade() else { return Ok(()) };
        let now = turn.now(&agent.driver);
        let cx = Call {
            agent: Agent::from_inner(agent),
            scope: None,
            caller: Arc::clone(&self.worker),
            function: registered.name,
            deadline: (small.deadline_us > 0).then(|| now + Duration::from_micros(small.deadline_us)),
        };
        let no_tensors = || ReplyTo::new(endpoint, small.call, Unanswered::default(), false);
        let answer = if cancelled { Err(Failure::Cancelled) } else { handler(&cx, small.metadata, Vec::new()) };
        match answer {
            Ok(Encoded { metadata, tensors }) if tensors.is_empty() => {
                let outbound = Outbound { call: small.call, ..Outbound::new(Kind::Reply, &metadata) };
                let sent = endpoint.send_in(&outbound, turn);
                recycle(metadata);
                match sent {
                    Ok(()) | Err(TransferError::Closed { .. }) => {}
                    Err(error) => no_tensors().send_unsent(&error),
                }
            }
            answer => no_tensors().send(answer, Some(turn)),
        }
        Ok(())
    }

    fn on_request(&self, endpoint: &Arc<Endpoint>, mut frame: Frame, turn: &mut Turn) -> Result<(), ProtocolError> {
        let target = self.target(frame.function)?;
        let cancelled = self.count_request(endpoint, frame.call)?;
        let unanswered = std::mem::take(&mut frame.unanswered);
        let mut reply = ReplyTo::new(endpoint, frame.call, unanswered, frame.digests.wanted);
        let Some(agent) = self.agent.upgrade() else { return Ok(()) };
        if cancelled {
            reply.send(Err(Failure::Cancelled), Some(turn));
            return Ok(());
        }
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
        let mut scope = None;
        if !registered.inline {
            scope = Some(reply.list(&self.serving)?);
        }
        // Not the turn's time: a frame of the bulk connection may come late in a long one.
        let now = agent.driver.now();
        let cx = Call {
            agent: Agent::from_inner(agent),
            scope,
            caller: Arc::clone(&self.worker),
            function: registered.name,
            deadline: (frame.deadline_us > 0).then(|| now + Duration::from_micros(frame.deadline_us)),
        };
        let encoded = Encoded { metadata: frame.metadata, tensors: frame.tensors };
        let digests = frame.digests;
        if digests.is_empty() {
            run(registered, cx, encoded, turn, move |answer, turn| reply.send(answer, turn));
            return Ok(());
        }
        // A pass over all bytes: not where frames are read (R1).
        turn.spawn(Job::new(&Arc::clone(&registered.cost), move |turn| {
            let compared = digests.compare();
            drop(digests);
            match compared {
                Ok(()) => run(registered, cx, encoded, turn, move |answer, turn| reply.send(answer, turn)),
                Err(Corrupt { tensor, start, end }) => {
                    drop(encoded);
                    reply.send(Err(Failure::Corrupt { tensor: tensor as u32, start, end }), Some(turn));
                }
            }
        }));
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

    /// The slot that the answer is for; none, if it is late: nobody's. Its place is another's.
    fn settle(&self, endpoint: &Arc<Endpoint>, call: u64) -> Option<Arc<Slot>> {
        let (slot, waiting) = {
            let mut calls = lock(&self.calls);
            (calls.table.settle(call), !calls.queue.is_empty())
        };
        if waiting {
            self.send_queued(endpoint);
        }
        slot
    }

    fn on_answer(&self, endpoint: &Arc<Endpoint>, mut frame: Frame) -> Result<(), ProtocolError> {
        let Some(slot) = self.settle(endpoint, frame.call) else { return Ok(()) };
        // What goes into parameters is copied to wherever they are.
        let placed = if slot.targets().is_some() { Ok(()) } else { self.place_result(endpoint, &mut frame) };
        // What has landed in a parameter is compared before it is its value; else who waits does it, not who reads frames (R1).
        let corrupt = if slot.targets().is_some() { frame.digests.compare().err() } else { None };
        if slot.targets().is_none() && !frame.digests.is_empty() {
            slot.compare_with(std::mem::take(&mut frame.digests));
        }
        let outcome = if let Some(corrupt) = corrupt {
            Err(slot.corrupt(corrupt))
        } else if let Err(message) = placed {
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

/// A call's place in the table; if there is none, it has failed.
fn insert(calls: &mut Calls, slot: &Arc<Slot>) -> Option<u64> {
    let in_flight = calls.table.len();
    if in_flight >= CALLS_MAX {
        slot.complete(Err(CallError::Overloaded { call: slot.id.clone(), in_flight }));
        return None;
    }
    Some(calls.table.insert(Arc::clone(slot)))
}

/// Whether what types are made of must be compared.
#[derive(Clone, Copy)]
pub(crate) enum SameTypes {
    /// The caller is another program, perhaps of another build.
    Compare,
    /// It is this one.
    Certain,
}

/// The function of that name, if it is registered here with that signature, of types that are made of the same.
pub(crate) fn resolve(
    registry: &Registry,
    announced: &Announcement<'_>,
    same_types: SameTypes,
) -> Result<Arc<Registered>, Failure> {
    let &Announcement { kind, name, .. } = announced;
    let Some(registered) = registry.find(kind, name) else {
        return Err(Failure::UnknownFunction { nearest: registry.nearest(kind, name).map(str::to_owned) });
    };
    if registered.signature != announced.signature {
        return Err(Failure::Signature { callee: registered.signature.to_owned() });
    }
    if let SameTypes::Compare = same_types {
        let types = registered.types.text();
        if types != announced.types {
            return Err(Failure::Types { caller: announced.types.to_owned(), callee: types.to_owned() });
        }
    }
    Ok(Arc::clone(registered))
}

pub(crate) fn call_error(slot: &Slot, failure: Failure) -> CallError {
    let call = slot.id.clone();
    match failure {
        Failure::UnknownFunction { nearest } => CallError::UnknownFunction { call, nearest },
        Failure::Signature { callee } => CallError::SignatureMismatch { call, caller: slot.signature, callee },
        Failure::Types { caller, callee } => CallError::TypesMismatch { call, caller, callee },
        Failure::BadArguments { message } => CallError::BadArguments { call, message },
        Failure::Handler(error) => CallError::Remote { call, error },
        Failure::Panicked { message } => CallError::Panicked { call, message },
        Failure::Reply { message } => CallError::BadReply { call, message },
        Failure::Cancelled => CallError::Cancelled { call },
        Failure::Corrupt { tensor, start, end } => {
            let at = Arc::clone(&call.worker);
            CallError::Corrupt { call, tensor: tensor as usize, bytes: start..end, at }
        }
    }
}

/// Best effort: an endpoint that is closed, or closes now, tells its peer more than this.
fn send_cancel(endpoint: &Arc<Endpoint>, call: u64) {
    for _ in 0..endpoint.driver().copies(Kind::Cancel) {
        drop(endpoint.send(&Outbound { call, ..Outbound::new(Kind::Cancel, &[]) }));
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
            agent.adopt(endpoint, &self);
        }
        self.send_queued(endpoint);
    }

    fn on_frame(&self, endpoint: &Arc<Endpoint>, frame: Frame, turn: &mut Turn) -> Result<(), ProtocolError> {
        match frame.kind {
            Kind::Request => self.on_request(endpoint, frame, turn),
            Kind::Reply | Kind::Error => self.on_answer(endpoint, frame),
            Kind::Function => self.on_announcement(&frame),
            Kind::Cancel => {
                self.serving.cancel(frame.call, || endpoint.is_receiving(frame.call));
                Ok(())
            }
            kind => Err(ProtocolError::Unexpected { kind, expected: "a frame of a call" }),
        }
    }

    fn on_small(&self, endpoint: &Arc<Endpoint>, small: &Small<'_>, turn: &mut Turn) -> Result<(), ProtocolError> {
        match small.kind {
            Kind::Request => self.on_small_request(endpoint, small, turn),
            Kind::Reply if !small.wants_digests => {
                let Some(slot) = self.settle(endpoint, small.call) else { return Ok(()) };
                let mut metadata = spare_buffer();
                metadata.extend_from_slice(small.metadata);
                slot.complete(Ok(Encoded { metadata, tensors: Vec::new() }));
                Ok(())
            }
            _ => self.on_frame(endpoint, small.to_frame(), turn),
        }
    }

    fn on_closed(&self, endpoint: &Arc<Endpoint>, cause: &Arc<CloseCause>) {
        let (slots, queue) = {
            let mut calls = lock(&self.calls);
            (calls.ended, calls.draining) = (0, false);
            (calls.table.take_all(), std::mem::take(&mut calls.queue))
        };
        let forgotten = usize::from(planted::has(Bug::WaiterForgotten));
        for slot in slots.into_iter().skip(forgotten) {
            slot.complete(Err(lost(&slot.id, endpoint, cause)));
        }
        drop(queue);
        self.serving.close();
        if let Some(agent) = self.agent.upgrade() {
            agent.forget(&self.worker, endpoint, cause);
        }
        match **cause {
            // In order, or never open: then who wanted it open has the error.
            CloseCause::LocalShutdown
            | CloseCause::PeerShutdown { .. }
            | CloseCause::Connect { .. }
            | CloseCause::ConnectTimeout { .. } => {
                tracing::debug!(peer = %self.worker, %cause, "endpoint closed");
            }
            _ => farcall_transport::limited!(warn, peer = %self.worker, %cause, "lost a worker"),
        }
    }

    fn placer(&self, call: u64) -> Option<Arc<dyn Placer>> {
        let targets = Arc::clone(lock(&self.calls).table.waiting_slot(call)?.targets()?);
        Some(targets)
    }

    fn on_timer(&self, endpoint: &Arc<Endpoint>, now: Instant) -> Option<Instant> {
        let (overdue, next) = lock(&self.calls).table.take_overdue(now);
        let mut queued = 0;
        for Overdue { slot, call, abandoned } in overdue {
            slot.expire(reached(endpoint));
            match abandoned {
                Abandoned::Sent => send_cancel(endpoint, call),
                Abandoned::NotSent => queued += 1,
                Abandoned::Over => {}
            }
        }
        if queued > 0 {
            self.forget_ended(endpoint, queued);
        }
        next
    }
}
