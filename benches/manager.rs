//! The manager on the operations and sizes that its peers were measured with: a prompt of 8,192 blocks of 16
//! tokens (and one token more, since the last one never hits), a decode step of 256 sequences.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use hybridkv::manager::{
    Eviction, ExtraKeys, GroupConfig, HashedTokens, Manager, ManagerConfig, Retention,
};
use hybridkv::spec::ModelSpec;

const BLOCKS: usize = 8192;
const KEYS: ExtraKeys<'static> = ExtraKeys { salt: "", lora: "" };

/// A model's layer groups, and the suffix of its cases' names.
const MODELS: [(&str, &str); 2] = [("llama-3.1-8b", ""), ("llama-4-scout", "/scout")];

fn manager(model: &str, num_blocks: u32) -> Manager {
    let plan = ModelSpec::preset(model).and_then(|spec| spec.group(16)).unwrap();
    Manager::new(ManagerConfig {
        groups: GroupConfig::of(&plan),
        num_blocks,
        prefix_caching: true,
        retention: Retention::default(),
        eviction: Eviction::Reuse,
        max_model_len: 16 * (BLOCKS as u32 + 512),
        in_flight_tokens: 1 << 20,
        host: None,
        identity: [0; 32],
    })
    .unwrap()
}

/// A prompt that shares nothing with those of another number. Its 131,072 tokens are a chunk edge of Llama 4,
/// where chunked groups need nothing: the same case as in the peers' measurements.
fn prompt(number: usize) -> Vec<u32> {
    blocks(number, BLOCKS)
}

fn blocks(number: usize, blocks: usize) -> Vec<u32> {
    let first = (number as u32).wrapping_mul(0x9E37_79B9);
    (0..16 * blocks as u32 + 1).map(|i| first.wrapping_add(i)).collect()
}

/// A manager that has `prompts` cached prompts of 128K tokens and no sequence.
fn warm(model: &str, num_blocks: u32, prompts: usize) -> Manager {
    let mut m = manager(model, num_blocks);
    for number in 0..prompts {
        let tokens = m.hash(&prompt(number), KEYS);
        serve(&mut m, tokens);
    }
    m
}

fn serve(m: &mut Manager, tokens: HashedTokens) {
    m.allocate_hashed(0, tokens, 0).unwrap();
    m.free(0).unwrap();
}

fn lookup(c: &mut Criterion) {
    for (model, suffix) in MODELS {
        let m = warm(model, 65_536, 1);
        let tokens = prompt(0);
        let hashed = m.hash(&tokens, KEYS);
        assert_eq!(m.lookup_hashed(&hashed).tokens, 16 * BLOCKS);
        c.bench_function(&format!("lookup/8192{suffix}"), |b| {
            b.iter(|| m.lookup_hashed(black_box(&hashed)));
        });
        if suffix.is_empty() {
            c.bench_function("lookup-hash/8192", |b| b.iter(|| m.hash(black_box(&tokens), KEYS)));
        }
    }
    // In the middle of a chunk, whose 256 blocks are looked up in each of the three chunked groups.
    let mut m = manager("llama-4-scout", 65_536);
    let hashed = m.hash(&blocks(0, BLOCKS + 256), KEYS);
    serve(&mut m, hashed.clone());
    assert_eq!(m.lookup_hashed(&hashed).tokens, 16 * (BLOCKS + 256));
    c.bench_function("lookup/8448/scout", |b| b.iter(|| m.lookup_hashed(black_box(&hashed))));
}

/// Lookup, pinning and release of a prompt that is cached.
fn cached(c: &mut Criterion) {
    for (model, suffix) in MODELS {
        let mut m = warm(model, 65_536, 1);
        let hashed = m.hash(&prompt(0), KEYS);
        c.bench_function(&format!("allocate-free-cached/8192{suffix}"), |b| {
            b.iter_batched(
                || hashed.clone(),
                |tokens| serve(&mut m, tokens),
                BatchSize::LargeInput,
            );
        });
        let tokens = prompt(0);
        c.bench_function(&format!("allocate-free-cached-hash/8192{suffix}"), |b| {
            b.iter(|| {
                m.allocate(0, black_box(&tokens), KEYS, 0).unwrap();
                m.free(0).unwrap();
            });
        });
    }
}

/// Allocation, registration and release of prompts that nobody has seen, in a full pool: every block taken
/// drops what it cached.
fn cold(c: &mut Criterion) {
    for (model, suffix) in MODELS {
        let mut m = warm(model, 65_536, 16);
        let hasher = manager(model, 65_536);
        let mut number = 16;
        c.bench_function(&format!("cold/8192{suffix}"), |b| {
            b.iter_batched(
                || {
                    number += 1;
                    hasher.hash(&prompt(number), KEYS)
                },
                |tokens| serve(&mut m, tokens),
                BatchSize::LargeInput,
            );
        });
    }
}

/// One decode step: every sequence gets a token, which is then computed and settled.
fn step(c: &mut Criterion) {
    const SEQUENCES: u64 = 256;
    for (model, suffix) in MODELS {
        for context in [4096, 12_288] {
            let start = |m: &mut Manager| {
                for seq in 0..SEQUENCES {
                    let mut tokens = prompt(seq as usize);
                    tokens.truncate(context);
                    m.allocate(seq, &tokens, KEYS, 0).unwrap();
                    m.advance(seq, context, context).unwrap();
                }
            };
            let name = match context {
                4096 => format!("step/256{suffix}"),
                _ => format!("step/256/12K{suffix}"),
            };
            c.bench_function(&name, |b| {
                b.iter_custom(|iterations| {
                    // Contexts stay near their length: after 1024 steps the sequences begin again.
                    let mut spent = Duration::ZERO;
                    let mut left = iterations;
                    while left > 0 {
                        let mut m = manager(model, 1 << 20);
                        start(&mut m);
                        let steps = left.min(1024);
                        let mut begin = Instant::now();
                        for step in 0..=steps {
                            // The first step lets the sequences' vectors grow, once for many steps.
                            if step == 1 {
                                begin = Instant::now();
                            }
                            let length = context + step as usize + 1;
                            for seq in 0..SEQUENCES {
                                m.append_with(seq, &[step as u32], |g, id| {
                                    black_box((g, id));
                                })
                                .unwrap();
                                m.advance_with(seq, length, length, |g, id| {
                                    black_box((g, id));
                                })
                                .unwrap();
                            }
                        }
                        spent += begin.elapsed();
                        left -= steps;
                    }
                    spent
                });
            });
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).measurement_time(Duration::from_secs(2));
    targets = lookup, cached, cold, step
}
criterion_main!(benches);
