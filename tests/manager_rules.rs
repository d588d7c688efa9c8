//! The safety rules that are the manager's to keep, each with the history that breaks without it.

#[path = "common/manager.rs"]
mod common;

use common::{FULL, KEYS, tokens, transfers};
use hybridkv::manager::{
    BlockHash, Completion, Direction, EventKind, HashedTokens, HostConfig, Manager, Outcome, Tier,
    Transfer,
};
use hybridkv::spec::AttentionKind;
use hybridkv::{ErrorKind, Result};

fn sliding(window: u32) -> AttentionKind {
    AttentionKind::Sliding { window }
}

fn manager(kinds: &[AttentionKind], num_blocks: u32, host_slots: u32) -> Manager {
    let host = (host_slots > 0).then(|| HostConfig::new(host_slots));
    common::manager(kinds, num_blocks, host)
}

fn block(transfer: &Transfer) -> u32 {
    transfer.path.block().expect("to or from the device")
}

fn complete_all(m: &mut Manager, outcome: Outcome) -> Vec<Completion> {
    let all = transfers(m);
    all.iter().map(|t| m.complete(t.id, outcome).unwrap()).collect()
}

/// Computes a prompt, lets its offloads succeed and frees it.
fn serve(m: &mut Manager, seq: u64, prompt: &[u32]) -> Result<()> {
    m.allocate(seq, prompt, KEYS, 0)?;
    m.advance(seq, prompt.len(), prompt.len())?;
    complete_all(m, Outcome::Succeeded);
    m.free(seq)
}

/// A manager whose device has forgotten the first prompt, which is on the host.
fn evicted(kinds: &[AttentionKind], num_blocks: u32, prompt: &[u32]) -> Manager {
    let mut m = manager(kinds, num_blocks, 4 * num_blocks);
    serve(&mut m, 1, prompt).unwrap();
    let filler = tokens(1_000_000, m.config().max_model_len);
    m.allocate(2, &filler, KEYS, 0).unwrap();
    m.free(2).unwrap();
    let hit = m.lookup(&[prompt, &[0]].concat(), KEYS);
    assert_eq!((hit.device_tokens, hit.tokens), (0, prompt.len()));
    m
}

#[test]
fn r1_hits_are_pinned_from_the_allocation_on() {
    let prompt = tokens(0, 64);
    let longer = [&prompt[..], &[0]].concat();
    let mut m = evicted(&[FULL], 9, &prompt);
    let allocation = m.allocate(3, &longer, KEYS, 0).unwrap();
    assert_eq!((allocation.hit_tokens, allocation.device_hit_tokens), (64, 0));
    assert_eq!(allocation.loads.len(), 4);
    let loads = transfers(&mut m);
    // The sequence goes, and everybody wants blocks: targets of loads in flight are not among them.
    m.free(3).unwrap();
    let free = m.free_blocks();
    assert_eq!(free, 8 - 4);
    let other = m.allocate(4, &tokens(5000, 64), KEYS, 0).unwrap();
    assert!(loads.iter().all(|load| !other.new_blocks[0].contains(&block(load))));
    assert!(m.allocate(5, &tokens(6000, 16), KEYS, 0).is_err());
    // The host slots that are read stay, whatever else is stored.
    m.advance(4, 64, 64).unwrap();
    assert!(transfers(&mut m).iter().all(|t| loads.iter().all(|l| t.path.slot() != l.path.slot())));
    for load in &loads {
        m.complete(load.id, Outcome::Succeeded).unwrap();
    }
    m.free(4).unwrap();
}

#[test]
fn r1_host_slots_are_not_evicted_while_they_are_read() {
    let mut m = manager(&[FULL], 9, 4);
    let prompt = tokens(0, 64);
    serve(&mut m, 1, &prompt).unwrap();
    m.allocate(2, &tokens(1000, 128), KEYS, 0).unwrap();
    m.free(2).unwrap();
    m.allocate(3, &[&prompt[..], &[0]].concat(), KEYS, 0).unwrap();
    let loads = transfers(&mut m);
    assert_eq!(loads.len(), 4);
    // All four slots are read: another prompt's offloads find none and are put off.
    m.allocate(4, &tokens(2000, 16), KEYS, 0).unwrap();
    m.advance(4, 16, 16).unwrap();
    assert_eq!(m.next_transfer(), None);
    assert_eq!(m.usage().host_pinned, 4);
    for load in &loads {
        m.complete(load.id, Outcome::Succeeded).unwrap();
    }
    assert_eq!(m.usage().host_pinned, 0);
}

#[test]
fn r2_a_block_is_not_reused_while_it_is_stored() {
    let mut m = manager(&[FULL], 5, 8);
    m.allocate(1, &tokens(0, 64), KEYS, 0).unwrap();
    m.advance(1, 64, 64).unwrap();
    let stores = transfers(&mut m);
    assert_eq!(stores.len(), 4);
    assert!(stores.iter().all(|t| t.path.direction() == Direction::Offload));
    m.free(1).unwrap();
    assert_eq!(m.free_blocks(), 0);
    assert!(m.allocate(2, &tokens(1000, 16), KEYS, 0).is_err());
    m.complete(stores[2].id, Outcome::Succeeded).unwrap();
    let allocation = m.allocate(2, &tokens(1000, 16), KEYS, 0).unwrap();
    assert_eq!(allocation.new_blocks[0], [block(&stores[2])]);
}

#[test]
fn r4_frees_count_settled_tokens() {
    let mut m = manager(&[FULL, sliding(16)], 65, 0);
    m.allocate(1, &tokens(0, 100), KEYS, 0).unwrap();
    assert_eq!(m.advance(1, 100, 0).unwrap().concat(), Vec::<u32>::new());
    let table = m.table(1, 1).unwrap().to_vec();
    let freed = m.advance(1, 100, 100).unwrap();
    let expected: Vec<u32> = table[..5].iter().rev().copied().collect();
    assert_eq!(freed, [Vec::new(), expected]);
}

#[test]
fn r5_hits_of_all_groups_are_touched_before_any_group_allocates() {
    let mut m = manager(&[FULL, sliding(32)], 9, 0);
    let prompt = tokens(0, 32);
    m.allocate(1, &prompt, KEYS, 0).unwrap();
    m.free(1).unwrap();
    // A third prompt's use of the other four leaves the cached ones next in the queue.
    m.allocate(2, &tokens(1000, 32), KEYS, 0).unwrap();
    let hit = m.lookup(&tokens(0, 40), KEYS);
    assert_eq!(hit.tokens, 32);
    assert!(m.free_queue().iter().all(|id| hit.blocks.concat().contains(id)));
    let err = m.allocate(3, &tokens(0, 40), KEYS, 0).unwrap_err();
    assert!(matches!(err.kind(), ErrorKind::NoFreeBlocks { needed: 6, free: 4 }), "{err}");
    m.free(2).unwrap();
    let allocation = m.allocate(3, &tokens(0, 40), KEYS, 0).unwrap();
    assert_eq!(allocation.hit_tokens, 32);
    for g in 0..2 {
        let table = m.table(3, g).unwrap();
        assert_eq!(table[..2], hit.blocks[g][..], "group {g} keeps its hits");
    }
    let all: std::collections::HashSet<u32> =
        (0..2).flat_map(|g| m.table(3, g).unwrap().to_vec()).collect();
    assert_eq!(all.len(), 6, "no block serves twice");
}

#[test]
fn r6_a_refused_allocation_changes_nothing() {
    let mut m = manager(&[FULL, sliding(32)], 17, 0);
    m.allocate(1, &tokens(0, 40), KEYS, 0).unwrap();
    m.free(1).unwrap();
    m.allocate(2, &tokens(1000, 64), KEYS, 0).unwrap();
    m.allocate(4, &tokens(2000, 16), KEYS, 0).unwrap();
    let before = (m.free_queue(), m.ref_counts(), m.cached_indices(0), m.cached_indices(1));
    assert!(m.allocate(3, &tokens(0, 100), KEYS, 0).is_err());
    assert!(m.append(2, &tokens(0, 64)).is_err());
    assert_eq!(before, (m.free_queue(), m.ref_counts(), m.cached_indices(0), m.cached_indices(1)));
    assert_eq!(m.append(2, &[7]).unwrap().concat().len(), 2);
}

#[test]
fn r7_the_host_tier_keeps_its_budget_and_drops_ends_before_starts() {
    let mut m = manager(&[FULL], 17, 4);
    let first = tokens(0, 64);
    serve(&mut m, 1, &first).unwrap();
    assert_eq!(m.usage().host_used, 4);
    serve(&mut m, 2, &tokens(1000, 32)).unwrap();
    assert_eq!(m.usage().host_used, 4);
    m.allocate(3, &tokens(2000, 256), KEYS, 0).unwrap();
    m.free(3).unwrap();
    let hit = m.lookup(&[&first[..], &[0]].concat(), KEYS);
    assert_eq!((hit.device_tokens, hit.tokens), (0, 32));
}

#[test]
fn r8_a_failed_load_is_a_miss_and_a_completed_one_is_no_hit_before_it_succeeds() {
    let prompt = tokens(0, 64);
    let longer = [&prompt[..], &[0]].concat();
    let mut m = evicted(&[FULL], 9, &prompt);
    m.record_events(true);
    m.allocate(3, &longer, KEYS, 0).unwrap();
    assert_eq!(m.lookup(&longer, KEYS).device_tokens, 0, "on its way");
    assert!(m.advance(3, 65, 65).is_err(), "not ready");
    let loads = transfers(&mut m);
    let outcomes = [Outcome::Succeeded, Outcome::Succeeded, Outcome::Failed, Outcome::Succeeded];
    for (load, outcome) in loads.iter().zip(outcomes).rev() {
        let last = load.id == loads[0].id;
        let ready = Completion::Ready { seq: 3, valid_tokens: 32 };
        let expected = if last { ready } else { Completion::Pending };
        assert_eq!(m.complete(load.id, outcome).unwrap(), expected);
    }
    let hit = m.lookup(&longer, KEYS);
    assert_eq!((hit.device_tokens, hit.tokens), (32, 32), "what failed is on no tier");
    assert!(m.events().iter().any(|e| e.tier == Tier::Host && e.indices == [2]));
    // What is written again belongs to the sequence alone; once computed it is found.
    m.advance(3, 65, 65).unwrap();
    assert_eq!(m.lookup(&longer, KEYS).device_tokens, 64);
}

#[test]
fn r8_a_failed_window_makes_the_prefix_invalid_in_every_group() {
    let prompt = tokens(0, 64);
    let longer = [&prompt[..], &[0]].concat();
    let mut m = evicted(&[FULL, sliding(17)], 33, &prompt);
    let allocation = m.allocate(3, &longer, KEYS, 0).unwrap();
    assert_eq!(allocation.loads.len(), 5, "four full blocks and one of the window");
    let loads = transfers(&mut m);
    let mut last = Completion::Pending;
    for load in &loads {
        let outcome = if load.group == 1 { Outcome::Failed } else { Outcome::Succeeded };
        last = m.complete(load.id, outcome).unwrap();
    }
    assert_eq!(last, Completion::Ready { seq: 3, valid_tokens: 0 });
    for g in 0..2 {
        assert!(m.table(3, g).unwrap().iter().all(|&id| id != 0), "every token has a slot again");
    }
}

#[test]
fn r8_a_failed_load_without_room_to_repair_ends_the_sequence() {
    let prompt = tokens(0, 64);
    let longer = [&prompt[..], &[0]].concat();
    let mut m = evicted(&[FULL, sliding(17)], 11, &prompt);
    m.allocate(3, &longer, KEYS, 0).unwrap();
    m.allocate(4, &tokens(9000, 16), KEYS, 0).unwrap();
    let loads = transfers(&mut m);
    let mut last = Completion::Pending;
    for load in &loads {
        let outcome = if load.group == 1 { Outcome::Failed } else { Outcome::Succeeded };
        last = m.complete(load.id, outcome).unwrap();
    }
    assert_eq!(last, Completion::Dropped { seq: 3 });
    assert!(m.table(3, 0).is_err());
    assert_eq!(m.free_blocks(), 10 - 2);
}

#[test]
fn r8_a_failed_store_is_no_host_hit() {
    let mut m = manager(&[FULL], 9, 16);
    let prompt = tokens(0, 64);
    m.allocate(1, &prompt, KEYS, 0).unwrap();
    m.advance(1, 64, 64).unwrap();
    let stores = transfers(&mut m);
    for (i, store) in stores.iter().enumerate() {
        let outcome = if i == 1 { Outcome::Failed } else { Outcome::Succeeded };
        m.complete(store.id, outcome).unwrap();
    }
    m.free(1).unwrap();
    m.allocate(2, &tokens(1000, 128), KEYS, 0).unwrap();
    assert_eq!(m.lookup(&[&prompt[..], &[0]].concat(), KEYS).tokens, 16);
    assert_eq!(m.usage().host_used, 3);
}

#[test]
fn r10_late_completions_are_refused_and_never_reach_a_new_sequence_of_the_same_name() {
    let prompt = tokens(0, 64);
    let longer = [&prompt[..], &[0]].concat();
    let mut m = evicted(&[FULL], 17, &prompt);
    assert!(matches!(
        m.complete(123, Outcome::Succeeded).unwrap_err().kind(),
        ErrorKind::UnknownTransfer(123)
    ));
    m.allocate(3, &longer, KEYS, 0).unwrap();
    let old = transfers(&mut m);
    m.free(3).unwrap();
    m.allocate(3, &longer, KEYS, 0).unwrap();
    let new = transfers(&mut m);
    for load in &old {
        assert_eq!(m.complete(load.id, Outcome::Succeeded).unwrap(), Completion::Pending);
        assert!(m.complete(load.id, Outcome::Succeeded).is_err(), "answered already");
    }
    assert_eq!(m.lookup(&longer, KEYS).device_tokens, 0, "dropped");
    for load in &new[1..] {
        assert_eq!(m.complete(load.id, Outcome::Succeeded).unwrap(), Completion::Pending);
    }
    let ready = Completion::Ready { seq: 3, valid_tokens: 64 };
    assert_eq!(m.complete(new[0].id, Outcome::Succeeded).unwrap(), ready);
}

#[test]
fn an_aborted_sequence_takes_back_what_it_did_not_finish() {
    let mut m = manager(&[FULL], 33, 32);
    let prompt = tokens(0, 64);
    m.allocate(1, &prompt, KEYS, 0).unwrap();
    m.allocate(2, &[&prompt[..], &[0]].concat(), KEYS, 0).unwrap();
    m.advance(1, 48, 32).unwrap();
    complete_all(&mut m, Outcome::Succeeded);
    assert_eq!(m.abort(1).unwrap(), [2]);
    let hit = m.lookup(&[&prompt[..], &[1]].concat(), KEYS);
    assert_eq!((hit.device_tokens, hit.tokens), (32, 32), "on the device and on the host");
}

#[test]
fn r8_a_block_on_its_way_to_the_host_is_no_hit_there() {
    let mut m = manager(&[FULL], 9, 16);
    let prompt = tokens(0, 64);
    m.allocate(1, &prompt, KEYS, 0).unwrap();
    m.advance(1, 64, 64).unwrap();
    for b in 0..4 {
        m.forget(1, 0, b).unwrap();
    }
    let longer = [&prompt[..], &[0]].concat();
    assert_eq!(m.lookup(&longer, KEYS).tokens, 0, "neither here nor there yet");
    complete_all(&mut m, Outcome::Succeeded);
    assert_eq!(m.lookup(&longer, KEYS).tokens, 64);
}

#[test]
fn r10_a_load_from_a_copy_that_was_disowned_meanwhile_is_a_miss() {
    let mut m = manager(&[FULL], 17, 16);
    let prompt = tokens(0, 64);
    m.allocate(1, &prompt, KEYS, 0).unwrap();
    m.advance(1, 64, 0).unwrap();
    complete_all(&mut m, Outcome::Succeeded);
    for b in 0..4 {
        m.forget(1, 0, b).unwrap();
    }
    assert_eq!(m.allocate(2, &[&prompt[..], &[0]].concat(), KEYS, 0).unwrap().loads.len(), 4);
    m.abort(1).unwrap();
    let last = complete_all(&mut m, Outcome::Succeeded).pop();
    assert_eq!(last, Some(Completion::Ready { seq: 2, valid_tokens: 0 }));
    assert_eq!(m.usage().host_used, 0);
}

#[test]
fn r7_a_sequence_larger_than_the_host_tier_keeps_its_start_there() {
    let mut m = manager(&[FULL], 33, 5);
    let prompt = tokens(0, 128);
    m.allocate(1, &prompt, KEYS, 0).unwrap();
    for computed in [64, 128, 128] {
        m.advance(1, computed, computed).unwrap();
        complete_all(&mut m, Outcome::Succeeded);
    }
    m.free(1).unwrap();
    m.allocate(2, &tokens(1000, 512), KEYS, 0).unwrap();
    let hit = m.lookup(&[&prompt[..], &[0]].concat(), KEYS);
    assert_eq!((hit.device_tokens, hit.tokens), (0, 80));
}

#[test]
fn a_router_that_follows_the_events_knows_every_hit() {
    use std::collections::HashMap;
    let mut m = manager(&[FULL], 12, 16);
    m.record_events(true);
    let (identity, unit) = (m.config().identity, m.hash_unit());
    let prompt =
        |family: u32, blocks: u32| [tokens(0, 32), tokens(100 * family, 16 * blocks)].concat();
    let mut copies: HashMap<(Tier, BlockHash), i32> = HashMap::new();
    let (mut hits, mut lower) = (0, 0);
    for round in 0..200u32 {
        let asked = prompt(1 + round * 7 % 5, 1 + round * 11 % 6);
        let asked = [&asked[..], &[9]].concat();
        // The router's own work: no manager, only what events said.
        let mut hashed = HashedTokens::new(&identity, unit, KEYS);
        hashed.push(&asked);
        let held = |tiers: &[Tier]| {
            let of =
                |hash| tiers.iter().any(|&tier| copies.get(&(tier, hash)).is_some_and(|&n| n > 0));
            unit * hashed.hashes().iter().take_while(|&&hash| of(hash)).count()
        };
        let hit = m.lookup(&asked, KEYS);
        assert_eq!(hit.device_tokens, held(&[Tier::Device]));
        assert_eq!(hit.tokens, held(&[Tier::Device, Tier::Host]));
        hits += usize::from(hit.tokens > 0);
        lower += usize::from(hit.tokens > hit.device_tokens);
        m.allocate(1, &asked, KEYS, 0).unwrap();
        complete_all(&mut m, Outcome::Succeeded);
        m.advance(1, asked.len(), asked.len()).unwrap();
        complete_all(&mut m, Outcome::Succeeded);
        m.free(1).unwrap();
        if round % 50 == 49 {
            assert!(m.reset_prefix_cache());
        }
        for event in m.events() {
            let change = match event.kind {
                EventKind::Stored => 1,
                EventKind::Removed => -1,
                EventKind::Cleared => {
                    copies.retain(|&(tier, _), _| tier != event.tier);
                    0
                }
            };
            for hash in event.hashes {
                *copies.entry((event.tier, hash)).or_default() += change;
            }
        }
        assert!(copies.values().all(|&n| n >= 0), "removed more often than stored");
    }
    assert!(hits > 100 && lower > 20, "{hits} {lower}");
}

#[test]
fn events_tell_group_tier_and_order() {
    use hybridkv::manager::EventKind::{Cleared, Removed, Stored};
    let mut m = manager(&[FULL, sliding(17)], 9, 16);
    m.record_events(true);
    m.allocate(1, &tokens(0, 40), KEYS, 0).unwrap();
    m.append(1, &tokens(40, 8)).unwrap();
    let stored = m.events();
    let of_group = |g| stored.iter().filter(move |e| e.group == g);
    for g in 0..2 {
        let hashes: Vec<_> = of_group(g).flat_map(|e| e.hashes.clone()).collect();
        assert_eq!(hashes, m.hash(&tokens(0, 48), KEYS).hashes());
    }
    // One event per operation and group.
    let stored: Vec<_> = stored.into_iter().map(|e| (e.kind, e.group, e.tier, e.indices)).collect();
    let log = |m: &mut Manager| {
        let events = m.events();
        events.into_iter().map(|e| (e.kind, e.group, e.tier, e.indices)).collect::<Vec<_>>()
    };
    let device = |kind, group, indices: &[u32]| (kind, group, Tier::Device, indices.to_vec());
    let expected = [
        device(Stored, 0, &[0, 1]),
        device(Stored, 1, &[0, 1]),
        device(Stored, 0, &[2]),
        device(Stored, 1, &[2]),
    ];
    assert_eq!(stored, expected);
    m.advance(1, 48, 48).unwrap();
    complete_all(&mut m, Outcome::Succeeded);
    assert!(log(&mut m).iter().all(|e| (e.0, e.2) == (Stored, Tier::Host)));
    m.free(1).unwrap();
    // Another prompt's blocks push out what it needs: that is told first.
    m.allocate(2, &tokens(1000, 32), KEYS, 0).unwrap();
    let events = log(&mut m);
    let last_removed = events.iter().rposition(|e| e.0 == Removed).unwrap();
    let first_stored = events.iter().position(|e| e.0 == Stored).unwrap();
    assert!(last_removed < first_stored, "{events:?}");
    assert!(!m.reset_prefix_cache());
    m.free(2).unwrap();
    assert!(m.reset_prefix_cache());
    assert!(log(&mut m).iter().all(|e| e.0 == Cleared));
    assert_eq!(m.lookup(&tokens(0, 40), KEYS).tokens, 0);
}
