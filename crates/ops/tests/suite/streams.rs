//! On every kind of stream and device: the same values, no races, failures that reach who waits.

use farcall_device::{Check, Config, CpuMode, DType, Device, DeviceError, Param, Runtime, Stream, Tensor};
use farcall_ops as ops;

use crate::{LONG, host, numbers};

fn runtimes() -> impl Iterator<Item = (String, Runtime)> {
    let seeded = (0..4).flat_map(|seed| [CpuMode::Threads { seed }, CpuMode::Chaos { seed }]);
    [CpuMode::Inline].into_iter().chain(seeded).map(|cpu| {
        let config = Config { cpu, check: Check::Report, emulated_devices: 2, ..Config::default() };
        (format!("{cpu:?}"), Runtime::new(config).unwrap())
    })
}

/// A step of a small model over two streams of an emulated device: its loss and its parameters.
fn train(first: &Stream, second: &Stream) -> (Vec<f64>, Vec<f64>) {
    let x = ops::randn(&[8, 6], DType::F32, 1, first).unwrap();
    let weights = Param::new(ops::rand(&[6, 4], DType::F32, 2, second).unwrap());
    let mut optimizer = ops::Optimizer::new(vec![weights.clone()], ops::Adam::new(0.1));
    let classes = Tensor::from_slice(&[0_i64, 1, 2, 3, 3, 2, 1, 0], &[8]).unwrap();
    let mut target = first.alloc(64).unwrap();
    first.copy(classes.storage(), &mut target).unwrap();
    let layout = classes.layout().clone();
    let target = Tensor::from_storage(target.freeze(first), layout).unwrap();
    let mut losses = Vec::new();
    for _ in 0..3 {
        let w = weights.value();
        let scores = ops::matmul(&x, &w, second).unwrap();
        let likely = ops::log_softmax(&scores, 1, first).unwrap();
        let loss = ops::nll_loss(&likely, &target, None, ops::Reduction::Mean, -100, second).unwrap();
        // The gradient of the scores: softmax minus one at the class, over the number of rows.
        let classes = ops::index_select(&identity(4, second), 0, &target, second).unwrap();
        let slope = ops::sub(&ops::exp(&likely, first).unwrap(), &classes, first).unwrap();
        let grad =
            ops::matmul(&ops::transpose(&x, 0, 1).unwrap(), &ops::div(&slope, 8, second).unwrap(), first).unwrap();
        drop(w);
        optimizer.step(&[Some(grad)], second).unwrap();
        losses.extend(numbers(&loss));
    }
    (losses, numbers(&weights.value()))
}

fn identity(size: usize, stream: &Stream) -> Tensor {
    let places = ops::arange(size, stream).unwrap();
    let same = ops::eq(&places, &places.unsqueeze(1).unwrap(), stream).unwrap();
    ops::cast(&same, DType::F32, stream).unwrap()
}

#[test]
fn a_training_step_gives_the_same_on_every_kind_of_stream() {
    let expected = train(&host(), &host());
    assert!(expected.0.windows(2).all(|pair| pair[1] < pair[0]), "the loss falls: {:?}", expected.0);
    for (name, runtime) in runtimes() {
        for device in [Device::HOST, Device::Cuda(1)] {
            let [first, second] = [(); 2].map(|()| runtime.stream(device).unwrap());
            assert_eq!(train(&first, &second), expected, "{name} on {device}");
            assert_eq!(runtime.races(), [], "{name}");
        }
    }
}

#[test]
fn elements_that_cannot_be_worked_on_fail_the_result() {
    let wait = |outcome: Result<Tensor, ops::OpError>| -> Result<Tensor, DeviceError> {
        match outcome {
            Ok(tensor) => tensor.host().wait(LONG),
            Err(ops::OpError::Device(error)) => Err(error),
            Err(other) => panic!("{other}"),
        }
    };
    for (name, runtime) in runtimes() {
        let stream = runtime.stream(Device::HOST).unwrap();
        let x = ops::rand(&[3, 2], DType::F32, 7, &stream).unwrap();
        let index = ops::full(&[2], 3, DType::I64, &stream).unwrap();
        let error = wait(ops::index_select(&x, 0, &index, &stream)).unwrap_err();
        let expected = "`index_select` failed: index 3 is outside of a dimension of size 3";
        assert_eq!(error.to_string(), expected, "{name}");
        let stream = runtime.stream(Device::HOST).unwrap();
        let zero = ops::full(&[2], 0, DType::I32, &stream).unwrap();
        let error = wait(ops::div_rounded(&zero, &zero, ops::Rounding::Floor, &stream)).unwrap_err();
        assert!(error.to_string().starts_with("`div` failed: an integer was divided by zero"), "{name}: {error}");
    }
}

#[test]
fn tensors_of_another_device_are_refused() {
    let (_, runtime) = runtimes().next().unwrap();
    let [here, there] = [0, 1].map(|index| runtime.stream(Device::Cuda(index)).unwrap());
    let x = ops::full(&[2], 1.0, DType::F32, &here).unwrap();
    let error = ops::add(&x, 1.0, &there).unwrap_err().to_string();
    assert_eq!(error, "a storage on cuda:0 was given to a stream of cuda:1: copy it there first");
    let nothing = ops::full(&[0], 1.0, DType::F32, &here).unwrap();
    assert!(ops::sum(&nothing, &[], false, &here).is_ok());
}

/// Enough elements for several threads.
#[test]
fn k1_and_r1_results_do_not_depend_on_the_number_of_threads() {
    let stream = host();
    let x = ops::randn(&[1000, 1003], DType::F32, 3, &stream).unwrap();
    let column = ops::randn(&[1000, 1], DType::F32, 4, &stream).unwrap();
    let programs: [(&str, &(dyn Fn() -> Tensor + Sync)); 9] = [
        ("sum of all", &|| ops::sum(&x, &[], false, &stream).unwrap()),
        ("sums of rows", &|| ops::sum(&x, &[1], false, &stream).unwrap()),
        ("sums of columns", &|| ops::sum(&x, &[0], false, &stream).unwrap()),
        ("places", &|| ops::argmax(&x, Some(0), false, &stream).unwrap()),
        ("broadcast", &|| ops::mul(&x, &column, &stream).unwrap()),
        ("transposed", &|| ops::copy(&x.transpose(0, 1).unwrap(), &stream).unwrap()),
        ("softmax", &|| ops::softmax(&x, 0, &stream).unwrap()),
        ("random", &|| ops::randn(&[700, 1001], DType::F32, 5, &stream).unwrap()),
        ("joined", &|| ops::cat(&[&x, &x], 1, &stream).unwrap()),
    ];
    for (name, program) in programs {
        let with_threads = |count: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(count).build().unwrap();
            pool.install(|| numbers(&program()))
        };
        let single = with_threads(1);
        assert!(single == with_threads(3), "{name}");
    }
}

#[test]
fn large_reductions_are_close_to_exact_ones() {
    let stream = host();
    let x = ops::rand(&[300, 5, 2000], DType::F32, 9, &stream).unwrap();
    let elements = numbers(&x);
    let exact: f64 = elements.iter().sum();
    let found = numbers(&ops::sum(&x, &[], false, &stream).unwrap())[0];
    assert!((found - exact).abs() < 1e-6 * exact, "{found} instead of {exact}");
    for (dims, of) in [(vec![0_i64], 0), (vec![1], 1), (vec![2], 2)] {
        let found = numbers(&ops::mean(&x, &dims, false, &stream).unwrap());
        let sizes = [300, 5, 2000];
        let mut sums = vec![0.0; elements.len() / sizes[of]];
        for (index, element) in elements.iter().enumerate() {
            let place = [index / 10_000, index / 2000 % 5, index % 2000];
            let kept: Vec<_> = (0..3).filter(|dim| *dim != of).collect();
            sums[place[kept[0]] * sizes[kept[1]] + place[kept[1]]] += element / sizes[of] as f64;
        }
        for (found, exact) in found.iter().zip(&sums) {
            assert!((found - exact).abs() < 1e-6, "over {of}: {found} instead of {exact}");
        }
    }
}

#[test]
fn random_elements_are_of_their_distribution_and_repeat() {
    let stream = host();
    for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
        let uniform = numbers(&ops::rand(&[100_001], dtype, 11, &stream).unwrap());
        assert!(uniform.iter().all(|x| (0.0..1.0).contains(x)), "{dtype}");
        let mean = uniform.iter().sum::<f64>() / 100_001.0;
        assert!((mean - 0.5).abs() < 0.005, "{dtype}: {mean}");
        let normal = numbers(&ops::randn(&[100_001], dtype, 11, &stream).unwrap());
        let mean = normal.iter().sum::<f64>() / 100_001.0;
        let variance = normal.iter().map(|x| x * x).sum::<f64>() / 100_001.0;
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.03, "{dtype}: {mean}, {variance}");
        // A shorter tensor of the same seed is its beginning; another seed's has nothing to do with it.
        assert_eq!(numbers(&ops::randn(&[77], dtype, 11, &stream).unwrap()), normal[..77]);
        assert_ne!(numbers(&ops::randn(&[77], dtype, 12, &stream).unwrap()), normal[..77]);
    }
    assert!(ops::rand(&[2], DType::I32, 1, &stream).is_err());
}

#[test]
fn half_precision_parameters_step_with_state_in_single() {
    let stream = host();
    let value = ops::full(&[3], 1.0, DType::BF16, &stream).unwrap();
    let weights = Param::new(value);
    let mut optimizer = ops::Optimizer::new(vec![weights.clone()], ops::Sgd { momentum: 0.5, ..ops::Sgd::new(0.25) });
    let grad = ops::full(&[3], 1.0, DType::F32, &stream).unwrap();
    for expected in [0.75, 0.375, -0.0625] {
        optimizer.step(&[Some(grad.clone())], &stream).unwrap();
        assert_eq!(numbers(&weights.value()), [expected; 3]);
    }
    assert!(optimizer.step(&[], &stream).is_err());
    let wrong = ops::full(&[2], 1.0, DType::F32, &stream).unwrap();
    assert!(matches!(optimizer.step(&[Some(wrong)], &stream), Err(ops::OpError::Shapes { .. })));
    assert_eq!(numbers(&weights.value()), [-0.0625; 3], "no step was taken");
}
