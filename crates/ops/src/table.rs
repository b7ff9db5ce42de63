//! The list of operators: schema, how each is run on untyped arguments, and its derivative.
//!
//! Schemas are torch's, character for character (recorded from torch by `tests/vectors/record.py`), so that calls by name match the same
//! overloads. A kernel for another device joins behind the same entries.

use farcall_device::{DType, Stream, Tensor};

use crate::{OpError, Scalar};

/// An argument of an operator, as calls by name carry it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Arg {
    /// An optional argument that is absent.
    None,
    /// A truth value; also a `Scalar`.
    Bool(bool),
    /// An integer; also a `Scalar`.
    Int(i64),
    /// A real number; also a `Scalar`.
    Float(f64),
    /// A list of integers, such as a shape.
    Ints(Vec<i64>),
    /// A word, such as the mode of a rounding.
    Text(String),
    /// A `ScalarType`.
    DType(DType),
    /// One tensor.
    Tensor(Tensor),
    /// A list of tensors.
    Tensors(Vec<Tensor>),
}

/// One overload of an operator.
#[derive(Debug)]
#[non_exhaustive]
pub struct Operator {
    /// Its signature in TorchScript's syntax.
    pub schema: &'static str,
    /// Enqueues it. Arguments come in the schema's order, with defaults filled in.
    pub run: fn(Args<'_>, &Stream) -> Result<Vec<Tensor>, OpError>,
    /// How a gradient of its result becomes gradients of its arguments.
    pub derivative: Derivative,
}

/// How an operator is differentiated.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Derivative {
    /// From the gradient of the first result to those of the tensors among the arguments, in their order (elements of lists one by
    /// one); `None` for those that the result does not depend on smoothly, such as indices.
    Vjp(fn(&Applied<'_>) -> Result<Vec<Option<Tensor>>, OpError>),
    /// There is none, and this is why.
    None(&'static str),
}

/// An operator that has run, for its derivative.
#[derive(Debug, Clone, Copy)]
pub struct Applied<'a> {
    /// What it was given.
    pub args: Args<'a>,
    /// What it gave.
    pub results: &'a [Tensor],
    /// The gradient of the first result: of its shape and dtype.
    pub grad: &'a Tensor,
    /// Where the gradients are computed.
    pub stream: &'a Stream,
}

impl Applied<'_> {
    /// The first result.
    pub(crate) fn result(&self) -> &Tensor {
        &self.results[0]
    }
}

impl Operator {
    /// The name and overload, such as `aten::add.Tensor`.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.schema.split_once('(').map_or(self.schema, |(name, _)| name)
    }

    /// Enqueues the operator on `args`, which come in the schema's order, with defaults filled in.
    ///
    /// # Errors
    /// [`OpError::Argument`] for one of another kind than the schema says; otherwise the operator's own.
    pub fn call(&'static self, args: &[Arg], stream: &Stream) -> Result<Vec<Tensor>, OpError> {
        (self.run)(Args { schema: self.schema, args }, stream)
    }

    /// The gradients of the tensors among `args`, from the gradient of the first of `results`, which [`Operator::call`] gave.
    /// `None` as a whole for an operator without a derivative.
    ///
    /// # Errors
    /// Those of the operators that the derivative is made of.
    pub fn backward(
        &'static self,
        args: &[Arg],
        results: &[Tensor],
        grad: &Tensor,
        stream: &Stream,
    ) -> Result<Option<Vec<Option<Tensor>>>, OpError> {
        let Derivative::Vjp(vjp) = self.derivative else { return Ok(None) };
        let args = Args { schema: self.schema, args };
        vjp(&Applied { args, results, grad, stream }).map(Some)
    }
}

/// Every operator.
pub fn operators() -> impl Iterator<Item = &'static Operator> {
    crate::FAMILIES.iter().copied().flatten()
}

/// The operator of a name with its overload, such as `aten::add.Tensor`.
#[must_use]
pub fn find(name: &str) -> Option<&'static Operator> {
    operators().find(|operator| operator.name() == name)
}

/// Arguments of an operator, read by kind.
#[derive(Debug, Clone, Copy)]
pub struct Args<'a> {
    schema: &'static str,
    args: &'a [Arg],
}

impl<'a> Args<'a> {
    pub(crate) fn wrong(&self, index: usize, expected: &'static str) -> OpError {
        let found = Box::new(self.args.get(index).cloned().unwrap_or(Arg::None));
        OpError::Argument { op: self.schema, index, expected, found }
    }

    /// The tensor at a place.
    pub(crate) fn tensor(&self, index: usize) -> Result<&'a Tensor, OpError> {
        match self.args.get(index) {
            Some(Arg::Tensor(tensor)) => Ok(tensor),
            _ => Err(self.wrong(index, "a tensor")),
        }
    }

    pub(crate) fn tensor_or_none(&self, index: usize) -> Result<Option<&'a Tensor>, OpError> {
        if self.is_none(index) { Ok(None) } else { self.tensor(index).map(Some) }
    }

    pub(crate) fn tensors(&self, index: usize) -> Result<&'a [Tensor], OpError> {
        match self.args.get(index) {
            Some(Arg::Tensors(tensors)) => Ok(tensors),
            _ => Err(self.wrong(index, "a list of tensors")),
        }
    }

    pub(crate) fn scalar(&self, index: usize) -> Result<Scalar, OpError> {
        match self.args.get(index) {
            Some(Arg::Bool(value)) => Ok(Scalar::Bool(*value)),
            Some(Arg::Int(value)) => Ok(Scalar::Int(*value)),
            Some(Arg::Float(value)) => Ok(Scalar::Float(*value)),
            _ => Err(self.wrong(index, "a number")),
        }
    }

    pub(crate) fn int(&self, index: usize) -> Result<i64, OpError> {
        match self.args.get(index) {
            Some(Arg::Int(value)) => Ok(*value),
            _ => Err(self.wrong(index, "an integer")),
        }
    }

    pub(crate) fn int_or_none(&self, index: usize) -> Result<Option<i64>, OpError> {
        if self.is_none(index) { Ok(None) } else { self.int(index).map(Some) }
    }

    pub(crate) fn bool(&self, index: usize) -> Result<bool, OpError> {
        match self.args.get(index) {
            Some(Arg::Bool(value)) => Ok(*value),
            _ => Err(self.wrong(index, "a truth value")),
        }
    }

    /// A list of integers; one alone is a list of it.
    pub(crate) fn ints(&self, index: usize) -> Result<Vec<i64>, OpError> {
        match self.args.get(index) {
            Some(Arg::Ints(values)) => Ok(values.clone()),
            Some(Arg::Int(value)) => Ok(vec![*value]),
            _ => Err(self.wrong(index, "a list of integers")),
        }
    }

    pub(crate) fn ints_or_none(&self, index: usize) -> Result<Option<Vec<i64>>, OpError> {
        if self.is_none(index) { Ok(None) } else { self.ints(index).map(Some) }
    }

    pub(crate) fn text(&self, index: usize) -> Result<&'a str, OpError> {
        match self.args.get(index) {
            Some(Arg::Text(text)) => Ok(text),
            _ => Err(self.wrong(index, "a word")),
        }
    }

    pub(crate) fn text_or_none(&self, index: usize) -> Result<Option<&'a str>, OpError> {
        if self.is_none(index) { Ok(None) } else { self.text(index).map(Some) }
    }

    pub(crate) fn dtype_or_none(&self, index: usize) -> Result<Option<DType>, OpError> {
        match self.args.get(index) {
            None | Some(Arg::None) => Ok(None),
            Some(Arg::DType(dtype)) => Ok(Some(*dtype)),
            _ => Err(self.wrong(index, "a dtype")),
        }
    }

    /// That an argument which this crate has no use for is absent.
    pub(crate) fn none(&self, index: usize) -> Result<(), OpError> {
        if self.is_none(index) { Ok(()) } else { Err(self.wrong(index, "absent: the stream decides")) }
    }

    fn is_none(&self, index: usize) -> bool {
        matches!(self.args.get(index), None | Some(Arg::None))
    }
}

/// The results of an operator with one.
pub(crate) fn one(result: Result<Tensor, OpError>) -> Result<Vec<Tensor>, OpError> {
    Ok(vec![result?])
}
