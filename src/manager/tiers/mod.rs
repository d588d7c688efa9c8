//! The tiers: which blocks each of them holds, under which hash.

pub(super) mod device;
pub(super) mod host;
