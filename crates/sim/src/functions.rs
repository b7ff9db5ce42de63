//! What the workers of a simulation serve. Each call has a token; who runs it says so.
//!
//! By hand and not by `#[farcall::function]`, which would have every program that links this crate serve them, too.

use std::cell::RefCell;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use farcall_device::Tensor;
use farcall_rpc::{Call, Error, Function, FunctionCell, Handler, Registry, Result};

use crate::model::{Model, lock};

thread_local! {
    /// Of the simulation that runs on this thread: handlers are plain functions.
    static MODEL: RefCell<Option<Arc<Mutex<Model>>>> = const { RefCell::new(None) };
}

/// Has handlers on this thread report to `model`.
pub(crate) fn report_to(model: Option<&Arc<Mutex<Model>>>) {
    MODEL.with(|current| *current.borrow_mut() = model.cloned());
}

fn runs(token: u64, cx: &Call) {
    let rank = cx.agent().worker().rank;
    MODEL.with(|current| {
        if let Some(model) = &*current.borrow() {
            lock(model).runs(token, rank);
        }
    });
}

macro_rules! functions {
    ($($(#[$doc:meta])* $name:ident($($arg:ty),+) -> $output:ty, inline: $inline:literal, $handler:expr;)+) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy)]
        pub(crate) struct $name;

        impl Function for $name {
            type Args = ($($arg,)+);
            type Output = $output;
            const NAME: &'static str = concat!("sim::", stringify!($name));
            const SIGNATURE: &'static str = stringify!(($($arg),+) -> $output);
            const INLINE: bool = $inline;
            fn handler() -> Handler {
                $handler
            }
            fn cell() -> &'static FunctionCell {
                static CELL: FunctionCell = FunctionCell::new();
                &CELL
            }
        }
    )+};
}

functions! {
    /// Answers where it is read.
    Echo(u64, u64) -> u64, inline: true, Handler::sync(|cx, (token, x)| {
        runs(token, cx);
        Ok(mix(token, x))
    });
    /// On the pool.
    Work(u64, u64) -> u64, inline: false, Handler::sync(|cx, (token, x)| {
        runs(token, cx);
        Ok(mix(token, x))
    });
    /// An error as answer.
    Fail(u64, u64) -> u64, inline: false, Handler::sync(|cx, (token, x)| {
        runs(token, cx);
        Err::<u64, _>(Error::msg(mix(token, x)))
    });
    /// Takes a while, without a thread.
    Nap(u64, u64, u64) -> u64, inline: false, Handler::future(|cx: Call, (token, x, nap_us)| async move {
        runs(token, &cx);
        let host = cx.agent().simulated_on().ok_or_else(|| Error::msg("not in a simulation"))?;
        host.sleep(Duration::from_micros(nap_us)).await;
        Ok(mix(token, x))
    });
    /// Calls on, from worker to worker.
    Relay(u64, u64, Vec<(u64, u32)>) -> u64, inline: false, Handler::future(relay);
    /// A tensor there, another back.
    Shift(u64, Tensor) -> (u64, Tensor), inline: false, Handler::sync(|cx, (token, x): (u64, Tensor)| {
        runs(token, cx);
        let numbers = x.as_slice::<u32>()?;
        let shifted: Vec<u32> = numbers.iter().map(|number| number.wrapping_add(token as u32)).collect();
        Ok((mix(token, digest(numbers)), Tensor::from_slice(&shifted, &[shifted.len()])?))
    });
}

async fn relay(cx: Call, (token, x, mut hops): (u64, u64, Vec<(u64, u32)>)) -> Result<u64> {
    runs(token, &cx);
    let Some((next, rank)) = hops.pop() else { return Ok(mix(token, x)) };
    let inner = cx.to(rank).call(Relay, (next, x, hops)).await?;
    Ok(mix(token, inner))
}

pub(crate) fn registry() -> Registry {
    Registry::empty().with(Echo).with(Work).with(Fail).with(Nap).with(Relay).with(Shift)
}

/// The value that every function makes of its token and its argument.
pub(crate) fn mix(token: u64, x: u64) -> u64 {
    (token ^ x.rotate_left(17)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29) ^ x
}

/// Of a tensor's numbers, order included.
pub(crate) fn digest(numbers: &[u32]) -> u64 {
    numbers.iter().fold(numbers.len() as u64, |sum, number| mix(sum, u64::from(*number)))
}
