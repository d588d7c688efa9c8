//! Exponents of bf16 as places in a window of 15 below the largest of their channel: what `lx4` and `lxe` share.
//!
//! Channels of K differ in magnitude, by a factor of 40 in models with biases, so each has a window of its own;
//! those of V do not and share that of their plane. Sign and mantissa, the other 8 bits, stay as they are.

/// Codes of a window. Code 0 marks an exponent below it: an escape.
const WINDOW: u8 = 15;

/// The windows of a plane: the largest exponent of all, and how far below it each channel's is, up to 15.
pub(super) struct Windows {
    pub base: u8,
    pub below: Vec<u8>,
}

impl Windows {
    /// Of a plane `[token][dim]` of K or V.
    pub fn of(plane: &[u16], dim: usize, is_key: bool) -> Self {
        let mut below = vec![0; dim];
        for row in plane.chunks_exact(dim) {
            for (largest, element) in below.iter_mut().zip(row) {
                *largest = exponent(*element).max(*largest);
            }
        }
        let base = below.iter().copied().max().unwrap_or(0);
        for below in &mut below {
            *below = if is_key { (base - *below).min(15) } else { 0 };
        }
        Self { base, below }
    }

    /// Writes of every element its code, exponent + 15 - window or 0, and its sign and mantissa.
    pub fn split(&self, plane: &[u16], codes: &mut [u8], bytes: &mut [u8]) {
        let dim = self.below.len();
        // Of the exponent with code 0; of small exponents it lies below them all.
        let lowest: Vec<i16> = self
            .below
            .iter()
            .map(|below| i16::from(self.base) - i16::from(*below) - i16::from(WINDOW))
            .collect();
        let rows = plane.chunks_exact(dim).zip(codes.chunks_exact_mut(dim));
        for ((row, codes), bytes) in rows.zip(bytes.chunks_exact_mut(dim)) {
            for (((element, code), byte), lowest) in row.iter().zip(codes).zip(bytes).zip(&lowest) {
                *code = (i16::from(exponent(*element)) - lowest).max(0) as u8;
                *byte = (element >> 8) as u8 & 0x80 | *element as u8 & 0x7f;
            }
        }
    }
}

/// The exponent of code 0 in the window that is `below` the base. Modulo 2^8: encoders write none less than 0.
pub(super) fn lowest(base: u8, below: u8) -> u8 {
    base.wrapping_sub(WINDOW).wrapping_sub(below)
}

/// Writes a plane `[token][dim]`, where each channel has its `lowest`: elements of these codes, signs and mantissas.
/// Those of code 0 are not right yet.
pub(super) fn join(lowest: &[u8], codes: &[u8], bytes: &[u8], plane: &mut [u16]) {
    let dim = lowest.len();
    let rows = plane.chunks_exact_mut(dim).zip(codes.chunks_exact(dim));
    for ((row, codes), bytes) in rows.zip(bytes.chunks_exact(dim)) {
        for (((element, code), byte), lowest) in row.iter_mut().zip(codes).zip(bytes).zip(lowest) {
            *element = element_of(*byte, lowest.wrapping_add(*code));
        }
    }
}

pub(super) fn exponent(element: u16) -> u8 {
    (element >> 7) as u8
}

/// The element of this sign and mantissa, and this exponent.
pub(super) fn element_of(byte: u8, exponent: u8) -> u16 {
    u16::from(byte & 0x80) << 8 | u16::from(exponent) << 7 | u16::from(byte & 0x7f)
}
