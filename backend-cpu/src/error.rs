//! What can go wrong on the CPU, and what to do about it.

use minisgl_core::backend::{DeviceWords, Purpose};
use thiserror::Error;

/// Why an operation failed.
#[derive(Debug, Error)]
pub enum CpuError {
    /// The machine has not that much memory.
    #[error(
        "not enough memory for {}: {} MiB asked for, {} MiB available; {}",
        .purpose.noun(), .bytes >> 20, .free >> 20, .purpose.advice(WORDS)
    )]
    OutOfMemory {
        /// What it was for.
        purpose: Purpose,
        /// Bytes asked for.
        bytes: u64,
        /// Bytes that were available.
        free: u64,
    },
    /// The operating system refused a thread.
    #[error("cannot start the worker threads: {0}; raise the limit on processes (ulimit -u)")]
    Threads(String),
    /// A host tensor that is no matrix of the kind asked for.
    #[error("tensor {name}: {reason}")]
    Tensor {
        /// The tensor's name in the checkpoint.
        name: String,
        /// What does not fit.
        reason: &'static str,
    },
    /// An operation's input and output share memory.
    #[error("two buffers of one operation overlap; give each its own memory")]
    Overlap,
    /// An operation before the sizes are known.
    #[error("the model's sizes are not known yet; call reserve before the first step")]
    NotReserved,
    /// Something that cannot be part of a recording, or has to be.
    #[error("{0}")]
    Recording(&'static str),
    /// A rank did not come to where the others are.
    #[error(
        "rank {ranks} of those that compute each step together did not come to an exchange within {seconds} s: it hangs, or it \
         failed; build the engine anew"
    )]
    RankLate {
        /// Their numbers.
        ranks: String,
        /// How long they were waited for.
        seconds: f32,
    },
    /// Another rank failed.
    #[error("another of the ranks that compute each step together has ended; its own error says why")]
    RanksEnded,
    /// More than there is room for.
    #[error("{numbers} numbers do not fit an exchange of {room}; call reserve before the first step")]
    Exchange {
        /// Numbers to be exchanged.
        numbers: usize,
        /// Numbers that fit.
        room: usize,
    },
    /// A time was asked of an event that has none.
    #[error("an event's time was asked for before the event was recorded")]
    NoTime,
}

/// What advice on memory says of the CPU.
const WORDS: DeviceWords = DeviceWords { larger: "a machine with more memory", share: None };
