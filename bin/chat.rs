//! A conversation in the terminal: `chat --model Qwen/Qwen3-0.6B`, or `chat --url http://127.0.0.1:1919`.

use std::process::ExitCode;

use minisgl::from_command_line;
use minisgl_client::chat::program::chat;

fn main() -> ExitCode {
    if chat(&from_command_line()) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
