//! kvbm-logical on the operations and sizes of hybridkv's benches/manager.rs, under the same names: a prompt of 8,192
//! blocks of 16 tokens, in a pool of 65,536 blocks, LRU, no frequency tracker (its fastest configuration).

use std::hint::black_box;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use dynamo_tokens::TokenBlockSequence;
use kvbm_logical::blocks::ImmutableBlock;
use kvbm_logical::registry::BlockRegistry;
use kvbm_logical::{BlockManager, KvbmSequenceHashProvider, SequenceHash};

const BLOCKS: usize = 8192;
const BLOCK_SIZE: usize = 16;
const POOL: usize = 65_536;

/// What its managers are generic over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Layout;

type Manager = BlockManager<Layout>;

fn manager() -> Manager {
    Manager::builder()
        .block_count(POOL)
        .block_size(BLOCK_SIZE)
        .registry(BlockRegistry::new())
        .with_lru_backend()
        .build()
        .expect("a pool of this size")
}

/// As in benches/manager.rs.
fn prompt(number: usize) -> Vec<u32> {
    let first = (number as u32).wrapping_mul(0x9E37_79B9);
    (0..(BLOCK_SIZE * BLOCKS) as u32 + 1).map(|i| first.wrapping_add(i)).collect()
}

fn hash(tokens: &[u32]) -> Vec<SequenceHash> {
    let sequence = TokenBlockSequence::from_slice(tokens, BLOCK_SIZE as u32, Some(1337));
    sequence.blocks().iter().map(KvbmSequenceHashProvider::kvbm_sequence_hash).collect()
}

/// Allocates and registers the blocks of a prompt that nobody has seen.
fn register(manager: &Manager, hashes: &[SequenceHash]) -> Vec<ImmutableBlock<Layout>> {
    let blocks = manager.allocate_blocks(hashes.len()).expect("the pool is large enough");
    let staged = blocks
        .into_iter()
        .zip(hashes)
        .map(|(block, &hash)| block.stage(hash, BLOCK_SIZE).expect("the same block size"))
        .collect();
    manager.register_blocks(staged)
}

/// A manager that has `prompts` cached prompts and no sequence; each frees its tail first.
fn warm(prompts: usize) -> Manager {
    let manager = manager();
    for number in 0..prompts {
        release(register(&manager, &hash(&prompt(number))));
    }
    manager
}

/// Drops the last block first: the default order would leave no head to be matched.
fn release(mut blocks: Vec<ImmutableBlock<Layout>>) {
    while blocks.pop().is_some() {}
}

fn benches(c: &mut Criterion) {
    let tokens = prompt(0);
    let hashes = hash(&tokens);
    assert_eq!(hashes.len(), BLOCKS);
    c.bench_function("lookup-hash/8192", |b| b.iter(|| hash(black_box(&tokens))));

    // Its lookup takes a reference on every block; here somebody else holds them too.
    let held = warm(0);
    let blocks = register(&held, &hashes);
    assert_eq!(held.match_blocks(&hashes).len(), BLOCKS);
    c.bench_function("lookup/8192", |b| b.iter(|| held.match_blocks(black_box(&hashes))));
    drop(blocks);

    let cached = warm(1);
    assert_eq!(cached.match_blocks(&hashes).len(), BLOCKS);
    c.bench_function("allocate-free-cached/8192", |b| {
        b.iter(|| release(cached.match_blocks(black_box(&hashes))));
    });

    // In a full pool, so that every block taken evicts one.
    let full = warm(16);
    let mut number = 16;
    c.bench_function("cold/8192", |b| {
        b.iter_batched(
            || {
                number += 1;
                hash(&prompt(number))
            },
            |hashes| release(register(&full, &hashes)),
            BatchSize::LargeInput,
        );
    });
}

criterion_group! {
    name = manager_benches;
    config = Criterion::default().sample_size(20);
    targets = benches
}
criterion_main!(manager_benches);
