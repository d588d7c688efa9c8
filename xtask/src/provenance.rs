//! Where a build comes from, for the reports it writes on machines without the repository.

use sha2::{Digest, Sha256};

use crate::shell::{self, Result};

/// `{commit, kernels_sha256, dirty}` as JSON. `kernels_sha256` is the SHA-256 of the output of
/// `git ls-files -s kernels`; `dirty` says that files differ from the commit.
pub fn json() -> Result<String> {
    let git = |arguments: &[&str]| shell::output(shell::program("git").args(arguments));
    let kernels = git(&["ls-files", "-s", "kernels"])?;
    let provenance = serde_json::json!({
        "commit": git(&["rev-parse", "HEAD"])?.trim(),
        "kernels_sha256": hex(&Sha256::digest(kernels)),
        "dirty": !git(&["status", "--porcelain"])?.is_empty(),
    });
    Ok(format!("{provenance:#}\n"))
}

/// Bytes as lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
