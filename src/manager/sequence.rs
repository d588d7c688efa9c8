//! One live sequence: its hashes and, per layer group, its table of blocks.

use super::hash::HashedTokens;
use super::quota::TenantId;
use super::retention::Boundaries;
use super::table::Table;

/// A sequence's table in one group.
#[derive(Debug, Default, Clone)]
pub(super) struct Row {
    pub table: Table,
    /// Blocks before this one have been considered for caching.
    pub considered: usize,
    /// Blocks before this one have been offered to the host tier.
    pub offered: usize,
    /// Those of them that it took or had, ascending.
    pub stored: Vec<u32>,
    /// Blocks before this one were hit, or are known to be settled.
    pub settled: usize,
    /// Loads into its blocks that have not been answered.
    pub loading: usize,
}

impl Row {
    /// Makes room for a table of `blocks` blocks in all, of which at most `live` live at once, and `stored` of which
    /// the host takes.
    pub fn reserve(&mut self, blocks: usize, live: usize, stored: usize) {
        self.table.reserve(blocks, live);
        self.stored.reserve_exact(stored.saturating_sub(self.stored.len()));
    }

    /// Forgets what is noted of blocks from `b` on: they are considered and offered again.
    pub fn cut(&mut self, b: usize) {
        self.considered = self.considered.min(b);
        self.offered = self.offered.min(b);
        self.stored.retain(|&stored| (stored as usize) < b);
        self.settled = self.settled.min(b);
    }
}

/// A generation that no sequence has.
pub(super) const NOBODY: u64 = 0;

/// What a forked sequence began with.
#[derive(Debug, Clone, Copy)]
pub(super) struct Inherited {
    /// Generation of the parent.
    pub from: u64,
    /// Tokens that the parent had computed.
    pub tokens: usize,
}

/// A live sequence.
pub(super) struct Sequence {
    /// Tokens given so far.
    pub tokens: HashedTokens,
    /// An append that stays below so many tokens neither takes nor fills a block in any group, and writes blocks
    /// that are the sequence's own; 0 while that is not known.
    pub open_end: usize,
    /// Tokens whose computation has been submitted.
    pub computed: usize,
    /// Tokens whose computation has finished.
    pub settled: usize,
    /// Whether a step of its own has been submitted. Until then the blocks that it hit may not be written yet,
    /// and nothing may be copied out of them.
    pub begun: bool,
    pub rows: Vec<Row>,
    pub boundaries: Boundaries,
    /// Tokens that it began with. What is loaded into a block that reaches beyond them is the sequence's own.
    pub hit: usize,
    /// Whose quotas its blocks count for.
    pub tenant: TenantId,
    /// Tells it from earlier sequences of the same name.
    pub generation: u64,
    /// What it began with, if it was forked.
    pub inherited: Option<Inherited>,
    /// Loads that have not been answered; until then nothing of it is findable, and nothing is computed unless it
    /// is `overlapped`.
    pub loading: usize,
    /// Those of them that have not been handed out: they wait for a fetch, or for their turn.
    pub pending: usize,
    /// Whether its steps run behind its loads layer by layer, instead of after them.
    pub overlapped: bool,
    /// Blocks whose load failed, as (group, index).
    pub lost: Vec<(usize, usize)>,
    /// Whether a load failed, so that tokens are computed again: until all are, blocks become findable only
    /// when they are computed.
    pub repaired: bool,
}

impl Sequence {
    /// Bytes of its tokens, hashes and tables, with the room these have to grow.
    pub fn bytes(&self) -> usize {
        let stored = |row: &Row| row.stored.capacity() * size_of::<u32>();
        let rows = self.rows.iter().map(|row| row.table.bytes() + stored(row));
        self.tokens.bytes() + rows.sum::<usize>()
    }
}
