//! The attribute `#[farcall::function]` and the derive `farcall::Value`. Use them through the crate `farcall`, whose paths their
//! output names.
//!
//! `expand.rs` reads a function and writes its registration, `signature.rs` prints its types;
//! `value.rs` reads a type and writes its conversions.
//!
//! Invariant M1: the output is a function of the input alone: no file, clock or environment is read.
//! Invariant M2: what cannot be a handler is refused here, at the token to change, with the change to make.

mod expand;
mod signature;
mod value;

use proc_macro::TokenStream;

/// Makes a function callable from other workers, and registers it in every program that links it.
///
/// The function `scale` becomes a unit struct `scale`, the handle that `call` and `remote` take. Its body stays
/// callable in place, without a call, as `scale::run`; so a function that calls itself says `scale::run` too.
/// ```text
/// /// Multiplies each element by `factor`.
/// #[farcall::function]
/// fn scale(cx: &Call, x: Tensor, factor: f64) -> Result<Tensor> {
///     ops::mul_scalar(&x, factor, cx.stream(x.device()))
/// }
///
/// #[farcall::function(name = "weights::publish")]
/// async fn publish(cx: Call, version: u64) -> Result<()> { … }
///
/// let y = agent.to("w1").call(scale, (&x, 2.0)).await?;
/// ```
///
/// As a unit struct, its name cannot be that of a local variable or a loop's pattern where it is in scope.
///
/// # Parameters
/// First, if it is wanted, the context: `cx: &Call` in a function, `cx: Call` in an `async fn`, which owns it because
/// it may outlive the thread that started it. Then up to eight arguments of owned types that serde knows, with tensors
/// anywhere inside. The context is recognised by its type's name, `Call`.
///
/// # Returns
/// Nothing, a value, or a `Result` of one: any type of this name whose error converts into farcall's.
///
/// # Options
/// - `name = "…"`: the name on the wire, in place of `module_path::function`. Renaming a function or moving it to
///   another module then leaves its callers on other workers as they are.
/// - `inline`: runs where the request was read, for functions that take microseconds and never block. Not for `async`.
///
/// # Attributes
/// Documentation goes to the struct, `cfg` to all that is generated, any other attribute to `run`.
#[proc_macro_attribute]
pub fn function(options: TokenStream, item: TokenStream) -> TokenStream {
    expand::function(options.into(), item.into()).unwrap_or_else(syn::Error::into_compile_error).into()
}

/// Makes a struct or an enum a `farcall::Value`, and one of a value: `From`, `FromValue` and `TryFrom`.
///
/// | what | is the value |
/// |---|---|
/// | `struct S { a: A, b: B }` | a dict of the fields' names and values |
/// | `struct S(A, B)` | a tuple |
/// | `struct S(A)` | that of the `A` |
/// | `struct S` | none |
/// | `E::V`, a variant without fields | its name, a text |
/// | `E::V(…)`, `E::V { … }` | a dict of one entry: its name, and its fields as those of a struct |
///
/// The way back is as strict as it is told: a field that is missing, unknown or of another type is an error that says where in the
/// value. An `Option` may be missing.
/// ```
/// use farcall::Value;
///
/// #[derive(Debug, PartialEq, farcall::Value)]
/// struct Adam {
///     #[value(rename = "lr")]
///     rate: f64,
///     betas: (f64, f64),
///     #[value(default)]
///     amsgrad: bool,
/// }
///
/// let value = Value::from(Adam { rate: 0.001, betas: (0.9, 0.999), amsgrad: true });
/// assert_eq!(format!("{:?}", value.field("lr")), "Some(Float(0.001))");
/// assert!(value.to::<Adam>()?.amsgrad);
///
/// let value = Value::Dict(vec![("lr".into(), 1.into()), ("betas".into(), (0.5, "x").into())]);
/// let error = value.to::<Adam>().unwrap_err();
/// assert_eq!(error.to_string(), ".betas[1] is of type str, not f64");
/// # Ok::<(), farcall::ValueError>(())
/// ```
///
/// # Options
/// On a field or variant, `#[value(rename = "…")]`: its name in values. On a field, `#[value(default)]`: its type's default when
/// it is missing.
///
/// A type that borrows is refused:
/// ```compile_fail
/// #[derive(farcall::Value)]
/// struct Name<'a>(&'a str);
/// ```
/// So is one with a field that no value can be:
/// ```compile_fail,E0277
/// #[derive(farcall::Value)]
/// struct Handle {
///     thread: std::thread::Thread,
/// }
/// ```
#[proc_macro_derive(Value, attributes(value))]
pub fn value(item: TokenStream) -> TokenStream {
    value::derive(item.into()).unwrap_or_else(syn::Error::into_compile_error).into()
}
