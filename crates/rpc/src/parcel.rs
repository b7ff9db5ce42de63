//! A request's arguments, made fit for the wire: those of one call, or of several that send the same.
//!
//! Invariant: what several workers get is copied to the host, packed and moved into slabs once, and encoded once; each call has
//! only its own list of devices, as maps differ.

use std::ops::Deref;
use std::sync::{Arc, OnceLock};

use farcall_device::{Device, DeviceError, Encoded, Fences, Runtime, Tensor};
use farcall_transport::{DigestList, Endpoint, Staged, digests, stage};

/// See the module. Fit to be sent once `pending` has passed.
pub(crate) struct Parcel {
    pub(crate) contents: Contents,
    /// The device that each tensor is from; empty if all are from the host.
    pub(crate) devices: Vec<Device>,
    /// As of [`Staged`].
    pub(crate) lands: bool,
    pub(crate) pending: Fences,
}

/// Metadata, and tensors as [`stage`] makes them.
pub(crate) enum Contents {
    Own(Packed),
    Shared(Arc<Packed>),
}

/// What is sent, and the digests of its tensors once they were asked for.
pub(crate) struct Packed {
    pub(crate) encoded: Encoded,
    digests: OnceLock<Vec<DigestList>>,
}

impl Packed {
    fn new(encoded: Encoded) -> Self {
        Self { encoded, digests: OnceLock::new() }
    }

    /// Made once, of tensors that are ready.
    pub(crate) fn digests(&self) -> Result<&[DigestList], DeviceError> {
        if let Some(known) = self.digests.get() {
            return Ok(known);
        }
        let made = digests(&self.encoded.tensors)?;
        Ok(self.digests.get_or_init(|| made))
    }
}

impl Contents {
    /// Of one call.
    pub(crate) fn own(encoded: Encoded) -> Self {
        Self::Own(Packed::new(encoded))
    }

    /// It was sent: this thread's next call has its buffers.
    pub(crate) fn recycle(self) {
        if let Self::Own(Packed { encoded, .. }) = self {
            encoded.recycle();
        }
    }

    /// Whether the owner of a tensor may write it before it is sent; what several calls send was copied.
    pub(crate) fn may_change(&self) -> bool {
        matches!(self, Self::Own(packed) if packed.encoded.tensors.iter().any(|tensor| tensor.storage().may_change()))
    }

    /// Copies those.
    pub(crate) fn snapshot(&mut self, endpoint: &Endpoint) -> Result<(), DeviceError> {
        if let Self::Own(packed) = self {
            snapshot(&endpoint.driver().config().runtime, &mut packed.encoded.tensors)?;
        }
        Ok(())
    }
}

impl Deref for Contents {
    type Target = Packed;

    fn deref(&self) -> &Packed {
        match self {
            Self::Own(packed) => packed,
            Self::Shared(packed) => packed,
        }
    }
}

impl Parcel {
    /// For one call; `lands` if it may be sent at once, before its foreign tensors are copied.
    ///
    /// # Errors
    /// Those of [`stage`].
    pub(crate) fn new(endpoint: &Endpoint, encoded: Encoded, lands: bool) -> Result<Self, DeviceError> {
        let Encoded { metadata, tensors } = encoded;
        let config = endpoint.driver().config();
        let (runtime, inline) = (&config.runtime, config.limits.inline_bytes_max);
        let Staged { tensors, devices, lands, pending } =
            stage(runtime, tensors, endpoint.lends(), lands, inline, |tensor| endpoint.is_peers(tensor))?;
        Ok(Self { contents: Contents::own(Encoded { metadata, tensors }), devices, lands, pending })
    }
}

/// Copies what may change after the call.
pub(crate) fn snapshot(runtime: &Runtime, tensors: &mut [Tensor]) -> Result<(), DeviceError> {
    for tensor in tensors {
        if tensor.storage().may_change() {
            *tensor = runtime.snapshot(tensor)?;
        }
    }
    Ok(())
}

/// What several calls send.
pub(crate) struct SharedParcel {
    contents: Arc<Packed>,
    devices: Vec<Device>,
}

impl SharedParcel {
    /// As [`Parcel::new`], with `slabs` if any of the calls' peers takes them: the others read the same bytes there.
    ///
    /// # Errors
    /// Those of [`stage`].
    pub(crate) fn new(runtime: &Runtime, encoded: Encoded, slabs: bool) -> Result<Self, DeviceError> {
        let Encoded { metadata, tensors } = encoded;
        // Some may wait for a place.
        let Staged { tensors, devices, .. } = stage(runtime, tensors, slabs, false, 0, |_| false)?;
        Ok(Self { contents: Arc::new(Packed::new(Encoded { metadata, tensors })), devices })
    }

    /// One call's.
    pub(crate) fn parcel(&self) -> Parcel {
        let pending = Fences::of(&self.contents.encoded.tensors);
        Parcel {
            contents: Contents::Shared(Arc::clone(&self.contents)),
            devices: self.devices.clone(),
            lands: false,
            pending,
        }
    }
}
