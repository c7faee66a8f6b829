//! What happens to requests, as Python sees it.

use std::collections::HashMap;
use std::sync::Arc;

use minisgl::{FinishReason, SessionEvent, TokenLogprobs};
use pyo3::prelude::*;
use pyo3::types::PyList;

use crate::error::in_arguments;

/// What a run tells.
pub enum Event {
    Token(Token),
    /// What came of a request: one for each of its samples, in their order.
    Ended(Vec<Completion>),
}

/// Ends of samples, until all of a request's are there.
#[derive(Default)]
pub struct Groups(HashMap<u64, Group>);

struct Group {
    samples: usize,
    ended: Vec<Completion>,
}

impl Groups {
    /// A request is going to have so many samples.
    pub fn expect(&mut self, index: u64, samples: u32) {
        if samples > 1 {
            self.0.insert(index, Group { samples: samples as usize, ended: Vec::new() });
        }
    }

    /// What a session's event is to Python; `None` for what nobody asked for, and while other samples have not ended.
    pub fn event(&mut self, event: SessionEvent) -> Option<Event> {
        match event {
            SessionEvent::Token { tag, sample, token, text, logprobs, .. } => Some(Event::Token(Token {
                index: tag,
                sample,
                token_id: token,
                text,
                logprobs: logprobs.map(of_token),
            })),
            SessionEvent::Finished { tag, text, completion } => {
                self.end(Completion::new(tag, text, *completion)).map(Event::Ended)
            }
            SessionEvent::Started { .. } | SessionEvent::Step(_) => None,
        }
    }

    fn end(&mut self, completion: Completion) -> Option<Vec<Completion>> {
        let index = completion.index;
        let Some(group) = self.0.get_mut(&index) else { return Some(vec![completion]) };
        group.ended.push(completion);
        if group.ended.len() < group.samples {
            return None;
        }
        let mut ended = self.0.remove(&index)?.ended;
        ended.sort_by_key(|completion| completion.sample);
        Some(ended)
    }
}

impl Event {
    /// The end of a request that could not be read.
    pub fn unreadable(index: u64, reason: String) -> Event {
        let error = Some(reason);
        Event::Ended(vec![Completion { index, finish_reason: "error", error, ..Completion::default() }])
    }
}

/// Another token of a request.
#[pyclass(module = "minisgl._minisgl", frozen, get_all)]
pub struct Token {
    index: u64,
    /// Which of the request's samples has it.
    sample: u32,
    token_id: u32,
    /// Text that became certain with it.
    text: String,
    logprobs: Option<Logprobs>,
}

/// What came of one of a request's samples.
#[pyclass(module = "minisgl._minisgl", frozen, get_all)]
#[derive(Default)]
pub struct Completion {
    pub index: u64,
    /// Which of the samples.
    sample: u32,
    /// Text that became certain with the end, where tokens are told as they come.
    last_text: String,
    text: Option<String>,
    token_ids: Vec<u32>,
    finish_reason: &'static str,
    /// The stop text that ended it, if one did.
    stop_text: Option<String>,
    prompt_token_ids: Option<Vec<u32>>,
    cached_tokens: u32,
    /// Of each token, where asked for.
    logprobs: Option<Vec<Logprobs>>,
    /// Of each token of the prompt but the first, or of a completion that was given, where asked for.
    prompt_logprobs: Option<PromptLogprobs>,
    /// Of the prompt, where asked for.
    embedding: Option<Vec<f32>>,
    warning: Option<String>,
    error: Option<String>,
}

/// A token's log-probability, and the most probable tokens with theirs.
type Logprobs = (f32, Vec<(u32, f32)>);

/// What the samples of a prompt share; Python objects are made of it when somebody asks.
#[derive(Clone)]
struct PromptLogprobs(Arc<Vec<TokenLogprobs>>);

impl<'py> IntoPyObject<'py> for PromptLogprobs {
    type Target = PyList;
    type Output = Bound<'py, PyList>;
    type Error = PyErr;

    fn into_pyobject(self, py: Python<'py>) -> PyResult<Self::Output> {
        PyList::new(py, self.0.iter().map(|token| (token.logprob, &token.top)))
    }
}

impl Completion {
    fn new(index: u64, last_text: String, of: minisgl::Completion) -> Self {
        let finish_reason = match of.finish_reason {
            FinishReason::Length => "length",
            FinishReason::Eos => "eos",
            FinishReason::Stop => "stop",
            FinishReason::Abort => "abort",
            FinishReason::Rejected | FinishReason::Failed => "error",
        };
        Completion {
            index,
            sample: of.sample,
            last_text,
            text: of.text,
            token_ids: of.token_ids,
            finish_reason,
            stop_text: of.stop_text,
            prompt_token_ids: of.prompt_token_ids,
            cached_tokens: of.cached_tokens,
            logprobs: of.logprobs.map(of_tokens),
            prompt_logprobs: of.prompt_logprobs.map(PromptLogprobs),
            embedding: of.embedding,
            warning: of.warning.map(|warning| in_arguments(&warning)),
            error: of.error.map(|error| in_arguments(&error.to_string())),
        }
    }
}

fn of_tokens(of: Vec<TokenLogprobs>) -> Vec<Logprobs> {
    of.into_iter().map(of_token).collect()
}

fn of_token(of: TokenLogprobs) -> Logprobs {
    (of.logprob, of.top)
}
