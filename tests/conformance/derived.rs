//! `#[derive(farcall::Value)]`: types of users as values, there and back, and what is said when they do not fit.

use std::collections::BTreeMap;

use farcall::{FromValue, Tensor, Value, args, kwargs};

use crate::functions::registry;
use crate::harness::{Group, bounded, counting};

#[derive(Clone, Debug, farcall::Value)]
struct Layer {
    weight: Tensor,
    bias: Option<Tensor>,
    #[value(rename = "type")]
    kind: Kind,
    #[value(default)]
    tags: BTreeMap<String, Vec<i64>>,
}

#[derive(Clone, Debug, PartialEq, farcall::Value)]
enum Kind {
    Dense,
    #[value(rename = "conv")]
    Convolution {
        stride: (i64, i64),
        r#mod: bool,
    },
    Scaled(f64),
    Both(Meters, Nothing),
    Chain(Box<Kind>, Vec<Kind>),
}

#[derive(Clone, Debug, PartialEq, farcall::Value)]
struct Meters(f64);

#[derive(Clone, Debug, PartialEq, farcall::Value)]
struct Nothing;

#[derive(Clone, Debug, PartialEq, farcall::Value)]
struct Pair<T>(T, String);

fn kinds() -> [Kind; 5] {
    [
        Kind::Dense,
        Kind::Convolution { stride: (2, 1), r#mod: true },
        Kind::Scaled(-0.5),
        Kind::Both(Meters(2.0), Nothing),
        Kind::Chain(Box::new(Kind::Dense), vec![Kind::Scaled(1.0), Kind::Dense]),
    ]
}

#[test]
fn values_have_the_shape_that_is_documented() {
    let text = |value: Value| format!("{value:?}");
    let [dense, convolution, scaled, both, chain] = kinds().map(|kind| text(kind.into()));
    assert_eq!(dense, r#"Str("Dense")"#);
    let fields = r#"[(Str("stride"), Tuple([Int(2), Int(1)])), (Str("mod"), Bool(true))]"#;
    assert_eq!(convolution, format!(r#"Dict([(Str("conv"), Dict({fields}))])"#));
    assert_eq!(scaled, r#"Dict([(Str("Scaled"), Float(-0.5))])"#);
    assert_eq!(both, r#"Dict([(Str("Both"), Tuple([Float(2.0), None]))])"#);
    assert!(chain.starts_with(r#"Dict([(Str("Chain"), Tuple([Str("Dense"), List(["#), "{chain}");
    assert_eq!(text(Pair(1_i64, "x".to_owned()).into()), r#"Tuple([Int(1), Str("x")])"#);
}

#[test]
fn types_of_users_travel_as_values() {
    bounded(|| {
        let group = Group::with(2, |options| options.registry = Some(registry()));
        let w1 = group.agents[0].to("w1");
        for kind in kinds() {
            let tags = BTreeMap::from([("a".to_owned(), vec![1, 2])]);
            let layer = Layer { weight: counting(&[2]), bias: None, kind: kind.clone(), tags };
            let back: Layer = w1.builtin_as("test::echo", args![layer], kwargs! {}).wait().expect("a layer");
            assert_eq!(back.weight.to_vec::<f32>().expect("f32"), [0.0, 1.0]);
            assert_eq!((back.bias.is_none(), back.kind, back.tags["a"].as_slice()), (true, kind, &[1, 2][..]));
        }
        let pair = Pair(vec![0.5, 1.0], "x".to_owned());
        assert_eq!(
            w1.builtin_as::<Pair<Vec<f64>>>("test::echo", args![pair.clone()], kwargs! {}).wait().expect("a pair"),
            pair
        );
        let error = w1.builtin_as::<Meters>("test::echo", args!["far"], kwargs! {}).wait().expect_err("a text");
        assert!(error.to_string().ends_with("the value is of type str, not f64"), "{error}");
        group.shutdown();
    });
}

#[test]
fn errors_say_where_and_what() {
    #[track_caller]
    fn fails<T: FromValue + std::fmt::Debug>(value: impl Into<Value>, expected: &str) {
        assert_eq!(value.into().to::<T>().expect_err("another type").to_string(), expected);
    }
    let dict = |entries: &[(&str, Value)]| {
        Value::Dict(entries.iter().map(|(key, value)| ((*key).into(), value.clone())).collect())
    };
    let weight = || Value::from(counting(&[1]));
    fails::<Layer>(1, "the value is of type int, not Layer");
    fails::<Layer>(dict(&[]), ".weight is missing; its type is Tensor");
    fails::<Layer>(dict(&[("weight", weight())]), ".type is missing; its type is Kind");
    let kind = |kind: Value| dict(&[("weight", weight()), ("type", kind)]);
    fails::<Layer>(
        kind("dense".into()),
        ".type has `dense`, which is not a variant, or not one with such fields, of Kind; there are Dense, conv, Scaled, Both, Chain",
    );
    fails::<Layer>(
        kind(dict(&[("conv", dict(&[("stride", (1, 0.5).into())]))])),
        ".type.conv.stride[1] is of type float, not i64",
    );
    fails::<Layer>(
        kind(dict(&[("Chain", ("Dense", ("Dense", 1)).into())])),
        ".type.Chain[1][1] is of type int, not Kind",
    );
    fails::<Layer>(
        dict(&[("weight", weight()), ("type", "Dense".into()), ("wieght", weight())]),
        "the value has `wieght`, which is not a field, or there twice, of Layer; there are weight, bias, type, tags",
    );
    fails::<Pair<i64>>((1, "a", 2), "the value is of type (int, str, int), not Pair<i64>");
    fails::<Nothing>(1, "the value is of type int, not Nothing");
}
