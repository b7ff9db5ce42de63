use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::event::Trigger;
use crate::testing::CountingWaker;
use crate::{Config, DType, Device, Event, Layout, Runtime, StreamId, Tensor};

const LONG: Duration = Duration::from_secs(60);

/// A tensor whose bytes are being written until the trigger fires.
fn pending_tensor(device: Device) -> (Trigger, Tensor) {
    let runtime = Runtime::new(Config { emulated_devices: 2, ..Config::default() }).unwrap();
    let (trigger, written) = Event::pending_at(StreamId::HOST, 1);
    let storage = runtime.alloc(device, 4).unwrap().freeze_at(written);
    let tensor = Tensor::from_storage(storage, Layout::contiguous(DType::U8, &[4]).unwrap()).unwrap();
    (trigger, tensor)
}

fn poll<F: Future + Unpin>(future: &mut F, waker: &CountingWaker) -> Poll<F::Output> {
    Pin::new(future).poll(&mut waker.context())
}

fn streams(device: Device, count: usize) -> Vec<Stream> {
    let runtime = Runtime::new(Config { emulated_devices: 2, ..Config::default() }).unwrap();
    (0..count).map(|_| runtime.stream(device).unwrap()).collect()
}

#[test]
fn ready_a_value_without_pending_storages_is_there_at_once() {
    let waker = CountingWaker::new();
    let mut future = DeviceFuture::<_>::ready((1, Tensor::scalar(2_u8).unwrap()));
    assert!(matches!(poll(&mut future, &waker), Poll::Ready(Ok((1, _)))));
    assert!(matches!(DeviceFuture::<u8>::failed(DeviceError::Cancelled).wait(LONG), Err(DeviceError::Cancelled)));
}

#[test]
fn ready_awaiting_waits_for_every_storage() {
    let waker = CountingWaker::new();
    let ((a, first), (b, second)) = (pending_tensor(Device::HOST), pending_tensor(Device::Cuda(0)));
    let (promise, mut future) = DeviceFuture::<_>::pair();
    assert!(poll(&mut future, &waker).is_pending());
    promise.complete(vec![Some(first), None, Some(second)]);
    assert_eq!(waker.wakes(), 1, "handed over");
    assert!(poll(&mut future, &waker).is_pending(), "both are being written");
    b.complete(Ok(()));
    assert!(poll(&mut future, &waker).is_pending(), "one is");
    a.complete(Ok(()));
    assert!(waker.wakes() >= 2, "the fence that it waited for last woke it");
    let Poll::Ready(Ok(tensors)) = poll(&mut future, &waker) else { panic!("{future:?}") };
    assert!(tensors[0].as_ref().unwrap().as_slice::<u8>().is_ok());
}

#[test]
fn ready_a_failed_write_fails_the_future() {
    let (trigger, tensor) = pending_tensor(Device::HOST);
    drop(trigger);
    assert!(matches!(DeviceFuture::<_>::ready(tensor).wait(LONG), Err(DeviceError::Cancelled)));
}

#[test]
fn on_yields_at_the_hand_over_ordered_on_the_stream() {
    let waker = CountingWaker::new();
    let stream = streams(Device::HOST, 1).remove(0);
    let (trigger, tensor) = pending_tensor(Device::HOST);
    let (promise, future) = DeviceFuture::<_>::pair();
    let mut future = future.on(&stream);
    assert!(poll(&mut future, &waker).is_pending());
    promise.complete(tensor);
    let Poll::Ready(Ok(tensor)) = poll(&mut future, &waker) else { panic!("{future:?}") };
    assert!(matches!(tensor.as_slice::<u8>(), Err(DeviceError::NotReady { .. })), "nothing waited for the device");
    assert!(!stream.record().query().unwrap(), "the stream does");
    trigger.complete(Ok(()));
    assert!(stream.record().query().unwrap());
}

#[test]
fn on_after_a_poll_past_the_hand_over_keeps_the_value() {
    let waker = CountingWaker::new();
    let stream = streams(Device::HOST, 1).remove(0);
    let (_trigger, tensor) = pending_tensor(Device::HOST);
    let mut future = DeviceFuture::<_>::ready(tensor);
    assert!(poll(&mut future, &waker).is_pending());
    assert_eq!(future.on(&stream).wait(Duration::ZERO).unwrap().numel(), 4);
}

#[test]
fn on_each_orders_a_storage_on_its_devices_streams() {
    let runtime = Runtime::new(Config { emulated_devices: 2, ..Config::default() }).unwrap();
    let [host, first, second] =
        [Device::HOST, Device::Cuda(0), Device::Cuda(1)].map(|device| runtime.stream(device).unwrap());
    let (_a, on_first) = pending_tensor(Device::Cuda(0));
    let pending = |stream: &Stream| !stream.record().query().unwrap();
    DeviceFuture::<_>::ready(on_first).on_each(&[host.clone(), first.clone()]).wait(LONG).unwrap();
    assert_eq!([&host, &first].map(pending), [false, true]);
    let (_b, on_second) = pending_tensor(Device::Cuda(1));
    Ready::new(on_second).on_each(&[host.clone(), second.clone()]);
    assert_eq!([&host, &second].map(pending), [false, true]);
    let (_c, stray) = pending_tensor(Device::Cuda(1));
    Ready::new(stray).on_each(&[host.clone(), first]);
    assert!(pending(&host), "no stream of its device: ordered on all");
}

#[test]
fn ordered_decides_later() {
    let (trigger, tensor) = pending_tensor(Device::HOST);
    let ready = DeviceFuture::<_>::ready((tensor, 5)).ordered().wait(LONG).unwrap();
    assert!(!ready.is_host_ready().unwrap());
    let waker = CountingWaker::new();
    let mut host = Box::pin(ready.map(|(tensor, _)| tensor).host());
    assert!(poll(&mut host, &waker).is_pending());
    trigger.complete(Ok(()));
    assert_eq!(waker.wakes(), 1);
    assert!(matches!(poll(&mut host, &waker), Poll::Ready(Ok(_))));
    let (trigger, tensor) = pending_tensor(Device::HOST);
    drop(trigger);
    let (_pending, other) = pending_tensor(Device::HOST);
    assert!(Ready::new([other, tensor]).is_host_ready().is_err(), "a failure wins over a pending write");
}

#[test]
fn a_dropped_promise_is_broken() {
    let waker = CountingWaker::new();
    let (promise, mut future) = DeviceFuture::<u8>::pair();
    assert!(poll(&mut future, &waker).is_pending());
    drop(promise);
    assert_eq!(waker.wakes(), 1);
    assert!(matches!(poll(&mut future, &waker), Poll::Ready(Err(DeviceError::BrokenPromise))));
}

#[test]
fn f1_a_dropped_future_tells_the_promise_and_nothing_else() {
    let told = Arc::new(AtomicUsize::new(0));
    let (promise, future) = DeviceFuture::<Tensor>::pair();
    let count = Arc::clone(&told);
    promise.on_abandon(move || {
        count.fetch_add(1, Ordering::Relaxed);
    });
    assert!(!promise.is_abandoned());
    drop(future);
    assert!(promise.is_abandoned());
    assert_eq!(told.load(Ordering::Relaxed), 1);
    let late = Arc::clone(&told);
    promise.on_abandon(move || {
        late.fetch_add(1, Ordering::Relaxed);
    });
    assert_eq!(told.load(Ordering::Relaxed), 2, "registered too late: called at once");
    promise.complete(Tensor::scalar(1_u8).unwrap());
    let (promise, future) = DeviceFuture::<u8>::pair();
    promise.on_abandon(|| panic!("it was completed"));
    promise.complete(1);
    drop(future);
}

#[test]
fn f1_a_poll_that_is_not_followed_up_loses_nothing() {
    let (first, second) = (CountingWaker::new(), CountingWaker::new());
    let (promise, mut future) = DeviceFuture::<u8>::pair();
    for _ in 0..3 {
        assert!(poll(&mut future, &first).is_pending(), "as a `select!` in a loop does");
    }
    assert!(poll(&mut future, &second).is_pending());
    promise.complete(3);
    assert_eq!((first.wakes(), second.wakes()), (0, 1), "F2: the newest waker, once");
    assert!(matches!(poll(&mut future, &second), Poll::Ready(Ok(3))));
}

#[test]
fn f2_a_waker_may_use_the_future() {
    // A waker that polls at once, from inside the promise's completion, deadlocks if a lock is held.
    struct Eager(Mutex<Option<DeviceFuture<u8>>>, AtomicUsize);
    impl Wake for Eager {
        fn wake(self: Arc<Self>) {
            let mut future = self.0.lock().unwrap().take().unwrap();
            let polled = Pin::new(&mut future).poll(&mut Context::from_waker(Waker::noop()));
            self.1.store(usize::from(matches!(polled, Poll::Ready(Ok(4)))), Ordering::Relaxed);
        }
    }
    let (promise, mut future) = DeviceFuture::<u8>::pair();
    let eager = Arc::new(Eager(Mutex::new(None), AtomicUsize::new(0)));
    let waker = Waker::from(Arc::clone(&eager));
    assert!(Pin::new(&mut future).poll(&mut Context::from_waker(&waker)).is_pending());
    *eager.0.lock().unwrap() = Some(future);
    promise.complete(4);
    assert_eq!(eager.1.load(Ordering::Relaxed), 1);
}

#[test]
fn wait_is_bounded_and_released_by_another_thread() {
    let (promise, future) = DeviceFuture::<u8>::pair();
    assert!(matches!(future.wait(Duration::from_millis(1)), Err(DeviceError::Timeout { .. })));
    assert!(promise.is_abandoned());
    let (promise, future) = DeviceFuture::<u8>::pair();
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| future.wait(LONG));
        promise.complete(6);
        assert_eq!(waiter.join().unwrap().unwrap(), 6);
    });
}

#[test]
fn map_runs_at_the_hand_over() {
    let waker = CountingWaker::new();
    let (trigger, tensor) = pending_tensor(Device::HOST);
    let (promise, future) = DeviceFuture::<Tensor>::pair();
    let mut future = future.map(|tensor| (tensor.numel(), tensor)).map_err(|error| error);
    assert!(poll(&mut future, &waker).is_pending());
    promise.complete(tensor);
    assert!(poll(&mut future, &waker).is_pending(), "READY holds for the new value too");
    trigger.complete(Ok(()));
    assert!(matches!(poll(&mut future, &waker), Poll::Ready(Ok((4, _)))));
    assert_eq!(DeviceFuture::<u8>::ready(3).map(|number| number + 1).wait(LONG).unwrap(), 4);
}

#[test]
fn join_all_keeps_the_order_and_fails_early() {
    let (pairs, futures): (Vec<_>, Vec<_>) = (0..3).map(|_| DeviceFuture::<usize>::pair()).unzip();
    let joined = join_all(futures);
    for (index, promise) in pairs.into_iter().enumerate().rev() {
        promise.complete(index * 10);
    }
    assert_eq!(joined.wait(LONG).unwrap(), [0, 10, 20]);
    assert_eq!(join_all(Vec::<DeviceFuture<u8>>::new()).wait(LONG).unwrap(), []);
    let (promise, pending) = DeviceFuture::<u8>::pair();
    let joined = join_all([pending, DeviceFuture::failed(DeviceError::Cancelled)]);
    assert!(matches!(joined.wait(LONG), Err(DeviceError::Cancelled)));
    assert!(promise.is_abandoned());
}

#[test]
fn every_waiter_of_a_shared_future_gets_the_value() {
    let (first, second, dropped) = (CountingWaker::new(), CountingWaker::new(), CountingWaker::new());
    let (promise, future) = DeviceFuture::<String>::pair();
    let shared = future.shared();
    let (mut a, mut b, mut c) = (shared.clone(), shared.clone(), shared.clone());
    assert!(
        poll(&mut a, &first).is_pending() && poll(&mut b, &second).is_pending() && poll(&mut c, &dropped).is_pending()
    );
    drop(c);
    promise.complete("x".to_owned());
    assert_eq!([first.wakes(), second.wakes(), dropped.wakes()], [1, 1, 0]);
    assert!(matches!(poll(&mut a, &first), Poll::Ready(Ok(text)) if text == "x"));
    assert!(matches!(poll(&mut b, &second), Poll::Ready(Ok(text)) if text == "x"));
    assert_eq!(shared.wait(LONG).unwrap(), "x");
    assert_eq!(shared.wait(LONG).unwrap(), "x", "again");
}

#[test]
fn a_shared_future_survives_the_waiter_that_drove_it() {
    let (first, second) = (CountingWaker::new(), CountingWaker::new());
    let (promise, future) = DeviceFuture::<u8>::pair();
    let (mut a, mut b) = { (future.shared(), None) };
    assert!(poll(&mut a, &first).is_pending());
    let b = b.insert(a.clone());
    assert!(poll(b, &second).is_pending());
    drop(a);
    promise.complete(8);
    assert_eq!((first.wakes(), second.wakes()), (0, 1));
    assert!(matches!(poll(b, &second), Poll::Ready(Ok(8))));
}

#[test]
fn a_panic_while_driving_a_shared_future_fails_the_other_waiters() {
    let shared =
        DeviceFuture::<u8>::pair().1.map_result(|_| -> Result<u8, DeviceError> { panic!("in user code") }).shared();
    let mut other = shared.clone();
    // The promise was dropped, so the closure runs at the first poll.
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| poll(&mut other, &CountingWaker::new())));
    assert!(panicked.is_err());
    assert!(matches!(shared.wait(LONG), Err(DeviceError::BrokenPromise)));
}

#[test]
fn f2_shared_waiters_on_threads_all_resolve() {
    for round in 0..200 {
        let (promise, future) = DeviceFuture::<usize>::pair();
        let shared = future.shared();
        std::thread::scope(|scope| {
            let waiters: Vec<_> = (0..3).map(|_| scope.spawn(|| shared.wait(LONG))).collect();
            promise.complete(round);
            for waiter in waiters {
                assert_eq!(waiter.join().unwrap().unwrap(), round);
            }
        });
    }
}
