//! Tensors of one value or of indices, copies, casts, and strided elements packed and unpacked.

use farcall_device::{DType, DeviceError, Layout, Stream, Tensor};

use crate::convert::Cast;
use crate::gradient::of_arg;
use crate::kernel::{BLOCK, CHUNK, Input, PARALLEL_MIN, for_each_chunk, for_each_part, launch};
use crate::memory::{LINE, Out, goes_around};
use crate::table::{Derivative, Operator, one};
use crate::walk::Walk;
use crate::{OpError, Scalar};

/// Bytes of a contiguous tensor that a thread copies at a time: more than caches hold, so that the platform's copy goes past them.
const COPY_PART_BYTES: usize = 64 << 20;

/// A tensor whose elements are all `value`.
///
/// # Errors
/// [`OpError::Device`], for want of memory or an impossible shape.
pub fn full(shape: &[usize], value: impl Into<Scalar>, dtype: DType, stream: &Stream) -> Result<Tensor, OpError> {
    let element = element_of(value.into(), dtype);
    let size = dtype.size_bytes();
    launch("full", stream, &[], dtype, shape, move |_, target| {
        let line: [u8; LINE] = std::array::from_fn(|at| element[at % size]);
        for_each_chunk(target, size, |_, mut out| out.fill(&line));
        Ok(())
    })
}

/// The bytes of a number as an element.
fn element_of(value: Scalar, dtype: DType) -> [u8; 16] {
    let (mut source, mut element) = ([0_u64; 2], [0_u64; 2]);
    let from = match value {
        Scalar::Bool(value) => {
            source[0] = u64::from(value);
            DType::Bool
        }
        Scalar::Int(value) => {
            source[0] = value as u64;
            DType::I64
        }
        Scalar::Float(value) => {
            source[0] = value.to_bits();
            DType::F64
        }
    };
    let (size, to_size) = (from.size_bytes(), dtype.size_bytes());
    let (source, target) = (bytemuck::bytes_of(&source), bytemuck::bytes_of_mut(&mut element));
    Cast::between(from, dtype).run(&source[..size], &mut target[..to_size], &mut Default::default(), 1);
    bytemuck::cast(element)
}

/// The integers from 0 to `len - 1`, as `i64`.
///
/// # Errors
/// [`OpError::Device`], for want of memory.
pub fn arange(len: usize, stream: &Stream) -> Result<Tensor, OpError> {
    launch("arange", stream, &[], DType::I64, &[len], move |_, target| {
        for (index, element) in bytemuck::cast_slice_mut::<u8, i64>(target).iter_mut().enumerate() {
            *element = index as i64;
        }
        Ok(())
    })
}

/// The elements in another dtype; the tensor itself if it has that already.
///
/// # Shapes and dtypes
/// All pairs, as torch: to narrower reals to the nearest, ties to even; reals to integers towards zero; complex numbers without their
/// imaginary part. What is out of an integer's range saturates and NaN becomes 0, but `u8` is reached by way of `i64` and wraps.
///
/// # Errors
/// [`OpError::Device`].
pub fn cast(x: &Tensor, dtype: DType, stream: &Stream) -> Result<Tensor, OpError> {
    if x.dtype() == dtype {
        return Ok(x.clone());
    }
    let input = Input::new(0, x.layout(), dtype);
    launch("cast", stream, &[x], dtype, x.shape(), move |reads, target| {
        load_all(&input, dtype.size_bytes(), reads, target);
        Ok(())
    })
}

/// Loads all elements of `input` to `target`, where each has `size` bytes.
fn load_all(input: &Input, size: usize, reads: &[&[u8]], target: &mut [u8]) {
    for_each_chunk(target, size, |start, mut out| {
        let mut loader = input.loader(reads);
        if loader.is_plain() {
            return loader.copy_to(start, out.len() / size, 0, &mut out);
        }
        out.blocks(BLOCK * size, |index, block| {
            let start = start + index * BLOCK;
            loader.load_into(start, block);
            Some([loader.ahead(start + BLOCK), &[], &[]])
        });
    });
}

/// A packed copy: the elements in row-major order in memory of their own.
///
/// # Errors
/// [`OpError::Device`].
/// # Cost
/// One pass; a transposed view goes by tiles that use whole cache lines on both sides.
pub fn copy(x: &Tensor, stream: &Stream) -> Result<Tensor, OpError> {
    let (walk, size) = (Walk::new(x.layout()), x.dtype().size_bytes());
    let input = Input::new(0, x.layout(), x.dtype());
    launch("copy", stream, &[x], x.dtype(), x.shape(), move |reads, target| {
        let (is_parallel, is_around) = (walk.numel() >= PARALLEL_MIN, goes_around(target.len()));
        if walk.contiguous_from().is_some() {
            for_each_part(target, COPY_PART_BYTES, is_parallel, &|index, part| {
                walk.gather(size, reads[0], index * (COPY_PART_BYTES / size), part);
            });
        } else if let Some(tiles) = walk.tiles(size) {
            // Whole rows of the outermost dimension, so that each part is a view of its own.
            let rows = if is_parallel { tiles.rows_of_part(CHUNK, rayon::current_num_threads()) } else { usize::MAX };
            let part_bytes = rows.saturating_mul(walk.row_elements() * size);
            for_each_part(target, part_bytes, is_parallel, &|index, part| {
                tiles.pack(index.saturating_mul(rows), rows, reads[0], Out::new(part, is_around));
            });
        } else {
            load_all(&input, size, reads, target);
        }
        Ok(())
    })
}

/// The tensor itself if it is contiguous, else a packed copy.
///
/// # Errors
/// [`OpError::Device`].
pub fn contiguous(x: &Tensor, stream: &Stream) -> Result<Tensor, OpError> {
    if x.is_contiguous() { Ok(x.clone()) } else { copy(x, stream) }
}

/// A contiguous tensor of `shape` that is zero but where `place` says, one of its views, which holds the elements of `x`: what makes the
/// gradient of a view that of the whole.
///
/// # Errors
/// [`OpError::Shapes`] unless `place` has the shape of `x`, lies in `shape` and has each element once; [`OpError::Device`].
pub fn unpack(x: &Tensor, place: &Layout, shape: &[usize], stream: &Stream) -> Result<Tensor, OpError> {
    let whole = Layout::contiguous(x.dtype(), shape)?;
    let fits = place.dtype() == x.dtype() && place.fits(whole.size_bytes()).is_ok();
    let repeats = place.shape().iter().zip(place.strides()).any(|(size, stride)| *size > 1 && *stride == 0);
    if place.shape() != x.shape() || !fits || repeats {
        let (shapes, rule) = (vec![x.shape().to_vec(), shape.to_vec()], "the first must be a view of the second");
        return Err(OpError::Shapes { op: "unpack", shapes, rule });
    }
    let (input, walk, size) = (Input::new(0, x.layout(), x.dtype()), Walk::new(place), x.dtype().size_bytes());
    launch("unpack", stream, &[x], x.dtype(), shape, move |reads, target| {
        target.fill(0);
        let mut loader = input.loader(reads);
        for start in (0..walk.numel()).step_by(BLOCK) {
            let len = BLOCK.min(walk.numel() - start);
            walk.scatter(size, loader.load(start, len), start, target);
        }
        Ok(())
    })
}

/// The shape that a schema's list of sizes means.
pub(crate) fn shape_of(op: &'static str, sizes: &[i64]) -> Result<Vec<usize>, OpError> {
    let size = |size: &i64| {
        let rule = "sizes are not negative";
        usize::try_from(*size).map_err(|_| OpError::Value { op, name: "size", value: size.to_string(), rule })
    };
    sizes.iter().map(size).collect()
}

/// The dtype of new tensors unless one is named.
fn default_dtype(value: Scalar) -> DType {
    match value {
        Scalar::Bool(_) => DType::Bool,
        Scalar::Int(_) => DType::I64,
        Scalar::Float(_) => DType::F32,
    }
}

/// Checks the places of a layout, a device and pinned memory, which the stream decides.
fn refuse_placement(a: &crate::table::Args<'_>, first: usize) -> Result<(), OpError> {
    (first..first + 3).try_for_each(|index| a.none(index))
}

const NO_TENSOR: &str = "no argument is a tensor";
const CONSTANT: &str = "the result does not depend on the elements";

pub(crate) const OPERATORS: &[Operator] = &[
    Operator {
        schema: "aten::full(SymInt[] size, Scalar fill_value, *, ScalarType? dtype=None, Layout? layout=None, Device? device=None, bool? pin_memory=None) -> Tensor",
        run: |a, s| {
            refuse_placement(&a, 3)?;
            let value = a.scalar(1)?;
            let dtype = a.dtype_or_none(2)?.unwrap_or(default_dtype(value));
            one(full(&shape_of("full", &a.ints(0)?)?, value, dtype, s))
        },
        derivative: Derivative::None(NO_TENSOR),
    },
    Operator {
        schema: "aten::zeros(SymInt[] size, *, ScalarType? dtype=None, Layout? layout=None, Device? device=None, bool? pin_memory=None) -> Tensor",
        run: |a, s| {
            refuse_placement(&a, 2)?;
            one(full(&shape_of("zeros", &a.ints(0)?)?, 0, a.dtype_or_none(1)?.unwrap_or(DType::F32), s))
        },
        derivative: Derivative::None(NO_TENSOR),
    },
    Operator {
        schema: "aten::ones(SymInt[] size, *, ScalarType? dtype=None, Layout? layout=None, Device? device=None, bool? pin_memory=None) -> Tensor",
        run: |a, s| {
            refuse_placement(&a, 2)?;
            one(full(&shape_of("ones", &a.ints(0)?)?, 1, a.dtype_or_none(1)?.unwrap_or(DType::F32), s))
        },
        derivative: Derivative::None(NO_TENSOR),
    },
    Operator {
        schema: "aten::fill.Scalar(Tensor self, Scalar value) -> Tensor",
        run: |a, s| one(full(a.tensor(0)?.shape(), a.scalar(1)?, a.tensor(0)?.dtype(), s)),
        derivative: Derivative::None(CONSTANT),
    },
    Operator {
        schema: "aten::to.dtype(Tensor(a) self, ScalarType dtype, bool non_blocking=False, bool copy=False, MemoryFormat? memory_format=None) -> Tensor(a)",
        run: |a, s| {
            a.none(4)?;
            let dtype = a.dtype_or_none(1)?.ok_or_else(|| a.wrong(1, "a dtype"))?;
            let result = cast(a.tensor(0)?, dtype, s)?;
            one(if a.bool(3)? && result.dtype() == a.tensor(0)?.dtype() { copy(&result, s) } else { Ok(result) })
        },
        derivative: Derivative::Vjp(|c| Ok(vec![of_arg(c.args.tensor(0)?, c.stream, || Ok(c.grad.clone()))?])),
    },
    Operator {
        schema: "aten::clone(Tensor self, *, MemoryFormat? memory_format=None) -> Tensor",
        run: |a, s| {
            a.none(1)?;
            one(copy(a.tensor(0)?, s))
        },
        derivative: Derivative::Vjp(|c| Ok(vec![of_arg(c.args.tensor(0)?, c.stream, || Ok(c.grad.clone()))?])),
    },
];

/// What only the elements tell.
pub(crate) fn kernel_error(op: &'static str, reason: String) -> DeviceError {
    DeviceError::Kernel { op, reason: reason.into() }
}
