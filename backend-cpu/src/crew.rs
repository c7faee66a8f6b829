//! The threads: one of a rayon pool runs the commands, and all of them share each command's loops.
//!
//! ```text
//!   host ── job ──> desk ──> resident thread ── loops ──> the pool's other threads
//!   host <───────── desk <── done
//! ```
//!
//! Entering a rayon pool from outside allocates now and then; inside it, loops do not. So one job lives in the pool as
//! long as the device does, and the host hands it work over a desk: a mutex around the machine. The host waits
//! meanwhile, so that as many threads are busy as the pool has.
//!
//! Invariant: a job is on the desk only between the host's placing it and the resident's taking it, and the host
//! placed it and waits; so nobody else finds the desk unlocked with work on it.

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

/// The pool and the desk.
pub struct Crew {
    shared: Arc<Shared>,
    pool: ThreadPool,
}

#[derive(Default)]
struct Shared {
    desk: Mutex<Desk>,
    asked: Condvar,
    done: Condvar,
}

#[derive(Default)]
pub struct Desk {
    /// What the host reaches between jobs.
    pub machine: Machine,
    job: Option<Job>,
    result: Option<Result<(), CpuError>>,
}

impl Crew {
    /// Starts as many threads as the machine runs at once, or so many.
    pub fn new(threads: Option<usize>) -> Result<Crew, CpuError> {
        let name = |i| format!("minisgl-cpu-{i}");
        // Rayon takes 0 for as many as the machine runs.
        let pool = ThreadPoolBuilder::new().num_threads(threads.unwrap_or(0)).thread_name(name).build();
        let pool = pool.map_err(|error| CpuError::Threads(error.to_string()))?;
        let shared = Arc::new(Shared::default());
        let resident = shared.clone();
        pool.spawn(move || resident.serve());
        Ok(Crew { shared, pool })
    }

    /// Threads that share the work.
    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// The machine, for the host, between jobs.
    pub fn desk(&self) -> MutexGuard<'_, Desk> {
        self.shared.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a job done.
    pub fn run(&self, job: Job) -> Result<(), CpuError> {
        let mut desk = self.desk();
        desk.job = Some(job);
        self.shared.asked.notify_one();
        loop {
            if let Some(result) = desk.result.take() {
                return result;
            }
            desk = self.shared.done.wait(desk).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Loads a weight.
    pub fn load(&self, role: WeightRole, parts: &[HostTensor]) -> Result<Weight, CpuError> {
        self.run(Job::Load(role, parts.to_vec()))?;
        Ok(Weight(self.desk().machine.weights.len() - 1))
    }

    /// Puts another in the place of a weight.
    pub fn reload(&self, weight: Weight, role: WeightRole, parts: &[HostTensor]) -> Result<(), CpuError> {
        self.run(Job::Reload(weight, role, parts.to_vec()))
    }
}

impl Shared {
    /// The resident's life: takes jobs until it is told to stop.
    fn serve(&self) {
        let mut desk = self.desk.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let Desk { machine, job, .. } = &mut *desk;
            let result = match job.take() {
                Some(Job::Stop) => return,
                Some(Job::Run(command)) => machine.run(&command),
                Some(Job::Replay(commands)) => commands.iter().try_for_each(|command| machine.run(command)),
                Some(Job::Load(role, parts)) => {
                    Matrix::new(role, &parts).map(|matrix| machine.weights.push(matrix))
                }
                Some(Job::Reload(weight, role, parts)) => machine.weights[weight.0].replace(role, &parts),
                None => {
                    desk = self.asked.wait(desk).unwrap_or_else(PoisonError::into_inner);
                    continue;
                }
            };
            desk.result = Some(result);
            self.done.notify_one();
        }
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.desk().job = Some(Job::Stop);
        self.shared.asked.notify_one();
    }
}
