//! Which dtype a result has: torch's promotion.
//!
//! Operands count in three ranks: tensors with dimensions, tensors without, numbers. A lower rank changes the result only by being
//! of a higher category (bool < integer < real < complex), so that `x * 2.0` of `f16` stays `f16`.

use farcall_device::DType;

use crate::{OpError, Operand, Scalar};

/// The dtype that holds elements of both; `None` where torch has no rule: 8-bit floats, and `u16`, `u32`, `u64` with anything
/// but reals.
#[must_use]
pub fn promote(first: DType, second: DType) -> Option<DType> {
    use DType::{BF16, Bool, C64, C128, F8E4M3, F8E5M2, F16, F32, F64, I8, I16, U8, U16, U32, U64};
    if first == second {
        return Some(first);
    }
    if [first, second].iter().any(|dtype| matches!(dtype, F8E4M3 | F8E5M2)) {
        return None;
    }
    // torch has them beside reals alone.
    let is_late = |dtype| matches!(dtype, U16 | U32 | U64);
    if is_late(first) && !second.is_float() || is_late(second) && !first.is_float() {
        return None;
    }
    // From here on the order of a pair does not matter: the higher category first.
    let (high, low) = if category(first) >= category(second) { (first, second) } else { (second, first) };
    Some(match (high, low) {
        (C128, _) | (_, C128) => C128,
        (C64, F64) => C128,
        (C64, _) => C64,
        (F64, _) | (_, F64) => F64,
        (F32, _) | (_, F32) => F32,
        (F16, BF16) | (BF16, F16) => F32,
        (F16 | BF16, _) => high,
        (_, Bool) => high,
        (U8, I8) | (I8, U8) => I16,
        // Signed ones by width; `u8` fits into all wider.
        _ => {
            if high.size_bytes() >= low.size_bytes() {
                high
            } else {
                low
            }
        }
    })
}

/// bool, integers, reals, complex numbers: from low to high.
fn category(dtype: DType) -> u8 {
    match dtype {
        DType::Bool => 0,
        dtype if dtype.is_integer() => 1,
        dtype if dtype.is_complex() => 3,
        _ => 2,
    }
}

/// The dtype of an operator's result on these operands.
pub(crate) fn result_type(op: &'static str, operands: &[Operand<'_>]) -> Result<DType, OpError> {
    let refused = || OpError::DTypes {
        op,
        dtypes: operands.iter().filter_map(|operand| operand.tensor()).map(|tensor| tensor.dtype()).collect(),
        remedy: "they have no common dtype; cast one of them first",
    };
    // Tensors with dimensions, tensors without, numbers.
    let mut ranks: [Option<DType>; 3] = [None; 3];
    for operand in operands {
        let (rank, dtype) = match operand {
            Operand::Tensor(tensor) => (usize::from(tensor.rank() == 0), tensor.dtype()),
            Operand::Scalar(Scalar::Bool(_)) => (2, DType::Bool),
            Operand::Scalar(Scalar::Int(_)) => (2, DType::I64),
            Operand::Scalar(Scalar::Float(_)) => (2, DType::F32),
        };
        let joined = match ranks[rank] {
            Some(other) => promote(other, dtype).ok_or_else(refused)?,
            None => dtype,
        };
        ranks[rank] = Some(joined);
    }
    let [dimensioned, single, number] = ranks;
    let lower = combined(single, number).ok_or_else(refused)?;
    combined(dimensioned, lower).ok_or_else(refused)?.ok_or_else(refused)
}

/// What a higher rank becomes beside a lower one; the outer `None` is a pair without a common dtype.
fn combined(higher: Option<DType>, lower: Option<DType>) -> Option<Option<DType>> {
    let (Some(high), Some(low)) = (higher, lower) else { return Some(higher.or(lower)) };
    if matches!(high, DType::F8E4M3 | DType::F8E5M2) && low.is_complex() {
        return None;
    }
    if high.is_float() && low.is_complex() {
        return Some(Some(if high == DType::F64 { DType::C128 } else { DType::C64 }));
    }
    if low.is_complex() && !high.is_complex() {
        return Some(Some(low));
    }
    if category(low) > category(high) { promote(high, low).map(Some) } else { Some(Some(high)) }
}

/// The dtype in which elements of `dtype` are computed with; `None` for those that only store and cast.
///
/// Half precision is computed in single and rounded once; `bool` as numbers 0 and 1.
pub(crate) fn compute_dtype(dtype: DType) -> Option<DType> {
    match dtype {
        DType::Bool => Some(DType::U8),
        DType::F16 | DType::BF16 => Some(DType::F32),
        DType::F32 | DType::F64 => Some(dtype),
        dtype if dtype.is_integer() => Some(dtype),
        _ => None,
    }
}

/// The dtype of an operator whose result is real whatever it is given: `f32` for integers.
pub(crate) fn real(dtype: DType) -> DType {
    if dtype.is_integer() || dtype == DType::Bool { DType::F32 } else { dtype }
}
