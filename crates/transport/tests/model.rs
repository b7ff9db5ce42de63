//! Every interleaving, and every order that the memory model allows, of the words of a ring: the module is that of the crate,
//! compiled against loom's atomics.

mod sync {
    pub(crate) use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
}

#[path = "../src/shm/lane.rs"]
#[expect(dead_code, reason = "models use a part")]
mod lane;

use std::sync::Arc;

use lane::{AWAKE, DRIVER, Lane, THREAD};
use loom::cell::UnsafeCell;
use loom::thread;

/// W2: a receiver that sleeps is woken by who has published, or saw it.
#[test]
fn whoever_sleeps_is_woken_by_what_was_published() {
    loom::model(|| {
        let lane = Arc::new(Lane::default());
        let sender = Arc::clone(&lane);
        let sent = thread::spawn(move || {
            sender.publish(64);
            sender.take_sleeper()
        });
        let sleeps = lane.sleep(DRIVER, 0);
        let woken = sent.join().unwrap();
        assert!(!sleeps || woken == DRIVER, "it sleeps, and nobody wakes it");
    });
}

/// W2: who rouses the receiver's thread takes no wake from the driver, to whom that thread has left the ring meanwhile.
#[test]
fn who_rouses_a_thread_leaves_the_drivers_sleep_alone() {
    loom::model(|| {
        let lane = Arc::new(Lane::default());
        let sender = Arc::clone(&lane);
        let sent = thread::spawn(move || {
            sender.publish(64);
            sender.take_sleeper()
        });
        let rouser = Arc::clone(&lane);
        let roused = thread::spawn(move || rouser.take_thread());
        lane.sleep(THREAD, 0);
        // It goes of its own accord, whoever has woken it, if anybody.
        lane.wake();
        let sleeps = lane.sleep(DRIVER, 0);
        let (woken, roused) = (sent.join().unwrap(), roused.join().unwrap());
        // A thread that was roused has gone before the driver's mark came. Loom does not know: to it, the two stores have no order.
        assert!(!sleeps || woken == DRIVER || roused, "the driver sleeps, and nobody wakes it");
    });
}

/// W2: a sender that waits for room is told by who has made some, or saw it.
#[test]
fn whoever_waits_for_room_is_told_of_it() {
    const CAPACITY: u64 = 64;
    loom::model(|| {
        let lane = Arc::new(Lane::default());
        lane.publish(CAPACITY);
        let receiver = Arc::clone(&lane);
        let read = thread::spawn(move || {
            let tail = receiver.tail(0, CAPACITY).unwrap();
            receiver.take(tail);
            receiver.take_full()
        });
        lane.want_room();
        let waits = lane.head(CAPACITY, CAPACITY).unwrap() == 0;
        let told = read.join().unwrap();
        assert!(!waits || told, "it waits, and nobody tells it");
    });
}

/// A ring of one byte.
struct Ring {
    lane: Lane,
    byte: UnsafeCell<u64>,
}

#[expect(unsafe_code, reason = "loom checks it")]
// SAFETY: loom reports two threads at the byte at once.
unsafe impl Sync for Ring {}

/// Bytes are read after they were written, and written again after they were read.
#[test]
fn bytes_pass_in_order() {
    const CAPACITY: u64 = 1;
    loom::model(|| {
        let shared = Arc::new(Ring { lane: Lane::default(), byte: UnsafeCell::new(0) });
        let sender = Arc::clone(&shared);
        let sent = thread::spawn(move || {
            let Ring { lane, byte } = &*sender;
            let mut tail = 0;
            for value in [1, 2] {
                while tail - lane.head(tail, CAPACITY).unwrap() == CAPACITY {
                    thread::yield_now();
                }
                byte.with_mut(|byte| {
                    #[expect(unsafe_code, reason = "loom checks it")]
                    // SAFETY: the receiver has read what was there, which loom checks.
                    unsafe {
                        *byte = value
                    }
                });
                tail += 1;
                lane.publish(tail);
            }
        });
        let Ring { lane, byte } = &*shared;
        for value in [1, 2] {
            let head = value - 1;
            while !lane.has_more(head) {
                thread::yield_now();
            }
            #[expect(unsafe_code, reason = "loom checks it")]
            // SAFETY: published, which loom checks.
            let found = byte.with(|byte| unsafe { *byte });
            assert_eq!(found, value);
            lane.take(head + 1);
        }
        sent.join().unwrap();
    });
}

/// LIMITS: positions that cannot be are found out.
#[test]
fn impossible_positions_are_corrupt() {
    loom::model(|| {
        let lane = Lane::default();
        lane.publish(65);
        assert!(lane.tail(0, 64).is_err());
        lane.take(66);
        assert!(lane.head(65, 64).is_err());
        assert_eq!(lane.take_sleeper(), AWAKE);
    });
}
