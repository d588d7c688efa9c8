//! Arrays of codes narrower than a byte, the first code in the lowest bits, and sections of a payload.

/// Packs the low 4 bits of each code, two to a byte.
pub(super) fn pack_nibbles(codes: &[u8], bytes: &mut [u8]) {
    for (byte, pair) in bytes.iter_mut().zip(codes.as_chunks::<2>().0) {
        *byte = pair[0] & 15 | pair[1] << 4;
    }
}

/// The codes of `pack_nibbles`.
pub(super) fn unpack_nibbles(bytes: &[u8], codes: &mut [u8]) {
    for (byte, pair) in bytes.iter().zip(codes.as_chunks_mut::<2>().0) {
        *pair = [byte & 15, byte >> 4];
    }
}

/// Packs the low 2 bits of each code above bit 4, four to a byte.
pub(super) fn pack_high_pairs(codes: &[u8], bytes: &mut [u8]) {
    for (byte, four) in bytes.iter_mut().zip(codes.as_chunks::<4>().0) {
        *byte = four.iter().rev().fold(0, |byte, code| byte << 2 | code >> 4 & 3);
    }
}

/// Adds the bits of `pack_high_pairs` to codes that have their low 4.
pub(super) fn unpack_high_pairs(bytes: &[u8], codes: &mut [u8]) {
    for (byte, four) in bytes.iter().zip(codes.as_chunks_mut::<4>().0) {
        for (i, code) in four.iter_mut().enumerate() {
            *code |= (byte >> (2 * i) & 3) << 4;
        }
    }
}

/// `bytes` up to the next multiple of 16, at which the next section begins.
pub(super) const fn section(bytes: usize) -> usize {
    bytes.next_multiple_of(16)
}

/// Cuts a payload into sections of these lengths.
pub(super) fn sections<const N: usize>(mut payload: &[u8], lengths: [usize; N]) -> [&[u8]; N] {
    lengths.map(|length| {
        let (section, rest) = payload.split_at(length.min(payload.len()));
        payload = rest;
        section
    })
}

/// Likewise, to write into.
pub(super) fn sections_mut<const N: usize>(
    mut payload: &mut [u8],
    lengths: [usize; N],
) -> [&mut [u8]; N] {
    lengths.map(|length| {
        let whole = std::mem::take(&mut payload);
        let (section, rest) = whole.split_at_mut(length.min(whole.len()));
        payload = rest;
        section
    })
}
