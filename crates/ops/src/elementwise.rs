//! The engine of all elementwise operators: inputs are broadcast, loaded by blocks in one dtype, worked on, and stored in another.
//!
//! Steps are functions over blocks of bytes, made once for each dtype that is computed in; all else is compiled once. No step
//! contracts a multiplication and an addition (FMA), so that a GPU told the same gives the same bits.

use std::sync::atomic::{AtomicBool, Ordering};

use farcall_device::{DType, DeviceError, Stream, Tensor};

use crate::convert::{Buffer, Cast};
use crate::kernel::{BLOCK, Input, for_each_chunk, launch};
use crate::memory::NOTHING;
use crate::promote::{compute_dtype, result_type};
use crate::{OpError, Operand};

/// What is done with a block of each input; the last slice is the result.
#[derive(Clone, Copy)]
pub(crate) enum Step {
    Unary(fn(&[u8], &mut [u8])),
    Binary(fn(&[u8], &[u8], &mut [u8])),
    Ternary(fn([&[u8]; 3], &mut [u8])),
}

/// The step of one input for the dtype `$dtype`, if it is listed: `unary!(dtype, |x| -x, [F32: f32])`.
macro_rules! unary {
    ($dtype:expr, |$x:ident| $body:expr, [$($variant:ident: $type:ty),* $(,)?]) => {
        match $dtype {
            $(farcall_device::DType::$variant => {
                fn step(x: &[u8], result: &mut [u8]) {
                    let (x, result) = (bytemuck::cast_slice::<u8, $type>(x), bytemuck::cast_slice_mut::<u8, $type>(result));
                    $crate::kernel::with_vectors(#[inline(always)] || {
                        for (result, $x) in result.iter_mut().zip(x.iter().copied()) {
                            *result = $body;
                        }
                    });
                }
                Some($crate::elementwise::Step::Unary(step))
            })*
            _ => None,
        }
    };
}

/// The step of two inputs, as [`unary`]. The result's type is the inputs', or the one that is named: `=> u8`.
macro_rules! binary {
    ($dtype:expr, |$x:ident, $y:ident| $body:expr, [$($variant:ident: $type:ty),* $(,)?]) => {
        match $dtype {
            $(farcall_device::DType::$variant => $crate::elementwise::binary!(@step $type, $type, |$x, $y| $body),)*
            _ => None,
        }
    };
    ($dtype:expr, |$x:ident, $y:ident| $body:expr, [$($variant:ident: $type:ty),* $(,)?] => $result:ty) => {
        match $dtype {
            $(farcall_device::DType::$variant => $crate::elementwise::binary!(@step $type, $result, |$x, $y| $body),)*
            _ => None,
        }
    };
    (@step $type:ty, $result:ty, |$x:ident, $y:ident| $body:expr) => {{
        fn step(x: &[u8], y: &[u8], result: &mut [u8]) {
            let (x, y) = (bytemuck::cast_slice::<u8, $type>(x), bytemuck::cast_slice::<u8, $type>(y));
            let result = bytemuck::cast_slice_mut::<u8, $result>(result);
            $crate::kernel::with_vectors(#[inline(always)] || {
                for ((result, $x), $y) in result.iter_mut().zip(x.iter().copied()).zip(y.iter().copied()) {
                    *result = $body;
                }
            });
        }
        Some($crate::elementwise::Step::Binary(step))
    }};
}

/// The step of two inputs for all dtypes of computation: one body for integers, one for reals.
macro_rules! numbers {
    (binary!($dtype:expr, |$x:ident, $y:ident| integers $int:expr, reals $real:expr)) => {
        $crate::elementwise::binary!(
            $dtype,
            |$x, $y| $int,
            [U8: u8, I8: i8, U16: u16, I16: i16, U32: u32, I32: i32, U64: u64, I64: i64]
        )
        .or_else(|| $crate::elementwise::binary!($dtype, |$x, $y| $real, [F32: f32, F64: f64]))
    };
}

pub(crate) use {binary, numbers, unary};

/// One elementwise operation: the dtype of each input as it is loaded, of what the step gives, and of the result.
pub(crate) struct Elementwise {
    pub(crate) op: &'static str,
    pub(crate) step: Step,
    pub(crate) gives: DType,
    pub(crate) result: DType,
    /// What the last input must not have.
    pub(crate) refuses: Option<Refusal>,
}

/// Elements that an operation does not take.
pub(crate) struct Refusal {
    /// Whether a block has one.
    pub(crate) is_in: fn(&[u8]) -> bool,
    /// How the kernel fails then.
    pub(crate) reason: &'static str,
}

impl Elementwise {
    /// Enqueues it on operands that are broadcast to each other.
    pub(crate) fn launch(self, operands: &[(Operand<'_>, DType)], stream: &Stream) -> Result<Tensor, OpError> {
        let shape = broadcast_shape(self.op, operands.iter().filter_map(|(operand, _)| operand.tensor()))?;
        let (inputs, reads) = Input::broadcast(operands, &shape)?;
        launch(self.op, stream, &reads, self.result, &shape, move |reads, target| self.run(&inputs, reads, target))
    }

    fn run(&self, inputs: &[Input], reads: &[&[u8]], target: &mut [u8]) -> Result<(), DeviceError> {
        let (size, store) = (self.result.size_bytes(), Cast::between(self.gives, self.result));
        let is_refused = AtomicBool::new(false);
        for_each_chunk(target, size, |start, mut out| {
            let mut loaders: Vec<_> = inputs.iter().map(|input| input.loader(reads)).collect();
            let (mut given, mut scratch) = (Buffer::default(), Default::default());
            out.blocks(BLOCK * size, |index, block| {
                let (start, len) = (start + index * BLOCK, block.len() / size);
                if let (Some(refusal), Some(last)) = (&self.refuses, loaders.last_mut())
                    && (refusal.is_in)(last.load(start, len))
                {
                    is_refused.store(true, Ordering::Relaxed);
                    return None;
                }
                let result = if store.is_none() { &mut *block } else { given.bytes(len * self.gives.size_bytes()) };
                match (self.step, &mut loaders[..]) {
                    (Step::Unary(step), [x]) => step(x.load(start, len), result),
                    (Step::Binary(step), [x, y]) => step(x.load(start, len), y.load(start, len), result),
                    (Step::Ternary(step), [x, y, z]) => {
                        step([x.load(start, len), y.load(start, len), z.load(start, len)], result);
                    }
                    (_, loaders) => unreachable!("a step for another number of inputs than {}", loaders.len()),
                }
                if !store.is_none() {
                    store.run(given.filled(len * self.gives.size_bytes()), block, &mut scratch, len);
                }
                let mut ahead = NOTHING;
                for (ahead, loader) in ahead.iter_mut().zip(&loaders) {
                    *ahead = loader.ahead(start + len);
                }
                Some(ahead)
            });
        });
        match &self.refuses {
            Some(refusal) if is_refused.into_inner() => {
                Err(DeviceError::Kernel { op: self.op, reason: refusal.reason.into() })
            }
            _ => Ok(()),
        }
    }
}

/// Runs the step that `step` gives for the dtype of computation; operands and result have the operands' common dtype.
pub(crate) fn uniform(
    op: &'static str,
    operands: &[Operand<'_>],
    step: impl FnOnce(DType) -> Option<Step>,
    stream: &Stream,
) -> Result<Tensor, OpError> {
    let result = result_type(op, operands)?;
    in_dtype(op, operands, result, step, stream)
}

/// As [`uniform`], with a result whose dtype is decided already.
pub(crate) fn in_dtype(
    op: &'static str,
    operands: &[Operand<'_>],
    result: DType,
    step: impl FnOnce(DType) -> Option<Step>,
    stream: &Stream,
) -> Result<Tensor, OpError> {
    let compute = compute_dtype(result);
    let (Some(compute), Some(step)) = (compute, compute.and_then(step)) else {
        return Err(unsupported(op, operands));
    };
    let operands: Vec<_> = operands.iter().map(|operand| (*operand, compute)).collect();
    Elementwise { op, step, gives: compute, result, refuses: None }.launch(&operands, stream)
}

/// That there is no arithmetic for these dtypes.
pub(crate) fn unsupported(op: &'static str, operands: &[Operand<'_>]) -> OpError {
    let dtypes = operands.iter().filter_map(|operand| operand.tensor()).map(|tensor| tensor.dtype()).collect();
    OpError::DTypes { op, dtypes, remedy: "cast to a dtype that it computes with, such as f32" }
}

/// The shape that tensors have together: sizes are equal, or 1 in all but one of them; missing ones count as 1.
pub(crate) fn broadcast_shape<'a>(
    op: &'static str,
    tensors: impl Iterator<Item = &'a Tensor> + Clone,
) -> Result<Vec<usize>, OpError> {
    let rank = tensors.clone().map(Tensor::rank).max().unwrap_or(0);
    let mut shape = vec![1; rank];
    for tensor in tensors.clone() {
        for (size, given) in shape.iter_mut().rev().zip(tensor.shape().iter().rev()) {
            if *size == 1 {
                *size = *given;
            } else if *given != 1 && given != size {
                let shapes = tensors.map(|tensor| tensor.shape().to_vec()).collect();
                let rule = "sizes must be equal or 1, counted from the last dimension";
                return Err(OpError::Shapes { op, shapes, rule });
            }
        }
    }
    Ok(shape)
}
