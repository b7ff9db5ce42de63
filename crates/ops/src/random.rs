//! Random elements from a seed: the same on every machine and with any number of threads.
//!
//! Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3"): a function of a key, the seed, and of a
//! counter, the element's place. It needs no state, so a GPU gives the same numbers. They are not those of torch's CPU generator.

use farcall_device::{DType, Stream, Tensor};

use crate::OpError;
use crate::convert::{Buffer, Cast};
use crate::elementwise::unsupported;
use crate::kernel::{BLOCK, for_each_chunk, launch};
use crate::memory::NOTHING;

/// Numbers that are equally likely from 0 on, below 1.
///
/// # Shapes and dtypes
/// `f16`, `bf16`, `f32`, which are made of 24 random bits and cut to the dtype's so that none is 1; `f64`, of 53.
/// # Errors
/// [`OpError::DTypes`] for what is not real; [`OpError::Device`].
pub fn rand(shape: &[usize], dtype: DType, seed: u64, stream: &Stream) -> Result<Tensor, OpError> {
    let bits = match dtype {
        DType::BF16 => 8,
        DType::F16 => 11,
        _ => 24,
    };
    let single = move |words: [u32; 4]| words.map(|word| (word >> (32 - bits)) as f32 / (1_u32 << bits) as f32);
    random("rand", shape, dtype, seed, single, |words| pairs(words).map(unit), stream)
}

/// Normally distributed numbers of mean 0 and variance 1.
///
/// # Errors
/// Those of [`rand`].
pub fn randn(shape: &[usize], dtype: DType, seed: u64, stream: &Stream) -> Result<Tensor, OpError> {
    let single = |words: [u32; 4]| {
        let [a, b, c, d] = words.map(|word| f64::from(word) / 2_f64.powi(32));
        let ([a, b], [c, d]) = (normal(a, b), normal(c, d));
        [a as f32, b as f32, c as f32, d as f32]
    };
    let double = |words: [u32; 4]| {
        let [a, b] = pairs(words).map(unit);
        normal(a, b)
    };
    random("randn", shape, dtype, seed, single, double, stream)
}

fn pairs([a, b, c, d]: [u32; 4]) -> [u64; 2] {
    [u64::from(a) << 32 | u64::from(b), u64::from(c) << 32 | u64::from(d)]
}

/// The upper 53 bits as a number from 0 on, below 1.
fn unit(bits: u64) -> f64 {
    (bits >> 11) as f64 / 2_f64.powi(53)
}

/// Two independent normal numbers of two uniform ones (Box and Muller's way).
fn normal(a: f64, b: f64) -> [f64; 2] {
    // Not 0, whose logarithm is infinite.
    let radius = (-2.0 * (1.0 - a).ln()).sqrt();
    let (sin, cos) = (std::f64::consts::TAU * b).sin_cos();
    [radius * cos, radius * sin]
}

fn random(
    op: &'static str,
    shape: &[usize],
    dtype: DType,
    seed: u64,
    single: impl Fn([u32; 4]) -> [f32; 4] + Send + Sync + 'static,
    double: impl Fn([u32; 4]) -> [f64; 2] + Send + Sync + 'static,
    stream: &Stream,
) -> Result<Tensor, OpError> {
    if !matches!(dtype, DType::F16 | DType::BF16 | DType::F32 | DType::F64) {
        return match unsupported(op, &[]) {
            OpError::DTypes { op, remedy, .. } => Err(OpError::DTypes { op, dtypes: vec![dtype], remedy }),
            other => Err(other),
        };
    }
    let size = dtype.size_bytes();
    launch(op, stream, &[], dtype, shape, move |_, target| {
        for_each_chunk(target, size, |start, mut out| {
            let (mut numbers, mut scratch) = (Buffer::default(), <[Buffer; 2]>::default());
            out.blocks(BLOCK * size, |index, block| {
                // Blocks start at multiples of four elements, so that a counter's numbers are not split.
                let (first, len) = (start + index * BLOCK, block.len() / size);
                if dtype == DType::F64 {
                    for (place, pair) in bytemuck::cast_slice_mut::<u8, f64>(block).chunks_mut(2).enumerate() {
                        let numbers = double(philox(seed, (first / 2 + place) as u64));
                        pair.copy_from_slice(&numbers[..pair.len()]);
                    }
                    return Some(NOTHING);
                }
                let bytes = numbers.bytes(len * 4);
                for (place, four) in bytemuck::cast_slice_mut::<u8, f32>(bytes).chunks_mut(4).enumerate() {
                    let numbers = single(philox(seed, (first / 4 + place) as u64));
                    four.copy_from_slice(&numbers[..four.len()]);
                }
                Cast::between(DType::F32, dtype).run(bytes, block, &mut scratch, len);
                Some(NOTHING)
            });
        });
        Ok(())
    })
}

fn philox(seed: u64, counter: u64) -> [u32; 4] {
    philox_rounds([seed as u32, (seed >> 32) as u32], [counter as u32, (counter >> 32) as u32, 0, 0])
}

/// Ten rounds of multiplications whose halves are crossed.
fn philox_rounds(mut key: [u32; 2], mut counter: [u32; 4]) -> [u32; 4] {
    for _ in 0..10 {
        let [a, c] =
            [(0xd251_1f53_u32, counter[0]), (0xcd9e_8d57, counter[2])].map(|(a, b)| u64::from(a) * u64::from(b));
        counter = [(c >> 32) as u32 ^ counter[1] ^ key[0], c as u32, (a >> 32) as u32 ^ counter[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The authors' known answers.
    #[test]
    fn philox_gives_the_published_numbers() {
        for (key, counter, expected) in [
            ([0; 2], [0; 4], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 2], [u32::MAX; 4], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0xa409_3822, 0x299f_31d0],
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ] {
            assert_eq!(philox_rounds(key, counter), expected);
        }
    }
}
