//! `move_blocks`: batched gather/scatter of fragments between device and pinned host memory.

use crate::device::Span;

/// Arguments of [`Kernels::move_blocks`](crate::ops::Kernels).
#[derive(Debug, Clone, Copy)]
pub struct MoveArgs {
    /// [`hkv_copy`](crate::abi::hkv_copy) descriptors, in device or pinned host memory.
    pub copies: Span,
    /// How many.
    pub num_copies: u64,
    /// CTAs the kernel may occupy; 0: chosen for the device.
    pub max_ctas: u32,
}
