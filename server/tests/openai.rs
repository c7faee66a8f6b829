//! The service as users of the `openai` package meet it: the package itself drives it, and accepts every reply.

mod common;
#[path = "../../tests/openai/mod.rs"]
mod openai;

use std::process::Command;

use common::serve::Served;
use common::{Running, Scratch, checkpoint, checkpoint_with_calls, repository, settings, text};
use minisgl::simulated::Control;
use minisgl::{Prompt, ToolFormat};
use minisgl_server::Settings;

const CALL: &str = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Bonn\"}}\n</tool_call>";

#[test]
fn the_openai_package_is_content_with_every_endpoint_and_field() {
    let Some(python) = openai::python(&repository(".")) else { return };
    let scratch = Scratch::new();
    checkpoint(scratch.path());
    let key_file = scratch.path().join("keys");
    std::fs::write(&key_file, "another\n\nsecret\n").unwrap();
    let keyed = Served::start(
        scratch.path(),
        &["--served-model-name", "model", "--api-key-file", key_file.to_str().unwrap()],
    );
    let scratch = Scratch::new();
    checkpoint_with_calls(scratch.path());
    let told = Served::start(scratch.path(), &["--served-model-name", "model"]);
    let script = text().encode(Prompt::Text(CALL.to_owned())).unwrap();
    let calls = Settings { tool_format: Some(ToolFormat::Qwen3), ..settings() };
    let (tools, _) = Running::simulated(calls, Control { script, ..Control::default() }, text());

    let drive = Command::new(python)
        .arg(repository("server/tests/openai/drive.py"))
        .args([keyed.url(), format!("http://{}", tools.address), told.url()])
        .env_remove("PYTHONPATH")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&drive.stdout);
    assert!(drive.status.success(), "{said}{}", String::from_utf8_lossy(&drive.stderr));
    assert_eq!(said.trim(), "the openai package is content");
}
