//! Accepting connections: the hello of a stranger, its proof of the job's key, and what becomes of it.
//!
//! Invariant LIMITS: a stranger has a deadline and a few KiB, and there are at most [`GREETINGS_MAX`] of them, refused ones
//! that are still read on included.
//! Invariant PEERS: with a job key, a stranger learns nothing and gets nothing done before its proof.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use socket2::SockAddr;

use super::sources::{Registration, Source};
use super::{Driver, Peer};
use crate::address::{Goodbye, Hello, Role};
use crate::auth::{Acceptor, Realm};
use crate::endpoint::{Endpoint, encoded, greeting, lock, lost, read_greeting, write_greeting};
use crate::error::AuthError;
use crate::frame::{HEADER_BYTES, Header, Kind, MAGIC, VERSION};
use crate::socket::Socket;
use crate::tcp::Progress;
use crate::{CloseCause, Limits, ProtocolError};

/// Accepted per event, so that a flood of dialers does not starve the connected.
const ACCEPTS: usize = 64;
/// How long accepting pauses when it fails.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Connections that may be in their greeting at once; fewer where descriptors are short.
const GREETINGS_MAX: usize = 1024;
/// Of a hello, and of what else may come before a connection is let in.
const HELLO_BYTES_MAX: u64 = 16 << 10;
const PROOF_BYTES_MAX: u64 = 1 << 10;

/// An accepted connection that is not let in yet.
pub(super) struct Greeting {
    pub(super) registration: Registration,
    pub(super) deadline: Instant,
    state: Mutex<State>,
}

struct State {
    /// Of the message in progress.
    bytes: Vec<u8>,
    phase: Phase,
}

enum Phase {
    Hello,
    /// Challenged; the proof is to come.
    Proof(Box<(Hello, Acceptor)>),
    /// Let in, or refused.
    Over,
}

/// A stranger's message.
struct Message {
    kind: Kind,
    /// All behind its header: what a proof covers (A1), extensions that are passed over included.
    bytes: Vec<u8>,
    metadata_at: usize,
}

impl Message {
    fn metadata(&self) -> &[u8] {
        &self.bytes[self.metadata_at..]
    }
}

impl Greeting {
    /// What the stranger has not sent in time.
    pub(super) fn awaited(&self) -> &'static str {
        if let Phase::Proof(..) = lock(&self.state).phase { "proof of the job key" } else { "hello" }
    }
}

/// How many connections may be in their greeting: of a quarter of the descriptors, so that a flood leaves some to the rest.
pub(super) fn greetings_max(tls: bool) -> usize {
    let descriptors = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let each = if tls { 3 } else { 1 };
    descriptors.map_or(GREETINGS_MAX, |descriptors| (descriptors / 4 / each).clamp(1, GREETINGS_MAX as u64) as usize)
}

impl Driver {
    pub(super) fn accept(self: &Arc<Self>, token: u64) {
        let Some(listener) = self.listeners.iter().find(|listener| listener.token() == token) else { return };
        for _ in 0..ACCEPTS {
            let (socket, from) = match listener.socket().accept() {
                Ok(accepted) => accepted,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionAborted => continue,
                // The listener was shut down: the driver stops.
                Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => return,
                Err(error) => {
                    let none_left = [Errno::MFILE, Errno::NFILE].map(|errno| Some(errno.raw_os_error()));
                    if none_left.contains(&error.raw_os_error()) && self.displace_stranger() {
                        continue;
                    }
                    // Out of descriptors or memory: the dialers wait, the connected go on.
                    crate::limited!(warn, %error, "accept; trying again in {ACCEPT_PAUSE:?}");
                    let until = self.now() + ACCEPT_PAUSE;
                    *lock(&self.accept_paused_until) = Some(until);
                    self.listeners.iter().for_each(|listener| listener.want(self, EventFlags::IN, false));
                    self.schedule(until);
                    return;
                }
            };
            self.greet(socket, &from);
        }
    }

    fn greet(self: &Arc<Self>, socket: Socket, from: &SockAddr) {
        if let Err(error) = socket.prepare() {
            tracing::debug!(%error, "accepted socket");
            return;
        }
        let other_user = match from.is_unix().then(|| socket.other_user()).transpose() {
            Ok(other_user) => other_user.flatten(),
            Err(error) => Some(format!("a process that the kernel does not name ({error})")),
        };
        // Behind TLS the stranger is the other end of a pair; what is limited and timed is the same.
        let socket = match socket {
            Socket::System(socket) if !from.is_unix() => self.encrypt(socket, None).map(Socket::System),
            socket => Ok(socket),
        };
        let socket = match socket.and_then(|socket| socket.prepare().map(|()| socket)) {
            Ok(socket) => socket,
            Err(error) => return tracing::debug!(%error, "TLS"),
        };
        let registration = self.register(socket);
        let from = from.as_socket().map(|address| address.ip());
        let displaced = lock(&self.strangers).enter(registration.token(), from);
        if let Some(token) = displaced {
            self.dismiss(token);
        }
        let deadline = self.now() + self.config.connect_timeout;
        let state = Mutex::new(State { bytes: Vec::new(), phase: Phase::Hello });
        let greeting = Arc::new(Greeting { registration: registration.clone(), deadline, state });
        if self.add(&registration, EventFlags::IN, Source::Greeting(Arc::clone(&greeting))).is_ok() {
            self.schedule(deadline);
        }
        if let Some(peer) = other_user {
            lock(&greeting.state).phase = Phase::Over;
            self.refuse(&greeting, CloseCause::Auth(AuthError::OtherUser { peer }));
        }
    }

    /// Makes room for a stranger, at another's cost. `false`: there is none.
    fn displace_stranger(&self) -> bool {
        let displaced = lock(&self.strangers).displace();
        displaced.inspect(|token| self.dismiss(*token)).is_some()
    }

    /// Ends the connection of a stranger at once.
    fn dismiss(&self, token: u64) {
        let source = lock(&self.sources).by_token.get(&token).cloned();
        match source {
            Some(Source::Greeting(greeting)) => {
                let max = lock(&self.strangers).max();
                tracing::debug!(max, "too many connections in their greeting; the oldest is dropped");
                self.say(&greeting.registration, &ProtocolError::Crowded { max }.into());
                self.remove(&greeting.registration);
            }
            Some(Source::Draining(registration, _)) => self.remove(&registration),
            _ => {}
        }
    }

    pub(super) fn on_greeting_event(self: &Arc<Self>, greeting: &Arc<Greeting>) {
        match self.greeting_event(greeting) {
            Ok(()) => {}
            Err(CloseCause::PeerLost { .. }) => self.remove(&greeting.registration),
            Err(cause) => self.refuse(greeting, cause),
        }
    }

    fn greeting_event(self: &Arc<Self>, greeting: &Arc<Greeting>) -> Result<(), CloseCause> {
        loop {
            let mut state = lock(&greeting.state);
            let Some(message) = self.read_message(greeting, &mut state)? else { return Ok(()) };
            match std::mem::replace(&mut state.phase, Phase::Over) {
                Phase::Hello if message.kind == Kind::Close => {
                    let goodbye: Goodbye = read_greeting("goodbye", message.metadata())?;
                    self.count_refusal(&goodbye.cause(|| "a stranger".to_owned()));
                    return Err(CloseCause::PeerLost { source: None });
                }
                Phase::Hello => {
                    let hello: Hello = read_greeting("hello", message.metadata())?;
                    let Some((acceptor, challenge)) = self.challenge(&hello, &message.bytes)? else {
                        drop(state);
                        return self.admit(greeting, hello, None);
                    };
                    state.phase = Phase::Proof(Box::new((hello, acceptor)));
                    write_greeting(greeting.registration.socket(), &self::greeting(Kind::Challenge, &challenge))?;
                }
                Phase::Proof(begun) if message.kind == Kind::Close => {
                    let goodbye: Goodbye = read_greeting("goodbye", message.metadata())?;
                    let cause = goodbye.cause(|| begun.0.worker.id.to_string());
                    self.count_refusal(&cause);
                    return Err(CloseCause::PeerLost { source: None });
                }
                Phase::Proof(begun) => {
                    let (hello, mut acceptor) = *begun;
                    acceptor.on_proof(message.metadata())?;
                    drop(state);
                    return self.admit(greeting, hello, Some(acceptor));
                }
                Phase::Over => return Ok(()),
            }
        }
    }

    /// Reads one message and no byte beyond it: what follows the last one belongs to the endpoint.
    fn read_message(&self, greeting: &Greeting, state: &mut State) -> Result<Option<Message>, CloseCause> {
        let State { bytes, phase } = state;
        let awaited = match phase {
            // A hello's place is taken by a goodbye when TLS ended.
            Phase::Hello if self.config.tls.is_some() => Awaited::HelloOrClose,
            Phase::Hello => Awaited::Hello,
            Phase::Proof(..) => Awaited::Proof,
            Phase::Over => return Ok(None),
        };
        loop {
            if let Some([0x16, 3, ..]) = bytes.first_chunk::<4>() {
                return Err(CloseCause::Auth(AuthError::TlsWanted { peer: "a stranger".to_owned() }));
            }
            let want = match parse_message(bytes, awaited, &self.config.limits)? {
                Parsed::Wants(want) => want,
                Parsed::Message { kind, metadata } => {
                    let metadata_len = metadata.len();
                    let bytes = std::mem::take(bytes).split_off(HEADER_BYTES);
                    return Ok(Some(Message { kind, metadata_at: bytes.len() - metadata_len, bytes }));
                }
            };
            let mut room = [0_u8; 1024];
            let want = want.min(room.len());
            match greeting.registration.socket().recv_into(&mut room[..want]).map_err(lost)? {
                Progress::Bytes(len) => bytes.extend_from_slice(&room[..len]),
                Progress::WouldBlock => return Ok(None),
                Progress::Ended => return Err(CloseCause::PeerLost { source: None }),
            }
        }
    }

    /// What a hello is answered with: a challenge if there is a key on both sides, nothing if on neither.
    fn challenge(&self, hello: &Hello, message: &[u8]) -> Result<Option<(Acceptor, Vec<u8>)>, CloseCause> {
        let [oldest, newest] = hello.versions;
        if !(oldest..=newest).contains(&VERSION) {
            return Err(ProtocolError::NoCommonVersion { theirs: hello.versions, ours: VERSION }.into());
        }
        let peer = hello.worker.id.to_string();
        match (&self.config.key, &hello.nonce) {
            (None, None) => Ok(None),
            (Some(_), None) => Err(CloseCause::Auth(AuthError::NoKey { peer })),
            (None, Some(_)) => Err(CloseCause::Auth(AuthError::KeyWanted { peer })),
            (Some(key), Some(_)) => {
                let nonce = self.fresh().map_err(|source| CloseCause::PeerLost { source: Some(Arc::new(source)) })?;
                Ok(Some(Acceptor::new(key, Realm::Worker, message, &nonce, peer)))
            }
        }
    }

    fn admit(
        self: &Arc<Self>,
        greeting: &Arc<Greeting>,
        hello: Hello,
        acceptor: Option<Acceptor>,
    ) -> Result<(), CloseCause> {
        if hello.group != self.config.group {
            return Err(ProtocolError::Group { found: hello.group, expected: self.config.group.clone() }.into());
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
                    crate::limited!(warn, %error, peer = %hello.worker.id, "bulk connection");
                }
            }
            Role::Control { target } => {
                if let Some(target) = target
                    && **target != *self.config.worker.id.name
                {
                    let found = self.config.worker.id.name.to_string();
                    return Err(ProtocolError::WrongWorker { found, expected: target.to_string() }.into());
                }
                let Some(service) = lock(&self.service).clone() else { return Ok(()) };
                let peer = service.on_open(&hello.worker)?;
                self.remove(&greeting.registration);
                self.open(socket, hello, acceptor, peer);
            }
        }
        Ok(())
    }

    fn open(self: &Arc<Self>, socket: Socket, hello: Hello, acceptor: Option<Acceptor>, peer: Arc<dyn Peer>) {
        let (remote, features) = (hello.worker.clone(), hello.features);
        let random = match self.fresh() {
            Ok(random) => random,
            Err(error) => {
                crate::limited!(error, %error, "getrandom");
                return;
            }
        };
        let Some(key) = random.first_chunk().copied().map(u128::from_ne_bytes) else {
            unreachable!("a nonce has 32 bytes")
        };
        let opened = Endpoint::accepted(self, socket, hello, key).and_then(|endpoint| {
            let admitted = endpoint.welcome(Arc::clone(&peer), features, acceptor);
            lock(&self.bulk_keys).insert(key, Arc::downgrade(&endpoint));
            match admitted {
                Err(cause) => endpoint.close(cause),
                Ok(()) => {
                    self.add_control(&endpoint, EventFlags::IN).inspect_err(|_| {
                        endpoint.close(CloseCause::LocalShutdown);
                    })?;
                    endpoint.watch_life();
                    // Only now may others find it: what they send goes behind the welcome, and is kept time of.
                    peer.on_opened(&endpoint);
                }
            }
            Ok(())
        });
        if let Err(error) = opened {
            crate::limited!(warn, %error, peer = %remote.id, "cannot open an endpoint");
        }
    }

    /// Tells a dialer why it is not let in.
    pub(super) fn refuse(&self, refused: &Greeting, cause: CloseCause) {
        self.count_refusal(&cause);
        self.say(&refused.registration, &cause);
        self.linger(&refused.registration);
    }

    fn say(&self, registration: &Registration, cause: &CloseCause) {
        if let Some(goodbye) = Goodbye::of(cause) {
            // Best effort: whoever sends garbage may not read.
            let _ = write_greeting(registration.socket(), &greeting(Kind::Close, &encoded(&goodbye)));
        }
    }

    /// A wrong key is worth a warning, a flood of them is not worth a full disk: the first, then each that doubles their number.
    fn count_refusal(&self, cause: &CloseCause) {
        let CloseCause::Auth(error) = cause else {
            tracing::debug!(%cause, "refused a connection");
            return;
        };
        let refused = self.unproven.fetch_add(1, Ordering::Relaxed) + 1;
        if refused.is_power_of_two() {
            tracing::warn!(%error, refused, "refused a connection");
        } else {
            tracing::debug!(%error, refused, "refused a connection");
        }
    }
}

/// What a stranger is to send next.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Awaited {
    Hello,
    /// Behind TLS, whose end says by a goodbye why there is no hello.
    HelloOrClose,
    Proof,
}

/// What the bytes of a stranger amount to.
#[derive(Debug)]
pub(crate) enum Parsed<'a> {
    /// So many more bytes belong to the message, at least; 1 or more.
    Wants(usize),
    /// All of it. A goodbye may come in place of a proof.
    Message { kind: Kind, metadata: &'a [u8] },
}

/// Reads the message that `bytes` are, or begin. It asks for no byte beyond: what follows the last one is the endpoint's.
pub(crate) fn parse_message<'a>(
    bytes: &'a [u8],
    awaited: Awaited,
    limits: &Limits,
) -> Result<Parsed<'a>, ProtocolError> {
    if let Some(magic) = bytes.first_chunk()
        && u32::from_le_bytes(*magic) != MAGIC
    {
        // Whoever speaks something else need not send a whole header to be told.
        return Err(ProtocolError::Magic { found: u32::from_le_bytes(*magic) });
    }
    let Some((head, body)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
        return Ok(Parsed::Wants(HEADER_BYTES - bytes.len()));
    };
    let (header, kind) = Header::parse(head, limits)?;
    let (fits, expected, what, bytes_max) = match awaited {
        Awaited::Hello => (kind == Kind::Hello, "a hello", "hello bytes", HELLO_BYTES_MAX),
        Awaited::HelloOrClose => (matches!(kind, Kind::Hello | Kind::Close), "a hello", "hello bytes", HELLO_BYTES_MAX),
        Awaited::Proof => {
            (matches!(kind, Kind::Proof | Kind::Close), "a proof of the job key", "proof bytes", PROOF_BYTES_MAX)
        }
    };
    if !fits || header.tensors != 0 || header.payload_len != 0 {
        return Err(ProtocolError::Unexpected { kind, expected });
    }
    crate::frame::limit(what, header.body_len() as u64, bytes_max)?;
    match body.get(..header.body_len()) {
        // Extensions come before the metadata (W1); none is known.
        Some(body) => Ok(Parsed::Message { kind, metadata: &body[header.ext_len as usize..] }),
        None => Ok(Parsed::Wants(header.body_len() - body.len())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello() -> Vec<u8> {
        greeting(Kind::Hello, b"who it is")
    }

    #[track_caller]
    fn expect_hello(bytes: &[u8]) {
        match parse_message(bytes, Awaited::Hello, &Limits::default()) {
            Ok(Parsed::Message { kind: Kind::Hello, metadata }) => assert_eq!(metadata, b"who it is"),
            other => panic!("no hello: {other:?}"),
        }
    }

    #[test]
    fn a_message_asks_for_its_own_bytes_only() {
        let bytes = hello();
        for len in 0..bytes.len() {
            let parsed = parse_message(&bytes[..len], Awaited::Hello, &Limits::default());
            let Ok(Parsed::Wants(want)) = parsed else { panic!("{len} bytes: {parsed:?}") };
            let end = if len < HEADER_BYTES { HEADER_BYTES } else { bytes.len() };
            assert_eq!(len + want, end);
        }
        expect_hello(&bytes);
    }

    /// W1: a dialer of a later version may say more before the metadata. It was read as metadata once.
    #[test]
    fn extensions_of_a_hello_are_passed_over() {
        let mut bytes = hello();
        bytes[30] = 3;
        bytes.splice(HEADER_BYTES..HEADER_BYTES, [7, 8, 9]);
        expect_hello(&bytes);
    }

    #[test]
    fn a_goodbye_may_come_in_place_of_a_proof_but_not_of_a_hello() {
        let goodbye = greeting(Kind::Close, &[1, 0]);
        let parse = |awaited| parse_message(&goodbye, awaited, &Limits::default());
        assert!(matches!(parse(Awaited::Proof), Ok(Parsed::Message { kind: Kind::Close, metadata: [1, 0] })));
        assert!(matches!(parse(Awaited::Hello), Err(ProtocolError::Unexpected { kind: Kind::Close, .. })));
        assert!(matches!(
            parse_message(&hello(), Awaited::Proof, &Limits::default()),
            Err(ProtocolError::Unexpected { kind: Kind::Hello, .. })
        ));
    }
}
