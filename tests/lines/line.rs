//! A line as such: its bytes, its id, and the envelope of a Batch line.

use minisgl::lines::{self, BadLine};
use serde_json::{Value, json};

use super::{ORIGIN, completion, defaults, native_error, parse};

#[test]
fn an_id_is_kept_to_the_letter() {
    for id in [
        "18446744073709551616",
        "18446744073709551617",
        "1.0",
        "1e400",
        "-0",
        r#""\ud800""#,
        r#""\u0041 / é""#,
        r#"{"any": ["json", 1.50]}"#,
        "false",
        "123456789012345678901234567890.000000000000000000000000000001",
    ] {
        let lines = [
            format!(r#"{{"id": {id}, "prompt": "a"}}"#),
            format!(r#"{{"custom_id": {id}, "url": "/v1/completions", "body": {{"prompt": "a"}}}}"#),
        ];
        for line in lines {
            let header = parse(&line).expect(&line).header;
            assert_eq!(header.id(), id);
            let mut out = Vec::new();
            lines::write_result(&mut out, &header, ORIGIN, &[completion()], None, &|_| None);
            let out = String::from_utf8(out).unwrap();
            assert!(out.contains(&format!("id\":{id},")), "{out}");
        }
    }
    for line in [r#"{"prompt": "a"}"#, r#"{"id": null, "prompt": "a"}"#] {
        assert!(native_error(line).starts_with("the request has no id;"));
    }
    let line = r#"{"custom_id": null, "url": "/v1/completions", "body": {"prompt": "a"}}"#;
    assert!(native_error(line).starts_with("the request has no custom_id;"));
}

#[test]
fn deeply_nested_values_are_kept_as_ids_and_refused_elsewhere() {
    let deep = format!("{}1{}", "[".repeat(200_000), "]".repeat(200_000));
    assert_eq!(parse(format!(r#"{{"id": {deep}, "prompt": "a"}}"#)).unwrap().header.id(), deep);
    for (field, says) in [
        ("temperature", "temperature"),
        ("prompt", "prompt"),
        ("messages", "messages"),
        ("n", "n is [[["),
        ("whatever", "there is no field"),
        ("body", "there is no field"),
    ] {
        let error = native_error(&format!(r#"{{"id": 1, "{field}": {deep}}}"#));
        assert!(error.starts_with(says) || error.starts_with("give exactly one"), "{error}");
        assert!(error.len() < 300, "an error repeats little of the line: {}", error.len());
    }
    let in_a_message = format!(r#"{{"id": 1, "messages": [{{"role": "user", "content": {deep}}}]}}"#);
    assert!(native_error(&in_a_message).starts_with("messages can't be read: messages[0]: "));
}

#[test]
fn a_line_that_is_no_object_is_said_to_be_none() {
    for (line, says) in [
        (&b"{\"id\": 1, \"prompt"[..], "not valid JSON: EOF while parsing a string at column"),
        (b"{\"id\": 1} x", "not valid JSON: trailing characters at column 11"),
        (b"{'id': 1}", "not valid JSON: key must be a string"),
        (b"{\"id\": NaN}", "not valid JSON: "),
        (b"[1, 2]", "not a JSON object"),
        (b"\"text\"", "not a JSON object"),
        (b"7", "not a JSON object"),
        (b"no json", "not valid JSON: expected"),
        (b"{\"id\": 1, \"prompt\": \"\xFF\"}", "not valid UTF-8 at byte 22; save the file as UTF-8"),
        (b"\xFF\xFE{\x00", "not valid UTF-8 at byte 1"),
        (b"\x1F\x8B\x08", "not valid UTF-8 at byte 2"),
    ] {
        let bad = parse(line).unwrap_err();
        assert!(
            bad.error.to_string().starts_with(says),
            "{:?}: {}",
            String::from_utf8_lossy(line),
            bad.error
        );
        assert_eq!((bad.header.id(), bad.error.field()), ("null", None));
    }
}

#[test]
fn a_line_that_is_too_long_to_be_read_says_how_long_it_may_be() {
    let mut out = Vec::new();
    lines::write_bad(&mut out, &BadLine::too_long(64, &defaults()), ORIGIN);
    let result: Value = serde_json::from_slice(&out).unwrap();
    let says = "line 3: the line has more than 64 bytes; shorten it, or raise --max-line-bytes";
    assert_eq!((&result["id"], &result["error"]), (&Value::Null, &json!(says)));
    assert!(!lines::read_result(&out).unwrap().good);
}

#[test]
fn byte_order_marks_line_ends_and_white_space_do_not_count() {
    let line = r#"{"id": 1, "prompt": "a"}"#;
    for line in [format!("\u{feff}{line}\n"), format!("{line}\r\n"), format!(" \t{line}  \n")] {
        assert_eq!(parse(&line).unwrap().header.id(), "1", "{line:?}");
    }
    assert!(["", "\n", "\r\n", " \t\n", "\u{feff}\n"].iter().all(|line| lines::is_blank(line.as_bytes())));
    assert!(!lines::is_blank(b"x\n"));
}

#[test]
fn an_envelope_that_is_not_whole_is_a_bad_batch_line() {
    for (line, says, param) in [
        (r#"{"custom_id": "a"}"#, "the request has no url; it must be \"/v1/chat", "url"),
        (
            r#"{"custom_id": "a", "url": "/v1/responses", "body": {}}"#,
            "url is \"/v1/responses\"; it must be",
            "url",
        ),
        (
            r#"{"custom_id": "a", "url": "/v1/completions"}"#,
            "the request has no body; give the request there",
            "body",
        ),
        (
            r#"{"custom_id": "a", "url": "/v1/completions", "body": []}"#,
            "body is []; it must be the fields",
            "body",
        ),
        (
            r#"{"custom_id": "a", "url": "/v1/completions", "method": "GET", "body": {}}"#,
            "method is \"GET\"",
            "method",
        ),
        (
            r#"{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "a"}, "x": 1}"#,
            "there is no field",
            "x",
        ),
        (r#"{"custom_id": "a", "custom_id": "b", "url": "x"}"#, "custom_id is given twice", "custom_id"),
    ] {
        let bad = parse(line).unwrap_err();
        assert!(bad.error.to_string().starts_with(says), "{line}: {}", bad.error);
        let mut out = Vec::new();
        lines::write_bad(&mut out, &bad, ORIGIN);
        let result: Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(result["custom_id"], "a");
        assert_eq!(result["error"], Value::Null);
        assert_eq!(result["response"]["status_code"], 400);
        assert_eq!(result["response"]["body"]["error"]["type"], "invalid_request_error");
        assert_eq!(result["response"]["body"]["error"]["param"], param);
        assert_eq!(lines::read_result(&out).unwrap(), lines::Outcome { origin: Some(ORIGIN), good: false });
    }
    for (url, body, says) in [
        ("/v1/chat/completions", r#"{"prompt": "a"}"#, "give messages, and no prompt"),
        (
            "/v1/completions",
            r#"{"messages": [{"role": "user", "content": "a"}]}"#,
            "give exactly one of prompt and",
        ),
    ] {
        let line = format!(r#"{{"custom_id": "a", "url": "{url}", "body": {body}}}"#);
        assert!(native_error(&line).starts_with(says), "{line}");
    }
}
