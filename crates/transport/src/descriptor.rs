//! Tensor descriptors: what a target must know to place a tensor before its bytes arrive.
//!
//! Invariant LIMITS: rank, arithmetic and byte counts are checked before any allocation.
//! Invariant W1: 48 bytes plus `rank` × i64 shape, plus `rank` × i64 strides when flagged; golden vectors below.
//!
//! ```text
//!  0 dtype u8   1 rank u8   2 mode u8 (0 inline, 1 bulk, 2 slab, 3 back, 4 landing)   3 flags u8 (bit 0: strides follow; bit 1: digests follow)
//!  4 device kind u8   5 zero u8   6 device index u16
//!  8 transfer u64   bulk: the id its chunks carry; slab, landing: the lease, which its release names; back: the lease of the target
//! 16 offset   u64   slab, landing, back: where in the slab the bytes start; else 0
//! 24 len      u64   bytes that travel
//! 32 slab     u64   slab, landing: its id, never 0 and never used for another; else 0
//! 40 digest   u64   with digests: XXH3-64 of their list; else 0
//! ```
//! Digests, if both sides have them, come last: XXH3-64 of each 64 KiB of the bytes that travel, a u64 each; see `digest`.

use bytemuck::{Pod, Zeroable};
use farcall_device::{DType, Device, Layout, MAX_RANK, Tensor};

use crate::digest::{self, DigestList};
use crate::frame::limit;
use crate::{Limits, ProtocolError};

const FIXED_BYTES: usize = 48;
const HAS_STRIDES: u8 = 1;
const HAS_DIGESTS: u8 = 2;
const FLAGS_AT: usize = 3;
/// The smallest descriptor: a scalar's.
pub(crate) const MIN_BYTES: u64 = FIXED_BYTES as u64;
/// The largest descriptor: every dimension with its stride.
pub(crate) const MAX_BYTES: u64 = (FIXED_BYTES + MAX_RANK * 16) as u64;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Fixed {
    dtype: u8,
    rank: u8,
    mode: u8,
    flags: u8,
    device_kind: u8,
    zero: u8,
    device_index: u16,
    transfer: u64,
    offset: u64,
    len: u64,
    slab: u64,
    digest: u64,
}

/// How a tensor's bytes reach the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Behind the metadata, in the frame itself.
    Inline,
    /// In chunks on the bulk connection, under this transfer id.
    Bulk(u64),
    /// Not at all: they lie in a slab that the target has mapped.
    Slab(Place),
    /// The same once they are there, which `Landed` frames tell.
    Landing(Place),
    /// Not at all: the target itself has lent them.
    Back(Lent),
}

/// Bytes of a tensor that was lent to this side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lent {
    pub(crate) lease: u64,
    /// From the start of the lender's slab on.
    pub(crate) offset: u64,
}

/// Where in a slab a tensor lies, and under which lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) slab: u64,
    pub(crate) offset: u64,
    pub(crate) lease: u64,
}

/// One tensor of a frame: its placement, and the bytes it will need.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Descriptor {
    pub(crate) layout: Layout,
    pub(crate) device: Device,
    pub(crate) mode: Mode,
    pub(crate) len_bytes: u64,
    pub(crate) digests: Option<DigestList>,
}

impl Descriptor {
    /// Describes `tensor`, whose layout must be dense or broadcast, for `device` at the target.
    pub(crate) fn of(tensor: &Tensor, device: Device, mode: Mode) -> Self {
        let span = tensor.layout().byte_span();
        Self { layout: tensor.layout().clone(), device, mode, len_bytes: (span.end - span.start) as u64, digests: None }
    }

    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        let strides = !self.layout.is_contiguous();
        let (mode, transfer, offset, slab) = match self.mode {
            Mode::Inline => (0, 0, 0, 0),
            Mode::Bulk(transfer) => (1, transfer, 0, 0),
            Mode::Slab(Place { slab, offset, lease }) => (2, lease, offset, slab),
            Mode::Back(Lent { lease, offset }) => (3, lease, offset, 0),
            Mode::Landing(Place { slab, offset, lease }) => (4, lease, offset, slab),
        };
        let fixed = Fixed {
            dtype: self.layout.dtype().code(),
            rank: self.layout.rank() as u8,
            mode,
            flags: if strides { HAS_STRIDES } else { 0 } | if self.digests.is_some() { HAS_DIGESTS } else { 0 },
            device_kind: self.device.kind_code(),
            zero: 0,
            device_index: self.device.index(),
            transfer,
            offset,
            len: self.len_bytes,
            slab,
            digest: self.digests.as_deref().map_or(0, digest::seal),
        };
        out.extend_from_slice(bytemuck::bytes_of(&fixed));
        for dim in self.layout.shape() {
            out.extend_from_slice(&(*dim as i64).to_le_bytes());
        }
        if strides {
            for stride in self.layout.strides() {
                out.extend_from_slice(&stride.to_le_bytes());
            }
        }
        for digest in self.digests.iter().flatten() {
            out.extend_from_slice(&digest.to_le_bytes());
        }
    }

    /// Whether the descriptor at the front of `table` says that digests follow it.
    pub(crate) fn has_digests(table: &[u8]) -> bool {
        table.get(FLAGS_AT).is_some_and(|flags| flags & HAS_DIGESTS != 0)
    }

    /// Takes one descriptor off the front of `table`.
    ///
    /// # Errors
    /// [`ProtocolError`] for a truncated table, an unknown dtype, device or mode, a rank above the limit, a shape that
    /// overflows, strides that overlap or leave gaps, and a byte count that disagrees with dtype and shape.
    pub(crate) fn read(table: &mut &[u8], limits: &Limits) -> Result<Self, ProtocolError> {
        let fixed: Fixed = bytemuck::pod_read_unaligned(take(table, FIXED_BYTES)?);
        let dtype = DType::from_code(fixed.dtype).ok_or(ProtocolError::DType { found: fixed.dtype })?;
        limit("tensor rank", u64::from(fixed.rank), MAX_RANK as u64)?;
        limit("bytes of one tensor", fixed.len, limits.tensor_bytes_max)?;
        if fixed.flags & !(HAS_STRIDES | HAS_DIGESTS) != 0
            || fixed.zero != 0
            || (fixed.flags & HAS_DIGESTS == 0 && fixed.digest != 0)
            || (fixed.mode < 2 && fixed.offset != 0)
            || (!matches!(fixed.mode, 2 | 4) && fixed.slab != 0)
        {
            return Err(ProtocolError::ReservedDescriptorBits);
        }
        let device = Device::from_code(fixed.device_kind, fixed.device_index)
            .ok_or(ProtocolError::DeviceKind { found: fixed.device_kind })?;
        let mode = match (fixed.mode, fixed.transfer) {
            (0, 0) => Mode::Inline,
            // Nothing to wait for would be waited for.
            (mode @ 1..=4, _) if fixed.len == 0 => return Err(ProtocolError::Mode { found: mode }),
            (1, transfer) => Mode::Bulk(transfer),
            (2, lease) => Mode::Slab(Place { slab: fixed.slab, offset: fixed.offset, lease }),
            (3, lease) => Mode::Back(Lent { lease, offset: fixed.offset }),
            (4, lease) => Mode::Landing(Place { slab: fixed.slab, offset: fixed.offset, lease }),
            (mode, _) => return Err(ProtocolError::Mode { found: mode }),
        };
        let mut dims = [0_usize; MAX_RANK];
        let dims = &mut dims[..fixed.rank as usize];
        for dim in dims.iter_mut() {
            let wire = read_i64(table)?;
            *dim = usize::try_from(wire).map_err(|_| ProtocolError::Dimension { found: wire })?;
        }
        let layout = if fixed.flags & HAS_STRIDES == 0 {
            Layout::contiguous(dtype, dims)?
        } else {
            let mut strides = [0_i64; MAX_RANK];
            let strides = &mut strides[..fixed.rank as usize];
            for stride in strides.iter_mut() {
                *stride = read_i64(table)?;
            }
            let layout = Layout::strided(dtype, dims, strides, 0)?;
            if !layout.is_dense_or_broadcast() {
                return Err(ProtocolError::Strides { shape: dims.to_vec(), strides: strides.to_vec() });
            }
            layout
        };
        limit("bytes of one tensor", layout.size_bytes() as u64, limits.tensor_bytes_max)?;
        let span = layout.byte_span();
        let expected_bytes = (span.end - span.start) as u64;
        if span.start != 0 || fixed.len != expected_bytes {
            return Err(ProtocolError::SizeMismatch {
                dtype,
                shape: dims.to_vec(),
                expected_bytes,
                announced_bytes: fixed.len,
            });
        }
        let has_digests = fixed.flags & HAS_DIGESTS != 0;
        let digests = has_digests.then(|| digest::read(table, fixed.len, fixed.digest)).transpose()?;
        Ok(Self { layout, device, mode, len_bytes: fixed.len, digests })
    }
}

fn take<'a>(table: &mut &'a [u8], len: usize) -> Result<&'a [u8], ProtocolError> {
    let (head, rest) = table.split_at_checked(len).ok_or(ProtocolError::TruncatedDescriptors)?;
    *table = rest;
    Ok(head)
}

fn read_i64(table: &mut &[u8]) -> Result<i64, ProtocolError> {
    Ok(bytemuck::pod_read_unaligned(take(table, 8)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wire(descriptor: &Descriptor) -> Vec<u8> {
        let mut out = Vec::new();
        descriptor.write(&mut out);
        out
    }

    fn read(bytes: &[u8]) -> Result<Descriptor, ProtocolError> {
        Descriptor::read(&mut &*bytes, &Limits::default())
    }

    fn matrix() -> Descriptor {
        let layout = Layout::contiguous(DType::F32, &[2, 3]).expect("a small layout");
        Descriptor { layout, device: Device::HOST, mode: Mode::Inline, len_bytes: 24, digests: None }
    }

    /// W1, written out by hand from the table; f32 has code 11.
    #[test]
    fn golden_vectors() {
        let mut expected = vec![11, 2, 0, 0, 0, 0, 0, 0];
        expected.extend([0; 16]);
        expected.extend([24, 0, 0, 0, 0, 0, 0, 0]);
        expected.extend([0; 16]);
        expected.extend([2, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(wire(&matrix()), expected);

        let layout = matrix().layout.transpose(0, 1).expect("two dimensions");
        let transposed =
            Descriptor { layout, device: Device::Cuda(3), mode: Mode::Bulk(9), len_bytes: 24, digests: None };
        let mut expected = vec![11, 2, 1, 1, 1, 0, 3, 0, 9, 0, 0, 0, 0, 0, 0, 0];
        expected.extend([0; 8]);
        expected.extend([24, 0, 0, 0, 0, 0, 0, 0]);
        expected.extend([0; 16]);
        expected.extend([3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        expected.extend([1, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(wire(&transposed), expected);
        assert_eq!(read(&expected), Ok(transposed));

        let lent = Descriptor { mode: Mode::Slab(Place { slab: 5, offset: 0x1_0040, lease: 6 }), ..matrix() };
        let mut expected = vec![11, 2, 2, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0, 0x40, 0, 1, 0, 0, 0, 0, 0];
        expected.extend([24, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0]);
        expected.extend([0; 8]);
        expected.extend([2, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(wire(&lent), expected);
        assert_eq!(read(&expected), Ok(lent));

        let landing = Descriptor { mode: Mode::Landing(Place { slab: 5, offset: 0x1_0040, lease: 6 }), ..matrix() };
        expected[2] = 4;
        assert_eq!(wire(&landing), expected);
        assert_eq!(read(&expected), Ok(landing));

        let back = Descriptor { mode: Mode::Back(Lent { lease: 6, offset: 0x1_0040 }), ..matrix() };
        (expected[2], expected[32]) = (3, 0);
        assert_eq!(wire(&back), expected);
        assert_eq!(read(&expected), Ok(back));
        expected[32] = 5;
        assert_eq!(read(&expected), Err(ProtocolError::ReservedDescriptorBits), "its slab is the lender's to know");
    }

    /// Strides do not travel without elements; the peer must be able to make up its own.
    #[test]
    fn a_tensor_without_elements_is_read_back_whatever_its_other_sizes() {
        let narrow = Layout::contiguous(DType::F32, &[0, 1, 1]).expect("a small layout");
        let layout = narrow.broadcast_to(&[0, 1 << 40, 1 << 40]).expect("no elements");
        let bytes = wire(&Descriptor { layout, device: Device::HOST, mode: Mode::Inline, len_bytes: 0, digests: None });
        let again = read(&bytes).expect("it was refused once, and the connection closed");
        assert_eq!((again.layout.shape(), again.len_bytes), (&[0, 1 << 40, 1 << 40][..], 0));
    }

    #[test]
    fn every_truncation_is_refused() {
        let bytes = wire(&matrix());
        assert_eq!(read(&bytes), Ok(matrix()));
        for len in 0..bytes.len() {
            assert_eq!(read(&bytes[..len]), Err(ProtocolError::TruncatedDescriptors), "{len}");
        }
    }

    #[test]
    fn lies_are_refused_by_name() {
        let with = |offset: usize, bytes: &[u8]| {
            let mut wire = wire(&matrix());
            wire[offset..offset + bytes.len()].copy_from_slice(bytes);
            read(&wire).expect_err("refused")
        };
        assert_eq!(with(0, &[200]), ProtocolError::DType { found: 200 });
        assert!(matches!(with(1, &[17]), ProtocolError::Limit { what: "tensor rank", .. }));
        assert_eq!(with(2, &[7]), ProtocolError::Mode { found: 7 });
        assert_eq!(with(4, &[9]), ProtocolError::DeviceKind { found: 9 });
        assert_eq!(with(16, &[1]), ProtocolError::ReservedDescriptorBits);
        assert!(matches!(with(24, &[25]), ProtocolError::SizeMismatch { expected_bytes: 24, announced_bytes: 25, .. }));
        assert_eq!(with(48, &(-2_i64).to_le_bytes()), ProtocolError::Dimension { found: -2 });
        assert!(matches!(with(48, &i64::MAX.to_le_bytes()), ProtocolError::Layout(_)), "2^63 × 3 elements overflow");
        assert!(matches!(with(24, &u64::MAX.to_le_bytes()), ProtocolError::Limit { what: "bytes of one tensor", .. }));
    }

    #[test]
    fn overlapping_gapped_and_negative_strides_are_refused() {
        let with_strides = |strides: [i64; 2]| {
            let mut wire = wire(&matrix());
            wire[3] = HAS_STRIDES;
            strides.iter().for_each(|stride| wire.extend(stride.to_le_bytes()));
            read(&wire)
        };
        assert!(with_strides([3, 1]).is_ok());
        assert!(matches!(with_strides([1, 1]), Err(ProtocolError::Strides { .. })), "overlap");
        assert!(matches!(with_strides([4, 1]), Err(ProtocolError::Strides { .. })), "gap");
        assert!(matches!(with_strides([3, -1]), Err(ProtocolError::Layout(_))), "negative");
    }
}
