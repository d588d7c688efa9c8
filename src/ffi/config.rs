//! The configuration of a manager as the C ABI takes it: JSON, of which include/hybridkv.h shows every field.

use serde::Deserialize;

use crate::error::{Error, Result};
use crate::manager::{
    Eviction, GroupConfig, HostConfig, Manager, ManagerConfig, PrefetchPolicy, Retention, Slack,
    StorageConfig, WritePolicy,
};
use crate::spec::{AttentionKind, GroupKind};

const OP: &str = "manager config";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    groups: Vec<Group>,
    #[serde(default = "sixteen")]
    block_size: u32,
    num_blocks: u32,
    max_model_len: u32,
    #[serde(default = "a_step")]
    in_flight_tokens: u32,
    #[serde(default = "yes")]
    prefix_caching: bool,
    #[serde(default)]
    eviction: Eviction,
    #[serde(default)]
    identity: String,
    #[serde(default)]
    retention: Retained,
    host: Option<Host>,
    storage: Option<Storage>,
}

#[derive(Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
enum Group {
    Full {
        #[serde(default)]
        sink_tokens: u32,
        block_size: Option<u32>,
    },
    Sliding {
        window: u32,
        #[serde(default)]
        sink_tokens: u32,
        block_size: Option<u32>,
    },
    Chunked {
        chunk: u32,
        #[serde(default)]
        sink_tokens: u32,
        block_size: Option<u32>,
    },
    State {
        block_size: Option<u32>,
    },
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Retained {
    interval: Option<u32>,
    /// Alignment units; by kind without.
    slack: Option<u32>,
    dense_chunks: bool,
    ends: bool,
    fronts: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Host {
    num_slots: u32,
    #[serde(default)]
    write: Write,
    #[serde(default = "two")]
    uses: u32,
    #[serde(default = "lru")]
    eviction: Eviction,
    #[serde(default)]
    load_back_threshold: u32,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "snake_case")]
enum Write {
    #[default]
    Through,
    Selective,
    Back,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Storage {
    num_slots: u32,
    #[serde(default = "lru")]
    eviction: Eviction,
    prefetch_threshold: Option<u32>,
    prefetch: Option<Prefetch>,
}

#[derive(Deserialize)]
#[serde(tag = "policy", rename_all = "snake_case", deny_unknown_fields)]
enum Prefetch {
    BestEffort,
    WaitComplete,
    Timeout { base_ns: u64, per_1024_tokens_ns: u64 },
}

impl From<Prefetch> for PrefetchPolicy {
    fn from(prefetch: Prefetch) -> Self {
        match prefetch {
            Prefetch::BestEffort => Self::BestEffort,
            Prefetch::WaitComplete => Self::WaitComplete,
            Prefetch::Timeout { base_ns, per_1024_tokens_ns } => {
                Self::Timeout { base_ns, per_1024_tokens_ns }
            }
        }
    }
}

impl Default for Retained {
    fn default() -> Self {
        let Retention { interval, dense_chunks, ends, fronts, .. } = Retention::default();
        Self { interval, slack: None, dense_chunks, ends, fronts }
    }
}

fn sixteen() -> u32 {
    16
}

fn a_step() -> u32 {
    8192
}

fn yes() -> bool {
    true
}

fn two() -> u32 {
    2
}

fn lru() -> Eviction {
    Eviction::Lru
}

impl Group {
    fn config(&self, of_all: u32) -> GroupConfig {
        let attention = |kind: AttentionKind, sink_tokens, block_size: Option<u32>| GroupConfig {
            kind: kind.into(),
            sink_tokens,
            block_size: block_size.unwrap_or(of_all),
        };
        match *self {
            Self::Full { sink_tokens, block_size } => {
                attention(AttentionKind::Full, sink_tokens, block_size)
            }
            Self::Sliding { window, sink_tokens, block_size } => {
                attention(AttentionKind::Sliding { window }, sink_tokens, block_size)
            }
            Self::Chunked { chunk, sink_tokens, block_size } => {
                attention(AttentionKind::Chunked { chunk }, sink_tokens, block_size)
            }
            Self::State { block_size } => {
                GroupConfig::new(GroupKind::State, block_size.unwrap_or(of_all))
            }
        }
    }
}

/// A manager as JSON describes it.
pub(super) fn manager(json: &str) -> Result<Manager> {
    let config: Config =
        serde_json::from_str(json).map_err(|error| Error::invalid(OP, error.to_string()))?;
    let host = config.host.as_ref().map(|host| HostConfig {
        eviction: host.eviction,
        load_back_threshold: host.load_back_threshold,
        ..HostConfig::new(host.num_slots).with_write(match host.write {
            Write::Through => WritePolicy::Through,
            Write::Selective => WritePolicy::Selective { uses: host.uses },
            Write::Back => WritePolicy::Back,
        })
    });
    let Retained { interval, slack, dense_chunks, ends, fronts } = config.retention;
    let slack = slack.map_or(Slack::ByKind, Slack::Units);
    let mut manager = Manager::new(ManagerConfig {
        groups: config.groups.iter().map(|group| group.config(config.block_size)).collect(),
        num_blocks: config.num_blocks,
        prefix_caching: config.prefix_caching,
        retention: Retention { interval, slack, dense_chunks, ends, fronts },
        eviction: config.eviction,
        max_model_len: config.max_model_len,
        in_flight_tokens: config.in_flight_tokens,
        host,
        identity: *blake3::hash(config.identity.as_bytes()).as_bytes(),
    })?;
    if let Some(storage) = config.storage {
        let usual = StorageConfig::new(storage.num_slots);
        let config = StorageConfig {
            eviction: storage.eviction,
            prefetch_threshold: storage.prefetch_threshold.unwrap_or(usual.prefetch_threshold),
            prefetch: storage.prefetch.map_or(usual.prefetch, PrefetchPolicy::from),
            ..usual
        };
        manager.attach_storage(config, &[])?;
    }
    Ok(manager)
}
