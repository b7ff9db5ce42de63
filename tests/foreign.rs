//! Memory that this library did not make, as a binding of another library would wrap it.

use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use farcall::device::Release;
use farcall::prelude::*;
use farcall::{Layout, Storage};

/// Bytes that their owner writes when it likes.
pub(crate) struct Foreign(Mutex<Vec<u8>>);

impl Release for Foreign {
    fn release(&self) {}
}

impl Foreign {
    pub(crate) fn new(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Self(Mutex::new(bytes)))
    }

    /// Never while a call is being made with them.
    pub(crate) fn fill(&self, byte: u8) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).fill(byte);
    }

    #[expect(unsafe_code, reason = "wraps memory as a binding of another library would")]
    pub(crate) fn tensor(self: &Arc<Self>) -> Tensor {
        let bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (start, len) = (NonNull::from(&bytes[0]), bytes.len());
        // SAFETY: the owner holds the memory, and writes it only once the call that it was made for has returned.
        let storage = unsafe { Storage::external(start, len, Device::HOST, self.clone()) };
        Tensor::from_storage(storage, Layout::contiguous(DType::U8, &[len]).expect("a size")).expect("fits")
    }
}
