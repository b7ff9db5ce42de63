//! Element types: their codes on the wire, their sizes, and the Rust types that hold them.
//!
//! Codes are fixed for ever: a peer of another version reads them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The type of a tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
#[non_exhaustive]
pub enum DType {
    /// One byte, 0 or 1.
    Bool = 0,
    /// Unsigned, 8 bits.
    U8 = 1,
    /// Signed, 8 bits.
    I8 = 2,
    /// Unsigned, 16 bits.
    U16 = 3,
    /// Signed, 16 bits.
    I16 = 4,
    /// Unsigned, 32 bits.
    U32 = 5,
    /// Signed, 32 bits.
    I32 = 6,
    /// Unsigned, 64 bits.
    U64 = 7,
    /// Signed, 64 bits.
    I64 = 8,
    /// IEEE 754 half precision.
    F16 = 9,
    /// bfloat16: the upper half of an `f32`.
    BF16 = 10,
    /// IEEE 754 single precision.
    F32 = 11,
    /// IEEE 754 double precision.
    F64 = 12,
    /// 8-bit float, 4 exponent and 3 mantissa bits (OCP "E4M3", no infinities).
    F8E4M3 = 13,
    /// 8-bit float, 5 exponent and 2 mantissa bits (OCP "E5M2").
    F8E5M2 = 14,
    /// Complex number of two `f32`: 64 bits in all.
    C64 = 15,
    /// Complex number of two `f64`: 128 bits in all.
    C128 = 16,
}

impl DType {
    /// Every dtype, at the index of its code.
    pub const ALL: [Self; 17] = [
        Self::Bool,
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::U64,
        Self::I64,
        Self::F16,
        Self::BF16,
        Self::F32,
        Self::F64,
        Self::F8E4M3,
        Self::F8E5M2,
        Self::C64,
        Self::C128,
    ];

    /// The dtype of a wire code; `None` for one that this version does not know.
    #[must_use]
    pub const fn from_code(code: u8) -> Option<Self> {
        if (code as usize) < Self::ALL.len() { Some(Self::ALL[code as usize]) } else { None }
    }

    /// The code on the wire.
    #[must_use]
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// Bytes of one element.
    #[must_use]
    pub const fn size_bytes(self) -> usize {
        match self {
            Self::Bool | Self::U8 | Self::I8 | Self::F8E4M3 | Self::F8E5M2 => 1,
            Self::U16 | Self::I16 | Self::F16 | Self::BF16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 | Self::C64 => 8,
            Self::C128 => 16,
        }
    }

    /// The name in texts and schemas, such as "f32".
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bool => "bool",
            Self::U8 => "u8",
            Self::I8 => "i8",
            Self::U16 => "u16",
            Self::I16 => "i16",
            Self::U32 => "u32",
            Self::I32 => "i32",
            Self::U64 => "u64",
            Self::I64 => "i64",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::F32 => "f32",
            Self::F64 => "f64",
            Self::F8E4M3 => "f8e4m3",
            Self::F8E5M2 => "f8e5m2",
            Self::C64 => "c64",
            Self::C128 => "c128",
        }
    }

    /// Whether elements are real floating point numbers of any width.
    #[must_use]
    pub const fn is_float(self) -> bool {
        matches!(self, Self::F16 | Self::BF16 | Self::F32 | Self::F64 | Self::F8E4M3 | Self::F8E5M2)
    }

    /// Whether elements are integers; `Bool` is none.
    #[must_use]
    pub const fn is_integer(self) -> bool {
        matches!(self, Self::U8 | Self::U16 | Self::U32 | Self::U64) || self.is_signed_integer()
    }

    /// Whether elements are integers with a sign.
    #[must_use]
    pub const fn is_signed_integer(self) -> bool {
        matches!(self, Self::I8 | Self::I16 | Self::I32 | Self::I64)
    }

    /// Whether elements are complex numbers.
    #[must_use]
    pub const fn is_complex(self) -> bool {
        matches!(self, Self::C64 | Self::C128)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The text names no dtype.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is no dtype: write one of bool, u8, i8, u16, i16, u32, i32, u64, i64, f16, bf16, f32, f64, f8e4m3, f8e5m2, c64, c128"
)]
pub struct ParseDTypeError {
    /// The text given.
    pub text: String,
}

impl FromStr for DType {
    type Err = ParseDTypeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|dtype| dtype.name() == text)
            .ok_or_else(|| ParseDTypeError { text: text.to_owned() })
    }
}

impl Serialize for DType {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u8(self.code())
    }
}

impl<'de> Deserialize<'de> for DType {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let code = u8::deserialize(deserializer)?;
        Self::from_code(code).ok_or_else(|| serde::de::Error::custom(format_args!("unknown dtype code {code}")))
    }
}

/// A Rust type that is the element of a [`DType`].
///
/// The bytes of a value are the element's bytes in the machine's order, which is little-endian on every supported target.
pub trait Element: bytemuck::CheckedBitPattern + bytemuck::NoUninit + Send + Sync {
    /// The dtype whose elements this type holds.
    const DTYPE: DType;
}

macro_rules! elements {
    ($($rust:ty => $dtype:ident),* $(,)?) => {$(
        impl Element for $rust {
            const DTYPE: DType = DType::$dtype;
        }
        const _: () = assert!(size_of::<$rust>() == DType::$dtype.size_bytes());
    )*};
}

elements! {
    bool => Bool, u8 => U8, i8 => I8, u16 => U16, i16 => I16, u32 => U32, i32 => I32, u64 => U64, i64 => I64,
    half::f16 => F16, half::bf16 => BF16, f32 => F32, f64 => F64, F8E4M3 => F8E4M3, F8E5M2 => F8E5M2, C64 => C64, C128 => C128,
}

/// The bits of an 8-bit float of kind E4M3. Stored and moved, not computed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
pub struct F8E4M3(pub u8);

/// The bits of an 8-bit float of kind E5M2. Stored and moved, not computed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
pub struct F8E5M2(pub u8);

/// A complex number of two `f32`, 64 bits in all: torch's `complex64`. Named by its whole width, as its dtype is.
#[derive(Debug, Clone, Copy, PartialEq, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct C64 {
    /// The real part.
    pub re: f32,
    /// The imaginary part.
    pub im: f32,
}

/// A complex number of two `f64`, 128 bits in all: torch's `complex128`. Named by its whole width, as its dtype is.
#[derive(Debug, Clone, Copy, PartialEq, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct C128 {
    /// The real part.
    pub re: f64,
    /// The imaginary part.
    pub im: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_sizes_and_names_are_fixed() {
        let table = [
            (0, 1, "bool"),
            (1, 1, "u8"),
            (2, 1, "i8"),
            (3, 2, "u16"),
            (4, 2, "i16"),
            (5, 4, "u32"),
            (6, 4, "i32"),
            (7, 8, "u64"),
            (8, 8, "i64"),
            (9, 2, "f16"),
            (10, 2, "bf16"),
            (11, 4, "f32"),
            (12, 8, "f64"),
            (13, 1, "f8e4m3"),
            (14, 1, "f8e5m2"),
            (15, 8, "c64"),
            (16, 16, "c128"),
        ];
        assert_eq!(table.len(), DType::ALL.len());
        for (code, size_bytes, name) in table {
            let dtype = DType::from_code(code).expect("a known code");
            assert_eq!((dtype.code(), dtype.size_bytes(), dtype.name()), (code, size_bytes, name));
            assert_eq!(name.parse(), Ok(dtype));
        }
        assert_eq!(DType::from_code(17), None);
        assert!("float32".parse::<DType>().is_err());
    }

    #[test]
    fn each_dtype_is_of_one_family() {
        for dtype in DType::ALL {
            let families = [dtype.is_float(), dtype.is_integer(), dtype.is_complex(), dtype == DType::Bool];
            assert_eq!(families.iter().filter(|is| **is).count(), 1, "{dtype}");
        }
        assert!(DType::I8.is_signed_integer() && !DType::U64.is_signed_integer());
    }
}
