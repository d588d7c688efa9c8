//! The layout that src/abi.rs asserts of itself is the one that this machine's C compiler gives
//! kernels/abi/*.h: the mirror was generated, perhaps elsewhere, by another compiler.

use std::fmt::Write as _;
use std::process::Command;

#[test]
fn layout_is_that_of_the_c_headers() {
    // `["Size of S"][size_of::<S>() - 32usize]` and `["Offset of field: S::f"][... - 4usize]`.
    let mirror: String =
        include_str!("../src/abi.rs").split_whitespace().collect::<Vec<_>>().join(" ");
    let mut code = String::from("#include <stddef.h>\n#include \"kernels/abi/params.h\"\n");
    let mut count = 0;
    for assertion in mirror.split("[\"").skip(1) {
        let (what, rest) = assertion.split_once("\"]").expect("a quoted description");
        let value = rest.split_once(" - ").and_then(|(_, rest)| rest.split_once("usize]"));
        let value = value.expect("a number").0;
        let expression = if let Some(name) = what.strip_prefix("Size of ") {
            format!("sizeof({name})")
        } else if let Some(field) = what.strip_prefix("Offset of field: ") {
            format!("offsetof({})", field.replace("::", ", "))
        } else {
            assert!(what.starts_with("Alignment of "), "{what}");
            continue;
        };
        writeln!(code, "_Static_assert({expression} == {value}, \"{expression}\");").unwrap();
        count += 1;
    }
    assert!(count >= 70, "src/abi.rs asserts only {count} sizes and offsets");

    let file = std::env::temp_dir().join(format!("hybridkv-abi-{}.c", std::process::id()));
    std::fs::write(&file, &code).expect("a temporary file");
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".to_owned());
    let output =
        Command::new(&compiler).args(["-std=c11", "-fsyntax-only", "-I."]).arg(&file).output();
    std::fs::remove_file(&file).expect("the file made above");
    match output {
        Ok(output) => {
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr))
        }
        Err(error) => eprintln!("SKIPPED: no C compiler ({compiler}: {error})"),
    }
}
