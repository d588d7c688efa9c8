//! The language-neutral cases of `tests/fixtures/semantics/cases.json`, each run against the part of the
//! manager that it is about. `every_case_has_a_verdict` keeps the list complete.

use serde_json::Value;

use super::*;

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
    GroupConfig { kind, sink_tokens: 0, block_size }
}

/// The settings of the peers the cases come from: dense retention, no slack, no host tier.
fn config(groups: Vec<GroupConfig>, num_blocks: usize, max_model_len: u32) -> ManagerConfig {
    ManagerConfig {
        groups,
        num_blocks: num_blocks as u32,
        prefix_caching: true,
        retention: Retention { interval: None, slack: 0, dense_chunks: true },
        max_model_len,
        in_flight_tokens: 0,
        host: None,
        identity: [7; 32],
    }
}

const KEYS: ExtraKeys<'static> = ExtraKeys { salt: "", lora: "" };

fn tokens(range: std::ops::Range<u32>) -> Vec<u32> {
    range.collect()
}

#[test]
fn prefix_002_lru_order() {
    let case = case("prefix-002");
    let expected = &case["expected"];
    let groups = vec![group(AttentionKind::Full, 16)];
    let mut m = Manager::new(config(groups, number(&case["setup"]["num_blocks"]), 160)).unwrap();
    let req0 = m.allocate(0, &tokens(0..87), KEYS, 0).unwrap();
    let req1 = m.allocate(1, &tokens(87..135), KEYS, 0).unwrap();
    assert_eq!(req0.new_blocks, [numbers::<u32>(&expected["req0_blocks"])]);
    assert_eq!(req1.new_blocks, [numbers::<u32>(&expected["req1_blocks"])]);
    assert_eq!(m.free_blocks(), number(&expected["free"]));
    m.free(0).unwrap();
    assert_eq!(m.free_queue(), numbers::<u32>(&expected["queue_after_free_req0"]));
    m.free(1).unwrap();
    assert_eq!(m.free_queue(), numbers::<u32>(&expected["queue_after_free_req1"]));
    let hit = m.lookup(&tokens(0..35), KEYS);
    assert_eq!(hit.blocks, [numbers::<u32>(&expected["req2_hit_blocks"])]);
    let req2 = m.allocate(2, &tokens(0..35), KEYS, 0).unwrap();
    assert_eq!(req2.hit_tokens, number(&expected["req2_hit_tokens"]));
    assert_eq!(req2.new_blocks, [numbers::<u32>(&expected["req2_new"])]);
    assert_eq!(m.free_blocks(), number(&expected["free_after_req2"]));
}

/// Full and two sliding groups, as in the peers' hybrid tests; `forget` drops (index, group) pairs.
fn hybrid_hit(forget: &[(usize, usize)]) -> Hit {
    let sliding = group(AttentionKind::Sliding { window: 32 }, 16);
    let groups = vec![group(AttentionKind::Full, 16), sliding, sliding];
    let mut m = Manager::new(config(groups, 31, 128)).unwrap();
    let common = tokens(0..48);
    m.allocate(0, &[&common[..], &[100; 7]].concat(), KEYS, 0).unwrap();
    for &(index, group) in forget {
        m.forget(0, group, index).unwrap();
    }
    m.free(0).unwrap();
    m.lookup(&[&common[..], &[101; 5]].concat(), KEYS)
}

#[test]
fn hybrid_002_fixed_point() {
    for id in ["hybrid-002a", "hybrid-002c"] {
        let case = case(id);
        let forget: Vec<(usize, usize)> = case["setup"]["remove_from_hash_map"]
            .as_array()
            .unwrap()
            .iter()
            .map(|drop| (number(&drop["block_hash_index"]), number(&drop["group"])))
            .collect();
        let hit = hybrid_hit(&forget);
        assert_eq!(hit.tokens, number(&case["expected"]["hit_tokens"]), "{id}");
        assert_eq!(hit.blocks[0].len(), number(&case["expected"]["hit_blocks"]), "{id}");
    }
}
