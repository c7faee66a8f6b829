//! A line of `generate`'s input, of either format: whatever it is, its result is one line of JSON.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use minisgl::SamplingParams;
use minisgl::lines::{Defaults, Origin, parse, write_bad, write_failure};
use minisgl::openai::ModelName;

static DEFAULTS: LazyLock<Defaults> =
    LazyLock::new(|| Defaults { sampling: SamplingParams::default(), model: ModelName::new("tiny") });

fuzz_target!(|line: &[u8]| {
    let origin = Origin { line: 1, fingerprint: 2 };
    let mut out = Vec::new();
    match parse(line, 1, &DEFAULTS) {
        Ok(request) => write_failure(&mut out, &request.header, origin, "the engine stopped"),
        Err(bad) => write_bad(&mut out, &bad, origin),
    }
    assert_eq!(out.iter().position(|byte| *byte == b'\n'), Some(out.len() - 1));
    serde_json::from_slice::<serde_json::Value>(&out).unwrap();
});
