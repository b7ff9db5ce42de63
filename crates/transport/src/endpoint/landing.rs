//! Foreign tensors on their way into slabs: the frame goes first, then the bytes are copied, and the peer is told as they land.
//!
//! So the peer has woken and read the frame when the last byte lands: a peer that sleeps is woken so long before that as waking takes.
//! What is told on the way may be left out where the ring is busy: each says how far it is in all.
//! Invariant SNAPSHOT: who sends has copied everything before it returns.

use std::sync::Arc;

use farcall_device::{DeviceError, SlabCopy, Tensor};

use super::{Endpoint, Outbound, Status, Tx, lock};
use crate::descriptor::Place;
use crate::frame::{Header, Kind};
use crate::shm::{LANDED_BYTES_MIN, LENT_BYTES_MIN};
use crate::{CloseCause, Spin};

/// A peer that sleeps is woken when so many bytes are left to be copied: that takes about as long as to wake. Where nobody looks for
/// work it would only sleep again.
const AHEAD_BYTES: usize = 512 << 10;

/// A tensor of a frame that is copied once the frame is sent.
pub(super) struct Landing {
    pub(super) copy: SlabCopy,
    /// Where it is lent; `None` until it is, or if it cannot be.
    pub(super) place: Option<Place>,
}

/// By tensor of a frame, those that land.
pub(super) type Landings = Vec<Option<Landing>>;

/// Whether a tensor's bytes must be copied to be lent.
pub(super) fn is_foreign(tensor: &Tensor) -> bool {
    tensor.layout().byte_span().len() as u64 >= LENT_BYTES_MIN
        && tensor.storage().slab().is_none_or(|slab| slab.fd().is_err())
}

/// How much of a tensor has landed, and whom that is to wake.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Told {
    /// A part: nobody.
    IfAwake,
    /// A part: the peer, so that it is awake for the rest.
    Awake,
    All,
}

/// Bytes that are to be copied, of tensors that are lent.
fn bytes(landings: &Landings) -> usize {
    let lent = landings.iter().flatten().filter(|landing| landing.place.is_some());
    lent.map(|landing| landing.copy.copy().layout().byte_span().len()).sum()
}

impl Endpoint {
    /// Memory for the tensors of `outbound` that are to land at the peer; none if none do.
    pub(super) fn begin_landings(&self, outbound: &Outbound<'_>) -> Result<Landings, DeviceError> {
        if !outbound.lands || !self.lends() {
            return Ok(Vec::new());
        }
        let runtime = &self.driver.config().runtime;
        let begin = |tensor: &Tensor| {
            let lands = is_foreign(tensor) && !self.is_peers(tensor);
            let copy = if lands { runtime.begin_slab_copy(tensor)? } else { None };
            Ok(copy.map(|copy| Landing { copy, place: None }))
        };
        outbound.tensors.iter().map(begin).collect()
    }

    /// Whether the peer may map too little for all of these tensors; to be asked with `tx` held, as nothing else is lent meanwhile.
    pub(super) fn may_refuse(&self, outbound: &Outbound<'_>, landings: &Landings) -> bool {
        if landings.is_empty() {
            return false;
        }
        let is_shared = |landing: &Landing| landing.copy.copy().storage().slab().is_some_and(|slab| slab.fd().is_ok());
        if !landings.iter().flatten().all(is_shared) {
            // Without descriptors, memory is this process's alone.
            return true;
        }
        let storages = outbound.tensors.iter().zip(landings).map(|(tensor, landing)| {
            landing.as_ref().map_or(tensor.storage(), |landing| landing.copy.copy().storage())
        });
        !lock(&self.lender).may_lend_all(storages, &self.driver.config().limits)
    }

    /// How many bytes before the end the peer is woken.
    fn ahead_bytes(&self) -> usize {
        if self.driver.config().spin == Spin::Off { 0 } else { AHEAD_BYTES }
    }

    /// Whether the frame of these need not wake its reader, as what tells of them will.
    pub(super) fn wakes_later(&self, landings: &Landings) -> bool {
        bytes(landings) > self.ahead_bytes()
    }

    /// Copies what the peer was told of.
    pub(super) fn land(self: &Arc<Self>, landings: Landings) {
        let every = self.driver.config().limits.chunk_bytes_max as usize;
        let ahead = self.ahead_bytes();
        let mut left = bytes(&landings);
        let mut sleeps = left > ahead && ahead > 0;
        for Landing { copy, place } in landings.into_iter().flatten() {
            let Some(Place { lease, .. }) = place.filter(|_| self.cause.get().is_none()) else { continue };
            let len = copy.copy().layout().byte_span().len();
            let mut told = 0;
            let landed = copy.run(every.min(AHEAD_BYTES / 2), |bytes| {
                let wakes = sleeps && left - bytes <= ahead;
                if wakes || bytes - told >= every {
                    self.tell_landed(lease, bytes, if wakes { Told::Awake } else { Told::IfAwake });
                    (told, sleeps) = (bytes, sleeps && !wakes);
                }
            });
            left -= len;
            match landed {
                Ok(()) => self.tell_landed(lease, len, Told::All),
                // It was readable when the frame was made.
                Err(error) => self.close(CloseCause::Device(error)),
            }
        }
    }

    /// So much of the tensor under that lease is there.
    fn tell_landed(self: &Arc<Self>, lease: u64, bytes: usize, told: Told) {
        let mut tx = lock(&self.tx);
        if self.cause.get().is_some() {
            return;
        }
        let header = Header { call: lease, offset: bytes as u64, ..Header::new(Kind::Landed) };
        let told = self.tell_in_ring(&mut tx, &header, told != Told::IfAwake).and_then(|done| {
            if done || told != Told::All {
                return Ok(());
            }
            tx.wire.extend_from_slice(header.as_bytes());
            // Else it leaves behind the welcome.
            if self.status() == Status::Open { self.write_control(&mut tx) } else { Ok(()) }
        });
        drop(tx);
        if let Err(cause) = told {
            self.close(cause);
        }
    }

    /// A frame of nothing but its header straight to the ring, if nothing waits before it.
    fn tell_in_ring(&self, tx: &mut Tx, header: &Header, wake: bool) -> Result<bool, CloseCause> {
        let Tx { wire, taken, ring: Some((from, ring)), passing, .. } = tx else { return Ok(false) };
        if !wire.is_empty() || !passing.is_empty() || *taken < *from || !ring.stage([header.as_bytes(), &[]])? {
            return Ok(false);
        }
        *taken += header.as_bytes().len() as u64;
        if wake {
            self.wake_reader(ring);
        } else {
            ring.show();
        }
        Ok(true)
    }
}

/// The tensors, those that were to land and may change copied now: the peer maps no more.
pub(super) fn copied(tensors: &[Tensor], landings: Landings) -> Result<Vec<Tensor>, DeviceError> {
    let copied = |(tensor, landing): (&Tensor, Option<Landing>)| match landing {
        Some(Landing { copy, .. }) if copy.source().storage().may_change() => {
            let copied = copy.copy().clone();
            copy.run(usize::MAX, |_| {}).map(|()| copied)
        }
        _ => Ok(tensor.clone()),
    };
    tensors.iter().zip(landings).map(copied).collect()
}

/// Whether `tensor` is better copied once its frame is sent than before.
pub(super) fn may_land(tensor: &Tensor) -> bool {
    is_foreign(tensor) && tensor.layout().byte_span().len() as u64 >= LANDED_BYTES_MIN
}
