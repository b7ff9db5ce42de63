//! Large memory that nobody uses: what is handed out next, and how much of it stays mapped.
//!
//! A block that comes back is idle in its class's queue, the newest first out. From there a block of an arena goes on to the arena's
//! free space, when there is no room for another size or the bound is passed. Nothing is mapped, unmapped or populated here: what is
//! to be unmapped is returned.
//! Invariant I1: idle bytes are those of idle blocks, and those of free space that were handed out before. Beyond `bytes_max` go the
//! arenas of which nothing is in use, then the oldest blocks; what stays lies in arenas, beside blocks in use.
//! Invariant I2: a block for which there is no room has none in the free space and the idle blocks of all arenas together either.

use std::collections::{HashMap, VecDeque};

use super::arenas::{Arenas, Cut};
use crate::memory::{Slab, SlabRange};

pub(super) struct Idle {
    /// With the age of each, the oldest first.
    by_class: HashMap<usize, VecDeque<(u64, SlabRange)>>,
    /// Of the blocks in `by_class`.
    block_bytes: usize,
    /// Counts blocks that became idle: their age.
    clock: u64,
    arenas: Arenas,
    bytes_max: usize,
}

impl Idle {
    pub(super) fn new(bytes_max: usize) -> Self {
        Self { by_class: HashMap::new(), block_bytes: 0, clock: 0, arenas: Arenas::default(), bytes_max }
    }

    /// The newest idle block of the class: its pages are the most likely to be in a cache.
    pub(super) fn take(&mut self, class: usize) -> Option<SlabRange> {
        let (_, range) = self.by_class.get_mut(&class)?.pop_back()?;
        self.block_bytes -= range.len();
        Some(range)
    }

    /// A block of an arena's free space, to which the idle blocks of all classes go if there is no room (I2).
    pub(super) fn cut(&mut self, len: usize) -> Option<Cut> {
        self.arenas.take(len).or_else(|| {
            self.coalesce();
            self.arenas.take(len)
        })
    }

    /// A block of an arena that was just mapped.
    pub(super) fn cut_fresh(&mut self, arena: SlabRange, len: usize) -> Option<Cut> {
        self.arenas.add(arena);
        self.arenas.take(len)
    }

    /// Takes a block back; returns what is to be unmapped.
    pub(super) fn put(&mut self, class: usize, range: SlabRange) -> Vec<SlabRange> {
        self.clock += 1;
        self.block_bytes += range.len();
        self.by_class.entry(class).or_default().push_back((self.clock, range));
        let mut evicted = Vec::new();
        while self.bytes() > self.bytes_max {
            if let Some(arena) = self.arenas.take_unused() {
                evicted.push(arena);
            } else if let Some(oldest) = self.pop_oldest() {
                evicted.extend(self.arenas.put(oldest).err());
            } else {
                break;
            }
        }
        evicted
    }

    /// Takes a block back for which the system had no memory; returns what is to be unmapped: all that can be of the arenas.
    pub(super) fn put_back(&mut self, cut: Cut) -> Vec<SlabRange> {
        let own = self.arenas.put_back(cut).err();
        self.coalesce();
        own.into_iter().chain(std::iter::from_fn(|| self.arenas.take_unused())).collect()
    }

    /// Gives up all that nobody uses; returns what is to be unmapped.
    pub(super) fn trim(&mut self) -> Vec<SlabRange> {
        self.coalesce();
        self.block_bytes = 0;
        let own = std::mem::take(&mut self.by_class).into_values().flatten().map(|(_, range)| range);
        own.chain(std::iter::from_fn(|| self.arenas.take_unused())).collect()
    }

    /// Drops what of a slab is idle.
    pub(super) fn retire(&mut self, slab: &Slab) -> Vec<SlabRange> {
        let mut freed = self.arenas.retire(slab);
        for queue in self.by_class.values_mut() {
            for (age, range) in std::mem::take(queue) {
                if range.slab().id() == slab.id() {
                    self.block_bytes -= range.len();
                    freed.push(range);
                } else {
                    queue.push_back((age, range));
                }
            }
        }
        freed
    }

    /// Idle bytes (I1).
    fn bytes(&self) -> usize {
        self.block_bytes + self.arenas.idle_bytes()
    }

    /// Moves the idle blocks of arenas to the free space.
    fn coalesce(&mut self) {
        for queue in self.by_class.values_mut() {
            for (age, range) in std::mem::take(queue) {
                let len = range.len();
                match self.arenas.put(range) {
                    Ok(()) => self.block_bytes -= len,
                    Err(own) => queue.push_back((age, own)),
                }
            }
        }
    }

    fn pop_oldest(&mut self) -> Option<SlabRange> {
        let front_age = |queue: &VecDeque<(u64, SlabRange)>| queue.front().map(|(age, _)| *age);
        let queue =
            self.by_class.values_mut().filter(|queue| !queue.is_empty()).min_by_key(|queue| front_age(queue))?;
        let (_, range) = queue.pop_front()?;
        self.block_bytes -= range.len();
        Some(range)
    }
}

#[cfg(test)]
mod tests;
