//! What a manager says of a prompt, a sequence, a request or a transfer.

use super::pool::NULL;
use super::{BlockId, SeqId, TransferId};

/// What a lookup found. A probe: nothing is pinned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hit {
    /// Tokens every group can serve, over all tiers.
    pub tokens: usize,
    /// Tokens every group can serve from the device alone.
    pub device_tokens: usize,
    /// Tokens every group can serve from device and host.
    pub host_tokens: usize,
    /// Per group, device block ids of all blocks that the tokens reach into, the last one perhaps with its front alone; 0 where a block is not needed or not on the device.
    pub blocks: Vec<Vec<BlockId>>,
}

/// What an allocation gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allocation {
    /// Tokens that need not be computed, once every load has succeeded.
    pub hit_tokens: usize,
    /// The part of them that is on the device already.
    pub device_hit_tokens: usize,
    /// The part of them that is on the device or on the host.
    pub host_hit_tokens: usize,
    /// Per group, blocks newly taken from the pool (targets of loads included).
    pub new_blocks: Vec<Vec<BlockId>>,
    /// Tokens that have slots: all, or those up to the budget of [`Manager::allocate_prefill`](super::Manager::allocate_prefill).
    pub num_tokens: usize,
    /// Transfers that must complete before the sequence is ready; empty when it is ready now.
    pub loads: Vec<TransferId>,
}

/// What it takes to admit a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admission {
    /// Blocks that it and all that runs may still take at most.
    pub needed: usize,
    /// Blocks that could be taken now.
    pub free: usize,
}

impl Admission {
    /// Whether everything can run to its end.
    pub fn fits(&self) -> bool {
        self.needed <= self.free
    }
}

/// How a transfer ended. *Completed* and *succeeded* are different things (R8).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Outcome {
    /// The copy ended without an error. Whoever can verify the bytes says `Failed` when they are wrong.
    Succeeded,
    /// The codec of the tier cannot hold the block, so that nothing was stored. Nothing is wrong with the tier.
    Unfit,
    /// It ended, and what it wrote must not be used.
    Failed,
}

/// What a completion changed for a waiting sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Completion {
    /// No sequence became ready by it.
    Pending,
    /// All loads of the sequence have ended; this many tokens are valid (fewer than the hit when a load
    /// failed: the rest is to be computed).
    Ready {
        /// The sequence.
        seq: SeqId,
        /// Valid tokens from the start.
        valid_tokens: usize,
    },
    /// A load of the sequence failed and the pool has no blocks for what would have to be computed again:
    /// the sequence has been freed, and can be allocated again later.
    Dropped {
        /// The sequence.
        seq: SeqId,
    },
    /// A load of the sequence failed, and its steps ran behind its loads (see [`Manager::overlap`](super::Manager::overlap)): everything
    /// that it has computed since it was allocated is void, steps in flight and tokens put out included. The
    /// sequence has been freed, and can be allocated again.
    Void {
        /// The sequence.
        seq: SeqId,
    },
}

/// One sequence's live blocks of one group, as attention needs them: the row of a block table is `sinks`
/// followed by `live`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockRow<'a> {
    /// The sink blocks.
    pub sinks: &'a [BlockId],
    /// The live blocks after the sinks, from `first_block` on.
    pub live: &'a [BlockId],
    /// Absolute index of the first live block after the sinks.
    pub first_block: u32,
    /// Blocks of all positions, freed and skipped ones included.
    pub blocks: u32,
}

impl BlockRow<'_> {
    /// The block at an absolute index; `None` where there is none.
    pub fn get(&self, index: usize) -> Option<BlockId> {
        let live = || self.live.get(index.checked_sub(self.first_block as usize)?);
        self.sinks.get(index).or_else(live).copied().filter(|&id| id != NULL)
    }
}
