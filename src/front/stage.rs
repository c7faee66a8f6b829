//! What waits for a thread of its stage: by turns of the sessions, without a bound but the permits.

use std::sync::{Condvar, Mutex, PoisonError};

use super::fair::{FairQueue, Waiting};
use super::locked;

/// The jobs of a stage that wait for one of its threads.
pub struct Stage<J> {
    jobs: Mutex<Jobs<J>>,
    posted: Condvar,
}

struct Jobs<J> {
    waiting: FairQueue<J>,
    idle: usize,
    closed: bool,
}

impl<J: Waiting> Stage<J> {
    pub fn new() -> Self {
        let jobs = Jobs { waiting: FairQueue::new(), idle: 0, closed: false };
        Stage { jobs: Mutex::new(jobs), posted: Condvar::new() }
    }

    /// Appends a job; dropped if no thread will take it.
    pub fn post(&self, job: J) {
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
    pub fn next(&self) -> Option<J> {
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
