//! Starts `hybridkv run` and reads its figures.
#![allow(dead_code)] // Every test binary uses its own part.

use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::Value;

/// `hybridkv` with these arguments. `HYBRIDKV_BIN` names the binary where cargo did not build it.
pub fn hybridkv(args: &[&str]) -> Output {
    let binary = std::env::var_os("HYBRIDKV_BIN");
    Command::new(binary.unwrap_or_else(|| env!("CARGO_BIN_EXE_hybridkv").into()))
        .args(args)
        .output()
        .expect("the binary runs")
}

/// `hybridkv run` with these arguments, on the CPU device when they name none.
pub fn run(args: &[&str]) -> Output {
    let device = if args.contains(&"--device") { &[][..] } else { &["--device", "cpu"][..] };
    hybridkv(&[&["run"], device, args].concat())
}

/// A file of this process's own.
pub fn temporary(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("hybridkv-{}-{name}", std::process::id()))
}

/// The exit code and the figures of a run. `name` is the caller's own.
pub fn figures(name: &str, args: &[&str]) -> (Option<i32>, Value) {
    let path = temporary(&format!("{name}.json"));
    let output = run(&[args, &["--json", path.to_str().expect("a UTF-8 path")]].concat());
    let text = std::fs::read_to_string(&path)
        .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)));
    std::fs::remove_file(&path).expect("the file was written");
    let mut report: Value = serde_json::from_str(&text).expect("valid JSON");
    (output.status.code(), report["figures"].take())
}

/// A count among the figures, by its JSON pointer.
pub fn count(figures: &Value, path: &str) -> u64 {
    figures.pointer(path).and_then(Value::as_u64).unwrap_or_else(|| panic!("no count at {path}"))
}

/// Every kind of block was looked at, rows too, and nothing was wrong.
pub fn assert_verified(code: Option<i32>, figures: &Value) {
    assert_eq!(code, Some(0), "{figures:#}");
    assert_eq!(figures["passed"], true);
    for what in ["hit_blocks", "onboarded_blocks", "turn_end_blocks", "host_slots", "rows"] {
        assert!(count(figures, &format!("/verified/{what}")) > 0, "{what}: {figures:#}");
    }
    assert_eq!(
        count(figures, "/verified/wrong_blocks") + count(figures, "/verified/wrong_rows"),
        0
    );
    let worst = figures["verified"]["worst_row_error"].as_f64().expect("a number");
    let tolerance = figures["verified"]["row_tolerance"].as_f64().expect("a number");
    assert!(worst > 0.0 && worst <= tolerance);
}
