//! What every operator is built of: a launch that makes a tensor, chunks for threads, and inputs that come in blocks.
//!
//! Invariant K1: which elements a block or a chunk has depends on the shape alone, never on the number of threads, so results are the
//! same on every machine.

use std::sync::{Mutex, PoisonError};

use farcall_device::{DType, DeviceError, Layout, Storage, Stream, Tensor, TensorMut};
use rayon::prelude::*;

use crate::convert::{Buffer, Cast};
use crate::memory::{LINE, Out, goes_around};
use crate::walk::Walk;
use crate::{OpError, Operand, Scalar};

/// Elements that go through an operator's steps at a time: a few blocks of 8 bytes an element stay in a first-level cache of 32 KiB.
pub(crate) const BLOCK: usize = 1024;

/// Elements that a thread takes at a time: 64 blocks, so that handing them out costs next to nothing.
pub(crate) const CHUNK: usize = 64 * BLOCK;

/// Results with fewer elements are computed by one thread. Handing work to another one costs about 10 microseconds (`benches/ops.rs`,
/// table "threads"): a tenth of what an addition of so many `f32` takes one thread.
pub(crate) const PARALLEL_MIN: usize = 256 * 1024;

/// Runs a loop that is compiled for this processor's vectors too: those that every x86-64 has are half as long, and narrow and widen
/// slowly.
#[inline(always)]
pub(crate) fn with_vectors<R>(work: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(work)
}

/// Makes a tensor of `dtype` and `shape` by a kernel on `stream`, from the bytes of `reads`' storages. Without elements there is
/// nothing to run.
pub(crate) fn launch<F>(
    op: &'static str,
    stream: &Stream,
    reads: &[&Tensor],
    dtype: DType,
    shape: &[usize],
    kernel: F,
) -> Result<Tensor, OpError>
where
    F: FnOnce(&[&[u8]], &mut [u8]) -> Result<(), DeviceError> + Send + 'static,
{
    launch_boxed(op, stream, reads, dtype, shape, Box::new(kernel))
}

type Kernel = Box<dyn FnOnce(&[&[u8]], &mut [u8]) -> Result<(), DeviceError> + Send>;

/// Compiled once for all operators.
fn launch_boxed(
    op: &'static str,
    stream: &Stream,
    reads: &[&Tensor],
    dtype: DType,
    shape: &[usize],
    kernel: Kernel,
) -> Result<Tensor, OpError> {
    let mut result = TensorMut::empty_on(dtype, shape, stream)?;
    let storages: Vec<&Storage> = reads.iter().map(|tensor| tensor.storage()).collect();
    let elements = result.numel();
    stream.launch_many(op, &storages, &mut [result.storage_mut()], move |reads, writes| {
        if elements == 0 { Ok(()) } else { kernel(reads, writes[0]) }
    })?;
    Ok(result.freeze(stream))
}

/// Calls `work` with the first element and the way to each chunk of `target`, on several threads if there are many elements.
pub(crate) fn for_each_chunk(target: &mut [u8], size: usize, work: impl Fn(usize, Out<'_>) + Sync) {
    let is_around = goes_around(target.len());
    if target.len() / size < PARALLEL_MIN {
        return work(0, Out::new(target, is_around));
    }
    for_each_part(target, CHUNK * size, true, &|index, chunk| work(index * CHUNK, Out::new(chunk, is_around)));
}

/// Calls `work` with the number and the bytes of each part of `target`, the last of which may be shorter.
pub(crate) fn for_each_part(
    target: &mut [u8],
    part_bytes: usize,
    is_parallel: bool,
    work: &(dyn Fn(usize, &mut [u8]) + Sync),
) {
    if is_parallel && target.len() > part_bytes {
        target.par_chunks_mut(part_bytes).enumerate().for_each(|(index, part)| work(index, part));
    } else {
        target.chunks_mut(part_bytes).enumerate().for_each(|(index, part)| work(index, part));
    }
}

/// What `work` gives for each number below `count`, in their order.
pub(crate) fn map_parts<T: Send>(count: usize, is_parallel: bool, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
    if !is_parallel || count < 2 {
        return (0..count).map(work).collect();
    }
    let results: Vec<Mutex<Option<T>>> = (0..count).map(|_| Mutex::new(None)).collect();
    let store = |index: usize| {
        let result = work(index);
        *results[index].lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
    };
    in_parallel(count, &store);
    results.into_iter().filter_map(|result| result.into_inner().unwrap_or_else(PoisonError::into_inner)).collect()
}

/// Compiled once: what is generic above only calls through it.
fn in_parallel(count: usize, work: &(dyn Fn(usize) + Sync)) {
    (0..count).into_par_iter().for_each(work);
}

/// One input of a kernel: where its elements are, and the dtype in which the kernel wants them.
pub(crate) struct Input {
    place: Place,
    from: DType,
    to: DType,
}

enum Place {
    /// In the storage at this place among the kernel's reads.
    Read(usize, Walk),
    Number(Scalar),
}

impl Input {
    /// The elements that `layout`, of the storage at `read` among the kernel's reads, describes.
    pub(crate) fn new(read: usize, layout: &Layout, to: DType) -> Self {
        Self { place: Place::Read(read, Walk::new(layout)), from: layout.dtype(), to }
    }

    /// Operands broadcast to `shape`, and the tensors among them.
    pub(crate) fn broadcast<'a>(
        operands: &[(Operand<'a>, DType)],
        shape: &[usize],
    ) -> Result<(Vec<Self>, Vec<&'a Tensor>), OpError> {
        let mut reads = Vec::with_capacity(operands.len());
        let mut inputs = Vec::with_capacity(operands.len());
        for (operand, to) in operands {
            inputs.push(match operand {
                Operand::Tensor(tensor) => {
                    reads.push(*tensor);
                    Self::new(reads.len() - 1, &tensor.layout().broadcast_to(shape)?, *to)
                }
                Operand::Scalar(scalar) => {
                    let from = match scalar {
                        Scalar::Bool(_) => DType::Bool,
                        Scalar::Int(_) => DType::I64,
                        Scalar::Float(_) => DType::F64,
                    };
                    Self { place: Place::Number(*scalar), from, to: *to }
                }
            });
        }
        Ok((inputs, reads))
    }

    /// For one thread: its own buffers.
    pub(crate) fn loader<'a>(&'a self, reads: &[&'a [u8]]) -> Loader<'a> {
        let cast = Cast::between(self.from, self.to);
        let mut loader = Loader {
            source: Elements::Constant,
            from_size: self.from.size_bytes(),
            to_size: self.to.size_bytes(),
            cast,
            gathered: Buffer::default(),
            casted: Buffer::default(),
            scratch: Default::default(),
        };
        match &self.place {
            Place::Number(Scalar::Bool(value)) => loader.repeat(&[u8::from(*value)]),
            Place::Number(Scalar::Int(value)) => loader.repeat(bytemuck::bytes_of(value)),
            Place::Number(Scalar::Float(value)) => loader.repeat(bytemuck::bytes_of(value)),
            Place::Read(read, walk) => {
                let bytes = reads[*read];
                if walk.is_constant() {
                    let mut element = [0; 16];
                    let element = &mut element[..loader.from_size];
                    walk.gather(loader.from_size, bytes, 0, element);
                    loader.repeat(element);
                } else {
                    // Foreign memory may start anywhere; gathered elements are aligned. Complex numbers are pairs.
                    let is_aligned = bytes.as_ptr().addr().is_multiple_of(loader.from_size.min(8));
                    loader.source = match walk.contiguous_from().filter(|_| is_aligned) {
                        Some(first) => Elements::Whole(&bytes[first * loader.from_size..]),
                        None => Elements::Strided(bytes, walk),
                    };
                }
            }
        }
        loader
    }
}

/// An input's elements, a block at a time, in the dtype that the kernel wants.
pub(crate) struct Loader<'a> {
    source: Elements<'a>,
    from_size: usize,
    to_size: usize,
    cast: Cast,
    gathered: Buffer,
    casted: Buffer,
    scratch: [Buffer; 2],
}

enum Elements<'a> {
    /// All are the one that fills the buffer of casted elements.
    Constant,
    Whole(&'a [u8]),
    Strided(&'a [u8], &'a Walk),
}

impl<'a> Loader<'a> {
    /// Elements `start..start + len` in row-major order; at most [`BLOCK`] of them.
    pub(crate) fn load(&mut self, start: usize, len: usize) -> &[u8] {
        debug_assert!(len <= BLOCK, "blocks are what buffers are made for");
        let source = match self.source {
            Elements::Constant => return self.casted.filled(len * self.to_size),
            Elements::Whole(bytes) => &bytes[start * self.from_size..(start + len) * self.from_size],
            Elements::Strided(bytes, walk) => {
                let gathered = self.gathered.bytes(len * self.from_size);
                walk.gather(self.from_size, bytes, start, gathered);
                gathered
            }
        };
        if self.cast.is_none() {
            return source;
        }
        let casted = self.casted.bytes(len * self.to_size);
        self.cast.run(source, casted, &mut self.scratch, len);
        casted
    }

    /// As [`Loader::load`] of plain bytes: straight into `target` where that saves a copy.
    pub(crate) fn load_into(&mut self, start: usize, target: &mut [u8]) {
        let len = target.len() / self.to_size;
        match self.source {
            Elements::Strided(bytes, walk) if self.cast.is_none() => walk.gather(self.from_size, bytes, start, target),
            Elements::Whole(bytes) => {
                let source = &bytes[start * self.from_size..(start + len) * self.from_size];
                self.cast.run(source, target, &mut self.scratch, len);
            }
            _ => target.copy_from_slice(self.load(start, len)),
        }
    }

    /// What [`Loader::load`] of the block from `start` on would read, as far as it lies together.
    pub(crate) fn ahead(&self, start: usize) -> &'a [u8] {
        let (bytes, first, count) = match self.source {
            Elements::Constant => return &[],
            Elements::Whole(bytes) => (bytes, start, BLOCK),
            Elements::Strided(bytes, walk) => match walk.run_from(start) {
                Some((first, count)) => (bytes, first, count.min(BLOCK)),
                None => return &[],
            },
        };
        let len = bytes.len() / self.from_size;
        &bytes[first.min(len) * self.from_size..(first + count).min(len) * self.from_size]
    }

    /// Elements `start..start + len`, as many as there are, if they need neither gathering nor a cast.
    pub(crate) fn plain(&self, start: usize, len: usize) -> Option<&'a [u8]> {
        match self.source {
            Elements::Whole(bytes) if self.cast.is_none() => {
                Some(&bytes[start * self.from_size..(start + len) * self.from_size])
            }
            _ => None,
        }
    }

    /// Whether elements need no cast and follow each other in runs of at least a cache line: whether [`Loader::copy`] pays.
    pub(crate) fn is_plain(&self) -> bool {
        self.cast.is_none() && (self.plain(0, 0).is_some() || self.ahead(0).len() >= LINE)
    }

    /// Brings elements `start..start + len` to `out`, from byte `at` on.
    pub(crate) fn copy_to(&mut self, start: usize, len: usize, at: usize, out: &mut Out<'_>) {
        if self.is_plain() {
            return self.copy(start, len, at, out);
        }
        for done in (0..len).step_by(BLOCK) {
            let count = BLOCK.min(len - done);
            out.put(at + done * self.to_size, self.load(start + done, count), &[]);
        }
    }

    /// Copies elements `start..start + len` to `out`, from byte `at` on, without a buffer in between.
    fn copy(&self, start: usize, len: usize, mut at: usize, out: &mut Out<'_>) {
        let (mut start, end) = (start, start + len);
        while start < end {
            let bytes = self.ahead(start);
            let bytes = &bytes[..bytes.len().min((end - start) * self.from_size)];
            start += bytes.len() / self.from_size;
            out.put(at, bytes, self.ahead(start));
            at += bytes.len();
        }
    }

    fn repeat(&mut self, element: &[u8]) {
        let source = self.gathered.bytes(BLOCK * self.from_size);
        source.chunks_exact_mut(element.len()).for_each(|chunk| chunk.copy_from_slice(element));
        let target = self.casted.bytes(BLOCK * self.to_size);
        self.cast.run(self.gathered.filled(BLOCK * self.from_size), target, &mut self.scratch, BLOCK);
    }
}
