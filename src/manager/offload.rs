//! What is written to the host tier, and when: blocks are offered as they are computed (write-through, all or
//! those that are used again), or stored before they are evicted from the device (write-back).

use std::collections::HashSet;

use super::table::Table;
use super::tiers::slots::{Reserved, Source};
use super::*;

/// Blocks behind those that are to be reused now that write-back stores ahead of their turn.
const CLEAN_AHEAD: usize = 64;

/// The parts of the manager that an offer changes besides its tiers.
pub(super) type OfferParts<'a> =
    (&'a mut Flights, &'a mut Events, &'a mut Stats, &'a mut VecDeque<HostSlot>);

/// Offers a sequence's computed and cached blocks to the host: by prefix, all groups together, so that what a
/// small tier holds of a sequence is of use to every group. A sequence never gets more slots than there
/// are, so that its end cannot push out its start. What finds no room is offered again with the next step. Of
/// what only the end of the sequence can need, nothing is offered before it has ended.
pub(super) fn offer(
    groups: &[Group],
    policy: &Policy,
    config: &HostConfig,
    device: &mut DeviceTier,
    host: &mut SlotTier,
    (flights, events, stats, to_persist): OfferParts<'_>,
    sequence: &mut Sequence,
) {
    if config.write == WritePolicy::Back {
        return;
    }
    let mut stored: usize = sequence.rows.iter().map(|row| row.stored.len()).sum();
    let mut parts = (flights, events, stats, to_persist);
    while stored < host.capacity() {
        let ends = groups
            .iter()
            .zip(&sequence.rows)
            .enumerate()
            .map(|(g, (group, row))| ((row.offered + 1) * group.block_size, g));
        let Some((_, g)) = ends.filter(|&(end, _)| end <= sequence.computed).min() else { return };
        let b = sequence.rows[g].offered;
        sequence.rows[g].offered += 1;
        if !policy.offers(&groups[g], &sequence.boundaries, b) {
            continue;
        }
        match offer_block(config, device, host, &mut parts, sequence, (g, b)) {
            Offered::Not => {}
            Offered::Stored => stored += 1,
            Offered::Refused => {
                sequence.rows[g].offered = b;
                return;
            }
        }
    }
}

/// What became of a block that was offered.
#[derive(PartialEq, Eq)]
pub(super) enum Offered {
    /// It is not findable, or has not been used often enough.
    Not,
    Stored,
    Refused,
}

/// Offers block `b` of a row.
pub(super) fn offer_block(
    config: &HostConfig,
    device: &mut DeviceTier,
    host: &mut SlotTier,
    (flights, events, stats, to_persist): &mut OfferParts<'_>,
    sequence: &mut Sequence,
    (g, b): (usize, usize),
) -> Offered {
    let uses = match config.write {
        WritePolicy::Through => 1,
        WritePolicy::Selective { uses } => uses,
        WritePolicy::Back => return Offered::Not,
    };
    let row = &mut sequence.rows[g];
    let id = row.table.get(b);
    let block = device.pool.block_mut(id);
    if !block.cached {
        return Offered::Not;
    }
    if u32::from(block.uses) + 1 < uses {
        block.uses = block.uses.saturating_add(1);
        return Offered::Not;
    }
    let (hash, settled) = (block.hash, block.settled);
    let room =
        flights.in_flight(Direction::Offload) < config.max_offloads as usize && host.lets_through();
    let source = Source { block: id, entry: device.pool.order.entry(id), tenant: sequence.tenant };
    let reserved = match room {
        true => host.reserve((g, hash), b as u32, source, events),
        false => Reserved::Full,
    };
    match reserved {
        Reserved::Held => {}
        Reserved::New(slot) => {
            host.started();
            device.pool.pin(id);
            flights.start(Path::Offload { from: id, to: slot }, (g, hash), b, None);
            stats.of(Direction::Offload).started += 1;
        }
        Reserved::Full => {
            stats.offloads_refused += 1;
            return Offered::Refused;
        }
    }
    if settled {
        to_persist.extend(host.settle(g, &hash, id));
    }
    row.stored.push(b as u32);
    Offered::Stored
}

/// Notes that a sequence's tokens up to `settled` are settled: the blocks it has computed are findable by their
/// fronts, and copies of them are good for storage. What it hit is for whoever computed that to vouch for.
pub(super) fn vouch(
    groups: &[Group],
    device: &mut DeviceTier,
    mut host: Option<&mut SlotTier>,
    to_persist: &mut VecDeque<HostSlot>,
    events: &mut Events,
    sequence: &mut Sequence,
    settled: usize,
) {
    let hashes = sequence.tokens.hashes();
    for (g, (group, row)) in groups.iter().zip(&mut sequence.rows).enumerate() {
        let end = (settled / group.block_size).min(row.table.len());
        for b in row.settled..end {
            let id = row.table.get(b);
            let block = device.pool.block_mut(id);
            if !block.cached {
                continue;
            }
            block.settled = true;
            if let Some(host) = &mut host {
                to_persist.extend(host.settle(g, &block.hash, id));
            }
            if group.fronts {
                device.insert_fronts(id, &hashes[group.front_indices(b)], events);
            }
        }
        row.settled = row.settled.max(end);
    }
}

impl Manager {
    /// Under write-back, makes sure that the next `fresh` blocks to be reused, apart from `hits`, hold nothing
    /// that the host should have first: starts storing what they hold, and some of what stands behind them.
    ///
    /// # Errors
    /// `NoFreeBlocks` while such blocks are being stored, or wait for their turn: no block has been taken.
    pub(super) fn clean(&mut self, op: &'static str, fresh: usize, hits: &[Table]) -> Result<()> {
        let (Some(host), Some(HostConfig { write: WritePolicy::Back, max_offloads, .. })) =
            (&mut self.host, &self.config.host)
        else {
            return Ok(());
        };
        if fresh == 0 {
            return Ok(());
        }
        let Self { device, flights, events, stats, cleaning, .. } = self;
        let unused = |id: &BlockId| device.pool.is_available(*id);
        let hits: HashSet<BlockId> = hits.iter().flat_map(Table::ids).filter(unused).collect();
        cleaning.clear();
        let next = device
            .pool
            .queue()
            .filter(|id| !hits.contains(id))
            .take(fresh.saturating_add(CLEAN_AHEAD))
            .enumerate()
            .filter(|&(_, id)| {
                let block = device.pool.block(id);
                let group = block.group as usize;
                block.cached && !block.written_back && !host.holds(group, &block.hash)
            });
        cleaning.extend(next);
        let (mut waiting, mut dropped) = (0, 0);
        for &(position, id) in cleaning.iter() {
            let block = *device.pool.block(id);
            let key = (block.group as usize, block.hash);
            if flights.in_flight(Direction::Offload) >= *max_offloads as usize {
                waiting += usize::from(position < fresh);
                continue;
            }
            let reserved = match host.lets_through() {
                true => host.reserve(
                    key,
                    block.index,
                    Source { block: id, entry: device.pool.order.entry(id), tenant: block.tenant },
                    events,
                ),
                false => Reserved::Full,
            };
            match reserved {
                // A twin of a block before it.
                Reserved::Held => {}
                Reserved::New(slot) => {
                    host.started();
                    if block.settled {
                        host.settle(key.0, &key.1, id);
                    }
                    device.pool.block_mut(id).written_back = true;
                    device.pool.pin(id);
                    flights.start(
                        Path::Offload { from: id, to: slot },
                        key,
                        block.index as usize,
                        None,
                    );
                    stats.of(Direction::Offload).started += 1;
                    waiting += usize::from(position < fresh);
                }
                Reserved::Full => dropped += u64::from(position < fresh),
            }
        }
        if waiting > 0 {
            stats.refused += 1;
            let free = device.pool.available().saturating_sub(hits.len());
            let free = free.min(fresh.saturating_sub(waiting));
            return Err(Error::new(op, ErrorKind::NoFreeBlocks { needed: fresh, free }));
        }
        stats.evictions_dropped += dropped;
        Ok(())
    }

    /// Under write-back, a block that was to be evicted and could not be stored is dropped: it would wait
    /// for ever for a host that takes nothing.
    pub(super) fn drop_evicted(&mut self, id: BlockId) {
        let block = *self.device.pool.block(id);
        let back = self.config.host.as_ref().is_some_and(|host| host.write == WritePolicy::Back);
        if back && block.cached && block.users == 0 {
            self.device.remove(id, &mut self.events);
            self.stats.evictions_dropped += 1;
        }
    }
}
