//! `f16` to and from `f32`, eight at a time by the processor's conversions where it has them, else by the `half` crate.
//!
//! That crate uses those too, but by a call for each eight, which takes longer than the conversion.
#![expect(unsafe_code, reason = "the processor's conversions are intrinsics")]

use farcall_device::f16;
use half::slice::HalfFloatSliceExt;

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{__m128i, __m256, _MM_FROUND_TO_NEAREST_INT, _mm256_cvtph_ps, _mm256_cvtps_ph};

/// Elements that the processor converts at a time.
#[cfg(target_arch = "x86_64")]
const VECTOR: usize = 8;

#[cfg(target_arch = "x86_64")]
fn has_conversions() -> bool {
    is_x86_feature_detected!("avx") && is_x86_feature_detected!("f16c")
}

/// The values of a block of `f16`.
pub(super) fn decode(source: &[u8], target: &mut [u8]) {
    let (source, target) = (bytemuck::cast_slice(source), bytemuck::cast_slice_mut(target));
    #[cfg(target_arch = "x86_64")]
    if has_conversions() {
        // SAFETY: the processor has what the function is compiled for.
        return unsafe { decode_by_vectors(source, target) };
    }
    source.convert_to_f32_slice(target);
}

/// The nearest `f16` of each of a block of `f32`, of two the one whose last bit is 0.
pub(super) fn encode(source: &[u8], target: &mut [u8]) {
    let (source, target) = (bytemuck::cast_slice(source), bytemuck::cast_slice_mut::<u8, f16>(target));
    #[cfg(target_arch = "x86_64")]
    if has_conversions() {
        // SAFETY: the processor has what the function is compiled for.
        return unsafe { encode_by_vectors(source, target) };
    }
    target.convert_from_f32_slice(source);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx,f16c")]
fn decode_by_vectors(source: &[f16], target: &mut [f32]) {
    let (sources, source_rest) = source.as_chunks::<VECTOR>();
    let (targets, target_rest) = target.as_chunks_mut::<VECTOR>();
    for (target, source) in targets.iter_mut().zip(sources) {
        *target = bytemuck::cast::<__m256, _>(_mm256_cvtph_ps(bytemuck::cast::<_, __m128i>(*source)));
    }
    source_rest.convert_to_f32_slice(target_rest);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx,f16c")]
fn encode_by_vectors(source: &[f32], target: &mut [f16]) {
    let (sources, source_rest) = source.as_chunks::<VECTOR>();
    let (targets, target_rest) = target.as_chunks_mut::<VECTOR>();
    for (target, source) in targets.iter_mut().zip(sources) {
        let narrow: __m128i = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(bytemuck::cast::<_, __m256>(*source));
        *target = bytemuck::cast(narrow);
    }
    target_rest.convert_from_f32_slice(source_rest);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `half` gives one at a time, which does not depend on the place in a block.
    #[test]
    fn every_code_and_what_lies_around_it_are_as_one_at_a_time() {
        let codes: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
        for skip in [0, 1, 7] {
            let codes = &codes[skip..];
            let mut values = vec![0.0_f32; codes.len()];
            decode(bytemuck::cast_slice(codes), bytemuck::cast_slice_mut(&mut values));
            for (code, value) in codes.iter().zip(&values) {
                assert_eq!(value.to_bits(), f32::from(*code).to_bits(), "{:#x}", code.to_bits());
            }
            // Half the step to the next code is a tie; one bit more or less is none.
            for bits in [0, 1, 0xfff, 0x1000, 0x1001] {
                let near: Vec<_> = values.iter().map(|value| f32::from_bits(value.to_bits() | bits)).collect();
                let mut narrow = vec![f16::ZERO; near.len()];
                encode(bytemuck::cast_slice(&near), bytemuck::cast_slice_mut(&mut narrow));
                for (value, narrow) in near.iter().zip(&narrow) {
                    assert_eq!(narrow.to_bits(), f16::from_f32(*value).to_bits(), "{:#x}", value.to_bits());
                }
            }
        }
    }
}
