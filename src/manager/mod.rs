//! The manager: what lives where and what must move, as a pure state machine.
//!
//! It owns no memory, starts no thread, reads no clock and does no I/O. Callers drive it with
//! sequences; it answers with block ids, emits [`Transfer`]s and consumes their typed completions. All
//! meanings are those of docs/architecture.md; the safety rules R1 to R10 are kept here as far as they
//! are decisions, and by the engine as far as they are ordering on streams.

#[cfg(test)]
mod cases;

mod allocate;
mod branch;
mod events;
mod eviction;
mod groups;
mod grow;
mod hash;
mod inspect;
mod offload;
mod overlap;
mod pins;
mod pool;
mod preempt;
mod prefetch;
mod prefix;
mod prometheus;
mod quota;
mod ranks;
mod retention;
mod sequence;
mod states;
mod stats;
mod storage;
mod table;
mod tiers;
mod transfer;

use std::collections::{HashSet, VecDeque};

pub use self::branch::{BlockCopy, Cut};
pub use self::events::{Event, EventKind, Tier};
pub use self::eviction::Eviction;
pub use self::hash::{BlockHash, HashedTokens};
pub use self::pins::{Pin, PinId};
pub use self::preempt::Preemption;
pub use self::prefetch::Prefetch;
pub use self::quota::Quota;
pub use self::ranks::{Rank, RankSet, Report};
pub use self::states::StateStep;
pub use self::stats::{Metadata, Stats, TierMetadata, TierStats, TransferStats, Usage};
pub use self::tiers::{
    BreakerConfig, BreakerState, Candidate, CostModel, HostConfig, PrefetchPolicy, StorageConfig,
    StoredBlock, WritePolicy,
};
pub use self::transfer::{Direction, Path, Place, Transfer};

use self::allocate::{cache, check_room};
use self::events::Events;
use self::groups::Group;
use self::hash::CheapMap;
use self::offload::{offer, vouch};
use self::overlap::{check_loaded, check_runs};
use self::pins::Pins;
use self::pool::{Block, NULL, Pool};
use self::preempt::Preempted;
use self::prefetch::Prefetches;
use self::quota::Tenants;
use self::retention::{Boundaries, Policy};
use self::sequence::{Inherited, Row, Sequence};
use self::storage::Fetches;
use self::tiers::device::DeviceTier;
use self::tiers::slots::SlotTier;
use self::transfer::Flights;
use crate::error::{Error, ErrorKind, Result};
use crate::spec::{GroupKind, GroupPlan, LayerGroup, StateGroup};

/// A caller-chosen name of a live sequence.
pub type SeqId = u64;
/// Index of a block in the device pool; 0 is the null block, which never holds data.
pub type BlockId = u32;
/// Index of a block-sized slot in the host tier.
pub type HostSlot = u32;
/// Index of a block-sized slot in the storage tier.
pub type StorageSlot = u32;
/// Name of one transfer; never reused.
pub type TransferId = u64;

/// One layer group as the manager sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupConfig {
    /// What it keeps of a sequence.
    pub kind: GroupKind,
    /// Sink tokens: their blocks are kept, cached and required for a hit. States have none.
    pub sink_tokens: u32,
    /// Tokens per block; of a state group, tokens between the places where a state can be kept.
    pub block_size: u32,
}

impl GroupConfig {
    /// A group without sinks.
    pub fn new(kind: impl Into<GroupKind>, block_size: u32) -> Self {
        Self { kind: kind.into(), sink_tokens: 0, block_size }
    }

    /// The groups of a plan, in its order: attention first, then states.
    pub fn of(plan: &GroupPlan) -> Vec<Self> {
        plan.groups.iter().map(Self::from).chain(plan.states.iter().map(Self::from)).collect()
    }

    /// Most blocks a request of `tokens` holds at once in this group when at most `in_flight` of them are
    /// computed and not settled. The block size is at least 1.
    pub(crate) fn max_blocks(&self, tokens: usize, in_flight: usize) -> usize {
        let retention = Retention::default();
        Group::new(self, self.block_size as usize).max_blocks(tokens, in_flight, &retention)
    }
}

impl From<&StateGroup> for GroupConfig {
    fn from(group: &StateGroup) -> Self {
        Self::new(GroupKind::State, group.block_size)
    }
}

impl From<&LayerGroup> for GroupConfig {
    fn from(group: &LayerGroup) -> Self {
        Self {
            kind: group.kind.into(),
            sink_tokens: group.sink_tokens,
            block_size: group.block_size,
        }
    }
}

/// Which window tails and old chunks stay cached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// `None`: every aligned boundary (dense); `Some(0)`: only the replay boundary and junctions;
    /// `Some(k)`: also one tail every `k` tokens.
    pub interval: Option<u32>,
    /// What is kept to the left of every retained tail.
    pub slack: Slack,
    /// Whether old chunks stay cached densely, like a full group's blocks.
    pub dense_chunks: bool,
    /// Whether the end of every sequence, generated tokens included, is a retained boundary, too. What is
    /// generated is then findable as it is filled; what leaves the window before the end, and no other boundary
    /// needs, is reused first. Recurrent states have no such boundary.
    pub ends: bool,
}

/// How much more than a tail is kept, so that a prompt that leaves the cached one a little before the boundary
/// still hits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Slack {
    /// So many alignment units, in every group that keeps tails.
    Units(u32),
    /// What suits the kind of the group: half a window, or 32 alignment units where that is more; one alignment
    /// unit of states; nothing of chunks, whose tails serve every shorter hit in the chunk as they are.
    #[default]
    ByKind,
}

impl Slack {
    /// States kept to the left of every boundary.
    pub(crate) fn states(self) -> usize {
        match self {
            Self::Units(n) => n as usize,
            Self::ByKind => 1,
        }
    }
}

impl Retention {
    /// Everything that an aligned hit can need, chunks densely: what vLLM keeps when it is not told otherwise.
    pub fn dense() -> Self {
        Self { interval: None, slack: Slack::Units(0), dense_chunks: true, ends: false }
    }
}

impl Default for Retention {
    /// Sparse: the replay boundary, junctions and the end of the sequence, with slack by kind.
    fn default() -> Self {
        Self { interval: Some(0), slack: Slack::ByKind, dense_chunks: false, ends: true }
    }
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
    /// Which cached block without a user is reused first.
    pub eviction: Eviction,
    /// Longest sequence.
    pub max_model_len: u32,
    /// Tokens that may be computed and not yet settled (all steps in flight together).
    pub in_flight_tokens: u32,
    /// The host tier, if there is one.
    pub host: Option<HostConfig>,
    /// Identity of model, revision, dtype, codec, block size, head shapes, layout, rope: seeds the hashes. See
    /// [`GroupPlan::identity`].
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
    /// Tokens every group can serve from device and host.
    pub host_tokens: usize,
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
    /// The part of them that is on the device or on the host.
    pub host_hit_tokens: usize,
    /// Per group, blocks newly taken from the pool (targets of loads included).
    pub new_blocks: Vec<Vec<BlockId>>,
    /// Tokens that have slots: all, or those up to the budget of [`Manager::allocate_prefill`].
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The copy ended without an error. Whoever can verify the bytes says `Failed` when they are wrong.
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
    /// A load of the sequence failed and the pool has no blocks for what would have to be computed again:
    /// the sequence has been freed, and can be allocated again later.
    Dropped {
        /// The sequence.
        seq: SeqId,
    },
    /// A load of the sequence failed, and its steps ran behind its loads (see [`Manager::overlap`]): everything
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

/// The state machine. See the module documentation.
pub struct Manager {
    config: ManagerConfig,
    groups: Vec<Group>,
    policy: Policy,
    /// Tokens per hashed unit, the greatest common divisor of the block sizes; 0 without prefix caching.
    hash_block: usize,
    device: DeviceTier,
    host: Option<SlotTier>,
    storage: Option<SlotTier>,
    storage_config: Option<StorageConfig>,
    cost: Option<CostModel>,
    fetches: Fetches,
    prefetches: Prefetches,
    /// Host slots whose blocks are to go to storage.
    to_persist: VecDeque<HostSlot>,
    /// What became of sequences, to be told.
    told: VecDeque<Completion>,
    /// Nanoseconds, as last told.
    now: u64,
    sequences: CheapMap<SeqId, Sequence>,
    preempted: CheapMap<SeqId, Preempted>,
    pins: Pins,
    tenants: Tenants,
    generation: u64,
    flights: Flights,
    copies: VecDeque<BlockCopy>,
    /// Blocks that write-back looks at, with their place in line: kept for its memory.
    cleaning: Vec<(usize, BlockId)>,
    events: Events,
    stats: Stats,
}

impl Manager {
    /// A manager over an empty pool.
    ///
    /// # Errors
    /// Refuses a window or chunk of 0, a block size out of range, a retention interval that is no multiple
    /// of the alignment, a pool without usable blocks, a pool too small for one request of
    /// `max_model_len`.
    pub fn new(config: ManagerConfig) -> Result<Self> {
        let manager = Self::oversubscribed(config)?;
        let tokens = manager.config.max_model_len as usize;
        let (needed, capacity) = (manager.max_blocks(tokens), manager.capacity());
        if needed > capacity {
            return Err(Error::new(
                "manager",
                ErrorKind::PoolTooSmall { tokens, needed, capacity },
            ));
        }
        Ok(manager)
    }

    /// Like [`Self::new`], whatever `max_model_len` is: requests that the pool cannot hold are refused when
    /// they come.
    ///
    /// # Errors
    /// The others of [`Self::new`].
    pub fn oversubscribed(config: ManagerConfig) -> Result<Self> {
        const OP: &str = "manager";
        let (unit, alignment) = check_groups(OP, &config.groups)?;
        if config.max_model_len == 0 {
            return Err(Error::invalid(OP, "max_model_len is 0"));
        }
        if let Some(interval) = config.retention.interval
            && !(interval as usize).is_multiple_of(alignment)
        {
            return Err(Error::invalid(
                OP,
                format!(
                    "retention interval {interval} is no multiple of the alignment {alignment}"
                ),
            ));
        }
        if config.num_blocks < 2 {
            return Err(Error::invalid(
                OP,
                format!("a pool of {} blocks has none besides the null block", config.num_blocks),
            ));
        }
        if config.host.is_some() && !config.prefix_caching {
            return Err(Error::invalid(OP, "a host tier needs prefix caching"));
        }
        if let Some(host) = &config.host {
            host.check(OP)?;
        }
        let groups: Vec<Group> = config.groups.iter().map(|g| Group::new(g, unit)).collect();
        Ok(Self {
            policy: Policy::new(config.retention, alignment, &groups),
            hash_block: if config.prefix_caching { unit } else { 0 },
            device: DeviceTier::new(Pool::new(config.num_blocks, config.eviction), groups.len()),
            host: config.host.map(|host| {
                SlotTier::new(Tier::Host, host.num_slots, groups.len(), host.eviction, host.breaker)
            }),
            storage: None,
            storage_config: None,
            cost: None,
            fetches: Fetches::default(),
            prefetches: Prefetches::default(),
            to_persist: VecDeque::new(),
            told: VecDeque::new(),
            now: 0,
            sequences: CheapMap::default(),
            preempted: CheapMap::default(),
            pins: Pins::default(),
            tenants: Tenants::default(),
            generation: 0,
            flights: Flights::default(),
            copies: VecDeque::new(),
            cleaning: Vec::new(),
            events: Events::default(),
            stats: Stats::default(),
            groups,
            config,
        })
    }

    /// Says that the work computing the first `computed` tokens has been submitted and that of the first
    /// `settled` has finished on the device. Offers computed blocks to the host tier, frees what fell out
    /// of the windows of settled tokens (R4). Gives the blocks that left the table, per group, the later
    /// first.
    ///
    /// # Errors
    /// `UnknownSequence`; `InvalidArgument` for values that decrease, `settled` beyond `computed`,
    /// `computed` beyond the tokens given; nothing is changed.
    pub fn advance(
        &mut self,
        seq: SeqId,
        computed: usize,
        settled: usize,
    ) -> Result<Vec<Vec<BlockId>>> {
        let mut freed = vec![Vec::new(); self.groups.len()];
        self.advance_with(seq, computed, settled, |g, id| freed[g].push(id))?;
        Ok(freed)
    }

    /// [`Self::advance`] that gives every block that left the table, with its group, to `freed_block`
    /// instead of collecting them.
    pub fn advance_with(
        &mut self,
        seq: SeqId,
        computed: usize,
        settled: usize,
        mut freed_block: impl FnMut(usize, BlockId),
    ) -> Result<()> {
        const OP: &str = "advance";
        let Some(sequence) = self.sequences.get_mut(&seq) else {
            return Err(Error::new(OP, ErrorKind::UnknownSequence(seq)));
        };
        if computed < sequence.computed || settled < sequence.settled {
            return Err(Error::invalid(
                OP,
                format!(
                    "computed {computed}, settled {settled} go back from {}, {}",
                    sequence.computed, sequence.settled
                ),
            ));
        }
        if settled > computed || computed > sequence.tokens.len() {
            return Err(Error::invalid(
                OP,
                format!(
                    "settled {settled} <= computed {computed} <= tokens {} does not hold",
                    sequence.tokens.len()
                ),
            ));
        }
        check_runs(OP, seq, sequence)?;
        sequence.begun |= computed > sequence.computed;
        sequence.computed = computed;
        sequence.settled = settled;
        if sequence.loading > 0 {
            // On trial: it is published and freed once its loads have succeeded.
            return Ok(());
        }
        self.events.seal();
        if sequence.repaired {
            cache(&self.groups, &self.policy, &mut self.device, &mut self.events, sequence);
            sequence.repaired = computed < sequence.tokens.len();
        }
        if let (Some(host), Some(config)) = (&mut self.host, &self.config.host) {
            let (flights, stats) = (&mut self.flights, &mut self.stats);
            let events = &mut self.events;
            let to_persist = &mut self.to_persist;
            let (groups, policy, device) = (&self.groups, &self.policy, &mut self.device);
            let parts = (flights, events, stats, &mut *to_persist);
            offer(groups, policy, config, device, host, parts, sequence);
            vouch(&self.groups, &mut self.device, host, to_persist, sequence, settled);
        }
        for (g, group) in self.groups.iter().enumerate() {
            let table = &sequence.rows[g].table;
            let leaving = table.leaving(group.first_needed(settled));
            if !leaving.is_empty() {
                let left = leaving.clone().rev().map(|b| table.get(b));
                left.filter(|&id| id != NULL).for_each(|id| freed_block(g, id));
                let (groups, pool) = (&self.groups, &mut self.device.pool);
                self.policy.release(groups, pool, sequence, g, leaving.clone());
                sequence.rows[g].table.leave(leaving);
            }
        }
        self.pump_persists();
        Ok(())
    }

    /// Ends a sequence; its cached blocks stay findable until they are reused. All its tokens count as
    /// submitted: one whose work will not be done is to be aborted instead.
    pub fn free(&mut self, seq: SeqId) -> Result<()> {
        if self.drop_preempted(seq) {
            return Ok(());
        }
        let Some(mut sequence) = self.sequences.remove(&seq) else {
            return Err(Error::new("free", ErrorKind::UnknownSequence(seq)));
        };
        if let Some(inherited) = sequence.inherited {
            // Who was forked from it counts on what it had not finished of its parent's.
            let of = self.sequences.values_mut().filter_map(|other| other.inherited.as_mut());
            for other in of.filter(|other| other.from == sequence.generation) {
                let tokens = other.tokens.min(inherited.tokens);
                *other = Inherited { tokens, ..inherited };
            }
        }
        self.policy.end(&self.groups, &mut sequence);
        if let (Some(host), Some(config)) = (&mut self.host, &self.config.host) {
            if sequence.boundaries.end > 0 {
                self.events.seal();
                let (flights, stats) = (&mut self.flights, &mut self.stats);
                let (groups, policy, device) = (&self.groups, &self.policy, &mut self.device);
                let parts = (flights, &mut self.events, stats, &mut self.to_persist);
                offer(groups, policy, config, device, host, parts, &mut sequence);
            }
            let (to_persist, computed) = (&mut self.to_persist, sequence.computed);
            vouch(&self.groups, &mut self.device, host, to_persist, &mut sequence, computed);
        }
        self.policy.release_all(&self.groups, &mut self.device.pool, &sequence);
        // Its copies in lower tiers become recent, the start of the sequence most of all.
        for tier in self.host.iter_mut().chain(&mut self.storage) {
            for (g, (group, row)) in self.groups.iter().zip(&sequence.rows).enumerate() {
                for &b in row.stored.iter().rev() {
                    let hash = &sequence.tokens.hashes()[group.key_index(b as usize)];
                    if let Some(slot) = tier.slot_of(g, hash) {
                        tier.released(slot);
                    }
                }
            }
        }
        self.pump();
        Ok(())
    }

    /// Ends a sequence whose step failed: blocks that hold tokens which are not settled are not findable
    /// any more. Gives the other sequences that hit such blocks or were
    /// forked from such tokens: what they computed from them is void, so they are to be aborted, too.
    pub fn abort(&mut self, seq: SeqId) -> Result<Vec<SeqId>> {
        // A preempted sequence has no steps that could fail.
        if self.drop_preempted(seq) {
            return Ok(Vec::new());
        }
        let Some(sequence) = self.sequences.get(&seq) else {
            return Err(Error::new("abort", ErrorKind::UnknownSequence(seq)));
        };
        self.events.seal();
        // What a forked sequence began with is its parent's work.
        let inherited = sequence.inherited.map_or(0, |inherited| inherited.tokens);
        let finished = sequence.settled.max(inherited);
        let len = sequence.tokens.len();
        let mut shared = HashSet::new();
        for (g, (group, row)) in self.groups.iter().zip(&sequence.rows).enumerate() {
            // The blocks of its unfinished tokens.
            let unsettled = row.table.indices_from(finished / group.block_size);
            let blocks = unsettled.filter(|_| finished < len).map(|b| row.table.get(b));
            for id in blocks.filter(|&id| id != NULL) {
                let block = *self.device.pool.block(id);
                if block.users > 1 {
                    shared.insert(id);
                }
                if block.cached {
                    self.device.remove(id);
                    let Block { index, hash, .. } = block;
                    self.events.push(EventKind::Removed, g as u32, Tier::Device, index, hash);
                }
            }
            if let Some(host) = &mut self.host {
                // Whoever had them stored.
                for b in finished / group.block_size..sequence.computed / group.block_size {
                    if let Some(hash) = sequence.tokens.hashes().get(group.key_index(b)) {
                        host.disown(g, hash, &mut self.events);
                    }
                }
            }
        }
        // A fork may have copied unsettled tokens into a block of its own.
        let (generation, settled) = (sequence.generation, sequence.settled);
        let inherits = |other: &Sequence| {
            other.inherited.is_some_and(|inherited| {
                inherited.from == generation && inherited.tokens > settled.max(other.settled)
            }) && settled < len
        };
        let mut dependents = self.holders(seq, &shared, finished);
        dependents.extend(self.sequences.iter().filter(|(_, s)| inherits(s)).map(|(&id, _)| id));
        dependents.sort_unstable();
        dependents.dedup();
        self.free(seq)?;
        Ok(dependents)
    }

    /// Gives everything that a sequence has cached up to now a priority of at least `priority` (0 at first; 31
    /// and more are one), which [`Eviction::Priority`] goes by, in every tier that has it.
    ///
    /// # Errors
    /// `UnknownSequence`.
    pub fn prioritize(&mut self, seq: SeqId, priority: u8) -> Result<()> {
        let Some(sequence) = self.sequences.get(&seq) else {
            return Err(Error::new("prioritize", ErrorKind::UnknownSequence(seq)));
        };
        for (g, row) in sequence.rows.iter().enumerate() {
            for id in row.table.ids() {
                self.device.pool.order.raise(id, priority);
                let block = self.device.pool.block(id);
                for tier in self.host.iter_mut().chain(&mut self.storage).filter(|_| block.cached) {
                    if let Some(slot) = tier.slot_of(g, &block.hash) {
                        tier.raise(slot, priority);
                    }
                }
            }
        }
        Ok(())
    }

    /// The live blocks of a sequence in a group.
    pub fn block_row(&self, seq: SeqId, group: usize) -> Result<BlockRow<'_>> {
        const OP: &str = "block row";
        let table = &self.row(OP, seq, group)?.0.table;
        Ok(BlockRow {
            sinks: table.sinks(),
            live: table.live(),
            first_block: table.first() as u32,
            blocks: table.len() as u32,
        })
    }

    /// Block ids of all token positions of a group's table, 0 at freed and skipped positions: as long as the
    /// sequence, where [`Self::block_row`] has what is live alone.
    pub fn table(&self, seq: SeqId, group: usize) -> Result<Vec<BlockId>> {
        Ok(self.row("table", seq, group)?.0.table.to_vec())
    }

    /// Drops block `index` of a sequence's table from the prefix index; it is not cached again. No change
    /// when it is not cached.
    pub fn forget(&mut self, seq: SeqId, group: usize, index: usize) -> Result<()> {
        let (row, _) = self.row("forget", seq, group)?;
        let id = row.table.get(index);
        let block = *self.device.pool.block(id);
        if block.cached {
            self.device.remove(id);
            self.events.seal();
            let Block { index, hash, .. } = block;
            self.events.push(EventKind::Removed, group as u32, Tier::Device, index, hash);
        }
        Ok(())
    }

    /// Empties the prefix index of every tier; `false`, with nothing changed, while a block is in use. A
    /// storage tier is detached: clear its store, and attach it again.
    pub fn reset_prefix_cache(&mut self) -> bool {
        if self.device.pool.available() < self.capacity() {
            return false;
        }
        self.device.clear();
        self.cancel_prefetches();
        self.detach_storage();
        self.to_persist.clear();
        for g in 0..self.groups.len() as u32 {
            self.events.cleared(g, Tier::Device);
        }
        if let Some(host) = &mut self.host {
            host.clear(&mut self.events);
        }
        self.empty_pins(Tier::Host);
        true
    }

    fn row(&self, op: &'static str, seq: SeqId, group: usize) -> Result<(&Row, &Group)> {
        let Some(sequence) = self.sequences.get(&seq) else {
            return Err(Error::new(op, ErrorKind::UnknownSequence(seq)));
        };
        match (sequence.rows.get(group), self.groups.get(group)) {
            (Some(row), Some(rule)) => Ok((row, rule)),
            _ => Err(Error::invalid(
                op,
                format!("group {group} does not exist: there are {}", self.groups.len()),
            )),
        }
    }
}

/// Checks the groups; gives the greatest common divisor and the least common multiple of their block
/// sizes.
fn check_groups(op: &'static str, groups: &[GroupConfig]) -> Result<(usize, usize)> {
    const MAX_GROUPS: usize = u16::MAX as usize;
    const MAX_BLOCK_SIZE: u32 = 1 << 16;
    if groups.is_empty() || groups.len() > MAX_GROUPS {
        return Err(Error::unsupported(
            op,
            "a number of layer groups of",
            groups.len(),
            format!("1 to {MAX_GROUPS}"),
        ));
    }
    let (mut unit, mut alignment) = (0usize, 1usize);
    for group in groups {
        if group.block_size == 0 || group.block_size > MAX_BLOCK_SIZE {
            return Err(Error::unsupported(
                op,
                "block_size",
                group.block_size,
                format!("1 to {MAX_BLOCK_SIZE}"),
            ));
        }
        group.kind.check(op)?;
        if group.kind == GroupKind::State && group.sink_tokens > 0 {
            return Err(Error::invalid(op, "a group of recurrent states has no sink tokens"));
        }
        let block_size = group.block_size as usize;
        unit = gcd(unit, block_size);
        alignment = (alignment / gcd(alignment, block_size))
            .checked_mul(block_size)
            .filter(|&a| a <= u32::MAX as usize)
            .ok_or_else(|| Error::invalid(op, "the block sizes have no common multiple"))?;
    }
    Ok((unit, alignment))
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}
