//! The device suite: programs whose results depend on order, on every kind of device that this process has.
//!
//! One binary for all: streams of the CPU in their three modes, emulated devices, and CUDA devices, be they a fake driver's or
//! real. [`places`] is the one function that decides, from the environment ([`Config::from_env`]). Where there is no CUDA device, its
//! cases are counted as skipped, with the reason. It has a main of its own, since a test harness would hide that line.
//!
//! `cargo test -p farcall-device --test suite -- WORD` runs the cases whose name has that word.
#![expect(clippy::print_stdout, reason = "a program that reports")]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use farcall_device::{
    Check, Config, CpuMode, Cuda, DType, Device, DeviceError, DeviceFuture, Event, Layout, Ready, Runtime, Storage,
    Stream, Tensor, join_all,
};

const LONG: Duration = Duration::from_secs(60);
/// A case that takes longer hangs.
const CASE_MAX: Duration = Duration::from_secs(120);
/// How long slow work takes: a missing wait shows as wrong bytes.
const SLOW: Duration = Duration::from_millis(2);

/// A runtime and two of its devices, which may be one.
struct Place {
    name: String,
    config: Config,
    devices: [Device; 2],
}

impl Place {
    fn is_cuda(&self) -> bool {
        self.config.emulated_devices == 0 && !self.devices[0].is_host()
    }
}

/// Where the cases run, and why not on CUDA devices.
fn places() -> (Vec<Place>, Option<String>) {
    let base = Config { check: Check::Report, ..Config::from_env().expect("settings that mean something") };
    let host = Config { cuda: Cuda::Off, emulated_devices: 0, ..base.clone() };
    let seeded = |threads: u64, chaos: u64| {
        let threads = (0..threads).map(|seed| CpuMode::Threads { seed });
        let chaos = (0..chaos).map(|seed| CpuMode::Chaos { seed });
        [CpuMode::Inline].into_iter().chain(threads).chain(chaos)
    };
    let mut places = Vec::new();
    for cpu in seeded(3, 8) {
        let config = Config { cpu, ..host.clone() };
        places.push(Place { name: format!("cpu, {cpu:?}"), config, devices: [Device::HOST; 2] });
        let config = Config { cpu, emulated_devices: 2, ..host.clone() };
        places.push(Place { name: format!("emulated, {cpu:?}"), config, devices: [Device::Cuda(0), Device::Cuda(1)] });
    }
    let config = Config { check: Check::Off, ..host };
    places.push(Place { name: "cpu, unchecked".to_owned(), config, devices: [Device::HOST; 2] });

    let probe = Runtime::new(base.clone()).expect("what is required is there");
    if let Some(absent) = probe.cuda_absent() {
        return (places, Some(absent.to_string()));
    }
    let last = *probe.devices().last().expect("the host at least");
    for cpu in seeded(1, 2) {
        let config = Config { cpu, ..base.clone() };
        places.push(Place { name: format!("cuda, {cpu:?}"), config, devices: [Device::Cuda(0), last] });
    }
    let config = Config { check: Check::Off, ..base };
    places.push(Place { name: "cuda, unchecked".to_owned(), config, devices: [Device::Cuda(0), last] });
    (places, None)
}

/// CUDA places if there were a device: what is skipped without one.
const CUDA_PLACES: usize = 5;

type Case = (&'static str, fn(&Runtime, [Device; 2]));

const CASES: &[Case] = &[
    ("a consumer sees a slow producer's bytes", a_consumer_sees_a_slow_producers_bytes),
    ("bytes go from the host to a device and back", bytes_go_from_the_host_to_a_device_and_back),
    ("streams of the host copy from and to devices", streams_of_the_host_copy_from_and_to_devices),
    ("memory that is freed while read is not written", memory_that_is_freed_while_read_is_not_written),
    ("a storage is written again after its readers", a_storage_is_written_again_after_its_readers),
    ("a freeze elsewhere waits for the write", a_freeze_elsewhere_waits_for_the_write),
    ("a value is ordered on a stream", a_value_is_ordered_on_a_stream),
    ("a continuation is ordered behind its value", a_continuation_is_ordered_behind_its_value),
    ("a chain over devices gives the sum of its steps", a_chain_over_devices_gives_the_sum_of_its_steps),
    ("ready means ready", ready_means_ready),
    ("every waiter is told once", every_waiter_is_told_once),
    ("a wait ends in time and the work goes on", a_wait_ends_in_time_and_the_work_goes_on),
    ("things are dropped in any order", things_are_dropped_in_any_order),
    ("memory is reused in the order of its uses", memory_is_reused_in_the_order_of_its_uses),
    ("rows at one distance are packed", rows_at_one_distance_are_packed),
    ("sizes and bytes of fills", sizes_and_bytes_of_fills),
    ("many streams meet in one", many_streams_meet_in_one),
    ("random programs give what a model says", random_programs_give_what_a_model_says),
    #[cfg(feature = "mutants")]
    ("every forgotten wait is reported", every_forgotten_wait_is_reported),
];

fn main() -> ExitCode {
    let word = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    let (places, absent) = places();
    let cases: Vec<_> = CASES.iter().filter(|(name, _)| word.as_ref().is_none_or(|word| name.contains(word))).collect();
    let (mut passed, mut failed, mut on_cuda) = (0, 0, 0);
    for (name, case) in &cases {
        let started = Instant::now();
        for place in &places {
            let watch = watch(format!("{name}, on {}", place.name));
            let outcome = catch_unwind(AssertUnwindSafe(|| run(place, *case)));
            drop(watch);
            on_cuda += usize::from(place.is_cuda());
            match outcome {
                Ok(()) => passed += 1,
                Err(_) => {
                    println!("FAILED: {name}, on {}", place.name);
                    failed += 1;
                }
            }
        }
        println!("{name}: {} runtimes in {:.2} s", places.len(), started.elapsed().as_secs_f64());
    }
    println!("{passed} cases passed, {failed} failed, {on_cuda} of them on CUDA devices");
    if let Some(reason) = absent {
        println!("skipped: {} CUDA cases: {reason}", cases.len() * CUDA_PLACES);
    }
    if failed == 0 && passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run(place: &Place, case: fn(&Runtime, [Device; 2])) {
    let runtime = Runtime::new(place.config.clone()).expect("a runtime");
    case(&runtime, place.devices);
    assert_eq!(runtime.races(), [], "of correct work the checker says nothing");
}

/// Ends the process if the case hangs: a report that says where is better than none.
fn watch(what: String) -> mpsc::Sender<()> {
    let (ended, end) = mpsc::channel();
    std::thread::spawn(move || {
        if end.recv_timeout(CASE_MAX) == Err(mpsc::RecvTimeoutError::Timeout) {
            println!("FAILED: {what} did not end within {CASE_MAX:?}");
            std::process::exit(1);
        }
    });
    ended
}

fn streams<const N: usize>(runtime: &Runtime, device: Device) -> [Stream; N] {
    [(); N].map(|()| runtime.stream(device).expect("a stream"))
}

/// Bytes that `stream` sets slowly.
fn slowly_filled(stream: &Stream, len: usize, byte: u8) -> Storage {
    let mut bytes = stream.alloc(len).expect("memory");
    stream.delay(SLOW).expect("enqueued");
    stream.fill(&mut bytes, byte).expect("enqueued");
    bytes.freeze(stream)
}

fn copied(source: &Storage, stream: &Stream) -> Storage {
    let mut copy = stream.alloc(source.len()).expect("memory");
    stream.copy(source, &mut copy).expect("enqueued");
    copy.freeze(stream)
}

fn tensor_of(storage: Storage) -> Tensor {
    let layout = Layout::contiguous(DType::U8, &[storage.len()]).expect("small");
    Tensor::from_storage(storage, layout).expect("exact")
}

/// What the host sees in the end.
fn bytes(storage: &Storage) -> Vec<u8> {
    tensor_of(storage.clone()).host().wait(LONG).expect("a host copy").to_vec().expect("bytes")
}

fn from_host(runtime: &Runtime, values: &[u8]) -> Storage {
    let mut bytes = runtime.alloc_host(values.len()).expect("memory");
    bytes.as_bytes_mut().expect("nobody else").copy_from_slice(values);
    bytes.freeze_ready()
}

fn a_consumer_sees_a_slow_producers_bytes(runtime: &Runtime, [device, _]: [Device; 2]) {
    let [producer, consumer] = streams(runtime, device);
    let source = slowly_filled(&producer, 70_000, 3);
    assert_eq!(bytes(&copied(&source, &consumer)), [3; 70_000]);
}

fn bytes_go_from_the_host_to_a_device_and_back(runtime: &Runtime, devices: [Device; 2]) {
    for device in devices {
        let stream = runtime.stream(device).expect("a stream");
        let values: Vec<u8> = (0..100_000_u32).map(|index| (index % 251) as u8).collect();
        let mut pinned = runtime.alloc_pinned(values.len()).expect("memory");
        pinned.as_bytes_mut().expect("nobody else").copy_from_slice(&values);
        for source in [pinned.freeze_ready(), from_host(runtime, &values)] {
            if !device.is_host() {
                assert_eq!(bytes(&copied(&source, &stream)), values);
            }
            let there = stream.pack(&tensor_of(source), device).expect("enqueued");
            assert_eq!((there.device(), bytes(there.storage())), (device, values.clone()));
        }
    }
}

fn streams_of_the_host_copy_from_and_to_devices(runtime: &Runtime, [device, _]: [Device; 2]) {
    let [host, other] = streams(runtime, Device::HOST);
    let on_device = slowly_filled(&runtime.stream(device).expect("a stream"), 300, 7);
    let mut back = runtime.alloc_pinned(300).expect("memory");
    host.copy(&on_device, &mut back).expect("enqueued");
    let back = back.freeze(&host);
    let mut there = runtime.alloc(device, 300).expect("memory");
    other.copy(&back, &mut there).expect("enqueued");
    assert_eq!(bytes(&there.freeze(&other)), [7; 300]);
    assert_eq!(bytes(&back), [7; 300]);
}

fn memory_that_is_freed_while_read_is_not_written(runtime: &Runtime, [device, _]: [Device; 2]) {
    let [writer, reader] = streams(runtime, device);
    for round in 0..8_u8 {
        let source = slowly_filled(&writer, 5000, round);
        reader.delay(SLOW).expect("enqueued");
        let copy = copied(&source, &reader);
        drop(source);
        // If the memory came back too early, this is the same, and is written at once.
        let mut other = writer.alloc(5000).expect("memory");
        writer.fill(&mut other, 0xee).expect("enqueued");
        assert_eq!(bytes(&copy), vec![round; 5000]);
        assert_eq!(bytes(&other.freeze(&writer)), [0xee; 5000]);
    }
}

fn a_storage_is_written_again_after_its_readers(runtime: &Runtime, [device, _]: [Device; 2]) {
    let [writer, reader] = streams(runtime, device);
    let source = slowly_filled(&writer, 600, 6);
    reader.delay(SLOW).expect("enqueued");
    let copy = copied(&source, &reader);
    let mut again = source.try_unique().expect("the only holder");
    writer.fill(&mut again, 9).expect("enqueued");
    assert_eq!(bytes(&again.freeze(&writer)), [9; 600]);
    assert_eq!(bytes(&copy), [6; 600]);
}

fn a_freeze_elsewhere_waits_for_the_write(runtime: &Runtime, [device, _]: [Device; 2]) {
    let [writer, other] = streams(runtime, device);
    let mut source = writer.alloc(64).expect("memory");
    writer.delay(SLOW).expect("enqueued");
    writer.fill(&mut source, 6).expect("enqueued");
    assert_eq!(bytes(&source.freeze(&other)), [6; 64]);
}

fn a_value_is_ordered_on_a_stream(runtime: &Runtime, [device, _]: [Device; 2]) {
    let [writer, reader] = streams(runtime, device);
    let source = Ready::new(slowly_filled(&writer, 64, 8)).on(&reader);
    assert_eq!(bytes(&copied(&source, &reader)), [8; 64]);
    let (promise, future) = DeviceFuture::<Storage>::pair();
    promise.complete(slowly_filled(&writer, 64, 9));
    let source = future.on(&reader).wait(LONG).expect("handed over");
    assert_eq!(bytes(&copied(&source, &reader)), [9; 64]);
}

fn a_continuation_is_ordered_behind_its_value(runtime: &Runtime, [device, _]: [Device; 2]) {
    let [writer, next] = streams(runtime, device);
    let source = DeviceFuture::<Storage>::ready(slowly_filled(&writer, 64, 4));
    let copy = source.then(&next, |stream, source| Ok(copied(&source, stream)));
    assert_eq!(bytes(&copy.wait(LONG).expect("ready")), [4; 64]);
}

fn a_chain_over_devices_gives_the_sum_of_its_steps(runtime: &Runtime, devices: [Device; 2]) {
    let mut here = slowly_filled(&runtime.stream(devices[0]).expect("a stream"), 4096, 1);
    for hop in 0..8 {
        let stream = runtime.stream(devices[(hop + 1) % 2]).expect("a stream");
        stream.delay(SLOW / 4).expect("enqueued");
        here = copied(&here, &stream);
    }
    assert_eq!(bytes(&here), [1; 4096]);
}

fn ready_means_ready(runtime: &Runtime, [device, _]: [Device; 2]) {
    let [first, second] = streams(runtime, device);
    let value = DeviceFuture::<Storage>::ready(slowly_filled(&first, 64, 2)).wait(LONG).expect("ready");
    assert!(value.is_ready().expect("no failure"));
    let all = join_all([1, 2, 3].map(|byte| DeviceFuture::<Storage>::ready(slowly_filled(&second, 64, byte))));
    for (index, storage) in all.wait(LONG).expect("ready").iter().enumerate() {
        assert!(storage.is_ready().expect("no failure"));
        assert_eq!(bytes(storage), [index as u8 + 1; 64]);
    }
}

fn every_waiter_is_told_once(runtime: &Runtime, [device, _]: [Device; 2]) {
    let stream = runtime.stream(device).expect("a stream");
    let told = Arc::new(AtomicUsize::new(0));
    let events: Vec<_> = (0..20)
        .map(|byte| {
            let event = slowly_filled(&stream, 64, byte).ready_event().clone();
            for _ in 0..3 {
                let told = Arc::clone(&told);
                event.on_ready(move |outcome| {
                    outcome.expect("no failure");
                    told.fetch_add(1, Ordering::SeqCst);
                });
            }
            event
        })
        .collect();
    std::thread::scope(|scope| {
        for event in &events {
            scope.spawn(|| event.block(LONG).expect("passes"));
        }
    });
    stream.synchronize(LONG).expect("passes");
    let started = Instant::now();
    while told.load(Ordering::SeqCst) < 60 {
        assert!(started.elapsed() < LONG, "{} of 60 were told", told.load(Ordering::SeqCst));
        std::thread::yield_now();
    }
    stream.synchronize(LONG).expect("passes");
    assert_eq!(told.load(Ordering::SeqCst), 60);
}

fn a_wait_ends_in_time_and_the_work_goes_on(runtime: &Runtime, [device, _]: [Device; 2]) {
    let stream = runtime.stream(device).expect("a stream");
    let mut target = stream.alloc(64).expect("memory");
    stream.delay(10 * SLOW).expect("enqueued");
    stream.fill(&mut target, 5).expect("enqueued");
    let event = stream.record();
    match event.block(Duration::from_micros(10)) {
        Ok(()) | Err(DeviceError::Timeout { .. }) => {}
        Err(other) => panic!("{other}"),
    }
    event.block(LONG).expect("passes");
    assert!(event.query().expect("no failure"));
    assert_eq!(bytes(&target.freeze(&stream)), [5; 64]);
}

fn things_are_dropped_in_any_order(runtime: &Runtime, [device, _]: [Device; 2]) {
    for round in 0..6 {
        let [writer, reader] = streams(runtime, device);
        let source = slowly_filled(&writer, 160, 5);
        let copy = copied(&source, &reader);
        let waiting = DeviceFuture::<Storage>::ready(copy.clone());
        let mut things: Vec<Box<dyn std::any::Any>> =
            vec![Box::new(source), Box::new(writer), Box::new(reader), Box::new(waiting)];
        things.swap(0, round % 4);
        things.swap(1, 1 + round % 3);
        drop(things);
        let fresh = runtime.alloc(device, 160).expect("memory");
        assert_eq!(bytes(&copy), [5; 160]);
        drop((copy, fresh));
    }
}

/// A hundred storages through a few blocks: each is freed while it is still read.
fn memory_is_reused_in_the_order_of_its_uses(runtime: &Runtime, [device, _]: [Device; 2]) {
    let lanes: [Stream; 3] = streams(runtime, device);
    let mut copies = Vec::new();
    for index in 0..100_usize {
        let stream = &lanes[index % 3];
        let mut bytes = stream.alloc(9000).expect("memory");
        if index % 10 == 0 {
            stream.delay(SLOW / 2).expect("enqueued");
        }
        stream.fill(&mut bytes, index as u8).expect("enqueued");
        let source = bytes.freeze(stream);
        copies.push(copied(&source, &lanes[(index + 1) % 3]));
    }
    for (index, copy) in copies.iter().enumerate() {
        assert_eq!(bytes(copy), [index as u8; 9000], "storage {index}");
    }
}

fn rows_at_one_distance_are_packed(runtime: &Runtime, [device, _]: [Device; 2]) {
    let stream = runtime.stream(device).expect("a stream");
    let values: Vec<u8> = (0..240).collect();
    let matrix = from_host(runtime, &values);
    let layout = Layout::contiguous(DType::U16, &[10, 12]).expect("small");
    let matrix = Tensor::from_storage(matrix, layout).expect("exact");
    let there = stream.pack(&matrix, device).expect("enqueued");
    let expect = |view: Result<Tensor, DeviceError>, rows: std::ops::Range<usize>, columns: std::ops::Range<usize>| {
        let view = view.expect("a view");
        let row = |row: usize| values[24 * row + 2 * columns.start..24 * row + 2 * columns.end].to_vec();
        let expected: Vec<u8> = rows.flat_map(row).collect();
        let packed = stream.pack(&view, device).expect("enqueued");
        assert_eq!(bytes(packed.storage()), expected);
        let host = stream.pack(&view, Device::HOST).expect("enqueued");
        assert_eq!((host.device(), bytes(host.storage())), (Device::HOST, expected));
    };
    expect(there.narrow(0, 3, 4), 3..7, 0..12);
    expect(there.narrow(1, 5, 3), 0..10, 5..8);
    expect(there.narrow(1, 11, 1), 0..10, 11..12);
    expect(there.narrow(1, 2, 6).and_then(|view| view.narrow(0, 1, 8)), 1..9, 2..8);
}

fn sizes_and_bytes_of_fills(runtime: &Runtime, [device, _]: [Device; 2]) {
    let stream = runtime.stream(device).expect("a stream");
    for len in [1, 2, 15, 16, 17, 255, 4096, 100_003] {
        for by_kernel in [false, true] {
            let mut target = stream.alloc(len).expect("memory");
            stream.fill(&mut target, 0x11).expect("enqueued");
            let fill = if by_kernel { Stream::fill_by_kernel } else { Stream::fill };
            fill(&stream, &mut target, 0xc3).expect("enqueued");
            assert_eq!(bytes(&target.freeze(&stream)), vec![0xc3; len], "{len} bytes, by kernel: {by_kernel}");
        }
    }
}

fn many_streams_meet_in_one(runtime: &Runtime, devices: [Device; 2]) {
    let lanes: [Stream; 12] = streams(runtime, devices[0]);
    let last = runtime.stream(devices[1]).expect("a stream");
    let parts: Vec<_> = lanes.iter().enumerate().map(|(index, lane)| slowly_filled(lane, 512, index as u8)).collect();
    let copies: Vec<_> = parts.iter().map(|part| copied(part, &last)).collect();
    last.record().block(LONG).expect("passes");
    for (index, copy) in copies.iter().enumerate() {
        assert!(copy.is_ready().expect("no failure"), "all of them lie before the last event");
        assert_eq!(bytes(copy), [index as u8; 512]);
    }
    // An event that another stream waits for by hand.
    let mut target = lanes[0].alloc(64).expect("memory");
    lanes[1].delay(SLOW).expect("enqueued");
    let event: Event = lanes[1].record();
    lanes[0].wait(&event);
    lanes[0].fill(&mut target, 1).expect("enqueued");
    target.freeze(&lanes[0]).ready_event().block(LONG).expect("passes");
    assert!(event.query().expect("no failure"));
}

/// xorshift64*
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % end
    }
}

/// Streams fill, copy, drop and rewrite storages at random; the model is a byte for each.
fn random_programs_give_what_a_model_says(runtime: &Runtime, devices: [Device; 2]) {
    for seed in 1..=4_u64 {
        let mut random = Random(seed);
        let lanes: Vec<Stream> = (0..4).map(|index| runtime.stream(devices[index % 2]).expect("a stream")).collect();
        let mut held: Vec<(Storage, u8)> = Vec::new();
        for step in 0..120 {
            let lane = &lanes[random.below(lanes.len())];
            match random.below(8) {
                0..3 => {
                    let mut bytes = lane.alloc(1 + random.below(3000)).expect("memory");
                    lane.fill(&mut bytes, step).expect("enqueued");
                    held.push((bytes.freeze(lane), step));
                }
                3..5 if !held.is_empty() => {
                    let (source, byte) = &held[random.below(held.len())];
                    held.push((copied(source, lane), *byte));
                }
                5 if !held.is_empty() => drop(held.swap_remove(random.below(held.len()))),
                6 if !held.is_empty() => {
                    let (storage, byte) = held.swap_remove(random.below(held.len()));
                    let own = lanes.iter().find(|lane| lane.device() == storage.device()).expect("one of its device");
                    match storage.try_unique() {
                        Ok(mut unique) => {
                            own.fill(&mut unique, step).expect("enqueued");
                            held.push((unique.freeze(own), step));
                        }
                        Err(shared) => held.push((shared, byte)),
                    }
                }
                _ => lane.delay(Duration::from_micros(random.below(300) as u64)).expect("enqueued"),
            }
        }
        for (storage, byte) in &held {
            assert_eq!(bytes(storage), vec![*byte; storage.len()], "seed {seed}");
        }
    }
}

/// A wait that this crate forgets is reported when the work is enqueued, whatever the timing, on any device.
#[cfg(feature = "mutants")]
fn every_forgotten_wait_is_reported(_: &Runtime, [device, _]: [Device; 2]) {
    use farcall_device::mutants::{count_edges, without_edge};
    let emulated_devices = Config::from_env().expect("settings that mean something").emulated_devices;
    let cpu = CpuMode::Chaos { seed: 1 };
    let fresh = || {
        let config = Config { emulated_devices, cpu, check: Check::Report, ..Config::default() };
        let runtime = Runtime::new(config).expect("a runtime");
        // Devices of places that are emulated on request.
        if runtime.devices().contains(&device) { runtime } else { emulated() }
    };
    fn emulated() -> Runtime {
        let cpu = CpuMode::Chaos { seed: 1 };
        Runtime::new(Config { emulated_devices: 2, cpu, check: Check::Report, ..Config::default() }).expect("a runtime")
    }
    let program = |runtime: &Runtime| {
        let [writer, reader] = streams(runtime, device);
        let source = slowly_filled(&writer, 64, 3);
        let copy = copied(&source, &reader);
        let mut again = source.try_unique().expect("the only holder");
        writer.fill(&mut again, 4).expect("enqueued");
        drop(again);
        let more = copied(&copy, &writer);
        drop(copy);
        for stream in [&writer, &reader] {
            stream.synchronize(LONG).expect("passes");
        }
        drop(more);
    };
    let runtime = fresh();
    let ((), edges) = count_edges(&runtime, || program(&runtime));
    assert!(edges >= 3, "{edges} waits");
    assert_eq!(runtime.races(), []);
    for edge in 0..edges {
        let runtime = fresh();
        without_edge(&runtime, edge, || program(&runtime));
        assert!(!runtime.races().is_empty(), "wait {edge} of {edges} was left out and nobody said so");
    }
}
