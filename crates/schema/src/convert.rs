//! Rust values into [`Value`]s and back.
//!
//! `Value: From<T>` for what every `T` of a type can become; [`FromValue`] for the way back, which can fail: it says where in the
//! value, and names both types.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::hash::{BuildHasher, Hash};

use farcall_device::{DType, Device, Tensor};

use crate::{Ref, Value};

/// A type that a [`Value`] may hold one of.
pub trait FromValue: Sized {
    /// Takes it out of `value`.
    ///
    /// # Errors
    /// [`ValueError`] if the value is of another type, or out of this one's range.
    fn from_value(value: Value) -> Result<Self, ValueError>;

    /// What a field of this type is when it is missing: an error, unless `None` is of this type.
    ///
    /// # Errors
    /// [`ValueError`] for every type but options.
    fn missing() -> Result<Self, ValueError> {
        Err(ValueError { path: String::new(), wanted: std::any::type_name::<Self>(), why: Why::Missing })
    }
}

/// A value is not of the type that was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ValueError {
    /// Where in the value, such as `.layers[2].weight`; empty for the value itself.
    path: String,
    wanted: &'static str,
    why: Why,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Why {
    Missing,
    /// A value of this type.
    Type(String),
    /// The right type, and this text of it.
    Value(String),
    /// A name that is none of the type's.
    Unknown {
        what: &'static str,
        name: String,
        known: String,
    },
}

impl std::error::Error for ValueError {}

impl fmt::Display for ValueError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = if self.path.is_empty() { "the value" } else { &self.path };
        let wanted = short(self.wanted);
        match &self.why {
            Why::Missing => write!(f, "{path} is missing; its type is {wanted}"),
            Why::Type(found) => write!(f, "{path} is of type {found}, not {wanted}"),
            Why::Unknown { what, name, known } => {
                write!(f, "{path} has `{name}`, which is not {what} of {wanted}; there are {known}")
            }
            Why::Value(found) => write!(f, "{path} is {found}, which is no {wanted}"),
        }
    }
}

/// A type's name without the paths of modules: `Vec<Tensor>`.
fn short(type_name: &str) -> String {
    let mut text = String::new();
    for part in type_name.split_inclusive(|c: char| !c.is_alphanumeric() && c != '_' && c != ':') {
        text.push_str(part.rsplit("::").next().unwrap_or(part));
    }
    text
}

impl ValueError {
    /// `value` is of another type than `T`.
    #[must_use]
    pub fn wrong_type<T>(value: &Value) -> Self {
        let why = Why::Type(value.type_name());
        Self { path: String::new(), wanted: std::any::type_name::<T>(), why }
    }

    /// The value is of the right type, but no `T` is `found`.
    #[must_use]
    pub fn wrong_value<T>(found: impl fmt::Display) -> Self {
        Self { path: String::new(), wanted: std::any::type_name::<T>(), why: Why::Value(found.to_string()) }
    }

    /// `name` is not `what` of `T`, such as "a field"; `known` are.
    #[must_use]
    pub fn unknown<T>(what: &'static str, name: &str, known: &[&str]) -> Self {
        let why = Why::Unknown { what, name: name.to_owned(), known: known.join(", ") };
        Self { path: String::new(), wanted: std::any::type_name::<T>(), why }
    }

    /// The same error, of a `T` that was wanted.
    #[must_use]
    pub fn of<T>(self) -> Self {
        Self { wanted: std::any::type_name::<T>(), ..self }
    }

    /// The error is in the field of that name.
    #[must_use]
    pub fn in_field(self, name: &str) -> Self {
        Self { path: format!(".{name}{}", self.path), ..self }
    }

    /// The error is in the element of that index.
    #[must_use]
    pub fn at(self, index: usize) -> Self {
        Self { path: format!("[{index}]{}", self.path), ..self }
    }
}

impl Value {
    /// The `T` that this value holds.
    ///
    /// # Errors
    /// [`ValueError`] says where in the value, and names both types.
    pub fn to<T: FromValue>(self) -> Result<T, ValueError> {
        T::from_value(self)
    }
}

impl FromValue for Value {
    fn from_value(value: Value) -> Result<Self, ValueError> {
        Ok(value)
    }

    fn missing() -> Result<Self, ValueError> {
        Ok(Self::None)
    }
}

/// Types of one variant, without a loss in either direction.
macro_rules! exact {
    ($($rust:ty => $variant:ident),* $(,)?) => {$(
        impl From<$rust> for Value {
            fn from(value: $rust) -> Self {
                Self::$variant(value)
            }
        }

        impl FromValue for $rust {
            fn from_value(value: Value) -> Result<Self, ValueError> {
                match value {
                    Value::$variant(value) => Ok(value),
                    other => Err(ValueError::wrong_type::<Self>(&other)),
                }
            }
        }
    )*};
}
exact!(bool => Bool, i64 => Int, String => Str, Vec<u8> => Bytes, Tensor => Tensor, Ref => Ref);

/// Whole numbers that are narrower than an `i64`.
macro_rules! narrow {
    ($($rust:ty),*) => {$(
        impl From<$rust> for Value {
            fn from(value: $rust) -> Self {
                Self::Int(value.into())
            }
        }
    )*};
}
narrow!(i8, i16, i32, u16, u32);

/// Whole numbers that an `i64` may be too large or too small for. No `u8`: a list of them is bytes.
macro_rules! checked {
    ($($rust:ty),*) => {$(
        impl FromValue for $rust {
            fn from_value(value: Value) -> Result<Self, ValueError> {
                let number = i64::from_value(value).map_err(|error| ValueError { wanted: stringify!($rust), ..error })?;
                Self::try_from(number).map_err(|_| ValueError::wrong_value::<Self>(number))
            }
        }
    )*};
}
checked!(i8, i16, i32, u16, u32, u64, usize);

/// Up to here, every whole number is an `f64`.
const EXACT_INT_MAX: u64 = 1 << 53;

/// The float that is exactly `number`, if there is one for it and all smaller ones.
pub(crate) fn exact_float(number: i64) -> Option<f64> {
    (number.unsigned_abs() <= EXACT_INT_MAX).then_some(number as f64)
}

impl From<f64> for Value {
    fn from(value: f64) -> Self {
        Self::Float(value)
    }
}

impl From<f32> for Value {
    fn from(value: f32) -> Self {
        Self::Float(value.into())
    }
}

impl FromValue for f64 {
    /// A float, or an int that is one exactly.
    fn from_value(value: Value) -> Result<Self, ValueError> {
        match value {
            Value::Float(value) => Ok(value),
            Value::Int(number) => exact_float(number).ok_or_else(|| ValueError::wrong_value::<Self>(number)),
            other => Err(ValueError::wrong_type::<Self>(&other)),
        }
    }
}

impl FromValue for f32 {
    /// The nearest `f32`.
    fn from_value(value: Value) -> Result<Self, ValueError> {
        f64::from_value(value).map(|value| value as Self).map_err(|error| ValueError { wanted: "f32", ..error })
    }
}

/// What travels as a text.
macro_rules! texts {
    ($($rust:ty),*) => {$(
        impl From<$rust> for Value {
            fn from(value: $rust) -> Self {
                Self::Str(value.to_string())
            }
        }

        impl FromValue for $rust {
            fn from_value(value: Value) -> Result<Self, ValueError> {
                match &value {
                    Value::Str(text) => text.parse().map_err(|_| ValueError::wrong_value::<Self>(format_args!("{text:?}"))),
                    other => Err(ValueError::wrong_type::<Self>(other)),
                }
            }
        }
    )*};
}
texts!(DType, Device);

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Str(text.to_owned())
    }
}

impl From<&String> for Value {
    fn from(text: &String) -> Self {
        Self::Str(text.clone())
    }
}

impl From<&Tensor> for Value {
    fn from(tensor: &Tensor) -> Self {
        Self::Tensor(tensor.clone())
    }
}

impl From<&Self> for Value {
    fn from(value: &Self) -> Self {
        value.clone()
    }
}

impl From<()> for Value {
    fn from((): ()) -> Self {
        Self::None
    }
}

impl FromValue for () {
    fn from_value(value: Value) -> Result<Self, ValueError> {
        match value {
            Value::None => Ok(()),
            other => Err(ValueError::wrong_type::<Self>(&other)),
        }
    }
}

impl<T: Into<Self>> From<Option<T>> for Value {
    fn from(value: Option<T>) -> Self {
        value.map_or(Self::None, Into::into)
    }
}

impl<T: FromValue> FromValue for Option<T> {
    fn from_value(value: Value) -> Result<Self, ValueError> {
        match value {
            Value::None => Ok(None),
            value => T::from_value(value).map(Some),
        }
    }

    fn missing() -> Result<Self, ValueError> {
        Ok(None)
    }
}

impl<T: Into<Self>> From<Box<T>> for Value {
    fn from(value: Box<T>) -> Self {
        (*value).into()
    }
}

impl<T: FromValue> FromValue for Box<T> {
    fn from_value(value: Value) -> Result<Self, ValueError> {
        T::from_value(value).map(Self::new)
    }

    fn missing() -> Result<Self, ValueError> {
        T::missing().map(Self::new)
    }
}

impl<T: Into<Self>> From<Vec<T>> for Value {
    fn from(values: Vec<T>) -> Self {
        Self::List(values.into_iter().map(Into::into).collect())
    }
}

impl<T: Into<Self> + Clone> From<&[T]> for Value {
    fn from(values: &[T]) -> Self {
        values.to_vec().into()
    }
}

impl<T: Into<Self>, const N: usize> From<[T; N]> for Value {
    fn from(values: [T; N]) -> Self {
        Self::List(values.into_iter().map(Into::into).collect())
    }
}

impl<T: FromValue> FromValue for Vec<T> {
    /// A list, or a tuple.
    fn from_value(value: Value) -> Result<Self, ValueError> {
        match value {
            Value::List(values) | Value::Tuple(values) => {
                let values = values.into_iter().enumerate();
                values.map(|(index, value)| T::from_value(value).map_err(|error| error.at(index))).collect()
            }
            other => Err(ValueError::wrong_type::<Self>(&other)),
        }
    }
}

/// Maps are dicts. The order of a [`HashMap`]'s entries is any.
macro_rules! maps {
    ($([$map:ident $($bound:path)* $(, $hasher:ident)?])*) => {$(
        impl<K: Into<Self>, T: Into<Self> $(, $hasher)?> From<$map<K, T $(, $hasher)?>> for Value {
            fn from(map: $map<K, T $(, $hasher)?>) -> Self {
                Self::Dict(map.into_iter().map(|(key, value)| (key.into(), value.into())).collect())
            }
        }

        impl<K: FromValue $(+ $bound)*, T: FromValue $(, $hasher: BuildHasher + Default)?> FromValue for $map<K, T $(, $hasher)?> {
            fn from_value(value: Value) -> Result<Self, ValueError> {
                let Value::Dict(entries) = value else { return Err(ValueError::wrong_type::<Self>(&value)) };
                let entry = |(index, (key, value))| {
                    let key = K::from_value(key).map_err(|error| error.at(index))?;
                    Ok((key, T::from_value(value).map_err(|error| error.at(index))?))
                };
                entries.into_iter().enumerate().map(entry).collect()
            }
        }
    )*};
}
maps!([BTreeMap Ord] [HashMap Eq Hash, S]);

macro_rules! tuples {
    ($($len:literal: $($name:ident $index:tt),+;)*) => {$(
        impl<$($name: Into<Self>),+> From<($($name,)+)> for Value {
            fn from(values: ($($name,)+)) -> Self {
                Self::Tuple(vec![$(values.$index.into()),+])
            }
        }

        impl<$($name: FromValue),+> FromValue for ($($name,)+) {
            fn from_value(value: Value) -> Result<Self, ValueError> {
                match value {
                    Value::Tuple(values) | Value::List(values) if values.len() == $len => {
                        let mut values = values.into_iter().map(Some).collect::<Vec<_>>();
                        Ok(($($name::from_value(values[$index].take().unwrap_or_default())
                            .map_err(|error| error.at($index))?,)+))
                    }
                    other => Err(ValueError::wrong_type::<Self>(&other)),
                }
            }
        }
    )*};
}
tuples! {
    1: A 0;
    2: A 0, B 1;
    3: A 0, B 1, C 2;
    4: A 0, B 1, C 2, D 3;
    5: A 0, B 1, C 2, D 3, E 4;
    6: A 0, B 1, C 2, D 3, E 4, F 5;
}

/// `TryFrom`, for the types that the standard library leaves free.
macro_rules! try_from {
    ($($rust:ty $(where $name:ident)?),* $(,)?) => {$(
        impl$(<$name: FromValue>)? TryFrom<Value> for $rust {
            type Error = ValueError;

            fn try_from(value: Value) -> Result<Self, ValueError> {
                Self::from_value(value)
            }
        }
    )*};
}
try_from!(bool, i64, i32, u32, u64, usize, f64, f32, String, Tensor, DType, Device, Ref, (), Vec<T> where T);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_in_comes_out() {
        type All =
            (bool, (i64, u32, f64, f32), String, Vec<Option<i32>>, BTreeMap<String, Vec<u8>>, Box<(Device, DType)>);
        let all: All = (
            true,
            (i64::MIN, u32::MAX, -0.0, 0.1),
            "é".to_owned(),
            vec![Some(-1), None],
            BTreeMap::from([("k".to_owned(), vec![0, 255])]),
            Box::new((Device::Cuda(1), DType::BF16)),
        );
        let value = Value::from(all.clone());
        assert_eq!(value.field("k").map(Value::type_name), None);
        assert_eq!(value.to::<All>(), Ok(all));
        assert_eq!(
            Value::from(HashMap::from([(1, "a".to_owned())])).to(),
            Ok(HashMap::from([(1_i64, "a".to_owned())]))
        );
        assert_eq!(Value::Int(1 << 53).to::<f64>(), Ok(9_007_199_254_740_992.0), "an int that is a float");
        assert_eq!(f64::try_from(Value::from(0.5)), Ok(0.5));
        assert_eq!(Vec::<i64>::try_from(Value::from([1, 2])), Ok(vec![1, 2]));
    }

    #[test]
    fn errors_say_where_and_name_both_types() {
        #[track_caller]
        fn fails<T: FromValue + fmt::Debug>(value: impl Into<Value>, expected: &str) {
            assert_eq!(value.into().to::<T>().expect_err("another type").to_string(), expected);
        }
        fails::<i64>("a", "the value is of type str, not i64");
        fails::<f64>(i64::MAX, "the value is 9223372036854775807, which is no f64");
        fails::<u32>(-1, "the value is -1, which is no u32");
        fails::<u32>(0.5, "the value is of type float, not u32");
        fails::<Vec<(i64, bool)>>(vec![(1, 2)], "[0][1] is of type int, not bool");
        fails::<(i64, Vec<String>)>([1, 2, 3], "the value is of type int[], not (i64, Vec<String>)");
        fails::<BTreeMap<String, i64>>(BTreeMap::from([("a", ())]), "[0] is of type None, not i64");
        fails::<DType>("f31", "the value is \"f31\", which is no DType");
        fails::<Option<Tensor>>(1, "the value is of type int, not Tensor");
    }
}
