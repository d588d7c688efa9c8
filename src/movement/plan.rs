//! Which path every fragment of a move takes. Plain data in, plain data out, no allocation once warm.
//!
//! Fragments that continue one another on both sides become one. Then every fragment goes by the path that the model
//! says is fastest for it: the copy engines in a batch; a pitched copy, where fragments of one size lie at regular
//! distances; or `move_blocks`. Blocks of rows go together, by one of: `move_blocks`; a pitched copy per block;
//! or, where blocks are contiguous on the host, the copy engines to or from a ring in device memory and
//! `move_blocks` inside of that memory.

use crate::abi::hkv_copy;
use crate::device::{CopyBatch, PitchedCopy};
use crate::ops::MoveShape;

use super::model::{KernelCost, LinkModel, PathCosts, SizeCosts};

/// Which way a move goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Pinned host to device memory.
    HostToDevice,
    /// Device to pinned host memory.
    DeviceToHost,
    /// From device memory to device memory.
    Inside,
}

/// What is known of a move beside its fragments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traffic {
    /// Which way all of it goes.
    pub way: Way,
    /// Whether the link is busy the other way meanwhile.
    pub both_ways: bool,
}

impl Traffic {
    fn cta_price(self) -> f64 {
        if self.both_ways { CTA_PRICE_SERVING } else { CTA_PRICE }
    }
}

/// How a planned move is carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// The first `copies` descriptors by `move_blocks` with `ctas` CTAs, [`Planner::engine`] in a batch, and
    /// [`Planner::pitched`] one by one.
    Direct {
        /// Descriptors for the kernel.
        copies: usize,
        /// Its quota.
        ctas: u32,
    },
    /// The first `copies` descriptors, blocks of `block_bytes` that are contiguous on the host, through a ring in device
    /// memory.
    Staged {
        /// Blocks.
        copies: usize,
        /// Bytes of each.
        block_bytes: u64,
        /// The kernel's quota.
        ctas: u32,
    },
}

/// What CTAs cost whoever computes meanwhile, as a factor on the time of paths that take them: of two that are as fast,
/// the one without CTAs is taken.
const CTA_PRICE: f64 = 1.05;
/// The same while the link is busy both ways, which is when the device serves: a CTA that waits for the link holds the
/// place of one that computes, and the kernel that wants it waits as long.
const CTA_PRICE_SERVING: f64 = 1.5;
/// Fewest fragments at regular distances that are worth a look at a pitched copy.
const MIN_ROWS: usize = 8;
/// A block of rows has less than 2^31 vectors of 16 bytes.
const MAX_BLOCK_BYTES: u64 = 16 * (i32::MAX as u64);
/// Largest distance between rows that the driver takes.
const MAX_PITCH: i64 = i32::MAX as i64;

/// Plans moves. Keeps the lists of its last plan, and their memory for the next.
#[derive(Debug, Default)]
pub struct Planner {
    srcs: Vec<u64>,
    dsts: Vec<u64>,
    sizes: Vec<usize>,
    pitched: Vec<PitchedCopy>,
    /// Bytes of the largest block that may be staged.
    largest_staged: u64,
}

impl Planner {
    /// A planner with room for plans of so many descriptors.
    pub fn with_capacity(copies: usize) -> Self {
        Self {
            srcs: Vec::with_capacity(copies),
            dsts: Vec::with_capacity(copies),
            sizes: Vec::with_capacity(copies),
            pitched: Vec::with_capacity(copies),
            largest_staged: 0,
        }
    }

    /// Lets blocks of up to so many bytes go by way of a ring in device memory.
    #[must_use]
    pub fn with_staging(self, largest: u64) -> Self {
        Self { largest_staged: largest, ..self }
    }

    /// Plans a move. The descriptors are merged and put in order where they are: those that the route leaves to the
    /// kernel come first.
    ///
    /// `edges`, sorted, are addresses that no copy of the copy engines may cross
    /// (see [`Device::pinned_edges`](crate::device::Device::pinned_edges)).
    pub fn plan(
        &mut self,
        copies: &mut [hkv_copy],
        shape: &MoveShape,
        traffic: Traffic,
        model: &LinkModel,
        edges: &[u64],
    ) -> Route {
        self.srcs.clear();
        self.dsts.clear();
        self.sizes.clear();
        self.pitched.clear();
        // A row becomes no longer than a block may be.
        let most = match shape.dims() {
            [] => u64::MAX,
            _ => MAX_BLOCK_BYTES / shape.rows().max(1),
        };
        let count = coalesce(copies, most);
        let copies = &mut copies[..count];
        let paths = model.paths(traffic);
        if shape.dims().is_empty() {
            self.plan_fragments(copies, paths, traffic.cta_price(), edges)
        } else {
            self.plan_blocks(copies, shape, traffic, model, edges)
        }
    }

    /// What the copy engines copy.
    pub fn engine(&self) -> CopyBatch<'_> {
        CopyBatch { srcs: &self.srcs, dsts: &self.dsts, sizes: &self.sizes }
    }

    /// What they copy row by row.
    pub fn pitched(&self) -> &[PitchedCopy] {
        &self.pitched
    }

    fn plan_fragments(
        &mut self,
        copies: &mut [hkv_copy],
        paths: &PathCosts,
        cta_price: f64,
        edges: &[u64],
    ) -> Route {
        let bytes = copies.iter().map(|copy| copy.bytes).sum();
        let kernel = best_kernel(paths, copies.len() as u64, bytes);
        let by_kernel = |copy: &hkv_copy| cta_price * kernel.rows.us(copy.bytes);
        let by_engine = |copy: &hkv_copy| {
            paths.engine.map_or(f64::INFINITY, |engine| engine.copies.us(copy.bytes))
        };
        // Each of the two has a start of its own: what is best fragment by fragment may not be in all.
        let count = copies.len() as u64;
        let engine_start = paths.engine.map_or(f64::INFINITY, |engine| engine.begin_us(count));
        let mut all = [kernel.start_us, engine_start, kernel.start_us + engine_start];
        for copy in copies.iter() {
            let (kernel, engine) = (by_kernel(copy), by_engine(copy));
            all[0] += kernel;
            all[1] += engine;
            all[2] += kernel.min(engine);
        }
        let goes_by_engine = |copy: &hkv_copy| match all {
            [kernel, engine, each] if each < kernel.min(engine) => {
                by_engine(copy) < by_kernel(copy)
            }
            [kernel, engine, _] => engine < kernel,
        };
        let mut kept = 0;
        let mut next = 0;
        while next < copies.len() {
            let rows = regular_rows(&copies[next..]);
            if let Some(pitched) = paths.pitched.filter(|_| rows >= MIN_ROWS) {
                let row = copies[next].bytes;
                let row_bytes = row * rows as u64;
                let first = &copies[next];
                let alone = rows as f64 * by_engine(first).min(by_kernel(first));
                let run = PitchedCopy {
                    src: copies[next].src as u64,
                    dst: copies[next].dst as u64,
                    row_bytes: row as usize,
                    rows,
                    src_pitch: (copies[next + 1].src as u64 - copies[next].src as u64) as usize,
                    dst_pitch: (copies[next + 1].dst as u64 - copies[next].dst as u64) as usize,
                };
                if pitched.us(1, rows as u64, row_bytes) < alone && !crosses(&run, edges) {
                    self.pitched.push(run);
                    next += rows;
                    continue;
                }
            }
            // Fragments that no pitched copy took go one by one; the run is not looked at again.
            for index in next..next + rows {
                let copy = copies[index];
                if goes_by_engine(&copy) {
                    self.push(copy, edges);
                } else {
                    copies[kept] = copy;
                    kept += 1;
                }
            }
            next += rows;
        }
        Route::Direct { copies: kept, ctas: kernel.ctas }
    }

    fn plan_blocks(
        &mut self,
        copies: &mut [hkv_copy],
        shape: &MoveShape,
        traffic: Traffic,
        model: &LinkModel,
        edges: &[u64],
    ) -> Route {
        let paths = model.paths(traffic);
        let count = copies.len() as u64;
        let rows = shape.rows();
        let bytes = rows * copies.iter().map(|copy| copy.bytes).sum::<u64>();
        let kernel = best_kernel(paths, count * rows, bytes);
        let by_kernel = traffic.cta_price() * kernel.us(count * rows, bytes);
        let by_rows = match (paths.pitched, pitch(shape)) {
            (Some(cost), Some(_)) => cost.us(count, count * rows, bytes),
            _ => f64::INFINITY,
        };
        let staged = staged_block(copies, shape, traffic.way)
            .filter(|&block| traffic.way != Way::Inside && block <= self.largest_staged);
        let by_staging = match (paths.engine, staged) {
            (Some(engine), Some(block)) => {
                let scatter = model.staging;
                // The kernel keeps up with the link, but for what it does before the first or after the last block.
                let link = engine.us(count, bytes).max(scatter.us(count * rows, bytes));
                CTA_PRICE * (link + scatter.us(rows, block) + scatter.start_us)
            }
            _ => f64::INFINITY,
        };
        if let Some(block_bytes) = staged.filter(|_| by_staging < by_kernel.min(by_rows)) {
            return Route::Staged { copies: copies.len(), block_bytes, ctas: model.staging.ctas };
        }
        if let Some((src_pitch, dst_pitch)) = pitch(shape).filter(|_| by_rows < by_kernel) {
            let mut kept = 0;
            for index in 0..copies.len() {
                let copy = copies[index];
                let run = PitchedCopy {
                    src: copy.src as u64,
                    dst: copy.dst as u64,
                    row_bytes: copy.bytes as usize,
                    rows: rows as usize,
                    src_pitch,
                    dst_pitch,
                };
                let fits = copy.bytes > 0 && copy.bytes <= src_pitch.min(dst_pitch) as u64;
                if fits && !crosses(&run, edges) {
                    self.pitched.push(run);
                } else {
                    copies[kept] = copy;
                    kept += 1;
                }
            }
            return Route::Direct { copies: kept, ctas: kernel.ctas };
        }
        Route::Direct { copies: copies.len(), ctas: kernel.ctas }
    }

    /// Leaves a fragment to the copy engines, cut at edges.
    pub(super) fn push(&mut self, copy: hkv_copy, edges: &[u64]) {
        let (mut src, mut dst, mut left) = (copy.src as u64, copy.dst as u64, copy.bytes);
        while left > 0 {
            let part = until_edge(edges, src, left).min(until_edge(edges, dst, left));
            self.srcs.push(src);
            self.dsts.push(dst);
            self.sizes.push(part as usize);
            src += part;
            dst += part;
            left -= part;
        }
    }

    /// Forgets what was left to the copy engines.
    pub(super) fn clear_engine(&mut self) {
        self.srcs.clear();
        self.dsts.clear();
        self.sizes.clear();
    }
}

/// Merges neighbours in the list that continue one another on both sides, upwards or downwards, and drops those of no
/// bytes. None becomes longer than `most`. Returns how many are left, at the front.
fn coalesce(copies: &mut [hkv_copy], most: u64) -> usize {
    let mut count = 0;
    for index in 0..copies.len() {
        let copy = copies[index];
        if copy.bytes == 0 {
            continue;
        }
        if count > 0 {
            let last = &mut copies[count - 1];
            let ends =
                |copy: &hkv_copy| (copy.src as u64 + copy.bytes, copy.dst as u64 + copy.bytes);
            let starts = |copy: &hkv_copy| (copy.src as u64, copy.dst as u64);
            let fits = last.bytes.saturating_add(copy.bytes) <= most;
            if fits && ends(last) == starts(&copy) {
                last.bytes += copy.bytes;
                continue;
            }
            if fits && ends(&copy) == starts(last) {
                *last = hkv_copy { bytes: last.bytes + copy.bytes, ..copy };
                continue;
            }
        }
        copies[count] = copy;
        count += 1;
    }
    count
}

/// The quota that is fastest, or as fast with fewer CTAs.
pub(super) fn best_kernel(paths: &PathCosts, rows: u64, bytes: u64) -> KernelCost {
    let none = KernelCost { ctas: 1, start_us: f64::INFINITY, rows: SizeCosts::at_rate(0.0, 1.0) };
    paths.kernels.iter().copied().fold(none, |best, next| {
        let (a, b) = (best.us(rows, bytes), next.us(rows, bytes));
        let faster = if next.ctas > best.ctas { b * CTA_PRICE < a } else { b <= a * CTA_PRICE };
        if faster { next } else { best }
    })
}

/// How many of the first fragments are rows of one size at growing, regular distances on both sides.
fn regular_rows(copies: &[hkv_copy]) -> usize {
    let [first, second, ..] = copies else { return copies.len() };
    let step = |a: &hkv_copy, b: &hkv_copy| {
        (
            (b.src as u64).wrapping_sub(a.src as u64) as i64,
            (b.dst as u64).wrapping_sub(a.dst as u64) as i64,
        )
    };
    let steps = step(first, second);
    let fits = |step: i64| step >= first.bytes as i64 && step <= MAX_PITCH;
    if !fits(steps.0) || !fits(steps.1) || first.bytes != second.bytes {
        return 1;
    }
    let regular = copies
        .windows(2)
        .take_while(|pair| pair[1].bytes == first.bytes && step(&pair[0], &pair[1]) == steps);
    1 + regular.count()
}

/// The distances of the rows of blocks, where there is one of each and the driver takes it.
fn pitch(shape: &MoveShape) -> Option<(usize, usize)> {
    let [dim] = shape.dims() else { return None };
    let fits = |stride: i64| stride > 0 && stride <= MAX_PITCH;
    let by_stride = shape.offsets() == [None, None] && fits(dim.src_stride) && fits(dim.dst_stride);
    by_stride.then_some((dim.src_stride as usize, dim.dst_stride as usize))
}

/// Bytes of a block, where all have as many and are contiguous on the host.
fn staged_block(copies: &[hkv_copy], shape: &MoveShape, way: Way) -> Option<u64> {
    let row = copies.first()?.bytes;
    if copies.iter().any(|copy| copy.bytes != row) {
        return None;
    }
    let [by_src_table, by_dst_table] = shape.offsets().map(|table| table.is_some());
    let by_table = if way == Way::HostToDevice { by_src_table } else { by_dst_table };
    if by_table {
        return None;
    }
    let stride = |dim: &crate::ops::MoveDim| match way {
        Way::HostToDevice => dim.src_stride,
        _ => dim.dst_stride,
    };
    // From the row out: the dimension whose steps are as long as what is contiguous so far, again and again.
    let mut extent = row;
    let mut left = shape.dims().iter().filter(|dim| dim.count > 1).count();
    while left > 0 {
        let next = shape.dims().iter().find(|dim| dim.count > 1 && stride(dim) == extent as i64)?;
        extent = extent.checked_mul(next.count.into())?;
        left -= 1;
    }
    Some(extent)
}

/// How many of the bytes from an address on come before the next edge.
fn until_edge(edges: &[u64], address: u64, bytes: u64) -> u64 {
    match edges.get(edges.partition_point(|&edge| edge <= address)) {
        Some(edge) => bytes.min(edge - address),
        None => bytes,
    }
}

/// Whether an edge lies within the rows of either side.
fn crosses(copy: &PitchedCopy, edges: &[u64]) -> bool {
    let extent = |pitch: usize| ((copy.rows - 1) * pitch + copy.row_bytes) as u64;
    let (src, dst) = (extent(copy.src_pitch), extent(copy.dst_pitch));
    until_edge(edges, copy.src, src) < src || until_edge(edges, copy.dst, dst) < dst
}

#[cfg(test)]
mod tests;
