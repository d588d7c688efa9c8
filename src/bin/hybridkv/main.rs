//! The `hybridkv` command.

fn main() {}
