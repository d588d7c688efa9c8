//! The longest prefix that every layer group can serve.

use super::BlockId;
use super::groups::{Group, align_down};
use super::hash::BlockHash;
use super::pool::NULL;
use super::table::Table;
use super::tiers::device::DeviceTier;
use super::tiers::slots::SlotTier;
use super::tiers::{Candidate, CostModel};

/// Where to search.
pub(super) struct Search<'a> {
    pub groups: &'a [Group],
    pub alignment: usize,
    pub device: &'a DeviceTier,
    pub host: Option<&'a SlotTier>,
    pub storage: Option<&'a SlotTier>,
    pub worth: Worth<'a>,
    /// Hashes of the prompt's units.
    pub hashes: &'a [BlockHash],
}

/// Which hits in lower tiers are worth loading.
#[derive(Clone, Copy)]
pub(super) struct Worth<'a> {
    /// Tokens that a load must save over what the device holds.
    pub threshold: usize,
    pub cost: Option<&'a CostModel>,
    /// Tokens of the prompt.
    pub prompt: usize,
}

/// What a search found.
pub(super) struct Found {
    /// Tokens every group can serve, over all tiers that are worth it.
    pub tokens: usize,
    /// Tokens every group can serve from the device.
    pub device_tokens: usize,
    /// Those from device and host.
    pub host_tokens: usize,
    /// Tokens that all full groups hold, when that is more than `tokens`; else 0.
    pub junction: usize,
    /// Per group, device blocks of the prefix; [`NULL`] where none is needed, or where it is in a lower tier.
    pub rows: Vec<Table>,
}

impl Search<'_> {
    fn on_device(&self, g: usize, b: usize) -> BlockId {
        self.device.find(g, &self.hashes[self.groups[g].key_index(b)])
    }

    fn lies_in(&self, tier: Option<&SlotTier>, g: usize, b: usize) -> bool {
        tier.is_some_and(|t| t.find(g, &self.hashes[self.groups[g].key_index(b)]).is_some())
    }

    /// The blocks that a hit of `tokens` must load.
    fn candidate(&self, tokens: usize) -> Candidate {
        let mut candidate = Candidate { hit_tokens: tokens, ..Candidate::default() };
        for (g, group) in self.groups.iter().enumerate() {
            for b in group.needed(tokens).filter(|&b| self.on_device(g, b) == NULL) {
                candidate.onboards += 1;
                candidate.fetches += usize::from(!self.lies_in(self.host, g, b));
            }
        }
        candidate
    }

    /// How much of a hit to use, given how much of it is on the device, on device and host, and anywhere.
    fn worthwhile(&self, levels: [usize; 3]) -> usize {
        let Worth { threshold, cost, prompt } = self.worth;
        let [device, _, all] = levels;
        if all == device || all - device < threshold {
            return device;
        }
        match cost {
            Some(cost) => levels[cost.choose(prompt, &levels.map(|tokens| self.candidate(tokens)))],
            None => all,
        }
    }

    /// The joint hit of at most `limit` tokens.
    pub fn run(&self, limit: usize) -> Found {
        let limit = align_down(limit, self.alignment);
        let empty = |group: &Group| Table::new(group.sink_blocks, 0, 0);
        let mut rows: Vec<Table> = self.groups.iter().map(empty).collect();

        // Full groups are looked up once: a prefix of their hit is a hit.
        let (mut full, mut full_host, mut full_device) = (limit, limit, limit);
        let mut any_full = false;
        for (g, group) in self.groups.iter().enumerate() {
            if !group.is_full() {
                continue;
            }
            any_full = true;
            let end = full / group.block_size;
            let row = &mut rows[g];
            row.reserve(end, end);
            let (mut device_end, mut host_end) = (None, None);
            for b in 0..end {
                let id = self.on_device(g, b);
                if id == NULL {
                    device_end.get_or_insert(b);
                    if !self.lies_in(self.host, g, b) {
                        host_end.get_or_insert(b);
                        if !self.lies_in(self.storage, g, b) {
                            break;
                        }
                    }
                }
                row.push(id);
            }
            full_device = full_device.min(device_end.unwrap_or(row.len()) * group.block_size);
            full_host = full_host.min(host_end.unwrap_or(row.len()) * group.block_size);
            full = full.min(row.len() * group.block_size);
        }
        let full = align_down(full, self.alignment);
        let full_host = align_down(full_host.min(full), self.alignment);
        let full_device = align_down(full_device.min(full_host), self.alignment);

        let windowed = self.groups.iter().enumerate().filter(|(_, g)| !g.is_full());
        let on_device = |g: usize, b: usize| self.on_device(g, b) != NULL;
        let on_host = |g: usize, b: usize| on_device(g, b) || self.lies_in(self.host, g, b);
        let anywhere = |g: usize, b: usize| on_host(g, b) || self.lies_in(self.storage, g, b);
        let device_tokens = fixed_point(windowed.clone(), full_device, self.alignment, on_device);
        let host_tokens = match self.host {
            Some(_) if device_tokens < full_host => {
                fixed_point(windowed.clone(), full_host, self.alignment, on_host)
            }
            _ => device_tokens,
        };
        let all_tokens = match self.storage {
            Some(_) if host_tokens < full => fixed_point(windowed, full, self.alignment, anywhere),
            _ => host_tokens,
        };
        let tokens = self.worthwhile([device_tokens, host_tokens, all_tokens]);
        let host_tokens = host_tokens.min(tokens);

        for (g, group) in self.groups.iter().enumerate() {
            let end = tokens / group.block_size;
            if group.is_full() {
                rows[g].truncate(end);
                continue;
            }
            rows[g] = Table::new(group.sink_blocks, group.first_needed(tokens), end);
            for b in group.needed(tokens) {
                rows[g].replace(b, self.on_device(g, b));
            }
        }
        let junction = if any_full && full > tokens { full } else { 0 };
        Found { tokens, device_tokens, host_tokens, junction, rows }
    }
}

/// The longest prefix of at most `tokens` (aligned) whose needed blocks are `present` in every one of the
/// numbered groups: shrinks `tokens` until no group wants it shorter. The minimum of independent hits would
/// be wrong: a shorter prefix can need blocks that the longer one did not.
pub(super) fn fixed_point<'a>(
    groups: impl Iterator<Item = (usize, &'a Group)> + Clone,
    mut tokens: usize,
    alignment: usize,
    present: impl Fn(usize, usize) -> bool,
) -> usize {
    loop {
        let before = tokens;
        for (g, group) in groups.clone() {
            tokens = group.longest(tokens, alignment, |b| present(g, b));
        }
        if tokens == before {
            return tokens;
        }
    }
}
