//! The control path to one peer, and the bulk connection beside it.
//!
//! An endpoint is a state machine behind short locks that any thread may drive. Frames go out under `tx`, written by
//! the thread that sends; what the socket does not take leaves with the driver. Frames come in under `rx`: the driver's
//! leader reads when epoll says so, and a caller that blocks for its reply takes the role (and the socket's place in
//! the epoll set) for as long as it waits.
//! Invariant D1: only the holder of `rx` reads the control connection, so frames are seen in the order sent.
//! Invariant E1: `close` runs once; every waiter hears of it through [`Peer::on_closed`].
//! Invariant R1: payload above the inline limit travels on the bulk connection, in chunks taken from its transfers in
//! turn; control frames never wait for it.
//! Lock order: `rx` → (`transfers`, `bulk_rx`) and `tx` → `bulk`; `interest` is innermost.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::net::{Shutdown, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use farcall_device::{Device, DeviceError, Event, Runtime, Tensor};
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use socket2::Socket;

use crate::address::{Goodbye, Hello, Reason, Role, Welcome};
use crate::descriptor::{Descriptor, Mode};
use crate::driver::{Driver, Peer, Registration, Turn};
use crate::frame::{FEATURES, HEADER_BYTES, Header, Kind, VERSION};
use crate::receive::{Chunk, Received, Receiver, Transfers};
use crate::tcp::{self, Progress, Wait};
use crate::{CloseCause, Frame, ProtocolError, TransferError, WorkerId, WorkerInfo};

/// Bytes one `recv` on a control connection asks for; on the stack of whoever drives.
const RECV_BYTES: usize = 32 << 10;
/// Room for outgoing frames that an endpoint keeps: two whole ones, so that steady traffic allocates nothing.
const WIRE_KEPT_BYTES: usize = 160 << 10;
/// Bulk bytes moved for one endpoint before the driver looks at the others.
const BULK_TURN_BYTES: usize = 4 << 20;
/// What a chunk counts for beside its bytes, so that many tiny ones are a turn, too.
const CHUNK_COST_BYTES: usize = 4 << 10;
/// How long a bulk connection may hold a chunk whose frame has not come on the control connection.
const STALL_MAX: Duration = Duration::from_secs(10);

/// A frame to send. Tensors are read when it is sent; storages stay owned until their bytes are gone.
#[derive(Clone, Copy, Debug)]
pub struct Outbound<'a> {
    /// What it is for.
    pub kind: Kind,
    /// The call it belongs to.
    pub call: u64,
    /// The interned function.
    pub function: u32,
    /// Microseconds the caller still waits, 0 for no limit.
    pub deadline_us: u64,
    /// The encoded value without its tensors.
    pub metadata: &'a [u8],
    /// The tensors: on the host, complete, dense or broadcast, as [`stage`] makes them.
    pub tensors: &'a [Tensor],
    /// The device that each tensor is for at the target; empty for the host.
    pub devices: &'a [Device],
}

impl<'a> Outbound<'a> {
    /// A frame without call, function, deadline or tensors.
    pub fn new(kind: Kind, metadata: &'a [u8]) -> Self {
        Self { kind, call: 0, function: 0, deadline_us: 0, metadata, tensors: &[], devices: &[] }
    }
}

/// Tensors as [`Outbound`] takes them, once `pending` has passed.
#[derive(Debug, Default)]
pub struct Staged {
    /// On the host, dense or broadcast.
    pub tensors: Vec<Tensor>,
    /// Where each came from; empty if all were on the host.
    pub devices: Vec<Device>,
    /// The fences to wait for before they are sent (FENCE).
    pub pending: Vec<Event>,
}

/// Brings tensors into the form that the wire takes: those of devices are copied to the host, those with gaps packed, on
/// streams behind their writes. Nothing is waited for.
///
/// # Errors
/// [`DeviceError`] of a device or of memory.
pub fn stage(runtime: &Runtime, mut tensors: Vec<Tensor>) -> Result<Staged, DeviceError> {
    let mut devices = Vec::new();
    if tensors.iter().any(|tensor| tensor.device() != Device::HOST) {
        devices.extend(tensors.iter().map(Tensor::device));
    }
    let mut pending = Vec::new();
    for tensor in &mut tensors {
        let fits = tensor.is_contiguous() || tensor.layout().is_dense_or_broadcast();
        if tensor.device() != Device::HOST || !fits {
            *tensor = runtime.stream(tensor.device())?.pack(tensor, Device::HOST)?;
        }
        let event = tensor.storage().ready_event();
        if !event.query()? {
            pending.push(event.clone());
        }
    }
    Ok(Staged { tensors, devices, pending })
}

/// Appends `outbound` to `wire` and gives the tensors that travel on the bulk connection, with their transfer ids.
pub(crate) fn encode_frame(
    outbound: &Outbound<'_>,
    inline_bytes_max: u64,
    next_transfer: &mut u64,
    wire: &mut Vec<u8>,
) -> Result<Vec<(u64, Tensor)>, DeviceError> {
    let start = wire.len();
    let mut header = Header {
        call: outbound.call,
        function: outbound.function,
        deadline_us: outbound.deadline_us,
        meta_len: outbound.metadata.len() as u32,
        tensors: outbound.tensors.len() as u16,
        ..Header::new(outbound.kind)
    };
    wire.extend_from_slice(header.as_bytes());
    let mut bulk = Vec::new();
    let mut inline: Vec<&Tensor> = Vec::new();
    for (index, tensor) in outbound.tensors.iter().enumerate() {
        debug_assert!(tensor.layout().is_dense_or_broadcast(), "sent without `stage`: {tensor:?}");
        // Unreadable tensors fail their own call, here; later they would end the connection.
        payload(tensor)?;
        let device = outbound.devices.get(index).copied().unwrap_or(Device::HOST);
        let mut descriptor = Descriptor::of(tensor, device, Mode::Inline);
        if header.payload_len + descriptor.len_bytes <= inline_bytes_max {
            header.payload_len += descriptor.len_bytes;
            inline.push(tensor);
        } else {
            descriptor.mode = Mode::Bulk(*next_transfer);
            bulk.push((*next_transfer, tensor.clone()));
            *next_transfer += 1;
        }
        descriptor.write(wire);
    }
    header.table_len = (wire.len() - start - HEADER_BYTES) as u32;
    wire[start..start + HEADER_BYTES].copy_from_slice(header.as_bytes());
    wire.extend_from_slice(outbound.metadata);
    for tensor in inline {
        wire.extend_from_slice(payload(tensor)?);
    }
    Ok(bulk)
}

/// The bytes of a dense or broadcast tensor, without the rest of its storage.
///
/// # Errors
/// [`DeviceError::NotReady`], [`DeviceError::NotHost`].
fn payload(tensor: &Tensor) -> Result<&[u8], DeviceError> {
    Ok(&tensor.storage().as_bytes()?[tensor.layout().byte_span()])
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
enum Status {
    Connecting,
    Greeting,
    Open,
    Closed,
}

struct Tx {
    /// Encoded frames; `sent` bytes of them are with the kernel.
    wire: Vec<u8>,
    sent: usize,
    next_transfer: u64,
    /// Interned functions announced on this connection, by id.
    announced: Vec<bool>,
}

struct Outgoing {
    transfer: u64,
    tensor: Tensor,
    offset: usize,
}

/// A chunk on its way out: its header, then its payload.
struct ChunkOut {
    header: Header,
    sent: usize,
}

enum BulkLink {
    None,
    /// Asked for then: the dialer of the control connection is to open it.
    Requested(Instant),
    Connecting(Registration, Instant),
    Open(Registration),
}

struct Bulk {
    link: BulkLink,
    key: u128,
    /// Bytes that go before any chunk: the dialer's hello.
    prefix: Vec<u8>,
    queue: VecDeque<Outgoing>,
    current: Option<(ChunkOut, Outgoing)>,
}

struct BulkRx {
    head: [u8; HEADER_BYTES],
    head_len: usize,
    chunk: Option<Chunk>,
    /// A header whose frame has not come on the control connection yet, and since when.
    stalled: Option<(Header, Instant)>,
}

/// The control path to one peer; see the module.
pub struct Endpoint {
    driver: Arc<Driver>,
    /// Who opened the control connection: this side, or the peer.
    dialed: Option<SocketAddr>,
    expected: Option<Arc<str>>,
    status: AtomicU8,
    control: Registration,
    rx: Mutex<Receiver>,
    tx: Mutex<Tx>,
    bulk: Mutex<Bulk>,
    bulk_rx: Mutex<BulkRx>,
    transfers: Mutex<Transfers>,
    bulk_stalled: AtomicBool,
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
    /// Dials `address` and gives the endpoint at once; frames sent meanwhile leave when the peer has welcomed us.
    ///
    /// # Errors
    /// Only what fails at once, such as no descriptors left. A refused or late connection closes the endpoint.
    pub fn dial(driver: &Arc<Driver>, target: &WorkerInfo, peer: Arc<dyn Peer>) -> Result<Arc<Self>, TransferError> {
        let socket = tcp::connect(target.address).map_err(TransferError::os("connect"))?;
        let endpoint = Self::new(driver, socket, Some(target.address), Status::Connecting, 0)?;
        let endpoint = Self { expected: Some(Arc::clone(&target.id.name)), ..endpoint };
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
        dialed: Option<SocketAddr>,
        status: Status,
        key: u128,
    ) -> Result<Self, TransferError> {
        Ok(Self {
            driver: Arc::clone(driver),
            dialed,
            expected: None,
            status: AtomicU8::new(status as u8),
            control: driver.register(socket),
            rx: Mutex::new(Receiver::new(driver.config().limits.clone(), driver.config().runtime.clone())),
            tx: Mutex::new(Tx { wire: Vec::new(), sent: 0, next_transfer: 1, announced: Vec::new() }),
            bulk: Mutex::new(Bulk {
                link: BulkLink::None,
                key,
                prefix: Vec::new(),
                queue: VecDeque::new(),
                current: None,
            }),
            bulk_rx: Mutex::new(BulkRx { head: [0; HEADER_BYTES], head_len: 0, chunk: None, stalled: None }),
            transfers: Mutex::default(),
            bulk_stalled: AtomicBool::new(false),
            opened_at: Instant::now(),
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
        self.enqueue(outbound, None, true)
    }

    /// As [`Self::send`], with `name` announced for the frame's function first if this connection does not know it.
    pub fn send_to_function(self: &Arc<Self>, outbound: &Outbound<'_>, name: &[u8]) -> Result<(), TransferError> {
        self.enqueue(outbound, Some(name), true)
    }

    /// As [`Self::send`], but the bytes leave with [`Turn`]'s flush: replies of one batch share a system call.
    pub fn send_in(self: &Arc<Self>, outbound: &Outbound<'_>, turn: &mut Turn) -> Result<(), TransferError> {
        self.enqueue(outbound, None, false)?;
        turn.flush_later(self);
        Ok(())
    }

    fn enqueue(
        self: &Arc<Self>,
        outbound: &Outbound<'_>,
        announce: Option<&[u8]>,
        flush: bool,
    ) -> Result<(), TransferError> {
        self.check_limits(outbound)?;
        let mut tx = lock(&self.tx);
        if let Some(cause) = self.cause.get() {
            return Err(TransferError::Closed { cause: Arc::clone(cause) });
        }
        let config = self.driver.config();
        let Tx { wire, next_transfer, announced, .. } = &mut *tx;
        if let Some(name) = announce {
            let id = outbound.function as usize;
            if announced.len() <= id {
                announced.resize(id + 1, false);
            }
            if !announced[id] {
                let announcement = Outbound { function: outbound.function, ..Outbound::new(Kind::Function, name) };
                encode_frame(&announcement, 0, next_transfer, wire)?;
                announced[id] = true;
            }
        }
        let before = wire.len();
        let bulk = match encode_frame(outbound, config.limits.inline_bytes_max, next_transfer, wire) {
            Ok(bulk) => bulk,
            Err(error) => {
                wire.truncate(before);
                return Err(error.into());
            }
        };
        let queued = if bulk.is_empty() { Ok(()) } else { self.queue_bulk(&mut tx, bulk) };
        let sent = queued.and_then(|()| {
            if flush && self.status() == Status::Open { self.write_control(&mut tx).map_err(lost) } else { Ok(()) }
        });
        drop(tx);
        if let Err(cause) = sent {
            // The caller's waiters hear of it through `on_closed`, as with any later failure.
            self.close(cause);
        }
        if flush {
            self.flush_bulk();
        }
        Ok(())
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
        if self.status() == Status::Open {
            let written = self.write_control(&mut lock(&self.tx));
            if let Err(error) = written {
                self.close(CloseCause::PeerLost { source: Some(Arc::new(error.into())) });
            }
        }
        self.flush_bulk();
    }

    fn write_control(&self, tx: &mut Tx) -> Result<(), Errno> {
        while tx.sent < tx.wire.len() {
            match tcp::send(self.control.socket(), &[IoSlice::new(&tx.wire[tx.sent..])])? {
                Progress::Bytes(len) => tx.sent += len,
                Progress::WouldBlock | Progress::Ended => {
                    if tx.sent > WIRE_KEPT_BYTES && tx.sent > tx.wire.len() / 2 {
                        // A connection that never quite empties must not grow with its traffic.
                        tx.wire.drain(..tx.sent);
                        tx.sent = 0;
                    }
                    self.control.want(&self.driver, EventFlags::OUT, true);
                    return Ok(());
                }
            }
        }
        tx.wire.clear();
        tx.wire.shrink_to(WIRE_KEPT_BYTES);
        tx.sent = 0;
        self.control.want(&self.driver, EventFlags::OUT, false);
        Ok(())
    }

    // ---- the bulk connection ----

    fn queue_bulk(self: &Arc<Self>, tx: &mut Tx, tensors: Vec<(u64, Tensor)>) -> Result<(), CloseCause> {
        let mut bulk = lock(&self.bulk);
        bulk.queue.extend(tensors.into_iter().map(|(transfer, tensor)| Outgoing { transfer, tensor, offset: 0 }));
        if !matches!(bulk.link, BulkLink::None) {
            return Ok(());
        }
        if self.dialed.is_none() {
            let now = Instant::now();
            bulk.link = BulkLink::Requested(now);
            self.driver.schedule(now + self.driver.config().connect_timeout);
            let request = Outbound::new(Kind::OpenBulk, &[]);
            if let Err(error) = encode_frame(&request, 0, &mut tx.next_transfer, &mut tx.wire) {
                unreachable!("a frame without tensors encodes: {error}");
            }
        } else if self.status() == Status::Open {
            return self.dial_bulk(&mut bulk);
        }
        // Else the welcome is still to come, and brings the key.
        Ok(())
    }

    /// Opens the bulk connection. After a failure the caller closes the endpoint, once it has let go of its locks.
    fn dial_bulk(self: &Arc<Self>, bulk: &mut Bulk) -> Result<(), CloseCause> {
        let Some(address) = self.dialed else { return Ok(()) };
        let config = self.driver.config();
        let hello = Hello::new(config, Role::Bulk { key: bulk.key });
        bulk.prefix = greeting(Kind::Hello, &hello);
        if self.cause.get().is_some() {
            return Ok(()); // closed meanwhile, and nobody would close this connection
        }
        let failed = |source| CloseCause::Connect { address, source: Arc::new(source) };
        let registration = self.driver.register(tcp::connect(address).map_err(failed)?);
        if let Err(error) = self.driver.add_bulk(self, &registration, EventFlags::OUT) {
            return Err(failed(io::Error::other(error)));
        }
        let now = Instant::now();
        bulk.link = BulkLink::Connecting(registration, now);
        self.driver.schedule(now + config.connect_timeout);
        Ok(())
    }

    /// The acceptor's side: a dialer's connection proved to be this endpoint's bulk connection.
    pub(crate) fn attach_bulk(self: &Arc<Self>, socket: Socket) -> Result<(), TransferError> {
        let registration = self.driver.register(socket);
        let mut bulk = lock(&self.bulk);
        if matches!(bulk.link, BulkLink::Connecting(..) | BulkLink::Open(_)) || self.cause.get().is_some() {
            // One bulk connection per endpoint; the second one's socket is dropped here.
            tracing::warn!(peer = ?self.peer_id(), "refused a second bulk connection");
            return Ok(());
        }
        self.driver.add_bulk(self, &registration, EventFlags::IN)?;
        bulk.link = BulkLink::Open(registration);
        drop(bulk);
        self.flush_bulk();
        Ok(())
    }

    fn flush_bulk(self: &Arc<Self>) {
        let mut bulk = lock(&self.bulk);
        if bulk.queue.is_empty() && bulk.current.is_none() && bulk.prefix.is_empty() {
            return;
        }
        if let Err(cause) = self.write_bulk(&mut bulk) {
            drop(bulk);
            self.close(cause);
        }
    }

    fn write_bulk(&self, bulk: &mut Bulk) -> Result<(), CloseCause> {
        let Bulk { link: BulkLink::Open(link), prefix, queue, current, .. } = bulk else { return Ok(()) };
        let chunk_bytes = self.driver.config().limits.chunk_bytes_max as usize;
        let mut budget = BULK_TURN_BYTES;
        loop {
            if !prefix.is_empty() {
                let Progress::Bytes(len) = tcp::send(link.socket(), &[IoSlice::new(prefix)]).map_err(lost)? else {
                    break;
                };
                prefix.drain(..len);
                continue;
            }
            if current.is_none() {
                let Some(next) = queue.pop_front() else {
                    link.want(&self.driver, EventFlags::OUT, false);
                    return Ok(());
                };
                let rest = payload(&next.tensor)?.len() - next.offset;
                let header = Header {
                    call: next.transfer,
                    offset: next.offset as u64,
                    payload_len: rest.min(chunk_bytes) as u64,
                    ..Header::new(Kind::Chunk)
                };
                *current = Some((ChunkOut { header, sent: 0 }, next));
            }
            let Some((chunk, outgoing)) = current else { continue };
            let end = outgoing.offset + chunk.header.payload_len as usize;
            let bytes = payload(&outgoing.tensor)?;
            let (head, from) = if chunk.sent < HEADER_BYTES {
                (&chunk.header.as_bytes()[chunk.sent..], outgoing.offset)
            } else {
                (&[][..], outgoing.offset + chunk.sent - HEADER_BYTES)
            };
            if budget == 0 {
                break;
            }
            let parts = [IoSlice::new(head), IoSlice::new(&bytes[from..end])];
            let Progress::Bytes(len) = tcp::send(link.socket(), &parts).map_err(lost)? else { break };
            chunk.sent += len;
            budget = budget.saturating_sub(len);
            if chunk.sent == HEADER_BYTES + chunk.header.payload_len as usize {
                let Some((_, mut outgoing)) = current.take() else { continue };
                outgoing.offset = end;
                if end < payload(&outgoing.tensor)?.len() {
                    queue.push_back(outgoing);
                }
            }
        }
        link.want(&self.driver, EventFlags::OUT, true);
        Ok(())
    }

    /// The bulk connection is ready for something.
    pub(crate) fn on_bulk_event(self: &Arc<Self>, flags: EventFlags, turn: &mut Turn) {
        let result = self.bulk_event(flags, turn);
        if let Err(cause) = result {
            self.close(cause);
        }
    }

    fn bulk_event(self: &Arc<Self>, flags: EventFlags, turn: &mut Turn) -> Result<(), CloseCause> {
        let mut bulk = lock(&self.bulk);
        if let BulkLink::Connecting(link, _) = &bulk.link {
            let link = link.clone();
            finish_connect(link.socket(), self.dialed)?;
            bulk.link = BulkLink::Open(link.clone());
            link.want(&self.driver, EventFlags::IN, true);
        }
        if flags.contains(EventFlags::OUT) {
            self.write_bulk(&mut bulk)?;
        }
        let BulkLink::Open(link) = &bulk.link else { return Ok(()) };
        let link = link.clone();
        drop(bulk);
        if flags.intersects(EventFlags::IN | EventFlags::HUP | EventFlags::ERR) {
            // Held by another thread only while it reads this very connection.
            if let Ok(mut rx) = self.bulk_rx.try_lock() {
                if rx.stalled.is_some() && flags.intersects(EventFlags::HUP | EventFlags::ERR) {
                    return Err(CloseCause::PeerLost { source: None });
                }
                self.read_bulk(&link, &mut rx, turn)?;
            }
        }
        Ok(())
    }

    fn read_bulk(self: &Arc<Self>, link: &Registration, rx: &mut BulkRx, turn: &mut Turn) -> Result<(), CloseCause> {
        let mut budget = BULK_TURN_BYTES;
        while budget > 0 {
            if let Some(chunk) = &mut rx.chunk {
                let target = chunk.target()?;
                match tcp::recv_into(link.socket(), target).map_err(lost)? {
                    Progress::Bytes(len) => {
                        let complete = len == target.len();
                        chunk.advance(len);
                        budget = budget.saturating_sub(len);
                        if complete && let Some(chunk) = rx.chunk.take() {
                            let frame = lock(&self.transfers).end(chunk)?;
                            if let Some(frame) = frame {
                                self.deliver(frame, turn)?;
                            }
                        }
                    }
                    Progress::WouldBlock => return Ok(()),
                    Progress::Ended => return Err(CloseCause::PeerLost { source: None }),
                }
                continue;
            }
            let header = if let Some((header, _)) = rx.stalled {
                header
            } else {
                match tcp::recv_into(link.socket(), &mut rx.head[rx.head_len..]).map_err(lost)? {
                    Progress::Bytes(len) => rx.head_len += len,
                    Progress::WouldBlock => return Ok(()),
                    Progress::Ended => return Err(CloseCause::PeerLost { source: None }),
                }
                if rx.head_len < HEADER_BYTES {
                    return Ok(());
                }
                rx.head_len = 0;
                let (header, kind) = Header::parse(&rx.head, &self.driver.config().limits)?;
                if kind == Kind::Close {
                    return Err(CloseCause::Refused { text: "it refused the bulk connection".to_owned() });
                }
                if kind != Kind::Chunk {
                    return Err(ProtocolError::Unexpected { kind, expected: "a chunk" }.into());
                }
                header
            };
            // Under the transfers' lock, so that a frame parked just now either is seen here or sees the stall.
            let mut transfers = lock(&self.transfers);
            match transfers.begin(&header)? {
                Some(chunk) => {
                    rx.stalled = None;
                    rx.chunk = Some(chunk);
                    budget = budget.saturating_sub(CHUNK_COST_BYTES);
                }
                None => {
                    if rx.stalled.is_none() {
                        let now = Instant::now();
                        rx.stalled = Some((header, now));
                        self.driver.schedule(now + STALL_MAX);
                    }
                    self.bulk_stalled.store(true, Ordering::Relaxed);
                    link.want(&self.driver, EventFlags::IN, false);
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// A frame's storages are known: chunks for them may come in.
    fn park(&self, partial: crate::receive::Partial) -> Result<(), CloseCause> {
        let mut transfers = lock(&self.transfers);
        transfers.park(partial)?;
        let stalled = self.bulk_stalled.swap(false, Ordering::Relaxed);
        drop(transfers);
        if stalled && let BulkLink::Open(link) = &lock(&self.bulk).link {
            link.want(&self.driver, EventFlags::IN, true);
        }
        Ok(())
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
            finish_connect(self.control.socket(), self.dialed)?;
            self.greet()?;
        }
        if flags.contains(EventFlags::OUT) && self.status() == Status::Open {
            self.write_control(&mut lock(&self.tx)).map_err(lost)?;
        }
        if flags.intersects(EventFlags::IN | EventFlags::HUP | EventFlags::ERR)
            && let Ok(mut rx) = self.rx.try_lock()
        {
            self.read_control(&mut rx, Wait::No, turn)?;
        }
        Ok(())
    }

    fn greet(&self) -> Result<(), CloseCause> {
        let config = self.driver.config();
        let hello = Hello::new(config, Role::Control { target: self.expected.clone() });
        let bytes = greeting(Kind::Hello, &hello);
        self.status.store(Status::Greeting as u8, Ordering::Release);
        self.control.set(&self.driver, EventFlags::IN);
        write_greeting(self.control.socket(), &bytes)
    }

    /// The acceptor's answer; from now on frames go both ways.
    pub(crate) fn welcome(&self, peer: Arc<dyn Peer>, features: u64) -> Result<(), CloseCause> {
        let key = lock(&self.bulk).key;
        if self.peer.set(peer).is_err() {
            unreachable!("an endpoint is welcomed once");
        }
        let welcome = Welcome {
            worker: self.driver.config().worker.clone(),
            bulk_key: key,
            version: VERSION,
            features: features & FEATURES,
        };
        // Calls to the peer may wait already: they go behind the welcome.
        let mut tx = lock(&self.tx);
        write_greeting(self.control.socket(), &greeting(Kind::Welcome, &welcome))?;
        let (from, to) = (Status::Greeting as u8, Status::Open as u8);
        if self.status.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_ok() {
            self.write_control(&mut tx).map_err(lost)?;
        }
        Ok(())
    }

    /// Reads once, and hands on what came. With [`Wait::Tick`] it sleeps for the first byte.
    fn read_control(self: &Arc<Self>, rx: &mut Receiver, wait: Wait, turn: &mut Turn) -> Result<(), CloseCause> {
        let mut buffer = [MaybeUninit::uninit(); RECV_BYTES];
        let (progress, bytes) = tcp::recv(self.control.socket(), &mut buffer, wait).map_err(lost)?;
        match progress {
            Progress::WouldBlock => return Ok(()),
            Progress::Ended => {
                return Err(match rx.missing_bytes() {
                    0 => CloseCause::PeerLost { source: None },
                    missing_bytes => ProtocolError::TruncatedFrame { missing_bytes }.into(),
                });
            }
            Progress::Bytes(_) => {}
        }
        let mut input = &bytes[..];
        while let Some(received) = rx.feed(&mut input)? {
            match received {
                Received::Frame(frame) => self.deliver(frame, turn)?,
                Received::Waiting(partial) => self.park(partial)?,
            }
        }
        Ok(())
    }

    fn deliver(self: &Arc<Self>, frame: Frame, turn: &mut Turn) -> Result<(), CloseCause> {
        let status = self.status();
        match frame.kind {
            Kind::Close => {
                let goodbye: Goodbye = read_greeting("goodbye", &frame.metadata)?;
                return Err(match goodbye.reason {
                    Reason::Shutdown => CloseCause::PeerShutdown { text: goodbye.text },
                    Reason::Refused => CloseCause::Refused { text: goodbye.text },
                });
            }
            Kind::Welcome if status == Status::Greeting => self.on_welcome(&frame)?,
            Kind::OpenBulk if status == Status::Open && self.dialed.is_some() => {
                let mut bulk = lock(&self.bulk);
                if matches!(bulk.link, BulkLink::None) {
                    self.dial_bulk(&mut bulk)?;
                }
            }
            Kind::Function | Kind::Request | Kind::Reply | Kind::Error if status == Status::Open => {
                let Some(peer) = self.peer.get() else { unreachable!("an open endpoint has a peer") };
                peer.on_frame(self, frame, turn)?;
            }
            kind => return Err(ProtocolError::Unexpected { kind, expected: "a frame of an open endpoint" }.into()),
        }
        Ok(())
    }

    fn on_welcome(self: &Arc<Self>, frame: &Frame) -> Result<(), CloseCause> {
        let welcome: Welcome = read_greeting("welcome", &frame.metadata)?;
        if welcome.version != VERSION {
            return Err(ProtocolError::NoCommonVersion { theirs: [welcome.version; 2], ours: VERSION }.into());
        }
        if let Some(expected) = &self.expected
            && **expected != *welcome.worker.id.name
        {
            let (found, expected) = (welcome.worker.id.name.to_string(), expected.to_string());
            return Err(ProtocolError::WrongWorker { found, expected }.into());
        }
        // The only writer: frames of one connection are delivered one at a time, and a second welcome is refused.
        let _ = self.remote.set(welcome.worker);
        let mut tx = lock(&self.tx);
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
        self.write_control(&mut tx).map_err(lost)
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
        let Ok(mut rx) = self.rx.try_lock() else { return false };
        self.control.want(&self.driver, EventFlags::IN, false);
        let mut turn = Turn::default();
        let mut failed = None;
        // What a bulk connection completes, the driver's leader reads: no reason to sleep here then.
        while !done() && self.cause.get().is_none() && lock(&self.transfers).is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let step = if left < tcp::RECV_TICK { self.poll_readable(left) } else { Ok(true) };
            let step = step.and_then(
                |readable| {
                    if readable { self.read_control(&mut rx, Wait::Tick, &mut turn) } else { Ok(()) }
                },
            );
            if let Err(cause) = step {
                failed = Some(cause);
                break;
            }
            self.driver.finish_turn(&mut turn);
        }
        // Before another may read: it would be disturbed by the leader.
        self.control.want(&self.driver, EventFlags::IN, true);
        drop(rx);
        if let Some(cause) = failed {
            self.close(cause);
        }
        self.driver.finish_turn(&mut turn);
        done()
    }

    /// Waits less than a tick for the control connection to become readable.
    fn poll_readable(&self, timeout: Duration) -> Result<bool, CloseCause> {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let timeout = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: i64::from(timeout.subsec_nanos()) };
        match poll(&mut [PollFd::new(self.control.socket(), PollFlags::IN)], Some(&timeout)) {
            Ok(ready) => Ok(ready > 0),
            Err(Errno::INTR) => Ok(false),
            Err(error) => Err(lost(error)),
        }
    }

    // ---- time and the end ----

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
            (_, BulkLink::Connecting(_, since) | BulkLink::Requested(since)) => Some(*since),
            _ => None,
        };
        if let Some(since) = connecting_since
            && check(since + connect_timeout)
        {
            let what = "bulk connection";
            self.close(match self.dialed {
                Some(address) => CloseCause::ConnectTimeout { address, timeout: connect_timeout },
                None => ProtocolError::Stalled { what, timeout: connect_timeout }.into(),
            });
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
        let before = self.status.swap(Status::Closed as u8, Ordering::AcqRel);
        let goodbye = match &*cause {
            CloseCause::LocalShutdown => Some(Goodbye { reason: Reason::Shutdown, text: cause.to_string() }),
            CloseCause::Protocol(error) => Some(Goodbye { reason: Reason::Refused, text: error.to_string() }),
            CloseCause::Device(error) => Some(Goodbye { reason: Reason::Refused, text: error.to_string() }),
            _ => None,
        };
        if let Some(goodbye) = goodbye
            && before == Status::Open as u8
        {
            // Best effort, and only on a frame boundary: a peer that reads nothing hears the connection end.
            let mut tx = lock(&self.tx);
            if self.write_control(&mut tx).is_ok() && tx.sent == tx.wire.len() {
                let _ = write_greeting(self.control.socket(), &greeting(Kind::Close, &goodbye));
            }
        }
        let bulk = std::mem::replace(&mut lock(&self.bulk).link, BulkLink::None);
        if let BulkLink::Connecting(link, _) | BulkLink::Open(link) = bulk {
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
        self.driver.linger(&self.control);
        if let Some(peer) = self.peer.get() {
            peer.on_closed(self, &cause);
        }
    }

    /// The peer's id for messages: its own word, else what was dialed.
    pub fn peer_id(&self) -> Option<&WorkerId> {
        self.remote.get().map(|info| &info.id)
    }
}

pub(crate) fn lost(error: Errno) -> CloseCause {
    CloseCause::PeerLost { source: Some(Arc::new(io::Error::from(error))) }
}

/// The outcome of a connect that made the socket writable.
fn finish_connect(socket: &Socket, address: Option<SocketAddr>) -> Result<(), CloseCause> {
    let outcome = match socket.take_error() {
        Ok(None) => tcp::prepare(socket),
        Ok(Some(error)) | Err(error) => Err(error),
    };
    outcome.map_err(|source| match address {
        Some(address) => CloseCause::Connect { address, source: Arc::new(source) },
        None => CloseCause::PeerLost { source: Some(Arc::new(source)) },
    })
}

/// A frame whose metadata is `value`: hello, welcome or goodbye.
pub(crate) fn greeting<T: serde::Serialize>(kind: Kind, value: &T) -> Vec<u8> {
    let metadata = match postcard::to_stdvec(value) {
        Ok(metadata) => metadata,
        Err(error) => unreachable!("plain structs always encode: {error}"),
    };
    let mut wire = Vec::new();
    match encode_frame(&Outbound::new(kind, &metadata), 0, &mut 0, &mut wire) {
        Ok(_) => wire,
        Err(error) => unreachable!("a frame without tensors encodes: {error}"),
    }
}

pub(crate) fn read_greeting<'a, T: serde::Deserialize<'a>>(
    what: &'static str,
    metadata: &'a [u8],
) -> Result<T, ProtocolError> {
    postcard::from_bytes(metadata).map_err(|error| ProtocolError::Malformed { what, message: error.to_string() })
}

/// Writes a greeting whole: a few hundred bytes into an empty socket buffer always fit.
pub(crate) fn write_greeting(socket: &Socket, bytes: &[u8]) -> Result<(), CloseCause> {
    match tcp::send(socket, &[IoSlice::new(bytes)]).map_err(lost)? {
        Progress::Bytes(len) if len == bytes.len() => Ok(()),
        _ => Err(CloseCause::PeerLost { source: None }),
    }
}
