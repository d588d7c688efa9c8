//! What there is around a manager: sequences with their tokens, what every block and slot of every tier really
//! holds, steps and transfers in flight, and a mirror of the indices that knows nothing but the events.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::ops::Range;

use hybridkv::manager::{
    BlockHash, BlockId, Event, EventKind, ExtraKeys, Hit, Manager, ManagerConfig, PinId, Place,
    Stats, Tier, Transfer, Usage, WritePolicy,
};
use hybridkv::spec::GroupKind;
use proptest::prelude::*;

use super::prefixes::{Node, Prefixes};
use super::{LONGEST_PROMPT, alignment, needed, unit};

pub type Check<T = ()> = Result<T, TestCaseError>;

/// KV of one token in one group, by the prefix that it ends, or the state after that prefix; 0 is garbage.
pub type Kv = u64;
/// What a block holds: of attention token by token, of states one in front.
pub type Content = [Kv; 4];

pub const GARBAGE: Content = [0; 4];

pub fn kv(group: usize, node: Node) -> Kv {
    (group as u64 + 1) << 32 | u64::from(node)
}

/// A tenant and an adapter; two of them spell the same.
pub const KEYS: [ExtraKeys<'static>; 3] = [
    ExtraKeys { salt: "", lora: "" },
    ExtraKeys { salt: "a", lora: "" },
    ExtraKeys { salt: "", lora: "a" },
];

/// The tenants among them.
pub const SALTS: [&str; 2] = ["", "a"];

/// A key that a step sees: block, offset and what should be there.
pub type Read = (BlockId, usize, Kv);

/// What a step does that waits on the device for loads.
#[derive(Clone)]
pub enum Access {
    Reads(Read),
    Writes(Read),
    /// The whole block.
    State(BlockId, Kv),
}

#[derive(Clone)]
pub struct Sequence {
    pub keys: ExtraKeys<'static>,
    pub tokens: Vec<u32>,
    pub path: Vec<Node>,
    /// Tokens of the whole prompt, of which the first part may have been given.
    pub prompt: usize,
    /// Tokens whose steps cannot fail any more, settled or not: another sequence's, or known to have ended.
    pub finished: usize,
    pub computed: usize,
    pub settled: usize,
    pub ready: bool,
    /// Its steps run behind its loads: what they have done so far, which happens once all of these have come.
    pub trial: Option<Vec<Access>>,
    /// A load failed: what it computes again is not findable at once.
    pub repaired: bool,
    /// Swapped out.
    pub swapped: bool,
    /// Tokens that it came back with: what of them was findable before may not be any more.
    pub resumed: usize,
    /// Its work is submitted behind that of those that found their blocks before it did.
    pub turn: u64,
    /// Steps in flight: tokens computed by their end, and what they read.
    pub steps: VecDeque<(usize, Vec<Read>)>,
}

impl Sequence {
    /// Whether steps of it may be submitted.
    pub fn runs(&self) -> bool {
        self.ready || self.trial.is_some()
    }
}

/// A transfer that has started, and what its source held then.
pub struct Flight {
    pub transfer: Transfer,
    pub source: Content,
}

/// A pinned prefix.
pub struct Pinned {
    pub tier: Tier,
    /// Blocks that it was given.
    pub count: usize,
    /// Those that have not been taken from it, by group and prefix; on the device all of them, by id.
    pub blocks: Vec<(usize, Node)>,
    pub ids: Vec<BlockId>,
}

/// What can be seen of a manager, counters of refusals apart.
#[derive(Debug, PartialEq)]
pub struct Snapshot {
    pub queue: Vec<BlockId>,
    pub users: Vec<(BlockId, u32)>,
    pub cached: Vec<Vec<u32>>,
    pub tables: Vec<Vec<BlockId>>,
    pub usage: Usage,
    pub stats: Stats,
    pub flying: usize,
}

/// Blocks by tier, group and prefix.
pub type Named = HashSet<(Tier, usize, Node)>;

pub struct World {
    pub m: Manager,
    pub config: ManagerConfig,
    pub alignment: usize,
    pub unit: usize,
    /// By group and length, blocks that a prefix needs.
    pub needed: Vec<Vec<Vec<usize>>>,
    pub prefixes: Prefixes,
    pub device: Vec<Content>,
    pub host: Vec<Content>,
    pub storage: Vec<Content>,
    pub sequences: BTreeMap<u64, Sequence>,
    pub flying: Vec<Flight>,
    /// Copies of every findable block, by tier.
    pub found: HashMap<Tier, HashMap<(usize, Node), usize>>,
    /// Names of blocks that preempted sequences keep for themselves, and those of them that are on the host.
    pub private: HashSet<BlockHash>,
    pub private_on_host: HashSet<(usize, BlockHash)>,
    /// Blocks in use of which the index was told to forget.
    pub forgotten: HashSet<BlockId>,
    pub pins: BTreeMap<PinId, Pinned>,
    /// Blocks that may become unfindable though they are pinned: of failed steps, of failed transfers.
    pub void: Named,
    /// By lower tier and salt: most blocks that it may have, and those it had when this was last checked.
    pub quotas: HashMap<(Tier, &'static str), (usize, usize)>,
    /// The name that is prefetched for.
    pub prefetched: Option<u64>,
    pub next: u64,
    pub turns: u64,
    pub now: u64,
}

impl World {
    pub fn new(config: ManagerConfig) -> Self {
        let slots = config.host.as_ref().map_or(0, |host| host.num_slots);
        let mut m = Manager::new(config.clone()).unwrap();
        m.record_events(true);
        // Without a limit, so that all blocks count for somebody.
        let lower = [Tier::Host, Tier::Storage].into_iter();
        let tenants = lower.flat_map(|tier| SALTS.map(|salt| (tier, salt)));
        for (tier, salt) in tenants.clone() {
            m.set_quota(tier, salt, None).unwrap();
        }
        let longest = LONGEST_PROMPT.max(config.max_model_len as usize);
        let alignment = alignment(&config.groups, config.retention.fronts);
        let lengths = 0..longest + 2 * alignment;
        let needed_by =
            |group| lengths.clone().map(|n| needed(group, n)).collect::<Vec<Vec<usize>>>();
        let tiers = [Tier::Device, Tier::Host, Tier::Storage];
        Self {
            m,
            alignment,
            unit: unit(&config.groups),
            needed: config.groups.iter().map(needed_by).collect(),
            prefixes: Prefixes::default(),
            device: vec![GARBAGE; config.num_blocks as usize],
            host: vec![GARBAGE; slots as usize],
            storage: Vec::new(),
            sequences: BTreeMap::new(),
            flying: Vec::new(),
            found: tiers.map(|tier| (tier, HashMap::new())).into(),
            private: HashSet::new(),
            private_on_host: HashSet::new(),
            forgotten: HashSet::new(),
            pins: BTreeMap::new(),
            void: HashSet::new(),
            quotas: tenants.map(|tenant| (tenant, (usize::MAX, 0))).collect(),
            prefetched: None,
            next: 0,
            turns: 0,
            now: 0,
            config,
        }
    }

    pub fn size(&self, g: usize) -> usize {
        self.config.groups[g].block_size as usize
    }

    pub fn groups(&self) -> Range<usize> {
        0..self.config.groups.len()
    }

    pub fn is_state(&self, g: usize) -> bool {
        self.config.groups[g].kind == GroupKind::State
    }

    pub fn has_states(&self) -> bool {
        self.groups().any(|g| self.is_state(g))
    }

    /// Whether blocks are stored before they are evicted.
    pub fn writes_back(&self) -> bool {
        self.m.config().host.as_ref().is_some_and(|host| host.write == WritePolicy::Back)
    }

    /// None of one that is swapped out.
    pub fn table(&self, seq: u64, g: usize) -> Vec<BlockId> {
        self.m.table(seq, g).unwrap_or_default()
    }

    pub fn turn(&mut self) -> u64 {
        self.turns += 1;
        self.turns
    }

    pub fn place(&mut self, place: Place) -> &mut Content {
        match place {
            Place::Device(block) => &mut self.device[block as usize],
            Place::Host(slot) => &mut self.host[slot as usize],
            Place::Storage(slot) => &mut self.storage[slot as usize],
        }
    }

    /// The names of a prompt's prefixes, whose hashes are checked on the way.
    pub fn path(&mut self, keys: ExtraKeys<'_>, tokens: &[u32]) -> Check<Vec<Node>> {
        let path = self.prefixes.path(keys, tokens);
        self.prefixes.learn(&self.m, self.unit, keys, tokens, &path)?;
        Ok(path)
    }

    pub fn snapshot(&self) -> Snapshot {
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

    /// Tokens that a block which ends with this prefix holds.
    pub fn filled(&self, group: usize, node: Node) -> usize {
        (self.prefixes.len(node) - 1) % self.size(group) + 1
    }

    /// The prefix that what the first `n` tokens of a path have of block `b` ends.
    pub fn end_of(&self, g: usize, path: &[Node], b: usize, n: usize) -> Node {
        path[((b + 1) * self.size(g)).min(n) - 1]
    }

    /// What a block that ends with this prefix holds.
    pub fn content(&self, group: usize, mut node: Node) -> Content {
        let mut content = GARBAGE;
        if self.is_state(group) {
            content[0] = kv(group, node);
            return content;
        }
        for t in (0..self.filled(group, node)).rev() {
            content[t] = kv(group, node);
            node = self.prefixes.parent(node);
        }
        content
    }

    pub fn finds(&self, tiers: &[Tier], g: usize, node: Node) -> bool {
        tiers.iter().any(|tier| self.found[tier].contains_key(&(g, node)))
    }

    /// Replays the events into the mirror; gives how many blocks the device lost. What may leave a lower tier
    /// without ever having been stored there was on its way.
    pub fn replay_events(&mut self, writing: &Named) -> Check<usize> {
        let mut lost = 0;
        for Event { kind, group, tier, indices, hashes } in self.m.events() {
            let g = group as usize;
            if kind == EventKind::Cleared {
                self.found.get_mut(&tier).unwrap().retain(|&(of, _), _| of != g);
                self.private_on_host.retain(|&(of, _)| tier != Tier::Host || of != g);
                self.empty_pins(tier);
            }
            prop_assert_eq!(hashes.len(), indices.len());
            for (hash, &index) in hashes.iter().zip(&indices) {
                if self.private.contains(hash) {
                    prop_assert_eq!(tier, Tier::Host, "a sequence's own block");
                    match kind {
                        EventKind::Stored => self.private_on_host.insert((g, *hash)),
                        _ => self.private_on_host.remove(&(g, *hash)),
                    };
                    continue;
                }
                let Some(node) = self.prefixes.named(hash) else {
                    return Err(TestCaseError::fail("an event of a hash that nothing has"));
                };
                let inside = (self.prefixes.len(node) - 1) / self.size(g);
                prop_assert_eq!(inside, index as usize, "the index of an event");
                let mirror = self.found.get_mut(&tier).unwrap();
                let copies = mirror.entry((g, node)).or_default();
                if kind == EventKind::Stored {
                    *copies += 1;
                    prop_assert!(tier == Tier::Device || *copies == 1, "stored twice");
                    continue;
                }
                lost += usize::from(tier == Tier::Device);
                let last = *copies <= 1;
                match copies {
                    0 => prop_assert!(writing.contains(&(tier, g, node)), "removed and not there"),
                    _ => *copies -= 1,
                }
                if *copies == 0 {
                    mirror.remove(&(g, node));
                }
                self.unfindable(tier, g, node, last)?;
            }
        }
        self.void.clear();
        Ok(lost)
    }

    /// A copy of a block leaves the index, maybe the `last` one. The one that a pin holds does for no other reason
    /// than that it is void.
    fn unfindable(&mut self, tier: Tier, g: usize, node: Node, last: bool) -> Check {
        let is_void = self.void.contains(&(tier, g, node));
        for pin in self.pins.values_mut().filter(|pin| pin.tier == tier) {
            let held = pin.blocks.iter().position(|&block| block == (g, node));
            if let Some(at) = held.filter(|_| is_void || last) {
                prop_assert!(is_void, "a pinned block has left");
                pin.blocks.swap_remove(at);
            }
        }
        Ok(())
    }

    /// Whatever begins like a sequence and goes on beyond its first `tokens` may become unfindable.
    pub fn is_void(&mut self, seq: u64, tokens: usize) {
        let Self { sequences, pins, prefixes, void, .. } = self;
        let Some(&first) = sequences[&seq].path.get(tokens) else { return };
        for &(g, node) in pins.values().flat_map(|pin| &pin.blocks) {
            if prefixes.begins_with(node, first) {
                void.extend([(Tier::Device, g, node), (Tier::Host, g, node)]);
            }
        }
    }

    /// The longest hit that the mirror can serve: every length, every block with a token that is seen.
    pub fn longest(&self, path: &[Node], tiers: &[Tier]) -> usize {
        let whole = |n: &usize| {
            self.groups().all(|g| {
                let mut needed = self.needed[g][*n].iter();
                needed.all(|&b| self.finds(tiers, g, self.end_of(g, path, b, *n)))
            })
        };
        let lengths = (0..path.len()).rev().filter(|n| n % self.alignment == 0);
        lengths.into_iter().find(whole).unwrap_or(0)
    }

    /// Whether a block that is findable as the end of this prefix is what it should be, as far as it has been
    /// computed: another sequence may yet be about to.
    fn is_right(&self, g: usize, b: usize, id: BlockId, path: &[Node], n: usize) -> bool {
        let size = self.size(g);
        let found = self.device[id as usize];
        let pending = |tokens: usize| {
            self.sequences.iter().any(|(&seq, sequence)| {
                sequence.computed < tokens && self.table(seq, g).get(b) == Some(&id)
            })
        };
        if self.is_state(g) {
            return found[0] == kv(g, path[(b + 1) * size - 1]) || pending((b + 1) * size);
        }
        // Of a block that is copied all is there that is asked for.
        let whole = (b + 1) * size <= n;
        let right =
            |t: usize| found[t] == kv(g, path[b * size + t]) || whole && pending(b * size + t + 1);
        (0..size.min(n - b * size)).all(right)
    }

    pub fn lookup(&mut self, tokens: &[u32], keys: ExtraKeys<'_>) -> Check<Hit> {
        use Tier::{Device, Host, Storage};
        let path = self.path(keys, tokens)?;
        let hit = self.m.lookup(tokens, keys);
        prop_assert_eq!(hit.device_tokens, self.longest(&path, &[Device]), "on the device");
        prop_assert_eq!(hit.host_tokens, self.longest(&path, &[Device, Host]), "above storage");
        let all = self.longest(&path, &[Device, Host, Storage]);
        prop_assert_eq!(hit.tokens, all, "over all tiers");
        for g in self.groups() {
            let size = self.size(g);
            prop_assert_eq!(hit.blocks[g].len(), hit.tokens.div_ceil(size));
            for (b, &id) in hit.blocks[g].iter().enumerate() {
                let end = self.end_of(g, &path, b, hit.tokens);
                let is_needed = self.needed[g][hit.tokens].contains(&b);
                let wanted = is_needed && self.finds(&[Device], g, end);
                prop_assert_eq!(id != 0, wanted, "block {} of group {}", b, g);
                prop_assert!(
                    !wanted || self.is_right(g, b, id, &path, hit.tokens),
                    "a hit on garbage"
                );
            }
        }
        Ok(hit)
    }
}
