//! Mutual TLS for connections over TCP: each side shows a certificate that the job's CA signed, and everything is encrypted.
//!
//! A connection's TLS session is a [`Session`] on the driver: the network's socket on one side, on the other an end of a pair
//! of Unix sockets whose other end the endpoint has, so that endpoints, greetings and callers that drive themselves know
//! nothing of TLS. The driver's leader moves bytes between the two. That costs a copy and a hop, and keeps one copy of the
//! framing code.
//! What ends a session is told to the endpoint as a Close frame, made here.
//!
//! Not here: names. A certificate proves membership in the job, like its key: whoever has one can claim any name in the group.
//! TLS 1.3 alone; no resumption, so that an expired certificate ends with its time.
//! Invariant BOUNDED: a session holds at most [`CHUNK_BYTES`] and one TLS record in each direction; a handshake ends with the
//! greeting's deadline, which closes the endpoint's side, and a closed side is let go after [`CLOSE_MAX`].

mod config;

use std::io::{self, IoSlice, Read, Write};
use std::net::Shutdown;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustls::{AlertDescription, Connection};
use socket2::Socket;

pub use config::Tls;

use crate::address::{Goodbye, Reason};
use crate::driver::{Driver, Registration};
use crate::endpoint::{encoded, greeting, lock};
use crate::frame::{Kind, MAGIC};
use crate::tcp::{self, Progress};

/// Plaintext taken from the endpoint's side at once.
const CHUNK_BYTES: usize = 64 << 10;
/// Bytes moved before the driver looks at other connections.
const TURN_BYTES: usize = 4 << 20;
/// How long what the endpoint has sent last may take to leave.
const CLOSE_MAX: Duration = Duration::from_secs(1);

/// One connection's TLS, between the network and an endpoint.
pub(crate) struct Session {
    network: Registration,
    local: Registration,
    state: Mutex<State>,
}

struct State {
    tls: Connection,
    /// The network's socket has connected.
    connected: bool,
    /// The first bytes from the network are those of TLS.
    begun: bool,
    /// Plaintext for the endpoint; `told` bytes of it are with it.
    plain: Vec<u8>,
    told: usize,
    /// The endpoint ended its side then.
    local_ended: Option<Instant>,
    network_ended: bool,
    over: bool,
}

impl State {
    /// Whether the network is owed bytes that it can still take.
    fn wants_write(&self) -> bool {
        self.tls.wants_write() && !self.network_ended
    }
}

impl Session {
    /// Puts TLS between `network` and the socket that it gives, which is connected at once.
    pub(crate) fn start(driver: &Driver, network: Socket, tls: Connection, connected: bool) -> io::Result<Socket> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (near, far) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        let state = State {
            tls,
            connected,
            begun: false,
            plain: Vec::new(),
            told: 0,
            local_ended: None,
            network_ended: false,
            over: false,
        };
        let session = Arc::new(Self {
            network: driver.register(network.into()),
            local: driver.register(Socket::from(near).into()),
            state: Mutex::new(state),
        });
        for registration in [&session.network, &session.local] {
            if let Err(error) = driver.add_session(&session, registration, EventFlags::IN | EventFlags::OUT) {
                driver.remove(&session.network);
                return Err(io::Error::other(error));
            }
        }
        Ok(Socket::from(far))
    }

    /// Either socket is ready for something.
    pub(crate) fn on_event(&self, driver: &Driver) {
        let mut state = lock(&self.state);
        if state.over {
            return;
        }
        if let Err(goodbye) = self.pump(&mut state) {
            // The endpoint's side is told why; a socket of the other end may still be read.
            let frame = greeting(Kind::Close, &encoded(&goodbye));
            let _ = tcp::send(self.local.system(), &[IoSlice::new(&frame)]);
            // An alert, if there is one.
            let _ = state.tls.write_tls(&mut Nonblocking(self.network.system()));
            state.over = true;
            // What either side is still sending must not turn into a reset that overtakes its last words.
            driver.linger(&self.local);
            return driver.linger(&self.network);
        }
        if let Some(since) = state.local_ended {
            if state.tls.is_handshaking() {
                return self.end(driver, &mut state);
            }
            driver.schedule(since + CLOSE_MAX);
        }
        if state.local_ended.is_some() && !state.wants_write() {
            let _ = self.network.system().shutdown(Shutdown::Write);
            if state.network_ended {
                return self.end(driver, &mut state);
            }
        }
        let writes = state.wants_write();
        let mut network = EventFlags::empty();
        network.set(EventFlags::IN, state.plain.is_empty() && !state.network_ended && state.connected);
        network.set(EventFlags::OUT, writes || !state.connected);
        let mut local = EventFlags::empty();
        local.set(EventFlags::OUT, !state.plain.is_empty());
        local.set(EventFlags::IN, !writes && !state.tls.is_handshaking() && state.local_ended.is_none());
        self.network.set(driver, network);
        self.local.set(driver, local);
        for (ended, registration) in [(state.network_ended, &self.network), (state.local_ended.is_some(), &self.local)]
        {
            // The system would go on telling so; what is still to do comes by the other socket, or by the timer.
            if ended && hung_up(registration) {
                driver.remove(registration);
            }
        }
    }

    /// Ends what was closed too long ago; gives the next time to look.
    pub(crate) fn on_timer(&self, driver: &Driver, now: Instant) -> Option<Instant> {
        let mut state = lock(&self.state);
        let due = state.local_ended.filter(|_| !state.over)? + CLOSE_MAX;
        if due > now {
            return Some(due);
        }
        self.end(driver, &mut state);
        None
    }

    fn end(&self, driver: &Driver, state: &mut State) {
        state.over = true;
        for registration in [&self.network, &self.local] {
            driver.remove(registration);
            let _ = registration.system().shutdown(Shutdown::Both);
        }
    }

    /// Moves what can be moved. An error is what the endpoint is to be told.
    fn pump(&self, state: &mut State) -> Result<(), Goodbye> {
        if !state.connected {
            match self.network.system().take_error() {
                Ok(None) if self.network.system().peer_addr().is_err() => return Ok(()),
                Ok(None) => tcp::prepare(self.network.system()).map_err(unreachable)?,
                Ok(Some(error)) | Err(error) => return Err(unreachable(error)),
            }
            state.connected = true;
        }
        let mut moved = 0;
        while moved < TURN_BYTES {
            let step =
                self.send_network(state)? + self.receive_network(state)? + self.tell(state)? + self.hear(state)?;
            if step == 0 {
                break;
            }
            moved += step;
        }
        Ok(())
    }

    fn send_network(&self, state: &mut State) -> Result<usize, Goodbye> {
        let mut sent = 0;
        while state.wants_write() {
            match state.tls.write_tls(&mut Nonblocking(self.network.system())) {
                Ok(len) => sent += len,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // What the peer has said before it went may still be read.
                Err(_) => {
                    state.network_ended = true;
                    let _ = self.local.socket().shutdown(Shutdown::Write);
                    return Ok(0);
                }
            }
        }
        Ok(sent)
    }

    fn receive_network(&self, state: &mut State) -> Result<usize, Goodbye> {
        if !state.plain.is_empty() || state.network_ended {
            return Ok(0);
        }
        if !state.begun {
            state.begun = self.peek()?;
            if !state.begun {
                return Ok(0);
            }
        }
        let received = match state.tls.read_tls(&mut Nonblocking(self.network.system())) {
            Ok(0) => {
                state.network_ended = true;
                let _ = self.local.system().shutdown(Shutdown::Write);
                return Ok(0);
            }
            Ok(len) => len,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(0),
            Err(_) => {
                state.network_ended = true;
                let _ = self.local.system().shutdown(Shutdown::Write);
                return Ok(0);
            }
        };
        let incoming = state.tls.process_new_packets().map_err(|error| refused(&error))?;
        state.plain.resize(incoming.plaintext_bytes_to_read(), 0);
        state.tls.reader().read_exact(&mut state.plain).map_err(unreachable)?;
        Ok(received)
    }

    /// Looks at the first bytes without taking them: whoever speaks plain farcall is told so, and told of as that.
    fn peek(&self) -> Result<bool, Goodbye> {
        let mut head = [std::mem::MaybeUninit::uninit(); 4];
        let flags = rustix::net::RecvFlags::PEEK | rustix::net::RecvFlags::DONTWAIT;
        let head = match rustix::net::recv(self.network.system(), &mut head, flags) {
            Ok(((head, _), _)) => head.to_vec(),
            Err(Errno::AGAIN | Errno::INTR) => return Ok(false),
            // `read_tls` sees it, too.
            Err(_) => return Ok(true),
        };
        if head == MAGIC.to_le_bytes() {
            let goodbye = Goodbye { reason: Reason::TlsWanted, text: String::new() };
            let frame = greeting(Kind::Close, &encoded(&goodbye));
            let _ = tcp::send(self.network.system(), &[IoSlice::new(&frame)]);
            return Err(Goodbye { reason: Reason::NoTls, text: String::new() });
        }
        // Any other beginning is TLS's business, also a short one.
        Ok(true)
    }

    /// Gives the endpoint what it has been sent.
    fn tell(&self, state: &mut State) -> Result<usize, Goodbye> {
        let mut told = 0;
        while state.told < state.plain.len() {
            match tcp::send(self.local.system(), &[IoSlice::new(&state.plain[state.told..])]) {
                Ok(Progress::Bytes(len)) => {
                    state.told += len;
                    told += len;
                }
                Ok(_) => return Ok(told),
                // The endpoint's side is closed: nobody reads any more.
                Err(_) => break,
            }
        }
        state.plain.clear();
        state.told = 0;
        Ok(told)
    }

    /// Takes what the endpoint sends.
    fn hear(&self, state: &mut State) -> Result<usize, Goodbye> {
        if state.wants_write() || state.local_ended.is_some() {
            return Ok(0);
        }
        let mut chunk = [0; CHUNK_BYTES];
        if state.tls.is_handshaking() {
            // Only whether it has given up: what it says waits in its socket.
            let flags = rustix::net::RecvFlags::PEEK | rustix::net::RecvFlags::DONTWAIT;
            if !matches!(rustix::net::recv(self.local.system(), &mut chunk[..1], flags), Ok((0, _))) {
                return Ok(0);
            }
        }
        match tcp::recv_into(self.local.system(), &mut chunk) {
            Ok(Progress::Bytes(len)) => {
                // To nobody, once the network has ended: read only until the end on this side, too.
                if !state.network_ended {
                    state.tls.writer().write_all(&chunk[..len]).map_err(unreachable)?;
                }
                Ok(len)
            }
            Ok(Progress::WouldBlock) => Ok(0),
            Ok(Progress::Ended) | Err(_) => {
                state.local_ended = Some(Instant::now());
                state.tls.send_close_notify();
                // Once more, to send that.
                Ok(1)
            }
        }
    }
}

/// Neither direction of the socket will carry anything again.
fn hung_up(registration: &Registration) -> bool {
    let mut fds = [PollFd::new(registration.system(), PollFlags::empty())];
    let polled = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
    polled.is_ok() && fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
}

/// A certificate that one of the sides does not take, or bytes that are no TLS.
fn refused(error: &rustls::Error) -> Goodbye {
    let text = match error {
        rustls::Error::AlertReceived(AlertDescription::CertificateRequired) => {
            "it asks for a certificate; set FARCALL_TLS_CERT, FARCALL_TLS_KEY and FARCALL_TLS_CA as it has them"
                .to_owned()
        }
        rustls::Error::AlertReceived(alert) => format!("it refused this worker's certificate ({alert:?})"),
        error => format!("its certificate or its TLS is refused: {error}"),
    };
    Goodbye { reason: Reason::Certificate, text }
}

fn unreachable(error: io::Error) -> Goodbye {
    Goodbye { reason: Reason::Unreachable, text: error.to_string() }
}

/// A socket for rustls, which never blocks on it.
struct Nonblocking<'a>(&'a Socket);

impl Read for Nonblocking<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match tcp::recv_into(self.0, buffer)? {
            Progress::Bytes(len) => Ok(len),
            Progress::WouldBlock => Err(io::ErrorKind::WouldBlock.into()),
            Progress::Ended => Ok(0),
        }
    }
}

impl Write for Nonblocking<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        match tcp::send(self.0, parts)? {
            Progress::Bytes(len) => Ok(len),
            Progress::WouldBlock | Progress::Ended => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
