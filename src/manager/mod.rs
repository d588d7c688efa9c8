//! The manager: what lives where and what must move, as a pure state machine.
//!
//! It owns no memory, starts no thread, reads no clock and does no I/O. Callers drive it with
//! sequences; it answers with block ids, emits [`Transfer`]s and consumes their typed completions. All
//! meanings are those of docs/architecture.md; the safety rules R1 to R10 are kept here as far as they
//! are decisions, and by the engine as far as they are ordering on streams.

use crate::error::Result;
use crate::spec::AttentionKind;

/// A caller-chosen name of a live sequence.
pub type SeqId = u64;
/// Index of a block in the device pool; 0 is the null block, which never holds data.
pub type BlockId = u32;
/// Index of a block-sized slot in the host tier.
pub type HostSlot = u32;
/// Name of one transfer; never reused.
pub type TransferId = u64;

/// One layer group as the manager sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupConfig {
    /// What its layers' queries see.
    pub kind: AttentionKind,
    /// Sink tokens: their blocks are kept, cached and required for a hit.
    pub sink_tokens: u32,
    /// Tokens per block.
    pub block_size: u32,
}

/// The host tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostConfig {
    /// Block-sized slots.
    pub num_slots: u32,
}

/// Which window tails and old chunks stay cached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// `None`: every aligned boundary (dense); `Some(0)`: only the replay boundary and junctions;
    /// `Some(k)`: also one tail every `k` tokens.
    pub interval: Option<u32>,
    /// Alignment units kept to the left of every retained tail.
    pub slack: u32,
    /// Whether old chunks stay cached densely, like a full group's blocks.
    pub dense_chunks: bool,
}

/// Everything the manager is built from.
#[derive(Debug, Clone)]
pub struct ManagerConfig {
    /// Layer groups, full attention first.
    pub groups: Vec<GroupConfig>,
    /// Blocks of the device pool, the null block included.
    pub num_blocks: u32,
    /// Whether full blocks are found again by later sequences.
    pub prefix_caching: bool,
    /// Which windowed blocks stay cached.
    pub retention: Retention,
    /// Longest sequence.
    pub max_model_len: u32,
    /// Tokens that may be computed and not yet settled (all steps in flight together).
    pub in_flight_tokens: u32,
    /// The host tier, if there is one (write-through, LRU).
    pub host: Option<HostConfig>,
    /// Identity of model, revision, dtype, codec, block size, head shapes, layout, rope: seeds the hashes.
    pub identity: [u8; 32],
}

/// Typed extra keys of a prefix; framed, so that they cannot collide with one another.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ExtraKeys<'a> {
    /// Tenant isolation.
    pub salt: &'a str,
    /// LoRA adapter.
    pub lora: &'a str,
}

/// What a lookup found. A probe: nothing is pinned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hit {
    /// Tokens every group can serve, over all tiers.
    pub tokens: usize,
    /// Tokens every group can serve from the device alone.
    pub device_tokens: usize,
    /// Per group, `tokens / block_size` device block ids; 0 where a block is not needed or not on the device.
    pub blocks: Vec<Vec<BlockId>>,
}

/// What an allocation gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allocation {
    /// Tokens that need not be computed, once every load has succeeded.
    pub hit_tokens: usize,
    /// The part of them that is on the device already.
    pub device_hit_tokens: usize,
    /// Per group, blocks newly taken from the pool (targets of loads included).
    pub new_blocks: Vec<Vec<BlockId>>,
    /// Transfers that must complete before the sequence is ready; empty when it is ready now.
    pub loads: Vec<TransferId>,
}

/// Which way a transfer goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Device to host. Starts after the work that wrote the block (already submitted when emitted) and
    /// keeps the block until it completes (R2).
    Offload,
    /// Host to device. Starts after all work submitted so far, which may still read or write the target
    /// (R3); pins slot and block until it completes (R1).
    Onboard,
}

/// One block to move. Emitted once; must be answered once by [`Manager::complete`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transfer {
    /// Its name.
    pub id: TransferId,
    /// Which way.
    pub direction: Direction,
    /// Layer group of the block.
    pub group: u32,
    /// Block of the device pool.
    pub block: BlockId,
    /// Slot of the host tier.
    pub slot: HostSlot,
    /// The sequence waiting for an onboard.
    pub seq: Option<SeqId>,
}

/// How a transfer ended. *Completed* and *succeeded* are different things (R8).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// Every byte arrived and was verified.
    Succeeded,
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
}

/// One sequence's live blocks of one group, as attention needs them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockRow {
    /// Sink blocks, then live blocks from `first_block` on.
    pub ids: Vec<BlockId>,
    /// Absolute index of the first live block after the sinks.
    pub first_block: u32,
}

/// The state machine. See the module documentation.
pub struct Manager {
    _private: (),
}

impl Manager {
    /// A manager over an empty pool.
    ///
    /// # Errors
    /// Refuses a window or chunk of 0, a block size out of range, a pool without usable blocks, a pool
    /// too small for one request of `max_model_len`.
    pub fn new(_config: ManagerConfig) -> Result<Self> {
        todo!()
    }

    /// The longest prefix of `tokens` that every group could serve now (at most all but the last token).
    pub fn lookup(&self, _tokens: &[u32], _keys: ExtraKeys<'_>) -> Hit {
        todo!()
    }

    /// Looks up and pins in one act (R1), then takes blocks for all of `tokens` plus `lookahead` slots:
    /// everything or nothing (R6).
    pub fn allocate(
        &mut self,
        _seq: SeqId,
        _tokens: &[u32],
        _keys: ExtraKeys<'_>,
        _lookahead: usize,
    ) -> Result<Allocation> {
        todo!()
    }

    /// Adds tokens to a sequence; gives the newly taken blocks per group, or changes nothing.
    pub fn append(&mut self, _seq: SeqId, _tokens: &[u32]) -> Result<Vec<Vec<BlockId>>> {
        todo!()
    }

    /// Says that the work computing the first `computed` tokens has been submitted and that of the first
    /// `settled` has finished on the device. Offers computed blocks to the host tier, frees what fell out
    /// of the windows of settled tokens (R4). Gives the blocks that left the table, per group.
    pub fn advance(
        &mut self,
        _seq: SeqId,
        _computed: usize,
        _settled: usize,
    ) -> Result<Vec<Vec<BlockId>>> {
        todo!()
    }

    /// Ends a sequence; its cached blocks stay findable until they are reused.
    pub fn free(&mut self, _seq: SeqId) -> Result<()> {
        todo!()
    }

    /// Ends a sequence whose step failed: blocks that were not computed are not findable any more.
    pub fn abort(&mut self, _seq: SeqId) -> Result<()> {
        todo!()
    }

    /// The next transfer to start, in order; `None` when there is none.
    pub fn next_transfer(&mut self) -> Option<Transfer> {
        todo!()
    }

    /// Takes the answer to a transfer.
    ///
    /// # Errors
    /// `UnknownTransfer` for one that is not outstanding (R10); nothing is changed.
    pub fn complete(&mut self, _id: TransferId, _outcome: Outcome) -> Result<Completion> {
        todo!()
    }

    /// The live blocks of a sequence in a group.
    pub fn block_row(&self, _seq: SeqId, _group: usize) -> Result<BlockRow> {
        todo!()
    }

    /// Block ids of all token positions of a group's table, 0 at freed and skipped positions.
    pub fn table(&self, _seq: SeqId, _group: usize) -> Result<&[BlockId]> {
        todo!()
    }
}
