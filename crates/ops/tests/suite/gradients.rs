//! Every derivative in the table beside central differences, in `f64`.

use farcall_device::{DType, Tensor};
use farcall_ops::{Arg, Derivative, find, operators};

use crate::{host, numbers};

/// How far an element is moved to both sides.
const STEP: f64 = 1e-6;
/// What rounding and curvature may make of a difference.
const TOLERANCE: f64 = 2e-7;

/// Numbers without a pattern, none close to another, to 0 or to a half: extremes stay where they are when one is moved.
fn values(count: usize, salt: usize) -> Vec<f64> {
    (0..count).map(|index| (((index * 37 + salt * 11) % 101) as f64 - 50.3) / 23.0).collect()
}

fn tensor(shape: &[usize], salt: usize) -> Arg {
    Arg::Tensor(Tensor::from_slice(&values(shape.iter().product(), salt), shape).unwrap())
}

/// As [`tensor`], of numbers above 0.
fn positive(shape: &[usize], salt: usize) -> Arg {
    let values: Vec<f64> = values(shape.iter().product(), salt).iter().map(|value| value.abs() + 0.3).collect();
    Arg::Tensor(Tensor::from_slice(&values, shape).unwrap())
}

fn indices(values: &[i64]) -> Arg {
    Arg::Tensor(Tensor::from_slice(values, &[values.len()]).unwrap())
}

/// Arguments of an operator at which it is differentiable.
fn examples(name: &str) -> Vec<Vec<Arg>> {
    use Arg::{Bool, Float, Int, Ints, None, Text};
    let t = tensor;
    let pair = || vec![t(&[2, 3], 1), t(&[3], 2)];
    match name {
        "aten::add.Tensor" | "aten::sub.Tensor" => {
            vec![vec![t(&[2, 3], 1), t(&[2, 1], 2), Float(1.7)], vec![t(&[3], 1), t(&[2, 3], 2), Int(1)]]
        }
        "aten::add.Scalar" | "aten::sub.Scalar" | "aten::rsub.Scalar" => vec![vec![t(&[2, 3], 1), Float(0.5), Int(2)]],
        "aten::mul.Tensor" | "aten::maximum" | "aten::minimum" => {
            vec![pair(), vec![t(&[], 3), t(&[2, 2], 4)], vec![t(&[2, 1], 5), t(&[1, 3], 6)]]
        }
        "aten::div.Tensor" => vec![vec![t(&[2, 3], 1), positive(&[3], 2)]],
        "aten::mul.Scalar" | "aten::div.Scalar" => vec![vec![t(&[2, 3], 1), Float(-1.3)]],
        "aten::pow.Tensor_Tensor" => vec![vec![positive(&[2, 3], 1), t(&[3], 2)]],
        "aten::pow.Tensor_Scalar" => [2.0, 0.5, 3.0, -1.5, 0.0].map(|p| vec![positive(&[2, 3], 1), Float(p)]).to_vec(),
        "aten::pow.Scalar" => vec![vec![Float(1.5), t(&[4], 1)]],
        "aten::neg" | "aten::abs" | "aten::exp" | "aten::tanh" | "aten::sigmoid" | "aten::relu" => {
            vec![vec![t(&[2, 3], 1)]]
        }
        "aten::log" | "aten::sqrt" => vec![vec![positive(&[2, 3], 1)]],
        "aten::gelu" => ["none", "tanh"].map(|how| vec![t(&[7], 1), Text(how.to_owned())]).to_vec(),
        "aten::where.self" => vec![vec![truths(), t(&[2, 3], 1), t(&[3], 2)]],
        "aten::where.ScalarOther" => vec![vec![truths(), t(&[2, 3], 1), Float(0.5)]],
        "aten::where.ScalarSelf" => vec![vec![truths(), Float(0.5), t(&[1, 3], 1)]],
        "aten::sum" | "aten::mean" => vec![vec![t(&[2, 3], 1), None]],
        "aten::sum.dim_IntList" | "aten::mean.dim" => vec![
            vec![t(&[2, 3, 2], 1), Ints(vec![1]), Bool(false), None],
            vec![t(&[2, 3, 2], 1), Ints(vec![0, -1]), Bool(true), None],
            vec![t(&[2, 3], 1), None, Bool(false), None],
        ],
        "aten::amax" | "aten::amin" => {
            vec![vec![t(&[2, 5], 1), Ints(vec![1]), Bool(false)], vec![t(&[2, 5], 1), Ints(vec![]), Bool(true)]]
        }
        "aten::max" | "aten::min" => vec![vec![t(&[2, 5], 1)]],
        "aten::max.dim" | "aten::min.dim" => {
            vec![vec![t(&[2, 5], 1), Int(1), Bool(false)], vec![t(&[3, 2], 1), Int(0), Bool(true)]]
        }
        "aten::norm.Scalar" => vec![vec![t(&[2, 3], 1), Int(2)]],
        "aten::linalg_vector_norm" => [2.0, 1.0, 3.0, 1.5, f64::INFINITY, f64::NEG_INFINITY]
            .map(|p| vec![t(&[2, 5], 1), Float(p), Ints(vec![1]), Bool(false), None])
            .to_vec(),
        "aten::softmax.int" | "aten::log_softmax.int" => {
            vec![vec![t(&[2, 3], 1), Int(-1), None], vec![t(&[2, 3, 2], 1), Int(1), None]]
        }
        "aten::nll_loss" => (0..3)
            .flat_map(|reduction| {
                let target = indices(&[2, 0, 1, 2]);
                [
                    vec![t(&[4, 3], 1), target.clone(), None, Int(reduction), Int(-100)],
                    vec![t(&[4, 3], 1), target, positive(&[3], 2), Int(reduction), Int(0)],
                ]
            })
            .collect(),
        "aten::matmul" => [
            (&[2, 3][..], &[3, 4][..]),
            (&[3], &[3]),
            (&[3], &[3, 2]),
            (&[2, 3], &[3]),
            (&[2, 2, 3], &[3, 2]),
            (&[2, 1, 2, 3], &[3, 3, 2]),
            (&[3], &[2, 3, 2]),
        ]
        .map(|(a, b)| vec![t(a, 1), t(b, 2)])
        .to_vec(),
        "aten::mm" => vec![vec![t(&[2, 3], 1), t(&[3, 2], 2)]],
        "aten::bmm" => vec![vec![t(&[2, 2, 3], 1), t(&[2, 3, 2], 2)]],
        "aten::mv" => vec![vec![t(&[2, 3], 1), t(&[3], 2)]],
        "aten::dot" => vec![vec![t(&[3], 1), t(&[3], 2)]],
        "aten::addmm" => vec![vec![t(&[2], 1), t(&[3, 4], 2), t(&[4, 2], 3), Float(0.5), Int(2)]],
        "aten::to.dtype" => vec![vec![t(&[2, 3], 1), Arg::DType(DType::F64), Bool(false), Bool(true), None]],
        "aten::clone" => vec![vec![t(&[2, 3], 1), None]],
        "aten::slice.Tensor" => vec![
            vec![t(&[2, 7], 1), Int(1), Int(1), Int(6), Int(2)],
            vec![t(&[4, 2], 1), Int(0), Int(-3), None, Int(1)],
        ],
        "aten::select.int" => vec![vec![t(&[2, 3, 2], 1), Int(1), Int(-1)]],
        "aten::permute" => vec![vec![t(&[2, 3, 4], 1), Ints(vec![2, 0, 1])]],
        "aten::transpose.int" => vec![vec![t(&[2, 3], 1), Int(0), Int(-1)]],
        "aten::t" => vec![vec![t(&[2, 3], 1)], vec![t(&[3], 1)]],
        "aten::expand" => vec![vec![t(&[2, 1], 1), Ints(vec![3, -1, 4]), Bool(false)]],
        "aten::view" | "aten::reshape" => vec![vec![t(&[2, 3], 1), Ints(vec![3, -1])]],
        "aten::unsqueeze" => vec![vec![t(&[2, 3], 1), Int(1)]],
        "aten::squeeze.dim" => vec![vec![t(&[2, 1, 3], 1), Int(1)]],
        "aten::flatten.using_ints" => vec![vec![t(&[2, 3, 2], 1), Int(1), Int(-1)]],
        "aten::cat" => vec![vec![Arg::Tensors(list(&[2, 3])), Int(1)], vec![Arg::Tensors(list(&[2, 3])), Int(0)]],
        "aten::stack" => vec![vec![Arg::Tensors(list(&[2, 3])), Int(-1)]],
        "aten::index_select" => {
            vec![vec![t(&[3, 2], 1), Int(0), indices(&[2, 0, 2, 2])], vec![t(&[2, 3, 2], 1), Int(1), indices(&[1, 1])]]
        }
        other => panic!("{other} has a derivative and no example: add one"),
    }
}

fn truths() -> Arg {
    Arg::Tensor(Tensor::from_slice(&[true, false, true, true, false, false], &[2, 3]).unwrap())
}

fn list(shape: &[usize]) -> Vec<Tensor> {
    [1, 2].map(|salt| Tensor::from_slice(&values(shape.iter().product(), salt), shape).unwrap()).to_vec()
}

/// The tensors among arguments, in the order in which a derivative gives their gradients.
fn tensors(args: &[Arg]) -> Vec<&Tensor> {
    fn of(arg: &Arg) -> Vec<&Tensor> {
        match arg {
            Arg::Tensor(tensor) => vec![tensor],
            Arg::Tensors(tensors) => tensors.iter().collect(),
            _ => Vec::new(),
        }
    }
    args.iter().flat_map(of).collect()
}

/// The arguments with one tensor replaced.
fn with(args: &[Arg], place: usize, by: &Tensor) -> Vec<Arg> {
    let mut seen = 0;
    let mut swap = |tensor: &Tensor| {
        seen += 1;
        if seen - 1 == place { by.clone() } else { tensor.clone() }
    };
    let replace = |arg: &Arg| match arg {
        Arg::Tensor(tensor) => Arg::Tensor(swap(tensor)),
        Arg::Tensors(tensors) => Arg::Tensors(tensors.iter().map(&mut swap).collect()),
        other => other.clone(),
    };
    args.iter().map(replace).collect()
}

/// The same elements behind other strides.
fn strided(tensor: &Tensor) -> Tensor {
    let last = tensor.rank().saturating_sub(1);
    if tensor.rank() < 2 {
        return tensor.clone();
    }
    farcall_ops::copy(&tensor.transpose(0, last).unwrap(), &host()).unwrap().transpose(0, last).unwrap()
}

#[test]
fn every_derivative_is_what_central_differences_say() {
    let stream = host();
    let (mut checked, mut without) = (0, 0);
    for operator in operators() {
        let name = operator.name();
        if let Derivative::None(reason) = operator.derivative {
            assert!(!reason.is_empty(), "{name} says why it has no derivative");
            without += 1;
            continue;
        }
        checked += 1;
        for (index, plain) in examples(name).into_iter().enumerate() {
            let replaced = (0..tensors(&plain).len())
                .fold(plain.clone(), |args, place| with(&args, place, &strided(tensors(&args)[place])));
            let viewable = if name == "aten::view" { plain.clone() } else { replaced };
            for args in [plain, viewable] {
                let results = operator.call(&args, &stream).unwrap();
                let weights = values(results[0].numel(), 5);
                let grad = Tensor::from_slice(&weights, results[0].shape()).unwrap();
                let loss = |args: &[Arg]| -> f64 {
                    let results = operator.call(args, &stream).unwrap();
                    numbers(&results[0]).iter().zip(&weights).map(|(value, weight)| value * weight).sum()
                };
                let grads = operator.backward(&args, &results, &grad, &stream).unwrap().expect("a derivative");
                assert_eq!(grads.len(), tensors(&args).len(), "{name}: a gradient or none for each tensor");
                let mut given = 0;
                for (place, (tensor, grad)) in tensors(&args).into_iter().zip(&grads).enumerate() {
                    let Some(grad) = grad else { continue };
                    given += 1;
                    assert_eq!((grad.shape(), grad.dtype()), (tensor.shape(), tensor.dtype()), "{name}");
                    let (found, elements) = (numbers(grad), numbers(tensor));
                    for element in 0..elements.len() {
                        let moved = |by: f64| {
                            let mut elements = elements.clone();
                            elements[element] += by;
                            loss(&with(&args, place, &Tensor::from_slice(&elements, tensor.shape()).unwrap()))
                        };
                        let expected = (moved(STEP) - moved(-STEP)) / (2.0 * STEP);
                        let scale = 1.0 + expected.abs();
                        assert!(
                            (found[element] - expected).abs() < TOLERANCE * scale,
                            "{name}, example {index}, tensor {place}, element {element}: {} instead of {expected}",
                            found[element]
                        );
                    }
                }
                assert!(given > 0, "{name} gives no gradient");
            }
        }
    }
    println!("{checked} derivatives checked, {without} operators have none");
    assert!(checked >= 55, "{checked} derivatives");
}

#[test]
fn gradients_are_of_their_arguments_dtype() {
    let stream = host();
    let half = farcall_ops::full(&[2], 1.5, DType::BF16, &stream).unwrap();
    let wide = farcall_ops::full(&[3, 2], 2.0, DType::F64, &stream).unwrap();
    let count = farcall_ops::full(&[2], 3, DType::I64, &stream).unwrap();
    let mul = find("aten::mul.Tensor").unwrap();
    let run = |a: &Tensor, b: &Tensor| {
        let args = [Arg::Tensor(a.clone()), Arg::Tensor(b.clone())];
        let results = mul.call(&args, &stream).unwrap();
        mul.backward(&args, &results, &results[0], &stream).unwrap().unwrap()
    };
    let grads = run(&half, &wide);
    let kinds: Vec<_> = grads.iter().flatten().map(|grad| (grad.dtype(), grad.shape().to_vec())).collect();
    assert_eq!(kinds, [(DType::BF16, vec![2]), (DType::F64, vec![3, 2])]);
    assert_eq!(numbers(grads[0].as_ref().unwrap()), [18.0, 18.0], "summed over three rows");
    assert!(run(&half, &count)[1].is_none(), "integers have no gradient");
}
