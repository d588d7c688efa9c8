//! The storage tier of an engine: a [`BlockStore`], and worker threads that move blocks between it and the
//! host arena.
//!
//! Transfers wait in one bounded queue; whichever worker is free takes the next. Workers touch the arena only
//! in the slot of their transfer, which the manager reserves for it until the engine has reported its end.

mod file;
mod form;
#[cfg(test)]
mod model;
mod queue;

pub use file::{FileStore, FileStoreConfig, SyncPolicy};

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use self::queue::Queue;
use super::OP;
use super::fault::FaultKind;
use super::lane::LaneStats;
use crate::error::{Error, ErrorKind, Result};
use crate::manager::{BlockHash, Outcome, StorageSlot, StoredBlock, TransferId};

/// What threads share.
mod sync {
    pub use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
    pub use std::thread;
}

/// Transfers that wait for a worker at most; submitting more blocks until one is taken.
const QUEUE: usize = 1024;

/// The key of a cached block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockKey {
    /// Layer group.
    pub group: u32,
    /// Hash of the block and of all before it.
    pub hash: BlockHash,
}

/// How stored bytes are made wrong by [`BlockStore::damage`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Damage {
    /// One byte of the payload differs.
    Corrupt,
    /// The end is missing.
    Short,
}

/// Block-sized slots that outlive the process. Called by several threads at once, never for the same slot.
pub trait BlockStore: Send + Sync {
    /// Slots within the byte budget.
    fn num_slots(&self) -> u32;

    /// What it held when it was opened, the oldest first.
    fn stored(&self) -> &[StoredBlock];

    /// Puts a block, as the host slot has it, in the place of whatever the slot held. After an error the slot holds
    /// nothing.
    fn write(&self, slot: StorageSlot, key: BlockKey, payload: &[u8]) -> Result<()>;

    /// Reads a block into a host slot, to the bit as it was there, and verifies that it is the one of this key, and
    /// whole. After an error the slot holds
    /// nothing, and `payload` anything.
    ///
    /// # Errors
    /// `Corrupt` for what does not verify; `Io`.
    fn read(&self, slot: StorageSlot, key: BlockKey, payload: &mut [u8]) -> Result<()>;

    /// Drops everything. No transfer may be outstanding.
    fn clear(&self) -> Result<()>;

    /// Makes what a slot holds wrong, so that the next read finds it so: for tests of what stands on it.
    fn damage(&self, slot: StorageSlot, damage: Damage) -> Result<()>;
}

/// Where the bytes of a transfer are on the host.
struct Memory(*mut u8, usize);

// SAFETY: the memory is a slot of the arena, which outlives the workers, and of all threads only the worker
// that holds this uses it.
unsafe impl Send for Memory {}

struct Job {
    id: TransferId,
    slot: StorageSlot,
    key: BlockKey,
    /// The host slot.
    memory: Memory,
    /// To storage, else from it.
    persists: bool,
    fault: Option<FaultKind>,
}

impl Job {
    /// Does the transfer, and what its fault says.
    fn run(self, store: &dyn BlockStore) -> Result<()> {
        let Self { slot, key, memory: Memory(start, bytes), .. } = self;
        let damage = match self.fault {
            Some(FaultKind::Fail) => {
                return Err(Error::new("storage", ErrorKind::Corrupt("injected".into())));
            }
            Some(FaultKind::Skip) => return Ok(()),
            Some(FaultKind::Corrupt) => Some(Damage::Corrupt),
            Some(FaultKind::Short) => Some(Damage::Short),
            Some(
                FaultKind::Delay { .. }
                | FaultKind::Late { .. }
                | FaultKind::Unordered
                | FaultKind::Driver,
            )
            | None => None,
        };
        if self.persists {
            // SAFETY: a whole slot of the arena. Its offload has ended, and no transfer writes it until
            // this one is reported as ended.
            let payload = unsafe { std::slice::from_raw_parts(start, bytes) };
            store.write(slot, key, payload)?;
            damage.map_or(Ok(()), |damage| store.damage(slot, damage))
        } else {
            if let Some(damage) = damage {
                store.damage(slot, damage)?;
            }
            // SAFETY: a whole slot of the arena, which is this transfer's alone until it is reported as
            // ended.
            let payload = unsafe { std::slice::from_raw_parts_mut(start, bytes) };
            store.read(slot, key, payload)
        }
    }
}

struct Ended {
    id: TransferId,
    outcome: Outcome,
    persists: bool,
    bytes: u64,
    milliseconds: f64,
}

/// Does a transfer. A store that panics has failed it: nobody waits for ever.
fn end(job: Job, store: &dyn BlockStore) -> Ended {
    let (id, persists, bytes) = (job.id, job.persists, job.memory.1 as u64);
    let start = Instant::now();
    let outcome = match catch_unwind(AssertUnwindSafe(|| job.run(store))) {
        Ok(Ok(())) => Outcome::Succeeded,
        Ok(Err(error)) => {
            tracing::warn!(%error, "storage transfer failed");
            Outcome::Failed
        }
        Err(_) => {
            tracing::error!("the store panicked: the transfer has failed");
            Outcome::Failed
        }
    };
    let milliseconds = start.elapsed().as_secs_f64() * 1e3;
    Ended { id, outcome, persists, bytes, milliseconds }
}

/// The store and its workers.
pub(super) struct Storage {
    store: Arc<dyn BlockStore>,
    queue: Queue<Job, Ended>,
    persist: LaneStats,
    fetch: LaneStats,
}

/// A transfer to start.
pub(super) struct Start {
    pub id: TransferId,
    pub slot: StorageSlot,
    pub key: BlockKey,
    /// Address of the host slot.
    pub address: u64,
    pub bytes: usize,
    pub persists: bool,
    pub fault: Option<FaultKind>,
}

impl Storage {
    pub fn new(store: Arc<dyn BlockStore>, threads: usize) -> Result<Self> {
        let work = {
            let store = store.clone();
            move |job: Job| end(job, &*store)
        };
        let queue = Queue::new(threads, QUEUE, work).map_err(|source| {
            Error::new(OP, ErrorKind::Io { path: "storage thread".into(), source })
        })?;
        Ok(Self { store, queue, persist: LaneStats::default(), fetch: LaneStats::default() })
    }

    pub fn store(&self) -> &dyn BlockStore {
        &*self.store
    }

    /// Puts a transfer in the queue. Blocks while it is full.
    ///
    /// # Safety
    /// The bytes at `address` are live until the storage is dropped, and nobody else's until the transfer is
    /// reported as ended.
    pub unsafe fn start(&mut self, start: Start) -> Result<()> {
        let Start { id, slot, key, address, bytes, persists, fault } = start;
        let memory = Memory(address as *mut u8, bytes);
        let job = Job { id, slot, key, memory, persists, fault };
        match self.queue.start(job) {
            true => Ok(()),
            false => Err(Error::invalid(OP, "the storage workers have ended")),
        }
    }

    /// Appends the transfers that have ended.
    pub fn poll(&mut self, ended: &mut Vec<(TransferId, Outcome)>) {
        while let Some(report) = self.queue.poll() {
            self.note(report, ended);
        }
    }

    /// Waits for all transfers.
    pub fn drain(&mut self, ended: &mut Vec<(TransferId, Outcome)>) {
        while let Some(report) = self.queue.wait() {
            self.note(report, ended);
        }
    }

    fn note(&mut self, report: Ended, ended: &mut Vec<(TransferId, Outcome)>) {
        let stats = if report.persists { &mut self.persist } else { &mut self.fetch };
        stats.busy_ms += report.milliseconds;
        if report.outcome == Outcome::Succeeded {
            stats.transfers += 1;
            stats.bytes += report.bytes;
        }
        ended.push((report.id, report.outcome));
    }

    pub fn outstanding(&self) -> usize {
        self.queue.outstanding()
    }

    /// To storage and from it. Busy time is of the workers, summed.
    pub fn stats(&self) -> (LaneStats, LaneStats) {
        (self.persist, self.fetch)
    }
}
