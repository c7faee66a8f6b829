//! What requests that are held to a grammar cost those beside them: 156 free requests run alone, beside 100 others that are free too,
//! and beside the same 100 held to a JSON schema.
//!
//! ```sh
//! cargo run --release --example beside -- --model DIR --max-running 256 --max-seq-len 1024
//! ```
//!
//! The free 100 write as many tokens each as the held ones do, so both have the same rows in their steps: what the 156 lose to
//! the first is what rows cost, what they lose to the second beyond it is what the schema costs. All three runs are taken in turn.

use std::error::Error;
use std::fmt;
use std::time::Instant;

use minisgl::progress::Stderr;
use minisgl::telemetry::{LatencyReport, Recorder};
use minisgl::{
    Completion, FinishReason, GenerateRequest, Grammar, Llm, SamplingParams, SessionEvent, SessionOptions,
    StepTiming, from_command_line,
};
use serde_json::{Value, json};

minisgl::with_shared_flags! {
    /// Measures what requests with a JSON schema cost the requests beside them.
    struct Flags {
        /// checkpoint directory, or a model's name; it needs a tokenizer
        #[argh(option)]
        model: String,
        /// requests that are measured (default 156)
        #[argh(option, default = "156")]
        n: usize,
        /// requests beside them (default 100)
        #[argh(option, default = "100")]
        others: usize,
        /// tokens of a prompt (default 200)
        #[argh(option, default = "200")]
        input_len: u32,
        /// tokens of an output; the others' may end before (default 512)
        #[argh(option, default = "512")]
        output_len: u32,
        /// how often all three are run (default 3)
        #[argh(option, default = "3")]
        runs: usize,
    }
}

/// Records of a name and an age. Random weights write much white space between, so that outputs end after some 300 tokens, each elsewhere.
fn schema() -> Value {
    json!({
        "type": "array", "minItems": 2, "maxItems": 12,
        "items": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "pattern": "^[a-z]{3,12}$"},
                "age": {"type": "integer", "minimum": 0, "maximum": 120}
            },
            "required": ["name", "age"],
            "additionalProperties": false
        }
    })
}

/// What was seen of the measured requests, while any of them ran.
struct Seen {
    tokens_per_s: f64,
    between_tokens: LatencyReport,
    steps: Vec<StepTiming>,
    /// Of all requests, the measured ones first.
    completions: Vec<Completion>,
}

fn main() -> Result<(), Box<dyn Error>> {
    let flags: Flags = from_command_line();
    if [flags.n, flags.runs].contains(&0) || flags.input_len == 0 || flags.output_len < 2 {
        return Err("--n, --runs and --input-len must be at least 1, --output-len at least 2".into());
    }
    let stderr = Stderr::open();
    let mut llm = flags.source(&flags.model, &stderr)?.builder().options(flags.engine_options()).build()?;
    stderr.say(llm.info().to_string());

    let alone: Vec<_> = (0..flags.n).map(|i| flags.request(i, llm.info().vocab)).collect();
    let schema = schema();
    let grammar = std::sync::Arc::new(Grammar::JsonSchema(schema.clone()));
    let held: Vec<_> = (flags.n..flags.n + flags.others)
        .map(|i| {
            let mut request = flags.request(i, llm.info().vocab).grammar(grammar.clone());
            request.sampling.ignore_eos = false;
            request
        })
        .collect();
    // Not timed: it says how long the held outputs are, and whether they are what they are held to.
    let first = run(&mut llm, flags.n, &[&alone[..], &held].concat())?;
    let outputs = &first.completions[flags.n..];
    check(outputs, &schema)?;
    let free: Vec<_> = (flags.n..)
        .zip(outputs)
        .map(|(i, output)| {
            let mut request = flags.request(i, llm.info().vocab);
            request.sampling.max_tokens = output.token_ids.len() as u32;
            request
        })
        .collect();
    let lengths: usize = outputs.iter().map(|output| output.token_ids.len()).sum();
    let ended = outputs.iter().filter(|output| output.finish_reason != FinishReason::Length).count();
    println!(
        "{} others of {:.0} tokens on average, {ended} of them ended by the schema; those are valid, the others begin as JSON does",
        flags.others,
        lengths as f64 / flags.others.max(1) as f64
    );

    println!(
        "{:<14}{:>12}{:>18}{:>24}{:>14}",
        "the others", "tokens/s", "ITL mean, p99 ms", "decode steps: rows, ms", "idle ms"
    );
    let mut rates = [const { Vec::new() }; 3];
    for _ in 0..flags.runs {
        let others: [(&str, &[GenerateRequest]); 3] = [("none", &[]), ("free", &free), ("held", &held)];
        for ((name, others), rates) in others.into_iter().zip(&mut rates) {
            let seen = run(&mut llm, flags.n, &[&alone[..], others].concat())?;
            println!("{name:<14}{seen}");
            rates.push(seen.tokens_per_s);
            let same = seen.completions.iter().zip(&first.completions[..flags.n]);
            if same.take(flags.n).any(|(one, other)| one.token_ids != other.token_ids) {
                return Err("a request's tokens depend on what runs beside it; please report this".into());
            }
        }
    }
    let [none, free, held] = rates.map(median);
    println!("medians: {none:.0}, {free:.0}, {held:.0} tokens/s; the tokens are the same in all");
    println!(
        "rows cost {:.1}%, the schema {:.1}% of what is left; together {:.1}%",
        100.0 * (1.0 - free / none),
        100.0 * (1.0 - held / free),
        100.0 * (1.0 - held / none)
    );
    Ok(())
}

impl Flags {
    /// One whose prompt begins like no other's.
    fn request(&self, number: usize, vocab: u32) -> GenerateRequest {
        let number = number as u32;
        let prompt = (0..self.input_len).map(|i| number.wrapping_mul(7919).wrapping_add(i * 104_729) % vocab);
        GenerateRequest::tokens(prompt.collect::<Vec<_>>()).sampling(SamplingParams {
            seed: u64::from(number),
            max_tokens: self.output_len,
            ignore_eos: true,
            ..self.sampling(SamplingParams { temperature: 1.0, ..SamplingParams::default() })
        })
    }
}

/// Runs requests, of which the first `measured` are measured from their first token to their last one.
fn run(llm: &mut Llm, measured: usize, requests: &[GenerateRequest]) -> Result<Seen, Box<dyn Error>> {
    llm.clear_prefix_cache();
    let options = SessionOptions {
        tokens: true,
        steps: true,
        capacity: Some(requests.len()),
        ..SessionOptions::default()
    };
    let (mut submitter, events) = llm.handle().session(options);
    let mut recorder = Recorder::new();
    let started = Instant::now();
    (0..measured as u64).for_each(|tag| recorder.submitted(tag, 1, started));
    submitter.submit_all((0..).zip(requests.iter().cloned()))?;
    drop(submitter);

    let mut completions: Vec<Option<Completion>> = vec![None; requests.len()];
    let (mut steps, mut open, mut tokens) = (Vec::new(), measured, 0);
    let mut span: Option<(Instant, Instant)> = None;
    for event in events {
        let event = event?;
        recorder.hear(&event);
        match event {
            SessionEvent::Token { tag, at, .. } if (tag as usize) < measured => {
                tokens += 1;
                span = Some((span.map_or(at, |(first, _)| first), at));
            }
            SessionEvent::Finished { tag, completion, .. } => {
                if let Some(error) = completion.error {
                    return Err(error.into());
                }
                open -= usize::from((tag as usize) < measured);
                completions[tag as usize] = Some(*completion);
            }
            SessionEvent::Step(step) if open > 0 => steps.push(step),
            SessionEvent::Started { .. } | SessionEvent::Token { .. } | SessionEvent::Step(_) => {}
        }
    }
    let (first, last) = span.ok_or("no token came")?;
    let seconds = last.duration_since(first).as_secs_f64();
    Ok(Seen {
        tokens_per_s: f64::from(tokens) / seconds,
        between_tokens: recorder.record(seconds, None).between_tokens_ms,
        steps,
        completions: completions.into_iter().flatten().collect(),
    })
}

/// Outputs are what the schema describes; those that `max_tokens` cut are at least the beginning of a JSON text.
fn check(outputs: &[Completion], schema: &Value) -> Result<(), Box<dyn Error>> {
    for output in outputs {
        let text = output.text.as_deref().unwrap_or_default();
        let is_right = match serde_json::from_str(text) {
            Ok(value) => jsonschema::is_valid(schema, &value),
            Err(error) => output.finish_reason == FinishReason::Length && error.is_eof(),
        };
        if !is_right {
            return Err(format!("{text:?} is not what the schema describes; please report this").into());
        }
    }
    Ok(())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let decode: Vec<_> = self.steps.iter().filter(|step| step.shape.is_decode()).collect();
        let mean = |of: fn(&StepTiming) -> f64| {
            decode.iter().map(|step| of(step)).sum::<f64>() / decode.len().max(1) as f64
        };
        let rows = mean(|step| f64::from(step.shape.decode_rows));
        let step_ms = mean(|step| f64::from(step.gpu_ms));
        let gap = |pair: &[StepTiming]| pair[1].start_ms - pair[0].start_ms - f64::from(pair[0].gpu_ms);
        let idle_ms: f64 = self.steps.windows(2).map(|pair| gap(pair).max(0.0)).sum();
        let LatencyReport { mean, p99, .. } = &self.between_tokens;
        write!(
            f,
            "{:>12.0}{:>18}{:>24}{idle_ms:>14.1}",
            self.tokens_per_s,
            format!("{mean:.2}, {p99:.2}"),
            format!("{rows:.0}, {step_ms:.2}")
        )
    }
}
