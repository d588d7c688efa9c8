//! One layer group's rules, in blocks: what a prefix hit needs, what a running sequence still needs, how
//! many blocks a request can hold. All of them follow from [`GroupKind::skipped`].

mod chunked;
mod full;
mod sliding;

use std::ops::Range;

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
    /// Whether blocks are found by their fronts, too: what their first units hold, under the hashes of these.
    pub fronts: bool,
}

impl Group {
    /// In units of `hash_block` tokens, with hits that end at multiples of `alignment`.
    pub fn new(config: &GroupConfig, hash_block: usize, alignment: usize) -> Self {
        let block_size = config.block_size as usize;
        let units = block_size / hash_block;
        Self {
            kind: config.kind,
            block_size,
            sink_blocks: (config.sink_tokens as usize).div_ceil(block_size),
            units,
            fronts: !alignment.is_multiple_of(block_size),
        }
    }

    /// Index of the hashed unit that keys block `b`.
    pub fn key_index(&self, b: usize) -> usize {
        (b + 1) * self.units - 1
    }

    /// Index of the hashed unit that keys what a prefix of `tokens`, whole units, has of block `b`: the block, or
    /// its front where the prefix ends inside of it.
    pub fn key_index_in(&self, b: usize, tokens: usize) -> usize {
        match tokens / self.block_size {
            whole if b < whole => self.key_index(b),
            _ => tokens / (self.block_size / self.units) - 1,
        }
    }

    /// Indices of the hashed units that key the fronts of block `b`, the shortest first.
    pub fn front_indices(&self, b: usize) -> Range<usize> {
        let end = if self.fronts { self.key_index(b) } else { b * self.units };
        b * self.units..end
    }

    /// Indices of the hashed units that `tokens` tokens fill of block `b`, where they end.
    pub fn units_in(&self, b: usize, tokens: usize) -> Range<usize> {
        b * self.units..tokens / (self.block_size / self.units)
    }

    /// Fronts that a block has.
    pub fn fronts_per_block(&self) -> usize {
        self.front_indices(0).len()
    }

    /// First block after the sinks that a query at position `n` or later can see.
    pub fn first_needed(&self, n: usize) -> usize {
        (self.kind.skipped(n as u64) as usize) / self.block_size
    }

    /// Whether a prefix of `tokens` needs block `b`, one of its own.
    pub fn needs(&self, b: usize, tokens: usize) -> bool {
        b < self.sink_blocks || b >= self.first_needed(tokens)
    }

    /// Blocks behind the sinks that a prefix of `tokens` needs. One that it ends inside of is needed for its front,
    /// whether any of that is still seen or not: it is filled up, and then has to be what its key says.
    pub fn tail(&self, tokens: usize) -> Range<usize> {
        self.first_needed(tokens)..tokens.div_ceil(self.block_size)
    }

    /// Blocks that a prefix of `tokens` needs, and that a sequence which has computed them goes on with, ascending,
    /// the last one perhaps partly filled.
    pub fn needed(&self, tokens: usize) -> impl Iterator<Item = usize> + use<> {
        let tail = self.tail(tokens);
        (0..self.sink_blocks.min(tail.start).min(tail.end)).chain(tail)
    }

    /// Whether every block of a prefix is needed.
    pub fn is_full(&self) -> bool {
        self.kind == GroupKind::Attention(AttentionKind::Full)
    }

    /// The longest prefix, a multiple of `alignment` and at most `limit` (one, too), of which all that is needed is
    /// `present`; an upper bound of it where only a shorter limit can tell. `present(b, n)` is asked for what a
    /// prefix of `n` tokens has of block `b`.
    pub fn longest(
        &self,
        limit: usize,
        alignment: usize,
        present: impl Fn(usize, usize) -> bool,
    ) -> usize {
        let mut limit = limit;
        // Without one of its sink blocks only what lies before it, or its front, can be served.
        while let Some(b) =
            (0..self.sink_blocks.min(limit.div_ceil(self.block_size))).find(|&b| !present(b, limit))
        {
            limit = self.without(b, limit, alignment);
        }
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

    /// The longest prefix that does with less of block `b` than one of `tokens`.
    fn without(&self, b: usize, tokens: usize, alignment: usize) -> usize {
        align_down(tokens.min((b + 1) * self.block_size) - 1, alignment)
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
