//! `cargo xtask`: what the project needs beside cargo itself. Works on a machine that has Rust, Python 3
//! with pip and a C++ compiler; the CUDA compiler is fetched when the machine has none.

mod abi;
mod bundle;
mod ci;
mod provenance;
mod resources;
mod shell;
mod toolchain;

use std::process::ExitCode;

const USAGE: &str = "\
usage: cargo xtask COMMAND

  run [--no-cuda] [-- ARGS]     build the release and run `hybridkv run ARGS`
  test [--no-cuda]              format, ABI, lints, docs, an end-to-end run, all tests
  bundle [--archs LIST]         a folder .bundle/ that runs on a GPU host without Rust (default: 90a)
  abi [--check]                 regenerate src/abi.rs from kernels/abi/*.h, or see whether it is current
  resources [--update]          compare what ptxas says of the kernels with tests/resources.txt, or update it

--no-cuda builds without GPU kernels. HYBRIDKV_CUDA_ARCHS, NVCC and CUDA_HOME are read as by build.rs.";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match dispatch(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("error: {message}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(arguments: &[String]) -> shell::Result {
    let Some((command, rest)) = arguments.split_first() else {
        return Err(format!("no command given\n\n{USAGE}"));
    };
    let (own, passed) = match rest.iter().position(|word| word == "--") {
        Some(at) => (&rest[..at], &rest[at + 1..]),
        None => (rest, &[][..]),
    };
    let own: Vec<&str> = own.iter().map(String::as_str).collect();
    match (command.as_str(), own.as_slice()) {
        ("run", []) => ci::run(toolchain::Cuda::Wanted, passed),
        ("run", ["--no-cuda"]) => ci::run(toolchain::Cuda::Off, passed),
        ("test", []) => ci::test(toolchain::Cuda::Wanted),
        ("test", ["--no-cuda"]) => ci::test(toolchain::Cuda::Off),
        ("bundle", []) => bundle::make("90a"),
        ("bundle", ["--archs", archs]) => bundle::make(archs),
        ("abi", []) => abi::generate(),
        ("abi", ["--check"]) => abi::check(),
        ("resources", []) => resources::compare(),
        ("resources", ["--update"]) => resources::update(),
        ("help" | "--help" | "-h", _) => {
            println!("{USAGE}");
            Ok(())
        }
        _ => Err(format!("cannot do `{}`\n\n{USAGE}", arguments.join(" "))),
    }
}
