//! Accepting connections: the hello of a stranger, and what becomes of it.
//!
//! Invariant LIMITS: a stranger has a deadline and a few KiB, and there are at most [`GREETINGS_MAX`] of them.

use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use socket2::Socket;

use super::sources::{Registration, Source};
use super::{Driver, Service};
use crate::address::{Goodbye, Hello, Reason, Role};
use crate::endpoint::{Endpoint, greeting, lock, lost, read_greeting, write_greeting};
use crate::frame::{HEADER_BYTES, Header, Kind, MAGIC, VERSION};
use crate::tcp::{self, Progress};
use crate::{CloseCause, ProtocolError};

/// Accepted per event, so that a flood of dialers does not starve the connected.
const ACCEPTS: usize = 64;
/// How long accepting pauses when it fails.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Connections that may be in their greeting at once.
const GREETINGS_MAX: usize = 1024;

/// An accepted connection whose hello is not complete.
pub(super) struct Greeting {
    pub(super) registration: Registration,
    pub(super) deadline: Instant,
    bytes: Mutex<Vec<u8>>,
}

impl Driver {
    pub(super) fn accept(self: &Arc<Self>) {
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

    pub(super) fn on_greeting_event(self: &Arc<Self>, greeting: &Arc<Greeting>) {
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
    pub(super) fn refuse(&self, refused: &Greeting, error: ProtocolError) {
        tracing::debug!(%error, "refused a connection");
        let goodbye = Goodbye { reason: Reason::Refused, text: error.to_string() };
        // Best effort: whoever sends garbage may not read.
        let _ = write_greeting(refused.registration.socket(), &greeting(Kind::Close, &goodbye));
        self.linger(&refused.registration);
    }
}
