//! By priority of the requests, then least recently used.

use super::{Entry, Lists, POLICY, Policy};

pub(super) struct Priority;

/// Priorities from here on are one.
const LISTS: usize = 32;

impl Policy for Priority {
    fn lists(&self) -> usize {
        LISTS
    }

    fn place(&mut self, id: u32, lists: &mut Lists, entries: &mut [Entry]) {
        let priority = usize::from(entries[id as usize].priority);
        lists.push_back(POLICY + priority.min(LISTS - 1), id);
    }

    fn next(&mut self, lists: &mut Lists) -> Option<u32> {
        (POLICY..POLICY + LISTS).find_map(|list| lists.front(list))
    }

    fn ranked(&self, rank: usize) -> usize {
        POLICY + rank
    }
}
