//! Blocks by class and age, one list for each. Ages are octaves: a list joins the next older one, in constant time,
//! when the clock has a fitting number of trailing zeros. In which order the lists are emptied is said from outside.

use super::Lists;

/// What is told apart of blocks of an age.
pub(super) const CLASSES: usize = 4;
pub(super) const AGES: usize = 16;

/// The list of a class and an age.
pub(super) fn list(class: usize, age: usize) -> usize {
    class * AGES + age
}

/// An order of all lists.
pub(super) struct Ranks {
    /// Lists, the first to be emptied first, and the rank of each.
    list: [u8; Shelves::LISTS],
    rank: [u8; Shelves::LISTS],
}

impl Ranks {
    /// The lists of the least worth first; of equal worth, the older first.
    pub fn by_worth(worth: &[f64; Shelves::LISTS]) -> Self {
        let mut list: [u8; Shelves::LISTS] = std::array::from_fn(|i| i as u8);
        let age = |list: u8| usize::from(list) % AGES;
        list.sort_by(|&a, &b| {
            worth[usize::from(a)].total_cmp(&worth[usize::from(b)]).then(age(b).cmp(&age(a)))
        });
        let mut rank = [0; Shelves::LISTS];
        for (at, &list) in list.iter().enumerate() {
            rank[usize::from(list)] = at as u8;
        }
        Self { list, rank }
    }

    /// The older lists first, whatever their class.
    pub fn by_age() -> Self {
        Self::by_worth(&[0.0; Shelves::LISTS])
    }

    /// The list of a rank.
    pub fn list(&self, rank: usize) -> usize {
        self.list[rank].into()
    }

    fn bit(&self, list: usize) -> u64 {
        1 << self.rank[list]
    }
}

/// Which lists hold something; the lists themselves are the caller's.
pub(super) struct Shelves {
    /// The first of them.
    first: usize,
    /// Ranks whose lists may hold something.
    waiting: u64,
}

impl Shelves {
    pub const LISTS: usize = CLASSES * AGES;

    pub fn new(first: usize) -> Self {
        Self { first, waiting: 0 }
    }

    /// Puts a block at the end of the youngest list of a class.
    pub fn place(&mut self, lists: &mut Lists, ranks: &Ranks, class: usize, id: u32) {
        let list = list(class, 0);
        lists.push_back(self.first + list, id);
        self.waiting |= ranks.bit(list);
    }

    /// The block to go next, which stays.
    pub fn next(&mut self, lists: &Lists, ranks: &Ranks) -> Option<u32> {
        while self.waiting != 0 {
            let rank = self.waiting.trailing_zeros() as usize;
            match lists.front(self.first + ranks.list(rank)) {
                Some(id) => return Some(id),
                None => self.waiting &= self.waiting - 1,
            }
        }
        None
    }

    /// Every list up to an age joins the next.
    pub fn tick(&mut self, lists: &mut Lists, ranks: &Ranks, oldest: usize) {
        for age in (0..=oldest).rev() {
            for class in 0..CLASSES {
                let (from, to) = (list(class, age), list(class, age + 1));
                if self.waiting & ranks.bit(from) != 0 {
                    lists.append(self.first + to, self.first + from);
                    self.waiting = self.waiting & !ranks.bit(from) | ranks.bit(to);
                }
            }
        }
    }

    /// The lists have other ranks now.
    pub fn reranked(&mut self, old: &Ranks, new: &Ranks) {
        let waiting = (0..Self::LISTS).filter(|&list| self.waiting & old.bit(list) != 0);
        self.waiting = waiting.fold(0, |bits, list| bits | new.bit(list));
    }
}
