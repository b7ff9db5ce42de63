//! The engine of reductions: a tree of fixed shape over each result's elements.
//!
//! Invariant R1: the shape of the tree depends on the shapes alone, so a sum has the same bits whatever the number of threads: the
//! elements of a result are split into chunks, chunks into leaves, a leaf into lanes; each level is joined in pairs.

use bytemuck::Pod;
use farcall_device::DType;

use crate::convert::{Buffer, Cast};
use crate::kernel::{BLOCK, CHUNK, Input, PARALLEL_MIN, for_each_part, map_parts, with_vectors};

/// Elements of a row that are folded side by side, so that the compiler uses vectors and additions do not wait for each other.
const LANES: usize = 16;
/// As many for folds that choose: several blocks of choices become vectors only in a loop that is too long to be unrolled.
const WIDE_LANES: usize = 128;
/// Leaves that are folded side by side where elements are read as they are, and rows likewise: a processor reads the faster from several pages.
const ABREAST: usize = 4;
/// Rows that are folded one after the other, where results lie side by side.
const LEAF_ROWS: usize = 64;

/// How elements `C` become one value.
pub(crate) trait Fold<C>: Sync {
    type Acc: Copy + Send + Sync;
    type Output: Pod + Send;
    /// Whether several blocks are folded side by side: where an element is taken by so little that reading it takes longer.
    const IS_ABREAST: bool = false;
    /// Whether an element is chosen or not, rather than added.
    const IS_CHOICE: bool = false;
    /// Before any element.
    fn empty(&self) -> Self::Acc;
    /// Takes the element at an index among those of the result.
    fn take(&self, acc: &mut Self::Acc, element: C, index: usize);
    /// Of two parts, the earlier first.
    fn join(&self, first: Self::Acc, second: Self::Acc) -> Self::Acc;
    /// The value of `len` elements.
    fn finish(&self, acc: Self::Acc, len: usize) -> Self::Output;
}

/// What is folded: `outer` times `len` times `inner` elements, of which the middle ones become one. The input's layout is permuted to
/// that order.
pub(crate) struct Shape {
    pub(crate) outer: usize,
    pub(crate) len: usize,
    pub(crate) inner: usize,
}

/// Folds the elements of `input`, which are loaded as `C`, to `target`, whose elements have dtype `result`.
pub(crate) fn fold<C: Pod, F: Fold<C>>(
    by: &F,
    input: &Input,
    shape: &Shape,
    (gives, result): (DType, DType),
    reads: &[&[u8]],
    target: &mut [u8],
) {
    let is_parallel = shape.outer * shape.len * shape.inner >= PARALLEL_MIN;
    // Results that one thread computes at a time.
    let per_task = (CHUNK / (shape.len * shape.inner).max(1)).max(1) * shape.inner;
    let size = result.size_bytes();
    let work = |task: usize, target: &mut [u8]| {
        let first = task * per_task / shape.inner;
        let outers = target.len() / size / shape.inner;
        let values: Vec<F::Output> = if shape.inner == 1 {
            rows(by, input, shape.len, first..first + outers, reads, is_parallel)
        } else {
            (first..first + outers).flat_map(|outer| columns(by, input, shape, outer, reads, is_parallel)).collect()
        };
        let mut scratch = <[Buffer; 2]>::default();
        Cast::between(gives, result).run(bytemuck::cast_slice(&values), target, &mut scratch, values.len());
    };
    for_each_part(target, per_task * size, is_parallel, &work);
}

/// Joins values as they come, in pairs of equal weight, without keeping more than one for each power of two.
struct Pairs<A> {
    /// The joined values of 1, 2, 4… of those that came, where they exist.
    levels: Vec<Option<A>>,
}

impl<A> Pairs<A> {
    fn new() -> Self {
        Self { levels: Vec::new() }
    }

    fn push(&mut self, mut value: A, join: impl Fn(A, A) -> A) {
        for level in &mut self.levels {
            match level.take() {
                Some(earlier) => value = join(earlier, value),
                None => {
                    *level = Some(value);
                    return;
                }
            }
        }
        self.levels.push(Some(value));
    }

    /// What is left joined, the shortest last ones first.
    fn finish(self, join: impl Fn(A, A) -> A) -> Option<A> {
        self.levels.into_iter().flatten().reduce(|later, earlier| join(earlier, later))
    }
}

/// One result for each row of `len` elements that follow each other.
fn rows<C: Pod, F: Fold<C>>(
    by: &F,
    input: &Input,
    len: usize,
    range: std::ops::Range<usize>,
    reads: &[&[u8]],
    is_parallel: bool,
) -> Vec<F::Output> {
    if len == 0 {
        return range.map(|_| by.finish(by.empty(), 0)).collect();
    }
    if len <= BLOCK {
        // Several rows a block.
        let mut loader = input.loader(reads);
        let (per_block, mut values) = (BLOCK / len, Vec::with_capacity(range.len()));
        for first in range.clone().step_by(per_block) {
            let count = per_block.min(range.end - first);
            let elements = bytemuck::cast_slice::<u8, C>(loader.load(first * len, count * len));
            values.extend(elements.chunks_exact(len).map(|row| by.finish(leaf(by, row, 0), len)));
        }
        return values;
    }
    let chunk = |row: usize, start: usize| {
        let mut loader = input.loader(reads);
        let mut pairs = Pairs::new();
        let (mut start, end) = (start, (start + CHUNK).min(len));
        if F::IS_ABREAST
            && let Some(elements) = loader.plain(row * len + start, end - start)
        {
            let (groups, _) = bytemuck::cast_slice::<u8, C>(elements).as_chunks::<{ ABREAST * BLOCK }>();
            for group in groups {
                let blocks: [&[C]; ABREAST] = std::array::from_fn(|index| &group[index * BLOCK..(index + 1) * BLOCK]);
                let leaves = if F::IS_CHOICE {
                    leaves::<C, F, ABREAST, WIDE_LANES>(by, blocks, start)
                } else {
                    leaves::<C, F, ABREAST, LANES>(by, blocks, start)
                };
                for leaf in leaves {
                    pairs.push(leaf, |a, b| by.join(a, b));
                }
                start += ABREAST * BLOCK;
            }
        }
        for at in (start..end).step_by(BLOCK) {
            let elements = bytemuck::cast_slice::<u8, C>(loader.load(row * len + at, BLOCK.min(end - at)));
            pairs.push(leaf(by, elements, at), |a, b| by.join(a, b));
        }
        pairs.finish(|a, b| by.join(a, b)).unwrap_or_else(|| by.empty())
    };
    range
        .map(|row| {
            let starts = len.div_ceil(CHUNK);
            let mut pairs = Pairs::new();
            for part in map_parts(starts, is_parallel, |index| chunk(row, index * CHUNK)) {
                pairs.push(part, |a, b| by.join(a, b));
            }
            by.finish(pairs.finish(|a, b| by.join(a, b)).unwrap_or_else(|| by.empty()), len)
        })
        .collect()
}

/// Folds elements by lanes, and the lanes in pairs.
fn leaf<C: Pod, F: Fold<C>>(by: &F, elements: &[C], first: usize) -> F::Acc {
    let [leaf] = if F::IS_CHOICE && elements.len() >= 2 * WIDE_LANES {
        leaves::<C, F, 1, WIDE_LANES>(by, [elements], first)
    } else {
        leaves::<C, F, 1, LANES>(by, [elements], first)
    };
    leaf
}

/// Folds several blocks, which are as long and follow each other, each as [`leaf`] does.
fn leaves<C: Pod, F: Fold<C>, const COUNT: usize, const LANES: usize>(
    by: &F,
    blocks: [&[C]; COUNT],
    first: usize,
) -> [F::Acc; COUNT] {
    let len = blocks[0].len();
    let whole = blocks.map(|block| &block.as_chunks::<LANES>().0[..len / LANES]);
    let mut lanes = with_vectors(
        #[inline(always)]
        || {
            let mut lanes = [[by.empty(); LANES]; COUNT];
            for index in 0..len / LANES {
                for (block, (lanes, whole)) in lanes.iter_mut().zip(&whole).enumerate() {
                    for (lane, (acc, element)) in lanes.iter_mut().zip(&whole[index]).enumerate() {
                        by.take(acc, *element, first + block * len + index * LANES + lane);
                    }
                }
            }
            lanes
        },
    );
    for (index, (lanes, block)) in lanes.iter_mut().zip(blocks).enumerate() {
        let done = len / LANES * LANES;
        for (lane, element) in block[done..].iter().enumerate() {
            by.take(&mut lanes[lane], *element, first + index * len + done + lane);
        }
    }
    lanes.map(|lanes| joined(by, lanes))
}

fn joined<C, F: Fold<C>, const LANES: usize>(by: &F, mut lanes: [F::Acc; LANES]) -> F::Acc {
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for lane in 0..width {
            lanes[lane] = by.join(lanes[lane], lanes[lane + width]);
        }
    }
    lanes[0]
}

/// One result for each of the inner elements, which lie side by side, at one outer index.
fn columns<C: Pod, F: Fold<C>>(
    by: &F,
    input: &Input,
    shape: &Shape,
    outer: usize,
    reads: &[&[u8]],
    is_parallel: bool,
) -> Vec<F::Output> {
    let Shape { len, inner, .. } = *shape;
    let width = inner.min(BLOCK);
    // Rows that a thread takes: whole leaves.
    let rows_per_part = (CHUNK / width).next_multiple_of(LEAF_ROWS).max(LEAF_ROWS);
    let part = |column: usize, first: usize| {
        let width = width.min(inner - column);
        // Narrow rows that follow each other are loaded several at a time.
        let per_load = if width == inner { BLOCK / inner } else { 1 };
        let mut loader = input.loader(reads);
        let join =
            |a: Vec<F::Acc>, b: Vec<F::Acc>| a.into_iter().zip(b).map(|(a, b)| by.join(a, b)).collect::<Vec<_>>();
        let mut pairs = Pairs::new();
        let end = (first + rows_per_part).min(len);
        for leaf_start in (first..end).step_by(LEAF_ROWS) {
            let leaf_end = (leaf_start + LEAF_ROWS).min(end);
            let mut accs = vec![by.empty(); width];
            let mut leaf_start = leaf_start;
            let at = |row: usize| (outer * len + row) * inner + column;
            while leaf_start + ABREAST <= leaf_end && loader.plain(at(leaf_start), width).is_some() {
                let rows: [&[C]; ABREAST] = std::array::from_fn(|index| {
                    bytemuck::cast_slice(loader.plain(at(leaf_start + index), width).unwrap_or_default())
                });
                let [a, b, c, d] = rows;
                with_vectors(
                    #[inline(always)]
                    || {
                        for ((((acc, a), b), c), d) in accs.iter_mut().zip(a).zip(b).zip(c).zip(d) {
                            by.take(acc, *a, leaf_start);
                            by.take(acc, *b, leaf_start + 1);
                            by.take(acc, *c, leaf_start + 2);
                            by.take(acc, *d, leaf_start + 3);
                        }
                    },
                );
                leaf_start += ABREAST;
            }
            for row in (leaf_start..leaf_end).step_by(per_load) {
                let count = per_load.min(leaf_end - row);
                let elements = bytemuck::cast_slice::<u8, C>(loader.load(at(row), count * width));
                for (index, elements) in elements.chunks_exact(width).enumerate() {
                    for (acc, element) in accs.iter_mut().zip(elements) {
                        by.take(acc, *element, row + index);
                    }
                }
            }
            pairs.push(accs, join);
        }
        pairs.finish(join).unwrap_or_else(|| vec![by.empty(); width])
    };
    let tile = |column: usize| {
        let parts = len.div_ceil(rows_per_part);
        let join =
            |a: Vec<F::Acc>, b: Vec<F::Acc>| a.into_iter().zip(b).map(|(a, b)| by.join(a, b)).collect::<Vec<_>>();
        let mut pairs = Pairs::new();
        for part in map_parts(parts, is_parallel, |index| part(column, index * rows_per_part)) {
            pairs.push(part, join);
        }
        let accs = pairs.finish(join).unwrap_or_else(|| vec![by.empty(); width.min(inner - column)]);
        accs.into_iter().map(|acc| by.finish(acc, len)).collect::<Vec<_>>()
    };
    map_parts(inner.div_ceil(width), is_parallel, |index| tile(index * width)).concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r1_pairs_are_joined_in_a_tree_of_fixed_shape() {
        let tree = |count: usize| {
            let join = |a: String, b: String| format!("({a}{b})");
            let mut pairs = Pairs::new();
            (0..count).for_each(|index| pairs.push(index.to_string(), join));
            pairs.finish(join)
        };
        assert_eq!(tree(0), None);
        assert_eq!(tree(1).unwrap(), "0");
        assert_eq!(tree(5).unwrap(), "(((01)(23))4)");
        assert_eq!(tree(7).unwrap(), "(((01)(23))((45)6))");
    }
}
