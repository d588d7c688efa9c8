//! Counters, per layer group and tier.

use serde::Serialize;

use super::{BreakerState, Direction};

/// Counters of one group in one tier. All but the occupancy only grow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct TierStats {
    /// Blocks findable now.
    pub cached_blocks: u64,
    /// Blocks that became findable.
    pub stored_blocks: u64,
    /// Findable blocks dropped to make room.
    pub evicted_blocks: u64,
    /// Blocks that served hits of allocations.
    pub hit_blocks: u64,
}

/// Counters of the transfers of one direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct TransferStats {
    /// Emitted.
    pub started: u64,
    /// Ended with every byte in place.
    pub succeeded: u64,
    /// Ended otherwise.
    pub failed: u64,
}

/// Everything the manager counts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// Allocations that succeeded.
    pub allocations: u64,
    /// Allocations and appends refused for want of blocks.
    pub refused: u64,
    /// Prompt tokens of successful allocations.
    pub prompt_tokens: u64,
    /// Those of them that hit, over all tiers.
    pub hit_tokens: u64,
    /// Those of them that the device alone could serve.
    pub device_hit_tokens: u64,
    /// Those of them that device and host could serve.
    pub host_hit_tokens: u64,
    /// Offloads.
    pub offloads: TransferStats,
    /// Those of them that failed because the codec of the host tier cannot hold the block.
    pub offloads_unfit: u64,
    /// Offers to the host tier that found no slots and were put off.
    pub offloads_refused: u64,
    /// Blocks evicted from the device under [`WritePolicy::Back`] that the host could not take.
    ///
    /// [`WritePolicy::Back`]: super::WritePolicy::Back
    pub evictions_dropped: u64,
    /// Onboards.
    pub onboards: TransferStats,
    /// Transfers from the host to storage.
    pub persists: TransferStats,
    /// Transfers from storage to the host.
    pub fetches: TransferStats,
    /// Per group, the device tier.
    pub device: Vec<TierStats>,
    /// Per group, the host tier; empty without one.
    pub host: Vec<TierStats>,
    /// Per group, the storage tier; empty without one.
    pub storage: Vec<TierStats>,
    /// Whether the host tier is left alone; closed without one.
    pub host_breaker: BreakerState,
    /// Whether the storage tier is left alone; closed without one.
    pub storage_breaker: BreakerState,
}

impl Stats {
    /// The counters of one direction of transfers.
    pub(super) fn of(&mut self, direction: Direction) -> &mut TransferStats {
        match direction {
            Direction::Offload => &mut self.offloads,
            Direction::Onboard => &mut self.onboards,
            Direction::Persist => &mut self.persists,
            Direction::Fetch => &mut self.fetches,
        }
    }
}

/// Memory that the manager keeps for the blocks of one tier: keys, index, order and history.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct TierMetadata {
    /// Blocks that the tier can hold; 0 without one.
    pub blocks: usize,
    /// Bytes, whatever of the tier is in use: they are reserved with it.
    pub bytes: usize,
}

impl TierMetadata {
    /// Bytes per block; 0 without a tier.
    pub fn per_block(&self) -> f64 {
        self.bytes as f64 / self.blocks.max(1) as f64
    }
}

/// Memory that the manager keeps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Metadata {
    /// Of the device tier.
    pub device: TierMetadata,
    /// Of the host tier.
    pub host: TierMetadata,
    /// Of the storage tier.
    pub storage: TierMetadata,
    /// Bytes of the live sequences: tokens, their hashes and block tables, with the room these have to grow.
    pub sequences: usize,
}

/// How full the tiers are, in blocks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// Blocks of the device pool, without the null block.
    pub device_capacity: usize,
    /// Those that could be taken now, cached ones without a user included.
    pub device_free: usize,
    /// Those that tables of sequences hold or that are findable.
    pub device_used: usize,
    /// Per group, blocks that tables of sequences hold.
    pub device_live: Vec<usize>,
    /// Per group, findable blocks, in use or not.
    pub device_cached: Vec<usize>,
    /// Slots of the host tier; 0 without one.
    pub host_capacity: usize,
    /// Slots that hold or receive a block.
    pub host_used: usize,
    /// Slots that transfers use.
    pub host_pinned: usize,
    /// Per group, findable blocks; empty without a host tier.
    pub host_cached: Vec<usize>,
    /// Slots of the storage tier; 0 without one.
    pub storage_capacity: usize,
    /// Slots that hold or receive a block.
    pub storage_used: usize,
    /// Slots that transfers use, or loads that wait.
    pub storage_pinned: usize,
    /// Per group, findable blocks; empty without a storage tier.
    pub storage_cached: Vec<usize>,
}
