//! Matrix products: of vectors, matrices and batches of matrices, as torch's `matmul`.
//!
//! Real numbers go to the `gemm` crate, whose sums are ordered by its blocks: close to the exact product, not the same bit on every
//! machine. Half precision is computed in single and rounded once; integers wrap.
//!
//! Invariant M1: each matrix that is handed to `gemm` lies inside the slice it was cut from: [`Matrix::checked`].

use bytemuck::Pod;
use farcall_device::{DType, Stream, Tensor};

use crate::OpError;
use crate::arithmetic::{add, mul};
use crate::convert::{Buffer, Cast};
use crate::elementwise::unsupported;
use crate::fill::{cast, contiguous};
use crate::gradient::of_arg;
use crate::kernel::launch;
use crate::promote::compute_dtype;
use crate::table::{Derivative, Operator, one};

/// Multiplications from which on `gemm` uses several threads: about 0.1 ms of one.
const PARALLEL_MIN: usize = 128 * 128 * 128;

/// The product of two tensors of at least one dimension.
///
/// # Shapes and dtypes
/// Vectors count as a row on the left and a column on the right, and that dimension is left out again. Dimensions before the last two are
/// a batch and are broadcast. Both must have the same dtype, which is the result's.
/// # Errors
/// [`OpError::Shapes`], [`OpError::DTypes`], [`OpError::Device`].
/// # Cost
/// Transposed matrices are read as they are; other views, and half precision, are copied first.
pub fn matmul(a: &Tensor, b: &Tensor, stream: &Stream) -> Result<Tensor, OpError> {
    let op = "matmul";
    let shapes = || vec![a.shape().to_vec(), b.shape().to_vec()];
    let refused = |rule| OpError::Shapes { op, shapes: shapes(), rule };
    if a.rank() == 0 || b.rank() == 0 {
        return Err(refused("both have at least one dimension: use mul for numbers"));
    }
    if a.dtype() != b.dtype() {
        let remedy = "both must have the same: cast one of them";
        return Err(OpError::DTypes { op, dtypes: vec![a.dtype(), b.dtype()], remedy });
    }
    let left = if a.rank() == 1 { a.unsqueeze(0)? } else { a.clone() };
    let right = if b.rank() == 1 { b.unsqueeze(1)? } else { b.clone() };
    let (rank_a, rank_b) = (left.rank(), right.rank());
    let (m, k, n) = (left.shape()[rank_a - 2], left.shape()[rank_a - 1], right.shape()[rank_b - 1]);
    if right.shape()[rank_b - 2] != k {
        return Err(refused("columns of the first must be as many as rows of the second"));
    }
    let batch = batch_shape(&left.shape()[..rank_a - 2], &right.shape()[..rank_b - 2])
        .ok_or_else(|| refused("dimensions before the last two must be equal or 1"))?;
    let mut shape = batch.clone();
    shape.extend([m, n]);
    let product = if batch.is_empty() || rank_b > 2 || m == 1 {
        batched(op, &left, &right, &batch, stream)?
    } else {
        // One matrix on the right of many: all their rows at once.
        let rows = m * batch.iter().product::<usize>();
        let flat = contiguous(&left, stream)?.reshape(&[rows, k])?;
        batched(op, &flat, &right, &[], stream)?.reshape(&shape)?
    };
    shape.truncate(batch.len());
    shape.extend((a.rank() > 1).then_some(m));
    shape.extend((b.rank() > 1).then_some(n));
    Ok(product.reshape(&shape)?)
}

fn batch_shape(a: &[usize], b: &[usize]) -> Option<Vec<usize>> {
    let rank = a.len().max(b.len());
    let size = |shape: &[usize], dim: usize| (dim + shape.len()).checked_sub(rank).map_or(1, |dim| shape[dim]);
    (0..rank)
        .map(|dim| match (size(a, dim), size(b, dim)) {
            (a, b) if a == b => Some(a),
            (1, size) | (size, 1) => Some(size),
            _ => None,
        })
        .collect()
}

/// One product for each index of the batch.
fn batched(op: &'static str, a: &Tensor, b: &Tensor, batch: &[usize], stream: &Stream) -> Result<Tensor, OpError> {
    let result = a.dtype();
    let compute = compute_dtype(result).filter(|_| result != DType::Bool);
    let compute = compute.ok_or_else(|| unsupported(op, &[a.into(), b.into()]))?;
    let [left, right] = [a, b].map(|tensor| Factor::new(tensor, batch, compute, stream));
    let (left, right) = (left?, right?);
    let (m, k, n) = (left.rows, left.columns, right.columns);
    let mut shape = batch.to_vec();
    shape.extend([m, n]);
    let (count, from, to) = (batch.iter().product::<usize>(), [left.start, right.start], result.size_bytes());
    let strides = [(left.row_stride, left.column_stride), (right.row_stride, right.column_stride)];
    let batches = [left.batches, right.batches];
    launch(op, stream, &[&left.tensor, &right.tensor], result, &shape, move |reads, target| {
        let (mut product, mut scratch) = (Buffer::default(), <[Buffer; 2]>::default());
        let store = Cast::between(compute, result);
        for index in 0..count {
            let target = &mut target[index * m * n * to..(index + 1) * m * n * to];
            let into = if store.is_none() { &mut *target } else { product.bytes(m * n * compute.size_bytes()) };
            let [a, b] = [0, 1].map(|factor| (reads[factor], from[factor] + batches[factor][index], strides[factor]));
            multiply(compute, a, b, into, (m, k, n));
            if !store.is_none() {
                store.run(product.filled(m * n * compute.size_bytes()), target, &mut scratch, m * n);
            }
        }
        Ok(())
    })
}

/// A batch of matrices in the dtype of computation.
struct Factor {
    tensor: Tensor,
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
    /// The first element, and from there the first of each matrix.
    start: usize,
    batches: Vec<usize>,
}

impl Factor {
    fn new(tensor: &Tensor, batch: &[usize], compute: DType, stream: &Stream) -> Result<Self, OpError> {
        let mut tensor = cast(tensor, compute, stream)?;
        let rank = tensor.rank();
        // `gemm` reads any strides, but is slow where no dimension is contiguous. Repeated rows or columns are such.
        let is_plain = |tensor: &Tensor| {
            let strides = &tensor.strides()[rank - 2..];
            strides.iter().zip(&tensor.shape()[rank - 2..]).any(|(stride, size)| *stride == 1 || *size == 1)
                && strides.iter().zip(&tensor.shape()[rank - 2..]).all(|(stride, size)| *stride > 0 || *size == 1)
        };
        let address = tensor.storage().as_ptr().addr();
        if !is_plain(&tensor) || !address.is_multiple_of(compute.size_bytes()) {
            tensor = crate::fill::copy(&tensor, stream)?;
        }
        let mut shape = batch.to_vec();
        shape.extend(&tensor.shape()[rank - 2..]);
        let view = tensor.layout().broadcast_to(&shape)?;
        let (sizes, strides) = (&shape[..batch.len()], &view.strides()[..batch.len()]);
        let mut batches = vec![0];
        for (size, stride) in sizes.iter().zip(strides) {
            let steps = |base: &usize| (0..*size).map(|index| base + index * *stride as usize).collect::<Vec<_>>();
            batches = batches.iter().flat_map(steps).collect();
        }
        let [row_stride, column_stride] = [rank - 2, rank - 1].map(|dim| tensor.strides()[dim] as usize);
        let [rows, columns] = [rank - 2, rank - 1].map(|dim| tensor.shape()[dim]);
        let start = tensor.layout().offset();
        Ok(Self { tensor, rows, columns, row_stride, column_stride, start, batches })
    }
}

type Slice<'a> = (&'a [u8], usize, (usize, usize));

fn multiply(compute: DType, a: Slice<'_>, b: Slice<'_>, target: &mut [u8], (m, k, n): (usize, usize, usize)) {
    match compute {
        DType::F32 => Matrix::cut(a, m, k).multiply(&Matrix::cut(b, k, n), bytemuck::cast_slice_mut::<u8, f32>(target)),
        DType::F64 => Matrix::cut(a, m, k).multiply(&Matrix::cut(b, k, n), bytemuck::cast_slice_mut::<u8, f64>(target)),
        DType::U8 => multiply_integers::<u8>(a, b, target, (m, k, n)),
        DType::I8 => multiply_integers::<i8>(a, b, target, (m, k, n)),
        DType::U16 => multiply_integers::<u16>(a, b, target, (m, k, n)),
        DType::I16 => multiply_integers::<i16>(a, b, target, (m, k, n)),
        DType::U32 => multiply_integers::<u32>(a, b, target, (m, k, n)),
        DType::I32 => multiply_integers::<i32>(a, b, target, (m, k, n)),
        DType::U64 => multiply_integers::<u64>(a, b, target, (m, k, n)),
        DType::I64 => multiply_integers::<i64>(a, b, target, (m, k, n)),
        other => unreachable!("{other} is not computed in"),
    }
}

/// A strided matrix in a slice.
struct Matrix<'a, T> {
    elements: &'a [T],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a, T: Pod> Matrix<'a, T> {
    fn cut((bytes, start, (row_stride, column_stride)): Slice<'a>, rows: usize, columns: usize) -> Self {
        // No bytes have no alignment either.
        let elements = if bytes.is_empty() { &[] } else { &bytemuck::cast_slice::<u8, T>(bytes)[start..] };
        Self { elements, rows, columns, row_stride, column_stride }.checked()
    }

    /// M1.
    fn checked(self) -> Self {
        let last = |count: usize, stride: usize| count.saturating_sub(1).saturating_mul(stride);
        let reach = last(self.rows, self.row_stride).saturating_add(last(self.columns, self.column_stride));
        let is_empty = self.rows == 0 || self.columns == 0;
        assert!(is_empty || reach < self.elements.len(), "a matrix lies inside its tensor");
        self
    }

    /// The product, row by row, in `target`, which has exactly its size.
    #[expect(unsafe_code, reason = "gemm takes matrices by pointer")]
    fn multiply(&self, other: &Matrix<'_, T>, target: &mut [T])
    where
        T: One,
    {
        let (m, k, n) = (self.rows, self.columns, other.columns);
        assert!(other.rows == k && target.len() == m * n, "the shapes of a product");
        if m * n == 0 || k == 0 {
            return target.fill(T::zeroed());
        }
        let parallelism = if m * n * k < PARALLEL_MIN { gemm::Parallelism::None } else { gemm::Parallelism::Rayon(0) };
        let [rows, columns] = [self, other].map(|matrix| (matrix.column_stride as isize, matrix.row_stride as isize));
        // SAFETY: both factors lie inside their slices (M1), with strides that fit `isize` as those of slices do, and the product, of
        // row stride `n` and column stride 1, is exactly `target`, which is borrowed mutably and so overlaps neither. `T` is `f32` or
        // `f64` (`One`), the types that gemm tells apart by their identity. With `read_dst` false the target is only written.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                target.as_mut_ptr(),
                1,
                n as isize,
                false,
                self.elements.as_ptr(),
                rows.0,
                rows.1,
                other.elements.as_ptr(),
                columns.0,
                columns.1,
                T::ZERO,
                T::ONE,
                false,
                false,
                false,
                parallelism,
            );
        }
    }
}

/// The types that `gemm` multiplies for us.
trait One: Pod {
    const ZERO: Self;
    const ONE: Self;
}

impl One for f32 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
}

impl One for f64 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
}

/// Integers multiply and add modulo their size, so any order gives the same.
fn multiply_integers<T>(a: Slice<'_>, b: Slice<'_>, target: &mut [u8], (m, k, n): (usize, usize, usize))
where
    T: Pod + Wrapping,
{
    let (a, b) = (Matrix::<T>::cut(a, m, k), Matrix::<T>::cut(b, k, n));
    let target = bytemuck::cast_slice_mut::<u8, T>(target);
    target.fill(T::zeroed());
    for (row, sums) in target.chunks_exact_mut(n).enumerate() {
        for depth in 0..k {
            let factor = a.elements[row * a.row_stride + depth * a.column_stride];
            for (column, sum) in sums.iter_mut().enumerate() {
                let element = b.elements[depth * b.row_stride + column * b.column_stride];
                *sum = sum.plus_product(factor, element);
            }
        }
    }
}

trait Wrapping {
    fn plus_product(self, a: Self, b: Self) -> Self;
}

macro_rules! wrapping {
    ($($type:ty),*) => {$(
        impl Wrapping for $type {
            #[inline(always)]
            fn plus_product(self, a: Self, b: Self) -> Self {
                self.wrapping_add(a.wrapping_mul(b))
            }
        }
    )*};
}

wrapping!(u8, i8, u16, i16, u32, i32, u64, i64);

/// The gradients of a product: each factor's is the result's times the other one, transposed, summed over what was broadcast.
fn of_matmul(a: &Tensor, b: &Tensor, grad: &Tensor, s: &Stream) -> Result<Vec<Option<Tensor>>, OpError> {
    // Vectors as the matrices they stand for.
    let left = if a.rank() == 1 { a.unsqueeze(0)? } else { a.clone() };
    let right = if b.rank() == 1 { b.unsqueeze(1)? } else { b.clone() };
    let mut grad = grad.clone();
    if b.rank() == 1 {
        grad = grad.unsqueeze(grad.rank())?;
    }
    if a.rank() == 1 {
        grad = grad.unsqueeze(grad.rank() - 1)?;
    }
    let flipped = |tensor: &Tensor| tensor.transpose(tensor.rank() - 2, tensor.rank() - 1);
    let of_left = of_arg(&left, s, || matmul(&grad, &flipped(&right)?, s))?;
    let of_right = of_arg(&right, s, || matmul(&flipped(&left)?, &grad, s))?;
    let shaped = |gradient: Option<Tensor>, arg: &Tensor| match gradient {
        Some(gradient) => gradient.reshape(arg.shape()).map(Some),
        None => Ok(None),
    };
    Ok(vec![shaped(of_left, a)?, shaped(of_right, b)?])
}

/// A product whose factors have as many dimensions as the schema's name says.
fn of_ranks(op: &'static str, a: &Tensor, b: &Tensor, ranks: [usize; 2], s: &Stream) -> Result<Tensor, OpError> {
    let batches = if ranks[0] == 3 { a.shape().first() == b.shape().first() } else { true };
    if [a.rank(), b.rank()] != ranks || !batches {
        let (shapes, rule) = (vec![a.shape().to_vec(), b.shape().to_vec()], "use matmul for other ranks");
        return Err(OpError::Shapes { op, shapes, rule });
    }
    matmul(a, b, s)
}

macro_rules! products {
    ($($schema:literal, $op:literal, $ranks:expr;)*) => {
        &[
            Operator {
                schema: "aten::matmul(Tensor self, Tensor other) -> Tensor",
                run: |a, s| one(matmul(a.tensor(0)?, a.tensor(1)?, s)),
                derivative: Derivative::Vjp(|c| of_matmul(c.args.tensor(0)?, c.args.tensor(1)?, c.grad, c.stream)),
            },
            $(Operator {
                schema: $schema,
                run: |a, s| one(of_ranks($op, a.tensor(0)?, a.tensor(1)?, $ranks, s)),
                derivative: Derivative::Vjp(|c| of_matmul(c.args.tensor(0)?, c.args.tensor(1)?, c.grad, c.stream)),
            },)*
            Operator {
                schema: "aten::addmm(Tensor self, Tensor mat1, Tensor mat2, *, Scalar beta=1, Scalar alpha=1) -> Tensor",
                run: |a, s| {
                    let product = of_ranks("addmm", a.tensor(1)?, a.tensor(2)?, [2, 2], s)?;
                    let product = scaled(&product, a.scalar(4)?, s)?;
                    one(add(&product, &scaled(a.tensor(0)?, a.scalar(3)?, s)?, s))
                },
                derivative: Derivative::Vjp(|c| {
                    let (bias, s) = (c.args.tensor(0)?, c.stream);
                    let mut grads = vec![of_arg(bias, s, || scaled(c.grad, c.args.scalar(3)?, s))?];
                    let grad = scaled(c.grad, c.args.scalar(4)?, s)?;
                    grads.extend(of_matmul(c.args.tensor(1)?, c.args.tensor(2)?, &grad, s)?);
                    Ok(grads)
                }),
            },
        ]
    };
}

fn scaled(x: &Tensor, factor: crate::Scalar, s: &Stream) -> Result<Tensor, OpError> {
    if factor.as_f64() == 1.0 { Ok(x.clone()) } else { mul(x, factor, s) }
}

pub(crate) const OPERATORS: &[Operator] = products! {
    "aten::mm(Tensor self, Tensor mat2) -> Tensor", "mm", [2, 2];
    "aten::bmm(Tensor self, Tensor mat2) -> Tensor", "bmm", [3, 3];
    "aten::mv(Tensor self, Tensor vec) -> Tensor", "mv", [2, 1];
    "aten::dot(Tensor self, Tensor tensor) -> Tensor", "dot", [1, 1];
};
