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
use std::task::Waker;
use std::time::{Duration, Instant};

use super::locked;
use super::permits::Permit;
use crate::request::{Completion, StepTiming, TokenLogprobs};

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
    pub fn refill(&self, taken: &mut VecDeque<Queued>, wait: &Wait<'_>) -> Refill {
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

    /// Has the request of a tag, or one of its samples, not ended?
    pub fn is_open(&self, tag: u64) -> bool {
        locked(&self.queue).open.contains_key(&tag)
    }

    /// Notes that what is open of a tag is aborted. False if there is nothing.
    pub fn abort(&self, tag: u64) -> bool {
        let queue = locked(&self.queue);
        let open = queue.open.get(&tag);
        open.inspect(|open| open.aborted.store(true, Ordering::Release)).is_some()
    }

    /// Likewise of all that is open.
    pub fn abort_all(&self) {
        let queue = locked(&self.queue);
        queue.open.values().for_each(|open| open.aborted.store(true, Ordering::Release));
    }

    /// From now on nobody reads; gives how many ends have not been taken. What lies in the queue is dropped.
    pub fn leave(&self) -> usize {
        let (left, open) = {
            let mut queue = locked(&self.queue);
            self.unread.store(true, Ordering::Release);
            (std::mem::take(&mut queue.events), queue.open_count)
        };
        drop(left); // Without the lock: a permit has one of its own.
        open
    }

    /// The end of a request was taken. False if others are open still.
    pub fn close(&self, tag: u64) -> bool {
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
pub enum Wait<'a> {
    Forever,
    Until(Instant),
    /// Not on its thread: it is woken.
    Wake(&'a Waker),
}

pub enum Refill {
    Some,
    NotYet,
    Over,
}
