//! Setting up an [`Llm`]: one method a setting, then [`LlmBuilder::build`].

use minisgl_core::kv::KvFormat;
use minisgl_core::policy::Policy;
use minisgl_core::scheduler::Order;
use minisgl_core::speculation::Speculation;
use minisgl_cuda::KernelSet;

use crate::device::BackendChoice;
use crate::error::Error;
use crate::llm::Llm;
use crate::options::{Options, Quantize};
use crate::source::ModelSource;
use crate::weights::Weights;

/// Settings of an engine to be built; see [`Options`] for what each means and its default.
#[derive(Clone, Debug)]
pub struct LlmBuilder {
    model: Model,
    weights: Option<Weights>,
    options: Options,
}

#[derive(Clone, Debug)]
enum Model {
    /// To be found.
    Name(String),
    Found(ModelSource),
}

impl Llm {
    /// Sets up a model: a checkpoint's directory, a preset's name (`tiny`, `qwen3-0.6b`, …: dummy weights of that size), or
    /// a name on the Hugging Face hub, whose files are fetched; [`ModelSource::find`] does the same and takes a revision. A
    /// directory that is named like a preset is meant by `./tiny`.
    pub fn builder(model: impl Into<String>) -> LlmBuilder {
        LlmBuilder::of(Model::Name(model.into()))
    }
}

impl ModelSource {
    /// Sets up an engine for it.
    pub fn builder(self) -> LlmBuilder {
        LlmBuilder::of(Model::Found(self))
    }
}

impl LlmBuilder {
    fn of(model: Model) -> Self {
        LlmBuilder { model, weights: None, options: Options::default() }
    }

    /// All settings at once.
    pub fn options(mut self, options: Options) -> Self {
        self.options = options;
        self
    }

    /// Begins with these weights in the place of those in the model's files: with what an [`Llm`] of the same model has.
    pub fn weights(mut self, weights: Weights) -> Self {
        self.weights = Some(weights);
        self
    }

    /// Which device computes.
    pub fn backend(mut self, backend: BackendChoice) -> Self {
        self.options.backend = backend;
        self
    }

    /// Which GPUs, an engine on each, or a rank of one; naming one asks for GPUs.
    pub fn devices(mut self, devices: impl IntoIterator<Item = usize>) -> Self {
        self.options.devices = devices.into_iter().collect();
        self
    }

    /// How many engines take requests out of one queue.
    pub fn data_parallel(mut self, engines: usize) -> Self {
        self.options.data_parallel = Some(engines);
        self
    }

    /// How many ranks compute each step of an engine together, each on a GPU of its own.
    pub fn tensor_parallel(mut self, ranks: u32) -> Self {
        self.options.tensor_parallel = ranks;
        self
    }

    /// Let the GPUs of ranks have more and less memory free.
    pub fn allow_imbalance(mut self, allow: bool) -> Self {
        self.options.allow_imbalance = allow;
        self
    }

    /// Which GPU kernels run.
    pub fn kernels(mut self, kernels: KernelSet) -> Self {
        self.options.kernels = kernels;
        self
    }

    /// Requests that run at once.
    pub fn max_running(mut self, requests: u32) -> Self {
        self.options.max_running = Some(requests);
        self
    }

    /// Requests that wait inside the engine.
    pub fn max_queued(mut self, requests: u32) -> Self {
        self.options.max_queued = requests;
        self
    }

    /// Tokens of prompts in a step.
    pub fn max_prefill_tokens(mut self, tokens: u32) -> Self {
        self.options.max_prefill_tokens = Some(tokens);
        self
    }

    /// Tokens of a KV page, a power of two.
    pub fn page_size(mut self, tokens: u32) -> Self {
        self.options.page_size = Some(tokens);
        self
    }

    /// KV pages; `None`: as many as memory holds.
    pub fn num_pages(mut self, pages: Option<u32>) -> Self {
        self.options.num_pages = pages;
        self
    }

    /// Share of the free memory that the KV pages take.
    pub fn memory_ratio(mut self, ratio: f64) -> Self {
        self.options.memory_ratio = ratio;
        self
    }

    /// Tokens of a sequence; `None`: all that the model's positions reach.
    pub fn max_seq_len(mut self, tokens: Option<u32>) -> Self {
        self.options.max_seq_len = tokens;
        self
    }

    /// Rows of the largest recorded decode step; 0 records none.
    pub fn max_graph_batch(mut self, rows: u32) -> Self {
        self.options.max_graph_batch = Some(rows);
        self
    }

    /// Schedule a step while the one before runs.
    pub fn overlap(mut self, overlap: bool) -> Self {
        self.options.overlap = overlap;
        self
    }

    /// Reuse the KV pages of equal prefixes.
    pub fn prefix_cache(mut self, on: bool) -> Self {
        self.options.prefix_cache = on;
        self
    }

    /// In which order waiting requests are admitted.
    pub fn order(mut self, order: Order) -> Self {
        self.options.order = order;
        self
    }

    /// What a step is made of.
    pub fn policy(mut self, policy: Policy) -> Self {
        self.options.policy = policy;
        self
    }

    /// When tokens are drafted from what a text said before.
    pub fn speculation(mut self, speculation: Speculation) -> Self {
        self.options.speculation = speculation;
        self
    }

    /// What keys and values are kept as; `None` leaves it to the device.
    pub fn kv_dtype(mut self, format: Option<KvFormat>) -> Self {
        self.options.kv_dtype = format;
        self
    }

    /// Make weights in bf16, f16 or f32 something else when they are loaded.
    pub fn quantize(mut self, quantize: Option<Quantize>) -> Self {
        self.options.quantize = quantize;
        self
    }

    /// Apply fp8 matrices to activations as they are, whatever the checkpoint says of rounding them.
    pub fn plain_inputs(mut self, on: bool) -> Self {
        self.options.plain_inputs = on;
        self
    }

    /// Loads the model and makes the engine ready to run.
    ///
    /// # Errors
    /// What is wrong with the model, the device or the settings.
    pub fn build(self) -> Result<Llm, Error> {
        self.options.check()?;
        let choice = self.options.device()?;
        let source = match self.model {
            Model::Name(name) => ModelSource::find(&name, None, None)?,
            Model::Found(source) => source,
        };
        Llm::open(source, self.weights, self.options, choice)
    }
}
