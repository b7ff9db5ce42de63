//! What is sent: tensors made fit for the wire, frames, and greetings.

use farcall_device::{Device, DeviceError, Fences, Runtime, Storage, Tensor};
use std::cell::Cell;
use std::io::IoSlice;

use super::landing::{self, is_foreign};
use super::lost;
use crate::descriptor::{Descriptor, Lent, Mode, Place};
use crate::digest::DigestList;
use crate::frame::{HEADER_BYTES, Header, Kind, WANTS_DIGESTS};
use crate::shm::LENT_BYTES_MIN;
use crate::socket::Socket;
use crate::tcp::Progress;
use crate::{CloseCause, ProtocolError};

/// A frame to send. Tensors are read when it is sent; storages stay owned until their bytes are gone.
#[derive(Clone, Copy, Debug)]
pub struct Outbound<'a> {
    /// What it is for.
    pub kind: Kind,
    /// The call it belongs to.
    pub call: u64,
    /// The interned function.
    pub function: u32,
    /// Microseconds the caller still waits, 0 for no limit.
    pub deadline_us: u64,
    /// The encoded value without its tensors.
    pub metadata: &'a [u8],
    /// The tensors: on the host, complete, dense or broadcast, as [`stage`] makes them.
    pub tensors: &'a [Tensor],
    /// The device that each tensor is for at the target; empty for the host.
    pub devices: &'a [Device],
    /// Digests of each tensor; of a request, digests of the answer are asked for, too.
    pub digests: Option<&'a [DigestList]>,
    /// Some of the tensors are foreign: where they are lent they are copied once the frame is sent, and before this call ends.
    pub lands: bool,
}

impl<'a> Outbound<'a> {
    /// A frame without call, function, deadline or tensors.
    pub fn new(kind: Kind, metadata: &'a [u8]) -> Self {
        Self {
            kind,
            call: 0,
            function: 0,
            deadline_us: 0,
            metadata,
            tensors: &[],
            devices: &[],
            digests: None,
            lands: false,
        }
    }
}

/// Tensors as [`Outbound`] takes them, once `pending` has passed.
#[derive(Debug)]
pub struct Staged {
    /// On the host, dense or broadcast.
    pub tensors: Vec<Tensor>,
    /// Where each came from; empty if all were on the host.
    pub devices: Vec<Device>,
    /// As of [`Outbound`]: some are foreign still.
    pub lands: bool,
    /// The fences to wait for before they are sent (FENCE).
    pub pending: Fences,
}

/// Brings tensors into the form that the wire takes: those of devices are copied to the host, those with gaps packed, on
/// streams behind their writes. Nothing is waited for. With `slabs`, memory that is in none is copied into one, here and now, unless
/// it `is_targets`, or large and all may be sent at once (`lands`). SNAPSHOT: so is what its owner may write once the call was made, if
/// it is read after that: all that waits, or has no room among `inline_bytes_max` in the frame.
///
/// # Errors
/// [`DeviceError`] of a device or of memory.
pub fn stage(
    runtime: &Runtime,
    mut tensors: Vec<Tensor>,
    slabs: bool,
    lands: bool,
    inline_bytes_max: u64,
    is_targets: impl Fn(&Tensor) -> bool,
) -> Result<Staged, DeviceError> {
    let mut devices = Vec::new();
    if tensors.iter().any(|tensor| tensor.device() != Device::HOST) {
        devices.extend(tensors.iter().map(Tensor::device));
    }
    for tensor in &mut tensors {
        if tensor.storage().may_change() && !tensor.layout().is_dense_or_broadcast() {
            // A stream would read it later.
            *tensor = runtime.snapshot(tensor)?;
        }
        let fits = tensor.is_contiguous() || tensor.layout().is_dense_or_broadcast();
        if tensor.device() != Device::HOST || !fits {
            *tensor = runtime.stream(tensor.device())?.pack(tensor, Device::HOST)?;
        }
    }
    let mut pending = Fences::of(&tensors);
    let may_land = lands && slabs && pending.is_empty();
    let mut lands = false;
    // Also of what can be lent: it may be refused.
    let bytes: u64 = tensors.iter().map(|tensor| tensor.layout().byte_span().len() as u64).sum();
    let is_read_later = !pending.is_empty() || bytes > inline_bytes_max;
    for tensor in &mut tensors {
        let is_lent = slabs && is_foreign(tensor) && !is_targets(tensor);
        if is_lent && may_land && landing::may_land(tensor) {
            lands = true;
        } else if is_lent {
            *tensor = runtime.in_slab(tensor)?;
        } else if is_read_later {
            *tensor = runtime.snapshot(tensor)?;
        }
    }
    if !pending.is_empty() {
        pending = Fences::of(&tensors);
    }
    Ok(Staged { tensors, devices, lands, pending })
}

thread_local! {
    /// Which tensors of a frame travel in it.
    static INLINE: Cell<Vec<usize>> = const { Cell::new(Vec::new()) };
}

/// Appends `outbound` to `wire` and gives the tensors that travel on the bulk connection, with their transfer ids. `lend` gives
/// the place of a storage's first byte in a slab that the peer has, or will have before this frame, says that the peer has lent it, or
/// where the tensor will land.
pub(crate) fn encode_frame(
    outbound: &Outbound<'_>,
    inline_bytes_max: u64,
    next_transfer: &mut u64,
    wire: &mut Vec<u8>,
    mut lend: impl FnMut(usize, &Storage) -> Option<Mode>,
) -> Result<Vec<(u64, Tensor)>, DeviceError> {
    // Unreadable tensors fail their own call, here; later they would end the connection, and leases be out for nothing.
    for tensor in outbound.tensors {
        payload(tensor)?;
    }
    let start = wire.len();
    let mut header = Header {
        call: outbound.call,
        function: outbound.function,
        deadline_us: outbound.deadline_us,
        meta_len: outbound.metadata.len() as u32,
        tensors: outbound.tensors.len() as u16,
        flags: if outbound.kind == Kind::Request && outbound.digests.is_some() { WANTS_DIGESTS } else { 0 },
        ..Header::new(outbound.kind)
    };
    wire.extend_from_slice(header.as_bytes());
    let mut bulk = Vec::new();
    // A thread that ends has none.
    let mut inline = INLINE.try_with(Cell::take).unwrap_or_default();
    inline.clear();
    for (index, tensor) in outbound.tensors.iter().enumerate() {
        debug_assert!(tensor.layout().is_dense_or_broadcast(), "sent without `stage`: {tensor:?}");
        let device = outbound.devices.get(index).copied().unwrap_or(Device::HOST);
        let mut descriptor = Descriptor::of(tensor, device, Mode::Inline);
        descriptor.digests = outbound.digests.and_then(|digests| digests.get(index).cloned());
        let start = tensor.layout().byte_span().start as u64;
        let mut lent = if descriptor.len_bytes < LENT_BYTES_MIN { None } else { lend(index, tensor.storage()) };
        if let Some(Mode::Slab(Place { offset, .. }) | Mode::Back(Lent { offset, .. })) = &mut lent {
            *offset += start;
        }
        // In its lender's storage it must begin at an element.
        // What lands has only its own bytes, from the first on.
        let lent = lent.filter(|mode| match mode {
            Mode::Back(lent) => lent.offset.is_multiple_of(tensor.dtype().size_bytes() as u64),
            _ => true,
        });
        if let Some(mode) = lent {
            descriptor.mode = mode;
        } else if header.payload_len + descriptor.len_bytes <= inline_bytes_max {
            header.payload_len += descriptor.len_bytes;
            inline.push(index);
        } else {
            descriptor.mode = Mode::Bulk(*next_transfer);
            bulk.push((*next_transfer, tensor.clone()));
            *next_transfer += 1;
        }
        descriptor.write(wire);
    }
    header.table_len = (wire.len() - start - HEADER_BYTES) as u32;
    wire[start..start + HEADER_BYTES].copy_from_slice(header.as_bytes());
    wire.extend_from_slice(outbound.metadata);
    for index in &inline {
        wire.extend_from_slice(payload(&outbound.tensors[*index])?);
    }
    let _ = INLINE.try_with(|spare| spare.set(inline));
    Ok(bulk)
}

/// The bytes of a dense or broadcast tensor, without the rest of its storage.
///
/// # Errors
/// [`DeviceError::NotReady`], [`DeviceError::NotHost`].
pub(crate) fn payload(tensor: &Tensor) -> Result<&[u8], DeviceError> {
    Ok(&tensor.storage().as_bytes()?[tensor.layout().byte_span()])
}

/// Metadata of a greeting.
pub(crate) fn encoded<T: serde::Serialize>(value: &T) -> Vec<u8> {
    match postcard::to_stdvec(value) {
        Ok(metadata) => metadata,
        Err(error) => unreachable!("plain structs always encode: {error}"),
    }
}

/// A frame of the greeting, or of the end: nothing but metadata.
pub(crate) fn greeting(kind: Kind, metadata: &[u8]) -> Vec<u8> {
    let mut wire = Vec::new();
    match encode_frame(&Outbound::new(kind, metadata), 0, &mut 0, &mut wire, |_, _| None) {
        Ok(_) => wire,
        Err(error) => unreachable!("a frame without tensors encodes: {error}"),
    }
}

pub(crate) fn read_greeting<'a, T: serde::Deserialize<'a>>(
    what: &'static str,
    metadata: &'a [u8],
) -> Result<T, ProtocolError> {
    postcard::from_bytes(metadata).map_err(|error| ProtocolError::Malformed { what, message: error.to_string() })
}

/// Writes a greeting whole: a few hundred bytes into an empty socket buffer always fit.
pub(crate) fn write_greeting(socket: &Socket, bytes: &[u8]) -> Result<(), CloseCause> {
    match socket.send(&[IoSlice::new(bytes)]).map_err(lost)? {
        Progress::Bytes(len) if len == bytes.len() => Ok(()),
        _ => Err(CloseCause::PeerLost { source: None }),
    }
}
