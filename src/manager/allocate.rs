//! Lookup, allocation and growth of sequences: what is found is pinned, what is missing is taken, and what
//! the tokens fill becomes findable.

use super::eviction::{Order, is_last_of_stride, last_of_stride};
use super::groups::align_down;
use super::grow::{Goal, Grower, grow, lacking};
use super::pool::NULL;
use super::prefix::{Found, Search, Worth};
use super::sequence::Row;
use super::storage::{Load, Waiter};
use super::table::Table;
use super::*;

impl Manager {
    /// The longest prefix of `tokens` that every group could serve now (at most all but the last token).
    pub fn lookup(&self, tokens: &[u32], keys: ExtraKeys<'_>) -> Hit {
        self.lookup_hashed(&self.hash(tokens, keys))
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
        if budget == 0 {
            return Err(Error::invalid(OP, "a budget of no tokens"));
        }
        // Before the hashing, which a refusal can do without.
        self.check_new(OP, seq, prompt.len())?;
        let mut tokens = self.hash(prompt, keys);
        let found = self.search(&tokens, prompt.len(), self.uses_storage(seq));
        let num_tokens = prompt.len().min(found.tokens.saturating_add(budget));
        if num_tokens < prompt.len() {
            tokens.truncate(num_tokens);
        }
        self.place(OP, seq, tokens, prompt.len(), found, lookahead)
    }

    /// Hashes tokens, for lookups and allocations to come.
    pub fn hash(&self, tokens: &[u32], keys: ExtraKeys<'_>) -> HashedTokens {
        let mut hashed = HashedTokens::new(&self.config.identity, self.hash_block, keys);
        hashed.push(tokens);
        hashed
    }

    /// [`Self::lookup`] with hashes from [`Self::hash`]. Tokens that were hashed under another identity or unit hit
    /// nothing.
    pub fn lookup_hashed(&self, tokens: &HashedTokens) -> Hit {
        let Found { tokens, device_tokens, host_tokens, rows, .. } =
            self.search(tokens, tokens.len(), true);
        let blocks = rows.iter().map(Table::to_vec).collect();
        Hit { tokens, device_tokens, host_tokens, blocks }
    }

    /// [`Self::allocate`] with hashes from [`Self::hash`].
    ///
    /// # Errors
    /// Those of [`Self::allocate`]; `InvalidArgument` for tokens that were hashed under another identity or unit.
    pub fn allocate_hashed(
        &mut self,
        seq: SeqId,
        tokens: HashedTokens,
        lookahead: usize,
    ) -> Result<Allocation> {
        const OP: &str = "allocate";
        self.check_new(OP, seq, tokens.len())?;
        self.check_hashed(OP, &tokens)?;
        let prompt = tokens.len();
        let found = self.search(&tokens, prompt, self.uses_storage(seq));
        self.place(OP, seq, tokens, prompt, found, lookahead)
    }

    /// Refuses a name that is taken.
    pub(super) fn check_name(&self, op: &'static str, seq: SeqId) -> Result<()> {
        match self.sequences.contains_key(&seq) || self.preempted.contains_key(&seq) {
            true => Err(Error::new(op, ErrorKind::DuplicateSequence(seq))),
            false => Ok(()),
        }
    }

    /// Whether a sequence of this name and length can be.
    fn check_new(&self, op: &'static str, seq: SeqId, tokens: usize) -> Result<()> {
        self.check_name(op, seq)?;
        if tokens == 0 {
            return Err(Error::invalid(op, "a sequence needs at least one token"));
        }
        check_length(op, tokens, self.config.max_model_len as usize)
    }

    /// Refuses tokens that were hashed for another manager: their hashes name none of its blocks.
    pub(super) fn check_hashed(&self, op: &'static str, tokens: &HashedTokens) -> Result<()> {
        match tokens.are_of(&self.config.identity, self.hash_block) {
            true => Ok(()),
            false => Err(Error::invalid(
                op,
                format!(
                    "tokens that were hashed under another identity, or not in units of {}: use Manager::hash",
                    self.hash_block
                ),
            )),
        }
    }

    /// Whether a sequence of this name looks into storage: one that was prefetched takes what has arrived.
    fn uses_storage(&self, seq: SeqId) -> bool {
        !self.prefetches.contains(seq)
    }

    /// The joint hit of what is given of a prompt of `prompt` tokens, with or without storage.
    pub(super) fn search(&self, tokens: &HashedTokens, prompt: usize, storage: bool) -> Found {
        let host = self.host.as_ref().filter(|host| host.breaker.is_closed());
        let threshold =
            self.config.host.as_ref().map_or(0, |host| host.load_back_threshold as usize);
        let own = tokens.are_of(&self.config.identity, self.hash_block);
        let hashes = if own { tokens.hashes() } else { &[] };
        let search = Search {
            groups: &self.groups,
            alignment: self.policy.alignment,
            device: &self.device,
            host,
            // What comes from storage comes through the host.
            storage: host.and(self.storage.as_ref()).filter(|s| storage && s.breaker.is_closed()),
            worth: Worth { threshold, cost: self.cost.as_ref(), prompt },
            hashes,
        };
        // The last token is always computed: its output is wanted.
        search.run((hashes.len() * self.hash_block).min(tokens.len().saturating_sub(1)))
    }

    /// Makes a sequence of what was found and of new blocks for the rest of its tokens.
    pub(super) fn place(
        &mut self,
        op: &'static str,
        seq: SeqId,
        tokens: HashedTokens,
        prompt: usize,
        found: Found,
        lookahead: usize,
    ) -> Result<Allocation> {
        let Found { tokens: hit, device_tokens, host_tokens, junction, rows } = found;
        let num_tokens = tokens.len();
        let max_model_len = self.config.max_model_len as usize;
        let slots = num_tokens.saturating_add(lookahead).min(max_model_len);

        let boundaries = self.policy.boundaries(prompt, hit, junction);
        let caching = self.config.prefix_caching;
        let goal = Goal { boundaries: &boundaries, tokens: num_tokens, slots, caching };
        let (mut fresh, mut held, mut unused) = (0, 0, 0);
        // Blocks with a front that is hit, of which the sequence goes on with a copy, and which nobody else uses.
        let mut fronts = Vec::new();
        let mut sources = Vec::new();
        let mut new_blocks = Vec::with_capacity(self.groups.len());
        for (g, (group, row)) in self.groups.iter().zip(&rows).enumerate() {
            let mut lacks = lacking(group, &self.policy, &self.device.pool, row, hit, goal);
            for b in group.needed(hit) {
                let id = row.get(b);
                if id == NULL {
                    lacks += 1;
                    let hash = &tokens.hashes()[group.key_index_in(b, hit)];
                    sources.extend(self.host.as_ref().and_then(|host| host.find(g, hash)));
                } else {
                    held += 1;
                    if self.device.pool.is_available(id) {
                        unused += 1;
                        fronts.extend((hit / group.block_size == b).then_some((g, id)));
                    }
                }
            }
            fresh += lacks;
            new_blocks.push(Vec::with_capacity(lacks));
        }
        // Without room for the copies it goes on in these blocks themselves, and they are found no more: a hit never
        // takes more than a miss.
        match fresh + unused > self.device.pool.available() {
            true => fresh -= fronts.len(),
            false => fronts.clear(),
        }
        let needed = fresh + unused;
        self.events.seal();
        check_room(op, &self.device.pool, &mut self.stats, slots, fresh + held, needed)?;
        // R1: what is to be loaded stays on the host while other blocks are stored there.
        if let Some(host) = &mut self.host {
            sources.iter().for_each(|&slot| host.pin(slot));
        }
        let clean = self.clean(op, fresh, &rows);
        if let Some(host) = &mut self.host {
            sources.iter().for_each(|&slot| host.unpin(slot));
        }
        clean?;

        // R5: the hits of all groups leave the free queue before any group takes a block from it.
        for (g, (group, row)) in self.groups.iter().zip(&rows).enumerate() {
            for b in group.needed(hit) {
                let order = &mut self.device.pool.order;
                let whole = (b + 1) * group.block_size <= hit;
                if whole && is_last_of_stride(b) && self.policy.remembers(g) {
                    order.recall(tokens.hashes()[group.key_index(b)].key(g), b, row.get(b) != NULL);
                }
                if row.get(b) != NULL {
                    order.hit(row.get(b));
                    self.device.pool.touch(row.get(b));
                }
            }
        }
        for (g, id) in fronts {
            self.device.empty(id, g, &mut self.events);
        }
        let (mut loads, mut own) = (Vec::new(), Vec::new());
        self.generation += 1;
        let generation = self.generation;
        let mut tables = Vec::with_capacity(rows.len());
        for (g, mut table) in rows.into_iter().enumerate() {
            let group = self.groups[g];
            let (mut hits, mut loading) = (0, 0);
            for b in group.needed(hit) {
                if table.get(b) != NULL {
                    hits += 1;
                    continue;
                }
                let hash = tokens.hashes()[group.key_index_in(b, hit)];
                let Some((id, load)) = self.load(g, hash, b, (seq, generation)) else {
                    debug_assert!(false, "room was checked, and the host found it");
                    continue;
                };
                table.replace(b, id);
                new_blocks[g].push(id);
                loads.push(load);
                loading += 1;
                own.extend(((b + 1) * group.block_size > hit).then_some(id));
            }
            self.device.stats[g].hit_blocks += hits;
            let considered = hit / group.block_size;
            tables.push(Row { table, considered, settled: considered, loading, ..Row::default() });
        }
        let mut sequence = Sequence {
            tenant: self.tenants.of(&tokens),
            tokens,
            open_end: 0,
            computed: hit,
            settled: hit,
            rows: tables,
            boundaries,
            hit,
            generation,
            inherited: None,
            loading: loads.len(),
            pending: loads.len(),
            overlapped: false,
            lost: Vec::new(),
            repaired: false,
            begun: false,
        };
        let Self { groups, policy, device, copies, events, .. } = self;
        let grower = Grower { groups, policy, device, copies, events };
        // It goes on in the fronts that it loads, and in copies of those that it found.
        let before =
            |group: &Group, table: &Table| match own.contains(&table.get(hit / group.block_size)) {
                true => hit.next_multiple_of(group.block_size),
                false => hit,
            };
        grow(grower, &mut sequence.rows, before, goal, |g, id| new_blocks[g].push(id));
        cache(groups, policy, device, events, &mut sequence);
        self.sequences.insert(seq, sequence);
        self.cancel_prefetch(seq);
        self.pump();

        self.stats.allocations += 1;
        self.stats.prompt_tokens += prompt as u64;
        self.stats.hit_tokens += hit as u64;
        self.stats.device_hit_tokens += device_tokens as u64;
        self.stats.host_hit_tokens += host_tokens as u64;
        Ok(Allocation {
            hit_tokens: hit,
            device_hit_tokens: device_tokens,
            host_hit_tokens: host_tokens,
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
        let Self { config, groups, policy, device, sequences, stats, .. } = self;
        let Some(sequence) = sequences.get_mut(&seq) else {
            return Err(Error::new(OP, ErrorKind::UnknownSequence(seq)));
        };
        if tokens.is_empty() {
            return Err(Error::invalid(OP, "no tokens given"));
        }
        check_runs(OP, seq, sequence)?;
        let num_tokens = sequence.tokens.len() + tokens.len();
        check_length(OP, num_tokens, config.max_model_len as usize)?;
        if num_tokens < sequence.open_end {
            sequence.tokens.push(tokens);
            return Ok(());
        }
        let before = sequence.tokens.len();
        let boundaries = sequence.boundaries;
        let caching = config.prefix_caching;
        let goal = Goal { boundaries: &boundaries, tokens: num_tokens, slots: num_tokens, caching };
        let (mut fresh, mut held) = (0, 0);
        // A block that it goes on in while it is loaded is nobody else's.
        let loading = sequence.loading > 0;
        let before = |group: &Group| match loading {
            true => before.next_multiple_of(group.block_size),
            false => before,
        };
        for (group, row) in groups.iter().zip(&sequence.rows) {
            fresh += lacking(group, policy, &device.pool, &row.table, before(group), goal);
            held += row.table.sinks().len() + row.table.live().len();
        }
        check_room(OP, &device.pool, stats, num_tokens, fresh + held, fresh)?;
        self.clean(OP, fresh, &[])?;
        let Self { groups, policy, device, sequences, copies, events, .. } = self;
        let Some(sequence) = sequences.get_mut(&seq) else { return Ok(()) };
        events.seal();
        sequence.tokens.push(tokens);
        let grower = Grower { groups, policy, device, copies, events };
        grow(grower, &mut sequence.rows, |group, _| before(group), goal, new_block);
        cache(groups, policy, device, events, sequence);
        let ends = groups.iter().map(|group| num_tokens.next_multiple_of(group.block_size));
        sequence.open_end = ends.min().unwrap_or(0);
        Ok(())
    }

    /// Makes room in the manager's own memory for a sequence to grow to `tokens` tokens: none of its steps up to
    /// there allocates any. No block is taken.
    ///
    /// # Errors
    /// `TooLong`, `UnknownSequence`.
    pub fn reserve(&mut self, seq: SeqId, tokens: usize) -> Result<()> {
        const OP: &str = "reserve";
        let Some(sequence) = self.sequences.get_mut(&seq) else {
            return Err(Error::new(OP, ErrorKind::UnknownSequence(seq)));
        };
        check_length(OP, tokens, self.config.max_model_len as usize)?;
        sequence.tokens.reserve(tokens);
        let slots = self.host.as_ref().map_or(0, SlotTier::capacity);
        for (group, row) in self.groups.iter().zip(&mut sequence.rows) {
            let blocks = tokens.div_ceil(group.block_size);
            let in_flight = self.config.in_flight_tokens as usize;
            let live = group.max_blocks(tokens, in_flight, &self.config.retention);
            row.reserve(blocks, live, blocks.min(slots));
        }
        Ok(())
    }

    /// Takes a block, pins it and its copy in a lower tier (R1), and emits the transfer that fills it, or the
    /// first of the two.
    fn load(
        &mut self,
        group: usize,
        hash: BlockHash,
        index: usize,
        (seq, generation): (SeqId, u64),
    ) -> Option<(BlockId, TransferId)> {
        let slot = self.host.as_ref()?.find(group, &hash);
        let from = match slot {
            Some(_) => None,
            None => Some(self.storage.as_ref()?.find(group, &hash)?),
        };
        let block = self.device.take(group, &mut self.events)?;
        self.device.pool.pin(block);
        let id = self.flights.name();
        let load = Load { seq, generation, group, hash, index, block, id };
        match (slot, from) {
            (Some(slot), _) => self.onboard(&load, slot),
            (None, Some(from)) => self.want(from, Waiter::Load(load)),
            (None, None) => {}
        }
        Some((block, id))
    }
}

/// Whether `needed` blocks can be taken for a sequence of `tokens` that then holds `held`.
pub(super) fn check_room(
    op: &'static str,
    pool: &Pool,
    stats: &mut Stats,
    tokens: usize,
    held: usize,
    needed: usize,
) -> Result<()> {
    let (capacity, free) = (pool.len() - 1, pool.available());
    if needed <= free {
        return Ok(());
    }
    stats.refused += 1;
    Err(Error::new(
        op,
        match held > capacity {
            true => ErrorKind::PoolTooSmall { tokens, needed: held, capacity },
            false => ErrorKind::NoFreeBlocks { needed, free },
        },
    ))
}

/// Makes the blocks findable that the sequence's tokens fill, up to the last aligned length, as far as
/// they are worth caching. A sequence that waits for loads publishes nothing: until they have ended it is
/// not known which tokens it will compute.
pub(super) fn cache(
    groups: &[Group],
    policy: &Policy,
    device: &mut DeviceTier,
    events: &mut Events,
    sequence: &mut Sequence,
) {
    if sequence.tokens.hashes().is_empty() || sequence.loading > 0 {
        return;
    }
    let tokens = if sequence.repaired { sequence.computed } else { sequence.tokens.len() };
    let end = align_down(tokens, policy.alignment);
    let Sequence { tokens, boundaries, rows, tenant, .. } = sequence;
    let hashes = tokens.hashes();
    for (g, (group, row)) in groups.iter().zip(rows).enumerate() {
        let end = end / group.block_size;
        let mut next = std::mem::replace(&mut row.considered, end);
        let mut known = Known { end: next, before: 0 };
        while next < end {
            // Of what goes by the leading group's memory only the blocks to be inserted are looked at.
            if !policy.remembers(g) {
                next = policy.next_found(group, boundaries, next);
                if next >= end {
                    break;
                }
            }
            if next >= known.end {
                let order = &mut device.pool.order;
                known = recall(policy, group, boundaries, order, (g, row, hashes), next);
            }
            let stride = next..known.end.min(last_of_stride(next) + 1);
            next = stride.end;
            // A block of a forked sequence can have been cached for another one: by the same tokens, so
            // under the same hash.
            let (mut kept, mut count) = ([0; Order::STRIDE], 0);
            for b in stride {
                let id = row.table.get(b);
                if id != NULL && !device.pool.block(id).cached && policy.finds(group, boundaries, b)
                {
                    kept[count] = b;
                    count += 1;
                }
            }
            let kept = kept[..count].iter().map(|&b| (b, &hashes[group.key_index(b)]));
            device.warm(g, kept.clone().map(|(_, hash)| hash));
            for (b, &hash) in kept {
                device.insert((g, hash), b, row.table.get(b), known.before, events);
                device.pool.block_mut(row.table.get(b)).tenant = *tenant;
            }
        }
    }
}

/// Blocks up to `end` that count as used `before` times before they were stored.
struct Known {
    end: usize,
    before: u8,
}

/// Notes a use of what block `b` of a row holds, and those behind it whose fate it shares; gives how often it has
/// been used before. The blocks of a stride have one memory, which goes by the last of them.
fn recall(
    policy: &Policy,
    group: &Group,
    boundaries: &Boundaries,
    order: &mut Order,
    (g, row, hashes): (usize, &Row, &[BlockHash]),
    b: usize,
) -> Known {
    if !policy.remembers(g) {
        return Known { end: row.considered, before: 0 };
    }
    let end = policy.shared_fate(group, boundaries, b).min(row.considered);
    let mut before = match policy.tied && b > 0 && policy.shared_fate(group, boundaries, b - 1) > b
    {
        true => order.uses(row.table.get(b - 1)).saturating_sub(1),
        false => 0,
    };
    for last in (last_of_stride(b)..end).step_by(Order::STRIDE) {
        if let Some(hash) = hashes.get(group.key_index(last + Order::STRIDE)) {
            order.warm(hash.key(g));
        }
        if policy.finds(group, boundaries, last) {
            before = before.max(order.recall(hashes[group.key_index(last)].key(g), last, false));
        }
    }
    Known { end, before }
}

fn check_length(op: &'static str, tokens: usize, max_model_len: usize) -> Result<()> {
    match tokens > max_model_len {
        true => Err(Error::new(op, ErrorKind::TooLong { tokens, max_model_len })),
        false => Ok(()),
    }
}
