//! `hybridkv validate`.

use std::process::ExitCode;

use hybridkv::error::{Error, Result};

/// Arguments of `hybridkv validate`.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Runs the subcommand.
pub fn main(_args: &Args) -> Result<ExitCode> {
    Err(Error::invalid("validate", "this build does not have the subcommand"))
}
