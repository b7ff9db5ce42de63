//! The control path to one peer, and the bulk connection beside it.
//!
//! An endpoint is a state machine behind short locks that any thread may drive. Frames go out under `tx`, written by
//! the thread that sends; what the socket does not take leaves with the driver. Frames come in under `rx`: the driver's
//! leader reads when epoll says so, and a caller that blocks for its reply takes the role (and the socket's place in
//! the epoll set) for as long as it waits.
//! Between near workers frames go by rings of shared memory once both sides have them, and the socket wakes (`endpoint::rings`). Elsewhere
//! small frames of one of many calls gather in `tx` and are written together, within two ticks of the watchdog (`gather`).
//! Invariant D1: only the holder of `rx` reads the control connection, so frames are seen in the order sent.
//! Invariant E1: `close` runs once; every waiter hears of it through [`Peer::on_closed`].
//! Invariant R1: payload above the inline limit travels on the bulk connection, in chunks taken from its transfers in
//! turn; control frames never wait for it.
//! Invariant LIMITS: answers that a peer does not take keep their calls' places in its window; if much waits for it and it takes
//! nothing for as long as it may be silent, it is lost. (Not reading such a peer would be no answer: two that wait for each other
//! to read would do so for ever.)
//! Invariant BOUNDED: each side sends a ping (beside rings: counts in their page) with every heartbeat of its own, whatever else it
//! does or computes; a peer of which nothing was heard for four of them, on either connection, is lost.
//! Lock order: `rx` → (`transfers`, `bulk_rx`) and `tx` → `bulk`; `interest` is innermost.

mod bulk;
mod encode;
mod end;
mod greet;
mod landing;
mod rings;
mod send;

use std::cell::Cell;
use std::collections::VecDeque;
use std::io;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use farcall_device::Tensor;
use farcall_device::codec::recycle;
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;

use bulk::{Bulk, BulkLink, BulkRx};
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use encode::encode_frame;
pub use encode::{Outbound, Staged, stage};
pub(crate) use encode::{encoded, greeting, payload, read_greeting, write_greeting};
use greet::finish_connect;
use rings::{Bell, Driven, ended_with, only_bells};
use send::Tx;

use crate::address::{Goodbye, Hello, Reason};
use crate::auth::Dialer;
use crate::driver::Seen;
use crate::driver::{Driver, Peer, Registration, Turn};
use crate::frame::{HEADER_BYTES, Kind};
use crate::receive::{Received, Receiver, Transfers};
use crate::shm::{Lender, Returns, RingReader, Rings};
use crate::sim::Census;
use crate::socket::Socket;
use crate::tcp::{self, Progress, Wait};
use crate::{
    CloseCause, Frame, NoSlabs, Passing, ProtocolError, Route, Small, TransferError, WorkerId, WorkerInfo, passing, shm,
};

/// Bytes one `recv` on a control connection asks for; on the stack of whoever drives.
const RECV_BYTES: usize = 32 << 10;
/// Of what was lent, the part that goes back as it is, for which all of it stays; smaller ones are copied.
const FAIR_SHARE: usize = 8;
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
enum Status {
    Connecting,
    Greeting,
    Open,
    Closed,
}

struct Rx {
    receiver: Receiver,
    /// Frames come by it, not by the socket.
    ring: Option<RingReader>,
}

/// The control path to one peer; see the module.
pub struct Endpoint {
    driver: Arc<Driver>,
    /// Who opened the control connection: this side, or the peer.
    dialed: Option<(WorkerInfo, Route)>,
    status: AtomicU8,
    control: Registration,
    /// The dialer's side of the proof, until the welcome.
    proof: Mutex<Option<Dialer>>,
    rx: Mutex<Rx>,
    tx: Mutex<Tx>,
    bulk: Mutex<Bulk>,
    bulk_rx: Mutex<BulkRx>,
    transfers: Mutex<Transfers>,
    /// This side would pass slabs, and take the peer's.
    offers_slabs: bool,
    /// The peer, too.
    has_slabs: AtomicBool,
    /// The peer compares digests, and may send them.
    has_digests: AtomicBool,
    lender: Arc<Mutex<Lender>>,
    returns: Arc<Returns>,
    /// Shared memory for frames, once there is some; `bell` once it is read.
    rings: OnceLock<Arc<Rings>>,
    bell: OnceLock<Arc<Bell>>,
    /// Bytes of the ring that were read.
    read: AtomicU64,
    /// The socket beside the rings has ended.
    ended: AtomicBool,
    /// The leader looks at the ring by itself (W3).
    pub(crate) hot: AtomicBool,
    /// A thread other than the leader reads the ring.
    driven: AtomicBool,
    /// A thread attends the ring; a caller that could read it by itself waits.
    attended: AtomicBool,
    caller_waits: AtomicBool,
    /// How often in a row the leader was woken for the ring soon after the last time, and when that was, after `opened_at`.
    rung: AtomicU32,
    rung_us: AtomicU64,
    /// What callers that wait here have seen of spinning.
    spin: Seen,
    /// What the last heartbeat found in the rings.
    signs: Mutex<(u32, u64)>,
    bulk_stalled: AtomicBool,
    /// Frames wait in `tx` for others.
    gathered: AtomicBool,
    /// The watchdog will look whether they still do.
    pub(crate) listed: AtomicBool,
    /// The last heartbeat of this side before bytes of the peer came.
    heard: AtomicU32,
    /// Bytes that the last heartbeat found unread: signs of life that it has counted.
    unread: AtomicU64,
    /// The last heartbeat of this side before the peer took bytes.
    took: AtomicU32,
    /// Answers that wait to be taken by the peer's socket.
    untaken: AtomicUsize,
    opened_at: Instant,
    remote: OnceLock<WorkerInfo>,
    peer: OnceLock<Arc<dyn Peer>>,
    cause: OnceLock<Arc<CloseCause>>,
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Endpoint")
            .field("remote", &self.remote.get())
            .field("status", &self.status())
            .finish_non_exhaustive()
    }
}

/// Locks, whatever happened to an earlier holder: the state is kept consistent statement by statement, and a panicking
/// handler never holds one of these.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Endpoint {
    /// Dials `target` and gives the endpoint at once; frames sent meanwhile leave when the peer has welcomed us.
    ///
    /// # Errors
    /// Only what fails at once, such as no descriptors left. A refused or late connection closes the endpoint.
    pub fn dial(driver: &Arc<Driver>, target: &WorkerInfo, peer: Arc<dyn Peer>) -> Result<Arc<Self>, TransferError> {
        let (socket, route) = driver.connect(target)?;
        let endpoint = Self::new(driver, socket, Some((target.clone(), route)), Status::Connecting, 0)?;
        lock(&endpoint.rx).receiver.place_by(Arc::downgrade(&peer));
        if endpoint.peer.set(peer).is_err() {
            unreachable!("a new endpoint has no peer");
        }
        let endpoint = Arc::new(endpoint);
        driver.add_control(&endpoint, EventFlags::OUT)?;
        driver.schedule(endpoint.opened_at + driver.config().connect_timeout);
        Ok(endpoint)
    }

    /// An endpoint on a connection whose hello was read; the caller attaches the peer, then calls `welcome`.
    pub(crate) fn accepted(
        driver: &Arc<Driver>,
        socket: Socket,
        hello: Hello,
        key: u128,
    ) -> Result<Arc<Self>, TransferError> {
        let endpoint = Self::new(driver, socket, None, Status::Greeting, key)?;
        if endpoint.remote.set(hello.worker).is_err() {
            unreachable!("a new endpoint has no remote");
        }
        Ok(Arc::new(endpoint))
    }

    fn new(
        driver: &Arc<Driver>,
        socket: Socket,
        dialed: Option<(WorkerInfo, Route)>,
        status: Status,
        key: u128,
    ) -> Result<Self, TransferError> {
        let limits = driver.config().limits.clone();
        let offers_slabs = driver.no_slabs().is_none() && socket.is_unix();
        // Before its welcome nobody is given memory.
        let limits = if dialed.is_some() { limits.of_greeting() } else { limits };
        Ok(Self {
            driver: Arc::clone(driver),
            dialed,
            status: AtomicU8::new(status as u8),
            control: driver.register(socket),
            proof: Mutex::new(None),
            rx: Mutex::new(Rx { receiver: Receiver::new(limits, driver.config().runtime.clone()), ring: None }),
            tx: Mutex::new(Tx::new()),
            bulk: Mutex::new(Bulk {
                link: BulkLink::None,
                key,
                proof: None,
                prefix: Vec::new(),
                queue: VecDeque::new(),
                current: None,
            }),
            bulk_rx: Mutex::new(BulkRx { head: [0; HEADER_BYTES], head_len: 0, chunk: None, stalled: None }),
            transfers: Mutex::default(),
            offers_slabs,
            has_slabs: AtomicBool::new(false),
            has_digests: AtomicBool::new(false),
            lender: Arc::default(),
            returns: Arc::default(),
            rings: OnceLock::new(),
            bell: OnceLock::new(),
            read: AtomicU64::new(0),
            ended: AtomicBool::new(false),
            hot: AtomicBool::new(false),
            driven: AtomicBool::new(false),
            attended: AtomicBool::new(false),
            caller_waits: AtomicBool::new(false),
            rung: AtomicU32::new(0),
            rung_us: AtomicU64::new(0),
            spin: Seen::new(driver.config().spin),
            signs: Mutex::default(),
            bulk_stalled: AtomicBool::new(false),
            gathered: AtomicBool::new(false),
            listed: AtomicBool::new(false),
            heard: AtomicU32::new(driver.beats()),
            unread: AtomicU64::new(0),
            took: AtomicU32::new(driver.beats()),
            untaken: AtomicUsize::new(0),
            opened_at: driver.now(),
            remote: OnceLock::new(),
            peer: OnceLock::new(),
            cause: OnceLock::new(),
        })
    }

    /// The peer as it introduced itself; `None` until it did.
    pub fn remote(&self) -> Option<&WorkerInfo> {
        self.remote.get()
    }

    /// The driver that watches this endpoint.
    pub fn driver(&self) -> &Arc<Driver> {
        &self.driver
    }

    /// Why the endpoint closed, or `None` while it is not.
    pub fn closed(&self) -> Option<&Arc<CloseCause>> {
        self.cause.get()
    }

    pub(crate) fn control(&self) -> &Registration {
        &self.control
    }

    fn status(&self) -> Status {
        match self.status.load(Ordering::Acquire) {
            0 => Status::Connecting,
            1 => Status::Greeting,
            2 => Status::Open,
            _ => Status::Closed,
        }
    }

    /// The call's request is on its way in: its frame has come, its bulk payload has not, or has not landed.
    pub fn is_receiving(&self, call: u64) -> bool {
        lock(&self.transfers).has_request(call)
    }

    // ---- receiving ----

    /// The control connection is ready for something; called by the driver's leader.
    pub(crate) fn on_control_event(self: &Arc<Self>, flags: EventFlags, turn: &mut Turn) {
        if let Err(cause) = self.control_event(flags, turn) {
            self.close(cause);
        }
    }

    fn control_event(self: &Arc<Self>, flags: EventFlags, turn: &mut Turn) -> Result<(), CloseCause> {
        if self.status() == Status::Connecting {
            finish_connect(self.control.socket(), self.route())?;
            self.greet()?;
        }
        if let Some(bell) = self.bell.get() {
            return self.on_bell(bell, flags, turn);
        }
        if flags.contains(EventFlags::OUT) && self.status() == Status::Open {
            self.write_control(&mut lock(&self.tx))?;
        }
        if flags.intersects(EventFlags::IN | EventFlags::HUP | EventFlags::ERR)
            && let Ok(mut rx) = self.rx.try_lock()
        {
            if let (Some(_), Some(bell)) = (&rx.ring, self.bell.get()) {
                // A caller has read the socket's last frame meanwhile.
                drop(rx);
                return self.on_bell(bell, flags, turn);
            }
            if self.read_control(&mut rx, Wait::No, turn)? {
                self.driver.by_socket.store(true, Ordering::Relaxed);
            }
            let rings = rx.ring.is_some();
            drop(rx);
            self.flush_gathered();
            if rings {
                // Frames may have overtaken the socket's last.
                self.leave_ring(turn)?;
            }
        }
        Ok(())
    }

    /// Tensors of this side that the peer borrows.
    pub fn lent(&self) -> usize {
        lock(&self.lender).leases()
    }

    /// Whether these bytes are the peer's own, lent by this connection, and a fair share of what was lent, as that is kept for them:
    /// they go back without a copy.
    pub fn is_peers(&self, tensor: &Tensor) -> bool {
        let storage = tensor.storage();
        let fair = tensor.layout().byte_span().len() >= storage.len() / FAIR_SHARE;
        fair && shm::lent_by(&self.returns, storage).is_some()
    }

    /// Whether tensors can be passed to the peer in slabs now.
    pub fn lends(&self) -> bool {
        self.has_slabs.load(Ordering::Acquire)
    }

    /// How tensors pass to the peer, and if not in slabs, why.
    pub fn passing(&self) -> Passing {
        let Some(remote) = self.remote.get() else { return Passing::Sockets(NoSlabs::Connecting) };
        if self.has_slabs.load(Ordering::Acquire) {
            return Passing::Slabs;
        }
        let config = self.driver.config();
        Passing::Sockets(if let Some(refused) = self.driver.no_slabs() {
            refused.clone()
        } else if self.offers_slabs {
            NoSlabs::RefusedThere
        } else {
            passing::no_socket(config.transport, config.worker.local.as_ref(), remote.local.as_ref())
        })
    }

    /// Reads once, and hands on what came; whether something did. With [`Wait::Tick`] it sleeps for the first byte.
    fn read_control(self: &Arc<Self>, rx: &mut Rx, wait: Wait, turn: &mut Turn) -> Result<bool, CloseCause> {
        turn.begin_batch();
        if !self.offers_slabs {
            let mut buffer = [MaybeUninit::uninit(); RECV_BYTES];
            let (progress, bytes) = self.control.socket().recv(&mut buffer, wait).map_err(lost)?;
            let came = progress != Progress::WouldBlock;
            return self.on_bytes(rx, progress, bytes, turn).map(|()| came);
        }
        thread_local! {
            // Not on the stack: it would have to be cleared each time.
            static BUFFER: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
        }
        let mut buffer = BUFFER.take();
        buffer.resize(RECV_BYTES, 0);
        let read =
            self.control.socket().recv_with(&mut buffer, wait).map_err(lost).and_then(|(progress, descriptor)| {
                if let Some(descriptor) = descriptor {
                    rx.receiver.on_descriptor(descriptor)?;
                }
                let came = progress != Progress::WouldBlock;
                let len = if let Progress::Bytes(len) = progress { len } else { 0 };
                self.on_bytes(rx, progress, &buffer[..len], turn).map(|()| came)
            });
        // Another, if a handler has read on this thread meanwhile, is let go.
        BUFFER.set(buffer);
        read
    }

    fn on_bytes(
        self: &Arc<Self>,
        rx: &mut Rx,
        progress: Progress,
        bytes: &[u8],
        turn: &mut Turn,
    ) -> Result<(), CloseCause> {
        match progress {
            Progress::WouldBlock => return Ok(()),
            Progress::Ended => return Err(ended_with(&rx.receiver)),
            // Of a ring, the heartbeat sees what is written.
            Progress::Bytes(_) if rx.ring.is_none() => self.hear(),
            Progress::Bytes(_) => {}
        }
        let mut input = bytes;
        loop {
            while let Some(small) = rx.receiver.small(&mut input) {
                self.deliver_small(&small, turn)?;
            }
            let Some(received) = rx.receiver.feed(&mut input)? else { break };
            match received {
                Received::Frame(frame) if frame.kind == Kind::Rings && self.status() == Status::Open => {
                    self.on_rings(rx)?;
                    return Ok(only_bells(input)?);
                }
                Received::Frame(frame) => {
                    let welcome = frame.kind == Kind::Welcome;
                    self.deliver(frame, turn)?;
                    if welcome {
                        rx.receiver.set_limits(self.driver.config().limits.clone());
                        if self.has_slabs.load(Ordering::Acquire) {
                            self.start_slabs(&mut rx.receiver);
                        }
                        if self.has_digests.load(Ordering::Acquire) {
                            rx.receiver.take_digests();
                        }
                    }
                }
                Received::Waiting(partial) => self.park(partial)?,
                Received::Landed { lease, bytes } => {
                    let frame = lock(&self.transfers).land(lease, bytes)?;
                    if let Some(frame) = frame {
                        self.deliver(frame, turn)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn deliver_small(self: &Arc<Self>, small: &Small<'_>, turn: &mut Turn) -> Result<(), CloseCause> {
        match self.peer.get() {
            Some(peer) if self.status() == Status::Open => Ok(peer.on_small(self, small, turn)?),
            _ => self.deliver(small.to_frame(), turn),
        }
    }

    fn deliver(self: &Arc<Self>, frame: Frame, turn: &mut Turn) -> Result<(), CloseCause> {
        let status = self.status();
        match frame.kind {
            Kind::Close => {
                let goodbye: Goodbye = read_greeting("goodbye", &frame.metadata)?;
                return Err(match (goodbye.reason, self.route()) {
                    (Reason::Unreachable, Some(route)) => {
                        CloseCause::Connect { route: route.clone(), source: Arc::new(io::Error::other(goodbye.text)) }
                    }
                    _ => goodbye.cause(|| self.peer_text()),
                });
            }
            Kind::Challenge if status == Status::Greeting => self.on_challenge(&frame.metadata)?,
            Kind::Welcome if status == Status::Greeting => self.on_welcome(&frame)?,
            // The receiver has done what slabs need.
            Kind::Ping | Kind::Slab | Kind::Retire if status == Status::Open => {}
            Kind::Release if status == Status::Open => {
                for lease in shm::read_release(&frame.metadata)? {
                    // Dropped without the lock.
                    let _returned = lock(&self.lender).take_back(lease)?;
                }
                recycle(frame.metadata);
            }
            Kind::OpenBulk if status == Status::Open && self.dialed.is_some() => {
                let mut bulk = lock(&self.bulk);
                if matches!(bulk.link, BulkLink::None) {
                    self.dial_bulk(&mut bulk)?;
                }
            }
            Kind::Function | Kind::Request | Kind::Reply | Kind::Error | Kind::Cancel if status == Status::Open => {
                let Some(peer) = self.peer.get() else { unreachable!("an open endpoint has a peer") };
                peer.on_frame(self, frame, turn)?;
            }
            kind => return Err(ProtocolError::Unexpected { kind, expected: "a frame of an open endpoint" }.into()),
        }
        Ok(())
    }

    /// Drives this endpoint from a thread that blocks for something it brings, until `done` or `deadline`.
    ///
    /// Gives `false` when another thread must bring it: one that reads this endpoint already, or the leader, which reads the
    /// bulk connection. Then the caller parks, and is woken by that thread.
    /// # Cost
    /// Two changes of the epoll set, and one `recv` per batch of frames.
    pub fn drive_until(self: &Arc<Self>, done: &dyn Fn() -> bool, deadline: Instant) -> bool {
        if self.status() != Status::Open {
            return false;
        }
        self.flush_gathered();
        let Ok(mut rx) = self.rx.try_lock() else {
            self.send_attendant_away();
            return false;
        };
        let mut turn = Turn::default();
        if rx.ring.is_some() {
            let end = self.drive_ring(&mut Driven::new(self, rx), &mut turn, done, deadline);
            if let Err(cause) = end.and_then(|()| self.leave_ring(&mut turn)) {
                self.close(cause);
            }
            self.driver.finish_turn(&mut turn);
            return done();
        }
        self.control.want(&self.driver, EventFlags::IN, false);
        let (mut failed, mut began) = (None, None);
        // What a bulk connection completes, the driver's leader reads: no reason to sleep here then.
        while !done() && self.cause.get().is_none() && lock(&self.transfers).is_bulk_empty() && rx.ring.is_none() {
            let now = Instant::now();
            let left = deadline.saturating_duration_since(now);
            if left.is_zero() {
                break;
            }
            let mut step = Ok(false);
            let looks = began.is_none();
            began.get_or_insert(now);
            let found = looks
                && self.spin.look(now, || {
                    step = self.read_control(&mut rx, Wait::No, &mut turn);
                    !matches!(step, Ok(false))
                });
            if !found {
                step = if left < tcp::RECV_TICK { self.poll_readable(left) } else { Ok(true) };
                if let Ok(true) = step {
                    step = self.read_control(&mut rx, Wait::Tick, &mut turn);
                }
            }
            match step {
                Ok(false) => {}
                Ok(true) => drop(began.take().inspect(|began| self.spin.waited(*began))),
                Err(cause) => {
                    failed = Some(cause);
                    break;
                }
            }
            self.driver.finish_turn(&mut turn);
            self.flush_gathered();
        }
        // Before another may read: it would be disturbed by the leader.
        self.control.want(&self.driver, EventFlags::IN, true);
        let rings = rx.ring.is_some();
        drop(rx);
        if rings && failed.is_none() {
            failed = self.leave_ring(&mut turn).err();
        }
        if let Some(cause) = failed {
            self.close(cause);
        }
        self.driver.finish_turn(&mut turn);
        done()
    }

    /// Waits less than a tick for the control connection to become readable.
    fn poll_readable(&self, timeout: Duration) -> Result<bool, CloseCause> {
        match self.control.socket().poll_readable(timeout) {
            Err(Errno::INTR) => Ok(false),
            polled => polled.map_err(lost),
        }
    }

    /// Whether the peer has sent what is not read yet, or has closed.
    pub(crate) fn has_unread(&self) -> bool {
        self.has_ring_bytes() || self.poll_readable(Duration::ZERO).unwrap_or(true)
    }

    /// Adds what this endpoint holds, for simulations: they look for what is left over.
    pub(crate) fn count(&self, census: &mut Census) {
        let unanswered_bytes = lock(&self.rx).receiver.unanswered_bytes();
        census.unanswered_bytes += unanswered_bytes;
        census.unanswered_bytes_max = census.unanswered_bytes_max.max(unanswered_bytes);
        census.parked += lock(&self.transfers).len();
        let tx = lock(&self.tx);
        census.backlog_bytes += tx.wire.len() - tx.sent;
        let bulk = lock(&self.bulk);
        census.leaving += bulk.queue.len() + usize::from(bulk.current.is_some());
    }

    /// The peer's id for messages: its own word, else what was dialed.
    pub fn peer_id(&self) -> Option<&WorkerId> {
        self.remote.get().map(|info| &info.id)
    }

    /// The peer's name for errors of the greeting.
    fn peer_text(&self) -> String {
        let id = self.peer_id().or(self.dialed.as_ref().map(|(target, _)| &target.id));
        id.map_or_else(|| "the peer".to_owned(), WorkerId::to_string)
    }

    /// How this side dialed the control connection; `None` if the peer did.
    pub fn route(&self) -> Option<&Route> {
        self.dialed.as_ref().map(|(_, route)| route)
    }

    fn expected(&self) -> Option<&Arc<str>> {
        self.dialed.as_ref().map(|(target, _)| &target.id.name)
    }
}

pub(crate) fn lost(error: Errno) -> CloseCause {
    CloseCause::PeerLost { source: Some(Arc::new(io::Error::from(error))) }
}
