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
    let mut queries = Vec::new();
    queries_in(&dashboard(), &mut queries);
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

#[test]
fn a_rate_sees_the_first_output_that_ends_whatever_ended_it() {
    let (running, _) = Running::simulated(settings(), Control::default(), Text::default());
    let text = String::from_utf8(running.get("/metrics").body).unwrap();
    for reason in ["stop", "length", "abort", "rejected", "failed", "lost"] {
        let sample =
            format!("vllm:request_success_total{{model_name=\"model\",finished_reason=\"{reason}\"}} 0");
        assert!(text.lines().any(|line| line == sample), "{sample}");
    }
}

#[test]
fn a_quantile_that_prometheus_draws_is_near() {
    let (running, _) = Running::simulated(settings(), Control::default(), Text::default());
    assert_eq!(running.post(TEXT, &json!({"prompt": [1], "max_tokens": 2})).status, 200);
    running.wait("a step", || running.metric("minisgl:step_seconds_count", "decode") >= 1.0);
    let text = String::from_utf8(running.get("/metrics").body).unwrap();
    // What a small model takes on a GPU, and what a person would wait for, lie between the first bound and the last.
    for (name, least, most) in [
        ("minisgl:step_seconds", 0.0002, 1.0),
        ("vllm:inter_token_latency_seconds", 0.0002, 10.0),
        ("vllm:time_to_first_token_seconds", 0.002, 160.0),
        ("vllm:request_queue_time_seconds", 0.002, 160.0),
        ("vllm:e2e_request_latency_seconds", 0.02, 1920.0),
    ] {
        let buckets = text.lines().filter(|line| line.starts_with(&format!("{name}_bucket{{")));
        let bounds = buckets.filter_map(|line| line.split("le=\"").nth(1)?.split('"').next()?.parse().ok());
        let mut bounds: Vec<f64> = bounds.filter(|bound: &f64| bound.is_finite()).collect();
        bounds.sort_by(f64::total_cmp);
        assert!(bounds[0] <= least && bounds[bounds.len() - 1] >= most, "{name}: {bounds:?}");
        assert!(bounds.windows(2).all(|pair| pair[1] <= 1.7 * pair[0]), "{name}: {bounds:?}");
    }
}

#[test]
fn the_dashboard_adds_replicas_up_or_names_them() {
    let dashboard = dashboard();
    let panels = dashboard["panels"].as_array().unwrap().iter();
    for target in panels.flat_map(|panel| panel["targets"].as_array().unwrap()) {
        let (query, legend) = (target["expr"].as_str().unwrap(), target["legendFormat"].as_str().unwrap());
        let named: Vec<_> =
            legend.split("{{").skip(1).filter_map(|rest| Some(rest.split_once("}}")?.0.trim())).collect();
        let (selectors, sums) = (query.matches('{').count(), query.matches("sum").count());
        let sums = sums - query.matches("_sum{").count();
        if named != ["instance"] {
            assert_eq!(selectors, sums, "two replicas are two lines of one name: {query}");
            assert!(
                named.iter().all(|label| labels_in(query).any(|kept| kept == *label)),
                "{legend}: {query}"
            );
        }
    }
}

fn dashboard() -> Value {
    serde_json::from_slice(&std::fs::read(repository("docs/grafana.json")).unwrap()).unwrap()
}

/// Names of metrics in a text.
fn metrics_in(text: &str) -> impl Iterator<Item = &str> {
    let of_name = |one: char| one.is_ascii_lowercase() || one.is_ascii_digit() || one == '_' || one == ':';
    let words = text.split(move |one: char| !of_name(one));
    words.filter(|word| {
        ["vllm:", "minisgl:"].iter().any(|prefix| word.len() > prefix.len() && word.starts_with(prefix))
    })
}

/// The queries of a dashboard's panels and variables.
fn queries_in(value: &Value, queries: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            let query = ["expr", "query"].iter().filter_map(|field| fields.get(*field)?.as_str());
            queries.extend(query.map(str::to_owned));
            fields.values().for_each(|value| queries_in(value, queries));
        }
        Value::Array(values) => values.iter().for_each(|value| queries_in(value, queries)),
        _ => {}
    }
}

/// The labels that a query's metrics must have: `{label="…"}`, `by (label, …)`, `label_values(…, label)`.
fn labels_in(query: &str) -> impl Iterator<Item = &str> + Clone {
    let groups = query.split("by (").skip(1).filter_map(|rest| rest.split(')').next());
    let filters = query.split('{').skip(1).filter_map(|rest| rest.split('}').next());
    let filters =
        filters.flat_map(|filters| filters.split(',')).filter_map(|filter| filter.split('=').next());
    let listed =
        query.split("label_values(").skip(1).filter_map(|rest| rest.split(')').next()?.rsplit(',').next());
    groups.flat_map(|labels| labels.split(',')).chain(filters).chain(listed).map(str::trim)
}
