//! `attention`: paged attention over a block table, for any kind of layer, decode and chunked prefill.
//!
//! Three kernels serve it. `attention_decode.cu` is for at most 16 query rows per KV head (query tokens times
//! query heads per KV head; 8 of 256 dimensions), `attention_prefill.cu` for more;
//! `attention_decode_sealed.cu` is decode where blocks lie sealed beside others. Few queries over many keys fill the GPU all
//! the same: decode cuts sequences into parts as a [`Plan`] says and merges them itself, prefill cuts the keys
//! of every query tile into splits, whose partial states go through the workspace and `merge_states`. Kernel
//! and CTAs are chosen here from upper bounds ([`split`]); what a CTA really does it computes on the device
//! from the lengths and the window table, so that a captured launch replays with other ones.

use super::split::{self, Bounds, Variant, WorkList};
use super::strides::HeadStrides;
use super::{Kernel, Kernels, Loader, Plan, checks, cpu, merge};
use crate::abi::{self, hkv_attention_params, hkv_merge_params, hkv_window};
use crate::codec::{Codec, Geometry, LayerPlaces};
use crate::device::cuda::LaunchConfig;
use crate::device::{DeviceInfo, Span, StreamRef};
use crate::error::{Error, Result};
use crate::layout::{Dtype, KvStrides, KvView};

const OP: &str = "attention";

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

/// The bit of a block id in a block table that makes the rest of it the number of a slot of [`SealedView`].
pub const SEALED_BLOCK: i32 = abi::HKV_SEALED_BLOCK as i32;

/// One layer of sealed blocks: full blocks in slots of [`Codec::Int8`] or [`Codec::Int4`], as
/// [`Kernels::encode`](crate::ops::Kernels::encode) writes them, in device memory.
#[derive(Debug, Clone, Copy)]
pub struct SealedView {
    /// The slots.
    pub slots: Span,
    /// How many may be named by a block table: fewer than [`SEALED_BLOCK`].
    pub num_slots: u64,
    /// Bytes from slot to slot, a multiple of 16, at least those of a slot.
    pub slot_stride: u64,
    /// How they are written.
    pub codec: Codec,
    /// What they hold: blocks of the view's heads, head dimension, block size and 16-bit elements.
    pub geometry: Geometry,
    /// The layer to attend among those of the geometry.
    pub layer: u32,
}

impl SealedView {
    /// Checks that slots are where they are said to be, and of blocks as those of `kv`.
    fn check(&self, kv: &KvView) -> Result<()> {
        self.codec.layer_places(&self.geometry, self.layer)?;
        let geometry = &self.geometry;
        let (heads, head_dim) = (kv.shape.num_kv_heads as usize, kv.shape.head_dim as usize);
        let fits = geometry.num_kv_heads() == heads
            && geometry.head_dim() == head_dim
            && geometry.block_size() == kv.block_size as usize
            && geometry.dtype() == kv.shape.dtype;
        if !fits {
            let given =
                format!("sealed blocks of {geometry} beside blocks of other shapes or types");
            return Err(Error::invalid(OP, given));
        }
        if kv.block_size < MIN_SEALED_TOKENS {
            let supported = format!("{MIN_SEALED_TOKENS} or more");
            return Err(Error::unsupported(OP, "sealed block size", kv.block_size, supported));
        }
        if self.num_slots > SEALED_BLOCK as u64 {
            return Err(Error::unsupported(OP, "num_slots", self.num_slots, "up to 2^30"));
        }
        let bytes = self.codec.slot_bytes(geometry)? as u64;
        if self.slot_stride < bytes || !self.slot_stride.is_multiple_of(16) {
            let what = format!(
                "slots {} bytes apart: a multiple of 16, {bytes} or more, is needed",
                self.slot_stride
            );
            return Err(Error::invalid(OP, what));
        }
        let needed = self.num_slots.saturating_mul(self.slot_stride);
        self.slots.check(OP, "the sealed blocks", needed, 16)
    }
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
    /// Sealed blocks beside them, which ids with [`SEALED_BLOCK`] name; `None`: there are none. Decode alone reads
    /// them.
    pub sealed: Option<SealedView>,
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
    /// How the batch's decode work is dealt to CTAs, out of [`Kernels::plan`](crate::ops::Kernels::plan).
    /// `None`: no sequence is cut, and one that is longer than the others keeps the device waiting. Not
    /// looked at where there are too many query rows for the decode kernel.
    pub plan: Option<Plan>,
    /// Query heads on this rank, a multiple of the KV heads.
    pub num_qo_heads: u32,
    /// Sequences.
    pub num_seqs: u32,
    /// Query tokens of all sequences (an upper bound for every replay of a graph).
    pub num_tokens: u32,
    /// Upper bound on the query tokens of one sequence: chooses the kernel.
    pub max_q_len: u32,
    /// Upper bound on the *visible* tokens of one sequence in this layer: chooses how keys are shared out.
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
pub(super) const HEAD_DIMS: [u32; 3] = [64, 128, 256];

/// What the type of keys and values adds to a kernel's name: nothing where it is the queries'.
const KV_SUFFIXES: [&str; 2] = ["", "_e4m3"];

/// Head dimensions and query rows per KV head that the kernels for sealed blocks are built for.
const SEALED_HEAD_DIMS: [u32; 2] = [64, 128];
const SEALED_ROWS: u64 = 8;
/// Tokens of the smallest sealed block.
const MIN_SEALED_TOKENS: u32 = 16;
/// Codecs of sealed blocks, as kernels/attention_decode_sealed.cu has them.
const SEALED_CODECS: [Codec; 2] = [Codec::Int8, Codec::Int4];

/// The decode kernels of a head dimension, as they end in kernels/attention_decode.cu.
const DECODE_VARIANTS: [(Variant, &str); 3] =
    [(Variant::Decode8, "r8"), (Variant::Decode8Narrow, "r8_narrow"), (Variant::Decode16, "r16")];

pub(super) struct Loaded {
    /// By type of the queries, whether KV is e4m3, head dimension and variant.
    decode: [[[[Kernel; DECODE_VARIANTS.len()]; 3]; 2]; 2],
    /// By type of the queries, whether KV is e4m3, and head dimension.
    prefill: [[[Kernel; 3]; 2]; 2],
    /// By type of the queries, codec and head dimension.
    sealed: [[[Kernel; SEALED_HEAD_DIMS.len()]; SEALED_CODECS.len()]; 2],
}

impl Loaded {
    pub(super) fn load(loader: &mut Loader<'_>) -> Result<Self> {
        let none = Kernel { function: None };
        let mut loaded = Self {
            decode: [[[[none; DECODE_VARIANTS.len()]; 3]; 2]; 2],
            prefill: [[[none; 3]; 2]; 2],
            sealed: [[[none; SEALED_HEAD_DIMS.len()]; SEALED_CODECS.len()]; 2],
        };
        let decode = loader.file("attention_decode")?;
        for (dtype, by_dtype) in DTYPES.iter().zip(&mut loaded.decode) {
            for (kv, by_kv) in KV_SUFFIXES.iter().zip(by_dtype) {
                for (dim, by_dim) in HEAD_DIMS.iter().zip(by_kv) {
                    for ((variant, suffix), kernel) in DECODE_VARIANTS.iter().zip(by_dim) {
                        let there = match variant {
                            Variant::Decode8Narrow => !kv.is_empty() && *dim < 256,
                            // Registers do not reach for 16 rows of 256 dimensions.
                            Variant::Decode16 => *dim < 256,
                            _ => true,
                        };
                        if there {
                            let dtype = dtype.name();
                            let name = format!("hkv_attention_decode_{dtype}{kv}_d{dim}_{suffix}");
                            *kernel = decode(&name, variant.shared_bytes())?;
                        }
                    }
                }
            }
        }
        drop(decode);
        let sealed = loader.file("attention_decode_sealed")?;
        for (dtype, by_dtype) in DTYPES.iter().zip(&mut loaded.sealed) {
            for (codec, by_codec) in SEALED_CODECS.iter().zip(by_dtype) {
                for (dim, kernel) in SEALED_HEAD_DIMS.iter().zip(by_codec) {
                    let name = format!("hkv_attention_decode_{}_{codec}_d{dim}_r8", dtype.name());
                    *kernel = sealed(&name, Variant::Sealed.shared_bytes())?;
                }
            }
        }
        drop(sealed);
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

/// Query tokens of a sequence that a tree mask has bits for.
const MAX_TREE_TOKENS: u32 = 32;

/// The kernel for a batch, and how it is cut into CTAs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Decode { variant: Variant, list: WorkList },
    Prefill { splits: u32, ctas: u64 },
}

impl Way {
    fn of(args: &AttentionArgs, device: &DeviceInfo) -> Result<Self> {
        let variant = args.variant(device);
        if variant == Variant::Prefill {
            return Ok(Self::prefill(args, device));
        }
        let whole = WorkList::whole(args.bounds(device));
        let list = match &args.plan {
            Some(plan) => {
                plan.check(OP, &whole)?;
                plan.list
            }
            None => whole,
        };
        Ok(Self::Decode { variant, list })
    }

    fn prefill(args: &AttentionArgs, device: &DeviceInfo) -> Self {
        let kv_heads = u64::from(args.kv.shape.num_kv_heads);
        // As in kernels/attention_prefill.cu: rows of a CTA; one tile more per sequence than rows fill.
        let tile_rows = if args.kv.shape.head_dim <= 128 { 128 } else { 64 };
        let all_rows = u64::from(args.num_tokens) * u64::from(args.group());
        let tiles = all_rows / tile_rows + u64::from(args.num_seqs);
        let splits = split::prefill_splits(
            all_rows.div_ceil(tile_rows).max(args.num_seqs.into()) * kv_heads,
            args.max_kv_len,
            device,
            args.state_rows() * state_bytes(args.kv.shape.head_dim),
        );
        Self::Prefill { splits, ctas: tiles * kv_heads * u64::from(splits) }
    }

    fn ctas(&self) -> u64 {
        match self {
            Self::Decode { list, .. } => list.ctas(),
            Self::Prefill { ctas, .. } => *ctas,
        }
    }

    /// Bytes of the partial states in the workspace.
    fn workspace_bytes(&self, args: &AttentionArgs) -> Result<u64> {
        let state = state_bytes(args.kv.shape.head_dim);
        let bytes = match *self {
            // As in kernels/attention_decode.cu: outputs, bases and sums.
            Self::Decode { variant, list } => {
                let slot = u64::from(variant.rows()) * (state + size_of::<f32>() as u64);
                list.cut_items().checked_mul(slot)
            }
            Self::Prefill { splits: 1, .. } => Some(0),
            Self::Prefill { splits, .. } => {
                (args.state_rows() * state).checked_mul(u64::from(splits))
            }
        };
        bytes.ok_or_else(|| {
            Error::invalid(OP, "the partial states of these bounds overflow 64-bit addresses")
        })
    }
}

/// Bytes of the state of a row: output and LSE in f32.
fn state_bytes(head_dim: u32) -> u64 {
    (u64::from(head_dim) + 1) * size_of::<f32>() as u64
}

impl Kernels {
    /// Bytes of workspace that [`attention`](Self::attention) needs for these arguments; 0 when no keys are
    /// split. Depends on shapes, bounds and the shape of the plan alone, not on addresses or on what lies
    /// there.
    ///
    /// # Errors
    /// As [`attention`](Self::attention) for shapes that are not supported.
    pub fn attention_workspace_bytes(&self, args: &AttentionArgs) -> Result<u64> {
        if args.num_tokens == 0 || args.num_seqs == 0 {
            return Ok(0);
        }
        args.check_shape()?;
        Way::of(args, self.device.info())?.workspace_bytes(args)
    }

    /// Attends the queries of a batch to the keys that they see in one layer: `out` and, if wanted, `lse`.
    ///
    /// What a query sees is said in [`AttentionKind`](crate::spec::AttentionKind). A query that sees
    /// nothing gets 0 and an LSE of -inf (with sink logits, the sink itself). No tokens are a no-op. Rows
    /// of `out` past the last sequence's are left alone. `max_q_len`, `max_kv_len` and the plan only choose
    /// the way: longer sequences, or others than were planned, are slower, not wrong.
    ///
    /// # Errors
    /// `Unsupported` or `InvalidArgument` for anything the host can see: element type, head dimension,
    /// block size, head counts, alignment, strides or arrays that leave their buffers, rows of `out` that
    /// overlap, a layer outside of the window table, a plan of another batch size or number of KV heads, a
    /// workspace that is too small, a scale that is not positive.
    ///
    /// # Safety
    /// Until the stream has passed the launch, every span in `args` is device memory of that length; the
    /// window table names groups and layer slots inside of the tables and the view; `qo_indptr` rises from 0
    /// or more to at most `num_tokens`; every block row holds the blocks of all visible tokens, with ids
    /// inside of the view; a plan was made by [`plan`](Self::plan), earlier in the stream, and, where it is
    /// [`early`](Plan::early), what that says of the predecessor holds; nothing else accesses what is written,
    /// the workspace and the plan included, and nothing writes what is read.
    pub unsafe fn attention(&self, args: &AttentionArgs, stream: StreamRef<'_>) -> Result<()> {
        if args.num_tokens == 0 || args.num_seqs == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise about the spans.
        let Prepared { way, ctas, params } = unsafe { self.prepare(args, stream)? };
        let (dtype, shape) = (args.dtype, args.kv.shape);
        let by_dtype = usize::from(args.dtype == DTYPES[1]);
        let e4m3 = usize::from(shape.dtype == Dtype::E4m3);
        let dim = HEAD_DIMS.iter().position(|&dim| dim == shape.head_dim).unwrap_or_default();
        let (kernel, config) = match way {
            Way::Prefill { .. } => (
                &self.attention.prefill[by_dtype][e4m3][dim],
                LaunchConfig::linear(ctas, abi::HKV_PREFILL_THREADS)
                    .with_shared(abi::HKV_PREFILL_SHARED_BYTES),
            ),
            Way::Decode { variant: Variant::Sealed, .. } => {
                let codec = args.sealed.map_or(SEALED_CODECS[0], |sealed| sealed.codec);
                let of = SEALED_CODECS.iter().position(|&of| of == codec).unwrap_or_default();
                let kernel = &self.attention.sealed[by_dtype][of][dim];
                (kernel, self.decode_config(ctas, Variant::Sealed))
            }
            Way::Decode { variant, .. } => {
                let of = DECODE_VARIANTS.iter().position(|&(of, _)| of == variant);
                let kernel = &self.attention.decode[by_dtype][e4m3][dim][of.unwrap_or_default()];
                (kernel, self.decode_config(ctas, variant))
            }
        };
        let kv = cpu::KvFormat {
            dtype: shape.dtype,
            head_dim: shape.head_dim as usize,
            sealed: args.sealed.and_then(|sealed| sealed.codec.attended()),
        };
        // SAFETY: runs when the stream gets to it, while the caller's promise holds.
        let on_cpu = move |p: &_| unsafe { cpu::attention(p, dtype, kv) };
        // SAFETY: the parameters are those of the kernel; memory is the caller's promise.
        unsafe { self.launch(kernel, config, &params, stream, on_cpu)? };
        if params.num_splits == 1 {
            return Ok(());
        }
        let merge = args.merge_params(&params);
        // SAFETY: the partial states were written by the kernel before; the rest as above.
        unsafe { self.launch_merge(&merge, merge::Start::WithPredecessor, stream) }
    }
}

/// A batch that has been checked, and how it is launched.
pub(super) struct Prepared {
    pub(super) way: Way,
    pub(super) ctas: u32,
    pub(super) params: hkv_attention_params,
}

impl Kernels {
    /// Checks the arguments of a batch that is not empty.
    ///
    /// # Safety
    /// Every span in `args` is device memory of that length.
    pub(super) unsafe fn prepare(
        &self,
        args: &AttentionArgs,
        stream: StreamRef<'_>,
    ) -> Result<Prepared> {
        args.check()?;
        let way = Way::of(args, self.device.info())?;
        args.workspace.check(OP, "the workspace", way.workspace_bytes(args)?, 16)?;
        let ctas = way.ctas();
        let ctas = u32::try_from(ctas).ok().filter(|&ctas| ctas <= i32::MAX as u32);
        let ctas = ctas.ok_or_else(|| {
            let given = format!("{} CTAs", way.ctas());
            Error::unsupported(OP, "a batch of", given, "up to 2^31 - 1")
        })?;
        if self.checked {
            // SAFETY: the caller's promise about the spans.
            unsafe { checks::attention(args, stream)? };
            if let (Way::Decode { .. }, Some(plan)) = (&way, &args.plan) {
                // SAFETY: as above.
                unsafe { checks::plan(plan, stream)? };
            }
        }
        let params = args.params(&way);
        Ok(Prepared { way, ctas, params })
    }

    /// The launch of a decode kernel.
    pub(super) fn decode_config(&self, ctas: u32, variant: Variant) -> LaunchConfig {
        let config =
            LaunchConfig::linear(ctas, abi::HKV_DECODE_THREADS).with_shared(variant.shared_bytes());
        let overlaps = self.device.info().compute_capability >= (9, 0);
        if overlaps { config.with_overlap() } else { config }
    }
}

impl AttentionArgs {
    /// Query heads per KV head.
    fn group(&self) -> u32 {
        self.num_qo_heads / self.kv.shape.num_kv_heads.max(1)
    }

    /// The kernel for these arguments.
    pub(super) fn variant(&self, device: &DeviceInfo) -> Variant {
        let shape = &self.kv.shape;
        if self.sealed.is_some() {
            return Variant::Sealed;
        }
        let items = u64::from(self.num_seqs) * u64::from(shape.num_kv_heads);
        Variant::of(self.max_q_len, self.group(), shape.head_dim).for_items(items, shape, device)
    }

    /// What decides how they are dealt to CTAs.
    pub(super) fn bounds(&self, device: &DeviceInfo) -> Bounds {
        Bounds {
            num_seqs: self.num_seqs,
            num_kv_heads: self.kv.shape.num_kv_heads,
            max_kv_len: self.max_kv_len,
            ctas_per_sm: self.variant(device).ctas_per_sm(),
        }
    }

    /// Checks what chooses the kernel and sizes the workspace.
    pub(super) fn check_shape(&self) -> Result<()> {
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
        if self.sealed.is_some() {
            self.check_sealed_shape()?;
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

    /// Checks that there is a kernel that reads sealed blocks for these queries.
    fn check_sealed_shape(&self) -> Result<()> {
        let rows = u64::from(self.max_q_len.max(1)) * u64::from(self.group());
        if rows > SEALED_ROWS {
            return Err(Error::unsupported(
                OP,
                "query rows per KV head (new tokens times query heads) with sealed blocks",
                rows,
                format!("up to {SEALED_ROWS}; decode the blocks first for more"),
            ));
        }
        let head_dim = self.kv.shape.head_dim;
        if !SEALED_HEAD_DIMS.contains(&head_dim) {
            return Err(Error::unsupported(OP, "head_dim of sealed blocks", head_dim, "64, 128"));
        }
        if self.kv.shape.dtype != self.dtype {
            let kv = self.kv.shape.dtype.name();
            let supported = format!("{}, that of the queries", self.dtype.name());
            return Err(Error::unsupported(OP, "KV dtype beside sealed blocks", kv, supported));
        }
        Ok(())
    }

    /// Checks everything the host can see, but for the workspace.
    fn check(&self) -> Result<()> {
        self.check_shape()?;
        let shape = &self.kv.shape;
        self.kv.check(OP)?;
        if let Some(sealed) = &self.sealed {
            sealed.check(&self.kv)?;
        }
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
        let states = self.state_rows();
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

    /// Rows of query tokens and heads.
    fn state_rows(&self) -> u64 {
        u64::from(self.num_tokens) * u64::from(self.num_qo_heads)
    }

    /// The parameter block. Partial states lie in the workspace, those of a prefill outputs before LSE.
    fn params(&self, way: &Way) -> hkv_attention_params {
        let (num_splits, plan, is_cut) = match way {
            Way::Decode { list, .. } => (1, self.plan, list.cut_parts > 0),
            Way::Prefill { splits, .. } => (*splits, None, *splits > 1),
        };
        let outputs = self.state_rows() * u64::from(self.kv.shape.head_dim) * 4;
        let partial_out = if is_cut { self.workspace.address } else { 0 };
        let partial_lse =
            if num_splits > 1 { partial_out + u64::from(num_splits) * outputs } else { 0 };
        let address = |span: Option<Span>| span.map_or(0, |span| span.address);
        let strides = &self.kv.strides;
        let scales = self.kv.scales;
        let scale_strides = scales.map_or(KvStrides::NONE, |scales| scales.strides);
        let places = self.sealed.and_then(|s| s.codec.layer_places(&s.geometry, s.layer).ok());
        let place = |of: fn(&LayerPlaces) -> u64| places.as_ref().map_or(0, of) as i32;
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
            parts: plan.map_or(0, |plan| plan.memory.address) as *const _,
            arrivals: plan.map_or(0, |plan| plan.arrivals()) as *mut _,
            partial_out: partial_out as *mut _,
            partial_lse: partial_lse as *mut _,
            sealed: address(self.sealed.map(|sealed| sealed.slots)) as *const _,
            sealed_stride: self.sealed.map_or(0, |sealed| sealed.slot_stride as i64),
            sealed_key_groups: place(|places| places.key_groups),
            sealed_value_groups: place(|places| places.value_groups),
            sealed_keys: place(|places| places.keys),
            sealed_values: place(|places| places.values),
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
            num_splits: num_splits as i32,
            reads_early: plan.is_some_and(|plan| plan.reads_early).into(),
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
