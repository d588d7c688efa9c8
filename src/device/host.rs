//! What the operating system says about the host: its processor, how much memory there is, and what
//! limits it.

use std::fs;

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
    match (meminfo("MemAvailable:"), cgroup_available()) {
        (Some(machine), Some(group)) => Some(machine.min(group)),
        (machine, group) => machine.or(group),
    }
}

/// The limits on memory that can be pinned, in words, for error messages.
pub fn describe_limits() -> String {
    let show = |bytes: Option<u64>| bytes.map_or("unknown".to_owned(), |b| format!("{b} bytes"));
    let memlock = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
    format!(
        "available host memory {}, memory cgroup allows {}, RLIMIT_MEMLOCK {}",
        show(meminfo("MemAvailable:")),
        cgroup_available().map_or("any amount".to_owned(), |b| format!("{b} bytes more")),
        memlock.map_or("unlimited".to_owned(), |b| format!("{b} bytes")),
    )
}

/// A row of /proc/meminfo in bytes.
fn meminfo(key: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let row = text.lines().find_map(|line| line.strip_prefix(key))?;
    row.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// What the memory cgroup (v2, else v1) still allows, page cache counted as free.
fn cgroup_available() -> Option<u64> {
    const V2: [&str; 2] = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"];
    const V1: [&str; 2] = [
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ];
    let number = |path: &str| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let (limit, used, stat, cache) = match (number(V2[0]), number(V2[1])) {
        (Some(limit), Some(used)) => (limit, used, "/sys/fs/cgroup/memory.stat", "file "),
        _ => (number(V1[0])?, number(V1[1])?, "/sys/fs/cgroup/memory/memory.stat", "cache "),
    };
    let cached = fs::read_to_string(stat)
        .ok()
        .and_then(|text| text.lines().find_map(|line| line.strip_prefix(cache)?.parse().ok()))
        .unwrap_or(0);
    Some(limit.saturating_sub(used.saturating_sub(cached)))
}
