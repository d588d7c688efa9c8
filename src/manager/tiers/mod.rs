//! The tiers: which blocks each of them holds, under which hash, and how the lower ones are used.

mod breaker;
mod config;
mod cost;
pub(super) mod device;
mod index;
pub(super) mod quotas;
pub(super) mod slots;

pub use self::breaker::{BreakerConfig, BreakerState};
pub use self::config::{HostConfig, PrefetchPolicy, StorageConfig, StoredBlock, WritePolicy};
pub use self::cost::{Candidate, CostModel};
