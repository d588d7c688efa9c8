//! The language-neutral cases that no operation of `hybridkv replay` reaches (tests/fixtures/semantics/cases.json;
//! tests/replay_ops.rs runs the others), each run against the part of the crate that it is about.

use serde_json::Value;

use super::hash::BlockHash;
use super::tiers::slots::{Reserved, SlotTier, Source};
use super::*;
use crate::spec::AttentionKind;

const CASES: &str = include_str!("../../tests/fixtures/semantics/cases.json");

fn case(id: &str) -> Value {
    let all: Value = serde_json::from_str(CASES).unwrap();
    let cases = all["cases"].as_array().unwrap();
    cases.iter().find(|case| case["id"] == id).unwrap_or_else(|| panic!("no case {id}")).clone()
}

fn numbers<T: TryFrom<u64>>(value: &Value) -> Vec<T>
where
    T::Error: std::fmt::Debug,
{
    let array = value.as_array().unwrap();
    array.iter().map(|v| T::try_from(v.as_u64().unwrap()).unwrap()).collect()
}

fn number(value: &Value) -> usize {
    value.as_u64().unwrap() as usize
}

fn group(kind: AttentionKind, block_size: u32) -> GroupConfig {
    GroupConfig::new(kind, block_size)
}

/// The settings of the peers the cases come from: dense retention, no slack, no host tier.
fn config(groups: Vec<GroupConfig>, num_blocks: usize, max_model_len: u32) -> ManagerConfig {
    ManagerConfig {
        groups,
        num_blocks: num_blocks as u32,
        prefix_caching: true,
        retention: Retention::dense(),
        eviction: Eviction::Lru,
        max_model_len,
        in_flight_tokens: 0,
        host: None,
        identity: [7; 32],
    }
}

const KEYS: ExtraKeys<'static> = ExtraKeys { salt: "", lora: "" };

fn hash(name: u32) -> BlockHash {
    let mut tokens = HashedTokens::new(&[0; 32], 1, KEYS);
    tokens.push(&[name]);
    tokens.hashes()[0]
}

fn sliding(window: usize) -> AttentionKind {
    AttentionKind::Sliding { window: window as u32 }
}

#[test]
fn chunk_007_admission_cap() {
    let case = case("chunk-007");
    let setup = &case["setup"];
    let kind = AttentionKind::Chunked { chunk: number(&setup["chunk"]) as u32 };
    let group = group(kind, number(&setup["block_size"]) as u32);
    let caps = [1024, 2048].map(|n| group.max_blocks(number(&setup["max_model_len"]), n));
    assert_eq!(caps[..], numbers::<usize>(&case["expected"]["caps"]));
}

#[test]
fn alloc_001_one_bound_for_sizing_and_admission() {
    let case = case("alloc-001");
    let (setup, expected) = (&case["setup"], &case["expected"]);
    let groups = vec![group(AttentionKind::Full, 16), group(sliding(64), 16)];
    let num_blocks = number(&setup["num_blocks"]);
    let config = ManagerConfig {
        in_flight_tokens: number(&setup["max_in_flight_tokens"]) as u32,
        ..config(groups, num_blocks, number(&setup["max_model_len"]) as u32)
    };
    let mut smaller = config.clone();
    smaller.num_blocks = number(&expected["startup_minimum"]) as u32 - 1;
    assert!(Manager::new(smaller).is_err());
    let prompt: Vec<u32> = (0..number(&setup["prompt_tokens"]) as u32).collect();
    let needed: Vec<usize> =
        config.groups.iter().map(|g| g.max_blocks(prompt.len(), 128)).collect();
    assert_eq!(needed[0], number(&expected["blocks_needed"]["full"]));
    assert_eq!(needed[1], number(&expected["blocks_needed"]["sliding"]));
    let mut m = Manager::new(config).unwrap();
    assert!(m.max_blocks(prompt.len()) <= m.free_blocks());
    let first = m.allocate_prefill(0, &prompt, 16, KEYS, 0).unwrap();
    assert_eq!((first.num_tokens, first.new_blocks.concat().len()), (16, 2));
}

/// The host tier driven by the keys of a case, one block each, in one group.
struct Host {
    tier: SlotTier,
    events: Events,
}

impl Host {
    fn new(slots: &Value) -> Self {
        let mut events = Events::default();
        events.enabled = true;
        Self {
            tier: SlotTier::new(
                Tier::Host,
                number(slots) as u32,
                1,
                Eviction::Lru,
                HostConfig::new(0).breaker,
            ),
            events,
        }
    }

    fn store(&mut self, keys: &[u32]) -> Option<Vec<(u32, HostSlot)>> {
        // All of them or none, as the case has it; the manager offers block by block.
        let held: Vec<HostSlot> =
            keys.iter().filter_map(|&key| self.tier.find(0, &hash(key))).collect();
        held.iter().for_each(|&slot| self.tier.pin(slot));
        let missing = keys.iter().filter(|&&key| !self.tier.holds(0, &hash(key))).count();
        let room = missing <= self.tier.capacity() - self.tier.pinned();
        let mut slots = Vec::new();
        for &key in keys.iter().filter(|_| room) {
            match self.tier.reserve((0, hash(key)), key, Source::default(), &mut self.events) {
                Reserved::New(slot) => slots.push((key, slot)),
                Reserved::Held => {}
                Reserved::Full => panic!("there was room"),
            }
        }
        held.iter().for_each(|&slot| self.tier.unpin(slot));
        room.then_some(slots)
    }

    fn find(&self, keys: &[u32]) -> Vec<bool> {
        keys.iter().map(|&key| self.tier.find(0, &hash(key)).is_some()).collect()
    }

    /// A request that used the keys ends: its start is the last to go.
    fn finish(&mut self, keys: &[u32]) {
        for key in keys.iter().rev() {
            let slot = self.tier.find(0, &hash(*key)).unwrap();
            self.tier.touch(slot);
        }
    }

    fn log(&mut self, kind: EventKind) -> Vec<Vec<u32>> {
        let events = self.events.drain();
        events.into_iter().filter(|e| e.kind == kind).map(|e| e.indices).collect()
    }
}

fn stored(host: &mut Host, slots: &[(u32, HostSlot)]) {
    for &(_, slot) in slots {
        host.tier.stored(slot, true, &mut host.events);
    }
}

#[test]
fn off_001_lru() {
    let case = case("off-001");
    let expected = &case["expected"];
    let events = expected["events"].as_array().unwrap();
    let (removed, kept) = (EventKind::Removed, EventKind::Stored);
    let keys = |slots: &[(u32, HostSlot)]| slots.iter().map(|s| s.0).collect::<Vec<_>>();
    let places = |slots: &[(u32, HostSlot)]| slots.iter().map(|s| s.1).collect::<Vec<_>>();
    let mut host = Host::new(&case["setup"]["chunks"]);

    let first = host.store(&[1, 2]).unwrap();
    assert_eq!(keys(&first), numbers::<u32>(&expected["1"]["to_store"]));
    assert_eq!(places(&first), numbers::<u32>(&expected["1"]["slots"]));
    assert_eq!(host.find(&[1, 2]), [false, false], "pending");
    stored(&mut host, &first);
    assert_eq!(host.find(&[1, 2, 3]), [true, true, false]);
    assert_eq!(host.log(kept), [numbers::<u32>(&events[0]["stored"])]);

    let second = host.store(&[2, 3, 4, 5]).unwrap();
    assert_eq!(keys(&second), numbers::<u32>(&expected["4"]["to_store"]));
    assert_eq!(places(&second), numbers::<u32>(&expected["4"]["slots"]));
    assert_eq!(host.log(removed), [numbers::<u32>(&events[1]["removed"])]);
    assert!(expected["5"].is_null() && host.store(&[1, 6]).is_none());
    assert!(host.log(removed).is_empty(), "a refusal evicts nothing");
    stored(&mut host, &second);
    assert_eq!(host.find(&[1, 2, 3, 4, 5, 0]), [false, true, true, true, true, false]);
    assert_eq!(host.log(kept), [numbers::<u32>(&events[2]["stored"])]);

    let loads = [2, 3].map(|key| host.tier.find(0, &hash(key)).unwrap());
    assert_eq!(loads[..], numbers::<u32>(&expected["7_slots"]));
    loads.iter().for_each(|&slot| host.tier.pin(slot));
    assert!(expected["8"].is_null() && host.store(&[6, 7, 8]).is_none());
    loads.iter().for_each(|&slot| host.tier.unpin(slot));
    host.finish(&[2, 3]);
    let third = host.store(&[6, 7, 8]).unwrap();
    assert_eq!(keys(&third), numbers::<u32>(&expected["10"]["to_store"]));
    assert_eq!(host.log(removed), [numbers::<u32>(&events[3]["removed"])]);
    stored(&mut host, &third);
    host.finish(&[2, 6, 7]);
    let fourth = host.store(&[9]).unwrap();
    assert_eq!(keys(&fourth), numbers::<u32>(&expected["11"]["to_store"]));
    assert_eq!(host.log(removed), [numbers::<u32>(&events[5]["removed"])]);
    // Both stores are said to have failed; only the pending one goes.
    for (_, slot) in [third[1], fourth[0]] {
        if !host.tier.is_resident(slot) {
            host.tier.stored(slot, false, &mut host.events);
        }
    }
    assert_eq!(host.find(&[7, 9]), [true, false]);
    assert_eq!(expected["12"], serde_json::json!(["HIT", "MISS"]));
    assert_eq!(host.log(removed), [numbers::<u32>(&events[6]["removed"])]);
}

#[test]
fn plan_002_strided_groups() {
    let case = case("plan-002");
    let setup = &case["setup"];
    let spec = pair(64, 64);
    let plan = spec.group(16).unwrap();
    assert_eq!(plan.block_bytes, number(&setup["page_bytes"]));
    let layers: Vec<Vec<u32>> =
        plan.groups.iter().map(|g| g.layers.iter().map(|layer| layer + 1).collect()).collect();
    let expected = case["expected"]["groups_of_layers"].as_array().unwrap();
    assert_eq!(layers, expected.iter().map(numbers::<u32>).collect::<Vec<_>>());
    let memory = number(&setup["memory_pages"]) * number(&setup["page_bytes"]);
    let capacity = crate::plan::capacity(&spec, 16, memory as u64, 128, 0).unwrap();
    assert_eq!(capacity.num_blocks as usize, number(&case["expected"]["num_blocks"]));
}

#[test]
fn plan_007_padding() {
    let case = case("plan-007");
    let heads = ["full_head", "sliding_head"].map(|key| number(&case["setup"][key]) as u32);
    let spec = pair(heads[0], heads[1]);
    let plan = spec.group(16).unwrap();
    assert_eq!((plan.groups[0].block_size, plan.groups[1].block_size), (16, 16));
    assert_eq!(plan.block_bytes, plan.groups[1].used_bytes());
    assert!(plan.groups[0].used_bytes() < plan.block_bytes);
    // The case has memory for 64 pages of the smaller size.
    let memory = 64 * plan.groups[0].used_bytes();
    let num_blocks = number(&case["expected"]["case_in_test_num_blocks"]);
    let capacity = crate::plan::capacity(&spec, 16, memory as u64, 128, 0).unwrap();
    assert_eq!(capacity.num_blocks as usize, num_blocks);
}

/// A full layer and a sliding one with heads of these sizes.
fn pair(full: u32, windowed: u32) -> crate::spec::ModelSpec {
    use crate::layout::{Dtype, KvShape};
    let layer = |kind, head_dim| crate::spec::LayerSpec {
        kind,
        sink_tokens: 0,
        shape: KvShape { num_kv_heads: 4, head_dim, dtype: Dtype::Bf16 },
    };
    crate::spec::ModelSpec {
        layers: vec![layer(AttentionKind::Full, full), layer(sliding(128), windowed)],
        ..crate::spec::ModelSpec::preset("llama-3.1-8b").unwrap()
    }
}

#[test]
fn cap_001_scout() {
    let case = case("cap-001");
    let (setup, expected) = (&case["setup"], &case["expected"]);
    let spec = crate::spec::ModelSpec::preset("llama-4-scout").unwrap().shard(8).unwrap();
    let plan = spec.group(number(&setup["block_size"]) as u32).unwrap();
    let baseline = number(&setup["baseline_tokens_hybrid_off"]);
    let blocks = baseline * spec.token_bytes() / plan.block_bytes;
    assert_eq!(blocks, number(&expected["pool_blocks"]));
    let in_flight = number(&setup["max_in_flight_tokens"]);
    let tokens = crate::plan::longest_request(&plan, blocks, in_flight);
    assert_eq!(tokens, number(&expected["max_tokens"]));
    let gain = tokens as f64 / baseline as f64;
    assert!((gain - expected["gain"].as_f64().unwrap()).abs() < 5e-4, "{gain}");
    // What vLLM prints for requests of 3.6M tokens: 11.60M.
    let memory = (blocks as u64 + 1) * plan.block_bytes as u64;
    let capacity = crate::plan::capacity(&spec, 16, memory, 3_600_000, in_flight).unwrap();
    assert_eq!(capacity.tokens / 10_000, 1160);
}

#[test]
fn every_case_is_run() {
    let all: Value = serde_json::from_str(CASES).unwrap();
    let tests = include_str!("cases.rs");
    for case in all["cases"].as_array().unwrap() {
        let id = case["id"].as_str().unwrap();
        assert!(tests.contains(&format!("\"{id}\"")), "{id} has no test");
    }
}
