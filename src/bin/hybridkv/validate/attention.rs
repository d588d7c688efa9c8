//! `attention` against the reference: one case is a pool full of NaN in which only the visible tokens
//! hold data, a block table whose other entries are garbage, and outputs between guards.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use hybridkv::abi::{self, hkv_window};
use hybridkv::device::cuda::Graph;
use hybridkv::device::{DeviceBuffer, Span, StreamRef};
use hybridkv::e4m3;
use hybridkv::error::Result;
use hybridkv::layout::{KvScales, KvShape, KvStrides, KvView};
use hybridkv::ops::{self, AttentionArgs, BlockTables, HeadStrides, PlanArgs, WindowTable};
use hybridkv::reference::{self, Logits, State};
use hybridkv::spec::AttentionKind;

use super::bed::{
    Bed, Elements, Fault, GUARD, Outcome, POISON, POISON_F32, decode, encode, floor, stray,
    tolerance,
};
use super::case::{Case, Data, Planned, PoolShape, Scales, Seq};
use crate::random::Rng;

/// Groups in every table: that of the layer, and others with nothing but garbage.
const GROUPS: usize = 2;
/// Block ids and rows that nobody may follow.
const GARBAGE_IDS: [i32; 4] = [-1, i32::MIN, i32::MAX, 0x4000_0000];
/// Multiplications that the reference spends on one batch; above that, rows are sampled.
const REFERENCE_WORK: usize = 200_000_000;

/// Runs a case.
pub fn run(bed: &Bed, case: &Case, rng: &mut Rng) -> Result<Outcome> {
    let plan = Plan::new(case, rng);
    let problems: Vec<Problem> =
        case.batches.iter().map(|batch| Problem::new(case, &plan, batch, rng)).collect();
    let buffers = Buffers::new(bed, case, &plan, &problems)?;
    let args = buffers.args(case, &plan, &problems);
    let mut outcome = Outcome::default();
    if case.planned == Planned::Stale {
        buffers.plan(bed, case, &args, bed.stream.as_ref())?;
    }
    let submit = |stream: StreamRef<'_>| -> Result<()> {
        if matches!(case.planned, Planned::Always | Planned::ByLength) {
            buffers.plan(bed, case, &args, stream)?;
        }
        // SAFETY: the buffers are filled before it runs, and outlive every launch. An early plan is a stale one:
        // nothing but copies comes before it.
        unsafe { bed.kernels.attention(&args, stream) }
    };
    let graph = if problems.len() > 1 {
        // Capturing runs nothing, so that the arrays need not hold anything yet.
        Some(Graph::capture(bed.stream.as_ref(), submit)?)
    } else {
        None
    };
    for problem in &problems {
        buffers.fill(bed, case, &plan, problem)?;
        let stream = bed.stream.as_ref();
        // SAFETY: the buffers are filled, and live until the stream is synchronised.
        unsafe {
            match &graph {
                Some(graph) => graph.launch(stream)?,
                None => submit(stream)?,
            }
            if bed.fault == Some(Fault::Stray) {
                stream.fill(buffers.out.address() + 2 * (GUARD as u64 - 1), 0, 2)?;
            }
        }
        stream.synchronize()?;
        buffers.check(case, &plan, problem, rng, &mut outcome)?;
        if case.planned == Planned::ByLength && graph.is_none() {
            let alone = rng.below(problem.seqs.len() as u64) as usize;
            let before: Vec<u16> = buffers.out.download()?;
            let mut kv_len = vec![0; problem.seqs.len()];
            kv_len[alone] = problem.kv_len[alone];
            bed.write(&buffers.kv_len, &kv_len)?;
            submit(stream)?;
            stream.synchronize()?;
            let after: Vec<u16> = buffers.out.download()?;
            let rows = problem.qo_indptr[alone] as usize..problem.qo_indptr[alone + 1] as usize;
            for (token, head) in rows.flat_map(|t| (0..case.qo_heads()).map(move |h| (t, h))) {
                let at = GUARD + row_index(plan.out_strides, token, head);
                if before[at..at + case.head_dim] != after[at..at + case.head_dim] {
                    outcome.fail(format!(
                        "token {token}, head {head} has other bits when its sequence is alone"
                    ));
                }
            }
        }
    }
    Ok(outcome)
}

/// What all batches of a case share.
struct Plan {
    pool: PoolShape,
    /// Strides of the scales, and how many of K (and of V) there are; none for 16-bit elements.
    scales: (KvStrides, usize),
    blocks: usize,
    layer: usize,
    group: usize,
    layer_slot: usize,
    q_strides: HeadStrides,
    out_strides: HeadStrides,
    sink_logits: Vec<f32>,
    windows: Vec<hkv_window>,
}

impl Plan {
    fn new(case: &Case, rng: &mut Rng) -> Self {
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
struct Problem {
    seqs: Vec<Seq>,
    /// Per sequence, which tokens are visible to any query.
    needed: Vec<Vec<bool>>,
    /// Per sequence and block index, the id in the pool; `None` where no token is visible.
    blocks: Vec<Vec<Option<usize>>>,
    q: Vec<u16>,
    pool: Elements,
    /// Of K and of V; those of tokens NaN where the token is not visible.
    scales: [Vec<f32>; 2],
    /// Of every query token, if the case has a tree.
    tree_mask: Vec<u32>,
    block_ids: Vec<i32>,
    block_row: Vec<i64>,
    first_block: Vec<i32>,
    kv_len: Vec<i32>,
    qo_indptr: Vec<i32>,
}

impl Problem {
    fn new(case: &Case, plan: &Plan, seqs: &[Seq], rng: &mut Rng) -> Self {
        let needed: Vec<Vec<bool>> = seqs.iter().map(|&seq| case.needed(seq)).collect();
        let mut free: Vec<usize> = (0..plan.blocks).collect();
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
            q: Vec::new(),
            pool: Elements::poisoned(case.kv_dtype(), plan.pool.elements),
            scales: [0, 1].map(|_| match case.scales {
                Some(Scales::Token) => vec![f32::NAN; plan.scales.1],
                _ => (0..plan.scales.1).map(|_| 0.2 + 0.1 * rng.below(20) as f32).collect(),
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
        problem.fill_q(case, plan, rng);
        problem.fill_tree(case, rng);
        problem.fill_table(case, plan, rng);
        for seq in 0..seqs.len() {
            for head in 0..case.kv_heads {
                problem.fill_kv(case, plan, rng, seq, head);
            }
        }
        problem
    }

    fn tokens(&self) -> usize {
        self.qo_indptr[self.seqs.len()] as usize
    }

    fn fill_q(&mut self, case: &Case, plan: &Plan, rng: &mut Rng) {
        self.q = vec![POISON; plan_elements(case, plan.q_strides, self.tokens())];
        for token in 0..self.tokens() {
            for head in 0..case.qo_heads() {
                let at = row_index(plan.q_strides, token, head);
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
    fn fill_table(&mut self, case: &Case, plan: &Plan, rng: &mut Rng) {
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
            let row = plan.group * self.seqs.len() + s;
            self.block_row[row] = self.block_ids.len() as i64;
            self.first_block[row] = first as i32;
            let listed =
                (0..sink_blocks.min(blocks.len())).chain(first.max(sink_blocks)..blocks.len());
            for block in listed {
                let id = blocks[block].map(|id| id as i32);
                self.block_ids.push(id.unwrap_or_else(|| rng.pick(&GARBAGE_IDS)));
            }
        }
        self.block_ids.push(rng.pick(&GARBAGE_IDS));
    }

    /// Index of the first element of the K of a visible token.
    fn key_index(&self, case: &Case, plan: &Plan, seq: usize, head: usize, token: usize) -> usize {
        let block = self.blocks[seq][token / case.block_size].unwrap_or(0);
        plan.pool.index(block, plan.layer_slot, head, token % case.block_size)
    }

    fn fill_kv(&mut self, case: &Case, plan: &Plan, rng: &mut Rng, seq: usize, head: usize) {
        let dim = case.head_dim;
        let constant: Vec<f32> = rng.normals(dim).collect();
        for token in
            (0..self.needed[seq].len()).filter(|&t| self.needed[seq][t]).collect::<Vec<_>>()
        {
            let at = self.key_index(case, plan, seq, head, token);
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
            let scale = self.scale_index(case, plan, seq, head, token);
            for (half, row) in [key, value].into_iter().enumerate() {
                let scale = scale.map_or(1.0, |index| {
                    let slot = &mut self.scales[half][index];
                    if case.scales == Some(Scales::Token) {
                        *slot = row.iter().fold(0f32, |max, x| max.max(x.abs())) / e4m3::MAX;
                    }
                    *slot
                });
                for (i, x) in row.iter().enumerate() {
                    self.pool.put(at + half * plan.pool.v_offset + i, x / scale);
                }
            }
        }
        let Seq { q_len, kv_len } = self.seqs[seq];
        if case.data == Data::Needle && q_len > 0 && kv_len > 0 {
            let last = kv_len as i64 - 1;
            let visible: Vec<usize> =
                (0..kv_len).filter(|&key| case.sees(last, key as i64)).collect();
            let token = rng.pick(&visible);
            let needle = self.key_index(case, plan, seq, head, token);
            let scale = self.scale_index(case, plan, seq, head, token);
            let token = self.qo_indptr[seq + 1] as usize - 1;
            let query = self.query(case, plan, token, head * case.group);
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
        plan: &Plan,
        seq: usize,
        head: usize,
        token: usize,
    ) -> Option<usize> {
        case.scales?;
        let block = self.blocks[seq][token / case.block_size].unwrap_or(0);
        let KvStrides { block: b, layer, head: h, token: t } = plan.scales.0;
        let offset = token % case.block_size;
        let terms = [(block, b), (plan.layer_slot, layer), (head, h), (offset, t)];
        Some(terms.iter().map(|&(i, stride)| i * stride as usize).sum())
    }

    fn query(&self, case: &Case, plan: &Plan, token: usize, head: usize) -> Vec<f64> {
        let at = row_index(plan.q_strides, token, head);
        self.q[at..at + case.head_dim].iter().map(|&bits| decode(case.dtype, bits)).collect()
    }

    /// The reference states of the rows `(query token, query head)` of one KV head of one sequence.
    fn reference(
        &self,
        case: &Case,
        plan: &Plan,
        seq: usize,
        head: usize,
        rows: &[(usize, usize)],
    ) -> Vec<State> {
        let dim = case.head_dim;
        let mut keys = vec![f64::NAN; self.needed[seq].len() * dim];
        let mut values = keys.clone();
        for token in (0..self.needed[seq].len()).filter(|&token| self.needed[seq][token]) {
            let at = self.key_index(case, plan, seq, head, token);
            let scale = self.scale_index(case, plan, seq, head, token);
            let [k_scale, v_scale] =
                [0, 1].map(|half: usize| scale.map_or(1.0, |i| f64::from(self.scales[half][i])));
            for i in 0..dim {
                keys[token * dim + i] = k_scale * self.pool.get(at + i);
                values[token * dim + i] = v_scale * self.pool.get(at + plan.pool.v_offset + i);
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
                    sink: plan.sink_logits.get(q_head).map(|&sink| sink.into()),
                };
                let query = self.query(case, plan, token, q_head);
                reference::attend(&query, &keys, &values, &visible, logits)
            })
            .collect()
    }
}

fn plan_args(classes: &[AttentionArgs], planned: Planned, memory: Span) -> PlanArgs<'_> {
    PlanArgs { classes, batch_invariant: planned == Planned::ByLength, memory }
}

/// Element index of a row of q or out, guards not counted.
fn row_index(strides: HeadStrides, token: usize, head: usize) -> usize {
    token * strides.token as usize + head * strides.head as usize
}

/// Elements of a q or out tensor.
fn plan_elements(case: &Case, strides: HeadStrides, tokens: usize) -> usize {
    match tokens {
        0 => 0,
        _ => row_index(strides, tokens - 1, case.qo_heads() - 1) + case.head_dim,
    }
}

/// The arrays on the device, large enough for every batch of the case.
struct Buffers {
    q: DeviceBuffer,
    pool: DeviceBuffer,
    scales: [DeviceBuffer; 2],
    tree_mask: DeviceBuffer,
    out: DeviceBuffer,
    lse: DeviceBuffer,
    block_ids: DeviceBuffer,
    block_row: DeviceBuffer,
    first_block: DeviceBuffer,
    kv_len: DeviceBuffer,
    qo_indptr: DeviceBuffer,
    windows: DeviceBuffer,
    sink_logits: DeviceBuffer,
    workspace: DeviceBuffer,
    /// Of other batches than these: what a stale plan is made for.
    other_kv_len: DeviceBuffer,
    plans: DeviceBuffer,
    plan: Option<ops::Plan>,
    tokens: usize,
}

impl Buffers {
    fn new(bed: &Bed, case: &Case, plan: &Plan, problems: &[Problem]) -> Result<Self> {
        let most = |size: &dyn Fn(&Problem) -> usize| problems.iter().map(size).max().unwrap_or(0);
        let tokens = most(&|p| p.tokens());
        let sequences = problems.first().map_or(0, |p| p.seqs.len());
        let other_kv_len: Vec<i32> =
            (0..sequences).map(|seq| [90_000, 0, 1, 3000][seq % 4]).collect();
        let out = plan_elements(case, plan.out_strides, tokens) + 2 * GUARD;
        let mut buffers = Self {
            q: bed.room::<u16>(plan_elements(case, plan.q_strides, tokens))?,
            pool: bed.room::<u8>(plan.pool.elements * case.kv_dtype().bytes())?,
            scales: [bed.room::<f32>(plan.scales.1)?, bed.room::<f32>(plan.scales.1)?],
            tree_mask: bed.room::<u32>(tokens)?,
            out: bed.room::<u16>(out)?,
            lse: bed.room::<u32>(tokens * case.qo_heads() + 2 * GUARD)?,
            block_ids: bed.room::<i32>(most(&|p| p.block_ids.len()))?,
            block_row: bed.room::<i64>(GROUPS * sequences)?,
            first_block: bed.room::<i32>(GROUPS * sequences)?,
            kv_len: bed.room::<i32>(sequences)?,
            qo_indptr: bed.room::<i32>(sequences + 1)?,
            windows: bed.device.upload(&plan.windows)?,
            sink_logits: bed.device.upload(&plan.sink_logits)?,
            workspace: bed.room::<u8>(0)?,
            other_kv_len: bed.device.upload(&other_kv_len)?,
            plans: bed.room::<u8>(0)?,
            plan: None,
            tokens,
        };
        if case.planned != Planned::No {
            let class = [buffers.class(&buffers.args(case, plan, problems), case.planned)];
            let mut args = plan_args(&class, case.planned, Span::default());
            let bytes = bed.kernels.plan_bytes(&args)? as usize;
            // What a plan leaves out must not be read.
            buffers.plans = bed.device.upload(&vec![POISON as u8; bytes])?;
            args.memory = buffers.plans.span();
            buffers.plan = bed.kernels.planned(&args, 0)?;
        }
        if case.planned == Planned::Stale {
            buffers.plan = buffers.plan.map(ops::Plan::early);
        }
        let bytes = bed.kernels.attention_workspace_bytes(&buffers.args(case, plan, problems))?;
        buffers.workspace = bed.device.alloc(bytes as usize)?;
        // SAFETY: the buffer lives until the stream is synchronised after the kernel.
        unsafe {
            bed.stream.as_ref().fill(
                buffers.workspace.address(),
                POISON as u8,
                buffers.workspace.len(),
            )?;
        }
        Ok(buffers)
    }

    /// The arguments to plan for.
    fn class(&self, args: &AttentionArgs, planned: Planned) -> AttentionArgs {
        let stale = planned == Planned::Stale;
        let kv_len = if stale { self.other_kv_len.span() } else { args.kv_len };
        AttentionArgs { kv_len, ..*args }
    }

    /// Submits the plan of the batch that the buffers hold.
    fn plan(
        &self,
        bed: &Bed,
        case: &Case,
        args: &AttentionArgs,
        stream: StreamRef<'_>,
    ) -> Result<()> {
        let class = [self.class(args, case.planned)];
        let args = plan_args(&class, case.planned, self.plans.span());
        // SAFETY: the buffers outlive every launch.
        unsafe { bed.kernels.plan(&args, stream) }
    }

    fn args(&self, case: &Case, plan: &Plan, problems: &[Problem]) -> AttentionArgs {
        let most = |size: &dyn Fn(&Problem) -> usize| -> u32 {
            problems.iter().map(size).max().unwrap_or(0) as u32
        };
        let visible = |p: &Problem| {
            let count = |needed: &Vec<bool>| needed.iter().filter(|&&n| n).count();
            p.needed.iter().map(count).max().unwrap_or(0)
        };
        let v_bytes = (plan.pool.v_offset * case.kv_dtype().bytes()) as u64;
        let v = Span::new(self.pool.address() + v_bytes, self.pool.len() as u64 - v_bytes);
        let guarded = |buffer: &DeviceBuffer, element: u64| {
            let guard = GUARD as u64 * element;
            Span::new(buffer.address() + guard, buffer.len() as u64 - 2 * guard)
        };
        AttentionArgs {
            q: self.q.span(),
            q_strides: plan.q_strides,
            out: guarded(&self.out, 2),
            out_strides: plan.out_strides,
            dtype: case.dtype,
            lse: case.lse.then(|| guarded(&self.lse, 4)),
            kv: KvView {
                k: self.pool.span(),
                v,
                strides: plan.pool.strides,
                shape: KvShape {
                    num_kv_heads: case.kv_heads as u32,
                    head_dim: case.head_dim as u32,
                    dtype: case.kv_dtype(),
                },
                block_size: case.block_size as u32,
                num_blocks: plan.blocks as u64,
                num_layer_slots: case.layers as u32,
                scales: case.scales.map(|_| KvScales {
                    k: self.scales[0].span(),
                    v: self.scales[1].span(),
                    strides: plan.scales.0,
                }),
            },
            qo_indptr: self.qo_indptr.span(),
            kv_len: self.kv_len.span(),
            tables: BlockTables {
                block_ids: self.block_ids.span(),
                block_row: self.block_row.span(),
                first_block: case.trimmed.then(|| self.first_block.span()),
                num_groups: GROUPS as u32,
            },
            windows: WindowTable {
                rows: self.windows.span(),
                num_layers: plan.windows.len() as u32,
            },
            layer: plan.layer as u32,
            sink_logits: case.sink_logits.then(|| self.sink_logits.span()),
            tree_mask: case.tree.then(|| self.tree_mask.span()),
            plan: self.plan,
            num_qo_heads: case.qo_heads() as u32,
            num_seqs: most(&|p| p.seqs.len()),
            num_tokens: self.tokens as u32,
            max_q_len: most(&|p| p.seqs.iter().map(|seq| seq.q_len).max().unwrap_or(0)),
            max_kv_len: most(&visible),
            sm_scale: case.sm_scale(),
            logits_soft_cap: case.soft_cap,
            workspace: self.workspace.span(),
        }
    }

    /// Writes the batch's arrays, and the pattern that an output must replace.
    fn fill(&self, bed: &Bed, case: &Case, plan: &Plan, problem: &Problem) -> Result<()> {
        let mut windows = plan.windows.clone();
        let mut pool = problem.pool.bytes().to_vec();
        let mut block_ids = problem.block_ids.clone();
        let mut kv_len = problem.kv_len.clone();
        let mut qo_indptr = problem.qo_indptr.clone();
        match bed.fault {
            Some(Fault::Window) if matches!(case.kind, AttentionKind::Sliding { window: 2.. }) => {
                windows[plan.layer].extent -= 1;
            }
            Some(Fault::Swap) => {
                let live: Vec<i32> =
                    problem.blocks[0].iter().flatten().map(|&b| b as i32).collect();
                if let [a, b, ..] = live[..] {
                    let swapped = |id: i32| {
                        if id == a {
                            b
                        } else if id == b {
                            a
                        } else {
                            id
                        }
                    };
                    block_ids.iter_mut().for_each(|id| *id = swapped(*id));
                }
            }
            Some(Fault::Skip) => {
                let last = qo_indptr.len() - 1;
                qo_indptr[last] = (qo_indptr[last] - 1).max(qo_indptr[last - 1]);
            }
            // Windows would reach back into blocks that do not exist.
            Some(Fault::Length) if case.kind == AttentionKind::Full => {
                kv_len[0] = (kv_len[0] - 1).max(0);
            }
            Some(Fault::Nan) => {
                if let Some(token) = problem.needed[0].iter().position(|&needed| needed) {
                    let element = case.kv_dtype().bytes();
                    let at = element * problem.key_index(case, plan, 0, 0, token);
                    pool[at..at + element].fill(0xff);
                }
            }
            _ => {}
        }
        bed.write(&self.windows, &windows)?;
        bed.write(&self.pool, &pool)?;
        for (buffer, scales) in self.scales.iter().zip(&problem.scales) {
            bed.write(buffer, scales)?;
        }
        bed.write(&self.tree_mask, &problem.tree_mask)?;
        bed.write(&self.block_ids, &block_ids)?;
        bed.write(&self.kv_len, &kv_len)?;
        bed.write(&self.qo_indptr, &qo_indptr)?;
        bed.write(&self.q, &problem.q)?;
        bed.write(&self.block_row, &problem.block_row)?;
        bed.write(&self.first_block, &problem.first_block)?;
        bed.write(&self.out, &vec![POISON; self.out.len() / 2])?;
        bed.write(&self.lse, &vec![POISON_F32; self.lse.len() / 4])
    }

    /// Holds what the kernel wrote against the reference.
    fn check(
        &self,
        case: &Case,
        plan: &Plan,
        problem: &Problem,
        rng: &mut Rng,
        outcome: &mut Outcome,
    ) -> Result<()> {
        let out: Vec<u16> = self.out.download()?;
        let lse: Vec<u32> = self.lse.download()?;
        let heads = case.qo_heads();
        let out_at = |token, head| GUARD + row_index(plan.out_strides, token, head);
        let lse_at = |token: usize, head: usize| GUARD + token * heads + head;

        // Every row of the batch is written, and nothing else is.
        let mut out_rows = vec![false; out.len()];
        let mut lse_rows = vec![false; lse.len()];
        for token in 0..problem.tokens() {
            for head in 0..heads {
                let row = out_at(token, head)..out_at(token, head) + case.head_dim;
                if let Some(i) = row.clone().find(|&i| !decode(case.dtype, out[i]).is_finite()) {
                    let what = if out[i] == POISON { "unwritten" } else { "not finite" };
                    outcome.fail(format!("out of token {token}, head {head} is {what}"));
                }
                out_rows[row].fill(true);
                lse_rows[lse_at(token, head)] = case.lse;
            }
        }
        if let Some(i) = stray(&vec![POISON; out.len()], &out, |i| out_rows[i]) {
            outcome.fail(format!(
                "wrote beside the output, at element {} of it",
                i as i64 - GUARD as i64
            ));
        }
        if let Some(i) = stray(&vec![POISON_F32; lse.len()], &lse, |i| lse_rows[i]) {
            outcome.fail(format!(
                "wrote beside the LSE, at element {} of it",
                i as i64 - GUARD as i64
            ));
        }

        let tasks = self.sample(case, problem, rng);
        let states = in_parallel(&tasks, |(seq, head, rows)| {
            problem.reference(case, plan, *seq, *head, rows)
        });
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for ((_, _, rows), states) in tasks.iter().zip(&states) {
            for (&(token, head), state) in rows.iter().zip(states) {
                let at = out_at(token, head);
                ours.extend(out[at..at + case.head_dim].iter().map(|&x| decode(case.dtype, x)));
                theirs.extend(&state.out);
                if case.lse {
                    let ours = f32::from_bits(lse[lse_at(token, head)]);
                    let row = format_args!("token {token}, head {head}");
                    outcome.judge_lse(row, ours, state.lse);
                }
            }
        }
        let comparison = reference::compare(&ours, &theirs, case.head_dim, floor(case.dtype));
        outcome.judge("out", &comparison, &tolerance(case.dtype));
        Ok(())
    }

    /// Rows to compare, per sequence and KV head: all of them, or as many as the reference can afford,
    /// the first and the last query of every sequence among them.
    fn sample(&self, case: &Case, problem: &Problem, rng: &mut Rng) -> Vec<Task> {
        let work: usize = problem.seqs.iter().map(|&seq| case.work(seq)).sum();
        let percent = (100 * REFERENCE_WORK / work.max(1)) as u64;
        let mut tasks = Vec::new();
        for (s, seq) in problem.seqs.iter().enumerate() {
            let first = problem.qo_indptr[s] as usize;
            for head in 0..case.kv_heads {
                let mut rows = Vec::new();
                for token in first..first + seq.q_len {
                    let edge = token == first || token + 1 == first + seq.q_len;
                    for q_head in head * case.group..(head + 1) * case.group {
                        if edge || rng.chance(percent) {
                            rows.push((token, q_head));
                        }
                    }
                }
                tasks.push((s, head, rows));
            }
        }
        tasks
    }
}

/// Sequence, KV head, rows (query token, query head).
type Task = (usize, usize, Vec<(usize, usize)>);

/// The results of `work` on all items, in their order, on all cores.
pub fn in_parallel<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let results = Mutex::new(Vec::with_capacity(items.len()));
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(items.len());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let index = next.fetch_add(1, Ordering::Relaxed)
                    && let Some(item) = items.get(index)
                {
                    let result = work(item);
                    results.lock().unwrap_or_else(|e| e.into_inner()).push((index, result));
                }
            });
        }
    });
    let mut results = results.into_inner().unwrap_or_else(|e| e.into_inner());
    results.sort_by_key(|&(index, _)| index);
    results.into_iter().map(|(_, result)| result).collect()
}
