//! The attribute `#[farcall::function]`. Use it through the crate `farcall`, whose paths its output names.
//!
//! `expand.rs` reads a function and writes its registration, `signature.rs` prints its types.
//!
//! Invariant M1: the output is a function of the input alone: no file, clock or environment is read.
//! Invariant M2: what cannot be a handler is refused here, at the token to change, with the change to make.

mod expand;
mod signature;

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
