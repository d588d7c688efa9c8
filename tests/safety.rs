//! docs/safety.md says which tests fail without which rule: every rule has some, and all of them exist.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// Names of the tests in a folder's sources.
fn tests_below(folder: &Path, names: &mut BTreeSet<String>) {
    for path in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        if path.is_dir() {
            tests_below(&path, names);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(path).unwrap();
            let mut is_test = false;
            for line in text.lines().map(str::trim) {
                if let Some(name) = line.strip_prefix("fn ").filter(|_| is_test) {
                    names.extend(name.split('(').next().map(str::to_owned));
                }
                is_test = line == "#[test]" || is_test && line.starts_with("#[");
            }
        }
    }
}

#[test]
fn every_rule_has_tests_and_they_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut known = BTreeSet::new();
    tests_below(&root.join("tests"), &mut known);
    tests_below(&root.join("src"), &mut known);
    let text = fs::read_to_string(root.join("docs/safety.md")).unwrap();
    let (mut rules, mut named) = (BTreeSet::new(), 0);
    for row in text.lines().filter(|line| line.starts_with("| ")) {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        rules.extend(cells[0].split(' ').next().filter(|rule| rule.starts_with('R')));
        for test in cells[3].split('`').skip(1).step_by(2) {
            assert!(known.contains(test), "{test} does not exist");
            named += 1;
        }
    }
    let all: Vec<String> = (1..=10).map(|rule| format!("R{rule}")).collect();
    assert!(all.iter().all(|rule| rules.contains(&**rule)), "{rules:?}");
    assert!(named > 30, "{named}");
}
