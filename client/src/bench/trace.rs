//! Traces of real services: when requests came, how long they were, and what their prompts shared.
//!
//! ```text
//!   Mooncake    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, …]}    ms, blocks of 512
//!   Qwen        {"chat_id": 159, "timestamp": 61.1, "input_length": 521, …, "hash_ids": [1089, …]}          s, blocks of 16
//! ```
//!
//! Times are counted from the first request's. What was said is not in a trace: prompts are random, equal where their hash
//! ids are.

use std::time::Duration;

use serde::Deserialize;
use thiserror::Error;

use super::prompt::{Prompt, Request};

/// Tokens of a prompt or an output at most: more is a mistake, and would take all memory.
const TOKENS_MAX: u32 = 1 << 24;

/// A line that is no request.
#[derive(Debug, Error)]
#[error("line {line} is no request of a trace: {reason}")]
pub struct BadTrace {
    /// From 1.
    pub line: usize,
    /// What is wrong.
    pub reason: String,
}

/// The requests of a trace's lines, in order of their times; blank lines are passed over.
///
/// # Errors
/// The first line that is none.
pub fn read<'a>(lines: impl IntoIterator<Item = &'a [u8]>, most: usize) -> Result<Vec<Request>, BadTrace> {
    let mut requests = Vec::new();
    for (line, number) in lines.into_iter().zip(1..) {
        if requests.len() == most {
            break;
        }
        if !line.trim_ascii().is_empty() {
            let request = request(line, number as u64);
            requests.push(request.map_err(|reason| BadTrace { line: number, reason })?);
        }
    }
    requests.sort_by_key(|request| request.at);
    let first = requests.first().and_then(|request| request.at).unwrap_or_default();
    for request in &mut requests {
        request.at = request.at.map(|at| at - first);
    }
    Ok(requests)
}

fn request(line: &[u8], seed: u64) -> Result<Request, String> {
    #[derive(Deserialize)]
    struct Line {
        chat_id: Option<i64>,
        timestamp: f64,
        input_length: u32,
        output_length: u32,
        #[serde(default)]
        hash_ids: Vec<u64>,
    }
    let Line { chat_id, timestamp, input_length, output_length, hash_ids } =
        serde_json::from_slice(line).map_err(|error| error.to_string())?;
    let (seconds, block) = match chat_id {
        Some(_) => (timestamp, 16),
        None => (timestamp / 1e3, 512),
    };
    let at = Duration::try_from_secs_f64(seconds).map_err(|_| format!("its timestamp is {timestamp}"))?;
    for (name, length) in [("input_length", input_length), ("output_length", output_length)] {
        if length > TOKENS_MAX {
            return Err(format!("its {name} is {length}, and {TOKENS_MAX} tokens are the most"));
        }
    }
    // Some traces have requests that drew nothing.
    let prompt = Prompt::Blocks { tokens: input_length.max(1), block, ids: hash_ids, seed };
    Ok(Request { at: Some(at), prompt, output_tokens: output_length.max(1) })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parsed(text: &str) -> Result<Vec<Request>, BadTrace> {
        read(text.as_bytes().split(|byte| *byte == b'\n'), usize::MAX)
    }

    #[test]
    fn mooncakes_lines_are_in_milliseconds_and_blocks_of_512() {
        let requests = parsed(concat!(
            r#"{"timestamp": 27500, "input_length": 600, "output_length": 52, "hash_ids": [46, 47]}"#,
            "\n\n",
            r#"{"timestamp": 27000, "input_length": 1, "output_length": 0, "hash_ids": [46]}"#,
        ))
        .unwrap();
        let ats: Vec<_> = requests.iter().map(|request| request.at.unwrap().as_millis()).collect();
        assert_eq!(ats, [0, 500], "in order, from the first one's time");
        let prompt = Prompt::Blocks { tokens: 600, block: 512, ids: vec![46, 47], seed: 1 };
        assert_eq!(requests[1], Request { at: Some(Duration::from_millis(500)), prompt, output_tokens: 52 });
        assert_eq!(requests[0].output_tokens, 1);
    }

    #[test]
    fn qwens_lines_are_in_seconds_and_blocks_of_16() {
        let requests = parsed(concat!(
            r#"{"chat_id": 1, "parent_chat_id": -1, "timestamp": 61.25, "input_length": 20, "output_length": 3, "type": "text", "turn": 1, "hash_ids": [7, 8]}"#,
            "\n",
            r#"{"chat_id": 2, "parent_chat_id": 1, "timestamp": 62.5, "input_length": 20, "output_length": 3, "type": "text", "turn": 2, "hash_ids": [7, 8]}"#,
        ))
        .unwrap();
        assert_eq!(requests[1].at, Some(Duration::from_millis(1250)));
        assert!(matches!(&requests[0].prompt, Prompt::Blocks { block: 16, .. }));
    }

    #[test]
    fn a_line_that_is_no_request_is_named() {
        let good = r#"{"timestamp": 1, "input_length": 1, "output_length": 1}"#;
        for (line, complaint) in [
            ("{}", "missing field `timestamp`"),
            ("x", "expected value"),
            (r#"{"timestamp": -5, "input_length": 1, "output_length": 1}"#, "timestamp is -5"),
            (r#"{"timestamp": 1e300, "input_length": 1, "output_length": 1}"#, "timestamp is 1"),
            (
                r#"{"timestamp": 1, "input_length": 4000000000, "output_length": 1}"#,
                "input_length is 4000000000",
            ),
            (r#"{"timestamp": 1, "input_length": 1, "output_length": -1}"#, "invalid value"),
        ] {
            let error = parsed(&format!("{good}\n{line}\n")).unwrap_err();
            assert_eq!(error.line, 2, "{line}");
            assert!(error.to_string().contains(complaint), "{error}");
        }
        assert_eq!(read([good.as_bytes(), b"{}"], 1).unwrap().len(), 1, "what is not wanted is not read");
    }

    proptest! {
        #[test]
        fn no_line_is_too_bad_to_be_told_what_is_wrong(line in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = read([line.as_slice()], 1);
        }
    }
}
