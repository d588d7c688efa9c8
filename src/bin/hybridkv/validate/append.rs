//! `append` bit by bit: the whole pool afterwards is the pool before, with the new rows in their slots.

use hybridkv::abi::{self, hkv_window};
use hybridkv::device::Span;
use hybridkv::error::Result;
use hybridkv::layout::{Dtype, KvShape, KvView};
use hybridkv::ops::{AppendArgs, HeadStrides, WindowTable};

use super::bed::{Bed, Fault, Outcome, POISON};
use super::case::{LAYOUTS, Layout, PoolShape};
use crate::random::Rng;

/// One case of `append`.
#[derive(Debug)]
pub struct Case {
    dtype: Dtype,
    head_dim: usize,
    heads: usize,
    block_size: usize,
    layout: Layout,
    layers: usize,
    blocks: usize,
    tokens: usize,
    /// Groups in the list of slots.
    groups: usize,
    /// Of a hundred tokens, how many are skipped.
    skipped: u64,
    /// Elements of gap between heads, and between tokens, of the new rows.
    gaps: (usize, usize),
}

impl Case {
    /// Draws a case of at most `pool` elements.
    pub fn random(rng: &mut Rng, pool: usize) -> Self {
        let head_dim = rng.pick(&[64, 128, 128, 256]);
        let heads = rng.pick(&[1, 2, 3, 5, 8]);
        let block_size = rng.pick(&[8, 16, 32, 64, 128]);
        let layers = rng.pick(&[1, 2, 4]);
        let block = 2 * head_dim * heads * block_size * layers;
        let blocks = rng.range(1, (pool / block).clamp(1, 200) as u64) as usize;
        let tokens = match rng.below(4) {
            0 => 1,
            1 => rng.range(0, 8),
            _ => rng.below(blocks as u64 * block_size as u64 + 1),
        } as usize;
        Self {
            dtype: rng.pick(&[Dtype::Bf16, Dtype::F16]),
            head_dim,
            heads,
            block_size,
            layout: rng.pick(&LAYOUTS),
            layers,
            blocks,
            tokens: tokens.min(blocks * block_size),
            groups: rng.pick(&[1, 2, 5]),
            skipped: rng.pick(&[0, 0, 20, 100]),
            gaps: rng.pick(&[(0, 0), (0, 0), (8, 0), (0, 24), (16, 8)]),
        }
    }

    /// The class of the case in the summary.
    pub fn class(&self) -> String {
        format!("append {:?}", self.layout)
    }

    /// The case's name.
    pub fn name(&self) -> String {
        format!(
            "append/{}/{}/d{}/{}/b{} {:?} blocks{} layers{} groups{} skipped{}% gaps{:?}",
            self.tokens,
            self.heads,
            self.head_dim,
            self.dtype.name(),
            self.block_size,
            self.layout,
            self.blocks,
            self.layers,
            self.groups,
            self.skipped,
            self.gaps
        )
    }

    /// Runs the case.
    pub fn run(&self, bed: &Bed, rng: &mut Rng) -> Result<Outcome> {
        let pool = PoolShape::new(
            self.layout,
            self.blocks,
            self.layers,
            self.block_size,
            self.heads,
            self.head_dim,
        );
        let (group, layer) = (rng.below(self.groups as u64) as usize, rng.below(3) as usize);
        let layer_slot = rng.below(self.layers as u64) as usize;
        let mut windows = [hkv_window {
            kind: 77,
            extent: -1,
            sink_tokens: -1,
            group: i32::MAX,
            layer_slot: -1,
            reserved: [0; 3],
        }; 3];
        windows[layer] = hkv_window {
            kind: abi::HKV_LAYER_FULL as i32,
            extent: 0,
            sink_tokens: 0,
            group: group as i32,
            layer_slot: layer_slot as i32,
            reserved: [0; 3],
        };
        let mut free: Vec<i64> = (0..(self.blocks * self.block_size) as i64).collect();
        rng.shuffle(&mut free);
        let slots: Vec<i64> = free[..self.tokens]
            .iter()
            .map(|&slot| if rng.chance(self.skipped) { -1 - slot } else { slot })
            .collect();
        // Slots of other groups lead far outside.
        let mut slot_mapping = vec![i64::MAX / 4; self.groups * self.tokens];
        slot_mapping[group * self.tokens..][..self.tokens].copy_from_slice(&slots);

        let head_stride = self.head_dim + self.gaps.0;
        let token_stride = self.heads * head_stride + self.gaps.1;
        let mut new =
            || -> Vec<u16> { (0..self.tokens * token_stride).map(|_| rng.next() as u16).collect() };
        let (k_new, v_new) = (new(), new());
        let before: Vec<u16> = (0..pool.elements).map(|_| rng.next() as u16).collect();
        let mut expected = before.clone();
        for (token, &slot) in slots.iter().enumerate().filter(|(_, slot)| **slot >= 0) {
            let (block, offset) =
                (slot as usize / self.block_size, slot as usize % self.block_size);
            for head in 0..self.heads {
                let from = token * token_stride + head * head_stride;
                let to = pool.index(block, layer_slot, head, offset);
                for i in 0..self.head_dim {
                    expected[to + i] = k_new[from + i];
                    expected[to + pool.v_offset + i] = v_new[from + i];
                }
            }
        }

        let mut given = slot_mapping;
        match bed.fault {
            Some(Fault::Swap) if self.tokens > 1 => {
                given.swap(group * self.tokens, group * self.tokens + 1)
            }
            Some(Fault::Skip) if self.tokens > 0 => given[group * self.tokens] = -1,
            _ => {}
        }
        let buffer = bed.device.upload(&before)?;
        let [k, v] = [bed.device.upload(&k_new)?, bed.device.upload(&v_new)?];
        let [slots, rows] = [bed.device.upload(&given)?, bed.device.upload(&windows)?];
        let v_bytes = 2 * pool.v_offset as u64;
        let args = AppendArgs {
            k_new: k.span(),
            v_new: v.span(),
            dtype: self.dtype,
            new_strides: HeadStrides { token: token_stride as i64, head: head_stride as i64 },
            kv: KvView {
                k: buffer.span(),
                v: Span::new(buffer.address() + v_bytes, buffer.len() as u64 - v_bytes),
                strides: pool.strides,
                shape: KvShape {
                    num_kv_heads: self.heads as u32,
                    head_dim: self.head_dim as u32,
                    dtype: self.dtype,
                },
                block_size: self.block_size as u32,
                num_blocks: self.blocks as u64,
                num_layer_slots: self.layers as u32,
                scales: None,
            },
            slot_mapping: slots.span(),
            num_groups: self.groups as u32,
            windows: WindowTable { rows: rows.span(), num_layers: 3 },
            layer: layer as u32,
            num_tokens: self.tokens as u32,
        };
        let stream = bed.stream.as_ref();
        // SAFETY: all buffers live until the stream is synchronised; the slots are distinct.
        unsafe {
            bed.kernels.append(&args, stream)?;
            match bed.fault {
                Some(Fault::Stray) => stream.fill(buffer.address(), !(before[0] as u8), 1)?,
                Some(Fault::Nan) => stream.fill(buffer.address(), POISON as u8, 16)?,
                _ => {}
            }
        }
        stream.synchronize()?;
        let after: Vec<u16> = buffer.download()?;
        let mut outcome = Outcome::default();
        let wrong = (0..pool.elements).filter(|&i| after[i] != expected[i]);
        let mut wrong = wrong.peekable();
        if let Some(&first) = wrong.peek() {
            let kind = match (after[first] == before[first], expected[first] == before[first]) {
                (true, _) => "was not written",
                (_, true) => "was written and should not have been",
                _ => "is wrong",
            };
            let count = wrong.count();
            outcome.fail(format!("element {first} of the pool {kind} ({count} in all are wrong)"));
            outcome.note("wrong", count as f64);
        }
        Ok(outcome)
    }
}
