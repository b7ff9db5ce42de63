//! Comparisons, which give `bool`, and choices by it.
//!
//! Operands are compared in their common dtype. Whatever is compared with NaN is false, but "not equal".

use farcall_device::{DType, Stream, Tensor};

use crate::elementwise::{Elementwise, Step, binary, unsupported};
use crate::gradient::of_arg;
use crate::promote::{compute_dtype, result_type};
use crate::table::{Derivative, Operator, one};
use crate::{OpError, Operand};

macro_rules! comparisons {
    ($($(#[$doc:meta])* $name:ident: $symbol:tt;)*) => {$(
        $(#[$doc])*
        ///
        /// # Errors
        /// [`OpError::Shapes`], [`OpError::DTypes`], [`OpError::Device`].
        pub fn $name<'a>(
            a: impl Into<Operand<'a>>,
            b: impl Into<Operand<'a>>,
            stream: &Stream,
        ) -> Result<Tensor, OpError> {
            let step = |dtype| binary!(
                dtype,
                |x, y| u8::from(x $symbol y),
                [U8: u8, I8: i8, U16: u16, I16: i16, U32: u32, I32: i32, U64: u64, I64: i64, F32: f32, F64: f64] => u8
            );
            compared(stringify!($name), [a.into(), b.into()], step, stream)
        }
    )*};
}

comparisons! {
    /// Where two operands, broadcast to each other, are equal.
    eq: ==;
    /// Where two operands, broadcast to each other, differ.
    ne: !=;
    /// Where the first of two operands, broadcast to each other, is less.
    lt: <;
    /// Where the first of two operands, broadcast to each other, is less or equal.
    le: <=;
    /// Where the first of two operands, broadcast to each other, is greater.
    gt: >;
    /// Where the first of two operands, broadcast to each other, is greater or equal.
    ge: >=;
}

fn compared(
    op: &'static str,
    operands: [Operand<'_>; 2],
    step: impl FnOnce(DType) -> Option<Step>,
    stream: &Stream,
) -> Result<Tensor, OpError> {
    let compute = compute_dtype(result_type(op, &operands)?);
    let (Some(compute), Some(step)) = (compute, compute.and_then(step)) else {
        return Err(unsupported(op, &operands));
    };
    // The step gives 0 and 1: they are `bool` already.
    let elementwise = Elementwise { op, step, gives: DType::Bool, result: DType::Bool, refuses: None };
    elementwise.launch(&operands.map(|operand| (operand, compute)), stream)
}

/// Elements as words, by masks: a condition that is as good as random costs no mispredicted branches then.
macro_rules! pick {
    ($type:ty) => {{
        fn step([condition, a, b]: [&[u8]; 3], result: &mut [u8]) {
            let [a, b] = [a, b].map(bytemuck::cast_slice::<u8, $type>);
            let result = bytemuck::cast_slice_mut::<u8, $type>(result);
            crate::kernel::with_vectors(
                #[inline(always)]
                || {
                    for (((result, condition), a), b) in result.iter_mut().zip(condition).zip(a).zip(b) {
                        let mask = <$type>::from(*condition != 0).wrapping_neg();
                        *result = *a & mask | *b & !mask;
                    }
                },
            );
        }
        step
    }};
}

/// Elements of `a` where `condition` holds, else those of `b`: torch's `where`. All three are broadcast to each other.
///
/// # Shapes and dtypes
/// Any dtype; the result has that which `a` and `b` have in common.
/// # Errors
/// [`OpError::DTypes`] unless the condition is `bool`; [`OpError::Shapes`], [`OpError::Device`].
pub fn choose<'a>(
    condition: &'a Tensor,
    a: impl Into<Operand<'a>>,
    b: impl Into<Operand<'a>>,
    stream: &Stream,
) -> Result<Tensor, OpError> {
    let (op, a, b) = ("where", a.into(), b.into());
    if condition.dtype() != DType::Bool {
        let remedy = "the condition must be bool: compare, or cast it";
        return Err(OpError::DTypes { op, dtypes: vec![condition.dtype()], remedy });
    }
    let result = result_type(op, &[a, b])?;
    let step = Step::Ternary(match result.size_bytes() {
        1 => pick!(u8),
        2 => pick!(u16),
        4 => pick!(u32),
        8 => pick!(u64),
        _ => pick_wide,
    });
    // The condition as numbers 0 and 1, whatever its bytes are.
    let operands = [(condition.into(), DType::U8), (a, result), (b, result)];
    Elementwise { op, step, gives: result, result, refuses: None }.launch(&operands, stream)
}

/// Pairs of words.
fn pick_wide([condition, a, b]: [&[u8]; 3], result: &mut [u8]) {
    let [a, b] = [a, b].map(bytemuck::cast_slice::<u8, [u64; 2]>);
    let result = bytemuck::cast_slice_mut::<u8, [u64; 2]>(result);
    for (((result, condition), a), b) in result.iter_mut().zip(condition).zip(a).zip(b) {
        *result = if *condition != 0 { *a } else { *b };
    }
}

const TRUTHS: &str = "the result is bool";

macro_rules! operators {
    ($($name:ident: $tensor:literal, $scalar:literal;)*) => {
        &[
            $(
                Operator {
                    schema: $tensor,
                    run: |a, s| one($name(a.tensor(0)?, a.tensor(1)?, s)),
                    derivative: Derivative::None(TRUTHS),
                },
                Operator {
                    schema: $scalar,
                    run: |a, s| one($name(a.tensor(0)?, a.scalar(1)?, s)),
                    derivative: Derivative::None(TRUTHS),
                },
            )*
            Operator {
                schema: "aten::where.self(Tensor condition, Tensor self, Tensor other) -> Tensor",
                run: |a, s| one(choose(a.tensor(0)?, a.tensor(1)?, a.tensor(2)?, s)),
                derivative: Derivative::Vjp(|c| {
                    let (condition, s) = (c.args.tensor(0)?, c.stream);
                    Ok(vec![
                        None,
                        of_arg(c.args.tensor(1)?, s, || choose(condition, c.grad, 0.0, s))?,
                        of_arg(c.args.tensor(2)?, s, || choose(condition, 0.0, c.grad, s))?,
                    ])
                }),
            },
            Operator {
                schema: "aten::where.ScalarOther(Tensor condition, Tensor self, Scalar other) -> Tensor",
                run: |a, s| one(choose(a.tensor(0)?, a.tensor(1)?, a.scalar(2)?, s)),
                derivative: Derivative::Vjp(|c| {
                    let (condition, s) = (c.args.tensor(0)?, c.stream);
                    Ok(vec![None, of_arg(c.args.tensor(1)?, s, || choose(condition, c.grad, 0.0, s))?])
                }),
            },
            Operator {
                schema: "aten::where.ScalarSelf(Tensor condition, Scalar self, Tensor other) -> Tensor",
                run: |a, s| one(choose(a.tensor(0)?, a.scalar(1)?, a.tensor(2)?, s)),
                derivative: Derivative::Vjp(|c| {
                    let (condition, s) = (c.args.tensor(0)?, c.stream);
                    Ok(vec![None, of_arg(c.args.tensor(2)?, s, || choose(condition, 0.0, c.grad, s))?])
                }),
            },
            Operator {
                schema: "aten::where.Scalar(Tensor condition, Scalar self, Scalar other) -> Tensor",
                run: |a, s| one(choose(a.tensor(0)?, a.scalar(1)?, a.scalar(2)?, s)),
                derivative: Derivative::None("no argument is real"),
            },
        ]
    };
}

pub(crate) const OPERATORS: &[Operator] = operators! {
    eq: "aten::eq.Tensor(Tensor self, Tensor other) -> Tensor", "aten::eq.Scalar(Tensor self, Scalar other) -> Tensor";
    ne: "aten::ne.Tensor(Tensor self, Tensor other) -> Tensor", "aten::ne.Scalar(Tensor self, Scalar other) -> Tensor";
    lt: "aten::lt.Tensor(Tensor self, Tensor other) -> Tensor", "aten::lt.Scalar(Tensor self, Scalar other) -> Tensor";
    le: "aten::le.Tensor(Tensor self, Tensor other) -> Tensor", "aten::le.Scalar(Tensor self, Scalar other) -> Tensor";
    gt: "aten::gt.Tensor(Tensor self, Tensor other) -> Tensor", "aten::gt.Scalar(Tensor self, Scalar other) -> Tensor";
    ge: "aten::ge.Tensor(Tensor self, Tensor other) -> Tensor", "aten::ge.Scalar(Tensor self, Scalar other) -> Tensor";
};
