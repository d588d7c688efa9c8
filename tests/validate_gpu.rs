//! `hybridkv validate` on a GPU: small cases pass, and damage is noticed there too.

use std::path::PathBuf;
use std::process::{Command, Output};

use hybridkv::device::Device;
use hybridkv::ops::Kernels;

/// Whether there is a GPU that this build has kernels for; says so when not.
fn gpu() -> bool {
    match Device::cuda(0).and_then(|device| Kernels::load(&device)) {
        Ok(_) => true,
        Err(error) => {
            eprintln!("SKIPPED: no CUDA device to validate: {error}");
            false
        }
    }
}

fn validate(arguments: &[&str]) -> Output {
    let program = std::env::var_os("HYBRIDKV_BIN")
        .map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_hybridkv")), PathBuf::from);
    let mut command = Command::new(program);
    command.args(["validate", "--device=cuda:0", "--quick"]).args(arguments);
    command.output().expect("the program starts")
}

#[test]
fn small_cases_pass() {
    if gpu() {
        let output = validate(&["--suite=attention,merge,append,move"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }
}

#[test]
fn damage_is_noticed() {
    if !gpu() {
        return;
    }
    for (suite, fault, says) in [
        ("attention", "swap", "FAILED"),
        ("attention", "skip", "is unwritten"),
        ("attention", "nan", "not finite"),
        ("attention", "stray", "wrote beside the output"),
        ("merge", "length", "LSE of row 0"),
        ("append", "skip", "was not written"),
        ("move", "skip", "in fragment"),
    ] {
        let output = validate(&["--suite", suite, "--inject", fault]);
        let said = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(1), "{suite} with {fault} went unnoticed:\n{said}");
        assert!(said.contains(says), "{suite} with {fault}:\n{said}");
    }
}
