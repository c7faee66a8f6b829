//! The program itself, started as a user starts it.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};

/// A running `serve`; killed when dropped.
pub struct Served {
    pub child: Child,
    pub address: SocketAddr,
    /// What it said until it was ready.
    pub said: String,
    pub stderr: BufReader<ChildStderr>,
}

impl Served {
    /// Serves the checkpoint in a folder at a free port; returns when it is ready.
    pub fn start(folder: &Path, flags: &[&str]) -> Self {
        let mut child = command(folder, flags).stderr(Stdio::piped()).spawn().unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let mut said = String::new();
        while !said.contains("ready at http://") {
            assert!(stderr.read_line(&mut said).unwrap() > 0, "it ended: {said}");
        }
        let (_, url) = said.split_once("ready at http://").unwrap();
        let address = url.split(':').take(2).collect::<Vec<_>>().join(":");
        Served { child, address: address.parse().unwrap(), said, stderr }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

/// The program on the CPU, with small capacities where the flags name no others.
pub fn command(folder: &Path, flags: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_serve"));
    command.arg("--model").arg(folder).env_remove("MINISGL_API_KEY").env_remove("RUST_LOG").args(flags);
    let defaults =
        [("--port", "0"), ("--max-running", "8"), ("--max-seq-len", "256"), ("--num-pages", "128")];
    for (flag, value) in defaults.iter().filter(|(flag, _)| !flags.contains(flag)) {
        command.args([flag, value]);
    }
    command.args(["--backend", "cpu"]);
    command
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
