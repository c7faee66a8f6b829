//! Full queues, engines that fail, clients that leave or don't read, and the service's end.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::Ordering;
use std::time::Duration;

use minisgl::simulated::Control;
use minisgl::{Error, Text};
use minisgl_server::{Ended, Settings};
use serde_json::{Value, json};

use crate::common::{self, Running, builds, limits, request, send, settings};
use crate::{TEXT, endless, slow};

#[test]
fn a_full_queue_is_answered_with_when_to_try_again_and_has_room_again_later() {
    let control = Control { limits: limits(2), ..slow(1) };
    let settings = Settings { queued_max: 1, ..settings() };
    let (running, _) = Running::simulated(settings, control, Text::default());
    let mut streams: Vec<_> = (0..2).map(|_| running.stream(TEXT, endless())).collect();
    let waiting = std::thread::spawn({
        let address = running.address;
        move || send(address, &request(TEXT, "", br#"{"prompt": [1], "max_tokens": 2}"#))
    });
    let engine = running.app.engines.get().unwrap();
    running.wait("three are open", || engine.handle.open_requests() == 3);
    let refused = running.post(TEXT, &json!({"prompt": [1]}));
    assert_eq!(refused.refused(429)["code"], "queue_full");
    assert_eq!(refused.header("retry-after"), Some("1"));
    let too_many = running.post(TEXT, &json!({"prompt": [1], "n": 4}));
    assert_eq!(too_many.status, 400, "more than will ever fit");
    streams.pop();
    assert_eq!(waiting.join().unwrap().status, 200);
    assert_eq!(running.post(TEXT, &json!({"prompt": [1], "max_tokens": 1})).status, 200);
}

#[test]
fn requests_are_told_while_the_model_is_loaded_and_when_its_engine_failed_and_the_next_one_serves_them() {
    let (mut build, controls) =
        builds(|number| Control { fails_at: (number == 0).then_some(2), ..Control::default() });
    let (open, gate) = std::sync::mpsc::channel::<()>();
    let running = Running::start(settings(), move || {
        gate.recv().map_err(|_| Error::Closed)?;
        build()
    });
    for (path, status) in [("/health", 200), ("/ready", 503), ("/v1/models", 503), ("/metrics", 200)] {
        assert_eq!(running.get(path).status, status, "{path}");
    }
    let loading = running.post(TEXT, &json!({"prompt": [1]}));
    assert!(loading.refused(503)["message"].as_str().unwrap().contains("loaded"));
    assert!(loading.header("retry-after").is_some());
    open.send(()).unwrap();
    running.ready();
    assert_eq!(running.get("/ready").status, 200);
    // One whole, one stream: both are told, each in its way.
    let whole = running.post(TEXT, &json!({"prompt": [1], "max_tokens": 5}));
    assert!(whole.refused(503)["message"].as_str().unwrap().contains("the kernel `down` failed"));
    running.wait("the failure is known", || running.get("/ready").status == 503);
    assert_eq!(running.get("/health").status, 503);
    open.send(()).unwrap();
    running.ready();
    let answer = running.post(TEXT, &json!({"prompt": [1], "max_tokens": 5, "return_token_ids": true}));
    assert_eq!(answer.json()["choices"][0]["token_ids"], json!([1, 2, 3, 4, 5]));
    assert_eq!(controls.lock().unwrap().len(), 2);
    assert_eq!(running.metric("vllm:request_success_total", "lost"), 1.0);
}

#[test]
fn a_stream_whose_engine_fails_ends_with_an_error_event_and_the_mark() {
    let control = Control { fails_at: Some(3), ..Control::default() };
    let (running, _) = Running::simulated(settings(), control, Text::default());
    let events: Vec<Value> = running.stream(TEXT, json!({"prompt": [1], "return_token_ids": true})).collect();
    let [tokens @ .., error, Value::Null] = events.as_slice() else { panic!("{events:?}") };
    assert_eq!(tokens.len(), 3);
    assert_eq!(error["error"]["type"], "service_unavailable");
}

#[test]
fn an_engine_that_fails_too_often_ends_the_service() {
    let (build, controls) = builds(|_| Control { fails_at: Some(0), ..Control::default() });
    let mut running = Running::start(Settings { rebuilds_max: 2, ..settings() }, build);
    running.wait("the service ends", || {
        let status = common::try_send(running.address, &request(TEXT, "", br#"{"prompt": [1]}"#));
        assert!(status.is_none_or(|reply| reply.status == 503));
        running.is_over()
    });
    let error = running.ended().unwrap_err().to_string();
    assert!(error.contains("3 times") && error.contains("the kernel `down` failed"), "{error}");
    assert_eq!(controls.lock().unwrap().len(), 3);
}

/// Ends what a client says, and waits until the service has let go of it; no step begins meanwhile, however long that takes. Gives
/// the steps before.
fn gone_within_a_step(control: &Control, mut socket: TcpStream) -> u64 {
    let _held = control.held.lock().unwrap();
    let before = control.steps.load(Ordering::Relaxed);
    socket.shutdown(Shutdown::Write).unwrap();
    let _ = socket.read_to_end(&mut Vec::new());
    before
}

#[test]
fn a_client_that_goes_away_is_aborted_within_two_steps() {
    let (running, control) = Running::simulated(settings(), slow(100), Text::default());
    for body in [endless(), json!({"prompt": [7], "max_tokens": 90_000, "n": 3, "return_token_ids": true})] {
        let mut stream = running.stream(TEXT, body);
        drop(stream.next());
        let before = gone_within_a_step(&control, stream.reader.into_inner());
        running.wait("the engine is idle", || control.running.load(Ordering::Relaxed) == 0);
        assert!(control.steps.load(Ordering::Relaxed) - before <= 2);
    }
    // One that waits for a whole answer, too.
    let mut socket = TcpStream::connect(running.address).unwrap();
    socket.write_all(&request(TEXT, "", endless().to_string().as_bytes())).unwrap();
    running.wait("it runs", || control.running.load(Ordering::Relaxed) == 1);
    let before = gone_within_a_step(&control, socket);
    running.wait("the engine is idle", || control.running.load(Ordering::Relaxed) == 0);
    assert!(control.steps.load(Ordering::Relaxed) - before <= 2);
    running.wait("they are counted", || running.metric("vllm:request_success_total", "abort") == 5.0);
}

#[test]
fn a_client_that_does_not_read_holds_up_nobody_and_is_cut_off() {
    let settings = Settings { write_timeout: Duration::from_millis(500), queued_max: 0, ..settings() };
    let control = Control { limits: limits(2), ..Control::default() };
    let (running, _) = Running::simulated(settings, control, Text::default());
    // More than sockets hold: the engine is done with it long before it is read.
    let mut unread = Vec::new();
    for _ in 0..4 {
        let body = json!({"prompt": [7], "max_tokens": 60_000, "stream": true, "return_token_ids": true});
        let mut socket = TcpStream::connect(running.address).unwrap();
        socket.write_all(&request(TEXT, "", body.to_string().as_bytes())).unwrap();
        unread.push(socket);
        let engine = running.app.engines.get().unwrap();
        running.wait("it is over for the engine", || {
            running.metric("minisgl:http_requests_total", TEXT) >= unread.len() as f64
                && engine.handle.open_requests() == 0
        });
    }
    assert_eq!(running.post(TEXT, &json!({"prompt": [1], "max_tokens": 3})).status, 200);
    running.wait("they are cut off", || running.metric("vllm:request_success_total", "abort") == 4.0);
    for mut socket in unread {
        let mut rest = Vec::new();
        let _ = socket.read_to_end(&mut rest);
        assert!(!rest.ends_with(b"data: [DONE]\n\n\r\n0\r\n\r\n"), "it was cut off");
    }
}

#[test]
fn a_service_that_is_told_to_end_lets_requests_end_and_takes_no_more() {
    let (mut running, control) = Running::simulated(settings(), slow(20), Text::default());
    let mut open = running.stream(TEXT, json!({"prompt": [7], "max_tokens": 20, "return_token_ids": true}));
    drop(open.next());
    running.end();
    running.wait("connections are refused", || TcpStream::connect(running.address).is_err());
    assert!(running.app.engines.get().is_err());
    let events: Vec<Value> = open.collect();
    assert_eq!(events.last(), Some(&Value::Null), "it had its time");
    assert_eq!(running.ended().unwrap(), Ended::Drained);
    assert_eq!(control.running.load(Ordering::Relaxed), 0);
}

#[test]
fn what_is_not_over_when_the_time_to_drain_is_gets_cut_off() {
    let settings = Settings { drain: Duration::from_millis(100), ..settings() };
    let (mut running, control) = Running::simulated(settings, slow(10), Text::default());
    let mut open = running.stream(TEXT, endless());
    drop(open.next());
    running.end();
    assert_eq!(running.ended().unwrap(), Ended::CutOff);
    let events: Vec<Value> = open.collect();
    let [.., error, Value::Null] = events.as_slice() else { panic!("{events:?}") };
    assert_eq!(error["error"]["type"], "service_unavailable", "it is told so");
    assert!(control.steps.load(Ordering::Relaxed) < 90_000);
}
