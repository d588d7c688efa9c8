//! Sequences that share a start: fork, copy-on-write of a shared tail block, and cutting a sequence back.
//!
//! A block that another sequence holds, that the prefix index names or that a transfer reads is never
//! written: [`Manager::append`] first moves the sequence's partly filled tail onto a block of its own, and
//! emits the [`BlockCopy`] that fills it. All other blocks that a sequence writes are its own from the start.

use std::collections::HashSet;

use super::pool::NULL;
use super::sequence::NOBODY;
use super::*;

/// One block to copy inside the device pool. The copies are to be executed in the order they are given,
/// on the compute stream, before anything that is submitted after they were taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockCopy {
    /// Layer group of both blocks.
    pub group: u32,
    /// Source.
    pub from: BlockId,
    /// Target.
    pub to: BlockId,
}

/// What cutting a sequence back gave.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cut {
    /// Per group, blocks that left the table, the later first.
    pub freed: Vec<Vec<BlockId>>,
    /// Other sequences that hit blocks of tokens that will now never be computed: they are to be aborted.
    pub dependents: Vec<SeqId>,
}

/// What becomes of the cached blocks of tokens that are cut off.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Cached {
    /// What was computed stays findable.
    Stays,
    /// They were never there.
    Goes,
}

impl Manager {
    /// Begins sequence `child` with the computed tokens of `parent` and shares all their blocks; gives their
    /// number. Tokens that the parent has yet to compute stay the parent's own. It takes no block: whoever
    /// goes on first gets a copy of the partly filled tail block (see [`Self::next_copy`]). Until a
    /// sequence's next [`Self::append`] no slot beyond its tokens may be written.
    ///
    /// # Errors
    /// `UnknownSequence` for the parent, `DuplicateSequence` for the child, `InvalidArgument` for a parent
    /// that waits for loads, has computed nothing, or has recurrent states and tokens that are not computed;
    /// nothing is changed.
    pub fn fork(&mut self, parent: SeqId, child: SeqId) -> Result<usize> {
        const OP: &str = "fork";
        let Some(of) = self.sequences.get(&parent) else {
            return Err(Error::new(OP, ErrorKind::UnknownSequence(parent)));
        };
        self.check_name(OP, child)?;
        check_loaded(OP, parent, of)?;
        let shared = of.computed;
        if shared == 0 {
            return Err(Error::invalid(OP, format!("sequence {parent} has computed nothing yet")));
        }
        // The state of its computed tokens gives way to that of the others.
        let states = self.groups.iter().any(|group| group.kind == GroupKind::State);
        if states && shared < of.tokens.len() {
            let left = of.tokens.len() - shared;
            return Err(Error::invalid(
                OP,
                format!("sequence {parent} has {left} token(s) to compute, and recurrent states"),
            ));
        }
        let mut rows = of.rows.clone();
        for (group, row) in self.groups.iter().zip(&mut rows) {
            row.table.truncate(shared.div_ceil(group.block_size));
            row.cut(shared / group.block_size);
            // The parent vouches for these.
            row.settled = shared / group.block_size;
            for id in row.table.ids() {
                self.device.pool.touch(id);
            }
        }
        let mut tokens = of.tokens.clone();
        tokens.truncate(shared);
        self.generation += 1;
        let sequence = Sequence {
            tokens,
            open_end: 0,
            rows,
            computed: shared,
            settled: of.settled,
            begun: of.begun,
            boundaries: of.boundaries,
            hit: shared,
            tenant: of.tenant,
            generation: self.generation,
            inherited: Some(Inherited { from: of.generation, tokens: shared }),
            loading: 0,
            pending: 0,
            overlapped: false,
            lost: Vec::new(),
            repaired: false,
        };
        // Its tail is not its own any more.
        if let Some(of) = self.sequences.get_mut(&parent) {
            of.open_end = 0;
        }
        self.cancel_prefetch(child);
        self.sequences.insert(child, sequence);
        Ok(shared)
    }

    /// The next block to copy, in order; `None` when there is none. Copies are to be taken and executed
    /// before the next step and before the next transfer: no transfer is given out while there are any. What a
    /// sequence left for its copy is reused like the blocks of a freed one: by work that is ordered behind the
    /// steps in flight.
    pub fn next_copy(&mut self) -> Option<BlockCopy> {
        self.copies.pop_front()
    }

    /// Cuts a sequence back to its first `tokens` tokens. What it had computed of the others, by steps that
    /// must have ended well, stays findable as long as its blocks are not reused.
    ///
    /// # Errors
    /// `UnknownSequence`; `InvalidArgument` for no tokens, more than there are, a sequence that waits for
    /// loads, or an end inside of a block that was hit before a step of the sequence has been submitted; `OutOfWindow` when a windowed group has freed what the cut sequence would see, or a state group
    /// keeps no state of just these tokens (of computed ones it does at a checkpoint only: draft on a fork);
    /// nothing is changed.
    pub fn trim(&mut self, seq: SeqId, tokens: usize) -> Result<Cut> {
        self.cut("trim", seq, tokens, Cached::Stays)
    }

    /// Takes back all but the first `tokens` tokens, as if the others (drafts that were rejected) had never
    /// been given: their blocks are not findable any more and are reused first. Drafts are to be rolled back
    /// before they count as settled: what windowed groups free then they do not get back.
    ///
    /// # Errors
    /// Those of [`Self::trim`].
    pub fn rollback(&mut self, seq: SeqId, tokens: usize) -> Result<Cut> {
        self.cut("rollback", seq, tokens, Cached::Goes)
    }

    pub(super) fn cut(
        &mut self,
        op: &'static str,
        seq: SeqId,
        tokens: usize,
        cached: Cached,
    ) -> Result<Cut> {
        let Some(sequence) = self.sequences.get_mut(&seq) else {
            return Err(Error::new(op, ErrorKind::UnknownSequence(seq)));
        };
        check_loaded(op, seq, sequence)?;
        let (len, computed) = (sequence.tokens.len(), sequence.computed);
        if tokens == 0 || tokens > len {
            return Err(Error::invalid(
                op,
                format!("{tokens} of the {len} tokens of sequence {seq}; wanted are 1 to {len}"),
            ));
        }
        let inside = |group: &Group| !tokens.is_multiple_of(group.block_size);
        if !sequence.begun && tokens < sequence.computed && self.groups.iter().any(inside) {
            return Err(Error::invalid(
                op,
                format!(
                    "{tokens} tokens end inside of a block that sequence {seq} hit and that may not be written \
                     yet: cut at a block edge, or after its first step"
                ),
            ));
        }
        for (g, (group, row)) in self.groups.iter().zip(&sequence.rows).enumerate() {
            let mut needed = group.first_needed(tokens)..tokens.div_ceil(group.block_size);
            let missing = match group.kind {
                // The slot holds the state of all that is computed, wherever it is.
                GroupKind::State if tokens >= sequence.computed => false,
                GroupKind::State if !tokens.is_multiple_of(group.block_size) => true,
                _ => needed.any(|b| row.table.get(b) == NULL),
            };
            if missing {
                return Err(Error::new(op, ErrorKind::OutOfWindow { seq, tokens, group: g }));
            }
        }

        self.events.seal();
        let mut freed = vec![Vec::new(); self.groups.len()];
        let mut void = HashSet::new();
        for (g, (group, row)) in self.groups.iter().zip(&mut sequence.rows).enumerate() {
            let (whole, kept) = (tokens / group.block_size, tokens.div_ceil(group.block_size));
            for b in row.table.indices_from(whole) {
                let id = row.table.get(b);
                let block = *self.device.pool.block(id);
                if id == NULL || !block.cached {
                    continue;
                }
                // What was cut off before was computed, or is not findable.
                let unfinished = computed < len && computed < (b + 1) * group.block_size;
                if unfinished && block.users > 1 {
                    void.insert(id);
                }
                // A block that others hold is theirs as well: it stays what it is.
                if unfinished || cached == Cached::Goes && block.users == 1 {
                    self.device.remove(id, &mut self.events);
                    if let Some(host) = &mut self.host {
                        host.disown(g, &block.hash, &mut self.events);
                    }
                }
            }
            let table = &mut row.table;
            if group.kind == GroupKind::State
                && table.get(kept - 1) == NULL
                && let Some(ahead) = table.indices_from(kept).find(|&b| table.get(b) != NULL)
            {
                // The slot has gone ahead.
                let slot = table.replace(ahead, NULL);
                table.replace(kept - 1, slot);
            }
            let cut_off = table.indices_from(kept).rev().map(|b| table.get(b));
            freed[g].extend(cut_off.filter(|&id| id != NULL));
            table.truncate(kept);
            self.device.pool.release(freed[g].iter().copied());
            row.cut(whole);
        }
        sequence.tokens.truncate(tokens);
        sequence.open_end = 0;
        sequence.computed = sequence.computed.min(tokens);
        sequence.settled = sequence.settled.min(tokens);
        sequence.repaired &= sequence.computed < tokens;
        if let Some(inherited) = &mut sequence.inherited {
            inherited.tokens = inherited.tokens.min(tokens);
        }
        if tokens < computed {
            // All its steps have ended well: nobody counts on them any more.
            let generation = sequence.generation;
            let of = self.sequences.values_mut().filter_map(|other| other.inherited.as_mut());
            of.filter(|other| other.from == generation).for_each(|other| other.from = NOBODY);
        }
        let dependents = self.holders(seq, &void, computed);
        Ok(Cut { freed, dependents })
    }

    /// The other sequences that hold one of these blocks and count on more than the first `tokens` tokens, ascending.
    pub(super) fn holders(
        &self,
        seq: SeqId,
        blocks: &HashSet<BlockId>,
        tokens: usize,
    ) -> Vec<SeqId> {
        if blocks.is_empty() {
            return Vec::new();
        }
        let holds = |other: &Sequence| {
            let mut held = other.rows.iter().flat_map(|row| row.table.ids());
            other.tokens.len() > tokens && held.any(|id| blocks.contains(&id))
        };
        let mut holders: Vec<SeqId> = self
            .sequences
            .iter()
            .filter(|&(&id, other)| id != seq && holds(other))
            .map(|(&id, _)| id)
            .collect();
        holders.sort_unstable();
        holders
    }
}
