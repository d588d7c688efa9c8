//! One live sequence: its hashes and, per layer group, its table of blocks.

use super::BlockId;
use super::hash::{BlockHash, Chain};
use super::retention::Boundaries;

/// A sequence's table in one group.
#[derive(Debug, Default, Clone)]
pub(super) struct Row {
    /// Blocks of all token positions; the null block at freed and skipped ones.
    pub table: Vec<BlockId>,
    /// Blocks before this one, sinks apart, have left the table.
    pub first_live: usize,
    /// Blocks before this one have been considered for caching.
    pub considered: usize,
    /// Blocks before this one have been offered to the host tier.
    pub offered: usize,
}

/// A live sequence.
pub(super) struct Sequence {
    /// Tokens given so far.
    pub num_tokens: usize,
    /// Tokens whose computation has been submitted.
    pub computed: usize,
    /// Tokens whose computation has finished.
    pub settled: usize,
    /// Hashes of all full units.
    pub hashes: Vec<BlockHash>,
    /// Tokens after the last full unit.
    tail: Vec<u32>,
    chain: Chain,
    pub rows: Vec<Row>,
    pub boundaries: Boundaries,
    /// Tells it from earlier sequences of the same name.
    pub generation: u64,
    /// Loads that have not been answered; until then nothing of it is computed.
    pub loading: usize,
    /// Blocks whose load failed, as (group, index).
    pub lost: Vec<(usize, usize)>,
    /// Whether a load failed, so that tokens are computed again: until all are, blocks become findable only
    /// when they are computed.
    pub repaired: bool,
}

impl Sequence {
    /// A sequence without tokens.
    pub fn new(chain: Chain, num_groups: usize) -> Self {
        Self {
            num_tokens: 0,
            computed: 0,
            settled: 0,
            hashes: Vec::new(),
            tail: Vec::new(),
            chain,
            rows: vec![Row::default(); num_groups],
            boundaries: Boundaries::default(),
            generation: 0,
            loading: 0,
            lost: Vec::new(),
            repaired: false,
        }
    }

    /// Adds tokens and hashes the units of `hash_block` tokens that they fill; 0 hashes nothing.
    pub fn push(&mut self, mut tokens: &[u32], hash_block: usize) {
        self.num_tokens += tokens.len();
        if hash_block == 0 {
            return;
        }
        if !self.tail.is_empty() {
            let (head, rest) = tokens.split_at(tokens.len().min(hash_block - self.tail.len()));
            self.tail.extend_from_slice(head);
            tokens = rest;
            if self.tail.len() < hash_block {
                return;
            }
            self.hashes.push(self.chain.push(&self.tail));
            self.tail.clear();
        }
        let units = tokens.chunks_exact(hash_block);
        self.tail.extend_from_slice(units.remainder());
        self.hashes.reserve(units.len());
        for unit in units {
            self.hashes.push(self.chain.push(unit));
        }
    }
}
