//! What can be seen of a manager: sizes, counters, events, and the state behind them.

use super::*;

impl Manager {
    /// What it was built from.
    pub fn config(&self) -> &ManagerConfig {
        &self.config
    }

    /// Hits are multiples of this many tokens: the least common multiple of the sizes of all blocks that serve hits as
    /// a whole only, which are those of recurrent states and, where [`Retention::fronts`] says no, all.
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
        self.groups
            .iter()
            .map(|group| group.max_blocks(tokens, in_flight, &self.config.retention))
            .sum()
    }

    /// Tokens per hashed unit: the greatest common divisor of the block sizes; 0 without prefix caching.
    pub fn hash_unit(&self) -> usize {
        self.hash_block
    }

    /// Keys of a sequence's blocks of a group in every tier, in order: of the blocks that its tokens fill.
    /// None without prefix caching, or for a group that does not exist.
    pub fn block_hashes(
        &self,
        group: usize,
        tokens: &HashedTokens,
    ) -> impl Iterator<Item = BlockHash> {
        let group = self.groups.get(group);
        let units = group.into_iter().flat_map(|group| (0..).map(|b| group.key_index(b)));
        units.map_while(|unit| tokens.hashes().get(unit).copied())
    }

    /// Tokens of a hit of `tokens`, per tier from the device down, by the slowest tier that any group needs
    /// for them.
    pub fn tier_tokens(&self, tokens: &HashedTokens, hit: &Hit) -> [usize; 3] {
        let unit = self.hash_block.max(1);
        let mut tiers = [0; 3];
        for at in (0..hit.tokens).step_by(unit) {
            let slowest =
                self.groups.iter().zip(&hit.blocks).enumerate().map(|(g, (group, row))| {
                    let b = at / group.block_size;
                    if !group.needs(b, hit.tokens) || row.get(b).is_some_and(|&id| id != NULL) {
                        return 0;
                    }
                    let hash = tokens.hashes().get(group.key_index_in(b, hit.tokens));
                    let host = hash.zip(self.host.as_ref());
                    if host.is_some_and(|(hash, h)| h.find(g, hash).is_some()) { 1 } else { 2 }
                });
            tiers[slowest.max().unwrap_or(0)] += unit;
        }
        tiers
    }

    /// What it takes to run one more request of up to `tokens` tokens beside the sequences `running`, each
    /// with the most tokens it may come to: by the same bound as sizing, so that a scheduler which admits
    /// only what [`Admission::fits`] never finds an append refused.
    ///
    /// # Errors
    /// `UnknownSequence`; `TooLong`; `PoolTooSmall` for a request that could not run alone.
    pub fn admission(&self, tokens: usize, running: &[(SeqId, usize)]) -> Result<Admission> {
        const OP: &str = "admission";
        let max_model_len = self.config.max_model_len as usize;
        if tokens > max_model_len {
            return Err(Error::new(OP, ErrorKind::TooLong { tokens, max_model_len }));
        }
        let (mut needed, capacity) = (self.max_blocks(tokens), self.capacity());
        if needed > capacity {
            return Err(Error::new(OP, ErrorKind::PoolTooSmall { tokens, needed, capacity }));
        }
        for &(seq, most) in running {
            for (g, group) in self.groups.iter().enumerate() {
                let (row, _) = self.row(OP, seq, g)?;
                let in_flight = self.config.in_flight_tokens as usize;
                let most = group.max_blocks(most, in_flight, &self.config.retention);
                let held = row.table.ids().count();
                // A tail that is shared is taken once more, as a copy.
                let copy = row.table.last().is_some_and(|id| self.device.pool.block(id).users > 1);
                needed += (most + usize::from(copy)).saturating_sub(held);
            }
        }
        Ok(Admission { needed, free: self.free_blocks() })
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
        let stats = |tier: &Option<SlotTier>| tier.as_ref().map(|t| t.stats.clone());
        let breaker = |tier: &Option<SlotTier>| tier.as_ref().map(|t| t.breaker.state());
        Stats {
            device: self.device.stats.clone(),
            host: stats(&self.host).unwrap_or_default(),
            storage: stats(&self.storage).unwrap_or_default(),
            host_breaker: breaker(&self.host).unwrap_or_default(),
            storage_breaker: breaker(&self.storage).unwrap_or_default(),
            ..self.stats.clone()
        }
    }

    /// How full the tiers are. Looks at every block of the pool.
    pub fn usage(&self) -> Usage {
        let pool = &self.device.pool;
        let mut live = vec![0; self.groups.len()];
        let mut used = 0;
        for block in (1..pool.len() as BlockId).map(|id| pool.block(id)) {
            if block.users > 0 {
                live[block.group as usize] += 1;
            }
            used += usize::from(block.users > 0 || block.cached);
        }
        let cached = |stats: &[TierStats]| stats.iter().map(|s| s.cached_blocks as usize).collect();
        Usage {
            device_capacity: self.capacity(),
            device_free: self.free_blocks(),
            device_used: used,
            device_live: live,
            device_cached: cached(&self.device.stats),
            host_capacity: self.host.as_ref().map_or(0, SlotTier::capacity),
            host_used: self.host.as_ref().map_or(0, SlotTier::used),
            host_pinned: self.host.as_ref().map_or(0, SlotTier::pinned),
            host_cached: self.host.as_ref().map_or(Vec::new(), |host| cached(&host.stats)),
            storage_capacity: self.storage.as_ref().map_or(0, SlotTier::capacity),
            storage_used: self.storage.as_ref().map_or(0, SlotTier::used),
            storage_pinned: self.storage.as_ref().map_or(0, SlotTier::pinned),
            storage_cached: self.storage.as_ref().map_or(Vec::new(), |s| cached(&s.stats)),
        }
    }

    /// What the manager itself keeps in memory. Looks at every sequence.
    pub fn metadata(&self) -> Metadata {
        let lower = |tier: &Option<SlotTier>| {
            tier.as_ref().map_or(TierMetadata::default(), |tier| TierMetadata {
                blocks: tier.capacity(),
                bytes: tier.metadata_bytes(),
            })
        };
        Metadata {
            device: TierMetadata { blocks: self.capacity(), bytes: self.device.metadata_bytes() },
            host: lower(&self.host),
            storage: lower(&self.storage),
            sequences: self.sequences.values().map(Sequence::bytes).sum(),
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
}
