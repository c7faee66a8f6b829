//! What runs an engine's steps: one device, or several that share the work of each.
//!
//! ```text
//!   Engine ── batch ──> Executor ──┬── Local: a model on a device
//!   Engine <── tokens ── Executor  └── several ranks, each a Local on a thread of its own, all given the same batch
//! ```
//!
//! The engine decides what a step holds; an executor packs it, has it run and brings back what came out. Where there are several
//! devices, each gets the same batch and keeps the same page table, slots and token pool: what a step does is a function of its
//! rows alone, so nothing but sums of activations passes between them.
//!
//! Two steps can be in flight, and take turns at two places, 0 and 1. Nothing allocates once [`Executor::record`] is through.

use crate::backend::{DeviceInfo, Memory};
use crate::batch::{Batch, StepShape};
use crate::config::Limits;
use crate::request::Ticket;
use crate::sampling::RowLogprobs;

/// What the engine has to know of the model that an executor runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelInfo {
    /// Tokens that the output layer tells apart.
    pub vocab: u32,
    /// Values of a token's hidden state.
    pub hidden: u32,
    /// Can it make logits of them?
    pub has_head: bool,
    /// The longest sequence, in tokens, that the model's positions reach.
    pub max_positions: u32,
    /// Positions that any layer's tokens attend to at most, their own included; `None`: all.
    pub window: Option<u32>,
}

/// What a step brought back.
#[derive(Clone, Copy, Debug)]
pub struct Results<'a> {
    /// Of each sampled row; of none where no logits were wanted.
    pub tokens: &'a [u32],
    /// Likewise, if the batch wants them.
    pub logprobs: &'a [RowLogprobs],
    /// Of each scored token.
    pub scores: &'a [RowLogprobs],
    /// Milliseconds, by the device's clock, since the beginning of the step completed before; 0 for the first.
    pub since_ms: f32,
    /// How long it took on the device, in milliseconds.
    pub took_ms: f32,
}

/// A decode step could not be recorded.
#[derive(Debug)]
pub struct RecordError<E> {
    /// The step of so many rows.
    pub rows: u32,
    /// Steps that were recorded by then, of how many.
    pub recorded: usize,
    /// Likewise.
    pub count: usize,
    /// What the device said.
    pub source: E,
}

/// See the module. Calls come in this order: [`Executor::reserve`], [`Executor::alloc_pages`], [`Executor::record`], then steps;
/// pages that turn out to be too many are freed and allocated anew before any step.
pub trait Executor {
    /// Why an operation failed; its text tells the user what to do.
    type Error: core::error::Error + Send + Sync + 'static;

    /// The device's name and element sizes; of several, what holds for each.
    fn info(&self) -> DeviceInfo;

    /// The model.
    fn model(&self) -> ModelInfo;

    /// Memory free now; of several devices that of the one with the least.
    ///
    /// # Errors
    /// Those of the device; likewise below.
    fn memory(&self) -> Result<Memory, Self::Error>;

    /// Bytes of a device's memory that one KV page takes.
    fn page_bytes(&self, page_size: u32) -> Result<u64, Self::Error>;

    /// Does the error say that a device's memory was too little?
    fn is_out_of_memory(error: &Self::Error) -> bool;

    /// Plans every buffer but the KV pages, once.
    fn reserve(&mut self, limits: &Limits) -> Result<(), Self::Error>;

    /// Allocates [`Limits::pages`] pages.
    fn alloc_pages(&mut self, limits: &Limits) -> Result<(), Self::Error>;

    /// Frees the pages, if there are any, and what was recorded on them, to be allocated anew.
    fn free_pages(&mut self) -> Result<(), Self::Error>;

    /// Records the decode steps of up to [`Limits::graph_rows`] rows, in place of those recorded before.
    fn record(&mut self, limits: &Limits) -> Result<(), RecordError<Self::Error>>;

    /// Enqueues a step at place `at`, from its upload to the download of its results. Its counts are `shape`: those of the batch,
    /// or of a recorded step that the batch is padded to. `write_mask` writes the masks of the requests that
    /// [`Batch::masks`] names, in their order. Does not wait for the step, nor for any but the one that was at this place before.
    fn launch(
        &mut self,
        at: usize,
        batch: &Batch,
        shape: StepShape,
        write_mask: &mut dyn FnMut(Ticket, &mut [u32]),
    ) -> Result<(), Self::Error>;

    /// Is the step at this place known to have run? Does not wait. Where something failed it may be: whoever waits hears of it.
    fn has_ended(&self, at: usize) -> bool;

    /// Waits for the step at this place. Steps are completed in the order of their launch.
    fn complete(&mut self, at: usize) -> Result<Results<'_>, Self::Error>;

    /// The hidden state of a row that [`Batch::embedded`] names, `[hidden]`, of the step at this place, which has been completed.
    fn hidden(&mut self, at: usize, row: u32) -> Result<&[f32], Self::Error>;
}
