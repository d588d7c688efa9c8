//! A sequence's table in one group, as far as it holds blocks: those of the sinks, and those from the first live
//! one on. What lies between has left, is null and takes no memory, so that a windowed group's table of a
//! sequence of any length is as long as its window.

use std::ops::Range;

use super::BlockId;
use super::pool::NULL;

/// Blocks by their index in the sequence; [`NULL`] at freed and skipped positions.
#[derive(Debug, Default, Clone)]
pub(super) struct Table {
    /// Sink blocks that the group has.
    sinks: usize,
    head: Vec<BlockId>,
    /// Index of the first live block: none before it, sinks apart, is in the table. At least `sinks`.
    first: usize,
    /// `left` blocks that have left the table, and those from `first` on.
    tail: Vec<BlockId>,
    left: usize,
}

impl Table {
    /// A table of `len` null blocks of which those before `first`, sinks apart, are skipped for good.
    pub fn new(sinks: usize, first: usize, len: usize) -> Self {
        let first = first.min(len).max(sinks);
        Self {
            sinks,
            head: vec![NULL; sinks.min(len)],
            first,
            tail: vec![NULL; len.saturating_sub(first)],
            left: 0,
        }
    }

    /// The index behind the last block.
    pub fn len(&self) -> usize {
        match self.head.len() < self.sinks {
            true => self.head.len(),
            false => self.first + self.live().len(),
        }
    }

    /// The sink blocks.
    pub fn sinks(&self) -> &[BlockId] {
        &self.head
    }

    /// Index of the first block of [`Self::live`].
    pub fn first(&self) -> usize {
        self.first
    }

    /// The blocks from the first live one on.
    pub fn live(&self) -> &[BlockId] {
        &self.tail[self.left..]
    }

    /// The block at an index, [`NULL`] where there is none.
    pub fn get(&self, b: usize) -> BlockId {
        let place = match b < self.sinks {
            true => self.head.get(b),
            false => b.checked_sub(self.first).and_then(|at| self.live().get(at)),
        };
        place.copied().unwrap_or(NULL)
    }

    /// Puts a block at an index of the table that is live or of the sinks; gives what was there. No change
    /// elsewhere.
    pub fn replace(&mut self, b: usize, id: BlockId) -> BlockId {
        let place = match b < self.sinks {
            true => self.head.get_mut(b),
            false => {
                let left = self.left;
                b.checked_sub(self.first).and_then(|at| self.tail.get_mut(left + at))
            }
        };
        debug_assert!(place.is_some(), "block {b} has left the table, or is behind it");
        place.map_or(NULL, |place| std::mem::replace(place, id))
    }

    /// Adds a block behind the last one.
    pub fn push(&mut self, id: BlockId) {
        match self.head.len() < self.sinks {
            true => self.head.push(id),
            false => self.tail.push(id),
        }
    }

    /// Makes room for so many more blocks.
    pub fn make_room(&mut self, blocks: usize) {
        self.tail.reserve(blocks);
    }

    /// Adds null blocks up to a length.
    pub fn fill_up(&mut self, len: usize) {
        (self.len()..len).for_each(|_| self.push(NULL));
    }

    /// The last block, [`NULL`] when it has left.
    pub fn last(&self) -> Option<BlockId> {
        self.len().checked_sub(1).map(|b| self.get(b))
    }

    /// Indices of the blocks in the table, the null ones among them, ascending, from `b` on.
    pub fn indices_from(&self, b: usize) -> impl DoubleEndedIterator<Item = usize> + use<> {
        let (sinks, len) = (self.head.len(), self.len());
        (b.min(sinks)..sinks).chain(self.first.max(b).min(len)..len)
    }

    /// The blocks in the table, without the null ones, ascending.
    pub fn ids(&self) -> impl Iterator<Item = BlockId> + '_ {
        self.head.iter().chain(self.live()).copied().filter(|&id| id != NULL)
    }

    /// The indices that leave the table when the first live block is to be `first`.
    pub fn leaving(&self, first: usize) -> Range<usize> {
        self.first..first.min(self.len()).max(self.first)
    }

    /// Lets blocks leave.
    pub fn leave(&mut self, leaving: Range<usize>) {
        self.left += leaving.len();
        self.first += leaving.len();
        // As many are moved as have left: a constant time each.
        if self.left > self.tail.len() / 2 {
            self.tail.drain(..self.left);
            self.left = 0;
        }
    }

    /// Makes the blocks from `first` on live again, null ones.
    pub fn reach_back(&mut self, first: usize) {
        let back = self.first.saturating_sub(first.max(self.sinks));
        self.tail.splice(..self.left, std::iter::repeat_n(NULL, back));
        self.left = 0;
        self.first -= back;
    }

    /// Cuts the table off behind `len` blocks.
    pub fn truncate(&mut self, len: usize) {
        self.head.truncate(len);
        self.tail.truncate(self.left + len.saturating_sub(self.first));
        self.first = self.first.min(len).max(self.sinks);
    }

    /// All positions.
    pub fn to_vec(&self) -> Vec<BlockId> {
        let mut table = vec![NULL; self.len()];
        self.indices_from(0).for_each(|b| table[b] = self.get(b));
        table
    }

    /// Makes room for a table of `blocks` blocks in all, of which at most `live` live at once.
    pub fn reserve(&mut self, blocks: usize, live: usize) {
        self.head.reserve_exact(self.sinks.min(blocks).saturating_sub(self.head.len()));
        // Before blocks are moved, as many have left as are there.
        let tail = (2 * live + 2).min(blocks.saturating_sub(self.first) + self.left);
        self.tail.reserve_exact(tail.saturating_sub(self.tail.len()));
    }

    /// Bytes of its memory.
    pub fn bytes(&self) -> usize {
        (self.head.capacity() + self.tail.capacity()) * size_of::<BlockId>()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_table_is_a_vector_whose_middle_takes_no_memory(
            sinks in 0usize..4,
            ops in prop::collection::vec((0u8..6, 1usize..9), 1..200),
        ) {
            let mut table = Table::new(sinks, 0, 0);
            let mut model: Vec<BlockId> = Vec::new();
            let mut most = 0;
            for (number, (op, n)) in (1..).zip(ops) {
                let first = table.first();
                match op {
                    0 | 1 => (0..n).for_each(|_| {
                        table.push(number);
                        model.push(number);
                    }),
                    2 => {
                        let leaving = table.leaving(first + n);
                        leaving.clone().for_each(|b| model[b] = NULL);
                        table.leave(leaving);
                    }
                    3 => {
                        let len = model.len().saturating_sub(n);
                        table.truncate(len);
                        model.truncate(len);
                    }
                    4 if first < model.len() => {
                        let b = first + n % (model.len() - first);
                        prop_assert_eq!(table.replace(b, number), std::mem::replace(&mut model[b], number));
                    }
                    _ => table.reach_back(first.saturating_sub(n)),
                }
                prop_assert_eq!(table.len(), model.len());
                prop_assert_eq!(table.to_vec(), &model[..]);
                let all: Vec<BlockId> = (0..model.len() + 2).map(|b| table.get(b)).collect();
                prop_assert_eq!(&all[..model.len()], &model[..]);
                prop_assert_eq!(table.last(), model.last().copied());
                prop_assert!(table.ids().eq(model.iter().copied().filter(|&id| id != NULL)));
                most = most.max(table.live().len());
                prop_assert!(table.tail.len() <= 2 * most + 1);
            }
        }
    }
}
