//! Cases by hand; which overload torch takes is from its own answers, see each.

use super::*;

fn schema(text: &str) -> Schema {
    text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn tensor() -> Tensor {
    Tensor::scalar(1.0_f32).expect("a tensor")
}

#[track_caller]
fn bound(text: &str, args: &[Value], kwargs: &[(String, Value)]) -> String {
    let schema = schema(text);
    let bound = schema.bind(args, kwargs).unwrap_or_else(|error| panic!("{text}: {error}"));
    // B1
    let checked = schema.check(bound.clone()).unwrap_or_else(|error| panic!("{text}: {error}"));
    assert_eq!(format!("{checked:?}"), format!("{bound:?}"));
    format!("{bound:?}")
}

#[track_caller]
fn refused(text: &str, args: &[Value], kwargs: &[(String, Value)]) -> String {
    schema(text).bind(args, kwargs).expect_err(text).to_string()
}

#[test]
fn positions_names_and_defaults_fill_every_argument() {
    let text = "f(int a, float b=1, *, str? c=None, bool d=True) -> ()";
    assert_eq!(bound(text, &args![1], &[]), "[Int(1), Float(1.0), None, Bool(true)]");
    assert_eq!(
        bound(text, &args![1, 0.5], &kwargs! {"d": false, "c": "x"}),
        r#"[Int(1), Float(0.5), Str("x"), Bool(false)]"#
    );
    assert_eq!(bound(text, &[], &kwargs! {"b": 2, "a": 3}), "[Int(3), Float(2.0), None, Bool(true)]");
    assert_eq!(refused(text, &[], &[]), "`int a` is missing");
    assert_eq!(refused(text, &args![1, 2.0, "x"], &[]), "3 arguments were given by position, and it takes 2");
    assert_eq!(refused(text, &args![1], &kwargs! {"a": 1}), "`a` was given twice");
    assert_eq!(refused(text, &[], &kwargs! {"a": 1, "a": 1}), "`a` was given twice");
    assert_eq!(refused(text, &args![1], &kwargs! {"e": 1}), "it has no argument `e`");
    assert_eq!(bound("f(int a, ...) -> ()", &args![1, "x", 2.5], &[]), r#"[Int(1), Str("x"), Float(2.5)]"#);
    let names = "f(int reduction=Mean, MemoryFormat m=contiguous_format, int[2] k=3, int[] e=[]) -> ()";
    assert_eq!(bound(names, &[], &[]), r#"[Int(1), Str("contiguous_format"), List([Int(3), Int(3)]), List([])]"#);
}

#[test]
fn each_type_takes_its_values_and_what_converts_to_them() {
    let one = |of: &str, value: Value| {
        let bound = schema(&format!("f({of} x) -> ()")).bind(&[value], &[]);
        bound.map_or_else(|error| error.to_string(), |bound| format!("{:?}", bound[0]))
    };
    let list = |values: &[i64]| Value::from(values);
    for (of, value, expected) in [
        ("int", 1.into(), "Int(1)"),
        ("int", true.into(), "`int x` cannot be bool"),
        ("int", 1.5.into(), "`int x` cannot be float"),
        ("SymInt?", 1.into(), "Int(1)"),
        ("SymInt?", ().into(), "None"),
        ("SymInt", ().into(), "`SymInt x` cannot be None"),
        ("float", 1.into(), "Float(1.0)"),
        ("float", i64::MAX.into(), "`float x` cannot be int this large, which no float is exactly"),
        ("Scalar", true.into(), "Bool(true)"),
        ("Scalar", 1.into(), "Int(1)"),
        ("Scalar", tensor().into(), "`Scalar x` cannot be Tensor: take the number out with `item` first"),
        ("Tensor", 1.into(), "`Tensor x` cannot be int"),
        ("complex", 1.into(), "`complex x` cannot be int: no value is a complex"),
        ("Generator?", ().into(), "None"),
        ("Generator", 1.into(), "`Generator x` cannot be int: no value is a Generator"),
        ("Device", "cuda".into(), r#"Str("cuda:0")"#),
        ("Device", "tpu".into(), "`Device x` cannot be str \"tpu\": write cpu, cuda or cuda:1"),
        ("ScalarType", "torch.bfloat16".into(), r#"Str("bf16")"#),
        ("ScalarType", 6.into(), r#"Str("f32")"#),
        ("ScalarType", DType::I64.into(), r#"Str("i64")"#),
        (
            "ScalarType",
            8.into(),
            "`ScalarType x` cannot be int, which names no dtype: write f32, i64, …, or as torch does",
        ),
        ("MemoryFormat", 1.into(), r#"Str("preserve_format")"#),
        ("Layout", "sparse".into(), "`Layout x` cannot be str: there are strided"),
        ("int[]", 1.into(), "`int[] x` cannot be int"),
        ("int[2]?", 3.into(), "List([Int(3), Int(3)])"),
        ("float[2]", 3.into(), "List([Float(3.0), Float(3.0)])"),
        ("int[2][2]", 3.into(), "`int[2][2] x` cannot be int"),
        ("int[2]", list(&[1, 2, 3]), "List([Int(1), Int(2), Int(3)])"),
        ("float[]", list(&[1, 2]), "List([Float(1.0), Float(2.0)])"),
        ("int[]", (1, 2).into(), "List([Int(1), Int(2)])"),
        ("int[][]", [[1], [2]].into(), "List([List([Int(1)]), List([Int(2)])])"),
        ("str[]", (1, "a").into(), "`str[] x` cannot be a list with element 0 of int"),
        ("(int, str)", (1, "a").into(), r#"Tuple([Int(1), Str("a")])"#),
        ("(int, str)", (1, "a", 2).into(), "`(int, str) x` cannot be (int, str, int)"),
        ("Dict(str, float)", std::collections::BTreeMap::from([("a", 1)]).into(), r#"Dict([(Str("a"), Float(1.0))])"#),
        (
            "Dict(str, str)",
            std::collections::BTreeMap::from([("a", 1)]).into(),
            "`Dict(str, str) x` cannot be a dict with value 0 of int",
        ),
        ("RRef(t)", crate::Ref { owner: 1, id: 2 }.into(), "Ref(Ref { owner: 1, id: 2 })"),
        ("Tensor(a!)?", ().into(), "None"),
        ("Any", "x".into(), r#"Str("x")"#),
    ] {
        assert_eq!(one(of, value), expected, "{of}");
    }
}

#[test]
fn a_type_variable_is_one_type_in_one_call() {
    let text = "f(t[] list, t element) -> t";
    assert_eq!(bound(text, &args![[1, 2], 3], &[]), "[List([Int(1), Int(2)]), Int(3)]");
    assert_eq!(refused(text, &args![[1, 2], "x"], &[]), "`t element` cannot be str: t is int already");
    assert_eq!(
        refused(text, &args![(1, "x"), 1], &[]),
        "`t[] list` cannot be a list with element 1 of str: t is int already"
    );
}

/// A peer's values are of the types already, or refused: nothing is converted for it.
#[test]
fn what_comes_from_elsewhere_is_checked_and_not_converted() {
    let schema = schema("f(Tensor x, float[2] s=1, *, bool d=False) -> ()");
    let check = |values: Vec<Value>| schema.check(values).map(|_| ()).map_err(|error| error.to_string());
    assert_eq!(check(args![tensor(), [1.0, 2.0], true]), Ok(()));
    assert_eq!(check(args![tensor()]), Err("`float[2] s` is missing".to_owned()));
    assert_eq!(
        check(args![tensor(), [1.0], true, 1]),
        Err("4 arguments were given by position, and it takes 3".to_owned())
    );
    assert_eq!(
        check(args![tensor(), [1, 2], true]),
        Err("`float[2] s` cannot be a list with element 0 of int".to_owned())
    );
    assert_eq!(check(args![1, [1.0], true]), Err("`Tensor x` cannot be int".to_owned()));
}

/// The overloads of `aten::add` in torch's order, some left out.
const ADD: [&str; 5] = [
    "aten::add.Tensor(Tensor self, Tensor other, *, Scalar alpha=1) -> Tensor",
    "aten::add.Scalar(Tensor self, Scalar other, Scalar alpha=1) -> Tensor",
    "aten::add.int(int a, int b) -> int",
    "aten::add.float(float a, float b) -> float",
    "aten::add(Scalar a, Scalar b) -> Scalar",
];

/// B2. Torch's answers: `torch.jit.script` of `torch.add(x, y)` and its kin, by the types in the graph.
#[test]
fn the_first_overload_that_takes_them_as_they_are_is_taken() {
    let candidates = ADD.map(schema);
    let taken = |args: &[Value], kwargs: &[(String, Value)]| {
        resolve("aten::add", &candidates, args, kwargs).map(|(index, _)| candidates[index].name.overload.clone())
    };
    let x = tensor();
    for (args, kwargs, expected) in [
        (args![&x, &x], kwargs! {}, "Tensor"),
        (args![&x, &x], kwargs! {"alpha": 2.0}, "Tensor"),
        (args![&x, 2], kwargs! {}, "Scalar"),
        (args![&x, 2.5, 3], kwargs! {}, "Scalar"),
        (args![1, 2], kwargs! {}, "int"),
        (args![1.0, 2.0], kwargs! {}, "float"),
        // No overload takes an int and a float as they are but that of scalars.
        (args![1, 2.0], kwargs! {}, ""),
        (args![&x, true], kwargs! {}, "Tensor"),
        (args![2, &x], kwargs! {}, "Tensor"),
    ] {
        assert_eq!(taken(&args, &kwargs).as_deref(), Ok(expected), "{args:?} {kwargs:?}");
    }
    let (_, bound) = resolve("aten::add", &candidates, &args![2, &x], &[]).expect("a match");
    let Value::Tensor(two) = &bound[0] else { panic!("{bound:?}") };
    assert_eq!((two.item::<i64>().expect("ready"), two.rank()), (2, 0));
}

#[test]
fn no_match_lists_every_candidate_and_why() {
    let candidates = ADD.map(schema);
    let error =
        resolve("aten::add", &candidates[..3], &args![&tensor(), "x"], &kwargs! {"alpha": 2.0}).expect_err("no match");
    assert_eq!(
        error.to_string(),
        "aten::add does not take (Tensor, str, alpha: float)\n  \
         aten::add.Tensor(Tensor self, Tensor other, *, Scalar alpha=1) -> Tensor: `Tensor other` cannot be str\n  \
         aten::add.Scalar(Tensor self, Scalar other, Scalar alpha=1) -> Tensor: `Scalar other` cannot be str\n  \
         aten::add.int(int a, int b) -> int: it has no argument `alpha`"
    );
}

/// Defaults of torch's own signatures are of their arguments' types, and what cannot be is said.
#[test]
fn defaults_of_torch_fit_their_types() {
    let mut count = 0;
    for line in include_str!("../../data/operators.txt").lines().filter(|line| !line.starts_with('#')) {
        let mut schema = schema(line);
        schema.arguments.retain(|argument| argument.default.is_some());
        schema.bind(&[], &[]).unwrap_or_else(|error| panic!("{line}: {error}"));
        count += schema.arguments.len();
    }
    assert!(count > 2000, "{count} defaults");
}
