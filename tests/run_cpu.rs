//! `hybridkv run` end to end on the CPU device: everything verified while blocks are evicted, offloaded and
//! restored; and verification that fails when a transfer lies or starts too early.
#![cfg(feature = "cli")]

mod run_command;

use run_command::{assert_verified, count, figures, hybridkv, run, temporary};
use serde_json::Value;

/// A pool of a few contexts, and a host tier that holds more.
const SMALL: &[&str] = &["--device-mem", "1MiB", "--host-ratio", "4", "--verify", "1"];

#[test]
fn conversations_are_evicted_restored_and_verified() {
    let (code, figures) = figures("main", &[SMALL, &["--requests", "110"]].concat());
    assert_verified(code, &figures);
    assert_eq!(count(&figures, "/requests"), 110);
    let (device, host) = (&figures["device_tier"], &figures["host_tier"]);
    assert!(count(device, "/evicted_blocks") > 0 && count(device, "/hit_blocks") > 0);
    assert!(count(host, "/hit_blocks") > 0);
    assert!(count(&figures, "/hits/device_tokens") > 0 && count(&figures, "/hits/host_tokens") > 0);
    // Every onboarded block was looked at, and every prompt token was a hit or computed.
    assert_eq!(
        count(&figures, "/verified/onboarded_blocks"),
        count(&figures, "/onboard/transfers")
    );
    assert_eq!(count(&figures, "/verified/host_slots"), count(&figures, "/offload/transfers"));
    let block = count(&figures, "/model/block_bytes");
    assert_eq!(count(&figures, "/onboard/bytes"), block * count(&figures, "/onboard/transfers"));
    let hits = count(&figures, "/hits/device_tokens") + count(&figures, "/hits/host_tokens");
    assert!(count(&figures, "/computed_tokens") >= count(&figures, "/hits/prompt_tokens") - hits);
    // What the pool holds when the run ends depends on which blocks were evicted last, so only its arithmetic
    // is looked at: no more tokens than its blocks have room for.
    let tokens = device["tokens"].as_f64().expect("a number");
    assert!(tokens > 0.0 && tokens <= 16.0 * count(device, "/cached_blocks") as f64, "{tokens}");
}

#[test]
fn a_run_leaves_a_report_like_the_others() {
    let path = temporary("report.json");
    let name = path.to_str().expect("a UTF-8 path");
    let args = ["--requests", "40", "--fault", "corrupt:onboard", "--json", name];
    assert_eq!(run(&[SMALL, &args].concat()).status.code(), Some(1));
    let output = hybridkv(&["report", "--rows", name]);
    std::fs::remove_file(&path).expect("the file was written");
    assert!(output.status.success());
    let text = String::from_utf8_lossy(&output.stdout);
    for row in ["served", "hits/host", "onboard", "attention/decode", "verified/rows"] {
        assert!(text.contains(row), "{row} is missing in\n{text}");
    }
    let blocks = text.lines().find(|line| line.contains("verified/blocks"));
    assert!(blocks.is_some_and(|line| line.contains("FAILED")), "{text}");
}

#[test]
fn every_attention_kind_serves() {
    for (model, memory) in [
        ("gemma-3-1b", "2MiB"),
        ("gpt-oss-20b", "1MiB"),
        ("gemma-2-9b", "1MiB"),
        ("mistral-7b", "1MiB"),
        // Full groups in blocks of 32 tokens, sliding ones in blocks of 16: hits end inside of blocks.
        ("gemma-4-31b", "2MiB"),
    ] {
        let args = ["--model", model, "--device-mem", memory, "--host-ratio", "4"];
        let rest = ["--requests", "30", "--verify", "0.5"];
        let (code, figures) = figures(model, &[&args[..], &rest[..]].concat());
        assert_eq!(code, Some(0), "{model}: {figures:#}");
        assert!(count(&figures, "/verified/turn_end_blocks") > 0);
        assert!(count(&figures, "/verified/rows") > 0);
    }
}

#[test]
fn quantised_blocks_are_evicted_restored_and_verified_with_their_scales() {
    for scales in ["token", "head"] {
        let quantised = ["--kv-dtype", "e4m3", "--kv-scales", scales, "--requests", "80"];
        let (code, figures) = figures(scales, &[SMALL, &quantised].concat());
        assert_verified(code, &figures);
        assert!(count(&figures, "/device_tier/evicted_blocks") > 0, "{figures:#}");
        let bits = figures["model"]["kv"].as_str().expect("a string");
        assert!(bits.starts_with("e4m3") && bits.contains(scales), "{bits}");
        // The error of 16-bit arithmetic on the numbers that were stored, not that of storing them.
        let worst = figures["verified"]["worst_row_error"].as_f64().expect("a number");
        assert!(worst < 5e-3, "{worst}");
    }
    let lying = ["--kv-dtype", "e4m3", "--requests", "60", "--fault", "corrupt:onboard"];
    let (code, figures) = figures("lying", &[SMALL, &lying].concat());
    assert_eq!((code, count(&figures, "/verified/wrong_blocks") > 0), (Some(1), true));
}

#[test]
fn streams_in_adversarial_order_change_nothing() {
    for seed in 0..4 {
        let device = format!("cpu-deferred:{seed}");
        let args = ["--device", &device, "--requests", "60"];
        let (code, figures) = figures(&device, &[SMALL, &args].concat());
        assert_verified(code, &figures);
        // Steps ran behind their loads, which came as late as the seed liked.
        assert!(count(&figures, "/overlapped") > 0);
    }
}

#[test]
fn steps_can_wait_for_whole_loads() {
    let args = ["--device", "cpu-deferred:3", "--requests", "60", "--onboard", "whole"];
    let (code, figures) = figures("whole", &[SMALL, &args].concat());
    assert_verified(code, &figures);
    assert_eq!(count(&figures, "/overlapped"), 0);
}

/// Runs with a fault; the exit code and how many blocks and rows were found wrong.
fn with_fault(device: &str, fault: &str) -> (Option<i32>, u64) {
    let args = ["--device", device, "--requests", "60", "--fault", fault];
    let (code, figures) = figures(&format!("{device}-{fault}"), &[SMALL, &args].concat());
    let wrong = count(&figures, "/verified/wrong_blocks") + count(&figures, "/verified/wrong_rows");
    assert_eq!(figures["verified"]["mismatches"].as_array().map(Vec::is_empty), Some(wrong == 0));
    assert_eq!(figures["passed"].as_bool(), Some(wrong == 0));
    (code, wrong)
}

#[test]
fn one_lying_transfer_is_found() {
    for kind in ["corrupt", "skip"] {
        for direction in ["offload", "onboard"] {
            let (code, wrong) = with_fault("cpu", &format!("{kind}:{direction}"));
            assert_eq!(code, Some(1), "{kind} {direction}");
            assert!(wrong > 0, "{kind} {direction}");
        }
    }
}

#[test]
fn transfers_that_do_not_wait_for_compute_are_found() {
    for direction in ["offload", "onboard"] {
        let found = (2..10).any(|seed| {
            let device = format!("cpu-deferred:{seed}");
            let (code, wrong) = with_fault(&device, &format!("unordered:{direction}:1000000"));
            assert_eq!(code, Some(i32::from(wrong > 0)));
            wrong > 0
        });
        assert!(found, "no seed caught {direction}s that start too early");
    }
}

#[test]
fn failed_transfers_are_misses() {
    for (device, onboard) in [("cpu", "whole"), ("cpu", "layers"), ("cpu-deferred:1", "layers")] {
        let faults = ["--fault", "fail:onboard:40", "--fault", "fail:offload:30"];
        let args = ["--requests", "80", "--device", device, "--onboard", onboard];
        let (code, figures) = figures(onboard, &[SMALL, &args, &faults].concat());
        assert_verified(code, &figures);
        assert!(count(&figures, "/failed_loads") > 0);
        assert_eq!(count(&figures, "/overlapped") > 0, onboard == "layers");
    }
}

#[test]
fn a_run_without_storage_is_a_function_of_its_arguments() {
    /// All but what is measured, and which mismatches were seen first.
    fn counted(figures: Value) -> Value {
        let varies = |name: &String| {
            let rate = name == "gbps" || name == "tflops" || name == "tokens_per_second";
            rate || name.ends_with("seconds") || name.ends_with("ms") || name == "mismatches"
        };
        match figures {
            Value::Object(fields) => {
                let kept = fields.into_iter().filter(|(name, _)| !varies(name));
                kept.map(|(name, value)| (name, counted(value))).collect()
            }
            other => other,
        }
    }
    let args = ["--device", "cpu-deferred:2", "--requests", "40", "--fault", "skip:onboard"];
    let run = || counted(figures("twice", &[SMALL, &args].concat()).1);
    assert_eq!(run(), run());
}

#[test]
fn every_write_policy_and_a_storage_tier_serve_verified_blocks() {
    let folder = temporary("storage");
    let _ = std::fs::remove_dir_all(&folder);
    let storage = ["--storage", folder.to_str().expect("a UTF-8 path"), "--storage-bytes", "1GiB"];
    let serve = |name: &str, args: &[&str]| {
        let small = ["--device-mem", "1MiB", "--verify", "1"];
        let (code, figures) = figures(name, &[&small[..], args, &storage].concat());
        assert_verified(code, &figures);
        figures
    };
    // How much is stored by when is up to the disk. All of it is in the end: the first run, into an empty store,
    // stores, and those after it find what their first requests ask for.
    let small = ["--requests", "80", "--host-ratio", "0.5", "--write"];
    let figures = serve("store", &[&small[..], &["through"]].concat());
    assert!(count(&figures, "/persist/transfers") > 0, "{figures:#}");
    for prefetch in ["best-effort", "wait", "timeout"] {
        let args = ["--requests", "60", "--host-ratio", "1", "--max-seqs", "2"];
        let figures = serve(prefetch, &[&args[..], &["--prefetch", prefetch]].concat());
        assert!(count(&figures, "/hits/prefetched_blocks") > 0, "{prefetch}: {figures:#}");
    }
    for (write, faults) in [
        ("through", &[][..]),
        ("selective", &["--fault", "corrupt:persist:30", "--fault", "short:fetch:20"]),
        ("back", &["--fault", "fail:fetch:3", "--fault", "corrupt:fetch:5"]),
    ] {
        let figures = serve(write, &[&small[..], &[write], faults].concat());
        assert!(count(&figures, "/hits/storage_tokens") > 0, "{write}: {figures:#}");
        match faults.is_empty() {
            true => assert!(count(&figures, "/fetch/transfers") > 0, "{figures:#}"),
            false => assert!(count(&figures, "/failed_loads") > 0, "{write}: {figures:#}"),
        }
    }
    std::fs::remove_dir_all(&folder).expect("written above");
}

#[test]
fn every_tier_has_an_eviction_policy() {
    for policies in [["lfu", "reuse"], ["slru", "arc"], ["fifo", "slru"], ["priority", "fifo"]] {
        let args = ["--requests", "80", "--host-ratio", "0.5", "--device-mem", "1MiB"];
        let tiers = ["--eviction", policies[0], "--host-eviction", policies[1], "--verify", "0.5"];
        let (code, figures) = figures(policies[1], &[&args[..], &tiers].concat());
        assert_eq!(code, Some(0), "{figures:#}");
        assert!(count(&figures, "/host_tier/evicted_blocks") > 0, "{policies:?}");
    }
}

/// A trace of long outputs, so that decoding outgrows the pool.
fn long_outputs() -> String {
    (0..12)
        .map(|i| {
            let ids: Vec<usize> =
                (0..12).map(|k| if k == 0 { i % 3 } else { 100 * i + k }).collect();
            format!("{{\"input_length\": 6000, \"output_length\": 7000, \"hash_ids\": {ids:?}}}\n")
        })
        .collect()
}

#[test]
fn requests_that_outgrow_the_pool_are_preempted_and_none_is_lost() {
    let path = temporary("long.jsonl");
    std::fs::write(&path, long_outputs()).expect("writable");
    let args = ["--trace", path.to_str().expect("a UTF-8 path"), "--device-mem", "1200KiB"];
    let rest = ["--max-seqs", "12", "--max-batch-tokens", "64", "--verify", "0.1"];
    let (code, figures) = figures("long", &[&args[..], &rest[..]].concat());
    std::fs::remove_file(&path).expect("written above");
    assert_eq!(code, Some(0), "{figures:#}");
    assert_eq!(count(&figures, "/requests"), 12);
    assert!(count(&figures, "/preemptions") > 0);
    assert!(count(&figures, "/verified/turn_end_blocks") > 0);
}

/// What is said of arguments that cannot be served; nothing is served.
fn refusal(args: &[&str]) -> String {
    let output = run(args);
    assert_eq!(output.status.code(), Some(2), "{args:?}");
    assert!(output.stdout.is_empty());
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn what_cannot_be_served_is_refused_with_a_reason() {
    let path = temporary("bad.jsonl");
    let lines = long_outputs() + "{\"input_length\": 7, \"output_length\": 1}\n";
    std::fs::write(&path, lines).expect("writable");
    let trace = path.to_str().expect("a UTF-8 path");
    assert!(refusal(&["--trace", trace]).contains("line 13: missing field `hash_ids`"));
    std::fs::remove_file(&path).expect("written above");
    assert!(refusal(&["--trace", "/no/such/trace"]).contains("/no/such/trace"));
    assert!(refusal(&["--model", "no-such-model"]).contains("no-such-model"));
    let small = refusal(&["--device-mem", "300KiB"]);
    assert!(
        small.contains("blocks, the pool has") && small.contains("give more memory"),
        "{small}"
    );
    assert!(refusal(&["--device-mem", "8 apples"]).contains("8GiB"));
    assert!(refusal(&["--host-eviction", "oldest"]).contains("oldest"));
    assert!(refusal(&["--host-fraction", "1.1"]).contains("0 to 1"));
    let much = refusal(&["--host-fraction", "1.0"]);
    assert!(much.contains("is more than the") && much.contains("memory cgroup"), "{much}");
    assert!(refusal(&["--prefetch", "wait"]).contains("--storage"));
    assert!(refusal(&["--verify", "1.5"]).contains("0 to 1"));
    assert!(refusal(&["--requests", "0"]).contains("--requests"));
    assert!(refusal(&["--layers", "99"]).contains("--layers 99"));
    assert!(refusal(&["--fault", "explode:onboard"]).contains("the kind must be"));
    assert!(refusal(&["--device", "tpu"]).contains("cpu, cuda:N"));
}
