//! Planning to time: what a step pays before its first layer.

use hybridkv::device::{DeviceBuffer, Span, StreamRef};
use hybridkv::error::Result;
use hybridkv::layout::{KvStrides, KvView};
use hybridkv::ops::{AttentionArgs, BlockTables, HeadStrides, Kernels, PlanArgs, WindowTable};
use hybridkv::spec::ModelSpec;

use super::timing::Workload;

/// `plan` of a decode batch, for all window classes of a model.
pub struct Planning<'a> {
    kernels: &'a Kernels,
    classes: Vec<AttentionArgs>,
    plans: DeviceBuffer,
    /// What the arguments point to.
    _buffers: [DeviceBuffer; 3],
}

impl<'a> Planning<'a> {
    /// Sets the work up for sequences of these lengths, of one new token each.
    pub fn new(kernels: &'a Kernels, model: &ModelSpec, lengths: &[usize]) -> Result<Self> {
        let device = kernels.device();
        let groups = model.group(16)?;
        let kv_len: Vec<i32> = lengths.iter().map(|&kv_len| kv_len as i32).collect();
        let qo_indptr: Vec<i32> = (0..=lengths.len() as i32).collect();
        let buffers = [
            device.upload(&qo_indptr)?,
            device.upload(&kv_len)?,
            device.upload(&groups.window_table())?,
        ];
        let [qo_indptr, kv_len, windows] = [0, 1, 2].map(|i: usize| buffers[i].span());
        let none = Span::default();
        let class = |layer: u32| {
            let shape = model.layers[layer as usize].shape;
            let strides = HeadStrides::contiguous(model.num_qo_heads, shape.head_dim);
            AttentionArgs {
                q: none,
                q_strides: strides,
                out: none,
                out_strides: strides,
                lse: None,
                dtype: shape.dtype,
                kv: KvView {
                    k: none,
                    v: none,
                    strides: KvStrides::NONE,
                    shape,
                    block_size: 16,
                    num_blocks: 0,
                    num_layer_slots: 1,
                    scales: None,
                },
                sealed: None,
                qo_indptr,
                kv_len,
                tables: BlockTables {
                    block_ids: none,
                    block_row: none,
                    first_block: None,
                    num_groups: groups.groups.len() as u32,
                },
                windows: WindowTable { rows: windows, num_layers: model.layers.len() as u32 },
                layer,
                sink_logits: None,
                tree_mask: None,
                plan: None,
                num_qo_heads: model.num_qo_heads,
                num_seqs: lengths.len() as u32,
                num_tokens: lengths.len() as u32,
                max_q_len: 1,
                max_kv_len: lengths.iter().copied().max().unwrap_or(0) as u32,
                sm_scale: model.sm_scale,
                logits_soft_cap: 0.0,
                workspace: none,
            }
        };
        let classes: Vec<AttentionArgs> =
            groups.groups.iter().map(|group| class(group.layers[0])).collect();
        let args = PlanArgs { classes: &classes, batch_invariant: false, memory: none };
        let plans = device.alloc(kernels.plan_bytes(&args)? as usize)?;
        Ok(Self { kernels, classes, plans, _buffers: buffers })
    }
}

impl Workload for Planning<'_> {
    fn rounds(&self) -> usize {
        32
    }

    fn submit(&self, _round: usize, stream: StreamRef<'_>) -> Result<()> {
        let memory = self.plans.span();
        let args = PlanArgs { classes: &self.classes, batch_invariant: false, memory };
        // SAFETY: the buffers live as long as `self`, and `measure` waits before it returns.
        unsafe { self.kernels.plan(&args, stream) }
    }
}
