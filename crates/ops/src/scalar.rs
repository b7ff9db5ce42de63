//! Numbers among the operands: what they are worth as elements of each dtype is decided by the tensors beside them.

use farcall_device::Tensor;

/// A number that is no tensor: it takes part in promotion by its kind alone.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scalar {
    /// A truth value.
    Bool(bool),
    /// An integer.
    Int(i64),
    /// A real number.
    Float(f64),
}

impl Scalar {
    /// Its value as a real number; integers beyond 2^53 are rounded.
    #[must_use]
    pub fn as_f64(self) -> f64 {
        match self {
            Self::Bool(value) => f64::from(u8::from(value)),
            Self::Int(value) => value as f64,
            Self::Float(value) => value,
        }
    }

    /// The negated number; a truth value counts as 0 or 1.
    pub(crate) fn negated(self) -> Self {
        match self {
            Self::Bool(value) => Self::Int(-i64::from(value)),
            Self::Int(value) => Self::Int(value.wrapping_neg()),
            Self::Float(value) => Self::Float(-value),
        }
    }
}

macro_rules! scalars {
    ($($rust:ty => $variant:ident),*) => {$(
        impl From<$rust> for Scalar {
            fn from(value: $rust) -> Self {
                Self::$variant(value.into())
            }
        }
        impl From<$rust> for Operand<'_> {
            fn from(value: $rust) -> Self {
                Self::Scalar(value.into())
            }
        }
    )*};
}

scalars!(bool => Bool, i32 => Int, i64 => Int, f32 => Float, f64 => Float);

/// What an elementwise operator takes: a tensor or a number.
#[derive(Debug, Clone, Copy)]
pub enum Operand<'a> {
    /// Elements of its own.
    Tensor(&'a Tensor),
    /// One value for all elements.
    Scalar(Scalar),
}

impl<'a> From<&'a Tensor> for Operand<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        Self::Tensor(tensor)
    }
}

impl From<Scalar> for Operand<'_> {
    fn from(scalar: Scalar) -> Self {
        Self::Scalar(scalar)
    }
}

impl<'a> Operand<'a> {
    pub(crate) fn tensor(self) -> Option<&'a Tensor> {
        match self {
            Self::Tensor(tensor) => Some(tensor),
            Self::Scalar(_) => None,
        }
    }
}
