//! The builtins of this crate: every operator of `farcall-ops`, by its own signature. A new one there is one here.

use std::sync::Arc;

use farcall_device::{DType, Device};
use farcall_ops::{Arg, Operator, operators};
use farcall_schema::{Schema, Type, Value};

use super::{Builtin, BuiltinError};
use crate::{Call, Error, Result};

#[cfg(test)]
pub(super) fn count() -> usize {
    operators().count()
}

/// Those whose signatures are; a test sees that all are.
pub(super) fn standard() -> impl Iterator<Item = Builtin> {
    operators().filter_map(|operator| builtin(operator).ok())
}

fn builtin(operator: &'static Operator) -> Result<Builtin, BuiltinError> {
    let schema: Arc<Schema> = Arc::new(operator.schema.parse()?);
    Builtin::new(operator.schema, move |cx, values| run(operator, &schema, cx, values))
}

/// Enqueues the operator on a stream of the device that is asked for, or of its tensors.
fn run(operator: &'static Operator, schema: &Schema, cx: &Call, values: &[Value]) -> Result<Value> {
    let mut device = None;
    let mut args = Vec::with_capacity(values.len());
    for (argument, value) in schema.arguments.iter().zip(values) {
        let arg = arg(value, kind(&argument.of))?;
        match kind(&argument.of) {
            // Chosen by the stream.
            Type::Device => {
                if let Value::Str(name) = value {
                    device = Some(name.parse::<Device>()?);
                }
                args.push(Arg::None);
            }
            // There is one layout.
            Type::Layout => args.push(Arg::None),
            _ => args.push(arg),
        }
    }
    let device = device.or_else(|| args.iter().find_map(device_of)).unwrap_or(Device::HOST);
    let results = operator.call(&args, &cx.stream(device)?)?;
    let mut results = results.into_iter().map(Value::Tensor);
    match (results.len(), results.next()) {
        (1, Some(one)) => Ok(one),
        (_, first) => Ok(Value::Tuple(first.into_iter().chain(results).collect())),
    }
}

/// What a value of the type is when it is there.
fn kind(of: &Type) -> &Type {
    match of.bare() {
        Type::Optional(of) => kind(of),
        bare => bare,
    }
}

fn device_of(arg: &Arg) -> Option<Device> {
    match arg {
        Arg::Tensor(tensor) => Some(tensor.device()),
        Arg::Tensors(tensors) => tensors.first().map(|tensor| tensor.device()),
        _ => None,
    }
}

/// A value that its signature has checked, as operators take it.
fn arg(value: &Value, kind: &Type) -> Result<Arg> {
    Ok(match (value, kind) {
        (Value::None, _) => Arg::None,
        (Value::Bool(value), _) => Arg::Bool(*value),
        (Value::Int(value), _) => Arg::Int(*value),
        (Value::Float(value), _) => Arg::Float(*value),
        (Value::Str(name), Type::ScalarType) => Arg::DType(name.parse::<DType>()?),
        (Value::Str(text), _) => Arg::Text(text.clone()),
        (Value::Tensor(tensor), _) => Arg::Tensor(tensor.clone()),
        (Value::List(values), Type::List(of, _)) if matches!(of.bare(), Type::Tensor) => {
            Arg::Tensors(values.iter().cloned().map(Value::to).collect::<Result<_, _>>()?)
        }
        (Value::List(values), _) => Arg::Ints(values.iter().cloned().map(Value::to).collect::<Result<_, _>>()?),
        (other, _) => return Err(Error::msg(format_args!("no operator takes a {} so far", other.type_name()))),
    })
}
