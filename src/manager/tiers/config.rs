//! How the lower tiers are configured.

use super::breaker::BreakerConfig;
use super::slots::SlotTier;
use crate::codec::Codec;
use crate::error::{Error, Result};
use crate::manager::groups::Group;
use crate::manager::{BlockHash, Eviction, StorageSlot, Tier};
use crate::spec::GroupKind;

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
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostConfig {
    /// Block-sized slots.
    pub num_slots: u32,
    /// When blocks are written to it.
    pub write: WritePolicy,
    /// Which block gives way first.
    pub eviction: Eviction,
    /// Offloads in flight at most; what comes on top waits for its turn.
    pub max_offloads: u32,
    /// A hit that saves fewer tokens than this over what the device holds is not loaded (SGLang's
    /// `load_back_threshold` is 10).
    pub load_back_threshold: u32,
    /// When the tier is left alone.
    pub breaker: BreakerConfig,
    /// How the slots of each group are written; groups beyond the list: as they are.
    pub codecs: Vec<Codec>,
}

impl HostConfig {
    /// A write-through tier of this many slots that keeps blocks as they are, and from which every hit is loaded.
    pub fn new(num_slots: u32) -> Self {
        Self {
            num_slots,
            write: WritePolicy::Through,
            eviction: Eviction::Lru,
            max_offloads: 4096,
            load_back_threshold: 0,
            breaker: BreakerConfig { failures: 64, retry_ns: 1_000_000_000 },
            codecs: Vec::new(),
        }
    }

    /// The same tier under another write policy.
    pub fn with_write(self, write: WritePolicy) -> Self {
        Self { write, ..self }
    }

    /// The tier, empty.
    pub(in super::super) fn tier(&self, num_groups: usize) -> SlotTier {
        SlotTier::new(Tier::Host, self.num_slots, num_groups, self.eviction, self.breaker)
            .with_codecs(self.codecs.clone())
    }

    pub(in super::super) fn check(&self, op: &'static str, groups: &[Group]) -> Result<()> {
        check_slots(op, self.num_slots)?;
        let attention =
            |g: usize| groups.get(g).is_some_and(|group| group.kind != GroupKind::State);
        let wrong = |&(g, codec): &(usize, &Codec)| *codec != Codec::Raw && !attention(g);
        if let Some((group, codec)) = self.codecs.iter().enumerate().find(wrong) {
            return Err(Error::invalid(
                op,
                format!("{codec} for group {group}, which is none of attention"),
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

/// How long a request that waits gives its prefetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PrefetchPolicy {
    /// No time: it starts when it can, with what has arrived by then.
    BestEffort,
    /// Until all has arrived.
    WaitComplete,
    /// A time that grows with the tokens to fetch.
    Timeout {
        /// Nanoseconds in any case.
        base_ns: u64,
        /// Nanoseconds per 1024 tokens on top.
        per_1024_tokens_ns: u64,
    },
}

impl Default for PrefetchPolicy {
    /// 1 s and 0.25 s per 1024 tokens, as SGLang.
    fn default() -> Self {
        Self::Timeout { base_ns: 1_000_000_000, per_1024_tokens_ns: 250_000_000 }
    }
}

/// The storage tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StorageConfig {
    /// Block-sized slots.
    pub num_slots: u32,
    /// Which block gives way first.
    pub eviction: Eviction,
    /// Transfers to it in flight at most; what comes on top waits for its turn.
    pub max_persists: u32,
    /// Transfers from it in flight at most, likewise.
    pub max_fetches: u32,
    /// How long a waiting request gives its prefetch.
    pub prefetch: PrefetchPolicy,
    /// A prefetch that would save fewer tokens than this is not started.
    pub prefetch_threshold: u32,
    /// When the tier is left alone.
    pub breaker: BreakerConfig,
}

impl StorageConfig {
    /// A tier of this many slots, with SGLang's prefetch policy and threshold.
    pub fn new(num_slots: u32) -> Self {
        Self {
            num_slots,
            eviction: Eviction::Lru,
            max_persists: 256,
            max_fetches: 256,
            prefetch: PrefetchPolicy::default(),
            prefetch_threshold: 256,
            breaker: BreakerConfig { failures: 3, retry_ns: 1_000_000_000 },
        }
    }

    pub(in super::super) fn check(&self, op: &'static str) -> Result<()> {
        check_slots(op, self.num_slots)?;
        if self.max_persists == 0 || self.max_fetches == 0 {
            return Err(Error::invalid(
                op,
                "a storage tier that may not have a transfer in flight",
            ));
        }
        Ok(())
    }
}

fn check_slots(op: &'static str, num_slots: u32) -> Result<()> {
    if num_slots == u32::MAX {
        let most = format!("up to {}", u32::MAX - 1);
        return Err(Error::unsupported(op, "a number of slots of", num_slots, most));
    }
    Ok(())
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
