//! The threads: one of a rayon pool runs the commands, and all of them share each command's loops.
//!
//! ```text
//!   host ── job ──> mutex ──> resident thread ── loops ──> the pool's other threads
//!   host <──────── mutex <── result
//! ```
//!
//! Entering a rayon pool from outside allocates now and then; inside it, loops do not. So one job lives in the pool as
//! long as the device does, and the host hands it work by way of a mutex around the machine. The host waits
//! meanwhile, so that as many threads are busy as the pool has.
//!
//! Invariant: there is a job behind the mutex only between the host's placing it and the resident's taking it, and the host
//! placed it and waits; so nobody else finds the mutex unlocked and work behind it.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use minisgl_core::backend::WeightRole;
use minisgl_core::tensor::HostTensor;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::command::{Command, Machine};
use crate::error::CpuError;
use crate::weights::{Matrix, Weight};

/// What the host asks for. A command lies here unboxed, because running one must not allocate.
#[allow(clippy::large_enum_variant)]
pub enum Job {
    /// Run one command.
    Run(Command),
    /// Run recorded commands, one after the other.
    Replay(Arc<[Command]>),
    /// Add a weight.
    Load(WeightRole, Vec<HostTensor>),
    /// Put another in the place of a weight.
    Reload(Weight, WeightRole, Vec<HostTensor>),
    /// End the thread.
    Stop,
}

/// The pool, and what host and resident share.
pub struct Workers {
    handover: Arc<Handover>,
    pool: ThreadPool,
}

#[derive(Default)]
struct Handover {
    shared: Mutex<Shared>,
    asked: Condvar,
    done: Condvar,
}

/// What host and resident share.
#[derive(Default)]
pub struct Shared {
    /// What the host reaches between jobs.
    pub machine: Machine,
    job: Option<Job>,
    result: Option<Result<(), CpuError>>,
}

impl Workers {
    /// Starts as many threads as the machine runs at once, or so many.
    pub fn new(threads: Option<usize>) -> Result<Workers, CpuError> {
        let name = |i| format!("minisgl-cpu-{i}");
        // Rayon takes 0 for as many as the machine runs.
        let pool = ThreadPoolBuilder::new().num_threads(threads.unwrap_or(0)).thread_name(name).build();
        let pool = pool.map_err(|error| CpuError::Threads(error.to_string()))?;
        let handover = Arc::new(Handover::default());
        let resident = handover.clone();
        pool.spawn(move || resident.serve());
        Ok(Workers { handover, pool })
    }

    /// Threads that share the work.
    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// The machine, for the host, between jobs.
    pub fn shared(&self) -> MutexGuard<'_, Shared> {
        self.handover.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a job done.
    pub fn run(&self, job: Job) -> Result<(), CpuError> {
        let mut shared = self.shared();
        shared.job = Some(job);
        self.handover.asked.notify_one();
        loop {
            if let Some(result) = shared.result.take() {
                return result;
            }
            shared = self.handover.done.wait(shared).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Loads a weight.
    pub fn load(&self, role: WeightRole, parts: &[HostTensor]) -> Result<Weight, CpuError> {
        self.run(Job::Load(role, parts.to_vec()))?;
        Ok(Weight(self.shared().machine.weights.len() - 1))
    }

    /// Puts another in the place of a weight.
    pub fn reload(&self, weight: Weight, role: WeightRole, parts: &[HostTensor]) -> Result<(), CpuError> {
        self.run(Job::Reload(weight, role, parts.to_vec()))
    }
}

impl Handover {
    /// The resident's life: takes jobs until it is told to stop.
    fn serve(&self) {
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let Shared { machine, job, .. } = &mut *shared;
            let result = match job.take() {
                Some(Job::Stop) => return,
                Some(Job::Run(command)) => machine.run(&command),
                Some(Job::Replay(commands)) => commands.iter().try_for_each(|command| machine.run(command)),
                Some(Job::Load(role, parts)) => {
                    Matrix::new(role, &parts).map(|matrix| machine.weights.push(matrix))
                }
                Some(Job::Reload(weight, role, parts)) => machine.weights[weight.0].replace(role, &parts),
                None => {
                    shared = self.asked.wait(shared).unwrap_or_else(PoisonError::into_inner);
                    continue;
                }
            };
            shared.result = Some(result);
            self.done.notify_one();
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared().job = Some(Job::Stop);
        self.handover.asked.notify_one();
    }
}
