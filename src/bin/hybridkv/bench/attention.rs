//! Attention to time: a batch over a pool of many layers in the native layout, blocks in random order.

use hybridkv::device::{DeviceBuffer, Span, StreamRef};
use hybridkv::error::{Error, ErrorKind, Result};
use hybridkv::layout::{Dtype, KvScales, KvStrides, KvView};
use hybridkv::ops::{
    AttentionArgs, BlockTables, HeadStrides, Kernels, Plan, PlanArgs, WindowTable,
};
use hybridkv::spec::{LayerGroup, ModelSpec};

use super::suites::{AttentionShape, first_visible};
use super::timing::Workload;
use super::workload::random_memory;
use crate::random::Rng;

const OP: &str = "bench";
/// Memory that is left alone.
const HEADROOM: u64 = 2 << 30;
/// Launches in a graph at least: a layer's time is what it takes among others.
const LAYERS_OF_A_STEP: usize = 16;

/// What is attended, and how often it is submitted.
pub struct Batch<'a> {
    /// The layers.
    pub model: &'a ModelSpec,
    /// Tokens of every sequence, the new ones included.
    pub lengths: &'a [usize],
    /// New tokens of each sequence.
    pub q_len: usize,
    /// Tokens per block.
    pub block_size: u32,
    /// Layers that one round submits, in order: 1, or all of them.
    pub layers_per_round: usize,
}

/// Blocks of a sequence that hold tokens which one of its queries sees in a group.
fn live_blocks(batch: &Batch<'_>, group: &LayerGroup, kv_len: usize) -> std::ops::Range<usize> {
    let size = group.block_size as usize;
    first_visible(group.kind, kv_len - batch.q_len) / size..kv_len.div_ceil(size)
}

impl<'a> Batch<'a> {
    /// A batch of this shape on a model of such layers, one of them per round.
    pub fn of(model: &'a ModelSpec, lengths: &'a [usize], shape: &AttentionShape) -> Self {
        let (q_len, block_size) = (shape.q_len, shape.block_size);
        Self { model, lengths, q_len, block_size, layers_per_round: 1 }
    }

    /// Tokens that some query sees in a layer, all sequences together.
    fn visible(&self, layer: usize) -> impl Iterator<Item = usize> {
        let kind = self.model.layers[layer].kind;
        self.lengths.iter().map(move |kv_len| kv_len - first_visible(kind, kv_len - self.q_len))
    }

    /// Bytes of K and V that a round has to read.
    pub fn bytes(&self) -> f64 {
        let of = |layer| {
            let tokens: usize = self.visible(layer).sum();
            tokens * self.model.layers[layer].shape.element_bytes()
        };
        (0..self.layers_per_round).map(of).sum::<usize>() as f64
    }
}

/// Layers enough that all of them together are several times the L2 cache, 2 at least.
pub fn layers_beyond_l2(layer_bytes: f64, l2_bytes: u64) -> usize {
    ((6 * l2_bytes) as f64 / layer_bytes).ceil().clamp(2.0, 64.0) as usize
}

/// The work itself.
pub struct Attention<'a> {
    kernels: &'a Kernels,
    /// One launch per layer.
    calls: Vec<AttentionArgs>,
    /// One layer of each group, and memory for their plans.
    classes: Vec<AttentionArgs>,
    plans: DeviceBuffer,
    layers_per_round: usize,
    /// One output per layer of a round.
    out: DeviceBuffer,
    pool: DeviceBuffer,
    /// What the arguments point to.
    _buffers: Vec<DeviceBuffer>,
}

impl<'a> Attention<'a> {
    /// Sets the work up; `None` when the device has too little memory for it.
    pub fn new(kernels: &'a Kernels, batch: &Batch<'_>, rng: &mut Rng) -> Result<Option<Self>> {
        let device = kernels.device();
        let model = batch.model;
        let plan = model.group(batch.block_size)?;
        let (layers, seqs) = (model.layers.len(), batch.lengths.len());
        let tokens = seqs * batch.q_len;

        // Rows of the block tables, group by group; a block serves one row.
        let (mut block_row, mut first_block, mut blocks) = (Vec::new(), Vec::new(), 0);
        for group in &plan.groups {
            for &kv_len in batch.lengths {
                let live = live_blocks(batch, group, kv_len);
                block_row.push(blocks as i64);
                first_block.push(live.start as i32);
                blocks += live.len();
            }
        }
        let pool_bytes = blocks as u64 * plan.block_bytes as u64;
        if pool_bytes > device.info().memory_bytes.saturating_sub(HEADROOM) {
            return Ok(None);
        }
        let mut block_ids: Vec<i32> = (0..blocks as i32).collect();
        rng.shuffle(&mut block_ids);

        let pool = random_memory(device, pool_bytes, model.layers[0].shape.dtype, rng)?;
        let head_dim = model.layers[0].shape.head_dim;
        let elements = tokens * (model.num_qo_heads * head_dim) as usize;
        let mut normals = |count: usize| rng.normals(count).collect::<Vec<f32>>();
        let q: Vec<u16> =
            normals(elements).iter().map(|&x| half::bf16::from_f32(x).to_bits()).collect();
        let sinks = normals(model.num_qo_heads as usize);
        let kv_len: Vec<i32> = batch.lengths.iter().map(|&kv_len| kv_len as i32).collect();
        let qo_indptr: Vec<i32> = (0..=seqs).map(|seq| (seq * batch.q_len) as i32).collect();
        let buffers = [
            device.upload(&q)?,
            device.upload(&qo_indptr)?,
            device.upload(&kv_len)?,
            device.upload(&block_ids)?,
            device.upload(&block_row)?,
            device.upload(&first_block)?,
            device.upload(&plan.window_table())?,
            device.upload(&sinks)?,
            device.upload(&[1.0f32])?,
        ];
        let [q, qo_indptr, kv_len, block_ids, block_row, first_block, windows, sinks, scale] =
            [0, 1, 2, 3, 4, 5, 6, 7, 8].map(|i: usize| buffers[i].span());
        // NaN, so that a row that was not written shows.
        let out = device.upload(&vec![u16::MAX; elements * batch.layers_per_round])?;
        let out_of = |layer: usize| {
            let bytes = 2 * elements as u64;
            let address = out.address() + (layer % batch.layers_per_round) as u64 * bytes;
            Span { address, bytes }
        };
        let strides = HeadStrides::contiguous(model.num_qo_heads, head_dim);
        let call = |(layer, group): (usize, &LayerGroup)| -> Result<AttentionArgs> {
            let mut kv = KvView::block_first(
                pool.span(),
                group.shape,
                group.block_size,
                group.layer_slots,
                blocks as u64,
                plan.block_bytes as u64,
            )?;
            if group.shape.dtype == Dtype::E4m3 {
                kv = kv.with_scales(KvScales { k: scale, v: scale, strides: KvStrides::NONE })?;
            }
            Ok(AttentionArgs {
                q,
                q_strides: strides,
                out: out_of(layer),
                out_strides: strides,
                lse: None,
                dtype: Dtype::Bf16,
                kv,
                sealed: None,
                qo_indptr,
                kv_len,
                tables: BlockTables {
                    block_ids,
                    block_row,
                    first_block: Some(first_block),
                    num_groups: plan.groups.len() as u32,
                },
                windows: WindowTable { rows: windows, num_layers: layers as u32 },
                layer: layer as u32,
                sink_logits: model.sink_logits.then_some(sinks),
                tree_mask: None,
                plan: None,
                num_qo_heads: model.num_qo_heads,
                num_seqs: seqs as u32,
                num_tokens: tokens as u32,
                max_q_len: batch.q_len as u32,
                max_kv_len: batch.visible(layer).max().unwrap_or(0) as u32,
                sm_scale: model.sm_scale,
                logits_soft_cap: model.logits_soft_cap,
                workspace: Span::default(),
            })
        };
        let mut groups: Vec<(usize, &LayerGroup)> = plan
            .groups
            .iter()
            .flat_map(|group| group.layers.iter().map(move |&layer| (layer as usize, group)))
            .collect();
        groups.sort_by_key(|&(layer, _)| layer);
        let mut calls = groups.into_iter().map(call).collect::<Result<Vec<_>>>()?;

        // Layers of a group are of one window class.
        let first = |group: &LayerGroup| calls[group.layers[0] as usize];
        let classes: Vec<AttentionArgs> = plan.groups.iter().map(first).collect();
        let mut plan_args =
            PlanArgs { classes: &classes, batch_invariant: false, memory: Span::default() };
        let plans = device.alloc(kernels.plan_bytes(&plan_args)? as usize)?;
        plan_args.memory = plans.span();
        for (class, group) in plan.groups.iter().enumerate() {
            let plan = kernels.planned(&plan_args, class)?;
            group.layers.iter().for_each(|&layer| calls[layer as usize].plan = plan);
        }
        let mut workspace_bytes = 0;
        for args in &calls {
            workspace_bytes = workspace_bytes.max(kernels.attention_workspace_bytes(args)?);
        }
        let workspace = device.alloc(workspace_bytes as usize)?;
        for args in &mut calls {
            args.workspace = workspace.span();
        }
        let mut buffers = Vec::from(buffers);
        buffers.push(workspace);
        let layers_per_round = batch.layers_per_round;
        let work =
            Self { kernels, calls, classes, plans, layers_per_round, out, pool, _buffers: buffers };
        let stream = device.stream()?;
        work.plan(stream.as_ref())?;
        stream.as_ref().synchronize()?;
        Ok(Some(work))
    }

    /// Submits the plan of the batch.
    fn plan(&self, stream: StreamRef<'_>) -> Result<()> {
        let memory = self.plans.span();
        let args = PlanArgs { classes: &self.classes, batch_invariant: false, memory };
        // SAFETY: the buffers live as long as `self`, and `measure` waits before it returns.
        unsafe { self.kernels.plan(&args, stream) }
    }

    /// Whether every element of the output was written, and with a number.
    ///
    /// # Errors
    /// `Corrupt` when not: what was timed was not attention.
    pub fn check(&self) -> Result<()> {
        let out: Vec<u16> = self.out.download()?;
        match out.iter().position(|&bits| !half::bf16::from_bits(bits).is_finite()) {
            None => Ok(()),
            Some(at) => {
                let message = format!("element {at} of the output was not written");
                Err(Error::new(OP, ErrorKind::Corrupt(message)))
            }
        }
    }
}

impl Workload for Attention<'_> {
    fn rounds(&self) -> usize {
        self.calls.len() / self.layers_per_round
    }

    fn submissions(&self) -> usize {
        if self.layers_per_round > 1 { self.rounds() } else { LAYERS_OF_A_STEP.max(self.rounds()) }
    }

    fn submit(&self, round: usize, stream: StreamRef<'_>) -> Result<()> {
        let calls = self.calls.chunks(self.layers_per_round).nth(round).unwrap_or_default();
        // A whole step begins with its plan. A single layer is one of many that share one.
        let whole_step = self.layers_per_round > 1;
        if whole_step {
            self.plan(stream)?;
        }
        for (index, args) in calls.iter().enumerate() {
            let follows_plan = whole_step && index == 0;
            let plan = args.plan.filter(|_| !follows_plan).map(Plan::early).or(args.plan);
            // SAFETY: the buffers live as long as `self`, and `measure` waits before it returns. Attention of
            // the layer before writes nothing that this one reads.
            unsafe { self.kernels.attention(&AttentionArgs { plan, ..*args }, stream)? };
        }
        Ok(())
    }
}

/// The reads of such work alone.
pub struct BlockReads<'a> {
    attention: Attention<'a>,
    checksum: DeviceBuffer,
}

impl<'a> BlockReads<'a> {
    /// Sets the work up; `None` when the device has too little memory for it.
    pub fn new(kernels: &'a Kernels, batch: &Batch<'_>, rng: &mut Rng) -> Result<Option<Self>> {
        let checksum = kernels.device().upload(&[0u32])?;
        let attention = Attention::new(kernels, batch, rng)?;
        Ok(attention.map(|attention| Self { attention, checksum }))
    }

    /// Whether a read of every layer reads every key and value of the pool, once. Every key must be seen, and
    /// the last block of every sequence be full.
    ///
    /// # Errors
    /// `Corrupt` when not: what was timed was not the read of all blocks.
    pub fn check(&self) -> Result<()> {
        let stream = self.attention.kernels.device().stream()?;
        let before = self.checksum.download::<u32>()?[0];
        for round in 0..self.rounds() {
            self.submit(round, stream.as_ref())?;
        }
        stream.as_ref().synchronize()?;
        let blocks = self.checksum.download::<u32>()?[0].wrapping_sub(before);
        let pool = self.words_of_pool(stream.as_ref())?;
        if blocks == pool {
            return Ok(());
        }
        let message = format!(
            "the words of all blocks add up to {blocks:#x}, those of the pool to {pool:#x}"
        );
        Err(Error::new(OP, ErrorKind::Corrupt(message)))
    }

    /// The sum of the words of all keys and values in the pool.
    fn words_of_pool(&self, stream: StreamRef<'_>) -> Result<u32> {
        let Attention { kernels, calls, pool, .. } = &self.attention;
        let kv = &calls[0].kv;
        let slot_words = kv.shape.token_bytes() * kv.block_size as usize / 4;
        let element_words = kv.shape.element_bytes() * kv.block_size as usize / 4;
        if slot_words == element_words {
            let sum = kernels.device().upload(&[0u32])?;
            // SAFETY: both buffers live until the stream is synchronised.
            unsafe { kernels.read_memory(pool.span(), sum.span(), stream)? };
            stream.synchronize()?;
            return Ok(sum.download::<u32>()?[0]);
        }
        // Layer slots of 8-bit elements end with room for scales.
        let words = pool.download::<u32>()?;
        let elements = words.chunks(slot_words).flat_map(|slot| &slot[..element_words]);
        Ok(elements.fold(0, |sum, &word| sum.wrapping_add(word)))
    }
}

impl Workload for BlockReads<'_> {
    fn rounds(&self) -> usize {
        self.attention.calls.len()
    }

    fn submissions(&self) -> usize {
        LAYERS_OF_A_STEP.max(self.rounds())
    }

    fn submit(&self, round: usize, stream: StreamRef<'_>) -> Result<()> {
        let args = self.attention.calls[round];
        let args = AttentionArgs { plan: args.plan.map(Plan::early), ..args };
        // SAFETY: the buffers live as long as `self`, and `measure` waits before it returns. The launch before
        // writes nothing but the checksum, which is added to by atomics.
        unsafe { self.attention.kernels.read_blocks(&args, self.checksum.span(), stream) }
    }
}
