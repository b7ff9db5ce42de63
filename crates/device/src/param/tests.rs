use std::time::Duration;

use super::*;
use crate::mutants::{count_edges, without_edge};
use crate::{Config, CpuMode, Device, Runtime};

const LONG: Duration = Duration::from_secs(60);

fn chaos(seed: u64) -> Runtime {
    let check = crate::Check::Report;
    Runtime::new(Config { cpu: CpuMode::Chaos { seed }, check, ..Config::default() }).unwrap()
}

fn param(stream: &Stream, bytes: &[u8]) -> Param {
    let mut tensor = TensorMut::empty_on(DType::U8, &[bytes.len()], stream).unwrap();
    tensor.copy_from_slice(bytes).unwrap();
    Param::new(tensor.freeze_ready())
}

fn add_one(step: &mut ParamMut<'_>, stream: &Stream) {
    let increment = |_: &[&[u8]], bytes: &mut [u8]| bytes.iter_mut().for_each(|byte| *byte += 1);
    stream.launch(&[], step.tensor_mut().storage_mut(), increment).unwrap();
}

fn bytes_of(tensor: &Tensor) -> Vec<u8> {
    tensor.storage().ready_event().block(LONG).unwrap();
    tensor.to_vec().unwrap()
}

#[test]
fn p1_a_snapshot_keeps_its_elements_and_costs_the_step_a_copy() {
    let runtime = Runtime::new(Config::default()).unwrap();
    let stream = runtime.stream(Device::HOST).unwrap();
    let param = param(&stream, &[1, 2]);
    let address = param.value().storage().as_ptr();
    add_one(&mut param.write(&stream).unwrap(), &stream);
    assert_eq!(param.value().storage().as_ptr(), address, "nobody held the value: in place");
    let snapshot = param.value();
    add_one(&mut param.write(&stream).unwrap(), &stream);
    assert_ne!(param.value().storage().as_ptr(), address);
    assert_eq!((bytes_of(&snapshot), bytes_of(&param.value())), (vec![2, 3], vec![3, 4]));
}

#[test]
fn a_view_is_packed_by_its_first_step() {
    let stream = Runtime::global().stream(Device::HOST).unwrap();
    let matrix = Tensor::from_slice(&[1_u8, 2, 3, 4], &[2, 2]).unwrap();
    let param = Param::new(matrix.transpose(0, 1).unwrap());
    add_one(&mut param.write(&stream).unwrap(), &stream);
    assert_eq!(bytes_of(&param.value()), [2, 4, 3, 5]);
    assert_eq!(bytes_of(&matrix), [1, 2, 3, 4]);
}

#[test]
fn what_cannot_be_written_stays_as_it_was() {
    let runtime = Runtime::new(Config { emulated_devices: 1, ..Config::default() }).unwrap();
    let (host, other) = (runtime.stream(Device::HOST).unwrap(), runtime.stream(Device::Cuda(0)).unwrap());
    let param = param(&host, &[7]);
    assert!(matches!(param.write(&other), Err(DeviceError::WrongDevice { .. })));
    assert!(Param::write_all(&[&param, &param.clone()], &host).is_err(), "twice the same");
    assert!(param.set(Tensor::zeros(DType::I8, &[1]).unwrap()).is_err());
    assert!(param.set(Tensor::zeros(DType::U8, &[2]).unwrap()).is_err());
    assert_eq!(bytes_of(&param.value()), [7]);
    param.set(Tensor::zeros(DType::U8, &[1]).unwrap()).unwrap();
    assert_eq!(bytes_of(&param.value()), [0]);
}

/// Two threads, two cells, opposite orders: neither waits for the other for ever.
#[test]
fn p2_steps_over_the_same_cells_take_turns() {
    let runtime = Runtime::new(Config::default()).unwrap();
    let stream = runtime.stream(Device::HOST).unwrap();
    let (a, b) = (param(&stream, &[0]), param(&stream, &[0]));
    let rounds = 100;
    std::thread::scope(|scope| {
        for pair in [[&a, &b], [&b, &a]] {
            let stream = runtime.stream(Device::HOST).unwrap();
            scope.spawn(move || {
                for _ in 0..rounds {
                    let mut steps = Param::write_all(&pair, &stream).unwrap();
                    steps.iter_mut().for_each(|step| add_one(step, &stream));
                }
            });
        }
    });
    assert_eq!((bytes_of(&a.value()), bytes_of(&b.value())), (vec![2 * rounds as u8], vec![2 * rounds as u8]));
}

/// A read of the last snapshot is pending when the step writes in place: it must wait, and a forgotten wait is a race.
#[test]
fn fence_a_step_in_place_waits_for_pending_reads() {
    let program = |runtime: &Runtime| {
        let (reader, writer) = (runtime.stream(Device::HOST).unwrap(), runtime.stream(Device::HOST).unwrap());
        let param = param(&writer, &[1]);
        let copy = param.value().pack(&reader).unwrap();
        add_one(&mut param.write(&writer).unwrap(), &writer);
        (bytes_of(&copy), bytes_of(&param.value()))
    };
    for seed in 0..16 {
        let runtime = chaos(seed);
        assert_eq!(program(&runtime), (vec![1], vec![2]), "seed {seed}");
        assert_eq!(runtime.races(), []);
    }
    let runtime = chaos(0);
    let (_, edges) = count_edges(&runtime, || program(&runtime));
    assert!(edges > 0, "a wait for the reader at least");
    let reported = (0..edges).filter(|edge| {
        let runtime = chaos(0);
        without_edge(&runtime, *edge, || program(&runtime));
        !runtime.races().is_empty()
    });
    assert_eq!(reported.count(), edges, "each forgotten wait is reported");
}
