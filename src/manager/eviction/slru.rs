//! Segmented LRU: a block that was used again is protected; the protected ones that were not used for longest
//! are on probation again when they are more than four fifths of the tier.

use super::{Entry, Lists, POLICY, Policy};

const PROBATION: usize = POLICY;
const PROTECTED: usize = POLICY + 1;
const IS_PROTECTED: u8 = 1;

pub(super) struct Slru {
    protected: u32,
    most: u32,
}

impl Slru {
    pub fn new(len: u32) -> Self {
        Self { protected: 0, most: len - len / 5 }
    }
}

impl Policy for Slru {
    fn lists(&self) -> usize {
        2
    }

    fn place(&mut self, id: u32, lists: &mut Lists, entries: &mut [Entry]) {
        let entry = &mut entries[id as usize];
        if entry.uses < 2 {
            return lists.push_back(PROBATION, id);
        }
        entry.tag = IS_PROTECTED;
        lists.push_back(PROTECTED, id);
        self.protected += 1;
        if self.protected > self.most
            && let Some(oldest) = lists.front(PROTECTED)
        {
            lists.remove(oldest);
            self.leave(&mut entries[oldest as usize]);
            entries[oldest as usize].uses = 1;
            lists.push_back(PROBATION, oldest);
        }
    }

    fn leave(&mut self, entry: &mut Entry) -> bool {
        self.protected -= u32::from(entry.tag == IS_PROTECTED);
        entry.tag = 0;
        true
    }

    fn next(&mut self, lists: &mut Lists) -> Option<u32> {
        lists.front(PROBATION).or_else(|| lists.front(PROTECTED))
    }

    fn ranked(&self, rank: usize) -> usize {
        [PROBATION, PROTECTED][rank]
    }
}
