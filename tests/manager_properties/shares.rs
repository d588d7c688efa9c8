//! What tiers owe to whom: pinned prefixes, and the quotas of tenants.

use std::collections::HashMap;

use hybridkv::ErrorKind;
use hybridkv::manager::{BlockId, PinId, Quota, Tier};
use proptest::prelude::*;

use super::world::{Check, KEYS, Pinned, SALTS, World};

impl World {
    /// Pins what a tier alone can serve of a prompt, to its last token: all of it or nothing.
    pub fn pin(&mut self, tier: Tier, prompt: &[u32], keys: usize) -> Check {
        // A lookup leaves the last token to be computed.
        let path = self.path(KEYS[keys], &[prompt, &[u32::MAX]].concat())?;
        let hashed = self.m.hash(prompt, KEYS[keys]);
        let tokens = self.longest(&path, &[tier]);
        let blocks: Vec<_> = self
            .groups()
            .flat_map(|g| self.needed[g][tokens].iter().map(move |b| (g, *b)))
            .map(|(g, b)| (g, self.end_of(g, &path, b, tokens)))
            .collect();
        let pinned = self.pinned_in(tier);
        let usage = self.m.usage();
        let most = match tier {
            Tier::Host => usage.host_capacity / 2,
            Tier::Storage => usage.storage_capacity / 2,
            Tier::Device => {
                let longest = self.m.max_blocks(self.config.max_model_len as usize);
                (self.m.capacity() / 2).min(self.m.capacity() - longest)
            }
        };
        let before = self.snapshot();
        let pin = match self.m.pin(tier, &hashed) {
            Ok(pin) => pin,
            Err(err) => {
                prop_assert!(matches!(err.kind(), ErrorKind::PinTooLarge { .. }), "{}", err);
                prop_assert!(pinned + blocks.len() > most, "{}", err);
                prop_assert_eq!(before, self.snapshot());
                return Ok(());
            }
        };
        prop_assert_eq!((pin.tokens, pin.blocks), (tokens, blocks.len()));
        prop_assert!(pinned + blocks.len() <= most, "more than half of a tier is pinned");
        // Whose users it has become.
        let users: HashMap<BlockId, u32> = before.users.into_iter().collect();
        let now = self.m.ref_counts().into_iter();
        let ids: Vec<BlockId> = now
            .filter(|(id, n)| *n > users.get(id).copied().unwrap_or(0))
            .map(|(id, _)| id)
            .collect();
        prop_assert_eq!(ids.len(), if tier == Tier::Device { blocks.len() } else { 0 });
        let known = self.pins.insert(pin.id, Pinned { tier, count: blocks.len(), blocks, ids });
        prop_assert!(known.is_none(), "a handle that is used already");
        Ok(())
    }

    pub fn unpin(&mut self, id: PinId) -> Check {
        let writing = self.writing();
        self.m.unpin(id).unwrap();
        self.pins.remove(&id);
        prop_assert!(self.m.unpin(id).is_err(), "given back twice");
        self.end_of_call(&writing, 0)?;
        Ok(())
    }

    /// The tier has been cleared: its pins hold nothing any more.
    pub fn empty_pins(&mut self, tier: Tier) {
        for pin in self.pins.values_mut().filter(|pin| pin.tier == tier) {
            (pin.count, pin.blocks) = (0, Vec::new());
        }
    }

    pub fn limit(&mut self, tier: Tier, salt: usize, blocks: Option<u64>) -> Check {
        let quota = blocks.map(|blocks| Quota::of_bytes(blocks, 1).unwrap());
        self.m.set_quota(tier, SALTS[salt], quota).unwrap();
        let most = blocks.map_or(usize::MAX, |blocks| blocks as usize);
        self.quotas.get_mut(&(tier, SALTS[salt])).unwrap().0 = most;
        Ok(())
    }

    /// Nobody comes to more than his quota; who has more, because it was lowered, only loses.
    pub fn check_quotas(&mut self) -> Check {
        let usage = self.m.usage();
        for (tier, all) in [(Tier::Host, usage.host_used), (Tier::Storage, usage.storage_used)] {
            let mut sum = 0;
            for salt in SALTS {
                let used = self.m.quota_used(tier, salt).unwrap();
                let there = self.found[&tier].keys();
                let there = there.filter(|&&(_, node)| self.prefixes.is_of(node, salt)).count();
                let (most, had) = self.quotas.get_mut(&(tier, salt)).unwrap();
                prop_assert!(used <= *most.max(had), "{} of {} for {:?}", used, most, salt);
                prop_assert!(there <= used, "{} of {} count for {:?}", used, there, salt);
                *had = used;
                sum += used;
            }
            // Slots that were disowned are nobody's until who uses them has gone.
            let used = usage.host_pinned + usage.storage_pinned;
            prop_assert!((sum..=sum + used).contains(&all), "{} of {} count", sum, all);
        }
        Ok(())
    }

    /// Blocks that the pins of a tier were given, each once per pin.
    pub fn pinned_in(&self, tier: Tier) -> usize {
        self.pins.values().filter(|pin| pin.tier == tier).map(|pin| pin.count).sum()
    }

    /// Those of them that stay findable, each once.
    pub fn findable_pinned_in(&self, tier: Tier) -> usize {
        let pins = self.pins.values().filter(|pin| pin.tier == tier);
        let mut blocks: Vec<_> = pins.flat_map(|pin| &pin.blocks).collect();
        blocks.sort_unstable();
        blocks.dedup();
        blocks.len()
    }
}
