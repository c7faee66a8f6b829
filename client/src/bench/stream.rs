//! One connection to the service and the request that it carries: bytes out, an answer's events in.
//!
//! ```text
//!   connecting ──> sending ──> reading ── answer over ──> idle ──> sending …
//!        └────────────┴───────────┴── failure, or an answer that ends the connection ──> gone
//! ```
//!
//! The socket does not block; [`crate::bench::load`] says when it is ready.

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::time::Duration;

use thiserror::Error;

use super::wire::{Tls, Wire};
use crate::chunk::{self, BadEvent, Event, TokenCount, Usage, error_message};
use crate::http::{AnswerReader, BadAnswer};
use crate::sse::{EventReader, EventTooLong};

/// Bytes of a refusal that are kept.
const REFUSAL_BYTES_MAX: usize = 64 << 10;

/// Why a request failed.
#[derive(Debug, Error)]
pub enum Failure {
    /// Nobody there, or no way.
    #[error("no connection: {0}")]
    Connect(io::Error),
    /// On the way.
    #[error("the connection broke: {0}")]
    Broken(io::Error),
    /// What came is no answer.
    #[error(transparent)]
    Answer(#[from] BadAnswer),
    /// What came is no stream of a completion.
    #[error(transparent)]
    Event(#[from] BadEvent),
    /// An event that never ends.
    #[error(transparent)]
    TooLong(#[from] EventTooLong),
    /// A status that is no success.
    #[error("status {status}: {message}")]
    Status {
        /// Which.
        status: u16,
        /// The service's words.
        message: String,
    },
    /// An answer that ends before its stream does.
    #[error("the stream ended without [DONE]")]
    Unfinished,
    /// Nothing came for too long.
    #[error("nothing came for {0:?}")]
    Silent(Duration),
}

impl Failure {
    /// What kind of failure it is, in a few words: for counting.
    pub fn kind(&self) -> String {
        match self {
            Failure::Connect(_) => "no connection".to_owned(),
            Failure::Broken(_) | Failure::Answer(BadAnswer::Closed) => "connection broken".to_owned(),
            Failure::Answer(_) => "no HTTP".to_owned(),
            Failure::Event(BadEvent::Failed(_)) => "failed on the way".to_owned(),
            Failure::Event(BadEvent::NoChunk(_)) | Failure::TooLong(_) => "no completion".to_owned(),
            Failure::Status { status, .. } => format!("status {status}"),
            Failure::Unfinished => "stream cut off".to_owned(),
            Failure::Silent(_) => "time-out".to_owned(),
        }
    }
}

/// What has come of a request since it was asked last.
#[derive(Debug, Default)]
pub struct News {
    /// Output tokens.
    pub tokens: u64,
    /// The answer is over, and well.
    pub finished: bool,
}

/// A connection.
pub struct Stream {
    pub wire: Wire,
    /// The request that it carries.
    pub request: Option<usize>,
    /// When the last byte came or went.
    pub heard: Duration,
    /// What is to be sent, and how much of it has gone.
    out: Vec<u8>,
    gone: usize,
    answer: AnswerReader,
    events: EventReader,
    refusal: Vec<u8>,
    count: TokenCount,
    usage: Option<Usage>,
    done: bool,
    /// Requests that it has carried to their ends.
    carried: u64,
}

impl Stream {
    /// Begins to connect.
    ///
    /// # Errors
    /// The system refuses.
    pub fn connect(address: SocketAddr, tls: Option<&Tls>) -> Result<Self, Failure> {
        let wire = Wire::connect(address, tls).map_err(Failure::Connect)?;
        Ok(Stream {
            wire,
            request: None,
            heard: Duration::ZERO,
            out: Vec::new(),
            gone: 0,
            answer: AnswerReader::default(),
            events: EventReader::default(),
            refusal: Vec::new(),
            count: TokenCount::default(),
            usage: None,
            done: false,
            carried: 0,
        })
    }

    /// Gives it a request to carry: head and body, as they go out.
    pub fn carry(&mut self, request: usize, out: Vec<u8>, now: Duration) {
        self.request = Some(request);
        self.heard = now;
        (self.out, self.gone) = (out, 0);
        (self.answer, self.events) = (AnswerReader::default(), EventReader::default());
        self.refusal.clear();
        (self.count, self.usage, self.done) = (TokenCount::default(), None, false);
    }

    /// Sends what the socket takes.
    ///
    /// # Errors
    /// The connection is of no use.
    pub fn write(&mut self, now: Duration) -> Result<(), Failure> {
        while self.gone < self.out.len() {
            match self.wire.write(&self.out[self.gone..]) {
                Ok(0) => return Err(Failure::Broken(io::ErrorKind::WriteZero.into())),
                Ok(sent) => {
                    self.gone += sent;
                    self.heard = now;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // Not connected yet.
                Err(error) if self.gone == 0 && error.kind() == io::ErrorKind::NotConnected => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if self.gone == 0 && self.carried == 0 => return Err(Failure::Connect(error)),
                Err(error) => return Err(Failure::Broken(error)),
            }
        }
        let is_new = self.carried == 0 && self.answer.is_untouched();
        self.wire.flush().map_err(if is_new { Failure::Connect } else { Failure::Broken })
    }

    /// Reads what has come into `buffer` and takes it in, until the socket has no more. `closing` says that the other end
    /// closes: then even a short read may not be the last one.
    ///
    /// # Errors
    /// The request has failed, and the connection is of no use.
    pub fn read(&mut self, buffer: &mut [u8], closing: bool, now: Duration) -> Result<News, Failure> {
        let mut news = News::default();
        loop {
            let read = match self.wire.read(buffer) {
                Ok(0) => {
                    self.answer.close()?;
                    break;
                }
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Failure::Broken(error)),
            };
            self.heard = now;
            news.tokens += self.take(&buffer[..read])?;
            let all = read < buffer.len() && !closing && !self.wire.reads_in_pieces();
            if self.answer.is_over() || all {
                break;
            }
        }
        news.finished = self.answer.is_over();
        if news.finished {
            self.check()?;
            self.carried += 1;
        }
        Ok(news)
    }

    /// Takes bytes of the answer in; gives how many tokens they bring.
    fn take(&mut self, bytes: &[u8]) -> Result<u64, Failure> {
        let Stream { answer, events, refusal, count, usage, done, .. } = self;
        let mut tokens = 0;
        let mut event = |data: &[u8]| {
            match chunk::read(data)? {
                Event::Done => *done = true,
                Event::Chunk(chunk) => {
                    *usage = chunk.usage.or(*usage);
                    tokens += count.next(&chunk);
                }
            }
            Ok::<(), Failure>(())
        };
        // The head may come with the body's first bytes, so the status is looked at when these are taken.
        let mut body = Vec::new();
        answer.push(bytes, &mut |part| {
            body.extend_from_slice(part);
            Ok::<(), Failure>(())
        })?;
        match answer.status() {
            Some(200) => events.push(&body, &mut event)?,
            _ => {
                let room = REFUSAL_BYTES_MAX - refusal.len();
                refusal.extend_from_slice(&body[..body.len().min(room)]);
            }
        }
        Ok(tokens)
    }

    /// Is an answer that is over a good one?
    fn check(&self) -> Result<(), Failure> {
        match self.answer.status() {
            Some(200) if self.done => Ok(()),
            Some(200) => Err(Failure::Unfinished),
            status => Err(Failure::Status {
                status: status.unwrap_or_default(),
                message: error_message(&self.refusal),
            }),
        }
    }

    /// The request's tokens as the service counts them.
    pub fn usage(&self) -> Option<Usage> {
        self.usage
    }

    /// May it carry another request, its answer being over?
    pub fn stays(&self) -> bool {
        self.answer.is_over() && self.answer.keeps_alive()
    }

    /// Had the service closed a connection that it kept, just when this request was sent to it? Such a request was never
    /// looked at, and goes out again on a new connection.
    pub fn missed(&self, failure: &Failure) -> bool {
        let closed = matches!(failure, Failure::Broken(_) | Failure::Answer(BadAnswer::Closed));
        closed && self.carried > 0 && self.answer.is_untouched()
    }
}
