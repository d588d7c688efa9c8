//! The manager: what lives where and what must move, as a pure state machine.
//!
//! It owns no memory, starts no thread, reads no clock and does no I/O. Callers drive it with
//! sequences; it answers with block ids, emits [`Transfer`]s and consumes their typed completions. All
//! meanings are those of docs/architecture.md; the safety rules R1 to R10 are kept here as far as they
//! are decisions, and by the engine as far as they are ordering on streams.

#[cfg(test)]
mod cases;

mod allocate;
mod answers;
mod branch;
mod config;
mod events;
mod eviction;
mod fronts;
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

pub use self::answers::{Admission, Allocation, BlockRow, Completion, Hit, Outcome};
pub use self::branch::{BlockCopy, Cut};
pub use self::config::{GroupConfig, ManagerConfig, Retention, Slack};
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
use self::config::{Units, check_groups};
use self::events::Events;
use self::groups::Group;
use self::hash::CheapMap;
use self::offload::{offer, vouch};
use self::overlap::{check_loaded, check_runs};
use self::pins::Pins;
use self::pool::{NULL, Pool};
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
use crate::spec::GroupKind;

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

/// Typed extra keys of a prefix; framed, so that they cannot collide with one another.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ExtraKeys<'a> {
    /// Tenant isolation.
    pub salt: &'a str,
    /// LoRA adapter.
    pub lora: &'a str,
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
        let fronts = config.retention.fronts && config.prefix_caching;
        let Units { hashed: unit, alignment, whole_blocks } =
            check_groups(OP, &config.groups, fronts)?;
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
        let groups: Vec<Group> =
            config.groups.iter().map(|g| Group::new(g, unit, alignment)).collect();
        let fronts = groups.iter().map(Group::fronts_per_block).max().unwrap_or(0);
        let places = (1 + fronts as u64) * u64::from(config.num_blocks);
        if places > u64::from(u32::MAX) {
            return Err(Error::unsupported(
                OP,
                "a number of blocks and of their fronts of",
                places,
                format!("up to {}; retention without fronts has fewer", u32::MAX),
            ));
        }
        if let Some(host) = &config.host {
            host.check(OP, &groups)?;
        }
        Ok(Self {
            policy: Policy::new(config.retention, alignment, whole_blocks, &groups),
            hash_block: if config.prefix_caching { unit } else { 0 },
            device: DeviceTier::new(
                Pool::new(config.num_blocks, config.eviction),
                groups.len(),
                fronts,
            ),
            host: config.host.as_ref().map(|host| host.tier(groups.len())),
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
            let (groups, policy, device) = (&self.groups, &self.policy, &mut self.device);
            let parts = (flights, &mut self.events, stats, &mut self.to_persist);
            offer(groups, policy, config, device, host, parts, sequence);
        }
        if self.host.is_some() || self.policy.has_fronts() {
            let (groups, device, host) = (&self.groups, &mut self.device, self.host.as_mut());
            let (to_persist, events) = (&mut self.to_persist, &mut self.events);
            vouch(groups, device, host, to_persist, events, sequence, settled);
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
        let Some(sequence) = self.sequences.remove(&seq) else {
            return Err(Error::new("free", ErrorKind::UnknownSequence(seq)));
        };
        let whole = sequence.loading == 0 && !sequence.repaired;
        self.end(sequence, whole);
        Ok(())
    }

    /// Gives back what a sequence holds. `whole`: its unfinished blocks hold what they should.
    fn end(&mut self, mut sequence: Sequence, whole: bool) {
        if let Some(inherited) = sequence.inherited {
            // Who was forked from it counts on what it had not finished of its parent's.
            let of = self.sequences.values_mut().filter_map(|other| other.inherited.as_mut());
            for other in of.filter(|other| other.from == sequence.generation) {
                let tokens = other.tokens.min(inherited.tokens);
                *other = Inherited { tokens, ..inherited };
            }
        }
        self.events.seal();
        self.policy.end(&self.groups, &mut sequence);
        if let (Some(host), Some(config)) = (&mut self.host, &self.config.host)
            && sequence.boundaries.end > 0
        {
            let (flights, stats) = (&mut self.flights, &mut self.stats);
            let (groups, policy, device) = (&self.groups, &self.policy, &mut self.device);
            let parts = (flights, &mut self.events, stats, &mut self.to_persist);
            offer(groups, policy, config, device, host, parts, &mut sequence);
        }
        let settled = if whole { sequence.tokens.len() } else { sequence.computed };
        if self.host.is_some() || self.policy.has_fronts() {
            let (groups, device, host) = (&self.groups, &mut self.device, self.host.as_mut());
            let (to_persist, events) = (&mut self.to_persist, &mut self.events);
            vouch(groups, device, host, to_persist, events, &mut sequence, settled);
        }
        if whole {
            self.keep_unfinished(&mut sequence);
        }
        self.policy.release_all(&self.groups, &mut self.device.pool, &sequence);
        // Its copies in lower tiers become recent, the start of the sequence most of all.
        for tier in self.host.iter_mut().chain(&mut self.storage) {
            for (g, (group, row)) in self.groups.iter().zip(&sequence.rows).enumerate() {
                for &b in row.stored.iter().rev() {
                    let key = group.key_index_in(b as usize, sequence.tokens.len());
                    let hash = &sequence.tokens.hashes()[key];
                    if let Some(slot) = tier.slot_of(g, hash) {
                        tier.released(slot);
                    }
                }
            }
        }
        self.pump();
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
                    self.device.remove(id, &mut self.events);
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
        if let Some(sequence) = self.sequences.remove(&seq) {
            self.end(sequence, false);
        }
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
        if self.device.pool.block(id).cached {
            self.events.seal();
            self.device.remove(id, &mut self.events);
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
