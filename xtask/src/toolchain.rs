//! Provides what a machine lacks: pinned, hash-checked wheels, unpacked into the project's `.toolchain/`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use crate::shell::{self, Result};

#[path = "../../build/nvcc.rs"]
mod nvcc;

use nvcc::{Nvcc, PROVIDED};

/// Whether a build shall have GPU kernels.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Cuda {
    /// With kernels; a compiler is fetched when there is none.
    Wanted,
    /// For the CPU device only.
    Off,
}

impl Cuda {
    /// Makes sure that a build can have what it shall have, and says where the compiler is.
    pub fn provide(self) -> Result {
        if self == Self::Off {
            return Ok(());
        }
        let find = || {
            Nvcc::find(shell::root(), |name| {
                std::env::var(name).ok().filter(|value| !value.is_empty())
            })
        };
        let nvcc = match find()? {
            Some(nvcc) => nvcc,
            None => {
                provide_cuda()?;
                find()?.ok_or_else(|| {
                    format!("the nvcc in {PROVIDED} does not run on this machine: set NVCC or CUDA_HOME, or give --no-cuda")
                })?
            }
        };
        println!("nvcc: {} ({})", nvcc.path.display(), nvcc.version);
        Ok(())
    }

    /// Cargo, told what to build; `archs` where the environment does not say.
    pub fn cargo(self, archs: Option<&str>) -> Command {
        let mut cargo = shell::cargo();
        match self {
            Self::Off => {
                cargo.env("HYBRIDKV_NO_CUDA", "1");
            }
            Self::Wanted => {
                cargo.env_remove("HYBRIDKV_NO_CUDA").env("HYBRIDKV_REQUIRE_CUDA", "1");
                let given =
                    std::env::var("HYBRIDKV_CUDA_ARCHS").is_ok_and(|value| !value.is_empty());
                if let Some(archs) = archs.filter(|_| !given) {
                    cargo.env("HYBRIDKV_CUDA_ARCHS", archs);
                }
            }
        }
        cargo
    }
}

fn provide_cuda() -> Result {
    println!(
        "no nvcc on this machine: fetching the pinned CUDA compiler (about 100 MB) into {PROVIDED}"
    );
    let folder = provide("cuda").map_err(|why| {
        format!(
            "this machine has no nvcc, and the pinned one could not be fetched ({why}): connect it to a \
             network, or set NVCC or CUDA_HOME, or give --no-cuda to build for the CPU device only"
        )
    })?;
    for programs in ["nvidia/cu13/bin", "nvidia/cu13/nvvm/bin"] {
        for program in shell::list(&folder.join(programs))? {
            make_executable(&program)?;
        }
    }
    // Cargo looks for a compiler again when the build script is newer than its last search.
    let script = fs::File::options().append(true).open(shell::root().join("build.rs"));
    let touched = script.and_then(|file| file.set_modified(SystemTime::now()));
    touched.map_err(|error| format!("build.rs: {error}"))
}

/// The folder of the library by which bindgen reads C.
#[cfg(feature = "bindgen")]
pub fn provide_libclang() -> Result<PathBuf> {
    if let Ok(path) = std::env::var("LIBCLANG_PATH") {
        return Ok(path.into());
    }
    let folder = provide("libclang").map_err(|why| {
        format!(
            "the pinned libclang could not be fetched ({why}): connect to a network, or set \
             LIBCLANG_PATH"
        )
    })?;
    Ok(folder.join("libclang-18.1.1.data/platlib/clang/native"))
}

/// Unpacks the wheels that `xtask/requirements/<name>.txt` pins into `.toolchain/<name>`, unless they
/// are there, and returns that folder. It appears whole or not at all.
fn provide(name: &str) -> Result<PathBuf> {
    let requirements = shell::root().join(format!("xtask/requirements/{name}.txt"));
    let pinned = shell::read(&requirements)?;
    let folder = shell::root().join(".toolchain").join(name);
    let stamp = folder.join("requirements.txt");
    if fs::read_to_string(&stamp).is_ok_and(|installed| installed == pinned) {
        return Ok(folder);
    }

    let partial = folder.with_extension("partial");
    let wheels = folder.with_extension("wheels");
    shell::remove_folder(&partial)?;
    shell::remove_folder(&wheels)?;
    let mut pip = python(&["-m", "pip", "download", "--quiet", "--disable-pip-version-check"]);
    pip.args(["--retries", "2", "--no-deps", "--require-hashes", "--only-binary=:all:"]);
    quietly(pip.arg("--requirement").arg(&requirements).arg("--dest").arg(&wheels))?;
    for wheel in shell::list(&wheels)? {
        quietly(python(&["-m", "zipfile", "-e"]).arg(&wheel).arg(&partial))?;
    }
    shell::remove_folder(&wheels)?;
    shell::write(&partial.join("requirements.txt"), pinned)?;
    shell::remove_folder(&folder)?;
    fs::rename(&partial, &folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    Ok(folder)
}

fn python(arguments: &[&str]) -> Command {
    let mut command = shell::program("python3");
    command.args(arguments);
    command
}

/// Runs a program; a failure is told by the last line that it wrote.
fn quietly(command: &mut Command) -> Result {
    let output = command
        .output()
        .map_err(|error| format!("{} does not run: {error}", command.get_program().display()))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let last = said.lines().rev().find(|line| !line.trim().is_empty());
    Err(last.unwrap_or("it said nothing").trim().to_owned())
}

#[cfg(unix)]
fn make_executable(path: &Path) -> Result {
    use std::os::unix::fs::PermissionsExt;
    if path.is_dir() {
        return Ok(());
    }
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
        .map_err(|error| format!("{}: {error}", path.display()))
}

#[cfg(not(unix))]
fn make_executable(_path: &Path) -> Result {
    Ok(())
}
