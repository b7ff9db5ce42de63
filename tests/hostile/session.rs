//! Frames that a welcome peer may send, and some that it may not.

use crate::functions::gate;
use crate::harness::{bounded, unique};

use super::raw::{
    CANCEL, Cursor, Descriptor, ERROR, F32, Frame, REPLY, REQUEST, Target, add_request, announcement, assert_says,
    builtin_announcement, echo_request, text,
};

/// W1, end to end: the bytes a worker sends are those that the tables promise.
#[test]
fn a_session_by_hand_is_answered_byte_for_byte() {
    bounded(|| {
        let target = Target::new();
        let mut peer = target.peer();
        peer.adds(0x0102_0304_0506_0708);
        let payload: Vec<u8> = (100..124).collect();
        let descriptor = Descriptor::inline(F32, &[2, 3], 24);
        peer.send(&echo_request(8, &descriptor, &payload).bytes());
        let reply = peer.expect(REPLY);
        assert_eq!((reply.call, reply.offset), (8, 0));
        assert_eq!((reply.table, reply.metadata, reply.payload), (descriptor.bytes(), vec![0], payload));
        target.shutdown();
    });
}

#[test]
fn frames_may_arrive_in_any_pieces() {
    bounded(|| {
        let target = Target::new();
        let mut peer = target.peer();
        let descriptor = Descriptor::inline(F32, &[2, 3], 24);
        let frames = [echo_request(1, &descriptor, &[7; 24]).bytes(), add_request(2).bytes()].concat();
        for piece in [1, 7, 63, 64, 65, 200] {
            for bytes in frames.chunks(piece) {
                peer.send(bytes);
            }
            let mut replies = [peer.expect(REPLY), peer.expect(REPLY)];
            replies.sort_by_key(|reply| reply.call);
            assert_eq!((replies[0].call, &replies[0].payload[..]), (1, &[7; 24][..]));
            assert_eq!((replies[1].call, &replies[1].metadata[..]), (2, &[10][..]));
        }
        target.shutdown();
    });
}

#[test]
fn a_function_id_that_was_not_announced_is_refused() {
    bounded(|| {
        let target = Target::new();
        for id in [2, 5, u32::MAX] {
            let request = Frame { function: id, ..add_request(1) };
            target.refuses(&request.bytes(), &format!("request for function id {id}, which was not announced"));
        }
        target.shutdown();
    });
}

#[test]
fn a_function_id_out_of_range_is_refused() {
    bounded(|| {
        let target = Target::new();
        for id in [65_536, u32::MAX] {
            let why = format!("malformed function announcement: function id {id} of at most 65536");
            target.refuses(&announcement(id, "test::add", "(i64, i64) -> i64").bytes(), &why);
        }
        // The largest is fine, and those below it stay unannounced.
        let mut peer = target.peer();
        peer.send(&announcement(65_535, "test::add", "(i64, i64) -> i64").bytes());
        peer.send(&Frame { function: 65_535, ..add_request(4) }.bytes());
        assert_eq!(peer.expect(REPLY).metadata, [10]);
        peer.send(&Frame { function: 65_534, ..add_request(5) }.bytes());
        assert!(peer.close_text().contains("65534, which was not announced"));
        target.shutdown();
    });
}

#[test]
fn an_announcement_that_does_not_decode_is_refused() {
    bounded(|| {
        let target = Target::new();
        let good = announcement(2, "test::add", "(i64, i64) -> i64");
        for metadata in [
            Vec::new(),
            text("only a name"),
            vec![0xff; 20],
            vec![0, 1, 0xff, 0],
            vec![2; 20],
            good.metadata[..12].to_vec(),
        ] {
            let frame = Frame { metadata, ..good.clone() };
            target.refuses(&frame.bytes(), "malformed function announcement");
        }
        target.shutdown();
    });
}

#[test]
fn calls_of_unknown_functions_and_signatures_are_errors_of_the_call() {
    bounded(|| {
        let target = Target::new();
        let mut peer = target.peer();
        peer.send(&announcement(2, "test::addd", "(i64, i64) -> i64").bytes());
        peer.send(&Frame { function: 2, ..add_request(1) }.bytes());
        let error = peer.expect(ERROR);
        let mut metadata = Cursor(&error.metadata);
        assert_eq!((metadata.varint(), metadata.varint(), metadata.text().as_str()), (0, 1, "test::add"));
        peer.send(&announcement(3, "test::add", "(i64) -> i64").bytes());
        peer.send(&Frame { function: 3, ..add_request(2) }.bytes());
        let error = peer.expect(ERROR);
        let mut metadata = Cursor(&error.metadata);
        assert_eq!((error.call, metadata.varint(), metadata.text().as_str()), (2, 1, "(i64, i64) -> i64"));
        let signature = "(i64, i64) -> i64";
        let types = [vec![0], text("test::add"), text(signature), text("(i64, i32) -> i64")].concat();
        peer.send(&Frame { metadata: types, ..announcement(4, "", "") }.bytes());
        peer.send(&Frame { function: 4, ..add_request(3) }.bytes());
        let error = peer.expect(ERROR);
        let mut metadata = Cursor(&error.metadata);
        assert_eq!((error.call, metadata.varint()), (3, 7), "other types");
        assert_eq!((metadata.text().as_str(), metadata.text().as_str()), ("(i64, i32) -> i64", signature));
        peer.adds(4);
        target.shutdown();
    });
}

/// REGISTERED: the callee reads a builtin's arguments by its own signature, whatever the caller has matched.
#[test]
fn arguments_that_no_caller_would_match_are_errors_of_the_call() {
    const CLONE: &str = "aten::clone(Tensor self, *, MemoryFormat? memory_format=None) -> Tensor";
    bounded(|| {
        let target = Target::new();
        let mut peer = target.peer();
        peer.send(&builtin_announcement(2, "aten::clone", CLONE).bytes());
        // Values by the index of their kind: none is 0, an int 2, a list 7; zigzag makes 3 a 6.
        let deep = [vec![2], [7, 1].repeat(4000), vec![0, 0]].concat();
        for (call, values, why) in [
            (1, vec![0], "`Tensor self` is missing"),
            (2, vec![2, 0, 0], "`Tensor self` cannot be None"),
            (3, vec![2, 2, 6, 0], "`Tensor self` cannot be int"),
            (4, vec![3, 0, 0, 0], "3 arguments were given by position, and it takes 2"),
            (5, vec![1, 11], "expected variant index 0 <= i < 11"),
            (6, vec![1, 6, 0], "tensor 0 is named, but 0 came along"),
            (7, vec![0xff, 0xff, 0xff, 0xff, 0x0f], "ends early"),
            (8, deep, "deeper than 128 levels"),
        ] {
            peer.send(&Frame { call, function: 2, metadata: values, ..Frame::new(REQUEST) }.bytes());
            let error = peer.expect(ERROR);
            let mut metadata = Cursor(&error.metadata);
            assert_eq!((error.call, metadata.varint()), (call, 2), "bad arguments");
            let text = metadata.text();
            assert!(text.contains(why), "{call}: {text}");
        }
        peer.adds(9);
        target.shutdown();
    });
}

#[test]
fn builtins_and_functions_have_names_apart_and_signatures_of_both_are_compared() {
    bounded(|| {
        let target = Target::new();
        let mut peer = target.peer();
        let (unknown, other) = (0, 1);
        let clone = "aten::clone(Tensor self) -> Tensor";
        for (id, announcement, failure) in [
            (2, announcement(2, "aten::clone", clone), unknown),
            (3, builtin_announcement(3, "test::add", "(i64, i64) -> i64"), unknown),
            (4, builtin_announcement(4, "aten::clone", clone), other),
        ] {
            peer.send(&announcement.bytes());
            peer.send(&Frame { function: id, ..add_request(u64::from(id)) }.bytes());
            let error = peer.expect(ERROR);
            assert_eq!((error.call, Cursor(&error.metadata).varint()), (u64::from(id), failure));
        }
        peer.adds(9);
        target.shutdown();
    });
}

#[test]
fn an_answer_to_no_call_is_ignored() {
    bounded(|| {
        let target = Target::new();
        let mut peer = target.peer();
        for call in [0, 1, u64::MAX, 1 << 32] {
            peer.send(&Frame { call, metadata: vec![10], ..Frame::new(REPLY) }.bytes());
            peer.send(&Frame { call, metadata: vec![4, 1, b'x'], ..Frame::new(ERROR) }.bytes());
            let stray = echo_request(call, &Descriptor::inline(F32, &[2], 8), &[0; 8]);
            peer.send(&Frame { kind: REPLY, ..stray }.bytes());
        }
        peer.adds(7);
        target.serves_others();
        target.shutdown();
    });
}

/// Two calls with one id are two calls; their order is theirs.
fn hold_request(call: u64, key: &str) -> Vec<u8> {
    Frame { call, function: 2, metadata: text(key), ..Frame::new(REQUEST) }.bytes()
}

#[test]
fn a_call_id_used_twice_at_a_time_is_refused() {
    bounded(|| {
        let target = Target::new();
        let key = unique("twice");
        let mut peer = target.peer();
        for _ in 0..2 {
            peer.send(&add_request(5).bytes());
            assert_eq!(peer.expect(REPLY).call, 5);
        }
        peer.send(&announcement(2, "test::hold", "(String) -> bool").bytes());
        peer.send(&hold_request(5, &key));
        assert!(gate(&key).wait_arrived(1));
        peer.send(&hold_request(5, &key));
        assert_says(&peer.close_text(), "malformed request: call 5 was made twice");
        gate(&key).open();
        target.serves_others();
        target.shutdown();
    });
}

#[test]
fn more_unanswered_requests_than_allowed_are_refused() {
    bounded(|| {
        let target = Target::with(|options| options.limits.requests_max = 10);
        let key = unique("many");
        let mut peer = target.peer();
        peer.send(&announcement(2, "test::hold", "(String) -> bool").bytes());
        (0..10).for_each(|call| peer.send(&hold_request(call, &key)));
        assert!(gate(&key).wait_arrived(10));
        peer.send(&hold_request(11, &key));
        assert_says(&peer.close_text(), "11 unanswered requests exceed the limit of 10");
        gate(&key).open();
        target.serves_others();
        target.shutdown();
    });
}

/// Before anything is allocated for them.
#[test]
fn more_bytes_of_unanswered_requests_than_allowed_are_refused() {
    bounded(|| {
        let target = Target::with(|options| options.limits.request_bytes_max = 64 << 10);
        let (mut peer, _) = target.peer_with_key();
        let announced = |call| echo_request(call, &Descriptor::bulk(call, 40 << 10), &[]).bytes();
        peer.send(&announced(1));
        peer.send(&announced(2));
        assert_says(&peer.close_text(), "81920 tensor bytes in unanswered requests exceed the limit of 65536");
        target.serves_others();
        target.shutdown();
    });
}

#[test]
fn cancellations_of_nothing_and_of_everything_are_harmless() {
    bounded(|| {
        let target = Target::new();
        let key = unique("cancelled");
        let mut peer = target.peer();
        let cancel = |call| Frame { call, ..Frame::new(CANCEL) }.bytes();
        for call in [0, 1, u64::MAX, 1 << 32] {
            peer.send(&cancel(call));
        }
        peer.send(&announcement(2, "test::hold", "(String) -> bool").bytes());
        peer.send(&hold_request(7, &key));
        assert!(gate(&key).wait_arrived(1));
        for _ in 0..3 {
            peer.send(&cancel(7));
        }
        peer.adds(8);
        gate(&key).open();
        // One answer, as to every request.
        let answer = peer.receive().expect("an answer");
        assert!(answer.call == 7 && [REPLY, ERROR].contains(&answer.kind));
        peer.send(&cancel(7));
        peer.adds(9);
        target.serves_others();
        target.shutdown();
    });
}

#[test]
fn a_caller_that_leaves_in_mid_call_leaves_nothing_behind() {
    bounded(|| {
        let target = Target::new();
        let key = unique("left");
        let before = target.agent().in_flight();
        let mut peer = target.peer();
        peer.send(&announcement(2, "test::hold", "(String) -> bool").bytes());
        for call in 0..10 {
            peer.send(&Frame { call, function: 2, metadata: text(&key), ..Frame::new(REQUEST) }.bytes());
        }
        assert!(gate(&key).wait_arrived(10));
        drop(peer);
        target.serves_others();
        gate(&key).open();
        target.serves_others();
        assert_eq!(target.agent().in_flight(), before);
        target.shutdown();
    });
}
