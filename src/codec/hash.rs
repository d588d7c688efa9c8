//! The content hash of a slot: one 64-bit number that any number of threads compute together.
//!
//! The slot is a sequence of 8-byte words, little endian; word `i` adds `mix(word ^ (i + 1) * GOLDEN)`, modulo
//! 2^64, but for the word that holds the hash itself. Addition commutes, so the order, and the grid of a kernel,
//! does not matter.
//!
//! What it detects: every change within one word, so every single flipped bit, for certain, as `mix` is a
//! bijection; every other change (words damaged, exchanged, taken from another slot) but with a chance of
//! 2^-64. It is no protection against someone who forges slots.

use super::Header;

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// The finaliser of splitmix64 (Steele, Lea, Flood 2014; constants by Stafford), a bijection of 64 bits in which
/// every bit depends on every other.
const fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// Content hash of the bytes of a slot, of whole 8-byte words (others count as followed by zeros).
pub fn content_hash(slot: &[u8]) -> u64 {
    let (words, rest) = slot.as_chunks::<8>();
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    let (mut sum, mut key) = (0u64, 0u64);
    for word in words {
        key = key.wrapping_add(GOLDEN);
        sum = sum.wrapping_add(mix(u64::from_le_bytes(*word) ^ key));
    }
    if !rest.is_empty() {
        key = key.wrapping_add(GOLDEN);
        sum = sum.wrapping_add(mix(u64::from_le_bytes(last) ^ key));
    }
    // Taking one out is cheaper than asking every word whether it is the one.
    if let Some(word) = words.get(Header::HASH_WORD) {
        let key = GOLDEN.wrapping_mul(Header::HASH_WORD as u64 + 1);
        sum = sum.wrapping_sub(mix(u64::from_le_bytes(*word) ^ key));
    }
    sum
}
