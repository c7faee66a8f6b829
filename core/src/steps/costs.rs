//! What a step costs on this device: straight lines, measured when an engine is built.
//!
//! ```text
//!   ms │             ╱         mixed: a step with prefill rows, launched kernel by kernel
//!      │          ╱
//!      │───────╱     __──      decode: a step of decode rows alone, recorded
//!      │____──────
//!      └──────────────────
//!        tokens of all rows
//! ```
//!
//! Attention is left out of these lines, as near as can be: the steps that are timed hold dummy rows, which attend to nothing or
//! to a few tokens (of many different ids and in slots of their own, because experts are read by what tokens there are, and not
//! at all by padding). A decode row's attention takes as long beside prompts as without them, so a choice between the two needs
//! no more. A prompt's goes by what lies before its tokens, and is told by the same chunk at the end of short and long
//! sequences.
//!
//! What is measured decides when a request runs, never what comes out.

use crate::batch::{Batch, Dummy, Row, StepShape, Token};
use crate::config::Limits;
use crate::executor::Executor;
use crate::graphs::padded;
use crate::request::Ticket;

/// Rows of the decode steps that are timed.
const ROWS: [u32; 3] = [1, 4, 256];
/// Tokens of the steps with prefill rows.
const TOKENS: [u32; 3] = [64, 256, 2048];
/// Tokens of their prompts.
const PROMPT: u32 = 64;
/// Tokens of a chunk, and of the sequences at whose end it is timed.
const CHUNK: u32 = 256;
const CONTEXTS: [u32; 3] = [CHUNK, 1024, 8192];
/// No step is timed that would take longer, by those before it.
const LONGEST_MS: f32 = 100.0;

/// Milliseconds by number of tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Line {
    /// Of a step, beside its tokens.
    pub fixed_ms: f32,
    /// Of each token.
    pub token_ms: f32,
}

impl Line {
    /// Of a step of so many tokens.
    pub fn at(self, tokens: u32) -> f32 {
        self.fixed_ms + self.token_ms * tokens as f32
    }

    /// Through `(tokens, ms)` of a small and a large step; through one alone and the origin where they are the same.
    fn through(small: (u32, f32), large: (u32, f32)) -> Line {
        let token_ms = match large.0 > small.0 {
            true => ((large.1 - small.1) / (large.0 - small.0) as f32).max(0.0),
            false => small.1 / small.0 as f32,
        };
        Line { fixed_ms: (small.1 - token_ms * small.0 as f32).max(0.0), token_ms }
    }
}

/// See the module.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepCosts {
    /// Of decode rows alone.
    pub decode: Line,
    /// With prefill rows; of all tokens, those of decode rows too.
    pub mixed: Line,
    /// What a prompt's attention takes besides: of a step, and of each of its tokens with each one before that.
    pub attention: Line,
}

/// What steps are timed on.
pub(crate) struct Bench<'a, X> {
    pub executor: &'a mut X,
}

impl<X: Executor> Bench<'_, X> {
    /// Times a few steps of each kind, small ones first.
    pub fn measure(mut self, limits: &Limits) -> Result<StepCosts, X::Error> {
        let (tokens, mut batch) = (self.tokens(limits), Batch::new(limits));
        let decode = self.line(Line::default(), ROWS, &mut batch, limits, |size, batch| {
            fill_with_decode_rows(batch, size.min(limits.running), tokens);
            batch.shape()
        })?;
        let mixed = self.line(decode, TOKENS, &mut batch, limits, |size, batch| {
            fill_with_prompts(batch, size, tokens, limits);
            batch.shape()
        })?;
        let attention = self.attention(mixed, &mut batch, limits)?;
        Ok(StepCosts { decode, mixed, attention })
    }

    fn tokens(&self, limits: &Limits) -> Tokens {
        Tokens { dummy: Dummy::of(limits), vocab: self.executor.model().vocab }
    }

    /// What a chunk takes beside what its tokens do, by what lies before it; nothing where that would take too long to find out.
    fn attention(&mut self, mixed: Line, batch: &mut Batch, limits: &Limits) -> Result<Line, X::Error> {
        let (tokens, chunk) = (self.tokens(limits), CHUNK.min(limits.prefill_tokens).min(limits.sequence));
        let (mut first, mut line) = (None, Line { fixed_ms: mixed.at(chunk), token_ms: 0.0 });
        for context in CONTEXTS.map(|context| context.clamp(chunk, limits.sequence)) {
            if line.at(context) > LONGEST_MS {
                break;
            }
            fill_with_chunk(batch, chunk, context, tokens, limits);
            let ms = self.time(batch, limits)?;
            let (least, least_ms) = *first.get_or_insert((context, ms));
            line = match context > least {
                true => Line::through((least, least_ms), (context, ms)),
                false => Line { fixed_ms: ms, token_ms: 0.0 },
            };
        }
        let fixed_ms = (line.fixed_ms - mixed.at(chunk)).max(0.0);
        Ok(Line { fixed_ms, token_ms: line.token_ms / chunk as f32 })
    }

    /// The line through the first and the last of the steps that `prepare` makes of these sizes; `expected`, where the first
    /// would take too long. Where there is a first one alone, each of its tokens is as dear as any other.
    fn line(
        &mut self,
        expected: Line,
        sizes: [u32; 3],
        batch: &mut Batch,
        limits: &Limits,
        prepare: impl Fn(u32, &mut Batch) -> StepShape,
    ) -> Result<Line, X::Error> {
        let (mut line, mut first, mut expected_ms) = (expected, None, expected.at(sizes[0]));
        for (i, size) in sizes.into_iter().enumerate() {
            if expected_ms > LONGEST_MS {
                break;
            }
            let shape = prepare(size, batch);
            let (tokens, ms) = (shape.tokens, self.time(batch, limits)?);
            line = Line::through(*first.get_or_insert((tokens, ms)), (tokens, ms));
            // The second size is not much larger than the first, from which nothing can be told.
            expected_ms = if i == 0 { ms } else { sizes.get(i + 1).map_or(0.0, |next| line.at(*next)) };
        }
        Ok(line)
    }

    /// Runs a step twice, the second time behind the first, so that it does not wait for its launches; how long that takes.
    fn time(&mut self, batch: &Batch, limits: &Limits) -> Result<f32, X::Error> {
        let shape = padded(batch.shape(), limits);
        for at in 0..2 {
            self.executor.launch(at, batch, shape, &mut |_, _| ())?;
        }
        self.executor.complete(0)?;
        Ok(self.executor.complete(1)?.took_ms)
    }
}

/// What the timed steps are made of: rows of slots of their own, all on the dummy page.
#[derive(Clone, Copy)]
struct Tokens {
    dummy: Dummy,
    vocab: u32,
}

impl Tokens {
    /// One token of a slot's, sampled or decoded.
    fn row(self, slot: u32, first_token: u32) -> Row {
        Row { slot, ..self.dummy.row(first_token) }
    }

    fn token(self, slot: u32, position: u32, page_size: u32) -> Token {
        let id = (slot.wrapping_mul(31) + position).wrapping_mul(7919) % self.vocab;
        Token { id, slot, position, location: self.dummy.location + position % page_size }
    }
}

/// Fills a batch with decode rows, each its sequence's first token.
fn fill_with_decode_rows(batch: &mut Batch, rows: u32, tokens: Tokens) {
    batch.clear();
    for slot in 0..rows {
        let owner = Ticket { entry: slot, generation: 0 };
        batch.push_decode_row(owner, tokens.row(slot, slot), tokens.token(slot, 0, 1));
    }
}

/// Fills a batch with prompts, about so many tokens in all.
fn fill_with_prompts(batch: &mut Batch, count: u32, tokens: Tokens, limits: &Limits) {
    batch.clear();
    let nobody = Ticket { entry: 0, generation: 0 };
    let of_all = count.min(limits.prefill_tokens);
    let of_each = PROMPT.max(of_all.div_ceil(limits.running)).min(of_all).min(limits.sequence);
    for i in 0..(of_all / of_each).min(limits.running) {
        let row = Row { tokens: of_each, kv_len: of_each, ..tokens.row(i, i * of_each) };
        batch.push_prefill_row(nobody, row);
        (0..of_each).for_each(|position| batch.push_token(tokens.token(i, position, limits.page_size)));
    }
}

/// Fills a batch with the last `count` of a sequence of `context` tokens.
fn fill_with_chunk(batch: &mut Batch, count: u32, context: u32, tokens: Tokens, limits: &Limits) {
    batch.clear();
    let nobody = Ticket { entry: 0, generation: 0 };
    let position = context - count;
    batch.push_prefill_row(nobody, Row { tokens: count, position, kv_len: context, ..tokens.row(0, 0) });
    (position..context).for_each(|position| batch.push_token(tokens.token(0, position, limits.page_size)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_goes_through_what_was_measured_and_never_down() {
        let line = Line::through((64, 1.5), (2048, 5.468));
        assert!((line.at(64) - 1.5).abs() < 1e-4 && (line.at(2048) - 5.468).abs() < 1e-4, "{line:?}");
        assert_eq!(Line::through((1, 2.0), (1, 2.0)), Line { fixed_ms: 0.0, token_ms: 2.0 });
        assert_eq!(Line::through((1, 2.0), (9, 1.0)), Line { fixed_ms: 2.0, token_ms: 0.0 });
    }
}
