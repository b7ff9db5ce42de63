//! What the workers of a bench serve, and the data that they check.
//!
//! Invariant W1: the expected bytes are computed from [`Pattern`] alone, at both ends, never from the tensor that was sent.

use farcall::prelude::*;

/// What a tensor of a bench holds: bytes that differ from place to place and from size to size.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pattern {
    seed: u64,
}

impl Pattern {
    pub(crate) fn new(len: usize) -> Self {
        Self { seed: mix(len as u64 ^ 0xfa4c_a11b) }
    }

    fn word(self, index: usize) -> u64 {
        mix(self.seed.wrapping_add(index as u64))
    }

    pub(crate) fn fill(self, bytes: &mut [u8]) {
        for (index, chunk) in bytes.chunks_mut(8).enumerate() {
            chunk.copy_from_slice(&self.word(index).to_le_bytes()[..chunk.len()]);
        }
    }

    /// How many of `bytes` are not what they should be.
    pub(crate) fn count_wrong(self, bytes: &[u8]) -> u64 {
        let wrong = |(index, chunk): (usize, &[u8])| {
            let expected = self.word(index).to_le_bytes();
            chunk.iter().zip(expected).filter(|(found, expected)| **found != *expected).count() as u64
        };
        bytes.chunks(8).enumerate().map(wrong).sum()
    }

    /// What [`sum`] gives for `len` right bytes.
    pub(crate) fn sum(self, len: usize) -> u64 {
        let words = (0..len / 8).fold(0_u64, |sum, index| sum.wrapping_add(self.word(index)));
        let tail = &self.word(len / 8).to_le_bytes()[..len % 8];
        tail.iter().fold(words, |sum, byte| sum.wrapping_add(u64::from(*byte)))
    }

    /// What [`sample`] gives at `at` of `len` right bytes.
    pub(crate) fn sample(self, len: usize, at: u64) -> u64 {
        let Some(index) = place(len, at) else { return 0 };
        u64::from(self.word(index / 8).to_le_bytes()[index % 8])
    }
}

/// The finalizer of SplitMix64: each bit of `value` changes half of the result's.
fn mix(value: u64) -> u64 {
    let value = value.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// The sum of all little-endian words of 8 bytes, then of the bytes that are left: it reads every byte, as fast as memory is.
pub(crate) fn sum(bytes: &[u8]) -> u64 {
    let (words, tail) = bytes.as_chunks::<8>();
    let words = words.iter().fold(0_u64, |sum, word| sum.wrapping_add(u64::from_le_bytes(*word)));
    tail.iter().fold(words, |sum, byte| sum.wrapping_add(u64::from(*byte)))
}

/// A single byte, so that a call can be checked at no cost.
pub(crate) fn sample(bytes: &[u8], at: u64) -> u64 {
    place(bytes.len(), at).map_or(0, |index| u64::from(bytes[index]))
}

fn place(len: usize, at: u64) -> Option<usize> {
    (len > 0).then(|| (mix(at) % len as u64) as usize)
}

/// The bytes of a tensor, wherever it is; a device's are copied to the host.
pub(crate) fn on_host<T>(x: &Tensor, look: impl FnOnce(&[u8]) -> T) -> farcall::Result<T> {
    if x.device() == Device::HOST {
        return Ok(look(x.as_slice::<u8>()?));
    }
    let host = x.host().wait(COPY_MAX)?;
    Ok(look(host.as_slice::<u8>()?))
}

/// How long a copy from a device may take.
const COPY_MAX: std::time::Duration = std::time::Duration::from_secs(60);

/// Adds one: the smallest call.
#[farcall::function(name = "bench::call", inline)]
pub(crate) fn call(x: u64) -> u64 {
    x.wrapping_add(1)
}

/// Takes a tensor and looks at one byte of it, if it is on the host.
#[farcall::function(name = "bench::sink")]
pub(crate) fn sink(x: Tensor, at: u64) -> farcall::Result<u64> {
    if x.device() == Device::HOST { Ok(sample(x.as_slice::<u8>()?, at)) } else { Ok(0) }
}

/// Takes a tensor and reads all of it.
#[farcall::function(name = "bench::read")]
pub(crate) fn read(x: Tensor) -> farcall::Result<u64> {
    on_host(&x, sum)
}

/// Gives a tensor back.
#[farcall::function(name = "bench::echo")]
pub(crate) fn echo(x: Tensor) -> Tensor {
    x
}

/// How many bytes of a tensor are not what they should be.
#[farcall::function(name = "bench::verify")]
pub(crate) fn verify(x: Tensor) -> farcall::Result<u64> {
    on_host(&x, |bytes| Pattern::new(bytes.len()).count_wrong(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: [usize; 7] = [0, 1, 7, 8, 9, 1000, 65_537];

    fn filled(len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        Pattern::new(len).fill(&mut bytes);
        bytes
    }

    /// W1: what is read agrees with what is expected without reading, and only for the right bytes.
    #[test]
    fn right_bytes_are_right_by_every_check() {
        for len in SIZES {
            let (bytes, pattern) = (filled(len), Pattern::new(len));
            assert_eq!(pattern.count_wrong(&bytes), 0, "{len}");
            assert_eq!(sum(&bytes), pattern.sum(len), "{len}");
            for at in 0..50 {
                assert_eq!(sample(&bytes, at), pattern.sample(len, at), "{len}, {at}");
            }
        }
    }

    #[test]
    fn each_wrong_byte_is_counted_and_changes_the_sum() {
        for len in SIZES.into_iter().filter(|len| *len > 0) {
            for at in [0, len / 2, len - 1] {
                let mut bytes = filled(len);
                bytes[at] ^= 0x10;
                assert_eq!(Pattern::new(len).count_wrong(&bytes), 1, "{len}, {at}");
                assert_ne!(sum(&bytes), Pattern::new(len).sum(len), "{len}, {at}");
            }
        }
    }

    /// The sum alone would not see blocks that changed places; the count does.
    #[test]
    fn exchanged_blocks_are_counted() {
        let mut bytes = filled(64);
        bytes.rotate_left(8);
        assert!(Pattern::new(64).count_wrong(&bytes) > 32);
    }
}
