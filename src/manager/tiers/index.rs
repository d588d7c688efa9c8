//! The prefix index of a tier: from the key of a block, its hash and group, to its place in the tier.
//!
//! A table of 8-byte cells with linear probing; a cell is a tag, 32 bits of the key, and a place. The key itself is
//! stored once, with the block, so that whoever asks compares it there. Hashes are cryptographic: tags are spread
//! evenly as they are, and a cell belongs at the fraction of the table that its tag is of all tags. Cells are moved
//! back when one goes, so that nothing has to be cleaned up later, and the table is made once for all places of the
//! tier: no operation allocates.

use crate::manager::hash::BlockHash;

/// 32 bits of a key.
#[derive(Clone, Copy)]
pub(super) struct Tag(u32);

impl Tag {
    pub fn new(group: usize, hash: &BlockHash) -> Self {
        let [a, b, c, d, ..] = *hash.as_bytes();
        Self(u32::from_le_bytes([a, b, c, d]) ^ (group as u32).wrapping_mul(0x9E37_79B9))
    }
}

/// The table.
pub(super) struct Index {
    /// Tag in the high half, place + 1 in the low one; 0 where there is none.
    cells: Vec<u64>,
}

impl Index {
    /// An empty index for up to `places` places and `more` that are few as a rule: for these it gets fewer cells.
    pub fn new(places: usize, more: usize) -> Self {
        Self { cells: vec![0; 2 * places + more + 1] }
    }

    /// Bytes of the table.
    pub fn bytes(&self) -> usize {
        size_of_val(self.cells.as_slice())
    }

    /// Reads the cells of tags that are about to be used, so that their ways through memory overlap.
    pub fn warm(&self, tags: impl Iterator<Item = Tag>) {
        std::hint::black_box(tags.fold(0, |sum, tag| sum ^ self.cells[self.home(tag)]));
    }

    /// The place under a tag for which `is_it` holds.
    pub fn find(&self, tag: Tag, is_it: impl Fn(u32) -> bool) -> Option<u32> {
        self.search(tag, is_it).ok()
    }

    /// Adds a place under a tag, unless there is one already for which `is_it` holds: that one. There are never more
    /// of them than the index was made for.
    pub fn find_or_insert(
        &mut self,
        tag: Tag,
        place: u32,
        is_it: impl Fn(u32) -> bool,
    ) -> Option<u32> {
        match self.search(tag, is_it) {
            Ok(found) => Some(found),
            Err(free) => {
                self.cells[free] = cell(tag, place);
                None
            }
        }
    }

    /// Adds a place under a tag, whatever else is there.
    pub fn insert(&mut self, tag: Tag, place: u32) {
        self.find_or_insert(tag, place, |_| false);
    }

    /// The place under a tag for which `is_it` holds, or the cell where one is to be added.
    fn search(&self, tag: Tag, is_it: impl Fn(u32) -> bool) -> std::result::Result<u32, usize> {
        let mut at = self.home(tag);
        loop {
            let cell = self.cells[at];
            if cell == 0 {
                return Err(at);
            }
            let place = cell as u32 - 1;
            if (cell >> 32) as u32 == tag.0 && is_it(place) {
                return Ok(place);
            }
            at = self.next(at);
        }
    }

    /// Puts one place where another one is under the same tag; no change when it is not there.
    pub fn replace(&mut self, tag: Tag, place: u32, by: u32) {
        if let Some(at) = self.cell_of(tag, place) {
            self.cells[at] = cell(tag, by);
        }
    }

    /// Takes a place out.
    pub fn remove(&mut self, tag: Tag, place: u32) {
        let Some(mut hole) = self.cell_of(tag, place) else {
            debug_assert!(false, "place {place} is not in the index");
            return;
        };
        let mut at = hole;
        loop {
            at = self.next(at);
            let cell = self.cells[at];
            if cell == 0 {
                break;
            }
            // One that is found from the hole on fills it. What any other one leaves there is written over: a branch
            // would cost more than the write, for nobody could predict it.
            let home = self.home(Tag((cell >> 32) as u32));
            self.cells[hole] = cell;
            hole = match self.distance(home, at) >= self.distance(hole, at) {
                true => at,
                false => hole,
            };
        }
        self.cells[hole] = 0;
    }

    /// Empties it.
    pub fn clear(&mut self) {
        self.cells.fill(0);
    }

    fn cell_of(&self, tag: Tag, place: u32) -> Option<usize> {
        let mut at = self.home(tag);
        while self.cells[at] != cell(tag, place) {
            if self.cells[at] == 0 {
                return None;
            }
            at = self.next(at);
        }
        Some(at)
    }

    fn home(&self, tag: Tag) -> usize {
        ((u64::from(tag.0) * self.cells.len() as u64) >> 32) as usize
    }

    fn next(&self, at: usize) -> usize {
        if at + 1 == self.cells.len() { 0 } else { at + 1 }
    }

    /// Steps from one cell on to another.
    fn distance(&self, from: usize, to: usize) -> usize {
        if to >= from { to - from } else { to + self.cells.len() - from }
    }
}

fn cell(tag: Tag, place: u32) -> u64 {
    (u64::from(tag.0) << 32) | (u64::from(place) + 1)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    const PLACES: u32 = 24;

    proptest! {
        /// Beside a map, with tags so few that most cells stand away from home, and around the table's end.
        #[test]
        fn index_is_a_map(
            operations in prop::collection::vec((0..PLACES, 0u32..9, 0u32..3), 1..400)
        ) {
            let mut index = Index::new(PLACES as usize, 0);
            let mut map: HashMap<u32, Tag> = HashMap::new();
            let tag = |n: u32| Tag(u32::MAX / 8 * n.min(7) + n % 8 * 3);
            for (place, n, operation) in operations {
                match (operation, map.get(&place).copied()) {
                    (0, _) => {
                        let found = index.find(tag(n), |p| p % 2 == place % 2);
                        let known = |p: u32| map.get(&p).is_some_and(|t| t.0 == tag(n).0);
                        let expected = (0..PLACES).any(|p| p % 2 == place % 2 && known(p));
                        prop_assert_eq!(found.is_some(), expected);
                        prop_assert!(found.is_none_or(|p| p % 2 == place % 2 && known(p)));
                    }
                    (1, Some(old)) => {
                        index.remove(old, place);
                        map.remove(&place);
                    }
                    (2, Some(old)) => {
                        let by = (0..PLACES).find(|p| !map.contains_key(p));
                        if let Some(by) = by {
                            index.replace(old, place, by);
                            map.remove(&place);
                            map.insert(by, old);
                        }
                    }
                    (_, None) => {
                        index.insert(tag(n), place);
                        map.insert(place, tag(n));
                    }
                    _ => {}
                }
                for (&place, &tag) in &map {
                    prop_assert_eq!(index.find(tag, |p| p == place), Some(place));
                }
                let used = index.cells.iter().filter(|&&cell| cell != 0).count();
                prop_assert_eq!(used, map.len());
            }
        }
    }
}
