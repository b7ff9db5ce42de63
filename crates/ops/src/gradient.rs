//! What derivatives share: a gradient takes the shape and dtype of what it is the gradient of.

use farcall_device::{Stream, Tensor};

use crate::{OpError, cast, reduce};

/// The gradient of `arg` from one of its broadcast and promoted form: summed over what was repeated, cast back. `None` for elements that
/// are not real; then `grad` is not computed.
pub(crate) fn of_arg(
    arg: &Tensor,
    stream: &Stream,
    grad: impl FnOnce() -> Result<Tensor, OpError>,
) -> Result<Option<Tensor>, OpError> {
    if !arg.dtype().is_float() {
        return Ok(None);
    }
    let grad = unbroadcast(&grad()?, arg.shape(), stream)?;
    cast(&grad, arg.dtype(), stream).map(Some)
}

/// The sum over all dimensions in which `shape` was repeated to get the tensor's.
pub(crate) fn unbroadcast(grad: &Tensor, shape: &[usize], stream: &Stream) -> Result<Tensor, OpError> {
    if grad.shape() == shape {
        return Ok(grad.clone());
    }
    let added = grad.rank() - shape.len();
    let repeated = |dim: &i64| {
        let dim = *dim as usize;
        dim < added || shape[dim - added] == 1 && grad.shape()[dim] != 1
    };
    let dims: Vec<i64> = (0..grad.rank() as i64).filter(repeated).collect();
    let sum = if dims.is_empty() { grad.clone() } else { reduce::sum(grad, &dims, true, stream)? };
    // What is left of the added dimensions has size 1.
    Ok(sum.reshape(shape)?)
}
