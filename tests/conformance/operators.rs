//! Operators by torch's names, run by another worker: values computed by hand.

use farcall::device::Config;
use farcall::prelude::*;
use farcall::{Kwargs, Runtime};

use crate::harness::{Group, block_on, bounded};

fn tensor(elements: &[f32], shape: &[usize]) -> Tensor {
    Tensor::from_slice(elements, shape).expect("a small tensor")
}

/// Elements of any dtype, as f64.
fn numbers(tensor: &Tensor) -> Vec<f64> {
    match tensor.dtype() {
        DType::F32 => tensor.to_vec::<f32>().expect("f32").into_iter().map(f64::from).collect(),
        DType::F64 => tensor.to_vec::<f64>().expect("f64"),
        DType::I64 => tensor.to_vec::<i64>().expect("i64").into_iter().map(|x| x as f64).collect(),
        DType::Bool => tensor.to_vec::<bool>().expect("bool").into_iter().map(|x| f64::from(u8::from(x))).collect(),
        other => panic!("{other} is not expected"),
    }
}

#[test]
fn operators_are_called_by_name() {
    bounded(|| {
        let group = Group::new(2);
        let w1 = group.agents[0].to("w1");
        let x = tensor(&[1.0, -2.0, 3.0, -4.0], &[2, 2]);
        let y = tensor(&[2.0, 2.0, 0.5, 4.0], &[2, 2]);
        let one = std::f32::consts::E;
        let mask = Tensor::from_slice(&[true, false, false, true], &[2, 2]).expect("a mask");
        let batch = |x: &Tensor| x.unsqueeze(0).expect("a batch");
        let index = Tensor::from_slice(&[1_i64, 0], &[2]).expect("an index");
        let halves = tensor(&[0.5_f32.ln(), 0.5_f32.ln()], &[1, 2]);
        let class = Tensor::from_slice(&[1_i64], &[1]).expect("a class");
        type Case = (&'static str, Vec<Value>, Kwargs, &'static [f64]);
        let cases: Vec<Case> = vec![
            ("aten::add", args![&x, &y], kwargs! {}, &[3.0, 0.0, 3.5, 0.0]),
            ("aten::add", args![&x, &y], kwargs! {"alpha": 2.0}, &[5.0, 2.0, 4.0, 4.0]),
            ("aten::add", args![&x, 1], kwargs! {}, &[2.0, -1.0, 4.0, -3.0]),
            ("aten::add", args![1, &x], kwargs! {}, &[2.0, -1.0, 4.0, -3.0]),
            ("aten::sub", args![&x, &y], kwargs! {}, &[-1.0, -4.0, 2.5, -8.0]),
            ("aten::sub.Scalar", args![&x, 1, 3], kwargs! {}, &[-2.0, -5.0, 0.0, -7.0]),
            ("aten::mul", args![&x, &y], kwargs! {}, &[2.0, -4.0, 1.5, -16.0]),
            ("aten::mul", args![&x, 0.5], kwargs! {}, &[0.5, -1.0, 1.5, -2.0]),
            ("aten::div", args![&x, &y], kwargs! {}, &[0.5, -1.0, 6.0, -1.0]),
            ("aten::div", args![&x, 2], kwargs! {}, &[0.5, -1.0, 1.5, -2.0]),
            ("aten::div", args![&x, 2], kwargs! {"rounding_mode": "floor"}, &[0.0, -1.0, 1.0, -2.0]),
            ("aten::neg", args![&x], kwargs! {}, &[-1.0, 2.0, -3.0, 4.0]),
            ("aten::relu", args![&x], kwargs! {}, &[1.0, 0.0, 3.0, 0.0]),
            ("aten::exp", args![&tensor(&[0.0], &[1])], kwargs! {}, &[1.0]),
            ("aten::log", args![&tensor(&[one], &[1])], kwargs! {}, &[1.0]),
            ("aten::sqrt", args![&tensor(&[9.0], &[1])], kwargs! {}, &[3.0]),
            ("aten::tanh", args![&tensor(&[0.0], &[1])], kwargs! {}, &[0.0]),
            ("aten::sigmoid", args![&tensor(&[0.0], &[1])], kwargs! {}, &[0.5]),
            ("aten::gelu", args![&tensor(&[0.0], &[1])], kwargs! {"approximate": "tanh"}, &[0.0]),
            ("aten::pow", args![&x, 2], kwargs! {}, &[1.0, 4.0, 9.0, 16.0]),
            ("aten::pow", args![2, &tensor(&[3.0], &[1])], kwargs! {}, &[8.0]),
            ("aten::eq", args![&x, 3], kwargs! {}, &[0.0, 0.0, 1.0, 0.0]),
            ("aten::ne", args![&x, 3], kwargs! {}, &[1.0, 1.0, 0.0, 1.0]),
            ("aten::lt", args![&x, &y], kwargs! {}, &[1.0, 1.0, 0.0, 1.0]),
            ("aten::le", args![&x, 1.0], kwargs! {}, &[1.0, 1.0, 0.0, 1.0]),
            ("aten::gt", args![&x, &y], kwargs! {}, &[0.0, 0.0, 1.0, 0.0]),
            ("aten::ge", args![&x, 1.0], kwargs! {}, &[1.0, 0.0, 1.0, 0.0]),
            ("aten::where", args![&mask, &x, &y], kwargs! {}, &[1.0, 2.0, 0.5, -4.0]),
            ("aten::matmul", args![&x, &y], kwargs! {}, &[1.0, -6.0, 4.0, -10.0]),
            ("aten::mm", args![&x, &y], kwargs! {}, &[1.0, -6.0, 4.0, -10.0]),
            ("aten::bmm", args![&batch(&x), &batch(&y)], kwargs! {}, &[1.0, -6.0, 4.0, -10.0]),
            ("aten::sum", args![&x], kwargs! {}, &[-2.0]),
            ("aten::sum", args![&x, 1], kwargs! {"keepdim": true}, &[-1.0, -1.0]),
            ("aten::sum", args![&x, [0, 1]], kwargs! {"dtype": DType::F64}, &[-2.0]),
            ("aten::mean", args![&x], kwargs! {}, &[-0.5]),
            ("aten::mean", args![&x, 0], kwargs! {}, &[2.0, -3.0]),
            ("aten::max", args![&x], kwargs! {}, &[3.0]),
            ("aten::argmax", args![&x, 1], kwargs! {}, &[0.0, 0.0]),
            ("aten::norm", args![&tensor(&[3.0, 4.0], &[2])], kwargs! {}, &[5.0]),
            ("aten::softmax", args![&tensor(&[1.0, 1.0], &[2]), 0], kwargs! {}, &[0.5, 0.5]),
            ("aten::log_softmax", args![&tensor(&[7.0], &[1]), -1], kwargs! {}, &[0.0]),
            ("aten::nll_loss", args![&halves, &class], kwargs! {}, &[std::f64::consts::LN_2]),
            (
                "aten::cat",
                args![vec![x.clone(), y.clone()], 1],
                kwargs! {},
                &[1.0, -2.0, 2.0, 2.0, 3.0, -4.0, 0.5, 4.0],
            ),
            ("aten::stack", args![vec![x.clone(), y.clone()]], kwargs! {}, &[1.0, -2.0, 3.0, -4.0, 2.0, 2.0, 0.5, 4.0]),
            ("aten::slice", args![&x, 1, 1], kwargs! {}, &[-2.0, -4.0]),
            ("aten::index_select", args![&x, 0, &index], kwargs! {}, &[3.0, -4.0, 1.0, -2.0]),
            ("aten::fill", args![&x, 7], kwargs! {}, &[7.0; 4]),
            ("aten::zeros", args![[2, 1]], kwargs! {}, &[0.0; 2]),
            ("aten::ones", args![[3]], kwargs! {"dtype": "int64"}, &[1.0; 3]),
            ("aten::full", args![[2], 0.5], kwargs! {"device": Device::HOST}, &[0.5; 2]),
            ("aten::to", args![&mask, DType::F32], kwargs! {}, &[1.0, 0.0, 0.0, 1.0]),
            ("aten::clone", args![&x.transpose(0, 1).expect("a view")], kwargs! {}, &[1.0, 3.0, -2.0, -4.0]),
        ];
        for (name, args, kwargs, expected) in cases {
            let value: Tensor = w1.builtin_as(name, args, kwargs).wait().unwrap_or_else(|error| panic!("{error}"));
            let value = block_on(value.host()).expect("elements");
            let near = numbers(&value).iter().zip(expected).all(|(x, y)| (x - y).abs() <= 1e-6);
            assert!(near && value.numel() == expected.len(), "{name}: {:?}, not {expected:?}", numbers(&value));
        }
        let (values, indices): (Tensor, Tensor) =
            w1.builtin_as("aten::max", args![&x, 1], kwargs! {}).wait().expect("two tensors");
        assert_eq!((numbers(&values), numbers(&indices)), (vec![1.0, 3.0], vec![0.0, 0.0]));
        let error = w1.builtin("aten::matmul", args![&x, &tensor(&[1.0; 3], &[3])], kwargs! {}).wait();
        let Err(CallError::Remote { error, .. }) = error else { panic!("{error:?}") };
        assert!(error.message.contains("matmul"), "{error}");
        group.shutdown();
    });
}

/// On the device of the tensors, or on the one that is asked for.
#[test]
fn operators_run_where_their_tensors_are() {
    bounded(|| {
        let group = Group::with(2, |options| {
            let config = Config { emulated_devices: 2, ..Config::default() };
            options.device_runtime = Some(Runtime::new(config).expect("an emulated runtime"));
        });
        let w1 = group.agents[0].to("w1");
        let ones: Tensor = w1
            .builtin_as("aten::ones", args![[4]], kwargs! {"device": "cuda:1"})
            .wait()
            .unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(ones.device(), Device::Cuda(1));
        let twos: Tensor = w1.builtin_as("aten::add", args![&ones, &ones], kwargs! {}).wait().expect("a sum");
        assert_eq!(twos.device(), Device::Cuda(1));
        assert_eq!(numbers(&block_on(twos.host()).expect("elements")), [2.0; 4]);
        group.shutdown();
    });
}
