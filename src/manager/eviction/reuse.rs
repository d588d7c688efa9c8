//! The crate's default: the block that is worth least gives way, and what it is worth is learned.
//!
//! Blocks of the same number of uses and age are one class. Of each class the policy knows, from a sample of contents that it follows whether they stay in the tier or not, what
//! share is used again, and when. A block's worth is the largest ratio, over all times that it could be kept
//! for, of the uses to be expected in that time to the time it will have been kept (the index of Gittins for
//! the choice between many such bets; as hit density it ranks cache lines in Beckmann, Chen and Cidon,
//! NSDI 2018). So conversations that came back stay longer than those that may not, a scan passes through
//! without harm, of a loop that does not fit a part stays, and where nothing is learned yet it is LRU.
//!
//! Where reuse is such that the past tells the wrong thing, LRU takes over (`duel.rs`).
//!
//! A class is one list. Ages are octaves: a list joins the next older one in constant time when the clock,
//! which counts releases, has a fitting number of trailing zeros.

use super::duel::Duel;
use super::history::{Before, History, Memory};
use super::{Entry, Lists, POLICY, Policy};

/// Uses that are told apart: 1, 2, 3, and 4 or more.
const USES: usize = 4;
const AGES: usize = 16;
const LISTS: usize = USES * AGES;

/// Ticks of the clock while as many blocks are released as the tier has.
const TICKS_PER_TURNOVER: u32 = 256;
/// Ticks for which LRU keeps what nobody uses, less what sequences in use take of the tier.
const LRU_KEEPS: u32 = TICKS_PER_TURNOVER * 15 / 16;
/// The worths are learned anew every so many ticks, and what was seen before counts for less by `DECAY`.
const TICKS_PER_LESSON: u32 = 32;
const DECAY: f64 = 0.995;
/// Contents that are followed for the sake of learning, eight per line of the history.
const SAMPLE_LINES: usize = 2048;
/// What is believed before anything is seen counts as so many contents, of which `PRIOR_USED` are used in
/// every octave of ages: the older, the less per time, as in LRU.
const PRIOR: f64 = 4.0;
const PRIOR_USED: f64 = 0.25;

pub(super) struct Reuse {
    history: History,
    duel: Duel,
    /// Releases, and of them those per tick.
    clock: u64,
    unit: u64,
    now: u32,
    /// Per class and age: contents used again at that age, contents lost sight of.
    used: [[f64; AGES]; USES],
    lost: [[f64; AGES]; USES],
    /// Lists by worth, the least first, and the rank of each.
    ranked: [u8; LISTS],
    rank: [u8; LISTS],
    /// Ranks whose lists may hold something.
    waiting: u64,
}

impl Reuse {
    pub fn new(len: u32) -> Self {
        let mut reuse = Self {
            history: History::new(len),
            duel: Duel::default(),
            clock: 0,
            unit: u64::from(len / TICKS_PER_TURNOVER).max(1),
            now: 0,
            used: [[0.0; AGES]; USES],
            lost: [[0.0; AGES]; USES],
            ranked: std::array::from_fn(|i| i as u8),
            rank: std::array::from_fn(|i| i as u8),
            waiting: 0,
        };
        reuse.learn();
        reuse
    }

    fn list(class: usize, age: usize) -> usize {
        class * AGES + age
    }

    /// Every list whose blocks have come of age joins the next.
    fn tick(&mut self, lists: &mut Lists) {
        self.now = self.now.wrapping_add(1);
        let oldest = (self.now.trailing_zeros() as usize).min(AGES - 2);
        for age in (0..=oldest).rev() {
            for class in 0..USES {
                let (from, to) = (Self::list(class, age), Self::list(class, age + 1));
                let (from_bit, to_bit) = (1 << self.rank[from], 1 << self.rank[to]);
                if self.waiting & from_bit != 0 {
                    lists.append(POLICY + to, POLICY + from);
                    self.waiting = self.waiting & !from_bit | to_bit;
                }
            }
        }
        if self.now.is_multiple_of(TICKS_PER_LESSON) {
            self.learn();
        }
    }

    fn learn(&mut self) {
        self.duel.judge();
        // Contents still in sight count as lost sight of now, for this once.
        let mut lost = self.lost;
        for memory in self.history.sample(SAMPLE_LINES, self.now) {
            lost[class(memory.info)][age(memory.age)] += 1.0;
        }
        let mut worth = [0.0; LISTS];
        for class in 0..USES {
            let used = &mut self.used[class];
            let mut at_risk = [0.0; AGES];
            let mut left = 0.0;
            for age in (0..AGES).rev() {
                left += used[age] + lost[class][age];
                at_risk[age] = left - lost[class][age] / 2.0;
            }
            let share: [f64; AGES] = std::array::from_fn(|age| {
                (used[age] + PRIOR * PRIOR_USED) / (at_risk[age] + PRIOR)
            });
            for age in 0..AGES {
                worth[Self::list(class, age)] = density(&share, age);
                used[age] *= DECAY;
                self.lost[class][age] *= DECAY;
            }
        }
        let occupied: [bool; LISTS] =
            std::array::from_fn(|list| self.waiting >> self.rank[list] & 1 != 0);
        // Of equal worth, the older first.
        let lru = self.duel.lru_rules();
        self.ranked.sort_by(|&a, &b| {
            let by_worth = worth[usize::from(a)].total_cmp(&worth[usize::from(b)]);
            let by_age = (usize::from(b) % AGES).cmp(&(usize::from(a) % AGES));
            if lru { by_age.then(by_worth) } else { by_worth.then(by_age) }
        });
        for (rank, &list) in self.ranked.iter().enumerate() {
            self.rank[usize::from(list)] = rank as u8;
        }
        self.waiting = (0..LISTS)
            .filter(|&list| occupied[list])
            .fold(0, |bits, list| bits | 1 << self.rank[list]);
    }
}

impl Policy for Reuse {
    fn lists(&self) -> usize {
        LISTS
    }

    fn used(&mut self, key: u64, hit: bool, _: &mut Lists) -> u8 {
        let sampled = self.history.line(key) < SAMPLE_LINES;
        let mut before = 0;
        let was = self.history.write(key, self.now, |memory| {
            before = memory.map_or(0, |memory| memory.info);
            before + 1
        });
        match was {
            Before::Same(Memory { age: a, info }) if sampled => {
                self.duel.used(a < LRU_KEEPS, hit);
                self.used[class(info)][age(a)] += 1.0;
            }
            Before::Other(Memory { age: a, info }) if sampled => {
                self.lost[class(info)][age(a)] += 1.0
            }
            _ => {}
        }
        before as u8
    }

    fn place(&mut self, id: u32, lists: &mut Lists, entries: &mut [Entry]) {
        let entry = &entries[id as usize];
        // Under LRU one class has them all, so that nothing but age ranks them.
        let class = if self.duel.lru_rules() { 0 } else { class(entry.uses.into()) };
        let list = Self::list(class, 0);
        lists.push_back(POLICY + list, id);
        self.waiting |= 1 << self.rank[list];
        self.clock += 1;
        if self.clock.is_multiple_of(self.unit) {
            self.tick(lists);
        }
    }

    fn next(&mut self, lists: &mut Lists) -> Option<u32> {
        while self.waiting != 0 {
            let rank = self.waiting.trailing_zeros() as usize;
            match lists.front(POLICY + usize::from(self.ranked[rank])) {
                Some(id) => return Some(id),
                None => self.waiting &= self.waiting - 1,
            }
        }
        None
    }

    fn ranked(&self, rank: usize) -> usize {
        POLICY + usize::from(self.ranked[rank])
    }

    fn bytes(&self) -> usize {
        self.history.bytes()
    }
}

/// The class of a number of uses, which is what the history writes down.
fn class(uses: u32) -> usize {
    (uses.max(1) as usize - 1).min(USES - 1)
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
