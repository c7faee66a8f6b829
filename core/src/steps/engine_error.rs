//! What an engine that can't be built, or can't go on, says.

use alloc::format;
use alloc::string::String;

use thiserror::Error;

use crate::batch::StepShape;
use crate::config::LimitsError;

/// Why an engine can't be built, or can't go on.
#[derive(Debug, Error)]
pub enum EngineError<E: core::error::Error + 'static> {
    /// Capacities that make no engine.
    #[error(transparent)]
    Limits(#[from] LimitsError),
    /// Sequences longer than the model's positions.
    #[error(
        "a sequence limit of {sequence} tokens exceeds the model's {max_positions} positions; \
         lower it (--max-seq-len)"
    )]
    Sequence {
        /// As asked for.
        sequence: u32,
        /// What the model reaches.
        max_positions: u32,
    },
    /// Token ids that the model has no embedding for.
    #[error("prompts may have token ids below {prompts}, but the model's vocabulary ends at {model}")]
    Vocabulary {
        /// Ids in prompts lie below it.
        prompts: u32,
        /// Ids of the model lie below it.
        model: u32,
    },
    /// The device could not give what the engine needs.
    #[error("the engine's buffers can't be set up: {0}")]
    Setup(#[source] E),
    /// Too little memory is left for the KV cache.
    #[error(
        "the KV cache can have {fit} pages of {page_size} tokens, and one request needs {least}: a page takes {page_bytes} \
         bytes, and beside weights and buffers {free} bytes are free, {recording} of them for recorded steps; lower \
         --max-seq-len, --max-prefill-tokens, --max-running or --max-graph-batch, raise --memory-ratio, or free the device's \
         memory"
    )]
    Pages {
        /// Pages that fit.
        fit: u32,
        /// Pages that are of use.
        least: u32,
        /// Tokens of a page.
        page_size: u32,
        /// Bytes of a page, over all layers.
        page_bytes: u64,
        /// Bytes free beside weights and buffers.
        free: u64,
        /// Bytes that recorded steps were found to need, where they did not fit behind the pages.
        recording: u64,
    },
    /// A decode step could not be recorded.
    #[error(
        "recording the decode step of {rows} rows failed: {source}; \
         record smaller steps or none (--max-graph-batch)"
    )]
    Capture {
        /// Its size.
        rows: u32,
        /// What the device said.
        source: E,
    },
    /// A step failed, while it was launched or while it ran. Work is asynchronous, so the cause may lie in a step that
    /// was launched before this one. Tokens given out so far are right; the engine takes no further step.
    #[error("{} failed: {source}", described(*.shape))]
    Step {
        /// Its counts, without padding.
        shape: StepShape,
        /// What the device said.
        source: E,
    },
    /// The model can't be changed while requests depend on what it is.
    #[error("the model can't be changed while requests wait or run; let them end, or abort them")]
    Busy,
    /// The model could not be changed as a whole.
    #[error("the model could not be changed: {0}")]
    Update(#[source] E),
    /// A step failed before.
    #[error("the engine stopped when a step or an update of its model failed; build a new one to go on")]
    Stopped,
}

fn described(shape: StepShape) -> String {
    let StepShape { decode_rows, prefill_rows, .. } = shape;
    let prefilled = shape.prefill_tokens();
    match (decode_rows, prefill_rows) {
        (_, 0) => format!("a decode step of {decode_rows} rows"),
        (0, _) => format!("a prefill step of {prefill_rows} rows and {prefilled} tokens"),
        _ => format!(
            "a step of {decode_rows} decode rows, {prefill_rows} prefill rows and {prefilled} tokens of those"
        ),
    }
}
