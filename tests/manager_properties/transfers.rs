//! Transfers of a world, which end in any order and fail, and its tiers, which come and go.

use std::collections::HashSet;

use hybridkv::manager::{
    BreakerConfig, Completion, Direction, Eviction, Outcome, Path, Place, StorageConfig, Tier,
};
use proptest::prelude::*;

use super::world::{Check, Flight, GARBAGE, KEYS, Named, World};

impl World {
    /// Copies what was emitted, and starts all emitted transfers: until they succeed their targets hold
    /// garbage.
    pub fn start_transfers(&mut self) -> Check {
        while let Some(copy) = self.m.next_copy() {
            self.device[copy.to as usize] = self.device[copy.from as usize];
        }
        while let Some(transfer) = self.m.next_transfer() {
            if self.prefixes.named(&transfer.hash).is_none() {
                let between = [Direction::Offload, Direction::Onboard];
                prop_assert!(
                    between.contains(&transfer.path.direction()),
                    "a transfer of a hash that nothing has"
                );
                self.private.insert(transfer.hash);
            }
            let source = *self.place(transfer.path.from());
            *self.place(transfer.path.to()) = GARBAGE;
            self.flying.push(Flight { transfer, source });
        }
        Ok(())
    }

    /// Blocks on their way into a lower tier.
    pub fn writing(&self) -> Named {
        let named = |flight: &Flight| {
            let tier = match flight.transfer.path {
                Path::Offload { .. } | Path::Fetch { .. } => Tier::Host,
                Path::Persist { .. } => Tier::Storage,
                Path::Onboard { .. } => return None,
            };
            let node = self.prefixes.named(&flight.transfer.hash)?;
            Some((tier, flight.transfer.group as usize, node))
        };
        self.flying.iter().filter_map(named).collect()
    }

    /// Ends a call of the manager, before which the blocks `writing` were on their way: hears what became of
    /// sequences, replays the events, and starts what was emitted. The device has lost no more blocks than were
    /// `taken` or taken by repairs. Gives whether anything was heard.
    pub fn end_of_call(&mut self, writing: &Named, taken: usize) -> Check<bool> {
        let told: Vec<Completion> = std::iter::from_fn(|| self.m.next_completion()).collect();
        let mut again = 0;
        for completion in &told {
            again += self.hear(*completion)?;
        }
        let lost = self.replay_events(writing)?;
        // Of a block that is found by its fronts each of them is.
        let keys = self.groups().map(|g| self.size(g) / self.unit).max().unwrap_or(1);
        let most = (taken + again) * keys;
        prop_assert!(lost <= most, "{} keys dropped for {} blocks taken", lost, taken + again);
        self.start_transfers()?;
        Ok(!told.is_empty())
    }

    /// Notes what became of a sequence; gives the most blocks that were taken for it.
    fn hear(&mut self, completion: Completion) -> Check<usize> {
        match completion {
            Completion::Pending => Ok(0),
            Completion::Ready { seq, valid_tokens } => {
                // Freed before it was told.
                let Some(sequence) = self.sequences.get_mut(&seq) else { return Ok(0) };
                prop_assert!(!sequence.ready && valid_tokens <= sequence.computed);
                if let Some(done) = sequence.trial.take() {
                    prop_assert_eq!(valid_tokens, sequence.computed);
                    sequence.ready = true;
                    self.carry_out(done)?;
                    return Ok(0);
                }
                sequence.repaired = valid_tokens < sequence.computed;
                let again = sequence.computed - valid_tokens;
                (sequence.computed, sequence.settled) = (valid_tokens, valid_tokens);
                sequence.finished = sequence.finished.min(valid_tokens);
                sequence.resumed = sequence.resumed.min(valid_tokens);
                sequence.ready = true;
                // A resumed one may have ended inside of a block.
                let blocks = |size: u32| again.div_ceil(size as usize) + usize::from(again > 0);
                Ok(self.config.groups.iter().map(|group| blocks(group.block_size)).sum())
            }
            Completion::Dropped { seq } | Completion::Void { seq } => {
                let void = matches!(completion, Completion::Void { .. });
                let known = self.sequences.remove(&seq);
                prop_assert!(known.is_none_or(|s| !s.ready && s.trial.is_some() == void));
                Ok(0)
            }
        }
    }

    pub fn complete(&mut self, at: usize, outcome: Outcome) -> Check {
        let writing = self.writing();
        let Flight { transfer, source } = self.flying.swap_remove(at);
        if outcome == Outcome::Succeeded {
            // A source that changed under the copy gives anything.
            let is_whole = *self.place(transfer.path.from()) == source;
            *self.place(transfer.path.to()) = if is_whole { source } else { GARBAGE };
        }
        let (group, node) = (transfer.group as usize, self.prefixes.named(&transfer.hash));
        let target = match transfer.path.to() {
            Place::Device(_) => None,
            Place::Host(_) => node.map(|node| (Tier::Host, node)),
            Place::Storage(_) => node.map(|node| (Tier::Storage, node)),
        };
        let was_there = target.is_some_and(|(tier, node)| self.finds(&[tier], group, node));
        let written = *self.place(transfer.path.to());
        if let (Outcome::Failed, Some(node)) = (outcome, node) {
            // What a tier cannot give is gone from it.
            let from = match transfer.path.direction() {
                Direction::Onboard => Some(Tier::Host),
                Direction::Fetch => Some(Tier::Storage),
                Direction::Offload | Direction::Persist => None,
            };
            self.void.extend(from.map(|tier| (tier, group, node)));
        }
        let completion = self.m.complete(transfer.id, outcome).unwrap();
        // What could not be written back leaves, as it was to.
        let failed = transfer.path.direction() == Direction::Offload && outcome == Outcome::Failed;
        let dropped = usize::from(self.writes_back() && failed);
        let again = self.hear(completion)?;
        self.end_of_call(&writing, dropped + again)?;
        if let Some((tier, node)) = target
            && !was_there
            && self.finds(&[tier], group, node)
        {
            prop_assert_eq!(outcome, Outcome::Succeeded);
            let (filled, content) = (self.filled(group, node), self.content(group, node));
            prop_assert_eq!(&written[..filled], &content[..filled], "something else is stored");
        }
        prop_assert!(self.m.complete(transfer.id, outcome).is_err(), "answered twice");
        Ok(())
    }

    /// Ends all transfers, out of order; bit `n % 8` of `failures` says whether the nth fails.
    pub fn complete_all(&mut self, failures: u8) -> Check {
        for n in 0.. {
            if self.flying.is_empty() {
                break;
            }
            let fails = failures >> (n % 8) & 1 == 1;
            let outcome = if fails { Outcome::Failed } else { Outcome::Succeeded };
            self.complete(n * 5 % self.flying.len(), outcome)?;
        }
        Ok(())
    }

    /// Attaches the tiers that are not there, as far as what was there before has been drained.
    pub fn attach(&mut self, storage: Option<(u32, Eviction)>) {
        if let Some(host) = &self.config.host
            && self.m.attach_host(host.clone()).is_ok()
        {
            self.host = vec![GARBAGE; host.num_slots as usize];
        }
        let Some((num_slots, eviction)) = storage else { return };
        let config = StorageConfig {
            eviction,
            max_fetches: 1 + num_slots / 4,
            max_persists: 1 + num_slots / 3,
            prefetch_threshold: 1,
            breaker: BreakerConfig { failures: u32::MAX, retry_ns: 1 },
            ..StorageConfig::new(num_slots)
        };
        if self.m.attach_storage(config, &[]).is_ok() {
            self.storage = vec![GARBAGE; num_slots as usize];
        }
    }

    pub fn detach_storage(&mut self) -> Check {
        let writing = self.writing();
        self.m.detach_storage();
        self.end_of_call(&writing, 0)?;
        prop_assert!(self.found[&Tier::Storage].is_empty());
        Ok(())
    }

    pub fn detach_host(&mut self) -> Check {
        let writing = self.writing();
        self.m.detach_host();
        self.prefetched = None;
        self.end_of_call(&writing, 0)?;
        prop_assert!(self.found[&Tier::Host].is_empty() && self.private_on_host.is_empty());
        Ok(())
    }

    /// Prefetches for the sequence to come.
    pub fn prefetch(&mut self, prompt: &[u32], keys: usize) -> Check {
        self.path(KEYS[keys], prompt)?;
        let hashed = self.m.hash(prompt, KEYS[keys]);
        let writing = self.writing();
        let begun = self.m.prefetch(self.next, &hashed, self.now);
        prop_assert_eq!(begun.is_err(), self.prefetched.is_some());
        if begun.is_ok_and(|begun| begun.blocks > 0) {
            self.prefetched = Some(self.next);
        }
        self.end_of_call(&writing, 0)?;
        Ok(())
    }

    pub fn tick(&mut self) -> Check {
        let writing = self.writing();
        self.now += 700_000_000;
        let over = self.m.poll_prefetch(self.now).unwrap();
        prop_assert!(over.iter().all(|&seq| self.prefetched == Some(seq)));
        self.end_of_call(&writing, 0)?;
        Ok(())
    }

    pub fn reset(&mut self) -> Check {
        let idle = self.m.free_blocks() == self.m.capacity();
        prop_assert_eq!(self.m.reset_prefix_cache(), idle);
        if idle {
            self.prefetched = None;
        }
        self.end_of_call(&HashSet::new(), 0)?;
        let empty = self.found.values().all(|found| found.is_empty());
        prop_assert!(!idle || empty);
        Ok(())
    }
}
