//! The 64-byte frame header: what every message on a connection starts with.
//!
//! Not here: tensor descriptors (`descriptor`), reassembly from a byte stream (`receive`).
//! Invariant LIMITS: a header is checked against [`Limits`] before anything it announces is allocated.
//! Invariant W1: the layout below is the wire, byte for byte, on every machine; the golden vectors are its test.
//!
//! ```text
//!  0 magic       u32  "FCL1"          32 payload_len u64  inline payload bytes behind the metadata
//!  4 version     u8                   40 deadline_us u64  relative; 0 = none
//!  5 kind        u8                   48 offset      u64  Chunk: where its bytes go in the transfer;
//!                                                          Slab: its bytes; Landed: how many
//!  6 flags       u16  see below       56 credit      u32  reserved, must be 0
//!  8 call        u64  call/transfer/  60 reserved    u32  must be 0
//!                    slab/lease
//! 16 function    u32  interned id
//! 20 meta_len    u32
//! 24 table_len   u32  descriptors
//! 28 tensors     u16  their count
//! 30 ext_len     u16  extensions      then: extensions, descriptors, metadata, inline payloads in order
//! ```
//! Flags: bit 0 of a Request, if both sides have digests, asks for digests of the answer's tensors. All else must be 0.

use bytemuck::{Pod, Zeroable};

use crate::{Limits, ProtocolError};

#[cfg(target_endian = "big")]
compile_error!("farcall's wire format is little-endian and is read in place; big-endian hosts are not supported");

/// Bytes of a [`Header`] on the wire.
pub const HEADER_BYTES: usize = 64;
/// The first four bytes of every frame.
pub const MAGIC: u32 = u32::from_le_bytes(*b"FCL1");
/// The framing version this build speaks.
pub const VERSION: u8 = 1;

/// What a build can do beyond its version, a bit each. This one: tensors pass in slabs that the receiver maps; see `shm`.
pub(crate) const FEATURE_SLABS: u64 = 1;
/// Frames pass in rings of shared memory; see `shm::ring`.
pub(crate) const FEATURE_RINGS: u64 = 4;
/// Tensors may come with digests; see `digest`.
pub(crate) const FEATURE_DIGESTS: u64 = 2;
/// Of a request: the answer's tensors are to have digests.
pub(crate) const WANTS_DIGESTS: u16 = 1;

/// What a frame is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[non_exhaustive]
pub enum Kind {
    /// First frame of a dialer: who it is and what the connection is for.
    Hello = 1,
    /// The acceptor's answer to a control [`Kind::Hello`].
    Welcome = 2,
    /// Gives an interned id (`function`) to a function's name for this connection.
    Function = 3,
    /// Runs a function.
    Request = 4,
    /// The value of a request.
    Reply = 5,
    /// The failure of a request.
    Error = 6,
    /// Nobody waits for the request's answer any more.
    Cancel = 7,
    /// The sender ends the connection and says why.
    Close = 8,
    /// Asks the dialer of the control connection to open the bulk connection.
    OpenBulk = 9,
    /// Bytes of one transfer, on a bulk connection only.
    Chunk = 10,
    /// Says nothing but that its sender lives; see [`Endpoint`](crate::Endpoint).
    Ping = 11,
    /// Passes a slab: `call` is its id, `offset` its bytes, and the descriptor comes with the header; see `shm`.
    Slab = 12,
    /// The slab of that id is not used any more.
    Retire = 13,
    /// Tensors that lay in the receiver's slabs are not used any more: the metadata are their leases, a u64 each.
    Release = 14,
    /// The sender's last frame by the socket: what follows is in the ring. The dialer's brings the descriptor of both; see
    /// `shm::ring`.
    Rings = 15,
    /// Of the tensor under the lease `call`, the first `offset` bytes are in their slab.
    Landed = 16,
    /// The acceptor's answer to a [`Kind::Hello`] when there is a job key; see `auth`.
    Challenge = 20,
    /// The dialer's answer to a [`Kind::Challenge`].
    Proof = 21,
}

impl Kind {
    /// The kind with this wire code.
    pub fn from_code(code: u8) -> Option<Self> {
        use Kind::*;
        const KINDS: [Option<Kind>; 22] = {
            let all = [
                Hello, Welcome, Function, Request, Reply, Error, Cancel, Close, OpenBulk, Chunk, Ping, Slab, Retire,
                Release, Rings, Landed, Challenge, Proof,
            ];
            let mut kinds = [None; 22];
            let mut index = 0;
            while index < all.len() {
                kinds[all[index] as usize] = Some(all[index]);
                index += 1;
            }
            kinds
        };
        KINDS.get(usize::from(code)).copied().flatten()
    }
}

/// A frame's header in wire order; see the module's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
#[expect(missing_docs, reason = "the module's table describes each field")]
pub struct Header {
    pub magic: u32,
    pub version: u8,
    pub kind: u8,
    pub flags: u16,
    pub call: u64,
    pub function: u32,
    pub meta_len: u32,
    pub table_len: u32,
    pub tensors: u16,
    pub ext_len: u16,
    pub payload_len: u64,
    pub deadline_us: u64,
    pub offset: u64,
    pub credit: u32,
    pub reserved: u32,
}

impl Header {
    /// A header of `kind` with every other field zero.
    pub fn new(kind: Kind) -> Self {
        Self { magic: MAGIC, version: VERSION, kind: kind as u8, ..Self::zeroed() }
    }

    /// The header's bytes as they travel.
    pub fn as_bytes(&self) -> &[u8; HEADER_BYTES] {
        bytemuck::cast_ref(self)
    }

    /// Reads a header and checks it against `limits`; nothing is allocated.
    ///
    /// # Errors
    /// [`ProtocolError`] for a wrong magic, version or kind, and for every length above its limit.
    #[inline]
    pub fn parse(bytes: &[u8; HEADER_BYTES], limits: &Limits) -> Result<(Self, Kind), ProtocolError> {
        let header: Self = bytemuck::pod_read_unaligned(bytes);
        if header.magic != MAGIC {
            return Err(ProtocolError::Magic { found: header.magic });
        }
        if header.version != VERSION {
            return Err(ProtocolError::Version { found: header.version, supported: VERSION });
        }
        let kind = Kind::from_code(header.kind).ok_or(ProtocolError::Kind { found: header.kind })?;
        let flags = if kind == Kind::Request { WANTS_DIGESTS } else { 0 };
        if header.flags & !flags != 0 || header.credit != 0 || header.reserved != 0 {
            return Err(ProtocolError::ReservedBits { kind });
        }
        limit("metadata bytes", u64::from(header.meta_len), limits.metadata_bytes_max)?;
        limit("tensors", u64::from(header.tensors), limits.tensors_max)?;
        let (table_len, tensors) = (u64::from(header.table_len), u64::from(header.tensors));
        // Digests of all that may come in one frame; one more a tensor, as each has a last chunk.
        let digests = if tensors > 0 { crate::digest::count(limits.tensor_bytes_max) + tensors } else { 0 };
        limit("descriptor bytes", table_len, tensors * crate::descriptor::MAX_BYTES + 8 * digests)?;
        // Places for the tensors are made before the first descriptor is read: what is announced must be paid for.
        if table_len < tensors * crate::descriptor::MIN_BYTES {
            return Err(ProtocolError::TruncatedDescriptors);
        }
        limit("extension bytes", u64::from(header.ext_len), limits.extension_bytes_max)?;
        let payload_max = if kind == Kind::Chunk { limits.chunk_bytes_max } else { limits.inline_bytes_max };
        limit("payload bytes in one frame", header.payload_len, payload_max)?;
        Ok((header, kind))
    }

    /// The header of a call's frame that has nothing but metadata; of any other, and of one that is wrong, [`Self::parse`] says
    /// more.
    #[inline]
    pub(crate) fn parse_small(bytes: &[u8; HEADER_BYTES], limits: &Limits, digests: bool) -> Option<(Self, Kind)> {
        let header: Self = bytemuck::pod_read_unaligned(bytes);
        let kind = match header.kind {
            4 => Kind::Request,
            5 => Kind::Reply,
            6 => Kind::Error,
            7 => Kind::Cancel,
            _ => return None,
        };
        let flags = if kind == Kind::Request && digests { WANTS_DIGESTS } else { 0 };
        let is_plain = header.magic == MAGIC
            && header.version == VERSION
            && header.flags & !flags == 0
            && header.credit | header.reserved == 0
            && header.tensors | header.ext_len == 0
            && header.table_len == 0
            && header.payload_len == 0
            && u64::from(header.meta_len) <= limits.metadata_bytes_max;
        is_plain.then_some((header, kind))
    }

    /// What a header must keep to where digests were not agreed on.
    pub(crate) fn expect_no_digests(&self, kind: Kind) -> Result<(), ProtocolError> {
        if self.flags != 0 {
            return Err(ProtocolError::ReservedBits { kind });
        }
        let tensors = u64::from(self.tensors);
        limit("descriptor bytes", u64::from(self.table_len), tensors * crate::descriptor::MAX_BYTES)
    }

    /// What the header of a frame that is nothing else must keep to.
    pub(crate) fn expect_alone(&self, kind: Kind) -> Result<(), ProtocolError> {
        let Self { flags, function, tensors, payload_len, deadline_us, .. } = *self;
        let rest = self.body_len() as u64 | payload_len | deadline_us | u64::from(function);
        if rest == 0 && flags | tensors == 0 { Ok(()) } else { Err(ProtocolError::ReservedBits { kind }) }
    }

    /// Bytes between the header and the inline payload.
    pub fn body_len(&self) -> usize {
        self.ext_len as usize + self.table_len as usize + self.meta_len as usize
    }
}

pub(crate) fn limit(what: &'static str, found: u64, max: u64) -> Result<(), ProtocolError> {
    if found > max { Err(ProtocolError::Limit { what, found, max }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn golden() -> Header {
        Header {
            call: 0x0102_0304_0506_0708,
            function: 7,
            meta_len: 5,
            table_len: 64,
            tensors: 1,
            payload_len: 24,
            deadline_us: 1_000_000,
            ..Header::new(Kind::Request)
        }
    }

    /// W1, written out by hand from the table.
    #[test]
    fn golden_vector_of_a_request_header() {
        let expected: [u8; 64] = [
            b'F', b'C', b'L', b'1', 1, 4, 0, 0, 8, 7, 6, 5, 4, 3, 2, 1, 7, 0, 0, 0, 5, 0, 0, 0, 64, 0, 0, 0, 1, 0, 0,
            0, 24, 0, 0, 0, 0, 0, 0, 0, 0x40, 0x42, 0x0f, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
            0,
        ];
        assert_eq!(golden().as_bytes(), &expected);
        assert_eq!(Header::parse(&expected, &Limits::default()), Ok((golden(), Kind::Request)));
    }

    #[test]
    fn every_field_out_of_its_limit_is_its_own_error() {
        let limits = Limits::default();
        let reject = |change: &dyn Fn(&mut Header)| {
            let mut header = golden();
            change(&mut header);
            Header::parse(header.as_bytes(), &limits).expect_err("refused")
        };
        assert_eq!(reject(&|h| h.magic = 0x2054_4547), ProtocolError::Magic { found: 0x2054_4547 });
        assert_eq!(reject(&|h| h.version = 9), ProtocolError::Version { found: 9, supported: 1 });
        assert_eq!(reject(&|h| h.kind = 0), ProtocolError::Kind { found: 0 });
        assert_eq!(reject(&|h| h.reserved = 1), ProtocolError::ReservedBits { kind: Kind::Request });
        assert_eq!(reject(&|h| h.tensors = 2), ProtocolError::TruncatedDescriptors, "64 bytes are not two descriptors");
        for (change, name) in [
            ((&|h: &mut Header| h.meta_len = u32::MAX) as &dyn Fn(&mut Header), "metadata bytes"),
            (&|h| h.tensors = u16::MAX, "tensors"),
            (&|h| h.table_len = u32::MAX, "descriptor bytes"),
            (&|h| h.ext_len = u16::MAX, "extension bytes"),
            (&|h| h.payload_len = u64::MAX, "payload bytes in one frame"),
        ] {
            assert!(matches!(reject(change), ProtocolError::Limit { what, .. } if what == name), "{name}");
        }
    }
}
