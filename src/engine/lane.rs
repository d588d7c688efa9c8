//! One direction of transfers: a stream, and a ring of batches whose descriptors lie in pinned memory.

use crate::abi::hkv_copy;
use crate::device::{Device, Event, PinnedBuffer, Span, Stream, StreamRef};
use crate::error::Result;
use crate::manager::{Direction, Outcome, TransferId};
use crate::ops::{CtaQuota, Kernels, MoveArgs};

use super::fault::{FaultKind, Faults};

/// Batches in flight per lane.
const BATCHES: usize = 32;
/// Transfers per batch: one launch each.
const BATCH_TRANSFERS: usize = 1024;
/// Bytes that an injected corruption overwrites.
const CORRUPTED_BYTES: usize = 16;

/// What a lane has moved, by CUDA events.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LaneStats {
    /// Transfers that succeeded.
    pub transfers: u64,
    /// Bytes they moved.
    pub bytes: u64,
    /// Milliseconds between the start and the end of their batches, summed.
    pub busy_ms: f64,
}

impl LaneStats {
    /// Gigabytes (1e9 bytes) per second while busy; 0 when nothing was moved.
    pub fn gbps(&self) -> f64 {
        if self.busy_ms == 0.0 { 0.0 } else { self.bytes as f64 / self.busy_ms / 1e6 }
    }
}

/// One transfer with its addresses.
pub(super) struct Move {
    pub id: TransferId,
    pub direction: Direction,
    pub src: u64,
    pub dst: u64,
    pub bytes: u64,
}

/// Transfers that were launched together.
struct Batch {
    /// Timed, around the copies.
    start: Event,
    end: Event,
    transfers: Vec<(TransferId, Outcome)>,
    bytes: u64,
}

pub(super) struct Lane {
    stream: Stream,
    ring: Vec<Batch>,
    /// Index of the oldest batch in flight.
    head: usize,
    in_flight: usize,
    /// `[BATCHES][BATCH_TRANSFERS]` descriptors, read by the device while their batch is in flight.
    descriptors: PinnedBuffer,
    stats: LaneStats,
}

impl Lane {
    pub fn new(device: &Device) -> Result<Self> {
        let batch = || -> Result<Batch> {
            Ok(Batch {
                start: device.timed_event()?,
                end: device.timed_event()?,
                transfers: Vec::with_capacity(BATCH_TRANSFERS),
                bytes: 0,
            })
        };
        Ok(Self {
            stream: device.stream()?,
            ring: (0..BATCHES).map(|_| batch()).collect::<Result<_>>()?,
            head: 0,
            in_flight: 0,
            descriptors: device.alloc_pinned(BATCHES * BATCH_TRANSFERS * size_of::<hkv_copy>())?,
            stats: LaneStats::default(),
        })
    }

    /// Makes later batches wait for an event.
    pub fn wait(&self, event: &Event) -> Result<()> {
        self.stream.as_ref().wait(event)
    }

    /// Makes later work of `compute` wait for the batches submitted so far.
    pub fn make_wait(&self, compute: StreamRef<'_>) -> Result<()> {
        if self.in_flight == 0 {
            return Ok(());
        }
        compute.wait(&self.ring[(self.head + self.in_flight - 1) % BATCHES].end)
    }

    /// Waits for the oldest batch when the ring is full.
    pub fn make_room(&mut self, ended: &mut Vec<(TransferId, Outcome)>) -> Result<()> {
        if self.in_flight == BATCHES {
            self.ring[self.head].end.synchronize()?;
            self.retire(ended)?;
        }
        Ok(())
    }

    /// Launches the next batch with as many of `moves` as it takes. The ring must have room.
    pub fn start(
        &mut self,
        kernels: &Kernels,
        faults: &mut Faults,
        moves: impl Iterator<Item = Move>,
    ) -> Result<()> {
        let at = (self.head + self.in_flight) % BATCHES;
        let first =
            self.descriptors.address() as usize + at * BATCH_TRANSFERS * size_of::<hkv_copy>();
        let stream = self.stream.as_ref();
        let batch = &mut self.ring[at];
        batch.transfers.clear();
        batch.bytes = 0;
        stream.record(&batch.start)?;
        let mut num_copies = 0;
        // Fills go to the stream before the copies (they touch other blocks); corruptions come after.
        let mut corrupted = Vec::new();
        for Move { id, direction, src, dst, bytes } in moves.take(BATCH_TRANSFERS) {
            let fault = faults.take(direction, id);
            let failed = matches!(fault, Some(FaultKind::Fail | FaultKind::Short));
            batch.transfers.push((id, if failed { Outcome::Failed } else { Outcome::Succeeded }));
            match fault {
                Some(FaultKind::Skip) => continue,
                // SAFETY: `dst` is a whole block or slot of the engine, which the manager reserves for
                // this transfer until it is reported as ended.
                Some(FaultKind::Fail) => unsafe {
                    stream.fill(dst, 0xFF, bytes as usize)?;
                    continue;
                },
                Some(FaultKind::Corrupt) => corrupted.push(dst),
                Some(FaultKind::Short | FaultKind::Delay { .. } | FaultKind::Unordered) | None => {}
            }
            let bytes = if fault == Some(FaultKind::Short) { bytes / 32 * 16 } else { bytes };
            let copy = hkv_copy { src: src as *const _, dst: dst as *mut _, bytes };
            // SAFETY: entry `num_copies < BATCH_TRANSFERS` of this batch's part of the descriptors, which
            // no launch reads: the batch that used it before has ended.
            unsafe { (first as *mut hkv_copy).add(num_copies).write(copy) };
            num_copies += 1;
            batch.bytes += bytes;
        }
        let copies = Span::new(first as u64, (num_copies * size_of::<hkv_copy>()) as u64);
        let args = MoveArgs { copies, num_copies: num_copies as u64, quota: CtaQuota::HOST_LINK };
        // SAFETY: the descriptors stay as they are until the batch has ended. Every source and target is
        // a whole block or slot in the engine's memory, ordered behind the compute stream, and reserved by
        // the manager until the transfer is reported as ended.
        unsafe { kernels.move_blocks(&args, stream)? };
        for dst in corrupted {
            // SAFETY: the first bytes of a target of this batch, as above.
            unsafe { stream.fill(dst, 0x5A, CORRUPTED_BYTES)? };
        }
        stream.record(&batch.end)?;
        self.in_flight += 1;
        Ok(())
    }

    /// Retires the batches that have ended.
    pub fn poll(&mut self, ended: &mut Vec<(TransferId, Outcome)>) -> Result<()> {
        while self.in_flight > 0 && self.ring[self.head].end.is_complete()? {
            self.retire(ended)?;
        }
        Ok(())
    }

    /// Waits for all batches and retires them.
    pub fn drain(&mut self, ended: &mut Vec<(TransferId, Outcome)>) -> Result<()> {
        self.stream.as_ref().synchronize()?;
        while self.in_flight > 0 {
            self.retire(ended)?;
        }
        Ok(())
    }

    /// Takes the oldest batch, which has ended, out of the ring.
    fn retire(&mut self, ended: &mut Vec<(TransferId, Outcome)>) -> Result<()> {
        let batch = &self.ring[self.head];
        self.stats.busy_ms += batch.end.elapsed_ms_since(&batch.start)? as f64;
        self.stats.bytes += batch.bytes;
        self.stats.transfers +=
            batch.transfers.iter().filter(|(_, outcome)| *outcome == Outcome::Succeeded).count()
                as u64;
        ended.extend_from_slice(&batch.transfers);
        self.head = (self.head + 1) % BATCHES;
        self.in_flight -= 1;
        Ok(())
    }

    pub fn outstanding(&self) -> usize {
        (0..self.in_flight).map(|i| self.ring[(self.head + i) % BATCHES].transfers.len()).sum()
    }

    pub fn stats(&self) -> LaneStats {
        self.stats
    }
}
