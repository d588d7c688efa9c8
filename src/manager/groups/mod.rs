//! One layer group's rules, in blocks: what a prefix hit needs, what a running sequence still needs, how
//! many blocks a request can hold. All of them follow from [`GroupKind::skipped`].

mod chunked;
mod full;
mod sliding;

use super::{GroupConfig, Retention};
use crate::spec::{AttentionKind, GroupKind};

/// A layer group with its derived sizes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Group {
    pub kind: GroupKind,
    pub block_size: usize,
    /// Blocks `0..sink_blocks` hold sink tokens.
    pub sink_blocks: usize,
    /// Hashed units per block: the key of block `b` is the hash of unit `(b + 1) * units - 1`, which
    /// stands for the whole block because hashes are chained.
    units: usize,
}

impl Group {
    pub fn new(config: &GroupConfig, hash_block: usize) -> Self {
        let block_size = config.block_size as usize;
        Self {
            kind: config.kind,
            block_size,
            sink_blocks: (config.sink_tokens as usize).div_ceil(block_size),
            units: block_size / hash_block,
        }
    }

    /// Index of the hashed unit that keys block `b`.
    pub fn key_index(&self, b: usize) -> usize {
        (b + 1) * self.units - 1
    }

    /// First block after the sinks that a query at position `n` or later can see.
    pub fn first_needed(&self, n: usize) -> usize {
        (self.kind.skipped(n as u64) as usize) / self.block_size
    }

    /// Whether a prefix of `tokens` needs block `b`, one of its own.
    pub fn needs(&self, b: usize, tokens: usize) -> bool {
        b < self.sink_blocks || b >= self.first_needed(tokens)
    }

    /// Blocks that a prefix of `tokens`, whole blocks, needs, ascending.
    pub fn needed(&self, tokens: usize) -> impl Iterator<Item = usize> + use<> {
        let (first, end) = (self.first_needed(tokens), tokens / self.block_size);
        (0..self.sink_blocks.min(first).min(end)).chain(first..end)
    }

    /// Blocks that a sequence which has computed `n` tokens goes on with, the last one perhaps partly filled,
    /// ascending.
    pub fn held(&self, n: usize) -> impl Iterator<Item = usize> + use<> {
        let (first, end) = (self.first_needed(n), n.div_ceil(self.block_size));
        (0..self.sink_blocks.min(first).min(end)).chain(first..end)
    }

    /// Whether every block of a prefix is needed.
    pub fn is_full(&self) -> bool {
        self.kind == GroupKind::Attention(AttentionKind::Full)
    }

    /// The longest prefix, a multiple of `alignment` and at most `limit` (one, too), whose needed blocks
    /// are all `present`; an upper bound of it where only a shorter limit can tell.
    pub fn longest(
        &self,
        limit: usize,
        alignment: usize,
        present: impl Fn(usize) -> bool,
    ) -> usize {
        let sinks = (0..self.sink_blocks.min(limit / self.block_size)).find(|&b| !present(b));
        // Without one of its sink blocks only what lies before that block can be served.
        let limit = match sinks {
            Some(b) => align_down(b * self.block_size, alignment),
            None => limit,
        };
        match self.kind {
            GroupKind::Attention(AttentionKind::Full) => {
                full::longest(self, limit, alignment, present)
            }
            GroupKind::Attention(AttentionKind::Chunked { .. }) => {
                chunked::longest(self, limit, alignment, present)
            }
            // A prefix needs one state, that of its end: a window over the last token.
            GroupKind::Attention(AttentionKind::Sliding { .. }) | GroupKind::State => {
                sliding::longest(self, limit, alignment, present)
            }
        }
    }

    /// Most blocks a request of `tokens` holds at once when at most `in_flight` of its tokens are
    /// computed and not yet settled. The one bound of sizing and admission.
    pub fn max_blocks(&self, tokens: usize, in_flight: usize, retention: &Retention) -> usize {
        let all = tokens.div_ceil(self.block_size);
        let live = match self.kind {
            GroupKind::Attention(AttentionKind::Full) => return all,
            GroupKind::Attention(AttentionKind::Sliding { window }) => window as usize - 1,
            GroupKind::Attention(AttentionKind::Chunked { chunk }) => chunk as usize,
            GroupKind::State => {
                // The slot, the checkpoint that it began with, and those between settled and computed.
                let edges = in_flight / self.block_size + 1;
                let per_end = 1 + retention.slack.states();
                let kept = match retention.interval {
                    None => edges,
                    Some(0) => 2 * per_end,
                    Some(k) => (in_flight / k as usize + 3).saturating_mul(per_end),
                };
                return edges.min(kept).saturating_add(2).min(all);
            }
        };
        let live = live.saturating_add(in_flight).min(tokens).div_ceil(self.block_size);
        // One more where the live tokens can begin inside a block.
        let straddle = match self.kind {
            GroupKind::Attention(AttentionKind::Chunked { chunk }) => {
                !(chunk as usize).is_multiple_of(self.block_size)
            }
            _ => true,
        };
        (live + usize::from(straddle) + self.sink_blocks).min(all)
    }
}

/// The largest multiple of `alignment` that is at most `n`.
pub(super) fn align_down(n: usize, alignment: usize) -> usize {
    n / alignment * alignment
}
