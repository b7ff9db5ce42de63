//! The builtins of this crate: a line each.

use farcall_schema::Value;

use super::Builtin;
use crate::{Call, Error, Result};

/// A signature, and the function behind it.
type Line = (&'static str, fn(&Call, &[Value]) -> Result<Value>);

const LINES: &[Line] = &[("aten::clone(Tensor self, *, MemoryFormat? memory_format=None) -> Tensor", clone)];

#[cfg(test)]
pub(super) fn count() -> usize {
    LINES.len()
}

/// Those whose signatures are; a test sees that all are.
pub(super) fn standard() -> impl Iterator<Item = Builtin> {
    LINES.iter().filter_map(|(signature, run)| Builtin::new(signature, run).ok())
}

fn clone(cx: &Call, values: &[Value]) -> Result<Value> {
    let [Value::Tensor(tensor), ..] = values else { return Err(Error::msg("not as checked")) };
    Ok(Value::Tensor(tensor.pack(&cx.stream(tensor.device())?)?))
}
