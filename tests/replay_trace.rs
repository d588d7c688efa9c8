//! `hybridkv replay --trace` on a real trace (Mooncake, conversation), one request at a time: the same hit tokens
//! as vLLM 0.33's `KVCacheManager` gave for the same tokens, groups and pools. Skipped where the trace is not.
#![cfg(feature = "cli")]

use std::collections::HashSet;
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

/// What `hybridkv replay` prints of a trace.
fn print(trace: &Path, args: &[&str]) -> String {
    let binary = std::env::var_os("HYBRIDKV_BIN");
    let output = Command::new(binary.unwrap_or_else(|| env!("CARGO_BIN_EXE_hybridkv").into()))
        .args(["replay", "--trace"])
        .arg(trace)
        .args(args)
        .output()
        .expect("the binary runs");
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

/// The figures of the first `limit` requests.
fn replay(trace: &Path, limit: usize, args: &[&str]) -> Value {
    let limit = limit.to_string();
    let text = print(trace, &[&["--json", "--limit", &limit], args].concat());
    serde_json::from_str(&text).expect("valid JSON")
}

/// A trace of two requests, of which the second one begins with the first one's prompt.
struct Small(PathBuf);

impl Small {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("hybridkv-{}-{name}", std::process::id()));
        let request = |length: usize, ids: &[u32]| serde_json::json!({ "input_length": length, "output_length": 9, "hash_ids": ids });
        let text = format!("{}\n{}\n", request(512, &[7]), request(1000, &[7, 8]));
        std::fs::write(&path, text).expect("a temporary file");
        Self(path)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[test]
fn figures_of_a_small_trace() {
    let trace = Small::new("figures");
    let args = ["--groups", "full,sliding:64", "--host-ratio", "1"];
    let figures = replay(&trace.0, 9, &args);
    assert_eq!((&figures["requests"], &figures["prompt_tokens"]), (&2.into(), &1512.into()));
    assert_eq!(figures["tiers"]["device"]["hit_tokens"], 512);
    let groups = figures["tiers"]["device"]["groups"].as_array().unwrap();
    assert_eq!((&groups[0]["kind"], &groups[0]["hit_blocks"]), (&"full".into(), &32.into()));
    assert_eq!(groups[1]["hit_blocks"], 4);
    // Every computed block of both groups is written through once.
    assert_eq!(
        figures["offloaded"]["blocks"],
        figures["tiers"]["host"]["groups"][0]["stored_blocks"].as_u64().unwrap()
            + figures["tiers"]["host"]["groups"][1]["stored_blocks"].as_u64().unwrap()
    );
    assert!(print(&trace.0, &args).contains("2 requests, 1512 prompt tokens, 512 hit (33.86 %)"));
}

#[test]
fn a_trace_goes_down_to_storage() {
    let trace = Small::new("storage");
    // A device and a host tier of one request each: the first prompt is lost by both when it comes again.
    let text = std::fs::read_to_string(&trace.0).unwrap();
    let other = text.lines().nth(1).unwrap().replace("[7,8]", "[9,10]");
    std::fs::write(&trace.0, format!("{text}{other}\n{text}")).unwrap();
    let config = r#"{"host":{"blocks":64},"storage":{"bytes":100000000}}"#;
    let args = ["--groups", "full", "--num-blocks", "65", "--config", config];
    let figures = replay(&trace.0, 9, &args);
    let tokens = |tier: &str| figures["tiers"][tier]["hit_tokens"].as_u64().unwrap();
    assert!(tokens("storage") > 0, "{figures:#}");
    let sum = tokens("device") + tokens("host") + tokens("storage");
    assert_eq!(figures["hit_tokens"], sum);
    assert!(figures["fetched"]["blocks"].as_u64().unwrap() > 0);
}

#[test]
fn the_benchmark_of_the_manager_reports_every_case() {
    let trace = Small::new("bench");
    let report = trace.0.with_extension("json");
    let binary = std::env::var_os("HYBRIDKV_BIN");
    let status = Command::new(binary.unwrap_or_else(|| env!("CARGO_BIN_EXE_hybridkv").into()))
        .args(["bench", "manager", "--trace"])
        .arg(&trace.0)
        .arg("--json")
        .arg(&report)
        .status()
        .expect("the binary runs");
    assert!(status.success());
    let text = std::fs::read_to_string(&report).unwrap();
    std::fs::remove_file(&report).unwrap();
    let report: Value = serde_json::from_str(&text).unwrap();
    let rows = report["rows"].as_array().unwrap();
    let names: Vec<&str> = rows.iter().map(|row| row["case"].as_str().unwrap()).collect();
    let expected = [
        "lookup/8192",
        "lookup-hash/8192",
        "cold/8192",
        "metadata/full/device",
        "metadata/full/host",
        "metadata/full/storage",
        "step/256",
        "cold/8192/scout",
        "metadata/scout/device",
        "metadata/scout/host",
        "metadata/scout/storage",
        "step/256/scout",
        "hits/full/1M",
        "trace/conversation",
        "hits/full/4M",
        "hits/sw1024/1M",
        "hits/sw1024/4M",
        "hits/scout/1M",
        "hits/scout/4M",
        "trace/conversation/scout",
    ];
    assert_eq!(names, expected);
    for row in rows {
        let hits = row["case"].as_str().unwrap().starts_with("hits/");
        let ours = row["ours"].as_f64().unwrap();
        // The sparse windows keep the tail of the first prompt's replay boundary, a block before its end.
        assert!(if hits { (496.0..=512.0).contains(&ours) } else { ours > 0.0 }, "{row}");
    }
}

#[test]
fn statistics_are_prometheus_text() {
    let trace = Small::new("prometheus");
    let args = ["--groups", "full,sliding:64", "--host-ratio", "1", "--prometheus"];
    let text = print(&trace.0, &args);
    let mut declared = HashSet::new();
    for line in text.lines() {
        match line.strip_prefix("# ") {
            Some(comment) => {
                let mut words = comment.split(' ');
                assert!(["HELP", "TYPE"].contains(&words.next().unwrap()), "{line}");
                declared.insert(words.next().unwrap());
            }
            None => {
                let (name, value) = line.rsplit_once(' ').unwrap();
                value.parse::<u64>().unwrap_or_else(|_| panic!("{line}"));
                let (name, labels) = name.split_once('{').unwrap_or((name, "}"));
                assert!(declared.contains(name) && labels.ends_with('}'), "{line}");
            }
        }
    }
    for sample in [
        "hybridkv_allocations_total 2",
        "hybridkv_hit_tokens_total 512",
        "hybridkv_hit_blocks_total{tier=\"device\",group=\"1\",kind=\"sliding 64\"} 4",
        "hybridkv_transfers_failed_total{direction=\"offload\"} 0",
        "hybridkv_capacity_blocks{tier=\"device\"} 65536",
        "hybridkv_pinned_blocks{tier=\"host\"} 0",
        "hybridkv_tier_in_service{tier=\"host\"} 1",
        "hybridkv_sequences 0",
    ] {
        assert!(text.lines().any(|line| line == sample), "{sample} is missing in\n{text}");
    }
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
    for key in ["hash", "lookup+allocate", "all"] {
        assert!(figures["times"][key]["mean_us"].as_f64().unwrap() > 0.0, "{figures:#}");
    }
}
