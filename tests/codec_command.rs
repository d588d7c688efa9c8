//! `hybridkv codec`: its figures on captures made here, the goals of every codec on real keys and values when
//! they are there, and what it says to files that are none.

use std::path::Path;
use std::process::{Command, Output};

use half::bf16;
use serde_json::Value;

const REAL: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/kv/smollm2_135m_qkv.safetensors");

fn command(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_hybridkv")).arg("codec").args(args).output().unwrap()
}

fn figures(args: &[&str]) -> Vec<Value> {
    let output = command(&[args, &["--json"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// A capture of one layer, 40 tokens, 4 query heads and 2 KV heads of 32.
fn write_capture(path: &Path, element: impl Fn(usize) -> f32) {
    let shapes = [("q", 4), ("k", 2), ("v", 2)];
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, heads) in shapes {
        let begin = data.len();
        for i in 0..40 * heads * 32 {
            data.extend(bf16::from_f32(element(i + begin)).to_bits().to_le_bytes());
        }
        let entry = serde_json::json!({
            "dtype": "BF16", "shape": [40, heads, 32], "data_offsets": [begin, data.len()],
        });
        header.insert(format!("layer0.{name}"), entry);
    }
    let header = Value::from(header).to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn a_capture_comes_back_from_every_codec() {
    let folder = std::env::temp_dir().join(format!("hybridkv-codec-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let file = folder.join("capture.safetensors");
    let name = file.to_str().unwrap();
    write_capture(&file, |i| ((i * 7919 + 13) % 1000) as f32 / 500.0 - 1.001);
    let all = figures(&[name]);
    assert_eq!(all.len(), 9);
    for row in &all {
        let number = |field: &str| row[field].as_f64().unwrap();
        // 40 tokens are two blocks of 16 and 8 tokens that stay as they are.
        assert_eq!((number("blocks"), number("fallbacks")), (2.0, 0.0), "{row}");
        let exact = ["raw", "lx4", "lxe"].contains(&row["codec"].as_str().unwrap());
        assert_eq!(row["exact"].as_bool().unwrap(), exact, "{row}");
        assert_eq!(number("k_relative") == 0.0, exact, "{row}");
        assert_eq!(number("attention_max") == 0.0, exact, "{row}");
        assert!(number("attention_max") < 0.2 && number("least_cosine") > 0.98, "{row}");
        assert!(number("attention_mean") <= number("attention_max"), "{row}");
    }
    // What a codec does not hold stays as it is, and counts as raw: a NaN in the first block of K.
    write_capture(&file, |i| if i == 2 * 40 * 4 * 32 { f32::NAN } else { (i % 50) as f32 });
    let row = &figures(&[name, "--codec", "int6"])[0];
    let number = |field: &str| row[field].as_f64().unwrap();
    assert_eq!((number("fallbacks"), number("blocks")), (1.0, 2.0), "{row}");
    assert!(number("mean_ratio") < number("slot_ratio") && number("mean_ratio") > 1.2, "{row}");
    let text = String::from_utf8(command(&[name, "--codec", "int6,lx4"]).stdout).unwrap();
    assert!(text.contains("| int6") && text.contains("Exact, every bit: lx4."), "{text}");
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn files_that_are_no_captures_are_refused() {
    for (args, words) in [
        (vec!["/nowhere/at.all"], "No such file"),
        (vec![concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")], "truncated"),
    ] {
        let output = command(&args);
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(message.contains(words), "{message}");
    }
}

/// Real keys and values, as they are and with outlier channels: the goals that docs/codecs.md names.
#[test]
fn codecs_meet_their_goals_on_real_keys_and_values() {
    if !Path::new(REAL).exists() {
        eprintln!("SKIPPED: no capture at {REAL}");
        return;
    }
    for args in [&[REAL][..], &[REAL, "--outliers"]] {
        for row in figures(&[args, &["--codec", "lx4,lxe,int8,int6,int4"]].concat()) {
            let number = |field: &str| row[field].as_f64().unwrap();
            assert_eq!(number("fallbacks"), 0.0, "{row}");
            let (ratio, mean, max) = match row["codec"].as_str().unwrap() {
                "lx4" => (1.31, 0.0, 0.0),
                "lxe" => (1.32, 0.0, 0.0),
                "int8" => (1.72, 0.01, 0.04),
                "int6" => (2.19, 0.03, 0.10),
                _ => (3.0, 0.10, 0.32),
            };
            assert!(number("slot_ratio") >= ratio, "{row}");
            assert!(row["codec"] != "lxe" || number("mean_ratio") >= 1.48, "{row}");
            assert!(number("attention_mean") <= mean && number("attention_max") <= max, "{row}");
        }
    }
}
