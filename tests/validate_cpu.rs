//! `hybridkv validate` on the CPU device: it passes as it is, and each kind of damage makes it fail.

use std::path::PathBuf;
use std::process::{Command, Output};

/// The program under test: of this build, or of a bundle.
fn hybridkv(arguments: &[&str]) -> Output {
    let program = std::env::var_os("HYBRIDKV_BIN")
        .map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_hybridkv")), PathBuf::from);
    Command::new(program).args(arguments).output().expect("the program starts")
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn passes_and_reports() {
    let json = std::env::temp_dir().join(format!("hybridkv-validate-{}.json", std::process::id()));
    let path = json.to_str().unwrap();
    let output = hybridkv(&["validate", "--device", "cpu", "--cases", "40", "--json", path]);
    assert!(output.status.success(), "{}", stdout(&output));
    assert!(stdout(&output).contains(" 0 failed"), "{}", stdout(&output));

    let report: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&json).unwrap()).unwrap();
    std::fs::remove_file(&json).unwrap();
    assert_eq!(report["schema"], 1);
    assert_eq!(report["suite"], "validate");
    let rows = report["rows"].as_array().unwrap();
    for suite in ["attention", "large", "merge", "append", "move", "codec"] {
        let of_suite: Vec<_> = rows
            .iter()
            .filter(|row| row["case"].as_str().unwrap().starts_with(&format!("{suite}: ")))
            .collect();
        assert!(of_suite.len() >= 10, "{suite}: {} rows", of_suite.len());
        assert!(of_suite.iter().all(|row| row["pass"] == true));
    }
    // An error of exactly 0 everywhere would mean that nothing was compared.
    let attention =
        rows.iter().filter(|row| row["case"].as_str().unwrap().starts_with("attention"));
    let inexact = attention.filter(|row| row["error"]["relative"].as_f64().unwrap() > 1e-5).count();
    assert!(inexact > 20, "only {inexact} attention cases show any rounding");
}

#[test]
fn other_seeds_are_other_cases() {
    let run = |seed: &str| {
        let output = hybridkv(&[
            "validate",
            "--device=cpu",
            "--suite=attention",
            "--cases=15",
            "--seed",
            seed,
        ]);
        assert!(output.status.success(), "{}", stdout(&output));
        stdout(&output)
            .lines()
            .skip(1)
            .filter(|l| !l.contains(" cases, "))
            .collect::<Vec<_>>()
            .join("\n")
    };
    assert_eq!(run("5"), run("5"));
    assert_ne!(run("5"), run("6"));
}

/// Runs a suite with damaged inputs and gives what it says; it must fail.
fn damaged(suite: &str, fault: &str) -> String {
    let output =
        hybridkv(&["validate", "--device=cpu", "--cases=25", "--suite", suite, "--inject", fault]);
    let said = stdout(&output);
    assert_eq!(output.status.code(), Some(1), "{suite} with {fault} went unnoticed:\n{said}");
    said
}

#[test]
fn damaged_attention_is_noticed() {
    let window = damaged("attention", "window");
    assert!(window.contains("relative error") || window.contains("LSE of token"), "{window}");
    damaged("attention", "swap");
    assert!(damaged("attention", "skip").contains("is unwritten"));
    assert!(damaged("attention", "length").contains("LSE of token"));
    assert!(damaged("attention", "nan").contains("not finite"));
    assert!(damaged("attention", "stray").contains("wrote beside the output, at element -1"));
    assert!(damaged("large", "length").contains("FAILED"));
}

#[test]
fn damaged_merges_are_noticed() {
    assert!(damaged("merge", "length").contains("LSE of row 0"));
    assert!(damaged("merge", "swap").contains("LSE of row"));
    assert!(damaged("merge", "skip").contains("NaN, infinite or missing"));
    assert!(damaged("merge", "nan").contains("NaN, infinite or missing"));
    assert!(damaged("merge", "stray").contains("wrote beside the output"));
}

#[test]
fn damaged_appends_and_moves_are_noticed() {
    assert!(damaged("append", "swap").contains("is wrong"));
    assert!(damaged("append", "skip").contains("was not written"));
    assert!(damaged("append", "stray").contains("should not have been"));
    assert!(damaged("append", "nan").contains("of the pool"));
    for fault in ["swap", "skip"] {
        let said = damaged("move", fault);
        assert!(said.contains("in fragment") && said.contains("in block"), "{said}");
    }
    assert!(damaged("move", "length").contains("16 bytes are wrong"));
    assert!(damaged("move", "nan").contains("1 bytes are wrong"));
    let stray = damaged("move", "stray");
    assert!(stray.contains("beside all fragments") && stray.contains("beside all blocks"));
}

#[test]
fn damaged_slots_are_noticed() {
    assert!(damaged("codec", "swap").contains("of slot"));
    assert!(damaged("codec", "skip").contains("of slot"));
    assert!(damaged("codec", "nan").contains("of slot"));
    assert!(damaged("codec", "stray").contains("beside all slots"));
}

#[test]
fn a_failure_can_be_run_alone() {
    let said = damaged("attention", "nan");
    let command = said.lines().find(|line| line.starts_with("  hybridkv validate")).unwrap();
    let mut arguments: Vec<&str> = command.split_whitespace().skip(1).collect();
    assert!(hybridkv(&arguments).status.success(), "without the damage the case passes");
    arguments.extend(["--inject", "nan"]);
    let alone = stdout(&hybridkv(&arguments));
    let name = |text: &str| text.lines().find(|line| line.starts_with("FAILED")).map(str::to_owned);
    assert_eq!(name(&alone), name(&said));
    assert!(alone.contains("1 cases, 1 failed"), "{alone}");
}

#[test]
fn a_device_that_is_not_there_is_an_error() {
    let output = hybridkv(&["validate", "--device", "tpu"]);
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("tpu is not supported; supported: auto, cpu, cuda:N"), "{said}");
}
