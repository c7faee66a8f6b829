//! What can stop an [`Llm`](crate::Llm): each error says what to do about it.

use std::path::PathBuf;

use minisgl_core::config::LimitsError;
use thiserror::Error;

use crate::options::ENGINES_MAX;
use crate::request::Completion;

/// An error of a crate below, kept whole as the cause.
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

/// What else a model's name may be.
const HUB: &str = if cfg!(feature = "hub") {
    "nor a model's name on the Hugging Face hub (OWNER/NAME)"
} else {
    "nor can this build fetch models from the Hugging Face hub, for want of the feature `hub` (build it with that, or give a directory)"
};

/// Why a model could not be opened or a run not be finished. What concerns one request alone is a
/// [`RequestError`](crate::RequestError).
#[derive(Debug, Error)]
pub enum Error {
    /// Neither a directory nor a preset nor a name that this build fetches.
    #[error("{name} is neither a directory that is there, nor a preset ({presets}), {HUB}; check --model")]
    NoModel {
        /// As asked for.
        name: String,
        /// The presets there are.
        presets: String,
    },
    /// A revision of something that has none.
    #[error(
        "--revision {revision} is of models by name, and {name} is a directory or a preset; leave --revision out, or give \
         OWNER/NAME"
    )]
    Revision {
        /// The model.
        name: String,
        /// As asked for.
        revision: String,
    },
    /// The checkpoint, or a repository that it was to come from.
    #[error("{0}")]
    Model(#[source] Cause),
    /// Sampling defaults that can't be read.
    #[error("{}: {reason}; correct it, or leave it aside (--generation-config none)", path.display())]
    GenerationConfig {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A GPU is named where there is none to be used.
    #[error("{asked} names a GPU, and {reason}; leave it out to compute on the CPU")]
    NoGpu {
        /// What names it.
        asked: String,
        /// Why there is none.
        reason: &'static str,
    },
    /// More than the host's memory.
    #[error(
        "{running} running and {queued} queued requests of up to {sequence} tokens, in each of {engines} engines{}, take {needed} \
         bytes of host memory, and {free} are free; lower --max-running or --max-seq-len, or run fewer engines", of_ranks(.ranks)
    )]
    HostMemory {
        /// Engines behind the queue.
        engines: usize,
        /// Ranks of each.
        ranks: u32,
        /// Requests that run at once.
        running: u32,
        /// Requests that wait.
        queued: u32,
        /// Tokens of a sequence.
        sequence: u32,
        /// Bytes that they take.
        needed: u64,
        /// Bytes that this process can still have.
        free: u64,
    },
    /// The GPU can't be opened.
    #[error("{0} (--backend cpu computes without a GPU)")]
    Gpu(#[source] Cause),
    /// The device, while the model was loaded or the engine built.
    #[error("{0}")]
    Device(#[source] Cause),
    /// Capacities that make no engine.
    #[error(transparent)]
    Limits(#[from] LimitsError),
    /// Longer than the model's positions reach.
    #[error(
        "a sequence limit of {asked} tokens is beyond the {max} positions of the model; lower --max-seq-len"
    )]
    SequenceTooLong {
        /// As asked for.
        asked: u32,
        /// What the model takes.
        max: u32,
    },
    /// Fewer pages than a sequence takes.
    #[error(
        "{asked} KV pages of {page_size} tokens are fewer than a request may need; give --num-pages {least} at least, or lower \
         --max-seq-len"
    )]
    TooFewPages {
        /// As asked for.
        asked: u32,
        /// That one request needs.
        least: u32,
        /// Tokens of a page.
        page_size: u32,
    },
    /// A simulated device of no use.
    #[error("the simulated device {} can't be read: {reason}; docs/serving.md has an example", path.display())]
    SimulatedDevice {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Nobody would run anything.
    #[error("--data-parallel 0 asks for no engine; at least one is needed")]
    NoEngine,
    /// More than any machine has devices for.
    #[error("--data-parallel {0} asks for more engines than {ENGINES_MAX}; give as many as there are GPUs")]
    TooManyEngines(usize),
    /// A number of ranks whose sums can't be added in pairs.
    #[error(
        "--tensor-parallel {0} is no number of ranks; there are 1, 2, 4 or 8, for sums over them are added in pairs"
    )]
    Ranks(u32),
    /// Ranks on a simulated device.
    #[error(
        "--tensor-parallel {0} and --simulate exclude each other: a simulated device stands for all of an engine"
    )]
    RanksSimulated(u32),
    /// An engine has one device for each of its ranks.
    #[error(
        "--data-parallel {engines} and --devices, which names {devices}, differ: each engine runs on {ranks} of them \
         (--tensor-parallel); leave one of the flags out, or name {} GPUs", engines.saturating_mul(*ranks)
    )]
    DevicesDiffer {
        /// Engines asked for.
        engines: usize,
        /// Ranks of each.
        ranks: usize,
        /// GPUs named.
        devices: usize,
    },
    /// Two ranks on one GPU.
    #[error(
        "GPU {0} is named twice: with --tensor-parallel each rank of each engine needs one of its own, for kernels that wait for other \
         ranks would hold the places of those that they wait for"
    )]
    DeviceTwice(usize),
    /// Some GPUs would be left over.
    #[error(
        "--devices names {devices} GPUs, which engines of {ranks} ranks (--tensor-parallel) can't share out; name as many for \
         each engine"
    )]
    DevicesLeftOver {
        /// Ranks of an engine.
        ranks: usize,
        /// GPUs named.
        devices: usize,
    },
    /// Ranks with more memory and with less.
    #[error(
        "the GPUs have more and less memory free ({free}), and all ranks get as many KV pages as the one with the least; end what \
         else uses them, or let it be so (--allow-imbalance)"
    )]
    Imbalance {
        /// Each one's.
        free: String,
    },
    /// What is no share of memory.
    #[error("{option} is {share}; it must be above 0 and at most 1")]
    MemoryShare {
        /// Which option it is.
        option: &'static str,
        /// As asked for.
        share: f64,
    },
    /// A tokenizer or chat template that cannot be read.
    #[error("{path} cannot be used: {reason}; take the file that came with the checkpoint")]
    TokenizerFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A step failed: the engine is not used any more, what had finished by then is here.
    #[error(
        "a step failed: {cause}; results of requests that had ended are kept, the others are lost: build the engine anew"
    )]
    Step {
        /// What went wrong.
        #[source]
        cause: Cause,
        /// Index and completion of each request that had ended; empty in a streaming run, which delivered them.
        finished: Vec<(usize, Completion)>,
    },
    /// Weights that were right, but could not be written to the device. An engine that has failed so is not used any more.
    #[error(
        "the weights could not be updated: {0}; build the engine anew, for it may have some of the old and some of the new ones"
    )]
    Update(#[source] Cause),
    /// Weights where there are none.
    #[error("a simulated model has no weights; open a checkpoint")]
    NoWeights,
    /// The engine's `Llm` was dropped.
    #[error("the engine was closed and takes no more requests; keep its Llm while requests run")]
    Closed,
    /// A session's submitter whose events nobody takes.
    #[error("nobody reads the session's events any more; open another session")]
    Unread,
    /// The system gives no thread.
    #[error("a thread can't be started: {0}; raise the limit of processes (ulimit -u) or free memory")]
    Thread(#[source] std::io::Error),
    /// Called again after a failed step.
    #[error("the engine has failed before and takes no more requests; build it anew")]
    Failed,
}

#[cfg(feature = "hub")]
impl Error {
    pub(crate) fn hub(error: minisgl_hub::HubError) -> Self {
        Error::Model(Box::new(error))
    }
}

/// Words of engines that are more than a rank each.
fn of_ranks(ranks: &u32) -> String {
    if *ranks > 1 { format!(" of {ranks} ranks") } else { String::new() }
}
