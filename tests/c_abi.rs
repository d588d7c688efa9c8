//! The C ABI, as C, C++ and Python see it: include/hybridkv.h compiles cleanly as C99 and C++, and
//! programs in C and Python drive the library through it.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The shared library: beside the test where cargo built both, or where `HYBRIDKV_LIB` says.
fn library() -> PathBuf {
    if let Some(library) = std::env::var_os("HYBRIDKV_LIB") {
        return library.into();
    }
    let test = std::env::current_exe().expect("the path of this program");
    let name = format!("{}hybridkv{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    let mut places = test.ancestors().skip(1).take(2).map(|folder| folder.join(&name));
    places.find(|library| library.is_file()).expect("cargo builds the library with its tests")
}

fn passes(command: &mut Command) {
    let output = command.output().expect("the program was there a moment ago");
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}\n{text}");
}

/// A program by its name, or `None`, said loudly, when the machine has none.
fn find(variable: &str, default: &str) -> Option<String> {
    let program = std::env::var(variable).unwrap_or_else(|_| default.to_owned());
    let there = Command::new(&program).arg("--version").output().is_ok();
    if !there {
        eprintln!("SKIPPED: no {program} on this machine");
    }
    there.then_some(program)
}

fn folder() -> PathBuf {
    let folder = std::env::temp_dir().join(format!("hybridkv-c-abi-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder for programs");
    folder
}

const STRICT: [&str; 5] = ["-Wall", "-Wextra", "-Werror", "-pedantic", "-Iinclude"];

#[test]
fn c99_programs_drive_every_operation_the_manager_and_moves() {
    drive("ops");
    drive("manager");
    drive("movement");
}

/// Compiles a program of tests/c and runs it.
fn drive(name: &str) {
    let Some(cc) = find("CC", "cc") else { return };
    let (library, folder) = (library(), folder());
    let program = folder.join(name);
    let rpath = format!("-Wl,-rpath,{}", library.parent().unwrap_or(Path::new(".")).display());
    passes(
        Command::new(cc)
            .args(["-std=c99", "-O1"])
            .args(STRICT)
            .args([&format!("tests/c/{name}.c"), "-o"])
            .args([&program, &library])
            .args([&rpath, "-lm"]),
    );
    passes(&mut Command::new(program));
    std::fs::remove_dir_all(folder).expect("the folder made above");
}

#[test]
fn the_header_is_clean_as_c_plus_plus() {
    let Some(cxx) = find("CXX", "c++") else { return };
    let header = ["-std=c++11", "-x", "c++", "-fsyntax-only", "include/hybridkv.h"];
    passes(Command::new(cxx).args(STRICT).arg("-Wno-pragma-once-outside-header").args(header));
}

/// What the header has in common with kernels/abi/layout.h is the same, comments included.
#[test]
fn the_header_shares_the_vocabulary_of_the_kernels() {
    // Wherever comments break their lines.
    let unbroken = |text: &str| {
        text.split_whitespace().filter(|word| *word != "//").collect::<Vec<_>>().join(" ")
    };
    let header = unbroken(include_str!("../include/hybridkv.h"));
    let mut shared = 0;
    for part in include_str!("../kernels/abi/layout.h").split("\n\n") {
        let declared = part.lines().find(|line| line.ends_with('{'));
        let name = declared.and_then(|line| line.trim_end_matches(" {").split(' ').next_back());
        // What no operation of the C ABI takes is not there.
        if name.is_some_and(|name| header.split(' ').any(|word| word == name)) {
            assert!(header.contains(&unbroken(part)), "include/hybridkv.h has no\n{part}");
            shared += 1;
        }
    }
    assert_eq!(shared, 7);
}

#[test]
fn python_drives_every_operation_and_the_manager() {
    let Some(python) = find("PYTHON", "python3") else { return };
    passes(Command::new(python).arg("python/test_hybridkv.py").env("HYBRIDKV_LIB", library()));
}

/// The comparison with PyTorch, where there is one, on the CPU device.
#[test]
fn pytorch_agrees() {
    let Some(python) = find("PYTHON", "python3") else { return };
    let torch = Command::new(&python).args(["-c", "import torch"]).output();
    if !torch.is_ok_and(|output| output.status.success()) {
        return eprintln!("SKIPPED: no PyTorch on this machine");
    }
    let script = ["validation/validate_torch.py", "--device=cpu"];
    passes(Command::new(python).args(script).env("HYBRIDKV_LIB", library()));
}
