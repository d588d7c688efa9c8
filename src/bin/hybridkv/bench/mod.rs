//! `hybridkv bench`.

use std::process::ExitCode;

use hybridkv::error::{Error, Result};

/// Arguments of `hybridkv bench`.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Runs the subcommand.
pub fn main(_args: &Args) -> Result<ExitCode> {
    Err(Error::invalid("bench", "this build does not have the subcommand"))
}
