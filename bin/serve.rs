//! A service with OpenAI's API: `serve --model Qwen/Qwen3-0.6B --port 1919`.

use std::process::ExitCode;

use minisgl::from_command_line;
use minisgl_server::program::serve;

fn main() -> ExitCode {
    if serve(&from_command_line()) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
