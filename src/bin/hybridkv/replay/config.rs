//! The configuration of a replayed manager, with the names and defaults of the `config` operation.

use hybridkv::error::{Error, Result};
use hybridkv::manager::{
    BreakerConfig, Eviction, GroupConfig, HostConfig, ManagerConfig, Retention, Slack,
    StorageConfig, WritePolicy,
};
use hybridkv::spec::{AttentionKind, GroupKind, GroupPlan, LayerGroup, StateGroup};
use serde::Deserialize;
use serde_json::{Value, json};

use super::OP;

/// Bytes of K and V of one token in one layer where no model says it: 8 heads of 128 in 16 bits.
const TOKEN_BYTES: u64 = 4096;

/// Blocks of a tier, at most: a line of input must not take all memory.
const MAX_BLOCKS: u32 = 1 << 24;

/// A breaker that does not open.
const NEVER: BreakerConfig = BreakerConfig { failures: u32::MAX, retry_ns: 0 };

/// SGLang's threshold of write-through-selective.
const SELECTIVE_USES: u32 = 2;

/// Fields of the `config` operation.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    block_size: Option<u32>,
    num_blocks: u32,
    groups: Vec<Group>,
    #[serde(default = "yes")]
    prefix_caching: bool,
    retention_interval: Option<u32>,
    #[serde(default)]
    retention_slack: SlackField,
    #[serde(default)]
    retention_ends: bool,
    #[serde(default)]
    retention_fronts: bool,
    #[serde(default)]
    chunked_retention: Chunks,
    #[serde(default = "lru")]
    eviction: Eviction,
    #[serde(default)]
    in_flight_tokens: u32,
    max_model_len: Option<u32>,
    host: Option<Host>,
    storage: Option<Storage>,
    block_bytes: Option<u64>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Group {
    kind: Kind,
    window: Option<u32>,
    chunk: Option<u32>,
    block_size: Option<u32>,
    layers: Option<u32>,
    #[serde(default)]
    sink_tokens: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    Full,
    Sliding,
    Chunked,
    State,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Chunks {
    #[default]
    Dense,
    Sparse,
}

/// Alignment units, or what suits the kind of the group.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(untagged)]
enum SlackField {
    Units(u32),
    Named(SlackName),
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum SlackName {
    ByKind,
}

impl Default for SlackField {
    fn default() -> Self {
        Self::Units(0)
    }
}

impl From<SlackField> for Slack {
    fn from(field: SlackField) -> Self {
        match field {
            SlackField::Units(n) => Self::Units(n),
            SlackField::Named(SlackName::ByKind) => Self::ByKind,
        }
    }
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Host {
    blocks: u32,
    #[serde(default = "lru")]
    policy: Eviction,
    #[serde(default)]
    write: Write,
    /// Offers of a block before it is stored.
    store_threshold: Option<u32>,
}

/// The storage tier.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Storage {
    /// Root folder of its files. A trace moves no bytes and writes none.
    pub path: Option<String>,
    /// Budget.
    pub bytes: u64,
    /// As of the host tier.
    #[serde(default = "lru")]
    pub policy: Eviction,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
enum Write {
    #[default]
    #[serde(rename = "write_through")]
    Through,
    #[serde(rename = "write_through_selective")]
    Selective,
    #[serde(rename = "write_back")]
    Back,
}

fn lru() -> Eviction {
    Eviction::Lru
}

fn yes() -> bool {
    true
}

impl Config {
    /// Reads the fields.
    ///
    /// # Errors
    /// `InvalidArgument` naming the field that is unknown, missing or of the wrong type.
    pub fn new(fields: Value) -> Result<Self> {
        let config: Self =
            serde_json::from_value(fields).map_err(|e| Error::invalid(OP, e.to_string()))?;
        config.groups.iter().try_for_each(|group| group.kind().map(|_| ()))?;
        Ok(config)
    }

    /// The crate's defaults over groups as the command line writes them.
    ///
    /// # Errors
    /// `Unsupported` for other groups.
    pub fn of_crate(
        groups: &str,
        block_size: u32,
        pool_tokens: u32,
        max_model_len: usize,
    ) -> Result<Self> {
        let mut fields = crate_defaults();
        let sizes = json!({
            "block_size": block_size,
            "num_blocks": pool_tokens / block_size + 1,
            "groups": parse_groups(groups)?,
            "max_model_len": max_model_len,
        });
        merge(&mut fields, sizes);
        Self::new(fields)
    }

    /// The same with another eviction policy of the device pool.
    #[cfg(test)]
    pub fn with_eviction(self, eviction: Eviction) -> Self {
        Self { eviction, ..self }
    }

    /// What the manager is built from.
    ///
    /// # Errors
    /// `InvalidArgument` for a group without a block size, `Unsupported` for more blocks than memory is
    /// likely to describe.
    pub fn manager(&self) -> Result<ManagerConfig> {
        for blocks in [self.num_blocks, self.host.as_ref().map_or(0, |host| host.blocks)] {
            if blocks > MAX_BLOCKS {
                let supported = format!("up to {MAX_BLOCKS}");
                return Err(Error::unsupported(OP, "a tier of blocks of", blocks, supported));
            }
        }
        let group = |group: &Group| {
            let block_size = group.block_size.or(self.block_size).ok_or_else(|| {
                Error::invalid(OP, "a group has no block_size, and there is none for all")
            })?;
            Ok(GroupConfig { kind: group.kind()?, sink_tokens: group.sink_tokens, block_size })
        };
        let groups: Vec<GroupConfig> = self.groups.iter().map(group).collect::<Result<_>>()?;
        Ok(ManagerConfig {
            num_blocks: self.num_blocks,
            prefix_caching: self.prefix_caching,
            retention: Retention {
                interval: self.retention_interval,
                slack: self.retention_slack.into(),
                dense_chunks: self.chunked_retention == Chunks::Dense,
                ends: self.retention_ends,
                fronts: self.retention_fronts,
            },
            eviction: self.eviction,
            max_model_len: self.max_model_len.unwrap_or(u32::MAX),
            in_flight_tokens: self.in_flight_tokens,
            host: self.host.as_ref().map(Host::config).transpose()?,
            // Files of other groups are another's.
            identity: *blake3::hash(format!("replay {groups:?}").as_bytes()).as_bytes(),
            groups,
        })
    }

    /// The storage tier, if there is one.
    pub fn storage(&self) -> Option<&Storage> {
        self.storage.as_ref()
    }

    /// Bytes of a block of the pool.
    pub fn block_bytes(&self) -> u64 {
        let group = |group: &Group| {
            let tokens = group.block_size.or(self.block_size).unwrap_or(0);
            u64::from(group.layers.unwrap_or(1)) * u64::from(tokens) * TOKEN_BYTES
        };
        self.block_bytes.unwrap_or_else(|| self.groups.iter().map(group).max().unwrap_or(0))
    }
}

impl Storage {
    /// The tier of so many slots, whatever it is asked for: a session has no clock, so that a tier which was left
    /// alone would never be tried again.
    pub fn config(&self, num_slots: u32) -> StorageConfig {
        StorageConfig { eviction: self.policy, breaker: NEVER, ..StorageConfig::new(num_slots) }
    }
}

impl Host {
    fn config(&self) -> Result<HostConfig> {
        let write = match (self.write, self.store_threshold) {
            (Write::Through, None | Some(1)) => WritePolicy::Through,
            (Write::Through, Some(uses)) => WritePolicy::Selective { uses },
            (Write::Selective, uses) => {
                WritePolicy::Selective { uses: uses.unwrap_or(SELECTIVE_USES) }
            }
            (Write::Back, None | Some(1)) => WritePolicy::Back,
            (Write::Back, Some(_)) => {
                return Err(Error::invalid(OP, "write_back knows no store_threshold"));
            }
        };
        let eviction = self.policy;
        Ok(HostConfig {
            eviction,
            breaker: NEVER,
            ..HostConfig::new(self.blocks).with_write(write)
        })
    }
}

impl Group {
    fn kind(&self) -> Result<GroupKind> {
        match (self.kind, self.window, self.chunk) {
            (Kind::Full, None, None) => Ok(AttentionKind::Full.into()),
            (Kind::Sliding, Some(window), None) => Ok(AttentionKind::Sliding { window }.into()),
            (Kind::Chunked, None, Some(chunk)) => Ok(AttentionKind::Chunked { chunk }.into()),
            (Kind::State, None, None) => Ok(GroupKind::State),
            (kind, ..) => Err(Error::invalid(
                OP,
                format!(
                    "a group of kind {kind:?} with the wrong extent: full and state have none, sliding a window, chunked a chunk"
                ),
            )),
        }
    }
}

/// The fields in which the crate's defaults differ from replay's.
pub fn crate_defaults() -> Value {
    json!({
        "retention_interval": 0,
        "retention_slack": "by_kind",
        "retention_ends": true,
        "retention_fronts": true,
        "chunked_retention": "sparse",
        "eviction": "reuse",
    })
}

/// The groups of a model, as the field `groups`.
pub fn describe_groups(plan: &GroupPlan) -> Value {
    let group = |group: &LayerGroup| {
        let mut fields = describe_group(&GroupConfig::from(group));
        fields["layers"] = group.layers.len().into();
        fields
    };
    let state = |group: &StateGroup| {
        let mut fields = describe_group(&GroupConfig::from(group));
        fields["layers"] = group.layers.len().into();
        fields
    };
    plan.groups.iter().map(group).chain(plan.states.iter().map(state)).collect()
}

/// A group, as an entry of the field `groups`.
pub fn describe_group(group: &GroupConfig) -> Value {
    let mut fields = match group.kind {
        GroupKind::Attention(AttentionKind::Full) => json!({ "kind": "full" }),
        GroupKind::Attention(AttentionKind::Sliding { window }) => {
            json!({ "kind": "sliding", "window": window })
        }
        GroupKind::Attention(AttentionKind::Chunked { chunk }) => {
            json!({ "kind": "chunked", "chunk": chunk })
        }
        GroupKind::State => json!({ "kind": "state" }),
    };
    fields["block_size"] = group.block_size.into();
    if group.sink_tokens > 0 {
        fields["sink_tokens"] = group.sink_tokens.into();
    }
    fields
}

/// Groups as the command line writes them (`full,sliding:1024,chunked:8192*3`), as the field `groups`.
///
/// # Errors
/// `Unsupported` for anything else.
pub fn parse_groups(text: &str) -> Result<Value> {
    let mut groups = Vec::new();
    for part in text.split(',') {
        let refuse = || {
            Error::unsupported(
                OP,
                "layer group",
                part,
                "full, sliding:WINDOW, chunked:CHUNK, state, each with *COUNT behind it",
            )
        };
        let (group, count) = match part.split_once('*') {
            Some((group, count)) => (group, count.parse().map_err(|_| refuse())?),
            None => (part, 1u16),
        };
        let (kind, extent) = match group.split_once(':') {
            Some((kind, extent)) => (kind, Some(extent.parse::<u32>().map_err(|_| refuse())?)),
            None => (group, None),
        };
        let group = match (kind, extent) {
            ("full" | "state", None) => json!({ "kind": kind }),
            ("sliding", Some(window)) => json!({ "kind": "sliding", "window": window }),
            ("chunked", Some(chunk)) => json!({ "kind": "chunked", "chunk": chunk }),
            _ => return Err(refuse()),
        };
        groups.extend((0..count).map(|_| group.clone()));
    }
    Ok(Value::Array(groups))
}

/// Puts the fields of an object into another one, deeply; anything else takes the place of what was there.
pub fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from,
    }
}
