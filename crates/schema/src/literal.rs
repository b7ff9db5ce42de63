//! Default values as signatures write them: `1.`, `[0, 1]`, `"none"`, `Mean`.

use std::fmt;

use crate::types::separated;
use crate::{Type, Value};

/// A default value, as it is written.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Literal {
    /// `None`.
    None,
    /// `True` or `False`.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// A number with a point or an exponent, `inf` or `nan`.
    Float(f64),
    /// A text in quotes.
    Str(String),
    /// `[…]`.
    List(Vec<Self>),
    /// A word, such as `Mean` or `contiguous_format`.
    Name(String),
}

/// What words mean as an int: how losses are reduced.
const REDUCTIONS: [(&str, i64); 2] = [("Mean", 1), ("Sum", 2)];

impl Literal {
    /// The value it stands for where an argument of type `of` is expected.
    #[must_use]
    pub fn to_value(&self, of: &Type) -> Value {
        match self {
            Self::None => Value::None,
            Self::Bool(value) => Value::Bool(*value),
            Self::Int(value) => Value::Int(*value),
            Self::Float(value) => Value::Float(*value),
            Self::Str(text) => Value::Str(text.clone()),
            Self::List(elements) => {
                let of = match of.bare() {
                    Type::List(of, _) => of,
                    other => other,
                };
                Value::List(elements.iter().map(|element| element.to_value(of)).collect())
            }
            Self::Name(name) => match REDUCTIONS.iter().find(|(known, _)| known == name) {
                Some((_, code)) if matches!(of.bare(), Type::Int | Type::SymInt) => Value::Int(*code),
                _ => Value::Str(name.clone()),
            },
        }
    }
}

impl fmt::Display for Literal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("None"),
            Self::Bool(true) => f.write_str("True"),
            Self::Bool(false) => f.write_str("False"),
            Self::Int(value) => write!(f, "{value}"),
            Self::Float(value) => f.write_str(&float(*value)),
            Self::Str(text) => quoted(f, text),
            Self::List(elements) => {
                f.write_str("[")?;
                separated(f, elements, ", ")?;
                f.write_str("]")
            }
            Self::Name(name) => f.write_str(name),
        }
    }
}

/// Digits that tell any two `f64` apart.
const DIGITS: i32 = 17;

/// As C prints `%.17g`, with a point where it would look like a whole number: how torch prints its defaults.
fn float(value: f64) -> String {
    if !value.is_finite() {
        return if value.is_nan() { "nan".to_owned() } else { (if value > 0.0 { "inf" } else { "-inf" }).to_owned() };
    }
    let scientific = format!("{value:.*e}", DIGITS as usize - 1);
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or_default();
    if (-4..DIGITS).contains(&exponent) {
        let fixed = format!("{value:.*}", (DIGITS - 1 - exponent) as usize);
        return match fixed.contains('.') {
            // "10.000" is "10.", "0.500" is "0.5".
            true => fixed.trim_end_matches('0').to_owned(),
            false => fixed + ".",
        };
    }
    let digits = if digits.contains('.') { digits.trim_end_matches('0').trim_end_matches('.') } else { digits };
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

/// Escapes, and the letter that stands for each behind a backslash.
pub(crate) const ESCAPES: [(u8, u8); 10] = [
    (b'\\', b'\\'),
    (b'\'', b'\''),
    (b'"', b'"'),
    (0x07, b'a'),
    (0x08, b'b'),
    (0x0c, b'f'),
    (b'\n', b'n'),
    (b'\r', b'r'),
    (b'\t', b't'),
    (0x0b, b'v'),
];

fn quoted(f: &mut fmt::Formatter<'_>, text: &str) -> fmt::Result {
    f.write_str("\"")?;
    for byte in text.bytes() {
        match ESCAPES.iter().find(|(raw, _)| *raw == byte) {
            Some((_, letter)) => write!(f, "\\{}", char::from(*letter))?,
            None if (0x20..0x7f).contains(&byte) => write!(f, "{}", char::from(byte))?,
            None => write!(f, "\\{byte:03o}")?,
        }
    }
    f.write_str("\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Texts that C's `printf("%.17g")` gives, by its documentation and by torch's signatures.
    #[test]
    fn floats_are_printed_as_torch_prints_them() {
        for (value, expected) in [
            (1.0, "1."),
            (0.0, "0."),
            (-0.0, "-0."),
            (10.0, "10."),
            (0.5, "0.5"),
            (-0.125, "-0.125"),
            (1.0 / 3.0, "0.33333333333333331"),
            (0.16, "0.16"),
            (1e-4, "0.0001"),
            (1e-5, "1.0000000000000001e-05"),
            (1e-6, "9.9999999999999995e-07"),
            (1e-8, "1e-08"),
            (1e16, "10000000000000000."),
            (1e17, "1e+17"),
            (f64::MAX, "1.7976931348623157e+308"),
            (5e-324, "4.9406564584124654e-324"),
            (f64::INFINITY, "inf"),
            (f64::NEG_INFINITY, "-inf"),
        ] {
            assert_eq!(float(value), expected);
            assert_eq!(expected.parse::<f64>(), Ok(value), "{expected}");
        }
    }
}
