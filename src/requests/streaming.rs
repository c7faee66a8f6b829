//! A session's events as calls of a function, which may abort a request or all of them.
//!
//! Tokens are on their way while it decides: what it is handed of an aborted request ends where it said so, and the completion holds
//! no more than that.

use std::collections::{HashMap, HashSet};

use crate::front::{Events, SessionEvent};
use crate::request::{Completion, FinishReason, Flow, StreamEvent};

/// See the module.
pub struct Streaming<F> {
    on_event: F,
    /// Of each open request's samples, how many tokens and bytes of text were handed over.
    open: HashMap<(u64, u32), Handed>,
    /// Open requests that are aborted.
    aborted: HashSet<u64>,
    /// No request is wanted any more.
    closed: bool,
}

/// Of a sample.
#[derive(Clone, Copy, Default)]
struct Handed {
    tokens: usize,
    text: usize,
}

impl<F: FnMut(StreamEvent<'_>) -> Flow> Streaming<F> {
    pub fn new(on_event: F) -> Self {
        Streaming { on_event, open: HashMap::new(), aborted: HashSet::new(), closed: false }
    }

    /// Hands an event on; false once everything is to be aborted.
    pub fn hear(&mut self, event: SessionEvent, events: &mut Events) -> bool {
        match event {
            SessionEvent::Token { tag, sample, token, text, logprobs, .. } => {
                if self.closed || self.aborted.contains(&tag) {
                    return !self.closed; // Drawn before the engine heard of it.
                }
                let handed = self.open.entry((tag, sample)).or_default();
                handed.tokens += 1;
                handed.text += text.len();
                let (index, logprobs) = (tag as usize, logprobs.as_ref());
                let flow =
                    (self.on_event)(StreamEvent::Token { index, sample, token, text: &text, logprobs });
                if flow == Flow::AbortRequest {
                    self.aborted.insert(tag);
                    events.abort(tag);
                }
                self.follow(flow, events);
            }
            SessionEvent::Finished { tag, mut text, mut completion } => {
                let handed = self.open.remove(&(tag, completion.sample)).unwrap_or_default();
                let aborted = self.aborted.contains(&tag);
                if (aborted || self.closed) && completion.error.is_none() {
                    cut(&mut completion, handed);
                    text.clear();
                }
                if aborted && !events.is_open(tag) {
                    self.aborted.remove(&tag);
                }
                let (index, completion) = (tag as usize, *completion);
                let flow = (self.on_event)(StreamEvent::Finished { index, text: &text, completion });
                self.follow(flow, events);
            }
            SessionEvent::Started { .. } => {}
            SessionEvent::Step(timing) => {
                let flow = (self.on_event)(StreamEvent::Step(timing));
                self.follow(flow, events);
            }
        }
        !self.closed
    }

    fn follow(&mut self, flow: Flow, events: &mut Events) {
        if flow == Flow::AbortAll && !std::mem::replace(&mut self.closed, true) {
            events.abort_all();
        }
    }
}

/// What had been handed over of a request when it was aborted.
fn cut(completion: &mut Completion, handed: Handed) {
    completion.token_ids.truncate(handed.tokens);
    if let Some(text) = &mut completion.text {
        text.truncate(handed.text);
    }
    if let Some(logprobs) = &mut completion.logprobs {
        logprobs.truncate(handed.tokens);
    }
    completion.finish_reason = FinishReason::Abort;
}
