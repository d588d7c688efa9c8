//! Arguments of calls, sound or not, and sound configurations of all kinds.

use hybridkv::manager::{
    BlockHash, CostModel, Eviction, ExtraKeys, GroupConfig, HostConfig, ManagerConfig, Outcome,
    Quota, Retention, StorageConfig, StoredBlock, Tier, WritePolicy,
};
use hybridkv::spec::{AttentionKind, GroupKind};
use proptest::prelude::*;

/// Most tokens of a sequence.
pub const MOST: u32 = 40;

/// How tokens were hashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hashing {
    Own,
    OtherUnit(usize),
    OtherIdentity,
}

/// A number that may fit the sequence it is meant for.
#[derive(Debug, Clone, Copy)]
pub enum Number {
    Any(usize),
    Len(isize),
    Computed(isize),
    Settled(isize),
}

/// A name that may be of something.
#[derive(Debug, Clone, Copy)]
pub enum Name {
    Any(u64),
    Live(usize),
    Swapped(usize),
    New,
}

/// Arguments of any call: each takes what it needs.
#[derive(Debug, Clone)]
pub struct Raw {
    pub seq: Name,
    pub other: Name,
    pub group: usize,
    pub n: Number,
    pub m: Number,
    pub tokens: Vec<u32>,
    pub salted: bool,
    pub hashing: Hashing,
    /// Of the transfers in flight; beyond them, one that is not.
    pub transfer: usize,
    pub outcome: Outcome,
    pub time: i64,
    pub odd: u8,
}

#[derive(Debug)]
pub struct Args {
    pub seq: u64,
    pub other: u64,
    pub n: usize,
    pub m: usize,
    pub transfer: u64,
    pub now: u64,
    pub raw: Raw,
}

impl Args {
    pub fn tier(&self) -> Tier {
        [Tier::Device, Tier::Host, Tier::Storage][usize::from(self.raw.odd) % 3]
    }

    /// A quota of some blocks, or none.
    pub fn quota(&self) -> Option<Quota> {
        Quota::of_bytes(self.n as u64 % 8 * 4096, 4096).ok()
    }

    pub fn keys(&self) -> ExtraKeys<'static> {
        ExtraKeys { salt: if self.raw.salted { "tenant" } else { "" }, lora: "" }
    }

    pub fn host(&self) -> HostConfig {
        let host = HostConfig::new(20);
        match self.raw.odd {
            0 => HostConfig { max_offloads: 0, ..host },
            1 => HostConfig { num_slots: u32::MAX, ..host },
            2 => host.with_write(WritePolicy::Selective { uses: 0 }),
            _ => host,
        }
    }

    pub fn storage(&self) -> (StorageConfig, Vec<StoredBlock>) {
        let config = StorageConfig { prefetch_threshold: 1, ..StorageConfig::new(30) };
        let block =
            |slot, group, n| StoredBlock { slot, group, hash: BlockHash::from_bytes([n; 16]) };
        match self.raw.odd {
            0 => (StorageConfig { max_fetches: 0, ..config }, Vec::new()),
            1 => (StorageConfig { num_slots: u32::MAX, ..config }, Vec::new()),
            2 => (config, vec![block(0, 0, 1), block(0, 0, 2)]),
            3 => (config, vec![block(0, 0, 1), block(1, 0, 1)]),
            4 => (config, vec![block(0, 0, 1), block(30, 0, 2)]),
            5 => (config, vec![block(0, 0, 1), block(1, 99, 2)]),
            6 => (config, vec![block(3, 0, 1), block(1, 0, 2)]),
            _ => (config, Vec::new()),
        }
    }

    pub fn cost(&self) -> Option<CostModel> {
        let rate = match self.raw.odd {
            0 => f64::NAN,
            1 => 0.0,
            2 => f64::INFINITY,
            3 => 1e6,
            _ => return None,
        };
        Some(CostModel {
            prefill_tokens_per_s: 1e4,
            onboard_bytes_per_s: rate,
            fetch_bytes_per_s: 1e6,
            block_bytes: 4096,
        })
    }
}
pub fn raw() -> impl Strategy<Value = Raw> + Clone {
    let name = |live: u32, new: u32| {
        prop_oneof![
            2 => (0u64..6).prop_map(Name::Any),
            live => (0usize..4).prop_map(Name::Live),
            3 => (0usize..3).prop_map(Name::Swapped),
            new => Just(Name::New),
        ]
    };
    let near = -3isize..6;
    let number = |len: u32, computed: u32, settled: u32| {
        prop_oneof![
            len => Just(Number::Len(0)),
            1 => near.clone().prop_map(Number::Len),
            computed => Just(Number::Computed(0)),
            2 => near.clone().prop_map(Number::Computed),
            settled => Just(Number::Settled(0)),
            1 => near.clone().prop_map(Number::Settled),
            1 => (0usize..50).prop_map(Number::Any),
            1 => Just(Number::Any(usize::MAX)),
        ]
    };
    let tokens = prop_oneof![
        1 => Just(Vec::new()),
        6 => (0u32..2, 1usize..30).prop_map(|(word, n)| vec![word; n]),
        4 => (0u32..2, 1usize..4).prop_map(|(word, n)| vec![word; n]),
        2 => (0u32..2, 1usize..20, 2u32..4, 1usize..10)
            .prop_map(|(a, n, b, k)| [vec![a; n], vec![b; k]].concat()),
        1 => Just(vec![0; MOST as usize + 1]),
    ];
    let hashing = prop_oneof![
        6 => Just(Hashing::Own),
        2 => (0usize..7).prop_map(Hashing::OtherUnit),
        1 => Just(Hashing::OtherIdentity),
    ];
    let time = prop_oneof![8 => 0i64..1_000_000_000, 1 => -5i64..0, 1 => Just(i64::MIN)];
    let outcome = prop_oneof![5 => Just(Outcome::Succeeded), 1 => Just(Outcome::Failed)];
    let group = prop_oneof![8 => 0usize..3, 1 => Just(usize::MAX)];
    let transfer = prop_oneof![8 => 0usize..4, 1 => 0usize..300, 1 => Just(usize::MAX)];
    (
        (name(9, 4), name(1, 9), group, number(8, 2, 1), number(5, 8, 3)),
        (tokens, prop::bool::weighted(0.2), hashing, transfer, outcome, time, 0u8..16),
    )
        .prop_map(|((seq, other, group, n, m), rest)| {
            let (tokens, salted, hashing, transfer, outcome, time, odd) = rest;
            Raw { seq, other, group, n, m, tokens, salted, hashing, transfer, outcome, time, odd }
        })
}

pub fn config() -> impl Strategy<Value = ManagerConfig> {
    let group = |kind: GroupKind, block_size, sink_tokens| GroupConfig {
        sink_tokens,
        ..GroupConfig::new(kind, block_size)
    };
    let full = group(AttentionKind::Full.into(), 4, 0);
    let sliding = group(AttentionKind::Sliding { window: 7 }.into(), 2, 3);
    let chunked = group(AttentionKind::Chunked { chunk: 10 }.into(), 4, 0);
    let state = group(GroupKind::State, 4, 0);
    let mixes = [
        vec![full],
        vec![full, sliding],
        vec![full, chunked],
        vec![sliding, chunked],
        vec![full, state],
        vec![full, sliding, state],
    ];
    let write = prop_oneof![
        2 => Just(WritePolicy::Through),
        1 => Just(WritePolicy::Selective { uses: 2 }),
        2 => Just(WritePolicy::Back),
    ];
    let host = prop::option::weighted(0.8, (0u32..40, write, 1u32..6));
    (
        prop::sample::select(mixes.to_vec()),
        prop::sample::select(Eviction::ALL),
        12u32..60,
        host,
        any::<bool>(),
    )
        .prop_map(|(groups, eviction, num_blocks, host, dense)| ManagerConfig {
            groups,
            num_blocks,
            prefix_caching: true,
            retention: match dense {
                true => Retention::dense(),
                false => Retention::default(),
            },
            eviction,
            max_model_len: MOST,
            in_flight_tokens: 1 << 20,
            host: host.map(|(num_slots, write, max_offloads)| HostConfig {
                write,
                max_offloads,
                ..HostConfig::new(num_slots)
            }),
            identity: [7; 32],
        })
}
