//! What a manager is built from.

use super::groups::Group;
use super::{Eviction, HostConfig};
use crate::error::{Error, Result};
use crate::spec::{GroupKind, GroupPlan, LayerGroup, StateGroup};

/// One layer group as the manager sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupConfig {
    /// What it keeps of a sequence.
    pub kind: GroupKind,
    /// Sink tokens: their blocks are kept, cached and required for a hit. States have none.
    pub sink_tokens: u32,
    /// Tokens per block; of a state group, tokens between the places where a state can be kept.
    pub block_size: u32,
}

impl GroupConfig {
    /// A group without sinks.
    pub fn new(kind: impl Into<GroupKind>, block_size: u32) -> Self {
        Self { kind: kind.into(), sink_tokens: 0, block_size }
    }

    /// The groups of a plan, in its order: attention first, then states.
    pub fn of(plan: &GroupPlan) -> Vec<Self> {
        plan.groups.iter().map(Self::from).chain(plan.states.iter().map(Self::from)).collect()
    }

    /// Most blocks a request of `tokens` holds at once in this group when at most `in_flight` of them are
    /// computed and not settled. The block size is at least 1.
    pub(crate) fn max_blocks(&self, tokens: usize, in_flight: usize) -> usize {
        let retention = Retention::default();
        let size = self.block_size as usize;
        Group::new(self, size, size).max_blocks(tokens, in_flight, &retention)
    }
}

impl From<&StateGroup> for GroupConfig {
    fn from(group: &StateGroup) -> Self {
        Self::new(GroupKind::State, group.block_size)
    }
}

impl From<&LayerGroup> for GroupConfig {
    fn from(group: &LayerGroup) -> Self {
        Self {
            kind: group.kind.into(),
            sink_tokens: group.sink_tokens,
            block_size: group.block_size,
        }
    }
}

/// Which window tails and old chunks stay cached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// `None`: every aligned boundary (dense); `Some(0)`: only the replay boundary and junctions;
    /// `Some(k)`: also one tail every `k` tokens.
    pub interval: Option<u32>,
    /// What is kept to the left of every retained tail.
    pub slack: Slack,
    /// Whether old chunks stay cached densely, like a full group's blocks.
    pub dense_chunks: bool,
    /// Whether the end of every sequence, generated tokens included, is a retained boundary, too. What is
    /// generated is then findable as it is filled; what leaves the window before the end, and no other boundary
    /// needs, is reused first. Recurrent states have no such boundary.
    pub ends: bool,
    /// Where groups have blocks of different sizes: whether the larger ones are found by their fronts, too, down to
    /// the hashed unit, so that hits end at multiples of it ([`Manager::alignment`](super::Manager::alignment)).
    pub fronts: bool,
}

/// How much more than a tail is kept, so that a prompt that leaves the cached one a little before the boundary
/// still hits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Slack {
    /// So many alignment units, in every group that keeps tails.
    Units(u32),
    /// What suits the kind of the group: half a window, or 32 alignment units where that is more; one alignment
    /// unit of states; nothing of chunks, whose tails serve every shorter hit in the chunk as they are.
    #[default]
    ByKind,
}

impl Slack {
    /// States kept to the left of every boundary.
    pub(crate) fn states(self) -> usize {
        match self {
            Self::Units(n) => n as usize,
            Self::ByKind => 1,
        }
    }
}

impl Retention {
    /// Everything that an aligned hit can need, chunks densely: what vLLM keeps when it is not told otherwise.
    pub fn dense() -> Self {
        Self {
            interval: None,
            slack: Slack::Units(0),
            dense_chunks: true,
            ends: false,
            fronts: false,
        }
    }
}

impl Default for Retention {
    /// Sparse: the replay boundary, junctions and the end of the sequence, with slack by kind; blocks are found by
    /// their fronts.
    fn default() -> Self {
        Self {
            interval: Some(0),
            slack: Slack::ByKind,
            dense_chunks: false,
            ends: true,
            fronts: true,
        }
    }
}

/// Everything the manager is built from.
#[derive(Debug, Clone)]
pub struct ManagerConfig {
    /// Layer groups, full attention first.
    pub groups: Vec<GroupConfig>,
    /// Blocks of the device pool, the null block included.
    pub num_blocks: u32,
    /// Whether full blocks are found again by later sequences.
    pub prefix_caching: bool,
    /// Which windowed blocks stay cached.
    pub retention: Retention,
    /// Which cached block without a user is reused first.
    pub eviction: Eviction,
    /// Longest sequence.
    pub max_model_len: u32,
    /// Tokens that may be computed and not yet settled (all steps in flight together).
    pub in_flight_tokens: u32,
    /// The host tier, if there is one.
    pub host: Option<HostConfig>,
    /// Identity of model, revision, dtype, codec, block size, head shapes, layout, rope: seeds the hashes. See
    /// [`GroupPlan::identity`].
    pub identity: [u8; 32],
}

/// Numbers of tokens that follow from the block sizes.
pub(super) struct Units {
    /// Tokens per hash: the greatest common divisor of the block sizes.
    pub hashed: usize,
    /// The least common multiple of the sizes of blocks that serve hits as a whole only.
    pub alignment: usize,
    /// The least common multiple of all of them.
    pub whole_blocks: usize,
}

/// Checks the groups. `fronts`: blocks of attention serve hits that end inside of them, too.
pub(super) fn check_groups(
    op: &'static str,
    groups: &[GroupConfig],
    fronts: bool,
) -> Result<Units> {
    const MAX_GROUPS: usize = u16::MAX as usize;
    const MAX_BLOCK_SIZE: u32 = 1 << 16;
    if groups.is_empty() || groups.len() > MAX_GROUPS {
        return Err(Error::unsupported(
            op,
            "a number of layer groups of",
            groups.len(),
            format!("1 to {MAX_GROUPS}"),
        ));
    }
    let mut hashed = 0usize;
    for group in groups {
        if group.block_size == 0 || group.block_size > MAX_BLOCK_SIZE {
            return Err(Error::unsupported(
                op,
                "block_size",
                group.block_size,
                format!("1 to {MAX_BLOCK_SIZE}"),
            ));
        }
        group.kind.check(op)?;
        if group.kind == GroupKind::State && group.sink_tokens > 0 {
            return Err(Error::invalid(op, "a group of recurrent states has no sink tokens"));
        }
        hashed = gcd(hashed, group.block_size as usize);
    }
    let multiple = |of: fn(&GroupKind) -> bool| {
        let sizes = groups.iter().filter(|group| of(&group.kind));
        sizes.map(|group| group.block_size as usize).try_fold(hashed, |multiple, size| {
            let multiple = (multiple / gcd(multiple, size)).checked_mul(size);
            multiple.filter(|&multiple| multiple <= u32::MAX as usize)
        })
    };
    let whole_blocks = multiple(|_| true)
        .ok_or_else(|| Error::invalid(op, "the block sizes have no common multiple"))?;
    let states = multiple(|kind| *kind == GroupKind::State).unwrap_or(whole_blocks);
    let alignment = if fronts { states } else { whole_blocks };
    Ok(Units { hashed, alignment, whole_blocks })
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}
