//! One manager and eight ranks: decisions are broadcast, reports merged. Every rank has an engine on the CPU
//! device in deferred mode, and the bytes of its own heads; transfers are delayed, fail, end out of order on
//! every rank, and ranks fall behind and are lost.

use std::collections::BTreeMap;
use std::sync::Arc;

use hybridkv::ErrorKind;
use hybridkv::device::{Device, Stream};
use hybridkv::engine::{Engine, EngineConfig, Fault, FaultKind, SlotFormat};
use hybridkv::manager::{
    Completion, Direction, ExtraKeys, GroupConfig, HostConfig, Manager, ManagerConfig, Outcome,
    Rank, RankSet, Report, Retention, Transfer, TransferId,
};
use hybridkv::ops::Kernels;
use hybridkv::ops::synthetic::splitmix64;
use hybridkv::spec::AttentionKind;

const RANKS: u32 = 8;
const TOKENS: usize = 16;
/// Bytes of one token on one rank.
const TOKEN: usize = 8;
const BLOCK: usize = TOKENS * TOKEN;
const CONFIG: EngineConfig =
    EngineConfig { block_bytes: BLOCK, num_blocks: 41, num_slots: 96, slots: SlotFormat::AS_IS };
const KEYS: ExtraKeys<'static> = ExtraKeys { salt: "", lora: "" };

fn manager() -> Manager {
    let group = |kind: AttentionKind| GroupConfig::new(kind, TOKENS as u32);
    Manager::new(ManagerConfig {
        groups: vec![
            group(AttentionKind::Full),
            group(AttentionKind::Sliding { window: 40 }),
            group(AttentionKind::Chunked { chunk: 64 }),
        ],
        num_blocks: CONFIG.num_blocks,
        prefix_caching: true,
        retention: Retention::dense(),
        eviction: hybridkv::manager::Eviction::Lru,
        max_model_len: 192,
        in_flight_tokens: 1 << 20,
        host: Some(HostConfig::new(CONFIG.num_slots)),
        identity: [3; 32],
    })
    .unwrap()
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = splitmix64(self.0);
        (self.0 % bound as u64) as usize
    }
}

struct World {
    m: Manager,
    set: RankSet,
    compute: Vec<Stream>,
    engines: Vec<Engine>,
    /// Ended on their rank and not yet told to the set.
    reports: Vec<(Rank, TransferId, Outcome)>,
    random: Random,
    /// Answers to sequences that waited for loads.
    ready: BTreeMap<u64, Option<usize>>,
    offloaded: Vec<u64>,
}

impl World {
    fn new(seed: u64, num_kv_heads: u32) -> Self {
        let set = RankSet::new(RANKS, num_kv_heads).unwrap();
        let (mut compute, mut engines) = (Vec::new(), Vec::<Engine>::new());
        for rank in 0..RANKS {
            let device = Device::cpu_deferred(seed * 100 + u64::from(rank));
            let kernels = Arc::new(Kernels::load(&device).unwrap());
            compute.push(device.stream().unwrap());
            let owner = set.owner(rank) as usize;
            engines.push(match owner == rank as usize {
                true => Engine::new(kernels, CONFIG).unwrap(),
                false => Engine::replica(kernels, &engines[owner]).unwrap(),
            });
        }
        Self {
            m: manager(),
            set,
            compute,
            engines,
            reports: Vec::new(),
            random: Random(seed),
            ready: BTreeMap::new(),
            offloaded: vec![0; RANKS as usize],
        }
    }

    /// Bytes of one token in one group on one rank: those of replicas are the same.
    fn token(&self, rank: usize, g: usize, prefix: &[u32]) -> u64 {
        let start = splitmix64(u64::from(self.set.owner(rank as u32)) << 8 | g as u64);
        prefix.iter().fold(start, |hash, &token| splitmix64(hash ^ u64::from(token)))
    }

    /// Writes what a step computes, on every rank.
    fn compute(&mut self, seq: u64, tokens: &[u32], from: usize) {
        for (rank, engine) in self.engines.iter().enumerate() {
            for g in 0..3 {
                let table = self.m.table(seq, g).unwrap();
                for i in from..tokens.len() {
                    let block = engine.block(table[i / TOKENS]).unwrap();
                    let value = self.token(rank, g, &tokens[..=i]).to_le_bytes();
                    for (b, byte) in value.into_iter().enumerate() {
                        let at = block.address + (i % TOKENS * TOKEN + b) as u64;
                        // SAFETY: a byte of a block of the pool, which outlives the stream's work.
                        unsafe { self.compute[rank].as_ref().fill(at, byte, 1).unwrap() }
                    }
                }
            }
        }
    }

    /// Reads the cached tokens that the next query sees, on every rank, and compares.
    fn check(&self, seq: u64, tokens: &[u32], cached: usize) {
        for (rank, engine) in self.engines.iter().enumerate() {
            let buffer = self.compute[rank].as_ref().device().alloc_pinned(BLOCK).unwrap();
            for g in 0..3 {
                let kind = self.m.config().groups[g].kind;
                let first = kind.skipped(cached as u64) as usize / TOKENS;
                let table = self.m.table(seq, g).unwrap();
                for b in first..cached / TOKENS {
                    let block = engine.block(table[b]).unwrap();
                    let compute = self.compute[rank].as_ref();
                    // SAFETY: both ranges outlive the synchronisation.
                    unsafe { compute.copy(block.address, buffer.address(), BLOCK).unwrap() }
                    compute.synchronize().unwrap();
                    for t in 0..TOKENS {
                        let expected = self.token(rank, g, &tokens[..=b * TOKENS + t]);
                        let found = &buffer.as_slice()[t * TOKEN..(t + 1) * TOKEN];
                        assert_eq!(
                            found,
                            expected.to_le_bytes(),
                            "rank {rank}, group {g}, block {b}"
                        );
                    }
                }
            }
        }
    }

    fn answer(&mut self, id: TransferId, outcome: Outcome) {
        match self.m.complete(id, outcome).unwrap() {
            Completion::Pending => {}
            Completion::Ready { seq, valid_tokens } => {
                self.ready.insert(seq, Some(valid_tokens));
            }
            Completion::Dropped { seq } | Completion::Void { seq } => {
                self.ready.insert(seq, None);
            }
        }
    }

    /// Broadcasts what the manager emitted and lets one rank, any, go on a little. `faults` of 16 transfers
    /// fail or come late.
    fn turn(&mut self, faults: usize) {
        while let Some(transfer) = self.m.next_transfer() {
            assert_eq!(self.set.broadcast(transfer).unwrap(), Report::Pending);
        }
        let rank = self.random.below(RANKS as usize);
        let mut batch = Vec::new();
        for _ in 0..self.random.below(4) {
            batch.extend(self.set.next(rank as u32));
        }
        for transfer in &batch {
            let direction = transfer.path.direction();
            self.offloaded[rank] += u64::from(direction == Direction::Offload);
            let kind = match self.random.below(16) < faults {
                true if self.random.below(2) == 0 => FaultKind::Fail,
                true => FaultKind::Delay { polls: self.random.below(9) as u32 },
                false => continue,
            };
            self.engines[rank].inject(Fault { direction, kind, count: 1 });
        }
        self.engines[rank].submit(&batch, self.compute[rank].as_ref()).unwrap();
        let mut ended = Vec::new();
        self.engines[rank].poll(&mut ended).unwrap();
        self.reports.extend(ended.into_iter().map(|(id, outcome)| (rank as u32, id, outcome)));
        if self.reports.is_empty() {
            return;
        }
        let (rank, id, outcome) = self.reports.swap_remove(self.random.below(self.reports.len()));
        let epoch = self.set.epoch(rank).unwrap();
        if let Report::Done(outcome) = self.set.complete(rank, epoch, id, outcome).unwrap() {
            self.answer(id, outcome);
        }
        let again = self.set.complete(rank, epoch, id, outcome).unwrap_err();
        assert!(matches!(again.kind(), ErrorKind::UnknownTransfer(_)), "answered twice");
    }

    fn drain(&mut self, faults: usize) {
        self.turn(faults);
        while self.m.transfers_in_flight() > 0 {
            self.turn(faults);
        }
    }

    /// Serves one prompt from the first to the last; gives the tokens that came from a cache.
    fn serve(&mut self, seq: u64, prompt: &[u32], faults: usize) -> usize {
        let given = self.m.allocate(seq, prompt, KEYS, 0).unwrap();
        let mut cached = given.hit_tokens;
        if !given.loads.is_empty() {
            while !self.ready.contains_key(&seq) {
                self.turn(faults);
            }
            match self.ready.remove(&seq).unwrap() {
                Some(valid) => cached = valid,
                None => return 0,
            }
        }
        self.check(seq, prompt, cached);
        self.compute(seq, prompt, cached);
        self.m.advance(seq, prompt.len(), prompt.len()).unwrap();
        for _ in 0..self.random.below(64) {
            self.turn(faults);
        }
        self.m.free(seq).unwrap();
        cached
    }
}

/// Prompts of one of two families, so that what one leaves behind the other pushes out.
fn prompt(random: &mut Random) -> Vec<u32> {
    let family = random.below(3) as u32 * 1000;
    let n = 20 + random.below(150) as u32;
    let mut prompt: Vec<u32> = (family..family + n).collect();
    prompt.push(9_000_000 + random.below(5) as u32);
    prompt
}

fn histories(num_kv_heads: u32) {
    let mut onboards = 0;
    for seed in 0..4 {
        let mut world = World::new(seed, num_kv_heads);
        let faults = seed as usize % 3;
        for seq in 0..24 {
            let prompt = prompt(&mut world.random);
            // Offloads pin blocks: there is room again when they end.
            if world.m.free_blocks() < 36 {
                world.drain(faults);
            }
            world.serve(seq, &prompt, faults);
        }
        world.drain(faults);
        assert_eq!(world.m.free_blocks(), world.m.capacity());
        assert_eq!(world.m.usage().host_pinned, 0);
        for rank in 0..RANKS {
            assert_eq!(world.set.behind(rank).unwrap(), 0);
            let stores = world.offloaded[rank as usize] > 0;
            assert_eq!(stores, world.set.owner(rank) == rank, "rank {rank}");
        }
        onboards += world.m.stats().onboards.succeeded;
    }
    assert!(onboards > 50, "{onboards} blocks were loaded");
}

#[test]
fn every_rank_has_its_own_bytes_through_delays_failures_and_reordering() {
    histories(RANKS);
}

#[test]
fn replicated_heads_are_stored_once_and_loaded_by_all() {
    histories(2);
}

fn transfer(m: &mut Manager) -> Transfer {
    m.allocate(1, &(0..17).collect::<Vec<_>>(), KEYS, 0).unwrap();
    m.advance(1, 17, 17).unwrap();
    m.next_transfer().unwrap()
}

#[test]
fn a_transfer_ends_with_the_last_rank_and_succeeds_only_on_all() {
    for failing in [None, Some(0), Some(2)] {
        let mut m = manager();
        let mut set = RankSet::new(4, 4).unwrap();
        let offload = transfer(&mut m);
        let id = offload.id;
        assert_eq!(set.broadcast(offload).unwrap(), Report::Pending);
        assert!(set.broadcast(offload).is_err(), "in flight already");
        for rank in [2, 0, 3, 1] {
            let early = set.complete(rank, 0, id, Outcome::Succeeded).unwrap_err();
            assert!(matches!(early.kind(), ErrorKind::UnknownTransfer(_)), "not taken yet");
            assert_eq!(set.behind(rank).unwrap(), 1);
            assert_eq!(set.next(rank), Some(offload));
            assert_eq!(set.next(rank), None);
            let outcome = match failing == Some(rank) {
                true => Outcome::Failed,
                false => Outcome::Succeeded,
            };
            let merged = match failing {
                Some(_) => Outcome::Failed,
                None => Outcome::Succeeded,
            };
            let expected = if rank == 1 { Report::Done(merged) } else { Report::Pending };
            assert_eq!(set.complete(rank, 0, id, outcome).unwrap(), expected);
            assert_eq!(set.behind(rank).unwrap(), 0);
        }
        assert!(set.complete(1, 0, id, Outcome::Succeeded).is_err(), "over");
    }
}

#[test]
fn steps_settle_with_the_slowest_rank() {
    let mut set = RankSet::new(3, 3).unwrap();
    assert_eq!(set.finished(0, 0, 5).unwrap(), 0);
    assert_eq!(set.finished(2, 0, 3).unwrap(), 0);
    assert_eq!(set.finished(1, 0, 4).unwrap(), 3);
    let back = set.finished(1, 0, 3).unwrap_err();
    assert!(matches!(back.kind(), ErrorKind::InvalidArgument(_)));
    assert_eq!(set.settled(), 3);
    set.lose(2, &mut Vec::new()).unwrap();
    assert_eq!(set.settled(), 4, "a lost rank holds nobody up");
    assert_eq!(set.rejoin(2, 5).unwrap(), 1);
    assert_eq!(set.finished(2, 0, 9).unwrap(), 4, "of its earlier life");
}

#[test]
fn a_lost_rank_fails_what_it_had_and_its_late_reports_are_dropped() {
    let mut m = manager();
    let mut set = RankSet::new(3, 3).unwrap();
    m.allocate(1, &(0..33).collect::<Vec<_>>(), KEYS, 0).unwrap();
    m.advance(1, 33, 33).unwrap();
    let offloads: Vec<Transfer> = std::iter::from_fn(|| m.next_transfer()).collect();
    for offload in &offloads {
        set.broadcast(*offload).unwrap();
    }
    let (first, second) = (offloads[0].id, offloads[1].id);
    // The first has ended everywhere else, the second nowhere.
    for rank in [0, 2] {
        set.next(rank).unwrap();
        assert_eq!(set.complete(rank, 0, first, Outcome::Succeeded).unwrap(), Report::Pending);
    }
    set.next(1).unwrap();
    let mut done = Vec::new();
    set.lose(1, &mut done).unwrap();
    assert_eq!(done, [(first, Outcome::Failed)]);
    assert_eq!(set.complete(1, 0, first, Outcome::Succeeded).unwrap(), Report::Stale);
    assert_eq!(set.next(1), None);
    // The others still work on the memory of the second: it ends when they have.
    set.next(0).unwrap();
    set.next(2).unwrap();
    assert_eq!(set.complete(0, 0, second, Outcome::Succeeded).unwrap(), Report::Pending);
    let failed = Report::Done(Outcome::Failed);
    assert_eq!(set.complete(2, 0, second, Outcome::Succeeded).unwrap(), failed);
    // Nothing succeeds without it; with it, again, and not by the word of its earlier life.
    let again = |id| Transfer { id, ..offloads[0] };
    assert_eq!(set.broadcast(again(1000)).unwrap(), failed);
    assert_eq!(set.rejoin(1, 0).unwrap(), 1);
    assert!(set.rejoin(1, 0).is_err(), "not lost");
    assert_eq!(set.broadcast(again(1001)).unwrap(), Report::Pending);
    set.next(1).unwrap();
    assert_eq!(set.complete(1, 0, 1001, Outcome::Succeeded).unwrap(), Report::Stale);
    assert_eq!(set.complete(1, 1, 1001, Outcome::Succeeded).unwrap(), Report::Pending);
}

#[test]
fn bad_ranks_are_typed_errors() {
    assert!(matches!(RankSet::new(0, 8).err().unwrap().kind(), ErrorKind::Unsupported { .. }));
    assert!(matches!(RankSet::new(129, 129).err().unwrap().kind(), ErrorKind::Unsupported { .. }));
    for (ranks, heads) in [(8, 0), (8, 3), (6, 8)] {
        let error = RankSet::new(ranks, heads).err().unwrap();
        assert!(matches!(error.kind(), ErrorKind::InvalidArgument(_)), "{error}");
    }
    let mut set = RankSet::new(2, 8).unwrap();
    assert_eq!((set.owner(0), set.owner(1)), (0, 1));
    assert_eq!(set.next(2), None);
    for error in [
        set.complete(2, 0, 1, Outcome::Failed).unwrap_err(),
        set.finished(2, 0, 1).unwrap_err(),
        set.behind(2).unwrap_err(),
        set.epoch(2).unwrap_err(),
        set.lose(2, &mut Vec::new()).unwrap_err(),
        set.rejoin(2, 0).unwrap_err(),
    ] {
        assert!(matches!(error.kind(), ErrorKind::UnknownRank { rank: 2, ranks: 2 }), "{error}");
    }
}
