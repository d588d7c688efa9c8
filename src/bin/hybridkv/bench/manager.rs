//! The manager on one thread: lookup, hashing and registration of a prompt of 8,192 blocks, decode steps of 256
//! sequences, and a whole request trace under the crate's defaults; and what it keeps in memory per block.

use std::hint::black_box;
use std::time::{Duration, Instant};

use hybridkv::error::Result;
use hybridkv::manager::{ExtraKeys, HostConfig, Manager, StorageConfig};

use super::timing::Timing;
use crate::replay::{self, Config};
use crate::report::Row;
use crate::trace::Trace;

const BLOCK_SIZE: u32 = 16;
/// The prompt that is looked up, in blocks; one token more, since the last one never hits.
const BLOCKS: usize = 8192;
/// Sequences of a decode step, and tokens of each.
const SEQUENCES: u64 = 256;
const CONTEXT: usize = 4096;
/// Steps until sequences begin again, so that contexts stay near their length.
const STEPS: usize = 512;
const SAMPLES: usize = 15;
const M: u32 = 1 << 20;
const KEYS: ExtraKeys<'static> = ExtraKeys { salt: "", lora: "" };

/// Bytes of metadata per cached block in each tier, at most.
const METADATA: f64 = 96.0;

/// A mix of layer groups and what is asked of it: microseconds of a prompt that nobody has seen, of a decode step and
/// of the trace, and hit tokens of the trace with pools of 1M and 4M tokens (0: nothing).
struct Mix {
    name: &'static str,
    groups: &'static str,
    cold_us: f64,
    step_us: f64,
    trace_us: f64,
    hits: [f64; 2],
}

const MIXES: [Mix; 3] = [
    Mix {
        name: "full",
        groups: "full",
        cold_us: 800.0,
        step_us: 15.0,
        trace_us: 3e6,
        hits: [13.5e6, 29e6],
    },
    Mix {
        name: "sw1024",
        groups: "full,sliding:1024",
        cold_us: 0.0,
        step_us: 0.0,
        trace_us: 0.0,
        hits: [0.0, 24e6],
    },
    Mix {
        name: "scout",
        groups: "full,chunked:8192*3",
        cold_us: 2000.0,
        step_us: 40.0,
        trace_us: 5e6,
        hits: [0.0, 21e6],
    },
];

/// Measures every case and gives it to `add`.
pub fn measure(trace: Option<&str>, mut add: impl FnMut(Row, Timing)) -> Result<()> {
    let row = |case: String, ours: f64, unit: &str, goal: f64| Row {
        case,
        ours,
        unit: unit.to_owned(),
        goal: (goal > 0.0).then_some(goal),
        ..Row::default()
    };
    let mut m = manager("full", M, 16 * (BLOCKS + 1))?;
    let prompt: Vec<u32> = (0..(16 * BLOCKS + 1) as u32).collect();
    let hashed = m.hash(&prompt, KEYS);
    m.allocate_hashed(0, hashed.clone(), 0)?;
    m.free(0)?;
    let timing = time(|| drop(black_box(m.lookup_hashed(black_box(&hashed)))));
    add(row("lookup/8192".into(), timing.us, "us", 100.0), timing);
    let timing = time(|| drop(black_box(m.hash(black_box(&prompt), KEYS))));
    add(row("lookup-hash/8192".into(), timing.us, "us", 1000.0), timing);
    for mix in MIXES.iter().filter(|mix| mix.step_us > 0.0) {
        let (timing, per_block) = cold(mix.groups)?;
        add(row(format!("cold/8192{}", suffix(mix)), timing.us, "us", mix.cold_us), timing);
        for (tier, bytes) in ["device", "host", "storage"].into_iter().zip(per_block) {
            let once = Timing { us: bytes, spread: 0.0, samples: 1 };
            add(row(format!("metadata/{}/{tier}", mix.name), bytes, "B/block", METADATA), once);
        }
        let timing = step(mix.groups)?;
        add(row(format!("step/256{}", suffix(mix)), timing.us, "us", mix.step_us), timing);
    }
    let Some(path) = trace else { return Ok(()) };
    let trace = Trace::read(path, usize::MAX, 1)?;
    for mix in &MIXES {
        for ((pool, name), goal) in [(M, "1M"), (4 * M, "4M")].into_iter().zip(mix.hits) {
            let config = Config::of_crate(mix.groups, BLOCK_SIZE, pool, trace.longest())?;
            let (manager, figures) = replay::requests(&trace, &config)?;
            let once = |us| Timing { us, spread: 0.0, samples: 1 };
            let us = figures.manager_seconds() * 1e6;
            let hits = manager.stats().hit_tokens as f64;
            add(row(format!("hits/{}/{name}", mix.name), hits, "tokens", goal), once(us));
            // The pool of the published figures: 1M tokens of a full mix; the same bytes are 4M of Scout.
            if mix.trace_us > 0.0 && (pool == M) == suffix(mix).is_empty() {
                let case = format!("trace/conversation{}", suffix(mix));
                add(row(case, us, "us", mix.trace_us), once(us));
            }
        }
    }
    Ok(())
}

fn suffix(mix: &Mix) -> &'static str {
    if mix.name == "scout" { "/scout" } else { "" }
}

fn manager(groups: &str, pool_tokens: u32, max_model_len: usize) -> Result<Manager> {
    Manager::new(Config::of_crate(groups, BLOCK_SIZE, pool_tokens, max_model_len)?.manager()?)
}

/// Allocation, registration and release of prompts that nobody has seen, in a full pool: every block that is taken
/// drops what it cached. And the bytes per block that the manager keeps of the device, a host and a storage tier.
fn cold(groups: &str) -> Result<(Timing, [f64; 3])> {
    let mut m = manager(groups, M, 16 * (BLOCKS + 1))?;
    let mut number = 0u32;
    let mut serve = |m: &mut Manager| {
        let first = number.wrapping_mul(0x9E37_79B9);
        number += 1;
        let prompt: Vec<u32> =
            (0..(16 * BLOCKS + 1) as u32).map(|i| first.wrapping_add(i)).collect();
        let hashed = m.hash(&prompt, KEYS);
        let start = Instant::now();
        m.allocate_hashed(0, hashed, 0)?;
        m.free(0)?;
        Ok(start.elapsed())
    };
    for _ in 0..2 * (M / BLOCK_SIZE) / BLOCKS as u32 {
        serve(&mut m)?;
    }
    let samples: Result<Vec<Duration>> = (0..2 * SAMPLES).map(|_| serve(&mut m)).collect();
    m.attach_host(HostConfig::new(M / BLOCK_SIZE))?;
    m.attach_storage(StorageConfig::new(M / BLOCK_SIZE), &[])?;
    let metadata = m.metadata();
    let per_block = [metadata.device, metadata.host, metadata.storage].map(|t| t.per_block());
    Ok((summary(samples?), per_block))
}

/// One decode step: every sequence gets a token, which is then computed and settled. Of 16 sequences one crosses
/// the edge of a block in every step.
fn step(groups: &str) -> Result<Timing> {
    let mut samples = Vec::new();
    for _ in 0..3 {
        let mut m = manager(groups, 8 * M, CONTEXT + STEPS + BLOCK_SIZE as usize)?;
        let context = |seq: u64| CONTEXT + seq as usize % BLOCK_SIZE as usize;
        for seq in 0..SEQUENCES {
            let first = (seq as u32).wrapping_mul(0x9E37_79B9);
            let tokens: Vec<u32> =
                (0..context(seq) as u32).map(|i| first.wrapping_add(i)).collect();
            m.allocate(seq, &tokens, KEYS, 0)?;
            m.advance(seq, context(seq), context(seq))?;
        }
        for step in 0..STEPS {
            let start = Instant::now();
            for seq in 0..SEQUENCES {
                let length = context(seq) + step + 1;
                m.append_with(seq, &[step as u32], |g, id| _ = black_box((g, id)))?;
                m.advance_with(seq, length, length, |g, id| _ = black_box((g, id)))?;
            }
            samples.push(start.elapsed());
        }
    }
    Ok(summary(samples))
}

fn time(mut work: impl FnMut()) -> Timing {
    work();
    let sample = |work: &mut dyn FnMut()| {
        let start = Instant::now();
        work();
        start.elapsed()
    };
    summary((0..SAMPLES).map(|_| sample(&mut work)).collect())
}

fn summary(mut samples: Vec<Duration>) -> Timing {
    samples.sort_unstable();
    let at = |percent: usize| samples[(samples.len() - 1) * percent / 100].as_secs_f64() * 1e6;
    Timing { us: at(50), spread: (at(90) - at(10)) / at(50), samples: samples.len() }
}
