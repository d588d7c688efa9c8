//! The cases of the benchmarks, with their floors and goals.

use hybridkv::device::Device;
use hybridkv::spec::AttentionKind::{Full, Sliding};

use super::workload::{AttentionShape, Direction};

/// One attention case.
pub struct AttentionCase {
    /// `<batch>x<context>[/W<window>][/q<new tokens>]/<q heads>-<kv heads>/<dtype>[/b<block size>]`.
    pub name: &'static str,
    shape: AttentionShape,
    /// Whether the figure is TFLOP/s rather than microseconds.
    pub by_flops: bool,
    /// Least share of the measured read limit, or least TFLOP/s.
    floor: Option<f64>,
    /// Goals on an H100 SXM and on an H200, in the unit of the figure.
    goals: Option<(f64, f64)>,
}

impl AttentionCase {
    /// The shape to run on a device: on the CPU only tiny ones.
    pub fn on(&self, device: &Device) -> Option<AttentionShape> {
        if device.is_cuda() {
            return Some(self.shape);
        }
        // Four of the cases, a hundredth as long.
        let batch: &'static [(usize, usize)] = match self.name {
            "64x8K/32-8/bf16" => &[(2, 80)],
            "1x8K/5-1/bf16" | "1x1K/32-8/bf16" => &[(1, 40)],
            "1x8K/q8192/32-8/bf16" => &[(1, 80)],
            _ => return None,
        };
        Some(AttentionShape { batch, q_len: self.shape.q_len.min(40), ..self.shape })
    }

    /// The floor in the unit of the figure.
    pub fn floor_in_unit(&self, bytes: f64, read_limit: f64) -> Option<f64> {
        let floor = self.floor?;
        Some(if self.by_flops { floor } else { bytes / (floor * read_limit) / 1e3 })
    }

    /// The goal on this GPU.
    pub fn goal(&self, device: &str) -> Option<f64> {
        let (h100, h200) = self.goals?;
        if device.contains("H200") {
            Some(h200)
        } else if device.contains("H100") {
            Some(h100)
        } else {
            None
        }
    }
}

const K: usize = 1 << 10;
const M: usize = 1 << 20;

const GQA: AttentionShape =
    AttentionShape { batch: &[], q_len: 1, heads: (32, 8), kind: Full, block_size: 16 };
/// A Llama-4-Scout layer on one of 8 ranks.
const SCOUT: AttentionShape = AttentionShape { heads: (5, 1), ..GQA };

const fn decode(
    name: &'static str,
    shape: AttentionShape,
    floor: Option<f64>,
    goals: Option<(f64, f64)>,
) -> AttentionCase {
    AttentionCase { name, shape, by_flops: false, floor, goals }
}

const fn prefill(
    name: &'static str,
    shape: AttentionShape,
    floor: Option<f64>,
    goal: f64,
) -> AttentionCase {
    let shape = AttentionShape { q_len: 8 * K, ..shape };
    AttentionCase { name, shape, by_flops: true, floor, goals: Some((goal, goal)) }
}

/// Decode: bound by the read of K and V, or by the launch.
#[rustfmt::skip]
pub const DECODE: &[AttentionCase] = &[
    decode("64x8K/32-8/bf16", AttentionShape { batch: &[(64, 8 * K)], ..GQA }, Some(0.75), Some((706.0, 488.0))),
    decode("1x128K/32-8/bf16", AttentionShape { batch: &[(1, 128 * K)], ..GQA }, Some(0.60), Some((180.0, 126.0))),
    decode("1x10M/5-1/bf16", AttentionShape { batch: &[(1, 10_000_000)], ..SCOUT }, None, Some((1680.0, 1160.0))),
    decode("16x32K/5-1/bf16", AttentionShape { batch: &[(16, 32 * K)], ..SCOUT }, None, Some((92.0, 65.0))),
    decode("256x8K/W1024/32-8/bf16", AttentionShape { batch: &[(256, 8 * K)], kind: Sliding { window: 1024 }, ..GQA }, None, Some((355.0, 250.0))),
    decode("64x32K/W8192/32-8/bf16", AttentionShape { batch: &[(64, 32 * K)], kind: Sliding { window: 8192 }, ..GQA }, None, Some((706.0, 488.0))),
    decode("256x512/32-8/bf16", AttentionShape { batch: &[(256, 512)], ..GQA }, None, Some((182.0, 128.0))),
    decode("1x1K/32-8/bf16", AttentionShape { batch: &[(1, K)], ..GQA }, None, Some((7.0, 7.0))),
    decode("1x8K/5-1/bf16", AttentionShape { batch: &[(1, 8 * K)], ..SCOUT }, None, Some((7.0, 7.0))),
    decode("32x8K/q4/32-8/bf16", AttentionShape { batch: &[(32, 8 * K)], q_len: 4, ..GQA }, None, Some((356.0, 248.0))),
    decode("mixed/1x1M+255x2K/32-8/bf16", AttentionShape { batch: &[(1, M), (255, 2 * K)], ..GQA }, None, None),
];

/// Prefill: bound by the tensor cores.
#[rustfmt::skip]
pub const PREFILL: &[AttentionCase] = &[
    prefill("1x8K/q8192/32-8/bf16", AttentionShape { batch: &[(1, 8 * K)], ..GQA }, Some(250.0), 645.0),
    prefill("1x8K/q8192/32-8/bf16/b128", AttentionShape { batch: &[(1, 8 * K)], block_size: 128, ..GQA }, None, 700.0),
    prefill("1x128K/q8192/32-8/bf16", AttentionShape { batch: &[(1, 128 * K)], ..GQA }, None, 640.0),
    prefill("1x128K/q8192/32-8/bf16/b128", AttentionShape { batch: &[(1, 128 * K)], block_size: 128, ..GQA }, None, 670.0),
    prefill("1x128K/q8192/5-1/bf16", AttentionShape { batch: &[(1, 128 * K)], ..SCOUT }, None, 590.0),
    prefill("1x128K/W4096/q8192/32-8/bf16", AttentionShape { batch: &[(1, 128 * K)], kind: Sliding { window: 4096 }, ..GQA }, None, 580.0),
];

/// One size of fragments.
pub struct Fragment {
    /// Bytes.
    pub bytes: u64,
    label: &'static str,
    /// Least GB/s over the link, each way.
    pub floor: Option<f64>,
}

impl Fragment {
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
