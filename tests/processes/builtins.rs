//! Builtins of a worker in a process of its own.

use farcall::prelude::*;
use farcall::{args, kwargs};

use crate::functions::registry;
use crate::harness::{bounded, counting, step};

use super::spawn::Processes;

#[test]
fn another_process_runs_what_is_matched_here() {
    bounded(|| {
        step("starting a worker");
        let processes = Processes::start(&[None, Some("serve")], &[]);
        let agent = processes.join(|options| options.registry = Some(registry()));
        let w1 = agent.to("w1");
        // Inline in the frame, and on the bulk connection.
        for len in [6, 100_000] {
            let x = counting(&[len]);
            let y: Tensor = w1.builtin_as("aten::clone", args![&x], kwargs! {}).wait().expect("a copy");
            assert_eq!(y.as_slice::<f32>().expect("f32"), x.as_slice::<f32>().expect("f32"));
        }
        let value = w1.builtin("test::half", args![5], kwargs! {}).wait().expect("half");
        assert!(matches!(value, Value::Int(2)), "{value:?}");
        let value = w1.builtin("test::half", args![], kwargs! {"x": 5.0}).wait().expect("half");
        assert!(matches!(value, Value::Float(2.5)), "{value:?}");
        processes.shutdown(&agent);
    });
}

/// REGISTERED: only what the callee serves is run.
#[test]
fn a_builtin_that_only_the_caller_has_is_a_typed_error() {
    bounded(|| {
        let processes = Processes::start(&[None, Some("serve")], &[]);
        let agent = processes.join(|options| {
            let own = farcall::Builtin::new("test::echoo(int x) -> int", |_, _| Ok(Value::None));
            options.registry = Some(registry().with_builtin(own.expect("a signature")));
        });
        let error = agent.to("w1").builtin("test::echoo", args![1], kwargs! {}).wait().expect_err("not there");
        assert_eq!(error.to_string(), "test::echoo on w1: no such function there; did you mean test::echo?");
        processes.shutdown(&agent);
    });
}
