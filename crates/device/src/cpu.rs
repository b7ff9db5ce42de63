//! Streams of the CPU, and of devices that it emulates, in three modes.
//!
//! - *inline*: an operation runs on the thread that enqueues it. There is an [`Engine`] only if uses are checked.
//! - *threads*: each leased stream has a worker thread, which a seeded jitter delays; it ends when the lease has ended and the
//!   work is done.
//! - *chaos*: nothing runs until somebody must know. Then the thread that asks picks, by a seeded generator, one stream after the
//!   other whose oldest operation can run, and stops when what it asked for has passed. There is no thread: with the same seed
//!   and the same enqueues and questions, such as those of a program on a current-thread executor, the order is the same.
//!
//! Who must know in chaos mode: [`Event::query`], [`Event::block`], bytes given to the host, [`Event::on_ready`], and polls of
//! [`Event::host_ready`], of which the first may yield once to let other tasks enqueue more. If all that is left waits for a
//! token, the waiter sleeps; the thread that completes the token then runs the work that futures and callbacks wait for.
//!
//! Invariant C1: an operation runs after everything it waits for and after its stream's earlier operations.
//! Invariant C2: kernels, callbacks and wakers run under no lock. Callbacks and wakers may use streams and events freely; a kernel
//! must not wait, and is told [`DeviceError::Deadlock`] if it does.
//! Invariant C3: an operation that is enqueued reaches its bytes by address: its storages hold its event as a fence, so that their
//! memory is neither recycled nor given to another writer before it passed.
#![expect(unsafe_code, reason = "operations reach bytes that their storages' fences keep for them")]

use std::collections::{HashSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use crate::checker::Race;
use crate::clock::HostClock;
use crate::memory::Span;
use crate::progress::{Outcome, Progress};
use crate::{Check, Device, DeviceError, Event, StreamId};

/// Reports that are kept until they are asked for.
const RACES_MAX: usize = 1024;

/// How streams of the CPU run their work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum CpuMode {
    /// At once, on the thread that enqueues it: no hop, no memory, for production.
    #[default]
    Inline,
    /// On a thread of its own for each leased stream, with pauses between operations: real parallelism.
    Threads {
        /// Of the pauses.
        seed: u64,
    },
    /// When somebody must know, in an order that the seed decides: for tests that must be repeatable.
    Chaos {
        /// A complete reproduction of the order, for the same program on one thread.
        seed: u64,
    },
}

/// What orders a runtime's work, unless it runs inline and unchecked.
pub(crate) struct Engine {
    mode: CpuMode,
    check: Check,
    host: Mutex<HostClock>,
    races: Mutex<Vec<Race>>,
    /// A race was found where nothing may panic.
    deferred: AtomicBool,
    /// Streams leased so far: what their generators differ by.
    leases: AtomicU64,
    chaos: Mutex<Chaos>,
    /// The turn to run an operation is free, or a token was completed.
    turn: Condvar,
    #[cfg(any(test, feature = "mutants"))]
    pub(crate) edges: crate::mutants::Edges,
}

struct Chaos {
    random: Random,
    /// In the order of their leases.
    works: Vec<Arc<Work>>,
    /// The thread that runs an operation now.
    runner: Option<ThreadId>,
    /// What futures and callbacks wait for.
    wanted: Vec<(Arc<Progress>, u64)>,
    /// A token was completed by a kernel.
    kicked: bool,
}

/// How long to go on when all that is left waits for something outside the runtime.
#[derive(Clone, Copy)]
pub(crate) enum Patience {
    /// Not at all.
    None,
    Until(Option<Instant>, Duration),
}

impl Engine {
    pub(crate) fn new(mode: CpuMode, check: Check) -> Arc<Self> {
        let seed = match mode {
            CpuMode::Inline => 0,
            CpuMode::Threads { seed } | CpuMode::Chaos { seed } => seed,
        };
        Arc::new(Self {
            mode,
            check,
            host: Mutex::default(),
            races: Mutex::default(),
            deferred: AtomicBool::new(false),
            leases: AtomicU64::new(0),
            chaos: Mutex::new(Chaos {
                random: Random::new(seed),
                works: Vec::new(),
                runner: None,
                wanted: Vec::new(),
                kicked: false,
            }),
            turn: Condvar::new(),
            #[cfg(any(test, feature = "mutants"))]
            edges: crate::mutants::Edges::default(),
        })
    }

    pub(crate) fn is_inline(&self) -> bool {
        self.mode == CpuMode::Inline
    }

    pub(crate) fn is_chaos(&self) -> bool {
        matches!(self.mode, CpuMode::Chaos { .. })
    }

    pub(crate) fn is_checked(&self) -> bool {
        self.check != Check::Off
    }

    /// Whether a wait is inserted: a mutant leaves one out.
    pub(crate) fn keeps_edge(&self) -> bool {
        #[cfg(any(test, feature = "mutants"))]
        return self.edges.keeps_next();
        #[cfg(not(any(test, feature = "mutants")))]
        true
    }

    pub(crate) fn host(&self) -> MutexGuard<'_, HostClock> {
        lock(&self.host)
    }

    /// Keeps races; what to panic with, once no lock is held, if that is asked for.
    #[must_use]
    pub(crate) fn note(&self, races: Vec<Race>) -> Option<String> {
        let text = races.first()?.to_string();
        for race in &races {
            tracing::error!(%race);
        }
        let mut kept = lock(&self.races);
        let room = RACES_MAX.saturating_sub(kept.len());
        kept.extend(races.into_iter().take(room));
        (self.check == Check::Panic).then_some(text)
    }

    /// As [`Engine::note`], where nothing may panic: the next operation does.
    pub(crate) fn note_in_drop(&self, races: Vec<Race>) {
        if self.note(races).is_some() {
            self.deferred.store(true, Ordering::Relaxed);
        }
    }

    /// The panic that a free could not raise.
    pub(crate) fn raise(&self) {
        if self.deferred.swap(false, Ordering::Relaxed) {
            let text = lock(&self.races).last().map(ToString::to_string).unwrap_or_default();
            panic!("{text}");
        }
    }

    pub(crate) fn take_races(&self) -> Vec<Race> {
        self.deferred.store(false, Ordering::Relaxed);
        std::mem::take(&mut lock(&self.races))
    }

    /// The queue of a new stream; `None` inline.
    pub(crate) fn lease(
        &self,
        stream: StreamId,
        device: Device,
        progress: &Arc<Progress>,
    ) -> Result<Option<Arc<Work>>, DeviceError> {
        self.host().begin(stream);
        let lease = self.leases.fetch_add(1, Ordering::Relaxed);
        let work = || Arc::new(Work::new(stream, device, Arc::clone(progress)));
        match self.mode {
            CpuMode::Inline => Ok(None),
            CpuMode::Threads { seed } => {
                let work = work();
                let mut random = Random::new(seed ^ lease.wrapping_mul(0xa076_1d64_78bd_642f));
                let shared = Arc::clone(&work);
                std::thread::Builder::new()
                    .name(format!("farcall-{device}"))
                    .spawn(move || shared.work_off(&mut random))
                    .map_err(|error| DeviceError::os("spawn", error))?;
                Ok(Some(work))
            }
            CpuMode::Chaos { .. } => {
                let work = work();
                lock(&self.chaos).works.push(Arc::clone(&work));
                Ok(Some(work))
            }
        }
    }

    /// Notes a stream that the engine orders and does not run.
    pub(crate) fn begin_lease(&self, stream: StreamId) {
        self.host().begin(stream);
    }

    pub(crate) fn end_lease(&self, stream: StreamId) {
        self.host().end(stream);
    }

    /// Enqueues an operation. Those of one stream come in the order of their tickets: the caller holds its lock.
    pub(crate) fn push(self: &Arc<Self>, work: &Work, op: Op) {
        let outside: Vec<_> = if self.is_chaos() {
            let outside = op.waits.iter().filter(|wait| wait.is_outside());
            outside.map(|wait| (Arc::clone(&wait.progress), wait.ticket, wait.foreign.clone())).collect()
        } else {
            Vec::new()
        };
        lock(&work.ops).queue.push_back(op);
        work.enqueued.notify_one();
        for (progress, ticket, foreign) in outside {
            // Until this returns nobody can want the operation, and under the caller's lock nothing may run: no kick is needed.
            let registered = Arc::new(AtomicBool::new(false));
            let (engine, may_kick) = (Arc::downgrade(self), Arc::clone(&registered));
            progress.on_passed(ticket, move |_| {
                if may_kick.load(Ordering::Acquire) {
                    Self::kick(&engine);
                }
            });
            registered.store(true, Ordering::Release);
            // A CUDA device tells only who asked.
            foreign.iter().for_each(Event::watch);
        }
    }

    /// In chaos mode, whether a future yields before it asks.
    pub(crate) fn yields(&self) -> bool {
        self.is_chaos() && lock(&self.chaos).random.below(2) == 0
    }

    /// In chaos mode, has `kick` go on with the work that lets this ticket pass.
    pub(crate) fn want(&self, progress: &Arc<Progress>, ticket: u64) {
        if self.is_chaos() && !progress.has_passed(ticket) {
            lock(&self.chaos).wanted.push((Arc::clone(progress), ticket));
        }
    }

    /// In chaos mode, runs operations until the ticket has passed, or what is left waits for tokens and `patience` is over.
    pub(crate) fn drive(&self, progress: &Arc<Progress>, ticket: u64, patience: Patience) -> Result<(), DeviceError> {
        let this_thread = std::thread::current().id();
        let mut asked_others = false;
        while !progress.has_passed(ticket) {
            let mut chaos = lock(&self.chaos);
            match chaos.runner {
                Some(runner) if runner == this_thread => {
                    // A kernel asks: nothing else can run before it returns.
                    return match patience {
                        Patience::None => Ok(()),
                        Patience::Until(..) => Err(chaos.deadlock(progress, ticket)),
                    };
                }
                Some(_) => {
                    self.sleep(chaos, Patience::Until(None, Duration::MAX))?;
                    continue;
                }
                None => {}
            }
            if progress.has_passed(ticket) {
                // Another thread ran it while we waited for the turn.
                break;
            }
            chaos.works.retain(|work| !work.is_over());
            let runnable: Vec<_> = chaos.works.iter().filter(|work| work.is_runnable()).cloned().collect();
            if runnable.is_empty() {
                let foreign = match chaos.obstacle_of(progress) {
                    // A token was completed since we looked.
                    Obstacle::Gone => continue,
                    Obstacle::Deadlock => return Err(chaos.deadlock(progress, ticket)),
                    Obstacle::Outside(foreign) => foreign,
                };
                if !asked_others && !foreign.is_empty() {
                    // Another runtime's streams, and CUDA devices, may need somebody to ask, too.
                    asked_others = true;
                    drop(chaos);
                    foreign.iter().for_each(|event| drop(event.query()));
                    continue;
                }
                match patience {
                    Patience::None => return Ok(()),
                    until @ Patience::Until(..) => self.sleep(chaos, until)?,
                }
                asked_others = false;
                continue;
            }
            let picked = chaos.random.below(runnable.len());
            let work = &runnable[picked];
            let Some(op) = lock(&work.ops).queue.pop_front() else { continue };
            chaos.runner = Some(this_thread);
            drop(chaos);
            let (op_ticket, outcome) = op.run(work);
            let due = work.progress.advance(op_ticket, outcome);
            let mut chaos = lock(&self.chaos);
            chaos.runner = None;
            let kicked = std::mem::take(&mut chaos.kicked);
            drop(chaos);
            self.turn.notify_all();
            due.run();
            if kicked {
                self.drive_wanted();
            }
        }
        Ok(())
    }

    fn sleep(&self, chaos: MutexGuard<'_, Chaos>, patience: Patience) -> Result<(), DeviceError> {
        let Patience::Until(deadline, timeout) = patience else { return Ok(()) };
        match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
            None => drop(self.turn.wait(chaos)),
            Some(Duration::ZERO) => return Err(DeviceError::Timeout { what: "an event", waited: timeout }),
            Some(left) => drop(self.turn.wait_timeout(chaos, left)),
        }
        Ok(())
    }

    /// Something outside was completed that an operation waits for.
    fn kick(engine: &Weak<Self>) {
        let Some(engine) = engine.upgrade() else { return };
        let mut chaos = lock(&engine.chaos);
        let from_kernel = chaos.runner == Some(std::thread::current().id());
        chaos.kicked |= from_kernel;
        drop(chaos);
        engine.turn.notify_all();
        if !from_kernel {
            engine.drive_wanted();
        }
    }

    fn drive_wanted(&self) {
        let wanted = std::mem::take(&mut lock(&self.chaos).wanted);
        for (progress, ticket) in wanted {
            if let Err(error) = self.drive(&progress, ticket, Patience::None) {
                tracing::error!(%error, "futures are left waiting");
            }
            self.want(&progress, ticket);
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // No stream, storage or event is left that could tell whether this work ran: its memory goes back.
        let chaos = self.chaos.get_mut().unwrap_or_else(PoisonError::into_inner);
        for work in chaos.works.drain(..) {
            let queue = std::mem::take(&mut lock(&work.ops).queue);
            if let Some(last) = queue.back() {
                let last = last.ticket;
                drop(queue);
                work.progress.advance(last, Err(DeviceError::Cancelled)).run();
            }
        }
    }
}

/// Why a stream stands still.
enum Obstacle {
    /// It can go on.
    Gone,
    Deadlock,
    /// Tokens, and events of other runtimes: those are here.
    Outside(Vec<Event>),
}

impl Chaos {
    fn work_of(&self, progress: &Arc<Progress>) -> Option<&Arc<Work>> {
        self.works.iter().find(|work| Arc::ptr_eq(&work.progress, progress))
    }

    /// What keeps a stream's oldest operation, seen through all it waits for.
    fn obstacle_of(&self, progress: &Arc<Progress>) -> Obstacle {
        let (mut outside, mut foreign) = (false, Vec::new());
        let mut seen = HashSet::new();
        let mut left: Vec<_> = self.work_of(progress).cloned().into_iter().collect();
        while let Some(work) = left.pop() {
            if !seen.insert(work.stream) {
                continue;
            }
            let ops = lock(&work.ops);
            let Some(head) = ops.queue.front() else { continue };
            let mut pending = head.waits.iter().filter(|wait| !wait.is_over()).peekable();
            if pending.peek().is_none() {
                return Obstacle::Gone;
            }
            for wait in pending {
                if wait.is_outside() {
                    outside = true;
                    foreign.extend(wait.foreign.clone());
                } else {
                    left.extend(self.work_of(&wait.progress).cloned());
                }
            }
        }
        if outside { Obstacle::Outside(foreign) } else { Obstacle::Deadlock }
    }

    fn deadlock(&self, progress: &Arc<Progress>, ticket: u64) -> DeviceError {
        let event = match self.work_of(progress) {
            Some(work) => format!("stream {} at {ticket}", work.stream),
            None => format!("an event at {ticket}"),
        };
        let heads: Vec<_> = self.works.iter().filter_map(|work| work.describe_head()).collect();
        let stuck = if heads.is_empty() { "a kernel that waits".to_owned() } else { heads.join("; ") };
        DeviceError::Deadlock { event: event.into(), stuck: stuck.into() }
    }
}

/// The operations of one stream that have not run.
pub(crate) struct Work {
    stream: StreamId,
    device: Device,
    progress: Arc<Progress>,
    ops: Mutex<Ops>,
    enqueued: Condvar,
}

#[derive(Default)]
struct Ops {
    queue: VecDeque<Op>,
    /// The lease has ended: no more will come.
    closed: bool,
}

/// One enqueued operation.
pub(crate) struct Op {
    pub(crate) name: &'static str,
    pub(crate) ticket: u64,
    pub(crate) waits: Vec<Wait>,
    /// `None` only marks a point.
    pub(crate) body: Option<Body>,
}

/// What an operation does, and how that ended.
pub(crate) type Body = Box<dyn FnOnce() -> Outcome + Send>;

/// A ticket that an operation waits for. It holds no runtime: what is enqueued must not keep alive who runs it.
pub(crate) struct Wait {
    stream: StreamId,
    progress: Arc<Progress>,
    ticket: u64,
    /// The event itself, if another runtime or a CUDA device completes it.
    foreign: Option<Event>,
}

impl Wait {
    /// `None` if there is nothing to wait for.
    pub(crate) fn on(event: &Event, engine: &Arc<Engine>) -> Option<Self> {
        let lane = event.lane()?;
        let other = lane.engine.as_ref().is_some_and(|other| !Arc::ptr_eq(other, engine));
        let foreign = match &lane.cuda {
            Some(_) => Some(event.detached()),
            None => (other && !lane.progress.is_by_hand()).then(|| event.clone()),
        };
        Some(Self { stream: event.stream(), progress: Arc::clone(&lane.progress), ticket: event.ticket(), foreign })
    }

    fn is_over(&self) -> bool {
        self.progress.has_passed(self.ticket)
    }

    fn is_outside(&self) -> bool {
        self.progress.is_by_hand() || self.foreign.is_some()
    }

    fn block(&self) {
        match &self.foreign {
            Some(event) => drop(event.block(Duration::MAX)),
            None => drop(self.progress.block(self.ticket, None)),
        }
    }
}

impl Op {
    /// Runs it if nothing before it failed, and says how it ended.
    fn run(self, work: &Work) -> (u64, Outcome) {
        let failed = self.waits.iter().find_map(|wait| wait.progress.outcome(wait.ticket)?.err());
        let outcome = match failed.or_else(|| work.progress.failure()) {
            Some(error) => Err(error),
            None => self.body.map_or(Ok(()), |body| {
                catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|_| {
                    let reason = format!("the kernel of `{}` panicked", self.name).into();
                    Err(DeviceError::Lost { device: work.device, reason })
                })
            }),
        };
        (self.ticket, outcome)
    }
}

impl Work {
    fn new(stream: StreamId, device: Device, progress: Arc<Progress>) -> Self {
        Self { stream, device, progress, ops: Mutex::default(), enqueued: Condvar::new() }
    }

    /// The lease has ended; what is enqueued still runs.
    pub(crate) fn close(&self) {
        lock(&self.ops).closed = true;
        self.enqueued.notify_one();
    }

    fn is_over(&self) -> bool {
        let ops = lock(&self.ops);
        ops.closed && ops.queue.is_empty()
    }

    fn is_runnable(&self) -> bool {
        lock(&self.ops).queue.front().is_some_and(|head| head.waits.iter().all(Wait::is_over))
    }

    fn describe_head(&self) -> Option<String> {
        let ops = lock(&self.ops);
        let head = ops.queue.front()?;
        let pending = head.waits.iter().filter(|wait| !wait.is_over());
        let waits: Vec<_> = pending.map(|wait| format!("stream {} at {}", wait.stream, wait.ticket)).collect();
        let waits = if waits.is_empty() { String::new() } else { format!(" waits for {}", waits.join(", ")) };
        Some(format!("`{}` on stream {} at {}{waits}", head.name, self.stream, head.ticket))
    }

    /// A worker thread's life.
    fn work_off(&self, random: &mut Random) {
        loop {
            let mut ops = lock(&self.ops);
            let op = loop {
                if let Some(op) = ops.queue.pop_front() {
                    break op;
                }
                if ops.closed {
                    return;
                }
                ops = self.enqueued.wait(ops).unwrap_or_else(PoisonError::into_inner);
            };
            drop(ops);
            op.waits.iter().for_each(Wait::block);
            match random.below(8) {
                0..4 => {}
                4..6 => std::thread::yield_now(),
                6 => (0..random.below(2000)).for_each(|_| std::hint::spin_loop()),
                _ => std::thread::sleep(Duration::from_micros(random.below(50) as u64)),
            }
            let (ticket, outcome) = op.run(self);
            let due = self.progress.advance(ticket, outcome);
            if catch_unwind(AssertUnwindSafe(|| due.run())).is_err() {
                tracing::error!(stream = %self.stream, "a callback panicked");
            }
        }
    }
}

/// A kernel with the bytes that it will find when it runs.
pub(crate) fn body<F>(reads: Vec<Span>, writes: Vec<Span>, kernel: F) -> Body
where
    F: FnOnce(&[&[u8]], &mut [&mut [u8]]) -> Outcome + Send + 'static,
{
    Box::new(move || {
        // SAFETY: the storages of `reads` hold this operation's event as a reader's fence and wait for it before their memory is
        // recycled or written (C3); the operation waited for their write (C1).
        let sources: Vec<&[u8]> = reads.iter().map(|span| unsafe { span.bytes() }).collect();
        // SAFETY: the storages of `writes` hold this operation's event as the fence of their write: until it passed, nobody is given
        // the bytes, and the memory stays (C3). No other operation uses them, since this one waited for all earlier users (C1). They
        // are distinct, since each was borrowed mutably, and none is among `reads`, since those are frozen.
        let mut targets: Vec<&mut [u8]> = writes.iter().map(|span| unsafe { span.bytes_mut() }).collect();
        kernel(&sources, &mut targets)
    })
}

/// xorshift64*: a seed is a complete reproduction.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `end`.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        ((self.next() >> 33) as usize) % end
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
