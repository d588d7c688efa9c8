//! What a model needs of its KV cache: attention kinds, layers, layer groups, the window table.

use crate::abi;
use crate::error::{Error, Result};
use crate::layout::KvShape;

/// Which earlier tokens a query of a layer sees (besides the sink tokens).
///
/// With query position `i` and key position `j <= i`, 0-based:
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AttentionKind {
    /// Every `j`.
    Full,
    /// `i - j < window` (Hugging Face `sliding_window`; FlashInfer's `window_left` is one less).
    Sliding {
        /// Visible tokens, the query's own included; at least 1.
        window: u32,
    },
    /// `i / chunk == j / chunk` (Llama 4 `attention_chunk_size`).
    Chunked {
        /// Tokens per chunk; at least 1.
        chunk: u32,
    },
}

impl AttentionKind {
    /// Whether a query at position `i` sees the key at position `j`, sink tokens apart. The one definition
    /// of visibility: freeing, prefix hits and sizes all follow from it.
    pub const fn sees(self, i: u64, j: u64) -> bool {
        j <= i
            && match self {
                Self::Full => true,
                Self::Sliding { window } => i - j < window as u64,
                Self::Chunked { chunk } => i / chunk as u64 == j / chunk as u64,
            }
    }

    /// Tokens at the start that no query at position `n` or later sees: what may go once `n` tokens are
    /// settled.
    pub const fn skipped(self, n: u64) -> u64 {
        match self {
            Self::Full => 0,
            Self::Sliding { window } => (n + 1).saturating_sub(window as u64),
            Self::Chunked { chunk } => n / chunk as u64 * chunk as u64,
        }
    }

    /// Tokens that stay live when `n` are settled.
    pub const fn live(self, n: u64) -> u64 {
        n.saturating_sub(self.skipped(n))
    }

    /// Refuses a window or chunk of 0, in the name of the operation `op`.
    pub(crate) fn check(self, op: &'static str) -> Result<()> {
        match self {
            Self::Sliding { window: 0 } => {
                Err(Error::unsupported(op, "a sliding window of", 0, "1 token or more"))
            }
            Self::Chunked { chunk: 0 } => {
                Err(Error::unsupported(op, "an attention chunk of", 0, "1 token or more"))
            }
            _ => Ok(()),
        }
    }
}

/// One attention layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LayerSpec {
    /// What its queries see.
    pub kind: AttentionKind,
    /// Tokens at the start that stay visible always (StreamingLLM); 0 for none.
    pub sink_tokens: u32,
    /// Shape of its keys and values of one token, on one rank.
    pub shape: KvShape,
}

/// The attention layers of a model, as one rank sees them.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// Name of the preset, or `model_type` of the config.
    pub name: String,
    /// Layers in model order.
    pub layers: Vec<LayerSpec>,
    /// Query heads on this rank.
    pub num_qo_heads: u32,
    /// Factor of the logits.
    pub sm_scale: f32,
    /// Soft cap of the logits; 0 for none.
    pub logits_soft_cap: f32,
    /// Whether every query head has a learned sink logit (gpt-oss).
    pub sink_logits: bool,
    /// Longest sequence of the model.
    pub max_model_len: u32,
}

impl ModelSpec {
    /// The spec of a preset (`llama-4-scout`, ...), unsharded, bf16 KV.
    pub fn preset(_name: &str) -> Result<Self> {
        todo!()
    }

    /// Names of all presets.
    pub fn preset_names() -> impl Iterator<Item = &'static str> {
        [].into_iter()
    }

    /// The spec of a Hugging Face `config.json` (`layer_types`, `sliding_window`,
    /// `attention_chunk_size`, `no_rope_layers`; a nested `text_config` is followed).
    pub fn from_hf_config(_json: &str) -> Result<Self> {
        todo!()
    }

    /// The share of one of `tp` tensor-parallel ranks (KV heads are replicated when `tp` is larger).
    pub fn shard(&self, _tp: u32) -> Result<Self> {
        todo!()
    }

    /// Groups the layers for blocks of `block_size` tokens (design: bucket by kind and shape, group size
    /// = smallest bucket, or the largest when `max < 1.5 * min`, strided assignment; unequal block bytes
    /// unified by scaling the block size, else padded).
    pub fn group(&self, _block_size: u32) -> Result<GroupPlan> {
        todo!()
    }
}

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

impl GroupPlan {
    /// The window table, one row per model layer.
    pub fn window_table(&self) -> Vec<abi::hkv_window> {
        todo!()
    }
}
