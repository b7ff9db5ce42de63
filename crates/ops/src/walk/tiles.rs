//! Transposed copies, by tiles of whole cache lines on both sides.
//!
//! A row of tiles is as wide as a page: each page of the source is read to its end, as many at once as a line has elements, and
//! the pages of the target that take a line of each tile are few enough to stay in the TLB until the next lines come.

use super::{Dim, Walk};
use crate::memory::{LINE, Out, PAGE, Tile, ask};

/// Elements of the shortest side that is worth tiles.
const SIDE_MIN: usize = 16;

/// Tiles that are asked for ahead.
const AHEAD: usize = 2;

/// A view whose elements follow each other in the storage along another dimension than the innermost.
pub(crate) struct Tiles<'a> {
    walk: &'a Walk,
    /// Bytes of an element.
    size: usize,
    /// That dimension.
    column: usize,
}

impl Walk {
    /// The view by tiles, if it is transposed and both sides are worth them.
    pub(crate) fn tiles(&self, size: usize) -> Option<Tiles<'_>> {
        let (inner, outer) = self.dims.split_last()?;
        let column = outer.iter().position(|dim| dim.stride == 1 && dim.size >= SIDE_MIN)?;
        (inner.stride > 1 && inner.size >= SIDE_MIN).then_some(Tiles { walk: self, size, column })
    }
}

impl Tiles<'_> {
    /// Indices of the outermost dimension that a thread takes at a time: at least `elements`. Where it is the one that tiles
    /// go along, a page of them, if all of `threads` have some then.
    pub(crate) fn rows_of_part(&self, elements: usize, threads: usize) -> usize {
        let rows = elements.div_ceil(self.walk.row_elements());
        if self.column > 0 {
            return rows;
        }
        let share = self.walk.dims[0].size.div_ceil(2 * threads).min(PAGE / self.size);
        rows.max(share).next_multiple_of(LINE)
    }

    /// Copies at most `count` indices of the outermost dimension, from `first` on, in row-major order to `target`.
    pub(crate) fn pack(&self, first: usize, count: usize, source: &[u8], target: Out<'_>) {
        match self.size {
            1 => self.pack_sized::<1>(first, count, source, target),
            2 => self.pack_sized::<2>(first, count, source, target),
            4 => self.pack_sized::<4>(first, count, source, target),
            8 => self.pack_sized::<8>(first, count, source, target),
            _ => self.pack_sized::<16>(first, count, source, target),
        }
    }

    fn pack_sized<const SIZE: usize>(&self, first: usize, count: usize, source: &[u8], mut target: Out<'_>) {
        let (last, column) = (self.walk.dims.len() - 1, self.column);
        let mut dims = self.walk.dims.clone();
        let offset = self.walk.offset + first * dims[0].stride;
        dims[0].size = count.min(dims[0].size - first);
        let (rows, columns) = (dims[last], dims[column]);
        // From one index to the next in the target, which is packed.
        let mut steps = vec![1; dims.len()];
        for dim in (0..last).rev() {
            steps[dim] = steps[dim + 1] * dims[dim + 1].size;
        }
        let side = LINE / SIZE;
        let mut tile = Tile::new();
        // The dimensions that are neither.
        dims[last] = Dim { size: 1, stride: 0 };
        dims[column] = Dim { size: 1, stride: 0 };
        for index in 0..dims.iter().map(|dim| dim.size).product() {
            let (mut left, mut from, mut to) = (index, offset, 0);
            for (dim, step) in dims.iter().zip(&steps).rev() {
                from += left % dim.size * dim.stride;
                to += left % dim.size * step;
                left /= dim.size;
            }
            for wide in (0..columns.size).step_by(PAGE / SIZE) {
                let end = (wide + PAGE / SIZE).min(columns.size);
                for i in (0..rows.size).step_by(side) {
                    for j in (wide..end).step_by(side) {
                        let (height, width) = (side.min(rows.size - i), side.min(end - j));
                        let bytes = &source[(from + i * rows.stride + j) * SIZE..];
                        let stride = rows.stride * SIZE;
                        for row in 0..height {
                            ask(bytes, row * stride + AHEAD * LINE);
                        }
                        if height == side && width == side {
                            tile.transpose::<SIZE>(bytes, stride);
                        } else {
                            for row in 0..height {
                                let (line, _) = bytes[row * stride..row * stride + width * SIZE].as_chunks::<SIZE>();
                                for (position, element) in line.iter().enumerate() {
                                    tile.0[position][row * SIZE..(row + 1) * SIZE].copy_from_slice(element);
                                }
                            }
                        }
                        for (position, line) in tile.0[..width].iter().enumerate() {
                            target.put_line((to + (j + position) * steps[column] + i) * SIZE, line, height * SIZE);
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use farcall_device::{DType, Layout};

    use super::super::tests::expected;
    use super::*;

    #[test]
    fn transposed_views_are_packed_by_tiles_of_any_size() {
        let source: Vec<u16> = (0..20 * 33 * 70).collect();
        let base = Layout::contiguous(DType::U16, &[20, 33, 70]).unwrap();
        for dims in [[2, 1, 0], [0, 2, 1], [1, 2, 0], [2, 0, 1]] {
            let layout = base.permute(&dims).unwrap();
            let (walk, expected) = (Walk::new(&layout), expected(&layout));
            let tiles = walk.tiles(2).expect("both sides are worth it");
            for (first, count) in [(0, usize::MAX), (0, 3), (2, 7), (5, 100)] {
                let start = first * walk.row_elements();
                let end = start.saturating_add(walk.row_elements().saturating_mul(count)).min(expected.len());
                for is_around in [false, true] {
                    let mut target = vec![0_u16; end - start];
                    let out = Out::new(bytemuck::cast_slice_mut(&mut target), is_around);
                    tiles.pack(first, count, bytemuck::cast_slice(&source), out);
                    assert_eq!(target, expected[start..end], "{dims:?} rows {first} + {count}");
                }
            }
        }
    }

    #[test]
    fn wide_elements_and_whole_pages_go_by_tiles_too() {
        let source: Vec<u64> = (0..40 * 1100).collect();
        let layout = Layout::contiguous(DType::U64, &[40, 1100]).unwrap().transpose(0, 1).unwrap();
        let walk = Walk::new(&layout);
        let mut target = vec![0_u64; source.len()];
        let out = Out::new(bytemuck::cast_slice_mut(&mut target), true);
        walk.tiles(8).unwrap().pack(0, usize::MAX, bytemuck::cast_slice(&source), out);
        assert!((0..1100).all(|j| (0..40).all(|i| target[j * 40 + i] == (i * 1100 + j) as u64)));
    }

    #[test]
    fn parts_are_as_wide_as_pages_where_threads_allow() {
        let layout = Layout::contiguous(DType::F32, &[64, 8192]).unwrap().transpose(0, 1).unwrap();
        let walk = Walk::new(&layout);
        let tiles = walk.tiles(4).unwrap();
        assert_eq!(
            (tiles.rows_of_part(1, 1), tiles.rows_of_part(1, 16), tiles.rows_of_part(1 << 17, 16)),
            (1024, 256, 2048)
        );
    }
}
