//! `hybridkv run` end to end on a GPU, against a pool that is too small for the conversations.
#![cfg(feature = "cli")]

mod run_command;

use hybridkv::device::Device;
use run_command::{assert_verified, count, figures};

#[test]
fn conversations_are_evicted_restored_and_verified_on_a_gpu() {
    if let Err(error) = Device::cuda(0) {
        return eprintln!("SKIPPED: no CUDA device ({error})");
    }
    let quantised = |scales| ["--kv-dtype", "e4m3", "--kv-scales", scales];
    for (model, tp, layers, memory, kv) in [
        ("llama-4-scout", "8", "8", "96MiB", &[][..]),
        ("gpt-oss-20b", "1", "4", "200MiB", &[]),
        ("gemma-3-1b", "1", "6", "72MiB", &[]),
        ("llama-4-scout", "8", "8", "52MiB", &quantised("token")),
        ("gpt-oss-20b", "1", "4", "100MiB", &quantised("head")),
    ] {
        let shape = ["--model", model, "--tp", tp, "--layers", layers, "--device-mem", memory];
        let rest = ["--device", "cuda:0", "--requests", "120", "--verify", "0.05", "--poison"];
        let host = ["--host-ratio", "4", "--max-batch-tokens", "2048", "--max-seqs", "16"];
        let (code, figures) = figures(model, &[&shape[..], &rest[..], &host[..], kv].concat());
        assert_verified(code, &figures);
        assert_eq!(count(&figures, "/requests"), 120);
        assert!(count(&figures, "/device_tier/evicted_blocks") > 0, "{figures:#}");
    }
}
