//! `attention`: paged attention over a block table, for any kind of layer, decode and chunked prefill.

use crate::device::Span;
use crate::layout::KvView;

/// Strides in elements of a `[token, head, head_dim]` tensor whose last dimension is contiguous.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadStrides {
    /// Between tokens.
    pub token: i64,
    /// Between heads.
    pub head: i64,
}

impl HeadStrides {
    /// Strides of a contiguous `[token, head, head_dim]` tensor.
    pub const fn contiguous(num_heads: u32, head_dim: u32) -> Self {
        Self { token: num_heads as i64 * head_dim as i64, head: head_dim as i64 }
    }
}

/// The window table on the device: one [`hkv_window`](crate::abi::hkv_window) row per layer.
#[derive(Debug, Clone, Copy)]
pub struct WindowTable {
    /// `[num_layers]` rows of 32 bytes, on the device.
    pub rows: Span,
    /// Layers in the table.
    pub num_layers: u32,
}

/// The block tables of a batch: one ragged row of block ids per (group, sequence).
///
/// Row `(g, s)` starts at `block_ids[block_row[g * num_seqs + s]]`: the sink blocks of the group, then
/// its live blocks from `first_block[g * num_seqs + s]` on.
#[derive(Debug, Clone, Copy)]
pub struct BlockTables {
    /// i32 block ids of all rows, on the device.
    pub block_ids: Span,
    /// `[num_groups, num_seqs]` i64 row starts, on the device.
    pub block_row: Span,
    /// `[num_groups, num_seqs]` i32 index of the first live block after the sinks; `None`: all 0.
    pub first_block: Option<Span>,
    /// Layer groups in the tables.
    pub num_groups: u32,
}

/// Arguments of [`Kernels::attention`](crate::ops::Kernels).
#[derive(Debug, Clone, Copy)]
pub struct AttentionArgs {
    /// Queries, `[num_tokens, num_qo_heads, head_dim]`, of the view's type.
    pub q: Span,
    /// Strides of `q`.
    pub q_strides: HeadStrides,
    /// Output, `[num_tokens, num_qo_heads, head_dim]`, of the view's type.
    pub out: Span,
    /// Strides of `out`.
    pub out_strides: HeadStrides,
    /// Natural-log LSE, `[num_tokens, num_qo_heads]` f32, if wanted.
    pub lse: Option<Span>,
    /// Keys and values.
    pub kv: KvView,
    /// `[num_seqs + 1]` i32 on the device: query tokens of sequence `s` are `[s] .. [s + 1]`.
    pub qo_indptr: Span,
    /// `[num_seqs]` i32 on the device: tokens of each sequence, the new ones included.
    pub kv_len: Span,
    /// Block tables of the sequences.
    pub tables: BlockTables,
    /// The window table.
    pub windows: WindowTable,
    /// The layer to attend.
    pub layer: u32,
    /// Learned sink logits, `[num_qo_heads]` f32 on the device, if the model has them.
    pub sink_logits: Option<Span>,
    /// Query heads on this rank, a multiple of the KV heads.
    pub num_qo_heads: u32,
    /// Sequences.
    pub num_seqs: u32,
    /// Query tokens of all sequences (an upper bound for every replay of a graph).
    pub num_tokens: u32,
    /// Upper bound on the query tokens of one sequence: chooses the kernel.
    pub max_q_len: u32,
    /// Upper bound on the *visible* tokens of one sequence in this layer: chooses the number of splits.
    pub max_kv_len: u32,
    /// Factor of the logits, usually `1 / sqrt(head_dim)`.
    pub sm_scale: f32,
    /// Soft cap of the logits; 0 for none.
    pub logits_soft_cap: f32,
    /// Scratch for partial states, at least `attention_workspace_bytes` long.
    pub workspace: Span,
}
