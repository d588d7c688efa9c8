//! Host slots that codecs write: what comes back is what the codec says, whichever the codec, the sections, the
//! parts and the order of the streams; what does not fit is not stored; what was damaged is not loaded.

use std::sync::Arc;

use hybridkv::codec::{self, Codec, Encoded, Geometry, ScalePer};
use hybridkv::device::{Device, StreamRef};
use hybridkv::engine::{
    Engine, EngineConfig, Fault, FaultKind, HostCodecs, HostSize, Layerwise, SlotFormat,
};
use hybridkv::error::ErrorKind;
use hybridkv::layout::{Dtype, KvShape};
use hybridkv::manager::{BlockHash, Direction, HostConfig, Outcome, Path, Transfer};
use hybridkv::ops::Kernels;
use hybridkv::ops::synthetic::{Distribution, Tensor, splitmix64};
use hybridkv::spec::{AttentionKind, GroupPlan, LayerSpec, ModelSpec};

const SHAPE: KvShape = KvShape { num_kv_heads: 2, head_dim: 64, dtype: Dtype::Bf16 };
const LOSSY: [Codec; 6] = [
    Codec::Fp8(ScalePer::Tensor),
    Codec::Fp8(ScalePer::Head),
    Codec::Fp8(ScalePer::Token),
    Codec::Int8,
    Codec::Int6,
    Codec::Int4,
];

/// Six layers in two groups of three.
fn plan() -> GroupPlan {
    plan_of(SHAPE)
}

fn plan_of(shape: KvShape) -> GroupPlan {
    let layer = |l: u32| LayerSpec {
        kind: if l.is_multiple_of(2) {
            AttentionKind::Full
        } else {
            AttentionKind::Sliding { window: 64 }
        },
        sink_tokens: 0,
        shape,
    };
    let spec = ModelSpec {
        layers: (0..6).map(layer).collect(),
        ..ModelSpec::preset("gpt-oss-20b").unwrap()
    };
    spec.group(16).unwrap()
}

fn config(codecs: &HostCodecs) -> EngineConfig {
    let plan = plan();
    let device_bytes = 40 * plan.block_bytes as u64;
    EngineConfig::encoded(&plan, device_bytes, HostSize::Ratio(1.0), codecs).unwrap()
}

fn engine(device: &Device, codecs: &HostCodecs) -> Engine {
    Engine::new(Arc::new(Kernels::load(device).unwrap()), config(codecs)).unwrap()
}

/// The GPU, if there is one with kernels.
fn gpu() -> Option<Device> {
    let device = Device::cuda(0).and_then(|device| Kernels::load(&device).map(|_| device));
    device.map_err(|error| eprintln!("SKIPPED: no CUDA device or kernels ({error})")).ok()
}

/// Elements as a model's are, of any number: `[layer][K|V][head][token][dim]`.
fn elements(number: u64) -> Vec<u16> {
    let distribution = Distribution::embedded(Dtype::Bf16).unwrap();
    let (heads, dim) = (SHAPE.num_kv_heads, SHAPE.head_dim as usize);
    let mut block = vec![0; 3 * 2 * heads as usize * 16 * dim];
    let mut rows = block.chunks_exact_mut(dim);
    for layer in 0..3 {
        for tensor in [Tensor::K, Tensor::V] {
            for head in 0..heads {
                for token in 0..16 {
                    let hash = splitmix64(100 * number + token);
                    distribution.fill(hash, layer, tensor, head, rows.next().unwrap());
                }
            }
        }
    }
    block
}

/// Stands for a step that writes a block.
fn write(engine: &Engine, block: u32, elements: &[u16], compute: StreamRef<'_>) {
    let mut pinned = compute.device().alloc_pinned(2 * elements.len()).unwrap();
    for (bytes, element) in pinned.as_mut_slice().chunks_exact_mut(2).zip(elements) {
        bytes.copy_from_slice(&element.to_le_bytes());
    }
    // SAFETY: both ranges outlive the synchronisation.
    unsafe {
        let block = engine.block(block).unwrap();
        compute.copy(pinned.address(), block.address, pinned.len()).unwrap();
    }
    compute.synchronize().unwrap();
}

/// What a block holds, read on the compute stream.
fn read(engine: &Engine, block: u32, compute: StreamRef<'_>) -> Vec<u16> {
    let elements = elements(0).len();
    let pinned = compute.device().alloc_pinned(2 * elements).unwrap();
    // SAFETY: both ranges outlive the synchronisation.
    unsafe {
        let block = engine.block(block).unwrap();
        compute.copy(block.address, pinned.address(), pinned.len()).unwrap();
    }
    compute.synchronize().unwrap();
    pinned.as_slice().chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect()
}

fn transfer(engine: &Engine, id: u64, path: Path, group: u32) -> Transfer {
    let codec = engine.config().slots.codec(group);
    Transfer { id, path, group, hash: BlockHash::NONE, codec, seq: None }
}

fn wait(engine: &mut Engine) -> Vec<Outcome> {
    let mut ended = Vec::new();
    engine.wait(&mut ended).unwrap();
    ended.sort_unstable_by_key(|&(id, _)| id);
    ended.into_iter().map(|(_, outcome)| outcome).collect()
}

/// What a codec gives back of a block, in so many sections.
fn through(codec: Codec, block: &[u16], sections: usize) -> Vec<u16> {
    let plane = block.len() / 3;
    let mut back = vec![0; block.len()];
    for s in 0..sections {
        let (first, end) = (3 * s / sections, 3 * (s + 1) / sections);
        let geometry = Geometry::new((end - first) as u32, 2, 64, 16, Dtype::Bf16).unwrap();
        let mut slot = vec![0; codec.slot_bytes(&geometry).unwrap()];
        let range = first * plane..end * plane;
        let encoded = codec.encode(&geometry, &block[range.clone()], &mut slot).unwrap();
        assert!(matches!(encoded, Encoded::Fits { .. }), "{codec} {encoded:?}");
        codec::decode(&geometry, &slot, &mut back[range]).unwrap();
    }
    back
}

/// Stores blocks and loads them elsewhere: group 0 from odd blocks, group 1 from even ones.
fn round_trip(device: &Device, codecs: &HostCodecs, layers: Option<Layerwise>) {
    const BLOCKS: u32 = 12;
    let compute = device.stream().unwrap();
    let compute = compute.as_ref();
    let mut engine = engine(device, codecs);
    if let Some(layers) = layers {
        engine.load_by_layer(&plan(), layers).unwrap();
        engine.store_by_layer(&plan(), layers).unwrap();
    }
    let group = |block: u32| 1 - block % 2;
    for block in 1..=BLOCKS {
        write(&engine, block, &elements(block.into()), compute);
    }
    let down: Vec<Transfer> = (1..=BLOCKS)
        .map(|b| transfer(&engine, b.into(), Path::Offload { from: b, to: b - 1 }, group(b)))
        .collect();
    engine.submit(&down, compute).unwrap();
    assert_eq!(wait(&mut engine), [Outcome::Succeeded; BLOCKS as usize]);
    let up: Vec<Transfer> = (1..=BLOCKS)
        .map(|b| transfer(&engine, b.into(), Path::Onboard { from: b - 1, to: b + 20 }, group(b)))
        .collect();
    engine.submit(&up, compute).unwrap();
    assert_eq!(wait(&mut engine), [Outcome::Succeeded; BLOCKS as usize]);
    let formats = engine.config().slots.groups().to_vec();
    for block in 1..=BLOCKS {
        let format = &formats[group(block) as usize];
        let stored = elements(block.into());
        let expected = match format.codec {
            Codec::Raw => stored.clone(),
            codec => through(codec, &stored, format.sections.len()),
        };
        assert_eq!(read(&engine, block + 20, compute), expected, "{}", format.codec);
        assert_eq!(engine.read_slot(block - 1, group(block)).unwrap(), expected);
        assert_eq!(format.codec.is_exact(), expected == stored);
    }
    let raw = u64::from(BLOCKS) * plan().block_bytes as u64;
    let moved: u64 = (1..=BLOCKS)
        .map(|b| {
            let format = &formats[group(b) as usize];
            format.sections.iter().map(|section| section.bytes).sum::<u64>()
        })
        .sum();
    for lane in [engine.stats().offload, engine.stats().onboard] {
        assert_eq!((lane.transfers, lane.bytes, lane.block_bytes), (BLOCKS.into(), moved, raw));
    }
}

#[test]
fn blocks_come_back_as_their_codec_has_them_in_any_order_of_the_streams() {
    let layers = Layerwise { parts: 6, min_bytes: 0 };
    for (seed, codec) in (0..).zip([Codec::Raw, Codec::Lx4].into_iter().chain(LOSSY)) {
        let device = Device::cpu_deferred(seed);
        for sections in [0, 2, 3] {
            let codecs = HostCodecs::all(codec).in_sections(sections);
            round_trip(&device, &codecs, None);
            round_trip(&device, &codecs, Some(layers));
        }
        round_trip(&device, &HostCodecs::all(codec).with_group(1, Codec::Raw), Some(layers));
    }
    round_trip(&Device::cpu_deferred(99), &HostCodecs::default(), Some(layers));
    if let Some(gpu) = gpu() {
        for codec in [Codec::Raw, Codec::Lx4].into_iter().chain(LOSSY) {
            round_trip(&gpu, &HostCodecs::all(codec), None);
            round_trip(&gpu, &HostCodecs::all(codec).in_sections(3), Some(layers));
        }
    }
}

#[test]
fn smaller_slots_are_more_slots() {
    let plan = plan();
    assert_eq!(config(&HostCodecs::all(Codec::Raw)).num_slots, 40);
    let count = |codecs: HostCodecs| {
        let bytes = 1000 * plan.block_bytes as u64;
        let config =
            EngineConfig::encoded(&plan, 1 << 20, HostSize::Bytes(bytes), &codecs).unwrap();
        assert!(
            config.host_bytes() <= bytes
                && config.host_bytes() + config.slot_bytes() as u64 > bytes - 128
        );
        let HostConfig { codecs, num_slots, .. } = config.host();
        assert_eq!((codecs, num_slots), (config.slots.codecs(), config.num_slots));
        assert!((config.slot_ratio() - f64::from(config.num_slots) / 1000.0).abs() < 0.01);
        config.num_slots
    };
    assert_eq!(count(HostCodecs::all(Codec::Raw)), 1000);
    // 16 bits over those of the codec, tables and header included.
    for (codec, slots) in [
        (Codec::Lx4, 1295..1330),
        (Codec::Int8, 1700..1760),
        (Codec::Int6, 2150..2240),
        (Codec::Int4, 2950..3130),
    ] {
        assert!(slots.contains(&count(HostCodecs::all(codec))), "{codec}");
    }
    assert_eq!(count(HostCodecs::default()), count(HostCodecs::all(Codec::Lx4)));
    // All slots have the size of the largest.
    let mixed = HostCodecs::all(Codec::Int4).with_group(0, Codec::Int8);
    assert_eq!(count(mixed), count(HostCodecs::all(Codec::Int8)));
    // Where lx4 gains nothing, the default keeps blocks as they are.
    let f16 = plan_of(KvShape { dtype: Dtype::F16, ..SHAPE });
    let codecs = |codecs: &HostCodecs| SlotFormat::of(&f16, codecs).map(|format| format.codecs());
    assert_eq!(codecs(&HostCodecs::default()).unwrap(), [Codec::Raw; 2]);
    assert!(codecs(&HostCodecs::all(Codec::Lx4)).is_err());
    assert_eq!(codecs(&HostCodecs::all(Codec::Int6)).unwrap(), [Codec::Int6; 2]);
    let error = codecs(&HostCodecs::default().with_group(2, Codec::Int8)).unwrap_err();
    assert!(error.to_string().contains("attention groups are 0 to 1"), "{error}");
}

/// A block whose tables exceed what the kernels have room for is held in several sections.
#[test]
fn large_blocks_come_in_as_many_sections_as_kernels_need() {
    let plan = ModelSpec::preset("llama-3.1-8b").unwrap().group(16).unwrap();
    let format = |codec| SlotFormat::of(&plan, &HostCodecs::all(codec)).unwrap();
    assert_eq!(format(Codec::Lx4).groups()[0].sections.len(), 1);
    let int6 = format(Codec::Int6);
    let sections = &int6.groups()[0].sections;
    assert!(sections.len() > 1, "{sections:?}");
    assert_eq!(sections.iter().map(|s| s.geometry.layers()).sum::<usize>(), 32);
}

/// Another format is another namespace of a store.
#[test]
fn stores_of_other_formats_are_others() {
    let identity = |codecs: &HostCodecs| config(codecs).slots.identity(&[7; 32]);
    let all = [
        HostCodecs::all(Codec::Raw),
        HostCodecs::default(),
        HostCodecs::default().in_sections(3),
        HostCodecs::all(Codec::Int8),
        HostCodecs::all(Codec::Int6),
        HostCodecs::all(Codec::Int6).with_group(1, Codec::Raw),
    ];
    let mut identities: Vec<_> = all.iter().map(identity).collect();
    assert_eq!(identities[0], [7; 32], "blocks as they are, are what they are");
    identities.sort_unstable();
    identities.dedup();
    assert_eq!(identities.len(), all.len());
}

#[test]
fn what_no_slot_holds_is_not_stored_and_harms_nothing() {
    [Some(Device::cpu_deferred(5)), gpu()].iter().flatten().for_each(what_no_slot_holds);
}

fn what_no_slot_holds(device: &Device) {
    let compute = device.stream().unwrap();
    let compute = compute.as_ref();
    for codec in [Codec::Lx4].into_iter().chain(LOSSY) {
        let mut engine = engine(device, &HostCodecs::all(codec));
        let mut odd = elements(1);
        match codec {
            // Exponents all over the place.
            Codec::Lx4 => {
                odd.iter_mut().step_by(3).for_each(|element| *element = element.wrapping_mul(31))
            }
            _ => odd[77] = 0x7fc0,
        }
        write(&engine, 1, &odd, compute);
        write(&engine, 2, &elements(2), compute);
        let down = [1, 2].map(|b| transfer(&engine, b.into(), Path::Offload { from: b, to: b }, 0));
        engine.submit(&down, compute).unwrap();
        assert_eq!(wait(&mut engine), [Outcome::Unfit, Outcome::Succeeded], "{codec}");
        let stats = engine.stats().offload;
        assert_eq!((stats.unfit, stats.corrupt, stats.transfers), (1, 0, 1));
        // The slot holds nothing, and says so: whoever loads it all the same gets no block.
        let error = engine.read_slot(1, 0).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Corrupt(_)), "{error}");
        engine.read_slot(2, 0).unwrap();
        let up = transfer(&engine, 3, Path::Onboard { from: 1, to: 9 }, 0);
        engine.submit(&[up], compute).unwrap();
        assert_eq!(wait(&mut engine), [Outcome::Failed]);
    }
}

#[test]
fn a_flipped_bit_anywhere_fails_the_load() {
    [Some(Device::cpu_deferred(8)), gpu()].iter().flatten().for_each(flipped_bits);
}

fn flipped_bits(device: &Device) {
    let compute = device.stream().unwrap();
    let compute = compute.as_ref();
    for codec in [Codec::Lx4].into_iter().chain(LOSSY) {
        let mut engine = engine(device, &HostCodecs::all(codec).in_sections(2));
        write(&engine, 1, &elements(3), compute);
        let down = transfer(&engine, 0, Path::Offload { from: 1, to: 0 }, 0);
        let up = |engine: &Engine| transfer(engine, 1, Path::Onboard { from: 0, to: 2 }, 0);
        engine.submit(&[down], compute).unwrap();
        assert_eq!(wait(&mut engine), [Outcome::Succeeded]);
        let sections = engine.config().slots.groups()[0].sections.clone();
        for (s, section) in sections.iter().enumerate() {
            // Magic number, codec, geometry, hash, tables and elements.
            let bits = [0, 33, 70, 250]
                .into_iter()
                .chain((0..12).map(|i| splitmix64(100 * s as u64 + i) % (8 * section.bytes)));
            for bit in bits.map(|bit| 8 * section.offset + bit) {
                engine.damage_slot(0, bit).unwrap();
                let error = engine.read_slot(0, 0).unwrap_err();
                assert!(matches!(error.kind(), ErrorKind::Corrupt(_)), "{codec} {bit}: {error}");
                let up = up(&engine);
                engine.submit(&[up], compute).unwrap();
                assert_eq!(wait(&mut engine), [Outcome::Failed], "{codec}, bit {bit}");
                engine.damage_slot(0, bit).unwrap();
            }
        }
        let (up, corrupt) = (up(&engine), engine.stats().onboard.corrupt);
        assert_eq!(corrupt, 16 * sections.len() as u64);
        engine.submit(&[up], compute).unwrap();
        assert_eq!(wait(&mut engine), [Outcome::Succeeded]);
        assert!(engine.damage_slot(0, u64::MAX).is_err());
        // A slot of another codec, or of the other group's geometry, is none either.
        let end = 8 * engine.config().slot_bytes() as u64;
        assert!(engine.damage_slot(0, end).is_err() && engine.damage_slot(u32::MAX, 0).is_err());
    }
}

#[test]
fn faults_do_to_encoded_slots_what_they_say() {
    let device = Device::cpu_deferred(21);
    let compute = device.stream().unwrap();
    let compute = compute.as_ref();
    let mut engine = engine(&device, &HostCodecs::all(Codec::Int6));
    write(&engine, 1, &elements(4), compute);
    let expected = through(Codec::Int6, &elements(4), 1);
    let run = |engine: &mut Engine, direction, kind| {
        engine.inject(Fault { direction, kind, count: 1 });
        let path = match direction {
            Direction::Offload => Path::Offload { from: 1, to: 0 },
            _ => Path::Onboard { from: 0, to: 2 },
        };
        let transfer = transfer(engine, 0, path, 0);
        engine.submit(&[transfer], compute).unwrap();
        wait(engine)[0]
    };
    let late = FaultKind::Late { fills: 3 };
    assert_eq!(run(&mut engine, Direction::Offload, late), Outcome::Succeeded);
    assert_eq!(run(&mut engine, Direction::Onboard, late), Outcome::Succeeded);
    assert_eq!(read(&engine, 2, compute), expected);
    for kind in [FaultKind::Fail, FaultKind::Short] {
        assert_eq!(run(&mut engine, Direction::Onboard, kind), Outcome::Failed);
        assert_eq!(run(&mut engine, Direction::Offload, kind), Outcome::Failed);
    }
    // A transfer that lies is found out where a slot is read.
    assert_eq!(run(&mut engine, Direction::Offload, FaultKind::Corrupt), Outcome::Succeeded);
    assert_eq!(run(&mut engine, Direction::Onboard, late), Outcome::Failed);
}

#[test]
fn transfers_of_another_codec_are_refused() {
    let device = Device::cpu();
    let compute = device.stream().unwrap();
    let mut engine = engine(&device, &HostCodecs::all(Codec::Int6));
    let mut down = transfer(&engine, 0, Path::Offload { from: 1, to: 0 }, 0);
    for codec in [Codec::Raw, Codec::Int8] {
        down.codec = codec;
        let error = engine.submit(&[down], compute.as_ref()).unwrap_err().to_string();
        assert!(error.contains("int6") && error.contains("EngineConfig::host"), "{error}");
    }
    assert_eq!(engine.outstanding(), 0);
}
