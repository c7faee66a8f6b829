//! The program `offline-bench`: its flags, and what they make a plan of.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use minisgl_core::kv::KvFormat;

use super::{Comparison, Plan, Requests, list_models, run};
use crate::device::BackendChoice;
use crate::diagnostics::Ceilings;
use crate::error::Cause;
use crate::flags::positive;
use crate::llm::Llm;
use crate::opening::gpu_present;
use crate::options::Options;
use crate::progress::{Progress, Stderr};
use crate::request::SamplingParams;
use crate::simulated::SimulatedDevice;
use crate::with_shared_flags;
use crate::workload::{Lengths, Source, Workload};

with_shared_flags! {
    /// Generates for random prompts as fast as it can and reports tokens a second. The exit status is 1 if runs or
    /// verified requests disagree in a token.
    #[derive(Debug)]
    pub struct Flags {
        /// of the random prompts and lengths; request i draws its tokens with seed + i (default 0)
        #[argh(option, default = "0")]
        seed: u64,
        /// requests (default 256; of a file all)
        #[argh(option)]
        n: Option<usize>,
        /// checkpoint directory, a name on the Hugging Face hub (OWNER/NAME), or a preset with dummy weights, which
        /// --list-models names (default: qwen3-0.6b on a GPU, tiny on the CPU)
        #[argh(option)]
        model: Option<String>,
        /// a file with the times of a device's steps (docs/serving.md): no model is computed, tokens are nonsense, and steps take that
        /// device's time
        #[argh(option)]
        simulate: Option<PathBuf>,
        /// random numbers: pcg (default), or minisgl, those of mini-sglang's benchmark
        #[argh(option)]
        workload: Option<Source>,
        /// prompt lengths, both ends included (default 100..1024)
        #[argh(option)]
        input_len: Option<Lengths>,
        /// output lengths, both ends included (default 100..1024)
        #[argh(option)]
        output_len: Option<Lengths>,
        /// a further prompt of so many tokens comes when the others have half of their output: ITL says how long they wait
        #[argh(option)]
        late_prompt: Option<u32>,
        /// run the requests of this file instead of random ones: request lines as generate takes them, or ShareGPT JSON
        #[argh(option)]
        requests: Option<PathBuf>,
        /// timed runs, each with an empty prefix cache (default 1)
        #[argh(option, default = "1")]
        runs: usize,
        /// do it all so many times, each with an engine built anew (default 1)
        #[argh(option, default = "1")]
        repeat: usize,
        /// run the whole workload once before the clock starts
        #[argh(switch)]
        warmup: bool,
        /// run this many of the requests again alone and compare their tokens (default 0)
        #[argh(option, default = "0")]
        verify: usize,
        /// write the report to this file, for machines
        #[argh(option)]
        json: Option<PathBuf>,
        /// write the report to this file, as a page for a browser
        #[argh(option)]
        report: Option<PathBuf>,
        /// write the last run's timeline to this file; ui.perfetto.dev opens it
        #[argh(option)]
        trace: Option<PathBuf>,
        /// memory bandwidth in GB/s that the floor is computed with (default: measured on a GPU, no floor on the CPU)
        #[argh(option)]
        bandwidth: Option<f64>,
        /// matrix product rate in TFLOP/s that the floor is computed with (default: measured on a GPU)
        #[argh(option)]
        matmul: Option<f64>,
        /// run nothing: list the presets, with their bytes and the workload's floor on this device
        #[argh(switch)]
        list_models: bool,
        /// run nothing: compare two files that --json has written, FIRST.json SECOND.json
        #[argh(switch)]
        compare: bool,
        /// the files for --compare
        #[argh(positional, arg_name = "files")]
        files: Vec<PathBuf>,
    }
}

/// Runs the benchmark and prints its report. False if runs disagree in a token, or if it can't be run, which stderr says.
pub fn offline_bench(flags: &Flags) -> bool {
    let stderr = Stderr::open();
    stderr.log();
    measure(flags, &stderr).unwrap_or_else(|error| {
        stderr.say(format!("offline-bench: {error}"));
        false
    })
}

/// Did the runs agree?
fn measure(flags: &Flags, stderr: &Stderr) -> Result<bool, Cause> {
    let mut out = io::stdout().lock();
    if let Some(files) = flags.compared()? {
        write!(out, "{}", Comparison::open(files)?)?;
        return Ok(true);
    }
    let plan = flags.plan()?;
    if flags.list_models {
        return flags.list(&plan, &mut out).map(|()| true);
    }
    let model = flags.model(&mut out)?;
    let simulate = flags.simulate.as_deref().map(SimulatedDevice::open).transpose()?;
    let options = Options { simulate, ..flags.options() };
    let open = || flags.source(&model, stderr)?.builder().options(options.clone()).build();
    let progress = Arc::new(Mutex::new(Progress::default()));
    let show = || {
        let seen = progress.clone();
        stderr.show(move || seen.lock().unwrap_or_else(PoisonError::into_inner).clone())
    };
    let mut shown = None;
    let report = run(&open, &plan, &mut out, &mut |now| {
        let goes_on = now.running + now.waiting > 0;
        *progress.lock().unwrap_or_else(PoisonError::into_inner) = now;
        match goes_on {
            true => _ = shown.get_or_insert_with(show),
            // Its table comes next.
            false => shown = None,
        }
    });
    Ok(report?.is_sound())
}

impl Flags {
    /// The two files, where comparing is what is wanted.
    fn compared(&self) -> Result<Option<[&Path; 2]>, Cause> {
        match (self.compare, self.files.as_slice()) {
            (false, []) => Ok(None),
            (true, [first, second]) => Ok(Some([first, second])),
            (true, files) => Err(format!("--compare takes two files, not {}", files.len()).into()),
            (false, [first, ..]) => {
                Err(format!("{} is no flag; did you mean --compare FIRST.json SECOND.json?", first.display())
                    .into())
            }
        }
    }

    /// The presets. Ceilings that no flag gives are measured where there is a GPU, on the smallest engine.
    fn list(&self, plan: &Plan, out: &mut dyn Write) -> Result<(), Cause> {
        if self.simulate.is_some() {
            return Err("--list-models runs nothing; leave --simulate out".into());
        }
        let Requests::Drawn(workload) = &plan.requests else {
            return Err("--list-models takes random requests; leave --requests out".into());
        };
        let ceilings = match plan.bytes_per_s {
            Some(bytes_per_s) => Some(Ceilings { bytes_per_s, flop_per_s: plan.flop_per_s }),
            None if self.on_gpu()? => {
                let options = Options { max_seq_len: Some(64), ..self.engine_options() };
                Llm::builder("tiny").options(options).build()?.ceilings()?
            }
            None => None,
        };
        let kv = self.kv_dtype.0.unwrap_or(KvFormat::Bf16);
        for model in list_models(workload, kv, ceilings)? {
            writeln!(out, "{model}")?;
        }
        Ok(())
    }

    fn plan(&self) -> Result<Plan, Cause> {
        if self.n == Some(0) || self.runs == 0 || self.repeat == 0 || self.late_prompt == Some(0) {
            return Err("--n, --runs, --repeat and --late-prompt must be at least 1".into());
        }
        let sampling = self.sampling(SamplingParams { temperature: 0.6, ..SamplingParams::default() });
        sampling.check()?;
        Ok(Plan {
            requests: self.requests()?,
            late_prompt: self.late_prompt,
            sampling,
            runs: self.runs,
            repeat: self.repeat,
            warm_up: self.warmup,
            verify: self.verify,
            bytes_per_s: positive("--bandwidth", self.bandwidth)?.map(|gb| gb * 1e9),
            flop_per_s: positive("--matmul", self.matmul)?.map(|tflop| tflop * 1e12),
            json: self.json.clone(),
            page: self.report.clone(),
            trace: self.trace.clone(),
        })
    }

    fn requests(&self) -> Result<Requests, Cause> {
        let Some(path) = self.requests.clone() else {
            return Ok(Requests::Drawn(Workload {
                source: self.workload.unwrap_or_default(),
                seed: self.seed,
                requests: self.n.unwrap_or(256),
                input: lengths(&self.input_len),
                output: lengths(&self.output_len),
            }));
        };
        let drawn = [
            ("--workload", self.workload.is_some()),
            ("--input-len", self.input_len.is_some()),
            ("--output-len", self.output_len.is_some()),
        ];
        match drawn.into_iter().find(|(_, given)| *given) {
            Some((flag, _)) => {
                Err(format!("{flag} is of random requests; leave it or --requests out").into())
            }
            None => Ok(Requests::File { path, most: self.n, seed: self.seed }),
        }
    }

    /// Sequences need be no longer than the longest random request, or the late one.
    fn options(&self) -> Options {
        let options = self.engine_options();
        if self.requests.is_some() {
            return options;
        }
        let [input, output] = [lengths(&self.input_len), lengths(&self.output_len)];
        let late = self.late_prompt.map_or(0, |tokens| tokens.saturating_add(1));
        let longest = input.longest().saturating_add(output.longest()).max(late);
        Options {
            max_seq_len: options.max_seq_len.or(Some(longest)),
            usual_tokens: Some(input.mean().saturating_add(output.mean())),
            ..options
        }
    }

    fn on_gpu(&self) -> Result<bool, Cause> {
        Ok(match self.backend {
            BackendChoice::Auto => gpu_present()?,
            BackendChoice::Cuda => true,
            BackendChoice::Cpu => false,
        })
    }

    fn model(&self, out: &mut dyn Write) -> Result<String, Cause> {
        if let Some(model) = &self.model {
            return Ok(model.clone());
        }
        if self.simulate.is_some() || self.on_gpu()? {
            return Ok("qwen3-0.6b".to_owned());
        }
        writeln!(out, "No --model, and no GPU to run on: the preset `tiny` on the CPU.")?;
        Ok("tiny".to_owned())
    }
}

fn lengths(given: &Option<Lengths>) -> Lengths {
    given.clone().unwrap_or(Lengths::BENCHMARK)
}
