//! What must hold for any bytes that a peer may send: a function for each decoder, which panics where it does not.
//!
//! Each takes an input, checks it, and tells whether it was one that decodes; inputs are what travels, without any framing of
//! the fuzzer's. Memory is the caller's to count. `golden` gives inputs to start from. Here, in this crate, because the
//! decoders are private to it.

mod descriptors;
mod frames;
mod greeting;
mod header;

use crate::Limits;

pub use self::{
    descriptors::{descriptors, golden as golden_descriptors},
    frames::{frames, golden as golden_frames},
    greeting::{golden as golden_greetings, greeting},
    header::{golden as golden_headers, header},
};
pub use crate::store::fuzzing::{golden as golden_store, store};

/// Checks one input; `true` if it decodes.
pub type Check = fn(&[u8]) -> bool;

/// A named input to start from.
pub type Golden = (&'static str, Vec<u8>);

/// The defaults, but for tensors: they are placed before their bytes arrive, and 8 GiB are slow to place.
fn limits() -> Limits {
    Limits { tensor_bytes_max: TENSOR_BYTES_MAX, request_bytes_max: 2 * TENSOR_BYTES_MAX, ..Limits::default() }
}

const TENSOR_BYTES_MAX: u64 = 256 << 10;

/// A few numbers that depend on all bytes of an input: where to cut it, so that the input alone repeats a failure.
struct Numbers(u64);

impl Numbers {
    fn of(bytes: &[u8]) -> Self {
        // FNV-1a.
        Self(
            bytes
                .iter()
                .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)),
        )
    }

    /// From 1 to `max`.
    fn up_to(&mut self, max: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        (self.0 >> 33) as usize % max + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A start for a fuzzer only if the decoders take it; the names say which ones they must refuse.
    #[test]
    fn golden_inputs_decode_unless_they_are_named_otherwise() {
        let all: [(Check, Vec<Golden>); 5] = [
            (header, golden_headers()),
            (descriptors, golden_descriptors()),
            (frames, golden_frames()),
            (greeting, golden_greetings()),
            (store, golden_store()),
        ];
        for (check, golden) in all {
            for (name, bytes) in golden {
                assert_eq!(check(&bytes), !name.starts_with("refused"), "{name}");
            }
        }
    }
}
