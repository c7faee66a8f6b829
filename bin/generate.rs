//! Bulk generation: `generate --model DIR --input requests.jsonl --output results.jsonl`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use minisgl::bulk::{Bulk, Job};
use minisgl::lines::{Defaults, ModelName};
use minisgl::{Cause, Llm, SamplingParams, with_shared_flags};

with_shared_flags! {
    /// runs every request of a JSONL file through a model and writes a JSONL line for each as it ends; the exit status is
    /// 1 if any line failed
    struct Flags {
        /// checkpoint directory, or a preset with dummy weights (tiny, qwen3-0.6b, …)
        #[argh(option)]
        model: String,
        /// request lines: an id, a prompt (prompt, prompt_token_ids or messages), and sampling where it differs
        #[argh(option)]
        input: PathBuf,
        /// where result lines go; written anew unless --resume
        #[argh(option)]
        output: PathBuf,
        /// keep what the output has, and skip the ids in it
        #[argh(switch)]
        resume: bool,
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
    match generate(&argh::from_env()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("generate: {error}");
            ExitCode::FAILURE
        }
    }
}

fn generate(flags: &Flags) -> Result<ExitCode, Cause> {
    let sampling = flags.sampling(SamplingParams {
        max_tokens: flags.max_tokens,
        seed: flags.seed,
        ignore_eos: flags.ignore_eos,
        ..SamplingParams::default()
    });
    sampling.check()?;
    let defaults = Defaults { sampling, model: ModelName::new(&flags.model) };
    let job =
        Job { input: flags.input.clone(), output: flags.output.clone(), resume: flags.resume, defaults };
    let bulk = Bulk::open(job)?;
    let mut llm = Llm::builder(&flags.model).options(flags.engine_options()).build()?;
    eprintln!("{}", llm.info());

    let started = Instant::now();
    let tally = bulk.run(&mut llm)?;
    let seconds = started.elapsed().as_secs_f64();
    eprintln!(
        "{} finished, {} failed, {} skipped; {} tokens in {seconds:.2} s",
        tally.finished, tally.failed, tally.skipped, tally.output_tokens
    );
    Ok(if tally.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
