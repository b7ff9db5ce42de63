//! The errors of this crate: one enum whose fields hold what a person needs to act.
//!
//! What shapes and dtypes tell is an error of the call. What only the elements tell, such as an index beyond its dimension, is a
//! [`DeviceError::Kernel`]: of the call where streams run inline, else of the result's fence.

use farcall_device::{DType, DeviceError, LayoutError};

use crate::Arg;

/// Why an operator did not run. Programs match the variant; people read the text.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum OpError {
    /// The operator does not work on these element types.
    #[error("`{op}` does not take {dtypes:?}: {remedy}")]
    DTypes {
        /// The operator.
        op: &'static str,
        /// Those of its tensors.
        dtypes: Vec<DType>,
        /// What to do instead.
        remedy: &'static str,
    },
    /// The operator does not work on these shapes.
    #[error("`{op}` does not take shapes {shapes:?}: {rule}")]
    Shapes {
        /// The operator.
        op: &'static str,
        /// Those of its tensors.
        shapes: Vec<Vec<usize>>,
        /// What they have to satisfy.
        rule: &'static str,
    },
    /// A dimension that the tensor does not have; negative ones count from the end.
    #[error("`{op}`: dimension {dim} of a tensor of rank {rank}")]
    Dimension {
        /// The operator.
        op: &'static str,
        /// As given.
        dim: i64,
        /// The tensor's rank.
        rank: usize,
    },
    /// A number among the arguments that makes no sense.
    #[error("`{op}`: `{name}` is {value}, but {rule}")]
    Value {
        /// The operator.
        op: &'static str,
        /// The argument's name.
        name: &'static str,
        /// As given.
        value: String,
        /// What it has to satisfy.
        rule: &'static str,
    },
    /// An argument of another kind than the operator's schema says.
    #[error("`{op}`: argument {index} must be {expected}, not {found:?}")]
    Argument {
        /// The operator's schema.
        op: &'static str,
        /// The argument's place, from 0.
        index: usize,
        /// The kind that the schema says.
        expected: &'static str,
        /// What was given.
        found: Box<Arg>,
    },
    /// Memory could not be had, a tensor is on another device than the stream, or a kernel failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl From<LayoutError> for OpError {
    fn from(error: LayoutError) -> Self {
        Self::Device(error.into())
    }
}
