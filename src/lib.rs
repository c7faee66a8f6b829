//! Offline LLM inference: a Qwen3 checkpoint in, tokens out at the speed of the GPU's memory.

mod chat;
mod detokenize;
mod error;
mod flags;
mod options;
mod request;
mod tokenizer;
pub mod workload;

pub use error::{Cause, Error};
pub use minisgl_core::config::{Limits, LimitsError};
pub use minisgl_core::scheduler::Order;
pub use minisgl_core::stats::Stats;
pub use options::{BackendChoice, KernelChoice, Options, parse_order};
pub use request::{
    Completion, FinishReason, Flow, GenerateRequest, Message, Phase, Prompt, RequestError, SamplingError,
    SamplingParams, StepTiming, StreamEvent, SubmitError, TOP_LOGPROBS_MAX, TokenLogprobs,
};
