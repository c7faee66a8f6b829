//! How an engine is opened: a checkpoint's weights on a device or several ranks, buffers, pages for what is left.
//!
//! ```text
//!   checkpoint ── device, or one a rank ── Decoder::load ── limits ── Engine, pages counted
//! ```
//!
//! All of it happens on the thread that the engine stays on.

use std::num::NonZero;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use minisgl_core::backend::{Device, DeviceInfo, Memory};
use minisgl_core::config::{Limits, LimitsError};
use minisgl_core::engine::{Engine, EngineOptions};
use minisgl_core::executor::{Executor, ModelInfo};
use minisgl_core::local::Local;
use minisgl_core::scheduler::Settings;
use minisgl_core::shard::Rank;
use minisgl_core::spec::{DecoderSpec, Inputs, WeightFormat};
use minisgl_cpu::{Cpu, Link};
use minisgl_cuda::{Cuda, CudaError, KernelSet, Link as GpuLink, Properties, SLICING};
use minisgl_decoder::{Checkpoint, Decoder, LoadError};
use minisgl_ranks::Ranks;

use crate::device::{CUDA, Choice};
use crate::diagnostics::Diagnostics;
use crate::error::Error;
use crate::front::Built;
use crate::info::{ExpertsInfo, Info};
use crate::memory::{PagePlan, Sequence, check_asked, check_balance, check_host, share_within, warning};
use crate::models::FAMILIES;
use crate::options::{Options, Quantize};
use crate::runner::RunnerExecutor;
use crate::running::{self, Costs};
use crate::simulated::{self, SimulatedDevice, SimulatedExecutor};
use crate::source::ModelSource;
use crate::tokenizer::Text;

/// The model's files.
///
/// # Errors
/// They can't be read, or the GPU does not compute what they would be made.
pub fn open_checkpoint(
    source: &ModelSource,
    options: &Options,
    choice: &Choice,
) -> Result<Checkpoint, Error> {
    let checkpoint = match source.folder() {
        None => Checkpoint::preset(source.name(), FAMILIES),
        Some(folder) => Checkpoint::open(folder, FAMILIES),
    };
    let checkpoint = checkpoint.map_err(|cause| Error::Model(cause.into()))?;
    let checkpoint = match options.quantize {
        Some(Quantize::Fp8) => {
            if choice.on_gpu {
                check_quantized(checkpoint.quantized_spec(), options)?;
            }
            checkpoint.quantized()
        }
        None => checkpoint,
    };
    let checkpoint = if options.plain_inputs { checkpoint.with_plain_inputs() } else { checkpoint };
    Ok(checkpoint.with_kv(options.kv_dtype))
}

/// Does the first GPU compute such a model? Rounding its weights takes long, so that is asked before.
fn check_quantized(mut spec: DecoderSpec, options: &Options) -> Result<(), Error> {
    spec.kv = options.kv_dtype;
    if let WeightFormat::Fp8(format) = &mut spec.weights
        && options.plain_inputs
    {
        format.inputs = Inputs::Plain;
    }
    let device = options.devices.first().copied().unwrap_or(0);
    let properties = Properties::of(device, options.kernels).map_err(gpu_error)?;
    let ranks = options.tensor_parallel;
    let of_rank = spec.shard(ranks, SLICING).map_err(|error| Error::Model(Box::new(error)))?;
    let supported = properties.supports(&of_rank, Rank { index: 0, count: ranks });
    supported.map_err(|error| Error::Device(Box::new(error)))
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
pub struct Opening {
    pub source: ModelSource,
    pub choice: Choice,
    pub checkpoint: Arc<Checkpoint>,
    pub text: Arc<Text>,
    pub options: Options,
    pub engines: usize,
}

impl Opening {
    /// Builds an engine on its device, on the thread that it stays on.
    pub fn engine(&self, engine: usize) -> Built<Info> {
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
        let kernels = self.options.kernels;
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
        let backend_name = if self.choice.on_gpu { CUDA } else { "cpu" };
        let device = |error: X::Error| Error::Device(Box::new(error));
        let (mut limits, asked) = self.limits(&device_info, before)?;
        let name = &device_info.name;
        tracing::info!(model = self.source.name(), backend = backend_name, device = name, "loading");
        let executor = load()?;
        let (loaded, vocab) = (executor.memory().map_err(device)?, executor.model().vocab);
        let load_seconds = started.elapsed().as_secs_f64();
        let step_weight_bytes = self.checkpoint.tensors().step_bytes();
        tracing::info!(seconds = load_seconds, bytes = step_weight_bytes, "weights loaded");

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
        let warnings = self.warnings().chain(warning(&limits, asked)).collect();
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
            step_weight_bytes,
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
            warnings: self.warnings().collect(),
            dims,
            window,
            capture_seconds: started.elapsed().as_secs_f64(),
            ..simulated::info(limits)
        };
        Ok((Box::new(engine), info))
    }

    /// What the user should hear of the model's name and its files.
    fn warnings(&self) -> impl Iterator<Item = String> {
        self.source.warning().into_iter().chain(self.text.warnings().iter().cloned())
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
        // Each of several ranks has a part, and of few key heads a copy.
        let ranks = u64::from(self.options.tensor_parallel);
        let part = spec.shard(self.options.tensor_parallel, device.slicing);
        let step_weight_bytes = self.checkpoint.tensors().step_bytes() / ranks;
        let idle_bytes = ExpertsInfo::of(&self.checkpoint).map_or(0, |experts| experts.idle_bytes()) / ranks;
        let left = memory.free.saturating_sub(step_weight_bytes);
        Costs {
            step_weight_bytes,
            active_weight_bytes: step_weight_bytes - idle_bytes,
            kv_bytes_per_token: part.as_ref().unwrap_or(spec).page_bytes(device.kv, page_size)
                / u64::from(page_size),
            tokens: u64::from(usual_tokens.unwrap_or(USUAL_TOKENS).min(sequence)),
            cache_bytes: (left as f64 * memory_ratio) as u64,
        }
    }
}
