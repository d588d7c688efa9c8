//! What ptxas says of every kernel, held against the committed table `tests/resources.txt`: a spill is a
//! bug, and a kernel that takes more of a multiprocessor than it did is slower somewhere.

use std::collections::BTreeMap;

const MEASURED: &str = include_str!(env!("HYBRIDKV_RESOURCES"));
const WARNINGS: &str = include_str!(env!("HYBRIDKV_WARNINGS"));
const COMMITTED: &str = include_str!("resources.txt");

const HOW: &str = "if it is meant, `cargo xtask resources --update` writes the table anew";

#[derive(Debug, PartialEq)]
struct Resources {
    registers: u32,
    shared: u32,
    stack: u32,
    spill_stores: u32,
    spill_loads: u32,
}

/// Rows `function arch registers shared stack spill_stores spill_loads` by (function, arch).
fn parse(table: &str) -> BTreeMap<(&str, &str), Resources> {
    let rows = table.lines().filter(|row| !row.is_empty() && !row.starts_with('#'));
    rows.map(|row| {
        let words: Vec<&str> = row.split(' ').collect();
        let [function, arch, numbers @ ..] = words.as_slice() else { panic!("row `{row}`") };
        let numbers: Vec<u32> =
            numbers.iter().map(|n| n.parse().unwrap_or_else(|_| panic!("row `{row}`"))).collect();
        let [registers, shared, stack, spill_stores, spill_loads] = numbers[..] else {
            panic!("row `{row}`")
        };
        ((*function, *arch), Resources { registers, shared, stack, spill_stores, spill_loads })
    })
    .collect()
}

/// The comment that names the compiler: only its own numbers can be compared.
fn compiler(table: &str) -> Option<&str> {
    table.lines().find(|row| row.contains("release"))
}

/// Every way in which `measured` is worse than `committed` allows, for the architectures in both.
fn complaints(measured: &str, committed: &str) -> Vec<String> {
    let comparable = compiler(measured) == compiler(committed);
    let (measured, committed) = (parse(measured), parse(committed));
    let archs: Vec<&str> = committed.keys().map(|(_, arch)| *arch).filter(|_| comparable).collect();
    let mut complaints = Vec::new();
    for ((function, arch), now) in &measured {
        let name = format!("{function} sm_{arch}");
        if now.spill_stores + now.spill_loads > 0 {
            complaints.push(format!(
                "{name} spills: {} bytes stored, {} loaded",
                now.spill_stores, now.spill_loads
            ));
        }
        if !archs.contains(arch) {
            continue;
        }
        let Some(then) = committed.get(&(*function, *arch)) else {
            complaints.push(format!("{name} is missing in the table"));
            continue;
        };
        for (what, now, then) in [
            ("registers", now.registers, then.registers),
            ("bytes of shared memory", now.shared, then.shared),
            ("bytes of stack", now.stack, then.stack),
        ] {
            if now > then {
                complaints.push(format!("{name} takes {now} {what}, {then} in the table"));
            }
        }
    }
    let built: Vec<&str> = measured.keys().map(|(_, arch)| *arch).collect();
    for (function, arch) in committed.keys() {
        if archs.contains(arch)
            && built.contains(arch)
            && !measured.contains_key(&(*function, *arch))
        {
            complaints.push(format!("{function} sm_{arch} is in the table, but not in the build"));
        }
    }
    complaints
}

#[test]
fn kernels_take_no_more_than_the_table_says() {
    match (compiler(MEASURED), compiler(COMMITTED)) {
        (None, _) => eprintln!("SKIPPED: built without CUDA kernels"),
        (Some(this), Some(that)) if this != that => {
            eprintln!(
                "ONLY SPILLS ARE LOOKED FOR: the table is of `{that}`, this build of `{this}`"
            );
        }
        _ => {}
    }
    let complaints = complaints(MEASURED, COMMITTED);
    assert!(complaints.is_empty(), "{}\n{HOW}", complaints.join("\n"));
}

#[test]
fn kernels_compile_without_warnings() {
    assert!(WARNINGS.is_empty(), "{WARNINGS}");
}

#[test]
fn every_way_to_be_worse_is_noticed() {
    let committed = "# release 13.0\nf 80 64 1024 0 0 0\nf 90a 64 1024 0 0 0\n";
    let by = |compiler: &str, rows: &str| {
        complaints(&format!("# {compiler}\n{rows}"), committed).join("; ")
    };
    let of = |rows: &str| by("release 13.0", rows);
    assert_eq!(of("f 80 64 1024 0 0 0\nf 90a 60 1000 0 0 0"), "");
    assert_eq!(of("f 80 65 1024 0 0 0"), "f sm_80 takes 65 registers, 64 in the table");
    assert_eq!(
        of("f 80 64 1025 0 0 0"),
        "f sm_80 takes 1025 bytes of shared memory, 1024 in the table"
    );
    assert_eq!(by("release 13.1", "f 80 65 1025 0 0 0"), "");
    assert_eq!(of("f 80 64 1024 8 0 0"), "f sm_80 takes 8 bytes of stack, 0 in the table");
    assert_eq!(of("f 80 64 1024 0 4 12"), "f sm_80 spills: 4 bytes stored, 12 loaded");
    assert_eq!(of("f 120f 99 0 0 0 4"), "f sm_120f spills: 0 bytes stored, 4 loaded");
    assert_eq!(of("f 120f 99 0 0 0 0"), "");
    assert_eq!(of("f 80 64 1024 0 0 0\ng 80 1 0 0 0 0"), "g sm_80 is missing in the table");
    assert_eq!(
        of("g 80 1 0 0 0 0"),
        "g sm_80 is missing in the table; f sm_80 is in the table, but not in the build"
    );
}
