//! Plans, carried out on arrays of bytes, do what the fragments say: nothing else, nothing twice.

use proptest::prelude::*;

use super::*;
use crate::movement::{EngineCost, PitchedCost, SizeCosts};
use crate::ops::MoveDim;

/// Where the two memories begin, as addresses.
const SRC: u64 = 1 << 40;
const DST: u64 = 1 << 41;

/// The bytes at the destination after a move: where each of them came from, and that nothing was written twice.
struct Memory(Vec<Option<u64>>);

impl Memory {
    fn copy(&mut self, src: u64, dst: u64, bytes: u64) {
        for i in 0..bytes {
            let place = &mut self.0[(dst - DST + i) as usize];
            assert_eq!(*place, None, "byte {} is written twice", dst - DST + i);
            *place = Some(src - SRC + i);
        }
    }

    fn copy_blocks(&mut self, copies: &[hkv_copy], shape: &MoveShape) {
        for copy in copies {
            for row in 0..shape.rows() {
                let (mut src, mut dst, mut above) = (copy.src as u64, copy.dst as u64, row);
                for dim in shape.dims().iter().rev() {
                    let step = (above % u64::from(dim.count)) as i64;
                    above /= u64::from(dim.count);
                    src = src.wrapping_add_signed(step * dim.src_stride);
                    dst = dst.wrapping_add_signed(step * dim.dst_stride);
                }
                self.copy(src, dst, copy.bytes);
            }
        }
    }
}

fn copy(src: u64, dst: u64, bytes: u64) -> hkv_copy {
    hkv_copy { src: (SRC + src) as *const _, dst: (DST + dst) as *mut _, bytes }
}

/// Plans the move, and checks that the plan does what the move says and respects the edges.
fn check(
    copies: &[hkv_copy],
    shape: &MoveShape,
    traffic: Traffic,
    model: &LinkModel,
    edges: &[u64],
    length: usize,
) -> (Route, Planner) {
    let mut expected = Memory(vec![None; length]);
    expected.copy_blocks(copies, shape);
    let mut planner = Planner::default().with_staging(u64::MAX);
    let mut planned = copies.to_vec();
    let route = planner.plan(&mut planned, shape, traffic, model, edges);
    let mut done = Memory(vec![None; length]);
    match route {
        Route::Direct { copies, .. } => done.copy_blocks(&planned[..copies], shape),
        Route::Staged { copies, block_bytes, .. } => {
            for copy in &planned[..copies] {
                assert_eq!(
                    block_bytes,
                    copy.bytes * shape.rows(),
                    "what is contiguous is the block"
                );
            }
            done.copy_blocks(&planned[..copies], shape);
        }
    }
    let whole = |address: u64, bytes: u64| {
        assert!(
            !edges.iter().any(|&edge| address < edge && edge < address + bytes),
            "{bytes} bytes at {address:#x} cross an edge"
        );
    };
    for (src, dst, bytes) in planner.engine().iter() {
        whole(src, bytes as u64);
        whole(dst, bytes as u64);
        done.copy(src, dst, bytes as u64);
    }
    for rows in planner.pitched() {
        assert!(rows.row_bytes <= rows.src_pitch.min(rows.dst_pitch) || rows.rows == 1);
        whole(rows.src, ((rows.rows - 1) * rows.src_pitch + rows.row_bytes) as u64);
        whole(rows.dst, ((rows.rows - 1) * rows.dst_pitch + rows.row_bytes) as u64);
        for row in 0..rows.rows as u64 {
            let (src, dst) = (row * rows.src_pitch as u64, row * rows.dst_pitch as u64);
            done.copy(rows.src + src, rows.dst + dst, rows.row_bytes as u64);
        }
    }
    assert!(done.0 == expected.0, "the plan copies other bytes");
    (route, planner)
}

fn model() -> impl Strategy<Value = LinkModel> {
    let us = || prop_oneof![Just(0.0), 0.01..20.0f64];
    let engine =
        (us(), us(), us(), 1.0..60.0f64).prop_map(|(start_us, submit_us, copy_us, gbps)| {
            EngineCost { start_us, submit_us, copies: SizeCosts::at_rate(copy_us, gbps) }
        });
    let pitched = (us(), us(), 1.0..60.0f64).prop_map(|(call_us, row_us, gbps)| PitchedCost {
        call_us,
        row_us,
        gbps,
    });
    let kernel = (1u32..20, us(), us(), 1.0..60.0f64).prop_map(|(ctas, start_us, row_us, gbps)| {
        KernelCost { ctas, start_us, rows: SizeCosts::at_rate(row_us, gbps) }
    });
    let paths = (
        prop::option::of(engine),
        prop::option::of(pitched),
        prop::collection::vec(kernel.clone(), 1..4),
    )
        .prop_map(|(engine, pitched, kernels)| PathCosts { engine, pitched, kernels });
    (prop::array::uniform5(paths), kernel).prop_map(|([a, b, c, d, inside], staging)| LinkModel {
        to_device: [a, b],
        to_host: [c, d],
        inside,
        staging,
    })
}

fn traffic() -> impl Strategy<Value = Traffic> {
    let way = prop_oneof![Just(Way::HostToDevice), Just(Way::DeviceToHost), Just(Way::Inside)];
    (way, any::<bool>()).prop_map(|(way, both_ways)| Traffic { way, both_ways })
}

/// Blocks of one size, ids on both sides: runs up and down, strides, and none of them.
fn ids() -> impl Strategy<Value = Vec<(u64, u64)>> {
    let run = (0u64..200, 0u64..200, 1u64..20, -3i64..4, -3i64..4).prop_map(|(a, b, n, s, d)| {
        let step = |from: u64, step: i64, i: u64| from.wrapping_add_signed(200 + step * i as i64);
        (0..n).map(|i| (step(a, s, i), step(b, d, i))).collect::<Vec<_>>()
    });
    prop::collection::vec(run, 0..8).prop_map(|runs| {
        let mut taken = std::collections::HashSet::new();
        runs.into_iter().flatten().filter(|(_, to)| taken.insert(*to)).collect()
    })
}

proptest! {
    #[test]
    fn plans_of_fragments_copy_what_they_say(
        ids in ids(),
        vectors in 1u64..8,
        odd in prop::option::of(0usize..50),
        traffic in traffic(),
        model in model(),
        edges in prop::collection::btree_set(0u64..60_000, 0..6),
    ) {
        let bytes = 16 * vectors;
        let mut copies: Vec<hkv_copy> =
            ids.iter().map(|&(from, to)| copy(from * bytes, to * bytes, bytes)).collect();
        // One fragment may be shorter, or empty.
        if let Some(odd) = odd.and_then(|at| copies.get_mut(at)) {
            odd.bytes = bytes / 32 * 16;
        }
        let edges: Vec<u64> =
            edges.iter().map(|edge| SRC + edge).chain(edges.iter().map(|edge| DST + edge + 7)).collect();
        check(&copies, &MoveShape::FRAGMENTS, traffic, &model, &edges, (500 * bytes) as usize);
    }

    #[test]
    fn plans_of_blocks_copy_what_they_say(
        ids in ids(),
        (layers, parts, vectors) in (1u32..5, 1u32..3, 1u64..4),
        (src_first, dst_first) in any::<(bool, bool)>(),
        traffic in traffic(),
        model in model(),
        edges in prop::collection::btree_set(0u64..200_000, 0..4),
    ) {
        let row = 16 * vectors;
        let block = row * u64::from(layers * parts);
        // LayerFirst: the rows of a block are a pool apart. BlockFirst: they follow one another.
        let place = |layer_first: bool| if layer_first { (row, 500 * row) } else { (block, row) };
        let ((src_block, src_row), (dst_block, dst_row)) = (place(src_first), place(dst_first));
        let dim = |count: u32, rows: u64| MoveDim {
            count,
            src_stride: (rows * src_row) as i64,
            dst_stride: (rows * dst_row) as i64,
        };
        let dims = [dim(layers, u64::from(parts)), dim(parts, 1)];
        let shape = MoveShape::blocks(if parts == 1 { &dims[..1] } else { &dims }).unwrap();
        let copies: Vec<hkv_copy> =
            ids.iter().map(|&(from, to)| copy(from * src_block, to * dst_block, row)).collect();
        let edges: Vec<u64> =
            edges.iter().map(|edge| SRC + edge).chain(edges.iter().map(|edge| DST + edge + 7)).collect();
        let length = 500 * block as usize;
        let (route, _) = check(&copies, &shape, traffic, &model, &edges, length);
        if let Route::Staged { .. } = route {
            let host_is_packed = match traffic.way {
                Way::HostToDevice => !src_first || layers * parts == 1,
                Way::DeviceToHost => !dst_first || layers * parts == 1,
                Way::Inside => false,
            };
            prop_assert!(host_is_packed, "staged without contiguous blocks on the host");
        }
    }
}

/// About what an H100 on PCIe 5 does.
fn example() -> LinkModel {
    let kernel = |ctas, row_us, gbps| KernelCost {
        ctas,
        start_us: 6.0,
        rows: SizeCosts::at_rate(row_us, gbps),
    };
    let paths = |engine: f64, rate: f64| PathCosts {
        engine: Some(EngineCost {
            start_us: 3.0,
            submit_us: 0.5,
            copies: SizeCosts::measured(|bytes| Ok(0.5f64.max(0.12 + bytes as f64 / engine / 1e3)))
                .unwrap(),
        }),
        pitched: Some(PitchedCost { call_us: 9.0, row_us: 0.003, gbps: engine }),
        kernels: vec![kernel(4, 0.03, rate), kernel(16, 0.017, rate)],
    };
    LinkModel {
        to_device: [paths(53.0, 51.0), paths(43.0, 30.0)],
        to_host: [paths(54.0, 52.0), paths(43.0, 25.0)],
        inside: paths(1500.0, 1400.0),
        staging: kernel(8, 0.001, 150.0),
    }
}

#[test]
fn each_size_takes_its_path() {
    let alone = Traffic { way: Way::HostToDevice, both_ways: false };
    let both = Traffic { both_ways: true, ..alone };
    let scattered = |bytes: u64, count: u64| -> Vec<hkv_copy> {
        (0..count)
            .map(|i| copy((i * 7 % count) * 3 * bytes, (i * 5 % count) * 2 * bytes, bytes))
            .collect()
    };
    let shares = |copies: &[hkv_copy], traffic| {
        let mut planner = Planner::default().with_staging(u64::MAX);
        let mut planned = copies.to_vec();
        let route = planner.plan(&mut planned, &MoveShape::FRAGMENTS, traffic, &example(), &[]);
        let Route::Direct { copies, ctas } = route else { panic!("{route:?}") };
        (copies, planner.engine().len(), planner.pitched().len(), ctas)
    };
    assert_eq!(shares(&scattered(512, 97), alone), (97, 0, 0, 16), "small fragments: the kernel");
    assert_eq!(shares(&scattered(4096, 97), alone), (97, 0, 0, 4), "as fast with fewer CTAs");
    assert_eq!(
        shares(&scattered(1 << 20, 97), alone),
        (0, 97, 0, 4),
        "large ones: the copy engines"
    );
    assert_eq!(shares(&scattered(96 << 10, 97), alone), (97, 0, 0, 4));
    assert_eq!(
        shares(&scattered(96 << 10, 97), both),
        (0, 97, 0, 4),
        "both ways: the copy engines"
    );
    let run: Vec<_> = (0..97).map(|i| copy(i * 4096, i * 4096, 4096)).collect();
    assert_eq!(shares(&run, alone), (0, 1, 0, 4), "one contiguous copy");
    let down: Vec<_> = run.iter().rev().copied().collect();
    assert_eq!(shares(&down, alone), (0, 1, 0, 4), "downwards, too");
    let rows: Vec<_> = (0..9700).map(|i| copy(i * 8192, i * 4096, 4096)).collect();
    assert_eq!(shares(&rows, both), (0, 0, 1, 4), "regular rows: one pitched copy");
    let mixed = [scattered(4096, 97), vec![copy(1 << 24, 1 << 24, 64 << 20)]].concat();
    assert_eq!(shares(&mixed, alone), (97, 1, 0, 4), "each its own path");

    // Blocks of 96 rows that are contiguous on the host.
    let rows = MoveDim { count: 96, src_stride: 4096, dst_stride: 1 << 24 };
    let shape = MoveShape::blocks(&[rows]).unwrap();
    let blocks: Vec<_> =
        (0..200).map(|i| copy(i * 7 % 200 * 393_216, i * 4096 * 3, 4096)).collect();
    let route = |traffic| {
        Planner::default().with_staging(u64::MAX).plan(
            &mut blocks.clone(),
            &shape,
            traffic,
            &example(),
            &[],
        )
    };
    assert_eq!(route(alone), Route::Direct { copies: 200, ctas: 4 });
    assert_eq!(route(both), Route::Staged { copies: 200, block_bytes: 393_216, ctas: 8 });
}

#[test]
fn without_copy_engines_all_goes_by_the_kernel() {
    let model = LinkModel::kernels_only(4);
    let traffic = Traffic { way: Way::DeviceToHost, both_ways: true };
    let copies: Vec<_> = (0..50).map(|i| copy(i * 8192, i * 4096 * 3, 4096)).collect();
    let (route, planner) =
        check(&copies, &MoveShape::FRAGMENTS, traffic, &model, &[SRC + 5], 50 * 4096 * 3);
    assert_eq!(route, Route::Direct { copies: 50, ctas: 4 });
    assert!(planner.engine().is_empty() && planner.pitched().is_empty());
}
