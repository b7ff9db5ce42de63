//! Addition, subtraction, multiplication, division, extremes of two.
//!
//! As torch: integers wrap, `div` of integers is real, divisions that round refuse a zero among integers, `bool` adds as "or" and
//! multiplies as "and".

use farcall_device::{DType, Stream, Tensor};

use crate::elementwise::{Elementwise, Refusal, Step, binary, in_dtype, numbers, uniform, unsupported};
use crate::gradient::of_arg;
use crate::promote::{compute_dtype, real, result_type};
use crate::table::{Applied, Derivative, Operator, one};
use crate::{OpError, Operand, Scalar, compare};

fn add_step(dtype: DType) -> Option<Step> {
    numbers!(binary!(dtype, |x, y| integers x.wrapping_add(y), reals x + y))
}

fn sub_step(dtype: DType) -> Option<Step> {
    numbers!(binary!(dtype, |x, y| integers x.wrapping_sub(y), reals x - y))
}

fn mul_step(dtype: DType) -> Option<Step> {
    numbers!(binary!(dtype, |x, y| integers x.wrapping_mul(y), reals x * y))
}

fn div_step(dtype: DType) -> Option<Step> {
    binary!(dtype, |x, y| x / y, [F32: f32, F64: f64])
}

/// NaN beside anything is NaN.
fn maximum_step(dtype: DType) -> Option<Step> {
    numbers!(binary!(dtype, |x, y| integers x.max(y), reals if x > y || x.is_nan() { x } else { y }))
}

fn minimum_step(dtype: DType) -> Option<Step> {
    numbers!(binary!(dtype, |x, y| integers x.min(y), reals if x < y || x.is_nan() { x } else { y }))
}

/// The sum of two operands, broadcast to each other, in their common dtype.
///
/// # Errors
/// [`OpError::Shapes`], [`OpError::DTypes`], [`OpError::Device`].
pub fn add<'a>(a: impl Into<Operand<'a>>, b: impl Into<Operand<'a>>, stream: &Stream) -> Result<Tensor, OpError> {
    uniform("add", &[a.into(), b.into()], add_step, stream)
}

/// `a + alpha * b`.
///
/// # Errors
/// Those of [`add`]; [`OpError::Value`] if `alpha` is real and the result is not.
pub fn add_scaled<'a>(
    a: impl Into<Operand<'a>>,
    b: impl Into<Operand<'a>>,
    alpha: impl Into<Scalar>,
    stream: &Stream,
) -> Result<Tensor, OpError> {
    scaled("add", a.into(), b.into(), alpha.into(), stream)
}

fn scaled(op: &'static str, a: Operand<'_>, b: Operand<'_>, alpha: Scalar, stream: &Stream) -> Result<Tensor, OpError> {
    if alpha.as_f64() == 1.0 {
        return uniform(op, &[a, b], add_step, stream);
    }
    let result = result_type(op, &[a, b])?;
    if matches!(alpha, Scalar::Float(_)) && !result.is_float() {
        let value = format!("{alpha:?}");
        return Err(OpError::Value { op, name: "alpha", value, rule: "integers take an integer" });
    }
    let step = |dtype| {
        macro_rules! steps {
            (|$a:ident, $b:ident, $c:ident| $body:expr, $($variant:ident: $type:ty),*) => {
                match dtype {
                    $(DType::$variant => {
                        fn step(inputs: [&[u8]; 3], result: &mut [u8]) {
                            let [a, b, c] = inputs.map(bytemuck::cast_slice::<u8, $type>);
                            let result = bytemuck::cast_slice_mut::<u8, $type>(result);
                            for (((result, $a), $b), $c) in result.iter_mut().zip(a).zip(b).zip(c) {
                                *result = $body;
                            }
                        }
                        Some(Step::Ternary(step))
                    })*
                    _ => None,
                }
            };
        }
        steps!(|a, b, c| a.wrapping_add(b.wrapping_mul(*c)),
            U8: u8, I8: i8, U16: u16, I16: i16, U32: u32, I32: i32, U64: u64, I64: i64)
        .or_else(|| steps!(|a, b, c| a + b * c, F32: f32, F64: f64))
    };
    in_dtype(op, &[a, b, alpha.into()], result, step, stream)
}

/// The difference of two operands, broadcast to each other, in their common dtype.
///
/// # Errors
/// Those of [`add`]; [`OpError::DTypes`] for `bool`: "exclusive or" is what you may want.
pub fn sub<'a>(a: impl Into<Operand<'a>>, b: impl Into<Operand<'a>>, stream: &Stream) -> Result<Tensor, OpError> {
    sub_scaled(a, b, 1, stream)
}

/// `a - alpha * b`.
///
/// # Errors
/// Those of [`sub`] and [`add_scaled`].
pub fn sub_scaled<'a>(
    a: impl Into<Operand<'a>>,
    b: impl Into<Operand<'a>>,
    alpha: impl Into<Scalar>,
    stream: &Stream,
) -> Result<Tensor, OpError> {
    let (a, b, alpha) = (a.into(), b.into(), alpha.into());
    let is_bool = |operand: Operand<'_>| match operand {
        Operand::Tensor(tensor) => tensor.dtype() == DType::Bool,
        Operand::Scalar(scalar) => matches!(scalar, Scalar::Bool(_)),
    };
    if is_bool(a) || is_bool(b) {
        return Err(unsupported("sub", &[a, b]));
    }
    if alpha.as_f64() == 1.0 {
        uniform("sub", &[a, b], sub_step, stream)
    } else {
        scaled("sub", a, b, alpha.negated(), stream)
    }
}

/// The product of two operands, broadcast to each other, in their common dtype.
///
/// # Errors
/// Those of [`add`].
pub fn mul<'a>(a: impl Into<Operand<'a>>, b: impl Into<Operand<'a>>, stream: &Stream) -> Result<Tensor, OpError> {
    uniform("mul", &[a.into(), b.into()], mul_step, stream)
}

/// The quotient of two operands, broadcast to each other; of integers it is `f32`.
///
/// # Errors
/// Those of [`add`].
pub fn div<'a>(a: impl Into<Operand<'a>>, b: impl Into<Operand<'a>>, stream: &Stream) -> Result<Tensor, OpError> {
    let operands = [a.into(), b.into()];
    let result = real(result_type("div", &operands)?);
    in_dtype("div", &operands, result, div_step, stream)
}

/// Towards which integer a quotient is rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rounding {
    /// Towards zero, as C does.
    Trunc,
    /// Towards minus infinity, as Python does.
    Floor,
}

/// The rounded quotient of two operands, broadcast to each other, in their common dtype.
///
/// # Errors
/// Those of [`add`]; for a zero among integers, [`DeviceError::Kernel`](farcall_device::DeviceError::Kernel).
pub fn div_rounded<'a>(
    a: impl Into<Operand<'a>>,
    b: impl Into<Operand<'a>>,
    rounding: Rounding,
    stream: &Stream,
) -> Result<Tensor, OpError> {
    let (op, operands) = ("div", [a.into(), b.into()]);
    let result = result_type(op, &operands)?;
    let compute = compute_dtype(result).ok_or_else(|| unsupported(op, &operands))?;
    let step = match rounding {
        Rounding::Trunc => trunc_step(compute),
        Rounding::Floor => floor_step(compute),
    };
    let step = step.ok_or_else(|| unsupported(op, &operands))?;
    let refuses = compute.is_integer().then(|| zero_of_size(compute.size_bytes()));
    let elementwise = Elementwise { op, step, gives: compute, result, refuses };
    elementwise.launch(&operands.map(|operand| (operand, compute)), stream)
}

fn trunc_step(dtype: DType) -> Option<Step> {
    numbers!(binary!(dtype, |x, y| integers x.wrapping_div(y), reals (x / y).trunc()))
}

fn floor_step(dtype: DType) -> Option<Step> {
    binary!(dtype, |x, y| x / y, [U8: u8, U16: u16, U32: u32, U64: u64])
        .or_else(|| {
            binary!(dtype, |x, y| {
                let towards_zero = x.wrapping_div(y);
                let is_rounded_up = x.wrapping_rem(y) != 0 && (x < 0) != (y < 0);
                towards_zero.wrapping_sub(is_rounded_up.into())
            }, [I8: i8, I16: i16, I32: i32, I64: i64])
        })
        .or_else(|| {
            binary!(dtype, |x, y| {
                // Python's way: from the remainder, which is exact, and not from the quotient, which may be rounded up.
                let rest = x % y;
                let quotient = (x - rest) / y - if rest != 0.0 && (y < 0.0) != (rest < 0.0) { 1.0 } else { 0.0 };
                let floor = quotient.floor();
                if y == 0.0 {
                    x / y
                } else if quotient == 0.0 {
                    (x / y).signum() * 0.0
                } else if quotient - floor > 0.5 {
                    floor + 1.0
                } else {
                    floor
                }
            }, [F32: f32, F64: f64])
        })
}

/// Whether a block of integers of a size has a zero.
fn zero_of_size(size: usize) -> Refusal {
    fn has_zero<T: bytemuck::Pod + PartialEq>(block: &[u8]) -> bool {
        bytemuck::cast_slice::<u8, T>(block).contains(&T::zeroed())
    }
    let is_in = match size {
        1 => has_zero::<u8>,
        2 => has_zero::<u16>,
        4 => has_zero::<u32>,
        _ => has_zero::<u64>,
    };
    Refusal { is_in, reason: "an integer was divided by zero: cast to a real dtype, or leave such elements out" }
}

/// The larger of two operands, element by element; NaN if one is.
///
/// # Errors
/// Those of [`add`].
pub fn maximum<'a>(a: impl Into<Operand<'a>>, b: impl Into<Operand<'a>>, stream: &Stream) -> Result<Tensor, OpError> {
    uniform("maximum", &[a.into(), b.into()], maximum_step, stream)
}

/// The smaller of two operands, element by element; NaN if one is.
///
/// # Errors
/// Those of [`add`].
pub fn minimum<'a>(a: impl Into<Operand<'a>>, b: impl Into<Operand<'a>>, stream: &Stream) -> Result<Tensor, OpError> {
    uniform("minimum", &[a.into(), b.into()], minimum_step, stream)
}

/// The rounding that a schema's word means.
fn rounding(word: &str) -> Result<Rounding, OpError> {
    match word {
        "trunc" => Ok(Rounding::Trunc),
        "floor" => Ok(Rounding::Floor),
        _ => Err(OpError::Value {
            op: "div",
            name: "rounding_mode",
            value: word.to_owned(),
            rule: "it is `trunc`, `floor` or absent",
        }),
    }
}

/// The gradients of the larger or smaller of two: to the one that was taken, half to each of equals.
fn extreme(c: &Applied<'_>) -> Result<Vec<Option<Tensor>>, OpError> {
    let (s, y) = (c.stream, c.result());
    let share = |arg: &Tensor, other: &Tensor| {
        of_arg(arg, s, || {
            let taken = compare::eq(arg, y, s)?;
            let equal = compare::eq(arg, other, s)?;
            let weight = compare::choose(&equal, 0.5, 1.0, s)?;
            mul(&mul(c.grad, &weight, s)?, &taken, s)
        })
    };
    let (a, b) = (c.args.tensor(0)?, c.args.tensor(1)?);
    Ok(vec![share(a, b)?, share(b, a)?])
}

const PIECEWISE_CONSTANT: &str = "the result is rounded: its derivative is 0 where there is one";

pub(crate) const OPERATORS: &[Operator] = &[
    Operator {
        schema: "aten::add.Tensor(Tensor self, Tensor other, *, Scalar alpha=1) -> Tensor",
        run: |a, s| one(add_scaled(a.tensor(0)?, a.tensor(1)?, a.scalar(2)?, s)),
        derivative: Derivative::Vjp(|c| {
            let second = || mul(c.grad, c.args.scalar(2)?, c.stream);
            Ok(vec![
                of_arg(c.args.tensor(0)?, c.stream, || Ok(c.grad.clone()))?,
                of_arg(c.args.tensor(1)?, c.stream, second)?,
            ])
        }),
    },
    Operator {
        schema: "aten::add.Scalar(Tensor self, Scalar other, Scalar alpha=1) -> Tensor",
        run: |a, s| one(add_scaled(a.tensor(0)?, a.scalar(1)?, a.scalar(2)?, s)),
        derivative: Derivative::Vjp(|c| Ok(vec![of_arg(c.args.tensor(0)?, c.stream, || Ok(c.grad.clone()))?])),
    },
    Operator {
        schema: "aten::sub.Tensor(Tensor self, Tensor other, *, Scalar alpha=1) -> Tensor",
        run: |a, s| one(sub_scaled(a.tensor(0)?, a.tensor(1)?, a.scalar(2)?, s)),
        derivative: Derivative::Vjp(|c| {
            let second = || mul(c.grad, c.args.scalar(2)?.negated(), c.stream);
            Ok(vec![
                of_arg(c.args.tensor(0)?, c.stream, || Ok(c.grad.clone()))?,
                of_arg(c.args.tensor(1)?, c.stream, second)?,
            ])
        }),
    },
    Operator {
        schema: "aten::sub.Scalar(Tensor self, Scalar other, Scalar alpha=1) -> Tensor",
        run: |a, s| one(sub_scaled(a.tensor(0)?, a.scalar(1)?, a.scalar(2)?, s)),
        derivative: Derivative::Vjp(|c| Ok(vec![of_arg(c.args.tensor(0)?, c.stream, || Ok(c.grad.clone()))?])),
    },
    Operator {
        schema: "aten::rsub.Scalar(Tensor self, Scalar other, Scalar alpha=1) -> Tensor",
        run: |a, s| one(sub_scaled(a.scalar(1)?, a.tensor(0)?, a.scalar(2)?, s)),
        derivative: Derivative::Vjp(|c| {
            let first = || mul(c.grad, c.args.scalar(2)?.negated(), c.stream);
            Ok(vec![of_arg(c.args.tensor(0)?, c.stream, first)?])
        }),
    },
    Operator {
        schema: "aten::mul.Tensor(Tensor self, Tensor other) -> Tensor",
        run: |a, s| one(mul(a.tensor(0)?, a.tensor(1)?, s)),
        derivative: Derivative::Vjp(|c| {
            let (a, b) = (c.args.tensor(0)?, c.args.tensor(1)?);
            Ok(vec![
                of_arg(a, c.stream, || mul(c.grad, b, c.stream))?,
                of_arg(b, c.stream, || mul(c.grad, a, c.stream))?,
            ])
        }),
    },
    Operator {
        schema: "aten::mul.Scalar(Tensor self, Scalar other) -> Tensor",
        run: |a, s| one(mul(a.tensor(0)?, a.scalar(1)?, s)),
        derivative: Derivative::Vjp(|c| {
            Ok(vec![of_arg(c.args.tensor(0)?, c.stream, || mul(c.grad, c.args.scalar(1)?, c.stream))?])
        }),
    },
    Operator {
        schema: "aten::div.Tensor(Tensor self, Tensor other) -> Tensor",
        run: |a, s| one(div(a.tensor(0)?, a.tensor(1)?, s)),
        derivative: Derivative::Vjp(|c| {
            let (a, b, s) = (c.args.tensor(0)?, c.args.tensor(1)?, c.stream);
            let second = || mul(&mul(&div(c.grad, b, s)?, c.result(), s)?, -1, s);
            Ok(vec![of_arg(a, s, || div(c.grad, b, s))?, of_arg(b, s, second)?])
        }),
    },
    Operator {
        schema: "aten::div.Scalar(Tensor self, Scalar other) -> Tensor",
        run: |a, s| one(div(a.tensor(0)?, a.scalar(1)?, s)),
        derivative: Derivative::Vjp(|c| {
            Ok(vec![of_arg(c.args.tensor(0)?, c.stream, || div(c.grad, c.args.scalar(1)?, c.stream))?])
        }),
    },
    Operator {
        schema: "aten::div.Tensor_mode(Tensor self, Tensor other, *, str? rounding_mode) -> Tensor",
        run: |a, s| {
            one(match a.text_or_none(2)? {
                None => div(a.tensor(0)?, a.tensor(1)?, s),
                Some(word) => div_rounded(a.tensor(0)?, a.tensor(1)?, rounding(word)?, s),
            })
        },
        derivative: Derivative::None(PIECEWISE_CONSTANT),
    },
    Operator {
        schema: "aten::div.Scalar_mode(Tensor self, Scalar other, *, str? rounding_mode) -> Tensor",
        run: |a, s| {
            one(match a.text_or_none(2)? {
                None => div(a.tensor(0)?, a.scalar(1)?, s),
                Some(word) => div_rounded(a.tensor(0)?, a.scalar(1)?, rounding(word)?, s),
            })
        },
        derivative: Derivative::None(PIECEWISE_CONSTANT),
    },
    Operator {
        schema: "aten::maximum(Tensor self, Tensor other) -> Tensor",
        run: |a, s| one(maximum(a.tensor(0)?, a.tensor(1)?, s)),
        derivative: Derivative::Vjp(extreme),
    },
    Operator {
        schema: "aten::minimum(Tensor self, Tensor other) -> Tensor",
        run: |a, s| one(minimum(a.tensor(0)?, a.tensor(1)?, s)),
        derivative: Derivative::Vjp(extreme),
    },
];
