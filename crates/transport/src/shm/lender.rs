//! The slabs that were passed to one peer, and what of them it borrows. Knows no socket.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use farcall_device::{Slab, Storage};

use crate::descriptor::{Lent, Place};
use crate::{Limits, ProtocolError};

/// See the module. It lends nothing before it was told that the peer borrows, and nothing after the end.
#[derive(Default)]
pub(crate) struct Lender {
    lends: bool,
    /// Those that the peer has mapped, as far as we know. Weak: a slab that is unmapped here is retired there.
    slabs: HashMap<u64, (Weak<Slab>, u64)>,
    slab_bytes: u64,
    leases: HashMap<u64, Storage>,
    next_lease: u64,
}

/// A tensor's storage, lent.
pub(crate) struct Loan {
    /// Of the storage's first byte.
    pub(crate) place: Place,
    /// Its slab, if the peer does not have it yet.
    pub(crate) pass: Option<Arc<Slab>>,
}

impl Lender {
    /// The peer takes slabs.
    pub(crate) fn start(&mut self) {
        self.lends = true;
    }

    /// Lends `storage`; `None` if it cannot be: it is in no slab, or the peer has as many as it takes.
    pub(crate) fn lend(&mut self, storage: &Storage, limits: &Limits) -> Option<Loan> {
        let slab = storage.slab().filter(|slab| self.lends && slab.fd().is_ok())?;
        let mut pass = None;
        if !self.slabs.contains_key(&slab.id()) {
            let bytes = self.slab_bytes.saturating_add(slab.len() as u64);
            if self.slabs.len() >= limits.slabs_max || bytes > limits.slab_bytes_max {
                return None;
            }
            self.slab_bytes = bytes;
            self.slabs.insert(slab.id(), (Arc::downgrade(slab), slab.len() as u64));
            pass = Some(Arc::clone(slab));
        }
        self.next_lease += 1;
        self.leases.insert(self.next_lease, storage.clone());
        let place = Place { slab: slab.id(), offset: storage.slab_offset() as u64, lease: self.next_lease };
        Some(Loan { place, pass })
    }

    /// Whether all of these can be lent that lie in slabs that can be shared; may say no although they can.
    pub(crate) fn may_lend_all<'a>(&self, storages: impl Iterator<Item = &'a Storage>, limits: &Limits) -> bool {
        let is_new = |slab: &&Arc<Slab>| slab.fd().is_ok() && !self.slabs.contains_key(&slab.id());
        let (mut slabs, mut bytes) = (self.slabs.len(), self.slab_bytes);
        for slab in storages.filter_map(Storage::slab).filter(is_new) {
            slabs += 1;
            bytes = bytes.saturating_add(slab.len() as u64);
        }
        self.lends && slabs <= limits.slabs_max && bytes <= limits.slab_bytes_max
    }

    /// What the peer has borrowed, and now sends back: its storage, and where in it `len` bytes start.
    ///
    /// # Errors
    /// [`ProtocolError::Lease`] if it is not out, or has not landed there; [`ProtocolError::OutsideSlab`] for bytes outside of the
    /// storage.
    pub(crate) fn sent_back(&self, lent: Lent, len: u64) -> Result<(Storage, u64), ProtocolError> {
        let Lent { lease, offset } = lent;
        let storage = self.leases.get(&lease).filter(|storage| matches!(storage.is_ready(), Ok(true)));
        let storage = storage.ok_or(ProtocolError::Lease { lease })?;
        let start = offset.checked_sub(storage.slab_offset() as u64);
        let within = start.filter(|start| start.checked_add(len).is_some_and(|end| end <= storage.len() as u64));
        let slab = storage.slab_id().unwrap_or_default();
        let outside = ProtocolError::OutsideSlab { slab, offset, len, slab_bytes: storage.len() as u64 };
        // Of its own: who receives it and is alone with it may write a private view, as of any that is received.
        Ok((storage.again(), within.ok_or(outside)?))
    }

    /// A lease that was returned: its storage, to be dropped without locks.
    ///
    /// # Errors
    /// [`ProtocolError::Lease`] if it is not out.
    pub(crate) fn take_back(&mut self, lease: u64) -> Result<Storage, ProtocolError> {
        self.leases.remove(&lease).ok_or(ProtocolError::Lease { lease })
    }

    /// Leases that are out.
    pub(crate) fn leases(&self) -> usize {
        self.leases.len()
    }

    /// The slabs that were unmapped here since the last call: the peer is to be told.
    pub(crate) fn take_retired(&mut self) -> Vec<u64> {
        let gone = self.slabs.extract_if(|_, (slab, _)| slab.strong_count() == 0);
        let gone: Vec<_> = gone.collect();
        for (_, (_, bytes)) in &gone {
            self.slab_bytes -= bytes;
        }
        gone.into_iter().map(|(id, _)| id).collect()
    }

    /// Ends all leases. If the peer `may_live`, nobody here ever writes what it has borrowed (L1).
    pub(crate) fn end(&mut self, may_live: bool) -> Vec<Storage> {
        self.lends = false;
        self.slabs.clear();
        let ended: Vec<_> = self.leases.drain().map(|(_, storage)| storage).collect();
        if may_live {
            ended.iter().for_each(Storage::abandon);
        }
        ended
    }
}

#[cfg(test)]
mod tests {
    use farcall_device::{Config, Runtime};

    use super::*;

    fn lender() -> Lender {
        let mut lender = Lender::default();
        lender.start();
        lender
    }

    fn runtime() -> Runtime {
        Runtime::new(Config::default()).expect("a runtime")
    }

    fn storage(runtime: &Runtime, len: usize) -> Storage {
        runtime.alloc_host(len).expect("memory").freeze_ready()
    }

    #[test]
    fn l1_what_is_lent_is_not_written_before_it_is_returned() {
        let (mut lender, runtime) = (lender(), runtime());
        let lent = storage(&runtime, 5000);
        let loan = lender.lend(&lent, &Limits::default()).expect("in a slab");
        assert_eq!((Some(loan.place.slab), loan.place.offset), (lent.slab_id(), lent.slab_offset() as u64));
        assert!(loan.pass.is_some());
        let lent = lent.try_unique().expect_err("it is lent");
        drop(lent);
        assert_eq!(runtime.stats().live_bytes, 5120, "nor handed out again");
        drop(lender.take_back(loan.place.lease).expect("it is out"));
        assert_eq!((lender.leases(), runtime.stats().live_bytes), (0, 0));
        let again = lender.take_back(loan.place.lease).expect_err("it was returned");
        assert_eq!(again, ProtocolError::Lease { lease: loan.place.lease });
    }

    #[test]
    fn what_is_sent_back_is_found_by_its_lease_and_nothing_else_is() {
        let (mut lender, runtime) = (lender(), runtime());
        let [first, second] = [5000, 6000].map(|len| storage(&runtime, len));
        let [loan, _] = [&first, &second].map(|lent| lender.lend(lent, &Limits::default()).expect("in a slab"));
        let back = |offset, len| lender.sent_back(Lent { lease: loan.place.lease, offset }, len);
        let start = loan.place.offset;
        let (found, at) = back(start + 8, 4992).expect("it is out");
        assert!(found.as_ptr() == first.as_ptr() && at == 8);
        for (offset, len) in
            [(start + 8, 4993), (start, 5001), (start.wrapping_sub(1), 8), (u64::MAX, 8), (start, u64::MAX)]
        {
            assert!(matches!(back(offset, len), Err(ProtocolError::OutsideSlab { .. })), "{offset}, {len}");
        }
        let unknown = lender.sent_back(Lent { lease: 99, offset: start }, 8).expect_err("never lent");
        assert_eq!(unknown, ProtocolError::Lease { lease: 99 });
        drop(lender.take_back(loan.place.lease));
        assert!(lender.sent_back(Lent { lease: loan.place.lease, offset: start }, 8).is_err(), "it was returned");
    }

    #[test]
    fn l1_at_the_end_memory_is_recycled_if_the_borrower_is_dead_and_given_up_if_not() {
        for may_live in [false, true] {
            let (mut lender, runtime) = (lender(), runtime());
            let lent = storage(&runtime, 5000);
            let slab = lent.slab_id();
            assert!(lender.lend(&lent, &Limits::default()).is_some());
            drop(lent);
            drop(lender.end(may_live));
            assert_eq!(storage(&runtime, 5000).slab_id() == slab, !may_live);
            assert!(lender.lend(&storage(&runtime, 5000), &Limits::default()).is_none(), "it has ended");
        }
    }

    #[test]
    fn a_slab_is_passed_once_and_retired_when_it_is_unmapped() {
        let (mut lender, runtime) = (lender(), runtime());
        let [first, second] = [5000; 2].map(|len| storage(&runtime, len));
        let [loan, other] = [&first, &second].map(|lent| lender.lend(lent, &Limits::default()).expect("in a slab"));
        assert_eq!((loan.pass.is_some(), other.pass.is_some(), loan.place.slab), (true, false, other.place.slab));
        drop((loan.pass, first, second));
        assert_eq!(lender.take_retired(), []);
        for lease in [loan.place.lease, other.place.lease] {
            drop(lender.take_back(lease));
        }
        runtime.trim();
        assert_eq!(lender.take_retired(), [loan.place.slab]);
        assert_eq!((lender.take_retired(), lender.slab_bytes), (vec![], 0));
    }

    /// Slabs of one frame count together: what is refused is copied before the frame is made.
    #[test]
    fn limits_whether_all_of_a_frame_can_be_lent_is_known_before() {
        let runtime = runtime();
        let [first, second] = [40 << 20, 33 << 20].map(|len| storage(&runtime, len));
        for (slabs_max, slab_bytes_max, expected) in
            [(2, 1 << 30, true), (1, 1 << 30, false), (2, 60 << 20, false), (0, 1 << 30, false)]
        {
            let limits = Limits { slabs_max, slab_bytes_max, ..Limits::default() };
            let all = [&first, &second];
            assert_eq!(lender().may_lend_all(all.into_iter(), &limits), expected);
            assert!(!Lender::default().may_lend_all(all.into_iter(), &limits), "the peer takes none");
            let mut lender = lender();
            let lent = all.map(|storage| lender.lend(storage, &limits).is_some());
            assert_eq!(lent.into_iter().all(|lent| lent), expected);
            assert!(!expected || lender.may_lend_all(all.into_iter(), &limits), "slabs that it has");
        }
    }

    /// Its bytes are being written: nobody is given them by way of the peer.
    #[test]
    fn what_has_not_landed_is_not_taken_back() {
        let (mut lender, runtime) = (lender(), runtime());
        let (written, event) = farcall_device::Event::token(&runtime);
        let lent = runtime.alloc_host(5000).expect("memory").freeze_at(event);
        let place = lender.lend(&lent, &Limits::default()).expect("in a slab").place;
        let back = Lent { lease: place.lease, offset: place.offset };
        assert_eq!(lender.sent_back(back, 8).expect_err("it lands"), ProtocolError::Lease { lease: place.lease });
        written.complete();
        assert!(lender.sent_back(back, 8).is_ok());
    }

    /// "Few large slabs": the descriptors and mappings that tensors cost a peer.
    #[test]
    fn tensors_of_a_few_mib_are_lent_in_one_slab() {
        let (mut lender, runtime) = (lender(), runtime());
        let few = Limits { slabs_max: 1, ..Limits::default() };
        for mib in [2, 3, 2, 5] {
            assert!(lender.lend(&storage(&runtime, mib << 20), &few).is_some(), "{mib} MiB");
        }
        assert_eq!((lender.slabs.len(), lender.leases()), (1, 4));
    }

    #[test]
    fn limits_beyond_what_the_peer_maps_nothing_is_lent() {
        let runtime = runtime();
        // Each is a slab of its own.
        let [large, other] = [80, 96].map(|mib| storage(&runtime, mib << 20));
        let few = Limits { slabs_max: 1, ..Limits::default() };
        let small = Limits { slab_bytes_max: 80 << 20, ..Limits::default() };
        for limits in [few, small] {
            let mut lender = lender();
            assert!(lender.lend(&large, &limits).is_some());
            assert!(lender.lend(&other, &limits).is_none(), "another slab");
            assert!(lender.lend(&large, &limits).is_some(), "a slab that it has");
        }
        assert!(Lender::default().lend(&large, &Limits::default()).is_none(), "the peer takes none");
    }
}
