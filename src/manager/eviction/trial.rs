//! Whether learning pays. A tier cannot go by two rules at once, but what each would have had can be told in
//! small: two shadows of the tier, which hold names alone, and of a sample of contents as many as the tier has room
//! for, take in and evict what is used, one by age and one by worth (miniature simulations: Waldspurger,
//! Saemundsson, Ahmad and Park, ATC 2017). Neither costs a hit, so that the rule that the tier does not go by is
//! always on trial.
//!
//! A shadow knows nothing of several groups, nor of hits that end at boundaries only. So its hits count for as
//! much as the tier's own were of them while the tier went by the same rule.
//!
//! The tier goes over to the other rule when that has gathered more evidence than chance would (Page's cumulative
//! sums, 1954), and is ahead in the long run, too: what the tier holds was chosen by the old rule, and every change
//! loses some of its worth.

use super::Lists;
use super::history::History;
use super::reuse::class;
use super::shelves::{Ranks, Shelves};

/// What blocks are ranked by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rule {
    /// The oldest goes first, as in LRU.
    Age,
    /// The one worth least goes first.
    Worth,
}

impl Rule {
    fn other(self) -> Self {
        match self {
            Self::Age => Self::Worth,
            Self::Worth => Self::Age,
        }
    }
}

/// Of uses and releases that were counted a lesson ago, and of hits and of the lead, this much counts now.
const DECAY: f64 = 0.98;
const HITS_DECAY: f64 = 0.995;
const LEAD_DECAY: f64 = 0.997;
/// Worth is to have so much more hits than age.
const MARGIN: f64 = 0.01;
/// Evidence that the first change asks for, in standard deviations of what one sequence gives, and hits besides.
/// Each later one asks for twice as much.
const DEVIATIONS: f64 = 3.0;
const FEW: f64 = 4.0;
/// Sequences that the standard deviation is taken over.
const SEQUENCES: f64 = 512.0;
/// Hits that a shadow is believed for before the tier has had its own.
const BELIEVED: f64 = 50.0;
/// Lessons that the tier's own hits do not count for after a change.
const SETTLING: u32 = 16;

/// Hits of the tier and of a shadow over the same time.
#[derive(Clone, Copy, Default)]
struct Hits {
    tier: f64,
    shadow: f64,
}

impl Hits {
    /// Hits of the tier per hit of the shadow, if there were this many before anything was seen.
    fn ratio(self, before: f64) -> f64 {
        (self.tier + BELIEVED * before) / (self.shadow + BELIEVED)
    }
}

/// Both shadows, and what became of them. Arrays are indexed by [`Rule`].
pub(super) struct Trial {
    rule: Rule,
    shadows: [Shadow; 2],
    /// Names that a shadow has room for.
    capacity: usize,
    /// Uses of the sample and blocks released, faded: how much of the tier one name stands for.
    sampled: f64,
    released: f64,
    /// Hits of the present sequence in the shadows and in the tier.
    found: [u32; 2],
    own: u32,
    /// Under each rule, faded.
    hits: [Hits; 2],
    /// Hits by worth less hits by age, faded.
    lead: f64,
    /// What speaks for the other rule since it last had nothing to say for itself.
    evidence: f64,
    /// Squares of what single sequences gave, and their number.
    squares: f64,
    sequences: f64,
    changed: bool,
    settling: u32,
}

impl Trial {
    /// Of contents that are remembered at the first `names` places of a history.
    pub fn new(names: usize) -> Self {
        Self {
            rule: Rule::Worth,
            shadows: std::array::from_fn(|_| Shadow::new(names)),
            capacity: 0,
            sampled: 0.0,
            released: 0.0,
            found: [0; 2],
            own: 0,
            hits: [Hits::default(); 2],
            lead: 0.0,
            evidence: 0.0,
            squares: 0.0,
            sequences: 0.0,
            changed: false,
            settling: 0,
        }
    }

    /// What the tier goes by.
    pub fn rule(&self) -> Rule {
        self.rule
    }

    /// Bytes of the shadows.
    pub fn bytes(&self) -> usize {
        self.shadows.iter().map(|shadow| shadow.lists.bytes()).sum()
    }

    /// The sequence whose contents were used is through, and the next one begins.
    pub fn next_sequence(&mut self, ranks: &[Ranks; 2], history: &History) {
        let [by_age, by_worth] = &mut self.shadows;
        by_age.release(&ranks[Rule::Age as usize], |_| 0);
        by_worth.release(&ranks[Rule::Worth as usize], |at| class(history.info(at)));
        let found = std::mem::take(&mut self.found).map(f64::from);
        let own = f64::from(std::mem::take(&mut self.own));
        if found != [0.0; 2] || own > 0.0 {
            self.weigh(found, own);
        }
    }

    fn weigh(&mut self, found: [f64; 2], own: f64) {
        let age = self.hits[Rule::Age as usize].ratio(1.0);
        let worth = self.hits[Rule::Worth as usize].ratio(age);
        let lead =
            worth * found[Rule::Worth as usize] - (1.0 + MARGIN) * age * found[Rule::Age as usize];
        self.lead += lead;
        self.squares += lead * lead;
        self.sequences += 1.0;
        if self.sequences > SEQUENCES {
            self.squares /= 2.0;
            self.sequences /= 2.0;
        }
        if self.settling == 0 {
            let hits = &mut self.hits[self.rule as usize];
            hits.tier += own;
            hits.shadow += found[self.rule as usize];
        }
        let sign = match self.rule {
            Rule::Age => 1.0,
            Rule::Worth => -1.0,
        };
        let deviations = if self.changed { 2.0 * DEVIATIONS } else { DEVIATIONS };
        let enough = deviations * (self.squares / self.sequences).sqrt() + FEW;
        self.evidence = (self.evidence + sign * lead).clamp(0.0, enough);
        if self.evidence >= enough && sign * self.lead > 0.0 {
            self.rule = self.rule.other();
            self.evidence = 0.0;
            self.changed = true;
            self.settling = SETTLING;
        }
    }

    /// The content that is remembered at a place is used, and the tier had it or not.
    pub fn used(&mut self, at: usize, hit: bool, ranks: &[Ranks; 2]) {
        self.sampled += 1.0;
        self.own += u32::from(hit);
        for ((shadow, ranks), found) in self.shadows.iter_mut().zip(ranks).zip(&mut self.found) {
            *found += u32::from(shadow.uses(at));
            shadow.shrink(self.capacity, ranks);
        }
    }

    /// What is remembered at a place makes room for something else.
    pub fn forget(&mut self, at: usize) {
        self.shadows.iter_mut().for_each(|shadow| shadow.forget(at));
    }

    /// Contents grow older.
    pub fn tick(&mut self, oldest: usize, ranks: &[Ranks; 2]) {
        for (shadow, ranks) in self.shadows.iter_mut().zip(ranks) {
            shadow.shelves.tick(&mut shadow.lists, ranks, oldest);
        }
    }

    /// Ends a lesson, in which so many blocks of a tier of `len` were released, with other ranks by worth.
    pub fn learned(&mut self, released: u64, len: u32, old: &Ranks, new: &Ranks) {
        self.shadows[Rule::Worth as usize].shelves.reranked(old, new);
        self.released += released as f64;
        self.capacity = (f64::from(len) * self.sampled / self.released.max(1.0)) as usize;
        self.released *= DECAY;
        self.sampled *= DECAY;
        // Of the other rule nothing new is seen.
        let hits = &mut self.hits[self.rule as usize];
        hits.tier *= HITS_DECAY;
        hits.shadow *= HITS_DECAY;
        self.lead *= LEAD_DECAY;
        self.settling = self.settling.saturating_sub(1);
    }
}

/// A tier of names, which are places in a history.
struct Shadow {
    lists: Lists,
    shelves: Shelves,
    held: usize,
    /// Whether the present sequence has found all that it asked for so far.
    unbroken: bool,
}

/// The list of the names that the present sequence uses, its end first; the shelves follow.
const IN_USE: usize = 0;

impl Shadow {
    fn new(names: usize) -> Self {
        let lists = Lists::new(names as u32, IN_USE + 1 + Shelves::LISTS);
        Self { lists, shelves: Shelves::new(IN_USE + 1), held: 0, unbroken: true }
    }

    /// The present sequence uses a name; gives whether that was a hit.
    fn uses(&mut self, at: usize) -> bool {
        let held = self.lists.contains(at as u32);
        self.unbroken &= held;
        self.held += usize::from(!held);
        self.lists.remove(at as u32);
        self.lists.push_front(IN_USE, at as u32);
        self.unbroken
    }

    /// The present sequence gives its names back, the end of it first.
    fn release(&mut self, ranks: &Ranks, class: impl Fn(usize) -> usize) {
        while let Some(at) = self.lists.front(IN_USE) {
            self.lists.remove(at);
            self.shelves.place(&mut self.lists, ranks, class(at as usize), at);
        }
        self.unbroken = true;
    }

    /// Evicts what there is no room for, unless it is in use.
    fn shrink(&mut self, capacity: usize, ranks: &Ranks) {
        while self.held > capacity
            && let Some(at) = self.shelves.next(&self.lists, ranks)
        {
            self.lists.remove(at);
            self.held -= 1;
        }
    }

    fn forget(&mut self, at: usize) {
        if self.lists.contains(at as u32) {
            self.lists.remove(at as u32);
            self.held -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Sequences are runs of names that begin with one of a few numbers and share none between these.
        #[test]
        fn a_shadow_by_age_has_the_hits_of_lru(
            capacity in 1usize..40,
            sequences in prop::collection::vec((0usize..8, 1usize..16), 1..200),
        ) {
            let ranks = Ranks::by_age();
            let mut shadow = Shadow::new(8 * 16);
            // The next to go first.
            let mut line: Vec<usize> = Vec::new();
            for (tick, (first, len)) in (1u32..).zip(sequences) {
                let names = first * 16..first * 16 + len;
                let mut unbroken = true;
                for name in names.clone() {
                    unbroken &= line.contains(&name);
                    prop_assert_eq!(shadow.uses(name), unbroken);
                    shadow.shrink(capacity, &ranks);
                    // What is in use stays, whether there is room for it or not.
                    line.retain(|&other| other != name);
                    let used = name - names.start + 1;
                    line.drain(..(line.len() + used).saturating_sub(capacity).min(line.len()));
                }
                shadow.release(&ranks, |_| 0);
                line.extend(names.rev());
                shadow.shrink(capacity, &ranks);
                line.drain(..line.len().saturating_sub(capacity));
                shadow.shelves.tick(&mut shadow.lists, &ranks, tick.trailing_zeros() as usize % 15);
                let held: Vec<usize> =
                    (0..8 * 16).filter(|&name| shadow.lists.contains(name as u32)).collect();
                let mut expected = line.clone();
                expected.sort_unstable();
                prop_assert_eq!(held, expected);
            }
        }
    }
}
