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

/// Tiers that serve a hit together: the device alone, with the host, and with storage, too.
const LEVELS: usize = 3;

impl Search<'_> {
    /// The block of the device that has what a prefix of `tokens` has of block `b`.
    fn on_device(&self, g: usize, b: usize, tokens: usize) -> BlockId {
        self.device.find(g, &self.hashes[self.groups[g].key_index_in(b, tokens)])
    }

    fn lies_in(&self, tier: Option<&SlotTier>, g: usize, b: usize, tokens: usize) -> bool {
        let key = self.groups[g].key_index_in(b, tokens);
        tier.is_some_and(|tier| tier.find(g, &self.hashes[key]).is_some())
    }

    /// Whether the tiers of a level have it.
    fn is_at(&self, level: usize, g: usize, b: usize, tokens: usize) -> bool {
        self.on_device(g, b, tokens) != NULL
            || level >= 1 && self.lies_in(self.host, g, b, tokens)
            || level >= 2 && self.lies_in(self.storage, g, b, tokens)
    }

    /// The blocks that a hit of `tokens` must load.
    fn candidate(&self, tokens: usize) -> Candidate {
        let mut candidate = Candidate { hit_tokens: tokens, ..Candidate::default() };
        for (g, group) in self.groups.iter().enumerate() {
            for b in group.needed(tokens).filter(|&b| self.on_device(g, b, tokens) == NULL) {
                candidate.onboards += 1;
                candidate.fetches += usize::from(!self.lies_in(self.host, g, b, tokens));
            }
        }
        candidate
    }

    /// How much of a hit to use, given how much of it is on the device, on device and host, and anywhere.
    fn worthwhile(&self, levels: [usize; LEVELS]) -> usize {
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

    /// The whole blocks of a full group up to `limit` tokens, those of the device by their ids, and how many of them
    /// each level has.
    fn whole(&self, g: usize, limit: usize, row: &mut Table) -> [usize; LEVELS] {
        let end = limit / self.groups[g].block_size;
        row.reserve(end, end);
        let (mut device_end, mut host_end) = (None, None);
        for b in 0..end {
            let id = self.on_device(g, b, limit);
            if id == NULL {
                device_end.get_or_insert(b);
                if !self.lies_in(self.host, g, b, limit) {
                    host_end.get_or_insert(b);
                    if !self.lies_in(self.storage, g, b, limit) {
                        break;
                    }
                }
            }
            row.push(id);
        }
        let all = row.len();
        [device_end.unwrap_or(all), host_end.unwrap_or(all), all]
    }

    /// The joint hit of at most `limit` tokens.
    pub fn run(&self, limit: usize) -> Found {
        let limit = align_down(limit, self.alignment);
        let empty = |group: &Group| Table::new(group.sink_blocks, 0, 0);
        let mut rows: Vec<Table> = self.groups.iter().map(empty).collect();

        // Full groups are looked up once: a prefix of their hit is a hit, but for where it ends inside of a block.
        let (mut full, mut looked_up) = ([limit; LEVELS], Vec::new());
        for (g, group) in self.groups.iter().enumerate().filter(|(_, group)| group.is_full()) {
            let whole = self.whole(g, full[LEVELS - 1], &mut rows[g]);
            for (full, whole) in full.iter_mut().zip(whole) {
                let end = match group.fronts {
                    true => (whole + 1) * group.block_size - 1,
                    false => whole * group.block_size,
                };
                *full = align_down((*full).min(end), self.alignment);
            }
            looked_up.push((g, whole));
        }
        let any_full = !looked_up.is_empty();
        looked_up.retain(|&(g, _)| self.groups[g].fronts);
        let whole = |level: usize, g: usize| {
            let found = looked_up.iter().find(|&&(of, _)| of == g);
            found.map_or(0, |(_, whole)| whole[level])
        };
        let present = |level: usize| {
            let whole = &whole;
            move |g: usize, b: usize, tokens: usize| {
                b < whole(level, g) && (b + 1) * self.groups[g].block_size <= tokens
                    || self.is_at(level, g, b, tokens)
            }
        };
        let groups = || self.groups.iter().enumerate();
        let fronts = || groups().filter(|(_, group)| group.is_full() && group.fronts);
        for (level, full) in full.iter_mut().enumerate() {
            *full = fixed_point(fronts(), *full, self.alignment, present(level));
        }
        let others = || groups().filter(|(_, group)| !group.is_full() || group.fronts);
        let joint =
            |level: usize| fixed_point(others(), full[level], self.alignment, present(level));
        let device_tokens = joint(0);
        let host_tokens = match self.host {
            Some(_) if device_tokens < full[1] => joint(1),
            _ => device_tokens,
        };
        let all_tokens = match self.storage {
            Some(_) if host_tokens < full[2] => joint(2),
            _ => host_tokens,
        };
        let tokens = self.worthwhile([device_tokens, host_tokens, all_tokens]);
        let host_tokens = host_tokens.min(tokens);

        for (g, group) in groups() {
            if group.is_full() {
                rows[g].truncate(tokens / group.block_size);
                if !tokens.is_multiple_of(group.block_size) {
                    rows[g].push(self.on_device(g, tokens / group.block_size, tokens));
                }
                continue;
            }
            let tail = group.tail(tokens);
            rows[g] = Table::new(group.sink_blocks, tail.start, tail.end);
            for b in group.needed(tokens) {
                rows[g].replace(b, self.on_device(g, b, tokens));
            }
        }
        let full = full[LEVELS - 1];
        let junction = if any_full && full > tokens { full } else { 0 };
        Found { tokens, device_tokens, host_tokens, junction, rows }
    }
}

/// The longest prefix of at most `tokens` (aligned) of which all that is needed is `present` in every one of the
/// numbered groups, asked by group, block and length: shrinks `tokens` until no group wants it shorter. The minimum of independent hits would
/// be wrong: a shorter prefix can need blocks that the longer one did not.
pub(super) fn fixed_point<'a>(
    groups: impl Iterator<Item = (usize, &'a Group)> + Clone,
    mut tokens: usize,
    alignment: usize,
    present: impl Fn(usize, usize, usize) -> bool,
) -> usize {
    loop {
        let before = tokens;
        for (g, group) in groups.clone() {
            tokens = group.longest(tokens, alignment, |b, n| present(g, b, n));
        }
        if tokens == before {
            return tokens;
        }
    }
}
