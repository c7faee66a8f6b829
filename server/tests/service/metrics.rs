//! What the service counts and times, as the docs and the dashboard name it.

use minisgl::Text;
use minisgl::simulated::Control;
use serde_json::{Value, json};

use crate::TEXT;
use crate::common::{Running, repository, settings};

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
