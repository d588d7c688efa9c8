//! The manager: what lives where and what must move, as a pure state machine.
//!
//! It owns no memory, starts no thread, reads no clock and does no I/O. Callers drive it with
//! sequences; it answers with block ids, emits [`Transfer`]s and consumes their typed completions. All
//! meanings are those of docs/architecture.md; the safety rules R1 to R10 are kept here as far as they
//! are decisions, and by the engine as far as they are ordering on streams.

#[cfg(test)]
mod cases;
mod events;
mod groups;
mod hash;
mod pool;
mod prefix;
mod queue;
mod retention;
mod sequence;
mod stats;
mod tiers;
mod transfer;

use std::collections::HashMap;

pub use self::events::{Event, EventKind, Tier};
pub use self::hash::BlockHash;
pub use self::stats::{Stats, TierStats, TransferStats, Usage};

use self::events::Events;
use self::groups::{Group, align_down};
use self::hash::Chain;
use self::pool::{NULL, Pool};
use self::prefix::{Found, Search};
use self::retention::Policy;
use self::sequence::{Row, Sequence};
use self::tiers::device::DeviceTier;
use self::tiers::host::HostTier;
use self::transfer::{Flights, offer};
use crate::error::{Error, ErrorKind, Result};
use crate::spec::{AttentionKind, LayerGroup};

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

impl GroupConfig {
    /// Most blocks a request of `tokens` holds at once in this group when at most `in_flight` of them are
    /// computed and not settled. The block size is at least 1.
    pub(crate) fn max_blocks(&self, tokens: usize, in_flight: usize) -> usize {
        Group::new(self, self.block_size as usize).max_blocks(tokens, in_flight)
    }
}

impl From<&LayerGroup> for GroupConfig {
    fn from(group: &LayerGroup) -> Self {
        Self { kind: group.kind, sink_tokens: group.sink_tokens, block_size: group.block_size }
    }
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
    /// Tokens that have slots: all, or those up to the budget of [`Manager::allocate_prefill`].
    pub num_tokens: usize,
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
    /// A load of the sequence failed and the pool has no blocks for what would have to be computed again:
    /// the sequence has been freed, and can be allocated again later.
    Dropped {
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
}

/// The state machine. See the module documentation.
pub struct Manager {
    config: ManagerConfig,
    groups: Vec<Group>,
    policy: Policy,
    /// Tokens per hashed unit, the greatest common divisor of the block sizes; 0 without prefix caching.
    hash_block: usize,
    device: DeviceTier,
    host: Option<HostTier>,
    sequences: HashMap<SeqId, Sequence>,
    generation: u64,
    flights: Flights,
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
        if config.host.is_some_and(|host| host.num_slots == u32::MAX) {
            return Err(Error::unsupported(
                OP,
                "a number of host slots of",
                u32::MAX,
                format!("up to {}", u32::MAX - 1),
            ));
        }
        let groups: Vec<Group> = config.groups.iter().map(|g| Group::new(g, unit)).collect();
        let no_hash = Chain::new(&config.identity, unit, ExtraKeys::default()).push(&[]);
        let manager = Self {
            policy: Policy { retention: config.retention, alignment },
            hash_block: if config.prefix_caching { unit } else { 0 },
            device: DeviceTier::new(Pool::new(config.num_blocks, no_hash), groups.len()),
            host: config.host.map(|host| HostTier::new(host.num_slots, groups.len(), no_hash)),
            sequences: HashMap::new(),
            generation: 0,
            flights: Flights::default(),
            events: Events::default(),
            stats: Stats::default(),
            groups,
            config,
        };
        let tokens = manager.config.max_model_len as usize;
        let (needed, capacity) = (manager.max_blocks(tokens), manager.capacity());
        if needed > capacity {
            return Err(Error::new(OP, ErrorKind::PoolTooSmall { tokens, needed, capacity }));
        }
        Ok(manager)
    }

    /// What it was built from.
    pub fn config(&self) -> &ManagerConfig {
        &self.config
    }

    /// Hits are multiples of this many tokens: the least common multiple of the block sizes.
    pub fn alignment(&self) -> usize {
        self.policy.alignment
    }

    /// Usable blocks of the pool.
    pub fn capacity(&self) -> usize {
        self.device.pool.len() - 1
    }

    /// Blocks that could be taken now, cached ones without a user included.
    pub fn free_blocks(&self) -> usize {
        self.device.pool.available()
    }

    /// Most blocks a request of `tokens` holds at once, over all groups, when no more than
    /// `in_flight_tokens` are computed and not settled: the one bound of sizing and admission.
    pub fn max_blocks(&self, tokens: usize) -> usize {
        let in_flight = self.config.in_flight_tokens as usize;
        self.groups.iter().map(|group| group.max_blocks(tokens, in_flight)).sum()
    }

    /// The longest prefix of `tokens` that every group could serve now (at most all but the last token).
    pub fn lookup(&self, tokens: &[u32], keys: ExtraKeys<'_>) -> Hit {
        let mut sequence = self.sequence(keys);
        sequence.push(tokens, self.hash_block);
        let found = self.search(&sequence.hashes, tokens.len());
        Hit { tokens: found.tokens, device_tokens: found.device_tokens, blocks: found.rows }
    }

    /// Looks up and pins in one act (R1), then takes blocks for all of `tokens` plus `lookahead` slots:
    /// everything or nothing (R6).
    ///
    /// # Errors
    /// `NoFreeBlocks`, `PoolTooSmall`, `TooLong`, `DuplicateSequence`, `InvalidArgument` for no tokens;
    /// nothing is changed.
    pub fn allocate(
        &mut self,
        seq: SeqId,
        tokens: &[u32],
        keys: ExtraKeys<'_>,
        lookahead: usize,
    ) -> Result<Allocation> {
        self.allocate_prefill(seq, tokens, tokens.len(), keys, lookahead)
    }

    /// Like [`Self::allocate`], with slots only for the hit and the next `budget` tokens of the prompt:
    /// the first step of a chunked prefill. The rest follows by [`Self::append`], so that windowed groups
    /// never hold the whole prompt. Retention goes by the length of the whole prompt.
    pub fn allocate_prefill(
        &mut self,
        seq: SeqId,
        prompt: &[u32],
        budget: usize,
        keys: ExtraKeys<'_>,
        lookahead: usize,
    ) -> Result<Allocation> {
        const OP: &str = "allocate";
        if self.sequences.contains_key(&seq) {
            return Err(Error::new(OP, ErrorKind::DuplicateSequence(seq)));
        }
        if prompt.is_empty() || budget == 0 {
            return Err(Error::invalid(OP, "a sequence needs at least one token"));
        }
        let max_model_len = self.config.max_model_len as usize;
        check_length(OP, prompt.len(), max_model_len)?;

        let mut sequence = self.sequence(keys);
        sequence.push(prompt, self.hash_block);
        let Found { tokens: hit, device_tokens, junction, rows } =
            self.search(&sequence.hashes, prompt.len());
        let num_tokens = prompt.len().min(hit.saturating_add(budget));
        if num_tokens < prompt.len() {
            sequence = self.sequence(keys);
            sequence.push(&prompt[..num_tokens], self.hash_block);
        }
        let slots = num_tokens.saturating_add(lookahead).min(max_model_len);

        let (mut fresh, mut held, mut unused) = (0, 0, 0);
        for (group, row) in self.groups.iter().zip(&rows) {
            fresh += slots.div_ceil(group.block_size) - row.len();
            for (b, &id) in row.iter().enumerate() {
                if id != NULL {
                    held += 1;
                    unused += usize::from(self.device.pool.is_available(id));
                } else if group.needs(hit, b) {
                    fresh += 1;
                }
            }
        }
        self.check_room(OP, slots, fresh + held, fresh + unused)?;

        // R5: the hits of all groups leave the free queue before any group takes a block from it.
        for &id in rows.iter().flatten().filter(|&&id| id != NULL) {
            self.device.pool.touch(id);
        }
        let mut new_blocks = vec![Vec::new(); self.groups.len()];
        let mut loads = Vec::new();
        self.generation += 1;
        sequence.generation = self.generation;
        sequence.computed = hit;
        sequence.settled = hit;
        sequence.boundaries = self.policy.boundaries(prompt.len(), junction);
        for (g, mut table) in rows.into_iter().enumerate() {
            let group = self.groups[g];
            for (b, entry) in table.iter_mut().enumerate() {
                if *entry != NULL {
                    self.device.stats[g].hit_blocks += 1;
                } else if group.needs(hit, b) {
                    let hash = sequence.hashes[group.key_index(b)];
                    let Some((id, load)) = self.load(g, hash, b, (seq, sequence.generation)) else {
                        debug_assert!(false, "room was checked, and the host found it");
                        continue;
                    };
                    *entry = id;
                    new_blocks[g].push(id);
                    loads.push(load);
                }
            }
            let row = &mut sequence.rows[g];
            row.first_live = group.first_needed(hit);
            row.considered = table.len();
            row.table = table;
        }
        sequence.loading = loads.len();
        let Self { groups, policy, device, events, .. } = self;
        grow(groups, device, events, &mut sequence, slots, |g, id| new_blocks[g].push(id));
        cache(groups, policy, device, events, &mut sequence);
        self.sequences.insert(seq, sequence);

        self.stats.allocations += 1;
        self.stats.prompt_tokens += prompt.len() as u64;
        self.stats.hit_tokens += hit as u64;
        self.stats.device_hit_tokens += device_tokens as u64;
        Ok(Allocation {
            hit_tokens: hit,
            device_hit_tokens: device_tokens,
            num_tokens,
            new_blocks,
            loads,
        })
    }

    /// Adds tokens to a sequence; gives the newly taken blocks per group, or changes nothing.
    ///
    /// # Errors
    /// `NoFreeBlocks`, `PoolTooSmall`, `TooLong`, `UnknownSequence`, `InvalidArgument` for no tokens.
    pub fn append(&mut self, seq: SeqId, tokens: &[u32]) -> Result<Vec<Vec<BlockId>>> {
        let mut new_blocks = vec![Vec::new(); self.groups.len()];
        self.append_with(seq, tokens, |g, id| new_blocks[g].push(id))?;
        Ok(new_blocks)
    }

    /// [`Self::append`] that gives every newly taken block, with its group, to `new_block` instead of
    /// collecting them.
    pub fn append_with(
        &mut self,
        seq: SeqId,
        tokens: &[u32],
        new_block: impl FnMut(usize, BlockId),
    ) -> Result<()> {
        const OP: &str = "append";
        let Some(sequence) = self.sequences.get(&seq) else {
            return Err(Error::new(OP, ErrorKind::UnknownSequence(seq)));
        };
        if tokens.is_empty() {
            return Err(Error::invalid(OP, "no tokens given"));
        }
        check_loaded(OP, seq, sequence)?;
        let num_tokens = sequence.num_tokens + tokens.len();
        check_length(OP, num_tokens, self.config.max_model_len as usize)?;
        let (mut fresh, mut held) = (0, 0);
        for (group, row) in self.groups.iter().zip(&sequence.rows) {
            let blocks = num_tokens.div_ceil(group.block_size);
            fresh += blocks.saturating_sub(row.table.len());
            held += row.table.len() - row.first_live;
        }
        self.check_room(OP, num_tokens, fresh + held, fresh)?;
        let Self { groups, policy, hash_block, device, sequences, events, .. } = self;
        let Some(sequence) = sequences.get_mut(&seq) else {
            return Err(Error::new(OP, ErrorKind::UnknownSequence(seq)));
        };
        sequence.push(tokens, *hash_block);
        grow(groups, device, events, sequence, num_tokens, new_block);
        cache(groups, policy, device, events, sequence);
        Ok(())
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
        if settled > computed || computed > sequence.num_tokens {
            return Err(Error::invalid(
                OP,
                format!(
                    "settled {settled} <= computed {computed} <= tokens {} does not hold",
                    sequence.num_tokens
                ),
            ));
        }
        check_loaded(OP, seq, sequence)?;
        sequence.computed = computed;
        sequence.settled = settled;
        if sequence.repaired {
            cache(&self.groups, &self.policy, &mut self.device, &mut self.events, sequence);
            sequence.repaired = computed < sequence.num_tokens;
        }
        if let Some(host) = &mut self.host {
            let (flights, stats) = (&mut self.flights, &mut self.stats);
            offer(&self.groups, &mut self.device, host, flights, &mut self.events, stats, sequence);
        }
        for (g, (group, row)) in self.groups.iter().zip(&mut sequence.rows).enumerate() {
            let first = group.first_needed(settled);
            let start = row.first_live.max(group.sink_blocks);
            if first > start {
                let left = &mut row.table[start..first];
                for &id in left.iter().rev().filter(|&&id| id != NULL) {
                    freed_block(g, id);
                }
                self.device.pool.release(left.iter().rev().copied());
                left.fill(NULL);
                row.first_live = first;
            }
        }
        Ok(())
    }

    /// Ends a sequence; its cached blocks stay findable until they are reused. All its tokens count as
    /// submitted: one whose work will not be done is to be aborted instead.
    pub fn free(&mut self, seq: SeqId) -> Result<()> {
        let Some(sequence) = self.sequences.remove(&seq) else {
            return Err(Error::new("free", ErrorKind::UnknownSequence(seq)));
        };
        for row in &sequence.rows {
            self.device.pool.release(row.table.iter().rev().copied());
        }
        if let Some(host) = &mut self.host {
            // Its copies on the host become recent, the start of the sequence most of all.
            for (g, (group, row)) in self.groups.iter().zip(&sequence.rows).enumerate() {
                for b in (0..row.offered).rev() {
                    if self.policy.keeps(group, &sequence.boundaries, b)
                        && let Some(slot) = host.find(g, &sequence.hashes[group.key_index(b)])
                    {
                        host.touch(slot);
                    }
                }
            }
        }
        Ok(())
    }

    /// Ends a sequence whose step failed: blocks that hold tokens which are not settled are not findable
    /// any more. Gives the other sequences that hit such blocks: what they computed from them is void, so
    /// they are to be aborted, too.
    pub fn abort(&mut self, seq: SeqId) -> Result<Vec<SeqId>> {
        let Some(sequence) = self.sequences.get(&seq) else {
            return Err(Error::new("abort", ErrorKind::UnknownSequence(seq)));
        };
        let mut shared = Vec::new();
        for (g, (group, row)) in self.groups.iter().zip(&sequence.rows).enumerate() {
            let unsettled = (sequence.settled / group.block_size).min(row.table.len());
            for &id in row.table[unsettled..].iter().filter(|&&id| id != NULL) {
                let block = *self.device.pool.block(id);
                if block.users > 1 {
                    shared.push((g, id));
                }
                if block.cached {
                    self.device.remove(id);
                    self.events.push(EventKind::Removed, g as u32, Tier::Device, block.index);
                }
            }
            if let Some(host) = &mut self.host {
                for b in unsettled..row.offered {
                    host.discard_hash(g, &sequence.hashes[group.key_index(b)], &mut self.events);
                }
            }
        }
        let mut dependents: Vec<SeqId> = match shared.is_empty() {
            true => Vec::new(),
            false => self
                .sequences
                .iter()
                .filter(|&(&id, other)| {
                    id != seq && shared.iter().any(|(g, b)| other.rows[*g].table.contains(b))
                })
                .map(|(&id, _)| id)
                .collect(),
        };
        dependents.sort_unstable();
        self.free(seq)?;
        Ok(dependents)
    }

    /// The live blocks of a sequence in a group.
    pub fn block_row(&self, seq: SeqId, group: usize) -> Result<BlockRow<'_>> {
        const OP: &str = "block row";
        let (row, rule) = self.row(OP, seq, group)?;
        let first_block = row.first_live.max(rule.sink_blocks);
        let sinks = rule.sink_blocks.min(row.table.len());
        Ok(BlockRow {
            sinks: &row.table[..sinks],
            live: row.table.get(first_block..).unwrap_or_default(),
            first_block: first_block as u32,
        })
    }

    /// Block ids of all token positions of a group's table, 0 at freed and skipped positions.
    pub fn table(&self, seq: SeqId, group: usize) -> Result<&[BlockId]> {
        Ok(&self.row("table", seq, group)?.0.table)
    }

    /// Drops block `index` of a sequence's table from the prefix index; it is not cached again. No change
    /// when it is not cached.
    pub fn forget(&mut self, seq: SeqId, group: usize, index: usize) -> Result<()> {
        let (row, _) = self.row("forget", seq, group)?;
        let id = row.table.get(index).copied().unwrap_or(NULL);
        let block = *self.device.pool.block(id);
        if block.cached {
            self.device.remove(id);
            self.events.push(EventKind::Removed, group as u32, Tier::Device, block.index);
        }
        Ok(())
    }

    /// Empties the prefix index of every tier; `false`, with nothing changed, while a block is in use.
    pub fn reset_prefix_cache(&mut self) -> bool {
        if self.device.pool.available() < self.capacity() {
            return false;
        }
        self.device.clear();
        if let Some(host) = &mut self.host {
            host.clear();
        }
        for g in 0..self.groups.len() as u32 {
            self.events.cleared(g, Tier::Device);
            if self.host.is_some() {
                self.events.cleared(g, Tier::Host);
            }
        }
        true
    }

    /// Starts or stops the recording of events (off at first).
    pub fn record_events(&mut self, on: bool) {
        self.events.enabled = on;
    }

    /// Events since the last call, oldest first.
    pub fn events(&mut self) -> Vec<Event> {
        self.events.drain()
    }

    /// All counters.
    pub fn stats(&self) -> Stats {
        let host = self.host.as_ref().map_or(Vec::new(), |host| host.stats.clone());
        Stats { device: self.device.stats.clone(), host, ..self.stats.clone() }
    }

    /// How full the tiers are. Looks at every block of the pool.
    pub fn usage(&self) -> Usage {
        let pool = &self.device.pool;
        let mut live = vec![0; self.groups.len()];
        for block in (1..pool.len() as BlockId).map(|id| pool.block(id)) {
            if block.users > 0 {
                live[block.group as usize] += 1;
            }
        }
        let cached = |stats: &[TierStats]| stats.iter().map(|s| s.cached_blocks as usize).collect();
        Usage {
            device_capacity: self.capacity(),
            device_free: self.free_blocks(),
            device_live: live,
            device_cached: cached(&self.device.stats),
            host_capacity: self.host.as_ref().map_or(0, HostTier::capacity),
            host_used: self.host.as_ref().map_or(0, HostTier::used),
            host_pinned: self.host.as_ref().map_or(0, HostTier::pinned),
            host_cached: self.host.as_ref().map_or(Vec::new(), |host| cached(&host.stats)),
        }
    }

    /// Available blocks, the next to be reused first.
    pub fn free_queue(&self) -> Vec<BlockId> {
        self.device.pool.queue().collect()
    }

    /// Blocks that tables hold, with the number of tables, ascending.
    pub fn ref_counts(&self) -> Vec<(BlockId, u32)> {
        let pool = &self.device.pool;
        (1..pool.len() as BlockId)
            .map(|id| (id, pool.block(id).users))
            .filter(|&(_, users)| users > 0)
            .collect()
    }

    /// Indices in their sequences of all cached device blocks of a group, ascending, one per copy.
    pub fn cached_indices(&self, group: usize) -> Vec<u32> {
        self.device.cached_indices(group)
    }

    /// Takes a block, pins it and its copy on the host (R1), and emits the transfer that fills it.
    fn load(
        &mut self,
        group: usize,
        hash: BlockHash,
        index: usize,
        (seq, generation): (SeqId, u64),
    ) -> Option<(BlockId, TransferId)> {
        let host = self.host.as_mut()?;
        let slot = host.find(group, &hash)?;
        let block = self.device.take(group, &mut self.events)?;
        host.pin(slot);
        host.touch(slot);
        host.stats[group].hit_blocks += 1;
        self.device.pool.pin(block);
        self.stats.onboards.started += 1;
        let transfer = Transfer {
            id: 0,
            direction: Direction::Onboard,
            group: group as u32,
            block,
            slot,
            seq: Some(seq),
        };
        let id = self.flights.start(transfer, generation, hash, index);
        Some((block, id))
    }

    fn sequence(&self, keys: ExtraKeys<'_>) -> Sequence {
        let chain = Chain::new(&self.config.identity, self.hash_block, keys);
        Sequence::new(chain, self.groups.len())
    }

    fn search(&self, hashes: &[BlockHash], prompt: usize) -> Found {
        let search = Search {
            groups: &self.groups,
            alignment: self.policy.alignment,
            device: &self.device,
            host: self.host.as_ref(),
            hashes,
        };
        // The last token is always computed: its output is wanted.
        search.run((hashes.len() * self.hash_block).min(prompt.saturating_sub(1)))
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

    /// Whether `needed` blocks can be taken for a sequence of `tokens` that then holds `held`.
    fn check_room(
        &mut self,
        op: &'static str,
        tokens: usize,
        held: usize,
        needed: usize,
    ) -> Result<()> {
        let (capacity, free) = (self.capacity(), self.free_blocks());
        if needed <= free {
            return Ok(());
        }
        self.stats.refused += 1;
        Err(Error::new(
            op,
            match held > capacity {
                true => ErrorKind::PoolTooSmall { tokens, needed: held, capacity },
                false => ErrorKind::NoFreeBlocks { needed, free },
            },
        ))
    }
}

/// Lengthens the tables to `slots` tokens. The caller has checked that there is room.
fn grow(
    groups: &[Group],
    device: &mut DeviceTier,
    events: &mut Events,
    sequence: &mut Sequence,
    slots: usize,
    mut new_block: impl FnMut(usize, BlockId),
) {
    for (g, (group, row)) in groups.iter().zip(&mut sequence.rows).enumerate() {
        let blocks = slots.div_ceil(group.block_size);
        while row.table.len() < blocks {
            let Some(id) = device.take(g, events) else {
                debug_assert!(false, "room was checked");
                return;
            };
            row.table.push(id);
            new_block(g, id);
        }
    }
}

/// Makes the blocks findable that the sequence's tokens fill, up to the last aligned length, as far as
/// they are worth caching. A sequence that waits for loads publishes nothing: until they have ended it is
/// not known which tokens it will compute.
fn cache(
    groups: &[Group],
    policy: &Policy,
    device: &mut DeviceTier,
    events: &mut Events,
    sequence: &mut Sequence,
) {
    if sequence.hashes.is_empty() || sequence.loading > 0 {
        return;
    }
    let tokens = if sequence.repaired { sequence.computed } else { sequence.num_tokens };
    let end = align_down(tokens, policy.alignment);
    for (g, (group, row)) in groups.iter().zip(&mut sequence.rows).enumerate() {
        let considered = std::mem::replace(&mut row.considered, end / group.block_size);
        for b in considered..row.considered {
            let id = row.table[b];
            if id != NULL && policy.keeps(group, &sequence.boundaries, b) {
                device.insert(g, sequence.hashes[group.key_index(b)], b, id);
                events.push(EventKind::Stored, g as u32, Tier::Device, b as u32);
            }
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
        let block_size = group.block_size as usize;
        unit = gcd(unit, block_size);
        alignment = (alignment / gcd(alignment, block_size))
            .checked_mul(block_size)
            .filter(|&a| a <= u32::MAX as usize)
            .ok_or_else(|| Error::invalid(op, "the block sizes have no common multiple"))?;
    }
    Ok((unit, alignment))
}

fn check_loaded(op: &'static str, seq: SeqId, sequence: &Sequence) -> Result<()> {
    match sequence.loading {
        0 => Ok(()),
        n => Err(Error::invalid(op, format!("sequence {seq} still waits for {n} load(s)"))),
    }
}

fn check_length(op: &'static str, tokens: usize, max_model_len: usize) -> Result<()> {
    match tokens > max_model_len {
        true => Err(Error::new(op, ErrorKind::TooLong { tokens, max_model_len })),
        false => Ok(()),
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}
