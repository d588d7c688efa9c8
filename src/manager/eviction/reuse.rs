//! The crate's default: the block that is worth least gives way, and what it is worth is learned.
//!
//! Blocks of the same number of uses and age are one class. Of each class the policy knows, from a sample of
//! contents that it follows whether they stay in the tier or not, what share is used again, and when. A block's
//! worth is the largest ratio, over all times that it could be kept
//! for, of the uses to be expected in that time to the time it will have been kept (the index of Gittins for
//! the choice between many such bets; as hit density it ranks cache lines in Beckmann, Chen and Cidon,
//! NSDI 2018). So conversations that came back stay longer than those that may not, a scan passes through
//! without harm, of a loop that does not fit a part stays, and where nothing is learned yet it is LRU.
//!
//! Where reuse is such that the past tells the wrong thing, the tier goes by age instead (`trial.rs`).

use super::history::{Before, History, Memory};
use super::shelves::{AGES, CLASSES, Ranks, Shelves, list};
use super::trial::{Rule, Trial};
use super::{Entry, Lists, POLICY, Policy};

/// Ticks of the clock while as many blocks are released as the tier has.
const TICKS_PER_TURNOVER: u32 = 256;
/// The worths are learned anew every so many ticks, and what was seen before counts for less by `DECAY`.
const TICKS_PER_LESSON: u32 = 32;
const DECAY: f64 = 0.995;
/// Contents that are followed for the sake of learning, eight per line of the history.
const SAMPLE_LINES: usize = 2048;
/// Most of them are of one class and age: they are counted side by side, so that no addition waits for the last one.
const LANES: usize = 4;
/// What is believed before anything is seen counts as so many contents, of which `PRIOR_USED` are used in
/// every octave of ages: the older, the less per time, as in LRU.
const PRIOR: f64 = 4.0;
const PRIOR_USED: f64 = 0.25;

pub(super) struct Reuse {
    len: u32,
    history: History,
    trial: Trial,
    /// Index in its sequence of the block whose content was used last.
    last: usize,
    /// Releases, and of them those per tick.
    clock: u64,
    unit: u64,
    now: u32,
    /// Per class and age: contents used again at that age, contents lost sight of.
    used: [[f64; AGES]; CLASSES],
    lost: [[f64; AGES]; CLASSES],
    shelves: Shelves,
    /// In which order they are emptied, by [`Rule`].
    ranks: [Ranks; 2],
}

impl Reuse {
    pub fn new(len: u32) -> Self {
        let history = History::new(len);
        let mut reuse = Self {
            len,
            trial: Trial::new(history.len(SAMPLE_LINES)),
            history,
            last: 0,
            clock: 0,
            unit: u64::from(len / TICKS_PER_TURNOVER).max(1),
            now: 0,
            used: [[0.0; AGES]; CLASSES],
            lost: [[0.0; AGES]; CLASSES],
            shelves: Shelves::new(POLICY),
            ranks: [Ranks::by_age(), Ranks::by_age()],
        };
        reuse.learn();
        reuse
    }

    /// Every list whose blocks have come of age joins the next.
    fn tick(&mut self, lists: &mut Lists) {
        self.now = self.now.wrapping_add(1);
        let oldest = (self.now.trailing_zeros() as usize).min(AGES - 2);
        self.shelves.tick(lists, &self.ranks[self.trial.rule() as usize], oldest);
        self.trial.tick(oldest, &self.ranks);
        if self.now.is_multiple_of(TICKS_PER_LESSON) {
            self.learn();
        }
    }

    fn learn(&mut self) {
        // Contents still in sight count as lost sight of now, for this once.
        let mut waiting = [[[0u32; AGES]; CLASSES]; LANES];
        for (i, memory) in self.history.sample(SAMPLE_LINES, self.now).enumerate() {
            waiting[i % LANES][class(memory.info)][age(memory.age)] += 1;
        }
        let mut worth = [0.0; Shelves::LISTS];
        for class in 0..CLASSES {
            let used = &mut self.used[class];
            let mut at_risk = [0.0; AGES];
            let mut left = 0.0;
            for age in (0..AGES).rev() {
                let waiting: u32 = waiting.iter().map(|lane| lane[class][age]).sum();
                let lost = self.lost[class][age] + f64::from(waiting);
                left += used[age] + lost;
                at_risk[age] = left - lost / 2.0;
            }
            let share: [f64; AGES] = std::array::from_fn(|age| {
                (used[age] + PRIOR * PRIOR_USED) / (at_risk[age] + PRIOR)
            });
            for age in 0..AGES {
                worth[list(class, age)] = density(&share, age);
                used[age] *= DECAY;
                self.lost[class][age] *= DECAY;
            }
        }
        let by_worth = &mut self.ranks[Rule::Worth as usize];
        let old = std::mem::replace(by_worth, Ranks::by_worth(&worth));
        self.trial.learned(self.unit * u64::from(TICKS_PER_LESSON), self.len, &old, by_worth);
        if self.trial.rule() == Rule::Worth {
            self.shelves.reranked(&old, by_worth);
        }
    }
}

impl Policy for Reuse {
    fn lists(&self) -> usize {
        Shelves::LISTS
    }

    fn warm(&self, key: u64) {
        self.history.warm(key);
    }

    fn used(&mut self, key: u64, index: usize, hit: bool, _: &mut Lists) -> u8 {
        if index <= std::mem::replace(&mut self.last, index) {
            let rule = self.trial.rule();
            self.trial.next_sequence(&self.ranks, &self.history);
            if self.trial.rule() != rule {
                let [old, new] = [rule, self.trial.rule()].map(|rule| &self.ranks[rule as usize]);
                self.shelves.reranked(old, new);
            }
        }
        let mut before = 0;
        let (at, was) = self.history.write(key, self.now, |memory| {
            before = memory.map_or(0, |memory| memory.info);
            before + 1
        });
        if self.history.line(key) < SAMPLE_LINES {
            match was {
                Before::Same(Memory { age: a, info }) => self.used[class(info)][age(a)] += 1.0,
                Before::Other(Memory { age: a, info }) => {
                    self.lost[class(info)][age(a)] += 1.0;
                    self.trial.forget(at);
                }
                Before::Nothing => {}
            }
            self.trial.used(at, hit, &self.ranks);
        }
        before as u8
    }

    fn place(&mut self, id: u32, lists: &mut Lists, entries: &mut [Entry]) {
        // Where nothing but age is to rank them, one class has them all.
        let rule = self.trial.rule();
        let class = match rule {
            Rule::Age => 0,
            Rule::Worth => class(entries[id as usize].uses.into()),
        };
        self.shelves.place(lists, &self.ranks[rule as usize], class, id);
        self.clock += 1;
        if self.clock.is_multiple_of(self.unit) {
            self.tick(lists);
        }
    }

    fn next(&mut self, lists: &mut Lists) -> Option<u32> {
        self.shelves.next(lists, &self.ranks[self.trial.rule() as usize])
    }

    fn ranked(&self, rank: usize) -> usize {
        POLICY + self.ranks[self.trial.rule() as usize].list(rank)
    }

    fn bytes(&self) -> usize {
        self.history.bytes() + self.trial.bytes()
    }
}

/// The class of a number of uses, which is what the history writes down.
pub(super) fn class(uses: u32) -> usize {
    (uses.max(1) as usize - 1).min(CLASSES - 1)
}

/// The list in which blocks of an age in ticks stand: list `a` has those from 3/4 to 3/2 of `1 << a` on average.
fn age(ticks: u32) -> usize {
    let scaled = u64::from(ticks) * 4 / 3;
    (scaled.max(1).ilog2() as usize).min(AGES - 1)
}

/// The most uses per tick to be had of a block that has come to an age, given the share of those of each age
/// that is used at that age.
fn density(share: &[f64; AGES], age: usize) -> f64 {
    let (mut alive, mut uses, mut kept, mut best) = (1.0, 0.0, 0.0, 0.0f64);
    for (age, share) in share.iter().enumerate().skip(age) {
        let ticks = f64::from(1u32 << age);
        uses += alive * share;
        kept += alive * (1.0 - share / 2.0) * ticks;
        alive *= 1.0 - share;
        best = best.max(uses / kept);
    }
    best
}
