//! The program `serve`: its flags, and what it does with them until it is told to end.

use std::env::VarError;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use hyper::header::HeaderValue;
use minisgl::openai::ModelName;
use minisgl::progress::Stderr;
use minisgl::simulated::SimulatedDevice;
use minisgl::{
    Cause, GenerationConfigChoice, Options, Policy, SamplingParams, ToolFormat, with_shared_flags,
};
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{Ended, Service, Settings};

/// Threads that serve connections at most; the engine has its own.
const WORKERS_MAX: usize = 8;
/// Texts that are tokenized at once for `/tokenize`, and the like; the engine has threads of its own for prompts.
const TOKENIZERS_MAX: usize = 16;
/// Without RUST_LOG: what went wrong, and a line a request.
const LOGGED: &str = "warn,access=info";

with_shared_flags! {
    /// serves a model with OpenAI's API, until it is told to end (SIGTERM, Ctrl-C)
    pub struct Flags {
        /// checkpoint directory, a name on the Hugging Face hub (OWNER/NAME), or a preset with dummy weights (tiny, …)
        #[argh(option)]
        model: String,
        /// a file with the times of a device's steps (docs/serving.md): no model is computed, and answers are nonsense that comes
        /// when that device's would
        #[argh(option)]
        simulate: Option<PathBuf>,
        /// the address to listen at (default 127.0.0.1: this machine alone; 0.0.0.0: everybody)
        #[argh(option, default = "IpAddr::from([127, 0, 0, 1])")]
        host: IpAddr,
        /// the port to listen at (default 1919; 0: any that is free)
        #[argh(option, default = "1919")]
        port: u16,
        /// the name by which requests call the model (default: as --model has it)
        #[argh(option)]
        served_model_name: Option<String>,
        /// a key that clients must present; better in a file or in the variable MINISGL_API_KEY, which other users can't see
        #[argh(option)]
        api_key: Vec<String>,
        /// a file of such keys, one a line
        #[argh(option)]
        api_key_file: Option<PathBuf>,
        /// let web pages of this origin use the service: scheme and host, or * for all; may be repeated
        #[argh(option)]
        cors_origin: Vec<String>,
        /// requests that may wait beside those that run; more get status 429 (default 1024)
        #[argh(option)]
        max_queued: Option<usize>,
        /// bytes of a request's body at most (default 8388608)
        #[argh(option)]
        max_body_bytes: Option<usize>,
        /// connections at once (default 8192)
        #[argh(option)]
        max_connections: Option<usize>,
        /// seconds that a request's header may take to come, or a connection idle (default 10)
        #[argh(option)]
        header_seconds: Option<u64>,
        /// seconds that a request's body may take to come (default 30)
        #[argh(option)]
        body_seconds: Option<u64>,
        /// seconds that a client may take nothing of its answer (default 60)
        #[argh(option)]
        write_seconds: Option<u64>,
        /// seconds that open requests get when the service is told to end (default 30)
        #[argh(option)]
        drain_seconds: Option<u64>,
        /// how often an engine that failed is built anew before the program ends (default 3)
        #[argh(option)]
        max_rebuilds: Option<u32>,
        /// how the model writes calls of tools: qwen3 or llama3 (default: as its chat template shows)
        #[argh(option)]
        tool_format: Option<ToolFormat>,
        /// tell what a model thinks between <think> and </think> from its answer, as reasoning_content
        #[argh(switch)]
        separate_reasoning: bool,
        /// where sampling that no flag and no request gives comes from: auto (default: the checkpoint's
        /// generation_config.json, where it asks for sampling) or none (temperature 1, as in OpenAI's API)
        #[argh(option, default = "::std::default::Default::default()")]
        generation_config: GenerationConfigChoice,
    }
}

/// Serves until a signal ends it. False if it could not, or not go on; stderr says why.
pub fn serve(flags: &Flags) -> bool {
    let stderr = Stderr::open();
    stderr.log_or(LOGGED);
    let ended = start(flags, &stderr);
    if let Err(error) = &ended {
        stderr.say(format!("serve: {error}"));
    }
    stderr.finish();
    ended.is_ok()
}

fn start(flags: &Flags, stderr: &Stderr) -> Result<(), Cause> {
    let workers = std::thread::available_parallelism().map_or(1, usize::from).min(WORKERS_MAX);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .max_blocking_threads(TOKENIZERS_MAX)
        .enable_all()
        .build()?;
    let own = SamplingParams { temperature: 1.0, ..SamplingParams::default() };
    flags.sampling(own).check()?;
    let settings = flags.settings()?;
    let address = SocketAddr::new(flags.host, flags.port);
    // Before what takes long: a port that is taken is found at once.
    let listener = runtime.block_on(TcpListener::bind(address)).map_err(|error| {
        format!("{address} can't be listened at: {error}; choose another --port, or --host")
    })?;
    let source = flags.source(&flags.model, stderr)?;
    let sampling = flags.sampling(flags.generation_config.sampling(&source, own, stderr)?);
    let policy = flags.policy.unwrap_or(Policy::Latency);
    let simulate = flags.simulate.as_deref().map(SimulatedDevice::open).transpose()?;
    let builder = source.builder().options(Options { policy, simulate, ..flags.engine_options() });
    let service = Service::start(Settings { sampling, ..settings }, move || builder.clone().build())?;
    match runtime.block_on(until_told(service, listener, stderr))? {
        Ended::Drained => stderr.say("serve: all requests have ended"),
        Ended::CutOff => stderr.say("serve: the time to drain was over, and some requests were cut off"),
    }
    Ok(())
}

async fn until_told(service: Service, listener: TcpListener, stderr: &Stderr) -> Result<Ended, Cause> {
    let (app, address) = (service.app().clone(), listener.local_addr()?);
    let announcer = stderr.clone();
    tokio::spawn(async move {
        if let Some(engine) = app.engines.ready().await {
            let keyed = !app.settings.api_keys.is_empty();
            announcer.say(engine.info.to_string());
            announcer.say(greeting(address, keyed, engine.handle.text().has_tokenizer()));
        }
    });
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let said = stderr.clone();
    let end = async move {
        either(&mut terminate, &mut interrupt).await;
        said.say("serve: no more requests are taken, the open ones go on; a second signal ends them");
        tokio::spawn(async move {
            let status = either(&mut terminate, &mut interrupt).await;
            said.finish();
            std::process::exit(status)
        });
    };
    Ok(service.serve(listener, end).await?)
}

/// Waits for one of both signals; the exit status of a program that it ends.
async fn either(terminate: &mut Signal, interrupt: &mut Signal) -> i32 {
    tokio::select! {
        _ = terminate.recv() => 128 + SignalKind::terminate().as_raw_value(),
        _ = interrupt.recv() => 128 + SignalKind::interrupt().as_raw_value(),
    }
}

/// Where the service is, and a command to try it with.
fn greeting(address: SocketAddr, keyed: bool, reads_text: bool) -> String {
    let key = if keyed { r#" -H "Authorization: Bearer $MINISGL_API_KEY""# } else { "" };
    let (path, body) = match reads_text {
        true => ("/v1/chat/completions", r#"{"messages": [{"role": "user", "content": "Hello!"}]}"#),
        false => ("/v1/completions", r#"{"prompt": [1, 2, 3], "return_token_ids": true}"#),
    };
    format!(
        "ready at http://{address}: curl http://{address}{path} -H 'Content-Type: application/json'{key} -d '{body}'"
    )
}

impl Flags {
    /// The service that the flags ask for; its sampling is not known yet.
    fn settings(&self) -> Result<Settings, Cause> {
        let name = self.served_model_name.as_ref().unwrap_or(&self.model);
        let default = Settings::new(ModelName::new(name));
        let seconds = |given: Option<u64>, default| given.map_or(default, Duration::from_secs);
        for origin in &self.cors_origin {
            if HeaderValue::from_str(origin).is_err() {
                return Err(format!(
                    "--cors-origin {origin:?} is no origin; give one like https://example.org"
                )
                .into());
            }
        }
        Ok(Settings {
            queued_max: self.max_queued.unwrap_or(default.queued_max),
            body_bytes_max: self.max_body_bytes.unwrap_or(default.body_bytes_max),
            connections_max: self.max_connections.unwrap_or(default.connections_max).max(1),
            header_timeout: seconds(self.header_seconds, default.header_timeout),
            body_timeout: seconds(self.body_seconds, default.body_timeout),
            write_timeout: seconds(self.write_seconds, default.write_timeout),
            drain: seconds(self.drain_seconds, default.drain),
            api_keys: self.api_keys()?,
            cors_origins: self.cors_origin.clone(),
            rebuilds_max: self.max_rebuilds.unwrap_or(default.rebuilds_max),
            tool_format: self.tool_format,
            separate_reasoning: self.separate_reasoning,
            ..default
        })
    }

    /// All keys: those of the flags, the file and the environment.
    fn api_keys(&self) -> Result<Vec<String>, Cause> {
        let mut keys = self.api_key.clone();
        match std::env::var("MINISGL_API_KEY") {
            Ok(key) => keys.push(key),
            Err(VarError::NotPresent) => {}
            Err(VarError::NotUnicode(_)) => return Err("MINISGL_API_KEY is not UTF-8; a key must be".into()),
        }
        if let Some(path) = &self.api_key_file {
            let path_shown = path.display();
            let text = std::fs::read_to_string(path)
                .map_err(|error| format!("--api-key-file {path_shown} can't be read: {error}"))?;
            let before = keys.len();
            keys.extend(text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned));
            if keys.len() == before {
                return Err(format!("--api-key-file {path_shown} has no key; write one a line").into());
            }
        }
        match keys.iter().any(String::is_empty) {
            true => Err("an API key is empty; leave it out to ask for none".into()),
            false => Ok(keys),
        }
    }
}
