//! What holds at every moment, whatever has happened.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use hybridkv::manager::{BlockId, Place, Tier};
use hybridkv::spec::{AttentionKind, GroupKind};
use proptest::prelude::*;

use super::world::{Check, Sequence, World};
use super::{LONGEST_LOOKAHEAD, sees};

impl World {
    /// Whether a prefix that is to stay findable needs block `b`.
    fn retained(&self, g: usize, prompt: usize, b: usize) -> bool {
        let retention = &self.config.retention;
        let all = match self.config.groups[g].kind {
            GroupKind::Attention(AttentionKind::Full) => true,
            GroupKind::Attention(AttentionKind::Chunked { .. }) => retention.dense_chunks,
            _ => false,
        };
        let step = retention.interval.map_or(self.alignment, |k| k as usize);
        let replay = (prompt - 1) / self.alignment * self.alignment;
        let boundary = |n: usize| n == replay || step > 0 && n.is_multiple_of(step);
        // Every sequence may end where it is.
        let generated = (b + 1) * self.size(g) > replay;
        let ends = retention.ends && !self.is_state(g) && generated;
        let mut lengths = (0..self.needed[g].len()).step_by(self.alignment);
        all || ends || lengths.any(|n| boundary(n) && self.needed[g][n].contains(&b))
    }

    /// Whether a table is to hold block `b` now; `None`: it may.
    fn holds(&self, g: usize, sequence: &Sequence, b: usize) -> Option<bool> {
        let (size, rule) = (self.size(g), &self.config.groups[g]);
        let (start, end) = (b * size, (b + 1) * size);
        let live = end > sequence.settled
            || start < rule.sink_tokens as usize
            || (start..end).any(|j| sees(rule, sequence.settled, j));
        // Of states only those at the slot and at checkpoints are kept, and no older one.
        // On trial nothing is freed.
        let kept = !live && sequence.trial.is_some();
        (!kept && (!self.is_state(g) || !live)).then_some(live)
    }

    pub fn check(&mut self) -> Check {
        // Who holds what.
        let mut users: BTreeMap<BlockId, u32> = BTreeMap::new();
        let mut holders: HashMap<BlockId, (usize, usize, &Sequence)> = HashMap::new();
        for (&seq, sequence) in self.sequences.iter().filter(|(_, s)| !s.swapped) {
            for g in self.groups() {
                let size = self.size(g);
                let table = self.m.table(seq, g).unwrap();
                if self.is_state(g) && sequence.ready && sequence.computed > 0 {
                    let slot = table[(sequence.computed - 1) / size..].iter().any(|&id| id != 0);
                    prop_assert!(slot, "the state of what is computed is nowhere");
                }
                for (b, &id) in table.iter().enumerate() {
                    let end = (b + 1) * size;
                    let right = self.holds(g, sequence, b).is_none_or(|holds| holds == (id != 0));
                    prop_assert!(right, "block {} of group {} of {}: {}", b, g, seq, id);
                    if id == 0 {
                        continue;
                    }
                    *users.entry(id).or_default() += 1;
                    let (group, index, other) = *holders.entry(id).or_insert((g, b, sequence));
                    let last = end.min(sequence.path.len()).min(other.path.len()).checked_sub(1);
                    let same = last.is_none_or(|last| sequence.path[last] == other.path[last]);
                    prop_assert!((group, index) == (g, b) && same, "different blocks in one place");
                    let Some(&node) = sequence.path.get(end - 1) else { continue };
                    let owed = sequence.ready
                        && !sequence.repaired
                        && end > sequence.resumed
                        && end <= sequence.tokens.len() / self.alignment * self.alignment
                        && !self.forgotten.contains(&id)
                        && self.retained(g, sequence.prompt, b);
                    let findable = self.finds(&[Tier::Device], g, node);
                    prop_assert!(findable || !owed, "block {} of group {} is not kept", b, g);
                }
            }
        }
        for &id in self.pins.values().flat_map(|pin| &pin.ids) {
            *users.entry(id).or_default() += 1;
        }
        for (&seq, sequence) in &self.sequences {
            // One bound of sizing and admission, whatever was looked ahead.
            let held = self.groups().flat_map(|g| self.table(seq, g)).filter(|&id| id != 0);
            let most = self.m.max_blocks(sequence.tokens.len() + LONGEST_LOOKAHEAD);
            prop_assert!(held.count() <= most, "more blocks than the bound says");
        }
        self.forgotten.retain(|id| users.contains_key(id));
        let busy: BTreeSet<BlockId> = users
            .keys()
            .copied()
            .chain(self.flying.iter().filter_map(|flight| flight.transfer.path.block()))
            .collect();
        prop_assert_eq!(self.m.ref_counts(), users.into_iter().collect::<Vec<_>>());
        let queue = self.m.free_queue();
        let free: BTreeSet<BlockId> = queue.iter().copied().collect();
        prop_assert!(queue.len() == free.len() && free.len() == self.m.free_blocks());
        prop_assert!(free.is_disjoint(&busy), "free and in use");
        let usage = self.m.usage();
        // A block may wait for its fetch after its sequence has gone.
        let waiting = self.m.capacity().checked_sub(free.len() + busy.len());
        let fetches = usage.storage_pinned > 0;
        prop_assert!(waiting == Some(0) || waiting.is_some() && fetches, "conservation");
        prop_assert_eq!(self.m.transfers_in_flight(), self.flying.len());
        let swapped = self.sequences.values().filter(|sequence| sequence.swapped).count();
        prop_assert_eq!(self.m.preempted(), swapped);

        // The mirror is the index.
        for g in self.groups() {
            let (mut blocks, mut fronts) = (BTreeMap::new(), BTreeMap::new());
            for (&(group, node), &copies) in &self.found[&Tier::Device] {
                if group == g {
                    let index = (self.prefixes.len(node) - 1) / self.size(g);
                    let whole = self.filled(g, node) == self.size(g);
                    let of = if whole { &mut blocks } else { &mut fronts };
                    *of.entry(index as u32).or_insert(0) += copies;
                }
            }
            // Blocks by index, and those that are unfinished under the key of a front.
            let cached = self.m.cached_indices(g);
            prop_assert_eq!(usage.device_cached[g], cached.len());
            for index in cached {
                let whole = blocks.get_mut(&index).filter(|copies| **copies > 0);
                let Some(copies) = whole.or(fronts.get_mut(&index).filter(|n| **n > 0)) else {
                    return Err(TestCaseError::fail("cached and not announced"));
                };
                *copies -= 1;
            }
            prop_assert!(blocks.values().all(|&copies| copies == 0), "announced and not cached");
            let below = |tier| self.found[&tier].keys().filter(|&&(group, _)| group == g).count();
            let private = self.private_on_host.iter().filter(|&&(group, _)| group == g).count();
            let cached = |cached: &[usize]| cached.get(g).copied().unwrap_or(0);
            prop_assert_eq!(cached(&usage.host_cached), below(Tier::Host) + private);
            prop_assert_eq!(cached(&usage.storage_cached), below(Tier::Storage));
        }

        // Lower tiers hold what is findable there and what transfers, prefetches and preempted sequences use.
        let (mut slots, mut stored) = (BTreeSet::new(), BTreeSet::new());
        for flight in &self.flying {
            let path = flight.transfer.path;
            for place in [path.from(), path.to()] {
                match place {
                    Place::Host(slot) => drop(slots.insert(slot)),
                    Place::Storage(slot) => drop(stored.insert(slot)),
                    Place::Device(_) => {}
                }
            }
        }
        let more = swapped > 0 || self.prefetched.is_some() || self.pinned_in(Tier::Host) > 0;
        let pinned = usage.host_pinned;
        prop_assert!(pinned >= self.findable_pinned_in(Tier::Host));
        prop_assert!(pinned == slots.len() || more && pinned > slots.len(), "{} pinned", pinned);
        let least = stored.len().max(self.findable_pinned_in(Tier::Storage));
        prop_assert!(usage.storage_pinned >= least);
        let on_host = self.found[&Tier::Host].len() + self.private_on_host.len();
        let used = usage.host_used;
        prop_assert!(used <= usage.host_capacity && (on_host..=on_host + pinned).contains(&used));
        let (in_storage, used) = (self.found[&Tier::Storage].len(), usage.storage_used);
        let most = in_storage + usage.storage_pinned;
        prop_assert!(used <= usage.storage_capacity && (in_storage..=most).contains(&used));
        self.check_quotas()
    }

    /// Everything ends, and nothing stays in use.
    pub fn drain(&mut self) -> Check {
        self.complete_all(0)?;
        while let Some(&pin) = self.pins.keys().next() {
            self.unpin(pin)?;
        }
        self.complete_all(0)?;
        self.step(usize::MAX)?;
        let seqs: Vec<u64> = self.sequences.keys().copied().collect();
        for seq in seqs {
            self.settle_all(seq)?;
            if self.sequences.contains_key(&seq) {
                self.end(seq)?;
            }
        }
        self.complete_all(0)?;
        self.m.cancel_prefetch(self.next);
        self.prefetched = None;
        prop_assert_eq!(self.m.free_blocks(), self.m.capacity());
        let usage = self.m.usage();
        prop_assert_eq!((usage.host_pinned, usage.storage_pinned), (0, 0));
        self.check()
    }
}
