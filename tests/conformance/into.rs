//! Replies into parameters: in place where nobody reads, whole or torn, compared before a byte is written.

use std::sync::Arc;
use std::time::Duration;

use farcall::device::{Check, Config, CpuMode};
use farcall::prelude::*;
use farcall::{DeviceError, Misfit, Param, Runtime, TensorMut, Transport};

use crate::functions::{echo, echo_all, gate, hash, pattern, pattern_after};
use crate::harness::{Group, block_on, bounded, counting, step, unique};

/// Two workers by these sockets, each with memory of its own, which is counted.
fn group(transport: Transport) -> Group {
    Group::with(2, |options| {
        (options.transport, options.tls) = (transport, None);
        options.device_runtime = Some(Runtime::new(Config::default()).expect("a runtime"));
    })
}

fn param(agent: &Agent, len: usize) -> Param {
    let mut bytes = agent.runtime().alloc_host(len).expect("memory");
    bytes.as_bytes_mut().expect("host").fill(1);
    Param::new(TensorMut::from_storage(bytes, DType::U8, &[len]).expect("exact").freeze_ready())
}

fn address(param: &Param) -> *const u8 {
    param.value().storage().as_ptr()
}

fn bytes(tensor: &Tensor) -> Vec<u8> {
    tensor.to_vec::<u8>().expect("u8 on the host")
}

/// Over sockets without any other memory, from slabs by one copy: into the same bytes, round after round.
#[test]
fn a_reply_comes_into_the_parameters_own_memory() {
    bounded(|| {
        for transport in [Transport::Tcp, Transport::Unix] {
            let group = group(transport);
            let (agent, w1) = (&group.agents[0], group.agents[0].to("w1"));
            group.answers();
            for len in [100, 5000, 100_000, 9 << 20] {
                let param = param(agent, len);
                let own = address(&param);
                for seed in 0..3 {
                    step(format_args!("{transport:?}, {len} bytes, round {seed}"));
                    let key = unique("into");
                    let before = agent.runtime().stats().allocations;
                    let filling = w1.call(pattern_after, (&key, len, seed)).into(&param);
                    gate(&key).open();
                    let value = if seed == 0 { block_on(filling.into_future()) } else { filling.wait() };
                    let value = value.expect("a reply");
                    assert_eq!(agent.runtime().stats().allocations, before, "no memory but the parameter's");
                    assert!(value.storage().is_same(param.value().storage()));
                    drop(value);
                    assert_eq!(address(&param), own);
                    assert!(bytes(&param.value()) == bytes(&pattern::run(len, seed).expect("memory")));
                }
            }
            assert_eq!(agent.to("w1").lent(), 0);
            group.shutdown();
        }
    });
}

/// P1: who holds the old value keeps it, and its memory.
#[test]
fn a_reader_keeps_the_value_that_it_has() {
    bounded(|| {
        for transport in [Transport::Tcp, Transport::Unix] {
            let group = group(transport);
            let param = param(&group.agents[0], 200_000);
            let held = param.value();
            group.agents[0].to("w1").call(pattern, (200_000, 3)).into(&param).wait().expect("a reply");
            assert!(bytes(&held) == [1; 200_000]);
            assert!(bytes(&param.value()) == bytes(&pattern::run(200_000, 3).expect("memory")));
            group.shutdown();
        }
    });
}

#[test]
fn what_does_not_fit_is_refused_and_touches_nothing() {
    bounded(|| {
        for transport in [Transport::Tcp, Transport::Unix] {
            let group = group(transport);
            let (agent, w1) = (&group.agents[0], group.agents[0].to("w1"));
            for len in [100, 100_000] {
                step(format_args!("{transport:?}, {len} bytes"));
                let [first, second] = [param(agent, len), param(agent, len + 1)];
                let x = pattern::run(len, 2).expect("memory");
                let refused = |error: CallError| match error {
                    CallError::Misfit { call, misfit } => {
                        assert_eq!((&*call.worker, call.function), ("w1", "test::echo_all"));
                        misfit
                    }
                    other => panic!("{other}"),
                };
                let call = || w1.call(echo_all, (vec![x.clone(), x.clone()],));
                let misfit =
                    refused(call().into_each(&[first.clone(), second.clone()]).wait().expect_err("one too long"));
                assert!(matches!(misfit, Misfit::Tensor { tensor: 1, source: DeviceError::Layout(_) }), "{misfit}");
                let misfit = refused(call().into(&first).wait().expect_err("one too many"));
                assert!(matches!(misfit, Misfit::Count { expected: 1, found: 2 }), "{misfit}");
                let signed = Param::new(Tensor::zeros(DType::I8, &[len]).expect("memory"));
                let misfit = refused(call().into_each(&[first.clone(), signed]).wait().expect_err("another dtype"));
                assert!(
                    matches!(misfit, Misfit::Tensor { tensor: 1, source: DeviceError::DTypeMismatch { .. } }),
                    "{misfit}"
                );
                assert!(bytes(&first.value()) == vec![1; len] && bytes(&second.value()) == vec![1; len + 1]);
            }
            group.shutdown();
        }
    });
}

/// In the order of the value; views are packed; this worker itself, too; a handler's error changes nothing.
#[test]
fn several_tensors_of_any_layout_find_their_parameters() {
    bounded(|| {
        for transport in [Transport::Tcp, Transport::Unix] {
            let group = group(transport);
            let square = counting(&[100, 100]);
            let turned = square.transpose(0, 1).expect("a view");
            let row = square.narrow(0, 7, 1).expect("a view");
            let spread = row.broadcast_to(&[50, 100]).expect("a view");
            let sent = vec![square.clone(), turned, row, spread];
            for worker in ["w1", "w0"] {
                step(format_args!("{transport:?}, {worker}"));
                let params: Vec<_> =
                    sent.iter().map(|x| Param::new(Tensor::zeros(DType::F32, x.shape()).expect("memory"))).collect();
                let own: Vec<_> = params.iter().map(address).collect();
                drop(group.agents[0].to(worker).call(echo_all, (&sent,)).into_each(&params).wait().expect("an echo"));
                for (index, (param, x)) in params.iter().zip(&sent).enumerate() {
                    assert_eq!(param.value().to_vec::<f32>().expect("f32"), x.to_vec::<f32>().expect("f32"), "{index}");
                    assert_eq!(address(param), own[index], "{index}");
                }
            }
            group.shutdown();
        }
    });
}

/// FENCE: results of devices come to where the parameters are, whatever the schedule; the checker sees each wait.
#[test]
fn results_of_devices_come_to_the_parameters_device() {
    bounded(|| {
        let modes = [CpuMode::Inline, CpuMode::Threads { seed: 1 }];
        let chaos = (1..=8).map(|seed| CpuMode::Chaos { seed });
        for cpu in modes.into_iter().chain(chaos) {
            let group = Group::with(2, |options| {
                let config = Config { emulated_devices: 2, cpu, check: Check::Panic, ..Config::default() };
                options.device_runtime = Some(Runtime::new(config).expect("an emulated runtime"));
            });
            let runtime = group.agents[0].runtime();
            let x = counting(&[3000]);
            for [from, to] in
                [[Device::HOST, Device::Cuda(0)], [Device::Cuda(1), Device::HOST], [Device::Cuda(1), Device::Cuda(0)]]
            {
                step(format_args!("{cpu:?}, {from} to {to}"));
                let sent = runtime.stream(from).and_then(|stream| stream.pack(&x, from)).expect("a copy");
                let old = runtime.stream(to).and_then(|stream| stream.pack(&counting(&[3000]), to)).expect("a copy");
                let param = Param::new(old);
                for _ in 0..2 {
                    // The old value is still read on another stream.
                    let reader = runtime.stream(to).expect("a device");
                    let read = param.value().pack(&reader).expect("a copy");
                    let value = group.agents[0].to("w1").call(echo, (&sent,)).into(&param).wait().expect("an echo");
                    assert_eq!(value.device(), to);
                    drop((value, read));
                    let host = block_on(param.value().host()).expect("a host copy");
                    assert_eq!(host.to_vec::<f32>().expect("f32"), x.to_vec::<f32>().expect("f32"));
                }
            }
            assert!(runtime.races().is_empty());
            group.shutdown();
        }
    });
}

/// A call that ends without a value leaves the old one: the deadline, a dropped future, a worker that leaves.
#[test]
fn a_call_that_fails_before_its_reply_leaves_the_old_value() {
    bounded(|| {
        let group = group(Transport::Tcp);
        let (agent, w1) = (&group.agents[0], group.agents[0].to("w1"));
        let param = param(agent, 100_000);
        let key = unique("never");
        let late = w1.deadline(Duration::from_millis(30)).call(pattern_after, (&key, 100_000, 1)).into(&param);
        assert!(matches!(late.wait(), Err(CallError::Deadline { .. })));
        let dropped = w1.call(pattern_after, (&key, 100_000, 1)).into(&param);
        assert!(gate(&key).wait_arrived(2));
        drop(dropped);
        let lost = w1.call(pattern_after, (&key, 100_000, 1)).into(&param);
        assert!(gate(&key).wait_arrived(3));
        group.agents[1].abort();
        assert!(matches!(lost.wait(), Err(CallError::PeerLost { .. })));
        gate(&key).open();
        assert!(bytes(&param.value()) == [1; 100_000]);
        agent.abort();
    });
}

/// Two replies for one parameter: the later to come is its value, and it is one of them as a whole.
#[test]
fn replies_for_one_parameter_do_not_mix() {
    bounded(|| {
        for transport in [Transport::Tcp, Transport::Unix] {
            let group = group(transport);
            let param = param(&group.agents[0], 1 << 20);
            let expected: Vec<_> =
                (0..8).map(|seed| hash::run(pattern::run(1 << 20, seed).expect("memory")).expect("bytes")).collect();
            for _ in 0..10 {
                let calls: Vec<_> =
                    (0..8).map(|seed| group.agents[0].to("w1").call(pattern, (1 << 20, seed)).into(&param)).collect();
                let seen = Arc::new(param.clone());
                let reader = std::thread::spawn(move || {
                    // On a stream that runs when it likes, a value is there before its bytes are.
                    let value = seen.value().host().wait(Duration::from_secs(20)).expect("ready soon");
                    value.to_vec::<u8>().expect("whole, whenever it is asked for")
                });
                for call in calls {
                    drop(call.wait().expect("a reply"));
                }
                drop(reader.join().expect("no panic"));
                assert!(expected.contains(&hash::run(param.value()).expect("bytes")));
            }
            group.shutdown();
        }
    });
}
