//! Recycles host memory by size class, so that an allocation of warm memory costs a lock and no system call.
//!
//! Classes are four to a doubling, so at most a quarter is lost to rounding. Classes up to 1 MiB are cut from shared slabs of 8 MiB;
//! a larger block is a slab of its own.
//! Invariant P1: a block is in one place: with its holder, in its class's free list, or not yet cut from a slab.
//! Invariant P2: large slabs that nobody uses are kept mapped up to `idle_bytes_max` in all; beyond it the oldest go first.
//! Invariant P3: no slab is mapped or unmapped under a lock that an allocation of warm memory takes.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::fork::is_forked_child;
use crate::memory::{ALIGN_BYTES, Slab, SlabRange};
use crate::{Device, DeviceError};

/// The largest class that is cut from shared slabs.
const SMALL_BYTES_MAX: usize = 1 << 20;
/// The size of a shared slab.
const SHARED_SLAB_BYTES: usize = 8 << 20;
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
    idle_bytes_max: usize,
    counters: Counters,
}

/// Large slabs that nobody uses, by class; within a class the oldest first.
#[derive(Default)]
struct Idle {
    by_class: HashMap<usize, VecDeque<(u64, SlabRange)>>,
    bytes: usize,
    /// Counts slabs that became idle: their age.
    clock: u64,
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
    /// Their bytes.
    pub mapped_bytes: usize,
    /// Bytes handed out, rounded to the size class.
    pub live_bytes: usize,
    /// Bytes mapped and not handed out.
    pub idle_bytes: usize,
    /// Blocks handed out since the start.
    pub allocations: u64,
    /// Those among them that were used before: warm memory.
    pub recycled: u64,
}

impl HostPool {
    /// A pool that keeps up to `idle_bytes_max` of unused large slabs; by default a quarter of the memory of this process's
    /// cgroup, or of the machine.
    #[must_use]
    pub fn new(idle_bytes_max: Option<usize>) -> Self {
        Self(Arc::new(Shared {
            small: std::array::from_fn(|_| Mutex::default()),
            uncut: Mutex::default(),
            idle: Mutex::default(),
            idle_bytes_max: idle_bytes_max.unwrap_or_else(|| memory_limit_bytes() / 4),
            counters: Counters::default(),
        }))
    }

    /// A block of at least `len` bytes, aligned to 64; its contents are whatever its last user left.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] if `len` is above the memory of the cgroup or machine, or the system has none left;
    /// [`DeviceError::ForkedProcess`].
    /// # Cost
    /// Warm memory: one lock held for a few instructions. Else a slab is mapped; a large one is populated, about 0.4 ms a MiB, up to 64 MiB.
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
        let mut freed =
            std::mem::take(&mut *lock(&self.0.idle)).by_class.into_values().flatten().map(|(_, range)| range).collect();
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

    /// A slab of a large class, and whether it was used before.
    fn take_large(&self, class: usize) -> Result<(SlabRange, bool), DeviceError> {
        let recycled = {
            let mut idle = lock(&self.idle);
            // The newest of the class: its pages are the most likely to be in a cache.
            let recycled = idle.by_class.get_mut(&class).and_then(VecDeque::pop_back);
            if let Some((_, range)) = &recycled {
                idle.bytes -= range.len();
            }
            recycled
        };
        if let Some((_, range)) = recycled {
            return Ok((range, true));
        }
        let mut range = self.map(class_bytes(class))?;
        if range.len() <= POPULATED_BYTES_MAX
            && let Err(error) = range.populate()
        {
            self.unmap(vec![range]);
            return Err(error);
        }
        Ok((range, false))
    }

    fn give_back(&self, class: usize, range: SlabRange) {
        self.counters.live_bytes.fetch_sub(range.len(), Ordering::Relaxed);
        if range.slab().is_retired() {
            return;
        }
        if class < SMALL_CLASSES {
            lock(&self.small[class]).push(range);
            return;
        }
        let mut evicted = Vec::new();
        {
            let mut idle = lock(&self.idle);
            idle.clock += 1;
            idle.bytes += range.len();
            let age = idle.clock;
            idle.by_class.entry(class).or_default().push_back((age, range));
            while idle.bytes > self.idle_bytes_max
                && let Some(oldest) = idle.pop_oldest()
            {
                evicted.push(oldest);
            }
        }
        self.unmap(evicted);
    }

    /// Takes a slab out of use: what of it is free is dropped now, the rest as it comes back, the last one unmaps it. Its bytes
    /// do not count any more.
    fn retire(&self, slab: &Arc<Slab>) {
        if !slab.retire() {
            return;
        }
        let retired = |range: &SlabRange| Arc::ptr_eq(range.slab(), slab);
        let mut freed: Vec<_> = lock(&self.uncut).take_if(|rest| retired(rest)).into_iter().collect();
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

impl Idle {
    fn pop_oldest(&mut self) -> Option<SlabRange> {
        let front_age = |queue: &VecDeque<(u64, SlabRange)>| queue.front().map(|(age, _)| *age);
        let queue =
            self.by_class.values_mut().filter(|queue| !queue.is_empty()).min_by_key(|queue| front_age(queue))?;
        let (_, range) = queue.pop_front()?;
        self.bytes -= range.len();
        Some(range)
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
    fn p2_idle_large_slabs_are_bounded_and_the_oldest_go_first() {
        let pool = HostPool::new(Some(6 * MIB));
        let [a, b, c] = [2 * MIB, 3 * MIB, 4 * MIB].map(|len| pool.alloc(len).unwrap());
        let watch = [&a, &b, &c].map(|block| Arc::downgrade(block.range().slab()));
        drop(b);
        drop(a);
        assert_eq!(pool.stats().idle_bytes, 5 * MIB);
        drop(c);
        assert_eq!(watch.map(|slab| slab.strong_count()), [1, 0, 1], "b became idle first");
        assert_eq!((pool.stats().slabs, pool.stats().mapped_bytes), (2, 6 * MIB));
        drop(pool.alloc(9 * MIB).unwrap());
        assert_eq!(
            pool.stats().mapped_bytes,
            0,
            "one above the limit by itself is not kept, and pushed the others out"
        );
    }

    #[test]
    fn trim_unmaps_what_nobody_uses() {
        let pool = HostPool::new(None);
        let small = pool.alloc(100).unwrap();
        drop(pool.alloc(2 * MIB).unwrap());
        assert_eq!(pool.trim(), 2 * MIB, "the shared slab is in use");
        drop(small);
        assert_eq!(pool.trim(), SHARED_SLAB_BYTES);
        assert_eq!((pool.stats().slabs, pool.stats().mapped_bytes), (0, 0));
        drop(pool.alloc(100).unwrap());
        assert_eq!(pool.stats().slabs, 1, "and works on after it");
    }

    /// Of a block that something out of reach reads, nothing is handed out again, nor of its slab; which goes with the last block.
    #[test]
    fn p1_an_abandoned_block_is_never_used_again() {
        let pool = HostPool::new(None);
        for len in [100, 2 * MIB] {
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
                        let len = if round % 50 == 0 { 2 * MIB } else { 64 << (round % 8) };
                        let mut block = pool.alloc(len).unwrap();
                        let mark = (thread * 50 + round % 50) as u8;
                        block.bytes_mut().fill(mark);
                        assert!(block.range().bytes().iter().all(|byte| *byte == mark));
                    }
                });
            }
        });
        assert_eq!(pool.stats().live_bytes, 0);
    }

    #[test]
    fn the_machines_memory_is_read() {
        assert_eq!(parse_meminfo("MemTotal:       24683888 kB\nMemFree: 1 kB\n"), Some(24_683_888 * 1024));
        assert!(memory_limit_bytes() >= 64 * MIB);
    }
}
