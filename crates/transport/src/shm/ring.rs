//! Frames between workers of one host by memory that both see: a ring of bytes in each direction.
//!
//! The bytes are those that would travel through the socket, so nothing above notices, and reading them costs no system call. The
//! socket stays for what a ring cannot do: it brings descriptors, wakes a sleeping driver (a byte that means nothing), and ends.
//!
//! ```text
//! dialer                                         acceptor
//!   Rings (its last frame by the socket), + file →  checks seals and size, maps
//!   reads the ring from now on          ←  Rings (its last frame by the socket)
//!
//! file: a page of words (`lane`, one per direction) | bytes of the dialer | bytes of the acceptor
//! ```
//!
//! Who sleeps says so in the lane, so a wake costs a system call only when somebody does: a byte on the socket for the driver, a
//! futex for a thread that blocks for its reply. Who does not sleep is either about to look at the ring, or reads it.
//!
//! Both processes can write all of it, and neither trusts it: bytes are copied out before they are parsed, positions are checked,
//! and each side keeps its own. A ring that was written into costs the two that share it their connection, and nobody else
//! anything. The file is sealed, so no read of it ends a process. Its pages are there from the start, so that no call waits for one;
//! they are given back after a while in which nothing passed, and come again, on the watchdog's thread, where much does.
//!
//! Invariant D1: bytes are read in the order in which they were sent, those by the socket first.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::time::Duration;

use farcall_device::{Kept, is_forked_child};
use rustix::fs::{FallocateFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use rustix::thread::futex::{self, Flags};
use rustix::time::Timespec;

use super::lane::{self, Corrupt, Lane};
use super::memory_file;
use crate::ProtocolError;
use crate::frame::HEADER_BYTES;

/// Bytes of a direction: some thousand small frames, so that as many calls in flight seldom wait for room.
const RING_BYTES: usize = 128 << 10;
const PAGE_BYTES: usize = 4096;
/// Wakes until the sender looks again on which processor it is: threads seldom move.
const LOOK_AT_PROCESSOR: u32 = 8;
/// Staged bytes from which on the receiver sees them, though more come: it begins while the sender goes on.
const STAGED_BYTES_MAX: u64 = 1 << 10;
const FILE_BYTES: usize = PAGE_BYTES + 2 * RING_BYTES;
/// Heartbeats without a byte after which a ring's pages are given back.
const IDLE_BEATS: u32 = 25;
/// Bytes after which all of them are mapped at once again.
const BUSY_BYTES: u64 = 8 << 10;
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

const _: () = assert!(2 * size_of::<Lane>() <= PAGE_BYTES && RING_BYTES.is_power_of_two());

/// The memory of both directions, mapped.
pub(crate) struct Rings {
    start: NonNull<u8>,
    /// This side opened the connection.
    dialed: bool,
    /// For giving pages back; a child keeps no copy.
    file: (Kept, OwnedFd),
}

// SAFETY: an address range without thread affinity. Its words are atomic; of the bytes, a range is written by the one holder of
// its `RingWriter` before it is published, and read by the one holder of its `RingReader` afterwards.
unsafe impl Send for Rings {}
// SAFETY: as above.
unsafe impl Sync for Rings {}

impl std::fmt::Debug for Rings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rings").field("dialed", &self.dialed).finish_non_exhaustive()
    }
}

impl Rings {
    /// New rings, by the side that dialed.
    pub(crate) fn create() -> io::Result<Arc<Self>> {
        let file = memory_file(c"farcall-rings")?;
        rustix::fs::ftruncate(&file, FILE_BYTES as u64)?;
        rustix::fs::fcntl_add_seals(&file, SEALS)?;
        Ok(Arc::new(Self::map(file, true)?))
    }

    /// Those that the dialer made.
    ///
    /// # Errors
    /// [`ProtocolError::Rings`] if they are not sealed, or of another size.
    pub(crate) fn open(file: Option<OwnedFd>) -> Result<Arc<Self>, ProtocolError> {
        let refused = |reason| ProtocolError::Rings { reason };
        let file =
            file.ok_or(refused("no descriptor came with them; if this process has none left, raise `ulimit -n`"))?;
        // Only memory files have seals.
        let seals = rustix::fs::fcntl_get_seals(&file).map_err(|_| refused("their descriptor is no memory file"))?;
        if !seals.contains(SEALS) || seals.contains(SealFlags::WRITE) {
            return Err(refused("their file is not sealed as it must be: it could shrink"));
        }
        let size = rustix::fs::fstat(&file).map_err(|_| refused("their file has no size"))?.st_size;
        if size != FILE_BYTES as i64 {
            return Err(refused("their file is of another size"));
        }
        let rings = Self::map(file, false).map_err(|_| refused("this process can map no more memory"))?;
        Ok(Arc::new(rings))
    }

    /// The file, to be passed to the peer.
    pub(crate) fn file(&self) -> &OwnedFd {
        &self.file.1
    }

    fn map(file: OwnedFd, dialed: bool) -> io::Result<Self> {
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no memory that exists.
        let start = unsafe { rustix::mm::mmap(ptr::null_mut(), FILE_BYTES, access, flags, &file, 0)? };
        let start = NonNull::new(start.cast::<u8>()).ok_or(Errno::NOMEM)?;
        // SAFETY: our mapping, of which nobody has a reference yet; the advice changes no contents.
        if let Err(errno) = unsafe { rustix::mm::madvise(start.as_ptr().cast(), FILE_BYTES, Advice::LinuxDontFork) } {
            tracing::debug!(%errno, "a forked child will hold a ring");
        }
        let rings = Self { start, dialed, file: (Kept::new(&file), file) };
        // Either side writes one of them first; who only reads maps what is there.
        [true, false].into_iter().for_each(|sends| rings.populate(sends));
        rings.advise(rings.start, PAGE_BYTES, Advice::LinuxPopulateWrite);
        Ok(rings)
    }

    /// Of the bytes that this side sends, or of those that it receives.
    fn lane(&self, sends: bool) -> &Lane {
        let index = usize::from(self.dialed != sends);
        // SAFETY: the first page is mapped for as long as `self` and holds two lanes, which are atomics alone, for which any bytes
        // are a value.
        unsafe { &*self.start.cast::<Lane>().as_ptr().add(index) }
    }

    /// The first of the bytes that this side sends, or of those that it receives.
    fn bytes(&self, sends: bool) -> NonNull<u8> {
        let index = usize::from(self.dialed != sends);
        // SAFETY: in the mapping.
        unsafe { self.start.add(PAGE_BYTES + index * RING_BYTES) }
    }

    /// Maps all pages that this side sends by, or receives by.
    fn populate(&self, sends: bool) {
        let advice = if sends { Advice::LinuxPopulateWrite } else { Advice::LinuxPopulateRead };
        self.advise(self.bytes(sends), RING_BYTES, advice);
    }

    /// Of `len` bytes of the mapping from `start` on.
    fn advise(&self, start: NonNull<u8>, len: usize, advice: Advice) {
        // SAFETY: in our mapping; to map pages leaves their contents as they are.
        if let Err(errno) = unsafe { rustix::mm::madvise(start.as_ptr().cast(), len, advice) } {
            tracing::debug!(%errno, "a busy ring's pages come one by one");
        }
    }

    /// Gives the pages that this side sends by back to the system.
    fn release(&self) -> bool {
        let offset = PAGE_BYTES + usize::from(!self.dialed) * RING_BYTES;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let released = rustix::fs::fallocate(self.file().as_fd(), flags, offset as u64, RING_BYTES as u64);
        if let Err(errno) = released {
            tracing::debug!(%errno, "an idle ring keeps its pages");
        }
        released.is_ok()
    }

    /// What is said to a peer that sleeps in its heartbeat's stead.
    pub(crate) fn beat(&self) {
        self.lane(true).beat();
    }

    /// What changes while the peer lives.
    pub(crate) fn signs(&self) -> (u32, u64) {
        self.lane(false).signs()
    }

    /// Whether the peer needs the processor that this thread has, as far as can be seen: looking for what it sends would keep it
    /// from sending.
    pub(crate) fn shares_processor(&self) -> bool {
        self.lane(false).processor() == processor()
    }

    /// Wakes this side's thread that sleeps in [`RingReader::sleep`], if one does.
    pub(crate) fn rouse(&self) {
        if self.lane(false).take_thread() {
            wake_thread(self.lane(false));
        }
    }

    /// Nobody of this side sleeps any more.
    pub(crate) fn disarm(&self) {
        self.lane(false).wake();
    }
}

impl Drop for Rings {
    fn drop(&mut self) {
        if is_forked_child() {
            return;
        }
        // SAFETY: our mapping, and nobody is left who could reach it.
        if let Err(errno) = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), FILE_BYTES) } {
            tracing::error!(%errno, "munmap failed: rings stay mapped");
        }
    }
}

/// Where this thread runs; 0 is nowhere.
fn processor() -> u32 {
    rustix::thread::sched_getcpu() as u32 + 1
}

fn wake_thread(lane: &Lane) {
    // Whoever has gone meanwhile needs no waking.
    let _ = futex::wake(lane.word(), Flags::empty(), 1);
}

impl From<Corrupt> for ProtocolError {
    fn from(_: Corrupt) -> Self {
        Self::Rings { reason: "a position in them cannot be: somebody has written into them" }
    }
}

/// Splits `len` bytes from `position` on at the ring's end.
fn pieces(position: u64, len: usize) -> [(usize, usize); 2] {
    let at = position as usize & (RING_BYTES - 1);
    let first = len.min(RING_BYTES - at);
    [(at, first), (0, len - first)]
}

/// The sending end.
#[derive(Debug)]
pub(crate) struct RingWriter {
    rings: Arc<Rings>,
    tail: u64,
    /// How far the receiver may read.
    published: u64,
    /// It may sleep, and was not woken for what was staged.
    owes_wake: bool,
    /// As last seen.
    head: u64,
    outgoing: Pages,
    incoming: Pages,
    /// Where it was last written, as the peer is told, and how often since it was looked at.
    processor: u32,
    wakes: u32,
}

/// Whom to wake, after bytes were written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sleeper {
    Nobody,
    /// By a byte on the socket.
    Driver,
}

impl RingWriter {
    pub(crate) fn new(rings: &Arc<Rings>) -> Self {
        Self {
            rings: Arc::clone(rings),
            tail: 0,
            published: 0,
            owes_wake: false,
            head: 0,
            outgoing: Pages::new(),
            incoming: Pages::new(),
            processor: 0,
            wakes: 0,
        }
    }

    /// Bytes that can be written, if there is room for `wanted`; else as few as there may be.
    fn room(&mut self, wanted: usize) -> Result<usize, ProtocolError> {
        let room = RING_BYTES - (self.tail - self.head) as usize;
        if room >= wanted {
            return Ok(room);
        }
        self.head = self.rings.lane(true).head(self.tail, RING_BYTES as u64)?;
        Ok(RING_BYTES - (self.tail - self.head) as usize)
    }

    /// Copies as many of `bytes` as there is room for, and gives how many. The receiver sees them.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<usize, ProtocolError> {
        let len = self.room(bytes.len())?.min(bytes.len());
        self.copy(&bytes[..len]);
        self.publish();
        Ok(len)
    }

    /// Copies all of `parts`, or nothing if there is no room. The receiver sees them with [`Self::wake`] at the latest.
    pub(crate) fn stage(&mut self, parts: [&[u8]; 2]) -> Result<bool, ProtocolError> {
        let len = parts[0].len() + parts[1].len();
        if self.room(len)? < len {
            return Ok(false);
        }
        parts.into_iter().for_each(|part| self.copy(part));
        self.owes_wake = true;
        if self.tail - self.published >= STAGED_BYTES_MAX {
            self.publish();
        }
        Ok(true)
    }

    /// Bytes were staged since the last [`Self::wake`].
    pub(crate) fn owes_wake(&self) -> bool {
        self.owes_wake
    }

    /// The receiver sees what was written or staged if it looks, and is not woken yet.
    pub(crate) fn show(&mut self) {
        self.owes_wake = true;
        if self.tail > self.published {
            self.publish();
        }
    }

    fn publish(&mut self) {
        self.published = self.tail;
        self.rings.lane(true).publish(self.tail);
    }

    /// There is room.
    fn copy(&mut self, bytes: &[u8]) {
        let len = bytes.len();
        let target = self.rings.bytes(true);
        let mut from = 0;
        for (at, count) in pieces(self.tail, len) {
            let source = &bytes[from..from + count];
            if let Ok(header) = <&[u8; HEADER_BYTES]>::try_from(source) {
                // Of each frame: no call for it.
                // SAFETY: as below.
                unsafe { target.add(at).cast::<[u8; HEADER_BYTES]>().write_unaligned(*header) };
                from += count;
                continue;
            }
            if count == 0 {
                continue;
            }
            // SAFETY: `at + count` is at most the ring's size, so the target lies in the mapping, which no Rust reference is to; the
            // receiver reads these bytes only once they are published.
            unsafe { target.add(at).copy_from_nonoverlapping(NonNull::from(source).cast(), count) };
            from += count;
        }
        self.tail += len as u64;
    }

    /// Nothing fits: whether something does after all. If not, the receiver will say when it does, by a byte on the socket.
    pub(crate) fn wait_for_room(&mut self) -> Result<bool, ProtocolError> {
        let lane = self.rings.lane(true);
        lane.want_room();
        self.head = lane.head(self.tail, RING_BYTES as u64)?;
        Ok(self.tail - self.head < RING_BYTES as u64)
    }

    /// Whether so many bytes can be written at once.
    pub(crate) fn fits(&self, len: usize) -> bool {
        let head = self.rings.lane(true).head(self.tail, RING_BYTES as u64);
        head.is_ok_and(|head| RING_BYTES - (self.tail - head) as usize >= len)
    }

    /// After the last [`Self::write`] or [`Self::stage`] of several: wakes a thread that sleeps, or says that the driver does.
    pub(crate) fn wake(&mut self) -> Sleeper {
        self.owes_wake = false;
        if self.tail > self.published {
            self.publish();
        }
        let lane = self.rings.lane(true);
        if self.wakes.is_multiple_of(LOOK_AT_PROCESSOR) {
            let processor = processor();
            if std::mem::replace(&mut self.processor, processor) != processor {
                lane.set_processor(processor);
            }
        }
        self.wakes = self.wakes.wrapping_add(1);
        match lane.take_sleeper() {
            lane::AWAKE => Sleeper::Nobody,
            lane::THREAD => {
                wake_thread(lane);
                Sleeper::Nobody
            }
            // What the peer writes beside these is taken for the driver, too.
            _ => Sleeper::Driver,
        }
    }

    /// At each heartbeat: pages come where much passes, and go back to the system where nothing does.
    pub(crate) fn look_at_pages(&mut self) {
        match self.incoming.look(self.rings.signs().1) {
            Change::Come => self.rings.populate(false),
            // The sender gives them back.
            Change::Go(position) => self.incoming.released(position),
            Change::None => {}
        }
        match self.outgoing.look(self.tail) {
            Change::Come => self.rings.populate(true),
            Change::Go(position) => {
                // Bytes that wait to be read stay.
                let is_read = self.rings.lane(true).head(self.tail, RING_BYTES as u64) == Ok(self.tail);
                if is_read && self.rings.release() {
                    self.outgoing.released(position);
                }
            }
            Change::None => {}
        }
    }
}

/// How the pages of a direction come and go with what passes, of which it is told at each heartbeat.
#[derive(Debug)]
struct Pages {
    /// Where the last heartbeat found it, and how many have since.
    looked_at: u64,
    idle_beats: u32,
    /// Where it was when none was there, if that was ever so.
    none_at: Option<u64>,
    populated: bool,
}

enum Change {
    None,
    /// All should be there, before a call needs the next.
    Come,
    /// None is needed, after so many bytes.
    Go(u64),
}

impl Pages {
    /// Of a new ring: they are there.
    fn new() -> Self {
        Self { looked_at: 0, idle_beats: 0, none_at: None, populated: true }
    }

    fn look(&mut self, position: u64) -> Change {
        let idle = std::mem::replace(&mut self.looked_at, position) == position;
        self.idle_beats = if idle { self.idle_beats.saturating_add(1) } else { 0 };
        // A peer may write any position.
        let passed = position.saturating_sub(self.none_at.unwrap_or(0));
        if !self.populated && !idle && passed >= BUSY_BYTES {
            self.populated = true;
            return Change::Come;
        }
        // The few that little traffic has taken may stay.
        let go = self.idle_beats >= IDLE_BEATS && (passed > PAGE_BYTES as u64 || self.none_at.is_none());
        if go { Change::Go(position) } else { Change::None }
    }

    fn released(&mut self, position: u64) {
        (self.none_at, self.populated) = (Some(position), false);
    }
}

/// The receiving end.
#[derive(Debug)]
pub(crate) struct RingReader {
    rings: Arc<Rings>,
    head: u64,
}

impl RingReader {
    pub(crate) fn new(rings: &Arc<Rings>) -> Self {
        Self { rings: Arc::clone(rings), head: 0 }
    }

    pub(crate) fn is_empty(&self) -> bool {
        !self.rings.lane(false).has_more(self.head)
    }

    /// Copies bytes that have come to `buffer`: how many, and whether the sender waits for room and must be told, by a byte on
    /// the socket.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> Result<(usize, bool), ProtocolError> {
        let lane = self.rings.lane(false);
        let there = (lane.tail(self.head, RING_BYTES as u64)? - self.head) as usize;
        let len = there.min(buffer.len());
        let source = self.rings.bytes(false);
        let mut to = 0;
        for (at, count) in pieces(self.head, len) {
            let target = NonNull::from(&mut buffer[to..to + count]).cast::<u8>();
            // SAFETY: `at + count` is at most the ring's size, so the source lies in the mapping, which stays readable (it is
            // sealed) and which no Rust reference is to. A peer that writes there meanwhile has us read any bytes, which is what
            // they are taken for.
            unsafe { target.copy_from_nonoverlapping(source.add(at), count) };
            to += count;
        }
        self.head += len as u64;
        lane.take(self.head);
        // A sender waits for room only if it has seen none: then this is the read, or one before the ring is empty again, that
        // finds it half full.
        let told = there >= RING_BYTES / 2 && lane.take_full();
        Ok((len, told))
    }

    /// Leaves the ring to the driver, which a byte on the socket wakes; `false` if there is something to read.
    pub(crate) fn leave(&self) -> bool {
        self.rings.lane(false).sleep(lane::DRIVER, self.head)
    }

    /// Sleeps on the ring until there are bytes, [`Rings::rouse`] or `timeout`. Not if `over`: whoever makes it so rouses then.
    pub(crate) fn sleep(&self, timeout: Duration, over: impl FnOnce() -> bool) {
        let lane = self.rings.lane(false);
        if lane.sleep(lane::THREAD, self.head) {
            if over() {
                return lane.wake();
            }
            let timeout = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: i64::from(timeout.subsec_nanos()) };
            let _ = futex::wait(lane.word(), Flags::empty(), lane::THREAD, Some(&timeout));
            lane.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both ends of one direction, in two mappings.
    fn ends() -> (RingWriter, RingReader) {
        let dialer = Rings::create().unwrap();
        let acceptor = Rings::open(Some(dialer.file().try_clone().unwrap())).unwrap();
        (RingWriter::new(&dialer), RingReader::new(&acceptor))
    }

    fn blocks(writer: &RingWriter) -> i64 {
        rustix::fs::fstat(writer.rings.file()).unwrap().st_blocks
    }

    #[test]
    fn bytes_come_out_as_they_went_in_around_the_end_many_times() {
        let (mut writer, mut reader) = ends();
        let bytes: Vec<u8> = (0..1_000_000_u32).map(|index| (index % 251) as u8).collect();
        let (mut sent, mut came, mut buffer) = (0, Vec::new(), [0; 7001]);
        while came.len() < bytes.len() {
            let end = bytes.len().min(sent + 12_345);
            sent += writer.write(&bytes[sent..end]).unwrap();
            let (len, _) = reader.read(&mut buffer).unwrap();
            came.extend_from_slice(&buffer[..len]);
        }
        assert!(came == bytes && reader.is_empty());
    }

    #[test]
    fn a_full_ring_takes_nothing_until_it_is_read_and_then_its_writer_is_told() {
        let (mut writer, mut reader) = ends();
        assert_eq!(writer.write(&vec![1; RING_BYTES + 1]).unwrap(), RING_BYTES);
        assert_eq!(writer.write(&[2]).unwrap(), 0);
        assert!(!writer.wait_for_room().unwrap());
        assert_eq!(reader.read(&mut [0; 100]).unwrap(), (100, true));
        assert_eq!(reader.read(&mut [0; 100]).unwrap(), (100, false), "told once");
        assert_eq!(writer.write(&[2; 300]).unwrap(), 200);
    }

    #[test]
    fn what_is_staged_is_seen_after_a_while_or_with_the_wake() {
        let (mut writer, mut reader) = ends();
        let mut buffer = vec![0; RING_BYTES];
        assert!(writer.stage([&[1; 64], &[2; 3]]).unwrap() && writer.owes_wake());
        assert_eq!(reader.read(&mut buffer).unwrap().0, 0);
        writer.wake();
        assert!(!writer.owes_wake());
        assert_eq!(reader.read(&mut buffer).unwrap().0, 67);
        assert_eq!(buffer[..67], [[1; 64].as_slice(), &[2; 3]].concat());
        // Many together, without a wake.
        (0..16).for_each(|_| assert!(writer.stage([&[1; 64], &[]]).unwrap()));
        assert_eq!(reader.read(&mut buffer).unwrap().0, 1024);
        assert!(writer.owes_wake(), "its reader may have gone to sleep before");
        // All the room there is: the next writer finds none, and that its reader was not woken.
        assert!(writer.stage([&vec![3; RING_BYTES - 64], &[4; 64]]).unwrap());
        assert!(!writer.stage([&[1], &[]]).unwrap());
        assert_eq!(writer.write(&[1]).unwrap(), 0);
        assert!(writer.owes_wake());
        assert_eq!(reader.read(&mut buffer).unwrap().0, RING_BYTES);
        // All or nothing.
        assert!(writer.stage([&vec![3; RING_BYTES - 10], &[]]).unwrap());
        assert!(!writer.stage([&[4; 6], &[4; 5]]).unwrap());
        assert!(writer.stage([&[4; 5], &[4; 5]]).unwrap());
        writer.wake();
        assert_eq!(reader.read(&mut buffer).unwrap().0, RING_BYTES);
    }

    #[test]
    fn pages_of_an_idle_ring_go_back_and_bytes_pass_again() {
        let (mut writer, mut reader) = ends();
        let (words, ring) = (PAGE_BYTES as i64 / 512, RING_BYTES as i64 / 512);
        assert_eq!(blocks(&writer), words + 2 * ring, "all are there from the start");
        let pass = |writer: &mut RingWriter, reader: &mut RingReader, len: usize| {
            let mut buffer = vec![0; len];
            assert_eq!(writer.write(&vec![7; len]).unwrap(), len);
            assert_eq!(reader.read(&mut buffer).unwrap().0, len);
            assert!(buffer.iter().all(|byte| *byte == 7));
        };
        pass(&mut writer, &mut reader, 10_000);
        (0..IDLE_BEATS).for_each(|_| writer.look_at_pages());
        assert_eq!(blocks(&writer), words + 2 * ring, "not yet");
        writer.look_at_pages();
        assert_eq!(blocks(&writer), words + ring, "the other direction's are its own");
        (0..2 * IDLE_BEATS).for_each(|_| writer.look_at_pages());
        pass(&mut writer, &mut reader, 100);
        writer.look_at_pages();
        assert!(blocks(&writer) <= 2 * words + ring, "little traffic takes what it needs");
        pass(&mut writer, &mut reader, 10_000);
        writer.look_at_pages();
        assert_eq!(blocks(&writer), words + 2 * ring, "much has all");
        // Bytes that wait to be read stay.
        assert_eq!(writer.write(&[9; 20_000]).unwrap(), 20_000);
        (0..2 * IDLE_BEATS).for_each(|_| writer.look_at_pages());
        let mut buffer = [0; 20_000];
        assert_eq!(reader.read(&mut buffer).unwrap().0, 20_000);
        assert!(buffer.iter().all(|byte| *byte == 9));
    }

    /// Of a side that has sent nothing yet, and of a position that cannot be.
    #[test]
    fn pages_of_a_ring_that_was_never_used_go_back_once_and_come_for_who_reads_much() {
        let (mut writer, _) = ends();
        (0..3 * IDLE_BEATS).for_each(|_| writer.look_at_pages());
        assert_eq!(blocks(&writer), (FILE_BYTES - RING_BYTES) as i64 / 512);
        let mut pages = Pages::new();
        pages.released(5000);
        assert!(matches!(pages.look(7000), Change::None));
        assert!(matches!(pages.look(20_000), Change::Come));
        assert!(matches!(pages.look(40_000), Change::None));
        assert!(matches!(pages.look(0), Change::None));
    }

    #[test]
    fn a_thread_that_sleeps_is_woken_and_the_driver_is_left_to_the_socket() {
        let (mut writer, reader) = ends();
        assert!(reader.leave());
        writer.write(&[1]).unwrap();
        assert_eq!(writer.wake(), Sleeper::Driver);
        assert_eq!(writer.wake(), Sleeper::Nobody, "once");
        assert!(!reader.leave(), "there is something to read");
        let (mut writer, mut reader) = ends();
        let sleeper = std::thread::spawn(move || {
            while reader.is_empty() {
                reader.sleep(Duration::from_secs(60), || false);
            }
            reader.read(&mut [0; 8]).unwrap().0
        });
        writer.write(&[1; 3]).unwrap();
        assert_eq!(writer.wake(), Sleeper::Nobody);
        assert_eq!(sleeper.join().unwrap(), 3);
    }
}
