//! Processes of a simulation: one life of a worker each, with its clock, its driver and its tasks.
//!
//! A process is killed, and another started on its machine; it is stopped, and goes on; its threads are busy; its clock runs
//! fast or slow, or leaps.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Wake};
use std::time::{Duration, Instant};

use super::network::{Socket, address_of};
use super::{Closed, Event, Shared, State, World, nanos};
use crate::CloseCause;
use crate::driver::Driver;
use crate::endpoint::lock;
use crate::frame::Kind;
use crate::key::Nonce;

pub(super) struct HostState {
    pub(super) machine: usize,
    pub(super) alive: bool,
    /// It died with its machine: nothing answers there.
    pub(super) gone_with_machine: bool,
    pub(super) stopped: bool,
    /// What was due while it was stopped.
    pub(super) deferred: Vec<Event>,
    /// No thread takes a job until then.
    pub(super) busy_until_ns: u64,
    driver: Weak<Driver>,
    /// When deadlines are looked at.
    pub(super) timer_ns: Option<u64>,
    pub(super) beating: bool,
    pub(super) beats: u64,
    clock: Clock,
}

/// A process's clock: from where it was set, at its own rate.
struct Clock {
    world_ns: u64,
    local_ns: u64,
    /// Of a million: how much faster than the world's it runs.
    drift_ppm: i64,
}

impl Clock {
    fn rate(&self) -> i128 {
        1_000_000 + i128::from(self.drift_ppm)
    }

    fn local_ns(&self, world_ns: u64) -> u64 {
        let passed = i128::from(world_ns - self.world_ns) * self.rate() / 1_000_000;
        self.local_ns.saturating_add(passed as u64)
    }

    /// When the clock shows that time, or shortly after.
    fn world_ns(&self, local_ns: u64) -> u64 {
        let left = i128::from(local_ns.saturating_sub(self.local_ns)) * 1_000_000 / self.rate();
        self.world_ns.saturating_add(left as u64 + 1)
    }
}

pub(super) struct Task {
    pub(super) host: usize,
    /// Out while it is polled.
    pub(super) future: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    pub(super) waker: Arc<TaskWaker>,
}

pub(super) struct TaskWaker {
    shared: Weak<Shared>,
    task: u64,
    /// A poll is due.
    due: AtomicBool,
}

impl TaskWaker {
    /// Whoever wakes it from now on wants another poll.
    pub(super) fn poll_begins(&self) {
        self.due.store(false, Ordering::Relaxed);
    }
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        let Some(shared) = self.shared.upgrade() else { return };
        if self.due.swap(true, Ordering::Relaxed) {
            return;
        }
        let mut state = lock(&shared.state);
        let Some(task) = state.tasks.get(&self.task) else { return };
        if state.hosts[task.host].alive {
            let wake = state.conditions.wake;
            state.push_soon(wake, Event::Poll(self.task));
        }
    }
}

/// A process on a machine of a [`World`]. Clones are one process.
#[derive(Clone)]
pub struct Host {
    shared: Arc<Shared>,
    index: usize,
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Host").field("process", &self.index).finish_non_exhaustive()
    }
}

impl World {
    /// Starts a process on a machine: a new one, or one whose process has died. Machines are numbered from 0.
    ///
    /// # Panics
    /// If the machine's process lives, or a number is left out.
    pub fn start(&self, machine: usize) -> Host {
        let mut state = lock(&self.0.state);
        let index = state.hosts.len();
        match state.machines.get_mut(machine) {
            Some(newest) => {
                let before = std::mem::replace(newest, index);
                assert!(!state.hosts[before].alive, "one process a machine");
                state.hosts[before].gone_with_machine = false;
            }
            None => {
                assert_eq!(machine, state.machines.len(), "machines are numbered in order");
                state.machines.push(index);
            }
        }
        let now_ns = state.now_ns;
        state.hosts.push(HostState {
            machine,
            alive: true,
            gone_with_machine: false,
            stopped: false,
            deferred: Vec::new(),
            busy_until_ns: 0,
            driver: Weak::new(),
            timer_ns: None,
            beating: false,
            beats: 0,
            clock: Clock { world_ns: now_ns, local_ns: now_ns, drift_ppm: 0 },
        });
        drop(state);
        Host::at(&self.0, index)
    }
}

impl Host {
    pub(super) fn at(shared: &Arc<Shared>, index: usize) -> Self {
        Self { shared: Arc::clone(shared), index }
    }

    /// Does something with this process, if it lives (S2).
    fn alive<R>(&self, f: impl FnOnce(&mut State, usize) -> R) -> Option<R> {
        let mut state = lock(&self.shared.state);
        state.hosts[self.index].alive.then(|| f(&mut state, self.index))
    }

    /// The world it is in.
    pub fn world(&self) -> World {
        World(Arc::clone(&self.shared))
    }

    /// Where its worker listens.
    pub fn address(&self) -> SocketAddr {
        address_of(self.machine())
    }

    /// The machine it runs on.
    pub fn machine(&self) -> usize {
        lock(&self.shared.state).hosts[self.index].machine
    }

    /// Its number among all processes, for texts.
    pub fn process(&self) -> usize {
        self.index
    }

    /// Whether it has not been killed.
    pub fn is_alive(&self) -> bool {
        self.alive(|_, _| ()).is_some()
    }

    /// Whether it is stopped.
    pub fn is_stopped(&self) -> bool {
        self.alive(|state, index| state.hosts[index].stopped).unwrap_or_default()
    }

    /// The time on its clock.
    pub fn now(&self) -> Instant {
        let state = lock(&self.shared.state);
        self.shared.base + Duration::from_nanos(state.hosts[self.index].clock.local_ns(state.now_ns))
    }

    // ---- what a test does to it ----

    /// Has its clock run faster (or slower) by so many of a million.
    pub fn set_drift_ppm(&self, drift_ppm: i64) {
        self.alive(|state, index| {
            let now_ns = state.now_ns;
            let clock = &mut state.hosts[index].clock;
            *clock = Clock { world_ns: now_ns, local_ns: clock.local_ns(now_ns), drift_ppm };
        });
    }

    /// Has its clock leap forward.
    pub fn leap(&self, by: Duration) {
        self.alive(|state, index| {
            let now_ns = state.now_ns;
            let clock = &mut state.hosts[index].clock;
            let local_ns = clock.local_ns(now_ns) + nanos(by);
            *clock = Clock { world_ns: now_ns, local_ns, drift_ppm: clock.drift_ppm };
            // Its timers are due earlier now.
            state.hosts[index].timer_ns = Some(now_ns);
            state.push_at(now_ns, Event::Timer(index));
        });
    }

    /// Stops it: nothing of it runs; its kernel goes on.
    pub fn stop(&self) {
        self.alive(|state, index| state.hosts[index].stopped = true);
    }

    /// Lets it go on after [`Self::stop`].
    pub fn go_on(&self) {
        self.alive(|state, index| {
            state.hosts[index].stopped = false;
            for event in std::mem::take(&mut state.hosts[index].deferred) {
                let wake = state.conditions.wake;
                state.push_soon(wake, event);
            }
        });
    }

    /// Has no job begin for so long: its threads are busy. Frames are read, heartbeats sent.
    pub fn keep_busy(&self, duration: Duration) {
        self.alive(|state, index| {
            let until_ns = state.now_ns + nanos(duration);
            let busy_until_ns = &mut state.hosts[index].busy_until_ns;
            *busy_until_ns = until_ns.max(*busy_until_ns);
        });
    }

    /// Kills it. Its kernel closes its connections, unless it dies `with_machine`: then nobody hears of it. What it has sent
    /// still arrives. The caller drops what belonged to it.
    pub fn kill(&self, with_machine: bool) {
        let tasks: Vec<Task> = {
            let mut state = lock(&self.shared.state);
            if !state.hosts[self.index].alive {
                return;
            }
            if !with_machine {
                state.close_all_of(self.index);
            }
            let host = &mut state.hosts[self.index];
            (host.alive, host.gone_with_machine) = (false, with_machine);
            host.deferred = Vec::new();
            let index = self.index;
            state.tasks.extract_if(.., |_, task| task.host == index).map(|(_, task)| task).collect()
        };
        // Foreign code, and of no effect any more.
        drop(tasks);
    }

    /// Runs a future in this process.
    pub fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) {
        let mut future: Option<Pin<Box<dyn Future<Output = ()> + Send>>> = Some(Box::pin(future));
        self.alive(|state, index| {
            let id = state.new_id();
            let waker =
                Arc::new(TaskWaker { shared: Arc::downgrade(&self.shared), task: id, due: AtomicBool::new(true) });
            state.tasks.insert(id, Task { host: index, future: future.take(), waker });
            let wake = state.conditions.wake;
            state.push_soon(wake, Event::Poll(id));
        });
    }

    /// Ends after `duration` of the world's time.
    pub fn sleep(&self, duration: Duration) -> Sleep {
        let until_ns = lock(&self.shared.state).now_ns + nanos(duration);
        Sleep { shared: Arc::clone(&self.shared), until_ns, id: None }
    }

    /// Lets nobody in any more, and closes every endpoint with a goodbye. The driver is stopped once
    /// [`Self::has_left`].
    pub fn leave(&self) {
        if let Some(driver) = self.driver() {
            driver.say_goodbye();
        }
    }

    /// Every peer has taken its goodbye, or was given time to.
    pub fn has_left(&self) -> bool {
        self.driver().is_none_or(|driver| driver.has_said_goodbye())
    }

    /// What it holds at the moment.
    pub fn census(&self) -> Census {
        self.driver().map(|driver| driver.census()).unwrap_or_default()
    }

    // ---- what its driver asks for ----

    pub(super) fn driver(&self) -> Option<Arc<Driver>> {
        let driver = lock(&self.shared.state).hosts[self.index].driver.clone();
        driver.upgrade()
    }

    pub(crate) fn attach(&self, driver: &Arc<Driver>) {
        self.alive(|state, index| state.hosts[index].driver = Arc::downgrade(driver));
    }

    pub(crate) fn listen(&self, address: SocketAddr) -> io::Result<Socket> {
        Socket::listen(&self.shared, self.index, address)
    }

    pub(crate) fn connect(&self, address: SocketAddr) -> Socket {
        Socket::connect(&self.shared, self.index, address)
    }

    /// Has the driver look at its deadlines at that time of its clock.
    pub(crate) fn arm_timer(&self, when: Instant) {
        self.alive(|state, index| {
            let local_ns = nanos(when.saturating_duration_since(self.shared.base));
            let at_ns = state.hosts[index].clock.world_ns(local_ns).max(state.now_ns + 1);
            if state.hosts[index].timer_ns.is_none_or(|armed| at_ns < armed) {
                state.hosts[index].timer_ns = Some(at_ns);
                state.push_at(at_ns, Event::Timer(index));
            }
        });
    }

    /// Has the driver's heart beat after `period` of its clock.
    pub(crate) fn arm_beat(&self, period: Duration) {
        self.alive(|state, index| {
            let host = &mut state.hosts[index];
            if !std::mem::replace(&mut host.beating, true) {
                let local_ns = host.clock.local_ns(state.now_ns) + nanos(period);
                let at_ns = host.clock.world_ns(local_ns);
                state.push_at(at_ns, Event::Beat(index));
            }
        });
    }

    /// A job waits for a thread.
    pub(crate) fn queue_job(&self) {
        self.alive(|state, index| {
            let job = state.conditions.job;
            state.push_soon(job, Event::Job(index));
        });
    }

    pub(crate) fn fresh(&self) -> Nonce {
        self.alive(|state, _| {
            let mut nonce = Nonce::default();
            nonce.chunks_exact_mut(8).for_each(|chunk| chunk.copy_from_slice(&state.random.next().to_le_bytes()));
            nonce
        })
        .unwrap_or_default()
    }

    /// Loses pings in every other beat only: a few in a row are not lost one by one, but by a connection that is cut.
    pub(crate) fn copies(&self, kind: Kind) -> usize {
        self.alive(|state, index| {
            let keep = kind == Kind::Ping && state.hosts[index].beats.is_multiple_of(2);
            let lost = state.random.per_mille(state.conditions.lose_per_mille) && !keep;
            let doubled = state.random.per_mille(state.conditions.double_per_mille);
            if lost { 0 } else { 1 + usize::from(doubled) }
        })
        .unwrap_or(1)
    }

    pub(crate) fn note_closed(&self, peer: String, cause: &Arc<CloseCause>) {
        self.alive(|state, index| {
            let (now_ns, machine) = (state.now_ns, state.hosts[index].machine);
            state.trace.note(now_ns, &format!("p{index} closed its connection with {peer}: {cause}"));
            state.closed.push(Closed { at: Duration::from_nanos(now_ns), machine, peer, cause: Arc::clone(cause) });
        });
    }
}

/// What a worker's connections hold, by number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Census {
    /// Connections, greetings included.
    pub connections: usize,
    /// Keys for bulk connections of accepted endpoints.
    pub bulk_keys: usize,
    /// Frames that wait for bulk payload.
    pub parked: usize,
    /// Tensors that wait to leave.
    pub leaving: usize,
    /// Bytes of frames that wait to leave.
    pub backlog_bytes: usize,
    /// Tensor bytes of requests that are not answered.
    pub unanswered_bytes: u64,
    /// The most of them at one endpoint.
    pub unanswered_bytes_max: u64,
}

/// See [`Host::sleep`].
#[derive(Debug)]
#[must_use = "it waits only when it is awaited"]
pub struct Sleep {
    shared: Arc<Shared>,
    until_ns: u64,
    id: Option<u64>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let shared = Arc::clone(&self.shared);
        let mut state = lock(&shared.state);
        if state.now_ns >= self.until_ns {
            return Poll::Ready(());
        }
        let id = match self.id {
            Some(id) => id,
            None => {
                let id = state.new_id();
                state.push_at(self.until_ns, Event::Sleep(id));
                self.id = Some(id);
                id
            }
        };
        let replaced = state.sleeps.insert(id, cx.waker().clone());
        drop(state);
        drop(replaced);
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            let waker = lock(&self.shared.state).sleeps.remove(&id);
            drop(waker);
        }
    }
}
