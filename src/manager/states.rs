//! Where a step finds and leaves the states of a state group.
//!
//! One rule: the state after `n > 0` tokens is in the first block of the table at or after index
//! `(n - 1) / block_size`. It holds for what a step begins with, for the checkpoints on its way, and for its
//! end. The state before the first token is the kernel's own (zeros); a block never holds it.

use super::pool::NULL;
use super::*;

/// The states of one sequence and group in a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateStep {
    /// The block that the step begins with; 0 when it begins at token 0. It is only read, unless it is the
    /// first of `writes`, too.
    pub source: BlockId,
    /// Blocks that the step fills, ascending, each with the number of tokens whose state it gets: checkpoints
    /// at block edges, then the end of the step.
    pub writes: Vec<(usize, BlockId)>,
}

impl Manager {
    /// The states of a step that computes the tokens `start..end` of a sequence. `start` is what is computed
    /// so far.
    ///
    /// # Errors
    /// `UnknownSequence`; `InvalidArgument` for a group that is not of states, and for tokens that do not
    /// begin with the first one not computed or that were not given.
    pub fn state_step(
        &self,
        seq: SeqId,
        group: usize,
        start: usize,
        end: usize,
    ) -> Result<StateStep> {
        const OP: &str = "state step";
        let (row, rule) = self.row(OP, seq, group)?;
        if rule.kind != GroupKind::State {
            return Err(Error::invalid(OP, format!("group {group} is of {} layers", rule.kind)));
        }
        let Some(sequence) = self.sequences.get(&seq) else {
            return Err(Error::new(OP, ErrorKind::UnknownSequence(seq)));
        };
        let (computed, given) = (sequence.computed, sequence.tokens.len());
        if start != computed || end <= start || end > given {
            return Err(Error::invalid(
                OP,
                format!(
                    "tokens {start}..{end} of a sequence that has computed {computed} of {given}"
                ),
            ));
        }
        let from = |b: usize| {
            row.table.indices_from(b).map(|b| (b, row.table.get(b))).filter(|&(_, id)| id != NULL)
        };
        let source = match start {
            0 => NULL,
            _ => from((start - 1) / rule.block_size).next().map_or(NULL, |(_, id)| id),
        };
        let mut writes = Vec::new();
        for (b, id) in from(start / rule.block_size) {
            let edge = (b + 1) * rule.block_size;
            writes.push((edge.min(end), id));
            if edge >= end {
                break;
            }
        }
        Ok(StateStep { source, writes })
    }
}
