//! Random histories. `oracle` predicts the manager's every answer from the definitions alone, on the device
//! tier; `bytes` gives the blocks contents and moves them, so that whatever is lost, overwritten or mixed up
//! on its way between tiers shows as a wrong token.

#[path = "manager_properties/bytes.rs"]
mod bytes;
#[path = "manager_properties/oracle.rs"]
mod oracle;

use hybridkv::manager::{Eviction, GroupConfig, ManagerConfig, Retention};
use hybridkv::spec::{AttentionKind, GroupKind};
use proptest::prelude::*;

/// Whether a query at `i` sees the key at `j`: the definition, once more.
fn sees(group: &GroupConfig, i: usize, j: usize) -> bool {
    let kind = match group.kind {
        GroupKind::Attention(AttentionKind::Full) => true,
        GroupKind::Attention(AttentionKind::Sliding { window }) => i - j < window as usize,
        GroupKind::Attention(AttentionKind::Chunked { chunk }) => {
            i / chunk as usize == j / chunk as usize
        }
        // What follows needs the state that the last token left, and no other.
        GroupKind::State => i - j <= 1,
    };
    j <= i && (kind || j < group.sink_tokens as usize)
}

/// Blocks that a prefix of `n` tokens needs: those that hold a token which the query at `n` sees, and
/// those of the sinks.
fn needed(group: &GroupConfig, n: usize) -> Vec<usize> {
    let size = group.block_size as usize;
    (0..n.div_ceil(size))
        .filter(|b| {
            let tokens = b * size..((b + 1) * size).min(n);
            b * size < group.sink_tokens as usize || tokens.into_iter().any(|j| sees(group, n, j))
        })
        .collect()
}

fn groups() -> impl Strategy<Value = Vec<GroupConfig>> {
    let kind = prop_oneof![
        2 => Just(AttentionKind::Full),
        2 => (1u32..14).prop_map(|window| AttentionKind::Sliding { window }),
        2 => (1u32..14).prop_map(|chunk| AttentionKind::Chunked { chunk }),
    ];
    let sinks = prop_oneof![3 => Just(0u32), 1 => 1u32..7];
    let group = (kind, sinks, prop_oneof![Just(2u32), Just(4)]).prop_map(
        |(kind, sink_tokens, block_size)| GroupConfig {
            kind: kind.into(),
            sink_tokens,
            block_size,
        },
    );
    prop::collection::vec(group, 1..4)
}

fn alignment(groups: &[GroupConfig]) -> usize {
    groups.iter().map(|group| group.block_size).max().unwrap() as usize
}

fn config() -> impl Strategy<Value = ManagerConfig> {
    let interval = prop_oneof![Just(None), Just(Some(0u32)), (1u32..4).prop_map(Some)];
    (groups(), interval, 0u32..3, any::<bool>(), 20u32..60).prop_map(
        |(groups, interval, slack, dense_chunks, num_blocks)| ManagerConfig {
            retention: Retention {
                interval: interval.map(|k| k * alignment(&groups) as u32),
                slack,
                dense_chunks,
            },
            eviction: Eviction::Lru,
            max_model_len: 1 + (num_blocks - 8) / groups.len() as u32,
            groups,
            num_blocks,
            prefix_caching: true,
            in_flight_tokens: 1 << 20,
            host: None,
            identity: [9; 32],
        },
    )
}

/// Prompts over few tokens, so that prefixes are shared.
fn prompt() -> impl Strategy<Value = Vec<u32>> {
    prop_oneof![
        3 => (0u32..3, 1usize..48).prop_map(|(word, n)| vec![word; n]),
        2 => (0u32..3, 1usize..30, 0u32..3, 1usize..10).prop_map(|(a, n, b, k)| {
            [vec![a; n], vec![b; k]].concat()
        }),
    ]
}
