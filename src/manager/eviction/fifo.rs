//! First in, first out: a block keeps its place while it is used.

use super::{Entry, Lists, POLICY, Policy};

pub(super) struct Fifo;

/// The block has stood in line since it was stored.
const SEEN: u8 = 1;

impl Policy for Fifo {
    fn lists(&self) -> usize {
        1
    }

    fn place(&mut self, id: u32, lists: &mut Lists, entries: &mut [Entry]) {
        let entry = &mut entries[id as usize];
        match entry.tag {
            // Its turn came while it was used.
            SEEN => lists.push_front(POLICY, id),
            _ => lists.push_back(POLICY, id),
        }
        entry.tag = SEEN;
    }

    fn leave(&mut self, _: &mut Entry) -> bool {
        false
    }

    fn next(&mut self, lists: &mut Lists) -> Option<u32> {
        lists.front(POLICY)
    }

    fn ranked(&self, rank: usize) -> usize {
        POLICY + rank
    }
}
