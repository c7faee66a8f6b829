//! The service's promises, over a simulated engine and over a tiny model on the CPU.

mod answers;
mod calls;
#[path = "../common/mod.rs"]
mod common;
mod failures;
mod guard;
mod metrics;
mod routes;

use std::time::Duration;

use minisgl::simulated::Control;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";
const EMBEDDINGS: &str = "/v1/embeddings";

/// A request that runs for as long as nobody aborts it.
fn endless() -> Value {
    json!({"prompt": [7], "max_tokens": 90_000, "return_token_ids": true})
}

fn slow(milliseconds: u64) -> Control {
    Control { step_time: Duration::from_millis(milliseconds), ..Control::default() }
}
