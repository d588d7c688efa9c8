//! The methods of a set of ranks.

use std::collections::BTreeMap;

use hybridkv::Error;
use hybridkv::codec::Codec;
use hybridkv::manager::{BlockHash, Outcome, Path, Rank, RankSet, Report, Transfer};
use proptest::prelude::*;

use super::{
    Method, Reasons, Subject, all_are_named, never, show, what_is_refused_has_never_been, when,
};

const RANKS: u32 = 4;

/// A set, and what the caller has seen of its ranks.
struct Ranked {
    set: RankSet,
    /// By rank: how often it came back, steps that it finished, whether it is lost.
    ranks: Vec<(u32, u64, bool)>,
    /// By transfer in flight, the ranks that have yet to answer it.
    waiting: BTreeMap<u64, Vec<Rank>>,
    /// Transfers that a rank has taken and not answered.
    taken: Vec<Vec<u64>>,
}

#[derive(Debug, Clone)]
struct Raw {
    rank: Rank,
    /// Behind the rank's epoch by this much.
    late: u32,
    transfer: u64,
    stores: bool,
    outcome: Outcome,
    steps: u64,
}

impl Ranked {
    fn new(kv_heads: &u32) -> Self {
        Self {
            set: RankSet::new(RANKS, *kv_heads).unwrap(),
            ranks: vec![(0, 0, false); RANKS as usize],
            waiting: BTreeMap::new(),
            taken: vec![Vec::new(); RANKS as usize],
        }
    }

    fn unknown(&self, a: &Raw) -> Reasons {
        when(a.rank >= RANKS, "UnknownRank")
    }

    fn is_late(&self, a: &Raw) -> bool {
        self.ranks.get(a.rank as usize).is_some_and(|(_, _, lost)| *lost || a.late > 0)
    }

    fn epoch(&self, a: &Raw) -> u32 {
        self.ranks.get(a.rank as usize).map_or(0, |(epoch, ..)| epoch.wrapping_sub(a.late))
    }
}

impl Subject for Ranked {
    type Raw = Raw;
    type Args = Raw;

    fn resolve(&self, raw: &Raw) -> Raw {
        // Mostly something that the rank has taken.
        let taken = self.taken.get(raw.rank as usize).and_then(|taken| taken.first());
        let transfer =
            taken.copied().filter(|_| !raw.transfer.is_multiple_of(3)).unwrap_or(raw.transfer);
        Raw { transfer, ..raw.clone() }
    }

    fn begins_by(&self, _: &Error) -> bool {
        false
    }

    fn follow_up(&mut self) -> String {
        String::new()
    }

    fn seen(&mut self) -> String {
        let set = &self.set;
        let of_rank = |rank| (set.behind(rank).unwrap(), set.epoch(rank).unwrap());
        format!("{:?} {}", (0..RANKS).map(of_rank).collect::<Vec<_>>(), set.settled())
    }
}

fn method(
    name: &'static str,
    weight: u32,
    call: fn(&mut Ranked, &Raw) -> Result<String, Error>,
    reasons: fn(&Ranked, &Raw) -> Reasons,
) -> Method<Ranked> {
    Method { name, weight, call, reasons }
}

/// Every public method of a set.
fn methods() -> Vec<Method<Ranked>> {
    vec![
        method(
            "new",
            2,
            |_, a| show(RankSet::new(a.rank, a.steps as u32).map(|set| set.num_ranks())),
            |_, a| {
                let (ranks, heads) = (u64::from(a.rank), u64::from(a.steps as u32));
                let even = |a: u64, b: u64| b > 0 && a.is_multiple_of(b);
                when(ranks == 0 || ranks > u64::from(RankSet::MAX_RANKS), "Unsupported").when(
                    heads == 0 || !even(ranks, heads) && !even(heads, ranks),
                    "InvalidArgument",
                )
            },
        ),
        method("num_ranks", 1, |s, _| show(Ok(s.set.num_ranks())), |_, _| never()),
        method("owner", 1, |s, a| show(Ok(s.set.owner(a.rank))), |_, _| never()),
        method(
            "broadcast",
            20,
            |s, a| {
                let path = match a.stores {
                    true => Path::Offload { from: 1, to: 1 },
                    false => Path::Onboard { from: 1, to: 1 },
                };
                let (id, hash) = (a.transfer, BlockHash::NONE);
                let report = s.set.broadcast(Transfer {
                    id,
                    path,
                    group: 0,
                    hash,
                    codec: Codec::Raw,
                    seq: None,
                })?;
                if report == Report::Pending {
                    let owner = |rank: &Rank| s.set.owner(*rank) == *rank;
                    let part = (0..RANKS).filter(|rank| !a.stores || owner(rank));
                    s.waiting.insert(id, part.collect());
                }
                show(Ok(report))
            },
            |s, a| when(s.waiting.contains_key(&a.transfer), "InvalidArgument"),
        ),
        method(
            "next",
            40,
            |s, a| {
                let next = s.set.next(a.rank);
                if let Some(transfer) = next {
                    s.taken[a.rank as usize].push(transfer.id);
                }
                show(Ok(next))
            },
            |_, _| never(),
        ),
        method(
            "complete",
            40,
            |s, a| {
                let report = s.set.complete(a.rank, s.epoch(a), a.transfer, a.outcome)?;
                if report != Report::Stale {
                    s.taken[a.rank as usize].retain(|&id| id != a.transfer);
                    let waiting = s.waiting.get_mut(&a.transfer).unwrap();
                    waiting.retain(|&rank| rank != a.rank);
                    assert_eq!(waiting.is_empty(), matches!(report, Report::Done(_)));
                    s.waiting.retain(|_, waiting| !waiting.is_empty());
                }
                show(Ok(report))
            },
            |s, a| {
                let taken = s.taken.get(a.rank as usize);
                let known = taken.is_some_and(|taken| taken.contains(&a.transfer));
                s.unknown(a).when(a.rank < RANKS && !s.is_late(a) && !known, "UnknownTransfer")
            },
        ),
        method(
            "finished",
            10,
            |s, a| {
                let settled = s.set.finished(a.rank, s.epoch(a), a.steps)?;
                if !s.is_late(a) {
                    s.ranks[a.rank as usize].1 = a.steps;
                }
                show(Ok(settled))
            },
            |s, a| {
                let before = s.ranks.get(a.rank as usize).map_or(0, |(_, steps, _)| *steps);
                s.unknown(a).when(!s.is_late(a) && a.steps < before, "InvalidArgument")
            },
        ),
        method("settled", 1, |s, _| show(Ok(s.set.settled())), |_, _| never()),
        method("behind", 2, |s, a| show(s.set.behind(a.rank)), Ranked::unknown),
        method("epoch", 2, |s, a| show(s.set.epoch(a.rank)), Ranked::unknown),
        method(
            "lose",
            4,
            |s, a| {
                let mut done = Vec::new();
                s.set.lose(a.rank, &mut done)?;
                s.ranks[a.rank as usize].2 = true;
                s.taken[a.rank as usize].clear();
                s.waiting.values_mut().for_each(|waiting| waiting.retain(|&r| r != a.rank));
                let ended = |(_, waiting): &(&u64, &Vec<Rank>)| waiting.is_empty();
                let failed: Vec<_> = s.waiting.iter().filter(ended).map(|(&id, _)| id).collect();
                let failed = failed.into_iter().map(|id| (id, Outcome::Failed));
                assert_eq!(done, failed.collect::<Vec<_>>());
                s.waiting.retain(|_, waiting| !waiting.is_empty());
                show(Ok(done))
            },
            Ranked::unknown,
        ),
        method(
            "rejoin",
            8,
            |s, a| {
                let epoch = s.set.rejoin(a.rank, a.steps)?;
                s.ranks[a.rank as usize] = (epoch, a.steps, false);
                show(Ok(epoch))
            },
            |s, a| {
                let lost = s.ranks.get(a.rank as usize).is_some_and(|(_, _, lost)| *lost);
                s.unknown(a).when(a.rank < RANKS && !lost, "InvalidArgument")
            },
        ),
    ]
}

fn raw() -> impl Strategy<Value = Raw> + Clone {
    let rank = prop_oneof![20 => 0..RANKS, 1 => Just(RANKS), 1 => Just(u32::MAX)];
    let late = prop_oneof![6 => Just(0u32), 1 => 1u32..3];
    let outcome = prop_oneof![5 => Just(Outcome::Succeeded), 1 => Just(Outcome::Failed)];
    let steps = prop_oneof![8 => 0u64..20, 1 => Just(u64::MAX)];
    (rank, late, 0u64..12, any::<bool>(), outcome, steps).prop_map(
        |(rank, late, transfer, stores, outcome, steps)| Raw {
            rank,
            late,
            transfer,
            stores,
            outcome,
            steps,
        },
    )
}

#[test]
fn every_method_of_a_set_of_ranks_takes_part() {
    all_are_named("RankSet", &methods());
}

#[test]
fn a_set_of_ranks_never_knows_what_it_refused() {
    let refusable =
        ["new", "broadcast", "complete", "finished", "behind", "epoch", "lose", "rejoin"];
    let kv_heads = prop::sample::select(vec![1u32, 2, 4, 8]);
    what_is_refused_has_never_been(&methods(), kv_heads, raw(), Ranked::new, &refusable);
}
