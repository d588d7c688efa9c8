//! `append` bit by bit: the whole pool afterwards is the pool before, with the new rows in their slots.

use hybridkv::abi::{self, hkv_window};
use hybridkv::device::Span;
use hybridkv::e4m3;
use hybridkv::error::Result;
use hybridkv::layout::{Dtype, KvScales, KvShape, KvStrides, KvView};
use hybridkv::ops::{AppendArgs, HeadStrides, WindowTable};

use super::bed::{Bed, Fault, Outcome, POISON, decode, encode};
use super::case::{LAYOUTS, Layout, PoolShape, Scales};
use crate::random::Rng;

/// One case of `append`.
#[derive(Debug)]
pub struct Case {
    dtype: Dtype,
    /// Scales of an e4m3 pool; `None`: it is of `dtype`.
    scales: Option<Scales>,
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
            scales: rng.pick(&[
                None,
                None,
                Some(Scales::Tensor),
                Some(Scales::Head),
                Some(Scales::Token),
            ]),
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
        format!("append {}{:?}", if self.scales.is_some() { "e4m3 " } else { "" }, self.layout)
    }

    /// The case's name.
    pub fn name(&self) -> String {
        format!(
            "append/{}/{}/d{}/{}{}/b{} {:?} blocks{} layers{} groups{} skipped{}% gaps{:?}",
            self.tokens,
            self.heads,
            self.head_dim,
            self.dtype.name(),
            self.scales.map_or(String::new(), |scales| format!("/e4m3 per {scales:?}")),
            self.block_size,
            self.layout,
            self.blocks,
            self.layers,
            self.groups,
            self.skipped,
            self.gaps
        )
    }

    /// A row as e4m3: what `append` is documented to do, in f32.
    fn quantise(&self, row: &[u16], target: &mut [u8], scale: &mut f32, compute: bool) {
        let row: Vec<f32> = row.iter().map(|&bits| decode(self.dtype, bits) as f32).collect();
        if compute {
            let numbers = row.iter().filter(|x| !x.is_nan());
            let largest = numbers.fold(0f32, |max, x| if x.abs() > max { x.abs() } else { max });
            *scale = (largest / e4m3::MAX).max(e4m3::LEAST_SCALE);
        }
        let inverse = scale.recip();
        for (element, x) in target.iter_mut().zip(row) {
            *element = e4m3::from_f32(x * inverse);
        }
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
        // Any bits, NaN and infinities among them, or numbers.
        let numbers = self.scales.is_some() && rng.chance(60);
        let mut new = || -> Vec<u16> {
            let count = self.tokens * token_stride;
            if numbers {
                rng.normals(count).map(|x| encode(self.dtype, x)).collect()
            } else {
                (0..count).map(|_| rng.next() as u16).collect()
            }
        };
        let (k_new, v_new) = (new(), new());
        let element = if self.scales.is_some() { 1 } else { 2 };
        let before: Vec<u8> = (0..pool.elements * element).map(|_| rng.next() as u8).collect();
        let (scale_strides, num_scales) = self.scales.map_or((KvStrides::NONE, 0), |scales| {
            scales.shape(self.blocks, self.layers, self.heads, self.block_size)
        });
        let mut scales = [0, 1]
            .map(|_| (0..num_scales).map(|_| 0.01 + rng.below(99) as f32).collect::<Vec<_>>());
        let scales_before = scales.clone();
        let mut expected = before.clone();
        for (token, &slot) in slots.iter().enumerate().filter(|(_, slot)| **slot >= 0) {
            let (block, offset) =
                (slot as usize / self.block_size, slot as usize % self.block_size);
            for head in 0..self.heads {
                let from = token * token_stride + head * head_stride;
                let to = pool.index(block, layer_slot, head, offset);
                let KvStrides { block: b, layer, head: h, token: t } = scale_strides;
                let scale_at: usize = [(block, b), (layer_slot, layer), (head, h), (offset, t)]
                    .iter()
                    .map(|&(i, stride)| i * stride as usize)
                    .sum();
                for (half, new) in [&k_new, &v_new].into_iter().enumerate() {
                    let row = &new[from..from + self.head_dim];
                    let to = (to + half * pool.v_offset) * element;
                    let target = &mut expected[to..to + self.head_dim * element];
                    match self.scales {
                        None => target.copy_from_slice(bytemuck::cast_slice(row)),
                        Some(granularity) => {
                            let scale = &mut scales[half][scale_at];
                            self.quantise(row, target, scale, granularity == Scales::Token);
                        }
                    }
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
        let scale_buffers =
            [bed.device.upload(&scales_before[0])?, bed.device.upload(&scales_before[1])?];
        let v_bytes = (element * pool.v_offset) as u64;
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
                    dtype: if self.scales.is_some() { Dtype::E4m3 } else { self.dtype },
                },
                block_size: self.block_size as u32,
                num_blocks: self.blocks as u64,
                num_layer_slots: self.layers as u32,
                scales: self.scales.map(|_| KvScales {
                    k: scale_buffers[0].span(),
                    v: scale_buffers[1].span(),
                    strides: scale_strides,
                }),
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
                Some(Fault::Stray) => stream.fill(buffer.address(), !before[0], 1)?,
                Some(Fault::Nan) => stream.fill(buffer.address(), POISON as u8, 16)?,
                _ => {}
            }
        }
        stream.synchronize()?;
        let after: Vec<u8> = buffer.download()?;
        let mut outcome = Outcome::default();
        for (half, buffer) in scale_buffers.iter().enumerate() {
            let bits = |scales: &[f32]| scales.iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
            let (ours, wanted) = (bits(&buffer.download::<f32>()?), bits(&scales[half]));
            if let Some(i) = (0..ours.len()).find(|&i| ours[i] != wanted[i]) {
                let (ours, wanted) = (f32::from_bits(ours[i]), f32::from_bits(wanted[i]));
                outcome.fail(format!("scale {i} of {} is {ours}, not {wanted}", ["K", "V"][half]));
            }
        }
        let wrong = (0..expected.len()).filter(|&i| after[i] != expected[i]);
        let mut wrong = wrong.peekable();
        if let Some(&first) = wrong.peek() {
            let kind = match (after[first] == before[first], expected[first] == before[first]) {
                (true, _) => "was not written",
                (_, true) => "was written and should not have been",
                _ => "is wrong",
            };
            let count = wrong.count();
            outcome.fail(format!("byte {first} of the pool {kind} ({count} in all are wrong)"));
            outcome.note("wrong", count as f64);
        }
        Ok(outcome)
    }
}
