//! `append` and `move_blocks`, bit by bit against plain loops, on every device at hand: the CPU in both
//! modes, and a GPU when there is one.

mod common;

use std::collections::BTreeSet;

use hybridkv::ErrorKind;
use hybridkv::abi::{HKV_LAYER_FULL, hkv_copy, hkv_window};
use hybridkv::device::{Device, DeviceBuffer, Span};
use hybridkv::layout::{Dtype, KvShape, KvStrides, KvView};
use hybridkv::ops::{
    AppendArgs, CtaQuota, HeadStrides, Kernels, MoveArgs, MoveDim, MoveShape, WindowTable,
};
use proptest::prelude::*;

fn all_kernels(seed: u64) -> Vec<Kernels> {
    let cpus = [Device::cpu(), Device::cpu_deferred(seed)];
    cpus.iter().chain(common::cuda()).map(|device| Kernels::load(device).unwrap()).collect()
}

/// Deterministic bytes without a period that fits any stride.
fn noise(bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let step = |state: &mut u64| {
        *state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*state >> 56) as u8
    };
    (0..bytes).map(|_| step(&mut state)).collect()
}

/// An append of random shape, layout and slots.
#[derive(Debug, Clone)]
struct Append {
    shape: KvShape,
    block_size: u32,
    num_blocks: u64,
    num_layer_slots: u32,
    num_groups: u32,
    group: u32,
    layer_slot: u32,
    num_tokens: u32,
    /// `[block][layer][K|V][head][token]` (BlockFirst/HND), else `[K|V][layer][block][token][head]`
    /// (LayerFirst/NHD).
    block_first: bool,
    /// Elements between the heads of new tokens beyond `head_dim`.
    new_padding: i64,
    seed: u64,
}

fn append() -> impl Strategy<Value = Append> {
    let shape = (
        1u32..5,
        prop::sample::select(vec![8u32, 64, 96, 128, 256]),
        prop::sample::select(vec![Dtype::Bf16, Dtype::F16]),
    );
    let sizes = (3u32..8, 1u64..6, 1u32..4, 1u32..3, 0u32..70);
    (shape, sizes, any::<[u32; 2]>(), any::<bool>(), 0i64..3, any::<u64>()).prop_map(
        |(shape, sizes, picks, block_first, padding, seed)| {
            let (num_kv_heads, head_dim, dtype) = shape;
            let (block_shift, num_blocks, num_layer_slots, num_groups, num_tokens) = sizes;
            Append {
                shape: KvShape { num_kv_heads, head_dim, dtype },
                block_size: 1 << block_shift,
                num_blocks,
                num_layer_slots,
                num_groups,
                group: picks[0] % num_groups,
                layer_slot: picks[1] % num_layer_slots,
                num_tokens: num_tokens.min((num_blocks << block_shift) as u32),
                block_first,
                new_padding: 8 * padding,
                seed,
            }
        },
    )
}

impl Append {
    fn half_elements(&self) -> i64 {
        let shape = self.shape;
        i64::from(self.block_size) * i64::from(shape.num_kv_heads) * i64::from(shape.head_dim)
    }

    fn pool_bytes(&self) -> usize {
        let blocks = self.num_blocks as i64 * i64::from(self.num_layer_slots);
        (2 * blocks * self.half_elements()) as usize * self.shape.dtype.bytes()
    }

    fn view(&self, pool: Span) -> KvView {
        let (d, heads) = (i64::from(self.shape.head_dim), i64::from(self.shape.num_kv_heads));
        if self.block_first {
            let bytes = self.pool_bytes() as u64 / self.num_blocks;
            return KvView::block_first(
                pool,
                self.shape,
                self.block_size,
                self.num_layer_slots,
                self.num_blocks,
                bytes,
            )
            .unwrap();
        }
        let half = pool.bytes / 2;
        KvView {
            k: Span::new(pool.address, half),
            v: Span::new(pool.address + half, half),
            strides: KvStrides {
                block: self.half_elements(),
                layer: self.half_elements() * self.num_blocks as i64,
                head: d,
                token: d * heads,
            },
            shape: self.shape,
            block_size: self.block_size,
            num_blocks: self.num_blocks,
            num_layer_slots: self.num_layer_slots,
            scales: None,
        }
    }

    /// Distinct slots in random order; every fourth token or so is skipped.
    fn slots(&self) -> Vec<i64> {
        let mut free: Vec<i64> = (0..self.num_blocks as i64 * i64::from(self.block_size)).collect();
        let picks = noise(8 * self.num_tokens as usize, self.seed ^ 1);
        let pick = |bytes: &[u8]| {
            let pick = u64::from_le_bytes(bytes.try_into().unwrap());
            let slot = free.swap_remove((pick >> 8) as usize % free.len());
            if pick % 4 == 0 { -1 - slot } else { slot }
        };
        picks.chunks(8).map(pick).collect()
    }

    /// The pool after the append, by the definition of the layouts.
    fn expected(&self, pool: &[u8], new: &[Vec<u8>; 2], slots: &[i64]) -> Vec<u8> {
        let mut pool = pool.to_vec();
        let (d, heads) = (self.shape.head_dim as usize, self.shape.num_kv_heads as usize);
        let (layers, blocks) = (self.num_layer_slots as usize, self.num_blocks as usize);
        let (size, layer) = (self.block_size as usize, self.layer_slot as usize);
        let row = d * self.shape.dtype.bytes();
        let new_row = row + self.new_padding as usize * self.shape.dtype.bytes();
        for (token, &slot) in slots.iter().enumerate().filter(|(_, slot)| **slot >= 0) {
            let (block, offset) = (slot as usize / size, slot as usize % size);
            for head in 0..heads {
                for (kv, new) in new.iter().enumerate() {
                    let index = if self.block_first {
                        (((block * layers + layer) * 2 + kv) * heads + head) * size + offset
                    } else {
                        (((kv * layers + layer) * blocks + block) * size + offset) * heads + head
                    };
                    let from = (token * heads + head) * new_row;
                    pool[index * row..][..row].copy_from_slice(&new[from..][..row]);
                }
            }
        }
        pool
    }
}

/// Everything an append reads and writes, on a device.
struct Loaded {
    pool: DeviceBuffer,
    new: [DeviceBuffer; 2],
    _windows: DeviceBuffer,
    _slots: DeviceBuffer,
    args: AppendArgs,
}

const LAYER: u32 = 1;

fn load(case: &Append, device: &Device, pool: &[u8], new: &[Vec<u8>; 2], slots: &[i64]) -> Loaded {
    let mut rows = vec![bytemuck::Zeroable::zeroed(); 3];
    rows[LAYER as usize] = hkv_window {
        kind: HKV_LAYER_FULL as i32,
        group: case.group as i32,
        layer_slot: case.layer_slot as i32,
        ..bytemuck::Zeroable::zeroed()
    };
    // The other groups' slots point at nothing valid.
    let mut all_slots = vec![i64::MAX / 2; (case.num_groups * case.num_tokens) as usize];
    let first = (case.group * case.num_tokens) as usize;
    all_slots[first..first + slots.len()].copy_from_slice(slots);

    let pool = device.upload(pool).unwrap();
    let new = [0, 1].map(|half| device.upload(&new[half]).unwrap());
    let slots = device.upload(&all_slots).unwrap();
    let windows = device.upload::<hkv_window>(&rows).unwrap();
    let head = i64::from(case.shape.head_dim) + case.new_padding;
    let args = AppendArgs {
        k_new: new[0].span(),
        v_new: new[1].span(),
        dtype: case.shape.dtype,
        new_strides: HeadStrides { token: head * i64::from(case.shape.num_kv_heads), head },
        kv: case.view(pool.span()),
        slot_mapping: slots.span(),
        num_groups: case.num_groups,
        windows: WindowTable { rows: windows.span(), num_layers: 3 },
        layer: LAYER,
        num_tokens: case.num_tokens,
    };
    Loaded { pool, new, _windows: windows, _slots: slots, args }
}

fn new_tokens(case: &Append) -> [Vec<u8>; 2] {
    let head = case.shape.head_dim as usize + case.new_padding as usize;
    let elements = case.num_tokens as usize * case.shape.num_kv_heads as usize * head;
    [2, 3].map(|salt| noise(elements * case.shape.dtype.bytes(), case.seed ^ salt))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn append_writes_exactly_the_slots(case in append()) {
        let pool = noise(case.pool_bytes(), case.seed);
        let (new, slots) = (new_tokens(&case), case.slots());
        let expected = case.expected(&pool, &new, &slots);
        for kernels in all_kernels(case.seed) {
            let loaded = load(&case, kernels.device(), &pool, &new, &slots);
            let stream = kernels.device().stream().unwrap();
            // SAFETY: `loaded` outlives the synchronisation; slots are distinct and inside of the pool.
            unsafe { kernels.append(&loaded.args, stream.as_ref()).unwrap() };
            stream.as_ref().synchronize().unwrap();
            prop_assert!(loaded.pool.download::<u8>().unwrap() == expected, "{:?}", kernels);
            prop_assert!(loaded.new[0].download::<u8>().unwrap() == new[0]);
        }
    }

    /// Fragments of random sizes and distances, in random order, between two memories.
    #[test]
    fn moves_copy_exactly_the_fragments(
        vectors in prop::collection::vec((0u64..700, 0u64..3), 0..80),
        large in prop::option::of(60_000u64..80_000),
        quota in prop_oneof![Just(CtaQuota::WHOLE_DEVICE), (1u32..20).prop_map(CtaQuota::at_most)],
        seed in any::<u64>(),
    ) {
        let sizes: Vec<(u64, u64)> = vectors.into_iter().chain(large.map(|v| (v, 1))).collect();
        let bytes = 16 * sizes.iter().map(|(v, gap)| v + gap).sum::<u64>() as usize + 16;
        // Fragment i goes where fragment order[i] of the same size would come from.
        let mut offsets = Vec::new();
        let mut at = 0;
        for &(vectors, gap) in &sizes {
            offsets.push((16 * at, 16 * vectors));
            at += vectors + gap;
        }
        let source = noise(bytes, seed);
        let before = noise(bytes, seed ^ 1);
        let mut expected = before.clone();
        for &(offset, bytes) in &offsets {
            let range = offset as usize..(offset + bytes) as usize;
            expected[range.clone()].copy_from_slice(&source[range]);
        }
        offsets.sort_by_key(|&(offset, _)| offset.wrapping_mul(seed | 1));
        for kernels in all_kernels(seed) {
            let device = kernels.device();
            let mut pinned = device.alloc_pinned(bytes).unwrap();
            pinned.as_mut_slice().copy_from_slice(&source);
            let buffer = device.upload(&before).unwrap();
            let back = device.alloc_pinned(bytes).unwrap();
            let stream = device.stream().unwrap();
            // Up from pinned memory, then down again: both directions and both kinds of table memory.
            let rows = |src: u64, dst: u64| -> Vec<[u64; 3]> {
                offsets.iter().map(|&(offset, bytes)| [src + offset, dst + offset, bytes]).collect()
            };
            let up = device.upload(&rows(pinned.address(), buffer.address())).unwrap();
            let down = rows(buffer.address(), back.address());
            let mut down_table = device.alloc_pinned(24 * down.len()).unwrap();
            down_table.as_mut_slice().copy_from_slice(bytemuck::cast_slice(&down));
            for copies in [up.span(), down_table.span()] {
                let args = MoveArgs { copies, num_copies: offsets.len() as u64, shape: MoveShape::FRAGMENTS, quota };
                // SAFETY: the buffers outlive the synchronisation; fragments are apart.
                unsafe { kernels.move_blocks(&args, stream.as_ref()).unwrap() };
            }
            stream.as_ref().synchronize().unwrap();
            prop_assert!(buffer.download::<u8>().unwrap() == expected, "up: {:?}", kernels);
            for &(offset, bytes) in &offsets {
                let range = offset as usize..(offset + bytes) as usize;
                prop_assert!(back.as_slice()[range.clone()] == source[range], "down: {:?}", kernels);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Blocks of rows that lie differently on both sides, up from pinned memory and down again.
    #[test]
    fn moves_copy_exactly_the_rows_of_blocks(
        counts in prop::collection::vec(1u32..6, 1..=4),
        order in Just([0usize, 1, 2, 3]).prop_shuffle(),
        gaps in prop::array::uniform4(0i64..3),
        row_vectors in prop_oneof![1i64..9, 30i64..70],
        blocks in 1u64..40,
        tables in any::<[bool; 2]>(),
        quota in prop_oneof![Just(CtaQuota::WHOLE_DEVICE), (1u32..20).prop_map(CtaQuota::at_most)],
        seed in any::<u64>(),
    ) {
        // Rows are packed at the destination in the order of the dimensions, at the source in another, with gaps.
        let (row, dims) = (16 * row_vectors, counts.len());
        let (mut src_strides, mut dst_strides) = ([0; 4], [0; 4]);
        let mut extent = row;
        for &d in order.iter().filter(|&&d| d < dims) {
            extent += 16 * gaps[d];
            src_strides[d] = extent;
            extent *= i64::from(counts[d]);
        }
        let src_block = extent as u64;
        let mut packed = row;
        for d in (0..dims).rev() {
            dst_strides[d] = packed;
            packed *= i64::from(counts[d]);
        }
        let dst_block = packed as u64;
        let source = noise((src_block * blocks) as usize, seed);
        let mut expected = vec![0xEEu8; (dst_block * blocks) as usize];
        for block in 0..blocks {
            let target = blocks - 1 - block;
            for index in 0..dst_block / row as u64 {
                let (mut from, mut above) = (block * src_block, index);
                for d in (0..dims).rev() {
                    from += above % u64::from(counts[d]) * src_strides[d] as u64;
                    above /= u64::from(counts[d]);
                }
                let to = (target * dst_block + index * row as u64) as usize;
                expected[to..to + row as usize]
                    .copy_from_slice(&source[from as usize..from as usize + row as usize]);
            }
        }
        let dim = |d: usize| MoveDim {
            count: counts[d],
            src_stride: src_strides[d],
            dst_stride: dst_strides[d],
        };
        for kernels in all_kernels(seed) {
            let device = kernels.device();
            let mut pinned = device.alloc_pinned(source.len()).unwrap();
            pinned.as_mut_slice().copy_from_slice(&source);
            let buffer = device.upload(&vec![0xEEu8; expected.len()]).unwrap();
            let back = device.alloc_pinned(source.len()).unwrap();
            // Strides of the first dimension are multiplied in the kernel or, given as a table, not.
            let steps = |strides: [i64; 4]| -> Vec<i64> {
                (0..i64::from(counts[0])).map(|i| i * strides[0]).collect()
            };
            let src_table = device.upload(&steps(src_strides)).unwrap();
            let dst_table = device.upload(&steps(dst_strides)).unwrap();
            let forward: Vec<MoveDim> = (0..dims).map(dim).collect();
            let backward: Vec<MoveDim> = forward
                .iter()
                .map(|d| MoveDim { src_stride: d.dst_stride, dst_stride: d.src_stride, ..*d })
                .collect();
            let mut up = MoveShape::blocks(&forward).unwrap();
            let mut down = MoveShape::blocks(&backward).unwrap();
            if tables[0] {
                up = up.with_src_offsets(src_table.span());
                down = down.with_dst_offsets(src_table.span());
            }
            if tables[1] {
                up = up.with_dst_offsets(dst_table.span());
                down = down.with_src_offsets(dst_table.span());
            }
            let rows = |src: u64, dst: u64, src_bytes: u64, dst_bytes: u64| -> Vec<[u64; 3]> {
                (0..blocks)
                    .map(|i| (i, blocks - 1 - i))
                    .map(|(i, j)| [src + i * src_bytes, dst + j * dst_bytes, row as u64])
                    .collect()
            };
            let up_rows = rows(pinned.address(), buffer.address(), src_block, dst_block);
            let down_rows = rows(buffer.address(), back.address(), dst_block, src_block);
            let stream = device.stream().unwrap();
            let move_all = |rows: &[[u64; 3]], shape: MoveShape| {
                let table = device.upload(rows).unwrap();
                let args = MoveArgs { copies: table.span(), num_copies: blocks, shape, quota };
                // SAFETY: the buffers outlive the synchronisation; rows are apart.
                unsafe { kernels.move_blocks(&args, stream.as_ref()).unwrap() };
                stream.as_ref().synchronize().unwrap();
            };
            move_all(&up_rows, up);
            prop_assert!(buffer.download::<u8>().unwrap() == expected, "up: {:?}", kernels);
            move_all(&down_rows, down);
            for index in 0..dst_block / row as u64 * blocks {
                let (mut at, mut above) = (0, index);
                for d in (0..dims).rev() {
                    at += above % u64::from(counts[d]) * src_strides[d] as u64;
                    above /= u64::from(counts[d]);
                }
                let at = (at + above * src_block) as usize;
                let range = at..at + row as usize;
                prop_assert!(back.as_slice()[range.clone()] == source[range], "down: {:?}", kernels);
            }
        }
    }
}

fn example() -> Append {
    Append {
        shape: KvShape { num_kv_heads: 2, head_dim: 64, dtype: Dtype::Bf16 },
        block_size: 16,
        num_blocks: 4,
        num_layer_slots: 2,
        num_groups: 2,
        group: 1,
        layer_slot: 1,
        num_tokens: 5,
        block_first: true,
        new_padding: 0,
        seed: 7,
    }
}

/// A change to the arguments that must be refused, and a word of the message.
type Fault = (&'static str, fn(&mut AppendArgs));

#[test]
fn append_refuses_what_the_host_can_see() {
    const FAULTS: &[Fault] = &[
        ("block_size", |a| a.kv.block_size = 24),
        ("block_size", |a| a.kv.block_size = 256),
        ("dtype", |a| a.kv.shape.dtype = Dtype::F32),
        ("head_dim", |a| a.kv.shape.head_dim = 60),
        ("aligned", |a| a.k_new.address += 8),
        ("aligned", |a| a.kv.v.address += 2),
        ("multiple of 16", |a| a.new_strides.head = 60),
        ("negative", |a| a.new_strides.token = -128),
        ("are needed", |a| a.v_new.bytes -= 1),
        ("are needed", |a| a.new_strides.token = 1 << 20),
        ("are needed", |a| a.kv.num_blocks = 5),
        ("are needed", |a| a.kv.strides.block *= 2),
        ("overflow", |a| a.new_strides.token = i64::MAX - 7),
        ("are needed", |a| a.slot_mapping.bytes -= 1),
        ("num_groups", |a| a.num_groups = 0),
        ("layer 3", |a| a.layer = 3),
        ("null", |a| a.windows.rows.address = 0),
    ];
    let case = example();
    let kernels = Kernels::load(&Device::cpu()).unwrap();
    let stream = kernels.device().stream().unwrap();
    let pool = vec![0; case.pool_bytes()];
    let loaded = load(&case, kernels.device(), &pool, &new_tokens(&case), &case.slots());
    for (word, fault) in FAULTS {
        let mut args = loaded.args;
        fault(&mut args);
        // SAFETY: nothing is launched with wrong arguments.
        let error = unsafe { kernels.append(&args, stream.as_ref()) }.expect_err(word);
        assert_eq!(error.op(), "append");
        assert!(error.to_string().contains(word), "{word:?} is not in {error}");
    }
    let empty = AppendArgs { num_tokens: 0, k_new: Span::default(), ..loaded.args };
    // SAFETY: no tokens, nothing is accessed.
    unsafe { kernels.append(&empty, stream.as_ref()).unwrap() };
    assert_eq!(loaded.pool.download::<u8>().unwrap(), pool, "refused launches write nothing");
}

#[test]
fn moves_refuse_what_the_host_can_see() {
    let kernels = Kernels::load(&Device::cpu()).unwrap();
    let stream = kernels.device().stream().unwrap();
    let other = Device::cpu().stream().unwrap();
    let table = kernels.device().upload(&[0u64; 6]).unwrap();
    let args = MoveArgs {
        copies: table.span(),
        num_copies: 2,
        shape: MoveShape::FRAGMENTS,
        quota: CtaQuota::HOST_LINK,
    };
    // SAFETY: the table has two copies of no bytes; wrong arguments are not launched.
    unsafe {
        kernels.move_blocks(&args, stream.as_ref()).unwrap();
        let longer = MoveArgs { num_copies: 3, ..args };
        let odd = MoveArgs { copies: Span::new(table.address() + 4, 44), num_copies: 1, ..args };
        let endless = MoveArgs { num_copies: u64::MAX, ..args };
        for wrong in [longer, odd, endless] {
            let error = kernels.move_blocks(&wrong, stream.as_ref()).unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::InvalidArgument(_)));
        }
        assert!(kernels.move_blocks(&args, other.as_ref()).is_err(), "a foreign stream");
        let none = MoveArgs { copies: Span::default(), num_copies: 0, ..args };
        kernels.move_blocks(&none, stream.as_ref()).unwrap();
    }
}

#[test]
fn checking_mode_finds_wrong_device_tables() {
    let case = example();
    let pool = vec![0; case.pool_bytes()];
    let new = new_tokens(&case);
    for kernels in all_kernels(3) {
        let kernels = kernels.checked();
        let stream = kernels.device().stream().unwrap();
        let run = |slots: &[i64]| {
            let loaded = load(&case, kernels.device(), &pool, &new, slots);
            // SAFETY: in checking mode wrong slots are not launched; the rest is right.
            let result = unsafe { kernels.append(&loaded.args, stream.as_ref()) };
            stream.as_ref().synchronize().unwrap();
            (result, loaded.pool.download::<u8>().unwrap() == pool)
        };
        let (result, untouched) = run(&[63, -1, 0, 17, -9]);
        assert!(result.is_ok() && !untouched);
        for (slots, word) in [([0, 1, 2, 64, 3], "slot 64"), ([5, 1, -1, 5, 3], "same slot 5")] {
            let (result, untouched) = run(&slots);
            let message = result.expect_err(word).to_string();
            assert!(message.contains(word) && untouched, "{word:?} is not in {message}");
        }

        let memory = kernels.device().alloc_pinned(256).unwrap();
        let at = memory.address();
        for (rows, word) in [
            ([[at, at + 128, 24], [0, 0, 0]], "size 0x18"),
            ([[at + 8, at + 128, 16], [0, 0, 0]], "source"),
            ([[at, at + 128, 32], [at, at + 144, 32]], "overlap"),
            ([[at, at + 128, 32], [at + 144, at + 192, 16]], "the source of copy 1 overlaps"),
            ([[0, at + 128, 32], [0, 0, 0]], "outside"),
        ] {
            let table = kernels.device().upload(&rows).unwrap();
            let args = MoveArgs {
                copies: table.span(),
                num_copies: 2,
                shape: MoveShape::FRAGMENTS,
                quota: CtaQuota::HOST_LINK,
            };
            // SAFETY: in checking mode wrong tables are not launched.
            let message =
                unsafe { kernels.move_blocks(&args, stream.as_ref()) }.expect_err(word).to_string();
            assert!(message.contains(word), "{word:?} is not in {message}");
        }
        let table = kernels.device().upload(&[[at, at + 128, 128u64]]).unwrap();
        let args = MoveArgs {
            copies: table.span(),
            num_copies: 1,
            shape: MoveShape::FRAGMENTS,
            quota: CtaQuota::HOST_LINK,
        };
        // SAFETY: one copy inside of pinned memory that outlives the synchronisation.
        unsafe { kernels.move_blocks(&args, stream.as_ref()).unwrap() };
        stream.as_ref().synchronize().unwrap();
    }
}

#[test]
fn host_known_copy_tables_are_held_to_their_memory() {
    let memory = [Span::new(0x1000, 0x100), Span::new(0x8000, 0x100)];
    let copy = |src: u64, dst: u64, bytes| hkv_copy { src: src as _, dst: dst as _, bytes };
    let check = |copies: &[hkv_copy]| hybridkv::ops::check_copies(copies, &memory);
    check(&[copy(0x1000, 0x8000, 0x80), copy(0x1080, 0x8080, 0x80)]).unwrap();
    assert!(check(&[copy(0x1000, 0x8090, 0x80)]).is_err(), "leaves its range");
    assert!(check(&[copy(0x2000, 0x8000, 0x80)]).is_err(), "no range of ours");
    assert!(check(&[copy(0x1000, 0x8000, u64::MAX - 15)]).is_err(), "overflows");
}

/// Every size class the tiling distinguishes: fewer fragments than CTAs, more tiles than CTAs.
#[test]
fn many_fragments_are_moved_once_each() {
    let distinct: BTreeSet<u64> = [1, 3, 511, 512, 513, 3000].into();
    for kernels in all_kernels(1) {
        for &count in &distinct {
            for quota in [CtaQuota::at_most(1), CtaQuota::HOST_LINK, CtaQuota::WHOLE_DEVICE] {
                let device = kernels.device();
                let bytes = 32 * count as usize;
                let source = device.upload(&noise(bytes, count)).unwrap();
                let target = device.upload(&vec![0u8; bytes]).unwrap();
                let rows: Vec<[u64; 3]> = (0..count)
                    .map(|i| {
                        [source.address() + 32 * i, target.address() + 32 * (count - 1 - i), 32]
                    })
                    .collect();
                let table = device.upload(&rows).unwrap();
                let stream = device.stream().unwrap();
                let args = MoveArgs {
                    copies: table.span(),
                    num_copies: count,
                    shape: MoveShape::FRAGMENTS,
                    quota,
                };
                // SAFETY: the buffers outlive the synchronisation; fragments are apart.
                unsafe { kernels.move_blocks(&args, stream.as_ref()).unwrap() };
                stream.as_ref().synchronize().unwrap();
                let expected: Vec<u8> =
                    noise(bytes, count).chunks(32).rev().flatten().copied().collect();
                assert!(target.download::<u8>().unwrap() == expected, "{count} {quota:?}");
            }
        }
    }
}
