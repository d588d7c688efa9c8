//! Histories of a world around the manager, over random groups, policies, tiers and faults. After each operation:
//!
//! - every block is free, in use or pinned, and counted so; nobody's block is free; equal blocks alone are shared;
//! - tables hold exactly what a query to come can see (settled tokens counted), token by token;
//! - the mirror is the index: what was announced is what is findable, tier by tier;
//! - a lookup hits exactly what the mirror can serve, every length tried, every visible token asked for;
//! - what a retained prefix needs is findable while its blocks are in a table, and leaves the device only
//!   for a block that was taken;
//! - a refusal was due, and changed nothing;
//! - every key that a step sees, and every state that one begins with, is the right one, when the step starts and
//!   when it ends;
//! - what a lower tier announces is what it holds;
//! - steps that run behind their loads have done nothing before these have come: no lookup finds their blocks, no
//!   tier is offered them;
//! - what is pinned stays findable in its tier, unless the step that wrote it fails; nobody is above his quota, and
//!   every block of a lower tier counts for one tenant.

use hybridkv::manager::{
    BreakerConfig, Eviction, GroupConfig, HostConfig, ManagerConfig, Outcome, Tier, WritePolicy,
};
use hybridkv::spec::GroupKind;
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

use super::world::{Check, KEYS, World};
use super::{LONGEST_LOOKAHEAD, groups, prompt, retention};

impl World {
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
            Op::Preempt { at } => {
                if let Some(seq) = seq(at) {
                    self.preempt(seq)?;
                }
            }
            Op::Resume { at } => {
                if let Some(seq) = seq(at) {
                    self.resume(seq)?;
                }
            }
            Op::Overlap { at } => {
                let waiting: Vec<u64> = self
                    .sequences
                    .iter()
                    .filter_map(|(&seq, sequence)| (!sequence.ready).then_some(seq))
                    .collect();
                let waiting = waiting.get(at % waiting.len().max(1)).copied();
                if let Some(seq) = waiting.or(seq(at)) {
                    self.overlap(seq)?;
                }
            }
            Op::Pin { tier, prompt, keys } => self.pin(tier, &prompt, keys)?,
            Op::Unpin { at } => {
                if let Some(&id) = self.pins.keys().nth(at % self.pins.len().max(1)) {
                    self.unpin(id)?;
                }
            }
            Op::Limit { tier, salt, blocks } => self.limit(tier, salt, blocks)?,
            Op::Prioritize { at, priority } => {
                if let Some(seq) = seq(at) {
                    self.prioritize(seq, priority)?;
                }
            }
            Op::Prefetch { prompt, keys } => self.prefetch(&prompt, keys)?,
            Op::Tick => self.tick()?,
            Op::DetachStorage => self.detach_storage()?,
            Op::DetachHost => self.detach_host()?,
            Op::Reset => self.reset()?,
        }
        Ok(())
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
    Preempt {
        at: usize,
    },
    Resume {
        at: usize,
    },
    /// Of one that waits for loads, if there is one.
    Overlap {
        at: usize,
    },
    Pin {
        tier: Tier,
        prompt: Vec<u32>,
        keys: usize,
    },
    Unpin {
        at: usize,
    },
    Limit {
        tier: Tier,
        salt: usize,
        blocks: Option<u64>,
    },
    Prioritize {
        at: usize,
        priority: u8,
    },
    Prefetch {
        prompt: Vec<u32>,
        keys: usize,
    },
    Tick,
    DetachStorage,
    DetachHost,
    Reset,
}

fn op() -> impl Strategy<Value = Op> {
    let keys = || prop_oneof![6 => Just(0usize), 1 => Just(1), 1 => Just(2)];
    let budget = prop_oneof![2 => Just(usize::MAX), 1 => 1usize..12];
    let lookahead = prop_oneof![3 => Just(0usize), 1 => 0..=LONGEST_LOOKAHEAD];
    let failures = || prop_oneof![3 => Just(0u8), 1 => any::<u8>()];
    let most = prop_oneof![2 => Just(usize::MAX), 1 => 1usize..9];
    let at = || 0usize..8;
    let tier = prop::sample::select(vec![Tier::Device, Tier::Host, Tier::Storage]);
    let lower = prop::sample::select(vec![Tier::Host, Tier::Storage]);
    let blocks = prop::option::weighted(0.8, 1u64..20);
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
        3 => at().prop_map(|at| Op::Preempt { at }),
        5 => at().prop_map(|at| Op::Resume { at }),
        6 => at().prop_map(|at| Op::Overlap { at }),
        3 => (tier, prompt(), keys()).prop_map(|(tier, prompt, keys)| Op::Pin { tier, prompt, keys }),
        3 => at().prop_map(|at| Op::Unpin { at }),
        1 => (lower, 0usize..2, blocks)
            .prop_map(|(tier, salt, blocks)| Op::Limit { tier, salt, blocks }),
        1 => (at(), 0u8..4).prop_map(|(at, priority)| Op::Prioritize { at, priority }),
        4 => (prompt(), keys()).prop_map(|(prompt, keys)| Op::Prefetch { prompt, keys }),
        2 => Just(Op::Tick),
        1 => Just(Op::DetachStorage),
        1 => Just(Op::DetachHost),
        1 => Just(Op::Reset),
    ]
}

fn host() -> impl Strategy<Value = HostConfig> {
    let write = prop_oneof![
        2 => Just(WritePolicy::Through),
        1 => Just(WritePolicy::Selective { uses: 2 }),
        2 => Just(WritePolicy::Back),
    ];
    (3u32..60, write, prop_oneof![Just(4096u32), 1u32..6], eviction()).prop_map(
        |(num_slots, write, max_offloads, eviction)| HostConfig {
            write,
            max_offloads,
            eviction,
            // Failures are many here; the breaker has tests of its own.
            breaker: BreakerConfig { failures: u32::MAX, retry_ns: 1 },
            ..HostConfig::new(num_slots)
        },
    )
}

/// Groups of which one in three mixes has recurrent states.
fn mixes() -> impl Strategy<Value = Vec<GroupConfig>> {
    let state = prop::option::weighted(0.35, 2u32..5);
    (groups(), state).prop_map(|(mut groups, state)| {
        groups.extend(state.map(|block_size| GroupConfig::new(GroupKind::State, block_size)));
        groups
    })
}

fn eviction() -> impl Strategy<Value = Eviction> {
    prop::sample::select(Eviction::ALL)
}

/// A pool that holds one to three of the longest sequences.
fn config(host: impl Strategy<Value = Option<HostConfig>>) -> impl Strategy<Value = ManagerConfig> {
    (mixes(), 16u32..56, 0u32..40, eviction(), host).prop_flat_map(
        |(groups, max_model_len, extra, eviction, host)| {
            let longest: u32 = groups.iter().map(|g| max_model_len.div_ceil(g.block_size)).sum();
            retention(&groups).prop_map(move |retention| ManagerConfig {
                groups: groups.clone(),
                num_blocks: 1 + longest + extra,
                prefix_caching: true,
                retention,
                eviction,
                max_model_len,
                in_flight_tokens: 1 << 20,
                host: host.clone(),
                identity: [9; 32],
            })
        },
    )
}

fn run(config: ManagerConfig, storage: Option<(u32, Eviction)>, ops: Vec<Op>) -> Check {
    let mut world = World::new(config);
    for op in ops {
        // Tiers that were detached come back once they are drained.
        world.attach(storage);
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
        run(config, None, ops)?;
    }

    #[test]
    fn half_a_million_operations_with_a_host_tier(
        config in config(host().prop_map(Some)),
        ops in history(),
    ) {
        run(config, None, ops)?;
    }

    #[test]
    fn half_a_million_operations_with_host_and_storage(
        config in config(host().prop_map(Some)),
        storage in (1u32..120, eviction()),
        ops in history(),
    ) {
        run(config, Some(storage), ops)?;
    }
}
