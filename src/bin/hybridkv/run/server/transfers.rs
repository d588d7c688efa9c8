//! The transfers of a run: started when the manager emits them, told to it when they have ended, and what that
//! means for the requests that wait for them or run behind them.

use std::collections::HashSet;

use hybridkv::error::Result;
use hybridkv::manager::{BlockCopy, BlockId, Completion, Path, SeqId};

use super::Server;
use super::requests::Loads;

impl Server {
    /// Copies what the manager has emitted inside the pool; gives the targets.
    pub(super) fn copy_blocks(&mut self) -> Result<HashSet<BlockId>> {
        let copies: Vec<BlockCopy> = std::iter::from_fn(|| self.manager.next_copy()).collect();
        self.engine.copy_blocks(&copies, (*self.compute).as_ref())?;
        if let Some(sampler) = &mut self.sampler {
            copies.iter().for_each(|copy| sampler.note_copy(copy));
        }
        Ok(copies.iter().map(|copy| copy.to).collect())
    }

    /// Starts the copies and the transfers that the manager has emitted.
    pub(super) fn pump(&mut self) -> Result<()> {
        self.copy_blocks()?;
        self.transfers.clear();
        while let Some(transfer) = self.manager.next_transfer() {
            self.transfers.push(transfer);
            match (transfer.path, transfer.seq) {
                (Path::Onboard { to, .. }, Some(seq)) => {
                    if let Some(live) = self.running.iter_mut().find(|live| live.seq == seq) {
                        let group = transfer.group as usize;
                        live.loads.push((group, to));
                        if let Some(sampler) = &mut self.sampler {
                            let table = self.manager.table(seq, group)?;
                            let index = table.iter().position(|&id| id == to);
                            sampler.note_load(group, to, index, &live.job.hashes);
                        }
                    }
                }
                (Path::Offload { from, to }, _) => {
                    if let Some(sampler) = &mut self.sampler {
                        sampler.offload_started(transfer.id, transfer.group as usize, from, to);
                    }
                }
                _ => {}
            }
        }
        self.engine.submit(&self.transfers, (*self.compute).as_ref())?;
        if self.setup.layerwise.is_some() && !self.transfers.is_empty() {
            self.overlap();
        }
        Ok(())
    }

    /// Lets the requests run whose loads are all on their way, behind them.
    fn overlap(&mut self) {
        for live in self.running.iter_mut().filter(|live| live.loads_are == Loads::Awaited) {
            if self.manager.overlap(live.seq).is_ok() {
                live.loads_are = Loads::Behind;
                self.counters.overlapped += 1;
                if let Some(sampler) = &mut self.sampler {
                    sampler.begin_trial(live.seq);
                }
            }
        }
    }

    /// It is known whether what a request computed behind its loads counts.
    pub(super) fn end_trial(&mut self, at: usize, valid: bool) {
        let live = &mut self.running[at];
        if std::mem::replace(&mut live.loads_are, Loads::Ended) == Loads::Behind
            && let Some(sampler) = &mut self.sampler
        {
            sampler.end_trial(live.seq, valid);
        }
    }

    /// Tells the manager how transfers ended, and checks host slots.
    pub(super) fn take_completions(&mut self) -> Result<()> {
        let mut completed = std::mem::take(&mut self.completed);
        for (id, outcome) in completed.drain(..) {
            if let Some(sampler) = &mut self.sampler {
                sampler.transfer_ended(id, outcome, &self.engine)?;
            }
            let completion = self.manager.complete(id, outcome)?;
            self.hear(completion)?;
            self.hear_all()?;
        }
        self.completed = completed;
        self.pump()
    }

    /// Takes what the manager has to tell besides its answers to completions.
    pub(super) fn hear_all(&mut self) -> Result<()> {
        while let Some(completion) = self.manager.next_completion() {
            self.hear(completion)?;
        }
        Ok(())
    }

    fn hear(&mut self, completion: Completion) -> Result<()> {
        match completion {
            Completion::Pending => {}
            Completion::Ready { seq, valid_tokens } => self.loaded(seq, valid_tokens)?,
            Completion::Dropped { seq } | Completion::Void { seq } => {
                if let Some(at) = self.running.iter().position(|live| live.seq == seq) {
                    self.counters.failed_loads += 1;
                    self.end_trial(at, false);
                    self.requeue(at);
                }
            }
        }
        Ok(())
    }

    /// A sequence's loads have ended: it runs from its first `valid_tokens` on, or goes on running.
    fn loaded(&mut self, seq: SeqId, valid_tokens: usize) -> Result<()> {
        let Some(at) = self.running.iter().position(|live| live.seq == seq) else { return Ok(()) };
        let live = &mut self.running[at];
        if live.loads_are == Loads::Awaited {
            self.counters.failed_loads += u64::from(valid_tokens < live.hit_tokens);
            live.hit_tokens = valid_tokens;
            live.computed = valid_tokens;
            live.settled = valid_tokens;
        }
        self.end_trial(at, true);
        self.sample_hit(at)?;
        let live = &self.running[at];
        if live.settled == live.total() {
            self.end(at)?;
        }
        Ok(())
    }

    /// Samples the blocks of a prefix hit that is whole now.
    pub(super) fn sample_hit(&mut self, at: usize) -> Result<()> {
        let live = &mut self.running[at];
        let loads: HashSet<(usize, BlockId)> = live.loads.drain(..).collect();
        let Some(sampler) = &mut self.sampler else { return Ok(()) };
        let compute = (*self.compute).as_ref();
        let (sequence, tokens) = (live.as_sequence(), live.hit_tokens);
        sampler.sample_hit(sequence, tokens, &loads, &self.manager, &self.engine, compute)
    }
}
