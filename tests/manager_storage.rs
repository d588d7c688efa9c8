//! The storage tier: what goes down to it, what comes back and when, prefetching, and tiers that fail, come and
//! go.

#[path = "common/manager.rs"]
mod common;

use common::{FULL, KEYS, tokens, transfers};
use hybridkv::manager::{
    BreakerConfig, BreakerState, Completion, CostModel, Direction, HostConfig, Manager, Outcome,
    PrefetchPolicy, StorageConfig, StoredBlock, Tier, Transfer, WritePolicy,
};
use hybridkv::spec::AttentionKind;
use hybridkv::{Error, ErrorKind};

const SECOND: u64 = 1_000_000_000;

fn manager(kinds: &[AttentionKind], num_blocks: u32, host: HostConfig) -> Manager {
    common::manager(kinds, num_blocks, Some(host))
}

fn with_storage(num_blocks: u32, host_slots: u32, config: StorageConfig) -> Manager {
    let mut m = manager(&[FULL], num_blocks, HostConfig::new(host_slots));
    m.attach_storage(config, &[]).unwrap();
    m
}

fn longer(prompt: &[u32]) -> Vec<u32> {
    [prompt, &[7]].concat()
}

fn of(transfers: &[Transfer], direction: Direction) -> usize {
    transfers.iter().filter(|t| t.path.direction() == direction).count()
}

/// Answers everything until nothing is under way; gives the transfers and what was told of sequences.
fn run(
    m: &mut Manager,
    outcome: impl Fn(&Transfer) -> Outcome,
) -> (Vec<Transfer>, Vec<Completion>) {
    let (mut all, mut told) = (Vec::new(), Vec::new());
    while let Some(transfer) = m.next_transfer() {
        told.push(m.complete(transfer.id, outcome(&transfer)).unwrap());
        all.push(transfer);
    }
    told.extend(std::iter::from_fn(|| m.next_completion()));
    told.retain(|completion| *completion != Completion::Pending);
    (all, told)
}

fn run_well(m: &mut Manager) -> (Vec<Transfer>, Vec<Completion>) {
    run(m, |_| Outcome::Succeeded)
}

fn serve(m: &mut Manager, seq: u64, prompt: &[u32]) {
    m.allocate(seq, prompt, KEYS, 0).unwrap();
    m.advance(seq, prompt.len(), prompt.len()).unwrap();
    m.free(seq).unwrap();
    run_well(m);
}

/// Tokens that device, device and host, and all tiers can serve.
fn hit(m: &Manager, prompt: &[u32]) -> [usize; 3] {
    let hit = m.lookup(&longer(prompt), KEYS);
    [hit.device_tokens, hit.host_tokens, hit.tokens]
}

/// A manager in which a prompt of four blocks is in storage only: device and host have forgotten it.
fn stored(config: StorageConfig, prompt: &[u32]) -> Manager {
    let mut m = with_storage(9, 8, config);
    serve(&mut m, 1, prompt);
    assert_eq!(m.stats().persists.succeeded, 4);
    m.clear_host();
    m.allocate(2, &tokens(1_000_000, 128), KEYS, 0).unwrap();
    m.abort(2).unwrap();
    assert_eq!(hit(&m, prompt), [0, 0, 64]);
    m
}

#[test]
fn only_settled_blocks_go_to_storage() {
    let mut m = with_storage(17, 16, StorageConfig::new(16));
    let prompt = tokens(0, 64);
    m.allocate(1, &prompt, KEYS, 0).unwrap();
    m.advance(1, 64, 32).unwrap();
    let (all, _) = run_well(&mut m);
    assert_eq!((of(&all, Direction::Offload), of(&all, Direction::Persist)), (4, 2));
    // The step fails: what it wrote is on no tier.
    m.abort(1).unwrap();
    run_well(&mut m);
    m.clear_host();
    assert_eq!(hit(&m, &prompt)[2], 32);
    assert_eq!(m.usage().storage_used, 2);
}

#[test]
fn what_a_failed_step_wrote_is_disowned_whoever_had_it_stored() {
    // The second sequence, which hit the block of a step in flight, had it written; its settling says nothing
    // of that step.
    let host = HostConfig::new(16).with_write(WritePolicy::Selective { uses: 2 });
    let mut m = manager(&[FULL], 17, host);
    m.attach_storage(StorageConfig::new(16), &[]).unwrap();
    let prompt = tokens(0, 32);
    m.allocate(1, &prompt, KEYS, 0).unwrap();
    m.advance(1, 32, 0).unwrap();
    m.allocate(2, &longer(&prompt), KEYS, 0).unwrap();
    m.advance(2, 33, 33).unwrap();
    let (all, _) = run_well(&mut m);
    assert_eq!((of(&all, Direction::Offload), of(&all, Direction::Persist)), (2, 0));
    assert_eq!(m.abort(1).unwrap(), [2]);
    m.abort(2).unwrap();
    assert_eq!(hit(&m, &prompt), [0, 0, 0]);
    // Once the writer has settled it goes down, whoever had it stored.
    m.allocate(3, &prompt, KEYS, 0).unwrap();
    m.advance(3, 32, 0).unwrap();
    m.allocate(4, &longer(&prompt), KEYS, 0).unwrap();
    m.advance(4, 33, 32).unwrap();
    run_well(&mut m);
    m.advance(3, 32, 32).unwrap();
    assert_eq!(of(&run_well(&mut m).0, Direction::Persist), 2);
}

#[test]
fn a_load_from_storage_goes_through_the_host_and_is_ready_when_all_has_come() {
    let prompt = tokens(0, 64);
    let mut m = stored(StorageConfig::new(16), &prompt);
    let allocation = m.allocate(3, &longer(&prompt), KEYS, 0).unwrap();
    assert_eq!((allocation.hit_tokens, allocation.loads.len()), (64, 4));
    assert_eq!((allocation.device_hit_tokens, allocation.host_hit_tokens), (0, 0));
    let fetches = transfers(&mut m);
    assert_eq!(of(&fetches, Direction::Fetch), 4);
    assert!(m.advance(3, 65, 65).is_err(), "not ready");
    for fetch in &fetches {
        assert_eq!(m.complete(fetch.id, Outcome::Succeeded).unwrap(), Completion::Pending);
    }
    assert_eq!(hit(&m, &prompt), [0, 64, 64], "on the host now, not on the device");
    let onboards = transfers(&mut m);
    let ids: Vec<u64> = onboards.iter().map(|t| t.id).collect();
    assert_eq!(ids, allocation.loads, "under the names that the allocation gave");
    let mut last = Completion::Pending;
    for onboard in &onboards {
        last = m.complete(onboard.id, Outcome::Succeeded).unwrap();
    }
    assert_eq!(last, Completion::Ready { seq: 3, valid_tokens: 64 });
    m.advance(3, 65, 65).unwrap();
}

#[test]
fn r1_a_storage_slot_is_not_evicted_while_it_is_wanted() {
    let prompt = tokens(0, 64);
    let mut m = stored(StorageConfig { max_fetches: 1, ..StorageConfig::new(4) }, &prompt);
    m.allocate(3, &longer(&prompt), KEYS, 0).unwrap();
    let first = transfers(&mut m);
    assert_eq!(first.len(), 1, "one at a time; the others wait");
    // Another prompt would need all four slots.
    m.allocate(4, &tokens(5000, 32), KEYS, 0).unwrap();
    m.advance(4, 32, 32).unwrap();
    let stores = transfers(&mut m);
    for store in &stores {
        m.complete(store.id, Outcome::Succeeded).unwrap();
    }
    assert_eq!(m.next_transfer(), None, "no room in storage");
    assert_eq!(m.usage().storage_pinned, 4);
    m.complete(first[0].id, Outcome::Succeeded).unwrap();
    let (_, told) = run_well(&mut m);
    assert_eq!(told, [Completion::Ready { seq: 3, valid_tokens: 64 }]);
}

#[test]
fn r8_what_cannot_be_fetched_is_a_miss_and_gone_from_storage() {
    let prompt = tokens(0, 64);
    let mut m = stored(StorageConfig::new(16), &prompt);
    m.allocate(3, &longer(&prompt), KEYS, 0).unwrap();
    let third = m.hash(&prompt, KEYS).hashes()[2];
    let (_, told) = run(&mut m, |t| match (t.path.direction(), t.hash == third) {
        (Direction::Fetch, true) => Outcome::Failed,
        _ => Outcome::Succeeded,
    });
    assert_eq!(told, [Completion::Ready { seq: 3, valid_tokens: 32 }]);
    assert_eq!(m.usage().storage_used, 3);
    m.abort(3).unwrap();
    assert_eq!(hit(&m, &prompt)[2], 32);
}

#[test]
fn sequences_share_a_fetch_and_each_is_told() {
    let prompt = tokens(0, 48);
    for outcome in [Outcome::Succeeded, Outcome::Failed] {
        let mut m = with_storage(17, 8, StorageConfig::new(16));
        serve(&mut m, 1, &prompt);
        m.clear_host();
        m.allocate(2, &tokens(1_000_000, 256), KEYS, 0).unwrap();
        m.abort(2).unwrap();
        m.allocate(3, &longer(&prompt), KEYS, 0).unwrap();
        m.allocate(4, &longer(&prompt), KEYS, 0).unwrap();
        let (all, mut told) = run(&mut m, |t| match t.path.direction() {
            Direction::Fetch => outcome,
            _ => Outcome::Succeeded,
        });
        assert_eq!(of(&all, Direction::Fetch), 3);
        let valid_tokens = if outcome == Outcome::Succeeded { 48 } else { 0 };
        told.sort_by_key(|completion| format!("{completion:?}"));
        let expected = [3, 4].map(|seq| Completion::Ready { seq, valid_tokens });
        assert_eq!(told, expected);
    }
}

#[test]
fn r10_a_load_whose_sequence_is_gone_reaches_no_other_of_its_name() {
    let prompt = tokens(0, 48);
    let mut m = with_storage(17, 8, StorageConfig { max_fetches: 1, ..StorageConfig::new(16) });
    serve(&mut m, 1, &prompt);
    m.clear_host();
    m.allocate(2, &tokens(1_000_000, 256), KEYS, 0).unwrap();
    m.abort(2).unwrap();
    m.allocate(3, &longer(&prompt), KEYS, 0).unwrap();
    let old = transfers(&mut m);
    m.free(3).unwrap();
    m.allocate(3, &tokens(9000, 17), KEYS, 0).unwrap();
    m.complete(old[0].id, Outcome::Succeeded).unwrap();
    let (_, told) = run_well(&mut m);
    assert!(told.is_empty(), "{told:?}");
    m.free(3).unwrap();
    assert_eq!((m.free_blocks(), m.usage().storage_pinned, m.usage().host_pinned), (16, 0, 0));
}

#[test]
fn what_storage_holds_is_found_after_a_restart() {
    let prompt = tokens(0, 64);
    let mut m = stored(StorageConfig::new(16), &prompt);
    let mut fresh = manager(&[FULL], 9, HostConfig::new(8));
    let hashes = m.hash(&prompt, KEYS).hashes().to_vec();
    let block = |slot, hash| StoredBlock { slot, group: 0, hash };
    let blocks: Vec<StoredBlock> =
        hashes.iter().enumerate().map(|(i, &hash)| block(5 + i as u32, hash)).collect();
    let bad = |blocks: &[StoredBlock], m: &mut Manager| {
        let error = m.attach_storage(StorageConfig::new(9), blocks).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::InvalidArgument(_)), "{error}");
        assert_eq!(hit(m, &prompt), [0, 0, 0], "nothing is changed");
    };
    bad(&[block(9, hashes[0])], &mut fresh);
    bad(&[block(1, hashes[0]), block(1, hashes[1])], &mut fresh);
    bad(&[block(1, hashes[0]), block(2, hashes[0])], &mut fresh);
    bad(&[StoredBlock { group: 1, ..block(1, hashes[0]) }], &mut fresh);
    fresh.attach_storage(StorageConfig::new(9), &blocks).unwrap();
    assert_eq!(hit(&fresh, &prompt), [0, 0, 64]);
    // R7: its slots are taken, the oldest of them give way first.
    serve(&mut fresh, 1, &tokens(1000, 96));
    assert_eq!(fresh.usage().storage_used, 9);
    let left = (0..4).filter(|&i| {
        let wanted = fresh.hash(&prompt, KEYS).hashes()[i];
        fresh.allocate(9, &longer(&prompt), KEYS, 0).is_ok_and(|_| {
            let fetches = transfers(&mut fresh);
            fetches.iter().for_each(|t| drop(fresh.complete(t.id, Outcome::Failed)));
            run_well(&mut fresh);
            fresh.abort(9).unwrap();
            fetches.iter().any(|t| t.hash == wanted)
        })
    });
    assert_eq!(left.count(), 0, "a prefix without its start is no hit");
    assert!(m.attach_storage(StorageConfig::new(9), &[]).is_err(), "attached already");
}

fn prefetched(policy: PrefetchPolicy, prompt: &[u32]) -> Manager {
    let config =
        StorageConfig { prefetch: policy, prefetch_threshold: 64, ..StorageConfig::new(16) };
    let mut m = stored(config, prompt);
    let tokens = m.hash(&longer(prompt), KEYS);
    let begun = m.prefetch(3, &tokens, 10 * SECOND).unwrap();
    assert_eq!((begun.hit_tokens, begun.blocks), (64, 4));
    m
}

#[test]
fn best_effort_starts_with_what_has_arrived() {
    let prompt = tokens(0, 64);
    let mut m = prefetched(PrefetchPolicy::BestEffort, &prompt);
    assert_eq!(m.poll_prefetch(10 * SECOND).unwrap(), [3]);
    assert!(m.poll_prefetch(10 * SECOND).unwrap().is_empty(), "told once");
    let fetches = transfers(&mut m);
    for fetch in &fetches[..2] {
        m.complete(fetch.id, Outcome::Succeeded).unwrap();
    }
    let allocation = m.allocate(3, &longer(&prompt), KEYS, 0).unwrap();
    assert_eq!((allocation.hit_tokens, allocation.loads.len()), (32, 2));
    for fetch in &fetches[2..] {
        m.complete(fetch.id, Outcome::Succeeded).unwrap();
    }
    assert_eq!(hit(&m, &prompt)[1], 64, "what comes later is on the host");
}

#[test]
fn wait_complete_waits_for_the_last_block() {
    let prompt = tokens(0, 64);
    let mut m = prefetched(PrefetchPolicy::WaitComplete, &prompt);
    let fetches = transfers(&mut m);
    for (i, fetch) in fetches.iter().enumerate() {
        assert!(m.poll_prefetch(10_000 * SECOND).unwrap().is_empty());
        // One that fails is over, too.
        let outcome = if i == 3 { Outcome::Failed } else { Outcome::Succeeded };
        m.complete(fetch.id, outcome).unwrap();
    }
    assert_eq!(m.poll_prefetch(10_000 * SECOND).unwrap(), [3]);
    assert_eq!(m.allocate(3, &longer(&prompt), KEYS, 0).unwrap().hit_tokens, 48);
}

#[test]
fn a_prefetch_has_a_second_and_a_quarter_more_for_a_thousand_tokens() {
    let prompt = tokens(0, 64);
    let mut m = prefetched(PrefetchPolicy::default(), &prompt);
    let deadline = 11 * SECOND + SECOND / 4 * 64 / 1024;
    assert!(m.poll_prefetch(deadline - 1).unwrap().is_empty());
    let error = m.poll_prefetch(deadline - 2).unwrap_err();
    assert!(error.to_string().contains("time goes back"), "{error}");
    assert_eq!(m.poll_prefetch(deadline).unwrap(), [3]);
}

#[test]
fn r1_what_was_prefetched_stays_for_who_asked() {
    let prompt = tokens(0, 64);
    let mut m = prefetched(PrefetchPolicy::WaitComplete, &prompt);
    run_well(&mut m);
    // Everybody else's blocks must do with the other four slots.
    serve(&mut m, 4, &tokens(5000, 112));
    assert_eq!(hit(&m, &prompt)[1], 64);
    assert_eq!(m.usage().host_pinned, 4);
    let tokens = m.hash(&longer(&prompt), KEYS);
    let error = m.prefetch(3, &tokens, 10 * SECOND).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::DuplicateSequence(3)));
    assert!(m.cancel_prefetch(3) && !m.cancel_prefetch(3));
    assert_eq!(m.usage().host_pinned, 0);
}

#[test]
fn a_prefetch_that_saves_little_or_holds_too_much_is_not_started() {
    let prompt = tokens(0, 64);
    let config = StorageConfig { prefetch_threshold: 65, ..StorageConfig::new(16) };
    let mut m = stored(config, &prompt);
    let hashed = m.hash(&longer(&prompt), KEYS);
    assert_eq!(m.prefetch(3, &hashed, 0).unwrap().blocks, 0);
    assert_eq!(m.allocate(3, &longer(&prompt), KEYS, 0).unwrap().hit_tokens, 64, "loads itself");
    // Half of eight slots.
    let mut m = prefetched(PrefetchPolicy::WaitComplete, &prompt);
    let hashed = m.hash(&longer(&prompt), KEYS);
    assert_eq!(m.prefetch(4, &hashed, 10 * SECOND).unwrap().blocks, 0);
}

#[test]
fn a_load_that_saves_too_little_is_computed() {
    let prompt = tokens(0, 64);
    for (threshold, hit_tokens) in [(64, 64), (65, 0)] {
        let host = HostConfig { load_back_threshold: threshold, ..HostConfig::new(16) };
        let mut m = manager(&[FULL], 9, host);
        serve(&mut m, 1, &prompt);
        m.allocate(2, &tokens(1_000_000, 128), KEYS, 0).unwrap();
        m.abort(2).unwrap();
        assert_eq!(m.allocate(3, &longer(&prompt), KEYS, 0).unwrap().hit_tokens, hit_tokens);
    }
}

#[test]
fn a_slow_tier_loses_to_computing() {
    let prompt = tokens(0, 64);
    let mut m = stored(StorageConfig::new(16), &prompt);
    let fast = CostModel {
        prefill_tokens_per_s: 1000.0,
        onboard_bytes_per_s: 1e9,
        fetch_bytes_per_s: 1e9,
        block_bytes: 1 << 20,
    };
    m.set_cost_model(Some(fast)).unwrap();
    assert_eq!(hit(&m, &prompt)[2], 64);
    m.set_cost_model(Some(CostModel { fetch_bytes_per_s: 1e6, ..fast })).unwrap();
    assert_eq!(hit(&m, &prompt)[2], 0, "4 MiB at 1 MB/s for 64 ms of computing");
    let error = m.set_cost_model(Some(CostModel { fetch_bytes_per_s: 0.0, ..fast })).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Unsupported { .. }));
    assert_eq!(hit(&m, &prompt)[2], 0, "unchanged");
    m.set_cost_model(None).unwrap();
    assert_eq!(hit(&m, &prompt)[2], 64);
}

#[test]
fn a_storage_that_fails_is_left_alone_and_tried_again_later() {
    let prompt = tokens(0, 64);
    let breaker = BreakerConfig { failures: 2, retry_ns: SECOND };
    let config = StorageConfig { breaker, max_fetches: 2, ..StorageConfig::new(32) };
    let mut m = stored(config, &prompt);
    m.tick(5 * SECOND).unwrap();
    m.allocate(3, &longer(&prompt), KEYS, 0).unwrap();
    let fetches = transfers(&mut m);
    assert_eq!(fetches.len(), 2);
    m.complete(fetches[0].id, Outcome::Failed).unwrap();
    assert_eq!(m.stats().storage_breaker, BreakerState::Closed);
    m.complete(fetches[1].id, Outcome::Failed).unwrap();
    assert_eq!(m.stats().storage_breaker, BreakerState::Open);
    // The third had begun. The sequence does not wait for the fourth from a tier that is left alone.
    let begun = transfers(&mut m);
    assert_eq!(begun.len(), 1);
    let told = m.complete(begun[0].id, Outcome::Succeeded).unwrap();
    assert_eq!(told, Completion::Pending, "up to the device");
    let (all, told) = run_well(&mut m);
    assert_eq!((all.len(), of(&all, Direction::Onboard)), (1, 1));
    assert_eq!(told, [Completion::Ready { seq: 3, valid_tokens: 0 }]);
    m.abort(3).unwrap();
    serve(&mut m, 4, &tokens(3000, 48));
    assert_eq!(m.stats().persists.started, 4, "nothing more goes down");
    m.clear_host();
    assert_eq!(hit(&m, &prompt)[2], 0, "nothing is found there");
    // After a second one transfer tries.
    m.allocate(5, &tokens(4000, 48), KEYS, 0).unwrap();
    m.advance(5, 48, 48).unwrap();
    let offloads = transfers(&mut m);
    m.tick(6 * SECOND).unwrap();
    for offload in &offloads {
        m.complete(offload.id, Outcome::Succeeded).unwrap();
    }
    let probe = transfers(&mut m);
    assert_eq!((probe.len(), m.stats().storage_breaker), (1, BreakerState::HalfOpen));
    m.complete(probe[0].id, Outcome::Succeeded).unwrap();
    assert_eq!(m.stats().storage_breaker, BreakerState::Closed);
    assert_eq!(of(&run_well(&mut m).0, Direction::Persist), 2, "the others follow");
}

#[test]
fn a_host_that_fails_is_left_alone() {
    let breaker = BreakerConfig { failures: 3, retry_ns: SECOND };
    let mut m = manager(&[FULL], 33, HostConfig { breaker, ..HostConfig::new(64) });
    m.allocate(1, &tokens(0, 64), KEYS, 0).unwrap();
    m.advance(1, 64, 64).unwrap();
    run(&mut m, |_| Outcome::Failed);
    assert_eq!(m.stats().host_breaker, BreakerState::Open);
    m.allocate(2, &tokens(1000, 64), KEYS, 0).unwrap();
    m.advance(2, 64, 64).unwrap();
    assert!(transfers(&mut m).is_empty());
    m.tick(SECOND).unwrap();
    m.advance(2, 64, 64).unwrap();
    let probe = transfers(&mut m);
    assert_eq!((probe.len(), m.stats().host_breaker), (1, BreakerState::HalfOpen));
    m.complete(probe[0].id, Outcome::Succeeded).unwrap();
    m.advance(2, 64, 64).unwrap();
    assert_eq!(transfers(&mut m).len(), 3);
}

#[test]
fn storage_can_be_detached_under_way_and_attached_again() {
    let prompt = tokens(0, 64);
    let mut m = stored(StorageConfig { max_fetches: 1, ..StorageConfig::new(16) }, &prompt);
    m.record_events(true);
    m.allocate(3, &longer(&prompt), KEYS, 0).unwrap();
    let fetches = transfers(&mut m);
    assert_eq!(fetches.len(), 1);
    assert_eq!(m.detach_storage(), 1, "one is still to be answered");
    assert!(m.events().iter().any(|event| event.tier == Tier::Storage));
    let refused = |m: &mut Manager| m.attach_storage(StorageConfig::new(16), &[]).is_err();
    assert!(refused(&mut m), "its slot is in use");
    // R10: what comes from a tier that is gone is dropped.
    let told = m.complete(fetches[0].id, Outcome::Succeeded).unwrap();
    assert_eq!(told, Completion::Ready { seq: 3, valid_tokens: 0 });
    assert_eq!(m.usage().storage_capacity, 0);
    assert!(!refused(&mut m));
    m.abort(3).unwrap();
    assert_eq!(hit(&m, &prompt)[2], 0);
    serve(&mut m, 4, &prompt);
    m.clear_host();
    assert_eq!(m.usage().storage_used, 4);
}

#[test]
fn the_host_can_be_detached_under_way_and_attached_again() {
    let prompt = tokens(0, 64);
    let mut m = manager(&[FULL], 9, HostConfig::new(16));
    serve(&mut m, 1, &prompt);
    m.allocate(2, &tokens(1_000_000, 128), KEYS, 0).unwrap();
    m.abort(2).unwrap();
    m.allocate(3, &longer(&prompt), KEYS, 0).unwrap();
    let loads = transfers(&mut m);
    assert_eq!(m.detach_host(), 4);
    let refused = |m: &mut Manager| m.attach_host(HostConfig::new(4)).is_err();
    assert!(refused(&mut m), "its slots are read");
    let mut told = Completion::Pending;
    for load in &loads {
        told = m.complete(load.id, Outcome::Succeeded).unwrap();
    }
    assert_eq!(told, Completion::Ready { seq: 3, valid_tokens: 0 }, "a disowned copy is a miss");
    m.advance(3, 65, 65).unwrap();
    assert!(transfers(&mut m).is_empty(), "no host, no offload");
    let error: Error = m.attach_storage(StorageConfig::new(4), &[]).unwrap_err();
    assert!(error.to_string().contains("needs a host tier"), "{error}");
    assert!(!refused(&mut m));
    m.free(3).unwrap();
    serve(&mut m, 4, &tokens(0, 32));
    assert_eq!(m.usage().host_used, 2);
}

#[test]
fn hybrid_groups_store_and_load_live_windows_only() {
    let sliding = AttentionKind::Sliding { window: 33 };
    let mut m = manager(&[FULL, sliding], 41, HostConfig::new(64));
    m.attach_storage(StorageConfig::new(64), &[]).unwrap();
    let prompt = tokens(0, 256);
    serve(&mut m, 1, &prompt);
    m.clear_host();
    m.allocate(2, &tokens(1_000_000, 320), KEYS, 0).unwrap();
    m.abort(2).unwrap();
    assert_eq!(hit(&m, &prompt), [0, 0, 256]);
    m.allocate(3, &longer(&prompt), KEYS, 0).unwrap();
    let (all, told) = run_well(&mut m);
    assert_eq!((of(&all, Direction::Fetch), of(&all, Direction::Onboard)), (18, 18));
    assert_eq!(told, [Completion::Ready { seq: 3, valid_tokens: 256 }]);
}
