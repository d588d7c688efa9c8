//! The committed table of what every kernel takes of a multiprocessor, `tests/resources.txt`.

use std::path::PathBuf;

use crate::shell::{self, Result};
use crate::toolchain::Cuda;

/// Architectures that are compiled in every test, and held to the table.
pub const ARCHS: &str = "80,90a";

const HEADER: &str = "\
# What ptxas says of every kernel. A test fails on a spill, on more registers or stack than here, and on
# kernels that are missing here. Made by `cargo xtask resources --update`.
# function arch registers shared stack spill_stores spill_loads
";

fn table() -> PathBuf {
    shell::root().join("tests/resources.txt")
}

/// Builds the kernels and writes what they take into the table.
pub fn update() -> Result {
    shell::write(&table(), format!("{HEADER}{}", measured()?))
}

/// Builds the kernels and says which rows differ from the table.
pub fn compare() -> Result {
    let (measured, committed) = (measured()?, shell::read(&table())?);
    let rows =
        |text: &str| text.lines().filter(|row| !row.starts_with('#')).map(str::to_owned).collect();
    let (measured, committed): (Vec<String>, Vec<String>) = (rows(&measured), rows(&committed));
    let gone = committed.iter().filter(|row| !measured.contains(row)).map(|row| format!("- {row}"));
    let come = measured.iter().filter(|row| !committed.contains(row)).map(|row| format!("+ {row}"));
    let mut differences: Vec<String> = gone.chain(come).collect();
    differences.sort_by(|a, b| a[2..].cmp(&b[2..]));
    println!("{} kernels, {} rows differ", measured.len(), differences.len());
    differences.iter().for_each(|row| println!("{row}"));
    Ok(())
}

fn measured() -> Result<String> {
    Cuda::Wanted.provide()?;
    let mut cargo = Cuda::Wanted.cargo(None);
    cargo.env("HYBRIDKV_CUDA_ARCHS", ARCHS).args(["check", "--lib", "--message-format=json"]);
    for line in shell::output(&mut cargo)?.lines() {
        let message: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
        let package = message["package_id"].as_str().unwrap_or_default();
        if message["reason"] == "build-script-executed" && package.contains("hybridkv") {
            let folder = PathBuf::from(message["out_dir"].as_str().unwrap_or_default());
            return shell::read(&folder.join("resources.txt"));
        }
    }
    Err("cargo did not say where it built the kernels".to_owned())
}
