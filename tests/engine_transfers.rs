//! The engine on the CPU device in deferred mode, where streams run in an adversarial order bound only by
//! stream order and event waits: bytes are right with the engine's waits under every seed, and wrong
//! without them under some.

use std::collections::HashSet;
use std::sync::Arc;

use hybridkv::codec::Codec;
use hybridkv::device::{Device, StreamRef};
use hybridkv::engine::{Engine, EngineConfig, Fault, FaultKind, HostSize, Pacing, SlotFormat};
use hybridkv::error::ErrorKind;
use hybridkv::manager::{BlockCopy, BlockHash, Direction, Outcome, Path, Transfer};
use hybridkv::ops::Kernels;

const BLOCK: usize = 4096 + 128;
const CONFIG: EngineConfig =
    EngineConfig { block_bytes: BLOCK, num_blocks: 9, num_slots: 16, slots: SlotFormat::AS_IS };

fn engine(device: &Device, config: EngineConfig) -> Engine {
    Engine::new(Arc::new(Kernels::load(device).unwrap()), config).unwrap()
}

fn transfer(id: u64, path: Path) -> Transfer {
    Transfer { id, path, group: 0, hash: BlockHash::NONE, codec: Codec::Raw, seq: None }
}

fn offload(id: u64, block: u32, slot: u32) -> Transfer {
    transfer(id, Path::Offload { from: block, to: slot })
}

fn onboard(id: u64, slot: u32, block: u32) -> Transfer {
    transfer(id, Path::Onboard { from: slot, to: block })
}

/// Stands for a step that writes a block.
fn write(engine: &Engine, block: u32, byte: u8, compute: StreamRef<'_>) {
    // SAFETY: a block of the pool, which outlives the stream's work in every test.
    unsafe { compute.fill(engine.block(block).unwrap().address, byte, BLOCK).unwrap() }
}

fn wait(engine: &mut Engine) -> Vec<(u64, Outcome)> {
    let mut ended = Vec::new();
    engine.wait(&mut ended).unwrap();
    ended
}

fn holds(bytes: &[u8], byte: u8) -> bool {
    bytes.iter().all(|b| *b == byte)
}

/// What a block holds, read on the compute stream.
fn read(engine: &Engine, block: u32, compute: StreamRef<'_>) -> Vec<u8> {
    let pinned = compute.device().alloc_pinned(BLOCK).unwrap();
    // SAFETY: both ranges outlive the synchronisation.
    unsafe {
        compute.copy(engine.block(block).unwrap().address, pinned.address(), BLOCK).unwrap();
    }
    compute.synchronize().unwrap();
    pinned.as_slice().to_vec()
}

fn break_ordering(engine: &mut Engine, direction: Direction) {
    engine.inject(Fault { direction, kind: FaultKind::Unordered, count: 1 });
}

/// R2: what is offloaded is what the step wrote that was submitted before. Whether that held.
fn offload_sees_the_step(seed: u64, ordered: bool) -> bool {
    let device = Device::cpu_deferred(seed);
    let compute = device.stream().unwrap();
    let mut engine = engine(&device, CONFIG);
    for round in 1..6u8 {
        write(&engine, 3, round, compute.as_ref());
        if !ordered {
            break_ordering(&mut engine, Direction::Offload);
        }
        engine.submit(&[offload(round as u64, 3, 5)], compute.as_ref()).unwrap();
        assert_eq!(wait(&mut engine), [(round as u64, Outcome::Succeeded)]);
        if !holds(&engine.slot(5).unwrap()[..BLOCK], round) {
            return false;
        }
    }
    true
}

#[test]
fn r2_an_offload_waits_for_the_step_that_wrote_the_block() {
    assert!((0..64).all(|seed| offload_sees_the_step(seed, true)));
    assert!(
        !(0..64).all(|seed| offload_sees_the_step(seed, false)),
        "no seed caught the missing wait"
    );
}

/// R3: a step that was submitted before an onboard still reads the old bytes, and a pending fill does not
/// overwrite what was loaded. Whether that held.
fn onboard_follows_readers_and_fills(seed: u64, ordered: bool) -> bool {
    let device = Device::cpu_deferred(seed);
    let compute = device.stream().unwrap();
    let mut engine = engine(&device, CONFIG);
    write(&engine, 1, 77, compute.as_ref());
    engine.submit(&[offload(0, 1, 0)], compute.as_ref()).unwrap();
    wait(&mut engine);
    let probe = device.alloc_pinned(BLOCK).unwrap();
    for round in 1..6u8 {
        write(&engine, 2, round, compute.as_ref());
        // SAFETY: both ranges outlive the synchronisations below.
        unsafe {
            let block = engine.block(2).unwrap().address;
            compute.as_ref().copy(block, probe.address(), BLOCK).unwrap();
        }
        write(&engine, 2, 0, compute.as_ref());
        if !ordered {
            break_ordering(&mut engine, Direction::Onboard);
        }
        engine.submit(&[onboard(round as u64, 0, 2)], compute.as_ref()).unwrap();
        assert_eq!(wait(&mut engine), [(round as u64, Outcome::Succeeded)]);
        let after = read(&engine, 2, compute.as_ref());
        if !holds(probe.as_slice(), round) || !holds(&after, 77) {
            return false;
        }
    }
    true
}

#[test]
fn r3_an_onboard_waits_for_readers_and_fills_of_its_target() {
    assert!((0..64).all(|seed| onboard_follows_readers_and_fills(seed, true)));
    assert!(
        !(0..64).all(|seed| onboard_follows_readers_and_fills(seed, false)),
        "no seed caught the missing wait"
    );
}

#[test]
fn compute_can_wait_for_onboards_without_the_host() {
    let seen = |seed, waits: bool| {
        let device = Device::cpu_deferred(seed);
        let compute = device.stream().unwrap();
        let mut engine = engine(&device, CONFIG);
        write(&engine, 1, 9, compute.as_ref());
        engine.submit(&[offload(0, 1, 4)], compute.as_ref()).unwrap();
        wait(&mut engine);
        engine.submit(&[onboard(1, 4, 7)], compute.as_ref()).unwrap();
        if waits {
            engine.wait_onboarded(compute.as_ref()).unwrap();
        }
        holds(&read(&engine, 7, compute.as_ref()), 9)
    };
    assert!((0..64).all(|seed| seen(seed, true)));
    assert!(!(0..64).all(|seed| seen(seed, false)));
}

/// A small random number generator.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = hybridkv::ops::synthetic::splitmix64(self.0);
        (self.0 % bound as u64) as usize
    }
}

#[test]
fn bytes_survive_thousands_of_transfers_under_pressure() {
    for seed in 0..6 {
        let device = Device::cpu_deferred(seed);
        let compute = device.stream().unwrap();
        let mut engine = engine(&device, CONFIG);
        let mut random = Random(seed);
        // What every block and slot holds, once outstanding work is done. None: anything.
        let mut blocks = vec![None; CONFIG.num_blocks as usize];
        let mut slots = vec![None; CONFIG.num_slots as usize];
        let mut outstanding: Vec<Transfer> = Vec::new();
        let (mut next_id, mut ended) = (0, Vec::new());
        for step in 0..3000 {
            let block = 1 + random.below(CONFIG.num_blocks as usize - 1);
            let slot = random.below(CONFIG.num_slots as usize);
            let block_busy = outstanding.iter().any(|t| t.path.block() == Some(block as u32));
            let slot_busy = outstanding.iter().any(|t| t.path.slot() == slot as u32);
            let mut start = |direction, engine: &mut Engine| {
                let id = next_id;
                next_id += 1;
                let transfer = match direction {
                    Direction::Offload => offload(id, block as u32, slot as u32),
                    _ => onboard(id, slot as u32, block as u32),
                };
                outstanding.push(transfer);
                engine.submit(&[transfer], compute.as_ref()).unwrap();
            };
            match random.below(8) {
                0..3 if !block_busy => {
                    let byte = random.below(251) as u8;
                    write(&engine, block as u32, byte, compute.as_ref());
                    blocks[block] = Some(byte);
                }
                3..5 if !block_busy && !slot_busy => {
                    start(Direction::Offload, &mut engine);
                    slots[slot] = blocks[block];
                }
                5..7 if !block_busy && !slot_busy => {
                    start(Direction::Onboard, &mut engine);
                    blocks[block] = slots[slot];
                }
                _ => engine.poll(&mut ended).unwrap(),
            }
            if step % 500 == 499 {
                engine.wait(&mut ended).unwrap();
            }
            for (id, outcome) in ended.drain(..) {
                assert_eq!(outcome, Outcome::Succeeded);
                let at = outstanding.iter().position(|t| t.id == id).expect("reported twice");
                let transfer = outstanding.swap_remove(at);
                let slot = transfer.path.slot();
                if let (Direction::Offload, Some(byte)) =
                    (transfer.path.direction(), slots[slot as usize])
                {
                    assert!(holds(&engine.slot(slot).unwrap()[..BLOCK], byte));
                }
            }
            assert_eq!(engine.outstanding(), outstanding.len());
        }
        engine.wait(&mut ended).unwrap();
        assert_eq!(ended.len(), outstanding.len());
        for (block, byte) in blocks.iter().enumerate() {
            if let Some(byte) = byte {
                let bytes = read(&engine, block as u32, compute.as_ref());
                assert!(holds(&bytes, *byte), "block {block}");
            }
        }
        let stats = engine.stats();
        assert_eq!(stats.offload.transfers + stats.onboard.transfers, next_id);
        assert_eq!(stats.offload.bytes, stats.offload.transfers * BLOCK as u64);
        assert!(stats.offload.busy_ms > 0.0 && stats.offload.gbps() > 0.0);
    }
}

#[test]
fn injected_faults_do_what_they_say() {
    let device = Device::cpu();
    let compute = device.stream().unwrap();
    let mut engine = engine(&device, CONFIG);
    let fault = |kind, engine: &mut Engine| {
        write(engine, 1, 1, compute.as_ref());
        write(engine, 2, 2, compute.as_ref());
        engine.submit(&[offload(0, 2, 3)], compute.as_ref()).unwrap();
        wait(engine);
        engine.inject(Fault { direction: Direction::Onboard, kind, count: 1 });
        // The fault is of the other direction: this one must not use it up.
        engine.submit(&[offload(1, 2, 4), onboard(2, 3, 1)], compute.as_ref()).unwrap();
        let mut ended = Vec::new();
        let mut polls = 0;
        while engine.outstanding() > 0 {
            engine.poll(&mut ended).unwrap();
            polls += 1;
        }
        ended.sort_by_key(|(id, _)| *id);
        assert_eq!(ended[0], (1, Outcome::Succeeded));
        assert!(holds(&engine.slot(4).unwrap()[..BLOCK], 2));
        (ended[1].1, read(engine, 1, compute.as_ref()), polls)
    };
    let (outcome, bytes, _) = fault(FaultKind::Fail, &mut engine);
    assert!(outcome == Outcome::Failed && holds(&bytes, 0xFF));
    let (outcome, bytes, _) = fault(FaultKind::Skip, &mut engine);
    assert!(outcome == Outcome::Succeeded && holds(&bytes, 1));
    let (outcome, bytes, _) = fault(FaultKind::Corrupt, &mut engine);
    assert!(outcome == Outcome::Succeeded && !holds(&bytes[..16], 2) && holds(&bytes[16..], 2));
    let (outcome, bytes, polls) = fault(FaultKind::Delay { polls: 5 }, &mut engine);
    assert!(outcome == Outcome::Succeeded && holds(&bytes, 2));
    assert_eq!(polls, 6);
    // All used up.
    engine.submit(&[onboard(9, 3, 1)], compute.as_ref()).unwrap();
    assert_eq!(wait(&mut engine), [(9, Outcome::Succeeded)]);
}

/// The driver fails when the copies of a batch are under way: once that is known nothing of it is, so that its memory may
/// be used again; what was submitted with it is reported as failed, once; and the engine goes on.
#[test]
fn what_a_driver_error_interrupts_leaves_nothing_under_way() {
    for seed in 0..32 {
        let device = Device::cpu_deferred(seed);
        let compute = device.stream().unwrap();
        let mut engine = engine(&device, CONFIG);
        write(&engine, 2, 2, compute.as_ref());
        engine.submit(&[offload(0, 2, 3)], compute.as_ref()).unwrap();
        assert_eq!(wait(&mut engine), [(0, Outcome::Succeeded)]);

        engine.inject(Fault { direction: Direction::Onboard, kind: FaultKind::Driver, count: 1 });
        let submitted = [onboard(1, 3, 1), offload(2, 2, 4), onboard(3, 3, 4)];
        let error = engine.submit(&submitted, compute.as_ref()).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Cuda { .. }), "{error}");
        assert_eq!(engine.outstanding(), 3);
        let mut ended = Vec::new();
        engine.poll(&mut ended).unwrap();
        ended.sort();
        assert_eq!(ended, [1, 2, 3].map(|id| (id, Outcome::Failed)));
        assert_eq!(engine.outstanding(), 0);

        // The targets are somebody else's from now on.
        write(&engine, 1, 9, compute.as_ref());
        write(&engine, 4, 8, compute.as_ref());
        compute.as_ref().synchronize().unwrap();
        engine.submit(&[onboard(4, 3, 5), offload(5, 2, 6)], compute.as_ref()).unwrap();
        let mut ended = wait(&mut engine);
        ended.sort();
        assert_eq!(ended, [4, 5].map(|id| (id, Outcome::Succeeded)));
        for (block, byte) in [(1, 9), (4, 8), (5, 2)] {
            let bytes = read(&engine, block, compute.as_ref());
            assert!(holds(&bytes, byte), "block {block}, seed {seed}");
        }
        assert!(holds(&engine.slot(6).unwrap()[..BLOCK], 2));
    }
}

/// A chunk of stores that could not be started is started again: its blocks are reserved until the end is reported.
#[test]
fn stores_outlast_a_driver_error() {
    for seed in 0..32 {
        let device = Device::cpu_deferred(seed);
        let compute = device.stream().unwrap();
        let mut engine = engine(&device, CONFIG);
        write(&engine, 2, 2, compute.as_ref());
        write(&engine, 3, 3, compute.as_ref());
        engine.inject(Fault { direction: Direction::Offload, kind: FaultKind::Driver, count: 1 });
        let stores = [offload(0, 2, 5), offload(1, 3, 6)];
        let error = engine.submit(&stores, compute.as_ref()).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Cuda { .. }), "{error}");
        let mut ended = wait(&mut engine);
        ended.sort();
        assert_eq!(ended, [0, 1].map(|id| (id, Outcome::Succeeded)));
        for (slot, byte) in [(5, 2), (6, 3)] {
            assert!(holds(&engine.slot(slot).unwrap()[..BLOCK], byte), "seed {seed}");
        }
        assert_eq!(engine.stats().offload.bytes, 2 * BLOCK as u64);
    }
}

#[test]
fn more_transfers_than_the_ring_holds_wait_for_room() {
    let device = Device::cpu_deferred(2);
    let compute = device.stream().unwrap();
    let config = EngineConfig {
        block_bytes: 128,
        num_blocks: 40_001,
        num_slots: 40_001,
        slots: SlotFormat::AS_IS,
    };
    let mut engine = engine(&device, config);
    let transfers: Vec<Transfer> =
        (0..40_000).map(|i| offload(i, i as u32 + 1, i as u32)).collect();
    engine.submit(&transfers, compute.as_ref()).unwrap();
    let ended = wait(&mut engine);
    assert_eq!(ended.len(), 40_000);
    assert_eq!(ended.iter().map(|(id, _)| *id).collect::<HashSet<_>>().len(), 40_000);
    assert_eq!(engine.outstanding(), 0);
    assert_eq!(engine.stats().offload.bytes, 128 * 40_000);
}

/// On the CPU device in eager mode what is started has ended by the next poll.
#[test]
fn loads_overtake_queued_stores_which_come_down_by_chunks() {
    let device = Device::cpu();
    let compute = device.stream().unwrap();
    let config = EngineConfig { num_blocks: 301, num_slots: 400, ..CONFIG };
    let mut engine = engine(&device, config);
    let pacing = Pacing {
        chunk_bytes: 2 * BLOCK as u64,
        in_flight_bytes: 4 * BLOCK as u64,
        ..Pacing::default()
    };
    engine.set_pacing(pacing).unwrap();
    assert!(engine.set_pacing(Pacing { chunk_bytes: 0, ..pacing }).is_err());
    let blocks = 1..=200u32;
    blocks.clone().for_each(|block| write(&engine, block, block as u8, compute.as_ref()));
    let stores: Vec<Transfer> = blocks.map(|b| offload(b.into(), b, b)).collect();
    engine.submit(&stores, compute.as_ref()).unwrap();
    let loads: Vec<Transfer> = (201..=300).map(|b| onboard(b.into(), b, b)).collect();
    engine.submit(&loads, compute.as_ref()).unwrap();
    assert_eq!(engine.outstanding(), 300);

    let mut ended = Vec::new();
    engine.poll(&mut ended).unwrap();
    let is_load = |&&(id, _): &&(u64, Outcome)| id > 200;
    assert_eq!(ended.iter().filter(is_load).count(), 100, "all loads");
    assert!(ended.len() <= 104, "and two chunks of two stores: {}", ended.len());
    let mut polls = 1;
    while engine.outstanding() > 0 {
        let before = ended.len();
        engine.poll(&mut ended).unwrap();
        assert!(ended.len() <= before + 4, "more than were in flight");
        polls += 1;
    }
    assert!(polls >= 50, "{polls}");
    let stored: Vec<u64> = ended.iter().map(|&(id, _)| id).filter(|&id| id <= 200).collect();
    assert_eq!(stored, (1..=200).collect::<Vec<_>>(), "in their order, each once");
    let right = |b: u32| holds(&engine.slot(b).unwrap()[..BLOCK], b as u8);
    assert!((1..=200).all(right));
    assert_eq!(engine.stats().store_share, 1.0, "nothing was reported");
}

/// The host waits for a step, and stores go on meanwhile.
#[test]
fn stores_come_down_while_the_host_waits_for_a_step() {
    let device = Device::cpu_deferred(3);
    let compute = device.stream().unwrap();
    let mut engine = engine(&device, CONFIG);
    engine.set_pacing(Pacing { chunk_bytes: 1, ..Pacing::default() }).unwrap();
    let step = device.event().unwrap();
    let mut stores = 0;
    for round in 0..40 {
        (1..=8).for_each(|block| write(&engine, block, round, compute.as_ref()));
        let all: Vec<Transfer> = (1..=8).map(|b| offload(b.into(), b, b)).collect();
        engine.submit(&all, compute.as_ref()).unwrap();
        (1..=8).for_each(|_| write(&engine, 0, round, compute.as_ref()));
        compute.as_ref().record(&step).unwrap();
        engine.wait_for(&step).unwrap();
        assert!(step.is_complete().unwrap());
        let mut ended = Vec::new();
        engine.poll(&mut ended).unwrap();
        stores += ended.len();
        wait(&mut engine);
    }
    assert!(stores > 40, "{stores}");
}

#[test]
fn bad_transfers_and_sizes_are_refused_and_change_nothing() {
    let device = Device::cpu();
    let compute = device.stream().unwrap();
    let mut engine = engine(&device, CONFIG);
    for bad in [offload(1, 9, 0), offload(1, 1, 16), onboard(1, 16, 1), onboard(1, 0, u32::MAX)] {
        let error = engine.submit(&[offload(0, 1, 1), bad], compute.as_ref()).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::InvalidArgument(_)), "{error}");
        assert_eq!(engine.outstanding(), 0);
    }
    let sized = |bytes, ratio| EngineConfig::sized(BLOCK, bytes, HostSize::Ratio(ratio));
    assert!(sized(BLOCK as u64 * 2 - 1, 2.0).is_err());
    assert!(sized(1 << 20, f64::NAN).is_err());
    assert!(sized(1 << 20, -1.0).is_err());
    assert!(sized(u64::MAX, 1.0).is_err());
    assert!(EngineConfig::sized(100, 1 << 20, HostSize::Bytes(0)).is_err());
    let config = sized(BLOCK as u64 * 10 + 5, 2.0).unwrap();
    assert_eq!((config.num_blocks, config.num_slots), (10, 20));
    // Slots are multiples of 4 KiB: a block of 4224 bytes takes 8 KiB of the host tier.
    let config = EngineConfig::sized(BLOCK, 1 << 20, HostSize::Bytes(8192 * 7 + 1)).unwrap();
    assert_eq!(config.num_slots, 7);
    assert_eq!(config.host_bytes(), 7 * 8192);
}

/// Copies run in their order, behind the step before them and before whatever follows, chains included.
#[test]
fn copies_between_blocks_keep_their_order() {
    let copy = |from, to| BlockCopy { group: 0, from, to };
    for seed in 0..8 {
        let device = Device::cpu_deferred(seed);
        let compute = device.stream().unwrap();
        let mut engine = engine(&device, CONFIG);
        for round in 1..10u8 {
            write(&engine, 1, round, compute.as_ref());
            // A fork of a fork, and a block that is used again at once.
            let copies = [copy(1, 2), copy(2, 3), copy(1, 4), copy(4, 1), copy(3, 4)];
            engine.copy_blocks(&copies, compute.as_ref()).unwrap();
            write(&engine, 2, 100 + round, compute.as_ref());
            engine.submit(&[offload(u64::from(round), 4, 5)], compute.as_ref()).unwrap();
            wait(&mut engine);
            assert!(holds(&engine.slot(5).unwrap()[..BLOCK], round));
            for (block, byte) in [(1, round), (2, 100 + round), (3, round)] {
                assert!(holds(&read(&engine, block, compute.as_ref()), byte), "block {block}");
            }
        }
        let err = engine.copy_blocks(&[copy(1, 2), copy(1, 9)], compute.as_ref()).unwrap_err();
        assert!(matches!(err.kind(), ErrorKind::InvalidArgument(_)), "{err}");
    }
}
