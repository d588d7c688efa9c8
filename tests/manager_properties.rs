//! Random histories. `oracle` predicts the manager's every answer, the order of reuse included, from the
//! definitions alone, on the device tier; `machine` puts a world around it, in which blocks have contents that
//! move between the tiers, steps and transfers end in any order and fail, and checks every invariant after each of
//! a million and a half operations.

#[path = "manager_properties/invariants.rs"]
mod invariants;
#[path = "manager_properties/machine.rs"]
mod machine;
#[path = "manager_properties/oracle.rs"]
mod oracle;
#[path = "manager_properties/prefixes.rs"]
mod prefixes;
#[path = "manager_properties/sequences.rs"]
mod sequences;
#[path = "manager_properties/shares.rs"]
mod shares;
#[path = "manager_properties/transfers.rs"]
mod transfers;
#[path = "manager_properties/world.rs"]
mod world;

use hybridkv::manager::{Eviction, GroupConfig, ManagerConfig, Retention, Slack};
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

/// Blocks that a prefix of `n` tokens needs: those that hold a token which the query at `n` sees, those of the
/// sinks, and the one that it ends inside of, which is to be filled up.
fn needed(group: &GroupConfig, n: usize) -> Vec<usize> {
    let size = group.block_size as usize;
    (0..n.div_ceil(size))
        .filter(|b| {
            let tokens = b * size..((b + 1) * size).min(n);
            b * size < group.sink_tokens as usize
                || n < (b + 1) * size
                || tokens.into_iter().any(|j| sees(group, n, j))
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
    let group = (kind, sinks, prop_oneof![3 => Just(2u32), 1 => Just(3), 3 => Just(4)]).prop_map(
        |(kind, sink_tokens, block_size)| GroupConfig {
            kind: kind.into(),
            sink_tokens,
            block_size,
        },
    );
    prop::collection::vec(group, 1..4)
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Tokens per hash.
fn unit(groups: &[GroupConfig]) -> usize {
    groups.iter().map(|group| group.block_size as usize).fold(0, gcd)
}

/// Hits are multiples of this: of the blocks of all groups, or, where blocks are found by their fronts, of those of
/// the states alone.
fn alignment(groups: &[GroupConfig], fronts: bool) -> usize {
    let whole = groups.iter().filter(|group| !fronts || group.kind == GroupKind::State);
    let sizes = whole.map(|group| group.block_size as usize);
    sizes.fold(unit(groups), |a, b| a / gcd(a, b) * b)
}

/// Tokens at which a prefix inside of block `b` can end.
fn fronts(group: &GroupConfig, unit: usize, b: usize) -> impl Iterator<Item = usize> + use<> {
    let size = group.block_size as usize;
    (b * size + 1..(b + 1) * size).filter(move |n| n.is_multiple_of(unit))
}

fn retention(groups: &[GroupConfig]) -> impl Strategy<Value = Retention> + use<> {
    let alignments = [false, true].map(|fronts| alignment(groups, fronts) as u32);
    let interval = prop_oneof![Just(None), Just(Some(0u32)), (1u32..4).prop_map(Some)];
    let slack = prop_oneof![4 => (0u32..3).prop_map(Slack::Units), 1 => Just(Slack::ByKind)];
    (interval, slack, any::<bool>(), any::<bool>(), any::<bool>()).prop_map(
        move |(interval, slack, dense_chunks, ends, fronts)| Retention {
            interval: interval.map(|k| k * alignments[usize::from(fronts)]),
            slack,
            dense_chunks,
            ends,
            fronts,
        },
    )
}

fn config() -> impl Strategy<Value = ManagerConfig> {
    (groups(), 20u32..60).prop_flat_map(|(groups, num_blocks)| {
        retention(&groups).prop_map(move |retention| ManagerConfig {
            retention,
            eviction: Eviction::Lru,
            max_model_len: 1 + (num_blocks - 8) / groups.len() as u32,
            groups: groups.clone(),
            num_blocks,
            prefix_caching: true,
            in_flight_tokens: 1 << 20,
            host: None,
            identity: [9; 32],
        })
    })
}

const LONGEST_PROMPT: usize = 48;
const LONGEST_LOOKAHEAD: usize = 8;

/// Prompts over few tokens, so that prefixes are shared.
fn prompt() -> impl Strategy<Value = Vec<u32>> {
    prop_oneof![
        3 => (0u32..3, 1..LONGEST_PROMPT).prop_map(|(word, n)| vec![word; n]),
        2 => (0u32..3, 1usize..30, 0u32..3, 1usize..10).prop_map(|(a, n, b, k)| {
            [vec![a; n], vec![b; k]].concat()
        }),
    ]
}
