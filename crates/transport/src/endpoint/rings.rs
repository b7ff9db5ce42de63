//! The control connection between workers of one host: frames in rings of shared memory, the socket beside them.
//!
//! Once both sides read the rings (`shm::ring`), bytes on the socket mean nothing but "look": the driver, which sleeps on it, reads
//! them, sees to what waits for room, and to the ring if nobody else does. Who reads the ring holds `rx`, as of a socket, and *leaves*
//! it in the end: either what comes next wakes the driver, or the endpoint is *hot* and the leader looks by itself. A thread of the
//! driver that *attends* it (`driver::attend`) reads it as a caller does, and keeps it through its short jobs.
//! Invariant D1: as of a socket. Invariant W3: a ring is left by whoever let go of it last, or is hot.

use std::cell::Cell;
use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;

use super::{Endpoint, Outbound, Rx, Status, Tx, lock, lost};
use crate::driver::{Registration, Turn};
use crate::frame::{FEATURE_RINGS, HEADER_BYTES, Header, Kind};
use crate::receive::Receiver;
use crate::shm::{RingReader, RingWriter, Rings, Sleeper};
use crate::tcp::{Progress, Wait};
use crate::{CloseCause, ProtocolError, tcp};

/// Bytes that are read of a ring at a time.
const BATCH_BYTES: usize = 32 << 10;
/// Batches until others have their turn.
const BATCHES: usize = 8;
/// Batches that come while a ring is left, until it is the leader's.
const LEAVING_BATCHES: usize = 2;
/// Metadata that a frame may have that is copied to the ring as a whole.
const SMALL_BYTES_MAX: usize = 4 << 10;
/// A leader that is woken for a ring after less than this, so many times in a row, stays with it (`driver::attend`).
const OFTEN: Duration = Duration::from_micros(500);
const MANY: u32 = 32;
/// Where more comes at once, many calls are on their way: a leader that looks for them serves them best.
const CALM_BYTES: u64 = 1 << 10;
/// Reads of the socket until others have theirs.
const BELLS: usize = 16;

/// What the socket brings beside rings.
pub(super) struct Bell {
    socket: Registration,
    /// Of slabs whose frames were not read yet.
    descriptors: Mutex<VecDeque<OwnedFd>>,
    descriptors_max: u64,
    /// Who reads the ring has read the socket, too: what told of room may be among it.
    overheard: AtomicBool,
}

impl Bell {
    fn new(socket: Registration, descriptors_max: u64) -> Self {
        Self { socket, descriptors: Mutex::default(), descriptors_max, overheard: AtomicBool::new(false) }
    }

    /// Reads what has come; whether the connection has ended.
    fn listen(&self) -> Result<bool, CloseCause> {
        let mut descriptors = lock(&self.descriptors);
        let mut bytes = [0; 64];
        for _ in 0..BELLS {
            // A reset is an end like another: what lies in the ring came before it.
            let Ok((progress, descriptor)) = self.socket.socket().recv_with(&mut bytes, Wait::No) else {
                return Ok(true);
            };
            let more = descriptor.is_some() || progress == Progress::Bytes(bytes.len());
            if let Some(descriptor) = descriptor {
                crate::frame::limit("descriptors without a frame", descriptors.len() as u64 + 1, self.descriptors_max)?;
                descriptors.push_back(descriptor);
            }
            match progress {
                Progress::Ended => return Ok(true),
                Progress::WouldBlock => return Ok(false),
                Progress::Bytes(len) => only_bells(&bytes[..len])?,
            }
            if !more {
                // What is left will be told again.
                return Ok(false);
            }
        }
        Ok(false)
    }

    /// The next descriptor: the peer has sent it before its frame.
    fn descriptor(&self) -> Option<OwnedFd> {
        let first = lock(&self.descriptors).pop_front();
        first.or_else(|| {
            // What is wrong with the socket, the driver will find.
            drop(self.listen());
            self.overheard.store(true, Ordering::Relaxed);
            lock(&self.descriptors).pop_front()
        })
    }
}

/// Beside rings, the socket's bytes say nothing.
pub(super) fn only_bells(bytes: &[u8]) -> Result<(), ProtocolError> {
    if bytes.iter().all(|byte| *byte == 0) {
        return Ok(());
    }
    Err(ProtocolError::Rings { reason: "frames by the socket, after the last that should" })
}

impl Endpoint {
    /// The dialer's side, once it is welcomed: what is sent from now on goes by the ring.
    pub(super) fn send_rings(&self, tx: &mut Tx, features: u64) -> Result<(), CloseCause> {
        if features & FEATURE_RINGS == 0 || self.features() & FEATURE_RINGS == 0 {
            return Ok(());
        }
        let rings = match Rings::create() {
            Ok(rings) => rings,
            Err(error) => {
                // The acceptor waits for none.
                tracing::debug!(%error, "frames go by the socket");
                return Ok(());
            }
        };
        // Nothing was sent but the greeting, so it fits.
        let frame = *Header::new(Kind::Rings).as_bytes();
        match self.control.socket().send_with(&frame, rings.file().as_fd()).map_err(lost)? {
            Progress::Bytes(len) if len == frame.len() => {}
            _ => return Err(CloseCause::PeerLost { source: None }),
        }
        tx.ring = Some((tx.taken, RingWriter::new(&rings)));
        // An endpoint is welcomed once.
        let _ = self.rings.set(rings);
        Ok(())
    }

    /// The peer's last frame by the socket.
    pub(super) fn on_rings(self: &Arc<Self>, rx: &mut Rx) -> Result<(), CloseCause> {
        let negotiated = self.features() & FEATURE_RINGS != 0;
        let unexpected = ProtocolError::Unexpected { kind: Kind::Rings, expected: "no rings on this connection" };
        if !negotiated || rx.ring.is_some() || self.dialed.is_some() != self.rings.get().is_some() {
            return Err(unexpected.into());
        }
        if self.dialed.is_none() {
            let rings = Rings::open(rx.receiver.descriptor())?;
            let mut tx = lock(&self.tx);
            tx.wire.extend_from_slice(Header::new(Kind::Rings).as_bytes());
            let from = tx.taken + (tx.wire.len() - tx.sent) as u64;
            tx.ring = Some((from, RingWriter::new(&rings)));
            let _ = self.rings.set(rings);
        }
        let Some(rings) = self.rings.get() else { unreachable!("set by either side") };
        rx.ring = Some(RingReader::new(rings));
        let descriptors_max = self.driver.config().limits.slabs_max as u64;
        let bell = Arc::new(Bell::new(self.control.clone(), descriptors_max));
        let source = Arc::clone(&bell);
        rx.receiver.take_descriptors_from(Box::new(move || source.descriptor()));
        // From now on the socket is the driver's, whoever reads the ring.
        let _ = self.bell.set(bell);
        self.control.want(&self.driver, EventFlags::IN, true);
        // The acceptor's own last frame by the socket; or what has waited for room, of which the next bytes here may have told.
        self.write_control(&mut lock(&self.tx))
    }

    /// Writes what waits to the ring, descriptors to the socket: all of it if there is room. `false`: there is none for a
    /// descriptor, of which the socket will tell.
    pub(super) fn write_ring(&self, tx: &mut Tx) -> Result<bool, CloseCause> {
        let Tx { wire, sent, taken, passing, ring, whispers, .. } = tx;
        let Some((_, ring)) = ring else { unreachable!("the caller has looked") };
        let mut wakes = false;
        let mut bell_fits = true;
        while *sent < wire.len() {
            let mut end = wire.len();
            if let Some((at, slab)) = passing.front() {
                if *at == *taken {
                    let descriptor =
                        slab.fd().map_err(|error| CloseCause::PeerLost { source: Some(Arc::new(error)) })?;
                    match self.control.socket().send_with(&[0], descriptor) {
                        Ok(Progress::Bytes(1..)) => drop(passing.pop_front()),
                        // The end is told by who reads the ring: something may lie there still.
                        Err(Errno::PIPE | Errno::CONNRESET) => break,
                        Err(error) => return Err(lost(error)),
                        Ok(_) => {
                            bell_fits = false;
                            break;
                        }
                    }
                    continue;
                }
                end = *sent + (*at - *taken) as usize;
            }
            let len = ring.write(&wire[*sent..end])?;
            wakes |= len > 0;
            *sent += len;
            *taken += len as u64;
            if len == 0 && !ring.wait_for_room()? {
                break;
            }
        }
        // What was staged before may have taken all the room.
        if wakes || ring.owes_wake() {
            if *whispers && *sent == wire.len() { ring.show() } else { self.wake_reader(ring) }
        }
        Ok(bell_fits)
    }

    /// What was written to the ring is to be read.
    pub(super) fn wake_reader(&self, ring: &mut RingWriter) {
        self.took.store(self.driver.beats(), Ordering::Relaxed);
        if ring.wake() == Sleeper::Driver {
            self.ring_bell();
        }
    }

    /// A frame without tensors straight to the ring, if nothing waits before it; `false` if it must go the long way. Without
    /// `flush` its reader sees it with the next flush.
    pub(super) fn send_small(&self, tx: &mut Tx, outbound: &Outbound<'_>, flush: bool) -> Result<bool, CloseCause> {
        let Tx { wire, taken, ring: Some((from, ring)), passing, .. } = tx else { return Ok(false) };
        let may_pass = wire.is_empty() && passing.is_empty() && *taken >= *from && self.returns.is_empty();
        if !may_pass || outbound.digests.is_some() || outbound.metadata.len() > SMALL_BYTES_MAX {
            return Ok(false);
        }
        let header = Header {
            call: outbound.call,
            function: outbound.function,
            deadline_us: outbound.deadline_us,
            meta_len: outbound.metadata.len() as u32,
            ..Header::new(outbound.kind)
        };
        if !ring.stage([header.as_bytes(), outbound.metadata])? {
            return Ok(false);
        }
        *taken += (HEADER_BYTES + outbound.metadata.len()) as u64;
        if flush {
            self.wake_reader(ring);
        }
        Ok(true)
    }

    /// Wakes the peer's driver. A socket that is full of such bytes wakes it, too; one that has ended is told by reading.
    fn ring_bell(&self) {
        let _ = self.control.socket().send(&[IoSlice::new(&[0])]);
    }

    /// Has the peer look, unless frames still go by the socket: it must not hear a bell in the midst of them, and looks by itself
    /// after the last.
    pub(super) fn tell(&self, tx: &Tx) {
        if tx.ring.as_ref().is_some_and(|(from, _)| tx.taken >= *from) {
            self.ring_bell();
        }
    }

    /// The socket is ready, of a connection with rings.
    pub(super) fn on_bell(self: &Arc<Self>, bell: &Bell, flags: EventFlags, turn: &mut Turn) -> Result<(), CloseCause> {
        if flags.intersects(EventFlags::IN | EventFlags::HUP | EventFlags::ERR) && bell.listen()? {
            self.ended.store(true, Ordering::SeqCst);
            // It would say so for ever.
            self.driver.unwatch(&self.control);
            if self.cause.get().is_some() {
                // Closed meanwhile, by a thread that may not have seen this.
                self.driver.remove(&self.control);
            }
        }
        self.write_backlog()?;
        let before = self.read.load(Ordering::Relaxed);
        self.look(turn)?;
        let read = self.read.load(Ordering::Relaxed) - before;
        self.count_ring((1..=CALM_BYTES).contains(&read));
        Ok(())
    }

    /// The leader was woken, for a frame or two or for something else.
    fn count_ring(&self, by_frame: bool) {
        let now_us = self.opened_at.elapsed().as_micros() as u64;
        let last_us = self.rung_us.swap(now_us, Ordering::Relaxed);
        let often = by_frame && now_us - last_us.min(now_us) < OFTEN.as_micros() as u64;
        let count = if often { self.rung.load(Ordering::Relaxed).saturating_add(1) } else { 0 };
        self.rung.store(count, Ordering::Relaxed);
    }

    /// Whether the leader was woken for this ring many times in a short time.
    pub(crate) fn rings_often(&self) -> bool {
        !self.driven.load(Ordering::Relaxed) && self.rung.load(Ordering::Relaxed) >= MANY
    }

    /// Stays with the ring until it has brought jobs (`true`; then it is not left, and the attendant comes back from them), or until
    /// nothing came for `idle`, or much at once, or a caller would read it.
    pub(crate) fn attend_ring(self: &Arc<Self>, turn: &mut Turn, idle: Duration) -> bool {
        let Ok(rx) = self.rx.try_lock() else { return false };
        // The next stay is to pay, too.
        self.rung.store(0, Ordering::Relaxed);
        self.caller_waits.store(false, Ordering::SeqCst);
        self.attended.store(true, Ordering::SeqCst);
        let end = self.attend(&mut Driven::new(self, rx), turn, idle);
        self.attended.store(false, Ordering::SeqCst);
        match end {
            Ok(true) => return true,
            Ok(false) => {
                if let Err(cause) = self.leave_ring(turn) {
                    self.close(cause);
                }
            }
            Err(cause) => self.close(cause),
        }
        false
    }

    /// A caller waits for a reply, and another thread reads the ring: if that one only attends it, the next caller is to read by
    /// itself, which costs no switch of threads.
    pub(crate) fn send_attendant_away(&self) {
        if let (true, Some(rings)) = (self.attended.load(Ordering::SeqCst), self.rings.get()) {
            self.caller_waits.store(true, Ordering::SeqCst);
            rings.rouse();
        }
    }

    /// There may be room.
    fn write_backlog(&self) -> Result<(), CloseCause> {
        let mut tx = lock(&self.tx);
        if tx.sent < tx.wire.len() && self.status() == Status::Open { self.write_control(&mut tx) } else { Ok(()) }
    }

    /// Whether the ring has bytes that nobody has read yet, or none will follow.
    pub(crate) fn has_ring_bytes(&self) -> bool {
        let closed = self.cause.get().is_some();
        self.rings.get().filter(|_| !closed).is_some_and(|rings| {
            rings.signs().1 != self.read.load(Ordering::Relaxed) || self.ended.load(Ordering::Relaxed)
        })
    }

    /// The same, and no caller reads them.
    pub(crate) fn wants_leader(&self) -> bool {
        self.has_ring_bytes() && !self.driven.load(Ordering::Relaxed)
    }

    /// Whether who would write the ring needs this thread's processor for it.
    pub(crate) fn shares_processor(&self) -> bool {
        self.rings.get().is_some_and(|rings| rings.shares_processor())
    }

    /// The leader looks at the ring, and reads it if nobody else does; whether there was something.
    pub(crate) fn look_at_ring(self: &Arc<Self>, turn: &mut Turn) -> bool {
        self.look(turn).unwrap_or_else(|cause| {
            self.close(cause);
            true
        })
    }

    fn look(self: &Arc<Self>, turn: &mut Turn) -> Result<bool, CloseCause> {
        let mut found = false;
        let mut rx = match self.rx.try_lock() {
            Ok(rx) => rx,
            // Foreign code has panicked where it held it: what it was about to read is lost.
            Err(TryLockError::Poisoned(_)) => return Err(CloseCause::PeerLost { source: None }),
            Err(TryLockError::WouldBlock) => {
                if let (Some(rings), true) = (self.rings.get(), self.ended.load(Ordering::SeqCst)) {
                    // Whoever sleeps on it reads what is left, and closes.
                    rings.rouse();
                }
                return Ok(false);
            }
        };
        if rx.ring.is_some() {
            self.driver.heat(self);
            for _ in 0..BATCHES {
                if !self.read_ring(&mut rx, turn)? {
                    break;
                }
                found = true;
            }
        }
        drop(rx);
        self.leave_ring(turn)?;
        Ok(found)
    }

    /// Reads a batch, if there is one. At its end, the connection's is told.
    pub(super) fn read_ring(self: &Arc<Self>, rx: &mut Rx, turn: &mut Turn) -> Result<bool, CloseCause> {
        thread_local! {
            // Not on the stack: it would have to be cleared each time.
            static BUFFER: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
        }
        turn.begin_batch();
        let ended = self.ended.load(Ordering::SeqCst);
        let Some(ring) = &mut rx.ring else { return Ok(false) };
        if ring.is_empty() {
            return if ended { Err(ended_with(&rx.receiver)) } else { Ok(false) };
        }
        let mut buffer = BUFFER.take();
        buffer.resize(BATCH_BYTES, 0);
        let read = ring.read(&mut buffer).map_err(CloseCause::from).and_then(|(len, room)| {
            self.read.fetch_add(len as u64, Ordering::Relaxed);
            if room {
                // The peer waits for it.
                self.tell(&lock(&self.tx));
            }
            self.on_bytes(rx, Progress::Bytes(len), &buffer[..len], turn)
        });
        // Another, if a handler has read on this thread meanwhile, is let go.
        BUFFER.set(buffer);
        read?;
        if self.bell.get().is_some_and(|bell| bell.overheard.swap(false, Ordering::Relaxed)) {
            self.write_backlog()?;
        }
        Ok(true)
    }

    /// To be called by whoever has let go of `rx` (W3). What has come meanwhile is read; if more comes all the time, it is the
    /// leader's.
    pub(super) fn leave_ring(self: &Arc<Self>, turn: &mut Turn) -> Result<(), CloseCause> {
        let mut batches = 0;
        loop {
            fence(Ordering::SeqCst);
            if self.hot.load(Ordering::Relaxed) || self.cause.get().is_some() {
                return Ok(());
            }
            let mut rx = match self.rx.try_lock() {
                Ok(rx) => rx,
                // Its holder will leave it.
                Err(TryLockError::WouldBlock) => return Ok(()),
                Err(TryLockError::Poisoned(_)) => return Err(CloseCause::PeerLost { source: None }),
            };
            let Some(ring) = &rx.ring else { return Ok(()) };
            if !ring.leave() || self.ended.load(Ordering::SeqCst) {
                if batches == LEAVING_BATCHES {
                    // Else a leader that cools it at once would leave it to this thread.
                    drop(rx);
                    self.driver.heat(self);
                    self.driver.rouse_leader();
                    return Ok(());
                }
                batches += 1;
                self.read_ring(&mut rx, turn)?;
                continue;
            }
            drop(rx);
            fence(Ordering::SeqCst);
            // Whoever has seen the end meanwhile has found `rx` held, and left it to its holder.
            if !self.ended.load(Ordering::SeqCst) {
                return Ok(());
            }
        }
    }

    /// The leader will look no more by itself.
    pub(crate) fn cool(self: &Arc<Self>, turn: &mut Turn) {
        self.hot.store(false, Ordering::Relaxed);
        if let Err(cause) = self.leave_ring(turn) {
            self.close(cause);
        }
    }

    /// The rest of [`Endpoint::drive_until`].
    pub(super) fn drive_ring(
        self: &Arc<Self>,
        driven: &mut Driven<'_>,
        turn: &mut Turn,
        done: &dyn Fn() -> bool,
        deadline: Instant,
    ) -> Result<(), CloseCause> {
        let (Some(rings), Some(rx)) = (self.rings.get(), &mut driven.rx) else { return Ok(()) };
        rings.disarm();
        let mut began = None;
        while !done() && self.cause.get().is_none() && lock(&self.transfers).is_bulk_empty() {
            if self.read_ring(rx, turn)? {
                self.driver.finish_turn(turn);
                began.take().inspect(|began| self.spin.waited(*began));
                if Instant::now() >= deadline {
                    break;
                }
            } else if !self.await_bytes(rx, &mut began, |_| deadline, || false) {
                break;
            }
        }
        Ok(())
    }

    /// The rest of [`Endpoint::attend_ring`]; whether it has brought jobs.
    fn attend(self: &Arc<Self>, driven: &mut Driven<'_>, turn: &mut Turn, idle: Duration) -> Result<bool, CloseCause> {
        let (Some(rings), Some(rx)) = (self.rings.get(), &mut driven.rx) else { return Ok(false) };
        rings.disarm();
        let mut began = None;
        let is_unwanted = || self.caller_waits.load(Ordering::SeqCst);
        while !is_unwanted() && self.cause.get().is_none() {
            let before = self.read.load(Ordering::Relaxed);
            for _ in 0..BATCHES {
                if !self.read_ring(rx, turn)? {
                    break;
                }
            }
            turn.flush();
            let read = self.read.load(Ordering::Relaxed) - before;
            if read > CALM_BYTES {
                return Ok(false);
            }
            if turn.has_jobs() {
                return Ok(true);
            }
            if read > 0 {
                began.take().inspect(|began| self.spin.waited(*began));
            } else if !self.await_bytes(rx, &mut began, |began| began + idle, is_unwanted) {
                return Ok(false);
            }
        }
        Ok(false)
    }

    /// Nothing was to be read since `began`, if anything: looks for bytes a while, or sleeps until there are some or it is `over`.
    /// `false`: the deadline has passed.
    fn await_bytes(
        &self,
        rx: &Rx,
        began: &mut Option<Instant>,
        deadline: impl Fn(Instant) -> Instant,
        over: impl Fn() -> bool,
    ) -> bool {
        let (Some(rings), Some(ring)) = (self.rings.get(), &rx.ring) else { return false };
        let now = Instant::now();
        let first = began.is_none();
        let began = *began.get_or_insert(now);
        if first && !rings.shares_processor() && self.spin.look(now, || !ring.is_empty()) {
            return true;
        }
        let left = deadline(began).saturating_duration_since(now);
        if left.is_zero() {
            return false;
        }
        let over = || over() || self.cause.get().is_some() || self.ended.load(Ordering::SeqCst);
        ring.sleep(left.min(tcp::RECV_TICK), over);
        true
    }
}

/// A thread other than the leader reads the ring.
pub(super) struct Driven<'a> {
    endpoint: &'a Arc<Endpoint>,
    /// Taken only by `drop`.
    rx: Option<MutexGuard<'a, Rx>>,
}

impl<'a> Driven<'a> {
    pub(super) fn new(endpoint: &'a Arc<Endpoint>, rx: MutexGuard<'a, Rx>) -> Self {
        endpoint.driven.store(true, Ordering::Relaxed);
        Self { endpoint, rx: Some(rx) }
    }
}

impl Drop for Driven<'_> {
    fn drop(&mut self) {
        let Self { endpoint, rx } = self;
        endpoint.driven.store(false, Ordering::Relaxed);
        drop(rx.take());
        if std::thread::panicking() {
            // Foreign code has: nobody has left the ring, and the leader finds out that it cannot be read on.
            endpoint.driver.heat(endpoint);
            endpoint.driver.rouse_leader();
        }
    }
}

/// Why a connection ends whose bytes do.
pub(super) fn ended_with(receiver: &Receiver) -> CloseCause {
    match receiver.missing_bytes() {
        0 => CloseCause::PeerLost { source: None },
        missing_bytes => ProtocolError::TruncatedFrame { missing_bytes }.into(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    /// A side whose ring was full stayed silent when the other read its word of room while it looked for a slab's descriptor.
    #[test]
    fn who_reads_the_socket_for_a_descriptor_sees_to_what_waits_for_room() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let [ours, theirs] = [ours, theirs].map(|end| socket2::Socket::from(OwnedFd::from(end)));
        let bell = Bell::new(Registration::new(0, ours.into()), 8);
        assert_eq!(tcp::send_with(&theirs, &[0], theirs.as_fd()), Ok(Progress::Bytes(1)));
        tcp::send(&theirs, &[IoSlice::new(&[0])]).unwrap();
        assert!(bell.descriptor().is_some());
        assert!(bell.overheard.swap(false, Ordering::Relaxed));
        // One that the driver has read already is no reason to look.
        assert_eq!(tcp::send_with(&theirs, &[0], theirs.as_fd()), Ok(Progress::Bytes(1)));
        assert!(!bell.listen().unwrap());
        assert!(bell.descriptor().is_some() && !bell.overheard.load(Ordering::Relaxed));
    }
}
