//! Rounding between f32 and 16-bit elements, the same on CPU and GPU.

use half::{bf16, f16};

use super::Fallback;
use crate::layout::Dtype;

/// Value of a 16-bit pattern.
pub(super) fn to_f32(dtype: Dtype, bits: u16) -> f32 {
    match dtype {
        Dtype::F16 => f16::from_bits(bits).to_f32(),
        _ => f32::from_bits(u32::from(bits) << 16),
    }
}

/// The nearest pattern, ties to even; infinite beyond the largest.
pub(super) fn nearest(dtype: Dtype, x: f32) -> u16 {
    match dtype {
        Dtype::F16 => f16::from_f32(x).to_bits(),
        _ => bf16::from_f32(x).to_bits(),
    }
}

/// The nearest finite pattern, ties to even: what decoding gives.
pub(super) fn saturating(dtype: Dtype, x: f32) -> u16 {
    let largest = match dtype {
        Dtype::F16 => f16::MAX.to_f32(),
        _ => bf16::MAX.to_f32(),
    };
    nearest(dtype, x.clamp(-largest, largest))
}

/// The least pattern that is not below `x`.
pub(super) fn up(dtype: Dtype, x: f32) -> u16 {
    let bits = nearest(dtype, x);
    if to_f32(dtype, bits) < x { next_up(bits) } else { bits }
}

/// The largest pattern that is not above `x`.
pub(super) fn down(dtype: Dtype, x: f32) -> u16 {
    let bits = nearest(dtype, x);
    if to_f32(dtype, bits) > x { next_up(bits ^ SIGN) ^ SIGN } else { bits }
}

const SIGN: u16 = 0x8000;

/// The pattern above, of one that is not the largest; -0 stands for 0.
fn next_up(bits: u16) -> u16 {
    match bits {
        SIGN => 1,
        0..SIGN => bits + 1,
        _ => bits - 1,
    }
}

/// Whether a pattern is neither NaN nor infinite.
pub(super) fn is_finite(dtype: Dtype, bits: u16) -> bool {
    let exponent = match dtype {
        Dtype::F16 => 0x7c00,
        _ => 0x7f80,
    };
    bits & exponent != exponent
}

/// Refuses a block with a pattern that is NaN or infinite.
pub(super) fn require_finite(dtype: Dtype, block: &[u16]) -> Result<(), Fallback> {
    let finite = block.iter().all(|bits| is_finite(dtype, *bits));
    finite.then_some(()).ok_or(Fallback::NotFinite)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn rounding_up_and_down_encloses_the_value(x in any::<f32>(), f16: bool) {
            let dtype = if f16 { Dtype::F16 } else { Dtype::Bf16 };
            let (low, high) = (to_f32(dtype, down(dtype, x)), to_f32(dtype, up(dtype, x)));
            prop_assert!(low <= x && x <= high, "{low} {x} {high}");
            let exact = to_f32(dtype, nearest(dtype, x));
            prop_assert!(exact == low || exact == high);
            // Neighbours, or the value itself.
            if low != high {
                prop_assert_eq!(to_f32(dtype, next_up(down(dtype, x))), high);
            }
        }
    }
}
