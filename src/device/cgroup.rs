//! The memory limit that control groups put on this process: cgroup v2 (`memory.max`) or v1
//! (`memory.limit_in_bytes`), of its own group and of all groups around it.

use std::fs;
use std::path::Path;

/// A limit and what is used of it, page cache that can be dropped not counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Memory {
    pub limit: u64,
    pub used: u64,
}

impl Memory {
    /// Bytes that may be allocated on top.
    pub fn left(&self) -> u64 {
        self.limit.saturating_sub(self.used)
    }
}

/// The files of a version.
struct Version {
    /// In front of the group's path in `/proc/self/cgroup`, behind the number of the hierarchy.
    controller: &'static str,
    mount: &'static str,
    limit: &'static str,
    used: &'static str,
    /// Rows of `memory.stat` that count page cache.
    cache: [&'static str; 2],
}

const VERSIONS: [Version; 2] = [
    Version {
        controller: "",
        mount: "sys/fs/cgroup",
        limit: "memory.max",
        used: "memory.current",
        cache: ["inactive_file ", "active_file "],
    },
    Version {
        controller: "memory",
        mount: "sys/fs/cgroup/memory",
        limit: "memory.limit_in_bytes",
        used: "memory.usage_in_bytes",
        cache: ["total_inactive_file ", "total_active_file "],
    },
];

/// The group, of those that this process is in, that leaves least, by the files under `root`; `None` where
/// nothing limits it.
pub(super) fn tightest(root: &Path) -> Option<Memory> {
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
    let path = |controller: &str| {
        groups.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':').skip(1);
            let named = parts.next()?.split(',').any(|name| name == controller);
            named.then(|| parts.next())?
        })
    };
    let of_version = |version: &Version| {
        let mount = root.join(version.mount);
        let own = path(version.controller)?.trim_start_matches('/');
        // Inside of a container the path may be that of the outside: what is not there is passed over.
        let around = Path::new(own).ancestors().map(|group| mount.join(group));
        around.filter_map(|folder| read(version, &folder)).min_by_key(Memory::left)
    };
    VERSIONS.iter().filter_map(of_version).min_by_key(Memory::left)
}

/// A group's own limit. The largest numbers stand for none.
fn read(version: &Version, folder: &Path) -> Option<Memory> {
    let number = |name: &str| -> Option<u64> {
        fs::read_to_string(folder.join(name)).ok()?.trim().parse().ok()
    };
    let limit = number(version.limit).filter(|&limit| limit < 1 << 62)?;
    let stat = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let row = |key: &str| -> Option<u64> {
        stat.lines().find_map(|line| line.strip_prefix(key))?.trim().parse().ok()
    };
    let cache: u64 = version.cache.iter().filter_map(|key| row(key)).sum();
    Some(Memory { limit, used: number(version.used)?.saturating_sub(cache) })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tightest limit among files of these names and contents.
    fn of(name: &str, files: &[(&str, &str)]) -> Option<(u64, u64)> {
        let root =
            std::env::temp_dir().join(format!("hybridkv-cgroup-{}-{name}", std::process::id()));
        for (path, text) in files {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let found = tightest(&root);
        fs::remove_dir_all(&root).unwrap();
        found.map(|memory| (memory.limit, memory.left()))
    }

    #[test]
    fn version_2_of_the_group_and_those_around_it() {
        let files = [
            ("proc/self/cgroup", "0::/pods/a\n"),
            ("sys/fs/cgroup/pods/a/memory.max", "max\n"),
            ("sys/fs/cgroup/pods/a/memory.current", "100\n"),
            ("sys/fs/cgroup/pods/memory.max", "4000\n"),
            ("sys/fs/cgroup/pods/memory.current", "1500\n"),
            (
                "sys/fs/cgroup/pods/memory.stat",
                "anon 900\ninactive_file 300\nactive_file 200\nfile 900\n",
            ),
            ("sys/fs/cgroup/memory.max", "5000\n"),
            ("sys/fs/cgroup/memory.current", "1000\n"),
        ];
        assert_eq!(of("v2", &files), Some((4000, 3000)), "page cache is no use of it");
        assert_eq!(of("v2-none", &files[..3]), None, "no limit");
        let escaped = [&[("proc/self/cgroup", "0::/../../outside\n")], &files[6..]].concat();
        assert_eq!(of("v2-outside", &escaped), Some((5000, 4000)), "the path of the outside");
    }

    #[test]
    fn version_1_has_a_hierarchy_for_memory() {
        let files = [
            ("proc/self/cgroup", "8:pids:/\n4:cpu,memory:/job/7\n0::/\n"),
            ("sys/fs/cgroup/memory/job/7/memory.limit_in_bytes", "2000\n"),
            ("sys/fs/cgroup/memory/job/7/memory.usage_in_bytes", "1900\n"),
            (
                "sys/fs/cgroup/memory/job/7/memory.stat",
                "inactive_file 1\ntotal_inactive_file 500\n",
            ),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "77\n"),
        ];
        assert_eq!(of("v1", &files), Some((2000, 600)));
        assert_eq!(of("nothing", &[("proc/self/cgroup", "")]), None);
    }
}
