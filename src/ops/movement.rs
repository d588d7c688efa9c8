//! `move_blocks`: batched gather/scatter of fragments between device and pinned host memory.

use super::{Kernel, Kernels, Loader, cpu};
use crate::abi::{hkv_copy, hkv_move_params};
use crate::device::cuda::LaunchConfig;
use crate::device::{Span, StreamRef};
use crate::error::{Error, Result};

const OP: &str = "move_blocks";
/// Threads per CTA, as in kernels/move_blocks.cu.
const THREADS: u32 = 512;

/// How many CTAs a move may occupy: bandwidth against what is left for kernels beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CtaQuota(Quota);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Quota {
    WholeDevice,
    AtMost(u32),
}

impl CtaQuota {
    /// Enough to fill a PCIe link from fragments of 4 KiB and more: on an H100 4 CTAs move 50 GB/s each
    /// way and cost an HBM-bound neighbour 10 to 12 %, 16 CTAs gain nothing and cost 26 to 38 %.
    pub const HOST_LINK: Self = Self::at_most(4);
    /// Every multiprocessor: for moves inside the device.
    pub const WHOLE_DEVICE: Self = Self(Quota::WholeDevice);

    /// At most `ctas`, at least one.
    pub const fn at_most(ctas: u32) -> Self {
        Self(Quota::AtMost(if ctas == 0 { 1 } else { ctas }))
    }

    fn resolve(self, multiprocessors: u32) -> u32 {
        match self.0 {
            Quota::WholeDevice => 2 * multiprocessors.max(1),
            Quota::AtMost(ctas) => ctas,
        }
    }
}

/// Arguments of [`Kernels::move_blocks`](crate::ops::Kernels::move_blocks).
#[derive(Debug, Clone, Copy)]
pub struct MoveArgs {
    /// [`hkv_copy`] descriptors, in device or pinned host memory.
    pub copies: Span,
    /// How many.
    pub num_copies: u64,
    /// How much of the GPU the move may occupy.
    pub quota: CtaQuota,
}

pub(super) struct Loaded {
    move_blocks: Kernel,
}

impl Loaded {
    pub(super) fn load(loader: &mut Loader<'_>) -> Result<Self> {
        let kernel = loader.file("move_blocks")?;
        Ok(Self { move_blocks: kernel("hkv_move_blocks", 0)? })
    }
}

impl Kernels {
    /// Copies every fragment of a descriptor table, in any direction. An empty table is a no-op.
    ///
    /// # Errors
    /// The table is misaligned or shorter than `num_copies`.
    ///
    /// # Safety
    /// Until the stream has passed the launch: the table is valid and does not change; for each of its
    /// rows, source and destination are device or pinned host memory of `bytes` bytes, all three are
    /// multiples of 16, destinations overlap nothing else in the table; nothing else accesses what is
    /// written, and nothing writes what is read.
    pub unsafe fn move_blocks(&self, args: &MoveArgs, stream: StreamRef<'_>) -> Result<()> {
        if args.num_copies == 0 {
            return Ok(());
        }
        args.check()?;
        let params = hkv_move_params {
            copies: args.copies.address as *const hkv_copy,
            num_copies: args.num_copies as i64,
        };
        let ctas = args.quota.resolve(self.device.info().multiprocessors);
        let config = LaunchConfig::linear(ctas, THREADS);
        // SAFETY: runs when the stream gets to it, while the caller's promise holds.
        let on_cpu = |params: &_| unsafe { cpu::move_blocks(params) };
        // SAFETY: the parameters are those of the kernel; memory is the caller's promise.
        unsafe { self.launch(&self.movement.move_blocks, config, &params, stream, on_cpu) }
    }
}

impl MoveArgs {
    /// Checks everything the host can see.
    fn check(&self) -> Result<()> {
        let bytes = self
            .num_copies
            .checked_mul(size_of::<hkv_copy>() as u64)
            .filter(|&bytes| bytes <= i64::MAX as u64)
            .ok_or_else(|| Error::invalid(OP, "the descriptor table overflows 64-bit addresses"))?;
        self.copies.check(OP, "the descriptor table", bytes, 8)
    }
}
