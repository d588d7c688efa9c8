//! The kernels without a GPU: compiled for the CPU beside a libcuda.so.1 that plays a GPU of 6 multiprocessors
//! (tests/emulator), and held against the reference by `hybridkv validate`, through the same driver calls as on a
//! real one. Speed, races and the memory model are out of its reach.
#![cfg(all(target_os = "linux", feature = "cli"))]

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::{fs, thread};

/// Suites, cases and seed of the runs below.
const RUNS: &[(&str, &str)] =
    &[("append", "16"), ("attention", "24"), ("codec", "10"), ("merge", "8"), ("move", "24")];

#[test]
fn kernels_agree_with_the_reference() {
    let Some(folder) = emulator() else { return };
    for (suite, cases) in RUNS {
        let report = folder.join(format!("{suite}.json"));
        let output = Command::new(env!("CARGO_BIN_EXE_hybridkv"))
            .args(["validate", "--device", "cuda:0", "--quick", "--suite", suite, "--cases", cases])
            .arg("--json")
            .arg(&report)
            .env("LD_LIBRARY_PATH", &folder)
            .output()
            .expect("the program starts");
        let said = String::from_utf8_lossy(&output.stdout);
        let why = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{suite}: {said}{why}");
        let report: serde_json::Value =
            serde_json::from_str(&fs::read_to_string(report).unwrap()).unwrap();
        assert_eq!(report["device"], "emulated GPU");
        assert_eq!(report["rows"].as_array().unwrap().len().to_string(), *cases, "{suite}");
    }
}

/// Damage must show here as it does on a GPU: the kernels are what is judged.
#[test]
fn damage_is_found() {
    let Some(folder) = emulator() else { return };
    for fault in ["nan", "swap"] {
        let output = Command::new(env!("CARGO_BIN_EXE_hybridkv"))
            .args(["validate", "--device", "cuda:0", "--quick", "--suite", "attention"])
            .args(["--cases", "8", "--inject", fault])
            .env("LD_LIBRARY_PATH", &folder)
            .output()
            .expect("the program starts");
        assert_eq!(output.status.code(), Some(1), "{fault}");
    }
}

/// Builds the emulated GPU once and gives the folder of its libcuda.so.1; `None` where the crate has no kernels, or
/// there is no C++ compiler.
fn emulator() -> Option<PathBuf> {
    static BUILDING: Mutex<()> = Mutex::new(());
    let _one_at_a_time = BUILDING.lock().unwrap();
    let Some(include) = option_env!("HYBRIDKV_CUDA_INCLUDE") else {
        eprintln!("SKIPPED: built without nvcc, so that there are no kernels to emulate");
        return None;
    };
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let Ok(version) = Command::new(&compiler).arg("--version").output() else {
        eprintln!("SKIPPED: no C++ compiler to emulate kernels with (CXX, else c++)");
        return None;
    };
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulated-gpu");
    fs::create_dir_all(&folder).unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (emulator, kernels) = (root.join("tests/emulator"), root.join("kernels"));

    let mut hasher = DefaultHasher::new();
    (version.stdout, include).hash(&mut hasher);
    for file in files(&emulator).into_iter().chain(files(&kernels)) {
        (&file, fs::read(&file).unwrap()).hash(&mut hasher);
    }
    let (library, stamp) = (folder.join("libcuda.so.1"), folder.join("stamp"));
    let built = hasher.finish().to_string();
    if library.is_file() && fs::read_to_string(&stamp).is_ok_and(|stamp| stamp == built) {
        return Some(folder);
    }

    let device = emulator.join("device.h");
    let compile = |source: &Path| -> PathBuf {
        let object = folder.join(source.with_extension("o").file_name().unwrap());
        let mut command = Command::new(&compiler);
        // As nvcc compiles them: aliasing by casts is allowed, products are fused where the source says so.
        command.args(["-std=c++20", "-O2", "-fPIC", "-w"]);
        command.args(["-fno-strict-aliasing", "-ffp-contract=off"]);
        command.arg("-I").arg(include).arg("-I").arg(&kernels).arg("-I").arg(&emulator);
        if source.extension().is_some_and(|extension| extension == "cu") {
            command.arg("-fvisibility=hidden").arg("-include").arg(&device).args(["-x", "c++"]);
        }
        run(command.arg("-c").arg(source).arg("-o").arg(&object));
        object
    };
    let mut sources: Vec<PathBuf> =
        fs::read_dir(&kernels).unwrap().map(|f| f.unwrap().path()).collect();
    sources.retain(|path| path.extension().is_some_and(|extension| extension == "cu"));
    sources.push(emulator.join("driver.cpp"));
    let (queue, objects) = (Mutex::new(sources), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, |n| n.get()) {
            scope.spawn(|| {
                while let Some(source) = { queue.lock().unwrap().pop() } {
                    let object = compile(&source);
                    objects.lock().unwrap().push(object);
                }
            });
        }
    });
    let mut link = Command::new(&compiler);
    link.args(["-shared", "-o"]).arg(&library).args(objects.into_inner().unwrap()).arg("-ldl");
    run(&mut link);
    fs::write(stamp, built).unwrap();
    Some(folder)
}

fn run(command: &mut Command) {
    let output = command.output().expect("the compiler starts");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// All files below a folder, in a fixed order.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> =
        fs::read_dir(folder).unwrap().map(|f| f.unwrap().path()).collect();
    paths.sort();
    let below = |path: PathBuf| if path.is_dir() { files(&path) } else { vec![path] };
    paths.into_iter().flat_map(below).collect()
}
