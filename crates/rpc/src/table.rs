//! The calls that wait for replies of one peer: which of them are on the wire, and how many may be.
//!
//! Pure. An id is an index and a generation, so that a reply that comes after its call's end meets no other call.
//! Invariant C2: every slot in a table has a deadline, and ends by its reply, its deadline, its cancellation or its endpoint's
//! close. Invariant LIMITS: a request has its place in the window from the moment it is sent until the callee has answered it,
//! even if nobody waits for the answer any more: the callee works on it.

use std::sync::Arc;
use std::time::Instant;

use farcall_transport::planted::{self, Bug};

use crate::call::Slot;

/// How much of one peer's requests may be on the wire.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window {
    pub(crate) requests: usize,
    /// Tensor bytes, unless it is a single request.
    pub(crate) bytes: u64,
}

impl Window {
    /// For calls that take no wire.
    pub(crate) const UNLIMITED: Self = Self { requests: usize::MAX, bytes: u64::MAX };
}

enum Entry {
    Free,
    Waiting {
        slot: Arc<Slot>,
        sent: Option<u64>,
    },
    /// Nobody waits for the answer that is still to come.
    Abandoned {
        sent: u64,
    },
}

/// Whether a request may be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Admission {
    /// It has its place, and must be sent.
    Sent,
    /// There is no place: it must wait.
    Full,
    /// Its call has ended: it must not be sent.
    Over,
}

/// What became of a call that nobody waits for any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Abandoned {
    /// The callee knows of it: it should be told.
    Sent,
    NotSent,
    /// It had ended.
    Over,
}

/// See the module.
pub(crate) struct CallTable {
    window: Window,
    /// Of entries that are new.
    generation: u32,
    entries: Vec<(u32, Entry)>,
    free: Vec<u32>,
    waiting: usize,
    sent: usize,
    sent_bytes: u64,
}

impl CallTable {
    pub(crate) fn new(window: Window) -> Self {
        Self { window, generation: 0, entries: Vec::new(), free: Vec::new(), waiting: 0, sent: 0, sent_bytes: 0 }
    }

    /// Calls that wait for a reply.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting
    }

    /// Calls that take a place, those that nobody waits for included.
    pub(crate) fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    /// Requests on the wire.
    pub(crate) fn sent(&self) -> usize {
        self.sent
    }

    pub(crate) fn insert(&mut self, slot: Arc<Slot>) -> u64 {
        let index = self.free.pop().unwrap_or_else(|| {
            self.entries.push((self.generation, Entry::Free));
            (self.entries.len() - 1) as u32
        });
        let (generation, entry) = &mut self.entries[index as usize];
        *entry = Entry::Waiting { slot, sent: None };
        self.waiting += 1;
        u64::from(*generation) << 32 | u64::from(index)
    }

    /// Takes a place in the window for a request with `bytes` of tensors.
    pub(crate) fn admit(&mut self, call: u64, bytes: u64) -> Admission {
        if !matches!(self.entry(call), Some(Entry::Waiting { sent: None, .. })) {
            return Admission::Over;
        }
        let full = self.sent >= self.window.requests
            || (self.sent > 0 && self.sent_bytes.saturating_add(bytes) > self.window.bytes);
        if full && !planted::has(Bug::WindowIgnored) {
            return Admission::Full;
        }
        if let Some(Entry::Waiting { slot, sent: sent @ None }) = self.entry(call) {
            slot.set_sent();
            *sent = Some(bytes);
            self.sent += 1;
            self.sent_bytes += bytes;
        }
        Admission::Sent
    }

    /// Whether nobody waits for the answer that is still to come.
    pub(crate) fn is_abandoned(&mut self, call: u64) -> bool {
        matches!(self.entry(call), Some(Entry::Abandoned { .. }))
    }

    /// The answer came: the call's place is free. Gives the slot that waits for it, if one does.
    pub(crate) fn settle(&mut self, call: u64) -> Option<Arc<Slot>> {
        match self.entry(call)? {
            Entry::Abandoned { .. } if planted::has(Bug::PlaceKept) => None,
            Entry::Waiting { sent: Some(_), .. } | Entry::Abandoned { .. } => self.remove(call),
            // An answer to what was not asked.
            _ => None,
        }
    }

    /// The slot of a call that waits.
    pub(crate) fn waiting_slot(&mut self, call: u64) -> Option<&Arc<Slot>> {
        match self.entry(call)? {
            Entry::Waiting { slot, .. } => Some(slot),
            _ => None,
        }
    }

    /// Frees the call's place, whether or not it was sent.
    pub(crate) fn remove(&mut self, call: u64) -> Option<Arc<Slot>> {
        let entry = std::mem::replace(self.entry(call)?, Entry::Free);
        let (slot, sent) = match entry {
            Entry::Free => return None,
            Entry::Waiting { slot, sent } => (Some(slot), sent),
            Entry::Abandoned { sent } => (None, Some(sent)),
        };
        self.waiting -= usize::from(slot.is_some());
        if let Some(bytes) = sent {
            self.sent -= 1;
            self.sent_bytes -= bytes;
        }
        let generation = &mut self.entries[call as u32 as usize].0;
        *generation = generation.wrapping_add(1);
        self.free.push(call as u32);
        slot
    }

    /// Nobody waits for the call any more.
    pub(crate) fn abandon(&mut self, call: u64) -> Abandoned {
        match self.entry(call) {
            Some(Entry::Waiting { sent: Some(sent), .. }) => {
                let sent = *sent;
                if let Some(entry) = self.entry(call) {
                    *entry = Entry::Abandoned { sent };
                }
                self.waiting -= 1;
                Abandoned::Sent
            }
            Some(Entry::Waiting { sent: None, .. }) => {
                self.remove(call);
                Abandoned::NotSent
            }
            _ => Abandoned::Over,
        }
    }

    /// Abandons the calls whose deadline has passed; gives the next deadline (C2).
    pub(crate) fn take_overdue(&mut self, now: Instant) -> (Vec<Overdue>, Option<Instant>) {
        let mut overdue = Vec::new();
        let mut next: Option<Instant> = None;
        for index in 0..self.entries.len() {
            let (generation, Entry::Waiting { slot, .. }) = &self.entries[index] else { continue };
            let deadline = slot.deadline;
            if deadline <= now {
                let call = u64::from(*generation) << 32 | index as u64;
                let slot = Arc::clone(slot);
                overdue.push(Overdue { slot, call, abandoned: self.abandon(call) });
            } else {
                next = Some(next.map_or(deadline, |next| next.min(deadline)));
            }
        }
        (overdue, next)
    }

    pub(crate) fn take_all(&mut self) -> Vec<Arc<Slot>> {
        let slots = self.entries.drain(..).filter_map(|(_, entry)| match entry {
            Entry::Waiting { slot, .. } => Some(slot),
            _ => None,
        });
        let slots = slots.collect();
        // What is still on its way to this table must meet no later call.
        let generation = self.generation.wrapping_add(1);
        *self = Self { generation, ..Self::new(self.window) };
        slots
    }

    fn entry(&mut self, call: u64) -> Option<&mut Entry> {
        let (generation, entry) = self.entries.get_mut(call as u32 as usize)?;
        (u64::from(*generation) == call >> 32).then_some(entry)
    }
}

/// A call whose deadline has passed.
pub(crate) struct Overdue {
    pub(crate) slot: Arc<Slot>,
    pub(crate) call: u64,
    pub(crate) abandoned: Abandoned,
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn slot(after: Duration) -> Arc<Slot> {
        Slot::of(&"w1".into(), "f", "()", after, Instant::now())
    }

    fn table(requests: usize, bytes: u64) -> CallTable {
        CallTable::new(Window { requests, bytes })
    }

    fn is_sent(admission: Admission) -> bool {
        admission == Admission::Sent
    }

    const LONG: Duration = Duration::from_secs(5);

    #[test]
    fn a_late_reply_meets_no_later_call() {
        let mut table = table(9, 9);
        let first = table.insert(slot(LONG));
        assert!(is_sent(table.admit(first, 0)) && table.settle(first).is_some());
        let second = table.insert(slot(LONG));
        assert_eq!(first as u32, second as u32, "the index is used again");
        assert!(table.settle(first).is_none());
        assert!(table.settle(u64::MAX).is_none());
        assert!(table.settle(second).is_none(), "an answer to what was not asked");
        assert_eq!((table.len(), table.waiting()), (1, 1));
    }

    /// C2: the overdue ones are taken, the next deadline is that of the earliest left.
    #[test]
    fn overdue_calls_are_taken_and_the_next_deadline_is_known() {
        let mut table = table(9, 9);
        let slots: Vec<_> = [3_u64, 1, 2].map(|secs| slot(Duration::from_secs(secs))).into();
        let calls: Vec<_> = slots.iter().map(|slot| table.insert(Arc::clone(slot))).collect();
        assert!(is_sent(table.admit(calls[1], 5)));
        let (overdue, next) = table.take_overdue(slots[1].deadline);
        assert!(overdue.len() == 1 && Arc::ptr_eq(&overdue[0].slot, &slots[1]));
        assert_eq!((overdue[0].call, overdue[0].abandoned), (calls[1], Abandoned::Sent));
        assert_eq!(next, Some(slots[2].deadline));
        assert_eq!(table.take_all().len(), 2);
        assert_eq!((table.len(), table.waiting(), table.sent, table.sent_bytes), (0, 0, 0, 0));
    }

    /// LIMITS: by number.
    #[test]
    fn an_abandoned_request_keeps_its_place_until_it_is_answered() {
        let mut table = table(2, 100);
        let calls: Vec<_> = (0..3).map(|_| table.insert(slot(LONG))).collect();
        assert_eq!(
            [0, 1, 2].map(|call| table.admit(calls[call], 1)),
            [Admission::Sent, Admission::Sent, Admission::Full]
        );
        assert_eq!(table.abandon(calls[0]), Abandoned::Sent);
        assert_eq!(table.abandon(calls[0]), Abandoned::Over, "once");
        assert_eq!((table.len(), table.waiting()), (3, 2));
        assert_eq!(table.admit(calls[2], 1), Admission::Full, "the callee works on it");
        assert!(table.settle(calls[0]).is_none(), "nobody waits");
        assert!(is_sent(table.admit(calls[2], 1)));
        assert_eq!(table.admit(calls[2], 1), Admission::Over, "once");
        assert_eq!((table.sent, table.sent_bytes), (2, 2));
    }

    /// LIMITS: by bytes, and a request above the limit goes alone.
    #[test]
    fn a_large_request_goes_when_it_is_alone() {
        let mut table = table(9, 100);
        let calls: Vec<_> = (0..3).map(|_| table.insert(slot(LONG))).collect();
        assert!(
            is_sent(table.admit(calls[0], 60))
                && !is_sent(table.admit(calls[1], 1000))
                && is_sent(table.admit(calls[2], 40))
        );
        table.settle(calls[0]);
        assert_eq!(table.admit(calls[1], 1000), Admission::Full);
        table.settle(calls[2]);
        assert!(is_sent(table.admit(calls[1], 1000)));
        assert_eq!(table.abandon(calls[2]), Abandoned::Over);
    }

    #[test]
    fn a_call_that_was_never_sent_leaves_nothing_behind() {
        let mut table = table(1, 100);
        let calls: Vec<_> = (0..2).map(|_| table.insert(slot(LONG))).collect();
        assert!(is_sent(table.admit(calls[0], 0)) && !is_sent(table.admit(calls[1], 0)));
        assert_eq!(table.abandon(calls[1]), Abandoned::NotSent);
        assert_eq!(table.len(), 1);
        table.settle(calls[0]);
        assert_eq!(table.admit(calls[1], 7), Admission::Over);
        assert_eq!((table.sent, table.sent_bytes), (0, 0));
    }
}
