//! The stores of an engine: a queue on the host, and the lane that they go down by chunks when the schedule lets
//! them.
//!
//! A submission is a *job*. It comes part by part over all its blocks, like loads by layer, each part behind the
//! event of its own layers; a transfer has ended once the chunk with the last part of it has.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use super::coder::Coder;
use super::fault::Faults;
use super::fences::Behind;
use super::lane::{Lane, LaneStats, Move, PartRun};
use super::parts::Parts;
use super::schedule::{Demand, Nanos, Pacing, Schedule, StepTime};
use crate::error::Result;
use crate::manager::{Direction, Outcome, TransferId};
use crate::movement::LinkModel;
use crate::ops::Kernels;

/// Fragments of a chunk at most: small blocks fill a chunk's bytes late.
const CHUNK_FRAGMENTS: usize = 4096;

/// What was submitted together.
struct Job {
    moves: Vec<Move>,
    num_parts: usize,
    behind: Behind,
    /// The next chunk begins with this part of this move.
    part: usize,
    next: usize,
}

impl Job {
    /// Transfers whose last part has not been started.
    fn left(&self) -> usize {
        self.moves.len() - if self.part + 1 == self.num_parts { self.next } else { 0 }
    }
}

/// Jobs in the order of their submission.
#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    /// Memory of jobs that were done.
    spare: Vec<Vec<Move>>,
}

impl Queue {
    fn push(&mut self, moves: impl Iterator<Item = Move>, parts: &Parts, behind: Behind) {
        let mut of_job = self.spare.pop().unwrap_or_default();
        of_job.extend(moves);
        let num_parts = parts.count(of_job.iter().map(|m| m.bytes).sum());
        self.jobs.push_back(Job { moves: of_job, num_parts, behind, part: 0, next: 0 });
    }

    /// How many moves of the first job, from its next one on, make the next chunk, and its bytes.
    fn chunk(&self, parts: &Parts, chunk_bytes: u64) -> Option<(usize, u64)> {
        let job = self.jobs.front()?;
        let (mut count, mut bytes) = (0, 0u64);
        for m in job.moves[job.next..].iter().take(CHUNK_FRAGMENTS) {
            let range = parts.range(m.group, job.part, job.num_parts);
            let more = bytes.saturating_add(range.end - range.start);
            if count > 0 && more > chunk_bytes {
                break;
            }
            (count, bytes) = (count + 1, more);
        }
        Some((count, bytes))
    }

    /// The first `count` moves of the next chunk have been started.
    fn advance(&mut self, count: usize) {
        let Some(job) = self.jobs.front_mut() else { return };
        job.next += count;
        if job.next == job.moves.len() {
            (job.part, job.next) = (job.part + 1, 0);
        }
        if job.part == job.num_parts
            && let Some(Job { mut moves, .. }) = self.jobs.pop_front()
        {
            moves.clear();
            self.spare.push(moves);
        }
    }

    fn outstanding(&self) -> usize {
        self.jobs.iter().map(Job::left).sum()
    }
}

pub(super) struct Stores {
    lane: Lane,
    parts: Arc<Parts>,
    queue: Queue,
    schedule: Schedule,
    /// When the engine was made.
    start: Instant,
}

impl Stores {
    pub fn new(
        kernels: &Arc<Kernels>,
        model: &Arc<LinkModel>,
        coder: Coder,
        parts: Parts,
    ) -> Result<Self> {
        Ok(Self {
            lane: Lane::new(kernels, model, coder, Direction::Offload)?,
            parts: Arc::new(parts),
            queue: Queue::default(),
            schedule: Schedule::new(Pacing::default()),
            start: Instant::now(),
        })
    }

    fn now(&self) -> Nanos {
        self.start.elapsed().as_nanos() as Nanos
    }

    pub fn parts(&self) -> &Arc<Parts> {
        &self.parts
    }

    /// There must be no stores.
    pub fn set_parts(&mut self, parts: Parts) {
        self.parts = Arc::new(parts);
    }

    pub fn set_pacing(&mut self, pacing: Pacing) {
        self.schedule.set_pacing(pacing);
    }

    /// Queues a submission.
    pub fn push(&mut self, moves: impl Iterator<Item = Move>, behind: Behind) {
        self.queue.push(moves, &self.parts, behind);
    }

    /// Starts the chunks that may run now. `loads` says whether loads are in flight.
    pub fn pump(&mut self, urgent: bool, loads: bool, faults: &mut Faults) -> Result<()> {
        let demand = match (urgent, loads) {
            (true, _) => Demand::Urgent,
            (false, true) => Demand::Loads,
            (false, false) => Demand::Idle,
        };
        let chunk_bytes = self.schedule.pacing().chunk_bytes;
        while self.lane.has_room()
            && let Some((count, bytes)) = self.queue.chunk(&self.parts, chunk_bytes)
            && self.schedule.may_start(bytes, demand, self.now())
        {
            let Some(job) = self.queue.jobs.front_mut() else { break };
            if let Some(event) = job.behind.event(job.part, job.num_parts) {
                self.lane.wait(event)?;
            }
            let run = PartRun { parts: job.part..job.part + 1, of: job.num_parts };
            let moves = &mut job.moves[job.next..job.next + count];
            self.lane.start(moves, run, &self.parts, loads, faults)?;
            self.schedule.started(bytes);
            self.queue.advance(count);
        }
        Ok(())
    }

    /// Retires the chunks that have ended.
    pub fn poll(&mut self, ended: &mut Vec<(TransferId, Outcome)>) -> Result<()> {
        while self.lane.oldest_has_ended()? {
            self.retire(ended)?;
        }
        Ok(())
    }

    /// Waits for the oldest chunk in flight, if there is one, and retires it.
    pub fn wait_oldest(&mut self, ended: &mut Vec<(TransferId, Outcome)>) -> Result<()> {
        self.lane.wait_oldest()?;
        if self.lane.is_busy() { self.retire(ended) } else { Ok(()) }
    }

    /// Waits for the chunks in flight; what is queued stays so.
    pub fn drain(&mut self, ended: &mut Vec<(TransferId, Outcome)>) -> Result<()> {
        self.lane.drain(ended)
    }

    fn retire(&mut self, ended: &mut Vec<(TransferId, Outcome)>) -> Result<()> {
        let batch = self.lane.retire(ended)?;
        let now = self.now();
        self.schedule.ended(batch.planned_bytes, (batch.ms * 1e6) as Nanos, now);
        Ok(())
    }

    /// A step of the caller's has ended.
    pub fn step(&mut self, step: StepTime) {
        let now = self.now();
        self.schedule.step(step, !self.queue.jobs.is_empty(), now);
    }

    /// Whether chunks are in flight.
    pub fn is_busy(&self) -> bool {
        self.lane.is_busy()
    }

    pub fn outstanding(&self) -> usize {
        self.queue.outstanding() + self.lane.outstanding()
    }

    pub fn share(&self) -> f64 {
        self.schedule.share()
    }

    pub fn stats(&self) -> LaneStats {
        self.lane.stats()
    }
}
