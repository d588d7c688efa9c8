//! Pins: prefixes that stay in a tier until their handle is given back, whatever else needs room there.

use std::collections::BTreeMap;

use super::pool::NULL;
use super::prefix::fixed_point;
use super::*;

/// Names a pin; never reused.
pub type PinId = u64;

/// Of a tier, pins hold one part in this many at most: the rest is for what comes and goes.
const PIN_SHARE: usize = 2;

/// What was pinned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pin {
    /// The handle.
    pub id: PinId,
    /// Tokens of the prompt that the tier alone can serve now, and will: all groups together.
    pub tokens: usize,
    /// Blocks that they take.
    pub blocks: usize,
}

/// The blocks or slots of a pin; none once their tier has been cleared.
struct Held {
    tier: Tier,
    places: Vec<u32>,
}

/// All pins.
#[derive(Default)]
pub(super) struct Pins {
    next: PinId,
    held: BTreeMap<PinId, Held>,
}

impl Pins {
    /// Blocks of a tier that pins hold, each once per pin.
    fn in_tier(&self, tier: Tier) -> usize {
        self.held.values().filter(|held| held.tier == tier).map(|held| held.places.len()).sum()
    }
}

impl Manager {
    /// Pins what a tier has of a prompt: the longest prefix that every group can serve from there. Its blocks stay
    /// until [`Self::unpin`], or until the tier is cleared or detached. A prefix of which nothing is there takes no
    /// blocks.
    ///
    /// # Errors
    /// `InvalidArgument` for tokens that were hashed for another manager; `PinTooLarge` when the pins of the tier
    /// would hold more than half of it, or, on the device, leave less than a request of `max_model_len` may need.
    /// Nothing is changed.
    pub fn pin(&mut self, tier: Tier, prompt: &HashedTokens) -> Result<Pin> {
        const OP: &str = "pin";
        self.check_hashed(OP, prompt)?;
        let lower = match tier {
            Tier::Device => None,
            Tier::Host => self.host.as_ref(),
            Tier::Storage => self.storage.as_ref(),
        };
        let place = |g: usize, b: usize, tokens: usize| {
            let hash = prompt.hashes().get(self.groups[g].key_index_in(b, tokens))?;
            match (tier, lower) {
                (Tier::Device, _) => Some(self.device.find(g, hash)).filter(|&id| id != NULL),
                (_, lower) => lower?.find(g, hash),
            }
        };
        let alignment = self.policy.alignment;
        let given = groups::align_down(prompt.hashes().len() * self.hash_block, alignment);
        let numbered = self.groups.iter().enumerate();
        let is_there = |g: usize, b: usize, n: usize| place(g, b, n).is_some();
        let tokens = fixed_point(numbered.clone(), given, alignment, is_there);
        let places: Vec<u32> = numbered
            .flat_map(|(g, group)| group.needed(tokens).filter_map(move |b| place(g, b, tokens)))
            .collect();

        let capacity = match lower {
            Some(lower) => lower.capacity(),
            None if tier == Tier::Device => self.capacity(),
            None => 0,
        };
        let mut limit = capacity / PIN_SHARE;
        if tier == Tier::Device {
            let longest = self.max_blocks(self.config.max_model_len as usize);
            limit = limit.min(capacity.saturating_sub(longest));
        }
        let (needed, pinned) = (places.len(), self.pins.in_tier(tier));
        if pinned + needed > limit {
            let tier = tier.name();
            return Err(Error::new(
                OP,
                ErrorKind::PinTooLarge { tier, needed, pinned, limit, capacity },
            ));
        }
        for &place in &places {
            match tier {
                Tier::Device => self.device.pool.touch(place),
                Tier::Host => self.host.iter_mut().for_each(|host| host.pin(place)),
                Tier::Storage => self.storage.iter_mut().for_each(|storage| storage.pin(place)),
            }
        }
        let id = self.pins.next;
        self.pins.next += 1;
        self.pins.held.insert(id, Held { tier, places });
        Ok(Pin { id, tokens, blocks: needed })
    }

    /// Gives a pin back; its blocks are the most recent ones of their tier then.
    ///
    /// # Errors
    /// `UnknownPin`.
    pub fn unpin(&mut self, pin: PinId) -> Result<()> {
        let Some(held) = self.pins.held.remove(&pin) else {
            return Err(Error::new("unpin", ErrorKind::UnknownPin(pin)));
        };
        self.let_go(held);
        self.pump();
        self.forget_drained();
        Ok(())
    }

    /// Empties the pins of a tier that is being cleared.
    pub(super) fn empty_pins(&mut self, tier: Tier) {
        let held = self.pins.held.values_mut().filter(|held| held.tier == tier);
        let emptied: Vec<Vec<u32>> = held.map(|held| std::mem::take(&mut held.places)).collect();
        emptied.into_iter().for_each(|places| self.let_go(Held { tier, places }));
    }

    fn let_go(&mut self, Held { tier, places }: Held) {
        let lower = match tier {
            Tier::Device => return self.device.pool.release(places.into_iter().rev()),
            Tier::Host => self.host.as_mut(),
            Tier::Storage => self.storage.as_mut(),
        };
        if let Some(lower) = lower {
            for place in places.into_iter().rev() {
                if lower.is_resident(place) {
                    lower.touch(place);
                }
                lower.unpin(place);
            }
        }
    }
}
