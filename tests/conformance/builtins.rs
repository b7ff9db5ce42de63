//! Builtins: values of every kind there and back, overloads, refusals, and the life of a call as of any other.

use std::time::Duration;

use farcall::device::Config;
use farcall::prelude::*;
use farcall::{Ref, Registry, Runtime, args, kwargs};

use crate::functions::{gate, registry};
use crate::harness::{Group, block_on, bounded, counting, unique};

fn group() -> Group {
    Group::with(2, |options| options.registry = Some(registry()))
}

/// Of a call to the other worker, and of one to oneself.
fn for_both(run: impl Fn(&farcall::To<'_>)) {
    let group = group();
    for to in ["w1", "w0"] {
        run(&group.agents[0].to(to));
    }
    // Whose waiter has seen its deadline, the driver's timer ends.
    while group.agents[0].in_flight() > 0 {
        std::thread::yield_now();
    }
    group.shutdown();
}

#[test]
fn values_of_every_kind_come_back_as_they_went() {
    bounded(|| {
        for_both(|to| {
            let numbers = [i64::MIN, -1, 0, i64::MAX].map(Value::from);
            let floats = [-0.0, 0.1, f64::NAN, f64::INFINITY, f64::MIN_POSITIVE / 4.0].map(Value::from);
            let value = Value::List(vec![
                Value::None,
                true.into(),
                Value::List(numbers.to_vec()),
                Value::Tuple(floats.to_vec()),
                "näme 🦀".into(),
                vec![0_u8, 255].into(),
                Value::Dict(vec![(1.into(), "one".into()), ("two".into(), Value::List(vec![]))]),
                Ref { owner: 7, id: u64::MAX }.into(),
            ]);
            let back = to.builtin("test::echo", args![&value], kwargs! {}).wait().expect("an echo");
            assert_eq!(format!("{back:?}"), format!("{value:?}"));
            let x = counting(&[3, 2]);
            let tensors = Value::from(vec![("a", x.clone()), ("b", x.transpose(0, 1).expect("a view"))]);
            let back = to.builtin_as::<Vec<(String, Tensor)>>("test::echo", args![tensors], kwargs! {});
            let back = back.wait().expect("an echo");
            assert_eq!(back[0].1.to_vec::<f32>().expect("f32"), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
            assert_eq!(back[1].1.to_vec::<f32>().expect("f32"), [0.0, 2.0, 4.0, 1.0, 3.0, 5.0]);
            let mut deep = Value::None;
            for _ in 0..100 {
                deep = Value::List(vec![deep]);
            }
            let error = to.builtin("test::echo", args![deep], kwargs! {}).wait().expect_err("too deep");
            assert!(matches!(error, CallError::Encode { .. }), "{error}");
        });
    });
}

#[test]
fn the_callee_gets_every_argument_in_its_place() {
    bounded(|| {
        for_both(|to| {
            let all = |args: Vec<Value>, kwargs| {
                let value = to.builtin("test::all", args, kwargs).wait().expect("its arguments");
                let Value::List(values) = value else { panic!("{value:?}") };
                format!("{:?}", &values[1..])
            };
            let x = counting(&[1]);
            assert_eq!(all(args![&x], kwargs! {}), "[List([Int(1), Int(1)]), Float(2.0), None]");
            assert_eq!(
                all(args![&x, 3], kwargs! {"note": "n", "k": 4}),
                r#"[List([Int(3), Int(3)]), Float(4.0), Str("n")]"#
            );
        });
    });
}

#[test]
fn overloads_are_chosen_by_the_arguments_or_by_name() {
    bounded(|| {
        for_both(|to| {
            let half =
                |name: &str, x: Value| to.builtin(name, vec![x], kwargs! {}).wait().map(|value| format!("{value:?}"));
            assert_eq!(half("test::half", 5.into()).expect("an int"), "Int(2)");
            assert_eq!(half("test::half", 5.0.into()).expect("a float"), "Float(2.5)");
            assert_eq!(half("test::half.float", 5.into()).expect("a float"), "Float(2.5)");
        });
    });
}

#[test]
fn what_is_refused_here_says_why_and_is_not_sent() {
    bounded(|| {
        for_both(|to| {
            let error = to.builtin("test::half", args!["x"], kwargs! {}).wait().expect_err("no half of a text");
            let CallError::NoMatch { call, source } = &error else { panic!("{error}") };
            assert_eq!((call.function, source.candidates.len()), ("test::half", 2));
            assert!(
                error.to_string().ends_with(
                    "test::half does not take (str)\n  test::half.int(int x) -> int: `int x` cannot be str\n  \
                 test::half.float(float x) -> float: `float x` cannot be str"
                ),
                "{error}"
            );
            let error = to.builtin("test::hlaf", args![1], kwargs! {}).wait().expect_err("no such name");
            let CallError::UnknownBuiltin { nearest, .. } = &error else { panic!("{error}") };
            assert_eq!(nearest[0], "test::half", "{error}");
            let error = to.builtin_as::<String>("test::half", args![1], kwargs! {}).wait().expect_err("an int");
            assert!(error.to_string().ends_with("reply: the value is of type int, not String"), "{error}");
        });
        let group = group();
        let error = group.agents[0].to("w9").builtin("test::half", args![1], kwargs! {}).wait().expect_err("nobody");
        assert!(matches!(error, CallError::NoSuchWorker { .. }), "{error}");
        group.shutdown();
    });
}

#[test]
fn failures_deadlines_and_cancellation_are_those_of_any_call() {
    bounded(|| {
        for_both(|to| {
            let error = to.builtin("test::fail", args!["this"], kwargs! {}).wait().expect_err("it fails");
            assert!(matches!(&error, CallError::Remote { error, .. } if error.message == "this"), "{error}");
            let error = to.builtin("test::panic", args![], kwargs! {}).wait().expect_err("it panics");
            assert!(matches!(&error, CallError::Panicked { message, .. } if message == "as told"), "{error}");
            let key = unique("gate");
            let held = to.deadline(Duration::from_millis(50)).builtin("test::hold", args![&key], kwargs! {});
            assert!(matches!(held.wait(), Err(CallError::Deadline { .. })));
            drop(to.builtin("test::hold", args![&key], kwargs! {}));
            gate(&key).open();
            let awaited = block_on(to.builtin_as::<bool>("test::hold", args![&key], kwargs! {}).into_future());
            assert!(awaited.expect("an open gate"));
        });
    });
}

/// REGISTERED: an agent that serves nothing serves no builtins, and can call those of others.
#[test]
fn an_agent_that_only_calls_serves_no_builtins() {
    bounded(|| {
        let group = Group::with(2, |options| options.registry = (options.rank == 0).then(Registry::empty));
        let x = counting(&[2]);
        let clone =
            |from: usize, to: &str| group.agents[from].to(to).builtin("aten::clone", args![&x], kwargs! {}).wait();
        assert!(matches!(clone(0, "w1"), Ok(Value::Tensor(_))));
        assert!(matches!(clone(1, "w0"), Err(CallError::UnknownFunction { .. })));
        assert!(matches!(clone(0, "w0"), Err(CallError::UnknownFunction { .. })), "to itself, too");
        group.shutdown();
    });
}

/// READY and FENCE, and the device map, as of any call.
#[test]
fn tensors_of_devices_are_cloned_where_they_are() {
    bounded(|| {
        let group = Group::with(2, |options| {
            let config = Config { emulated_devices: 2, ..Config::default() };
            options.device_runtime = Some(Runtime::new(config).expect("an emulated runtime"));
        });
        let agent = &group.agents[0];
        let stream = agent.runtime().stream(Device::Cuda(1)).expect("an emulated device");
        let mut storage = stream.alloc(8).expect("memory");
        stream
            .launch(&[], &mut storage, |_, bytes| bytes.copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]))
            .expect("enqueued");
        let x = farcall::TensorMut::from_storage(storage, DType::U8, &[8]).expect("exact").freeze(&stream);
        let reply = agent.to("w1").builtin_as::<Tensor>("aten::clone", args![&x], kwargs! {});
        let y = block_on(reply.on(&stream)).expect("a copy");
        assert_eq!(y.device(), Device::Cuda(1));
        assert_eq!(block_on(y.host()).expect("bytes").to_vec::<u8>().expect("u8"), [1, 2, 3, 4, 5, 6, 7, 8]);
        group.shutdown();
    });
}
