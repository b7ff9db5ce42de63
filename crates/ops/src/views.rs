//! Views: other shapes, orders and parts of the same elements. No bytes move, but where a shape cannot be viewed without a copy.
//!
//! Each derivative is the reverse view, or the elements put back where they came from.

use farcall_device::{Layout, Stream, Tensor};

use crate::OpError;
use crate::fill::{contiguous, shape_of, unpack};
use crate::gradient::{of_arg, unbroadcast};
use crate::reduce::dim_of;
use crate::table::{Derivative, Operator, one};

/// Every `step`-th index of `dim` from `start` up to `end`, both of which may count from the end and are brought into range, as in Python.
///
/// # Errors
/// [`OpError::Dimension`]; [`OpError::Value`] unless `step` is positive.
pub fn slice(x: &Tensor, dim: i64, start: i64, end: i64, step: i64) -> Result<Tensor, OpError> {
    let op = "slice";
    if x.rank() == 0 {
        return Err(OpError::Dimension { op, dim, rank: 0 });
    }
    if step < 1 {
        let rule = "it is positive";
        return Err(OpError::Value { op, name: "step", value: step.to_string(), rule });
    }
    let dim = dim_of(op, dim, x.rank())?;
    let size = x.shape()[dim] as i64;
    let from = |index: i64| (if index < 0 { index.saturating_add(size) } else { index }).clamp(0, size);
    let (start, end) = (from(start), from(end));
    let len = (end - start).max(0) as usize;
    let run = x.narrow(dim, start as usize, len)?;
    if step == 1 {
        return Ok(run);
    }
    let layout = run.layout();
    let (mut shape, mut strides) = (layout.shape().to_vec(), layout.strides().to_vec());
    shape[dim] = len.div_ceil(step as usize);
    strides[dim] = strides[dim].saturating_mul(step);
    if shape[dim] <= 1 {
        // Never stepped over: whatever the product would be, it could only be out of range.
        strides[dim] = layout.strides()[dim];
    }
    let layout = Layout::strided(x.dtype(), &shape, &strides, layout.offset())?;
    Ok(Tensor::from_storage(x.storage().clone(), layout)?)
}

/// The elements at one index of `dim`, without that dimension; negative indices count from the end.
///
/// # Errors
/// [`OpError::Dimension`]; [`OpError::Value`] beyond the dimension.
pub fn select(x: &Tensor, dim: i64, index: i64) -> Result<Tensor, OpError> {
    let op = "select";
    if x.rank() == 0 {
        return Err(OpError::Dimension { op, dim, rank: 0 });
    }
    let dim = dim_of(op, dim, x.rank())?;
    let size = x.shape()[dim] as i64;
    let from_start = if index < 0 { index.saturating_add(size) } else { index };
    if !(0..size).contains(&from_start) {
        let rule = "it lies within the dimension";
        return Err(OpError::Value { op, name: "index", value: format!("{index} of {size}"), rule });
    }
    Ok(x.select(dim, from_start as usize)?)
}

/// The view whose dimension `i` is this one's `dims[i]`.
///
/// # Errors
/// [`OpError::Dimension`]; [`OpError::Device`] unless each dimension is named once.
pub fn permute(x: &Tensor, dims: &[i64]) -> Result<Tensor, OpError> {
    Ok(x.permute(&order_of(dims, x.rank())?)?)
}

fn order_of(dims: &[i64], rank: usize) -> Result<Vec<usize>, OpError> {
    dims.iter().map(|dim| dim_of("permute", *dim, rank)).collect()
}

/// The view with two dimensions exchanged.
///
/// # Errors
/// [`OpError::Dimension`].
pub fn transpose(x: &Tensor, first: i64, second: i64) -> Result<Tensor, OpError> {
    let dims = (dim_of("transpose", first, x.rank())?, dim_of("transpose", second, x.rank())?);
    if x.rank() == 0 { Ok(x.clone()) } else { Ok(x.transpose(dims.0, dims.1)?) }
}

/// The sizes that a list means in which one may be -1: what is left for it.
fn sizes_of(op: &'static str, sizes: &[i64], numel: usize) -> Result<Vec<usize>, OpError> {
    let refused = |rule| OpError::Value { op, name: "shape", value: format!("{sizes:?}"), rule };
    let Some(open) = sizes.iter().position(|size| *size == -1) else { return shape_of(op, sizes) };
    let mut sizes = sizes.to_vec();
    sizes[open] = 1;
    let mut shape = shape_of(op, &sizes)?;
    let product = shape.iter().try_fold(1_usize, |product, size| product.checked_mul(*size)).unwrap_or(0);
    if product == 0 || !numel.is_multiple_of(product) {
        return Err(refused("the elements must be shared out evenly, and a -1 beside a 0 could be anything"));
    }
    shape[open] = numel / product;
    Ok(shape)
}

/// The elements in row-major order with another shape, of which one size may be -1: a view where there is one, else a copy.
///
/// # Errors
/// [`OpError::Value`], [`OpError::Device`] if the number of elements differs.
pub fn reshape(x: &Tensor, shape: &[i64], stream: &Stream) -> Result<Tensor, OpError> {
    reshape_to(x, &sizes_of("reshape", shape, x.numel())?, stream)
}

pub(crate) fn reshape_to(x: &Tensor, shape: &[usize], stream: &Stream) -> Result<Tensor, OpError> {
    match x.reshape(shape) {
        Err(farcall_device::DeviceError::Layout(farcall_device::LayoutError::NotViewable { .. })) => {
            Ok(contiguous(x, stream)?.reshape(shape)?)
        }
        view => Ok(view?),
    }
}

/// The view that repeats dimensions of size 1 to get `shape`; -1 leaves a size as it is.
///
/// # Errors
/// [`OpError::Value`]; [`OpError::Device`] if sizes do not agree.
pub fn expand(x: &Tensor, shape: &[i64]) -> Result<Tensor, OpError> {
    let op = "expand";
    let added = shape.len().saturating_sub(x.rank());
    let kept = |(dim, size): (usize, &i64)| match *size {
        -1 if dim >= added => Ok(x.shape()[dim - added] as i64),
        size => Ok(size),
    };
    let sizes: Vec<i64> = shape.iter().enumerate().map(kept).collect::<Result<_, OpError>>()?;
    Ok(x.broadcast_to(&shape_of(op, &sizes)?)?)
}

/// The view with a dimension of size 1 inserted before `dim`.
///
/// # Errors
/// [`OpError::Dimension`].
pub fn unsqueeze(x: &Tensor, dim: i64) -> Result<Tensor, OpError> {
    Ok(x.unsqueeze(dim_of("unsqueeze", dim, x.rank() + 1)?)?)
}

/// The view without `dim` if its size is 1, else the tensor itself.
///
/// # Errors
/// [`OpError::Dimension`].
pub fn squeeze(x: &Tensor, dim: i64) -> Result<Tensor, OpError> {
    let dim = dim_of("squeeze", dim, x.rank())?;
    if x.shape().get(dim) == Some(&1) { Ok(x.squeeze(dim)?) } else { Ok(x.clone()) }
}

/// The gradient of a view: zeros but where the view's elements are. `view` makes the same view of a contiguous tensor.
fn put_back(
    c: &crate::table::Applied<'_>,
    view: impl FnOnce(&Tensor) -> Result<Tensor, OpError>,
) -> Result<Vec<Option<Tensor>>, OpError> {
    let x = c.args.tensor(0)?;
    Ok(vec![of_arg(x, c.stream, || {
        // Layouts alone: no byte of this tensor is read.
        let whole = Layout::contiguous(c.grad.dtype(), x.shape())?;
        let storage = c.stream.alloc(whole.size_bytes())?.freeze_ready();
        let place = view(&Tensor::from_storage(storage, whole)?)?;
        unpack(c.grad, place.layout(), x.shape(), c.stream)
    })?])
}

/// The bounds of a slice, absent ones filled in.
fn bounds(a: &crate::table::Args<'_>) -> Result<(i64, i64, i64, i64), OpError> {
    Ok((a.int(1)?, a.int_or_none(2)?.unwrap_or(0), a.int_or_none(3)?.unwrap_or(i64::MAX), a.int(4)?))
}

macro_rules! reshapes {
    ($($schema:literal, |$a:ident, $s:ident| $run:expr;)*) => {
        [$(Operator {
            schema: $schema,
            run: |$a, $s| one($run),
            derivative: Derivative::Vjp(|c| {
                let x = c.args.tensor(0)?;
                Ok(vec![of_arg(x, c.stream, || reshape_to(c.grad, x.shape(), c.stream))?])
            }),
        },)*]
    };
}

/// Those whose derivative is the first shape again.
const RESHAPES: [Operator; 5] = reshapes! {
    "aten::view(Tensor(a) self, SymInt[] size) -> Tensor(a)", |a, _s| {
        let x = a.tensor(0)?;
        Ok(x.reshape(&sizes_of("view", &a.ints(1)?, x.numel())?)?)
    };
    "aten::reshape(Tensor(a) self, SymInt[] shape) -> Tensor(a)", |a, s| reshape(a.tensor(0)?, &a.ints(1)?, s);
    "aten::unsqueeze(Tensor(a) self, int dim) -> Tensor(a)", |a, _s| unsqueeze(a.tensor(0)?, a.int(1)?);
    "aten::squeeze.dim(Tensor(a) self, int dim) -> Tensor(a)", |a, _s| squeeze(a.tensor(0)?, a.int(1)?);
    "aten::flatten.using_ints(Tensor(a) self, int start_dim=0, int end_dim=-1) -> Tensor(a)", |a, s| {
        let x = a.tensor(0)?;
        let (first, last) = (dim_of("flatten", a.int(1)?, x.rank())?, dim_of("flatten", a.int(2)?, x.rank())?);
        if first > last {
            let value = format!("{first} to {last}");
            return Err(OpError::Value { op: "flatten", name: "end_dim", value, rule: "it is not before start_dim" });
        }
        let mut shape = x.shape().to_vec();
        if x.rank() > 0 {
            let joined = shape[first..=last].iter().product();
            shape.splice(first..=last, [joined]);
        } else {
            shape.push(1);
        }
        reshape_to(x, &shape, s)
    };
};

pub(crate) const OPERATORS: &[Operator] = &[
    Operator {
        schema: "aten::slice.Tensor(Tensor(a) self, int dim=0, SymInt? start=None, SymInt? end=None, SymInt step=1) -> Tensor(a)",
        run: |a, _| {
            let (dim, start, end, step) = bounds(&a)?;
            one(slice(a.tensor(0)?, dim, start, end, step))
        },
        derivative: Derivative::Vjp(|c| {
            let (dim, start, end, step) = bounds(&c.args)?;
            put_back(c, |whole| slice(whole, dim, start, end, step))
        }),
    },
    Operator {
        schema: "aten::select.int(Tensor(a) self, int dim, SymInt index) -> Tensor(a)",
        run: |a, _| one(select(a.tensor(0)?, a.int(1)?, a.int(2)?)),
        derivative: Derivative::Vjp(|c| put_back(c, |whole| select(whole, c.args.int(1)?, c.args.int(2)?))),
    },
    Operator {
        schema: "aten::permute(Tensor(a) self, int[] dims) -> Tensor(a)",
        run: |a, _| one(permute(a.tensor(0)?, &a.ints(1)?)),
        derivative: Derivative::Vjp(|c| {
            let x = c.args.tensor(0)?;
            Ok(vec![of_arg(x, c.stream, || {
                let order = order_of(&c.args.ints(1)?, x.rank())?;
                let mut back = vec![0; order.len()];
                order.iter().enumerate().for_each(|(to, from)| back[*from] = to);
                Ok(c.grad.permute(&back)?)
            })?])
        }),
    },
    Operator {
        schema: "aten::transpose.int(Tensor(a) self, int dim0, int dim1) -> Tensor(a)",
        run: |a, _| one(transpose(a.tensor(0)?, a.int(1)?, a.int(2)?)),
        derivative: Derivative::Vjp(|c| {
            let back = || transpose(c.grad, c.args.int(1)?, c.args.int(2)?);
            Ok(vec![of_arg(c.args.tensor(0)?, c.stream, back)?])
        }),
    },
    Operator {
        schema: "aten::t(Tensor(a) self) -> Tensor(a)",
        run: |a, _| {
            let x = a.tensor(0)?;
            if x.rank() > 2 {
                let rule = "it has at most two dimensions: use transpose or permute";
                return Err(OpError::Shapes { op: "t", shapes: vec![x.shape().to_vec()], rule });
            }
            one(if x.rank() < 2 { Ok(x.clone()) } else { transpose(x, 0, 1) })
        },
        derivative: Derivative::Vjp(|c| {
            let back = || if c.grad.rank() < 2 { Ok(c.grad.clone()) } else { transpose(c.grad, 0, 1) };
            Ok(vec![of_arg(c.args.tensor(0)?, c.stream, back)?])
        }),
    },
    Operator {
        schema: "aten::expand(Tensor(a) self, SymInt[] size, *, bool implicit=False) -> Tensor(a)",
        run: |a, _| one(expand(a.tensor(0)?, &a.ints(1)?)),
        derivative: Derivative::Vjp(|c| {
            let x = c.args.tensor(0)?;
            Ok(vec![of_arg(x, c.stream, || unbroadcast(c.grad, x.shape(), c.stream))?])
        }),
    },
];

pub(crate) const RESHAPING: &[Operator] = &RESHAPES;
