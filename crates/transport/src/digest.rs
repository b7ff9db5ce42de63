//! Digests of tensors on their way: XXH3-64 of each 64 KiB of the bytes that travel, asked for by the caller.
//!
//! Found by them: bytes that a network, a memory or a bug has changed. Not a proof against who means harm: it could change both.
//! Invariant LIMITS: a list is as long as its tensor's bytes ask for, and read only from bytes that have come.
//! Invariant: no value is given before its digests are compared, over the bytes as the receiver has them.

use farcall_device::{DeviceError, Tensor};
use xxhash_rust::xxh3::xxh3_64;

use crate::ProtocolError;
use crate::endpoint::payload;

/// Bytes under one digest.
pub const DIGEST_CHUNK_BYTES: usize = 64 << 10;

/// The digests of one tensor's bytes, in order.
pub type DigestList = Box<[u64]>;

/// The digests of each of `tensors`, which are on the host, complete, dense or broadcast.
///
/// # Errors
/// [`DeviceError`] of a tensor that cannot be read.
/// # Cost
/// One pass over the bytes.
pub fn digests(tensors: &[Tensor]) -> Result<Vec<DigestList>, DeviceError> {
    tensors.iter().map(|tensor| Ok(list(payload(tensor)?))).collect()
}

fn list(bytes: &[u8]) -> DigestList {
    bytes.chunks(DIGEST_CHUNK_BYTES).map(xxh3_64).collect()
}

/// How many digests so many bytes have.
pub(crate) fn count(len_bytes: u64) -> u64 {
    len_bytes.div_ceil(DIGEST_CHUNK_BYTES as u64)
}

/// Of the list itself, as the descriptor has it.
pub(crate) fn seal(list: &[u64]) -> u64 {
    xxh3_64(bytemuck::cast_slice(list))
}

/// Reads the list of a tensor of `len_bytes`.
pub(crate) fn read(table: &mut &[u8], len_bytes: u64, sealed: u64) -> Result<DigestList, ProtocolError> {
    let bytes = usize::try_from(count(len_bytes) * 8).map_err(|_| ProtocolError::TruncatedDescriptors)?;
    let (head, rest) = table.split_at_checked(bytes).ok_or(ProtocolError::TruncatedDescriptors)?;
    *table = rest;
    let (digests, _) = head.as_chunks::<8>();
    let list: DigestList = digests.iter().map(|digest| u64::from_le_bytes(*digest)).collect();
    if seal(&list) == sealed { Ok(list) } else { Err(ProtocolError::DigestList) }
}

/// What a frame's tensors are compared with, before its value is given.
#[derive(Debug, Default)]
pub struct Digests {
    /// The sender asks for digests of the answer's tensors, too.
    pub wanted: bool,
    pub(crate) tensors: Vec<(usize, Tensor, DigestList)>,
}

/// Bytes that are not those that were sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Corrupt {
    /// The tensor's index in its frame.
    pub tensor: usize,
    /// Where the first chunk that differs begins in the tensor's bytes.
    pub start: u64,
    /// And ends.
    pub end: u64,
}

impl Digests {
    /// Of these tensors, by their indices in the frame.
    pub fn new(wanted: bool, tensors: Vec<(usize, Tensor, DigestList)>) -> Self {
        Self { wanted, tensors }
    }

    /// Whether there is nothing to compare.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// Compares the tensors' bytes with their digests.
    ///
    /// # Errors
    /// The first chunk that differs.
    /// # Cost
    /// One pass over the bytes.
    pub fn compare(&self) -> Result<(), Corrupt> {
        for (tensor, value, expected) in &self.tensors {
            // What was received is on the host, and complete.
            let bytes = payload(value).unwrap_or_default();
            let found = list(bytes);
            let differs = expected.iter().zip(&found).position(|(expected, found)| expected != found);
            let differs = differs.or_else(|| (expected.len() != found.len()).then_some(found.len()));
            if let Some(chunk) = differs {
                let start = chunk * DIGEST_CHUNK_BYTES;
                let end = (start + DIGEST_CHUNK_BYTES).min(bytes.len().max(start));
                return Err(Corrupt { tensor: *tensor, start: start as u64, end: end as u64 });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chunk_that_differs_is_told() {
        let len = 2 * DIGEST_CHUNK_BYTES + 100;
        let bytes: Vec<u8> = (0..len).map(|index| (index % 251) as u8).collect();
        let sent = digests(&[Tensor::from_slice(&bytes, &[len]).unwrap()]).unwrap().remove(0);
        assert_eq!(sent.len(), 3);
        let compare = |at: Option<usize>| {
            let mut bytes = bytes.clone();
            if let Some(at) = at {
                bytes[at] ^= 1;
            }
            let tensor = Tensor::from_slice(&bytes, &[len]).unwrap();
            Digests { wanted: true, tensors: vec![(4, tensor, sent.clone())] }.compare()
        };
        assert_eq!(compare(None), Ok(()));
        let chunk = DIGEST_CHUNK_BYTES as u64;
        assert_eq!(compare(Some(0)), Err(Corrupt { tensor: 4, start: 0, end: chunk }));
        assert_eq!(compare(Some(DIGEST_CHUNK_BYTES)), Err(Corrupt { tensor: 4, start: chunk, end: 2 * chunk }));
        assert_eq!(compare(Some(len - 1)), Err(Corrupt { tensor: 4, start: 2 * chunk, end: len as u64 }));
    }

    #[test]
    fn limits_a_list_is_read_whole_and_as_it_was_sent_or_not_at_all() {
        let list = [7_u64, 9];
        let wire: Vec<u8> = list.iter().flat_map(|digest| digest.to_le_bytes()).collect();
        let len = DIGEST_CHUNK_BYTES as u64 + 1;
        assert_eq!(read(&mut &wire[..], len, seal(&list)).as_deref(), Ok(&list[..]));
        assert_eq!(read(&mut &wire[..15], len, seal(&list)), Err(ProtocolError::TruncatedDescriptors));
        assert_eq!(read(&mut &wire[..], len, seal(&list) ^ 1), Err(ProtocolError::DigestList));
        assert_eq!(read(&mut &wire[..], u64::MAX, 0), Err(ProtocolError::TruncatedDescriptors));
        assert_eq!(read(&mut &[][..], 0, seal(&[])).as_deref(), Ok(&[][..]));
    }
}
