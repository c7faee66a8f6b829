//! Prompts to token ids, on threads of their own: a chat template and a tokenizer take a millisecond or a second, and
//! neither the engine nor the caller waits for them.
//!
//! ```text
//!   text, conversation ──> by turns of the sessions ──> thread 1 … n: render, encode ──> the engine's thread
//!                                                                        └── refused ──> the request's end
//! ```
//!
//! Requests may overtake each other here by as many as there are threads.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Condvar, Mutex, PoisonError};

use minisgl_core::sampling::SamplingParams;

use super::engine::Ready;
use super::fair::{FairQueue, Waiting};
use super::handle::Shared;
use super::locked;
use super::output::Output;
use crate::request::{Given, Prompt, RequestError, TokenRules};

/// A request that is to be encoded.
pub struct Job {
    pub prompt: Prompt,
    pub given: Option<Given>,
    pub params: SamplingParams,
    pub rules: TokenRules,
    pub output: Box<Output>,
}

impl Waiting for Job {
    fn session(&self) -> u64 {
        self.output.session()
    }
}

impl Job {
    /// The request, ready for the engine; `None` if it has ended here.
    pub fn encode(self, shared: &Shared) -> Option<Ready> {
        if self.output.is_unwanted() {
            return Some(Ready { prompt: Vec::new(), params: self.params, rules: None, output: self.output });
        }
        // A tokenizer is a program of others', and a file of the user's makes it.
        let room = self.params.max_tokens.min(1);
        let encode = || -> Result<_, RequestError> {
            let rules = shared.text.rules(self.rules)?;
            let prompt = shared.encode(self.prompt, room)?;
            let given = self.given.map(|given| shared.encode_given(given, room)).transpose()?;
            Ok((prompt, given, rules))
        };
        let encoded = catch_unwind(AssertUnwindSafe(encode));
        let encoded = encoded.unwrap_or_else(|_| Err(RequestError::Encode("it panicked".to_owned())));
        match encoded {
            Ok((prompt, given, rules)) => {
                Some(Ready { rules, ..Ready::new(prompt, given, self.params, self.output) })
            }
            Err(error) => {
                self.output.reject(error);
                None
            }
        }
    }
}

/// The jobs that wait for a thread.
pub struct Encoders {
    jobs: Mutex<Jobs>,
    posted: Condvar,
}

struct Jobs {
    waiting: FairQueue<Job>,
    idle: usize,
    closed: bool,
}

impl Encoders {
    pub fn new() -> Self {
        let jobs = Jobs { waiting: FairQueue::new(), idle: 0, closed: false };
        Encoders { jobs: Mutex::new(jobs), posted: Condvar::new() }
    }

    /// Appends a job; dropped if no thread will take it.
    pub fn post(&self, job: Job) {
        let mut jobs = locked(&self.jobs);
        if jobs.closed {
            drop(jobs);
            return drop(job);
        }
        jobs.waiting.push(job);
        if jobs.idle > 0 {
            self.posted.notify_one();
        }
    }

    /// What a thread is to do next, waited for; `None` when it is to end.
    pub fn next(&self) -> Option<Job> {
        let mut jobs = locked(&self.jobs);
        loop {
            if jobs.closed {
                return None;
            }
            if let Some(job) = jobs.waiting.pop() {
                return Some(job);
            }
            jobs.idle += 1;
            jobs = self.posted.wait(jobs).unwrap_or_else(PoisonError::into_inner);
            jobs.idle -= 1;
        }
    }

    /// Ends the threads and drops the jobs.
    pub fn close(&self) {
        let mut jobs = locked(&self.jobs);
        jobs.closed = true;
        let waiting = std::mem::replace(&mut jobs.waiting, FairQueue::new());
        drop(jobs);
        drop(waiting);
        self.posted.notify_all();
    }
}
