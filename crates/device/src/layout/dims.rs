//! A short list of sizes or strides, without heap memory up to rank 6.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::ops::{Deref, DerefMut};

use super::{LayoutError, MAX_RANK};

/// Ranks up to this one need no heap memory.
const INLINE_RANK: usize = 6;

#[derive(Clone)]
pub(super) enum Dims<T> {
    Inline { len: u8, items: [T; INLINE_RANK] },
    Heap(Vec<T>),
}

impl<T: Copy + Default> Dims<T> {
    /// Copies `items`, refusing more than [`MAX_RANK`].
    pub(super) fn new(items: &[T]) -> Result<Self, LayoutError> {
        if items.len() > MAX_RANK {
            return Err(LayoutError::RankTooLarge { rank: items.len() });
        }
        let mut dims = Self::filled(T::default(), items.len());
        dims.copy_from_slice(items);
        Ok(dims)
    }

    /// `len` times `item`; `len` is a rank that was checked before.
    pub(super) fn filled(item: T, len: usize) -> Self {
        if len <= INLINE_RANK {
            Self::Inline { len: len as u8, items: [item; INLINE_RANK] }
        } else {
            Self::Heap(vec![item; len])
        }
    }

    /// Appends `item`; the caller's rank was checked before.
    pub(super) fn push(&mut self, item: T) {
        match self {
            Self::Inline { len, items } if usize::from(*len) < INLINE_RANK => {
                items[usize::from(*len)] = item;
                *len += 1;
            }
            Self::Inline { items, .. } => {
                let mut heap = items.to_vec();
                heap.push(item);
                *self = Self::Heap(heap);
            }
            Self::Heap(heap) => heap.push(item),
        }
    }

    pub(super) fn insert(&mut self, at: usize, item: T) -> Result<(), LayoutError> {
        if self.len() == MAX_RANK {
            return Err(LayoutError::RankTooLarge { rank: MAX_RANK + 1 });
        }
        self.push(item);
        self[at..].rotate_right(1);
        Ok(())
    }

    pub(super) fn remove(&mut self, at: usize) {
        self[at..].rotate_left(1);
        match self {
            Self::Inline { len, .. } => *len -= 1,
            Self::Heap(heap) => {
                heap.pop();
            }
        }
    }
}

impl<T> Deref for Dims<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match self {
            Self::Inline { len, items } => &items[..usize::from(*len)],
            Self::Heap(heap) => heap,
        }
    }
}

impl<T> DerefMut for Dims<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        match self {
            Self::Inline { len, items } => &mut items[..usize::from(*len)],
            Self::Heap(heap) => heap,
        }
    }
}

// Compared as slices: the same dimensions may lie inline or, after a `remove`, on the heap.
impl<T: PartialEq> PartialEq for Dims<T> {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl<T: Eq> Eq for Dims<T> {}

impl<T: Hash> Hash for Dims<T> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (**self).hash(state);
    }
}

impl<T: fmt::Debug> fmt::Debug for Dims<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn behaves_as_a_vec_across_the_inline_limit() {
        let mut dims = Dims::filled(0_usize, 0);
        let mut model = Vec::new();
        for item in 0..MAX_RANK {
            let at = item / 2;
            dims.insert(at, item).unwrap();
            model.insert(at, item);
            assert_eq!(*dims, *model);
        }
        assert_eq!(dims.insert(0, 99), Err(LayoutError::RankTooLarge { rank: 17 }));
        while !model.is_empty() {
            let at = model.len() / 2;
            dims.remove(at);
            model.remove(at);
            assert_eq!(*dims, *model);
            assert_eq!(dims, Dims::new(&model).unwrap());
        }
        assert!(Dims::new(&[1; MAX_RANK + 1]).is_err());
    }
}
