//! Many connections, slow ones, and floods.

use std::time::{Duration, Instant};

use crate::functions::add;
use crate::harness::{bounded, step};

use super::raw::{
    Descriptor, Frame, PING, REPLY, RawPeer, Target, U8, assert_says, control, echo_request, hello, timed,
};

/// How long a hello may take, with room for a busy machine.
const REFUSED_WITHIN: Duration = Duration::from_secs(9);

#[test]
fn half_open_connections_stand_in_nobodys_way_and_end() {
    bounded(|| {
        let target = Target::new();
        let mut silent: Vec<RawPeer> = (0..200).map(|_| target.stranger()).collect();
        for _ in 0..50 {
            target.serves_others();
        }
        step("the worker's patience with those who do not say hello");
        let took = timed(|| {
            for peer in &mut silent {
                assert_says(&peer.close_text(), "no complete hello within 1.6s");
            }
        });
        assert!(took < REFUSED_WITHIN, "{took:?}");
        target.serves_others();
        target.shutdown();
    });
}

#[test]
fn a_hello_that_stalls_is_refused_in_time() {
    bounded(|| {
        let target = Target::new();
        let hello = hello(target.group_name(), &control(Some("w0"))).bytes();
        // One after each byte: within the header, at its end, within the metadata.
        let mut stalled: Vec<RawPeer> = [1, 4, 63, 64, 65, hello.len() - 1]
            .map(|len| {
                let mut peer = target.stranger();
                hello[..len].chunks(1).for_each(|byte| peer.send(byte));
                peer
            })
            .into();
        let took = timed(|| {
            for peer in &mut stalled {
                assert_says(&peer.close_text(), "no complete hello within 1.6s");
            }
        });
        assert!(took < REFUSED_WITHIN, "{took:?}");
        target.serves_others();
        target.shutdown();
    });
}

/// Progress does not buy time: who sends a byte now and then is refused at the same moment.
#[test]
fn a_hello_that_trickles_is_refused_in_time() {
    bounded(|| {
        let target = Target::new();
        let hello = hello(target.group_name(), &control(Some("w0"))).bytes();
        let mut peer = target.stranger();
        let mut bytes = hello.chunks(1);
        let took = timed(|| {
            while peer.peek(Duration::from_millis(100)).is_none() {
                peer.send(bytes.next().expect("the refusal comes before the hello's end"));
            }
            assert_says(&peer.close_text(), "no complete hello within 1.6s");
        });
        assert!(took < REFUSED_WITHIN, "{took:?}");
        target.serves_others();
        target.shutdown();
    });
}

#[test]
fn a_hello_in_single_bytes_is_welcome() {
    bounded(|| {
        let target = Target::new();
        let mut peer = target.stranger();
        for byte in hello(target.group_name(), &control(Some("w0"))).bytes().chunks(1) {
            peer.send(byte);
        }
        peer.expect(super::raw::WELCOME);
        peer.announce();
        peer.adds(1);
        target.shutdown();
    });
}

fn echo_32_kib(call: u64) -> Vec<u8> {
    echo_request(call, &Descriptor::inline(U8, &[32 << 10], 32 << 10), &[5; 32 << 10]).bytes()
}

/// LIMITS: answers that are not taken keep their calls' places, so that nobody can have memory filled by not reading.
#[test]
fn a_peer_that_takes_no_answers_is_refused_when_its_window_is_full() {
    bounded(|| {
        let target = Target::with(|options| options.limits.requests_max = 64);
        let mut flood = target.peer();
        let mut sent = 0;
        while flood.try_send(&echo_32_kib(sent)) {
            sent += 1;
            assert!(sent < 1 << 16, "the worker takes everything");
        }
        println!("{sent} requests of 32 KiB were sent, those after the refusal included");
        target.serves_others();
        target.shutdown();
    });
}

/// It speaks, but takes nothing of much that waits for it: lost, as if it were silent.
#[test]
fn a_peer_that_takes_nothing_is_lost() {
    bounded(|| {
        let target = Target::with(|options| options.limits.backlog_bytes_max = 1 << 20);
        let mut flood = target.peer();
        let started = Instant::now();
        for call in 0..512 {
            flood.try_send(&echo_32_kib(call));
        }
        // Each ping is a sign of life.
        while flood.try_send(&Frame::new(PING).bytes()) {
            assert!(started.elapsed() < Duration::from_secs(10), "it is kept");
            std::thread::sleep(Duration::from_millis(50));
        }
        println!("lost after {:?}", started.elapsed());
        assert!(started.elapsed() > Duration::from_millis(1200), "{:?}", started.elapsed());
        target.serves_others();
        target.shutdown();
    });
}

/// The same peer, reading late: it is read on, and nothing is lost.
#[test]
fn a_peer_that_reads_late_gets_everything() {
    bounded(|| {
        let target = Target::with(|options| options.limits.backlog_bytes_max = 1 << 20);
        let mut flood = target.peer();
        for round in 0..4 {
            for call in 0..256 {
                // 8 MiB: more than both ends buffer, so that the last ones wait until some replies were read.
                if call >= 128 {
                    assert_eq!(flood.expect(REPLY).payload.len(), 32 << 10);
                }
                flood.send(&echo_32_kib(round << 8 | call));
            }
            for _ in 0..128 {
                assert_eq!(flood.expect(REPLY).payload.len(), 32 << 10);
            }
        }
        flood.adds(2);
        target.serves_others();
        target.shutdown();
    });
}

/// 64 MiB of requests, none of whose replies is read: they wait in the worker's memory, in nobody's way.
#[test]
fn a_flood_of_requests_whose_replies_are_not_read_blocks_nobody() {
    bounded(|| {
        let target = Target::new();
        let mut flood = target.peer();
        for round in 0..2048 {
            step(format_args!("request {round} of the flood"));
            flood.send(&echo_32_kib(round));
            if round % 256 == 0 {
                target.serves_others();
            }
        }
        target.serves_others();
        // They are there for whoever reads after all.
        for _ in 0..2048 {
            assert_eq!(flood.expect(REPLY).payload.len(), 32 << 10);
        }
        flood.adds(2);
        target.serves_others();
        target.shutdown();
    });
}

/// The same, and gone without having read a byte.
#[test]
fn a_flood_that_is_cut_off_is_forgotten() {
    bounded(|| {
        let target = Target::new();
        for _ in 0..10 {
            let mut flood = target.peer();
            for round in 0..100 {
                flood.send(&echo_32_kib(round));
            }
        }
        target.serves_others();
        target.shutdown();
    });
}

/// Connections that come and go in any state, while others work.
#[test]
fn connections_that_come_and_go_disturb_no_call() {
    bounded(|| {
        let target = Target::new();
        let hello = hello(target.group_name(), &control(Some("w0"))).bytes();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 0..300 {
                    let mut peer = target.stranger();
                    peer.try_send(&hello[..round % (hello.len() + 1)]);
                }
            });
            for round in 0..1000 {
                let sum = target.agent().to("w1").call(add, (round, 1)).wait();
                assert_eq!(sum.expect("a sum"), round + 1);
            }
        });
        target.serves_others();
        target.shutdown();
    });
}
