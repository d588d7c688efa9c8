//! The longest prefix that every layer group can serve.

use super::BlockId;
use super::groups::{Group, align_down};
use super::hash::BlockHash;
use super::pool::NULL;
use super::tiers::device::DeviceTier;
use super::tiers::slots::SlotTier;

/// Where to search.
pub(super) struct Search<'a> {
    pub groups: &'a [Group],
    pub alignment: usize,
    pub device: &'a DeviceTier,
    pub host: Option<&'a SlotTier>,
    /// Hashes of the prompt's units.
    pub hashes: &'a [BlockHash],
}

/// What a search found.
pub(super) struct Found {
    /// Tokens every group can serve, over all tiers.
    pub tokens: usize,
    /// Tokens every group can serve from the device.
    pub device_tokens: usize,
    /// Tokens that all full groups hold, when that is more than `tokens`; else 0.
    pub junction: usize,
    /// Per group, device blocks of the prefix; [`NULL`] where none is needed, or where it is on the host.
    pub rows: Vec<Vec<BlockId>>,
}

impl Search<'_> {
    fn on_device(&self, g: usize, b: usize) -> BlockId {
        self.device.find(g, &self.hashes[self.groups[g].key_index(b)])
    }

    fn on_host(&self, g: usize, b: usize) -> bool {
        self.host.is_some_and(|h| h.find(g, &self.hashes[self.groups[g].key_index(b)]).is_some())
    }

    /// The joint hit of at most `limit` tokens.
    pub fn run(&self, limit: usize) -> Found {
        let limit = align_down(limit, self.alignment);
        let mut rows: Vec<Vec<BlockId>> = vec![Vec::new(); self.groups.len()];

        // Full groups are looked up once: a prefix of their hit is a hit.
        let (mut full, mut full_device, mut any_full) = (limit, limit, false);
        for (g, group) in self.groups.iter().enumerate() {
            if !group.is_full() {
                continue;
            }
            any_full = true;
            let end = full / group.block_size;
            let row = &mut rows[g];
            row.reserve(end);
            let mut device_end = None;
            for b in 0..end {
                let id = self.on_device(g, b);
                if id == NULL {
                    device_end.get_or_insert(b);
                    if !self.on_host(g, b) {
                        break;
                    }
                }
                row.push(id);
            }
            full_device = full_device.min(device_end.unwrap_or(row.len()) * group.block_size);
            full = full.min(row.len() * group.block_size);
        }
        let full = align_down(full, self.alignment);
        let full_device = align_down(full_device.min(full), self.alignment);

        let windowed = self.groups.iter().enumerate().filter(|(_, g)| !g.is_full());
        let device_tokens = fixed_point(windowed.clone(), full_device, self.alignment, |g, b| {
            self.on_device(g, b) != NULL
        });
        let tokens = match self.host {
            Some(_) if device_tokens < full => {
                fixed_point(windowed, full, self.alignment, |g, b| {
                    self.on_device(g, b) != NULL || self.on_host(g, b)
                })
            }
            _ => device_tokens,
        };

        for (g, group) in self.groups.iter().enumerate() {
            let end = tokens / group.block_size;
            rows[g].resize(end, NULL);
            if !group.is_full() {
                for b in group.needed(tokens) {
                    rows[g][b] = self.on_device(g, b);
                }
            }
        }
        let junction = if any_full && full > tokens { full } else { 0 };
        Found { tokens, device_tokens, junction, rows }
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
