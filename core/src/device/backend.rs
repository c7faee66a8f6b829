//! What the engine asks of a device, in three traits, and what it asks of a model.
//!
//! [`Device`] is memory, order and recorded work: device buffers, pinned staging, three queues, events, capture and
//! replay. [`Sampler`] draws tokens out of logits. [`Ops`] is the transformer's arithmetic at the grain at which the
//! fastest backend fuses it. The engine knows the first two, a model the third; neither knows which device it runs on.
//!
//! Every operation is enqueued and returns at once. Operations of one queue run in the order they were enqueued;
//! across queues an [`Device::Event`] orders them. Operations never allocate: they write into buffers planned before.
//!
//! ```text
//!   host ── upload ──> [upload queue]   the next step's batch ──> waits
//!                                                                │
//!                      [compute queue]  take the batch, begin_step, embed, layers…, logits, sample ── event ──┐
//!   host <── bytes ─── [copy queue]     download tokens <──────────────────────────────────────────────── wait ┘
//! ```

mod weights;

use alloc::string::String;
use alloc::vec::Vec;
use core::ops::Range;

use crate::batch::{Row, StepShape};
use crate::computes::Computes;
use crate::config::Limits;
use crate::kv::KvFormat;
use crate::shard::Slicing;
use crate::spec::{DecoderSpec, Unsupported};
use crate::tensor::HostTensor;

pub use crate::device::purpose::{DeviceWords, Purpose};
pub use crate::spec::Dims;
pub use weights::{ExpertWeights, LayerWeights, MlpWeights, WeightRole};

/// One of a device's three queues. Arithmetic runs on `Compute`; results come back on `Copy`, so that the next step does not wait
/// behind them, and what it is made of goes ahead on `Upload`, so that it need not be waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    /// All arithmetic, and uploads that are ordered by it.
    Compute,
    /// Downloads.
    Copy,
    /// Uploads of what waits for its turn.
    Upload,
}

/// What a buffer's elements are. The activation type is the backend's own: f32 on the CPU, bf16 on CUDA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// A hidden state, in the backend's activation type.
    Activation,
    /// Four bytes of the KV pages; see [`crate::kv`].
    Kv,
    /// A logit, in the backend's logit type.
    Logit,
    /// 32-bit word: token ids, page numbers, the packed batch.
    Word,
    /// 32-bit float: rope angles.
    Float,
}

/// A device as people name it.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// For example `NVIDIA H100 80GB HBM3` or `CPU, 2 threads`.
    pub name: String,
    /// Bytes of one [`Element::Activation`].
    pub activation_bytes: usize,
    /// What keys and values are kept as where a model's spec leaves it open.
    pub kv: KvFormat,
    /// Bytes of one [`Element::Logit`].
    pub logit_bytes: usize,
    /// The smallest page size, in tokens, that the attention operations take.
    pub page_size_min: u32,
    /// How it cuts the columns that ranks share out.
    pub slicing: Slicing,
}

/// Free and total device memory, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// Bytes that can still be allocated.
    pub free: u64,
    /// Bytes that the device has.
    pub total: u64,
}

/// Memory, order and recorded work of a device.
///
/// Buffers are handles, like device addresses: copying one copies no data, and the device frees them all when it is
/// dropped, if not before. Nothing but [`Device::alloc`], [`Device::alloc_pinned`] and [`Device::event`] allocates.
pub trait Device {
    /// Why an operation failed; its text tells the user what to do.
    type Error: core::error::Error + Send + Sync + 'static;
    /// A range of device memory with one element type.
    type Buffer: Copy;
    /// Host memory that copies run from and to without blocking. It remembers the last copy that touches it.
    type Pinned;
    /// A point in a queue.
    type Event;
    /// A recorded list of operations over fixed buffers.
    type Graph;

    /// The device's name and element sizes.
    fn info(&self) -> DeviceInfo;

    /// Memory free now.
    fn memory(&self) -> Result<Memory, Self::Error>;

    /// Allocates `elements` elements; their values are undefined.
    fn alloc(
        &mut self,
        purpose: Purpose,
        element: Element,
        elements: usize,
    ) -> Result<Self::Buffer, Self::Error>;

    /// Frees what [`Device::alloc`] gave, after waiting for everything enqueued. Neither it nor a part of it is used any more.
    fn free(&mut self, buffer: Self::Buffer) -> Result<(), Self::Error>;

    /// Does the error say that the device's memory was too little? What failed so left nothing behind.
    fn is_out_of_memory(error: &Self::Error) -> bool;

    /// The part `range` (in elements) of a buffer.
    fn slice(&self, buffer: Self::Buffer, range: Range<usize>) -> Self::Buffer;

    /// Allocates pinned host memory of `words` 32-bit words, zeroed.
    fn alloc_pinned(&mut self, words: usize) -> Result<Self::Pinned, Self::Error>;

    /// The words of pinned memory, after waiting for the last download into it.
    fn words<'a>(&self, pinned: &'a Self::Pinned) -> Result<&'a [u32], Self::Error>;

    /// The words of pinned memory, to be written, after waiting for every copy that touches it.
    fn words_mut<'a>(&self, pinned: &'a mut Self::Pinned) -> Result<&'a mut [u32], Self::Error>;

    /// Enqueues on the compute queue a copy of words `range` to the same range of `to` (of words or floats).
    fn upload(
        &mut self,
        from: &mut Self::Pinned,
        range: Range<usize>,
        to: Self::Buffer,
    ) -> Result<(), Self::Error>;

    /// Enqueues the same on the upload queue, beside what the compute queue has so far; what is enqueued there from now on waits for it.
    /// Nothing that may still run reads or writes that range.
    fn upload_ahead(
        &mut self,
        from: &mut Self::Pinned,
        range: Range<usize>,
        to: Self::Buffer,
    ) -> Result<(), Self::Error>;

    /// Enqueues on the compute queue a copy of a packed batch to `to`, as many words as its [header](crate::batch::Header) says, from
    /// one half of `halves` and from the other in turn, as often as this runs. By the two words of `turn` it knows whose turn it is: zeros
    /// before the first time.
    fn take_batch(
        &mut self,
        halves: Self::Buffer,
        turn: Self::Buffer,
        to: Self::Buffer,
    ) -> Result<(), Self::Error>;

    /// Enqueues on `queue` a copy of the first `words` words of `from` to the start of `to`.
    fn download(
        &mut self,
        queue: Queue,
        from: Self::Buffer,
        words: usize,
        to: &mut Self::Pinned,
    ) -> Result<(), Self::Error>;

    /// The activations that downloaded words hold, as many as `out` has room for.
    fn widen(words: &[u32], out: &mut [f32]);

    /// Creates an event, not recorded yet.
    fn event(&mut self) -> Result<Self::Event, Self::Error>;

    /// Creates an event that orders and tells no time, which costs a queue less.
    fn untimed_event(&mut self) -> Result<Self::Event, Self::Error>;

    /// Records an event behind everything now in `queue`.
    fn record(&mut self, queue: Queue, event: &mut Self::Event) -> Result<(), Self::Error>;

    /// Makes later work of `queue` wait for an event. The host does not wait.
    fn wait(&mut self, queue: Queue, event: &Self::Event) -> Result<(), Self::Error>;

    /// Milliseconds between two recorded events, after waiting for both.
    fn elapsed_ms(&self, from: &Self::Event, to: &Self::Event) -> Result<f32, Self::Error>;

    /// Has the device come past a recorded event? Does not wait. Where something failed it has: whoever waits hears of it.
    fn has_passed(&self, event: &Self::Event) -> bool;

    /// Waits on the host for everything enqueued.
    fn synchronize(&mut self) -> Result<(), Self::Error>;

    /// Must a step have run once before any is recorded, because a first run takes memory of its own? A device whose recording
    /// runs nothing and needs nothing beforehand says no.
    fn warm_up_before_capture(&self) -> bool {
        true
    }

    /// From here to [`Device::end_capture`] the compute queue's operations are recorded, not run.
    fn begin_capture(&mut self) -> Result<(), Self::Error>;

    /// Ends the recording and makes it ready for replay.
    fn end_capture(&mut self) -> Result<Self::Graph, Self::Error>;

    /// Enqueues the recorded operations on the compute queue.
    fn replay(&mut self, graph: &Self::Graph) -> Result<(), Self::Error>;
}

/// One step as operations see it: its padded counts, and where its data lies on the device.
#[derive(Clone, Copy, Debug)]
pub struct Step<Buf> {
    /// Counts that fix the sizes of grids and loops.
    pub shape: StepShape,
    /// The packed batch (words); see [`crate::batch::Layout`].
    pub batch: Buf,
    /// Where the parts of the packed batch begin.
    pub layout: crate::batch::Layout,
    /// `[slots + 1, table_width]` page numbers (words).
    pub page_table: Buf,
    /// Entries of a slot in the page table.
    pub table_width: u32,
    /// Tokens of a page, a power of two.
    pub page_size: u32,
    /// `[slots + 1]` the token sampled last in each slot (words).
    pub token_pool: Buf,
    /// `[slots + 1]` [`crate::sampling::SlotState`]: how each slot's tokens are drawn (words).
    pub slots: Buf,
    /// `[slots + 1, RULE_WORDS]`: what each slot's request says of single tokens; see [`crate::rules`] (words).
    pub rules: Buf,
    /// `[pages + 1, page_size]`: the token whose key and value lie at a location (words).
    pub history: Buf,
    /// `[2, slots, mask_words]`: the tokens that rows with a [mask](crate::batch::Row::mask) may draw (words).
    pub masks: Buf,
}

/// Keys and values of one layer, each `[pages + 1, kv_heads, page_size, head_dim]` as [`crate::kv`] lays them out.
#[derive(Clone, Copy, Debug)]
pub struct KvLayer<Buf> {
    /// Keys, after q/k norm and rope.
    pub k: Buf,
    /// Values.
    pub v: Buf,
    /// Room for as many pages of keys and of values as the device's own format would have them, the same for all layers, where
    /// [`Ops::widens`] asks for it. Nothing in it is kept from layer to layer.
    pub wide: Option<[Buf; 2]>,
}

/// The stage behind a model's forward pass: tokens out of logits, by what each row's slot says.
pub trait Sampler: Device {
    /// Edits the logits of rows whose slots ask for it, in place, and draws a token for each sampled row by
    /// [`crate::sampling`]'s definition, into `tokens[header.output + row]` (words;
    /// padding rows included) and the token pool. Where there is none, the former gets [`crate::sampling::NO_TOKEN`], the
    /// latter 0.
    fn sample(
        &mut self,
        step: &Step<Self::Buffer>,
        logits: Self::Buffer,
        tokens: Self::Buffer,
    ) -> Result<(), Self::Error>;

    /// For each sampled row that asks for them: the log-probabilities of its token `tokens[header.output + row]` and of the most
    /// probable ones, as [`crate::sampling::RowLogprobs`] at `out[header.output + row]`. The tokens are what [`Sampler::sample`]
    /// drew, or given ones. Nothing is written for a row without a token.
    fn logprobs(
        &mut self,
        step: &Step<Self::Buffer>,
        logits: Self::Buffer,
        tokens: Self::Buffer,
        out: Self::Buffer,
    ) -> Result<(), Self::Error>;
}

/// The transformer's arithmetic. Sizes come from the step, the weights and [`Ops::reserve`]. What operations hand to each
/// other (the residual stream, queries, what attention gives) lies in buffers of the backend's own.
///
/// What the scheduler relies on:
/// - Within a layer, all keys and values of a step are stored before any row of the step attends. Rows of one step may
///   share a page that one of them fills: a prompt maps the pages of an equal prefix that is prefilled beside it, and decode rows
///   of one slot are at consecutive positions (as many and in steps as large as [`crate::speculation`] says).
/// - A token's bits depend on its own sequence alone: not on the rows beside it, on whether it is in a decode row or in a
///   prefill row, nor on where its sequence is cut into chunks.
pub trait Ops: Sampler {
    /// A weight on the device; a handle like [`Device::Buffer`].
    type Weight: Copy;

    /// What of a spec is computed, as facts.
    fn computes(&self) -> Computes;

    /// Can every layer be computed exactly as the spec says? Asked before a weight is loaded.
    ///
    /// # Errors
    /// Names the first thing that can't.
    fn supports(&self, spec: &DecoderSpec) -> Result<(), Unsupported>;

    /// Does it widen pages that are kept so for rows of many tokens, to the bytes of its own format ([`DeviceInfo::kv`]), in
    /// [`KvLayer::wide`]?
    fn widens(&self, kept: KvFormat) -> bool {
        let _ = kept;
        false
    }

    /// Plans the buffers and the scratch memory of all operations for a model and capacities, once, before the first step.
    /// Returns the words that [`Ops::plan`] may fill in each step.
    fn reserve(&mut self, spec: &DecoderSpec, limits: &Limits) -> Result<usize, Self::Error>;

    /// Puts a weight on the device. The parts are stacked along the first dimension.
    fn load(&mut self, role: WeightRole, parts: &[HostTensor]) -> Result<Self::Weight, Self::Error>;

    /// Puts other elements in the place of those of a weight that [`Ops::load`] gave, in the same role and of the same shape. Its
    /// handle stays what it is, in recorded steps too. No step may be enqueued.
    fn reload(
        &mut self,
        weight: Self::Weight,
        role: WeightRole,
        parts: &[HostTensor],
    ) -> Result<(), Self::Error>;

    /// Waits until all weights are there; what only loading them needs goes.
    fn end_loading(&mut self) -> Result<(), Self::Error>;

    /// Says that `linear` is only ever applied to rows that were normed with the scale `norm`, both loaded before: a
    /// backend whose [`Ops::decoder_layers`] are fused may multiply the scale into the matrix's columns here, once (and
    /// again after [`Ops::reload`]), and leave it out of the step. This body leaves both as they are.
    fn fold_norm(&mut self, norm: Self::Weight, linear: Self::Weight) -> Result<(), Self::Error> {
        let _ = (norm, linear);
        Ok(())
    }

    /// Derives a backend's own plan for a step (its attention work list, say) from the rows, padding included. Runs
    /// on the host; the words travel with the batch. Must not allocate.
    fn plan(&self, shape: StepShape, rows: &[Row], words: &mut [u32]);

    /// Applies the batch's updates of the page table, the slots and their rules. The first operation of every step.
    fn begin_step(&mut self, step: &Step<Self::Buffer>) -> Result<(), Self::Error>;

    /// The residual stream becomes `table[id of token t]`, where the id is the batch's or, for
    /// [`crate::batch::LAST_TOKEN`], the pool's. The id goes to the token's place in the history.
    fn embed(&mut self, step: &Step<Self::Buffer>, table: Self::Weight) -> Result<(), Self::Error>;

    /// The layers of the spec, one after the other, over the residual stream: in each, keys and values of all rows are stored, then
    /// all rows attend. `ropes` are the layers' tables, `[positions, rotated / 2]` pairs of cosine and sine, where they have one.
    fn decoder_layers(
        &mut self,
        step: &Step<Self::Buffer>,
        weights: &[LayerWeights<Self::Weight>],
        ropes: &[Option<Self::Buffer>],
        kv: &[KvLayer<Self::Buffer>],
    ) -> Result<(), Self::Error>;

    /// For the last token of each sampled row: `out = rms_norm(residual stream)`, `[samples, hidden]`.
    fn final_norm(
        &mut self,
        step: &Step<Self::Buffer>,
        weight: Self::Weight,
        out: Self::Buffer,
    ) -> Result<(), Self::Error>;

    /// `out = head @ x`, `[samples, vocab]` logits.
    fn logits(
        &mut self,
        step: &Step<Self::Buffer>,
        x: Self::Buffer,
        head: Self::Weight,
        out: Self::Buffer,
    ) -> Result<(), Self::Error>;

    /// Logits `rows` of a buffer that [`Ops::logits`] filled, `[rows, vocab]` as f32, after waiting for everything
    /// enqueued. For tests and for scoring; allocates its result.
    fn read_logits(
        &mut self,
        logits: Self::Buffer,
        vocab: u32,
        rows: Range<usize>,
    ) -> Result<Vec<f32>, Self::Error>;
}

/// A model over a backend: it turns the step's batch into hidden states, and those into logits.
pub trait Model<B: Device> {
    /// Bytes of KV that one page takes, over all layers; and its share of one layer's wide pages, where the device has such.
    fn page_bytes(&self, page_size: u32) -> u64;

    /// Tokens that the output layer tells apart; ids in prompts lie below it.
    fn vocab(&self) -> u32;

    /// The longest sequence, in tokens, that the model's positions reach.
    fn max_positions(&self) -> u32;

    /// Positions that any layer's tokens attend to at most, their own included; `None`: all. The pages behind it are given
    /// back while a request runs.
    fn window(&self) -> Option<u32> {
        None
    }

    /// Plans the model's buffers for these capacities, all but the KV pages, once, before the first step. Returns the words
    /// that [`Model::plan`] may fill in each step.
    fn reserve(&mut self, backend: &mut B, limits: &Limits) -> Result<usize, B::Error>;

    /// Allocates the KV cache, `pages` pages of `page_size` tokens, after [`Model::reserve`] and before the first step.
    fn alloc_pages(&mut self, backend: &mut B, pages: u32, page_size: u32) -> Result<(), B::Error>;

    /// Frees the KV cache, if there is one, to be allocated anew.
    fn free_pages(&mut self, backend: &mut B) -> Result<(), B::Error>;

    /// See [`Ops::plan`].
    fn plan(&self, backend: &B, shape: StepShape, rows: &[Row], words: &mut [u32]);

    /// Values of a token's hidden state.
    fn hidden(&self) -> u32;

    /// Can it make logits of hidden states? A checkpoint that was made for embeddings may have nothing for it.
    fn has_head(&self) -> bool {
        true
    }

    /// Enqueues the forward pass of a step up to the residual stream: from the packed batch through all layers.
    fn forward(&mut self, backend: &mut B, step: &Step<B::Buffer>) -> Result<(), B::Error>;

    /// Enqueues the final norm of the last token of each sampled row, into [`Model::normed`]. `step` is the step just run, whose
    /// sampled rows may be others, at most [`Limits::logit_rows`].
    fn norm(&mut self, backend: &mut B, step: &Step<B::Buffer>) -> Result<(), B::Error>;

    /// Enqueues logits of what [`Model::norm`] gave for the same step, into [`Model::logits`]. Asked of models that have a
    /// [head](Model::has_head).
    fn head(&mut self, backend: &mut B, step: &Step<B::Buffer>) -> Result<(), B::Error>;

    /// Where the final norm of sampled rows' last tokens lies, `[samples, hidden]` activations. Asked after [`Model::reserve`].
    fn normed(&self) -> B::Buffer;

    /// Where a step leaves the logits of its sampled rows, `[samples, vocab]`. Asked after [`Model::reserve`].
    fn logits(&self) -> B::Buffer;

    /// Bytes of weights that a decode step reads, for the byte model of the reports.
    fn step_weight_bytes(&self) -> u64;
}

/// KV buffers of every layer.
pub type KvCache<Buf> = Vec<KvLayer<Buf>>;
