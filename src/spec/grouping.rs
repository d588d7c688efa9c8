//! From layers to layer groups that share one pool of equal-sized blocks.
//!
//! Layers are bucketed by kind, sinks and shape. A group holds as many layers as the smallest bucket, or as
//! the largest when that is less than half as much again; a bucket's layers are dealt to its groups in turn.
//! A block is one row of layer slots. Where shapes differ, the group with fewer bytes per token gets larger
//! blocks, if a power of two within the supported sizes makes up the difference; else its blocks are padded.
//! (The rule is vLLM's, `kv_cache_planning`.)

use super::{AttentionKind, LayerSpec};
use crate::abi;
use crate::error::{Error, Result};
use crate::layout::KvShape;

/// Block sizes that the kernels know.
const BLOCK_SIZES: std::ops::RangeInclusive<u32> = 8..=128;
/// Blocks begin on multiples of this many bytes.
const BLOCK_ALIGNMENT: usize = 128;

/// Layers that share block ids: same kind, same sinks, same KV shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerGroup {
    /// What its layers' queries see.
    pub kind: AttentionKind,
    /// Sink tokens of its layers.
    pub sink_tokens: u32,
    /// KV shape of its layers.
    pub shape: KvShape,
    /// Tokens per block: a power of two, 8 to 128.
    pub block_size: u32,
    /// Model layer of each layer slot.
    pub layers: Vec<u32>,
    /// Layer slots per block, padding included (at least `layers.len()`).
    pub layer_slots: u32,
}

/// All groups of a model over one pool of equal-sized blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupPlan {
    /// Groups, full attention first.
    pub groups: Vec<LayerGroup>,
    /// Bytes of one block of the pool (the same for every group; a multiple of 128).
    pub block_bytes: usize,
}

impl LayerGroup {
    /// Bytes of a block that hold K and V of the group's layers, padding left out.
    pub fn used_bytes(&self) -> usize {
        self.layers.len() * self.block_size as usize * self.shape.token_bytes()
    }
}

impl GroupPlan {
    /// The window table, one row per model layer.
    pub fn window_table(&self) -> Vec<abi::hkv_window> {
        // An extent beyond the range of a length in the kernels hides as little as the largest one.
        let clamp = |n: u32| i32::try_from(n).unwrap_or(i32::MAX);
        let mut rows: Vec<(u32, abi::hkv_window)> = Vec::new();
        for (g, group) in self.groups.iter().enumerate() {
            let (kind, extent) = match group.kind {
                AttentionKind::Full => (abi::HKV_LAYER_FULL, 0),
                AttentionKind::Sliding { window } => (abi::HKV_LAYER_SLIDING, window),
                AttentionKind::Chunked { chunk } => (abi::HKV_LAYER_CHUNKED, chunk),
            };
            rows.extend(group.layers.iter().enumerate().map(|(slot, &layer)| {
                let row = abi::hkv_window {
                    kind: kind as i32,
                    extent: clamp(extent),
                    sink_tokens: clamp(group.sink_tokens),
                    group: g as i32,
                    layer_slot: slot as i32,
                    reserved: [0; 3],
                };
                (layer, row)
            }));
        }
        rows.sort_by_key(|&(layer, _)| layer);
        rows.into_iter().map(|(_, row)| row).collect()
    }
}

pub(super) fn group(layers: &[LayerSpec], block_size: u32) -> Result<GroupPlan> {
    const OP: &str = "group layers";
    if !BLOCK_SIZES.contains(&block_size) || !block_size.is_power_of_two() {
        return Err(Error::unsupported(OP, "block_size", block_size, "8, 16, 32, 64, 128"));
    }
    let mut buckets: Vec<(LayerSpec, Vec<u32>)> = Vec::new();
    for (index, layer) in layers.iter().enumerate() {
        layer.kind.check(OP)?;
        match buckets.iter_mut().find(|(of, _)| of == layer) {
            Some((_, bucket)) => bucket.push(index as u32),
            None => buckets.push((*layer, vec![index as u32])),
        }
    }
    buckets.sort_by_key(|(of, _)| of.kind != AttentionKind::Full);
    let sizes = || buckets.iter().map(|(_, bucket)| bucket.len());
    let (Some(min), Some(max)) = (sizes().min(), sizes().max()) else {
        return Err(Error::invalid(OP, "the model has no attention layers"));
    };
    let layer_slots = if 2 * max < 3 * min { max } else { min };

    let largest = buckets.iter().map(|(of, _)| of.shape.token_bytes()).max().unwrap_or(0);
    let mut groups = Vec::new();
    for (of, bucket) in &buckets {
        let num_groups = bucket.len().div_ceil(layer_slots);
        for first in 0..num_groups {
            groups.push(LayerGroup {
                kind: of.kind,
                sink_tokens: of.sink_tokens,
                shape: of.shape,
                block_size: unified_block_size(of.shape.token_bytes(), largest, block_size),
                layers: bucket[first..].iter().step_by(num_groups).copied().collect(),
                layer_slots: layer_slots as u32,
            });
        }
    }
    let block_bytes = groups
        .iter()
        .map(|group| {
            layer_slots
                .checked_mul(group.block_size as usize)?
                .checked_mul(group.shape.token_bytes())?
                .checked_next_multiple_of(BLOCK_ALIGNMENT)
        })
        .try_fold(0, |most, bytes| bytes.map(|bytes| most.max(bytes)))
        .ok_or_else(|| Error::invalid(OP, "a block has more bytes than can be addressed"))?;
    Ok(GroupPlan { groups, block_bytes })
}

/// The block size at which blocks of `token_bytes` per layer and token have the bytes of those of `largest`,
/// when there is one; else `block_size`, and the block is padded.
fn unified_block_size(token_bytes: usize, largest: usize, block_size: u32) -> u32 {
    let ratio = match token_bytes {
        0 => 0,
        bytes if largest.is_multiple_of(bytes) => largest / bytes,
        _ => 0,
    };
    u32::try_from(ratio)
        .ok()
        .filter(|ratio| ratio.is_power_of_two())
        .and_then(|ratio| block_size.checked_mul(ratio))
        .filter(|scaled| BLOCK_SIZES.contains(scaled))
        .unwrap_or(block_size)
}
