//! How large an engine's memory is.

use super::OP;
use super::format::{HostCodecs, SlotFormat};
use crate::device::host;
use crate::error::{Error, ErrorKind, Result};
use crate::manager::HostConfig;
use crate::spec::GroupPlan;

/// How large the host tier is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum HostSize {
    /// Host memory per device memory (SGLang's `hicache_ratio`; its default is 2.0). Where blocks are kept as they
    /// are, so many slots per block.
    Ratio(f64),
    /// Bytes of pinned host memory.
    Bytes(u64),
    /// Part of the memory that this process may have: that of the machine, or the limit of its memory cgroup
    /// (v2 or v1) where that is less. Refused when as much is not available now.
    Fraction(f64),
}

/// Sizes of an engine's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineConfig {
    /// Bytes of a block: the stride of the pool, a multiple of 128.
    pub block_bytes: usize,
    /// Blocks of the device pool, the null block included.
    pub num_blocks: u32,
    /// Slots of the host arena; 0 for no host tier.
    pub num_slots: u32,
    /// How the slots hold blocks.
    pub slots: SlotFormat,
}

impl EngineConfig {
    /// As many blocks as fit into `device_bytes`, and a host tier of the given size that keeps them as they are.
    ///
    /// # Errors
    /// `InvalidArgument` for a block size of no or odd bytes, a memory too small for two blocks (the null
    /// block and one more), more blocks than 32-bit ids; `Unsupported` for a ratio that is no finite number >= 0, or
    /// a fraction that is not of 0 to 1; `OutOfMemory`, with the arithmetic, for a fraction of the host that is not
    /// available.
    pub fn sized(block_bytes: usize, device_bytes: u64, host: HostSize) -> Result<Self> {
        Self::with_slots(block_bytes, device_bytes, host, SlotFormat::AS_IS)
    }

    /// As many blocks of a plan as fit into `device_bytes`, and a host tier of the given size that keeps them in the
    /// codecs given: the smaller the slots, the more of them.
    ///
    /// # Errors
    /// Those of [`Self::sized`] and [`SlotFormat::of`].
    pub fn encoded(
        plan: &GroupPlan,
        device_bytes: u64,
        host: HostSize,
        codecs: &HostCodecs,
    ) -> Result<Self> {
        Self::with_slots(plan.block_bytes, device_bytes, host, SlotFormat::of(plan, codecs)?)
    }

    fn with_slots(
        block_bytes: usize,
        device_bytes: u64,
        host: HostSize,
        slots: SlotFormat,
    ) -> Result<Self> {
        let ids = |count: u64, what: &str| {
            u32::try_from(count).ok().filter(|n| *n <= i32::MAX as u32).ok_or_else(|| {
                Error::invalid(OP, format!("{count} {what} exceed 31-bit block ids"))
            })
        };
        if block_bytes == 0 || !block_bytes.is_multiple_of(128) {
            return Err(Error::invalid(
                OP,
                format!("{block_bytes} bytes per block are no positive multiple of 128"),
            ));
        }
        let num_blocks = ids(device_bytes / block_bytes as u64, "blocks")?;
        if num_blocks < 2 {
            return Err(Error::invalid(
                OP,
                format!(
                    "{device_bytes} bytes of device memory hold {num_blocks} blocks of {block_bytes} \
                     bytes; at least 2 are needed"
                ),
            ));
        }
        let stride = slots.stride(block_bytes);
        let num_slots = match host {
            HostSize::Ratio(ratio) if ratio.is_finite() && ratio >= 0.0 => {
                let as_is = SlotFormat::AS_IS.stride(block_bytes);
                // Saturating: what exceeds the ids is refused below.
                (ratio * num_blocks as f64 * (as_is as f64 / stride as f64)) as u64
            }
            HostSize::Ratio(ratio) => {
                return Err(Error::unsupported(OP, "host ratio", ratio, "finite numbers >= 0"));
            }
            HostSize::Bytes(bytes) => bytes / stride,
            HostSize::Fraction(fraction) if (0.0..=1.0).contains(&fraction) => {
                fraction_of_host(fraction)? / stride
            }
            HostSize::Fraction(fraction) => {
                return Err(Error::unsupported(OP, "host fraction", fraction, "0 to 1"));
            }
        };
        Ok(Self { block_bytes, num_blocks, num_slots: ids(num_slots, "host slots")?, slots })
    }

    /// Bytes of the device pool.
    pub fn device_bytes(&self) -> u64 {
        self.num_blocks as u64 * self.block_bytes as u64
    }

    /// Bytes of the host arena.
    pub fn host_bytes(&self) -> u64 {
        self.num_slots as u64 * self.slots.stride(self.block_bytes)
    }

    /// Bytes of a host slot that blocks use: the block size of a store below the host tier.
    pub fn slot_bytes(&self) -> usize {
        self.slots.slot_bytes(self.block_bytes)
    }

    /// How many times as many blocks the host tier holds as one that keeps them as they are.
    pub fn slot_ratio(&self) -> f64 {
        SlotFormat::AS_IS.stride(self.block_bytes) as f64
            / self.slots.stride(self.block_bytes) as f64
    }

    /// The host tier as the manager is told of it: write-through, every hit loaded.
    pub fn host(&self) -> HostConfig {
        HostConfig { codecs: self.slots.codecs(), ..HostConfig::new(self.num_slots) }
    }
}

pub(super) fn addressable(bytes: u64, kind: &'static str) -> Result<usize> {
    usize::try_from(bytes).map_err(|_| {
        let reason = "more than the address space".into();
        Error::new(OP, ErrorKind::OutOfMemory { kind, requested: bytes, reason })
    })
}

/// A part of what this process may have of the host, in bytes, if it is available.
fn fraction_of_host(fraction: f64) -> Result<u64> {
    let limits = host::describe_limits;
    let limit = host::limit_bytes().ok_or_else(|| {
        Error::invalid(OP, format!("the memory of the host is unknown ({}): say bytes", limits()))
    })?;
    let requested = (limit as f64 * fraction) as u64;
    match host::available_bytes() {
        Some(available) if requested > available => {
            let reason =
                format!("{fraction} of {limit} is more than the {available} left; {}", limits());
            Err(Error::new(OP, ErrorKind::OutOfMemory { kind: "pinned host", requested, reason }))
        }
        _ => Ok(requested),
    }
}
