//! The model behind one handle: opened once, then asked as often as one likes.
//!
//! ```text
//!   directory or preset ── Checkpoint ── Backend ── Decoder::load ── pages counted ── Engine ──> Llm
//! ```

use std::path::Path;
use std::time::Instant;

use minisgl_core::backend::{Model, Ops};
use minisgl_core::config::Limits;
use minisgl_core::engine::{Engine, EngineOptions};
use minisgl_core::request::Request;
use minisgl_core::sampling::SamplingParams;
use minisgl_core::scheduler::Policy;
use minisgl_core::stats::Stats;
use minisgl_cpu::Cpu;
use minisgl_cuda::{Cuda, CudaError, KernelSet};
use minisgl_decoder::{Checkpoint, Decoder};

use crate::builder::LlmBuilder;
use crate::error::Error;
use crate::gauge::{Ceilings, DeviceState, Gauge};
use crate::info::Info;
use crate::memory::Room;
use crate::models::{FAMILIES, preset_names};
use crate::options::{BackendChoice, KernelChoice, Options};
use crate::request::{ChatPrompt, Completion, Flow, GenerateRequest, Prompt, RequestError, StreamEvent};
use crate::run::Run;
use crate::runner::Runner;
use crate::tokenizer::Text;

/// A model on a device, ready to generate. See the [crate's page](crate) for an example.
pub struct Llm {
    runner: Box<dyn Runner>,
    text: Text,
    info: Info,
    failed: bool,
}

impl Llm {
    /// Sets up a model: a checkpoint's directory, or a preset's name (`tiny`, `qwen3-0.6b`, …: dummy weights of that
    /// size). A directory that is named like a preset is meant by `./tiny`.
    pub fn builder(model: impl Into<String>) -> LlmBuilder {
        LlmBuilder::new(model.into())
    }

    pub(crate) fn open(model: String, options: Options) -> Result<Llm, Error> {
        if !(options.memory_ratio > 0.0 && options.memory_ratio <= 1.0) {
            return Err(Error::MemoryRatio(options.memory_ratio));
        }
        let (checkpoint, text) = open_model(&model)?;
        let (runner, info) = open_engine(model, &checkpoint, &options)?;
        Ok(Llm { runner, text, info, failed: false })
    }

    /// Runs all requests; completions come in the order of the requests.
    ///
    /// # Errors
    /// A step failed; the error holds what had finished. A request that can't run is no error: its completion says so.
    pub fn generate(&mut self, requests: &[GenerateRequest]) -> Result<Vec<Completion>, Error> {
        let mut completions: Vec<Option<Completion>> = vec![None; requests.len()];
        let outcome = self.start().stream_text(false).drive(requests.iter().cloned(), &mut |event| {
            if let StreamEvent::Finished { index, completion, .. } = event {
                completions[index] = Some(completion);
            }
            Flow::Continue
        });
        match outcome {
            Ok(()) => Ok(completions.into_iter().flatten().collect()),
            Err(Error::Step { cause, .. }) => {
                let finished = completions.into_iter().enumerate();
                let finished = finished.filter_map(|(index, one)| Some((index, one?))).collect();
                Err(Error::Step { cause, finished })
            }
            Err(error) => Err(error),
        }
    }

    /// Runs requests as they come out of an iterator, pulled when there is room for them, and hands every token, end
    /// and step to `on_event`, which may abort them.
    ///
    /// # Errors
    /// A step failed; what had finished was delivered.
    pub fn generate_stream(
        &mut self,
        requests: impl IntoIterator<Item = GenerateRequest>,
        mut on_event: impl FnMut(StreamEvent<'_>) -> Flow,
    ) -> Result<(), Error> {
        self.start().drive(requests, &mut on_event)
    }

    /// Starts a run that the caller drives: submits and steps as it likes.
    pub fn start(&mut self) -> Run<'_> {
        Run::new(&mut *self.runner, &self.text, &mut self.failed)
    }

    /// The logits `[vocab]` at every position of a prompt: what the model gives for the token after it. For scoring;
    /// one prefill a position.
    ///
    /// # Errors
    /// A prompt that can't run, or a failed step.
    pub fn prompt_logits(&mut self, prompt: &[u32]) -> Result<Vec<Vec<f32>>, Error> {
        (1..=prompt.len().max(1)).map(|len| self.logits_after(&prompt[..len.min(prompt.len())])).collect()
    }

    fn logits_after(&mut self, prompt: &[u32]) -> Result<Vec<f32>, Error> {
        if self.failed {
            return Err(Error::Failed);
        }
        let params = SamplingParams { max_tokens: 1, ..SamplingParams::default() };
        self.runner.submit(Request { prompt, params }).map_err(RequestError::from)?;
        let mut logits = Vec::new();
        while !self.runner.is_idle() {
            let step = self.runner.step(&mut |_| {}).and_then(|report| {
                if report.launched.is_some_and(|shape| shape.samples > 0) {
                    logits = self.runner.first_logits()?;
                }
                Ok(())
            });
            step.map_err(|cause| {
                self.failed = true;
                Error::Step { cause, finished: Vec::new() }
            })?;
        }
        Ok(logits)
    }

    /// The token ids of a text, by the checkpoint's tokenizer.
    ///
    /// # Errors
    /// No tokenizer, or one that refuses the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, RequestError> {
        self.encode_prompt(Prompt::Text(text.to_owned()))
    }

    /// The token ids of any prompt.
    ///
    /// # Errors
    /// A text or a conversation that the checkpoint has no files for, or that they refuse.
    pub fn encode_prompt(&self, prompt: Prompt) -> Result<Vec<u32>, RequestError> {
        self.text.encode(prompt)
    }

    /// The text of tokens, special ones left out; `None` without a tokenizer.
    pub fn decode(&self, ids: &[u32]) -> Option<String> {
        self.text.decode(ids)
    }

    /// The bytes that a token stands for, special or not: part of a character, maybe. `None` without a tokenizer, or where
    /// it has no such token.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        self.text.token_bytes(id)
    }

    /// The prompt that a conversation becomes by the checkpoint's chat template.
    ///
    /// # Errors
    /// No template, or one that refuses the messages.
    pub fn render_chat(&self, prompt: &ChatPrompt) -> Result<String, RequestError> {
        self.text.render(prompt)
    }

    /// Device, capacities, memory, and how long it took to get ready.
    pub fn info(&self) -> &Info {
        &self.info
    }

    /// What the engine did since it was built, or since [`Llm::reset_stats`].
    pub fn stats(&self) -> Stats {
        self.runner.stats()
    }

    /// Sets the counters to zero.
    pub fn reset_stats(&mut self) {
        self.runner.reset_stats();
    }

    /// Forgets all cached prefixes, so that the next run computes every prompt anew.
    pub fn clear_prefix_cache(&mut self) {
        self.runner.clear_prefix_cache();
    }

    /// Measures what the device reaches at best: a second of its time. `None` on the CPU.
    ///
    /// # Errors
    /// Those of the device.
    pub fn ceilings(&mut self) -> Result<Option<Ceilings>, Error> {
        self.runner.ceilings().map_err(Error::Device)
    }

    /// The device's clocks and what holds them down; `None` on the CPU.
    pub fn device_state(&self) -> Option<DeviceState> {
        self.runner.device_state()
    }

    /// Asserts that no KV page is lost or shared wrongly. Takes time linear in the pool.
    ///
    /// # Panics
    /// When the engine's books are wrong.
    pub fn check(&self) {
        self.runner.check();
    }
}

/// The model's files, and its text side where it has one.
fn open_model(model: &str) -> Result<(Checkpoint, Text), Error> {
    let folder = Path::new(model);
    if preset_names().any(|preset| preset == model) {
        let checkpoint = Checkpoint::preset(model, FAMILIES).map_err(|cause| Error::Model(cause.into()))?;
        return Ok((checkpoint, Text::default()));
    }
    if !folder.exists() {
        let presets = preset_names().collect::<Vec<_>>().join(", ");
        return Err(Error::NoModel { name: model.to_owned(), presets });
    }
    let checkpoint = Checkpoint::open(folder, FAMILIES).map_err(|cause| Error::Model(cause.into()))?;
    Ok((checkpoint, Text::open(folder)?))
}

fn open_engine(
    model: String,
    checkpoint: &Checkpoint,
    options: &Options,
) -> Result<(Box<dyn Runner>, Info), Error> {
    let started = Instant::now();
    let on_gpu = match options.backend {
        BackendChoice::Cpu => false,
        BackendChoice::Cuda => true,
        BackendChoice::Auto => gpu_present()?,
    };
    let name = if on_gpu { "cuda" } else { "cpu" };
    let opening = Opening { model, name, checkpoint, options, started };
    if !on_gpu {
        return opening.on(Cpu::new());
    }
    let kernels = match options.kernels {
        KernelChoice::Auto => KernelSet::Auto,
        KernelChoice::Portable => KernelSet::Portable,
        KernelChoice::Hopper => KernelSet::Hopper,
    };
    let cuda = Cuda::new(&minisgl_cuda::Options { device: options.device, kernels }).map_err(gpu_error)?;
    opening.on(cuda)
}

/// Is there a GPU? No driver means no; one that does not work is an error, for somebody meant it to.
///
/// # Errors
/// A driver that can't be asked.
pub fn gpu_present() -> Result<bool, Error> {
    match minisgl_cuda::device_count() {
        Ok(count) => Ok(count > 0),
        Err(CudaError::NoDriver) => Ok(false),
        Err(error) => Err(gpu_error(error)),
    }
}

fn gpu_error(error: CudaError) -> Error {
    Error::Gpu(Box::new(error))
}

/// An engine being built.
struct Opening<'a> {
    model: String,
    name: &'static str,
    checkpoint: &'a Checkpoint,
    options: &'a Options,
    started: Instant,
}

impl Opening<'_> {
    fn on<B: Gauge + 'static>(self, mut backend: B) -> Result<(Box<dyn Runner>, Info), Error> {
        let device = |error: B::Error| Error::Device(Box::new(error));
        let model =
            Decoder::load(&mut backend, self.checkpoint).map_err(|error| Error::Device(Box::new(error)))?;
        let loaded = backend.memory().map_err(device)?;
        let load_seconds = self.started.elapsed().as_secs_f64();

        let limits = self.limits(&backend, &model)?;
        let policy = Policy {
            prefix_cache: self.options.prefix_cache,
            order: self.options.order,
            vocab: model.vocab(),
        };
        let eos = self.checkpoint.config().eos.clone();
        let page_bytes = model.page_bytes(limits.page_size);
        let engine_options = EngineOptions { limits, policy, eos, overlap: self.options.overlap };
        let engine =
            Engine::new(backend, model, engine_options).map_err(|cause| Error::Device(cause.into()))?;

        let ready = engine.backend().memory().map_err(device)?;
        let info = Info {
            model: self.model,
            backend: self.name,
            device: engine.info().name,
            limits,
            dims: *engine.model().dims(),
            vocab: policy.vocab,
            weight_bytes: engine.model().weight_bytes(),
            page_bytes,
            memory_total: loaded.total,
            memory_free_loaded: loaded.free,
            memory_free_before_recording: engine.memory_before_recording().free,
            memory_free_ready: ready.free,
            load_seconds,
            capture_seconds: self.started.elapsed().as_secs_f64() - load_seconds,
        };
        Ok((Box::new(engine), info))
    }

    /// The capacities: as asked for, else by the device and the model.
    fn limits<B: Ops>(&self, backend: &B, model: &Decoder<B>) -> Result<Limits, Error> {
        let Options { max_running, max_queued, max_seq_len, .. } = *self.options;
        let device = backend.info();
        let max = model.max_positions();
        let sequence = max_seq_len.unwrap_or(max);
        if sequence > max {
            return Err(Error::SequenceTooLong { asked: sequence, max });
        }
        let on_cpu = self.name == "cpu";
        let prefill_tokens = if on_cpu { 1024 } else { 16384 };
        let mut limits = Limits {
            running: max_running,
            queued: max_queued,
            sequence,
            prefill_tokens: self.options.max_prefill_tokens.unwrap_or(prefill_tokens),
            page_size: self.options.page_size.unwrap_or(device.page_size_min.max(16)),
            pages: self.options.num_pages.unwrap_or(1),
            graph_rows: self.options.max_graph_batch.min(max_running),
        };
        limits.check()?;
        if self.options.num_pages.is_none() {
            let memory = backend.memory().map_err(|error| Error::Device(Box::new(error)))?;
            let page_bytes = model.page_bytes(limits.page_size);
            let room = Room { device: &device, memory, dims: model.dims(), page_bytes };
            limits.pages = match on_cpu {
                true => room.pages_by_need(&limits)?,
                false => room.pages_by_ratio(&limits, self.options.memory_ratio)?,
            };
        }
        Ok(limits)
    }
}

#[cfg(test)]
mod tests {
    use minisgl_cuda::HostTimes;

    use super::*;
    use crate::error::Cause;
    use crate::request::FinishReason;
    use crate::runner::Sink;
    use minisgl_core::backend::Dims;
    use minisgl_core::engine::StepReport;
    use minisgl_core::request::{self as core, Event, SubmitError, Submitted, Ticket};

    const LIMITS: Limits = Limits {
        running: 4,
        queued: 4,
        sequence: 64,
        prefill_tokens: 64,
        page_size: 16,
        pages: 16,
        graph_rows: 0,
    };

    const DIMS: Dims = Dims {
        layers: 1,
        hidden: 8,
        heads: 1,
        kv_heads: 1,
        head_dim: 8,
        intermediate: 8,
        vocab: 100,
        norm_eps: 1e-6,
    };

    /// An engine whose requests end one a step, until its device fails.
    struct Failing {
        steps_left: u32,
        requests: Vec<Ticket>,
    }

    impl Runner for Failing {
        fn submit(&mut self, request: Request<'_>) -> Result<Submitted, SubmitError> {
            let ticket = Ticket { entry: self.requests.len() as u32, generation: 0 };
            self.requests.push(ticket);
            Ok(Submitted { ticket, max_tokens: request.params.max_tokens })
        }

        fn abort(&mut self, ticket: Ticket, _: Sink<'_>) -> bool {
            self.requests.retain(|other| *other != ticket);
            true
        }

        fn step(&mut self, sink: Sink<'_>) -> Result<StepReport, Cause> {
            if self.steps_left == 0 {
                return Err("the kernel `down` failed".into());
            }
            self.steps_left -= 1;
            let ticket = self.requests.remove(0);
            sink(Event::Token { ticket, token: ticket.entry, logprobs: None });
            let (reason, tokens) = (core::FinishReason::Length, &[ticket.entry]);
            sink(Event::Finished { ticket, reason, cached_tokens: 0, tokens });
            Ok(StepReport { launched: None, completed: None })
        }

        fn is_idle(&self) -> bool {
            self.requests.is_empty()
        }

        fn stats(&self) -> Stats {
            Stats::default()
        }

        fn reset_stats(&mut self) {}

        fn clear_prefix_cache(&mut self) {}

        fn check(&self) {}

        fn limits(&self) -> &Limits {
            &LIMITS
        }

        fn first_logits(&mut self) -> Result<Vec<f32>, Cause> {
            Ok(Vec::new())
        }

        fn ceilings(&mut self) -> Result<Option<Ceilings>, Cause> {
            Ok(None)
        }

        fn device_state(&self) -> Option<DeviceState> {
            None
        }

        fn host_times(&self) -> Option<HostTimes> {
            None
        }
    }

    fn failing(steps_left: u32) -> Llm {
        let info = Info {
            model: String::new(),
            backend: "cpu",
            device: String::new(),
            limits: LIMITS,
            vocab: 100,
            dims: DIMS,
            weight_bytes: 0,
            page_bytes: 0,
            memory_total: 0,
            memory_free_loaded: 0,
            memory_free_before_recording: 0,
            memory_free_ready: 0,
            load_seconds: 0.0,
            capture_seconds: 0.0,
        };
        let runner = Box::new(Failing { steps_left, requests: Vec::new() });
        Llm { runner, text: Text::default(), info, failed: false }
    }

    #[test]
    fn a_failed_step_keeps_what_had_finished_and_the_model_says_so_ever_after() {
        let mut llm = failing(2);
        let requests: Vec<_> = (0..4).map(|_| GenerateRequest::tokens([1])).collect();
        let Err(Error::Step { cause, finished }) = llm.generate(&requests) else { panic!("the step fails") };
        assert_eq!(cause.to_string(), "the kernel `down` failed");
        let finished: Vec<_> = finished.into_iter().map(|(index, one)| (index, one.finish_reason)).collect();
        assert_eq!(finished, [(0, FinishReason::Length), (1, FinishReason::Length)]);
        assert!(matches!(llm.generate(&requests), Err(Error::Failed)));
        assert!(matches!(llm.prompt_logits(&[1]), Err(Error::Failed)));
    }

    #[test]
    fn a_stream_has_delivered_what_finished_before_a_step_failed() {
        let mut ends = Vec::new();
        let requests = (0..4).map(|_| GenerateRequest::tokens([1]));
        let outcome = failing(3).generate_stream(requests, |event| {
            if let StreamEvent::Finished { index, .. } = event {
                ends.push(index);
            }
            Flow::Continue
        });
        assert!(matches!(outcome, Err(Error::Step { finished, .. }) if finished.is_empty()));
        assert_eq!(ends, [0, 1, 2]);
    }
}
