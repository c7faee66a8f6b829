//! A device that is not there: its steps take the time of the file, and all around them is as ever.

mod common;

use common::{Scratch, greedy, greedy_request};
use minisgl::simulated::SimulatedDevice;
use minisgl::{Error, GenerateRequest, Grammar, Llm, Options, RequestError, StreamEvent, TokenRules};
use serde_json::{Value, json};

/// Steps of decode rows take 4 ms, others 6 ms and 0.1 ms a token.
fn file() -> Value {
    let line = |step: f64, token: f64| json!({"step": step, "token": token});
    json!({
        "name": "test", "pages": 40, "decode_ms": line(4.0, 0.0), "mixed_ms": line(6.0, 0.1), "attention_ms": line(0.0, 0.0),
        "context_ms": 0.0, "further_row_ms": 0.0, "sample_ms": 0.0, "attention_least_ms": 0.0,
    })
}

fn open(file: &Value) -> Result<SimulatedDevice, Error> {
    let scratch = Scratch::new();
    SimulatedDevice::open(&scratch.write("device.json", file.to_string()))
}

fn llm() -> Llm {
    let simulate = Some(open(&file()).unwrap());
    let options = Options { simulate, max_running: Some(8), max_seq_len: Some(256), ..Options::default() };
    Llm::builder(Scratch::with_text().path().display().to_string()).options(options).build().unwrap()
}

#[test]
fn steps_take_the_time_of_the_file_and_pages_are_kept_as_ever() {
    let mut llm = llm();
    // More than the pages hold at once.
    let requests: Vec<_> = (0..24).map(|i| greedy_request(&vec![i; 100], 60)).collect();
    let (mut steps, mut tokens) = (Vec::new(), 0);
    let flow = |event: StreamEvent<'_>| {
        match event {
            StreamEvent::Step(step) => steps.push(step),
            StreamEvent::Token { .. } => tokens += 1,
            StreamEvent::Finished { .. } => {}
        }
        minisgl::Flow::Continue
    };
    llm.generate_stream(requests, flow).unwrap();
    assert_eq!(tokens, 24 * 60);
    for step in &steps {
        let expected = match step.shape.is_decode() {
            true => 4.0,
            false => 6.0 + 0.1 * step.shape.tokens as f32,
        };
        assert!((step.gpu_ms - expected).abs() < 1e-3, "{step:?} for {expected} ms");
    }
    // One behind the other, none before the one before it has ended.
    for pair in steps.windows(2) {
        assert!(pair[1].start_ms - pair[0].start_ms > f64::from(pair[0].gpu_ms) - 0.01, "{pair:?}");
    }
    llm.check();
}

#[test]
fn what_is_drawn_follows_a_grammar_and_allowed_tokens_where_there_are_any() {
    let texts = ["north", "south"].map(str::to_owned).to_vec();
    let request =
        GenerateRequest::tokens([1, 2]).sampling(greedy(30)).grammar(Grammar::Choice(texts.clone()));
    let completion = llm().generate(&[request]).unwrap().remove(0);
    assert!(texts.contains(&completion.text.unwrap()), "{:?}", completion.token_ids);
    let allowing = |ids: &[u32]| TokenRules { allowed_token_ids: Some(ids.into()), ..TokenRules::default() };
    let request = |ids| GenerateRequest::tokens([1, 2]).sampling(greedy(30)).rules(allowing(ids));
    let completions = llm().generate(&[request(&[7, 9]), request(&[8])]).unwrap();
    assert!(completions[0].token_ids.iter().all(|id| [7, 9].contains(id)), "{:?}", completions[0]);
    assert_eq!(completions[1].token_ids, [8; 30]);
    let digit = llm().encode("7").unwrap();
    let letters = request(&digit).grammar(Grammar::Regex("[a-z]+".to_owned()));
    assert_eq!(llm().generate(&[letters]).unwrap()[0].error, Some(RequestError::NoTokenLeft));
}

#[test]
fn a_file_that_is_no_device_is_named_with_what_is_wrong() {
    let with = |name: &str, value: Value| {
        let mut file = file();
        file[name] = value;
        open(&file).unwrap_err().to_string()
    };
    for (said, expected) in [
        (with("context_ms", json!(-1.0)), "-1 is no time"),
        (with("decode_ms", json!({"step": 1e30, "token": 0})), "is no time"),
        (with("decode_ms", json!(4)), "device.json"),
        (with("speed", json!(1)), "unknown field `speed`"),
        (SimulatedDevice::open("/nowhere.json".as_ref()).unwrap_err().to_string(), "/nowhere.json"),
        (SimulatedDevice::open("/dev/zero".as_ref()).unwrap_err().to_string(), "more than 1048576 bytes"),
    ] {
        assert!(said.contains(expected), "{said}");
    }
    SimulatedDevice::open("examples/h200-qwen3-0.6b.json".as_ref()).unwrap();
}
