//! Answers as streams: server-sent events of chunks, as OpenAI's API gives them.
//!
//! ```text
//!   data: {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, …}], …}      the choice begins
//!   data: {"choices": [{"index": 0, "delta": {"content": "Hel"}, …}], …}                        …, a chunk a token
//!   data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], …}                  the choice ends
//!   data: {"choices": [], "usage": {…}, …}                                                      where it is asked for
//!   data: [DONE]
//! ```
//!
//! The body is pulled by the connection: tokens that came while the client did not read go out together. What waits lies in
//! the session's queue, so a client that reads slowly holds up nobody. A failure on the way is an event of its own, and ends
//! the stream.

use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use http_body::Frame;
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use minisgl::openai::{ChatLogprobs, OutputFormat, OutputParser, OutputPart, TextLogprobs, ToolCall, Usage};
use minisgl::{Completion, SessionEvent, TokenLogprobs};
use serde::Serialize;

use crate::asked::{Asked, StreamOptions};
use crate::engine::Engine;
use crate::error::ApiError;
use crate::heading::{Heading, call_name, end_of};
use crate::output::Outputs;
use crate::stages::with_stages;

/// Bytes that go out at once, about.
const FRAME_BYTES: usize = 16 << 10;

/// The answer that streams a request's outputs.
pub fn stream(outputs: Outputs, chunks: Chunks) -> Response {
    let stages = outputs.stages();
    let body = StreamBody { outputs: Some(outputs), chunks };
    let mut response = with_stages(Response::new(Body::new(body)), stages);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

struct StreamBody {
    /// Until the end.
    outputs: Option<Outputs>,
    chunks: Chunks,
}

impl http_body::Body for StreamBody {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        task: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let StreamBody { outputs, chunks } = &mut *self;
        while let Some(open) = outputs
            && chunks.out.len() < FRAME_BYTES
        {
            match open.poll_next(task) {
                Poll::Pending if chunks.out.is_empty() => return Poll::Pending,
                Poll::Pending => break,
                Poll::Ready(Some(Ok(event))) => chunks.event(event, open.engine()),
                Poll::Ready(Some(Err(error))) => {
                    chunks.fail(&error);
                    *outputs = None;
                }
                Poll::Ready(None) => {
                    chunks.end();
                    *outputs = None;
                }
            }
        }
        // The next ones are as long, most likely.
        let next = Vec::with_capacity(chunks.out.len());
        let out = std::mem::replace(&mut chunks.out, next);
        Poll::Ready((!out.is_empty()).then(|| Ok(Frame::data(Bytes::from(out)))))
    }
}

/// Makes chunks of a request's events.
pub struct Chunks {
    heading: Heading,
    kind: Kind,
    include_usage: bool,
    return_token_ids: bool,
    /// Outputs of a prompt.
    outputs: usize,
    choices: Vec<Choice>,
    usage: Usage,
    /// What is to be sent.
    out: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Chat,
    Text,
}

/// An output, as far as it has come.
struct Choice {
    begun: bool,
    parts: OutputParser,
    calls: u32,
    /// Characters so far, by tokens.
    offset: usize,
    /// Characters of the text so far; less than by tokens while some wait because a stop text may cut them.
    sent: usize,
    /// Of tokens that begin behind these, which are in the text or not.
    held: TextLogprobs,
}

impl Choice {
    fn new(format: OutputFormat) -> Self {
        let parts = OutputParser::new(format);
        Choice { begun: false, parts, calls: 0, offset: 0, sent: 0, held: TextLogprobs::default() }
    }

    /// The log-probabilities of tokens whose place is known once `text` is sent.
    fn placed(&mut self, text: &str) -> Option<TextLogprobs> {
        self.sent += text.chars().count();
        self.held.take_within(self.sent)
    }

    /// The same of all that are left, when `text` is the last.
    fn placed_at_end(&mut self, text: &str) -> Option<TextLogprobs> {
        self.held.clamp(self.sent + text.chars().count());
        self.placed(text)
    }
}

#[derive(Serialize)]
struct Chunk<'a, C> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [C],
    /// Null in all but the last where it is asked for, and else not there.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

#[derive(Default, Serialize)]
struct ChatChunk<'a> {
    index: u32,
    delta: Delta<'a>,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<[u32; 1]>,
}

#[derive(Default, Serialize)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<[CallDelta; 1]>,
}

/// A call, whole.
#[derive(Serialize)]
struct CallDelta {
    index: u32,
    #[serde(flatten)]
    call: ToolCall,
}

#[derive(Default, Serialize)]
struct TextChunk<'a> {
    index: u32,
    text: &'a str,
    logprobs: Option<TextLogprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<[u32; 1]>,
}

impl Chunks {
    /// Of the answers to a conversation.
    pub fn chat(heading: Heading, asked: &Asked, options: StreamOptions, format: OutputFormat) -> Self {
        Self::new(heading, asked, options, Kind::Chat, format)
    }

    /// Of continuations; each begins with what its prompt's are to begin with.
    pub fn text(heading: Heading, asked: &Asked, options: StreamOptions, echoes: &[String]) -> Self {
        let mut chunks = Self::new(heading, asked, options, Kind::Text, OutputFormat::default());
        for index in 0..asked.choices() {
            let echo = &echoes[index / chunks.outputs];
            if !echo.is_empty() {
                chunks.text_chunk(TextChunk { index: index as u32, text: echo, ..TextChunk::default() });
            }
        }
        chunks
    }

    fn new(
        heading: Heading,
        asked: &Asked,
        options: StreamOptions,
        kind: Kind,
        format: OutputFormat,
    ) -> Self {
        Chunks {
            heading,
            kind,
            include_usage: options.include_usage,
            return_token_ids: asked.return_token_ids,
            outputs: asked.outputs(),
            choices: (0..asked.choices()).map(|_| Choice::new(format)).collect(),
            usage: Usage::default(),
            out: Vec::new(),
        }
    }

    fn event(&mut self, event: SessionEvent, engine: &Engine) {
        match event {
            SessionEvent::Token { tag, sample, token, text, logprobs, .. } => {
                self.token(self.choice(tag, sample), token, &text, logprobs.as_slice(), engine);
            }
            SessionEvent::Finished { tag, text, completion } => {
                self.finished(self.choice(tag, completion.sample), &text, &completion);
            }
            SessionEvent::Started { .. } | SessionEvent::Step(_) => {}
        }
    }

    /// Which choice a sample of a request is.
    fn choice(&self, request: u64, sample: u32) -> u32 {
        request as u32 * self.outputs as u32 + sample
    }

    fn token(&mut self, index: u32, token: u32, text: &str, logprobs: &[TokenLogprobs], engine: &Engine) {
        let token_bytes = |id| engine.handle.token_bytes(id);
        let token_ids = self.return_token_ids.then_some([token]);
        match self.kind {
            Kind::Chat => {
                let logprobs = match logprobs {
                    [] => None,
                    logprobs => Some(ChatLogprobs::of(&[token], logprobs, &token_bytes)),
                };
                let mut out = Vec::new();
                self.choices[index as usize].parts.push(text, &mut out);
                self.chat_parts(index, out, logprobs, token_ids);
            }
            Kind::Text => {
                let choice = &mut self.choices[index as usize];
                for entry in logprobs {
                    choice.held.push(token, entry, &mut choice.offset, &token_bytes);
                }
                let logprobs = choice.placed(text);
                if !text.is_empty() || logprobs.is_some() || token_ids.is_some() {
                    self.text_chunk(TextChunk { index, text, logprobs, token_ids, ..TextChunk::default() });
                }
            }
        }
    }

    fn finished(&mut self, index: u32, text: &str, completion: &Completion) {
        self.usage = self.usage.with(completion);
        match self.kind {
            Kind::Chat => {
                let mut out = Vec::new();
                let parts = &mut self.choices[index as usize].parts;
                parts.push(text, &mut out);
                parts.finish(&mut out);
                self.chat_parts(index, out, None, None);
                let finish_reason = Some(end_of(completion, self.choices[index as usize].calls > 0));
                self.chat_chunk(ChatChunk { index, finish_reason, ..ChatChunk::default() });
            }
            Kind::Text => {
                let logprobs = self.choices[index as usize].placed_at_end(text);
                let finish_reason = Some(end_of(completion, false));
                self.text_chunk(TextChunk { index, text, logprobs, finish_reason, ..TextChunk::default() });
            }
        }
    }

    /// A chunk a part; the token's log-probabilities go with the first, or with one of their own.
    fn chat_parts(
        &mut self,
        index: u32,
        parts: Vec<OutputPart>,
        mut logprobs: Option<ChatLogprobs>,
        mut token_ids: Option<[u32; 1]>,
    ) {
        if !std::mem::replace(&mut self.choices[index as usize].begun, true) {
            let delta = Delta { role: Some("assistant"), content: Some(""), ..Delta::default() };
            self.chat_chunk(ChatChunk { index, delta, ..ChatChunk::default() });
        }
        for part in parts {
            let mut delta = Delta::default();
            match &part {
                OutputPart::Text(text) => delta.content = Some(text),
                OutputPart::Reasoning(text) => delta.reasoning_content = Some(text),
                OutputPart::Call(function) => {
                    let calls = &mut self.choices[index as usize].calls;
                    delta.tool_calls = Some([CallDelta {
                        index: *calls,
                        call: ToolCall::new(call_name(), function.clone()),
                    }]);
                    *calls += 1;
                }
            }
            let (logprobs, token_ids) = (logprobs.take(), token_ids.take());
            self.chat_chunk(ChatChunk { index, delta, logprobs, token_ids, ..ChatChunk::default() });
        }
        if logprobs.is_some() || token_ids.is_some() {
            self.chat_chunk(ChatChunk { index, logprobs, token_ids, ..ChatChunk::default() });
        }
    }

    fn chat_chunk(&mut self, choice: ChatChunk<'_>) {
        self.chunk(&[choice], self.include_usage.then_some(None));
    }

    fn text_chunk(&mut self, choice: TextChunk<'_>) {
        self.chunk(&[choice], self.include_usage.then_some(None));
    }

    fn chunk<C: Serialize>(&mut self, choices: &[C], usage: Option<Option<Usage>>) {
        let object = match self.kind {
            Kind::Chat => "chat.completion.chunk",
            Kind::Text => "text_completion",
        };
        let Heading { id, created, model } = &self.heading;
        let chunk = Chunk { id, object, created: *created, model, choices, usage };
        self.out.extend_from_slice(b"data: ");
        // Writing to memory can't fail, nor can values whose keys are all texts.
        let written = serde_json::to_writer(&mut self.out, &chunk);
        debug_assert!(written.is_ok());
        self.out.extend_from_slice(b"\n\n");
    }

    fn end(&mut self) {
        if self.include_usage {
            self.chunk::<()>(&[], Some(Some(self.usage)));
        }
        self.out.extend_from_slice(b"data: [DONE]\n\n");
    }

    fn fail(&mut self, error: &ApiError) {
        self.out.extend_from_slice(b"data: ");
        self.out.extend_from_slice(error.to_json().as_bytes());
        self.out.extend_from_slice(b"\n\ndata: [DONE]\n\n");
    }
}
