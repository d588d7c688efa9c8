//! How tables grow: which blocks a sequence lacks for its tokens, and taking them.
//!
//! An attention group needs a block for every `block_size` tokens. A state group needs one slot, whatever the
//! length: the last entry of its table. The slot goes along as the sequence grows; only where the state is
//! worth keeping (a *checkpoint*, at a block edge) does the block stay behind and the sequence take a new
//! slot. The other entries are null.
//!
//! In both, a block that anybody else counts on is never written: the sequence goes on with a copy of its
//! tail.

use std::collections::VecDeque;

use super::pool::NULL;
use super::table::Table;
use super::*;

/// The parts of the manager that growing needs.
pub(super) struct Grower<'a> {
    pub groups: &'a [Group],
    pub policy: &'a Policy,
    pub device: &'a mut DeviceTier,
    pub copies: &'a mut VecDeque<BlockCopy>,
    pub events: &'a mut Events,
}

/// What a table is to hold.
#[derive(Clone, Copy)]
pub(super) struct Goal<'a> {
    pub boundaries: &'a Boundaries,
    /// Tokens.
    pub tokens: usize,
    /// Tokens with slots: more than `tokens` when looking ahead, which states cannot.
    pub slots: usize,
    /// Whether blocks become findable.
    pub caching: bool,
}

/// Blocks to take for a row that holds `table` so far, of `before` tokens.
pub(super) fn lacking(
    group: &Group,
    policy: &Policy,
    pool: &Pool,
    table: &Table,
    before: usize,
    goal: Goal<'_>,
) -> usize {
    let copy = usize::from(shared_tail(group, pool, table, before).is_some());
    match group.kind {
        GroupKind::Attention(_) => {
            goal.slots.div_ceil(group.block_size).saturating_sub(table.len()) + copy
        }
        GroupKind::State => {
            let states = states(group, policy, table.len(), goal).count();
            let moves = states > 0 && moves(group, policy, pool, table, copy > 0, goal);
            states - usize::from(moves) + copy
        }
    }
}

/// Gives the rows of a sequence what they lack. Where it goes on in a group, inside of a block that may be anybody's, is
/// for `before` to say. The caller has checked that there is room.
pub(super) fn grow(
    grower: Grower<'_>,
    rows: &mut [Row],
    before: impl Fn(&Group, &Table) -> usize,
    goal: Goal<'_>,
    mut new_block: impl FnMut(usize, BlockId),
) {
    let Grower { groups, policy, device, copies, events } = grower;
    for (g, (group, row)) in groups.iter().zip(rows).enumerate() {
        let mut take = |device: &mut DeviceTier| {
            let id = device.take(g, events);
            debug_assert!(id.is_some(), "room was checked");
            id.inspect(|&id| new_block(g, id))
        };
        let before = before(group, &row.table);
        if let Some(b) = shared_tail(group, &device.pool, &row.table, before)
            && let Some(to) = take(device)
        {
            let from = row.table.replace(b, to);
            copies.push_back(BlockCopy { group: g as u32, from, to });
            device.pool.release(std::iter::once(from));
        }
        if group.kind == GroupKind::State {
            let have = row.table.len();
            let mut states = states(group, policy, have, goal).peekable();
            let mut slot = NULL;
            if states.peek().is_some()
                && moves(group, policy, &device.pool, &row.table, false, goal)
                && let Some(last) = have.checked_sub(1)
            {
                slot = row.table.replace(last, NULL);
            }
            for b in states {
                let id = match std::mem::replace(&mut slot, NULL) {
                    NULL => take(device),
                    slot => Some(slot),
                };
                let Some(id) = id else { return };
                row.table.fill_up(b);
                row.table.push(id);
            }
            continue;
        }
        let lacks = goal.slots.div_ceil(group.block_size).saturating_sub(row.table.len());
        row.table.make_room(lacks);
        device.take_each(g, lacks, events, |id| {
            row.table.push(id);
            new_block(g, id);
        });
    }
}

/// The entries that a state table of `have` gets: checkpoints, and the slot at the end.
fn states(
    group: &Group,
    policy: &Policy,
    have: usize,
    goal: Goal<'_>,
) -> impl Iterator<Item = usize> + use<> {
    let (group, policy, boundaries) = (*group, *policy, *goal.boundaries);
    let end = goal.tokens.div_ceil(group.block_size);
    (have..end)
        .filter(move |&b| b + 1 == end || goal.caching && policy.keeps(&group, &boundaries, b))
}

/// Whether the slot of a state table goes along. `copied`: it is about to become a copy of its own.
fn moves(
    group: &Group,
    policy: &Policy,
    pool: &Pool,
    table: &Table,
    copied: bool,
    goal: Goal<'_>,
) -> bool {
    let Some(last) = table.last() else { return false };
    let own = copied || last != NULL && !pool.is_shared(last);
    own && !(goal.caching && policy.keeps(group, goal.boundaries, table.len() - 1))
}

/// The partly filled tail block of a sequence of `tokens` when it may not be written, as its index: a copy of
/// it has to be.
fn shared_tail(group: &Group, pool: &Pool, table: &Table, tokens: usize) -> Option<usize> {
    let b = tokens / group.block_size;
    if group.kind == GroupKind::State && b == table.len() {
        // A checkpoint is left behind; a slot that a fork shares would be one block too many.
        let block = pool.block(table.last()?);
        return (block.users > 1 && !block.cached).then(|| b - 1);
    }
    let inside = b < table.len() && !tokens.is_multiple_of(group.block_size);
    (inside && pool.is_shared(table.get(b))).then_some(b)
}
