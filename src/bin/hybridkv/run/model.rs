//! The stand-in for a model: per layer synthetic q, k and v, `append`, `attention`, for batches on the
//! device.

use std::sync::Arc;

use hybridkv::abi::HKV_PLAN_MAX_CLASSES;
use hybridkv::device::{Device, DeviceBuffer, Event, Span, StreamRef};
use hybridkv::engine::{Batch, Engine, SeqSlice};
use hybridkv::error::{Error, Result};
use hybridkv::layout::{Dtype, KvShape, KvView};
use hybridkv::ops::synthetic::{SyntheticArgs, splitmix64};
use hybridkv::ops::{AppendArgs, AttentionArgs, HeadStrides, Kernels, Plan, PlanArgs, WindowTable};
use hybridkv::spec::{AttentionKind, GroupPlan, ModelSpec};

use super::content::Content;

/// What the attention of one group's layers touches in a batch.
#[derive(Debug, Clone, Copy, Default)]
pub struct Reach {
    /// Keys that some query of a sequence sees, of the sequence that has most.
    pub max_kv_len: u32,
    /// The same, summed over the sequences.
    pub keys: u64,
    /// (query, visible key) pairs.
    pub pairs: u64,
}

impl Reach {
    /// The reach of a batch.
    pub fn of(kind: AttentionKind, sink_tokens: u32, seqs: &[SeqSlice]) -> Self {
        let mut reach = Self::default();
        for seq in seqs {
            let (start, end) = (seq.start as u64, (seq.start + seq.tokens) as u64);
            let skipped = kind.skipped(start);
            let keys = end - skipped + skipped.min(sink_tokens as u64);
            reach.max_kv_len = reach.max_kv_len.max(keys as u32);
            reach.keys += keys;
            for query in start..end {
                let skipped = kind.skipped(query);
                reach.pairs += query + 1 - skipped + skipped.min(sink_tokens as u64);
            }
        }
        reach
    }
}

/// Timed events around the attention of every layer.
pub struct LayerTimer {
    pairs: Vec<(Event, Event)>,
}

impl LayerTimer {
    pub fn new(device: &Device, layers: usize) -> Result<Self> {
        let pair = |_| Ok((device.timed_event()?, device.timed_event()?));
        Ok(Self { pairs: (0..layers).map(pair).collect::<Result<_>>()? })
    }

    /// Milliseconds in attention, over all layers. The step must have ended.
    pub fn total_ms(&self) -> Result<f64> {
        self.pairs.iter().map(|(start, end)| Ok(end.elapsed_ms_since(start)? as f64)).sum()
    }
}

/// Buffers and views of a model on one device.
pub struct Model {
    kernels: Arc<Kernels>,
    spec: ModelSpec,
    /// Layer group of each layer.
    groups: Vec<u32>,
    /// Type of queries, outputs and new keys and values.
    dtype: Dtype,
    /// Per group: a layer of it, and its view.
    first_layers: Vec<u32>,
    views: Vec<KvView>,
    /// What the views' shared scales lie in.
    _scales: Vec<DeviceBuffer>,
    windows: DeviceBuffer,
    distribution: DeviceBuffer,
    sink_logits: Option<DeviceBuffer>,
    q: DeviceBuffer,
    k_new: DeviceBuffer,
    v_new: DeviceBuffer,
    out: DeviceBuffer,
    workspace: DeviceBuffer,
    plans: DeviceBuffer,
}

impl Model {
    /// Buffers for batches of up to `max_tokens` tokens over the engine's pool.
    pub fn new(
        kernels: Arc<Kernels>,
        engine: &Engine,
        spec: &ModelSpec,
        plan: &GroupPlan,
        sink_logits: &[f32],
        content: &Content,
        max_tokens: usize,
    ) -> Result<Self> {
        let device = kernels.device().clone();
        let dtype = content.elements().dtype;
        let mut groups = vec![0; spec.layers.len()];
        for (g, group) in plan.groups.iter().enumerate() {
            for &layer in &group.layers {
                groups[layer as usize] = g as u32;
            }
        }
        let elements = |heads: &dyn Fn(usize) -> u32| {
            let most = (0..spec.layers.len())
                .map(|l| heads(l) as usize * spec.layers[l].shape.head_dim as usize)
                .max();
            most.unwrap_or(0).checked_mul(max_tokens * dtype.bytes()).ok_or_else(|| {
                Error::invalid("run", format!("{max_tokens} tokens per batch overflow"))
            })
        };
        let kv = elements(&|l| spec.layers[l].shape.num_kv_heads)?;
        let qo = elements(&|_| spec.num_qo_heads)?;
        let sink_logits = match sink_logits {
            [] => None,
            logits => Some(device.upload(logits)?),
        };
        let (mut views, mut scales) = (Vec::new(), Vec::new());
        for (group, native) in plan.groups.iter().zip(engine.kv_views(plan)?) {
            let (view, shared) = content.view(&device, group, native)?;
            views.push(view);
            scales.extend(shared);
        }
        Ok(Self {
            views,
            _scales: scales,
            dtype,
            windows: device.upload(&plan.window_table())?,
            distribution: device.upload(content.distribution().elements())?,
            sink_logits,
            q: device.alloc(qo)?,
            k_new: device.alloc(kv)?,
            v_new: device.alloc(kv)?,
            out: device.alloc(qo)?,
            workspace: device.alloc(0)?,
            plans: device.alloc(0)?,
            first_layers: plan.groups.iter().map(|group| group.layers[0]).collect(),
            groups,
            spec: spec.clone(),
            kernels,
        })
    }

    /// Submits every layer of one step. `reaches` is per group; `before_layer` gets every layer and its group, and
    /// may make `compute` wait for what the layer reads; `after_layer` gets every
    /// layer's output, `[num_tokens, num_qo_heads, head_dim]`, and may submit reads of it before the next
    /// layer overwrites it. The payload of the batch are the history hashes of its tokens.
    pub fn step(
        &mut self,
        batch: &Batch,
        reaches: &[Reach],
        timer: Option<&LayerTimer>,
        compute: StreamRef<'_>,
        before_layer: impl Fn(u32, usize) -> Result<()>,
        mut after_layer: impl FnMut(u32, Span) -> Result<()>,
    ) -> Result<()> {
        let num_layers = self.spec.layers.len() as u32;
        let plans = self.plan(batch, reaches, compute)?;
        for layer in 0..num_layers {
            let group = self.groups[layer as usize] as usize;
            before_layer(layer, group)?;
            let shape = self.spec.layers[layer as usize].shape;
            let kv_strides = HeadStrides::contiguous(shape.num_kv_heads, shape.head_dim);
            let synthetic = SyntheticArgs {
                hashes: batch.payload,
                distribution: self.distribution.span(),
                q: self.q.span(),
                k_new: self.k_new.span(),
                v_new: self.v_new.span(),
                shape: KvShape { dtype: self.dtype, ..shape },
                num_qo_heads: self.spec.num_qo_heads,
                layer,
                num_tokens: batch.num_tokens,
            };
            let append = AppendArgs {
                k_new: self.k_new.span(),
                v_new: self.v_new.span(),
                dtype: self.dtype,
                new_strides: kv_strides,
                kv: self.views[group],
                slot_mapping: batch.slot_mapping,
                num_groups: batch.tables.num_groups,
                windows: self.window_table(),
                layer,
                num_tokens: batch.num_tokens,
            };
            let mut attention = self.attention(batch, reaches, layer);
            // Attention follows `append`, which writes the keys and values of this step's tokens.
            attention.plan = plans[group].map(Plan::early);
            let needed = self.kernels.attention_workspace_bytes(&attention)? as usize;
            if needed > self.workspace.len() {
                // The old workspace goes once the device is done with it.
                self.workspace = self.kernels.device().alloc(needed.next_power_of_two())?;
                attention.workspace = self.workspace.span();
            }
            // SAFETY: the buffers live as long as `self` and hold the batch; tables and slots come from the
            // manager, so they name blocks of the pool, each written by one sequence; everything is
            // ordered by `compute`, and transfers are fenced behind it.
            unsafe {
                self.kernels.synthetic(&synthetic, compute)?;
                self.kernels.append(&append, compute)?;
                if let Some(timer) = timer {
                    compute.record(&timer.pairs[layer as usize].0)?;
                }
                self.kernels.attention(&attention, compute)?;
                if let Some(timer) = timer {
                    compute.record(&timer.pairs[layer as usize].1)?;
                }
            }
            after_layer(layer, self.out.span())?;
        }
        Ok(())
    }

    /// Submits the plan of the decode work of one step; gives each group's.
    fn plan(
        &mut self,
        batch: &Batch,
        reaches: &[Reach],
        compute: StreamRef<'_>,
    ) -> Result<Vec<Option<Plan>>> {
        let classes: Vec<AttentionArgs> =
            self.first_layers.iter().map(|&layer| self.attention(batch, reaches, layer)).collect();
        let plan_args = |classes, memory| PlanArgs { classes, batch_invariant: false, memory };
        let mut bytes = Vec::new();
        for classes in classes.chunks(HKV_PLAN_MAX_CLASSES as usize) {
            bytes.push(self.kernels.plan_bytes(&plan_args(classes, Span::default()))?);
        }
        let needed = bytes.iter().sum::<u64>() as usize;
        if needed > self.plans.len() {
            self.plans = self.kernels.device().alloc(needed.next_power_of_two())?;
        }
        let mut memory = self.plans.span();
        let mut plans = Vec::new();
        for (classes, bytes) in classes.chunks(HKV_PLAN_MAX_CLASSES as usize).zip(bytes) {
            let args = plan_args(classes, memory);
            // SAFETY: the batch and the memory live as long as attention's; `compute` orders everything.
            unsafe { self.kernels.plan(&args, compute)? };
            for class in 0..classes.len() {
                plans.push(self.kernels.planned(&args, class)?);
            }
            memory = Span::new(memory.address + bytes, memory.bytes - bytes);
        }
        Ok(plans)
    }

    fn window_table(&self) -> WindowTable {
        WindowTable { rows: self.windows.span(), num_layers: self.spec.layers.len() as u32 }
    }

    /// The arguments of attention in one layer, without a plan.
    fn attention(&self, batch: &Batch, reaches: &[Reach], layer: u32) -> AttentionArgs {
        let group = self.groups[layer as usize] as usize;
        let shape = self.spec.layers[layer as usize].shape;
        let strides = HeadStrides::contiguous(self.spec.num_qo_heads, shape.head_dim);
        AttentionArgs {
            q: self.q.span(),
            q_strides: strides,
            out: self.out.span(),
            out_strides: strides,
            dtype: self.dtype,
            lse: None,
            kv: self.views[group],
            sealed: None,
            qo_indptr: batch.qo_indptr,
            kv_len: batch.kv_len,
            tables: batch.tables,
            windows: self.window_table(),
            layer,
            sink_logits: self.sink_logits.as_ref().map(|logits| logits.span()),
            tree_mask: None,
            plan: None,
            num_qo_heads: self.spec.num_qo_heads,
            num_seqs: batch.num_seqs,
            num_tokens: batch.num_tokens,
            max_q_len: batch.max_q_len,
            max_kv_len: reaches[group].max_kv_len,
            sm_scale: self.spec.sm_scale,
            logits_soft_cap: self.spec.logits_soft_cap,
            workspace: self.workspace.span(),
        }
    }
}

/// Learned sink logits of a model that has them: fixed numbers between -2 and 2.
pub fn sink_logits(spec: &ModelSpec) -> Vec<f32> {
    let heads = if spec.sink_logits { spec.num_qo_heads } else { 0 };
    let logit = |head: u32| (splitmix64(head as u64) >> 40) as f32 / (1u64 << 22) as f32 - 2.0;
    (0..heads).map(logit).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reach_counts_what_the_predicate_sees() {
        let kinds = [
            AttentionKind::Full,
            AttentionKind::Sliding { window: 7 },
            AttentionKind::Chunked { chunk: 8 },
        ];
        for kind in kinds {
            for (start, tokens) in [(0, 1), (0, 20), (13, 5), (16, 1), (23, 1), (7, 2)] {
                for sinks in [0, 3] {
                    let seq = SeqSlice { seq: 0, start, tokens };
                    let reach = Reach::of(kind, sinks, &[seq, seq]);
                    let queries = start as u64..(start + tokens) as u64;
                    let sees = |i: u64, j: u64| j <= i && (kind.sees(i, j) || j < sinks as u64);
                    let pairs: usize =
                        queries.clone().map(|i| (0..=i).filter(|&j| sees(i, j)).count()).sum();
                    let keys =
                        (0..queries.end).filter(|&j| queries.clone().any(|i| sees(i, j))).count();
                    assert_eq!(reach.pairs, 2 * pairs as u64, "{kind:?} {seq:?} {sinks}");
                    assert_eq!(reach.keys, 2 * keys as u64, "{kind:?} {seq:?} {sinks}");
                    assert_eq!(reach.max_kv_len as usize, keys);
                }
            }
        }
    }
}
