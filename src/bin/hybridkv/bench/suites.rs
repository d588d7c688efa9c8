//! The cases of the benchmarks, with their floors and goals.

use hybridkv::device::Device;
use hybridkv::error::Result;
use hybridkv::layout::{Dtype, KvShape};
use hybridkv::spec::AttentionKind::{self, Chunked, Full, Sliding};
use hybridkv::spec::{LayerSpec, ModelSpec};

use super::workload::Direction;

const K: usize = 1 << 10;
const M: usize = 1 << 20;
const TEN_MILLION: usize = 10_000_000;

/// The shape of one attention launch.
#[derive(Debug, Clone, Copy)]
pub struct AttentionShape {
    /// How many sequences of how many tokens, the new ones included.
    pub batch: &'static [(usize, usize)],
    /// New tokens of each sequence.
    pub q_len: usize,
    /// Query and KV heads.
    pub heads: (u32, u32),
    /// Elements of a head.
    pub head_dim: u32,
    /// What the queries see.
    pub kind: AttentionKind,
    /// Element type of K and V.
    pub kv: Dtype,
    /// Tokens per block.
    pub block_size: u32,
}

impl AttentionShape {
    /// A layer of this shape.
    pub fn layer(&self) -> LayerSpec {
        let shape = KvShape { num_kv_heads: self.heads.1, head_dim: self.head_dim, dtype: self.kv };
        LayerSpec { kind: self.kind, sink_tokens: 0, shape }
    }

    /// A model of `layers` such layers.
    pub fn model(&self, layers: usize) -> ModelSpec {
        ModelSpec {
            name: String::new(),
            layers: vec![self.layer(); layers],
            states: Vec::new(),
            num_qo_heads: self.heads.0,
            sm_scale: 1.0 / (self.head_dim as f32).sqrt(),
            logits_soft_cap: 0.0,
            sink_logits: false,
            max_model_len: TEN_MILLION as u32,
        }
    }

    /// Tokens of every sequence.
    pub fn lengths(&self) -> Vec<usize> {
        self.batch.iter().flat_map(|&(count, kv_len)| std::iter::repeat_n(kv_len, count)).collect()
    }

    /// Floating-point operations: 4 per visible (query, key) pair, query head and element.
    pub fn flops(&self) -> f64 {
        let seen = |i: usize| i - first_visible(self.kind, i) + 1;
        let of = |kv_len: usize| (kv_len - self.q_len..kv_len).map(seen).sum::<usize>();
        let pairs: usize = self.lengths().into_iter().map(of).sum();
        4.0 * pairs as f64 * f64::from(self.heads.0 * self.head_dim)
    }
}

/// First key that a query at `position` sees.
pub fn first_visible(kind: AttentionKind, position: usize) -> usize {
    match kind {
        Full => 0,
        Sliding { window } => (position + 1).saturating_sub(window as usize),
        Chunked { chunk } => position / chunk as usize * chunk as usize,
    }
}

/// What a case should reach, in the unit of its figure.
#[derive(Debug, Clone, Copy)]
pub enum Goal {
    /// No goal.
    None,
    /// A figure on an H100 SXM and one on an H200; infinite where there is none.
    On(f64, f64),
    /// So many times the figure of the case before it, in the same run.
    TimesTheLast(f64),
}

/// One attention case: a launch per round, every round on another layer.
#[derive(Debug, Clone, Copy)]
pub struct AttentionCase {
    /// What is launched.
    pub shape: AttentionShape,
    /// Whether the figure is TFLOP/s rather than microseconds.
    pub by_flops: bool,
    /// Least share of the measured read limit, or least TFLOP/s.
    floor: Option<f64>,
    goal: Goal,
}

impl AttentionCase {
    /// `<batch>x<context>[/W<window>|/C<chunk>][/q<new tokens>]/<q heads>-<kv heads>[/d<head_dim>]/<kv
    /// dtype>[/b<block size>]`, beginning with `mixed/` where it belongs to the mixed batch.
    pub fn name(&self) -> String {
        let shape = &self.shape;
        let part = |&(count, kv_len): &(usize, usize)| format!("{count}x{}", short(kv_len));
        let mut name = shape.batch.iter().map(part).collect::<Vec<_>>().join("+");
        if matches!(shape.batch, MIXED | EVEN) {
            name.insert_str(0, "mixed/");
        }
        match shape.kind {
            Full => {}
            Sliding { window } => name += &format!("/W{window}"),
            Chunked { chunk } => name += &format!("/C{chunk}"),
        }
        if shape.q_len > 1 {
            name += &format!("/q{}", shape.q_len);
        }
        name += &format!("/{}-{}", shape.heads.0, shape.heads.1);
        if shape.head_dim != 128 {
            name += &format!("/d{}", shape.head_dim);
        }
        name += "/";
        name += kv_name(shape.kv);
        if shape.block_size != 16 {
            name += &format!("/b{}", shape.block_size);
        }
        name
    }

    /// The shape to run on a device: on the CPU a tiny one.
    pub fn on(&self, device: &Device) -> AttentionShape {
        if device.is_cuda() {
            return self.shape;
        }
        let batch: &'static [(usize, usize)] = match self.shape.batch {
            [(1, _)] => &[(1, 40)],
            [_] => &[(2, 80)],
            _ => &[(1, 200), (2, 20)],
        };
        AttentionShape { batch, q_len: self.shape.q_len.min(40), ..self.shape }
    }

    /// The floor in the unit of the figure, for a read of `bytes` on a device that reads `read_limit` GB/s.
    pub fn floor_in_unit(&self, bytes: f64, read_limit: f64) -> Option<f64> {
        let floor = self.floor?;
        Some(if self.by_flops { floor } else { bytes / (floor * read_limit) / 1e3 })
    }

    /// The goal on this GPU, when the case before this one took `last`.
    pub fn goal(&self, device: &str, last: Option<f64>) -> Option<f64> {
        let goal = match self.goal {
            Goal::None => return None,
            Goal::On(_, h200) if device.contains("H200") => h200,
            Goal::On(h100, _) if device.contains("H100") => h100,
            Goal::On(..) => return None,
            Goal::TimesTheLast(times) => times * last?,
        };
        Some(goal).filter(|goal| goal.is_finite())
    }
}

/// The name of a KV type in cases: the only 8-bit float is just that.
fn kv_name(dtype: Dtype) -> &'static str {
    if dtype == Dtype::E4m3 { "fp8" } else { dtype.name() }
}

/// `8K`, `1M`, `6136`.
pub fn short(count: usize) -> String {
    match count {
        TEN_MILLION => "10M".to_owned(),
        0 => "0".to_owned(),
        _ if count.is_multiple_of(M) => format!("{}M", count / M),
        _ if count.is_multiple_of(K) => format!("{}K", count / K),
        _ => count.to_string(),
    }
}

const GQA: AttentionShape = AttentionShape {
    batch: &[],
    q_len: 1,
    heads: (32, 8),
    head_dim: 128,
    kind: Full,
    kv: Dtype::Bf16,
    block_size: 16,
};
/// A Llama-4-Scout layer on one of 8 ranks.
const SCOUT: AttentionShape = AttentionShape { heads: (5, 1), ..GQA };
const W1024: AttentionShape = AttentionShape { kind: Sliding { window: 1024 }, ..GQA };
const W8192: AttentionShape = AttentionShape { kind: Sliding { window: 8192 }, ..GQA };
const Q4: AttentionShape = AttentionShape { q_len: 4, ..GQA };

const fn fp8(shape: AttentionShape) -> AttentionShape {
    AttentionShape { kv: Dtype::E4m3, ..shape }
}

/// One long sequence among short ones, and the same tokens evenly spread.
const MIXED: &[(usize, usize)] = &[(1, M), (255, 2 * K)];
const EVEN: &[(usize, usize)] = &[(256, 6136)];

const fn decode(
    batch: &'static [(usize, usize)],
    shape: AttentionShape,
    floor: Option<f64>,
    goal: Goal,
) -> AttentionCase {
    let shape = AttentionShape { batch, ..shape };
    AttentionCase { shape, by_flops: false, floor, goal }
}

const fn prefill(
    kv_len: &'static [(usize, usize)],
    shape: AttentionShape,
    floor: Option<f64>,
    goal: f64,
) -> AttentionCase {
    let shape = AttentionShape { batch: kv_len, q_len: 8 * K, ..shape };
    AttentionCase { shape, by_flops: true, floor, goal: Goal::On(goal, goal) }
}

/// Decode: bound by the read of K and V, or by the launch.
#[rustfmt::skip]
pub const DECODE: &[AttentionCase] = &[
    decode(&[(64, 8 * K)], GQA, Some(0.75), Goal::On(706.0, 488.0)),
    decode(&[(1, 128 * K)], GQA, Some(0.60), Goal::On(180.0, 126.0)),
    decode(&[(1, TEN_MILLION)], SCOUT, None, Goal::On(1680.0, 1160.0)),
    decode(&[(16, 32 * K)], SCOUT, None, Goal::On(92.0, 65.0)),
    decode(&[(256, 8 * K)], W1024, None, Goal::On(355.0, 250.0)),
    decode(&[(64, 32 * K)], W8192, None, Goal::On(706.0, 488.0)),
    decode(&[(256, 512)], GQA, None, Goal::On(182.0, 128.0)),
    decode(&[(1, K)], GQA, None, Goal::On(7.0, 7.0)),
    decode(&[(1, 8 * K)], SCOUT, None, Goal::On(7.0, 7.0)),
    decode(&[(32, 8 * K)], Q4, None, Goal::On(356.0, 248.0)),
    decode(&[(64, 8 * K)], fp8(GQA), None, Goal::On(365.0, 255.0)),
    decode(&[(1, 128 * K)], fp8(GQA), None, Goal::On(95.0, 66.0)),
    decode(&[(1, TEN_MILLION)], fp8(SCOUT), None, Goal::On(860.0, 600.0)),
    decode(&[(16, 32 * K)], fp8(SCOUT), None, Goal::On(50.0, 36.0)),
    decode(&[(256, 8 * K)], fp8(W1024), None, Goal::On(180.0, 128.0)),
    decode(&[(64, 32 * K)], fp8(W8192), None, Goal::On(f64::INFINITY, 255.0)),
    decode(&[(256, 512)], fp8(GQA), None, Goal::On(95.0, 66.0)),
    decode(&[(1, K)], fp8(GQA), None, Goal::On(6.5, 6.5)),
    decode(&[(1, 8 * K)], fp8(SCOUT), None, Goal::On(6.5, 6.5)),
    decode(EVEN, GQA, None, Goal::None),
    decode(MIXED, GQA, None, Goal::TimesTheLast(1.05)),
];

/// The read of blocks in random order by the load path of decode, without its arithmetic.
#[derive(Debug, Clone, Copy)]
pub struct ReadCase {
    shape: AttentionShape,
    /// Shares of the read limit to reach on an H100 and on an H200.
    goal: (f64, f64),
}

impl ReadCase {
    /// `read_blocks/b<block size>[/<KV heads>][/<kv dtype>]`; one KV head and bf16 are left out.
    pub fn name(&self) -> String {
        let mut name = format!("read_blocks/b{}", self.shape.block_size);
        if self.shape.heads.1 > 1 {
            name += &format!("/{}", self.shape.heads.1);
        }
        if self.shape.kv != Dtype::Bf16 {
            name += &format!("/{}", kv_name(self.shape.kv));
        }
        name
    }

    /// The shape to run on a device: on the CPU a tiny one.
    pub fn on(&self, device: &Device) -> AttentionShape {
        let batch: &'static [(usize, usize)] = &[(1, 128)];
        if device.is_cuda() { self.shape } else { AttentionShape { batch, ..self.shape } }
    }

    /// The goal on this GPU, where the limit gives `limit` microseconds.
    pub fn goal(&self, device: &str, limit: f64) -> Option<f64> {
        let (h100, h200) = self.goal;
        let known = [("H200", h200), ("H100", h100)];
        known.iter().find(|(name, _)| device.contains(name)).map(|(_, share)| limit / share)
    }
}

const fn read(
    tokens: &'static [(usize, usize)],
    shape: AttentionShape,
    goal: (f64, f64),
) -> ReadCase {
    ReadCase { shape: AttentionShape { batch: tokens, ..shape }, goal }
}

/// A gigabyte each.
#[rustfmt::skip]
pub const READS: &[ReadCase] = &[
    read(&[(1, 2 * M)], SCOUT, (0.98, 0.97)),
    read(&[(1, 2 * M)], AttentionShape { block_size: 64, ..SCOUT }, (0.99, 0.985)),
    read(&[(1, M / 4)], GQA, (0.98, 0.97)),
    read(&[(1, M / 4)], AttentionShape { block_size: 64, ..GQA }, (0.99, 0.985)),
    read(&[(1, 4 * M)], fp8(SCOUT), (0.977, 0.963)),
];

/// Prefill: bound by the tensor cores.
#[rustfmt::skip]
pub const PREFILL: &[AttentionCase] = &[
    prefill(&[(1, 8 * K)], GQA, Some(250.0), 645.0),
    prefill(&[(1, 8 * K)], AttentionShape { block_size: 128, ..GQA }, None, 700.0),
    prefill(&[(1, 128 * K)], GQA, None, 640.0),
    prefill(&[(1, 128 * K)], AttentionShape { block_size: 128, ..GQA }, None, 670.0),
    prefill(&[(1, 128 * K)], SCOUT, None, 590.0),
    prefill(&[(1, 128 * K)], AttentionShape { kind: Sliding { window: 4096 }, ..GQA }, None, 580.0),
];

/// The attention of a whole decode step: every layer of a model, in one graph.
#[derive(Debug, Clone, Copy)]
pub struct StepCase {
    /// What the model is called in the case's name.
    label: &'static str,
    preset: &'static str,
    ranks: u32,
    kv: Dtype,
    /// How many sequences of how many tokens.
    batch: (usize, usize),
}

impl StepCase {
    /// `step/<model>/[<batch>x]<context>[/<kv dtype>]`; a batch of one sequence and bf16 are left out.
    pub fn name(&self) -> String {
        let (count, kv_len) = self.batch;
        let batch = if count == 1 { String::new() } else { format!("{count}x") };
        let kv =
            if self.kv == Dtype::Bf16 { String::new() } else { format!("/{}", kv_name(self.kv)) };
        format!("step/{}/{batch}{}{kv}", self.label, short(kv_len))
    }

    /// The model as one rank sees it.
    ///
    /// # Errors
    /// The preset or the number of ranks is wrong.
    pub fn model(&self) -> Result<ModelSpec> {
        let mut model = ModelSpec::preset(self.preset)?.shard(self.ranks)?;
        for layer in &mut model.layers {
            layer.shape.dtype = self.kv;
        }
        Ok(model)
    }

    /// Tokens of every sequence: on the CPU few.
    pub fn lengths(&self, device: &Device) -> Vec<usize> {
        let (count, kv_len) = self.batch;
        if device.is_cuda() { vec![kv_len; count] } else { vec![150; count.min(2)] }
    }
}

const fn step(
    label: &'static str,
    preset: &'static str,
    ranks: u32,
    kv: Dtype,
    batch: (usize, usize),
) -> StepCase {
    StepCase { label, preset, ranks, kv, batch }
}

/// Whole steps.
#[rustfmt::skip]
pub const STEPS: &[StepCase] = &[
    step("scout-tp8", "llama-4-scout", 8, Dtype::Bf16, (1, 32 * K)),
    step("scout-tp8", "llama-4-scout", 8, Dtype::Bf16, (1, 128 * K)),
    step("scout-tp8", "llama-4-scout", 8, Dtype::Bf16, (1, M)),
    step("scout-tp8", "llama-4-scout", 8, Dtype::Bf16, (1, 10 * M)),
    step("scout-tp8", "llama-4-scout", 8, Dtype::E4m3, (1, 10 * M)),
    step("gpt-oss", "gpt-oss-120b", 1, Dtype::Bf16, (1, 8 * K)),
    step("gpt-oss", "gpt-oss-120b", 1, Dtype::Bf16, (1, 128 * K)),
    step("gpt-oss", "gpt-oss-120b", 1, Dtype::Bf16, (64, 8 * K)),
];

/// Planning of a decode batch of two window classes, full and chunked.
#[derive(Debug, Clone, Copy)]
pub struct PlanCase {
    /// Sequences.
    pub seqs: usize,
    /// Microseconds on an H100 or H200.
    pub goal: Option<f64>,
}

impl PlanCase {
    /// `plan/<sequences>x<classes>`.
    pub fn name(&self) -> String {
        format!("plan/{}x2", self.seqs)
    }

    /// A Llama-4-Scout layer of either kind on one of 8 ranks.
    pub fn model(&self) -> ModelSpec {
        let kinds = [Full, Chunked { chunk: 8192 }];
        let layer = |kind| AttentionShape { kind, ..SCOUT }.layer();
        ModelSpec { layers: kinds.map(layer).to_vec(), ..SCOUT.model(0) }
    }

    /// Tokens of every sequence: one in 16 is long.
    pub fn lengths(&self) -> Vec<usize> {
        (0..self.seqs).map(|seq| if seq % 16 == 0 { 8 * K } else { 64 + seq % 64 }).collect()
    }
}

/// Planning.
pub const PLANS: &[PlanCase] =
    &[PlanCase { seqs: 256, goal: Some(4.0) }, PlanCase { seqs: 4096, goal: None }];

/// One size of fragments.
pub struct Fragment {
    /// Bytes.
    pub bytes: u64,
    label: &'static str,
    /// Least GB/s over the link, each way.
    pub floor: Option<f64>,
}

impl Fragment {
    /// GB/s over the link that are hard to beat on an H100 or H200.
    pub fn goal(&self, direction: Direction) -> Option<f64> {
        let of_link = if direction == Direction::H2d { 51.0 } else { 52.0 };
        match self.bytes {
            0..512 => None,
            512..1024 => Some(28.0),
            _ if self.label.starts_with("block") => Some(53.0),
            _ => Some(of_link),
        }
    }

    /// The name of the case: `h2d/4K`, `block96K/h2d`.
    pub fn case(&self, direction: Direction) -> String {
        match self.label.strip_prefix("block") {
            Some(_) => format!("{}/{}", self.label, direction.name()),
            None => format!("{}/{}", direction.name(), self.label),
        }
    }
}

const fn fragment(bytes: u64, label: &'static str, floor: Option<f64>) -> Fragment {
    Fragment { bytes, label, floor }
}

/// From a token's head to more than any block. 96 KiB is a block of Llama-4-Scout on one of 8 ranks.
pub const FRAGMENTS: &[Fragment] = &[
    fragment(256, "256", None),
    fragment(512, "512", None),
    fragment(1 << 10, "1K", None),
    fragment(4 << 10, "4K", Some(40.0)),
    fragment(16 << 10, "16K", None),
    fragment(64 << 10, "64K", None),
    fragment(96 << 10, "block96K", Some(45.0)),
    fragment(256 << 10, "256K", None),
    fragment(1 << 20, "1M", None),
];
