//! What `#[derive(farcall::Value)]` writes calls of: the fields of a struct, and the variant of an enum, out of a value.

use crate::{FromValue, Value, ValueError};

/// The fields of a struct, taken one by one; none may be left.
#[derive(Debug)]
pub struct Fields {
    entries: Vec<(String, Value)>,
}

impl Fields {
    /// Those of a `T`.
    ///
    /// # Errors
    /// [`ValueError`] if the value is no dict, or a key is no text.
    pub fn of<T>(value: Value) -> Result<Self, ValueError> {
        let Value::Dict(entries) = value else { return Err(ValueError::wrong_type::<T>(&value)) };
        let entry = |(key, value): (Value, Value)| match key {
            Value::Str(key) => Ok((key, value)),
            other => Err(ValueError::wrong_value::<T>(format_args!("a dict with a key of type {}", other.type_name()))),
        };
        Ok(Self { entries: entries.into_iter().map(entry).collect::<Result<_, _>>()? })
    }

    fn find(&mut self, name: &str) -> Option<Value> {
        let index = self.entries.iter().position(|(key, _)| key == name)?;
        Some(self.entries.remove(index).1)
    }

    /// The field of that name.
    ///
    /// # Errors
    /// [`ValueError`] if it is missing and its type has no `None`, or of another type.
    pub fn take<F: FromValue>(&mut self, name: &str) -> Result<F, ValueError> {
        self.find(name).map_or_else(F::missing, F::from_value).map_err(|error| error.in_field(name))
    }

    /// The same, with a default for one that is missing.
    ///
    /// # Errors
    /// [`ValueError`] if it is of another type.
    pub fn take_or_default<F: FromValue + Default>(&mut self, name: &str) -> Result<F, ValueError> {
        let taken = self.find(name).map_or_else(|| Ok(F::default()), F::from_value);
        taken.map_err(|error| error.in_field(name))
    }

    /// Nothing is left.
    ///
    /// # Errors
    /// [`ValueError`] names a field that is none of `known`, or was there twice.
    pub fn end<T>(self, known: &[&str]) -> Result<(), ValueError> {
        match self.entries.first() {
            None => Ok(()),
            Some((name, _)) => Err(ValueError::unknown::<T>("a field, or there twice,", name, known)),
        }
    }
}

/// The values of a tuple struct, of so many fields.
///
/// # Errors
/// [`ValueError`] if the value is no tuple or list of that length.
pub fn tuple<T, const N: usize>(value: Value) -> Result<[Value; N], ValueError> {
    match value {
        Value::Tuple(values) | Value::List(values) => {
            values.try_into().map_err(|values| ValueError::wrong_type::<T>(&Value::Tuple(values)))
        }
        other => Err(ValueError::wrong_type::<T>(&other)),
    }
}

/// The variant of an enum by its name, and what is in it: a text alone, or a dict of one entry.
///
/// # Errors
/// [`ValueError`] if the value is neither.
pub fn variant<T>(value: Value) -> Result<(String, Option<Value>), ValueError> {
    let wrong = ValueError::wrong_type::<T>(&value);
    match value {
        Value::Str(name) => Ok((name, None)),
        Value::Dict(entries) if entries.len() == 1 => match entries.into_iter().next() {
            Some((Value::Str(name), value)) => Ok((name, Some(value))),
            _ => Err(wrong),
        },
        _ => Err(wrong),
    }
}
