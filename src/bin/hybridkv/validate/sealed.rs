//! The sealed blocks of a case of attention: slots as the codec writes them, and a reading of them of its own.

use hybridkv::codec::{Codec, Encoded, Geometry, LayerPlaces};
use hybridkv::error::Result;
use hybridkv::layout::Dtype;
use hybridkv::reference::Tolerance;

use super::bed::{self, decode, tolerance as tolerance_of};
use super::case::{Case, Seq};
use crate::random::Rng;

/// Slots of the sealed blocks of a batch, and which blocks they hold.
pub(super) struct Sealed {
    pub(super) codec: Codec,
    pub(super) geometry: Geometry,
    pub(super) slot_bytes: usize,
    /// All of them; those that hold nothing are poisoned.
    pub(super) slots: Vec<u8>,
    /// Per sequence and block index, the slot.
    of: Vec<Vec<Option<usize>>>,
}

impl Sealed {
    /// Draws which of the blocks that are full, settled and seen are sealed: all, all but the first and the last,
    /// or about half; `blocks` has an id where a block is seen.
    pub(super) fn draw(
        case: &Case,
        seqs: &[Seq],
        blocks: &[Vec<Option<usize>>],
        rng: &mut Rng,
    ) -> Result<Option<Self>> {
        let Some(codec) = case.sealed else { return Ok(None) };
        let sizes = [case.layers, case.kv_heads, case.head_dim, case.block_size].map(|n| n as u32);
        let geometry = Geometry::new(sizes[0], sizes[1], sizes[2], sizes[3], case.dtype)?;
        let slot_bytes = codec.slot_bytes(&geometry)?.next_multiple_of(128);
        let manner = rng.below(3);
        let mut count = 0;
        let of: Vec<Vec<Option<usize>>> = (seqs.iter().zip(blocks))
            .map(|(seq, blocks)| {
                let settled = seq.kv_len.saturating_sub(seq.q_len) / case.block_size;
                let slot = |(index, block): (usize, &Option<usize>)| {
                    let chosen = match manner {
                        0 => true,
                        1 => index > 0 && index + 1 < settled,
                        _ => rng.chance(50),
                    };
                    (block.is_some() && index < settled && chosen).then(|| {
                        count += 1;
                        count - 1
                    })
                };
                blocks.iter().enumerate().map(slot).collect()
            })
            .collect();
        let slots = vec![0xff; (count + 1) * slot_bytes];
        Ok(Some(Self { codec, geometry, slot_bytes, slots, of }))
    }

    /// The slot of a block.
    pub(super) fn slot(&self, seq: usize, block: usize) -> Option<usize> {
        self.of[seq][block]
    }

    /// Seals a block, `[layer][K|V][head][token][dim]`.
    pub(super) fn seal(&mut self, slot: usize, block: &[u16]) -> Result<()> {
        let slot = &mut self.slots[slot * self.slot_bytes..][..self.slot_bytes];
        match self.codec.encode(&self.geometry, block, slot)? {
            Encoded::Fits { .. } => Ok(()),
            Encoded::RawFallback(why) => unreachable!("finite elements fit: {why}"),
        }
    }

    /// K (`half` 0) or V of a token, `zero + code * step`, rotated back where the codec rotates.
    pub(super) fn row(
        &self,
        slot: usize,
        layer: usize,
        half: usize,
        head: usize,
        token: usize,
    ) -> Vec<f64> {
        let slot = &self.slots[slot * self.slot_bytes..][..self.slot_bytes];
        let (dim, tokens) = (self.geometry.head_dim(), self.geometry.block_size());
        let places = self.codec.layer_places(&self.geometry, layer as u32);
        let LayerPlaces { key_groups, value_groups, keys, values } =
            places.unwrap_or_else(|e| unreachable!("{e}"));
        let bits = if self.codec == Codec::Int8 { 8 } else { 4 };
        let codes = [keys, values][half] as usize + (head * tokens + token) * dim * bits / 8;
        let mut row: Vec<f64> = (0..dim)
            .map(|i| {
                let code = match bits {
                    8 => slot[codes + i],
                    _ => slot[codes + i / 2] >> (4 * (i % 2)) & 15,
                };
                let group = match half {
                    0 => {
                        key_groups as usize
                            + ((head * tokens.div_ceil(64) + token / 64) * dim + i) * 4
                    }
                    _ => value_groups as usize + (head * tokens + token) * 4,
                };
                let [zero, step] = [group, group + 2].map(|at| self.element(slot, at));
                zero + f64::from(code) * step
            })
            .collect();
        if half == 1 && self.codec == Codec::Int4 {
            hadamard(&mut row);
        }
        row
    }

    fn element(&self, slot: &[u8], at: usize) -> f64 {
        decode(self.geometry.dtype(), u16::from_le_bytes([slot[at], slot[at + 1]]))
    }
}

/// Multiplies with the orthonormal Hadamard matrix, entry by entry.
fn hadamard(row: &mut [f64]) {
    let sign = |i: usize, j: usize| if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
    let factor = (row.len() as f64).sqrt().recip();
    let turned: Vec<f64> = (0..row.len())
        .map(|i| factor * row.iter().enumerate().map(|(j, x)| sign(i, j) * x).sum::<f64>())
        .collect();
    row.copy_from_slice(&turned);
}

/// What outputs over sealed blocks may differ by: queries with steps folded in, and weights with steps, are of f16
/// whatever the queries are.
pub(super) fn tolerance(dtype: Dtype) -> Tolerance {
    let of_f16 = tolerance_of(Dtype::F16);
    match dtype {
        Dtype::F16 => Tolerance {
            relative: 4.0 * of_f16.relative,
            worst_row: 4.0 * of_f16.worst_row,
            cosine_distance: 16.0 * of_f16.cosine_distance,
            ..of_f16
        },
        dtype => tolerance_of(dtype),
    }
}

/// Largest error of an LSE over sealed blocks: a logit is a sum of products that were each rounded to 2^-12 of
/// their own magnitude.
pub(super) const LSE_TOLERANCE: f64 = 4.0 * bed::LSE_TOLERANCE;
