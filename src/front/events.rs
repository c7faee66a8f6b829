//! The half of a session that events come out of.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use super::permits::Permits;
use super::session::{Queued, Refill, Session, SessionEvent, Wait};
use super::shared::Shared;
use crate::error::Error;
use crate::request::{Completion, TokenLogprobs};

/// What a reader that does not wait for ever got.
#[derive(Clone, Debug)]
pub enum Next {
    /// An event.
    Event(SessionEvent),
    /// None came in time.
    TimedOut,
    /// All requests have ended and no more will come.
    Over,
}

/// The half of a session that events come out of: an iterator that waits for the next one, and ends when all requests
/// have ended and no more will come. Dropping it aborts what has not ended.
///
/// An error means that the engine stopped and requests got lost; it comes once, after all that had ended before.
pub struct Events {
    session: Arc<Session>,
    /// The session's own, where it has its own.
    permits: Option<Arc<Permits>>,
    shared: Arc<Shared>,
    taken: VecDeque<Queued>,
    /// Some requests got lost.
    lost: bool,
    over: bool,
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events")
            .field("session", &self.session.id)
            .field("over", &self.over)
            .finish_non_exhaustive()
    }
}

impl Events {
    pub(super) fn new(session: Arc<Session>, permits: Option<Arc<Permits>>, shared: Arc<Shared>) -> Self {
        Events { session, permits, shared, taken: VecDeque::new(), lost: false, over: false }
    }

    /// The next event, waited for so long at most.
    ///
    /// # Errors
    /// The engine stopped, and requests got lost.
    pub fn next_timeout(&mut self, timeout: Duration) -> Result<Next, Error> {
        let deadline = Instant::now().checked_add(timeout);
        self.next_by(&deadline.map_or(Wait::Forever, Wait::Until))
    }

    /// The next event for a task, which is woken when there may be one; `None` when there will be no more. What comes of a
    /// session is read either so or by waiting, not both.
    pub fn poll_next(&mut self, task: &mut Context<'_>) -> Poll<Option<Result<SessionEvent, Error>>> {
        match self.next_by(&Wait::Wake(task.waker())) {
            Ok(Next::Event(event)) => Poll::Ready(Some(Ok(event))),
            Ok(Next::TimedOut) => Poll::Pending,
            Ok(Next::Over) => Poll::Ready(None),
            Err(error) => Poll::Ready(Some(Err(error))),
        }
    }

    /// Has the request of a tag, or one of its samples, not ended?
    pub(crate) fn is_open(&self, tag: u64) -> bool {
        self.session.is_open(tag)
    }

    /// Aborts the open requests of a tag: each ends with what it has so far. False if there is none.
    pub fn abort(&mut self, tag: u64) -> bool {
        self.aborter().abort(tag)
    }

    /// Aborts all open requests.
    pub fn abort_all(&mut self) {
        self.aborter().abort_all();
    }

    /// What aborts requests while another thread waits for the next event.
    pub fn aborter(&self) -> Aborter {
        Aborter { session: self.session.clone(), shared: self.shared.clone() }
    }

    fn next_by(&mut self, wait: &Wait<'_>) -> Result<Next, Error> {
        while !self.over {
            match self.taken.pop_front() {
                Some(Queued::Event(event)) => return Ok(Next::Event(event)),
                Some(Queued::End(event, permit)) => {
                    if let SessionEvent::Finished { tag, .. } = event {
                        self.close(tag);
                    }
                    drop(permit);
                    return Ok(Next::Event(event));
                }
                Some(Queued::Lost(tag, permit)) => {
                    self.lost = true;
                    self.close(tag);
                    drop(permit);
                }
                None => match self.session.refill(&mut self.taken, wait) {
                    Refill::Some => {}
                    Refill::NotYet => return Ok(Next::TimedOut),
                    Refill::Over => self.over = true,
                },
            }
        }
        match std::mem::take(&mut self.lost) {
            true => Err(self.shared.loss()),
            false => Ok(Next::Over),
        }
    }

    /// A request's end was taken. Once one is lost all are, and when the last end has been taken nothing more will come.
    fn close(&mut self, tag: u64) {
        let none_open = self.session.close(tag);
        self.over |= self.lost && none_open;
    }
}

impl Iterator for Events {
    type Item = Result<SessionEvent, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        match self.next_by(&Wait::Forever) {
            Ok(Next::Event(event)) => Some(Ok(event)),
            Ok(_) => None,
            Err(error) => Some(Err(error)),
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let open = self.session.leave();
        if let Some(permits) = &self.permits {
            permits.close();
        }
        if open > 0 {
            self.shared.abort(self.session.id, None);
        }
    }
}

/// Aborts requests of a session, from any thread; see [`Events::aborter`].
#[derive(Clone)]
pub struct Aborter {
    session: Arc<Session>,
    shared: Arc<Shared>,
}

impl fmt::Debug for Aborter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Aborter").field("session", &self.session.id).finish_non_exhaustive()
    }
}

impl Aborter {
    /// As [`Events::abort`].
    pub fn abort(&self, tag: u64) -> bool {
        // The flag first: whoever has the request on its way to the engine looks at it when the message has been read.
        let is_open = self.session.abort(tag);
        if is_open {
            self.shared.abort(self.session.id, Some(tag));
        }
        is_open
    }

    /// As [`Events::abort_all`].
    pub fn abort_all(&self) {
        self.session.abort_all();
        self.shared.abort(self.session.id, None);
    }
}

/// What happens to a request of its own; see [`EngineHandle::submit`](super::handle::EngineHandle::submit).
#[derive(Clone, Debug)]
pub enum RequestEvent {
    /// Another token.
    Token {
        /// Which of the request's samples has it.
        sample: u32,
        /// Its id.
        token: u32,
        /// Text that became certain with it: empty while a character, or what may be a stop text, is incomplete.
        text: String,
        /// Where the request asks for them.
        logprobs: Option<TokenLogprobs>,
    },
    /// The end, or that of one of its samples.
    Finished {
        /// Text that became certain with it: with that of the tokens before, it makes the completion's text.
        text: String,
        /// All that came of the request.
        completion: Box<Completion>,
    },
}

/// The events of one request: an iterator that waits for the next one and ends behind `Finished`, of its last sample if it has
/// several. Dropping it aborts the request.
#[derive(Debug)]
pub struct RequestStream(Events);

impl RequestStream {
    pub(super) fn new(events: Events) -> Self {
        RequestStream(events)
    }
}

impl Iterator for RequestStream {
    type Item = Result<RequestEvent, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            return Some(Ok(match self.0.next()? {
                Ok(SessionEvent::Token { sample, token, text, logprobs, .. }) => {
                    RequestEvent::Token { sample, token, text, logprobs }
                }
                Ok(SessionEvent::Finished { text, completion, .. }) => {
                    RequestEvent::Finished { text, completion }
                }
                Ok(SessionEvent::Started { .. } | SessionEvent::Step(_)) => continue,
                Err(error) => return Some(Err(error)),
            }));
        }
    }
}
