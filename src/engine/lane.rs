//! One direction of transfers: a stream, and a ring of batches whose descriptors lie in pinned memory.
//!
//! A batch moves the blocks of its transfers part by part (see parts.rs), one launch and one event each, so that
//! whoever needs a layer of them waits for its part alone. Stores start a batch per chunk of one part.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use crate::abi::hkv_copy;
use crate::device::{Device, Event, PinnedBuffer, Span, Stream, StreamRef};
use crate::error::{Error, Result};
use crate::manager::{BlockId, Direction, Outcome, SeqId, TransferId};
use crate::movement::{LinkModel, Mover, Traffic, Way};
use crate::ops::{Kernels, MoveShape};

use super::coder::{Coder, Rows};
use super::fault::{FaultKind, Faults};
use super::parts::Parts;

/// Batches in flight per lane.
const BATCHES: usize = 32;
/// Descriptors that a batch has room for at first.
const DESCRIPTORS: usize = 1024;
/// Bytes that an injected corruption overwrites.
const CORRUPTED_BYTES: usize = 16;

/// What a lane has moved, by CUDA events.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LaneStats {
    /// Transfers that succeeded.
    pub transfers: u64,
    /// Bytes they moved.
    pub bytes: u64,
    /// Bytes of their blocks: more than they moved where codecs write the slots.
    pub block_bytes: u64,
    /// Transfers whose block no slot of its codec can hold.
    pub unfit: u64,
    /// Transfers whose slot no longer held what was written to it.
    pub corrupt: u64,
    /// Milliseconds between the start and the end of their batches, summed.
    pub busy_ms: f64,
}

impl LaneStats {
    /// Gigabytes (1e9 bytes) per second while busy; 0 when nothing was moved.
    pub fn gbps(&self) -> f64 {
        if self.busy_ms == 0.0 { 0.0 } else { self.bytes as f64 / self.busy_ms / 1e6 }
    }

    /// The same of the blocks: what a lane that moves them as they are would have to reach.
    pub fn effective_gbps(&self) -> f64 {
        if self.busy_ms == 0.0 { 0.0 } else { self.block_bytes as f64 / self.busy_ms / 1e6 }
    }
}

/// One transfer with its addresses.
pub(super) struct Move {
    pub id: TransferId,
    pub group: u32,
    /// The sequence that waits for it.
    pub seq: Option<SeqId>,
    pub block: BlockId,
    /// Addresses of both ends, and of the one that is the slot.
    pub src: u64,
    pub dst: u64,
    pub slot: u64,
    /// Bytes to move: of the block, or of the slot that a codec writes; and bytes of the target.
    pub bytes: u64,
    pub dst_bytes: u64,
    pub fate: Fate,
}

/// What becomes of a transfer.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Fate {
    failed: bool,
    corrupted: bool,
}

/// Which parts of its moves a batch moves, of how many.
pub(super) struct PartRun {
    pub parts: Range<usize>,
    pub of: usize,
}

/// A batch that has ended.
pub(super) struct Retired {
    /// Bytes of its parts, moved or not.
    pub planned_bytes: u64,
    /// Milliseconds from its start to its end.
    pub ms: f64,
}

/// Names a batch of loads: see [`Engine::last_load`](super::Engine::last_load).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct LoadMark(u64);

/// Transfers that were launched together.
struct Batch {
    /// Timed, around the copies.
    start: Event,
    end: Event,
    /// Behind all parts but the last, whose end is that of the batch; grows to the most parts seen.
    parts: Vec<Event>,
    /// Parts that it came in.
    num_parts: usize,
    transfers: Vec<(TransferId, Outcome)>,
    /// Sequences that wait for it.
    seqs: Vec<SeqId>,
    /// Moved, of blocks, and planned: faults move less.
    bytes: u64,
    block_bytes: u64,
    planned_bytes: u64,
    /// Read by the device while the batch is in flight; grows to the largest batch seen.
    descriptors: PinnedBuffer,
    /// What it has grown out of: to free it would be to wait for the device.
    outgrown: Vec<PinnedBuffer>,
    /// Of what codecs move.
    rows: Rows,
}

pub(super) struct Lane {
    direction: Direction,
    stream: Stream,
    mover: Mover,
    coder: Coder,
    ring: Vec<Batch>,
    /// Index of the oldest batch in flight.
    head: usize,
    in_flight: usize,
    /// Batches that have been retired: the name of the oldest one in flight.
    retired: u64,
    /// The last batch with a load of each sequence, while it is in flight.
    last: HashMap<SeqId, u64>,
    /// Transfers that a batch which has ended has spoilt, and a later one ends.
    spoilt: HashMap<TransferId, Outcome>,
    /// Of the batch that is being started.
    moves: Vec<Move>,
    /// Whether copies may be under way of which nothing says when they have ended.
    poisoned: bool,
    stats: LaneStats,
}

impl Lane {
    pub fn new(
        kernels: &Arc<Kernels>,
        model: &Arc<LinkModel>,
        coder: Coder,
        direction: Direction,
    ) -> Result<Self> {
        let device = kernels.device();
        let batch = || -> Result<Batch> {
            Ok(Batch {
                start: device.timed_event()?,
                end: device.timed_event()?,
                parts: Vec::new(),
                num_parts: 1,
                transfers: Vec::with_capacity(DESCRIPTORS),
                seqs: Vec::new(),
                bytes: 0,
                block_bytes: 0,
                planned_bytes: 0,
                rows: Rows::new(device)?,
                descriptors: device.alloc_pinned(DESCRIPTORS * size_of::<hkv_copy>())?,
                outgrown: Vec::new(),
            })
        };
        Ok(Self {
            direction,
            stream: device.stream()?,
            mover: Mover::new(kernels, model, DESCRIPTORS),
            coder,
            ring: (0..BATCHES).map(|_| batch()).collect::<Result<_>>()?,
            head: 0,
            in_flight: 0,
            retired: 0,
            last: HashMap::new(),
            spoilt: HashMap::new(),
            moves: Vec::new(),
            poisoned: false,
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

    /// Whether the ring takes one more batch.
    pub fn has_room(&self) -> bool {
        self.in_flight < BATCHES
    }

    /// Waits for the oldest batch when the ring is full.
    pub fn make_room(&mut self, ended: &mut Vec<(TransferId, Outcome)>) -> Result<()> {
        if !self.has_room() {
            self.wait_oldest()?;
            self.retire(ended)?;
        }
        Ok(())
    }

    /// The last batch in flight with a load of one of these sequences.
    pub fn last_load(&self, seqs: impl IntoIterator<Item = SeqId>) -> Option<LoadMark> {
        seqs.into_iter().filter_map(|seq| self.last.get(&seq)).max().map(|&batch| LoadMark(batch))
    }

    /// Makes later work of `compute` wait for the part with this layer of a batch, and of all before it.
    pub fn make_wait_for_layer(
        &self,
        mark: LoadMark,
        layer: u32,
        parts: &Parts,
        compute: StreamRef<'_>,
    ) -> Result<()> {
        let Some(ahead) = mark.0.checked_sub(self.retired) else { return Ok(()) };
        if ahead >= self.in_flight as u64 {
            return Ok(());
        }
        let batch = &self.ring[(self.head + ahead as usize) % BATCHES];
        let part = if batch.num_parts == 1 { 0 } else { parts.of_layer(layer) };
        let last = part + 1 == batch.num_parts;
        compute.wait(if last { &batch.end } else { &batch.parts[part] })
    }

    /// Launches the next batch with as many of `moves` as it takes, all parts of them, and says how many. The ring
    /// must have room.
    ///
    /// # Errors
    /// As for [`Self::start`].
    pub fn start_whole(
        &mut self,
        moves: impl Iterator<Item = Move>,
        parts: &Parts,
        both_ways: bool,
        faults: &mut Faults,
    ) -> Result<usize> {
        let mut batch = std::mem::take(&mut self.moves);
        batch.clear();
        batch.extend(moves.take(parts.batch()));
        let of = parts.count(batch.iter().map(|m| m.bytes).sum());
        let started =
            self.start(&mut batch, PartRun { parts: 0..of, of }, parts, both_ways, faults);
        let count = batch.len();
        self.moves = batch;
        started.map(|()| count)
    }

    /// Launches the next batch: some parts of some moves. Transfers end with the batch of their last part. The
    /// ring must have room.
    ///
    /// # Errors
    /// Those of the driver. What had been launched of the batch has ended then, so that its memory can be used again:
    /// nothing else could say when. Of a lane that [is poisoned](Self::is_poisoned) not even that is known.
    pub fn start(
        &mut self,
        moves: &mut [Move],
        run: PartRun,
        parts: &Parts,
        both_ways: bool,
        faults: &mut Faults,
    ) -> Result<()> {
        if self.poisoned {
            let message = "a driver error left copies under way; their memory must not be used: make \
                           another engine";
            return Err(Error::invalid("engine", message));
        }
        let launched = self.launch(moves, run, parts, both_ways, faults);
        if launched.is_err() {
            self.poisoned = self.stream.as_ref().synchronize().is_err();
        }
        launched
    }

    /// Whether copies may be under way that belong to no batch: the driver failed, and failed to wait for them.
    pub fn is_poisoned(&self) -> bool {
        self.poisoned
    }

    fn launch(
        &mut self,
        moves: &mut [Move],
        run: PartRun,
        parts: &Parts,
        both_ways: bool,
        faults: &mut Faults,
    ) -> Result<()> {
        let name = self.retired + self.in_flight as u64;
        let at = (self.head + self.in_flight) % BATCHES;
        let Self { direction, stream, mover, coder, ring, last, .. } = self;
        let way = match *direction {
            Direction::Offload => Way::DeviceToHost,
            _ => Way::HostToDevice,
        };
        let traffic = Traffic { way, both_ways };
        let (stream, batch) = (stream.as_ref(), &mut ring[at]);
        let rows = moves.iter().map(|m| coder.rows(m.group)).sum();
        batch.reserve(moves.len() * run.parts.len(), rows, run.parts.len(), stream.device())?;

        stream.record(&batch.start)?;
        if run.parts.start == 0 {
            for m in moves.iter_mut() {
                m.suffer(faults.take(*direction, m.id), stream)?;
            }
        }
        let first = batch.descriptors.address() as usize;
        let mut end = 0;
        for part in run.parts.clone() {
            let start = end;
            for Move { group, src, dst, bytes, .. } in moves.iter() {
                let range = parts.range(*group, part, run.of);
                batch.planned_bytes += range.end - range.start;
                let bytes = range.end.min(*bytes).saturating_sub(range.start);
                if bytes == 0 || coder.moves(*group) {
                    continue;
                }
                batch.bytes += bytes;
                batch.block_bytes += bytes;
                let (src, dst) = (src + range.start, dst + range.start);
                let copy = hkv_copy { src: src as *const _, dst: dst as *mut _, bytes };
                // SAFETY: entry `end` of this batch's descriptors, which have room for every part of every
                // move, and which no launch reads: the batch that used them before has ended.
                unsafe { (first as *mut hkv_copy).add(end).write(copy) };
                end += 1;
            }
            let entry = size_of::<hkv_copy>();
            let copies = Span::new((first + start * entry) as u64, ((end - start) * entry) as u64);
            let (num_copies, shape) = (end - start, &MoveShape::FRAGMENTS);
            // SAFETY: nobody else uses the descriptors until the batch has ended. Every source and target is
            // inside of a block or slot in the engine's memory, ordered behind the compute stream, and
            // reserved by the manager until the transfer is reported as ended; parts do not overlap.
            unsafe { mover.submit(copies, num_copies, shape, traffic, stream)? };
            // SAFETY: as above, of the batch's rows; each move has room for one per section.
            let coded =
                unsafe { coder.submit(&mut batch.rows, moves, parts, (part, run.of), stream)? };
            batch.bytes += coded.slot_bytes;
            batch.block_bytes += coded.block_bytes;
            if part == run.parts.start {
                faults.driver_call(*direction)?;
            }
            if part + 1 < run.parts.end {
                stream.record(&batch.parts[part - run.parts.start])?;
            }
        }
        let ends = run.parts.end == run.of;
        for Move { dst, .. } in moves.iter().filter(|m| ends && m.fate.corrupted) {
            // SAFETY: the first bytes of a target of this batch, as above.
            unsafe { stream.fill(*dst, 0x5A, CORRUPTED_BYTES)? };
        }
        stream.record(&batch.end)?;
        for Move { id, seq, fate, .. } in moves.iter().filter(|_| ends) {
            let outcome = if fate.failed { Outcome::Failed } else { Outcome::Succeeded };
            batch.transfers.push((*id, outcome));
            if let Some(seq) = *seq
                && last.insert(seq, name) != Some(name)
            {
                batch.seqs.push(seq);
            }
        }
        self.in_flight += 1;
        Ok(())
    }

    /// Whether the oldest batch, if there is one, has ended.
    pub fn oldest_has_ended(&self) -> Result<bool> {
        Ok(self.in_flight > 0 && self.ring[self.head].end.is_complete()?)
    }

    /// Waits for the oldest batch, if there is one.
    pub fn wait_oldest(&self) -> Result<()> {
        if self.in_flight > 0 { self.ring[self.head].end.synchronize() } else { Ok(()) }
    }

    /// Retires the batches that have ended.
    pub fn poll(&mut self, ended: &mut Vec<(TransferId, Outcome)>) -> Result<()> {
        while self.oldest_has_ended()? {
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
    pub fn retire(&mut self, ended: &mut Vec<(TransferId, Outcome)>) -> Result<Retired> {
        let batch = &self.ring[self.head];
        let ms = f64::from(batch.end.elapsed_ms_since(&batch.start)?);
        self.stats.busy_ms += ms;
        self.stats.bytes += batch.bytes;
        self.stats.block_bytes += batch.block_bytes;
        for (id, outcome) in batch.rows.spoilt() {
            self.spoilt
                .entry(id)
                .and_modify(|worst| *worst = outcome.max(*worst))
                .or_insert(outcome);
        }
        for &(id, outcome) in &batch.transfers {
            let spoilt = self.spoilt.remove(&id);
            match spoilt {
                Some(Outcome::Unfit) => self.stats.unfit += 1,
                Some(_) => self.stats.corrupt += 1,
                None => {}
            }
            let outcome = spoilt.map_or(outcome, |spoilt| spoilt.max(outcome));
            self.stats.transfers += u64::from(outcome == Outcome::Succeeded);
            ended.push((id, outcome));
        }
        for seq in &batch.seqs {
            if self.last.get(seq) == Some(&self.retired) {
                self.last.remove(seq);
            }
        }
        let planned_bytes = batch.planned_bytes;
        self.retired += 1;
        self.head = (self.head + 1) % BATCHES;
        self.in_flight -= 1;
        Ok(Retired { planned_bytes, ms })
    }

    pub fn is_busy(&self) -> bool {
        self.in_flight > 0
    }

    pub fn outstanding(&self) -> usize {
        (0..self.in_flight).map(|i| self.ring[(self.head + i) % BATCHES].transfers.len()).sum()
    }

    pub fn stats(&self) -> LaneStats {
        self.stats
    }
}

impl Move {
    /// Takes an injected fault, before the first part moves.
    fn suffer(&mut self, fault: Option<FaultKind>, stream: StreamRef<'_>) -> Result<()> {
        match fault {
            Some(FaultKind::Skip) => self.bytes = 0,
            Some(FaultKind::Fail) => {
                // SAFETY: `dst` is a whole block or slot of the engine, which the manager reserves for this
                // transfer until it is reported as ended.
                unsafe { stream.fill(self.dst, 0xFF, self.dst_bytes as usize)? };
                (self.bytes, self.fate.failed) = (0, true);
            }
            Some(FaultKind::Corrupt) => self.fate.corrupted = true,
            Some(FaultKind::Short) => {
                (self.bytes, self.fate.failed) = (self.bytes / 32 * 16, true);
            }
            Some(FaultKind::Late { fills }) => {
                for _ in 0..fills {
                    // SAFETY: as above.
                    unsafe { stream.fill(self.dst, 0xFF, self.dst_bytes as usize)? };
                }
            }
            Some(FaultKind::Delay { .. } | FaultKind::Unordered | FaultKind::Driver) | None => {}
        }
        Ok(())
    }
}

impl Batch {
    /// Makes an ended batch ready for so many copies and rows in so many parts.
    fn reserve(&mut self, copies: usize, rows: usize, parts: usize, device: &Device) -> Result<()> {
        self.rows.reserve(rows, device)?;
        let bytes = copies * size_of::<hkv_copy>();
        if bytes > self.descriptors.len() {
            let larger = device.alloc_pinned(bytes.next_power_of_two())?;
            self.outgrown.push(std::mem::replace(&mut self.descriptors, larger));
        }
        while self.parts.len() + 1 < parts {
            self.parts.push(device.event()?);
        }
        self.transfers.clear();
        self.seqs.clear();
        (self.num_parts, self.bytes, self.block_bytes, self.planned_bytes) = (parts, 0, 0, 0);
        Ok(())
    }
}
