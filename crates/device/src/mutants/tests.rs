use std::time::Duration;

use super::*;
use crate::{Check, Config, CpuMode, DType, Device, DeviceError, DeviceFuture, Layout, Storage, Tensor};

const LONG: Duration = Duration::from_secs(60);
const SEEDS: u64 = 64;
const CUDA: Device = Device::Cuda(0);

fn runtime(cpu: CpuMode, check: Check) -> Runtime {
    Runtime::new(Config { emulated_devices: 2, cpu, check, ..Config::default() }).unwrap()
}

/// What the host sees in the end.
fn bytes(storage: &Storage) -> Vec<u8> {
    storage.ready_event().block(LONG).unwrap();
    storage.as_bytes().unwrap().to_vec()
}

fn producer_and_consumer(runtime: &Runtime) -> Vec<u8> {
    let [producer, consumer] = [(); 2].map(|()| runtime.stream(Device::HOST).unwrap());
    let mut source = producer.alloc(32).unwrap();
    producer.fill(&mut source, 3).unwrap();
    let source = source.freeze(&producer);
    let mut doubled = consumer.alloc(32).unwrap();
    let double = |reads: &[&[u8]], write: &mut [u8]| {
        write.iter_mut().zip(reads[0]).for_each(|(to, from)| *to = from.wrapping_mul(2));
    };
    consumer.launch(&[&source], &mut doubled, double).unwrap();
    bytes(&doubled.freeze(&consumer))
}

fn to_a_device_and_back(runtime: &Runtime) -> Vec<u8> {
    let [host, cuda] = [Device::HOST, CUDA].map(|device| runtime.stream(device).unwrap());
    let mut source = host.alloc(32).unwrap();
    host.fill(&mut source, 6).unwrap();
    let source = source.freeze(&host);
    let mut there = cuda.alloc(32).unwrap();
    cuda.copy(&source, &mut there).unwrap();
    let there = there.freeze(&cuda);
    let mut back = host.alloc(32).unwrap();
    host.copy(&there, &mut back).unwrap();
    bytes(&back.freeze(&host))
}

fn freed_while_read(runtime: &Runtime) -> Vec<u8> {
    let [writer, reader] = [(); 2].map(|()| runtime.stream(Device::HOST).unwrap());
    let mut source = writer.alloc(32).unwrap();
    writer.fill(&mut source, 6).unwrap();
    let source = source.freeze(&writer);
    let mut copy = reader.alloc(32).unwrap();
    reader.copy(&source, &mut copy).unwrap();
    drop(source);
    // If the memory came back too early, this is the same.
    let mut other = writer.alloc(32).unwrap();
    writer.fill(&mut other, 0).unwrap();
    let result = bytes(&copy.freeze(&reader));
    writer.synchronize(LONG).unwrap();
    result
}

fn written_again(runtime: &Runtime) -> Vec<u8> {
    let [writer, reader] = [(); 2].map(|()| runtime.stream(Device::HOST).unwrap());
    let mut source = writer.alloc(32).unwrap();
    writer.fill(&mut source, 6).unwrap();
    let source = source.freeze(&writer);
    let mut copy = reader.alloc(32).unwrap();
    reader.copy(&source, &mut copy).unwrap();
    let mut again = source.try_unique().expect("the only holder");
    writer.fill(&mut again, 9).unwrap();
    assert_eq!(bytes(&again.freeze(&writer)).len(), 32);
    bytes(&copy.freeze(&reader))
}

fn packed_elsewhere(runtime: &Runtime) -> Vec<u8> {
    let [writer, packer] = [(); 2].map(|()| runtime.stream(Device::HOST).unwrap());
    let mut matrix = writer.alloc(64).unwrap();
    writer.fill(&mut matrix, 6).unwrap();
    let layout = Layout::contiguous(DType::U8, &[8, 8]).unwrap();
    let matrix = Tensor::from_storage(matrix.freeze(&writer), layout).unwrap();
    let column = matrix.transpose(0, 1).unwrap().narrow(0, 0, 4).unwrap();
    bytes(column.pack(&packer).unwrap().storage())
}

fn frozen_elsewhere(runtime: &Runtime) -> Vec<u8> {
    let [writer, other] = [(); 2].map(|()| runtime.stream(Device::HOST).unwrap());
    let mut source = writer.alloc(32).unwrap();
    writer.fill(&mut source, 6).unwrap();
    bytes(&source.freeze(&other))
}

fn ordered_on_a_stream(runtime: &Runtime) -> Vec<u8> {
    let [writer, reader] = [(); 2].map(|()| runtime.stream(Device::HOST).unwrap());
    let mut source = writer.alloc(32).unwrap();
    writer.fill(&mut source, 6).unwrap();
    let source = source.freeze(&writer);
    let source = crate::Ready::new(source).on(&reader);
    let mut copy = reader.alloc(32).unwrap();
    reader.copy(&source, &mut copy).unwrap();
    bytes(&copy.freeze(&reader))
}

fn continued_by_then(runtime: &Runtime) -> Vec<u8> {
    let [writer, next] = [(); 2].map(|()| runtime.stream(Device::HOST).unwrap());
    let mut source = writer.alloc(32).unwrap();
    writer.fill(&mut source, 6).unwrap();
    let source = DeviceFuture::<Storage>::ready(source.freeze(&writer));
    let copy = source.then(&next, |stream, source| {
        let mut copy = stream.alloc(32)?;
        stream.copy(&source, &mut copy)?;
        Ok(copy.freeze(stream))
    });
    bytes(&copy.on(&next).wait(LONG).unwrap())
}

type Program = fn(&Runtime) -> Vec<u8>;

/// Name, program, waits that it needs, and what it must give.
const PROGRAMS: [(&str, Program, usize, [u8; 32]); 8] = [
    ("producer_and_consumer", producer_and_consumer, 1, [6; 32]),
    ("to_a_device_and_back", to_a_device_and_back, 2, [6; 32]),
    ("freed_while_read", freed_while_read, 2, [6; 32]),
    ("written_again", written_again, 2, [6; 32]),
    ("packed_elsewhere", packed_elsewhere, 1, [6; 32]),
    ("frozen_elsewhere", frozen_elsewhere, 1, [6; 32]),
    ("ordered_on_a_stream", ordered_on_a_stream, 1, [6; 32]),
    ("continued_by_then", continued_by_then, 2, [6; 32]),
];

#[test]
fn every_forgotten_wait_is_reported_under_every_seed() {
    for (name, program, edges, expected) in PROGRAMS {
        let mut wrong = 0;
        for (edge, seed) in (0..edges).flat_map(|edge| (0..SEEDS).map(move |seed| (edge, seed))) {
            let runtime = runtime(CpuMode::Chaos { seed }, Check::Report);
            let result = without_edge(&runtime, edge, || program(&runtime));
            assert!(!runtime.races().is_empty(), "{name} without wait {edge}, seed {seed}");
            wrong += usize::from(result != expected);
        }
        println!("{name}: {edges} waits, wrong values under {wrong} of {} schedules", SEEDS as usize * edges);
    }
}

type HostWait = fn(DeviceFuture<Storage>) -> Result<Storage, DeviceError>;

/// The host reads what a stream writes, by each way to wait for it.
const HOST_WAITS: [(&str, HostWait); 5] = [
    ("wait", |future| future.wait(LONG)),
    ("await", pollster),
    ("ordered, then host", |future| pollster(future.ordered().wait(LONG)?.host())),
    ("shared", |future| future.shared().wait(LONG)),
    ("fences", |future| {
        let storage = future.on_each(&[]).wait(LONG)?;
        crate::Fences::of(&storage).block_until(std::time::Instant::now() + LONG)?;
        Ok(storage)
    }),
];

fn pollster<T>(future: impl Future<Output = Result<T, DeviceError>>) -> Result<T, DeviceError> {
    let mut future = std::pin::pin!(future);
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    loop {
        if let std::task::Poll::Ready(result) = future.as_mut().poll(&mut cx) {
            return result;
        }
    }
}

/// The host is not given bytes that it did not wait for, even where the schedule happens to have written them.
#[test]
fn every_forgotten_wait_of_the_host_is_an_error_under_every_seed() {
    let program = |runtime: &Runtime, wait: HostWait| {
        let stream = runtime.stream(Device::HOST).unwrap();
        let mut source = stream.alloc(32).unwrap();
        stream.fill(&mut source, 6).unwrap();
        let storage = wait(DeviceFuture::ready(source.freeze(&stream)))?;
        storage.as_bytes().map(<[u8]>::to_vec)
    };
    for (name, wait) in HOST_WAITS {
        for seed in 0..SEEDS {
            let runtime = runtime(CpuMode::Chaos { seed }, Check::Report);
            let (result, waits) = count_edges(&runtime, || program(&runtime, wait));
            assert_eq!(result.unwrap(), [6; 32], "{name}, seed {seed}");
            // The wait of the host comes last: before it, a stream may have been ordered.
            let result = without_edge(&runtime, waits - 1, || program(&runtime, wait));
            assert!(matches!(result, Err(DeviceError::NotReady { .. })), "{name}, seed {seed}: {result:?}");
        }
    }
}

#[test]
fn correct_programs_give_the_same_in_every_mode_without_a_report() {
    let chaos = (0..SEEDS).map(|seed| CpuMode::Chaos { seed });
    let threads = (0..8).map(|seed| CpuMode::Threads { seed });
    for cpu in chaos.chain(threads).chain([CpuMode::Inline]) {
        for (name, program, edges, expected) in PROGRAMS {
            let runtime = runtime(cpu, Check::Report);
            let (result, counted) = count_edges(&runtime, || program(&runtime));
            assert_eq!(result, expected, "{name} in {cpu:?}");
            assert_eq!(runtime.races(), [], "{name} in {cpu:?}");
            assert_eq!(counted, edges, "{name} in {cpu:?}");
        }
    }
    for (name, program, _, expected) in PROGRAMS {
        assert_eq!(program(&runtime(CpuMode::Inline, Check::Off)), expected, "{name} unchecked");
    }
}

#[test]
fn a_report_names_both_operations_and_streams() {
    let runtime = runtime(CpuMode::Chaos { seed: 0 }, Check::Report);
    let [writer, reader] = [(); 2].map(|()| runtime.stream(Device::HOST).unwrap());
    let mut source = writer.alloc(8).unwrap();
    writer.fill(&mut source, 6).unwrap();
    let source = source.freeze(&writer);
    let mut copy = reader.alloc(8).unwrap();
    without_edge(&runtime, 0, || reader.copy(&source, &mut copy)).unwrap();
    let race = &runtime.races()[0];
    assert_eq!(
        race.to_string(),
        format!(
            "race: `copy` on stream {} at 1 is not ordered after the write of the same bytes, `fill` on stream {} at 1",
            reader.id(),
            writer.id()
        )
    );
    assert_eq!(runtime.races(), [], "asked for once");
}

#[test]
#[should_panic(expected = "race: `copy` on stream")]
fn a_race_panics_if_asked_to() {
    let runtime = runtime(CpuMode::Chaos { seed: 0 }, Check::Panic);
    without_edge(&runtime, 0, || producer_and_consumer_by_copy(&runtime));
}

fn producer_and_consumer_by_copy(runtime: &Runtime) {
    let [writer, reader] = [(); 2].map(|()| runtime.stream(Device::HOST).unwrap());
    let mut source = writer.alloc(8).unwrap();
    writer.fill(&mut source, 6).unwrap();
    let source = source.freeze(&writer);
    let mut copy = reader.alloc(8).unwrap();
    reader.copy(&source, &mut copy).unwrap();
}

#[test]
fn a_race_of_a_free_waits_for_the_next_operation_to_panic() {
    let runtime = runtime(CpuMode::Chaos { seed: 0 }, Check::Panic);
    let writer = runtime.stream(Device::HOST).unwrap();
    let mut source = writer.alloc(8).unwrap();
    writer.fill(&mut source, 6).unwrap();
    without_edge(&runtime, 0, || drop(source));
    let mut other = writer.alloc(8).unwrap();
    let next = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| writer.fill(&mut other, 1)));
    assert!(next.is_err());
    assert_eq!(runtime.races().len(), 1);
}
