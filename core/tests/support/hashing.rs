//! A model whose next token is a hash of the whole context, read where the batch and the page table say it lies.
//!
//! Its KV memory is one word a location: `kv[p]` of [`super::expected`]; its logits are one word a row, which the sampler
//! hashes with the slot's seed. So a page mixed up, freed too early or written
//! twice, a location or a position off by one, changes the tokens.

use minisgl_core::backend::{Element, Model, Purpose, Queue, Sampler, Step};
use minisgl_core::batch::{
    HEADER_WORDS, Header, LAST_TOKEN, Row, StepShape, packed_rows, packed_slot_updates, packed_tokens,
    packed_updates,
};
use minisgl_core::config::Limits;
use minisgl_core::sampling::{
    LOGPROB_WORDS, NO_TOKEN, RowLogprobs, SLOT_STATE_WORDS, SlotState, TOP_LOGPROBS_MAX,
};

use super::expected;
use super::fault::Faulty;
use super::lazy::{Lazy, LazyError, Op, Words};

/// Words of the plan: the sum of the rows' contexts, which the device checks.
const PLAN_WORDS: usize = 1;

/// A device that takes the hashing model's operations.
pub trait Runs: Sampler<Buffer = Words> {
    fn enqueue(&mut self, op: Op) -> Result<(), Self::Error>;
}

impl Runs for Lazy {
    fn enqueue(&mut self, op: Op) -> Result<(), LazyError> {
        Lazy::enqueue(self, Queue::Compute, op)
    }
}

impl<B: Runs> Runs for Faulty<B> {
    fn enqueue(&mut self, op: Op) -> Result<(), Self::Error> {
        self.pass("forward")?;
        Ok(self.device.enqueue(op)?)
    }
}

/// See the module.
#[derive(Default)]
pub struct Hashing {
    kv: Option<Words>,
    /// `[logit rows, HIDDEN]`: what attention gives.
    normed: Option<Words>,
    /// `[logit rows]`: the same, a word a row.
    logits: Option<Words>,
    window: Option<u32>,
    headless: bool,
}

impl Hashing {
    /// A model for embeddings alone.
    pub fn headless() -> Hashing {
        Hashing { headless: true, ..Hashing::default() }
    }

    /// A model whose tokens see so many positions, at least 2: a token's word is made of the one before.
    pub fn windowed(window: Option<u32>) -> Hashing {
        Hashing { window, ..Hashing::default() }
    }
}

impl<B: Runs> Model<B> for Hashing {
    fn page_bytes(&self, page_size: u32) -> u64 {
        u64::from(page_size) * 4
    }

    fn vocab(&self) -> u32 {
        expected::VOCAB
    }

    fn hidden(&self) -> u32 {
        expected::HIDDEN as u32
    }

    fn has_head(&self) -> bool {
        !self.headless
    }

    fn max_positions(&self) -> u32 {
        4096
    }

    fn window(&self) -> Option<u32> {
        self.window
    }

    fn reserve(&mut self, backend: &mut B, limits: &Limits) -> Result<usize, B::Error> {
        let hidden = limits.logit_rows() * expected::HIDDEN;
        self.normed = Some(backend.alloc(Purpose::Scratch, Element::Activation, hidden)?);
        self.logits = Some(backend.alloc(Purpose::Scratch, Element::Logit, limits.logit_rows())?);
        Ok(PLAN_WORDS)
    }

    fn alloc_pages(&mut self, backend: &mut B, pages: u32, page_size: u32) -> Result<(), B::Error> {
        let words = (pages as usize + 1) * page_size as usize;
        self.kv = Some(backend.alloc(Purpose::KvCache, Element::Kv, words)?);
        Ok(())
    }

    fn free_pages(&mut self, backend: &mut B) -> Result<(), B::Error> {
        self.kv.take().map_or(Ok(()), |kv| backend.free(kv))
    }

    fn plan(&self, _: &B, shape: StepShape, rows: &[Row], words: &mut [u32]) {
        assert_eq!((rows.len(), words.len()), (shape.rows() as usize, PLAN_WORDS));
        words[0] = rows.iter().map(|row| row.kv_len).sum();
    }

    fn forward(&mut self, backend: &mut B, step: &Step<Words>) -> Result<(), B::Error> {
        let kv = self.kv.expect("the engine allocates pages first");
        backend.enqueue(Op::Forward { step: *step, kv })
    }

    fn norm(&mut self, backend: &mut B, step: &Step<Words>) -> Result<(), B::Error> {
        let kv = self.kv.expect("the engine allocates pages first");
        let (normed, window) = (Model::<B>::normed(self), self.window.unwrap_or(u32::MAX));
        backend.enqueue(Op::Norm { step: *step, kv, normed, window })
    }

    fn head(&mut self, backend: &mut B, step: &Step<Words>) -> Result<(), B::Error> {
        assert!(!self.headless, "a model without a head has no logits");
        let (normed, logits) = (Model::<B>::normed(self), Model::<B>::logits(self));
        backend.enqueue(Op::Head { step: *step, normed, logits })
    }

    fn normed(&self) -> Words {
        self.normed.expect("the engine reserves first")
    }

    fn logits(&self) -> Words {
        self.logits.expect("the engine reserves first")
    }

    fn step_weight_bytes(&self) -> u64 {
        0
    }
}

/// The batch and, to be written while it is read, the memory around it.
fn split<'a>(memory: &'a mut [u32], step: &Step<Words>) -> (&'a [u32], Split<'a>) {
    let (before, rest) = memory.split_at_mut(step.batch.start);
    let (batch, after) = rest.split_at_mut(step.batch.len);
    (batch, Split { before, after, gap: step.batch })
}

/// A step's forward pass, as the device runs it.
pub fn forward(memory: &mut [u32], step: &Step<Words>, kv: Words) {
    let (batch, mut device) = split(memory, step);
    let header = check_header(step, batch);
    for update in packed_updates(&step.layout, batch) {
        *device.word(step.page_table, update.index as usize) = update.page;
    }
    for update in packed_slot_updates(&step.layout, batch) {
        let first = update.slot as usize * SLOT_STATE_WORDS;
        for (i, word) in bytemuck::cast_slice::<SlotState, u32>(&[update.state]).iter().enumerate() {
            *device.word(step.slots, first + i) = *word;
        }
    }
    let rows = packed_rows(&step.layout, header.rows as usize, batch);
    let all = packed_tokens(&step.layout, header.tokens as usize, batch);
    for row in rows {
        for token in &all[row.first_token as usize..][..row.tokens as usize] {
            let id = match token.id {
                LAST_TOKEN => *device.word(step.token_pool, token.slot as usize),
                id => id,
            };
            let before = match token.position {
                0 => 0,
                position => device.kv(step, kv, token.slot, position - 1),
            };
            let mapped = device.location(step, token.slot, token.position);
            assert_eq!(token.location, mapped, "a token goes where the page table says, a dummy row's too");
            *device.word(kv, token.location as usize) = expected::kv(before, id, token.position);
            *device.word(step.history, token.location as usize) = id;
        }
    }
    for row in rows.iter().take(header.samples as usize) {
        if slot(&mut device, step, row).edits != 0 {
            device.check_history(step, kv, row);
        }
    }
}

/// Pairs of a step's tokens and the positions that they attend to, about.
pub fn pairs(memory: &mut [u32], step: &Step<Words>) -> f32 {
    let (batch, _) = split(memory, step);
    let rows = packed_rows(&step.layout, step.shape.rows() as usize, batch).iter();
    rows.map(|row| row.tokens as f32 * (row.position + row.kv_len) as f32 / 2.0).sum()
}

/// The hidden states of the step's sampled rows, or of others whose keys and values are there.
pub fn norm(memory: &mut [u32], step: &Step<Words>, kv: Words, normed: Words, window: u32) {
    let (batch, mut device) = split(memory, step);
    for (i, row) in packed_rows(&step.layout, step.shape.samples as usize, batch).iter().enumerate() {
        let context = (row.kv_len.saturating_sub(window)..row.kv_len)
            .map(|position| device.kv(step, kv, row.slot, position));
        let state = context.fold(0, expected::attend);
        let hidden = expected::hidden(state, slot(&mut device, step, row).seed());
        for (j, value) in hidden.into_iter().enumerate() {
            *device.word(normed, i * expected::HIDDEN + j) = value.to_bits();
        }
    }
}

/// Their logits.
pub fn head(memory: &mut [u32], step: &Step<Words>, normed: Words, logits: Words) {
    for i in 0..step.shape.samples as usize {
        let hidden = &memory[normed.start + i * expected::HIDDEN..][..expected::HIDDEN];
        let hidden: [f32; expected::HIDDEN] = core::array::from_fn(|j| f32::from_bits(hidden[j]));
        memory[logits.start + i] = expected::state(hidden);
    }
}

/// Draws the tokens of the step just run.
pub fn sample(memory: &mut [u32], step: &Step<Words>, logits: Words, tokens: Words) {
    let (batch, mut device) = split(memory, step);
    let header = check_header(step, batch);
    let rows = packed_rows(&step.layout, header.rows as usize, batch);
    for (i, row) in rows.iter().take(header.samples as usize).enumerate() {
        let seed = slot(&mut device, step, row).seed();
        let mask = match row.mask {
            0 => u32::MAX,
            mask => *device.word(step.masks, mask as usize - 1),
        };
        let token = expected::draw_allowed(*device.word(logits, i), seed, mask);
        *device.word(tokens, header.output as usize + i) = token;
        *device.word(step.token_pool, row.slot as usize) = if token == NO_TOKEN { 0 } else { token };
    }
}

/// Log-probabilities of the tokens of rows whose logits have just been computed.
pub fn logprobs(memory: &mut [u32], step: &Step<Words>, logits: Words, tokens: Words, out: Words) {
    let (batch, mut device) = split(memory, step);
    let output = bytemuck::cast_slice::<u32, Header>(&batch[..HEADER_WORDS])[0].output as usize;
    let rows = packed_rows(&step.layout, step.shape.samples as usize, batch);
    for (i, row) in rows.iter().enumerate().filter(|(_, row)| row.logprobs > 0) {
        let at = output + i;
        let token = *device.word(tokens, at);
        if token == NO_TOKEN {
            continue;
        }
        let row = RowLogprobs {
            token: expected::logprob(*device.word(logits, i), slot(&mut device, step, row).seed(), token),
            len: row.logprobs - 1,
            ids: [token; TOP_LOGPROBS_MAX],
            logprobs: [0.0; TOP_LOGPROBS_MAX],
        };
        for (j, word) in bytemuck::cast_slice::<RowLogprobs, u32>(&[row]).iter().enumerate() {
            *device.word(out, at * LOGPROB_WORDS + j) = *word;
        }
    }
}

/// How the tokens of a row's slot are drawn.
fn slot(device: &mut Split<'_>, step: &Step<Words>, row: &Row) -> SlotState {
    let first = row.slot as usize * SLOT_STATE_WORDS;
    let state: [u32; SLOT_STATE_WORDS] = core::array::from_fn(|i| *device.word(step.slots, first + i));
    bytemuck::cast(state)
}

/// The header of the batch that lies on the device must be of the step that was launched.
fn check_header(step: &Step<Words>, batch: &[u32]) -> Header {
    let header: Header = bytemuck::cast_slice(&batch[..HEADER_WORDS])[0];
    let shape = step.shape;
    assert_eq!((header.rows, header.tokens, header.samples), (shape.rows(), shape.tokens, shape.samples));
    let rows = packed_rows(&step.layout, shape.rows() as usize, batch);
    assert_eq!(batch[step.layout.plan], rows.iter().map(|row| row.kv_len).sum::<u32>(), "the plan's words");
    let is_decode_row = |(i, row): (u32, &Row)| row.tokens == 1 && row.first_token == i && row.sampled == 1;
    assert!((0..shape.decode_rows).zip(rows).all(is_decode_row), "decode row i owns token i");
    header
}

/// Device memory around the batch.
struct Split<'a> {
    before: &'a mut [u32],
    after: &'a mut [u32],
    gap: Words,
}

impl Split<'_> {
    fn word(&mut self, buffer: Words, i: usize) -> &mut u32 {
        assert!(i < buffer.len, "word {i} lies outside its buffer of {}", buffer.len);
        let at = buffer.start + i;
        match at < self.gap.start {
            true => &mut self.before[at],
            false => &mut self.after[at - self.gap.start - self.gap.len],
        }
    }

    /// Where the page table says that a slot's position lies.
    fn location(&mut self, step: &Step<Words>, slot: u32, position: u32) -> u32 {
        let entry = slot * step.table_width + position / step.page_size;
        *self.word(step.page_table, entry as usize) * step.page_size + position % step.page_size
    }

    /// All keys and values that a row attends to are those of the tokens in the history.
    fn check_history(&mut self, step: &Step<Words>, kv: Words, row: &Row) {
        let mut before = 0;
        for position in 0..row.kv_len {
            let location = self.location(step, row.slot, position);
            let id = *self.word(step.history, location as usize);
            before = expected::kv(before, id, position);
            assert_eq!(before, *self.word(kv, location as usize), "history of {row:?} at {position}");
        }
    }

    /// What the cache holds for a slot's position.
    fn kv(&mut self, step: &Step<Words>, kv: Words, slot: u32, position: u32) -> u32 {
        let location = self.location(step, slot, position);
        *self.word(kv, location as usize)
    }
}
