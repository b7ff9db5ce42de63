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

/// In the value's own memory if nobody holds it; a snapshot keeps its elements and its memory.
#[test]
fn p1_bytes_land_in_place_unless_someone_reads() {
    let runtime = Runtime::new(Config::default()).unwrap();
    let param = param(&runtime.stream(Device::HOST).unwrap(), &[1, 2]);
    let (layout, address) = (param.value().layout().clone(), param.value().storage().as_ptr());
    let land = |bytes: &[u8]| {
        let mut landing = param.land(&layout).unwrap();
        let (in_place, mut memory) = (landing.is_in_place(), landing.take_memory());
        memory.as_bytes_mut().unwrap().copy_from_slice(bytes);
        assert_eq!(param.try_value().is_none(), in_place, "the old value is there unless its memory is out");
        landing.complete(memory.freeze_ready()).unwrap();
        in_place
    };
    assert!(land(&[3, 4]));
    assert_eq!((bytes_of(&param.value()), param.value().storage().as_ptr()), (vec![3, 4], address));
    let snapshot = param.value();
    assert!(!land(&[5, 6]));
    assert_eq!((bytes_of(&snapshot), bytes_of(&param.value())), (vec![3, 4], vec![5, 6]));
    assert_eq!(snapshot.storage().as_ptr(), address);
}

#[test]
fn what_does_not_fit_is_refused_before_a_byte_is_written() {
    let runtime = Runtime::new(Config { emulated_devices: 1, ..Config::default() }).unwrap();
    let param = param(&runtime.stream(Device::HOST).unwrap(), &[1, 2, 3, 4]);
    let square = Layout::contiguous(DType::U8, &[2, 2]).unwrap();
    let signed = Layout::contiguous(DType::I8, &[4]).unwrap();
    assert!(matches!(param.land(&square), Err(DeviceError::Layout(_))));
    assert!(matches!(param.land(&signed), Err(DeviceError::DTypeMismatch { .. })));
    assert!(param.copy_from(&Tensor::zeros(DType::I8, &[4]).unwrap()).is_err());
    let turned = Param::new(Tensor::zeros(DType::U8, &[2, 2]).unwrap());
    assert!(matches!(turned.land(&square.transpose(0, 1).unwrap()), Err(DeviceError::NotContiguous { .. })));
    let elsewhere = runtime.stream(Device::Cuda(0)).unwrap();
    let there = Param::new(elsewhere.pack(&param.value(), Device::Cuda(0)).unwrap());
    assert!(matches!(there.land(param.value().layout()), Err(DeviceError::NotHost { .. })));
    assert_eq!(bytes_of(&param.value()), [1, 2, 3, 4]);
}

/// P3: nobody sees a part of a value; who writes it whole makes it one again.
#[test]
fn p3_a_landing_that_ends_early_leaves_no_half_of_a_value() {
    let runtime = Runtime::new(Config::default()).unwrap();
    let stream = runtime.stream(Device::HOST).unwrap();
    let param = param(&stream, &[1, 2]);
    let layout = param.value().layout().clone();
    drop(param.land(&layout).unwrap());
    assert_eq!(bytes_of(&param.value()), [1, 2], "its memory was not taken");
    let torn = || {
        let mut landing = param.land(&layout).unwrap();
        let mut memory = landing.take_memory();
        memory.as_bytes_mut().unwrap()[0] = 9;
        (landing, memory)
    };
    let rewrites: [fn(&Param, &Stream); 3] = [
        |param, _| param.copy_from(&Tensor::from_slice(&[7_u8, 8], &[2]).unwrap()).unwrap(),
        |param, stream| {
            let mut step = param.write_over(stream).unwrap();
            step.tensor_mut().copy_from_slice(&[7_u8, 8]).unwrap();
        },
        |param, _| param.set(Tensor::from_slice(&[7_u8, 8], &[2]).unwrap()).unwrap(),
    ];
    for rewrite in rewrites {
        drop(torn());
        let value = param.value();
        assert!(matches!(value.as_slice::<u8>(), Err(DeviceError::Torn { .. })));
        assert!(matches!(value.pack(&stream), Err(DeviceError::Torn { .. })));
        assert!(matches!(value.storage().ready_event().block(LONG), Err(DeviceError::Torn { .. })));
        drop(value);
        assert!(matches!(param.write(&stream), Err(DeviceError::Torn { .. })), "a step that keeps elements");
        let stream = runtime.stream(Device::HOST).unwrap();
        rewrite(&param, &stream);
        assert_eq!(bytes_of(&param.value()), [7, 8]);
    }
    // Held by a reader, the value stays as it is.
    let snapshot = param.value();
    drop(torn());
    assert_eq!((bytes_of(&param.value()), bytes_of(&snapshot)), (vec![7, 8], vec![7, 8]));
}

/// P2: who asks meanwhile waits for the end, of either kind; the last of two landings to complete is the value.
#[test]
fn p2_readers_wait_for_a_landing_in_place() {
    let runtime = Runtime::new(Config::default()).unwrap();
    let param = param(&runtime.stream(Device::HOST).unwrap(), &[1, 2]);
    let layout = param.value().layout().clone();
    for completes in [true, false] {
        let mut landing = param.land(&layout).unwrap();
        let mut memory = landing.take_memory();
        let (asking, asked) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                asking.send(()).unwrap();
                param.value()
            });
            asked.recv().unwrap();
            memory.as_bytes_mut().unwrap().copy_from_slice(&[3, 4]);
            if completes {
                landing.complete(memory.freeze_ready()).unwrap();
            } else {
                drop(landing);
            }
            let value = reader.join().unwrap();
            assert_eq!(value.to_vec::<u8>().is_ok(), completes);
        });
    }
    param.set(Tensor::from_slice(&[5_u8, 6], &[2]).unwrap()).unwrap();
    let (mut first, mut second) = (param.land(&layout).unwrap(), param.land(&layout).unwrap());
    assert_eq!((first.is_in_place(), second.is_in_place()), (true, false));
    let (first_memory, mut second_memory) = (first.take_memory(), second.take_memory());
    second_memory.as_bytes_mut().unwrap().fill(7);
    second.complete(second_memory.freeze_ready()).unwrap();
    drop((first, first_memory));
    assert_eq!(bytes_of(&param.value()), [7, 7], "the one that failed later takes nothing away");
}

/// FENCE: a copy in place waits for pending reads of the old value and for the source's write.
#[test]
fn fence_a_copy_from_another_tensor_waits_for_both() {
    let program = |runtime: &Runtime| {
        let (reader, writer) = (runtime.stream(Device::HOST).unwrap(), runtime.stream(Device::HOST).unwrap());
        let param = param(&writer, &[1, 2]);
        let before = param.value().pack(&reader).unwrap();
        let mut source = writer.alloc(2).unwrap();
        writer.fill(&mut source, 7).unwrap();
        let source = TensorMut::from_storage(source, DType::U8, &[2]).unwrap().freeze(&writer);
        param.copy_from(&source).unwrap();
        (bytes_of(&before), bytes_of(&param.value()))
    };
    for seed in 0..16 {
        let runtime = chaos(seed);
        assert_eq!(program(&runtime), (vec![1, 2], vec![7, 7]), "seed {seed}");
        assert_eq!(runtime.races(), []);
    }
}
