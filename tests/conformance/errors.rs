//! Every failure is typed, names its call, and leaves the worker as it was.

use std::time::{Duration, Instant};

use farcall::__private::{FunctionCell, Handler};
use farcall::device::CodecError;
use farcall::prelude::*;
use farcall::transport::TransferError;
use farcall::{CallId, Function, Stage};

use crate::functions::{
    Unencodable, add, echo, echo_all, gate, hold, hold_async, layered, long_error, long_text, nothing, panic_async,
    panic_inline, panic_sync, parse, pattern, take_unencodable, unencodable,
};
use crate::harness::{Group, block_on, bounded, unique};

/// A function as another build of the program has it; its handler is never used here.
macro_rules! other_build {
    ($name:ident = $wire:literal, $signature:literal, $args:ty => $output:ty $(, made of $types:literal)?) => {
        #[derive(Clone, Copy)]
        struct $name;

        impl Function for $name {
            type Args = $args;
            type Output = $output;
            const NAME: &'static str = $wire;
            const SIGNATURE: &'static str = $signature;
            const INLINE: bool = false;
            $(fn types() -> String {
                $types.to_owned()
            })?
            fn handler() -> Handler {
                unreachable!("only called, never served")
            }
            fn cell() -> &'static FunctionCell {
                static CELL: FunctionCell = FunctionCell::new();
                &CELL
            }
        }
    };
}

other_build!(Misspelled = "test::addd", "(i64, i64) -> i64", (i64, i64) => i64);
other_build!(Unheard = "elsewhere::completely_different_thing", "() -> ()", () => ());
other_build!(OtherTypes = "test::add", "(f64, f64) -> f64", (f64, f64) => f64);
other_build!(OtherArguments = "test::add", "(i64, i64) -> i64", (String, Tensor) => i64, made of "(i64, i64) -> i64");
other_build!(OtherResult = "test::add", "(i64, i64) -> i64", (i64, i64) => Tensor, made of "(i64, i64) -> i64");
other_build!(OtherFields = "test::echo_message", "(Message) -> Message", (other::Message,) => other::Message);

mod other {
    //! A type of the same name as the callee has it, with another field.
    #[derive(Debug, serde::Serialize, serde::Deserialize)]
    pub(super) struct Message {
        pub(super) id: u32,
    }
}

fn call_id(function: &'static str) -> CallId {
    CallId { worker: "w1".into(), function }
}

/// What `run` makes of w1, from w0; afterwards both still answer.
fn fails(run: impl FnOnce(&To<'_>) -> CallError) -> CallError {
    let group = Group::new(2);
    group.answers(); // connected: a deadline of 1 ms is no deadline for that
    let error = run(&group.agents[0].to("w1"));
    group.answers();
    assert_eq!(group.agents[0].in_flight(), 0);
    group.shutdown();
    error
}

use farcall::To;

#[test]
fn a_handlers_error_comes_back_with_its_type() {
    bounded(|| {
        let error = fails(|w1| w1.call(parse, ("forty-two",)).wait().expect_err("no number"));
        let CallError::Remote { call, error } = error else { panic!("{error}") };
        assert_eq!(call, call_id("test::parse"));
        assert_eq!(error.message, "invalid digit found in string");
        assert_eq!(error.type_name, "core::num::error::ParseIntError");
        assert!(error.chain.is_empty());
    });
}

/// A field more, or of another type, and the bytes would mean something else: the first call says so, with both sides.
#[test]
fn types_of_one_name_that_are_made_of_something_else_are_told_apart() {
    bounded(|| {
        let error = fails(|w1| w1.call(OtherFields, (&other::Message { id: 1 },)).wait().expect_err("other fields"));
        let CallError::TypesMismatch { call, caller, callee } = &error else { panic!("{error}") };
        assert_eq!(*call, call_id("test::echo_message"));
        assert_eq!(caller, "(Message{id: u32}) -> Message{id: u32}");
        let message = "Message{id: u64, parts: [Part{Unit | Newtype(Tensor) | Tuple(u8, Tensor?) | Struct{name: str, inner: \
                       Message}}], named: {str: Tensor}, pair: (Tensor?, Tensor?), text: str?}";
        assert_eq!(*callee, format!("({message}) -> {message}"));
        assert!(error.to_string().ends_with("build both from the same source"), "{error}");
    });
}

#[test]
fn a_handlers_error_comes_back_with_its_sources() {
    bounded(|| {
        let error = fails(|w1| w1.call(layered, ()).wait().expect_err("an error"));
        assert!(error.to_string().ends_with("cannot load: cannot read: disk on fire"), "{error}");
        let CallError::Remote { error, .. } = error else { panic!("{error}") };
        assert!(error.type_name.ends_with("::Layered"), "{}", error.type_name);
        assert_eq!(
            (error.message.as_str(), &error.chain[..]),
            ("cannot load", &["cannot read", "disk on fire"].map(str::to_owned)[..])
        );
    });
}

#[test]
fn a_handlers_error_is_awaited_as_it_is_waited_for() {
    bounded(|| {
        let error = fails(|w1| block_on(w1.call(parse, ("x",)).into_future()).expect_err("no number"));
        assert!(matches!(error, CallError::Remote { .. }), "{error}");
    });
}

#[test]
fn an_error_of_a_call_to_oneself_is_the_same() {
    bounded(|| {
        let group = Group::new(1);
        let me = group.agents[0].to(0);
        assert!(matches!(me.call(parse, ("x",)).wait(), Err(CallError::Remote { .. })));
        assert!(matches!(me.call(panic_sync, ("x",)).wait(), Err(CallError::Panicked { .. })));
        assert!(matches!(me.call(panic_inline, ("x",)).wait(), Err(CallError::Panicked { .. })));
        assert!(matches!(me.call(panic_async, (true, "x")).wait(), Err(CallError::Panicked { .. })));
        assert!(matches!(me.call(Misspelled, (1, 2)).wait(), Err(CallError::UnknownFunction { .. })));
        assert!(matches!(
            me.call(OtherArguments, ("x", Tensor::scalar(1_u8).expect("one"))).wait(),
            Err(CallError::BadArguments { .. })
        ));
        assert!(matches!(me.call(unencodable, ()).wait(), Err(CallError::BadReply { .. })));
        assert_eq!(me.call(add, (2, 3)).wait().expect("a sum"), 5);
        group.shutdown();
    });
}

/// A call to oneself compares signatures as a call over the wire does.
#[test]
fn another_signature_of_ones_own_function_is_refused() {
    bounded(|| {
        let group = Group::new(1);
        let outcome = group.agents[0].to(0).call(OtherTypes, (1.0, 2.0)).wait();
        assert!(matches!(outcome, Err(CallError::SignatureMismatch { .. })), "{outcome:?}");
        group.shutdown();
    });
}

fn panicked(error: &CallError, text: &str) {
    let CallError::Panicked { message, .. } = error else { panic!("{error}") };
    assert_eq!(message, text);
}

#[test]
fn a_panic_of_a_handler_comes_back_with_its_message() {
    bounded(|| panicked(&fails(|w1| w1.call(panic_sync, ("sync",)).wait().expect_err("a panic")), "sync"));
}

#[test]
fn a_panic_of_an_inline_handler_comes_back_with_its_message() {
    bounded(|| panicked(&fails(|w1| w1.call(panic_inline, ("inline",)).wait().expect_err("a panic")), "inline"));
}

#[test]
fn a_panic_of_an_async_handler_comes_back_with_its_message() {
    bounded(|| {
        for late in [false, true] {
            panicked(&fails(|w1| w1.call(panic_async, (late, "async")).wait().expect_err("a panic")), "async");
        }
    });
}

#[test]
fn a_hundred_panics_cost_no_thread_of_the_worker() {
    bounded(|| {
        let error = fails(|w1| {
            let replies: Vec<_> = (0..100).map(|_| w1.call(panic_sync, ("again",))).collect();
            let errors = replies.into_iter().map(|reply| reply.wait().expect_err("a panic"));
            errors.last().expect("a hundred of them")
        });
        panicked(&error, "again");
    });
}

#[test]
fn an_unknown_function_is_answered_with_the_nearest_name() {
    bounded(|| {
        let error = fails(|w1| w1.call(Misspelled, (1, 2)).wait().expect_err("no such function"));
        let CallError::UnknownFunction { call, nearest } = error else { panic!("{error}") };
        assert_eq!((call, nearest.as_deref()), (call_id("test::addd"), Some("test::add")));
        let error = fails(|w1| w1.call(Unheard, ()).wait().expect_err("no such function"));
        assert!(matches!(error, CallError::UnknownFunction { nearest: None, .. }), "{error}");
    });
}

#[test]
fn another_signature_is_refused_with_both() {
    bounded(|| {
        let error = fails(|w1| w1.call(OtherTypes, (1.0, 2.0)).wait().expect_err("other types"));
        let CallError::SignatureMismatch { call, caller, callee } = error else { panic!("{error}") };
        assert_eq!(call, call_id("test::add"));
        assert_eq!((caller, callee.as_str()), ("(f64, f64) -> f64", "(i64, i64) -> i64"));
    });
}

#[test]
fn arguments_that_do_not_decode_are_refused() {
    bounded(|| {
        let x = Tensor::scalar(1_u8).expect("one byte");
        let error = fails(|w1| w1.call(OtherArguments, ("text", &x)).wait().expect_err("other arguments"));
        assert!(matches!(error, CallError::BadArguments { .. }), "{error}");
    });
}

#[test]
fn a_reply_that_does_not_decode_is_the_callers_error() {
    bounded(|| {
        let error = fails(|w1| w1.call(OtherResult, (1, 2)).wait().expect_err("another result"));
        assert!(matches!(error, CallError::BadReply { .. }), "{error}");
        let error = fails(|w1| block_on(w1.call(OtherResult, (1, 2)).into_future()).expect_err("another result"));
        assert!(matches!(error, CallError::BadReply { .. }), "{error}");
    });
}

#[test]
fn a_reply_that_cannot_be_encoded_is_told_to_the_caller() {
    bounded(|| {
        let error = fails(|w1| w1.call(unencodable, ()).wait().expect_err("no reply"));
        let CallError::BadReply { message, .. } = error else { panic!("{error}") };
        assert!(message.contains("never encodes"), "{message}");
    });
}

#[test]
fn a_reply_above_the_limits_is_told_to_the_caller() {
    bounded(|| {
        let error = fails(|w1| w1.call(long_text, (2 << 20,)).wait().expect_err("no reply"));
        let CallError::BadReply { message, .. } = error else { panic!("{error}") };
        assert!(message.contains("metadata bytes exceed the limit of 1048576"), "{message}");
        let error = fails(|w1| w1.call(long_error, (2 << 20,)).wait().expect_err("no reply"));
        let CallError::BadReply { message, .. } = error else { panic!("{error}") };
        assert!(message.contains("its error could not be sent"), "{message}");
    });
}

fn too_large(error: &CallError, expected: (&str, u64, u64)) {
    let CallError::Send { source: TransferError::TooLarge { what, found, max }, .. } = error else { panic!("{error}") };
    assert_eq!((*what, *found, *max), expected);
}

#[test]
fn arguments_above_the_limits_are_refused_before_they_are_sent() {
    bounded(|| {
        let error = fails(|w1| w1.call(parse, ("x".repeat(2 << 20),)).wait().expect_err("too long"));
        let CallError::Send { source: TransferError::TooLarge { what: "metadata bytes", max: 1_048_576, .. }, .. } =
            error
        else {
            panic!("{error}")
        };
        let one = Tensor::scalar(1_u8).expect("one byte");
        let error = fails(|w1| w1.call(echo_all, (vec![one; 4097],)).wait().expect_err("too many"));
        too_large(&error, ("tensors", 4097, 4096));
    });
}

#[test]
fn the_limits_of_the_options_are_kept() {
    bounded(|| {
        let group = Group::with(2, |options| options.limits.tensor_bytes_max = 1 << 20);
        let w1 = group.agents[0].to("w1");
        let x = pattern::run((1 << 20) + 1, 1).expect("memory");
        let error = w1.call(echo, (&x,)).wait().expect_err("too large");
        too_large(&error, ("tensor bytes", (1 << 20) + 1, 1 << 20));
        let error = w1.call(pattern, ((1 << 20) + 1, 1)).wait().expect_err("too large to be sent back");
        assert!(matches!(error, CallError::BadReply { .. }), "{error}");
        assert_eq!(w1.call(pattern, (1 << 20, 1)).wait().expect("just below").numel(), 1 << 20);
        group.answers();
        group.shutdown();
    });
}

#[test]
fn arguments_that_cannot_be_encoded_are_refused() {
    bounded(|| {
        let error = fails(|w1| w1.call(take_unencodable, (Unencodable,)).wait().expect_err("no bytes"));
        let CallError::Encode { call, source: CodecError::Custom(text) } = error else { panic!("{error}") };
        assert_eq!((call, text.as_str()), (call_id("test::take_unencodable"), "never encodes"));
    });
}

fn deadline_passed(error: &CallError, function: &'static str, worker: &str) {
    let CallError::Deadline { call, after, stage } = error else { panic!("{error}") };
    assert_eq!((&*call.worker, call.function), (worker, function));
    assert_eq!((*after, *stage), (Duration::from_millis(1), Stage::Waiting));
}

#[test]
fn a_deadline_ends_a_wait() {
    bounded(|| {
        let key = unique("deadline");
        let to_gate = key.clone();
        let error = fails(move |w1| {
            let error = w1.deadline(Duration::from_millis(1)).call(hold, (&to_gate,)).wait();
            gate(&to_gate).open();
            error.expect_err("the gate was closed")
        });
        deadline_passed(&error, "test::hold", "w1");
    });
}

#[test]
fn a_deadline_ends_an_await() {
    bounded(|| {
        let key = unique("deadline");
        let error = fails(move |w1| {
            let w1 = w1.deadline(Duration::from_millis(1));
            let error = block_on(w1.call(hold, (&key,)).into_future());
            let other = block_on(w1.call(hold_async, (&key, 1)).into_future());
            deadline_passed(&other.expect_err("the gate is closed"), "test::hold_async", "w1");
            gate(&key).open();
            error.expect_err("the gate was closed")
        });
        deadline_passed(&error, "test::hold", "w1");
    });
}

#[test]
fn a_deadline_ends_a_call_to_oneself() {
    bounded(|| {
        let group = Group::new(1);
        let (me, key) = (group.agents[0].to(0).deadline(Duration::from_millis(1)), unique("deadline"));
        deadline_passed(&me.call(hold, (&key,)).wait().expect_err("closed"), "test::hold", "w0");
        deadline_passed(&block_on(me.call(hold, (&key,)).into_future()).expect_err("closed"), "test::hold", "w0");
        gate(&key).open();
        group.agents[0].to(0).call(nothing, ()).wait().expect("an answer");
        group.shutdown();
    });
}

/// Each of many deadlines ends its own call, in any order, and not before its time.
#[test]
fn deadlines_end_calls_one_by_one() {
    bounded(|| {
        let group = Group::new(2);
        let key = unique("deadlines");
        block_on(async {
            let started = Instant::now();
            let calls: Vec<_> = [80, 10, 40, 20]
                .map(|ms| {
                    let deadline = Duration::from_millis(ms);
                    (deadline, group.agents[0].to("w1").deadline(deadline).call(hold_async, (&key, 0)).into_future())
                })
                .into();
            let long = group.agents[0].to("w1").call(hold_async, (&key, 7)).into_future();
            for (deadline, call) in calls {
                let error = call.await.expect_err("the gate is closed");
                assert!(matches!(error, CallError::Deadline { after, .. } if after == deadline), "{error}");
                assert!(started.elapsed() >= deadline);
            }
            gate(&key).open();
            assert_eq!(long.await.expect("its deadline is far"), 7);
        });
        group.answers();
        group.shutdown();
    });
}

#[test]
fn a_worker_that_is_not_there_is_named_with_those_that_are() {
    bounded(|| {
        let group = Group::new(2);
        let error = group.agents[0].to("w7").call(add, (2, 3)).wait().expect_err("no w7");
        let CallError::NoSuchWorker { target, known } = &error else { panic!("{error}") };
        assert_eq!(target, "w7");
        assert!(known.iter().map(|name| &**name).eq(["w0", "w1"]));
        let error = block_on(group.agents[0].to(2).call(add, (2, 3)).into_future()).expect_err("no rank 2");
        assert!(error.to_string().contains("rank 2"), "{error}");
        group.answers();
        group.shutdown();
    });
}

#[test]
fn calls_after_the_shutdown_are_refused_at_once() {
    bounded(|| {
        let group = Group::new(2);
        let agents = group.agents.clone();
        group.answers();
        group.shutdown();
        for to in [0, 1] {
            let error = agents[0].to(to).call(add, (2, 3)).wait().expect_err("shut down");
            assert!(matches!(error, CallError::ShutDown { .. }), "{error}");
            let error = block_on(agents[0].to(to).call(add, (2, 3)).into_future()).expect_err("shut down");
            assert!(matches!(error, CallError::ShutDown { .. }), "{error}");
        }
        agents[0].shutdown_blocking().expect("twice is no error");
    });
}

/// `abort` fails what is in flight, here and at the peers.
#[test]
fn calls_in_flight_fail_when_either_side_aborts() {
    bounded(|| {
        let group = Group::new(3);
        let key = unique("abort");
        let local = group.agents[1].to(1).call(hold, (&key,));
        let outgoing = group.agents[1].to("w2").call(hold, (&key,));
        let incoming = group.agents[0].to("w1").call(hold, (&key,));
        assert!(gate(&key).wait_arrived(3));
        let opener = std::thread::spawn({
            let (agent, key) = (group.agents[1].clone(), key.clone());
            move || {
                agent.abort();
                gate(&key).open();
            }
        });
        let error = local.wait().expect_err("this agent ended");
        assert!(matches!(error, CallError::ShutDown { .. }), "{error}");
        let error = outgoing.wait().expect_err("this agent ended");
        assert!(matches!(error, CallError::PeerLost { stage: Stage::Waiting, .. }), "{error}");
        let error = incoming.wait().expect_err("its callee ended");
        assert!(error.to_string().contains("the peer shut down"), "{error}");
        opener.join().expect("no panic");
        let sum = group.agents[0].to("w2").call(add, (2, 3)).wait();
        assert_eq!(sum.expect("the others go on"), 5);
    });
}
