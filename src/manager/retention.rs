//! Which blocks are worth caching: those that some retained prefix length needs.
//!
//! A full group keeps everything. A windowed group keeps, for every *retained boundary* (an aligned
//! prefix length), the blocks that a hit of that length needs and `slack` alignment units to their left,
//! so that a prompt that leaves the cached one a little before the boundary still hits. Boundaries are
//! the replay boundary of the prompt, the junction with an older prefix and the multiples of the
//! retention interval. Blocks that are not worth caching get no hash and are reused first.

use super::Retention;
use super::groups::{Group, align_down};
use crate::spec::{AttentionKind, GroupKind};

/// The retained boundaries of one sequence that do not come at an interval, in tokens; 0 for none.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Boundaries {
    /// The longest aligned prefix that the same prompt can hit.
    pub replay: usize,
    /// Where an older prefix ended that full groups hold longer than the windowed ones.
    pub junction: usize,
}

/// The policy: configuration and alignment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Policy {
    pub retention: Retention,
    pub alignment: usize,
}

impl Policy {
    /// Boundaries of a prompt of this length whose full groups hold `junction` tokens.
    pub fn boundaries(&self, prompt: usize, junction: usize) -> Boundaries {
        Boundaries {
            replay: align_down(prompt.saturating_sub(1), self.alignment),
            junction: align_down(junction, self.alignment),
        }
    }

    /// Whether block `b` of a group is worth caching.
    pub fn keeps(&self, group: &Group, boundaries: &Boundaries, b: usize) -> bool {
        let all = match group.kind {
            GroupKind::Attention(AttentionKind::Full) => true,
            GroupKind::Attention(AttentionKind::Chunked { .. }) => self.retention.dense_chunks,
            GroupKind::Attention(AttentionKind::Sliding { .. }) | GroupKind::State => false,
        };
        if all || b < group.sink_blocks {
            return true;
        }
        // A state serves hits that end with its block, and hits end at aligned lengths.
        if group.kind == GroupKind::State
            && !((b + 1) * group.block_size).is_multiple_of(self.alignment)
        {
            return false;
        }
        if [boundaries.replay, boundaries.junction].iter().any(|&e| self.tail_has(group, e, b)) {
            return true;
        }
        let step = self.retention.interval.map_or(self.alignment, |k| k as usize);
        if step == 0 {
            return false;
        }
        // Of the boundaries to the right of `b` the first needs most of what lies left; the second
        // matters when the first is a chunk edge, which needs nothing.
        let first = ((b + 1) * group.block_size).next_multiple_of(step);
        self.tail_has(group, first, b) || self.tail_has(group, first.saturating_add(step), b)
    }

    /// Whether the retained tail of boundary `e` has block `b`.
    fn tail_has(&self, group: &Group, e: usize, b: usize) -> bool {
        let (start, end) = (group.first_needed(e), e / group.block_size);
        let slack = self.retention.slack as usize * (self.alignment / group.block_size);
        start < end && (start.saturating_sub(slack)..end).contains(&b)
    }
}
