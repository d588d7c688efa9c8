//! Blocks with contents. Every token's KV of a group is a function of the history up to it; computing writes
//! it, transfers copy it as late as they may, and every key that a query sees is checked both when its step
//! is submitted and when it has settled: until then the block may not change.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};

use hybridkv::ErrorKind;
use hybridkv::manager::{
    Completion, ExtraKeys, HostConfig, Manager, ManagerConfig, Outcome, Path, Place, StorageConfig,
    Transfer, WritePolicy,
};
use proptest::prelude::*;

use super::{config, prompt, sees};

const KEYS: ExtraKeys<'static> = ExtraKeys { salt: "", lora: "" };

/// KV of one token in one group; `None` is garbage.
type Kv = Option<u64>;

fn kv(group: usize, prefix: &[u32]) -> Kv {
    let mut hasher = DefaultHasher::new();
    (group, prefix).hash(&mut hasher);
    Some(hasher.finish())
}

/// A key that some query of a step sees: block, offset and what it should be.
type Read = (u32, usize, Kv);

#[derive(Clone)]
struct Sequence {
    tokens: Vec<u32>,
    /// Tokens whose steps cannot fail any more, settled or not: another sequence's, or known to have ended.
    finished: usize,
    /// Whether it is swapped out.
    swapped: bool,
    /// Its work is submitted behind that of those that found their blocks before it did.
    turn: u64,
    /// Whether a step of its own has been submitted.
    begun: bool,
    computed: usize,
    settled: usize,
    ready: bool,
    /// Steps in flight: tokens computed by their end, and what they read.
    steps: VecDeque<(usize, Vec<Read>)>,
}

struct World {
    m: Manager,
    config: ManagerConfig,
    device: Vec<[Kv; 4]>,
    host: Vec<[Kv; 4]>,
    storage: Vec<[Kv; 4]>,
    now: u64,
    /// Whether anything was ever prefetched.
    prefetched: bool,
    /// In the order of their allocation: a later one's work is submitted behind an earlier one's.
    sequences: BTreeMap<u64, Sequence>,
    flying: Vec<Transfer>,
    next: u64,
    turns: u64,
}

impl World {
    fn new(config: ManagerConfig) -> Self {
        let slots = config.host.map_or(0, |host| host.num_slots);
        Self {
            m: Manager::new(config.clone()).unwrap(),
            device: vec![[None; 4]; config.num_blocks as usize],
            host: vec![[None; 4]; slots as usize],
            storage: Vec::new(),
            now: 0,
            prefetched: false,
            sequences: BTreeMap::new(),
            flying: Vec::new(),
            next: 0,
            turns: 0,
            config,
        }
    }

    /// Copies what was emitted, as late as it may be: before the next step or transfer.
    fn copy(&mut self) {
        while let Some(copy) = self.m.next_copy() {
            self.device[copy.to as usize] = self.device[copy.from as usize];
        }
    }

    /// Starts all emitted transfers: until they succeed their targets hold garbage.
    fn start_transfers(&mut self) {
        self.copy();
        while let Some(transfer) = self.m.next_transfer() {
            match transfer.path.to() {
                Place::Host(slot) => self.host[slot as usize] = [None; 4],
                Place::Device(block) => self.device[block as usize] = [None; 4],
                Place::Storage(slot) => self.storage[slot as usize] = [None; 4],
            }
            self.flying.push(transfer);
        }
    }

    fn complete(&mut self, at: usize, outcome: Outcome) {
        let transfer = self.flying.swap_remove(at);
        if outcome == Outcome::Succeeded {
            match transfer.path {
                Path::Offload { from, to } => self.host[to as usize] = self.device[from as usize],
                Path::Onboard { from, to } => self.device[to as usize] = self.host[from as usize],
                Path::Persist { from, to } => {
                    self.storage[to as usize] = self.host[from as usize];
                }
                Path::Fetch { from, to } => self.host[to as usize] = self.storage[from as usize],
            }
        }
        let first = self.m.complete(transfer.id, outcome).unwrap();
        self.hear(first);
        self.hear_all();
        assert!(self.m.complete(transfer.id, outcome).is_err(), "answered twice");
    }

    fn hear(&mut self, completion: Completion) {
        match completion {
            Completion::Pending => {}
            // Freed before it was told.
            Completion::Ready { seq, .. }
            | Completion::Dropped { seq }
            | Completion::Void { seq }
                if !self.sequences.contains_key(&seq) => {}
            Completion::Ready { seq, valid_tokens } => {
                let sequence = self.sequences.get_mut(&seq).unwrap();
                assert!(valid_tokens <= sequence.computed);
                (sequence.computed, sequence.settled) = (valid_tokens, valid_tokens);
                sequence.ready = true;
            }
            Completion::Dropped { seq } | Completion::Void { seq } => {
                self.sequences.remove(&seq).unwrap();
            }
        }
    }

    fn hear_all(&mut self) {
        while let Some(completion) = self.m.next_completion() {
            self.hear(completion);
        }
    }

    /// Attaches an empty storage tier, unless one is there.
    fn attach_storage(&mut self, num_slots: u32) {
        let config = StorageConfig {
            max_fetches: 1 + num_slots / 4,
            max_persists: 1 + num_slots / 3,
            prefetch_threshold: 1,
            ..StorageConfig::new(num_slots)
        };
        if self.m.attach_storage(config, &[]).is_ok() {
            self.storage = vec![[None; 4]; num_slots as usize];
        }
    }

    fn attach_host(&mut self) {
        if let Some(host) = self.config.host
            && self.m.attach_host(host).is_ok()
        {
            self.host = vec![[None; 4]; host.num_slots as usize];
        }
    }

    fn allocate(&mut self, prompt: &[u32], budget: usize) {
        let given = self.m.allocate_prefill(self.next, prompt, budget, KEYS, 0);
        // A refusal under write-back begins to store what stands in the way.
        self.start_transfers();
        let Ok(given) = given else { return };
        let sequence = Sequence {
            tokens: prompt[..given.num_tokens].to_vec(),
            finished: 0,
            swapped: false,
            turn: self.turn(),
            begun: false,
            computed: given.hit_tokens,
            settled: given.hit_tokens,
            ready: given.loads.is_empty(),
            steps: VecDeque::new(),
        };
        self.sequences.insert(self.next, sequence);
        self.next += 1;
        self.hear_all();
    }

    /// Ends all transfers, out of order; bit `n % 8` of `failures` says whether the nth fails.
    fn complete_all(&mut self, failures: u8) {
        for n in 0.. {
            self.start_transfers();
            if self.flying.is_empty() {
                break;
            }
            let fails = failures >> (n % 8) & 1 == 1;
            let outcome = if fails { Outcome::Failed } else { Outcome::Succeeded };
            self.complete(n * 5 % self.flying.len(), outcome);
        }
    }

    fn serve(&mut self, prompt: &[u32], failures: u8) -> Result<(), TestCaseError> {
        let seq = self.next;
        self.allocate(prompt, 1000);
        self.complete_all(failures);
        self.step()?;
        self.settle(seq)?;
        self.complete_all(failures);
        if self.sequences.remove(&seq).is_some() {
            self.m.free(seq).unwrap();
            self.start_transfers();
        }
        Ok(())
    }

    /// Gives a sequence tokens. A block that it leaves for a copy may be written by steps that are submitted from
    /// now on, as those of a freed sequence may: what its steps in flight read there is looked at now.
    fn append(&mut self, seq: u64, tokens: Vec<u32>) -> Result<(), TestCaseError> {
        let table = |m: &Manager, g| m.table(seq, g).map(<[u32]>::to_vec).unwrap_or_default();
        let groups = 0..self.config.groups.len();
        let before: Vec<Vec<u32>> = groups.clone().map(|g| table(&self.m, g)).collect();
        if self.m.append(seq, &tokens).is_err() {
            return Ok(());
        }
        let mut left = BTreeSet::new();
        for g in groups {
            let after = table(&self.m, g);
            left.extend(before[g].iter().zip(&after).filter(|(a, b)| a != b).map(|(&id, _)| id));
        }
        let sequence = self.sequences.get_mut(&seq).unwrap();
        sequence.tokens.extend(tokens);
        for (_, reads) in &mut sequence.steps {
            let (gone, still) = reads.drain(..).partition(|read| left.contains(&read.0));
            *reads = still;
            check(&self.device, &gone)?;
        }
        Ok(())
    }

    /// Submits one step of everything that is ready: all tokens that are not computed yet.
    fn step(&mut self) -> Result<(), TestCaseError> {
        self.copy();
        let Self { m, config, device, sequences, .. } = self;
        let mut order: Vec<(&u64, &mut Sequence)> = sequences.iter_mut().collect();
        order.sort_by_key(|(_, sequence)| sequence.turn);
        for (&seq, sequence) in order {
            if !sequence.ready {
                continue;
            }
            let mut reads = Vec::new();
            for (g, group) in config.groups.iter().enumerate() {
                let (size, table) = (group.block_size as usize, m.table(seq, g).unwrap());
                for i in sequence.computed..sequence.tokens.len() {
                    prop_assert_ne!(table[i / size], 0, "a new token has a slot");
                    device[table[i / size] as usize][i % size] = kv(g, &sequence.tokens[..=i]);
                    let seen = (0..=i).filter(|&j| sees(group, i, j));
                    reads.extend(
                        seen.map(|j| (table[j / size], j % size, kv(g, &sequence.tokens[..=j]))),
                    );
                }
            }
            check(device, &reads)?;
            sequence.begun |= sequence.computed < sequence.tokens.len();
            sequence.computed = sequence.tokens.len();
            sequence.steps.push_back((sequence.computed, reads));
            m.advance(seq, sequence.computed, sequence.settled).unwrap();
        }
        self.start_transfers();
        Ok(())
    }

    /// The oldest step of a sequence ends.
    fn settle(&mut self, seq: u64) -> Result<(), TestCaseError> {
        let Some(sequence) = self.sequences.get_mut(&seq) else { return Ok(()) };
        let Some((end, reads)) = sequence.steps.pop_front() else { return Ok(()) };
        check(&self.device, &reads)?;
        sequence.settled = end;
        self.m.advance(seq, sequence.computed, end).unwrap();
        self.start_transfers();
        Ok(())
    }

    /// A step fails: what it wrote is garbage, and so is what others made of that.
    fn abort(&mut self, seq: u64) {
        let mut failed = vec![seq];
        while let Some(seq) = failed.pop() {
            let Some(sequence) = self.sequences.remove(&seq) else { continue };
            for (g, group) in self.config.groups.iter().enumerate().filter(|_| !sequence.swapped) {
                let (size, table) = (group.block_size as usize, self.m.table(seq, g).unwrap());
                for i in sequence.settled.max(sequence.finished)..sequence.computed {
                    self.device[table[i / size] as usize][i % size] = None;
                }
            }
            failed.extend(self.m.abort(seq).unwrap());
        }
        self.start_transfers();
    }

    fn turn(&mut self) -> u64 {
        self.turns += 1;
        self.turns
    }

    fn fork(&mut self, parent: u64) {
        let turn = self.turn();
        let sequence = &self.sequences[&parent];
        let shared = match self.m.fork(parent, self.next) {
            Ok(shared) => shared,
            Err(_) => {
                assert!(!sequence.ready || sequence.computed == 0);
                return;
            }
        };
        assert_eq!(shared, sequence.computed);
        let mut child =
            Sequence { steps: VecDeque::new(), finished: shared, turn, ..sequence.clone() };
        child.tokens.truncate(shared);
        self.sequences.insert(self.next, child);
        self.next += 1;
    }

    /// Swaps a sequence out, once its steps have ended.
    fn preempt(&mut self, seq: u64) -> Result<(), TestCaseError> {
        while self.sequences.get(&seq).is_some_and(|sequence| !sequence.steps.is_empty()) {
            self.settle(seq)?;
        }
        let Some(sequence) = self.sequences.get_mut(&seq) else { return Ok(()) };
        if sequence.ready && sequence.settled < sequence.computed {
            self.m.advance(seq, sequence.computed, sequence.computed).unwrap();
            sequence.settled = sequence.computed;
        }
        match self.m.preempt(seq) {
            Ok(given) => {
                prop_assert_eq!(given.tokens, sequence.computed);
                sequence.tokens.truncate(given.tokens);
                (sequence.swapped, sequence.ready) = (true, false);
                for seq in given.dependents {
                    self.abort(seq);
                }
            }
            Err(err) => {
                let full = matches!(err.kind(), ErrorKind::NoHostSlots { .. });
                let detached = err.to_string().contains("no host tier");
                let refused = full || detached || !sequence.ready || !sequence.begun;
                prop_assert!(refused, "{}", err);
            }
        }
        self.start_transfers();
        Ok(())
    }

    fn resume(&mut self, seq: u64) -> Result<(), TestCaseError> {
        let turn = self.turn();
        let sequence = self.sequences.get_mut(&seq).unwrap();
        match self.m.resume(seq) {
            Ok(given) => {
                prop_assert!(sequence.swapped && given.hit_tokens <= sequence.computed);
                (sequence.swapped, sequence.ready) = (false, given.loads.is_empty());
                (sequence.computed, sequence.settled) = (given.hit_tokens, given.hit_tokens);
                (sequence.finished, sequence.turn) = (given.hit_tokens, turn);
                sequence.begun = false;
            }
            Err(err) => {
                let later = matches!(
                    err.kind(),
                    ErrorKind::NotReady { .. } | ErrorKind::NoFreeBlocks { .. }
                );
                prop_assert!(later || !sequence.swapped, "{}", err);
            }
        }
        self.start_transfers();
        Ok(())
    }

    /// Cuts a sequence back to its first `n` tokens, once its steps have ended.
    fn cut(&mut self, seq: u64, n: usize, rollback: bool) -> Result<(), TestCaseError> {
        let sequence = self.sequences.get_mut(&seq).unwrap();
        for (_, reads) in sequence.steps.drain(..) {
            check(&self.device, &reads)?;
        }
        sequence.finished = sequence.computed;
        let given = match rollback {
            true => self.m.rollback(seq, n),
            false => self.m.trim(seq, n),
        };
        let sequence = self.sequences.get_mut(&seq).unwrap();
        let Ok(given) = given else {
            // Nothing that is not settled has been freed.
            let unwritten = !sequence.begun && n < sequence.computed;
            assert!(!sequence.ready || n == 0 || n < sequence.settled || unwritten);
            return Ok(());
        };
        sequence.tokens.truncate(n);
        sequence.computed = sequence.computed.min(n);
        sequence.settled = sequence.settled.min(n);
        sequence.finished = sequence.finished.min(n);
        for seq in given.dependents {
            self.abort(seq);
        }
        Ok(())
    }

    /// Takes all free blocks for tokens that nobody else has, and gives them back unused.
    fn flood(&mut self) {
        const FLOOD: u64 = 1 << 32;
        let most = self.config.max_model_len as usize;
        let mut taken = 0;
        for n in (1..=most).rev() {
            let tokens: Vec<u32> = (0..n as u32).map(|i| 1000 + i).collect();
            while self.m.allocate(FLOOD + taken, &tokens, KEYS, 0).is_ok() {
                taken += 1;
            }
        }
        for seq in 0..taken {
            self.m.abort(FLOOD + seq).unwrap();
        }
    }

    fn check(&mut self) -> Result<(), TestCaseError> {
        self.hear_all();
        self.start_transfers();
        let mut counts = BTreeMap::new();
        for (&seq, _) in self.sequences.iter().filter(|(_, s)| !s.swapped) {
            for g in 0..self.config.groups.len() {
                for &id in self.m.table(seq, g).unwrap().iter().filter(|&&id| id != 0) {
                    *counts.entry(id).or_insert(0) += 1;
                }
            }
        }
        let busy: BTreeSet<u32> = counts
            .keys()
            .copied()
            .chain(self.flying.iter().filter_map(|t| t.path.block()))
            .collect();
        prop_assert_eq!(self.m.ref_counts(), counts.into_iter().collect::<Vec<_>>());
        let free: BTreeSet<u32> = self.m.free_queue().into_iter().collect();
        prop_assert_eq!(free.len(), self.m.free_blocks());
        prop_assert!(free.is_disjoint(&busy), "free and in use");
        // A block may wait for its fetch after its sequence has gone.
        let waiting = self.m.capacity() - free.len() - busy.len();
        prop_assert!(waiting == 0 || self.m.usage().storage_pinned > 0, "conservation");
        prop_assert_eq!(self.m.transfers_in_flight(), self.flying.len());
        let usage = self.m.usage();
        prop_assert!(usage.host_used <= usage.host_capacity);
        let slots: BTreeSet<u32> = self.flying.iter().map(|t| t.path.slot()).collect();
        let kept = usage.host_pinned - slots.len();
        let swapped = self.sequences.values().any(|sequence| sequence.swapped);
        prop_assert_eq!(self.m.preempted() > 0, swapped);
        prop_assert!(kept == 0 || self.prefetched || swapped, "pinned for nothing");
        prop_assert!(usage.storage_used <= usage.storage_capacity);
        Ok(())
    }
}

fn check(device: &[[Kv; 4]], reads: &[Read]) -> Result<(), TestCaseError> {
    for &(block, offset, expected) in reads {
        prop_assert_ne!(block, 0, "a visible key lies in the null block");
        prop_assert_eq!(device[block as usize][offset], expected, "block {}", block);
    }
    Ok(())
}

#[derive(Debug, Clone)]
enum Op {
    Allocate {
        prompt: Vec<u32>,
        budget: usize,
    },
    /// A whole turn: it is stored, and gone.
    Serve {
        prompt: Vec<u32>,
        failures: u8,
    },
    Append {
        at: usize,
        tokens: Vec<u32>,
    },
    Step,
    Settle {
        at: usize,
    },
    Complete {
        at: usize,
        fails: bool,
    },
    CompleteAll {
        failures: u8,
    },
    Preempt {
        at: usize,
    },
    Resume {
        at: usize,
    },
    Fork {
        at: usize,
    },
    /// Keeps that part of 8 of the tokens, less one.
    Cut {
        at: usize,
        part: usize,
        rollback: bool,
    },
    Free {
        at: usize,
    },
    Abort {
        at: usize,
    },
    /// Everything cached and unused leaves the device.
    Flood,
    Forget {
        at: usize,
        group: usize,
        index: usize,
    },
    Reset,
    Prefetch {
        prompt: Vec<u32>,
    },
    Tick,
    DetachStorage,
    DetachHost,
}

fn op() -> impl Strategy<Value = Op> {
    let budget = prop_oneof![2 => Just(1000usize), 1 => 1usize..12];
    let failures = prop_oneof![2 => Just(0u8), 1 => any::<u8>()];
    prop_oneof![
        5 => (prompt(), budget).prop_map(|(prompt, budget)| Op::Allocate { prompt, budget }),
        10 => (prompt(), failures.clone())
            .prop_map(|(prompt, failures)| Op::Serve { prompt, failures }),
        3 => (0usize..8, prompt()).prop_map(|(at, mut tokens)| {
            tokens.truncate(9);
            Op::Append { at, tokens }
        }),
        5 => Just(Op::Step),
        5 => (0usize..8).prop_map(|at| Op::Settle { at }),
        6 => (0usize..64, prop::bool::weighted(0.2))
            .prop_map(|(at, fails)| Op::Complete { at, fails }),
        2 => failures.clone().prop_map(|failures| Op::CompleteAll { failures }),
        4 => (0usize..8).prop_map(|at| Op::Fork { at }),
        3 => (0usize..8).prop_map(|at| Op::Preempt { at }),
        4 => (0usize..8).prop_map(|at| Op::Resume { at }),
        4 => (0usize..8, 0usize..9, any::<bool>())
            .prop_map(|(at, part, rollback)| Op::Cut { at, part, rollback }),
        4 => (0usize..8).prop_map(|at| Op::Free { at }),
        1 => (0usize..8).prop_map(|at| Op::Abort { at }),
        8 => Just(Op::Flood),
        1 => (0usize..8, 0usize..3, 0usize..24)
            .prop_map(|(at, group, index)| Op::Forget { at, group, index }),
        1 => Just(Op::Reset),
        4 => prompt().prop_map(|prompt| Op::Prefetch { prompt }),
        3 => Just(Op::Tick),
        1 => Just(Op::DetachStorage),
        1 => Just(Op::DetachHost),
    ]
}

/// The tiers of a history.
#[derive(Debug, Clone)]
struct Tiers {
    host: HostConfig,
    storage_slots: u32,
}

fn tiers() -> impl Strategy<Value = Tiers> {
    let write = prop_oneof![
        2 => Just(WritePolicy::Through),
        1 => Just(WritePolicy::Selective { uses: 2 }),
        2 => Just(WritePolicy::Back),
    ];
    let max_offloads = prop_oneof![Just(4096u32), 1u32..6];
    let storage_slots = prop_oneof![1 => Just(0u32), 3 => 1u32..120];
    (3u32..60, write, max_offloads, storage_slots).prop_map(
        |(slots, write, max_offloads, storage_slots)| Tiers {
            host: HostConfig { write, max_offloads, ..HostConfig::new(slots) },
            storage_slots,
        },
    )
}

fn history() -> impl Strategy<Value = Vec<Op>> {
    prop::collection::vec(op(), 1..120)
}

fn run(config: ManagerConfig, tiers: Tiers, ops: Vec<Op>) -> Result<(), TestCaseError> {
    let Tiers { host, storage_slots } = tiers;
    let mut world = World::new(ManagerConfig { host: Some(host), ..config });
    for op in ops {
        // Tiers that were detached come back once they are drained.
        world.attach_host();
        if storage_slots > 0 {
            world.attach_storage(storage_slots);
        }
        // Few enough sequences live that cached blocks come and go.
        while world.sequences.len() > 3 {
            let oldest = *world.sequences.keys().next().unwrap();
            world.abort(oldest);
        }
        let seq = |at: usize| {
            let n = world.sequences.len();
            (n > 0).then(|| *world.sequences.keys().nth(at % n).unwrap())
        };
        match op {
            Op::Allocate { prompt, budget } => world.allocate(&prompt, budget),
            Op::Serve { prompt, failures } => world.serve(&prompt, failures)?,
            Op::Append { at, tokens } => {
                if let Some(seq) = seq(at) {
                    world.append(seq, tokens)?;
                }
            }
            Op::Step => world.step()?,
            Op::Settle { at } => {
                if let Some(seq) = seq(at) {
                    world.settle(seq)?;
                }
            }
            Op::Complete { at, fails } => {
                if !world.flying.is_empty() {
                    let at = at % world.flying.len();
                    let outcome = if fails { Outcome::Failed } else { Outcome::Succeeded };
                    world.complete(at, outcome);
                }
            }
            Op::CompleteAll { failures } => world.complete_all(failures),
            Op::Preempt { at } => {
                if let Some(seq) = seq(at) {
                    world.preempt(seq)?;
                }
            }
            Op::Resume { at } => {
                if let Some(seq) = seq(at) {
                    world.resume(seq)?;
                }
            }
            Op::Fork { at } => {
                if let Some(seq) = seq(at) {
                    world.fork(seq);
                }
            }
            Op::Cut { at, part, rollback } => {
                if let Some(seq) = seq(at) {
                    let tokens = world.sequences[&seq].tokens.len();
                    world.cut(seq, (tokens * part / 8).saturating_sub(1), rollback)?;
                }
            }
            Op::Free { at } => {
                if let Some(seq) = seq(at) {
                    let sequence = &world.sequences[&seq];
                    // Whose work has not been submitted is aborted instead.
                    if sequence.ready && sequence.computed < sequence.tokens.len() {
                        world.abort(seq);
                    } else {
                        world.m.free(seq).unwrap();
                        world.sequences.remove(&seq);
                        world.start_transfers();
                    }
                }
            }
            Op::Abort { at } => {
                if let Some(seq) = seq(at) {
                    world.abort(seq);
                }
            }
            Op::Flood => world.flood(),
            Op::Forget { at, group, index } => {
                if let Some(seq) = seq(at)
                    && group < world.config.groups.len()
                {
                    let swapped = world.sequences[&seq].swapped;
                    prop_assert_eq!(world.m.forget(seq, group, index).is_err(), swapped);
                }
            }
            Op::Reset => {
                let idle = world.m.free_blocks() == world.m.capacity();
                prop_assert_eq!(world.m.reset_prefix_cache(), idle);
            }
            Op::Prefetch { prompt } => {
                let tokens = world.m.hash(&prompt, KEYS);
                let (seq, now) = (world.next, world.now);
                let begun = world.m.prefetch(seq, &tokens, now);
                world.prefetched |= begun.is_ok_and(|begun| begun.blocks > 0);
            }
            Op::Tick => {
                world.now += 700_000_000;
                world.m.poll_prefetch(world.now).unwrap();
                prop_assert!(world.m.poll_prefetch(world.now - 1).is_err());
            }
            Op::DetachStorage => {
                world.m.detach_storage();
            }
            Op::DetachHost => {
                world.m.detach_host();
            }
        }
        world.check()?;
    }
    // Everything ends, nothing stays pinned, and what is cached is whole.
    world.complete_all(0);
    world.step()?;
    while let Some((&seq, _)) = world.sequences.iter().find(|(_, s)| !s.steps.is_empty()) {
        world.settle(seq)?;
    }
    while let Some((&seq, _)) = world.sequences.first_key_value() {
        world.m.free(seq).unwrap();
        world.sequences.remove(&seq);
    }
    world.start_transfers();
    world.complete_all(0);
    world.m.cancel_prefetch(world.next);
    prop_assert_eq!(world.m.free_blocks(), world.m.capacity());
    let usage = world.m.usage();
    prop_assert_eq!((usage.host_pinned, usage.storage_pinned), (0, 0));
    for word in 0..3 {
        world.allocate(&[word; 12], 1000);
        world.complete_all(0);
        world.step()?;
    }
    world.check()?;
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn every_visible_key_is_its_own_through_tiers_failures_and_delays(
        config in config(),
        tiers in tiers(),
        ops in history(),
    ) {
        run(config, tiers, ops)?;
    }
}
