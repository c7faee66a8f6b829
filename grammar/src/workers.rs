//! Threads that find masks.
//!
//! One queue for all: what was asked for first is found first. The threads end when the last [`Workers`] is dropped.
//!
//! To wake a thread takes as long as some masks. So one is woken at a time, and it wakes the next if there is more to do: who posts a
//! hundred jobs, between two steps of an engine, wakes one or two.

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
    /// One of these has been woken, and does not know it yet.
    waking: bool,
    closed: bool,
}

impl Jobs {
    /// Is a thread to be woken now? Whoever asks does it, or nobody will.
    fn wakes(&mut self) -> bool {
        let wakes = !self.waiting.is_empty() && self.idle > 0 && !self.waking;
        self.waking |= wakes;
        wakes
    }
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
        self.0.wake(jobs);
    }
}

impl Queue {
    /// What a thread is to do next; `None` when it is to end.
    fn next(&self) -> Option<Job> {
        let mut jobs = locked(&self.jobs);
        loop {
            if let Some(job) = jobs.waiting.pop_front() {
                self.wake(jobs);
                return Some(job);
            }
            if jobs.closed {
                return None;
            }
            jobs.idle += 1;
            jobs = self.posted.wait(jobs).unwrap_or_else(PoisonError::into_inner);
            (jobs.idle, jobs.waking) = (jobs.idle - 1, false);
        }
    }

    /// Wakes a thread, if there is something to do for it.
    fn wake(&self, mut jobs: MutexGuard<'_, Jobs>) {
        let wakes = jobs.wakes();
        drop(jobs);
        if wakes {
            self.posted.notify_one();
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
