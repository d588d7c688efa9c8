//! Swapping whole sequences out to the host tier and back.
//!
//! What a preempted sequence needs to go on, its partly filled tail blocks included, is copied to host slots
//! that stay pinned until it is resumed or freed. Blocks that the prefix index names are stored under their
//! hash, where others find them, too; the rest under keys that nobody else can ask for.

use super::branch::Cached;
use super::grow::{Goal, Grower, grow, lacking};
use super::hash::{BlockHash, HashedTokens};
use super::pool::NULL;
use super::retention::Boundaries;
use super::storage::Load;
use super::table::Table;
use super::tiers::slots::{Reserved, Source};
use super::*;

/// What swapping a sequence out gave.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Preemption {
    /// Tokens that it keeps: those it has computed. The others are to be appended again once it is resumed.
    pub tokens: usize,
    /// Offloads that it takes; the blocks that are not in use otherwise are free once these have ended.
    pub offloads: usize,
    /// Other sequences that hit blocks of tokens that were not computed: they are to be aborted.
    pub dependents: Vec<SeqId>,
}

/// A block of a preempted sequence; its slot is pinned.
#[derive(Clone, Copy)]
struct Saved {
    group: usize,
    /// Index of the block in its sequence.
    index: usize,
    hash: BlockHash,
    slot: HostSlot,
}

/// A sequence that is swapped out.
pub(super) struct Preempted {
    tokens: HashedTokens,
    computed: usize,
    boundaries: Boundaries,
    generation: u64,
    saved: Vec<Saved>,
}

impl Manager {
    /// Swaps what a sequence has computed out to the host tier, all or nothing, and frees its blocks (each
    /// once its offload has ended). The sequence keeps its name: it is to be resumed, freed or aborted, and
    /// unknown to everything else.
    ///
    /// # Errors
    /// `UnknownSequence`; `InvalidArgument` without a host tier, for a sequence that waits for loads, has
    /// steps in flight or has submitted no step of its own; `NoHostSlots` when the host cannot take it: it may be freed and allocated again
    /// instead. Nothing is changed.
    pub fn preempt(&mut self, seq: SeqId) -> Result<Preemption> {
        const OP: &str = "preempt";
        let Some(sequence) = self.sequences.get(&seq) else {
            return Err(Error::new(OP, ErrorKind::UnknownSequence(seq)));
        };
        check_loaded(OP, seq, sequence)?;
        let computed = sequence.computed;
        if computed == 0 {
            return Err(Error::invalid(
                OP,
                format!("sequence {seq} has computed nothing: free it"),
            ));
        }
        if !sequence.begun {
            return Err(Error::invalid(
                OP,
                format!("sequence {seq} has computed nothing besides what it hit: free it"),
            ));
        }
        if sequence.settled < computed {
            let left = computed - sequence.settled;
            return Err(Error::invalid(OP, format!("{left} token(s) of {seq} are in flight")));
        }
        let (Some(host), Some(_)) = (&mut self.host, &self.config.host) else {
            return Err(Error::invalid(OP, "there is no host tier"));
        };
        self.events.seal();
        // Group, index, block and key of all that it needs to go on, the start first.
        let mut blocks = Vec::new();
        for (g, (group, row)) in self.groups.iter().zip(&sequence.rows).enumerate() {
            for index in group.needed(computed) {
                // The slot of a state may have gone ahead, with the state of what is computed.
                let ahead = || {
                    row.table.indices_from(index).map(|b| row.table.get(b)).find(|&id| id != NULL)
                };
                let id = match group.kind {
                    GroupKind::State => ahead().unwrap_or(NULL),
                    GroupKind::Attention(_) => row.table.get(index),
                };
                let block = self.device.pool.block(id);
                let whole = (index + 1) * group.block_size <= computed;
                // A slot that has gone ahead is named by the state it will hold.
                let hash = match block.cached && whole && row.table.get(index) == id {
                    true => block.hash,
                    false => sequence.tokens.private(sequence.generation, index),
                };
                blocks.push((g, index, id, hash));
            }
        }
        let held: Vec<HostSlot> =
            blocks.iter().filter_map(|(g, _, _, hash)| host.slot_of(*g, hash)).collect();
        held.iter().for_each(|&slot| host.pin(slot));
        let tenant = sequence.tenant;
        let (needed, free) = (blocks.len() - held.len(), host.room(tenant));
        if needed > free {
            held.iter().for_each(|&slot| host.unpin(slot));
            return Err(Error::new(OP, ErrorKind::NoHostSlots { needed, free }));
        }
        let (mut saved, mut offloads) = (Vec::with_capacity(blocks.len()), 0);
        for (group, index, id, hash) in blocks {
            let slot = match host.reserve(
                (group, hash),
                index as u32,
                Source { block: id, entry: self.device.pool.order.entry(id), tenant },
                &mut self.events,
            ) {
                Reserved::New(slot) => {
                    host.pin(slot);
                    host.started();
                    self.device.pool.pin(id);
                    let path = Path::Offload { from: id, to: slot };
                    self.flights.start(path, (group, hash), index, None);
                    self.stats.of(Direction::Offload).started += 1;
                    offloads += 1;
                    Some(slot)
                }
                // One of those pinned above.
                Reserved::Held | Reserved::Full => host.slot_of(group, &hash),
            };
            debug_assert!(slot.is_some(), "room was checked");
            saved.extend(slot.map(|slot| Saved { group, index, hash, slot }));
        }
        // Nobody will compute the other tokens for now.
        let dependents = self.cut(OP, seq, computed, Cached::Stays)?.dependents;
        if let Some(mut sequence) = self.sequences.remove(&seq) {
            self.policy.end(&self.groups, &mut sequence);
            self.policy.release_all(&self.groups, &mut self.device.pool, &sequence);
            let Sequence { tokens, mut boundaries, generation, .. } = sequence;
            boundaries.end = 0;
            let preempted = Preempted { tokens, computed, boundaries, generation, saved };
            self.preempted.insert(seq, preempted);
        }
        Ok(Preemption { tokens: computed, offloads, dependents })
    }

    /// Brings a preempted sequence back. When all that was swapped out is still there, it goes on where it
    /// was: its hit are the tokens that it had computed. Else (an offload failed) it is allocated anew by what
    /// of it is found in all tiers, and computes the rest again.
    ///
    /// # Errors
    /// `UnknownSequence` for one that is not preempted; `NotReady` while it is still being swapped out;
    /// `NoFreeBlocks`, `PoolTooSmall`; nothing is changed.
    pub fn resume(&mut self, seq: SeqId) -> Result<Allocation> {
        const OP: &str = "resume";
        let Some(preempted) = self.preempted.get(&seq) else {
            return Err(Error::new(OP, ErrorKind::UnknownSequence(seq)));
        };
        // While a slot is pinned its tier stays, detached or not.
        let host = self.host.as_ref();
        let is_writing = |saved: &&Saved| host.is_some_and(|host| host.is_writing(saved.slot));
        let writing = preempted.saved.iter().filter(is_writing).count();
        if writing > 0 {
            return Err(Error::new(OP, ErrorKind::NotReady { seq, transfers: writing }));
        }
        let on_device = |saved: &Saved| self.device.find(saved.group, &saved.hash);
        let on_host = |saved: &Saved| host.is_some_and(|host| host.is_resident(saved.slot));
        let lost = |saved: &Saved| on_device(saved) == NULL && !on_host(saved);
        if preempted.saved.iter().any(lost) {
            let tokens = preempted.tokens.clone();
            let found = self.search(&tokens, tokens.len(), true);
            let prompt = tokens.len();
            let allocation = self.place(OP, seq, tokens, prompt, found, 0)?;
            self.drop_preempted(seq);
            return Ok(allocation);
        }

        let (computed, boundaries) = (preempted.computed, preempted.boundaries);
        let (num_tokens, generation) = (preempted.tokens.len(), preempted.generation);
        let held = |group: &Group| {
            let blocks = computed.div_ceil(group.block_size);
            Table::new(group.sink_blocks, group.first_needed(computed), blocks)
        };
        let mut tables: Vec<Table> = self.groups.iter().map(held).collect();
        let mut loads = Vec::new();
        for saved in &preempted.saved {
            match on_device(saved) {
                NULL => loads.push(*saved),
                id => _ = tables[saved.group].replace(saved.index, id),
            }
        }
        let caching = self.config.prefix_caching;
        let goal = Goal { boundaries: &boundaries, tokens: num_tokens, slots: num_tokens, caching };
        // What is loaded is the sequence's own: it goes on in its tail.
        let edge = |group: &Group| computed.next_multiple_of(group.block_size);
        let (mut fresh, mut found) = (loads.len(), 0);
        for (group, table) in self.groups.iter().zip(&tables) {
            fresh += lacking(group, &self.policy, &self.device.pool, table, edge(group), goal);
            found += table.ids().count();
        }
        let hits = tables.iter().flat_map(Table::ids);
        let unused = hits.filter(|&id| self.device.pool.is_available(id)).count();
        self.events.seal();
        let (pool, stats) = (&self.device.pool, &mut self.stats);
        check_room(OP, pool, stats, num_tokens, fresh + found, fresh + unused)?;
        self.clean(OP, fresh, &tables)?;

        let Some(Preempted { tokens, saved, .. }) = self.preempted.remove(&seq) else {
            return Err(Error::new(OP, ErrorKind::UnknownSequence(seq)));
        };
        tables.iter().flat_map(Table::ids).for_each(|id| self.device.pool.touch(id));
        let mut new_blocks = vec![Vec::new(); self.groups.len()];
        let mut ids = Vec::with_capacity(loads.len());
        for &Saved { group, index, hash, slot } in &loads {
            let Some(block) = self.device.take(group, &mut self.events) else {
                debug_assert!(false, "room was checked");
                continue;
            };
            tables[group].replace(index, block);
            new_blocks[group].push(block);
            self.device.pool.pin(block);
            let id = self.flights.name();
            self.onboard(&Load { seq, generation, group, hash, index, block, id }, slot);
            ids.push(id);
        }
        if let Some(host) = &mut self.host {
            saved.iter().for_each(|saved| host.unpin(saved.slot));
        }
        let alignment = self.policy.alignment;
        let row = |(group, table): (&Group, Table)| Row {
            table,
            considered: computed / alignment * alignment / group.block_size,
            offered: computed / group.block_size,
            settled: computed / group.block_size,
            ..Row::default()
        };
        let mut rows: Vec<Row> = self.groups.iter().zip(tables).map(row).collect();
        loads.iter().for_each(|load| rows[load.group].loading += 1);
        let mut sequence = Sequence {
            tenant: self.tenants.of(&tokens),
            tokens,
            open_end: 0,
            computed,
            settled: computed,
            rows,
            boundaries,
            hit: computed,
            generation,
            inherited: None,
            loading: ids.len(),
            pending: ids.len(),
            overlapped: false,
            lost: Vec::new(),
            repaired: false,
            begun: false,
        };
        let Self { groups, policy, device, copies, events, .. } = self;
        let grower = Grower { groups, policy, device, copies, events };
        let before = |group: &Group, _: &Table| edge(group);
        grow(grower, &mut sequence.rows, before, goal, |g, id| new_blocks[g].push(id));
        cache(groups, policy, device, events, &mut sequence);
        self.sequences.insert(seq, sequence);
        Ok(Allocation {
            hit_tokens: computed,
            device_hit_tokens: if ids.is_empty() { computed } else { 0 },
            host_hit_tokens: computed,
            new_blocks,
            num_tokens,
            loads: ids,
        })
    }

    /// Sequences that are swapped out.
    pub fn preempted(&self) -> usize {
        self.preempted.len()
    }

    /// Forgets a preempted sequence; whether there was one. What others can find of it stays.
    pub(super) fn drop_preempted(&mut self, seq: SeqId) -> bool {
        let Some(Preempted { tokens, generation, saved, .. }) = self.preempted.remove(&seq) else {
            return false;
        };
        self.events.seal();
        if let Some(host) = &mut self.host {
            for Saved { index, hash, slot, .. } in saved {
                if hash == tokens.private(generation, index) {
                    host.discard(slot, &mut self.events);
                }
                host.unpin(slot);
            }
        }
        true
    }
}
