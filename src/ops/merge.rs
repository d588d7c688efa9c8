//! `merge_states`: n-way merge of attention states (output, LSE) of the same rows.

use super::{HeadStrides, Kernel, Kernels, Loader, cpu};
use crate::abi::{self, hkv_merge_params};
use crate::device::cuda::LaunchConfig;
use crate::device::{Span, StreamRef};
use crate::error::{Error, Result};
use crate::layout::Dtype;

const OP: &str = "merge_states";
/// Warps of a CTA, as in kernels/merge_states.cu: with more states than that they share a row.
const WARPS: u32 = abi::HKV_MERGE_THREADS / 32;

/// Arguments of [`Kernels::merge_states`](crate::ops::Kernels::merge_states).
#[derive(Debug, Clone, Copy)]
pub struct MergeArgs {
    /// Partial outputs, `[num_states, num_tokens * num_qo_heads, head_dim]` of `in_dtype`.
    pub states: Span,
    /// Their natural-log LSE, `[num_states, num_tokens * num_qo_heads]` f32; -inf is the identity.
    pub state_lse: Span,
    /// Type of the partial outputs.
    pub in_dtype: Dtype,
    /// Merged output, `[num_tokens, num_qo_heads, head_dim]` of `out_dtype`.
    pub out: Span,
    /// Strides of `out`.
    pub out_strides: HeadStrides,
    /// Type of the merged output.
    pub out_dtype: Dtype,
    /// Merged LSE, `[num_tokens, num_qo_heads]` f32, if wanted.
    pub lse: Option<Span>,
    /// Learned sink logits to add to the denominator once, `[num_qo_heads]` f32.
    pub sink_logits: Option<Span>,
    /// One i32 on the device: rows of tokens from this one on are left alone, so that a captured merge
    /// replays with fewer tokens. `None`: all are merged.
    pub live_tokens: Option<Span>,
    /// States per row; none give output 0 and LSE -inf.
    pub num_states: u32,
    /// Tokens.
    pub num_tokens: u32,
    /// Query heads.
    pub num_qo_heads: u32,
    /// Elements of a head, a multiple of 8.
    pub head_dim: u32,
}

pub(super) struct Loaded {
    merge_states: Kernel,
}

impl Loaded {
    pub(super) fn load(loader: &mut Loader<'_>) -> Result<Self> {
        let kernel = loader.file("merge_states")?;
        Ok(Self { merge_states: kernel("hkv_merge_states", 0)? })
    }
}

/// When a merge may start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Start {
    /// When everything before it in the stream has ended.
    InOrder,
    /// Its launch may overlap the end of its predecessor, for whose results the kernel waits itself. The
    /// predecessor was launched in order.
    WithPredecessor,
}

impl Kernels {
    /// Merges attention states of the same rows: `out = sum_i w_i state_i`, `w` the softmax of the LSE; `lse`
    /// is the log-sum-exp of all. States of LSE -inf are not read. No tokens are a no-op.
    ///
    /// # Errors
    /// `Unsupported` or `InvalidArgument` for anything the host can see: `head_dim`, alignment, strides or
    /// arrays that leave their buffers, rows of `out` that overlap.
    ///
    /// # Safety
    /// Until the stream has passed the launch, every span in `args` is device memory of that length,
    /// nothing else accesses what is written, and nothing writes what is read.
    pub unsafe fn merge_states(&self, args: &MergeArgs, stream: StreamRef<'_>) -> Result<()> {
        if args.num_tokens == 0 || args.num_qo_heads == 0 {
            return Ok(());
        }
        args.check()?;
        let address = |span: Option<Span>| span.map_or(0, |span| span.address);
        let params = hkv_merge_params {
            states: args.states.address as *const _,
            state_lse: args.state_lse.address as *const _,
            out: args.out.address as *mut _,
            lse: address(args.lse) as *mut _,
            sink_logits: address(args.sink_logits) as *const _,
            live_tokens: address(args.live_tokens) as *const _,
            out_stride_token: args.out_strides.token,
            out_stride_head: args.out_strides.head,
            num_states: args.num_states as i32,
            num_tokens: args.num_tokens as i32,
            num_qo_heads: args.num_qo_heads as i32,
            head_dim: args.head_dim as i32,
            in_dtype: args.in_dtype.code() as i32,
            out_dtype: args.out_dtype.code() as i32,
        };
        // SAFETY: the parameters were checked; memory is the caller's promise.
        unsafe { self.launch_merge(&params, Start::InOrder, stream) }
    }

    /// Launches the merge of checked parameters.
    ///
    /// # Safety
    /// As for [`merge_states`](Self::merge_states).
    pub(super) unsafe fn launch_merge(
        &self,
        params: &hkv_merge_params,
        start: Start,
        stream: StreamRef<'_>,
    ) -> Result<()> {
        let rows = params.num_tokens as u32 * params.num_qo_heads as u32;
        let shares_row = params.num_states as u32 > WARPS;
        let ctas = if shares_row { rows } else { rows.div_ceil(WARPS) };
        let mut config = LaunchConfig::linear(ctas, abi::HKV_MERGE_THREADS);
        if start == Start::WithPredecessor && self.device.info().compute_capability >= (9, 0) {
            config = config.with_overlap();
        }
        // SAFETY: runs when the stream gets to it, while the caller's promise holds.
        let on_cpu = |params: &_| unsafe { cpu::merge_states(params) };
        // SAFETY: the parameters are those of the kernel; memory is the caller's promise.
        unsafe { self.launch(&self.merge.merge_states, config, params, stream, on_cpu) }
    }
}

impl MergeArgs {
    /// Checks everything the host can see.
    fn check(&self) -> Result<()> {
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(8) {
            return Err(Error::unsupported(OP, "head_dim", self.head_dim, "multiples of 8"));
        }
        let rows = u64::from(self.num_tokens) * u64::from(self.num_qo_heads);
        if rows > i32::MAX as u64 {
            return Err(Error::unsupported(
                OP,
                "a merge of",
                format!("{} tokens of {} heads", self.num_tokens, self.num_qo_heads),
                "up to 2^31 - 1 rows",
            ));
        }
        if self.num_states > i32::MAX as u32 {
            return Err(Error::unsupported(OP, "num_states", self.num_states, "up to 2^31 - 1"));
        }
        let states = rows
            .checked_mul(u64::from(self.num_states))
            .and_then(|n| n.checked_mul(u64::from(self.head_dim)))
            .filter(|&n| n <= i64::MAX as u64 / 4)
            .ok_or_else(|| Error::invalid(OP, "the states overflow 64-bit addresses"))?;
        self.states.check(OP, "states", states * self.in_dtype.bytes() as u64, 16)?;
        self.state_lse.check(OP, "state_lse", rows * u64::from(self.num_states) * 4, 4)?;
        let (tokens, heads, dim) = (self.num_tokens, self.num_qo_heads, self.head_dim);
        self.out_strides.check(OP, "out", &self.out, tokens, heads, dim, self.out_dtype)?;
        self.out_strides.check_disjoint(OP, "out", tokens, heads, dim)?;
        if let Some(lse) = &self.lse {
            lse.check(OP, "lse", rows * 4, 4)?;
        }
        if let Some(sinks) = &self.sink_logits {
            sinks.check(OP, "sink_logits", u64::from(heads) * 4, 4)?;
        }
        if let Some(live_tokens) = &self.live_tokens {
            live_tokens.check(OP, "live_tokens", 4, 4)?;
        }
        Ok(())
    }
}
