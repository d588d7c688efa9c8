//! The storage tier: what goes down to it, what comes up from it through the host, and how lower tiers come and
//! go at run time.
//!
//! Only settled blocks go down: a step that fails takes back what it wrote from the device and from the host, and
//! nothing of it ever is in storage. A sequence's load from storage is two transfers: a fetch into a host slot,
//! shared by all who want the block, and an onboard for each of them.

use std::collections::VecDeque;

use super::hash::BlockHash;
use super::quota::{HOST, STORAGE, TenantId};
use super::tiers::slots::{Reserved, Source};
use super::*;

/// A block that a sequence waits for; the block of the pool is pinned.
#[derive(Debug, Clone, Copy)]
pub(super) struct Load {
    pub seq: SeqId,
    pub generation: u64,
    pub group: usize,
    pub hash: BlockHash,
    /// Index of the block in its sequence.
    pub index: usize,
    pub block: BlockId,
    /// Name of the onboard.
    pub id: TransferId,
}

/// Who wants a block on the host.
#[derive(Debug, Clone, Copy)]
pub(super) enum Waiter {
    Load(Load),
    /// A prefetch, by the name of its sequence and its generation.
    Prefetch {
        seq: SeqId,
        generation: u64,
        group: usize,
        hash: BlockHash,
        index: usize,
    },
}

impl Waiter {
    fn key(&self) -> (usize, BlockHash) {
        match *self {
            Self::Load(Load { group, hash, .. }) | Self::Prefetch { group, hash, .. } => {
                (group, hash)
            }
        }
    }

    fn index(&self) -> usize {
        match *self {
            Self::Load(Load { index, .. }) | Self::Prefetch { index, .. } => index,
        }
    }
}

/// A block that is wanted on the host; its storage slot is pinned.
#[derive(Debug, Clone, Copy)]
struct Want {
    from: StorageSlot,
    waiter: Waiter,
}

/// What is to be fetched, and who waits for what is under way.
#[derive(Default)]
pub(super) struct Fetches {
    /// Of sequences; these go first.
    loads: VecDeque<Want>,
    prefetches: VecDeque<Want>,
    /// By the host slot that is being written.
    waiters: CheapMap<u64, Vec<Waiter>>,
}

impl Manager {
    /// Attaches a storage tier that holds `stored`, the oldest first, as its store found it.
    ///
    /// # Errors
    /// `InvalidArgument` without a host tier, through which everything goes, with a storage tier attached or
    /// not yet drained, for stored blocks of slots or groups that do not exist; nothing is changed.
    pub fn attach_storage(&mut self, config: StorageConfig, stored: &[StoredBlock]) -> Result<()> {
        const OP: &str = "attach storage";
        config.check(OP)?;
        if self.host.is_none() || self.config.host.is_none() {
            return Err(Error::invalid(OP, "a storage tier needs a host tier to go through"));
        }
        if self.storage_config.is_some() || self.storage.as_ref().is_some_and(|s| s.used() > 0) {
            return Err(Error::invalid(
                OP,
                "a storage tier is attached, or one that was detached has transfers in flight",
            ));
        }
        let mut tier = SlotTier::new(
            Tier::Storage,
            config.num_slots,
            self.groups.len(),
            config.eviction,
            config.breaker,
        );
        let mut events = self.events.draft();
        let adopted = stored.iter().all(|block| {
            (block.group as usize) < self.groups.len()
                && tier.adopt(block.slot, block.group as usize, block.hash, &mut events)
        });
        if !adopted {
            return Err(Error::invalid(
                OP,
                format!(
                    "a stored block in a slot that does not exist or twice, or of no group: {} slots, {} groups",
                    config.num_slots,
                    self.groups.len()
                ),
            ));
        }
        self.events.join(events);
        tier.adopted();
        self.tenants.apply(&mut tier, STORAGE);
        tier.tick(self.now);
        self.storage = Some(tier);
        self.storage_config = Some(config);
        Ok(())
    }

    /// Detaches the storage tier: nothing is found in it or stored in it any more, and sequences that wait for
    /// blocks whose fetch has not begun compute them. Gives the number of its transfers that are still to be
    /// answered; the memory they use is reserved until then.
    pub fn detach_storage(&mut self) -> usize {
        self.events.seal();
        self.storage_config = None;
        self.to_persist.clear();
        if let Some(storage) = &mut self.storage {
            storage.clear(&mut self.events);
        }
        self.empty_pins(Tier::Storage);
        self.give_up_fetches();
        self.forget_drained();
        self.flights.in_flight(Direction::Persist) + self.flights.in_flight(Direction::Fetch)
    }

    /// Attaches an empty host tier.
    ///
    /// # Errors
    /// `InvalidArgument` with a host tier attached or not yet drained, without prefix caching, for bad values.
    pub fn attach_host(&mut self, config: HostConfig) -> Result<()> {
        const OP: &str = "attach host";
        config.check(OP, &self.groups)?;
        if !self.config.prefix_caching {
            return Err(Error::invalid(OP, "a host tier needs prefix caching"));
        }
        if self.config.host.is_some() || self.host.as_ref().is_some_and(|host| host.used() > 0) {
            return Err(Error::invalid(
                OP,
                "a host tier is attached, or one that was detached has transfers in flight",
            ));
        }
        let mut host = config.tier(self.groups.len());
        host.tick(self.now);
        self.tenants.apply(&mut host, HOST);
        self.host = Some(host);
        self.config.host = Some(config);
        Ok(())
    }

    /// Detaches the host tier, and storage with it. What is on its way up from it when it goes is a miss. Gives
    /// the number of transfers that are still to be answered; until then the arena must stay.
    pub fn detach_host(&mut self) -> usize {
        self.detach_storage();
        self.cancel_prefetches();
        self.config.host = None;
        self.clear_host();
        self.forget_drained();
        self.flights.len()
    }

    /// Drops everything that the host tier holds. What is on its way up from it is a miss.
    pub fn clear_host(&mut self) {
        self.events.seal();
        self.to_persist.clear();
        if let Some(host) = &mut self.host {
            host.clear(&mut self.events);
        }
        self.empty_pins(Tier::Host);
    }

    /// Says what time it is, in nanoseconds of any clock.
    ///
    /// # Errors
    /// `InvalidArgument` for a time before the last one; nothing is changed.
    pub fn tick(&mut self, now: u64) -> Result<()> {
        if now < self.now {
            return Err(Error::invalid(
                "tick",
                format!("time goes back from {} to {now} ns", self.now),
            ));
        }
        self.now = now;
        for tier in self.host.iter_mut().chain(&mut self.storage) {
            tier.tick(now);
        }
        self.pump();
        Ok(())
    }

    /// Weighs loading against computing from now on; `None` loads every hit above the threshold.
    ///
    /// # Errors
    /// `Unsupported` for rates that are no positive finite numbers.
    pub fn set_cost_model(&mut self, cost: Option<CostModel>) -> Result<()> {
        if let Some(cost) = &cost {
            cost.check("cost model")?;
        }
        self.cost = cost;
        Ok(())
    }

    /// The next thing to be told of a sequence: one answer to a transfer can concern several.
    /// [`Self::complete`] gives the first itself; detaching a tier or [`Self::tick`] can leave some, too.
    pub fn next_completion(&mut self) -> Option<Completion> {
        self.told.pop_front()
    }

    /// Wants a block of storage on the host.
    pub(super) fn want(&mut self, from: StorageSlot, waiter: Waiter) {
        if let Some(storage) = &mut self.storage {
            storage.pin(from);
            storage.hit(from);
            storage.stats[waiter.key().0].hit_blocks += 1;
        }
        let queue = match waiter {
            Waiter::Load(_) => &mut self.fetches.loads,
            Waiter::Prefetch { .. } => &mut self.fetches.prefetches,
        };
        queue.push_back(Want { from, waiter });
    }

    /// Starts the onboard of a load from its host slot.
    pub(super) fn onboard(&mut self, load: &Load, slot: HostSlot) {
        if let Some(host) = &mut self.host {
            host.pin(slot);
            host.hit(slot);
            host.started();
            host.stats[load.group].hit_blocks += 1;
        }
        self.stats.of(Direction::Onboard).started += 1;
        let path = Path::Onboard { from: slot, to: load.block };
        let waiting = Some((load.seq, load.generation));
        self.flights.start_as(load.id, path, (load.group, load.hash), load.index, waiting);
    }

    /// Starts what can be started between host and storage.
    pub(super) fn pump(&mut self) {
        self.pump_fetches();
        self.pump_persists();
    }

    fn pump_fetches(&mut self) {
        loop {
            let fetches = &mut self.fetches;
            let of_sequence = !fetches.loads.is_empty();
            let queue = if of_sequence { &mut fetches.loads } else { &mut fetches.prefetches };
            let Some(&Want { from, waiter }) = queue.front() else { return };
            let (Some(host), Some(storage)) = (&mut self.host, &mut self.storage) else { return };
            let key = waiter.key();
            let busy = self.flights.in_flight(Direction::Fetch)
                >= self.storage_config.map_or(0, |c| c.max_fetches as usize);
            let gone = !is_wanted(&self.sequences, &self.prefetches, &waiter)
                || storage.find(key.0, &key.1) != Some(from);
            if gone {
                queue.pop_front();
                storage.unpin(from);
                self.lost(waiter);
            } else if let Some(slot) = host.find(key.0, &key.1) {
                queue.pop_front();
                storage.unpin(from);
                self.arrived(waiter, slot);
            } else if let Some(slot) = host.receiving(key.0, &key.1) {
                queue.pop_front();
                storage.unpin(from);
                self.fetches.waiters.entry(slot.into()).or_default().push(waiter);
            } else if busy || !storage.lets_through() {
                return;
            } else {
                let tenant = tenant_of(&self.sequences, &self.prefetches, &waiter);
                match host.reserve(
                    key,
                    waiter.index() as u32,
                    Source { block: NULL, entry: storage.entry(from), tenant },
                    &mut self.events,
                ) {
                    // Found above.
                    Reserved::Held => return,
                    Reserved::New(slot) => {
                        queue.pop_front();
                        // Its pin goes on as the transfer's.
                        storage.started();
                        host.settle(key.0, &key.1, NULL);
                        self.flights.start(
                            Path::Fetch { from, to: slot },
                            key,
                            waiter.index(),
                            None,
                        );
                        self.stats.of(Direction::Fetch).started += 1;
                        self.fetches.waiters.entry(slot.into()).or_default().push(waiter);
                    }
                    Reserved::Full if self.flights.len() > 0 => return,
                    // Nothing is under way that could make room: it is computed instead.
                    Reserved::Full => {
                        queue.pop_front();
                        storage.unpin(from);
                        self.lost(waiter);
                    }
                }
            }
        }
    }

    pub(super) fn pump_persists(&mut self) {
        let (Some(host), Some(storage), Some(config)) =
            (&mut self.host, &mut self.storage, &self.storage_config)
        else {
            self.to_persist.clear();
            return;
        };
        while self.flights.in_flight(Direction::Persist) < config.max_persists as usize
            && storage.lets_through()
            && let Some(slot) = self.to_persist.pop_front()
        {
            let Some((group, hash, index)) = host.to_persist(slot) else { continue };
            let (entry, tenant) = (host.entry(slot), host.tenant_of(slot));
            let source = Source { block: NULL, entry, tenant };
            match storage.reserve((group, hash), index, source, &mut self.events) {
                Reserved::Held => {}
                Reserved::New(to) => {
                    host.pin(slot);
                    storage.started();
                    let path = Path::Persist { from: slot, to };
                    self.flights.start(path, (group, hash), index as usize, None);
                    self.stats.of(Direction::Persist).started += 1;
                }
                Reserved::Full => {
                    self.to_persist.push_front(slot);
                    return;
                }
            }
        }
    }

    /// A host slot is no longer being written: who waited for it goes on.
    pub(super) fn slot_written(&mut self, slot: HostSlot) {
        let waiters = self.fetches.waiters.remove(&slot.into()).unwrap_or_default();
        let resident = self.host.as_ref().is_some_and(|host| host.is_resident(slot));
        for waiter in waiters {
            match resident {
                true => self.arrived(waiter, slot),
                false => self.lost(waiter),
            }
        }
        if resident && self.storage_config.is_some() {
            self.to_persist.push_back(slot);
        }
    }

    /// A wanted block is on the host.
    fn arrived(&mut self, waiter: Waiter, slot: HostSlot) {
        match waiter {
            Waiter::Load(load) => {
                if is_wanted(&self.sequences, &self.prefetches, &waiter) {
                    self.onboard(&load, slot);
                } else {
                    self.device.pool.unpin(load.block);
                }
            }
            Waiter::Prefetch { seq, generation, .. } => {
                if let (Some(prefetch), Some(host)) =
                    (self.prefetches.get_mut(seq, generation), &mut self.host)
                {
                    host.pin(slot);
                    prefetch.arrived(slot);
                }
            }
        }
    }

    /// A wanted block will not come.
    fn lost(&mut self, waiter: Waiter) {
        match waiter {
            Waiter::Load(load) => {
                self.device.pool.unpin(load.block);
                if let Some(sequence) = self.sequences.get_mut(&load.seq)
                    && sequence.generation == load.generation
                {
                    sequence.pending -= 1;
                }
                self.load_ended(&load, false);
            }
            Waiter::Prefetch { seq, generation, .. } => {
                if let Some(prefetch) = self.prefetches.get_mut(seq, generation) {
                    prefetch.lost();
                }
            }
        }
    }

    /// Gives up what has not begun to be fetched.
    pub(super) fn give_up_fetches(&mut self) {
        let Fetches { loads, prefetches, .. } = &mut self.fetches;
        let wants: Vec<Want> = loads.drain(..).chain(prefetches.drain(..)).collect();
        for Want { from, waiter } in wants {
            if let Some(storage) = &mut self.storage {
                storage.unpin(from);
            }
            self.lost(waiter);
        }
    }

    /// Drops tiers that were detached, once nothing uses them.
    pub(super) fn forget_drained(&mut self) {
        if self.storage_config.is_none() && self.storage.as_ref().is_some_and(|s| s.used() == 0) {
            self.storage = None;
        }
        if self.config.host.is_none() && self.host.as_ref().is_some_and(|host| host.used() == 0) {
            self.host = None;
        }
    }
}

/// Whose quotas a block counts for.
fn tenant_of(
    sequences: &CheapMap<SeqId, Sequence>,
    prefetches: &Prefetches,
    waiter: &Waiter,
) -> TenantId {
    match waiter {
        Waiter::Load(load) => sequences.get(&load.seq).map_or(0, |sequence| sequence.tenant),
        Waiter::Prefetch { seq, .. } => prefetches.tenant(*seq),
    }
}

/// Whether who waits is still there.
fn is_wanted(
    sequences: &CheapMap<SeqId, Sequence>,
    prefetches: &Prefetches,
    waiter: &Waiter,
) -> bool {
    match waiter {
        Waiter::Load(load) => {
            sequences.get(&load.seq).is_some_and(|s| s.generation == load.generation)
        }
        Waiter::Prefetch { seq, generation, .. } => prefetches.is_live(*seq, *generation),
    }
}
