//! e4m3 keys and values through the launchers on every device at hand: what `append` makes of new tokens, and
//! `attention` over it, with scales of every granularity; tree masks on the way.

mod common;

use bytemuck::Zeroable;
use half::{bf16, f16};
use hybridkv::abi::hkv_window;
use hybridkv::device::{Device, Span};
use hybridkv::e4m3;
use hybridkv::layout::{Dtype, KvScales, KvShape, KvStrides, KvView};
use hybridkv::ops::{AppendArgs, AttentionArgs, BlockTables, HeadStrides, Kernels, WindowTable};
use hybridkv::reference::{self, Logits};
use proptest::prelude::*;

const DIM: usize = 64;
const SCALE: f32 = 0.125;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Scales {
    Tensor,
    Head,
    Token,
}

#[derive(Debug, Clone)]
struct Case {
    dtype: Dtype,
    scales: Scales,
    kv_heads: usize,
    group: usize,
    block_size: usize,
    kv_len: usize,
    q_len: usize,
    /// Bits of the tree mask, all tokens alike but for their own; `None`: causal.
    tree: Option<u32>,
    /// Exponent of what all keys, values and queries are multiplied with.
    magnitude: i32,
    seed: u64,
}

fn cases() -> impl Strategy<Value = Case> {
    let dtype = prop::sample::select(vec![Dtype::Bf16, Dtype::F16]);
    let scales = prop::sample::select(vec![Scales::Tensor, Scales::Head, Scales::Token]);
    let block_size = prop::sample::select(vec![8usize, 16, 64]);
    let shape = (1usize..4, 1usize..6, block_size, 1usize..200, 1usize..5);
    (dtype, scales, shape, any::<Option<u32>>(), -6i32..7, any::<u64>()).prop_map(
        |(dtype, scales, (kv_heads, group, block_size, kv_len, q_len), tree, magnitude, seed)| {
            Case {
                dtype,
                scales,
                kv_heads,
                group,
                block_size,
                kv_len,
                q_len: q_len.min(kv_len),
                tree,
                magnitude,
                seed,
            }
        },
    )
}

/// Numbers of standard deviation about 1.
fn numbers(count: usize, seed: u64) -> Vec<f64> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as f64 / (1u64 << 31) as f64 - 0.5
    };
    (0..count).map(|_| (next() + next() + next() + next()) * 3f64.sqrt()).collect()
}

impl Case {
    fn encode(&self, values: &[f64]) -> Vec<u16> {
        let factor = 2f64.powi(self.magnitude);
        let encode = |x: f64| match self.dtype {
            Dtype::F16 => f16::from_f64(x * factor).to_bits(),
            _ => bf16::from_f64(x * factor).to_bits(),
        };
        values.iter().map(|&x| encode(x)).collect()
    }

    fn decode(&self, bits: &[u16]) -> Vec<f64> {
        let decode = |&x: &u16| match self.dtype {
            Dtype::F16 => f16::from_bits(x).to_f64(),
            _ => bf16::from_bits(x).to_f64(),
        };
        bits.iter().map(decode).collect()
    }

    fn run(&self, kernels: &Kernels) {
        let device = kernels.device();
        let blocks = self.kv_len.div_ceil(self.block_size) + 1;
        let rows = self.kv_len * self.kv_heads;
        let shape = KvShape {
            num_kv_heads: self.kv_heads as u32,
            head_dim: DIM as u32,
            dtype: Dtype::E4m3,
        };
        let block_bytes = shape.token_bytes() * self.block_size;
        // NaN as an element and as a scale.
        let pool = device.upload(&vec![0x7fu8; blocks * block_bytes]).unwrap();
        let mut view = KvView::block_first(
            pool.span(),
            shape,
            self.block_size as u32,
            1,
            blocks as u64,
            block_bytes as u64,
        )
        .unwrap();
        let spread = 2f32.powi(self.magnitude) / 200.0;
        let given: Vec<f32> = (0..2 * self.kv_heads).map(|i| spread * (1.0 + i as f32)).collect();
        let given_scales = device.upload(&given).unwrap();
        if self.scales != Scales::Token {
            let half = 4 * self.kv_heads as u64;
            let head = i64::from(self.scales == Scales::Head);
            view.scales = Some(KvScales {
                k: given_scales.span(),
                v: Span::new(given_scales.address() + half, half),
                strides: KvStrides { head, ..KvStrides::NONE },
            });
        }
        // Blocks are used backwards.
        let slot = |key: usize| {
            (blocks - 1 - key / self.block_size) * self.block_size + key % self.block_size
        };
        let new = [1, 2].map(|half| self.encode(&numbers(rows * DIM, self.seed ^ half)));
        let [k_new, v_new] = [0, 1].map(|half: usize| device.upload(&new[half]).unwrap());
        let slots: Vec<i64> = (0..self.kv_len).map(|key| slot(key) as i64).collect();
        let slots = device.upload(&slots).unwrap();
        let windows = device.upload(&[hkv_window::zeroed()]).unwrap();
        let windows = WindowTable { rows: windows.span(), num_layers: 1 };
        let append = AppendArgs {
            k_new: k_new.span(),
            v_new: v_new.span(),
            dtype: self.dtype,
            new_strides: HeadStrides::contiguous(self.kv_heads as u32, DIM as u32),
            kv: view,
            slot_mapping: slots.span(),
            num_groups: 1,
            windows,
            layer: 0,
            num_tokens: self.kv_len as u32,
        };
        let stream = device.stream().unwrap();
        // SAFETY: all buffers outlive the synchronisation below; slots are distinct and in the pool.
        unsafe { kernels.append(&append, stream.as_ref()).unwrap() };
        stream.as_ref().synchronize().unwrap();

        let bytes = pool.download::<u8>().unwrap();
        let at = |half: usize, key: usize, head: usize| {
            let (block, offset) = (slot(key) / self.block_size, slot(key) % self.block_size);
            let row = (half * self.kv_heads + head) * self.block_size + offset;
            let scales = 2 * self.kv_heads * self.block_size * DIM;
            (block * block_bytes + row * DIM, block * block_bytes + scales + 4 * row)
        };
        let mut rows = [vec![0.0; rows * DIM], vec![0.0; rows * DIM]];
        for (half, dequantised) in rows.iter_mut().enumerate() {
            let exact = self.decode(&new[half]);
            for (row, exact) in exact.chunks_exact(DIM).enumerate() {
                let (key, head) = (row / self.kv_heads, row % self.kv_heads);
                let (elements, scale) = at(half, key, head);
                let elements = &bytes[elements..elements + DIM];
                let scale = match self.scales {
                    Scales::Tensor => given[half * self.kv_heads],
                    Scales::Head => given[half * self.kv_heads + head],
                    Scales::Token => {
                        let largest = exact.iter().fold(0.0, |max: f64, x| max.max(x.abs()));
                        let scale = f32::from_le_bytes(bytes[scale..scale + 4].try_into().unwrap());
                        assert_eq!(
                            scale,
                            largest as f32 / 448.0,
                            "scale of token {key}, head {head}"
                        );
                        scale
                    }
                };
                let out = &mut dequantised[row * DIM..(row + 1) * DIM];
                for ((x, &element), out) in exact.iter().zip(elements).zip(out) {
                    let inverse = 1.0 / scale;
                    assert_eq!(
                        element,
                        e4m3::from_f32(*x as f32 * inverse),
                        "{x} at scale {scale}"
                    );
                    *out = f64::from(e4m3::to_f32(element)) * f64::from(scale);
                }
            }
        }
        let untouched = slot(self.kv_len - 1) / self.block_size * block_bytes;
        assert!(bytes[..untouched].iter().all(|&byte| byte == 0x7f), "blocks of nobody");

        let heads = self.kv_heads * self.group;
        let q = self.encode(&numbers(self.q_len * heads * DIM, self.seed ^ 3));
        let ids: Vec<i32> = (1..blocks as i32).rev().collect();
        let masks: Vec<u32> =
            (0..self.q_len).map(|token| self.tree.unwrap_or_default() | 1 << token).collect();
        let sm_scale = SCALE / 4f32.powi(self.magnitude);
        let strides = HeadStrides::contiguous(heads as u32, DIM as u32);
        let inputs = [
            device.upload(&q).unwrap(),
            device.upload(&[0i32, self.q_len as i32]).unwrap(),
            device.upload(&[self.kv_len as i32]).unwrap(),
            device.upload(&ids).unwrap(),
            device.upload(&[0i64]).unwrap(),
            device.upload(&masks).unwrap(),
        ];
        let [q_span, qo_indptr, kv_len, block_ids, block_row, tree_mask] =
            [0, 1, 2, 3, 4, 5].map(|i: usize| inputs[i].span());
        let out = device.upload(&vec![u16::MAX; q.len()]).unwrap();
        let mut args = AttentionArgs {
            q: q_span,
            q_strides: strides,
            out: out.span(),
            out_strides: strides,
            dtype: self.dtype,
            lse: None,
            kv: view,
            sealed: None,
            qo_indptr,
            kv_len,
            tables: BlockTables { block_ids, block_row, first_block: None, num_groups: 1 },
            windows,
            layer: 0,
            sink_logits: None,
            tree_mask: self.tree.map(|_| tree_mask),
            plan: None,
            num_qo_heads: heads as u32,
            num_seqs: 1,
            num_tokens: self.q_len as u32,
            max_q_len: self.q_len as u32,
            max_kv_len: self.kv_len as u32,
            sm_scale,
            logits_soft_cap: 0.0,
            workspace: Span::default(),
        };
        let bytes = kernels.attention_workspace_bytes(&args).unwrap() as usize;
        let workspace = device.upload(&vec![u8::MAX; bytes]).unwrap();
        args.workspace = workspace.span();
        // SAFETY: all buffers outlive the synchronisation; the table names blocks of the pool.
        unsafe { kernels.attention(&args, stream.as_ref()).unwrap() };
        stream.as_ref().synchronize().unwrap();

        let ours = self.decode(&out.download::<u16>().unwrap());
        let queries = self.decode(&q);
        let first_new = self.kv_len - self.q_len;
        let mut wanted = Vec::new();
        for (row, query) in queries.chunks_exact(DIM).enumerate() {
            let (token, head) = (row / heads, row % heads);
            let of_head = |half: &Vec<f64>| -> Vec<f64> {
                let rows = half.chunks_exact(DIM).skip(head / self.group).step_by(self.kv_heads);
                rows.flatten().copied().collect()
            };
            let sees = |key: usize| {
                key < first_new || self.tree.is_none() || masks[token] >> (key - first_new) & 1 == 1
            };
            let visible: Vec<usize> = (0..=first_new + token).filter(|&key| sees(key)).collect();
            let logits = Logits { sm_scale: sm_scale.into(), soft_cap: 0.0, sink: None };
            let [keys, values] = [0, 1].map(|half: usize| of_head(&rows[half]));
            wanted.extend(reference::attend(query, &keys, &values, &visible, logits).out);
        }
        let comparison = reference::compare(&ours, &wanted, DIM, 0.0);
        let tolerance = if self.dtype == Dtype::F16 { 3e-3 } else { 5e-3 };
        assert!(comparison.misplaced == 0 && comparison.relative <= tolerance, "{comparison:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn appended_tokens_are_the_nearest_and_attention_over_them_agrees_with_the_reference(
        case in cases(),
    ) {
        case.run(&Kernels::load(&Device::cpu()).unwrap());
        if let Some(device) = common::cuda() {
            case.run(&Kernels::load(device).unwrap());
        }
    }
}

/// Rows that no scale fits: zeros, NaN, an infinity, magnitudes beyond the given scale.
#[test]
fn rows_that_do_not_fit_saturate_or_turn_nan() {
    let rows: [(f32, f32); 5] =
        [(0.0, 0.0), (f32::NAN, 1.0), (f32::INFINITY, 1.0), (1e-30, -1e-30), (6e4, -3e4)];
    let devices = [Device::cpu()];
    for device in devices.iter().chain(common::cuda()) {
        let kernels = Kernels::load(device).unwrap();
        for per_token in [false, true] {
            let mut new = vec![bf16::ZERO; rows.len() * DIM];
            for (row, &(first, second)) in rows.iter().enumerate() {
                new[row * DIM] = bf16::from_f32(first);
                new[row * DIM + 1] = bf16::from_f32(second);
            }
            let bits: Vec<u16> = new.iter().map(|x| x.to_bits()).collect();
            let new = device.upload(&bits).unwrap();
            let shape = KvShape { num_kv_heads: 1, head_dim: DIM as u32, dtype: Dtype::E4m3 };
            let block_bytes = shape.token_bytes() * 8;
            let pool = device.upload(&vec![0u8; block_bytes]).unwrap();
            let one = device.upload(&[1f32]).unwrap();
            let mut view =
                KvView::block_first(pool.span(), shape, 8, 1, 1, block_bytes as u64).unwrap();
            if !per_token {
                let shared = KvScales { k: one.span(), v: one.span(), strides: KvStrides::NONE };
                view.scales = Some(shared);
            }
            let slots = device.upload(&[0i64, 1, 2, 3, 4]).unwrap();
            let windows = device.upload(&[hkv_window::zeroed()]).unwrap();
            let args = AppendArgs {
                k_new: new.span(),
                v_new: new.span(),
                dtype: Dtype::Bf16,
                new_strides: HeadStrides::contiguous(1, DIM as u32),
                kv: view,
                slot_mapping: slots.span(),
                num_groups: 1,
                windows: WindowTable { rows: windows.span(), num_layers: 1 },
                layer: 0,
                num_tokens: rows.len() as u32,
            };
            let stream = device.stream().unwrap();
            // SAFETY: all buffers outlive the synchronisation; slots are distinct and in the pool.
            unsafe { kernels.append(&args, stream.as_ref()).unwrap() };
            stream.as_ref().synchronize().unwrap();
            let bytes = pool.download::<u8>().unwrap();
            let elements = |row: usize| [bytes[row * DIM], bytes[row * DIM + 1]];
            let value = |row: usize, i: usize| e4m3::to_f32(elements(row)[i]);
            assert_eq!(elements(0), [0, 0]);
            assert!(value(1, 0).is_nan());
            if per_token {
                assert_eq!(value(1, 1), 448.0);
                assert!(value(2, 0).is_nan());
                assert_eq!([value(4, 0), value(4, 1)], [448.0, -224.0]);
            } else {
                assert_eq!([value(1, 1), value(2, 0), value(2, 1)], [1.0, 448.0, 1.0]);
                assert_eq!([value(3, 0), value(3, 1)], [0.0, 0.0]);
                assert_eq!([value(4, 0), value(4, 1)], [448.0, -448.0]);
            }
        }
    }
}
