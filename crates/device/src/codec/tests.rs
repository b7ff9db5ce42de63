use std::collections::{BTreeMap, HashMap};

use super::*;
use crate::testing::Random;
use crate::{DType, Device};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum Shape {
    Empty,
    Circle(f32),
    Pair(i16, Option<Box<Shape>>),
    Named { text: String, count: u128 },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Unit;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Meters(f64);

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
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

fn everything() -> Everything {
    Everything {
        flags: (true, false),
        bytes: (0..=255).collect(),
        signed: (i8::MIN, i16::MIN, i32::MIN, i64::MIN, i128::MIN),
        unsigned: (u8::MAX, u16::MAX, u32::MAX, u64::MAX, u128::MAX),
        floats: (f32::MIN_POSITIVE, -0.0, Meters(f64::INFINITY)),
        text: ('a', '🦀', "grüße".to_owned()),
        shapes: vec![
            Shape::Empty,
            Shape::Circle(1.5),
            Shape::Pair(-300, Some(Box::new(Shape::Named { text: String::new(), count: 1 << 100 }))),
            Shape::Pair(i16::MAX, None),
        ],
        map: [("x".to_owned(), vec![None, Some(0)]), ("y".to_owned(), vec![])].into(),
        units: (Unit, (), [0, 127, 128]),
        dtype: DType::BF16,
        device: Device::Cuda(300),
    }
}

/// A value with tensors wherever a user could put them.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Model {
    name: String,
    layers: Vec<Layer>,
    bias: Option<Tensor>,
    by_name: HashMap<String, Tensor>,
    pair: (u8, Tensor),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
enum Layer {
    Skip,
    Dense(Tensor),
    Both { weight: Tensor, scale: f32, mask: Box<Option<Tensor>> },
}

fn tensor(element: i32) -> Tensor {
    Tensor::scalar(element).unwrap()
}

fn element(tensor: &Tensor) -> i32 {
    tensor.item().unwrap()
}

fn model() -> Model {
    Model {
        name: "m".to_owned(),
        layers: vec![
            Layer::Skip,
            Layer::Dense(tensor(1)),
            Layer::Both { weight: tensor(2), scale: 0.5, mask: Box::new(Some(tensor(3))) },
        ],
        bias: Some(tensor(4)),
        by_name: [("five".to_owned(), tensor(5))].into(),
        pair: (9, tensor(6)),
    }
}

/// Ours must be postcard's bytes, and each must read the other's.
fn agrees<T: Serialize + DeserializeOwned + PartialEq + fmt::Debug>(value: &T) {
    let ours = encode(value).unwrap();
    let theirs = postcard::to_stdvec(value).unwrap();
    assert_eq!(ours.metadata, theirs, "{value:?}");
    assert!(ours.tensors.is_empty());
    assert_eq!(&decode::<T>(&theirs, &[]).unwrap(), value);
    assert_eq!(&postcard::from_bytes::<T>(&ours.metadata).unwrap(), value);
}

#[test]
fn c3_bytes_are_postcards() {
    agrees(&everything());
    agrees(&"text".to_owned());
    agrees(&());
    agrees(&(Some(1_u8), None::<u8>));
    agrees(&HashMap::from([(1_i64, 'x')]));
    agrees(&vec![(); 3]);
    for shift in 0..64 {
        let value = 1_u64 << shift;
        agrees(&(
            value,
            value - 1,
            value as u32,
            value as u16,
            value as i64,
            -(value as i64 >> 1),
            value as i16,
            value as i32,
        ));
    }
    for shift in 0..128 {
        agrees(&(1_u128 << shift, 1_i128 << shift, -(1_i128 << (shift / 2))));
    }
}

#[test]
fn numbers_by_hand() {
    assert_eq!(encode(&300_u32).unwrap().metadata, [0xac, 0x02]);
    assert_eq!(encode(&-1_i32).unwrap().metadata, [0x01]);
    assert_eq!(encode(&1_i16).unwrap().metadata, [0x02]);
    assert_eq!(encode(&-1_i8).unwrap().metadata, [0xff]);
    assert_eq!(encode(&1.0_f32).unwrap().metadata, [0, 0, 0x80, 0x3f]);
    assert_eq!(encode(&Some("é")).unwrap().metadata, [1, 2, 0xc3, 0xa9]);
}

#[test]
fn c3_tensors_are_found_anywhere() {
    let encoded = encode(&model()).unwrap();
    assert_eq!(encoded.tensors.iter().map(element).collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6], "in the value's order");
    let decoded: Model = decode(&encoded.metadata, &encoded.tensors).unwrap();
    assert_eq!((decoded.name.as_str(), decoded.layers.len()), ("m", 3));
    let Layer::Dense(dense) = &decoded.layers[1] else { panic!("{decoded:?}") };
    let Layer::Both { weight, scale, mask } = &decoded.layers[2] else { panic!("{decoded:?}") };
    let elements = [
        dense,
        weight,
        Option::as_ref(mask).unwrap(),
        decoded.bias.as_ref().unwrap(),
        &decoded.by_name["five"],
        &decoded.pair.1,
    ];
    assert_eq!(elements.map(element), [1, 2, 3, 4, 5, 6]);
    assert_eq!((*scale, decoded.pair.0), (0.5, 9));
    assert!(dense.storage().is_same(encoded.tensors[0].storage()), "no bytes are copied");
}

#[test]
fn c3_one_tensor_twice_is_listed_twice_and_is_still_one_storage() {
    let shared = tensor(7);
    let encoded = encode(&[&shared, &shared]).unwrap();
    assert_eq!((encoded.metadata.as_slice(), encoded.tensors.len()), (&[0, 1][..], 2));
    let [a, b]: [Tensor; 2] = decode(&encoded.metadata, &encoded.tensors).unwrap();
    assert!(a.storage().is_same(b.storage()));
    // A peer may list it once and name it twice.
    let [a, b]: [Tensor; 2] = decode(&[0, 0], &encoded.tensors[..1]).unwrap();
    assert_eq!((element(&a), element(&b)), (7, 7));
}

#[test]
fn appended_parts_decode_by_themselves() {
    let (mut metadata, mut tensors) = (Vec::new(), Vec::new());
    encode_into(&("first", tensor(1)), &mut metadata, &mut tensors).unwrap();
    let (bytes, count) = (metadata.len(), tensors.len());
    encode_into(&(tensor(2), tensor(3)), &mut metadata, &mut tensors).unwrap();
    let (text, first): (String, Tensor) = decode(&metadata[..bytes], &tensors[..count]).unwrap();
    let second: (Tensor, Tensor) = decode(&metadata[bytes..], &tensors[count..]).unwrap();
    assert_eq!((text.as_str(), element(&first), element(&second.0), element(&second.1)), ("first", 1, 2, 3));
    struct Fails;
    impl Serialize for Fails {
        fn serialize<S: Serializer>(&self, _: S) -> Result<S::Ok, S::Error> {
            Err(S::Error::custom("no"))
        }
    }
    let error = encode_into(&(1, tensor(4), Fails), &mut metadata, &mut tensors).unwrap_err();
    assert_eq!(error, CodecError::Custom("no".to_owned()));
    assert_eq!(tensors.len(), 3, "a failed value leaves nothing behind");
}

#[test]
fn c2_leftovers_are_errors() {
    assert_eq!(decode::<u8>(&[1, 2, 3], &[]), Err(CodecError::TrailingBytes { count: 2 }));
    let two = [tensor(1), tensor(2)];
    assert_eq!(decode::<Tensor>(&[0], &two).unwrap_err(), CodecError::UnusedTensor { index: 1 });
    assert_eq!(decode::<Tensor>(&[1], &two).unwrap_err(), CodecError::UnusedTensor { index: 0 });
    let [a, b]: [Tensor; 2] = decode(&[1, 0], &two).unwrap();
    assert_eq!((element(&a), element(&b)), (2, 1), "in any order");
}

#[test]
fn a_missing_tensor_is_a_typed_error() {
    let error = decode::<(u8, Vec<Tensor>)>(&[0, 1, 5], &[tensor(1)]).unwrap_err();
    assert_eq!(error, CodecError::TensorIndex { index: 5, count: 1 });
    let error = decode::<Tensor>(&[], &[tensor(1)]).unwrap_err();
    assert_eq!(error, CodecError::Truncated { at: 0, want_bytes: 1, left_bytes: 0 });
}

#[test]
fn another_codec_refuses_tensors() {
    assert!(postcard::to_stdvec(&tensor(1)).is_err());
    assert!(postcard::from_bytes::<Tensor>(&[0]).is_err());
    let error = Tensor::deserialize(serde::de::value::U32Deserializer::<CodecError>::new(0)).unwrap_err();
    assert_eq!(error, CodecError::Custom("a Tensor can be deserialized only by farcall's codec".to_owned()));
}

#[test]
fn c1_every_prefix_is_an_error() {
    let encoded = encode(&(everything(), model())).unwrap();
    for end in 0..encoded.metadata.len() {
        let error = decode::<(Everything, Model)>(&encoded.metadata[..end], &encoded.tensors).unwrap_err();
        assert!(matches!(error, CodecError::Truncated { .. }), "{end}: {error}");
    }
}

#[test]
fn c1_random_bytes_never_panic() {
    let tensors = [tensor(1), tensor(2)];
    let valid = encode(&(everything(), model())).unwrap();
    let mut decoded = 0;
    for seed in 0..20_000 {
        let mut random = Random::new(seed);
        let mut bytes: Vec<u8> = match random.below(3) {
            0 => (0..random.below(40)).map(|_| random.next() as u8).collect(),
            1 => (0..random.below(40)).map(|_| random.below(4) as u8).collect(),
            _ => valid.metadata.clone(),
        };
        for _ in 0..random.below(4) {
            if let Some(at) = random.below(bytes.len() + 1).checked_sub(1) {
                bytes[at] ^= 1 << random.below(8);
            }
        }
        decoded += usize::from(decode::<(Everything, Model)>(&bytes, &valid.tensors).is_ok());
        decoded += usize::from(decode::<Model>(&bytes, &tensors).is_ok());
        decoded += usize::from(decode::<Vec<Shape>>(&bytes, &[]).is_ok());
        decoded += usize::from(decode::<HashMap<u16, Vec<Option<String>>>>(&bytes, &[]).is_ok());
        decoded += usize::from(decode::<(char, bool, i128, f32)>(&bytes, &[]).is_ok());
    }
    assert!(decoded > 0, "some inputs are valid");
}

#[test]
fn c1_invalid_values_say_what_and_where() {
    let invalid = |what, at| CodecError::Invalid { what, at };
    assert_eq!(decode::<(u8, bool)>(&[1, 2], &[]), Err(invalid("bool", 1)));
    assert_eq!(decode::<Option<u8>>(&[2], &[]), Err(invalid("option tag", 0)));
    assert_eq!(decode::<String>(&[1, 0xff], &[]), Err(invalid("utf-8", 0)));
    assert_eq!(decode::<char>(&[2, b'a', b'b'], &[]), Err(invalid("char", 0)));
    assert_eq!(decode::<u16>(&[0xff, 0xff, 0x04], &[]), Err(invalid("varint", 0)));
    assert_eq!(decode::<u16>(&[0x80, 0x80, 0x80, 0], &[]), Err(invalid("varint", 0)));
    assert_eq!(decode::<u64>(&[0xff; 11], &[]), Err(invalid("varint", 0)));
    assert_eq!(decode::<u16>(&[0xff, 0xff, 0x03], &[]), Ok(u16::MAX));
    assert!(matches!(decode::<Shape>(&[9], &[]), Err(CodecError::Custom(_))), "an unknown variant");
}

#[test]
fn c1_a_claimed_length_is_not_believed() {
    // 2^63 elements: memory for as many must not be asked for, and elements without bytes must not be counted out.
    let length = encode(&(1_u64 << 63)).unwrap().metadata;
    assert!(matches!(decode::<Vec<u64>>(&length, &[]), Err(CodecError::Truncated { .. })));
    assert!(matches!(decode::<String>(&length, &[]), Err(CodecError::Truncated { .. })));
    assert_eq!(decode::<Vec<()>>(&length, &[]), Err(CodecError::TooManyEmptyElements));
    assert_eq!(decode::<Vec<Unit>>(&length, &[]), Err(CodecError::TooManyEmptyElements));
    assert_eq!(decode::<BTreeMap<(), ()>>(&length, &[]), Err(CodecError::TooManyEmptyElements));
    assert_eq!(encode(&vec![(); MAX_EMPTY_ELEMENTS + 1]).unwrap_err(), CodecError::TooManyEmptyElements);
    agrees(&vec![(); MAX_EMPTY_ELEMENTS]);
    agrees(&vec![((), 1_u8); MAX_EMPTY_ELEMENTS + 1]);
}

/// Room is made for what the innermost lists claim while that of the outer ones is held; all must fit the input together.
#[test]
fn c1_claims_of_lists_in_lists_add_up_to_no_more_than_the_input() {
    thread_local!(static ROOM: std::cell::Cell<usize> = const { std::cell::Cell::new(0) });
    struct Lists;
    impl<'de> Deserialize<'de> for Lists {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            deserializer.deserialize_seq(Lists)
        }
    }
    impl<'de> serde::de::Visitor<'de> for Lists {
        type Value = Self;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("lists")
        }
        fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut elements: A) -> Result<Self, A::Error> {
            ROOM.set(ROOM.get() + elements.size_hint().unwrap());
            while elements.next_element::<Self>()?.is_some() {}
            Ok(self)
        }
    }
    let greedy = [vec![127; 100], vec![0; 127]].concat();
    assert!(matches!(decode::<Lists>(&greedy, &[]), Err(CodecError::Truncated { .. })));
    assert!((127..=greedy.len()).contains(&ROOM.take()), "100 lists that claim 127 elements each");
    // Honest lists get all the room they ask for.
    assert!(decode::<Lists>(&[3, 0, 2, 0, 0, 1, 0], &[]).is_ok());
    assert_eq!(ROOM.take(), 3 + 2 + 1);
}

#[derive(Debug, Serialize, Deserialize)]
enum Chain {
    End,
    Link(Box<Chain>),
}

fn chain(length: usize) -> Chain {
    (0..length).fold(Chain::End, |inner, _| Chain::Link(Box::new(inner)))
}

#[test]
fn c1_depth_is_limited_on_both_sides() {
    let deepest = encode(&chain(MAX_DEPTH)).unwrap();
    assert!(decode::<Chain>(&deepest.metadata, &[]).is_ok());
    assert_eq!(encode(&chain(MAX_DEPTH + 1)).unwrap_err(), CodecError::TooDeep);
    let bomb = vec![1; 1_000_000];
    assert_eq!(decode::<Chain>(&bomb, &[]).unwrap_err(), CodecError::TooDeep);
    #[derive(Debug, Deserialize)]
    #[expect(dead_code, reason = "only its nesting matters")]
    struct Nested(Vec<Nested>);
    assert_eq!(decode::<Nested>(&bomb, &[]).unwrap_err(), CodecError::TooDeep);
}

#[test]
fn a_type_that_asks_the_format_is_refused() {
    #[derive(Debug, Serialize, Deserialize)]
    #[serde(untagged)]
    enum Untagged {
        Number(u8),
    }
    let encoded = encode(&Untagged::Number(1)).unwrap();
    let error = decode::<Untagged>(&encoded.metadata, &[]).unwrap_err();
    assert_eq!(error, CodecError::NotSelfDescribing { what: "deserialize_any" });
}

/// A value that travels beside the bytes as tensors do, by its position in a list.
#[derive(Debug, PartialEq)]
struct Ticket(&'static str);

impl Serialize for Ticket {
    fn serialize<S: Serializer>(&self, mut serializer: S) -> Result<S::Ok, S::Error> {
        let index = encode_context(&mut serializer, |list: &mut Vec<&'static str>| {
            list.push(self.0);
            list.len() as u32 - 1
        });
        serializer.serialize_u32(index.ok_or_else(|| S::Error::custom("no list"))?)
    }
}

impl<'de> Deserialize<'de> for Ticket {
    fn deserialize<D: Deserializer<'de>>(mut deserializer: D) -> Result<Self, D::Error> {
        let list = decode_context(&mut deserializer, |list: &mut Vec<&'static str>| list.clone());
        let index = u32::deserialize(deserializer)?;
        list.and_then(|list| list.get(index as usize).copied().map(Self))
            .ok_or_else(|| D::Error::custom("no such ticket"))
    }
}

#[test]
fn a_context_reaches_the_values_inside() {
    let (mut metadata, mut tensors, mut list) = (Vec::new(), Vec::new(), Vec::<&'static str>::new());
    encode_with(&(vec![Ticket("a"), Ticket("b")], tensor(1)), &mut metadata, &mut tensors, &mut list).unwrap();
    assert_eq!((metadata.as_slice(), list.as_slice()), (&[2, 0, 1, 0][..], &["a", "b"][..]));
    let (tickets, one): (Vec<Ticket>, Tensor) = decode_with(&metadata, &tensors, &mut list).unwrap();
    assert_eq!((tickets, element(&one)), (vec![Ticket("a"), Ticket("b")], 1));
    assert_eq!(
        encode(&Ticket("c")).unwrap_err(),
        CodecError::Custom("no list".to_owned()),
        "without one, or of another type"
    );
    assert!(postcard::to_stdvec(&Ticket("c")).is_err(), "with another codec");
}
