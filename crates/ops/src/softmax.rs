//! Softmax, its logarithm, and the negative log likelihood.
//!
//! Stable: the largest element of a row is subtracted first, so no exponential overflows. Half precision is computed in single.

use farcall_device::{DType, Stream, Tensor};

use crate::arithmetic::{div, mul, sub};
use crate::convert::{Buffer, Cast};
use crate::elementwise::unsupported;
use crate::fill::cast;
use crate::gradient::of_arg;
use crate::join::{index_select, take_along};
use crate::kernel::{BLOCK, CHUNK, Input, PARALLEL_MIN, for_each_part, launch};
use crate::reduce::{dim_of, one_hot, sum};
use crate::table::{Applied, Derivative, Operator, one};
use crate::unary::{exp, neg};
use crate::{OpError, compare};

/// A row in, the same row out.
trait Row: bytemuck::Pod {
    fn softmax(row: &mut [Self]);
    fn log_softmax(row: &mut [Self]);
}

macro_rules! rows {
    ($($type:ident),*) => {$(
        impl Row for $type {
            fn softmax(row: &mut [Self]) {
                let largest = largest(row);
                for element in &mut *row {
                    *element = (*element - largest).exp();
                }
                let sum = total(row);
                for element in row {
                    *element /= sum;
                }
            }

            fn log_softmax(row: &mut [Self]) {
                let largest = largest(row);
                let exponentials: Vec<Self> = row.iter().map(|element| (*element - largest).exp()).collect();
                let shift = total(&exponentials).ln();
                for element in row {
                    *element = *element - largest - shift;
                }
            }
        }
    )*};
}

rows!(f32, f64);

/// NaN if one is.
fn largest<T: Copy + PartialOrd>(row: &[T]) -> T {
    row.iter().copied().fold(row[0], |largest, element| {
        // An element that is not even equal to itself is NaN, and stays.
        #[expect(clippy::eq_op, reason = "NaN alone differs from itself")]
        if element > largest || element != element { element } else { largest }
    })
}

/// A sum by halves: as exact as a tree, and the same on every machine.
fn total<T: Copy + std::ops::Add<Output = T> + std::iter::Sum>(row: &[T]) -> T {
    if row.len() <= 64 {
        return row.iter().copied().sum();
    }
    let (front, back) = row.split_at((row.len() / 2).next_multiple_of(64));
    total(front) + total(back)
}

/// Runs `by` over each row of `len` elements.
fn run<T: Row>(
    by: fn(&mut [T]),
    input: &Input,
    len: usize,
    (compute, result): (DType, DType),
    reads: &[&[u8]],
    target: &mut [u8],
) {
    let size = result.size_bytes();
    let work = |index: usize, target: &mut [u8]| {
        let mut loader = input.loader(reads);
        let (mut row, mut scratch) = (vec![T::zeroed(); len], <[Buffer; 2]>::default());
        let store = Cast::between(compute, result);
        let first = index * (CHUNK / len).max(1);
        for (index, target) in target.chunks_exact_mut(len * size).enumerate() {
            let start = (first + index) * len;
            for at in (0..len).step_by(BLOCK) {
                let block = &mut row[at..(at + BLOCK).min(len)];
                let count = block.len();
                block.copy_from_slice(bytemuck::cast_slice(loader.load(start + at, count)));
            }
            by(&mut row);
            store.run(bytemuck::cast_slice(&row), target, &mut scratch, len);
        }
    };
    let per_task = (CHUNK / len).max(1) * len * size;
    let is_parallel = target.len() / size >= PARALLEL_MIN;
    for_each_part(target, per_task, is_parallel, &work);
}

fn along(
    op: &'static str,
    x: &Tensor,
    dim: i64,
    in_f32: fn(&mut [f32]),
    in_f64: fn(&mut [f64]),
    stream: &Stream,
) -> Result<Tensor, OpError> {
    let dim = dim_of(op, dim, x.rank())?;
    if x.rank() == 0 {
        let row = x.reshape(&[1])?;
        return Ok(along(op, &row, 0, in_f32, in_f64, stream)?.reshape(&[])?);
    }
    // Rows come last; the result is turned back, as a view.
    let mut order: Vec<usize> = (0..x.rank()).collect();
    order.remove(dim);
    order.push(dim);
    let mut back: Vec<usize> = (0..x.rank() - 1).collect();
    back.insert(dim, x.rank() - 1);
    let rows = x.permute(&order)?;
    let (len, dtype) = (x.shape()[dim], x.dtype());
    let result = match dtype {
        DType::F16 | DType::BF16 | DType::F32 => {
            let input = Input::new(0, rows.layout(), DType::F32);
            launch(op, stream, &[x], dtype, rows.shape(), move |reads, target| {
                run::<f32>(in_f32, &input, len, (DType::F32, dtype), reads, target);
                Ok(())
            })?
        }
        DType::F64 => {
            let input = Input::new(0, rows.layout(), DType::F64);
            launch(op, stream, &[x], dtype, rows.shape(), move |reads, target| {
                run::<f64>(in_f64, &input, len, (DType::F64, dtype), reads, target);
                Ok(())
            })?
        }
        _ => return Err(unsupported(op, &[x.into()])),
    };
    Ok(result.permute(&back)?)
}

/// Exponentials along `dim`, divided by their sum.
///
/// # Shapes and dtypes
/// The shape of `x`; along another than the last dimension the result is a view that is not contiguous.
/// # Errors
/// [`OpError::DTypes`] for what is not real; [`OpError::Dimension`], [`OpError::Device`].
pub fn softmax(x: &Tensor, dim: i64, stream: &Stream) -> Result<Tensor, OpError> {
    along("softmax", x, dim, <f32 as Row>::softmax, <f64 as Row>::softmax, stream)
}

/// The logarithm of [`softmax`], as exact for small elements as for large ones.
///
/// # Errors
/// Those of [`softmax`].
pub fn log_softmax(x: &Tensor, dim: i64, stream: &Stream) -> Result<Tensor, OpError> {
    along("log_softmax", x, dim, <f32 as Row>::log_softmax, <f64 as Row>::log_softmax, stream)
}

/// What becomes of the losses of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Reduction {
    /// One for each row.
    None,
    /// Their weighted mean.
    #[default]
    Mean,
    /// Their sum.
    Sum,
}

impl Reduction {
    fn of(code: i64) -> Result<Self, OpError> {
        match code {
            0 => Ok(Self::None),
            1 => Ok(Self::Mean),
            2 => Ok(Self::Sum),
            _ => Err(OpError::Value {
                op: "nll_loss",
                name: "reduction",
                value: code.to_string(),
                rule: "it is 0 (none), 1 (mean) or 2 (sum)",
            }),
        }
    }
}

/// What a loss and its gradient both need: of each row, the class that counts and its weight.
struct Likelihood {
    /// Rows of classes, also where `x` is one row.
    rows: Tensor,
    /// Where a target is to be ignored, some class: its weight is 0.
    classes: Tensor,
    weights: Tensor,
}

impl Likelihood {
    fn new(
        x: &Tensor,
        target: &Tensor,
        weight: Option<&Tensor>,
        ignore_index: i64,
        s: &Stream,
    ) -> Result<Self, OpError> {
        let op = "nll_loss";
        let shapes = || [x, target].into_iter().chain(weight).map(|tensor| tensor.shape().to_vec()).collect();
        let refused = |rule| OpError::Shapes { op, shapes: shapes(), rule };
        let (rows, target) = match (x.rank(), target.rank()) {
            (1, 0) => (x.unsqueeze(0)?, target.unsqueeze(0)?),
            (2, 1) if x.shape()[0] == target.shape()[0] => (x.clone(), target.clone()),
            _ => return Err(refused("scores are rows of classes, targets one class for each row")),
        };
        if weight.is_some_and(|weight| weight.shape() != &rows.shape()[1..]) {
            return Err(refused("weights are one for each class"));
        }
        let dtypes = vec![x.dtype(), target.dtype()];
        if target.dtype() != DType::I64 && target.dtype() != DType::U8 {
            return Err(OpError::DTypes { op, dtypes, remedy: "targets are i64: cast them" });
        }
        if !x.dtype().is_float() {
            return Err(OpError::DTypes { op, dtypes, remedy: "scores are real: cast them" });
        }
        let target = cast(&target, DType::I64, s)?;
        let counts = compare::ne(&target, ignore_index, s)?;
        let classes = compare::choose(&counts, &target, 0, s)?;
        let weights = match weight {
            Some(weight) => {
                cast(&compare::choose(&counts, &index_select(weight, 0, &classes, s)?, 0.0, s)?, x.dtype(), s)?
            }
            None => cast(&counts, x.dtype(), s)?,
        };
        Ok(Self { rows, classes, weights })
    }
}

/// The negative log likelihood of `target` classes under `x`, rows of logarithms of probabilities: torch's `nll_loss` of one or two
/// dimensions.
///
/// # Errors
/// [`OpError::Shapes`], [`OpError::DTypes`], [`OpError::Device`]; [`DeviceError::Kernel`](farcall_device::DeviceError::Kernel) for a class
/// that there is not.
pub fn nll_loss(
    x: &Tensor,
    target: &Tensor,
    weight: Option<&Tensor>,
    reduction: Reduction,
    ignore_index: i64,
    stream: &Stream,
) -> Result<Tensor, OpError> {
    let s = stream;
    let Likelihood { rows, classes, weights } = Likelihood::new(x, target, weight, ignore_index, s)?;
    let picked = take_along("nll_loss", &rows, 1, &classes.unsqueeze(1)?, s)?.squeeze(1)?;
    // A class of weight 0 does not count, even where it is infinitely unlikely.
    let losses = compare::choose(&compare::eq(&weights, 0.0, s)?, 0.0, &neg(&mul(&picked, &weights, s)?, s)?, s)?;
    match reduction {
        Reduction::None => Ok(losses.reshape(target.shape())?),
        Reduction::Sum => sum(&losses, &[], false, s),
        Reduction::Mean => div(&sum(&losses, &[], false, s)?, &sum(&weights, &[], false, s)?, s),
    }
}

fn of_nll_loss(c: &Applied<'_>) -> Result<Vec<Option<Tensor>>, OpError> {
    let (x, s) = (c.args.tensor(0)?, c.stream);
    let weight = c.args.tensor_or_none(2)?;
    let grad = of_arg(x, s, || {
        let parts = Likelihood::new(x, c.args.tensor(1)?, weight, c.args.int(4)?, s)?;
        let Likelihood { rows, classes, weights } = parts;
        let shares = match Reduction::of(c.args.int(3)?)? {
            Reduction::Mean => div(&weights, &sum(&weights, &[], false, s)?, s)?,
            Reduction::None | Reduction::Sum => weights,
        };
        let slopes = neg(&mul(&shares, c.grad, s)?, s)?.unsqueeze(1)?;
        let at = one_hot(&classes.unsqueeze(1)?, 1, rows.shape(), s)?;
        Ok(compare::choose(&at, &slopes, 0.0, s)?.reshape(x.shape())?)
    })?;
    // Targets and weights are data.
    let mut grads = vec![grad, None];
    grads.extend(weight.map(|_| None));
    Ok(grads)
}

/// The input of a softmax in the dtype that is asked for.
fn in_dtype(x: &Tensor, dtype: Option<DType>, s: &Stream) -> Result<Tensor, OpError> {
    cast(x, dtype.unwrap_or(x.dtype()), s)
}

pub(crate) const OPERATORS: &[Operator] = &[
    Operator {
        schema: "aten::softmax.int(Tensor self, int dim, ScalarType? dtype=None) -> Tensor",
        run: |a, s| one(softmax(&in_dtype(a.tensor(0)?, a.dtype_or_none(2)?, s)?, a.int(1)?, s)),
        derivative: Derivative::Vjp(|c| {
            let (y, s, dim) = (c.result(), c.stream, c.args.int(1)?);
            Ok(vec![of_arg(c.args.tensor(0)?, s, || {
                let weighted = mul(c.grad, y, s)?;
                sub(&weighted, &mul(y, &sum(&weighted, &[dim], true, s)?, s)?, s)
            })?])
        }),
    },
    Operator {
        schema: "aten::log_softmax.int(Tensor self, int dim, ScalarType? dtype=None) -> Tensor",
        run: |a, s| one(log_softmax(&in_dtype(a.tensor(0)?, a.dtype_or_none(2)?, s)?, a.int(1)?, s)),
        derivative: Derivative::Vjp(|c| {
            let (y, s, dim) = (c.result(), c.stream, c.args.int(1)?);
            Ok(vec![of_arg(c.args.tensor(0)?, s, || {
                sub(c.grad, &mul(&exp(y, s)?, &sum(c.grad, &[dim], true, s)?, s)?, s)
            })?])
        }),
    },
    Operator {
        schema: "aten::nll_loss(Tensor self, Tensor target, Tensor? weight=None, int reduction=1, SymInt ignore_index=-100) -> Tensor",
        run: |a, s| {
            let reduction = Reduction::of(a.int(3)?)?;
            one(nll_loss(a.tensor(0)?, a.tensor(1)?, a.tensor_or_none(2)?, reduction, a.int(4)?, s))
        },
        derivative: Derivative::Vjp(of_nll_loss),
    },
];
