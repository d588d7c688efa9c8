//! Identity of cached blocks: a chain of cryptographic hashes over tokens.
//!
//! `h(-1) = BLAKE3(key = identity; framed extra keys)`, `h(i) = BLAKE3(key = h(i-1); tokens of block i)`,
//! tokens as little-endian 32-bit words. Keying with the parent makes a block of 16 tokens exactly one
//! compression, and a hash stands for all tokens up to its end, for the extra keys and for the identity.

use std::hash::{Hash, Hasher};

use super::ExtraKeys;

/// Hash of a block and of everything before it: the first 128 bits of its chain value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockHash([u8; 16]);

impl BlockHash {
    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl Hash for BlockHash {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(&self.0);
    }
}

/// Hasher for keys that are hashes already: takes their first eight bytes.
#[derive(Default, Clone, Copy)]
pub(super) struct PassThrough(u64);

impl Hasher for PassThrough {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        let mut word = [0; 8];
        let n = bytes.len().min(8);
        word[..n].copy_from_slice(&bytes[..n]);
        self.0 ^= u64::from_le_bytes(word);
    }
}

/// The chain value after some whole number of blocks.
#[derive(Clone, Copy)]
pub(super) struct Chain([u8; 32]);

impl Chain {
    /// The value before the first block.
    pub fn new(identity: &[u8; 32], hash_block: usize, keys: ExtraKeys<'_>) -> Self {
        let mut hasher = blake3::Hasher::new_keyed(identity);
        // Every frame is a tag, a length and that many bytes: no two different lists of keys can give
        // the same bytes.
        let mut frame = |tag: u8, bytes: &[u8]| {
            hasher.update(&[tag]);
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        frame(b'b', &(hash_block as u64).to_le_bytes());
        frame(b's', keys.salt.as_bytes());
        frame(b'l', keys.lora.as_bytes());
        Self(*hasher.finalize().as_bytes())
    }

    /// Steps over the tokens of one block and gives its hash.
    pub fn push(&mut self, tokens: &[u32]) -> BlockHash {
        #[cfg(target_endian = "little")]
        let digest = blake3::keyed_hash(&self.0, bytemuck::cast_slice(tokens));
        #[cfg(target_endian = "big")]
        let digest = {
            let bytes: Vec<u8> = tokens.iter().flat_map(|t| t.to_le_bytes()).collect();
            blake3::keyed_hash(&self.0, &bytes)
        };
        self.0 = *digest.as_bytes();
        let mut short = [0; 16];
        short.copy_from_slice(&self.0[..16]);
        BlockHash(short)
    }
}
