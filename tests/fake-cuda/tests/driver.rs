//! The real CUDA backend against a driver that is absent, broken, slow, short of memory, or dying. Each test runs in a process of
//! its own. What needs order, `crates/device/tests/suite.rs` has.
#![expect(unsafe_code, reason = "asks the fake driver for its counts")]

mod harness;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use farcall_device::cuda::{Answer, Unavailable, capabilities, probe};
use farcall_device::{
    Check, Config, Cuda, Device, DeviceError, DeviceFuture, Event, Runtime, Storage, StorageMut, Stream,
};
use harness::{Library, calls, in_child};

const LONG: Duration = Duration::from_secs(30);
const CUDA: Device = Device::Cuda(0);

fn runtime() -> Runtime {
    Runtime::new(Config { check: Check::Panic, ..Config::default() }).expect("a runtime")
}

fn filled(stream: &Stream, len: usize, byte: u8) -> Storage {
    let mut bytes = stream.alloc(len).expect("memory");
    stream.fill(&mut bytes, byte).expect("enqueued");
    bytes.freeze(stream)
}

/// What the host sees in the end.
fn bytes(stream: &Stream, storage: &Storage) -> Result<Vec<u8>, DeviceError> {
    let mut back = stream.runtime().alloc_pinned(storage.len())?;
    stream.copy(storage, &mut back)?;
    let back = DeviceFuture::<Storage>::ready(back.freeze(stream)).wait(LONG)?;
    Ok(back.as_bytes()?.to_vec())
}

/// The reason that a process with this library and these variables gives; it goes on with the host alone.
fn absence(test: &str, library: Library, variables: &[(&str, &str)], expected: fn(&Unavailable) -> bool) {
    in_child(test, library, variables, || {
        let runtime = Runtime::new(Config::default()).expect("the host is there");
        let reason = runtime.cuda_absent().expect("no device").clone();
        assert!(expected(&reason), "{reason:?}");
        assert_eq!(runtime.devices(), [Device::HOST]);
        assert_eq!(probe().expect_err("no device"), reason);
        let error = runtime.stream(CUDA).expect_err("no device").to_string();
        assert_eq!(error, format!("cuda:0 is not available: {reason}"));
        assert!(runtime.alloc(CUDA, 1).is_err() && capabilities(CUDA).is_err());
        let required = Runtime::new(Config { cuda: Cuda::Require, ..Config::default() });
        assert!(matches!(required, Err(DeviceError::Unavailable { device: CUDA, .. })));
        let stream = runtime.stream(Device::HOST).expect("the host");
        assert_eq!(filled(&stream, 4, 1).as_bytes().expect("ready"), [1; 4]);
    });
}

#[test]
fn without_a_library_there_is_no_driver() {
    absence(
        "without_a_library_there_is_no_driver",
        Library::None,
        &[],
        |reason| matches!(reason, Unavailable::NoDriver { reason } if reason.contains("libcuda.so.1")),
    );
}

#[test]
fn a_library_without_one_call_is_no_driver() {
    absence("a_library_without_one_call_is_no_driver", Library::Without("cuEventQuery"), &[], |reason| {
        *reason == Unavailable::MissingSymbol { name: "cuEventQuery" }
    });
}

#[test]
fn a_machine_without_a_device_says_so() {
    let variables = [("FAKE_CUDA_INIT", "100")];
    absence("a_machine_without_a_device_says_so", Library::Fake, &variables, |reason| *reason == Unavailable::NoDevice);
}

#[test]
fn a_driver_that_shows_no_device_says_so() {
    let variables = [("FAKE_CUDA_DEVICES", "0")];
    absence("a_driver_that_shows_no_device_says_so", Library::Fake, &variables, |reason| {
        *reason == Unavailable::NoDevice
    });
}

#[test]
fn the_toolkits_stub_is_named() {
    absence("the_toolkits_stub_is_named", Library::Fake, &[("FAKE_CUDA_INIT", "34")], |reason| {
        matches!(reason, Unavailable::Driver { code: 34, name: "CUDA_ERROR_STUB_LIBRARY" })
            && reason.to_string().contains("take its folder out of LD_LIBRARY_PATH")
    });
}

#[test]
fn a_driver_that_does_not_start_gives_its_code() {
    absence(
        "a_driver_that_does_not_start_gives_its_code",
        Library::Fake,
        &[("FAKE_CUDA_REFUSE", "cuInit=803")],
        |reason| matches!(reason, Unavailable::Driver { code: 803, .. }),
    );
}

#[test]
fn a_driver_that_is_too_old_says_which_is_needed() {
    absence(
        "a_driver_that_is_too_old_says_which_is_needed",
        Library::Fake,
        &[("FAKE_CUDA_VERSION", "11080")],
        |reason| {
            matches!(reason, Unavailable::TooOld { .. }) && reason.to_string().contains("for CUDA 11.8, 12.0 is needed")
        },
    );
}

#[test]
fn what_is_switched_off_or_emulated_is_not_even_loaded() {
    let test = "what_is_switched_off_or_emulated_is_not_even_loaded";
    in_child(test, Library::Fake, &[], || {
        let off = Runtime::new(Config { cuda: Cuda::Off, ..Config::default() }).expect("a runtime");
        let emulated = Runtime::new(Config { emulated_devices: 1, ..Config::default() }).expect("a runtime");
        let unasked = Runtime::new(Config::default()).expect("a runtime");
        let host = unasked.stream(Device::HOST).expect("the host");
        assert_eq!(filled(&host, 4, 1).as_bytes().expect("ready"), [1; 4]);
        assert_eq!(
            (off.cuda_absent(), emulated.cuda_absent()),
            (Some(&Unavailable::Off), Some(&Unavailable::Emulated))
        );
        let maps = std::fs::read_to_string("/proc/self/maps").expect("our own maps");
        assert!(!maps.contains("libcuda"), "nothing needed a device so far");
        assert!(unasked.devices().contains(&CUDA));
        let maps = std::fs::read_to_string("/proc/self/maps").expect("our own maps");
        assert!(maps.contains("libcuda"));
    });
}

#[test]
fn without_a_driver_the_answer_takes_5_ms_at_most() {
    let test = "without_a_driver_the_answer_takes_5_ms_at_most";
    // Of a few: the machine may be busy.
    let quick = (0..5).any(|_| {
        let printed = in_child(test, Library::None, &[], || {
            let started = Instant::now();
            assert!(Runtime::new(Config::default()).expect("the host").cuda_absent().is_some());
            println!("took {} us.", started.elapsed().as_micros());
        });
        let Some(printed) = printed else { return true };
        let taken =
            printed.lines().find_map(|line| line.split("took ").nth(1)?.strip_suffix(" us.")?.parse::<u64>().ok());
        let taken = taken.expect("the child says how long it took");
        println!("{taken} us");
        taken <= 5000
    });
    assert!(quick);
}

#[test]
fn devices_are_described() {
    in_child("devices_are_described", Library::Fake, &[("FAKE_CUDA_DEVICES", "3")], || {
        let runtime = runtime();
        assert_eq!(runtime.devices(), [Device::HOST, CUDA, Device::Cuda(1), Device::Cuda(2)]);
        assert!(!runtime.is_emulated(CUDA));
        let info = runtime.cuda_info(Device::Cuda(2)).expect("there are three");
        assert_eq!(
            (&*info.name, info.capability.to_string(), info.memory_bytes),
            ("Fake GPU", "9.0".to_owned(), 1 << 30)
        );
        let error = runtime.stream(Device::Cuda(3)).expect_err("there are three").to_string();
        assert_eq!(error, "cuda:3 is not available: the driver shows 3 CUDA devices, from cuda:0 on");
        let (version, devices) = probe().expect("a driver");
        assert_eq!((version.to_string(), devices.len()), ("13.0".to_owned(), 3));
    });
}

#[test]
fn a_refused_or_missing_capability_is_an_answer() {
    in_child("a_refused_or_missing_capability_is_an_answer", Library::Fake, &[], || {
        let found = capabilities(CUDA).expect("a device");
        let answer = |name| &found.iter().find(|found| found.name == name).expect("asked").answer;
        assert_eq!(*answer("compute_capability_major"), Answer::Value(9));
        assert_eq!(*answer("ipc_memory_handle"), Answer::Refused { code: 801, name: "CUDA_ERROR_NOT_SUPPORTED" });
        assert_eq!((answer("stream_write_value_64"), answer("host_register")), (&Answer::Missing, &Answer::Works));
        assert_eq!(*answer("kernels_compile"), Answer::Works);
    });
}

/// K1: whoever waits is told, by whatever means, and new work is refused.
#[test]
fn a_fault_reaches_every_waiter_and_refuses_new_work() {
    let variables = [("FAKE_CUDA_FAULT_AFTER", "2"), ("FAKE_CUDA_DEVICES", "2")];
    in_child("a_fault_reaches_every_waiter_and_refuses_new_work", Library::Fake, &variables, || {
        let runtime = runtime();
        let [first, second] = [(); 2].map(|()| runtime.stream(CUDA).expect("a stream"));
        let good = filled(&first, 100, 1);
        good.ready_event().block(LONG).expect("before the fault");
        // The gate lets the fault happen only once everybody waits.
        // The first of the fills behind the gate faults: what came before it would be complete for whoever asks in time.
        first.delay(Duration::from_millis(50)).expect("enqueued");
        let (a, b) = (filled(&first, 100, 2), filled(&first, 100, 3));
        let mut copy = second.alloc(100).expect("memory");
        second.copy(&b, &mut copy).expect("enqueued");
        let copy = copy.freeze(&second);
        let (told, hear) = mpsc::channel();
        for storage in [&a, &b, &copy] {
            let told = told.clone();
            storage.ready_event().on_ready(move |outcome| told.send(outcome).expect("the test hears"));
        }
        std::thread::scope(|scope| {
            let blocked = scope.spawn(|| copy.ready_event().block(LONG));
            let awaited = scope.spawn(|| DeviceFuture::<Storage>::ready(copy.clone()).wait(LONG));
            assert!(matches!(blocked.join().expect("no panic"), Err(DeviceError::Lost { device: CUDA, .. })));
            assert!(matches!(awaited.join().expect("no panic"), Err(DeviceError::Lost { device: CUDA, .. })));
        });
        for _ in 0..3 {
            let outcome = hear.recv_timeout(LONG).expect("told");
            let text = outcome.expect_err("lost").to_string();
            assert!(text.starts_with("cuda:0 was lost: CUDA_ERROR_ILLEGAL_ADDRESS (700), reported by "), "{text}");
        }
        assert!(matches!(copy.is_ready(), Err(DeviceError::Lost { .. })));
        assert!(matches!(runtime.stream(CUDA), Err(DeviceError::Lost { .. })));
        assert!(matches!(runtime.alloc(CUDA, 1), Err(DeviceError::Lost { .. })));
        let mut target = runtime.alloc_host(100).expect("the host's memory");
        assert!(matches!(first.copy(&a, &mut target), Err(DeviceError::Lost { .. })));
        assert!(matches!(first.record().block(LONG), Err(DeviceError::Lost { .. })));
        // What was complete stays so, and the other device and the host go on.
        assert!(good.is_ready().expect("it was seen to pass"));
        let other = runtime.stream(Device::Cuda(1)).expect("another device");
        assert_eq!(bytes(&other, &filled(&other, 10, 7)).expect("it goes on"), [7; 10]);
        drop((a, b, copy, good, first, second));
    });
}

#[test]
fn what_follows_a_lost_device_elsewhere_fails_too() {
    let variables = [("FAKE_CUDA_FAULT_AFTER", "1"), ("FAKE_CUDA_DEVICES", "2")];
    in_child("what_follows_a_lost_device_elsewhere_fails_too", Library::Fake, &variables, || {
        let runtime = runtime();
        let stream = runtime.stream(CUDA).expect("a stream");
        stream.delay(Duration::from_millis(5)).expect("enqueued");
        let source = filled(&stream, 16, 1);
        assert!(matches!(source.ready_event().block(LONG), Err(DeviceError::Lost { .. })));
        for device in [Device::Cuda(1), Device::HOST] {
            let stream = runtime.stream(device).expect("a stream");
            let mut target = stream.alloc(16).expect("memory");
            assert!(
                matches!(stream.copy(&source, &mut target), Err(DeviceError::Lost { device: CUDA, .. })),
                "{device}"
            );
        }
        drop(source);
    });
}

#[test]
fn a_full_device_is_out_of_memory_and_goes_on() {
    let variables = [("FAKE_CUDA_MEMORY_BYTES", "50000000")];
    in_child("a_full_device_is_out_of_memory_and_goes_on", Library::Fake, &variables, || {
        let runtime = runtime();
        let stream = runtime.stream(CUDA).expect("a stream");
        let error = runtime.alloc(CUDA, 60_000_000).expect_err("too much");
        assert!(matches!(error, DeviceError::OutOfMemory { device: CUDA, want_bytes: 60_000_000, mapped_bytes: 0 }));
        // A shared slab of 64 MiB does not fit; a block of its own does.
        let small = filled(&stream, 1000, 1);
        let large: Vec<StorageMut> = std::iter::from_fn(|| runtime.alloc(CUDA, 10_000_000).ok()).collect();
        assert_eq!(large.len(), 4);
        let error = runtime.alloc(CUDA, 10_000_000).expect_err("full").to_string();
        assert!(error.starts_with("out of memory on cuda:0: wanted 10000000 bytes, 4"), "{error}");
        drop(large);
        // Idle memory of another class goes back to the driver first.
        assert_eq!(calls("cuMemFree_v2"), 0);
        let other = filled(&stream, 30_000_000, 2);
        assert!(calls("cuMemFree_v2") > 0);
        assert_eq!(bytes(&stream, &small).expect("no harm"), [1; 1000]);
        assert_eq!(bytes(&stream, &other).expect("no harm").len(), 30_000_000);
    });
}

/// K2: nothing on the hot path creates, allocates, frees, or waits.
#[test]
fn after_warm_up_the_driver_is_asked_for_work_alone() {
    in_child("after_warm_up_the_driver_is_asked_for_work_alone", Library::Fake, &[("FAKE_CUDA_SEED", "0")], || {
        let runtime = runtime();
        let [first, second] = [(); 2].map(|()| runtime.stream(CUDA).expect("a stream"));
        let round = || {
            let source = filled(&first, 5000, 1);
            let mut copy = second.alloc(5000).expect("memory");
            second.copy(&source, &mut copy).expect("enqueued");
            assert_eq!(bytes(&second, &copy.freeze(&second)).expect("there"), [1; 5000]);
        };
        (0..20).for_each(|_| round());
        let costly = [
            "cuStreamCreate",
            "cuMemAlloc_v2",
            "cuMemFree_v2",
            "cuMemHostAlloc",
            "cuMemFreeHost",
            "cuModuleLoadData",
            "cuDevicePrimaryCtxRetain",
            "cuInit",
        ];
        let before = costly.map(calls);
        let (events, set) = (calls("cuEventCreate"), calls("cuCtxSetCurrent"));
        (0..200).for_each(|_| round());
        assert_eq!(costly.map(calls), before, "{costly:?}");
        // As many as can be pending at a time, whatever the number of rounds.
        assert!(calls("cuEventCreate") - events < 64, "{} more events", calls("cuEventCreate") - events);
        assert!(calls("cuCtxSetCurrent") - set < 8, "the context stays current on a thread that has no other");
        assert!(calls("cuStreamWaitEvent") >= 200, "streams wait for each other on the device");
        let stats = runtime.cuda_stats(CUDA).expect("memory was taken");
        assert_eq!((stats.slabs, stats.live_bytes), (1, 0));
    });
}

/// K3: a thread that belongs to another library's context has it again afterwards.
#[test]
fn the_callers_own_context_is_left_as_it_was() {
    in_child("the_callers_own_context_is_left_as_it_was", Library::Fake, &[], || {
        let runtime = runtime();
        let [first, second] = [CUDA, Device::Cuda(1)].map(|device| runtime.stream(device).expect("a stream"));
        // SAFETY: the fake driver is loaded, and has these calls.
        let library = unsafe { libloading::Library::new("libcuda.so.1") }.expect("the fake driver");
        type Set = unsafe extern "C" fn(usize) -> u32;
        type Ask = unsafe extern "C" fn(*mut usize) -> u32;
        // SAFETY: as declared.
        let (set, ask) = unsafe { (library.get::<Set>("cuCtxSetCurrent"), library.get::<Ask>("cuCtxGetCurrent")) };
        let (set, ask) = (set.expect("there"), ask.expect("there"));
        for own in [1, 2] {
            // SAFETY: the fake driver's contexts are numbers from 1.
            assert_eq!(unsafe { set(own) }, 0);
            let source = filled(&first, 64, 9);
            let mut copy = second.alloc(64).expect("memory");
            second.copy(&source, &mut copy).expect("enqueued");
            assert_eq!(bytes(&second, &copy.freeze(&second)).expect("there"), [9; 64]);
            let mut current = 0;
            // SAFETY: a live out pointer.
            assert_eq!((unsafe { ask(&raw mut current) }, current), (0, own));
        }
    });
}

#[test]
fn a_driver_that_cannot_compile_kernels_refuses_those_alone() {
    let variables = [("FAKE_CUDA_REFUSE", "cuModuleLoadData=222")];
    in_child("a_driver_that_cannot_compile_kernels_refuses_those_alone", Library::Fake, &variables, || {
        let runtime = runtime();
        let stream = runtime.stream(CUDA).expect("a stream");
        let error = stream.delay(Duration::from_millis(1)).expect_err("no kernel").to_string();
        assert_eq!(error, "cuda:0: cuModuleLoadData failed: CUDA_ERROR_UNSUPPORTED_PTX_VERSION (222)");
        assert_eq!(bytes(&stream, &filled(&stream, 64, 9)).expect("needs no kernel"), [9; 64]);
    });
}

/// Without events there is no order to keep: the device is given up, and nobody hangs.
#[test]
fn a_driver_that_cannot_record_loses_its_device() {
    let variables = [("FAKE_CUDA_REFUSE", "cuEventRecord=2")];
    in_child("a_driver_that_cannot_record_loses_its_device", Library::Fake, &variables, || {
        let runtime = runtime();
        let stream = runtime.stream(CUDA).expect("a stream");
        let storage = filled(&stream, 64, 1);
        assert!(matches!(storage.ready_event().block(LONG), Err(DeviceError::Lost { .. })));
        assert!(matches!(stream.synchronize(LONG), Err(DeviceError::Lost { .. })));
    });
}

#[test]
fn what_a_device_cannot_do_is_a_typed_refusal() {
    in_child("what_a_device_cannot_do_is_a_typed_refusal", Library::Fake, &[], || {
        let runtime = runtime();
        let [cuda, host] = [CUDA, Device::HOST].map(|device| runtime.stream(device).expect("a stream"));
        let mut bytes = cuda.alloc(16).expect("memory");
        let kernel = |_: &[&[u8]], _: &mut [u8]| {};
        assert!(matches!(cuda.launch(&[], &mut bytes, kernel), Err(DeviceError::Unsupported { device: CUDA, .. })));
        assert!(matches!(bytes.as_bytes_mut(), Err(DeviceError::NotHost { device: CUDA })));
        assert!(matches!(host.fill(&mut bytes, 1), Err(DeviceError::WrongDevice { .. })));
        let source = runtime.alloc_host(16).expect("memory").freeze_ready();
        let mut target = runtime.alloc_host(16).expect("memory");
        assert!(matches!(cuda.copy(&source, &mut target), Err(DeviceError::Unsupported { device: CUDA, .. })));
        // Columns of a transposed matrix are no rows at one distance.
        let matrix = farcall_device::Tensor::from_slice(&[0_u8; 24], &[2, 3, 4]).expect("small");
        let there = cuda.pack(&matrix, CUDA).expect("enqueued");
        let turned = there.permute(&[2, 0, 1]).expect("a view");
        assert!(matches!(cuda.pack(&turned, Device::HOST), Err(DeviceError::Unsupported { device: CUDA, .. })));
        // From the host it is packed there first.
        let turned = matrix.permute(&[2, 0, 1]).expect("a view");
        assert_eq!(cuda.pack(&turned, CUDA).expect("packed").shape(), [4, 2, 3]);
    });
}

/// A token is not the driver's: enqueuing behind it blocks, as inline; asking for a host copy does not.
#[test]
fn work_behind_a_token_waits_for_it() {
    in_child("work_behind_a_token_waits_for_it", Library::Fake, &[], || {
        let runtime = runtime();
        let stream = runtime.stream(CUDA).expect("a stream");
        let (token, arrives) = Event::token(&runtime);
        let late = runtime.alloc_host(16).expect("memory").freeze_at(arrives.clone());
        std::thread::scope(|scope| {
            let copying = scope.spawn(|| {
                let mut there = stream.alloc(16).expect("memory");
                stream.copy(&late, &mut there).expect("enqueued");
                assert!(arrives.query().expect("no failure"), "not before it");
                there.freeze(&stream)
            });
            token.complete();
            assert_eq!(bytes(&stream, &copying.join().expect("no panic")).expect("there").len(), 16);
        });
        let (token, arrives) = Event::token(&runtime);
        stream.wait(&arrives);
        let after = stream.record();
        assert!(!after.query().expect("no failure"), "a point behind a token is pending, and nobody was blocked");
        drop(token);
        assert!(matches!(after.block(LONG), Err(DeviceError::Cancelled)));
        let mut target = stream.alloc(16).expect("memory");
        assert!(matches!(stream.fill(&mut target, 1), Err(DeviceError::Cancelled)), "what it waits for has failed");
    });
}

#[test]
fn a_callback_that_panics_takes_nobody_with_it() {
    let test = "a_callback_that_panics_takes_nobody_with_it";
    in_child(test, Library::Fake, &[], || {
        let runtime = runtime();
        let stream = runtime.stream(CUDA).expect("a stream");
        let count = Arc::new(AtomicUsize::new(0));
        stream.delay(Duration::from_millis(5)).expect("enqueued");
        let event = stream.record();
        // Without the hook's message: standard error stays empty.
        event.on_ready(|_| std::panic::resume_unwind(Box::new("in a callback")));
        let (told, hear) = mpsc::channel();
        let counter = Arc::clone(&count);
        event.on_ready(move |outcome| {
            counter.fetch_add(1, Ordering::SeqCst);
            told.send(outcome).expect("the test hears");
        });
        hear.recv_timeout(LONG).expect("told").expect("no failure");
        stream.delay(Duration::from_millis(1)).expect("enqueued");
        stream.record().block(LONG).expect("the notifier lives");
        assert_eq!(count.load(Ordering::SeqCst), 1);
    });
}

/// G2, G3: the fake driver faults when work reaches memory that was freed.
#[test]
fn a_runtime_that_ends_leaves_its_memory_to_the_work_that_uses_it() {
    let test = "a_runtime_that_ends_leaves_its_memory_to_the_work_that_uses_it";
    in_child(test, Library::Fake, &[], || {
        for round in 0..20 {
            let runtime = runtime();
            let [first, second] = [(); 2].map(|()| runtime.stream(CUDA).expect("a stream"));
            first.delay(Duration::from_millis(3)).expect("enqueued");
            let source = filled(&first, 9_000_000, round);
            let mut copy = second.alloc(9_000_000).expect("memory");
            second.copy(&source, &mut copy).expect("enqueued");
            let last = second.record();
            drop((source, copy, runtime));
            drop((first, second));
            last.block(LONG).expect("no fault");
        }
        let runtime = runtime();
        let stream = runtime.stream(CUDA).expect("a stream");
        assert_eq!(bytes(&stream, &filled(&stream, 8, 1)).expect("the device is well"), [1; 8]);
        assert!(calls("cuMemFree_v2") > 0, "large slabs went back");
    });
}

/// G2: what failed or never comes of a block's former life is not its next holder's concern.
#[test]
fn memory_behind_a_token_is_not_handed_on_before_it() {
    in_child("memory_behind_a_token_is_not_handed_on_before_it", Library::Fake, &[], || {
        let runtime = runtime();
        let stream = runtime.stream(CUDA).expect("a stream");
        let (token, arrives) = Event::token(&runtime);
        let late = runtime.alloc(CUDA, 10_000_000).expect("memory").freeze_at(arrives);
        let address = late.as_ptr() as usize;
        drop(late);
        // A NIC may be writing there: other memory, and no wait.
        let other = filled(&stream, 10_000_000, 4);
        assert_ne!(other.as_ptr() as usize, address);
        assert_eq!(bytes(&stream, &other).expect("no failure").len(), 10_000_000);
        drop(token);
        let again = filled(&stream, 10_000_000, 5);
        assert_eq!(again.as_ptr() as usize, address, "now it is free");
        assert_eq!(bytes(&stream, &again).expect("the token's failure is not ours")[0], 5);
    });
}

#[test]
fn memory_that_is_still_in_use_is_waited_for_before_a_device_is_called_full() {
    let variables = [("FAKE_CUDA_MEMORY_BYTES", "50000000")];
    let test = "memory_that_is_still_in_use_is_waited_for_before_a_device_is_called_full";
    in_child(test, Library::Fake, &variables, || {
        let runtime = runtime();
        let stream = runtime.stream(CUDA).expect("a stream");
        stream.delay(Duration::from_millis(20)).expect("enqueued");
        drop(filled(&stream, 30_000_000, 1));
        // Another class: the first block has to go back to the driver, and is in use.
        assert_eq!(bytes(&stream, &filled(&stream, 40_000_000, 2)).expect("room").len(), 40_000_000);
    });
}

#[test]
fn points_that_nobody_asks_about_do_not_pile_up() {
    let test = "points_that_nobody_asks_about_do_not_pile_up";
    in_child(test, Library::Fake, &[("FAKE_CUDA_SEED", "0")], || {
        let runtime = Runtime::new(Config { check: Check::Off, ..Config::default() }).expect("a runtime");
        let [cuda, host] = [CUDA, Device::HOST].map(|device| runtime.stream(device).expect("a stream"));
        let source = filled(&cuda, 64, 3);
        let events = calls("cuEventCreate");
        for round in 0..500 {
            let mut back = runtime.alloc_pinned(64).expect("memory");
            // On a stream of the host, which itself never runs anything behind the copies.
            host.copy(&source, &mut back).expect("enqueued");
            if round % 50 == 0 {
                host.synchronize(LONG).expect("passes");
            }
        }
        assert!(calls("cuEventCreate") - events < 150, "{} events", calls("cuEventCreate") - events);
        assert_eq!(runtime.pinned_stats().expect("taken").slabs, 1);
        let mut back = runtime.alloc_pinned(64).expect("memory");
        host.copy(&source, &mut back).expect("enqueued");
        let back = DeviceFuture::<Storage>::ready(back.freeze(&host)).wait(LONG).expect("there");
        assert_eq!(back.as_bytes().expect("ready"), [3; 64]);
    });
}
