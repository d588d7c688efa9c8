//! The manager's methods, and what a caller knows of its sequences.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;

use hybridkv::manager::{
    Allocation, BlockHash, Completion, CostModel, Eviction, ExtraKeys, GroupConfig, HashedTokens,
    HostConfig, Manager, ManagerConfig, Outcome, Retention, Stats, StorageConfig, StoredBlock,
    WritePolicy,
};
use hybridkv::spec::{AttentionKind, GroupKind};
use hybridkv::{Error, ErrorKind};
use proptest::prelude::*;

use super::{
    Method, Reasons, Subject, all_are_named, never, show, what_is_refused_has_never_been, when,
};

const MOST: u32 = 40;
const CAPACITY: [&str; 2] = ["NoFreeBlocks", "PoolTooSmall"];

/// A live sequence, as far as its caller knows it.
#[derive(Debug, Clone, Copy, Default)]
struct Sequence {
    len: usize,
    computed: usize,
    settled: usize,
    /// Waits for loads.
    loading: bool,
    /// Its steps run behind its loads.
    behind: bool,
    /// Has submitted a step of its own.
    begun: bool,
}

struct Managed {
    m: Manager,
    live: BTreeMap<u64, Sequence>,
    swapped: BTreeMap<u64, Sequence>,
    prefetched: BTreeSet<u64>,
    /// Handed out and not answered.
    flying: Vec<u64>,
    now: u64,
    host: bool,
    storage: bool,
}

/// How tokens were hashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hashing {
    Own,
    OtherUnit(usize),
    OtherIdentity,
}

/// A number that may fit the sequence it is meant for.
#[derive(Debug, Clone, Copy)]
enum Number {
    Any(usize),
    Len(isize),
    Computed(isize),
    Settled(isize),
}

/// A name that may be of something.
#[derive(Debug, Clone, Copy)]
enum Name {
    Any(u64),
    Live(usize),
    Swapped(usize),
    New,
}

/// Arguments of any call: each takes what it needs.
#[derive(Debug, Clone)]
struct Raw {
    seq: Name,
    other: Name,
    group: usize,
    n: Number,
    m: Number,
    tokens: Vec<u32>,
    salted: bool,
    hashing: Hashing,
    /// Of the transfers in flight; beyond them, one that is not.
    transfer: usize,
    outcome: Outcome,
    time: i64,
    odd: u8,
}

#[derive(Debug)]
struct Args {
    seq: u64,
    other: u64,
    n: usize,
    m: usize,
    transfer: u64,
    now: u64,
    raw: Raw,
}

impl Args {
    fn keys(&self) -> ExtraKeys<'static> {
        ExtraKeys { salt: if self.raw.salted { "tenant" } else { "" }, lora: "" }
    }

    fn host(&self) -> HostConfig {
        let host = HostConfig::new(20);
        match self.raw.odd {
            0 => HostConfig { max_offloads: 0, ..host },
            1 => HostConfig { num_slots: u32::MAX, ..host },
            2 => host.with_write(WritePolicy::Selective { uses: 0 }),
            _ => host,
        }
    }

    fn storage(&self) -> (StorageConfig, Vec<StoredBlock>) {
        let config = StorageConfig { prefetch_threshold: 1, ..StorageConfig::new(30) };
        let block =
            |slot, group, n| StoredBlock { slot, group, hash: BlockHash::from_bytes([n; 16]) };
        match self.raw.odd {
            0 => (StorageConfig { max_fetches: 0, ..config }, Vec::new()),
            1 => (StorageConfig { num_slots: u32::MAX, ..config }, Vec::new()),
            2 => (config, vec![block(0, 0, 1), block(0, 0, 2)]),
            3 => (config, vec![block(0, 0, 1), block(1, 0, 1)]),
            4 => (config, vec![block(0, 0, 1), block(30, 0, 2)]),
            5 => (config, vec![block(0, 0, 1), block(1, 99, 2)]),
            6 => (config, vec![block(3, 0, 1), block(1, 0, 2)]),
            _ => (config, Vec::new()),
        }
    }

    fn cost(&self) -> Option<CostModel> {
        let rate = match self.raw.odd {
            0 => f64::NAN,
            1 => 0.0,
            2 => f64::INFINITY,
            3 => 1e6,
            _ => return None,
        };
        Some(CostModel {
            prefill_tokens_per_s: 1e4,
            onboard_bytes_per_s: rate,
            fetch_bytes_per_s: 1e6,
            block_bytes: 4096,
        })
    }
}

impl Managed {
    fn new(config: &ManagerConfig) -> Self {
        let mut m = Manager::oversubscribed(config.clone()).unwrap();
        m.record_events(true);
        Self {
            m,
            live: BTreeMap::new(),
            swapped: BTreeMap::new(),
            prefetched: BTreeSet::new(),
            flying: Vec::new(),
            now: 0,
            host: config.host.is_some(),
            storage: false,
        }
    }

    fn hashed(&self, args: &Args) -> HashedTokens {
        let identity = self.m.config().identity;
        let mut hashed = match args.raw.hashing {
            Hashing::Own => return self.m.hash(&args.raw.tokens, args.keys()),
            Hashing::OtherUnit(unit) => HashedTokens::new(&identity, unit, args.keys()),
            Hashing::OtherIdentity => HashedTokens::new(&[8; 32], self.m.hash_unit(), args.keys()),
        };
        hashed.push(&args.raw.tokens);
        hashed
    }

    fn is_foreign(&self, args: &Args) -> bool {
        match args.raw.hashing {
            Hashing::Own => false,
            Hashing::OtherUnit(unit) => unit != self.m.hash_unit(),
            Hashing::OtherIdentity => true,
        }
    }

    fn is_taken(&self, seq: u64) -> bool {
        self.live.contains_key(&seq) || self.swapped.contains_key(&seq)
    }

    fn has_states(&self) -> bool {
        self.m.config().groups.iter().any(|group| group.kind == GroupKind::State)
    }

    /// A refusal of what holds for a live sequence; `UnknownSequence` when it is not.
    fn of_live(&self, seq: u64, wrong: impl Fn(&Sequence) -> bool) -> Reasons {
        match self.live.get(&seq) {
            None => when(true, "UnknownSequence"),
            Some(sequence) => when(wrong(sequence), "InvalidArgument"),
        }
    }

    fn of_group(&self, args: &Args) -> Reasons {
        let groups = self.m.config().groups.len();
        self.of_live(args.seq, |_| args.raw.group >= groups)
    }

    fn of_new(&self, args: &Args) -> Reasons {
        when(self.is_taken(args.seq), "DuplicateSequence")
            .when(args.raw.tokens.is_empty(), "InvalidArgument")
            .when(args.raw.tokens.len() > MOST as usize, "TooLong")
            .or(&CAPACITY)
    }

    fn placed(&mut self, seq: u64, given: &Allocation) {
        let sequence = Sequence {
            len: given.num_tokens,
            computed: given.hit_tokens,
            settled: given.hit_tokens,
            loading: !given.loads.is_empty(),
            behind: false,
            begun: false,
        };
        // Nobody may answer what has not been handed out.
        for &load in &given.loads {
            assert!(self.m.complete(load, Outcome::Succeeded).is_err());
        }
        self.live.insert(seq, sequence);
        self.prefetched.remove(&seq);
    }

    fn allocate(&mut self, a: &Args, budget: usize) -> Result<String, Error> {
        let (seq, tokens) = (a.seq, &a.raw.tokens);
        let given = self.m.allocate_prefill(seq, tokens, budget, a.keys(), a.m)?;
        self.placed(seq, &given);
        show(Ok(given))
    }

    fn advanced(&mut self, a: &Args) {
        let sequence = self.live.get_mut(&a.seq).unwrap();
        sequence.begun |= a.n > sequence.computed;
        (sequence.computed, sequence.settled) = (a.n, a.m);
    }

    fn cut(&mut self, a: &Args) {
        let sequence = self.live.get_mut(&a.seq).unwrap();
        sequence.len = a.n;
        sequence.computed = sequence.computed.min(a.n);
        sequence.settled = sequence.settled.min(a.n);
    }

    fn why_not_cut(&self, a: &Args) -> Reasons {
        let sizes = || self.m.config().groups.iter().map(|group| group.block_size as usize);
        let inside = |s: &Sequence| {
            !s.begun && a.n < s.computed && sizes().any(|size| !a.n.is_multiple_of(size))
        };
        let wrong = |s: &Sequence| a.n == 0 || a.n > s.len || s.loading || inside(s);
        let seen = self.live.get(&a.seq).map_or(0, |s| match self.has_states() {
            true => s.computed,
            false => s.settled,
        });
        let gone: &[&str] = if a.n < seen { &["OutOfWindow"] } else { &[] };
        self.of_live(a.seq, wrong).or(gone)
    }

    fn why_not_append(&self, a: &Args) -> Reasons {
        let (len, more) = (self.live.get(&a.seq).map_or(0, |s| s.len), a.raw.tokens.len());
        self.of_live(a.seq, |s| s.loading && !s.behind || more == 0)
            .when(self.live.contains_key(&a.seq) && len + more > MOST as usize, "TooLong")
            .or(&CAPACITY)
    }

    fn why_not_advance(&self, a: &Args) -> Reasons {
        self.of_live(a.seq, |s| {
            let back = a.n < s.computed || a.m < s.settled;
            back || a.m > a.n || a.n > s.len || s.loading && !s.behind
        })
    }

    fn ended(&mut self, seq: u64) {
        self.live.remove(&seq);
        self.swapped.remove(&seq);
    }

    fn hear(&mut self, completion: Completion) {
        match completion {
            Completion::Pending => {}
            Completion::Ready { seq, valid_tokens } => {
                // It may have been freed before it was told.
                if let Some(sequence) = self.live.get_mut(&seq) {
                    if !sequence.behind {
                        (sequence.computed, sequence.settled) = (valid_tokens, valid_tokens);
                    }
                    sequence.loading = false;
                }
            }
            Completion::Dropped { seq } | Completion::Void { seq } => drop(self.live.remove(&seq)),
        }
    }
}

impl Subject for Managed {
    type Raw = Raw;
    type Args = Args;

    fn resolve(&self, raw: &Raw) -> Args {
        let name = |name| match name {
            Name::Any(seq) => seq,
            Name::Live(at) => self.live.keys().nth(at).copied().unwrap_or(0),
            Name::Swapped(at) => self.swapped.keys().nth(at).copied().unwrap_or(0),
            Name::New => (0..).find(|&seq| !self.is_taken(seq)).unwrap_or(0),
        };
        let (seq, other) = (name(raw.seq), name(raw.other));
        let known = self.live.get(&seq).copied().unwrap_or_default();
        let number = |number| match number {
            Number::Any(n) => n,
            Number::Len(by) => known.len.saturating_add_signed(by),
            Number::Computed(by) => known.computed.saturating_add_signed(by),
            Number::Settled(by) => known.settled.saturating_add_signed(by),
        };
        let transfer = match self.flying.get(raw.transfer) {
            Some(&id) => id,
            None => raw.transfer as u64,
        };
        let now = self.now.saturating_add_signed(raw.time);
        let (n, m) = (number(raw.n), number(raw.m));
        Args { seq, other, n, m, transfer, now, raw: raw.clone() }
    }

    /// Under write-back, blocks that are to be evicted begin to be stored.
    fn begins_by(&self, error: &Error) -> bool {
        let back = self.m.config().host.is_some_and(|host| host.write == WritePolicy::Back);
        back && matches!(error.kind(), ErrorKind::NoFreeBlocks { .. })
    }

    fn follow_up(&mut self) -> String {
        let told: Vec<Completion> = std::iter::from_fn(|| self.m.next_completion()).collect();
        told.iter().for_each(|completion| self.hear(*completion));
        format!("{told:?}")
    }

    fn seen(&mut self) -> String {
        let m = &self.m;
        let groups = 0..m.config().groups.len();
        let of_sequence = |&seq: &u64| {
            let rows = groups.clone().map(|g| (m.table(seq, g).unwrap(), m.block_row(seq, g)));
            format!("{:?}", rows.collect::<Vec<_>>())
        };
        let tables: Vec<String> = self.live.keys().map(of_sequence).collect();
        let cached: Vec<Vec<u32>> = groups.clone().map(|g| m.cached_indices(g)).collect();
        let hits = [[0; 12], [1; 12]].map(|prompt| m.lookup(&prompt, ExtraKeys::default()));
        let stats = Stats { refused: 0, ..m.stats() };
        let usage = m.usage();
        let (queue, users) = (m.free_queue(), m.ref_counts());
        let rest = (m.transfers_in_flight(), m.preempted(), format!("{:?}", m.config()));
        format!(
            "{tables:?} {cached:?} {hits:?} {stats:?} {usage:?} {queue:?} {users:?} {rest:?} {:?}",
            self.m.events()
        )
    }
}

fn method(
    name: &'static str,
    weight: u32,
    call: fn(&mut Managed, &Args) -> Result<String, Error>,
    reasons: fn(&Managed, &Args) -> Reasons,
) -> Method<Managed> {
    Method { name, weight, call, reasons }
}

/// One that is never refused, whatever it is given.
fn total(
    name: &'static str,
    weight: u32,
    call: fn(&mut Managed, &Args) -> Result<String, Error>,
) -> Method<Managed> {
    method(name, weight, call, |_, _| never())
}

/// Every public method of the manager.
fn methods() -> Vec<Method<Managed>> {
    let unknown = |s: &Managed, a: &Args| when(!s.is_taken(a.seq), "UnknownSequence");
    let goes_back = |s: &Managed, a: &Args| when(a.now < s.now, "InvalidArgument");
    vec![
        method("allocate", 30, |s, a| s.allocate(a, a.raw.tokens.len().max(1)), Managed::of_new),
        method(
            "allocate_prefill",
            10,
            |s, a| s.allocate(a, a.n),
            |s, a| s.of_new(a).when(a.n == 0, "InvalidArgument"),
        ),
        method(
            "allocate_hashed",
            10,
            |s, a| {
                let given = s.m.allocate_hashed(a.seq, s.hashed(a), a.m)?;
                s.placed(a.seq, &given);
                show(Ok(given))
            },
            |s, a| s.of_new(a).when(s.is_foreign(a), "InvalidArgument"),
        ),
        method(
            "append",
            15,
            |s, a| {
                let given = s.m.append(a.seq, &a.raw.tokens)?;
                s.live.get_mut(&a.seq).unwrap().len += a.raw.tokens.len();
                show(Ok(given))
            },
            Managed::why_not_append,
        ),
        method(
            "append_with",
            5,
            |s, a| {
                let mut taken = Vec::new();
                s.m.append_with(a.seq, &a.raw.tokens, |g, id| taken.push((g, id)))?;
                s.live.get_mut(&a.seq).unwrap().len += a.raw.tokens.len();
                show(Ok(taken))
            },
            Managed::why_not_append,
        ),
        method(
            "advance",
            60,
            |s, a| {
                let freed = s.m.advance(a.seq, a.n, a.m)?;
                s.advanced(a);
                show(Ok(freed))
            },
            Managed::why_not_advance,
        ),
        method(
            "advance_with",
            10,
            |s, a| {
                let mut freed = Vec::new();
                s.m.advance_with(a.seq, a.n, a.m, |g, id| freed.push((g, id)))?;
                s.advanced(a);
                show(Ok(freed))
            },
            Managed::why_not_advance,
        ),
        method("free", 10, |s, a| show(s.m.free(a.seq)).inspect(|_| s.ended(a.seq)), unknown),
        method("abort", 5, |s, a| show(s.m.abort(a.seq)).inspect(|_| s.ended(a.seq)), unknown),
        method(
            "prioritize",
            2,
            |s, a| show(s.m.prioritize(a.seq, a.raw.odd)),
            |s, a| s.of_live(a.seq, |_| false),
        ),
        method("block_row", 1, |s, a| show(s.m.block_row(a.seq, a.raw.group)), Managed::of_group),
        method("table", 1, |s, a| show(s.m.table(a.seq, a.raw.group)), Managed::of_group),
        method("loading", 1, |s, a| show(s.m.loading(a.seq, a.raw.group)), Managed::of_group),
        method(
            "overlap",
            20,
            |s, a| {
                s.m.overlap(a.seq)?;
                let sequence = s.live.get_mut(&a.seq).unwrap();
                sequence.behind |= sequence.loading;
                show(Ok(()))
            },
            |s, a| {
                let groups = &s.m.config().groups;
                let inside = |n: usize| groups.iter().any(|g| n % g.block_size as usize > 0);
                let waiting: &[&str] = match s.live.get(&a.seq) {
                    Some(sequence) if sequence.loading => &["NotReady"],
                    _ => &[],
                };
                s.of_live(a.seq, |of| of.loading && inside(of.computed)).or(waiting)
            },
        ),
        method("forget", 2, |s, a| show(s.m.forget(a.seq, a.raw.group, a.n)), Managed::of_group),
        method(
            "state_step",
            50,
            |s, a| show(s.m.state_step(a.seq, a.raw.group, a.m, a.n)),
            |s, a| {
                let groups = &s.m.config().groups;
                let group = groups.get(a.raw.group);
                let kind = group.is_none_or(|group| group.kind != GroupKind::State);
                let wrong = |s: &Sequence| a.m != s.computed || a.n <= a.m || a.n > s.len;
                s.of_live(a.seq, |s| kind || wrong(s))
            },
        ),
        method(
            "fork",
            10,
            |s, a| {
                let shared = s.m.fork(a.seq, a.other)?;
                let child = Sequence { len: shared, ..s.live[&a.seq] };
                s.live.insert(a.other, child);
                s.prefetched.remove(&a.other);
                show(Ok(shared))
            },
            |s, a| {
                let left = |of: &Sequence| s.has_states() && of.computed < of.len;
                s.of_live(a.seq, |of| of.loading || of.computed == 0 || left(of))
                    .when(s.is_taken(a.other), "DuplicateSequence")
            },
        ),
        method(
            "trim",
            5,
            |s, a| show(s.m.trim(a.seq, a.n)).inspect(|_| s.cut(a)),
            Managed::why_not_cut,
        ),
        method(
            "rollback",
            5,
            |s, a| show(s.m.rollback(a.seq, a.n)).inspect(|_| s.cut(a)),
            Managed::why_not_cut,
        ),
        method(
            "preempt",
            40,
            |s, a| {
                let given = s.m.preempt(a.seq)?;
                let sequence = s.live.remove(&a.seq).unwrap();
                s.swapped.insert(a.seq, sequence);
                show(Ok(given))
            },
            |s, a| {
                let running = |of: &Sequence| of.loading || !of.begun || of.settled < of.computed;
                s.of_live(a.seq, |of| of.computed == 0 || running(of) || !s.host)
                    .or(&["NoHostSlots"])
            },
        ),
        method(
            "resume",
            40,
            |s, a| {
                let given = s.m.resume(a.seq)?;
                s.swapped.remove(&a.seq);
                s.placed(a.seq, &given);
                show(Ok(given))
            },
            |s, a| {
                let unknown = !s.swapped.contains_key(&a.seq);
                when(unknown, "UnknownSequence").or(&CAPACITY).or(&["NotReady"])
            },
        ),
        method(
            "prefetch",
            10,
            |s, a| {
                let begun = s.m.prefetch(a.seq, &s.hashed(a), a.now)?;
                s.now = a.now;
                if begun.blocks > 0 {
                    s.prefetched.insert(a.seq);
                }
                show(Ok(begun))
            },
            |s, a| {
                let taken = s.is_taken(a.seq) || s.prefetched.contains(&a.seq);
                when(taken, "DuplicateSequence")
                    .when(a.now < s.now || s.is_foreign(a), "InvalidArgument")
            },
        ),
        method(
            "poll_prefetch",
            3,
            |s, a| show(s.m.poll_prefetch(a.now)).inspect(|_| s.now = a.now),
            goes_back,
        ),
        method("tick", 3, |s, a| show(s.m.tick(a.now)).inspect(|_| s.now = a.now), goes_back),
        total("cancel_prefetch", 3, |s, a| {
            let was = s.prefetched.remove(&a.seq);
            assert_eq!(s.m.cancel_prefetch(a.seq), was);
            show(Ok(was))
        }),
        method(
            "attach_storage",
            10,
            |s, a| {
                let (config, stored) = a.storage();
                show(s.m.attach_storage(config, &stored)).inspect(|_| s.storage = true)
            },
            |s, a| {
                let there = s.storage || s.m.usage().storage_used > 0;
                when(there || !s.host || (2..6).contains(&a.raw.odd), "InvalidArgument")
                    .when(a.raw.odd == 0, "InvalidArgument")
                    .when(a.raw.odd == 1, "Unsupported")
            },
        ),
        total("detach_storage", 2, |s, _| {
            s.storage = false;
            show(Ok(s.m.detach_storage()))
        }),
        method(
            "attach_host",
            10,
            |s, a| show(s.m.attach_host(a.host())).inspect(|_| s.host = true),
            |s, a| {
                let there = s.host || s.m.usage().host_used > 0;
                when(there || a.raw.odd == 0, "InvalidArgument")
                    .when((1..3).contains(&a.raw.odd), "Unsupported")
            },
        ),
        total("detach_host", 2, |s, _| {
            (s.host, s.storage) = (false, false);
            s.prefetched.clear();
            show(Ok(s.m.detach_host()))
        }),
        total("clear_host", 2, |s, _| {
            s.m.clear_host();
            show(Ok(()))
        }),
        method(
            "set_cost_model",
            3,
            |s, a| show(s.m.set_cost_model(a.cost())),
            |_, a| when(a.raw.odd < 3, "Unsupported"),
        ),
        total("next_transfer", 70, |s, _| {
            let transfer = s.m.next_transfer();
            s.flying.extend(transfer.map(|transfer| transfer.id));
            show(Ok(transfer))
        }),
        total("next_copy", 30, |s, _| show(Ok(s.m.next_copy()))),
        total("next_completion", 1, |s, _| show(Ok(s.m.next_completion()))),
        method(
            "complete",
            70,
            |s, a| {
                let completion = s.m.complete(a.transfer, a.raw.outcome)?;
                s.flying.retain(|&id| id != a.transfer);
                s.hear(completion);
                show(Ok(completion))
            },
            |s, a| when(!s.flying.contains(&a.transfer), "UnknownTransfer"),
        ),
        method(
            "admission",
            3,
            |s, a| show(s.m.admission(a.n, &[(a.seq, a.m)])),
            |s, a| {
                let unknown = !s.live.contains_key(&a.seq);
                when(a.n > MOST as usize, "TooLong")
                    .when(unknown, "UnknownSequence")
                    .or(&["PoolTooSmall"])
            },
        ),
        total("reset_prefix_cache", 2, |s, _| {
            let reset = s.m.reset_prefix_cache();
            s.storage &= !reset;
            if reset {
                s.prefetched.clear();
            }
            show(Ok(reset))
        }),
        total("record_events", 1, |s, _| {
            s.m.record_events(true);
            show(Ok(()))
        }),
        total("events", 1, |s, _| show(Ok(s.m.events()))),
        total("hash", 1, |s, a| show(Ok(s.m.hash(&a.raw.tokens, a.keys())))),
        total("lookup", 1, |s, a| show(Ok(s.m.lookup(&a.raw.tokens, a.keys())))),
        total("lookup_hashed", 3, |s, a| {
            let hit = s.m.lookup_hashed(&s.hashed(a));
            assert!(!s.is_foreign(a) || hit.tokens == 0, "tokens of another identity hit");
            show(Ok(hit))
        }),
        total("tier_tokens", 3, |s, a| {
            // A hit of other tokens, too.
            let hit = s.m.lookup(&[0; 20], ExtraKeys::default());
            show(Ok(s.m.tier_tokens(&s.hashed(a), &hit)))
        }),
        total("block_hashes", 1, |s, a| {
            show(Ok(s.m.block_hashes(a.raw.group, &s.hashed(a)).collect::<Vec<_>>()))
        }),
        total("cached_indices", 1, |s, a| show(Ok(s.m.cached_indices(a.raw.group)))),
        total("max_blocks", 1, |s, a| show(Ok(s.m.max_blocks(a.n)))),
        total("config", 1, |s, _| show(Ok(s.m.config()))),
        total("alignment", 1, |s, _| show(Ok(s.m.alignment()))),
        total("capacity", 1, |s, _| show(Ok(s.m.capacity()))),
        total("free_blocks", 1, |s, _| show(Ok(s.m.free_blocks()))),
        total("hash_unit", 1, |s, _| show(Ok(s.m.hash_unit()))),
        total("stats", 1, |s, _| show(Ok(Stats { refused: 0, ..s.m.stats() }))),
        total("usage", 1, |s, _| show(Ok(s.m.usage()))),
        total("free_queue", 1, |s, _| show(Ok(s.m.free_queue()))),
        total("ref_counts", 1, |s, _| show(Ok(s.m.ref_counts()))),
        total("transfers_in_flight", 1, |s, _| show(Ok(s.m.transfers_in_flight()))),
        total("preempted", 1, |s, _| {
            assert_eq!(s.m.preempted(), s.swapped.len());
            show(Ok(s.m.preempted()))
        }),
        total("prometheus", 1, |s, _| {
            let counts_refusals = |line: &&str| !line.contains("refused");
            show(Ok(s.m.prometheus().lines().filter(counts_refusals).count()))
        }),
        // Made again of what it was made of; `configs` has what cannot be.
        total("new", 1, |s, _| show(Ok(Manager::new(s.m.config().clone()).is_ok()))),
        total("oversubscribed", 1, |s, _| {
            show(Manager::oversubscribed(s.m.config().clone()).map(|m| m.capacity()))
        }),
    ]
}

fn raw() -> impl Strategy<Value = Raw> + Clone {
    let name = |live: u32, new: u32| {
        prop_oneof![
            2 => (0u64..6).prop_map(Name::Any),
            live => (0usize..4).prop_map(Name::Live),
            3 => (0usize..3).prop_map(Name::Swapped),
            new => Just(Name::New),
        ]
    };
    let near = -3isize..6;
    let number = |len: u32, computed: u32, settled: u32| {
        prop_oneof![
            len => Just(Number::Len(0)),
            1 => near.clone().prop_map(Number::Len),
            computed => Just(Number::Computed(0)),
            2 => near.clone().prop_map(Number::Computed),
            settled => Just(Number::Settled(0)),
            1 => near.clone().prop_map(Number::Settled),
            1 => (0usize..50).prop_map(Number::Any),
            1 => Just(Number::Any(usize::MAX)),
        ]
    };
    let tokens = prop_oneof![
        1 => Just(Vec::new()),
        6 => (0u32..2, 1usize..30).prop_map(|(word, n)| vec![word; n]),
        4 => (0u32..2, 1usize..4).prop_map(|(word, n)| vec![word; n]),
        2 => (0u32..2, 1usize..20, 2u32..4, 1usize..10)
            .prop_map(|(a, n, b, k)| [vec![a; n], vec![b; k]].concat()),
        1 => Just(vec![0; MOST as usize + 1]),
    ];
    let hashing = prop_oneof![
        6 => Just(Hashing::Own),
        2 => (0usize..7).prop_map(Hashing::OtherUnit),
        1 => Just(Hashing::OtherIdentity),
    ];
    let time = prop_oneof![8 => 0i64..1_000_000_000, 1 => -5i64..0, 1 => Just(i64::MIN)];
    let outcome = prop_oneof![5 => Just(Outcome::Succeeded), 1 => Just(Outcome::Failed)];
    let group = prop_oneof![8 => 0usize..3, 1 => Just(usize::MAX)];
    let transfer = prop_oneof![8 => 0usize..4, 1 => 0usize..300, 1 => Just(usize::MAX)];
    (
        (name(9, 4), name(1, 9), group, number(8, 2, 1), number(5, 8, 3)),
        (tokens, prop::bool::weighted(0.2), hashing, transfer, outcome, time, 0u8..16),
    )
        .prop_map(|((seq, other, group, n, m), rest)| {
            let (tokens, salted, hashing, transfer, outcome, time, odd) = rest;
            Raw { seq, other, group, n, m, tokens, salted, hashing, transfer, outcome, time, odd }
        })
}

fn config() -> impl Strategy<Value = ManagerConfig> {
    let group = |kind: GroupKind, block_size, sink_tokens| GroupConfig {
        sink_tokens,
        ..GroupConfig::new(kind, block_size)
    };
    let full = group(AttentionKind::Full.into(), 4, 0);
    let sliding = group(AttentionKind::Sliding { window: 7 }.into(), 2, 3);
    let chunked = group(AttentionKind::Chunked { chunk: 10 }.into(), 4, 0);
    let state = group(GroupKind::State, 4, 0);
    let mixes = [
        vec![full],
        vec![full, sliding],
        vec![full, chunked],
        vec![sliding, chunked],
        vec![full, state],
        vec![full, sliding, state],
    ];
    let write = prop_oneof![
        2 => Just(WritePolicy::Through),
        1 => Just(WritePolicy::Selective { uses: 2 }),
        2 => Just(WritePolicy::Back),
    ];
    let host = prop::option::weighted(0.8, (0u32..40, write, 1u32..6));
    let evictions = [
        Eviction::Lru,
        Eviction::Fifo,
        Eviction::Lfu,
        Eviction::Slru,
        Eviction::Arc,
        Eviction::Priority,
        Eviction::Reuse,
    ];
    (
        prop::sample::select(mixes.to_vec()),
        prop::sample::select(evictions.to_vec()),
        12u32..60,
        host,
        any::<bool>(),
    )
        .prop_map(|(groups, eviction, num_blocks, host, dense)| ManagerConfig {
            groups,
            num_blocks,
            prefix_caching: true,
            retention: match dense {
                true => Retention { interval: None, slack: 0, dense_chunks: true },
                false => Retention::default(),
            },
            eviction,
            max_model_len: MOST,
            in_flight_tokens: 1 << 20,
            host: host.map(|(num_slots, write, max_offloads)| HostConfig {
                write,
                max_offloads,
                ..HostConfig::new(num_slots)
            }),
            identity: [7; 32],
        })
}

#[test]
fn every_method_of_the_manager_takes_part() {
    all_are_named("Manager", &methods());
}

#[test]
fn a_manager_never_knows_what_it_refused() {
    let refusable = [
        "allocate",
        "allocate_prefill",
        "allocate_hashed",
        "append",
        "append_with",
        "advance",
        "advance_with",
        "free",
        "abort",
        "prioritize",
        "block_row",
        "table",
        "loading",
        "overlap",
        "forget",
        "state_step",
        "fork",
        "trim",
        "rollback",
        "preempt",
        "resume",
        "prefetch",
        "poll_prefetch",
        "tick",
        "attach_storage",
        "attach_host",
        "set_cost_model",
        "complete",
        "admission",
    ];
    what_is_refused_has_never_been(&methods(), config(), raw(), Managed::new, &refusable);
}
