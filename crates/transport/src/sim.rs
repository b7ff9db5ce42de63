//! A simulated network with a clock of its own, on which the same drivers, endpoints and agents run: seeded, one step at a
//! time, many workers in one thread.
//!
//! A [`World`] has machines, each with one process at a time, a [`Host`]. [`Driver::bind_simulated`](crate::Driver::bind_simulated)
//! puts a driver there: its sockets are the simulation's, its clock is virtual, it has no threads, and its random bytes come
//! from the seed. [`World::step`] takes the next event. What blocks a thread ([`Reply::wait`](crate::Endpoint::drive_until)
//! and the like) has no place here: nobody else would step.
//!
//! Connections behave as TCP's: bytes come in order, once and unchanged, in pieces and late; a cut stalls them, a reset or the
//! death of a process ends them. Only pings and cancellations are lost or doubled, as nothing may depend on them.
//! Invariant S1: the same seed and the same program give the same events; [`World::hash`] is over all of them.
//! Invariant S2: what a dead process does has no effect, and draws no random number.
//!
//! - `network`: sockets, what travels between them, and faults of the network.
//! - `hosts`: processes, their clocks, their faults and their tasks.
//! - `trace`: what happened, and its hash.

mod hosts;
mod network;
mod random;
mod trace;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

pub use hosts::{Census, Host, Sleep};
pub(crate) use network::Socket;
pub use random::Random;

use crate::CloseCause;
use crate::endpoint::lock;
use hosts::{HostState, Task};
use network::SocketState;
use trace::Trace;

/// How a simulated network behaves while nothing is broken.
#[derive(Clone, Debug)]
pub struct Conditions {
    /// From one machine to another, at least.
    pub latency: Duration,
    /// On top of it, at most; drawn for each piece.
    pub jitter: Duration,
    /// Pieces of a thousand that are late by [`Self::late_by`]: lost, and sent again by TCP.
    pub late_per_mille: u32,
    /// See [`Self::late_per_mille`].
    pub late_by: Duration,
    /// How long a process takes, at most, to see that something is to be done.
    pub wake: Duration,
    /// How long a job waits, at most, for a thread.
    pub job: Duration,
    /// Bytes that a connection takes before its reader has.
    pub capacity_bytes: usize,
    /// Pings and cancellations of a thousand that get lost.
    pub lose_per_mille: u32,
    /// Pings and cancellations of a thousand that come twice.
    pub double_per_mille: u32,
}

impl Default for Conditions {
    fn default() -> Self {
        Self {
            latency: Duration::from_micros(50),
            jitter: Duration::from_micros(100),
            late_per_mille: 0,
            late_by: Duration::from_millis(200),
            wake: Duration::from_micros(50),
            job: Duration::from_micros(100),
            capacity_bytes: 64 << 10,
            lose_per_mille: 0,
            double_per_mille: 0,
        }
    }
}

/// An endpoint that closed.
#[derive(Clone, Debug)]
pub struct Closed {
    /// In the world's time.
    pub at: Duration,
    /// The machine on which it closed.
    pub machine: usize,
    /// The peer's name.
    pub peer: String,
    /// Why.
    pub cause: Arc<CloseCause>,
}

/// A simulated network and all that runs on it. Clones are one world.
#[derive(Clone)]
pub struct World(Arc<Shared>);

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("World").field("now", &self.now()).finish_non_exhaustive()
    }
}

/// See [`World::downgrade`].
#[derive(Clone, Debug)]
pub struct WeakWorld(Weak<Shared>);

impl WeakWorld {
    /// The world, while it is there.
    pub fn upgrade(&self) -> Option<World> {
        self.0.upgrade().map(World)
    }
}

struct Shared {
    /// What virtual times count from; no behaviour depends on it.
    base: Instant,
    state: Mutex<State>,
}

/// Changed under one lock, under which nothing foreign runs.
struct State {
    now_ns: u64,
    random: Random,
    scheduled: u64,
    queue: BinaryHeap<Reverse<Due>>,
    conditions: Conditions,
    hosts: Vec<HostState>,
    /// The newest process of each machine.
    machines: Vec<usize>,
    sockets: Vec<SocketState>,
    /// Ways that are cut, from machine to machine.
    cuts: BTreeSet<(usize, usize)>,
    tasks: BTreeMap<u64, Task>,
    next_id: u64,
    acts: BTreeMap<u64, Act>,
    sleeps: BTreeMap<u64, Waker>,
    closed: Vec<Closed>,
    trace: Trace,
}

type Act = Box<dyn FnOnce() + Send>;

/// In order of time; at one time in an order that the seed decides.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Due {
    at_ns: u64,
    lot: u32,
    number: u64,
    event: Event,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// A dialer's first packet reaches the listener.
    Dial(usize),
    /// The answer to it reaches the dialer.
    Dialed(usize, bool),
    /// The next piece reaches a socket.
    Arrive(usize),
    /// A socket's owner sees that it is ready.
    Ready(usize),
    Timer(usize),
    Beat(usize),
    Job(usize),
    Poll(u64),
    Sleep(u64),
    Act(u64),
}

/// What a step does once the state's lock is released.
enum Step {
    Nothing,
    Socket(Host, usize, u64, rustix::event::epoll::EventFlags),
    Timer(Host),
    Beat(Host),
    Job(Host),
    Poll(u64),
    Wake(Waker),
    Act(Act),
}

impl World {
    /// A world without machines. Everything that happens in it follows from `seed` and from what is done to it.
    pub fn new(seed: u64, conditions: Conditions) -> Self {
        let state = State {
            now_ns: 0,
            random: Random::new(seed),
            scheduled: 0,
            queue: BinaryHeap::new(),
            conditions,
            hosts: Vec::new(),
            machines: Vec::new(),
            sockets: Vec::new(),
            cuts: BTreeSet::new(),
            tasks: BTreeMap::new(),
            next_id: 0,
            acts: BTreeMap::new(),
            sleeps: BTreeMap::new(),
            closed: Vec::new(),
            trace: Trace::default(),
        };
        Self(Arc::new(Shared { base: Instant::now(), state: Mutex::new(state) }))
    }

    /// A reference for what runs in this world, which would keep it for ever otherwise.
    pub fn downgrade(&self) -> WeakWorld {
        WeakWorld(Arc::downgrade(&self.0))
    }

    /// The world's time, from its beginning.
    pub fn now(&self) -> Duration {
        Duration::from_nanos(lock(&self.0.state).now_ns)
    }

    /// Has `act` done after `delay`, whatever has become of the processes then.
    pub fn after(&self, delay: Duration, act: impl FnOnce() + Send + 'static) {
        let mut state = lock(&self.0.state);
        let id = state.new_id();
        state.acts.insert(id, Box::new(act));
        state.push_after(nanos(delay), Event::Act(id));
    }

    /// Takes the next event; `false` if there is none.
    pub fn step(&self) -> bool {
        self.step_until(u64::MAX)
    }

    /// Takes every event up to that time, which it is then.
    pub fn run_until(&self, time: Duration) {
        while self.step_until(nanos(time)) {}
        let mut state = lock(&self.0.state);
        state.now_ns = state.now_ns.max(nanos(time));
    }

    /// As [`Self::step`], if the next event is due by `end`.
    pub fn step_by(&self, end: Duration) -> bool {
        self.step_until(nanos(end))
    }

    fn step_until(&self, end_ns: u64) -> bool {
        let step = {
            let mut state = lock(&self.0.state);
            match state.queue.peek() {
                Some(Reverse(due)) if due.at_ns <= end_ns => {}
                _ => return false,
            }
            let Some(Reverse(due)) = state.queue.pop() else { return false };
            state.now_ns = state.now_ns.max(due.at_ns);
            self.prepare(&mut state, due)
        };
        match step {
            Step::Nothing => {}
            Step::Socket(host, socket, token, flags) => {
                if let Some(driver) = host.driver() {
                    driver.step_socket(token, flags);
                }
                lock(&self.0.state).check_ready(socket);
            }
            Step::Timer(host) => {
                if let Some(next) = host.driver().and_then(|driver| driver.step_timers()) {
                    host.arm_timer(next);
                }
            }
            Step::Beat(host) => {
                if let Some(period) = host.driver().and_then(|driver| driver.step_beat()) {
                    host.arm_beat(period);
                }
            }
            Step::Job(host) => {
                if let Some(driver) = host.driver() {
                    driver.step_job(|jobs| lock(&self.0.state).random.below(jobs as u64) as usize);
                }
            }
            Step::Poll(task) => self.poll_task(task),
            Step::Wake(waker) => waker.wake(),
            Step::Act(act) => act(),
        }
        true
    }

    /// What is to be done for an event, if anything still is.
    fn prepare(&self, state: &mut State, due: Due) -> Step {
        let host = |index: usize| Host::at(&self.0, index);
        let event = due.event;
        let owner = state.owner(event);
        if let Some(index) = owner {
            if !state.hosts[index].alive {
                return Step::Nothing;
            }
            if state.hosts[index].stopped {
                state.hosts[index].deferred.push(event);
                return Step::Nothing;
            }
        }
        match event {
            Event::Dial(dialer) => state.on_dial(dialer),
            Event::Dialed(dialer, taken) => state.on_dialed(dialer, taken),
            Event::Arrive(socket) => state.on_arrive(socket),
            Event::Ready(socket) => {
                if let Some((owner, token, flags)) = state.take_ready(socket) {
                    state.record(event, owner, token, u64::from(flags.bits()));
                    return Step::Socket(host(owner), socket, token, flags);
                }
            }
            Event::Timer(owner) => {
                // Others were armed earlier than this one meanwhile, if it is not the one that counts.
                if state.hosts[owner].timer_ns.take_if(|at| *at <= due.at_ns).is_some() {
                    state.record(event, owner, 0, 0);
                    return Step::Timer(host(owner));
                }
            }
            Event::Beat(owner) => {
                let of = &mut state.hosts[owner];
                of.beating = false;
                of.beats += 1;
                state.record(event, owner, 0, 0);
                return Step::Beat(host(owner));
            }
            Event::Job(owner) => {
                let busy_until_ns = state.hosts[owner].busy_until_ns;
                if busy_until_ns > state.now_ns {
                    state.push_at(busy_until_ns, event);
                    return Step::Nothing;
                }
                state.record(event, owner, 0, 0);
                return Step::Job(host(owner));
            }
            Event::Poll(task) => {
                if let Some(owner) = owner {
                    state.record(event, owner, task, 0);
                    return Step::Poll(task);
                }
            }
            Event::Sleep(id) => return state.sleeps.remove(&id).map_or(Step::Nothing, Step::Wake),
            Event::Act(id) => return state.acts.remove(&id).map_or(Step::Nothing, Step::Act),
        }
        Step::Nothing
    }

    fn poll_task(&self, id: u64) {
        let taken = {
            let mut state = lock(&self.0.state);
            state.tasks.get_mut(&id).and_then(|task| Some((task.future.take()?, Arc::clone(&task.waker))))
        };
        let Some((mut future, waker)) = taken else { return };
        waker.poll_begins();
        let done = future.as_mut().poll(&mut Context::from_waker(&Waker::from(waker))).is_ready();
        let mut state = lock(&self.0.state);
        if done {
            let task = state.tasks.remove(&id);
            drop(state);
            drop((task, future));
        } else if let Some(task) = state.tasks.get_mut(&id) {
            task.future = Some(future);
        } else {
            // Its process died while it ran.
            drop(state);
            drop(future);
        }
    }

    /// The hash of all that has happened, in order (S1).
    pub fn hash(&self) -> u64 {
        lock(&self.0.state).trace.hash()
    }

    /// Events so far.
    pub fn events(&self) -> u64 {
        lock(&self.0.state).trace.events()
    }

    /// Gives every event, as a line of text, to `print` from now on.
    pub fn print_with(&self, print: impl FnMut(&str) + Send + 'static) {
        lock(&self.0.state).trace.print_with(Box::new(print));
    }

    /// Adds something to the trace that the world itself does not see.
    pub fn note(&self, text: &str) {
        let mut state = lock(&self.0.state);
        let now_ns = state.now_ns;
        state.trace.note(now_ns, text);
    }

    /// The endpoints that have closed since this was last asked, those of dead processes not included.
    pub fn take_closed(&self) -> Vec<Closed> {
        std::mem::take(&mut lock(&self.0.state).closed)
    }

    /// Changes how the network behaves from now on.
    pub fn set_conditions(&self, conditions: Conditions) {
        lock(&self.0.state).conditions = conditions;
    }
}

impl State {
    fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn push_at(&mut self, at_ns: u64, event: Event) {
        let lot = self.random.next() as u32;
        self.scheduled += 1;
        self.queue.push(Reverse(Due { at_ns: at_ns.max(self.now_ns), lot, number: self.scheduled, event }));
    }

    fn push_after(&mut self, delay_ns: u64, event: Event) {
        self.push_at(self.now_ns.saturating_add(delay_ns), event);
    }

    /// After a while that the seed decides, up to `most`.
    fn push_soon(&mut self, most: Duration, event: Event) {
        let delay_ns = self.random.below(nanos(most) + 1);
        self.push_after(delay_ns, event);
    }

    /// The process that an event is for, if it waits for one to run.
    fn owner(&self, event: Event) -> Option<usize> {
        match event {
            Event::Ready(socket) => Some(self.sockets[socket].host),
            Event::Timer(host) | Event::Beat(host) | Event::Job(host) => Some(host),
            Event::Poll(task) => self.tasks.get(&task).map(|task| task.host),
            // The network's, and the script's.
            Event::Dial(_) | Event::Dialed(..) | Event::Arrive(_) | Event::Sleep(_) | Event::Act(_) => None,
        }
    }

    fn record(&mut self, event: Event, host: usize, a: u64, b: u64) {
        let (name, now_ns) = (event.name(), self.now_ns);
        self.trace.record(now_ns, name, host, a, b);
    }
}

impl Event {
    fn name(self) -> &'static str {
        match self {
            Self::Dial(_) => "dial",
            Self::Dialed(..) => "dialed",
            Self::Arrive(_) => "arrive",
            Self::Ready(_) => "ready",
            Self::Timer(_) => "timer",
            Self::Beat(_) => "beat",
            Self::Job(_) => "job",
            Self::Poll(_) => "poll",
            Self::Sleep(_) => "sleep",
            Self::Act(_) => "act",
        }
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
