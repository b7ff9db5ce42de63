//! A typed view of a storage: dtype, shape and strides over bytes.
//!
//! Views share their storage and move no bytes. Elements are read on the host by [`Tensor::as_slice`], [`Tensor::to_vec`] and
//! [`Tensor::item`]; a tensor of another device is copied first, by [`Tensor::host`].
//! Invariant T1: a tensor's layout lies inside its storage; it is checked once, when the tensor is made.

use std::fmt;

use bytemuck::PodCastError;
use bytemuck::checked::CheckedCastError;

use crate::future::DeviceFuture;
use crate::{DType, Device, DeviceError, Element, Layout, LayoutError, Runtime, Storage, StorageMut, Stream};

/// An n-dimensional array whose elements do not change. Cheap to clone.
#[derive(Clone)]
pub struct Tensor {
    storage: Storage,
    layout: Layout,
}

impl Tensor {
    /// A host tensor of `shape` with a copy of `elements`, in row-major order.
    ///
    /// # Errors
    /// [`DeviceError::LengthMismatch`] if the shape has another number of elements; [`DeviceError::OutOfMemory`].
    pub fn from_slice<E: Element>(elements: &[E], shape: &[usize]) -> Result<Self, DeviceError> {
        let mut tensor = TensorMut::empty(E::DTYPE, shape)?;
        tensor.copy_from_slice(elements)?;
        Ok(tensor.freeze_ready())
    }

    /// A host tensor of rank 0.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    pub fn scalar<E: Element>(element: E) -> Result<Self, DeviceError> {
        Self::from_slice(&[element], &[])
    }

    /// A host tensor of zeros.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`]; [`DeviceError::Layout`] for an impossible shape.
    pub fn zeros(dtype: DType, shape: &[usize]) -> Result<Self, DeviceError> {
        let mut tensor = TensorMut::empty(dtype, shape)?;
        // All bits zero is zero, or false, in every dtype.
        tensor.storage.as_bytes_mut()?.fill(0);
        Ok(tensor.freeze_ready())
    }

    /// A host tensor whose elements are all `element`.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`]; [`DeviceError::Layout`] for an impossible shape.
    pub fn full<E: Element>(element: E, shape: &[usize]) -> Result<Self, DeviceError> {
        let mut tensor = TensorMut::empty(E::DTYPE, shape)?;
        tensor.fill(element)?;
        Ok(tensor.freeze_ready())
    }

    /// The tensor that `layout` describes within `storage`.
    ///
    /// # Errors
    /// [`LayoutError::OutOfBounds`] if it reaches beyond the storage.
    pub fn from_storage(storage: Storage, layout: Layout) -> Result<Self, DeviceError> {
        layout.fits(storage.len())?;
        Ok(Self { storage, layout })
    }

    /// The bytes that this tensor is a view of.
    #[must_use]
    pub fn storage(&self) -> &Storage {
        &self.storage
    }

    /// The storage alone: for its sole holder, to write it again ([`Storage::try_unique`]).
    #[must_use]
    pub fn into_storage(self) -> Storage {
        self.storage
    }

    /// Dtype, shape, strides and offset.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The element type.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.layout.dtype()
    }

    /// The size of each dimension.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        self.layout.shape()
    }

    /// Elements from one index to the next, for each dimension.
    #[must_use]
    pub fn strides(&self) -> &[i64] {
        self.layout.strides()
    }

    /// The number of dimensions.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.layout.rank()
    }

    /// The number of elements.
    #[must_use]
    pub fn numel(&self) -> usize {
        self.layout.numel()
    }

    /// Where the bytes are.
    #[must_use]
    pub fn device(&self) -> Device {
        self.storage.device()
    }

    /// Whether the elements follow each other in row-major order without gaps.
    #[must_use]
    pub fn is_contiguous(&self) -> bool {
        self.layout.is_contiguous()
    }

    /// The view of `len` indices of `dim`, from `start`. See [`Layout::narrow`].
    ///
    /// # Errors
    /// Those of [`Layout::narrow`].
    pub fn narrow(&self, dim: usize, start: usize, len: usize) -> Result<Self, DeviceError> {
        self.view(self.layout.narrow(dim, start, len))
    }

    /// The view at one index of `dim`, without that dimension. See [`Layout::select`].
    ///
    /// # Errors
    /// Those of [`Layout::select`].
    pub fn select(&self, dim: usize, index: usize) -> Result<Self, DeviceError> {
        self.view(self.layout.select(dim, index))
    }

    /// The view whose dimension `i` is this one's `dims[i]`. See [`Layout::permute`].
    ///
    /// # Errors
    /// Those of [`Layout::permute`].
    pub fn permute(&self, dims: &[usize]) -> Result<Self, DeviceError> {
        self.view(self.layout.permute(dims))
    }

    /// The view with two dimensions exchanged. See [`Layout::transpose`].
    ///
    /// # Errors
    /// Those of [`Layout::transpose`].
    pub fn transpose(&self, first: usize, second: usize) -> Result<Self, DeviceError> {
        self.view(self.layout.transpose(first, second))
    }

    /// The view of the same elements with another shape. See [`Layout::reshape`].
    ///
    /// # Errors
    /// Those of [`Layout::reshape`]: `NotViewable` asks for [`Tensor::contiguous`] first.
    pub fn reshape(&self, shape: &[usize]) -> Result<Self, DeviceError> {
        self.view(self.layout.reshape(shape))
    }

    /// The view that repeats dimensions of size 1 to get `shape`. See [`Layout::broadcast_to`].
    ///
    /// # Errors
    /// Those of [`Layout::broadcast_to`].
    pub fn broadcast_to(&self, shape: &[usize]) -> Result<Self, DeviceError> {
        self.view(self.layout.broadcast_to(shape))
    }

    /// The view without dimension `dim`, which has size 1. See [`Layout::squeeze`].
    ///
    /// # Errors
    /// Those of [`Layout::squeeze`].
    pub fn squeeze(&self, dim: usize) -> Result<Self, DeviceError> {
        self.view(self.layout.squeeze(dim))
    }

    /// The view with a dimension of size 1 inserted before `dim`. See [`Layout::unsqueeze`].
    ///
    /// # Errors
    /// Those of [`Layout::unsqueeze`].
    pub fn unsqueeze(&self, dim: usize) -> Result<Self, DeviceError> {
        self.view(self.layout.unsqueeze(dim))
    }

    /// This tensor if it is contiguous, else a packed copy on its device, made on `stream`.
    ///
    /// # Errors
    /// [`DeviceError::WrongDevice`] if the stream is another device's; [`DeviceError::OutOfMemory`].
    pub fn contiguous(&self, stream: &Stream) -> Result<Self, DeviceError> {
        if self.is_contiguous() { Ok(self.clone()) } else { self.pack(stream) }
    }

    /// A packed copy on this tensor's device, made on `stream`, even if the tensor is contiguous: with a storage of its own that
    /// holds these elements and nothing else.
    ///
    /// # Errors
    /// [`DeviceError::WrongDevice`] if the stream is another device's; [`DeviceError::OutOfMemory`].
    pub fn pack(&self, stream: &Stream) -> Result<Self, DeviceError> {
        if stream.device() != self.device() {
            return Err(DeviceError::WrongDevice { expected: stream.device(), found: self.device() });
        }
        stream.pack(self, self.device())
    }

    /// The elements of a contiguous host tensor, in row-major order, without a copy.
    ///
    /// # Errors
    /// Each obstacle is its own: [`DeviceError::DTypeMismatch`], [`DeviceError::NotContiguous`], [`DeviceError::NotHost`],
    /// [`DeviceError::NotReady`]; [`DeviceError::InvalidBits`] for bytes that are no `bool`; [`DeviceError::Misaligned`] for
    /// foreign memory at an odd address.
    pub fn as_slice<E: Element>(&self) -> Result<&[E], DeviceError> {
        self.expect_dtype(E::DTYPE)?;
        if !self.is_contiguous() {
            return Err(DeviceError::NotContiguous { shape: self.shape().into(), strides: self.strides().into() });
        }
        let bytes = &self.storage.as_bytes()?[self.layout.byte_span()];
        if bytes.is_empty() {
            return Ok(&[]);
        }
        bytemuck::checked::try_cast_slice(bytes).map_err(|error| cast_error(error, E::DTYPE))
    }

    /// The elements of a host tensor of any layout, in row-major order, copied.
    ///
    /// # Errors
    /// [`DeviceError::DTypeMismatch`], [`DeviceError::NotHost`], [`DeviceError::NotReady`], [`DeviceError::InvalidBits`].
    pub fn to_vec<E: Element>(&self) -> Result<Vec<E>, DeviceError> {
        match self.as_slice() {
            Ok(elements) => return Ok(elements.to_vec()),
            Err(DeviceError::NotContiguous { .. } | DeviceError::Misaligned { .. }) => {}
            Err(other) => return Err(other),
        }
        let mut packed = vec![0; self.layout.size_bytes()];
        crate::pack::pack(&self.layout, self.storage.as_bytes()?, &mut packed);
        let elements = packed.chunks_exact(size_of::<E>()).map(bytemuck::checked::try_pod_read_unaligned);
        elements.collect::<Result<_, _>>().map_err(|error| cast_error(error, E::DTYPE))
    }

    /// The element of a host tensor that has exactly one.
    ///
    /// # Errors
    /// [`DeviceError::LengthMismatch`] if it has none or several; otherwise as [`Tensor::to_vec`].
    pub fn item<E: Element>(&self) -> Result<E, DeviceError> {
        match self.to_vec()?.as_slice() {
            [element] => Ok(*element),
            elements => {
                Err(DeviceError::LengthMismatch { what: "elements of an item", expected: 1, found: elements.len() })
            }
        }
    }

    /// This tensor in host memory: itself if it is there, else a packed copy. Ready when the bytes are.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`]; the failure of the work that writes the bytes.
    /// # Cancel safety
    /// Dropping the future ends nothing that is under way; the tensor is unchanged.
    pub fn host(&self) -> DeviceFuture<Self> {
        if self.device().is_host() {
            return DeviceFuture::ready(self.clone());
        }
        let runtime = self.storage.runtime();
        let copy = |tensor: &Self| tensor.storage.runtime().stream(tensor.device())?.pack(tensor, Device::HOST);
        // Inline, the copy would block this thread until the bytes are there. Streams of a CUDA device wait for each other, and
        // would block it for anything else.
        let ready = self.storage.ready_event();
        let waits_elsewhere = if self.storage.is_cuda() { ready.on_cuda().is_some() } else { runtime.is_queued() };
        if waits_elsewhere || ready.is_over() {
            return DeviceFuture::from_result(copy(self));
        }
        let tensor = self.clone();
        DeviceFuture::from_future(async move {
            tensor.storage.ready_event().host_ready().await?;
            copy(&tensor)
        })
    }

    fn view(&self, layout: Result<Layout, LayoutError>) -> Result<Self, DeviceError> {
        // No bounds to check: a view reaches no byte that its parent does not (L2).
        Ok(Self { storage: self.storage.clone(), layout: layout? })
    }

    fn expect_dtype(&self, expected: DType) -> Result<(), DeviceError> {
        let found = self.dtype();
        if found == expected { Ok(()) } else { Err(DeviceError::DTypeMismatch { expected, found }) }
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({} {:?} on {})", self.dtype(), self.shape(), self.device())
    }
}

/// A contiguous tensor that belongs to one holder, to be written; [`TensorMut::freeze`] makes it a [`Tensor`].
#[must_use]
pub struct TensorMut {
    storage: StorageMut,
    layout: Layout,
}

impl TensorMut {
    /// A host tensor whose elements are unspecified: recycled memory, not zeros.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`]; [`DeviceError::Layout`] for an impossible shape.
    pub fn empty(dtype: DType, shape: &[usize]) -> Result<Self, DeviceError> {
        let layout = Layout::contiguous(dtype, shape)?;
        let storage = Runtime::global().alloc_host(layout.size_bytes())?;
        Ok(Self { storage, layout })
    }

    /// A tensor on the device and from the runtime of `stream`, whose elements are unspecified.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`]; [`DeviceError::Layout`] for an impossible shape.
    pub fn empty_on(dtype: DType, shape: &[usize], stream: &Stream) -> Result<Self, DeviceError> {
        let layout = Layout::contiguous(dtype, shape)?;
        let storage = stream.alloc(layout.size_bytes())?;
        Ok(Self { storage, layout })
    }

    /// The contiguous tensor of `dtype` and `shape` over memory that has exactly its size.
    ///
    /// # Errors
    /// [`DeviceError::LengthMismatch`] if the size differs; [`DeviceError::Layout`] for an impossible shape.
    pub fn from_storage(storage: StorageMut, dtype: DType, shape: &[usize]) -> Result<Self, DeviceError> {
        let layout = Layout::contiguous(dtype, shape)?;
        let (expected, found) = (layout.size_bytes(), storage.len());
        if expected != found {
            return Err(DeviceError::LengthMismatch { what: "bytes of the tensor's storage", expected, found });
        }
        Ok(Self { storage, layout })
    }

    /// The layout, which is contiguous from offset 0.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The element type.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.layout.dtype()
    }

    /// The size of each dimension.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        self.layout.shape()
    }

    /// The number of elements.
    #[must_use]
    pub fn numel(&self) -> usize {
        self.layout.numel()
    }

    /// Where the bytes are.
    #[must_use]
    pub fn device(&self) -> Device {
        self.storage.device()
    }

    /// The bytes, for work on a stream.
    pub fn storage_mut(&mut self) -> &mut StorageMut {
        &mut self.storage
    }

    /// The elements of a host tensor, to be written. For `bool`, whose bytes are not all valid, use
    /// [`TensorMut::copy_from_slice`].
    ///
    /// # Errors
    /// [`DeviceError::DTypeMismatch`], [`DeviceError::NotHost`], [`DeviceError::NotReady`].
    pub fn as_mut_slice<E: Element + bytemuck::AnyBitPattern>(&mut self) -> Result<&mut [E], DeviceError> {
        self.expect_dtype(E::DTYPE)?;
        let bytes = self.storage.as_bytes_mut()?;
        if bytes.is_empty() {
            return Ok(&mut []);
        }
        bytemuck::try_cast_slice_mut(bytes).map_err(|error| cast_error(error.into(), E::DTYPE))
    }

    /// Copies `elements`, in row-major order, into a host tensor.
    ///
    /// # Cost
    /// One copy, by two processors while one is idle and it is long ([`crate::copy`]).
    /// # Errors
    /// [`DeviceError::LengthMismatch`] unless there are as many; [`DeviceError::DTypeMismatch`], [`DeviceError::NotHost`],
    /// [`DeviceError::NotReady`].
    pub fn copy_from_slice<E: Element>(&mut self, elements: &[E]) -> Result<(), DeviceError> {
        self.expect_dtype(E::DTYPE)?;
        let (expected, found) = (self.numel(), elements.len());
        if expected != found {
            return Err(DeviceError::LengthMismatch { what: "elements of the shape", expected, found });
        }
        crate::memory::copy(self.storage.as_bytes_mut()?, bytemuck::cast_slice(elements));
        Ok(())
    }

    /// Sets every element of a host tensor.
    ///
    /// # Errors
    /// [`DeviceError::DTypeMismatch`], [`DeviceError::NotHost`], [`DeviceError::NotReady`].
    pub fn fill<E: Element>(&mut self, element: E) -> Result<(), DeviceError> {
        self.expect_dtype(E::DTYPE)?;
        let source = bytemuck::bytes_of(&element);
        for target in self.storage.as_bytes_mut()?.chunks_exact_mut(source.len()) {
            target.copy_from_slice(source);
        }
        Ok(())
    }

    /// Ends writing: the elements are complete at this point of `stream`.
    #[must_use]
    pub fn freeze(self, stream: &Stream) -> Tensor {
        Tensor { storage: self.storage.freeze(stream), layout: self.layout }
    }

    /// Ends writing by the host: the elements are complete now, or, if streams wrote them, when those are done.
    #[must_use]
    pub fn freeze_ready(self) -> Tensor {
        Tensor { storage: self.storage.freeze_ready(), layout: self.layout }
    }

    fn expect_dtype(&self, expected: DType) -> Result<(), DeviceError> {
        let found = self.dtype();
        if found == expected { Ok(()) } else { Err(DeviceError::DTypeMismatch { expected, found }) }
    }
}

impl fmt::Debug for TensorMut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TensorMut({} {:?} on {})", self.dtype(), self.shape(), self.device())
    }
}

fn cast_error(error: CheckedCastError, dtype: DType) -> DeviceError {
    match error {
        CheckedCastError::InvalidBitPattern => DeviceError::InvalidBits { dtype },
        CheckedCastError::PodCastError(PodCastError::TargetAlignmentGreaterAndInputNotAligned) => {
            DeviceError::Misaligned { dtype }
        }
        CheckedCastError::PodCastError(error) => unreachable!("whole elements of {dtype} were cast: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use std::ptr::NonNull;
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::{C64, Config, Event, Release, StreamId, f16};

    const LONG: Duration = Duration::from_secs(60);

    fn host_stream() -> Stream {
        Runtime::global().stream(Device::HOST).unwrap()
    }

    #[test]
    fn each_constructor_gives_the_elements_it_says() {
        let matrix = Tensor::from_slice(&[1_i32, 2, 3, 4, 5, 6], &[2, 3]).unwrap();
        assert_eq!((matrix.dtype(), matrix.shape(), matrix.strides()), (DType::I32, &[2, 3][..], &[3, 1][..]));
        assert_eq!(matrix.as_slice::<i32>().unwrap(), [1, 2, 3, 4, 5, 6]);
        assert_eq!(Tensor::scalar(2.5_f64).unwrap().item::<f64>().unwrap(), 2.5);
        assert_eq!(Tensor::zeros(DType::Bool, &[2]).unwrap().to_vec::<bool>().unwrap(), [false, false]);
        let half = f16::from_f32(1.5);
        assert_eq!(Tensor::full(half, &[3]).unwrap().as_slice::<f16>().unwrap(), [half; 3]);
        let complex = C64 { re: 1.0, im: -1.0 };
        assert_eq!(Tensor::full(complex, &[1, 1]).unwrap().item::<C64>().unwrap(), complex);
        assert_eq!(Tensor::zeros(DType::F32, &[0, 3]).unwrap().as_slice::<f32>().unwrap(), []);
        assert_eq!(format!("{matrix:?}"), "Tensor(i32 [2, 3] on cpu:0)");
    }

    #[test]
    fn views_share_the_storage() {
        let matrix = Tensor::from_slice(&[1_u8, 2, 3, 4, 5, 6], &[2, 3]).unwrap();
        for (view, elements) in [
            (matrix.narrow(1, 1, 2), vec![2, 3, 5, 6]),
            (matrix.select(0, 1), vec![4, 5, 6]),
            (matrix.permute(&[1, 0]), vec![1, 4, 2, 5, 3, 6]),
            (matrix.transpose(0, 1), vec![1, 4, 2, 5, 3, 6]),
            (matrix.reshape(&[3, 2]), vec![1, 2, 3, 4, 5, 6]),
            (matrix.select(0, 0).and_then(|row| row.broadcast_to(&[2, 3])), vec![1, 2, 3, 1, 2, 3]),
            (matrix.unsqueeze(0).and_then(|view| view.squeeze(0)), vec![1, 2, 3, 4, 5, 6]),
        ] {
            let view = view.unwrap();
            assert!(view.storage().is_same(matrix.storage()));
            assert_eq!(view.to_vec::<u8>().unwrap(), elements);
            let packed = view.contiguous(&host_stream()).unwrap().host().wait(LONG).unwrap();
            assert_eq!(packed.as_slice::<u8>().unwrap(), elements);
        }
    }

    #[test]
    fn a_contiguous_tensor_is_not_copied_and_a_packed_one_is() {
        let tensor = Tensor::from_slice(&[1_u16, 2, 3], &[3]).unwrap();
        let tail = tensor.narrow(0, 1, 2).unwrap();
        assert!(tail.contiguous(&host_stream()).unwrap().storage().is_same(tensor.storage()));
        let packed = tail.pack(&host_stream()).unwrap().host().wait(LONG).unwrap();
        assert_eq!((packed.storage().len(), packed.layout().offset()), (4, 0));
        assert_eq!(packed.as_slice::<u16>().unwrap(), [2, 3]);
    }

    #[test]
    fn t1_a_layout_beyond_its_storage_is_refused() {
        let storage = Tensor::zeros(DType::U8, &[8]).unwrap().storage().clone();
        let layout = Layout::contiguous(DType::F32, &[3]).unwrap();
        let error = Tensor::from_storage(storage, layout).unwrap_err();
        assert!(matches!(error, DeviceError::Layout(LayoutError::OutOfBounds { end_bytes: 12, storage_bytes: 8 })));
    }

    #[test]
    fn each_obstacle_to_reading_is_its_own_error() {
        let matrix = Tensor::from_slice(&[1_u8, 2, 3, 4], &[2, 2]).unwrap();
        assert!(matches!(
            matrix.as_slice::<i8>(),
            Err(DeviceError::DTypeMismatch { expected: DType::I8, found: DType::U8 })
        ));
        assert!(matches!(matrix.transpose(0, 1).unwrap().as_slice::<u8>(), Err(DeviceError::NotContiguous { .. })));
        assert!(matches!(matrix.item::<u8>(), Err(DeviceError::LengthMismatch { found: 4, .. })));
        let as_bool =
            Tensor::from_storage(matrix.storage().clone(), Layout::contiguous(DType::Bool, &[4]).unwrap()).unwrap();
        assert!(matches!(as_bool.as_slice::<bool>(), Err(DeviceError::InvalidBits { dtype: DType::Bool })));
        assert!(matches!(
            Tensor::from_slice(&[1_u8], &[2]),
            Err(DeviceError::LengthMismatch { expected: 2, found: 1, .. })
        ));
    }

    #[test]
    fn a_tensor_of_a_device_is_read_after_a_copy_to_the_host() {
        let runtime = Runtime::new(Config { emulated_devices: 1, ..Config::default() }).unwrap();
        let cuda = runtime.stream(Device::Cuda(0)).unwrap();
        let mut bytes = TensorMut::empty_on(DType::U8, &[2, 2], &cuda).unwrap();
        assert!(matches!(bytes.as_mut_slice::<u8>(), Err(DeviceError::NotHost { .. })));
        cuda.fill(bytes.storage_mut(), 4).unwrap();
        let tensor = bytes.freeze(&cuda);
        assert!(matches!(tensor.as_slice::<u8>(), Err(DeviceError::NotHost { device: Device::Cuda(0) })));
        let host = tensor.select(0, 1).unwrap().host().wait(Duration::ZERO).unwrap();
        assert_eq!((host.device(), host.as_slice::<u8>().unwrap()), (Device::HOST, &[4, 4][..]));
    }

    #[test]
    fn ready_a_host_copy_waits_for_the_bytes() {
        let runtime = Runtime::new(Config { emulated_devices: 1, ..Config::default() }).unwrap();
        let (trigger, written) = Event::pending_at(StreamId::HOST, 1);
        let storage = runtime.alloc(Device::Cuda(0), 2).unwrap().freeze_at(written);
        let tensor = Tensor::from_storage(storage, Layout::contiguous(DType::U8, &[2]).unwrap()).unwrap();
        assert!(matches!(tensor.host().wait(Duration::ZERO), Err(DeviceError::Timeout { .. })));
        std::thread::scope(|scope| {
            let copy = scope.spawn(|| tensor.host().wait(Duration::from_secs(60)));
            trigger.complete(Ok(()));
            assert_eq!(copy.join().unwrap().unwrap().shape(), [2]);
        });
    }

    #[test]
    fn elements_are_written_in_place() {
        let mut tensor = TensorMut::empty(DType::F32, &[3]).unwrap();
        tensor.fill(0.5_f32).unwrap();
        tensor.as_mut_slice::<f32>().unwrap()[1] = 2.0;
        assert!(matches!(tensor.fill(1_u8), Err(DeviceError::DTypeMismatch { .. })));
        assert_eq!(tensor.freeze(&host_stream()).as_slice::<f32>().unwrap(), [0.5, 2.0, 0.5]);
        let storage = Runtime::global().alloc_host(5).unwrap();
        assert!(TensorMut::from_storage(storage, DType::F32, &[1]).is_err());
    }

    #[test]
    #[expect(unsafe_code, reason = "wraps a static")]
    fn misaligned_foreign_memory_is_read_by_copy() {
        struct Nobody;
        impl Release for Nobody {
            fn release(&self) {}
        }
        static BYTES: [u64; 2] = [u64::from_le_bytes([0, 1, 0, 0, 0, 2, 0, 0]), 0];
        let start = NonNull::from(&BYTES).cast::<u8>();
        // SAFETY: one byte into a static of 16, which lives for ever and is never written.
        let storage = unsafe { Storage::external(start.add(1), 8, Device::HOST, Arc::new(Nobody)) };
        let tensor = Tensor::from_storage(storage, Layout::contiguous(DType::U32, &[2]).unwrap()).unwrap();
        assert!(matches!(tensor.as_slice::<u32>(), Err(DeviceError::Misaligned { dtype: DType::U32 })));
        assert_eq!(tensor.to_vec::<u32>().unwrap(), [1, 2]);
    }
}
