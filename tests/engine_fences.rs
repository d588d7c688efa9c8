//! Fences under pressure: a manager, an engine and a compute stream serve prompts from a pool and a host tier that
//! are both too small for them. Every block has bytes of its own; steps write what was not found and read all of
//! their blocks, and what they read is compared. Delays are forced on the compute stream and on both lanes.
//!
//! With every fence in place no byte is ever wrong. Each of the mistakes below leaves one out, and is caught: on the
//! CPU device, whose streams run in an adversarial order, and on a GPU when there is one.

#[path = "common/manager.rs"]
mod common;

use std::sync::Arc;

use common::{FULL, KEYS};
use hybridkv::ErrorKind;
use hybridkv::device::{Device, DeviceBuffer, Event, PinnedBuffer, Stream, StreamRef};
use hybridkv::engine::{Engine, EngineConfig, Fault, FaultKind, Pacing, SlotFormat};
use hybridkv::manager::{
    BlockId, Completion, Direction, HostConfig, Manager, Outcome, SeqId, Transfer, TransferId,
};
use hybridkv::ops::Kernels;
use hybridkv::ops::synthetic::splitmix64;

const BLOCK: usize = 4096 + 128;
const BLOCK_TOKENS: usize = 16;
/// Prompts of as many blocks each, of which nothing is shared.
const PROMPTS: usize = 12;
const BLOCKS: usize = 4;
/// Device blocks and host slots, for the 48 blocks of all prompts.
const NUM_BLOCKS: u32 = 12;
const NUM_SLOTS: u32 = 22;
/// Sequences at once; their names are used again.
const MAX_SEQS: usize = 2;
/// Bytes of a delay of the compute stream on a GPU: about 20 us.
const DELAY_BYTES: usize = 64 << 20;

/// A fence that is left out, or the promise of one that is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mistake {
    /// R2: stores do not wait for the step that writes their block.
    StoresUnordered,
    /// R2: blocks are reused while they are stored.
    StoresAnsweredEarly,
    /// R3: loads do not wait for the last readers of their target and for pending fills.
    LoadsUnordered,
    /// R3: steps do not wait for the loads that they run behind.
    StepsDoNotWait,
    /// R1: slots are evicted while they are read, and steps follow loads that have not ended.
    LoadsAnsweredEarly,
    /// R10: the targets of loads that nobody waits for any more are used while the loads write.
    CancelledLoadsAnswered,
}

const MISTAKES: [Mistake; 6] = [
    Mistake::StoresUnordered,
    Mistake::StoresAnsweredEarly,
    Mistake::LoadsUnordered,
    Mistake::StepsDoNotWait,
    Mistake::LoadsAnsweredEarly,
    Mistake::CancelledLoadsAnswered,
];

/// A sequence that waits for its loads, or whose step is on the device.
struct Live {
    seq: SeqId,
    prompt: usize,
    hit_blocks: usize,
    loads: Vec<TransferId>,
    /// Whether its loads are still to be answered.
    loading: bool,
    step: Option<Step>,
}

struct Step {
    read: PinnedBuffer,
    end: Event,
}

#[derive(Debug, Default)]
struct Tally {
    steps: usize,
    loaded: usize,
    cancelled: usize,
    wrong_blocks: usize,
}

struct World {
    // First: waits for the device before the memory goes.
    engine: Engine,
    manager: Manager,
    compute: Arc<Stream>,
    /// `[PROMPTS][BLOCKS]` blocks of what must be in them.
    patterns: PinnedBuffer,
    delay: DeviceBuffer,
    live: Vec<Live>,
    /// Answered before they ended.
    answered: Vec<TransferId>,
    spare: Vec<Step>,
    random: u64,
    mistake: Option<Mistake>,
    tally: Tally,
}

fn pattern(prompt: usize, block: usize) -> u8 {
    1 + (prompt * BLOCKS + block) as u8
}

impl World {
    fn new(device: &Device, seed: u64, mistake: Option<Mistake>) -> Self {
        let sizes = EngineConfig {
            block_bytes: BLOCK,
            num_blocks: NUM_BLOCKS,
            num_slots: NUM_SLOTS,
            slots: SlotFormat::AS_IS,
        };
        let mut patterns = device.alloc_pinned(PROMPTS * BLOCKS * BLOCK).unwrap();
        for (at, bytes) in patterns.as_mut_slice().chunks_exact_mut(BLOCK).enumerate() {
            bytes.fill(pattern(at / BLOCKS, at % BLOCKS));
        }
        let delay = if device.is_cuda() { DELAY_BYTES } else { 0 };
        let mut engine = Engine::new(Arc::new(Kernels::load(device).unwrap()), sizes).unwrap();
        if !device.is_cuda() {
            // Pauses of stores beside loads are of real time: the order of a deferred device is its seed's alone.
            engine.set_pacing(Pacing { beside_loads: 1.0, ..Pacing::default() }).unwrap();
        }
        Self {
            engine,
            manager: common::manager(&[FULL], NUM_BLOCKS, Some(HostConfig::new(NUM_SLOTS))),
            compute: Arc::new(device.stream().unwrap()),
            patterns,
            delay: device.alloc(delay).unwrap(),
            live: Vec::new(),
            answered: Vec::new(),
            spare: Vec::new(),
            random: splitmix64(seed),
            mistake,
            tally: Tally::default(),
        }
    }

    fn below(&mut self, bound: usize) -> usize {
        self.random = splitmix64(self.random);
        (self.random % bound as u64) as usize
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    fn is(&self, mistake: Mistake) -> bool {
        self.mistake == Some(mistake)
    }

    /// Lives for so many rounds, or until something is wrong.
    fn run(mut self, rounds: usize) -> Tally {
        for _ in 0..rounds {
            match self.below(6) {
                0..3 if self.live.len() < MAX_SEQS => self.start(),
                3 => self.cancel(),
                _ => self.settle(),
            }
            self.complete();
            if self.tally.wrong_blocks > 0 {
                break;
            }
        }
        let mut ended = Vec::new();
        self.engine.wait(&mut ended).unwrap();
        (*self.compute).as_ref().synchronize().unwrap();
        self.tally
    }

    /// A delay of what is submitted to the compute stream next, sometimes.
    fn dawdle(&mut self, compute: StreamRef<'_>) {
        if !self.delay.is_empty() && self.one_in(2) {
            for _ in 0..1 + self.below(6) {
                // SAFETY: all of a buffer that nothing else uses and that outlives the stream's work.
                unsafe { compute.fill(self.delay.address(), 0, self.delay.len()).unwrap() };
            }
        }
    }

    fn start(&mut self) {
        let prompt = self.below(PROMPTS);
        let name = |live: &[Live]| (0..).find(|&seq| live.iter().all(|other| other.seq != seq));
        let seq = name(&self.live).unwrap();
        let first = (prompt * BLOCKS * BLOCK_TOKENS) as u32;
        let tokens: Vec<u32> = (first..first + (BLOCKS * BLOCK_TOKENS) as u32).collect();
        let allocation = match self.manager.allocate(seq, &tokens, KEYS, 0) {
            Ok(allocation) => allocation,
            Err(error) if matches!(error.kind(), ErrorKind::NoFreeBlocks { .. }) => return,
            Err(error) => panic!("{error}"),
        };
        let stream = self.compute.clone();
        let compute = (*stream).as_ref();
        self.dawdle(compute);
        for &block in &allocation.new_blocks[0] {
            let block = self.engine.block(block).unwrap();
            // SAFETY: a block that was free: its last readers are on this stream, and loads into it, if the
            // manager keeps its promises, follow this stream.
            unsafe { compute.fill(block.address, 0xFF, BLOCK).unwrap() };
        }
        let loads = allocation.loads;
        self.tally.loaded += loads.len();
        let loading = !loads.is_empty();
        let hit_blocks = allocation.hit_tokens / BLOCK_TOKENS;
        self.live.push(Live { seq, prompt, hit_blocks, loads, loading, step: None });
        self.submit();
        if !loading {
            self.step(self.live.len() - 1, compute);
        } else if self.one_in(2) && self.manager.overlap(seq).is_ok() {
            if !self.is(Mistake::StepsDoNotWait) {
                self.engine.wait_onboarded(compute).unwrap();
            }
            self.step(self.live.len() - 1, compute);
        }
    }

    /// Writes what was not found and reads everything.
    fn step(&mut self, at: usize, compute: StreamRef<'_>) {
        let step = self.spare.pop().unwrap_or_else(|| Step {
            read: compute.device().alloc_pinned(BLOCKS * BLOCK).unwrap(),
            end: compute.device().event().unwrap(),
        });
        self.dawdle(compute);
        let Live { seq, prompt, hit_blocks, .. } = self.live[at];
        let table: Vec<BlockId> = self.manager.table(seq, 0).unwrap();
        let address = |b: usize| self.engine.block(table[b]).unwrap().address;
        // SAFETY: blocks of the sequence, patterns and what is read into outlive the stream's work.
        unsafe {
            for b in hit_blocks..BLOCKS {
                let from = self.patterns.address() + ((prompt * BLOCKS + b) * BLOCK) as u64;
                compute.copy(from, address(b), BLOCK).unwrap();
            }
            for b in 0..BLOCKS {
                let to = step.read.address() + (b * BLOCK) as u64;
                compute.copy(address(b), to, BLOCK).unwrap();
            }
        }
        compute.record(&step.end).unwrap();
        let hit = hit_blocks * BLOCK_TOKENS;
        self.manager.advance(seq, BLOCKS * BLOCK_TOKENS, hit).unwrap();
        self.live[at].step = Some(step);
        self.submit();
    }

    /// Ends a sequence whose step is on the device, or waits for the loads of the oldest.
    fn settle(&mut self) {
        let ready = |live: &Live| live.step.is_some() && !live.loading;
        let Some(at) = self.live.iter().position(ready) else {
            if self.one_in(4) && !self.live.is_empty() {
                let mut ended = Vec::new();
                self.engine.wait(&mut ended).unwrap();
                self.answer(ended);
            }
            return;
        };
        let Live { seq, prompt, step, .. } = self.live.remove(at);
        let step = step.unwrap();
        self.engine.wait_for(&step.end).unwrap();
        for (b, bytes) in step.read.as_slice().chunks_exact(BLOCK).enumerate() {
            let right = bytes.iter().all(|&byte| byte == pattern(prompt, b));
            self.tally.wrong_blocks += usize::from(!right);
        }
        self.tally.steps += 1;
        self.spare.push(step);
        self.manager.advance(seq, BLOCKS * BLOCK_TOKENS, BLOCKS * BLOCK_TOKENS).unwrap();
        self.manager.free(seq).unwrap();
        self.submit();
    }

    /// Gives up a sequence that waits for its loads; another one may have its name at once.
    fn cancel(&mut self) {
        let waits = |live: &Live| live.step.is_none() && live.loading;
        let Some(at) = self.live.iter().position(waits) else { return };
        let live = self.live.remove(at);
        self.manager.free(live.seq).unwrap();
        self.tally.cancelled += 1;
        if self.is(Mistake::CancelledLoadsAnswered) {
            self.answer_early(live.loads);
        }
        self.submit();
    }

    /// Starts what the manager has emitted, some of it late.
    fn submit(&mut self) {
        let transfers: Vec<Transfer> =
            std::iter::from_fn(|| self.manager.next_transfer()).collect();
        let inject = |engine: &mut Engine, direction, kind| {
            engine.inject(Fault { direction, kind, count: 1 });
        };
        for transfer in &transfers {
            let direction = transfer.path.direction();
            let fills = if self.one_in(2) { self.below(48) as u32 } else { 0 };
            inject(&mut self.engine, direction, FaultKind::Late { fills });
        }
        let has = |direction| transfers.iter().any(|t| t.path.direction() == direction);
        for (mistake, direction) in [
            (Mistake::StoresUnordered, Direction::Offload),
            (Mistake::LoadsUnordered, Direction::Onboard),
        ] {
            if self.is(mistake) && has(direction) {
                inject(&mut self.engine, direction, FaultKind::Unordered);
            }
        }
        let stream = self.compute.clone();
        self.engine.submit(&transfers, (*stream).as_ref()).unwrap();
        let early: Vec<TransferId> = transfers
            .iter()
            .filter(|transfer| match transfer.path.direction() {
                Direction::Offload => self.is(Mistake::StoresAnsweredEarly),
                _ => self.is(Mistake::LoadsAnsweredEarly),
            })
            .map(|transfer| transfer.id)
            .collect();
        self.answer_early(early);
    }

    fn complete(&mut self) {
        let mut ended = Vec::new();
        self.engine.poll(&mut ended).unwrap();
        self.answer(ended);
    }

    fn answer_early(&mut self, ids: Vec<TransferId>) {
        let new = |id: &TransferId| !self.answered.contains(id);
        let ids: Vec<TransferId> = ids.into_iter().filter(new).collect();
        self.answered.extend(&ids);
        ids.into_iter().for_each(|id| self.tell(id, Outcome::Succeeded));
    }

    fn answer(&mut self, ended: Vec<(TransferId, Outcome)>) {
        for (id, outcome) in ended {
            match self.answered.iter().position(|&answered| answered == id) {
                Some(at) => {
                    self.answered.swap_remove(at);
                }
                None => self.tell(id, outcome),
            }
        }
        self.submit();
    }

    fn tell(&mut self, id: TransferId, outcome: Outcome) {
        let completion = match self.manager.complete(id, outcome) {
            Ok(completion) => completion,
            // Only somebody who answers too early can answer twice.
            Err(_) if self.mistake.is_some() => return,
            Err(error) => panic!("{error}"),
        };
        let mut next = Some(completion);
        while let Some(completion) = next.take().or_else(|| self.manager.next_completion()) {
            let Completion::Ready { seq, valid_tokens } = completion else {
                assert_eq!(completion, Completion::Pending, "nothing fails here");
                continue;
            };
            let Some(at) = self.live.iter().position(|live| live.seq == seq) else { continue };
            self.live[at].loading = false;
            if self.live[at].step.is_none() {
                assert_eq!(valid_tokens, self.live[at].hit_blocks * BLOCK_TOKENS);
                let stream = self.compute.clone();
                self.step(at, (*stream).as_ref());
            }
        }
    }
}

/// What all seeds, or those until something is wrong, came to.
fn all_seeds(mistake: Option<Mistake>, rounds: usize) -> Tally {
    let mut total = Tally::default();
    for seed in 0..16 {
        let tally = World::new(&Device::cpu_deferred(seed), seed, mistake).run(rounds);
        total.steps += tally.steps;
        total.loaded += tally.loaded;
        total.cancelled += tally.cancelled;
        total.wrong_blocks += tally.wrong_blocks;
        if total.wrong_blocks > 0 {
            break;
        }
    }
    total
}

#[test]
fn no_byte_is_wrong_under_pressure() {
    let tally = all_seeds(None, 2000);
    assert_eq!(tally.wrong_blocks, 0, "{tally:?}");
    assert!(tally.steps > 4000 && tally.loaded > 2000 && tally.cancelled > 200, "{tally:?}");
}

#[test]
fn every_missing_fence_is_caught() {
    for mistake in MISTAKES {
        let tally = all_seeds(Some(mistake), 2000);
        assert!(tally.wrong_blocks > 0, "{mistake:?} was not caught: {tally:?}");
    }
}

#[test]
fn no_byte_is_wrong_on_a_gpu_and_every_missing_fence_is_caught_there() {
    let device = match Device::cuda(0) {
        Ok(device) => device,
        Err(error) => return eprintln!("SKIPPED: no CUDA device ({error})"),
    };
    let tally = World::new(&device, 1, None).run(6000);
    assert_eq!(tally.wrong_blocks, 0, "{tally:?}");
    assert!(tally.steps > 1000 && tally.loaded > 500 && tally.cancelled > 50, "{tally:?}");
    for mistake in MISTAKES {
        let tally = World::new(&device, 2, Some(mistake)).run(6000);
        assert!(tally.wrong_blocks > 0, "{mistake:?} was not caught: {tally:?}");
    }
}
