//! Fork, copy-on-write, trim and rollback: what they give and what they refuse. That the contents stay right
//! in any order of operations is a property in manager_properties.

use hybridkv::ErrorKind;
use hybridkv::manager::{
    BlockCopy, BlockId, Eviction, ExtraKeys, GroupConfig, HostConfig, Manager, ManagerConfig,
    Outcome, Retention,
};
use hybridkv::spec::AttentionKind;
use proptest::prelude::*;

const KEYS: ExtraKeys<'static> = ExtraKeys { salt: "", lora: "" };

/// A full group and a sliding one, blocks of 4 tokens.
fn manager(num_blocks: u32) -> Manager {
    let sliding = AttentionKind::Sliding { window: 6 };
    Manager::new(ManagerConfig {
        groups: vec![GroupConfig::new(AttentionKind::Full, 4), GroupConfig::new(sliding, 4)],
        num_blocks,
        prefix_caching: true,
        retention: Retention::dense(),
        eviction: Eviction::Lru,
        max_model_len: (num_blocks - 1) / 2 * 4,
        in_flight_tokens: num_blocks * 4,
        host: Some(HostConfig::new(64)),
        identity: [1; 32],
    })
    .unwrap()
}

fn copies(m: &mut Manager) -> Vec<BlockCopy> {
    std::iter::from_fn(|| m.next_copy()).collect()
}

/// Ends all transfers well.
fn drain(m: &mut Manager) {
    while let Some(transfer) = m.next_transfer() {
        m.complete(transfer.id, Outcome::Succeeded).unwrap();
    }
}

/// Everything that can be seen of a manager.
fn state(m: &Manager, seqs: &[u64]) -> impl PartialEq + std::fmt::Debug + use<> {
    let tables: Vec<Vec<Vec<BlockId>>> =
        seqs.iter().map(|&seq| (0..2).filter_map(|g| m.table(seq, g).ok()).collect()).collect();
    let cached: Vec<Vec<u32>> = (0..2).map(|g| m.cached_indices(g)).collect();
    (m.free_queue(), m.ref_counts(), cached, tables)
}

#[test]
fn a_fork_shares_every_block_and_whoever_goes_on_first_gets_a_copy_of_the_tail() {
    let mut m = manager(40);
    m.allocate(1, &[7; 10], KEYS, 3).unwrap();
    m.advance(1, 10, 10).unwrap();
    let free = m.free_blocks();
    for child in 2..5 {
        assert_eq!(m.fork(1, child).unwrap(), 10);
    }
    assert_eq!(m.free_blocks(), free, "a fork takes no block");
    // Slots ahead stay the parent's own; the children share what holds tokens.
    let parent = m.table(1, 0).unwrap().to_vec();
    assert_eq!((parent.len(), m.table(2, 0).unwrap()), (4, parent[..3].to_vec()));

    let new = m.append(2, &[8]).unwrap();
    let given = copies(&mut m);
    let tails = [parent[2], m.table(1, 1).unwrap()[2]];
    let expected: Vec<BlockCopy> =
        (0..2).map(|g| BlockCopy { group: g as u32, from: tails[g], to: new[g][0] }).collect();
    assert_eq!(given, expected);
    assert_eq!(m.table(2, 0).unwrap()[2], new[0][0]);
    m.append(3, &[9]).unwrap();
    assert_eq!(copies(&mut m).len(), 2);
    m.append(1, &[10]).unwrap();
    assert_eq!(copies(&mut m).len(), 2, "the parent is no more than one of its holders");
    // Only sequence 4 holds the first tail now: it writes in place.
    m.append(4, &[11]).unwrap();
    assert_eq!(copies(&mut m), []);
    assert_eq!(m.table(4, 0).unwrap()[2], tails[0]);
    for seq in 1..5 {
        m.free(seq).unwrap();
    }
    drain(&mut m);
    assert_eq!(m.free_blocks(), m.capacity());
}

#[test]
fn a_fork_at_a_block_edge_copies_nothing() {
    let mut m = manager(40);
    m.allocate(1, &[7; 8], KEYS, 0).unwrap();
    m.advance(1, 8, 8).unwrap();
    m.fork(1, 2).unwrap();
    for seq in [1, 2] {
        m.append(seq, &[seq as u32; 5]).unwrap();
    }
    assert_eq!(copies(&mut m), []);
}

#[test]
fn no_transfer_is_given_out_before_the_copies() {
    let mut m = manager(40);
    m.allocate(1, &[7; 10], KEYS, 0).unwrap();
    m.advance(1, 10, 10).unwrap();
    m.fork(1, 2).unwrap();
    m.append(2, &[8]).unwrap();
    assert!(m.transfers_in_flight() > 0 && m.next_transfer().is_none());
    copies(&mut m);
    assert!(m.next_transfer().is_some());
}

#[test]
fn a_copy_that_finds_no_block_changes_nothing() {
    let mut m = manager(17);
    m.allocate(1, &[7; 6], KEYS, 0).unwrap();
    m.advance(1, 6, 6).unwrap();
    m.fork(1, 2).unwrap();
    m.allocate(3, &[9; 22], KEYS, 0).unwrap();
    while m.next_copy().is_some() {}
    let before = state(&m, &[1, 2, 3]);
    assert_eq!(m.free_blocks(), 0);
    let err = m.append(2, &[8]).unwrap_err();
    assert!(matches!(err.kind(), ErrorKind::NoFreeBlocks { needed: 2, free: 0 }), "{err}");
    assert_eq!(state(&m, &[1, 2, 3]), before);
    assert_eq!(copies(&mut m), []);
    // The last holder needs none.
    m.free(1).unwrap();
    m.append(2, &[8]).unwrap();
}

#[test]
fn what_cannot_be_is_refused_and_changes_nothing() {
    let mut m = manager(40);
    m.allocate(1, &[7; 30], KEYS, 0).unwrap();
    assert!(matches!(m.fork(1, 2).unwrap_err().kind(), ErrorKind::InvalidArgument(_)));
    m.advance(1, 30, 30).unwrap();
    m.allocate(5, &[7; 3], KEYS, 0).unwrap();
    m.free(5).unwrap();
    let before = state(&m, &[1]);
    assert!(matches!(m.fork(5, 6).unwrap_err().kind(), ErrorKind::UnknownSequence(5)));
    assert!(matches!(m.fork(9, 6).unwrap_err().kind(), ErrorKind::UnknownSequence(9)));
    assert!(matches!(m.fork(1, 1).unwrap_err().kind(), ErrorKind::DuplicateSequence(1)));
    for cut in [Manager::trim, Manager::rollback] {
        assert!(matches!(cut(&mut m, 9, 1).unwrap_err().kind(), ErrorKind::UnknownSequence(9)));
        for tokens in [0, 31] {
            let err = cut(&mut m, 1, tokens).unwrap_err();
            assert!(matches!(err.kind(), ErrorKind::InvalidArgument(_)), "{err}");
        }
        // The window has moved on.
        let err = cut(&mut m, 1, 20).unwrap_err();
        let gone = matches!(err.kind(), ErrorKind::OutOfWindow { seq: 1, tokens: 20, group: 1 });
        assert!(gone, "{err}");
    }
    assert_eq!(state(&m, &[1]), before);
    assert_eq!(m.trim(1, 30).unwrap().freed.concat(), [0; 0], "nothing to cut");
}

#[test]
fn a_trim_keeps_what_was_computed_findable_and_a_rollback_does_not() {
    for rollback in [false, true] {
        let mut m = manager(40);
        let prompt: Vec<u32> = (0..12).collect();
        m.allocate(1, &prompt, KEYS, 0).unwrap();
        m.advance(1, 12, 0).unwrap();
        drain(&mut m);
        let table = m.table(1, 0).unwrap().to_vec();
        let cut = if rollback { m.rollback(1, 5) } else { m.trim(1, 5) }.unwrap();
        assert_eq!(cut.freed[0], [table[2]]);
        assert!(cut.dependents.is_empty());
        let found = m.lookup(&[&prompt[..], &[99]].concat(), KEYS).tokens;
        assert_eq!(found, if rollback { 4 } else { 12 });
        // What goes on must not touch the cached block of tokens 4 to 7.
        m.append(1, &[50]).unwrap();
        assert_eq!(copies(&mut m).len(), if rollback { 0 } else { 2 });
        assert_eq!(m.table(1, 0).unwrap()[1] == table[1], rollback);
        assert_eq!(m.lookup(&[&prompt[..], &[99]].concat(), KEYS).tokens, found);
    }
}

#[test]
fn who_hit_tokens_that_were_never_computed_is_told() {
    let mut m = manager(60);
    m.allocate(1, &[7; 12], KEYS, 0).unwrap();
    assert_eq!(m.allocate(2, &[7; 13], KEYS, 0).unwrap().hit_tokens, 12);
    let cut = m.rollback(1, 9).unwrap();
    assert_eq!(cut.dependents, [2]);
    assert_eq!(m.lookup(&[7; 13], KEYS).tokens, 8);
}

#[test]
fn who_shares_but_finished_tokens_is_not_told() {
    // Of two sequences over one hit, one is cut back into the tail that they share: twice, and aborted.
    let mut m = manager(40);
    for seq in [1, 2] {
        m.allocate(seq, &[7; 13], KEYS, 0).unwrap();
        m.advance(seq, 13, 12).unwrap();
    }
    for tokens in [11, 10] {
        assert!(m.trim(2, tokens).unwrap().dependents.is_empty(), "{tokens}");
    }
    assert_eq!(m.lookup(&[7; 13], KEYS).tokens, 12, "what was computed stays findable");
    assert!(m.abort(2).unwrap().is_empty());
    assert_eq!(m.lookup(&[7; 13], KEYS).tokens, 12);
    // A fork of settled tokens, in whose tail its parent goes on.
    m.trim(1, 11).unwrap();
    m.fork(1, 3).unwrap();
    m.append(1, &[8]).unwrap();
    m.advance(1, 12, 11).unwrap();
    assert!(m.abort(1).unwrap().is_empty());
}

#[test]
fn forks_of_a_fork_that_has_gone_depend_on_what_it_began_with() {
    let mut m = manager(40);
    m.allocate(1, &[7; 6], KEYS, 0).unwrap();
    m.advance(1, 6, 3).unwrap();
    m.fork(1, 2).unwrap();
    m.fork(2, 3).unwrap();
    m.append(3, &[8]).unwrap();
    m.free(2).unwrap();
    copies(&mut m);
    assert_eq!(m.abort(1).unwrap(), [3]);
}

#[test]
fn a_failed_step_takes_the_forks_of_its_tokens_with_it() {
    let mut m = manager(60);
    m.allocate(1, &[7; 10], KEYS, 0).unwrap();
    m.advance(1, 10, 0).unwrap();
    m.fork(1, 2).unwrap();
    // Its tail is a copy by now, of tokens that are not settled.
    m.append(2, &[8]).unwrap();
    m.trim(2, 11).unwrap();
    m.fork(1, 3).unwrap();
    assert_eq!(m.abort(3).unwrap(), [0; 0], "a fork has computed nothing of what it shares");
    assert_eq!(m.abort(1).unwrap(), [2]);
}

#[derive(Debug, Clone)]
struct Draft {
    accepted: Vec<u32>,
    rejected: Vec<u32>,
}

proptest! {
    /// Two managers, one of which drafts: wherever the drafts are rejected before they settle, the answers,
    /// the index and the number of free blocks are the same.
    #[test]
    fn drafting_and_rolling_back_is_never_having_drafted(
        prompt in prop::collection::vec(0u32..3, 1..30),
        drafts in prop::collection::vec(
            (prop::collection::vec(0u32..3, 1..6), prop::collection::vec(3u32..5, 0..9))
                .prop_map(|(accepted, rejected)| Draft { accepted, rejected }),
            1..8,
        ),
    ) {
        let (mut with, mut without) = (manager(80), manager(80));
        for m in [&mut with, &mut without] {
            m.allocate(1, &prompt, KEYS, 0).unwrap();
            m.advance(1, prompt.len(), prompt.len()).unwrap();
            drain(m);
        }
        let mut tokens = prompt.clone();
        for Draft { accepted, rejected } in drafts {
            tokens.extend(&accepted);
            let n = tokens.len();
            with.append(1, &[&accepted[..], &rejected].concat()).unwrap();
            with.advance(1, n + rejected.len(), n - accepted.len()).unwrap();
            drain(&mut with);
            with.rollback(1, n).unwrap();
            with.advance(1, n, n).unwrap();
            without.append(1, &accepted).unwrap();
            without.advance(1, n, n).unwrap();
            prop_assert_eq!(copies(&mut with), []);
            drain(&mut with);
            drain(&mut without);
            prop_assert_eq!(with.free_blocks(), without.free_blocks());
            for g in 0..2 {
                prop_assert_eq!(with.cached_indices(g), without.cached_indices(g));
            }
            let probe = [&tokens[..], &rejected, &[9]].concat();
            prop_assert_eq!(with.lookup(&probe, KEYS).tokens, without.lookup(&probe, KEYS).tokens);
        }
    }
}

proptest! {
    /// Whoever admits by the bound never finds an append refused, whatever is shared and forked.
    #[test]
    fn what_is_admitted_runs_to_its_end(
        requests in prop::collection::vec((1usize..20, 0usize..20, any::<bool>()), 1..12),
        num_blocks in 25u32..60,
    ) {
        let mut m = manager(num_blocks);
        // Live sequences with the tokens they may come to.
        let mut running: Vec<(u64, usize)> = Vec::new();
        let mut lengths = std::collections::BTreeMap::new();
        for (next, (prompt, output, fork)) in (0u64..).zip(requests) {
            let parent = running.first().map(|&(seq, _)| seq).filter(|_| fork);
            let start = parent.map_or(prompt, |parent| lengths[&parent]);
            let most = start + output;
            match m.admission(most, &running) {
                Ok(admission) if admission.fits() => {}
                Ok(_) => continue,
                Err(err) => {
                    let refused = matches!(err.kind(), ErrorKind::TooLong { .. });
                    prop_assert!(refused, "{}", err);
                    continue;
                }
            }
            match parent {
                Some(parent) => prop_assert_eq!(m.fork(parent, next).unwrap(), start),
                None => drop(m.allocate(next, &vec![7; prompt], KEYS, 0).unwrap()),
            }
            m.advance(next, start, start).unwrap();
            lengths.insert(next, start);
            running.push((next, most));
            // Everybody goes on a little.
            for &(seq, most) in &running {
                let length = lengths.get_mut(&seq).unwrap();
                for _ in 0..3.min(most - *length) {
                    *length += 1;
                    m.append(seq, &[seq as u32]).unwrap();
                    m.advance(seq, *length, *length).unwrap();
                }
            }
            copies(&mut m);
            drain(&mut m);
        }
        let asked = m.admission(1, &[(99, 1)]);
        prop_assert!(matches!(asked.unwrap_err().kind(), ErrorKind::UnknownSequence(99)));
    }
}

#[test]
fn nothing_is_copied_out_of_hit_blocks_before_a_step_of_ones_own() {
    let mut m = manager(40);
    // The second sequence hits what the first has yet to compute.
    m.allocate(1, &[7; 9], KEYS, 0).unwrap();
    assert_eq!(m.allocate(2, &[7; 9], KEYS, 0).unwrap().hit_tokens, 8);
    let before = state(&m, &[1, 2]);
    let refused = |error: hybridkv::Error| matches!(error.kind(), ErrorKind::InvalidArgument(_));
    assert!(refused(m.preempt(2).unwrap_err()), "an offload would store what is not written");
    assert!(refused(m.trim(2, 6).unwrap_err()), "a copy of the tail would be of nothing");
    assert!(refused(m.rollback(2, 7).unwrap_err()));
    assert_eq!(state(&m, &[1, 2]), before);
    assert!(m.next_transfer().is_none());

    for seq in [1, 2] {
        m.advance(seq, 9, 8).unwrap();
    }
    drain(&mut m);
    m.trim(2, 6).unwrap();
    m.preempt(2).unwrap();
}
