//! What can go wrong with ranks, and which of them it was.

use std::error::Error;
use std::io;

use thiserror::Error;

/// Why a step, or an executor of several ranks, failed.
#[derive(Debug, Error)]
pub enum RankError<E: Error + 'static> {
    /// A rank's own error.
    #[error("rank {rank}: {source}")]
    Failed {
        /// Which one.
        rank: u32,
        /// What it says.
        #[source]
        source: E,
    },
    /// A rank's thread panicked.
    #[error("rank {rank} panicked: {message}")]
    Panicked {
        /// Which one.
        rank: u32,
        /// What it said.
        message: String,
    },
    /// A rank's results did not come when another's had.
    #[error("rank {rank} did not end a step within {seconds} s of another: it hangs; build the engine anew")]
    Late {
        /// The first such.
        rank: u32,
        /// How long it was waited for.
        seconds: f32,
    },
    /// Ranks that should have the same bits have not.
    #[error(
        "ranks 0 and {rank} drew different tokens in one step: a device computes wrongly; check them, and build the engine anew"
    )]
    Differ {
        /// The first that differs.
        rank: u32,
    },
    /// A rank failed before.
    #[error("the ranks have ended, for one failed before; build the engine anew")]
    Ended,
    /// The system gives no thread.
    #[error(
        "a thread for rank {rank} can't be started: {reason}; raise the limit of processes (ulimit -u) or free memory"
    )]
    Thread {
        /// For which rank.
        rank: u32,
        /// What it says.
        reason: io::Error,
    },
}
