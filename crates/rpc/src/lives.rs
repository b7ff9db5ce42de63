//! Workers that are started again under their name: which process of it lives now, and how the others learn of it.
//!
//! The store numbers the lives of each rank, from 1. A worker says its number in each greeting and publishes it with its address.
//! Others learn of a new life when it dials them, when it answers in the place of the one they dialed, or from the store: there
//! they look after each loss and each failed dial, in a thread of its own, so that no call waits for the store.
//! Invariant L1: what is known of a worker only ever becomes newer. A connection to an earlier life is closed when a newer one
//! is known, and an earlier life is let in no more: no late frame of it is handled.
//! Invariant L2: two processes never hold one rank: who comes second waits until the first is gone, for a bounded time.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use farcall_transport::{CloseCause, EmbeddedStore, JobKey, ProtocolError, Store, StoreError, WorkerInfo, gone_key};

use crate::agent::Inner;
use crate::call::lock;
use crate::error::JoinError;

/// How long the process before is waited for. A killed one's connection to the store ends when its memory is freed.
const GONE_WAIT: Duration = Duration::from_secs(10);
/// The least time between two looks into the store.
const LOOK_PAUSE: Duration = Duration::from_millis(20);

/// What a life of a worker is known by in the store.
pub(crate) fn identity(prefix: &str, rank: u32, life: u64) -> String {
    format!("{prefix}/{rank}/{life}")
}

/// The store's key for something of a life.
pub(crate) fn key(prefix: &str, what: &str, rank: u32, life: u64) -> String {
    format!("{prefix}/{what}/{rank}/{life}")
}

fn count_key(prefix: &str, rank: u32) -> String {
    format!("{prefix}/life/{rank}")
}

/// The key of what the newest life of a worker published of itself.
pub(crate) fn worker_key(prefix: &str, rank: u32) -> String {
    format!("{prefix}/worker/{rank}")
}

/// The number of the life that begins now.
pub(crate) fn begin(
    address: &str,
    prefix: &str,
    rank: u32,
    job: Option<&JobKey>,
    deadline: Instant,
) -> Result<u64, JoinError> {
    // A life's connection to the store bears its number, which this one asks for.
    let store = EmbeddedStore::connect_with(address, &format!("{prefix}/joining/{rank}"), job, deadline)?;
    let life = store.add(&count_key(prefix, rank), 1)?;
    store.close()?;
    u64::try_from(life).map_err(|_| JoinError::Malformed { rank, message: format!("its life {life}") })
}

/// Waits until the life before this one is gone, or has left (L2).
pub(crate) fn await_earlier(
    store: &EmbeddedStore,
    prefix: &str,
    rank: u32,
    life: u64,
    deadline: Instant,
) -> Result<(), JoinError> {
    if life <= 1 {
        return Ok(());
    }
    let ends = [key(prefix, "left", rank, life - 1), gone_key(&identity(prefix, rank, life - 1))];
    let deadline = deadline.min(Instant::now() + GONE_WAIT);
    match store.wait_each(&[&[&ends[0], &ends[1]]], deadline) {
        Err(StoreError::Missing { .. }) => {
            let other = store.get(&worker_key(prefix, rank))?;
            let other = other.and_then(|info| postcard::from_bytes::<WorkerInfo>(&info).ok());
            let holder = other.map_or_else(|| "another process".to_owned(), |other| describe(&other));
            Err(JoinError::RankTaken { rank, holder })
        }
        ended => Ok(ended?),
    }
}

fn describe(info: &WorkerInfo) -> String {
    format!("{} (process {} at {})", info.id.name, info.pid, info.address)
}

/// The newest life of each rank that has begun to join.
pub(crate) fn newest(store: &EmbeddedStore, prefix: &str, world_size: u32) -> Result<Vec<u64>, StoreError> {
    let keys: Vec<String> = (0..world_size).map(|rank| count_key(prefix, rank)).collect();
    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
    // All have joined: the keys are there.
    let values = store.wait(&keys, Instant::now())?;
    Ok(values.iter().map(|value| str::from_utf8(value).ok().and_then(|text| text.parse().ok()).unwrap_or(0)).collect())
}

/// Ranks that were lost and may live again.
#[derive(Default)]
pub(crate) struct LookUps {
    ranks: BTreeSet<u32>,
    /// A thread looks.
    running: bool,
}

impl Inner {
    /// Whether a worker that says hello is of an earlier life than one that is known.
    pub(crate) fn check_life(&self, remote: &WorkerInfo) -> Result<(), CloseCause> {
        let Some(route) = self.route_of(&remote.id) else { return Ok(()) };
        let (life, newest) = (remote.incarnation, lock(&route.info).incarnation);
        if life < newest {
            return Err(ProtocolError::EarlierLife { worker: remote.id.name.to_string(), life, newest }.into());
        }
        Ok(())
    }

    /// A life of a worker is known; a newer one than before ends the connection to that.
    pub(crate) fn learn(&self, info: &WorkerInfo) {
        let Some(route) = self.route_of(&info.id) else { return };
        {
            let mut known = lock(&route.info);
            if known.incarnation >= info.incarnation {
                return;
            }
            *known = Arc::new(info.clone());
        }
        // If it is being dialed, that meets the new life, or nobody, or one that is known for old when it answers.
        let old = route.current.try_lock().ok().and_then(|mut current| {
            let is_old = |worker: &WorkerInfo| worker.incarnation < info.incarnation;
            current.take_if(|connection| connection.endpoint.remote().is_some_and(is_old))
        });
        tracing::info!(worker = %info.id, life = info.incarnation, "a worker was started again");
        if let Some(old) = old {
            old.endpoint.close(CloseCause::Replaced { life: info.incarnation });
        }
    }

    /// Looks, soon, whether the store knows of a newer life of a worker that was lost.
    pub(crate) fn look_up(&self, rank: u32) {
        if self.group.get().is_none() || self.closed.load(Ordering::SeqCst) {
            return;
        }
        {
            let mut look_ups = lock(&self.look_ups);
            look_ups.ranks.insert(rank);
            if std::mem::replace(&mut look_ups.running, true) {
                return;
            }
        }
        let this = Weak::clone(&self.this);
        let started = thread::Builder::new().name("farcall-lookup".into()).spawn(move || {
            while let Some(agent) = this.upgrade() {
                if !agent.look() {
                    return;
                }
                drop(agent);
                thread::sleep(LOOK_PAUSE);
            }
        });
        if let Err(error) = started {
            tracing::warn!(%error, "cannot look for workers that were started again");
            lock(&self.look_ups).running = false;
        }
    }

    /// One look; gives whether another may be due.
    fn look(&self) -> bool {
        let ranks = {
            let mut look_ups = lock(&self.look_ups);
            let ranks = std::mem::take(&mut look_ups.ranks);
            look_ups.running = !ranks.is_empty() && !self.closed.load(Ordering::SeqCst);
            if !look_ups.running {
                return false;
            }
            ranks
        };
        let Some(group) = self.group.get() else { return true };
        match group.published(ranks, &self.me, self.driver.config()) {
            Ok(workers) => workers.iter().for_each(|info| self.learn(info)),
            Err(error) => tracing::debug!(%error, "cannot look for workers that were started again"),
        }
        true
    }
}
