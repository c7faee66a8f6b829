//! Index arithmetic of kernels that is plain C++, proven on the host.

use std::path::Path;
use std::process::Command;

#[test]
fn every_pair_of_an_expert_is_multiplied_with_all_its_rows_once() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("plan");
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    let compiled = Command::new(compiler)
        .args(["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-o"])
        .arg(&program)
        .arg("-I")
        .arg(root.join("cuda"))
        .arg(root.join("tests/plan.cpp"))
        .status()
        .expect("a C++ compiler: install one, or name it in CXX");
    assert!(compiled.success());
    let run = Command::new(program).output().unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stdout));
}
