//! Managers of the tests of single rules. Not every one of them uses all of it.
#![allow(dead_code)]

use hybridkv::manager::{
    Eviction, ExtraKeys, GroupConfig, HostConfig, Manager, ManagerConfig, Retention, Transfer,
};
use hybridkv::spec::AttentionKind;

pub const KEYS: ExtraKeys<'static> = ExtraKeys { salt: "", lora: "" };
pub const FULL: AttentionKind = AttentionKind::Full;

/// A manager with blocks of 16 tokens, dense retention and LRU.
pub fn manager(kinds: &[AttentionKind], num_blocks: u32, host: Option<HostConfig>) -> Manager {
    let group = |&kind| GroupConfig::new(kind, 16);
    Manager::new(ManagerConfig {
        groups: kinds.iter().map(group).collect(),
        num_blocks,
        prefix_caching: true,
        retention: Retention::dense(),
        eviction: Eviction::Lru,
        max_model_len: (num_blocks - 1) / kinds.len() as u32 * 16,
        in_flight_tokens: 1 << 20,
        host,
        identity: [1; 32],
    })
    .unwrap()
}

/// So many tokens that differ from one another.
pub fn tokens(start: u32, n: u32) -> Vec<u32> {
    (start..start + n).collect()
}

/// What the manager hands out now.
pub fn transfers(m: &mut Manager) -> Vec<Transfer> {
    std::iter::from_fn(|| m.next_transfer()).collect()
}
