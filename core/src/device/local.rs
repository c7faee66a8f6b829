//! A model on one device as an [`Executor`].
//!
//! ```text
//!   upload queue    batch ──> waits
//!   compute queue   upload masks │ take the batch, forward, sample (recorded, or not) │ logprobs, hidden states, scores │ mark
//!   copy queue                                                         wait, record │ download tokens, logprobs, scores
//! ```
//!
//! Between two steps that follow each other there is nothing but the recorded work's own beginning: what tells the time is recorded in the
//! copy queue, behind each step's end, and in the compute queue only before a step that finds the device idle. A step that follows
//! another begins where that one ended.
//!
//! What may be used again, and when:
//! - Masks. They are uploaded in the compute queue, behind the steps that read those before them.
//! - Staging. [`Device::words_mut`] waits for the copy from it, two steps ago.
//! - Hidden states. They are copied in the compute queue, for the next step writes to the same place.
//! - Output halves. A step is launched at a place after the one before it there was completed, hence after its half was read.

use alloc::vec;
use alloc::vec::Vec;

use crate::backend::{Device, DeviceInfo, Memory, Model, Queue, Sampler};
use crate::batch::{Batch, StepShape};
use crate::config::Limits;
use crate::constraint::mask_words;
use crate::executor::{Executor, ModelInfo, RecordError, Results};
use crate::graphs::DecodeGraphs;
use crate::request::Ticket;
use crate::resident::Resident;
use crate::sampling::LOGPROB_WORDS;

/// See the module.
pub struct Local<B: Sampler, M: Model<B>> {
    // Dropped in this order: pinned memory waits for its copies, and those lie behind the last replay.
    reserved: Option<Reserved<B>>,
    graphs: DecodeGraphs<B::Graph>,
    // The device goes last: what lies above may belong to it.
    model: M,
    backend: B,
}

/// What [`Executor::reserve`] plans.
struct Reserved<B: Device> {
    resident: Resident<B::Buffer>,
    flights: [Flight<B>; 2],
    /// The place of the step launched last.
    last: Option<usize>,
    /// The end of the step completed last, and how long it took; `None` before there is one.
    before: B::Event,
    before_ms: Option<f32>,
    /// Words of a token's hidden state. Where two activations make a word, it has an even number of them.
    hidden_words: usize,
    /// `[hidden]`: one as numbers.
    hidden: Vec<f32>,
}

/// A step from its launch to its completion: the memory it takes on the host, and what comes back of it.
struct Flight<B: Device> {
    /// Sampled rows whose tokens come back.
    samples: usize,
    /// Scored tokens.
    scored: usize,
    /// The first of the rows whose hidden states come back.
    first_embedded: usize,
    /// Whether log-probabilities come back.
    logprobs_wanted: bool,
    /// `[layout.words]`: the packed batch on its way to the device.
    packed: B::Pinned,
    /// `[slots, mask_words]`: masks on their way to the device, those for the step alone before those that stay.
    masks: B::Pinned,
    /// `[slots]`: tokens on their way back.
    tokens: B::Pinned,
    /// `[slots, LOGPROB_WORDS]`.
    logprobs: B::Pinned,
    /// `[prefill tokens, LOGPROB_WORDS]`.
    scores: B::Pinned,
    /// `[embedded rows, hidden]` activations.
    hidden: B::Pinned,
    /// Had the step before not ended when it was launched?
    follows: bool,
    /// When it began, if it follows none.
    started: B::Event,
    /// Behind its last operation,
    ended: B::Event,
    /// and when that was.
    ended_at: B::Event,
}

impl<B: Device> Flight<B> {
    fn new(
        backend: &mut B,
        limits: &Limits,
        batch_words: usize,
        hidden_words: usize,
        vocab: u32,
    ) -> Result<Self, B::Error> {
        let slots = limits.running as usize;
        Ok(Flight {
            samples: 0,
            scored: 0,
            first_embedded: 0,
            logprobs_wanted: false,
            packed: backend.alloc_pinned(batch_words)?,
            masks: backend.alloc_pinned(slots * mask_words(vocab))?,
            tokens: backend.alloc_pinned(slots)?,
            logprobs: backend.alloc_pinned(slots * LOGPROB_WORDS)?,
            scores: backend.alloc_pinned(limits.prefill_tokens as usize * LOGPROB_WORDS)?,
            hidden: backend.alloc_pinned(limits.embedded_rows() * hidden_words)?,
            follows: false,
            started: backend.event()?,
            ended: backend.untimed_event()?,
            ended_at: backend.event()?,
        })
    }

    /// Enqueues the upload of a step's masks, if it has any.
    fn send_masks(
        &mut self,
        backend: &mut B,
        batch: &Batch,
        vocab: u32,
        write_mask: &mut dyn FnMut(Ticket, &mut [u32]),
        to: B::Buffer,
    ) -> Result<(), B::Error> {
        if batch.masks().next().is_none() {
            return Ok(());
        }
        let words = mask_words(vocab);
        let masks = backend.words_mut(&mut self.masks)?.chunks_exact_mut(words);
        batch.masks().zip(masks).for_each(|((owner, _), mask)| write_mask(owner, mask));
        let of_step = batch.step_masks();
        if of_step > 0 {
            backend.upload(&mut self.masks, 0..of_step * words, to)?;
        }
        for (i, (_, index)) in batch.masks().enumerate().skip(of_step) {
            // A copy keeps its range, so what it goes to begins i masks before the mask, whose index is no less: slots or more.
            let to = backend.slice(to, (index as usize - i) * words..(index as usize + 1) * words);
            backend.upload(&mut self.masks, i * words..(i + 1) * words, to)?;
        }
        Ok(())
    }

    /// Behind the step, on the copy queue, so that the next step need not wait for its results to leave.
    fn enqueue_downloads(
        &mut self,
        backend: &mut B,
        resident: &Resident<B::Buffer>,
        at: usize,
    ) -> Result<(), B::Error> {
        backend.wait(Queue::Copy, &self.ended)?;
        backend.record(Queue::Copy, &mut self.ended_at)?;
        if self.samples > 0 {
            let tokens = resident.tokens_of(backend, at);
            backend.download(Queue::Copy, tokens, self.samples, &mut self.tokens)?;
        }
        if self.logprobs_wanted {
            let logprobs = resident.logprobs_of(backend, at);
            backend.download(Queue::Copy, logprobs, self.samples * LOGPROB_WORDS, &mut self.logprobs)?;
        }
        if self.scored > 0 {
            let scores = resident.scores_of(backend, at);
            backend.download(Queue::Copy, scores, self.scored * LOGPROB_WORDS, &mut self.scores)?;
        }
        Ok(())
    }
}

impl<B: Sampler, M: Model<B>> Local<B, M> {
    /// Of a model that has been loaded.
    pub fn new(backend: B, model: M) -> Self {
        Local { reserved: None, graphs: DecodeGraphs::none(), model, backend }
    }

    /// The device.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// The model, to be changed between two steps, and the device that it is on.
    pub fn parts_mut(&mut self) -> (&mut M, &mut B) {
        (&mut self.model, &mut self.backend)
    }

    /// The device, to be used between two steps.
    pub fn backend_mut(&mut self) -> &mut B {
        &mut self.backend
    }

    /// The model.
    pub fn loaded(&self) -> &M {
        &self.model
    }

    /// What was planned, with the device and the model.
    fn parts(&mut self) -> (&mut B, &mut M, &mut Reserved<B>) {
        let reserved = self.reserved.as_mut().expect("the engine reserves before it allocates pages");
        (&mut self.backend, &mut self.model, reserved)
    }
}

impl<B: Sampler, M: Model<B>> Executor for Local<B, M> {
    type Error = B::Error;

    fn info(&self) -> DeviceInfo {
        self.backend.info()
    }

    fn model(&self) -> ModelInfo {
        let Local { model, .. } = self;
        ModelInfo {
            vocab: model.vocab(),
            hidden: model.hidden(),
            has_head: model.has_head(),
            max_positions: model.max_positions(),
            window: model.window(),
        }
    }

    fn memory(&self) -> Result<Memory, B::Error> {
        self.backend.memory()
    }

    /// Keys and values of its tokens, and a word of history for each.
    fn page_bytes(&self, page_size: u32) -> Result<u64, B::Error> {
        Ok(self.model.page_bytes(page_size) + 4 * u64::from(page_size))
    }

    fn is_out_of_memory(error: &B::Error) -> bool {
        B::is_out_of_memory(error)
    }

    fn reserve(&mut self, limits: &Limits) -> Result<(), B::Error> {
        let Local { backend, model, .. } = self;
        let plan_words = model.reserve(backend, limits)?;
        let resident = Resident::new(backend, limits, plan_words, model.vocab())?;
        let (batch_words, hidden) = (resident.batch_words(), vec![0.0; model.hidden() as usize]);
        let hidden_words = (hidden.len() * backend.info().activation_bytes).div_ceil(4);
        let mut flight = || Flight::new(backend, limits, batch_words, hidden_words, model.vocab());
        let flights = [flight()?, flight()?];
        let before = backend.event()?;
        let (last, before_ms) = (None, None);
        self.reserved = Some(Reserved { resident, flights, last, before, before_ms, hidden_words, hidden });
        Ok(())
    }

    fn alloc_pages(&mut self, limits: &Limits) -> Result<(), B::Error> {
        let (backend, model, Reserved { resident, .. }) = self.parts();
        model.alloc_pages(backend, limits.pages, limits.page_size)?;
        resident.alloc_history(backend, limits.pages)?;
        resident.clear(backend, limits)
    }

    /// Recorded steps know where the pages lie: they go first.
    fn free_pages(&mut self) -> Result<(), B::Error> {
        self.graphs = DecodeGraphs::none();
        let (backend, model, Reserved { resident, .. }) = self.parts();
        resident.free_history(backend)?;
        model.free_pages(backend)
    }

    fn record(&mut self, limits: &Limits) -> Result<(), RecordError<B::Error>> {
        let (backend, model, Reserved { resident, flights, .. }) = self.parts();
        self.graphs = DecodeGraphs::capture(backend, model, resident, limits, &mut flights[0].packed)?;
        Ok(())
    }

    fn launch(
        &mut self,
        at: usize,
        batch: &Batch,
        shape: StepShape,
        write_mask: &mut dyn FnMut(Ticket, &mut [u32]),
    ) -> Result<(), B::Error> {
        let Local { reserved, graphs, model, backend } = self;
        let Reserved { resident, flights, last, hidden_words, hidden, .. } =
            reserved.as_mut().expect("the engine reserves before it launches");
        let flight = &mut flights[at];
        flight.send_masks(backend, batch, model.vocab(), write_mask, resident.masks)?;
        let step = resident.send(backend, model, batch, shape, at, &mut flight.packed)?;
        // Asked as late as can be: what was prepared a little too late has let the device idle, and that must show.
        let follows = last.replace(at).is_some_and(|last| !backend.has_passed(&flights[last].ended));
        let flight = &mut flights[at];
        flight.follows = follows;
        if !follows {
            backend.record(Queue::Compute, &mut flight.started)?;
        }
        match graphs.of(shape) {
            Some(graph) => backend.replay(graph)?,
            None => resident.run(backend, model, &step, batch.wants_logits())?,
        }
        flight.samples = if batch.wants_logits() { batch.samples() as usize } else { 0 };
        flight.scored = batch.scored().len();
        flight.logprobs_wanted = flight.samples > 0 && batch.wants_logprobs();
        if flight.logprobs_wanted {
            backend.logprobs(&step, model.logits(), resident.tokens, resident.logprobs)?;
        }
        if let Some(rows) = batch.embedded_rows() {
            let from = backend.slice(model.normed(), rows.start * hidden.len()..rows.end * hidden.len());
            backend.download(Queue::Compute, from, rows.len() * *hidden_words, &mut flight.hidden)?;
            flight.first_embedded = rows.start;
        }
        // Last, for what it computes takes the place of the sampled rows'.
        resident.score(backend, model, &step, flight.scored, at)?;
        backend.record(Queue::Compute, &mut flight.ended)?;
        flight.enqueue_downloads(backend, resident, at)
    }

    fn has_ended(&self, at: usize) -> bool {
        self.reserved.as_ref().is_some_and(|reserved| self.backend.has_passed(&reserved.flights[at].ended))
    }

    fn complete(&mut self, at: usize) -> Result<Results<'_>, B::Error> {
        let (backend, _, Reserved { flights, before, before_ms, .. }) = self.parts();
        let flight = &mut flights[at];
        let tokens = &backend.words(&flight.tokens)?[..flight.samples];
        let logprobs = match flight.logprobs_wanted {
            true => &backend.words(&flight.logprobs)?[..flight.samples * LOGPROB_WORDS],
            false => &[],
        };
        let scores = match flight.scored {
            0 => &[],
            scored => &backend.words(&flight.scores)?[..scored * LOGPROB_WORDS],
        };
        let started = if flight.follows { &*before } else { &flight.started };
        let took_ms = backend.elapsed_ms(started, &flight.ended_at)?;
        let since_ms = match before_ms.replace(took_ms) {
            // Idle, the device may have been come by before it had told when it ended.
            Some(ms) if !flight.follows => ms + backend.elapsed_ms(before, &flight.started)?.max(0.0),
            Some(ms) => ms,
            None => 0.0,
        };
        core::mem::swap(before, &mut flight.ended_at);
        let (logprobs, scores) = (bytemuck::cast_slice(logprobs), bytemuck::cast_slice(scores));
        Ok(Results { tokens, logprobs, scores, since_ms, took_ms })
    }

    fn hidden(&mut self, at: usize, row: u32) -> Result<&[f32], B::Error> {
        let (backend, _, Reserved { flights, hidden_words, hidden, .. }) = self.parts();
        let first = (row as usize - flights[at].first_embedded) * *hidden_words;
        B::widen(&backend.words(&flights[at].hidden)?[first..first + *hidden_words], hidden);
        Ok(hidden)
    }
}
