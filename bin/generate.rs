//! Bulk generation: `generate --model DIR --input requests.jsonl --output results.jsonl`.

mod signals;

use std::borrow::Cow;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use minisgl::bulk::{Bulk, BulkError, Existing, Job, JobHandle, Place};
use minisgl::lines::{Defaults, ModelName};
use minisgl::progress::Stderr;
use minisgl::{Cause, Llm, SamplingParams, with_shared_flags};

with_shared_flags! {
    /// runs every request of a JSONL file through a model and writes a JSONL line for each as it ends; the exit status is
    /// 0 only if every line has a good result
    struct Flags {
        /// checkpoint directory, or a preset with dummy weights (tiny, qwen3-0.6b, …)
        #[argh(option)]
        model: String,
        /// request lines, in a file (.gz and .zst too), a FIFO, or - for standard input
        #[argh(option)]
        input: Place,
        /// where result lines go: a file (compressed if it is called .gz or .zst), a FIFO, or - for standard output
        #[argh(option)]
        output: Place,
        /// keep the output's good results and run all lines that have none
        #[argh(switch)]
        resume: bool,
        /// resume even if the results were made by another model, other sampling or of other lines
        #[argh(switch)]
        resume_anyway: bool,
        /// write an output anew that exists
        #[argh(switch)]
        overwrite: bool,
        /// a longer line of the input is an error (default 67108864)
        #[argh(option, default = "64 << 20")]
        max_line_bytes: usize,
        /// output tokens of a request that does not say (default 128)
        #[argh(option, default = "128")]
        max_tokens: u32,
        /// a request that has no seed gets this one plus its line number (default 0)
        #[argh(option, default = "0")]
        seed: u64,
        /// go on past end-of-sequence tokens, unless a request says otherwise
        #[argh(switch)]
        ignore_eos: bool,
    }
}

fn main() -> ExitCode {
    let stderr = Stderr::open();
    stderr.log();
    let code = generate(&argh::from_env(), &stderr).unwrap_or_else(|error| {
        stderr.say(format!("generate: {error}"));
        ExitCode::FAILURE
    });
    // The signals' thread has a clone that is never dropped.
    stderr.finish();
    code
}

fn generate(flags: &Flags, stderr: &Stderr) -> Result<ExitCode, Cause> {
    let sampling = flags.sampling(SamplingParams {
        max_tokens: flags.max_tokens,
        seed: flags.seed,
        ignore_eos: flags.ignore_eos,
        ..SamplingParams::default()
    });
    sampling.check()?;
    let existing = flags.existing()?;
    // A signal before there is a job ends the program; nothing was changed.
    let job: Arc<OnceLock<JobHandle>> = Arc::default();
    let stopped = (Arc::clone(&job), stderr.clone());
    signals::handle(move || {
        let (job, stderr) = stopped;
        if let Some(job) = job.get() {
            stderr.say(format!("generate: {}", last_words(job)));
        }
        stderr.finish();
    })?;
    let folder = PathBuf::from(&flags.model);
    let bulk = Bulk::open(Job {
        input: flags.input.clone(),
        output: flags.output.clone(),
        existing,
        defaults: Defaults { sampling, model: ModelName::new(&flags.model) },
        model: flags.model.clone(),
        checkpoint: folder.is_dir().then_some(folder),
        max_line_bytes: flags.max_line_bytes,
    })?;
    let llm = Llm::builder(&flags.model).options(flags.engine_options()).build()?;
    stderr.say(llm.info().to_string());

    let started = Instant::now();
    job.get_or_init(|| bulk.handle());
    let tally = match bulk.run(&llm) {
        // The signal's thread has the last word.
        Err(BulkError::Stopped) => loop {
            std::thread::park();
        },
        ended => ended?,
    };
    let seconds = started.elapsed().as_secs_f64();
    stderr.say(format!(
        "{} finished, {} failed, {} skipped; {} tokens in {seconds:.2} s",
        tally.finished, tally.failed, tally.skipped, tally.output_tokens
    ));
    Ok(if tally.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Flags {
    fn existing(&self) -> Result<Existing, Cause> {
        match (self.overwrite, self.resume, self.resume_anyway) {
            (true, false, false) => Ok(Existing::Overwrite),
            (true, ..) => {
                Err("--overwrite empties the output and --resume keeps it; give one of them".into())
            }
            (false, _, true) => Ok(Existing::ResumeAnyway),
            (false, true, false) => Ok(Existing::Resume),
            (false, false, false) => Ok(Existing::Refuse),
        }
    }
}

/// Ends a job that a signal interrupts, and says what is left to be done.
fn last_words(job: &JobHandle) -> String {
    let left = match job.stop() {
        Ok(left) => left,
        Err(error) => return error.to_string(),
    };
    let input = if job.position().1.is_none() { ", given the input from its beginning" } else { "" };
    match job.resumable() {
        true => format!("stopped; {left}. This goes on{input}:\n{}", resuming(std::env::args())),
        false => format!("stopped; {left}"),
    }
}

/// The command that goes on where this one stops.
fn resuming(arguments: impl Iterator<Item = String>) -> String {
    let switches = ["--overwrite", "--resume-anyway", "--resume"];
    let mut arguments: Vec<String> =
        arguments.filter(|argument| !switches.contains(&argument.as_str())).collect();
    arguments.push("--resume".to_owned());
    let quoted =
        arguments.iter().map(|argument| shlex::try_quote(argument).unwrap_or(Cow::Borrowed(argument)));
    quoted.collect::<Vec<_>>().join(" ")
}
