//! What ends an endpoint: silence, a death, a wait that was too long, and whoever closes it.

use std::net::Shutdown;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::bulk::{BulkLink, ENDED_MAX, STALL_MAX};
use super::encode::{encoded, greeting, write_greeting};
use super::{Endpoint, Status, lock};
use crate::address::Goodbye;
use crate::driver::BEATS_MISSED;
use crate::frame::{Header, Kind};
use crate::planted::{self, Bug};
use crate::{CloseCause, ProtocolError, life};

/// With so much unread, small frames at worst, a socket may be full: no more can come.
const FULL_BYTES: u64 = 8 << 10;
impl Endpoint {
    /// Has the endpoint close when the peer's process dies, if both are processes of one user on one host.
    pub(crate) fn watch_life(self: &Arc<Self>) {
        let theirs = self.remote.get().and_then(|remote| remote.local.as_ref());
        let (Some(own), Some(theirs)) = (&self.driver.config().worker.local, theirs) else { return };
        if let Some(life) = theirs.life.filter(|_| own.is_near(theirs))
            && let Some(process) = self.control.socket().peer_process()
            && let Err(error) = life::watch(self, process, life)
        {
            tracing::debug!(%error, peer = ?self.peer_id(), "its death will be told by the socket or by silence");
        }
    }

    pub(crate) fn on_death(self: &Arc<Self>) {
        self.close(CloseCause::Died);
    }

    /// Bytes were read: the peer lives, unless they have lain here since the last heartbeat, which has counted them.
    pub(super) fn hear(&self) {
        if self.unread.load(Ordering::Relaxed) == 0 {
            self.heard.store(self.driver.beats(), Ordering::Relaxed);
        } else {
            self.unread.store(0, Ordering::Relaxed);
        }
    }

    /// Nothing was read since the last heartbeat. Who is not read, because a handler holds the reader up, still lives if more has
    /// come of it meanwhile, or may be kept from sending more. Gives why it is lost, if it is.
    fn judge_silence(&self, beat: u32) -> Option<CloseCause> {
        if let Some(rings) = self.rings.get() {
            let signs = rings.signs();
            if std::mem::replace(&mut *lock(&self.signs), signs) != signs {
                // Since the last heartbeat.
                self.heard.store(beat.wrapping_sub(1), Ordering::Relaxed);
            }
        }
        // Beside rings the socket brings bells alone, of bytes that are counted already: later, they would count twice.
        let bells = self.bell.get().is_some();
        let unread = if bells { 0 } else { self.control.socket().unread_bytes().unwrap_or(0) };
        if unread > self.unread.swap(unread, Ordering::Relaxed) || unread >= FULL_BYTES {
            self.heard.store(beat, Ordering::Relaxed);
        }
        if beat.wrapping_sub(self.heard.load(Ordering::Relaxed)) < BEATS_MISSED {
            return None;
        }
        let ended = if bells {
            self.ended.load(Ordering::Relaxed)
        } else {
            unread == 0 && !self.has_ring_bytes() && self.has_unread()
        };
        Some(if ended {
            CloseCause::PeerLost { source: None }
        } else {
            CloseCause::Silent { silent: self.driver.config().peer_timeout }
        })
    }

    /// Sends a ping, and closes the endpoint if the peer has missed too many. Called by the watchdog's thread.
    pub(crate) fn on_beat(self: &Arc<Self>, beat: u32) {
        // Before that, the connect timeout is what counts.
        if self.status() != Status::Open {
            return;
        }
        if beat != self.heard.load(Ordering::Relaxed)
            && !(planted::has(Bug::SilenceIgnored) && self.dialed.is_none())
            && let Some(cause) = self.judge_silence(beat)
        {
            return self.close(cause);
        }
        if let Some(rings) = self.rings.get() {
            // A count that the peer looks at: nobody is woken.
            rings.beat();
        }
        let Ok(mut tx) = self.tx.try_lock() else { return };
        if self.bell.get().is_none() {
            // The peer may not have the rings yet: this it sees.
            self.tell(&tx);
        }
        let backlog = tx.wire.len() - tx.sent;
        if backlog > self.driver.config().limits.backlog_bytes_max
            && beat.wrapping_sub(self.took.load(Ordering::Relaxed)) >= BEATS_MISSED
        {
            // It speaks, but takes nothing.
            drop(tx);
            return self.close(CloseCause::Silent { silent: self.driver.config().peer_timeout });
        }
        let idle = tx.wire.is_empty();
        if self.has_slabs.load(Ordering::Acquire) {
            for slab in lock(&self.lender).take_retired() {
                tx.wire.extend_from_slice(Header { call: slab, ..Header::new(Kind::Retire) }.as_bytes());
            }
            self.return_leases(&mut tx.wire);
        }
        if let Some((_, ring)) = &mut tx.ring {
            ring.look_at_pages();
        }
        // Bytes that wait to leave will say the same.
        if idle && self.cause.get().is_none() {
            for _ in 0..if tx.ring.is_none() { self.driver.copies(Kind::Ping) } else { 0 } {
                tx.wire.extend_from_slice(Header::new(Kind::Ping).as_bytes());
            }
            let written = self.write_control(&mut tx);
            drop(tx);
            if let Err(cause) = written {
                self.close(cause);
            }
        }
    }

    /// Closes what took too long, lets the peer check its deadlines; gives the next time to look.
    pub(crate) fn on_timer(self: &Arc<Self>, now: Instant) -> Option<Instant> {
        let connect_timeout = self.driver.config().connect_timeout;
        let mut next = None;
        let mut check = |due: Instant| {
            let late = due <= now;
            if !late {
                next = Some(next.map_or(due, |next: Instant| next.min(due)));
            }
            late
        };
        let connecting_since = match (self.status(), &lock(&self.bulk).link) {
            (Status::Connecting | Status::Greeting, _) => Some(self.opened_at),
            (_, BulkLink::Connecting(_, since) | BulkLink::Proving(_, since, _) | BulkLink::Requested(since)) => {
                Some(*since)
            }
            _ => None,
        };
        if let Some(since) = connecting_since
            && check(since + connect_timeout)
        {
            let what = "bulk connection";
            self.close(match self.route().cloned() {
                Some(route) => CloseCause::ConnectTimeout { route, timeout: connect_timeout },
                None => ProtocolError::Stalled { what, timeout: connect_timeout }.into(),
            });
            return None;
        }
        let ended = match &lock(&self.bulk).link {
            BulkLink::Ended(since, cause) => Some((*since, cause.clone())),
            _ => None,
        };
        if let Some((since, cause)) = ended
            && check(since + ENDED_MAX)
        {
            self.close(cause);
            return None;
        }
        let stalled = self.bulk_rx.try_lock().ok().and_then(|rx| rx.stalled);
        if let Some((_, since)) = stalled
            && check(since + STALL_MAX)
        {
            let what = "frame for a bulk chunk";
            self.close(ProtocolError::Stalled { what, timeout: STALL_MAX }.into());
            return None;
        }
        if let Some(due) = self.peer.get().and_then(|peer| peer.on_timer(self, now)) {
            check(due);
        }
        next
    }

    /// Closes the endpoint; the first cause wins. The peer is told why, its waiters here hear of it. Idempotent.
    pub fn close(self: &Arc<Self>, cause: CloseCause) {
        let cause = Arc::new(cause);
        if self.cause.set(Arc::clone(&cause)).is_err() {
            return;
        }
        if let Some(host) = self.driver.simulated() {
            host.note_closed(self.peer_text(), &cause);
        }
        let before = self.status.swap(Status::Closed as u8, Ordering::AcqRel);
        if let Some(goodbye) = Goodbye::of(&cause) {
            let goodbye = greeting(Kind::Close, &encoded(&goodbye));
            // Best effort, and only on a frame boundary: a peer that reads nothing hears the connection end.
            if before == Status::Open as u8 {
                let mut tx = lock(&self.tx);
                if self.write_control(&mut tx).is_ok() && tx.sent == tx.wire.len() {
                    match &mut tx.ring {
                        Some((_, ring)) if ring.fits(goodbye.len()) => {
                            tx.wire.extend_from_slice(&goodbye);
                            let _ = self.write_control(&mut tx);
                        }
                        // Half a frame would be worse than none.
                        Some(_) => {}
                        None => drop(write_greeting(self.control.socket(), &goodbye)),
                    }
                }
            } else if before == Status::Greeting as u8 && matches!(*cause, CloseCause::Auth(_)) {
                // What waits in `tx` is for who has proven the key.
                let _ = write_greeting(self.control.socket(), &goodbye);
            }
        }
        lock(&self.tx).passing.clear();
        let lent = lock(&self.lender).end(self.may_live(&cause));
        drop(lent);
        let bulk = std::mem::replace(&mut lock(&self.bulk).link, BulkLink::None);
        if let BulkLink::Connecting(link, _) | BulkLink::Proving(link, ..) | BulkLink::Open(link) = bulk {
            self.driver.remove(&link);
            let _ = link.socket().shutdown(Shutdown::Both);
        }
        let (queue, current, key) = {
            let mut bulk = lock(&self.bulk);
            bulk.prefix.clear();
            (std::mem::take(&mut bulk.queue), bulk.current.take(), bulk.key)
        };
        drop((queue, current));
        self.driver.forget_key(key);
        if matches!(*cause, CloseCause::Died | CloseCause::Silent { .. }) {
            // Nothing is to come: a caller that sleeps in its read wakes at once.
            let _ = self.control.socket().shutdown(Shutdown::Both);
        }
        if let Some(rings) = self.rings.get() {
            rings.rouse();
        }
        self.driver.linger(&self.control);
        if self.ended.load(Ordering::SeqCst) {
            // Its end was seen already, and will not be again.
            self.driver.remove(&self.control);
        }
        if let Some(peer) = self.peer.get() {
            peer.on_closed(self, &cause);
        }
    }

    /// Whether the peer's process may still read what it has borrowed, as far as is known.
    fn may_live(&self, cause: &CloseCause) -> bool {
        let life = || self.remote.get()?.local.as_ref()?.life;
        match cause {
            CloseCause::Died => false,
            CloseCause::PeerLost { .. } => !life().is_some_and(life::is_dead),
            _ => true,
        }
    }
}
