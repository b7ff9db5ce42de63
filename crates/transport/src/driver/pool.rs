//! The driver's threads: who leads, who works, and the watchdog.
//!
//! Invariant D2: a thread in a job leads for at most two [`WATCH_TICK`]s. The role, the jobs and who is busy change under the
//! pool's lock; the leader sleeps only when no job waits that it may run.

use std::cell::Cell;
use std::collections::{HashSet, VecDeque};
use std::hint::black_box;
use std::mem::MaybeUninit;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use rustix::io::Errno;
use rustix::time::{Itimerspec, TimerfdTimerFlags, timerfd_settime};

use super::engine::Engine;
use super::job::{Job, Turn};
use super::{Driver, EVENTS, LISTENERS, WAKE};
use crate::CloseCause;
use crate::endpoint::{Endpoint, lock};

/// Heartbeats that may be missed in a row: the next one ends the connection.
pub(crate) const BEATS_MISSED: u32 = 4;
/// How often the watchdog looks at a leader that runs jobs.
pub(super) const WATCH_TICK: Duration = Duration::from_millis(1);
/// Ticks without a job after which the watchdog sleeps.
const WATCH_IDLE_TICKS: u32 = 20;
/// How long replies of one batch may wait for each other.
const FLUSH_AFTER: Duration = Duration::from_micros(20);
/// How long a thread without work stays.
const IDLE_EXIT: Duration = Duration::from_secs(5);
/// A wait that is none.
const NOW: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };
/// Finds in rings until the system is asked for events.
const LOOKS: u32 = 32;
/// A find that took so long is followed by that, too.
const LONG_LOOK: Duration = Duration::from_micros(50);

thread_local! {
    /// The driver whose job this thread runs.
    static RUNNING: Cell<*const Driver> = const { Cell::new(ptr::null()) };
}

/// Of its stack and of its heap, what a thread that reads frames and runs short jobs needs: a buffer of 32 KiB, and as much again.
const WARM_BYTES: usize = 64 << 10;

pub(super) struct Pool {
    pub(super) jobs: VecDeque<Job>,
    /// Threads in a job, without those that wait in [`Driver::blocking`].
    pub(super) running: usize,
    pub(super) idle: usize,
    /// Those that were started and have not ended, the watchdog's too.
    pub(super) threads: HashSet<thread::ThreadId>,
    pub(super) led: bool,
    pub(super) stop: bool,
}

/// Foreign code runs on this thread, too (see `dispatch_guarded`): should it panic, the connection ends, which is something to do.
pub(super) fn guarded(endpoint: &Arc<Endpoint>, serve: impl FnOnce() -> bool) -> bool {
    catch_unwind(AssertUnwindSafe(serve)).unwrap_or_else(|_| {
        crate::limited!(error, "a panic while a connection was served; it is closed");
        endpoint.close(CloseCause::PeerLost { source: None });
        true
    })
}

/// A thread's first call is to fault on no page of its stack or of its heap, however long after its start that is.
#[inline(never)]
fn warm() {
    black_box([1_u8; WARM_BYTES]);
    black_box(vec![1_u8; WARM_BYTES]);
}

impl Driver {
    pub(super) fn spawn_thread(self: &Arc<Self>, pool: &mut Pool) -> std::io::Result<()> {
        let driver = Arc::clone(self);
        let handle = thread::Builder::new().name("farcall".into()).spawn(move || driver.work())?;
        pool.threads.insert(handle.thread().id());
        Ok(())
    }

    fn work(self: &Arc<Self>) {
        warm();
        let mut turn = Turn::default();
        let mut pool = lock(&self.pool);
        while !pool.stop {
            if !pool.led {
                pool.led = true;
                let term = self.term.fetch_add(1, Ordering::SeqCst) + 1;
                drop(pool);
                self.lead(term, &mut turn);
                pool = lock(&self.pool);
            } else if pool.running < self.config.handlers_max.max(1)
                && let Some(job) = pool.jobs.pop_front()
            {
                pool.running += 1;
                drop(pool);
                self.run(job, &mut turn);
                self.finish_turn(&mut turn);
                pool = lock(&self.pool);
                pool.running -= 1;
            } else {
                pool.idle += 1;
                let (woken, timeout) = match self.work.wait_timeout(pool, IDLE_EXIT) {
                    Ok(result) => result,
                    Err(poisoned) => poisoned.into_inner(),
                };
                pool = woken;
                pool.idle -= 1;
                if timeout.timed_out() && pool.led && (pool.jobs.is_empty() || pool.idle > 0) {
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
            if self.poll(backlog, term, turn) {
                return;
            }
            turn.flush();
            self.flush_all();
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
        !pool.jobs.is_empty()
            && pool.running < self.config.handlers_max.max(1)
            && (pool.idle > 0 || pool.threads.len() < self.config.threads_max)
    }

    pub(super) fn run(self: &Arc<Self>, job: Job, turn: &mut Turn) {
        let before = RUNNING.replace(Arc::as_ptr(self));
        job.run(turn);
        RUNNING.set(before);
    }

    /// One more job may run: if some are `waiting`, it is a thread's that is `idle`, or the leader's.
    pub(super) fn hand_on(&self, waiting: bool, idle: bool) {
        match (waiting, idle) {
            (true, true) => self.work.notify_one(),
            (true, false) => self.wake_leader(),
            (false, _) => {}
        }
    }

    /// Runs `f`, which waits for something that other jobs may have to bring: meanwhile one more of them may run. From any
    /// thread; it is the driver's own jobs that count.
    pub fn blocking<R>(&self, f: impl FnOnce() -> R) -> R {
        if !ptr::eq(RUNNING.get(), self) {
            return f();
        }
        let mut pool = lock(&self.pool);
        pool.running -= 1;
        let (waiting, idle) = (!pool.jobs.is_empty(), pool.idle > 0);
        drop(pool);
        self.hand_on(waiting, idle);
        /// Whatever `f` does: the job runs on, and is counted again.
        struct Blocked<'a>(&'a Driver);
        impl Drop for Blocked<'_> {
            fn drop(&mut self) {
                RUNNING.set(self.0);
                lock(&self.0.pool).running += 1;
            }
        }
        let _blocked = Blocked(self);
        // What `f` drives meanwhile may wait, too: it is no job.
        RUNNING.set(ptr::null());
        f()
    }

    /// Waits for events, unless jobs wait already, and hands them to their sources. `true`: it has done something else meanwhile, and
    /// another thread leads.
    fn poll(self: &Arc<Self>, backlog: bool, term: u64, turn: &mut Turn) -> bool {
        let mut timeout = self.timeout(backlog);
        let idle = timeout.is_none_or(|timeout| timeout != NOW);
        let began = idle.then(Instant::now);
        let is_cold = lock(&self.hot).is_empty();
        if self.look_at_hot(began, turn) {
            self.sleeping_until_us.store(0, Ordering::SeqCst);
            // Sockets and timers have their turn, too.
            let long = began.is_some_and(|began| began.elapsed() > LONG_LOOK);
            if !long && self.looks.fetch_add(1, Ordering::Relaxed) % LOOKS != LOOKS - 1 {
                return false;
            }
            timeout = Some(NOW);
        } else if idle && !is_cold && self.attend(term, turn) {
            return true;
        } else if idle && self.cool_all(turn) {
            timeout = Some(NOW);
        } else if let (Some(began), true, true) = (began, is_cold, self.by_socket.swap(false, Ordering::Relaxed)) {
            // Frames come by sockets, and none by rings: where one was looked at, that was long enough.
            let mut event = [MaybeUninit::<epoll::Event>::uninit(); 1];
            let epoll = &self.system().epoll;
            self.spin
                .look(began, || epoll::wait(epoll, &mut event, Some(&NOW)).is_ok_and(|(ready, _)| !ready.is_empty()));
        }
        let mut events = [MaybeUninit::<epoll::Event>::uninit(); EVENTS];
        let ready = match epoll::wait(&self.system().epoll, &mut events, timeout.as_ref()) {
            Ok((ready, _)) => &*ready,
            Err(Errno::INTR) => &[],
            Err(error) => {
                crate::limited!(error, %error, "epoll_wait");
                &[]
            }
        };
        self.sleeping_until_us.store(0, Ordering::SeqCst);
        if let (Some(began), false) = (began, ready.is_empty()) {
            self.spin.waited(began);
        }
        for event in ready {
            let (token, flags) = (event.data.u64(), event.flags);
            match token {
                WAKE => {
                    let _ = rustix::io::read(&self.system().wake, &mut [0_u8; 8]);
                }
                listener if LISTENERS.contains(&listener) => self.accept(listener),
                _ => self.dispatch_guarded(token, flags, turn),
            }
        }
        if self.micros(Instant::now()) >= self.next_timer_us.load(Ordering::SeqCst) {
            self.run_timers();
        }
        false
    }

    /// Looks at the rings in which something came lately: for a while from `idle` on, if there is nothing else to do. Whether
    /// there was something.
    fn look_at_hot(self: &Arc<Self>, idle: Option<Instant>, turn: &mut Turn) -> bool {
        let mut hot = std::mem::take(&mut *lock(&self.hot));
        if hot.is_empty() {
            return false;
        }
        let any = || hot.iter().any(|endpoint| endpoint.wants_leader());
        let pays = || !hot.iter().any(|endpoint| endpoint.shares_processor());
        let mut found = false;
        if any() || idle.is_some_and(|began| pays() && self.spin.look(began, any)) {
            for endpoint in hot.iter().filter(|endpoint| endpoint.wants_leader()) {
                found |= guarded(endpoint, || endpoint.look_at_ring(turn));
            }
        }
        if let (Some(began), true) = (idle, found) {
            self.spin.waited(began);
        }
        hot.retain(|endpoint| endpoint.closed().is_none());
        self.put_back(hot);
        found
    }

    /// The leader will sleep: rings that are written meanwhile must wake it. Whether one was already.
    fn cool_all(self: &Arc<Self>, turn: &mut Turn) -> bool {
        let mut hot = std::mem::take(&mut *lock(&self.hot));
        let mut found = false;
        for endpoint in hot.drain(..) {
            found |= endpoint.wants_leader();
            guarded(&endpoint, || {
                endpoint.cool(turn);
                false
            });
        }
        self.put_back(hot);
        // Some may be hot again, as more has come than could be read.
        found || !turn.is_empty() || !lock(&self.hot).is_empty()
    }

    /// Hot endpoints, beside those that are hot since they were taken. The longer list stays.
    fn put_back(&self, mut hot: Vec<Arc<Endpoint>>) {
        let mut since = lock(&self.hot);
        if since.capacity() < hot.capacity() {
            std::mem::swap(&mut *since, &mut hot);
        }
        since.append(&mut hot);
    }

    /// A ring is the leader's now.
    pub(crate) fn rouse_leader(&self) {
        if self.sleeping_until_us.load(Ordering::SeqCst) != 0 {
            self.wake_leader();
        }
    }

    /// The leader has something to do with the ring of `endpoint`, and looks at it by itself until it has had nothing to do.
    pub(crate) fn heat(&self, endpoint: &Arc<Endpoint>) {
        if !endpoint.hot.swap(true, Ordering::SeqCst) {
            lock(&self.hot).push(Arc::clone(endpoint));
        }
    }

    fn timeout(&self, backlog: bool) -> Option<Timespec> {
        if backlog {
            return Some(NOW);
        }
        // Published before the timer is read: a timer set in between either is seen here or sees the sleeper.
        self.sleeping_until_us.store(u64::MAX, Ordering::SeqCst);
        if !lock(&self.unflushed).is_empty() {
            return Some(NOW);
        }
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
        let mut ran = 0;
        loop {
            let (job, alone) = {
                // One lock for the role, the job and who is busy: `pass_role` takes it, too.
                let mut pool = lock(&self.pool);
                pool.running -= std::mem::take(&mut ran);
                if !self.leads(term) || !self.may_run(&pool) {
                    break;
                }
                let Some(job) = pool.jobs.pop_front() else { break };
                pool.running += 1;
                ran = 1;
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
            self.run(job, turn);
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
    pub(super) fn pass_role(self: &Arc<Self>, pool: &mut Pool, term: u64) -> bool {
        if !self.leads(term) || pool.stop {
            return false;
        }
        if pool.idle == 0
            && let Err(error) = self.spawn_thread(pool)
        {
            crate::limited!(error, %error, "no thread to lead while a handler runs");
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
    pub(super) fn tick_watchdog(&self, period: Duration) {
        if let Engine::Simulated(host) = &self.engine {
            return host.arm_beat(self.config.peer_timeout / BEATS_MISSED);
        }
        let period = Timespec { tv_sec: 0, tv_nsec: period.as_nanos() as i64 };
        let timer = Itimerspec { it_interval: period, it_value: period };
        if let Err(error) = timerfd_settime(&self.system().watchdog, TimerfdTimerFlags::empty(), &timer) {
            crate::limited!(error, %error, "timerfd_settime");
        }
    }

    /// The watchdog's thread: takes the leading role from a thread whose job has lasted a tick, and sends heartbeats.
    pub(super) fn watch(self: &Arc<Self>) {
        let (mut seen, mut idle_ticks, mut attended_job, mut attended_jobs) = (0, 0, 0, 0);
        let period = self.config.peer_timeout / BEATS_MISSED;
        let mut next_beat = None;
        loop {
            if self.beating.load(Ordering::SeqCst) && next_beat.is_none() {
                next_beat = Some(Instant::now() + period);
            }
            let ticked = self.next_tick(next_beat);
            if lock(&self.pool).stop {
                return self.end_thread(lock(&self.pool));
            }
            if next_beat.is_some_and(|due| due <= Instant::now()) {
                next_beat = Some(Instant::now() + period);
                if !catch_unwind(AssertUnwindSafe(|| self.beat())).unwrap_or(true) {
                    next_beat = None;
                    self.beating.store(false, Ordering::SeqCst);
                    // Who came meanwhile may have seen it beat.
                    if !lock(&self.sources).controls().is_empty() {
                        self.beating.store(true, Ordering::SeqCst);
                    }
                }
            }
            if !ticked {
                continue;
            }
            let gathered = self.flush_listed();
            attended_job = self.look_after_attended(attended_job);
            let mut pool = lock(&self.pool);
            let begun = self.jobs_begun.load(Ordering::SeqCst);
            let busy_term = self.busy_term.load(Ordering::SeqCst);
            if begun != seen {
                (seen, idle_ticks) = (begun, 0);
            } else if busy_term != 0 && self.leads(busy_term) {
                if self.pass_role(&mut pool, busy_term) {
                    self.work.notify_one();
                }
            } else if gathered || self.attended_jobs.load(Ordering::SeqCst) != attended_jobs {
                attended_jobs = self.attended_jobs.load(Ordering::SeqCst);
                idle_ticks = 0;
            } else {
                idle_ticks += 1;
            }
            drop(pool);
            if idle_ticks >= WATCH_IDLE_TICKS {
                idle_ticks = 0;
                self.tick_watchdog(Duration::ZERO);
                self.watching.store(false, Ordering::SeqCst);
                let wanted = || {
                    self.jobs_begun.load(Ordering::SeqCst) != seen
                        || self.attended_jobs.load(Ordering::SeqCst) != attended_jobs
                        || !lock(&self.gathered).is_empty()
                };
                if wanted() || lock(&self.pool).stop {
                    // Somebody began a job, or gathers, and still saw the watchdog tick; or the last tick was asked for meanwhile.
                    self.watching.store(true, Ordering::SeqCst);
                    self.tick_watchdog(WATCH_TICK);
                }
            }
        }
    }

    /// Sleeps until the watchdog ticks (`true`) or a heartbeat is due.
    fn next_tick(&self, next_beat: Option<Instant>) -> bool {
        let left = next_beat.map(|due| due.saturating_duration_since(Instant::now()));
        let left = left.map(|left| Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) });
        match poll(&mut [PollFd::new(&self.system().watchdog, PollFlags::IN)], left.as_ref()) {
            Ok(0) | Err(Errno::INTR) => false,
            Ok(_) => {
                // Readable, and this thread is the only reader.
                let _ = rustix::io::read(&self.system().watchdog, &mut [0_u8; 8]);
                true
            }
            Err(error) => {
                crate::limited!(error, %error, "watchdog");
                thread::sleep(WATCH_TICK);
                false
            }
        }
    }
}
