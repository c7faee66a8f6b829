//! A service with OpenAI's API.
//!
//! ```text
//!   a thread an answer: body ── events ── chunks ──> channel ──> the conversation, which looks up now and then
//! ```
//!
//! A stopped answer is left to its thread, which hangs up at the next bytes that it has no use for.

use std::io::Read;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;

use minisgl::{Cause, JsonObject, Message};
use serde_json::{Value, json};
use thiserror::Error;

use super::{Ending, LOOK, Said, Speaker};
use crate::chat::settings::Settings;
use crate::chunk::{self, BadEvent, Chunk, Event};
use crate::service::{Service, ServiceError};
use crate::sse::{EventReader, EventTooLong};

/// Bytes read at once.
const READ_BYTES: usize = 16 << 10;
/// Chunks that wait for the conversation at most.
const QUEUE: usize = 64;

/// A model of a service.
pub struct Remote {
    service: Service,
    model: String,
    kwargs: JsonObject,
}

/// Why an answer breaks off.
#[derive(Debug, Error)]
enum Broken {
    #[error(transparent)]
    Service(#[from] ServiceError),
    #[error(transparent)]
    Event(#[from] BadEvent),
    #[error(transparent)]
    TooLong(#[from] EventTooLong),
    #[error("the connection broke in the middle of the answer: {0}")]
    Read(#[from] std::io::Error),
    #[error("the service ended the answer without [DONE]")]
    Unfinished,
    /// Nobody wants it any more.
    #[error("the answer was stopped")]
    Unwanted,
}

impl Remote {
    /// A service's model; its chat template gets `kwargs`, if there are any.
    pub fn new(service: Service, model: String, kwargs: JsonObject) -> Self {
        Remote { service, model, kwargs }
    }

    fn body(&self, messages: &[Message], settings: &Settings) -> Value {
        let mut body = json!({"model": self.model, "messages": messages, "stream": true});
        for (name, value) in settings.fields() {
            body[name] = value;
        }
        if !self.kwargs.is_empty() {
            body["chat_template_kwargs"] = self.kwargs.clone().into();
        }
        body
    }
}

impl Speaker for Remote {
    fn answer(
        &mut self,
        messages: &[Message],
        settings: &Settings,
        stop: &dyn Fn() -> bool,
        hear: &mut dyn FnMut(Said<'_>) -> Result<(), Cause>,
    ) -> Result<Ending, Cause> {
        let (tell, told) = sync_channel(QUEUE);
        let (service, body) = (self.service.clone(), self.body(messages, settings));
        thread::Builder::new().name("answer".to_owned()).spawn(move || {
            if let Err(broken) = read(&service, &body, &tell) {
                // Who asked may have stopped it.
                let _ = tell.send(Err(broken));
            }
        })?;
        listen(&told, stop, hear)
    }
}

fn listen(
    told: &Receiver<Result<Chunk, Broken>>,
    stop: &dyn Fn() -> bool,
    hear: &mut dyn FnMut(Said<'_>) -> Result<(), Cause>,
) -> Result<Ending, Cause> {
    let mut ending = Ending::Whole;
    while !stop() {
        match told.recv_timeout(LOOK) {
            Ok(chunk) => {
                let Chunk { text, reasoning, finish_reason, .. } = chunk?;
                hear(Said::Thought(&reasoning))?;
                hear(Said::Text(&text))?;
                if finish_reason.as_deref() == Some("length") {
                    ending = Ending::Length;
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            // The thread ends without an error when the stream has ended as it should.
            Err(RecvTimeoutError::Disconnected) => return Ok(ending),
        }
    }
    Ok(Ending::Stopped)
}

/// Reads an answer and hands its chunks on.
fn read(service: &Service, body: &Value, tell: &SyncSender<Result<Chunk, Broken>>) -> Result<(), Broken> {
    let mut stream = service.stream("chat/completions", body)?;
    let (mut events, mut done) = (EventReader::default(), false);
    let mut buffer = vec![0; READ_BYTES];
    while !done {
        let read = match stream.read(&mut buffer)? {
            0 => return Err(Broken::Unfinished),
            read => read,
        };
        events.push(&buffer[..read], &mut |data| {
            match chunk::read(data)? {
                Event::Done => done = true,
                Event::Chunk(chunk) => tell.send(Ok(chunk)).map_err(|_| Broken::Unwanted)?,
            }
            Ok::<(), Broken>(())
        })?;
    }
    Ok(())
}
