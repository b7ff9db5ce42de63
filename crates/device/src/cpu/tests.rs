use std::pin::Pin;
use std::sync::atomic::AtomicUsize;
use std::task::Poll;

use super::*;
use crate::testing::CountingWaker;
use crate::{Config, DType, DeviceFuture, Runtime, Storage, StorageMut, Stream, TensorMut};

const LONG: Duration = Duration::from_secs(60);

fn runtime(cpu: CpuMode) -> Runtime {
    Runtime::new(Config { emulated_devices: 4, cpu, check: Check::Panic, ..Config::default() }).unwrap()
}

fn chaos(seed: u64) -> Runtime {
    runtime(CpuMode::Chaos { seed })
}

fn every_mode() -> impl Iterator<Item = CpuMode> {
    let seeded = (0..16).flat_map(|seed| [CpuMode::Threads { seed }, CpuMode::Chaos { seed }]);
    seeded.chain([CpuMode::Inline])
}

fn filled(stream: &Stream, byte: u8) -> Storage {
    let mut bytes = stream.alloc(16).unwrap();
    stream.fill(&mut bytes, byte).unwrap();
    bytes.freeze(stream)
}

/// A storage whose write notes `name` when it runs.
fn noting(stream: &Stream, log: &Arc<Mutex<Vec<usize>>>, name: usize) -> StorageMut {
    let mut bytes = stream.alloc(1).unwrap();
    let log = Arc::clone(log);
    stream.launch(&[], &mut bytes, move |_, _| lock(&log).push(name)).unwrap();
    bytes
}

/// A worker thread gives memory back right after its operation passed.
fn expect_all_free(runtime: &Runtime) {
    let started = Instant::now();
    while runtime.stats().live_bytes > 0 {
        assert!(started.elapsed() < LONG, "{:?}", runtime.stats());
        std::thread::yield_now();
    }
}

#[test]
fn chaos_runs_nothing_before_somebody_asks_and_then_no_more_than_needed() {
    let runtime = chaos(3);
    let [first, second] = [(); 2].map(|()| runtime.stream(Device::HOST).unwrap());
    let log = Arc::default();
    let kept: Vec<_> = (0..4).map(|name| noting(&first, &log, name)).collect();
    let needed = first.record();
    let more: Vec<_> = (4..200).map(|name| noting(&first, &log, name)).collect();
    drop(noting(&second, &log, 1000));
    assert_eq!(*lock(&log), []);
    needed.block(LONG).unwrap();
    let mut ran = lock(&log).clone();
    ran.retain(|name| *name < 1000);
    assert_eq!(ran, [0, 1, 2, 3]);
    drop((kept, more));
}

#[test]
fn a_seed_is_a_reproduction_and_seeds_differ() {
    let order = |seed| {
        let runtime = chaos(seed);
        let streams = [(); 4].map(|()| runtime.stream(Device::HOST).unwrap());
        let log = Arc::default();
        let kept: Vec<_> = (0..24).map(|name| noting(&streams[name % 4], &log, name)).collect();
        streams.iter().for_each(|stream| stream.synchronize(LONG).unwrap());
        drop(kept);
        lock(&log).clone()
    };
    assert_eq!(order(7), order(7));
    let orders: HashSet<_> = (0..8).map(order).collect();
    assert!(orders.len() > 6, "{} of 8 differ", orders.len());
}

#[test]
fn a_chain_over_devices_gives_the_same_in_every_mode() {
    for cpu in every_mode() {
        let runtime = runtime(cpu);
        let mut tensor = TensorMut::empty_on(DType::U8, &[16], &runtime.stream(Device::Cuda(0)).unwrap()).unwrap();
        runtime.stream(Device::Cuda(0)).unwrap().fill(tensor.storage_mut(), 1).unwrap();
        let mut tensor = tensor.freeze_ready();
        for index in 1..4 {
            let stream = runtime.stream(Device::Cuda(index)).unwrap();
            let mut there = TensorMut::empty_on(DType::U8, &[16], &stream).unwrap();
            stream.copy(tensor.storage(), there.storage_mut()).unwrap();
            let there = there.freeze_ready();
            let mut more = TensorMut::empty_on(DType::U8, &[16], &stream).unwrap();
            let add = |reads: &[&[u8]], write: &mut [u8]| {
                write.iter_mut().zip(reads[0]).for_each(|(to, from)| *to = from + 1);
            };
            stream.launch(&[there.storage()], more.storage_mut(), add).unwrap();
            tensor = more.freeze_ready();
        }
        let host = tensor.host().wait(LONG).unwrap();
        assert_eq!(host.as_slice::<u8>().unwrap(), [4; 16], "{cpu:?}");
        assert_eq!(runtime.races(), [], "{cpu:?}");
    }
}

#[test]
fn fence_memory_comes_back_once_all_users_are_done_whatever_is_dropped_first() {
    for cpu in every_mode() {
        let runtime = runtime(cpu);
        for round in 0..6 {
            let [writer, reader] = [(); 2].map(|()| runtime.stream(Device::HOST).unwrap());
            let source = filled(&writer, 5);
            let mut copy = reader.alloc(16).unwrap();
            reader.copy(&source, &mut copy).unwrap();
            let copy = copy.freeze(&reader);
            let mut things: Vec<Box<dyn std::any::Any>> = vec![Box::new(source), Box::new(writer), Box::new(reader)];
            things.swap(0, round % 3);
            things.swap(1, 1 + round % 2);
            drop(things);
            // Memory that came back too early would be poisoned, or be this.
            let fresh = runtime.alloc_host(16).unwrap();
            copy.ready_event().block(LONG).unwrap();
            assert_eq!(copy.as_bytes().unwrap(), [5; 16], "{cpu:?}");
            drop((fresh, copy));
        }
        expect_all_free(&runtime);
        assert_eq!(runtime.races(), [], "{cpu:?}");
    }
}

#[test]
fn work_goes_on_without_the_runtimes_handle() {
    for cpu in every_mode() {
        let runtime = runtime(cpu);
        let stream = runtime.stream(Device::HOST).unwrap();
        let (token, arrives) = Event::token(&runtime);
        let late = runtime.alloc_host(16).unwrap().freeze_at(arrives);
        if cpu == CpuMode::Inline {
            token.complete();
            continue;
        }
        let mut copy = stream.alloc(16).unwrap();
        stream.copy(&late, &mut copy).unwrap();
        let copy = copy.freeze(&stream);
        drop((runtime, stream, late));
        token.complete();
        copy.ready_event().block(LONG).unwrap();
        assert_eq!(copy.as_bytes().unwrap().len(), 16);
    }
}

#[test]
fn memory_of_work_that_nobody_can_ask_for_comes_back() {
    let runtime = chaos(0);
    let pool = runtime.host_pool().clone();
    let stream = runtime.stream(Device::HOST).unwrap();
    drop((filled(&stream, 1), stream));
    assert!(pool.stats().live_bytes > 0, "nothing has run");
    drop(runtime);
    assert_eq!(pool.stats().live_bytes, 0);
}

#[test]
fn host_ready_and_on_ready_progress_in_chaos_mode() {
    for seed in 0..16 {
        let runtime = chaos(seed);
        let stream = runtime.stream(Device::HOST).unwrap();
        let storage = filled(&stream, 2);
        let waker = CountingWaker::new();
        let mut ready = storage.ready_event().host_ready();
        let polled = Pin::new(&mut ready).poll(&mut waker.context());
        assert_eq!(polled.is_pending(), waker.wakes() == 1, "pending only if it asks for another poll");
        if polled.is_pending() {
            assert!(matches!(Pin::new(&mut ready).poll(&mut waker.context()), Poll::Ready(Ok(()))));
        }
        let called = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&called);
        filled(&stream, 3).ready_event().on_ready(move |outcome| {
            outcome.unwrap();
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(called.load(Ordering::Relaxed), 1);
    }
}

#[test]
fn completing_a_token_runs_what_futures_wait_for() {
    for cpu in every_mode().filter(|cpu| *cpu != CpuMode::Inline) {
        let runtime = runtime(cpu);
        let stream = runtime.stream(Device::HOST).unwrap();
        let (token, arrives) = Event::token(&runtime);
        let source = runtime.alloc_host(16).unwrap().freeze_at(arrives);
        let mut copy = stream.alloc(16).unwrap();
        stream.copy(&source, &mut copy).unwrap();
        let copy = copy.freeze(&stream);
        assert!(!copy.is_ready().unwrap(), "the bytes are on their way");
        assert!(matches!(copy.as_bytes(), Err(DeviceError::NotReady { .. })));
        assert!(matches!(copy.ready_event().block(Duration::from_millis(1)), Err(DeviceError::Timeout { .. })));
        std::thread::scope(|scope| {
            let waiters = [(); 2].map(|()| {
                let copy = copy.clone();
                scope.spawn(move || DeviceFuture::<_>::ready(copy).wait(LONG).unwrap())
            });
            let blocked = scope.spawn(|| copy.ready_event().block(LONG));
            token.complete();
            waiters.into_iter().for_each(|waiter| assert_eq!(waiter.join().unwrap().as_bytes().unwrap().len(), 16));
            blocked.join().unwrap().unwrap();
        });
    }
}

#[test]
fn a_dropped_token_fails_what_waits_for_it_and_frees_the_memory() {
    for cpu in every_mode().filter(|cpu| *cpu != CpuMode::Inline) {
        let runtime = runtime(cpu);
        let stream = runtime.stream(Device::HOST).unwrap();
        let (token, arrives) = Event::token(&runtime);
        let source = runtime.alloc_host(16).unwrap().freeze_at(arrives);
        let mut copy = stream.alloc(16).unwrap();
        stream.copy(&source, &mut copy).unwrap();
        let copy = copy.freeze(&stream);
        drop((source, token));
        assert!(matches!(copy.ready_event().block(LONG), Err(DeviceError::Cancelled)));
        assert!(matches!(copy.as_bytes(), Err(DeviceError::Cancelled)));
        drop(copy);
        expect_all_free(&runtime);
    }
    let (token, event) = Event::token(&chaos(0));
    token.fail(DeviceError::BrokenPromise);
    assert!(matches!(event.query(), Err(DeviceError::BrokenPromise)));
}

#[test]
fn c2_a_kernel_that_waits_is_a_deadlock_and_not_a_hang() {
    let runtime = chaos(1);
    let [first, second] = [(); 2].map(|()| runtime.stream(Device::HOST).unwrap());
    let other = filled(&second, 1);
    let event = other.ready_event().clone();
    let (sender, told) = std::sync::mpsc::channel();
    let mut bytes = first.alloc(1).unwrap();
    let wait = move |_: &[&[u8]], _: &mut [u8]| sender.send(event.block(LONG)).unwrap();
    first.launch(&[], &mut bytes, wait).unwrap();
    first.synchronize(LONG).unwrap();
    // The other stream may have been picked first.
    if let Err(error) = told.recv().unwrap() {
        let text = error.to_string();
        assert!(
            text.starts_with(&format!("deadlock: stream {} at 1 cannot pass; stuck are `fill` on", second.id())),
            "{text}"
        );
    }
    second.synchronize(LONG).unwrap();
}

#[test]
fn what_cannot_pass_is_a_deadlock_that_names_the_stuck() {
    let runtime = chaos(1);
    let stream = runtime.stream(Device::HOST).unwrap();
    let storage = filled(&stream, 1);
    let engine = runtime.engine().unwrap();
    let lane = storage.ready_event().lane().unwrap();
    // A ticket that was never enqueued.
    let error = engine.drive(&lane.progress, 9, Patience::Until(None, LONG)).unwrap_err();
    assert!(
        matches!(&error, DeviceError::Deadlock { event, .. } if **event == *format!("stream {} at 9", stream.id()))
    );
}

#[test]
fn a_panicking_kernel_fails_its_stream_and_no_other() {
    for cpu in every_mode().filter(|cpu| *cpu != CpuMode::Inline) {
        let runtime = runtime(cpu);
        let [first, second] = [(); 2].map(|()| runtime.stream(Device::HOST).unwrap());
        let mut bytes = first.alloc(1).unwrap();
        first.launch(&[], &mut bytes, |_, _| std::panic::resume_unwind(Box::new("in a kernel"))).unwrap();
        let broken = bytes.freeze(&first);
        let whole = filled(&second, 1);
        assert!(matches!(broken.ready_event().block(LONG), Err(DeviceError::Lost { .. })), "{cpu:?}");
        let known_late = DeviceFuture::<Storage>::ready(broken).wait(LONG);
        assert!(matches!(known_late, Err(DeviceError::Lost { .. })), "{cpu:?}");
        whole.ready_event().block(LONG).unwrap();
        assert!(filled(&first, 1).ready_event().block(LONG).is_err(), "later work too");
    }
}

#[test]
fn a_kernel_that_cannot_go_on_is_an_error_for_who_waits_and_for_no_other() {
    for cpu in every_mode() {
        let runtime = runtime(cpu);
        let [first, second] = [(); 2].map(|()| runtime.stream(Device::HOST).unwrap());
        let mut bytes = first.alloc(1).unwrap();
        let refuse = |_: &[&[u8]], _: &mut [&mut [u8]]| {
            Err(DeviceError::Kernel { op: "pick", reason: "index 9 of 4 rows".into() })
        };
        let outcome = first.launch_many("pick", &[], &mut [&mut bytes], refuse);
        let outcome = outcome.and_then(|()| bytes.freeze(&first).ready_event().block(LONG));
        assert_eq!(outcome.unwrap_err().to_string(), "`pick` failed: index 9 of 4 rows", "{cpu:?}");
        filled(&second, 1).ready_event().block(LONG).unwrap();
    }
}

#[test]
fn a_kernel_writes_several_storages() {
    for cpu in every_mode() {
        let runtime = runtime(cpu);
        let stream = runtime.stream(Device::HOST).unwrap();
        let source = filled(&stream, 3);
        let mut targets: Vec<_> = (0..9).map(|_| stream.alloc(16).unwrap()).collect();
        let mut writes: Vec<_> = targets.iter_mut().collect();
        let fill = |reads: &[&[u8]], writes: &mut [&mut [u8]]| {
            for (index, write) in writes.iter_mut().enumerate() {
                write.fill(reads[0][0] + index as u8);
            }
            Ok(())
        };
        stream.launch_many("spread", &[&source], &mut writes, fill).unwrap();
        for (index, target) in targets.into_iter().enumerate() {
            let target = target.freeze(&stream);
            target.ready_event().block(LONG).unwrap();
            assert_eq!(target.as_bytes().unwrap(), [3 + index as u8; 16], "{cpu:?}");
        }
        stream.launch_many("nothing", &[&source], &mut [], |_, _| Ok(())).unwrap();
    }
}

#[test]
fn streams_of_other_runtimes_are_waited_for() {
    for (other, cpu) in every_mode().flat_map(|cpu| [(cpu, CpuMode::Chaos { seed: 1 }), (cpu, CpuMode::Inline)]) {
        let [here, there] = [cpu, other].map(runtime);
        let source = filled(&there.stream(Device::HOST).unwrap(), 8);
        let stream = here.stream(Device::HOST).unwrap();
        let mut copy = stream.alloc(16).unwrap();
        stream.copy(&source, &mut copy).unwrap();
        let copy = copy.freeze(&stream);
        copy.ready_event().block(LONG).unwrap();
        assert_eq!(copy.as_bytes().unwrap(), [8; 16], "{cpu:?} after {other:?}");
    }
}

#[test]
fn every_form_of_a_future_gives_the_value_in_every_mode() {
    for cpu in every_mode() {
        let runtime = runtime(cpu);
        let [producer, consumer, cuda] =
            [Device::HOST, Device::HOST, Device::Cuda(0)].map(|device| runtime.stream(device).unwrap());
        let value = |byte| {
            let (promise, future) = DeviceFuture::<Storage>::pair();
            promise.complete(filled(&producer, byte));
            future
        };
        let read = |storage: &Storage| {
            let mut copy = consumer.alloc(16).unwrap();
            consumer.copy(storage, &mut copy).unwrap();
            let copy = copy.freeze(&consumer);
            copy.ready_event().block(LONG).unwrap();
            copy.as_bytes().unwrap()[0]
        };
        assert_eq!(value(1).wait(LONG).unwrap().as_bytes().unwrap(), [1; 16], "{cpu:?}");
        assert_eq!(read(&value(2).on(&consumer).wait(LONG).unwrap()), 2);
        assert_eq!(read(&value(3).on_each(&[consumer.clone(), cuda.clone()]).wait(LONG).unwrap()), 3);
        assert_eq!(read(&value(4).ordered().wait(LONG).unwrap().on(&consumer)), 4);
        let all = crate::join_all((5..8).map(value)).wait(LONG).unwrap();
        assert_eq!(all.iter().map(|storage| storage.as_bytes().unwrap()[0]).collect::<Vec<_>>(), [5, 6, 7]);
        let shared = value(8).map(|storage| (storage.len(), storage)).map(|(_, storage)| storage).shared();
        std::thread::scope(|scope| {
            let waiters = [(); 3].map(|()| scope.spawn(|| shared.wait(LONG).unwrap().as_bytes().unwrap()[0]));
            assert_eq!(waiters.map(|waiter| waiter.join().unwrap()), [8; 3], "{cpu:?}");
        });
        // A future that is polled and dropped abandons the notification alone.
        let mut abandoned = value(9);
        let _ = Pin::new(&mut abandoned).poll(&mut CountingWaker::new().context());
        drop((abandoned, all, shared));
        [&producer, &consumer].iter().for_each(|stream| stream.synchronize(LONG).unwrap());
        expect_all_free(&runtime);
        assert_eq!(runtime.races(), [], "{cpu:?}");
    }
}

#[test]
fn fresh_memory_is_not_a_number_and_freed_memory_is_poisoned() {
    let runtime = runtime(CpuMode::Inline);
    let mut first = runtime.alloc_host(8).unwrap();
    assert_eq!(first.as_bytes_mut().unwrap(), [crate::checker::FRESH; 8]);
    assert!(f32::from_ne_bytes([crate::checker::FRESH; 4]).is_nan());
    first.as_bytes_mut().unwrap().fill(1);
    drop(first);
    let mut block = runtime.host_pool().alloc(8).unwrap();
    assert_eq!(block.bytes_mut()[..8], [crate::checker::FREED; 8]);
}

#[test]
fn redundant_waits_are_left_out() {
    let runtime = chaos(0);
    let [first, second] = [(); 2].map(|()| runtime.stream(Device::HOST).unwrap());
    let (a, b) = (filled(&first, 1), filled(&first, 2));
    let mut sum = second.alloc(16).unwrap();
    let launch = |sum: &mut StorageMut| second.launch(&[&b, &a], sum, |_, _| {}).unwrap();
    assert_eq!(crate::mutants::count_edges(&runtime, || launch(&mut sum)).1, 1, "the later fence covers the earlier");
    assert_eq!(crate::mutants::count_edges(&runtime, || launch(&mut sum)).1, 0, "known by now");
    let c = filled(&first, 3);
    c.ready_event().block(LONG).unwrap();
    assert_eq!(crate::mutants::count_edges(&runtime, || second.copy(&c, &mut sum)).1, 0, "the host knows");
    drop((a, b, c, sum));
}
