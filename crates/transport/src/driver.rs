//! One per agent: watches the sockets, accepts and dials, keeps time, and runs handlers.
//!
//! A small pool of threads shares one epoll set. One of them leads: it waits for events, reads frames and, as no
//! hand-over is faster than none, runs short jobs itself. A job is short while its [`JobCost`] says so: it was so when it
//! ran last. Before any other job the leader passes its role on, to an idle thread or a new one. Should a short job turn
//! out long, the watchdog takes the role away within two ticks. So a short handler costs no thread switch, a long one
//! does not delay others, and heartbeats and replies depend on no handler.
//! (A timer armed for each job would bound this more tightly, but costs 10 µs on a virtual machine.)
//! Invariant D1: see `endpoint`. Invariant D2: a thread in a job leads for at most two [`WATCH_TICK`]s.
//! Invariant BOUNDED: dialing, greeting and draining have deadlines, checked by the leader.

use std::collections::{HashMap, HashSet, VecDeque};
use std::mem::MaybeUninit;
use std::net::{Shutdown, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::thread;
use std::time::{Duration, Instant};

use farcall_device::Runtime;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::io::Errno;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime};
use socket2::Socket;

use crate::address::{Goodbye, Hello, Reason, Role};
use crate::endpoint::{Endpoint, greeting, lock, lost, read_greeting, write_greeting};
use crate::frame::{HEADER_BYTES, Header, Kind, MAGIC, VERSION};
use crate::tcp::{self, Progress};
use crate::{CloseCause, Frame, Limits, ProtocolError, TransferError, WorkerInfo};

/// How often the watchdog looks at a leader that runs jobs.
const WATCH_TICK: Duration = Duration::from_millis(1);
/// Ticks without a job after which the watchdog sleeps.
const WATCH_IDLE_TICKS: u32 = 20;
/// A job up to this long is short: a switch of threads would cost about as much.
const SHORT: Duration = Duration::from_micros(50);
/// Short runs in a row after a long one until a job counts as short again.
const PROBATION: u8 = 4;
/// How long replies of one batch may wait for each other.
const FLUSH_AFTER: Duration = Duration::from_micros(20);
/// How long a thread without work stays.
const IDLE_EXIT: Duration = Duration::from_secs(5);
/// How long a closed connection is read on, so that the goodbye is not lost to a reset.
const LINGER: Duration = Duration::from_millis(500);
/// How often a stopping driver looks whether all goodbyes are taken.
const GOODBYE_TICK: Duration = Duration::from_millis(1);
const WAKE: u64 = 0;
const LISTENER: u64 = 1;
const FIRST_TOKEN: u64 = 2;
const EVENTS: usize = 64;
/// Accepted per event, so that a flood of dialers does not starve the connected.
const ACCEPTS: usize = 64;
/// How long accepting pauses when it fails.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Connections that may be in their greeting at once.
const GREETINGS_MAX: usize = 1024;

/// Work for the pool: usually a handler with its call.
pub struct Job {
    run: Box<dyn FnOnce(&mut Turn) + Send>,
    cost: Arc<JobCost>,
}

impl Job {
    /// A job of the kind that `cost` keeps account of.
    pub fn new(cost: &Arc<JobCost>, run: impl FnOnce(&mut Turn) + Send + 'static) -> Self {
        Self { run: Box::new(run), cost: Arc::clone(cost) }
    }

    /// Whatever the job does, the thread and its role survive. Handlers' panics are caught, and reported to their callers,
    /// before they get here.
    fn run(self, turn: &mut Turn) {
        let started = Instant::now();
        if catch_unwind(AssertUnwindSafe(|| (self.run)(turn))).is_err() {
            tracing::error!("a job of the driver panicked");
        }
        self.cost.record(started.elapsed());
    }
}

/// What jobs of one kind, such as the calls of one function, have cost lately: short enough for the leader, or not.
#[derive(Debug)]
pub struct JobCost {
    /// Short runs still to come before the kind counts as short. A race of two updates loses one of them: harmless.
    probation: AtomicU8,
}

impl Default for JobCost {
    /// Unknown: the first run decides.
    fn default() -> Self {
        Self { probation: AtomicU8::new(1) }
    }
}

impl JobCost {
    fn is_short(&self) -> bool {
        self.probation.load(Ordering::Relaxed) == 0
    }

    fn record(&self, took: Duration) {
        let left = self.probation.load(Ordering::Relaxed);
        let next = if took > SHORT { PROBATION } else { left.saturating_sub(1) };
        if next != left {
            self.probation.store(next, Ordering::Relaxed);
        }
    }
}

/// What one thread has gathered to do before it sleeps again.
#[derive(Default)]
pub struct Turn {
    jobs: Vec<Job>,
    dirty: Vec<Arc<Endpoint>>,
}

impl Turn {
    /// Runs `job` on the pool once the frames at hand are read.
    pub fn spawn(&mut self, job: Job) {
        self.jobs.push(job);
    }

    pub(crate) fn flush_later(&mut self, endpoint: &Arc<Endpoint>) {
        if !self.dirty.iter().any(|dirty| Arc::ptr_eq(dirty, endpoint)) {
            self.dirty.push(Arc::clone(endpoint));
        }
    }

    fn flush(&mut self) {
        for endpoint in self.dirty.drain(..) {
            endpoint.flush();
        }
    }
}

/// What an agent makes of the peers that dial it.
pub trait Service: Send + Sync + 'static {
    /// A peer said hello; gives what handles its frames. Called by the leader; must not block.
    fn on_open(&self, remote: &WorkerInfo) -> Arc<dyn Peer>;
    /// Fails what is overdue beyond any endpoint; gives the next deadline.
    fn on_timer(&self, now: Instant) -> Option<Instant>;
}

/// The agent's view of one endpoint. Called by whichever thread drives it; no method may block.
pub trait Peer: Send + Sync + 'static {
    /// The peer was let in and welcomed: from now on frames may be sent. Not called for endpoints that this side dialed.
    fn on_opened(self: Arc<Self>, endpoint: &Arc<Endpoint>);
    /// A frame arrived, tensors included.
    ///
    /// # Errors
    /// A [`ProtocolError`] closes the endpoint.
    fn on_frame(&self, endpoint: &Arc<Endpoint>, frame: Frame, turn: &mut Turn) -> Result<(), ProtocolError>;
    /// The endpoint closed. Called once.
    fn on_closed(&self, endpoint: &Arc<Endpoint>, cause: &Arc<CloseCause>);
    /// Fails what is overdue; gives the next deadline.
    fn on_timer(&self, endpoint: &Arc<Endpoint>, now: Instant) -> Option<Instant>;
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
    /// From the first packet to the welcome. Default 5 s.
    pub connect_timeout: Duration,
    /// Threads at most, handlers that block included. Default 1,024.
    pub threads_max: usize,
}

#[derive(Clone)]
enum Source {
    Greeting(Arc<Greeting>),
    Control(Arc<Endpoint>),
    Bulk(Arc<Endpoint>, Registration),
    Draining(Registration, Instant),
}

/// What the sockets in the epoll set belong to.
#[derive(Default)]
struct Sources {
    by_token: HashMap<u64, Source>,
    /// The driver has stopped: nothing is added any more.
    closed: bool,
}

impl Sources {
    fn close(&mut self) -> Vec<Source> {
        self.closed = true;
        std::mem::take(&mut self.by_token).into_values().collect()
    }

    fn values(&self) -> impl Iterator<Item = &Source> {
        self.by_token.values()
    }
}

fn close_all(sources: Vec<Source>) {
    for source in sources {
        if let Source::Control(endpoint) = source {
            endpoint.close(CloseCause::LocalShutdown);
        }
    }
}

/// A socket in the epoll set, with the events it waits for.
#[derive(Clone)]
pub(crate) struct Registration(Arc<RegistrationInner>);

struct RegistrationInner {
    token: u64,
    socket: Socket,
    interest: Mutex<EventFlags>,
}

impl Registration {
    fn new(token: u64, socket: Socket) -> Self {
        Self(Arc::new(RegistrationInner { token, socket, interest: Mutex::new(EventFlags::empty()) }))
    }

    pub(crate) fn socket(&self) -> &Socket {
        &self.0.socket
    }

    /// Starts or stops to wait for `flag`; a system call only when that changes something.
    pub(crate) fn want(&self, driver: &Driver, flag: EventFlags, on: bool) {
        let mut interest = lock(&self.0.interest);
        if interest.contains(flag) != on {
            interest.set(flag, on);
            self.apply(driver, *interest);
        }
    }

    pub(crate) fn set(&self, driver: &Driver, flags: EventFlags) {
        let mut interest = lock(&self.0.interest);
        *interest = flags;
        self.apply(driver, flags);
    }

    fn apply(&self, driver: &Driver, flags: EventFlags) {
        match epoll::modify(&driver.epoll, &self.0.socket, EventData::new_u64(self.0.token), flags) {
            // Not in the set: not added yet, or the endpoint closed meanwhile.
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => tracing::warn!(%error, "epoll_ctl"),
        }
    }
}

/// An accepted connection whose hello is not complete.
struct Greeting {
    registration: Registration,
    deadline: Instant,
    bytes: Mutex<Vec<u8>>,
}

struct Pool {
    jobs: VecDeque<Job>,
    idle: usize,
    /// Those that were started and have not ended, the watchdog's too.
    threads: HashSet<thread::ThreadId>,
    led: bool,
    stop: bool,
}

/// See the module.
pub struct Driver {
    config: DriverConfig,
    epoll: OwnedFd,
    wake: OwnedFd,
    watchdog: OwnedFd,
    listener: Registration,
    /// No descriptors were left: no accepting until then.
    accept_paused_until: Mutex<Option<Instant>>,
    service: Mutex<Option<Arc<dyn Service>>>,
    sources: Mutex<Sources>,
    /// Endpoints with replies that wait for company. Shared, so that who takes the leading role from a busy thread sends
    /// what that thread has left behind.
    unflushed: Mutex<Vec<Arc<Endpoint>>>,
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
    /// [`TransferError::NotLoopback`], or the system call that failed.
    pub fn bind(mut config: DriverConfig) -> Result<Arc<Self>, TransferError> {
        let address = config.worker.address;
        if !address.ip().is_loopback() {
            return Err(TransferError::NotLoopback { address });
        }
        let os = |call| move |errno: Errno| TransferError::os(call)(errno.into());
        let listener = tcp::listen(address).map_err(TransferError::os("listen"))?;
        config.worker.address =
            listener.local_addr().map_err(TransferError::os("getsockname"))?.as_socket().unwrap_or(address);
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(os("epoll_create"))?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(os("eventfd"))?;
        let watchdog =
            timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC).map_err(os("timerfd_create"))?;
        epoll::add(&epoll, &wake, EventData::new_u64(WAKE), EventFlags::IN).map_err(os("epoll_ctl"))?;
        Ok(Arc::new(Self {
            config,
            epoll,
            wake,
            watchdog,
            listener: Registration::new(LISTENER, listener),
            accept_paused_until: Mutex::new(None),
            service: Mutex::new(None),
            sources: Mutex::default(),
            unflushed: Mutex::default(),
            next_token: AtomicU64::new(FIRST_TOKEN),
            bulk_keys: Mutex::default(),
            pool: Mutex::new(Pool { jobs: VecDeque::new(), idle: 0, threads: HashSet::new(), led: false, stop: false }),
            work: Condvar::new(),
            ended: Condvar::new(),
            term: AtomicU64::new(0),
            busy_term: AtomicU64::new(0),
            jobs_begun: AtomicU64::new(0),
            watching: AtomicBool::new(false),
            started: Instant::now(),
            next_timer_us: AtomicU64::new(u64::MAX),
            sleeping_until_us: AtomicU64::new(0),
        }))
    }

    /// Starts to accept and to drive.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn start(self: &Arc<Self>, service: Arc<dyn Service>) -> Result<(), TransferError> {
        *lock(&self.service) = Some(service);
        *lock(&self.listener.0.interest) = EventFlags::IN;
        epoll::add(&self.epoll, self.listener.socket(), EventData::new_u64(LISTENER), EventFlags::IN)
            .map_err(|errno| TransferError::os("epoll_ctl")(errno.into()))?;
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

    /// Closes every endpoint with [`CloseCause::LocalShutdown`], lets their goodbyes leave, and ends the threads.
    ///
    /// Blocks until the threads have ended, at most for `timeout`: a handler that goes on keeps its thread until it
    /// returns. Called from a job, it waits for the other threads. Idempotent.
    pub fn stop(self: &Arc<Self>, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        // Nobody may dial in any more: a backlog would keep the dialers waiting.
        self.remove(&self.listener);
        let _ = self.listener.socket().shutdown(Shutdown::Both);
        let sources: Vec<Source> = lock(&self.sources).values().cloned().collect();
        close_all(sources);
        let on_own_thread = lock(&self.pool).threads.contains(&thread::current().id());
        if !on_own_thread {
            self.await_goodbyes(deadline.min(Instant::now() + LINGER));
        }
        lock(&self.pool).stop = true;
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
        let service = lock(&self.service).take();
        drop(service);
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
        self.next_timer_us.fetch_min(when_us, Ordering::SeqCst);
        if when_us < self.sleeping_until_us.load(Ordering::SeqCst) {
            self.wake_leader();
        }
    }

    fn micros(&self, when: Instant) -> u64 {
        when.saturating_duration_since(self.started).as_micros().min(u128::from(u64::MAX)) as u64
    }

    fn wake_leader(&self) {
        // Full means a wake-up is pending already.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    // ---- threads ----

    fn spawn_thread(self: &Arc<Self>, pool: &mut Pool) -> std::io::Result<()> {
        let driver = Arc::clone(self);
        let handle = thread::Builder::new().name("farcall".into()).spawn(move || driver.work())?;
        pool.threads.insert(handle.thread().id());
        Ok(())
    }

    fn work(self: &Arc<Self>) {
        let mut turn = Turn::default();
        let mut pool = lock(&self.pool);
        while !pool.stop {
            if !pool.led {
                pool.led = true;
                let term = self.term.fetch_add(1, Ordering::SeqCst) + 1;
                drop(pool);
                self.lead(term, &mut turn);
                pool = lock(&self.pool);
            } else if let Some(job) = pool.jobs.pop_front() {
                drop(pool);
                job.run(&mut turn);
                self.finish_turn(&mut turn);
                pool = lock(&self.pool);
            } else {
                pool.idle += 1;
                let (woken, timeout) = match self.work.wait_timeout(pool, IDLE_EXIT) {
                    Ok(result) => result,
                    Err(poisoned) => poisoned.into_inner(),
                };
                pool = woken;
                pool.idle -= 1;
                if timeout.timed_out() && pool.led && pool.jobs.is_empty() {
                    break;
                }
            }
        }
        self.end_thread(pool);
    }

    fn end_thread(&self, mut pool: MutexGuard<'_, Pool>) {
        pool.threads.remove(&thread::current().id());
        self.ended.notify_all();
    }

    fn leads(&self, term: u64) -> bool {
        self.term.load(Ordering::SeqCst) == term
    }

    /// Waits for events and serves them until the role is taken away.
    fn lead(self: &Arc<Self>, term: u64, turn: &mut Turn) {
        self.flush_all();
        while self.leads(term) {
            let backlog = {
                let pool = lock(&self.pool);
                if pool.stop {
                    return;
                }
                self.may_run(&pool)
            };
            self.poll(backlog, turn);
            turn.flush();
            let may_run = {
                let mut pool = lock(&self.pool);
                pool.jobs.extend(turn.jobs.drain(..));
                self.may_run(&pool)
            };
            if may_run {
                self.run_jobs_as_leader(term, turn);
            }
        }
    }

    /// Jobs wait, and the leader may take one: another thread is left to lead. Else they wait for a worker, as replies and
    /// deadlines must not.
    fn may_run(&self, pool: &Pool) -> bool {
        !pool.jobs.is_empty() && (pool.idle > 0 || pool.threads.len() < self.config.threads_max)
    }

    /// Waits for events, unless jobs wait already, and hands them to their sources.
    fn poll(self: &Arc<Self>, backlog: bool, turn: &mut Turn) {
        let mut events = [MaybeUninit::<epoll::Event>::uninit(); EVENTS];
        let timeout = self.timeout(backlog);
        let ready = match epoll::wait(&self.epoll, &mut events, timeout.as_ref()) {
            Ok((ready, _)) => &*ready,
            Err(Errno::INTR) => &[],
            Err(error) => {
                tracing::error!(%error, "epoll_wait");
                &[]
            }
        };
        self.sleeping_until_us.store(0, Ordering::SeqCst);
        for event in ready {
            let (token, flags) = (event.data.u64(), event.flags);
            match token {
                WAKE => {
                    let _ = rustix::io::read(&self.wake, &mut [0_u8; 8]);
                }
                LISTENER => self.accept(),
                _ => self.dispatch_guarded(token, flags, turn),
            }
        }
        if self.micros(Instant::now()) >= self.next_timer_us.load(Ordering::SeqCst) {
            self.run_timers();
        }
    }

    fn timeout(&self, backlog: bool) -> Option<Timespec> {
        if backlog {
            return Some(Timespec { tv_sec: 0, tv_nsec: 0 });
        }
        // Published before the timer is read: a timer set in between either is seen here or sees the sleeper.
        self.sleeping_until_us.store(u64::MAX, Ordering::SeqCst);
        let next = self.next_timer_us.load(Ordering::SeqCst);
        if next == u64::MAX {
            return None;
        }
        self.sleeping_until_us.store(next, Ordering::SeqCst);
        let left = Duration::from_micros(next.saturating_sub(self.micros(Instant::now())));
        Some(Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) })
    }

    /// Runs jobs until none is left or the role is: given away before a long one, or taken by the watchdog.
    fn run_jobs_as_leader(self: &Arc<Self>, term: u64, turn: &mut Turn) {
        let mut waiting_since = None;
        loop {
            let (job, alone) = {
                // One lock for the role, the job and who is busy: `pass_role` takes it, too.
                let mut pool = lock(&self.pool);
                if !self.leads(term) || !self.may_run(&pool) {
                    break;
                }
                let Some(job) = pool.jobs.pop_front() else { break };
                let alone = !job.cost.is_short() && self.pass_role(&mut pool, term);
                if !alone {
                    self.jobs_begun.fetch_add(1, Ordering::SeqCst);
                    self.busy_term.store(term, Ordering::SeqCst);
                }
                (job, alone)
            };
            if alone {
                self.work.notify_one();
                self.flush_all();
            } else if !self.watching.swap(true, Ordering::SeqCst) {
                self.tick_watchdog(WATCH_TICK);
            }
            job.run(turn);
            // Fails when the role was taken away: then it speaks of another leader.
            let _ = self.busy_term.compare_exchange(term, 0, Ordering::SeqCst, Ordering::SeqCst);
            // What the job has spawned is next, here or with whoever leads now.
            for job in turn.jobs.drain(..) {
                self.spawn(job);
            }
            if !turn.dirty.is_empty() {
                lock(&self.unflushed).append(&mut turn.dirty);
                waiting_since.get_or_insert_with(Instant::now);
            }
            if alone || waiting_since.is_some_and(|since| since.elapsed() > FLUSH_AFTER) {
                self.flush_all();
                waiting_since = None;
            }
        }
        self.flush_all();
    }

    /// Takes the role from the leader of `term` and finds another thread for it, which the caller must notify. `false`: that
    /// one does not lead any more, or no thread can be had; then the watchdog tries again.
    fn pass_role(self: &Arc<Self>, pool: &mut Pool, term: u64) -> bool {
        if !self.leads(term) || pool.stop {
            return false;
        }
        if pool.idle == 0
            && let Err(error) = self.spawn_thread(pool)
        {
            tracing::error!(%error, "no thread to lead while a handler runs");
            return false;
        }
        pool.led = false;
        self.term.fetch_add(1, Ordering::SeqCst);
        true
    }

    fn flush_all(&self) {
        let unflushed = std::mem::take(&mut *lock(&self.unflushed));
        for (index, endpoint) in unflushed.iter().enumerate() {
            // Few endpoints, often many times: one flush each.
            if !unflushed[..index].iter().any(|earlier| Arc::ptr_eq(earlier, endpoint)) {
                endpoint.flush();
            }
        }
    }

    /// Sends what a turn gathered, and gives its jobs to the pool.
    pub(crate) fn finish_turn(&self, turn: &mut Turn) {
        turn.flush();
        for job in turn.jobs.drain(..) {
            self.spawn(job);
        }
    }

    /// Makes the watchdog look every `period`; zero for never.
    fn tick_watchdog(&self, period: Duration) {
        let period = Timespec { tv_sec: 0, tv_nsec: period.as_nanos() as i64 };
        let timer = Itimerspec { it_interval: period, it_value: period };
        if let Err(error) = timerfd_settime(&self.watchdog, TimerfdTimerFlags::empty(), &timer) {
            tracing::error!(%error, "timerfd_settime");
        }
    }

    /// The watchdog's thread: takes the leading role from a thread whose job has lasted a tick.
    fn watch(self: &Arc<Self>) {
        let (mut seen, mut idle_ticks) = (0, 0);
        loop {
            match rustix::io::read(&self.watchdog, &mut [0_u8; 8]) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "watchdog");
                    return self.end_thread(lock(&self.pool));
                }
            }
            let mut pool = lock(&self.pool);
            if pool.stop {
                return self.end_thread(pool);
            }
            let begun = self.jobs_begun.load(Ordering::SeqCst);
            let busy_term = self.busy_term.load(Ordering::SeqCst);
            if begun != seen {
                (seen, idle_ticks) = (begun, 0);
            } else if busy_term != 0 && self.leads(busy_term) {
                if self.pass_role(&mut pool, busy_term) {
                    self.work.notify_one();
                }
            } else {
                idle_ticks += 1;
            }
            drop(pool);
            if idle_ticks >= WATCH_IDLE_TICKS {
                idle_ticks = 0;
                self.tick_watchdog(Duration::ZERO);
                self.watching.store(false, Ordering::SeqCst);
                if self.jobs_begun.load(Ordering::SeqCst) != seen || lock(&self.pool).stop {
                    // A leader began a job and still saw the watchdog tick, or the last tick was asked for meanwhile.
                    self.watching.store(true, Ordering::SeqCst);
                    self.tick_watchdog(WATCH_TICK);
                }
            }
        }
    }

    // ---- sources ----

    pub(crate) fn register(&self, socket: Socket) -> Registration {
        Registration::new(self.next_token.fetch_add(1, Ordering::Relaxed), socket)
    }

    fn add(&self, registration: &Registration, flags: EventFlags, source: Source) -> Result<(), TransferError> {
        {
            let mut sources = lock(&self.sources);
            if sources.closed {
                return Err(TransferError::Closed { cause: Arc::new(CloseCause::LocalShutdown) });
            }
            sources.by_token.insert(registration.0.token, source);
        }
        // Held over the call, so that what others come to want meanwhile is not lost.
        let mut interest = lock(&registration.0.interest);
        *interest |= flags;
        let data = EventData::new_u64(registration.0.token);
        let added = epoll::add(&self.epoll, registration.socket(), data, *interest);
        drop(interest);
        added.map_err(|errno| {
            self.remove(registration);
            TransferError::os("epoll_ctl")(errno.into())
        })
    }

    pub(crate) fn add_control(&self, endpoint: &Arc<Endpoint>, flags: EventFlags) -> Result<(), TransferError> {
        self.add(endpoint.control(), flags, Source::Control(Arc::clone(endpoint)))
    }

    pub(crate) fn add_bulk(
        &self,
        endpoint: &Arc<Endpoint>,
        registration: &Registration,
        flags: EventFlags,
    ) -> Result<(), TransferError> {
        self.add(registration, flags, Source::Bulk(Arc::clone(endpoint), registration.clone()))
    }

    pub(crate) fn remove(&self, registration: &Registration) {
        let source = lock(&self.sources).by_token.remove(&registration.0.token);
        drop(source);
        // Already gone from the set when the endpoint never got into it.
        let _ = epoll::delete(&self.epoll, registration.socket());
    }

    pub(crate) fn forget_key(&self, key: u128) {
        lock(&self.bulk_keys).remove(&key);
    }

    /// Ends a connection gently: nothing more is sent, what still arrives is read and dropped for a while.
    pub(crate) fn linger(&self, registration: &Registration) {
        let until = Instant::now() + LINGER;
        let _ = registration.socket().shutdown(Shutdown::Write);
        let before = {
            let mut sources = lock(&self.sources);
            if sources.closed {
                return;
            }
            sources.by_token.insert(registration.0.token, Source::Draining(registration.clone(), until))
        };
        drop(before);
        registration.set(self, EventFlags::IN);
        self.schedule(until);
    }

    fn dispatch(self: &Arc<Self>, token: u64, flags: EventFlags, turn: &mut Turn) {
        let source = lock(&self.sources).by_token.get(&token).cloned();
        match source {
            Some(Source::Control(endpoint)) => endpoint.on_control_event(flags, turn),
            Some(Source::Bulk(endpoint, registration)) if endpoint.closed().is_some() => self.remove(&registration),
            Some(Source::Bulk(endpoint, _)) => endpoint.on_bulk_event(flags, turn),
            Some(Source::Greeting(greeting)) => self.on_greeting_event(&greeting),
            Some(Source::Draining(registration, _)) => {
                // A late wish to write would be granted for ever.
                registration.want(self, EventFlags::OUT, false);
                let mut waste = [MaybeUninit::uninit(); 16 << 10];
                match tcp::recv(registration.socket(), &mut waste, tcp::Wait::No) {
                    Ok((Progress::Bytes(_) | Progress::WouldBlock, _)) => {}
                    Ok((Progress::Ended, _)) | Err(_) => self.remove(&registration),
                }
            }
            // Removed between the wait and now.
            None => {}
        }
    }

    /// Foreign code runs on this thread, too: wakers, log subscribers, releases of foreign memory. Should one panic, the
    /// connection ends, not the agent.
    fn dispatch_guarded(self: &Arc<Self>, token: u64, flags: EventFlags, turn: &mut Turn) {
        if catch_unwind(AssertUnwindSafe(|| self.dispatch(token, flags, turn))).is_err() {
            tracing::error!("a panic while a connection was served; it is closed");
            let source = lock(&self.sources).by_token.get(&token).cloned();
            match source {
                Some(Source::Control(endpoint) | Source::Bulk(endpoint, _)) => {
                    endpoint.close(CloseCause::PeerLost { source: None });
                }
                Some(Source::Greeting(greeting)) => self.remove(&greeting.registration),
                Some(Source::Draining(registration, _)) => self.remove(&registration),
                None => {}
            }
        }
    }

    fn run_timers(self: &Arc<Self>) {
        self.next_timer_us.store(u64::MAX, Ordering::SeqCst);
        let now = Instant::now();
        let paused = lock(&self.accept_paused_until).take();
        match paused {
            Some(until) if until > now => {
                *lock(&self.accept_paused_until) = Some(until);
                self.next_timer_us.fetch_min(self.micros(until), Ordering::SeqCst);
            }
            Some(_) => self.listener.want(self, EventFlags::IN, true),
            None => {}
        }
        let service = lock(&self.service).clone();
        if let Some(next) = service.and_then(|service| service.on_timer(now)) {
            self.next_timer_us.fetch_min(self.micros(next), Ordering::SeqCst);
        }
        let sources: Vec<Source> = lock(&self.sources).values().cloned().collect();
        for source in sources {
            let next = match &source {
                Source::Control(endpoint) => endpoint.on_timer(now),
                // Its endpoint keeps time for it.
                Source::Bulk(..) => None,
                Source::Greeting(greeting) if greeting.deadline <= now => {
                    let (what, timeout) = ("hello", self.config.connect_timeout);
                    self.refuse(greeting, ProtocolError::Stalled { what, timeout });
                    None
                }
                Source::Greeting(greeting) => Some(greeting.deadline),
                Source::Draining(registration, until) if *until <= now => {
                    self.remove(registration);
                    None
                }
                Source::Draining(_, until) => Some(*until),
            };
            if let Some(next) = next {
                self.next_timer_us.fetch_min(self.micros(next), Ordering::SeqCst);
            }
        }
    }

    // ---- accepting ----

    fn accept(self: &Arc<Self>) {
        for _ in 0..ACCEPTS {
            let socket = match self.listener.socket().accept() {
                Ok((socket, _)) => socket,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionAborted => continue,
                // The listener was shut down: the driver stops.
                Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => return,
                Err(error) => {
                    // Out of descriptors or memory: the dialers wait, the connected go on.
                    tracing::warn!(%error, "accept; trying again in {ACCEPT_PAUSE:?}");
                    let until = Instant::now() + ACCEPT_PAUSE;
                    *lock(&self.accept_paused_until) = Some(until);
                    self.listener.want(self, EventFlags::IN, false);
                    self.schedule(until);
                    return;
                }
            };
            let greetings = lock(&self.sources).values().filter(|source| matches!(source, Source::Greeting(_))).count();
            if greetings >= GREETINGS_MAX {
                tracing::warn!(GREETINGS_MAX, "too many connections in their greeting; the newest is dropped");
                continue;
            }
            if let Err(error) = tcp::prepare(&socket) {
                tracing::debug!(%error, "accepted socket");
                continue;
            }
            let registration = self.register(socket);
            let deadline = Instant::now() + self.config.connect_timeout;
            let greeting = Arc::new(Greeting { registration: registration.clone(), deadline, bytes: Mutex::default() });
            if self.add(&registration, EventFlags::IN, Source::Greeting(greeting)).is_ok() {
                self.schedule(deadline);
            }
        }
    }

    fn on_greeting_event(self: &Arc<Self>, greeting: &Arc<Greeting>) {
        match self.read_hello(greeting) {
            Ok(None) => {}
            Ok(Some(hello)) => {
                if let Err(error) = self.admit(greeting, hello) {
                    self.refuse(greeting, error);
                }
            }
            Err(CloseCause::Protocol(error)) => self.refuse(greeting, error),
            Err(_) => self.remove(&greeting.registration),
        }
    }

    /// Reads no byte beyond the hello: what follows belongs to the endpoint.
    fn read_hello(&self, greeting: &Greeting) -> Result<Option<Hello>, CloseCause> {
        let mut bytes = lock(&greeting.bytes);
        loop {
            if let Some(magic) = bytes.first_chunk()
                && u32::from_le_bytes(*magic) != MAGIC
            {
                // Whoever speaks something else need not send a whole header to be told.
                return Err(ProtocolError::Magic { found: u32::from_le_bytes(*magic) }.into());
            }
            let want = if let Some(head) = bytes.first_chunk() {
                let (header, kind) = Header::parse(head, &self.config.limits)?;
                if kind != Kind::Hello || header.tensors != 0 || header.payload_len != 0 {
                    return Err(ProtocolError::Unexpected { kind, expected: "a hello" }.into());
                }
                crate::frame::limit("hello bytes", header.body_len() as u64, 16 << 10)?;
                if bytes.len() == HEADER_BYTES + header.body_len() {
                    return Ok(Some(read_greeting("hello", &bytes[HEADER_BYTES..])?));
                }
                HEADER_BYTES + header.body_len() - bytes.len()
            } else {
                HEADER_BYTES - bytes.len()
            };
            let mut room = [0_u8; 1024];
            let want = want.min(room.len());
            match tcp::recv_into(greeting.registration.socket(), &mut room[..want]).map_err(lost)? {
                Progress::Bytes(len) => bytes.extend_from_slice(&room[..len]),
                Progress::WouldBlock => return Ok(None),
                Progress::Ended => return Err(CloseCause::PeerLost { source: None }),
            }
        }
    }

    fn admit(self: &Arc<Self>, greeting: &Arc<Greeting>, hello: Hello) -> Result<(), ProtocolError> {
        if hello.group != self.config.group {
            return Err(ProtocolError::Group { found: hello.group, expected: self.config.group.clone() });
        }
        let [oldest, newest] = hello.versions;
        if !(oldest..=newest).contains(&VERSION) {
            return Err(ProtocolError::NoCommonVersion { theirs: hello.versions, ours: VERSION });
        }
        let Ok(socket) = greeting.registration.socket().try_clone() else {
            self.remove(&greeting.registration);
            return Ok(());
        };
        match &hello.role {
            Role::Bulk { key } => {
                let endpoint = lock(&self.bulk_keys).get(key).and_then(Weak::upgrade);
                let endpoint = endpoint.ok_or(ProtocolError::UnknownBulkKey)?;
                self.remove(&greeting.registration);
                if let Err(error) = endpoint.attach_bulk(socket) {
                    tracing::warn!(%error, "bulk connection");
                }
            }
            Role::Control { target } => {
                if let Some(target) = target
                    && **target != *self.config.worker.id.name
                {
                    let found = self.config.worker.id.name.to_string();
                    return Err(ProtocolError::WrongWorker { found, expected: target.to_string() });
                }
                let Some(service) = lock(&self.service).clone() else { return Ok(()) };
                self.remove(&greeting.registration);
                self.open(socket, hello, &*service);
            }
        }
        Ok(())
    }

    fn open(self: &Arc<Self>, socket: Socket, hello: Hello, service: &dyn Service) {
        let (remote, features) = (hello.worker.clone(), hello.features);
        let mut key = [0_u8; 16];
        if let Err(error) = rustix::rand::getrandom(&mut key, rustix::rand::GetRandomFlags::empty()) {
            tracing::error!(%error, "getrandom");
            return;
        }
        let key = u128::from_ne_bytes(key);
        let opened = Endpoint::accepted(self, socket, hello, key).and_then(|endpoint| {
            let peer = service.on_open(&remote);
            let admitted = endpoint.welcome(Arc::clone(&peer), features);
            lock(&self.bulk_keys).insert(key, Arc::downgrade(&endpoint));
            match admitted {
                Err(cause) => endpoint.close(cause),
                Ok(()) => {
                    self.add_control(&endpoint, EventFlags::IN).inspect_err(|_| {
                        endpoint.close(CloseCause::LocalShutdown);
                    })?;
                    // Only now may others find it: what they send goes behind the welcome, and is kept time of.
                    peer.on_opened(&endpoint);
                }
            }
            Ok(())
        });
        if let Err(error) = opened {
            tracing::warn!(%error, peer = %remote.id, "cannot open an endpoint");
        }
    }

    /// Tells a dialer why it is not let in.
    fn refuse(&self, refused: &Greeting, error: ProtocolError) {
        tracing::debug!(%error, "refused a connection");
        let goodbye = Goodbye { reason: Reason::Refused, text: error.to_string() };
        // Best effort: whoever sends garbage may not read.
        let _ = write_greeting(refused.registration.socket(), &greeting(Kind::Close, &goodbye));
        self.linger(&refused.registration);
    }

    /// Where this worker listens.
    pub fn address(&self) -> SocketAddr {
        self.config.worker.address
    }

    /// Descriptors and connections in use, for tests and tools.
    pub fn connections(&self) -> usize {
        lock(&self.sources).by_token.len()
    }
}

impl AsFd for Registration {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.socket.as_fd()
    }
}
