//! Attention over millions of tokens, large batches, and pools of more than 2^32 elements: the cases.

mod problem;

use hybridkv::error::Result;
use hybridkv::layout::Dtype;
use hybridkv::reference;
use hybridkv::spec::AttentionKind::{self, Chunked, Full, Sliding};

use super::bed::{Bed, Outcome};
use super::case::{Data, Scales, Seq};
use crate::random::Rng;
use problem::Problem;

/// One large case; `head_dim` is 128.
pub struct Case {
    name: &'static str,
    dtype: Dtype,
    /// Scales of e4m3 keys and values; `None`: they are of `dtype`.
    scales: Option<Scales>,
    heads: (usize, usize),
    block_size: usize,
    kind: AttentionKind,
    data: Data,
    /// Sequences: how many, new tokens, tokens.
    batch: &'static [(usize, usize, usize)],
    /// Whether blocks lie 16 MiB apart, over more than 2^32 elements.
    far: bool,
}

const DIM: usize = 128;
const K: usize = 1 << 10;
const M: usize = 1 << 20;
/// The longest sequence of Llama-4-Scout.
const SCOUT: usize = 10 * M;
/// Elements between blocks that lie far apart, and how many of them: 5.4 * 10^9 elements.
const FAR_STRIDE: usize = 8 * M;
const FAR_BLOCKS: usize = 640;

/// How many times shorter sequences are on the CPU device.
const SHRINK: usize = 256;

const PLAIN: Case = Case {
    name: "",
    dtype: Dtype::Bf16,
    scales: None,
    heads: (32, 8),
    block_size: 16,
    kind: Full,
    data: Data::Normal,
    batch: &[],
    far: false,
};

/// The large cases.
pub const CASES: &[Case] = &[
    Case { name: "1x1M/5-1/bf16", heads: (5, 1), batch: &[(1, 1, M)], ..PLAIN },
    Case {
        name: "1x10M/5-1/bf16 needle",
        heads: (5, 1),
        data: Data::Needle,
        batch: &[(1, 1, SCOUT)],
        ..PLAIN
    },
    Case {
        name: "1x10M/5-1/f16 equal",
        dtype: Dtype::F16,
        heads: (5, 1),
        data: Data::Equal,
        batch: &[(1, 1, SCOUT - 5)],
        ..PLAIN
    },
    Case {
        name: "1x10M/q4/5-1/bf16 needle",
        heads: (5, 1),
        data: Data::Needle,
        batch: &[(1, 4, SCOUT)],
        ..PLAIN
    },
    Case {
        name: "1x10M/W8192/5-1/bf16",
        heads: (5, 1),
        kind: Sliding { window: 8192 },
        batch: &[(1, 1, SCOUT - 3)],
        ..PLAIN
    },
    Case {
        name: "1x10M/C8192/q300/5-1/bf16",
        heads: (5, 1),
        kind: Chunked { chunk: 8192 },
        batch: &[(1, 300, SCOUT - 8192 * 7 + 100)],
        ..PLAIN
    },
    Case {
        name: "1x10M/5-1/bf16/e4m3 needle",
        scales: Some(Scales::Head),
        heads: (5, 1),
        data: Data::Needle,
        batch: &[(1, 1, SCOUT)],
        ..PLAIN
    },
    Case {
        name: "1x10M/5-1/f16/e4m3 per token equal",
        dtype: Dtype::F16,
        scales: Some(Scales::Token),
        heads: (5, 1),
        data: Data::Equal,
        batch: &[(1, 1, SCOUT - 5)],
        ..PLAIN
    },
    Case {
        name: "1x10M/q3/5-1/f16/e4m3 per token needle",
        dtype: Dtype::F16,
        scales: Some(Scales::Token),
        heads: (5, 1),
        data: Data::Needle,
        batch: &[(1, 3, SCOUT - 1)],
        ..PLAIN
    },
    Case {
        name: "1x10M/C8192/5-1/bf16/e4m3",
        scales: Some(Scales::Tensor),
        heads: (5, 1),
        kind: Chunked { chunk: 8192 },
        batch: &[(1, 1, SCOUT - 77)],
        ..PLAIN
    },
    Case {
        name: "64x8K/32-8/bf16/e4m3",
        scales: Some(Scales::Head),
        batch: &[(64, 1, 8 * K)],
        ..PLAIN
    },
    Case {
        name: "2x20K/q900/8-1/bf16/e4m3 per token far",
        scales: Some(Scales::Token),
        heads: (8, 1),
        batch: &[(2, 900, 20 * K)],
        far: true,
        ..PLAIN
    },
    Case { name: "64x8K/32-8/bf16", batch: &[(64, 1, 8 * K)], ..PLAIN },
    Case { name: "1x128K/32-8/f16", dtype: Dtype::F16, batch: &[(1, 1, 128 * K)], ..PLAIN },
    Case {
        name: "256x8K/W1024/32-8/bf16",
        kind: Sliding { window: 1024 },
        batch: &[(256, 1, 8 * K)],
        ..PLAIN
    },
    Case { name: "mixed/1x1M+255x2K/32-8/bf16", batch: &[(1, 1, M), (255, 1, 2 * K)], ..PLAIN },
    Case { name: "1x8K/q8192/32-8/bf16", batch: &[(1, 8 * K, 8 * K)], ..PLAIN },
    Case {
        name: "1x128K/q2048/5-1/bf16/b128 needle",
        heads: (5, 1),
        block_size: 128,
        data: Data::Needle,
        batch: &[(1, 2 * K, 128 * K)],
        ..PLAIN
    },
    Case {
        name: "3x64K/q5/16-2/bf16 far",
        heads: (16, 2),
        batch: &[(3, 5, 64 * K)],
        far: true,
        ..PLAIN
    },
    Case {
        name: "2x20K/q900/8-1/bf16 far",
        heads: (8, 1),
        batch: &[(2, 900, 20 * K)],
        far: true,
        ..PLAIN
    },
];

impl Case {
    /// The case's name, as it runs on this device; `None` when it does not fit.
    pub fn name(&self, bed: &Bed) -> Option<String> {
        let on_gpu = bed.device.is_cuda();
        if self.far && (!on_gpu || bed.device.info().memory_bytes < 24 << 30) {
            println!("skipped {}: it needs a GPU with 24 GiB", self.name);
            return None;
        }
        Some(if on_gpu {
            self.name.to_owned()
        } else {
            format!("{}, {SHRINK} times shorter", self.name)
        })
    }

    /// Runs the case.
    pub fn run(&self, bed: &Bed, rng: &mut Rng) -> Result<Outcome> {
        Problem::new(self, bed.device.is_cuda(), rng).run(bed, rng)
    }

    fn kv_dtype(&self) -> Dtype {
        if self.scales.is_some() { Dtype::E4m3 } else { self.dtype }
    }

    fn group(&self) -> usize {
        self.heads.0 / self.heads.1
    }

    fn sees(&self, position: usize, key: usize) -> bool {
        reference::sees(self.kind, 0, position as i64, key as i64)
    }

    /// The sequences; on the CPU device fewer and [`SHRINK`] times shorter.
    fn sequences(&self, on_gpu: bool) -> Vec<Seq> {
        let shrink = if on_gpu { 1 } else { SHRINK };
        let few = |n: usize| if on_gpu { n } else { n.min(3) };
        self.batch
            .iter()
            .flat_map(|&(count, q_len, kv_len)| {
                let seq = Seq { q_len: q_len.div_ceil(shrink), kv_len: kv_len.div_ceil(shrink) };
                std::iter::repeat_n(seq, few(count))
            })
            .collect()
    }
}
