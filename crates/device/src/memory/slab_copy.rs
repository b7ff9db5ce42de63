//! A copy of foreign memory into a slab that others may be told of before it is made.

use std::fmt;

use super::Span;
use super::copy::copy_and_tell;
use crate::event::Token;
use crate::{DeviceError, Event, Layout, Runtime, Tensor};

/// See [`Runtime::begin_slab_copy`]. Dropped before it was made, the copy fails for whoever waits for it.
#[must_use = "dropped, the copy fails"]
pub struct SlabCopy {
    source: Tensor,
    copy: Tensor,
    /// The bytes of `copy`, which keeps them; nobody is given them before `written` is complete.
    target: Span,
    written: Token,
}

impl SlabCopy {
    pub(crate) fn begin(runtime: &Runtime, source: &Tensor) -> Result<Self, DeviceError> {
        let layout = source.layout();
        let memory = runtime.alloc_host(layout.byte_span().len())?;
        let target = memory.span()?;
        let (written, event) = Event::token(runtime);
        let layout = Layout::strided(layout.dtype(), layout.shape(), layout.strides(), 0)?;
        let copy = Tensor::from_storage(memory.freeze_at(event), layout)?;
        Ok(Self { source: source.clone(), copy, target, written })
    }

    /// What is copied.
    #[must_use]
    pub fn source(&self) -> &Tensor {
        &self.source
    }

    /// What it becomes.
    #[must_use]
    pub fn copy(&self) -> &Tensor {
        &self.copy
    }

    /// Makes the copy; after every so many bytes, and not at the end, `tell` is given how many are whole from the start on.
    ///
    /// # Errors
    /// Those of reading the source.
    /// # Cost
    /// One pass over the bytes: see [`copy`](crate::copy).
    pub fn run(self, every: usize, tell: impl FnMut(usize)) -> Result<(), DeviceError> {
        let source = &self.source.storage().as_bytes()?[self.source.layout().byte_span()];
        // SAFETY: `self.copy` keeps the memory; until `written` is complete its bytes are given to nobody, and only this writes them.
        let target = unsafe { self.target.bytes_mut() };
        copy_and_tell(target, source, every, tell);
        self.written.complete();
        Ok(())
    }
}

impl fmt::Debug for SlabCopy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SlabCopy").field("of", &self.source).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{Config, DType, Release, Storage};

    struct Kept(#[expect(dead_code, reason = "is what is kept")] Arc<Vec<u8>>);

    impl Release for Kept {
        fn release(&self) {}
    }

    fn foreign(bytes: Vec<u8>) -> Tensor {
        let bytes = Arc::new(bytes);
        let (start, len) = (std::ptr::NonNull::from(&bytes[0]), bytes.len());
        // SAFETY: `Kept` holds the bytes, which nobody writes.
        let storage = unsafe { Storage::external(start, len, crate::Device::HOST, Arc::new(Kept(bytes))) };
        Tensor::from_storage(storage, Layout::contiguous(DType::U8, &[len]).unwrap()).unwrap()
    }

    #[test]
    fn fence_nobody_is_given_a_copy_that_is_not_made() {
        let runtime = Runtime::new(Config::default()).unwrap();
        let source = foreign((0..200_000).map(|index| (index % 251) as u8).collect());
        let begun = runtime.begin_slab_copy(&source).unwrap().expect("it is in no slab");
        let copy = begun.copy().clone();
        assert!(copy.storage().slab().is_some());
        assert!(matches!(copy.as_slice::<u8>(), Err(DeviceError::NotReady { .. })));
        let mut told = 0;
        begun.run(100_000, |whole| told = whole).unwrap();
        assert_eq!((told, copy.as_slice::<u8>().unwrap()), (100_000, source.as_slice::<u8>().unwrap()));
        assert!(runtime.begin_slab_copy(&copy).unwrap().is_none(), "it is in one");
    }

    #[test]
    fn fence_a_copy_that_is_given_up_fails() {
        let runtime = Runtime::new(Config::default()).unwrap();
        let begun = runtime.begin_slab_copy(&foreign(vec![1; 5000])).unwrap().expect("it is in no slab");
        let copy = begun.copy().clone();
        drop(begun);
        assert!(copy.as_slice::<u8>().is_err_and(|error| !matches!(error, DeviceError::NotReady { .. })));
    }
}
