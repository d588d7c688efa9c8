//! Configurations that cannot be: each is refused with what was wrong with it.

use hybridkv::manager::{
    Eviction, GroupConfig, HostConfig, Manager, ManagerConfig, RankSet, Retention, WritePolicy,
};
use hybridkv::spec::{AttentionKind, GroupKind};

use super::kind_of;

fn sound() -> ManagerConfig {
    ManagerConfig {
        groups: vec![GroupConfig::new(AttentionKind::Full, 16)],
        num_blocks: 10,
        prefix_caching: true,
        retention: Retention::default(),
        eviction: Eviction::default(),
        max_model_len: 9 * 16,
        in_flight_tokens: 0,
        host: Some(HostConfig::new(4)),
        identity: [0; 32],
    }
}

/// What makes a sound configuration unsound, and the kind and a word of its refusal.
type Unsound = (fn(&mut ManagerConfig), &'static str, &'static str);

const UNSOUND: &[Unsound] = &[
    (|c| c.groups.clear(), "Unsupported", "layer groups"),
    (|c| c.groups[0].block_size = 0, "Unsupported", "block_size"),
    (|c| c.groups[0].block_size = (1 << 16) + 1, "Unsupported", "block_size"),
    (|c| c.groups[0].kind = AttentionKind::Sliding { window: 0 }.into(), "Unsupported", "window"),
    (|c| c.groups[0].kind = AttentionKind::Chunked { chunk: 0 }.into(), "Unsupported", "chunk"),
    (
        |c| c.groups[0] = GroupConfig { sink_tokens: 1, ..GroupConfig::new(GroupKind::State, 16) },
        "InvalidArgument",
        "sink",
    ),
    (
        |c| {
            let group = |size| GroupConfig::new(AttentionKind::Full, size);
            c.groups = [65_521, 65_519, 65_497].map(group).into();
        },
        "InvalidArgument",
        "multiple",
    ),
    (|c| c.retention.interval = Some(24), "InvalidArgument", "interval"),
    (|c| c.max_model_len = 0, "InvalidArgument", "max_model_len"),
    (|c| c.max_model_len = 9 * 16 + 1, "PoolTooSmall", "max_model_len"),
    (|c| c.max_model_len = u32::MAX, "PoolTooSmall", "max_model_len"),
    (|c| c.num_blocks = 0, "InvalidArgument", "null block"),
    (|c| c.num_blocks = 1, "InvalidArgument", "null block"),
    (|c| c.prefix_caching = false, "InvalidArgument", "prefix caching"),
    (|c| c.host = Some(HostConfig::new(u32::MAX)), "Unsupported", "slots"),
    (|c| c.host.as_mut().unwrap().max_offloads = 0, "InvalidArgument", "offload"),
    (
        |c| c.host.as_mut().unwrap().write = WritePolicy::Selective { uses: 0 },
        "Unsupported",
        "uses",
    ),
];

#[test]
fn an_unsound_configuration_is_refused_by_what_is_wrong_with_it() {
    Manager::new(sound()).unwrap();
    for (spoil, kind, word) in UNSOUND {
        let mut config = sound();
        spoil(&mut config);
        let error = Manager::new(config).err().expect(word);
        assert!(kind_of(&error) == *kind && error.to_string().contains(word), "{word}: {error}");
    }
}

#[test]
fn heads_that_cannot_be_dealt_to_ranks_are_refused() {
    for (ranks, heads) in [(0, 8), (RankSet::MAX_RANKS + 1, 8), (8, 0), (8, 3), (3, 8)] {
        assert!(RankSet::new(ranks, heads).is_err(), "{heads} heads on {ranks} ranks");
    }
}
