//! Every interleaving, and every order that the memory model allows, of the slots that threads meet in: a promise's, the queue
//! of a stream's waiters, the waker of one of them, and the hub of a shared future. The modules are those of the crate, compiled against loom's locks and atomics.

use farcall_device::DeviceError;

mod sync {
    pub(crate) use loom::sync::atomic::{AtomicU64, Ordering};
    pub(crate) use loom::sync::{Arc, Condvar, Mutex, MutexGuard};
    pub(crate) use std::sync::PoisonError;
}

#[path = "../src/progress.rs"]
#[expect(dead_code, reason = "models use a part")]
mod progress;

#[path = "../src/waiter.rs"]
mod waiter;

#[path = "../src/future/shared.rs"]
#[allow(dead_code, unreachable_pub, reason = "models use a part; the crate exports the future")]
mod shared;

#[path = "../src/future/promise.rs"]
#[allow(dead_code, unreachable_pub, reason = "models use a part; the crate exports the promise")]
mod promise;

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use loom::thread;
use progress::Progress;
use shared::SharedFuture;
use waiter::Waiter;

/// What `shared` drives, without fences: the consumer of a promise.
struct DeviceFuture<T, E>(promise::Receiver<T, E>);

impl<T, E: From<DeviceError>> Future for DeviceFuture<T, E> {
    type Output = Result<T, E>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.poll_value(cx)
    }
}

/// Values of models have no storages.
trait Storages {}

impl Storages for u8 {}

fn block_on<T, E>(_: impl Future<Output = Result<T, E>>, _: Duration) -> Result<T, E> {
    unreachable!("models poll")
}

/// Counts wakes. Not loom's: what it counts is looked at after the threads have ended.
#[derive(Default)]
struct Count(AtomicUsize);

impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

impl Count {
    fn get(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

#[test]
fn f2_the_newest_waker_of_a_promise_is_woken_or_its_poll_sees_the_value() {
    loom::model(|| {
        let (promise, mut receiver) = promise::pair::<u8, DeviceError>();
        let producer = thread::spawn(move || promise.complete(7));
        let [first, second] = [(); 2].map(|()| Arc::new(Count::default()));
        let mut seen = None;
        for count in [&first, &second] {
            let waker = Waker::from(Arc::clone(count));
            if let Poll::Ready(result) = receiver.poll_value(&mut Context::from_waker(&waker)) {
                seen = Some(result.unwrap());
                break;
            }
        }
        producer.join().unwrap();
        assert!(first.get() + second.get() <= 1, "woken twice");
        if seen.is_none() {
            assert_eq!(second.get(), 1, "a wake was lost");
            let polled = receiver.poll_value(&mut Context::from_waker(Waker::noop()));
            seen = Some(if let Poll::Ready(result) = polled { result.unwrap() } else { panic!("no value") });
        }
        assert_eq!(seen, Some(7));
    });
}

#[test]
fn f1_a_receiver_that_goes_away_is_told_of_once_or_the_value_was_there() {
    loom::model(|| {
        let (promise, receiver) = promise::pair::<Arc<Count>, DeviceError>();
        let (value, told) = (Arc::new(Count::default()), Arc::new(Count::default()));
        let (tell, late) = (Arc::clone(&told), Arc::clone(&told));
        promise.on_abandon(move || tell.wake());
        let consumer = thread::spawn(move || drop(receiver));
        let abandoned = promise.is_abandoned();
        if abandoned {
            promise.on_abandon(move || late.wake());
        }
        promise.complete(Arc::clone(&value));
        consumer.join().unwrap();
        if abandoned {
            assert_eq!(told.get(), 2, "at the drop, and at once when registered after it");
        } else {
            assert!(told.get() <= 1);
        }
        assert_eq!(Arc::strong_count(&value), 1, "the value was dropped");
    });
}

#[test]
fn a_promise_that_is_dropped_is_broken() {
    loom::model(|| {
        let (promise, mut receiver) = promise::pair::<u8, DeviceError>();
        let producer = thread::spawn(move || drop(promise));
        let count = Arc::new(Count::default());
        let waker = Waker::from(Arc::clone(&count));
        let mut polled = receiver.poll_value(&mut Context::from_waker(&waker));
        producer.join().unwrap();
        if polled.is_pending() {
            assert_eq!(count.get(), 1);
            polled = receiver.poll_value(&mut Context::from_waker(&waker));
        }
        assert!(matches!(polled, Poll::Ready(Err(DeviceError::BrokenPromise))));
    });
}

#[test]
fn e1_each_waiter_is_called_once_whenever_it_comes() {
    loom::model(|| {
        let progress = Progress::new(false);
        let stream = {
            let progress = sync::Arc::clone(&progress);
            thread::spawn(move || {
                progress.advance(1, Ok(())).run();
                progress.advance(2, Err(DeviceError::Cancelled)).run();
            })
        };
        let counts = [(); 2].map(|()| Arc::new(Count::default()));
        for (ticket, count) in (1..).zip(&counts) {
            let (count, seen) = (Arc::clone(count), sync::Arc::clone(&progress));
            progress.on_passed(ticket, move |outcome| {
                assert!(seen.has_passed(ticket));
                assert_eq!(outcome.is_ok(), ticket == 1);
                count.wake();
            });
        }
        stream.join().unwrap();
        assert_eq!(counts.map(|count| count.get()), [1, 1]);
    });
}

#[test]
fn e1_a_blocked_thread_is_released_with_the_one_outcome() {
    loom::model(|| {
        let progress = Progress::new(false);
        let stream = {
            let progress = sync::Arc::clone(&progress);
            thread::spawn(move || {
                progress.advance(1, Ok(())).run();
                progress.advance(2, Err(DeviceError::Cancelled)).run();
            })
        };
        assert!(progress.block(1, None).unwrap().is_ok());
        assert!(matches!(progress.block(2, None), Some(Err(DeviceError::Cancelled))));
        assert!(progress.block(1, None).unwrap().is_ok(), "still");
        stream.join().unwrap();
    });
}

#[test]
fn e1_a_query_never_sees_a_failed_ticket_as_complete() {
    loom::model(|| {
        let progress = Progress::new(false);
        let stream = {
            let progress = sync::Arc::clone(&progress);
            thread::spawn(move || progress.advance(1, Err(DeviceError::Cancelled)).run())
        };
        assert!(!matches!(progress.outcome(1), Some(Ok(()))));
        stream.join().unwrap();
        assert!(matches!(progress.outcome(1), Some(Err(DeviceError::Cancelled))));
    });
}

/// As `EventReady::poll`: look, register, look again.
fn poll_event(progress: &sync::Arc<Progress>, waiter: &mut Waiter, count: &Arc<Count>) -> bool {
    if progress.outcome(1).is_some() {
        return true;
    }
    if let Some(wake) = waiter.register(&Waker::from(Arc::clone(count))) {
        progress.on_passed(1, move |_| wake());
    }
    progress.outcome(1).is_some()
}

#[test]
fn e3_the_newest_waker_of_an_event_is_woken_or_the_second_look_sees_it() {
    loom::model(|| {
        let progress = Progress::new(false);
        let stream = {
            let progress = sync::Arc::clone(&progress);
            thread::spawn(move || progress.advance(1, Ok(())).run())
        };
        let counts = [(); 2].map(|()| Arc::new(Count::default()));
        let mut waiter = Waiter::default();
        let seen = counts.iter().any(|count| poll_event(&progress, &mut waiter, count));
        stream.join().unwrap();
        assert!(counts[0].get() + counts[1].get() <= 1, "woken twice");
        assert!(seen || counts[1].get() == 1, "a wake was lost");
    });
}

#[test]
fn e3_a_waiter_that_goes_away_takes_its_waker_along() {
    loom::model(|| {
        let progress = Progress::new(false);
        let stream = {
            let progress = sync::Arc::clone(&progress);
            thread::spawn(move || progress.advance(1, Ok(())).run())
        };
        let count = Arc::new(Count::default());
        let mut waiter = Waiter::default();
        poll_event(&progress, &mut waiter, &count);
        drop(waiter);
        stream.join().unwrap();
        assert!(count.get() <= 1, "woken twice");
        assert_eq!(Arc::strong_count(&count), 1, "the waker was dropped");
    });
}

/// Two waiters and the producer: whoever drives, each waiter sees the value or is woken to see it.
#[test]
fn no_waiter_of_a_shared_future_is_left_behind() {
    loom::model(|| {
        let (promise, receiver) = promise::pair::<u8, DeviceError>();
        let future = SharedFuture::new(DeviceFuture(receiver));
        let wait = |mut future: SharedFuture<u8, DeviceError>| {
            move || {
                let count = Arc::new(Count::default());
                let waker = Waker::from(Arc::clone(&count));
                let polled = Pin::new(&mut future).poll(&mut Context::from_waker(&waker));
                (future, polled.is_ready(), count)
            }
        };
        let other = thread::spawn(wait(future.clone()));
        let producer = thread::spawn(move || promise.complete(7));
        let first = wait(future)();
        let second = other.join().unwrap();
        producer.join().unwrap();
        let mut waiters = [first, second];
        // Who was woken polls again, until nobody is; a driver that stops early would leave the other asleep.
        for _ in 0..waiters.len() {
            for (future, seen, count) in waiters.iter_mut().filter(|(_, seen, count)| !seen && count.get() > 0) {
                let polled = Pin::new(future).poll(&mut Context::from_waker(&Waker::from(Arc::clone(count))));
                *seen = matches!(polled, Poll::Ready(Ok(7)));
            }
        }
        assert!(waiters.iter().all(|(_, seen, _)| *seen), "a waiter was left behind");
    });
}
