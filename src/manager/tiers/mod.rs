//! The tiers: which blocks each of them holds, under which hash, and how the lower ones are used.

mod config;
pub(super) mod device;
pub(super) mod slots;

pub use self::config::{HostConfig, StoredBlock, WritePolicy};
