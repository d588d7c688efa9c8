//! Where a token's K and V lie in memory: element types, strides and the layouts that name them.
//!
//! The native layout is BlockFirst/HND: `[block][layer slot][K|V][kv head][token][dim]`. Every other one
//! is a choice of bases and strides; kernels only ever see strides.

use crate::abi;
use crate::device::Span;
use crate::error::{Error, Result};

/// Element type of queries, keys, values and outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
    /// IEEE single precision (partial attention states only).
    F32,
}

impl Dtype {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    /// The name used in reports and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::F32 => "f32",
        }
    }

    /// The number that stands for this type in kernel parameters.
    pub const fn code(self) -> u32 {
        match self {
            Self::Bf16 => abi::HKV_DTYPE_BF16,
            Self::F16 => abi::HKV_DTYPE_F16,
            Self::F32 => abi::HKV_DTYPE_F32,
        }
    }
}

/// Shape of one layer's keys (and values) of one token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct KvShape {
    /// KV heads on this rank.
    pub num_kv_heads: u32,
    /// Elements of one head.
    pub head_dim: u32,
    /// Element type.
    pub dtype: Dtype,
}

impl KvShape {
    /// Bytes of K and V of one token in one layer.
    pub const fn token_bytes(&self) -> usize {
        2 * self.num_kv_heads as usize * self.head_dim as usize * self.dtype.bytes()
    }
}

/// Distances in elements between neighbouring blocks, layer slots, heads and tokens of K (and of V).
/// The `head_dim` elements of a token's head are always contiguous.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct KvStrides {
    /// Between blocks.
    pub block: i64,
    /// Between layer slots of a block (0 where every layer has a base of its own).
    pub layer: i64,
    /// Between KV heads.
    pub head: i64,
    /// Between tokens.
    pub token: i64,
}

/// K and V of one layer group as kernels see them: two bases, shared strides, and how far they reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvView {
    /// Memory from the K base on.
    pub k: Span,
    /// Memory from the V base on.
    pub v: Span,
    /// Strides of both.
    pub strides: KvStrides,
    /// Shape of a token.
    pub shape: KvShape,
    /// Tokens per block: a power of two, 8 to 128.
    pub block_size: u32,
    /// Blocks that may be named by a block table.
    pub num_blocks: u64,
    /// Layer slots per block that may be named by a window table.
    pub num_layer_slots: u32,
}

impl KvView {
    /// A native (BlockFirst/HND) view of a pool: `[block][layer slot][K|V][head][token][dim]`, blocks
    /// `block_stride_bytes` apart (at least the bytes of one block).
    ///
    /// # Errors
    /// `InvalidArgument` when the pool is too small or the stride not a multiple of 16 bytes.
    pub fn block_first(
        pool: Span,
        shape: KvShape,
        block_size: u32,
        num_layer_slots: u32,
        num_blocks: u64,
        block_stride_bytes: u64,
    ) -> Result<Self> {
        const OP: &str = "kv view";
        let element = shape.dtype.bytes() as i64;
        let token = shape.head_dim as i64;
        let head = token * block_size as i64;
        let half = head * shape.num_kv_heads as i64;
        let layer = 2 * half;
        if !block_stride_bytes.is_multiple_of(16) {
            return Err(Error::invalid(
                OP,
                format!("a block stride of {block_stride_bytes} bytes is no multiple of 16"),
            ));
        }
        let needed = (layer * element) as u64 * num_layer_slots as u64;
        if block_stride_bytes < needed {
            return Err(Error::invalid(
                OP,
                format!(
                    "a block stride of {block_stride_bytes} bytes is less than a block, {needed}"
                ),
            ));
        }
        let v_offset = (half * element) as u64;
        let view = Self {
            k: pool,
            v: Span::new(pool.address + v_offset, pool.bytes.saturating_sub(v_offset)),
            strides: KvStrides { block: block_stride_bytes as i64 / element, layer, head, token },
            shape,
            block_size,
            num_blocks,
            num_layer_slots,
        };
        view.check(OP)?;
        Ok(view)
    }

    /// Checks block size, alignment (16 bytes) and that every addressable element lies in the buffers.
    ///
    /// # Errors
    /// `Unsupported` or `InvalidArgument`, in the name of the operation `op`.
    pub fn check(&self, op: &'static str) -> Result<()> {
        if !(8..=128).contains(&self.block_size) || !self.block_size.is_power_of_two() {
            return Err(Error::unsupported(
                op,
                "block_size",
                self.block_size,
                "8, 16, 32, 64, 128",
            ));
        }
        let element = self.shape.dtype.bytes() as i64;
        let s = &self.strides;
        for (name, stride) in
            [("block", s.block), ("layer", s.layer), ("head", s.head), ("token", s.token)]
        {
            if stride < 0 || (stride * element) % 16 != 0 {
                return Err(Error::invalid(
                    op,
                    format!(
                        "{name} stride of {stride} elements is negative or no multiple of 16 bytes"
                    ),
                ));
            }
        }
        let reach = |count: u64, stride: i64| -> Option<u64> {
            count.checked_sub(1).map_or(Some(0), |last| last.checked_mul(stride as u64))
        };
        let last = reach(self.num_blocks, s.block)
            .and_then(|x| x.checked_add(reach(self.num_layer_slots as u64, s.layer)?))
            .and_then(|x| x.checked_add(reach(self.shape.num_kv_heads as u64, s.head)?))
            .and_then(|x| x.checked_add(reach(self.block_size as u64, s.token)?))
            .and_then(|x| x.checked_add(self.shape.head_dim as u64))
            .and_then(|x| x.checked_mul(element as u64))
            .ok_or_else(|| Error::invalid(op, "the strides overflow 64-bit addresses"))?;
        if self.num_blocks > 0 {
            self.k.check(op, "the K buffer", last, 16)?;
            self.v.check(op, "the V buffer", last, 16)?;
        }
        Ok(())
    }
}
