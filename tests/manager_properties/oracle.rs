//! The device tier, predicted: blocks, queue, index and tables in plain vectors, every rule by search over
//! its definition.

use std::collections::BTreeMap;

use hybridkv::ErrorKind;
use hybridkv::manager::{BlockId, ExtraKeys, Manager, ManagerConfig, Slack};
use hybridkv::spec::{AttentionKind, GroupKind};
use proptest::prelude::*;

use super::{alignment, config, fronts, needed, prompt, sees, unit};

/// What a cached block stands for: group, salt, and the tokens up to its end.
type Key = (usize, String, Vec<u32>);

#[derive(Default, Clone)]
struct Sequence {
    salt: String,
    tokens: Vec<u32>,
    prompt: usize,
    junction: usize,
    tables: Vec<Vec<BlockId>>,
    considered: Vec<usize>,
    /// Blocks before these are another sequence's, or settled.
    settled_blocks: Vec<usize>,
    computed: usize,
    settled: usize,
}

struct Oracle {
    config: ManagerConfig,
    alignment: usize,
    /// Blocks without a user, those reused first in front: without content, demoted, and the others by the time
    /// of their release.
    queue: [Vec<BlockId>; 3],
    users: Vec<u32>,
    /// Per block, what it is findable as, with the order in which that was said.
    keys: Vec<Option<(u64, Key)>>,
    /// Per block, shorter prefixes that it is findable as, too.
    fronts: Vec<Vec<Key>>,
    stamp: u64,
    sequences: BTreeMap<u64, Sequence>,
}

impl Oracle {
    fn new(config: ManagerConfig) -> Self {
        let n = config.num_blocks;
        Self {
            alignment: alignment(&config.groups, config.retention.fronts),
            queue: [(1..n).collect(), Vec::new(), Vec::new()],
            users: vec![0; n as usize],
            keys: vec![None; n as usize],
            fronts: vec![Vec::new(); n as usize],
            stamp: 0,
            sequences: BTreeMap::new(),
            config,
        }
    }

    fn size(&self, g: usize) -> usize {
        self.config.groups[g].block_size as usize
    }

    /// The block that serves this prefix: of equal ones the first cached.
    fn find(&self, g: usize, salt: &str, prefix: &[u32]) -> BlockId {
        let named = |id: &usize| match &self.keys[*id] {
            Some((_, (group, s, tokens))) => *group == g && s == salt && tokens == prefix,
            None => false,
        };
        let first =
            (1..self.keys.len()).filter(named).min_by_key(|&id| self.keys[id].as_ref().unwrap().0);
        let key = (g, salt.to_owned(), prefix.to_vec());
        let by_front = || self.fronts.iter().position(|fronts| fronts.contains(&key));
        first.or_else(by_front).unwrap_or(0) as BlockId
    }

    /// The block that has what the first `n` tokens have of block `b`.
    fn block(&self, g: usize, salt: &str, tokens: &[u32], b: usize, n: usize) -> BlockId {
        self.find(g, salt, &tokens[..((b + 1) * self.size(g)).min(n)])
    }

    fn forget(&mut self, id: BlockId) {
        self.keys[id as usize] = None;
        self.fronts[id as usize].clear();
    }

    fn hit(&self, salt: &str, tokens: &[u32]) -> usize {
        let serves = |n: usize| {
            self.config.groups.iter().enumerate().all(|(g, group)| {
                needed(group, n).iter().all(|&b| self.block(g, salt, tokens, b, n) != 0)
            })
        };
        (0..tokens.len()).rev().find(|&n| n % self.alignment == 0 && serves(n)).unwrap()
    }

    /// The longest prefix that all full groups hold; 0 without a full group.
    fn full(&self, salt: &str, tokens: &[u32]) -> usize {
        let full: Vec<usize> = (0..self.config.groups.len())
            .filter(|&g| self.config.groups[g].kind == AttentionKind::Full.into())
            .collect();
        let serves = |n: usize| {
            full.iter().all(|&g| {
                let mut blocks = 0..n.div_ceil(self.size(g));
                blocks.all(|b| self.block(g, salt, tokens, b, n) != 0)
            })
        };
        match full.is_empty() {
            true => 0,
            false => {
                (0..tokens.len()).rev().find(|&n| n % self.alignment == 0 && serves(n)).unwrap()
            }
        }
    }

    fn table(&self, g: usize, salt: &str, tokens: &[u32], hit: usize) -> Vec<BlockId> {
        let mut row = vec![0; hit.div_ceil(self.size(g))];
        for b in needed(&self.config.groups[g], hit) {
            row[b] = self.block(g, salt, tokens, b, hit);
        }
        row
    }

    /// Takes the blocks, or says why not: blocks needed of the queue, of which there are too few.
    fn take(&mut self, n: usize) -> Vec<BlockId> {
        let taken = self.queue.concat()[..n].to_vec();
        self.queue.iter_mut().for_each(|queue| queue.retain(|id| !taken.contains(id)));
        for &id in &taken {
            self.users[id as usize] = 1;
            self.forget(id);
        }
        taken
    }

    /// Gives blocks of a table back, as indices, with the length at which the sequence ended if it did.
    fn release(&mut self, g: usize, sequence: &Sequence, blocks: &[usize], end: Option<usize>) {
        let mut unhashed = Vec::new();
        for &b in blocks.iter().filter(|&&b| sequence.tables[g][b] != 0) {
            let id = sequence.tables[g][b];
            self.users[id as usize] -= 1;
            if self.users[id as usize] > 0 {
                continue;
            }
            let in_vain = self.may_end_with(g, sequence, b) && !self.keeps(g, sequence, b, end);
            match self.keys[id as usize] {
                None => unhashed.push(id),
                Some(_) if in_vain => self.queue[1].push(id),
                Some(_) => self.queue[2].push(id),
            }
        }
        self.queue[0].splice(0..0, unhashed);
    }

    /// Whether the sequence may end so that its tail has the block.
    fn may_end_with(&self, g: usize, sequence: &Sequence, b: usize) -> bool {
        let replay = (sequence.prompt - 1) / self.alignment * self.alignment;
        self.config.retention.ends && (b + 1) * self.size(g) > replay
    }

    fn keeps(&self, g: usize, sequence: &Sequence, b: usize, end: Option<usize>) -> bool {
        let (group, retention) = (&self.config.groups[g], &self.config.retention);
        let size = self.size(g);
        let all = match group.kind {
            GroupKind::Attention(AttentionKind::Full) => true,
            GroupKind::Attention(AttentionKind::Chunked { .. }) => retention.dense_chunks,
            _ => false,
        };
        let slack = match (retention.slack, group.kind) {
            (Slack::Units(n), _) => (n as usize * self.alignment).div_ceil(size),
            (Slack::ByKind, GroupKind::Attention(AttentionKind::Sliding { window })) => {
                (window as usize / 2).max(512).div_ceil(size)
            }
            (Slack::ByKind, _) => 0,
        };
        let kept = |end: usize| {
            // The tail proper, sinks apart.
            let unsunk = super::GroupConfig { sink_tokens: 0, ..*group };
            let tail = needed(&unsunk, end);
            let Some(&first) = tail.first() else { return false };
            (first.saturating_sub(slack)..end.div_ceil(size)).contains(&b)
        };
        let every = match retention.interval {
            None => self.alignment,
            Some(k) => k as usize,
        };
        let align = |n: usize| n / self.alignment * self.alignment;
        let mut ends = vec![align(sequence.prompt - 1), align(sequence.junction)];
        ends.extend(end.filter(|_| retention.ends).map(align));
        if every > 0 {
            ends.extend((1..100).map(|k| k * every));
        }
        all || b * size < group.sink_tokens as usize || ends.into_iter().any(kept)
    }

    fn cache(&mut self, sequence: &mut Sequence) {
        let end = sequence.tokens.len() / self.alignment * self.alignment;
        for g in 0..self.config.groups.len() {
            let size = self.size(g);
            for b in sequence.considered[g]..end / size {
                let id = sequence.tables[g][b] as usize;
                let finds = self.may_end_with(g, sequence, b) || self.keeps(g, sequence, b, None);
                if id != 0 && finds {
                    let prefix = sequence.tokens[..(b + 1) * size].to_vec();
                    self.stamp += 1;
                    self.keys[id] = Some((self.stamp, (g, sequence.salt.clone(), prefix)));
                }
            }
            sequence.considered[g] = sequence.considered[g].max(end / size);
        }
    }

    /// `None`: refused for want of blocks.
    fn allocate(
        &mut self,
        seq: u64,
        salt: &str,
        prompt: &[u32],
        budget: usize,
        lookahead: usize,
    ) -> Option<(usize, Vec<Vec<BlockId>>)> {
        let hit = self.hit(salt, prompt);
        let full = self.full(salt, prompt);
        let now = prompt.len().min(hit + budget);
        let slots = (now + lookahead).min(self.config.max_model_len as usize);
        let mut sequence = Sequence {
            salt: salt.to_owned(),
            tokens: prompt[..now].to_vec(),
            prompt: prompt.len(),
            junction: if full > hit { full } else { 0 },
            computed: hit,
            settled: hit,
            ..Sequence::default()
        };
        let n = self.config.groups.len();
        sequence.tables = (0..n).map(|g| self.table(g, salt, prompt, hit)).collect();
        sequence.considered = (0..n).map(|g| hit / self.size(g)).collect();
        sequence.settled_blocks = sequence.considered.clone();
        let hits: Vec<BlockId> =
            sequence.tables.concat().into_iter().filter(|&id| id != 0).collect();
        let is_unused = |id: BlockId| self.users[id as usize] == 0;
        let unused = hits.iter().filter(|&&id| is_unused(id)).count();
        let fresh: Vec<usize> =
            (0..n).map(|g| slots.div_ceil(self.size(g)) - sequence.tables[g].len()).collect();
        // It goes on in copies of the blocks that the hit ends inside of or, where there is no room for them, in
        // those that nobody else uses.
        let inside = |g: usize| !hit.is_multiple_of(self.size(g));
        let sources: Vec<(usize, BlockId)> = (0..n)
            .filter(|&g| inside(g))
            .map(|g| (g, *sequence.tables[g].last().unwrap()))
            .collect();
        let (least, room) = (fresh.iter().sum::<usize>() + unused, self.queue.concat().len());
        let tight = least + sources.len() > room;
        let (over, copied): (Vec<_>, Vec<_>) =
            sources.into_iter().partition(|&(_, id)| tight && is_unused(id));
        if least + copied.len() > room {
            return None;
        }
        for id in hits {
            self.users[id as usize] += 1;
            self.queue.iter_mut().for_each(|queue| queue.retain(|&queued| queued != id));
        }
        over.into_iter().for_each(|(_, id)| self.forget(id));
        let mut new_blocks = Vec::new();
        for (g, fresh) in fresh.into_iter().enumerate() {
            let mut all = Vec::new();
            for &(_, source) in copied.iter().filter(|&&(of, _)| of == g) {
                all = self.take(1);
                *sequence.tables[g].last_mut().unwrap() = all[0];
                self.users[source as usize] -= 1;
                if self.users[source as usize] == 0 {
                    self.queue[2].push(source);
                }
            }
            let taken = self.take(fresh);
            sequence.tables[g].extend(&taken);
            all.extend(&taken);
            new_blocks.push(all);
        }
        self.cache(&mut sequence);
        self.sequences.insert(seq, sequence);
        Some((hit, new_blocks))
    }

    fn append(&mut self, seq: u64, tokens: &[u32]) -> Option<Vec<Vec<BlockId>>> {
        let mut sequence = self.sequences[&seq].clone();
        sequence.tokens.extend(tokens);
        let fresh: Vec<usize> = (0..self.config.groups.len())
            .map(|g| {
                let blocks = sequence.tokens.len().div_ceil(self.size(g));
                blocks.saturating_sub(sequence.tables[g].len())
            })
            .collect();
        if fresh.iter().sum::<usize>() > self.queue.concat().len() {
            return None;
        }
        let mut new_blocks = Vec::new();
        for (g, n) in fresh.into_iter().enumerate() {
            let taken = self.take(n);
            sequence.tables[g].extend(&taken);
            new_blocks.push(taken);
        }
        self.cache(&mut sequence);
        self.sequences.insert(seq, sequence);
        Some(new_blocks)
    }

    fn advance(&mut self, seq: u64, computed: usize, settled: usize) -> Vec<Vec<BlockId>> {
        let mut sequence = self.sequences[&seq].clone();
        (sequence.computed, sequence.settled) = (computed, settled);
        self.settle(&mut sequence, settled);
        let mut freed = Vec::new();
        for g in 0..self.config.groups.len() {
            let (group, size) = (self.config.groups[g], self.size(g));
            // Never a block that a query to come can see, always one that none can.
            let live = |b: usize| {
                (b * size..(b + 1) * size)
                    .any(|j| j >= settled || (settled..settled + 40).any(|i| sees(&group, i, j)))
                    || b * size < group.sink_tokens as usize
            };
            let table = &sequence.tables[g];
            let gone: Vec<usize> =
                (0..table.len()).rev().filter(|&b| table[b] != 0 && !live(b)).collect();
            self.release(g, &sequence, &gone, None);
            let table = &mut sequence.tables[g];
            freed.push(gone.iter().map(|&b| std::mem::take(&mut table[b])).collect());
        }
        self.sequences.insert(seq, sequence);
        freed
    }

    /// Blocks whose tokens are settled are findable by their fronts.
    fn settle(&mut self, sequence: &mut Sequence, settled: usize) {
        for g in 0..self.config.groups.len() {
            let end = settled / self.size(g);
            for b in sequence.settled_blocks[g]..end {
                let id = sequence.tables[g][b];
                if self.keys[id as usize].is_some() {
                    self.add_fronts(g, sequence, id, b, (b + 1) * self.size(g));
                }
            }
            sequence.settled_blocks[g] = sequence.settled_blocks[g].max(end);
        }
    }

    /// The fronts of a block that are shorter than the first `n` tokens.
    fn add_fronts(&mut self, g: usize, sequence: &Sequence, id: BlockId, b: usize, n: usize) {
        let group = &self.config.groups[g];
        if !self.config.retention.fronts || self.size(g) == self.alignment {
            return;
        }
        for front in fronts(group, unit(&self.config.groups), b).filter(|&front| front < n) {
            let prefix = &sequence.tokens[..front];
            if self.find(g, &sequence.salt, prefix) == 0 {
                self.fronts[id as usize].push((g, sequence.salt.clone(), prefix.to_vec()));
            }
        }
    }

    /// What a sequence that ends has in its unfinished last blocks.
    fn keep_unfinished(&mut self, sequence: &Sequence) {
        let end = sequence.tokens.len();
        for g in 0..self.config.groups.len() {
            let b = end / self.size(g);
            let mut ends = fronts(&self.config.groups[g], unit(&self.config.groups), b);
            let Some(last) = ends.by_ref().filter(|&n| n <= end).last() else { continue };
            let Some(&id) = sequence.tables[g].get(b) else { continue };
            let finds = self.may_end_with(g, sequence, b) || self.keeps(g, sequence, b, Some(end));
            let prefix = &sequence.tokens[..last];
            let known = self.find(g, &sequence.salt, prefix) != 0;
            if id == 0 || self.users[id as usize] > 1 || !finds || known {
                continue;
            }
            self.stamp += 1;
            let key = (g, sequence.salt.clone(), prefix.to_vec());
            self.keys[id as usize] = Some((self.stamp, key));
            self.add_fronts(g, sequence, id, b, last);
        }
    }

    fn free(&mut self, seq: u64) {
        let mut sequence = self.sequences.remove(&seq).unwrap();
        let end = sequence.tokens.len();
        self.settle(&mut sequence, end);
        if self.config.retention.fronts {
            self.keep_unfinished(&sequence);
        }
        self.give_back(sequence);
    }

    fn give_back(&mut self, sequence: Sequence) {
        for g in 0..sequence.tables.len() {
            let blocks: Vec<usize> = (0..sequence.tables[g].len()).rev().collect();
            self.release(g, &sequence, &blocks, Some(sequence.tokens.len()));
        }
    }

    fn abort(&mut self, seq: u64) -> Vec<u64> {
        let sequence = self.sequences[&seq].clone();
        let mut dependents = Vec::new();
        for (g, table) in sequence.tables.iter().enumerate() {
            for &id in &table[(sequence.settled / self.size(g)).min(table.len())..] {
                self.forget(id);
                let holds = |other: &Sequence| id != 0 && other.tables[g].contains(&id);
                dependents.extend(
                    self.sequences
                        .iter()
                        .filter(|(name, other)| **name != seq && holds(other))
                        .map(|(name, _)| *name),
                );
            }
        }
        let mut sequence = self.sequences.remove(&seq).unwrap();
        let computed = sequence.computed;
        self.settle(&mut sequence, computed);
        self.give_back(sequence);
        dependents.sort_unstable();
        dependents.dedup();
        dependents
    }

    fn check(&self, m: &Manager) -> Result<(), TestCaseError> {
        prop_assert_eq!(m.free_queue(), self.queue.concat());
        prop_assert_eq!(m.free_blocks(), self.queue.concat().len());
        let used: Vec<(BlockId, u32)> = (1..self.config.num_blocks)
            .map(|id| (id, self.users[id as usize]))
            .filter(|&(_, users)| users > 0)
            .collect();
        prop_assert_eq!(m.ref_counts(), used);
        for g in 0..self.config.groups.len() {
            let mut cached: Vec<u32> = self
                .keys
                .iter()
                .flatten()
                .filter(|(_, key)| key.0 == g)
                .map(|(_, key)| ((key.2.len() - 1) / self.size(g)) as u32)
                .collect();
            cached.sort_unstable();
            prop_assert_eq!(m.cached_indices(g), cached);
            for (seq, sequence) in &self.sequences {
                prop_assert_eq!(m.table(*seq, g).unwrap(), &sequence.tables[g][..]);
            }
        }
        Ok(())
    }
}

#[derive(Debug, Clone)]
enum Op {
    Allocate { seq: u64, prompt: Vec<u32>, salted: bool, budget: usize, lookahead: usize },
    Append { seq: u64, tokens: Vec<u32> },
    Advance { seq: u64, computed: usize, unsettled: usize },
    Free { seq: u64 },
    Abort { seq: u64 },
    Forget { seq: u64, group: usize, index: usize },
    Reset,
}

fn op() -> impl Strategy<Value = Op> {
    let seq = 0u64..5;
    let budget = prop_oneof![2 => Just(1000usize), 1 => 1usize..12];
    let lookahead = prop_oneof![3 => Just(0usize), 1 => 0usize..9];
    prop_oneof![
        4 => (seq.clone(), prompt(), prop::bool::weighted(0.2), budget, lookahead).prop_map(
            |(seq, prompt, salted, budget, lookahead)| Op::Allocate { seq, prompt, salted, budget, lookahead }
        ),
        3 => (seq.clone(), prompt()).prop_map(|(seq, mut tokens)| {
            tokens.truncate(9);
            Op::Append { seq, tokens }
        }),
        4 => (seq.clone(), 0usize..20, 0usize..4)
            .prop_map(|(seq, computed, unsettled)| Op::Advance { seq, computed, unsettled }),
        2 => seq.clone().prop_map(|seq| Op::Free { seq }),
        1 => seq.clone().prop_map(|seq| Op::Abort { seq }),
        1 => (seq, 0usize..3, 0usize..12)
            .prop_map(|(seq, group, index)| Op::Forget { seq, group, index }),
        1 => Just(Op::Reset),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 384, ..ProptestConfig::default() })]

    #[test]
    fn every_answer_follows_from_the_definitions(
        config in config(),
        ops in prop::collection::vec(op(), 1..60),
    ) {
        let mut m = Manager::new(config.clone()).unwrap();
        let mut oracle = Oracle::new(config.clone());
        for op in ops {
            match op {
                Op::Allocate { seq, prompt, salted, budget, lookahead } => {
                    let salt = if salted { "tenant" } else { "" };
                    let keys = ExtraKeys { salt, lora: "" };
                    let found = m.lookup(&prompt, keys);
                    prop_assert_eq!(found.tokens, oracle.hit(salt, &prompt));
                    for (g, row) in found.blocks.iter().enumerate() {
                        prop_assert_eq!(row, &oracle.table(g, salt, &prompt, found.tokens));
                    }
                    let given = m.allocate_prefill(seq, &prompt, budget, keys, lookahead);
                    if oracle.sequences.contains_key(&seq) {
                        let err = given.unwrap_err();
                        prop_assert!(matches!(err.kind(), ErrorKind::DuplicateSequence(_)));
                    } else if prompt.len() > config.max_model_len as usize {
                        let err = given.unwrap_err();
                        let too_long = matches!(err.kind(), ErrorKind::TooLong { .. });
                        prop_assert!(too_long);
                    } else {
                        match oracle.allocate(seq, salt, &prompt, budget, lookahead) {
                            Some((hit, new_blocks)) => {
                                let given = given.unwrap();
                                prop_assert_eq!(given.hit_tokens, hit);
                                prop_assert_eq!(given.device_hit_tokens, hit);
                                prop_assert_eq!(given.num_tokens, oracle.sequences[&seq].tokens.len());
                                prop_assert_eq!(given.new_blocks, new_blocks);
                            }
                            None => prop_assert!(given.is_err()),
                        }
                    }
                }
                Op::Append { seq, tokens } => {
                    let given = m.append(seq, &tokens);
                    match oracle.sequences.get(&seq) {
                        None => prop_assert!(given.is_err()),
                        Some(s) if s.tokens.len() + tokens.len() > config.max_model_len as usize => {
                            prop_assert!(given.is_err());
                        }
                        Some(_) => prop_assert_eq!(given.ok(), oracle.append(seq, &tokens)),
                    }
                }
                Op::Advance { seq, computed, unsettled } => {
                    let Some(s) = oracle.sequences.get(&seq) else {
                        prop_assert!(m.advance(seq, computed, 0).is_err());
                        continue;
                    };
                    let computed = s.computed + computed;
                    let settled = computed.saturating_sub(unsettled);
                    let given = m.advance(seq, computed, settled);
                    if computed > s.tokens.len() || settled < s.settled {
                        prop_assert!(given.is_err());
                    } else {
                        prop_assert_eq!(given.unwrap(), oracle.advance(seq, computed, settled));
                    }
                }
                Op::Free { seq } => match oracle.sequences.contains_key(&seq) {
                    true => {
                        m.free(seq).unwrap();
                        oracle.free(seq);
                    }
                    false => prop_assert!(m.free(seq).is_err()),
                },
                Op::Abort { seq } => match oracle.sequences.contains_key(&seq) {
                    true => prop_assert_eq!(m.abort(seq).unwrap(), oracle.abort(seq)),
                    false => prop_assert!(m.abort(seq).is_err()),
                },
                Op::Forget { seq, group, index } => {
                    let given = m.forget(seq, group, index);
                    match oracle.sequences.get(&seq) {
                        Some(s) if group < config.groups.len() => {
                            prop_assert!(given.is_ok());
                            let id = s.tables[group].get(index).copied().unwrap_or(0);
                            oracle.forget(id);
                        }
                        _ => prop_assert!(given.is_err()),
                    }
                }
                Op::Reset => {
                    let idle = oracle.queue.concat().len() == config.num_blocks as usize - 1;
                    prop_assert_eq!(m.reset_prefix_cache(), idle);
                    if idle {
                        (0..config.num_blocks).for_each(|id| oracle.forget(id));
                    }
                }
            }
            oracle.check(&m)?;
        }
    }
}
