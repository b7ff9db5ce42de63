//! Frame headers, against the table of `frame` read anew.

use super::{Golden, limits};
use crate::frame::{HEADER_BYTES, Header, Kind};

/// The first 64 bytes are a header: it is accepted exactly if the table and the limits allow it, and keeps every bit.
pub fn header(input: &[u8]) -> bool {
    let Some(bytes) = input.first_chunk::<HEADER_BYTES>() else { return false };
    let parsed = Header::parse(bytes, &limits());
    let allowed = is_allowed(bytes);
    assert_eq!(parsed.is_ok(), allowed, "{parsed:?}");
    let Ok((header, kind)) = parsed else { return false };
    assert_eq!(header.as_bytes(), bytes);
    assert_eq!(kind as u8, bytes[5]);
    assert_eq!(header.body_len() as u64, number(bytes, 20, 4) + number(bytes, 24, 4) + number(bytes, 30, 2));
    true
}

/// The module's table, in another's words.
fn is_allowed(bytes: &[u8; HEADER_BYTES]) -> bool {
    let limits = limits();
    let at = |offset, len| number(bytes, offset, len);
    let tensors = at(28, 2);
    // Of 64 KiB each, and of the rest of each tensor.
    let digests = if tensors > 0 { limits.tensor_bytes_max.div_ceil(64 << 10) + tensors } else { 0 };
    let payload_max = if bytes[5] == Kind::Chunk as u8 { limits.chunk_bytes_max } else { limits.inline_bytes_max };
    bytes.starts_with(b"FCL1\x01")
        && matches!(bytes[5], 1..=16 | 20 | 21)
        // A request may ask for digests.
        && at(6, 2) <= u64::from(bytes[5] == 4)
        && at(56, 8) == 0
        && at(20, 4) <= limits.metadata_bytes_max
        && tensors <= limits.tensors_max
        // 48 bytes and 16 dimensions with a size and a stride each; digests of 8 bytes.
        && (tensors * 48..=tensors * (48 + 16 * 16) + 8 * digests).contains(&at(24, 4))
        && at(30, 2) <= limits.extension_bytes_max
        && at(32, 8) <= payload_max
}

fn number(bytes: &[u8], offset: usize, len: usize) -> u64 {
    bytes[offset..offset + len].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// A header of each kind, and one with all fields in use.
pub fn golden() -> Vec<Golden> {
    use Kind::*;
    let plain = [
        ("hello", Hello),
        ("welcome", Welcome),
        ("function", Function),
        ("request", Request),
        ("reply", Reply),
        ("error", Error),
        ("cancel", Cancel),
        ("close", Close),
        ("open-bulk", OpenBulk),
        ("chunk", Chunk),
        ("ping", Ping),
        ("slab", Slab),
        ("retire", Retire),
        ("release", Release),
        ("rings", Rings),
        ("landed", Landed),
        ("challenge", Challenge),
        ("proof", Proof),
    ];
    let full = Header {
        call: 0x0102_0304_0506_0708,
        function: 7,
        meta_len: 5,
        table_len: 64,
        tensors: 1,
        ext_len: 24,
        payload_len: 24,
        deadline_us: 1_000_000,
        ..Header::new(Request)
    };
    let mut golden: Vec<Golden> =
        plain.map(|(name, kind)| (name, Header::new(kind).as_bytes().to_vec())).into_iter().collect();
    golden.push(("full", full.as_bytes().to_vec()));
    golden.push(("refused-kind-17", {
        let mut bytes = full.as_bytes().to_vec();
        bytes[5] = 17;
        bytes
    }));
    golden
}
