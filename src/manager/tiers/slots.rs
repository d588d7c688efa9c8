//! A tier of block-sized slots: the index of what they hold, and the order in which they give way, as the tier's
//! eviction policy ranks them; of one sequence the end before the start.

use super::breaker::{Breaker, BreakerConfig};
use super::index::{Index, Tag};
use super::quotas::Quotas;
use crate::codec::Codec;
use crate::manager::events::{EventKind, Events, Tier};
use crate::manager::eviction::{Entry, Order, is_last_of_stride};
use crate::manager::hash::BlockHash;
use crate::manager::pool::NULL;
use crate::manager::quota::TenantId;
use crate::manager::stats::TierStats;
use crate::manager::{BlockId, Eviction};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Free,
    /// A transfer writes it: not to be found, not to be written again.
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
    /// Device block that it was written from; [`NULL`] when it came from elsewhere.
    source: BlockId,
    /// Whether the work that wrote the source is known to have ended well.
    settled: bool,
    /// Transfers in flight from or to the slot.
    pins: u32,
}

/// Where a block comes from.
#[derive(Debug, Clone, Copy, Default)]
pub(in super::super) struct Source {
    /// Device block that it is written from; [`NULL`]: from elsewhere.
    pub block: BlockId,
    /// What the tier it comes from knows of it.
    pub entry: Entry,
    /// Whose quota it counts for.
    pub tenant: TenantId,
}

/// What became of a block that was to be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Reserved {
    /// The tier has it, or it is on its way; it has become recent.
    Held,
    /// A slot to write it to, pinned for that.
    New(u32),
    /// No slot is free, and none could be made free now.
    Full,
}

/// Slots, index and order.
pub(in super::super) struct SlotTier {
    tier: Tier,
    slots: Vec<Slot>,
    index: Index,
    free: Vec<u32>,
    /// In line stand slots that hold or receive a block. One that was in use when its turn came stands outside and
    /// comes back as the first.
    order: Order,
    /// Resident slots without pins.
    evictable: usize,
    /// Who holds what, once there are quotas.
    quotas: Option<Quotas>,
    /// How slots of each group are written; groups beyond the list: as they are.
    codecs: Vec<Codec>,
    pub breaker: Breaker,
    now: u64,
    pub stats: Vec<TierStats>,
}

impl SlotTier {
    pub fn new(
        tier: Tier,
        num_slots: u32,
        num_groups: usize,
        eviction: Eviction,
        breaker: BreakerConfig,
    ) -> Self {
        let slot = Slot {
            hash: BlockHash::NONE,
            index: 0,
            group: 0,
            state: State::Free,
            source: NULL,
            settled: false,
            pins: 0,
        };
        Self {
            tier,
            slots: vec![slot; num_slots as usize],
            index: Index::new(num_slots as usize, 0),
            free: (0..num_slots).rev().collect(),
            order: Order::new(eviction, num_slots),
            evictable: 0,
            quotas: None,
            codecs: Vec::new(),
            breaker: Breaker::new(breaker),
            now: 0,
            stats: vec![TierStats::default(); num_groups],
        }
    }

    /// The same with slots that codecs write.
    pub fn with_codecs(self, codecs: Vec<Codec>) -> Self {
        Self { codecs, ..self }
    }

    /// How the slots of a group are written.
    pub fn codec(&self, group: usize) -> Codec {
        self.codecs.get(group).copied().unwrap_or(Codec::Raw)
    }

    pub fn capacity(&self) -> usize {
        self.slots.len()
    }

    /// Bytes of all that is kept per slot.
    pub fn metadata_bytes(&self) -> usize {
        let free = self.free.capacity() * size_of::<u32>();
        let quotas = self.quotas.as_ref().map_or(0, Quotas::bytes);
        size_of_val(self.slots.as_slice()) + self.index.bytes() + self.order.bytes() + free + quotas
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
    pub fn find(&self, group: usize, hash: &BlockHash) -> Option<u32> {
        let slot = self.slot_of(group, hash)?;
        (self.slot(slot).state == State::Resident).then_some(slot)
    }

    /// The slot that holds or receives a block.
    pub fn slot_of(&self, group: usize, hash: &BlockHash) -> Option<u32> {
        self.index.find(Tag::new(group, hash), |slot| {
            let slot = self.slot(slot);
            slot.hash == *hash && slot.group as usize == group
        })
    }

    /// Blocks of a tenant that could be stored now.
    pub fn room(&self, tenant: TenantId) -> usize {
        let room = self.free.len() + self.evictable;
        match &self.quotas {
            Some(quotas) => room.min(quotas.left(tenant).saturating_add(quotas.evictable(tenant))),
            None => room,
        }
    }

    /// Limits a tenant to so many slots. What the tier holds by its first quota is nobody's.
    pub fn set_quota(&mut self, tenant: TenantId, most: usize) {
        let Self { slots, quotas, .. } = self;
        let quotas = quotas.get_or_insert_with(|| {
            let mut quotas = Quotas::new(slots.len() as u32);
            for (slot, entry) in (0..).zip(slots.iter()) {
                if matches!(entry.state, State::Writing | State::Resident) {
                    quotas.take(slot, 0);
                    if entry.state == State::Resident && entry.pins == 0 {
                        quotas.can_go(slot, true);
                    }
                }
            }
            quotas
        });
        quotas.set(tenant, most);
    }

    /// Slots that count for a tenant.
    pub fn used_by(&self, tenant: TenantId) -> usize {
        self.quotas.as_ref().map_or(0, |quotas| quotas.used(tenant))
    }

    /// Whose quota a slot counts for.
    pub fn tenant_of(&self, slot: u32) -> TenantId {
        self.quotas.as_ref().map_or(0, |quotas| quotas.tenant_of(slot))
    }

    /// Whether a transfer writes the slot.
    pub fn is_writing(&self, slot: u32) -> bool {
        self.slot(slot).state == State::Writing
    }

    /// Whether the tier has a block or is receiving it.
    pub fn holds(&self, group: usize, hash: &BlockHash) -> bool {
        self.slot_of(group, hash).is_some()
    }

    /// The slot that is receiving a block.
    pub fn receiving(&self, group: usize, hash: &BlockHash) -> Option<u32> {
        let slot = self.slot_of(group, hash)?;
        (self.slot(slot).state == State::Writing).then_some(slot)
    }

    /// Takes over a block that a slot holds already; `false` when the slot is not free, or the tier has the
    /// block.
    pub fn adopt(&mut self, slot: u32, group: usize, hash: BlockHash, events: &mut Events) -> bool {
        let free = self.slots.get(slot as usize).is_some_and(|s| s.state == State::Free);
        if !free || self.holds(group, &hash) {
            return false;
        }
        // Adopting is rare and slots are many: the list of free ones is put right by who takes from it.
        let entry = &mut self.slots[slot as usize];
        *entry = Slot { hash, group: group as u16, state: State::Resident, ..*entry };
        self.index.insert(Tag::new(group, &hash), slot);
        self.order.stored(slot, 0);
        self.order.place(slot);
        if let Some(quotas) = &mut self.quotas {
            quotas.take(slot, 0);
        }
        self.can_go(slot, true);
        let stats = &mut self.stats[group];
        stats.stored_blocks += 1;
        stats.cached_blocks += 1;
        events.push(EventKind::Stored, group as u32, self.tier, 0, hash);
        true
    }

    /// Ends the adopting.
    pub fn adopted(&mut self) {
        let slots = &self.slots;
        self.free.retain(|&slot| slots[slot as usize].state == State::Free);
    }

    /// Marks what the tier has or receives from `source` as settled; its slot when it is there and was not yet.
    /// What came from an equal block is not vouched for: the work that writes that one can still fail.
    pub fn settle(&mut self, group: usize, hash: &BlockHash, source: BlockId) -> Option<u32> {
        let slot = self.slot_of(group, hash)?;
        let entry = &mut self.slots[slot as usize];
        if entry.source != source {
            return None;
        }
        let first = !std::mem::replace(&mut entry.settled, true);
        (first && entry.state == State::Resident).then_some(slot)
    }

    /// Whether the tier has a block that is settled.
    pub fn is_settled(&self, group: usize, hash: &BlockHash) -> bool {
        self.find(group, hash).is_some_and(|slot| self.slot(slot).settled)
    }

    /// What a slot holds, when that is settled: group, hash and index in its sequence.
    pub fn to_persist(&self, slot: u32) -> Option<(usize, BlockHash, u32)> {
        let &Slot { hash, index, group, state, settled, .. } = self.slot(slot);
        (state == State::Resident && settled).then_some((group.into(), hash, index))
    }

    /// Says what time it is, in nanoseconds.
    pub fn tick(&mut self, now: u64) {
        self.now = now;
    }

    /// Whether the breaker lets a transfer to or from the tier start.
    pub fn lets_through(&self) -> bool {
        self.breaker.lets_through(self.now)
    }

    /// A transfer to or from the tier has started.
    pub fn started(&mut self) {
        self.breaker.started();
    }

    /// A transfer to or from the tier has ended.
    pub fn ended(&mut self, succeeded: bool) {
        self.breaker.ended(succeeded, self.now);
    }

    /// Reserves a slot for a block that the tier lacks, evicting another one for it; nothing is changed when that
    /// cannot be (R6).
    pub fn reserve(
        &mut self,
        (group, hash): (usize, BlockHash),
        index: u32,
        source: Source,
        events: &mut Events,
    ) -> Reserved {
        if let Some(slot) = self.slot_of(group, &hash) {
            self.hit(slot);
            return Reserved::Held;
        }
        let Some(slot) = self.make_room(source.tenant, events) else {
            return Reserved::Full;
        };
        self.slots[slot as usize] = Slot {
            hash,
            index,
            group: group as u16,
            state: State::Writing,
            source: source.block,
            settled: false,
            pins: 1,
        };
        self.index.insert(Tag::new(group, &hash), slot);
        self.order.adopted(slot, source.entry);
        self.remember(slot, false);
        self.order.place(slot);
        if let Some(quotas) = &mut self.quotas {
            quotas.take(slot, source.tenant);
        }
        Reserved::New(slot)
    }

    /// Ends the transfer into a slot; only when it `succeeded` does the block become findable.
    pub fn stored(&mut self, slot: u32, succeeded: bool, events: &mut Events) {
        let Slot { state, group, index, hash, .. } = *self.slot(slot);
        if state == State::Writing {
            if succeeded {
                self.slots[slot as usize].state = State::Resident;
                let stats = &mut self.stats[group as usize];
                stats.stored_blocks += 1;
                stats.cached_blocks += 1;
                events.push(EventKind::Stored, group.into(), self.tier, index, hash);
            } else {
                self.discard(slot, events);
            }
        }
        self.unpin(slot);
    }

    /// Whether the slot still holds what it held when it was pinned.
    pub fn is_resident(&self, slot: u32) -> bool {
        self.slot(slot).state == State::Resident
    }

    /// Forgets what a slot holds or receives.
    pub fn discard(&mut self, slot: u32, events: &mut Events) {
        let Slot { hash, group, index, state, pins, .. } = *self.slot(slot);
        match state {
            State::Free | State::Doomed => return,
            State::Writing => {}
            State::Resident => {
                if pins == 0 {
                    self.can_go(slot, false);
                }
                self.stats[group as usize].cached_blocks -= 1;
            }
        }
        // Said of a failed store, too: who was told of the transfer learns how it ended.
        events.push(EventKind::Removed, group.into(), self.tier, index, hash);
        self.index.remove(Tag::new(group.into(), &hash), slot);
        self.order.remove(slot);
        if let Some(quotas) = &mut self.quotas {
            quotas.give_up(slot);
        }
        self.slots[slot as usize].state = State::Doomed;
        self.free_doomed(slot);
    }

    /// Forgets the block of this hash, arrived or on its way, unless it is settled: then it is of other work than
    /// that which failed.
    pub fn disown(&mut self, group: usize, hash: &BlockHash, events: &mut Events) {
        if let Some(slot) = self.slot_of(group, hash)
            && !self.slot(slot).settled
        {
            self.discard(slot, events);
        }
    }

    /// A block is used once more.
    pub fn hit(&mut self, slot: u32) {
        self.order.hit(slot);
        self.remember(slot, true);
        self.touch(slot);
    }

    /// Makes a block the most recent one.
    pub fn touch(&mut self, slot: u32) {
        self.order.leave(slot);
        self.order.place(slot);
        if let Some(quotas) = &mut self.quotas {
            quotas.touch(slot);
        }
    }

    /// A sequence ends that used the block; told of its end first. The first one to use it gives it its place, as if
    /// it had been stored only now: where the first to be stored is the first to go, too, ends go before starts.
    pub fn released(&mut self, slot: u32) {
        let entry = self.order.entry(slot);
        if entry.uses <= 1 {
            self.order.remove(slot);
            self.order.adopted(slot, entry);
        }
        self.touch(slot);
    }

    /// What is known of a block, for the tier that it moves to.
    pub fn entry(&self, slot: u32) -> Entry {
        self.order.entry(slot)
    }

    /// What a slot holds is of this priority at least.
    pub fn raise(&mut self, slot: u32, priority: u8) {
        self.order.raise(slot, priority);
    }

    /// Lets the policy learn from a use.
    fn remember(&mut self, slot: u32, hit: bool) {
        let Slot { hash, group, index, .. } = *self.slot(slot);
        if is_last_of_stride(index as usize) {
            self.order.recall(hash.key(group.into()), index as usize, hit);
        }
    }

    /// Keeps a slot from eviction until [`Self::unpin`].
    pub fn pin(&mut self, slot: u32) {
        let entry = &mut self.slots[slot as usize];
        entry.pins += 1;
        if entry.state == State::Resident && entry.pins == 1 {
            self.can_go(slot, false);
        }
    }

    /// Undoes one [`Self::pin`].
    pub fn unpin(&mut self, slot: u32) {
        let entry = &mut self.slots[slot as usize];
        entry.pins -= 1;
        if entry.pins > 0 {
            return;
        }
        if entry.state == State::Resident {
            self.can_go(slot, true);
            if !self.order.contains(slot) {
                self.order.place_first(slot);
            }
        }
        self.free_doomed(slot);
    }

    /// Drops everything; slots that transfers use are free once these have ended.
    pub fn clear(&mut self, events: &mut Events) {
        for slot in 0..self.slots.len() as u32 {
            self.discard(slot, &mut Events::default());
        }
        for group in 0..self.stats.len() as u32 {
            events.cleared(group, self.tier);
        }
    }

    fn slot(&self, slot: u32) -> &Slot {
        &self.slots[slot as usize]
    }

    fn free_doomed(&mut self, slot: u32) {
        let entry = &mut self.slots[slot as usize];
        if entry.state == State::Doomed && entry.pins == 0 {
            entry.state = State::Free;
            self.free.push(slot);
        }
    }

    /// A slot, resident, has lost its last pin, or has one now.
    fn can_go(&mut self, slot: u32, can: bool) {
        match can {
            true => self.evictable += 1,
            false => self.evictable -= 1,
        }
        if let Some(quotas) = &mut self.quotas {
            quotas.can_go(slot, can);
        }
    }

    /// A slot for a block of a tenant: at its quota, one of its own; else one that is free, one of somebody who is
    /// over his quota, or that of the block which is next to go.
    fn make_room(&mut self, tenant: TenantId, events: &mut Events) -> Option<u32> {
        let Some(quotas) = &self.quotas else {
            return self.free.pop().or_else(|| self.evict(events));
        };
        if quotas.left(tenant) == 0 {
            return self.evict_of(tenant, events);
        }
        let over = quotas.over();
        self.free
            .pop()
            .or_else(|| over.and_then(|over| self.evict_of(over, events)))
            .or_else(|| self.evict(events))
    }

    /// Takes the slot of the block that is next to go.
    fn evict(&mut self, events: &mut Events) -> Option<u32> {
        if self.evictable == 0 {
            return None;
        }
        loop {
            let slot = self.order.pop()?;
            if self.is_evictable(slot) {
                self.empty(slot, events);
                return Some(slot);
            }
        }
    }

    /// Takes the slot of a tenant's block that is next to go.
    fn evict_of(&mut self, tenant: TenantId, events: &mut Events) -> Option<u32> {
        let quotas = self.quotas.as_ref().filter(|quotas| quotas.evictable(tenant) > 0)?;
        let slot = quotas.slots(tenant).find(|&slot| self.is_evictable(slot))?;
        self.order.remove(slot);
        self.empty(slot, events);
        Some(slot)
    }

    fn is_evictable(&self, slot: u32) -> bool {
        let Slot { state, pins, .. } = *self.slot(slot);
        state == State::Resident && pins == 0
    }

    /// Evicts what an evictable slot, out of line by now, holds.
    fn empty(&mut self, slot: u32, events: &mut Events) {
        let Slot { hash, group, index, .. } = *self.slot(slot);
        self.can_go(slot, false);
        if let Some(quotas) = &mut self.quotas {
            quotas.give_up(slot);
        }
        if is_last_of_stride(index as usize) {
            self.order.evicted(slot, hash.key(group.into()));
        }
        self.index.remove(Tag::new(group.into(), &hash), slot);
        let stats = &mut self.stats[group as usize];
        stats.cached_blocks -= 1;
        stats.evicted_blocks += 1;
        events.push(EventKind::Removed, group.into(), self.tier, index, hash);
    }
}
