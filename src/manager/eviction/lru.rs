//! Least recently used: one list, by the time of release.

use super::{Entry, Lists, POLICY, Policy};

pub(super) struct Lru;

impl Policy for Lru {
    fn lists(&self) -> usize {
        1
    }

    fn place(&mut self, id: u32, lists: &mut Lists, _: &mut [Entry]) {
        lists.push_back(POLICY, id);
    }

    fn next(&mut self, lists: &mut Lists) -> Option<u32> {
        lists.front(POLICY)
    }

    fn ranked(&self, rank: usize) -> usize {
        POLICY + rank
    }
}
