//! A case of attention on the host: what lies in memory, and what the reference makes of it.

use hybridkv::abi::{self, hkv_window};
use hybridkv::e4m3;
use hybridkv::error::Result;
use hybridkv::layout::KvStrides;
use hybridkv::ops::{HeadStrides, SEALED_BLOCK};
use hybridkv::reference::{self, Logits, State};
use hybridkv::spec::AttentionKind;

use super::bed::{Elements, POISON, decode, encode};
use super::case::{Case, Data, PoolShape, Scales, Seq};
use super::sealed::Sealed;
use crate::random::Rng;

/// Groups in every table: that of the layer, and others with nothing but garbage.
pub(super) const GROUPS: usize = 2;
/// Block ids and rows that nobody may follow.
const GARBAGE_IDS: [i32; 4] = [-1, i32::MIN, i32::MAX, 0x4000_0000];

/// What all batches of a case share.
pub(super) struct Common {
    pub(super) pool: PoolShape,
    /// Strides of the scales, and how many of K (and of V) there are; none for 16-bit elements.
    pub(super) scales: (KvStrides, usize),
    pub(super) blocks: usize,
    pub(super) layer: usize,
    pub(super) group: usize,
    pub(super) layer_slot: usize,
    pub(super) q_strides: HeadStrides,
    pub(super) out_strides: HeadStrides,
    pub(super) sink_logits: Vec<f32>,
    pub(super) windows: Vec<hkv_window>,
}

impl Common {
    pub(super) fn new(case: &Case, rng: &mut Rng) -> Self {
        let live = |batch: &Vec<Seq>| -> usize {
            batch.iter().map(|&seq| live_blocks(case, seq).len()).sum()
        };
        let blocks = case.batches.iter().map(live).max().unwrap_or(0) + 3;
        let pool = PoolShape::new(
            case.layout,
            blocks,
            case.layers,
            case.block_size,
            case.kv_heads,
            case.head_dim,
        );
        let scales = case.scales.map_or((KvStrides::NONE, 0), |scales| {
            scales.shape(blocks, case.layers, case.kv_heads, case.block_size)
        });
        let strides = |rng: &mut Rng| {
            let (heads, dim) = (case.qo_heads() as i64, case.head_dim as i64);
            if !case.padded {
                return HeadStrides::contiguous(heads as u32, dim as u32);
            }
            let head = dim + 8 * rng.range(0, 3) as i64;
            HeadStrides { token: heads * head + 8 * rng.range(1, 4) as i64, head }
        };
        let num_layers = rng.range(1, 4) as usize;
        let (layer, group) = (rng.below(num_layers as u64) as usize, rng.below(2) as usize);
        let layer_slot = rng.below(case.layers as u64) as usize;
        // Rows of other layers are of no kind that there is, and point nowhere.
        let other = hkv_window {
            kind: 77,
            extent: -1,
            sink_tokens: i32::MAX,
            group: i32::MAX,
            layer_slot: -1,
            reserved: [0; 3],
        };
        let mut windows = vec![other; num_layers];
        let (kind, extent) = match case.kind {
            AttentionKind::Full => (abi::HKV_LAYER_FULL, 0),
            AttentionKind::Sliding { window } => (abi::HKV_LAYER_SLIDING, window),
            AttentionKind::Chunked { chunk } => (abi::HKV_LAYER_CHUNKED, chunk),
        };
        windows[layer] = hkv_window {
            kind: kind as i32,
            extent: extent as i32,
            sink_tokens: case.sink_tokens as i32,
            group: group as i32,
            layer_slot: layer_slot as i32,
            reserved: [0; 3],
        };
        let sink_logits = if case.sink_logits {
            rng.normals(case.qo_heads()).map(|x| 2.0 * x).collect()
        } else {
            Vec::new()
        };
        let (q_strides, out_strides) = (strides(rng), strides(rng));
        Self {
            pool,
            scales,
            blocks,
            layer,
            group,
            layer_slot,
            q_strides,
            out_strides,
            sink_logits,
            windows,
        }
    }
}

/// Indices of the blocks of a sequence that hold a visible token.
fn live_blocks(case: &Case, seq: Seq) -> Vec<usize> {
    let needed = case.needed(seq);
    let blocks = needed.chunks(case.block_size).enumerate();
    blocks.filter(|(_, tokens)| tokens.contains(&true)).map(|(index, _)| index).collect()
}

/// Everything about one batch, as it lies in memory.
pub(super) struct Problem {
    pub(super) seqs: Vec<Seq>,
    /// Per sequence, which tokens are visible to any query.
    pub(super) needed: Vec<Vec<bool>>,
    /// Per sequence and block index, the id in the pool; `None` where no token is visible.
    pub(super) blocks: Vec<Vec<Option<usize>>>,
    pub(super) sealed: Option<Sealed>,
    pub(super) q: Vec<u16>,
    pub(super) pool: Elements,
    /// Of K and of V; those of tokens NaN where the token is not visible.
    pub(super) scales: [Vec<f32>; 2],
    /// Of every query token, if the case has a tree.
    pub(super) tree_mask: Vec<u32>,
    pub(super) block_ids: Vec<i32>,
    pub(super) block_row: Vec<i64>,
    pub(super) first_block: Vec<i32>,
    pub(super) kv_len: Vec<i32>,
    pub(super) qo_indptr: Vec<i32>,
}

impl Problem {
    pub(super) fn new(case: &Case, common: &Common, seqs: &[Seq], rng: &mut Rng) -> Result<Self> {
        let needed: Vec<Vec<bool>> = seqs.iter().map(|&seq| case.needed(seq)).collect();
        let mut free: Vec<usize> = (0..common.blocks).collect();
        rng.shuffle(&mut free);
        let blocks: Vec<Vec<Option<usize>>> = needed
            .iter()
            .map(|needed| {
                let blocks = needed.chunks(case.block_size);
                blocks.map(|tokens| tokens.contains(&true).then(|| free.pop()).flatten()).collect()
            })
            .collect();
        let mut qo_indptr = vec![0i32];
        for seq in seqs {
            qo_indptr.push(qo_indptr[qo_indptr.len() - 1] + seq.q_len as i32);
        }
        let mut problem = Self {
            sealed: Sealed::draw(case, seqs, &blocks, rng)?,
            q: Vec::new(),
            pool: Elements::poisoned(case.kv_dtype(), common.pool.elements),
            scales: [0, 1].map(|_| match case.scales {
                Some(Scales::Token) => vec![f32::NAN; common.scales.1],
                _ => (0..common.scales.1).map(|_| 0.2 + 0.1 * rng.below(20) as f32).collect(),
            }),
            tree_mask: Vec::new(),
            block_ids: Vec::new(),
            block_row: vec![i64::MAX / 2; GROUPS * seqs.len()],
            first_block: vec![i32::MAX; GROUPS * seqs.len()],
            kv_len: seqs.iter().map(|seq| seq.kv_len as i32).collect(),
            qo_indptr,
            seqs: seqs.to_vec(),
            needed,
            blocks,
        };
        problem.fill_q(case, common, rng);
        problem.fill_tree(case, rng);
        problem.fill_table(case, common, rng);
        for seq in 0..seqs.len() {
            for head in 0..case.kv_heads {
                problem.fill_kv(case, common, rng, seq, head);
            }
        }
        problem.seal(case, common)?;
        Ok(problem)
    }

    /// The slot of the block of a token that is sealed.
    fn slot(&self, case: &Case, seq: usize, token: usize) -> Option<usize> {
        self.sealed.as_ref()?.slot(seq, token / case.block_size)
    }

    /// Moves the sealed blocks out of the pool, where nothing is left of them. Their other layers are of zeros.
    fn seal(&mut self, case: &Case, common: &Common) -> Result<()> {
        let Some(sealed) = &mut self.sealed else { return Ok(()) };
        for (seq, blocks) in self.blocks.iter().enumerate() {
            for (index, &id) in blocks.iter().enumerate() {
                let (Some(slot), Some(id)) = (sealed.slot(seq, index), id) else { continue };
                let mut block = vec![0; sealed.geometry.elements()];
                for (half, head, token) in halves_heads_tokens(case) {
                    let row = (common.layer_slot * 2 + half) * case.kv_heads + head;
                    let to = (row * case.block_size + token) * case.head_dim;
                    let from = common.pool.index(id, common.layer_slot, head, token);
                    for i in 0..case.head_dim {
                        let at = from + half * common.pool.v_offset + i;
                        block[to + i] = encode(case.dtype, self.pool.get(at) as f32);
                        self.pool.poison(at);
                    }
                }
                sealed.seal(slot, &block)?;
            }
        }
        Ok(())
    }

    pub(super) fn tokens(&self) -> usize {
        self.qo_indptr[self.seqs.len()] as usize
    }

    fn fill_q(&mut self, case: &Case, common: &Common, rng: &mut Rng) {
        self.q = vec![POISON; tensor_elements(case, common.q_strides, self.tokens())];
        for token in 0..self.tokens() {
            for head in 0..case.qo_heads() {
                let at = row_index(common.q_strides, token, head);
                for (q, x) in self.q[at..].iter_mut().zip(rng.normals(case.head_dim)) {
                    *q = encode(case.dtype, x * 2f32.powi(case.query_exponent));
                }
            }
        }
    }

    /// New tokens see themselves and about half of the others; bits past the last one mean nothing.
    fn fill_tree(&mut self, case: &Case, rng: &mut Rng) {
        for seq in self.seqs.iter().filter(|_| case.tree) {
            self.tree_mask.extend((0..seq.q_len).map(|new| rng.next() as u32 | 1 << new));
        }
    }

    /// Rows in random order, garbage between them, and garbage for listed blocks without visible tokens.
    fn fill_table(&mut self, case: &Case, common: &Common, rng: &mut Rng) {
        let sink_blocks = case.sink_tokens.div_ceil(case.block_size);
        let mut order: Vec<usize> = (0..self.seqs.len()).collect();
        rng.shuffle(&mut order);
        for s in order {
            let blocks = &self.blocks[s];
            let live = (sink_blocks..blocks.len()).find(|&b| blocks[b].is_some());
            let first = if case.trimmed { live.unwrap_or(blocks.len()) } else { 0 };
            for _ in 0..rng.range(1, 5) {
                self.block_ids.push(rng.pick(&GARBAGE_IDS));
            }
            let row = common.group * self.seqs.len() + s;
            self.block_row[row] = self.block_ids.len() as i64;
            self.first_block[row] = first as i32;
            let listed =
                (0..sink_blocks.min(blocks.len())).chain(first.max(sink_blocks)..blocks.len());
            for block in listed {
                let slot = self.sealed.as_ref().and_then(|sealed| sealed.slot(s, block));
                let slot = slot.map(|slot| slot as i32 | SEALED_BLOCK);
                let id = slot.or(blocks[block].map(|id| id as i32));
                self.block_ids.push(id.unwrap_or_else(|| rng.pick(&GARBAGE_IDS)));
            }
        }
        self.block_ids.push(rng.pick(&GARBAGE_IDS));
    }

    /// Index of the first element of the K of a visible token.
    pub(super) fn key_index(
        &self,
        case: &Case,
        common: &Common,
        seq: usize,
        head: usize,
        token: usize,
    ) -> usize {
        let block = self.blocks[seq][token / case.block_size].unwrap_or(0);
        common.pool.index(block, common.layer_slot, head, token % case.block_size)
    }

    fn fill_kv(&mut self, case: &Case, common: &Common, rng: &mut Rng, seq: usize, head: usize) {
        let dim = case.head_dim;
        let constant: Vec<f32> = rng.normals(dim).collect();
        // A sealed block is whole, seen or not.
        let filled = |&t: &usize| self.needed[seq][t] || self.slot(case, seq, t).is_some();
        for token in (0..self.needed[seq].len()).filter(filled).collect::<Vec<_>>() {
            let at = self.key_index(case, common, seq, head, token);
            let mut key: Vec<f32> = match case.data {
                Data::Equal => constant.clone(),
                _ => rng.normals(dim).collect(),
            };
            if case.data == Data::Outlier {
                key[5] *= 16.0;
            }
            // Now and then a value is far larger than its neighbours.
            let magnitude = if rng.chance(2) { 50.0 } else { 1.0 };
            let value: Vec<f32> = rng.normals(dim).map(|v| v * magnitude).collect();
            let scale = self.scale_index(case, common, seq, head, token);
            for (half, row) in [key, value].into_iter().enumerate() {
                let scale = scale.map_or(1.0, |index| {
                    let slot = &mut self.scales[half][index];
                    if case.scales == Some(Scales::Token) {
                        *slot = row.iter().fold(0f32, |max, x| max.max(x.abs())) / e4m3::MAX;
                    }
                    *slot
                });
                for (i, x) in row.iter().enumerate() {
                    self.pool.put(at + half * common.pool.v_offset + i, x / scale);
                }
            }
        }
        let Seq { q_len, kv_len } = self.seqs[seq];
        if case.data == Data::Needle && q_len > 0 && kv_len > 0 {
            let last = kv_len as i64 - 1;
            let visible: Vec<usize> =
                (0..kv_len).filter(|&key| case.sees(last, key as i64)).collect();
            let token = rng.pick(&visible);
            let needle = self.key_index(case, common, seq, head, token);
            let scale = self.scale_index(case, common, seq, head, token);
            let token = self.qo_indptr[seq + 1] as usize - 1;
            let query = self.query(case, common, token, head * case.group);
            let norm: f64 = query.iter().map(|x| x * x).sum();
            let factor = 20.0 / (f64::from(case.sm_scale()) * norm);
            let key: Vec<f32> = query.iter().map(|q| (q * factor) as f32).collect();
            let scale = scale.map_or(1.0, |index| {
                let slot = &mut self.scales[0][index];
                if case.scales == Some(Scales::Token) {
                    *slot = key.iter().fold(0f32, |max, x| max.max(x.abs())) / e4m3::MAX;
                }
                *slot
            });
            for (i, k) in key.iter().enumerate() {
                self.pool.put(needle + i, k / scale);
            }
        }
    }

    /// Index of the scale of a visible token, if there are any.
    fn scale_index(
        &self,
        case: &Case,
        common: &Common,
        seq: usize,
        head: usize,
        token: usize,
    ) -> Option<usize> {
        case.scales?;
        let block = self.blocks[seq][token / case.block_size].unwrap_or(0);
        let KvStrides { block: b, layer, head: h, token: t } = common.scales.0;
        let offset = token % case.block_size;
        let terms = [(block, b), (common.layer_slot, layer), (head, h), (offset, t)];
        Some(terms.iter().map(|&(i, stride)| i * stride as usize).sum())
    }

    fn query(&self, case: &Case, common: &Common, token: usize, head: usize) -> Vec<f64> {
        let at = row_index(common.q_strides, token, head);
        self.q[at..at + case.head_dim].iter().map(|&bits| decode(case.dtype, bits)).collect()
    }

    /// The reference states of the rows `(query token, query head)` of one KV head of one sequence.
    pub(super) fn reference(
        &self,
        case: &Case,
        common: &Common,
        seq: usize,
        head: usize,
        rows: &[(usize, usize)],
    ) -> Vec<State> {
        let dim = case.head_dim;
        let mut keys = vec![f64::NAN; self.needed[seq].len() * dim];
        let mut values = keys.clone();
        for token in (0..self.needed[seq].len()).filter(|&token| self.needed[seq][token]) {
            if let (Some(slot), Some(sealed)) = (self.slot(case, seq, token), &self.sealed) {
                let token_of_block = token % case.block_size;
                for (half, rows) in [&mut keys, &mut values].into_iter().enumerate() {
                    let row = sealed.row(slot, common.layer_slot, half, head, token_of_block);
                    rows[token * dim..][..dim].copy_from_slice(&row);
                }
                continue;
            }
            let at = self.key_index(case, common, seq, head, token);
            let scale = self.scale_index(case, common, seq, head, token);
            let [k_scale, v_scale] =
                [0, 1].map(|half: usize| scale.map_or(1.0, |i| f64::from(self.scales[half][i])));
            for i in 0..dim {
                keys[token * dim + i] = k_scale * self.pool.get(at + i);
                values[token * dim + i] = v_scale * self.pool.get(at + common.pool.v_offset + i);
            }
        }
        let Seq { q_len, kv_len } = self.seqs[seq];
        rows.iter()
            .map(|&(token, q_head)| {
                let new = token - self.qo_indptr[seq] as usize;
                let position = (kv_len + new) as i64 - q_len as i64;
                let tree = self.tree_mask.get(token).copied();
                let first_new = kv_len as i64 - q_len as i64;
                let sees = |key: i64| {
                    case.sees(position, key) && reference::tree_sees(tree, first_new, key)
                };
                let visible: Vec<usize> = (0..kv_len).filter(|&key| sees(key as i64)).collect();
                let logits = Logits {
                    sm_scale: case.sm_scale().into(),
                    soft_cap: case.soft_cap.into(),
                    sink: common.sink_logits.get(q_head).map(|&sink| sink.into()),
                };
                let query = self.query(case, common, token, q_head);
                reference::attend(&query, &keys, &values, &visible, logits)
            })
            .collect()
    }
}

/// All (half, head, token) of a block.
fn halves_heads_tokens(case: &Case) -> impl Iterator<Item = (usize, usize, usize)> + use<> {
    let (heads, tokens) = (case.kv_heads, case.block_size);
    (0..2 * heads * tokens).map(move |n| (n / (heads * tokens), n / tokens % heads, n % tokens))
}

/// Element index of a row of q or out, guards not counted.
pub(super) fn row_index(strides: HeadStrides, token: usize, head: usize) -> usize {
    token * strides.token as usize + head * strides.head as usize
}

/// Elements of a q or out tensor.
pub(super) fn tensor_elements(case: &Case, strides: HeadStrides, tokens: usize) -> usize {
    match tokens {
        0 => 0,
        _ => row_index(strides, tokens - 1, case.qo_heads() - 1) + case.head_dim,
    }
}
