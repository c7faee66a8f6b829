//! Bulk generation: `generate --model MODEL --input requests.jsonl --output results.jsonl`.

mod signals;

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use minisgl::bulk::{Bulk, BulkError, BulkReport, Existing, Job, JobHandle, Place, Rounding};
use minisgl::lines::Defaults;
use minisgl::openai::ModelName;
use minisgl::progress::{Progress, Stderr};
use minisgl::report::{Output, write_json, write_page};
use minisgl::telemetry::sample_while;
use minisgl::{Cause, GenerationConfigChoice, Options, SamplingParams, from_command_line, with_shared_flags};

with_shared_flags! {
    /// runs every request of a JSONL file through a model and writes a JSONL line for each as it ends; the exit status is
    /// 0 only if every line has a good result
    struct Flags {
        /// checkpoint directory, a name on the Hugging Face hub (OWNER/NAME), or a preset with dummy weights (tiny, …)
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
        /// write what was seen of the run to this file, for machines
        #[argh(option)]
        json: Option<PathBuf>,
        /// write the same to this file, as a page for a browser
        #[argh(option)]
        report: Option<PathBuf>,
        /// output tokens of a request that does not say (default 128)
        #[argh(option, default = "128")]
        max_tokens: u32,
        /// a request that has no seed gets this one plus its line number (default 0)
        #[argh(option, default = "0")]
        seed: u64,
        /// go on past end-of-sequence tokens, unless a request says otherwise
        #[argh(switch)]
        ignore_eos: bool,
        /// where sampling that no flag and no line gives comes from: auto (default: the checkpoint's generation_config.json,
        /// where it asks for sampling) or none (greedy)
        #[argh(option, default = "::std::default::Default::default()")]
        generation_config: GenerationConfigChoice,
    }
}

fn main() -> ExitCode {
    let stderr = Stderr::open();
    stderr.log();
    let code = generate(&from_command_line(), &stderr).unwrap_or_else(|error| {
        stderr.say(format!("generate: {error}"));
        ExitCode::FAILURE
    });
    // The signals' thread has a clone that is never dropped.
    stderr.finish();
    code
}

fn generate(flags: &Flags, stderr: &Stderr) -> Result<ExitCode, Cause> {
    let existing = flags.existing()?;
    let own = SamplingParams {
        max_tokens: flags.max_tokens,
        seed: flags.seed,
        ignore_eos: flags.ignore_eos,
        ..SamplingParams::default()
    };
    flags.sampling(own).check()?;
    let source = flags.source(&flags.model, stderr)?;
    let sampling = flags.sampling(flags.generation_config.sampling(&source, own, stderr)?);
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
    let task = Job {
        input: flags.input.clone(),
        output: flags.output.clone(),
        existing,
        defaults: Defaults { sampling, model: ModelName::new(&flags.model) },
        model: flags.model.clone(),
        checkpoint: source.folder().map(Path::to_owned),
        rounding: Rounding::from(&flags.engine_options()),
        max_line_bytes: flags.max_line_bytes,
        tokens: flags.json.is_some() || flags.report.is_some(),
    };
    let bulk = Bulk::open(task.clone())?;
    flags.check_reports()?;
    let create = |path: &Option<PathBuf>| path.as_deref().map(Output::create).transpose();
    let (json, page) = (create(&flags.json)?, create(&flags.report)?);
    let options = Options { usual_tokens: bulk.usual_tokens(), ..flags.engine_options() };
    let llm = source.builder().options(options).build()?;
    stderr.say(llm.info().to_string());

    let started = Instant::now();
    let handle = job.get_or_init(|| bulk.handle()).clone();
    let pages = llm.info().pages();
    let seen = handle.clone();
    let shown = stderr.show(move || Progress { pages, ..seen.progress() });
    let mut probe = if task.tokens { llm.probe() } else { None };
    let (ended, device) = sample_while(probe.as_mut(), || bulk.run(&llm));
    drop(shown);
    let tally = match ended {
        // The signal's thread has the last word.
        Err(BulkError::Stopped) => loop {
            std::thread::park();
        },
        ended => ended?,
    };
    let seconds = started.elapsed().as_secs_f64();
    let report = BulkReport::new(llm.info(), &task, tally, handle.record(seconds, device));
    if let Some(json) = json {
        json.write(|file| write_json(&report, file))?;
    }
    if let Some(page) = page {
        page.write(|file| write_page("generate", &report, file))?;
    }
    stderr.say(format!(
        "{} finished, {} failed, {} skipped; {} tokens in {seconds:.2} s",
        tally.finished, tally.failed, tally.skipped, tally.output_tokens
    ));
    Ok(if tally.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Flags {
    /// A report would empty the file that it goes to.
    fn check_reports(&self) -> Result<(), Cause> {
        let file = |path: &Path| path.canonicalize().ok();
        let lines = [&self.input, &self.output].map(|place| file(Path::new(&place.to_string())));
        for (flag, path) in [("--json", &self.json), ("--report", &self.report)] {
            let report = path.as_deref().and_then(file);
            if report.is_some() && lines.contains(&report) {
                return Err(format!(
                    "{flag} would overwrite the requests or the results; write it elsewhere"
                )
                .into());
            }
        }
        Ok(())
    }

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
