//! The device tier: the pool and the index from keys to its blocks.

use super::super::BlockId;
use super::super::events::{EventKind, Events, Tier};
use super::super::eviction::is_last_of_stride;
use super::super::hash::BlockHash;
use super::super::pool::{Block, NULL, Pool};
use super::super::stats::TierStats;
use super::index::{Index, Tag};

/// Blocks that are handled together where there are many, so that they wait for memory together.
pub(in super::super) const BATCH: usize = 32;

/// Pool and prefix index.
pub(in super::super) struct DeviceTier {
    pub pool: Pool,
    /// The block that was cached first under each key. Later equal blocks follow it in its ring of twins and
    /// take its place when it goes. Places from the pool's length on are those of `fronts`.
    index: Index,
    fronts: Fronts,
    pub stats: Vec<TierStats>,
}

/// Keys of the fronts of blocks. What a front says of its block holds for good: that its tokens are there, and of
/// steps that have ended well. A front is the one block's under whose key nothing was to be found when it became
/// known, and goes with it.
struct Fronts {
    per_block: usize,
    /// Of block after block; [`BlockHash::NONE`] where there is none.
    keys: Vec<BlockHash>,
}

impl DeviceTier {
    /// A tier over an empty pool, with keys of `fronts` fronts for each block.
    pub fn new(pool: Pool, num_groups: usize, fronts: usize) -> Self {
        let all = pool.len() * fronts;
        Self {
            index: Index::new(pool.len(), all),
            fronts: Fronts { per_block: fronts, keys: vec![BlockHash::NONE; all] },
            pool,
            stats: vec![TierStats::default(); num_groups],
        }
    }

    /// Bytes of all that is kept per block.
    pub fn metadata_bytes(&self) -> usize {
        let fronts = size_of_val(self.fronts.keys.as_slice());
        self.pool.metadata_bytes() + self.index.bytes() + fronts
    }

    /// The block that serves hits on this hash, its own or that of one of its fronts; [`NULL`] when there is none.
    pub fn find(&self, group: usize, hash: &BlockHash) -> BlockId {
        let holds = |place| match self.front(place) {
            None => self.pool.block(place).holds(group, hash),
            Some(front) => self.fronts.keys[front] == *hash && self.is_of(place, group),
        };
        let place = self.index.find(Tag::new(group, hash), holds);
        place.map_or(NULL, |place| self.block_at(place))
    }

    /// The front that a place of the index stands for; `None`: a block.
    fn front(&self, place: u32) -> Option<usize> {
        (place as usize).checked_sub(self.pool.len())
    }

    /// The block that a place of the index stands for.
    fn block_at(&self, place: u32) -> BlockId {
        self.front(place).map_or(place, |front| (front / self.fronts.per_block) as BlockId)
    }

    fn is_of(&self, place: u32, group: usize) -> bool {
        usize::from(self.pool.block(self.block_at(place)).group) == group
    }

    /// Makes a block findable whose content has been used `before` times.
    pub fn insert(
        &mut self,
        (group, hash): (usize, BlockHash),
        index: usize,
        id: BlockId,
        before: u8,
        events: &mut Events,
    ) {
        self.pool.order.stored(id, before);
        let tag = Tag::new(group, &hash);
        let pool = &self.pool;
        let is_block = |place| (place as usize) < pool.len();
        let holds = |place| is_block(place) && pool.block(place).holds(group, &hash);
        if let Some(first) = self.index.find_or_insert(tag, id, holds) {
            self.join(first, id);
        }
        let block = self.pool.block_mut(id);
        (block.hash, block.index, block.cached, block.uses) = (hash, index as u32, true, 0);
        (block.settled, block.written_back) = (false, false);
        let stats = &mut self.stats[group];
        stats.stored_blocks += 1;
        stats.cached_blocks += 1;
        events.push(EventKind::Stored, group as u32, Tier::Device, index as u32, hash);
    }

    /// Makes a cached block findable by its fronts, too, whose keys these are, the shortest first.
    pub fn insert_fronts(&mut self, id: BlockId, keys: &[BlockHash], events: &mut Events) {
        let (group, index) = (usize::from(self.pool.block(id).group), self.pool.block(id).index);
        let first = id as usize * self.fronts.per_block;
        for (front, &key) in (first..).zip(keys) {
            if self.find(group, &key) == NULL {
                self.fronts.keys[front] = key;
                self.index.insert(Tag::new(group, &key), (self.pool.len() + front) as u32);
                events.push(EventKind::Stored, group as u32, Tier::Device, index, key);
            }
        }
    }

    fn remove_fronts(&mut self, id: BlockId, events: &mut Events) {
        let Block { group, index, .. } = *self.pool.block(id);
        let first = id as usize * self.fronts.per_block;
        for front in first..first + self.fronts.per_block {
            let key = std::mem::replace(&mut self.fronts.keys[front], BlockHash::NONE);
            if key != BlockHash::NONE {
                let place = (self.pool.len() + front) as u32;
                self.index.remove(Tag::new(group.into(), &key), place);
                events.push(EventKind::Removed, group.into(), Tier::Device, index, key);
            }
        }
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
    pub fn remove(&mut self, id: BlockId, events: &mut Events) {
        let block = self.pool.block_mut(id);
        let (hash, index, group) = (block.hash, block.index, block.group as usize);
        let (prev, next) = (block.twin_prev, block.twin_next);
        (block.twin_prev, block.twin_next) = (id, id);
        block.cached = false;
        self.stats[group].cached_blocks -= 1;
        events.push(EventKind::Removed, group as u32, Tier::Device, index, hash);
        if self.fronts.per_block > 0 {
            self.remove_fronts(id, events);
        }
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
    pub fn empty(&mut self, id: BlockId, group: usize, events: &mut Events) {
        let block = *self.pool.block(id);
        if block.cached {
            if is_last_of_stride(block.index as usize) {
                self.pool.order.evicted(id, block.hash.key(block.group as usize));
            }
            self.remove(id, events);
            self.stats[block.group as usize].evicted_blocks += 1;
        }
        self.pool.block_mut(id).group = group as u16;
    }

    /// Drops every hash; the order of the free queue stays.
    pub fn clear(&mut self) {
        self.index.clear();
        self.fronts.keys.fill(BlockHash::NONE);
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
