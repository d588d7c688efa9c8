//! Adaptive replacement: blocks used once and blocks used again, each least recently used first, and a
//! balance between the two that moves towards the one whose evicted blocks are asked for again.

use super::history::History;
use super::{Entry, Lists, Order, POLICY, Policy};

const RECENT: usize = POLICY;
const FREQUENT: usize = POLICY + 1;
/// Tags of blocks in line, by their list, and what is remembered of them when they are evicted.
const IS_RECENT: u8 = 1;
const IS_FREQUENT: u8 = 2;

pub(super) struct Arc {
    len: u32,
    /// Blocks in line per list.
    recent: u32,
    frequent: u32,
    /// Blocks that [`RECENT`] may keep.
    target: u32,
    /// Evictions, which stand for time.
    now: u32,
    ghosts: History,
}

impl Arc {
    pub fn new(len: u32) -> Self {
        Self { len, recent: 0, frequent: 0, target: 0, now: 0, ghosts: History::new(len) }
    }
}

impl Policy for Arc {
    fn lists(&self) -> usize {
        2
    }

    fn used(&mut self, key: u64, _: usize, _: bool, _: &mut Lists) -> u8 {
        let Some(ghost) = self.ghosts.take(key, self.now) else { return 0 };
        // The list that is the smaller one learns faster.
        let step = |mine: u32, other: u32| Order::STRIDE as u32 * (other / mine.max(1)).clamp(1, 8);
        if ghost.info == u32::from(IS_RECENT) {
            self.target = (self.target + step(self.recent, self.frequent)).min(self.len);
        } else {
            self.target = self.target.saturating_sub(step(self.frequent, self.recent));
        }
        1
    }

    fn evicted(&mut self, key: u64, entry: &Entry) {
        self.now = self.now.wrapping_add(1);
        let list = if entry.uses < 2 { IS_RECENT } else { IS_FREQUENT };
        self.ghosts.write(key, self.now, |_| list.into());
    }

    fn place(&mut self, id: u32, lists: &mut Lists, entries: &mut [Entry]) {
        let entry = &mut entries[id as usize];
        if entry.uses < 2 {
            entry.tag = IS_RECENT;
            self.recent += 1;
            lists.push_back(RECENT, id);
        } else {
            entry.tag = IS_FREQUENT;
            self.frequent += 1;
            lists.push_back(FREQUENT, id);
        }
    }

    fn leave(&mut self, entry: &mut Entry) -> bool {
        self.recent -= u32::from(entry.tag == IS_RECENT);
        self.frequent -= u32::from(entry.tag == IS_FREQUENT);
        entry.tag = 0;
        true
    }

    fn next(&mut self, lists: &mut Lists) -> Option<u32> {
        let [first, second] = match self.recent > self.target {
            true => [RECENT, FREQUENT],
            false => [FREQUENT, RECENT],
        };
        lists.front(first).or_else(|| lists.front(second))
    }

    fn ranked(&self, rank: usize) -> usize {
        match (self.recent > self.target) == (rank == 0) {
            true => RECENT,
            false => FREQUENT,
        }
    }

    fn bytes(&self) -> usize {
        self.ghosts.bytes()
    }
}
