//! Attention shapes of well-known models, from their public configurations.

use super::AttentionKind::{Chunked, Full, Sliding};
use super::{AttentionKind, LayerSpec, ModelSpec, StateSpec};
use crate::error::{Error, Result};
use crate::layout::{Dtype, KvShape};

/// One model. Each row names the Hugging Face repository whose `config.json` it follows.
struct Preset {
    name: &'static str,
    num_layers: usize,
    /// Kinds of the layers, repeated.
    cycle: &'static [AttentionKind],
    num_qo_heads: u32,
    num_kv_heads: u32,
    head_dim: u32,
    /// KV heads and head dimension of full layers, where they differ.
    full_shape: Option<(u32, u32)>,
    /// Recurrent layers, and the bytes of the state of one.
    states: (usize, usize),
    /// The logits are divided by its square root: `head_dim`, or Gemma's `query_pre_attn_scalar`.
    query_scalar: f32,
    logits_soft_cap: f32,
    sink_logits: bool,
    max_model_len: u32,
}

const LLAMA_4: &[AttentionKind] = {
    const LOCAL: AttentionKind = Chunked { chunk: 8192 };
    &[LOCAL, LOCAL, LOCAL, Full]
};
const GPT_OSS: &[AttentionKind] = &[Sliding { window: 128 }, Full];
const GEMMA_2: &[AttentionKind] = &[Sliding { window: 4096 }, Full];
const GEMMA_3: &[AttentionKind] = {
    const LOCAL: AttentionKind = Sliding { window: 1024 };
    &[LOCAL, LOCAL, LOCAL, LOCAL, LOCAL, Full]
};
const GEMMA_3_1B: &[AttentionKind] = {
    const LOCAL: AttentionKind = Sliding { window: 512 };
    &[LOCAL, LOCAL, LOCAL, LOCAL, LOCAL, Full]
};

const LLAMA_3: Preset = Preset {
    // meta-llama/Llama-3.1-8B
    name: "llama-3.1-8b",
    num_layers: 32,
    cycle: &[Full],
    num_qo_heads: 32,
    num_kv_heads: 8,
    head_dim: 128,
    full_shape: None,
    states: (0, 0),
    query_scalar: 128.0,
    logits_soft_cap: 0.0,
    sink_logits: false,
    max_model_len: 131_072,
};

const PRESETS: &[Preset] = &[
    Preset {
        // meta-llama/Llama-4-Scout-17B-16E-Instruct
        name: "llama-4-scout",
        num_layers: 48,
        cycle: LLAMA_4,
        num_qo_heads: 40,
        max_model_len: 10_485_760,
        ..LLAMA_3
    },
    Preset {
        // meta-llama/Llama-4-Maverick-17B-128E-Instruct
        name: "llama-4-maverick",
        num_layers: 48,
        cycle: LLAMA_4,
        num_qo_heads: 40,
        max_model_len: 1_048_576,
        ..LLAMA_3
    },
    Preset {
        // openai/gpt-oss-20b
        name: "gpt-oss-20b",
        num_layers: 24,
        cycle: GPT_OSS,
        num_qo_heads: 64,
        head_dim: 64,
        query_scalar: 64.0,
        sink_logits: true,
        ..LLAMA_3
    },
    Preset {
        // openai/gpt-oss-120b
        name: "gpt-oss-120b",
        num_layers: 36,
        cycle: GPT_OSS,
        num_qo_heads: 64,
        head_dim: 64,
        query_scalar: 64.0,
        sink_logits: true,
        ..LLAMA_3
    },
    Preset {
        // google/gemma-2-9b
        name: "gemma-2-9b",
        num_layers: 42,
        cycle: GEMMA_2,
        num_qo_heads: 16,
        head_dim: 256,
        query_scalar: 256.0,
        logits_soft_cap: 50.0,
        max_model_len: 8192,
        ..LLAMA_3
    },
    Preset {
        // google/gemma-2-27b
        name: "gemma-2-27b",
        num_layers: 46,
        cycle: GEMMA_2,
        num_kv_heads: 16,
        query_scalar: 144.0,
        logits_soft_cap: 50.0,
        max_model_len: 8192,
        ..LLAMA_3
    },
    Preset {
        // google/gemma-3-1b-it
        name: "gemma-3-1b",
        num_layers: 26,
        cycle: GEMMA_3_1B,
        num_qo_heads: 4,
        num_kv_heads: 1,
        head_dim: 256,
        query_scalar: 256.0,
        max_model_len: 32_768,
        ..LLAMA_3
    },
    Preset {
        // google/gemma-3-4b-it
        name: "gemma-3-4b",
        num_layers: 34,
        cycle: GEMMA_3,
        num_qo_heads: 8,
        num_kv_heads: 4,
        head_dim: 256,
        query_scalar: 256.0,
        ..LLAMA_3
    },
    Preset {
        // google/gemma-3-12b-it
        name: "gemma-3-12b",
        num_layers: 48,
        cycle: GEMMA_3,
        num_qo_heads: 16,
        head_dim: 256,
        query_scalar: 256.0,
        ..LLAMA_3
    },
    Preset {
        // google/gemma-3-27b-it
        name: "gemma-3-27b",
        num_layers: 62,
        cycle: GEMMA_3,
        num_kv_heads: 16,
        query_scalar: 168.0,
        ..LLAMA_3
    },
    Preset {
        // google/gemma-4-31B-it
        name: "gemma-4-31b",
        num_layers: 60,
        cycle: GEMMA_3,
        num_kv_heads: 16,
        head_dim: 256,
        full_shape: Some((4, 512)),
        query_scalar: 1.0,
        max_model_len: 262_144,
        ..LLAMA_3
    },
    Preset {
        // Qwen/Qwen3-Next-80B-A3B-Instruct: 32 value heads of 128 x 128 in f32, and 3 steps of a bf16
        // convolution over 8192 channels.
        name: "qwen3-next-80b-a3b",
        num_layers: 12,
        num_qo_heads: 16,
        num_kv_heads: 2,
        head_dim: 256,
        states: (36, 32 * 128 * 128 * 4 + 3 * 8192 * 2),
        query_scalar: 256.0,
        max_model_len: 262_144,
        ..LLAMA_3
    },
    Preset {
        // mistralai/Mistral-7B-v0.1
        name: "mistral-7b",
        cycle: &[Sliding { window: 4096 }],
        max_model_len: 32_768,
        ..LLAMA_3
    },
    LLAMA_3,
    Preset {
        // meta-llama/Llama-3.1-70B
        name: "llama-3.1-70b",
        num_layers: 80,
        num_qo_heads: 64,
        ..LLAMA_3
    },
];

pub(super) fn names() -> impl Iterator<Item = &'static str> {
    PRESETS.iter().map(|preset| preset.name)
}

pub(super) fn find(name: &str) -> Result<ModelSpec> {
    let Some(preset) = PRESETS.iter().find(|preset| preset.name == name) else {
        let all = names().collect::<Vec<_>>().join(", ");
        return Err(Error::unsupported("model preset", "model", name, all));
    };
    let shape = KvShape {
        num_kv_heads: preset.num_kv_heads,
        head_dim: preset.head_dim,
        dtype: Dtype::Bf16,
    };
    let layer = |&kind| {
        let mut shape = shape;
        if let (AttentionKind::Full, Some(full)) = (kind, preset.full_shape) {
            (shape.num_kv_heads, shape.head_dim) = full;
        }
        LayerSpec { kind, sink_tokens: 0, shape }
    };
    Ok(ModelSpec {
        name: preset.name.to_owned(),
        layers: preset.cycle.iter().cycle().take(preset.num_layers).map(layer).collect(),
        states: vec![StateSpec { bytes: preset.states.1 }; preset.states.0],
        num_qo_heads: preset.num_qo_heads,
        sm_scale: 1.0 / preset.query_scalar.sqrt(),
        logits_soft_cap: preset.logits_soft_cap,
        sink_logits: preset.sink_logits,
        max_model_len: preset.max_model_len,
    })
}
