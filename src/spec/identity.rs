//! Identity of cached keys and values: a digest of all that makes the bytes of a block what they are.
//!
//! It seeds the hashes of a manager and names the folder of a store. Whatever changes a byte of a block or its
//! meaning changes the digest, so that blocks of another element type (a lossy one, too), shape, layout or scale
//! have other keys and another namespace: they cannot be found, let alone be taken for something else (R9).

use super::{AttentionKind, GroupPlan};

/// What a block is of, besides what a [`GroupPlan`] says. The same on all ranks: the store of a rank has a folder
/// of its own.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Provenance<'a> {
    /// The weights: a name.
    pub model: &'a str,
    /// Which state of the weights: a revision, or a digest of them.
    pub revision: &'a str,
    /// How positions are encoded in keys: kind, base and scaling, in any words that are always the same.
    pub positions: &'a str,
    /// Scales of 8-bit keys and values that belong to the model, in any order that is always the same; none where
    /// every token has its own, since those lie in its block.
    pub scales: &'a [f32],
}

impl GroupPlan {
    /// The identity of this plan's blocks: kinds, sinks, shapes, element types, layers and sizes of all groups, and
    /// where they come from. Blocks are as they were computed: a codec that makes them smaller will be part of it.
    pub fn identity(&self, of: &Provenance<'_>) -> [u8; 32] {
        let mut hasher =
            blake3::Hasher::new_derive_key("hybridkv identity of cached KV, version 1");
        // A list is framed by its tag and its length: no two different ones give the same bytes.
        let mut frame = |tag: u8, bytes: &[u8]| {
            hasher.update(&[tag]);
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        frame(b'm', of.model.as_bytes());
        frame(b'r', of.revision.as_bytes());
        frame(b'p', of.positions.as_bytes());
        let scales: Vec<u8> = of.scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
        frame(b's', &scales);
        let mut numbers = |tag: u8, fields: &[u64], layers: &[u32]| {
            let layers = layers.iter().map(|&layer| u64::from(layer));
            let all = fields.iter().copied().chain(layers);
            frame(tag, &all.flat_map(u64::to_le_bytes).collect::<Vec<u8>>());
        };
        numbers(b'b', &[self.block_bytes as u64], &[]);
        for group in &self.groups {
            let (kind, extent) = match group.kind {
                AttentionKind::Full => (0, 0),
                AttentionKind::Sliding { window } => (1, window),
                AttentionKind::Chunked { chunk } => (2, chunk),
            };
            let shape = group.shape;
            let fields = [
                kind,
                extent,
                group.sink_tokens,
                shape.num_kv_heads,
                shape.head_dim,
                shape.dtype.code(),
                group.block_size,
                group.layer_slots,
            ];
            numbers(b'g', &fields.map(u64::from), &group.layers);
        }
        for group in &self.states {
            let fields = [group.state_bytes as u64, group.block_size.into()];
            numbers(b'n', &fields, &group.layers);
        }
        *hasher.finalize().as_bytes()
    }
}
