//! What the paths of a host and a device cost: the numbers that a plan is made from.
//!
//! A time is a start, something per item, and bytes at a rate. [`LinkModel::calibrate`] measures the numbers where
//! they are used; a model is plain data, so that plans can be made for machines that are not there.

use super::plan::{Traffic, Way, best_kernel};

/// Copies by the copy engines, submitted as batches.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EngineCost {
    /// Microseconds of a batch of nothing.
    pub start_us: f64,
    /// Microseconds of a copy, its submission included.
    pub copy_us: f64,
    /// Gigabytes (1e9 bytes) per second.
    pub gbps: f64,
}

impl EngineCost {
    pub(super) fn each_us(&self, bytes: u64) -> f64 {
        self.copy_us + bytes as f64 * (1e-3 / self.gbps)
    }

    pub(super) fn us(&self, copies: u64, bytes: u64) -> f64 {
        self.start_us + copies as f64 * self.copy_us + bytes as f64 / self.gbps / 1e3
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
    /// Microseconds that no row takes less than, however short.
    pub row_us: f64,
    /// Gigabytes (1e9 bytes) per second, of long rows.
    pub gbps: f64,
}

impl KernelCost {
    pub(super) fn each_us(&self, bytes: u64) -> f64 {
        self.row_us.max(bytes as f64 * (1e-3 / self.gbps))
    }

    pub(super) fn us(&self, rows: u64, bytes: u64) -> f64 {
        self.start_us + (rows as f64 * self.row_us).max(bytes as f64 / self.gbps / 1e3)
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
        let kernel = KernelCost { ctas, start_us: 0.0, row_us: 0.0, gbps: 1.0 };
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
