//! Groups of recurrent states beside attention, rule by rule; random histories are in `manager_properties`.

use hybridkv::ErrorKind;
use hybridkv::manager::{
    Completion, Event, Eviction, ExtraKeys, GroupConfig, HostConfig, Manager, ManagerConfig,
    Outcome, Retention, Tier, Transfer,
};
use hybridkv::spec::{AttentionKind, GroupKind};

const KEYS: ExtraKeys<'static> = ExtraKeys { salt: "", lora: "" };

fn config(retention: Retention, sizes: [u32; 2], num_blocks: u32) -> ManagerConfig {
    ManagerConfig {
        groups: vec![
            GroupConfig::new(AttentionKind::Full, sizes[0]),
            GroupConfig::new(GroupKind::State, sizes[1]),
        ],
        num_blocks,
        prefix_caching: true,
        retention,
        eviction: Eviction::Lru,
        max_model_len: 64,
        in_flight_tokens: 64,
        host: Some(HostConfig::new(40)),
        identity: [1; 32],
    }
}

fn sparse() -> Retention {
    Retention { interval: Some(0), dense_chunks: false, ..Retention::dense() }
}

fn held(m: &Manager, seq: u64) -> Vec<usize> {
    let table = m.table(seq, 1).unwrap();
    (0..table.len()).filter(|&b| table[b] != 0).collect()
}

#[test]
fn a_sequence_has_one_slot_and_a_checkpoint_where_a_prompt_can_come_again() {
    let mut m = Manager::new(config(sparse(), [4, 4], 60)).unwrap();
    m.allocate(1, &[7; 18], KEYS, 0).unwrap();
    // The replay boundary of 18 tokens is 16: block 3; the slot is block 4.
    assert_eq!(held(&m, 1), [3, 4]);
    let table = m.table(1, 1).unwrap().to_vec();
    let step = m.state_step(1, 1, 0, 18).unwrap();
    assert_eq!((step.source, step.writes), (0, vec![(16, table[3]), (18, table[4])]));
    m.advance(1, 18, 18).unwrap();
    assert_eq!(held(&m, 1), [4], "what is settled is gone but for the slot");
    // The slot goes along.
    for n in 19..40 {
        m.append(1, &[8]).unwrap();
        let step = m.state_step(1, 1, n - 1, n).unwrap();
        assert_eq!((step.source, step.writes), (table[4], vec![(n, table[4])]));
        m.advance(1, n, n).unwrap();
        assert_eq!(held(&m, 1), [(n - 1) / 4]);
    }
    // A hit ends at the checkpoint, which is read and never written.
    let hit = m.allocate(2, &[7; 18], KEYS, 0).unwrap();
    assert_eq!(hit.hit_tokens, 16);
    let step = m.state_step(2, 1, 16, 18).unwrap();
    assert_eq!(step.source, table[3]);
    assert_ne!(step.writes[0].1, table[3]);
    assert_eq!(m.lookup(&[[7; 18], [8; 18]].concat(), KEYS).tokens, 16, "no state beyond it");
}

#[test]
fn forks_copy_the_state_and_drafts_go_on_a_fork() {
    let mut m = Manager::new(config(sparse(), [4, 4], 60)).unwrap();
    m.allocate(1, &[7; 6], KEYS, 0).unwrap();
    let err = m.fork(1, 2).unwrap_err();
    assert!(matches!(err.kind(), ErrorKind::InvalidArgument(_)), "{err}");
    m.advance(1, 6, 6).unwrap();
    m.fork(1, 2).unwrap();
    let slot = *m.table(1, 1).unwrap().last().unwrap();
    m.append(2, &[8; 5]).unwrap();
    let state = std::iter::from_fn(|| m.next_copy()).find(|copy| copy.group == 1).unwrap();
    let step = m.state_step(2, 1, 6, 11).unwrap();
    assert_eq!((state.from, state.to), (slot, step.source));
    m.advance(2, 11, 6).unwrap();
    // The state of computed tokens cannot be taken back, but the fork can go.
    for cut in [Manager::trim, Manager::rollback] {
        let err = cut(&mut m, 2, 9).unwrap_err();
        assert!(matches!(err.kind(), ErrorKind::OutOfWindow { group: 1, .. }), "{err}");
    }
    m.append(2, &[9; 20]).unwrap();
    m.rollback(2, 11).unwrap();
    assert_eq!(m.state_step(2, 1, 11, 12).unwrap_err().op(), "state step");
    m.abort(2).unwrap();
    m.append(1, &[9]).unwrap();
    assert_eq!(m.state_step(1, 1, 6, 7).unwrap().source, slot);
    assert!(m.state_step(1, 0, 6, 7).is_err(), "an attention group");
}

#[test]
fn states_have_no_sinks() {
    let mut config = config(sparse(), [4, 4], 60);
    config.groups[1].sink_tokens = 4;
    let err = Manager::new(config).err().unwrap();
    assert!(err.to_string().contains("sink"), "{err}");
}

/// Lets all transfers end; those of attention fail when they are to.
fn complete_all(m: &mut Manager, fails: bool) -> Vec<Completion> {
    let transfers: Vec<Transfer> = std::iter::from_fn(|| m.next_transfer()).collect();
    let outcome = |t: &Transfer| match fails && t.group == 0 {
        true => Outcome::Failed,
        false => Outcome::Succeeded,
    };
    transfers.iter().map(|t| m.complete(t.id, outcome(t)).unwrap()).collect()
}

#[test]
fn a_preempted_state_is_stored_as_what_it_is() {
    let retention = Retention { interval: Some(12), ..sparse() };
    let mut m = Manager::new(config(retention, [4, 4], 60)).unwrap();
    m.record_events(true);
    let tokens = [[7; 12], [8; 12]].concat();
    m.allocate(1, &tokens[..20], KEYS, 0).unwrap();
    m.advance(1, 20, 20).unwrap();
    // The slot has gone ahead, to where the state after 24 tokens will be kept, and holds that after 20.
    m.append(1, &tokens[20..]).unwrap();
    assert_eq!(held(&m, 1).last(), Some(&5));
    let ahead = m.block_hashes(1, &m.hash(&tokens, KEYS)).nth(5).unwrap();
    let on_device = |m: &mut Manager| m.events().iter().any(|event| event.hashes.contains(&ahead));
    assert!(on_device(&mut m), "findable, and to be computed");
    complete_all(&mut m, false);
    m.preempt(1).unwrap();
    complete_all(&mut m, false);
    let on_host = |event: &Event| event.tier == Tier::Host && event.hashes.contains(&ahead);
    assert!(!m.events().iter().any(on_host), "a state under the name of a later one");
}

#[test]
fn a_resumed_sequence_whose_other_loads_failed_has_a_slot_for_its_state() {
    let dense = Retention::dense();
    let mut m = Manager::new(config(dense, [4, 4], 40)).unwrap();
    m.allocate(1, &[7; 8], KEYS, 0).unwrap();
    m.advance(1, 8, 8).unwrap();
    complete_all(&mut m, false);
    m.preempt(1).unwrap();
    complete_all(&mut m, false);
    for word in [9, 10] {
        m.allocate(2, &[word; 64], KEYS, 0).unwrap();
        m.free(2).unwrap();
    }
    assert_eq!(m.resume(1).unwrap().loads.len(), 3);
    let ready = complete_all(&mut m, true).pop();
    assert_eq!(ready, Some(Completion::Ready { seq: 1, valid_tokens: 0 }));
    let step = m.state_step(1, 1, 0, 8).unwrap();
    assert!(step.writes.last().is_some_and(|&(tokens, block)| tokens == 8 && block != 0));
}
