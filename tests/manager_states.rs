//! Groups of recurrent states beside attention: random histories over blocks with contents. A state is the
//! tokens it stands for, so that every state that a step begins with can be checked.

use std::collections::BTreeMap;

use hybridkv::ErrorKind;
use hybridkv::manager::{
    Completion, Eviction, ExtraKeys, GroupConfig, HostConfig, Manager, ManagerConfig, Outcome,
    Place, Retention, Slack, Transfer,
};
use hybridkv::spec::{AttentionKind, GroupKind};
use proptest::prelude::*;

const KEYS: ExtraKeys<'static> = ExtraKeys { salt: "", lora: "" };

fn config(retention: Retention, sizes: [u32; 2], num_blocks: u32) -> ManagerConfig {
    ManagerConfig {
        groups: vec![
            GroupConfig::new(AttentionKind::Full, sizes[0]),
            GroupConfig::new(GroupKind::State, sizes[1]),
        ],
        num_blocks,
        prefix_caching: true,
        retention,
        eviction: Eviction::Lru,
        max_model_len: 64,
        in_flight_tokens: 64,
        host: Some(HostConfig::new(40)),
        identity: [1; 32],
    }
}

fn sparse() -> Retention {
    Retention { interval: Some(0), dense_chunks: false, ..Retention::dense() }
}

fn held(m: &Manager, seq: u64) -> Vec<usize> {
    let table = m.table(seq, 1).unwrap();
    (0..table.len()).filter(|&b| table[b] != 0).collect()
}

#[test]
fn a_sequence_has_one_slot_and_a_checkpoint_where_a_prompt_can_come_again() {
    let mut m = Manager::new(config(sparse(), [4, 4], 60)).unwrap();
    m.allocate(1, &[7; 18], KEYS, 0).unwrap();
    // The replay boundary of 18 tokens is 16: block 3; the slot is block 4.
    assert_eq!(held(&m, 1), [3, 4]);
    let table = m.table(1, 1).unwrap().to_vec();
    let step = m.state_step(1, 1, 0, 18).unwrap();
    assert_eq!((step.source, step.writes), (0, vec![(16, table[3]), (18, table[4])]));
    m.advance(1, 18, 18).unwrap();
    assert_eq!(held(&m, 1), [4], "what is settled is gone but for the slot");
    // The slot goes along.
    for n in 19..40 {
        m.append(1, &[8]).unwrap();
        let step = m.state_step(1, 1, n - 1, n).unwrap();
        assert_eq!((step.source, step.writes), (table[4], vec![(n, table[4])]));
        m.advance(1, n, n).unwrap();
        assert_eq!(held(&m, 1), [(n - 1) / 4]);
    }
    // A hit ends at the checkpoint, which is read and never written.
    let hit = m.allocate(2, &[7; 18], KEYS, 0).unwrap();
    assert_eq!(hit.hit_tokens, 16);
    let step = m.state_step(2, 1, 16, 18).unwrap();
    assert_eq!(step.source, table[3]);
    assert_ne!(step.writes[0].1, table[3]);
    assert_eq!(m.lookup(&[[7; 18], [8; 18]].concat(), KEYS).tokens, 16, "no state beyond it");
}

#[test]
fn forks_copy_the_state_and_drafts_go_on_a_fork() {
    let mut m = Manager::new(config(sparse(), [4, 4], 60)).unwrap();
    m.allocate(1, &[7; 6], KEYS, 0).unwrap();
    let err = m.fork(1, 2).unwrap_err();
    assert!(matches!(err.kind(), ErrorKind::InvalidArgument(_)), "{err}");
    m.advance(1, 6, 6).unwrap();
    m.fork(1, 2).unwrap();
    let slot = *m.table(1, 1).unwrap().last().unwrap();
    m.append(2, &[8; 5]).unwrap();
    let state = std::iter::from_fn(|| m.next_copy()).find(|copy| copy.group == 1).unwrap();
    let step = m.state_step(2, 1, 6, 11).unwrap();
    assert_eq!((state.from, state.to), (slot, step.source));
    m.advance(2, 11, 6).unwrap();
    // The state of computed tokens cannot be taken back, but the fork can go.
    for cut in [Manager::trim, Manager::rollback] {
        let err = cut(&mut m, 2, 9).unwrap_err();
        assert!(matches!(err.kind(), ErrorKind::OutOfWindow { group: 1, .. }), "{err}");
    }
    m.append(2, &[9; 20]).unwrap();
    m.rollback(2, 11).unwrap();
    assert_eq!(m.state_step(2, 1, 11, 12).unwrap_err().op(), "state step");
    m.abort(2).unwrap();
    m.append(1, &[9]).unwrap();
    assert_eq!(m.state_step(1, 1, 6, 7).unwrap().source, slot);
    assert!(m.state_step(1, 0, 6, 7).is_err(), "an attention group");
}

#[test]
fn states_have_no_sinks() {
    let mut config = config(sparse(), [4, 4], 60);
    config.groups[1].sink_tokens = 4;
    let err = Manager::new(config).err().unwrap();
    assert!(err.to_string().contains("sink"), "{err}");
}

type State = Option<Vec<u32>>;

struct Sequence {
    tokens: Vec<u32>,
    computed: usize,
    settled: usize,
    ready: bool,
}

struct World {
    m: Manager,
    device: Vec<State>,
    host: Vec<State>,
    flying: Vec<Transfer>,
    sequences: BTreeMap<u64, Sequence>,
    next: u64,
}

impl World {
    fn start(&mut self) {
        while let Some(copy) = self.m.next_copy() {
            self.device[copy.to as usize] = self.device[copy.from as usize].clone();
        }
        while let Some(transfer) = self.m.next_transfer() {
            self.flying.push(transfer);
        }
    }

    fn complete(&mut self, fails: bool) {
        self.start();
        for transfer in std::mem::take(&mut self.flying) {
            let state = match transfer.path.from() {
                _ if fails => None,
                Place::Device(block) => self.device[block as usize].clone(),
                Place::Host(slot) | Place::Storage(slot) => self.host[slot as usize].clone(),
            };
            match transfer.path.to() {
                Place::Device(block) => self.device[block as usize] = state,
                Place::Host(slot) | Place::Storage(slot) => self.host[slot as usize] = state,
            }
            let outcome = if fails { Outcome::Failed } else { Outcome::Succeeded };
            match self.m.complete(transfer.id, outcome).unwrap() {
                Completion::Ready { seq, valid_tokens } => {
                    let sequence = self.sequences.get_mut(&seq).unwrap();
                    (sequence.computed, sequence.settled) = (valid_tokens, valid_tokens);
                    sequence.ready = true;
                }
                Completion::Dropped { seq } | Completion::Void { seq } => {
                    drop(self.sequences.remove(&seq))
                }
                _ => {}
            }
        }
    }

    fn allocate(&mut self, prompt: &[u32], budget: usize) {
        let Ok(given) = self.m.allocate_prefill(self.next, prompt, budget, KEYS, 0) else { return };
        let sequence = Sequence {
            tokens: prompt[..given.num_tokens].to_vec(),
            computed: given.hit_tokens,
            settled: given.hit_tokens,
            ready: given.loads.is_empty(),
        };
        self.sequences.insert(self.next, sequence);
        self.next += 1;
    }

    /// Computes the sequences in order, up to the first that has more than `most` tokens to compute.
    fn step(&mut self, most: usize, settles: bool) -> Result<(), TestCaseError> {
        self.start();
        for (&seq, sequence) in &mut self.sequences {
            let (start, len) = (sequence.computed, sequence.tokens.len());
            if !sequence.ready || start == len {
                continue;
            }
            let end = len.min(start + most);
            let step = self.m.state_step(seq, 1, start, end).unwrap();
            if start == 0 {
                prop_assert_eq!(step.source, 0);
            } else {
                let found = self.device[step.source as usize].as_deref();
                prop_assert_eq!(found, Some(&sequence.tokens[..start]), "the state it begins with");
            }
            prop_assert_eq!(step.writes.last().unwrap().0, end);
            for (tokens, block) in step.writes {
                self.device[block as usize] = Some(sequence.tokens[..tokens].to_vec());
            }
            sequence.computed = end;
            sequence.settled = if settles { end } else { sequence.settled };
            let settled = sequence.settled;
            self.m.advance(seq, end, settled).unwrap();
            // Whoever hit its tokens comes behind it.
            if end < len {
                break;
            }
        }
        Ok(())
    }
}

#[derive(Debug, Clone)]
enum Op {
    Allocate { prompt: Vec<u32>, budget: usize },
    Append { at: usize, tokens: Vec<u32> },
    Step { most: usize, settles: bool },
    Complete { fails: bool },
    Fork { at: usize },
    Cut { at: usize, part: usize, rollback: bool },
    Free { at: usize },
}

fn op() -> impl Strategy<Value = Op> {
    let prompt = (0u32..2, 1usize..30, 0u32..2, 0usize..20)
        .prop_map(|(a, n, b, k)| [vec![a; n], vec![b; k]].concat());
    let tokens = prop::collection::vec(0u32..2, 1..9);
    prop_oneof![
        4 => (prompt, prop_oneof![Just(99usize), 1usize..20])
            .prop_map(|(prompt, budget)| Op::Allocate { prompt, budget }),
        4 => (0usize..4, tokens).prop_map(|(at, tokens)| Op::Append { at, tokens }),
        8 => (prop_oneof![Just(99usize), 1usize..12], any::<bool>())
            .prop_map(|(most, settles)| Op::Step { most, settles }),
        4 => prop::bool::weighted(0.2).prop_map(|fails| Op::Complete { fails }),
        2 => (0usize..4).prop_map(|at| Op::Fork { at }),
        2 => (0usize..4, 0usize..9, any::<bool>())
            .prop_map(|(at, part, rollback)| Op::Cut { at, part, rollback }),
        3 => (0usize..4).prop_map(|at| Op::Free { at }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn every_step_begins_with_its_own_state(
        interval in prop_oneof![Just(None), Just(Some(0u32)), Just(Some(8))],
        slack in 0u32..2,
        sizes in prop_oneof![Just([4, 4]), Just([2, 4]), Just([4, 2]), Just([4, 8])],
        num_blocks in 45u32..90,
        ops in prop::collection::vec(op(), 1..80),
    ) {
        let retention = Retention { interval, slack: Slack::Units(slack), dense_chunks: false, ends: false };
        let Ok(m) = Manager::new(config(retention, sizes, num_blocks)) else { return Ok(()) };
        let mut world = World {
            m,
            device: vec![None; num_blocks as usize],
            host: vec![None; 40],
            flying: Vec::new(),
            sequences: BTreeMap::new(),
            next: 0,
        };
        for op in ops {
            let seq = |at: usize| {
                let n = world.sequences.len();
                (n > 0).then(|| *world.sequences.keys().nth(at % n).unwrap())
            };
            match op {
                Op::Allocate { prompt, budget } => world.allocate(&prompt, budget),
                Op::Append { at, tokens } => {
                    if let Some(seq) = seq(at)
                        && world.m.append(seq, &tokens).is_ok()
                    {
                        world.sequences.get_mut(&seq).unwrap().tokens.extend(tokens);
                    }
                }
                Op::Step { most, settles } => world.step(most, settles)?,
                Op::Complete { fails } => world.complete(fails),
                Op::Fork { at } => {
                    if let Some(seq) = seq(at)
                        && let Ok(shared) = world.m.fork(seq, world.next)
                    {
                        let tokens = world.sequences[&seq].tokens[..shared].to_vec();
                        let settled = world.sequences[&seq].settled;
                        let child = Sequence { tokens, computed: shared, settled, ready: true };
                        world.sequences.insert(world.next, child);
                        world.next += 1;
                    }
                }
                Op::Cut { at, part, rollback } => {
                    if let Some(seq) = seq(at) {
                        let sequence = world.sequences.get_mut(&seq).unwrap();
                        let n = sequence.tokens.len() * part / 8;
                        let cut = if rollback { world.m.rollback(seq, n) } else { world.m.trim(seq, n) };
                        if let Ok(cut) = cut {
                            sequence.tokens.truncate(n);
                            sequence.computed = sequence.computed.min(n);
                            sequence.settled = sequence.settled.min(n);
                            for seq in cut.dependents {
                                world.m.abort(seq).unwrap();
                                world.sequences.remove(&seq);
                            }
                        }
                    }
                }
                Op::Free { at } => {
                    if let Some(seq) = seq(at) {
                        let mut gone = vec![seq];
                        while let Some(seq) = gone.pop() {
                            if world.sequences.remove(&seq).is_some() {
                                gone.extend(world.m.abort(seq).unwrap());
                            }
                        }
                    }
                }
            }
            // One bound of sizing and admission.
            for &seq in world.sequences.keys() {
                let tokens = world.sequences[&seq].tokens.len();
                let blocks: usize = (0..2)
                    .map(|g| world.m.table(seq, g).unwrap().iter().filter(|&&id| id != 0).count())
                    .sum();
                prop_assert!(blocks <= world.m.max_blocks(tokens));
            }
        }
    }
}
