//! The words of one direction of a ring, in memory of two processes: how far bytes were written and read, and who sleeps.
//!
//! Pure but for its atomics, so that `tests/model.rs` tries every interleaving of them. Positions count bytes since the start and
//! never wrap. Each word has a cache line (two, as processors fetch them in pairs), so that a sender that finds nobody asleep has
//! touched nothing that the receiver writes.
//! Invariant W2: a receiver sleeps only after it has said so and then found nothing, a sender looks for sleepers only after it has
//! published: one of them sees the other. The same holds for a sender without room and the receiver that makes some.
//! Invariant LIMITS: each side keeps its own position to itself and checks the other's; a peer that lies is found out, and nothing
//! outside the ring is touched.

use crate::sync::{AtomicU32, AtomicU64, Ordering, fence};

/// Nobody sleeps: bytes will be found without a word.
pub(crate) const AWAKE: u32 = 0;
/// The driver sleeps, or may: a byte on the socket wakes it.
pub(crate) const DRIVER: u32 = 1;
/// A thread sleeps on the word itself.
pub(crate) const THREAD: u32 = 2;

#[derive(Default)]
#[repr(C, align(128))]
struct Line<T>(T);

/// See the module.
#[derive(Default)]
#[repr(C)]
pub(crate) struct Lane {
    /// Bytes written, by the sender.
    tail: Line<AtomicU64>,
    /// Bytes read, by the receiver.
    head: Line<AtomicU64>,
    /// Who sleeps until there are bytes.
    waiting: Line<AtomicU32>,
    /// The sender sleeps until there is room.
    full: Line<AtomicU32>,
    /// The sender's heartbeats, and the processor it last sent from.
    beats: Line<(AtomicU32, AtomicU32)>,
}

/// A position that cannot be: the peer has written nonsense.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Corrupt;

fn is_within(head: u64, tail: u64, capacity: u64) -> bool {
    tail.checked_sub(head).is_some_and(|unread| unread <= capacity)
}

impl Lane {
    // ---- the sender's side ----

    /// Bytes before `tail` may be read.
    pub(crate) fn publish(&self, tail: u64) {
        self.tail.0.store(tail, Ordering::Release);
    }

    /// How far the receiver has come, of at most `capacity` bytes before `tail`.
    pub(crate) fn head(&self, tail: u64, capacity: u64) -> Result<u64, Corrupt> {
        let head = self.head.0.load(Ordering::Acquire);
        if is_within(head, tail, capacity) { Ok(head) } else { Err(Corrupt) }
    }

    /// Has the receiver tell when there is room. The sender looks once more before it relies on that (W2).
    pub(crate) fn want_room(&self) {
        self.full.0.store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// After [`Self::publish`]: who sleeps, to be woken by the caller alone.
    pub(crate) fn take_sleeper(&self) -> u32 {
        fence(Ordering::SeqCst);
        match self.waiting.0.load(Ordering::Relaxed) {
            AWAKE => AWAKE,
            _ => self.waiting.0.swap(AWAKE, Ordering::AcqRel),
        }
    }

    /// Whether a thread of the receiver slept, to be woken by the caller alone. Nobody else is taken for awake.
    pub(crate) fn take_thread(&self) -> bool {
        fence(Ordering::SeqCst);
        self.waiting.0.compare_exchange(THREAD, AWAKE, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    pub(crate) fn beat(&self) {
        self.beats.0.0.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn set_processor(&self, processor: u32) {
        self.beats.0.1.store(processor, Ordering::Relaxed);
    }

    // ---- the receiver's side ----

    /// Bytes that may be read, of which those before `head` were.
    pub(crate) fn tail(&self, head: u64, capacity: u64) -> Result<u64, Corrupt> {
        let tail = self.tail.0.load(Ordering::Acquire);
        if is_within(head, tail, capacity) { Ok(tail) } else { Err(Corrupt) }
    }

    /// Whether bytes have come beyond `head`.
    pub(crate) fn has_more(&self, head: u64) -> bool {
        self.tail.0.load(Ordering::Acquire) != head
    }

    /// Bytes before `head` were read, and their room may be written again.
    pub(crate) fn take(&self, head: u64) {
        self.head.0.store(head, Ordering::Release);
    }

    /// After [`Self::take`]: whether the sender waits for room, to be woken by the caller alone.
    pub(crate) fn take_full(&self) -> bool {
        fence(Ordering::SeqCst);
        self.full.0.load(Ordering::Relaxed) != 0 && self.full.0.swap(0, Ordering::AcqRel) != 0
    }

    /// Says that `who` sleeps; `false`, and nobody does, if bytes have come beyond `head`.
    pub(crate) fn sleep(&self, who: u32, head: u64) -> bool {
        self.waiting.0.store(who, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if self.has_more(head) {
            self.wake();
            return false;
        }
        true
    }

    /// Nobody sleeps any more. The line stays as it is if nobody did.
    pub(crate) fn wake(&self) {
        if self.waiting.0.load(Ordering::Relaxed) != AWAKE {
            self.waiting.0.store(AWAKE, Ordering::Relaxed);
        }
    }

    /// The word that a thread sleeps on while it is [`THREAD`].
    pub(crate) fn word(&self) -> &AtomicU32 {
        &self.waiting.0
    }

    /// Where the sender ran when it last sent.
    pub(crate) fn processor(&self) -> u32 {
        self.beats.0.1.load(Ordering::Relaxed)
    }

    /// The other side's heartbeats and bytes so far: what changes while it lives.
    pub(crate) fn signs(&self) -> (u32, u64) {
        (self.beats.0.0.load(Ordering::Relaxed), self.tail.0.load(Ordering::Relaxed))
    }
}
