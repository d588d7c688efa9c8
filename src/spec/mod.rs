//! What a model needs of its KV cache: attention kinds, layers, layer groups, the window table.

mod grouping;
mod hf_config;
mod identity;
mod presets;

pub use self::grouping::{GroupPlan, LayerGroup, StateGroup};
pub use self::identity::Provenance;

use std::fmt;

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

/// What a layer group keeps of a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GroupKind {
    /// Keys and values of the tokens that its layers' queries can still see: `block_size` of them per block.
    Attention(AttentionKind),
    /// A recurrent state (Mamba, linear attention), which stands for all tokens before it: a block holds one
    /// state. Block `b` of a sequence holds the state after `(b + 1) * block_size` tokens, or after its last
    /// token when that comes first.
    State,
}

impl GroupKind {
    /// Tokens at the start that nothing needs which starts at position `n` or later.
    pub const fn skipped(self, n: u64) -> u64 {
        match self {
            Self::Attention(kind) => kind.skipped(n),
            Self::State => n.saturating_sub(1),
        }
    }

    /// Refuses a window or chunk of 0, in the name of the operation `op`.
    pub(crate) fn check(self, op: &'static str) -> Result<()> {
        match self {
            Self::Attention(kind) => kind.check(op),
            Self::State => Ok(()),
        }
    }
}

impl fmt::Display for AttentionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full => f.write_str("full"),
            Self::Sliding { window } => write!(f, "sliding {window}"),
            Self::Chunked { chunk } => write!(f, "chunked {chunk}"),
        }
    }
}

impl fmt::Display for GroupKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Attention(kind) => kind.fmt(f),
            Self::State => f.write_str("state"),
        }
    }
}

impl From<AttentionKind> for GroupKind {
    fn from(kind: AttentionKind) -> Self {
        Self::Attention(kind)
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

/// One recurrent layer (Mamba, linear attention).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StateSpec {
    /// Bytes of its state of one sequence, on one rank: all parts of it, convolution included.
    pub bytes: usize,
}

/// The layers of a model that keep something of a sequence, as one rank sees them.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// Name of the preset, or `model_type` of the config.
    pub name: String,
    /// Attention layers in model order.
    pub layers: Vec<LayerSpec>,
    /// Recurrent layers in model order, numbered apart from the attention layers.
    pub states: Vec<StateSpec>,
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
    ///
    /// # Errors
    /// `Unsupported` for another name; the message lists all names.
    pub fn preset(name: &str) -> Result<Self> {
        presets::find(name)
    }

    /// Names of all presets.
    pub fn preset_names() -> impl Iterator<Item = &'static str> {
        presets::names()
    }

    /// The spec of a Hugging Face `config.json`, unsharded (a nested `text_config` is followed).
    ///
    /// The kinds of the layers come from `layer_types`, else from `attention_chunk_size` with
    /// `no_rope_layers` (Llama 4: layers without rotary embedding are full), else from `sliding_window`
    /// with `sliding_window_pattern`, `max_window_layers` and `use_sliding_window`.
    ///
    /// # Errors
    /// `Parse` for text that is not JSON, `InvalidArgument` or `Unsupported` naming the field otherwise.
    pub fn from_hf_config(json: &str) -> Result<Self> {
        hf_config::parse(json)
    }

    /// The share of one of `tp` tensor-parallel ranks. KV heads are replicated when `tp` is larger than
    /// their number.
    ///
    /// # Errors
    /// `Unsupported` when heads cannot be shared equally.
    pub fn shard(&self, tp: u32) -> Result<Self> {
        const OP: &str = "shard";
        let refuse = |what, heads: u32| {
            let given = format!("{tp} for {heads} heads");
            Err(Error::unsupported(OP, what, given, "a divisor of the number of heads"))
        };
        if tp == 0 || !self.num_qo_heads.is_multiple_of(tp) {
            return refuse("tensor parallelism of", self.num_qo_heads);
        }
        let mut share = self.clone();
        share.num_qo_heads /= tp;
        for layer in &mut share.layers {
            let heads = &mut layer.shape.num_kv_heads;
            if heads.is_multiple_of(tp) {
                *heads /= tp;
            } else if tp.is_multiple_of(*heads) {
                *heads = 1;
            } else {
                return refuse("tensor parallelism (KV heads) of", *heads);
            }
        }
        for state in &mut share.states {
            if !state.bytes.is_multiple_of(tp as usize) {
                let given = format!("{tp} for a state of {} bytes", state.bytes);
                return Err(Error::unsupported(
                    OP,
                    "tensor parallelism of",
                    given,
                    "a divisor of the bytes of every recurrent state",
                ));
            }
            state.bytes /= tp as usize;
        }
        Ok(share)
    }

    /// Groups the layers for blocks of `block_size` tokens; see [`GroupPlan`].
    ///
    /// # Errors
    /// `Unsupported` for a block size that is no power of two from 8 to 128, `CannotUnify` for recurrent
    /// layers whose state does not fit a block, `InvalidArgument` for a model without layers, a window or
    /// chunk of 0, or blocks larger than memory can be addressed.
    pub fn group(&self, block_size: u32) -> Result<GroupPlan> {
        grouping::group(&self.layers, &self.states, block_size)
    }

    /// Bytes of K and V of one token in all layers, as if every layer kept it.
    pub fn token_bytes(&self) -> usize {
        self.layers.iter().map(|layer| layer.shape.token_bytes()).sum()
    }
}

#[cfg(test)]
mod tests;
