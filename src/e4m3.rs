//! The 8-bit float of quantised keys and values: OCP e4m3 ("e4m3fn"), bit by bit as the GPU converts it.
//!
//! One sign bit, 4 exponent bits of bias 7, 3 mantissa bits. There are no infinities; an all-ones
//! magnitude is NaN, so that the largest value is 448 and the smallest 2^-9. Every value is exact in f16.
//! Source: "OCP 8-bit Floating Point Specification (OFP8)", revision 1.0.

/// The largest finite value.
pub const MAX: f32 = 448.0;
/// The smallest scale that `append` computes, 2^-100: its inverse times any row stays in range.
pub const LEAST_SCALE: f32 = f32::from_bits((127 - 100) << 23);
/// NaN, without its sign.
const NAN: u8 = 0x7f;

/// The value of an element.
pub fn to_f32(bits: u8) -> f32 {
    let magnitude = bits & NAN;
    let value = match (magnitude >> 3, magnitude & 7) {
        (15, 7) => f32::NAN,
        (0, mantissa) => f32::from(mantissa) / 512.0,
        (exponent, mantissa) => {
            f32::from_bits((u32::from(exponent) + 120) << 23 | u32::from(mantissa) << 20)
        }
    };
    if bits > NAN { -value } else { value }
}

/// The nearest element, ties to even; beyond the largest value that one, of infinities too. NaN becomes
/// 0x7f, whatever its sign.
pub fn from_f32(value: f32) -> u8 {
    if value.is_nan() {
        return NAN;
    }
    let sign = ((value.to_bits() >> 31) as u8) << 7;
    let magnitude = value.abs().min(MAX);
    let code = if magnitude < 0.015625 {
        // Multiples of 2^-9 below the smallest normal value, 2^-6; rounding up to it gives its code.
        (magnitude * 512.0).round_ties_even() as u8
    } else {
        // Drop 20 mantissa bits; a carry moves into the exponent, as it should.
        let bits = magnitude.to_bits();
        let rounded = bits + 0x7ffff + (bits >> 20 & 1);
        ((rounded >> 20) - (120 << 3)) as u8
    };
    sign | code
}

/// The scale with which `append` stores a row that has its own: the largest magnitude becomes [`MAX`]. NaN is
/// passed over; no scale is less than [`LEAST_SCALE`].
pub fn row_scale(row: &[f32]) -> f32 {
    let largest = row.iter().fold(0f32, |max, x| max.max(x.abs()));
    (largest / MAX).max(LEAST_SCALE)
}

/// The elements with which `append` stores a row under a scale, in f32 arithmetic, to the bit. The shorter of
/// row and target counts.
pub fn quantise(row: &[f32], scale: f32, target: &mut [u8]) {
    let inverse = 1.0 / scale;
    for (element, x) in target.iter_mut().zip(row) {
        *element = from_f32(x * inverse);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_survives_the_way_there_and_back() {
        for bits in 0..=u8::MAX {
            let value = to_f32(bits);
            let back = from_f32(value);
            if value.is_nan() {
                assert_eq!((bits & NAN, back), (NAN, NAN));
            } else {
                assert_eq!(back, bits, "{value}");
            }
        }
    }

    /// From the definition: the nearest of all values, of two as near the one with an even code.
    fn nearest(value: f32) -> u8 {
        let magnitude = f64::from(value.abs());
        let distance = |code: &u8| (f64::from(to_f32(*code)) - magnitude).abs();
        let best = (0..NAN).map(|code| distance(&code)).fold(f64::INFINITY, f64::min);
        let mut near = (0..NAN).filter(|code| distance(code) == best);
        let first = near.next().unwrap();
        let code = near.next().filter(|second| second % 2 == 0).unwrap_or(first);
        code | if value.is_sign_negative() { 0x80 } else { 0 }
    }

    proptest::proptest! {
        #[test]
        fn rounding_is_to_the_nearest_and_saturates(bits: u32, small in -500f32..500.0) {
            for value in [small, small / 4096.0, f32::from_bits(bits)] {
                if value.is_nan() {
                    assert_eq!(from_f32(value), NAN);
                } else if value.abs() > MAX {
                    assert_eq!(from_f32(value), if value > 0.0 { 0x7e } else { 0xfe });
                } else {
                    assert_eq!(from_f32(value), nearest(value), "{value}");
                }
            }
        }
    }

    #[test]
    fn ties_go_to_even_codes() {
        for code in 0..0x7e {
            let tie = (to_f32(code) + to_f32(code + 1)) / 2.0;
            assert_eq!(from_f32(tie), code + code % 2, "{tie}");
            assert_eq!(from_f32(-tie), 0x80 | (code + code % 2), "{tie}");
        }
    }
}
