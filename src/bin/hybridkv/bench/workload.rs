//! The work that is timed: attention over a pool of many layers, moves of fragments at random addresses,
//! plain reads and the copy engines.

use hybridkv::abi::{self, hkv_copy, hkv_window};
use hybridkv::device::{Device, DeviceBuffer, PinnedBuffer, Span, StreamRef};
use hybridkv::error::{Error, Result};
use hybridkv::layout::{Dtype, KvShape, KvView};
use hybridkv::ops::{
    AttentionArgs, BlockTables, CtaQuota, HeadStrides, Kernels, MoveArgs, WindowTable,
};
use hybridkv::spec::AttentionKind::{self, Chunked, Full, Sliding};

use super::timing::Workload;
use crate::random::Rng;

const OP: &str = "bench";
/// Memory that is left alone.
const HEADROOM: u64 = 2 << 30;

/// The shape of an attention benchmark; bf16, head_dim 128.
#[derive(Debug, Clone, Copy)]
pub struct AttentionShape {
    /// How many sequences of how many tokens, the new ones included.
    pub batch: &'static [(usize, usize)],
    /// New tokens of each sequence.
    pub q_len: usize,
    /// Query and KV heads.
    pub heads: (usize, usize),
    /// What the layers' queries see.
    pub kind: AttentionKind,
    /// Tokens per block.
    pub block_size: usize,
}

const HEAD_DIM: usize = 128;

impl AttentionShape {
    /// First key that the query at `position` sees.
    fn first_key(&self, position: usize) -> usize {
        match self.kind {
            Full => 0,
            Sliding { window } => (position + 1).saturating_sub(window as usize),
            Chunked { chunk } => position / chunk as usize * chunk as usize,
        }
    }

    fn lengths(&self) -> impl Iterator<Item = usize> + '_ {
        self.batch.iter().flat_map(|&(count, kv_len)| std::iter::repeat_n(kv_len, count))
    }

    /// Tokens of a sequence that any of its queries sees.
    fn visible(&self, kv_len: usize) -> usize {
        kv_len - self.first_key(kv_len - self.q_len)
    }

    /// Bytes of K and V that one layer's attention has to read.
    pub fn bytes(&self) -> f64 {
        let tokens: usize = self.lengths().map(|kv_len| self.visible(kv_len)).sum();
        (tokens * self.heads.1 * HEAD_DIM * 2 * 2) as f64
    }

    /// Floating-point operations of one layer: 4 per visible (query, key) pair, query head and element.
    pub fn flops(&self) -> f64 {
        let of = |kv_len: usize| -> usize {
            (kv_len - self.q_len..kv_len).map(|i| i + 1 - self.first_key(i)).sum()
        };
        let pairs: usize = self.lengths().map(of).sum();
        4.0 * (pairs * self.heads.0 * HEAD_DIM) as f64
    }
}

/// Attention of a batch, each round over another layer of a pool in the native layout, blocks in random
/// order.
pub struct Attention<'a> {
    kernels: &'a Kernels,
    args: AttentionArgs,
    layers: usize,
    tokens: usize,
    out: DeviceBuffer,
    /// What `args` points to.
    _buffers: Vec<DeviceBuffer>,
}

impl<'a> Attention<'a> {
    /// Sets the work up; `None` when the device has too little memory for it.
    pub fn new(
        kernels: &'a Kernels,
        shape: &AttentionShape,
        rng: &mut Rng,
    ) -> Result<Option<Self>> {
        let device = kernels.device();
        let info = device.info();
        let block_size = shape.block_size;
        // Per sequence its first live block and how many follow.
        let live: Vec<(usize, usize)> = shape
            .lengths()
            .map(|kv_len| {
                let first = shape.first_key(kv_len - shape.q_len) / block_size;
                (first, kv_len.div_ceil(block_size) - first)
            })
            .collect();
        let blocks: usize = live.iter().map(|&(_, count)| count).sum();
        let layer_bytes = (blocks * block_size * shape.heads.1 * HEAD_DIM * 2 * 2) as u64;
        // All layers together are several times the L2 cache.
        let layers = (6 * info.l2_bytes).div_ceil(layer_bytes).clamp(2, 64);
        let room = (info.memory_bytes.saturating_sub(HEADROOM) / layer_bytes).min(layers) as usize;
        if room < 2 {
            return Ok(None);
        }
        let layers = room;

        let pool = random_memory(device, layers as u64 * layer_bytes, rng)?;
        let mut ids: Vec<i32> = (0..blocks as i32).collect();
        rng.shuffle(&mut ids);
        let mut rows = Vec::new();
        let mut next = 0i64;
        for &(_, count) in &live {
            rows.push(next);
            next += count as i64;
        }
        let (kind, extent) = match shape.kind {
            Full => (abi::HKV_LAYER_FULL, 0),
            Sliding { window } => (abi::HKV_LAYER_SLIDING, window),
            Chunked { chunk } => (abi::HKV_LAYER_CHUNKED, chunk),
        };
        let windows: Vec<hkv_window> = (0..layers)
            .map(|layer| hkv_window {
                kind: kind as i32,
                extent: extent as i32,
                sink_tokens: 0,
                group: 0,
                layer_slot: layer as i32,
                reserved: [0; 3],
            })
            .collect();
        let first_block: Vec<i32> = live.iter().map(|&(first, _)| first as i32).collect();
        let kv_len: Vec<i32> = shape.lengths().map(|kv_len| kv_len as i32).collect();
        let qo_indptr: Vec<i32> =
            (0..=kv_len.len()).map(|seq| (seq * shape.q_len) as i32).collect();
        let tokens = kv_len.len() * shape.q_len;
        let elements = tokens * shape.heads.0 * HEAD_DIM;
        let q: Vec<u16> =
            rng.normals(elements).map(|x| half::bf16::from_f32(x).to_bits()).collect();
        let strides = HeadStrides::contiguous(shape.heads.0 as u32, HEAD_DIM as u32);
        let buffers = [
            device.upload(&q)?,
            device.upload(&qo_indptr)?,
            device.upload(&kv_len)?,
            device.upload(&ids)?,
            device.upload(&rows)?,
            device.upload(&first_block)?,
            device.upload(&windows)?,
        ];
        let [q, qo_indptr, kv_len, ids, rows, first_block, windows] =
            [0, 1, 2, 3, 4, 5, 6].map(|i: usize| buffers[i].span());
        // NaN, so that a row that was not written shows.
        let out = device.upload(&vec![u16::MAX; elements])?;
        let mut args = AttentionArgs {
            q,
            q_strides: strides,
            out: out.span(),
            out_strides: strides,
            dtype: Dtype::Bf16,
            lse: None,
            kv: KvView::block_first(
                pool.span(),
                KvShape {
                    num_kv_heads: shape.heads.1 as u32,
                    head_dim: HEAD_DIM as u32,
                    dtype: Dtype::Bf16,
                },
                block_size as u32,
                layers as u32,
                blocks as u64,
                layers as u64 * layer_bytes / blocks as u64,
            )?,
            qo_indptr,
            kv_len,
            tables: BlockTables {
                block_ids: ids,
                block_row: rows,
                first_block: Some(first_block),
                num_groups: 1,
            },
            windows: WindowTable { rows: windows, num_layers: layers as u32 },
            layer: 0,
            sink_logits: None,
            tree_mask: None,
            num_qo_heads: shape.heads.0 as u32,
            num_seqs: live.len() as u32,
            num_tokens: tokens as u32,
            max_q_len: shape.q_len as u32,
            max_kv_len: shape.lengths().map(|kv_len| shape.visible(kv_len)).max().unwrap_or(0)
                as u32,
            sm_scale: 1.0 / (HEAD_DIM as f32).sqrt(),
            logits_soft_cap: 0.0,
            workspace: Span::default(),
        };
        let workspace = device.alloc(kernels.attention_workspace_bytes(&args)? as usize)?;
        args.workspace = workspace.span();
        let mut buffers = Vec::from(buffers);
        buffers.extend([pool, workspace]);
        Ok(Some(Self { kernels, args, layers, tokens, out, _buffers: buffers }))
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
                let row = out.len() / self.tokens;
                let message = format!("the output of token {} was not written", at / row);
                Err(Error::new(OP, hybridkv::ErrorKind::Corrupt(message)))
            }
        }
    }
}

impl Workload for Attention<'_> {
    fn rounds(&self) -> usize {
        self.layers
    }

    fn submit(&self, round: usize, stream: StreamRef<'_>) -> Result<()> {
        let args = AttentionArgs { layer: round as u32, ..self.args };
        // SAFETY: the buffers live as long as `self`, and `measure` waits before it returns.
        unsafe { self.kernels.attention(&args, stream) }
    }
}

/// Device memory full of random bf16 numbers of ordinary size: 32 MiB of them, repeated.
fn random_memory(device: &Device, bytes: u64, rng: &mut Rng) -> Result<DeviceBuffer> {
    let buffer = device.alloc(bytes as usize)?;
    let first = (bytes as usize).min(32 << 20);
    let numbers: Vec<u16> =
        rng.normals(first / 2).map(|x| half::bf16::from_f32(x).to_bits()).collect();
    let staging = device.upload(&numbers)?;
    let stream = device.stream()?;
    let mut filled = 0;
    while filled < bytes as usize {
        let count = (bytes as usize - filled).min(first);
        // SAFETY: both buffers live until the stream is synchronised below.
        unsafe {
            stream.as_ref().copy(staging.address(), buffer.address() + filled as u64, count)?
        };
        filled += count;
    }
    stream.as_ref().synchronize()?;
    Ok(buffer)
}

/// Where a move starts and ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Pinned host to device.
    H2d,
    /// Device to pinned host.
    D2h,
    /// Device to device.
    D2d,
}

impl Direction {
    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::H2d => "h2d",
            Self::D2h => "d2h",
            Self::D2d => "d2d",
        }
    }
}

/// Memory on both sides of the link, for all moves of a run.
pub struct Arenas {
    device: DeviceBuffer,
    host: PinnedBuffer,
}

impl Arenas {
    /// Arenas of `bytes` on the device and half as much on the host, filled with random bits.
    pub fn new(device: &Device, bytes: u64, rng: &mut Rng) -> Result<Self> {
        let arena = random_memory(device, bytes, rng)?;
        let mut host = device.alloc_pinned(bytes as usize / 2)?;
        for (i, word) in host.as_mut_slice().chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&(i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_ne_bytes());
        }
        Ok(Self { device: arena, host })
    }

    /// Bytes of each side of a move.
    pub fn side_bytes(&self) -> u64 {
        self.host.len() as u64
    }

    /// First address and length of the source and of the target of a move. The source of a move inside
    /// the device is its first half, the target its second.
    fn sides(&self, direction: Direction) -> (u64, u64, u64) {
        let (device, host) = (self.device.address(), self.host.address());
        let bytes = self.host.len() as u64;
        match direction {
            Direction::H2d => (host, device, bytes),
            Direction::D2h => (device, host, bytes),
            Direction::D2d => (device, device + bytes, bytes),
        }
    }
}

/// `move_blocks` of many fragments of one size, from random addresses to random addresses.
pub struct Move<'a> {
    kernels: &'a Kernels,
    tables: Vec<DeviceBuffer>,
    copies: u64,
    quota: CtaQuota,
    bytes: u64,
}

impl<'a> Move<'a> {
    /// Sets the work up: about `bytes` per round, in fragments no larger than a side of the arenas.
    pub fn new(
        kernels: &'a Kernels,
        arenas: &Arenas,
        direction: Direction,
        fragment: u64,
        bytes: u64,
        quota: CtaQuota,
        rng: &mut Rng,
    ) -> Result<Self> {
        let (source, target, length) = arenas.sides(direction);
        let places = length / fragment;
        let copies = (bytes / fragment).clamp(1, places);
        let tables = (0..2)
            .map(|_| {
                let mut places = |start: u64| -> Vec<u64> {
                    let mut order: Vec<u64> = (0..places).collect();
                    rng.shuffle(&mut order);
                    order[..copies as usize].iter().map(|i| start + i * fragment).collect()
                };
                let (from, to) = (places(source), places(target));
                let words: Vec<u64> =
                    from.iter().zip(&to).flat_map(|(&src, &dst)| [src, dst, fragment]).collect();
                debug_assert_eq!(words.len() * 8, from.len() * size_of::<hkv_copy>());
                kernels.device().upload(&words)
            })
            .collect::<Result<_>>()?;
        Ok(Self { kernels, tables, copies, quota, bytes: copies * fragment })
    }

    /// Bytes that one round moves.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Workload for Move<'_> {
    fn rounds(&self) -> usize {
        self.tables.len()
    }

    fn submit(&self, round: usize, stream: StreamRef<'_>) -> Result<()> {
        let args = MoveArgs {
            copies: self.tables[round].span(),
            num_copies: self.copies,
            quota: self.quota,
        };
        // SAFETY: the tables live as long as `self`, the arenas longer; `measure` waits before it returns.
        unsafe { self.kernels.move_blocks(&args, stream) }
    }
}

/// One large copy by the copy engines.
pub struct EngineCopy {
    source: u64,
    target: u64,
    bytes: u64,
}

impl EngineCopy {
    /// A copy of a whole side of the arenas.
    pub fn new(arenas: &Arenas, direction: Direction) -> Self {
        let (source, target, bytes) = arenas.sides(direction);
        Self { source, target, bytes }
    }

    /// Bytes of the copy.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Workload for EngineCopy {
    fn rounds(&self) -> usize {
        1
    }

    fn submit(&self, _round: usize, stream: StreamRef<'_>) -> Result<()> {
        // SAFETY: the arenas outlive the work; `measure` waits before it returns.
        unsafe { stream.copy(self.source, self.target, self.bytes as usize) }
    }

    fn in_graph(&self) -> bool {
        false
    }
}

/// Plain loads of all of a buffer.
pub struct Read<'a> {
    kernels: &'a Kernels,
    data: DeviceBuffer,
    checksum: DeviceBuffer,
}

impl<'a> Read<'a> {
    /// Sets the work up over `bytes` bytes.
    pub fn new(kernels: &'a Kernels, bytes: u64, rng: &mut Rng) -> Result<Self> {
        let data = random_memory(kernels.device(), bytes / 16 * 16, rng)?;
        let checksum = kernels.device().upload(&[0u32])?;
        Ok(Self { kernels, data, checksum })
    }

    /// Bytes that are read.
    pub fn bytes(&self) -> u64 {
        self.data.len() as u64
    }
}

impl Workload for Read<'_> {
    fn rounds(&self) -> usize {
        1
    }

    fn submit(&self, _round: usize, stream: StreamRef<'_>) -> Result<()> {
        // SAFETY: both buffers live as long as `self`; `measure` waits before it returns.
        unsafe { self.kernels.read_memory(self.data.span(), self.checksum.span(), stream) }
    }
}
