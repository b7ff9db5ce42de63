//! The next input: a stored one, changed in a few places.
//!
//! Changes know what the formats are made of: little-endian numbers of 2, 4 and 8 bytes, varints, frames of a 64-byte header
//! and what it announces. Limits and their neighbours are likelier than other numbers. Half of the time a frame's lengths are
//! made to agree again, since a decoder that checks them first would else never show what is behind.

use crate::{Corpus, Random, Target};

/// Numbers at which decoders change their mind: widths, limits and their neighbours.
const NUMBERS: &[u64] = &[
    0,
    1,
    2,
    3,
    7,
    8,
    15,
    16,
    17,
    47,
    48,
    49,
    63,
    64,
    65,
    127,
    128,
    129,
    255,
    256,
    1000,
    1023,
    1024,
    1025,
    4095,
    4096,
    4097,
    0x7fff,
    0x8000,
    0xffff,
    0x1_0000,
    0x1_0001,
    0x4_0000,
    0x4_0001,
    0x10_0000,
    0x10_0001,
    0x40_0000,
    0x40_0001,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    1 << 40,
    1 << 60,
    i64::MAX as u64 - 1,
    i64::MAX as u64,
    1 << 63,
    u64::MAX - 1,
    u64::MAX,
];

/// Where a header's fields are, and how wide.
const HEADER_FIELDS: &[(usize, usize)] = &[
    (0, 4),
    (4, 1),
    (5, 1),
    (6, 2),
    (8, 8),
    (16, 4),
    (20, 4),
    (24, 4),
    (28, 2),
    (30, 2),
    (32, 8),
    (40, 8),
    (48, 8),
    (56, 8),
];

const HEADER_BYTES: usize = 64;

/// The input of `seed` (F2).
#[must_use]
pub fn mutate(target: &Target, corpus: &Corpus, seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut bytes = corpus.one(&mut random).to_vec();
    for _ in 0..1 + random.below(4) {
        match random.below(if target.framed { 14 } else { 10 }) {
            0 => flip_a_bit(&mut bytes, &mut random),
            1 => set_a_byte(&mut bytes, &mut random),
            2 | 3 => set_a_number(&mut bytes, &mut random),
            4 => put_a_varint(&mut bytes, &mut random),
            5 => insert(&mut bytes, &mut random),
            6 => remove(&mut bytes, &mut random),
            7 => repeat(&mut bytes, &mut random),
            8 => splice(&mut bytes, corpus.one(&mut random), &mut random),
            9 => bytes.extend_from_slice(corpus.one(&mut random)),
            _ => set_a_field(&mut bytes, &mut random),
        }
    }
    if target.framed && random.below(2) == 0 {
        agree(&mut bytes);
    }
    bytes.truncate(target.input_bytes_max);
    bytes
}

fn position(bytes: &[u8], random: &mut Random) -> Option<usize> {
    (!bytes.is_empty()).then(|| random.below(bytes.len()))
}

fn flip_a_bit(bytes: &mut [u8], random: &mut Random) {
    if let Some(at) = position(bytes, random) {
        bytes[at] ^= 1 << random.below(8);
    }
}

fn set_a_byte(bytes: &mut [u8], random: &mut Random) {
    if let Some(at) = position(bytes, random) {
        bytes[at] = match random.below(3) {
            0 => random.any() as u8,
            1 => bytes[at].wrapping_add(1),
            _ => bytes[at].wrapping_sub(1),
        };
    }
}

fn number(random: &mut Random) -> u64 {
    match random.below(8) {
        0 => random.any() >> random.below(64),
        1 => 1 << random.below(64),
        _ => *random.one_of(NUMBERS),
    }
}

fn write(bytes: &mut [u8], at: usize, width: usize, value: u64) {
    if let Some(field) = bytes.get_mut(at..at + width) {
        field.copy_from_slice(&value.to_le_bytes()[..width]);
    }
}

fn set_a_number(bytes: &mut [u8], random: &mut Random) {
    let width = *random.one_of(&[1, 2, 4, 8, 8]);
    if let Some(mut at) = position(bytes, random) {
        if random.below(4) > 0 {
            at -= at % width;
        }
        let value = number(random);
        write(bytes, at, width, value);
    }
}

fn put_a_varint(bytes: &mut Vec<u8>, random: &mut Random) {
    if let Some(at) = position(bytes, random) {
        let mut value = number(random);
        let mut varint = Vec::new();
        while value >= 0x80 {
            varint.push(value as u8 | 0x80);
            value >>= 7;
        }
        varint.push(value as u8);
        bytes.splice(at..=at, varint);
    }
}

fn insert(bytes: &mut Vec<u8>, random: &mut Random) {
    let at = random.below(bytes.len() + 1);
    let byte = random.any() as u8;
    let count = 1 + random.below(16);
    bytes.splice(at..at, std::iter::repeat_n(byte, count));
}

fn range(bytes: &[u8], random: &mut Random) -> std::ops::Range<usize> {
    let start = random.below(bytes.len() + 1);
    start..start + random.below(bytes.len() - start + 1)
}

fn remove(bytes: &mut Vec<u8>, random: &mut Random) {
    let mut range = range(bytes, random);
    // Often a little: much leaves little to decode.
    if random.below(2) == 0 {
        range.end = range.end.min(range.start + 8);
    }
    bytes.drain(range);
}

fn repeat(bytes: &mut Vec<u8>, random: &mut Random) {
    let copied = bytes[range(bytes, random)].to_vec();
    let at = random.below(bytes.len() + 1);
    bytes.splice(at..at, copied);
}

fn splice(bytes: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    let (from, at) = (range(other, random), random.below(bytes.len() + 1));
    if random.below(2) == 0 {
        bytes.truncate(at);
    }
    bytes.splice(at..at, other[from].iter().copied());
}

fn set_a_field(bytes: &mut [u8], random: &mut Random) {
    let frames = frames(bytes);
    if !frames.is_empty() {
        let frame = *random.one_of(&frames);
        let (offset, width) = *random.one_of(HEADER_FIELDS);
        let value = number(random);
        write(bytes, frame + offset, width, value);
    }
}

/// Where headers are.
fn frames(bytes: &[u8]) -> Vec<usize> {
    (0..bytes.len().saturating_sub(HEADER_BYTES - 1)).filter(|at| bytes[*at..].starts_with(b"FCL1")).collect()
}

/// Makes each frame end where the next begins, by the length of its metadata or, in a chunk, of its payload.
fn agree(bytes: &mut [u8]) {
    let starts = frames(bytes);
    for (index, start) in starts.iter().enumerate() {
        let end = starts.get(index + 1).copied().unwrap_or(bytes.len());
        let at = |offset, width: usize| {
            bytes[start + offset..start + offset + width]
                .iter()
                .rev()
                .fold(0, |value, byte| value << 8 | u64::from(*byte))
        };
        let behind = end.saturating_sub(start + HEADER_BYTES) as u64;
        let (chunk, others) = (at(5, 1) == 10, at(24, 4).saturating_add(at(30, 2)).saturating_add(at(32, 8)));
        if chunk {
            write(bytes, start + 32, 8, behind);
        } else if let Some(metadata) = behind.checked_sub(others) {
            write(bytes, start + 20, 4, metadata);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TARGETS;

    #[test]
    fn a_seed_repeats_its_input_and_others_differ() {
        for target in TARGETS {
            let corpus = Corpus::load(target).unwrap();
            let inputs: Vec<_> = (0..200).map(|seed| mutate(target, &corpus, seed)).collect();
            for (seed, input) in inputs.iter().enumerate() {
                assert_eq!(input, &mutate(target, &corpus, seed as u64), "{} {seed}", target.name);
                assert!(input.len() <= target.input_bytes_max);
            }
            let distinct: std::collections::HashSet<_> = inputs.into_iter().collect();
            assert!(distinct.len() > 150, "{} of 200 are distinct for {}", distinct.len(), target.name);
        }
    }

    #[test]
    fn lengths_agree_again() {
        let mut header = [0; HEADER_BYTES];
        header[..4].copy_from_slice(b"FCL1");
        let mut chunk = header;
        chunk[5] = 10;
        let mut bytes = [&header[..], &[1; 300], &chunk, &[2; 5]].concat();
        agree(&mut bytes);
        assert_eq!(bytes[20..24], [44, 1, 0, 0]);
        assert_eq!(bytes[364 + 32..364 + 40], [5, 0, 0, 0, 0, 0, 0, 0]);
    }
}
