//! Arenas: slabs that large blocks are cut from, so that many of them cost one descriptor and one mapping, here and at each peer.
//!
//! This is their free space; [`Idle`](super::idle::Idle) decides what comes back to it. Nothing is mapped, unmapped or populated here.
//! Invariant A1: every byte of an arena is in one free range, or with whoever took it. Free neighbours are one range.
//! Invariant A2: a block is cut from the front of the shortest free range that holds it, of equal ones the first, so that an
//! arena's untouched end stays untouched for as long as something shorter fits.
//! Invariant A3: from `touched_bytes` on an arena is free and was never handed out: no memory is behind those pages.

use std::collections::{BTreeMap, BTreeSet};

use crate::memory::{Slab, SlabRange};

/// The size of an arena: whole pages, of whatever size those are.
pub(super) const ARENA_BYTES: usize = 128 << 20;

#[derive(Default)]
pub(super) struct Arenas {
    by_slab: BTreeMap<u64, Arena>,
    /// The free ranges: length, slab and offset of each.
    fits: BTreeSet<(usize, u64, usize)>,
    idle_bytes: usize,
}

struct Arena {
    /// By offset.
    free: BTreeMap<usize, SlabRange>,
    touched_bytes: usize,
}

/// A block that was cut.
#[derive(Debug)]
pub(super) struct Cut {
    pub(super) range: SlabRange,
    /// So many bytes at its end were never handed out: their pages are still to be populated.
    pub(super) untouched_bytes: usize,
}

impl Arenas {
    /// Adds a slab, whole and untouched.
    pub(super) fn add(&mut self, slab: SlabRange) {
        assert_eq!(slab.len(), ARENA_BYTES, "arenas are of one size");
        self.by_slab.insert(slab.slab().id(), Arena { free: BTreeMap::new(), touched_bytes: 0 });
        self.free(slab);
    }

    /// Cuts a block of `len` bytes (A2); `None` if no free range is as long.
    pub(super) fn take(&mut self, len: usize) -> Option<Cut> {
        let fit = *self.fits.range((len, 0, 0)..).next()?;
        self.fits.remove(&fit);
        let (_, slab, offset) = fit;
        let arena = self.by_slab.get_mut(&slab)?;
        let mut rest = arena.free.remove(&offset)?;
        let range = rest.split_front(len)?;
        if !rest.is_empty() {
            self.fits.insert((rest.len(), slab, rest.offset()));
            arena.free.insert(rest.offset(), rest);
        }
        let untouched_bytes = (offset + len).saturating_sub(arena.touched_bytes);
        arena.touched_bytes += untouched_bytes;
        self.idle_bytes -= len - untouched_bytes;
        Some(Cut { range, untouched_bytes })
    }

    /// Takes back a block that is not needed any more.
    ///
    /// # Errors
    /// The range itself, if it is of no arena here.
    pub(super) fn put(&mut self, range: SlabRange) -> Result<(), SlabRange> {
        self.put_back(Cut { range, untouched_bytes: 0 })
    }

    /// Takes back a block that was not populated.
    ///
    /// # Errors
    /// Its range, if it is of no arena here.
    pub(super) fn put_back(&mut self, cut: Cut) -> Result<(), SlabRange> {
        let Cut { range, untouched_bytes } = cut;
        let Some(arena) = self.by_slab.get_mut(&range.slab().id()) else { return Err(range) };
        self.idle_bytes += range.len();
        // Unless something behind it was handed out meanwhile: then its pages come as they are written.
        if arena.touched_bytes == range.offset() + range.len() {
            arena.touched_bytes -= untouched_bytes;
            self.idle_bytes -= untouched_bytes;
        }
        self.free(range);
        Ok(())
    }

    /// Removes an arena of which nothing is in use.
    pub(super) fn take_unused(&mut self) -> Option<SlabRange> {
        let &(_, slab, offset) = self.fits.last().filter(|(len, ..)| *len == ARENA_BYTES)?;
        self.fits.pop_last();
        let mut arena = self.by_slab.remove(&slab)?;
        self.idle_bytes -= arena.touched_bytes;
        arena.free.remove(&offset)
    }

    /// Removes an arena with its free ranges. What of it is in use comes back in vain.
    pub(super) fn retire(&mut self, slab: &Slab) -> Vec<SlabRange> {
        let Some(arena) = self.by_slab.remove(&slab.id()) else { return Vec::new() };
        for (offset, range) in &arena.free {
            self.fits.remove(&(range.len(), slab.id(), *offset));
            let touched_bytes = arena.touched_bytes.saturating_sub(*offset).min(range.len());
            self.idle_bytes -= touched_bytes;
        }
        arena.free.into_values().collect()
    }

    /// Bytes that were handed out and are free now: memory that is behind free ranges.
    pub(super) fn idle_bytes(&self) -> usize {
        self.idle_bytes
    }

    /// Adds a free range and joins it with its neighbours (A1).
    fn free(&mut self, mut range: SlabRange) {
        let slab = range.slab().id();
        let free = &mut self.by_slab.get_mut(&slab).expect("an arena that was added").free;
        let before = free.range(..range.offset()).next_back().map(|(offset, before)| (*offset, before.len()));
        if let Some((offset, len)) = before.filter(|(offset, len)| offset + len == range.offset()) {
            self.fits.remove(&(len, slab, offset));
            range = free.remove(&offset).expect("it was found").join(range).expect("it ends where this one starts");
        }
        if let Some(after) = free.remove(&(range.offset() + range.len())) {
            self.fits.remove(&(after.len(), slab, after.offset()));
            range = range.join(after).expect("it starts where this one ends");
        }
        self.fits.insert((range.len(), slab, range.offset()));
        free.insert(range.offset(), range);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    /// So many arenas, of address space alone: no test here touches their pages.
    fn arenas(count: usize) -> Arenas {
        let mut arenas = Arenas::default();
        (0..count).for_each(|_| arenas.add(Slab::create(ARENA_BYTES).unwrap()));
        arenas
    }

    fn take(arenas: &mut Arenas, mib: usize) -> SlabRange {
        arenas.take(mib * MIB).expect("it fits").range
    }

    /// Length and offset of each free range in MiB, the shortest first.
    fn free(arenas: &Arenas) -> Vec<(usize, usize)> {
        let ranges = arenas.by_slab.values().flat_map(|arena| &arena.free);
        let mut found: Vec<_> = ranges.map(|(offset, range)| (range.len() / MIB, offset / MIB)).collect();
        found.sort_unstable();
        let fits: Vec<_> = arenas.fits.iter().map(|(len, _, offset)| (len / MIB, offset / MIB)).collect();
        assert_eq!(found, fits, "both name the same ranges");
        found
    }

    #[test]
    fn a1_neighbours_are_joined_in_every_order() {
        for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
            let mut arenas = arenas(1);
            let mut blocks = [2, 3, 4].map(|mib| Some(take(&mut arenas, mib)));
            let _rest = take(&mut arenas, 119);
            assert_eq!(free(&arenas), []);
            for block in order {
                arenas.put(blocks[block].take().unwrap()).unwrap();
            }
            assert_eq!(free(&arenas), [(9, 0)], "{order:?}");
        }
    }

    #[test]
    fn a2_the_shortest_that_holds_it_is_cut_and_of_equal_ones_the_first() {
        let mut arenas = arenas(1);
        let mut blocks: Vec<_> = [5, 1, 3, 1, 3, 1].map(|mib| Some(take(&mut arenas, mib))).into();
        for block in [0, 4, 2] {
            arenas.put(blocks[block].take().unwrap()).unwrap();
        }
        assert_eq!(free(&arenas), [(3, 6), (3, 10), (5, 0), (114, 14)]);
        let found: Vec<_> = [3, 2, 4].map(|mib| take(&mut arenas, mib)).into();
        assert_eq!(found.iter().map(|range| range.offset() / MIB).collect::<Vec<_>>(), [6, 10, 0]);
        assert_eq!(free(&arenas), [(1, 4), (1, 12), (114, 14)], "the untouched end is as it was");
        assert!(arenas.take(115 * MIB).is_none(), "no range is as long, although all are together");
    }

    #[test]
    fn a3_only_what_was_never_handed_out_is_untouched() {
        let mut arenas = arenas(1);
        let untouched = |cut: Option<Cut>| {
            let cut = cut.expect("it fits");
            (cut.untouched_bytes / MIB, cut.range)
        };
        let (fresh, first) = untouched(arenas.take(4 * MIB));
        assert_eq!((fresh, arenas.idle_bytes()), (4, 0));
        arenas.put(first).unwrap();
        assert_eq!(arenas.idle_bytes(), 4 * MIB);
        let (fresh, used) = untouched(arenas.take(3 * MIB));
        assert_eq!((fresh, arenas.idle_bytes()), (0, MIB), "cut from what was used");
        let (fresh, both) = untouched(arenas.take(6 * MIB));
        assert_eq!((fresh, both.offset(), arenas.idle_bytes()), (5, 3 * MIB, 0), "a part was used");
        arenas.put(used).unwrap();
        arenas.put(both).unwrap();
        assert_eq!(arenas.idle_bytes(), 9 * MIB);
        drop(arenas.take_unused().expect("nothing is in use"));
        assert_eq!((arenas.idle_bytes(), arenas.fits.len(), arenas.by_slab.len()), (0, 0, 0));
    }

    #[test]
    fn a3_what_could_not_be_populated_is_untouched_again() {
        let mut arenas = arenas(1);
        let first = arenas.take(4 * MIB).unwrap();
        arenas.put_back(first).unwrap();
        assert_eq!((arenas.idle_bytes(), free(&arenas)), (0, vec![(128, 0)]));
        let [first, second] = [4, 2].map(|mib| arenas.take(mib * MIB).unwrap());
        assert_eq!((first.untouched_bytes, second.untouched_bytes), (4 * MIB, 2 * MIB));
        arenas.put_back(first).unwrap();
        assert_eq!(arenas.idle_bytes(), 4 * MIB, "it counts: what is behind it was handed out meanwhile");
        arenas.put(second.range).unwrap();
        assert_eq!(arenas.take(7 * MIB).unwrap().untouched_bytes, MIB);
    }

    #[test]
    fn an_arena_is_unused_once_it_is_one_range_again() {
        let mut arenas = arenas(2);
        let [first, second] = [100, 28].map(|mib| take(&mut arenas, mib));
        let watch = std::sync::Arc::downgrade(first.slab());
        assert!(arenas.take_unused().is_some() && arenas.take_unused().is_none(), "the other one");
        arenas.put(first).unwrap();
        assert!(arenas.take_unused().is_none(), "the second block is in use");
        arenas.put(second).unwrap();
        assert!(arenas.take_unused().is_some_and(|slab| slab.len() == ARENA_BYTES));
        assert!(watch.upgrade().is_none(), "nothing here holds it");
    }

    #[test]
    fn of_a_retired_arena_nothing_is_handed_out_or_taken_back() {
        let mut arenas = arenas(1);
        let [first, second] = [10, 20].map(|mib| take(&mut arenas, mib));
        arenas.put(first).unwrap();
        let slab = std::sync::Arc::clone(second.slab());
        assert_eq!(arenas.retire(&slab).iter().map(|range| range.len() / MIB).collect::<Vec<_>>(), [10, 98]);
        assert_eq!((arenas.idle_bytes(), free(&arenas)), (0, vec![]));
        assert!(arenas.take(MIB).is_none());
        arenas.put(second).expect_err("of no arena any more");
        assert!(arenas.retire(&slab).is_empty());
    }
}
