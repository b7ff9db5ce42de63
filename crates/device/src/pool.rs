//! Recycles host memory by size class, so that an allocation of warm memory costs a lock and no system call.
//!
//! Classes are four to a doubling, so at most a quarter is lost to rounding. Classes up to 1 MiB are cut from shared slabs of 8 MiB,
//! larger ones up to 32 MiB from arenas of 128 MiB; a block above is a slab of its own, and so is one for which no arena can be made.
//! A block of an arena goes back to its class, too, and only from there to the arena's free space, where other sizes find it.
//! Invariant P1: a block is in one place: with its holder, in its class's free list, or in what is not cut of a slab.
//! Invariant P2: large memory that nobody uses is kept mapped up to `idle_bytes_max` in all: idle slabs, and what was ever handed out
//! of arenas. Beyond it unused arenas go, then the oldest blocks, until what is left lies in arenas beside blocks in use.
//! Invariant P3: no slab is mapped, unmapped or populated under a lock that an allocation of warm memory takes.
//! Invariant P4: an arena is mapped only for a block that fits nowhere in the others, idle blocks of all classes included. So who
//! goes through many sizes takes no more arenas than the blocks in use, at their most, can scatter.

mod arenas;
mod idle;

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use self::arenas::{ARENA_BYTES, Cut};
use self::idle::Idle;
use crate::fork::is_forked_child;
use crate::memory::{ALIGN_BYTES, DescriptorPermit, Slab, SlabRange};
use crate::{Device, DeviceError};

/// The largest class that is cut from shared slabs.
const SMALL_BYTES_MAX: usize = 1 << 20;
/// The size of a shared slab.
const SHARED_SLAB_BYTES: usize = 8 << 20;
/// The largest class that is cut from arenas: four to an arena.
const ARENA_BLOCK_BYTES_MAX: usize = 32 << 20;
/// Larger slabs get their pages as they are written: who announces much and sends little takes little (LIMITS).
const POPULATED_BYTES_MAX: usize = 64 << 20;
/// Classes up to `SMALL_BYTES_MAX`.
const SMALL_CLASSES: usize = class_of(SMALL_BYTES_MAX) + 1;

/// A pool of host memory. Cheap to clone; blocks keep it alive.
#[derive(Clone)]
pub struct HostPool(Arc<Shared>);

struct Shared {
    small: [Mutex<Vec<SlabRange>>; SMALL_CLASSES],
    /// What is left of the newest shared slab.
    uncut: Mutex<Option<SlabRange>>,
    idle: Mutex<Idle>,
    /// Held by who maps an arena.
    arena: Mutex<()>,
    counters: Counters,
}

#[derive(Default)]
struct Counters {
    slabs: AtomicUsize,
    mapped_bytes: AtomicUsize,
    live_bytes: AtomicUsize,
    allocations: AtomicU64,
    recycled: AtomicU64,
}

/// What a [`HostPool`] holds and has done. Taken without a lock: the numbers may be of slightly different moments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct PoolStats {
    /// Slabs that are mapped.
    pub slabs: usize,
    /// Their bytes. Pages of them that were never handed out take no memory.
    pub mapped_bytes: usize,
    /// Bytes handed out, rounded to the size class.
    pub live_bytes: usize,
    /// Bytes mapped and not handed out.
    pub idle_bytes: usize,
    /// Blocks handed out since the start.
    pub allocations: u64,
    /// Those among them of which every page was used before: warm memory.
    pub recycled: u64,
}

impl HostPool {
    /// A pool that keeps up to `idle_bytes_max` of unused large blocks mapped (those above 1 MiB); by default a quarter of the memory
    /// of this process's cgroup, or of the machine.
    #[must_use]
    pub fn new(idle_bytes_max: Option<usize>) -> Self {
        Self(Arc::new(Shared {
            small: std::array::from_fn(|_| Mutex::default()),
            uncut: Mutex::default(),
            idle: Mutex::new(Idle::new(idle_bytes_max.unwrap_or_else(|| memory_limit_bytes() / 4))),
            arena: Mutex::default(),
            counters: Counters::default(),
        }))
    }

    /// A block of at least `len` bytes, aligned to 64; its contents are whatever its last user left.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] if `len` is above the memory of the cgroup or machine, or the system has none left;
    /// [`DeviceError::ForkedProcess`].
    /// # Cost
    /// Warm memory: one lock held for a few instructions. Else it is cut from a slab, which is mapped if there is no room; pages of
    /// a block above 1 MiB and up to 64 MiB that were never used are populated, about 0.4 ms a MiB.
    pub fn alloc(&self, len: usize) -> Result<HostBlock, DeviceError> {
        let out_of_memory = || self.out_of_memory(len);
        if is_forked_child() {
            return Err(DeviceError::ForkedProcess);
        }
        if len > memory_limit_bytes() {
            return Err(out_of_memory());
        }
        let class = class_of(len);
        let (range, warm) = if class < SMALL_CLASSES { self.0.take_small(class) } else { self.0.take_large(class) }
            .map_err(|error| match error {
                DeviceError::OutOfMemory { .. } => out_of_memory(),
                other => other,
            })?;
        let counters = &self.0.counters;
        counters.allocations.fetch_add(1, Ordering::Relaxed);
        counters.recycled.fetch_add(u64::from(warm), Ordering::Relaxed);
        counters.live_bytes.fetch_add(range.len(), Ordering::Relaxed);
        Ok(HostBlock { range: Some(range), class, pool: self.clone(), given_up: AtomicBool::new(false) })
    }

    /// Unmaps every slab of which nothing is in use; returns how many bytes that was.
    pub fn trim(&self) -> usize {
        let mut freed = lock(&self.0.idle).trim();
        self.0.take_unused_shared(&mut freed);
        self.0.unmap(freed)
    }

    /// What the pool holds and has done.
    #[must_use]
    pub fn stats(&self) -> PoolStats {
        let counters = &self.0.counters;
        let mapped_bytes = counters.mapped_bytes.load(Ordering::Relaxed);
        let live_bytes = counters.live_bytes.load(Ordering::Relaxed);
        PoolStats {
            slabs: counters.slabs.load(Ordering::Relaxed),
            mapped_bytes,
            live_bytes,
            idle_bytes: mapped_bytes.saturating_sub(live_bytes),
            allocations: counters.allocations.load(Ordering::Relaxed),
            recycled: counters.recycled.load(Ordering::Relaxed),
        }
    }

    fn out_of_memory(&self, len: usize) -> DeviceError {
        let mapped_bytes = self.0.counters.mapped_bytes.load(Ordering::Relaxed);
        DeviceError::OutOfMemory { device: Device::HOST, want_bytes: len, mapped_bytes }
    }
}

impl fmt::Debug for HostPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("HostPool").field(&self.stats()).finish()
    }
}

impl Shared {
    /// A block of a small class, and whether it was used before.
    fn take_small(&self, class: usize) -> Result<(SlabRange, bool), DeviceError> {
        let recycled = lock(&self.small[class]).pop();
        // One that came back while its slab was retired is dropped here.
        if let Some(range) = recycled.filter(|range| !range.slab().is_retired()) {
            return Ok((range, true));
        }
        let size = class_bytes(class);
        // Not P3's lock: only cold allocations come here, and all of them need the new slab.
        let mut uncut = lock(&self.uncut);
        if let Some(range) = uncut.as_mut().and_then(|rest| rest.split_front(size)) {
            return Ok((range, false));
        }
        let mut fresh = self.map(SHARED_SLAB_BYTES)?;
        let range = fresh.split_front(size).ok_or_else(|| DeviceError::os("split", std::io::ErrorKind::Other))?;
        let rest = uncut.replace(fresh);
        drop(uncut);
        if let Some(rest) = rest {
            self.shelve(rest);
        }
        Ok((range, false))
    }

    /// Puts the end of a shared slab, too short for what was asked, into the free lists of the classes that fit it.
    fn shelve(&self, mut rest: SlabRange) {
        while rest.len() >= ALIGN_BYTES {
            let mut class = class_of(rest.len()).min(SMALL_CLASSES - 1);
            if class_bytes(class) > rest.len() {
                class -= 1;
            }
            if let Some(block) = rest.split_front(class_bytes(class)) {
                lock(&self.small[class]).push(block);
            }
        }
    }

    /// A block of a large class, and whether it was used before.
    fn take_large(&self, class: usize) -> Result<(SlabRange, bool), DeviceError> {
        let recycled = lock(&self.idle).take(class);
        if let Some(range) = recycled {
            return Ok((range, true));
        }
        let size = class_bytes(class);
        if size <= ARENA_BLOCK_BYTES_MAX
            && let Some(cut) = self.cut(size)?
        {
            return self.populated(cut);
        }
        let mut range = self.map(size)?;
        if size <= POPULATED_BYTES_MAX
            && let Err(error) = range.populate()
        {
            self.unmap(vec![range]);
            return Err(error);
        }
        Ok((range, false))
    }

    /// A block of an arena; `None` if there is no room and the system has none for another arena.
    fn cut(&self, len: usize) -> Result<Option<Cut>, DeviceError> {
        let found = lock(&self.idle).cut(len);
        if found.is_some() {
            return Ok(found);
        }
        // Not P3's lock: only blocks for which there is no room come here, and all of them need the new arena.
        let _arena = lock(&self.arena);
        let found = lock(&self.idle).cut(len);
        if found.is_some() {
            return Ok(found);
        }
        if DescriptorPermit::take().is_none() {
            // Peers could map nothing that is cut from it, long after there are descriptors again.
            return Ok(None);
        }
        let mut fresh = match self.map(ARENA_BYTES) {
            Err(DeviceError::OutOfMemory { .. }) => return Ok(None),
            mapped => mapped?,
        };
        fresh.prefer_huge_pages();
        Ok(lock(&self.idle).cut_fresh(fresh, len))
    }

    /// The block with all its pages, and whether they were used before.
    fn populated(&self, cut: Cut) -> Result<(SlabRange, bool), DeviceError> {
        let Cut { mut range, untouched_bytes } = cut;
        if untouched_bytes == 0 {
            return Ok((range, true));
        }
        if let Err(error) = range.populate_end(untouched_bytes) {
            let unused = {
                let mut idle = lock(&self.idle);
                if range.slab().is_retired() { Vec::new() } else { idle.put_back(Cut { range, untouched_bytes }) }
            };
            self.unmap(unused);
            return Err(error);
        }
        Ok((range, false))
    }

    fn give_back(&self, class: usize, range: SlabRange) {
        self.counters.live_bytes.fetch_sub(range.len(), Ordering::Relaxed);
        if class < SMALL_CLASSES {
            if !range.slab().is_retired() {
                lock(&self.small[class]).push(range);
            }
            return;
        }
        let evicted = {
            let mut idle = lock(&self.idle);
            // Asked under the lock that `retire` takes: a retired slab's block is never idle. It is dropped without the lock.
            if range.slab().is_retired() { Vec::new() } else { idle.put(class, range) }
        };
        self.unmap(evicted);
    }

    /// Takes a slab out of use: what of it is free is dropped now, the rest as it comes back, the last one unmaps it. Its bytes
    /// do not count any more.
    fn retire(&self, slab: &Arc<Slab>) {
        let mut freed = {
            let mut idle = lock(&self.idle);
            if !slab.retire() {
                return;
            }
            idle.retire(slab)
        };
        let retired = |range: &SlabRange| Arc::ptr_eq(range.slab(), slab);
        freed.extend(lock(&self.uncut).take_if(|rest| retired(rest)));
        for list in &self.small {
            freed.extend(lock(list).extract_if(.., |free| retired(free)));
        }
        self.counters.slabs.fetch_sub(1, Ordering::Relaxed);
        self.counters.mapped_bytes.fetch_sub(slab.len(), Ordering::Relaxed);
    }

    fn map(&self, len: usize) -> Result<SlabRange, DeviceError> {
        let range = Slab::create(len)?;
        self.counters.slabs.fetch_add(1, Ordering::Relaxed);
        self.counters.mapped_bytes.fetch_add(range.slab().len(), Ordering::Relaxed);
        Ok(range)
    }

    /// Drops ranges that cover whole slabs; returns their bytes.
    fn unmap(&self, ranges: Vec<SlabRange>) -> usize {
        let mut slabs: Vec<_> = ranges.into_iter().map(|range| Arc::clone(range.slab())).collect();
        slabs.sort_unstable_by_key(|slab| slab.id());
        slabs.dedup_by_key(|slab| slab.id());
        let bytes = slabs.iter().map(|slab| slab.len()).sum();
        self.counters.slabs.fetch_sub(slabs.len(), Ordering::Relaxed);
        self.counters.mapped_bytes.fetch_sub(bytes, Ordering::Relaxed);
        bytes
    }

    /// Moves the blocks of shared slabs of which every byte is free into `freed`.
    fn take_unused_shared(&self, freed: &mut Vec<SlabRange>) {
        // All locks at once, in one order (`uncut`, then classes by size), so that no block moves while they are counted.
        let mut uncut = lock(&self.uncut);
        let mut lists: Vec<_> = self.small.iter().map(lock).collect();
        let mut free_bytes: HashMap<u64, usize> = HashMap::new();
        for range in lists.iter().flat_map(|list| list.iter()).chain(uncut.as_ref()) {
            *free_bytes.entry(range.slab().id()).or_default() += range.len();
        }
        let unused = |range: &SlabRange| free_bytes.get(&range.slab().id()) == Some(&range.slab().len());
        for list in &mut lists {
            freed.extend(list.extract_if(.., |range| unused(range)));
        }
        freed.extend(uncut.take_if(|range| unused(range)));
    }
}

/// A block of a [`HostPool`], back in its free list when dropped.
pub struct HostBlock {
    /// Taken only by `drop`.
    range: Option<SlabRange>,
    class: usize,
    pool: HostPool,
    given_up: AtomicBool,
}

impl HostBlock {
    /// The block's range: its class's size, so at least what was asked for.
    #[must_use]
    pub fn range(&self) -> &SlabRange {
        self.range.as_ref().expect("held until dropped")
    }

    /// The block's bytes, to be written.
    #[must_use]
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.range.as_mut().expect("held until dropped").bytes_mut()
    }
}

impl HostBlock {
    /// Gives the block up for ever: something out of reach may still read it. Its slab is taken out of use.
    pub(crate) fn abandon(&self) {
        self.given_up.store(true, Ordering::Relaxed);
        self.pool.0.retire(self.range().slab());
    }

    /// Whether it was: whoever gave it up has let go of it since.
    pub(crate) fn is_given_up(&self) -> bool {
        self.given_up.load(Ordering::Relaxed)
    }

    /// Whether it, or another block of its slab, was given up.
    pub(crate) fn is_abandoned(&self) -> bool {
        self.range().slab().is_retired()
    }
}

impl Drop for HostBlock {
    fn drop(&mut self) {
        if let Some(range) = self.range.take() {
            self.pool.0.give_back(self.class, range);
        }
    }
}

impl fmt::Debug for HostBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.range().fmt(f)
    }
}

/// The class of a size: multiples of 64 up to 256, then four to a doubling.
pub(crate) const fn class_of(len: usize) -> usize {
    if len <= 4 * ALIGN_BYTES {
        return len.saturating_sub(1) / ALIGN_BYTES;
    }
    let last = len - 1;
    let doubling = last.ilog2() as usize;
    4 * (doubling - 8) + ((last >> (doubling - 2)) & 3) + 4
}

/// The size of a class.
pub(crate) const fn class_bytes(class: usize) -> usize {
    if class < 4 {
        return (class + 1) * ALIGN_BYTES;
    }
    let (doubling, quarter) = (class / 4 + 7, class % 4);
    (quarter + 5) << (doubling - 2)
}

/// The memory this process may use: the least of its cgroup limits and the machine's memory. Read once.
fn memory_limit_bytes() -> usize {
    static LIMIT: OnceLock<usize> = OnceLock::new();
    *LIMIT.get_or_init(|| {
        let machine = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| parse_meminfo(&text));
        let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        // A limit of any ancestor counts. In a container the namespace's root is mounted, so missing paths are skipped.
        let own = groups.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/");
        let v2 = std::path::Path::new(own)
            .ancestors()
            .map(|group| format!("/sys/fs/cgroup{}/memory.max", group.display().to_string().trim_end_matches('/')));
        let v1 = ["/sys/fs/cgroup/memory/memory.limit_in_bytes".to_owned()];
        let limits = v2.chain(v1).filter_map(|path| std::fs::read_to_string(path).ok()?.trim().parse::<usize>().ok());
        limits.chain(machine).min().unwrap_or(1 << 30)
    })
}

fn parse_meminfo(text: &str) -> Option<usize> {
    let kib = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?.trim().strip_suffix("kB")?;
    kib.trim().parse::<usize>().ok()?.checked_mul(1024)
}

/// Locks, also after a panic elsewhere: every critical section here leaves its data whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    #[test]
    fn classes_are_four_to_a_doubling() {
        let sizes: Vec<_> = (0..13).map(class_bytes).collect();
        assert_eq!(sizes, [64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280]);
        for class in 0..200 {
            let bytes = class_bytes(class);
            assert_eq!((class_of(bytes), class_of(bytes + 1)), (class, class + 1), "{bytes}");
            assert_eq!(bytes % ALIGN_BYTES, 0);
        }
        assert_eq!(class_of(0), 0);
        assert_eq!(class_bytes(SMALL_CLASSES - 1), SMALL_BYTES_MAX);
        assert_eq!(class_bytes(SMALL_CLASSES), 5 * MIB / 4, "whole pages from here on");
    }

    #[test]
    fn p1_blocks_are_disjoint_and_come_back_warm() {
        let pool = HostPool::new(None);
        let mut blocks: Vec<_> = [1, 64, 65, 1000, 4096, MIB, MIB + 1].map(|len| pool.alloc(len).unwrap()).into();
        for (mark, block) in blocks.iter_mut().enumerate() {
            assert_eq!(block.range().bytes().as_ptr().addr() % ALIGN_BYTES, 0);
            block.bytes_mut().fill(mark as u8);
        }
        for (mark, block) in blocks.iter().enumerate() {
            assert!(block.range().bytes().iter().all(|byte| *byte == mark as u8), "block {mark} was overwritten");
        }
        let address = blocks[3].range().bytes().as_ptr();
        assert_eq!(pool.stats().recycled, 0);
        drop(blocks);
        assert_eq!(pool.stats().live_bytes, 0);
        let again = pool.alloc(1000).unwrap();
        assert_eq!(again.range().bytes().as_ptr(), address, "the same warm memory");
        assert_eq!(pool.stats().recycled, 1);
    }

    #[test]
    fn p1_the_end_of_a_shared_slab_is_not_lost() {
        let pool = HostPool::new(None);
        let _first = pool.alloc(64).unwrap();
        // Seven more of 1 MiB fit beside the first 64 bytes; the eighth needs a new slab and shelves the rest.
        let _large: Vec<_> = (0..8).map(|_| pool.alloc(MIB).unwrap()).collect();
        assert_eq!(pool.stats().slabs, 2);
        let left = MIB - 64;
        let shelved: usize =
            pool.0.small.iter().flat_map(|list| lock(list).iter().map(SlabRange::len).collect::<Vec<_>>()).sum();
        assert_eq!(shelved, left);
    }

    #[test]
    fn large_blocks_share_a_slab_and_the_largest_have_their_own() {
        let pool = HostPool::new(None);
        let blocks: Vec<_> = (0..12).map(|_| pool.alloc(5 * MIB / 4).unwrap()).collect();
        assert_eq!((pool.stats().slabs, pool.stats().mapped_bytes), (1, ARENA_BYTES));
        assert_eq!((pool.stats().live_bytes, pool.stats().recycled), (15 * MIB, 0));
        let slab = blocks[0].range().slab();
        let file = rustix::fs::fstat(slab.fd().unwrap()).unwrap();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let of_slab = |line: &&str| line.contains("farcall-slab") && line.contains(&format!(" {} ", file.st_ino));
        assert_eq!(maps.lines().filter(of_slab).count(), 1, "populated in parts, and one mapping all the same");
        let _own = pool.alloc(80 * MIB).unwrap();
        assert_eq!((pool.stats().slabs, pool.stats().mapped_bytes), (2, ARENA_BYTES + 80 * MIB));
    }

    /// What was never handed out takes no memory; what is cut is populated, once.
    #[test]
    fn an_arena_takes_memory_as_it_is_handed_out() {
        let taken = |slab: &Slab| rustix::fs::fstat(slab.fd().unwrap()).unwrap().st_blocks * 512;
        let pool = HostPool::new(None);
        let first = pool.alloc(2 * MIB).unwrap();
        let slab = Arc::clone(first.range().slab());
        let populated = |len| {
            // As this machine does it: in huge pages, or not at all if the kernel does not know how.
            let mut alone = Slab::create(ARENA_BYTES).unwrap();
            alone.prefer_huge_pages();
            alone.split_front(len).unwrap().populate_end(len).unwrap();
            taken(alone.slab())
        };
        assert_eq!(taken(&slab), populated(2 * MIB));
        // 2 to 4 MiB are used, and then free.
        drop(pool.alloc(2 * MIB).unwrap());
        pool.trim();
        let second = pool.alloc(3 * MIB).unwrap();
        assert_eq!((second.range().slab().id(), second.range().offset()), (slab.id(), 2 * MIB));
        assert_eq!((taken(&slab), pool.stats().recycled), (populated(5 * MIB), 0), "a part of it is new");
        drop(second);
        pool.trim();
        let third = pool.alloc(5 * MIB / 2).unwrap();
        assert_eq!((third.range().slab().id(), third.range().offset()), (slab.id(), 2 * MIB));
        assert_eq!((taken(&slab), pool.stats().recycled), (populated(5 * MIB), 1), "another size, and warm");
    }

    /// P2. Blocks above 64 MiB: nobody touches their pages.
    #[test]
    fn p2_idle_large_slabs_are_bounded_and_the_oldest_go_first() {
        let pool = HostPool::new(Some(192 * MIB));
        let [a, b, c] = [80, 96, 112].map(|mib| pool.alloc(mib * MIB).unwrap());
        let watch = [&a, &b, &c].map(|block| Arc::downgrade(block.range().slab()));
        drop(b);
        drop(a);
        assert_eq!(pool.stats().idle_bytes, 176 * MIB);
        drop(c);
        assert_eq!(watch.map(|slab| slab.strong_count()), [1, 0, 1], "b became idle first");
        assert_eq!((pool.stats().slabs, pool.stats().mapped_bytes), (2, 192 * MIB));
        drop(pool.alloc(224 * MIB).unwrap());
        assert_eq!(
            pool.stats().mapped_bytes,
            0,
            "one above the limit by itself is not kept, and pushed the others out"
        );
    }

    #[test]
    fn p2_an_arena_is_unmapped_once_it_is_unused_and_more_than_may_be_idle() {
        let pool = HostPool::new(Some(6 * MIB));
        let [a, b, c] = [2, 3, 4].map(|mib| pool.alloc(mib * MIB).unwrap());
        drop(b);
        drop(a);
        assert_eq!(pool.stats().slabs, 1);
        drop(c);
        assert_eq!((pool.stats().slabs, pool.stats().mapped_bytes), (0, 0), "9 MiB of it were used");
        let address = |block: &HostBlock| block.range().bytes().as_ptr();
        let first = pool.alloc(3 * MIB).unwrap();
        let start = address(&first);
        drop(first);
        assert_eq!(address(&pool.alloc(3 * MIB).unwrap()), start, "3 MiB stay");
    }

    #[test]
    fn trim_unmaps_what_nobody_uses() {
        let pool = HostPool::new(None);
        let small = pool.alloc(100).unwrap();
        let large = pool.alloc(2 * MIB).unwrap();
        drop(pool.alloc(3 * MIB).unwrap());
        drop(pool.alloc(80 * MIB).unwrap());
        assert_eq!(pool.trim(), 80 * MIB, "the shared slab and the arena are in use");
        drop(large);
        assert_eq!(pool.trim(), ARENA_BYTES);
        drop(small);
        assert_eq!(pool.trim(), SHARED_SLAB_BYTES);
        assert_eq!((pool.stats().slabs, pool.stats().mapped_bytes), (0, 0));
        drop(pool.alloc(100).unwrap());
        drop(pool.alloc(2 * MIB).unwrap());
        assert_eq!(pool.stats().slabs, 2, "and works on after it");
    }

    /// In a process of its own, where no file may be as large as an arena; `ulimit` counts in units of 512 or 1,024 bytes.
    #[test]
    fn without_room_for_an_arena_a_block_has_a_slab_of_its_own() {
        const NAME: &str = "pool::tests::without_room_for_an_arena_a_block_has_a_slab_of_its_own";
        if std::env::var_os("TEST_LIMITED").is_none() {
            let shell = format!("ulimit -f 65536 && exec \"$0\" --exact {NAME}");
            let mut limited = std::process::Command::new("sh");
            limited.arg("-c").arg(shell).arg(std::env::current_exe().unwrap()).env("TEST_LIMITED", "1");
            let output = limited.output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success() && text.contains("1 passed"), "{output:?}");
            return;
        }
        let pool = HostPool::new(None);
        let [first, second] = [2, 3].map(|mib| pool.alloc(mib * MIB).unwrap());
        assert_eq!((pool.stats().slabs, pool.stats().mapped_bytes), (2, 5 * MIB));
        drop(first);
        let again = pool.alloc(2 * MIB).unwrap();
        assert_eq!((pool.stats().slabs, pool.stats().recycled), (2, 1));
        let error = pool.alloc(100 * MIB).unwrap_err();
        assert!(matches!(error, DeviceError::OutOfMemory { .. }), "{error}");
        drop((again, second));
        assert_eq!((pool.trim(), pool.stats().slabs), (5 * MIB, 0));
    }

    /// In a process of its own, as descriptors are the process's: what nobody can map is not what later blocks are cut from.
    #[test]
    fn without_descriptors_a_block_has_a_slab_of_its_own() {
        const NAME: &str = "pool::tests::without_descriptors_a_block_has_a_slab_of_its_own";
        if std::env::var_os("TEST_LIMITED").is_none() {
            let mut alone = std::process::Command::new(std::env::current_exe().unwrap());
            let output = alone.args(["--exact", NAME]).env("TEST_LIMITED", "1").output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success() && text.contains("1 passed"), "{output:?}");
            return;
        }
        let pool = HostPool::new(None);
        let permits: Vec<_> = std::iter::from_fn(crate::DescriptorPermit::take).collect();
        let alone = pool.alloc(2 * MIB).unwrap();
        assert!(alone.range().slab().fd().is_err(), "{alone:?}");
        assert_eq!(alone.range().slab().len(), 2 * MIB);
        drop(permits);
        let shared = pool.alloc(2 * MIB).unwrap();
        assert!(shared.range().slab().fd().is_ok() && shared.range().slab().len() == ARENA_BYTES);
        assert_eq!(pool.stats().slabs, 2);
    }

    /// Of a block that something out of reach reads, nothing is handed out again, nor of its slab; which goes with the last block.
    #[test]
    fn p1_an_abandoned_block_is_never_used_again() {
        let pool = HostPool::new(None);
        for len in [100, 2 * MIB, 40 * MIB] {
            let [abandoned, other, free] = [(); 3].map(|()| pool.alloc(len).unwrap());
            let watch = Arc::downgrade(abandoned.range().slab());
            drop(free);
            abandoned.abandon();
            abandoned.abandon();
            drop(abandoned);
            let fresh = pool.alloc(len).unwrap();
            assert!(!watch.upgrade().is_some_and(|slab| Arc::ptr_eq(&slab, fresh.range().slab())), "{len}");
            drop(other);
            assert!(watch.upgrade().is_none(), "{len}: unmapped with its last block");
            drop(fresh);
            pool.trim();
            assert_eq!((pool.stats().slabs, pool.stats().mapped_bytes, pool.stats().live_bytes), (0, 0, 0));
        }
    }

    #[test]
    fn more_than_the_machine_has_is_refused_before_mapping() {
        let pool = HostPool::new(None);
        let error = pool.alloc(1 << 50).unwrap_err();
        assert!(
            matches!(error, DeviceError::OutOfMemory { device: Device::HOST, want_bytes: 0x4_0000_0000_0000, .. }),
            "{error}"
        );
        assert_eq!(pool.stats().slabs, 0);
    }

    #[test]
    fn p1_holds_with_threads() {
        let pool = HostPool::new(Some(4 * MIB));
        std::thread::scope(|scope| {
            for thread in 0..4_usize {
                let pool = pool.clone();
                scope.spawn(move || {
                    for round in 0..200 {
                        let len = if round % 10 == 0 { (5 + round / 10) * MIB / 4 } else { 64 << (round % 8) };
                        let mut block = pool.alloc(len).unwrap();
                        let mark = (thread * 50 + round % 50) as u8;
                        block.bytes_mut().fill(mark);
                        assert!(block.range().bytes().iter().all(|byte| *byte == mark));
                    }
                });
            }
        });
        assert_eq!(pool.stats().live_bytes, 0);
        pool.trim();
        assert_eq!((pool.stats().slabs, pool.stats().mapped_bytes), (0, 0));
    }

    #[test]
    fn the_machines_memory_is_read() {
        assert_eq!(parse_meminfo("MemTotal:       24683888 kB\nMemFree: 1 kB\n"), Some(24_683_888 * 1024));
        assert!(memory_limit_bytes() >= 64 * MIB);
    }
}
