//! The first thousand requests of a real trace (Mooncake, conversation), one at a time: the same hit tokens as
//! vLLM 0.33's `KVCacheManager` gave for the same tokens, groups and pools. Skipped where the trace is not.

use std::path::Path;

use hybridkv::manager::{ExtraKeys, GroupConfig, Manager, ManagerConfig, Retention};
use hybridkv::spec::AttentionKind;
use serde_json::Value;

const REQUESTS: usize = 1000;
const FULL: AttentionKind = AttentionKind::Full;
const SLIDING: AttentionKind = AttentionKind::Sliding { window: 1024 };
const CHUNKED: AttentionKind = AttentionKind::Chunked { chunk: 8192 };

struct Request {
    prompt: Vec<u32>,
    output: Vec<u32>,
}

fn splitmix64(x: u64) -> u64 {
    let z = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Tokens of the trace: of a block of 512 by its id, of an output by its request.
fn requests(text: &str) -> Vec<Request> {
    let request = |(i, line): (usize, &str)| {
        let line: Value = serde_json::from_str(line).unwrap();
        let length = |key: &str| line[key].as_u64().unwrap() as usize;
        let ids = line["hash_ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap());
        let prompt = ids
            .flat_map(|id| (0..512).map(move |p| (splitmix64(id * 512 + p) % 100_000) as u32))
            .take(length("input_length"))
            .collect();
        let output = (0..length("output_length") as u64)
            .map(|j| 100_000 + (splitmix64((1 << 40) + i as u64 * 65_536 + j) % 50_000) as u32)
            .collect();
        Request { prompt, output }
    };
    text.lines().take(REQUESTS).enumerate().map(request).collect()
}

fn hit_tokens(
    requests: &[Request],
    kinds: &[AttentionKind],
    pool: u32,
    interval: Option<u32>,
) -> usize {
    let group = |&kind| GroupConfig { kind, sink_tokens: 0, block_size: 16 };
    let mut m = Manager::new(ManagerConfig {
        groups: kinds.iter().map(group).collect(),
        num_blocks: pool / 16 + 1,
        prefix_caching: true,
        retention: Retention { interval, slack: 0, dense_chunks: true },
        max_model_len: 200_000,
        in_flight_tokens: 16_384,
        host: None,
        identity: [0; 32],
    })
    .unwrap();
    let mut hits = 0;
    for Request { prompt, output } in requests {
        hits += m.allocate(0, prompt, ExtraKeys::default(), 0).unwrap().hit_tokens;
        m.advance(0, prompt.len(), prompt.len()).unwrap();
        m.append(0, output).unwrap();
        m.free(0).unwrap();
    }
    hits
}

#[test]
fn hits_on_a_real_trace_are_those_of_vllm() {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/traces/mooncake_conversation.jsonl");
    let Ok(text) = std::fs::read_to_string(&path) else {
        eprintln!("SKIPPED: no trace at {}", path.display());
        return;
    };
    let requests = requests(&text);
    assert_eq!(requests[0].prompt[..4], [7535, 22465, 48110, 39053]);
    assert_eq!(requests[3].output[..3], [107_651, 115_823, 106_716]);
    const M: u32 = 1 << 20;
    let scout = [FULL, CHUNKED, CHUNKED, CHUNKED];
    for (kinds, pool, interval, expected) in [
        (&[FULL][..], M, Some(0), 592_224),
        (&[FULL], 4 * M, Some(0), 2_217_728),
        (&[FULL, SLIDING], M, Some(0), 526_176),
        (&[FULL, SLIDING], M, None, 531_456),
        (&[FULL, SLIDING], 4 * M, Some(0), 889_088),
        (&[FULL, SLIDING], 4 * M, None, 1_123_136),
        (&scout, M, Some(0), 511_488),
        (&scout, 4 * M, Some(0), 592_224),
    ] {
        let hits = hit_tokens(&requests, kinds, pool, interval);
        assert_eq!(hits, expected, "{kinds:?}, a pool of {pool} tokens, interval {interval:?}");
    }
}
