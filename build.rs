//! Compiles every `kernels/*.cu` into one fatbin with machine code for each architecture.
//!
//! Needs nvcc and a C++ compiler, but no GPU, no driver and no network. Without nvcc the crate still
//! builds, for the CPU device only. Read from the environment:
//!
//! | variable | meaning |
//! |---|---|
//! | `NVCC` | the compiler; else `CUDA_HOME` or `CUDA_PATH`, `PATH`, `/usr/local/cuda`, `.toolchain/` are searched |
//! | `HYBRIDKV_CUDA_ARCHS` | architectures as nvcc names them, `80,90a`; default: [`DEFAULT_ARCHS`], as far as nvcc has them |
//! | `HYBRIDKV_NO_CUDA=1` | builds without kernels, silently |
//! | `HYBRIDKV_REQUIRE_CUDA=1` | makes a missing nvcc an error |
//!
//! Written to `OUT_DIR`:
//! - `kernels.rs`: the tables `IMAGES` and `ARCHS`, included by `device::cuda`;
//! - `resources.txt`: what ptxas says of every kernel, held against a committed table by a test;
//! - `warnings.txt`: what the compilers warned of; the same test wants it empty.
//!
//! `HYBRIDKV_CUDA_INCLUDE` tells tests where the toolkit's headers are.
//!
//! Each (file, architecture) is one job with a stamp made of its command line, the compiler's version
//! and the contents of every file it read, so that only what changed is compiled again.

use std::collections::{BTreeSet, VecDeque};
use std::fmt::Write as _;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::{env, fs, thread};

#[path = "build/nvcc.rs"]
mod nvcc;

use nvcc::Nvcc;

/// Machine code for every generation from Ampere on; an `f` image runs on its whole family.
const DEFAULT_ARCHS: &str = "80,86,89,90a,100f,120f";

const NVCC_FLAGS: &[&str] = &["-std=c++17", "-O3", "-lineinfo", "-Xptxas=-v", "-cubin", "-MD"];

/// Variables that nvcc itself reads; they belong to its command line.
const NVCC_ENV: &[&str] = &["NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN"];

type Result<T> = std::result::Result<T, String>;

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<()> {
    let out = PathBuf::from(var("OUT_DIR").ok_or("OUT_DIR is not set: cargo runs this program")?);
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rerun-if-changed=kernels");
    for name in NVCC_ENV {
        println!("cargo::rerun-if-env-changed={name}");
    }
    println!("cargo::rustc-env=HYBRIDKV_RESOURCES={}", out.join("resources.txt").display());
    println!("cargo::rustc-env=HYBRIDKV_WARNINGS={}", out.join("warnings.txt").display());

    if flag("HYBRIDKV_NO_CUDA") {
        return write_outputs(&out, None, &[], &[]);
    }
    let project = env::current_dir().map_err(|e| format!("current directory: {e}"))?;
    let Some(nvcc) = Nvcc::find(&project, var)? else {
        let message = "nvcc was not found, so that no CUDA kernel is built and only the CPU device works: \
                       set NVCC or CUDA_HOME, or run `cargo xtask run`, which provides it \
                       (HYBRIDKV_NO_CUDA=1 silences this)";
        if flag("HYBRIDKV_REQUIRE_CUDA") {
            return Err(message.to_owned());
        }
        println!("cargo::warning={message}");
        return write_outputs(&out, None, &[], &[]);
    };
    if nvcc.path.is_file() {
        println!("cargo::rerun-if-changed={}", nvcc.path.display());
    }

    if let Some(include) = nvcc.include() {
        println!("cargo::rustc-env=HYBRIDKV_CUDA_INCLUDE={}", include.display());
    }
    let archs = nvcc.archs()?;
    let sources = sources(Path::new("kernels"))?;
    let jobs: Vec<Job> = sources
        .iter()
        .flat_map(|source| archs.iter().map(|arch| Job::new(&nvcc, source, arch, &out)))
        .collect();
    let logs = run_all(&jobs)?;
    for (source, jobs) in sources.iter().zip(jobs.chunks(archs.len())) {
        nvcc.join(&out.join(stem(source)).with_extension("fatbin"), jobs)?;
    }
    for warning in warnings(logs.iter()) {
        println!("cargo::warning={warning}");
    }
    write_outputs(&out, Some(&nvcc), &archs, &jobs.iter().zip(logs).collect::<Vec<_>>())
}

impl Nvcc {
    /// The folder of the toolkit's headers, beside that of its programs.
    fn include(&self) -> Option<PathBuf> {
        let program = fs::canonicalize(&self.path).ok()?;
        let include = program.parent()?.parent()?.join("include");
        include.join("cuda.h").is_file().then_some(include)
    }

    /// The architectures to build for.
    fn archs(&self) -> Result<Vec<String>> {
        let asked = var("HYBRIDKV_CUDA_ARCHS");
        let mut archs: Vec<String> = Vec::new();
        for word in asked.as_deref().unwrap_or(DEFAULT_ARCHS).split([',', ';', ' ']) {
            let arch = word.trim().trim_start_matches("sm_");
            if arch.is_empty() || archs.iter().any(|known| known == arch) {
                continue;
            }
            if self.accepts(arch) {
                archs.push(arch.to_owned());
            } else if asked.is_some() {
                return Err(format!(
                    "HYBRIDKV_CUDA_ARCHS: {} ({}) does not build for sm_{arch}; see its --list-gpu-code",
                    self.path.display(),
                    self.version
                ));
            }
        }
        if archs.is_empty() {
            return Err(format!(
                "no architecture to build for; give some, HYBRIDKV_CUDA_ARCHS={DEFAULT_ARCHS}"
            ));
        }
        Ok(archs)
    }

    fn accepts(&self, arch: &str) -> bool {
        let probe = Command::new(&self.path)
            .args(["-dryrun", "-cubin", &format!("-arch=sm_{arch}"), "probe.cu"])
            .output();
        probe.is_ok_and(|output| output.status.success())
    }

    /// Packs the cubins of one source file into a compressed fatbin.
    fn join(&self, fatbin: &Path, jobs: &[Job]) -> Result<()> {
        let real = self.path.canonicalize().unwrap_or_else(|_| self.path.clone());
        let tool = [&self.path, &real]
            .map(|nvcc| nvcc.with_file_name("fatbinary"))
            .into_iter()
            .find(|tool| tool.is_file())
            .unwrap_or_else(|| PathBuf::from("fatbinary"));
        let mut command = Command::new(tool);
        command.arg(format!("--create={}", fatbin.display())).args(["-64", "--compress-mode=size"]);
        for job in jobs {
            command.arg(format!(
                "--image3=kind=elf,sm={},file={}",
                job.arch,
                job.output("cubin").display()
            ));
        }
        run(&mut command).map(drop)
    }
}

/// One source file to compile for one architecture.
struct Job {
    kernel: String,
    arch: String,
    /// Command line without the output paths.
    command: Vec<String>,
    /// What the result depends on beside the files read.
    context: String,
    /// Output path without its extension.
    base: PathBuf,
}

impl Job {
    fn new(nvcc: &Nvcc, source: &Path, arch: &str, out: &Path) -> Self {
        let kernel = stem(source);
        let mut command = vec![nvcc.path.display().to_string()];
        command.extend(NVCC_FLAGS.iter().map(|flag| flag.to_string()));
        command.extend([format!("-arch=sm_{arch}"), source.display().to_string()]);
        let environment: Vec<_> = NVCC_ENV.iter().map(env::var_os).collect();
        Self {
            context: format!("{command:?} {environment:?} {}", nvcc.version),
            base: out.join(format!("{kernel}.sm_{arch}")),
            kernel,
            arch: arch.to_owned(),
            command,
        }
    }

    fn output(&self, extension: &str) -> PathBuf {
        PathBuf::from(format!("{}.{extension}", self.base.display()))
    }

    /// Compiles if anything changed, and returns what the compiler said (then or before).
    fn run(&self) -> Result<String> {
        let [stamp, log, cubin, deps] = ["stamp", "log", "cubin", "d"].map(|e| self.output(e));
        if cubin.is_file()
            && let (Some(now), Ok(then)) = (self.stamp(&deps), fs::read_to_string(&stamp))
            && now == then
            && let Ok(said) = fs::read_to_string(&log)
        {
            return Ok(said);
        }
        let _ = fs::remove_file(&stamp);
        let mut command = Command::new(&self.command[0]);
        command.args(&self.command[1..]).arg("-o").arg(&cubin).arg("-MF").arg(&deps);
        let said = run(&mut command)?;
        write(&log, &said)?;
        let now = self.stamp(&deps).ok_or_else(|| format!("{} is not readable", deps.display()))?;
        write(&stamp, &now)?;
        Ok(said)
    }

    /// Hash of the context and of the project's files that the last compilation read. The toolkit's
    /// headers stand behind the compiler's version.
    fn stamp(&self, deps: &Path) -> Option<String> {
        let mut hash = DefaultHasher::new();
        self.context.hash(&mut hash);
        let rule = fs::read_to_string(deps).ok()?;
        let (_, files) = rule.split_once(':')?;
        for file in files.split_whitespace().filter(|word| *word != "\\") {
            if Path::new(file).is_relative() {
                file.hash(&mut hash);
                fs::read(file).ok()?.hash(&mut hash);
            }
        }
        Some(format!("{:016x}", hash.finish()))
    }
}

/// Runs the jobs on as many threads as cargo grants; their logs in the same order.
fn run_all(jobs: &[Job]) -> Result<Vec<String>> {
    let threads = env::var("NUM_JOBS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(1)
        .clamp(1, jobs.len().max(1));
    let queue = Mutex::new(jobs.iter().enumerate().collect::<VecDeque<_>>());
    let results = Mutex::new(vec![Ok(String::new()); jobs.len()]);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some((index, job)) = lock(&queue).pop_front() {
                    let result = job.run();
                    lock(&results)[index] = result;
                }
            });
        }
    });
    lock(&results).drain(..).collect()
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// What the compilers warned of, each thing once.
fn warnings<'a>(logs: impl Iterator<Item = &'a String>) -> BTreeSet<&'a str> {
    let is_warning =
        |line: &&str| ["warning #", "warning:", "warning :"].iter().any(|w| line.contains(w));
    logs.flat_map(|log| log.lines()).filter(is_warning).collect()
}

/// Writes what the crate and its tests read.
fn write_outputs(
    out: &Path,
    nvcc: Option<&Nvcc>,
    archs: &[String],
    logs: &[(&Job, String)],
) -> Result<()> {
    let mut kernels: Vec<&str> = logs.iter().map(|(job, _)| job.kernel.as_str()).collect();
    kernels.dedup();
    let mut code = String::from("#[repr(C, align(16))]\nstruct Aligned<T: ?Sized>(T);\n\n");
    for kernel in &kernels {
        let path = out.join(kernel).with_extension("fatbin");
        let _ = writeln!(
            code,
            "static {}: &Aligned<[u8]> = &Aligned(*include_bytes!({:?}));",
            kernel.to_uppercase(),
            path.display().to_string()
        );
    }
    code += "\n/// Fatbin of every `kernels/*.cu`, by its stem; the bytes are 16-byte aligned.\n";
    code += "pub static IMAGES: &[(&str, &[u8])] = &[\n";
    for kernel in &kernels {
        let _ = writeln!(code, "    ({kernel:?}, &{}.0),", kernel.to_uppercase());
    }
    code += "];\n\n/// Architectures that every image holds machine code for, `80`, `90a`.\n";
    let _ = writeln!(code, "pub static ARCHS: &[&str] = &{archs:?};");
    code += "\n/// Version of the compiler that built the images, empty without one.\n";
    let _ = writeln!(
        code,
        "pub static NVCC_VERSION: &str = {:?};",
        nvcc.map_or("", |nvcc| &nvcc.version)
    );
    write(&out.join("kernels.rs"), &code)?;

    // A comment line with the compiler, then the rows.
    let mut table: Vec<String> =
        logs.iter().flat_map(|(job, log)| resources(&job.arch, log)).collect();
    table.sort();
    table.insert(0, format!("# {}", nvcc.map_or("no nvcc", |nvcc| &nvcc.version)));
    write(&out.join("resources.txt"), &(table.join("\n") + "\n"))?;
    let warnings: Vec<&str> = warnings(logs.iter().map(|(_, log)| log)).into_iter().collect();
    write(
        &out.join("warnings.txt"),
        &warnings.join(
            "
",
        ),
    )
}

/// One row `function arch registers shared stack spill_stores spill_loads` per function of a ptxas log.
/// A function that is called, and no kernel, has no registers of its own: 0.
fn resources(arch: &str, log: &str) -> Vec<String> {
    let number_before = |line: &str, unit: &str| -> u32 {
        let words = line.split(unit).next().filter(|head| head.len() < line.len());
        words.and_then(|head| head.split_whitespace().last()?.parse().ok()).unwrap_or(0)
    };
    let mut rows: Vec<(String, [u32; 5])> = Vec::new();
    for line in log.lines() {
        if let Some(function) = line.strip_prefix("ptxas info    : Function properties for ") {
            rows.push((function.trim().to_owned(), [0; 5]));
        } else if let Some((_, [registers, shared, stack, stores, loads])) = rows.last_mut() {
            if line.contains("bytes stack frame") {
                *stack = number_before(line, " bytes stack frame");
                *stores = number_before(line, " bytes spill stores");
                *loads = number_before(line, " bytes spill loads");
            } else if line.starts_with("ptxas info    : Used ") {
                *registers = number_before(line, " registers");
                *shared = number_before(line, " bytes smem");
            }
        }
    }
    let row = |(function, numbers): (String, [u32; 5])| {
        let numbers = numbers.map(|n| n.to_string()).join(" ");
        format!("{function} {arch} {numbers}")
    };
    rows.into_iter().map(row).collect()
}

/// The `.cu` files of a folder, sorted.
fn sources(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let mut files: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "cu"))
        .collect();
    files.sort();
    Ok(files)
}

fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// Runs a command and returns what it wrote to standard error; a failure carries its whole output.
fn run(command: &mut Command) -> Result<String> {
    let output =
        command.output().map_err(|e| format!("{}: {e}", command.get_program().display()))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() {
        return Ok(said);
    }
    let also = String::from_utf8_lossy(&output.stdout);
    Err(format!("{command:?} failed ({}):\n{also}{said}", output.status))
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))
}

/// A variable that is set and not empty; cargo runs the build again when it changes.
fn var(name: &str) -> Option<String> {
    println!("cargo::rerun-if-env-changed={name}");
    env::var(name).ok().filter(|value| !value.is_empty())
}

fn flag(name: &str) -> bool {
    var(name).is_some_and(|value| value != "0")
}
