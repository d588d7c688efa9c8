//! The `hybridkv` command: one subcommand per module, each with its own arguments and its own `main`.

mod bench;
mod codec;
mod plan;
mod random;
mod replay;
mod report;
mod run;
mod trace;
mod validate;
mod values;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use hybridkv::device::Device;
use hybridkv::error::{Error, ErrorKind, Result};
use hybridkv::ops::Kernels;

/// Hybrid, hierarchical KV caches: kernels, manager, and the proofs that they are right.
#[derive(Debug, Parser)]
#[command(version, about, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve conversations against a device pool too small for them, verifying every step.
    Run(Box<run::Args>),
    /// Say how many tokens a model, a GPU and a memory budget hold.
    Plan(plan::Args),
    /// Check every kernel against the f64 reference on randomised cases.
    Validate(validate::Args),
    /// Time the kernels beside the machine's own limits.
    Bench(bench::Args),
    /// Say what codecs cost and lose on captured keys and values.
    Codec(codec::Args),
    /// Drive the manager from outside: operations, or a whole request trace.
    Replay(Box<replay::Args>),
    /// Read committed reports: tables, and which are stale.
    Report(report::Args),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run(args) => run::main(&args),
        Command::Plan(args) => plan::main(&args),
        Command::Validate(args) => validate::main(&args),
        Command::Bench(args) => bench::main(&args),
        Command::Codec(args) => codec::main(&args),
        Command::Replay(args) => replay::main(&args),
        Command::Report(args) => report::main(&args),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}

/// The device named on the command line: `cpu`, `cuda:N`, `auto` (the first GPU that this build has
/// kernels for, else the CPU, saying so), or `cpu-deferred:SEED`, the CPU device that runs streams in an
/// adversarial order, for tests.
pub(crate) fn open_device(name: &str) -> Result<Device> {
    match name {
        "cpu" => Ok(Device::cpu()),
        "auto" => match Device::cuda(0).and_then(|device| Kernels::load(&device).map(|_| device)) {
            Ok(device) => Ok(device),
            Err(error) => {
                let expected = matches!(
                    error.kind(),
                    ErrorKind::NoDriver
                        | ErrorKind::NoDevice { .. }
                        | ErrorKind::NoKernels
                        | ErrorKind::NoKernelImage { .. }
                );
                if !expected {
                    return Err(error);
                }
                eprintln!("using the CPU device: {error}");
                Ok(Device::cpu())
            }
        },
        _ => {
            if let Some(seed) = name.strip_prefix("cpu-deferred:").and_then(|n| n.parse().ok()) {
                return Ok(Device::cpu_deferred(seed));
            }
            let ordinal = match name.strip_prefix("cuda") {
                Some("") => Some(0),
                Some(rest) => rest.strip_prefix(':').and_then(|n| n.parse().ok()),
                None => None,
            };
            match ordinal {
                Some(ordinal) => Device::cuda(ordinal),
                None => Err(Error::unsupported("device", "device", name, "auto, cpu, cuda:N")),
            }
        }
    }
}
