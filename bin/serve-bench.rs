//! Load on a service with OpenAI's API: `serve-bench --url http://127.0.0.1:1919 --concurrency 256`.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use minisgl::progress::{Progress, Stderr, Unit};
use minisgl::report::{Output, write_json};
use minisgl::workload::{self, Lengths, Workload};
use minisgl::{Cause, JsonObject, ModelSource, Prompt, Text, from_command_line, positive};
use minisgl_client::bench::arrivals::Arrivals;
use minisgl_client::bench::load::{Flow, Target};
use minisgl_client::bench::prompt::{Api, Manner};
use minisgl_client::bench::report::{Goals, Report};
use minisgl_client::bench::source::Source;
use minisgl_client::bench::sweep::Highest;
use minisgl_client::bench::{Pace, Plan};
use minisgl_client::endpoint::Endpoint;
use minisgl_client::service::Service;
use signal_hook::consts::SIGINT;
use signal_hook::flag;

/// The exit status of a program that Ctrl-C ends.
const INTERRUPTED: u8 = 128 + SIGINT as u8;

/// puts load on a service with OpenAI's API and reports the latencies that its clients see (docs/clients.md defines them);
/// the exit status is 1 if a request failed; Ctrl-C ends it with what was seen so far
#[derive(argh::FromArgs)]
struct Flags {
    /// the service's address (default http://127.0.0.1:1919)
    #[argh(option, default = "String::from(\"http://127.0.0.1:1919\")")]
    url: String,
    /// which endpoint: completions (default; prompts are token ids) or chat (prompts are common words, a token each)
    #[argh(option, default = "Api::default()")]
    api: Api,
    /// the model's name (default: the first that the service lists)
    #[argh(option)]
    model: Option<String>,
    /// the service's key; better in the variable OPENAI_API_KEY, which other users can't see
    #[argh(option)]
    api_key: Option<String>,
    /// of the random prompts, lengths and times; request i draws its tokens with seed + i (default 0)
    #[argh(option, default = "0")]
    seed: u64,
    /// requests (default 256; of a file all)
    #[argh(option)]
    n: Option<usize>,
    /// random numbers: pcg (default), or minisgl, those of mini-sglang's benchmark
    #[argh(option)]
    workload: Option<workload::Source>,
    /// prompt lengths, both ends included (default 100..1024)
    #[argh(option)]
    input_len: Option<Lengths>,
    /// output lengths, both ends included (default 100..1024)
    #[argh(option)]
    output_len: Option<Lengths>,
    /// token ids are taken modulo this: the model's vocabulary, where it is smaller than 10001
    #[argh(option, default = "u32::MAX")]
    vocab: u32,
    /// run the requests of this file instead: ShareGPT JSON, or the lines of a trace (Mooncake's or Qwen's)
    #[argh(option)]
    requests: Option<PathBuf>,
    /// the model whose tokenizer counts the tokens of ShareGPT's answers, a directory or a name (default: the service's
    /// /tokenize counts)
    #[argh(option)]
    tokenizer: Option<String>,
    /// so many requests at once: the next goes out when one ends (default 256, where nothing else says when)
    #[argh(option)]
    concurrency: Option<usize>,
    /// so many requests a second, at random times (Poisson)
    #[argh(option)]
    rate: Option<f64>,
    /// multiply a trace's times by this: 0.5 is twice the load (default 1)
    #[argh(option)]
    time_scale: Option<f64>,
    /// search the highest rate at which the goals hold, LOW..HIGH requests a second; each rate runs all requests
    #[argh(option)]
    sweep: Option<String>,
    /// goal: 99 of 100 requests have their first token within so many ms
    #[argh(option)]
    goal_ttft: Option<f64>,
    /// goal: 99 of 100 tokens come within so many ms of the one before
    #[argh(option)]
    goal_itl: Option<f64>,
    /// goal: 99 of 100 requests end within so many ms
    #[argh(option)]
    goal_e2e: Option<f64>,
    /// run so many requests before the clock starts (default 0)
    #[argh(option, default = "0")]
    warmup: usize,
    /// how freely tokens are drawn (default 0.6, as in offline-bench)
    #[argh(option, default = "0.6")]
    temperature: f32,
    /// ask with fields of OpenAI's API alone, without ignore_eos and return_token_ids: outputs may then end early
    #[argh(switch)]
    standard_fields: bool,
    /// further fields of every request, a JSON object
    #[argh(option)]
    extra_body: Option<String>,
    /// give a request up when nothing has come for so many seconds (default 300)
    #[argh(option, default = "300")]
    timeout: u64,
    /// the service's process, on this machine: its processor time is told, too
    #[argh(option)]
    pid: Option<u32>,
    /// write the report to this file, for machines
    #[argh(option)]
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    let flags: Flags = from_command_line();
    let stderr = Stderr::open();
    stderr.log();
    let code = serve_bench(&flags, &stderr).unwrap_or_else(|error| {
        stderr.say(format!("serve-bench: {error}"));
        ExitCode::FAILURE
    });
    stderr.finish();
    code
}

fn serve_bench(flags: &Flags, stderr: &Stderr) -> Result<ExitCode, Cause> {
    let endpoint: Endpoint = flags.url.parse()?;
    let key = flags.api_key.clone().or_else(|| std::env::var("OPENAI_API_KEY").ok());
    let extra = flags.extra()?;
    let goals = flags.goals()?;
    flags.check()?;
    let json = flags.json.as_deref().map(Output::create).transpose()?;
    let service = Service::new(endpoint.clone(), key.clone())?;
    let model = flags.model.clone().map_or_else(|| service.first_model(), Ok)?;
    let source = flags.source(&service, &model, stderr)?;
    let plan = Plan {
        pace: flags.pace(source.is_timed())?,
        source,
        goals,
        seed: flags.seed,
        warm_up: flags.warmup,
        process: flags.pid,
    };
    let manner = Manner {
        api: flags.api,
        model: model.clone(),
        temperature: flags.temperature,
        seed: flags.seed,
        vocab: flags.vocab,
        standard_fields: flags.standard_fields,
        extra,
    };
    let target = Target::new(endpoint.clone(), key.as_deref(), manner, Duration::from_secs(flags.timeout))?;
    // A second one ends the program at once.
    let stopped = Arc::new(AtomicBool::new(false));
    flag::register_conditional_shutdown(SIGINT, INTERRUPTED.into(), Arc::clone(&stopped))?;
    flag::register(SIGINT, Arc::clone(&stopped))?;
    let progress = Arc::new(Mutex::new(Progress { unit: Unit::Tokens, ..Progress::default() }));
    let seen = Arc::clone(&progress);
    let shown = stderr.show(move || seen.lock().unwrap_or_else(PoisonError::into_inner).clone());
    let ran = plan.run(&target, &mut io::stdout(), &mut |recorder| {
        let mut now = progress.lock().unwrap_or_else(PoisonError::into_inner);
        now.done = recorder.tokens();
        now.output_tokens = now.done;
        (now.finished, now.failed) = recorder.ended();
        now.running = recorder.open() as u32;
        if stopped.load(Ordering::Relaxed) { Flow::Stop } else { Flow::GoOn }
    });
    drop(shown);
    let (runs, found) = ran?;
    let failed = runs.iter().any(|run| run.loaded.record.failed > 0);
    if let Some(json) = json {
        let report = Report {
            program: "serve-bench",
            version: env!("CARGO_PKG_VERSION"),
            command: std::env::args().filter(|word| Some(word) != flags.api_key.as_ref()).collect(),
            unix_time: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()),
            url: endpoint.to_string(),
            model,
            api: flags.api,
            goals,
            runs,
            highest_rate: match found {
                Some(Highest::At(rate) | Highest::AtLeast(rate)) => Some(rate),
                _ => None,
            },
        };
        json.write(|file| write_json(&report, file))?;
    }
    Ok(match (stopped.load(Ordering::Relaxed), failed) {
        (true, _) => ExitCode::from(INTERRUPTED),
        (false, true) => ExitCode::FAILURE,
        (false, false) => ExitCode::SUCCESS,
    })
}

impl Flags {
    /// Finds numbers that can't hold.
    fn check(&self) -> Result<(), Cause> {
        if self.n == Some(0) || self.concurrency == Some(0) || self.vocab == 0 || self.timeout == 0 {
            return Err("--n, --concurrency, --vocab and --timeout must be at least 1".into());
        }
        for (flag, value) in [("--rate", self.rate), ("--time-scale", self.time_scale)] {
            positive(flag, value)?;
        }
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return Err(format!("--temperature is {}; it must be 0 or above", self.temperature).into());
        }
        Ok(())
    }

    fn extra(&self) -> Result<JsonObject, Cause> {
        let Some(text) = &self.extra_body else { return Ok(JsonObject::new()) };
        let fields = serde_json::from_str(text);
        fields.map_err(|error| {
            format!("--extra-body is no JSON object: {error}; give one like '{{\"top_k\": 1}}'").into()
        })
    }

    fn goals(&self) -> Result<Goals, Cause> {
        Ok(Goals {
            ttft_ms: positive("--goal-ttft", self.goal_ttft)?,
            itl_ms: positive("--goal-itl", self.goal_itl)?,
            e2e_ms: positive("--goal-e2e", self.goal_e2e)?,
        })
    }

    fn source(&self, service: &Service, model: &str, stderr: &Stderr) -> Result<Source, Cause> {
        let lengths = |given: &Option<Lengths>| given.clone().unwrap_or(Lengths::BENCHMARK);
        let Some(path) = &self.requests else {
            return Ok(Source::Drawn(Workload {
                source: self.workload.unwrap_or_default(),
                seed: self.seed,
                requests: self.n.unwrap_or(256),
                input: lengths(&self.input_len),
                output: lengths(&self.output_len),
            }));
        };
        if self.workload.is_some() || self.input_len.is_some() || self.output_len.is_some() {
            return Err("--workload, --input-len and --output-len are of random requests; leave them or --requests out".into());
        }
        let most = self.n.unwrap_or(usize::MAX);
        match &self.tokenizer {
            Some(name) => {
                let source = ModelSource::find(name, None, Some(stderr))?;
                let folder =
                    source.folder().ok_or("--tokenizer names a preset, which has none; give a checkpoint")?;
                let text = Text::open(folder)?;
                let mut count = |answer: &str| Ok(text.encode(Prompt::Text(answer.to_owned()))?.len() as u64);
                Ok(Source::open(path, most, &mut count)?)
            }
            None => Ok(Source::open(path, most, &mut |answer| {
                service.count_tokens(model, answer).map_err(|error| {
                    format!("{error}; or give the model's tokenizer with --tokenizer").into()
                })
            })?),
        }
    }

    fn pace(&self, timed: bool) -> Result<Pace, Cause> {
        let once = |arrivals| Ok(Pace::Once(arrivals));
        match (&self.sweep, self.rate, self.concurrency, self.time_scale) {
            (Some(range), None, None, None) => self.range(range),
            (None, Some(rate), None, None) => once(Arrivals::Poisson(rate)),
            (None, None, Some(open), None) => once(Arrivals::Closed(open)),
            (None, None, None, scale) if timed => once(Arrivals::Timed(scale.unwrap_or(1.0))),
            (None, None, None, None) => once(Arrivals::Closed(256)),
            (None, None, None, Some(_)) => {
                Err("--time-scale is of a trace's times, and these requests have none; give --rate or --concurrency".into())
            }
            _ => Err("--concurrency, --rate, --time-scale and --sweep each say when requests go out; give one".into()),
        }
    }

    /// The rates that the sweep searches between.
    fn range(&self, text: &str) -> Result<Pace, Cause> {
        if self.goals()?.is_empty() {
            return Err("--sweep looks for the highest rate at which goals hold; give --goal-ttft, --goal-itl or --goal-e2e".into());
        }
        let rates =
            text.split_once("..").and_then(|(low, high)| Some((low.parse().ok()?, high.parse().ok()?)));
        match rates {
            Some((low, high)) if low > 0.0 && low <= high && f64::is_finite(high) => {
                Ok(Pace::Sweep(low, high))
            }
            _ => Err(format!("--sweep {text} is no range of rates; write 1..64").into()),
        }
    }
}
