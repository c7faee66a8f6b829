//! The program `chat`: its flags, and the conversation in the terminal.

use std::io::{self, IsTerminal};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use minisgl::progress::Stderr;
use minisgl::{
    Cause, DRAFTS_MAX, GenerationConfigChoice, JsonObject, Options, SamplingParams, Speculation,
    with_shared_flags,
};
use rustyline::DefaultEditor;
use rustyline::config::Config;
use rustyline::error::ReadlineError;
use signal_hook::consts::SIGINT;
use signal_hook::flag;

use super::settings::Settings;
use super::speaker::{Local, Remote, Speaker};
use super::{After, Chat, Screen};
use crate::service::Service;

with_shared_flags! {
    /// a conversation in the terminal, with a model here or a service with OpenAI's API; /help shows what can be done
    pub struct Flags {
        /// checkpoint directory, a name on the Hugging Face hub (OWNER/NAME), or with --url the service's name of the model
        /// (default: with --url the first that the service lists)
        #[argh(option)]
        model: Option<String>,
        /// a service's address, like http://127.0.0.1:1919; the flags of engines do nothing then
        #[argh(option)]
        url: Option<String>,
        /// the service's key; better in the variable OPENAI_API_KEY, which other users can't see
        #[argh(option)]
        api_key: Option<String>,
        /// what the model is told at first
        #[argh(option)]
        system: Option<String>,
        /// tokens of an answer at most (default 2048, or MINISGL_SHELL_MAX_TOKENS)
        #[argh(option)]
        max_tokens: Option<u32>,
        /// the same seed draws the same answer to the same conversation (default: another one each time)
        #[argh(option)]
        seed: Option<u64>,
        /// variables of the chat template, a JSON object: "enable_thinking" with false, say
        #[argh(option)]
        chat_template_kwargs: Option<String>,
        /// where sampling that nothing else gives comes from: auto (default: the checkpoint's generation_config.json, where it
        /// asks for sampling) or none (temperature 0.6)
        #[argh(option, default = "::std::default::Default::default()")]
        generation_config: GenerationConfigChoice,
    }
}

/// Talks until it is over. False if something of it failed, which stderr says.
pub fn chat(flags: &Flags) -> bool {
    let stderr = Stderr::open();
    stderr.log();
    let went_well = talk(flags, &stderr).unwrap_or_else(|error| {
        stderr.say(format!("chat: {error}"));
        false
    });
    stderr.finish();
    went_well
}

fn talk(flags: &Flags, stderr: &Stderr) -> Result<bool, Cause> {
    let settings = flags.settings()?;
    let mut speaker = flags.speaker(stderr)?;
    let mut chat = Chat::new(speaker.as_mut(), settings, flags.system.clone());
    let signals = Signals::handle()?;
    let mut editor = DefaultEditor::with_config(Config::builder().auto_add_history(true).build())?;
    let (mut out, mut aside) = (io::stdout(), io::stderr());
    let terminal = out.is_terminal();
    loop {
        let line = match editor.readline("> ") {
            Ok(line) => line,
            Err(ReadlineError::Interrupted) => {
                eprintln!("Ctrl-D or /quit ends the conversation");
                continue;
            }
            Err(ReadlineError::Eof) => break,
            Err(error) => return Err(error.into()),
        };
        let mut screen = Screen { out: &mut out, aside: &mut aside, terminal };
        let after = signals.during(|stop| chat.line(&line, stop, &mut screen))?;
        if after == After::End {
            break;
        }
    }
    Ok(!chat.has_failed())
}

/// Ctrl-C: during an answer it stops that, else the program.
struct Signals {
    idle: Arc<AtomicBool>,
    stopped: Arc<AtomicBool>,
}

impl Signals {
    fn handle() -> io::Result<Signals> {
        let signals = Signals { idle: Arc::new(AtomicBool::new(true)), stopped: Arc::default() };
        flag::register_conditional_default(SIGINT, Arc::clone(&signals.idle))?;
        flag::register(SIGINT, Arc::clone(&signals.stopped))?;
        Ok(signals)
    }

    /// Does something that asks often whether it is to stop.
    fn during<R>(&self, work: impl FnOnce(&dyn Fn() -> bool) -> R) -> R {
        self.stopped.store(false, Ordering::SeqCst);
        self.idle.store(false, Ordering::SeqCst);
        let result = work(&|| self.stopped.load(Ordering::SeqCst));
        self.idle.store(true, Ordering::SeqCst);
        result
    }
}

impl Flags {
    fn settings(&self) -> Result<Settings, Cause> {
        let flags = Settings {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            max_tokens: self.max_tokens,
            seed: self.seed,
        };
        flags.check()?;
        Ok(flags.or(Settings::from_env(|name| std::env::var(name).ok())?))
    }

    fn kwargs(&self) -> Result<JsonObject, Cause> {
        let Some(text) = &self.chat_template_kwargs else { return Ok(JsonObject::new()) };
        let kwargs = serde_json::from_str(text);
        kwargs.map_err(|error| format!("--chat-template-kwargs is no JSON object: {error}").into())
    }

    fn speaker(&self, stderr: &Stderr) -> Result<Box<dyn Speaker>, Cause> {
        let kwargs = self.kwargs()?;
        if let Some(url) = &self.url {
            let key = self.api_key.clone().or_else(|| std::env::var("OPENAI_API_KEY").ok());
            let service = Service::new(url.parse()?, key)?;
            let model = self.model.clone().map_or_else(|| service.first_model(), Ok)?;
            stderr.say(format!("{model} at {}; /help shows what can be done", service.endpoint()));
            return Ok(Box::new(Remote::new(service, model, kwargs)));
        }
        let name = self.model.as_deref().ok_or("give --model for a model here, or --url for a service")?;
        let own = SamplingParams { temperature: 0.6, ..SamplingParams::default() };
        let source = self.source(name, stderr)?;
        let sampling = self.generation_config.sampling(&source, own, stderr)?;
        let options = self.engine_options();
        // One answer at a time; drafts take the places beside it.
        let running = if options.speculation == Speculation::Never { 1 } else { 1 + DRAFTS_MAX };
        let options = Options { max_running: options.max_running.or(Some(running)), ..options };
        let llm = source.builder().options(options).build()?;
        stderr.say(format!("{}\n/help shows what can be done", llm.info()));
        Ok(Box::new(Local::new(llm, sampling, kwargs)?))
    }
}
