//! A body of each of the service's routes that generate or embed: it is read, or the first field that is wrong is named.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use minisgl::SamplingParams;
use minisgl::openai::{Body, EmbedBody, Fields, ModelName, Prompts};

static MODEL: LazyLock<ModelName> = LazyLock::new(|| ModelName::new("tiny"));

fuzz_target!(|body: &str| {
    for prompts in [Prompts::Chat, Prompts::Text] {
        let Ok(fields) = Fields::read(body) else { return };
        match Body::read(fields, prompts, &SamplingParams::default(), &MODEL) {
            Ok(body) => assert!(body.samples >= 1),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
    let Ok(fields) = Fields::read(body) else { return };
    match EmbedBody::read(fields, "input", &MODEL) {
        Ok(body) => assert!(body.requests().len() >= 1),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
