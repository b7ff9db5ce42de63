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
mod landing;
mod rings;

use std::cell::Cell;
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use farcall_device::codec::recycle;
use farcall_device::{Slab, Storage, Tensor, is_forked_child};
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;

use bulk::{Bulk, BulkLink, BulkRx, ENDED_MAX, STALL_MAX};
pub use encode::{Outbound, Staged, stage};
pub(crate) use encode::{encode_frame, encoded, greeting, payload, read_greeting, write_greeting};
use rings::{Bell, Driven, ended_with, only_bells};

use crate::address::{Goodbye, Hello, Reason, Role, Welcome};
use crate::auth::{Acceptor, Dialer};
use crate::descriptor::Mode;
use crate::driver::Seen;
use crate::driver::{BEATS_MISSED, Driver, Peer, Registration, Turn};
use crate::error::AuthError;
use crate::frame::{FEATURE_DIGESTS, FEATURE_RINGS, FEATURE_SLABS, HEADER_BYTES, Header, Kind, VERSION};
use crate::planted::{self, Bug};
use crate::receive::{Received, Receiver, Transfers};
use crate::shm::{Borrower, Lender, Returns, RingReader, RingWriter, Rings};
use crate::sim::Census;
use crate::socket::Socket;
use crate::tcp::{self, Progress, Wait};
use crate::{
    CloseCause, Frame, NoSlabs, Passing, ProtocolError, Route, Small, TransferError, WorkerId, WorkerInfo, life,
    passing, shm,
};

/// Bytes one `recv` on a control connection asks for; on the stack of whoever drives.
const RECV_BYTES: usize = 32 << 10;
/// Of what was lent, the part that goes back as it is, for which all of it stays; smaller ones are copied.
const FAIR_SHARE: usize = 8;
/// With so much unread, small frames at worst, a socket may be full: no more can come.
const FULL_BYTES: u64 = 8 << 10;
/// So many bytes need not wait for others.
const GATHERED_BYTES_MAX: usize = 16 << 10;
/// Room for outgoing frames that an endpoint keeps: two whole ones, so that steady traffic allocates nothing.
const WIRE_KEPT_BYTES: usize = 160 << 10;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
enum Status {
    Connecting,
    Greeting,
    Open,
    Closed,
}

/// When a frame's bytes are handed to the kernel, or its ring published.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Leave {
    Now,
    /// When what else the thread does is done.
    WithTurn,
    Gathered,
}

struct Rx {
    receiver: Receiver,
    /// Frames come by it, not by the socket.
    ring: Option<RingReader>,
}

struct Tx {
    /// Encoded frames; `sent` bytes of them are with the kernel.
    wire: Vec<u8>,
    sent: usize,
    /// Bytes of all frames so far that are with the kernel.
    taken: u64,
    /// Where, counted like `taken`, the answers end that are not all with the kernel.
    answers: VecDeque<u64>,
    next_transfer: u64,
    /// Interned functions announced on this connection, by id.
    announced: Vec<bool>,
    /// The ring, and from where on, counted like `taken`, frames go by it.
    ring: Option<(u64, RingWriter)>,
    /// What is written now need not wake its reader: more is to come soon that does.
    whispers: bool,
    /// The driver waits until the socket takes more.
    wants_out: bool,
    /// Slabs to pass, and where, counted like `taken`, the frames start that their descriptors go with.
    passing: VecDeque<(u64, Arc<Slab>)>,
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
            tx: Mutex::new(Tx {
                wire: Vec::new(),
                sent: 0,
                taken: 0,
                answers: VecDeque::new(),
                next_transfer: 1,
                announced: Vec::new(),
                ring: None,
                whispers: false,
                wants_out: false,
                passing: VecDeque::new(),
            }),
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

    // ---- sending ----

    /// Sends a frame: written now as far as the socket takes it, the rest by the driver. Never blocks.
    ///
    /// # Errors
    /// [`TransferError::Closed`], [`TransferError::TooLarge`] (nothing was sent), or a tensor that cannot be read.
    pub fn send(self: &Arc<Self>, outbound: &Outbound<'_>) -> Result<(), TransferError> {
        self.enqueue(outbound, None, Leave::Now)
    }

    /// As [`Self::send`], with `name` announced for the frame's function first if this connection does not know it.
    pub fn send_to_function(self: &Arc<Self>, outbound: &Outbound<'_>, name: &[u8]) -> Result<(), TransferError> {
        self.enqueue(outbound, Some(name), Leave::Now)
    }

    /// As [`Self::send_to_function`], one of many at once: where a write costs a system call, it leaves with others, at the next
    /// [`Self::flush_gathered`], frame that comes, or tick of the watchdog.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn gather_to_function(self: &Arc<Self>, outbound: &Outbound<'_>, name: &[u8]) -> Result<(), TransferError> {
        self.enqueue(outbound, Some(name), Leave::Gathered)
    }

    /// Writes what was gathered: to be called before somebody waits for what is to come of it.
    #[inline]
    pub fn flush_gathered(self: &Arc<Self>) {
        // Set by who holds `tx`, after the frame: cleared before `tx` is taken, none stays behind.
        if self.gathered.load(Ordering::SeqCst) && self.gathered.swap(false, Ordering::SeqCst) {
            self.flush();
        }
    }

    /// As [`Self::send`], but the bytes leave with [`Turn`]'s flush: replies of one batch share a system call.
    pub fn send_in(self: &Arc<Self>, outbound: &Outbound<'_>, turn: &mut Turn) -> Result<(), TransferError> {
        self.enqueue(outbound, None, Leave::WithTurn)?;
        turn.flush_later(self);
        Ok(())
    }

    fn enqueue(
        self: &Arc<Self>,
        outbound: &Outbound<'_>,
        announce: Option<&[u8]>,
        leave: Leave,
    ) -> Result<(), TransferError> {
        if is_forked_child() {
            // What this would write to is the parent's, and not mapped here.
            return Err(TransferError::Closed { cause: Arc::new(CloseCause::LocalShutdown) });
        }
        self.check_limits(outbound)?;
        if outbound.digests.is_some() && !self.has_digests.load(Ordering::Acquire) && self.cause.get().is_none() {
            let unknown = || WorkerId { name: "the peer".into(), rank: 0 };
            return Err(TransferError::NoDigests { worker: self.peer_id().cloned().unwrap_or_else(unknown) });
        }
        let mut landings = self.begin_landings(outbound)?;
        let mut tx = lock(&self.tx);
        let (copied, of_copies);
        let mut outbound = outbound;
        if self.may_refuse(outbound, &landings) {
            // Without the lock: it is a pass over the bytes.
            drop(tx);
            copied = landing::copied(outbound.tensors, std::mem::take(&mut landings))?;
            of_copies = Outbound { tensors: &copied, ..*outbound };
            outbound = &of_copies;
            tx = lock(&self.tx);
        }
        if let Some(cause) = self.cause.get() {
            return Err(TransferError::Closed { cause: Arc::clone(cause) });
        }
        let is_announced =
            announce.is_none() || tx.announced.get(outbound.function as usize).is_some_and(|known| *known);
        if outbound.tensors.is_empty() && is_announced {
            match self.send_small(&mut tx, outbound, leave != Leave::WithTurn) {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(cause) => {
                    drop(tx);
                    self.close(cause);
                    return Ok(());
                }
            }
        }
        let config = self.driver.config();
        let is_first = tx.sent == tx.wire.len() && tx.ring.as_ref().is_some_and(|(_, ring)| !ring.owes_wake());
        self.return_leases(&mut tx.wire);
        let Tx { wire, sent, taken, next_transfer, announced, passing, .. } = &mut *tx;
        if let Some(name) = announce {
            let id = outbound.function as usize;
            if announced.len() <= id {
                announced.resize(id + 1, false);
            }
            if !announced[id] {
                let announcement = Outbound { function: outbound.function, ..Outbound::new(Kind::Function, name) };
                encode_frame(&announcement, 0, next_transfer, wire, |_, _| None)?;
                announced[id] = true;
            }
        }
        let before = wire.len();
        let mut passed = Vec::new();
        let lend = |index: usize, storage: &Storage| {
            let landing = landings.get_mut(index).and_then(Option::as_mut);
            let storage = landing.as_ref().map_or(storage, |landing| landing.copy.copy().storage());
            if let Some(lent) = shm::lent_by(&self.returns, storage) {
                return Some(Mode::Back(lent));
            }
            let has_slabs = self.has_slabs.load(Ordering::Acquire);
            let loan = lock(has_slabs.then_some(&self.lender)?).lend(storage, &config.limits)?;
            passed.extend(loan.pass);
            if let Some(landing) = landing {
                landing.place = Some(loan.place);
                return Some(Mode::Landing(loan.place));
            }
            Some(Mode::Slab(loan.place))
        };
        let bulk = match encode_frame(outbound, config.limits.inline_bytes_max, next_transfer, wire, lend) {
            Ok(bulk) => bulk,
            Err(error) => {
                wire.truncate(before);
                return Err(error.into());
            }
        };
        for (index, slab) in passed.into_iter().enumerate() {
            let header = Header { call: slab.id(), offset: slab.len() as u64, ..Header::new(Kind::Slab) };
            // Before the frame that needs it; once for each slab.
            let at = before + index * HEADER_BYTES;
            wire.splice(at..at, *header.as_bytes());
            passing.push_back((*taken + (at - *sent) as u64, slab));
        }
        if matches!(outbound.kind, Kind::Reply | Kind::Error) {
            let end = tx.taken + (tx.wire.len() - tx.sent) as u64;
            tx.answers.push_back(end);
            self.untaken.store(tx.answers.len(), Ordering::Release);
        }
        let leave = if landings.is_empty() { leave } else { Leave::Now };
        let queued = if bulk.is_empty() { Ok(()) } else { self.queue_bulk(&mut tx, bulk) };
        let is_gathered = leave == Leave::Gathered && self.gather(&tx);
        let leaves = leave != Leave::WithTurn && !is_gathered && self.status() == Status::Open;
        // Nothing that was sent before waits for that.
        tx.whispers = is_first && self.wakes_later(&landings);
        let sent = queued.and_then(|()| if leaves { self.write_control(&mut tx) } else { Ok(()) });
        tx.whispers = false;
        drop(tx);
        if let Err(cause) = sent {
            // The caller's waiters hear of it through `on_closed`, as with any later failure.
            self.close(cause);
        }
        if leave != Leave::WithTurn {
            self.flush_bulk();
        }
        self.land(landings);
        Ok(())
    }

    /// Whether the frame at the end of `tx` may wait for others: not for a ring, nor if there are many.
    fn gather(self: &Arc<Self>, tx: &Tx) -> bool {
        let may_wait = tx.ring.is_none() && !tx.wants_out && tx.wire.len() - tx.sent < GATHERED_BYTES_MAX;
        if !may_wait || self.driver.simulated().is_some() {
            return false;
        }
        if !self.gathered.swap(true, Ordering::SeqCst) {
            self.driver.watch_gathered(self);
        }
        true
    }

    fn check_limits(&self, outbound: &Outbound<'_>) -> Result<(), TransferError> {
        let limits = &self.driver.config().limits;
        let bytes: u64 = outbound.tensors.iter().map(|tensor| tensor.layout().size_bytes() as u64).sum();
        for (what, found, max) in [
            ("metadata bytes", outbound.metadata.len() as u64, limits.metadata_bytes_max),
            ("tensors", outbound.tensors.len() as u64, limits.tensors_max),
            ("tensor bytes", bytes, limits.tensor_bytes_max),
        ] {
            if found > max {
                return Err(TransferError::TooLarge { what, found, max });
            }
        }
        Ok(())
    }

    /// Writes what was sent with [`Self::send_in`].
    pub(crate) fn flush(self: &Arc<Self>) {
        if self.status() == Status::Open && !is_forked_child() {
            let mut tx = lock(&self.tx);
            self.return_leases(&mut tx.wire);
            let written = self.write_control(&mut tx);
            drop(tx);
            if let Err(cause) = written {
                self.close(cause);
            }
        }
        self.flush_bulk();
    }

    /// Borrowed tensors that were dropped: their leases go with what goes next.
    fn return_leases(&self, wire: &mut Vec<u8>) {
        if self.has_slabs.load(Ordering::Acquire) {
            self.returns.write(&self.driver.config().limits, wire);
        }
    }

    /// Sends what waits up to the next slab, whose descriptor goes with the first byte of its frame.
    fn send_some(&self, tx: &mut Tx) -> Result<Progress, Errno> {
        let until = |at: &u64| tx.sent + (*at - tx.taken) as usize;
        let all = tx.ring.as_ref().map_or(tx.wire.len(), |(from, _)| until(from));
        match tx.passing.front() {
            Some((at, slab)) if *at == tx.taken => {
                let end = tx.passing.get(1).map_or(all, |(at, _)| until(at).min(all));
                let descriptor = slab.fd().map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::BADF))?;
                let progress = self.control.socket().send_with(&tx.wire[tx.sent..end], descriptor)?;
                if let Progress::Bytes(1..) = progress {
                    tx.passing.pop_front();
                }
                Ok(progress)
            }
            Some((at, _)) => self.control.socket().send(&[IoSlice::new(&tx.wire[tx.sent..until(at).min(all)])]),
            None => self.control.socket().send(&[IoSlice::new(&tx.wire[tx.sent..all])]),
        }
    }

    fn write_control(&self, tx: &mut Tx) -> Result<(), CloseCause> {
        while tx.sent < tx.wire.len() {
            if tx.ring.as_ref().is_some_and(|(from, _)| tx.taken >= *from) {
                let bell_fits = self.write_ring(tx)?;
                if tx.sent < tx.wire.len() {
                    // Else the receiver tells when there is room.
                    self.want_out(tx, !bell_fits);
                    trim(tx);
                    self.count_taken(tx);
                    return Ok(());
                }
                break;
            }
            match self.send_some(tx).map_err(lost)? {
                Progress::Bytes(len) => {
                    tx.sent += len;
                    tx.taken += len as u64;
                    self.took.store(self.driver.beats(), Ordering::Relaxed);
                }
                Progress::WouldBlock | Progress::Ended => {
                    trim(tx);
                    self.want_out(tx, true);
                    self.count_taken(tx);
                    return Ok(());
                }
            }
        }
        if let Some((_, ring)) = &mut tx.ring
            && ring.owes_wake()
            && !tx.whispers
        {
            self.wake_reader(ring);
        }
        tx.wire.clear();
        tx.wire.shrink_to(WIRE_KEPT_BYTES);
        tx.sent = 0;
        self.want_out(tx, false);
        self.count_taken(tx);
        Ok(())
    }

    fn want_out(&self, tx: &mut Tx, on: bool) {
        if tx.wants_out != on {
            tx.wants_out = on;
            self.control.want(&self.driver, EventFlags::OUT, on);
        }
    }

    fn count_taken(&self, tx: &mut Tx) {
        while tx.answers.front().is_some_and(|end| *end <= tx.taken) {
            tx.answers.pop_front();
        }
        self.untaken.store(tx.answers.len(), Ordering::Release);
    }

    /// Answers that the peer's socket has not taken: to their caller, these calls are not answered. At times one too many: the
    /// thread that wrote it may not have counted yet, while the peer has read it.
    pub fn untaken_answers(&self) -> usize {
        self.untaken.load(Ordering::Acquire)
    }

    /// The same without that: it waits for who writes now.
    pub fn count_untaken_answers(&self) -> usize {
        lock(&self.tx).answers.len()
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

    fn greet(&self) -> Result<(), CloseCause> {
        let (hello, proof) = self.hello(Role::Control { target: self.expected().cloned() })?;
        *lock(&self.proof) = proof;
        self.status.store(Status::Greeting as u8, Ordering::Release);
        self.control.set(&self.driver, EventFlags::IN);
        write_greeting(self.control.socket(), &greeting(Kind::Hello, &hello))
    }

    fn hello(&self, role: Role) -> Result<(Vec<u8>, Option<Dialer>), CloseCause> {
        let hello = {
            let features = if matches!(role, Role::Control { .. }) { self.features() } else { 0 };
            Hello::encode(self.driver.config(), role, self.peer_text(), features, || self.driver.fresh())
        };
        hello.map_err(|source| CloseCause::PeerLost { source: Some(Arc::new(source)) })
    }

    /// The acceptor proves that it has the job's key, and asks for the same.
    fn on_challenge(&self, challenge: &[u8]) -> Result<(), CloseCause> {
        let Some(proof) = &mut *lock(&self.proof) else {
            return Err(CloseCause::Auth(AuthError::KeyWanted { peer: self.peer_text() }));
        };
        write_greeting(self.control.socket(), &greeting(Kind::Proof, &proof.on_challenge(challenge)?))
    }

    /// The acceptor's answer; from now on frames go both ways.
    pub(crate) fn welcome(
        self: &Arc<Self>,
        peer: Arc<dyn Peer>,
        features: u64,
        acceptor: Option<Acceptor>,
    ) -> Result<(), CloseCause> {
        let key = lock(&self.bulk).key;
        lock(&self.rx).receiver.place_by(Arc::downgrade(&peer));
        if self.peer.set(peer).is_err() {
            unreachable!("an endpoint is welcomed once");
        }
        let welcome = Welcome {
            worker: self.driver.config().worker.clone(),
            bulk_key: key,
            version: VERSION,
            features: features & self.features(),
        };
        if welcome.features & FEATURE_SLABS != 0 {
            self.start_slabs(&mut lock(&self.rx).receiver);
        }
        if welcome.features & FEATURE_DIGESTS != 0 {
            lock(&self.rx).receiver.take_digests();
            self.has_digests.store(true, Ordering::Release);
        }
        let mut welcome = encoded(&welcome);
        if let Some(acceptor) = acceptor {
            acceptor.seal(&mut welcome);
        }
        // Calls to the peer may wait already: they go behind the welcome.
        let mut tx = lock(&self.tx);
        write_greeting(self.control.socket(), &greeting(Kind::Welcome, &welcome))?;
        let (from, to) = (Status::Greeting as u8, Status::Open as u8);
        if self.status.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_ok() {
            self.write_control(&mut tx)?;
        }
        Ok(())
    }

    /// What this side can do on this connection, in a hello or a welcome.
    fn features(&self) -> u64 {
        FEATURE_DIGESTS | if self.offers_slabs { FEATURE_SLABS | FEATURE_RINGS } else { 0 }
    }

    /// Both sides pass slabs: from now on.
    fn start_slabs(self: &Arc<Self>, rx: &mut Receiver) {
        self.returns.attach(Arc::downgrade(self));
        let limits = self.driver.config().limits.clone();
        rx.borrow_from(Borrower::new(limits, Arc::clone(&self.returns), Arc::clone(&self.lender)));
        lock(&self.lender).start();
        self.has_slabs.store(true, Ordering::Release);
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

    fn on_welcome(self: &Arc<Self>, frame: &Frame) -> Result<(), CloseCause> {
        let proof = lock(&self.proof).take();
        let metadata = match proof {
            Some(mut proof) => &proof.on_welcome(&frame.metadata)?.to_vec(),
            None => &frame.metadata,
        };
        let welcome: Welcome = read_greeting("welcome", metadata)?;
        if welcome.version != VERSION {
            return Err(ProtocolError::NoCommonVersion { theirs: [welcome.version; 2], ours: VERSION }.into());
        }
        if let Some(expected) = self.expected()
            && **expected != *welcome.worker.id.name
        {
            let (found, expected) = (welcome.worker.id.name.to_string(), expected.to_string());
            return Err(ProtocolError::WrongWorker { found, expected }.into());
        }
        let (found, dialed) = (&welcome.worker, self.dialed.as_ref().map(|(worker, _)| worker));
        if let Some(dialed) = dialed
            && found.incarnation < dialed.incarnation
        {
            let (life, newest) = (found.incarnation, dialed.incarnation);
            return Err(ProtocolError::EarlierLife { worker: found.id.name.to_string(), life, newest }.into());
        }
        if self.offers_slabs && welcome.features & FEATURE_SLABS != 0 {
            // Before frames that wait leave; the reader goes on from there.
            self.has_slabs.store(true, Ordering::Release);
        }
        // Before the peer is known, as requests with digests wait for that.
        self.has_digests.store(welcome.features & FEATURE_DIGESTS != 0, Ordering::Release);
        // The only writer: frames of one connection are delivered one at a time, and a second welcome is refused.
        let _ = self.remote.set(welcome.worker);
        if let Some(peer) = self.peer.get() {
            Arc::clone(peer).on_opened(self);
        }
        self.watch_life();
        let mut tx = lock(&self.tx);
        self.send_rings(&mut tx, welcome.features)?;
        let mut bulk = lock(&self.bulk);
        bulk.key = welcome.bulk_key;
        let (from, to) = (Status::Greeting as u8, Status::Open as u8);
        if self.status.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_err() {
            return Ok(()); // closed meanwhile
        }
        if !bulk.queue.is_empty() {
            self.dial_bulk(&mut bulk)?;
        }
        drop(bulk);
        self.write_control(&mut tx)
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

    // ---- time and the end ----

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

    /// Whether the peer has sent what is not read yet, or has closed.
    pub(crate) fn has_unread(&self) -> bool {
        self.has_ring_bytes() || self.poll_readable(Duration::ZERO).unwrap_or(true)
    }

    /// Bytes were read: the peer lives, unless they have lain here since the last heartbeat, which has counted them.
    fn hear(&self) {
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

/// A connection that never quite empties must not grow with its traffic.
fn trim(tx: &mut Tx) {
    if tx.sent > WIRE_KEPT_BYTES && tx.sent > tx.wire.len() / 2 {
        tx.wire.drain(..tx.sent);
        tx.sent = 0;
    }
}

/// The outcome of a connect that made the socket writable.
fn finish_connect(socket: &Socket, route: Option<&Route>) -> Result<(), CloseCause> {
    let outcome = match socket.take_error() {
        Ok(None) => socket.prepare(),
        Ok(Some(error)) | Err(error) => Err(error),
    };
    outcome.map_err(|source| match route.cloned() {
        Some(route) => CloseCause::Connect { route, source: Arc::new(source) },
        None => CloseCause::PeerLost { source: Some(Arc::new(source)) },
    })
}
