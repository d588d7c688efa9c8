//! Hits that end inside of blocks, where groups have blocks of different sizes: what is found when, who writes
//! where, and what a lower tier gives. The machine of properties has all of it at once; here is each rule by itself.

#[path = "common/manager.rs"]
mod common;

use common::{FULL, KEYS, tokens, transfers};
use hybridkv::manager::{
    BlockCopy, Completion, EventKind, Eviction, ExtraKeys, GroupConfig, HostConfig, Manager,
    ManagerConfig, Outcome, Retention, Tier,
};
use hybridkv::spec::AttentionKind;

/// A full group in blocks of 32 tokens, and a window of 32 in blocks of 16.
fn manager(num_blocks: u32, host: Option<HostConfig>, fronts: bool) -> Manager {
    let window = AttentionKind::Sliding { window: 32 };
    Manager::new(ManagerConfig {
        groups: vec![GroupConfig::new(FULL, 32), GroupConfig::new(window, 16)],
        num_blocks,
        prefix_caching: true,
        retention: Retention { fronts, ..Retention::dense() },
        eviction: Eviction::Lru,
        // Three blocks for 32 tokens.
        max_model_len: (num_blocks - 1) / 3 * 32,
        in_flight_tokens: 1 << 20,
        host,
        identity: [1; 32],
    })
    .unwrap()
}

fn complete_all(m: &mut Manager, outcome: Outcome) -> Vec<Completion> {
    let all = transfers(m);
    all.iter().map(|t| m.complete(t.id, outcome).unwrap()).collect()
}

fn serve(m: &mut Manager, seq: u64, prompt: &[u32]) {
    m.allocate(seq, prompt, KEYS, 0).unwrap();
    while m.next_copy().is_some() {}
    m.advance(seq, prompt.len(), prompt.len()).unwrap();
    complete_all(m, Outcome::Succeeded);
    m.free(seq).unwrap();
    complete_all(m, Outcome::Succeeded);
}

/// The first `n` tokens of `prompt`, and one that it does not go on with.
fn leaves(prompt: &[u32], n: usize) -> Vec<u32> {
    [&prompt[..n], &[u32::MAX]].concat()
}

fn hit(m: &Manager, prompt: &[u32]) -> usize {
    m.lookup(prompt, KEYS).tokens
}

/// A manager whose device has forgotten a prompt of 112 tokens, which the host has: of the full group three blocks
/// and half of one.
fn on_host() -> (Manager, Vec<u32>) {
    let (mut m, prompt) = (manager(31, Some(HostConfig::new(64)), true), tokens(0, 112));
    serve(&mut m, 1, &prompt);
    m.allocate(2, &tokens(1_000_000, 320), KEYS, 0).unwrap();
    m.abort(2).unwrap();
    let found = m.lookup(&leaves(&prompt, 112), KEYS);
    assert_eq!((found.device_tokens, found.tokens), (0, 112));
    (m, prompt)
}

#[test]
fn hits_end_at_multiples_of_the_unit_with_fronts_and_of_all_blocks_without() {
    let prompt = tokens(0, 130);
    for (fronts, alignment) in [(true, 16), (false, 32)] {
        let mut m = manager(65, None, fronts);
        assert_eq!((m.alignment(), m.hash_unit()), (alignment, 16));
        serve(&mut m, 1, &prompt);
        for n in 0..130 {
            assert_eq!(hit(&m, &leaves(&prompt, n)), n / alignment * alignment, "{n} tokens");
        }
        let other = ExtraKeys { salt: "other", lora: "" };
        assert_eq!(m.lookup(&leaves(&prompt, 48), other).tokens, 0);
    }
}

#[test]
fn fronts_are_found_when_their_tokens_are_settled() {
    let (mut m, prompt) = (manager(65, None, true), tokens(0, 128));
    m.allocate(1, &prompt, KEYS, 0).unwrap();
    // Blocks are shared before they are computed. A copy would be one of what is not there yet, or of what a step
    // that fails has written.
    for (computed, settled, found) in [(0, 0, 32), (64, 0, 32), (64, 63, 32), (64, 64, 48)] {
        m.advance(1, computed, settled).unwrap();
        assert_eq!(hit(&m, &leaves(&prompt, 48)), found, "{computed} computed, {settled} settled");
    }
    assert_eq!(hit(&m, &leaves(&prompt, 112)), 96);
}

#[test]
fn who_hits_a_front_goes_on_in_a_copy_of_its_block() {
    let (mut m, prompt) = (manager(65, None, true), tokens(0, 128));
    m.allocate(1, &prompt, KEYS, 0).unwrap();
    m.advance(1, 128, 128).unwrap();
    let source = m.table(1, 0).unwrap()[1];
    let given = m.allocate(2, &leaves(&prompt, 48), KEYS, 0).unwrap();
    assert_eq!((given.hit_tokens, given.loads.len()), (48, 0));
    let copy = m.next_copy().unwrap();
    assert_eq!(copy, BlockCopy { group: 0, from: source, to: given.new_blocks[0][0] });
    assert_eq!((m.next_copy(), m.table(2, 0).unwrap()[1]), (None, copy.to));
    // It writes behind the front, and is shared when it is full.
    assert!(m.append(2, &tokens(5000, 14)).unwrap()[0].is_empty());
    assert_eq!(m.next_copy(), None);
    m.append(2, &[1]).unwrap();
    let own = [&leaves(&prompt, 48)[..], &tokens(5000, 14), &[1]].concat();
    assert_eq!(m.lookup(&leaves(&own, 64), KEYS).blocks[0][1], copy.to);
    assert_eq!(m.lookup(&leaves(&prompt, 64), KEYS).blocks[0][1], source);
}

#[test]
fn without_room_for_a_copy_it_goes_on_in_the_block_itself() {
    let mut m = manager(15, None, true);
    m.record_events(true);
    let prompt = tokens(0, 64);
    serve(&mut m, 1, &prompt);
    // What it needs becomes recent.
    m.allocate(9, &leaves(&prompt, 48), KEYS, 0).unwrap();
    m.abort(9).unwrap();
    while m.next_copy().is_some() {}
    let source = m.lookup(&prompt, KEYS).blocks[0][1];
    // What another one holds leaves room for two blocks of the full group and for three of the window's.
    m.allocate(2, &tokens(1000, 96), KEYS, 0).unwrap();
    m.events();
    let asked = leaves(&prompt, 48);
    assert_eq!((hit(&m, &asked), m.free_blocks()), (48, 5));
    m.allocate(3, &[&asked[..], &tokens(9000, 15)].concat(), KEYS, 0).unwrap();
    assert_eq!((m.next_copy(), m.table(3, 0).unwrap()[1]), (None, source));
    let removed: usize = m
        .events()
        .iter()
        .filter(|event| event.kind == EventKind::Removed && event.group == 0)
        .map(|event| event.hashes.len())
        .sum();
    assert_eq!(removed, 2, "the block and its front");
    m.advance(3, 64, 64).unwrap();
    assert_eq!(hit(&m, &leaves(&prompt, 64)), 48);
}

#[test]
fn what_a_sequence_leaves_unfinished_is_found_unless_its_work_failed() {
    let prompt = tokens(0, 124);
    for fails in [false, true] {
        let mut m = manager(65, None, true);
        m.allocate(1, &prompt, KEYS, 0).unwrap();
        m.advance(1, 124, 100).unwrap();
        match fails {
            true => drop(m.abort(1).unwrap()),
            false => m.free(1).unwrap(),
        }
        assert_eq!(hit(&m, &leaves(&prompt, 124)), if fails { 96 } else { 112 });
        // The window's blocks are there again: what failed is not found beside them.
        m.allocate(2, &prompt, KEYS, 0).unwrap();
        assert_eq!(hit(&m, &leaves(&prompt, 124)), if fails { 96 } else { 112 });
    }
}

#[test]
fn a_front_is_loaded_into_a_block_of_its_own() {
    let (mut m, prompt) = on_host();
    m.record_events(true);
    let given = m.allocate(2, &leaves(&prompt, 112), KEYS, 0).unwrap();
    assert_eq!((given.hit_tokens, given.host_hit_tokens), (112, 112));
    assert_eq!((m.next_copy(), given.loads.len()), (None, 4 + 2));
    complete_all(&mut m, Outcome::Succeeded);
    let on_device = |event: &&hybridkv::manager::Event| {
        event.tier == Tier::Device && event.kind == EventKind::Stored && event.group == 0
    };
    let stored: Vec<u32> =
        m.events().iter().filter(on_device).flat_map(|event| event.indices.clone()).collect();
    assert!(!stored.contains(&3), "a block that is still written is not to be found: {stored:?}");
    let own = m.table(2, 0).unwrap()[3];
    assert!(m.append(2, &tokens(7000, 15)).unwrap()[0].is_empty());
    assert_eq!((m.next_copy(), m.table(2, 0).unwrap()[3]), (None, own));
}

#[test]
fn a_front_that_cannot_be_loaded_is_a_miss() {
    let (mut m, prompt) = on_host();
    m.allocate(2, &leaves(&prompt, 112), KEYS, 0).unwrap();
    let front = m.table(2, 0).unwrap()[3];
    let mut told = Vec::new();
    for transfer in transfers(&mut m) {
        let fails = transfer.path.block() == Some(front);
        let outcome = if fails { Outcome::Failed } else { Outcome::Succeeded };
        told.push(m.complete(transfer.id, outcome).unwrap());
    }
    // The window of 112 tokens is there, that of 96 is not.
    assert_eq!(told.last(), Some(&Completion::Ready { seq: 2, valid_tokens: 0 }));
}

#[test]
fn models_of_equal_blocks_pay_nothing() {
    let bytes = |size: u32, fronts: bool| {
        let m = Manager::new(ManagerConfig {
            groups: vec![GroupConfig::new(FULL, size), GroupConfig::new(FULL, 16)],
            num_blocks: 4097,
            prefix_caching: true,
            retention: Retention { fronts, ..Retention::default() },
            eviction: Eviction::Lru,
            max_model_len: 4096,
            in_flight_tokens: 1,
            host: None,
            identity: [1; 32],
        });
        m.unwrap().metadata().device.per_block()
    };
    assert_eq!(bytes(16, true), bytes(16, false));
    // A key of 16 bytes, and a cell of 8 in the index.
    assert_eq!((bytes(32, true) - bytes(32, false)).round(), 24.0);
}
