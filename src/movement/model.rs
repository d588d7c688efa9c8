//! What the paths of a host and a device cost: the numbers that a plan is made from.
//!
//! A time is a start, and something per item that depends on its size. [`LinkModel::calibrate`] measures the numbers
//! where they are used; a model is plain data, so that plans can be made for machines that are not there.

use super::plan::{Traffic, Way, best_kernel};
use crate::error::Result;

/// Copies of one call: the copy engine starts on them when the driver has all.
pub(super) const BATCH_COPIES: usize = 128;

/// Microseconds of one item, a row or a copy, by its bytes: as measured at [`SizeCosts::SIZES`], on straight lines
/// between them, and at the rate of the largest beyond.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SizeCosts([f64; SizeCosts::SIZES.len()]);

impl SizeCosts {
    /// Bytes at which items are measured.
    pub const SIZES: [u64; 8] =
        [256, 512, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20];

    /// Costs by a function of the bytes. More bytes never cost less: what was measured so is noise.
    ///
    /// # Errors
    /// Those of the function.
    pub fn measured(mut us: impl FnMut(u64) -> Result<f64>) -> Result<Self> {
        let mut costs = [0.0; Self::SIZES.len()];
        let mut most = 0.0f64;
        for (cost, bytes) in costs.iter_mut().zip(Self::SIZES) {
            most = most.max(us(bytes)?);
            *cost = most;
        }
        Ok(Self(costs))
    }

    /// Items that take no less than so many microseconds, and bytes at so many GB/s.
    pub fn at_rate(us: f64, gbps: f64) -> Self {
        Self(Self::SIZES.map(|bytes| us.max(bytes as f64 / gbps / 1e3)))
    }

    /// The same with bytes at so many GB/s at most.
    #[must_use]
    pub fn at_most(mut self, gbps: f64) -> Self {
        for (cost, bytes) in self.0.iter_mut().zip(Self::SIZES) {
            *cost = cost.max(bytes as f64 / gbps / 1e3);
        }
        self
    }

    /// Microseconds of an item.
    pub fn us(&self, bytes: u64) -> f64 {
        let (sizes, costs) = (&Self::SIZES, &self.0);
        let last = sizes.len() - 1;
        match sizes.iter().position(|&size| bytes <= size) {
            Some(0) => costs[0],
            Some(above) => {
                let (from, to) = (sizes[above - 1], sizes[above]);
                let share = (bytes - from) as f64 / (to - from) as f64;
                costs[above - 1] + share * (costs[above] - costs[above - 1])
            }
            None => costs[last] * (bytes as f64 / sizes[last] as f64),
        }
    }

    /// Gigabytes (1e9 bytes) per second of large items.
    pub fn gbps(&self) -> f64 {
        let last = Self::SIZES.len() - 1;
        Self::SIZES[last] as f64 / self.0[last] / 1e3
    }

    /// Microseconds of so many items and bytes in all.
    fn all_us(&self, count: u64, bytes: u64) -> f64 {
        count as f64 * self.us(bytes / count.max(1))
    }
}

/// Copies by the copy engines, submitted as batches.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EngineCost {
    /// Microseconds of a batch of nothing.
    pub start_us: f64,
    /// Microseconds that the host takes to submit a copy. The engine begins when it has all of a batch, and works on it
    /// while the host submits the next one.
    pub submit_us: f64,
    /// Copies, one batch after another.
    pub copies: SizeCosts,
}

impl EngineCost {
    /// Until the engine begins with the first of so many copies.
    pub(super) fn begin_us(&self, copies: u64) -> f64 {
        self.start_us + copies.min(BATCH_COPIES as u64) as f64 * self.submit_us
    }

    pub(super) fn us(&self, copies: u64, bytes: u64) -> f64 {
        self.begin_us(copies) + self.copies.all_us(copies, bytes)
    }
}

/// Pitched copies by the copy engines.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PitchedCost {
    /// Microseconds of a call of nothing.
    pub call_us: f64,
    /// Microseconds of a row.
    pub row_us: f64,
    /// Gigabytes (1e9 bytes) per second.
    pub gbps: f64,
}

impl PitchedCost {
    pub(super) fn us(&self, calls: u64, rows: u64, bytes: u64) -> f64 {
        calls as f64 * self.call_us + rows as f64 * self.row_us + bytes as f64 / self.gbps / 1e3
    }
}

/// `move_blocks` with a quota of CTAs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KernelCost {
    /// The quota.
    pub ctas: u32,
    /// Microseconds of a launch of nothing.
    pub start_us: f64,
    /// Rows of a long list.
    pub rows: SizeCosts,
}

impl KernelCost {
    pub(super) fn us(&self, rows: u64, bytes: u64) -> f64 {
        self.start_us + self.rows.all_us(rows, bytes)
    }
}

/// The paths in one direction, while the other one is idle or busy. Busy means that copy engines move as many bytes
/// the other way; rates are then those at which both are done, so that a path that takes from the other direction
/// what it gains is not called fast.
#[derive(Debug, Clone, PartialEq)]
pub struct PathCosts {
    /// Copy engines; `None` where there are none.
    pub engine: Option<EngineCost>,
    /// Copy engines, by the row.
    pub pitched: Option<PitchedCost>,
    /// The kernel; at least one quota.
    pub kernels: Vec<KernelCost>,
}

/// What paths cost on one host with one device.
#[derive(Debug, Clone, PartialEq)]
pub struct LinkModel {
    /// Host to device while the other direction is idle, and while it is busy.
    pub to_device: [PathCosts; 2],
    /// Device to host, likewise.
    pub to_host: [PathCosts; 2],
    /// Inside the device.
    pub inside: PathCosts,
    /// Gathering and scattering inside the device, by as few CTAs as keep up with the link.
    pub staging: KernelCost,
}

impl LinkModel {
    /// A model in which everything goes by `move_blocks` with this quota: for devices without copy engines.
    pub fn kernels_only(ctas: u32) -> Self {
        let kernel = KernelCost { ctas, start_us: 0.0, rows: SizeCosts::at_rate(0.0, 1.0) };
        let paths = PathCosts { engine: None, pitched: None, kernels: vec![kernel] };
        Self {
            to_device: [paths.clone(), paths.clone()],
            to_host: [paths.clone(), paths.clone()],
            inside: paths,
            staging: kernel,
        }
    }

    /// How many CTAs `move_blocks` is given for so many rows: as few as are as fast as more.
    pub fn quota(&self, traffic: Traffic, rows: u64, bytes: u64) -> u32 {
        best_kernel(self.paths(traffic), rows, bytes).ctas
    }

    /// The paths of some traffic.
    pub fn paths(&self, traffic: Traffic) -> &PathCosts {
        let busy = usize::from(traffic.both_ways);
        match traffic.way {
            Way::HostToDevice => &self.to_device[busy],
            Way::DeviceToHost => &self.to_host[busy],
            Way::Inside => &self.inside,
        }
    }
}
