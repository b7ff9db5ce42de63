//! The sending side of an endpoint: frames into `tx`, and from there to the ring or the socket.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use farcall_device::{DeviceError, Slab, Storage, Tensor, is_forked_child};
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;

use super::encode::{Outbound, encode_frame};
use super::landing::{self, Landings};
use super::{Endpoint, Status, lock, lost};
use crate::descriptor::Mode;
use crate::driver::Turn;
use crate::frame::{HEADER_BYTES, Header, Kind};
use crate::shm::{self, RingWriter};
use crate::tcp::Progress;
use crate::{CloseCause, TransferError, WorkerId};

/// So many bytes need not wait for others.
const GATHERED_BYTES_MAX: usize = 16 << 10;
/// Room for outgoing frames that an endpoint keeps: two whole ones, so that steady traffic allocates nothing.
const WIRE_KEPT_BYTES: usize = 160 << 10;

/// When a frame's bytes are handed to the kernel, or its ring published.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Leave {
    Now,
    /// When what else the thread does is done.
    WithTurn,
    Gathered,
}

/// What is on its way out.
pub(super) struct Tx {
    /// Encoded frames; `sent` bytes of them are with the kernel.
    pub(super) wire: Vec<u8>,
    pub(super) sent: usize,
    /// Bytes of all frames so far that are with the kernel.
    pub(super) taken: u64,
    /// Where, counted like `taken`, the answers end that are not all with the kernel.
    pub(super) answers: VecDeque<u64>,
    pub(super) next_transfer: u64,
    /// Interned functions announced on this connection, by id.
    pub(super) announced: Vec<bool>,
    /// The ring, and from where on, counted like `taken`, frames go by it.
    pub(super) ring: Option<(u64, RingWriter)>,
    /// What is written now need not wake its reader: more is to come soon that does.
    pub(super) whispers: bool,
    /// The driver waits until the socket takes more.
    pub(super) wants_out: bool,
    /// Slabs to pass, and where, counted like `taken`, the frames start that their descriptors go with.
    pub(super) passing: VecDeque<(u64, Arc<Slab>)>,
}

impl Tx {
    pub(super) fn new() -> Self {
        Self {
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
        }
    }
}

impl Endpoint {
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
        let is_first = tx.sent == tx.wire.len() && tx.ring.as_ref().is_some_and(|(_, ring)| !ring.owes_wake());
        self.return_leases(&mut tx.wire);
        if let Some(name) = announce.filter(|_| !is_announced) {
            announce_function(&mut tx, outbound.function, name)?;
        }
        let bulk = self.encode(&mut tx, outbound, &mut landings)?;
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

    /// Appends the frame, behind those that pass the slabs it needs; gives what goes by the bulk connection.
    fn encode(
        &self,
        tx: &mut Tx,
        outbound: &Outbound<'_>,
        landings: &mut Landings,
    ) -> Result<Vec<(u64, Tensor)>, DeviceError> {
        let config = self.driver.config();
        let Tx { wire, sent, taken, next_transfer, passing, .. } = tx;
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
                return Err(error);
            }
        };
        for (index, slab) in passed.into_iter().enumerate() {
            let header = Header { call: slab.id(), offset: slab.len() as u64, ..Header::new(Kind::Slab) };
            // Before the frame that needs it; once for each slab.
            let at = before + index * HEADER_BYTES;
            wire.splice(at..at, *header.as_bytes());
            passing.push_back((*taken + (at - *sent) as u64, slab));
        }
        Ok(bulk)
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
    pub(super) fn return_leases(&self, wire: &mut Vec<u8>) {
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

    pub(super) fn write_control(&self, tx: &mut Tx) -> Result<(), CloseCause> {
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
}

/// The peer learns the number of a function.
fn announce_function(tx: &mut Tx, function: u32, name: &[u8]) -> Result<(), DeviceError> {
    let announcement = Outbound { function, ..Outbound::new(Kind::Function, name) };
    encode_frame(&announcement, 0, &mut tx.next_transfer, &mut tx.wire, |_, _| None)?;
    let id = function as usize;
    if tx.announced.len() <= id {
        tx.announced.resize(id + 1, false);
    }
    tx.announced[id] = true;
    Ok(())
}

/// A connection that never quite empties must not grow with its traffic.
fn trim(tx: &mut Tx) {
    if tx.sent > WIRE_KEPT_BYTES && tx.sent > tx.wire.len() / 2 {
        tx.wire.drain(..tx.sent);
        tx.sent = 0;
    }
}
