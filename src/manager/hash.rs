//! Identity of cached blocks: a chain of cryptographic hashes over tokens.
//!
//! `h(-1) = BLAKE3(key = identity; framed extra keys)` and `h(i) = BLAKE3(key = h(i-1), zeros; tokens of
//! unit i)`, each cut to 128 bits, tokens as little-endian 32-bit words. Keying with the parent makes a unit
//! of 16 tokens exactly one compression, and a hash stands for all tokens up to its end, for the extra keys
//! and for the identity.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hash, Hasher};

use super::ExtraKeys;

/// Hash of a block and of everything before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockHash([u8; 16]);

impl BlockHash {
    /// Stands for no block.
    pub const NONE: Self = Self([0; 16]);

    /// The hash of these bytes, which [`Self::as_bytes`] gave.
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// A number for the content of this hash in a group, other than the one that maps go by.
    pub(super) fn key(&self, group: usize) -> u64 {
        let mut word = [0; 8];
        word.copy_from_slice(&self.0[8..]);
        u64::from_le_bytes(word) ^ (group as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15)
    }

    /// The hash of the unit of `tokens` that follows.
    fn next(&self, tokens: &[u32]) -> Self {
        let mut key = [0; 32];
        key[..16].copy_from_slice(&self.0);
        #[cfg(target_endian = "little")]
        let digest = blake3::keyed_hash(&key, bytemuck::cast_slice(tokens));
        #[cfg(target_endian = "big")]
        let digest = {
            let bytes: Vec<u8> = tokens.iter().flat_map(|t| t.to_le_bytes()).collect();
            blake3::keyed_hash(&key, &bytes)
        };
        Self::cut(digest)
    }

    fn cut(digest: blake3::Hash) -> Self {
        let mut short = [0; 16];
        short.copy_from_slice(&digest.as_bytes()[..16]);
        Self(short)
    }
}

impl Hash for BlockHash {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(&self.0);
    }
}

/// Hasher for block hashes, which it takes as they are, and for numbers given out in sequence, which it
/// spreads.
#[derive(Default, Clone, Copy)]
pub(super) struct CheapHasher(u64);

impl Hasher for CheapHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        let mut word = [0; 8];
        let n = bytes.len().min(8);
        word[..n].copy_from_slice(&bytes[..n]);
        self.0 ^= u64::from_le_bytes(word);
    }

    fn write_u64(&mut self, n: u64) {
        // A folded multiplication by an odd constant: every bit of `n` reaches both halves of the result.
        let product = u128::from(n ^ self.0) * 0x9E37_79B9_7F4A_7C15;
        self.0 = product as u64 ^ (product >> 64) as u64;
    }
}

/// A map with that hasher.
pub(super) type CheapMap<K, V> = HashMap<K, V, BuildHasherDefault<CheapHasher>>;

/// Tokens of a sequence, hashed: once for all lookups while it waits, and further as it grows.
#[derive(Debug, Clone)]
pub struct HashedTokens {
    /// Of the manager whose blocks they can name.
    identity: [u8; 32],
    num_tokens: usize,
    /// Tokens per hashed unit; 0 hashes nothing.
    unit: usize,
    /// What stands before the first unit.
    seed: BlockHash,
    /// Of the cache salt alone.
    salt: BlockHash,
    /// Hashes of all full units.
    hashes: Vec<BlockHash>,
    /// All tokens, so that any of them can be taken back; none where nothing is hashed.
    tokens: Vec<u32>,
}

impl HashedTokens {
    /// No tokens yet, under an identity and extra keys, in units of [`Manager::hash_unit`] tokens: for those
    /// who follow a manager's events from afar, and hash prompts as it does. A unit of 0 hashes nothing.
    ///
    /// [`Manager::hash_unit`]: super::Manager::hash_unit
    pub fn new(identity: &[u8; 32], unit: usize, keys: ExtraKeys<'_>) -> Self {
        let mut hasher = blake3::Hasher::new_keyed(identity);
        // Every frame is a tag, a length and that many bytes: no two different lists of keys can give
        // the same bytes.
        let mut frame = |tag: u8, bytes: &[u8]| {
            hasher.update(&[tag]);
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        frame(b'b', &(unit as u64).to_le_bytes());
        frame(b's', keys.salt.as_bytes());
        frame(b'l', keys.lora.as_bytes());
        let seed = BlockHash::cut(hasher.finalize());
        Self {
            identity: *identity,
            num_tokens: 0,
            unit,
            seed,
            salt: Self::salt_of(keys.salt),
            hashes: Vec::new(),
            tokens: Vec::new(),
        }
    }

    /// Whether they were hashed under this identity, in units of so many tokens.
    pub(super) fn are_of(&self, identity: &[u8; 32], unit: usize) -> bool {
        self.unit == unit && self.identity == *identity
    }

    /// Makes room for `tokens` tokens in all.
    pub(super) fn reserve(&mut self, tokens: usize) {
        if let Some(units) = tokens.checked_div(self.unit) {
            self.hashes.reserve_exact(units.saturating_sub(self.hashes.len()));
            self.tokens.reserve_exact(tokens.saturating_sub(self.tokens.len()));
        }
    }

    /// Bytes of tokens and hashes, with the room these have to grow.
    pub(super) fn bytes(&self) -> usize {
        self.hashes.capacity() * size_of::<BlockHash>() + self.tokens.capacity() * size_of::<u32>()
    }

    /// The name of a cache salt.
    pub(super) fn salt_of(salt: &str) -> BlockHash {
        BlockHash::cut(blake3::hash(salt.as_bytes()))
    }

    /// The name of the cache salt.
    pub(super) fn salt(&self) -> BlockHash {
        self.salt
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.num_tokens
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.num_tokens == 0
    }

    /// Hashes of all full units.
    pub fn hashes(&self) -> &[BlockHash] {
        &self.hashes
    }

    /// Adds tokens.
    pub fn push(&mut self, tokens: &[u32]) {
        self.num_tokens += tokens.len();
        if self.unit == 0 {
            return;
        }
        self.tokens.extend_from_slice(tokens);
        if self.tokens.len() < (self.hashes.len() + 1) * self.unit {
            return;
        }
        let mut last = self.hashes.last().copied().unwrap_or(self.seed);
        let units = self.tokens[self.hashes.len() * self.unit..].chunks_exact(self.unit);
        self.hashes.reserve(units.len());
        for unit in units {
            last = last.next(unit);
            self.hashes.push(last);
        }
    }

    /// A key for block `index` of one sequence alone: its generation is no other's, and no tokens hash to
    /// it.
    pub(super) fn private(&self, generation: u64, index: usize) -> BlockHash {
        let mut key = [0; 32];
        key[..16].copy_from_slice(&self.seed.0);
        // Chained hashes are keyed with zeros in this half.
        key[16..].copy_from_slice(b"private to a seq");
        let mut name = [0; 16];
        name[..8].copy_from_slice(&generation.to_le_bytes());
        name[8..].copy_from_slice(&(index as u64).to_le_bytes());
        BlockHash::cut(blake3::keyed_hash(&key, &name))
    }

    /// Takes back all but the first `n` tokens; none when there are fewer.
    pub fn truncate(&mut self, n: usize) {
        let n = n.min(self.num_tokens);
        self.num_tokens = n;
        if let Some(units) = n.checked_div(self.unit) {
            self.hashes.truncate(units);
            self.tokens.truncate(n);
        }
    }
}
