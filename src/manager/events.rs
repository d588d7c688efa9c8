//! What became findable and what ceased to be, per group and tier, for routers and tests.
//!
//! A router that knows the identity, the hash unit and the groups of a manager needs neither tokens nor parents
//! of a block: hashes are chained, so that the hash of a prompt's prefix, which it computes itself
//! ([`HashedTokens`](super::HashedTokens)), stands for all tokens and extra keys before it.

use serde::Serialize;

use super::hash::BlockHash;

/// Where a block is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    /// Device memory.
    Device,
    /// Pinned host memory.
    Host,
    /// Storage.
    Storage,
}

impl Tier {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::Host => "host",
            Self::Storage => "storage",
        }
    }
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// Blocks became findable.
    Stored,
    /// Blocks are not findable any more.
    Removed,
    /// Nothing of the tier is findable any more.
    Cleared,
}

/// One change of what a tier can serve. Of several copies of a block in one tier each is stored, and each is
/// removed: it can be served while more were stored than removed since the tier was cleared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// What happened.
    pub kind: EventKind,
    /// Layer group of the blocks.
    pub group: u32,
    /// The tier that changed.
    pub tier: Tier,
    /// Indices of the blocks in their sequences.
    pub indices: Vec<u32>,
    /// Their hashes, in the same order: with the group, what names a block to every holder of the identity.
    pub hashes: Vec<BlockHash>,
}

/// The log of events since it was last drained; off until it is asked for.
#[derive(Default)]
pub(super) struct Events {
    pub enabled: bool,
    log: Vec<Event>,
    /// Events before this one belong to earlier operations.
    sealed: usize,
}

impl Events {
    /// Begins a new operation.
    pub fn seal(&mut self) {
        self.sealed = self.log.len();
    }

    /// A log of an operation that may yet be refused.
    pub fn draft(&self) -> Self {
        Self { enabled: self.enabled, ..Self::default() }
    }

    /// Takes over what was drafted, as an operation of its own.
    pub fn join(&mut self, draft: Self) {
        self.log.extend(draft.log);
        self.seal();
    }

    /// Notes one block; it joins the latest event of the operation when that is of the same kind, group and
    /// tier.
    pub fn push(&mut self, kind: EventKind, group: u32, tier: Tier, index: u32, hash: BlockHash) {
        if !self.enabled {
            return;
        }
        match self.log[self.sealed..].last_mut() {
            Some(last) if (last.kind, last.group, last.tier) == (kind, group, tier) => {
                last.indices.push(index);
                last.hashes.push(hash);
            }
            _ => {
                self.log.push(Event { kind, group, tier, indices: vec![index], hashes: vec![hash] })
            }
        }
    }

    /// Notes that a tier was cleared.
    pub fn cleared(&mut self, group: u32, tier: Tier) {
        if self.enabled {
            self.log.push(Event {
                kind: EventKind::Cleared,
                group,
                tier,
                indices: Vec::new(),
                hashes: Vec::new(),
            });
        }
    }

    /// All events since the last call, oldest first.
    pub fn drain(&mut self) -> Vec<Event> {
        self.sealed = 0;
        std::mem::take(&mut self.log)
    }
}
