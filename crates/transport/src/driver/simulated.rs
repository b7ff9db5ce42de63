//! A driver's steps, one at a time, in the order in which a simulation wants them. The threads of `pool` take the same steps.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;

use super::sources::Source;
use super::{BEATS_MISSED, Driver, LISTENERS, Turn};
use crate::endpoint::lock;
use crate::sim::Census;

impl Driver {
    /// A socket is ready for `flags`.
    pub(crate) fn step_socket(self: &Arc<Self>, token: u64, flags: EventFlags) {
        let mut turn = Turn::default();
        if LISTENERS.contains(&token) {
            self.accept(token);
        } else {
            self.dispatch_guarded(token, flags, &mut turn);
        }
        self.finish_turn(&mut turn);
    }

    /// Runs one job, if there is one: the one that `pick` chooses, as any of several threads may be first.
    pub(crate) fn step_job(self: &Arc<Self>, pick: impl FnOnce(usize) -> usize) {
        let job = {
            let mut pool = lock(&self.pool);
            if pool.jobs.is_empty() || pool.stop {
                None
            } else {
                let picked = pick(pool.jobs.len());
                pool.jobs.remove(picked)
            }
        };
        if let Some(job) = job {
            let mut turn = Turn::default();
            job.run(&mut turn);
            self.finish_turn(&mut turn);
        }
    }

    /// Looks at the deadlines if one is due; gives the next.
    pub(crate) fn step_timers(self: &Arc<Self>) -> Option<Instant> {
        if self.micros(self.now()) >= self.next_timer_us.load(Ordering::SeqCst) {
            self.run_timers();
        }
        let next = self.next_timer_us.load(Ordering::SeqCst);
        (next < u64::MAX).then(|| self.started + Duration::from_micros(next))
    }

    /// A heartbeat; gives the time to the next, `None` when there is no peer.
    pub(crate) fn step_beat(&self) -> Option<Duration> {
        if self.beat() {
            return Some(self.config.peer_timeout / BEATS_MISSED);
        }
        self.beating.store(false, Ordering::SeqCst);
        None
    }

    /// No goodbye is on its way any more.
    pub(crate) fn has_said_goodbye(&self) -> bool {
        !lock(&self.sources).values().any(|source| matches!(source, Source::Draining(..)))
    }

    /// What its connections hold.
    pub(crate) fn census(&self) -> Census {
        let (connections, endpoints) = {
            let sources = lock(&self.sources);
            (sources.by_token.len(), sources.controls())
        };
        let bulk_keys = lock(&self.bulk_keys).len();
        let mut census = Census { connections, bulk_keys, ..Census::default() };
        endpoints.iter().for_each(|endpoint| endpoint.count(&mut census));
        census
    }
}
