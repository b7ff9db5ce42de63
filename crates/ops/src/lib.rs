//! Builtin operators on tensors, and their derivatives, over `device`. Knows no network and no call.
//!
//! - elementwise: [`add`], [`sub`], [`mul`], [`div`], [`pow`], [`maximum`], [`minimum`], [`neg`], [`abs`], [`sign`], [`exp`], [`log`],
//!   [`sqrt`], [`tanh`], [`sigmoid`], [`relu`], [`gelu`]; comparisons such as [`lt`], and [`choose`] (torch's `where`);
//! - reductions: [`sum`], [`mean`], [`amax`], [`argmax`], [`norm`], [`softmax`], [`log_softmax`], [`nll_loss`];
//! - [`matmul`], by the `gemm` crate;
//! - [`full`], [`arange`], [`cast`], [`copy`], [`unpack`], [`rand`], [`randn`]; views such as [`slice`](slice()); [`cat`], [`stack`],
//!   [`index_select`];
//! - [`Optimizer`]: [`Sgd`] and [`Adam`] over many [`Param`](farcall_device::Param)s in one kernel;
//! - [`operators`]: the table of all, by schema, with their derivatives.
//!
//! An operator is enqueued on a stream of its tensors' device, host or emulated, and gives its result at once: a tensor with a fence. Names,
//! promotion, broadcasting and edge cases are torch's. On a real CUDA device operators are `Unsupported` so far.
//!
//! # Invariants
//! - **FENCE** Kernels reach bytes through [`Stream::launch_many`](farcall_device::Stream::launch_many) alone, which orders them.
//! - **K1** Results depend on shapes and elements, not on the number of threads. Products and exponentials may differ in the last
//!   bits from machine to machine.
//! - **R1** A reduction is a tree of fixed shape.
//!
//! ```
//! use farcall_device::{Device, Runtime, Tensor};
//! use farcall_ops as ops;
//!
//! let stream = Runtime::global().stream(Device::HOST)?;
//! let x = Tensor::from_slice(&[1.0_f32, -2.0, 3.0, -4.0], &[2, 2])?;
//! let y = ops::relu(&ops::add(&x, 0.5, &stream)?, &stream)?;
//! let rows = ops::sum(&y, &[-1], false, &stream)?.host().wait(std::time::Duration::from_secs(5))?;
//! assert_eq!(rows.as_slice::<f32>()?, [1.5, 3.5]);
//! # Ok::<(), ops::OpError>(())
//! ```

mod arithmetic;
mod compare;
mod convert;
mod elementwise;
mod error;
mod fill;
mod gradient;
mod join;
mod kernel;
mod matmul;
mod memory;
mod optimizer;
mod power;
mod promote;
mod random;
mod reduce;
mod scalar;
mod softmax;
mod table;
mod unary;
mod views;
mod walk;

pub use arithmetic::{Rounding, add, add_scaled, div, div_rounded, maximum, minimum, mul, sub, sub_scaled};
pub use compare::{choose, eq, ge, gt, le, lt, ne};
pub use error::OpError;
pub use fill::{arange, cast, contiguous, copy, full, unpack};
pub use join::{cat, index_select, stack};
pub use matmul::matmul;
pub use optimizer::{Adam, Optimizer, Rule, Sgd};
pub use power::pow;
pub use promote::promote;
pub use random::{rand, randn};
pub use reduce::{amax, amin, argmax, argmin, mean, norm, sum};
pub use scalar::{Operand, Scalar};
pub use softmax::{Reduction, log_softmax, nll_loss, softmax};
pub use table::{Applied, Arg, Args, Derivative, Operator, find, operators};
pub use unary::{Gelu, abs, exp, gelu, log, neg, relu, sigmoid, sign, sqrt, tanh};
pub use views::{expand, permute, reshape, select, slice, squeeze, transpose, unsqueeze};

/// The operators of each family: what [`operators`] walks.
const FAMILIES: &[&[Operator]] = &[
    arithmetic::OPERATORS,
    power::OPERATORS,
    unary::OPERATORS,
    compare::OPERATORS,
    reduce::OPERATORS,
    softmax::OPERATORS,
    matmul::OPERATORS,
    fill::OPERATORS,
    views::OPERATORS,
    views::RESHAPING,
    join::OPERATORS,
];
