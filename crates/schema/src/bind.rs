//! Matching of arguments to signatures, as torch does it.
//!
//! Invariant B1: what [`Schema::bind`] gives has a value for each argument, of its type; [`Schema::check`] accepts exactly that.
//! Invariant B2: [`resolve`] gives the first overload that takes the arguments as they are; only if none does, the first that
//! takes them converted.

use std::fmt;

use farcall_device::{DType, Device, Tensor};

use crate::convert::exact_float;
use crate::types::separated;
use crate::{Argument, Name, Schema, Type, Value};

/// Arguments by name, in the order in which they are given.
pub type Kwargs = Vec<(String, Value)>;

/// Positional arguments of a call by name: `args![&x, 2.0, [1, 2], ()]`, where `()` is none.
///
/// Each is whatever a [`Value`] can be made [`From`].
#[macro_export]
macro_rules! args {
    ($($value:expr),* $(,)?) => {
        ::std::vec::Vec::<$crate::Value>::from([$($crate::Value::from($value)),*])
    };
}

/// Arguments by name: `kwargs! { "alpha": 2.0, "dtype": DType::F32 }`.
#[macro_export]
macro_rules! kwargs {
    ($($name:literal : $value:expr),* $(,)?) => {
        $crate::Kwargs::from([$((::std::string::String::from($name), $crate::Value::from($value))),*])
    };
}

/// Why a signature does not take the arguments.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refused {
    /// An argument without a default was not given.
    #[error("`{argument}` is missing")]
    Missing {
        /// Its type and name.
        argument: String,
    },
    /// More by position than it takes.
    #[error("{given} arguments were given by position, and it takes {max}")]
    TooMany {
        /// Given by position.
        given: usize,
        /// Taken by position.
        max: usize,
    },
    /// It has no argument of that name.
    #[error("it has no argument `{name}`")]
    UnknownName {
        /// The name.
        name: String,
    },
    /// Given twice.
    #[error("`{name}` was given twice")]
    Twice {
        /// Its name.
        name: String,
    },
    /// A value is not of the argument's type.
    #[error("`{argument}` cannot be {found}")]
    Type {
        /// Its type and name.
        argument: String,
        /// What was given, and why it does not convert.
        found: String,
    },
}

/// One overload that does not take the arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Its signature.
    pub schema: String,
    /// Why not.
    pub refused: Refused,
}

/// No overload takes the arguments.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name} does not take {given}{}", listed(.candidates))]
pub struct NoMatch {
    /// The function's name.
    pub name: String,
    /// The types of the arguments: `(Tensor, str, alpha: float)`.
    pub given: String,
    /// Every overload, in the order in which they were tried.
    pub candidates: Vec<Candidate>,
}

fn listed(candidates: &[Candidate]) -> String {
    candidates.iter().map(|Candidate { schema, refused }| format!("\n  {schema}: {refused}")).collect()
}

impl Schema {
    /// The values of all arguments, in the order of the signature, from what was given by position and by name; defaults fill
    /// what is left.
    ///
    /// A value may become what torch makes of it: an int a float, a bool a `Scalar`, one int the two of an `int[2]`.
    ///
    /// # Errors
    /// [`Refused`] says which argument, and why.
    pub fn bind(&self, args: &[Value], kwargs: &[(String, Value)]) -> Result<Vec<Value>, Refused> {
        self.bind_with(args, kwargs, Conversions::Allowed)
    }

    fn bind_with(
        &self,
        args: &[Value],
        kwargs: &[(String, Value)],
        conversions: Conversions,
    ) -> Result<Vec<Value>, Refused> {
        let max = self.positional();
        if args.len() > max && !self.takes_more {
            return Err(Refused::TooMany { given: args.len(), max });
        }
        for (index, (name, _)) in kwargs.iter().enumerate() {
            let Some(position) = self.arguments.iter().position(|argument| argument.name == *name) else {
                return Err(Refused::UnknownName { name: name.clone() });
            };
            let by_position = position < args.len() && position < max;
            if by_position || kwargs[..index].iter().any(|(other, _)| other == name) {
                return Err(Refused::Twice { name: name.clone() });
            }
        }
        let mut converter = Converter::new(self, conversions);
        let mut bound = Vec::with_capacity(self.arguments.len().max(args.len()));
        for (index, argument) in self.arguments.iter().enumerate() {
            let by_position = args.get(index).filter(|_| index < max);
            let given =
                by_position.or_else(|| kwargs.iter().find(|(name, _)| *name == argument.name).map(|(_, value)| value));
            bound.push(match (given, &argument.default) {
                (Some(value), _) => converter.argument(argument, value)?,
                // As it is written, an int may stand for a float: `float p=2`.
                (None, Some(default)) => {
                    Converter::new(self, Conversions::Allowed).argument(argument, &default.to_value(&argument.of))?
                }
                (None, None) => return Err(Refused::Missing { argument: text(argument) }),
            });
        }
        bound.extend(args.iter().skip(max).cloned());
        Ok(bound)
    }

    /// Whether `values` are what [`Schema::bind`] gives: one of its type for each argument. Gives them without what was still to
    /// convert; for values that come from elsewhere.
    ///
    /// # Errors
    /// [`Refused`] says which argument, and why.
    pub fn check(&self, values: Vec<Value>) -> Result<Vec<Value>, Refused> {
        if let Some(missing) = self.arguments.get(values.len()) {
            return Err(Refused::Missing { argument: text(missing) });
        }
        if values.len() > self.arguments.len() && !self.takes_more {
            return Err(Refused::TooMany { given: values.len(), max: self.arguments.len() });
        }
        let mut converter = Converter::new(self, Conversions::None);
        for (argument, value) in self.arguments.iter().zip(&values) {
            converter.argument(argument, value)?;
        }
        Ok(values)
    }
}

/// The first of `candidates` that takes the arguments, by its index, and all its arguments' values.
///
/// First as they are, then with what may be converted, as TorchScript does.
///
/// # Errors
/// [`NoMatch`] lists every candidate, and why it was refused.
pub fn resolve<'a, I>(
    name: &str,
    candidates: I,
    args: &[Value],
    kwargs: &[(String, Value)],
) -> Result<(usize, Vec<Value>), NoMatch>
where
    I: IntoIterator<Item = &'a Schema> + Clone,
{
    for (index, schema) in candidates.clone().into_iter().enumerate() {
        if let Ok(bound) = schema.bind_with(args, kwargs, Conversions::None) {
            return Ok((index, bound));
        }
    }
    let mut refusals = Vec::new();
    for (index, schema) in candidates.into_iter().enumerate() {
        match schema.bind_with(args, kwargs, Conversions::Allowed) {
            Ok(bound) => return Ok((index, bound)),
            Err(refused) => refusals.push(Candidate { schema: schema.to_string(), refused }),
        }
    }
    Err(NoMatch { name: name.to_owned(), given: Given(args, kwargs).to_string(), candidates: refusals })
}

/// Prints the types of arguments.
struct Given<'a>(&'a [Value], &'a [(String, Value)]);

impl fmt::Display for Given<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let by_name = self.1.iter().map(|(name, value)| format!("{name}: {}", value.type_name()));
        f.write_str("(")?;
        separated(f, self.0.iter().map(Value::type_name).chain(by_name), ", ")?;
        f.write_str(")")
    }
}

fn text(argument: &Argument) -> String {
    format!("{} {}", argument.of, argument.name)
}

/// Whether a value may become one of another type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Conversions {
    None,
    Allowed,
}

/// Functions that take a number where a tensor is expected, in torch.
///
/// # Source
/// PyTorch, `torch/csrc/utils/python_arg_parser.cpp`, `should_allow_numbers_as_tensors`; without those that write.
const NUMBERS_AS_TENSORS: [&str; 10] = [
    "aten::add",
    "aten::sub",
    "aten::subtract",
    "aten::mul",
    "aten::multiply",
    "aten::div",
    "aten::divide",
    "aten::true_divide",
    "aten::floor_divide",
    "aten::copy",
];

/// Torch's numbers of dtypes, which stand for them in its own calls.
///
/// # Source
/// PyTorch, `c10/core/ScalarType.h`.
const DTYPES: [(i64, DType, &[&str]); 17] = [
    (0, DType::U8, &["uint8"]),
    (1, DType::I8, &["int8"]),
    (2, DType::I16, &["int16", "short"]),
    (3, DType::I32, &["int32", "int"]),
    (4, DType::I64, &["int64", "long"]),
    (5, DType::F16, &["float16", "half"]),
    (6, DType::F32, &["float32", "float"]),
    (7, DType::F64, &["float64", "double"]),
    (9, DType::C64, &["complex64", "cfloat"]),
    (10, DType::C128, &["complex128", "cdouble"]),
    (11, DType::Bool, &["bool"]),
    (15, DType::BF16, &["bfloat16"]),
    (23, DType::F8E5M2, &["float8_e5m2"]),
    (24, DType::F8E4M3, &["float8_e4m3fn"]),
    (27, DType::U16, &["uint16"]),
    (28, DType::U32, &["uint32"]),
    (29, DType::U64, &["uint64"]),
];

/// At the index of torch's number.
const MEMORY_FORMATS: [&str; 4] = ["contiguous_format", "preserve_format", "channels_last", "channels_last_3d"];
const LAYOUTS: [&str; 1] = ["strided"];

/// Converts the values of one call to the types of one signature.
struct Converter<'a> {
    name: &'a Name,
    conversions: Conversions,
    /// What the type variables stand for, by the first value of each.
    variables: Vec<(&'a str, String)>,
}

/// Why a value is not of a type: what it is, and what more there is to say.
type Mismatch = String;

impl<'a> Converter<'a> {
    fn new(schema: &'a Schema, conversions: Conversions) -> Self {
        Self { name: &schema.name, conversions, variables: Vec::new() }
    }

    fn argument(&mut self, argument: &'a Argument, value: &Value) -> Result<Value, Refused> {
        self.convert(value, &argument.of).map_err(|found| Refused::Type { argument: text(argument), found })
    }

    fn convert(&mut self, value: &Value, of: &'a Type) -> Result<Value, Mismatch> {
        let converts = self.conversions == Conversions::Allowed;
        let mismatch = |why: &str| Err(format!("{}{why}", value.type_name()));
        match (of, value) {
            (Type::Aliased(of, _), _) => self.convert(value, of),
            (Type::Any, _)
            | (Type::Optional(_) | Type::NoneType, Value::None)
            | (Type::Tensor, Value::Tensor(_))
            | (Type::Scalar, Value::Int(_) | Value::Float(_))
            | (Type::Int | Type::SymInt, Value::Int(_))
            | (Type::Float, Value::Float(_))
            | (Type::Bool, Value::Bool(_))
            | (Type::Str, Value::Str(_))
            | (Type::RRef(_), Value::Ref(_)) => Ok(value.clone()),
            (Type::Optional(of), _) => self.convert(value, of),
            (Type::Tensor, Value::Bool(_) | Value::Int(_) | Value::Float(_)) if converts => {
                self.number_as_tensor(value)
            }
            (Type::Scalar, Value::Bool(_)) if converts => Ok(value.clone()),
            (Type::Float, Value::Int(number)) if converts => match exact_float(*number) {
                Some(number) => Ok(Value::Float(number)),
                None => mismatch(" this large, which no float is exactly"),
            },
            (Type::Scalar | Type::Int | Type::SymInt | Type::Float | Type::Bool, Value::Tensor(_)) => {
                mismatch(": take the number out with `item` first")
            }
            (Type::Device, Value::Str(text)) => match text.parse::<Device>() {
                Ok(device) => Ok(device.into()),
                Err(_) => mismatch(&format!(" {text:?}: write cpu, cuda or cuda:1")),
            },
            (Type::ScalarType, Value::Str(_) | Value::Int(_)) => match dtype(value) {
                Some(dtype) => Ok(dtype.into()),
                None => mismatch(", which names no dtype: write f32, i64, …, or as torch does"),
            },
            (Type::Layout, Value::Str(_) | Value::Int(_)) => named(value, &LAYOUTS),
            (Type::MemoryFormat, Value::Str(_) | Value::Int(_)) => named(value, &MEMORY_FORMATS),
            // A tuple may stand for a list, as in TorchScript.
            (Type::List(of, _), Value::List(values) | Value::Tuple(values)) => {
                let of: &'a Type = of;
                self.all(values, |_| of).map(Value::List)
            }
            (Type::List(of, Some(len)), Value::Int(_) | Value::Float(_))
                if matches!(of.bare(), Type::Int | Type::SymInt | Type::Float) =>
            {
                let one = self.convert(value, of)?;
                Ok(Value::List(vec![one; *len as usize]))
            }
            (Type::Tuple(types), Value::Tuple(values)) if types.len() == values.len() => {
                self.all(values, |index| &types[index]).map(Value::Tuple)
            }
            (Type::Dict(key_type, value_type), Value::Dict(entries)) => {
                let mut converted = Vec::with_capacity(entries.len());
                for (index, (key, value)) in entries.iter().enumerate() {
                    let key =
                        self.convert(key, key_type).map_err(|found| format!("a dict with key {index} of {found}"))?;
                    let value = self
                        .convert(value, value_type)
                        .map_err(|found| format!("a dict with value {index} of {found}"))?;
                    converted.push((key, value));
                }
                Ok(Value::Dict(converted))
            }
            (Type::Variable(name), _) => {
                let type_name = value.type_name();
                match self.variables.iter().find(|(known, _)| known == name) {
                    Some((_, known)) if *known != type_name => mismatch(&format!(": {name} is {known} already")),
                    Some(_) => Ok(value.clone()),
                    None => {
                        self.variables.push((name, type_name));
                        Ok(value.clone())
                    }
                }
            }
            (Type::Opaque(_) | Type::Future(_) | Type::Await(_) | Type::Complex, _) => {
                mismatch(&format!(": no value is a {of}"))
            }
            _ => mismatch(""),
        }
    }

    fn all(&mut self, values: &[Value], of: impl Fn(usize) -> &'a Type) -> Result<Vec<Value>, Mismatch> {
        let mut converted = Vec::with_capacity(values.len());
        for (index, value) in values.iter().enumerate() {
            let at = |found| format!("a list with element {index} of {found}");
            converted.push(self.convert(value, of(index)).map_err(at)?);
        }
        Ok(converted)
    }

    /// A tensor without dimensions, where torch makes one of a number.
    fn number_as_tensor(&self, value: &Value) -> Result<Value, Mismatch> {
        if !NUMBERS_AS_TENSORS.contains(&self.name.base.as_str()) {
            return Err(value.type_name());
        }
        let tensor = match value {
            Value::Bool(value) => Tensor::scalar(*value),
            Value::Int(value) => Tensor::scalar(*value),
            Value::Float(value) => Tensor::scalar(*value),
            other => return Err(other.type_name()),
        };
        tensor.map(Value::Tensor).map_err(|error| format!("{}: {error}", value.type_name()))
    }
}

/// The dtype that a text or torch's number names.
fn dtype(value: &Value) -> Option<DType> {
    let entry = match value {
        Value::Str(text) => {
            let text = text.strip_prefix("torch.").unwrap_or(text);
            if let Ok(dtype) = text.parse() {
                return Some(dtype);
            }
            DTYPES.iter().find(|(.., names)| names.contains(&text))
        }
        Value::Int(number) => DTYPES.iter().find(|(code, ..)| code == number),
        _ => None,
    };
    entry.map(|(_, dtype, _)| *dtype)
}

/// The name that a text or torch's number means.
fn named(value: &Value, names: &[&str]) -> Result<Value, Mismatch> {
    let found = match value {
        Value::Str(text) => names.iter().find(|name| **name == text.strip_prefix("torch.").unwrap_or(text)),
        Value::Int(number) => usize::try_from(*number).ok().and_then(|index| names.get(index)),
        _ => None,
    };
    found.map(|name| Value::from(*name)).ok_or_else(|| format!("{}: there are {}", value.type_name(), names.join(", ")))
}

#[cfg(test)]
mod tests;
