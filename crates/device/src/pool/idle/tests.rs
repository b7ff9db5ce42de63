use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd;
use std::sync::{Arc, Weak};

use super::super::arenas::ARENA_BYTES;
use super::super::{ARENA_BLOCK_BYTES_MAX, SMALL_CLASSES, class_bytes, class_of};
use super::*;

const MIB: usize = 1 << 20;

/// A block as the pool gets one, unpopulated: address space alone. Also how much of it was never handed out, and whether an arena
/// was mapped for it.
fn alloc(idle: &mut Idle, class: usize) -> (Cut, bool) {
    let len = class_bytes(class);
    let whole = |range| Cut { range, untouched_bytes: 0 };
    let found = idle.take(class).map(whole);
    if len > ARENA_BLOCK_BYTES_MAX {
        return (found.unwrap_or_else(|| whole(Slab::create(len).unwrap())), false);
    }
    if let Some(found) = found.or_else(|| idle.cut(len)) {
        return (found, false);
    }
    (idle.cut_fresh(Slab::create(ARENA_BYTES).unwrap(), len).expect("an arena holds four of the largest"), true)
}

fn block(idle: &mut Idle, mib: usize) -> SlabRange {
    alloc(idle, class_of(mib * MIB)).0.range
}

fn put(idle: &mut Idle, range: SlabRange) -> usize {
    idle.put(class_of(range.len()), range).iter().map(SlabRange::len).sum()
}

/// "Few large memfd slabs."
#[test]
fn a_thousand_blocks_of_2_mib_cost_sixteen_descriptors_and_mappings() {
    let mut idle = Idle::new(usize::MAX);
    let blocks: Vec<_> = (0..1000).map(|_| block(&mut idle, 2)).collect();
    let slabs: BTreeMap<u64, _> = blocks.iter().map(|range| (range.slab().id(), Arc::clone(range.slab()))).collect();
    assert_eq!(slabs.len(), 16);
    let inode = |slab: &Arc<Slab>| rustix::fs::fstat(slab.fd().unwrap()).unwrap().st_ino;
    let inodes: BTreeSet<u64> = slabs.values().map(inode).collect();
    // Other tests of this process have slabs, too, and come and go meanwhile.
    let open = std::fs::read_dir("/proc/self/fd").unwrap().filter_map(Result::ok).filter(|entry| {
        std::fs::metadata(entry.path()).is_ok_and(|file| inodes.contains(&std::os::unix::fs::MetadataExt::ino(&file)))
    });
    assert_eq!(open.count(), 16);
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let of_slab = |line: &&str| {
        let inode = line.split_whitespace().nth(4).and_then(|inode| inode.parse().ok());
        line.contains("memfd:farcall-slab") && inode.is_some_and(|inode| inodes.contains(&inode))
    };
    assert_eq!(maps.lines().filter(of_slab).count(), 16);
    for slab in slabs.values() {
        assert_eq!(rustix::fs::fstat(slab.fd().unwrap().as_fd()).unwrap().st_blocks, 0, "no page was touched");
    }
}

#[test]
fn the_newest_block_of_a_class_is_taken_and_other_sizes_do_not_disturb_it() {
    let mut idle = Idle::new(usize::MAX);
    let [first, second] = [(); 2].map(|()| block(&mut idle, 2));
    let newest = second.offset();
    put(&mut idle, first);
    put(&mut idle, second);
    let _other = block(&mut idle, 3);
    assert_eq!(block(&mut idle, 2).offset(), newest);
    assert_eq!(idle.by_class[&class_of(2 * MIB)].len(), 1, "there was room for 3 MiB beside them");
}

#[test]
fn i1_beyond_the_bound_the_oldest_slabs_go_first() {
    let mut idle = Idle::new(96 * MIB);
    let slabs = [40, 48, 56].map(|mib| block(&mut idle, mib));
    let [a, b, c] = slabs;
    assert_eq!((put(&mut idle, b), put(&mut idle, a), idle.bytes()), (0, 0, 88 * MIB));
    assert_eq!((put(&mut idle, c), idle.bytes()), (48 * MIB, 96 * MIB), "b became idle first");
    let large = block(&mut idle, 112);
    assert_eq!((put(&mut idle, large), idle.bytes()), (208 * MIB, 0), "by itself above the bound");
}

/// What of arenas cannot be unmapped stays, and is found by other sizes; it goes as soon as its arena is unused.
#[test]
fn i1_of_arenas_all_goes_that_is_not_beside_blocks_in_use() {
    let mut idle = Idle::new(40 * MIB);
    let mut blocks: Vec<_> = (0..8).map(|_| block(&mut idle, 32)).collect();
    let first = Arc::downgrade(blocks[0].slab());
    let kept = blocks.remove(0);
    let mut freed: Vec<_> = (0..3).map(|_| put(&mut idle, blocks.remove(0))).collect();
    assert_eq!((freed, idle.bytes()), (vec![0; 3], 96 * MIB), "beside a block in use");
    assert_eq!(idle.block_bytes, 0, "in the free space");
    freed = blocks.drain(..).map(|range| put(&mut idle, range)).collect();
    assert_eq!(freed, [0, 0, 0, ARENA_BYTES], "the other arena was unused at last");
    assert_eq!(idle.bytes(), 96 * MIB);
    let beside = block(&mut idle, 32);
    assert!(Arc::ptr_eq(beside.slab(), &first.upgrade().expect("mapped")));
    put(&mut idle, beside);
    assert_eq!((put(&mut idle, kept), idle.bytes(), first.strong_count()), (ARENA_BYTES, 0, 0));
}

#[test]
fn i2_idle_blocks_of_other_classes_make_room_before_an_arena_is_mapped() {
    let mut idle = Idle::new(usize::MAX);
    let small: Vec<_> = (0..64).map(|_| block(&mut idle, 2)).collect();
    small.into_iter().for_each(|range| assert_eq!(put(&mut idle, range), 0));
    for _ in 0..4 {
        let (cut, mapped) = alloc(&mut idle, class_of(32 * MIB));
        assert!(!mapped && cut.untouched_bytes == 0, "all of it was used before, in 64 blocks");
        std::mem::forget(cut.range);
    }
    assert!(alloc(&mut idle, class_of(2 * MIB)).1, "and none is left");
}

/// One block at a time, of all sizes in turn, or a few at a time: what stays is bounded by what was in use.
#[test]
fn i2_going_through_sizes_does_not_grow() {
    let mut idle = Idle::new(usize::MAX);
    let classes: Vec<_> = (SMALL_CLASSES..=class_of(ARENA_BLOCK_BYTES_MAX)).collect();
    let mut mapped = 0;
    for class in classes.iter().cycle().take(50 * classes.len()) {
        let (cut, fresh) = alloc(&mut idle, *class);
        mapped += usize::from(fresh);
        put(&mut idle, cut.range);
    }
    assert_eq!(mapped, 1, "one arena does for one block");
    let mut held = VecDeque::new();
    for (round, class) in classes.iter().cycle().take(200 * classes.len()).enumerate() {
        let (cut, fresh) = alloc(&mut idle, *class);
        mapped += usize::from(fresh);
        held.push_back(cut.range);
        if held.len() > 20 {
            let oldest = held.remove(round * 7 % 20).unwrap();
            put(&mut idle, oldest);
        }
    }
    // 20 blocks of 32 MiB would fill 5 arenas; scattered, they may take a few more.
    assert!(mapped <= 10, "{mapped} arenas");
}

#[test]
fn a_retired_slabs_idle_blocks_are_dropped() {
    let mut idle = Idle::new(usize::MAX);
    for mib in [2, 40] {
        let [abandoned, other] = [(); 2].map(|()| block(&mut idle, mib));
        let free = block(&mut idle, mib);
        let in_arena = Arc::ptr_eq(free.slab(), other.slab());
        let watch = Arc::downgrade(other.slab());
        put(&mut idle, free);
        put(&mut idle, other);
        let slab = Arc::clone(abandoned.slab());
        slab.retire();
        assert_eq!(idle.retire(&slab).len(), if in_arena { 3 } else { 0 }, "two blocks and the arena's rest");
        drop((abandoned, slab));
        assert_eq!(watch.upgrade().is_none(), in_arena);
        let left = idle.trim();
        assert_eq!(left.len(), if in_arena { 0 } else { 2 });
        assert_eq!(idle.bytes(), 0);
    }
}

/// What a pool should be, kept apart: which bytes of which slab are whose.
#[derive(Default)]
struct Model {
    /// Slab and offset of each block in use, with its length.
    held: BTreeMap<(u64, usize), usize>,
    /// How far each arena was handed out.
    touched: BTreeMap<u64, usize>,
    slabs: BTreeMap<u64, Weak<Slab>>,
    retired: BTreeSet<u64>,
}

impl Model {
    fn on_alloc(&mut self, cut: &Cut, in_arena: bool, fresh: bool) {
        let (range, slab) = (&cut.range, cut.range.slab().id());
        let (start, end) = (range.offset(), range.offset() + range.len());
        assert!(!self.retired.contains(&slab), "of a retired slab");
        assert!(end <= range.slab().len());
        let others = self.held.range((slab, 0)..(slab, end)).next_back();
        assert!(others.is_none_or(|((_, offset), len)| offset + len <= start), "{range:?} has two holders");
        if in_arena {
            if fresh {
                // I2, by another way: all that is not in use, in every arena.
                assert!(self.longest_gap() < range.len(), "there was room for {range:?}");
            }
            let touched = self.touched.entry(slab).or_default();
            assert_eq!(cut.untouched_bytes, end.saturating_sub(*touched), "{range:?}");
            *touched = end.max(*touched);
        }
        self.held.insert((slab, start), range.len());
        self.slabs.insert(slab, Arc::downgrade(range.slab()));
    }

    fn longest_gap(&self) -> usize {
        let live = |slab: &u64| self.slabs.get(slab).is_some_and(|slab| slab.strong_count() > 0);
        let arenas = self.touched.keys().filter(|slab| live(slab) && !self.retired.contains(slab));
        let gap_of = |slab: &u64| {
            let mut last = 0;
            let held = self.held.range((*slab, 0)..=(*slab, usize::MAX));
            let gaps: Vec<_> =
                held.map(|((_, offset), len)| offset - std::mem::replace(&mut last, offset + len)).collect();
            gaps.into_iter().max().unwrap_or(0).max(ARENA_BYTES - last)
        };
        arenas.map(gap_of).max().unwrap_or(0)
    }

    /// I1: what of slabs in use was handed out before, and is not in use.
    fn idle_in_arenas(&self) -> usize {
        let live = |slab: &u64| self.slabs[slab].strong_count() > 0 && !self.retired.contains(slab);
        let touched: usize = self.touched.iter().filter(|(slab, _)| live(slab)).map(|(_, bytes)| bytes).sum();
        let held = self.held.iter().filter(|((slab, _), _)| self.touched.contains_key(slab) && live(slab));
        touched - held.map(|(_, len)| len).sum::<usize>()
    }
}

/// P1, I1, I2: any order of allocations of any sizes, returns, retirements and trims.
#[test]
fn any_history_leaves_blocks_disjoint_and_memory_bounded() {
    for seed in 1..=40_u64 {
        let mut state = seed;
        let mut random = |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % below
        };
        let bytes_max = [0, 64 * MIB, 512 * MIB, usize::MAX][random(4)];
        let mut idle = Idle::new(bytes_max);
        let mut model = Model::default();
        let mut blocks: Vec<SlabRange> = Vec::new();
        for step in 0..1500 {
            match random(100) {
                0 => drop(idle.trim()),
                1 if !blocks.is_empty() => {
                    let slab = Arc::clone(blocks[random(blocks.len())].slab());
                    if slab.retire() {
                        model.retired.insert(slab.id());
                        drop(idle.retire(&slab));
                    }
                }
                2..50 if !blocks.is_empty() => {
                    let range = blocks.swap_remove(random(blocks.len()));
                    assert!(model.held.remove(&(range.slab().id(), range.offset())).is_some());
                    if !range.slab().is_retired() {
                        drop(idle.put(class_of(range.len()), range));
                    }
                }
                _ if blocks.len() < 60 => {
                    let class = SMALL_CLASSES + random(class_of(48 * MIB) - SMALL_CLASSES + 1);
                    let in_arena = class_bytes(class) <= ARENA_BLOCK_BYTES_MAX;
                    let (cut, fresh) = alloc(&mut idle, class);
                    assert_eq!(cut.range.len(), class_bytes(class));
                    model.on_alloc(&cut, in_arena, fresh);
                    blocks.push(cut.range);
                }
                _ => {}
            }
            let own: usize = idle
                .by_class
                .values()
                .flatten()
                .map(|(_, range)| range)
                .filter(|range| range.slab().len() != ARENA_BYTES)
                .map(SlabRange::len)
                .sum();
            assert_eq!(idle.bytes(), own + model.idle_in_arenas(), "seed {seed}, step {step}");
            if idle.bytes() > bytes_max {
                let only_beside = idle.block_bytes == 0 && idle.arenas.take_unused().is_none();
                assert!(only_beside, "seed {seed}, step {step}: {} bytes are idle", idle.bytes());
            }
        }
        for range in blocks.drain(..).filter(|range| !range.slab().is_retired()) {
            drop(idle.put(class_of(range.len()), range));
        }
        assert!(idle.bytes() <= bytes_max, "nothing is in use");
        drop(idle.trim());
        assert_eq!(idle.bytes(), 0);
        assert!(model.slabs.values().all(|slab| slab.strong_count() == 0), "seed {seed}: all is unmapped");
    }
}
