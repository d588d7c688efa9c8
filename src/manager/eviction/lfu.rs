//! Least frequently used: a list per number of uses.

use super::{Entry, Lists, POLICY, Policy};

pub(super) struct Lfu;

const LISTS: usize = 32;

impl Policy for Lfu {
    fn lists(&self) -> usize {
        LISTS
    }

    fn place(&mut self, id: u32, lists: &mut Lists, entries: &mut [Entry]) {
        let uses = usize::from(entries[id as usize].uses);
        lists.push_back(POLICY + uses.min(LISTS - 1), id);
    }

    fn next(&mut self, lists: &mut Lists) -> Option<u32> {
        (POLICY..POLICY + LISTS).find_map(|list| lists.front(list))
    }

    fn ranked(&self, rank: usize) -> usize {
        POLICY + rank
    }
}
