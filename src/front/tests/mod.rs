//! The front's promises, over a simulated engine, by subject.

mod aborts;
mod failures;
mod permits;
mod random;
mod readers;
mod several;
mod steps;
mod stop_texts;

use std::path::Path;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use super::message::{Call, Message};
use super::*;
use crate::request::{Completion, FinishReason, GenerateRequest, Prompt, RequestError, SamplingParams};
use crate::runner::Runner;
use crate::simulated::{Control, request, start as front, start_with};

fn drawn(first: u32, count: u32) -> Vec<u32> {
    (first..first + count).collect()
}

/// Its steps take a while: what draws 90,000 tokens runs for as long as a test likes.
fn slow() -> Control {
    Control { step_time: Duration::from_millis(1), ..Control::default() }
}

/// Tags and completions of a session, in order, until it is over.
fn ends(events: Events) -> Vec<(u64, Completion)> {
    let finished = |event| match event {
        Ok(SessionEvent::Finished { tag, completion, .. }) => Some((tag, *completion)),
        Ok(_) => None,
        Err(error) => panic!("{error}"),
    };
    events.filter_map(finished).collect()
}

/// Has an engine do something, and does not wait for it.
fn post(front: &Front, engine: usize, when_idle: bool, work: impl FnOnce(&mut dyn Runner) + Send + 'static) {
    let work = Box::new(move |runner: &mut dyn Runner| -> message::Reply {
        work(runner);
        Box::new(|| ())
    });
    front.handle().shared().send(engine, Message::Call(Call { when_idle, work }));
}

fn text() -> Text {
    Text::open(Path::new("tests/fixtures/text")).unwrap()
}

/// A request that draws the tokens of a text, and then others.
fn saying(codec: &Text, said: &str, max_tokens: u32) -> GenerateRequest {
    let mut prompt = vec![5];
    prompt.extend(codec.encode(Prompt::Text(said.to_owned())).unwrap());
    GenerateRequest::tokens(prompt).sampling(SamplingParams { max_tokens, ..SamplingParams::default() })
}
