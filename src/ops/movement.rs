//! `move_blocks`: batched gather/scatter between device and pinned host memory, of fragments or of blocks whose
//! rows lie differently on the two sides.

use super::{Kernel, Kernels, Loader, checks, cpu};
use crate::abi::{HKV_MOVE_DIMS, hkv_copy, hkv_move_params};
use crate::device::cuda::LaunchConfig;
use crate::device::{Span, StreamRef};
use crate::error::{Error, Result};

const OP: &str = "move_blocks";
/// Threads per CTA, and most descriptors per tile, as in kernels/move_blocks.cu.
const THREADS: u32 = 448;
/// Most dimensions of a [`MoveShape`].
pub(crate) const MAX_MOVE_DIMS: usize = HKV_MOVE_DIMS as usize;
/// Most descriptors of one launch: tiles are counted in 31 bits.
const MAX_COPIES: u64 = 1 << 30;
/// Share of the quota that a tiling has to keep busy for smaller tiles to be tried no more.
const ENOUGH_BUSY: f64 = 0.9;
/// Bytes that addresses, sizes and strides are multiples of.
pub(crate) const VECTOR_BYTES: u64 = 16;

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

    pub(super) fn resolve(self, multiprocessors: u32) -> u32 {
        match self.0 {
            Quota::WholeDevice => 2 * multiprocessors.max(1),
            Quota::AtMost(ctas) => ctas,
        }
    }
}

/// One dimension over which the rows of a block are repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MoveDim {
    /// How often.
    pub count: u32,
    /// Bytes from one row to the next at the source.
    pub src_stride: i64,
    /// Bytes from one row to the next at the destination.
    pub dst_stride: i64,
}

/// What a descriptor stands for: one fragment, or the rows of a block.
///
/// A row has the descriptor's size and lies at its addresses, and at every combination of steps along the
/// dimensions. The shape is that of all descriptors of a move, their sizes may differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MoveShape {
    dims: [MoveDim; MAX_MOVE_DIMS],
    num_dims: u32,
    /// Byte offsets of the steps along the first dimension, where they are no multiples of a stride.
    src_offsets: Span,
    dst_offsets: Span,
}

impl MoveShape {
    /// Every descriptor is one fragment.
    pub const FRAGMENTS: Self = Self {
        dims: [MoveDim { count: 0, src_stride: 0, dst_stride: 0 }; MAX_MOVE_DIMS],
        num_dims: 0,
        src_offsets: Span::new(0, 0),
        dst_offsets: Span::new(0, 0),
    };

    /// Every descriptor is a block of rows, repeated over these dimensions, outermost first.
    ///
    /// # Errors
    /// `Unsupported` for more than four; `InvalidArgument` for a dimension of no steps, strides that are no multiples
    /// of 16, or 2^31 rows and more.
    pub fn blocks(dims: &[MoveDim]) -> Result<Self> {
        let mut shape = Self::FRAGMENTS;
        let Some(to) = shape.dims.get_mut(..dims.len()) else {
            let supported = format!("at most {MAX_MOVE_DIMS}");
            return Err(Error::unsupported(OP, "dimensions of a block:", dims.len(), supported));
        };
        to.copy_from_slice(dims);
        shape.num_dims = dims.len() as u32;
        let mut rows = 1u64;
        for (d, dim) in dims.iter().enumerate() {
            let odd = |stride: i64| !stride.unsigned_abs().is_multiple_of(VECTOR_BYTES);
            if odd(dim.src_stride) || odd(dim.dst_stride) {
                return Err(Error::invalid(
                    OP,
                    format!(
                        "the strides of dimension {d}, {} and {} bytes, are no multiples of 16",
                        dim.src_stride, dim.dst_stride
                    ),
                ));
            }
            rows = rows.saturating_mul(dim.count.into());
        }
        if rows == 0 || rows > i32::MAX as u64 {
            return Err(Error::invalid(OP, format!("a block of {rows} rows: 1 to 2^31 - 1 are")));
        }
        Ok(shape)
    }

    /// The same shape with a table of byte offsets, `[count of the first dimension]` i64 in device or pinned memory,
    /// in place of the first dimension's stride at the source: for layers that have a base each.
    pub const fn with_src_offsets(mut self, offsets: Span) -> Self {
        self.src_offsets = offsets;
        self
    }

    /// The same at the destination.
    pub const fn with_dst_offsets(mut self, offsets: Span) -> Self {
        self.dst_offsets = offsets;
        self
    }

    /// The dimensions, outermost first; none for fragments.
    pub fn dims(&self) -> &[MoveDim] {
        &self.dims[..self.num_dims as usize]
    }

    /// Rows of a block.
    pub fn rows(&self) -> u64 {
        self.dims().iter().map(|dim| u64::from(dim.count)).product()
    }

    /// The tables of offsets of source and destination, where there are any.
    pub(crate) fn offsets(&self) -> [Option<Span>; 2] {
        [self.src_offsets, self.dst_offsets].map(|span| (!span.is_null()).then_some(span))
    }

    fn check(&self) -> Result<()> {
        for offsets in self.offsets().into_iter().flatten() {
            let Some(first) = self.dims().first() else {
                return Err(Error::invalid(OP, "offsets of layers need a dimension to replace"));
            };
            let bytes = u64::from(first.count) * size_of::<i64>() as u64;
            offsets.check(OP, "the offsets of the first dimension", bytes, 8)?;
        }
        Ok(())
    }
}

/// Arguments of [`Kernels::move_blocks`](crate::ops::Kernels::move_blocks).
#[derive(Debug, Clone, Copy)]
pub struct MoveArgs {
    /// [`hkv_copy`] descriptors, in device or pinned host memory.
    pub copies: Span,
    /// How many.
    pub num_copies: u64,
    /// What each of them stands for.
    pub shape: MoveShape,
    /// How much of the GPU the move may occupy.
    pub quota: CtaQuota,
}

pub(super) struct Loaded {
    fragments: Kernel,
    blocks: Kernel,
}

impl Loaded {
    pub(super) fn load(loader: &mut Loader<'_>) -> Result<Self> {
        let kernel = loader.file("move_blocks")?;
        Ok(Self {
            fragments: kernel("hkv_move_fragments", 0)?,
            blocks: kernel("hkv_move_blocks", 0)?,
        })
    }
}

impl Kernels {
    /// Copies the fragments, or blocks, of a descriptor table, in any direction. An empty table is a no-op.
    ///
    /// # Errors
    /// The table, or one of offsets, is misaligned or too short.
    ///
    /// # Safety
    /// Until the stream has passed the launch: the tables are valid and do not change; every row that
    /// [`MoveShape`] says a descriptor stands for is device or pinned host memory on both sides, with addresses and
    /// sizes that are multiples of 16, and a block has fewer than 2^31 vectors of 16 bytes; destinations overlap
    /// nothing else of the move; nothing else accesses what is written, and nothing writes what is read.
    pub unsafe fn move_blocks(&self, args: &MoveArgs, stream: StreamRef<'_>) -> Result<()> {
        if args.num_copies == 0 {
            return Ok(());
        }
        args.check()?;
        if self.checked {
            // SAFETY: the caller's promise about the tables.
            unsafe { checks::move_blocks(args, stream)? };
        }
        let ctas = args.quota.resolve(self.device.info().multiprocessors);
        let tiling = Tiling::of(args.num_copies, ctas);
        let shape = &args.shape;
        let [src_offsets, dst_offsets] = shape.offsets().map(|span| match span {
            Some(span) => span.address as *const i64,
            None => std::ptr::null(),
        });
        let params = hkv_move_params {
            copies: args.copies.address as *const hkv_copy,
            src_offsets,
            dst_offsets,
            num_copies: args.num_copies as i64,
            src_strides: shape.dims.map(|dim| dim.src_stride),
            dst_strides: shape.dims.map(|dim| dim.dst_stride),
            counts: shape.dims.map(|dim| dim.count as i32),
            num_dims: shape.num_dims as i32,
            num_tiles: tiling.tiles as i32,
            tile_copies: tiling.copies as i32,
            tile_ctas: tiling.ctas as i32,
        };
        let config = LaunchConfig::linear(tiling.grid, THREADS);
        let kernel = match shape.num_dims {
            0 => &self.movement.fragments,
            _ => &self.movement.blocks,
        };
        // SAFETY: runs when the stream gets to it, while the caller's promise holds.
        let on_cpu = |params: &_| unsafe { cpu::move_blocks(params) };
        // SAFETY: the parameters are those of the kernel; memory is the caller's promise.
        unsafe { self.launch(kernel, config, &params, stream, on_cpu) }
    }
}

/// How the descriptors of a table are dealt to CTAs: in tiles, each shared by some of them.
///
/// A tile is balanced over its CTAs piece by piece, whatever the sizes of its fragments, but every one of
/// its CTAs reads all its descriptors, over the link when they are in pinned memory. So tiles are as small as
/// keeps the CTAs evenly busy.
#[derive(Debug, PartialEq, Eq)]
struct Tiling {
    /// Descriptors of a tile.
    copies: u32,
    /// CTAs that share it.
    ctas: u32,
    tiles: u32,
    grid: u32,
}

impl Tiling {
    /// A tiling of `num_copies` (not 0) descriptors over at most `quota` CTAs.
    fn of(num_copies: u64, quota: u32) -> Self {
        let quota = u64::from(quota.max(1));
        let mut groups = quota.min(num_copies);
        let mut best = Self::in_groups(num_copies, quota, groups);
        while best.1 < ENOUGH_BUSY && groups > 1 {
            groups = groups.div_ceil(2);
            let fewer = Self::in_groups(num_copies, quota, groups);
            if fewer.1 > best.1 {
                best = fewer;
            }
        }
        best.0
    }

    /// The tiling in which groups of as many CTAs work at a tile each, and how busy it keeps the quota: 1 for evenly
    /// to the end.
    fn in_groups(num_copies: u64, quota: u64, groups: u64) -> (Self, f64) {
        let ctas = quota / groups;
        let rounds = num_copies.div_ceil(groups).div_ceil(THREADS.into());
        let copies = num_copies.div_ceil(groups * rounds);
        let tiles = num_copies.div_ceil(copies);
        let tiling = Self {
            copies: copies as u32,
            ctas: ctas as u32,
            tiles: tiles as u32,
            grid: (groups.min(tiles) * ctas) as u32,
        };
        let share = (tiles.div_ceil(groups) * copies) as f64 / ctas as f64;
        (tiling, num_copies as f64 / quota as f64 / share)
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
        if self.num_copies > MAX_COPIES {
            let supported = format!("at most {MAX_COPIES}");
            return Err(Error::unsupported(OP, "descriptors:", self.num_copies, supported));
        }
        self.copies.check(OP, "the descriptor table", bytes, 8)?;
        self.shape.check()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn tiles_cover_every_descriptor_within_the_quota(num_copies in 1..=MAX_COPIES, quota in 1u32..600) {
            let tiling = Tiling::of(num_copies, quota);
            prop_assert!((1..=THREADS).contains(&tiling.copies));
            prop_assert!((1..=quota).contains(&tiling.grid));
            prop_assert!(tiling.grid.is_multiple_of(tiling.ctas));
            let (tiles, copies) = (u64::from(tiling.tiles), u64::from(tiling.copies));
            prop_assert!((tiles - 1) * copies < num_copies && num_copies <= tiles * copies);
        }

        /// No CTA handles more than one tile's worth above an even share, and few CTAs idle.
        #[test]
        fn work_is_spread_evenly(num_copies in 1u64..100_000, quota in 1u32..600) {
            let tiling = Tiling::of(num_copies, quota);
            let groups = tiling.grid / tiling.ctas;
            let share = f64::from(tiling.tiles.div_ceil(groups)) * f64::from(tiling.copies)
                / f64::from(tiling.ctas);
            let even = num_copies as f64 / f64::from(quota);
            prop_assert!(share <= 1.5 * even + 1.0, "{tiling:?}: {share} against {even}");
        }
    }

    #[test]
    fn descriptors_are_read_by_few_ctas() {
        let tiling = |copies, ctas, tiles, grid| Tiling { copies, ctas, tiles, grid };
        assert_eq!(Tiling::of(1, 264), tiling(1, 264, 1, 264));
        assert_eq!(Tiling::of(5, 4), tiling(5, 4, 1, 4));
        assert_eq!(Tiling::of(8192, 4), tiling(410, 1, 20, 4));
        assert_eq!(Tiling::of(5120, 264), tiling(20, 1, 256, 256));
        assert_eq!(Tiling::of(40_000, 264), tiling(152, 1, 264, 264));
    }

    #[test]
    fn shapes_that_no_kernel_takes_are_refused() {
        let dim = MoveDim { count: 3, src_stride: 32, dst_stride: -16 };
        assert_eq!(MoveShape::blocks(&[dim; 4]).unwrap().rows(), 81);
        assert_eq!(MoveShape::blocks(&[]).unwrap(), MoveShape::FRAGMENTS);
        for wrong in [
            vec![dim; 5],
            vec![dim, MoveDim { count: 0, ..dim }],
            vec![MoveDim { src_stride: 24, ..dim }],
            vec![MoveDim { dst_stride: -8, ..dim }],
            vec![MoveDim { count: 1 << 16, ..dim }; 2],
        ] {
            assert!(MoveShape::blocks(&wrong).is_err(), "{wrong:?}");
        }
    }
}
