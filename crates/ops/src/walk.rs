//! Any range of a view's elements, in row-major order: strided gathering (pack) and scattering (unpack).
//!
//! Unlike a walk from the front, a range can start anywhere, so that threads share the elements of one tensor.

use farcall_device::Layout;

mod tiles;

/// Of the elements that a layout describes: where each lies in the storage. Dimensions are coalesced, so that a contiguous view is one
/// run.
#[derive(Debug, Clone)]
pub(crate) struct Walk {
    /// From the outermost dimension; never empty.
    dims: Vec<Dim>,
    offset: usize,
    numel: usize,
}

#[derive(Debug, Clone, Copy)]
struct Dim {
    size: usize,
    /// Elements from one index to the next.
    stride: usize,
}

impl Walk {
    pub(crate) fn new(layout: &Layout) -> Self {
        let numel = layout.numel();
        let layout = layout.coalesced();
        // Layouts have no negative strides.
        let dims = layout.shape().iter().zip(layout.strides());
        let mut dims: Vec<_> = dims.map(|(size, stride)| Dim { size: *size, stride: *stride as usize }).collect();
        if dims.is_empty() {
            dims.push(Dim { size: 1, stride: 1 });
        }
        Self { dims, offset: layout.offset(), numel }
    }

    /// The first element, if all others follow it without gaps.
    pub(crate) fn contiguous_from(&self) -> Option<usize> {
        match self.dims[..] {
            [Dim { size, stride }] if stride == 1 || size == 1 => Some(self.offset),
            _ => None,
        }
    }

    pub(crate) fn numel(&self) -> usize {
        self.numel
    }

    /// Elements of one index of the outermost dimension; at least 1.
    pub(crate) fn row_elements(&self) -> usize {
        (self.numel / self.dims[0].size.max(1)).max(1)
    }

    /// Whether all elements are one.
    pub(crate) fn is_constant(&self) -> bool {
        self.dims.iter().all(|dim| dim.stride == 0 || dim.size == 1)
    }

    /// Calls `run` with the place in the range, the element in the storage, the length and the stride of each run of elements
    /// `start..start + len`.
    fn runs(&self, start: usize, len: usize, mut run: impl FnMut(usize, usize, usize, usize)) {
        debug_assert!(start + len <= self.numel, "a range of the elements");
        let mut index = [0_usize; farcall_device::MAX_RANK];
        let mut left = start;
        let mut at = self.offset;
        for (index, dim) in index.iter_mut().zip(&self.dims).rev() {
            *index = left % dim.size;
            left /= dim.size;
            at += *index * dim.stride;
        }
        let (last, outer) = (self.dims.len() - 1, &self.dims[..self.dims.len() - 1]);
        let inner = self.dims[last];
        let (mut done, mut from) = (0, index[last]);
        while done < len {
            let count = (inner.size - from).min(len - done);
            run(done, at, count, inner.stride);
            done += count;
            // Back to the start of the inner dimension, and one step of the outer ones.
            at -= from * inner.stride;
            from = 0;
            for (dim, index) in outer.iter().zip(&mut index[..last]).rev() {
                *index += 1;
                at += dim.stride;
                if *index < dim.size {
                    break;
                }
                at -= dim.size * dim.stride;
                *index = 0;
            }
        }
    }

    /// Copies elements `start..` of `source`, each of `size` bytes, to fill `target`.
    pub(crate) fn gather(&self, size: usize, source: &[u8], start: usize, target: &mut [u8]) {
        match size {
            1 => self.gather_sized::<1>(source, start, target),
            2 => self.gather_sized::<2>(source, start, target),
            4 => self.gather_sized::<4>(source, start, target),
            8 => self.gather_sized::<8>(source, start, target),
            _ => self.gather_sized::<16>(source, start, target),
        }
    }

    fn gather_sized<const SIZE: usize>(&self, source: &[u8], start: usize, target: &mut [u8]) {
        let (target, _) = target.as_chunks_mut::<SIZE>();
        let len = target.len();
        self.runs(start, len, |to, from, count, stride| {
            let target = &mut target[to..to + count];
            let bytes = &source[from * SIZE..];
            match stride {
                1 => target.as_flattened_mut().copy_from_slice(&bytes[..count * SIZE]),
                0 => target.fill(std::array::from_fn(|byte| bytes[byte])),
                _ => {
                    for (element, chunk) in target.iter_mut().zip(bytes.chunks(stride * SIZE)) {
                        element.copy_from_slice(&chunk[..SIZE]);
                    }
                }
            }
        });
    }

    /// Where element `start` lies and how many follow it there without gaps; `None` beyond the last one, and where there are none.
    pub(crate) fn run_from(&self, start: usize) -> Option<(usize, usize)> {
        let (mut left, mut at) = (start, self.offset);
        let inner = self.dims.last().filter(|inner| inner.stride == 1 && start < self.numel)?;
        for dim in self.dims.iter().rev() {
            at += left % dim.size * dim.stride;
            left /= dim.size;
        }
        Some((at, inner.size - start % inner.size))
    }

    /// Copies `source` to elements `start..` of `target`, each of `size` bytes: the reverse of [`Walk::gather`].
    pub(crate) fn scatter(&self, size: usize, source: &[u8], start: usize, target: &mut [u8]) {
        let count = source.len() / size;
        self.runs(start, count, |from, to, count, stride| {
            let source = &source[from * size..(from + count) * size];
            if stride == 1 {
                target[to * size..(to + count) * size].copy_from_slice(source);
            } else {
                for (index, element) in source.chunks_exact(size).enumerate() {
                    let at = (to + index * stride) * size;
                    target[at..at + size].copy_from_slice(element);
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use farcall_device::DType;

    use super::*;

    fn views() -> Vec<Layout> {
        let base = Layout::contiguous(DType::U16, &[3, 4, 5]).unwrap();
        vec![
            base.clone(),
            base.permute(&[2, 0, 1]).unwrap(),
            base.narrow(1, 1, 2).unwrap(),
            base.narrow(2, 2, 3).unwrap().transpose(0, 2).unwrap(),
            base.select(1, 3).unwrap(),
            base.narrow(1, 2, 1).unwrap().broadcast_to(&[2, 3, 6, 5]).unwrap(),
            base.select(0, 1).and_then(|view| view.select(0, 1)).and_then(|view| view.select(0, 4)).unwrap(),
        ]
    }

    /// Each element by its index alone.
    pub(super) fn expected(layout: &Layout) -> Vec<u16> {
        (0..layout.numel())
            .map(|mut left| {
                let mut at = layout.offset();
                for (size, stride) in layout.shape().iter().zip(layout.strides()).rev() {
                    at += left % size * *stride as usize;
                    left /= size;
                }
                at as u16
            })
            .collect()
    }

    #[test]
    fn every_range_of_every_view_is_gathered_in_order() {
        let source: Vec<u16> = (0..60).collect();
        for layout in views() {
            let (walk, expected) = (Walk::new(&layout), expected(&layout));
            for start in 0..expected.len() {
                for end in start..=expected.len() {
                    let mut target = vec![0_u16; end - start];
                    walk.gather(2, bytemuck::cast_slice(&source), start, bytemuck::cast_slice_mut(&mut target));
                    assert_eq!(target, expected[start..end], "{layout:?} {start}..{end}");
                }
            }
        }
    }

    #[test]
    fn a_run_is_what_follows_without_gaps() {
        let layout = &views()[3];
        assert_eq!(Walk::new(layout).run_from(0), None, "a stride of its own");
        let walk = Walk::new(&views()[2]);
        assert_eq!(
            [0, 9, 10, 29].map(|start| walk.run_from(start)),
            [Some((5, 10)), Some((14, 1)), Some((25, 10)), Some((54, 1))]
        );
        assert_eq!(walk.run_from(30), None);
    }

    #[test]
    fn scattering_is_the_reverse() {
        let elements: Vec<u16> = (0..60).map(|index| index * 7).collect();
        for layout in &views()[..5] {
            let (walk, numel) = (Walk::new(layout), layout.numel());
            let mut target = vec![0_u16; 60];
            let bytes: &[u8] = bytemuck::cast_slice(&elements[..numel]);
            let (front, back) = bytes.split_at(2 * (numel / 3));
            walk.scatter(2, front, 0, bytemuck::cast_slice_mut(&mut target));
            walk.scatter(2, back, numel / 3, bytemuck::cast_slice_mut(&mut target));
            for (element, at) in elements.iter().zip(expected(layout)) {
                assert_eq!(target[usize::from(at)], *element, "{layout:?}");
            }
        }
    }

    #[test]
    fn contiguous_and_constant_views_are_known() {
        let views = views();
        assert_eq!(Walk::new(&views[0]).contiguous_from(), Some(0));
        assert_eq!(Walk::new(&views[1]).contiguous_from(), None);
        let element = &views[6];
        assert_eq!(Walk::new(element).contiguous_from(), Some(29));
        assert!(Walk::new(&element.broadcast_to(&[4, 4]).unwrap()).is_constant());
    }
}
