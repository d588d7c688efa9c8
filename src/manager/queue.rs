//! A queue of indices in which every index stands at most once and leaves from any place in constant
//! time: a ring of links, one pair per index, closed by a sentinel.

/// Marks an index that is not queued.
const OUT: u32 = u32::MAX;

#[derive(Clone, Copy)]
struct Link {
    prev: u32,
    next: u32,
}

/// The queue. Index 0 is the sentinel and is never queued.
pub(super) struct IndexQueue(Vec<Link>);

impl IndexQueue {
    /// An empty queue for the indices `1..len`.
    pub fn new(len: u32) -> Self {
        let mut links = vec![Link { prev: OUT, next: OUT }; len.max(1) as usize];
        links[0] = Link { prev: 0, next: 0 };
        Self(links)
    }

    /// Bytes of the links.
    pub fn bytes(&self) -> usize {
        size_of_val(self.0.as_slice())
    }

    pub fn contains(&self, index: u32) -> bool {
        self.0[index as usize].next != OUT
    }

    pub fn pop_front(&mut self) -> Option<u32> {
        let first = self.0[0].next;
        (first != 0).then(|| {
            self.remove(first);
            first
        })
    }

    /// Takes out an index that is queued.
    pub fn remove(&mut self, index: u32) {
        let Link { prev, next } = self.0[index as usize];
        self.0[prev as usize].next = next;
        self.0[next as usize].prev = prev;
        self.0[index as usize] = Link { prev: OUT, next: OUT };
    }

    pub fn push_back(&mut self, index: u32) {
        self.insert_after(self.0[0].prev, index);
    }

    /// Queues an index that is not, behind `prev`: a queued index, or 0 for the front.
    pub fn insert_after(&mut self, prev: u32, index: u32) {
        let next = self.0[prev as usize].next;
        self.0[prev as usize].next = index;
        self.0[next as usize].prev = index;
        self.0[index as usize] = Link { prev, next };
    }
}
