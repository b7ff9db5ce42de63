//! The sockets of the epoll set, what they belong to, and their deadlines.

use std::collections::BTreeMap;
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use farcall_device::Kept;
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;

use super::accept::Greeting;
use super::{Driver, Turn, WATCH_TICK};
use crate::endpoint::{Endpoint, lock};
use crate::socket::Socket;
use crate::tcp::{Progress, Wait};
use crate::tls::Session;
use crate::{CloseCause, ProtocolError, TransferError};

/// How long a closed connection is read on, so that the goodbye is not lost to a reset.
pub(super) const LINGER: Duration = Duration::from_millis(500);

#[derive(Clone)]
pub(super) enum Source {
    Greeting(Arc<Greeting>),
    Control(Arc<Endpoint>),
    Bulk(Arc<Endpoint>, Registration),
    Draining(Registration, Instant),
    /// Either socket of a TLS session.
    #[cfg_attr(not(feature = "tls"), expect(dead_code, reason = "there are none without TLS"))]
    Session(Arc<Session>),
}

/// What the sockets in the epoll set belong to.
#[derive(Default)]
pub(super) struct Sources {
    /// In order, so that a simulation goes the same way each time.
    pub(super) by_token: BTreeMap<u64, Source>,
    /// The driver has stopped: nothing is added any more.
    pub(super) closed: bool,
}

impl Sources {
    pub(super) fn close(&mut self) -> Vec<Source> {
        self.closed = true;
        std::mem::take(&mut self.by_token).into_values().collect()
    }

    pub(super) fn controls(&self) -> Vec<Arc<Endpoint>> {
        let controls = self.values().filter_map(|source| match source {
            Source::Control(endpoint) => Some(Arc::clone(endpoint)),
            _ => None,
        });
        controls.collect()
    }

    pub(super) fn values(&self) -> impl Iterator<Item = &Source> {
        self.by_token.values()
    }
}

pub(super) fn close_all(sources: Vec<Source>) {
    for source in sources {
        if let Source::Control(endpoint) = source {
            endpoint.close(CloseCause::LocalShutdown);
        }
    }
}

/// A socket in the epoll set, with the events it waits for.
#[derive(Clone)]
pub(crate) struct Registration(pub(super) Arc<RegistrationInner>);

pub(super) struct RegistrationInner {
    /// A forked child's copy is closed; a simulated socket has none.
    _kept: Option<Kept>,
    token: u64,
    socket: Socket,
    pub(super) interest: Mutex<EventFlags>,
}

impl Registration {
    pub(crate) fn new(token: u64, socket: Socket) -> Self {
        let kept = match &socket {
            Socket::System(socket) => Some(Kept::new(socket)),
            Socket::Simulated(_) => None,
        };
        Self(Arc::new(RegistrationInner { _kept: kept, token, socket, interest: Mutex::new(EventFlags::empty()) }))
    }

    pub(crate) fn socket(&self) -> &Socket {
        &self.0.socket
    }

    /// For TLS, which is between sockets of the system alone.
    #[cfg(feature = "tls")]
    pub(crate) fn system(&self) -> &socket2::Socket {
        match &self.0.socket {
            Socket::System(socket) => socket,
            Socket::Simulated(_) => unreachable!("no TLS in a simulation"),
        }
    }

    pub(super) fn token(&self) -> u64 {
        self.0.token
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
        match driver.engine.modify(self.0.token, &self.0.socket, flags) {
            // Not in the set: not added yet, or the endpoint closed meanwhile.
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => tracing::warn!(%error, "epoll_ctl"),
        }
    }
}

impl Driver {
    pub(crate) fn register(&self, socket: Socket) -> Registration {
        Registration::new(self.next_token.fetch_add(1, Ordering::Relaxed), socket)
    }

    pub(super) fn add(
        &self,
        registration: &Registration,
        flags: EventFlags,
        source: Source,
    ) -> Result<(), TransferError> {
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
        let added = self.engine.add(registration.0.token, registration.socket(), *interest);
        drop(interest);
        added.map_err(|errno| {
            self.remove(registration);
            TransferError::os("epoll_ctl")(errno.into())
        })
    }

    pub(crate) fn add_control(&self, endpoint: &Arc<Endpoint>, flags: EventFlags) -> Result<(), TransferError> {
        self.add(endpoint.control(), flags, Source::Control(Arc::clone(endpoint)))?;
        if !self.beating.swap(true, Ordering::SeqCst) {
            self.tick_watchdog(WATCH_TICK);
        }
        Ok(())
    }

    /// One heartbeat: every peer is sent one, who has missed some is lost. `false`: there is no peer.
    pub(super) fn beat(&self) -> bool {
        let beat = self.beats.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        let sources = lock(&self.sources).controls();
        sources.iter().for_each(|endpoint| endpoint.on_beat(beat));
        !sources.is_empty()
    }

    #[cfg(feature = "tls")]
    pub(crate) fn add_session(
        &self,
        session: &Arc<Session>,
        registration: &Registration,
        flags: EventFlags,
    ) -> Result<(), TransferError> {
        self.add(registration, flags, Source::Session(Arc::clone(session)))
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
        lock(&self.strangers).leave(registration.0.token);
        // Already gone from the set when the endpoint never got into it.
        self.engine.delete(registration.socket());
    }

    /// Its events are not asked for any more.
    pub(crate) fn unwatch(&self, registration: &Registration) {
        self.engine.delete(registration.socket());
    }

    /// Without the registration: its sockets end with the last who holds them.
    fn forget(&self, token: u64) {
        let source = lock(&self.sources).by_token.remove(&token);
        drop(source);
    }

    pub(crate) fn forget_key(&self, key: u128) {
        lock(&self.bulk_keys).remove(&key);
    }

    /// Ends a connection gently: nothing more is sent, what still arrives is read and dropped for a while.
    pub(crate) fn linger(&self, registration: &Registration) {
        let until = self.now() + LINGER;
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
            Some(Source::Session(session)) => session.on_event(self),
            Some(Source::Draining(registration, _)) => {
                // A late wish to write would be granted for ever.
                registration.want(self, EventFlags::OUT, false);
                let mut waste = [MaybeUninit::uninit(); 16 << 10];
                match registration.socket().recv(&mut waste, Wait::No) {
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
    pub(super) fn dispatch_guarded(self: &Arc<Self>, token: u64, flags: EventFlags, turn: &mut Turn) {
        if catch_unwind(AssertUnwindSafe(|| self.dispatch(token, flags, turn))).is_err() {
            crate::limited!(error, "a panic while a connection was served; it is closed");
            let source = lock(&self.sources).by_token.get(&token).cloned();
            match source {
                Some(Source::Control(endpoint) | Source::Bulk(endpoint, _)) => {
                    endpoint.close(CloseCause::PeerLost { source: None });
                }
                Some(Source::Greeting(greeting)) => self.remove(&greeting.registration),
                Some(Source::Draining(registration, _)) => self.remove(&registration),
                // Its endpoint hears of it by its socket's end.
                Some(Source::Session(_)) => self.forget(token),
                None => {}
            }
        }
    }

    pub(super) fn run_timers(self: &Arc<Self>) {
        self.next_timer_us.store(u64::MAX, Ordering::SeqCst);
        let now = self.now();
        let paused = lock(&self.accept_paused_until).take();
        match paused {
            Some(until) if until > now => {
                *lock(&self.accept_paused_until) = Some(until);
                self.next_timer_us.fetch_min(self.micros(until), Ordering::SeqCst);
            }
            Some(_) => self.listeners.iter().for_each(|listener| listener.want(self, EventFlags::IN, true)),
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
                    let (what, timeout) = (greeting.awaited(), self.config.connect_timeout);
                    self.refuse(greeting, ProtocolError::Stalled { what, timeout }.into());
                    None
                }
                Source::Greeting(greeting) => Some(greeting.deadline),
                Source::Draining(registration, until) if *until <= now => {
                    self.remove(registration);
                    None
                }
                Source::Draining(_, until) => Some(*until),
                Source::Session(session) => session.on_timer(self, now),
            };
            if let Some(next) = next {
                self.next_timer_us.fetch_min(self.micros(next), Ordering::SeqCst);
            }
        }
    }
}
