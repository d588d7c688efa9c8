//! Which blocks and rows are verified, and what they must hold.
//!
//! Blocks of sequences are known by position: their contents follow from the sequence's history. A host slot
//! is known by the device block it was offloaded from, so the sampler keeps what was written into every
//! block of the pool, as history hashes.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use hybridkv::device::{Device, Span, StreamRef};
use hybridkv::engine::{Engine, SeqSlice};
use hybridkv::error::Result;
use hybridkv::manager::{BlockCopy, BlockId, HostSlot, Manager, Outcome, SeqId, TransferId};

use super::conversations::Random;
use super::oracle::{ExpectedBlock, ExpectedRow, Occasion, Oracle};
use super::setup::Setup;
use super::verify::{Tally, Verifier};

/// Samples a fraction of everything for a [`Verifier`].
pub struct Sampler {
    verifier: Verifier,
    fraction: f64,
    random: Random,
    /// Tokens per block of each group.
    block_sizes: Vec<usize>,
    num_qo_heads: usize,
    /// Bytes of one output row of each layer.
    row_bytes: Vec<usize>,
    /// `[num_blocks][stride]`: history hashes of what every device block holds.
    contents: Vec<u64>,
    stride: usize,
    /// Per device block, its first tokens that `contents` is right about.
    filled: Vec<usize>,
    /// Offloads whose slots are looked at once they have ended.
    offloads: HashMap<TransferId, (HostSlot, ExpectedBlock)>,
}

/// A sequence as the sampler sees it.
#[derive(Debug, Clone, Copy)]
pub struct Sequence<'a> {
    pub seq: SeqId,
    /// History hashes of its tokens.
    pub hashes: &'a Arc<[u64]>,
}

impl Sampler {
    /// A sampler of the fraction that `setup` asks for.
    pub fn new(device: &Device, setup: &Setup, oracle: Oracle) -> Result<Self> {
        let block_sizes: Vec<usize> =
            setup.plan.groups.iter().map(|group| group.block_size as usize).collect();
        let stride = block_sizes.iter().copied().max().unwrap_or(0);
        let row_bytes = setup
            .spec
            .layers
            .iter()
            .map(|layer| layer.shape.head_dim as usize * setup.elements.dtype.bytes())
            .collect();
        Ok(Self {
            verifier: Verifier::new(device, Arc::new(oracle))?,
            fraction: setup.verify,
            random: Random::new(setup.seed ^ 0x5EED),
            num_qo_heads: setup.spec.num_qo_heads as usize,
            row_bytes,
            contents: vec![0; setup.engine.num_blocks as usize * stride],
            stride,
            filled: vec![0; setup.engine.num_blocks as usize],
            block_sizes,
            offloads: HashMap::new(),
        })
    }

    /// Notes what a batch, whose tokens have these history hashes, writes.
    pub fn note_step(
        &mut self,
        manager: &Manager,
        batch: &[SeqSlice],
        hashes: &[u64],
    ) -> Result<()> {
        let mut first = 0;
        for slice in batch {
            let hashes = &hashes[first..first + slice.tokens as usize];
            for g in 0..self.block_sizes.len() {
                let (row, size) = (manager.block_row(slice.seq, g)?, self.block_sizes[g]);
                for (position, &hash) in (slice.start as usize..).zip(hashes) {
                    let block = row.get(position / size).unwrap_or_default();
                    self.note(block, position % size, hash);
                }
            }
            first += slice.tokens as usize;
        }
        Ok(())
    }

    /// Reads sampled output rows of a layer: of every sequence at most one.
    pub fn sample_rows<'a>(
        &mut self,
        layer: u32,
        out: Span,
        batch: &[SeqSlice],
        hashes: impl Fn(SeqId) -> Option<&'a Arc<[u64]>>,
        compute: StreamRef<'_>,
    ) -> Result<()> {
        let bytes = self.row_bytes[layer as usize];
        let mut first = 0;
        for slice in batch {
            if self.random.chance(self.fraction)
                && let Some(hashes) = hashes(slice.seq)
            {
                let token = self.random.below(slice.tokens as usize);
                let head = self.random.below(self.num_qo_heads);
                let row = (first + token) * self.num_qo_heads + head;
                let expected = ExpectedRow {
                    seq: slice.seq,
                    layer,
                    qo_head: head as u32,
                    position: slice.start as usize + token,
                    hashes: hashes.clone(),
                };
                let address = out.address + (row * bytes) as u64;
                self.verifier.probe_row(address, bytes, expected, compute)?;
            }
            first += slice.tokens as usize;
        }
        Ok(())
    }

    /// Reads sampled blocks of a prefix hit of `tokens`, before anything is computed on them. `loads` are
    /// those that came from the host.
    pub fn sample_hit(
        &mut self,
        sequence: Sequence<'_>,
        tokens: usize,
        loads: &HashSet<(usize, BlockId)>,
        manager: &Manager,
        engine: &Engine,
        compute: StreamRef<'_>,
    ) -> Result<()> {
        self.sample_blocks(sequence, tokens, manager, engine, compute, |key| {
            if loads.contains(&key) { Occasion::Onboarded } else { Occasion::Hit }
        })
    }

    /// Reads sampled live blocks of a sequence at the end of its turn.
    pub fn sample_turn_end(
        &mut self,
        sequence: Sequence<'_>,
        tokens: usize,
        manager: &Manager,
        engine: &Engine,
        compute: StreamRef<'_>,
    ) -> Result<()> {
        self.sample_blocks(sequence, tokens, manager, engine, compute, |_| Occasion::TurnEnd)
    }

    fn sample_blocks(
        &mut self,
        sequence: Sequence<'_>,
        tokens: usize,
        manager: &Manager,
        engine: &Engine,
        compute: StreamRef<'_>,
        occasion: impl Fn((usize, BlockId)) -> Occasion,
    ) -> Result<()> {
        for (g, &size) in self.block_sizes.iter().enumerate() {
            let table = manager.table(sequence.seq, g)?;
            for (b, &block) in table[..tokens.div_ceil(size)].iter().enumerate() {
                if block == 0 || !self.random.chance(self.fraction) {
                    continue;
                }
                let expected = ExpectedBlock {
                    occasion: occasion((g, block)),
                    group: g,
                    hashes: sequence.hashes[b * size..tokens.min((b + 1) * size)].to_vec(),
                };
                self.verifier.probe_block(engine.block(block)?, expected, compute)?;
            }
        }
        Ok(())
    }

    /// The load of a block, the one of this index in a sequence of these hashes, has been emitted. Whether the
    /// sequence can use it or not, it may be offloaded again.
    pub fn note_load(
        &mut self,
        group: usize,
        block: BlockId,
        index: Option<usize>,
        hashes: &[u64],
    ) {
        let size = self.block_sizes[group];
        let Some(index) = index else { return };
        for (offset, &hash) in hashes.iter().skip(index * size).take(size).enumerate() {
            self.note(block, offset, hash);
        }
    }

    /// A block of the pool has been copied.
    pub fn note_copy(&mut self, copy: &BlockCopy) {
        let [from, to] = [copy.from, copy.to].map(|block| block as usize);
        let first = from * self.stride;
        self.contents.copy_within(first..first + self.stride, to * self.stride);
        self.filled[to] = self.filled[from];
    }

    /// The offload of a block of a group has been emitted: perhaps its slot is looked at later.
    pub fn offload_started(
        &mut self,
        id: TransferId,
        group: usize,
        block: BlockId,
        slot: HostSlot,
    ) {
        if self.random.chance(self.fraction) {
            let first = block as usize * self.stride;
            // A sequence may have left it unfinished.
            let hashes = self.contents[first..first + self.filled[block as usize]].to_vec();
            let expected = ExpectedBlock { occasion: Occasion::HostSlot, group, hashes };
            self.offloads.insert(id, (slot, expected));
        }
    }

    /// A transfer has ended, and the manager does not know yet: its slot still holds what it brought.
    pub fn transfer_ended(
        &mut self,
        id: TransferId,
        outcome: Outcome,
        engine: &Engine,
    ) -> Result<()> {
        if let Some((slot, expected)) = self.offloads.remove(&id)
            && outcome == Outcome::Succeeded
        {
            self.verifier.check_bytes(engine.slot(slot)?, expected);
        }
        Ok(())
    }

    /// See [`Verifier::begin_trial`].
    pub fn begin_trial(&mut self, seq: SeqId) {
        self.verifier.begin_trial(seq);
    }

    /// See [`Verifier::end_trial`].
    pub fn end_trial(&mut self, seq: SeqId, valid: bool) {
        self.verifier.end_trial(seq, valid);
    }

    /// See [`Verifier::fence`].
    pub fn fence(&mut self, compute: StreamRef<'_>) -> Result<()> {
        self.verifier.fence(compute)
    }

    /// What was found so far.
    pub fn tally(&self) -> Tally {
        self.verifier.tally()
    }

    /// See [`Verifier::finish`].
    pub fn finish(self, compute: StreamRef<'_>) -> Result<Tally> {
        self.verifier.finish(compute)
    }

    fn note(&mut self, block: BlockId, offset: usize, hash: u64) {
        if block != 0 {
            self.contents[block as usize * self.stride + offset] = hash;
            self.filled[block as usize] = offset + 1;
        }
    }
}
