//! Tensors put together from others, and parts picked by indices.

use farcall_device::{DType, DeviceError, Stream, Tensor};

use crate::OpError;
use crate::convert::{Buffer, Cast};
use crate::elementwise::unsupported;
use crate::fill::{cast, contiguous, kernel_error};
use crate::gradient::of_arg;
use crate::kernel::{BLOCK, CHUNK, Input, PARALLEL_MIN, for_each_chunk, for_each_part, launch};
use crate::promote::{compute_dtype, promote};
use crate::reduce::dim_of;
use crate::table::{Applied, Derivative, Operator, one};

/// The tensors one after the other along `dim`, in their common dtype. As in torch, an empty tensor of one dimension fits beside any.
///
/// # Errors
/// [`OpError::Shapes`] unless all other sizes agree; [`OpError::DTypes`], [`OpError::Dimension`], [`OpError::Device`].
pub fn cat(tensors: &[&Tensor], dim: i64, stream: &Stream) -> Result<Tensor, OpError> {
    let op = "cat";
    let refused =
        |rule| OpError::Shapes { op, shapes: tensors.iter().map(|tensor| tensor.shape().to_vec()).collect(), rule };
    let dtype = tensors.iter().map(|tensor| Some(tensor.dtype())).reduce(|a, b| promote(a?, b?));
    let Some(dtype) = dtype else { return Err(refused("there must be at least one")) };
    let dtype =
        dtype.ok_or_else(|| unsupported(op, &tensors.iter().map(|tensor| (*tensor).into()).collect::<Vec<_>>()))?;
    let parts: Vec<&Tensor> = tensors.iter().copied().filter(|tensor| tensor.shape() != [0]).collect();
    let Some(first) = parts.first() else { return launch(op, stream, &[], dtype, &[0], |_, _| Ok(())) };
    if first.rank() == 0 {
        return Err(refused("tensors without dimensions are stacked, not joined"));
    }
    let dim = dim_of(op, dim, first.rank())?;
    let fits = |part: &&Tensor| {
        part.rank() == first.rank()
            && (0..first.rank()).all(|other| other == dim || part.shape()[other] == first.shape()[other])
    };
    if !parts.iter().all(fits) {
        return Err(refused("all sizes but the joined ones must agree"));
    }
    let mut shape = first.shape().to_vec();
    shape[dim] = parts.iter().map(|part| part.shape()[dim]).sum();
    // Of each part, this many elements follow each other in the result.
    let runs: Vec<usize> = parts.iter().map(|part| part.shape()[dim..].iter().product()).collect();
    let inputs: Vec<_> = parts.iter().enumerate().map(|(read, part)| Input::new(read, part.layout(), dtype)).collect();
    let (row, size) = (runs.iter().sum::<usize>(), dtype.size_bytes());
    launch(op, stream, &parts, dtype, &shape, move |reads, target| {
        for_each_chunk(target, size, |start, mut out| {
            let mut loaders: Vec<_> = inputs.iter().map(|input| input.loader(reads)).collect();
            let (mut outer, mut place, end) = (start / row, start % row, out.len() / size);
            let mut done = 0;
            while done < end {
                // What is left of each part in this row, as far as it is wanted.
                for (loader, run) in loaders.iter_mut().zip(&runs) {
                    let skipped = place.min(*run);
                    place -= skipped;
                    let len = (run - skipped).min(end - done);
                    loader.copy_to(outer * run + skipped, len, done * size, &mut out);
                    done += len;
                }
                outer += 1;
            }
        });
        Ok(())
    })
}

/// The tensors, all of one shape, along a new dimension `dim`.
///
/// # Errors
/// [`OpError::Shapes`], [`OpError::DTypes`], [`OpError::Dimension`], [`OpError::Device`].
pub fn stack(tensors: &[&Tensor], dim: i64, stream: &Stream) -> Result<Tensor, OpError> {
    let shapes = || tensors.iter().map(|tensor| tensor.shape().to_vec()).collect();
    let Some(first) = tensors.first() else {
        return Err(OpError::Shapes { op: "stack", shapes: shapes(), rule: "there must be at least one" });
    };
    if tensors.iter().any(|tensor| tensor.shape() != first.shape()) {
        return Err(OpError::Shapes { op: "stack", shapes: shapes(), rule: "all must be the same" });
    }
    let dim = dim_of("stack", dim, first.rank() + 1)?;
    let rows: Vec<Tensor> = tensors.iter().map(|tensor| tensor.unsqueeze(dim)).collect::<Result<_, _>>()?;
    cat(&rows.iter().collect::<Vec<_>>(), dim as i64, stream)
}

/// Indices as the kernels want them, checked to be in range when they are known.
struct Indices {
    input: Input,
    count: usize,
    /// Of the dimension that they pick from.
    size: usize,
}

impl Indices {
    fn new(op: &'static str, read: usize, index: &Tensor, size: usize) -> Result<Self, OpError> {
        if !matches!(index.dtype(), DType::I64 | DType::I32) {
            return Err(OpError::DTypes {
                op,
                dtypes: vec![index.dtype()],
                remedy: "indices are i64 or i32: cast them",
            });
        }
        Ok(Self { input: Input::new(read, index.layout(), DType::I64), count: index.numel(), size })
    }

    fn load(&self, op: &'static str, reads: &[&[u8]]) -> Result<Vec<usize>, DeviceError> {
        let mut loader = self.input.loader(reads);
        let mut indices = Vec::with_capacity(self.count);
        for start in (0..self.count).step_by(BLOCK) {
            let block = loader.load(start, BLOCK.min(self.count - start));
            for index in bytemuck::cast_slice::<u8, i64>(block) {
                let found = usize::try_from(*index).ok().filter(|index| *index < self.size);
                indices.push(found.ok_or_else(|| {
                    kernel_error(op, format!("index {index} is outside of a dimension of size {}", self.size))
                })?);
            }
        }
        Ok(indices)
    }
}

/// The elements at the indices `index`, which has one dimension or none, of `dim`.
///
/// # Errors
/// [`OpError::Shapes`], [`OpError::DTypes`], [`OpError::Dimension`], [`OpError::Device`];
/// [`DeviceError::Kernel`] for an index beyond the dimension, also a negative one.
pub fn index_select(x: &Tensor, dim: i64, index: &Tensor, stream: &Stream) -> Result<Tensor, OpError> {
    let op = "index_select";
    if index.rank() > 1 {
        let shapes = vec![x.shape().to_vec(), index.shape().to_vec()];
        return Err(OpError::Shapes { op, shapes, rule: "indices have one dimension" });
    }
    let dim = dim_of(op, dim, x.rank())?;
    if x.rank() == 0 {
        let row = x.reshape(&[1])?;
        return Ok(index_select(&row, 0, &index.reshape(&[index.numel()])?, stream)?.reshape(&[])?);
    }
    let source = contiguous(x, stream)?;
    let indices = Indices::new(op, 1, index, x.shape()[dim])?;
    let mut shape = x.shape().to_vec();
    shape[dim] = index.numel();
    let size = x.dtype().size_bytes();
    let (rows, row) = (x.shape()[dim], x.shape()[dim + 1..].iter().product::<usize>() * size);
    let start = source.layout().offset() * size;
    launch(op, stream, &[&source, index], x.dtype(), &shape, move |reads, target| {
        let indices = indices.load(op, reads)?;
        let bytes = &reads[0][start..];
        // Rows that a thread copies.
        let per_part = (CHUNK * size).div_ceil(row);
        let is_parallel = target.len() / size >= PARALLEL_MIN;
        for_each_part(target, per_part * row, is_parallel, &|part, target| {
            for (place, target) in target.chunks_exact_mut(row).enumerate() {
                let place = part * per_part + place;
                let (outer, index) = (place / indices.len(), indices[place % indices.len()]);
                target.copy_from_slice(&bytes[(outer * rows + index) * row..][..row]);
            }
        });
        Ok(())
    })
}

/// Zeros of `shape` to which the elements of `x` are added at the indices of `dim`, in their order.
fn index_add(x: &Tensor, dim: usize, index: &Tensor, shape: &[usize], stream: &Stream) -> Result<Tensor, OpError> {
    let op = "index_add";
    let compute = compute_dtype(x.dtype()).ok_or_else(|| unsupported(op, &[x.into()]))?;
    let (input, result) = (Input::new(0, x.layout(), compute), x.dtype());
    let indices = Indices::new(op, 1, index, shape[dim])?;
    let (rows, row) = (shape[dim], shape[dim + 1..].iter().product::<usize>());
    launch(op, stream, &[x, index], result, shape, move |reads, target| {
        let indices = indices.load(op, reads)?;
        let (numel, size) = (target.len() / result.size_bytes(), compute.size_bytes());
        let mut sums = Buffer::default();
        let total = sums.bytes(numel * size);
        let mut loader = input.loader(reads);
        for outer in 0..numel / (rows * row) {
            for (place, index) in indices.iter().enumerate() {
                let from = (outer * indices.len() + place) * row;
                let to = (outer * rows + index) * row;
                for start in (0..row).step_by(BLOCK) {
                    let len = BLOCK.min(row - start);
                    let elements = loader.load(from + start, len);
                    let sums = &mut total[(to + start) * size..][..len * size];
                    if compute == DType::F64 {
                        add_to::<f64>(sums, elements);
                    } else {
                        add_to::<f32>(sums, elements);
                    }
                }
            }
        }
        Cast::between(compute, result).run(total, target, &mut Default::default(), numel);
        Ok(())
    })
}

fn add_to<T: bytemuck::Pod + std::ops::AddAssign>(sums: &mut [u8], elements: &[u8]) {
    let elements = bytemuck::cast_slice::<u8, T>(elements);
    for (sum, element) in bytemuck::cast_slice_mut::<u8, T>(sums).iter_mut().zip(elements) {
        *sum += *element;
    }
}

/// The elements of `x` at the indices `index` along `dim`; both have the same sizes elsewhere. Failures are those of `op`.
pub(crate) fn take_along(
    op: &'static str,
    x: &Tensor,
    dim: usize,
    index: &Tensor,
    stream: &Stream,
) -> Result<Tensor, OpError> {
    let source = contiguous(x, stream)?;
    let indices = Indices::new(op, 1, index, x.shape()[dim])?;
    let size = x.dtype().size_bytes();
    let inner: usize = x.shape()[dim + 1..].iter().product();
    let (rows, picked) = (x.shape()[dim], index.shape()[dim]);
    let start = source.layout().offset() * size;
    launch(op, stream, &[&source, index], x.dtype(), index.shape(), move |reads, target| {
        let indices = indices.load(op, reads)?;
        for (place, (index, target)) in indices.iter().zip(target.chunks_exact_mut(size)).enumerate() {
            let outer = place / (picked * inner);
            let from = start + ((outer * rows + index) * inner + place % inner) * size;
            target.copy_from_slice(&reads[0][from..from + size]);
        }
        Ok(())
    })
}

/// Each part's share of the gradient of a join.
fn of_cat(c: &Applied<'_>) -> Result<Vec<Option<Tensor>>, OpError> {
    let (tensors, mut start) = (c.args.tensors(0)?, 0);
    let share = |tensor: &Tensor| {
        if tensor.shape() == [0] {
            return of_arg(tensor, c.stream, || cast(tensor, c.grad.dtype(), c.stream));
        }
        let dim = dim_of("cat", c.args.int(1)?, tensor.rank())?;
        let part = c.grad.narrow(dim, start, tensor.shape()[dim])?;
        start += tensor.shape()[dim];
        of_arg(tensor, c.stream, || Ok(part))
    };
    tensors.iter().map(share).collect()
}

pub(crate) const OPERATORS: &[Operator] = &[
    Operator {
        schema: "aten::cat(Tensor[] tensors, int dim=0) -> Tensor",
        run: |a, s| one(cat(&a.tensors(0)?.iter().collect::<Vec<_>>(), a.int(1)?, s)),
        derivative: Derivative::Vjp(of_cat),
    },
    Operator {
        schema: "aten::stack(Tensor[] tensors, int dim=0) -> Tensor",
        run: |a, s| one(stack(&a.tensors(0)?.iter().collect::<Vec<_>>(), a.int(1)?, s)),
        derivative: Derivative::Vjp(|c| {
            let dim = dim_of("stack", c.args.int(1)?, c.grad.rank())?;
            let share = |(index, tensor)| of_arg(tensor, c.stream, || Ok(c.grad.select(dim, index)?));
            c.args.tensors(0)?.iter().enumerate().map(share).collect()
        }),
    },
    Operator {
        schema: "aten::index_select(Tensor self, int dim, Tensor index) -> Tensor",
        run: |a, s| one(index_select(a.tensor(0)?, a.int(1)?, a.tensor(2)?, s)),
        derivative: Derivative::Vjp(|c| {
            let (x, index) = (c.args.tensor(0)?, c.args.tensor(2)?);
            let grad = of_arg(x, c.stream, || {
                if x.rank() == 0 {
                    return crate::reduce::sum(c.grad, &[], false, c.stream);
                }
                index_add(c.grad, dim_of("index_select", c.args.int(1)?, x.rank())?, index, x.shape(), c.stream)
            })?;
            Ok(vec![grad, None])
        }),
    },
];
