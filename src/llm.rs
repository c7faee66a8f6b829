//! The model behind one handle: opened once, then asked as often as one likes.
//!
//! ```text
//!   directory or preset ── Checkpoint ── Backend ── Decoder::load ── pages counted ── Engine ──> Front ──> Llm
//! ```
//!
//! The engine is built on the thread that it stays on; every method asks it through its handle.

use std::num::NonZero;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use minisgl_core::backend::{Device, DeviceInfo, Memory};
use minisgl_core::config::{Limits, LimitsError};
use minisgl_core::engine::{Engine, EngineOptions};
use minisgl_core::executor::{Executor, ModelInfo};
use minisgl_core::local::Local;
use minisgl_core::scheduler::{Order, Settings};
use minisgl_core::shard::Rank;
use minisgl_core::spec::DecoderSpec;
use minisgl_core::stats::{ExpertsRead, Stats};
use minisgl_cpu::{Cpu, Link};
use minisgl_cuda::{Cuda, CudaError, KernelSet, Link as GpuLink};
use minisgl_decoder::{Checkpoint, Decoder, LoadError, NamedTensor, WeightUpdate};
use minisgl_ranks::Ranks;

use crate::device::Choice;
use crate::diagnostics::{Ceilings, Diagnostics};
use crate::embed::{EmbedRequest, Embedding};
use crate::error::Error;
use crate::front::{Built, EngineHandle, Events, Front, SessionEvent, SessionOptions};
use crate::info::{ExpertsInfo, Info};
use crate::memory::{PagePlan, Sequence, check_asked, check_balance, check_host, share_within, warning};
use crate::models::FAMILIES;
use crate::options::{KernelChoice, Options, Quantize};
use crate::pooling::Pooling;
use crate::request::{
    ChatPrompt, Completion, Flow, GenerateRequest, Prompt, RequestError, RerankRequest, StreamEvent,
};
use crate::rerank::{Relevance, answers};
use crate::runner::RunnerExecutor;
use crate::running::{self, Costs};
use crate::score::{Score, ScoreRequest};
use crate::simulated::{self, Control, SimulatedDevice, SimulatedExecutor};
use crate::source::ModelSource;
use crate::streaming::Streaming;
use crate::telemetry::Probe;
use crate::tokenizer::Text;
use crate::weights::{self, Weights};

/// A model on a device, ready to generate. See the [crate's page](crate) for an example.
///
/// It owns its engines, one or, by [`LlmBuilder::data_parallel`](crate::LlmBuilder::data_parallel), several behind one queue:
/// dropping it ends their threads and gives the devices' memory back.
pub struct Llm {
    front: Front,
    text: Arc<Text>,
    info: Info,
    /// A simulated model has none.
    weights: Option<Weights>,
    /// Are they others than those in the model's files?
    updated: bool,
}

impl Llm {
    pub(crate) fn open(
        source: ModelSource,
        weights: Option<Weights>,
        options: Options,
        choice: Choice,
    ) -> Result<Llm, Error> {
        let updated = weights.is_some();
        let weights = match weights {
            Some(weights) => weights,
            None => Weights(Arc::new(open_checkpoint(&source, &options)?)),
        };
        let text = Arc::new(source.folder().map_or(Ok(Text::default()), Text::open)?);
        let pooling = source.folder().map_or_else(Pooling::default, Pooling::open);
        let (order, engines) = (options.order, options.engines()?);
        let Weights(checkpoint) = weights.clone();
        let has_weights = options.simulate.is_none();
        let opening = Opening { source, choice, checkpoint, text: text.clone(), options, engines };
        let opening = Arc::new(opening);
        let build = |engine| {
            let opening = opening.clone();
            move || opening.engine(engine)
        };
        let (front, infos) = Front::start(text.clone(), pooling, order, (0..engines).map(build).collect())?;
        // Engines differ in their devices and memory alone; the first speaks for all.
        let info = infos.into_iter().next().ok_or(Error::NoEngine)?;
        Ok(Llm { front, text, info, weights: has_weights.then_some(weights), updated })
    }

    /// A model without weights, and what is seen of its engine; see [`crate::simulated`].
    ///
    /// # Errors
    /// A thread that the system does not give.
    pub fn simulated(control: Control, text: Text) -> Result<(Llm, Arc<Control>), Error> {
        let (text, info) = (Arc::new(text), simulated::info(control.limits));
        let (front, control) = simulated::start_with(control, text.clone(), Order::Given)?;
        Ok((Llm { front, text, info, weights: None, updated: false }, control))
    }

    /// The engine from any thread: requests of their own, sessions of many.
    pub fn handle(&self) -> EngineHandle {
        self.front.handle().clone()
    }

    /// Runs all requests; completions come in the order of the requests, those of a request's samples one behind the other.
    ///
    /// # Errors
    /// A step failed; the error holds what had finished. A request that can't run is no error: its completion says so.
    pub fn generate(&mut self, requests: &[GenerateRequest]) -> Result<Vec<Completion>, Error> {
        let mut completions: Vec<Vec<Completion>> = vec![Vec::new(); requests.len()];
        let outcome = self.drive(SessionOptions::default(), requests.iter().cloned(), |event, _| {
            if let SessionEvent::Finished { tag, completion, .. } = event {
                completions[tag as usize].push(*completion);
            }
            true
        });
        completions.iter_mut().for_each(|samples| samples.sort_by_key(|one| one.sample));
        match outcome {
            Ok(()) => Ok(completions.into_iter().flatten().collect()),
            Err(Error::Step { cause, .. }) => {
                let finished = completions.into_iter().enumerate();
                let finished =
                    finished.flat_map(|(index, samples)| samples.into_iter().map(move |one| (index, one)));
                Err(Error::Step { cause, finished: finished.collect() })
            }
            Err(error) => Err(error),
        }
    }

    /// Runs requests as they come out of an iterator, pulled when there is room for them, and hands every token, end
    /// and step to `on_event`, which may abort them. What an aborted request has is what was handed over before.
    ///
    /// # Errors
    /// A step failed; what had finished was delivered.
    pub fn generate_stream(
        &mut self,
        requests: impl IntoIterator<Item = GenerateRequest>,
        on_event: impl FnMut(StreamEvent<'_>) -> Flow,
    ) -> Result<(), Error> {
        let options = SessionOptions { tokens: true, text: true, steps: true, ..SessionOptions::default() };
        let mut stream = Streaming::new(on_event);
        self.drive(options, requests, |event, events| stream.hear(event, events))
    }

    /// Submits requests as there is room, and hands events on until all have ended; none is submitted any more once
    /// `on_event` gives false.
    fn drive(
        &self,
        options: SessionOptions,
        requests: impl IntoIterator<Item = GenerateRequest>,
        mut on_event: impl FnMut(SessionEvent, &mut Events) -> bool,
    ) -> Result<(), Error> {
        let (submitter, mut events) = self.front.handle().session(options);
        let mut submitter = Some(submitter);
        let mut requests = (0..).zip(requests).fuse();
        let mut refused = Ok(());
        loop {
            if let Some(open) = &mut submitter {
                let room = open.room();
                let mut submitted = 0;
                let pulled = requests.by_ref().take(room).inspect(|_| submitted += 1);
                refused = open.submit_all(pulled);
                if submitted < room || refused.is_err() {
                    submitter = None;
                }
            }
            match events.next() {
                Some(event) => {
                    if !on_event(event?, &mut events) {
                        submitter = None;
                    }
                }
                None => return refused,
            }
        }
    }

    /// Scores completions behind prompts, one prefill each; scores come in the order of the requests.
    ///
    /// # Errors
    /// As for [`Llm::generate`], but for what had finished. A request that can't run is no error: its score says so.
    pub fn score(&mut self, requests: &[ScoreRequest]) -> Result<Vec<Score>, Error> {
        let requests: Vec<GenerateRequest> = requests.iter().cloned().map(Into::into).collect();
        Ok(self.generate(&requests)?.into_iter().map(Score::from).collect())
    }

    /// Embeds prompts, one prefill each; embeddings come in the order of the requests.
    ///
    /// # Errors
    /// As for [`Llm::score`]. A prompt that can't be embedded is no error: its embedding says so.
    pub fn embed(&mut self, requests: &[EmbedRequest]) -> Result<Vec<Embedding>, Error> {
        let requests: Vec<GenerateRequest> = requests.iter().cloned().map(Into::into).collect();
        Ok(self.generate(&requests)?.into_iter().map(Embedding::from).collect())
    }

    /// Judges how relevant documents are to queries, with a Qwen3-Reranker; in the order of the requests.
    ///
    /// # Errors
    /// As for [`Llm::score`]. A document that can't be judged has an error of its own.
    pub fn rerank(
        &mut self,
        requests: &[RerankRequest],
    ) -> Result<Vec<Result<Relevance, RequestError>>, Error> {
        let answers = requests.iter().flat_map(|request| answers(&Prompt::Rerank(request.clone())));
        let scores = self.score(&answers.collect::<Vec<_>>())?;
        let (answered, _) = scores.as_chunks();
        Ok(answered.iter().map(|[yes, no]| Relevance::of(yes, no)).collect())
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

    /// What the engine did since it was built, or since [`Llm::reset_stats`]; zeros if its thread has ended.
    pub fn stats(&self) -> Stats {
        self.front.handle().stats().unwrap_or_default()
    }

    /// Sets the counters to zero.
    pub fn reset_stats(&mut self) {
        // A thread that has ended counts no more.
        let _ = self.front.handle().call_each(false, |runner| runner.reset_stats());
    }

    /// What steps of decode rows alone have read of layers with experts since the engine was built.
    ///
    /// # Errors
    /// Those of the device.
    pub fn experts_read(&self) -> Result<ExpertsRead, Error> {
        let each = self.front.handle().call_each(false, |runner| runner.experts_read())?;
        let each: Result<Vec<ExpertsRead>, _> = each.into_iter().collect();
        Ok(each.map_err(Error::Device)?.into_iter().fold(ExpertsRead::default(), |sum, read| sum + read))
    }

    /// Forgets all cached prefixes, so that the next run computes every prompt anew.
    pub fn clear_prefix_cache(&mut self) {
        // A thread that has ended has no cache.
        let _ = self.front.handle().call_each(false, |runner| runner.clear_prefix_cache());
    }

    /// Puts tensors in the place of the model's own, under the names of its checkpoint, all of them or some: from then on the model
    /// is, bit for bit, what is loaded from a checkpoint with these tensors. Requests that run end with the old weights before;
    /// those that wait begin with the new ones. Cached prefixes are forgotten.
    ///
    /// The tensors stay on the host, where a later update of others, and [`Llm::updated_weights`], find them.
    ///
    /// # Errors
    /// A name that the model does not have, a shape or a type that is not the model's: then everything is as before. A device that
    /// fails while they are written, [`Error::Update`]: its engine takes no requests any more.
    pub fn update_weights(&mut self, tensors: impl IntoIterator<Item = NamedTensor>) -> Result<(), Error> {
        self.update(weights::given(tensors)?)
    }

    /// As [`Llm::update_weights`], with all tensors of a `*.safetensors` file or of a checkpoint's folder. The files are read as a
    /// whole, and may be written again afterwards.
    ///
    /// # Errors
    /// As there; and files that can't be read.
    pub fn update_weights_from(&mut self, path: impl AsRef<Path>) -> Result<(), Error> {
        self.update(weights::read(path.as_ref())?)
    }

    fn update(&mut self, update: WeightUpdate) -> Result<(), Error> {
        let handle = self.front.handle();
        handle.check_running()?;
        let (weights, changed) = self.weights.as_ref().ok_or(Error::NoWeights)?.with(update)?;
        tracing::info!(tensors = changed.len(), "updating weights");
        let (Weights(checkpoint), changed) = (weights.clone(), Arc::new(changed));
        self.info.weight_bytes = checkpoint.tensors().step_bytes();
        // Engines that go on have the new ones, whatever becomes of others.
        (self.weights, self.updated) = (Some(weights), true);
        let each = handle.call_working(true, move |runner| match runner.has_stopped() {
            true => Ok(()), // It has failed meanwhile, and runs nothing any more.
            false => runner.update_weights(&checkpoint, &changed),
        });
        each?.into_iter().collect::<Result<_, _>>().map_err(Error::Update)
    }

    /// What [`Llm::update_weights`] has made of the weights, to build another engine of this model with
    /// ([`LlmBuilder::weights`](crate::LlmBuilder::weights)); `None` where they are those in the model's files.
    pub fn updated_weights(&self) -> Option<Weights> {
        self.weights.clone().filter(|_| self.updated)
    }

    /// Measures what the devices of all engines reach at best, together: a second of their time, once nothing runs. `None` on
    /// the CPU.
    ///
    /// # Errors
    /// Those of the devices.
    pub fn ceilings(&mut self) -> Result<Option<Ceilings>, Error> {
        let each = self.front.handle().call_each(true, |runner| runner.ceilings())?;
        let each: Result<Vec<Option<Ceilings>>, _> = each.into_iter().collect();
        Ok(each.map_err(Error::Device)?.into_iter().flatten().reduce(Ceilings::joined))
    }

    /// Where to ask for the first engine's device's clocks and what holds them down, at any time and from any thread; `None` on
    /// the CPU.
    pub fn probe(&self) -> Option<Probe> {
        self.front.handle().call(false, |runner| runner.probe()).ok()?
    }

    /// Asserts that no KV page is lost or shared wrongly. Takes time linear in the pool.
    ///
    /// # Panics
    /// When the engine's books are wrong.
    pub fn check(&self) {
        // A thread that has ended has no books.
        let _ = self.front.handle().check();
    }
}

/// The model's files.
fn open_checkpoint(source: &ModelSource, options: &Options) -> Result<Checkpoint, Error> {
    let checkpoint = match source.folder() {
        None => Checkpoint::preset(source.name(), FAMILIES),
        Some(folder) => Checkpoint::open(folder, FAMILIES),
    };
    let checkpoint = checkpoint.map_err(|cause| Error::Model(cause.into()))?;
    let checkpoint = match options.quantize {
        Some(Quantize::Fp8) => checkpoint.quantized(),
        None => checkpoint,
    };
    let checkpoint = if options.plain_inputs { checkpoint.with_plain_inputs() } else { checkpoint };
    Ok(checkpoint.with_kv(options.kv_dtype))
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

/// How long a rank is waited for by the others, within a step and at its end: longer than any of them computes, were the machine short of memory.
const RANK_PATIENCE: Duration = Duration::from_secs(120);
/// Likewise on GPUs, where ranks' kernels wait for each other.
const GPU_RANK_PATIENCE: Duration = Duration::from_secs(8);

/// What engines are built from.
struct Opening {
    source: ModelSource,
    choice: Choice,
    checkpoint: Arc<Checkpoint>,
    text: Arc<Text>,
    options: Options,
    engines: usize,
}

impl Opening {
    /// Builds an engine on its device, on the thread that it stays on.
    fn engine(&self, engine: usize) -> Built<Info> {
        let started = Instant::now();
        if let Some(device) = &self.options.simulate {
            return self.simulated(device, started);
        }
        if !self.choice.on_gpu {
            let processors = thread::available_parallelism().map_or(1, NonZero::get);
            let (ranks, engines) = (self.options.tensor_parallel, self.engines);
            return match ranks {
                1 => self.on(Cpu::with_threads(processors / engines), started),
                _ => self.on_ranks(processors / (engines * ranks as usize), started),
            };
        }
        let kernels = match self.options.kernels {
            KernelChoice::Auto => KernelSet::Auto,
            KernelChoice::Portable => KernelSet::Portable,
            KernelChoice::Hopper => KernelSet::Hopper,
        };
        let ranks = self.options.tensor_parallel as usize;
        let device = |at: usize| self.options.devices.get(at).copied().unwrap_or(at);
        if ranks > 1 {
            let devices: Vec<usize> = (engine * ranks..(engine + 1) * ranks).map(device).collect();
            return self.on_gpus(&devices, kernels, started);
        }
        let device = device(engine);
        self.on(Cuda::new(&minisgl_cuda::Options { device, kernels }).map_err(gpu_error)?, started)
    }

    /// An engine of one device.
    fn on<B: Diagnostics + 'static>(&self, mut backend: B, started: Instant) -> Built<Info> {
        let before = backend.memory().map_err(|error| Error::Device(Box::new(error)))?;
        self.build(backend.info(), before, started, || {
            let model = Decoder::load(&mut backend, &self.checkpoint);
            model.map(|model| Local::new(backend, model)).map_err(|error| Error::Device(Box::new(error)))
        })
    }

    /// An engine of several ranks on the CPU, of so many threads each.
    fn on_ranks(&self, threads: usize, started: Instant) -> Built<Info> {
        let ranks = self.options.tensor_parallel;
        let links = Link::group(ranks, RANK_PATIENCE);
        let ends = links.first().map(|link| (link.aborter(), link.renewer()));
        let cpus: Vec<Cpu> = links.into_iter().map(|link| Cpu::of_rank(threads, link)).collect();
        let (first, ends) = cpus.first().zip(ends).ok_or(Error::NoEngine)?;
        let slicing = first.info().slicing;
        self.spec().shard(ranks, slicing).map_err(|error| Error::Model(Box::new(error)))?;
        let before = first.memory().map_err(|error| Error::Device(Box::new(error)))?;
        self.build(first.info(), before, started, || {
            self.start_ranks(cpus.into_iter().map(|cpu| move || Ok(cpu)), RANK_PATIENCE, ends)
        })
    }

    /// An engine of several ranks, each on one of these GPUs.
    fn on_gpus(&self, devices: &[usize], kernels: KernelSet, started: Instant) -> Built<Info> {
        let ranks = self.options.tensor_parallel;
        let links = GpuLink::group(devices, kernels, GPU_RANK_PATIENCE).map_err(gpu_error)?;
        let memory: Vec<Memory> =
            links.iter().map(GpuLink::memory).collect::<Result<_, _>>().map_err(gpu_error)?;
        if !self.options.allow_imbalance {
            check_balance(devices, &memory)?;
        }
        let least = memory.into_iter().min_by_key(|memory| memory.free);
        let (first, before) = links.first().zip(least).ok_or(Error::NoEngine)?;
        let slicing = first.info().slicing;
        self.spec().shard(ranks, slicing).map_err(|error| Error::Model(Box::new(error)))?;
        let ends = (first.aborter(), first.renewer());
        self.build(first.info(), before, started, || {
            let cudas = links.into_iter().map(|link| move || Cuda::of_rank(link));
            self.start_ranks(cudas, GPU_RANK_PATIENCE, ends)
        })
    }

    /// Ranks whose devices come of these, each on its rank's thread, and who wait for each other so long.
    fn start_ranks<B: Diagnostics + 'static, D: FnOnce() -> Result<B, B::Error> + Send + 'static>(
        &self,
        devices: impl Iterator<Item = D>,
        patience: Duration,
        (abort, renew): (impl Fn() + Send + Sync + 'static, impl Fn() + Send + Sync + 'static),
    ) -> Result<Ranks<Local<B, Decoder<B>>>, Error> {
        let count = self.options.tensor_parallel;
        let builder = |(index, device): (u32, D)| {
            let checkpoint = self.checkpoint.clone();
            move || {
                let mut device = device().map_err(LoadError::Device)?;
                let model = Decoder::load_part(&mut device, &checkpoint, Rank { index, count })?;
                Ok::<_, LoadError<B::Error>>(Local::new(device, model))
            }
        };
        let builders = (0..).zip(devices).map(builder).collect();
        Ranks::start(builders, patience, abort, renew).map_err(|error| Error::Device(Box::new(error)))
    }

    fn spec(&self) -> &DecoderSpec {
        &self.checkpoint.config().spec
    }

    fn build<X: RunnerExecutor + 'static>(
        &self,
        device_info: DeviceInfo,
        before: Memory,
        started: Instant,
        load: impl FnOnce() -> Result<X, Error>,
    ) -> Built<Info> {
        let backend_name = if self.choice.on_gpu { "cuda" } else { "cpu" };
        let device = |error: X::Error| Error::Device(Box::new(error));
        let (mut limits, asked) = self.limits(&device_info, before)?;
        let name = &device_info.name;
        tracing::info!(model = self.source.name(), backend = backend_name, device = name, "loading");
        let executor = load()?;
        let (loaded, vocab) = (executor.memory().map_err(device)?, executor.model().vocab);
        let load_seconds = started.elapsed().as_secs_f64();
        let weight_bytes = self.checkpoint.tensors().step_bytes();
        tracing::info!(seconds = load_seconds, bytes = weight_bytes, "weights loaded");

        let plan = match (self.options.num_pages, self.choice.on_gpu) {
            (Some(_), _) => None,
            (None, true) => Some(PagePlan::on_gpu(&limits, asked, self.page_share(before, loaded))),
            (None, false) => {
                let pools = self.engines * self.options.tensor_parallel as usize;
                Some(PagePlan::on_cpu(&limits, asked, pools))
            }
        };
        limits.pages = plan.map_or(limits.pages, |plan| plan.most);
        tracing::debug!(?limits, ?plan, "capacities planned");
        // Ranks may have copies of the same heads.
        let ranks = self.options.tensor_parallel;
        let of_rank = self.spec().shard(ranks, device_info.slicing);
        let of_rank = of_rank.map_err(|error| Error::Model(Box::new(error)))?;
        let page_bytes = of_rank.page_bytes(device_info.kv, limits.page_size) * u64::from(ranks);
        let scheduler = self.scheduler(vocab);
        let eos = self.end_tokens(scheduler.vocab);
        let engine_options = EngineOptions {
            limits,
            fit: plan.map(|plan| plan.fit),
            scheduler,
            eos: eos.clone(),
            overlap: self.options.overlap,
        };
        let engine = Engine::of(executor, engine_options).map_err(|cause| Error::Device(cause.into()))?;

        let ready = engine.executor().memory().map_err(device)?;
        let limits = *engine.limits();
        let warnings = self.text.warnings().iter().cloned().chain(warning(&limits, asked)).collect();
        let info = Info {
            model: self.source.name().to_owned(),
            commit: self.source.commit().map(str::to_owned),
            backend: backend_name,
            choice: self.choice.reason,
            device: engine.info().name,
            engines: self.engines,
            limits,
            dims: self.spec().dims,
            window: self.spec().window(),
            vocab: scheduler.vocab,
            eos,
            warnings,
            weight_bytes,
            active_weights: self.spec().active_weights(),
            experts: ExpertsInfo::of(&self.checkpoint),
            kv: self.spec().kv.unwrap_or(device_info.kv),
            page_bytes,
            memory_total: loaded.total,
            memory_free_loaded: loaded.free,
            memory_free_before_recording: engine.memory_before_recording().free,
            memory_free_ready: ready.free,
            load_seconds,
            capture_seconds: started.elapsed().as_secs_f64() - load_seconds,
        };
        tracing::info!(seconds = info.capture_seconds, pages = limits.pages, costs = ?engine.costs(), "ready");
        Ok((Box::new(engine), info))
    }

    /// An engine whose steps only take time.
    fn simulated(&self, device: &SimulatedDevice, started: Instant) -> Built<Info> {
        let config = self.checkpoint.config();
        let (dims, window) = (config.spec.dims, config.spec.window());
        let model = ModelInfo {
            vocab: dims.vocab,
            hidden: dims.hidden,
            has_head: true,
            max_positions: config.max_positions,
            window,
        };
        let executor = SimulatedExecutor::new(device.clone(), model);
        let (limits, asked) = self.limits(&executor.info(), Memory { free: 0, total: 0 })?;
        let limits = Limits { pages: self.options.num_pages.unwrap_or(device.pages), ..limits };
        check_asked(limits.pages, &limits, asked)?;
        let (scheduler, eos) = (self.scheduler(dims.vocab), self.end_tokens(dims.vocab));
        let overlap = self.options.overlap;
        let engine_options = EngineOptions { limits, fit: None, scheduler, eos: eos.clone(), overlap };
        let engine = Engine::of(executor, engine_options).map_err(|cause| Error::Device(cause.into()))?;
        let info = Info {
            model: self.source.name().to_owned(),
            commit: self.source.commit().map(str::to_owned),
            device: engine.info().name,
            engines: self.engines,
            limits,
            vocab: dims.vocab,
            eos,
            warnings: self.text.warnings().to_vec(),
            dims,
            window,
            capture_seconds: started.elapsed().as_secs_f64(),
            ..simulated::info(limits)
        };
        Ok((Box::new(engine), info))
    }

    /// How steps are scheduled.
    fn scheduler(&self, vocab: u32) -> Settings {
        let Options { policy, prefix_cache, order, speculation, .. } = self.options;
        Settings { policy, prefix_cache, order, speculation, vocab }
    }

    /// The share of the free memory that pages take.
    fn page_share(&self, before: Memory, loaded: Memory) -> f64 {
        match self.options.memory_utilization {
            Some(utilization) => share_within(utilization, before, loaded),
            None => self.options.memory_ratio,
        }
    }

    /// What ends an output: the tokens that the model's configuration names, and the tokenizer's.
    fn end_tokens(&self, vocab: u32) -> Vec<u32> {
        let mut eos = self.checkpoint.config().eos.clone();
        eos.retain(|id| *id < vocab);
        eos.extend(self.text.eos().filter(|id| *id < vocab && !eos.contains(id)));
        eos
    }

    /// The capacities: as asked for, else by the device and the model; pages that are not asked for are counted when the
    /// weights are there. So what can't hold is found before they are loaded.
    fn limits(&self, device: &DeviceInfo, memory: Memory) -> Result<(Limits, Sequence), Error> {
        let Options { max_queued, max_seq_len, .. } = self.options;
        let max = self.checkpoint.config().max_positions;
        let sequence = max_seq_len.unwrap_or(max);
        if sequence > max {
            return Err(Error::SequenceTooLong { asked: sequence, max });
        }
        let page_size = self.options.page_size.unwrap_or(device.page_size_min.max(16));
        let running = match self.options.max_running {
            Some(running) => running,
            None if self.choice.on_gpu => self.costs(device, memory, sequence, page_size).running(),
            None => running::ON_CPU,
        };
        let on_cpu = !self.choice.on_gpu && self.options.simulate.is_none();
        let prefill_tokens = if on_cpu { 1024 } else { 16384 };
        let limits = Limits {
            running,
            queued: max_queued,
            sequence,
            prefill_tokens: self.options.max_prefill_tokens.unwrap_or(prefill_tokens),
            page_size,
            pages: self.options.num_pages.unwrap_or(1),
            graph_rows: self.options.max_graph_batch.unwrap_or(running).min(running),
        };
        limits.check()?;
        let min = device.page_size_min;
        if page_size < min {
            return Err(LimitsError::PageSizeBelowMin { page_size, min }.into());
        }
        check_host(&limits, &self.checkpoint.config().spec.dims, self.engines, self.options.tensor_parallel)?;
        let asked = if max_seq_len.is_some() { Sequence::Asked } else { Sequence::OfModel };
        self.options.num_pages.map_or(Ok(()), |pages| check_asked(pages, &limits, asked))?;
        Ok((limits, asked))
    }

    /// What the number of requests at once depends on, the weights not being loaded yet.
    fn costs(&self, device: &DeviceInfo, memory: Memory, sequence: u32, page_size: u32) -> Costs {
        /// Where nobody says.
        const USUAL_TOKENS: u32 = 1024;
        let Options { usual_tokens, memory_ratio, .. } = self.options;
        let spec = &self.checkpoint.config().spec;
        // Each of several ranks has a part.
        let ranks = u64::from(self.options.tensor_parallel);
        let weight_bytes = self.checkpoint.tensors().step_bytes() / ranks;
        let idle_bytes = ExpertsInfo::of(&self.checkpoint).map_or(0, |experts| experts.idle_bytes()) / ranks;
        let left = memory.free.saturating_sub(weight_bytes);
        Costs {
            weight_bytes,
            active_weight_bytes: weight_bytes - idle_bytes,
            kv_bytes_per_token: spec.page_bytes(device.kv, page_size) / u64::from(page_size) / ranks,
            tokens: u64::from(usual_tokens.unwrap_or(USUAL_TOKENS).min(sequence)),
            cache_bytes: (left as f64 * memory_ratio) as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::FinishReason;
    use crate::simulated::{Control, request};

    /// A model whose engine fails at a step.
    fn failing(fails_at: u64) -> Llm {
        let control = Control { fails_at: Some(fails_at), ..Control::default() };
        Llm::simulated(control, Text::default()).unwrap().0
    }

    /// The request that ends with step i is the i-th.
    fn requests() -> Vec<GenerateRequest> {
        (0..4).map(|i| request(0, i + 1)).collect()
    }

    #[test]
    fn a_failed_step_keeps_what_had_finished_and_the_model_says_so_ever_after() {
        let mut llm = failing(2);
        let Err(Error::Step { cause, finished }) = llm.generate(&requests()) else {
            panic!("the step fails")
        };
        assert_eq!(cause.to_string(), "the kernel `down` failed");
        let finished: Vec<_> = finished.into_iter().map(|(index, one)| (index, one.finish_reason)).collect();
        assert_eq!(finished, [(0, FinishReason::Length), (1, FinishReason::Length)]);
        assert!(matches!(llm.generate(&requests()), Err(Error::Failed)));
        assert!(matches!(llm.score(&[ScoreRequest::tokens([1], [2])]), Err(Error::Failed)));
    }

    #[test]
    fn a_stream_has_delivered_what_finished_before_a_step_failed() {
        let mut ends = Vec::new();
        let outcome = failing(3).generate_stream(requests(), |event| {
            if let StreamEvent::Finished { index, .. } = event {
                ends.push(index);
            }
            Flow::Continue
        });
        assert!(matches!(outcome, Err(Error::Step { finished, .. }) if finished.is_empty()));
        assert_eq!(ends, [0, 1, 2]);
    }
}
