//! The host tier: block-sized slots of pinned memory, the index of what they hold, and the order in which
//! they give way (least recently used first; of one sequence the end before the start).

use super::device::Index;
use crate::manager::HostSlot;
use crate::manager::events::{EventKind, Events, Tier};
use crate::manager::hash::BlockHash;
use crate::manager::queue::IndexQueue;
use crate::manager::stats::TierStats;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Free,
    /// An offload writes it: not to be found, not to be offloaded again.
    Writing,
    /// Holds a block whole.
    Resident,
    /// Holds nothing any more, and is free as soon as the transfers that use it have ended.
    Doomed,
}

#[derive(Clone, Copy)]
struct Slot {
    hash: BlockHash,
    index: u32,
    group: u16,
    state: State,
    /// Transfers in flight from or to the slot.
    pins: u32,
}

/// A block on offer.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Offer {
    pub group: usize,
    pub hash: BlockHash,
    /// Index of the block in its sequence.
    pub index: u32,
}

/// Slots, index and order.
pub(in super::super) struct HostTier {
    slots: Vec<Slot>,
    index: Vec<Index<HostSlot>>,
    free: Vec<HostSlot>,
    /// Slots that hold or receive a block, as indices `slot + 1`, the next to go first. One that was in
    /// use when its turn came stands outside and comes back to the front.
    order: IndexQueue,
    /// Resident slots without pins.
    evictable: usize,
    pub stats: Vec<TierStats>,
}

impl HostTier {
    pub fn new(num_slots: u32, num_groups: usize) -> Self {
        let slot = Slot { hash: BlockHash::NONE, index: 0, group: 0, state: State::Free, pins: 0 };
        Self {
            slots: vec![slot; num_slots as usize],
            index: vec![Index::default(); num_groups],
            free: (0..num_slots).rev().collect(),
            order: IndexQueue::new(num_slots + 1),
            evictable: 0,
            stats: vec![TierStats::default(); num_groups],
        }
    }

    pub fn capacity(&self) -> usize {
        self.slots.len()
    }

    /// Slots that hold or receive a block.
    pub fn used(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Slots that transfers use.
    pub fn pinned(&self) -> usize {
        self.used() - self.evictable
    }

    /// The slot that holds a block whole.
    pub fn find(&self, group: usize, hash: &BlockHash) -> Option<HostSlot> {
        let slot = *self.index[group].get(hash)?;
        (self.slot(slot).state == State::Resident).then_some(slot)
    }

    /// Reserves slots for those of the offered blocks that the tier lacks, evicting others for them; all or
    /// nothing (R6). Offered blocks that it holds are kept and become recent. Gives the positions in
    /// `offers` with their slots; `None`, with nothing changed, when there is no room now.
    pub fn reserve(
        &mut self,
        offers: &[Offer],
        events: &mut Events,
    ) -> Option<Vec<(usize, HostSlot)>> {
        let held: Vec<HostSlot> =
            offers.iter().filter_map(|offer| self.find(offer.group, &offer.hash)).collect();
        let missing: Vec<usize> = (0..offers.len())
            .filter(|&i| !self.index[offers[i].group].contains_key(&offers[i].hash))
            .collect();
        held.iter().for_each(|&slot| self.pin(slot));
        let room = missing.len() <= self.free.len() + self.evictable;
        let mut reserved = Vec::new();
        if room {
            held.iter().for_each(|&slot| self.touch(slot));
            for i in missing {
                let Some(slot) = self.free.pop().or_else(|| self.evict(events)) else { break };
                let Offer { group, hash, index } = offers[i];
                self.slots[slot as usize] =
                    Slot { hash, index, group: group as u16, state: State::Writing, pins: 1 };
                self.index[group].insert(hash, slot);
                self.order.push_back(slot + 1);
                reserved.push((i, slot));
            }
        }
        held.iter().for_each(|&slot| self.unpin(slot));
        room.then_some(reserved)
    }

    /// Ends the offload into a slot; only when it `succeeded` does the block become findable.
    pub fn stored(&mut self, slot: HostSlot, succeeded: bool, events: &mut Events) {
        let Slot { state, group, index, hash, .. } = *self.slot(slot);
        if state == State::Writing {
            if succeeded {
                self.slots[slot as usize].state = State::Resident;
                let stats = &mut self.stats[group as usize];
                stats.stored_blocks += 1;
                stats.cached_blocks += 1;
                events.push(EventKind::Stored, group.into(), Tier::Host, index, hash);
            } else {
                self.discard(slot, events);
            }
        }
        self.unpin(slot);
    }

    /// Whether the slot still holds what it held when it was pinned.
    pub fn is_resident(&self, slot: HostSlot) -> bool {
        self.slot(slot).state == State::Resident
    }

    /// Forgets what a slot holds or receives.
    pub fn discard(&mut self, slot: HostSlot, events: &mut Events) {
        let Slot { hash, group, index, state, pins } = *self.slot(slot);
        match state {
            State::Free | State::Doomed => return,
            State::Writing => {}
            State::Resident => {
                self.evictable -= usize::from(pins == 0);
                self.stats[group as usize].cached_blocks -= 1;
            }
        }
        // Said of a failed store, too: who was told of the offload learns how it ended.
        events.push(EventKind::Removed, group.into(), Tier::Host, index, hash);
        self.index[group as usize].remove(&hash);
        if self.order.contains(slot + 1) {
            self.order.remove(slot + 1);
        }
        self.slots[slot as usize].state = State::Doomed;
        self.free_doomed(slot);
    }

    /// Forgets the block of this hash, arrived or on its way.
    pub fn discard_hash(&mut self, group: usize, hash: &BlockHash, events: &mut Events) {
        if let Some(&slot) = self.index[group].get(hash) {
            self.discard(slot, events);
        }
    }

    /// Makes a block the last one to go.
    pub fn touch(&mut self, slot: HostSlot) {
        if self.order.contains(slot + 1) {
            self.order.remove(slot + 1);
        }
        self.order.push_back(slot + 1);
    }

    /// Keeps a slot from eviction until [`Self::unpin`].
    pub fn pin(&mut self, slot: HostSlot) {
        let entry = &mut self.slots[slot as usize];
        self.evictable -= usize::from(entry.state == State::Resident && entry.pins == 0);
        entry.pins += 1;
    }

    /// Undoes one [`Self::pin`].
    pub fn unpin(&mut self, slot: HostSlot) {
        let entry = &mut self.slots[slot as usize];
        entry.pins -= 1;
        if entry.pins > 0 {
            return;
        }
        if entry.state == State::Resident {
            self.evictable += 1;
            if !self.order.contains(slot + 1) {
                self.order.insert_after(0, slot + 1);
            }
        }
        self.free_doomed(slot);
    }

    /// Drops everything. No transfer may be in flight.
    pub fn clear(&mut self) {
        for slot in 0..self.slots.len() as HostSlot {
            self.discard(slot, &mut Events::default());
        }
    }

    fn slot(&self, slot: HostSlot) -> &Slot {
        &self.slots[slot as usize]
    }

    fn free_doomed(&mut self, slot: HostSlot) {
        let entry = &mut self.slots[slot as usize];
        if entry.state == State::Doomed && entry.pins == 0 {
            entry.state = State::Free;
            self.free.push(slot);
        }
    }

    /// Takes the slot of the block that is next to go.
    fn evict(&mut self, events: &mut Events) -> Option<HostSlot> {
        loop {
            let slot = self.order.pop_front()? - 1;
            let Slot { hash, group, index, state, pins } = *self.slot(slot);
            if state == State::Resident && pins == 0 {
                self.evictable -= 1;
                self.index[group as usize].remove(&hash);
                let stats = &mut self.stats[group as usize];
                stats.cached_blocks -= 1;
                stats.evicted_blocks += 1;
                events.push(EventKind::Removed, group.into(), Tier::Host, index, hash);
                return Some(slot);
            }
        }
    }
}
