//! Layer by layer loading and storing on the CPU device in deferred mode, where the lanes run as late as the seed
//! likes: a layer that waits for its part reads the right bytes under every seed, without the wait under some it
//! does not, and the wait for one layer does not wait for the others; and a part that is stored behind its layers
//! is right under every seed, is wrong under some where a layer is marked too early, and does not wait for the
//! layers after it.

use std::sync::Arc;

use hybridkv::codec::Codec;
use hybridkv::device::{Device, PinnedBuffer, StreamRef};
use hybridkv::engine::{Engine, EngineConfig, Fault, FaultKind, Layerwise, LoadMark, SlotFormat};
use hybridkv::error::ErrorKind;
use hybridkv::layout::{Dtype, KvShape};
use hybridkv::manager::{BlockCopy, BlockHash, Direction, Outcome, Path, SeqId, Transfer};
use hybridkv::ops::Kernels;
use hybridkv::spec::{AttentionKind, GroupPlan, LayerGroup};

const SHAPE: KvShape = KvShape { num_kv_heads: 1, head_dim: 64, dtype: Dtype::Bf16 };
const BLOCK_SIZE: u32 = 8;
const NUM_LAYERS: u32 = 6;
/// One layer of a block.
const SLOT: usize = BLOCK_SIZE as usize * 2 * 64 * 2;
const BLOCK: usize = 3 * SLOT + 128;
const POISON: u8 = 0xFF;

/// Full attention in the even layers, a window in the odd ones.
fn plan() -> GroupPlan {
    let group = |kind, first| LayerGroup {
        kind,
        sink_tokens: 0,
        shape: SHAPE,
        block_size: BLOCK_SIZE,
        layers: (first..NUM_LAYERS).step_by(2).collect(),
        layer_slots: 3,
    };
    let window = AttentionKind::Sliding { window: 20 };
    let groups = vec![group(AttentionKind::Full, 0), group(window, 1)];
    GroupPlan { groups, states: Vec::new(), block_bytes: BLOCK }
}

/// An engine whose blocks `1..=blocks` are in the host slots of the same numbers, each layer of each of them with
/// bytes of its own, and poisoned on the device. The odd blocks are of the first group.
fn engine(device: &Device, blocks: u32, parts: u32, compute: StreamRef<'_>) -> Engine {
    let config = EngineConfig {
        block_bytes: BLOCK,
        num_blocks: blocks + 1,
        num_slots: blocks + 1,
        slots: SlotFormat::AS_IS,
    };
    let kernels = Arc::new(Kernels::load(device).unwrap());
    let mut engine = Engine::new(kernels, config).unwrap();
    engine.load_by_layer(&plan(), Layerwise { parts, min_bytes: 0 }).unwrap();
    let fill = |engine: &Engine, block, slot: usize, byte, bytes| {
        let address = engine.block(block).unwrap().address + (slot * SLOT) as u64;
        // SAFETY: inside of a block of the pool, which outlives the stream's work.
        unsafe { compute.fill(address, byte, bytes).unwrap() }
    };
    for block in 1..=blocks {
        for slot in 0..3 {
            fill(&engine, block, slot, byte(block, slot as u32), SLOT);
        }
    }
    let transfer = |block: u32| Transfer {
        id: block.into(),
        path: Path::Offload { from: block, to: block },
        group: group(block),
        hash: BlockHash::NONE,
        codec: Codec::Raw,
        seq: None,
    };
    engine.submit(&(1..=blocks).map(transfer).collect::<Vec<_>>(), compute).unwrap();
    wait(&mut engine);
    (1..=blocks).for_each(|block| fill(&engine, block, 0, POISON, BLOCK));
    engine
}

fn group(block: u32) -> u32 {
    1 - block % 2
}

fn byte(block: u32, slot: u32) -> u8 {
    (16 * slot + block % 16) as u8
}

fn onboard(block: u32, seq: SeqId) -> Transfer {
    let path = Path::Onboard { from: block, to: block };
    let id = 1000 + u64::from(block);
    Transfer {
        id,
        path,
        group: group(block),
        hash: BlockHash::NONE,
        codec: Codec::Raw,
        seq: Some(seq),
    }
}

fn wait(engine: &mut Engine) -> Vec<(u64, Outcome)> {
    let mut ended = Vec::new();
    engine.wait(&mut ended).unwrap();
    ended
}

/// Submits a read of one layer of the blocks of its group, behind the wait for it if there is a mark.
fn read_layer(
    engine: &Engine,
    (layer, blocks): (u32, &[u32]),
    mark: Option<LoadMark>,
    compute: StreamRef<'_>,
) -> Vec<(u32, PinnedBuffer)> {
    if let Some(mark) = mark {
        engine.wait_layer(mark, layer, compute).unwrap();
    }
    let read = |&block: &u32| {
        let out = compute.device().alloc_pinned(SLOT).unwrap();
        let address = engine.block(block).unwrap().address + u64::from(layer / 2) * SLOT as u64;
        // SAFETY: both ranges outlive the synchronisation of the caller.
        unsafe { compute.copy(address, out.address(), SLOT).unwrap() };
        (block, out)
    };
    blocks.iter().filter(|&&block| group(block) == layer % 2).map(read).collect()
}

fn is_right(layer: u32, (block, out): &(u32, PinnedBuffer)) -> bool {
    out.as_slice().iter().all(|&b| b == byte(*block, layer / 2))
}

/// Whether a step behind the loads of nine blocks reads the right bytes in every layer.
fn step_reads_what_was_loaded(seed: u64, parts: u32, waits: bool) -> bool {
    let device = Device::cpu_deferred(seed);
    let stream = device.stream().unwrap();
    let compute = stream.as_ref();
    let mut engine = engine(&device, 9, parts, compute);
    let blocks: Vec<u32> = (1..=9).collect();
    // Two sequences in two submissions; the step is of both.
    for (seq, blocks) in [(7, &blocks[..5]), (8, &blocks[5..])] {
        let loads: Vec<Transfer> = blocks.iter().map(|&block| onboard(block, seq)).collect();
        engine.submit(&loads, compute).unwrap();
    }
    let mark = engine.last_load([7, 8]);
    assert!(mark.is_some(), "nothing has been polled");
    let reads: Vec<_> = (0..NUM_LAYERS)
        .map(|layer| read_layer(&engine, (layer, &blocks), mark.filter(|_| waits), compute))
        .collect();
    compute.synchronize().unwrap();
    let right =
        (0..).zip(&reads).all(|(layer, reads)| reads.iter().all(|read| is_right(layer, read)));
    assert!(wait(&mut engine).iter().all(|&(_, outcome)| outcome == Outcome::Succeeded));
    assert_eq!(engine.last_load([7, 8]), None, "all have ended");
    // Late waits for what has ended are none.
    engine.wait_layer(mark.unwrap(), 0, compute).unwrap();
    right
}

#[test]
fn r3_a_layer_waits_for_its_part_of_the_loads() {
    for parts in [1, 2, 4, 6, 100] {
        assert!((0..48).all(|seed| step_reads_what_was_loaded(seed, parts, true)), "{parts}");
        assert!(
            !(0..48).all(|seed| step_reads_what_was_loaded(seed, parts, false)),
            "no seed caught the missing waits of {parts} parts"
        );
    }
}

/// Seeds of a device on which nothing runs that nobody waits for.
const LAZY: [u64; 3] = [0, 4, 8];

#[test]
fn a_layer_does_not_wait_for_the_next_ones_nor_for_other_sequences() {
    for seed in LAZY {
        let device = Device::cpu_deferred(seed);
        let stream = device.stream().unwrap();
        let compute = stream.as_ref();
        let mut engine = engine(&device, 8, 6, compute);
        let blocks: Vec<u32> = (1..=4).collect();
        for (seq, blocks) in [(1, 1..=4), (2, 5..=8)] {
            let loads: Vec<Transfer> = blocks.map(|block| onboard(block, seq)).collect();
            engine.submit(&loads, compute).unwrap();
        }
        let mark = engine.last_load([1]);
        // Freeing one would let the device run.
        let mut buffers = Vec::new();
        for layer in 0..NUM_LAYERS {
            let now = read_layer(&engine, (layer, &blocks), mark, compute);
            let next = read_layer(&engine, ((layer + 1) % NUM_LAYERS, &blocks), None, compute);
            let others = read_layer(&engine, (layer, &[5, 6, 7, 8]), None, compute);
            compute.synchronize().unwrap();
            assert!(now.iter().all(|read| is_right(layer, read)), "layer {layer}");
            let poisoned = |(_, out): &(u32, PinnedBuffer)| out.as_slice()[0] == POISON;
            assert!(layer + 1 == NUM_LAYERS || next.iter().all(poisoned), "layer {layer}");
            assert!(others.iter().all(poisoned), "layer {layer}");
            buffers.extend([now, next, others]);
        }
        wait(&mut engine);
    }
}

#[test]
fn small_loads_come_whole_and_faults_hit_all_parts() {
    let device = Device::cpu_deferred(2);
    let stream = device.stream().unwrap();
    let compute = stream.as_ref();
    for min_bytes in [0, 1 << 30] {
        let mut engine = engine(&device, 4, 1, compute);
        engine.load_by_layer(&plan(), Layerwise { parts: 6, min_bytes }).unwrap();
        for kind in [FaultKind::Fail, FaultKind::Short, FaultKind::Skip] {
            engine.inject(Fault { direction: Direction::Onboard, kind, count: 1 });
        }
        let loads: Vec<Transfer> = (1..=4).map(|block| onboard(block, 1)).collect();
        engine.submit(&loads, compute).unwrap();
        let error = engine.load_by_layer(&plan(), Layerwise::default()).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::InvalidArgument(_)), "{error}");
        let mark = engine.last_load([1]);
        let reads: Vec<_> = (0..NUM_LAYERS)
            .map(|layer| read_layer(&engine, (layer, &[1, 2, 3, 4]), mark, compute))
            .collect();
        compute.synchronize().unwrap();
        for (layer, reads) in (0..).zip(&reads) {
            for (block, out) in reads {
                // Failed, cut after half of its bytes, never copied, and right.
                let half = layer / 2 == 0;
                let right = *block == 4 || *block == 2 && half;
                assert_eq!(is_right(layer, &(*block, clone(out))), right, "{layer} {block}");
            }
        }
        let outcomes: Vec<Outcome> = wait(&mut engine).into_iter().map(|(_, o)| o).collect();
        let (failed, well) = (Outcome::Failed, Outcome::Succeeded);
        assert_eq!(outcomes, [failed, failed, well, well]);
    }
}

/// When a step marks a layer as computed.
#[derive(Clone, Copy, PartialEq)]
enum Marked {
    /// Behind its writes.
    Behind,
    /// Before them: a mistake.
    Before,
    /// All but the last one: it is stored behind the whole step.
    ButTheLast,
}

/// Steps that write blocks layer by layer, each stored behind its layers. Whether every host slot got what its step
/// wrote, and in how many steps a first layer had come before the last one was written.
fn steps_store_what_they_wrote(seed: u64, parts: u32, marked: Marked) -> (bool, usize) {
    let device = Device::cpu_deferred(seed);
    let stream = device.stream().unwrap();
    let compute = stream.as_ref();
    let mut engine = engine(&device, 6, 1, compute);
    engine.store_by_layer(&plan(), Layerwise { parts, min_bytes: 0 }).unwrap();
    let (mut right, mut ahead) = (true, 0);
    for round in 1..=4u8 {
        let byte = |block: u32, layer: u32| 16 * round + (3 * layer + block) as u8 % 16;
        let mut marks = engine.begin_step().unwrap();
        let early = device.alloc_pinned(1).unwrap();
        for layer in 0..NUM_LAYERS {
            if marked == Marked::Before {
                marks.layer_computed(layer, compute).unwrap();
            }
            if layer + 1 == NUM_LAYERS {
                let first = engine.slot(1).unwrap().as_ptr() as u64;
                // SAFETY: a byte of the arena and a byte that is read after the stream is done.
                unsafe { compute.copy(first, early.address(), 1).unwrap() };
            }
            for block in (1..=6).filter(|&block| group(block) == layer % 2) {
                let slot =
                    engine.block(block).unwrap().address + u64::from(layer / 2) * SLOT as u64;
                // SAFETY: inside of a block of the pool, which outlives the stream's work.
                unsafe { compute.fill(slot, byte(block, layer), SLOT).unwrap() };
            }
            let last = layer + 1 == NUM_LAYERS;
            if marked == Marked::Behind || marked == Marked::ButTheLast && !last {
                marks.layer_computed(layer, compute).unwrap();
            }
        }
        engine.end_step(marks);
        let store = |block: u32| Transfer {
            id: 100 * u64::from(round) + u64::from(block),
            path: Path::Offload { from: block, to: block },
            group: group(block),
            hash: BlockHash::NONE,
            codec: Codec::Raw,
            seq: None,
        };
        engine.submit(&(1..=6).map(store).collect::<Vec<_>>(), compute).unwrap();
        let mut ended = Vec::new();
        while ended.len() < 6 {
            engine.poll(&mut ended).unwrap();
        }
        ended.sort_by_key(|&(id, _)| id);
        assert!(ended.iter().zip(1..).all(|(&(id, _), block)| id == store(block).id), "each once");
        compute.synchronize().unwrap();
        ahead += usize::from(early.as_slice()[0] == byte(1, 0));
        for (block, layer) in (1..=6).flat_map(|b| (0..NUM_LAYERS).map(move |l| (b, l))) {
            if group(block) == layer % 2 {
                let slot = layer as usize / 2 * SLOT;
                let stored = &engine.slot(block).unwrap()[slot..slot + SLOT];
                right &= stored.iter().all(|&b| b == byte(block, layer));
            }
        }
    }
    (right, ahead)
}

#[test]
fn r2_a_part_is_stored_behind_its_layers() {
    for parts in [1, 2, 4, 6] {
        for marked in [Marked::Behind, Marked::ButTheLast] {
            let right = |seed| steps_store_what_they_wrote(seed, parts, marked).0;
            assert!((0..32).all(right), "{parts}");
        }
        let right = |seed| steps_store_what_they_wrote(seed, parts, Marked::Before).0;
        assert!(!(0..32).all(right), "no seed caught the early marks of {parts} parts");
    }
}

#[test]
fn a_part_does_not_wait_for_the_layers_after_it() {
    let ahead = |parts, marked| -> usize {
        (0..32).map(|seed| steps_store_what_they_wrote(seed, parts, marked).1).sum()
    };
    assert!(ahead(6, Marked::Behind) > 0, "no first layer was stored before the last one came");
    assert_eq!(ahead(1, Marked::Behind), 0, "whole blocks wait for the last layer");
    assert_eq!(ahead(6, Marked::ButTheLast), 0, "and so does what was not marked to the end");
}

#[test]
fn copies_of_blocks_after_a_step_are_stored_behind_the_copies() {
    for seed in 0..32 {
        let device = Device::cpu_deferred(seed);
        let stream = device.stream().unwrap();
        let compute = stream.as_ref();
        let mut engine = engine(&device, 4, 1, compute);
        engine.store_by_layer(&plan(), Layerwise { parts: 6, min_bytes: 0 }).unwrap();
        let mut marks = engine.begin_step().unwrap();
        (0..NUM_LAYERS).for_each(|layer| marks.layer_computed(layer, compute).unwrap());
        engine.end_step(marks);
        let from = engine.block(1).unwrap();
        // SAFETY: a block of the pool, which outlives the stream's work.
        unsafe { compute.fill(from.address, 0x3C, BLOCK).unwrap() };
        engine.copy_blocks(&[BlockCopy { group: 0, from: 1, to: 3 }], compute).unwrap();
        let path = Path::Offload { from: 3, to: 3 };
        let store =
            Transfer { id: 1, path, group: 0, hash: BlockHash::NONE, codec: Codec::Raw, seq: None };
        engine.submit(&[store], compute).unwrap();
        wait(&mut engine);
        assert!(engine.slot(3).unwrap().iter().all(|&b| b == 0x3C), "{seed}");
        assert!(engine.store_by_layer(&plan(), Layerwise { parts: 0, min_bytes: 0 }).is_err());
    }
}

fn clone(buffer: &PinnedBuffer) -> PinnedBuffer {
    let device = Device::cpu();
    let mut copy = device.alloc_pinned(buffer.len()).unwrap();
    copy.as_mut_slice().copy_from_slice(buffer.as_slice());
    copy
}

#[test]
fn groups_that_do_not_fit_the_blocks_are_refused() {
    let device = Device::cpu();
    let stream = device.stream().unwrap();
    let mut engine = engine(&device, 2, 6, stream.as_ref());
    let refused = |engine: &mut Engine, change: fn(&mut GroupPlan), parts| {
        let mut plan = plan();
        change(&mut plan);
        engine.load_by_layer(&plan, Layerwise { parts, min_bytes: 0 }).is_err()
    };
    assert!(refused(&mut engine, |_| {}, 0));
    assert!(refused(&mut engine, |plan| plan.groups[1].layers.reverse(), 6));
    assert!(refused(&mut engine, |plan| plan.groups[0].layers.push(6), 6));
    assert!(refused(&mut engine, |plan| plan.groups[0].shape.head_dim = usize::MAX as u32, 6));
    assert!(!refused(&mut engine, |_| {}, 3));
}
