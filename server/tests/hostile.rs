//! Clients that misbehave, many at once: memory stays flat, good clients are served meanwhile, no page is lost.
//!
//! CI runs a share of it; `cargo test -p minisgl-server --test hostile -- --ignored` all of it, in minutes.

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use common::serve::Served;
use common::{Running, Scratch, Stream, checkpoint, messages, parse, request, send, settings};
use serde_json::{Value, json};

const TEXT: &str = "/v1/completions";

/// Deterministic numbers below a bound.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// A good client's request, whose answer never changes.
fn good(address: SocketAddr) -> Value {
    let body = json!({"prompt": "Once upon a time", "temperature": 0, "max_tokens": 6, "ignore_eos": true});
    let reply = send(address, &request(TEXT, "", body.to_string().as_bytes()));
    assert_eq!(reply.status, 200, "{}", String::from_utf8_lossy(&reply.body));
    reply.json()["choices"].clone()
}

/// Bytes of memory that a process has now.
fn resident(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// The program, memory of it once it has served something, and what good clients are answered.
fn serve(scratch: &Scratch, flags: &[&str]) -> (Served, u64, Value) {
    checkpoint(scratch.path());
    let served = Served::start(scratch.path(), flags);
    let answer = good(served.address);
    for _ in 0..20 {
        assert_eq!(good(served.address), answer);
    }
    let memory = resident(served.child.id());
    (served, memory, answer)
}

/// Ends the program; nothing in it may have panicked.
fn end(mut served: Served) {
    served.child.kill().unwrap();
    let mut said = String::new();
    served.stderr.read_to_string(&mut said).unwrap();
    assert!(!said.contains("panicked"), "{said}");
}

/// Beyond what it had, for what is open and for what the allocator keeps.
const MEMORY_SLACK: u64 = 96 << 20;

fn silence_and_floods(connections: usize, body_bytes: usize) {
    let scratch = Scratch::new();
    let (served, before, answer) = serve(&scratch, &["--header-seconds", "5", "--body-seconds", "5"]);
    let address = served.address;
    // Some say nothing, some half a header, some half a body.
    let head = format!(
        "POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n"
    );
    let halves: [&[u8]; 4] =
        [b"", b"GET / HT", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n", head.as_bytes()];
    let mut silent: Vec<TcpStream> = Vec::new();
    for i in 0..connections {
        let mut socket = TcpStream::connect(address).unwrap();
        socket.write_all(halves[i % halves.len()]).unwrap();
        silent.push(socket);
        if i % 100 == 99 {
            assert_eq!(good(address), answer, "served beside {i} that say nothing");
        }
    }
    // One that never ends its body, whatever it says of its length.
    let mut endless = TcpStream::connect(address).unwrap();
    endless
        .write_all(&head.replace("Content-Length: 100000", "Transfer-Encoding: chunked").into_bytes())
        .unwrap();
    let chunk = [b"10000\r\n", [b' '; 65_536].as_slice(), b"\r\n"].concat();
    for _ in 0..body_bytes / 65_536 {
        if endless.write_all(&chunk).is_err() {
            break; // It was told and closed.
        }
    }
    let mut refused = Vec::new();
    let _ = endless.read_to_end(&mut refused);
    // The answer may be lost to a reset, as what was sent goes unread.
    assert!(parse(&refused).is_none_or(|reply| reply.status == 413));
    assert_eq!(send(address, head.replace("100000", "1000000000").as_bytes()).status, 413);
    for odd in [
        format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(100_000)),
        format!("GET / HTTP/1.1\r\n{}\r\n", "X-A: b\r\n".repeat(50_000)),
        format!("GET / HTTP/1.1\r\nX-A: {}\r\n\r\n", "b".repeat(1_000_000)),
        "\0\u{1}\u{2}\r\n\r\n".to_owned(),
        "BREW / HTCPCP/1.0\r\n\r\n".to_owned(),
    ] {
        assert!(
            common::try_send(address, odd.as_bytes()).is_none_or(|reply| (400..500).contains(&reply.status))
        );
    }
    assert_eq!(good(address), answer);
    let after = resident(served.child.id());
    assert!(after < before + MEMORY_SLACK, "memory grew from {before} to {after} bytes");
    // Those that said nothing are let go in the end.
    for mut socket in silent {
        socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut rest = Vec::new();
        let closed = socket.read_to_end(&mut rest);
        assert!(closed.is_ok() || closed.unwrap_err().kind() == std::io::ErrorKind::ConnectionReset);
    }
    assert_eq!(good(address), answer);
    end(served);
}

#[test]
fn connections_that_say_nothing_and_floods_cost_little_and_hold_up_nobody() {
    silence_and_floods(200, 64 << 20);
}

#[test]
#[ignore = "a minute: 2,000 connections and a body of a gigabyte"]
fn two_thousand_connections_that_say_nothing_and_a_gigabyte_cost_little_and_hold_up_nobody() {
    silence_and_floods(2_000, 1 << 30);
}

/// Streams whose readers take a few bytes now and then, and everything in the end.
fn slow_readers(readers: usize, tokens: usize) {
    let scratch = Scratch::new();
    let (served, before, answer) = serve(&scratch, &[]);
    let address = served.address;
    let body = json!({
        "prompt": "Once", "max_tokens": tokens, "ignore_eos": true, "stream": true, "return_token_ids": true, "n": 2,
        "logprobs": 20,
    });
    let mut slow: Vec<(TcpStream, Vec<u8>)> = Vec::new();
    for _ in 0..readers {
        let mut socket = TcpStream::connect(address).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(300))).unwrap();
        socket.write_all(&request(TEXT, "", body.to_string().as_bytes())).unwrap();
        slow.push((socket, Vec::new()));
    }
    for _ in 0..20 {
        for (socket, taken) in &mut slow {
            let mut some = [0; 1000];
            let read = socket.read(&mut some).unwrap();
            taken.extend_from_slice(&some[..read]);
        }
        assert_eq!(good(address), answer, "beside {readers} that read slowly");
    }
    let after = resident(served.child.id());
    assert!(after < before + MEMORY_SLACK, "memory grew from {before} to {after} bytes");
    for (mut socket, mut taken) in slow {
        socket.read_to_end(&mut taken).unwrap();
        let reply = parse(&taken).unwrap();
        let text = String::from_utf8(reply.body).unwrap();
        assert!(text.ends_with("data: [DONE]\n\n"), "a slow reader gets all of it");
        assert_eq!(text.matches("token_ids").count(), 2 * tokens);
    }
    assert_eq!(good(address), answer);
    end(served);
}

#[test]
fn clients_that_read_slowly_hold_up_nobody_and_get_all_of_it() {
    slow_readers(24, 200);
}

#[test]
#[ignore = "minutes: 400 slow readers of two outputs each"]
fn hundreds_of_clients_that_read_slowly_hold_up_nobody_and_get_all_of_it() {
    slow_readers(400, 30);
}

fn bodies_of_all_kinds(count: u64) {
    let running = Running::tiny(settings());
    let mut numbers = Numbers(7);
    let whole = json!({
        "messages": messages(), "max_tokens": 2, "temperature": 1.0, "logprobs": true, "n": 1, "stop": ["a"],
        "tools": [], "seed": 3, "stream_options": null, "chat_template_kwargs": {"a": [1, {"b": null}]},
    });
    let whole = whole.to_string().into_bytes();
    for i in 0..count {
        let mut body = whole.clone();
        for _ in 0..=numbers.below(4) {
            let at = numbers.below(body.len() as u64) as usize;
            match numbers.below(4) {
                0 => body[at] = numbers.below(256) as u8,
                1 => drop(body.drain(at..)),
                2 => body.insert(at, b"{}[]\":,0e-\\\xff"[numbers.below(12) as usize]),
                _ => drop(body.splice(at..at, whole[..at.min(60)].iter().copied())),
            }
            if body.is_empty() {
                body.push(b'{');
            }
        }
        let reply = send(running.address, &request("/v1/chat/completions", "", &body));
        assert!(
            matches!(reply.status, 200 | 400 | 404),
            "{i}: {}: {reply:?}",
            String::from_utf8_lossy(&body)
        );
        if reply.status != 200 {
            reply.refused(reply.status);
        }
    }
    running.app.engines.get().unwrap().handle.check().unwrap();
}

#[test]
fn damaged_bodies_are_answered_one_by_one() {
    bodies_of_all_kinds(300);
}

#[test]
#[ignore = "a minute: 20,000 damaged bodies"]
fn twenty_thousand_damaged_bodies_are_answered_one_by_one() {
    bodies_of_all_kinds(20_000);
}

fn aborts(requests: u64) {
    let running = Running::tiny(settings());
    let (address, over) = (running.address, AtomicBool::new(false));
    let (next, served) = (AtomicU64::new(0), AtomicU64::new(0));
    let answer = good(address);
    std::thread::scope(|scope| {
        let leavers: Vec<_> = (0..8)
            .map(|thread| {
                let next = &next;
                scope.spawn(move || {
                    let mut numbers = Numbers(thread);
                    while next.fetch_add(1, Ordering::Relaxed) < requests {
                        let body = json!({
                            "prompt": vec![numbers.below(900); 1 + numbers.below(100) as usize],
                            "max_tokens": 1 + numbers.below(100), "n": 1 + numbers.below(3), "ignore_eos": true,
                            "stream": numbers.below(4) > 0, "temperature": 1,
                        });
                        leave(address, &body, numbers.below(5));
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                assert_eq!(good(address), answer, "beside clients that leave");
                served.fetch_add(1, Ordering::Relaxed);
            }
        });
        for leaver in leavers {
            leaver.join().unwrap();
        }
        over.store(true, Ordering::Relaxed);
    });
    assert!(served.load(Ordering::Relaxed) > 0);
    let handle = running.app.engines.get().unwrap().handle;
    running.wait("nothing is open", || handle.open_requests() == 0);
    running.wait("no page is held", || handle.load().unwrap().pages_used == 0);
    handle.check().unwrap();
    assert_eq!(good(address), answer);
}

/// Sends a request and goes away, at once or after so many events.
fn leave(address: SocketAddr, body: &Value, patience: u64) {
    if patience == 0 || body["stream"] == false {
        let mut socket = TcpStream::connect(address).unwrap();
        let _ = socket.write_all(&request(TEXT, "", body.to_string().as_bytes()));
        if patience > 2 {
            let mut some = [0; 10];
            let _ = socket.read(&mut some);
        }
        return;
    }
    let stream = Stream::open(address, TEXT, body);
    let _ = stream.take(patience as usize).last();
}

#[test]
fn clients_that_leave_at_any_moment_lose_no_page() {
    aborts(300);
}

#[test]
#[ignore = "minutes: 10,000 aborted requests"]
fn ten_thousand_clients_that_leave_at_any_moment_lose_no_page() {
    aborts(10_000);
}
