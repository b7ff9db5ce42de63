//! Walks a layout's elements in row-major order, a run of equally spaced elements at a time.

use super::{Layout, MAX_RANK};

/// The inner loop of a strided copy: `count` elements from byte `start`, `step` bytes apart.
///
/// Dimensions are coalesced first, so that a contiguous layout is a single run and a matrix view one run a row.
#[derive(Debug)]
pub(crate) struct Runs {
    shape: [usize; MAX_RANK],
    /// Bytes from one index to the next.
    steps: [usize; MAX_RANK],
    index: [usize; MAX_RANK],
    outer_rank: usize,
    start: usize,
    left: usize,
    /// Elements of each run.
    pub(crate) count: usize,
    /// Bytes from one element of a run to the next.
    pub(crate) step: usize,
}

impl Runs {
    pub(super) fn new(layout: &Layout) -> Self {
        let size = layout.dtype().size_bytes();
        let layout = layout.coalesced();
        let rank = layout.rank();
        let mut runs = Self {
            shape: [1; MAX_RANK],
            steps: [0; MAX_RANK],
            index: [0; MAX_RANK],
            outer_rank: rank.saturating_sub(1),
            start: layout.offset() * size,
            left: 0,
            count: 1,
            step: size,
        };
        for (dim, (dim_size, stride)) in layout.dims().enumerate() {
            runs.shape[dim] = dim_size;
            // A product that overflows belongs to a dimension that is never stepped: size 1, or no elements at all.
            runs.steps[dim] = stride.wrapping_mul(size);
        }
        if rank > 0 {
            runs.count = runs.shape[rank - 1];
            runs.step = runs.steps[rank - 1];
        }
        if layout.numel() > 0 {
            runs.left = runs.shape[..runs.outer_rank].iter().product();
        }
        runs
    }

    /// Whether each run is a plain range of bytes, with elements of `size` bytes.
    pub(crate) fn is_plain(&self, size: usize) -> bool {
        self.step == size || self.count == 1
    }
}

impl Iterator for Runs {
    /// The byte at which a run starts.
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        self.left = self.left.checked_sub(1)?;
        let start = self.start;
        for dim in (0..self.outer_rank).rev() {
            self.index[dim] += 1;
            self.start = self.start.wrapping_add(self.steps[dim]);
            if self.index[dim] < self.shape[dim] {
                break;
            }
            self.start = self.start.wrapping_sub(self.steps[dim].wrapping_mul(self.shape[dim]));
            self.index[dim] = 0;
        }
        Some(start)
    }
}
