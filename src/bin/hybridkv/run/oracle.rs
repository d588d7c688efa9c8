//! What a block or an attention output must be: recomputed on the host from the token history alone, never read from
//! the pool. Blocks bit by bit; output rows by the f64 reference over keys and values of every visible position.

use std::sync::Arc;

use hybridkv::manager::SeqId;
use hybridkv::ops::synthetic::Tensor;
use hybridkv::reference::{self, Logits};
use hybridkv::spec::{GroupPlan, LayerGroup, ModelSpec};

use super::content::{Content, decode};

/// When and where a block was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Occasion {
    /// On the device, found by a prefix hit.
    Hit,
    /// On the device, after its onboard.
    Onboarded,
    /// On the device, at the end of its turn.
    TurnEnd,
    /// In its host slot, after its offload.
    HostSlot,
}

/// What a block must hold.
#[derive(Debug, Clone)]
pub struct ExpectedBlock {
    pub occasion: Occasion,
    pub group: usize,
    /// History hashes of its tokens, in order; tokens beyond are not looked at.
    pub hashes: Vec<u64>,
}

/// One output row to check.
#[derive(Debug, Clone)]
pub struct ExpectedRow {
    pub seq: SeqId,
    pub layer: u32,
    pub qo_head: u32,
    /// Absolute position of the query.
    pub position: usize,
    /// History hashes of the sequence, up to the position at least.
    pub hashes: Arc<[u64]>,
}

/// The model as the checks need it.
pub struct Oracle {
    pub spec: ModelSpec,
    pub plan: GroupPlan,
    /// Learned sink logits per query head; empty when the model has none.
    pub sink_logits: Vec<f32>,
    pub content: Arc<Content>,
}

impl Oracle {
    /// Compares a native block with what it must hold; the first difference, in words.
    pub fn check_block(&self, data: &[u8], expected: &ExpectedBlock) -> Result<(), String> {
        let group: &LayerGroup = &self.plan.groups[expected.group];
        let shape = group.shape;
        let (dim, heads) = (shape.head_dim as usize, shape.num_kv_heads as usize);
        let (block_size, row_bytes) = (group.block_size as usize, dim * shape.dtype.bytes());
        let slot_bytes = shape.token_bytes() * block_size;
        for (&layer, slot) in group.layers.iter().zip(data.chunks_exact(slot_bytes)) {
            let (elements, scales) = slot.split_at(shape.element_bytes() * block_size);
            for (half, tensor) in [Tensor::K, Tensor::V].into_iter().enumerate() {
                for head in 0..heads {
                    for (token, &hash) in expected.hashes.iter().enumerate() {
                        let at = (half * heads + head) * block_size + token;
                        let want = self.content.row(hash, layer, tensor, head as u32, dim);
                        let what = if elements[at * row_bytes..(at + 1) * row_bytes] != want.bytes {
                            "row"
                        } else if let Some(scale) = want.scale
                            && scales[4 * at..4 * at + 4] != scale.to_ne_bytes()
                        {
                            "scale"
                        } else {
                            continue;
                        };
                        return Err(format!(
                            "the {what} of group {}, layer {layer}, {tensor:?}, kv head {head}, token {token} of \
                             the block differs",
                            expected.group
                        ));
                    }
                }
            }
        }
        Ok(())
    }

    /// Relative 2-norm error of an output row.
    pub fn row_error(&self, data: &[u8], expected: &ExpectedRow) -> f64 {
        let (content, layer) = (&self.content, &self.spec.layers[expected.layer as usize]);
        let dim = layer.shape.head_dim as usize;
        let kv_head = expected.qo_head * layer.shape.num_kv_heads / self.spec.num_qo_heads;
        let hash = expected.hashes[expected.position];
        let query = content.query(hash, expected.layer, expected.qo_head, dim);
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        let query_at = expected.position as i64;
        for (key, &hash) in expected.hashes[..=expected.position].iter().enumerate() {
            if reference::sees(layer.kind, layer.sink_tokens, query_at, key as i64) {
                for (tensor, rows) in [(Tensor::K, &mut keys), (Tensor::V, &mut values)] {
                    rows.extend(content.numbers(hash, expected.layer, tensor, kv_head, dim));
                }
            }
        }
        let visible: Vec<usize> = (0..keys.len() / dim).collect();
        let logits = Logits {
            sm_scale: self.spec.sm_scale as f64,
            soft_cap: self.spec.logits_soft_cap as f64,
            sink: self.sink_logits.get(expected.qo_head as usize).map(|&sink| sink as f64),
        };
        let want = reference::attend(&query, &keys, &values, &visible, logits).out;
        let dtype = content.elements().dtype;
        let have: Vec<f64> = data[..dim * 2]
            .chunks_exact(2)
            .map(|bytes| decode(dtype, u16::from_le_bytes([bytes[0], bytes[1]])))
            .collect();
        let comparison = reference::compare(&have, &want, dim, 0.0);
        if comparison.misplaced > 0 { f64::INFINITY } else { comparison.relative }
    }
}
