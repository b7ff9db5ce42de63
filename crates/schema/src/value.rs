//! The tree of values that builtin calls and scripts exchange, and how it travels.
//!
//! Invariant V1: a value decodes to what was encoded: the bits of a float, the sign of a zero, both ends of `i64`, the order of a
//! dict's entries, a tensor's dtype, shape and bytes.

use std::fmt;

use farcall_device::Tensor;
use serde::{Deserialize, Serialize};

use crate::types::separated;

/// A value whose type is known only when it is there.
///
/// Dtypes, devices and memory formats are texts: `"f32"`, `"cuda:1"`, `"contiguous_format"`. It travels as every serde type
/// does, its tensors beside it; the codec's depth limit allows lists in lists 64 deep.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Value {
    /// Nothing.
    #[default]
    None,
    /// True or false.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// A number.
    Float(f64),
    /// A text.
    Str(String),
    /// Bytes.
    Bytes(#[serde(with = "bytes")] Vec<u8>),
    /// A tensor.
    Tensor(Tensor),
    /// Values, most often of one type.
    List(Vec<Self>),
    /// Values of a type each.
    Tuple(Vec<Self>),
    /// Keys and values, in the order in which they were added.
    Dict(Vec<(Self, Self)>),
    /// The name of a value that stays on its worker.
    Ref(Ref),
}

/// Names a value that stays on a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Ref {
    /// The rank of the worker that holds the value.
    pub owner: u32,
    /// Which of its values.
    pub id: u64,
}

impl Value {
    /// The name of the value's type: "int", "Tensor", "(int, str)", "float[]".
    #[must_use]
    pub fn type_name(&self) -> String {
        TypeName(self, TYPE_DEPTH_MAX).to_string()
    }

    /// The value of a text key, in a dict.
    #[must_use]
    pub fn field(&self, name: &str) -> Option<&Self> {
        let Self::Dict(entries) = self else { return None };
        entries.iter().find(|(key, _)| matches!(key, Self::Str(key) if key == name)).map(|(_, value)| value)
    }
}

/// Types nested deeper are "…" in names.
const TYPE_DEPTH_MAX: usize = 4;
/// A tuple's types beyond these are "…" in names.
const TYPE_ITEMS_MAX: usize = 8;

/// So many elements of a list decide what it is a list of, in names.
const LOOKED_AT_MAX: usize = 64;

/// The name of a value's type, so many levels deep.
struct TypeName<'a>(&'a Value, usize);

impl fmt::Display for TypeName<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(left) = self.1.checked_sub(1) else { return f.write_str("…") };
        let of_all = |values: &mut dyn Iterator<Item = &Value>| {
            let mut names = values.take(LOOKED_AT_MAX).map(|value| TypeName(value, left).to_string());
            let first = names.next().unwrap_or_default();
            if names.all(|name| name == first) { first } else { "Any".to_owned() }
        };
        let word = match self.0 {
            Value::None => "None",
            Value::Bool(_) => "bool",
            Value::Int(_) => "int",
            Value::Float(_) => "float",
            Value::Str(_) => "str",
            Value::Bytes(_) => "bytes",
            Value::Tensor(_) => "Tensor",
            Value::Ref(_) => "RRef",
            Value::List(values) => {
                return write!(f, "{}[]", of_all(&mut values.iter()));
            }
            Value::Tuple(values) => {
                f.write_str("(")?;
                separated(f, values.iter().take(TYPE_ITEMS_MAX).map(|value| TypeName(value, left)), ", ")?;
                if values.len() > TYPE_ITEMS_MAX { ", …)" } else { ")" }
            }
            Value::Dict(entries) => {
                let key = of_all(&mut entries.iter().map(|(key, _)| key));
                let value = of_all(&mut entries.iter().map(|(_, value)| value));
                return write!(f, "Dict({key}, {value})");
            }
        };
        f.write_str(word)
    }
}

/// Bytes as bytes, not as a sequence of numbers: the same on the wire, and copied as a whole.
mod bytes {
    use std::fmt;

    use serde::de::{Error, Visitor};
    use serde::{Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(bytes)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        struct Bytes;

        impl Visitor<'_> for Bytes {
            type Value = Vec<u8>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("bytes")
            }

            fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
                Ok(bytes.to_vec())
            }

            fn visit_byte_buf<E: Error>(self, bytes: Vec<u8>) -> Result<Vec<u8>, E> {
                Ok(bytes)
            }
        }

        deserializer.deserialize_byte_buf(Bytes)
    }
}

#[cfg(test)]
mod tests {
    use farcall_device::CodecError;
    use farcall_device::codec::{decode, encode};

    use super::*;

    fn again(value: &Value) -> Value {
        let encoded = encode(value).expect("encodes");
        decode(&encoded.metadata, &encoded.tensors).expect("decodes")
    }

    /// V1: as its debug text, in which floats differ by their bits' values and signs.
    #[test]
    fn values_travel_exactly() {
        let numbers = [0, 1, -1, 63, 64, i64::MAX, i64::MIN].map(Value::Int);
        let floats = [0.0, -0.0, 0.1, f64::MAX, f64::MIN_POSITIVE / 2.0, f64::INFINITY, f64::NEG_INFINITY];
        let value = Value::Dict(vec![
            (Value::Str("numbers, λ".to_owned()), Value::List(numbers.to_vec())),
            (Value::Int(3), Value::Tuple(floats.map(Value::Float).to_vec())),
            (Value::Bool(true), Value::List(vec![Value::None, Value::Bytes((0..=255).collect()), Value::List(vec![])])),
            (Value::Str(String::new()), Value::Ref(Ref { owner: u32::MAX, id: u64::MAX })),
        ]);
        assert_eq!(format!("{:?}", again(&value)), format!("{value:?}"));
        let Value::Float(nan) = again(&Value::Float(f64::from_bits(0xfff8_0000_dead_beef))) else { panic!("a float") };
        assert_eq!(nan.to_bits(), 0xfff8_0000_dead_beef, "a NaN's payload");
    }

    #[test]
    fn tensors_travel_beside_the_bytes() {
        let tensor = Tensor::from_slice(&[1.5_f32, -2.0], &[2, 1]).expect("a tensor");
        let value = Value::List(vec![Value::Tensor(tensor.clone()), Value::Int(1), Value::Tensor(tensor)]);
        let encoded = encode(&value).expect("encodes");
        assert_eq!(encoded.tensors.len(), 2);
        let Value::List(values) = again(&value) else { panic!("a list") };
        let [Value::Tensor(first), Value::Int(1), Value::Tensor(_)] = values.as_slice() else { panic!("{values:?}") };
        assert_eq!((first.to_vec::<f32>().expect("ready"), first.shape()), (vec![1.5, -2.0], &[2, 1][..]));
        assert!(decode::<Value>(&encoded.metadata, &[]).is_err(), "a tensor that did not come along");
    }

    #[test]
    fn depth_is_limited_at_both_ends() {
        let deep = |levels: usize| (0..levels).fold(Value::None, |value, _| Value::List(vec![value]));
        let deepest = (1..=128).take_while(|levels| encode(&deep(*levels)).is_ok()).count();
        assert_eq!(deepest, 64);
        assert_eq!(format!("{:?}", again(&deep(deepest))), format!("{:?}", deep(deepest)));
        assert_eq!(encode(&deep(deepest + 1)).map(|_| ()), Err(CodecError::TooDeep));
        // A list of one, a thousand times: a peer's bytes.
        let bytes = [7, 1].repeat(1000);
        assert!(matches!(decode::<Value>(&bytes, &[]), Err(CodecError::TooDeep)));
    }

    #[test]
    fn types_have_names() {
        let int = Value::Int(1);
        for (value, expected) in [
            (Value::List(vec![]), "[]"),
            (Value::List(vec![int.clone(), Value::Int(2)]), "int[]"),
            (Value::List(vec![int.clone(), Value::None]), "Any[]"),
            (Value::Tuple(vec![int.clone(), Value::List(vec![int.clone()])]), "(int, int[])"),
            (Value::Dict(vec![(Value::Str("a".to_owned()), int.clone())]), "Dict(str, int)"),
            (Value::Tuple(vec![int; 9]), "(int, int, int, int, int, int, int, int, …)"),
            ((0..9).fold(Value::None, |value, _| Value::Tuple(vec![value])), "((((…))))"),
        ] {
            assert_eq!(value.type_name(), expected);
        }
    }
}
