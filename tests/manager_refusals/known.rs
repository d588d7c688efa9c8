//! What a caller knows of a manager, and what that says of its next call.

use std::collections::{BTreeMap, BTreeSet};

use hybridkv::manager::{
    Allocation, Completion, ExtraKeys, HashedTokens, Manager, ManagerConfig, Outcome, Stats,
    WritePolicy,
};
use hybridkv::spec::GroupKind;
use hybridkv::{Error, ErrorKind};

use super::inputs::{Args, Hashing, MOST, Name, Number, Raw};
use super::{Reasons, Subject, show, when};

pub const CAPACITY: [&str; 2] = ["NoFreeBlocks", "PoolTooSmall"];

/// A live sequence, as far as its caller knows it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sequence {
    pub len: usize,
    pub computed: usize,
    pub settled: usize,
    /// Waits for loads.
    pub loading: bool,
    /// Its steps run behind its loads.
    pub behind: bool,
    /// Has submitted a step of its own.
    pub begun: bool,
}

pub struct Managed {
    pub m: Manager,
    pub live: BTreeMap<u64, Sequence>,
    pub swapped: BTreeMap<u64, Sequence>,
    pub prefetched: BTreeSet<u64>,
    pub pins: BTreeSet<u64>,
    /// Handed out and not answered.
    pub flying: Vec<u64>,
    pub now: u64,
    pub host: bool,
    pub storage: bool,
}
impl Managed {
    pub fn new(config: &ManagerConfig) -> Self {
        let mut m = Manager::oversubscribed(config.clone()).unwrap();
        m.record_events(true);
        Self {
            m,
            live: BTreeMap::new(),
            swapped: BTreeMap::new(),
            prefetched: BTreeSet::new(),
            pins: BTreeSet::new(),
            flying: Vec::new(),
            now: 0,
            host: config.host.is_some(),
            storage: false,
        }
    }

    pub fn hashed(&self, args: &Args) -> HashedTokens {
        let identity = self.m.config().identity;
        let mut hashed = match args.raw.hashing {
            Hashing::Own => return self.m.hash(&args.raw.tokens, args.keys()),
            Hashing::OtherUnit(unit) => HashedTokens::new(&identity, unit, args.keys()),
            Hashing::OtherIdentity => HashedTokens::new(&[8; 32], self.m.hash_unit(), args.keys()),
        };
        hashed.push(&args.raw.tokens);
        hashed
    }

    pub fn is_foreign(&self, args: &Args) -> bool {
        match args.raw.hashing {
            Hashing::Own => false,
            Hashing::OtherUnit(unit) => unit != self.m.hash_unit(),
            Hashing::OtherIdentity => true,
        }
    }

    pub fn is_taken(&self, seq: u64) -> bool {
        self.live.contains_key(&seq) || self.swapped.contains_key(&seq)
    }

    pub fn has_states(&self) -> bool {
        self.m.config().groups.iter().any(|group| group.kind == GroupKind::State)
    }

    /// A refusal of what holds for a live sequence; `UnknownSequence` when it is not.
    pub fn of_live(&self, seq: u64, wrong: impl Fn(&Sequence) -> bool) -> Reasons {
        match self.live.get(&seq) {
            None => when(true, "UnknownSequence"),
            Some(sequence) => when(wrong(sequence), "InvalidArgument"),
        }
    }

    pub fn of_group(&self, args: &Args) -> Reasons {
        let groups = self.m.config().groups.len();
        self.of_live(args.seq, |_| args.raw.group >= groups)
    }

    pub fn of_new(&self, args: &Args) -> Reasons {
        when(self.is_taken(args.seq), "DuplicateSequence")
            .when(args.raw.tokens.is_empty(), "InvalidArgument")
            .when(args.raw.tokens.len() > MOST as usize, "TooLong")
            .or(&CAPACITY)
    }

    pub fn placed(&mut self, seq: u64, given: &Allocation) {
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

    pub fn allocate(&mut self, a: &Args, budget: usize) -> Result<String, Error> {
        let (seq, tokens) = (a.seq, &a.raw.tokens);
        let given = self.m.allocate_prefill(seq, tokens, budget, a.keys(), a.m)?;
        self.placed(seq, &given);
        show(Ok(given))
    }

    pub fn advanced(&mut self, a: &Args) {
        let sequence = self.live.get_mut(&a.seq).unwrap();
        sequence.begun |= a.n > sequence.computed;
        (sequence.computed, sequence.settled) = (a.n, a.m);
    }

    pub fn cut(&mut self, a: &Args) {
        let sequence = self.live.get_mut(&a.seq).unwrap();
        sequence.len = a.n;
        sequence.computed = sequence.computed.min(a.n);
        sequence.settled = sequence.settled.min(a.n);
    }

    pub fn why_not_cut(&self, a: &Args) -> Reasons {
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

    pub fn why_not_append(&self, a: &Args) -> Reasons {
        let (len, more) = (self.live.get(&a.seq).map_or(0, |s| s.len), a.raw.tokens.len());
        self.of_live(a.seq, |s| s.loading && !s.behind || more == 0)
            .when(self.live.contains_key(&a.seq) && len + more > MOST as usize, "TooLong")
            .or(&CAPACITY)
    }

    pub fn why_not_advance(&self, a: &Args) -> Reasons {
        self.of_live(a.seq, |s| {
            let back = a.n < s.computed || a.m < s.settled;
            back || a.m > a.n || a.n > s.len || s.loading && !s.behind
        })
    }

    pub fn ended(&mut self, seq: u64) {
        self.live.remove(&seq);
        self.swapped.remove(&seq);
    }

    pub fn hear(&mut self, completion: Completion) {
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
        let back =
            self.m.config().host.as_ref().is_some_and(|host| host.write == WritePolicy::Back);
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
