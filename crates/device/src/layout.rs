//! Which bytes of a storage are a tensor: dtype, shape, strides and offset, with checked arithmetic.
//!
//! Layouts come from peers and from Python, so every constructor returns a typed error instead of overflowing.
//! Invariant L1: for a layout with elements, offset plus the reach of all strides, in bytes, is at most `isize::MAX`.
//! Invariant L2: strides are never negative, and a view never reaches a byte that its parent's span does not hold.

use std::fmt;
use std::ops::Range;

use crate::DType;

mod dims;
mod walk;

use dims::Dims;
pub(crate) use walk::Runs;

/// The highest number of dimensions.
pub const MAX_RANK: usize = 16;

/// Why a shape, stride or view is impossible.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// More dimensions than [`MAX_RANK`].
    #[error("rank {rank} is above the limit of {MAX_RANK}")]
    RankTooLarge {
        /// The number of dimensions given.
        rank: usize,
    },
    /// A size, stride or offset below zero.
    #[error("{what} {value} is negative")]
    NegativeDimension {
        /// "size", "stride" or "offset".
        what: &'static str,
        /// The number given.
        value: i64,
    },
    /// The number of bytes does not fit the address space.
    #[error("the layout needs more bytes than a process can address")]
    Overflow,
    /// The layout reaches beyond its storage.
    #[error("the layout needs bytes up to {end_bytes} of a storage of {storage_bytes} bytes")]
    OutOfBounds {
        /// One past the last byte that the layout touches.
        end_bytes: usize,
        /// The size of the storage.
        storage_bytes: usize,
    },
    /// Two shapes, or a shape and its strides, do not agree.
    #[error("shape {from:?} does not agree with {to:?}")]
    ShapeMismatch {
        /// The shape at hand.
        from: Vec<usize>,
        /// The shape asked for.
        to: Vec<usize>,
    },
    /// The number of strides is not the rank.
    #[error("{strides} strides for a shape of rank {rank}")]
    StrideCount {
        /// Dimensions of the shape.
        rank: usize,
        /// Strides given.
        strides: usize,
    },
    /// The elements are not in an order that strides can express for this shape. Pack the tensor with `contiguous` first.
    #[error(
        "shape {from:?} with strides {strides:?} cannot be viewed as {to:?} without a copy: use `contiguous` first"
    )]
    NotViewable {
        /// The shape at hand.
        from: Vec<usize>,
        /// Its strides.
        strides: Vec<i64>,
        /// The shape asked for.
        to: Vec<usize>,
    },
    /// A dimension that the layout does not have.
    #[error("dimension {dim} of a layout of rank {rank}")]
    NoSuchDimension {
        /// The dimension given.
        dim: usize,
        /// The layout's rank.
        rank: usize,
    },
    /// An index or range that goes past a dimension's size.
    #[error("elements {start}..{end} of dimension {dim} of size {size}")]
    IndexOutOfRange {
        /// The dimension.
        dim: usize,
        /// The first index.
        start: usize,
        /// One past the last index; saturated.
        end: usize,
        /// The dimension's size.
        size: usize,
    },
    /// The list is no permutation of the dimensions.
    #[error("{dims:?} is no permutation of {rank} dimensions")]
    NotAPermutation {
        /// The list given.
        dims: Vec<usize>,
        /// The layout's rank.
        rank: usize,
    },
}

/// Dtype, shape, strides and offset of a tensor within its storage. Strides and offset count elements, not bytes.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Layout {
    shape: Dims<usize>,
    strides: Dims<i64>,
    offset: usize,
    numel: usize,
    dtype: DType,
}

impl Layout {
    /// The row-major layout of a shape, from offset 0.
    ///
    /// # Errors
    /// `RankTooLarge` above [`MAX_RANK`]; `Overflow` if the bytes do not fit the address space.
    pub fn contiguous(dtype: DType, shape: &[usize]) -> Result<Self, LayoutError> {
        Self::contiguous_at(dtype, Dims::new(shape)?, 0)
    }

    /// A layout with its own strides and offset, both in elements.
    ///
    /// Strides of 0 repeat an element; overlapping strides are allowed.
    ///
    /// # Errors
    /// `RankTooLarge`, `StrideCount`, `NegativeDimension` for a stride below zero, `Overflow`.
    pub fn strided(dtype: DType, shape: &[usize], strides: &[i64], offset: usize) -> Result<Self, LayoutError> {
        if shape.len() != strides.len() {
            return Err(LayoutError::StrideCount { rank: shape.len(), strides: strides.len() });
        }
        if let Some(&value) = strides.iter().find(|stride| **stride < 0) {
            return Err(LayoutError::NegativeDimension { what: "stride", value });
        }
        Self::checked(dtype, Dims::new(shape)?, Dims::new(strides)?, offset)
    }

    /// A layout from the signed numbers of a wire format or a foreign library.
    ///
    /// # Errors
    /// As [`Layout::strided`]; `NegativeDimension` also for a size or offset below zero.
    pub fn from_signed(dtype: DType, shape: &[i64], strides: &[i64], offset: i64) -> Result<Self, LayoutError> {
        let unsigned =
            |what, value: i64| usize::try_from(value).map_err(|_| LayoutError::NegativeDimension { what, value });
        if shape.len() > MAX_RANK {
            return Err(LayoutError::RankTooLarge { rank: shape.len() });
        }
        let mut sizes = [0; MAX_RANK];
        for (size, value) in sizes.iter_mut().zip(shape) {
            *size = unsigned("size", *value)?;
        }
        Self::strided(dtype, &sizes[..shape.len()], strides, unsigned("offset", offset)?)
    }

    /// The element type.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The size of each dimension.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Elements from one index to the next, for each dimension.
    #[must_use]
    pub fn strides(&self) -> &[i64] {
        &self.strides
    }

    /// Elements before the first one.
    #[must_use]
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// The number of dimensions.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.shape.len()
    }

    /// The number of elements: the product of the shape, 1 for a scalar.
    #[must_use]
    pub fn numel(&self) -> usize {
        self.numel
    }

    /// Bytes of all elements when packed.
    #[must_use]
    pub fn size_bytes(&self) -> usize {
        self.numel * self.dtype.size_bytes()
    }

    /// The bytes of the storage from the first to the last that is touched; `0..0` if there are no elements.
    #[must_use]
    pub fn byte_span(&self) -> Range<usize> {
        if self.numel == 0 {
            return 0..0;
        }
        let size = self.dtype.size_bytes();
        let reach: usize = self.dims().map(|(size, stride)| (size - 1) * stride).sum();
        self.offset * size..(self.offset + reach + 1) * size
    }

    /// Whether the elements follow each other in row-major order without gaps.
    #[must_use]
    pub fn is_contiguous(&self) -> bool {
        if self.numel == 0 {
            return true;
        }
        let mut expected = 1;
        self.dims().rev().all(|(size, stride)| {
            let fits = size == 1 || stride == expected;
            expected *= size;
            fits
        })
    }

    /// Whether the elements are gapless in some order of the dimensions, and each is touched once.
    #[must_use]
    pub fn is_dense(&self) -> bool {
        self.numel == 0 || self.gapless(self.numel, |size, _| size > 1)
    }

    /// Whether the layout is dense once dimensions that repeat their elements (stride 0, size above 1) are left out.
    #[must_use]
    pub fn is_dense_or_broadcast(&self) -> bool {
        if self.numel == 0 {
            return true;
        }
        let kept = |size: usize, stride: usize| size > 1 && stride != 0;
        let numel = self.dims().filter(|&(size, stride)| kept(size, stride)).map(|(size, _)| size).product();
        self.gapless(numel, kept)
    }

    /// Checks that a storage of `storage_bytes` holds every byte that the layout touches.
    ///
    /// # Errors
    /// `OutOfBounds` if it does not.
    pub fn fits(&self, storage_bytes: usize) -> Result<(), LayoutError> {
        let end_bytes = self.byte_span().end;
        if end_bytes <= storage_bytes { Ok(()) } else { Err(LayoutError::OutOfBounds { end_bytes, storage_bytes }) }
    }

    /// The layout of the same shape and dtype, packed from offset 0: what a copy of this view has.
    #[must_use]
    pub fn packed(&self) -> Self {
        if self.offset == 0 && self.is_contiguous() && self.numel > 0 {
            return self.clone();
        }
        // Row-major strides of a shape whose elements fit the address space never exceed them, but sizes beside a zero may.
        let mut next = 1_i64;
        let mut strides = self.strides.clone();
        for (stride, size) in strides.iter_mut().zip(self.shape.iter()).rev() {
            *stride = next;
            next = next.saturating_mul(i64::try_from((*size).max(1)).unwrap_or(i64::MAX));
        }
        Self { shape: self.shape.clone(), strides, offset: 0, numel: self.numel, dtype: self.dtype }
    }

    /// The view of `len` indices of `dim`, from `start`.
    ///
    /// # Errors
    /// `NoSuchDimension`, `IndexOutOfRange`.
    pub fn narrow(&self, dim: usize, start: usize, len: usize) -> Result<Self, LayoutError> {
        let size = self.size_of(dim)?;
        if start > size || len > size - start {
            return Err(LayoutError::IndexOutOfRange { dim, start, end: start.saturating_add(len), size });
        }
        let mut view = self.clone();
        view.shape[dim] = len;
        let stride = self.strides[dim];
        Ok(view.recount().advanced(stride, start))
    }

    /// The view at one index of `dim`, without that dimension.
    ///
    /// # Errors
    /// `NoSuchDimension`, `IndexOutOfRange`.
    pub fn select(&self, dim: usize, index: usize) -> Result<Self, LayoutError> {
        let size = self.size_of(dim)?;
        if index >= size {
            return Err(LayoutError::IndexOutOfRange { dim, start: index, end: index.saturating_add(1), size });
        }
        let mut view = self.clone();
        view.shape.remove(dim);
        view.strides.remove(dim);
        Ok(view.recount().advanced(self.strides[dim], index))
    }

    /// The view whose dimension `i` is this one's `dims[i]`.
    ///
    /// # Errors
    /// `NotAPermutation` unless `dims` names each dimension once.
    pub fn permute(&self, dims: &[usize]) -> Result<Self, LayoutError> {
        let refused = || LayoutError::NotAPermutation { dims: dims.to_vec(), rank: self.rank() };
        if dims.len() != self.rank() {
            return Err(refused());
        }
        let mut seen = [false; MAX_RANK];
        let mut view = self.clone();
        for (to, &from) in dims.iter().enumerate() {
            if from >= self.rank() || std::mem::replace(&mut seen[from], true) {
                return Err(refused());
            }
            view.shape[to] = self.shape[from];
            view.strides[to] = self.strides[from];
        }
        Ok(view)
    }

    /// The view with two dimensions exchanged.
    ///
    /// # Errors
    /// `NoSuchDimension`.
    pub fn transpose(&self, first: usize, second: usize) -> Result<Self, LayoutError> {
        self.size_of(first)?;
        self.size_of(second)?;
        let mut view = self.clone();
        view.shape.swap(first, second);
        view.strides.swap(first, second);
        Ok(view)
    }

    /// The view of the same elements, in the same order, with another shape.
    ///
    /// # Errors
    /// `ShapeMismatch` if the numbers of elements differ; `NotViewable` if no strides express it: pack first.
    pub fn reshape(&self, shape: &[usize]) -> Result<Self, LayoutError> {
        let target = Self::contiguous_at(self.dtype, Dims::new(shape)?, self.offset)?;
        if target.numel != self.numel {
            return Err(LayoutError::ShapeMismatch { from: self.shape.to_vec(), to: shape.to_vec() });
        }
        if self.is_contiguous() {
            return Ok(target);
        }
        let strides = self.strides_as(&target.shape).ok_or_else(|| LayoutError::NotViewable {
            from: self.shape.to_vec(),
            strides: self.strides.to_vec(),
            to: shape.to_vec(),
        })?;
        Ok(Self { strides, ..target })
    }

    /// The view that repeats dimensions of size 1, and adds dimensions in front, to get `shape`.
    ///
    /// # Errors
    /// `ShapeMismatch` if a size is neither equal nor 1; `Overflow` if the elements could not be counted.
    pub fn broadcast_to(&self, shape: &[usize]) -> Result<Self, LayoutError> {
        let mismatch = || LayoutError::ShapeMismatch { from: self.shape.to_vec(), to: shape.to_vec() };
        let target = Dims::new(shape)?;
        let added = shape.len().checked_sub(self.rank()).ok_or_else(mismatch)?;
        let mut strides = Dims::filled(0_i64, shape.len());
        for (dim, &size) in self.shape.iter().enumerate() {
            if size == shape[added + dim] {
                strides[added + dim] = self.strides[dim];
            } else if size != 1 {
                return Err(mismatch());
            }
        }
        Self::checked(self.dtype, target, strides, self.offset)
    }

    /// The view without dimension `dim`, which must have size 1.
    ///
    /// # Errors
    /// `NoSuchDimension`; `ShapeMismatch` if its size is not 1.
    pub fn squeeze(&self, dim: usize) -> Result<Self, LayoutError> {
        let size = self.size_of(dim)?;
        let mut view = self.clone();
        view.shape.remove(dim);
        view.strides.remove(dim);
        if size != 1 {
            return Err(LayoutError::ShapeMismatch { from: self.shape.to_vec(), to: view.shape.to_vec() });
        }
        Ok(view)
    }

    /// The view with a dimension of size 1 inserted before dimension `dim`; `dim == rank` appends it.
    ///
    /// # Errors
    /// `NoSuchDimension`, `RankTooLarge`.
    pub fn unsqueeze(&self, dim: usize) -> Result<Self, LayoutError> {
        if dim > self.rank() {
            return Err(LayoutError::NoSuchDimension { dim, rank: self.rank() });
        }
        // The stride of a size of 1 is never used; the row-major one keeps printed layouts plain.
        let stride = match self.shape.get(dim) {
            Some(&size) => i64::try_from(size).unwrap_or(i64::MAX).saturating_mul(self.strides[dim]),
            None => 1,
        };
        let mut view = self.clone();
        view.shape.insert(dim, 1)?;
        view.strides.insert(dim, stride)?;
        Ok(view)
    }

    /// The same elements in the same order with as few dimensions as possible: what a copy loop walks.
    #[must_use]
    pub fn coalesced(&self) -> Self {
        let mut shape = Dims::filled(0_usize, 0);
        let mut strides = Dims::filled(0_i64, 0);
        for (size, stride) in self.shape.iter().copied().zip(self.strides.iter().copied()) {
            if size == 1 {
                continue;
            }
            match (shape.last_mut(), strides.last_mut()) {
                (Some(outer), Some(outer_stride))
                    if self.numel > 0 && stride.checked_mul(size as i64) == Some(*outer_stride) =>
                {
                    *outer *= size;
                    *outer_stride = stride;
                }
                _ => {
                    shape.push(size);
                    strides.push(stride);
                }
            }
        }
        Self { shape, strides, offset: self.offset, numel: self.numel, dtype: self.dtype }
    }

    /// The runs of bytes that hold the elements in row-major order.
    pub(crate) fn runs(&self) -> Runs {
        Runs::new(self)
    }

    fn contiguous_at(dtype: DType, shape: Dims<usize>, offset: usize) -> Result<Self, LayoutError> {
        let mut strides = Dims::filled(1_i64, shape.len());
        let mut next = 1_i64;
        for (stride, &size) in strides.iter_mut().zip(shape.iter()).rev() {
            *stride = next;
            let size = i64::try_from(size.max(1)).map_err(|_| LayoutError::Overflow)?;
            // Saturates beside a size of 0, where strides do not matter; else the count of elements is refused below.
            next = next.saturating_mul(size);
        }
        Self::checked(dtype, shape, strides, offset)
    }

    /// Counts the elements and establishes L1; strides are known to be non-negative.
    fn checked(dtype: DType, shape: Dims<usize>, strides: Dims<i64>, offset: usize) -> Result<Self, LayoutError> {
        let limit = isize::MAX as usize / dtype.size_bytes();
        if offset > limit {
            return Err(LayoutError::Overflow);
        }
        let mut layout = Self { shape, strides, offset, numel: 0, dtype };
        if layout.shape.contains(&0) {
            // Sizes travel as signed numbers; those of a layout with elements are bounded by their product.
            let fits = layout.shape.iter().all(|size| i64::try_from(*size).is_ok());
            return if fits { Ok(layout) } else { Err(LayoutError::Overflow) };
        }
        let mut numel = 1_usize;
        let mut end = offset;
        for (size, stride) in layout.dims() {
            numel = numel.checked_mul(size).filter(|numel| *numel <= limit).ok_or(LayoutError::Overflow)?;
            let reach = (size - 1).checked_mul(stride).ok_or(LayoutError::Overflow)?;
            end = end.checked_add(reach).ok_or(LayoutError::Overflow)?;
        }
        // The last element's own bytes count too, so `end` itself must lie below the limit.
        if end >= limit {
            return Err(LayoutError::Overflow);
        }
        layout.numel = numel;
        Ok(layout)
    }

    /// Size and stride of each dimension. Strides are not negative (L2), so the conversion loses nothing.
    fn dims(&self) -> impl DoubleEndedIterator<Item = (usize, usize)> + '_ {
        self.shape.iter().zip(self.strides.iter()).map(|(size, stride)| (*size, *stride as usize))
    }

    fn size_of(&self, dim: usize) -> Result<usize, LayoutError> {
        self.shape.get(dim).copied().ok_or(LayoutError::NoSuchDimension { dim, rank: self.rank() })
    }

    /// Recomputes the element count after the shape shrank.
    fn recount(mut self) -> Self {
        // A dimension of 0 first: the others alone may not fit.
        self.numel = if self.shape.contains(&0) { 0 } else { self.shape.iter().product() };
        self
    }

    /// Moves the offset by `count` steps; without elements the offset does not matter, and might not fit.
    fn advanced(mut self, stride: i64, count: usize) -> Self {
        if self.numel > 0 {
            self.offset += count * stride as usize;
        }
        self
    }

    /// Whether the kept dimensions, by growing stride, tile `numel` elements without a gap.
    fn gapless(&self, numel: usize, keep: impl Fn(usize, usize) -> bool) -> bool {
        // By dimension count this is a handful of passes at most; sorting would need a buffer.
        let mut expected = 1;
        while expected != numel {
            let next = self.dims().find(|&(size, stride)| keep(size, stride) && stride == expected);
            match next {
                Some((size, _)) => expected *= size,
                None => return false,
            }
        }
        true
    }

    /// The strides that view these elements as `shape`, which has as many; `None` if a copy is needed.
    ///
    /// Walks both shapes from the back: each block of dimensions that is contiguous in itself must be covered by whole
    /// target dimensions.
    fn strides_as(&self, shape: &[usize]) -> Option<Dims<i64>> {
        let mut strides = Dims::filled(1_i64, shape.len());
        let mut target = shape.len();
        let source = self.coalesced();
        for (size, stride) in source.shape.iter().copied().zip(source.strides.iter().copied()).rev() {
            let mut covered = 1;
            while covered < size || (target > 0 && shape[target - 1] == 1) {
                target = target.checked_sub(1)?;
                // Saturates only where the size is 1 and the stride does not matter.
                strides[target] = stride.saturating_mul(covered as i64);
                covered *= shape[target];
            }
            if covered != size {
                return None;
            }
        }
        // What is left has size 1 throughout: the element counts agree.
        Some(strides)
    }
}

impl fmt::Debug for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?} strides {:?} offset {}", self.dtype, self.shape(), self.strides(), self.offset)
    }
}

#[cfg(test)]
mod tests;
