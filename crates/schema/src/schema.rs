//! One signature: a name, arguments, results.

use std::fmt;
use std::str::FromStr;

use crate::parse::{ParseError, parse};
use crate::types::separated;
use crate::{Literal, Type};

/// The signature of an operator or a function, such as `aten::add.Tensor(Tensor self, Tensor other, *, Scalar alpha=1) -> Tensor`.
///
/// `Display` prints the canonical text, as torch prints its own; `FromStr` reads it, with any spaces.
#[derive(Debug, Clone, PartialEq)]
pub struct Schema {
    /// Which name, and which overload of it.
    pub name: Name,
    /// What it takes, in order.
    pub arguments: Vec<Argument>,
    /// Whether more arguments of any type may follow: `...`.
    pub takes_more: bool,
    /// What it gives: none, one, or a tuple of them.
    pub returns: Vec<Return>,
    /// Whether it may give more: `...`.
    pub gives_more: bool,
}

/// A function's name and overload: `aten::add` and `Tensor` of `aten::add.Tensor`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name {
    /// With its namespaces, such as `aten::add`.
    pub base: String,
    /// Such as `Tensor`; empty for the one without.
    pub overload: String,
}

/// One argument.
#[derive(Debug, Clone, PartialEq)]
pub struct Argument {
    /// Its type.
    pub of: Type,
    /// Its name; where two have one, it names the first.
    pub name: String,
    /// What it is when it is not given.
    pub default: Option<Literal>,
    /// Whether it is given by name only: it stands behind `*`.
    pub keyword_only: bool,
}

/// One result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Return {
    /// Its type.
    pub of: Type,
    /// Its name, if it has one.
    pub name: Option<String>,
}

impl Schema {
    /// Arguments that may be given by position.
    #[must_use]
    pub fn positional(&self) -> usize {
        self.arguments.iter().take_while(|argument| !argument.keyword_only).count()
    }
}

impl FromStr for Schema {
    type Err = ParseError;

    /// Reads a signature.
    ///
    /// # Errors
    /// [`ParseError`] says at which byte, and what was expected there.
    fn from_str(text: &str) -> Result<Self, ParseError> {
        parse(text)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.base)?;
        if self.overload.is_empty() { Ok(()) } else { write!(f, ".{}", self.overload) }
    }
}

impl fmt::Display for Schema {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}(", self.name)?;
        let positional = self.positional();
        let (by_position, by_name) = self.arguments.split_at(positional);
        let star = (!by_name.is_empty()).then(|| "*".to_owned());
        let more = self.takes_more.then(|| "...".to_owned());
        let texts = by_position.iter().map(ToString::to_string).chain(star);
        separated(f, texts.chain(by_name.iter().map(ToString::to_string)).chain(more), ", ")?;
        f.write_str(") -> ")?;
        match (self.returns.as_slice(), self.gives_more) {
            ([], true) => f.write_str("..."),
            // A type that starts with a parenthesis would be read as several results.
            ([one], false) if !one.to_string().starts_with('(') => write!(f, "{one}"),
            (returns, more) => {
                f.write_str("(")?;
                let more = more.then(|| "...".to_owned());
                separated(f, returns.iter().map(ToString::to_string).chain(more), ", ")?;
                f.write_str(")")
            }
        }
    }
}

impl fmt::Display for Argument {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.of, self.name)?;
        match &self.default {
            Some(default) => write!(f, "={default}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Return {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.of)?;
        match &self.name {
            Some(name) => write!(f, " {name}"),
            None => Ok(()),
        }
    }
}
