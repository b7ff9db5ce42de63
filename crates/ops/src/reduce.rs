//! Reductions over dimensions: sums, means, extremes and where they are, norms.
//!
//! As torch: sums of integers are `i64`; NaN wins in extremes, and of equals the first counts; the sum of nothing is 0, its mean NaN,
//! its extremes an error. Half precision is summed in single.

use std::hint::select_unpredictable;

use farcall_device::{DType, Stream, Tensor};

use crate::arithmetic::{div, mul};
use crate::elementwise::unsupported;
use crate::fill::{arange, cast};
use crate::gradient::of_arg;
use crate::kernel::{Input, launch};
use crate::power::pow;
use crate::table::{Applied, Derivative, Operator, one};
use crate::unary::{abs, sign};
use crate::{OpError, compare};

mod fold;

use fold::{Fold, Shape, fold};

/// A dimension given from either end.
pub(crate) fn dim_of(op: &'static str, dim: i64, rank: usize) -> Result<usize, OpError> {
    // A tensor without dimensions counts as one with a single dimension here, as in torch.
    let count = rank.max(1) as i64;
    let from_start = if dim < 0 { dim + count } else { dim };
    usize::try_from(from_start).ok().filter(|dim| *dim < count as usize).ok_or(OpError::Dimension { op, dim, rank })
}

/// Which dimensions are reduced; none given means all.
fn dims_of(op: &'static str, dims: &[i64], rank: usize) -> Result<Vec<bool>, OpError> {
    let mut reduced = vec![dims.is_empty(); rank.max(1)];
    for dim in dims {
        let index = dim_of(op, *dim, rank)?;
        if std::mem::replace(&mut reduced[index], true) {
            let rule = "each dimension is named once";
            return Err(OpError::Value { op, name: "dim", value: format!("{dims:?}"), rule });
        }
    }
    reduced.truncate(rank);
    Ok(reduced)
}

/// A reduction with its input permuted: kept dimensions before the last reduced one, the reduced ones, the rest.
struct Plan {
    shape: Shape,
    input: Input,
    /// The result's, with and without the reduced dimensions.
    kept: Vec<usize>,
    keepdim: Vec<usize>,
}

impl Plan {
    fn new(op: &'static str, x: &Tensor, dims: &[i64], compute: DType) -> Result<Self, OpError> {
        let reduced = dims_of(op, dims, x.rank())?;
        let inner_from = reduced.iter().rposition(|reduced| *reduced).map_or(x.rank(), |last| last + 1);
        let outer = (0..inner_from).filter(|dim| !reduced[*dim]);
        let order: Vec<_> =
            outer.chain((0..inner_from).filter(|dim| reduced[*dim])).chain(inner_from..x.rank()).collect();
        let product = |dims: &mut dyn Iterator<Item = usize>| dims.map(|dim| x.shape()[dim]).product::<usize>();
        let shape = Shape {
            outer: product(&mut (0..inner_from).filter(|dim| !reduced[*dim])),
            len: product(&mut (0..inner_from).filter(|dim| reduced[*dim])),
            inner: product(&mut (inner_from..x.rank())),
        };
        let input = Input::new(0, &x.layout().permute(&order)?, compute);
        let kept = (0..x.rank()).filter(|dim| !reduced[*dim]).map(|dim| x.shape()[dim]).collect();
        let keepdim = (0..x.rank()).map(|dim| if reduced[dim] { 1 } else { x.shape()[dim] }).collect();
        Ok(Self { shape, input, kept, keepdim })
    }

    /// Folds elements that are loaded as `C`, to values of dtype `gives`, stored as `result`.
    fn run<C: bytemuck::Pod, F: Fold<C> + Send + 'static>(
        self,
        op: &'static str,
        x: &Tensor,
        by: F,
        dtypes: (DType, DType),
        keepdim: bool,
        stream: &Stream,
    ) -> Result<Tensor, OpError> {
        let result_shape = if keepdim { &self.keepdim } else { &self.kept };
        let (shape, input) = (self.shape, self.input);
        launch(op, stream, &[x], dtypes.1, result_shape, move |reads, target| {
            fold::<C, F>(&by, &input, &shape, dtypes, reads, target);
            Ok(())
        })
    }
}

/// Runs `$by` for the Rust type in which dtype `$compute` is reduced, or refuses.
macro_rules! in_type {
    ($op:expr, $x:expr, $compute:expr, [$($variant:ident: $type:ty),*], |$c:ident| $run:expr) => {
        match $compute {
            $(DType::$variant => {
                type $c = $type;
                $run
            })*
            _ => Err(unsupported($op, &[$x.into()])),
        }
    };
}

struct Sum {
    is_mean: bool,
}

macro_rules! sums {
    ($($type:ty, |$acc:ident, $x:ident| $take:expr, |$len:ident| $mean:expr;)*) => {$(
        impl Fold<$type> for Sum {
            type Acc = $type;
            type Output = $type;
            const IS_ABREAST: bool = true;
            fn empty(&self) -> $type {
                <$type>::default()
            }
            #[inline(always)]
            fn take(&self, acc: &mut $type, $x: $type, _: usize) {
                let $acc = *acc;
                *acc = $take;
            }
            #[inline(always)]
            fn join(&self, $acc: $type, $x: $type) -> $type {
                $take
            }
            fn finish(&self, $acc: $type, $len: usize) -> $type {
                if self.is_mean { $mean } else { $acc }
            }
        }
    )*};
}

sums! {
    i64, |acc, x| acc.wrapping_add(x), |len| acc / len as i64;
    f32, |acc, x| acc + x, |len| acc / len as f32;
    f64, |acc, x| acc + x, |len| acc / len as f64;
}

fn summed(
    op: &'static str,
    x: &Tensor,
    dims: &[i64],
    keepdim: bool,
    dtype: Option<DType>,
    is_mean: bool,
    stream: &Stream,
) -> Result<Tensor, OpError> {
    let is_real = x.dtype().is_float();
    let result = dtype.unwrap_or(if is_real { x.dtype() } else { DType::I64 });
    if is_mean && !result.is_float() {
        let remedy = "a mean is real: cast first, or name a real dtype";
        return Err(OpError::DTypes { op, dtypes: vec![x.dtype()], remedy });
    }
    let compute = match result {
        DType::F32 | DType::F16 | DType::BF16 => DType::F32,
        DType::F64 => DType::F64,
        result if result.is_integer() => DType::I64,
        _ => return Err(unsupported(op, &[x.into()])),
    };
    in_type!(op, x, compute, [I64: i64, F32: f32, F64: f64], |C| {
        Plan::new(op, x, dims, compute)?.run::<C, _>(op, x, Sum { is_mean }, (compute, result), keepdim, stream)
    })
}

/// The sum over `dims`, all of them if none are named.
///
/// # Shapes and dtypes
/// The reduced dimensions are left out, or have size 1 with `keepdim`. Of integers and `bool` the sum is `i64`.
/// # Errors
/// [`OpError::Dimension`], [`OpError::DTypes`], [`OpError::Device`].
pub fn sum(x: &Tensor, dims: &[i64], keepdim: bool, stream: &Stream) -> Result<Tensor, OpError> {
    summed("sum", x, dims, keepdim, None, false, stream)
}

/// The mean over `dims`, all of them if none are named; NaN of no elements.
///
/// # Errors
/// Those of [`sum`]; [`OpError::DTypes`] for what is not real.
pub fn mean(x: &Tensor, dims: &[i64], keepdim: bool, stream: &Stream) -> Result<Tensor, OpError> {
    summed("mean", x, dims, keepdim, None, true, stream)
}

/// Numbers with an order, of which NaN is no part.
trait Ordered: bytemuck::Pod + PartialOrd + Send + Sync {
    const LOWEST: Self;
    const HIGHEST: Self;
}

macro_rules! ordered {
    ($($type:ty: $lowest:expr, $highest:expr;)*) => {$(
        impl Ordered for $type {
            const LOWEST: Self = $lowest;
            const HIGHEST: Self = $highest;
        }
    )*};
}

ordered! {
    i64: i64::MIN, i64::MAX;
    u64: u64::MIN, u64::MAX;
    f32: f32::NEG_INFINITY, f32::INFINITY;
    f64: f64::NEG_INFINITY, f64::INFINITY;
}

#[expect(clippy::eq_op, reason = "NaN alone differs from itself, in every type at once")]
#[inline(always)]
fn is_nan<C: Ordered>(element: C) -> bool {
    element != element
}

/// The largest element, or the smallest.
struct Extreme<const MAX: bool>;

impl<C: Ordered, const MAX: bool> Fold<C> for Extreme<MAX> {
    type Acc = C;
    type Output = C;
    const IS_ABREAST: bool = true;
    const IS_CHOICE: bool = true;
    #[inline(always)]
    fn empty(&self) -> C {
        if MAX { C::LOWEST } else { C::HIGHEST }
    }
    #[inline(always)]
    fn take(&self, acc: &mut C, element: C, _: usize) {
        let wins = if MAX { element > *acc } else { element < *acc };
        // A choice, not a store on a condition, so that the loop around it uses vectors. Only NaN wins against NaN.
        *acc = select_unpredictable(wins | is_nan(element), element, *acc);
    }
    #[inline(always)]
    fn join(&self, mut first: C, second: C) -> C {
        self.take(&mut first, second, 0);
        first
    }
    fn finish(&self, acc: C, _: usize) -> C {
        acc
    }
}

/// The place of the first such element.
struct Place<const MAX: bool>;

impl<C: Ordered, const MAX: bool> Fold<C> for Place<MAX> {
    type Acc = (C, i64);
    type Output = i64;
    fn empty(&self) -> (C, i64) {
        (if MAX { C::LOWEST } else { C::HIGHEST }, i64::MAX)
    }
    #[inline(always)]
    fn take(&self, acc: &mut (C, i64), element: C, index: usize) {
        *acc = <Self as Fold<C>>::join(self, *acc, (element, index as i64));
    }
    #[inline(always)]
    fn join(&self, first: (C, i64), second: (C, i64)) -> (C, i64) {
        let (a, b) = (first.0, second.0);
        let is_better = if MAX { b > a } else { b < a };
        let wins = is_better || is_nan(b) && !is_nan(a);
        let is_equal = a == b || is_nan(a) && is_nan(b);
        if wins || is_equal && second.1 < first.1 { second } else { first }
    }
    fn finish(&self, acc: (C, i64), _: usize) -> i64 {
        acc.1
    }
}

/// The dtype in which elements are ordered: the widest of their kind.
fn order_dtype(dtype: DType) -> DType {
    match dtype {
        DType::U64 => DType::U64,
        DType::F16 | DType::BF16 | DType::F32 => DType::F32,
        dtype if dtype.is_integer() || dtype == DType::Bool => DType::I64,
        other => other,
    }
}

/// That no result is the extreme of nothing.
fn refuse_nothing(op: &'static str, x: &Tensor, dims: &[i64]) -> Result<(), OpError> {
    let reduced = dims_of(op, dims, x.rank())?;
    let is_empty = x.shape().iter().zip(&reduced).any(|(size, reduced)| *reduced && *size == 0);
    if !is_empty {
        return Ok(());
    }
    Err(OpError::Shapes {
        op,
        shapes: vec![x.shape().to_vec()],
        rule: "nothing has no extreme: reduce other dimensions",
    })
}

fn extreme<const MAX: bool>(
    op: &'static str,
    x: &Tensor,
    dims: &[i64],
    keepdim: bool,
    stream: &Stream,
) -> Result<Tensor, OpError> {
    refuse_nothing(op, x, dims)?;
    let compute = order_dtype(x.dtype());
    in_type!(op, x, compute, [I64: i64, U64: u64, F32: f32, F64: f64], |C| {
        Plan::new(op, x, dims, compute)?.run::<C, _>(op, x, Extreme::<MAX>, (compute, x.dtype()), keepdim, stream)
    })
}

fn place<const MAX: bool>(
    op: &'static str,
    x: &Tensor,
    dim: Option<i64>,
    keepdim: bool,
    stream: &Stream,
) -> Result<Tensor, OpError> {
    let dims: Vec<i64> = dim.into_iter().collect();
    refuse_nothing(op, x, &dims)?;
    if x.dtype() == DType::Bool && !matches!(op, "max" | "min") {
        return Err(unsupported(op, &[x.into()]));
    }
    let compute = order_dtype(x.dtype());
    in_type!(op, x, compute, [I64: i64, U64: u64, F32: f32, F64: f64], |C| {
        Plan::new(op, x, &dims, compute)?.run::<C, _>(op, x, Place::<MAX>, (DType::I64, DType::I64), keepdim, stream)
    })
}

/// The largest elements over `dims`, all of them if none are named.
///
/// # Errors
/// [`OpError::Shapes`] if they are the extremes of nothing; [`OpError::Dimension`], [`OpError::DTypes`], [`OpError::Device`].
pub fn amax(x: &Tensor, dims: &[i64], keepdim: bool, stream: &Stream) -> Result<Tensor, OpError> {
    extreme::<true>("amax", x, dims, keepdim, stream)
}

/// The smallest elements over `dims`, all of them if none are named.
///
/// # Errors
/// Those of [`amax`].
pub fn amin(x: &Tensor, dims: &[i64], keepdim: bool, stream: &Stream) -> Result<Tensor, OpError> {
    extreme::<false>("amin", x, dims, keepdim, stream)
}

/// The index along `dim` of the first of the largest elements; without `dim`, among all in row-major order.
///
/// # Errors
/// Those of [`amax`]; [`OpError::DTypes`] for `bool`, as in torch.
pub fn argmax(x: &Tensor, dim: Option<i64>, keepdim: bool, stream: &Stream) -> Result<Tensor, OpError> {
    place::<true>("argmax", x, dim, keepdim, stream)
}

/// The index along `dim` of the first of the smallest elements; without `dim`, among all in row-major order.
///
/// # Errors
/// Those of [`argmax`].
pub fn argmin(x: &Tensor, dim: Option<i64>, keepdim: bool, stream: &Stream) -> Result<Tensor, OpError> {
    place::<false>("argmin", x, dim, keepdim, stream)
}

struct SumOfSquares;

macro_rules! sums_of_squares {
    ($($type:ty),*) => {$(
        impl Fold<$type> for SumOfSquares {
            type Acc = $type;
            type Output = $type;
            const IS_ABREAST: bool = true;
            fn empty(&self) -> $type {
                0.0
            }
            #[inline(always)]
            fn take(&self, acc: &mut $type, element: $type, _: usize) {
                *acc += element * element;
            }
            #[inline(always)]
            fn join(&self, first: $type, second: $type) -> $type {
                first + second
            }
            fn finish(&self, acc: $type, _: usize) -> $type {
                acc.sqrt()
            }
        }
    )*};
}

sums_of_squares!(f32, f64);

/// The norm of order `p` over `dims`, all of them if none are named: torch's `linalg_vector_norm`.
///
/// # Errors
/// [`OpError::DTypes`] for what is not real; [`OpError::Dimension`], [`OpError::Device`]; of no elements, those of [`amax`] for an
/// infinite `p`.
/// # Cost
/// One pass for `p` 2; more for others.
pub fn norm(x: &Tensor, p: f64, dims: &[i64], keepdim: bool, stream: &Stream) -> Result<Tensor, OpError> {
    let op = "norm";
    let compute = match x.dtype() {
        DType::F16 | DType::BF16 | DType::F32 => DType::F32,
        DType::F64 => DType::F64,
        _ => return Err(unsupported(op, &[x.into()])),
    };
    if p == 2.0 {
        return in_type!(op, x, compute, [F32: f32, F64: f64], |C| {
            Plan::new(op, x, dims, compute)?.run::<C, _>(op, x, SumOfSquares, (compute, x.dtype()), keepdim, stream)
        });
    }
    let wide = abs(&cast(x, compute, stream)?, stream)?;
    let norm = if p == f64::INFINITY {
        amax(&wide, dims, keepdim, stream)?
    } else if p == f64::NEG_INFINITY {
        amin(&wide, dims, keepdim, stream)?
    } else if p == 1.0 {
        sum(&wide, dims, keepdim, stream)?
    } else if p == 0.0 {
        sum(&cast(&compare::ne(&wide, 0, stream)?, compute, stream)?, dims, keepdim, stream)?
    } else {
        pow(&sum(&pow(&wide, p, stream)?, dims, keepdim, stream)?, 1.0 / p, stream)?
    };
    cast(&norm, x.dtype(), stream)
}

/// A reduced tensor with its reduced dimensions back, of size 1, so that it is broadcast to what was reduced.
pub(crate) fn restored(reduced: &Tensor, x: &Tensor, dims: &[i64]) -> Result<Tensor, OpError> {
    let reduced_dims = dims_of("sum", dims, x.rank())?;
    let shape: Vec<_> =
        x.shape().iter().zip(reduced_dims).map(|(size, reduced)| if reduced { 1 } else { *size }).collect();
    Ok(reduced.reshape(&shape)?)
}

/// The gradient of a sum or, with `divided`, of a mean.
fn of_sum(c: &Applied<'_>, dims: &[i64], divided: bool) -> Result<Vec<Option<Tensor>>, OpError> {
    let x = c.args.tensor(0)?;
    Ok(vec![of_arg(x, c.stream, || {
        // Summed elements are as many as there are for one result.
        let count = x.numel() as f64 / c.grad.numel().max(1) as f64;
        let share = if divided { div(c.grad, count, c.stream)? } else { c.grad.clone() };
        Ok(restored(&share, x, dims)?.broadcast_to(x.shape())?)
    })?])
}

/// The gradient of extremes: equal shares to all elements that equal the result.
fn of_extreme(c: &Applied<'_>, dims: &[i64]) -> Result<Vec<Option<Tensor>>, OpError> {
    let (x, s) = (c.args.tensor(0)?, c.stream);
    Ok(vec![of_arg(x, s, || {
        let hits = cast(&compare::eq(x, &restored(c.result(), x, dims)?, s)?, x.dtype(), s)?;
        let shares = div(&hits, &sum(&hits, dims, true, s)?, s)?;
        mul(&shares, &restored(c.grad, x, dims)?, s)
    })?])
}

/// The gradient of an extreme that was found at one place along a dimension.
fn of_place(c: &Applied<'_>) -> Result<Vec<Option<Tensor>>, OpError> {
    let (x, s, dim) = (c.args.tensor(0)?, c.stream, c.args.int(1)?);
    Ok(vec![of_arg(x, s, || {
        if x.rank() == 0 {
            return Ok(c.grad.clone());
        }
        let at = one_hot(&restored(&c.results[1], x, &[dim])?, dim_of("max", dim, x.rank())?, x.shape(), s)?;
        compare::choose(&at, &restored(c.grad, x, &[dim])?, 0.0, s)
    })?])
}

/// Where along dimension `dim` of `shape` the index is the one that `index`, of size 1 there, says.
pub(crate) fn one_hot(index: &Tensor, dim: usize, shape: &[usize], stream: &Stream) -> Result<Tensor, OpError> {
    let mut along = vec![1; shape.len()];
    along[dim] = shape[dim];
    compare::eq(index, &arange(shape[dim], stream)?.reshape(&along)?, stream)
}

fn of_norm(c: &Applied<'_>, p: f64, dims: &[i64]) -> Result<Vec<Option<Tensor>>, OpError> {
    let (x, s) = (c.args.tensor(0)?, c.stream);
    Ok(vec![of_arg(x, s, || {
        let (norm, grad) = (restored(c.result(), x, dims)?, restored(c.grad, x, dims)?);
        let size = abs(x, s)?;
        let slope = if p == 0.0 {
            return mul(&grad.broadcast_to(x.shape())?, 0.0, s);
        } else if p.is_infinite() {
            let hits = cast(&compare::eq(&size, &norm, s)?, x.dtype(), s)?;
            div(&mul(&hits, &sign(x, s)?, s)?, &sum(&hits, dims, true, s)?, s)?
        } else {
            // (|x| / norm) ^ (p - 1), with 0 for 0 / 0.
            let ratio = pow(&div(&size, &norm, s)?, p - 1.0, s)?;
            compare::choose(&compare::eq(x, 0.0, s)?, 0.0, &mul(&ratio, &sign(x, s)?, s)?, s)?
        };
        mul(&slope, &grad, s)
    })?])
}

/// The dimensions that a schema's optional list means.
fn dims_arg(dims: Option<Vec<i64>>) -> Vec<i64> {
    dims.unwrap_or_default()
}

const INDICES: &str = "the result is indices";

pub(crate) const OPERATORS: &[Operator] = &[
    Operator {
        schema: "aten::sum(Tensor self, *, ScalarType? dtype=None) -> Tensor",
        run: |a, s| one(summed("sum", a.tensor(0)?, &[], false, a.dtype_or_none(1)?, false, s)),
        derivative: Derivative::Vjp(|c| of_sum(c, &[], false)),
    },
    Operator {
        schema: "aten::sum.dim_IntList(Tensor self, int[1]? dim, bool keepdim=False, *, ScalarType? dtype=None) -> Tensor",
        run: |a, s| {
            let dims = dims_arg(a.ints_or_none(1)?);
            one(summed("sum", a.tensor(0)?, &dims, a.bool(2)?, a.dtype_or_none(3)?, false, s))
        },
        derivative: Derivative::Vjp(|c| of_sum(c, &dims_arg(c.args.ints_or_none(1)?), false)),
    },
    Operator {
        schema: "aten::mean(Tensor self, *, ScalarType? dtype=None) -> Tensor",
        run: |a, s| one(summed("mean", a.tensor(0)?, &[], false, a.dtype_or_none(1)?, true, s)),
        derivative: Derivative::Vjp(|c| of_sum(c, &[], true)),
    },
    Operator {
        schema: "aten::mean.dim(Tensor self, int[1]? dim, bool keepdim=False, *, ScalarType? dtype=None) -> Tensor",
        run: |a, s| {
            let dims = dims_arg(a.ints_or_none(1)?);
            one(summed("mean", a.tensor(0)?, &dims, a.bool(2)?, a.dtype_or_none(3)?, true, s))
        },
        derivative: Derivative::Vjp(|c| of_sum(c, &dims_arg(c.args.ints_or_none(1)?), true)),
    },
    Operator {
        schema: "aten::amax(Tensor self, int[1] dim=[], bool keepdim=False) -> Tensor",
        run: |a, s| one(amax(a.tensor(0)?, &a.ints(1)?, a.bool(2)?, s)),
        derivative: Derivative::Vjp(|c| of_extreme(c, &c.args.ints(1)?)),
    },
    Operator {
        schema: "aten::amin(Tensor self, int[1] dim=[], bool keepdim=False) -> Tensor",
        run: |a, s| one(amin(a.tensor(0)?, &a.ints(1)?, a.bool(2)?, s)),
        derivative: Derivative::Vjp(|c| of_extreme(c, &c.args.ints(1)?)),
    },
    Operator {
        schema: "aten::max(Tensor self) -> Tensor",
        run: |a, s| one(amax(a.tensor(0)?, &[], false, s)),
        derivative: Derivative::Vjp(|c| of_extreme(c, &[])),
    },
    Operator {
        schema: "aten::min(Tensor self) -> Tensor",
        run: |a, s| one(amin(a.tensor(0)?, &[], false, s)),
        derivative: Derivative::Vjp(|c| of_extreme(c, &[])),
    },
    Operator {
        schema: "aten::max.dim(Tensor self, int dim, bool keepdim=False) -> (Tensor values, Tensor indices)",
        run: |a, s| {
            let (x, dim, keepdim) = (a.tensor(0)?, a.int(1)?, a.bool(2)?);
            Ok(vec![amax(x, &[dim], keepdim, s)?, place::<true>("max", x, Some(dim), keepdim, s)?])
        },
        derivative: Derivative::Vjp(of_place),
    },
    Operator {
        schema: "aten::min.dim(Tensor self, int dim, bool keepdim=False) -> (Tensor values, Tensor indices)",
        run: |a, s| {
            let (x, dim, keepdim) = (a.tensor(0)?, a.int(1)?, a.bool(2)?);
            Ok(vec![amin(x, &[dim], keepdim, s)?, place::<false>("min", x, Some(dim), keepdim, s)?])
        },
        derivative: Derivative::Vjp(of_place),
    },
    Operator {
        schema: "aten::argmax(Tensor self, int? dim=None, bool keepdim=False) -> Tensor",
        run: |a, s| one(argmax(a.tensor(0)?, a.int_or_none(1)?, a.bool(2)?, s)),
        derivative: Derivative::None(INDICES),
    },
    Operator {
        schema: "aten::argmin(Tensor self, int? dim=None, bool keepdim=False) -> Tensor",
        run: |a, s| one(argmin(a.tensor(0)?, a.int_or_none(1)?, a.bool(2)?, s)),
        derivative: Derivative::None(INDICES),
    },
    Operator {
        schema: "aten::norm.Scalar(Tensor self, Scalar p=2) -> Tensor",
        run: |a, s| one(norm(a.tensor(0)?, a.scalar(1)?.as_f64(), &[], false, s)),
        derivative: Derivative::Vjp(|c| of_norm(c, c.args.scalar(1)?.as_f64(), &[])),
    },
    Operator {
        schema: "aten::linalg_vector_norm(Tensor self, Scalar ord=2, int[1]? dim=None, bool keepdim=False, *, ScalarType? dtype=None) -> Tensor",
        run: |a, s| {
            let x = match a.dtype_or_none(4)? {
                Some(dtype) => cast(a.tensor(0)?, dtype, s)?,
                None => a.tensor(0)?.clone(),
            };
            one(norm(&x, a.scalar(1)?.as_f64(), &dims_arg(a.ints_or_none(2)?), a.bool(3)?, s))
        },
        derivative: Derivative::Vjp(|c| of_norm(c, c.args.scalar(1)?.as_f64(), &dims_arg(c.args.ints_or_none(2)?))),
    },
];

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use farcall_device::{Device, Runtime};

    use super::*;

    #[test]
    fn the_extreme_of_a_long_row_is_found_anywhere_and_nan_wins() {
        let stream = Runtime::global().stream(Device::HOST).unwrap();
        let extremes = |elements: &[f32]| {
            let x = Tensor::from_slice(elements, &[elements.len()]).unwrap();
            [amax(&x, &[], false, &stream).unwrap(), amin(&x, &[], false, &stream).unwrap()]
                .map(|extreme| extreme.host().wait(Duration::from_secs(5)).unwrap().as_slice::<f32>().unwrap()[0])
        };
        // Shorter and longer than a block and than several abreast, with elements left over.
        for len in [255, 256, 1024, 1300, 4096, 5000] {
            let mut elements: Vec<f32> = (0..len).map(|index| (index % 7) as f32).collect();
            for at in (0..len).step_by(61).chain([len - 1]) {
                let before = elements[at];
                for (element, expected) in [(9.0, [9.0, 0.0]), (-9.0, [6.0, -9.0])] {
                    elements[at] = element;
                    assert_eq!(extremes(&elements), expected, "{element} at {at} of {len}");
                }
                elements[at] = f32::NAN;
                assert!(extremes(&elements).iter().all(|extreme| extreme.is_nan()), "NaN at {at} of {len}");
                elements[at] = before;
            }
        }
    }
}
