//! `merge_states`: n-way merge of attention states (output, LSE) of the same rows.

use crate::device::Span;
use crate::layout::Dtype;
use crate::ops::HeadStrides;

/// Arguments of [`Kernels::merge_states`](crate::ops::Kernels).
#[derive(Debug, Clone, Copy)]
pub struct MergeArgs {
    /// Partial outputs, `[num_states, num_tokens * num_qo_heads, head_dim]` of `in_dtype`.
    pub states: Span,
    /// Their natural-log LSE, `[num_states, num_tokens * num_qo_heads]` f32; -inf is the identity.
    pub state_lse: Span,
    /// Type of the partial outputs.
    pub in_dtype: Dtype,
    /// Merged output, `[num_tokens, num_qo_heads, head_dim]` of `out_dtype`.
    pub out: Span,
    /// Strides of `out`.
    pub out_strides: HeadStrides,
    /// Type of the merged output.
    pub out_dtype: Dtype,
    /// Merged LSE, `[num_tokens, num_qo_heads]` f32, if wanted.
    pub lse: Option<Span>,
    /// Learned sink logits to add to the denominator once, `[num_qo_heads]` f32.
    pub sink_logits: Option<Span>,
    /// States per row.
    pub num_states: u32,
    /// Tokens.
    pub num_tokens: u32,
    /// Query heads.
    pub num_qo_heads: u32,
    /// Elements of a head.
    pub head_dim: u32,
}
