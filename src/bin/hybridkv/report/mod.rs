//! `hybridkv report`.

use std::process::ExitCode;

use hybridkv::error::{Error, Result};

/// Arguments of `hybridkv report`.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Runs the subcommand.
pub fn main(_args: &Args) -> Result<ExitCode> {
    Err(Error::invalid("report", "this build does not have the subcommand"))
}
