//! Digests beside tensors: asked for by call or by setting, compared at both ends, over whatever the bytes travel.

use farcall::device::{Check, Config, CpuMode};
use farcall::prelude::*;
use farcall::{Param, Runtime, Transport};

use crate::functions::{double_on_device, echo, echo_all, hash, pattern};
use crate::harness::{Group, block_on, bounded, counting, step};

/// Of every size and layout, with and without slabs; asked for before the greeting, too, when nobody knows whether the peer can.
#[test]
fn tensors_with_digests_arrive_as_they_are() {
    bounded(|| {
        for (transport, slabs) in [(Transport::Tcp, true), (Transport::Unix, true), (Transport::Unix, false)] {
            let group = Group::with(3, |options| {
                (options.transport, options.tls, options.slabs) = (transport, None, slabs);
            });
            let w1 = group.agents[0].to("w1").digests(true);
            let first: Vec<_> = (0..20).map(|seed| w1.call(pattern, (seed * 1000, seed as u64))).collect();
            for (seed, reply) in first.into_iter().enumerate() {
                let expected = pattern::run(seed * 1000, seed as u64).and_then(hash::run).expect("bytes");
                assert_eq!(hash::run(reply.wait().expect("a reply")).expect("bytes"), expected);
            }
            for len in [0, 1, 5000, 65_536, 65_537, 200_000, 9 << 20] {
                step(format_args!("{transport:?}, slabs: {slabs}, {len} bytes"));
                let x = pattern::run(len, 3).expect("memory");
                let expected = hash::run(x.clone()).expect("bytes");
                let back = block_on(w1.call(echo, (&x,)).into_future()).expect("an echo");
                assert_eq!(hash::run(back).expect("bytes"), expected);
                for (worker, found) in group.agents[0].to_all(["w1", "w2"]).digests(true).call(hash, (&x,)).wait() {
                    assert_eq!(found.expect("a hash"), expected, "{worker}");
                }
                let param = Param::new(Tensor::zeros(DType::U8, &[len]).expect("memory"));
                drop(w1.call(pattern, (len, 3)).into(&param).wait().expect("a reply"));
                assert_eq!(hash::run(param.value()).expect("bytes"), expected);
            }
            let square = counting(&[50, 70]);
            let turned = square.transpose(0, 1).expect("a view");
            let spread = square.narrow(0, 1, 1).and_then(|row| row.broadcast_to(&[9, 70])).expect("a view");
            let gaps = square.narrow(1, 3, 5).expect("a view");
            let sent = vec![square, turned, spread, gaps];
            let back = w1.call(echo_all, (&sent,)).wait().expect("an echo");
            for (sent, back) in sent.iter().zip(&back) {
                assert_eq!(back.to_vec::<f32>().expect("f32"), sent.to_vec::<f32>().expect("f32"));
            }
            group.shutdown();
        }
    });
}

/// By the option of the agent; tensors of devices, in queued modes, too.
#[test]
fn digests_of_tensors_of_devices_are_made_behind_their_writes() {
    bounded(|| {
        for seed in 0..4 {
            let group = Group::with(2, |options| {
                let cpu = CpuMode::Chaos { seed };
                let config = Config { emulated_devices: 1, cpu, check: Check::Panic, ..Config::default() };
                options.device_runtime = Some(Runtime::new(config).expect("an emulated runtime"));
                options.digests = true;
            });
            let agent = &group.agents[0];
            let stream = agent.runtime().stream(Device::Cuda(0)).expect("a device");
            let x = stream.pack(&counting(&[30_000]), Device::Cuda(0)).expect("a copy");
            let y = agent.to("w1").call(double_on_device, (&x,)).wait().expect("doubled");
            let host = block_on(y.host()).expect("a host copy");
            assert_eq!(host.to_vec::<f32>().expect("f32")[29_999], 59_998.0);
            assert!(agent.runtime().races().is_empty());
            group.shutdown();
        }
    });
}
