//! Which processors are near a PCI device: those of its NUMA node, by sysfs.

use std::fs;
use std::path::Path;

use rustix::thread::{CpuSet, sched_getaffinity};

/// The processors of the device's node that this thread may run on; `None` where the node is unknown, or none of
/// its processors is allowed. `bus_id` is the PCI address, `0000:1b:00.0`.
pub(super) fn near(bus_id: &str) -> Option<CpuSet> {
    near_by(Path::new("/"), bus_id, &sched_getaffinity(None).ok()?)
}

fn near_by(root: &Path, bus_id: &str, allowed: &CpuSet) -> Option<CpuSet> {
    let read = |path: String| fs::read_to_string(root.join(path)).ok();
    let bus_id = bus_id.to_ascii_lowercase();
    let node = read(format!("sys/bus/pci/devices/{bus_id}/numa_node"))?;
    // -1 stands for unknown.
    let node: u32 = node.trim().parse().ok()?;
    let list = read(format!("sys/devices/system/node/node{node}/cpulist"))?;
    let mut set = CpuSet::new();
    for cpu in parse_list(&list)?.into_iter().filter(|&cpu| cpu < CpuSet::MAX_CPU) {
        if allowed.is_set(cpu) {
            set.set(cpu);
        }
    }
    (set.count() > 0).then_some(set)
}

/// `0-3,8,10-11`, as the kernel writes sets of processors.
fn parse_list(list: &str) -> Option<Vec<usize>> {
    let mut cpus = Vec::new();
    for part in list.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        cpus.extend(first..=last.min(CpuSet::MAX_CPU));
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near_of(name: &str, node: &str, cpulist: &str, allowed: &[usize]) -> Option<Vec<usize>> {
        let root =
            std::env::temp_dir().join(format!("hybridkv-numa-{}-{name}", std::process::id()));
        for (path, text) in [
            ("sys/bus/pci/devices/0000:1b:00.0/numa_node", node),
            ("sys/devices/system/node/node1/cpulist", cpulist),
        ] {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let mut set = CpuSet::new();
        allowed.iter().for_each(|&cpu| set.set(cpu));
        let found = near_by(&root, "0000:1B:00.0", &set);
        fs::remove_dir_all(&root).unwrap();
        found.map(|set| (0..CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect())
    }

    #[test]
    fn processors_of_the_node_that_are_allowed() {
        let all: Vec<usize> = (0..16).collect();
        assert_eq!(near_of("all", "1\n", "4-6,9\n", &all), Some(vec![4, 5, 6, 9]));
        assert_eq!(near_of("some", "1\n", "4-6,9\n", &[0, 5, 9]), Some(vec![5, 9]));
        assert_eq!(near_of("none", "1\n", "4-6,9\n", &[0, 1]), None, "elsewhere");
        assert_eq!(near_of("unknown", "-1\n", "4-6,9\n", &all), None);
        assert_eq!(near_of("missing", "0\n", "4-6,9\n", &all), None, "no such node");
        assert_eq!(near_of("broken", "1\n", "4-x\n", &all), None);
        assert_eq!(near_of("many", "1\n", "3,0-99999999\n", &[2]), Some(vec![2]));
    }
}
