//! Lines of `generate`'s input, of either format: whatever one is, its result is one line of JSON.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use minisgl::SamplingParams;
use minisgl::lines::{Defaults, Origin, parse, write_bad, write_failure};
use minisgl::openai::ModelName;

static DEFAULTS: LazyLock<Defaults> =
    LazyLock::new(|| Defaults { sampling: SamplingParams::default(), model: ModelName::new("tiny") });

fuzz_target!(|input: &[u8]| {
    // A line break ends a line, and is none's.
    for line in input.split(|byte| *byte == b'\n') {
        check(line);
    }
});

fn check(line: &[u8]) {
    let origin = Origin { line: 1, fingerprint: 2 };
    let mut out = Vec::new();
    match parse(line, 1, &DEFAULTS) {
        Ok(request) => write_failure(&mut out, &request.header, origin, "the engine stopped"),
        Err(bad) => write_bad(&mut out, &bad, origin),
    }
    assert_eq!(out.iter().position(|byte| *byte == b'\n'), Some(out.len() - 1));
    // An id is handed on as it is written: JSON, be it a number beyond what a reader's has room for.
    serde_json::from_slice::<&serde_json::value::RawValue>(&out).unwrap();
}
