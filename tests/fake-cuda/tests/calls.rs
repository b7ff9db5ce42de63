//! Calls between agents whose tensors are on CUDA devices: the real backend behind the wire, on the fake driver.
#![expect(unsafe_code, reason = "asks the fake driver for its counts")]

mod harness;

use std::thread;
use std::time::Duration;

use farcall::device::{Check, Config, Cuda};
use farcall::prelude::*;
use farcall::{CallError, DeviceError, Runtime, StoreServer};
use harness::{Library, calls, in_child};

const CUDA: Device = Device::Cuda(0);

#[farcall::function(name = "fake_cuda::echo")]
fn echo(x: Tensor) -> farcall::Result<Tensor> {
    Ok(x)
}

#[farcall::function(name = "fake_cuda::device_of", inline)]
fn device_of(x: Tensor) -> farcall::Result<String> {
    Ok(x.device().to_string())
}

/// Two agents of this process, each with a runtime of its own.
fn group() -> (StoreServer, [Agent; 2]) {
    let store = StoreServer::bind("127.0.0.1:0").expect("a store");
    let address = store.address().to_string();
    let joining = [0, 1].map(|rank| {
        let address = address.clone();
        thread::spawn(move || {
            let mut options = Options::new(rank, 2, address);
            options.host_store = false;
            let config = Config { cuda: Cuda::Require, check: Check::Panic, ..Config::default() };
            options.device_runtime = Some(Runtime::new(config).expect("the fake driver"));
            Agent::join_blocking(options).expect("joins")
        })
    });
    (store, joining.map(|agent| agent.join().expect("no panic")))
}

fn leave(agents: [Agent; 2]) {
    let leaving = agents.map(|agent| thread::spawn(move || agent.shutdown_blocking()));
    for leaving in leaving {
        leaving.join().expect("no panic").expect("leaves in order");
    }
}

/// 0, 1, 2, … on the device, there when a slow stream gets to it.
fn counting(runtime: &Runtime, len: usize) -> Tensor {
    let values: Vec<f32> = (0..len).map(|index| index as f32).collect();
    let stream = runtime.stream(CUDA).expect("a stream");
    stream.delay(Duration::from_millis(3)).expect("enqueued");
    stream.pack(&Tensor::from_slice(&values, &[len]).expect("small"), CUDA).expect("enqueued")
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    tensor.host().wait(Duration::from_secs(30)).expect("a host copy").to_vec().expect("f32")
}

#[test]
fn tensors_of_cuda_devices_go_there_and_back() {
    in_child("tensors_of_cuda_devices_go_there_and_back", Library::Fake, &[], || {
        let (_store, agents) = group();
        let (runtime, w1) = (agents[0].runtime(), agents[0].to("w1"));
        // Inline in the frame, and on the bulk connection.
        for len in [5, 100_000] {
            let x = counting(runtime, len);
            assert_eq!(w1.call(device_of, (&x,)).wait().expect("called"), "cuda:0");
            let y = w1.call(echo, (&x,)).wait().expect("there and back");
            assert!(y.device() == CUDA && y.storage().is_ready().expect("no failure"), "READY");
            assert_eq!(floats(&y), floats(&x));
            let stream = runtime.stream(CUDA).expect("a stream");
            let executor = tokio::runtime::Builder::new_current_thread().build().expect("an executor");
            let y = executor.block_on(w1.call(echo, (&x,)).on(&stream)).expect("handed over");
            assert_eq!(floats(&y), floats(&x));
        }
        // Rows of a view are packed on the device.
        let x = counting(runtime, 12).reshape(&[3, 4]).expect("a view");
        let y = w1.call(echo, (x.narrow(1, 1, 2).expect("a view"),)).wait().expect("there and back");
        assert_eq!(floats(&y), [1.0, 2.0, 5.0, 6.0, 9.0, 10.0]);
        assert!(calls("cuMemcpyHtoDAsync_v2") >= 6 && calls("cuMemcpy2DAsync_v2") >= 1);
        assert_eq!(runtime.races(), []);
        leave(agents);
    });
}

#[test]
fn a_lost_device_fails_the_call_and_not_the_agents() {
    let variables = [("FAKE_CUDA_FAULT_AFTER", "3")];
    in_child("a_lost_device_fails_the_call_and_not_the_agents", Library::Fake, &variables, || {
        let (_store, agents) = group();
        let w1 = agents[0].to("w1");
        let x = counting(agents[0].runtime(), 100_000);
        let lost = w1.call(echo, (&x,)).wait().expect_err("the device is lost on the way");
        assert!(lost.to_string().contains("cuda:0 was lost: CUDA_ERROR_ILLEGAL_ADDRESS (700)"), "{lost}");
        let again = w1.call(echo, (&x,)).wait().expect_err("and stays so");
        assert!(matches!(again, CallError::Device(DeviceError::Lost { device: CUDA, .. })), "{again}");
        let host = Tensor::from_slice(&[1.0_f32, 2.0], &[2]).expect("small");
        assert_eq!(floats(&w1.call(echo, (&host,)).wait().expect("the host goes on")), [1.0, 2.0]);
        leave(agents);
    });
}
