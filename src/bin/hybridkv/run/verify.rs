//! Verification beside the run. A *probe* is a copy of a block or an output row into pinned memory, made in stream
//! order on the compute stream. Once the event behind it is complete, a worker thread compares it with what the
//! oracle says it must be.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use hybridkv::device::{Device, Event, PinnedBuffer, Span, StreamRef};
use hybridkv::error::{Error, ErrorKind, Result};
use hybridkv::manager::SeqId;
use serde::Serialize;

use super::oracle::{ExpectedBlock, ExpectedRow, Occasion, Oracle};

/// Block probes in flight.
const BLOCK_PROBES: usize = 128;
/// Row probes in flight.
const ROW_PROBES: usize = 4096;
/// Mismatches that are kept.
const MISMATCHES: usize = 8;
/// Row probes of sequences on trial, at most: they wait for the end of the trial.
const TRIAL_PROBES: usize = ROW_PROBES / 4;

/// What was checked and what was wrong.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Tally {
    /// Blocks compared, by [`Occasion`].
    pub hit_blocks: u64,
    pub onboarded_blocks: u64,
    pub turn_end_blocks: u64,
    pub host_slots: u64,
    pub wrong_blocks: u64,
    pub rows: u64,
    pub wrong_rows: u64,
    /// Largest relative 2-norm error of a row.
    pub worst_row_error: f64,
    /// The first few, in words.
    pub mismatches: Vec<String>,
}

impl Tally {
    /// Blocks compared.
    pub fn blocks(&self) -> u64 {
        self.hit_blocks + self.onboarded_blocks + self.turn_end_blocks + self.host_slots
    }

    /// Whether nothing was wrong.
    pub fn passed(&self) -> bool {
        self.wrong_blocks == 0 && self.wrong_rows == 0
    }

    fn complain(&mut self, message: String) {
        if self.mismatches.len() < MISMATCHES {
            self.mismatches.push(message);
        }
    }
}

/// Equal entries of pinned memory, free or in use by a probe.
struct Entries {
    buffer: Arc<PinnedBuffer>,
    entry_bytes: usize,
    free: Arc<Mutex<Vec<usize>>>,
}

/// A filled (or still filling) entry; gives itself back when dropped.
struct Entry {
    buffer: Arc<PinnedBuffer>,
    start: usize,
    bytes: usize,
    free: Arc<Mutex<Vec<usize>>>,
}

impl Entries {
    fn new(device: &Device, entry_bytes: usize, count: usize) -> Result<Self> {
        Ok(Self {
            buffer: Arc::new(device.alloc_pinned(entry_bytes * count)?),
            entry_bytes,
            free: Arc::new(Mutex::new((0..count).map(|i| i * entry_bytes).collect())),
        })
    }

    fn take(&self) -> Option<Entry> {
        let start = lock(&self.free).pop()?;
        let (buffer, free) = (self.buffer.clone(), self.free.clone());
        Some(Entry { buffer, start, bytes: self.entry_bytes, free })
    }
}

impl Entry {
    fn address(&self) -> u64 {
        self.buffer.address() + self.start as u64
    }

    fn data(&self) -> &[u8] {
        &self.buffer.as_slice()[self.start..self.start + self.bytes]
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        lock(&self.free).push(self.start);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

enum Job {
    Block(Entry, ExpectedBlock),
    /// A block that was copied out of host memory already.
    Bytes(Vec<u8>, ExpectedBlock),
    Row(Entry, ExpectedRow),
}

/// Probes whose copies stand before the same event.
struct Fenced {
    event: Event,
    jobs: Vec<Job>,
}

/// The rows of a sequence whose steps run behind its loads: void if one of these fails.
#[derive(Default)]
struct Trial {
    probes: usize,
    /// Those that have been copied.
    held: Vec<Job>,
}

/// Makes probes and has them checked by worker threads.
pub struct Verifier {
    blocks: Entries,
    rows: Entries,
    /// Probes since the last fence.
    pending: Vec<Job>,
    /// Fences that the compute stream has not been seen to pass, oldest first.
    fenced: VecDeque<Fenced>,
    /// Fences to use again.
    spare: Vec<Fenced>,
    trials: HashMap<SeqId, Trial>,
    /// Sequences whose rows count for nothing; names are never used again.
    void: HashSet<SeqId>,
    jobs: Option<SyncSender<Job>>,
    workers: Vec<JoinHandle<()>>,
    tally: Arc<Mutex<Tally>>,
}

impl Verifier {
    /// A verifier with one worker per processor.
    pub fn new(device: &Device, oracle: Arc<Oracle>) -> Result<Self> {
        let row_bytes = oracle
            .spec
            .layers
            .iter()
            .map(|layer| layer.shape.head_dim as usize * 2)
            .max()
            .unwrap_or(0);
        let blocks = Entries::new(device, oracle.plan.block_bytes, BLOCK_PROBES)?;
        let rows = Entries::new(device, row_bytes, ROW_PROBES)?;
        let tally = Arc::new(Mutex::new(Tally::default()));
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        let (jobs, queue) = sync_channel(2 * (BLOCK_PROBES + ROW_PROBES));
        let queue = Arc::new(Mutex::new(queue));
        let workers = (0..threads)
            .map(|_| {
                let (oracle, queue, tally) = (oracle.clone(), queue.clone(), tally.clone());
                std::thread::Builder::new()
                    .name("verify".into())
                    .spawn(move || work(&oracle, &queue, &tally))
                    .map_err(|source| {
                        let path = "verification thread".into();
                        Error::new("verify", ErrorKind::Io { path, source })
                    })
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            blocks,
            rows,
            pending: Vec::new(),
            fenced: VecDeque::new(),
            spare: Vec::new(),
            trials: HashMap::new(),
            void: HashSet::new(),
            jobs: Some(jobs),
            workers,
            tally,
        })
    }

    /// Reads a block of the device pool, in the order of `compute`.
    pub fn probe_block(
        &mut self,
        block: Span,
        expected: ExpectedBlock,
        compute: StreamRef<'_>,
    ) -> Result<()> {
        let is_block = |job: &Job| matches!(job, Job::Block(..));
        let entry = loop {
            match self.blocks.take() {
                Some(entry) => break entry,
                None => self.make_room(is_block, BLOCK_PROBES, compute)?,
            }
        };
        // SAFETY: the entry is this probe's alone until its event is complete; the block is memory of the
        // pool, written only in stream order or behind a fence on `compute`.
        unsafe { compute.copy(block.address, entry.address(), entry.bytes)? };
        self.pending.push(Job::Block(entry, expected));
        Ok(())
    }

    /// Reads an output row (its first bytes from `address` on), in the order of `compute`.
    pub fn probe_row(
        &mut self,
        address: u64,
        bytes: usize,
        expected: ExpectedRow,
        compute: StreamRef<'_>,
    ) -> Result<()> {
        let on_trial: usize = self.trials.values().map(|trial| trial.probes).sum();
        if let Some(trial) = self.trials.get_mut(&expected.seq) {
            if on_trial >= TRIAL_PROBES {
                return Ok(());
            }
            trial.probes += 1;
        }
        let is_row = |job: &Job| matches!(job, Job::Row(..));
        let entry = loop {
            match self.rows.take() {
                Some(entry) => break entry,
                None => self.make_room(is_row, ROW_PROBES, compute)?,
            }
        };
        // SAFETY: the entry is this probe's alone until its event is complete; the output buffer is
        // written in the order of `compute` only.
        unsafe { compute.copy(address, entry.address(), bytes.min(entry.bytes))? };
        self.pending.push(Job::Row(entry, expected));
        Ok(())
    }

    /// Checks bytes that the host holds already.
    pub fn check_bytes(&self, data: &[u8], expected: ExpectedBlock) {
        self.send(Job::Bytes(data.to_vec(), expected));
    }

    /// From now on the rows of a sequence are held back.
    pub fn begin_trial(&mut self, seq: SeqId) {
        self.trials.insert(seq, Trial::default());
    }

    /// The rows of a sequence are to be checked after all, or never.
    pub fn end_trial(&mut self, seq: SeqId, valid: bool) {
        let held = self.trials.remove(&seq).unwrap_or_default().held;
        match valid {
            true => held.into_iter().for_each(|job| self.send(job)),
            false => drop(self.void.insert(seq)),
        }
    }

    /// Has a probe checked whose copy has ended, if it counts, once that is known.
    fn check(&mut self, job: Job) {
        if let Job::Row(_, expected) = &job {
            if self.void.contains(&expected.seq) {
                return;
            }
            if let Some(trial) = self.trials.get_mut(&expected.seq) {
                trial.held.push(job);
                return;
            }
        }
        self.send(job);
    }

    /// Puts a fence behind the probes so far, and checks those whose fence the compute stream has passed.
    pub fn fence(&mut self, compute: StreamRef<'_>) -> Result<()> {
        if !self.pending.is_empty() {
            let mut fenced = match self.spare.pop() {
                Some(fenced) => fenced,
                None => Fenced { event: compute.device().event()?, jobs: Vec::new() },
            };
            std::mem::swap(&mut fenced.jobs, &mut self.pending);
            compute.record(&fenced.event)?;
            self.fenced.push_back(fenced);
        }
        while let Some(fenced) = self.fenced.front()
            && fenced.event.is_complete()?
        {
            self.check_oldest();
        }
        Ok(())
    }

    /// Hands the probes of the oldest fence, which has been passed, to the workers.
    fn check_oldest(&mut self) {
        if let Some(mut fenced) = self.fenced.pop_front() {
            for job in fenced.jobs.drain(..) {
                self.check(job);
            }
            self.spare.push(fenced);
        }
    }

    fn send(&self, job: Job) {
        if let Some(jobs) = &self.jobs {
            // The workers hold the other end until `finish`.
            let _ = jobs.send(job);
        }
    }

    /// All `entries` of the probes of a kind are taken: waits for the workers, or, when they have none of them, for
    /// the copies. So the order of the device's work does not depend on how fast the workers are.
    fn make_room(
        &mut self,
        is_of_kind: fn(&Job) -> bool,
        entries: usize,
        compute: StreamRef<'_>,
    ) -> Result<()> {
        let fenced = self.fenced.iter().flat_map(|fenced| &fenced.jobs);
        let held = self.trials.values().flat_map(|trial| &trial.held);
        let with_us = self.pending.iter().chain(fenced).chain(held);
        if with_us.filter(|&job| is_of_kind(job)).count() == entries {
            return self.flush(compute);
        }
        std::thread::sleep(Duration::from_micros(50));
        Ok(())
    }

    /// Waits for the copies of all probes and hands them to the workers.
    fn flush(&mut self, compute: StreamRef<'_>) -> Result<()> {
        if self.pending.is_empty() && self.fenced.is_empty() {
            return Ok(());
        }
        compute.synchronize()?;
        while !self.fenced.is_empty() {
            self.check_oldest();
        }
        for job in std::mem::take(&mut self.pending) {
            self.check(job);
        }
        Ok(())
    }

    /// What was found so far.
    pub fn tally(&self) -> Tally {
        lock(&self.tally).clone()
    }

    /// Checks what is pending, ends the workers and says what was found.
    pub fn finish(mut self, compute: StreamRef<'_>) -> Result<Tally> {
        self.flush(compute)?;
        self.jobs = None;
        for worker in self.workers.drain(..) {
            if worker.join().is_err() {
                return Err(Error::new(
                    "verify",
                    ErrorKind::Corrupt("a verification thread panicked".into()),
                ));
            }
        }
        Ok(self.tally())
    }
}

/// A worker: checks jobs until the queue closes.
fn work(oracle: &Oracle, queue: &Mutex<Receiver<Job>>, tally: &Mutex<Tally>) {
    loop {
        let job = lock(queue).recv();
        match job {
            Err(_) => return,
            Ok(Job::Block(entry, expected)) => check_block(oracle, entry.data(), &expected, tally),
            Ok(Job::Bytes(data, expected)) => check_block(oracle, &data, &expected, tally),
            Ok(Job::Row(entry, expected)) => {
                let error = oracle.row_error(entry.data(), &expected);
                let mut tally = lock(tally);
                tally.rows += 1;
                tally.worst_row_error = tally.worst_row_error.max(error);
                let right = error <= oracle.content.elements().row_tolerance();
                if !right {
                    tally.wrong_rows += 1;
                    tally.complain(format!(
                        "attention output of layer {}, position {}, query head {}: relative error {error:.2e}",
                        expected.layer, expected.position, expected.qo_head
                    ));
                }
            }
        }
    }
}

fn check_block(oracle: &Oracle, data: &[u8], expected: &ExpectedBlock, tally: &Mutex<Tally>) {
    let result = oracle.check_block(data, expected);
    let mut tally = lock(tally);
    match expected.occasion {
        Occasion::Hit => tally.hit_blocks += 1,
        Occasion::Onboarded => tally.onboarded_blocks += 1,
        Occasion::TurnEnd => tally.turn_end_blocks += 1,
        Occasion::HostSlot => tally.host_slots += 1,
    }
    if let Err(difference) = result {
        tally.wrong_blocks += 1;
        tally.complain(format!("{:?} block: {difference}", expected.occasion));
    }
}
