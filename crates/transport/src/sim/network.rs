//! Sockets of a simulated network, as TCP's: what one end writes comes to the other in order, in pieces, and late.
//!
//! A cut stalls what is on its way, and retries until it is healed. A process that dies has its connections ended as its
//! kernel would (with a reset where bytes were not read), unless its machine goes with it: then nothing answers until the
//! machine is back.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;

use super::trace::hash_of;
use super::{Event, Shared, State, World, nanos};
use crate::endpoint::lock;
use crate::tcp::Progress;

/// Where every worker listens, on a machine of its own.
const PORT: u16 = 7000;
/// How long a packet that does not come through waits for its next try, at least and at most.
const RETRY_MS: (u64, u64) = (20, 100);

/// A listener, or one end of a connection. Clones are one socket, closed when the last is dropped.
#[derive(Clone)]
pub(crate) struct Socket(Arc<End>);

struct End {
    shared: Arc<Shared>,
    index: usize,
}

impl Drop for End {
    fn drop(&mut self) {
        lock(&self.shared.state).close(self.index);
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Listening,
    Dialing,
    Refused(Errno),
    Connected,
}

enum Piece {
    Bytes(Vec<u8>),
    End,
    Reset,
}

pub(super) struct SocketState {
    pub(super) host: usize,
    phase: Phase,
    /// Whom it dials, while it does.
    target: Option<usize>,
    peer: Option<usize>,
    backlog: VecDeque<usize>,
    /// On the way to this end, with the times of their arrival.
    flight: VecDeque<(u64, Piece)>,
    /// An event waits for the first of them.
    arriving: bool,
    inbox: VecDeque<u8>,
    /// Bytes in flight and in the inbox.
    held_bytes: usize,
    capacity_bytes: usize,
    /// The other end writes no more.
    eof: bool,
    /// This end writes no more.
    finished: bool,
    error: Option<Errno>,
    closed: bool,
    watched: Option<(u64, EventFlags)>,
    /// An event is on its way to its owner.
    ready_due: bool,
}

impl SocketState {
    fn new(host: usize, phase: Phase, capacity_bytes: usize) -> Self {
        Self {
            host,
            phase,
            target: None,
            peer: None,
            backlog: VecDeque::new(),
            flight: VecDeque::new(),
            arriving: false,
            inbox: VecDeque::new(),
            held_bytes: 0,
            capacity_bytes,
            eof: false,
            finished: false,
            error: None,
            closed: false,
            watched: None,
            ready_due: false,
        }
    }
}

/// Where the worker of a machine listens.
pub(super) fn address_of(machine: usize) -> SocketAddr {
    let [high, low] = (machine as u16 + 1).to_be_bytes();
    (IpAddr::V4(Ipv4Addr::new(10, 0, high, low)), PORT).into()
}

fn machine_of(address: SocketAddr) -> Option<usize> {
    match address.ip() {
        IpAddr::V4(ip) => {
            let [_, _, high, low] = ip.octets();
            usize::from(u16::from_be_bytes([high, low])).checked_sub(1)
        }
        IpAddr::V6(_) => None,
    }
}

impl World {
    /// Cuts the way from one machine to another: what is sent there waits.
    pub fn cut(&self, from: usize, to: usize) {
        lock(&self.0.state).cuts.insert((from, to));
    }

    /// Ends a cut.
    pub fn heal(&self, from: usize, to: usize) {
        lock(&self.0.state).cuts.remove(&(from, to));
    }

    /// Ends every connection between two machines, as a firewall that forgets them does.
    pub fn reset(&self, one: usize, other: usize) {
        let mut state = lock(&self.0.state);
        for index in 0..state.sockets.len() {
            let socket = &state.sockets[index];
            let Some(peer) = socket.peer else { continue };
            let ends = [socket.host, state.sockets[peer].host].map(|host| state.hosts[host].machine);
            if !socket.closed && (ends == [one, other] || ends == [other, one]) {
                state.sockets[index].error = Some(Errno::CONNRESET);
                state.check_ready(index);
            }
        }
    }
}

impl Socket {
    fn new(shared: &Arc<Shared>, index: usize) -> Self {
        Self(Arc::new(End { shared: Arc::clone(shared), index }))
    }

    fn with<R>(&self, f: impl FnOnce(&mut State, usize) -> R) -> R {
        f(&mut lock(&self.0.shared.state), self.0.index)
    }

    pub(super) fn listen(shared: &Arc<Shared>, host: usize, address: SocketAddr) -> io::Result<Self> {
        let mut state = lock(&shared.state);
        let machine = state.hosts[host].machine;
        if address != address_of(machine) || state.listener(machine).is_some() {
            return Err(Errno::ADDRINUSE.into());
        }
        let index = state.add_socket(host, Phase::Listening);
        drop(state);
        Ok(Self::new(shared, index))
    }

    /// Starts to connect; the socket becomes writable once that succeeded or failed.
    pub(super) fn connect(shared: &Arc<Shared>, host: usize, address: SocketAddr) -> Self {
        let mut state = lock(&shared.state);
        let index = state.add_socket(host, Phase::Dialing);
        state.sockets[index].target = machine_of(address);
        if state.hosts[host].alive {
            let delay_ns = state.latency_ns();
            state.push_after(delay_ns, Event::Dial(index));
        }
        drop(state);
        Self::new(shared, index)
    }

    pub(crate) fn accept(&self) -> io::Result<(Self, SocketAddr)> {
        let accepted = self.with(|state, index| {
            let socket = &mut state.sockets[index];
            if socket.closed || !state.hosts[socket.host].alive {
                return Err(Errno::INVAL);
            }
            let accepted = socket.backlog.pop_front().ok_or(Errno::AGAIN)?;
            let dialer = state.sockets[accepted].peer.map(|peer| state.sockets[peer].host);
            let machine = dialer.map_or(0, |dialer| state.hosts[dialer].machine);
            Ok((accepted, address_of(machine)))
        });
        let (index, from) = accepted?;
        Ok((Self::new(&self.0.shared, index), from))
    }

    pub(crate) fn take_error(&self) -> Option<io::Error> {
        self.with(|state, index| match state.sockets[index].phase {
            Phase::Refused(errno) => Some(errno.into()),
            _ => None,
        })
    }

    pub(crate) fn shutdown(&self, how: Shutdown) {
        self.with(|state, index| {
            if state.sockets[index].phase == Phase::Listening {
                return state.close(index);
            }
            if how != Shutdown::Read {
                state.finish(index);
            }
            if how != Shutdown::Write {
                state.sockets[index].eof = true;
            }
        });
    }

    pub(crate) fn is_readable(&self) -> bool {
        self.with(|state, index| state.readiness(index).contains(EventFlags::IN))
    }

    pub(crate) fn unread_bytes(&self) -> u64 {
        self.with(|state, index| match state.readable(index) {
            Ok(Progress::Bytes(len)) => len as u64,
            Ok(Progress::WouldBlock | Progress::Ended) | Err(_) => 0,
        })
    }

    pub(crate) fn recv<'a>(&self, buffer: &'a mut [MaybeUninit<u8>]) -> Result<(Progress, &'a mut [u8]), Errno> {
        self.with(|state, index| {
            Ok(match state.readable(index)? {
                Progress::Bytes(len) => {
                    let len = len.min(buffer.len());
                    let bytes = buffer[..len].write_copy_of_slice(state.read(index, len));
                    state.consume(index, len);
                    (Progress::Bytes(len), bytes)
                }
                none => (none, Default::default()),
            })
        })
    }

    pub(crate) fn recv_into(&self, buffer: &mut [u8]) -> Result<Progress, Errno> {
        self.with(|state, index| {
            let Progress::Bytes(len) = state.readable(index)? else { return state.readable(index) };
            let len = len.min(buffer.len());
            buffer[..len].copy_from_slice(state.read(index, len));
            state.consume(index, len);
            Ok(Progress::Bytes(len))
        })
    }

    pub(crate) fn send(&self, parts: &[IoSlice<'_>]) -> Result<Progress, Errno> {
        self.with(|state, index| state.send(index, parts))
    }

    pub(crate) fn watch(&self, token: u64, flags: EventFlags) {
        self.with(|state, index| {
            state.sockets[index].watched = Some((token, flags));
            state.check_ready(index);
        });
    }

    /// `false` if it is not watched.
    pub(crate) fn rewatch(&self, flags: EventFlags) -> bool {
        self.with(|state, index| {
            let Some((_, watched)) = &mut state.sockets[index].watched else { return false };
            *watched = flags;
            state.check_ready(index);
            true
        })
    }

    pub(crate) fn unwatch(&self) {
        self.with(|state, index| state.sockets[index].watched = None);
    }
}

impl State {
    fn add_socket(&mut self, host: usize, phase: Phase) -> usize {
        self.sockets.push(SocketState::new(host, phase, self.conditions.capacity_bytes));
        self.sockets.len() - 1
    }

    fn listener(&self, machine: usize) -> Option<usize> {
        let host = *self.machines.get(machine)?;
        let listens = |socket: &SocketState| socket.host == host && socket.phase == Phase::Listening && !socket.closed;
        self.hosts[host].alive.then(|| self.sockets.iter().position(listens))?
    }

    fn latency_ns(&mut self) -> u64 {
        let (least, jitter) = (nanos(self.conditions.latency), nanos(self.conditions.jitter));
        let late = self.random.per_mille(self.conditions.late_per_mille);
        least + self.random.below(jitter + 1) + if late { nanos(self.conditions.late_by) } else { 0 }
    }

    fn retry(&mut self, event: Event) {
        let delay_ms = self.random.between(RETRY_MS.0, RETRY_MS.1);
        self.push_after(nanos(Duration::from_millis(delay_ms)), event);
    }

    fn machine(&self, socket: usize) -> usize {
        self.hosts[self.sockets[socket].host].machine
    }

    /// Nothing answers there, not even a kernel.
    fn is_down(&self, machine: usize) -> bool {
        self.machines.get(machine).is_none_or(|host| self.hosts[*host].gone_with_machine)
    }

    pub(super) fn on_dial(&mut self, dialer: usize) {
        let (from, Some(to)) = (self.machine(dialer), self.sockets[dialer].target) else { return };
        if self.sockets[dialer].closed || !self.hosts[self.sockets[dialer].host].alive {
            return;
        }
        if self.cuts.contains(&(from, to)) || self.is_down(to) {
            return self.retry(Event::Dial(dialer));
        }
        let listener = self.listener(to);
        if let Some(listener) = listener {
            let accepted = self.add_socket(self.sockets[listener].host, Phase::Connected);
            self.sockets[accepted].peer = Some(dialer);
            self.sockets[dialer].peer = Some(accepted);
            self.sockets[listener].backlog.push_back(accepted);
            self.check_ready(listener);
        }
        self.record(Event::Dial(dialer), self.sockets[dialer].host, to as u64, u64::from(listener.is_some()));
        let delay_ns = self.latency_ns();
        self.push_after(delay_ns, Event::Dialed(dialer, listener.is_some()));
    }

    pub(super) fn on_dialed(&mut self, dialer: usize, taken: bool) {
        let Some(from) = self.sockets[dialer].target else { return };
        if self.cuts.contains(&(from, self.machine(dialer))) {
            return self.retry(Event::Dialed(dialer, taken));
        }
        if self.sockets[dialer].closed {
            return self.send_piece_to_peer(dialer, Piece::Reset);
        }
        self.sockets[dialer].phase = if taken { Phase::Connected } else { Phase::Refused(Errno::CONNREFUSED) };
        self.check_ready(dialer);
    }

    pub(super) fn on_arrive(&mut self, socket: usize) {
        self.sockets[socket].arriving = false;
        let Some(peer) = self.sockets[socket].peer else { return };
        let (from, to) = (self.machine(peer), self.machine(socket));
        if self.cuts.contains(&(from, to)) || self.is_down(to) {
            self.sockets[socket].arriving = true;
            return self.retry(Event::Arrive(socket));
        }
        let now_ns = self.now_ns;
        let dead = self.sockets[socket].closed || !self.hosts[self.sockets[socket].host].alive;
        let mut bytes = 0;
        let mut refused = false;
        while let Some((at_ns, piece)) = self.sockets[socket].flight.pop_front_if(|(at_ns, _)| *at_ns <= now_ns) {
            let _ = at_ns;
            let end = &mut self.sockets[socket];
            match piece {
                _ if dead => refused |= matches!(piece, Piece::Bytes(_)),
                Piece::Bytes(piece) => {
                    bytes += piece.len();
                    end.inbox.extend(piece);
                }
                Piece::End => end.eof = true,
                Piece::Reset => end.error = Some(Errno::CONNRESET),
            }
        }
        if refused {
            self.send_piece_to_peer(socket, Piece::Reset);
        }
        if !dead {
            self.record(Event::Arrive(socket), self.sockets[socket].host, socket as u64, bytes as u64);
            self.check_ready(socket);
        }
        if let Some((at_ns, _)) = self.sockets[socket].flight.front() {
            let at_ns = *at_ns;
            self.sockets[socket].arriving = true;
            self.push_at(at_ns, Event::Arrive(socket));
        }
    }

    fn send_piece_to_peer(&mut self, from: usize, piece: Piece) {
        let Some(to) = self.sockets[from].peer else { return };
        let mut at_ns = self.now_ns + self.latency_ns();
        if let Some((before_ns, _)) = self.sockets[to].flight.back() {
            at_ns = at_ns.max(*before_ns);
        }
        let end = &mut self.sockets[to];
        end.flight.push_back((at_ns, piece));
        if !end.arriving {
            end.arriving = true;
            self.push_at(at_ns, Event::Arrive(to));
        }
    }

    fn send(&mut self, from: usize, parts: &[IoSlice<'_>]) -> Result<Progress, Errno> {
        let end = &self.sockets[from];
        if let Some(errno) = end.error {
            return Err(errno);
        }
        if end.finished || end.closed || !self.hosts[end.host].alive {
            return Err(Errno::PIPE);
        }
        let Some(to) = end.peer.filter(|_| end.phase == Phase::Connected) else { return Ok(Progress::WouldBlock) };
        let room = self.sockets[to].capacity_bytes.saturating_sub(self.sockets[to].held_bytes);
        if room == 0 {
            return Ok(Progress::WouldBlock);
        }
        let mut bytes: Vec<u8> = Vec::new();
        for part in parts {
            let take = part.len().min(room - bytes.len());
            bytes.extend_from_slice(&part[..take]);
        }
        let len = bytes.len();
        let host = self.sockets[from].host;
        self.trace.record(self.now_ns, "send", host, len as u64, hash_of(&bytes));
        self.sockets[to].held_bytes += len;
        // In up to three pieces, cut anywhere.
        for _ in 0..self.random.below(3) {
            let at = self.random.below(bytes.len() as u64 + 1) as usize;
            let rest = bytes.split_off(at);
            if !bytes.is_empty() {
                self.send_piece_to_peer(from, Piece::Bytes(bytes));
            }
            bytes = rest;
        }
        if !bytes.is_empty() {
            self.send_piece_to_peer(from, Piece::Bytes(bytes));
        }
        Ok(Progress::Bytes(len))
    }

    fn readable(&self, index: usize) -> Result<Progress, Errno> {
        let end = &self.sockets[index];
        if !self.hosts[end.host].alive {
            return Err(Errno::CONNRESET);
        }
        if let Phase::Refused(_) = end.phase {
            return Err(Errno::NOTCONN);
        }
        match (end.inbox.len(), end.error) {
            (0, Some(errno)) => Err(errno),
            (0, None) if end.eof => Ok(Progress::Ended),
            (0, None) => Ok(Progress::WouldBlock),
            (len, _) => Ok(Progress::Bytes(len)),
        }
    }

    fn read(&mut self, index: usize, len: usize) -> &[u8] {
        &self.sockets[index].inbox.make_contiguous()[..len]
    }

    fn consume(&mut self, index: usize, len: usize) {
        let end = &mut self.sockets[index];
        end.inbox.drain(..len);
        end.held_bytes -= len;
        if let Some(peer) = end.peer {
            self.check_ready(peer);
        }
    }

    fn readiness(&self, index: usize) -> EventFlags {
        let end = &self.sockets[index];
        let mut flags = EventFlags::empty();
        match end.phase {
            Phase::Listening => flags.set(EventFlags::IN, !end.backlog.is_empty()),
            Phase::Dialing => {}
            Phase::Refused(_) => flags = EventFlags::IN | EventFlags::OUT | EventFlags::ERR | EventFlags::HUP,
            Phase::Connected => {
                let failed = end.error.is_some();
                let (held, capacity) =
                    end.peer.map_or((0, 1), |peer| (self.sockets[peer].held_bytes, self.sockets[peer].capacity_bytes));
                flags.set(EventFlags::IN, failed || end.eof || !end.inbox.is_empty());
                flags.set(EventFlags::OUT, failed || end.finished || held * 3 <= capacity * 2);
                flags.set(EventFlags::ERR, failed);
                flags.set(EventFlags::HUP, failed || (end.eof && end.finished));
            }
        }
        flags
    }

    fn watched_readiness(&self, index: usize) -> Option<(u64, EventFlags)> {
        let end = &self.sockets[index];
        let (token, wanted) = end.watched.filter(|_| !end.closed)?;
        let flags = self.readiness(index) & (wanted | EventFlags::ERR | EventFlags::HUP);
        (!flags.is_empty()).then_some((token, flags))
    }

    /// Tells the owner, after a while, if the socket is ready for what it is watched for.
    pub(super) fn check_ready(&mut self, index: usize) {
        let end = &self.sockets[index];
        if end.ready_due || !self.hosts[end.host].alive || self.watched_readiness(index).is_none() {
            return;
        }
        self.sockets[index].ready_due = true;
        self.push_soon(self.conditions.wake, Event::Ready(index));
    }

    pub(super) fn take_ready(&mut self, index: usize) -> Option<(usize, u64, EventFlags)> {
        self.sockets[index].ready_due = false;
        let (token, flags) = self.watched_readiness(index)?;
        Some((self.sockets[index].host, token, flags))
    }

    fn finish(&mut self, index: usize) {
        if !self.hosts[self.sockets[index].host].alive || std::mem::replace(&mut self.sockets[index].finished, true) {
            return;
        }
        self.send_piece_to_peer(index, Piece::End);
        self.check_ready(index);
    }

    /// As the kernel closes a socket: who has left bytes unread resets the connection.
    pub(super) fn close(&mut self, index: usize) {
        if !self.hosts[self.sockets[index].host].alive || std::mem::replace(&mut self.sockets[index].closed, true) {
            return;
        }
        self.sockets[index].watched = None;
        for waiting in std::mem::take(&mut self.sockets[index].backlog) {
            self.sockets[waiting].closed = true;
            self.send_piece_to_peer(waiting, Piece::Reset);
        }
        let end = &self.sockets[index];
        // A dialer that does not know its peer yet resets the connection when the answer comes.
        if end.phase == Phase::Connected && end.error.is_none() {
            if !end.inbox.is_empty() {
                self.send_piece_to_peer(index, Piece::Reset);
            } else if !end.finished {
                self.send_piece_to_peer(index, Piece::End);
            }
        }
        self.sockets[index].inbox = VecDeque::new();
    }

    /// The process's sockets end with it.
    pub(super) fn close_all_of(&mut self, host: usize) {
        for index in 0..self.sockets.len() {
            if self.sockets[index].host == host {
                self.close(index);
            }
        }
    }
}
