//! `move_blocks`: batched gather/scatter of fragments between device and pinned host memory.

use super::{Kernel, Kernels, Loader, checks, cpu};
use crate::abi::{hkv_copy, hkv_move_params};
use crate::device::cuda::LaunchConfig;
use crate::device::{Span, StreamRef};
use crate::error::{Error, Result};

const OP: &str = "move_blocks";
/// Threads per CTA, and most fragments per tile, as in kernels/move_blocks.cu.
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
        if self.checked {
            // SAFETY: the caller's promise about the table.
            unsafe { checks::move_blocks(args, stream)? };
        }
        let ctas = args.quota.resolve(self.device.info().multiprocessors);
        let tiling = Tiling::of(args.num_copies, ctas);
        let params = hkv_move_params {
            copies: args.copies.address as *const hkv_copy,
            num_copies: args.num_copies as i64,
            tile_copies: tiling.copies as i32,
            tile_ctas: tiling.ctas as i32,
        };
        let config = LaunchConfig::linear(tiling.grid, THREADS);
        // SAFETY: runs when the stream gets to it, while the caller's promise holds.
        let on_cpu = |params: &_| unsafe { cpu::move_blocks(params) };
        // SAFETY: the parameters are those of the kernel; memory is the caller's promise.
        unsafe { self.launch(&self.movement.move_blocks, config, &params, stream, on_cpu) }
    }
}

/// How the fragments of a table are dealt to CTAs: in tiles, each shared by some of them.
///
/// A tile is balanced over its CTAs piece by piece, whatever the sizes of its fragments, but every one of
/// its CTAs reads all its descriptors. So tiles are as few as a CTA's threads allow, and as even as
/// possible.
#[derive(Debug, PartialEq, Eq)]
struct Tiling {
    copies: u32,
    ctas: u32,
    grid: u32,
}

impl Tiling {
    /// A tiling of `num_copies` (not 0) fragments over at most `quota` CTAs.
    fn of(num_copies: u64, quota: u32) -> Self {
        let quota = u64::from(quota.max(1));
        let fewest = num_copies.div_ceil(u64::from(THREADS));
        let ctas = (quota / fewest).max(1);
        let groups = quota / ctas;
        let tiles = fewest.next_multiple_of(groups).min(num_copies);
        Self {
            copies: num_copies.div_ceil(tiles) as u32,
            ctas: ctas as u32,
            grid: (groups.min(tiles) * ctas) as u32,
        }
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn tiles_cover_every_fragment_within_the_quota(num_copies in 1u64..1 << 40, quota in 1u32..600) {
            let tiling = Tiling::of(num_copies, quota);
            prop_assert!((1..=THREADS).contains(&tiling.copies));
            prop_assert!((1..=quota).contains(&tiling.grid));
            prop_assert!(tiling.grid.is_multiple_of(tiling.ctas));
        }

        /// No CTA handles more than one tile's worth above an even share, and few CTAs idle.
        #[test]
        fn work_is_spread_evenly(num_copies in 1u64..100_000, quota in 1u32..600) {
            let tiling = Tiling::of(num_copies, quota);
            let tiles = num_copies.div_ceil(tiling.copies.into());
            let groups = u64::from(tiling.grid / tiling.ctas);
            let share = tiles.div_ceil(groups) as f64 * f64::from(tiling.copies)
                / f64::from(tiling.ctas);
            let even = num_copies as f64 / f64::from(quota);
            prop_assert!(share <= 2.0 * even + 1.0, "{tiling:?}: {share} against {even}");
        }
    }

    #[test]
    fn few_fragments_are_shared_by_all_ctas() {
        assert_eq!(Tiling::of(1, 264), Tiling { copies: 1, ctas: 264, grid: 264 });
        assert_eq!(Tiling::of(5, 4), Tiling { copies: 5, ctas: 4, grid: 4 });
        assert_eq!(Tiling::of(8192, 4), Tiling { copies: 512, ctas: 1, grid: 4 });
        assert_eq!(Tiling::of(40_000, 264), Tiling { copies: 455, ctas: 3, grid: 264 });
    }
}
