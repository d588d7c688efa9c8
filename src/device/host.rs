//! What the operating system says about the host: its processor, how much memory there is, and what
//! limits it.

use std::fs;
use std::path::Path;

use super::cgroup;

/// Marketing name of the processor, or its architecture.
pub fn processor_name() -> String {
    fs::read_to_string("/proc/cpuinfo")
        .ok()
        .and_then(|text| {
            let row = text.lines().find(|line| line.starts_with("model name"))?;
            Some(row.split_once(':')?.1.trim().to_owned())
        })
        .unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

/// Total memory of the machine in bytes, where it can be known.
pub fn total_bytes() -> Option<u64> {
    meminfo("MemTotal:")
}

/// Bytes that could be allocated now without running into swap or the memory cgroup's limit, where it
/// can be known.
pub fn available_bytes() -> Option<u64> {
    least(meminfo("MemAvailable:"), cgroup().map(|group| group.left()))
}

/// Bytes that this process could ever have: the memory of the machine or the memory cgroup's limit, where it can
/// be known.
pub fn limit_bytes() -> Option<u64> {
    least(total_bytes(), cgroup().map(|group| group.limit))
}

fn least(machine: Option<u64>, group: Option<u64>) -> Option<u64> {
    machine.into_iter().chain(group).min()
}

fn cgroup() -> Option<cgroup::Memory> {
    cgroup::tightest(Path::new("/"))
}

/// The limits on memory, in words, for error messages.
pub fn describe_limits() -> String {
    let show = |bytes: Option<u64>| bytes.map_or("unknown".to_owned(), |b| format!("{b} bytes"));
    let memlock = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
    format!(
        "host memory {}, {} of it available; memory cgroup {}; RLIMIT_MEMLOCK {}",
        show(total_bytes()),
        show(meminfo("MemAvailable:")),
        cgroup().map_or("sets no limit".to_owned(), |group| {
            format!("limit {} bytes, {} of them used", group.limit, group.used)
        }),
        memlock.map_or("unlimited".to_owned(), |b| format!("{b} bytes")),
    )
}

/// A row of /proc/meminfo in bytes.
fn meminfo(key: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let row = text.lines().find_map(|line| line.strip_prefix(key))?;
    row.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}
