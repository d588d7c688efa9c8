//! `attention`: paged attention over a block table, for any kind of layer, decode and chunked prefill.
//!
//! Two kernels serve it. `attention_decode.cu` is for at most 16 query rows per KV head (query tokens times
//! query heads per KV head), `attention_prefill.cu` for more. Either may cut the visible keys of a query
//! into splits, so that few queries over many keys still fill the GPU; their partial states go through
//! the workspace and `merge_states`. Kernel and splits are chosen here from upper bounds; what a CTA really
//! does it computes on the device from the lengths and the window table, so that a captured launch
//! replays with other ones.

use super::{Kernel, Kernels, Loader, checks, cpu, merge};
use crate::abi::{self, hkv_attention_params, hkv_merge_params, hkv_window};
use crate::device::cuda::LaunchConfig;
use crate::device::{Span, StreamRef};
use crate::error::{Error, Result};
use crate::layout::{Dtype, KvShape, KvStrides, KvView};

const OP: &str = "attention";

/// Strides in elements of a `[token, head, head_dim]` tensor whose last dimension is contiguous.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadStrides {
    /// Between tokens.
    pub token: i64,
    /// Between heads.
    pub head: i64,
}

impl HeadStrides {
    /// Strides of a contiguous `[token, head, head_dim]` tensor.
    pub const fn contiguous(num_heads: u32, head_dim: u32) -> Self {
        Self { token: num_heads as i64 * head_dim as i64, head: head_dim as i64 }
    }

    /// Checks a `[tokens, heads, head_dim]` tensor of these strides: rows at multiples of 16 bytes, all of
    /// them inside of `span`.
    #[allow(clippy::too_many_arguments, reason = "the tensor's name, place, shape and type")]
    pub(super) fn check(
        &self,
        op: &'static str,
        what: &str,
        span: &Span,
        tokens: u32,
        heads: u32,
        head_dim: u32,
        dtype: Dtype,
    ) -> Result<()> {
        let row = 16 / dtype.bytes() as i64;
        for (name, stride) in [("token", self.token), ("head", self.head)] {
            if stride % row != 0 {
                return Err(Error::invalid(
                    op,
                    format!(
                        "{name} stride of {what}, {stride} elements, is no multiple of 16 bytes"
                    ),
                ));
            }
        }
        let last = |count: u32, stride: i64| {
            u64::try_from(stride).ok()?.checked_mul(u64::from(count.saturating_sub(1)))
        };
        let bytes = last(tokens, self.token)
            .and_then(|x| x.checked_add(last(heads, self.head)?))
            .and_then(|x| x.checked_add(u64::from(head_dim)))
            .and_then(|x| x.checked_mul(dtype.bytes() as u64))
            .ok_or_else(|| {
                Error::invalid(
                    op,
                    format!(
                        "the strides of {what} ({}, {}) are negative or overflow 64-bit addresses",
                        self.token, self.head
                    ),
                )
            })?;
        span.check(op, what, bytes, 16)
    }

    /// Checks that no two rows of a tensor that is written overlap.
    pub(super) fn check_disjoint(
        &self,
        op: &'static str,
        what: &str,
        tokens: u32,
        heads: u32,
        head_dim: u32,
    ) -> Result<()> {
        // One dimension lies inside of a step of the other, a row inside of the smaller step.
        let nested = |inner: i64, count: u32, outer: i64, outer_count: u32| {
            let row = i64::from(head_dim);
            let extent = inner.checked_mul(i64::from(count) - 1).and_then(|x| x.checked_add(row));
            (count < 2 || inner >= row) && (outer_count < 2 || extent.is_some_and(|x| x <= outer))
        };
        if nested(self.head, heads, self.token, tokens)
            || nested(self.token, tokens, self.head, heads)
        {
            return Ok(());
        }
        Err(Error::invalid(
            op,
            format!(
                "rows of {what} overlap: {tokens} tokens {} elements apart, {heads} heads {} apart, rows of {head_dim}",
                self.token, self.head
            ),
        ))
    }
}

/// The window table on the device: one [`hkv_window`] row per layer.
#[derive(Debug, Clone, Copy)]
pub struct WindowTable {
    /// `[num_layers]` rows of 32 bytes, on the device.
    pub rows: Span,
    /// Layers in the table.
    pub num_layers: u32,
}

impl WindowTable {
    /// Checks that the table holds a row for `layer`.
    pub(super) fn check(&self, op: &'static str, layer: u32) -> Result<()> {
        if layer >= self.num_layers {
            return Err(Error::invalid(
                op,
                format!(
                    "layer {layer} is outside of the window table of {} layers",
                    self.num_layers
                ),
            ));
        }
        let bytes = self.num_layers as u64 * size_of::<hkv_window>() as u64;
        self.rows.check(op, "the window table", bytes, 4)
    }
}

/// The block tables of a batch: one ragged row of block ids per (group, sequence).
///
/// Row `(g, s)` starts at `block_ids[block_row[g * num_seqs + s]]`: the sink blocks of the group, then
/// its live blocks from `first_block[g * num_seqs + s]` on.
#[derive(Debug, Clone, Copy)]
pub struct BlockTables {
    /// i32 block ids of all rows, on the device.
    pub block_ids: Span,
    /// `[num_groups, num_seqs]` i64 row starts, on the device.
    pub block_row: Span,
    /// `[num_groups, num_seqs]` i32 index of the first live block after the sinks; `None`: all 0.
    pub first_block: Option<Span>,
    /// Layer groups in the tables.
    pub num_groups: u32,
}

/// Arguments of [`Kernels::attention`](crate::ops::Kernels::attention).
#[derive(Debug, Clone, Copy)]
pub struct AttentionArgs {
    /// Queries, `[num_tokens, num_qo_heads, head_dim]`, of `dtype`.
    pub q: Span,
    /// Strides of `q`.
    pub q_strides: HeadStrides,
    /// Output, `[num_tokens, num_qo_heads, head_dim]`, of `dtype`.
    pub out: Span,
    /// Strides of `out`.
    pub out_strides: HeadStrides,
    /// Type of queries and output, bf16 or f16: the view's, where that has 16 bits.
    pub dtype: Dtype,
    /// Natural-log LSE, `[num_tokens, num_qo_heads]` f32, if wanted.
    pub lse: Option<Span>,
    /// Keys and values.
    pub kv: KvView,
    /// `[num_seqs + 1]` i32 on the device: query tokens of sequence `s` are `[s] .. [s + 1]`.
    pub qo_indptr: Span,
    /// `[num_seqs]` i32 on the device: tokens of each sequence, the new ones included.
    pub kv_len: Span,
    /// Block tables of the sequences.
    pub tables: BlockTables,
    /// The window table.
    pub windows: WindowTable,
    /// The layer to attend.
    pub layer: u32,
    /// Learned sink logits, `[num_qo_heads]` f32 on the device, if the model has them.
    pub sink_logits: Option<Span>,
    /// Which new tokens see which, `[num_tokens]` u32 on the device: bit `u` of word `t` says whether query
    /// token `t` sees query token `u` of its sequence (bit `t` is set), where the layer's kind lets it.
    /// Tokens before the new ones are seen as always. At most 32 query tokens per sequence; `None`: causal.
    pub tree_mask: Option<Span>,
    /// Query heads on this rank, a multiple of the KV heads.
    pub num_qo_heads: u32,
    /// Sequences.
    pub num_seqs: u32,
    /// Query tokens of all sequences (an upper bound for every replay of a graph).
    pub num_tokens: u32,
    /// Upper bound on the query tokens of one sequence: chooses the kernel.
    pub max_q_len: u32,
    /// Upper bound on the *visible* tokens of one sequence in this layer: chooses the number of splits.
    pub max_kv_len: u32,
    /// Factor of the logits, usually `1 / sqrt(head_dim)`; more than 0.
    pub sm_scale: f32,
    /// Soft cap of the logits; 0 for none.
    pub logits_soft_cap: f32,
    /// Scratch for partial states, at least
    /// [`attention_workspace_bytes`](crate::ops::Kernels::attention_workspace_bytes) long.
    pub workspace: Span,
}

/// Types of queries that the kernels are built for, in the order of the tables in [`Loaded`]. Keys and
/// values are of the same type or e4m3.
const DTYPES: [Dtype; 2] = [Dtype::Bf16, Dtype::F16];
/// Head dimensions that the kernels are built for, likewise.
const HEAD_DIMS: [u32; 3] = [64, 128, 256];

/// What the type of keys and values adds to a kernel's name: nothing where it is the queries'.
const KV_SUFFIXES: [&str; 2] = ["", "_e4m3"];

pub(super) struct Loaded {
    /// By type of the queries, whether KV is e4m3, head dimension and query rows (8, 16).
    decode: [[[[Kernel; 2]; 3]; 2]; 2],
    /// By type of the queries, whether KV is e4m3, and head dimension.
    prefill: [[[Kernel; 3]; 2]; 2],
}

impl Loaded {
    pub(super) fn load(loader: &mut Loader<'_>) -> Result<Self> {
        let none = Kernel { function: None };
        let mut loaded = Self { decode: [[[[none; 2]; 3]; 2]; 2], prefill: [[[none; 3]; 2]; 2] };
        let decode = loader.file("attention_decode")?;
        for (dtype, by_dtype) in DTYPES.iter().zip(&mut loaded.decode) {
            for (kv, by_kv) in KV_SUFFIXES.iter().zip(by_dtype) {
                for (dim, by_dim) in HEAD_DIMS.iter().zip(by_kv) {
                    for (rows, kernel) in [8, 16].iter().zip(by_dim) {
                        let dtype = dtype.name();
                        let name = format!("hkv_attention_decode_{dtype}{kv}_d{dim}_r{rows}");
                        *kernel = decode(&name, abi::HKV_DECODE_SHARED_BYTES)?;
                    }
                }
            }
        }
        drop(decode);
        let prefill = loader.file("attention_prefill")?;
        for (dtype, by_dtype) in DTYPES.iter().zip(&mut loaded.prefill) {
            for (kv, by_kv) in KV_SUFFIXES.iter().zip(by_dtype) {
                for (dim, kernel) in HEAD_DIMS.iter().zip(by_kv) {
                    let name = format!("hkv_attention_prefill_{}{kv}_d{dim}", dtype.name());
                    *kernel = prefill(&name, abi::HKV_PREFILL_SHARED_BYTES)?;
                }
            }
        }
        Ok(loaded)
    }
}

/// Which kernel, and how a batch is cut into CTAs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Plan {
    variant: Variant,
    /// Parts into which the visible keys of every query tile are cut.
    splits: u32,
    ctas: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Variant {
    /// At most 8 query rows per KV head.
    Decode8,
    /// At most 16.
    Decode16,
    Prefill,
}

/// CTAs of either kernel that share a multiprocessor.
const CTAS_PER_SM: u64 = 2;

impl Plan {
    fn new(args: &AttentionArgs, multiprocessors: u32) -> Self {
        let sms = u64::from(multiprocessors.max(1));
        let kv_heads = u64::from(args.kv.shape.num_kv_heads);
        let group = u64::from(args.num_qo_heads) / kv_heads;
        let rows = u64::from(args.max_q_len.max(1)) * group;
        if rows <= 16 {
            let variant = if rows <= 8 { Variant::Decode8 } else { Variant::Decode16 };
            let items = u64::from(args.num_seqs) * kv_heads;
            let splits = decode_splits(items, args.max_kv_len.into(), sms);
            return Self { variant, splits, ctas: items * u64::from(splits) };
        }
        // As in kernels/attention_prefill.cu: rows of a CTA; one tile more per sequence than rows fill.
        let tile_rows = if args.kv.shape.head_dim <= 128 { 128 } else { 64 };
        let all_rows = u64::from(args.num_tokens) * group;
        let tiles = all_rows / tile_rows + u64::from(args.num_seqs);
        let state_bytes = all_rows * kv_heads * state_bytes(args.kv.shape.head_dim);
        let splits = prefill_splits(
            all_rows.div_ceil(tile_rows).max(args.num_seqs.into()) * kv_heads,
            args.max_kv_len.into(),
            sms * CTAS_PER_SM,
            MAX_PREFILL_PARTIAL_BYTES / state_bytes.max(1),
        );
        Self { variant: Variant::Prefill, splits, ctas: tiles * kv_heads * u64::from(splits) }
    }
}

/// Splits of a decode batch of `items` (sequence, KV head) pairs.
///
/// A CTA streams keys at up to 50 GB/s (H100), so that one per multiprocessor saturates memory: fewer items
/// than that are split to fill the device, and no further, since partial states cost. With more items,
/// splits keep a long sequence among short ones from running alone at the end.
fn decode_splits(items: u64, max_kv_len: u64, sms: u64) -> u32 {
    /// Tokens below which a split costs more than it saves: two slices per warp.
    const MIN_TOKENS: u64 = 128;
    /// Tokens above which a CTA is cut even when there are enough of them.
    const MAX_TOKENS: u64 = 16384;
    /// CTAs above which length is no reason to cut.
    const MAX_CTAS: u64 = 4096;
    let splits = if items < sms {
        (sms / items).min(max_kv_len / MIN_TOKENS)
    } else {
        max_kv_len.div_ceil(MAX_TOKENS).min(MAX_CTAS / items)
    };
    splits.max(1) as u32
}

/// Bytes that the partial states of a prefill may take.
const MAX_PREFILL_PARTIAL_BYTES: u64 = 64 << 20;

/// Splits of a prefill of `items` (tile, KV head) pairs on `slots` CTAs at a time: what makes the waves of
/// CTAs end soonest, at most `max_splits`.
fn prefill_splits(items: u64, max_kv_len: u64, slots: u64, max_splits: u64) -> u32 {
    /// Keys of a tile.
    const TILE_KEYS: u64 = 64;
    /// What a CTA costs besides its tiles (start, partial state, merge), in tiles.
    const OVERHEAD_TILES: u64 = 4;
    /// Tiles below which a split is not worth it.
    const MIN_TILES: u64 = 4;
    let tiles = max_kv_len.div_ceil(TILE_KEYS);
    let most = (tiles / MIN_TILES).min(max_splits).clamp(1, 32);
    let cost =
        |splits: u64| (items * splits).div_ceil(slots) * (tiles.div_ceil(splits) + OVERHEAD_TILES);
    let best = (1..=most).map(cost).min().unwrap_or(0);
    // The fewest that come within 1/32 of the best: partial states are not free.
    (1..=most).find(|&splits| cost(splits) <= best + best / 32).unwrap_or(1) as u32
}

/// Query tokens of a sequence that a tree mask has bits for.
const MAX_TREE_TOKENS: u32 = 32;

/// Dynamic shared memory of a decode kernel of this many query rows, as in kernels/attention_decode.cu.
fn decode_shared_bytes(shape: &KvShape, rows: u32) -> u32 {
    if shape.dtype == Dtype::E4m3 && shape.head_dim * rows <= 1024 {
        abi::HKV_DECODE_NARROW_SHARED_BYTES
    } else {
        abi::HKV_DECODE_SHARED_BYTES
    }
}

/// Bytes of the partial state of a row: output and LSE in f32.
fn state_bytes(head_dim: u32) -> u64 {
    (u64::from(head_dim) + 1) * size_of::<f32>() as u64
}

impl Kernels {
    /// Bytes of workspace that [`attention`](Self::attention) needs for these arguments; 0 when no keys are
    /// split. Depends on shapes and bounds alone, not on addresses or on what lies there.
    ///
    /// # Errors
    /// As [`attention`](Self::attention) for shapes that are not supported.
    pub fn attention_workspace_bytes(&self, args: &AttentionArgs) -> Result<u64> {
        if args.num_tokens == 0 || args.num_seqs == 0 {
            return Ok(0);
        }
        args.check_shape()?;
        Ok(args.workspace_bytes(Plan::new(args, self.device.info().multiprocessors).splits))
    }

    /// Attends the queries of a batch to the keys that they see in one layer: `out` and, if wanted, `lse`.
    ///
    /// What a query sees is said in [`AttentionKind`](crate::spec::AttentionKind). A query that sees
    /// nothing gets 0 and an LSE of -inf (with sink logits, the sink itself). No tokens are a no-op. Rows
    /// of `out` past the last sequence's are left alone. `max_q_len` and `max_kv_len` only choose the way:
    /// longer sequences are slower, not wrong.
    ///
    /// # Errors
    /// `Unsupported` or `InvalidArgument` for anything the host can see: element type, head dimension,
    /// block size, head counts, alignment, strides or arrays that leave their buffers, rows of `out` that
    /// overlap, a layer outside of the window table, a workspace that is too small, a scale that is not
    /// positive.
    ///
    /// # Safety
    /// Until the stream has passed the launch, every span in `args` is device memory of that length; the
    /// window table names groups and layer slots inside of the tables and the view; `qo_indptr` rises from 0
    /// or more to at most `num_tokens`; every block row holds the blocks of all visible tokens, with ids
    /// inside of the view; nothing else accesses what is written, the workspace included, and nothing writes
    /// what is read.
    pub unsafe fn attention(&self, args: &AttentionArgs, stream: StreamRef<'_>) -> Result<()> {
        if args.num_tokens == 0 || args.num_seqs == 0 {
            return Ok(());
        }
        args.check()?;
        if args.tree_mask.is_some() && self.device.backend().as_cuda().is_some() {
            return Err(Error::unsupported(OP, "tree_mask", "on a GPU", "the CPU device"));
        }
        let plan = Plan::new(args, self.device.info().multiprocessors);
        args.workspace.check(OP, "the workspace", args.workspace_bytes(plan.splits), 16)?;
        let ctas = u32::try_from(plan.ctas).ok().filter(|&ctas| ctas <= i32::MAX as u32);
        let ctas = ctas.ok_or_else(|| {
            Error::unsupported(OP, "a batch of", format!("{} CTAs", plan.ctas), "up to 2^31 - 1")
        })?;
        if self.checked {
            // SAFETY: the caller's promise about the spans.
            unsafe { checks::attention(args, stream)? };
        }

        let (dtype, shape) = (args.dtype, args.kv.shape);
        let params = args.params(plan.splits);
        let by_dtype = usize::from(args.dtype == DTYPES[1]);
        let e4m3 = usize::from(shape.dtype == Dtype::E4m3);
        let dim = HEAD_DIMS.iter().position(|&dim| dim == shape.head_dim).unwrap_or_default();
        let (kernel, threads, shared) = match plan.variant {
            Variant::Prefill => (
                &self.attention.prefill[by_dtype][e4m3][dim],
                abi::HKV_PREFILL_THREADS,
                abi::HKV_PREFILL_SHARED_BYTES,
            ),
            decode => {
                let rows_16 = decode == Variant::Decode16;
                (
                    &self.attention.decode[by_dtype][e4m3][dim][usize::from(rows_16)],
                    abi::HKV_DECODE_THREADS,
                    decode_shared_bytes(&shape, if rows_16 { 16 } else { 8 }),
                )
            }
        };
        let config = LaunchConfig::linear(ctas, threads).with_shared(shared);
        // SAFETY: runs when the stream gets to it, while the caller's promise holds.
        let on_cpu =
            move |p: &_| unsafe { cpu::attention(p, dtype, shape.dtype, shape.head_dim as usize) };
        // SAFETY: the parameters are those of the kernel; memory is the caller's promise.
        unsafe { self.launch(kernel, config, &params, stream, on_cpu)? };
        if plan.splits == 1 {
            return Ok(());
        }
        let merge = args.merge_params(&params);
        // SAFETY: the partial states were written by the kernel before; the rest as above.
        unsafe { self.launch_merge(&merge, merge::Start::WithPredecessor, stream) }
    }
}

impl AttentionArgs {
    /// Bytes of the partial states of all rows, in `splits` parts: none when there is one.
    fn workspace_bytes(&self, splits: u32) -> u64 {
        let rows = u64::from(self.num_tokens) * u64::from(self.num_qo_heads);
        if splits == 1 { 0 } else { u64::from(splits) * rows * state_bytes(self.kv.shape.head_dim) }
    }

    /// Checks what chooses the kernel and sizes the workspace.
    fn check_shape(&self) -> Result<()> {
        let shape = &self.kv.shape;
        checks::dtypes(OP, "queries", self.dtype, shape.dtype)?;
        if self.tree_mask.is_some() && self.max_q_len > MAX_TREE_TOKENS {
            return Err(Error::unsupported(
                OP,
                "max_q_len with a tree mask",
                self.max_q_len,
                format!("up to {MAX_TREE_TOKENS}"),
            ));
        }
        if !HEAD_DIMS.contains(&shape.head_dim) {
            return Err(Error::unsupported(OP, "head_dim", shape.head_dim, "64, 128, 256"));
        }
        if shape.num_kv_heads == 0
            || self.num_qo_heads == 0
            || !self.num_qo_heads.is_multiple_of(shape.num_kv_heads)
        {
            return Err(Error::unsupported(
                OP,
                "num_qo_heads",
                format!("{} with {} KV heads", self.num_qo_heads, shape.num_kv_heads),
                "multiples of num_kv_heads, at least one of each",
            ));
        }
        // Kernels count packed query rows of a sequence in 32 bits.
        let most = i32::MAX as u32 / self.num_qo_heads;
        if self.num_tokens > most {
            return Err(Error::unsupported(
                OP,
                "num_tokens",
                self.num_tokens,
                format!("up to {most} with {} query heads", self.num_qo_heads),
            ));
        }
        for (what, value) in [("num_seqs", self.num_seqs), ("max_kv_len", self.max_kv_len)] {
            if value > i32::MAX as u32 {
                return Err(Error::unsupported(OP, what, value, "up to 2^31 - 1"));
            }
        }
        Ok(())
    }

    /// Checks everything the host can see, but for the workspace.
    fn check(&self) -> Result<()> {
        self.check_shape()?;
        let shape = &self.kv.shape;
        self.kv.check(OP)?;
        self.windows.check(OP, self.layer)?;
        for (name, span, strides) in
            [("q", &self.q, &self.q_strides), ("out", &self.out, &self.out_strides)]
        {
            let (tokens, heads) = (self.num_tokens, self.num_qo_heads);
            strides.check(OP, name, span, tokens, heads, shape.head_dim, self.dtype)?;
        }
        self.out_strides.check_disjoint(
            OP,
            "out",
            self.num_tokens,
            self.num_qo_heads,
            shape.head_dim,
        )?;
        if !(self.sm_scale > 0.0 && self.sm_scale.is_finite()) {
            return Err(Error::unsupported(OP, "sm_scale", self.sm_scale, "finite, more than 0"));
        }
        if !(self.logits_soft_cap >= 0.0 && self.logits_soft_cap.is_finite()) {
            return Err(Error::unsupported(
                OP,
                "logits_soft_cap",
                self.logits_soft_cap,
                "finite, 0 (none) or more",
            ));
        }
        let seqs = u64::from(self.num_seqs);
        let rows = u64::from(self.tables.num_groups) * seqs;
        if rows == 0 {
            return Err(Error::invalid(OP, "num_groups is 0"));
        }
        let states = u64::from(self.num_tokens) * u64::from(self.num_qo_heads);
        self.qo_indptr.check(OP, "qo_indptr", (seqs + 1) * 4, 4)?;
        self.kv_len.check(OP, "kv_len", seqs * 4, 4)?;
        self.tables.block_ids.check(OP, "block_ids", 0, 4)?;
        self.tables.block_row.check(OP, "block_row", rows * 8, 8)?;
        if let Some(first_block) = &self.tables.first_block {
            first_block.check(OP, "first_block", rows * 4, 4)?;
        }
        if let Some(lse) = &self.lse {
            lse.check(OP, "lse", states * 4, 4)?;
        }
        if let Some(mask) = &self.tree_mask {
            mask.check(OP, "tree_mask", u64::from(self.num_tokens) * 4, 4)?;
        }
        if let Some(sinks) = &self.sink_logits {
            sinks.check(OP, "sink_logits", u64::from(self.num_qo_heads) * 4, 4)?;
        }
        Ok(())
    }

    /// The parameter block; partial states lie in the workspace, outputs before LSE.
    fn params(&self, splits: u32) -> hkv_attention_params {
        let rows = u64::from(self.num_tokens) * u64::from(self.num_qo_heads);
        let outputs = u64::from(splits) * rows * u64::from(self.kv.shape.head_dim) * 4;
        let partial = |offset| if splits == 1 { 0 } else { self.workspace.address + offset };
        let address = |span: Option<Span>| span.map_or(0, |span| span.address);
        let strides = &self.kv.strides;
        let scales = self.kv.scales;
        let scale_strides = scales.map_or(KvStrides::NONE, |scales| scales.strides);
        hkv_attention_params {
            q: self.q.address as *const _,
            out: self.out.address as *mut _,
            lse: address(self.lse) as *mut _,
            k: self.kv.k.address as *const _,
            v: self.kv.v.address as *const _,
            qo_indptr: self.qo_indptr.address as *const _,
            kv_len: self.kv_len.address as *const _,
            block_ids: self.tables.block_ids.address as *const _,
            block_row: self.tables.block_row.address as *const _,
            first_block: address(self.tables.first_block) as *const _,
            windows: self.windows.rows.address as *const _,
            sink_logits: address(self.sink_logits) as *const _,
            k_scale: address(scales.map(|scales| scales.k)) as *const _,
            v_scale: address(scales.map(|scales| scales.v)) as *const _,
            tree_mask: address(self.tree_mask) as *const _,
            partial_out: partial(0) as *mut _,
            partial_lse: partial(outputs) as *mut _,
            q_stride_token: self.q_strides.token,
            q_stride_head: self.q_strides.head,
            out_stride_token: self.out_strides.token,
            out_stride_head: self.out_strides.head,
            kv_stride_block: strides.block,
            kv_stride_layer: strides.layer,
            kv_stride_head: strides.head,
            kv_stride_token: strides.token,
            scale_stride_block: scale_strides.block,
            scale_stride_layer: scale_strides.layer,
            scale_stride_head: scale_strides.head,
            scale_stride_token: scale_strides.token,
            layer: self.layer as i32,
            num_seqs: self.num_seqs as i32,
            num_tokens: self.num_tokens as i32,
            num_qo_heads: self.num_qo_heads as i32,
            num_kv_heads: self.kv.shape.num_kv_heads as i32,
            block_shift: self.kv.block_size.trailing_zeros() as i32,
            num_splits: splits as i32,
            sm_scale: self.sm_scale,
            logits_soft_cap: self.logits_soft_cap,
        }
    }

    /// How the partial states of `params` become the output.
    fn merge_params(&self, params: &hkv_attention_params) -> hkv_merge_params {
        let live_tokens = self.qo_indptr.address + u64::from(self.num_seqs) * 4;
        hkv_merge_params {
            states: params.partial_out as *const _,
            state_lse: params.partial_lse,
            out: params.out,
            lse: params.lse,
            sink_logits: params.sink_logits,
            live_tokens: live_tokens as *const _,
            out_stride_token: params.out_stride_token,
            out_stride_head: params.out_stride_head,
            num_states: params.num_splits,
            num_tokens: params.num_tokens,
            num_qo_heads: params.num_qo_heads,
            head_dim: self.kv.shape.head_dim as i32,
            in_dtype: Dtype::F32.code() as i32,
            out_dtype: self.dtype.code() as i32,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decode_splits_fill_the_device_without_crumbs() {
        // (items, keys) -> splits on 132 multiprocessors
        for (items, keys, splits) in [
            (512, 8192, 1),
            (8, 131_072, 16),
            (8, 1024, 8),
            (1, 8192, 64),
            (16, 32_768, 8),
            (1, 0, 1),
            (1, 10_485_760, 132),
            (2048, 1_048_576, 2),
            (1 << 20, 1 << 20, 1),
        ] {
            assert_eq!(decode_splits(items, keys, 132), splits, "{items} items of {keys} keys");
        }
    }

    #[test]
    fn prefill_splits_even_out_the_waves() {
        // (items, keys, most) -> splits on 264 CTAs at a time
        for (items, keys, most, splits) in [
            (2048, 8192, 64, 1),   // many waves: nothing to gain
            (64, 131_072, 64, 4),  // a short chunk over a long context fills the device
            (320, 131_072, 64, 4), // 1.2 waves take as long as 2, 4.8 as 5
            (320, 131_072, 3, 3),
            (8, 64, 64, 1),
        ] {
            let found = prefill_splits(items, keys, 264, most);
            assert_eq!(found, splits, "{items} items of {keys} keys, at most {most}");
        }
    }
}
