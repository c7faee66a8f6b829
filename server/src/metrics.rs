//! What is counted and timed, for Prometheus. What means the same as in vLLM has its name, so that dashboards and
//! autoscalers made for it work; what only we have begins with `minisgl:`.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use minisgl::{Completion, FinishReason, Load, Stats, StepTiming};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::stages::Stages;

/// Content type of what [`Metrics::encode`] gives.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Why an output ends. All are there from the start, at zero: a rate is of what a series grows by, so that what comes with
/// its first value (all that a failed engine lost) would not be seen.
const OUTCOMES: [&str; 6] = ["stop", "length", "abort", "rejected", "failed", "lost"];

/// Histogram of seconds, over six decades from so many microseconds. Prometheus draws a straight line across a bucket to find
/// a quantile: with each bound at most 5/3 of the one before, it is never further off than that.
fn histogram(least_us: u32) -> Histogram {
    let decades = (0..6).map(|decade| f64::from(least_us) * 10_f64.powi(decade));
    // Whole numbers until they are divided, so that bounds are decimals as short as they look.
    Histogram::new(decades.flat_map(|us| [10, 15, 20, 30, 50, 75].map(|tenths| us * f64::from(tenths) / 1e7)))
}

/// Of a step, and of a token that follows another: a small model's take less than a millisecond on a GPU.
fn token_histogram() -> Histogram {
    histogram(100)
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Outcome {
    finished_reason: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct StepKind {
    kind: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Answered {
    path: String,
    status: u16,
}

/// All of them.
pub struct Metrics {
    registry: Registry,
    running: Gauge,
    waiting: Gauge,
    kv_usage: Gauge<f64, AtomicU64>,
    preemptions: Counter,
    drafted: Counter,
    accepted: Counter,
    prompt_tokens: Counter,
    prefix_queries: Counter,
    prefix_hits: Counter,
    generation_tokens: Counter,
    embeddings: Counter,
    outcomes: Family<Outcome, Counter>,
    encoding: Histogram,
    queueing: Histogram,
    prefilling: Histogram,
    sending: Histogram,
    first_token: Histogram,
    between_tokens: Histogram,
    end_to_end: Histogram,
    steps: Family<StepKind, Histogram>,
    answers: Family<Answered, Counter>,
}

impl Metrics {
    /// All at zero, labelled with the model's name.
    pub fn new(model: &str) -> Self {
        let mut registry = Registry::default();
        let metrics = registry.sub_registry_with_label(("model_name".into(), model.to_owned().into()));
        let running = Gauge::default();
        metrics.register("vllm:num_requests_running", "Requests in the batch", running.clone());
        let waiting = Gauge::default();
        metrics.register(
            "vllm:num_requests_waiting",
            "Requests that wait for a place in it",
            waiting.clone(),
        );
        let kv_usage = Gauge::default();
        metrics.register(
            "vllm:kv_cache_usage_perc",
            "Share of the KV pages in use, 1 being all",
            kv_usage.clone(),
        );
        let mut counter = |name, help| {
            let counter = Counter::default();
            metrics.register(name, help, counter.clone());
            counter
        };
        let preemptions =
            counter("vllm:num_preemptions", "Requests that gave their KV pages back and ran again later");
        let drafted = counter("vllm:spec_decode_num_draft_tokens", "Tokens that were drafted (--speculate)");
        let accepted = counter("vllm:spec_decode_num_accepted_tokens", "Drafts that were what was drawn");
        let prompt_tokens = counter("vllm:prompt_tokens", "Tokens of prompts");
        let prefix_queries =
            counter("vllm:prefix_cache_queries", "Tokens of prompts that were looked up in the prefix cache");
        let prefix_hits = counter("vllm:prefix_cache_hits", "Tokens of prompts that the prefix cache held");
        let generation_tokens = counter("vllm:generation_tokens", "Tokens drawn");
        let embeddings = counter("minisgl:embeddings", "Embeddings of prompts");
        let outcomes = Family::<Outcome, Counter>::default();
        for finished_reason in OUTCOMES {
            drop(outcomes.get_or_create(&Outcome { finished_reason }));
        }
        let help = "Requests that ended, by why: stop, length, abort, rejected, failed or lost";
        metrics.register("vllm:request_success", help, outcomes.clone());
        let mut stage = |name, help| {
            let stage = histogram(1_000);
            metrics.register(name, help, stage.clone());
            stage
        };
        let encoding = stage("minisgl:request_encode_time_seconds", "Seconds until a prompt was token ids");
        let queueing =
            stage("vllm:request_queue_time_seconds", "Seconds from there until the engine had a place");
        let prefilling =
            stage("vllm:request_prefill_time_seconds", "Seconds from there until there was a first token");
        let sending = stage(
            "minisgl:first_token_send_time_seconds",
            "Seconds from there until the connection took it, of streams",
        );
        let first_token = histogram(1_000);
        let help = "Seconds from a request to its first token";
        metrics.register("vllm:time_to_first_token_seconds", help, first_token.clone());
        let between_tokens = token_histogram();
        let help = "Seconds from one token of a request to the next";
        metrics.register("vllm:inter_token_latency_seconds", help, between_tokens.clone());
        let end_to_end = histogram(10_000);
        let help = "Seconds from a request to its end";
        metrics.register("vllm:e2e_request_latency_seconds", help, end_to_end.clone());
        let steps = Family::new_with_constructor(token_histogram as fn() -> Histogram);
        metrics.register("minisgl:step_seconds", "Device time of a step, by kind", steps.clone());
        let answers = Family::default();
        let help = "HTTP requests answered, by path and status";
        metrics.register("minisgl:http_requests", help, answers.clone());
        Metrics {
            registry,
            running,
            waiting,
            kv_usage,
            preemptions,
            drafted,
            accepted,
            prompt_tokens,
            prefix_queries,
            prefix_hits,
            generation_tokens,
            embeddings,
            outcomes,
            encoding,
            queueing,
            prefilling,
            sending,
            first_token,
            between_tokens,
            end_to_end,
            steps,
            answers,
        }
    }

    /// A step completed.
    pub fn step(&self, step: &StepTiming) {
        let kind = match (step.shape.decode_rows, step.shape.prefill_rows) {
            (_, 0) => "decode",
            (0, _) => "prefill",
            _ => "mixed",
        };
        self.steps.get_or_create(&StepKind { kind }).observe(f64::from(step.gpu_ms) / 1e3);
    }

    /// A request was answered, at least in part.
    pub fn answered(&self, path: &str, status: u16) {
        self.answers.get_or_create(&Answered { path: path.to_owned(), status }).inc();
    }

    /// What the engine is at; `open` counts requests that have not ended.
    pub fn engine(&self, stats: &Stats, load: &Load, open: usize, pages: u32) {
        self.running.set(load.running.into());
        self.waiting.set((open as i64 - i64::from(load.running)).max(0));
        self.kv_usage.set(f64::from(load.pages_used) / f64::from(pages.max(1)));
        // What an engine counts begins anew with the next one, as counters may.
        self.preemptions.inner().store(stats.retractions, Ordering::Relaxed);
        self.drafted.inner().store(stats.drafted, Ordering::Relaxed);
        self.accepted.inner().store(stats.accepted, Ordering::Relaxed);
    }

    /// All of them as Prometheus reads them.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        // Writing to memory can't fail.
        let written = encode(&mut text, &self.registry);
        debug_assert!(written.is_ok());
        text
    }

    fn ended(&self, outcome: &'static str) {
        self.outcomes.get_or_create(&Outcome { finished_reason: outcome }).inc();
    }
}

/// Times one output, from when it was asked for.
pub struct Clock {
    asked: Instant,
    stages: Stages,
    /// When the engine took it in.
    started: Option<Instant>,
    last: Option<Instant>,
    ended: bool,
}

impl Clock {
    /// It is asked for now.
    pub fn start() -> Self {
        Clock { asked: Instant::now(), stages: Stages::default(), started: None, last: None, ended: false }
    }

    /// The engine took it in.
    pub fn started(&mut self, encoding: Duration, queueing: Duration, at: Instant, metrics: &Metrics) {
        self.stages = Stages { encoding, queueing, ..self.stages };
        self.started = Some(at);
        metrics.encoding.observe(encoding.as_secs_f64());
        metrics.queueing.observe(queueing.as_secs_f64());
    }

    /// Its next token came at `at`, and is taken now by whoever sends it, or keeps it. Gives the stages with the first.
    pub fn token(&mut self, at: Instant, is_sent: bool, metrics: &Metrics) -> Option<Stages> {
        let is_first = self.last.is_none();
        if is_first && let Some(started) = self.started {
            self.stages.prefilling = at.saturating_duration_since(started);
            metrics.prefilling.observe(self.stages.prefilling.as_secs_f64());
            self.stages.sending = is_sent.then(|| at.elapsed());
            self.stages.sending.iter().for_each(|time| metrics.sending.observe(time.as_secs_f64()));
        }
        let seconds = |since: Instant| at.saturating_duration_since(since).as_secs_f64();
        match self.last.replace(at) {
            None => metrics.first_token.observe(seconds(self.asked)),
            Some(last) => metrics.between_tokens.observe(seconds(last)),
        }
        metrics.generation_tokens.inc();
        is_first.then_some(self.stages)
    }

    /// It ended.
    pub fn finished(&mut self, completion: &Completion, metrics: &Metrics) {
        self.ended = true;
        metrics.prompt_tokens.inc_by(completion.prompt_tokens.into());
        metrics.prefix_queries.inc_by(completion.prompt_tokens.into());
        metrics.prefix_hits.inc_by(completion.cached_tokens.into());
        metrics.embeddings.inc_by(completion.embedding.is_some().into());
        metrics.end_to_end.observe(self.asked.elapsed().as_secs_f64());
        metrics.ended(match completion.finish_reason {
            FinishReason::Eos | FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Abort => "abort",
            FinishReason::Rejected => "rejected",
            FinishReason::Failed => "failed",
        });
    }

    /// Nothing more will be heard of it: it got lost with the engine, or else its client went away.
    pub fn abandoned(&mut self, lost: bool, metrics: &Metrics) {
        if !std::mem::replace(&mut self.ended, true) {
            metrics.ended(if lost { "lost" } else { "abort" });
        }
    }
}
