//! Types as signatures write them: `Tensor(a!)[]`, `int[2]?`, `Dict(str, t)`.
//!
//! Invariant S1: what [`Type`]'s `Display` prints, the parser reads back as the same type.

use std::fmt;

/// A type in a signature.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Type {
    /// `Tensor`.
    Tensor,
    /// `Scalar`: an int, a float or a bool.
    Scalar,
    /// `int`.
    Int,
    /// `SymInt`: an int here, since nothing is traced.
    SymInt,
    /// `float`.
    Float,
    /// `bool`.
    Bool,
    /// `complex`; no [`Value`](crate::Value) is one.
    Complex,
    /// `str`.
    Str,
    /// `Device`, such as "cuda:1".
    Device,
    /// `ScalarType`: a dtype, such as "f32".
    ScalarType,
    /// `Layout`: only "strided".
    Layout,
    /// `MemoryFormat`, such as "contiguous_format".
    MemoryFormat,
    /// `NoneType`.
    NoneType,
    /// `Any`.
    Any,
    /// A type that is only a name here: no value is of it. `Generator`, `Storage`, and classes with a dot in their names.
    Opaque(String),
    /// A type variable, such as `t`: the same type wherever it stands in one signature.
    Variable(String),
    /// `T[]`, or `T[n]`, where one `T` stands for `n` of them.
    List(Box<Self>, Option<u32>),
    /// `T?`.
    Optional(Box<Self>),
    /// `(T, U)`.
    Tuple(Vec<Self>),
    /// `Dict(K, V)`.
    Dict(Box<Self>, Box<Self>),
    /// `RRef(T)`: a value that stays on its worker.
    RRef(Box<Self>),
    /// `Future(T)`; no value is one.
    Future(Box<Self>),
    /// `Await(T)`; no value is one.
    Await(Box<Self>),
    /// A type with what may share its memory: `Tensor(a!)`.
    Aliased(Box<Self>, Alias),
}

/// Which memory an argument or a result may share, and whether it is written: `a!`, `a -> *`, `b|a`.
///
/// Arguments travel by value, so annotations are kept and printed, and nothing more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Alias {
    /// Sets it belongs to before the call; `*` is any.
    pub before: Vec<String>,
    /// Whether the call writes to it.
    pub writes: bool,
    /// Sets it belongs to after the call, where they are others.
    pub after: Option<Vec<String>>,
}

/// Types of one word that have a variant of their own.
pub(crate) const WORDS: [(&str, Type); 14] = [
    ("Tensor", Type::Tensor),
    ("Scalar", Type::Scalar),
    ("int", Type::Int),
    ("SymInt", Type::SymInt),
    ("float", Type::Float),
    ("bool", Type::Bool),
    ("complex", Type::Complex),
    ("str", Type::Str),
    ("Device", Type::Device),
    ("ScalarType", Type::ScalarType),
    ("Layout", Type::Layout),
    ("MemoryFormat", Type::MemoryFormat),
    ("NoneType", Type::NoneType),
    ("Any", Type::Any),
];

/// Types of one word that are only names here.
pub(crate) const OPAQUE: [&str; 14] = [
    "Generator",
    "Storage",
    "Stream",
    "QScheme",
    "Dimname",
    "SymBool",
    "SymFloat",
    "AnyEnumType",
    "AnyClassType",
    "AnyListType",
    "AnyTupleType",
    "Capsule",
    "PyObject",
    "ConstQuantizerPtr",
];

impl Type {
    /// The type without its annotation.
    #[must_use]
    pub fn bare(&self) -> &Self {
        match self {
            Self::Aliased(of, _) => of.bare(),
            other => other,
        }
    }

    /// Whether an argument of this type may be `None`.
    #[must_use]
    pub fn is_optional(&self) -> bool {
        matches!(self.bare(), Self::Optional(_) | Self::NoneType | Self::Any)
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Opaque(name) | Self::Variable(name) => f.write_str(name),
            Self::List(of, None) => write!(f, "{of}[]"),
            Self::List(of, Some(len)) => write!(f, "{of}[{len}]"),
            Self::Optional(of) => write!(f, "{of}?"),
            Self::Tuple(of) => {
                f.write_str("(")?;
                separated(f, of, ", ")?;
                f.write_str(")")
            }
            Self::Dict(key, value) => write!(f, "Dict({key}, {value})"),
            Self::RRef(of) => write!(f, "RRef({of})"),
            Self::Future(of) => write!(f, "Future({of})"),
            Self::Await(of) => write!(f, "Await({of})"),
            Self::Aliased(of, alias) => write!(f, "{of}({alias})"),
            word => match WORDS.iter().find(|(_, of)| of == word) {
                Some((text, _)) => f.write_str(text),
                None => unreachable!("every other variant is a word"),
            },
        }
    }
}

impl fmt::Display for Alias {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        separated(f, &self.before, "|")?;
        if self.writes {
            f.write_str("!")?;
        }
        if let Some(after) = &self.after {
            f.write_str(" -> ")?;
            separated(f, after, "|")?;
        }
        Ok(())
    }
}

/// Prints `items` with `between` between them.
pub(crate) fn separated<T: fmt::Display>(
    f: &mut fmt::Formatter<'_>,
    items: impl IntoIterator<Item = T>,
    between: &str,
) -> fmt::Result {
    for (index, item) in items.into_iter().enumerate() {
        if index > 0 {
            f.write_str(between)?;
        }
        write!(f, "{item}")?;
    }
    Ok(())
}
