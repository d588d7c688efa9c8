//! From layers to layer groups that share one pool of equal-sized blocks.
//!
//! Layers are bucketed by kind, sinks and shape. A group holds as many layers as the smallest bucket, or as
//! the largest when that is less than half as much again; a bucket's layers are dealt to its groups in turn.
//! A block is one row of layer slots. Where shapes differ, the group with fewer bytes per token gets larger
//! blocks, by the largest power of two that the blocks of the others have room for; what is left is padding.
//! (The rule is vLLM's, `kv_cache_planning`, which scales only when nothing is left.)
//!
//! Recurrent layers come after that: a block takes as many of their states as it has room for. They never
//! make blocks larger, which would cost every attention layer memory; states that fit nowhere are refused.

use super::{AttentionKind, LayerSpec, StateSpec};
use crate::abi;
use crate::error::{Error, ErrorKind, Result};
use crate::layout::KvShape;

/// Block sizes that the kernels know.
const BLOCK_SIZES: std::ops::RangeInclusive<u32> = 8..=128;
/// Blocks begin on multiples of this many bytes.
const BLOCK_ALIGNMENT: usize = 128;
/// States begin on multiples of this many bytes.
const STATE_ALIGNMENT: usize = 16;

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

/// Recurrent layers that share block ids: a block holds one state of each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateGroup {
    /// Bytes of the state of a layer. They stand in a block one after another, this far apart.
    pub state_bytes: usize,
    /// Tokens between the places where a state can be kept: the largest block size of the attention groups.
    pub block_size: u32,
    /// Recurrent layer of each slot.
    pub layers: Vec<u32>,
}

/// All groups of a model over one pool of equal-sized blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupPlan {
    /// Attention groups, full ones first.
    pub groups: Vec<LayerGroup>,
    /// Groups of recurrent layers; the manager numbers them after the attention groups.
    pub states: Vec<StateGroup>,
    /// Bytes of one block of the pool (the same for every group; a multiple of 128).
    pub block_bytes: usize,
}

impl LayerGroup {
    /// Bytes of a block that hold K and V of the group's layers, padding left out.
    pub fn used_bytes(&self) -> usize {
        self.layers.len() * self.block_size as usize * self.shape.token_bytes()
    }
}

impl StateGroup {
    /// Bytes of a block that hold states, padding left out.
    pub fn used_bytes(&self) -> usize {
        self.layers.len() * self.state_bytes
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

pub(super) fn group(
    layers: &[LayerSpec],
    states: &[StateSpec],
    block_size: u32,
) -> Result<GroupPlan> {
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
        let count = states.len();
        return Err(Error::invalid(
            OP,
            format!(
                "the model has no attention layers ({count} recurrent ones need no blocks of tokens)"
            ),
        ));
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
                block_size: scaled_block_size(of.shape.token_bytes(), largest, block_size),
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
    let checkpoint = groups.iter().map(|group| group.block_size).max().unwrap_or(block_size);
    let states = group_states(states, checkpoint, block_bytes)?;
    Ok(GroupPlan { groups, states, block_bytes })
}

/// The largest block size at which blocks of `token_bytes` per layer and token have no more bytes than
/// blocks of `block_size` tokens of `largest`.
fn scaled_block_size(token_bytes: usize, largest: usize, block_size: u32) -> u32 {
    let mut scaled = block_size;
    let mut bytes = token_bytes;
    while bytes > 0 && bytes <= largest / 2 && BLOCK_SIZES.contains(&(2 * scaled)) {
        (scaled, bytes) = (2 * scaled, 2 * bytes);
    }
    scaled
}

/// Groups of recurrent layers with equal states, as many per block as it has room for.
fn group_states(
    states: &[StateSpec],
    block_size: u32,
    block_bytes: usize,
) -> Result<Vec<StateGroup>> {
    let mut buckets: Vec<(usize, Vec<u32>)> = Vec::new();
    for (layer, state) in states.iter().enumerate() {
        match buckets.iter_mut().find(|(bytes, _)| *bytes == state.bytes) {
            Some((_, bucket)) => bucket.push(layer as u32),
            None => buckets.push((state.bytes, vec![layer as u32])),
        }
    }
    let mut groups = Vec::new();
    for (state_bytes, bucket) in buckets {
        let room = match state_bytes {
            0 => 0,
            bytes => block_bytes / bytes,
        };
        if room == 0 || !state_bytes.is_multiple_of(STATE_ALIGNMENT) {
            let reason = match room {
                0 if state_bytes == 0 => "a state of no bytes".to_owned(),
                0 => format!(
                    "a state of {state_bytes} bytes does not fit a block of {block_bytes}; larger \
                     blocks (up to {} tokens), fewer ranks or another dtype would give it room",
                    BLOCK_SIZES.end()
                ),
                _ => format!(
                    "a state of {state_bytes} bytes is no multiple of {STATE_ALIGNMENT} bytes"
                ),
            };
            let layers = bucket.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
            let layers = format!("recurrent layers {layers}");
            return Err(Error::new("group layers", ErrorKind::CannotUnify { layers, reason }));
        }
        let num_groups = bucket.len().div_ceil(room);
        groups.extend((0..num_groups).map(|first| StateGroup {
            state_bytes,
            block_size,
            layers: bucket[first..].iter().step_by(num_groups).copied().collect(),
        }));
    }
    Ok(groups)
}
