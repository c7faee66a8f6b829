//! Offline LLM inference: a Qwen3 checkpoint in, tokens out at the speed of the GPU's memory.
//!
//! ```
//! use minisgl::{GenerateRequest, Llm, SamplingParams};
//!
//! // A checkpoint's directory, a model's name on the Hugging Face hub, or a preset with dummy weights.
//! let mut llm = Llm::builder("tiny").max_seq_len(Some(256)).build()?;
//! let sampling = SamplingParams { temperature: 0.6, max_tokens: 8, ..SamplingParams::default() };
//! let requests = [GenerateRequest::tokens([1, 2, 3]).sampling(sampling)];
//! for completion in llm.generate(&requests)? {
//!     println!("{:?}: {:?}", completion.finish_reason, completion.token_ids);
//! }
//! # Ok::<(), minisgl::Error>(())
//! ```
//!
//! The engine runs on a thread of its own, and all ways to use it go through its handle:
//!
//! | | requests | results |
//! |---|---|---|
//! | [`Llm::generate`] | a slice | completions in its order |
//! | [`Llm::generate_stream`] | an iterator, pulled as there is room | events to a callback, which may abort |
//! | [`EngineHandle::submit`] | one, from any thread | a stream of its events, which aborts it when dropped |
//! | [`EngineHandle::session`] | many, from any thread | one queue of events, which another thread may read |
//!
//! A request of its own, from any thread that has a clone of the handle:
//!
//! ```no_run
//! use minisgl::{GenerateRequest, Llm, RequestEvent};
//!
//! let llm = Llm::builder("models/Qwen3-0.6B").build()?;
//! let handle = llm.handle(); // Clone, Send, Sync
//! for event in handle.submit(GenerateRequest::text("Once upon a time"))? {
//!     if let RequestEvent::Token { text, .. } = event? {
//!         print!("{text}");
//!     }
//! }
//! # Ok::<(), minisgl::Error>(())
//! ```
//!
//! [`Llm::update_weights`] puts other tensors in the place of the model's own while it lives, as reinforcement learning does after
//! each step.
//!
//! [`Llm::score`] gives log-probabilities of given completions instead, [`Llm::rerank`] a Qwen3-Reranker's judgement of documents, and
//! [`Llm::embed`] prompts' embeddings.
//!
//! Prompts are token ids, text ([`GenerateRequest::text`]) or conversations ([`GenerateRequest::chat`]); the latter two
//! need the checkpoint's `tokenizer.json` and chat template. A request that can't run does not disturb the others: its
//! completion is [`FinishReason::Rejected`] and says why. [`Error`] is for what stops everything. [`Text`] is a checkpoint's
//! tokenizer and chat template without the model.

#![warn(missing_debug_implementations, unnameable_types)]

pub mod bench;
pub mod bulk;
mod chat;
mod engine;
mod error;
mod front;
pub mod lines;
mod model;
pub mod openai;
mod program;
pub mod report;
mod requests;
pub mod simulated;
pub mod telemetry;
mod tokenizer;

use engine::{builder, device, diagnostics, info, llm, memory, opening, options, runner, running, weights};
#[cfg(feature = "hub")]
use model::download;
pub use model::models;
use model::{generation_config, pooling, source};
use program::flags;
pub use program::{progress, workload};
use requests::{compiler, embed, grammar, request, rerank, score, streaming, tools};
use tokenizer::detokenize;

pub use builder::LlmBuilder;
pub use device::BackendChoice;
pub use diagnostics::Ceilings;
pub use embed::{EmbedRequest, Embedding};
pub use error::{Cause, Error};
pub use flags::{from_command_line, from_words, positive};
pub use front::{
    Aborter, EngineHandle, Events, Next, RequestEvent, RequestStream, SessionEvent, SessionOptions,
    Submitter, TrySubmitError,
};
pub use generation_config::{GenerationConfig, GenerationConfigChoice};
pub use grammar::Grammar;
pub use info::{ExpertsInfo, Info};
pub use llm::Llm;
pub use minisgl_core::backend::Dims;
pub use minisgl_core::config::{Limits, LimitsError};
pub use minisgl_core::kv::KvFormat;
pub use minisgl_core::policy::Policy;
pub use minisgl_core::scheduler::Order;
pub use minisgl_core::speculation::{DRAFTS_MAX, Speculation};
pub use minisgl_core::stats::{ExpertsRead, Load, Stats};
pub use minisgl_cuda::KernelSet;
pub use minisgl_decoder::{Dtype, NamedTensor};
pub use opening::gpu_present;
pub use options::{
    Devices, KvDtype, MaxRunning, Options, Quantize, parse_devices, parse_kv_dtype, parse_max_running,
    parse_order, parse_policy, parse_speculation, parse_top_k,
};
pub use request::{
    BesideWork, ChatPrompt, Completion, Embed, FinishReason, Flow, GenerateRequest, Given, JsonObject,
    Message, NoRole, Prompt, PromptLogprobs, RequestError, RerankRequest, SAMPLES_MAX, STOP_BYTES_MAX,
    SamplingError, SamplingParams, StepShape, StepTiming, StreamEvent, SubmitError, TOP_LOGPROBS_MAX,
    TokenLogprobs, TokenRules, prompt_seed, sample_seed,
};
pub use rerank::Relevance;
pub use score::{Score, ScoreRequest};
pub use source::ModelSource;
pub use tokenizer::Text;
pub use tools::{Function, ToolCalls, ToolFormat};
pub use weights::Weights;
