//! Which blocks are worth caching, and where those of a windowed group stand in the order of reuse.
//!
//! A full group keeps everything. A windowed group keeps, for every *retained boundary* (an aligned prefix
//! length), the blocks that a hit of that length needs and some slack to their left, so that a prompt that
//! leaves the cached one a little before the boundary still hits. Boundaries are the replay boundary of the
//! prompt, the junction with an older prefix, the multiples of the retention interval and the end of the
//! sequence. Blocks that no boundary can need get no hash and are reused first; those that could have been
//! at the end, and turned out not to be, stay findable and are reused first of those that are.
//!
//! A tail without the full blocks before it is worth nothing, nor are they without it. So the tail goes by
//! them: as far as the order of reuse counts uses, a block of another group counts as used as often as the
//! block of the *leading* group, the first full one, with the same tokens. And the leading blocks between two
//! boundaries share their fate where no hit can end between them, which sliding windows and states see to:
//! they count as used as often as the one of them used most.

use std::ops::Range;

use super::eviction::last_of_stride;
use super::groups::{Group, align_down};
use super::pool::{NULL, Pool, Standing};
use super::sequence::Sequence;
use super::{Retention, Slack};
use crate::spec::{AttentionKind, GroupKind};

/// Tokens of slack that a sliding window has at least.
const LEAST_SLACK: usize = 512;

/// Lengths at which a hit of one sequence can end, besides those at an interval, in tokens; 0 for none.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Boundaries {
    /// What it hit itself.
    pub hit: usize,
    /// The longest aligned prefix that the same prompt can hit.
    pub replay: usize,
    /// Where an older prefix ended that full groups hold longer than the windowed ones.
    pub junction: usize,
    /// The aligned end of the sequence, once it is known.
    pub end: usize,
}

/// The policy: configuration and alignment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Policy {
    retention: Retention,
    pub alignment: usize,
    /// The least common multiple of the block sizes: prefixes that are whole blocks in every group.
    pub whole_blocks: usize,
    /// The group whose uses stand for those of all others: the first full one.
    pub lead: Option<usize>,
    /// Whether hits end near retained boundaries only.
    pub tied: bool,
}

impl Policy {
    pub fn new(
        retention: Retention,
        alignment: usize,
        whole_blocks: usize,
        groups: &[Group],
    ) -> Self {
        let ties = |group: &Group| {
            matches!(
                group.kind,
                GroupKind::Attention(AttentionKind::Sliding { .. }) | GroupKind::State
            )
        };
        Self {
            retention,
            alignment,
            whole_blocks,
            lead: groups.iter().position(Group::is_full),
            tied: retention.interval.is_some() && groups.iter().any(ties),
        }
    }

    /// Whether hits can end inside of a block.
    pub fn has_fronts(&self) -> bool {
        self.alignment < self.whole_blocks
    }

    /// Boundaries of a prompt of this length that hits `hit` tokens and of which full groups hold `junction`.
    pub fn boundaries(&self, prompt: usize, hit: usize, junction: usize) -> Boundaries {
        Boundaries {
            hit,
            replay: align_down(prompt.saturating_sub(1), self.alignment),
            junction: align_down(junction, self.alignment),
            end: 0,
        }
    }

    /// Whether block `b` of a group becomes findable when it is filled.
    pub fn finds(&self, group: &Group, boundaries: &Boundaries, b: usize) -> bool {
        self.may_end_with(group, boundaries, b) || self.keeps(group, boundaries, b)
    }

    /// Whether block `b` of a group is kept findable for the case that the sequence ends soon behind it.
    fn may_end_with(&self, group: &Group, boundaries: &Boundaries, b: usize) -> bool {
        self.retention.ends
            && group.kind != GroupKind::State
            && (b + 1) * group.block_size > boundaries.replay
    }

    /// Whether block `b` of a group is stored in lower tiers now: when it is computed or, where only the end of
    /// the sequence needs it, at the end.
    pub fn offers(&self, group: &Group, boundaries: &Boundaries, b: usize) -> bool {
        let before = Boundaries { end: 0, ..*boundaries };
        let sooner = !self.may_end_with(group, boundaries, b) || self.keeps(group, &before, b);
        match boundaries.end {
            0 => sooner,
            _ => !sooner && self.keeps(group, boundaries, b),
        }
    }

    /// Sets the end of a sequence; what only it needs is offered from now on.
    pub fn end(&self, groups: &[Group], sequence: &mut Sequence) {
        if !self.retention.ends {
            return;
        }
        let end = align_down(sequence.tokens.len(), self.alignment);
        sequence.boundaries.end = end;
        for (group, row) in groups.iter().zip(&mut sequence.rows) {
            let tail = group.first_needed(end).saturating_sub(self.slack(group));
            row.offered = row.offered.min(tail.max(row.table.first()));
        }
    }

    /// Whether a retained boundary needs block `b` of a group.
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
        let Boundaries { replay, junction, end, .. } = *boundaries;
        if [replay, junction, end].iter().any(|&e| self.tail_has(group, e, b)) {
            return true;
        }
        let step = self.retention.interval.map_or(self.alignment, |k| k as usize);
        if step == 0 {
            return false;
        }
        // Of the boundaries to the right of `b` the first needs most of what lies left; the second
        // matters when the first is a chunk edge, which needs nothing.
        let first = (b * group.block_size + 1).next_multiple_of(step);
        self.tail_has(group, first, b) || self.tail_has(group, first.saturating_add(step), b)
    }

    /// Block `b` when it becomes findable, else a later one: none of those between does.
    pub fn next_found(&self, group: &Group, boundaries: &Boundaries, b: usize) -> usize {
        if self.finds(group, boundaries, b) {
            return b;
        }
        if group.kind == GroupKind::State {
            return b + 1;
        }
        let Boundaries { replay, junction, end, .. } = *boundaries;
        let step = self.retention.interval.map_or(self.alignment, |k| k as usize);
        // Behind the next boundary at an interval, and where blocks may be the end, it is to be asked again.
        let (next, asked) = match (b * group.block_size + 1).checked_next_multiple_of(step) {
            Some(next) => (next, [replay / group.block_size, next.div_ceil(group.block_size)]),
            None => (0, [replay / group.block_size; 2]),
        };
        let tails = [replay, junction, end, next, next.saturating_add(step)];
        let starts = tails.map(|e| self.tail(group, e).start);
        starts.into_iter().chain(asked).filter(|&start| start > b).min().unwrap_or(usize::MAX)
    }

    /// Whether the retained tail of boundary `e` has block `b`.
    fn tail_has(&self, group: &Group, e: usize, b: usize) -> bool {
        self.tail(group, e).contains(&b)
    }

    /// The blocks that are retained for boundary `e`.
    fn tail(&self, group: &Group, e: usize) -> Range<usize> {
        let Range { start, end } = group.tail(e);
        if start < end { start.saturating_sub(self.slack(group))..end } else { end..end }
    }

    /// Blocks kept to the left of every tail.
    fn slack(&self, group: &Group) -> usize {
        let units = |n: usize| (n * self.alignment).div_ceil(group.block_size);
        match (self.retention.slack, group.kind) {
            (Slack::Units(n), _) => units(n as usize),
            (Slack::ByKind, GroupKind::Attention(AttentionKind::Sliding { window })) => {
                (window as usize / 2).max(LEAST_SLACK).div_ceil(group.block_size)
            }
            (Slack::ByKind, GroupKind::Attention(_)) => 0,
            (slack @ Slack::ByKind, GroupKind::State) => units(slack.states()),
        }
    }

    /// Whether the contents of a group's blocks are remembered beyond their stay: the leading group's, or
    /// everybody's where none leads.
    pub fn remembers(&self, g: usize) -> bool {
        self.lead.is_none_or(|lead| lead == g)
    }

    /// The first block behind `b` whose fate is not that of `b`: the next one at a boundary, or of another stride
    /// where hits can end anywhere.
    pub fn shared_fate(&self, group: &Group, boundaries: &Boundaries, b: usize) -> usize {
        if !self.tied {
            return last_of_stride(b) + 1;
        }
        let interval = match self.retention.interval {
            Some(k @ 1..) => (b * group.block_size + 1).next_multiple_of(k as usize),
            _ => usize::MAX,
        };
        let Boundaries { hit, replay, junction, .. } = *boundaries;
        let edges = [hit, replay, junction, interval].map(|e| e / group.block_size);
        edges.into_iter().filter(|&edge| edge > b).min().unwrap_or(usize::MAX)
    }

    /// Gives blocks of one row of a sequence back, the later first.
    pub fn release(
        &self,
        groups: &[Group],
        pool: &mut Pool,
        sequence: &Sequence,
        g: usize,
        indices: impl DoubleEndedIterator<Item = usize>,
    ) {
        let (group, boundaries) = (&groups[g], &sequence.boundaries);
        let lead = self.lead.filter(|&lead| lead != g);
        let standing = |b: usize| {
            // What it hit an older boundary may need.
            if self.may_end_with(group, boundaries, b) && !self.keeps(group, boundaries, b) {
                return Standing::Demoted;
            }
            let like = lead.and_then(|lead| {
                let token = (b + 1) * group.block_size - 1;
                let id = sequence.rows[lead].table.get(token / groups[lead].block_size);
                (id != NULL).then_some(id)
            });
            like.map_or(Standing::Own, Standing::Like)
        };
        let blocks = indices.rev().map(|b| (b, sequence.rows[g].table.get(b)));
        pool.release_as(blocks.filter(|&(_, id)| id != NULL), standing);
    }

    /// Gives all blocks of a sequence back: group by group, the later first.
    pub fn release_all(&self, groups: &[Group], pool: &mut Pool, sequence: &Sequence) {
        for (g, row) in sequence.rows.iter().enumerate() {
            self.release(groups, pool, sequence, g, row.table.indices_from(0));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::manager::GroupConfig;

    fn kinds() -> impl Strategy<Value = GroupKind> {
        prop_oneof![
            Just(GroupKind::Attention(AttentionKind::Full)),
            (1u32..40).prop_map(|window| GroupKind::Attention(AttentionKind::Sliding { window })),
            (1u32..40).prop_map(|chunk| GroupKind::Attention(AttentionKind::Chunked { chunk })),
            Just(GroupKind::State),
        ]
    }

    proptest! {
        /// Whoever goes from one block to the next comes by every one that becomes findable.
        #[test]
        fn next_found_passes_by_nothing(
            kind in kinds(),
            block_size in 1u32..5,
            units in 1usize..4,
            inside in any::<bool>(),
            interval in prop::option::of(0u32..4),
            slack in prop_oneof![Just(Slack::ByKind), (0u32..4).prop_map(Slack::Units)],
            (ends, dense_chunks, fronts) in any::<(bool, bool, bool)>(),
            (replay, junction, end) in (0usize..60, 0usize..60, 0usize..60),
        ) {
            // Hits end at multiples of several blocks, or inside of them.
            let unit = block_size as usize;
            let (block_size, alignment) = match inside && kind != GroupKind::State {
                true => (block_size * units as u32, unit),
                false => (block_size, unit * units),
            };
            let group = Group::new(&GroupConfig::new(kind, block_size), unit, alignment);
            let interval = interval.map(|n| n * alignment as u32);
            let retention = Retention { interval, slack, ends, dense_chunks, fronts };
            let policy = Policy::new(retention, alignment, alignment, &[group]);
            let aligned = |n| align_down(n, alignment);
            let boundaries = Boundaries {
                hit: 0,
                replay: aligned(replay),
                junction: aligned(junction),
                end: aligned(end),
            };
            let (mut visited, mut next) = (Vec::new(), 0);
            while next < 80 {
                if policy.finds(&group, &boundaries, next) {
                    visited.push(next);
                    next += 1;
                }
                let later = policy.next_found(&group, &boundaries, next);
                prop_assert!(later > next || policy.finds(&group, &boundaries, next));
                next = later;
            }
            visited.retain(|&b| b < 80);
            let found = (0..80).filter(|&b| policy.finds(&group, &boundaries, b));
            prop_assert_eq!(visited, found.collect::<Vec<_>>());
        }
    }
}
