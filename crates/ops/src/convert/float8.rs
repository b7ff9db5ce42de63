//! 8-bit floats: torch's `float8_e4m3fn` and `float8_e5m2`.
//!
//! E4M3 has no infinities: the one code with all bits set is NaN, and 448 is the largest number, to which all that is larger
//! saturates, infinity too. (Older versions of torch made it NaN.) E5M2 is laid out as IEEE formats are: what rounds beyond 57344 is
//! infinite.

/// Mantissa bits of E4M3, which tell the two formats apart.
pub(super) const E4M3: u32 = 3;
/// Mantissa bits of E5M2.
pub(super) const E5M2: u32 = 2;

/// Mantissa bits of an `f32`.
const F32_MANTISSA: u32 = 23;
/// What is added to the exponent of an `f32`.
const F32_BIAS: u32 = 127;

/// What is added to the exponent.
const fn bias(mantissa: u32) -> u32 {
    if mantissa == E4M3 { 7 } else { 15 }
}

/// The value of a code.
pub(super) fn decode<const MANTISSA: u32>(code: u8) -> f32 {
    let (sign, magnitude) = (u32::from(code & 0x80) << 24, u32::from(code & 0x7f));
    let infinity = 0x1f << E5M2;
    if MANTISSA == E4M3 && magnitude == 0x7f || MANTISSA == E5M2 && magnitude > infinity {
        return f32::from_bits(sign | f32::NAN.to_bits());
    }
    if MANTISSA == E5M2 && magnitude == infinity {
        return f32::from_bits(sign | f32::INFINITY.to_bits());
    }
    // As an `f32` the bits are a number that is too small by a power of two, exactly; subnormal ones are normalised thereby.
    let shifted = f32::from_bits(magnitude << (F32_MANTISSA - MANTISSA));
    let scale = f32::from_bits((2 * F32_BIAS - bias(MANTISSA)) << F32_MANTISSA);
    f32::from_bits((shifted * scale).to_bits() | sign)
}

/// The nearest code; of two the one whose last bit is 0.
pub(super) fn encode<const MANTISSA: u32>(value: f32) -> u8 {
    let (drop, bias) = (F32_MANTISSA - MANTISSA, bias(MANTISSA));
    let (sign, bits) = ((value.to_bits() >> 24) as u8 & 0x80, value.to_bits() & 0x7fff_ffff);
    let magnitude = if bits < (F32_BIAS - bias + 1) << F32_MANTISSA {
        // A subnormal code counts steps of the smallest one. Beside a number whose last bit is worth a step, the sum rounds to it.
        let steps = f32::from_bits((F32_BIAS - bias + 1 + drop) << F32_MANTISSA);
        (f32::from_bits(bits) + steps).to_bits() - steps.to_bits()
    } else {
        let half = (1 << (drop - 1)) - 1;
        let rounded = bits + half + ((bits >> drop) & 1);
        (rounded >> drop) - ((F32_BIAS - bias) << MANTISSA)
    };
    let is_nan = bits > f32::INFINITY.to_bits();
    let largest = if MANTISSA == E4M3 { 0x7e } else { 0x1f << E5M2 };
    sign | if is_nan { 0x7f } else { magnitude.min(largest) as u8 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_the_nearest_of_its_value() {
        for code in 0..=255 {
            for (decoded, encoded) in [
                (decode::<E4M3>(code), encode::<E4M3>(decode::<E4M3>(code))),
                (decode::<E5M2>(code), encode::<E5M2>(decode::<E5M2>(code))),
            ] {
                if decoded.is_nan() {
                    assert_eq!(encoded & 0x7f, 0x7f, "{code:#x}");
                } else {
                    assert_eq!(encoded, code, "{decoded}");
                }
            }
        }
    }

    #[test]
    fn limits_are_those_of_the_formats() {
        assert_eq!((decode::<E4M3>(0x7e), decode::<E4M3>(0x01), decode::<E4M3>(0x08)), (448.0, 0.001953125, 0.015625));
        assert_eq!((decode::<E5M2>(0x7b), decode::<E5M2>(0x01)), (57344.0, 2.0_f32.powi(-16)));
        assert_eq!((encode::<E4M3>(464.0), encode::<E4M3>(464.1), encode::<E4M3>(f32::INFINITY)), (0x7e, 0x7e, 0x7e));
        assert_eq!((encode::<E5M2>(61439.0), encode::<E5M2>(61440.0), encode::<E5M2>(-1e9)), (0x7b, 0x7c, 0xfc));
        assert_eq!((encode::<E4M3>(-0.0), encode::<E5M2>(f32::NAN)), (0x80, 0x7f));
    }
}
