//! Values that travel by schema, and the signatures that say what may.
//!
//! - [`Schema`]: a signature in TorchScript's syntax, such as
//!   `aten::add.Tensor(Tensor self, Tensor other, *, Scalar alpha=1) -> Tensor`; parsed from text and printed as torch prints it;
//! - [`Schema::bind`], [`resolve`]: matching of arguments to one signature, and to the first of several overloads;
//! - [`Type`], [`Literal`], [`Alias`]: its parts;
//! - [`Value`]: none, bool, int, float, str, bytes, tensor, list, tuple, dict, ref; [`FromValue`]: the way back to Rust's types.
//!
//! Knows no network, no registry and no operator.

#![forbid(unsafe_code)]

mod bind;
mod convert;
pub mod fields;
mod literal;
mod parse;
mod schema;
mod types;
mod value;

pub use bind::{Candidate, Kwargs, NoMatch, Refused, resolve};
pub use convert::{FromValue, ValueError};
pub use literal::Literal;
pub use parse::{DEPTH_MAX, Found, ITEMS_MAX, ParseError, TEXT_BYTES_MAX};
pub use schema::{Argument, Name, Return, Schema};
pub use types::{Alias, Type};
pub use value::{Ref, Value};
