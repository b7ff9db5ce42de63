//! A cell for a tensor that changes in steps: a parameter of a model, or an optimiser's state.
//!
//! Readers take snapshots, which are ordinary tensors. A step writes in place if nobody holds a snapshot, else on a copy.
//! Bytes from elsewhere, such as a socket, come in by [`Param::land`].
//! Invariant P1 (SNAPSHOT): a tensor that [`Param::value`] gave never changes.
//! Invariant P2: a step is one unit: who asks in the middle of one waits until its work is enqueued, and sees all of it or nothing.
//! Several cells are locked in one order, so that two steps over the same ones cannot wait for each other.
//! Invariant P3: a value whose bytes came only in part is torn: reading it is [`DeviceError::Torn`], until it is written whole.

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::{DType, Device, DeviceError, Layout, Storage, Stream, Tensor, TensorMut};

mod landing;

pub use landing::Landing;

/// A tensor that is replaced or written in place from step to step. Clones are the same cell.
///
/// ```
/// use farcall_device::{Device, Param, Runtime, Tensor};
///
/// let weights = Param::new(Tensor::from_slice(&[1.0_f32, 2.0], &[2])?);
/// let before = weights.value();
/// let stream = Runtime::global().stream(Device::HOST)?;
/// {
///     let mut step = weights.write(&stream)?; // `before` is held: this writes to a copy
///     stream.fill(step.tensor_mut().storage_mut(), 0)?;
/// }
/// assert_eq!(before.as_slice::<f32>()?, [1.0, 2.0]);
/// assert_eq!(weights.value().as_slice::<f32>()?, [0.0, 0.0]);
/// # Ok::<(), farcall_device::DeviceError>(())
/// ```
#[derive(Clone)]
pub struct Param(Arc<Cell>);

struct Cell {
    dtype: DType,
    shape: Box<[usize]>,
    state: Mutex<State>,
    /// A landing has ended.
    landed: Condvar,
}

struct State {
    /// `None` only while the lock is held, or while bytes land in its memory.
    value: Option<Tensor>,
    /// The landing that has the value's memory.
    landing: Option<u64>,
    /// Landings so far.
    landings: u64,
    /// Where the value is, or was before its memory was given to a landing.
    device: Device,
}

impl Param {
    /// A cell that holds `value`.
    #[must_use]
    pub fn new(value: Tensor) -> Self {
        let (dtype, shape) = (value.dtype(), value.shape().into());
        let state = State { device: value.device(), value: Some(value), landing: None, landings: 0 };
        Self(Arc::new(Cell { dtype, shape, state: Mutex::new(state), landed: Condvar::new() }))
    }

    /// The element type, which never changes.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.0.dtype
    }

    /// The size of each dimension, which never changes.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        &self.0.shape
    }

    /// Whether both are clones of one cell.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Where the value is.
    #[must_use]
    pub fn device(&self) -> Device {
        self.lock_anyway().device
    }

    /// The value after the last step: later ones do not change it. While it is held, each step that finds it copies it first.
    ///
    /// While bytes from elsewhere land in its memory it waits for their end: see [`Param::land`].
    #[must_use]
    pub fn value(&self) -> Tensor {
        self.lock().value.clone().expect("the value is back before the lock is released")
    }

    /// As [`Param::value`], or `None` while bytes from elsewhere land in its memory.
    #[must_use]
    pub fn try_value(&self) -> Option<Tensor> {
        self.lock_anyway().value.clone()
    }

    /// Replaces the value; snapshots of the old one stay.
    ///
    /// # Errors
    /// [`DeviceError::DTypeMismatch`] or [`DeviceError::Layout`] unless dtype and shape are the cell's.
    pub fn set(&self, value: Tensor) -> Result<(), DeviceError> {
        self.expect_fit(value.layout())?;
        self.lock_anyway().put(value);
        self.0.landed.notify_all();
        Ok(())
    }

    /// Whether a tensor of `layout` can be the value: it has the cell's dtype and shape.
    ///
    /// # Errors
    /// [`DeviceError::DTypeMismatch`] or [`DeviceError::Layout`] if not.
    pub fn expect_fit(&self, layout: &Layout) -> Result<(), DeviceError> {
        if layout.dtype() != self.dtype() {
            return Err(DeviceError::DTypeMismatch { expected: self.dtype(), found: layout.dtype() });
        }
        if layout.shape() != self.shape() {
            let (from, to) = (layout.shape().to_vec(), self.shape().to_vec());
            return Err(crate::LayoutError::ShapeMismatch { from, to }.into());
        }
        Ok(())
    }

    /// Copies `source`, of any device and any layout, to where the value is: in place if nobody holds the value, else to fresh
    /// memory. The copy is work on a stream behind the fences of both; the value's own tells when it is done.
    ///
    /// # Errors
    /// Those of [`Param::expect_fit`], before anything is written; [`DeviceError::OutOfMemory`]; those of [`Stream::pack_into`].
    pub fn copy_from(&self, source: &Tensor) -> Result<(), DeviceError> {
        self.expect_fit(source.layout())?;
        let guard = self.lock();
        let value = guard.value.as_ref().expect("the value is back before the lock is released");
        let stream = value.storage().runtime().stream(value.device())?;
        let mut step = ParamMut::new(self, guard, &stream, Present::Dropped)?;
        stream.pack_into(source, step.tensor_mut().storage_mut())
    }

    /// The value for a step by work on `stream`, as one holder's tensor with the present elements. Dropping it ends the step; until
    /// then others that use the cell wait, so this thread must not.
    ///
    /// # Errors
    /// [`DeviceError::WrongDevice`] if the value is not on the stream's device; [`DeviceError::OutOfMemory`] for the copy;
    /// [`DeviceError::Torn`], or the failure of the work that wrote the value. The value stays as it was.
    /// # Cost
    /// Nothing if no one else holds the value's storage, else a copy on `stream`.
    pub fn write(&self, stream: &Stream) -> Result<ParamMut<'_>, DeviceError> {
        ParamMut::new(self, self.lock(), stream, Present::Kept)
    }

    /// As [`Param::write`], for a step that writes every element: the present ones are not kept, so nothing is copied, and a torn
    /// value is whole again.
    ///
    /// # Errors
    /// As [`Param::write`], but for [`DeviceError::Torn`].
    pub fn write_over(&self, stream: &Stream) -> Result<ParamMut<'_>, DeviceError> {
        ParamMut::new(self, self.lock(), stream, Present::Dropped)
    }

    /// As [`Param::write`], for all of `params`, in their order: one step.
    ///
    /// # Errors
    /// Those of [`Param::write`]; [`DeviceError::Unsupported`] if one cell is among them twice. All values stay as they were.
    pub fn write_all<'a>(params: &[&'a Self], stream: &Stream) -> Result<Vec<ParamMut<'a>>, DeviceError> {
        let address = |index: &usize| Arc::as_ptr(&params[*index].0).cast::<()>();
        let mut order: Vec<usize> = (0..params.len()).collect();
        order.sort_by_key(address);
        if order.windows(2).any(|pair| address(&pair[0]) == address(&pair[1])) {
            return Err(DeviceError::Unsupported { what: "a step with one parameter twice", device: stream.device() });
        }
        let mut locked: Vec<_> = order.iter().map(|index| (*index, params[*index].lock())).collect();
        locked.sort_by_key(|(index, _)| *index);
        locked.into_iter().map(|(index, guard)| ParamMut::new(params[index], guard, stream, Present::Kept)).collect()
    }

    /// With the value there.
    fn lock(&self) -> MutexGuard<'_, State> {
        let mut state = self.lock_anyway();
        while state.value.is_none() {
            state = self.0.landed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state
    }

    fn lock_anyway(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn put(&mut self, value: Tensor) {
        self.device = value.device();
        self.value = Some(value);
    }
}

impl fmt::Debug for Param {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Param({} {:?})", self.dtype(), self.shape())
    }
}

/// A [`Param`] in the middle of a step. Dropping it ends the step, also after a failure: then the elements are what was written.
#[must_use]
pub struct ParamMut<'a> {
    guard: MutexGuard<'a, State>,
    /// `None` only while it is dropped.
    tensor: Option<TensorMut>,
    stream: Stream,
}

/// What a step does with the present elements.
#[derive(Clone, Copy, PartialEq)]
enum Present {
    Kept,
    /// All are written over.
    Dropped,
}

impl<'a> ParamMut<'a> {
    fn new(
        param: &Param,
        mut guard: MutexGuard<'a, State>,
        stream: &Stream,
        present: Present,
    ) -> Result<Self, DeviceError> {
        let value = guard.value.take().expect("the value is back before the lock is released");
        let refused = if value.device() != stream.device() {
            Some(DeviceError::WrongDevice { expected: stream.device(), found: value.device() })
        } else if present == Present::Kept {
            value.storage().ready_event().known().and_then(Result::err)
        } else {
            None
        };
        if let Some(error) = refused {
            guard.value = Some(value);
            return Err(error);
        }
        let layout = value.layout().clone();
        let storage = match (is_whole(&value), present) {
            (true, Present::Kept) => value.into_storage().try_unique(),
            (true, Present::Dropped) if value.storage().can_be_reused() => value.into_storage().try_unique(),
            _ => Err(value.into_storage()),
        };
        let storage = storage.or_else(|shared| {
            let fresh = match present {
                Present::Kept => copied(&shared, &layout, stream),
                Present::Dropped => stream.alloc(layout.size_bytes()),
            };
            if fresh.is_err() {
                guard.value = Tensor::from_storage(shared, layout.clone()).ok();
            }
            fresh
        })?;
        let tensor = TensorMut::from_storage(storage, param.dtype(), param.shape())?;
        Ok(Self { guard, tensor: Some(tensor), stream: stream.clone() })
    }

    /// The tensor, to be written by work on the step's stream.
    pub fn tensor_mut(&mut self) -> &mut TensorMut {
        self.tensor.as_mut().expect("there until it is dropped")
    }
}

/// Only a storage that is exactly this tensor's can become a `TensorMut`.
fn is_whole(value: &Tensor) -> bool {
    value.layout().packed() == *value.layout() && value.storage().len() == value.layout().size_bytes()
}

/// A copy of the tensor of `layout` in `storage` for a writer alone.
fn copied(storage: &Storage, layout: &crate::Layout, stream: &Stream) -> Result<crate::StorageMut, DeviceError> {
    let view = Tensor::from_storage(storage.clone(), layout.clone())?;
    let packed = view.pack(stream)?;
    Ok(packed.into_storage().try_unique().unwrap_or_else(|_| unreachable!("a fresh storage has one holder")))
}

impl Drop for ParamMut<'_> {
    fn drop(&mut self) {
        self.guard.value = self.tensor.take().map(|tensor| tensor.freeze(&self.stream));
    }
}

impl fmt::Debug for ParamMut<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ParamMut({:?})", self.tensor)
    }
}

#[cfg(test)]
mod tests;
