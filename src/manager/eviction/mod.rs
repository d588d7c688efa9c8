//! Eviction: the order in which blocks without a user give way, in every tier by a policy of its own.
//!
//! A tier tells its [`Order`] what happens to its blocks; the order answers which one is reused next. Blocks
//! that hold nothing stand in front of all others, then the rest, as the tier's [`Policy`] ranks them.
//! Sequences are released end first, and within one list the first to come is the first to go, so heads
//! outlive tails. Every operation takes constant time, amortised; none allocates.

mod arc;
mod fifo;
mod history;
mod lfu;
mod lists;
mod lru;
mod priority;
mod reuse;
mod shelves;
mod slru;
#[cfg(test)]
mod tests;
mod trial;

use serde::Deserialize;

pub(super) use self::lists::Lists;

/// Which cached block gives way first when a tier is full.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Eviction {
    /// The least recently used one.
    Lru,
    /// The one stored first, used since or not.
    Fifo,
    /// The one used least often (up to 31 times), of those the least recently used.
    Lfu,
    /// Segmented LRU: blocks that were used again are protected, up to four fifths of the tier.
    Slru,
    /// Adaptive replacement: recency and frequency share the tier as the misses of either ask for
    /// (Megiddo and Modha, FAST 2003).
    Arc,
    /// The one of the lowest priority (see [`super::Manager::prioritize`]), of those the least recently used.
    Priority,
    /// The one of the least expected use: uses of blocks of the same kind, age and number of uses so far, as
    /// the recent past had them, per block and time until the use (docs/policies.md).
    #[default]
    Reuse,
}

impl Eviction {
    /// All of them.
    pub const ALL: &[Self] =
        &[Self::Lru, Self::Fifo, Self::Lfu, Self::Slru, Self::Arc, Self::Priority, Self::Reuse];

    fn policy(self, len: u32) -> Box<dyn Policy> {
        match self {
            Self::Lru => Box::new(lru::Lru),
            Self::Fifo => Box::new(fifo::Fifo),
            Self::Lfu => Box::new(lfu::Lfu),
            Self::Slru => Box::new(slru::Slru::new(len)),
            Self::Arc => Box::new(arc::Arc::new(len)),
            Self::Priority => Box::new(priority::Priority),
            Self::Reuse => Box::new(reuse::Reuse::new(len)),
        }
    }
}

/// What an order knows of one block while it holds something.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Entry {
    /// Uses of what it holds, the one that stored it included; saturating.
    pub uses: u8,
    /// The highest priority of its users.
    pub priority: u8,
    /// The policy's own.
    pub tag: u8,
}

/// How one policy ranks blocks. Lists are its own, from [`POLICY`] on.
trait Policy: Send {
    /// Lists that it needs.
    fn lists(&self) -> usize;

    /// The content named by `key` is about to be used.
    fn warm(&self, _key: u64) {}

    /// The content named by `key` has been stored, or used where it lay: of a block with this index in its
    /// sequence. Gives the uses of it before that the policy remembers of contents which the tier may have lost since.
    fn used(&mut self, _key: u64, _index: usize, _hit: bool, _lists: &mut Lists) -> u8 {
        0
    }

    /// The content named by `key` has been evicted.
    fn evicted(&mut self, _key: u64, _entry: &Entry) {}

    /// Lets a block that lost its last user stand in line.
    fn place(&mut self, id: u32, lists: &mut Lists, entries: &mut [Entry]);

    /// A block got a user; `entry` is the block's. Whether it leaves the line until it is placed again.
    fn leave(&mut self, _entry: &mut Entry) -> bool {
        true
    }

    /// The block to go next, which stays in line.
    fn next(&mut self, lists: &mut Lists) -> Option<u32>;

    /// The list of each rank below [`Self::lists`], as they would be emptied now.
    fn ranked(&self, rank: usize) -> usize;

    /// Bytes that it keeps besides the lists and entries.
    fn bytes(&self) -> usize {
        0
    }
}

/// The last block of the stride that block `index` of a sequence is in.
pub(super) fn last_of_stride(index: usize) -> usize {
    index - index % Order::STRIDE + Order::STRIDE - 1
}

/// Whether block `index` of a sequence is the one that [`Order::recall`] is asked for.
pub(super) fn is_last_of_stride(index: usize) -> bool {
    index == last_of_stride(index)
}

/// Blocks that hold nothing.
const EMPTY: usize = 0;
/// Blocks that hold something which is hardly of use to anybody, or whose turn had come.
const DEMOTED: usize = 1;
/// The first list of the policy.
const POLICY: usize = 2;

/// The order in which a tier's blocks are reused.
pub(super) struct Order {
    lists: Lists,
    entries: Vec<Entry>,
    policy: Box<dyn Policy>,
    /// Where the next block without content goes in a release, so that the end of a sequence stands before
    /// its start.
    scratch: Option<u32>,
}

impl Order {
    /// An order of the indices `0..len`, none of which stands in line.
    pub fn new(eviction: Eviction, len: u32) -> Self {
        let policy = eviction.policy(len);
        Self {
            lists: Lists::new(len, POLICY + policy.lists()),
            entries: vec![Entry::default(); len as usize],
            policy,
            scratch: None,
        }
    }

    /// Bytes of all that is kept per block.
    pub fn bytes(&self) -> usize {
        self.lists.bytes() + size_of_val(self.entries.as_slice()) + self.policy.bytes()
    }

    /// Notes a use of the content `key` of the block of this index in its sequence, and gives how often it has
    /// been used before, as far as the policy remembers. Asked for one block in [`Self::STRIDE`] of a sequence, of
    /// which it is the last, from the start of the sequence on.
    pub fn recall(&mut self, key: u64, index: usize, hit: bool) -> u8 {
        self.policy.used(key, index, hit, &mut self.lists)
    }

    /// Says that [`Self::recall`] is about to be asked for this content, so that the way to what is remembered of
    /// it overlaps with other work.
    pub fn warm(&self, key: u64) {
        self.policy.warm(key);
    }

    /// Blocks of a sequence that share one memory of their uses.
    pub const STRIDE: usize = 32;

    /// A block holds something now that has been used `before` times.
    pub fn stored(&mut self, id: u32, before: u8) {
        self.entries[id as usize] = Entry { uses: before.saturating_add(1), ..Entry::default() };
    }

    /// Uses of what a block holds.
    pub fn uses(&self, id: u32) -> u8 {
        self.entries[id as usize].uses
    }

    /// What a block holds counts as used as often as what another one holds.
    pub fn follow(&mut self, id: u32, other: u32) {
        self.entries[id as usize].uses = self.entries[other as usize].uses;
    }

    /// A block holds something now of which another tier knows this.
    pub fn adopted(&mut self, id: u32, entry: Entry) {
        self.entries[id as usize] = Entry { tag: 0, ..entry };
    }

    /// What is known of what a block holds.
    pub fn entry(&self, id: u32) -> Entry {
        self.entries[id as usize]
    }

    /// What a block holds is used by one more.
    pub fn hit(&mut self, id: u32) {
        let entry = &mut self.entries[id as usize];
        entry.uses = entry.uses.saturating_add(1);
    }

    /// What a block holds is of this priority at least.
    pub fn raise(&mut self, id: u32, priority: u8) {
        let entry = &mut self.entries[id as usize];
        entry.priority = entry.priority.max(priority);
    }

    /// Whether a block stands in line.
    pub fn contains(&self, id: u32) -> bool {
        self.lists.contains(id)
    }

    /// A block has a user again.
    pub fn leave(&mut self, id: u32) {
        if self.lists.contains(id) && self.policy.leave(&mut self.entries[id as usize]) {
            self.lists.remove(id);
        }
    }

    /// Begins a release of blocks, of a sequence's end first.
    pub fn begin_release(&mut self) {
        self.scratch = None;
    }

    /// A block that holds something has no user any more.
    pub fn place(&mut self, id: u32) {
        if !self.lists.contains(id) {
            self.policy.place(id, &mut self.lists, &mut self.entries);
        }
    }

    /// A block that holds nothing has no user any more: it is reused before all that hold something, after
    /// those of the same release that came before it.
    pub fn place_empty(&mut self, id: u32) {
        self.lists.remove(id);
        match self.scratch {
            Some(prev) if self.lists.contains(prev) => self.lists.insert_after(prev, id),
            _ => self.lists.push_front(EMPTY, id),
        }
        self.scratch = Some(id);
    }

    /// Lets a block whose turn had come stand in line as the first of those that hold something.
    pub fn place_first(&mut self, id: u32) {
        self.lists.push_front(DEMOTED, id);
    }

    /// Takes a block out of line, if it stands there, whatever becomes of it.
    pub fn remove(&mut self, id: u32) {
        if self.lists.contains(id) {
            self.policy.leave(&mut self.entries[id as usize]);
            self.lists.remove(id);
        }
    }

    /// A block that has no user any more holds something that goes before what the policy ranks; of several
    /// such blocks the first demoted.
    pub fn demote(&mut self, id: u32) {
        self.lists.remove(id);
        self.lists.push_back(DEMOTED, id);
    }

    /// Takes the next block out of line.
    pub fn pop(&mut self) -> Option<u32> {
        let waiting = self.lists.front(EMPTY).or_else(|| self.lists.front(DEMOTED));
        let id = match waiting {
            Some(id) => id,
            None => {
                let id = self.policy.next(&mut self.lists)?;
                self.policy.leave(&mut self.entries[id as usize]);
                id
            }
        };
        self.lists.remove(id);
        Some(id)
    }

    /// The content of a block that was taken for something else.
    pub fn evicted(&mut self, id: u32, key: u64) {
        self.policy.evicted(key, &self.entries[id as usize]);
    }

    /// All that stand in line, the next to go first, as it would be without further uses.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        let ranked = (0..self.policy.lists()).map(|rank| self.policy.ranked(rank));
        [EMPTY, DEMOTED].into_iter().chain(ranked).flat_map(|list| self.lists.iter(list))
    }
}
