//! A cell for a tensor that changes in steps: a parameter of a model, or an optimiser's state.
//!
//! Readers take snapshots, which are ordinary tensors. A step writes in place if nobody holds a snapshot, else on a copy.
//! Invariant P1 (SNAPSHOT): a tensor that [`Param::value`] gave never changes.
//! Invariant P2: a step is one unit: who asks in the middle of one waits until its work is enqueued, and sees all of it or nothing.
//! Several cells are locked in one order, so that two steps over the same ones cannot wait for each other.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::{DType, DeviceError, Storage, Stream, Tensor, TensorMut};

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
    /// `None` only while the lock is held.
    value: Mutex<Option<Tensor>>,
}

impl Param {
    /// A cell that holds `value`.
    #[must_use]
    pub fn new(value: Tensor) -> Self {
        let (dtype, shape) = (value.dtype(), value.shape().into());
        Self(Arc::new(Cell { dtype, shape, value: Mutex::new(Some(value)) }))
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

    /// The value after the last step: later ones do not change it. While it is held, each step that finds it copies it first.
    #[must_use]
    pub fn value(&self) -> Tensor {
        (*self.lock()).as_ref().cloned().expect("the value is back before the lock is released")
    }

    /// Replaces the value; snapshots of the old one stay.
    ///
    /// # Errors
    /// [`DeviceError::DTypeMismatch`] or [`DeviceError::Layout`] unless dtype and shape are the cell's.
    pub fn set(&self, value: Tensor) -> Result<(), DeviceError> {
        if value.dtype() != self.dtype() {
            return Err(DeviceError::DTypeMismatch { expected: self.dtype(), found: value.dtype() });
        }
        if value.shape() != self.shape() {
            let (from, to) = (value.shape().to_vec(), self.shape().to_vec());
            return Err(crate::LayoutError::ShapeMismatch { from, to }.into());
        }
        *self.lock() = Some(value);
        Ok(())
    }

    /// The value for a step by work on `stream`, as one holder's tensor with the present elements. Dropping it ends the step; until
    /// then others that use the cell wait, so this thread must not.
    ///
    /// # Errors
    /// [`DeviceError::WrongDevice`] if the value is not on the stream's device; [`DeviceError::OutOfMemory`] for the copy. The
    /// value stays as it was.
    /// # Cost
    /// Nothing if no one else holds the value's storage, else a copy on `stream`.
    pub fn write(&self, stream: &Stream) -> Result<ParamMut<'_>, DeviceError> {
        ParamMut::new(self, self.lock(), stream)
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
        locked.into_iter().map(|(index, guard)| ParamMut::new(params[index], guard, stream)).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Tensor>> {
        self.0.value.lock().unwrap_or_else(PoisonError::into_inner)
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
    guard: MutexGuard<'a, Option<Tensor>>,
    /// `None` only while it is dropped.
    tensor: Option<TensorMut>,
    stream: Stream,
}

impl<'a> ParamMut<'a> {
    fn new(param: &Param, mut guard: MutexGuard<'a, Option<Tensor>>, stream: &Stream) -> Result<Self, DeviceError> {
        let value = guard.take().expect("the value is back before the lock is released");
        // Only a storage that is exactly this tensor's can become a `TensorMut`.
        let is_whole =
            value.layout().packed() == *value.layout() && value.storage().len() == value.layout().size_bytes();
        if value.device() != stream.device() {
            let error = DeviceError::WrongDevice { expected: stream.device(), found: value.device() };
            *guard = Some(value);
            return Err(error);
        }
        let layout = value.layout().clone();
        let storage = if is_whole { value.into_storage().try_unique() } else { Err(value.into_storage()) };
        let storage = storage.or_else(|shared| {
            let copy = copied(&shared, &layout, stream);
            if copy.is_err() {
                *guard = Tensor::from_storage(shared, layout.clone()).ok();
            }
            copy
        })?;
        let tensor = TensorMut::from_storage(storage, param.dtype(), param.shape())?;
        Ok(Self { guard, tensor: Some(tensor), stream: stream.clone() })
    }

    /// The tensor, to be written by work on the step's stream.
    pub fn tensor_mut(&mut self) -> &mut TensorMut {
        self.tensor.as_mut().expect("there until it is dropped")
    }
}

/// A copy of the tensor of `layout` in `storage` for a writer alone.
fn copied(storage: &Storage, layout: &crate::Layout, stream: &Stream) -> Result<crate::StorageMut, DeviceError> {
    let view = Tensor::from_storage(storage.clone(), layout.clone())?;
    let packed = view.pack(stream)?;
    Ok(packed.into_storage().try_unique().unwrap_or_else(|_| unreachable!("a fresh storage has one holder")))
}

impl Drop for ParamMut<'_> {
    fn drop(&mut self) {
        *self.guard = self.tensor.take().map(|tensor| tensor.freeze(&self.stream));
    }
}

impl fmt::Debug for ParamMut<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ParamMut({:?})", self.tensor)
    }
}

#[cfg(test)]
mod tests;
