//! `hybridkv bench` and `hybridkv report` on the CPU device: the plumbing, not the figures.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The program under test: of this build, or of a bundle.
fn hybridkv(arguments: &[&str], provenance: Option<&str>) -> Output {
    let program = std::env::var_os("HYBRIDKV_BIN")
        .map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_hybridkv")), PathBuf::from);
    let mut command = Command::new(program);
    command.args(arguments).env_remove("HYBRIDKV_PROVENANCE");
    if let Some(json) = provenance {
        command.env("HYBRIDKV_PROVENANCE", json);
    }
    command.output().expect("the program starts")
}

fn json(path: &Path) -> serde_json::Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn folder(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("hybridkv-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

#[test]
fn every_suite_runs_and_reports() {
    let folder = folder("bench");
    let to = folder.to_str().unwrap();
    let output = hybridkv(
        &["bench", "decode", "prefill", "movement", "limits", "--device=cpu", "--json", to],
        None,
    );
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}");
    assert!(said.contains("measures nothing"), "{said}");
    for (suite, case, unit) in [
        ("decode", "64x8K/32-8/bf16", "us"),
        ("decode", "256x8K/W1024/32-8/bf16", "us"),
        ("decode", "mixed/1x1M+255x2K/32-8/bf16", "us"),
        ("decode", "read_blocks/b64", "us"),
        ("decode", "step/scout-tp8/10M", "us"),
        ("decode", "step/gpt-oss/64x8K", "us"),
        ("decode", "plan/256x2", "us"),
        ("prefill", "1x8K/q8192/32-8/bf16", "TFLOP/s"),
        ("movement", "block96K/h2d", "GB/s"),
    ] {
        let report = json(&folder.join(format!("{suite}.json")));
        assert_eq!(report["suite"], suite);
        let rows = report["rows"].as_array().unwrap();
        let row = rows.iter().find(|row| row["case"] == case).expect(case);
        assert_eq!(row["unit"], unit);
        assert!(row["ours"].as_f64().unwrap() > 0.0);
        let planning = case.starts_with("plan/");
        assert!(planning || row["gbps"].as_f64().unwrap() > 0.0);
        assert_eq!(row["limit"].is_number(), suite != "prefill" && !planning, "{row}");
        assert!(report["limits"]["hbm_read_gbps"].as_f64().unwrap() > 0.0);
    }
    let movement = json(&folder.join("movement.json"));
    let cases = [
        "h2d/4K",
        "d2h/4K",
        "d2d/4K",
        "h2d/256",
        "h2d/1M",
        "arena/2GiB",
        "restore/scout-tp8/128K",
        "restore+prefill/scout-tp8/128K",
        "prefill+offload/scout-tp8/128K",
    ];
    let rows = movement["rows"].as_array().unwrap();
    assert!(cases.iter().all(|case| rows.iter().any(|row| row["case"] == *case)));
    let limits = json(&folder.join("limits.json"));
    for name in ["copy_engine_h2d_gbps", "copy_engine_d2h_gbps", "copy_engine_d2d_gbps"] {
        assert!(limits["limits"][name].as_f64().unwrap() > 0.0, "{name}");
    }
    // What comparisons with others do without a GPU, on the rows of this report.
    let report = ("HYBRIDKV_MOVEMENT_REPORT", folder.join("movement.json"));
    python_passes("validation/test_compare_movement.py", Some(report));
    std::fs::remove_dir_all(folder).unwrap();
}

/// Runs a test in Python, with one variable more.
fn python_passes(script: &str, variable: Option<(&str, PathBuf)>) {
    let python = std::env::var("PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let Ok(output) = Command::new(&python).arg(script).envs(variable).output() else {
        return eprintln!("SKIPPED: no {python} on this machine");
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_comparison_of_codecs_counts_what_came_back() {
    python_passes("validation/test_compare_codec.py", None);
}

#[test]
fn stale_reports_are_named() {
    let folder = folder("report");
    let path = folder.join("a.json");
    let made_by = r#"{"commit": "c0ffee", "kernels_sha256": "111", "dirty": false}"#;
    let arguments = ["bench", "limits", "--device=cpu", "--json", path.to_str().unwrap()];
    assert!(hybridkv(&arguments, Some(made_by)).status.success());
    let report = json(&path);
    assert_eq!(report["commit"], "c0ffee");
    assert_eq!(report["kernels_sha256"], "111");

    let check = |provenance: Option<&str>| {
        let output = hybridkv(&["report", "--check", folder.to_str().unwrap()], provenance);
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let (code, said) = check(Some(made_by));
    assert_eq!((code, said.contains("0 of 1 reports are stale")), (Some(0), true), "{said}");
    let (code, said) = check(Some(&made_by.replace("111", "222")));
    assert_eq!((code, said.contains("STALE")), (Some(1), true), "{said}");
    // With its rows, and what others reached in the same run.
    let row = r#""rows": [{"case": "a", "ours": 2.0, "unit": "us", "limit": 1.5, "goal": 1.9,
        "peers": {"theirs": 3.0}, "pass": true}]"#;
    let text = std::fs::read_to_string(&path).unwrap().replace("\"rows\": [\n    \n  ]", row);
    std::fs::write(&path, text).unwrap();
    let output = hybridkv(&["report", "--rows", folder.to_str().unwrap()], None);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains("75.0%") && said.contains("theirs 3.0 (1.50x)"), "{said}");
    // A build that knows nothing of itself accuses nobody.
    let (code, said) = check(Some("{}"));
    assert_eq!((code, said.contains("unknown")), (Some(0), true), "{said}");
    std::fs::remove_dir_all(folder).unwrap();
}
