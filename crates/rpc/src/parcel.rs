//! A request's arguments, made fit for the wire: those of one call, or of several that send the same.
//!
//! Invariant: what several workers get is copied to the host, packed and moved into slabs once, and encoded once; each call has
//! only its own list of devices, as maps differ.

use std::ops::Deref;
use std::sync::Arc;

use farcall_device::{Device, DeviceError, Encoded, Fences, Runtime};
use farcall_transport::{Staged, stage};

/// See the module. Fit to be sent once `pending` has passed.
pub(crate) struct Parcel {
    pub(crate) contents: Contents,
    /// The device that each tensor is from; empty if all are from the host.
    pub(crate) devices: Vec<Device>,
    pub(crate) pending: Fences,
}

/// Metadata, and tensors as [`stage`] makes them.
pub(crate) enum Contents {
    Own(Encoded),
    Shared(Arc<Encoded>),
}

impl Deref for Contents {
    type Target = Encoded;

    fn deref(&self) -> &Encoded {
        match self {
            Self::Own(encoded) => encoded,
            Self::Shared(encoded) => encoded,
        }
    }
}

impl Parcel {
    /// For one call; `slabs` as of [`stage`].
    ///
    /// # Errors
    /// Those of [`stage`].
    pub(crate) fn new(runtime: &Runtime, encoded: Encoded, slabs: bool) -> Result<Self, DeviceError> {
        let Encoded { metadata, tensors } = encoded;
        let Staged { tensors, devices, pending } = stage(runtime, tensors, slabs)?;
        Ok(Self { contents: Contents::Own(Encoded { metadata, tensors }), devices, pending })
    }
}

/// What several calls send.
pub(crate) struct SharedParcel {
    contents: Arc<Encoded>,
    devices: Vec<Device>,
}

impl SharedParcel {
    /// As [`Parcel::new`], with `slabs` if any of the calls' peers takes them: the others read the same bytes there.
    ///
    /// # Errors
    /// Those of [`stage`].
    pub(crate) fn new(runtime: &Runtime, encoded: Encoded, slabs: bool) -> Result<Self, DeviceError> {
        let Encoded { metadata, tensors } = encoded;
        let Staged { tensors, devices, .. } = stage(runtime, tensors, slabs)?;
        Ok(Self { contents: Arc::new(Encoded { metadata, tensors }), devices })
    }

    /// One call's.
    pub(crate) fn parcel(&self) -> Parcel {
        let pending = Fences::of(&self.contents.tensors);
        Parcel { contents: Contents::Shared(Arc::clone(&self.contents)), devices: self.devices.clone(), pending }
    }
}
