//! Where a token's K and V lie in memory: element types, strides and the layouts that name them.
//!
//! The native layout is BlockFirst/HND: `[block][layer slot][K|V][kv head][token][dim]`. Every other one
//! is a choice of bases and strides; kernels only ever see strides.
//!
//! 8-bit elements have f32 scales. In the native layout every layer slot of a block ends with those of its own
//! tokens, `[K|V][kv head][token]`: whoever moves a block, or one layer of it, moves its scales.

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
    /// 8-bit float of 4 exponent and 3 mantissa bits, largest value 448, without infinities (keys and
    /// values only, with scales).
    E4m3,
}

impl Dtype {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
            Self::E4m3 => 1,
        }
    }

    /// The name used in reports and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::F32 => "f32",
            Self::E4m3 => "e4m3",
        }
    }

    /// The number that stands for this type in kernel parameters.
    pub const fn code(self) -> u32 {
        match self {
            Self::Bf16 => abi::HKV_DTYPE_BF16,
            Self::F16 => abi::HKV_DTYPE_F16,
            Self::F32 => abi::HKV_DTYPE_F32,
            Self::E4m3 => abi::HKV_DTYPE_E4M3,
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
    /// Bytes of K and V of one token in one layer in the native layout, the scales of 8-bit elements included.
    pub const fn token_bytes(&self) -> usize {
        self.element_bytes() + 2 * self.num_kv_heads as usize * self.scale_bytes()
    }

    /// Bytes of K and V of one token in one layer without scales: what attention has to read of a token at
    /// least.
    pub const fn element_bytes(&self) -> usize {
        2 * self.num_kv_heads as usize * self.head_dim as usize * self.dtype.bytes()
    }

    /// Bytes of the scale of one token of one head in the native layout: none for 16-bit elements.
    const fn scale_bytes(&self) -> usize {
        if matches!(self.dtype, Dtype::E4m3) { size_of::<f32>() } else { 0 }
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

impl KvStrides {
    /// Every block, layer, head and token at the same place.
    pub const NONE: Self = Self { block: 0, layer: 0, head: 0, token: 0 };
}

/// Scales of 8-bit keys and values: an element stands for `element * scale`.
///
/// f32 on the device; the scale of token `t` of block `b`, layer slot `l`, head `h` lies
/// `b * block + l * layer + h * head + t * token` elements after the start. Which of the strides are zero
/// makes it one scale per tensor, per KV head, or per token and head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvScales {
    /// Memory from the first scale of K on.
    pub k: Span,
    /// Memory from the first scale of V on.
    pub v: Span,
    /// Strides of both, in f32 elements; 0 in dimensions that share a scale.
    pub strides: KvStrides,
}

impl KvScales {
    /// Whether every token of every head has a scale of its own, which `append` computes and writes.
    /// Others are given by the caller and only read.
    pub const fn per_token(&self) -> bool {
        self.strides.token != 0
    }
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
    /// Scales of 8-bit keys and values; `None` for 16-bit ones.
    pub scales: Option<KvScales>,
}

impl KvView {
    /// A native (BlockFirst/HND) view of a pool: `[block][layer slot][K|V][head][token][dim]`, blocks
    /// `block_stride_bytes` apart (at least the bytes of one block). 8-bit elements have a scale per token and
    /// head, which a layer slot ends with.
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
        let overflow = || Error::invalid(OP, "a block of this shape overflows 64-bit addresses");
        if !block_stride_bytes.is_multiple_of(16) {
            return Err(Error::invalid(
                OP,
                format!("a block stride of {block_stride_bytes} bytes is no multiple of 16"),
            ));
        }
        let element = shape.dtype.bytes() as i64;
        let token = i64::from(shape.head_dim);
        let head = token.checked_mul(i64::from(block_size)).ok_or_else(overflow)?;
        let half = head.checked_mul(i64::from(shape.num_kv_heads)).ok_or_else(overflow)?;
        let elements = half.checked_mul(2).ok_or_else(overflow)?;
        // Scales are counted in elements, of which they are a whole number.
        let scale = shape.scale_bytes() as i64 / element;
        let half_scales = i64::from(block_size)
            .checked_mul(shape.num_kv_heads.into())
            .and_then(|rows| rows.checked_mul(scale))
            .ok_or_else(overflow)?;
        let layer = half_scales
            .checked_mul(2)
            .and_then(|scales| scales.checked_add(elements))
            .ok_or_else(overflow)?;
        let needed = layer
            .checked_mul(element)
            .and_then(|bytes| bytes.checked_mul(i64::from(num_layer_slots)))
            .ok_or_else(overflow)? as u64;
        if block_stride_bytes < needed {
            return Err(Error::invalid(
                OP,
                format!(
                    "a block stride of {block_stride_bytes} bytes is less than a block, {needed}"
                ),
            ));
        }
        let block = i64::try_from(block_stride_bytes).map_err(|_| overflow())? / element;
        let after = |elements: i64| -> Result<Span> {
            let offset = (elements * element) as u64;
            let address = pool.address.checked_add(offset).ok_or_else(overflow)?;
            Ok(Span::new(address, pool.bytes.saturating_sub(offset)))
        };
        let scales = if scale == 0 {
            None
        } else {
            let token = i64::from(block_size);
            Some(KvScales {
                k: after(elements)?,
                v: after(elements + half_scales)?,
                strides: KvStrides {
                    block: block / scale,
                    layer: layer / scale,
                    head: token,
                    token: 1,
                },
            })
        };
        let view = Self {
            k: pool,
            v: after(half)?,
            strides: KvStrides { block, layer, head, token },
            shape,
            block_size,
            num_blocks,
            num_layer_slots,
            scales,
        };
        view.check(OP)?;
        Ok(view)
    }

    /// The view of the same memory with these scales in place of those of its layer slots.
    ///
    /// # Errors
    /// `InvalidArgument` when the elements are 16-bit ones, or the scales do not fit the view.
    pub fn with_scales(self, scales: KvScales) -> Result<Self> {
        let view = Self { scales: Some(scales), ..self };
        view.check_scales("kv view")?;
        Ok(view)
    }

    /// Checks block size, alignment (16 bytes), that no two elements share an address, and that every
    /// element lies in the buffers.
    ///
    /// # Errors
    /// `Unsupported` or `InvalidArgument`, in the name of the operation `op`.
    pub fn check(&self, op: &'static str) -> Result<()> {
        self.check_elements(op)?;
        self.check_scales(op)
    }

    fn check_elements(&self, op: &'static str) -> Result<()> {
        if !(8..=128).contains(&self.block_size) || !self.block_size.is_power_of_two() {
            return Err(Error::unsupported(
                op,
                "block_size",
                self.block_size,
                "8, 16, 32, 64, 128",
            ));
        }
        let element = self.shape.dtype.bytes() as u64;
        let dimensions = self.dimensions(&self.strides);
        for (stride, _, name) in dimensions {
            if stride < 0 || !(stride as u64).is_multiple_of(16 / element) {
                return Err(Error::invalid(
                    op,
                    format!(
                        "{name} stride of {stride} elements is negative or no multiple of 16 bytes"
                    ),
                ));
            }
        }
        let last = disjoint_extent(op, dimensions, self.shape.head_dim.into())?
            .checked_mul(element)
            .ok_or_else(|| Error::invalid(op, "the strides overflow 64-bit addresses"))?;
        if self.num_blocks > 0 {
            self.k.check(op, "the K buffer", last, 16)?;
            self.v.check(op, "the V buffer", last, 16)?;
        }
        Ok(())
    }

    /// Checks that 8-bit elements, and no others, have scales, and that all of these lie in their buffers;
    /// dimensions of stride 0 share scales, in the others no two have the same address.
    fn check_scales(&self, op: &'static str) -> Result<()> {
        let scales = match (self.shape.dtype, &self.scales) {
            (Dtype::E4m3, Some(scales)) => scales,
            (Dtype::E4m3, None) => {
                return Err(Error::invalid(
                    op,
                    "e4m3 keys and values without scales: give `scales` (all 1 are allowed, but never assumed)",
                ));
            }
            (_, None) => return Ok(()),
            (dtype, Some(_)) => {
                return Err(Error::invalid(
                    op,
                    format!("scales are for e4m3 keys and values, these are {}", dtype.name()),
                ));
            }
        };
        let mut dimensions = self.dimensions(&scales.strides);
        for (stride, count, name) in &mut dimensions {
            match *stride {
                0 => *count = 1,
                1.. => {}
                _ => {
                    return Err(Error::invalid(
                        op,
                        format!("{name} stride of the scales, {stride} elements, is negative"),
                    ));
                }
            }
        }
        let last = disjoint_extent(op, dimensions, 1)?
            .checked_mul(size_of::<f32>() as u64)
            .ok_or_else(|| Error::invalid(op, "the scales' strides overflow 64-bit addresses"))?;
        scales.k.check(op, "the K scales", last, 4)?;
        scales.v.check(op, "the V scales", last, 4)
    }

    /// Strides with the counts and names of what they separate.
    fn dimensions(&self, strides: &KvStrides) -> [(i64, u64, &'static str); 4] {
        [
            (strides.block, self.num_blocks, "block"),
            (strides.layer, u64::from(self.num_layer_slots), "layer"),
            (strides.head, u64::from(self.shape.num_kv_heads), "head"),
            (strides.token, u64::from(self.block_size), "token"),
        ]
    }
}

/// How far an array of these dimensions reaches, in elements, when its innermost runs take `run` of them;
/// an error when strides let elements share an address.
fn disjoint_extent(
    op: &'static str,
    mut dimensions: [(i64, u64, &'static str); 4],
    run: u64,
) -> Result<u64> {
    // From the innermost dimension out: how far the elements seen so far reach.
    dimensions.sort_unstable();
    let mut extent = run;
    for (stride, count, name) in dimensions.into_iter().filter(|&(_, count, _)| count > 1) {
        if (stride as u64) < extent {
            return Err(Error::invalid(
                op,
                format!(
                    "{name} stride of {stride} elements lets {name}s overlap, which reach {extent}"
                ),
            ));
        }
        extent = (stride as u64)
            .checked_mul(count - 1)
            .and_then(|last| last.checked_add(extent))
            .ok_or_else(|| Error::invalid(op, "the strides overflow 64-bit addresses"))?;
    }
    Ok(extent)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: KvShape = KvShape { num_kv_heads: 2, head_dim: 64, dtype: Dtype::Bf16 };
    /// Bytes of K and V of 16 tokens in one layer.
    const LAYER: u64 = 2 * 2 * 64 * 16 * 2;

    fn native(blocks: u64) -> Result<KvView> {
        KvView::block_first(Span::new(4096, 3 * LAYER * 5), SHAPE, 16, 3, blocks, 3 * LAYER)
    }

    #[test]
    fn the_native_view_fills_its_pool_exactly() {
        let view = native(5).unwrap();
        assert_eq!(view.v.address - view.k.address, LAYER / 2);
        assert!(native(6).unwrap_err().to_string().contains("are needed"));
        let mut short = view;
        short.v.bytes -= 1;
        assert!(short.check("test").is_err());
    }

    #[test]
    fn strides_under_which_elements_share_an_address_are_refused() {
        let view = native(5).unwrap();
        let changes: [fn(&mut KvView); 4] = [
            |view| view.strides.token = 56,
            |view| view.strides.head = 0,
            |view| view.strides.layer = view.strides.head,
            |view| view.strides.block -= view.strides.layer,
        ];
        for change in changes {
            let mut wrong = view;
            change(&mut wrong);
            let message = wrong.check("test").unwrap_err().to_string();
            assert!(message.contains("overlap"), "{message}");
        }
        // A stride that nothing is multiplied with may be anything.
        KvView { num_layer_slots: 1, strides: KvStrides { layer: 0, ..view.strides }, ..view }
            .check("test")
            .unwrap();
    }

    #[test]
    fn absurd_sizes_are_errors_not_overflows() {
        let most = u32::MAX;
        let shape = KvShape { num_kv_heads: most, head_dim: most, dtype: Dtype::F16 };
        let pool = Span::new(4096, u64::MAX);
        assert!(KvView::block_first(pool, shape, most, most, u64::MAX, u64::MAX - 15).is_err());
        let mut view = native(5).unwrap();
        view.strides.block = i64::MAX - 7;
        assert!(view.check("test").is_err());
    }

    #[test]
    fn a_native_layer_slot_ends_with_the_scales_of_its_tokens() {
        let shape = KvShape { dtype: Dtype::E4m3, ..SHAPE };
        let layer = 2 * 2 * 16 * (64 + 4);
        assert_eq!(shape.token_bytes() as u64 * 16, layer);
        let pool = Span::new(4096, 3 * layer * 5);
        let view = KvView::block_first(pool, shape, 16, 3, 5, 3 * layer).unwrap();
        let scales = view.scales.unwrap();
        assert!(scales.per_token());
        assert_eq!(scales.k.address, view.k.address + 2 * 2 * 16 * 64);
        assert_eq!(scales.v.address, scales.k.address + 2 * 16 * 4);
        assert_eq!(view.strides.layer as u64, layer);
        assert_eq!(4 * scales.strides.layer as u64, layer);
        // The last scale of V ends the pool.
        let KvStrides { block, layer, head, token } = scales.strides;
        let last = scales.v.address as i64 + 4 * (4 * block + 2 * layer + head + 15 * token + 1);
        assert_eq!(last as u64, pool.address + pool.bytes);
        assert!(KvView::block_first(pool, shape, 16, 3, 6, 3 * 17408).is_err());
    }

    #[test]
    fn eight_bit_elements_need_scales_and_no_others_have_them() {
        let shape = KvShape { dtype: Dtype::E4m3, ..SHAPE };
        let bytes = shape.token_bytes() as u64 * 16 * 3;
        let view = KvView::block_first(Span::new(4096, 5 * bytes), shape, 16, 3, 5, bytes).unwrap();
        let scales = view.scales.unwrap();
        let refused = |view: KvView, words: &str| {
            let message = view.check("test").unwrap_err().to_string();
            assert!(message.contains(words), "{message}");
        };
        refused(KvView { scales: None, ..view }, "without scales");
        refused(KvView { scales: Some(scales), ..native(5).unwrap() }, "these are bf16");
        let with =
            |strides: KvStrides| KvView { scales: Some(KvScales { strides, ..scales }), ..view };
        // Shared by all, by the tokens of a head, by the heads of a token.
        with(KvStrides::NONE).check("test").unwrap();
        with(KvStrides { head: 1, ..KvStrides::NONE }).check("test").unwrap();
        with(KvStrides { head: 0, ..scales.strides }).check("test").unwrap();
        refused(with(KvStrides { token: -1, ..KvStrides::NONE }), "negative");
        refused(with(KvStrides { head: 1, token: 1, ..KvStrides::NONE }), "overlap");
        let mut short = scales;
        short.v.bytes -= 4;
        refused(KvView { scales: Some(short), ..view }, "the V scales");
        let mut odd = scales;
        odd.k.address += 2;
        refused(KvView { scales: Some(odd), ..view }, "the K scales");
    }
}
