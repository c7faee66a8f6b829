//! Lines damaged at random: each is taken, or refused by one line that can be read back.

use minisgl::lines;
use proptest::prelude::*;

use super::{ORIGIN, parse};

/// A line with everything in it, to be damaged.
const FULL: &str = concat!(
    r#"{"custom_id": "r\u00e9-1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "Qwen3-0.6B", "#,
    r#""messages": [{"role": "user", "content": [{"type": "text", "text": "a\ud83e\udd80"}]}], "tools": [{"function": {"name": "a"}, "b": 1e3}], "#,
    r#""max_tokens": 2.0, "top_k": -1, "seed": 18446744073709551615, "stop": ["x", "y"], "logprobs": true, "#,
    r#""top_logprobs": 3, "n": 1, "logit_bias": {}, "chat_template_kwargs": {"enable_thinking": false}}}"#
);

/// Whatever a line is, it runs or gets one error line that can be read back.
fn is_taken_or_refused(line: &[u8]) {
    let Err(bad) = parse(line) else { return };
    assert!(bad.error.to_string().len() < 1000 + line.len());
    let mut out = Vec::new();
    lines::write_bad(&mut out, &bad, ORIGIN);
    assert!(out.starts_with(b"{\"id\":") && out.ends_with(b"\n"));
    assert!(out.iter().filter(|byte| **byte == b'\n').count() == 1);
    let outcome = lines::read_result(&out).expect("an error line is a result line");
    assert_eq!(outcome, lines::Outcome { origin: Some(ORIGIN), good: false });
}

#[test]
fn every_beginning_of_a_line_is_taken_or_refused() {
    assert!(parse(FULL).is_ok());
    for end in 0..FULL.len() {
        is_taken_or_refused(&FULL.as_bytes()[..end]);
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_are_taken_or_refused(line in prop::collection::vec(any::<u8>(), 0..200)) {
        is_taken_or_refused(&line);
        lines::read_result(&line);
    }

    #[test]
    fn a_damaged_line_is_taken_or_refused(
        damage in prop::collection::vec((0..FULL.len(), prop::sample::select(&b"\"{}[]:,\\u0e-.\x00\xFFn1 \n"[..])), 1..6)
    ) {
        let mut line = FULL.as_bytes().to_vec();
        for (at, byte) in damage {
            line[at] = byte;
        }
        is_taken_or_refused(&line);
    }

    #[test]
    fn parts_of_json_in_any_order_are_taken_or_refused(
        parts in prop::collection::vec(prop::sample::select(&[
            "{", "}", "[", "]", ":", ",", "\"id\"", "\"custom_id\"", "\"url\"", "\"body\"", "\"messages\"", "\"role\"",
            "\"prompt\"", "\"seed\"", "\"/v1/completions\"", "1e999", "-1", "null", "true", "\"\\ud800\"", "1.5",
        ][..]), 0..30)
    ) {
        is_taken_or_refused(parts.concat().as_bytes());
    }
}
