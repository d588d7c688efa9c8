//! `append`: the slot-mapped write of new K and V into their blocks.

use crate::device::Span;
use crate::layout::KvView;
use crate::ops::{HeadStrides, WindowTable};

/// Arguments of [`Kernels::append`](crate::ops::Kernels).
#[derive(Debug, Clone, Copy)]
pub struct AppendArgs {
    /// New keys, `[num_tokens, num_kv_heads, head_dim]`, of the view's type.
    pub k_new: Span,
    /// New values, likewise.
    pub v_new: Span,
    /// Strides of `k_new` and `v_new`.
    pub new_strides: HeadStrides,
    /// Where they go.
    pub kv: KvView,
    /// `[num_groups, num_tokens]` i64 on the device: `block_id * block_size + offset`, or negative to skip.
    pub slot_mapping: Span,
    /// Layer groups in `slot_mapping`.
    pub num_groups: u32,
    /// The window table.
    pub windows: WindowTable,
    /// The layer to write.
    pub layer: u32,
    /// New tokens.
    pub num_tokens: u32,
}
