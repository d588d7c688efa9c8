//! The requests of a run: those that wait, those that run, and how they get from one to the other.

use std::sync::Arc;

use hybridkv::error::{ErrorKind, Result};
use hybridkv::manager::{BlockId, ExtraKeys, SeqId};
use hybridkv::ops::synthetic::history;

use super::super::sampling::Sequence;
use super::super::setup::Request;
use super::Server;
use super::prefetch::Fetch;

/// Requests that wait for the turn before them, at most, while later ones are looked at.
pub(super) const LOOK_AHEAD: usize = 64;

/// A request that waits.
pub(super) struct Job {
    /// Its name once it is allocated, and of its prefetch until then.
    pub seq: SeqId,
    pub request: Request,
    /// History hash of every token.
    pub hashes: Arc<[u64]>,
    /// Tokens to prefill: the prompt, and after a preemption what was put out as well.
    pub prompt_len: usize,
    pub preempted: bool,
    pub fetch: Fetch,
}

impl Job {
    /// Whether the turn before it has ended.
    pub fn may_start(&self, ended: &[bool]) -> bool {
        self.request.after.is_none_or(|request| ended[request])
    }
}

/// A request that runs.
pub(super) struct Live {
    pub seq: SeqId,
    pub job: Job,
    /// Tokens that the manager knows.
    pub appended: usize,
    /// Tokens whose step was submitted.
    pub computed: usize,
    /// Tokens whose step has ended.
    pub settled: usize,
    pub hit_tokens: usize,
    /// Blocks that were on their way up.
    pub loads: Vec<(usize, BlockId)>,
    pub loads_are: Loads,
}

/// How the loads of a request stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Loads {
    /// It waits for them.
    Awaited,
    /// Its steps run behind them, on trial.
    Behind,
    /// They have ended, or there were none.
    Ended,
}

impl Live {
    pub fn total(&self) -> usize {
        self.job.request.tokens.len()
    }

    pub fn as_sequence(&self) -> Sequence<'_> {
        Sequence { seq: self.seq, hashes: &self.job.hashes }
    }
}

impl Server {
    /// Admits waiting requests, oldest first, while there is room for their prompts. Outputs are not
    /// reserved for: what they lack later is taken from the youngest request.
    pub(super) fn admit(&mut self) -> Result<()> {
        self.prefetch()?;
        while self.running.len() < self.setup.max_seqs
            && (!self.pressed || self.running.is_empty())
            && let Some(at) = self.next_job()
        {
            let promised: usize = self
                .running
                .iter()
                .map(|live| live.job.prompt_len.saturating_sub(live.computed))
                .map(|tokens| self.manager.max_blocks(tokens))
                .sum();
            let job = &self.waiting[at];
            let needed = promised + self.manager.max_blocks(job.prompt_len);
            if !self.running.is_empty() && needed > self.manager.free_blocks() {
                break;
            }
            let seq = job.seq;
            let prompt = &job.request.tokens[..job.prompt_len];
            let allocated = self.manager.allocate_prefill(seq, prompt, 1, ExtraKeys::default(), 0);
            let allocation = match allocated {
                Ok(allocation) => allocation,
                Err(error) if matches!(error.kind(), ErrorKind::NoFreeBlocks { .. }) => break,
                Err(error) => return Err(error),
            };
            // A source may be among the new blocks already.
            let copied = self.copy_blocks()?;
            for block in allocation.new_blocks.iter().flatten().filter(|id| !copied.contains(id)) {
                self.poison(*block)?;
            }
            let Some(job) = self.waiting.remove(at) else { break };
            if !job.preempted {
                let hit = allocation.hit_tokens as u64;
                self.counters.prompt_tokens += job.prompt_len as u64;
                self.counters.device_hit_tokens += allocation.device_hit_tokens as u64;
                let host_hit = allocation.host_hit_tokens as u64;
                self.counters.host_hit_tokens += host_hit - allocation.device_hit_tokens as u64;
                self.counters.storage_hit_tokens += hit - host_hit;
            }
            let index = job.request.index;
            let at = self.running.partition_point(|live| live.job.request.index < index);
            let live = Live {
                seq,
                job,
                appended: allocation.num_tokens,
                computed: allocation.hit_tokens,
                settled: allocation.hit_tokens,
                hit_tokens: allocation.hit_tokens,
                loads: Vec::new(),
                loads_are: if allocation.loads.is_empty() { Loads::Ended } else { Loads::Awaited },
            };
            self.running.insert(at, live);
            self.pump()?;
            if allocation.loads.is_empty() {
                self.sample_hit(at)?;
            }
            self.hear_all()?;
        }
        Ok(())
    }

    /// Where in `waiting` the oldest request stands that may start: turns of one conversation follow each
    /// other.
    fn next_job(&mut self) -> Option<usize> {
        let may_start = |job: &Job| job.may_start(&self.ended) && job.fetch == Fetch::Over;
        if let Some(at) = self.waiting.iter().position(may_start) {
            return Some(at);
        }
        while self.waiting.len() < LOOK_AHEAD && !self.all_drawn() && self.setup.prefetch.is_none()
        {
            self.draw();
            if self.waiting.back().is_some_and(|job| job.may_start(&self.ended)) {
                return Some(self.waiting.len() - 1);
            }
        }
        None
    }

    /// Draws the next request.
    pub(super) fn draw(&mut self) {
        let request = self.setup.workload.request(self.next_request);
        self.next_request += 1;
        let mut hash = 0;
        let hashes = request
            .tokens
            .iter()
            .map(|&token| {
                hash = history(hash, token);
                hash
            })
            .collect();
        let (seq, fetch) = (self.name(), self.unfetched());
        let prompt_len = request.prompt_len;
        self.waiting.push_back(Job { seq, request, hashes, prompt_len, preempted: false, fetch });
    }

    /// A name that no sequence has had.
    fn name(&mut self) -> SeqId {
        self.next_seq += 1;
        self.next_seq - 1
    }

    fn unfetched(&self) -> Fetch {
        if self.setup.prefetch.is_some() { Fetch::Unasked } else { Fetch::Over }
    }

    /// Frees the youngest running request and puts it back in line.
    pub(super) fn preempt_youngest(&mut self) -> Result<()> {
        let at = self.running.len() - 1;
        self.manager.free(self.running[at].seq)?;
        self.end_trial(at, false);
        self.counters.preemptions += 1;
        self.requeue(at);
        Ok(())
    }

    /// Puts a request, of which the manager knows nothing any more, back in line.
    pub(super) fn requeue(&mut self, at: usize) {
        let live = self.running.remove(at);
        let prompt_len = live.job.prompt_len.max(live.appended);
        let index = live.job.request.index;
        let at = self.waiting.partition_point(|job| job.request.index < index);
        let (seq, fetch) = (self.name(), self.unfetched());
        self.waiting.insert(at, Job { seq, prompt_len, preempted: true, fetch, ..live.job });
    }
}
