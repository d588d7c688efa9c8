//! When blocks go down to the lower tiers, and what that keeps.

#[path = "common/manager.rs"]
mod common;

use common::{FULL, KEYS, tokens, transfers};
use hybridkv::manager::{
    Direction, EventKind, Eviction, HostConfig, Manager, Outcome, StorageConfig, Tier, Transfer,
    WritePolicy,
};
use hybridkv::spec::AttentionKind;
use hybridkv::{ErrorKind, Result};

fn sliding(window: u32) -> AttentionKind {
    AttentionKind::Sliding { window }
}

fn manager(kinds: &[AttentionKind], num_blocks: u32, host: HostConfig) -> Manager {
    common::manager(kinds, num_blocks, Some(host))
}

fn write_back(num_blocks: u32, num_slots: u32) -> Manager {
    manager(&[FULL], num_blocks, HostConfig::new(num_slots).with_write(WritePolicy::Back))
}

fn complete_all(m: &mut Manager, outcome: Outcome) -> Vec<Transfer> {
    let all = transfers(m);
    for transfer in &all {
        m.complete(transfer.id, outcome).unwrap();
    }
    all
}

/// Computes a prompt and frees it; its transfers are still to be taken.
fn compute(m: &mut Manager, seq: u64, prompt: &[u32]) -> Result<()> {
    m.allocate(seq, prompt, KEYS, 0)?;
    m.advance(seq, prompt.len(), prompt.len())?;
    m.free(seq)
}

/// Tokens of a prompt that would hit, on the device and over all tiers.
fn hit(m: &Manager, prompt: &[u32]) -> (usize, usize) {
    let hit = m.lookup(&[prompt, &[0]].concat(), KEYS);
    (hit.device_tokens, hit.tokens)
}

#[test]
fn selective_writes_store_what_is_used_again() {
    let host = HostConfig::new(64).with_write(WritePolicy::Selective { uses: 3 });
    let mut m = manager(&[FULL], 33, host);
    let (shared, once) = (tokens(0, 32), tokens(500, 32));
    let prompt = [&shared[..], &once].concat();
    compute(&mut m, 1, &prompt).unwrap();
    compute(&mut m, 2, &[&shared[..], &tokens(900, 32)].concat()).unwrap();
    assert!(transfers(&mut m).is_empty(), "two uses");
    compute(&mut m, 3, &[&shared[..], &tokens(1900, 32)].concat()).unwrap();
    let stored = complete_all(&mut m, Outcome::Succeeded);
    assert_eq!(stored.len(), 2, "the shared blocks and no others");
    m.allocate(9, &tokens(5000, 512), KEYS, 0).unwrap();
    assert_eq!(hit(&m, &prompt), (0, 32));
}

#[test]
fn write_back_ends_when_the_host_is_smaller_than_what_is_evicted() {
    let mut m = write_back(13, 2);
    for seq in 0..3 {
        compute(&mut m, seq, &tokens(1000 * seq as u32, 64)).unwrap();
    }
    // All twelve blocks are evicted at once; the host takes each of them once and keeps the last two.
    let mut stored = 0;
    let tries = (0..100).find(|_| {
        let given = m.allocate(9, &tokens(9000, 192), KEYS, 0).is_ok();
        stored += complete_all(&mut m, Outcome::Succeeded).len();
        given
    });
    assert!(tries.is_some(), "blocks are stored again and again");
    assert!(stored <= 12, "{stored} stores of 12 blocks");
}

#[test]
fn write_back_stores_a_block_before_its_memory_is_used_again() {
    let mut m = write_back(5, 16);
    let prompt = tokens(0, 64);
    compute(&mut m, 1, &prompt).unwrap();
    assert!(transfers(&mut m).is_empty(), "nothing is written before it is evicted");
    // R2: a block that is being stored is not to be had, and what waits for it is refused.
    let error = m.allocate(2, &tokens(1000, 32), KEYS, 0).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::NoFreeBlocks { needed: 2, free: 0 }), "{error}");
    let stores = transfers(&mut m);
    assert!(stores.len() >= 2);
    assert!(stores.iter().all(|t| t.path.direction() == Direction::Offload));
    assert!(m.allocate(2, &tokens(1000, 32), KEYS, 0).is_err(), "still being stored");
    assert_eq!(hit(&m, &prompt), (64, 64), "it is found on the device until it is used again");
    for store in &stores {
        m.complete(store.id, Outcome::Succeeded).unwrap();
    }
    m.allocate(2, &tokens(1000, 32), KEYS, 0).unwrap();
    assert_eq!(hit(&m, &prompt), (32, 64));
    assert_eq!(m.stats().evictions_dropped, 0);
}

#[test]
fn write_back_stores_no_block_twice() {
    let mut m = write_back(9, 16);
    let prompt = tokens(0, 64);
    compute(&mut m, 1, &prompt).unwrap();
    let filler = tokens(1000, 128);
    assert!(m.allocate(2, &filler, KEYS, 0).is_err());
    assert_eq!(complete_all(&mut m, Outcome::Succeeded).len(), 4);
    m.allocate(2, &filler, KEYS, 0).unwrap();
    m.free(2).unwrap();
    assert_eq!(hit(&m, &prompt), (0, 64));
    // Up again, and evicted again: the host still has it, so only the filler must be stored.
    let longer = [&prompt[..], &[7]].concat();
    while m.allocate(3, &longer, KEYS, 0).is_err() {
        complete_all(&mut m, Outcome::Succeeded);
    }
    complete_all(&mut m, Outcome::Succeeded);
    m.free(3).unwrap();
    let before = m.stats().offloads.started;
    while m.allocate(4, &filler, KEYS, 0).is_err() {
        complete_all(&mut m, Outcome::Succeeded);
    }
    assert_eq!(before, 12, "four of the prompt, eight of the filler");
    assert_eq!(m.stats().offloads.started, before);
}

#[test]
fn write_back_has_a_bounded_number_of_evictions_in_flight() {
    let host = HostConfig { max_offloads: 2, ..HostConfig::new(64) };
    let mut m = manager(&[FULL], 17, host.with_write(WritePolicy::Back));
    let prompt = tokens(0, 256);
    compute(&mut m, 1, &prompt).unwrap();
    let next = tokens(1000, 128);
    let mut rounds = 0;
    while m.allocate(2, &next, KEYS, 0).is_err() {
        let stores = complete_all(&mut m, Outcome::Succeeded);
        assert!((1..=2).contains(&stores.len()), "{}", stores.len());
        rounds += 1;
    }
    assert!(rounds >= 4);
    assert_eq!(hit(&m, &prompt), (128, 256));
}

#[test]
fn write_back_drops_what_the_host_cannot_take() {
    let mut m = write_back(9, 4);
    compute(&mut m, 1, &tokens(0, 128)).unwrap();
    let next = tokens(1000, 128);
    assert!(m.allocate(2, &next, KEYS, 0).is_err());
    // Four slots receive blocks; for the other four blocks there is no room, and none can be made.
    let stores = transfers(&mut m);
    assert_eq!(stores.len(), 4);
    for store in &stores {
        m.complete(store.id, Outcome::Failed).unwrap();
    }
    // A store that fails drops its block: a host that takes nothing must not fill the device for good.
    m.allocate(2, &next, KEYS, 0).unwrap_err();
    assert_eq!(complete_all(&mut m, Outcome::Failed).len(), 4);
    m.allocate(2, &next, KEYS, 0).unwrap();
    assert_eq!(m.stats().evictions_dropped, 8);
    assert_eq!(hit(&m, &tokens(0, 128)), (0, 0));
}

#[test]
fn a_write_back_allocation_keeps_the_host_copies_that_it_loads() {
    let mut m = write_back(9, 4);
    let prompt = tokens(0, 64);
    compute(&mut m, 1, &prompt).unwrap();
    let filler = tokens(1000, 128);
    while m.allocate(2, &filler, KEYS, 0).is_err() {
        complete_all(&mut m, Outcome::Succeeded);
    }
    m.advance(2, 128, 128).unwrap();
    m.free(2).unwrap();
    assert_eq!(hit(&m, &prompt), (0, 64));
    // To load four blocks, four others must be evicted, which the host has no room for but those four slots.
    let longer = [&prompt[..], &[7]].concat();
    let allocation = loop {
        match m.allocate(3, &longer, KEYS, 0) {
            Ok(allocation) => break allocation,
            Err(_) => drop(complete_all(&mut m, Outcome::Succeeded)),
        }
    };
    assert_eq!((allocation.hit_tokens, allocation.loads.len()), (64, 4));
    assert!(m.stats().evictions_dropped > 0);
}

#[test]
fn a_host_smaller_than_a_prompt_holds_a_prefix_of_every_group() {
    let mut m = manager(&[FULL, sliding(33)], 33, HostConfig::new(10));
    let prompt = tokens(0, 256);
    m.allocate(1, &prompt, KEYS, 0).unwrap();
    m.advance(1, 256, 0).unwrap();
    complete_all(&mut m, Outcome::Succeeded);
    m.free(1).unwrap();
    m.allocate(2, &tokens(1000, 256), KEYS, 0).unwrap();
    assert_eq!(hit(&m, &prompt), (0, 80), "five blocks of each group");
}

/// Prompts whose first block a tier has evicted, of the events since the last call, in order.
fn evicted(m: &mut Manager, tier: Tier, prompts: &[Vec<u32>]) -> Vec<usize> {
    let first = |prompt: &Vec<u32>| m.hash(prompt, KEYS).hashes()[0];
    let firsts: Vec<_> = prompts.iter().map(first).collect();
    let gone =
        |event: &hybridkv::manager::Event| event.kind == EventKind::Removed && event.tier == tier;
    let hashes = m.events().into_iter().filter(gone).flat_map(|event| event.hashes);
    hashes.filter_map(|hash| firsts.iter().position(|first| *first == hash)).collect()
}

#[test]
fn each_policy_decides_what_the_host_lets_go() {
    // The first of three prompts is used again, the second has a priority; a fourth needs the room of one.
    for (eviction, goes) in [
        (Eviction::Lru, 1),
        (Eviction::Fifo, 0),
        (Eviction::Lfu, 1),
        (Eviction::Slru, 1),
        (Eviction::Priority, 2),
        (Eviction::Reuse, 1),
    ] {
        let mut m = manager(&[FULL], 65, HostConfig { eviction, ..HostConfig::new(6) });
        m.record_events(true);
        let prompts: Vec<Vec<u32>> = (0..4).map(|i| tokens(1000 * i, 32)).collect();
        for (seq, p) in [0, 1, 2, 0].into_iter().enumerate() {
            let (seq, longer) = (seq as u64, [&prompts[p][..], &[7]].concat());
            m.allocate(seq, &longer, KEYS, 0).unwrap();
            m.advance(seq, 33, 33).unwrap();
            complete_all(&mut m, Outcome::Succeeded);
            m.prioritize(seq, [2, 5, 0, 2][seq as usize]).unwrap();
            m.free(seq).unwrap();
        }
        assert_eq!(evicted(&mut m, Tier::Host, &prompts), [0; 0]);
        compute(&mut m, 9, &prompts[3]).unwrap();
        complete_all(&mut m, Outcome::Succeeded);
        assert_eq!(evicted(&mut m, Tier::Host, &prompts), [goes], "{eviction:?}");
    }
}

#[test]
fn ends_go_before_starts_in_every_tier_under_every_policy() {
    for &eviction in Eviction::ALL {
        let host = HostConfig { eviction, ..HostConfig::new(8) };
        let mut m = manager(&[FULL], 65, host);
        let storage = StorageConfig { eviction, ..StorageConfig::new(8) };
        m.attach_storage(storage, &[]).unwrap();
        m.record_events(true);
        let all = |m: &mut Manager| {
            while m.transfers_in_flight() > 0 {
                complete_all(m, Outcome::Succeeded);
            }
        };
        for start in [0, 1000] {
            let seq = start as u64;
            m.allocate(seq, &tokens(start, 64), KEYS, 0).unwrap();
            for step in 1..=4 {
                m.advance(seq, 16 * step, 16 * step).unwrap();
                all(&mut m);
            }
            m.free(seq).unwrap();
        }
        m.events();
        for n in 0..6 {
            compute(&mut m, 10 + n, &tokens(5000 + 100 * n as u32, 16)).unwrap();
            all(&mut m);
        }
        let events = m.events();
        for tier in [Tier::Host, Tier::Storage] {
            let mut gone = 0;
            for start in [0, 1000] {
                let hashes = m.hash(&tokens(start, 64), KEYS).hashes().to_vec();
                let removed: Vec<u32> = events
                    .iter()
                    .filter(|event| event.kind == EventKind::Removed && event.tier == tier)
                    .flat_map(|event| event.indices.iter().zip(&event.hashes))
                    .filter(|(_, hash)| hashes.contains(hash))
                    .map(|(&index, _)| index)
                    .collect();
                let ends_first: Vec<u32> = (0..4).rev().take(removed.len()).collect();
                assert_eq!(removed, ends_first, "{eviction:?} {tier:?}");
                gone += removed.len();
            }
            assert!(gone > 0, "{eviction:?} {tier:?}");
        }
    }
}
