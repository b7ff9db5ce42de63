//! Beside what torch gave: `tests/vectors/vectors.bin`, which `tests/vectors/record.py` wrote.

use farcall_device::{DType, Layout, Param, Runtime, Tensor};
use farcall_ops::{Adam, Arg, Optimizer, Rule, Sgd, cast, find, operators, promote};
use serde_json::Value;

use crate::{LONG, host, numbers};

/// The recording: a header, and the bytes of its tensors.
struct Recorded {
    header: Value,
    bytes: &'static [u8],
}

impl Recorded {
    fn new() -> Self {
        let file = include_bytes!("../vectors/vectors.bin");
        let (len, rest) = file.split_at(8);
        let (header, bytes) = rest.split_at(u64::from_le_bytes(len.try_into().unwrap()) as usize);
        Self { header: serde_json::from_slice(header).unwrap(), bytes }
    }

    fn list(&self, key: &str) -> &Vec<Value> {
        self.header[key].as_array().unwrap()
    }

    fn tensor(&self, entry: &Value) -> Tensor {
        let sizes = |key: &str| entry[key].as_array().map(|list| list.iter().map(size).collect::<Vec<_>>());
        let (dtype, shape) = (dtype(&entry["d"]), sizes("s").unwrap());
        let layout = match sizes("t") {
            Some(strides) => {
                let strides: Vec<i64> = strides.into_iter().map(|stride| stride as i64).collect();
                Layout::strided(dtype, &shape, &strides, size(&entry["o"])).unwrap()
            }
            None => Layout::contiguous(dtype, &shape).unwrap(),
        };
        let elements = entry["n"].as_u64().map_or(layout.numel(), |elements| elements as usize);
        let (start, len) = (size(&entry["at"]), elements * dtype.size_bytes());
        let mut storage = Runtime::global().alloc_host(len).unwrap();
        storage.as_bytes_mut().unwrap().copy_from_slice(&self.bytes[start..start + len]);
        Tensor::from_storage(storage.freeze_ready(), layout).unwrap()
    }

    fn arg(&self, value: &Value) -> Arg {
        match value {
            Value::Null => Arg::None,
            Value::Bool(value) => Arg::Bool(*value),
            Value::Number(number) => Arg::Int(number.as_i64().unwrap()),
            Value::Array(list) => Arg::Ints(list.iter().map(|item| item.as_i64().unwrap()).collect()),
            Value::Object(entry) if entry.contains_key("d") => Arg::Tensor(self.tensor(value)),
            Value::Object(entry) => {
                let (kind, value) = entry.iter().next().unwrap();
                match kind.as_str() {
                    "float" => Arg::Float(value.as_str().unwrap().parse().unwrap()),
                    "text" => Arg::Text(value.as_str().unwrap().to_owned()),
                    "dtype" => Arg::DType(dtype(value)),
                    "tensors" => {
                        Arg::Tensors(value.as_array().unwrap().iter().map(|entry| self.tensor(entry)).collect())
                    }
                    other => panic!("{other} is no argument"),
                }
            }
            Value::String(text) => panic!("{text} stands for no argument"),
        }
    }
}

fn size(value: &Value) -> usize {
    value.as_u64().unwrap() as usize
}

fn dtype(value: &Value) -> DType {
    value.as_str().unwrap().parse().unwrap()
}

fn bytes_of(tensor: &Tensor) -> Vec<u8> {
    let packed = farcall_ops::copy(tensor, &host()).unwrap().host().wait(LONG).unwrap();
    packed.storage().as_bytes().unwrap().to_vec()
}

/// Whether two tensors are the same; reals within `tolerance` of the larger of the element and the largest one, NaN where NaN is.
fn compare(found: &Tensor, expected: &Tensor, tolerance: f64) -> Result<(), String> {
    let kind = |tensor: &Tensor| (tensor.dtype(), tensor.shape().to_vec());
    if kind(found) != kind(expected) {
        return Err(format!("{:?} instead of {:?}", kind(found), kind(expected)));
    }
    if found.dtype().is_complex() || matches!(found.dtype(), DType::F8E4M3 | DType::F8E5M2) {
        let same = bytes_of(found) == bytes_of(expected);
        return if same { Ok(()) } else { Err(format!("{:x?} instead of {:x?}", bytes_of(found), bytes_of(expected))) };
    }
    let (found, expected) = (numbers(found), numbers(expected));
    let largest = expected.iter().copied().filter(|number| number.is_finite()).fold(0.0, |a: f64, b| a.max(b.abs()));
    let same = |(found, expected): (&f64, &f64)| {
        found == expected
            || found.is_nan() && expected.is_nan()
            || (found - expected).abs() <= tolerance * largest && expected.is_finite()
    };
    if found.iter().zip(&expected).all(same) { Ok(()) } else { Err(format!("{found:?} instead of {expected:?}")) }
}

/// How far a dtype's last bit is from the largest element.
fn last_bit(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 2_f64.powi(-10),
        DType::BF16 => 2_f64.powi(-7),
        DType::F32 => 2_f64.powi(-22),
        DType::F64 => 2_f64.powi(-50),
        _ => 0.0,
    }
}

/// Operators that are rounded once: the same bits are asked for. (torch's square root is not always the nearest.)
const EXACT: &[&str] = &[
    "aten::mul",
    "aten::div",
    "aten::maximum",
    "aten::minimum",
    "aten::neg",
    "aten::abs",
    "aten::sign",
    "aten::relu",
    "aten::eq",
    "aten::ne",
    "aten::lt",
    "aten::le",
    "aten::gt",
    "aten::ge",
    "aten::where",
    "aten::amax",
    "aten::amin",
    "aten::max",
    "aten::min",
    "aten::argmax",
    "aten::argmin",
    "aten::cat",
    "aten::stack",
    "aten::slice",
    "aten::select",
    "aten::index_select",
    "aten::permute",
    "aten::transpose",
    "aten::t",
    "aten::view",
    "aten::reshape",
    "aten::expand",
    "aten::unsqueeze",
    "aten::squeeze",
    "aten::to",
    "aten::clone",
    "aten::full",
    "aten::zeros",
    "aten::ones",
    "aten::fill",
    "aten::flatten",
];

#[test]
fn every_operator_gives_what_torch_gives() {
    let recorded = Recorded::new();
    let stream = host();
    let (mut failures, mut seen) = (Vec::new(), std::collections::BTreeSet::new());
    for (index, case) in recorded.list("cases").iter().enumerate() {
        let name = case["op"].as_str().unwrap();
        let operator = find(name).unwrap_or_else(|| panic!("{name} is recorded and not in the table"));
        seen.insert(name);
        let args: Vec<Arg> = case["args"].as_array().unwrap().iter().map(|arg| recorded.arg(arg)).collect();
        let outcome = operator.call(&args, &stream);
        let mut fail = |what: String| failures.push(format!("case {index}, {name}{}: {what}", case["args"]));
        match (outcome, case["error"].as_str()) {
            (Err(_), Some(_)) => {}
            (Err(error), None) => fail(format!("fails: {error}")),
            (Ok(_), Some(error)) => fail(format!("gives a result, and torch says: {error}")),
            (Ok(results), None) => {
                let expected = case["results"].as_array().unwrap();
                assert_eq!(results.len(), expected.len(), "results of {name}");
                for (found, expected) in results.iter().zip(expected) {
                    let expected = recorded.tensor(expected);
                    let exact = EXACT.contains(&name.split('.').next().unwrap());
                    let tolerance = if exact { 0.0 } else { last_bit(expected.dtype()) };
                    let tolerance = case["tolerance"].as_f64().unwrap_or(tolerance);
                    if let Err(difference) = compare(found, &expected, tolerance) {
                        fail(difference);
                    }
                }
            }
        }
    }
    assert!(failures.is_empty(), "{} cases differ:\n{}", failures.len(), failures[..failures.len().min(40)].join("\n"));
    let unseen: Vec<_> = operators().map(|operator| operator.name()).filter(|name| !seen.contains(name)).collect();
    assert!(unseen.is_empty(), "operators without a recorded case: {unseen:?}");
}

#[test]
fn schemas_are_torchs() {
    let recorded = Recorded::new();
    for operator in operators() {
        assert_eq!(recorded.header["schemas"][operator.name()], operator.schema);
    }
}

#[test]
fn every_code_is_cast_as_torch_casts_it() {
    let recorded = Recorded::new();
    let stream = host();
    for case in recorded.header["casts"]["exhaustive"].as_array().unwrap() {
        let (from, to) = (dtype(&case["from"]), dtype(&case["to"]));
        let count = 1_usize << (8 * from.size_bytes());
        let codes: Vec<u8> = (0..count).flat_map(|code| code.to_le_bytes()[..from.size_bytes()].to_vec()).collect();
        let mut storage = Runtime::global().alloc_host(codes.len()).unwrap();
        storage.as_bytes_mut().unwrap().copy_from_slice(&codes);
        let source = Tensor::from_storage(storage.freeze_ready(), Layout::contiguous(from, &[count]).unwrap()).unwrap();
        let found = bytes_of(&cast(&source, to, &stream).unwrap());
        let planes: Vec<Vec<u8>> = case["planes"].as_array().unwrap().iter().map(|run| plane(&recorded, run)).collect();
        for code in 0..count {
            let expected: Vec<u8> = planes.iter().map(|plane| plane[code]).collect();
            let found = &found[code * to.size_bytes()..(code + 1) * to.size_bytes()];
            // Which of its codes NaN becomes is nobody's promise.
            let both_nan = is_nan(to, found) && is_nan(to, &expected);
            assert!(found == expected || both_nan, "{from} {code:#x} to {to}: {found:x?} instead of {expected:x?}");
        }
    }
}

/// The bytes that pairs of a count and a value stand for.
fn plane(recorded: &Recorded, run: &Value) -> Vec<u8> {
    let (start, len) = (size(&run[0]), size(&run[1]));
    let pairs = recorded.bytes[start..start + len].chunks_exact(3);
    pairs.flat_map(|pair| vec![pair[2]; usize::from(u16::from_le_bytes([pair[0], pair[1]]))]).collect()
}

fn is_nan(dtype: DType, bytes: &[u8]) -> bool {
    match (dtype, bytes) {
        (DType::F8E4M3, [code]) => code & 0x7f == 0x7f,
        (DType::F8E5M2, [code]) => code & 0x7f > 0x7c,
        (DType::F16, [low, high]) => farcall_device::f16::from_le_bytes([*low, *high]).is_nan(),
        (DType::BF16, [low, high]) => farcall_device::bf16::from_le_bytes([*low, *high]).is_nan(),
        (DType::F32, bytes) => f32::from_le_bytes(bytes.try_into().unwrap()).is_nan(),
        _ => false,
    }
}

#[test]
fn casts_of_all_pairs_and_beside_every_boundary_are_torchs() {
    let recorded = Recorded::new();
    let stream = host();
    for list in ["pairs", "edges"] {
        let cases = recorded.header["casts"][list].as_array().unwrap();
        assert!(cases.len() >= 4, "{list}");
        for case in cases {
            let (source, expected) = (recorded.tensor(&case["source"]), recorded.tensor(&case["result"]));
            let to = expected.dtype();
            let (found, expected) = (bytes_of(&cast(&source, to, &stream).unwrap()), bytes_of(&expected));
            let size = to.size_bytes();
            for (index, (found, expected)) in found.chunks(size).zip(expected.chunks(size)).enumerate() {
                let same = found == expected || is_nan(to, found) && is_nan(to, expected);
                assert!(same, "element {index} of {source:?} to {to}: {found:x?} instead of {expected:x?}");
            }
        }
    }
}

#[test]
fn promotion_is_torchs() {
    let recorded = Recorded::new();
    let promotion = &recorded.header["promotion"];
    let stream = host();
    let name = |dtype: DType| Value::from(dtype.name());
    let rows = promotion["tensors"].as_array().unwrap();
    assert_eq!(rows.len(), 17 * 17);
    for row in rows {
        let (first, second) = (dtype(&row[0]), dtype(&row[1]));
        let found = promote(first, second).map_or(Value::Null, name);
        // Two f16 are a complex number that there is none of here; with a real of 16 bits torch stays within it.
        assert_eq!(found, row[2], "{first} and {second}");
        // A tensor without dimensions: seen in the result of a choice, which takes every dtype.
        let zeros = |dtype, shape: &[usize]| farcall_ops::full(shape, 0, dtype, &stream).unwrap();
        let (a, b) = (zeros(first, &[2]), zeros(second, &[]));
        let condition = zeros(DType::Bool, &[2]);
        let found = farcall_ops::choose(&condition, &a, &b, &stream);
        let found = found.map_or(Value::Null, |tensor| name(tensor.dtype()));
        assert_eq!(found, row[3], "{first} and a single {second}");
    }
    for row in promotion["numbers"].as_array().unwrap() {
        let dtype = dtype(&row[0]);
        let a = farcall_ops::full(&[2], 0, dtype, &stream).unwrap();
        let condition = farcall_ops::full(&[2], true, DType::Bool, &stream).unwrap();
        for (column, number) in [(1, true.into()), (2, 1.into()), (3, farcall_ops::Scalar::Float(1.0))] {
            let found = farcall_ops::choose(&condition, &a, number, &stream);
            let found = found.map_or(Value::Null, |tensor| name(tensor.dtype()));
            assert_eq!(found, row[column], "{dtype} and {number:?}");
        }
    }
}

#[test]
fn optimisers_step_as_torchs() {
    let recorded = Recorded::new();
    let stream = host();
    for (index, entry) in recorded.list("optimisers").iter().enumerate() {
        let options = entry["options"].as_object().unwrap();
        let text = |key: &str| options.get(key).map(|value| value.as_str().unwrap());
        let number = |key: &str, default: f64| text(key).map_or(default, |text| text.parse().unwrap());
        let learning_rate = number("lr", 0.0);
        let rule: Rule = match entry["kind"].as_str().unwrap() {
            "sgd" => Sgd {
                learning_rate,
                momentum: number("momentum", 0.0),
                dampening: number("dampening", 0.0),
                weight_decay: number("weight_decay", 0.0),
                nesterov: text("nesterov") == Some("True"),
            }
            .into(),
            kind => {
                let base = if kind == "adam" { Adam::new(learning_rate) } else { Adam::decoupled(learning_rate) };
                let betas = text("betas").map(|pair| pair.trim_matches(['(', ')']).split_once(", ").unwrap());
                Adam {
                    betas: betas.map_or(base.betas, |(a, b)| (a.parse().unwrap(), b.parse().unwrap())),
                    epsilon: number("eps", base.epsilon),
                    weight_decay: number("weight_decay", base.weight_decay),
                    ..base
                }
                .into()
            }
        };
        let params = entry["params"].as_array().unwrap().iter().map(|param| Param::new(recorded.tensor(param)));
        let mut optimizer = Optimizer::new(params.collect(), rule);
        for (step, expected) in entry["steps"].as_array().unwrap().iter().enumerate() {
            let grad = |grad: &Value| (!grad.is_null()).then(|| recorded.tensor(grad));
            let grads: Vec<_> = expected["grads"].as_array().unwrap().iter().map(grad).collect();
            optimizer.step(&grads, &stream).unwrap();
            for (param, expected) in optimizer.params().zip(expected["params"].as_array().unwrap()) {
                let expected = recorded.tensor(expected);
                let tolerance = 4.0 * last_bit(expected.dtype());
                if let Err(difference) = compare(&param.value(), &expected, tolerance) {
                    panic!("optimiser {index}, {rule:?}, step {step}: {difference}");
                }
            }
        }
    }
}
