//! Values that are ready when all their storages are.
//!
//! A value is *handed over* when its producer completes the promise: shapes are known, work is enqueued, fences are recorded. It
//! is *ready* when those fences have passed.
//! Invariant READY: awaiting a [`DeviceFuture`] yields a value that is ready. [`DeviceFuture::on`] and [`DeviceFuture::ordered`]
//! yield it at the hand-over; then a stream orders the reader.
//! Invariant F1: dropping a future, or losing a `select!`, abandons the notification alone: work goes on, memory stays in use.
//! Invariant F2: no waker, callback or user code runs under a lock; the newest waker is woken once for each reason to poll.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

use crate::{DeviceError, Stream};

mod fences;
mod promise;
mod shared;
mod storages;

pub use fences::Fences;
use fences::order;
pub use promise::Promise;
use promise::Receiver;
pub use shared::SharedFuture;
pub use storages::Storages;

/// A value on its way. Awaited, it yields the value once every storage inside is complete on its device (READY).
///
/// # Cancel safety
/// It is `Unpin` and keeps the value until it resolves, so it may be polled by reference in a `select!`.
#[must_use = "a future does nothing until it is awaited"]
pub struct DeviceFuture<T, E = DeviceError> {
    state: State<T, E>,
}

enum State<T, E> {
    /// Handed over before the future was made.
    Now(Result<T, E>),
    Promised(Receiver<T, E>),
    Computed(Box<dyn HandOver<T, E> + Send>),
    /// Handed over and waiting for its fences.
    Fencing(T, Fences),
    Taken,
}

// Nothing inside is pinned: values are only moved.
impl<T, E> Unpin for DeviceFuture<T, E> {}

/// Something that hands a value over when polled.
trait HandOver<T, E> {
    fn poll_value(&mut self, cx: &mut Context<'_>) -> Poll<Result<T, E>>;
}

impl<T, E> DeviceFuture<T, E> {
    /// A future and the promise that completes it.
    pub fn pair() -> (Promise<T, E>, Self) {
        let (promise, receiver) = promise::pair();
        (promise, Self { state: State::Promised(receiver) })
    }

    /// A value that is handed over already; its storages may be pending.
    pub fn ready(value: T) -> Self {
        Self::from_result(Ok(value))
    }

    /// A failure that is known already.
    pub fn failed(error: E) -> Self {
        Self::from_result(Err(error))
    }

    /// A result that is known already; the value's storages may be pending.
    pub fn from_result(result: Result<T, E>) -> Self {
        Self { state: State::Now(result) }
    }

    /// The value that `future` hands over; it is driven by polls of this one.
    pub fn from_future(future: impl Future<Output = Result<T, E>> + Send + 'static) -> Self
    where
        T: 'static,
        E: 'static,
    {
        Self { state: State::Computed(Box::new(Driven(Box::pin(future)))) }
    }

    /// Applies `f` at the hand-over: it sees shapes and moves tensors, but their bytes may be pending.
    pub fn map<U>(self, f: impl FnOnce(T) -> U + Send + 'static) -> DeviceFuture<U, E>
    where
        T: Send + 'static,
        E: From<DeviceError> + Send + 'static,
    {
        self.map_result(|result| result.map(f))
    }

    /// Applies `f` to the error.
    pub fn map_err<F>(self, f: impl FnOnce(E) -> F + Send + 'static) -> DeviceFuture<T, F>
    where
        T: Send + 'static,
        E: From<DeviceError> + Send + 'static,
    {
        self.map_result(|result| result.map_err(f))
    }

    /// Applies `f` to the result at the hand-over.
    pub fn map_result<U, F>(self, f: impl FnOnce(Result<T, E>) -> Result<U, F> + Send + 'static) -> DeviceFuture<U, F>
    where
        T: Send + 'static,
        E: From<DeviceError> + Send + 'static,
    {
        match self.state {
            State::Now(result) => DeviceFuture::from_result(f(result)),
            state => DeviceFuture { state: State::Computed(Box::new(Mapped { future: Self { state }, f: Some(f) })) },
        }
    }

    /// Whether the value was handed over, or the failure is known, as far as polls have seen.
    #[must_use]
    pub fn is_handed_over(&self) -> bool {
        match &self.state {
            State::Now(_) | State::Fencing(..) | State::Taken => true,
            State::Promised(receiver) => receiver.is_complete(),
            State::Computed(_) => false,
        }
    }

    /// Polls for the hand-over. Afterwards the future is spent.
    fn poll_value(&mut self, cx: &mut Context<'_>) -> Poll<Result<T, E>>
    where
        E: From<DeviceError>,
    {
        let result = match &mut self.state {
            State::Promised(receiver) => std::task::ready!(receiver.poll_value(cx)),
            State::Computed(source) => std::task::ready!(source.poll_value(cx)),
            State::Now(_) | State::Fencing(..) | State::Taken => match std::mem::replace(&mut self.state, State::Taken)
            {
                State::Now(result) => result,
                State::Fencing(value, _) => Ok(value),
                _ => panic!("a DeviceFuture was polled after it had resolved"),
            },
        };
        self.state = State::Taken;
        Poll::Ready(result)
    }
}

impl<T: Storages, E: From<DeviceError>> DeviceFuture<T, E> {
    /// The value as soon as it is handed over, for use on `stream`: later work there runs after the value's fences.
    pub fn on(self, stream: &Stream) -> OnStreams<T, E> {
        OnStreams { future: self, streams: Streams::One(stream.clone()) }
    }

    /// The value as soon as it is handed over, each storage ordered on the streams of its device.
    ///
    /// A storage of a device that none of `streams` belongs to is ordered on all of them.
    pub fn on_each(self, streams: &[Stream]) -> OnStreams<T, E> {
        OnStreams { future: self, streams: Streams::Each(streams.into()) }
    }

    /// The value as soon as it is handed over, as a [`Ready`] that decides later who is ordered.
    pub fn ordered(self) -> Ordered<T, E> {
        Ordered { future: self }
    }

    /// Runs `f` at the hand-over, with `stream` ordered after the value's fences: what `f` enqueues there sees the bytes.
    ///
    /// The result carries fences of its own, so awaiting it waits for that work.
    pub fn then<U>(
        self,
        stream: &Stream,
        f: impl FnOnce(&Stream, T) -> Result<U, E> + Send + 'static,
    ) -> DeviceFuture<U, E>
    where
        T: Send + 'static,
        E: Send + 'static,
    {
        let stream = stream.clone();
        self.map_result(move |result| {
            let value = result?;
            order(&value, std::slice::from_ref(&stream));
            f(&stream, value)
        })
    }

    /// Blocks this thread until the value is ready, at most for `timeout`.
    ///
    /// # Errors
    /// [`DeviceError::Timeout`], in which case the value is abandoned: use [`DeviceFuture::shared`] to wait again.
    pub fn wait(self, timeout: Duration) -> Result<T, E> {
        block_on(self, timeout)
    }

    /// The future for any number of waiters, each of which gets a clone.
    pub fn shared(self) -> SharedFuture<T, E>
    where
        T: Clone,
        E: Clone,
    {
        SharedFuture::new(self)
    }
}

impl<T: Storages, E: From<DeviceError>> Future for DeviceFuture<T, E> {
    type Output = Result<T, E>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if !matches!(self.state, State::Fencing(..)) {
            let value = match std::task::ready!(self.poll_value(cx)) {
                Ok(value) => value,
                Err(error) => return Poll::Ready(Err(error)),
            };
            let fences = Fences::of(&value);
            self.state = State::Fencing(value, fences);
        }
        let State::Fencing(_, fences) = &mut self.state else { unreachable!("set above") };
        if let Err(error) = std::task::ready!(Pin::new(fences).poll(cx)) {
            self.state = State::Taken;
            return Poll::Ready(Err(error.into()));
        }
        self.poll_value(cx)
    }
}

impl<T, E> fmt::Debug for DeviceFuture<T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match &self.state {
            State::Now(Ok(_)) => "handed over",
            State::Now(Err(_)) => "failed",
            State::Promised(_) | State::Computed(_) => "pending",
            State::Fencing(..) => "waiting for fences",
            State::Taken => "taken",
        };
        write!(f, "DeviceFuture({state})")
    }
}

/// The future of [`DeviceFuture::on`] and [`DeviceFuture::on_each`].
#[must_use = "a future does nothing until it is awaited"]
pub struct OnStreams<T, E = DeviceError> {
    future: DeviceFuture<T, E>,
    streams: Streams,
}

enum Streams {
    One(Stream),
    Each(Box<[Stream]>),
}

impl Streams {
    fn as_slice(&self) -> &[Stream] {
        match self {
            Self::One(stream) => std::slice::from_ref(stream),
            Self::Each(streams) => streams,
        }
    }
}

impl<T: Storages, E: From<DeviceError>> OnStreams<T, E> {
    /// Blocks this thread until the value is handed over, at most for `timeout`.
    ///
    /// # Errors
    /// [`DeviceError::Timeout`], or the producer's failure.
    pub fn wait(self, timeout: Duration) -> Result<T, E> {
        block_on(self, timeout)
    }
}

impl<T: Storages, E: From<DeviceError>> Future for OnStreams<T, E> {
    type Output = Result<T, E>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let result = std::task::ready!(self.future.poll_value(cx));
        Poll::Ready(result.inspect(|value| order(value, self.streams.as_slice())))
    }
}

impl<T, E> fmt::Debug for OnStreams<T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OnStreams").field("future", &self.future).field("streams", &self.streams.as_slice()).finish()
    }
}

/// The future of [`DeviceFuture::ordered`].
#[must_use = "a future does nothing until it is awaited"]
pub struct Ordered<T, E = DeviceError> {
    future: DeviceFuture<T, E>,
}

impl<T: Storages, E: From<DeviceError>> Ordered<T, E> {
    /// Blocks this thread until the value is handed over, at most for `timeout`.
    ///
    /// # Errors
    /// [`DeviceError::Timeout`], or the producer's failure.
    pub fn wait(self, timeout: Duration) -> Result<Ready<T>, E> {
        block_on(self, timeout)
    }
}

impl<T: Storages, E: From<DeviceError>> Future for Ordered<T, E> {
    type Output = Result<Ready<T>, E>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.future.poll_value(cx).map_ok(|value| Ready { value })
    }
}

impl<T, E> fmt::Debug for Ordered<T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ordered").field("future", &self.future).finish()
    }
}

/// A value that was handed over and whose reader is not chosen yet: out of reach until it is ordered.
///
/// ```
/// # use farcall_device::{DeviceError, Ready, Stream, Tensor};
/// fn sum(ready: Ready<Tensor>, stream: &Stream) -> Result<Vec<f32>, DeviceError> {
///     ready.on(stream).to_vec()
/// }
/// ```
/// Without a stream, or an `.await` of [`Ready::host`], there is no way to the bytes:
/// ```compile_fail,E0599
/// # use farcall_device::{DeviceError, Ready, Stream, Tensor};
/// fn sum(ready: Ready<Tensor>, stream: &Stream) -> Result<Vec<f32>, DeviceError> {
///     ready.to_vec()
/// }
/// ```
/// ```compile_fail,E0616
/// # use farcall_device::{DeviceError, Ready, Stream, Tensor};
/// fn sum(ready: Ready<Tensor>, stream: &Stream) -> Result<Vec<f32>, DeviceError> {
///     ready.value.to_vec()
/// }
/// ```
/// Nor to a value that was given away:
/// ```compile_fail,E0382
/// # use farcall_device::{DeviceError, Ready, Stream, Tensor};
/// fn sum(ready: Ready<Tensor>, stream: &Stream) -> Result<Vec<f32>, DeviceError> {
///     ready.on(stream);
///     ready.on(stream).to_vec()
/// }
/// ```
#[must_use = "the value is reached by `on` or `host`"]
pub struct Ready<T> {
    value: T,
}

impl<T: Storages> Ready<T> {
    /// Wraps a value whose storages carry the fences of their writes.
    pub fn new(value: T) -> Self {
        Self { value }
    }

    /// The value for use on `stream`: later work there runs after the value's fences. Blocks no thread.
    pub fn on(self, stream: &Stream) -> T {
        self.on_each(std::slice::from_ref(stream))
    }

    /// The value, each storage ordered on the streams of its device, or on all if none is its device's.
    pub fn on_each(self, streams: &[Stream]) -> T {
        order(&self.value, streams);
        self.value
    }

    /// Whether every storage is complete now.
    ///
    /// # Errors
    /// The failure of the work that writes one.
    pub fn is_host_ready(&self) -> Result<bool, DeviceError> {
        let mut all = Ok(true);
        self.value.visit(&mut |storage| match (&all, storage.is_ready()) {
            (Ok(true), ready) => all = ready,
            (Ok(false), Err(error)) => all = Err(error),
            _ => {}
        });
        all
    }

    /// The value once every storage is complete.
    ///
    /// # Errors
    /// The failure of the work that writes one.
    pub async fn host(self) -> Result<T, DeviceError> {
        DeviceFuture::ready(self.value).await
    }

    /// Applies `f` to the value, whose bytes may be pending.
    pub fn map<U: Storages>(self, f: impl FnOnce(T) -> U) -> Ready<U> {
        Ready { value: f(self.value) }
    }
}

impl<T> fmt::Debug for Ready<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ready").finish_non_exhaustive()
    }
}

/// All values, in order, or the first failure. Each poll looks at every value that is still pending.
pub fn join_all<T, E>(futures: impl IntoIterator<Item = DeviceFuture<T, E>>) -> DeviceFuture<Vec<T>, E>
where
    T: Send + 'static,
    E: From<DeviceError> + Send + 'static,
{
    let parts = futures.into_iter().map(Part::Pending).collect();
    DeviceFuture { state: State::Computed(Box::new(Joined { parts })) }
}

struct Driven<T, E>(Pin<Box<dyn Future<Output = Result<T, E>> + Send>>);

impl<T, E> HandOver<T, E> for Driven<T, E> {
    fn poll_value(&mut self, cx: &mut Context<'_>) -> Poll<Result<T, E>> {
        self.0.as_mut().poll(cx)
    }
}

struct Mapped<T, E, F> {
    future: DeviceFuture<T, E>,
    /// Taken when it is called.
    f: Option<F>,
}

impl<T, E, U, G, F> HandOver<U, G> for Mapped<T, E, F>
where
    E: From<DeviceError>,
    F: FnOnce(Result<T, E>) -> Result<U, G>,
{
    fn poll_value(&mut self, cx: &mut Context<'_>) -> Poll<Result<U, G>> {
        let result = std::task::ready!(self.future.poll_value(cx));
        let f = self.f.take().expect("a future is not polled after it resolved");
        Poll::Ready(f(result))
    }
}

struct Joined<T, E> {
    parts: Vec<Part<T, E>>,
}

enum Part<T, E> {
    Pending(DeviceFuture<T, E>),
    Value(T),
}

impl<T, E: From<DeviceError>> HandOver<Vec<T>, E> for Joined<T, E> {
    fn poll_value(&mut self, cx: &mut Context<'_>) -> Poll<Result<Vec<T>, E>> {
        let mut pending = false;
        for part in &mut self.parts {
            if let Part::Pending(future) = part {
                match future.poll_value(cx)? {
                    Poll::Ready(value) => *part = Part::Value(value),
                    Poll::Pending => pending = true,
                }
            }
        }
        if pending {
            return Poll::Pending;
        }
        let values = self.parts.drain(..).filter_map(|part| match part {
            Part::Value(value) => Some(value),
            Part::Pending(_) => None,
        });
        Poll::Ready(Ok(values.collect()))
    }
}

/// Drives a future on this thread until it resolves, at most for `timeout`.
fn block_on<T, E: From<DeviceError>>(
    mut future: impl Future<Output = Result<T, E>> + Unpin,
    timeout: Duration,
) -> Result<T, E> {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    // What is there already needs no waker, and no memory for one.
    if let Poll::Ready(result) = Pin::new(&mut future).poll(&mut Context::from_waker(Waker::noop())) {
        return result;
    }
    let deadline = Instant::now().checked_add(timeout);
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    loop {
        if let Poll::Ready(result) = Pin::new(&mut future).poll(&mut Context::from_waker(&waker)) {
            return result;
        }
        match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
            None => std::thread::park(),
            Some(Duration::ZERO) => return Err(DeviceError::Timeout { what: "a value", waited: timeout }.into()),
            Some(left) => std::thread::park_timeout(left),
        }
    }
}

#[cfg(test)]
mod tests;
