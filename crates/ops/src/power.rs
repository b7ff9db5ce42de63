//! Powers: of tensors, with tensors and numbers as exponents.

use farcall_device::{DType, Stream, Tensor};

use crate::arithmetic::{mul, sub};
use crate::elementwise::{Step, binary, unary, uniform};
use crate::gradient::of_arg;
use crate::table::{Derivative, Operator, one};
use crate::unary::{log, sqrt};
use crate::{OpError, Operand, Scalar, compare};

fn pow_step(dtype: DType) -> Option<Step> {
    binary!(dtype, |x, y| x.wrapping_pow_of(y), [U8: u8, I8: i8, U16: u16, I16: i16, U32: u32, I32: i32, U64: u64, I64: i64])
        .or_else(|| binary!(dtype, |x, y| x.powf(y), [F32: f32, F64: f64]))
}

/// Integer powers by squaring, which wrap; of negative exponents only 1 and -1 have an integer one, the others' is 0.
trait WrappingPow: Copy {
    fn wrapping_pow_of(self, exponent: Self) -> Self;
}

macro_rules! wrapping_pow {
    ($($type:ty),*) => {$(
        impl WrappingPow for $type {
            #[allow(unused_comparisons, reason = "one body for types with and without a sign")]
            fn wrapping_pow_of(self, exponent: Self) -> Self {
                let (mut power, mut base, mut left): (Self, Self, Self) = (1, self, exponent);
                if exponent < 0 {
                    let is_unit = self == 1 || self.wrapping_neg() == 1;
                    return if !is_unit { 0 } else if exponent % 2 == 0 { 1 } else { self };
                }
                while left > 0 {
                    if left & 1 == 1 {
                        power = power.wrapping_mul(base);
                    }
                    base = base.wrapping_mul(base);
                    left >>= 1;
                }
                power
            }
        }
    )*};
}

wrapping_pow!(u8, i8, u16, i16, u32, i32, u64, i64);

/// `base` to the power of `exponent`, broadcast to each other, in their common dtype; integers wrap.
///
/// # Errors
/// [`OpError::Shapes`], [`OpError::DTypes`]; [`OpError::Value`] for integers with a negative number as exponent.
pub fn pow<'a>(
    base: impl Into<Operand<'a>>,
    exponent: impl Into<Operand<'a>>,
    stream: &Stream,
) -> Result<Tensor, OpError> {
    let (base, exponent) = (base.into(), exponent.into());
    if let (Operand::Tensor(tensor), Operand::Scalar(number)) = (base, exponent) {
        let is_real = tensor.dtype().is_float();
        match number {
            Scalar::Int(value) if value < 0 && !is_real => {
                let rule = "integers have no negative powers: cast the base to a real dtype";
                return Err(OpError::Value { op: "pow", name: "exponent", value: value.to_string(), rule });
            }
            // These are quicker, and correctly rounded, which a general power is not.
            _ if is_real && number.as_f64() == 2.0 => return square(tensor, stream),
            _ if is_real && number.as_f64() == 0.5 => return sqrt(tensor, stream),
            _ => {}
        }
    }
    uniform("pow", &[base, exponent], pow_step, stream)
}

fn square(base: &Tensor, stream: &Stream) -> Result<Tensor, OpError> {
    uniform("pow", &[base.into()], |dtype| unary!(dtype, |x| x * x, [F32: f32, F64: f64]), stream)
}

/// Of the base: `grad * exponent * base ^ (exponent - 1)`, and 0 for an exponent of 0, also at 0.
fn of_base<'a>(
    grad: &Tensor,
    base: &Tensor,
    exponent: impl Into<Operand<'a>>,
    stream: &Stream,
) -> Result<Tensor, OpError> {
    let exponent = exponent.into();
    let slope = mul(&pow(base, &sub(exponent, 1, stream)?, stream)?, exponent, stream)?;
    let is_constant = compare::eq(exponent, 0, stream)?;
    mul(grad, &compare::choose(&is_constant, 0.0, &slope, stream)?, stream)
}

/// Of the exponent: `grad * power * ln base`, and 0 for a base of 0.
fn of_exponent<'a>(
    grad: &Tensor,
    base: impl Into<Operand<'a>>,
    power: &Tensor,
    stream: &Stream,
) -> Result<Tensor, OpError> {
    let base = base.into();
    let slope = match base {
        Operand::Tensor(tensor) => mul(power, &log(tensor, stream)?, stream)?,
        Operand::Scalar(number) => mul(power, number.as_f64().ln(), stream)?,
    };
    let is_zero = compare::eq(base, 0, stream)?;
    mul(grad, &compare::choose(&is_zero, 0.0, &slope, stream)?, stream)
}

pub(crate) const OPERATORS: &[Operator] = &[
    Operator {
        schema: "aten::pow.Tensor_Tensor(Tensor self, Tensor exponent) -> Tensor",
        run: |a, s| one(pow(a.tensor(0)?, a.tensor(1)?, s)),
        derivative: Derivative::Vjp(|c| {
            let (base, exponent) = (c.args.tensor(0)?, c.args.tensor(1)?);
            Ok(vec![
                of_arg(base, c.stream, || of_base(c.grad, base, exponent, c.stream))?,
                of_arg(exponent, c.stream, || of_exponent(c.grad, base, c.result(), c.stream))?,
            ])
        }),
    },
    Operator {
        schema: "aten::pow.Tensor_Scalar(Tensor self, Scalar exponent) -> Tensor",
        run: |a, s| one(pow(a.tensor(0)?, a.scalar(1)?, s)),
        derivative: Derivative::Vjp(|c| {
            let base = c.args.tensor(0)?;
            Ok(vec![of_arg(base, c.stream, || of_base(c.grad, base, c.args.scalar(1)?, c.stream))?])
        }),
    },
    Operator {
        schema: "aten::pow.Scalar(Scalar self, Tensor exponent) -> Tensor",
        run: |a, s| one(pow(a.scalar(0)?, a.tensor(1)?, s)),
        derivative: Derivative::Vjp(|c| {
            let exponent = c.args.tensor(1)?;
            let slope = || of_exponent(c.grad, c.args.scalar(0)?, c.result(), c.stream);
            Ok(vec![of_arg(exponent, c.stream, slope)?])
        }),
    },
];
