//! Functions of one operand. Those that are real for real numbers alone give `f32` for integers, as in torch.
//!
//! Exponentials and the like are the platform's: close to the exact value, not the same bit on every machine.

use farcall_device::{DType, Stream, Tensor};

use crate::arithmetic::{div, mul};
use crate::elementwise::{Step, binary, in_dtype, unary, uniform, unsupported};
use crate::gradient::of_arg;
use crate::promote::real;
use crate::table::{Applied, Derivative, Operator, one};
use crate::{OpError, Operand};

/// A function that is real for real numbers alone.
fn real_valued(
    op: &'static str,
    x: &Tensor,
    step: impl FnOnce(DType) -> Option<Step>,
    stream: &Stream,
) -> Result<Tensor, OpError> {
    in_dtype(op, &[x.into()], real(x.dtype()), step, stream)
}

/// The negated elements; integers wrap.
///
/// # Errors
/// [`OpError::DTypes`], also for `bool`; [`OpError::Device`].
pub fn neg(x: &Tensor, stream: &Stream) -> Result<Tensor, OpError> {
    if x.dtype() == DType::Bool {
        return Err(unsupported("neg", &[x.into()]));
    }
    let step = |dtype| {
        unary!(dtype, |x| x.wrapping_neg(), [U8: u8, I8: i8, U16: u16, I16: i16, U32: u32, I32: i32, U64: u64, I64: i64])
            .or_else(|| unary!(dtype, |x| -x, [F32: f32, F64: f64]))
    };
    uniform("neg", &[x.into()], step, stream)
}

/// The elements without their sign; the lowest integer of a dtype stays.
///
/// # Errors
/// [`OpError::DTypes`], also for `bool`; [`OpError::Device`].
pub fn abs(x: &Tensor, stream: &Stream) -> Result<Tensor, OpError> {
    if x.dtype() == DType::Bool {
        return Err(unsupported("abs", &[x.into()]));
    }
    let step = |dtype| {
        unary!(dtype, |x| x, [U8: u8, U16: u16, U32: u32, U64: u64])
            .or_else(|| unary!(dtype, |x| x.wrapping_abs(), [I8: i8, I16: i16, I32: i32, I64: i64]))
            .or_else(|| unary!(dtype, |x| x.abs(), [F32: f32, F64: f64]))
    };
    uniform("abs", &[x.into()], step, stream)
}

/// -1, 0 or 1 for each element; 0 for NaN.
///
/// # Errors
/// [`OpError::DTypes`], [`OpError::Device`].
pub fn sign(x: &Tensor, stream: &Stream) -> Result<Tensor, OpError> {
    let step = |dtype| {
        unary!(dtype, |x| x.min(1), [U8: u8, U16: u16, U32: u32, U64: u64])
            .or_else(|| unary!(dtype, |x| x.signum(), [I8: i8, I16: i16, I32: i32, I64: i64]))
            .or_else(|| {
                unary!(dtype, |x| f32::from(i8::from(x > 0.0) - i8::from(x < 0.0)), [F32: f32])
                    .or_else(|| unary!(dtype, |x| f64::from(i8::from(x > 0.0) - i8::from(x < 0.0)), [F64: f64]))
            })
    };
    uniform("sign", &[x.into()], step, stream)
}

/// `e` to the power of each element.
///
/// # Errors
/// [`OpError::DTypes`], [`OpError::Device`].
pub fn exp(x: &Tensor, stream: &Stream) -> Result<Tensor, OpError> {
    real_valued("exp", x, |dtype| unary!(dtype, |x| x.exp(), [F32: f32, F64: f64]), stream)
}

/// The natural logarithm of each element; NaN below 0.
///
/// # Errors
/// [`OpError::DTypes`], [`OpError::Device`].
pub fn log(x: &Tensor, stream: &Stream) -> Result<Tensor, OpError> {
    real_valued("log", x, |dtype| unary!(dtype, |x| x.ln(), [F32: f32, F64: f64]), stream)
}

/// The square root of each element; NaN below 0.
///
/// # Errors
/// [`OpError::DTypes`], [`OpError::Device`].
pub fn sqrt(x: &Tensor, stream: &Stream) -> Result<Tensor, OpError> {
    real_valued("sqrt", x, |dtype| unary!(dtype, |x| x.sqrt(), [F32: f32, F64: f64]), stream)
}

/// The hyperbolic tangent of each element.
///
/// # Errors
/// [`OpError::DTypes`], [`OpError::Device`].
pub fn tanh(x: &Tensor, stream: &Stream) -> Result<Tensor, OpError> {
    real_valued("tanh", x, |dtype| unary!(dtype, |x| x.tanh(), [F32: f32, F64: f64]), stream)
}

/// `1 / (1 + exp(-x))` of each element.
///
/// # Errors
/// [`OpError::DTypes`], [`OpError::Device`].
pub fn sigmoid(x: &Tensor, stream: &Stream) -> Result<Tensor, OpError> {
    real_valued("sigmoid", x, |dtype| unary!(dtype, |x| 1.0 / (1.0 + (-x).exp()), [F32: f32, F64: f64]), stream)
}

/// The elements above 0, and 0 for the others; NaN stays.
///
/// # Errors
/// [`OpError::DTypes`], also for `bool`; [`OpError::Device`].
pub fn relu(x: &Tensor, stream: &Stream) -> Result<Tensor, OpError> {
    if x.dtype() == DType::Bool {
        return Err(unsupported("relu", &[x.into()]));
    }
    let step = |dtype| {
        unary!(dtype, |x| x, [U8: u8, U16: u16, U32: u32, U64: u64])
            .or_else(|| unary!(dtype, |x| x.max(0), [I8: i8, I16: i16, I32: i32, I64: i64]))
            .or_else(|| unary!(dtype, |x| if x <= 0.0 { 0.0 } else { x }, [F32: f32, F64: f64]))
    };
    uniform("relu", &[x.into()], step, stream)
}

/// How [`gelu`] is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Gelu {
    /// By the error function.
    #[default]
    Exact,
    /// By a hyperbolic tangent of a cubic polynomial.
    Tanh,
}

/// The factor of a gelu by `tanh`: the square root of 2 / pi.
const ROOT_TWO_OVER_PI: f64 = std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::FRAC_1_SQRT_2;
/// The cubic term's factor.
const CUBIC: f64 = 0.044_715;

/// Each element times the normal distribution's share below it.
///
/// # Errors
/// [`OpError::DTypes`] for what is not real; [`OpError::Device`].
pub fn gelu(x: &Tensor, how: Gelu, stream: &Stream) -> Result<Tensor, OpError> {
    let step = |dtype| match how {
        Gelu::Exact => {
            unary!(dtype, |x| 0.5 * x * (1.0 + x.scaled(std::f64::consts::FRAC_1_SQRT_2).error_function()), [F32: f32, F64: f64])
        }
        Gelu::Tanh => {
            unary!(dtype, |x| 0.5 * x * (1.0 + (x + (x * x * x).scaled(CUBIC)).scaled(ROOT_TWO_OVER_PI).tanh()), [F32: f32, F64: f64])
        }
    };
    uniform("gelu", &[x.into()], step, stream)
}

/// What is missing in the standard library for `f32` and `f64` alike.
trait Real {
    fn error_function(self) -> Self;
    fn scaled(self, factor: f64) -> Self;
}

impl Real for f32 {
    fn error_function(self) -> Self {
        libm::erff(self)
    }

    fn scaled(self, factor: f64) -> Self {
        self * factor as f32
    }
}

impl Real for f64 {
    fn error_function(self) -> Self {
        libm::erf(self)
    }

    fn scaled(self, factor: f64) -> Self {
        self * factor
    }
}

fn gelu_slope(dtype: DType, how: Gelu) -> Option<Step> {
    match how {
        Gelu::Exact => binary!(dtype, |grad, x| {
            let below = 0.5 * (1.0 + x.scaled(std::f64::consts::FRAC_1_SQRT_2).error_function());
            let density = (-0.5 * x * x).exp().scaled(0.5 * std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::FRAC_1_SQRT_2);
            grad * (below + x * density)
        }, [F32: f32, F64: f64]),
        Gelu::Tanh => binary!(dtype, |grad, x| {
            let tanh = (x + (x * x * x).scaled(CUBIC)).scaled(ROOT_TWO_OVER_PI).tanh();
            let inner = (1.0 + (x * x).scaled(3.0 * CUBIC)).scaled(ROOT_TWO_OVER_PI);
            grad * 0.5 * (1.0 + tanh + x * (1.0 - tanh * tanh) * inner)
        }, [F32: f32, F64: f64]),
    }
}

/// The derivative of one argument as a step over the gradient and the argument or the result.
fn by_step(
    c: &Applied<'_>,
    op: &'static str,
    of: &Tensor,
    step: impl FnOnce(DType) -> Option<Step>,
) -> Result<Vec<Option<Tensor>>, OpError> {
    let operands: [Operand<'_>; 2] = [c.grad.into(), of.into()];
    Ok(vec![of_arg(c.args.tensor(0)?, c.stream, || uniform(op, &operands, step, c.stream))?])
}

fn gelu_of(word: &str) -> Result<Gelu, OpError> {
    match word {
        "none" => Ok(Gelu::Exact),
        "tanh" => Ok(Gelu::Tanh),
        _ => Err(OpError::Value {
            op: "gelu",
            name: "approximate",
            value: word.to_owned(),
            rule: "it is `none` or `tanh`",
        }),
    }
}

pub(crate) const OPERATORS: &[Operator] = &[
    Operator {
        schema: "aten::neg(Tensor self) -> Tensor",
        run: |a, s| one(neg(a.tensor(0)?, s)),
        derivative: Derivative::Vjp(|c| Ok(vec![of_arg(c.args.tensor(0)?, c.stream, || neg(c.grad, c.stream))?])),
    },
    Operator {
        schema: "aten::abs(Tensor self) -> Tensor",
        run: |a, s| one(abs(a.tensor(0)?, s)),
        derivative: Derivative::Vjp(|c| {
            let x = c.args.tensor(0)?;
            Ok(vec![of_arg(x, c.stream, || mul(c.grad, &sign(x, c.stream)?, c.stream))?])
        }),
    },
    Operator {
        schema: "aten::sign(Tensor self) -> Tensor",
        run: |a, s| one(sign(a.tensor(0)?, s)),
        derivative: Derivative::None("the result is piecewise constant"),
    },
    Operator {
        schema: "aten::exp(Tensor self) -> Tensor",
        run: |a, s| one(exp(a.tensor(0)?, s)),
        derivative: Derivative::Vjp(|c| {
            Ok(vec![of_arg(c.args.tensor(0)?, c.stream, || mul(c.grad, c.result(), c.stream))?])
        }),
    },
    Operator {
        schema: "aten::log(Tensor self) -> Tensor",
        run: |a, s| one(log(a.tensor(0)?, s)),
        derivative: Derivative::Vjp(|c| {
            let x = c.args.tensor(0)?;
            Ok(vec![of_arg(x, c.stream, || div(c.grad, x, c.stream))?])
        }),
    },
    Operator {
        schema: "aten::sqrt(Tensor self) -> Tensor",
        run: |a, s| one(sqrt(a.tensor(0)?, s)),
        derivative: Derivative::Vjp(|c| {
            by_step(c, "sqrt", c.result(), |dtype| binary!(dtype, |grad, y| grad / (2.0 * y), [F32: f32, F64: f64]))
        }),
    },
    Operator {
        schema: "aten::tanh(Tensor self) -> Tensor",
        run: |a, s| one(tanh(a.tensor(0)?, s)),
        derivative: Derivative::Vjp(|c| {
            by_step(c, "tanh", c.result(), |dtype| binary!(dtype, |grad, y| grad * (1.0 - y * y), [F32: f32, F64: f64]))
        }),
    },
    Operator {
        schema: "aten::sigmoid(Tensor self) -> Tensor",
        run: |a, s| one(sigmoid(a.tensor(0)?, s)),
        derivative: Derivative::Vjp(|c| {
            let step = |dtype| binary!(dtype, |grad, y| grad * (1.0 - y) * y, [F32: f32, F64: f64]);
            by_step(c, "sigmoid", c.result(), step)
        }),
    },
    Operator {
        schema: "aten::relu(Tensor self) -> Tensor",
        run: |a, s| one(relu(a.tensor(0)?, s)),
        derivative: Derivative::Vjp(|c| {
            let step = |dtype| binary!(dtype, |grad, y| if y <= 0.0 { 0.0 } else { grad }, [F32: f32, F64: f64]);
            by_step(c, "relu", c.result(), step)
        }),
    },
    Operator {
        schema: "aten::gelu(Tensor self, *, str approximate=\"none\") -> Tensor",
        run: |a, s| one(gelu(a.tensor(0)?, gelu_of(a.text(1)?)?, s)),
        derivative: Derivative::Vjp(|c| {
            let how = gelu_of(c.args.text(1)?)?;
            by_step(c, "gelu", c.args.tensor(0)?, |dtype| gelu_slope(dtype, how))
        }),
    },
];
