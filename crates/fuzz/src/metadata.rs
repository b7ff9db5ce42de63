//! The codec of values: metadata bytes, and tensors beside them, as the types that users would send.
//!
//! An input's first byte picks the type and how many tensors come along; the rest is metadata.

use std::collections::BTreeMap;
use std::fmt::Debug;

use farcall_device::codec::{CodecError, decode, encode};
use farcall_device::{DType, Device, Tensor};
use farcall_schema::{Ref, Value};
use farcall_transport::fuzzing::Golden;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::memory::uncounted;

/// What decodes is encoded and decoded again to the same; without tensors, postcard reads the same from the same bytes.
pub(crate) fn metadata(input: &[u8]) -> bool {
    let Some((first, bytes)) = input.split_first() else { return false };
    let tensors = tensors(usize::from(first >> 4));
    match first & 0x0f {
        0 => agrees_with_postcard::<Everything>(bytes),
        1 => agrees_with_postcard::<Vec<Shape>>(bytes),
        2 => agrees_with_postcard::<BTreeMap<u16, Vec<Option<String>>>>(bytes),
        3 => agrees_with_postcard::<Chain>(bytes),
        4 => agrees_with_postcard::<Nested>(bytes),
        5 => agrees_with_postcard::<(Vec<()>, BTreeMap<String, ()>, Vec<[u8; 0]>)>(bytes),
        6 => agrees_with_postcard::<Vec<Vec<Vec<(u64, u64, u64, u64)>>>>(bytes),
        7 => with_tensors::<Model>(bytes, &tensors, 0),
        8 => with_tensors::<(Tensor, Vec<Tensor>, BTreeMap<u8, Option<Tensor>>)>(bytes, &tensors, 0),
        9 => with_tensors::<Vec<Layer>>(bytes, &tensors, tensors.len()),
        11 => with_tensors::<Value>(bytes, &tensors, tensors.len()),
        _ => with_tensors::<(String, f64, Option<bool>)>(bytes, &tensors, tensors.len()),
    }
}

#[derive(Debug, Serialize, Deserialize)]
enum Shape {
    Empty,
    Circle(f32),
    Pair(i16, Option<Box<Shape>>),
    Named { text: String, count: u128 },
}

#[derive(Debug, Serialize, Deserialize)]
struct Unit;

#[derive(Debug, Serialize, Deserialize)]
struct Meters(f64);

#[derive(Debug, Serialize, Deserialize)]
struct Everything {
    flags: (bool, bool),
    bytes: Vec<u8>,
    signed: (i8, i16, i32, i64, i128),
    unsigned: (u8, u16, u32, u64, u128),
    floats: (f32, f64, Meters),
    text: (char, char, String),
    shapes: Vec<Shape>,
    map: BTreeMap<String, Vec<Option<u32>>>,
    units: (Unit, (), [u16; 3]),
    dtype: DType,
    device: Device,
}

/// As deep as its input is long, a byte a level.
#[derive(Debug, Serialize, Deserialize)]
enum Chain {
    End,
    Link(Box<Chain>),
}

/// Each level makes room for the elements that it claims.
#[derive(Debug, Serialize, Deserialize)]
struct Nested(Vec<Nested>);

#[derive(Debug, Serialize, Deserialize)]
struct Model {
    name: String,
    layers: Vec<Layer>,
    bias: Option<Tensor>,
    by_name: BTreeMap<String, Tensor>,
    pair: (u8, Tensor),
}

#[derive(Debug, Serialize, Deserialize)]
enum Layer {
    Skip,
    Dense(Tensor),
    Both { weight: Tensor, scale: f32, mask: Box<Option<Tensor>> },
}

/// Tensors 0, 1, and so on; made once a thread.
fn tensors(count: usize) -> Vec<Tensor> {
    thread_local! {
        static ALL: Vec<Tensor> = (0..16).map(|index| Tensor::scalar(index).expect("a small tensor")).collect();
    }
    ALL.with(|all| all[..count].to_vec())
}

fn agrees_with_postcard<T: Serialize + DeserializeOwned + Debug>(bytes: &[u8]) -> bool {
    let ours = decode::<T>(bytes, &[]);
    // Limits that are ours: postcard counts out 2^60 elements without bytes, and recurses until the stack ends.
    if matches!(ours, Err(CodecError::TooDeep | CodecError::TooManyEmptyElements)) {
        return false;
    }
    let theirs = uncounted(|| postcard::take_from_bytes::<T>(bytes));
    match (&ours, &theirs) {
        (Ok(ours), Ok((theirs, rest))) => {
            assert!(rest.is_empty(), "{ours:?} leaves bytes");
            assert_eq!(postcard::to_stdvec(ours), postcard::to_stdvec(theirs));
        }
        (Err(CodecError::TrailingBytes { count }), Ok((_, rest))) => assert_eq!(*count, rest.len()),
        (Err(_), Err(_)) => {}
        // Postcard takes the first of several.
        (Err(CodecError::Invalid { what: "char", .. }), Ok(_)) => {}
        (ours, theirs) => panic!("{ours:?} where postcard says {theirs:?}"),
    }
    let Ok(value) = ours else { return false };
    let encoded = encode(&value).unwrap_or_else(|error| panic!("{value:?} does not encode: {error}"));
    assert_eq!(Ok(&encoded.metadata), postcard::to_stdvec(&value).as_ref());
    again(&value, &encoded.metadata, &[]);
    true
}

/// `kept` tensors must be in the value: all, but for maps, where a key that comes twice has the later value.
fn with_tensors<T: Serialize + DeserializeOwned + Debug>(bytes: &[u8], tensors: &[Tensor], kept: usize) -> bool {
    let Ok(value) = decode::<T>(bytes, tensors) else { return false };
    let encoded = encode(&value).unwrap_or_else(|error| panic!("{value:?} does not encode: {error}"));
    // Each is one of those that came, listed as often as it is named.
    assert!(encoded.tensors.len() >= kept, "a tensor was dropped");
    for tensor in &encoded.tensors {
        assert!(tensors.iter().any(|came| came.storage().is_same(tensor.storage())));
    }
    again(&value, &encoded.metadata, &encoded.tensors);
    true
}

fn again<T: Serialize + DeserializeOwned + Debug>(value: &T, metadata: &[u8], tensors: &[Tensor]) {
    let again: T = decode(metadata, tensors).unwrap_or_else(|error| panic!("{value:?} is not read back: {error}"));
    let rewritten = encode(&again).unwrap_or_else(|error| panic!("{again:?} does not encode: {error}"));
    assert_eq!(rewritten.metadata, metadata, "{value:?}");
    let items = |tensors: &[Tensor]| tensors.iter().map(|tensor| tensor.item::<i32>().ok()).collect::<Vec<_>>();
    assert_eq!(items(&rewritten.tensors), items(tensors), "{value:?}");
}

/// A value of each type.
pub(crate) fn golden() -> Vec<Golden> {
    fn input<T: Serialize>(kind: u8, value: &T) -> Vec<u8> {
        let encoded = encode(value).expect("a value within the limits");
        [vec![kind | (encoded.tensors.len() as u8) << 4], encoded.metadata].concat()
    }
    let everything = Everything {
        flags: (true, false),
        bytes: vec![0, 127, 128, 255],
        signed: (i8::MIN, i16::MIN, i32::MIN, i64::MIN, i128::MIN),
        unsigned: (u8::MAX, u16::MAX, u32::MAX, u64::MAX, u128::MAX),
        floats: (f32::MIN_POSITIVE, -0.0, Meters(f64::NAN)),
        text: ('a', '🦀', "grüße".to_owned()),
        shapes: vec![Shape::Empty, Shape::Circle(1.5), Shape::Pair(-300, Some(Box::new(Shape::Empty)))],
        map: [("x".to_owned(), vec![None, Some(0)]), ("y".to_owned(), vec![])].into(),
        units: (Unit, (), [0, 127, 128]),
        dtype: DType::BF16,
        device: Device::Cuda(300),
    };
    let shapes = vec![Shape::Named { text: "t".to_owned(), count: 1 << 100 }, Shape::Pair(i16::MAX, None)];
    let texts: BTreeMap<u16, Vec<Option<String>>> = [(300, vec![None, Some("ü".to_owned())])].into();
    let chain = (0..8).fold(Chain::End, |inner, _| Chain::Link(Box::new(inner)));
    let nested = Nested(vec![Nested(vec![]), Nested(vec![Nested(vec![]), Nested(vec![])])]);
    let empties = (vec![(); 3], BTreeMap::from([("k".to_owned(), ())]), vec![[0_u8; 0]; 2]);
    let lists = vec![vec![vec![(1_u64, 300_u64, u64::MAX, 0_u64)]], vec![]];
    let all = tensors(6);
    let layers = || {
        vec![
            Layer::Skip,
            Layer::Dense(all[0].clone()),
            Layer::Both { weight: all[1].clone(), scale: 0.5, mask: Box::new(Some(all[2].clone())) },
        ]
    };
    let model = Model {
        name: "m".to_owned(),
        layers: layers(),
        bias: Some(all[3].clone()),
        by_name: [("five".to_owned(), all[4].clone())].into(),
        pair: (9, all[5].clone()),
    };
    let maps = (all[0].clone(), all[1..3].to_vec(), BTreeMap::from([(1_u8, None), (2, Some(all[3].clone()))]));
    let value = Value::Dict(vec![
        (Value::from("list"), Value::List(vec![Value::None, Value::from(true), Value::from(-300), Value::from(0.5)])),
        (Value::from(1), Value::Tuple(vec![Value::from(&all[0]), Value::from(vec![0_u8, 255]), Value::from(&all[0])])),
        (Value::from(()), Value::from(Ref { owner: 300, id: u64::MAX })),
    ]);
    // One tensor that is named twice, as our encoder never writes.
    let twice = vec![8 | 1 << 4, 0, 1, 0, 0];
    // Lists in lists, each of which claims as many elements as there are bytes behind it.
    let greedy = [&[4][..], &[127; 60], &[0; 127]].concat();
    vec![
        ("everything", input(0, &everything)),
        ("refused-greedy", greedy),
        ("shapes", input(1, &shapes)),
        ("texts", input(2, &texts)),
        ("chain", input(3, &chain)),
        ("nested", input(4, &nested)),
        ("empties", input(5, &empties)),
        ("lists", input(6, &lists)),
        ("model", input(7, &model)),
        ("tensors-in-maps", input(8, &maps)),
        ("one-tensor-twice", twice),
        ("layers", input(9, &layers())),
        ("value", input(11, &value)),
        ("plain", input(10, &("text".to_owned(), 0.5_f64, Some(true)))),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_inputs_decode_unless_they_are_named_otherwise() {
        for (name, bytes) in golden() {
            assert_eq!(metadata(&bytes), !name.starts_with("refused"), "{name}");
        }
    }
}
