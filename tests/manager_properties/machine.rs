//! A whole world around a manager: sequences with their tokens, what every block of every tier really holds,
//! steps and transfers in flight that end in any order and fail, and a mirror of the indices that knows nothing
//! but the events. After each operation:
//!
//! - every block is free, in use or pinned, and counted so; nobody's block is free; equal blocks alone are shared;
//! - tables hold exactly what a query to come can see (settled tokens counted), token by token;
//! - the mirror is the index: what was announced is what is findable, tier by tier;
//! - a lookup hits exactly what the mirror can serve, every length tried, every visible token asked for;
//! - what a retained prefix needs is findable while its blocks are in a table, and leaves the device only
//!   for a block that was taken;
//! - a refusal was due, and changed nothing;
//! - every key that a step sees is the right one, when the step starts and when it ends.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};

use hybridkv::manager::{
    BlockId, BreakerConfig, Completion, Direction, EventKind, Eviction, ExtraKeys, Hit, HostConfig,
    Manager, ManagerConfig, Outcome, Stats, Tier, Transfer, Usage, WritePolicy,
};
use hybridkv::spec::{AttentionKind, GroupKind};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

use super::prefixes::{Node, Prefixes};
use super::{LONGEST_PROMPT, alignment, groups, needed, prompt, retention, sees};

type Check<T = ()> = Result<T, TestCaseError>;

/// KV of one token in one group, by the prefix that it ends; 0 is garbage.
type Kv = u64;
/// What a block holds, token by token.
type Content = [Kv; 4];

const GARBAGE: Content = [0; 4];

fn kv(group: usize, node: Node) -> Kv {
    (group as u64 + 1) << 32 | u64::from(node)
}

/// A tenant and an adapter; two of them spell the same.
const KEYS: [ExtraKeys<'static>; 3] = [
    ExtraKeys { salt: "", lora: "" },
    ExtraKeys { salt: "a", lora: "" },
    ExtraKeys { salt: "", lora: "a" },
];

/// A key that a step sees: block, offset and what should be there.
type Read = (BlockId, usize, Kv);

#[derive(Clone)]
struct Sequence {
    keys: ExtraKeys<'static>,
    tokens: Vec<u32>,
    path: Vec<Node>,
    /// Tokens of the whole prompt, of which the first part may have been given.
    prompt: usize,
    /// Tokens whose steps cannot fail any more, settled or not: another sequence's, or known to have ended.
    finished: usize,
    computed: usize,
    settled: usize,
    ready: bool,
    /// A load failed: what it computes again is not findable at once.
    repaired: bool,
    /// Steps in flight: tokens computed by their end, and what they read.
    steps: VecDeque<(usize, Vec<Read>)>,
}

/// A transfer that has started, and what its source held then.
struct Flight {
    transfer: Transfer,
    source: Content,
}

/// What can be seen of a manager, counters of refusals apart.
#[derive(Debug, PartialEq)]
struct Snapshot {
    queue: Vec<BlockId>,
    users: Vec<(BlockId, u32)>,
    cached: Vec<Vec<u32>>,
    tables: Vec<Vec<BlockId>>,
    usage: Usage,
    stats: Stats,
    flying: usize,
}

struct World {
    m: Manager,
    config: ManagerConfig,
    alignment: usize,
    unit: usize,
    /// By group and length, blocks that a prefix needs.
    needed: Vec<Vec<Vec<usize>>>,
    prefixes: Prefixes,
    device: Vec<Content>,
    host: Vec<Content>,
    /// In the order of their allocation: a later one's work is submitted behind an earlier one's.
    sequences: BTreeMap<u64, Sequence>,
    flying: Vec<Flight>,
    /// Copies of every findable block, by group and prefix.
    on_device: HashMap<(usize, Node), usize>,
    on_host: HashMap<(usize, Node), usize>,
    /// Blocks in use of which the index was told to forget.
    forgotten: HashSet<BlockId>,
    next: u64,
}

impl World {
    fn new(config: ManagerConfig) -> Self {
        let slots = config.host.map_or(0, |host| host.num_slots);
        let mut m = Manager::new(config.clone()).unwrap();
        m.record_events(true);
        let longest = LONGEST_PROMPT.max(config.max_model_len as usize);
        let lengths = 0..longest + 2 * alignment(&config.groups);
        let needed_by =
            |group| lengths.clone().map(|n| needed(group, n)).collect::<Vec<Vec<usize>>>();
        let unit = config.groups.iter().map(|g| g.block_size as usize).reduce(super::gcd);
        Self {
            m,
            alignment: alignment(&config.groups),
            unit: unit.unwrap(),
            needed: config.groups.iter().map(needed_by).collect(),
            prefixes: Prefixes::default(),
            device: vec![GARBAGE; config.num_blocks as usize],
            host: vec![GARBAGE; slots as usize],
            sequences: BTreeMap::new(),
            flying: Vec::new(),
            on_device: HashMap::new(),
            on_host: HashMap::new(),
            forgotten: HashSet::new(),
            next: 0,
            config,
        }
    }

    fn size(&self, g: usize) -> usize {
        self.config.groups[g].block_size as usize
    }

    fn groups(&self) -> std::ops::Range<usize> {
        0..self.config.groups.len()
    }

    fn table(&self, seq: u64, g: usize) -> &[BlockId] {
        self.m.table(seq, g).unwrap()
    }

    /// The names of a prompt's prefixes, whose hashes are checked on the way.
    fn path(&mut self, keys: ExtraKeys<'_>, tokens: &[u32]) -> Check<Vec<Node>> {
        let path = self.prefixes.path(keys, tokens);
        self.prefixes.learn(&self.m, self.unit, keys, tokens, &path)?;
        Ok(path)
    }

    fn snapshot(&self) -> Snapshot {
        let table = |(&seq, g): (&u64, usize)| self.table(seq, g).to_vec();
        let seqs = self.sequences.keys();
        Snapshot {
            queue: self.m.free_queue(),
            users: self.m.ref_counts(),
            cached: self.groups().map(|g| self.m.cached_indices(g)).collect(),
            tables: seqs.flat_map(|seq| self.groups().map(move |g| (seq, g))).map(table).collect(),
            usage: self.m.usage(),
            stats: Stats { refused: 0, ..self.m.stats() },
            flying: self.m.transfers_in_flight(),
        }
    }

    /// Replays the events into the mirror; gives how many blocks the device lost. What may leave the host
    /// without ever having been stored there was on its way.
    fn replay_events(&mut self, writing: &HashSet<(usize, Node)>) -> Check<usize> {
        let mut lost = 0;
        for event in self.m.events() {
            let g = event.group as usize;
            let mirror = match event.tier {
                Tier::Device => &mut self.on_device,
                _ => &mut self.on_host,
            };
            if event.kind == EventKind::Cleared {
                mirror.retain(|&(group, _), _| group != g);
            }
            prop_assert_eq!(event.hashes.len(), event.indices.len());
            for (hash, &index) in event.hashes.iter().zip(&event.indices) {
                let Some(node) = self.prefixes.named(hash) else {
                    return Err(TestCaseError::fail("an event of a hash that nothing has"));
                };
                let end = (index as usize + 1) * self.config.groups[g].block_size as usize;
                prop_assert_eq!(self.prefixes.len(node), end, "the index of an event");
                let copies = mirror.entry((g, node)).or_default();
                if event.kind == EventKind::Stored {
                    *copies += 1;
                    prop_assert!(event.tier == Tier::Device || *copies == 1, "stored twice");
                    continue;
                }
                lost += usize::from(event.tier == Tier::Device);
                match copies {
                    0 => prop_assert!(
                        event.tier != Tier::Device && writing.contains(&(g, node)),
                        "removed and not there"
                    ),
                    _ => *copies -= 1,
                }
                if *copies == 0 {
                    mirror.remove(&(g, node));
                }
            }
        }
        Ok(lost)
    }

    /// The longest hit that the mirror can serve: every length, every block with a token that is seen.
    fn longest(&self, path: &[Node], serves: impl Fn(usize, Node) -> bool) -> usize {
        let whole = |n: &usize| {
            self.groups().all(|g| {
                let size = self.size(g);
                self.needed[g][*n].iter().all(|b| serves(g, path[(b + 1) * size - 1]))
            })
        };
        let lengths = (0..path.len()).rev().filter(|n| n % self.alignment == 0);
        lengths.into_iter().find(whole).unwrap_or(0)
    }

    fn lookup(&mut self, tokens: &[u32], keys: ExtraKeys<'_>) -> Check<Hit> {
        let path = self.path(keys, tokens)?;
        let hit = self.m.lookup(tokens, keys);
        let on_device = |g, node| self.on_device.contains_key(&(g, node));
        let anywhere = |g, node| on_device(g, node) || self.on_host.contains_key(&(g, node));
        prop_assert_eq!(hit.device_tokens, self.longest(&path, on_device), "on the device");
        prop_assert_eq!(hit.tokens, self.longest(&path, anywhere), "over all tiers");
        for g in self.groups() {
            let size = self.size(g);
            prop_assert_eq!(hit.blocks[g].len(), hit.tokens / size);
            for (b, &id) in hit.blocks[g].iter().enumerate() {
                let end = path[(b + 1) * size - 1];
                let wanted = self.needed[g][hit.tokens].contains(&b) && on_device(g, end);
                prop_assert_eq!(id != 0, wanted, "block {} of group {}", b, g);
                for t in 0..if wanted { size } else { 0 } {
                    let expected = kv(g, path[b * size + t]);
                    let pending = || {
                        self.sequences.iter().any(|(&seq, sequence)| {
                            sequence.computed <= b * size + t
                                && self.table(seq, g).get(b) == Some(&id)
                        })
                    };
                    let found = self.device[id as usize][t];
                    prop_assert!(found == expected || pending(), "a hit on garbage");
                }
            }
        }
        Ok(hit)
    }

    /// Copies what was emitted, and starts all emitted transfers: until they succeed their targets hold
    /// garbage.
    fn start_transfers(&mut self) -> Check {
        while let Some(copy) = self.m.next_copy() {
            self.device[copy.to as usize] = self.device[copy.from as usize];
        }
        while let Some(transfer) = self.m.next_transfer() {
            let block = transfer.path.block().map(|block| block as usize);
            let slot = transfer.path.slot() as usize;
            let source = match (transfer.path.direction(), block) {
                (Direction::Offload, Some(block)) => {
                    self.host[slot] = GARBAGE;
                    self.device[block]
                }
                (Direction::Onboard, Some(block)) => {
                    self.device[block] = GARBAGE;
                    self.host[slot]
                }
                other => return Err(TestCaseError::fail(format!("a transfer {other:?}"))),
            };
            self.flying.push(Flight { transfer, source });
        }
        Ok(())
    }

    /// Blocks on their way to the host.
    fn writing(&self) -> HashSet<(usize, Node)> {
        let offloads = self
            .flying
            .iter()
            .filter(|flight| flight.transfer.path.direction() == Direction::Offload);
        offloads
            .filter_map(|Flight { transfer, .. }| {
                Some((transfer.group as usize, self.prefixes.named(&transfer.hash)?))
            })
            .collect()
    }

    fn complete(&mut self, at: usize, outcome: Outcome) -> Check {
        let writing = self.writing();
        let Flight { transfer, source } = self.flying.swap_remove(at);
        let (slot, block) =
            (transfer.path.slot() as usize, transfer.path.block().unwrap() as usize);
        let group = transfer.group as usize;
        let Some(node) = self.prefixes.named(&transfer.hash) else {
            return Err(TestCaseError::fail("a transfer of a hash that nothing has"));
        };
        if outcome == Outcome::Succeeded {
            // A source that changed under the copy gives anything.
            let torn = |now: Content| if now == source { source } else { GARBAGE };
            match transfer.path.direction() {
                Direction::Offload => self.host[slot] = torn(self.device[block]),
                _ => self.device[block] = torn(self.host[slot]),
            }
        }
        let was_on_host = self.on_host.contains_key(&(group, node));
        let completion = self.m.complete(transfer.id, outcome).unwrap();
        let lost = self.replay_events(&writing)?;
        let mut taken = 0;
        match completion {
            Completion::Pending => {}
            Completion::Ready { seq, valid_tokens } => {
                let sequence = self.sequences.get_mut(&seq).unwrap();
                prop_assert!(!sequence.ready && valid_tokens <= sequence.computed);
                sequence.repaired = valid_tokens < sequence.computed;
                let again = sequence.computed - valid_tokens;
                taken = self.config.groups.iter().map(|g| again / g.block_size as usize).sum();
                (sequence.computed, sequence.settled) = (valid_tokens, valid_tokens);
                sequence.ready = true;
            }
            Completion::Dropped { seq } | Completion::Void { seq } => {
                prop_assert!(self.sequences.remove(&seq).is_some());
            }
        }
        // What could not be written back leaves, as it was to.
        let back = self.config.host.is_some_and(|host| host.write == WritePolicy::Back);
        let failed = transfer.path.direction() == Direction::Offload && outcome == Outcome::Failed;
        let dropped = usize::from(back && failed);
        prop_assert!(lost <= taken + dropped, "{} blocks dropped for {} taken", lost, taken);
        if !was_on_host && self.on_host.contains_key(&(group, node)) {
            prop_assert_eq!(outcome, Outcome::Succeeded);
            let (size, content) = (self.size(group), self.content(group, node));
            prop_assert_eq!(&self.host[slot][..size], &content[..size], "something else is stored");
        }
        prop_assert!(self.m.complete(transfer.id, outcome).is_err(), "answered twice");
        prop_assert_eq!(self.m.next_completion(), None);
        Ok(())
    }

    /// What a block that ends with this prefix holds.
    fn content(&self, group: usize, mut node: Node) -> Content {
        let mut content = GARBAGE;
        for t in (0..self.size(group)).rev() {
            content[t] = kv(group, node);
            node = self.prefixes.parent(node);
        }
        content
    }

    /// Ends all transfers, out of order; bit `n % 8` of `failures` says whether the nth fails.
    fn complete_all(&mut self, failures: u8) -> Check {
        for n in 0.. {
            if self.flying.is_empty() {
                break;
            }
            let fails = failures >> (n % 8) & 1 == 1;
            let outcome = if fails { Outcome::Failed } else { Outcome::Succeeded };
            self.complete(n * 5 % self.flying.len(), outcome)?;
        }
        Ok(())
    }

    fn allocate(
        &mut self,
        prompt: &[u32],
        keys: ExtraKeys<'static>,
        budget: usize,
        lookahead: usize,
    ) -> Check {
        let max_model_len = self.config.max_model_len as usize;
        let too_long = prompt.len() > max_model_len;
        let hit = self.lookup(prompt, keys)?;
        let before = self.snapshot();
        let given = self.m.allocate_prefill(self.next, prompt, budget, keys, lookahead);

        // What it takes: new blocks, and hits that nobody uses.
        let now = prompt.len().min(hit.tokens.saturating_add(budget));
        let slots = (now + lookahead).min(max_model_len);
        let mut wanted = 0;
        let mut loads = 0;
        for g in self.groups() {
            wanted += slots.div_ceil(self.size(g)).saturating_sub(hit.blocks[g].len());
            for &b in &self.needed[g][hit.tokens] {
                let id = hit.blocks[g][b];
                loads += usize::from(id == 0);
                wanted += usize::from(id == 0 || before.queue.contains(&id));
            }
        }
        let room = !too_long && wanted <= before.queue.len();
        let Ok(given) = given else { return self.refused(room, room, before) };
        prop_assert!(room, "accepted without room");
        prop_assert_eq!(
            (given.hit_tokens, given.device_hit_tokens),
            (hit.tokens, hit.device_tokens)
        );
        prop_assert_eq!((given.num_tokens, given.loads.len()), (now, loads));
        let taken: Vec<BlockId> = given.new_blocks.concat();
        prop_assert!(taken.iter().all(|id| before.queue.contains(id)), "took a block in use");
        for g in self.groups() {
            let table = self.table(self.next, g);
            prop_assert_eq!(table.len(), slots.div_ceil(self.size(g)));
            for (b, &id) in hit.blocks[g].iter().enumerate() {
                let load = id == 0 && self.needed[g][hit.tokens].contains(&b);
                let as_found = table[b] == id;
                let right = if load { taken.contains(&table[b]) } else { as_found };
                prop_assert!(right, "block {} of group {}", b, g);
            }
        }
        let path = self.path(keys, prompt)?;
        let sequence = Sequence {
            keys,
            tokens: prompt[..now].to_vec(),
            path: path[..now].to_vec(),
            prompt: prompt.len(),
            finished: 0,
            computed: hit.tokens,
            settled: hit.tokens,
            ready: given.loads.is_empty(),
            repaired: false,
            steps: VecDeque::new(),
        };
        self.sequences.insert(self.next, sequence);
        self.next += 1;
        let lost = self.replay_events(&self.writing())?;
        prop_assert!(lost <= taken.len(), "{} blocks dropped for {} taken", lost, taken.len());
        self.start_transfers()
    }

    fn append(&mut self, seq: u64, tokens: &[u32]) -> Check {
        let sequence = &self.sequences[&seq];
        let (keys, start) = (sequence.keys, sequence.tokens.len());
        let end = start + tokens.len();
        let all = [&sequence.tokens[..], tokens].concat();
        let ready = sequence.ready;
        let before = self.snapshot();
        // A partly filled tail moves when anybody counts on what lies behind its end.
        let (mut least, mut most) = (0, 0);
        for g in self.groups() {
            let (size, table) = (self.size(g), self.table(seq, g));
            let fresh = end.div_ceil(size).saturating_sub(table.len());
            let tail = table.get(start / size).filter(|_| start % size > 0);
            let shared = tail.is_some_and(|id| {
                before.users.iter().any(|&(user, users)| user == *id && users > 1)
                    || self.flying.iter().any(|flight| flight.transfer.path.block() == Some(*id))
            });
            least += fresh + usize::from(shared);
            most += fresh + usize::from(tail.is_some());
        }
        let fits = ready && end <= self.config.max_model_len as usize;
        let (sure, room) =
            (fits && most <= before.queue.len(), fits && least <= before.queue.len());
        let Ok(new_blocks) = self.m.append(seq, tokens) else {
            return self.refused(sure, room, before);
        };
        let taken = new_blocks.concat();
        prop_assert!(room, "accepted without room");
        prop_assert!((least..=most).contains(&taken.len()));
        prop_assert!(taken.iter().all(|id| before.queue.contains(id)), "took a block in use");
        let path = self.path(keys, &all)?;
        let tables =
            self.groups().map(|g| self.table(seq, g).to_vec()).collect::<Vec<_>>().concat();
        let sequence = self.sequences.get_mut(&seq).unwrap();
        (sequence.tokens, sequence.path) = (all, path);
        // What reuses the block that a tail left is submitted behind the steps that read it there.
        for (_, reads) in &mut sequence.steps {
            reads.retain(|(id, ..)| tables.contains(id));
        }
        let lost = self.replay_events(&self.writing())?;
        prop_assert!(lost <= taken.len(), "{} blocks dropped for {} taken", lost, taken.len());
        self.start_transfers()
    }

    /// A refusal: it is not `sure` that there was room, and nothing has changed. Under write-back what is to be
    /// evicted for a request that has `room` may have to be stored first, which begins now.
    fn refused(&mut self, sure: bool, room: bool, before: Snapshot) -> Check {
        let lost = self.replay_events(&self.writing())?;
        prop_assert_eq!(lost, 0);
        let flying = self.flying.len();
        self.start_transfers()?;
        let back = self.config.host.is_some_and(|host| host.write == WritePolicy::Back);
        prop_assert!(!sure || back && !self.flying.is_empty(), "refused with room");
        if back && room {
            prop_assert_eq!(before.tables, self.snapshot().tables);
            return Ok(());
        }
        prop_assert_eq!(self.flying.len(), flying);
        prop_assert_eq!(before, self.snapshot());
        Ok(())
    }

    /// Submits one step: up to `most` tokens of everything that is ready, in the order of allocation. Who
    /// reads what another one has yet to compute waits for it.
    fn step(&mut self, most: usize) -> Check {
        let mut unwritten: HashSet<BlockId> = HashSet::new();
        let seqs: Vec<u64> = self.sequences.keys().copied().collect();
        for seq in seqs {
            let sequence = &self.sequences[&seq];
            let (start, mut end) = (
                sequence.computed,
                sequence.tokens.len().min(sequence.computed.saturating_add(most)),
            );
            let waits =
                self.groups().any(|g| self.table(seq, g).iter().any(|id| unwritten.contains(id)));
            if !sequence.ready || waits {
                end = start;
            }
            let mut reads: Vec<Read> = Vec::new();
            for g in self.groups() {
                let (size, table) = (self.size(g), self.m.table(seq, g).unwrap());
                if end < sequence.tokens.len() {
                    unwritten.extend(&table[end / size..]);
                }
                for i in start..end {
                    let id = table[i / size];
                    let another = self.sequences.iter().any(|(&name, other)| {
                        name != seq
                            && (other.computed..other.tokens.len()).contains(&i)
                            && self.table(name, g).get(i / size) == Some(&id)
                    });
                    prop_assert!(id != 0 && !another, "a new token has a slot of its own");
                    self.device[id as usize][i % size] = kv(g, sequence.path[i]);
                }
                let group = &self.config.groups[g];
                for j in (0..end).filter(|&j| (start.max(j)..end).any(|i| sees(group, i, j))) {
                    reads.push((table[j / size], j % size, kv(g, sequence.path[j])));
                }
            }
            unwritten.remove(&0);
            if end == start {
                continue;
            }
            self.check_reads(&reads)?;
            let sequence = self.sequences.get_mut(&seq).unwrap();
            sequence.computed = end;
            sequence.steps.push_back((end, reads));
            self.advance(seq)?;
        }
        Ok(())
    }

    /// The oldest step of a sequence ends.
    fn settle(&mut self, seq: u64) -> Check {
        let Some(sequence) = self.sequences.get_mut(&seq) else { return Ok(()) };
        let Some((end, reads)) = sequence.steps.pop_front() else { return Ok(()) };
        sequence.settled = end;
        self.check_reads(&reads)?;
        self.advance(seq)
    }

    fn check_reads(&self, reads: &[Read]) -> Check {
        for &(block, offset, expected) in reads {
            prop_assert_ne!(block, 0, "a visible key lies in the null block");
            prop_assert_eq!(self.device[block as usize][offset], expected, "block {}", block);
        }
        Ok(())
    }

    fn advance(&mut self, seq: u64) -> Check {
        let Sequence { computed, settled, .. } = self.sequences[&seq];
        let tables: Vec<Vec<BlockId>> =
            self.groups().map(|g| self.table(seq, g).to_vec()).collect();
        let freed = self.m.advance(seq, computed, settled).unwrap();
        for g in self.groups() {
            let left = tables[g].iter().zip(self.table(seq, g)).rev();
            let left: Vec<BlockId> =
                left.filter(|(was, is)| was != is).map(|(was, _)| *was).collect();
            prop_assert_eq!(&freed[g], &left);
        }
        let lost = self.replay_events(&self.writing())?;
        prop_assert_eq!(lost, 0, "nothing was taken");
        self.start_transfers()
    }

    /// A step fails: what it wrote is garbage, and so is what others made of that.
    fn abort(&mut self, seq: u64) -> Check {
        let writing = self.writing();
        let mut failed = vec![seq];
        while let Some(seq) = failed.pop() {
            let Some(sequence) = self.sequences.remove(&seq) else { continue };
            for g in self.groups() {
                let (size, table) = (self.size(g), self.m.table(seq, g).unwrap());
                for i in sequence.settled.max(sequence.finished)..sequence.computed {
                    self.device[table[i / size] as usize][i % size] = 0;
                }
            }
            failed.extend(self.m.abort(seq).unwrap());
        }
        self.replay_events(&writing)?;
        self.start_transfers()
    }

    /// Ends a sequence: it is freed, or aborted when some of its work was never submitted.
    fn end(&mut self, seq: u64) -> Check {
        let sequence = &self.sequences[&seq];
        if sequence.ready && sequence.computed < sequence.tokens.len() {
            return self.abort(seq);
        }
        self.m.free(seq).unwrap();
        self.sequences.remove(&seq);
        let lost = self.replay_events(&self.writing())?;
        prop_assert_eq!(lost, 0, "nothing was taken");
        self.start_transfers()
    }

    /// Whether a sequence counts on tokens that another one has yet to compute.
    fn waits(&self, seq: u64) -> bool {
        self.sequences.iter().any(|(&name, other)| {
            name != seq
                && self.groups().any(|g| {
                    let unwritten = other.computed / self.size(g);
                    let (own, others) = (self.table(seq, g), self.table(name, g));
                    (unwritten..own.len().min(others.len())).any(|b| own[b] == others[b])
                })
        })
    }

    fn fork(&mut self, parent: u64) -> Check {
        let sequence = &self.sequences[&parent];
        let before = self.snapshot();
        let forked = self.m.fork(parent, self.next);
        prop_assert_eq!(forked.is_ok(), sequence.ready && sequence.computed > 0);
        let Ok(shared) = forked else {
            prop_assert_eq!(before, self.snapshot());
            return Ok(());
        };
        prop_assert_eq!(shared, sequence.computed);
        let mut child = Sequence { steps: VecDeque::new(), finished: shared, ..sequence.clone() };
        child.tokens.truncate(shared);
        child.path.truncate(shared);
        self.sequences.insert(self.next, child);
        self.next += 1;
        Ok(())
    }

    /// Cuts a sequence back to its first `n` tokens, once its steps have ended.
    fn cut(&mut self, seq: u64, n: usize, rollback: bool) -> Check {
        let steps = std::mem::take(&mut self.sequences.get_mut(&seq).unwrap().steps);
        for (_, reads) in steps {
            self.check_reads(&reads)?;
        }
        let sequence = self.sequences.get_mut(&seq).unwrap();
        sequence.finished = sequence.computed;
        let before = self.snapshot();
        let cut = match rollback {
            true => self.m.rollback(seq, n),
            false => self.m.trim(seq, n),
        };
        let Ok(cut) = cut else {
            // Nothing that is not settled has been freed.
            let sequence = &self.sequences[&seq];
            prop_assert!(!sequence.ready || n == 0 || n < sequence.settled);
            prop_assert_eq!(before, self.snapshot());
            return Ok(());
        };
        let sequence = self.sequences.get_mut(&seq).unwrap();
        sequence.tokens.truncate(n);
        sequence.path.truncate(n);
        sequence.computed = sequence.computed.min(n);
        sequence.settled = sequence.settled.min(n);
        sequence.finished = sequence.finished.min(n);
        self.replay_events(&self.writing())?;
        for seq in cut.dependents {
            self.abort(seq)?;
        }
        Ok(())
    }

    fn settle_all(&mut self, seq: u64) -> Check {
        while self.sequences.get(&seq).is_some_and(|sequence| !sequence.steps.is_empty()) {
            self.settle(seq)?;
        }
        Ok(())
    }

    /// A whole turn: it is computed, stored, and gone.
    fn serve(&mut self, prompt: &[u32], keys: ExtraKeys<'static>, failures: u8) -> Check {
        let seq = self.next;
        self.allocate(prompt, keys, usize::MAX, 0)?;
        self.complete_all(failures)?;
        self.step(usize::MAX)?;
        self.settle_all(seq)?;
        self.complete_all(failures)?;
        if self.sequences.contains_key(&seq) {
            self.end(seq)?;
        }
        Ok(())
    }

    /// Tokens that nobody else has pass through most of the free blocks.
    fn flood(&mut self) -> Check {
        let first = self.next;
        for _ in 0..3 {
            let start = 1000 + self.next as u32 * 1000;
            let tokens: Vec<u32> = (start..start + self.config.max_model_len).collect();
            self.allocate(&tokens, KEYS[0], usize::MAX, 0)?;
        }
        for seq in first..self.next {
            self.abort(seq)?;
        }
        Ok(())
    }

    fn forget(&mut self, seq: u64, g: usize, index: usize) -> Check {
        let id = self.table(seq, g).get(index).copied().unwrap_or(0);
        self.m.forget(seq, g, index).unwrap();
        if id != 0 {
            self.forgotten.insert(id);
        }
        let lost = self.replay_events(&self.writing())?;
        prop_assert!(lost <= usize::from(id != 0));
        Ok(())
    }

    /// Whether a prefix that is to stay findable needs block `b`.
    fn retained(&self, g: usize, prompt: usize, b: usize) -> bool {
        let retention = &self.config.retention;
        let (full, windowed) = match self.config.groups[g].kind {
            GroupKind::Attention(AttentionKind::Full) => (true, true),
            GroupKind::Attention(AttentionKind::Chunked { .. }) => (retention.dense_chunks, true),
            _ => (false, true),
        };
        let step = retention.interval.map_or(self.alignment, |k| k as usize);
        let replay = (prompt - 1) / self.alignment * self.alignment;
        let boundary = |n: usize| n == replay || step > 0 && n.is_multiple_of(step);
        let mut lengths = (0..self.needed[g].len()).step_by(self.alignment);
        // Every sequence may end where it is.
        let generated = (b + 1) * self.size(g) > replay;
        let ends = retention.ends && self.config.groups[g].kind != GroupKind::State && generated;
        full || ends || windowed && lengths.any(|n| boundary(n) && self.needed[g][n].contains(&b))
    }

    fn check(&mut self) -> Check {
        // Who holds what.
        let mut users: BTreeMap<BlockId, u32> = BTreeMap::new();
        let mut holders: HashMap<BlockId, (usize, usize, &Sequence)> = HashMap::new();
        for (&seq, sequence) in &self.sequences {
            for g in self.groups() {
                let (size, rule) = (self.size(g), &self.config.groups[g]);
                for (b, &id) in self.table(seq, g).iter().enumerate() {
                    let (start, end) = (b * size, (b + 1) * size);
                    let live = end > sequence.settled
                        || start < rule.sink_tokens as usize
                        || (start..end).any(|j| sees(rule, sequence.settled, j));
                    prop_assert_eq!(id != 0, live, "block {} of group {} of {}", b, g, seq);
                    if id == 0 {
                        continue;
                    }
                    *users.entry(id).or_default() += 1;
                    let (group, index, other) = *holders.entry(id).or_insert((g, b, sequence));
                    let last = end.min(sequence.path.len()).min(other.path.len()).checked_sub(1);
                    let same = last.is_none_or(|last| sequence.path[last] == other.path[last]);
                    prop_assert!((group, index) == (g, b) && same, "different blocks in one place");
                    let Some(&node) = sequence.path.get(end - 1) else { continue };
                    let findable = self.on_device.contains_key(&(g, node));
                    let owed = sequence.ready
                        && !sequence.repaired
                        && end <= sequence.tokens.len() / self.alignment * self.alignment
                        && !self.forgotten.contains(&id)
                        && self.retained(g, sequence.prompt, b);
                    prop_assert!(findable || !owed, "block {} of group {} is not kept", b, g);
                }
            }
        }
        self.forgotten.retain(|id| users.contains_key(id));
        let busy: BTreeSet<BlockId> = users
            .keys()
            .copied()
            .chain(self.flying.iter().filter_map(|flight| flight.transfer.path.block()))
            .collect();
        prop_assert_eq!(self.m.ref_counts(), users.into_iter().collect::<Vec<_>>());
        let free: BTreeSet<BlockId> = self.m.free_queue().into_iter().collect();
        prop_assert_eq!(free.len(), self.m.free_blocks());
        prop_assert!(free.is_disjoint(&busy), "free and in use");
        prop_assert_eq!(free.len() + busy.len(), self.m.capacity(), "conservation");
        prop_assert_eq!(self.m.transfers_in_flight(), self.flying.len());

        // The mirror is the index.
        let usage = self.m.usage();
        for g in self.groups() {
            let mut indices = Vec::new();
            for (&(group, node), &copies) in &self.on_device {
                if group == g {
                    let index = self.prefixes.len(node) / self.size(g) - 1;
                    indices.extend(std::iter::repeat_n(index as u32, copies));
                }
            }
            indices.sort_unstable();
            prop_assert_eq!(usage.device_cached[g], indices.len());
            prop_assert_eq!(self.m.cached_indices(g), indices);
            if self.config.host.is_some() {
                let on_host = self.on_host.keys().filter(|&&(group, _)| group == g).count();
                prop_assert_eq!(usage.host_cached[g], on_host);
            }
        }
        let slots: BTreeSet<u32> = self.flying.iter().map(|f| f.transfer.path.slot()).collect();
        prop_assert_eq!(usage.host_pinned, slots.len());
        prop_assert!(usage.host_used <= usage.host_capacity);
        let unpinned = self.on_host.len() <= usage.host_used;
        prop_assert!(unpinned && usage.host_used <= self.on_host.len() + slots.len());
        Ok(())
    }

    fn apply(&mut self, op: Op) -> Check {
        let seq = |at: usize| {
            let n = self.sequences.len();
            (n > 0).then(|| *self.sequences.keys().nth(at % n).unwrap())
        };
        match op {
            Op::Lookup { prompt, keys } => {
                self.lookup(&prompt, KEYS[keys])?;
            }
            Op::Allocate { prompt, keys, budget, lookahead } => {
                self.allocate(&prompt, KEYS[keys], budget, lookahead)?;
            }
            Op::Serve { prompt, keys, failures } => self.serve(&prompt, KEYS[keys], failures)?,
            Op::Append { at, tokens } => {
                if let Some(seq) = seq(at) {
                    self.append(seq, &tokens)?;
                }
            }
            Op::Step { most } => self.step(most)?,
            Op::Settle { at } => {
                if let Some(seq) = seq(at) {
                    self.settle(seq)?;
                }
            }
            Op::Complete { at, fails } => {
                if !self.flying.is_empty() {
                    let outcome = if fails { Outcome::Failed } else { Outcome::Succeeded };
                    self.complete(at % self.flying.len(), outcome)?;
                }
            }
            Op::CompleteAll { failures } => self.complete_all(failures)?,
            Op::End { at } => {
                if let Some(seq) = seq(at) {
                    self.end(seq)?;
                }
            }
            Op::Abort { at } => {
                if let Some(seq) = seq(at) {
                    self.abort(seq)?;
                }
            }
            Op::Fork { at } => {
                if let Some(seq) = seq(at).filter(|&seq| !self.waits(seq)) {
                    self.fork(seq)?;
                }
            }
            Op::Cut { at, part, rollback } => {
                if let Some(seq) = seq(at).filter(|&seq| !self.waits(seq)) {
                    let tokens = self.sequences[&seq].tokens.len();
                    self.cut(seq, (tokens * part / 8).saturating_sub(1), rollback)?;
                }
            }
            Op::Flood => self.flood()?,
            Op::Forget { at, group, index } => {
                if let (Some(seq), true) = (seq(at), group < self.config.groups.len()) {
                    self.forget(seq, group, index)?;
                }
            }
            Op::Reset => {
                let idle = self.m.free_blocks() == self.m.capacity();
                prop_assert_eq!(self.m.reset_prefix_cache(), idle);
                self.replay_events(&HashSet::new())?;
                prop_assert!(!idle || self.on_device.is_empty() && self.on_host.is_empty());
            }
        }
        Ok(())
    }

    /// Everything ends, and nothing stays in use.
    fn drain(&mut self) -> Check {
        self.complete_all(0)?;
        self.step(usize::MAX)?;
        let seqs: Vec<u64> = self.sequences.keys().copied().collect();
        for seq in seqs {
            self.settle_all(seq)?;
            self.end(seq)?;
        }
        self.complete_all(0)?;
        prop_assert_eq!(self.m.free_blocks(), self.m.capacity());
        prop_assert_eq!(self.m.usage().host_pinned, 0);
        self.check()
    }
}

#[derive(Debug, Clone)]
enum Op {
    Lookup {
        prompt: Vec<u32>,
        keys: usize,
    },
    Allocate {
        prompt: Vec<u32>,
        keys: usize,
        budget: usize,
        lookahead: usize,
    },
    Serve {
        prompt: Vec<u32>,
        keys: usize,
        failures: u8,
    },
    Append {
        at: usize,
        tokens: Vec<u32>,
    },
    Step {
        most: usize,
    },
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
    End {
        at: usize,
    },
    Abort {
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
    Flood,
    Forget {
        at: usize,
        group: usize,
        index: usize,
    },
    Reset,
}

fn op() -> impl Strategy<Value = Op> {
    let keys = || prop_oneof![6 => Just(0usize), 1 => Just(1), 1 => Just(2)];
    let budget = prop_oneof![2 => Just(usize::MAX), 1 => 1usize..12];
    let lookahead = prop_oneof![3 => Just(0usize), 1 => 0usize..9];
    let failures = || prop_oneof![3 => Just(0u8), 1 => any::<u8>()];
    let most = prop_oneof![2 => Just(usize::MAX), 1 => 1usize..9];
    let at = || 0usize..8;
    prop_oneof![
        6 => (prompt(), keys()).prop_map(|(prompt, keys)| Op::Lookup { prompt, keys }),
        10 => (prompt(), keys(), budget, lookahead).prop_map(
            |(prompt, keys, budget, lookahead)| Op::Allocate { prompt, keys, budget, lookahead }
        ),
        6 => (prompt(), keys(), failures())
            .prop_map(|(prompt, keys, failures)| Op::Serve { prompt, keys, failures }),
        6 => (at(), prompt()).prop_map(|(at, mut tokens)| {
            tokens.truncate(9);
            Op::Append { at, tokens }
        }),
        9 => most.prop_map(|most| Op::Step { most }),
        9 => at().prop_map(|at| Op::Settle { at }),
        12 => (0usize..64, prop::bool::weighted(0.1))
            .prop_map(|(at, fails)| Op::Complete { at, fails }),
        3 => failures().prop_map(|failures| Op::CompleteAll { failures }),
        8 => at().prop_map(|at| Op::End { at }),
        2 => at().prop_map(|at| Op::Abort { at }),
        4 => at().prop_map(|at| Op::Fork { at }),
        4 => (at(), 0usize..9, any::<bool>())
            .prop_map(|(at, part, rollback)| Op::Cut { at, part, rollback }),
        2 => Just(Op::Flood),
        2 => (at(), 0usize..3, 0usize..24)
            .prop_map(|(at, group, index)| Op::Forget { at, group, index }),
        1 => Just(Op::Reset),
    ]
}

fn host() -> impl Strategy<Value = HostConfig> {
    let write = prop_oneof![
        2 => Just(WritePolicy::Through),
        1 => Just(WritePolicy::Selective { uses: 2 }),
        2 => Just(WritePolicy::Back),
    ];
    (3u32..60, write, prop_oneof![Just(4096u32), 1u32..6]).prop_map(
        |(num_slots, write, max_offloads)| HostConfig {
            write,
            max_offloads,
            // Failures are many here; the breaker has tests of its own.
            breaker: BreakerConfig { failures: u32::MAX, retry_ns: 1 },
            ..HostConfig::new(num_slots)
        },
    )
}

/// A pool that holds one to three of the longest sequences.
fn config(host: impl Strategy<Value = Option<HostConfig>>) -> impl Strategy<Value = ManagerConfig> {
    (groups(), 16u32..56, 0u32..40, host).prop_flat_map(|(groups, max_model_len, extra, host)| {
        let longest: u32 = groups.iter().map(|g| max_model_len.div_ceil(g.block_size)).sum();
        retention(&groups).prop_map(move |retention| ManagerConfig {
            groups: groups.clone(),
            num_blocks: 1 + longest + extra,
            prefix_caching: true,
            retention,
            eviction: Eviction::Lru,
            max_model_len,
            in_flight_tokens: 1 << 20,
            host,
            identity: [9; 32],
        })
    })
}

fn run(config: ManagerConfig, ops: Vec<Op>) -> Check {
    let mut world = World::new(config);
    for op in ops {
        // Few enough sequences live that cached blocks come and go.
        while world.sequences.len() > 4 {
            let oldest = *world.sequences.keys().next().unwrap();
            world.end(oldest)?;
        }
        world.apply(op)?;
        world.check()?;
    }
    world.drain()
}

/// Histories of 200 operations on average.
fn history() -> impl Strategy<Value = Vec<Op>> {
    prop::collection::vec(op(), 1..400)
}

/// The same cases in every run; `PROPTEST_RNG_SEED` gives others.
fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        rng_seed: RngSeed::Fixed(1),
        failure_persistence: None,
        max_shrink_iters: 20_000,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(cases(2500))]

    #[test]
    fn half_a_million_operations_on_the_device(config in config(Just(None)), ops in history()) {
        run(config, ops)?;
    }

    #[test]
    fn half_a_million_operations_with_a_host_tier(config in config(host().prop_map(Some)), ops in history()) {
        run(config, ops)?;
    }
}
