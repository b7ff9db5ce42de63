//! Functions: what `#[farcall::function]` makes of a Rust fn, and how arguments are matched to it at compile time.

use std::any::Any;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::task::{Context, Poll};

use farcall_device::codec::{decode, encode, recycle_tensors, shape};
use farcall_device::{Encoded, Tensor};
use farcall_schema::Value;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::builtin::RunError;
use crate::error::Failure;
use crate::interned::FunctionCell;
use crate::{Call, Error};

/// A function that workers can call; written by `#[farcall::function]`.
pub trait Function: Copy + Send + Sync + 'static {
    /// The arguments as the handler takes them: a tuple of owned values.
    type Args: DeserializeOwned + 'static;
    /// What the handler gives.
    type Output: Serialize + DeserializeOwned + 'static;
    /// Unique in the registry; `module_path::name` unless named.
    const NAME: &'static str;
    /// The types as written, compared between caller and callee at first use.
    const SIGNATURE: &'static str;
    /// What the types are made of, compared after the signature: serde's names of fields and variants, and what is in them.
    fn types() -> String {
        format!("{} -> {}", shape::<Self::Args>(), shape::<Self::Output>())
    }
    /// Runs where the frame was read; only for handlers of a microsecond or so that never block.
    const INLINE: bool;
    /// The code behind it.
    fn handler() -> Handler;
    /// Where its number is kept: a `static` of its own.
    fn cell() -> &'static FunctionCell;
}

/// One argument: a `T`, or what travels exactly as a `T` does.
pub trait Arg<T>: Serialize {}
impl<T: Serialize> Arg<T> for T {}
impl<T: Serialize> Arg<T> for &T {}
impl Arg<String> for &str {}
impl<T: Serialize> Arg<Vec<T>> for &[T] {}

/// A tuple of arguments for the parameters `A`.
pub trait Args<A>: Serialize {}
impl Args<()> for () {}
macro_rules! args {
    ($($given:ident $wanted:ident),+) => {
        impl<$($given: Arg<$wanted>, $wanted),+> Args<($($wanted,)+)> for ($($given,)+) {}
    };
}
args!(A0 P0);
args!(A0 P0, A1 P1);
args!(A0 P0, A1 P1, A2 P2);
args!(A0 P0, A1 P1, A2 P2, A3 P3);
args!(A0 P0, A1 P1, A2 P2, A3 P3, A4 P4);
args!(A0 P0, A1 P1, A2 P2, A3 P3, A4 P4, A5 P5);
args!(A0 P0, A1 P1, A2 P2, A3 P3, A4 P4, A5 P5, A6 P6);
args!(A0 P0, A1 P1, A2 P2, A3 P3, A4 P4, A5 P5, A6 P6, A7 P7);

/// A handler's result: the value behind a `Result` alias of any error type.
pub trait Outcome {
    /// The value of success.
    type Value;
    /// The result with the error as callers get it.
    fn into_outcome(self) -> Result<Self::Value, Error>;
}

impl<T, E: Into<Error>> Outcome for Result<T, E> {
    type Value = T;
    fn into_outcome(self) -> Result<T, Error> {
        self.map_err(Into::into)
    }
}

type Answer = Result<Encoded, Failure>;
pub(crate) type AnswerFuture = Pin<Box<dyn Future<Output = Answer> + Send>>;

/// A function's code, its types erased: encoded arguments in, an encoded value or a failure out. Never unwinds.
pub struct Handler(pub(crate) HandlerKind);

pub(crate) type SyncHandler = dyn Fn(&Call, &[u8], Vec<Tensor>) -> Answer + Send + Sync;
type FutureHandler = dyn Fn(Call, Encoded) -> AnswerFuture + Send + Sync;

pub(crate) enum HandlerKind {
    Sync(Box<SyncHandler>),
    Future(Box<FutureHandler>),
}

impl Handler {
    /// A handler that runs to its end on a thread of the agent's pool.
    pub fn sync<A, O, F>(function: F) -> Self
    where
        A: DeserializeOwned + 'static,
        O: Serialize + 'static,
        F: Fn(&Call, A) -> Result<O, Error> + Send + Sync + 'static,
    {
        Self(HandlerKind::Sync(Box::new(move |cx, metadata, tensors| {
            caught(catch_unwind(AssertUnwindSafe(|| {
                let args = read_args(metadata, &tensors)?;
                // The arguments own what they need of the frame.
                recycle_tensors(tensors);
                answer(function(cx, args))
            })))
        })))
    }

    /// The handler of a builtin: values in, a value out.
    pub(crate) fn builtin(run: impl Fn(&Call, Vec<Value>) -> Result<Value, RunError> + Send + Sync + 'static) -> Self {
        Self(HandlerKind::Sync(Box::new(move |cx, metadata, tensors| {
            caught(catch_unwind(AssertUnwindSafe(|| {
                let values = read_args(metadata, &tensors)?;
                recycle_tensors(tensors);
                match run(cx, values) {
                    Ok(value) => answer(Ok(value)),
                    Err(RunError::Failed(error)) => answer::<Value>(Err(error)),
                    Err(RunError::Arguments(message)) => Err(Failure::BadArguments { message }),
                }
            })))
        })))
    }

    /// A handler that may wait without holding a thread.
    pub fn future<A, O, F, R>(function: F) -> Self
    where
        A: DeserializeOwned + 'static,
        O: Serialize + 'static,
        F: Fn(Call, A) -> R + Send + Sync + 'static,
        R: Future<Output = Result<O, Error>> + Send + 'static,
    {
        Self(HandlerKind::Future(Box::new(move |cx, encoded| {
            let started = catch_unwind(AssertUnwindSafe(|| {
                let Encoded { metadata, tensors } = encoded;
                Ok(function(cx, read_args(&metadata, &tensors)?))
            }));
            match started {
                Ok(Ok(future)) => Box::pin(Caught(Box::pin(async move { answer(future.await) }))),
                Ok(Err(failure)) => Box::pin(std::future::ready(Err(failure))),
                Err(panic) => Box::pin(std::future::ready(caught(Err(panic)))),
            }
        })))
    }
}

fn read_args<A: DeserializeOwned>(metadata: &[u8], tensors: &[Tensor]) -> Result<A, Failure> {
    decode(metadata, tensors).map_err(|error| Failure::BadArguments { message: error.to_string() })
}

fn answer<O: Serialize>(result: Result<O, Error>) -> Answer {
    let value = result.map_err(Error::into_failure)?;
    encode(&value).map_err(|error| Failure::Reply { message: error.to_string() })
}

fn caught(result: Result<Answer, Box<dyn Any + Send>>) -> Answer {
    result.unwrap_or_else(|panic| {
        let message = panic
            .downcast_ref::<&str>()
            .map(|text| (*text).to_owned())
            .or_else(|| panic.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "a panic without a message".to_owned());
        Err(Failure::Panicked { message })
    })
}

/// A future whose panics are answers.
struct Caught(AnswerFuture);

impl Future for Caught {
    type Output = Answer;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Answer> {
        match catch_unwind(AssertUnwindSafe(|| self.0.as_mut().poll(cx))) {
            Ok(Poll::Pending) => Poll::Pending,
            Ok(Poll::Ready(answer)) => Poll::Ready(answer),
            Err(panic) => Poll::Ready(caught(Err(panic))),
        }
    }
}
