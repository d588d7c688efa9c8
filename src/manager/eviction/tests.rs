use proptest::prelude::*;

use super::{Eviction, Order};

const LEN: u32 = 12;

/// What a policy must do, told over a plain list of all blocks with content, in the order of their release.
struct Naive {
    eviction: Eviction,
    /// Blocks, uses, priority, and the times of storing and of release; `None` while used.
    blocks: Vec<(u32, u8, u8, usize, Option<usize>)>,
    now: usize,
}

impl Naive {
    fn next(&self) -> Option<u32> {
        let line = self.blocks.iter().filter(|block| block.4.is_some());
        let first =
            line.min_by_key(|&&(_, uses, priority, stored, released)| match self.eviction {
                Eviction::Fifo => (0, stored),
                Eviction::Lfu => (uses.min(31), released.unwrap_or(0)),
                Eviction::Priority => (priority, released.unwrap_or(0)),
                _ => (0, released.unwrap_or(0)),
            });
        first.map(|block| block.0)
    }
}

fn policies() -> impl Strategy<Value = Eviction> {
    prop::sample::select(vec![Eviction::Lru, Eviction::Fifo, Eviction::Lfu, Eviction::Priority])
}

proptest! {
    #[test]
    fn the_block_that_the_definition_names_goes_first(
        eviction in policies(),
        ops in prop::collection::vec((0u8..3, 1..LEN, 0u8..4), 1..200),
    ) {
        let mut order = Order::new(eviction, LEN);
        let mut naive = Naive { eviction, blocks: Vec::new(), now: 0 };
        for (op, id, priority) in ops {
            naive.now += 1;
            let now = naive.now;
            match (op, naive.blocks.iter().position(|block| block.0 == id)) {
                (0, None) => {
                    order.stored(id, 0);
                    order.raise(id, priority);
                    order.place(id);
                    naive.blocks.push((id, 1, priority, now, Some(now)));
                }
                (1, Some(at)) => {
                    order.hit(id);
                    order.leave(id);
                    order.place(id);
                    naive.blocks[at].1 += 1;
                    naive.blocks[at].4 = Some(now);
                }
                (2, _) => {
                    let next = naive.next();
                    prop_assert_eq!(order.pop(), next);
                    naive.blocks.retain(|block| Some(block.0) != next);
                }
                _ => {}
            }
        }
    }

    #[test]
    fn every_policy_gives_back_each_block_once(
        eviction in prop::sample::select(Eviction::ALL),
        stored in prop::collection::vec((any::<u64>(), 0u8..9), 1..400),
    ) {
        let len = stored.len() as u32;
        let mut order = Order::new(eviction, len);
        for (id, &(key, hits)) in (0u32..).zip(&stored) {
            let before = order.recall(key, Order::STRIDE - 1, false);
            order.stored(id, before);
            (0..hits).for_each(|_| order.hit(id));
            order.place(id);
        }
        let told: Vec<u32> = order.iter().collect();
        prop_assert_eq!(told.len(), stored.len());
        let mut given: Vec<u32> = std::iter::from_fn(|| order.pop()).collect();
        given.sort_unstable();
        prop_assert_eq!(given, (0..len).collect::<Vec<_>>());
    }
}

/// Uses of contents by one block each, in a tier of `len` blocks; gives how many found theirs.
fn hits(eviction: Eviction, len: u32, contents: impl Iterator<Item = u64>) -> usize {
    let mut order = Order::new(eviction, len);
    (0..len).for_each(|id| order.place_empty(id));
    let mut held = vec![None; len as usize];
    let mut hits = 0;
    for content in contents {
        let key = content.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ content.rotate_left(40);
        let at = held.iter().position(|&c| c == Some(content));
        let before = order.recall(key, Order::STRIDE - 1, at.is_some());
        if let Some(id) = at {
            hits += 1;
            order.hit(id as u32);
            order.leave(id as u32);
            order.place(id as u32);
        } else if let Some(id) = order.pop() {
            order.evicted(id, key);
            held[id as usize] = Some(content);
            order.stored(id, before);
            order.place(id);
        }
    }
    hits
}

#[test]
fn a_part_of_a_loop_stays_that_does_not_fit() {
    let uses = || (0..20_000u64).map(|i| i % 192);
    assert_eq!(hits(Eviction::Lru, 128, uses()), 0);
    assert!(hits(Eviction::Reuse, 128, uses()) > 2_000);
}

#[test]
fn a_scan_does_not_flush_what_comes_back() {
    // Every second use is of something new; the others go round 100 contents that fit by themselves.
    let uses = || (0..40_000u64).map(|i| if i % 2 == 0 { i / 2 % 100 } else { 1000 + i });
    let (lru, reuse) = (hits(Eviction::Lru, 128, uses()), hits(Eviction::Reuse, 128, uses()));
    assert!(reuse > lru + 10_000, "{reuse} against {lru}");
}

#[test]
fn what_age_tells_best_goes_by_age() {
    // What was used a few uses ago comes again, or something new; how often it was used says nothing.
    for seed in 1..6u64 {
        let uses = || {
            let (mut stack, mut random) = (Vec::new(), seed);
            let below = move |n: u64| {
                random =
                    random.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
                (random >> 33) % n
            };
            let mut below = below;
            (0..40_000u64).map(move |new| {
                let depth = (below(120) * below(120) / 60) as usize;
                let content = match below(10) < 3 || depth >= stack.len() {
                    true => new,
                    false => stack.remove(stack.len() - 1 - depth),
                };
                stack.push(content);
                content
            })
        };
        let (lru, reuse) = (hits(Eviction::Lru, 128, uses()), hits(Eviction::Reuse, 128, uses()));
        assert!(reuse * 100 >= lru * 99, "seed {seed}: {reuse}, LRU {lru}");
    }
}
