//! A session: requests go in at one half, their events come out at the other; the halves may live on different threads.
//!
//! ```text
//!   Submitter ── a permit, a request ──> encoders, engine, output thread ── push ──> queue ── next ──> Events
//!       ^                                                                                     │
//!       └──────────────────────── the permit, with the request's end ─────────────────────────┘
//! ```
//!
//! The queue has no bound of its own and pushing to it never waits: it holds events of requests that have a permit, so a
//! reader that does not read stops its own submitter and nobody else.
//!
//! Invariant: each request submitted is in `open` until its one end has been taken out of the queue.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use super::handle::EngineHandle;
use super::locked;
use super::permits::{Permit, Permits};
use crate::error::Error;
use crate::request::{Completion, GenerateRequest, StepTiming, TokenLogprobs};

/// What a session's reader wants to hear. Ends are always told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SessionOptions {
    /// Every token as it comes, not only all of them at the end.
    pub tokens: bool,
    /// With tokens: the text that became certain with each. Without, text is made once, at the end, which is cheaper.
    pub text: bool,
    /// When the engine takes a request in, and how long what was before took.
    pub starts: bool,
    /// Every step that completes while a request of the session is in the engine.
    pub steps: bool,
    /// The prompt's token ids with each end, whatever the prompt was given as.
    pub prompt_ids: bool,
    /// How many requests may be submitted whose ends have not been taken; `None`: as many as the engine runs and queues.
    pub capacity: Option<usize>,
}

/// What happens in a session.
#[derive(Clone, Debug)]
pub enum SessionEvent {
    /// The engine has taken a request in.
    Started {
        /// Whose: as given to `submit`.
        tag: u64,
        /// Which of its samples.
        sample: u32,
        /// From its submission until its prompt was token ids.
        encoding: Duration,
        /// From there until the engine had a place for it.
        queueing: Duration,
        /// When that was.
        at: Instant,
    },
    /// A request has another token.
    Token {
        /// Whose: as given to `submit`.
        tag: u64,
        /// Which of its samples.
        sample: u32,
        /// Its id.
        token: u32,
        /// Text that became certain with it, where it is wanted: empty while a character, or what may be a stop text,
        /// is incomplete.
        text: String,
        /// Where the request asks for them.
        logprobs: Option<TokenLogprobs>,
        /// When the step that drew it completed.
        at: Instant,
    },
    /// A request, or one of its samples, ended.
    Finished {
        /// Whose.
        tag: u64,
        /// Text that became certain with the end: with that of the tokens before, it makes the completion's text.
        text: String,
        /// All that came of it.
        completion: Box<Completion>,
    },
    /// A step completed; its tokens were told before.
    Step(StepTiming),
}

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

/// What the halves share with the threads behind them.
pub struct Session {
    /// Names it among all of the engine's.
    pub id: u64,
    pub options: SessionOptions,
    /// Steps are timed from here.
    pub started: Instant,
    queue: Mutex<Queue>,
    arrived: Condvar,
    unread: AtomicBool,
}

struct Queue {
    events: VecDeque<Queued>,
    /// Tags of which ends have not been taken.
    open: HashMap<u64, Open>,
    /// How many they are.
    open_count: usize,
    /// More may be submitted.
    submitter: bool,
    /// The reader waits, and nobody has undertaken to wake it.
    asleep: bool,
    /// How to wake a reader that is a task.
    waker: Option<Waker>,
}

/// What is open of a tag: a request, its samples, or several requests.
#[derive(Default)]
struct Open {
    /// They have been aborted, all of them.
    aborted: Arc<AtomicBool>,
    /// Ends that have not been taken.
    ends: usize,
}

/// An event on its way to the reader. An end brings the request's permit back.
pub enum Queued {
    Event(SessionEvent),
    End(SessionEvent, Permit),
    /// The request got lost with the engine.
    Lost(u64, Permit),
}

impl Session {
    pub fn new(id: u64, options: SessionOptions) -> Arc<Self> {
        let queue = Queue {
            events: VecDeque::new(),
            open: HashMap::new(),
            open_count: 0,
            submitter: true,
            asleep: false,
            waker: None,
        };
        Arc::new(Session {
            id,
            options,
            started: Instant::now(),
            queue: Mutex::new(queue),
            arrived: Condvar::new(),
            unread: AtomicBool::new(false),
        })
    }

    /// Notes a request about to be submitted; gives the flag that says whether it is aborted.
    pub fn open(&self, tag: u64) -> Arc<AtomicBool> {
        let mut queue = locked(&self.queue);
        queue.open_count += 1;
        let open = queue.open.entry(tag).or_default();
        open.ends += 1;
        open.aborted.clone()
    }

    /// Appends an event. True if the reader sleeps: the caller then wakes it, soon.
    #[must_use]
    pub fn push(&self, event: Queued) -> bool {
        let mut queue = locked(&self.queue);
        if self.is_unread() {
            drop(queue);
            return false; // The event is dropped without the lock: a permit has one of its own.
        }
        queue.events.push_back(event);
        std::mem::take(&mut queue.asleep)
    }

    /// Wakes the reader.
    pub fn wake(&self) {
        self.arrived.notify_one();
        let waker = locked(&self.queue).waker.take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Will nobody read any more?
    pub fn is_unread(&self) -> bool {
        self.unread.load(Ordering::Acquire)
    }

    /// Nothing more will be submitted.
    pub fn no_more(&self) {
        let mut queue = locked(&self.queue);
        queue.submitter = false;
        let asleep = std::mem::take(&mut queue.asleep);
        drop(queue);
        if asleep {
            self.wake();
        }
    }

    /// Exchanges the reader's empty queue for what has come, waiting for it as `wait` says.
    fn refill(&self, taken: &mut VecDeque<Queued>, wait: &Wait<'_>) -> Refill {
        let mut queue = locked(&self.queue);
        loop {
            if !queue.events.is_empty() {
                std::mem::swap(&mut queue.events, taken);
                return Refill::Some;
            }
            if queue.open_count == 0 && !queue.submitter {
                return Refill::Over;
            }
            queue.asleep = true;
            queue = match wait {
                Wait::Forever => self.arrived.wait(queue).unwrap_or_else(PoisonError::into_inner),
                Wait::Wake(waker) => {
                    queue.waker = Some((*waker).clone());
                    return Refill::NotYet;
                }
                Wait::Until(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        queue.asleep = false;
                        return Refill::NotYet;
                    }
                    self.arrived.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
            queue.asleep = false;
        }
    }

    /// The end of a request was taken. False if others are open still.
    fn close(&self, tag: u64) -> bool {
        let mut queue = locked(&self.queue);
        queue.open_count -= 1;
        if let Some(open) = queue.open.get_mut(&tag) {
            open.ends -= 1;
            if open.ends == 0 {
                queue.open.remove(&tag);
            }
        }
        queue.open_count == 0
    }
}

/// How a reader waits.
enum Wait<'a> {
    Forever,
    Until(Instant),
    /// Not on its thread: it is woken.
    Wake(&'a Waker),
}

enum Refill {
    Some,
    NotYet,
    Over,
}

/// The half of a session that requests go into. Dropping it says that no more will come.
pub struct Submitter {
    session: Arc<Session>,
    permits: Arc<Permits>,
    handle: EngineHandle,
}

impl Submitter {
    pub(super) fn new(session: Arc<Session>, permits: Arc<Permits>, handle: EngineHandle) -> Self {
        Submitter { session, permits, handle }
    }

    /// How many requests can be submitted now without waiting. Only this submitter makes it fewer.
    pub fn room(&self) -> usize {
        self.permits.free()
    }

    /// Submits a request under a tag, which its events bear. Waits while as many are on their way as the session's
    /// capacity allows; a thread that also reads the session's events asks [`Submitter::room`] first.
    ///
    /// # Errors
    /// The engine has stopped, or nobody reads the events any more. A request that can't run is no error here: its
    /// completion says so.
    pub fn submit(&mut self, tag: u64, request: GenerateRequest) -> Result<(), Error> {
        self.submit_all([(tag, request)])
    }

    /// Submits requests. Token prompts that there is room for now reach the engine together, so that its first step is a
    /// full one.
    ///
    /// # Errors
    /// As [`Submitter::submit`]; requests after the one that failed were not submitted.
    pub fn submit_all(
        &mut self,
        requests: impl IntoIterator<Item = (u64, GenerateRequest)>,
    ) -> Result<(), Error> {
        let mut ready = Vec::new();
        for (tag, request) in requests {
            self.handle.check_running()?;
            let permit = match self.permits.try_acquire() {
                Some(permit) => permit,
                None => {
                    self.handle.post(std::mem::take(&mut ready))?;
                    self.permits.acquire().ok_or_else(|| self.handle.refusal())?
                }
            };
            if self.session.is_unread() {
                return Err(self.handle.refusal());
            }
            ready.extend(self.handle.prepare(&self.session, tag, request, permit));
        }
        self.handle.post(ready)
    }
}

impl Drop for Submitter {
    fn drop(&mut self) {
        self.session.no_more();
    }
}

/// The half of a session that events come out of: an iterator that waits for the next one, and ends when all requests
/// have ended and no more will come. Dropping it aborts what has not ended.
///
/// An error means that the engine stopped and requests got lost; it comes once, after all that had ended before.
pub struct Events {
    session: Arc<Session>,
    /// The session's own, where it has its own.
    permits: Option<Arc<Permits>>,
    handle: EngineHandle,
    taken: VecDeque<Queued>,
    /// Some requests got lost.
    lost: bool,
    over: bool,
}

impl Events {
    pub(super) fn new(session: Arc<Session>, permits: Option<Arc<Permits>>, handle: EngineHandle) -> Self {
        Events { session, permits, handle, taken: VecDeque::new(), lost: false, over: false }
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
        locked(&self.session.queue).open.contains_key(&tag)
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
        Aborter { session: self.session.clone(), handle: self.handle.clone() }
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
            true => Err(self.handle.loss()),
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
        let (left, open) = {
            let mut queue = locked(&self.session.queue);
            self.session.unread.store(true, Ordering::Release);
            (std::mem::take(&mut queue.events), queue.open_count)
        };
        drop(left);
        if let Some(permits) = &self.permits {
            permits.close();
        }
        if open > 0 {
            self.handle.shared().abort(self.session.id, None);
        }
    }
}

/// Aborts requests of a session, from any thread; see [`Events::aborter`].
#[derive(Clone)]
pub struct Aborter {
    session: Arc<Session>,
    handle: EngineHandle,
}

impl Aborter {
    /// As [`Events::abort`].
    pub fn abort(&self, tag: u64) -> bool {
        let queue = locked(&self.session.queue);
        let Some(Open { aborted, .. }) = queue.open.get(&tag) else { return false };
        // The flag first: whoever has the request on its way to the engine looks at it when the message has been read.
        aborted.store(true, Ordering::Release);
        drop(queue);
        self.handle.shared().abort(self.session.id, Some(tag));
        true
    }

    /// As [`Events::abort_all`].
    pub fn abort_all(&self) {
        for open in locked(&self.session.queue).open.values() {
            open.aborted.store(true, Ordering::Release);
        }
        self.handle.shared().abort(self.session.id, None);
    }
}

/// What happens to a request of its own; see [`EngineHandle::submit`].
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
