//! Codecs on one core of the CPU, on blocks of channels like real ones: for comparing two versions, and for what a
//! thread of the storage tier can do. Rates are of uncompressed bytes.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use hybridkv::codec::{Codec, Encoded, Geometry, decode};
use hybridkv::layout::Dtype;
use hybridkv::ops::synthetic::{Distribution, Tensor};

/// Blocks that take turns: 6 MiB, more than caches next to a core hold.
const BLOCKS: u64 = 64;

fn codecs(criterion: &mut Criterion) {
    // A block of a full-attention group of Llama-4-Scout on one of 8 ranks: 96 KiB.
    let geometry = Geometry::new(12, 1, 128, 16, Dtype::Bf16).expect("a geometry");
    let distribution = Distribution::embedded(Dtype::Bf16).expect("of bf16");
    let block = |number: u64| -> Vec<u16> {
        let mut elements = vec![0; geometry.elements()];
        for (row, to) in elements.chunks_exact_mut(geometry.head_dim()).enumerate() {
            let (plane, token) = (row / geometry.block_size(), row % geometry.block_size());
            let tensor = [Tensor::K, Tensor::V][plane % 2];
            let token = number * geometry.block_size() as u64 + token as u64;
            distribution.fill(token, plane as u32 / 2, tensor, 0, to);
        }
        elements
    };
    let blocks: Vec<Vec<u16>> = (0..BLOCKS).map(block).collect();
    for codec in Codec::ALL {
        let bytes = codec.slot_bytes(&geometry).expect("a codec of bf16");
        let mut slots = vec![vec![0; bytes]; blocks.len()];
        let mut group = criterion.benchmark_group(codec.name());
        group.throughput(Throughput::Bytes(geometry.raw_bytes() as u64)).sample_size(20);
        let mut turn = 0;
        group.bench_function("encode", |bencher| {
            bencher.iter(|| {
                turn = (turn + 1) % blocks.len();
                let encoded = codec.encode(&geometry, &blocks[turn], &mut slots[turn]);
                assert!(matches!(encoded, Ok(Encoded::Fits { .. })), "{encoded:?}");
            });
        });
        for (block, slot) in blocks.iter().zip(&mut slots) {
            let encoded = codec.encode(&geometry, block, slot);
            assert!(matches!(encoded, Ok(Encoded::Fits { .. })), "{encoded:?}");
        }
        let mut back = vec![0; geometry.elements()];
        group.bench_function("decode", |bencher| {
            bencher.iter(|| {
                turn = (turn + 1) % blocks.len();
                decode(&geometry, black_box(&slots[turn]), &mut back).expect("a sound slot");
            });
        });
        group.finish();
    }
}

criterion_group!(benches, codecs);
criterion_main!(benches);
