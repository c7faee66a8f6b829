//! How many KV pages an engine has: what the device's memory holds when everything else is there.
//!
//! ```text
//!   device memory   │ weights │ buffers │ pages, a share of the rest │ recorded steps │ for others │
//! ```
//!
//! Recorded steps know where the pages lie, so they come behind them, and what they take shows only then. Where less is left
//! than they need, how many of them it was enough for says what all need: the pages are allocated anew, and leave that much.
//! Other processes may take memory meanwhile, so each attempt begins with what is free now.
//!
//! Invariant: each attempt is for fewer pages than the one before, and none for fewer than the least.

use crate::backend::Memory;
use crate::config::Limits;
use crate::engine_error::EngineError;
use crate::executor::{Executor, RecordError};

/// Counts pages by the memory that there is, up to [`Limits::pages`] of them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fit {
    /// Share, in (0, 1], that the pages may take of what is free beside everything else.
    pub share: f64,
    /// Pages that an engine is of use with.
    pub least: u32,
}

/// Allocates the pages, `limits.pages` of them or as `fit` says, and records the decode steps. Gives the capacities with the
/// pages that there are, and the memory before the steps were recorded.
pub(crate) fn fitted<X: Executor>(
    executor: &mut X,
    mut limits: Limits,
    fit: Option<Fit>,
) -> Result<(Limits, Memory), EngineError<X::Error>> {
    let page_bytes = executor.page_bytes(limits.page_size).map_err(EngineError::Setup)?;
    let Some(Fit { share, least }) = fit else {
        return attempt(executor, limits, page_bytes).map_err(|failed| failed.error);
    };
    let least = least.max(1);
    let mut recording = 0;
    loop {
        let free = executor.memory().map_err(EngineError::Setup)?.free;
        // One is the dummy page.
        let held = |bytes: u64| (bytes / page_bytes).saturating_sub(1).min(u64::from(limits.pages)) as u32;
        let (share, rest) = (held((free as f64 * share) as u64), held(free.saturating_sub(recording)));
        if share < least {
            let (fit, page_size) = (share, limits.page_size);
            return Err(EngineError::Pages { fit, least, page_size, page_bytes, free, recording });
        }
        limits.pages = rest.clamp(least, share);
        match attempt(executor, limits, page_bytes) {
            Err(failed) if failed.out_of_memory => recording = recording.max(failed.recording),
            done => return done.map_err(|failed| failed.error),
        }
        executor.free_pages().map_err(EngineError::Setup)?;
        limits.pages = limits.pages.saturating_sub(1);
    }
}

struct Failed<E: core::error::Error + 'static> {
    error: EngineError<E>,
    out_of_memory: bool,
    /// Bytes that recording needs, as far as can be told.
    recording: u64,
}

fn attempt<X: Executor>(
    executor: &mut X,
    limits: Limits,
    page_bytes: u64,
) -> Result<(Limits, Memory), Failed<X::Error>> {
    let setup = |source: X::Error| {
        let out_of_memory = X::is_out_of_memory(&source);
        Failed { error: EngineError::Setup(source), out_of_memory, recording: 0 }
    };
    executor.alloc_pages(&limits).map_err(setup)?;
    let memory = executor.memory().map_err(setup)?;
    match executor.record(&limits) {
        Ok(()) => Ok((limits, memory)),
        Err(RecordError { rows, recorded, count, source }) => Err(Failed {
            out_of_memory: X::is_out_of_memory(&source),
            error: EngineError::Capture { rows, source },
            recording: match recorded as u64 {
                0 => memory.free.saturating_mul(2).saturating_add(page_bytes),
                recorded => memory.free.saturating_mul(count as u64) / recorded,
            },
        }),
    }
}
