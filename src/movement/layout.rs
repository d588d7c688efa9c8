//! Where the rows of a block lie, in our layouts and those of others, and the move from one to another.

use std::ops::Range;

use crate::abi::hkv_copy;
use crate::device::{Device, DeviceBuffer};
use crate::error::{Error, Result};
use crate::ops::{MAX_MOVE_DIMS, MoveDim, MoveShape};

const OP: &str = "block layout";

/// What a block holds: rows `[layers][parts][heads][tokens]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockRows {
    /// Layers of the group.
    pub layers: u32,
    /// K and V: 2; 1 for a latent that serves as both.
    pub parts: u32,
    /// KV heads.
    pub heads: u32,
    /// Tokens.
    pub tokens: u32,
    /// Bytes of one token of one head, a multiple of 16.
    pub row_bytes: u32,
}

impl BlockRows {
    /// Bytes of all rows.
    ///
    /// # Errors
    /// `Unsupported` for rows of no or odd bytes, or none of them; `InvalidArgument` when they overflow.
    pub fn bytes(&self) -> Result<i64> {
        if self.row_bytes == 0 || !self.row_bytes.is_multiple_of(16) {
            let supported = "positive multiples of 16";
            return Err(Error::unsupported(OP, "bytes of a row:", self.row_bytes, supported));
        }
        let counts = [self.layers, self.parts, self.heads, self.tokens];
        if counts.contains(&0) {
            let supported = "at least one of each";
            let given = format!("{counts:?}");
            return Err(Error::unsupported(OP, "layers, parts, heads, tokens:", given, supported));
        }
        let bytes = counts
            .iter()
            .try_fold(i64::from(self.row_bytes), |bytes, &n| bytes.checked_mul(n.into()));
        bytes.ok_or_else(|| Error::invalid(OP, "the rows of a block overflow 64-bit addresses"))
    }
}

/// Where the layers of a block lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Layers {
    /// Bytes from one to the next.
    Stride(i64),
    /// Bytes of each from the first one's place on: for pools that were allocated layer by layer.
    Offsets(Vec<i64>),
}

/// Where every row of a block lies, from the block's address on: strides in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockLayout {
    /// What the block holds.
    pub rows: BlockRows,
    /// Between layers.
    pub layers: Layers,
    /// Between K and V.
    pub part: i64,
    /// Between KV heads.
    pub head: i64,
    /// Between tokens.
    pub token: i64,
}

impl BlockLayout {
    /// Ours: `[layer][K|V][head][token]`, contiguous.
    ///
    /// # Errors
    /// Those of [`BlockRows::bytes`], as for all constructors.
    pub fn block_first_hnd(rows: BlockRows) -> Result<Self> {
        let bytes = rows.bytes()?;
        let head = i64::from(rows.row_bytes) * i64::from(rows.tokens);
        let part = head * i64::from(rows.heads);
        let layers = Layers::Stride(bytes / i64::from(rows.layers));
        Ok(Self { rows, layers, part, head, token: rows.row_bytes.into() })
    }

    /// `[layer][K|V][token][head]`, contiguous.
    pub fn block_first_nhd(rows: BlockRows) -> Result<Self> {
        let (heads, row) = (i64::from(rows.heads), i64::from(rows.row_bytes));
        Ok(Self { head: row, token: row * heads, ..Self::block_first_hnd(rows)? })
    }

    /// `[head][layer][K|V][token]`, contiguous: the pages of fewer heads are slices of those of more, whatever the
    /// degree of tensor parallelism that they were stored at.
    pub fn heads_outermost(rows: BlockRows) -> Result<Self> {
        let bytes = rows.bytes()?;
        let part = i64::from(rows.row_bytes) * i64::from(rows.tokens);
        Ok(Self {
            rows,
            layers: Layers::Stride(part * i64::from(rows.parts)),
            part,
            head: bytes / i64::from(rows.heads),
            token: rows.row_bytes.into(),
        })
    }

    /// The same block in a pool of other layer and part strides, as LayerFirst ones have: a tensor
    /// `[layer][K|V][block][..]`, or one per layer and part.
    #[must_use]
    pub fn in_layers(self, layers: Layers, part: i64) -> Self {
        Self { layers, part, ..self }
    }

    /// The places of layers at these addresses: a stride, where they have one.
    pub fn layers_at(bases: &[u64]) -> Layers {
        let offset = |base: u64| base.wrapping_sub(bases.first().copied().unwrap_or(base)) as i64;
        let offsets: Vec<i64> = bases.iter().map(|&base| offset(base)).collect();
        let stride = offsets.get(1).copied().unwrap_or(0);
        if offsets.windows(2).all(|pair| pair[1].wrapping_sub(pair[0]) == stride) {
            return Layers::Stride(stride);
        }
        Layers::Offsets(offsets)
    }
}

/// What of a block moves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockPart {
    /// Of its layers.
    pub layers: Range<u32>,
    /// Of its tokens.
    pub tokens: Range<u32>,
}

impl BlockPart {
    /// All of it.
    pub fn whole(rows: BlockRows) -> Self {
        Self { layers: 0..rows.layers, tokens: 0..rows.tokens }
    }
}

/// The move of blocks, or of the same part of each, from one layout to another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockMove {
    /// Its rows.
    pub shape: MoveShape,
    /// Bytes of a row.
    pub row_bytes: u64,
    /// From a block's address to its first row that moves, at the source.
    pub src_offset: i64,
    /// The same at the destination.
    pub dst_offset: i64,
    /// Offsets of the first dimension's steps, where they have no stride.
    offsets: [Vec<i64>; 2],
}

impl BlockMove {
    /// The move of a part of blocks that hold the same rows in two layouts.
    ///
    /// # Errors
    /// `InvalidArgument` when the layouts hold different rows or the part is none of theirs, or for strides that are
    /// no multiples of 16.
    pub fn between(src: &BlockLayout, dst: &BlockLayout, part: &BlockPart) -> Result<Self> {
        let rows = src.rows;
        rows.bytes()?;
        if rows != dst.rows {
            let message = format!("{rows:?} at the source, {:?} at the destination", dst.rows);
            return Err(Error::invalid(OP, message));
        }
        let (layers, tokens) = (&part.layers, &part.tokens);
        let inside = layers.end <= rows.layers && tokens.end <= rows.tokens;
        if !inside || layers.is_empty() || tokens.is_empty() {
            return Err(Error::invalid(OP, format!("{part:?} is no part of {rows:?}")));
        }
        let mut offsets = [Vec::new(), Vec::new()];
        let mut first = [0; 2];
        let mut layer_strides = [0; 2];
        for (side, layout) in [src, dst].into_iter().enumerate() {
            let overflow = || Error::invalid(OP, "the strides overflow 64-bit addresses");
            let steps =
                |count: u32, stride: i64| i64::from(count).checked_mul(stride).ok_or_else(overflow);
            first[side] = steps(tokens.start, layout.token)?;
            match &layout.layers {
                Layers::Stride(stride) => {
                    let layers = steps(layers.start, *stride)?;
                    first[side] = layers.checked_add(first[side]).ok_or_else(overflow)?;
                    layer_strides[side] = *stride;
                }
                Layers::Offsets(all) => {
                    let range = layers.start as usize..layers.end as usize;
                    let Some(used) = all.get(range) else {
                        let message = format!("{} offsets of {} layers", all.len(), rows.layers);
                        return Err(Error::invalid(OP, message));
                    };
                    if used.iter().any(|offset| offset % 16 != 0) {
                        return Err(Error::invalid(OP, "an offset is no multiple of 16 bytes"));
                    }
                    offsets[side] = used.to_vec();
                }
            }
        }
        let dim = |count: u32, src_stride: i64, dst_stride: i64| MoveDim {
            count,
            src_stride,
            dst_stride,
        };
        let layer = dim(layers.len() as u32, layer_strides[0], layer_strides[1]);
        let mut inner = vec![
            dim(rows.parts, src.part, dst.part),
            dim(rows.heads, src.head, dst.head),
            dim(tokens.len() as u32, src.token, dst.token),
        ];
        let by_table = offsets.iter().any(|table| !table.is_empty());
        if !by_table {
            inner.push(layer);
        }
        let row_bytes = merge(&mut inner, rows.row_bytes.into());
        // Rows that follow one another at the destination are written one after another.
        inner.sort_unstable_by_key(|dim| std::cmp::Reverse(dim.dst_stride));
        let dims: Vec<MoveDim> = by_table.then_some(layer).into_iter().chain(inner).collect();
        debug_assert!(dims.len() <= MAX_MOVE_DIMS);
        // With a table on one side only, the other's stride stays.
        Ok(Self {
            shape: MoveShape::blocks(&dims)?,
            row_bytes,
            src_offset: first[0],
            dst_offset: first[1],
            offsets,
        })
    }

    /// The descriptor of a block at these addresses.
    pub fn block(&self, src: u64, dst: u64) -> hkv_copy {
        hkv_copy {
            src: src.wrapping_add_signed(self.src_offset) as *const _,
            dst: dst.wrapping_add_signed(self.dst_offset) as *mut _,
            bytes: self.row_bytes,
        }
    }

    /// The shape with its tables of offsets on a device, and their memory, which must outlive the moves; `None` when
    /// there are no such tables.
    ///
    /// # Errors
    /// Those of allocation and upload.
    pub fn on(&self, device: &Device) -> Result<(MoveShape, Option<DeviceBuffer>)> {
        let [src, dst] = &self.offsets;
        if src.is_empty() && dst.is_empty() {
            return Ok((self.shape, None));
        }
        let tables = device.upload(&[src.as_slice(), dst.as_slice()].concat())?;
        let bytes = |table: &Vec<i64>| size_of_val(table.as_slice()) as u64;
        let mut shape = self.shape;
        if !src.is_empty() {
            shape = shape.with_src_offsets(crate::device::Span::new(tables.address(), bytes(src)));
        }
        if !dst.is_empty() {
            let at = tables.address() + bytes(src);
            shape = shape.with_dst_offsets(crate::device::Span::new(at, bytes(dst)));
        }
        Ok((shape, Some(tables)))
    }
}

/// Makes rows as long and dimensions as few as they can be. Returns the bytes of a row.
fn merge(dims: &mut Vec<MoveDim>, mut row_bytes: u64) -> u64 {
    dims.retain(|dim| dim.count > 1);
    // A dimension whose steps are as long as a row, on both sides, makes the row longer.
    while let Some(d) = dims
        .iter()
        .position(|dim| dim.src_stride == row_bytes as i64 && dim.dst_stride == row_bytes as i64)
    {
        row_bytes *= u64::from(dims.swap_remove(d).count);
    }
    // One whose steps are as long as all of another's continues that one.
    let continues = |outer: &MoveDim, inner: &MoveDim| {
        let extent = i64::from(inner.count);
        inner.count.checked_mul(outer.count).is_some()
            && inner.src_stride.checked_mul(extent) == Some(outer.src_stride)
            && inner.dst_stride.checked_mul(extent) == Some(outer.dst_stride)
    };
    let find = |dims: &[MoveDim]| {
        let pairs = (0..dims.len()).flat_map(|a| (0..dims.len()).map(move |b| (a, b)));
        pairs.into_iter().find(|&(a, b)| a != b && continues(&dims[a], &dims[b]))
    };
    while let Some((outer, inner)) = find(dims) {
        dims[inner].count *= dims[outer].count;
        dims.swap_remove(outer);
    }
    row_bytes
}

/// The blocks that hold these tokens of a sequence, the live ones of a window say: index of each, and which of its
/// tokens they are. All but the first and the last are whole.
pub fn live_blocks(tokens: Range<u64>, block_size: u32) -> impl Iterator<Item = (u64, Range<u32>)> {
    let size = u64::from(block_size.max(1));
    let blocks =
        if tokens.is_empty() { 0..0 } else { tokens.start / size..tokens.end.div_ceil(size) };
    blocks.map(move |block| {
        let start = block * size;
        let inside = |token: u64| token.clamp(start, start + size) - start;
        (block, inside(tokens.start) as u32..inside(tokens.end) as u32)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Every row of a block, by its definition: address of each from the block's address on.
    fn addresses(layout: &BlockLayout, part: &BlockPart) -> Vec<i64> {
        let mut all = Vec::new();
        for layer in part.layers.clone() {
            let layer = match &layout.layers {
                Layers::Stride(stride) => i64::from(layer) * stride,
                Layers::Offsets(offsets) => offsets[layer as usize],
            };
            for p in 0..layout.rows.parts {
                for head in 0..layout.rows.heads {
                    for token in part.tokens.clone() {
                        all.push(
                            layer
                                + i64::from(p) * layout.part
                                + i64::from(head) * layout.head
                                + i64::from(token) * layout.token,
                        );
                    }
                }
            }
        }
        all
    }

    /// The 16-byte vectors that a move copies: from where to where.
    fn copied(m: &BlockMove) -> Vec<(i64, i64)> {
        let dims = m.shape.dims();
        let mut all = Vec::new();
        for index in 0..m.shape.rows() {
            let (mut src, mut dst, mut above) = (m.src_offset, m.dst_offset, index);
            for (d, dim) in dims.iter().enumerate().rev() {
                let step = (above % u64::from(dim.count)) as i64;
                above /= u64::from(dim.count);
                let offset = |table: &[i64], stride| match table.get(step as usize) {
                    Some(offset) if d == 0 => *offset,
                    _ => step * stride,
                };
                src += offset(&m.offsets[0], dim.src_stride);
                dst += offset(&m.offsets[1], dim.dst_stride);
            }
            all.extend((0..m.row_bytes as i64 / 16).map(|v| (src + 16 * v, dst + 16 * v)));
        }
        all.sort_unstable();
        all
    }

    fn layouts(rows: BlockRows, which: usize) -> BlockLayout {
        let pool = 1000 * i64::from(rows.row_bytes) * i64::from(rows.tokens * rows.heads);
        match which {
            0 => BlockLayout::block_first_hnd(rows).unwrap(),
            1 => BlockLayout::block_first_nhd(rows).unwrap(),
            2 => BlockLayout::heads_outermost(rows).unwrap(),
            3 => BlockLayout::block_first_hnd(rows)
                .unwrap()
                .in_layers(Layers::Stride(2 * pool), pool),
            4 => BlockLayout::block_first_nhd(rows)
                .unwrap()
                .in_layers(Layers::Stride(pool), 64 * pool),
            _ => {
                let bases: Vec<u64> =
                    (0..rows.layers as u64).map(|l| (l * l * 7 + 3) * 4 * pool as u64).collect();
                let layers = BlockLayout::layers_at(&bases);
                BlockLayout::block_first_nhd(rows).unwrap().in_layers(layers, pool)
            }
        }
    }

    proptest! {
        /// Whatever the layouts and the part: every vector of every row moves from its place to its place, once.
        #[test]
        fn moves_are_those_of_the_rows(
            (layers, parts, heads, tokens) in (1u32..6, 1u32..3, 1u32..4, 1u32..9),
            row_vectors in 1u32..5,
            (from, to) in (0usize..6, 0usize..6),
            cut in (0u32..100, 0u32..100, 0u32..100, 0u32..100),
        ) {
            let rows = BlockRows { layers, parts, heads, tokens, row_bytes: 16 * row_vectors };
            let range = |a: u32, b: u32, n: u32| (a % n).min(b % n)..(a % n).max(b % n) + 1;
            let part = BlockPart { layers: range(cut.0, cut.1, layers), tokens: range(cut.2, cut.3, tokens) };
            let (src, dst) = (layouts(rows, from), layouts(rows, to));
            let m = BlockMove::between(&src, &dst, &part).unwrap();
            let mut expected: Vec<(i64, i64)> = addresses(&src, &part)
                .into_iter()
                .zip(addresses(&dst, &part))
                .flat_map(|(s, d)| (0..row_vectors as i64).map(move |v| (s + 16 * v, d + 16 * v)))
                .collect();
            expected.sort_unstable();
            prop_assert_eq!(copied(&m), expected);
        }

        #[test]
        fn live_blocks_hold_exactly_the_tokens(start in 0u64..1000, count in 0u64..300, size in 1u32..65) {
            let tokens: Vec<u64> = live_blocks(start..start + count, size)
                .flat_map(|(block, inside)| inside.map(move |t| block * u64::from(size) + u64::from(t)))
                .collect();
            prop_assert_eq!(tokens, (start..start + count).collect::<Vec<_>>());
        }
    }

    #[test]
    fn rows_are_as_long_as_the_layouts_allow() {
        let rows = BlockRows { layers: 48, parts: 2, heads: 1, tokens: 16, row_bytes: 256 };
        let between = |from, to| {
            let m = BlockMove::between(
                &layouts(rows, from),
                &layouts(rows, to),
                &BlockPart::whole(rows),
            );
            let m = m.unwrap();
            (m.row_bytes, m.shape.dims().len())
        };
        assert_eq!(between(0, 0), (48 * 2 * 4096, 0), "one contiguous block");
        assert_eq!(between(3, 0), (4096, 1), "LayerFirst, K and V at the same distance");
        assert_eq!(between(4, 0), (4096, 2), "K and V in tensors of their own");
        assert_eq!(between(5, 0), (4096, 2), "layers with bases of their own");
        let heads = BlockRows { heads: 8, ..rows };
        let nhd = BlockLayout::block_first_nhd(heads).unwrap();
        let hnd = BlockLayout::block_first_hnd(heads).unwrap();
        let m = BlockMove::between(&nhd, &hnd, &BlockPart::whole(heads)).unwrap();
        assert_eq!(
            (m.row_bytes, m.shape.dims().len()),
            (256, 3),
            "layers and parts are one dimension"
        );
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let rows = BlockRows { layers: 4, parts: 2, heads: 2, tokens: 16, row_bytes: 128 };
        let layout = BlockLayout::block_first_hnd(rows).unwrap();
        let whole = BlockPart::whole(rows);
        for wrong in [BlockRows { row_bytes: 24, ..rows }, BlockRows { heads: 0, ..rows }] {
            assert!(BlockLayout::block_first_nhd(wrong).is_err());
        }
        let other = BlockLayout::block_first_hnd(BlockRows { heads: 4, ..rows }).unwrap();
        assert!(BlockMove::between(&layout, &other, &whole).is_err());
        for part in [
            BlockPart { layers: 0..5, ..whole.clone() },
            BlockPart { layers: 2..2, ..whole.clone() },
            BlockPart { tokens: 8..17, ..whole.clone() },
        ] {
            assert!(BlockMove::between(&layout, &layout, &part).is_err(), "{part:?}");
        }
        let short = layout.clone().in_layers(Layers::Offsets(vec![0, 4096]), 2048);
        assert!(BlockMove::between(&short, &layout, &whole).is_err());
        let odd = layout.clone().in_layers(Layers::Offsets(vec![0, 8, 16, 32]), 2048);
        assert!(BlockMove::between(&odd, &layout, &whole).is_err());
    }
}
