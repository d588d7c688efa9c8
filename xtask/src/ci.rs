//! The two commands that do everything: `run` and `test`.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::time::Instant;

use crate::resources::ARCHS;
use crate::shell::{self, Result};
use crate::toolchain::Cuda;
use crate::{abi, provenance};

/// Builds the release and runs `hybridkv run` with the arguments given.
pub fn run(cuda: Cuda, arguments: &[String]) -> Result {
    cuda.provide()?;
    let mut cargo = cuda.cargo(None);
    cargo.args(["run", "--release", "--bin=hybridkv", "--", "run"]).args(arguments);
    if let Ok(provenance) = provenance::json() {
        cargo.env("HYBRIDKV_PROVENANCE", provenance);
    }
    shell::run(cargo.stdin(Stdio::inherit()))
}

/// Everything that has to hold before a change is merged. Stops at the first step that fails.
pub fn test(cuda: Cuda) -> Result {
    let start = Instant::now();
    let cargo = |arguments: &[&str]| {
        let mut cargo = cuda.cargo(Some(ARCHS));
        cargo.args(arguments);
        cargo
    };
    step("toolchain", || cuda.provide())?;
    step("format", || shell::run(&mut cargo(&["fmt", "--all", "--check"])))?;
    step("abi", abi::check)?;
    step("lints", || {
        shell::run(&mut cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))
    })?;
    step("docs", || {
        shell::run(
            cargo(&["doc", "--no-deps", "--document-private-items"])
                .env("RUSTDOCFLAGS", "-D warnings"),
        )
    })?;
    // The binary of the test profile, so that nothing is compiled for this step alone.
    step("build", || shell::run(&mut cargo(&["test", "--workspace", "--no-run"])))?;
    step("end to end", || {
        shell::run(&mut cargo(&["run", "--quiet", "--bin=hybridkv", "--", "run", "--device=cpu"]))
    })?;
    // Says which committed reports were made from other kernels; measuring again needs a GPU.
    step("reports", || {
        let mut cargo = cargo(&["run", "--quiet", "--bin=hybridkv", "--", "report"]);
        if let Ok(provenance) = provenance::json() {
            cargo.env("HYBRIDKV_PROVENANCE", provenance);
        }
        shell::run(&mut cargo)
    })?;
    step("tests", || {
        run_tests(&mut cargo(&["test", "--workspace", "--no-fail-fast", "--", "--show-output"]))
    })?;
    println!(
        "\nall green in {:.0} s{}",
        start.elapsed().as_secs_f64(),
        match cuda {
            Cuda::Wanted => "",
            Cuda::Off => " (without GPU kernels)",
        }
    );
    Ok(())
}

/// Runs tests. Of what those that pass say, the lines that begin with `SKIPPED` are shown, and told at
/// the end once more.
fn run_tests(cargo: &mut Command) -> Result {
    let mut tests = shell::start(cargo.stdout(Stdio::piped()))?;
    let mut skipped: BTreeMap<String, usize> = BTreeMap::new();
    let mut of_passed = false;
    for line in BufReader::new(tests.stdout.take().ok_or("no output")?).lines() {
        let line = line.map_err(|error| format!("output of cargo test: {error}"))?;
        match line.as_str() {
            "successes:" => of_passed = true,
            "failures:" => of_passed = false,
            _ if line.starts_with("test result:") => of_passed = false,
            _ => {}
        }
        if line.starts_with("SKIPPED") {
            *skipped.entry(line.clone()).or_default() += 1;
        } else if of_passed {
            continue;
        }
        println!("{line}");
    }
    shell::finish(cargo, tests)?;
    for (line, count) in skipped {
        println!("{count} x {line}");
    }
    Ok(())
}

fn step(name: &str, action: impl FnOnce() -> Result) -> Result {
    println!("\n==> {name}");
    let _ = std::io::stdout().flush();
    let start = Instant::now();
    action().map_err(|message| format!("{name}: {message}"))?;
    println!("<== {name}: {:.1} s", start.elapsed().as_secs_f64());
    Ok(())
}
