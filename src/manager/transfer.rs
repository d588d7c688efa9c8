//! Transfers between the tiers: what is offered to the host, what is loaded from it, and what their
//! completions change.

use std::collections::{HashSet, VecDeque};

use super::events::{EventKind, Tier};
use super::hash::BlockHash;
use super::pool::NULL;
use super::prefix::fixed_point;
use super::tiers::host::Offer;
use super::*;

/// Blocks offered to the host in one act, all of which it takes or none; fewer when slots are short.
const OFFER: usize = 64;

/// A transfer that has not been answered.
pub(super) struct Flight {
    transfer: Transfer,
    /// Whether it has been handed out.
    started: bool,
    hash: BlockHash,
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
}

impl Flights {
    /// Emits a transfer, of which the name is given here.
    pub fn start(
        &mut self,
        mut transfer: Transfer,
        generation: u64,
        hash: BlockHash,
        index: usize,
    ) -> TransferId {
        transfer.id = self.next;
        self.next += 1;
        self.flying
            .insert(transfer.id, Flight { transfer, started: false, hash, index, generation });
        self.outbox.push_back(transfer.id);
        transfer.id
    }

    /// Transfers not answered yet.
    pub fn len(&self) -> usize {
        self.flying.len()
    }
}

impl Manager {
    /// The next transfer to start, in order; `None` when there is none.
    pub fn next_transfer(&mut self) -> Option<Transfer> {
        let flight = self.flights.flying.get_mut(&self.flights.outbox.pop_front()?)?;
        flight.started = true;
        Some(flight.transfer)
    }

    /// Transfers that have been emitted and not been answered.
    pub fn transfers_in_flight(&self) -> usize {
        self.flights.len()
    }

    /// Takes the answer to a transfer.
    ///
    /// # Errors
    /// `UnknownTransfer` for one that is not outstanding (R10); nothing is changed.
    pub fn complete(&mut self, id: TransferId, outcome: Outcome) -> Result<Completion> {
        let outstanding = self.flights.flying.get(&id).is_some_and(|flight| flight.started);
        let (Some(flight), Some(host)) =
            (outstanding.then(|| self.flights.flying.remove(&id)).flatten(), self.host.as_mut())
        else {
            return Err(Error::new("complete", ErrorKind::UnknownTransfer(id)));
        };
        let Transfer { direction, group, block, slot, seq, .. } = flight.transfer;
        self.events.seal();
        let mut succeeded = outcome == Outcome::Succeeded;
        let stats = match direction {
            Direction::Offload => &mut self.stats.offloads,
            Direction::Onboard => &mut self.stats.onboards,
        };
        stats.succeeded += u64::from(succeeded);
        stats.failed += u64::from(!succeeded);
        self.device.pool.unpin(block);
        if direction == Direction::Offload {
            host.stored(slot, succeeded, &mut self.events);
            return Ok(Completion::Pending);
        }

        // What a slot held when it was pinned may have been disowned since, and what could not be loaded
        // must not be hit again.
        succeeded &= host.is_resident(slot);
        if !succeeded {
            host.discard(slot, &mut self.events);
        }
        host.unpin(slot);
        // R10: the sequence that asked for the block may be gone, and another one have its name.
        let Some((seq, sequence)) = seq
            .and_then(|seq| Some((seq, self.sequences.get_mut(&seq)?)))
            .filter(|(_, sequence)| sequence.generation == flight.generation)
        else {
            return Ok(Completion::Pending);
        };
        if succeeded {
            self.device.insert(group as usize, flight.hash, flight.index, block);
            let (index, hash) = (flight.index as u32, flight.hash);
            self.events.push(EventKind::Stored, group, Tier::Device, index, hash);
        } else {
            sequence.lost.push((group as usize, flight.index));
        }
        sequence.loading -= 1;
        if sequence.loading > 0 {
            return Ok(Completion::Pending);
        }
        if sequence.lost.is_empty() {
            cache(&self.groups, &self.policy, &mut self.device, &mut self.events, sequence);
            return Ok(Completion::Ready { seq, valid_tokens: sequence.computed });
        }
        match self.repair(seq) {
            Some(valid_tokens) => Ok(Completion::Ready { seq, valid_tokens }),
            None => {
                self.free(seq)?;
                Ok(Completion::Dropped { seq })
            }
        }
    }

    /// Cuts a sequence of which loads have failed back to the longest prefix that is whole in every group,
    /// and gives it blocks of its own for what it has to compute again. `None` when the pool has not enough
    /// of them.
    fn repair(&mut self, seq: SeqId) -> Option<usize> {
        let Self { groups, policy, device, sequences, events, .. } = self;
        let sequence = sequences.get_mut(&seq)?;
        let hit = sequence.computed;
        let lost: HashSet<(usize, usize)> = sequence.lost.drain(..).collect();
        let whole =
            |g: usize, b: usize| sequence.rows[g].table[b] != NULL && !lost.contains(&(g, b));
        let valid = fixed_point(groups.iter().enumerate(), hit, policy.alignment, whole);

        // Whatever lies between is written again, so it must be ours alone: found blocks are given back.
        let own = |pool: &Pool, id: BlockId| {
            id != NULL && pool.block(id).users == 1 && !pool.block(id).cached
        };
        let (mut fresh, mut returned) = (0, 0);
        for (group, row) in groups.iter().zip(&sequence.rows) {
            for &id in &row.table[valid / group.block_size..hit / group.block_size] {
                if !own(&device.pool, id) {
                    fresh += 1;
                    returned += usize::from(id != NULL && device.pool.block(id).users == 1);
                }
            }
        }
        if fresh > device.pool.available() + returned {
            return None;
        }
        for (group, row) in groups.iter().zip(&mut sequence.rows) {
            let again = &mut row.table[valid / group.block_size..hit / group.block_size];
            for id in again.iter_mut().rev() {
                if !own(&device.pool, *id) {
                    device.pool.release(std::iter::once(std::mem::replace(id, NULL)));
                }
            }
        }
        for (g, (group, row)) in groups.iter().zip(&mut sequence.rows).enumerate() {
            let again = &mut row.table[valid / group.block_size..hit / group.block_size];
            for id in again.iter_mut().filter(|id| **id == NULL) {
                *id = device.take(g, events)?;
            }
            row.first_live = group.first_needed(valid);
            row.considered = row.considered.min(valid / group.block_size);
            // Nothing of it has been offered to the host: it has waited for its loads until now.
            debug_assert!(row.stored.is_empty());
        }
        sequence.repaired = true;
        sequence.computed = valid;
        sequence.settled = valid;
        Some(valid)
    }
}

/// Offers a sequence's computed and cached blocks to the host (write-through), the start first. It never gets
/// more slots than there are, so that its end cannot push out its start.
pub(super) fn offer(
    groups: &[Group],
    device: &mut DeviceTier,
    host: &mut HostTier,
    flights: &mut Flights,
    events: &mut Events,
    stats: &mut Stats,
    sequence: &mut Sequence,
) {
    let mut offers = Vec::new();
    let mut stored: usize = sequence.rows.iter().map(|row| row.stored.len()).sum();
    for (g, (group, row)) in groups.iter().zip(&mut sequence.rows).enumerate() {
        let computed = sequence.computed / group.block_size;
        let mut most = OFFER;
        while row.offered < computed && stored < host.capacity() {
            let end = computed.min(row.offered + most.min(host.capacity() - stored));
            offers.clear();
            offers.extend(
                (row.offered..end).filter(|&b| device.pool.block(row.table[b]).cached).map(|b| {
                    let hash = sequence.tokens.hashes()[group.key_index(b)];
                    Offer { group: g, hash, index: b as u32 }
                }),
            );
            let Some(reserved) = host.reserve(&offers, events) else {
                if most > 1 {
                    most /= 2;
                    continue;
                }
                // It is offered again with the next step.
                stats.offloads_refused += 1;
                break;
            };
            for (i, slot) in reserved {
                let Offer { hash, index, .. } = offers[i];
                let block = row.table[index as usize];
                device.pool.pin(block);
                let transfer = Transfer {
                    id: 0,
                    direction: Direction::Offload,
                    group: g as u32,
                    block,
                    slot,
                    seq: None,
                };
                flights.start(transfer, 0, hash, index as usize);
                stats.offloads.started += 1;
            }
            row.stored.extend(offers.iter().map(|offer| offer.index));
            stored += offers.len();
            row.offered = end;
        }
    }
}
