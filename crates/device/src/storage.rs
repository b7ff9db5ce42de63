//! Write-once bytes: [`StorageMut`] is written by one holder, frozen, and then read by many as [`Storage`].
//!
//! Invariant FENCE: a storage carries the event of its last write and those of its readers. Bytes are given to the host only
//! after the write; memory goes back to its pool only after all of them, whatever is dropped when. Dropping never blocks.
//! Invariant SNAPSHOT: between `freeze` and a successful `try_unique` nothing writes the bytes.

use std::any::Any;
use std::fmt;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use crate::checker::{self, Race};
use crate::clock::Clock;
use crate::cpu::Engine;
use crate::cuda::{self, Space};
use crate::fork::is_forked_child;
use crate::memory::{ForeignBytes, Release, Slab, Span, View};
use crate::pool::HostBlock;
use crate::{Access, Device, DeviceError, Event, Runtime, Stream};

/// Readers from which on those that are known to be over are forgotten.
const READERS_MAX: usize = 16;

/// Bytes on a device that belong to one holder, to be written. [`StorageMut::freeze`] makes them shareable.
///
/// Fresh ones hold whatever the memory's last user left: initialised, not zero.
///
/// ```
/// # use farcall_device::{DeviceError, StorageMut, Stream};
/// fn write(mut bytes: StorageMut, stream: &Stream) -> Result<(), DeviceError> {
///     stream.fill(&mut bytes, 1)?;
///     stream.fill(&mut bytes, 2)
/// }
/// ```
/// There is one writer, and none after the freeze:
/// ```compile_fail,E0599
/// # use farcall_device::{DeviceError, StorageMut, Stream};
/// fn write(mut bytes: StorageMut, stream: &Stream) -> Result<(), DeviceError> {
///     let mut second = bytes.clone();
///     stream.fill(&mut second, 2)
/// }
/// ```
/// ```compile_fail,E0382
/// # use farcall_device::{DeviceError, StorageMut, Stream};
/// fn write(mut bytes: StorageMut, stream: &Stream) -> Result<(), DeviceError> {
///     let frozen = bytes.freeze(stream);
///     stream.fill(&mut bytes, 2)
/// }
/// ```
#[must_use]
pub struct StorageMut(Bytes);

/// Bytes on a device that do not change any more. Cheap to clone; the memory is recycled after the last clone and reader.
#[derive(Clone)]
pub struct Storage(Arc<Bytes>);

struct Bytes {
    memory: Memory,
    len: usize,
    device: Device,
    /// The last write, as others wait for it.
    written: Event,
    /// The operation that wrote last: `written` lies at or behind it.
    writer: Access,
    /// Reads that were pending when they were recorded, or all if uses are checked: the newest of each stream.
    readers: Mutex<Vec<Reader>>,
    /// Whose memory it is, where that matters: `None` on the host while nothing is queued or checked.
    home: Option<Runtime>,
}

struct Reader {
    read: Event,
    op: &'static str,
}

impl Reader {
    fn access(&self) -> Access {
        Access { op: self.op, stream: self.read.stream(), ticket: self.read.ticket() }
    }
}

enum Memory {
    Empty,
    /// Host memory, of the host itself or of an emulated device.
    Pooled(HostBlock),
    /// Memory of a CUDA device.
    Cuda(cuda::Block),
    /// Host memory that CUDA devices copy from and to by themselves.
    Pinned(cuda::Block),
    Foreign(ForeignBytes),
    /// In place of foreign memory, for who is alone with it and writes it.
    View(View),
}

impl StorageMut {
    pub(crate) fn pooled(block: HostBlock, len: usize, device: Device, home: Option<Runtime>) -> Self {
        let mut storage = Self::new(Memory::Pooled(block), len, device);
        storage.0.home = home;
        storage
    }

    /// Memory of a CUDA device, whose last user may not be done: `fences` say when.
    pub(crate) fn on_cuda(block: cuda::Block, len: usize, device: Device, home: Runtime, fences: Vec<Event>) -> Self {
        let mut storage = Self::new(Memory::Cuda(block), len, device);
        storage.0.home = Some(home);
        // Whoever writes first waits for them, as for readers.
        storage.0.readers = Mutex::new(fences.into_iter().map(|read| Reader { read, op: "free" }).collect());
        storage
    }

    pub(crate) fn pinned(block: cuda::Block, len: usize, home: Option<Runtime>) -> Self {
        let mut storage = Self::new(Memory::Pinned(block), len, Device::HOST);
        storage.0.home = home;
        storage
    }

    pub(crate) fn empty(device: Device) -> Self {
        Self::new(Memory::Empty, 0, device)
    }

    fn new(memory: Memory, len: usize, device: Device) -> Self {
        let (written, writer, readers) = (Event::complete(), Access::HOST, Mutex::default());
        Self(Bytes { memory, len, device, written, writer, readers, home: None })
    }

    /// The size in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// Whether there are no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.len == 0
    }

    /// Where the bytes are.
    #[must_use]
    pub fn device(&self) -> Device {
        self.0.device
    }

    /// The bytes of a host storage, to be written.
    ///
    /// # Errors
    /// [`DeviceError::NotHost`] on another device; [`DeviceError::NotReady`] while work on a stream still uses the bytes.
    pub fn as_bytes_mut(&mut self) -> Result<&mut [u8], DeviceError> {
        let device = self.0.host()?;
        for fence in self.fences() {
            if !fence.is_known()? {
                return Err(DeviceError::NotReady { device });
            }
        }
        self.0.device_bytes_mut()
    }

    /// Ends writing: the bytes are complete at this point of `stream`.
    #[must_use]
    pub fn freeze(mut self, stream: &Stream) -> Storage {
        self.0.written = stream.take_over(&self.0.written, self.0.writer);
        Storage(Arc::new(self.0))
    }

    /// Ends writing by the host: the bytes are complete now, or, if streams wrote them, when those are done.
    #[must_use]
    pub fn freeze_ready(self) -> Storage {
        Storage(Arc::new(self.0))
    }

    /// Ends writing with the event of a write that is under way elsewhere, such as an [`Event::token`]: nobody is given the bytes
    /// before it, and before the writes of streams so far.
    #[must_use]
    pub fn freeze_at(mut self, written: Event) -> Storage {
        let written = if self.0.written.is_over() { written } else { written.after(&self.0.written) };
        self.0.writer = Access { op: "token", stream: written.stream(), ticket: written.ticket() };
        self.0.written = written;
        Storage(Arc::new(self.0))
    }

    /// What must be over before anyone writes the bytes.
    pub(crate) fn fences(&mut self) -> impl Iterator<Item = &Event> {
        let readers = self.0.readers.get_mut().unwrap_or_else(PoisonError::into_inner);
        readers.iter().map(|reader| &reader.read).chain([&self.0.written])
    }

    /// The operations behind [`StorageMut::fences`], and whether they wrote.
    pub(crate) fn users(&mut self) -> impl Iterator<Item = (Access, bool)> {
        self.0.users()
    }

    /// Notes a write that waited for all of [`StorageMut::fences`] and so stands for them.
    pub(crate) fn record_write(&mut self, written: Event, op: &'static str) {
        self.0.readers.get_mut().unwrap_or_else(PoisonError::into_inner).clear();
        self.0.writer = Access { op, stream: written.stream(), ticket: written.ticket() };
        self.0.written = written;
    }

    pub(crate) fn span(&self) -> Result<Span, DeviceError> {
        self.0.span()
    }

    /// Whether a CUDA device has the bytes.
    pub(crate) fn is_cuda(&self) -> bool {
        self.0.is_cuda()
    }

    /// Where the bytes are, for the driver, which is to write them.
    pub(crate) fn space_mut(&mut self) -> Result<Space, DeviceError> {
        if let Memory::Foreign(_) = self.0.memory {
            return Err(DeviceError::Unsupported { what: "writing foreign memory", device: self.0.device });
        }
        self.0.space()
    }

    /// The bytes for work on the storage's own device, ordered by the caller.
    pub(crate) fn device_bytes_mut(&mut self) -> Result<&mut [u8], DeviceError> {
        self.0.device_bytes_mut()
    }
}

impl fmt::Debug for StorageMut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.describe("StorageMut", f)
    }
}

impl Storage {
    /// Wraps memory that something else owns, complete and unchanging. `owner.release()` is called once, after the last use.
    ///
    /// # Safety
    /// Until `release` is called, `ptr` must be valid for reads of `len` initialised bytes on `device` from any thread, and
    /// nothing may write them. For a host device that is an address of this process. With `len` 0, `ptr` is never read.
    #[expect(unsafe_code, reason = "the caller vouches for memory that this crate does not own")]
    pub unsafe fn external(ptr: NonNull<u8>, len: usize, device: Device, owner: Arc<dyn Release>) -> Self {
        // SAFETY: this function's contract is the same.
        let memory = Memory::Foreign(unsafe { ForeignBytes::new(ptr, len, owner) });
        StorageMut::new(memory, len, device).freeze_ready()
    }

    /// Stands for `len` bytes that did not all come: there is no memory, and each use is [`DeviceError::Torn`].
    pub(crate) fn torn(len: usize, device: Device) -> Self {
        StorageMut::new(Memory::Empty, len, device).freeze_at(Event::failed(DeviceError::Torn { device }))
    }

    /// The same bytes, kept by a storage of its own: who is alone with that one may write a private view of them
    /// ([`Storage::try_unique`]), and nobody else sees it. For what has come back from who had borrowed it; a clone, if the bytes are
    /// in no slab.
    #[must_use]
    #[expect(unsafe_code, reason = "names its own memory again")]
    pub fn again(&self) -> Self {
        if let Some(first) = self.first() {
            return first.again();
        }
        let (Memory::Pooled(block), true) = (&self.0.memory, self.0.device.is_host()) else { return self.clone() };
        let start = NonNull::from(block.range().bytes()).cast();
        // SAFETY: `Again` holds this storage until its release, and the bytes of a storage that is held are initialised, stay where they
        // are, and are not written.
        let memory = Memory::Foreign(unsafe { ForeignBytes::new(start, self.0.len, Arc::new(Again(self.clone()))) });
        StorageMut::new(memory, self.0.len, self.0.device).freeze_at(self.0.written.clone())
    }

    /// The storage whose bytes these are again.
    fn first(&self) -> Option<&Self> {
        self.owner()?.downcast_ref::<Again>().map(|again| &again.0)
    }

    /// Whether its memory can be written by who is alone with it, without a copy of what is there.
    pub(crate) fn can_be_reused(&self) -> bool {
        let lent = match &self.0.memory {
            Memory::Foreign(_) => true,
            Memory::Pooled(block) => block.is_given_up(),
            _ => false,
        };
        !lent && !matches!(self.0.written.known(), Some(Err(_)))
    }

    /// The size in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// Whether there are no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.len == 0
    }

    /// Where the bytes are.
    #[must_use]
    pub fn device(&self) -> Device {
        self.0.device
    }

    /// The slab that holds the bytes: what a peer on this host can map. `None` for foreign or no memory.
    ///
    /// A `Weak` of it tells when the slab was unmapped.
    #[must_use]
    pub fn slab(&self) -> Option<&Arc<Slab>> {
        match &self.0.memory {
            Memory::Pooled(block) => Some(block.range().slab()),
            Memory::Foreign(_) => self.first()?.slab(),
            Memory::Empty | Memory::View(_) | Memory::Cuda(_) | Memory::Pinned(_) => None,
        }
    }

    /// Whether an owner may wait for the release of these bytes to write them: what is to be read after a call needs a copy, so that
    /// the call keeps none.
    #[must_use]
    pub fn may_change(&self) -> bool {
        matches!(&self.0.memory, Memory::Foreign(foreign) if !foreign.is_constant())
    }

    /// The owner of foreign memory, as [`Storage::external`] was given it: for who made it, to know its own again. `None` for other
    /// memory, and for a private view.
    #[must_use]
    pub fn owner(&self) -> Option<&dyn Any> {
        match &self.0.memory {
            Memory::Foreign(foreign) => Some(foreign.owner()),
            _ => None,
        }
    }

    /// The slab's id, never used for another slab; `None` for foreign or no memory.
    #[must_use]
    pub fn slab_id(&self) -> Option<u64> {
        self.slab().map(|slab| slab.id())
    }

    /// Where in the slab the bytes start; 0 without a slab.
    #[must_use]
    pub fn slab_offset(&self) -> usize {
        match &self.0.memory {
            Memory::Pooled(block) => block.range().offset(),
            Memory::Foreign(_) => self.first().map_or(0, Self::slab_offset),
            Memory::Empty | Memory::View(_) | Memory::Cuda(_) | Memory::Pinned(_) => 0,
        }
    }

    /// The address on the device, for handing the bytes to a NIC or a driver; dangling for an empty storage.
    ///
    /// The memory lives as long as the storage does, so such an operation must hold a clone until it completes.
    #[must_use]
    pub fn as_ptr(&self) -> *const u8 {
        match &self.0.memory {
            Memory::Empty => NonNull::dangling().as_ptr(),
            Memory::Pooled(block) => block.range().bytes().as_ptr(),
            Memory::Cuda(block) | Memory::Pinned(block) => block.address() as *const u8,
            Memory::Foreign(foreign) => foreign.as_ptr(),
            Memory::View(view) => view.as_ptr(),
        }
    }

    /// Gives this process's part of the memory up: who reads it is out of reach, so it is never written again, and its slab is
    /// unmapped once nothing here uses it.
    ///
    /// For a peer on this host that was lost, but may live: what it holds stays as it is.
    pub fn abandon(&self) {
        match &self.0.memory {
            Memory::Pooled(block) => block.abandon(),
            _ => self.first().into_iter().for_each(Self::abandon),
        }
    }

    /// Whether a CUDA device has the bytes.
    pub(crate) fn is_cuda(&self) -> bool {
        self.0.is_cuda()
    }

    /// Where the bytes are, for the driver, which is to read them.
    pub(crate) fn space(&self) -> Result<Space, DeviceError> {
        self.0.space()
    }

    /// Whether both are clones of one storage.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Whether the bytes are written.
    ///
    /// # Errors
    /// The failure of the work that writes them.
    pub fn is_ready(&self) -> Result<bool, DeviceError> {
        self.0.written.query()
    }

    /// The event of the last write.
    pub fn ready_event(&self) -> &Event {
        &self.0.written
    }

    /// Notes that work enqueued on `stream` so far reads the bytes: they are neither written nor recycled before it is done.
    pub fn record_reader(&self, stream: &Stream) {
        let read = stream.record_read_of(self);
        self.push_reader(read, "read", stream.engine().map(|engine| &**engine));
    }

    /// Notes a read that waited for the write.
    pub(crate) fn push_reader(&self, read: Event, op: &'static str, engine: Option<&Engine>) {
        // Who checks must know of reads that are over too: the host may not know that they are.
        let checked = engine.is_some_and(Engine::is_checked);
        if !checked && read.is_over() {
            return;
        }
        let mut readers = self.0.readers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(older) = readers.iter_mut().find(|reader| reader.read.stream() == read.stream()) {
            *older = Reader { read, op };
            return;
        }
        if readers.len() >= READERS_MAX {
            match engine.filter(|_| checked).map(Engine::host) {
                Some(host) => readers.retain(|reader| !host.knows(reader.read.stream(), reader.read.ticket())),
                None => readers.retain(|reader| !reader.read.is_over()),
            }
        }
        readers.push(Reader { read, op });
    }

    /// The operation that wrote last.
    pub(crate) fn writer(&self) -> Access {
        self.0.writer
    }

    /// The runtime whose memory it is.
    pub(crate) fn runtime(&self) -> &Runtime {
        self.0.home.as_ref().unwrap_or_else(|| Runtime::global())
    }

    pub(crate) fn span(&self) -> Result<Span, DeviceError> {
        self.0.span()
    }

    /// The storage for writing again, if no one else holds it. Pending reads keep their fences: streams wait for them.
    ///
    /// Of a peer's slab it is a private view, whose pages are copied as they are written: the peer's stay as they are.
    ///
    /// # Errors
    /// The storage itself, if it is shared, if its memory is foreign and not a file's, or if it was given up ([`Storage::abandon`]).
    pub fn try_unique(self) -> Result<StorageMut, Self> {
        let mut bytes = Arc::try_unwrap(self.0).map_err(Self)?;
        match std::mem::replace(&mut bytes.memory, Memory::Empty) {
            Memory::Foreign(foreign) => match foreign.into_view() {
                Ok(view) => bytes.memory = Memory::View(view),
                Err(foreign) => {
                    bytes.memory = Memory::Foreign(foreign);
                    return Err(Self(Arc::new(bytes)));
                }
            },
            // Somebody out of reach may still read it.
            Memory::Pooled(block) if block.is_given_up() => {
                bytes.memory = Memory::Pooled(block);
                return Err(Self(Arc::new(bytes)));
            }
            own => bytes.memory = own,
        }
        Ok(StorageMut(bytes))
    }

    /// The bytes of a host storage. It neither waits nor has work run: await the value first, or ask [`Storage::is_ready`].
    ///
    /// # Errors
    /// [`DeviceError::NotHost`] on another device; [`DeviceError::NotReady`] before the write is done (in chaos mode, before the
    /// host was told so, whether or not it happens to have run), or its failure.
    pub fn as_bytes(&self) -> Result<&[u8], DeviceError> {
        let device = self.0.host()?;
        if !self.0.written.is_known()? {
            return Err(DeviceError::NotReady { device });
        }
        self.0.device_bytes()
    }

    /// The bytes for work on the storage's own device, ordered by the caller.
    pub(crate) fn device_bytes(&self) -> Result<&[u8], DeviceError> {
        self.0.device_bytes()
    }
}

impl fmt::Debug for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.describe("Storage", f)
    }
}

impl Bytes {
    fn host(&self) -> Result<Device, DeviceError> {
        if self.device.is_host() { Ok(self.device) } else { Err(DeviceError::NotHost { device: self.device }) }
    }

    fn device_bytes(&self) -> Result<&[u8], DeviceError> {
        expect_parent()?;
        match &self.memory {
            Memory::Empty => Ok(&[]),
            Memory::Pooled(block) => Ok(&block.range().bytes()[..self.len]),
            Memory::Cuda(_) => Err(DeviceError::NotHost { device: self.device }),
            Memory::Pinned(block) => Ok(block.host_bytes(self.len)),
            Memory::Foreign(foreign) => {
                // An emulated device's memory is the pool's; foreign memory of a device is out of the CPU's reach.
                self.host()?;
                Ok(if foreign.len() == 0 { &[] } else { foreign.bytes() })
            }
            Memory::View(view) => Ok(view.bytes()),
        }
    }

    fn device_bytes_mut(&mut self) -> Result<&mut [u8], DeviceError> {
        expect_parent()?;
        match &mut self.memory {
            Memory::Empty => Ok(&mut []),
            Memory::Pooled(block) => Ok(&mut block.bytes_mut()[..self.len]),
            Memory::Cuda(_) => Err(DeviceError::NotHost { device: self.device }),
            Memory::Pinned(block) => Ok(block.host_bytes_mut(self.len)),
            Memory::Foreign(_) => Err(DeviceError::Unsupported { what: "writing foreign memory", device: self.device }),
            Memory::View(view) => Ok(view.bytes_mut()),
        }
    }

    fn span(&self) -> Result<Span, DeviceError> {
        expect_parent()?;
        match &self.memory {
            Memory::Empty => Ok(Span::EMPTY),
            Memory::Pooled(block) => Ok(block.range().span(self.len)),
            Memory::Cuda(_) => Err(DeviceError::NotHost { device: self.device }),
            Memory::Pinned(block) => Ok(block.host_span(self.len)),
            Memory::Foreign(foreign) => {
                self.host()?;
                Ok(foreign.span())
            }
            Memory::View(view) => Ok(view.span()),
        }
    }

    fn is_cuda(&self) -> bool {
        match self.memory {
            Memory::Cuda(_) => true,
            Memory::Foreign(_) => !self.device.is_host(),
            Memory::Empty | Memory::Pooled(_) | Memory::Pinned(_) | Memory::View(_) => false,
        }
    }

    fn space(&self) -> Result<Space, DeviceError> {
        match &self.memory {
            Memory::Cuda(block) | Memory::Pinned(block) => Ok(block.space()),
            Memory::Foreign(foreign) if !self.device.is_host() => Space::foreign(self.device, foreign.as_ptr()),
            Memory::Pooled(_) if !self.device.is_host() => {
                Err(DeviceError::Unsupported { what: "a copy between real and emulated devices", device: self.device })
            }
            Memory::Empty | Memory::Pooled(_) | Memory::Foreign(_) | Memory::View(_) => Ok(self.span()?.into()),
        }
    }

    fn users(&mut self) -> impl Iterator<Item = (Access, bool)> {
        let readers = self.readers.get_mut().unwrap_or_else(PoisonError::into_inner);
        readers.iter().map(|reader| (reader.access(), false)).chain([(self.writer, true)])
    }

    /// What must be over before the memory is used again, as far as nothing else stands for it. Uses that nothing orders before the
    /// end of the memory are races.
    fn fences_of_reclaim(&mut self, engine: &Engine) -> Vec<Event> {
        let mut clock = Clock::default();
        let mut fences = Vec::new();
        let readers = self.readers.get_mut().unwrap_or_else(PoisonError::into_inner);
        let host = engine.host();
        for fence in readers.iter().map(|reader| &reader.read).chain([&self.written]) {
            let (stream, ticket) = (fence.stream(), fence.ticket());
            let redundant = clock.covers(stream, ticket) || host.knows(stream, ticket);
            if redundant && (fence.is_over() || !fence.is_by_hand()) {
                continue;
            }
            if redundant || engine.keeps_edge() {
                clock.join(fence);
                fences.push(fence.clone());
            }
        }
        if engine.is_checked() {
            let uncovered = self
                .users()
                .filter(|(user, _)| !clock.covers(user.stream, user.ticket) && !host.covers(user.stream, user.ticket));
            let races: Vec<_> =
                uncovered.map(|(earlier, is_write)| Race { earlier, is_write, later: Access::FREE }).collect();
            drop(host);
            engine.note_in_drop(races);
        }
        fences.retain(|fence| !fence.is_over());
        fences
    }

    fn describe(&self, name: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place: &dyn fmt::Debug = match &self.memory {
            Memory::Empty => &"empty",
            Memory::Pooled(block) => block,
            Memory::Cuda(block) | Memory::Pinned(block) => block,
            Memory::Foreign(_) => &"foreign",
            Memory::View(view) => view,
        };
        write!(f, "{name}({} bytes on {}, {place:?}, {:?})", self.len, self.device, self.written)
    }
}

/// Holds the storage whose bytes another one names again.
struct Again(Storage);

impl Release for Again {
    fn release(&self) {}

    fn is_constant(&self) -> bool {
        true
    }

    fn file(&self) -> Option<(BorrowedFd<'_>, u64)> {
        Some((self.0.slab()?.fd().ok()?, self.0.slab_offset() as u64))
    }
}

/// FORK: a child has the names of its parent's memory, not the memory.
fn expect_parent() -> Result<(), DeviceError> {
    if is_forked_child() { Err(DeviceError::ForkedProcess) } else { Ok(()) }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        if let Memory::Empty = self.memory {
            return;
        }
        let home = self.home.take();
        let engine = home.as_ref().and_then(|home| home.engine_of(self.device));
        let pending = match engine {
            Some(engine) => self.fences_of_reclaim(engine),
            None => {
                let readers = self.readers.get_mut().unwrap_or_else(PoisonError::into_inner);
                let fences = readers.iter().map(|reader| &reader.read).chain([&self.written]);
                fences.inspect(|fence| fence.look()).filter(|fence| !fence.is_over()).cloned().collect()
            }
        };
        if let Memory::Cuda(block) = &self.memory
            && block.can_follow(&pending)
        {
            // The next holder's streams wait for them: nobody has to know when.
            if let Memory::Cuda(block) = std::mem::replace(&mut self.memory, Memory::Empty) {
                block.give_back_behind(pending);
            }
            return;
        }
        let poison = engine.is_some_and(|engine| engine.is_checked());
        if pending.is_empty() && !poison {
            return;
        }
        // FENCE: each pending event holds the memory; the last to complete returns it.
        let memory = Arc::new(Reclaimed { memory: std::mem::replace(&mut self.memory, Memory::Empty), poison });
        for fence in pending {
            let memory = Arc::clone(&memory);
            fence.on_over(move || drop(memory));
        }
    }
}

/// Memory whose holder is gone.
struct Reclaimed {
    memory: Memory,
    poison: bool,
}

impl Drop for Reclaimed {
    fn drop(&mut self) {
        match &mut self.memory {
            _ if is_forked_child() => {}
            // Somebody out of reach may still read it.
            Memory::Pooled(block) if block.is_abandoned() => {}
            Memory::Pooled(block) if self.poison => checker::poison(block.bytes_mut(), checker::FREED),
            Memory::Pinned(block) if self.poison => {
                let len = block.len();
                checker::poison(block.host_bytes_mut(len), checker::FREED);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::{Config, Runtime, StreamId};

    fn runtime() -> Runtime {
        Runtime::new(Config::default()).unwrap()
    }

    #[test]
    fn bytes_written_by_the_host_are_ready_once_frozen() {
        let runtime = runtime();
        let mut bytes = runtime.alloc_host(100).unwrap();
        bytes.as_bytes_mut().unwrap().fill(7);
        let storage = bytes.freeze_ready();
        assert!(storage.is_ready().unwrap());
        assert_eq!(storage.as_bytes().unwrap(), [7; 100]);
        assert!(storage.slab_id().is_some());
    }

    #[test]
    fn who_is_alone_with_the_same_bytes_again_writes_a_view_of_them() {
        let first = runtime().alloc_host(5000).unwrap().freeze_ready();
        let before = first.as_bytes().unwrap().to_vec();
        let again = first.again().again();
        assert!(again.as_ptr() == first.as_ptr() && !again.is_same(&first));
        assert_eq!((again.slab_id(), again.slab_offset()), (first.slab_id(), first.slab_offset()));
        let shared = again.clone().try_unique().expect_err("it is shared");
        drop(shared);
        let mut view = again.try_unique().expect("a private view");
        let byte = !before[0];
        view.as_bytes_mut().unwrap().fill(byte);
        assert_eq!(first.as_bytes().unwrap(), before);
        let view = view.freeze_ready();
        assert!(view.as_bytes().unwrap().iter().all(|found| *found == byte) && view.slab().is_none());
        let first = first.try_unique().expect_err("the view may read what was not written");
        drop(view);
        drop(first.try_unique().expect("alone again"));
    }

    /// L1: what was given up is written by nobody, not even by its sole holder.
    #[test]
    fn what_was_given_up_is_never_written_again() {
        let runtime = runtime();
        let [given_up, beside] = [100, 100].map(|len| runtime.alloc_host(len).unwrap().freeze_ready());
        assert_eq!(given_up.slab_id(), beside.slab_id());
        given_up.again().abandon();
        assert!(!given_up.can_be_reused() && beside.can_be_reused());
        given_up.try_unique().expect_err("somebody may read it");
        drop(beside.try_unique().expect("nobody has it"));
    }

    #[test]
    fn fence_bytes_are_refused_until_written() {
        let (trigger, written) = Event::pending_at(StreamId::HOST, 1);
        let storage = runtime().alloc_host(8).unwrap().freeze_at(written);
        assert!(!storage.is_ready().unwrap());
        assert!(matches!(storage.as_bytes(), Err(DeviceError::NotReady { device: Device::HOST })));
        trigger.complete(Ok(()));
        assert_eq!(storage.as_bytes().unwrap().len(), 8);
    }

    #[test]
    fn fence_a_failed_write_is_an_error_for_readers() {
        let (trigger, written) = Event::pending_at(StreamId::HOST, 1);
        let storage = runtime().alloc_host(8).unwrap().freeze_at(written);
        trigger.complete(Err(DeviceError::Lost { device: Device::HOST, reason: "test".into() }));
        assert!(matches!(storage.as_bytes(), Err(DeviceError::Lost { .. })));
    }

    #[test]
    fn fence_memory_is_recycled_after_the_last_pending_use() {
        let runtime = runtime();
        let (write, written) = Event::pending_at(StreamId::HOST, 1);
        let (read, pending_read) = Event::pending_at(StreamId::HOST, 2);
        let storage = runtime.alloc_host(64).unwrap().freeze_at(written);
        let reader = runtime.stream(Device::HOST).unwrap();
        reader.wait(&pending_read);
        storage.record_reader(&reader);
        drop(storage);
        assert_eq!(runtime.stats().live_bytes, 64);
        write.complete(Ok(()));
        assert_eq!(runtime.stats().live_bytes, 64, "the reader is not done");
        read.complete(Ok(()));
        assert_eq!(runtime.stats().live_bytes, 0);
    }

    #[test]
    fn snapshot_only_a_sole_holder_can_write_again() {
        let runtime = runtime();
        let storage = runtime.alloc_host(8).unwrap().freeze_ready();
        let clone = storage.clone();
        let storage = storage.try_unique().expect_err("a clone is held");
        drop(clone);
        let (read, pending_read) = Event::pending_at(StreamId::HOST, 2);
        let reader = runtime.stream(Device::HOST).unwrap();
        reader.wait(&pending_read);
        storage.record_reader(&reader);
        let mut unique = storage.try_unique().expect("the last one");
        assert!(matches!(unique.as_bytes_mut(), Err(DeviceError::NotReady { .. })), "a read is pending");
        read.complete(Ok(()));
        unique.as_bytes_mut().unwrap().fill(1);
    }

    struct Owner(AtomicUsize);

    impl Release for Owner {
        fn release(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    #[expect(unsafe_code, reason = "wraps a static")]
    fn foreign_memory_is_read_only_and_released_once() {
        static BYTES: [u8; 4] = [1, 2, 3, 4];
        let owner = Arc::new(Owner(AtomicUsize::new(0)));
        let start = NonNull::from(&BYTES).cast();
        // SAFETY: a static lives for ever and is never written.
        let storage = unsafe { Storage::external(start, 4, Device::HOST, owner.clone()) };
        assert_eq!(storage.as_bytes().unwrap(), BYTES);
        assert_eq!(storage.slab_id(), None);
        let clone = storage.clone();
        let storage = storage.try_unique().expect_err("shared");
        drop(clone);
        let storage = storage.try_unique().expect_err("foreign");
        assert_eq!(owner.0.load(Ordering::Relaxed), 0);
        drop(storage);
        assert_eq!(owner.0.load(Ordering::Relaxed), 1);
    }

    /// Not even the checker's poison.
    #[test]
    fn snapshot_an_abandoned_storage_is_not_written_any_more() {
        let runtime = Runtime::new(Config { check: crate::Check::Report, ..Config::default() }).unwrap();
        let mut bytes = runtime.alloc_host(2 << 20).unwrap();
        bytes.as_bytes_mut().unwrap().fill(5);
        let storage = bytes.freeze_ready();
        let file = storage.slab().unwrap().fd().unwrap().try_clone_to_owned().unwrap();
        storage.abandon();
        drop(storage);
        let mut seen = [0; 64];
        rustix::io::pread(&file, &mut seen, 0).unwrap();
        assert_eq!(seen, [5; 64]);
    }

    /// What a peer's slab is here: a file, mapped to be read.
    struct Lent(std::os::fd::OwnedFd, AtomicUsize);

    impl Release for Lent {
        fn release(&self) {
            self.1.fetch_add(1, Ordering::Relaxed);
        }

        fn file(&self) -> Option<(std::os::fd::BorrowedFd<'_>, u64)> {
            use std::os::fd::AsFd;
            Some((self.0.as_fd(), 0))
        }
    }

    /// Written in place, given back, received again at the same offset: each time the owner's bytes.
    #[test]
    #[expect(unsafe_code, reason = "wraps a slab as a peer would")]
    fn snapshot_a_borrower_writes_its_own_view_for_one_borrow() {
        let mut slab = Slab::create(4096).unwrap();
        slab.bytes_mut().fill(3);
        let file = slab.slab().fd().unwrap().try_clone_to_owned().unwrap();
        let owner = Arc::new(Lent(file, AtomicUsize::new(0)));
        for round in 0..3 {
            let start = NonNull::from(&slab.bytes()[0]);
            // SAFETY: the slab outlives the storage, and nothing writes it.
            let storage = unsafe { Storage::external(start, 4096, Device::HOST, owner.clone()) };
            let clone = storage.clone();
            let storage = storage.try_unique().expect_err("a clone is held");
            drop(clone);
            let mut bytes = storage.try_unique().expect("alone");
            assert_eq!(bytes.as_bytes_mut().unwrap(), [3; 4096]);
            bytes.as_bytes_mut().unwrap().fill(9);
            let written = bytes.freeze_ready();
            assert_eq!((written.as_bytes().unwrap(), slab.bytes()), (&[9; 4096][..], &[3; 4096][..]));
            assert_eq!(owner.1.load(Ordering::Relaxed), round, "the view borrows the rest of its pages");
            drop(written);
            assert_eq!(owner.1.load(Ordering::Relaxed), round + 1);
        }
    }

    #[test]
    fn an_empty_storage_has_no_memory() {
        let runtime = runtime();
        let storage = runtime.alloc_host(0).unwrap().freeze_ready();
        assert_eq!((storage.as_bytes().unwrap(), storage.slab_id()), (&[][..], None));
        assert_eq!(runtime.stats().allocations, 0);
    }
}
