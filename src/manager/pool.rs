//! The elastic device pool: equal blocks, any of which can serve any layer group.
//!
//! A block is *used* while tables of sequences hold it, *pinned* while a transfer reads or writes it, and
//! *available* when neither. Unused blocks stand in line for their reuse, in the order of the eviction policy.
//! Block 0 is the null block: it never holds data.

use super::BlockId;
use super::eviction::{Eviction, Order};
use super::hash::BlockHash;
use super::quota::TenantId;

/// The null block.
pub(super) const NULL: BlockId = 0;

/// What the pool knows of one block. `hash` and `index` are meaningful while `cached`.
#[derive(Clone, Copy)]
pub(super) struct Block {
    pub hash: BlockHash,
    /// Neighbours in the ring of blocks with the same hash and group, oldest first, while `cached`.
    pub twin_prev: BlockId,
    pub twin_next: BlockId,
    /// Tables that hold the block.
    pub users: u32,
    /// Index of the block in its sequence.
    pub index: u32,
    /// Layer group that it was last taken for.
    pub group: u16,
    /// Whose quotas it counts for once it goes down.
    pub tenant: TenantId,
    /// Whether the prefix index names it.
    pub cached: bool,
    /// Sequences that have computed or hit it since then, as far as the write policy counts.
    pub uses: u8,
    /// Whether the work that wrote it is known to have ended well.
    pub settled: bool,
    /// Whether write-back has stored it since its last use. A host that has let go of it by now is not asked again:
    /// what is to be evicted together can be more than the host has room for.
    pub written_back: bool,
    /// Transfers in flight from or to the block.
    pins: u32,
}

impl Block {
    /// Whether this is the content of a block of `group` whose key is `hash`.
    pub fn holds(&self, group: usize, hash: &BlockHash) -> bool {
        self.hash == *hash && usize::from(self.group) == group
    }
}

/// Where a block with content stands in line when it has no user any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// By its own uses.
    Own,
    /// As if it had been used as often as this block.
    Like(BlockId),
    /// Before all others.
    Demoted,
}

/// All blocks and the line of the unused ones.
pub(super) struct Pool {
    blocks: Vec<Block>,
    pub order: Order,
    available: usize,
}

impl Pool {
    /// A pool of `num_blocks` (at least 1), the null block included; all others in line in
    /// ascending order.
    pub fn new(num_blocks: u32, eviction: Eviction) -> Self {
        let mut order = Order::new(eviction, num_blocks);
        (1..num_blocks).for_each(|id| order.place_empty(id));
        let blocks = (0..num_blocks)
            .map(|id| Block {
                hash: BlockHash::NONE,
                twin_prev: id,
                twin_next: id,
                users: 0,
                index: 0,
                group: 0,
                tenant: 0,
                cached: false,
                uses: 0,
                settled: false,
                written_back: false,
                pins: 0,
            })
            .collect();
        Self { blocks, order, available: num_blocks.saturating_sub(1) as usize }
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

    /// Bytes of all that is kept per block.
    pub fn metadata_bytes(&self) -> usize {
        size_of_val(self.blocks.as_slice()) + self.order.bytes()
    }

    /// Blocks that could be taken now.
    pub fn available(&self) -> usize {
        self.available
    }

    /// Whether `id` is neither used nor pinned.
    pub fn is_available(&self, id: BlockId) -> bool {
        let block = self.block(id);
        block.users == 0 && block.pins == 0
    }

    /// Whether anything but the one sequence that holds `id` counts on its contents: another sequence, the
    /// prefix index, or a transfer.
    pub fn is_shared(&self, id: BlockId) -> bool {
        let block = self.block(id);
        block.users > 1 || block.cached || block.pins > 0
    }

    /// Whether `id` becomes available when its one user gives it back.
    pub fn frees(&self, id: BlockId) -> bool {
        let block = self.block(id);
        block.users == 1 && block.pins == 0
    }

    /// Available blocks in the order of their reuse.
    pub fn queue(&self) -> impl Iterator<Item = BlockId> + '_ {
        self.order.iter().filter(|&id| self.is_available(id))
    }

    /// Takes the next block for one user. It may still be cached: the caller drops its hash.
    pub fn take(&mut self) -> Option<BlockId> {
        if self.available == 0 {
            return None;
        }
        loop {
            let id = self.order.pop()?;
            // One that is in use or pinned steps out of line until it is not.
            if self.is_available(id) {
                self.block_mut(id).users = 1;
                self.available -= 1;
                return Some(id);
            }
        }
    }

    /// Adds a user.
    pub fn touch(&mut self, id: BlockId) {
        let block = &mut self.blocks[id as usize];
        block.users += 1;
        if block.users == 1 {
            block.written_back = false;
            self.available -= usize::from(block.pins == 0);
            self.order.leave(id);
        }
    }

    /// Drops one user of each of the blocks, given the end of the sequence first; null blocks are
    /// skipped. Those left without users stand in line again, the end of the sequence before its start.
    pub fn release(&mut self, blocks: impl Iterator<Item = BlockId>) {
        let blocks = blocks.filter(|&id| id != NULL).map(|id| (0, id));
        self.release_as(blocks, |_| Standing::Own);
    }

    /// [`Self::release`] of numbered blocks, none of them the null block, that stand where their numbers say.
    pub fn release_as(
        &mut self,
        blocks: impl Iterator<Item = (usize, BlockId)>,
        standing: impl Fn(usize) -> Standing,
    ) {
        self.order.begin_release();
        for (b, id) in blocks {
            let block = &mut self.blocks[id as usize];
            block.users -= 1;
            if block.users > 0 {
                continue;
            }
            self.available += usize::from(block.pins == 0);
            if !block.cached {
                self.order.place_empty(id);
                continue;
            }
            match standing(b) {
                Standing::Own => self.order.place(id),
                Standing::Like(other) => {
                    self.order.follow(id, other);
                    self.order.place(id);
                }
                Standing::Demoted => self.order.demote(id),
            }
        }
    }

    /// Keeps a block from reuse until [`Self::unpin`].
    pub fn pin(&mut self, id: BlockId) {
        self.available -= usize::from(self.is_available(id));
        self.block_mut(id).pins += 1;
    }

    /// Undoes one [`Self::pin`].
    pub fn unpin(&mut self, id: BlockId) {
        self.block_mut(id).pins -= 1;
        if self.is_available(id) {
            self.available += 1;
            if !self.order.contains(id) {
                match self.block(id).cached {
                    true => self.order.place_first(id),
                    false => {
                        self.order.begin_release();
                        self.order.place_empty(id);
                    }
                }
            }
        }
    }
}
