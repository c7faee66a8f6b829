//! The real `openai` package, which tests drive us with.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A Python that has the package, installed for this checkout alone. `None` where PyPI can't be reached: a developer's
/// machine may be without a network, CI may not.
pub fn python(root: &Path) -> Option<PathBuf> {
    let requirements = root.join("tests/openai/requirements.txt");
    let pinned = fs::read_to_string(&requirements).unwrap();
    let folder = root.join("target/openai");
    let (python, installed) = (folder.join("bin/python"), folder.join("installed.txt"));
    if fs::read_to_string(&installed).is_ok_and(|installed| installed == pinned) {
        return Some(python);
    }
    let mut venv = Command::new("python3");
    venv.args(["-m", "venv", "--clear"]).arg(folder);
    let mut pip = Command::new(&python);
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--requirement"]);
    pip.arg(requirements);
    for mut command in [venv, pip] {
        let why = match command.output() {
            Ok(output) if output.status.success() => continue,
            Ok(output) => String::from_utf8_lossy(&output.stderr).into_owned(),
            Err(error) => error.to_string(),
        };
        assert!(std::env::var_os("CI").is_none(), "the openai package can't be installed: {why}");
        // Past the capture that hides what a passing test prints.
        let _ = writeln!(io::stderr(), "skipped: the openai package can't be installed: {why}");
        return None;
    }
    fs::write(installed, pinned).unwrap();
    Some(python)
}
