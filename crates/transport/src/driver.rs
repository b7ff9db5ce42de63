//! One per agent: watches the sockets, accepts and dials, keeps time, and runs handlers.
//!
//! A small pool of threads shares one epoll set. One of them leads: it waits for events, reads frames and, as no
//! hand-over is faster than none, runs short jobs itself. A job is short while its [`JobCost`] says so: it was so when it
//! ran last. Before any other job the leader passes its role on, to an idle thread or a new one. Should a short job turn
//! out long, the watchdog takes the role away within two ticks. So a short handler costs no thread switch, a long one
//! does not delay others, and heartbeats and replies depend on no handler. Before it sleeps, the leader looks a while at the rings and
//! the sockets by which something came lately, if that pays (`spin`); if it does not, and one ring wakes it again and again, it passes
//! the role on and stays with that ring (`attend`).
//! (A timer armed for each job would bound this more tightly, but costs 10 µs on a virtual machine.)
//! Invariant D1: see `endpoint`. Invariant D2: a thread in a job leads for at most two [`WATCH_TICK`]s.
//! Invariant BOUNDED: dialing, greeting and draining have deadlines, checked by the leader. Heartbeats are sent, and missed, by
//! the watchdog's thread, whatever the leader does.

mod accept;
mod attend;
mod engine;
mod job;
mod pool;
mod simulated;
mod sources;
mod spin;

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::net::{IpAddr, Shutdown};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::thread;
use std::time::{Duration, Instant};

use farcall_device::{Device, Runtime, is_forked_child};
use rustix::event::epoll::EventFlags;

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use accept::{Awaited, Parsed, parse_message};
use engine::{Engine, System};
pub use job::{Job, JobCost, Turn};
pub(crate) use pool::BEATS_MISSED;
use pool::{Pool, WATCH_TICK, guarded};
pub(crate) use sources::Registration;
use sources::{LINGER, Source, Sources, close_all};
pub(crate) use spin::Seen;
pub use spin::Spin;

use crate::endpoint::{Endpoint, lock};
use crate::frame::Kind;
use crate::key::{self, Nonce};
use crate::negotiate::negotiate;
use crate::sim;
use crate::socket::Socket;
use crate::strangers::Strangers;
#[cfg(feature = "tls")]
use crate::tls::Session;
use crate::tls::Tls;
use crate::{
    Channel, CloseCause, Decision, End, Frame, JobKey, Limits, NoSlabs, Placer, ProtocolError, Route, Small,
    TransferError, Transport, WorkerInfo, local, shm, tcp,
};

/// How often a stopping driver looks whether all goodbyes are taken.
const GOODBYE_TICK: Duration = Duration::from_millis(1);
const WAKE: u64 = 0;
/// Of TCP, and of the Unix socket.
const LISTENERS: [u64; 2] = [1, 2];
const FIRST_TOKEN: u64 = 3;
const EVENTS: usize = 64;

/// What an agent makes of the peers that dial it.
pub trait Service: Send + Sync + 'static {
    /// A peer said hello; gives what handles its frames. Called by the leader; must not block.
    ///
    /// # Errors
    /// Why it is not let in, which it is told.
    fn on_open(&self, remote: &WorkerInfo) -> Result<Arc<dyn Peer>, CloseCause>;
    /// Fails what is overdue beyond any endpoint; gives the next deadline.
    fn on_timer(&self, now: Instant) -> Option<Instant>;
}

/// The agent's view of one endpoint. Called by whichever thread drives it; no method may block.
pub trait Peer: Send + Sync + 'static {
    /// The peer is known by its own word ([`Endpoint::remote`]). On the side that was dialed it is welcomed, too, and frames may
    /// be sent from now on.
    fn on_opened(self: Arc<Self>, endpoint: &Arc<Endpoint>);
    /// A frame arrived, tensors included.
    ///
    /// # Errors
    /// A [`ProtocolError`] closes the endpoint.
    fn on_frame(&self, endpoint: &Arc<Endpoint>, frame: Frame, turn: &mut Turn) -> Result<(), ProtocolError>;
    /// As [`Peer::on_frame`], of a frame that lies in the reader's buffer still.
    ///
    /// # Errors
    /// As of [`Peer::on_frame`].
    fn on_small(&self, endpoint: &Arc<Endpoint>, small: &Small<'_>, turn: &mut Turn) -> Result<(), ProtocolError> {
        self.on_frame(endpoint, small.to_frame(), turn)
    }
    /// The endpoint closed. Called once.
    fn on_closed(&self, endpoint: &Arc<Endpoint>, cause: &Arc<CloseCause>);
    /// Fails what is overdue; gives the next deadline.
    fn on_timer(&self, endpoint: &Arc<Endpoint>, now: Instant) -> Option<Instant>;
    /// A reply with tensors begins: who has memory for them, if the caller of that call has.
    fn placer(&self, call: u64) -> Option<Arc<dyn Placer>> {
        let _ = call;
        None
    }
}

/// How a [`Driver`] is set up.
#[derive(Clone, Debug)]
pub struct DriverConfig {
    /// What this worker says of itself; its `address` is where the listener binds, port 0 for any.
    pub worker: WorkerInfo,
    /// Workers of other groups are refused.
    pub group: String,
    /// Bounds on what peers may send.
    pub limits: Limits,
    /// Where received tensors live.
    pub runtime: Runtime,
    /// From the first packet to the welcome.
    pub connect_timeout: Duration,
    /// How long a peer may be silent, at most, until it counts as lost. It is sent a ping four times as often, and must do the
    /// same: both sides of a connection should agree.
    pub peer_timeout: Duration,
    /// Handlers that run at a time; those that wait in [`Driver::blocking`] are not counted. More wait for a thread.
    pub handlers_max: usize,
    /// Threads at most, handlers that block included.
    pub threads_max: usize,
    /// Every connection must prove it, in both directions. Without one, only loopback is listened on.
    pub key: Option<JobKey>,
    /// The address that others are told, for who listens on all of them.
    pub advertise: Option<IpAddr>,
    /// Which sockets are listened on and dialed.
    pub transport: Transport,
    /// Tensors pass in slabs to workers of the same user on this host, where the system lets them.
    pub slabs: bool,
    /// Connections over TCP are encrypted, and both sides show certificates.
    pub tls: Option<Tls>,
    /// Whether threads look for work before they sleep.
    pub spin: Spin,
}

/// See the module.
pub struct Driver {
    config: DriverConfig,
    /// Why this worker passes no slabs to anyone.
    no_slabs: Option<NoSlabs>,
    engine: Engine,
    listeners: Vec<Registration>,
    /// No descriptors were left: no accepting until then.
    accept_paused_until: Mutex<Option<Instant>>,
    service: Mutex<Option<Arc<dyn Service>>>,
    sources: Mutex<Sources>,
    strangers: Mutex<Strangers>,
    /// Connections refused for want of the job's key, or of the right user.
    unproven: AtomicU64,
    /// Dials that went over TCP because a Unix socket failed.
    fallbacks: AtomicU64,
    /// Endpoints with replies that wait for company. Shared, so that who takes the leading role from a busy thread sends
    /// what that thread has left behind.
    unflushed: Mutex<Vec<Arc<Endpoint>>>,
    /// Endpoints whose rings the leader looks at by itself, because something came lately.
    hot: Mutex<Vec<Arc<Endpoint>>>,
    /// What leaders have seen of spinning.
    spin: Seen,
    /// The one whose ring a thread stays with (ATTEND), and the number of the job that the thread runs meanwhile; 0 while it runs
    /// none, or a long one.
    attended: Mutex<Option<Arc<Endpoint>>>,
    attended_job: AtomicU64,
    /// Such jobs so far.
    attended_jobs: AtomicU64,
    /// Times that the leader has found something without asking the system.
    looks: AtomicU32,
    next_token: AtomicU64,
    bulk_keys: Mutex<HashMap<u128, Weak<Endpoint>>>,
    pool: Mutex<Pool>,
    work: Condvar,
    ended: Condvar,
    /// Counts leaders; a leader whose number it is not has lost the role.
    term: AtomicU64,
    /// The number of the leader that is in a job; 0 while none is.
    busy_term: AtomicU64,
    /// Jobs that leaders have begun.
    jobs_begun: AtomicU64,
    /// The watchdog ticks.
    watching: AtomicBool,
    /// The leader has read frames of a socket since it last slept.
    pub(crate) by_socket: AtomicBool,
    /// Endpoints with frames that wait for others: a tick later they have waited long enough.
    gathered: Mutex<Vec<Arc<Endpoint>>>,
    /// Heartbeats so far: the clock that silence is measured by. It stands still while this process does.
    beats: AtomicU32,
    /// There may be somebody to send heartbeats to.
    beating: AtomicBool,
    started: Instant,
    /// Microseconds after `started` at which deadlines must be looked at.
    next_timer_us: AtomicU64,
    /// The leader sleeps until then, or for ever: an earlier timer must wake it.
    sleeping_until_us: AtomicU64,
}

impl std::fmt::Debug for Driver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Driver").field("worker", &self.config.worker).finish_non_exhaustive()
    }
}

impl Driver {
    /// Binds the listener; nothing runs until [`Self::start`].
    ///
    /// # Errors
    /// [`TransferError::NotLoopback`], [`TransferError::Unaddressed`], or the system call that failed.
    pub fn bind(mut config: DriverConfig) -> Result<Arc<Self>, TransferError> {
        let mut listeners = Vec::new();
        if config.transport != Transport::Unix {
            let listener = Self::listen_tcp(&mut config)?;
            listeners.push(Registration::new(LISTENERS[0], Socket::System(listener)));
        }
        config.worker.local = None;
        if config.transport != Transport::Tcp {
            match local::listen() {
                Ok((listener, address)) => {
                    listeners.push(Registration::new(LISTENERS[1], Socket::System(listener)));
                    config.worker.local = Some(address);
                }
                Err(error) if config.transport == Transport::Auto => {
                    tracing::warn!(%error, "no Unix socket; this worker is reached by TCP alone")
                }
                Err(error) => return Err(TransferError::os("listen on a Unix socket")(error)),
            }
        }
        Ok(Self::with(config, Engine::System(System::new()?), listeners))
    }

    /// As [`Self::bind`], on a host of a simulated network: no socket, no thread and no clock but the simulation's.
    ///
    /// # Errors
    /// Another worker of that host listens at the address.
    pub fn bind_simulated(mut config: DriverConfig, host: &sim::Host) -> Result<Arc<Self>, TransferError> {
        config.worker.local = None;
        let listener = host.listen(config.worker.address).map_err(TransferError::os("listen"))?;
        let listener = Registration::new(LISTENERS[0], Socket::Simulated(listener));
        let driver = Self::with(config, Engine::Simulated(host.clone()), vec![listener]);
        host.attach(&driver);
        Ok(driver)
    }

    fn with(config: DriverConfig, engine: Engine, listeners: Vec<Registration>) -> Arc<Self> {
        let greetings_max = accept::greetings_max(config.tls.is_some());
        let no_slabs = shm::no_slabs(config.slabs);
        let spin = config.spin;
        if let Some(NoSlabs::Refused { reason }) = &no_slabs {
            tracing::warn!(reason, "tensors to workers on this host are copied");
        }
        Arc::new(Self {
            config,
            no_slabs,
            started: engine.now(),
            engine,
            listeners,
            accept_paused_until: Mutex::new(None),
            service: Mutex::new(None),
            sources: Mutex::default(),
            strangers: Mutex::new(Strangers::new(greetings_max)),
            unproven: AtomicU64::new(0),
            fallbacks: AtomicU64::new(0),
            unflushed: Mutex::default(),
            hot: Mutex::default(),
            spin: Seen::new(spin),
            attended: Mutex::default(),
            attended_job: AtomicU64::new(0),
            attended_jobs: AtomicU64::new(0),
            looks: AtomicU32::new(0),
            next_token: AtomicU64::new(FIRST_TOKEN),
            bulk_keys: Mutex::default(),
            pool: Mutex::new(Pool {
                jobs: VecDeque::new(),
                running: 0,
                idle: 0,
                threads: HashSet::new(),
                led: false,
                stop: false,
            }),
            work: Condvar::new(),
            ended: Condvar::new(),
            term: AtomicU64::new(0),
            busy_term: AtomicU64::new(0),
            jobs_begun: AtomicU64::new(0),
            watching: AtomicBool::new(false),
            by_socket: AtomicBool::new(false),
            gathered: Mutex::default(),
            beats: AtomicU32::new(0),
            beating: AtomicBool::new(false),
            next_timer_us: AtomicU64::new(u64::MAX),
            sleeping_until_us: AtomicU64::new(0),
        })
    }

    fn listen_tcp(config: &mut DriverConfig) -> Result<socket2::Socket, TransferError> {
        let address = config.worker.address;
        if !address.ip().is_loopback() && config.key.is_none() && config.tls.is_none() {
            return Err(TransferError::NotLoopback { address });
        }
        if address.ip().is_unspecified() && config.advertise.is_none() {
            return Err(TransferError::Unaddressed { address });
        }
        let listener = tcp::listen(address).map_err(TransferError::os("listen"))?;
        config.worker.address =
            listener.local_addr().map_err(TransferError::os("getsockname"))?.as_socket().unwrap_or(address);
        if let Some(advertised) = config.advertise {
            config.worker.address.set_ip(advertised);
        }
        Ok(listener)
    }

    /// Starts to accept and to drive.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn start(self: &Arc<Self>, service: Arc<dyn Service>) -> Result<(), TransferError> {
        *lock(&self.service) = Some(service);
        for listener in &self.listeners {
            *lock(&listener.0.interest) = EventFlags::IN;
            self.engine
                .add(listener.token(), listener.socket(), EventFlags::IN)
                .map_err(|errno| TransferError::os("epoll_ctl")(errno.into()))?;
        }
        if matches!(self.engine, Engine::Simulated(_)) {
            return Ok(());
        }
        let mut pool = lock(&self.pool);
        self.spawn_thread(&mut pool).map_err(TransferError::os("thread spawn"))?;
        let driver = Arc::clone(self);
        let watchdog = thread::Builder::new().name("farcall-watch".into()).spawn(move || driver.watch());
        pool.threads.insert(watchdog.map_err(TransferError::os("thread spawn"))?.thread().id());
        Ok(())
    }

    /// How it was set up; `worker.address` is where it listens.
    pub fn config(&self) -> &DriverConfig {
        &self.config
    }

    /// Puts TLS before a TCP socket, dialed if there is an address, if there is to be TLS.
    #[cfg(feature = "tls")]
    fn encrypt(&self, socket: socket2::Socket, dialed: Option<IpAddr>) -> std::io::Result<socket2::Socket> {
        let Some(tls) = &self.config.tls else { return Ok(socket) };
        let session = dialed.map_or_else(|| tls.acceptor(), |address| tls.dialer(address));
        Session::start(self, socket, session.map_err(std::io::Error::other)?, dialed.is_none())
    }

    #[cfg(not(feature = "tls"))]
    fn encrypt(&self, socket: socket2::Socket, _dialed: Option<IpAddr>) -> std::io::Result<socket2::Socket> {
        match &self.config.tls {
            None => Ok(socket),
            Some(never) => match *never {},
        }
    }

    /// Why this worker passes no slabs to anyone; `None` if it does.
    pub(crate) fn no_slabs(&self) -> Option<&NoSlabs> {
        self.no_slabs.as_ref()
    }

    /// Has the leader flush the endpoint in its next turn, and take that turn soon. From any thread; it never blocks.
    pub(crate) fn flush_soon(&self, endpoint: &Arc<Endpoint>) {
        lock(&self.unflushed).push(Arc::clone(endpoint));
        if self.sleeping_until_us.load(Ordering::SeqCst) != 0 {
            self.wake_leader();
        }
    }

    /// Has the watchdog write what the endpoint gathers, if nobody else does.
    pub(crate) fn watch_gathered(&self, endpoint: &Arc<Endpoint>) {
        // Who lists says so after it has gathered, who flushes looks what is gathered after it has unlisted: one sees the other.
        if endpoint.listed.swap(true, Ordering::SeqCst) {
            return;
        }
        // Before it is seen whether the watchdog ticks: it looks here again before it stops.
        lock(&self.gathered).push(Arc::clone(endpoint));
        if !self.watching.swap(true, Ordering::SeqCst) {
            self.tick_watchdog(WATCH_TICK);
        }
    }

    /// At a tick; whether there was any. One that gathers again meanwhile is listed again, or flushed here.
    fn flush_listed(&self) -> bool {
        // Not under the lock: it is taken under `tx`.
        let listed = std::mem::take(&mut *lock(&self.gathered));
        for endpoint in &listed {
            endpoint.listed.swap(false, Ordering::SeqCst);
            guarded(endpoint, || {
                endpoint.flush_gathered();
                false
            });
        }
        !listed.is_empty()
    }

    /// Whether a thread stays with one ring now, as calls come by it one after the other.
    pub fn attends(&self) -> bool {
        lock(&self.attended).is_some()
    }

    /// How often TCP was dialed because a Unix socket that should have led there did not.
    pub fn unix_fallbacks(&self) -> u64 {
        self.fallbacks.load(Ordering::Relaxed)
    }

    /// Which channel takes `bytes` of a device here to one of `target`'s (in this order), and why the others do not.
    pub fn decide(&self, target: &WorkerInfo, [here, there]: [Device; 2], bytes: u64) -> Decision {
        let DriverConfig { worker, transport, limits, .. } = &self.config;
        let here = End { local: worker.local.as_ref(), device: here, no_slabs: self.no_slabs() };
        let there = End { local: target.local.as_ref(), device: there, no_slabs: None };
        negotiate(*transport, &here, &there, bytes, limits)
    }

    /// Connects to `target`, by a Unix socket if it is near. A TCP socket becomes writable once that succeeded or failed.
    pub(crate) fn connect(&self, target: &WorkerInfo) -> Result<(Socket, Route), TransferError> {
        if let Engine::Simulated(host) = &self.engine {
            let (route, socket) = (Route::Tcp(target.address), host.connect(target.address));
            return Ok((Socket::Simulated(socket), route));
        }
        let channel = self.decide(target, [Device::HOST; 2], 0).taken();
        if let (Some(Channel::Unix | Channel::Shm), Some(address)) = (channel, &target.local) {
            match local::connect(address) {
                Ok(socket) => return Ok((Socket::System(socket), Route::Unix(Arc::new(address.clone())))),
                Err(error) if self.config.transport == Transport::Auto => {
                    let fallbacks = self.fallbacks.fetch_add(1, Ordering::Relaxed) + 1;
                    tracing::debug!(%error, peer = %target.id, fallbacks, "no Unix socket; dialing TCP");
                }
                Err(error) => {
                    let (route, source) = (Route::Unix(Arc::new(address.clone())), Arc::new(error));
                    return Err(TransferError::Connect { route, source });
                }
            }
        } else if channel.is_none() {
            return Err(TransferError::Elsewhere { worker: target.id.clone() });
        }
        let route = Route::Tcp(target.address);
        match tcp::connect(target.address).and_then(|socket| self.encrypt(socket, Some(target.address.ip()))) {
            Ok(socket) => Ok((Socket::System(socket), route)),
            Err(error) => Err(TransferError::Connect { route, source: Arc::new(error) }),
        }
    }

    /// Closes every endpoint with [`CloseCause::LocalShutdown`], lets their goodbyes leave, and ends the threads.
    ///
    /// Blocks until the threads have ended, at most for `timeout`: a handler that goes on keeps its thread until it
    /// returns. Called from a job, it waits for the other threads. Idempotent.
    pub fn stop(self: &Arc<Self>, timeout: Duration) {
        if is_forked_child() {
            // The threads are the parent's, and so may be the locks.
            return;
        }
        let deadline = Instant::now() + timeout;
        self.say_goodbye();
        let on_own_thread = lock(&self.pool).threads.contains(&thread::current().id());
        if !on_own_thread && !matches!(self.engine, Engine::Simulated(_)) {
            self.await_goodbyes(deadline.min(Instant::now() + LINGER));
        }
        lock(&self.pool).stop = true;
        self.send_attendant_away();
        self.work.notify_all();
        self.wake_leader();
        self.tick_watchdog(WATCH_TICK);
        let mut pool = lock(&self.pool);
        while pool.threads.len() > usize::from(on_own_thread) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                tracing::warn!(threads = pool.threads.len(), "handlers still run after shutdown");
                break;
            }
            pool = match self.ended.wait_timeout(pool, left) {
                Ok((pool, _)) => pool,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        // What is dropped here may run foreign code: not under these locks.
        let jobs = std::mem::take(&mut pool.jobs);
        drop(pool);
        drop(jobs);
        // Accepted or dialed while the threads ended; from now on none is added.
        let rest = lock(&self.sources).close();
        close_all(rest);
        // Endpoints hold the driver: nobody comes to flush those that a late drop of a tensor has left here.
        let unflushed = std::mem::take(&mut *lock(&self.unflushed));
        let hot = std::mem::take(&mut *lock(&self.hot));
        let gathered = std::mem::take(&mut *lock(&self.gathered));
        drop((unflushed, hot, gathered));
        let service = lock(&self.service).take();
        drop(service);
    }

    /// Lets nobody in any more, and closes every endpoint. The first part of [`Self::stop`], for simulations: there nobody
    /// waits for the second.
    pub(crate) fn say_goodbye(&self) {
        // Nobody may dial in any more: a backlog would keep the dialers waiting.
        for listener in &self.listeners {
            self.remove(listener);
            let _ = listener.socket().shutdown(Shutdown::Both);
        }
        let sources: Vec<Source> = lock(&self.sources).values().cloned().collect();
        close_all(sources);
    }

    /// Waits until the peers have taken their goodbyes, so that no reset overtakes them.
    fn await_goodbyes(&self, deadline: Instant) {
        while Instant::now() < deadline
            && lock(&self.sources).values().any(|source| matches!(source, Source::Draining(..)))
        {
            thread::sleep(GOODBYE_TICK);
        }
    }

    /// Runs `job` on the pool, from any thread. `false`: the driver has stopped, and dropped the job.
    pub fn spawn(&self, job: Job) -> bool {
        let mut pool = lock(&self.pool);
        if pool.stop {
            drop(pool);
            return false;
        }
        pool.jobs.push_back(job);
        // Of the idle, some may be on their way to earlier jobs: a job too many is the leader's, who must not sleep on it.
        let idle = pool.idle >= pool.jobs.len();
        drop(pool);
        if idle {
            self.work.notify_one()
        } else {
            self.wake_leader()
        }
        true
    }

    /// Makes the leader look at the deadlines at `when`.
    pub fn schedule(&self, when: Instant) {
        let when_us = self.micros(when);
        // Who takes the timer looks for what is due afterwards, so that what it was set for before this is seen then, too.
        if self.next_timer_us.load(Ordering::SeqCst) > when_us {
            self.next_timer_us.fetch_min(when_us, Ordering::SeqCst);
        }
        match &self.engine {
            Engine::Simulated(host) => host.arm_timer(when),
            Engine::System(_) if when_us < self.sleeping_until_us.load(Ordering::SeqCst) => self.wake_leader(),
            Engine::System(_) => {}
        }
    }

    /// The number of the last heartbeat.
    pub(crate) fn beats(&self) -> u32 {
        self.beats.load(Ordering::Relaxed)
    }

    fn micros(&self, when: Instant) -> u64 {
        let since = when.saturating_duration_since(self.started);
        since.as_secs().saturating_mul(1_000_000).saturating_add(u64::from(since.subsec_micros()))
    }

    fn wake_leader(&self) {
        match &self.engine {
            // Full means a wake-up is pending already.
            Engine::System(system) => drop(rustix::io::write(&system.wake, &1_u64.to_ne_bytes())),
            Engine::Simulated(host) => host.queue_job(),
        }
    }

    /// The time that all deadlines of this worker are measured by.
    pub fn now(&self) -> Instant {
        self.engine.now()
    }

    /// Random bytes for one use.
    pub(crate) fn fresh(&self) -> io::Result<Nonce> {
        match &self.engine {
            Engine::System(_) => key::fresh(),
            Engine::Simulated(host) => Ok(host.fresh()),
        }
    }

    /// How often a frame of `kind` is sent: once, unless a simulation loses or doubles it.
    pub fn copies(&self, kind: Kind) -> usize {
        match &self.engine {
            Engine::System(_) => 1,
            Engine::Simulated(host) => host.copies(kind),
        }
    }

    /// Where this worker lives, if that is in a simulation.
    pub fn simulated(&self) -> Option<&sim::Host> {
        match &self.engine {
            Engine::System(_) => None,
            Engine::Simulated(host) => Some(host),
        }
    }
}
