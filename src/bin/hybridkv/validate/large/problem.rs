//! A large case, run and checked.
//!
//! What makes it cheap to check: sequences are long, memory is not. A pool of a few thousand tokens is
//! listed over and over in the block tables, so that the reference has to look at every distinct key once
//! and weigh it by how often it is visible: `n` equal keys are one key whose LSE is larger by `ln n`.

use std::collections::BTreeMap;

use hybridkv::abi::{self, hkv_window};
use hybridkv::device::{DeviceBuffer, Span};
use hybridkv::e4m3;
use hybridkv::error::Result;
use hybridkv::layout::{KvScales, KvShape, KvStrides, KvView};
use hybridkv::ops::{AttentionArgs, BlockTables, HeadStrides, PlanArgs, WindowTable};
use hybridkv::reference::{self, Logits, State};
use hybridkv::spec::AttentionKind::{Chunked, Full, Sliding};

use super::super::attention::in_parallel;
use super::super::bed::{
    Bed, Elements, Fault, LSE_TOLERANCE, Outcome, POISON, decode, encode, floor, tolerance,
};
use super::super::case::{Data, Scales, Seq};
use super::{Case, DIM, FAR_BLOCKS, FAR_STRIDE, K};
use crate::random::Rng;

pub(super) struct Problem<'a> {
    case: &'a Case,
    seqs: Vec<Seq>,
    /// First query token of every sequence, and the end.
    qo_indptr: Vec<usize>,
    /// Distinct blocks, `[block][K|V][head][token][dim]`; the last one is the needle's.
    pool: Elements,
    /// Scales of K and of V of the distinct blocks, in the order of [`Scales::shape`]; none for 16-bit elements.
    scales: [Vec<f32>; 2],
    scale_strides: KvStrides,
    distinct: usize,
    /// Place of each distinct block in the device pool.
    places: Vec<usize>,
    /// Per sequence, the distinct block of each block index.
    tables: Vec<Vec<usize>>,
    q: Vec<u16>,
}

impl<'a> Problem<'a> {
    pub fn new(case: &'a Case, on_gpu: bool, rng: &mut Rng) -> Self {
        let seqs = case.sequences(on_gpu);
        let mut qo_indptr = vec![0];
        for seq in &seqs {
            qo_indptr.push(qo_indptr[qo_indptr.len() - 1] + seq.q_len);
        }
        let tokens = qo_indptr[seqs.len()];
        let normals = |rng: &mut Rng, n: usize| -> Vec<u16> {
            rng.normals(n).map(|x| encode(case.dtype, x)).collect()
        };
        let q = normals(rng, tokens * case.heads.0 * DIM);
        let distinct = (8 * K / case.heads.1).div_ceil(case.block_size) + 1;
        let pool = Elements::poisoned(case.kv_dtype(), distinct * block_elements(case));
        let (scale_strides, num_scales) = case.scales.map_or((KvStrides::NONE, 0), |scales| {
            scales.shape(distinct, 1, case.heads.1, case.block_size)
        });
        let mut places: Vec<usize> = if case.far {
            // Both ends of the range among them.
            (0..distinct).map(|i| i * (FAR_BLOCKS - 1) / (distinct - 1)).collect()
        } else {
            (0..distinct).collect()
        };
        rng.shuffle(&mut places);
        let tables: Vec<Vec<usize>> = seqs
            .iter()
            .map(|seq| {
                let mut order: Vec<usize> = (0..distinct - 1).collect();
                rng.shuffle(&mut order);
                let blocks = seq.kv_len.div_ceil(case.block_size);
                (0..blocks).map(|b| order[b % order.len()]).collect()
            })
            .collect();
        // Those that tokens share; every row with a scale of its own replaces it.
        let scales = [0.05, 0.02].map(|scale| vec![scale; num_scales]);
        let mut problem = Self {
            case,
            seqs,
            qo_indptr,
            pool,
            scales,
            scale_strides,
            distinct,
            places,
            tables,
            q,
        };
        let constant: Vec<f32> = rng.normals(DIM).collect();
        for row in 0..distinct * case.block_size {
            for (half, head) in (0..2).flat_map(|half| (0..case.heads.1).map(move |h| (half, h))) {
                if half == 0 && case.data == Data::Equal {
                    problem.put(half, head, row, &constant);
                } else {
                    let values: Vec<f32> = rng.normals(DIM).collect();
                    problem.put(half, head, row, &values);
                }
            }
        }
        if case.data == Data::Needle {
            problem.hide_needle(rng);
        }
        problem
    }

    /// Index of the scale of a distinct key (and its value), if there are any.
    fn scale_index(&self, head: usize, row: usize) -> Option<usize> {
        self.case.scales?;
        let KvStrides { block, head: h, token, .. } = self.scale_strides;
        let size = self.case.block_size;
        let terms = [(row / size, block), (head, h), (row % size, token)];
        Some(terms.iter().map(|&(i, stride)| i * stride as usize).sum())
    }

    /// Puts a distinct key (`half` 0) or value.
    fn put(&mut self, half: usize, head: usize, row: usize, values: &[f32]) {
        let scale = self.scale_index(head, row).map_or(1.0, |index| {
            let slot = &mut self.scales[half][index];
            if self.case.scales == Some(Scales::Token) {
                *slot = values.iter().fold(0f32, |max, x| max.max(x.abs())) / e4m3::MAX;
            }
            *slot
        });
        let at = key_index(self.case, head, row) + half * block_elements(self.case) / 2;
        for (i, x) in values.iter().enumerate() {
            self.pool.put(at + i, x / scale);
        }
    }

    /// The values of a distinct key (`half` 0) or value.
    fn get(&self, half: usize, head: usize, row: usize) -> impl Iterator<Item = f64> {
        let scale = self.scale_index(head, row).map_or(1.0, |i| f64::from(self.scales[half][i]));
        let at = key_index(self.case, head, row) + half * block_elements(self.case) / 2;
        (at..at + DIM).map(move |index| scale * self.pool.get(index))
    }

    /// Puts a key at a logit of +20 for the last query of the first sequence into a block of its own.
    fn hide_needle(&mut self, rng: &mut Rng) {
        let case = self.case;
        let Seq { kv_len, .. } = self.seqs[0];
        let token = rng.below(kv_len as u64) as usize;
        self.tables[0][token / case.block_size] = self.distinct - 1;
        for head in 0..case.heads.1 {
            let query = self.query(self.qo_indptr[1] - 1, head * case.group());
            let norm: f64 = query.iter().map(|x| x * x).sum();
            let row = (self.distinct - 1) * case.block_size + token % case.block_size;
            let factor = 20.0 * (DIM as f64).sqrt() / norm;
            let key: Vec<f32> = query.iter().map(|q| (q * factor) as f32).collect();
            self.put(0, head, row, &key);
        }
    }

    fn query(&self, token: usize, head: usize) -> Vec<f64> {
        let at = (token * self.case.heads.0 + head) * DIM;
        self.q[at..at + DIM].iter().map(|&bits| decode(self.case.dtype, bits)).collect()
    }

    pub fn run(&self, bed: &Bed, rng: &mut Rng) -> Result<Outcome> {
        let case = self.case;
        let block = block_elements(case);
        let stride = if case.far { FAR_STRIDE } else { block };
        let blocks = if case.far { FAR_BLOCKS } else { self.distinct };
        let element = case.kv_dtype().bytes();
        let block_bytes = block * element;
        let pool = bed.room::<u8>(((blocks - 1) * stride + block) * element)?;
        let distinct = self.pool.bytes().chunks(block_bytes);
        if case.far {
            for (data, place) in distinct.zip(&self.places) {
                let staging = bed.device.upload(data)?;
                let to = pool.address() + (element * place * stride) as u64;
                // SAFETY: both live until the stream is synchronised.
                unsafe { bed.stream.as_ref().copy(staging.address(), to, block_bytes)? };
                bed.stream.as_ref().synchronize()?;
            }
        } else {
            let mut placed = vec![0; self.pool.bytes().len()];
            for (data, place) in distinct.zip(&self.places) {
                placed[place * block_bytes..][..block_bytes].copy_from_slice(data);
            }
            bed.write(&pool, &placed)?;
        }
        let scales = self.place_scales(bed, blocks)?;

        // Windowed sequences list only live blocks, as a manager would.
        let (mut block_ids, mut block_row, mut first_block) = (vec![], vec![], vec![]);
        let mut longest = 0;
        for (seq, table) in self.seqs.iter().zip(&self.tables) {
            let first_query = seq.kv_len - seq.q_len;
            let first_key = (0..=first_query).find(|&key| case.sees(first_query, key)).unwrap_or(0);
            let first = first_key / case.block_size;
            longest = longest.max(seq.kv_len - first_key);
            block_row.push(block_ids.len() as i64);
            first_block.push(first as i32);
            block_ids.extend(table[first..].iter().map(|&b| self.places[b] as i32));
        }
        let (kind, extent) = match case.kind {
            Full => (abi::HKV_LAYER_FULL, 0),
            Sliding { window } => (abi::HKV_LAYER_SLIDING, window),
            Chunked { chunk } => (abi::HKV_LAYER_CHUNKED, chunk),
        };
        let window = hkv_window {
            kind: kind as i32,
            extent: extent as i32,
            sink_tokens: 0,
            group: 0,
            layer_slot: 0,
            reserved: [0; 3],
        };
        let mut kv_len: Vec<i32> = self.seqs.iter().map(|seq| seq.kv_len as i32).collect();
        if bed.fault == Some(Fault::Length) && case.kind == Full {
            kv_len[0] -= 1;
        }
        let tokens = self.qo_indptr[self.seqs.len()];
        let rows = tokens * case.heads.0;
        let qo_indptr: Vec<i32> = self.qo_indptr.iter().map(|&t| t as i32).collect();
        let q = bed.device.upload(&self.q)?;
        let out = bed.device.upload(&vec![POISON; rows * DIM])?;
        let lse = bed.device.upload(&vec![f32::NAN; rows])?;
        let [qo_indptr, kv_len, block_ids, first_block] =
            [&qo_indptr, &kv_len, &block_ids, &first_block].map(|array| bed.device.upload(array));
        let (qo_indptr, kv_len) = (qo_indptr?, kv_len?);
        let (block_ids, first_block) = (block_ids?, first_block?);
        let block_row = bed.device.upload(&block_row)?;
        let windows = bed.device.upload(&[window])?;
        let half = (block_bytes / 2) as u64;
        let mut args = AttentionArgs {
            q: q.span(),
            q_strides: HeadStrides::contiguous(case.heads.0 as u32, DIM as u32),
            out: out.span(),
            out_strides: HeadStrides::contiguous(case.heads.0 as u32, DIM as u32),
            dtype: case.dtype,
            lse: Some(lse.span()),
            kv: KvView {
                k: pool.span(),
                v: Span::new(pool.address() + half, pool.len() as u64 - half),
                strides: KvStrides {
                    block: stride as i64,
                    layer: 0,
                    head: (case.block_size * DIM) as i64,
                    token: DIM as i64,
                },
                shape: KvShape {
                    num_kv_heads: case.heads.1 as u32,
                    head_dim: DIM as u32,
                    dtype: case.kv_dtype(),
                },
                block_size: case.block_size as u32,
                num_blocks: blocks as u64,
                num_layer_slots: 1,
                scales: case.scales.map(|_| KvScales {
                    k: scales[0].span(),
                    v: scales[1].span(),
                    strides: self.scale_strides,
                }),
            },
            sealed: None,
            qo_indptr: qo_indptr.span(),
            kv_len: kv_len.span(),
            tables: BlockTables {
                block_ids: block_ids.span(),
                block_row: block_row.span(),
                first_block: Some(first_block.span()),
                num_groups: 1,
            },
            windows: WindowTable { rows: windows.span(), num_layers: 1 },
            layer: 0,
            sink_logits: None,
            tree_mask: None,
            plan: None,
            num_qo_heads: case.heads.0 as u32,
            num_seqs: self.seqs.len() as u32,
            num_tokens: tokens as u32,
            max_q_len: self.seqs.iter().map(|seq| seq.q_len).max().unwrap_or(0) as u32,
            max_kv_len: longest as u32,
            sm_scale: 1.0 / (DIM as f32).sqrt(),
            logits_soft_cap: 0.0,
            workspace: Span::default(),
        };
        let class = [args];
        let mut plan =
            PlanArgs { classes: &class, batch_invariant: false, memory: Span::default() };
        let memory = bed.device.alloc(bed.kernels.plan_bytes(&plan)? as usize)?;
        plan.memory = memory.span();
        args.plan = bed.kernels.planned(&plan, 0)?;
        let workspace = bed.device.alloc(bed.kernels.attention_workspace_bytes(&args)? as usize)?;
        args.workspace = workspace.span();
        // SAFETY: all buffers live until the stream is synchronised.
        unsafe {
            bed.kernels.plan(&plan, bed.stream.as_ref())?;
            bed.kernels.attention(&args, bed.stream.as_ref())?;
        }
        bed.stream.as_ref().synchronize()?;
        self.check(&out.download()?, &lse.download()?, rng)
    }

    /// The scales on the device, those of every distinct block where the block is.
    fn place_scales(&self, bed: &Bed, blocks: usize) -> Result<[DeviceBuffer; 2]> {
        let block = self.scale_strides.block as usize;
        let place = |scales: &Vec<f32>| {
            if block == 0 {
                return bed.device.upload(scales);
            }
            let mut placed = vec![f32::NAN; blocks * block];
            for (data, place) in scales.chunks(block).zip(&self.places) {
                placed[place * block..][..block].copy_from_slice(data);
            }
            bed.device.upload(&placed)
        };
        Ok([place(&self.scales[0])?, place(&self.scales[1])?])
    }

    fn check(&self, out: &[u16], lse: &[f32], rng: &mut Rng) -> Result<Outcome> {
        let case = self.case;
        let mut outcome = Outcome::default();
        if let Some(at) = out.iter().position(|&bits| !decode(case.dtype, bits).is_finite()) {
            outcome.fail(format!("element {at} of the output is unwritten or not finite"));
        }
        // The first and last query of some sequences, and queries between, with all heads.
        let mut sampled: Vec<usize> = (0..self.seqs.len()).collect();
        rng.shuffle(&mut sampled[1..]);
        let mut tasks = Vec::new();
        for &seq in sampled.iter().take(12) {
            let (first, last) = (self.qo_indptr[seq], self.qo_indptr[seq + 1] - 1);
            let mut tokens = vec![first, last];
            tokens.extend((0..6).map(|_| rng.range(first as u64, last as u64) as usize));
            tokens.sort_unstable();
            tokens.dedup();
            tasks.extend(tokens.into_iter().map(|token| (seq, token)));
        }
        let states = in_parallel(&tasks, |&(seq, token)| self.reference(seq, token));
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for (&(_, token), states) in tasks.iter().zip(&states) {
            for (head, state) in states.iter().enumerate() {
                let row = token * case.heads.0 + head;
                ours.extend(out[row * DIM..][..DIM].iter().map(|&x| decode(case.dtype, x)));
                theirs.extend(&state.out);
                outcome.judge_lse(
                    format_args!("token {token}, head {head}"),
                    lse[row],
                    state.lse,
                    LSE_TOLERANCE,
                );
            }
        }
        let comparison = reference::compare(&ours, &theirs, DIM, floor(case.dtype));
        outcome.judge("out", &comparison, &tolerance(case.dtype));
        Ok(outcome)
    }

    /// The states of all query heads of one token.
    fn reference(&self, seq: usize, token: usize) -> Vec<State> {
        let case = self.case;
        let Seq { q_len, kv_len } = self.seqs[seq];
        let position = kv_len - q_len + token - self.qo_indptr[seq];
        // How often each distinct key is visible; then the keys by that number.
        let mut times = vec![0usize; self.distinct * case.block_size];
        for key in (0..=position).filter(|&key| case.sees(position, key)) {
            let block = self.tables[seq][key / case.block_size];
            times[block * case.block_size + key % case.block_size] += 1;
        }
        let mut by_times: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (row, &times) in times.iter().enumerate().filter(|(_, times)| **times > 0) {
            by_times.entry(times).or_default().push(row);
        }
        let logits = Logits { sm_scale: 1.0 / (DIM as f64).sqrt(), soft_cap: 0.0, sink: None };
        let rows = self.distinct * case.block_size;
        (0..case.heads.1)
            .flat_map(|kv_head| {
                let gather = |half: usize| -> Vec<f64> {
                    (0..rows).flat_map(|row| self.get(half, kv_head, row)).collect()
                };
                let (keys, values) = (gather(0), gather(1));
                let heads = kv_head * case.group()..(kv_head + 1) * case.group();
                let states: Vec<State> = heads
                    .map(|head| {
                        let query = self.query(token, head);
                        let parts: Vec<State> = by_times
                            .iter()
                            .map(|(&times, rows)| {
                                let mut state =
                                    reference::attend(&query, &keys, &values, rows, logits);
                                state.lse += (times as f64).ln();
                                state
                            })
                            .collect();
                        reference::merge(DIM, &parts, None)
                    })
                    .collect();
                states
            })
            .collect()
    }
}

/// Elements of K and V of one block.
fn block_elements(case: &Case) -> usize {
    2 * case.heads.1 * case.block_size * DIM
}

/// Index of a distinct key: `row` counts tokens over the distinct blocks.
fn key_index(case: &Case, head: usize, row: usize) -> usize {
    let (block, token) = (row / case.block_size, row % case.block_size);
    block * block_elements(case) + (head * case.block_size + token) * DIM
}
