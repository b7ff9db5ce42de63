//! The bulk connection of an endpoint: chunks of large payloads, out and in.
//!
//! The dialer of the control connection opens it, at the first large payload of either side. Its reader and writer are the
//! driver's leader; a sender writes what fits at once.
//! Invariant R1: transfers take turns, a chunk each.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use farcall_device::Tensor;
use rustix::event::epoll::EventFlags;

use super::encode::{Outbound, encode_frame, greeting, payload, read_greeting, write_greeting};
use super::{Endpoint, Status, Tx, finish_connect, lock, lost};
use crate::address::{Goodbye, Role};
use crate::auth::Dialer;
use crate::driver::{Registration, Turn};
use crate::frame::{HEADER_BYTES, Header, Kind};
use crate::planted::{self, Bug};
use crate::receive::Chunk;
use crate::socket::Socket;
use crate::tcp::Progress;
use crate::{CloseCause, ProtocolError, TransferError};

/// Bulk bytes moved for one endpoint before the driver looks at the others.
const BULK_TURN_BYTES: usize = 4 << 20;
/// What a chunk counts for beside its bytes, so that many tiny ones are a turn, too.
const CHUNK_COST_BYTES: usize = 4 << 10;
/// How long a bulk connection may hold a chunk whose frame has not come on the control connection.
pub(super) const STALL_MAX: Duration = Duration::from_secs(10);
/// How long the control connection may go on without the bulk connection.
pub(super) const ENDED_MAX: Duration = Duration::from_millis(500);

pub(super) struct Outgoing {
    transfer: u64,
    tensor: Tensor,
    offset: usize,
}

/// A chunk on its way out: its header, then its payload.
pub(super) struct ChunkOut {
    header: Header,
    sent: usize,
}

pub(super) enum BulkLink {
    None,
    /// Asked for then: the dialer of the control connection is to open it.
    Requested(Instant),
    Connecting(Registration, Instant),
    /// Connected; the acceptor's challenge is to come. None of its bytes beyond the challenge are read before the proof.
    Proving(Registration, Instant, Vec<u8>),
    Open(Registration),
    /// It ended then, or did not come about; the control connection is to say why.
    Ended(Instant, CloseCause),
}

pub(super) struct Bulk {
    pub(super) link: BulkLink,
    pub(super) key: u128,
    /// The dialer's side of the proof of the job's key, until it is given.
    pub(super) proof: Option<Dialer>,
    /// Bytes that go before any chunk: the dialer's hello, or its proof.
    pub(super) prefix: Vec<u8>,
    pub(super) queue: VecDeque<Outgoing>,
    pub(super) current: Option<(ChunkOut, Outgoing)>,
}

pub(super) struct BulkRx {
    pub(super) head: [u8; HEADER_BYTES],
    pub(super) head_len: usize,
    pub(super) chunk: Option<Chunk>,
    /// A header whose frame has not come on the control connection yet, and since when.
    pub(super) stalled: Option<(Header, Instant)>,
}

impl Endpoint {
    pub(super) fn queue_bulk(self: &Arc<Self>, tx: &mut Tx, tensors: Vec<(u64, Tensor)>) -> Result<(), CloseCause> {
        let mut bulk = lock(&self.bulk);
        bulk.queue.extend(tensors.into_iter().map(|(transfer, tensor)| Outgoing { transfer, tensor, offset: 0 }));
        if !matches!(bulk.link, BulkLink::None) {
            return Ok(());
        }
        if self.dialed.is_none() {
            let now = self.driver.now();
            bulk.link = BulkLink::Requested(now);
            self.driver.schedule(now + self.driver.config().connect_timeout);
            let request = Outbound::new(Kind::OpenBulk, &[]);
            if let Err(error) = encode_frame(&request, 0, &mut tx.next_transfer, &mut tx.wire, |_, _| None) {
                unreachable!("a frame without tensors encodes: {error}");
            }
        } else if self.status() == Status::Open {
            return self.dial_bulk(&mut bulk);
        }
        // Else the welcome is still to come, and brings the key.
        Ok(())
    }

    /// Opens the bulk connection. After a failure the caller closes the endpoint, once it has let go of its locks.
    pub(super) fn dial_bulk(self: &Arc<Self>, bulk: &mut Bulk) -> Result<(), CloseCause> {
        let Some((target, _)) = &self.dialed else { return Ok(()) };
        let (hello, proof) = self.hello(Role::Bulk { key: bulk.key })?;
        (bulk.prefix, bulk.proof) = (greeting(Kind::Hello, &hello), proof);
        if self.cause.get().is_some() {
            return Ok(()); // closed meanwhile, and nobody would close this connection
        }
        let (socket, route) = self.driver.connect(target).map_err(|error| match error {
            TransferError::Connect { route, source } => CloseCause::Connect { route, source },
            error => CloseCause::PeerLost { source: Some(Arc::new(io::Error::other(error))) },
        })?;
        let registration = self.driver.register(socket);
        if let Err(error) = self.driver.add_bulk(self, &registration, EventFlags::OUT) {
            return Err(CloseCause::Connect { route, source: Arc::new(io::Error::other(error)) });
        }
        let now = self.driver.now();
        bulk.link = BulkLink::Connecting(registration, now);
        self.driver.schedule(now + self.driver.config().connect_timeout);
        Ok(())
    }

    /// The acceptor's side: a dialer's connection proved to be this endpoint's bulk connection.
    pub(crate) fn attach_bulk(self: &Arc<Self>, socket: Socket) -> Result<(), TransferError> {
        let registration = self.driver.register(socket);
        let mut bulk = lock(&self.bulk);
        if !matches!(bulk.link, BulkLink::None | BulkLink::Requested(_)) || self.cause.get().is_some() {
            // One bulk connection per endpoint; the second one's socket is dropped here.
            crate::limited!(warn, peer = ?self.peer_id(), "refused a second bulk connection");
            return Ok(());
        }
        self.driver.add_bulk(self, &registration, EventFlags::IN)?;
        bulk.link = BulkLink::Open(registration);
        drop(bulk);
        self.flush_bulk();
        Ok(())
    }

    pub(super) fn flush_bulk(self: &Arc<Self>) {
        let mut bulk = lock(&self.bulk);
        if bulk.queue.is_empty() && bulk.current.is_none() && bulk.prefix.is_empty() {
            return;
        }
        if let Err(cause) = self.write_bulk(&mut bulk) {
            drop(bulk);
            self.on_bulk_failure(cause);
        }
    }

    /// The bulk connection has failed. A peer that closes, or dies, ends both connections, and the news of this one may be
    /// first: then the other brings the reason.
    fn on_bulk_failure(self: &Arc<Self>, cause: CloseCause) {
        let may_wait =
            matches!(cause, CloseCause::PeerLost { .. } | CloseCause::Connect { .. } | CloseCause::Refused { .. });
        if !may_wait || planted::has(Bug::BulkEndsAll) {
            return self.close(cause);
        }
        let now = self.driver.now();
        let mut bulk = lock(&self.bulk);
        if let BulkLink::Connecting(link, _) | BulkLink::Proving(link, ..) | BulkLink::Open(link) = &bulk.link {
            self.driver.remove(link);
            bulk.link = BulkLink::Ended(now, cause);
            self.driver.schedule(now + ENDED_MAX);
        }
    }

    fn write_bulk(&self, bulk: &mut Bulk) -> Result<(), CloseCause> {
        let Bulk { link: BulkLink::Open(link), prefix, queue, current, .. } = bulk else { return Ok(()) };
        let chunk_bytes = self.driver.config().limits.chunk_bytes_max as usize;
        let mut budget = BULK_TURN_BYTES;
        loop {
            if !prefix.is_empty() {
                let Progress::Bytes(len) = link.socket().send(&[IoSlice::new(prefix)]).map_err(lost)? else {
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
            let Progress::Bytes(len) = link.socket().send(&parts).map_err(lost)? else { break };
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
            self.on_bulk_failure(cause);
        }
    }

    fn bulk_event(self: &Arc<Self>, flags: EventFlags, turn: &mut Turn) -> Result<(), CloseCause> {
        let mut bulk = lock(&self.bulk);
        if let BulkLink::Connecting(link, since) = &bulk.link {
            let (link, since) = (link.clone(), *since);
            finish_connect(link.socket(), self.route())?;
            if bulk.proof.is_some() {
                write_greeting(link.socket(), &std::mem::take(&mut bulk.prefix))?;
                bulk.link = BulkLink::Proving(link.clone(), since, Vec::new());
                link.set(&self.driver, EventFlags::IN);
            } else {
                bulk.link = BulkLink::Open(link.clone());
                link.want(&self.driver, EventFlags::IN, true);
            }
        }
        if matches!(bulk.link, BulkLink::Proving(..)) {
            self.prove_bulk(&mut bulk)?;
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

    /// Reads the acceptor's challenge; once it is there, answers it and opens the connection.
    fn prove_bulk(&self, bulk: &mut Bulk) -> Result<(), CloseCause> {
        let Bulk { link: BulkLink::Proving(link, _, bytes), proof, .. } = bulk else { return Ok(()) };
        let limits = self.driver.config().limits.of_greeting();
        loop {
            let missing = match bytes.first_chunk() {
                None => HEADER_BYTES - bytes.len(),
                Some(head) => {
                    let (header, kind) = Header::parse(head, &limits)?;
                    if kind != Kind::Challenge && kind != Kind::Close {
                        return Err(ProtocolError::Unexpected { kind, expected: "a challenge" }.into());
                    }
                    match HEADER_BYTES + header.body_len() - bytes.len() {
                        0 if kind == Kind::Close => {
                            let goodbye: Goodbye = read_greeting("goodbye", &bytes[HEADER_BYTES..])?;
                            return Err(goodbye.cause(|| self.peer_text()));
                        }
                        0 => break,
                        missing => missing,
                    }
                }
            };
            let start = bytes.len();
            bytes.resize(start + missing, 0);
            let read = link.socket().recv_into(&mut bytes[start..]).map_err(lost)?;
            bytes.truncate(start + if let Progress::Bytes(len) = read { len } else { 0 });
            match read {
                Progress::Bytes(_) => {}
                Progress::WouldBlock => return Ok(()),
                Progress::Ended => return Err(CloseCause::PeerLost { source: None }),
            }
        }
        let Some(mut proof) = proof.take() else { unreachable!("taken with the link's next state") };
        bulk.prefix = greeting(Kind::Proof, &proof.on_challenge(&bytes[HEADER_BYTES..])?);
        bulk.link = BulkLink::Open(link.clone());
        self.write_bulk(bulk)
    }

    fn read_bulk(self: &Arc<Self>, link: &Registration, rx: &mut BulkRx, turn: &mut Turn) -> Result<(), CloseCause> {
        let mut budget = BULK_TURN_BYTES;
        while budget > 0 {
            if let Some(chunk) = &mut rx.chunk {
                let target = chunk.target()?;
                match link.socket().recv_into(target).map_err(lost)? {
                    Progress::Bytes(len) => {
                        self.hear();
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
                match link.socket().recv_into(&mut rx.head[rx.head_len..]).map_err(lost)? {
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
                        let now = self.driver.now();
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
    pub(super) fn park(&self, partial: crate::receive::Partial) -> Result<(), CloseCause> {
        let mut transfers = lock(&self.transfers);
        // Its requests, and its answers to ours.
        let max = 2 * self.driver.config().limits.requests_max as u64;
        crate::frame::limit("frames that wait for bulk payload", transfers.len() as u64 + 1, max)?;
        transfers.park(partial)?;
        let stalled = self.bulk_stalled.swap(false, Ordering::Relaxed);
        drop(transfers);
        if stalled && let BulkLink::Open(link) = &lock(&self.bulk).link {
            link.want(&self.driver, EventFlags::IN, true);
        }
        Ok(())
    }
}
