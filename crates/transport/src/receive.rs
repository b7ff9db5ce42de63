//! Reassembles frames from the bytes of a connection; knows no socket.
//!
//! [`Receiver`] takes the control connection's bytes as they come. Tensors up to the inline limit land in recycled
//! storages as they arrive; larger ones make the frame wait in [`Transfers`] until their chunks are in. Those in slabs of the
//! peer are there already. A reply's may land in memory of its caller's ([`Placer`]).
//! Invariant LIMITS: header, then descriptors are checked before a storage is allocated.
//! Invariant R1: a frame that waits for its bulk payload delays no later frame.

use std::cell::Cell;
use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use farcall_device::codec::{spare_buffer, spare_tensors};
use farcall_device::{Device, Layout, Runtime, Storage, StorageMut, Tensor};

use crate::descriptor::{Descriptor, Mode};
use crate::digest::{DigestList, Digests};
use crate::driver::Peer;
use crate::frame::{HEADER_BYTES, Header, Kind, WANTS_DIGESTS};
use crate::planted::{self, Bug};
use crate::shm::Borrower;
use crate::{CloseCause, Limits, ProtocolError};

/// Descriptors that may have come before their frames. One is received at a time, with the first byte of its frame, but a
/// frame may end in bytes that come later.
const DESCRIPTORS_MAX: u64 = 4;

/// A whole message: its tensors are complete in this process's memory.
#[derive(Debug)]
pub struct Frame {
    /// What it is for.
    pub kind: Kind,
    /// The call it belongs to.
    pub call: u64,
    /// The interned function, for requests and announcements.
    pub function: u32,
    /// Microseconds the caller still waits, 0 for no limit.
    pub deadline_us: u64,
    /// The encoded value without its tensors.
    pub metadata: Vec<u8>,
    /// The tensors, in the order of their indices in the metadata.
    pub tensors: Vec<Tensor>,
    /// Of a request: what its tensors count for among those that are not answered; see [`Unanswered`].
    pub unanswered: Unanswered,
    /// The device that each is for, as the sender says; empty if all are for the host. They lie on the host still.
    pub devices: Vec<Device>,
    /// What the tensors are to be compared with before the value is given.
    pub digests: Digests,
}

/// A frame of a call without tensors, in the bytes as they came: nothing of it was copied or allocated.
#[derive(Clone, Copy, Debug)]
pub struct Small<'a> {
    /// A request, its answer, or its cancellation.
    pub kind: Kind,
    /// The call it belongs to.
    pub call: u64,
    /// The interned function, for requests.
    pub function: u32,
    /// Microseconds the caller still waits, 0 for no limit.
    pub deadline_us: u64,
    /// The answer's tensors are to have digests.
    pub wants_digests: bool,
    /// The encoded value.
    pub metadata: &'a [u8],
}

impl Small<'_> {
    /// The same, owned.
    pub fn to_frame(&self) -> Frame {
        Frame {
            kind: self.kind,
            call: self.call,
            function: self.function,
            deadline_us: self.deadline_us,
            metadata: self.metadata.to_vec(),
            tensors: Vec::new(),
            unanswered: Unanswered::default(),
            devices: Vec::new(),
            digests: Digests { wanted: self.wants_digests, tensors: Vec::new() },
        }
    }
}

/// Tensor bytes of one peer's requests that have come, or are coming, and are not answered (LIMITS).
#[derive(Debug, Default)]
pub(crate) struct Inflow(AtomicU64);

/// A request's share of the peer's unanswered bytes. Dropped when the request is answered, before the answer leaves.
#[derive(Debug, Default)]
pub struct Unanswered {
    bytes: u64,
    inflow: Option<Arc<Inflow>>,
}

impl Unanswered {
    /// Bytes of the request's tensors.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Unanswered {
    fn drop(&mut self) {
        if let Some(inflow) = &self.inflow {
            inflow.0.fetch_sub(self.bytes, Ordering::AcqRel);
        }
    }
}

enum Place {
    Inline(StorageMut),
    Bulk(u64, StorageMut),
    Waiting,
    /// In a slab, under this lease, once it has landed.
    Landing(u64, Storage),
    Complete(Storage),
}

struct Slot {
    layout: Layout,
    device: Device,
    place: Place,
    digests: Option<DigestList>,
}

thread_local! {
    /// Of the frame that this thread finished last.
    static SPARE_SLOTS: Cell<Vec<Slot>> = const { Cell::new(Vec::new()) };
}

/// What of it is kept.
const SPARE_SLOTS_MAX: usize = 16;

/// A frame some of whose payload is still on its way.
pub(crate) struct Partial {
    frame: Frame,
    slots: Vec<Slot>,
    missing: usize,
}

impl Partial {
    fn finish(mut self) -> Result<Frame, CloseCause> {
        if self.slots.iter().any(|slot| slot.device != Device::HOST) {
            self.frame.devices.extend(self.slots.iter().map(|slot| slot.device));
        }
        for (index, slot) in self.slots.drain(..).enumerate() {
            let Place::Complete(storage) = slot.place else { unreachable!("finished with a payload missing") };
            let tensor = Tensor::from_storage(storage, slot.layout)?;
            if let Some(digests) = slot.digests {
                self.frame.digests.tensors.push((index, tensor.clone(), digests));
            }
            self.frame.tensors.push(tensor);
        }
        if self.slots.capacity() <= SPARE_SLOTS_MAX {
            let _ = SPARE_SLOTS.try_with(|spare| spare.set(self.slots));
        }
        Ok(self.frame)
    }
}

/// What the bytes fed so far amount to.
pub(crate) enum Received {
    Frame(Frame),
    /// Its descriptors are known, its bulk payload is not here yet, or has not landed.
    Waiting(Partial),
    /// So many bytes of the tensor under that lease are in their slab.
    Landed {
        lease: u64,
        bytes: u64,
    },
}

enum State {
    Head,
    Body { header: Header, kind: Kind, body: Vec<u8> },
    Payload { partial: Partial, slot: usize, filled: usize },
}

/// The control connection's parser.
pub(crate) struct Receiver {
    limits: Limits,
    runtime: Runtime,
    head: [u8; HEADER_BYTES],
    head_len: usize,
    state: State,
    inflow: Arc<Inflow>,
    /// The peer's slabs, if it passes any.
    borrower: Option<Borrower>,
    /// Those that came with bytes so far, and whose frames did not.
    descriptors: VecDeque<OwnedFd>,
    /// Where others come from, of frames that do not come by the socket.
    more_descriptors: Option<DescriptorSource>,
    /// Who may have memory for the tensors of replies.
    owner: Option<Weak<dyn Peer>>,
    /// Frames may have digests.
    digests: bool,
}

/// A tensor of a reply whose descriptor has come.
#[derive(Clone, Debug)]
pub struct Arriving {
    /// Its layout.
    pub layout: Layout,
    /// Its bytes are still to come; else they lie in a slab.
    pub travels: bool,
}

/// Memory that a caller has for the tensors of a reply.
pub trait Placer: Send + Sync {
    /// A place for each tensor: host memory of exactly the bytes that travel, or `None` for recycled memory. All that is wrong
    /// with the tensors is told later, with the frame.
    fn place(&self, tensors: &[Arriving]) -> Vec<Option<StorageMut>>;
}

/// Gives the next descriptor that the peer has passed.
pub(crate) type DescriptorSource = Box<dyn FnMut() -> Option<OwnedFd> + Send>;

impl Receiver {
    pub(crate) fn new(limits: Limits, runtime: Runtime) -> Self {
        let inflow = Arc::default();
        let (head, state) = ([0; HEADER_BYTES], State::Head);
        let descriptors = VecDeque::new();
        Self {
            limits,
            runtime,
            head,
            head_len: 0,
            state,
            inflow,
            borrower: None,
            descriptors,
            owner: None,
            digests: false,
            more_descriptors: None,
        }
    }

    /// From the next frame on, tensors may come with digests.
    pub(crate) fn take_digests(&mut self) {
        self.digests = true;
    }

    /// From the next frame on, `owner` is asked for memory for replies.
    pub(crate) fn place_by(&mut self, owner: Weak<dyn Peer>) {
        self.owner = Some(owner);
    }

    /// The caller's memory for the tensors of a reply, if it has any; `table` is checked before anybody is asked.
    fn places(&self, header: &Header, mut table: &[u8]) -> Result<Vec<Option<StorageMut>>, ProtocolError> {
        let owner = self.owner.as_ref().filter(|_| header.tensors > 0).and_then(Weak::upgrade);
        let Some(placer) = owner.and_then(|owner| owner.placer(header.call)) else { return Ok(Vec::new()) };
        let mut arriving = Vec::with_capacity(header.tensors as usize);
        for _ in 0..header.tensors {
            let Descriptor { layout, mode, .. } = Descriptor::read(&mut table, &self.limits)?;
            arriving
                .push(Arriving { layout, travels: !matches!(mode, Mode::Slab(_) | Mode::Landing(_) | Mode::Back(_)) });
        }
        Ok(placer.place(&arriving))
    }

    /// Tensor bytes of the peer's requests that are not answered.
    pub(crate) fn unanswered_bytes(&self) -> u64 {
        self.inflow.0.load(Ordering::Acquire)
    }

    /// From the next frame on.
    pub(crate) fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// From the next frame on, tensors may lie in the peer's slabs.
    pub(crate) fn borrow_from(&mut self, borrower: Borrower) {
        self.borrower = Some(borrower);
    }

    /// A descriptor came with the bytes that are fed next.
    pub(crate) fn on_descriptor(&mut self, descriptor: OwnedFd) -> Result<(), ProtocolError> {
        crate::frame::limit("descriptors without a frame", self.descriptors.len() as u64 + 1, DESCRIPTORS_MAX)?;
        self.descriptors.push_back(descriptor);
        Ok(())
    }

    /// From the next frame on, descriptors do not come with the bytes.
    pub(crate) fn take_descriptors_from(&mut self, source: DescriptorSource) {
        self.more_descriptors = Some(source);
    }

    /// The descriptor that came with the frame at hand.
    pub(crate) fn descriptor(&mut self) -> Option<OwnedFd> {
        self.descriptors.pop_front().or_else(|| self.more_descriptors.as_mut()?())
    }

    /// The frames that are this side's alone.
    fn on_slab_frame(&mut self, header: &Header, kind: Kind) -> Result<(), CloseCause> {
        let descriptor = if kind == Kind::Slab && self.borrower.is_some() { self.descriptor() } else { None };
        match (kind, &mut self.borrower) {
            (Kind::Slab, Some(borrower)) => borrower.on_slab(header.call, header.offset, descriptor),
            (Kind::Retire, Some(borrower)) => Ok(borrower.on_retire(header.call)?),
            (Kind::Slab | Kind::Retire, None) => {
                Err(ProtocolError::Unexpected { kind, expected: "no slab on this connection" }.into())
            }
            _ => Ok(()),
        }
    }

    /// The frame at the start of `input`, if it is a call's, has no tensors and is there as a whole. Else nothing is consumed, and
    /// [`Self::feed`] reads on: what it gives for the same bytes is the same.
    #[inline]
    pub(crate) fn small<'a>(&self, input: &mut &'a [u8]) -> Option<Small<'a>> {
        if self.head_len > 0 || !matches!(self.state, State::Head) {
            return None;
        }
        let (head, rest) = input.split_first_chunk::<HEADER_BYTES>()?;
        let (header, kind) = Header::parse_small(head, &self.limits, self.digests)?;
        let (metadata, rest) = rest.split_at_checked(header.meta_len as usize)?;
        *input = rest;
        let Header { call, function, deadline_us, flags, .. } = header;
        Some(Small { kind, call, function, deadline_us, wants_digests: flags & WANTS_DIGESTS != 0, metadata })
    }

    /// Consumes bytes of `input` up to the end of one frame, or all of them.
    pub(crate) fn feed(&mut self, input: &mut &[u8]) -> Result<Option<Received>, CloseCause> {
        loop {
            match &mut self.state {
                State::Head => {
                    if !fill(&mut self.head, &mut self.head_len, input) {
                        return Ok(None);
                    }
                    self.head_len = 0;
                    let (header, kind) = Header::parse(&self.head, &self.limits)?;
                    if !self.digests {
                        header.expect_no_digests(kind)?;
                    }
                    if kind == Kind::Chunk {
                        return Err(ProtocolError::Unexpected { kind, expected: "a control frame" }.into());
                    }
                    if kind == Kind::Landed {
                        header.expect_alone(kind)?;
                        return Ok(Some(Received::Landed { lease: header.call, bytes: header.offset }));
                    }
                    if let Some((body, rest)) = input.split_at_checked(header.body_len()) {
                        *input = rest;
                        let partial = self.open(&header, kind, body)?;
                        self.state = State::Payload { partial, slot: 0, filled: 0 };
                    } else {
                        // Grows with what arrives, never with what is announced.
                        self.state = State::Body { header, kind, body: Vec::new() };
                    }
                }
                State::Body { header, kind, body } => {
                    let take = (header.body_len() - body.len()).min(input.len());
                    body.extend_from_slice(&input[..take]);
                    *input = &input[take..];
                    if body.len() < header.body_len() {
                        return Ok(None);
                    }
                    let (header, kind, body) = (*header, *kind, std::mem::take(body));
                    let partial = self.open(&header, kind, &body)?;
                    self.state = State::Payload { partial, slot: 0, filled: 0 };
                }
                State::Payload { partial, slot, filled } => {
                    if !fill_slots(partial, slot, filled, input)? {
                        return Ok(None);
                    }
                    let State::Payload { partial, .. } = std::mem::replace(&mut self.state, State::Head) else {
                        unreachable!("matched above")
                    };
                    return Ok(Some(if partial.missing == 0 {
                        Received::Frame(partial.finish()?)
                    } else {
                        Received::Waiting(partial)
                    }));
                }
            }
        }
    }

    /// Bytes known to be missing of the frame in progress; 0 between frames.
    pub(crate) fn missing_bytes(&self) -> u64 {
        match &self.state {
            State::Head if self.head_len == 0 => 0,
            State::Head => (HEADER_BYTES - self.head_len) as u64,
            State::Body { header, body, .. } => (header.body_len() - body.len()) as u64 + header.payload_len,
            State::Payload { partial, slot, filled } => {
                let rest: usize = partial.slots[*slot..].iter().map(|slot| inline_len(&slot.place)).sum();
                (rest - filled) as u64
            }
        }
    }

    /// Reads descriptors and metadata, and makes room for the tensors.
    fn open(&mut self, header: &Header, kind: Kind, body: &[u8]) -> Result<Partial, CloseCause> {
        self.on_slab_frame(header, kind)?;
        let (_extensions, body) = body.split_at(header.ext_len as usize);
        let (mut table, metadata) = body.split_at(header.table_len as usize);
        // A thread that ends has none.
        let mut slots = SPARE_SLOTS.try_with(Cell::take).unwrap_or_default();
        slots.clear();
        slots.reserve(header.tensors as usize);
        let mut missing = 0;
        let mut inline_bytes = 0;
        let mut frame_bytes = 0_u64;
        // Only answers make it less meanwhile.
        let others = if kind == Kind::Request { self.inflow.0.load(Ordering::Acquire) } else { 0 };
        let mut places = if kind == Kind::Reply { self.places(header, table)? } else { Vec::new() };
        for index in 0..header.tensors as usize {
            if !self.digests && Descriptor::has_digests(table) {
                return Err(ProtocolError::ReservedDescriptorBits.into());
            }
            let Descriptor { mut layout, device, mode, len_bytes, digests } =
                Descriptor::read(&mut table, &self.limits)?;
            frame_bytes = frame_bytes.saturating_add(len_bytes);
            crate::frame::limit("tensor bytes in one frame", frame_bytes, self.limits.tensor_bytes_max)?;
            if others > 0 {
                let bytes = others.saturating_add(frame_bytes);
                crate::frame::limit("tensor bytes in unanswered requests", bytes, self.limits.request_bytes_max)?;
            }
            if mode == Mode::Inline {
                inline_bytes += len_bytes;
                // Before the allocation: an inline tensor is never larger than the payload that carries it.
                crate::frame::limit("inline payload bytes", inline_bytes, header.payload_len)?;
            }
            let place = places.get_mut(index).and_then(Option::take).filter(|place| place.len() as u64 == len_bytes);
            let alloc = || place.map_or_else(|| self.runtime.alloc_host(len_bytes as usize), Ok);
            let place = match mode {
                Mode::Inline => Place::Inline(alloc()?),
                Mode::Bulk(transfer) => {
                    missing += 1;
                    Place::Bulk(transfer, alloc()?)
                }
                Mode::Slab(place) => {
                    let borrower = self.borrower.as_ref().ok_or(ProtocolError::Mode { found: 2 })?;
                    Place::Complete(borrower.borrow(place, len_bytes)?)
                }
                Mode::Landing(place) => {
                    missing += 1;
                    let borrower = self.borrower.as_ref().ok_or(ProtocolError::Mode { found: 4 })?;
                    Place::Landing(place.lease, borrower.borrow(place, len_bytes)?)
                }
                Mode::Back(lent) => {
                    let borrower = self.borrower.as_ref().ok_or(ProtocolError::Mode { found: 3 })?;
                    let storage;
                    (storage, layout) = borrower.take_back(lent, &layout, len_bytes)?;
                    Place::Complete(storage)
                }
            };
            slots.push(Slot { layout, device, place, digests });
        }
        accounted("descriptors", u64::from(header.table_len), (header.table_len as usize - table.len()) as u64)?;
        accounted("inline payload", header.payload_len, inline_bytes)?;
        let mut unanswered = Unanswered::default();
        if kind == Kind::Request && frame_bytes > 0 {
            self.inflow.0.fetch_add(frame_bytes, Ordering::AcqRel);
            unanswered = Unanswered { bytes: frame_bytes, inflow: Some(Arc::clone(&self.inflow)) };
        }
        let (mut copy, mut tensors) = (spare_buffer(), spare_tensors());
        copy.extend_from_slice(metadata);
        tensors.reserve(slots.len());
        let frame = Frame {
            kind,
            call: header.call,
            function: header.function,
            deadline_us: header.deadline_us,
            metadata: copy,
            unanswered,
            tensors,
            devices: Vec::new(),
            digests: Digests { wanted: header.flags & WANTS_DIGESTS != 0, tensors: Vec::new() },
        };
        Ok(Partial { frame, slots, missing })
    }
}

fn accounted(what: &'static str, found: u64, expected: u64) -> Result<(), ProtocolError> {
    if found == expected { Ok(()) } else { Err(ProtocolError::Accounting { what, found, expected }) }
}

fn inline_len(place: &Place) -> usize {
    if let Place::Inline(storage) = place { storage.len() } else { 0 }
}

/// Copies what it can of `input` behind `*len` bytes of `target`; true once `target` is full.
fn fill(target: &mut [u8], len: &mut usize, input: &mut &[u8]) -> bool {
    let take = (target.len() - *len).min(input.len());
    target[*len..*len + take].copy_from_slice(&input[..take]);
    *len += take;
    *input = &input[take..];
    *len == target.len()
}

/// Fills the inline storages in order; true once all are complete.
fn fill_slots(
    partial: &mut Partial,
    slot: &mut usize,
    filled: &mut usize,
    input: &mut &[u8],
) -> Result<bool, CloseCause> {
    while let Some(current) = partial.slots.get_mut(*slot) {
        if let Place::Inline(storage) = &mut current.place {
            if !fill(storage.as_bytes_mut()?, filled, input) {
                return Ok(false);
            }
            let Place::Inline(storage) = std::mem::replace(&mut current.place, Place::Waiting) else {
                unreachable!("matched above")
            };
            current.place = Place::Complete(storage.freeze_ready());
        }
        *slot += 1;
        *filled = 0;
    }
    Ok(true)
}

struct Transfer {
    partial: u64,
    slot: usize,
    /// Out while a chunk is being received into it.
    storage: Option<StorageMut>,
    filled: usize,
}

/// One chunk being received: the storage is owned here until the chunk is complete.
pub(crate) struct Chunk {
    transfer: u64,
    storage: StorageMut,
    at: usize,
    end: usize,
}

impl Chunk {
    /// Where the chunk's next bytes go; empty once it is complete.
    pub(crate) fn target(&mut self) -> Result<&mut [u8], CloseCause> {
        let (at, end) = (self.at, self.end);
        Ok(&mut self.storage.as_bytes_mut()?[at..end])
    }

    /// `len` more bytes arrived.
    pub(crate) fn advance(&mut self, len: usize) {
        self.at += len;
    }
}

/// A tensor in a slab that is being written there.
struct Landing {
    partial: u64,
    slot: usize,
    storage: Storage,
    landed: u64,
}

/// Frames that wait for bulk payload, and the payload's places; and those whose tensors have not landed.
#[derive(Default)]
pub(crate) struct Transfers {
    partials: HashMap<u64, Partial>,
    transfers: HashMap<u64, Transfer>,
    landings: HashMap<u64, Landing>,
    next_partial: u64,
}

impl Transfers {
    /// No frame waits for bulk payload. What lands is told by the control connection.
    pub(crate) fn is_bulk_empty(&self) -> bool {
        self.transfers.is_empty()
    }

    /// Frames that wait.
    pub(crate) fn len(&self) -> usize {
        self.partials.len()
    }

    /// Whether the request of that call waits here.
    pub(crate) fn has_request(&self, call: u64) -> bool {
        self.partials.values().any(|partial| partial.frame.kind == Kind::Request && partial.frame.call == call)
    }

    /// Keeps `partial` until its chunks are in, and its tensors have landed.
    pub(crate) fn park(&mut self, mut partial: Partial) -> Result<(), ProtocolError> {
        let id = self.next_partial;
        self.next_partial += 1;
        for (index, slot) in partial.slots.iter_mut().enumerate() {
            match std::mem::replace(&mut slot.place, Place::Waiting) {
                Place::Bulk(transfer, storage) => {
                    let entry = Transfer { partial: id, slot: index, storage: Some(storage), filled: 0 };
                    if self.transfers.insert(transfer, entry).is_some() {
                        return Err(ProtocolError::DuplicateTransfer { transfer });
                    }
                }
                Place::Landing(lease, storage) => {
                    let entry = Landing { partial: id, slot: index, storage, landed: 0 };
                    if self.landings.insert(lease, entry).is_some() {
                        return Err(ProtocolError::DuplicateTransfer { transfer: lease });
                    }
                }
                other => slot.place = other,
            }
        }
        self.partials.insert(id, partial);
        Ok(())
    }

    /// The place for a chunk, or `None` when its frame has not arrived yet on the control connection.
    pub(crate) fn begin(&mut self, header: &Header) -> Result<Option<Chunk>, ProtocolError> {
        let id = if planted::has(Bug::ChunkMisplaced) { self.another(header.call) } else { header.call };
        let Some(transfer) = self.transfers.get_mut(&id) else { return Ok(None) };
        let len = transfer.storage.as_ref().map_or(0, StorageMut::len);
        let end = header.offset.checked_add(header.payload_len).filter(|end| *end <= len as u64);
        let (Some(end), true) = (end, header.offset == transfer.filled as u64 && header.payload_len > 0) else {
            let (offset, len, expected) = (header.offset, header.payload_len, transfer.filled as u64);
            return Err(ProtocolError::Chunk { transfer: header.call, offset, len, expected });
        };
        Ok(transfer.storage.take().map(|storage| Chunk {
            transfer: id,
            storage,
            at: header.offset as usize,
            end: end as usize,
        }))
    }

    /// Another transfer that is as far as this one, if there is one: a planted bug.
    fn another(&self, id: u64) -> u64 {
        let Some(own) = self.transfers.get(&id) else { return id };
        let room = |transfer: &Transfer| (transfer.filled, transfer.storage.as_ref().map(StorageMut::len));
        let like = self.transfers.iter().filter(|(other, transfer)| **other != id && room(transfer) == room(own));
        like.map(|(other, _)| *other).min().unwrap_or(id)
    }

    /// Takes a complete chunk back; gives the frame whose last one it was.
    pub(crate) fn end(&mut self, chunk: Chunk) -> Result<Option<Frame>, CloseCause> {
        let Some(transfer) = self.transfers.get_mut(&chunk.transfer) else { return Ok(None) };
        transfer.filled = chunk.end;
        if chunk.end < chunk.storage.len() {
            transfer.storage = Some(chunk.storage);
            return Ok(None);
        }
        let (id, slot) = (transfer.partial, transfer.slot);
        self.transfers.remove(&chunk.transfer);
        self.complete(id, slot, chunk.storage.freeze_ready())
    }

    /// So many bytes of the tensor under that lease are there; gives the frame whose last they are.
    ///
    /// # Errors
    /// [`ProtocolError::Landed`] if none is awaited under it, or not so many, or no more than before.
    pub(crate) fn land(&mut self, lease: u64, bytes: u64) -> Result<Option<Frame>, CloseCause> {
        let landing = self.landings.get_mut(&lease);
        let (landed, len) = landing.as_ref().map_or((0, 0), |landing| (landing.landed, landing.storage.len() as u64));
        let Some(landing) = landing.filter(|_| landed < bytes && bytes <= len) else {
            return Err(ProtocolError::Landed { lease, bytes, landed, len }.into());
        };
        landing.landed = bytes;
        if bytes < len {
            return Ok(None);
        }
        let Some(Landing { partial, slot, storage, .. }) = self.landings.remove(&lease) else { return Ok(None) };
        self.complete(partial, slot, storage)
    }

    /// The storage of a slot is complete; gives its frame, if that is.
    fn complete(&mut self, id: u64, slot: usize, storage: Storage) -> Result<Option<Frame>, CloseCause> {
        let Some(partial) = self.partials.get_mut(&id) else { return Ok(None) };
        partial.slots[slot].place = Place::Complete(storage);
        partial.missing -= 1;
        if partial.missing > 0 {
            return Ok(None);
        }
        self.partials.remove(&id).map(Partial::finish).transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoint::{Outbound, encode_frame};

    fn request(metadata: &[u8], tensors: &[Tensor], inline_max: u64) -> (Vec<u8>, Vec<(u64, Tensor)>) {
        let mut wire = Vec::new();
        let mut next_transfer = 1;
        let outbound = Outbound {
            kind: Kind::Request,
            call: 7,
            function: 3,
            deadline_us: 0,
            metadata,
            tensors,
            devices: &[],
            digests: None,
            lands: false,
        };
        let bulk = encode_frame(&outbound, inline_max, &mut next_transfer, &mut wire, |_, _| None).expect("encodes");
        (wire, bulk)
    }

    fn receiver() -> Receiver {
        Receiver::new(Limits::default(), Runtime::global().clone())
    }

    fn counting(len: usize) -> Tensor {
        Tensor::from_slice(&(0..len as u32).collect::<Vec<_>>(), &[len]).expect("a small tensor")
    }

    /// However the bytes are cut, the same frame comes out, and `missing_bytes` counts down to it.
    #[test]
    fn frames_survive_every_cut() {
        let (wire, _) = request(b"meta", &[counting(5), counting(3)], 1 << 16);
        for cut in 1..wire.len() {
            let mut receiver = receiver();
            let mut frames = 0;
            for mut part in [&wire[..cut], &wire[cut..]] {
                while !part.is_empty() {
                    if let Some(Received::Frame(frame)) = receiver.feed(&mut part).expect("valid bytes") {
                        assert_eq!(frame.metadata, b"meta");
                        assert_eq!(frame.tensors[1].as_slice::<u32>().expect("u32"), [0, 1, 2]);
                        frames += 1;
                    }
                }
                assert!(frames == 1 || receiver.missing_bytes() > 0);
            }
            assert_eq!((frames, receiver.missing_bytes()), (1, 0), "cut at {cut}");
        }
    }

    fn chunk_header(transfer: u64, offset: u64, len: u64) -> Header {
        Header { call: transfer, offset, payload_len: len, ..Header::new(Kind::Chunk) }
    }

    fn parked() -> Transfers {
        let (wire, bulk) = request(b"", &[counting(4)], 8);
        assert_eq!(bulk.len(), 1);
        let Ok(Some(Received::Waiting(partial))) = receiver().feed(&mut &wire[..]) else { panic!("waits for bulk") };
        let mut transfers = Transfers::default();
        transfers.park(partial).expect("a fresh transfer");
        transfers
    }

    #[test]
    fn chunks_complete_a_waiting_frame() {
        let mut transfers = parked();
        let bytes: Vec<u8> = (0..4_u32).flat_map(u32::to_le_bytes).collect();
        for (offset, end) in [(0, 6), (6, 16)] {
            let header = chunk_header(1, offset as u64, (end - offset) as u64);
            let mut chunk = transfers.begin(&header).expect("in order").expect("announced");
            chunk.target().expect("host").copy_from_slice(&bytes[offset..end]);
            chunk.advance(end - offset);
            let frame = transfers.end(chunk).expect("placed");
            assert_eq!(frame.is_some(), end == 16);
            if let Some(frame) = frame {
                assert_eq!(frame.tensors[0].as_slice::<u32>().expect("u32"), [0, 1, 2, 3]);
            }
        }
    }

    #[test]
    fn chunks_out_of_order_or_bounds_are_refused() {
        for (offset, len) in [(4, 4), (0, 17), (u64::MAX, 2), (0, 0)] {
            let refused = parked().begin(&chunk_header(1, offset, len));
            assert!(matches!(refused, Err(ProtocolError::Chunk { transfer: 1, .. })), "{offset} {len}");
        }
        assert!(matches!(parked().begin(&chunk_header(2, 0, 4)), Ok(None)), "not announced yet");
    }

    /// LIMITS: a frame that announces more than its payload holds allocates nothing.
    #[test]
    fn an_inline_tensor_larger_than_its_payload_is_refused() {
        let (mut wire, _) = request(b"", &[counting(4)], 1 << 16);
        wire[32] = 8; // payload_len 16 → 8
        assert!(matches!(
            receiver().feed(&mut &wire[..]),
            Err(CloseCause::Protocol(ProtocolError::Limit { what: "inline payload bytes", found: 16, max: 8 }))
        ));
    }

    /// Random corruption never panics and never yields more frames than were sent.
    #[test]
    fn corrupted_frames_are_refused_or_harmless() {
        let (wire, _) = request(b"metadata", &[counting(5), counting(3)], 1 << 16);
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..20_000 {
            let mut wire = wire.clone();
            for _ in 0..1 + seed % 3 {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                let at = seed as usize % wire.len();
                wire[at] = (seed >> 32) as u8;
            }
            let mut receiver = receiver();
            let mut input = &wire[..];
            while let Ok(Some(_)) = receiver.feed(&mut input) {}
        }
    }
}
