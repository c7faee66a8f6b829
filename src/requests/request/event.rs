//! What a stream tells while requests run: tokens, ends, steps.

use std::time::Duration;

use minisgl_core::batch::StepShape;
use minisgl_core::stats::Load;

use super::completion::{Completion, TokenLogprobs};

/// What happens during a run.
#[derive(Clone, Debug)]
pub enum StreamEvent<'a> {
    /// A request has another token.
    Token {
        /// Whose: its place among the requests.
        index: usize,
        /// Which of its samples.
        sample: u32,
        /// Its id.
        token: u32,
        /// Text that became certain with it: empty while a character, or what may be a stop text, is incomplete.
        text: &'a str,
        /// Where the request asks for them.
        logprobs: Option<&'a TokenLogprobs>,
    },
    /// A request, or one of its samples, ended.
    Finished {
        /// Whose.
        index: usize,
        /// Text that became certain with the end: with that of the tokens before, it makes the completion's text.
        text: &'a str,
        /// All that came of it.
        completion: Completion,
    },
    /// A step completed.
    Step(StepTiming),
}

/// What a call that completes a step spent its time on beside work of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BesideWork {
    /// Waiting for the device.
    pub waiting: Duration,
    /// In driver calls.
    pub driver: Duration,
}

/// A completed step: what ran, and when.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepTiming {
    /// Which engine ran it, of those behind one queue, counted from 0.
    pub engine: u32,
    /// Its rows and tokens, padding included.
    pub shape: StepShape,
    /// Tokens that it drew and that came to the host with it.
    pub output_tokens: u32,
    /// What all engines together had on their hands when it was over, as far as they had told.
    pub load: Load,
    /// Milliseconds from the engine's first step to this one's start, by the device's clock.
    pub start_ms: f64,
    /// Milliseconds it took on the device.
    pub gpu_ms: f32,
    /// From the start of the session to when the host turned to the call that completed it.
    pub host_start: Duration,
    /// How long that call took, waiting included.
    pub host_time: Duration,
    /// How much of it was spent waiting for the device, and in its driver; `None` where the host is the device.
    pub beside_work: Option<BesideWork>,
}

/// What a stream's callback wants next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Flow {
    /// Go on.
    #[default]
    Continue,
    /// Abort the request that the event is about, all its samples.
    AbortRequest,
    /// Abort every request, those not pulled yet included, and return.
    AbortAll,
}
