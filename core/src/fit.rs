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

use crate::backend::{Memory, Model, Sampler};
use crate::config::Limits;
use crate::engine::EngineError;
use crate::graphs::{CaptureError, DecodeGraphs};
use crate::resident::Resident;

/// Counts pages by the memory that there is, up to [`Limits::pages`] of them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fit {
    /// Share, in (0, 1], that the pages may take of what is free beside everything else.
    pub share: f64,
    /// Pages that an engine is of use with.
    pub least: u32,
}

/// What lies behind everything else on the device.
pub(crate) struct Fitted<G> {
    /// Those asked for, with the pages that there are.
    pub limits: Limits,
    pub graphs: DecodeGraphs<G>,
    /// Before the steps were recorded.
    pub memory: Memory,
}

/// Allocates the pages, `limits.pages` of them or as `fit` says, and records the decode steps.
pub(crate) fn fitted<B: Sampler, M: Model<B>>(
    backend: &mut B,
    model: &mut M,
    resident: &mut Resident<B::Buffer>,
    mut limits: Limits,
    fit: Option<Fit>,
    staging: &mut B::Pinned,
) -> Result<Fitted<B::Graph>, EngineError<B::Error>> {
    let Some(Fit { share, least }) = fit else {
        return attempt(backend, model, resident, limits, staging).map_err(|failed| failed.error);
    };
    let least = least.max(1);
    let page_bytes = page_bytes(model, &limits);
    let mut recording = 0;
    loop {
        let free = backend.memory().map_err(EngineError::Setup)?.free;
        // One is the dummy page.
        let held = |bytes: u64| (bytes / page_bytes).saturating_sub(1).min(u64::from(limits.pages)) as u32;
        let (share, rest) = (held((free as f64 * share) as u64), held(free.saturating_sub(recording)));
        if share < least {
            let (fit, page_size) = (share, limits.page_size);
            return Err(EngineError::Pages { fit, least, page_size, page_bytes, free, recording });
        }
        limits.pages = rest.clamp(least, share);
        match attempt(backend, model, resident, limits, staging) {
            Err(failed) if failed.out_of_memory => recording = recording.max(failed.recording),
            done => return done.map_err(|failed| failed.error),
        }
        resident.free_history(backend).map_err(EngineError::Setup)?;
        model.free_pages(backend).map_err(EngineError::Setup)?;
        limits.pages = limits.pages.saturating_sub(1);
    }
}

/// Keys and values of a page's tokens, and a word of history for each.
fn page_bytes<B: Sampler, M: Model<B>>(model: &M, limits: &Limits) -> u64 {
    model.page_bytes(limits.page_size) + 4 * u64::from(limits.page_size)
}

struct Failed<E: core::error::Error + 'static> {
    error: EngineError<E>,
    out_of_memory: bool,
    /// Bytes that recording needs, as far as can be told.
    recording: u64,
}

fn attempt<B: Sampler, M: Model<B>>(
    backend: &mut B,
    model: &mut M,
    resident: &mut Resident<B::Buffer>,
    limits: Limits,
    staging: &mut B::Pinned,
) -> Result<Fitted<B::Graph>, Failed<B::Error>> {
    let setup = |source: B::Error| {
        let out_of_memory = B::is_out_of_memory(&source);
        Failed { error: EngineError::Setup(source), out_of_memory, recording: 0 }
    };
    model.alloc_pages(backend, limits.pages, limits.page_size).map_err(setup)?;
    resident.alloc_history(backend, limits.pages).map_err(setup)?;
    resident.clear(backend, &limits).map_err(setup)?;
    let memory = backend.memory().map_err(setup)?;
    match DecodeGraphs::capture(backend, model, resident, &limits, staging) {
        Ok(graphs) => Ok(Fitted { limits, graphs, memory }),
        Err(CaptureError { rows, recorded, count, source }) => Err(Failed {
            out_of_memory: B::is_out_of_memory(&source),
            error: EngineError::Capture { rows, source },
            recording: match recorded as u64 {
                0 => memory.free.saturating_mul(2).saturating_add(page_bytes(model, &limits)),
                recorded => memory.free.saturating_mul(count as u64) / recorded,
            },
        }),
    }
}
