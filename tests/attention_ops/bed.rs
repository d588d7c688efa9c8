//! Batches to attend: on the host, on a device, and what the reference makes of them.

use half::bf16;
use hybridkv::abi::{HKV_LAYER_CHUNKED, HKV_LAYER_FULL, HKV_LAYER_SLIDING, hkv_window};
use hybridkv::device::{Device, DeviceBuffer, Span};
use hybridkv::layout::{Dtype, KvShape, KvView};
use hybridkv::ops::{AttentionArgs, BlockTables, HeadStrides, Kernels, PlanArgs, WindowTable};
use hybridkv::reference::{self, Logits, State};
use hybridkv::spec::AttentionKind;

use super::common;

pub fn all_kernels() -> Vec<Kernels> {
    let cpus = [Device::cpu(), Device::cpu_deferred(5)];
    cpus.iter().chain(common::cuda()).map(|device| Kernels::load(device).unwrap()).collect()
}

pub const BLOCK: usize = 16;
pub const DIM: usize = 64;
pub const KV_HEADS: usize = 2;
pub const SCALE: f32 = 0.125;
pub const CAP: f32 = 30.0;

/// A batch on the host. Blocks are numbered backwards; slots that no query sees hold NaN.
pub struct Batch {
    /// (query tokens, tokens in all) of every sequence.
    pub seqs: Vec<(usize, usize)>,
    pub group: usize,
    pub kind: AttentionKind,
    pub sink_tokens: usize,
    pub sink_logits: bool,
}

impl Batch {
    pub fn tokens(&self) -> usize {
        self.seqs.iter().map(|s| s.0).sum()
    }

    pub fn heads(&self) -> usize {
        KV_HEADS * self.group
    }

    pub fn sees(&self, query: usize, key: usize) -> bool {
        reference::sees(self.kind, self.sink_tokens as u32, query as i64, key as i64)
    }

    /// Whether any query of the sequence sees the key.
    pub fn is_read(&self, (q_len, kv_len): (usize, usize), key: usize) -> bool {
        (kv_len - q_len..kv_len).any(|query| self.sees(query, key))
    }
}

/// Values around 0 with a standard deviation of about 1, exact in bf16; every index has its own.
pub fn value(tensor: u64, index: [usize; 4]) -> bf16 {
    let mut hash = tensor.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for i in index {
        hash = (hash ^ i as u64).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        hash ^= hash >> 29;
    }
    let halves = (0..4).map(|i| (hash >> (16 * i) & 0xffff) as f64 / 65536.0 - 0.5);
    bf16::from_f64(halves.sum::<f64>() * 3f64.sqrt())
}

/// The batch on a device, and what keeps it there.
pub struct Loaded {
    pub args: AttentionArgs,
    pub out: DeviceBuffer,
    pub lse: DeviceBuffer,
    pub _inputs: [DeviceBuffer; 8],
    pub workspace: DeviceBuffer,
    pub plan: Option<DeviceBuffer>,
}

/// How a batch is planned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Planned {
    /// Not at all.
    No,
    /// As it is.
    AsItIs,
    /// Every sequence by its own length.
    ByLength,
    /// For other lengths than it has.
    Stale,
}

impl Loaded {
    /// Plans the batch and gives it the workspace for that.
    pub fn plan(&mut self, kernels: &Kernels, planned: Planned) {
        if planned == Planned::No {
            return;
        }
        let device = kernels.device();
        let mut class = self.args;
        let seqs = class.num_seqs as usize;
        let other: Vec<i32> = (0..seqs).map(|seq| [70_000, 3, 9000, 0][seq % 4]).collect();
        let other = device.upload(&other).unwrap();
        if planned == Planned::Stale {
            class.kv_len = other.span();
        }
        let mut args = PlanArgs {
            classes: &[class],
            batch_invariant: planned == Planned::ByLength,
            memory: Span::default(),
        };
        let bytes = kernels.plan_bytes(&args).unwrap() as usize;
        // A plan writes all that attention reads.
        let memory = device.upload(&vec![u8::MAX; bytes]).unwrap();
        args.memory = memory.span();
        let stream = device.stream().unwrap();
        // SAFETY: the lengths and the memory outlive the synchronisation.
        unsafe { kernels.plan(&args, stream.as_ref()).unwrap() };
        stream.as_ref().synchronize().unwrap();
        self.args.plan = kernels.planned(&args, 0).unwrap();
        self.plan = Some(memory);
        let bytes = kernels.attention_workspace_bytes(&self.args).unwrap() as usize;
        self.workspace = device.upload(&vec![u8::MAX; bytes]).unwrap();
        self.args.workspace = self.workspace.span();
    }
}

pub fn load(batch: &Batch, kernels: &Kernels, bounds: Option<(u32, u32)>) -> Loaded {
    let device = kernels.device();
    let shape = KvShape { num_kv_heads: KV_HEADS as u32, head_dim: DIM as u32, dtype: Dtype::Bf16 };
    let num_blocks: usize = batch.seqs.iter().map(|s| s.1.div_ceil(BLOCK)).sum();
    let block = shape.token_bytes() / 2 * BLOCK;
    let mut pool = vec![bf16::NAN; num_blocks * block];
    let (mut ids, mut rows, mut indptr) = (Vec::new(), Vec::new(), vec![0i32]);
    let mut q = Vec::new();
    for (s, &(q_len, kv_len)) in batch.seqs.iter().enumerate() {
        rows.push(ids.len() as i64);
        for key in 0..kv_len {
            if key % BLOCK == 0 {
                ids.push((num_blocks - 1 - ids.len()) as i32);
            }
            if !batch.is_read((q_len, kv_len), key) {
                continue;
            }
            for (half, head, dim) in indices([2, KV_HEADS, DIM]) {
                let id = ids[ids.len() - 1] as usize;
                let at = ((half * KV_HEADS + head) * BLOCK + key % BLOCK) * DIM + dim;
                pool[id * block + at] = value(half as u64, [s, key, head, dim]);
            }
        }
        for (token, head, dim) in indices([q_len, batch.heads(), DIM]) {
            q.push(value(2, [s, token, head, dim]));
        }
        indptr.push(indptr[s] + q_len as i32);
    }
    let (kind, extent) = match batch.kind {
        AttentionKind::Full => (HKV_LAYER_FULL, 0),
        AttentionKind::Sliding { window } => (HKV_LAYER_SLIDING, window),
        AttentionKind::Chunked { chunk } => (HKV_LAYER_CHUNKED, chunk),
    };
    let window = hkv_window {
        kind: kind as i32,
        extent: extent as i32,
        sink_tokens: batch.sink_tokens as i32,
        group: 0,
        layer_slot: 0,
        reserved: [0; 3],
    };
    let bits = |values: &[bf16]| values.iter().map(|v| v.to_bits()).collect::<Vec<u16>>();
    let kv_len: Vec<i32> = batch.seqs.iter().map(|s| s.1 as i32).collect();
    let sinks: Vec<f32> = (0..batch.heads()).map(|h| h as f32 * 0.5 - 1.0).collect();
    let inputs = [
        device.upload(&bits(&pool)).unwrap(),
        device.upload(&bits(&q)).unwrap(),
        device.upload(&indptr).unwrap(),
        device.upload(&kv_len).unwrap(),
        device.upload(&ids).unwrap(),
        device.upload(&rows).unwrap(),
        device.upload(&[window]).unwrap(),
        device.upload(&sinks).unwrap(),
    ];
    let poison = vec![u16::MAX; q.len()];
    let out = device.upload(&poison).unwrap();
    let lse = device.upload(&vec![f32::NAN; batch.tokens() * batch.heads()]).unwrap();
    let span = |index: usize| inputs[index].span();
    let pool_stride = (block * 2) as u64;
    let strides = HeadStrides::contiguous(batch.heads() as u32, DIM as u32);
    let mut args = AttentionArgs {
        q: span(1),
        q_strides: strides,
        out: out.span(),
        out_strides: strides,
        dtype: shape.dtype,
        lse: Some(lse.span()),
        kv: KvView::block_first(span(0), shape, BLOCK as u32, 1, num_blocks as u64, pool_stride)
            .unwrap(),
        sealed: None,
        qo_indptr: span(2),
        kv_len: span(3),
        tables: BlockTables {
            block_ids: span(4),
            block_row: span(5),
            first_block: None,
            num_groups: 1,
        },
        windows: WindowTable { rows: span(6), num_layers: 1 },
        layer: 0,
        sink_logits: batch.sink_logits.then_some(span(7)),
        tree_mask: None,
        plan: None,
        num_qo_heads: batch.heads() as u32,
        num_seqs: batch.seqs.len() as u32,
        num_tokens: batch.tokens() as u32,
        max_q_len: batch.seqs.iter().map(|s| s.0).max().unwrap() as u32,
        max_kv_len: batch.seqs.iter().map(|s| s.1).max().unwrap() as u32,
        sm_scale: SCALE,
        logits_soft_cap: CAP,
        workspace: Span::default(),
    };
    if let Some((max_q_len, max_kv_len)) = bounds {
        (args.max_q_len, args.max_kv_len) = (max_q_len, max_kv_len);
    }
    let bytes = kernels.attention_workspace_bytes(&args).unwrap() as usize;
    let workspace = device.upload(&vec![u8::MAX; bytes]).unwrap();
    args.workspace = workspace.span();
    Loaded { args, out, lse, _inputs: inputs, workspace, plan: None }
}

/// Every index of a three-dimensional array, the last dimension fastest.
pub fn indices([a, b, c]: [usize; 3]) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..a * b * c).map(move |i| (i / (b * c), i / c % b, i % c))
}

/// Outputs and LSE of every (token, head) by the reference.
pub fn expected(batch: &Batch) -> Vec<State> {
    let mut states = Vec::new();
    for (s, &(q_len, kv_len)) in batch.seqs.iter().enumerate() {
        for (token, head) in (0..q_len).flat_map(|t| (0..batch.heads()).map(move |h| (t, h))) {
            let kv_head = head / batch.group;
            let row = |tensor: u64, at: usize, head: usize| -> Vec<f64> {
                (0..DIM).map(|dim| value(tensor, [s, at, head, dim]).to_f64()).collect()
            };
            let query = kv_len - q_len + token;
            let visible: Vec<usize> = (0..kv_len).filter(|&key| batch.sees(query, key)).collect();
            let all = |tensor| (0..kv_len).flat_map(|key| row(tensor, key, kv_head)).collect();
            let (keys, values): (Vec<f64>, Vec<f64>) = (all(0), all(1));
            let logits = Logits {
                sm_scale: SCALE.into(),
                soft_cap: CAP.into(),
                sink: batch.sink_logits.then_some(head as f64 * 0.5 - 1.0),
            };
            states.push(reference::attend(&row(2, token, head), &keys, &values, &visible, logits));
        }
    }
    states
}

pub fn example() -> Batch {
    Batch {
        seqs: vec![(1, 300), (1, 40)],
        group: 2,
        kind: AttentionKind::Full,
        sink_tokens: 0,
        sink_logits: true,
    }
}
