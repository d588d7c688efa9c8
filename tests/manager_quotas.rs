//! Quotas of tenants and pins of prefixes: who gives way to whom, and what never leaves.

#[path = "common/manager.rs"]
mod common;

use std::collections::HashMap;

use common::{FULL, KEYS, tokens, transfers};
use hybridkv::manager::{
    Direction, EventKind, Eviction, ExtraKeys, HostConfig, Manager, Outcome, Quota, StorageConfig,
    Tier, WritePolicy,
};
use hybridkv::ops::synthetic::splitmix64;
use hybridkv::spec::AttentionKind;
use hybridkv::{Error, ErrorKind};

const BLOCK: u64 = 4096;

fn of(salt: &'static str) -> ExtraKeys<'static> {
    ExtraKeys { salt, lora: "" }
}

fn blocks(n: u64) -> Option<Quota> {
    Some(Quota::of_bytes(n * BLOCK + 1, BLOCK).unwrap())
}

fn run_all(m: &mut Manager) {
    while m.transfers_in_flight() > 0 {
        for transfer in transfers(m) {
            m.complete(transfer.id, Outcome::Succeeded).unwrap();
        }
    }
}

/// Computes a prompt, has it stored, and frees it.
fn compute(m: &mut Manager, seq: u64, prompt: &[u32], salt: &'static str) {
    m.allocate(seq, prompt, of(salt), 0).unwrap();
    m.advance(seq, prompt.len(), prompt.len()).unwrap();
    run_all(m);
    m.free(seq).unwrap();
    run_all(m);
}

/// Blocks from its start on that a tier has of a prompt, by the events.
struct Held(HashMap<(Tier, [u8; 16]), ()>);

impl Held {
    fn follow(&mut self, m: &mut Manager) {
        for event in m.events() {
            for hash in &event.hashes {
                let key = (event.tier, hash.as_bytes()[..16].try_into().unwrap());
                match event.kind {
                    EventKind::Stored => drop(self.0.insert(key, ())),
                    EventKind::Removed => drop(self.0.remove(&key)),
                    EventKind::Cleared => self.0.retain(|(tier, _), ()| *tier != event.tier),
                }
            }
        }
    }

    fn of(&self, m: &Manager, tier: Tier, prompt: &[u32], salt: &'static str) -> usize {
        let hashed = m.hash(prompt, of(salt));
        let has = |hash: &&hybridkv::manager::BlockHash| {
            self.0.contains_key(&(tier, hash.as_bytes()[..16].try_into().unwrap()))
        };
        hashed.hashes().iter().filter(has).count()
    }
}

fn manager(host: HostConfig) -> (Manager, Held) {
    let mut m = common::manager(&[FULL], 257, Some(host));
    m.record_events(true);
    (m, Held(HashMap::new()))
}

#[test]
fn a_tenant_at_its_quota_makes_room_by_its_own_blocks() {
    for eviction in [Eviction::Lru, Eviction::Fifo, Eviction::Reuse] {
        let (mut m, mut held) = manager(HostConfig { eviction, ..HostConfig::new(16) });
        m.attach_storage(StorageConfig { eviction, ..StorageConfig::new(12) }, &[]).unwrap();
        m.set_quota(Tier::Host, "greedy", blocks(4)).unwrap();
        m.set_quota(Tier::Storage, "greedy", blocks(2)).unwrap();
        let (other, greedy) = (tokens(0, 64), tokens(1000, 96));
        compute(&mut m, 1, &other, "quiet");
        for n in 0..20 {
            compute(&mut m, 10 + n, &tokens(1000 * n as u32, 96), "greedy");
            assert!(m.quota_used(Tier::Host, "greedy").unwrap() <= 4);
            assert!(m.quota_used(Tier::Storage, "greedy").unwrap() <= 2);
        }
        held.follow(&mut m);
        assert_eq!(held.of(&m, Tier::Host, &other, "quiet"), 4, "{eviction:?}");
        assert_eq!(held.of(&m, Tier::Storage, &other, "quiet"), 4, "{eviction:?}");
        assert_eq!(m.quota_used(Tier::Host, "greedy"), Some(4));
        assert_eq!(m.quota_used(Tier::Host, "quiet"), None, "no quota");
        let last = tokens(19_000, 96);
        assert_eq!(held.of(&m, Tier::Host, &last, "greedy"), 4);
        assert_eq!(held.of(&m, Tier::Host, &greedy, "greedy"), 0);
    }
}

#[test]
fn who_is_over_a_lowered_quota_gives_way_first() {
    let (mut m, mut held) = manager(HostConfig::new(12));
    m.set_quota(Tier::Host, "a", blocks(8)).unwrap();
    let (a, b) = (tokens(0, 128), tokens(1000, 64));
    compute(&mut m, 1, &b, "b");
    compute(&mut m, 2, &a, "a");
    m.set_quota(Tier::Host, "a", blocks(2)).unwrap();
    // By recency those of `b` would be next.
    for n in 0..6 {
        compute(&mut m, 10 + n, &tokens(2000 + 100 * n as u32, 16), "c");
    }
    held.follow(&mut m);
    assert_eq!(held.of(&m, Tier::Host, &a, "a"), 2);
    assert_eq!(held.of(&m, Tier::Host, &b, "b"), 4);
    // Down to its quota it is like everybody else, and without one there is no limit.
    compute(&mut m, 20, &tokens(3000, 16), "c");
    held.follow(&mut m);
    assert_eq!(held.of(&m, Tier::Host, &b, "b"), 3);
    m.set_quota(Tier::Host, "a", None).unwrap();
    compute(&mut m, 21, &tokens(5000, 160), "a");
    assert!(m.quota_used(Tier::Host, "a").unwrap() >= 10);
}

#[test]
fn quotas_hold_for_write_back_prefetches_and_sequences_that_are_swapped_out() {
    let host = HostConfig::new(32).with_write(WritePolicy::Back);
    let (mut m, _) = manager(host);
    m.attach_storage(StorageConfig { prefetch_threshold: 1, ..StorageConfig::new(64) }, &[])
        .unwrap();
    m.set_quota(Tier::Host, "t", blocks(4)).unwrap();
    compute(&mut m, 1, &tokens(0, 160), "t");
    for filler in 0..2 {
        let all = tokens(100_000 * (filler + 1), 4096);
        while m.allocate(9, &all, KEYS, 0).is_err() {
            run_all(&mut m);
        }
        m.abort(9).unwrap();
    }
    assert_eq!(m.quota_used(Tier::Host, "t"), Some(4));
    // Swapping out needs as many slots as it has blocks.
    m.allocate(2, &tokens(7000, 80), of("t"), 0).unwrap();
    m.advance(2, 80, 80).unwrap();
    let error = m.preempt(2).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::NoHostSlots { needed: 5, free: 4 }), "{error}");
    m.set_quota(Tier::Host, "t", blocks(5)).unwrap();
    assert_eq!(m.preempt(2).unwrap().offloads, 5);
    run_all(&mut m);
    assert_eq!(m.quota_used(Tier::Host, "t"), Some(5));
    let more = m.hash(&tokens(0, 161), of("t"));
    m.prefetch(3, &more, 0).unwrap();
    run_all(&mut m);
    assert_eq!(m.quota_used(Tier::Host, "t"), Some(5), "all of them are pinned");
    m.resume(2).unwrap();
    run_all(&mut m);
    m.free(2).unwrap();
}

#[test]
fn a_tenant_whose_quota_is_pinned_loses_what_it_writes_back() {
    let (mut m, _) = manager(HostConfig::new(32).with_write(WritePolicy::Back));
    m.set_quota(Tier::Host, "t", blocks(4)).unwrap();
    let flood = |m: &mut Manager, first| {
        while m.allocate(9, &tokens(first, 4096), KEYS, 0).is_err() {
            run_all(m);
        }
        m.abort(9).unwrap();
    };
    let [first, second, other] = [0, 1000, 2000].map(|start| tokens(start, 65));
    compute(&mut m, 1, &first, "t");
    flood(&mut m, 100_000);
    m.pin(Tier::Host, &m.hash(&first, of("t"))).unwrap();
    compute(&mut m, 2, &second, "t");
    compute(&mut m, 3, &other, "u");
    assert_eq!(m.stats().evictions_dropped, 0);
    flood(&mut m, 200_000);
    assert_eq!(m.stats().evictions_dropped, 4, "nobody waits for ever, and nobody else gives way");
    assert_eq!(m.quota_used(Tier::Host, "t"), Some(4));
    for (prompt, salt, tokens) in [(&first, "t", 64), (&second, "t", 0), (&other, "u", 64)] {
        assert_eq!(m.lookup(prompt, of(salt)).host_tokens, tokens, "{salt}");
    }
}

#[test]
fn quotas_that_mean_nothing_are_refused() {
    let refused = |bytes, block| {
        let error = Quota::of_bytes(bytes, block).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::QuotaTooSmall { .. }), "{error}");
        error.to_string()
    };
    assert!(refused(4095, 4096).contains("4095 bytes holds no block of 4096"));
    refused(0, 4096);
    refused(100, 0);
    assert_eq!(Quota::of_bytes(8191, 4096).unwrap().blocks(), 1);
    let (mut m, _) = manager(HostConfig::new(4));
    let error = m.set_quota(Tier::Device, "t", blocks(1)).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Unsupported { .. }), "{error}");
    assert_eq!(m.quota_used(Tier::Host, "t"), None);
}

fn too_large(error: &Error) -> (usize, usize, usize) {
    match error.kind() {
        ErrorKind::PinTooLarge { needed, pinned, limit, .. } => (*needed, *pinned, *limit),
        _ => panic!("{error}"),
    }
}

#[test]
fn what_is_pinned_never_leaves_its_tier() {
    let window = AttentionKind::Sliding { window: 33 };
    let mut m = common::manager(&[FULL, window], 65, Some(HostConfig::new(20)));
    let prompt = tokens(0, 64);
    compute(&mut m, 1, &prompt, "");
    let hashed = m.hash(&prompt, KEYS);
    let host = m.pin(Tier::Host, &hashed).unwrap();
    assert_eq!((host.tokens, host.blocks), (64, 6), "four of the full group, two of the window");
    for n in 0..10 {
        compute(&mut m, 10 + n, &tokens(1000 * (n as u32 + 1), 512), "");
    }
    let longer = [&prompt[..], &[7]].concat();
    assert_eq!(m.lookup(&longer, KEYS).host_tokens, 64, "ten times the tier went through it");
    assert_eq!(m.lookup(&longer, KEYS).device_tokens, 0);
    // Ten slots may be pinned, six are.
    let other = m.hash(&tokens(10_000, 512), KEYS);
    let error = m.pin(Tier::Host, &other).unwrap_err();
    assert_eq!((too_large(&error).1, too_large(&error).2), (6, 10), "{error}");
    assert!(error.to_string().contains("of the host tier"), "{error}");
    m.unpin(host.id).unwrap();
    let unknown = m.unpin(host.id).unwrap_err();
    assert!(matches!(unknown.kind(), ErrorKind::UnknownPin(id) if *id == host.id), "{unknown}");
    for n in 0..10 {
        compute(&mut m, 30 + n, &tokens(1000 * (n as u32 + 50), 512), "");
    }
    assert_eq!(m.lookup(&longer, KEYS).tokens, 0, "like any other");
}

#[test]
fn device_pins_leave_room_for_the_longest_request() {
    let mut m = common::manager(&[FULL], 65, None);
    let prompt = tokens(0, 64);
    compute(&mut m, 1, &prompt, "");
    // The pool was sized for a request that takes all of it.
    let hashed = m.hash(&prompt, KEYS);
    let error = m.pin(Tier::Device, &hashed).unwrap_err();
    assert_eq!(too_large(&error), (4, 0, 0), "{error}");

    let config = m.config().clone();
    let config = hybridkv::manager::ManagerConfig { max_model_len: 512, ..config };
    let mut m = Manager::new(config).unwrap();
    compute(&mut m, 1, &prompt, "");
    let pin = m.pin(Tier::Device, &hashed).unwrap();
    assert_eq!((pin.tokens, m.free_blocks()), (64, 60));
    let longest = tokens(5000, 512);
    for seq in 10..20 {
        compute(&mut m, seq, &longest, "");
    }
    let longer = [&prompt[..], &[7]].concat();
    assert_eq!(m.lookup(&longer, KEYS).device_tokens, 64);
    assert!(!m.reset_prefix_cache(), "a pinned block is in use");
    m.unpin(pin.id).unwrap();
    assert_eq!(m.free_blocks(), 64);
    assert!(m.reset_prefix_cache());
    let none = m.pin(Tier::Storage, &hashed).unwrap();
    assert_eq!((none.tokens, none.blocks), (0, 0));
}

#[test]
fn pins_end_with_the_tier_they_are_in() {
    let (mut m, _) = manager(HostConfig::new(16));
    m.attach_storage(StorageConfig::new(16), &[]).unwrap();
    let prompt = tokens(0, 64);
    compute(&mut m, 1, &prompt, "");
    let hashed = m.hash(&prompt, KEYS);
    let pins = [Tier::Host, Tier::Storage].map(|tier| m.pin(tier, &hashed).unwrap());
    assert_eq!(pins.map(|pin| pin.tokens), [64, 64]);
    assert_eq!((m.usage().host_pinned, m.usage().storage_pinned), (4, 4));
    assert_eq!(m.detach_host(), 0);
    m.attach_host(HostConfig::new(16)).unwrap();
    assert_eq!(m.usage().host_used, 0);
    pins.iter().for_each(|pin| m.unpin(pin.id).unwrap());
    compute(&mut m, 2, &prompt, "");
}

/// Tenants with and without quotas, pins that come and go, failing transfers: nobody is ever above his quota, who
/// is at it evicts nobody else, what is pinned stays, and the accounts are those of the events.
#[test]
fn accounts_are_conserved_whatever_happens() {
    const SALTS: [&str; 3] = ["a", "b", ""];
    for seed in 0..60 {
        let mut state = seed;
        let mut below = |n: usize| {
            state = splitmix64(state);
            (state % n as u64) as usize
        };
        let eviction = [Eviction::Lru, Eviction::Lfu, Eviction::Arc][below(3)];
        let write = [WritePolicy::Through, WritePolicy::Back][below(2)];
        let host = HostConfig { eviction, ..HostConfig::new(24).with_write(write) };
        let (mut m, mut held) = manager(host);
        m.attach_storage(StorageConfig::new(16), &[]).unwrap();
        let quota = [("a", 6), ("b", 9)];
        for (salt, most) in quota {
            m.set_quota(Tier::Host, salt, blocks(most)).unwrap();
            m.set_quota(Tier::Storage, salt, blocks(most / 2)).unwrap();
        }
        let prompts: Vec<(&str, Vec<u32>)> = (0..18)
            .map(|i| (SALTS[i % 3], tokens(1000 * i as u32, 32 + 16 * (i as u32 % 4))))
            .collect();
        let mut pins = Vec::new();
        let mut waiting = Vec::new();
        for step in 0..400u64 {
            let (salt, prompt) = &prompts[below(prompts.len())];
            match below(8) {
                0..5 => {
                    let longer = [&prompt[..], &[9]].concat();
                    if m.allocate(step, &longer, of(salt), 0).is_ok() {
                        // One that waits for loads ends before they have come.
                        let _ = m.advance(step, longer.len(), longer.len());
                        m.free(step).unwrap();
                    }
                }
                5 => {
                    let tier = [Tier::Host, Tier::Storage][below(2)];
                    let hashed = m.hash(prompt, of(salt));
                    if let Ok(pin) = m.pin(tier, &hashed) {
                        pins.push((pin, tier, *salt, prompt[..pin.tokens].to_vec()));
                    }
                }
                6 if !pins.is_empty() => {
                    let (pin, ..) = pins.swap_remove(below(pins.len()));
                    m.unpin(pin.id).unwrap();
                }
                _ => {}
            }
            while let Some(transfer) = m.next_transfer() {
                waiting.push(transfer);
            }
            for _ in 0..below(8).min(waiting.len()) {
                let transfer = waiting.swap_remove(below(waiting.len()));
                let fails = transfer.path.direction() == Direction::Offload && below(12) == 0;
                let outcome = if fails { Outcome::Failed } else { Outcome::Succeeded };
                m.complete(transfer.id, outcome).unwrap();
                while m.next_completion().is_some() {}
            }
            held.follow(&mut m);
            for tier in [Tier::Host, Tier::Storage] {
                for (salt, most) in quota {
                    let most = if tier == Tier::Host { most } else { most / 2 } as usize;
                    let used = m.quota_used(tier, salt).unwrap();
                    let of_salt = prompts.iter().filter(|(s, _)| *s == salt);
                    let there: usize = of_salt.map(|(s, p)| held.of(&m, tier, p, s)).sum();
                    // What is on its way is counted, too.
                    assert!(there <= used && used <= most, "seed {seed}: {there} {used} {most}");
                }
            }
            for (_, tier, salt, prompt) in &pins {
                let there = held.of(&m, *tier, prompt, salt);
                assert_eq!(there, prompt.len() / 16, "seed {seed}: a pinned block has left");
            }
        }
        pins.into_iter().for_each(|(pin, ..)| m.unpin(pin.id).unwrap());
        for transfer in waiting {
            m.complete(transfer.id, Outcome::Succeeded).unwrap();
        }
        run_all(&mut m);
        let usage = m.usage();
        assert_eq!((usage.host_pinned, usage.storage_pinned), (0, 0), "seed {seed}");
        assert_eq!(m.free_blocks(), 256, "seed {seed}");
    }
}
