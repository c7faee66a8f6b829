//! Who is let in and with what: keys, bounds of a request, names of requests, other origins.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use minisgl::Text;
use minisgl::simulated::Control;
use minisgl_server::Settings;

use crate::common::{Running, request, send, settings};
use crate::{CHAT, TEXT};

#[test]
fn a_key_is_asked_for_where_there_is_one() {
    let settings = Settings { api_keys: vec!["secret".to_owned()], ..settings() };
    let (running, _) = Running::simulated(settings, Control::default(), Text::default());
    for path in ["/v1/models", "/metrics", "/version"] {
        let refused = running.get(path);
        assert_eq!(refused.refused(401)["code"], "invalid_api_key");
        assert_eq!(refused.header("www-authenticate"), Some("Bearer"));
    }
    let body = br#"{"prompt": [1], "max_tokens": 1}"#;
    assert_eq!(send(running.address, &request(TEXT, "", body)).status, 401);
    assert_eq!(send(running.address, &request(TEXT, "Authorization: Bearer secreT\r\n", body)).status, 401);
    assert_eq!(send(running.address, &request(TEXT, "Authorization: Bearer secret\r\n", body)).status, 200);
    for path in ["/health", "/ready"] {
        assert_eq!(running.get(path).status, 200, "{path}");
    }
}

#[test]
fn requests_are_bounded_in_time() {
    let brief = Duration::from_millis(300);
    // Half a body, and then nothing.
    let settings_of_bodies = Settings { body_timeout: brief, ..settings() };
    let (running, _) = Running::simulated(settings_of_bodies, Control::default(), Text::default());
    let half = said("Content-Length: 50") + "{\"prompt\":";
    assert_eq!(send(running.address, half.as_bytes()).status, 408);
    // A header that does not come to its end.
    let settings_of_headers = Settings { header_timeout: brief, ..settings() };
    let (running, _) = Running::simulated(settings_of_headers, Control::default(), Text::default());
    let mut socket = TcpStream::connect(running.address).unwrap();
    socket.write_all(b"GET /health HTTP/1.1\r\nHost: x\r\n").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let mut answer = Vec::new();
    let _ = socket.read_to_end(&mut answer);
    assert!(
        answer.is_empty() || answer.starts_with(b"HTTP/1.1 408"),
        "{:?}",
        String::from_utf8_lossy(&answer)
    );
}

/// The head of a request with this of its body's length.
fn said(length: &str) -> String {
    format!(
        "POST {TEXT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n{length}\r\n\r\n"
    )
}

#[test]
fn bodies_are_bounded_in_size_and_kind() {
    let settings = Settings { body_bytes_max: 100_000, ..settings() };
    let (running, _) = Running::simulated(settings, Control::default(), Text::default());
    let address = running.address;
    // By what it says of itself, and by what comes.
    assert_eq!(send(address, said("Content-Length: 1000000000").as_bytes()).status, 413);
    let mut chunked = said("Transfer-Encoding: chunked").into_bytes();
    for _ in 0..20 {
        chunked.extend_from_slice(b"2710\r\n");
        chunked.extend_from_slice(&[b' '; 10_000]);
        chunked.extend_from_slice(b"\r\n");
    }
    assert_eq!(send(address, &chunked).status, 413);
    let not_json =
        format!("POST {TEXT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{{}}");
    assert_eq!(send(address, not_json.as_bytes()).status, 415);
    for body in [&b"\xff\xfe"[..], b"", b"[1]", b"{", b"{\"prompt\": [1], \"prompt\": [2]}", &[b'['; 50_000]]
    {
        let reply = send(address, &request(TEXT, "", body));
        assert_eq!(reply.refused(400)["type"], "invalid_request_error", "{body:?}");
    }
    let deep = format!("{{\"messages\": {}1{}}}", "[".repeat(10_000), "]".repeat(10_000));
    assert_eq!(send(address, &request(CHAT, "", deep.as_bytes())).refused(400)["param"], "messages");
    // A header of too many fields, and one that has as many bytes as it may, and one more.
    let flood = format!(
        "GET /health HTTP/1.1\r\n{}\r\n",
        "X-Header: aaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\n".repeat(5_000)
    );
    assert!(matches!(send(address, flood.as_bytes()).status, 400..=499));
    let header = |bytes: usize| {
        let (start, end) = ("GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Header: ", "\r\n\r\n");
        format!("{start}{}{end}", "a".repeat(bytes - start.len() - end.len()))
    };
    assert_eq!(send(address, header(64 << 10).as_bytes()).status, 200);
    for bytes in [(64 << 10) + 1, 70_000] {
        assert_eq!(send(address, header(bytes).as_bytes()).status, 431, "{bytes}");
    }
    assert_eq!(running.get("/health").status, 200);
}

#[test]
fn a_request_keeps_its_name_and_gets_one_where_it_has_none() {
    let (running, _) = Running::simulated(settings(), Control::default(), Text::default());
    let body = br#"{"prompt": [1], "max_tokens": 1}"#;
    let named = send(running.address, &request(TEXT, "X-Request-Id: mine-7\r\n", body));
    assert_eq!(named.header("x-request-id"), Some("mine-7"));
    let odd = send(running.address, &request(TEXT, &format!("X-Request-Id: {}\r\n", "x".repeat(500)), body));
    assert!(odd.header("x-request-id").unwrap().starts_with("req-"));
    let (a, b) = (running.get("/health"), running.get("/nowhere"));
    assert_ne!(a.header("x-request-id"), b.header("x-request-id"));
}

#[test]
fn pages_of_other_origins_are_kept_out_unless_they_are_let_in() {
    const SENT: &str = "authorization,content-type,x-stainless-retry-count";
    let ask = |address| {
        let head = format!(
            "OPTIONS {TEXT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nOrigin: https://a.example\r\n\
             Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: {SENT}\r\n\r\n"
        );
        let reply = send(address, head.as_bytes());
        let header = |name| reply.header(name).map(str::to_owned);
        (header("access-control-allow-origin"), header("access-control-allow-headers"))
    };
    let (closed, _) = Running::simulated(settings(), Control::default(), Text::default());
    assert_eq!(ask(closed.address), (None, None));
    for (origins, allowed) in
        [("https://a.example", Some("https://a.example")), ("*", Some("*")), ("https://b.example", None)]
    {
        let settings = Settings { cors_origins: vec![origins.to_owned()], ..settings() };
        let (open, _) = Running::simulated(settings, Control::default(), Text::default());
        let (origin, headers) = ask(open.address);
        assert_eq!((origin.as_deref(), headers.as_deref()), (allowed, Some(SENT)), "{origins}");
    }
}
