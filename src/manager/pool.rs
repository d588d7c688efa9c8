//! The elastic device pool: equal blocks, any of which can serve any layer group.
//!
//! A block is *used* while tables of sequences hold it, *pinned* while a transfer reads or writes it, and
//! *available* when neither. Unused blocks stand in one queue, reused from its head; the links are
//! indices inside the blocks, so that any block leaves the queue in constant time. Block 0 is the null
//! block: it never holds data and is the queue's sentinel.

use super::BlockId;
use super::hash::BlockHash;

/// The null block.
pub(super) const NULL: BlockId = 0;

/// What the pool knows of one block. `hash`, `group` and `index` are meaningful while `cached`.
#[derive(Clone, Copy)]
pub(super) struct Block {
    /// Neighbours in the free queue, while `queued`.
    prev: BlockId,
    next: BlockId,
    /// Neighbours in the ring of blocks with the same hash and group, oldest first, while `cached`.
    pub twin_prev: BlockId,
    pub twin_next: BlockId,
    /// Tables that hold the block.
    pub users: u32,
    /// Index of the block in its sequence.
    pub index: u32,
    pub hash: BlockHash,
    pub group: u16,
    /// Transfers in flight from or to the block.
    pins: u16,
    queued: bool,
    /// Whether the prefix index names it.
    pub cached: bool,
}

/// All blocks and the queue of the unused ones.
pub(super) struct Pool {
    blocks: Vec<Block>,
    available: usize,
}

impl Pool {
    /// A pool of `num_blocks`, the null block included; all others queued in ascending order.
    pub fn new(num_blocks: u32, no_hash: BlockHash) -> Self {
        let last = num_blocks - 1;
        let blocks = (0..num_blocks)
            .map(|id| Block {
                prev: if id == 0 { last } else { id - 1 },
                next: if id == last { 0 } else { id + 1 },
                twin_prev: id,
                twin_next: id,
                users: 0,
                index: 0,
                hash: no_hash,
                group: 0,
                pins: 0,
                queued: id != NULL,
                cached: false,
            })
            .collect();
        Self { blocks, available: last as usize }
    }

    pub fn block(&self, id: BlockId) -> &Block {
        &self.blocks[id as usize]
    }

    pub fn block_mut(&mut self, id: BlockId) -> &mut Block {
        &mut self.blocks[id as usize]
    }

    /// Blocks of the pool, the null block included.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that could be taken now.
    pub fn available(&self) -> usize {
        self.available
    }

    /// Whether a touch of `id` would make one block less available.
    pub fn is_available(&self, id: BlockId) -> bool {
        let block = self.block(id);
        block.users == 0 && block.pins == 0
    }

    /// Available blocks in the order of their reuse.
    pub fn queue(&self) -> impl Iterator<Item = BlockId> + '_ {
        let mut at = NULL;
        std::iter::from_fn(move || {
            at = self.block(at).next;
            (at != NULL).then_some(at)
        })
        .filter(|&id| self.block(id).pins == 0)
    }

    /// Takes the next block for one user. It may still be cached: the caller drops its hash.
    pub fn take(&mut self) -> Option<BlockId> {
        if self.available == 0 {
            return None;
        }
        loop {
            let id = self.block(NULL).next;
            debug_assert_ne!(id, NULL, "an available block is queued");
            self.unlink(id);
            let block = self.block_mut(id);
            // A pinned block steps out of the queue and comes back to its head when unpinned.
            if block.pins == 0 {
                block.users = 1;
                self.available -= 1;
                return Some(id);
            }
        }
    }

    /// Adds a user.
    pub fn touch(&mut self, id: BlockId) {
        if self.block(id).users == 0 {
            if self.block(id).pins == 0 {
                self.available -= 1;
            }
            if self.block(id).queued {
                self.unlink(id);
            }
        }
        self.block_mut(id).users += 1;
    }

    /// Drops one user of each of the blocks, given the end of the sequence first; null blocks are
    /// skipped. Cached blocks left without users go to the tail of the queue, the others to its head: in
    /// both places the end of the sequence stands before its start.
    pub fn release(&mut self, blocks: impl Iterator<Item = BlockId>) {
        let mut head = NULL;
        for id in blocks {
            if id == NULL {
                continue;
            }
            let block = self.block_mut(id);
            block.users -= 1;
            if block.users > 0 {
                continue;
            }
            if block.pins == 0 {
                self.available += 1;
            }
            if self.block(id).cached {
                self.link_after(self.block(NULL).prev, id);
            } else {
                self.link_after(head, id);
                head = id;
            }
        }
    }

    /// Keeps a block from reuse until [`Self::unpin`].
    pub fn pin(&mut self, id: BlockId) {
        if self.is_available(id) {
            self.available -= 1;
        }
        self.block_mut(id).pins += 1;
    }

    /// Undoes one [`Self::pin`].
    pub fn unpin(&mut self, id: BlockId) {
        self.block_mut(id).pins -= 1;
        if self.is_available(id) {
            self.available += 1;
            if !self.block(id).queued {
                self.link_after(NULL, id);
            }
        }
    }

    fn unlink(&mut self, id: BlockId) {
        let Block { prev, next, .. } = *self.block(id);
        self.block_mut(prev).next = next;
        self.block_mut(next).prev = prev;
        self.block_mut(id).queued = false;
    }

    fn link_after(&mut self, prev: BlockId, id: BlockId) {
        let next = self.block(prev).next;
        self.block_mut(prev).next = id;
        self.block_mut(next).prev = id;
        let block = self.block_mut(id);
        (block.prev, block.next, block.queued) = (prev, next, true);
    }
}
