//! The device tier: the pool and the index from keys to its blocks.

use super::super::BlockId;
use super::super::events::{EventKind, Events, Tier};
use super::super::eviction::is_last_of_stride;
use super::super::hash::BlockHash;
use super::super::pool::{NULL, Pool};
use super::super::stats::TierStats;
use super::index::{Index, Tag};

/// Blocks that are handled together where there are many, so that they wait for memory together.
pub(in super::super) const BATCH: usize = 32;

/// Pool and prefix index.
pub(in super::super) struct DeviceTier {
    pub pool: Pool,
    /// The block that was cached first under each key. Later equal blocks follow it in its ring of twins and
    /// take its place when it goes.
    index: Index,
    pub stats: Vec<TierStats>,
}

impl DeviceTier {
    pub fn new(pool: Pool, num_groups: usize) -> Self {
        Self {
            index: Index::new(pool.len() as u32),
            pool,
            stats: vec![TierStats::default(); num_groups],
        }
    }

    /// Bytes of all that is kept per block.
    pub fn metadata_bytes(&self) -> usize {
        self.pool.metadata_bytes() + self.index.bytes()
    }

    /// The block that serves hits on this hash; [`NULL`] when there is none.
    pub fn find(&self, group: usize, hash: &BlockHash) -> BlockId {
        self.find_tagged(Tag::new(group, hash), group, hash).unwrap_or(NULL)
    }

    fn find_tagged(&self, tag: Tag, group: usize, hash: &BlockHash) -> Option<BlockId> {
        self.index.find(tag, |id| {
            let block = self.pool.block(id);
            block.hash == *hash && block.group as usize == group
        })
    }

    /// Makes a block findable whose content has been used `before` times.
    pub fn insert(&mut self, group: usize, hash: BlockHash, index: usize, id: BlockId, before: u8) {
        self.pool.order.stored(id, before);
        let tag = Tag::new(group, &hash);
        match self.find_tagged(tag, group, &hash) {
            None => self.index.insert(tag, id),
            Some(first) => self.join(first, id),
        }
        let block = self.pool.block_mut(id);
        (block.hash, block.index, block.cached, block.uses) = (hash, index as u32, true, 0);
        (block.settled, block.written_back) = (false, false);
        let stats = &mut self.stats[group];
        stats.stored_blocks += 1;
        stats.cached_blocks += 1;
    }

    /// Puts a block into the ring of the equal ones, the latest.
    fn join(&mut self, first: BlockId, id: BlockId) {
        let last = self.pool.block(first).twin_prev;
        self.pool.block_mut(last).twin_next = id;
        self.pool.block_mut(first).twin_prev = id;
        let block = self.pool.block_mut(id);
        (block.twin_prev, block.twin_next) = (last, first);
    }

    /// Makes a cached block unfindable; equal ones stay.
    pub fn remove(&mut self, id: BlockId) {
        let block = self.pool.block_mut(id);
        let (hash, group) = (block.hash, block.group as usize);
        let (prev, next) = (block.twin_prev, block.twin_next);
        (block.twin_prev, block.twin_next) = (id, id);
        block.cached = false;
        self.stats[group].cached_blocks -= 1;
        let tag = Tag::new(group, &hash);
        if next == id {
            self.index.remove(tag, id);
            return;
        }
        self.pool.block_mut(prev).twin_next = next;
        self.pool.block_mut(next).twin_prev = prev;
        // If it was the first of them, the next one is.
        self.index.replace(tag, id, next);
    }

    /// Says that these hashes are about to be looked for or inserted.
    pub fn warm<'a>(&self, group: usize, hashes: impl Iterator<Item = &'a BlockHash>) {
        self.index.warm(hashes.map(|hash| Tag::new(group, hash)));
    }

    /// Takes the next block of the pool for one user of a group, dropping what it cached.
    pub fn take(&mut self, group: usize, events: &mut Events) -> Option<BlockId> {
        let id = self.pool.take()?;
        self.empty(id, group, events);
        Some(id)
    }

    /// Takes `count` blocks, or all there are, and gives each to `taken`.
    pub fn take_each(
        &mut self,
        group: usize,
        count: usize,
        events: &mut Events,
        mut taken: impl FnMut(BlockId),
    ) {
        let mut ids = [NULL; BATCH];
        for first in (0..count).step_by(BATCH) {
            let ids = &mut ids[..BATCH.min(count - first)];
            ids.fill_with(|| self.pool.take().unwrap_or(NULL));
            let cached = ids.iter().map(|&id| self.pool.block(id)).filter(|block| block.cached);
            self.index.warm(cached.map(|block| Tag::new(block.group.into(), &block.hash)));
            for &id in ids.iter().filter(|&&id| id != NULL) {
                self.empty(id, group, events);
                taken(id);
            }
        }
    }

    /// Drops what a block cached that was taken for a group.
    fn empty(&mut self, id: BlockId, group: usize, events: &mut Events) {
        let block = *self.pool.block(id);
        if block.cached {
            if is_last_of_stride(block.index as usize) {
                self.pool.order.evicted(id, block.hash.key(block.group as usize));
            }
            self.remove(id);
            self.stats[block.group as usize].evicted_blocks += 1;
            let (group, index) = (block.group.into(), block.index);
            events.push(EventKind::Removed, group, Tier::Device, index, block.hash);
        }
        self.pool.block_mut(id).group = group as u16;
    }

    /// Drops every hash; the order of the free queue stays.
    pub fn clear(&mut self) {
        self.index.clear();
        for id in 1..self.pool.len() as BlockId {
            let block = self.pool.block_mut(id);
            block.cached = false;
            (block.twin_prev, block.twin_next) = (id, id);
        }
        for stats in &mut self.stats {
            stats.cached_blocks = 0;
        }
    }

    /// Indices in their sequences of all cached blocks of a group, ascending, one per copy.
    pub fn cached_indices(&self, group: usize) -> Vec<u32> {
        let mut indices: Vec<u32> = (1..self.pool.len() as BlockId)
            .map(|id| self.pool.block(id))
            .filter(|block| block.cached && block.group as usize == group)
            .map(|block| block.index)
            .collect();
        indices.sort_unstable();
        indices
    }
}
