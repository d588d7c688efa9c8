//! The shape of a block that a slot holds.

use std::fmt;

use super::OP;
use crate::error::{Error, Result};
use crate::layout::Dtype;

/// Shape of a block: `[layer][K|V][head][token][dim]` of 16-bit elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Geometry {
    layers: u16,
    num_kv_heads: u16,
    head_dim: u16,
    block_size: u16,
    dtype: Dtype,
}

impl Geometry {
    /// Most elements of a block: 1 GiB of them.
    const MOST_ELEMENTS: u64 = 1 << 29;

    /// The geometry of blocks of `block_size` tokens in `layers` layers.
    ///
    /// # Errors
    /// `Unsupported` for a `head_dim` that is no multiple of 16 up to 256, a `block_size` other than 8, 16,
    /// 32, 64 and 128, an element type other than bf16 and f16, no layers or heads, or blocks over 1 GiB.
    pub fn new(
        layers: u32,
        num_kv_heads: u32,
        head_dim: u32,
        block_size: u32,
        dtype: Dtype,
    ) -> Result<Self> {
        if head_dim == 0 || !head_dim.is_multiple_of(16) || head_dim > 256 {
            return Err(Error::unsupported(OP, "head_dim", head_dim, "multiples of 16 up to 256"));
        }
        if !(8..=128).contains(&block_size) || !block_size.is_power_of_two() {
            return Err(Error::unsupported(OP, "block_size", block_size, "8, 16, 32, 64, 128"));
        }
        if !matches!(dtype, Dtype::Bf16 | Dtype::F16) {
            return Err(Error::unsupported(OP, "dtype", dtype.name(), "bf16, f16"));
        }
        let elements = u64::from(layers)
            .checked_mul(2 * u64::from(num_kv_heads))
            .and_then(|planes| planes.checked_mul(u64::from(head_dim * block_size)));
        let within = elements.is_some_and(|n| (1..=Self::MOST_ELEMENTS).contains(&n));
        match (u16::try_from(layers), u16::try_from(num_kv_heads)) {
            (Ok(layers), Ok(num_kv_heads)) if within => Ok(Self {
                layers,
                num_kv_heads,
                head_dim: head_dim as u16,
                block_size: block_size as u16,
                dtype,
            }),
            _ => Err(Error::unsupported(
                OP,
                "block",
                format!(
                    "of {layers} layers, {num_kv_heads} heads of {head_dim}, {block_size} tokens"
                ),
                "at least one layer and head, at most 65535 of them and 1 GiB",
            )),
        }
    }

    /// Layers.
    pub const fn layers(&self) -> usize {
        self.layers as usize
    }

    /// KV heads of a layer.
    pub const fn num_kv_heads(&self) -> usize {
        self.num_kv_heads as usize
    }

    /// Elements of a head.
    pub const fn head_dim(&self) -> usize {
        self.head_dim as usize
    }

    /// Tokens.
    pub const fn block_size(&self) -> usize {
        self.block_size as usize
    }

    /// Type of the elements, bf16 or f16.
    pub const fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Heads of K and V in all layers.
    pub const fn planes(&self) -> usize {
        self.layers() * 2 * self.num_kv_heads()
    }

    /// Elements of one head of K or V.
    pub const fn plane_elements(&self) -> usize {
        self.block_size() * self.head_dim()
    }

    /// Elements of a block.
    pub const fn elements(&self) -> usize {
        self.planes() * self.plane_elements()
    }

    /// Bytes of a block as it is.
    pub const fn raw_bytes(&self) -> usize {
        2 * self.elements()
    }

    /// Whether a plane is one of K.
    pub(super) const fn is_key(&self, plane: usize) -> bool {
        (plane / self.num_kv_heads()).is_multiple_of(2)
    }

    /// The number of a plane among those of K, or among those of V.
    pub(super) const fn index_in_kind(&self, plane: usize) -> usize {
        let heads = self.num_kv_heads();
        plane / (2 * heads) * heads + plane % heads
    }

    pub(super) fn check_block(&self, elements: usize) -> Result<()> {
        if elements == self.elements() {
            return Ok(());
        }
        Err(Error::invalid(
            OP,
            format!("a block of {elements} elements: {self} has {}", self.elements()),
        ))
    }

    /// The geometry of header fields, if there is one.
    pub(super) fn from_fields(fields: [u16; 4], dtype: u8) -> Option<Self> {
        let [layers, heads, head_dim, block_size] = fields.map(u32::from);
        let dtype = [Dtype::Bf16, Dtype::F16].into_iter().find(|d| d.code() == u32::from(dtype))?;
        Self::new(layers, heads, head_dim, block_size, dtype).ok()
    }

    /// Header fields: layers, heads, head_dim, block_size.
    pub(super) const fn fields(&self) -> [u16; 4] {
        [self.layers, self.num_kv_heads, self.head_dim, self.block_size]
    }
}

impl fmt::Display for Geometry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} layers of {} heads of {}, {} tokens, {}",
            self.layers,
            self.num_kv_heads,
            self.head_dim,
            self.block_size,
            self.dtype.name()
        )
    }
}
