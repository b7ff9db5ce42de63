//! The agent: holds this worker's endpoints, carries out calls, and is what handlers and callers talk to.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};

use farcall_device::codec::encode;
use farcall_device::{Device, Runtime};
use farcall_schema::{FromValue, Kwargs, Value};
use farcall_transport::planted::{self, Bug};
use farcall_transport::{
    Channel, CloseCause, Decision, Driver, Endpoint, Job, JobCost, NoSlabs, Passing, Peer, Service, TransferError,
    WorkerId, WorkerInfo, is_forked_child,
};
use serde::Serialize;
use tokio::runtime::{EnterGuard, Handle};

use crate::builtin::{Builtin, Unresolved};
use crate::call::{Here, Reply, Slot, lock};
use crate::context::Call;
use crate::error::Stage;
use crate::function::{Args, Function};
use crate::interned::{self, Interned};
use crate::join::{Group, Options};
use crate::link::{Announcement, Connection, Link, SameTypes, Sent, call_error, resolve};
use crate::lives::LookUps;
use crate::parcel::snapshot;
use crate::registry::{FunctionKind, Registry};
use crate::scope::Scope;
use crate::serve::run;
use crate::table::{CallTable, Window};
use crate::to_all::ToAll;
use crate::{CallError, CallId, DeviceMap};

/// How long a dropped agent waits for its threads.
const DROP_WAIT: Duration = Duration::from_millis(200);
/// Threads of the runtime for async handlers.
const ASYNC_THREADS: usize = 2;

/// What is called.
#[derive(Clone, Copy)]
pub(crate) struct Callee {
    kind: FunctionKind,
    name: &'static str,
    signature: &'static str,
    /// Asked once, before its first call.
    types: fn() -> String,
}

impl Callee {
    pub(crate) const fn of<F: Function>() -> Self {
        Self { kind: FunctionKind::User, name: F::NAME, signature: F::SIGNATURE, types: F::types }
    }

    pub(crate) fn builtin(builtin: &Builtin) -> Self {
        Self { kind: FunctionKind::Builtin, name: builtin.name(), signature: builtin.text(), types: String::new }
    }

    pub(crate) fn types(&self) -> String {
        (self.types)()
    }

    pub(crate) fn announcement<'a>(&self, types: &'a str) -> Announcement<'a> {
        Announcement { kind: self.kind, name: self.name, signature: self.signature, types }
    }
}

/// Where calls to one worker go.
pub(crate) struct Route {
    id: WorkerId,
    /// Its newest life that is known.
    pub(crate) info: Mutex<Arc<WorkerInfo>>,
    pub(crate) current: Mutex<Option<Arc<Connection>>>,
}

pub(crate) struct Inner {
    pub(crate) driver: Arc<Driver>,
    pub(crate) registry: Registry,
    pub(crate) group: OnceLock<Group>,
    /// Calls are refused.
    pub(crate) closed: AtomicBool,
    /// `shutdown` has begun.
    pub(crate) left: AtomicBool,
    /// Calls of this worker to itself.
    pub(crate) local: Mutex<CallTable>,
    pub(crate) look_ups: Mutex<LookUps>,
    hand_on: Arc<JobCost>,
    routes: OnceLock<Vec<Route>>,
    by_name: OnceLock<HashMap<Arc<str>, u32>>,
    /// All that were made, in a simulation: there they are counted.
    simulated_links: Mutex<Vec<Weak<Link>>>,
    pub(crate) me: WorkerId,
    device_maps: HashMap<String, DeviceMap>,
    deadline: Duration,
    digests: bool,
    runtime_given: Option<Handle>,
    runtime_own: Mutex<Option<tokio::runtime::Runtime>>,
    pub(crate) this: Weak<Inner>,
}

/// A worker's runtime: the group's other workers, calls to them, and the functions served to them.
///
/// Clones are handles of one agent. [`Agent::shutdown`] leaves the group in order; dropping the last handle closes its
/// connections at once.
#[derive(Clone)]
pub struct Agent(Arc<Inner>);

impl fmt::Debug for Agent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Agent").field("worker", &self.0.me.name).field("rank", &self.0.me.rank).finish_non_exhaustive()
    }
}

impl Agent {
    pub(crate) fn from_inner(inner: Arc<Inner>) -> Self {
        Self(inner)
    }

    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.0
    }

    pub(crate) fn new(options: &Options, driver: &Arc<Driver>, registry: Registry) -> Self {
        Self(Arc::new_cyclic(|this| Inner {
            driver: Arc::clone(driver),
            registry,
            group: OnceLock::new(),
            closed: AtomicBool::new(false),
            left: AtomicBool::new(false),
            local: Mutex::new(CallTable::new(Window::UNLIMITED)),
            look_ups: Mutex::default(),
            hand_on: Arc::default(),
            routes: OnceLock::new(),
            by_name: OnceLock::new(),
            simulated_links: Mutex::default(),
            me: driver.config().worker.id.clone(),
            device_maps: options.device_maps.clone(),
            deadline: options.deadline,
            digests: options.digests,
            runtime_given: options.runtime.clone(),
            runtime_own: Mutex::new(None),
            this: Weak::clone(this),
        }))
    }

    /// The group is complete: `workers` by rank.
    pub(crate) fn set_workers(&self, workers: Vec<WorkerInfo>) {
        let names = workers.iter().map(|info| (Arc::clone(&info.id.name), info.id.rank)).collect();
        let route = |info: WorkerInfo| Route {
            id: info.id.clone(),
            info: Mutex::new(Arc::new(info)),
            current: Mutex::default(),
        };
        let routes = workers.into_iter().map(route).collect();
        // Set once, by the join that makes the agent.
        let _ = self.0.by_name.set(names);
        let _ = self.0.routes.set(routes);
    }

    /// This worker.
    pub fn worker(&self) -> &WorkerId {
        &self.0.me
    }

    /// The group's workers by rank, this one included: of each the newest life that is known.
    pub fn workers(&self) -> impl ExactSizeIterator<Item = Arc<WorkerInfo>> {
        self.0.routes().iter().map(|route| Arc::clone(&lock(&route.info)))
    }

    /// Where this agent's tensors and streams come from.
    pub fn runtime(&self) -> &Runtime {
        &self.0.driver.config().runtime
    }

    /// Chooses the worker to call, by name or rank. Options come next, then [`To::call`].
    pub fn to<'a>(&'a self, worker: impl Into<Target<'a>>) -> To<'a> {
        To { agent: self, target: worker.into(), deadline: self.0.deadline, digests: self.0.digests, within: None }
    }

    /// Chooses several workers to call at once with the same arguments, by names or ranks. Options come next, then
    /// [`ToAll::call`].
    pub fn to_all<'a, W: Into<Target<'a>>>(&'a self, workers: impl IntoIterator<Item = W>) -> ToAll<'a> {
        ToAll::new(workers.into_iter().map(|worker| self.to(worker)).collect())
    }

    /// Whether a thread of this agent stays with one peer's ring now, as calls come by it one after the other: for measurements.
    pub fn attends(&self) -> bool {
        self.0.driver.attends()
    }

    /// Calls of this agent that wait for a reply.
    pub fn in_flight(&self) -> usize {
        let links = self.0.routes().iter().filter_map(|route| lock(&route.current).clone());
        links.map(|connection| connection.link.in_flight()).sum::<usize>() + lock(&self.0.local).waiting()
    }

    /// The runtime async handlers run on: the one of [`Options`], or the agent's own, started now; a simulation's if the
    /// agent lives in one.
    pub(crate) fn async_runtime(&self) -> Result<Executor, String> {
        if let Some(host) = self.0.driver.simulated() {
            return Ok(Executor::Simulated(host.clone()));
        }
        if let Some(handle) = &self.0.runtime_given {
            return Ok(Executor::Tokio(handle.clone()));
        }
        let mut own = lock(&self.0.runtime_own);
        if let Some(runtime) = &*own {
            return Ok(Executor::Tokio(runtime.handle().clone()));
        }
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(ASYNC_THREADS)
            .thread_name("farcall-async")
            .enable_all()
            .build()
            .map_err(|error| format!("no runtime for async handlers: {error}"))?;
        Ok(Executor::Tokio(own.insert(runtime).handle().clone()))
    }
}

/// Where async handlers run.
pub(crate) enum Executor {
    Tokio(Handle),
    Simulated(farcall_transport::sim::Host),
}

impl Executor {
    /// Makes the runtime that of this thread, as long as the guard lives.
    pub(crate) fn enter(&self) -> Option<EnterGuard<'_>> {
        match self {
            Self::Tokio(handle) => Some(handle.enter()),
            Self::Simulated(_) => None,
        }
    }

    pub(crate) fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) {
        match self {
            Self::Tokio(handle) => drop(handle.spawn(future)),
            Self::Simulated(host) => host.spawn(future),
        }
    }
}

impl Inner {
    /// In a simulation, every link that is left.
    pub(crate) fn simulated_links(&self) -> Vec<Arc<Link>> {
        let mut links = lock(&self.simulated_links);
        links.retain(|link| link.strong_count() > 0);
        links.iter().filter_map(Weak::upgrade).collect()
    }

    pub(crate) fn note_link(&self, link: &Arc<Link>) {
        if self.driver.simulated().is_some() {
            lock(&self.simulated_links).push(Arc::downgrade(link));
        }
    }

    fn routes(&self) -> &[Route] {
        self.routes.get().map_or(&[], Vec::as_slice)
    }

    /// The route to a worker of the group; none if it is not of it.
    pub(crate) fn route_of(&self, worker: &WorkerId) -> Option<&Route> {
        self.routes().get(worker.rank as usize).filter(|route| route.id == *worker)
    }

    /// The map for the worker of that name; none means the same indices.
    pub(crate) fn device_map(&self, worker: &str) -> DeviceMap {
        self.device_maps.get(worker).cloned().unwrap_or_default()
    }

    fn rank(&self, target: &Target<'_>) -> Option<u32> {
        match target {
            Target::Name(name) => self.by_name.get()?.get(*name).copied(),
            Target::Rank(rank) => ((*rank as usize) < self.routes().len()).then_some(*rank),
        }
    }

    /// The open or opening endpoint to `rank`; dialed on first use and after a loss.
    fn route(&self, rank: u32) -> Result<Arc<Connection>, TransferError> {
        let route = &self.routes()[rank as usize];
        let mut current = lock(&route.current);
        if let Some(connection) = &*current
            && (connection.endpoint.closed().is_none() || planted::has(Bug::RouteKept))
        {
            return Ok(Arc::clone(connection));
        }
        let info = Arc::clone(&lock(&route.info));
        let link = Link::new(&self.this, route.id.clone());
        let endpoint = Endpoint::dial(&self.driver, &info, Arc::clone(&link) as Arc<dyn Peer>)
            .inspect_err(|_| self.look_up(rank))?;
        Ok(Arc::clone(current.insert(Arc::new(Connection { endpoint, link }))))
    }

    /// As [`Inner::route`], for a call, which fails if there is none.
    pub(crate) fn route_for(&self, rank: u32, slot: &Slot) -> Option<Arc<Connection>> {
        let error = match self.route(rank) {
            Ok(route) => return Some(route),
            Err(error) => error,
        };
        let call = slot.id.clone();
        slot.complete(Err(match error {
            TransferError::Closed { .. } => CallError::ShutDown { call },
            TransferError::Connect { route, source } => {
                let cause = Arc::new(CloseCause::Connect { route, source });
                CallError::PeerLost { call, stage: Stage::Connecting, cause }
            }
            source => CallError::Send { call, source },
        }));
        None
    }

    /// Lets calls to a worker that dialed this one share its connection, unless they have one of their own. (Two that dial
    /// each other at once keep one each.)
    pub(crate) fn adopt(&self, endpoint: &Arc<Endpoint>, link: &Arc<Link>) {
        let Some(remote) = endpoint.remote() else { return };
        // A worker of another group may use the rank; calls go to the one that joined.
        let Some(route) = self.route_of(&remote.id) else { return };
        self.learn(remote);
        let newest = lock(&route.info).incarnation;
        if remote.incarnation < newest {
            return endpoint.close(CloseCause::Replaced { life: newest });
        }
        if let Ok(mut current) = route.current.try_lock()
            && current.is_none()
        {
            *current = Some(Arc::new(Connection { endpoint: Arc::clone(endpoint), link: Arc::clone(link) }));
        }
    }

    /// A closed endpoint is no route any more.
    pub(crate) fn forget(&self, worker: &WorkerId, endpoint: &Arc<Endpoint>, cause: &CloseCause) {
        let Some(route) = self.route_of(worker) else { return };
        if !matches!(cause, CloseCause::LocalShutdown | CloseCause::PeerShutdown { .. } | CloseCause::Replaced { .. }) {
            self.look_up(worker.rank);
        }
        let Ok(mut current) = route.current.try_lock() else { return };
        if current.as_ref().is_some_and(|known| Arc::ptr_eq(&known.endpoint, endpoint)) && !planted::has(Bug::RouteKept)
        {
            *current = None;
        }
    }

    /// Closes everything, whatever is in flight. Idempotent.
    pub(crate) fn stop(&self, wait: Duration) {
        if is_forked_child() {
            // Threads and sockets are the parent's, and so may be the locks (FORK).
            return;
        }
        self.closed.store(true, Ordering::SeqCst);
        let local = lock(&self.local).take_all();
        for slot in local {
            slot.complete(Err(CallError::ShutDown { call: slot.id.clone() }));
            slot.stop_handler();
        }
        self.driver.stop(wait);
        if let Some(runtime) = lock(&self.runtime_own).take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if is_forked_child() {
            // Their ends wait for threads that are the parent's.
            let group = self.group.take();
            let runtime = self.runtime_own.get_mut().ok().and_then(Option::take);
            std::mem::forget((group, runtime, Arc::clone(&self.driver)));
            return;
        }
        self.stop(DROP_WAIT);
    }
}

/// Opens links for peers that dial this agent.
pub(crate) struct Acceptor(pub(crate) Weak<Inner>);

impl Service for Acceptor {
    fn on_open(&self, remote: &WorkerInfo) -> Result<Arc<dyn Peer>, CloseCause> {
        if let Some(agent) = self.0.upgrade() {
            agent.check_life(remote)?;
        }
        Ok(Link::new(&self.0, remote.id.clone()))
    }

    fn on_timer(&self, now: Instant) -> Option<Instant> {
        let agent = self.0.upgrade()?;
        let (overdue, next) = lock(&agent.local).take_overdue(now);
        for overdue in overdue {
            overdue.slot.expire(Stage::Waiting);
            overdue.slot.stop_handler();
        }
        next
    }
}

/// A worker by name or by rank.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Target<'a> {
    /// Its name.
    Name(&'a str),
    /// Its rank.
    Rank(u32),
}

impl<'a> From<&'a str> for Target<'a> {
    fn from(name: &'a str) -> Self {
        Self::Name(name)
    }
}

impl<'a> From<&'a String> for Target<'a> {
    fn from(name: &'a String) -> Self {
        Self::Name(name)
    }
}

impl From<u32> for Target<'_> {
    fn from(rank: u32) -> Self {
        Self::Rank(rank)
    }
}

impl<'a> From<&'a WorkerId> for Target<'a> {
    fn from(id: &'a WorkerId) -> Self {
        Self::Name(&id.name)
    }
}

/// Calls to one worker, with their options.
#[derive(Clone, Copy, Debug)]
#[must_use = "options do nothing until `call`"]
pub struct To<'a> {
    agent: &'a Agent,
    target: Target<'a>,
    deadline: Duration,
    digests: bool,
    /// The call in whose name calls are made.
    within: Option<&'a Call>,
}

impl<'a> To<'a> {
    pub(crate) fn within(self, call: &'a Call) -> Self {
        Self { within: Some(call), ..self }
    }

    pub(crate) fn agent(&self) -> &'a Agent {
        self.agent
    }
}

impl To<'_> {
    /// How long a call waits for its reply. Default: [`Options::deadline`]. One that is made by [`Call::to`] waits no longer
    /// than that call's own caller.
    pub fn deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// Whether tensors of the call and of its value are sent with digests, which their receivers compare: XXH3-64 of each 64 KiB.
    /// Default: [`Options::digests`]. What differs is [`CallError::Corrupt`], and reaches neither handler nor caller. A worker whose
    /// build knows no digests is [`TransferError::NoDigests`].
    ///
    /// # Cost
    /// One pass over the bytes at each end: the sender's in `call`, once for all workers of [`Agent::to_all`]. Where nothing is copied
    /// between workers it is what costs: `farcall demo --weights` with 91 MB and three readers on two busy processors went from 3.0 to
    /// 1.4 GB/s in slabs, and from 1.0 to 0.9 over TCP.
    pub fn digests(self, digests: bool) -> Self {
        Self { digests, ..self }
    }

    /// Calls `function` on the worker: sent at once, never blocking; the reply is a future.
    ///
    /// Arguments are values or references of the parameters' types, tensors anywhere inside. A tensor's bytes are read
    /// now or later without a copy: storages are written once. A call to this worker itself takes no socket.
    ///
    /// # Shapes and dtypes
    /// Any rank up to 16 and any dtype. Views with gaps are packed first; transposed and broadcast ones are not.
    /// # Errors
    /// None here: every failure, that of sending included, is the reply's [`CallError`].
    /// # Cost
    /// Between near workers a write to a ring, and a wake if the peer sleeps; elsewhere one `send` on an open connection. Small
    /// calls of which many are on their way over TCP share one, and may be held for that until the next is made, an answer
    /// comes, somebody waits, or 2 ms have passed. Tensors above 64 KiB travel on a second connection, opened at the first.
    pub fn call<F: Function, A: Args<F::Args>>(&self, function: F, args: A) -> Reply<F::Output> {
        let _ = function;
        let (slot, sent) = self.start(&Callee::of::<F>(), &args, interned::of_function::<F>);
        Reply::new(slot, sent)
    }

    /// Calls a builtin on the worker by its name, such as `aten::add`, or with an overload, such as `aten::add.Tensor`.
    ///
    /// Which overload takes the arguments is decided here, on the caller, as torch decides it: the first that takes them as
    /// they are, else the first that takes them converted.
    /// ```no_run
    /// # use farcall_rpc::{Agent, CallError};
    /// # use farcall_device::Tensor;
    /// use farcall_schema::{args, kwargs};
    ///
    /// # async fn example(agent: &Agent, x: &Tensor, y: &Tensor) -> Result<(), CallError> {
    /// let sum = agent.to("w1").builtin("aten::add", args![x, y], kwargs! {"alpha": 2.0}).await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// None here. The reply's [`CallError::UnknownBuiltin`] names the nearest names, [`CallError::NoMatch`] every overload and
    /// why it was refused; else as [`To::call`].
    /// # Cost
    /// That of [`To::call`], and the matching: each overload is tried, and arguments are cloned once.
    pub fn builtin(&self, name: &str, args: Vec<Value>, kwargs: Kwargs) -> Reply<Value> {
        self.builtin_as(name, args, kwargs)
    }

    /// As [`To::builtin`], with the value as a `T`; one that is no `T` is [`CallError::BadReply`], which names both types.
    pub fn builtin_as<T: FromValue>(&self, name: &str, args: Vec<Value>, kwargs: Kwargs) -> Reply<T> {
        let (slot, sent) = match self.agent.0.registry.known_builtins().resolve(name, &args, &kwargs) {
            Ok((builtin, values)) => {
                let callee = Callee::builtin(builtin);
                self.start(&callee, &values, || interned::of_builtin(builtin))
            }
            Err(unresolved) => (self.unresolved(name, unresolved), None),
        };
        Reply::of_value(slot, sent)
    }

    /// A call of a builtin that failed before it was one.
    fn unresolved(&self, name: &str, unresolved: Unresolved) -> Arc<Slot> {
        let worker: Arc<str> = match self.target {
            Target::Name(name) => name.into(),
            Target::Rank(rank) => format!("rank {rank}").into(),
        };
        let (function, error): (_, Box<dyn FnOnce(CallId) -> CallError>) = match unresolved {
            Unresolved::Unknown(nearest) => {
                let (worker, name) = (Arc::clone(&worker), name.to_owned());
                ("a builtin", Box::new(|_| CallError::UnknownBuiltin { worker, name, nearest }))
            }
            Unresolved::NoMatch { base, error } => (base, Box::new(|call| CallError::NoMatch { call, source: error })),
        };
        let id = CallId { worker, function };
        let slot = Slot::new(&id, "", self.deadline, self.agent.0.driver.now());
        slot.complete(Err(error(id)));
        slot
    }

    /// Starts a call; its outcome, a failure to send included, arrives in the slot.
    fn start<A: Serialize>(
        &self,
        callee: &Callee,
        args: &A,
        intern: impl FnOnce() -> &'static Interned,
    ) -> (Arc<Slot>, Option<Sent>) {
        let (slot, sent) = self.begin(callee, args, intern);
        self.adopt(&slot, sent.as_ref());
        (slot, sent)
    }

    /// The call ends with the one in whose name it is made.
    pub(crate) fn adopt(&self, slot: &Arc<Slot>, sent: Option<&Sent>) {
        if let Some(scope) = self.within.and_then(|call| call.scope.as_ref()) {
            scope.adopt(slot, sent);
        }
    }

    fn begin<A: Serialize>(
        &self,
        callee: &Callee,
        args: &A,
        intern: impl FnOnce() -> &'static Interned,
    ) -> (Arc<Slot>, Option<Sent>) {
        let (slot, rank) = self.open(callee);
        let Some(rank) = rank else { return (slot, None) };
        let encoded = match encode(args) {
            Ok(encoded) => encoded,
            Err(source) => {
                slot.complete(Err(CallError::Encode { call: slot.id.clone(), source }));
                return (slot, None);
            }
        };
        let agent = &self.agent.0;
        if rank == agent.me.rank {
            self.call_here(callee, &slot, encoded);
            return (slot, None);
        }
        let Some(connection) = agent.route_for(rank, &slot) else { return (slot, None) };
        let call = connection.request(&slot, intern(), encoded);
        (slot, call.map(|call| Sent { connection, call }))
    }

    /// A call's slot, and the rank of who is called; none if the call has failed already.
    pub(crate) fn open(&self, callee: &Callee) -> (Arc<Slot>, Option<u32>) {
        let &Callee { name, signature, .. } = callee;
        let deadline = self.within.and_then(Call::remaining).map_or(self.deadline, |left| left.min(self.deadline));
        let agent = &self.agent.0;
        let now = agent.driver.now();
        let Some(rank) = agent.rank(&self.target) else {
            let target = match self.target {
                Target::Name(name) => name.to_owned(),
                Target::Rank(rank) => format!("of rank {rank}"),
            };
            let known = self.agent.workers().map(|info| Arc::clone(&info.id.name)).collect();
            let id = CallId { worker: target.as_str().into(), function: name };
            let slot = Slot::new(&id, signature, deadline, now);
            slot.complete(Err(CallError::NoSuchWorker { target, known }));
            return (slot, None);
        };
        let slot = Slot::of(&agent.routes()[rank as usize].id.name, name, signature, deadline, now);
        let call = || slot.id.clone();
        let refused = if is_forked_child() {
            Some(CallError::ForkedProcess { call: call() })
        } else if agent.closed.load(Ordering::SeqCst) {
            Some(CallError::ShutDown { call: call() })
        } else {
            None
        };
        if self.digests {
            slot.ask_digests(&agent.me.name);
        }
        let rank = refused.is_none().then_some(rank);
        if let Some(refused) = refused {
            slot.complete(Err(refused));
        }
        (slot, rank)
    }

    /// How this agent dialed the worker, if it has an open or opening connection that it dialed itself.
    pub fn dialed(&self) -> Option<farcall_transport::Route> {
        let agent = &self.agent.0;
        let rank = agent.rank(&self.target)?;
        let current = lock(&agent.routes()[rank as usize].current);
        current.as_ref().and_then(|connection| connection.endpoint.route().cloned())
    }

    /// Tensors of this worker that the other borrows, on that connection.
    pub fn lent(&self) -> usize {
        let agent = &self.agent.0;
        let Some(rank) = agent.rank(&self.target) else { return 0 };
        let current = lock(&agent.routes()[rank as usize].current);
        current.as_ref().map_or(0, |connection| connection.endpoint.lent())
    }

    /// How tensors pass to the worker, and if not in slabs, why; `None` if it was not called, or did not call, yet.
    pub fn passing(&self) -> Option<Passing> {
        let agent = &self.agent.0;
        let rank = agent.rank(&self.target)?;
        let current = lock(&agent.routes()[rank as usize].current);
        current.as_ref().map(|connection| connection.endpoint.passing())
    }

    /// Which channel takes a tensor of `bytes` on a device here to one of the worker's (in this order), and why each other one
    /// does not; `None` if there is no such worker. Nothing is dialed for it.
    pub fn explain(&self, devices: [Device; 2], bytes: u64) -> Option<Decision> {
        let agent = &self.agent.0;
        let rank = agent.rank(&self.target)?;
        let info = Arc::clone(&lock(&agent.routes()[rank as usize].info));
        Some(agent.driver.decide(&info, devices, bytes))
    }

    /// The channel that a host tensor of `bytes` takes to the worker: of the connection that this agent has dialed, even if it
    /// had to fall back to it; else, the one it would dial.
    pub fn channel(&self, bytes: u64) -> Option<Channel> {
        let decided = || self.explain([Device::HOST; 2], bytes)?.taken();
        match (self.passing(), self.dialed()) {
            (Some(Passing::Sockets(NoSlabs::Connecting)), _) | (None, _) => decided(),
            (Some(Passing::Slabs), _) => Some(Channel::Shm),
            (_, Some(route)) => Some(route.channel()),
            // It dialed this worker, by the same rules.
            (_, None) => decided(),
        }
    }

    pub(crate) fn call_here(&self, callee: &Callee, slot: &Arc<Slot>, mut encoded: farcall_device::Encoded) {
        let agent = &self.agent.0;
        // SNAPSHOT: as of any other worker's.
        if let Err(error) = snapshot(&agent.driver.config().runtime, &mut encoded.tensors) {
            slot.complete(Err(error.into()));
            return;
        }
        let registered = match resolve(&agent.registry, &callee.announcement(""), SameTypes::Certain) {
            Ok(registered) => registered,
            Err(failure) => {
                slot.complete(Err(call_error(slot, failure)));
                return;
            }
        };
        let scope = Arc::new(Scope::default());
        let cx = Call {
            agent: self.agent.clone(),
            caller: Arc::new(agent.me.clone()),
            function: registered.name,
            deadline: Some(slot.deadline),
            scope: Some(Arc::clone(&scope)),
        };
        let call = {
            let mut local = lock(&agent.local);
            if agent.closed.load(Ordering::SeqCst) {
                // `stop` has emptied the table, or waits for this lock to do so.
                slot.complete(Err(CallError::ShutDown { call: slot.id.clone() }));
                return;
            }
            let call = local.insert(Arc::clone(slot));
            local.admit(call, 0);
            // Before its deadline can be looked at.
            slot.set_here(Here { agent: Weak::clone(&agent.this), scope, call });
            call
        };
        agent.driver.schedule(slot.deadline);
        let this = Weak::clone(&agent.this);
        // It only hands on; what the handler costs is accounted with the handler.
        let hand_on = Arc::clone(&agent.hand_on);
        let spawned = agent.driver.spawn(Job::new(&hand_on, move |turn| {
            run(registered, cx, encoded, turn, move |answer, _| {
                let Some(agent) = this.upgrade() else { return };
                let Some(slot) = lock(&agent.local).remove(call) else { return };
                let answer = answer.map_err(|failure| call_error(&slot, failure)).and_then(|mut encoded| {
                    snapshot(&agent.driver.config().runtime, &mut encoded.tensors)?;
                    Ok(encoded)
                });
                slot.complete(answer);
            });
        }));
        if !spawned && let Some(slot) = lock(&agent.local).remove(call) {
            slot.complete(Err(CallError::ShutDown { call: slot.id.clone() }));
        }
    }
}
