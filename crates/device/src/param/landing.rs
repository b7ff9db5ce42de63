//! A parameter's memory while bytes from elsewhere come into it: from a socket, a file or a NIC, in no stream's order.

use std::fmt;

use super::{Param, State, is_whole};
use crate::{DeviceError, Layout, Storage, StorageMut, Tensor};

impl Param {
    /// Host memory for a new value of `layout` whose bytes come from elsewhere: the value's own if nobody else holds it and nothing
    /// that reads it is pending, else fresh memory, with the old value in place until [`Landing::complete`].
    ///
    /// While its own memory is out, [`Param::value`] and steps wait for the landing's end, and [`Param::try_value`] gives `None`.
    /// Ended before it was complete, it leaves the value torn, if its memory was taken at all (P3).
    ///
    /// ```
    /// use farcall_device::{DeviceError, Layout, Param, Tensor};
    ///
    /// let weights = Param::new(Tensor::from_slice(&[1_u8, 2], &[2])?);
    /// let mut landing = weights.land(weights.value().layout())?;
    /// let mut memory = landing.take_memory();
    /// memory.as_bytes_mut()?.copy_from_slice(&[3, 4]);
    /// landing.complete(memory.freeze_ready())?;
    /// assert_eq!(weights.value().as_slice::<u8>()?, [3, 4]);
    /// # Ok::<(), DeviceError>(())
    /// ```
    /// # Errors
    /// Those of [`Param::expect_fit`]; [`DeviceError::NotContiguous`] if the bytes are not in row-major order;
    /// [`DeviceError::NotHost`] for a value on another device; [`DeviceError::OutOfMemory`].
    pub fn land(&self, layout: &Layout) -> Result<Landing, DeviceError> {
        self.expect_fit(layout)?;
        if layout.packed() != *layout {
            return Err(DeviceError::NotContiguous { shape: layout.shape().into(), strides: layout.strides().into() });
        }
        let mut state = self.lock_anyway();
        if !state.device.is_host() {
            return Err(DeviceError::NotHost { device: state.device });
        }
        let runtime = state.value.as_ref().map(|value| value.storage().runtime().clone());
        let own = state.take_memory();
        let ticket = own.is_some().then(|| {
            state.landings += 1;
            state.landing = Some(state.landings);
            state.landings
        });
        drop(state);
        let memory = match (own, runtime) {
            (Some(own), _) => own,
            (None, Some(runtime)) => runtime.alloc_host(layout.size_bytes())?,
            // Another landing has the value.
            (None, None) => crate::Runtime::global().alloc_host(layout.size_bytes())?,
        };
        Ok(Landing { param: self.clone(), layout: layout.clone(), memory: Some(memory), ticket })
    }
}

impl State {
    /// The value's memory, if no one else uses it.
    fn take_memory(&mut self) -> Option<StorageMut> {
        let value = self.value.take()?;
        if !is_whole(&value) || !value.storage().can_be_reused() {
            self.value = Some(value);
            return None;
        }
        let layout = value.layout().clone();
        let storage = match value.into_storage().try_unique() {
            Ok(mut unique) => {
                if unique.as_bytes_mut().is_ok() {
                    return Some(unique);
                }
                unique.freeze_ready()
            }
            Err(shared) => shared,
        };
        self.value = Tensor::from_storage(storage, layout).ok();
        None
    }
}

/// Memory for the next value of a [`Param`]; see [`Param::land`].
#[must_use = "dropping it ends the landing"]
pub struct Landing {
    param: Param,
    layout: Layout,
    /// Until it is taken.
    memory: Option<StorageMut>,
    /// Of a landing in the value's own memory.
    ticket: Option<u64>,
}

impl Landing {
    /// Whether the bytes come into the value's own memory.
    #[must_use]
    pub fn is_in_place(&self) -> bool {
        self.ticket.is_some()
    }

    /// The memory to be written, once: whoever writes owns it meanwhile.
    ///
    /// # Panics
    /// If it was taken before.
    pub fn take_memory(&mut self) -> StorageMut {
        self.memory.take().expect("a landing's memory is taken once")
    }

    /// All bytes are there, in `storage`, which is the landing's memory: they are the value.
    ///
    /// # Errors
    /// [`DeviceError::Layout`] for a storage of another size; then the landing ends incomplete.
    pub fn complete(mut self, storage: Storage) -> Result<(), DeviceError> {
        let value = Tensor::from_storage(storage, self.layout.clone())?;
        let mut state = self.param.lock_anyway();
        if state.landing == self.ticket {
            state.landing = None;
        }
        state.put(value);
        self.ticket = None;
        self.param.0.landed.notify_all();
        Ok(())
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        let mut state = self.param.lock_anyway();
        if self.ticket.is_none() || state.landing != self.ticket {
            return;
        }
        state.landing = None;
        if state.value.is_none() {
            let storage = match self.memory.take() {
                Some(untouched) => untouched.freeze_ready(),
                None => Storage::torn(self.layout.size_bytes(), state.device),
            };
            state.value = Tensor::from_storage(storage, self.layout.clone()).ok();
        }
        drop(state);
        self.param.0.landed.notify_all();
    }
}

impl fmt::Debug for Landing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Landing").field("param", &self.param).field("in_place", &self.is_in_place()).finish()
    }
}
