//! How the lower tiers are configured.

use crate::error::{Error, Result};
use crate::manager::{BlockHash, StorageSlot};

/// When a block is written to the host tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WritePolicy {
    /// As soon as it is computed.
    Through,
    /// Once this many sequences have computed or hit it (SGLang's `write_through_selective` is 2; 1 is
    /// [`WritePolicy::Through`]). The count is of the copy on the device and goes with it.
    Selective {
        /// Sequences.
        uses: u32,
    },
    /// When it is evicted from the device: it stays there until it is stored. Dropped when the host has
    /// no room that it could make.
    Back,
}

/// The host tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostConfig {
    /// Block-sized slots.
    pub num_slots: u32,
    /// When blocks are written to it.
    pub write: WritePolicy,
    /// Offloads in flight at most; what comes on top waits for its turn.
    pub max_offloads: u32,
}

impl HostConfig {
    /// A write-through tier of this many slots.
    pub fn new(num_slots: u32) -> Self {
        Self { num_slots, write: WritePolicy::Through, max_offloads: 4096 }
    }

    /// The same tier under another write policy.
    pub fn with_write(self, write: WritePolicy) -> Self {
        Self { write, ..self }
    }

    pub(in super::super) fn check(&self, op: &'static str) -> Result<()> {
        if self.num_slots == u32::MAX {
            return Err(Error::unsupported(
                op,
                "a number of host slots of",
                u32::MAX,
                format!("up to {}", u32::MAX - 1),
            ));
        }
        if self.max_offloads == 0 {
            return Err(Error::invalid(op, "a host tier that may not have an offload in flight"));
        }
        if self.write == (WritePolicy::Selective { uses: 0 }) {
            return Err(Error::unsupported(
                op,
                "a number of uses before a write of",
                0,
                "1 or more",
            ));
        }
        Ok(())
    }
}

/// A block that the storage tier holds, as its store found it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredBlock {
    /// Where.
    pub slot: StorageSlot,
    /// Layer group of the block.
    pub group: u32,
    /// With the group, the key of the block.
    pub hash: BlockHash,
}
