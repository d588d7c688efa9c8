//! Transfers between the tiers, and what their completions change.

use std::collections::hash_map::Entry;
use std::collections::{HashSet, VecDeque};

use super::groups::align_down;
use super::hash::BlockHash;
use super::pool::NULL;
use super::prefix::fixed_point;
use super::storage::Load;
use super::*;
use crate::codec::Codec;

/// Which way a transfer goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Device to host. Starts after the work that wrote the block (already submitted when emitted) and
    /// keeps the block until it completes (R2).
    Offload,
    /// Host to device. Starts after all work submitted so far, which may still read or write the target
    /// (R3); pins slot and block until it completes (R1).
    Onboard,
    /// Host to storage. Pins the slot until it completes.
    Persist,
    /// Storage to host. Pins both slots until it completes (R1).
    Fetch,
}

/// Where a block lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Place {
    /// A block of the device pool.
    Device(BlockId),
    /// A slot of the host tier.
    Host(HostSlot),
    /// A slot of the storage tier.
    Storage(StorageSlot),
}

/// From where to where a transfer goes. The host is the gateway: nothing moves between device and storage
/// at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Path {
    /// See [`Direction::Offload`].
    Offload {
        /// Source.
        from: BlockId,
        /// Target.
        to: HostSlot,
    },
    /// See [`Direction::Onboard`].
    Onboard {
        /// Source.
        from: HostSlot,
        /// Target.
        to: BlockId,
    },
    /// See [`Direction::Persist`].
    Persist {
        /// Source.
        from: HostSlot,
        /// Target.
        to: StorageSlot,
    },
    /// See [`Direction::Fetch`].
    Fetch {
        /// Source.
        from: StorageSlot,
        /// Target.
        to: HostSlot,
    },
}

impl Path {
    /// Which way it goes.
    pub fn direction(&self) -> Direction {
        match self {
            Self::Offload { .. } => Direction::Offload,
            Self::Onboard { .. } => Direction::Onboard,
            Self::Persist { .. } => Direction::Persist,
            Self::Fetch { .. } => Direction::Fetch,
        }
    }

    /// Where the block lies.
    pub fn from(&self) -> Place {
        match *self {
            Self::Offload { from, .. } => Place::Device(from),
            Self::Onboard { from, .. } | Self::Persist { from, .. } => Place::Host(from),
            Self::Fetch { from, .. } => Place::Storage(from),
        }
    }

    /// Where it goes.
    pub fn to(&self) -> Place {
        match *self {
            Self::Onboard { to, .. } => Place::Device(to),
            Self::Offload { to, .. } | Self::Fetch { to, .. } => Place::Host(to),
            Self::Persist { to, .. } => Place::Storage(to),
        }
    }

    /// The host slot at one of its ends.
    pub fn slot(&self) -> HostSlot {
        match *self {
            Self::Offload { to: slot, .. }
            | Self::Onboard { from: slot, .. }
            | Self::Persist { from: slot, .. }
            | Self::Fetch { to: slot, .. } => slot,
        }
    }

    /// The device block at one of its ends, if there is one.
    pub fn block(&self) -> Option<BlockId> {
        match *self {
            Self::Offload { from: block, .. } | Self::Onboard { to: block, .. } => Some(block),
            Self::Persist { .. } | Self::Fetch { .. } => None,
        }
    }
}

/// One block to move. Emitted once; must be answered once by [`Manager::complete`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transfer {
    /// Its name.
    pub id: TransferId,
    /// From where to where.
    pub path: Path,
    /// Layer group of the block.
    pub group: u32,
    /// With the group, the key of the block.
    pub hash: BlockHash,
    /// How the host slot is written: what goes down to it is encoded so, what comes up from it decoded. Between host
    /// and storage slots move as they are.
    pub codec: Codec,
    /// The sequence waiting for it, if one does.
    pub seq: Option<SeqId>,
}

/// A transfer that has not been answered.
pub(super) struct Flight {
    transfer: Transfer,
    /// Whether it has been handed out.
    started: bool,
    /// Index of the block in its sequence.
    index: usize,
    /// Generation of the waiting sequence: another one may live under its name by now.
    generation: u64,
}

/// All transfers that have not been answered.
#[derive(Default)]
pub(super) struct Flights {
    next: TransferId,
    outbox: VecDeque<TransferId>,
    flying: CheapMap<TransferId, Flight>,
    /// How many can be in flight before the map is made larger: half of what it holds, so that it cleans up in
    /// place behind those that ended, and allocates nothing once it has been at its fullest.
    room: usize,
    /// How many of them go each way.
    by_direction: [usize; 4],
}

impl Flights {
    /// A name for a transfer.
    pub fn name(&mut self) -> TransferId {
        self.next += 1;
        self.next - 1
    }

    /// Emits a transfer of block `index` of its sequence; `waiting` is the sequence that waits for it and
    /// its generation.
    pub fn start(
        &mut self,
        path: Path,
        key: (usize, BlockHash),
        index: usize,
        waiting: Option<(SeqId, u64)>,
    ) {
        let id = self.name();
        self.start_as(id, path, key, index, waiting);
    }

    /// [`Self::start`] under a name of [`Self::name`].
    pub fn start_as(
        &mut self,
        id: TransferId,
        path: Path,
        (group, hash): (usize, BlockHash),
        index: usize,
        waiting: Option<(SeqId, u64)>,
    ) {
        let seq = waiting.map(|(seq, _)| seq);
        // The codec is that of the host tier when it is handed out.
        let codec = Codec::Raw;
        let transfer = Transfer { id, path, group: group as u32, hash, codec, seq };
        let generation = waiting.map_or(0, |(_, generation)| generation);
        if self.flying.len() == self.room {
            self.room = (2 * self.room).max(64);
            self.flying.reserve(2 * self.room - self.flying.len());
        }
        self.flying.insert(id, Flight { transfer, started: false, index, generation });
        self.outbox.push_back(id);
        self.by_direction[path.direction() as usize] += 1;
    }

    /// Takes out a transfer that has been handed out.
    fn end(&mut self, id: TransferId) -> Option<Flight> {
        let flight = match self.flying.entry(id) {
            Entry::Occupied(entry) if entry.get().started => entry.remove(),
            _ => return None,
        };
        self.by_direction[flight.transfer.path.direction() as usize] -= 1;
        Some(flight)
    }

    /// Transfers of a direction not answered yet.
    pub fn in_flight(&self, direction: Direction) -> usize {
        self.by_direction[direction as usize]
    }

    /// Transfers not answered yet.
    pub fn len(&self) -> usize {
        self.flying.len()
    }
}

impl Manager {
    /// The next transfer to start, in order; `None` when there is none, or while there are copies to be taken
    /// first (see [`Self::next_copy`]).
    pub fn next_transfer(&mut self) -> Option<Transfer> {
        if !self.copies.is_empty() {
            return None;
        }
        let flight = self.flights.flying.get_mut(&self.flights.outbox.pop_front()?)?;
        flight.started = true;
        let group = flight.transfer.group as usize;
        flight.transfer.codec = self.host.as_ref().map_or(Codec::Raw, |host| host.codec(group));
        if let Some(seq) = flight.transfer.seq
            && let Some(sequence) = self.sequences.get_mut(&seq)
            && sequence.generation == flight.generation
        {
            sequence.pending -= 1;
        }
        Some(flight.transfer)
    }

    /// Transfers that have been emitted and not been answered.
    pub fn transfers_in_flight(&self) -> usize {
        self.flights.len()
    }

    /// Takes the answer to a transfer. Gives what it means for a sequence that waited for it; the rest, when it
    /// concerns several, follows by [`Self::next_completion`].
    ///
    /// # Errors
    /// `UnknownTransfer` for one that is not outstanding (R10); nothing is changed.
    pub fn complete(&mut self, id: TransferId, outcome: Outcome) -> Result<Completion> {
        let Some(flight) = self.flights.end(id) else {
            return Err(Error::new("complete", ErrorKind::UnknownTransfer(id)));
        };
        let Transfer { path, group, hash, seq, .. } = flight.transfer;
        self.events.seal();
        let mut succeeded = outcome == Outcome::Succeeded;
        let stats = self.stats.of(path.direction());
        stats.succeeded += u64::from(succeeded);
        stats.failed += u64::from(!succeeded);
        // A tier that was detached stays until its transfers are answered.
        match path {
            Path::Offload { from: block, to: slot } => {
                self.device.pool.unpin(block);
                if let Some(host) = &mut self.host {
                    host.ended(outcome != Outcome::Failed);
                    host.stored(slot, succeeded, &mut self.events);
                }
                self.stats.offloads_unfit += u64::from(outcome == Outcome::Unfit);
                if !succeeded {
                    self.drop_evicted(block);
                }
                self.slot_written(slot);
            }
            Path::Onboard { from: slot, to: block } => {
                self.device.pool.unpin(block);
                if let Some(host) = &mut self.host {
                    host.ended(succeeded);
                    // What a slot held when it was pinned may have been disowned since, and what could not
                    // be loaded must not be hit again.
                    succeeded &= host.is_resident(slot);
                    if !succeeded {
                        host.discard(slot, &mut self.events);
                    }
                    host.unpin(slot);
                }
                let (group, index, generation) = (group as usize, flight.index, flight.generation);
                if let Some(seq) = seq {
                    let load = Load { seq, generation, group, hash, index, block, id };
                    self.load_ended(&load, succeeded);
                }
            }
            Path::Persist { from: slot, to } => {
                if let Some(host) = &mut self.host {
                    host.unpin(slot);
                }
                if let Some(storage) = &mut self.storage {
                    storage.ended(succeeded);
                    storage.stored(to, succeeded, &mut self.events);
                }
            }
            Path::Fetch { from, to: slot } => {
                if let Some(storage) = &mut self.storage {
                    storage.ended(succeeded);
                    // As above: disowned meanwhile, or not to be had.
                    succeeded &= storage.is_resident(from);
                    if !succeeded {
                        storage.discard(from, &mut self.events);
                    }
                    storage.unpin(from);
                }
                if let Some(host) = &mut self.host {
                    host.stored(slot, succeeded, &mut self.events);
                }
                self.slot_written(slot);
            }
        }
        if self.storage.as_ref().is_some_and(|storage| !storage.lets_through()) {
            // A tier that is left alone keeps nobody waiting.
            self.give_up_fetches();
        }
        self.pump();
        self.forget_drained();
        Ok(self.told.pop_front().unwrap_or(Completion::Pending))
    }

    /// One of the blocks that a sequence waits for has come, or will not.
    pub(super) fn load_ended(&mut self, load: &Load, succeeded: bool) {
        // R10: the sequence that asked for the block may be gone, and another one have its name.
        let seq = load.seq;
        let Some(sequence) =
            self.sequences.get_mut(&seq).filter(|sequence| sequence.generation == load.generation)
        else {
            return;
        };
        // What a preempted sequence kept for itself nobody else finds, and it is needed no longer.
        let private = load.hash == sequence.tokens.private(load.generation, load.index);
        let group = &self.groups[load.group];
        // It goes on in a block of which it loaded the front.
        let own = private || (load.index + 1) * group.block_size > sequence.hit;
        if private
            && let Some(host) = &mut self.host
            && let Some(slot) = host.slot_of(load.group, &load.hash)
        {
            host.discard(slot, &mut self.events);
        }
        if succeeded && !own {
            let (key, events) = ((load.group, load.hash), &mut self.events);
            self.device.insert(key, load.index, load.block, 1, events);
            self.device.pool.block_mut(load.block).tenant = sequence.tenant;
            let host = self.host.as_ref();
            let settled = host.is_some_and(|host| host.is_settled(load.group, &load.hash));
            self.device.pool.block_mut(load.block).settled = settled;
            if settled {
                let fronts = &sequence.tokens.hashes()[group.front_indices(load.index)];
                self.device.insert_fronts(load.block, fronts, events);
            }
        } else if !succeeded {
            sequence.lost.push((load.group, load.index));
        }
        sequence.loading -= 1;
        sequence.rows[load.group].loading -= 1;
        if sequence.loading > 0 {
            return;
        }
        let told = if sequence.lost.is_empty() {
            cache(&self.groups, &self.policy, &mut self.device, &mut self.events, sequence);
            let (valid_tokens, settled) = (sequence.computed, sequence.settled);
            if sequence.overlapped {
                // What its steps did meanwhile counts from now on.
                let _ = self.advance_with(seq, valid_tokens, settled, |_, _| {});
            }
            Completion::Ready { seq, valid_tokens }
        } else if sequence.overlapped {
            Completion::Void { seq }
        } else {
            match self.repair(seq) {
                Some(valid_tokens) => Completion::Ready { seq, valid_tokens },
                None => Completion::Dropped { seq },
            }
        };
        if !matches!(told, Completion::Ready { .. })
            && let Some(sequence) = self.sequences.remove(&seq)
        {
            self.end(sequence, false);
        }
        self.told.push_back(told);
    }

    /// Cuts a sequence of which loads have failed back to the longest prefix that is whole in every group,
    /// and gives it blocks of its own for what it has to compute again. `None` when the pool has not enough
    /// of them.
    fn repair(&mut self, seq: SeqId) -> Option<usize> {
        let Self { groups, policy, device, sequences, events, .. } = self;
        let sequence = sequences.get_mut(&seq)?;
        let hit = sequence.computed;
        // It goes on at the edge of a block in every group: what it found is not its own to write, and what it has
        // copied or loaded of a block that it goes on in is worth less than another copy.
        let alignment = policy.whole_blocks;
        let lost: HashSet<(usize, usize)> = sequence.lost.drain(..).collect();
        let whole = |g: usize, b: usize, _: usize| {
            sequence.rows[g].table.get(b) != NULL && !lost.contains(&(g, b))
        };
        let whole_hit = align_down(hit, alignment);
        let valid = fixed_point(groups.iter().enumerate(), whole_hit, alignment, whole);

        // Whatever lies between is written again, so it must be ours alone: found blocks are given back.
        let own = |pool: &Pool, id: BlockId| {
            id != NULL && pool.block(id).users == 1 && !pool.block(id).cached
        };
        let (mut fresh, mut returned) = (0, 0);
        // States are written at the end, which may have been loaded, and at what is left of the checkpoints.
        let written = |group: &Group, row: &Row, b: usize| {
            group.kind != GroupKind::State || b + 1 == row.table.len()
        };
        for (group, row) in groups.iter().zip(&sequence.rows) {
            for b in valid / group.block_size..hit / group.block_size {
                let id = row.table.get(b);
                if !own(&device.pool, id) {
                    fresh += usize::from(written(group, row, b));
                    returned += usize::from(id != NULL && device.pool.frees(id));
                }
            }
        }
        if fresh > device.pool.available() + returned {
            return None;
        }
        for (group, row) in groups.iter().zip(&mut sequence.rows) {
            row.table.reach_back(valid / group.block_size);
            for b in (valid / group.block_size..hit / group.block_size).rev() {
                if !own(&device.pool, row.table.get(b)) {
                    device.pool.release(std::iter::once(row.table.replace(b, NULL)));
                }
            }
        }
        for (g, (group, row)) in groups.iter().zip(&mut sequence.rows).enumerate() {
            for b in valid / group.block_size..hit / group.block_size {
                if row.table.get(b) == NULL && written(group, row, b) {
                    row.table.replace(b, device.take(g, events)?);
                }
            }
            row.considered = row.considered.min(valid / group.block_size);
            row.settled = row.settled.min(valid / group.block_size);
            // Nothing of it has been offered to the host: it has waited for its loads until now.
            debug_assert!(row.stored.is_empty());
        }
        sequence.repaired = true;
        sequence.computed = valid;
        sequence.settled = valid;
        Some(valid)
    }
}
