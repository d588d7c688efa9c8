//! `hybridkv plan`.

use std::process::ExitCode;

use hybridkv::error::{Error, Result};

/// Arguments of `hybridkv plan`.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Runs the subcommand.
pub fn main(_args: &Args) -> Result<ExitCode> {
    Err(Error::invalid("plan", "this build does not have the subcommand"))
}
