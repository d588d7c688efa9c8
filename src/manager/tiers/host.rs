//! The host tier: block-sized slots of pinned memory and the index of what they hold.

use super::device::Index;
use crate::manager::HostSlot;
use crate::manager::hash::BlockHash;

/// Slots and index.
pub(in super::super) struct HostTier {
    index: Vec<Index<HostSlot>>,
}

impl HostTier {
    pub fn new(_num_slots: u32, num_groups: usize, _no_hash: BlockHash) -> Self {
        Self { index: vec![Index::default(); num_groups] }
    }

    /// The slot that holds a block whole.
    pub fn find(&self, group: usize, hash: &BlockHash) -> Option<HostSlot> {
        self.index[group].get(hash).copied()
    }
}
