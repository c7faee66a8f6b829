//! What an answer says, whole and as a stream: outputs, echoes, log-probabilities.

use minisgl::sample_seed;
use serde_json::{Value, json};

use crate::common::{Running, messages, settings};
use crate::{CHAT, TEXT};

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
fn tokens_that_a_stop_text_cut_begin_at_the_texts_end_in_a_stream_too() {
    let running = Running::tiny(settings());
    let mut body =
        json!({"prompt": "Once upon a time", "max_tokens": 40, "seed": 3, "ignore_eos": true, "logprobs": 1});
    let drawn = running.post(TEXT, &body).json()["choices"][0].clone();
    let mut places: Vec<usize> = serde_json::from_value(drawn["logprobs"]["text_offset"].clone()).unwrap();
    places.dedup();
    // What some tokens say.
    let stop = drawn["text"].as_str().unwrap().chars().take(places[8]).skip(places[4]);
    let stop: String = stop.collect();
    body["stop"] = json!(stop);
    let whole = running.post(TEXT, &body).json()["choices"][0].clone();
    let end = whole["text"].as_str().unwrap().chars().count();
    let places = whole["logprobs"]["text_offset"].as_array().unwrap();
    assert!(places.iter().filter(|place| **place == end).count() > 2, "{whole}");
    let chunks: Vec<Value> = running.stream(TEXT, body).collect();
    for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        let streamed = chunks
            .iter()
            .flat_map(|chunk| chunk["choices"][0]["logprobs"][list].as_array().into_iter().flatten());
        assert_eq!(
            streamed.collect::<Vec<_>>(),
            whole["logprobs"][list].as_array().unwrap().iter().collect::<Vec<_>>(),
            "{list}"
        );
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
