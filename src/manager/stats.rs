//! Counters, per layer group and tier.

/// Counters of one group in one tier. All but the occupancy only grow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
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
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TransferStats {
    /// Emitted.
    pub started: u64,
    /// Ended with every byte in place.
    pub succeeded: u64,
    /// Ended otherwise.
    pub failed: u64,
}

/// Everything the manager counts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
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
    /// Offloads.
    pub offloads: TransferStats,
    /// Offloads that did not happen because no host slot could be had.
    pub offloads_skipped: u64,
    /// Onboards.
    pub onboards: TransferStats,
    /// Per group, the device tier.
    pub device: Vec<TierStats>,
    /// Per group, the host tier; empty without one.
    pub host: Vec<TierStats>,
}
