//! Steps that run behind their loads: what they compute is on trial until all the loads have succeeded.

#[path = "common/manager.rs"]
mod common;

use common::{FULL, KEYS, tokens, transfers};
use hybridkv::ErrorKind;
use hybridkv::manager::{Completion, Direction, HostConfig, Manager, Outcome, StorageConfig};
use hybridkv::ops::synthetic::splitmix64;
use hybridkv::spec::AttentionKind;

const WINDOW: AttentionKind = AttentionKind::Sliding { window: 33 };

fn complete_all(m: &mut Manager) -> Vec<Completion> {
    transfers(m).iter().map(|t| m.complete(t.id, Outcome::Succeeded).unwrap()).collect()
}

/// A manager that has computed a prompt, keeps it on the host, and nothing on the device.
fn on_host(kinds: &[AttentionKind], num_blocks: u32, prompt: &[u32]) -> Manager {
    let mut m = common::manager(kinds, num_blocks, Some(HostConfig::new(64)));
    m.allocate(1, prompt, KEYS, 0).unwrap();
    m.advance(1, prompt.len(), prompt.len()).unwrap();
    m.free(1).unwrap();
    complete_all(&mut m);
    let filler = tokens(100_000, (num_blocks - 1) / kinds.len() as u32 * 16);
    m.allocate(2, &filler, KEYS, 0).unwrap();
    m.abort(2).unwrap();
    assert_eq!(m.lookup(&longer(prompt, 1), KEYS).device_tokens, 0);
    m
}

fn longer(prompt: &[u32], by: u32) -> Vec<u32> {
    [prompt, &tokens(50_000, by)].concat()
}

/// Tokens of a prompt that hit on the device.
fn device_hit(m: &Manager, prompt: &[u32]) -> usize {
    m.lookup(&longer(prompt, 1), KEYS).device_tokens
}

#[test]
fn steps_run_behind_loads_and_are_published_once_these_have_succeeded() {
    let prompt = tokens(0, 64);
    let mut m = on_host(&[FULL, WINDOW], 65, &prompt);
    let all = longer(&prompt, 64);
    let given = m.allocate(3, &all, KEYS, 0).unwrap();
    assert_eq!((given.hit_tokens, given.loads.len()), (64, 6));
    let waits = m.append(3, &[1]).unwrap_err();
    assert!(matches!(waits.kind(), ErrorKind::InvalidArgument(_)), "{waits}");
    let early = m.overlap(3).unwrap_err();
    assert!(matches!(early.kind(), ErrorKind::NotReady { seq: 3, transfers: 6 }), "{early}");

    let loads = transfers(&mut m);
    assert_eq!((m.loading(3, 0).unwrap(), m.loading(3, 1).unwrap()), (4, 2));
    m.overlap(3).unwrap();
    m.record_events(true);
    // The whole prompt, and three steps of output.
    m.advance(3, 128, 64).unwrap();
    for n in 0..3 {
        m.append(3, &[n]).unwrap();
        m.advance(3, 129 + n as usize, 128 + n as usize).unwrap();
    }
    assert!(m.events().is_empty(), "nothing of it is findable");
    assert!(transfers(&mut m).is_empty(), "nor offered");
    assert_eq!(m.block_row(3, 1).unwrap().first_block, 2, "nor freed");
    assert_eq!(device_hit(&m, &all), 0);
    for refused in [m.fork(3, 9).err(), m.trim(3, 64).err(), m.preempt(3).err()] {
        assert!(matches!(refused.unwrap().kind(), ErrorKind::InvalidArgument(_)));
    }

    for load in &loads[1..] {
        let told = m.complete(load.id, Outcome::Succeeded).unwrap();
        assert_eq!(told, Completion::Pending);
    }
    assert_eq!(m.loading(3, 0).unwrap() + m.loading(3, 1).unwrap(), 1);
    assert!(transfers(&mut m).is_empty() && device_hit(&m, &all) < 128);
    let told = m.complete(loads[0].id, Outcome::Succeeded).unwrap();
    assert_eq!(told, Completion::Ready { seq: 3, valid_tokens: 131 });
    assert_eq!(device_hit(&m, &all), 128);
    assert_eq!(m.block_row(3, 1).unwrap().first_block, 6, "130 settled tokens");
    let offloads = transfers(&mut m);
    assert!(offloads.iter().all(|t| t.path.direction() == Direction::Offload));
    assert_eq!(offloads.len(), 8, "four new blocks of each group");
    m.free(3).unwrap();
}

#[test]
fn a_failed_load_voids_what_ran_behind_it() {
    let prompt = tokens(0, 64);
    for fails in 0..4 {
        let mut m = on_host(&[FULL], 33, &prompt);
        let all = longer(&prompt, 64);
        m.allocate(3, &all, KEYS, 0).unwrap();
        let loads = transfers(&mut m);
        m.overlap(3).unwrap();
        m.advance(3, 128, 128).unwrap();
        m.append(3, &[5]).unwrap();
        m.advance(3, 129, 128).unwrap();
        let mut last = Completion::Pending;
        for (i, load) in loads.iter().enumerate() {
            assert_eq!(last, Completion::Pending);
            let failed = i == fails;
            let outcome = if failed { Outcome::Failed } else { Outcome::Succeeded };
            last = m.complete(load.id, outcome).unwrap();
        }
        assert_eq!(last, Completion::Void { seq: 3 });
        // Late reports of its steps reach nothing.
        let late = m.advance(3, 129, 129).unwrap_err();
        assert!(matches!(late.kind(), ErrorKind::UnknownSequence(3)), "{late}");
        assert_eq!(m.free_blocks(), 32);

        // What has come is found, and nothing behind what has not.
        assert_eq!(device_hit(&m, &all), fails * 16);
        let again = m.allocate(3, &all, KEYS, 0).unwrap();
        assert_eq!((again.hit_tokens, again.loads.len()), (fails * 16, 0));
        m.advance(3, 128, 128).unwrap();
    }
}

#[test]
fn what_waits_for_storage_does_not_overlap() {
    let prompt = tokens(0, 64);
    let mut m = common::manager(&[FULL], 33, Some(HostConfig::new(64)));
    m.attach_storage(StorageConfig::new(64), &[]).unwrap();
    m.allocate(5, &prompt, KEYS, 0).unwrap();
    m.advance(5, 64, 64).unwrap();
    m.free(5).unwrap();
    while m.transfers_in_flight() > 0 {
        complete_all(&mut m);
    }
    m.clear_host();
    m.allocate(6, &tokens(100_000, 512), KEYS, 0).unwrap();
    m.abort(6).unwrap();
    let given = m.allocate(7, &longer(&prompt, 1), KEYS, 0).unwrap();
    assert_eq!(given.loads.len(), 4, "all from storage");
    let fetches = transfers(&mut m);
    for (i, fetch) in fetches.iter().enumerate() {
        assert_eq!(fetch.path.direction(), Direction::Fetch);
        let error = m.overlap(7).unwrap_err();
        let waiting =
            matches!(error.kind(), ErrorKind::NotReady { transfers, .. } if *transfers == 4);
        assert!(waiting, "{i}: {error}");
        m.complete(fetch.id, Outcome::Succeeded).unwrap();
    }
    assert!(m.overlap(7).is_err(), "not handed out");
    let loads = transfers(&mut m);
    m.overlap(7).unwrap();
    m.advance(7, 65, 65).unwrap();
    for load in loads {
        m.complete(load.id, Outcome::Succeeded).unwrap();
    }
    m.append(7, &[1]).unwrap();
}

#[test]
fn a_resumed_sequence_goes_on_in_the_tail_that_is_on_its_way() {
    let mut m = common::manager(&[FULL], 33, Some(HostConfig::new(64)));
    let swap = |m: &mut Manager, seq, n: u32| {
        m.allocate(seq, &tokens(1000 * seq as u32, n), KEYS, 0).unwrap();
        m.advance(seq, n as usize, n as usize).unwrap();
        m.preempt(seq).unwrap();
        complete_all(m);
        let filler = tokens(100_000, 16 * m.free_blocks() as u32);
        m.allocate(99, &filler, KEYS, 0).unwrap();
        m.abort(99).unwrap();
        m.resume(seq).unwrap();
        transfers(m)
    };
    // Layer by layer a step writes behind what has come. A copy of the tail would be one of garbage.
    let loads = swap(&mut m, 1, 40);
    assert_eq!(loads.len(), 3);
    m.overlap(1).unwrap();
    assert!(m.append(1, &[1]).unwrap()[0].is_empty());
    assert_eq!(m.next_copy(), None);
    assert_eq!(Some(m.table(1, 0).unwrap()[2]), loads[2].path.block());
    m.free(1).unwrap();
    assert_eq!(swap(&mut m, 2, 48).len(), 3);
    m.overlap(2).unwrap();
    m.append(2, &[1]).unwrap();
}

#[test]
fn nothing_void_is_ever_found_whatever_fails_and_in_whatever_order() {
    for seed in 0..200 {
        let mut state = seed;
        let mut below = |n: usize| {
            state = splitmix64(state);
            (state % n as u64) as usize
        };
        let prompt = tokens(0, 64);
        let mut m = on_host(&[FULL, WINDOW], 129, &prompt);
        // Three sequences with different ends over one hit, and which of them are alive and on trial.
        let prompts: Vec<Vec<u32>> =
            (0..3).map(|s| [&prompt[..], &tokens(1000 * (s + 1), 48)].concat()).collect();
        let mut trial = [true; 3];
        let mut outstanding = Vec::new();
        for (s, prompt) in prompts.iter().enumerate() {
            m.allocate(10 + s as u64, prompt, KEYS, 0).unwrap();
            outstanding.extend(transfers(&mut m));
            m.overlap(10 + s as u64).unwrap();
        }
        let mut alive = [true; 3];
        let mut computed = [64; 3];
        while !outstanding.is_empty() {
            let s = below(3);
            if alive[s] && computed[s] < 112 && below(2) == 0 {
                computed[s] += 1 + below(112 - computed[s]);
                m.advance(10 + s as u64, computed[s], computed[s] - below(2)).unwrap();
            }
            let transfer = outstanding.swap_remove(below(outstanding.len()));
            let failed = transfer.path.direction() == Direction::Onboard && below(8) == 0;
            let outcome = if failed { Outcome::Failed } else { Outcome::Succeeded };
            let mut told = Some(m.complete(transfer.id, outcome).unwrap());
            while let Some(completion) = told {
                match completion {
                    Completion::Ready { seq, .. } => trial[seq as usize - 10] = false,
                    Completion::Void { seq } => alive[seq as usize - 10] = false,
                    Completion::Pending => {}
                    Completion::Dropped { .. } => panic!("{completion:?}"),
                }
                told = m.next_completion();
            }
            outstanding.extend(transfers(&mut m));
            for (s, prompt) in prompts.iter().enumerate() {
                let found = m.lookup(&longer(prompt, 1), KEYS).tokens;
                assert!(found <= 64 || !trial[s], "seed {seed}: {found} tokens of {s} on trial");
            }
        }
        for s in (0..3).filter(|&s| alive[s]) {
            assert!(!trial[s], "all its loads have ended");
            m.advance(10 + s as u64, 112, 112).unwrap();
            m.free(10 + s as u64).unwrap();
        }
        while m.transfers_in_flight() > 0 {
            complete_all(&mut m);
        }
        assert_eq!(m.free_blocks(), 128, "seed {seed}");
    }
}
