//! `hybridkv replay --trace` on a real trace (Mooncake, conversation), one request at a time: the same hit tokens
//! as vLLM 0.33's `KVCacheManager` gave for the same tokens, groups and pools. Skipped where the trace is not.
#![cfg(feature = "cli")]

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

fn trace() -> Option<PathBuf> {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/traces/mooncake_conversation.jsonl");
    if !path.exists() {
        eprintln!("SKIPPED: no trace at {}", path.display());
        return None;
    }
    Some(path)
}

/// The figures of the first `limit` requests.
fn replay(trace: &Path, limit: usize, args: &[&str]) -> Value {
    let binary = std::env::var_os("HYBRIDKV_BIN");
    let output = Command::new(binary.unwrap_or_else(|| env!("CARGO_BIN_EXE_hybridkv").into()))
        .args(["replay", "--json", "--limit", &limit.to_string(), "--trace"])
        .arg(trace)
        .args(args)
        .output()
        .expect("the binary runs");
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("valid JSON")
}

#[test]
fn hits_on_a_real_trace_are_those_of_vllm() {
    let Some(trace) = trace() else { return };
    const DENSE: &str = "{}";
    const SPARSE: &str = r#"{"retention_interval":0}"#;
    for (groups, pool, config, expected) in [
        ("full", "1M", SPARSE, 592_224),
        ("full", "4M", SPARSE, 2_217_728),
        ("full,sliding:1024", "1M", SPARSE, 526_176),
        ("full,sliding:1024", "1M", DENSE, 531_456),
        ("full,sliding:1024", "4M", SPARSE, 889_088),
        ("full,sliding:1024", "4M", DENSE, 1_123_136),
        ("full,chunked:8192*3", "1M", SPARSE, 511_488),
        ("full,chunked:8192*3", "4M", SPARSE, 592_224),
    ] {
        let args = ["--groups", groups, "--pool-tokens", pool, "--config", config];
        let figures = replay(&trace, 1000, &args);
        assert_eq!(figures["prompt_tokens"], 13_732_944);
        assert_eq!(figures["hit_tokens"], expected, "{groups}, {pool} tokens, {config}");
    }
}

#[test]
fn a_host_tier_adds_hits_and_moves_bytes() {
    let Some(trace) = trace() else { return };
    let args = ["--model", "llama-3.1-8b", "--host-ratio", "2"];
    let figures = replay(&trace, 1000, &args);
    let tokens = |tier: &str| figures["tiers"][tier]["hit_tokens"].as_u64().unwrap();
    assert!(tokens("device") >= 592_224 && tokens("host") > 0, "{figures:#}");
    assert_eq!(figures["hit_tokens"], tokens("device") + tokens("host"));
    let (blocks, bytes) = (&figures["onboarded"]["blocks"], &figures["onboarded"]["bytes"]);
    assert_eq!(bytes.as_u64(), blocks.as_u64().map(|blocks| blocks * (2 << 20)));
    assert_eq!(blocks.as_u64(), Some(tokens("host") / 16));
    for (key, least) in [("hash", 1.0), ("lookup+allocate", 1.0), ("all", 2.0)] {
        assert!(figures["times"][key]["mean_us"].as_f64().unwrap() > least, "{figures:#}");
    }
}
