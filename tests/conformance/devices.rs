//! Tensors of emulated devices, and tensors that are not ready: FENCE and READY over the wire, in every stream mode.
//!
//! The checker panics on any missing wait, at whichever end.

use std::time::Duration;

use farcall::device::{Check, Config, CpuMode, Cuda, Event, mutants};
use farcall::prelude::*;
use farcall::{DeviceError, DeviceMap, Reply, Runtime, StoreServer, TensorMut};

use crate::functions::{device_of, double_on_device, echo, order};
use crate::harness::{Group, block_on, bounded, step, unique};

/// Inline, three runs of threads, eight of chaos: a seed that fails is in the message.
fn modes() -> Vec<CpuMode> {
    let threads = (1..=3).map(|seed| CpuMode::Threads { seed });
    let chaos = (1..=8).map(|seed| CpuMode::Chaos { seed });
    [CpuMode::Inline].into_iter().chain(threads).chain(chaos).collect()
}

/// A group whose workers each have a runtime of their own, with two emulated devices.
fn group(cpu: CpuMode, devices_of: impl Fn(u32) -> u16) -> Group {
    Group::with(2, |options| {
        let config =
            Config { emulated_devices: devices_of(options.rank), cpu, check: Check::Panic, ..Config::default() };
        options.device_runtime = Some(Runtime::new(config).expect("an emulated runtime"));
    })
}

/// 0, 1, 2, … on `device`, written there by a stream, perhaps later.
fn counting_on(runtime: &Runtime, device: Device, len: usize) -> Tensor {
    let stream = runtime.stream(device).expect("an emulated device");
    let mut storage = stream.alloc(len * 4).expect("memory");
    let kernel = |_: &[&[u8]], bytes: &mut [u8]| {
        for (index, element) in bytes.chunks_exact_mut(4).enumerate() {
            element.copy_from_slice(&(index as f32).to_le_bytes());
        }
    };
    stream.launch(&[], &mut storage, kernel).expect("enqueued");
    TensorMut::from_storage(storage, DType::F32, &[len]).expect("exact").freeze(&stream)
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    block_on(tensor.host()).expect("a host copy").to_vec::<f32>().expect("f32")
}

#[test]
fn tensors_of_devices_arrive_on_the_same_device_and_are_ready() {
    for mode in modes() {
        bounded(move || {
            let group = group(mode, |_| 2);
            let (agent, w1) = (&group.agents[0], group.agents[0].to("w1"));
            // Inline in the frame, and on the bulk connection.
            for len in [5, 100_000] {
                for device in [Device::Cuda(0), Device::Cuda(1)] {
                    let x = counting_on(agent.runtime(), device, len);
                    let expected: Vec<f32> = (0..len).map(|index| 2.0 * index as f32).collect();
                    let y = w1.call(double_on_device, (&x,)).wait().expect("doubled");
                    assert_eq!((y.device(), floats(&y)), (device, expected.clone()), "{mode:?}");
                    let y = block_on(w1.call(double_on_device, (&x,)).into_future()).expect("doubled");
                    assert!(y.storage().is_ready().expect("no failure"), "READY, {mode:?}");
                    let stream = agent.runtime().stream(device).expect("a device");
                    let y = block_on(w1.call(double_on_device, (&x,)).on(&stream)).expect("doubled");
                    assert_eq!(floats(&y), expected, "{mode:?}");
                }
            }
            // A view with gaps is packed behind its writes.
            let x = counting_on(agent.runtime(), Device::Cuda(1), 12).reshape(&[3, 4]).expect("a view");
            let y = w1.call(echo, (x.narrow(1, 1, 2).expect("a view"),)).wait().expect("there and back");
            assert_eq!(floats(&y), [1.0, 2.0, 5.0, 6.0, 9.0, 10.0], "{mode:?}");
            assert!(agent.runtime().races().is_empty(), "{mode:?}");
            group.shutdown();
        });
    }
}

const DOUBLED: [f32; 5] = [0.0, 2.0, 4.0, 6.0, 8.0];

/// A call with a tensor of a device: produced on one stream, doubled by the callee on another, ordered on a third of the
/// caller's and read by a fourth; then the same awaited by the host, and by a blocked thread.
fn call_on_devices(group: &Group) -> Result<Vec<f32>, String> {
    let (agent, w1) = (&group.agents[0], group.agents[0].to("w1"));
    let stream = || agent.runtime().stream(Device::Cuda(0)).expect("a device");
    let x = counting_on(agent.runtime(), Device::Cuda(0), 5);
    let y = block_on(w1.call(double_on_device, (&x,)).on(&stream())).map_err(|error| error.to_string())?;
    let reader = stream();
    let mut sum = reader.alloc(20).expect("memory");
    let copied = reader.launch(&[y.storage()], &mut sum, |reads, bytes| bytes.copy_from_slice(reads[0]));
    copied.expect("enqueued");
    let z = TensorMut::from_storage(sum, DType::F32, &[5]).expect("exact").freeze(&reader);
    let sum = block_on(z.host()).and_then(|host| host.to_vec::<f32>()).map_err(|error| error.to_string())?;
    for wait in [|reply: Reply<Tensor>| block_on(reply.into_future()), |reply: Reply<Tensor>| reply.wait()] {
        let y = wait(w1.call(double_on_device, (&x,))).map_err(|error| error.to_string())?;
        let known = y.storage().ready_event().is_known().map_err(|error| error.to_string())?;
        known.then_some(()).ok_or("a value that was awaited is not ready")?;
    }
    Ok(sum)
}

/// Whichever wait of a call is forgotten, at the caller or at the callee: the checker sees it, under every schedule. Each of some
/// hundred groups has its own bound.
#[test]
fn each_forgotten_wait_of_a_call_is_reported_under_every_seed() {
    let waits = [0, 1].map(|worker| within_bound(move || waits_of(worker)));
    assert!(waits.iter().all(|waits| *waits > 0), "both ends wait: {waits:?}");
    let (mut wrong, mut not_ready) = (0, 0);
    for (worker, waits) in waits.into_iter().enumerate() {
        for (n, seed) in (0..waits).flat_map(|n| (0..64).map(move |seed| (n, seed))) {
            let (is_wrong, refused) = within_bound(move || {
                step(format_args!("w{worker} forgets wait {n} of {waits}, seed {seed}"));
                forget(worker, n, seed)
            });
            wrong += usize::from(is_wrong);
            not_ready += usize::from(refused);
        }
    }
    println!(
        "{waits:?} waits forgotten under 64 seeds each: all seen, {not_ready} by an error; {wrong} gave wrong values"
    );
}

fn within_bound<T: Send + 'static>(body: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, outcome) = std::sync::mpsc::channel();
    bounded(move || sender.send(body()).expect("the test waits"));
    outcome.recv().expect("an outcome")
}

fn in_chaos(seed: u64) -> Group {
    Group::with(2, move |options| {
        let cpu = CpuMode::Chaos { seed };
        let config = Config { emulated_devices: 1, cpu, check: Check::Report, ..Config::default() };
        options.device_runtime = Some(Runtime::new(config).expect("an emulated runtime"));
    })
}

/// How often a worker waits in a call that is right.
fn waits_of(worker: usize) -> usize {
    let group = in_chaos(0);
    let (values, count) = mutants::count_edges(group.agents[worker].runtime(), || call_on_devices(&group));
    assert_eq!(values.as_deref(), Ok(&DOUBLED[..]));
    group.shutdown();
    count
}

/// A call without one of them: whether it gave wrong values, and whether an error told of it.
fn forget(worker: usize, n: usize, seed: u64) -> (bool, bool) {
    let group = in_chaos(seed);
    let runtime = group.agents[worker].runtime();
    let values = mutants::without_edge(runtime, n, || call_on_devices(&group));
    let is_wrong = values.as_ref().is_ok_and(|values| *values != DOUBLED);
    // A wait of a stream is the checker's to report; a wait of the host is an error of whoever reads.
    let refused = values.is_err_and(|error| error.contains("not ready"));
    assert!(refused || !runtime.races().is_empty(), "w{worker}, wait {n}, seed {seed}");
    group.shutdown();
    (is_wrong, refused)
}

/// FENCE: the call waits for its tensor; a later one goes ahead of it.
#[test]
fn a_call_whose_tensor_is_not_ready_delays_no_later_call() {
    bounded(|| {
        let group = group(CpuMode::Threads { seed: 7 }, |_| 0);
        let (agent, w1) = (&group.agents[0], group.agents[0].to("w1"));
        let key = unique("ready");
        let mut bytes = agent.runtime().alloc_host(4).expect("memory");
        bytes.as_bytes_mut().expect("host").copy_from_slice(&7.0_f32.to_le_bytes());
        let (token, written) = Event::token(agent.runtime());
        let layout = farcall::Layout::contiguous(DType::F32, &[1]).expect("small");
        let x = Tensor::from_storage(bytes.freeze_at(written), layout).expect("exact");
        let late = w1.call(echo, (&x,));
        // Answered while the first has not been sent: it could not be, its bytes are not there.
        assert_eq!(w1.call(order, (&key,)).wait().expect("at once"), 1);
        assert!(!late.is_done());
        token.complete();
        assert_eq!(late.wait().expect("once it is ready").to_vec::<f32>().expect("f32"), [7.0]);
        group.shutdown();
    });
}

#[test]
fn a_tensor_that_never_gets_ready_fails_its_call_and_no_other() {
    bounded(|| {
        let group = group(CpuMode::Threads { seed: 8 }, |_| 0);
        let (agent, w1) = (&group.agents[0], group.agents[0].to("w1"));
        let pending = || {
            let bytes = agent.runtime().alloc_host(4).expect("memory");
            let (token, written) = Event::token(agent.runtime());
            let layout = farcall::Layout::contiguous(DType::F32, &[1]).expect("small");
            (token, Tensor::from_storage(bytes.freeze_at(written), layout).expect("exact"))
        };
        let (token, x) = pending();
        let failing = w1.call(echo, (&x,));
        token.fail(DeviceError::Cancelled);
        assert!(matches!(failing.wait(), Err(CallError::Device(_))));
        let (token, x) = pending();
        let overdue = w1.deadline(Duration::from_millis(20)).call(echo, (&x,));
        assert!(matches!(overdue.wait(), Err(CallError::Deadline { .. })));
        token.complete();
        group.answers();
        assert_eq!(agent.in_flight(), 0);
        group.shutdown();
    });
}

#[test]
fn a_tensor_for_a_device_that_is_not_there_fails_its_call_and_names_the_devices() {
    bounded(|| {
        let group = group(CpuMode::Inline, |rank| if rank == 0 { 2 } else { 1 });
        let (agent, w1) = (&group.agents[0], group.agents[0].to("w1"));
        let x = counting_on(agent.runtime(), Device::Cuda(1), 3);
        let error = w1.call(echo, (&x,)).wait().expect_err("w1 has one device");
        assert!(matches!(error, CallError::BadArguments { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("on w1") && text.ends_with("a tensor is for cuda:1, there is cpu:0, cuda:0"), "{text}");
        let x = counting_on(agent.runtime(), Device::Cuda(0), 3);
        assert_eq!(floats(&w1.call(echo, (&x,)).wait().expect("there")), [0.0, 1.0, 2.0]);
        group.shutdown();
    });
}

#[test]
fn a_device_map_leads_tensors_there_and_results_back() {
    bounded(|| {
        let config = || Config { emulated_devices: 3, check: Check::Panic, ..Config::default() };
        let map = DeviceMap::new([(Device::Cuda(0), Device::Cuda(1)), (Device::Cuda(1), Device::Cuda(2))]);
        let map = map.expect("one to one");
        let group = Group::with(2, |options| {
            options.device_runtime = Some(Runtime::new(config()).expect("an emulated runtime"));
            if options.rank == 0 {
                options.device_maps.insert("w1".to_owned(), map.clone());
            }
        });
        let (agent, w1) = (&group.agents[0], group.agents[0].to("w1"));
        let x = counting_on(agent.runtime(), Device::Cuda(0), 3);
        assert_eq!(w1.call(device_of, (&x,)).wait().expect("mapped"), "cuda:1");
        let y = w1.call(double_on_device, (&x,)).wait().expect("doubled");
        assert_eq!((y.device(), floats(&y)), (Device::Cuda(0), vec![0.0, 2.0, 4.0]), "back where it came from");
        let x = counting_on(agent.runtime(), Device::Cuda(2), 3);
        let error = w1.call(echo, (&x,)).wait().expect_err("cuda:2 is not mapped");
        let text = error.to_string();
        assert!(matches!(error, CallError::Unmapped { device: Device::Cuda(2), .. }), "{text}");
        assert!(text.contains("cuda:0 → cuda:1, cuda:1 → cuda:2"), "{text}");
        // Without a map on that side, the same index.
        let x = counting_on(group.agents[1].runtime(), Device::Cuda(2), 3);
        assert_eq!(group.agents[1].to("w0").call(device_of, (&x,)).wait().expect("the same"), "cuda:2");
        group.shutdown();
    });
}

#[test]
fn a_device_map_that_cannot_be_is_refused_at_join() {
    bounded(|| {
        let store = StoreServer::bind("127.0.0.1:0").expect("a store");
        let mut options = Options::new(0, 1, store.address().to_string());
        options.host_store = false;
        let host_alone = Config { cuda: Cuda::Off, ..Config::default() };
        options.device_runtime = Some(Runtime::new(host_alone).expect("no devices"));
        let map = DeviceMap::new([(Device::Cuda(0), Device::Cuda(0))]).expect("one to one");
        options.device_maps.insert("w0".to_owned(), map);
        let refused = Agent::join_blocking(options.clone()).expect_err("there is no cuda:0");
        assert!(refused.to_string().contains("this worker has cpu:0"), "{refused}");
        options.group = unique("group");
        options.device_maps = [("w7".to_owned(), DeviceMap::default())].into();
        let refused = Agent::join_blocking(options).expect_err("there is no w7");
        assert!(refused.to_string().contains("device map for w7"), "{refused}");
    });
}
