//! What the manager keeps in memory of its own, by the count of an allocator: bytes per cached block in every tier,
//! and nothing at all that a decode step allocates.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::VecDeque;

use hybridkv::manager::{
    Eviction, ExtraKeys, GroupConfig, HostConfig, Manager, ManagerConfig, Metadata, Outcome,
    Retention, StorageConfig, TransferId, WritePolicy,
};
use hybridkv::spec::{AttentionKind, GroupKind};
use hybridkv::{ErrorKind, Result};

thread_local! {
    static LIVE_BYTES: Cell<usize> = const { Cell::new(0) };
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

/// Counts what each thread allocates, so that tests that run beside one another do not disturb the count.
struct Counting;

fn count(allocated: usize, freed: usize) {
    LIVE_BYTES.set(LIVE_BYTES.get().wrapping_add(allocated).wrapping_sub(freed));
    ALLOCATIONS.set(ALLOCATIONS.get() + usize::from(allocated > 0));
}

// SAFETY: every method hands its arguments, under the same contract, to `System`; the counters are thread-local
// cells without destructors, which no allocation is needed for.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: as above.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        count(0, layout.size());
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count(new_size, layout.size());
        // SAFETY: as above.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const KEYS: ExtraKeys<'static> = ExtraKeys { salt: "", lora: "" };
const BLOCK_SIZE: u32 = 16;
const FULL: GroupKind = GroupKind::Attention(AttentionKind::Full);
const SLIDING: GroupKind = GroupKind::Attention(AttentionKind::Sliding { window: 100 });
const CHUNKED: GroupKind = GroupKind::Attention(AttentionKind::Chunked { chunk: 128 });

const MIXES: [&[GroupKind]; 4] = [
    &[FULL],
    &[FULL, SLIDING],
    &[FULL, CHUNKED, CHUNKED, CHUNKED],
    &[FULL, SLIDING, CHUNKED, GroupKind::State],
];

fn config(kinds: &[GroupKind], num_blocks: u32, eviction: Eviction) -> ManagerConfig {
    ManagerConfig {
        groups: kinds.iter().map(|&kind| GroupConfig::new(kind, BLOCK_SIZE)).collect(),
        num_blocks,
        prefix_caching: true,
        retention: Retention::default(),
        eviction,
        max_model_len: 2048,
        in_flight_tokens: 2048,
        host: None,
        identity: [7; 32],
    }
}

/// A prompt that shares nothing with those of another number.
fn prompt(number: u32, tokens: u32) -> Vec<u32> {
    (0..tokens).map(|i| (number << 16) + i).collect()
}

/// Answers every transfer that can be started.
fn transfer(m: &mut Manager) {
    while let Some(transfer) = m.next_transfer() {
        m.complete(transfer.id, Outcome::Succeeded).unwrap();
    }
}

/// Serves prompts until every tier has been turned over.
fn fill(m: &mut Manager, prompts: std::ops::Range<u32>, tokens: u32) {
    for number in prompts {
        let tokens = prompt(number, tokens);
        while let Err(error) = m.allocate(u64::from(number), &tokens, KEYS, 0) {
            assert!(matches!(error.kind(), ErrorKind::NoFreeBlocks { .. }), "{error}");
            transfer(m);
        }
        m.advance(u64::from(number), tokens.len(), tokens.len()).unwrap();
        transfer(m);
        m.free(u64::from(number)).unwrap();
        transfer(m);
    }
}

#[test]
fn a_cached_block_takes_at_most_96_bytes_in_each_tier() {
    const BLOCKS: u32 = 4096;
    for kinds in MIXES {
        for &eviction in Eviction::ALL {
            let before = LIVE_BYTES.get();
            let mut m = Manager::new(ManagerConfig {
                host: Some(HostConfig::new(BLOCKS)),
                ..config(kinds, BLOCKS + 1, eviction)
            })
            .unwrap();
            m.attach_storage(StorageConfig::new(BLOCKS), &[]).unwrap();
            fill(&mut m, 0..100, 1025);

            let Metadata { device, host, storage, sequences } = m.metadata();
            for (name, tier) in [("device", device), ("host", host), ("storage", storage)] {
                assert_eq!(tier.blocks, BLOCKS as usize, "{name}");
                let per_block = tier.per_block();
                assert!(
                    per_block <= 96.0,
                    "{kinds:?}, {eviction:?}: {per_block} in the {name} tier"
                );
            }
            let usage = m.usage();
            for cached in [usage.device_cached, usage.host_cached, usage.storage_cached] {
                assert!(cached.iter().sum::<usize>() > BLOCKS as usize * 9 / 10);
            }
            assert_eq!(sequences, 0);

            // What it says is what it takes; queues of transfers come on top, and are short.
            let told = device.bytes + host.bytes + storage.bytes;
            let taken = LIVE_BYTES.get() - before;
            assert!((told..told + told / 4).contains(&taken), "{told} bytes told, {taken} taken");
        }
    }
}

/// Transfers of a direction in flight at most: a prompt of those that fill the tiers has more blocks, so that
/// their queues have had their length before the steps begin.
const IN_FLIGHT: u32 = 32;

/// Decode steps of many sequences under eviction, across edges of blocks and windows.
struct Steps {
    m: Manager,
    lengths: Vec<usize>,
    /// Appends that had to wait: each made one error, which is boxed.
    refused: usize,
    flying: VecDeque<TransferId>,
}

impl Steps {
    const SEQUENCES: u64 = 256;
    const TOKENS: usize = 600;

    fn new(kinds: &[GroupKind], eviction: Eviction, host: Option<HostConfig>) -> Self {
        // Room for all sequences at their end; cached blocks fill it before they begin.
        let blocks = Self::SEQUENCES as u32 * (Self::TOKENS as u32 / BLOCK_SIZE + 2);
        let blocks = blocks * kinds.len() as u32;
        let mut m =
            Manager::new(ManagerConfig { host, ..config(kinds, blocks + 1, eviction) }).unwrap();
        if m.config().host.is_some() {
            let storage = StorageConfig { max_persists: IN_FLIGHT, ..StorageConfig::new(4096) };
            m.attach_storage(storage, &[]).unwrap();
        }
        fill(&mut m, 1000..1000 + blocks / 60, 1025);
        let mut lengths = Vec::new();
        for seq in 0..Self::SEQUENCES {
            let tokens = 200 + seq as u32 % BLOCK_SIZE;
            let tokens = prompt(seq as u32, tokens);
            while m.allocate(seq, &tokens, KEYS, 0).is_err() {
                transfer(&mut m);
            }
            m.advance(seq, tokens.len(), tokens.len()).unwrap();
            m.reserve(seq, Self::TOKENS).unwrap();
            transfer(&mut m);
            lengths.push(tokens.len());
        }
        Self { m, lengths, refused: 0, flying: VecDeque::with_capacity(1 << 14) }
    }

    /// A step: each sequence gets a token; the step before it settles, and its transfers end.
    fn step(&mut self, number: u32) -> Result<()> {
        let Self { m, lengths, refused, flying } = self;
        for (seq, length) in lengths.iter_mut().enumerate() {
            let token = [number.wrapping_mul(77) ^ seq as u32];
            while let Err(error) = m.append_with(seq as u64, &token, |_, _| ()) {
                // Under write-back, blocks are stored before their turn.
                assert!(matches!(error.kind(), ErrorKind::NoFreeBlocks { .. }), "{error}");
                *refused += 1;
                for id in flying.drain(..) {
                    m.complete(id, Outcome::Succeeded)?;
                }
                transfer(m);
            }
            m.advance_with(seq as u64, *length + 1, *length, |_, _| ())?;
            *length += 1;
        }
        for id in flying.drain(..) {
            m.complete(id, Outcome::Succeeded)?;
        }
        while let Some(transfer) = m.next_transfer() {
            flying.push_back(transfer.id);
        }
        Ok(())
    }
}

#[test]
fn a_step_allocates_nothing_once_its_sequences_are_reserved() {
    const WARM_UP: u32 = 40;
    let writes = [WritePolicy::Through, WritePolicy::Selective { uses: 1 }, WritePolicy::Back];
    let host = HostConfig { max_offloads: IN_FLIGHT, ..HostConfig::new(2048) };
    let hosts = writes.map(|write| Some(host.clone().with_write(write)));
    for kinds in MIXES {
        for host in [None].into_iter().chain(hosts.clone()) {
            let policies = if host.is_none() { Eviction::ALL } else { &[Eviction::Reuse] };
            for &eviction in policies {
                let mut steps = Steps::new(kinds, eviction, host.clone());
                for number in 0..WARM_UP {
                    steps.step(number).unwrap();
                }
                let evicted = |m: &Manager| -> u64 {
                    m.stats().device.iter().map(|group| group.evicted_blocks).sum()
                };
                let (first, offloads) = (evicted(&steps.m), steps.m.stats().offloads.started);
                let before = ALLOCATIONS.get() - steps.refused;
                for number in WARM_UP..350 {
                    steps.step(number).unwrap();
                }
                let allocations = ALLOCATIONS.get() - steps.refused - before;
                let case = format!("{kinds:?}, {eviction:?}, {host:?}");
                assert_eq!(allocations, 0, "{case}");
                assert!(evicted(&steps.m) > first + 1000, "{case}: nothing was evicted");
                if host.is_some() {
                    assert!(steps.m.stats().offloads.started > offloads + 1000, "{case}");
                }
            }
        }
    }
}

#[test]
fn tables_of_windowed_groups_are_as_long_as_a_window_and_a_step_whatever_the_sequence_is() {
    const TOKENS: usize = 10_000_000;
    const STEP: usize = 8192;
    // A step is 512 blocks, a table at most twice as long; one of all blocks would take 2.5 MB.
    const TABLES: usize = 2 * 10_000;
    let manager = |prefix_caching| {
        let sinks = GroupConfig { sink_tokens: 64, ..GroupConfig::new(SLIDING, BLOCK_SIZE) };
        Manager::new(ManagerConfig {
            groups: vec![sinks, GroupConfig::new(CHUNKED, BLOCK_SIZE)],
            prefix_caching,
            max_model_len: TOKENS as u32 + 1,
            in_flight_tokens: STEP as u32,
            ..config(&[], 4096, Eviction::Reuse)
        })
        .unwrap()
    };
    let tokens = prompt(0, TOKENS as u32 + 1);
    let mut lengths: Vec<usize> = (STEP..TOKENS).step_by(STEP).collect();
    lengths.push(TOKENS);
    let serve = |m: &mut Manager| {
        m.allocate(0, &tokens[..STEP], KEYS, 0).unwrap();
        for pair in lengths.windows(2) {
            m.advance_with(0, pair[0], pair[0], |_, _| {}).unwrap();
            m.append_with(0, &tokens[pair[0]..pair[1]], |_, _| {}).unwrap();
        }
        m.advance_with(0, TOKENS, TOKENS, |_, _| {}).unwrap();
    };

    // Nothing is hashed, and no token is kept: a sequence is its tables.
    let mut m = manager(false);
    let before = LIVE_BYTES.get();
    serve(&mut m);
    let taken = LIVE_BYTES.get() - before;
    assert!(m.metadata().sequences <= TABLES, "{:?}", m.metadata());
    assert!(taken <= 2 * TABLES, "{taken} bytes, {:?}", m.metadata());
    m.fork(0, 1).unwrap();
    assert!(m.metadata().sequences <= 2 * TABLES, "{:?}", m.metadata());

    // The table of a hit is as short as that of who computed it.
    let mut m = manager(true);
    serve(&mut m);
    m.free(0).unwrap();
    let before = LIVE_BYTES.get();
    let hashed = m.hash(&tokens, KEYS);
    let tokens_and_hashes = LIVE_BYTES.get() - before;
    let hit = m.allocate_hashed(0, hashed, 0).unwrap();
    assert_eq!(hit.hit_tokens, TOKENS);
    assert!(m.metadata().sequences <= tokens_and_hashes + TABLES, "{:?}", m.metadata());
}
