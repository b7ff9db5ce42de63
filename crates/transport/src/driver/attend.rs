//! A thread that stays with one ring, while calls come by it one after the other and nobody has a processor to look with.
//!
//! Whoever is woken by the epoll set was woken by a byte on a socket, which it must read, and has asked the set twice: that takes as
//! long as all the rest of a small call. A thread that sleeps on the ring's own word is woken as fast as the system can. So a leader
//! that is rung for again and again by one endpoint passes its role on, once, and attends that ring until nothing has come for a
//! while. It runs short jobs by itself, as a leader does; should one turn out long, the watchdog gives the ring to the leader.
//!
//! Invariant W3: as of a caller that drives a ring (`endpoint::rings`), but for two ticks of the watchdog. Invariant ATTEND: one
//! thread of a driver at most attends.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::job::Turn;
use super::pool::{WATCH_TICK, guarded};
use super::{Driver, lock};
use crate::endpoint::Endpoint;

/// A ring in which nothing came for so long is left.
const IDLE: Duration = Duration::from_millis(10);

impl Driver {
    /// The leader of `term` would sleep: whether it has passed its role on instead, and attended the only ring that something
    /// comes by.
    pub(super) fn attend(self: &Arc<Self>, term: u64, turn: &mut Turn) -> bool {
        let endpoint = match &lock(&self.hot)[..] {
            [endpoint] if endpoint.rings_often() => Arc::clone(endpoint),
            _ => return false,
        };
        {
            let mut attended = lock(&self.attended);
            if attended.is_some() {
                return false;
            }
            *attended = Some(Arc::clone(&endpoint));
        }
        let stay = Stay(self);
        {
            let mut pool = lock(&self.pool);
            // One thread leads then, and one more is left for jobs.
            let spare = pool.idle > 1 || pool.threads.len() + 1 < self.config.threads_max;
            if !spare || !self.pass_role(&mut pool, term) {
                return false;
            }
            // This leader's word: the next one's comes behind the pool's lock.
            self.sleeping_until_us.store(0, Ordering::SeqCst);
        }
        self.work.notify_one();
        lock(&self.hot).retain(|hot| !Arc::ptr_eq(hot, &endpoint));
        guarded(&endpoint, || {
            endpoint.cool(turn);
            self.stay_with(&endpoint, turn);
            false
        });
        drop(stay);
        guarded(&endpoint, || {
            self.finish_turn(turn);
            false
        });
        true
    }

    fn stay_with(self: &Arc<Self>, endpoint: &Arc<Endpoint>, turn: &mut Turn) {
        while !lock(&self.pool).stop && endpoint.attend_ring(turn, IDLE) {
            // Several are the pool's: none may wait for another, and no reply for the next job.
            match turn.jobs.pop() {
                Some(job) if turn.jobs.is_empty() && job.cost.is_short() && self.may_begin() => {
                    let number = self.attended_jobs.fetch_add(1, Ordering::SeqCst) + 1;
                    self.attended_job.store(number, Ordering::SeqCst);
                    if !self.watching.swap(true, Ordering::SeqCst) {
                        self.tick_watchdog(WATCH_TICK);
                    }
                    self.run(job, turn);
                    self.attended_job.store(0, Ordering::SeqCst);
                    self.end_job();
                }
                job => turn.jobs.extend(job),
            }
            self.finish_turn(turn);
        }
    }

    /// Counts a job that this thread runs, if none waits and one more may run.
    fn may_begin(&self) -> bool {
        let mut pool = lock(&self.pool);
        let may = !pool.stop && pool.jobs.is_empty() && pool.running < self.config.handlers_max.max(1);
        pool.running += usize::from(may);
        may
    }

    /// It has ended: one that has waited for its turn is others'.
    fn end_job(&self) {
        let mut pool = lock(&self.pool);
        pool.running -= 1;
        let (waiting, idle) = (!pool.jobs.is_empty(), pool.idle > 0);
        drop(pool);
        self.hand_on(waiting, idle);
    }

    /// The watchdog's tick: a ring whose attendant is in the same job as at the last one, `seen`, becomes the leader's. Gives the job
    /// that it is in.
    pub(super) fn look_after_attended(&self, seen: u64) -> u64 {
        let job = self.attended_job.load(Ordering::SeqCst);
        let is_long = job != 0
            && job == seen
            && self.attended_job.compare_exchange(job, 0, Ordering::SeqCst, Ordering::SeqCst).is_ok();
        if is_long {
            let endpoint = lock(&self.attended).clone();
            if let Some(endpoint) = endpoint {
                self.heat(&endpoint);
                self.rouse_leader();
            }
        }
        job
    }

    /// Whoever attends a ring is to leave it soon.
    pub(super) fn send_attendant_away(&self) {
        let endpoint = lock(&self.attended).clone();
        if let Some(endpoint) = endpoint {
            endpoint.send_attendant_away();
        }
    }
}

/// The driver's one stay at a ring (ATTEND).
struct Stay<'a>(&'a Driver);

impl Drop for Stay<'_> {
    fn drop(&mut self) {
        let endpoint = lock(&self.0.attended).take();
        drop(endpoint);
    }
}
