//! Offline throughput: `offline-bench --seed 0 --n 256 --model qwen3-0.6b --workload minisgl`.

use std::process::ExitCode;

use minisgl::bench::program::offline_bench;
use minisgl::from_command_line;

fn main() -> ExitCode {
    if offline_bench(&from_command_line()) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
