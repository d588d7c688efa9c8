//! Attention on the CPU device, and the reads that it is made of.
//!
//! Every layout is served by its strides: keys and values are gathered through the block table into
//! plain f64 arrays, and the reference does the rest. Blocks in which no query sees a key are never
//! read, so that a test may fill them with NaN. (kv head, sequence) pairs are spread over the
//! processor's cores when there is enough to do.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::{add_words, load, optional, store};
use crate::abi;
use crate::codec::Int;
use crate::layout::Dtype;
use crate::reference::{self, Logits};
use crate::spec::AttentionKind;

/// Query-key pairs, times head_dim, below which starting threads costs more than it saves.
const PARALLEL_WORK: usize = 1 << 20;

/// The bit of a block id that says that it names a slot of sealed blocks.
const SEALED: i64 = abi::HKV_SEALED_BLOCK as i64;
/// Bytes of a zero and a step.
const GROUP_BYTES: usize = 4;

/// What keys and values are.
#[derive(Clone, Copy)]
pub(crate) struct KvFormat {
    /// Type of their elements in blocks that are not sealed.
    pub dtype: Dtype,
    /// Elements of a head.
    pub head_dim: usize,
    /// The integers of sealed blocks.
    pub sealed: Option<&'static Int>,
}

/// Attention of a batch over one layer; partial states when `num_splits` is more than 1. Who does what on a
/// GPU, the work list of a decode, is all the same here.
///
/// # Safety
/// Every address in `p` is valid for what abi/params.h says that the kernel reads or writes there, with
/// queries and outputs of `dtype`, keys and values as `kv` says.
pub(crate) unsafe fn attention(p: &abi::hkv_attention_params, dtype: Dtype, kv: KvFormat) {
    // SAFETY: the caller vouches for every address in `p`; the offsets follow abi/params.h.
    let batch = unsafe { Batch::new(p, dtype, kv) };
    let head_dim = kv.head_dim;
    let items = batch.sequences.len() * p.num_kv_heads as usize;
    let work: usize = batch.sequences.iter().map(|s| s.kv_len.max(0) as usize * s.q_len()).sum();
    let work = work.saturating_mul(p.num_qo_heads as usize).saturating_mul(head_dim);
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(items);
    if threads < 2 || work < PARALLEL_WORK {
        // SAFETY: as above; this is the only thread that writes.
        return (0..items).for_each(|item| unsafe { batch.attend(item) });
    }
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    match next.fetch_add(1, Ordering::Relaxed) {
                        // SAFETY: as above; no two items write the same rows.
                        item if item < items => unsafe { batch.attend(item) },
                        _ => break,
                    }
                }
            });
        }
    });
}

/// Adds the words of K and V of every key that some query of the batch sees to a checksum.
///
/// # Safety
/// As for [`attention`], but for queries and outputs, and the checksum is valid.
pub(crate) unsafe fn read_blocks(
    p: &abi::hkv_read_blocks_params,
    kv_dtype: Dtype,
    head_dim: usize,
) {
    let words = head_dim * kv_dtype.bytes() / 4;
    // SAFETY: the caller vouches for every address in `p`; the offsets follow abi/params.h.
    unsafe {
        let kv = KvFormat { dtype: kv_dtype, head_dim, sealed: None };
        let batch = Batch::new(&p.attention, kv_dtype, kv);
        for sequence in batch.sequences.iter().filter(|sequence| sequence.q_len() > 0) {
            for position in batch.needed(sequence) {
                let place = batch.place(sequence, position);
                for kv_head in 0..p.attention.num_kv_heads {
                    let at = batch.address(place, kv_head.into()) as isize;
                    for pool in [p.attention.k, p.attention.v] {
                        let row = pool.cast::<u8>().offset(at * kv_dtype.bytes() as isize);
                        add_words(p.checksum, std::slice::from_raw_parts(row.cast(), words));
                    }
                }
            }
        }
    }
}

/// One sequence of the batch: its query tokens and where its row of the block table is.
struct Sequence {
    first_token: i64,
    end_token: i64,
    kv_len: i64,
    table: *const i32,
    first_block: i64,
}

impl Sequence {
    fn q_len(&self) -> usize {
        (self.end_token - self.first_token).max(0) as usize
    }

    /// Absolute position of a query token (negative for padding before the start of the sequence).
    fn position(&self, token: i64) -> i64 {
        self.kv_len - (self.end_token - token)
    }
}

struct Batch<'a> {
    p: &'a abi::hkv_attention_params,
    dtype: Dtype,
    kv: KvFormat,
    kind: AttentionKind,
    sink_tokens: u32,
    layer_slot: i64,
    sequences: Vec<Sequence>,
}

// SAFETY: the threads only read the batch and what its addresses name, and write disjoint rows.
unsafe impl Sync for Batch<'_> {}

impl<'a> Batch<'a> {
    /// # Safety
    /// As for [`attention`].
    unsafe fn new(p: &'a abi::hkv_attention_params, dtype: Dtype, kv: KvFormat) -> Self {
        // SAFETY: the caller vouches for every address in `p`; the offsets follow abi/params.h.
        unsafe {
            let window = &*p.windows.offset(p.layer as isize);
            let sequences = (0..p.num_seqs as isize)
                .map(|s| {
                    let row = window.group as isize * p.num_seqs as isize + s;
                    Sequence {
                        first_token: (*p.qo_indptr.offset(s)).into(),
                        end_token: (*p.qo_indptr.offset(s + 1)).into(),
                        kv_len: (*p.kv_len.offset(s)).into(),
                        table: p.block_ids.offset(*p.block_row.offset(row) as isize),
                        first_block: if p.first_block.is_null() {
                            0
                        } else {
                            (*p.first_block.offset(row)).into()
                        },
                    }
                })
                .collect();
            let extent = window.extent as u32;
            let kind = match window.kind as u32 {
                abi::HKV_LAYER_SLIDING => AttentionKind::Sliding { window: extent },
                abi::HKV_LAYER_CHUNKED => AttentionKind::Chunked { chunk: extent },
                _ => AttentionKind::Full,
            };
            let sink_tokens = window.sink_tokens as u32;
            let layer_slot = window.layer_slot.into();
            Self { p, dtype, kv, kind, sink_tokens, layer_slot, sequences }
        }
    }

    fn sees(&self, query: i64, key: i64) -> bool {
        reference::sees(self.kind, self.sink_tokens, query, key)
    }

    /// Keys that some query of the sequence sees.
    fn needed(&self, sequence: &Sequence) -> impl Iterator<Item = i64> {
        // The first query at or after a key decides: later ones see no more of the past.
        let first_query = sequence.position(sequence.first_token);
        (0..sequence.kv_len).filter(move |&key| self.sees(key.max(first_query), key))
    }

    /// All query heads of one KV head of one sequence: item `sequence * num_kv_heads + kv_head`.
    ///
    /// # Safety
    /// As for [`attention`]; no other thread has the same item.
    unsafe fn attend(&self, item: usize) {
        let p = self.p;
        let sequence = &self.sequences[item / p.num_kv_heads as usize];
        let kv_head = item as i64 % i64::from(p.num_kv_heads);
        if sequence.q_len() == 0 {
            return;
        }
        let first_query = sequence.position(sequence.first_token);
        let positions: Vec<i64> = self.needed(sequence).collect();
        let dim = self.kv.head_dim;
        let mut keys = vec![0.0; positions.len() * dim];
        let mut values = vec![0.0; positions.len() * dim];
        for (index, &position) in positions.iter().enumerate() {
            let row = index * dim..(index + 1) * dim;
            // SAFETY: the caller vouches for the table and for the blocks that it lists.
            unsafe {
                let place = self.place(sequence, position);
                if let (Some(int), true) = (self.kv.sealed, place.0 & SEALED != 0) {
                    self.load_sealed(int, place, kv_head, &mut keys[row.clone()], &mut values[row]);
                    continue;
                }
                let at = self.address(place, kv_head);
                load(p.k.cast(), self.kv.dtype, at, &mut keys[row.clone()]);
                load(p.v.cast(), self.kv.dtype, at, &mut values[row.clone()]);
                let at = self.scale_address(place, kv_head);
                for (rows, scales) in [(&mut keys, p.k_scale), (&mut values, p.v_scale)] {
                    if let Some(scale) = optional(scales, at) {
                        rows[row.clone()].iter_mut().for_each(|x| *x *= scale);
                    }
                }
            }
        }
        let group = i64::from(p.num_qo_heads / p.num_kv_heads);
        let mut query = vec![0.0; dim];
        for token in sequence.first_token..sequence.end_token {
            let position = sequence.position(token);
            // SAFETY: passed on from the caller.
            let tree =
                (!p.tree_mask.is_null()).then(|| unsafe { *p.tree_mask.offset(token as isize) });
            let visible: Vec<usize> = (0..positions.len())
                .filter(|&index| {
                    let key = positions[index];
                    self.sees(position, key) && reference::tree_sees(tree, first_query, key)
                })
                .collect();
            for head in kv_head * group..(kv_head + 1) * group {
                // SAFETY: the caller vouches for q and for the outputs; this row is only ours.
                unsafe {
                    let at = token * p.q_stride_token + head * p.q_stride_head;
                    load(p.q.cast(), self.dtype, at, &mut query);
                    self.row(token, head, &query, &keys, &values, &visible);
                }
            }
        }
    }

    /// Reads a key and its value out of a sealed block.
    ///
    /// # Safety
    /// As for [`attention`]; the id of `place` is that of a sealed block.
    unsafe fn load_sealed(
        &self,
        int: &Int,
        (id, offset): (i64, i64),
        kv_head: i64,
        key: &mut [f64],
        value: &mut [f64],
    ) {
        let p = self.p;
        let (head, token, block_tokens) = (kv_head as usize, offset as usize, 1 << p.block_shift);
        let row_bytes = key.len() * int.bits() as usize / 8;
        let key_group = key.len() * GROUP_BYTES;
        let groups = Int::key_group(block_tokens - 1) + 1;
        let key_groups = (head * groups + Int::key_group(token)) * key_group;
        let row = head * block_tokens + token;
        let slot = (id & !SEALED) as isize * p.sealed_stride as isize;
        let part = |first: i32, at: usize, bytes: usize| {
            // SAFETY: a slot has these parts where the parameters say (abi/params.h).
            unsafe {
                let part = p.sealed.cast::<u8>().offset(slot + first as isize + at as isize);
                std::slice::from_raw_parts(part, bytes)
            }
        };
        let codes = |first| part(first, row * row_bytes, row_bytes);
        let groups = part(p.sealed_key_groups, key_groups, key_group);
        int.read_row(self.kv.dtype, groups, codes(p.sealed_keys), key);
        let groups = part(p.sealed_value_groups, row * GROUP_BYTES, GROUP_BYTES);
        int.read_row(self.kv.dtype, groups, codes(p.sealed_values), value);
    }

    /// The id of the block of a key, and the key's offset in it.
    ///
    /// # Safety
    /// The sequence's row of the block table lists the block of `position`.
    unsafe fn place(&self, sequence: &Sequence, position: i64) -> (i64, i64) {
        let p = self.p;
        let block_size = 1i64 << p.block_shift;
        let (block, offset) = (position / block_size, position % block_size);
        let sink_blocks = (i64::from(self.sink_tokens) + block_size - 1) / block_size;
        let index = if block < sink_blocks {
            block
        } else {
            sink_blocks + block - sequence.first_block.max(sink_blocks)
        };
        // SAFETY: passed on from the caller.
        (i64::from(unsafe { *sequence.table.offset(index as isize) }), offset)
    }

    /// Offset in elements of a key (and of its value) from the pool's base.
    fn address(&self, (block, offset): (i64, i64), kv_head: i64) -> i64 {
        let p = self.p;
        block * p.kv_stride_block
            + self.layer_slot * p.kv_stride_layer
            + kv_head * p.kv_stride_head
            + offset * p.kv_stride_token
    }

    /// Offset of the scale of a key (and of its value) from the first.
    fn scale_address(&self, (block, offset): (i64, i64), kv_head: i64) -> i64 {
        let p = self.p;
        block * p.scale_stride_block
            + self.layer_slot * p.scale_stride_layer
            + kv_head * p.scale_stride_head
            + offset * p.scale_stride_token
    }

    /// Computes and writes one row: the final state, or one partial state per split.
    ///
    /// # Safety
    /// The output rows of `token` and `head` are valid and nobody else's.
    unsafe fn row(
        &self,
        token: i64,
        head: i64,
        query: &[f64],
        keys: &[f64],
        values: &[f64],
        visible: &[usize],
    ) {
        let p = self.p;
        let dim = self.kv.head_dim as i64;
        let row = token * i64::from(p.num_qo_heads) + head;
        let mut logits =
            Logits { sm_scale: p.sm_scale.into(), soft_cap: p.logits_soft_cap.into(), sink: None };
        if p.num_splits > 1 {
            let part = visible.len().div_ceil(p.num_splits as usize);
            for split in 0..p.num_splits as usize {
                let (from, to) = (split * part, (split + 1) * part);
                let part = &visible[from.min(visible.len())..to.min(visible.len())];
                let state = reference::attend(query, keys, values, part, logits);
                let rows = i64::from(p.num_tokens) * i64::from(p.num_qo_heads);
                let index = split as i64 * rows + row;
                // SAFETY: passed on from the caller.
                unsafe {
                    store(p.partial_out.cast(), Dtype::F32, index * dim, &state.out);
                    *p.partial_lse.offset(index as isize) = state.lse as f32;
                }
            }
            return;
        }
        // SAFETY: passed on from the caller.
        unsafe {
            logits.sink = optional(p.sink_logits, head);
            let state = reference::attend(query, keys, values, visible, logits);
            let at = token * p.out_stride_token + head * p.out_stride_head;
            store(p.out.cast(), self.dtype, at, &state.out);
            if !p.lse.is_null() {
                *p.lse.offset(row as isize) = state.lse as f32;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::super::merge_states;
    use super::*;

    const DIM: usize = 8;
    const BLOCK: usize = 8;

    /// Deterministic numbers in [-1, 1).
    fn numbers(n: usize, seed: u64) -> Vec<f64> {
        let mut x = seed;
        std::iter::repeat_with(|| {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (x >> 11) as f64 / (1u64 << 52) as f64 - 1.0
        })
        .take(n)
        .collect()
    }

    fn bf16s(values: &[f64]) -> Vec<bf16> {
        values.iter().map(|&x| bf16::from_f64(x)).collect()
    }

    /// Parts of any number, merged, are the whole: with a window, sink tokens and sink logits, two KV
    /// heads, two sequences, and an element type whose rounding would show.
    #[test]
    fn splits_merge_to_the_whole() {
        let (q_lens, kv_lens) = ([3, 2], [29, 18]);
        let (heads, kv_heads, tokens) = (4i32, 2i32, 5i32);
        let block = 2 * kv_heads as usize * BLOCK * DIM;
        let pool = bf16s(&numbers(8 * block, 1));
        let q = bf16s(&numbers(tokens as usize * heads as usize * DIM, 2));
        // Sink block 0, then the blocks from 2 (of 4) and from 0 (of 3, the sink block among them) on.
        let block_ids = [7i32, 1, 4, 3, 0, 5];
        let (block_row, first_block) = ([0i64, 3], [2i32, 0]);
        let qo_indptr = [0i32, q_lens[0], q_lens[0] + q_lens[1]];
        let window = abi::hkv_window {
            kind: abi::HKV_LAYER_SLIDING as i32,
            extent: 9,
            sink_tokens: 3,
            group: 0,
            layer_slot: 0,
            reserved: [0; 3],
        };
        let sink_logits = [0.5f32, -1.0, 0.0, 1.0];
        let rows = (tokens * heads) as usize;
        let run = |num_splits: i32| -> (Vec<f32>, Vec<f32>) {
            let mut out = vec![bf16::NAN; rows * DIM];
            let mut lse = vec![f32::NAN; rows];
            let mut partial_out = vec![f32::NAN; num_splits as usize * rows * DIM];
            let mut partial_lse = vec![f32::NAN; num_splits as usize * rows];
            let attention = abi::hkv_attention_params {
                q: q.as_ptr().cast(),
                out: out.as_mut_ptr().cast(),
                lse: lse.as_mut_ptr(),
                k: pool.as_ptr().cast(),
                v: pool[block / 2..].as_ptr().cast(),
                qo_indptr: qo_indptr.as_ptr(),
                kv_len: kv_lens.as_ptr(),
                block_ids: block_ids.as_ptr(),
                block_row: block_row.as_ptr(),
                first_block: first_block.as_ptr(),
                windows: &window,
                sink_logits: sink_logits.as_ptr(),
                k_scale: std::ptr::null(),
                v_scale: std::ptr::null(),
                tree_mask: std::ptr::null(),
                parts: std::ptr::null(),
                arrivals: std::ptr::null_mut(),
                partial_out: partial_out.as_mut_ptr(),
                partial_lse: partial_lse.as_mut_ptr(),
                sealed: std::ptr::null(),
                sealed_stride: 0,
                sealed_key_groups: 0,
                sealed_value_groups: 0,
                sealed_keys: 0,
                sealed_values: 0,
                q_stride_token: i64::from(heads) * DIM as i64,
                q_stride_head: DIM as i64,
                out_stride_token: i64::from(heads) * DIM as i64,
                out_stride_head: DIM as i64,
                kv_stride_block: block as i64,
                kv_stride_layer: 0,
                kv_stride_head: (BLOCK * DIM) as i64,
                kv_stride_token: DIM as i64,
                scale_stride_block: 0,
                scale_stride_layer: 0,
                scale_stride_head: 0,
                scale_stride_token: 0,
                layer: 0,
                num_seqs: 2,
                num_tokens: tokens,
                num_qo_heads: heads,
                num_kv_heads: kv_heads,
                block_shift: BLOCK.trailing_zeros() as i32,
                num_splits,
                reads_early: 0,
                sm_scale: 1.5,
                logits_soft_cap: 0.0,
            };
            let merge = abi::hkv_merge_params {
                states: partial_out.as_ptr().cast(),
                state_lse: partial_lse.as_ptr(),
                out: out.as_mut_ptr().cast(),
                lse: lse.as_mut_ptr(),
                sink_logits: sink_logits.as_ptr(),
                live_tokens: std::ptr::null(),
                out_stride_token: attention.out_stride_token,
                out_stride_head: attention.out_stride_head,
                num_states: num_splits,
                num_tokens: tokens,
                num_qo_heads: heads,
                head_dim: DIM as i32,
                in_dtype: abi::HKV_DTYPE_F32 as i32,
                out_dtype: abi::HKV_DTYPE_BF16 as i32,
            };
            // SAFETY: all arrays are live and of the sizes that the parameters say.
            unsafe {
                let kv = KvFormat { dtype: Dtype::Bf16, head_dim: DIM, sealed: None };
                super::attention(&attention, Dtype::Bf16, kv);
                if num_splits > 1 {
                    merge_states(&merge);
                }
            }
            (out.iter().map(|x| x.to_f32()).collect(), lse)
        };
        let (whole, whole_lse) = run(1);
        assert!(whole.iter().chain(&whole_lse).all(|x| x.is_finite()));
        for num_splits in [2, 3, 7, 40] {
            let (parts, parts_lse) = run(num_splits);
            for (a, b) in parts.iter().zip(&whole) {
                // Partial states in f32 may tip the rounding to bf16 over.
                assert!((a - b).abs() <= 2f32.powi(-8) * b.abs(), "{num_splits} splits: {a}, {b}");
            }
            for (a, b) in parts_lse.iter().zip(&whole_lse) {
                assert!((a - b).abs() < 1e-5, "{num_splits} splits: LSE {a}, {b}");
            }
        }
        // One row by hand: the last query of the second sequence, head 3, sees keys 0 to 2 and 9 to 17.
        let position = |key: usize| [3i32, 0, 5][key / BLOCK] as usize * block + key % BLOCK * DIM;
        let keys: Vec<usize> = (0..3).chain(9..18).map(|key| position(key) + BLOCK * DIM).collect();
        let element = |at: usize| f64::from(pool[at].to_f32());
        let query: Vec<f64> = q[(4 * 4 + 3) * DIM..].iter().map(|x| x.to_f64()).collect();
        let weight =
            |at: usize| (1.5 * (0..DIM).map(|i| query[i] * element(at + i)).sum::<f64>()).exp();
        let total = keys.iter().map(|&at| weight(at)).sum::<f64>() + 1f64.exp();
        assert!((f64::from(whole_lse[rows - 1]) - total.ln()).abs() < 1e-6);
        for i in 0..DIM {
            let sum: f64 = keys.iter().map(|&at| weight(at) * element(at + block / 2 + i)).sum();
            let ours = f64::from(whole[(rows - 1) * DIM + i]);
            assert!(
                (ours - sum / total).abs() <= 2f64.powi(-8) * ours.abs(),
                "{ours}, {}",
                sum / total
            );
        }
    }
}
