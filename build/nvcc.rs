//! Where the CUDA compiler is. Shared by `build.rs`, which uses it, and `xtask`, which provides it.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Folder of the project into which `cargo xtask` puts a compiler when the machine has none.
pub const PROVIDED: &str = ".toolchain/cuda";

/// Oldest release that is used: the first with `f` architectures and compressed fatbins.
const OLDEST: (u32, u32) = (12, 9);

/// A CUDA compiler that runs.
pub struct Nvcc {
    /// The program.
    pub path: PathBuf,
    /// The line of `nvcc --version` that names the release.
    pub version: String,
}

impl Nvcc {
    /// The compiler that `NVCC`, `CUDA_HOME` or `CUDA_PATH` names, else the first one in `PATH`,
    /// `/usr/local/cuda` and the project's own folder. `var` reads the environment.
    pub fn find(
        project: &Path,
        var: impl Fn(&str) -> Option<String>,
    ) -> Result<Option<Self>, String> {
        for (name, file) in [("NVCC", ""), ("CUDA_HOME", "bin/nvcc"), ("CUDA_PATH", "bin/nvcc")] {
            if let Some(value) = var(name) {
                let path = if file.is_empty() {
                    value.clone().into()
                } else {
                    Path::new(&value).join(file)
                };
                return Self::at(path).map(Some).map_err(|why| format!("{name}={value}: {why}"));
            }
        }
        let path = var("PATH").unwrap_or_default();
        let mut places: Vec<PathBuf> = std::env::split_paths(&path).collect();
        places.push("/usr/local/cuda/bin".into());
        places.push(project.join(PROVIDED).join("nvidia/cu13/bin"));
        let programs = places.iter().map(|folder| folder.join("nvcc"));
        Ok(programs.filter(|nvcc| nvcc.is_file()).find_map(|nvcc| Self::at(nvcc).ok()))
    }

    fn at(path: PathBuf) -> Result<Self, String> {
        let output = Command::new(&path).arg("--version").output();
        let output = output.map_err(|error| format!("{} does not run: {error}", path.display()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let version = text.lines().find(|line| line.contains("release")).map(str::trim);
        let version = version.ok_or_else(|| format!("{} is no nvcc", path.display()))?.to_owned();
        let release =
            release(&version).ok_or_else(|| format!("nvcc of unknown release, {version}"))?;
        if release < OLDEST {
            return Err(format!(
                "{version}: too old, {}.{} or newer is needed",
                OLDEST.0, OLDEST.1
            ));
        }
        Ok(Self { path, version })
    }
}

/// `(13, 0)` of `Cuda compilation tools, release 13.0, V13.0.88`.
fn release(version: &str) -> Option<(u32, u32)> {
    let (_, rest) = version.split_once("release ")?;
    let (major, rest) = rest.split_once('.')?;
    let minor: String = rest.chars().take_while(char::is_ascii_digit).collect();
    Some((major.parse().ok()?, minor.parse().ok()?))
}
