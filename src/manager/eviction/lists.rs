//! Lists of block indices over one array of links: every index stands in at most one list, enters at either
//! end and leaves from any place, each in constant time; a whole list joins another in constant time, too.

/// Marks an index that stands in no list.
const OUT: u32 = u32::MAX;

#[derive(Clone, Copy)]
struct Link {
    prev: u32,
    next: u32,
}

/// Rings of links; the sentinel of list `l` is the index `len + l`.
pub(in super::super) struct Lists {
    links: Vec<Link>,
    len: u32,
}

impl Lists {
    /// `lists` empty lists for the indices `0..len`.
    pub fn new(len: u32, lists: usize) -> Self {
        let mut links = vec![Link { prev: OUT, next: OUT }; len as usize];
        links.extend((len..).take(lists).map(|head| Link { prev: head, next: head }));
        Self { links, len }
    }

    /// Bytes of the links.
    pub fn bytes(&self) -> usize {
        size_of_val(self.links.as_slice())
    }

    /// One more list, empty.
    pub fn add(&mut self) {
        let head = self.links.len() as u32;
        self.links.push(Link { prev: head, next: head });
    }

    pub fn contains(&self, index: u32) -> bool {
        self.links[index as usize].next != OUT
    }

    pub fn front(&self, list: usize) -> Option<u32> {
        let first = self.links[self.head(list) as usize].next;
        (first < self.len).then_some(first)
    }

    /// Takes an index out of its list, if it stands in one.
    pub fn remove(&mut self, index: u32) {
        let Link { prev, next } = self.links[index as usize];
        if next == OUT {
            return;
        }
        self.links[prev as usize].next = next;
        self.links[next as usize].prev = prev;
        self.links[index as usize] = Link { prev: OUT, next: OUT };
    }

    pub fn push_back(&mut self, list: usize, index: u32) {
        let head = self.head(list);
        self.insert_after(self.links[head as usize].prev, index);
    }

    pub fn push_front(&mut self, list: usize, index: u32) {
        self.insert_after(self.head(list), index);
    }

    /// Puts an index that stands in no list behind one that does.
    pub fn insert_after(&mut self, prev: u32, index: u32) {
        let next = self.links[prev as usize].next;
        self.links[prev as usize].next = index;
        self.links[next as usize].prev = index;
        self.links[index as usize] = Link { prev, next };
    }

    /// Moves everything in `from` to the back of `to`, in its order.
    pub fn append(&mut self, to: usize, from: usize) {
        let (to, from) = (self.head(to), self.head(from));
        let Link { prev: last, next: first } = self.links[from as usize];
        if first == from {
            return;
        }
        let end = self.links[to as usize].prev;
        self.links[end as usize].next = first;
        self.links[first as usize].prev = end;
        self.links[last as usize].next = to;
        self.links[to as usize].prev = last;
        self.links[from as usize] = Link { prev: from, next: from };
    }

    /// All of a list, front first.
    pub fn iter(&self, list: usize) -> impl Iterator<Item = u32> + '_ {
        let mut at = self.head(list);
        std::iter::from_fn(move || {
            at = self.links[at as usize].next;
            (at < self.len).then_some(at)
        })
    }

    fn head(&self, list: usize) -> u32 {
        self.len + list as u32
    }
}
