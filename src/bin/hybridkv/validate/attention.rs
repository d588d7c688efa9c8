//! `attention` against the reference: one case is a pool full of NaN in which only the visible tokens
//! hold data, a block table whose other entries are garbage, and outputs between guards.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use hybridkv::device::cuda::Graph;
use hybridkv::device::{DeviceBuffer, Span, StreamRef};
use hybridkv::error::Result;
use hybridkv::layout::{KvScales, KvShape, KvView};
use hybridkv::ops::{self, AttentionArgs, BlockTables, PlanArgs, SealedView, WindowTable};
use hybridkv::reference;
use hybridkv::spec::AttentionKind;

use super::bed::{
    Bed, Fault, GUARD, LSE_TOLERANCE, Outcome, POISON, POISON_F32, decode, floor, stray, tolerance,
};
use super::case::{Case, Planned};
use super::problem::{Common, GROUPS, Problem, row_index, tensor_elements};
use super::sealed;
use crate::random::Rng;

/// Multiplications that the reference spends on one batch; above that, rows are sampled.
const REFERENCE_WORK: usize = 200_000_000;

/// Runs a case.
pub fn run(bed: &Bed, case: &Case, rng: &mut Rng) -> Result<Outcome> {
    let common = Common::new(case, rng);
    let problems: Vec<Problem> = (case.batches.iter())
        .map(|batch| Problem::new(case, &common, batch, rng))
        .collect::<Result<_>>()?;
    let buffers = Buffers::new(bed, case, &common, &problems)?;
    let args = buffers.args(case, &common, &problems);
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
        buffers.fill(bed, case, &common, problem)?;
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
        buffers.check(case, &common, problem, rng, &mut outcome)?;
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
                let at = GUARD + row_index(common.out_strides, token, head);
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

fn plan_args(classes: &[AttentionArgs], planned: Planned, memory: Span) -> PlanArgs<'_> {
    PlanArgs { classes, batch_invariant: planned == Planned::ByLength, memory }
}

/// The arrays on the device, large enough for every batch of the case.
struct Buffers {
    q: DeviceBuffer,
    pool: DeviceBuffer,
    sealed: DeviceBuffer,
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
    fn new(bed: &Bed, case: &Case, common: &Common, problems: &[Problem]) -> Result<Self> {
        let most = |size: &dyn Fn(&Problem) -> usize| problems.iter().map(size).max().unwrap_or(0);
        let tokens = most(&|p| p.tokens());
        let sequences = problems.first().map_or(0, |p| p.seqs.len());
        let other_kv_len: Vec<i32> =
            (0..sequences).map(|seq| [90_000, 0, 1, 3000][seq % 4]).collect();
        let out = tensor_elements(case, common.out_strides, tokens) + 2 * GUARD;
        let mut buffers = Self {
            q: bed.room::<u16>(tensor_elements(case, common.q_strides, tokens))?,
            pool: bed.room::<u8>(common.pool.elements * case.kv_dtype().bytes())?,
            sealed: bed.room::<u8>(most(&|p| p.sealed.as_ref().map_or(0, |s| s.slots.len())))?,
            scales: [bed.room::<f32>(common.scales.1)?, bed.room::<f32>(common.scales.1)?],
            tree_mask: bed.room::<u32>(tokens)?,
            out: bed.room::<u16>(out)?,
            lse: bed.room::<u32>(tokens * case.qo_heads() + 2 * GUARD)?,
            block_ids: bed.room::<i32>(most(&|p| p.block_ids.len()))?,
            block_row: bed.room::<i64>(GROUPS * sequences)?,
            first_block: bed.room::<i32>(GROUPS * sequences)?,
            kv_len: bed.room::<i32>(sequences)?,
            qo_indptr: bed.room::<i32>(sequences + 1)?,
            windows: bed.device.upload(&common.windows)?,
            sink_logits: bed.device.upload(&common.sink_logits)?,
            workspace: bed.room::<u8>(0)?,
            other_kv_len: bed.device.upload(&other_kv_len)?,
            plans: bed.room::<u8>(0)?,
            plan: None,
            tokens,
        };
        if case.planned != Planned::No {
            let class = [buffers.class(&buffers.args(case, common, problems), case.planned)];
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
        let bytes = bed.kernels.attention_workspace_bytes(&buffers.args(case, common, problems))?;
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

    fn args(&self, case: &Case, common: &Common, problems: &[Problem]) -> AttentionArgs {
        let most = |size: &dyn Fn(&Problem) -> usize| -> u32 {
            problems.iter().map(size).max().unwrap_or(0) as u32
        };
        let visible = |p: &Problem| {
            let count = |needed: &Vec<bool>| needed.iter().filter(|&&n| n).count();
            p.needed.iter().map(count).max().unwrap_or(0)
        };
        let v_bytes = (common.pool.v_offset * case.kv_dtype().bytes()) as u64;
        let v = Span::new(self.pool.address() + v_bytes, self.pool.len() as u64 - v_bytes);
        let guarded = |buffer: &DeviceBuffer, element: u64| {
            let guard = GUARD as u64 * element;
            Span::new(buffer.address() + guard, buffer.len() as u64 - 2 * guard)
        };
        AttentionArgs {
            q: self.q.span(),
            q_strides: common.q_strides,
            out: guarded(&self.out, 2),
            out_strides: common.out_strides,
            dtype: case.dtype,
            lse: case.lse.then(|| guarded(&self.lse, 4)),
            kv: KvView {
                k: self.pool.span(),
                v,
                strides: common.pool.strides,
                shape: KvShape {
                    num_kv_heads: case.kv_heads as u32,
                    head_dim: case.head_dim as u32,
                    dtype: case.kv_dtype(),
                },
                block_size: case.block_size as u32,
                num_blocks: common.blocks as u64,
                num_layer_slots: case.layers as u32,
                scales: case.scales.map(|_| KvScales {
                    k: self.scales[0].span(),
                    v: self.scales[1].span(),
                    strides: common.scales.0,
                }),
            },
            sealed: self.sealed(common, problems),
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
                num_layers: common.windows.len() as u32,
            },
            layer: common.layer as u32,
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

    fn sealed(&self, common: &Common, problems: &[Problem]) -> Option<SealedView> {
        let sealed = problems.first()?.sealed.as_ref()?;
        Some(SealedView {
            slots: self.sealed.span(),
            num_slots: (self.sealed.len() / sealed.slot_bytes) as u64,
            slot_stride: sealed.slot_bytes as u64,
            codec: sealed.codec,
            geometry: sealed.geometry,
            layer: common.layer_slot as u32,
        })
    }

    /// Writes the batch's arrays, and the pattern that an output must replace.
    fn fill(&self, bed: &Bed, case: &Case, common: &Common, problem: &Problem) -> Result<()> {
        let mut windows = common.windows.clone();
        let mut pool = problem.pool.bytes().to_vec();
        let mut block_ids = problem.block_ids.clone();
        let mut kv_len = problem.kv_len.clone();
        let mut qo_indptr = problem.qo_indptr.clone();
        match bed.fault {
            Some(Fault::Window) if matches!(case.kind, AttentionKind::Sliding { window: 2.. }) => {
                windows[common.layer].extent -= 1;
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
                    let at = element * problem.key_index(case, common, 0, 0, token);
                    pool[at..at + element].fill(0xff);
                }
            }
            _ => {}
        }
        bed.write(&self.windows, &windows)?;
        bed.write(&self.pool, &pool)?;
        if let Some(sealed) = &problem.sealed {
            bed.write(&self.sealed, &sealed.slots)?;
        }
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
        common: &Common,
        problem: &Problem,
        rng: &mut Rng,
        outcome: &mut Outcome,
    ) -> Result<()> {
        let out: Vec<u16> = self.out.download()?;
        let lse: Vec<u32> = self.lse.download()?;
        let heads = case.qo_heads();
        let out_at = |token, head| GUARD + row_index(common.out_strides, token, head);
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

        let (allowed, lse_allowed) = match case.sealed {
            Some(_) => (sealed::tolerance(case.dtype), sealed::LSE_TOLERANCE),
            None => (tolerance(case.dtype), LSE_TOLERANCE),
        };
        let tasks = self.sample(case, problem, rng);
        let states = in_parallel(&tasks, |(seq, head, rows)| {
            problem.reference(case, common, *seq, *head, rows)
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
                    outcome.judge_lse(row, ours, state.lse, lse_allowed);
                }
            }
        }
        let comparison = reference::compare(&ours, &theirs, case.head_dim, floor(case.dtype));
        outcome.judge("out", &comparison, &allowed);
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
