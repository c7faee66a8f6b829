//! Threads that find masks.
//!
//! One queue for all: what was asked for first is found first. The threads end when the last [`Workers`] is dropped.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

/// Deep grammars recurse; what is not touched takes no memory.
const STACK_BYTES: usize = 64 << 20;

type Job = Box<dyn FnOnce() + Send>;

/// See the module.
#[derive(Debug)]
pub struct Workers(Arc<Queue>);

struct Queue {
    jobs: Mutex<Jobs>,
    posted: Condvar,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Queue")
    }
}

#[derive(Default)]
struct Jobs {
    waiting: VecDeque<Job>,
    idle: usize,
    closed: bool,
}

impl Workers {
    /// So many threads.
    ///
    /// # Errors
    /// The system does not give one.
    pub fn new(threads: usize) -> io::Result<Self> {
        let workers = Workers(Arc::new(Queue { jobs: Mutex::default(), posted: Condvar::new() }));
        for _ in 0..threads {
            let queue = workers.0.clone();
            let thread = thread::Builder::new().name("minisgl-mask".to_owned()).stack_size(STACK_BYTES);
            thread.spawn(move || {
                while let Some(job) = queue.next() {
                    job();
                }
            })?;
        }
        Ok(workers)
    }

    /// Has something done.
    pub fn post(&self, job: Job) {
        let mut jobs = locked(&self.0.jobs);
        jobs.waiting.push_back(job);
        let idle = jobs.idle > 0;
        drop(jobs);
        if idle {
            self.0.posted.notify_one();
        }
    }
}

impl Queue {
    /// What a thread is to do next; `None` when it is to end.
    fn next(&self) -> Option<Job> {
        let mut jobs = locked(&self.jobs);
        loop {
            if let Some(job) = jobs.waiting.pop_front() {
                return Some(job);
            }
            if jobs.closed {
                return None;
            }
            jobs.idle += 1;
            jobs = self.posted.wait(jobs).unwrap_or_else(PoisonError::into_inner);
            jobs.idle -= 1;
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        locked(&self.0.jobs).closed = true;
        self.0.posted.notify_all();
    }
}

/// Locks a mutex whose contents are sound even if somebody panicked while holding it.
pub fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
