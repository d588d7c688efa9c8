//! `.bundle/`: everything that a GPU host without Rust needs to run, test and measure this commit.
//!
//! The folder mirrors the project, so that programs started in it find the files they know by their
//! path from the root: `bin/`, `tests/bin/`, `benches/bin/`, the library in `lib/`, and the fixtures.

use std::fs;
use std::path::{Path, PathBuf};

use crate::provenance;
use crate::shell::{self, Result};
use crate::toolchain::Cuda;

/// Folders and files of the project that programs read when they run.
const FILES: &[&str] = &["include", "kernels", "python", "tests", "validation"];

const RUN_TESTS: &str = r#"#!/bin/sh
# Runs every test binary of the bundle; arguments go to each of them. Fails when one of them fails.
cd "$(dirname "$0")" || exit 1
export CARGO_MANIFEST_DIR="$PWD" HYBRIDKV_BIN="$PWD/bin/hybridkv" HYBRIDKV_LIB="$PWD/lib/libhybridkv.so"
failed=
for test in tests/bin/*; do
  echo "== ${test##*/}"
  "$test" "$@" || failed="$failed ${test##*/}"
done
[ -z "$failed" ] || { echo "FAILED:$failed"; exit 1; }
echo "all test binaries passed"
"#;

/// Builds for the architectures and fills the folder.
pub fn make(archs: &str) -> Result {
    Cuda::Wanted.provide()?;
    let bundle = shell::root().join(".bundle");
    shell::remove_folder(&bundle)?;
    for folder in ["bin", "lib", "tests/bin", "benches/bin"] {
        shell::make_folder(&bundle.join(folder))?;
    }
    for file in FILES.iter().map(Path::new).filter(|file| shell::root().join(file).exists()) {
        shell::copy(&shell::root().join(file), &bundle.join(file))?;
    }

    let build = |arguments: &[&str]| {
        let mut cargo = Cuda::Wanted.cargo(None);
        cargo.env("HYBRIDKV_CUDA_ARCHS", archs).args(arguments);
        cargo.args(["--package=hybridkv", "--message-format=json-render-diagnostics"]);
        shell::output(&mut cargo)
    };
    let messages = build(&["build", "--release", "--lib", "--bins"])?
        + &build(&["test", "--release", "--no-run"])?
        + &build(&["bench", "--no-run"])?;
    for line in messages.lines() {
        let message: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
        let package = message["package_id"].as_str().unwrap_or_default();
        if message["reason"] != "compiler-artifact" || !package.contains("hybridkv") {
            continue;
        }
        let name = message["target"]["name"].as_str().unwrap_or_default();
        let kind = message["target"]["kind"][0].as_str().unwrap_or_default();
        let is_test = message["profile"]["test"] == true;
        let program = message["executable"].as_str().map(PathBuf::from);
        match (kind, is_test, program) {
            ("bin", false, Some(program)) => add(&program, &bundle.join("bin").join(name))?,
            ("bench", _, Some(program)) => add(&program, &bundle.join("benches/bin").join(name))?,
            ("bin", true, Some(program)) => {
                add(&program, &bundle.join(format!("tests/bin/{name}-bin")))?
            }
            (_, true, Some(program)) => add(&program, &bundle.join("tests/bin").join(name))?,
            (_, false, None) => {
                let files = message["filenames"].as_array().map(Vec::as_slice).unwrap_or_default();
                for library in files.iter().filter_map(|file| file.as_str()).map(Path::new) {
                    if library.extension().is_some_and(|extension| extension == "so") {
                        add(
                            library,
                            &bundle.join("lib").join(library.file_name().unwrap_or_default()),
                        )?;
                    }
                }
            }
            _ => {}
        }
    }

    let script = bundle.join("run_tests.sh");
    shell::write(&script, RUN_TESTS)?;
    shell::run(shell::program("chmod").arg("+x").arg(&script))?;
    shell::write(&bundle.join("provenance.json"), provenance::json()?)?;
    let bytes = size(&bundle)?;
    println!("{}: {:.1} MiB, sm_{archs}", bundle.display(), bytes as f64 / (1 << 20) as f64);
    Ok(())
}

/// Copies a program or library, without its symbols where `strip` is there to remove them.
fn add(from: &Path, to: &Path) -> Result {
    shell::copy(from, to)?;
    let _ = shell::program("strip").arg(to).status();
    Ok(())
}

fn size(path: &Path) -> Result<u64> {
    if path.is_dir() {
        return shell::list(path)?.iter().map(|path| size(path)).sum();
    }
    fs::metadata(path)
        .map(|file| file.len())
        .map_err(|error| format!("{}: {error}", path.display()))
}
