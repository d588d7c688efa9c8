//! `append`: the slot-mapped write of new K and V into their blocks.

use super::{HeadStrides, Kernel, Kernels, Loader, WindowTable, checks, cpu};
use crate::abi::hkv_append_params;
use crate::device::cuda::LaunchConfig;
use crate::device::{Span, StreamRef};
use crate::error::{Error, Result};
use crate::layout::{Dtype, KvScales, KvStrides, KvView};

const OP: &str = "append";
/// Threads per CTA, as in kernels/append.cu.
const THREADS: u32 = 256;
/// CTAs per multiprocessor: 64 warps, what an SM holds.
const CTAS_PER_SM: u32 = 8;

/// Arguments of [`Kernels::append`](crate::ops::Kernels::append).
#[derive(Debug, Clone, Copy)]
pub struct AppendArgs {
    /// New keys, `[num_tokens, num_kv_heads, head_dim]`, of `dtype`.
    pub k_new: Span,
    /// New values, likewise.
    pub v_new: Span,
    /// Type of the new keys and values: bf16 or f16.
    pub dtype: Dtype,
    /// Strides of `k_new` and `v_new`.
    pub new_strides: HeadStrides,
    /// Where they go.
    pub kv: KvView,
    /// `[num_groups, num_tokens]` i64 on the device: `block_id * block_size + offset`, or negative to skip.
    pub slot_mapping: Span,
    /// Layer groups in `slot_mapping`.
    pub num_groups: u32,
    /// The window table.
    pub windows: WindowTable,
    /// The layer to write.
    pub layer: u32,
    /// New tokens.
    pub num_tokens: u32,
}

pub(super) struct Loaded {
    /// 16-bit elements as they are.
    copy: Kernel,
    /// To e4m3, from bf16 and f16.
    quantise: [Kernel; 2],
}

impl Loaded {
    pub(super) fn load(loader: &mut Loader<'_>) -> Result<Self> {
        let kernel = loader.file("append")?;
        Ok(Self {
            copy: kernel("hkv_append", 0)?,
            quantise: [kernel("hkv_append_bf16_e4m3", 0)?, kernel("hkv_append_f16_e4m3", 0)?],
        })
    }
}

impl Kernels {
    /// Writes the K and V of new tokens into their slots; negative slots are skipped. No tokens are a
    /// no-op.
    ///
    /// In a view of e4m3 elements they are quantised: to the nearest of `x / scale`, saturating at the
    /// largest. Scales that tokens share are read; where every token of every head has its own, it is
    /// `max |x| / 448` of its row and is written beside it. A row with an infinity becomes NaN.
    ///
    /// # Errors
    /// `Unsupported` or `InvalidArgument` for anything the host can see: element type, alignment,
    /// strides or arrays that leave their buffers, a layer outside of the window table.
    ///
    /// # Safety
    /// Until the stream has passed the launch, every span in `args` is device memory of that length; the
    /// window table names groups and layer slots inside of `num_groups` and the view; slots are negative
    /// or inside of the view's blocks, each at most once; nothing else accesses what is written, and
    /// nothing writes what is read.
    pub unsafe fn append(&self, args: &AppendArgs, stream: StreamRef<'_>) -> Result<()> {
        if args.num_tokens == 0 {
            return Ok(());
        }
        args.check()?;
        if self.checked {
            // SAFETY: the caller's promise about the spans.
            unsafe { checks::append(args, stream)? };
        }
        let strides = &args.kv.strides;
        let scale_strides = args.kv.scales.map_or(KvStrides::NONE, |scales| scales.strides);
        let params = hkv_append_params {
            k_new: args.k_new.address as *const _,
            v_new: args.v_new.address as *const _,
            k: args.kv.k.address as *mut _,
            v: args.kv.v.address as *mut _,
            slot_mapping: args.slot_mapping.address as *const _,
            windows: args.windows.rows.address as *const _,
            k_scale: args.kv.scales.map_or(0, |scales| scales.k.address) as *mut _,
            v_scale: args.kv.scales.map_or(0, |scales| scales.v.address) as *mut _,
            new_stride_token: args.new_strides.token,
            new_stride_head: args.new_strides.head,
            kv_stride_block: strides.block,
            kv_stride_layer: strides.layer,
            kv_stride_head: strides.head,
            kv_stride_token: strides.token,
            scale_stride_block: scale_strides.block,
            scale_stride_layer: scale_strides.layer,
            scale_stride_head: scale_strides.head,
            scale_stride_token: scale_strides.token,
            layer: args.layer as i32,
            num_tokens: args.num_tokens as i32,
            num_kv_heads: args.kv.shape.num_kv_heads as i32,
            head_dim: args.kv.shape.head_dim as i32,
            block_shift: args.kv.block_size.trailing_zeros() as i32,
            new_dtype: args.dtype.code() as i32,
            kv_dtype: args.kv.shape.dtype.code() as i32,
        };
        let shape = &args.kv.shape;
        let (kernel, lanes) = if shape.dtype == Dtype::E4m3 {
            // A warp quantises a head of K and of V.
            let lanes = args.num_tokens as u64 * shape.num_kv_heads as u64 * 32;
            (&self.append.quantise[usize::from(args.dtype == Dtype::F16)], lanes)
        } else {
            // A lane moves 16 bytes of K and of V.
            (&self.append.copy, args.num_tokens as u64 * (shape.token_bytes() as u64 / 32))
        };
        let most = self.device.info().multiprocessors.max(1) * CTAS_PER_SM;
        let ctas = lanes.div_ceil(THREADS as u64).clamp(1, most as u64) as u32;
        let config = LaunchConfig::linear(ctas, THREADS);
        // SAFETY: runs when the stream gets to it, while the caller's promise holds.
        let on_cpu = |params: &_| unsafe { cpu::append(params) };
        // SAFETY: the parameters are those of the kernel; memory is the caller's promise.
        unsafe { self.launch(kernel, config, &params, stream, on_cpu) }
    }
}

impl AppendArgs {
    /// Checks everything the host can see.
    fn check(&self) -> Result<()> {
        let shape = &self.kv.shape;
        checks::dtypes(OP, "tokens", self.dtype, shape.dtype)?;
        if shape.num_kv_heads == 0 || shape.head_dim == 0 || !shape.head_dim.is_multiple_of(8) {
            return Err(Error::unsupported(
                OP,
                "KV shape of",
                format!("{} heads of {}", shape.num_kv_heads, shape.head_dim),
                "at least one head, head_dim a multiple of 8",
            ));
        }
        if self.num_tokens > i32::MAX as u32 {
            return Err(Error::unsupported(OP, "num_tokens", self.num_tokens, "up to 2^31 - 1"));
        }
        self.kv.check(OP)?;
        if let Some(scales) = self.kv.scales.filter(KvScales::per_token)
            && [(scales.strides.head, shape.num_kv_heads), (scales.strides.block, 2)]
                .iter()
                .any(|&(stride, count)| stride == 0 && count > 1)
        {
            return Err(Error::unsupported(
                OP,
                "scales",
                "of tokens, shared by heads or blocks",
                "one for all tokens of a head, or one per token and head",
            ));
        }
        self.windows.check(OP, self.layer)?;
        for (name, span) in [("k_new", &self.k_new), ("v_new", &self.v_new)] {
            let (tokens, heads) = (self.num_tokens, shape.num_kv_heads);
            self.new_strides.check(OP, name, span, tokens, heads, shape.head_dim, self.dtype)?;
        }
        let slots = self.num_groups as u64 * self.num_tokens as u64 * size_of::<i64>() as u64;
        if slots == 0 {
            return Err(Error::invalid(OP, "num_groups is 0"));
        }
        self.slot_mapping.check(OP, "slot_mapping", slots, 8)
    }
}
