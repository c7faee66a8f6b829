//! The service's promises, over a simulated engine and over a tiny model on the CPU.

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::Ordering;
use std::time::Duration;

use common::{
    Running, Scratch, builds, checkpoint_with_calls, limits, messages, repository, request, send, settings,
    text,
};
use minisgl::simulated::Control;
use minisgl::{Error, Text, ToolFormat, sample_seed};
use minisgl_server::{Ended, Settings};
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

#[test]
fn a_stream_says_what_a_whole_answer_says() {
    let running = Running::tiny(settings());
    let sampling =
        json!({"temperature": 0.9, "seed": 3, "max_tokens": 40, "ignore_eos": true, "n": 2, "top_p": 0.9});
    let logprobs = json!({"logprobs": true, "top_logprobs": 2});
    for (path, prompt, more) in [
        (CHAT, json!({"messages": messages()}), json!({})),
        (CHAT, json!({"messages": messages()}), logprobs),
        (TEXT, json!({"prompt": ["Once", "upon"]}), json!({"echo": true})),
        (TEXT, json!({"prompt": "Once upon a time", "stop": "e"}), json!({"logprobs": 1})),
    ] {
        let mut body = sampling.clone();
        for part in [prompt, more] {
            body.as_object_mut().unwrap().extend(part.as_object().unwrap().clone());
        }
        let whole = running.post(path, &body).json();
        body["stream_options"] = json!({"include_usage": true});
        let events: Vec<Value> = running.stream(path, body.clone()).collect();
        let [chunks @ .., counted, Value::Null] = events.as_slice() else { panic!("{events:?}") };
        let count = |usage: &Value| (usage["prompt_tokens"].clone(), usage["completion_tokens"].clone());
        assert_eq!(count(&counted["usage"]), count(&whole["usage"]), "{body}");
        assert!(chunks.iter().all(|chunk| chunk["usage"].is_null() && chunk["id"] == chunks[0]["id"]));
        for (index, choice) in whole["choices"].as_array().unwrap().iter().enumerate() {
            let of_choice =
                || chunks.iter().map(|chunk| &chunk["choices"][0]).filter(|one| one["index"] == index);
            let said = |one: &Value| {
                let piece = if path == CHAT { &one["delta"]["content"] } else { &one["text"] };
                piece.as_str().unwrap_or_default().to_owned()
            };
            let text: String = of_choice().map(said).collect();
            let expected = if path == CHAT { &choice["message"]["content"] } else { &choice["text"] };
            assert_eq!(text, expected.as_str().unwrap(), "{body}");
            let ends: Vec<_> = of_choice().filter(|one| !one["finish_reason"].is_null()).collect();
            assert_eq!((ends.len(), &ends[0]["finish_reason"]), (1, &choice["finish_reason"]));
            let list = if path == CHAT { "content" } else { "token_logprobs" };
            let streamed = of_choice().flat_map(|one| one["logprobs"][list].as_array().into_iter().flatten());
            let whole: Vec<_> = choice["logprobs"][list].as_array().into_iter().flatten().collect();
            assert_eq!(streamed.collect::<Vec<_>>(), whole, "{body}");
        }
    }
}

#[test]
fn each_output_of_a_prompt_has_a_seed_of_its_own_and_the_first_has_the_requests() {
    let running = Running::tiny(settings());
    let ask = |seed: u64, n: u32| -> Vec<Value> {
        let body = json!({"prompt": "Once", "temperature": 1.2, "seed": seed, "max_tokens": 12, "n": n, "ignore_eos": true});
        let answer = running.post(TEXT, &body).json();
        answer["choices"].as_array().unwrap().iter().map(|choice| choice["text"].clone()).collect()
    };
    let three = ask(5, 3);
    assert_eq!(three, [0, 1, 2].map(|sample| ask(sample_seed(5, sample), 1)).concat());
    assert_ne!(three[0], three[1]);
    // Without a seed no two requests draw the same.
    let body = json!({"prompt": "Once", "temperature": 1.5, "max_tokens": 30, "ignore_eos": true});
    assert_ne!(running.post(TEXT, &body).json()["choices"], running.post(TEXT, &body).json()["choices"]);
}

#[test]
fn an_echo_with_log_probabilities_has_those_of_its_prompt() {
    let running = Running::tiny(settings());
    let sampling = json!({"max_tokens": 5, "temperature": 0, "ignore_eos": true, "return_token_ids": true});
    let ask = |more: Value| {
        let mut body = sampling.clone();
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        running.post(TEXT, &body).json()["choices"][0].clone()
    };
    let count = |list: &Value| list.as_array().unwrap().len();
    let drawn = ask(json!({"prompt": "Once upon a time", "logprobs": 2}));
    let echoed = ask(json!({"prompt": "Once upon a time", "logprobs": 2, "echo": true}));
    let text = drawn["text"].as_str().unwrap();
    assert_eq!(echoed["text"], format!("Once upon a time{text}"));
    let (all, output) = (&echoed["logprobs"], &drawn["logprobs"]);
    let prompt = count(&all["tokens"]) - 5;
    assert!(prompt > 1, "{all}");
    for list in ["tokens", "token_logprobs", "top_logprobs"] {
        let own = &all[list].as_array().unwrap()[prompt..];
        assert_eq!(own, output[list].as_array().unwrap(), "{list}");
    }
    assert!(all["token_logprobs"][0].is_null() && all["top_logprobs"][0].is_null());
    assert!(all["token_logprobs"].as_array().unwrap()[1..].iter().all(Value::is_number));
    let offsets: Vec<u64> =
        all["text_offset"].as_array().unwrap().iter().map(|at| at.as_u64().unwrap()).collect();
    assert!(offsets.is_sorted() && offsets[0] == 0 && offsets[prompt] == 16, "{offsets:?}");
    // The whole text given and nothing drawn: the same numbers.
    let ids = running.post("/tokenize", &json!({"prompt": "Once upon a time"})).json()["tokens"].clone();
    let whole: Vec<Value> =
        [ids, drawn["token_ids"].clone()].iter().flat_map(|ids| ids.as_array().unwrap().clone()).collect();
    let given = ask(json!({"prompt": whole, "logprobs": 2, "echo": true, "max_tokens": 0}));
    assert_eq!(given["logprobs"]["token_logprobs"], all["token_logprobs"]);
    assert_eq!(given["finish_reason"], "length");
    // In vLLM's form.
    let scored = ask(json!({"prompt": whole, "prompt_logprobs": 0, "max_tokens": 0}));
    let listed = scored["prompt_logprobs"].as_array().unwrap();
    for (at, id) in whole.iter().enumerate().skip(1) {
        assert_eq!(listed[at][id.to_string()]["logprob"], all["token_logprobs"][at], "token {at}");
    }
    let chat = json!({"messages": messages(), "prompt_logprobs": 1, "max_tokens": 1});
    let answer = running.post(CHAT, &chat).json();
    assert_eq!(count(&answer["prompt_logprobs"]) as u64, answer["usage"]["prompt_tokens"].as_u64().unwrap());
    let plain = ask(json!({"prompt": "Once", "echo": true}));
    assert_eq!(ask(json!({"prompt": "Once", "echo": true, "prompt_logprobs": null, "tools": null})), plain);
    let nothing_else =
        ask(json!({"prompt": "Once upon a time", "logprobs": 2, "echo": true, "prompt_logprobs": null}));
    assert_eq!(nothing_else, echoed, "a field that is null is as good as absent");
    let null = running.post("/tokenize", &json!({"prompt": "Once", "messages": null})).json();
    assert_eq!(null, running.post("/tokenize", &json!({"prompt": "Once"})).json());
    for more in [json!({"echo": true, "logprobs": 1}), json!({"prompt_logprobs": 1})] {
        let mut body = json!({"prompt": "Once", "stream": true});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        assert_eq!(running.post(TEXT, &body).refused(400)["param"], "stream");
    }
    let both = json!({"prompt": "Once", "echo": true, "logprobs": 1, "prompt_logprobs": 1});
    assert_eq!(running.post(TEXT, &both).refused(400)["param"], "echo");
    let nothing = json!({"prompt": "Once", "max_tokens": 0});
    assert_eq!(running.post(TEXT, &nothing).refused(400)["param"], "max_tokens");
    assert_eq!(ask(json!({"prompt": "Once", "max_tokens": 0, "echo": true}))["text"], "Once");
}

#[test]
fn embeddings_come_in_the_order_of_their_inputs_as_numbers_or_as_their_bytes() {
    let running = Running::tiny(settings());
    let ask = |body: Value| running.post(EMBEDDINGS, &body).json();
    let values = |answer: &Value, at: usize| answer["data"][at]["embedding"].as_array().unwrap().clone();
    let one = ask(json!({"input": "Once upon", "model": "model"}));
    assert_eq!(
        (&one["object"], &one["model"], values(&one, 0).len()),
        (&json!("list"), &json!("model"), 128)
    );
    assert_eq!(one["data"][0]["object"], "embedding");
    let ids = running.post("/tokenize", &json!({"prompt": "Once upon"})).json()["tokens"].clone();
    assert_eq!(ask(json!({"input": ids})), one);
    let tokens = ids.as_array().unwrap().len();
    assert_eq!(one["usage"], json!({"prompt_tokens": tokens, "total_tokens": tokens}));

    let several = ask(json!({"input": ["A page", "Once upon", "a time"], "encoding_format": "float"}));
    assert_eq!(several["data"].as_array().unwrap().len(), 3);
    for (at, item) in several["data"].as_array().unwrap().iter().enumerate() {
        assert_eq!(item["index"], at);
    }
    assert_eq!(values(&several, 1), values(&one, 0));
    assert_ne!(values(&several, 0), values(&one, 0));
    assert_eq!(values(&ask(json!({"input": [[5, 6], [7]], "dimensions": 3})), 1).len(), 3);

    let coded = ask(json!({"input": "Once upon", "encoding_format": "base64"}));
    // 512 bytes.
    assert_eq!(coded["data"][0]["embedding"].as_str().unwrap().len(), 684);

    for (field, value) in [
        ("dimensions", json!(129)),
        ("dimensions", json!(0)),
        ("encoding_format", json!("int8")),
        ("input", json!(7)),
        ("input", json!(null)),
        ("max_tokens", json!(5)),
        ("truncate_prompt_tokens", json!(5)),
    ] {
        let mut body = json!({"input": "a"});
        body[field] = value;
        assert_eq!(running.post(EMBEDDINGS, &body).refused(400)["param"], field, "{body}");
    }
    let empty = running.post(EMBEDDINGS, &json!({"input": []})).refused(400);
    assert!(empty["message"].as_str().unwrap().contains("the prompt is empty"), "{empty}");
    let long = running.post(EMBEDDINGS, &json!({"input": vec![5; 600]})).refused(400);
    assert_eq!(long["code"], "context_length_exceeded");
    assert_eq!(
        running.post(EMBEDDINGS, &json!({"input": "a", "model": "gpt"})).refused(404)["param"],
        "model"
    );
    let metrics = String::from_utf8(running.get("/metrics").body).unwrap();
    assert!(metrics.contains("minisgl:embeddings_total{model_name=\"model\"} 8"), "{metrics}");
}

#[test]
fn a_field_that_can_not_be_served_is_refused_by_its_name() {
    let running = Running::tiny(settings());
    let both = [
        ("presence_penalty", json!(2.5)),
        ("frequency_penalty", json!(-2.5)),
        ("repetition_penalty", json!(0)),
        ("logit_bias", json!({"5": 101})),
        ("logit_bias", json!({"4000000": 1})),
        ("stop_token_ids", json!([4_000_000])),
        ("bad_words", json!([" "])),
        ("allowed_token_ids", json!([])),
        ("allowed_token_ids", json!([5, 4_000_000])),
        ("max_token", json!(5)),
        ("temperature", json!(-1)),
        ("top_p", json!(0)),
        ("stop", json!([""])),
        ("seed", json!("x")),
        ("n", json!(0)),
        ("n", json!(129)),
        ("stream_options", json!({"include_usage": true})),
        ("min_tokens", json!(-1)),
        ("use_beam_search", json!(true)),
    ];
    let chat = [
        ("response_format", json!({"type": "xml"})),
        ("tool_choice", json!("sometimes")),
        ("top_logprobs", json!(3)),
        ("reasoning_effort", json!("high")),
        ("echo", json!(true)),
        ("functions", json!([{}])),
    ];
    let text =
        [("suffix", json!("x")), ("best_of", json!(3)), ("logprobs", json!(21)), ("tools", json!([{}]))];
    let of_text = both.iter().chain(&text).map(|case| (TEXT, json!({"prompt": "a"}), case));
    let of_chat = both.iter().chain(&chat).map(|case| (CHAT, json!({"messages": messages()}), case));
    for (path, mut body, (field, value)) in of_text.chain(of_chat) {
        body[field] = value.clone();
        let error = running.post(path, &body).refused(400);
        assert_eq!(error["type"], "invalid_request_error");
        let named = if *field == "top_logprobs" { "logprobs" } else { field };
        assert_eq!(error["param"], named, "{body}: {error}");
        if *field != "stream_options" {
            body["stream"] = true.into();
            assert_eq!(running.post(path, &body).status, 400, "before a stream begins, too: {body}");
        }
    }
    let other_model = json!({"prompt": "a", "model": "gpt-4o"});
    assert_eq!(running.post(TEXT, &other_model).refused(404)["code"], "model_not_found");
    let long = json!({"prompt": vec![5; 300]});
    assert_eq!(running.post(TEXT, &long).refused(400)["code"], "context_length_exceeded");
    assert_eq!(
        running.post(CHAT, &json!({"messages": [{"role": "elf", "content": ""}]})).refused(400)["param"],
        "messages"
    );
    assert_eq!(
        running.post(CHAT, &json!({"messages": messages(), "tools": [{}]})).refused(400)["param"],
        "tools"
    );
}

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

#[test]
fn a_client_that_goes_away_is_aborted_within_two_steps() {
    let (running, control) = Running::simulated(settings(), slow(100), Text::default());
    for body in [endless(), json!({"prompt": [7], "max_tokens": 90_000, "n": 3, "return_token_ids": true})] {
        let mut stream = running.stream(TEXT, body);
        drop(stream.next());
        let before = control.steps.load(Ordering::Relaxed);
        drop(stream);
        running.wait("the engine is idle", || control.running.load(Ordering::Relaxed) == 0);
        assert!(control.steps.load(Ordering::Relaxed) - before <= 2);
    }
    // One that waits for a whole answer, too.
    let mut socket = TcpStream::connect(running.address).unwrap();
    socket.write_all(&request(TEXT, "", endless().to_string().as_bytes())).unwrap();
    running.wait("it runs", || control.running.load(Ordering::Relaxed) == 1);
    let before = control.steps.load(Ordering::Relaxed);
    drop(socket);
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
    std::thread::sleep(Duration::from_secs(2));
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
fn bodies_are_bounded_in_size_time_and_kind() {
    let settings = Settings {
        body_bytes_max: 100_000,
        body_timeout: Duration::from_millis(300),
        header_timeout: Duration::from_millis(300),
        ..settings()
    };
    let (running, _) = Running::simulated(settings, Control::default(), Text::default());
    let address = running.address;
    let said = |length: &str| {
        format!(
            "POST {TEXT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n{length}\r\n\r\n"
        )
    };
    // By what it says of itself, and by what comes.
    assert_eq!(send(address, said("Content-Length: 1000000000").as_bytes()).status, 413);
    let mut chunked = said("Transfer-Encoding: chunked").into_bytes();
    for _ in 0..20 {
        chunked.extend_from_slice(b"2710\r\n");
        chunked.extend_from_slice(&[b' '; 10_000]);
        chunked.extend_from_slice(b"\r\n");
    }
    assert_eq!(send(address, &chunked).status, 413);
    // Half of it, and then nothing.
    assert_eq!(send(address, (said("Content-Length: 50") + "{\"prompt\":").as_bytes()).status, 408);
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
    // A header that does not come to its end.
    let mut socket = TcpStream::connect(address).unwrap();
    socket.write_all(b"GET /health HTTP/1.1\r\nHost: x\r\n").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let mut answer = Vec::new();
    let _ = socket.read_to_end(&mut answer);
    assert!(
        answer.is_empty() || answer.starts_with(b"HTTP/1.1 408"),
        "{:?}",
        String::from_utf8_lossy(&answer)
    );
    // One that is too long.
    let flood = format!(
        "GET /health HTTP/1.1\r\n{}\r\n",
        "X-Header: aaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\n".repeat(5_000)
    );
    assert!(matches!(send(address, flood.as_bytes()).status, 400..=499));
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
    let ask = |address| {
        let head = format!(
            "OPTIONS {TEXT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nOrigin: https://a.example\r\n\
             Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: content-type\r\n\r\n"
        );
        send(address, head.as_bytes()).header("access-control-allow-origin").map(str::to_owned)
    };
    let (closed, _) = Running::simulated(settings(), Control::default(), Text::default());
    assert_eq!(ask(closed.address), None);
    for (origins, allowed) in
        [("https://a.example", Some("https://a.example")), ("*", Some("*")), ("https://b.example", None)]
    {
        let settings = Settings { cors_origins: vec![origins.to_owned()], ..settings() };
        let (open, _) = Running::simulated(settings, Control::default(), Text::default());
        assert_eq!(ask(open.address).as_deref(), allowed, "{origins}");
    }
}

/// An engine that says a text, whatever it is asked.
fn says(said: &str, settings: Settings) -> Running {
    let script = text().encode(minisgl::Prompt::Text(said.to_owned())).unwrap();
    Running::simulated(settings, Control { script, ..Control::default() }, text()).0
}

#[test]
fn calls_of_tools_are_told_apart_whole_and_streamed() {
    let said =
        "I look. <tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Bonn\"}}\n</tool_call>";
    let with_tools = Settings { tool_format: Some(ToolFormat::Qwen3), ..settings() };
    let running = says(said, with_tools);
    let tools =
        json!([{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]);
    let body = json!({"messages": messages(), "tools": tools, "max_tokens": 200});
    let choice = running.post(CHAT, &body).json()["choices"][0].clone();
    assert_eq!(choice["finish_reason"], "tool_calls", "{choice}");
    assert_eq!(choice["message"]["content"], "I look.");
    let call = &choice["message"]["tool_calls"][0];
    assert_eq!(call["function"], json!({"name": "weather", "arguments": "{\"city\": \"Bonn\"}"}));
    assert!(call["id"].as_str().unwrap().starts_with("call-") && call["type"] == "function");

    let chunks: Vec<Value> = running.stream(CHAT, body.clone()).filter(|chunk| !chunk.is_null()).collect();
    let deltas = || chunks.iter().map(|chunk| &chunk["choices"][0]["delta"]);
    let text: String = deltas().filter_map(|delta| delta["content"].as_str()).collect();
    assert_eq!(text, "I look.");
    let calls: Vec<_> = deltas().filter_map(|delta| delta.get("tool_calls")).collect();
    assert_eq!(calls.len(), 1);
    assert_eq!((&calls[0][0]["index"], &calls[0][0]["function"]), (&json!(0), &call["function"]));
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");

    // Without tools, or with none to be used, it is text.
    for body in [
        json!({"messages": messages(), "max_tokens": 200}),
        json!({"messages": messages(), "max_tokens": 200, "tools": tools, "tool_choice": "none"}),
    ] {
        let choice = running.post(CHAT, &body).json()["choices"][0].clone();
        assert_eq!((&choice["message"]["content"], &choice["finish_reason"]), (&json!(said), &json!("stop")));
    }
}

/// What each choice of a whole answer or of a stream calls, and its end.
fn called(choices: &[Value]) -> (Vec<Value>, Value) {
    let part = |choice: &Value| match choice.get("delta") {
        Some(delta) => delta["tool_calls"].clone(),
        None => choice["message"]["tool_calls"].clone(),
    };
    let calls = choices.iter().flat_map(|choice| part(choice).as_array().cloned().unwrap_or_default());
    let functions = calls.map(|call| call["function"].clone()).collect();
    (functions, choices.last().unwrap()["finish_reason"].clone())
}

#[test]
fn a_call_that_is_asked_for_comes_whatever_the_model_would_say() {
    let count = json!({"type": "object", "additionalProperties": false, "required": ["to"],
                       "properties": {"to": {"type": "integer", "minimum": 1, "maximum": 9}}});
    let paint = json!({"type": "object", "additionalProperties": false, "required": ["in"],
                       "properties": {"in": {"enum": ["red", "grün"]}}});
    let tool = |name: &str, parameters: &Value| json!({"type": "function", "function": {"name": name, "parameters": parameters}});
    let tools = json!([tool("count", &count), tool("paint", &paint)]);
    let named = json!({"type": "function", "function": {"name": "paint"}});
    for tool_format in [None, Some(ToolFormat::Llama3)] {
        let scratch = Scratch::new();
        checkpoint_with_calls(scratch.path());
        let running = Running::of_checkpoint(Settings { tool_format, ..settings() }, scratch);
        for (choice, seed) in
            [json!("required"), named.clone()].iter().flat_map(|choice| (0..4).map(move |i| (choice, i)))
        {
            let body = json!({
                "messages": messages(), "tools": tools, "tool_choice": choice, "parallel_tool_calls": false,
                "temperature": 2, "seed": seed, "max_tokens": 150,
            });
            let whole = running.post(CHAT, &body).json()["choices"].as_array().unwrap().clone();
            let (functions, reason) = called(&whole);
            assert_eq!((functions.len(), &reason), (1, &json!("tool_calls")), "{whole:?}");
            assert!(whole[0]["message"]["content"].is_null(), "{whole:?}");
            let schema = match functions[0]["name"].as_str() {
                Some("paint") => &paint,
                Some("count") if *choice == "required" => &count,
                other => panic!("{other:?} is called"),
            };
            let arguments = functions[0]["arguments"].as_str().unwrap();
            assert!(jsonschema::is_valid(schema, &serde_json::from_str(arguments).unwrap()), "{arguments}");
            let chunks: Vec<Value> = running.stream(CHAT, body).filter(|chunk| !chunk.is_null()).collect();
            let choices: Vec<Value> = chunks.iter().map(|chunk| chunk["choices"][0].clone()).collect();
            assert_eq!(called(&choices), (functions, reason), "streamed");
        }
        let several = json!({
            "messages": messages(), "tools": tools, "tool_choice": named, "temperature": 2, "seed": 1, "max_tokens": 150, "n": 3,
        });
        let several = running.post(CHAT, &several).json()["choices"].as_array().unwrap().clone();
        assert_eq!(several.len(), 3);
        for choice in several {
            let (functions, reason) = called(&[choice]);
            assert_eq!((functions.len(), &reason), (1, &json!("tool_calls")), "{functions:?}");
        }
        let pattern = json!({"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}});
        let unusable = json!([tool("paint", &pattern)]);
        let body = json!({"messages": messages(), "tools": unusable, "tool_choice": "required"});
        for stream in [false, true] {
            let mut body = body.clone();
            body["stream"] = stream.into();
            let refused = running.post(CHAT, &body).refused(400);
            assert!(refused["message"].as_str().unwrap().contains("the tool \"paint\""), "{refused}");
        }
    }
}

#[test]
fn thoughts_are_told_apart_where_that_is_wanted() {
    let said = "<think>\nHm.\n</think>\n\nYes.";
    let body = json!({"messages": messages(), "max_tokens": 200});
    let apart = says(said, Settings { separate_reasoning: true, ..settings() });
    let message = apart.post(CHAT, &body).json()["choices"][0]["message"].clone();
    assert_eq!((&message["reasoning_content"], &message["content"]), (&json!("Hm."), &json!("Yes.")));
    let chunks: Vec<Value> = apart.stream(CHAT, body.clone()).collect();
    let of = |field: &str| -> String {
        chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"][field].as_str()).collect()
    };
    assert_eq!((of("reasoning_content"), of("content")), ("Hm.".to_owned(), "Yes.".to_owned()));
    let together = says(said, settings());
    let message = together.post(CHAT, &body).json()["choices"][0]["message"].clone();
    assert_eq!((&message["content"], message.get("reasoning_content")), (&json!(said), None));
}

#[test]
fn what_happens_is_counted_and_timed() {
    let (running, _) = Running::simulated(settings(), Control::default(), Text::default());
    assert_eq!(running.post(TEXT, &json!({"prompt": [[1, 2], [3]], "max_tokens": 4})).status, 200);
    assert_eq!(running.stream(TEXT, json!({"prompt": [1], "max_tokens": 3})).last(), Some(Value::Null));
    for (name, label, value) in [
        ("vllm:request_success_total", "finished_reason=\"length\"", 3.0),
        ("vllm:prompt_tokens_total", "", 4.0),
        ("vllm:generation_tokens_total", "", 11.0),
        ("vllm:prefix_cache_hits_total", "", 21.0),
        ("vllm:time_to_first_token_seconds_count", "", 3.0),
        ("minisgl:request_encode_time_seconds_count", "", 3.0),
        ("vllm:request_queue_time_seconds_count", "", 3.0),
        ("vllm:request_prefill_time_seconds_count", "", 3.0),
        ("vllm:inter_token_latency_seconds_count", "", 8.0),
        ("vllm:e2e_request_latency_seconds_count", "", 3.0),
        ("vllm:num_requests_running", "", 0.0),
        ("vllm:num_requests_waiting", "", 0.0),
        ("minisgl:http_requests_total", "status=\"200\"", 2.0),
    ] {
        running.wait(name, || running.metric(name, label) >= value);
        if !name.contains("http") {
            assert_eq!(running.metric(name, label), value, "{name}");
        }
    }
    assert!(running.metric("minisgl:step_seconds_count", "kind=\"decode\"") >= 4.0);
    let text = String::from_utf8(running.get("/metrics").body).unwrap();
    assert!(text.ends_with("# EOF\n") && text.contains("model_name=\"model\""));
    // What the docs speak of is there, and what the dashboard asks for.
    let docs = std::fs::read_to_string(repository("docs/serving.md")).unwrap();
    let missing: Vec<_> = metrics_in(&docs).filter(|name| !text.contains(*name)).collect();
    assert!(missing.is_empty(), "{missing:?}");
    let dashboard = std::fs::read(repository("docs/grafana.json")).unwrap();
    let mut queries = Vec::new();
    queries_in(&serde_json::from_slice(&dashboard).unwrap(), &mut queries);
    assert!(queries.len() > 10);
    for query in queries {
        for name in metrics_in(&query) {
            let sample = format!("{name}{{");
            let labels = labels_in(&query).map(|label| format!("{label}=\""));
            let has =
                |line: &str| line.starts_with(&sample) && labels.clone().all(|label| line.contains(&label));
            assert!(text.lines().any(has), "nothing answers to {name} in {query}");
        }
    }
}

/// Names of metrics in a text.
fn metrics_in(text: &str) -> impl Iterator<Item = &str> {
    let of_name = |one: char| one.is_ascii_lowercase() || one.is_ascii_digit() || one == '_' || one == ':';
    let words = text.split(move |one: char| !of_name(one));
    words.filter(|word| {
        ["vllm:", "minisgl:"].iter().any(|prefix| word.len() > prefix.len() && word.starts_with(prefix))
    })
}

/// The queries of a dashboard's panels.
fn queries_in(value: &Value, queries: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            queries.extend(fields.get("expr").map(|query| query.as_str().unwrap().to_owned()));
            fields.values().for_each(|value| queries_in(value, queries));
        }
        Value::Array(values) => values.iter().for_each(|value| queries_in(value, queries)),
        _ => {}
    }
}

/// The labels that a query's metrics must have: `{label="…"}`, `by (label, …)`.
fn labels_in(query: &str) -> impl Iterator<Item = &str> + Clone {
    let groups = query.split("by (").skip(1).filter_map(|rest| rest.split(')').next());
    let filters = query.split('{').skip(1).filter_map(|rest| rest.split('}').next());
    let filters =
        filters.flat_map(|filters| filters.split(',')).filter_map(|filter| filter.split('=').next());
    groups.flat_map(|labels| labels.split(',')).chain(filters).map(str::trim)
}

#[test]
fn text_becomes_tokens_and_tokens_become_text() {
    let running = Running::tiny(settings());
    let text = "Once upon a time, in Zürich";
    let tokens = running.post("/tokenize", &json!({"prompt": text, "return_token_strs": true})).json();
    let ids = tokens["tokens"].as_array().unwrap();
    assert_eq!(
        (&tokens["count"], tokens["token_strs"].as_array().unwrap().len()),
        (&json!(ids.len()), ids.len())
    );
    assert!(tokens["max_model_len"].as_u64().unwrap() > 0 && ids.len() > 4, "{tokens}");
    assert_eq!(running.post("/detokenize", &json!({"tokens": ids})).json()["prompt"], text);
    // A conversation's tokens are those that an answer counts as its prompt.
    let conversation = running.post("/tokenize", &json!({"messages": messages()})).json();
    let answer = running.post(CHAT, &json!({"messages": messages(), "max_tokens": 1})).json();
    assert_eq!(conversation["count"], answer["usage"]["prompt_tokens"]);
}

#[test]
fn what_is_no_text_and_what_are_no_tokens_is_refused_by_name() {
    let running = Running::tiny(settings());
    for (path, body, name) in [
        ("/tokenize", json!({}), "prompt"),
        ("/tokenize", json!({"prompt": ["Once", "upon"]}), "prompt"),
        ("/tokenize", json!({"prompt": "Once", "add_everything": true}), "add_everything"),
        ("/detokenize", json!({}), "tokens"),
        ("/detokenize", json!({"tokens": [-1]}), "tokens"),
        ("/detokenize", json!({"tokens": "Once"}), "tokens"),
    ] {
        let answer = running.post(path, &body);
        let (status, error) = (answer.status, answer.json());
        let message = error["error"]["message"].as_str().unwrap_or_default();
        assert!(status == 400 && message.contains(name), "{path} {body}: {status} {error}");
    }
}
