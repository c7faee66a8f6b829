//! Each operation as plain data, and what it does to the machine.
//!
//! A command holds handles and padded counts, nothing of a step's contents; rows, tokens, updates and the output place
//! are read from the packed batch in device memory when it runs. So a recorded list of commands replays on whatever
//! the batch buffer then holds, as a GPU's graph does.

use minisgl_core::backend::{Dims, KvLayer, Purpose, Step};
use minisgl_core::batch::{self, HEADER_WORDS, Header};
use minisgl_core::config::Limits;
use minisgl_core::sampling::{LOGPROB_WORDS, RowLogprobs};
use rayon::prelude::*;

use crate::error::CpuError;
use crate::memory::{Buffer, Memory, floats};
use crate::ops::{self, Context, Heads, PageShape};
use crate::weights::{Matrix, Weight};
use crate::{matmul, sampling};

/// One operation; see [`minisgl_core::backend::Ops`] and `LayerOps` for what each means.
#[derive(Clone, Copy, Debug)]
pub enum Command {
    BeginStep { step: Step<Buffer> },
    Embed { step: Step<Buffer>, table: Weight, out: Buffer },
    RmsNorm { tokens: u32, x: Buffer, weight: Weight, out: Buffer },
    AddRmsNorm { tokens: u32, residual: Buffer, delta: Buffer, weight: Weight, out: Buffer },
    Linear { tokens: u32, x: Buffer, weight: Weight, out: Buffer },
    GateUpSilu { tokens: u32, x: Buffer, weight: Weight, out: Buffer },
    QkNormRopeStore(QkNormRopeStore),
    Attention { step: Step<Buffer>, qkv: Buffer, kv: KvLayer<Buffer>, out: Buffer },
    FinalNorm { step: Step<Buffer>, residual: Buffer, delta: Buffer, weight: Weight, out: Buffer },
    Sample { step: Step<Buffer>, logits: Buffer, tokens: Buffer },
    Logprobs { step: Step<Buffer>, logits: Buffer, tokens: Buffer, out: Buffer },
}

/// Norms and rotates the heads, stores keys and values.
#[derive(Clone, Copy, Debug)]
pub struct QkNormRopeStore {
    pub step: Step<Buffer>,
    pub qkv: Buffer,
    pub q_norm: Weight,
    pub k_norm: Weight,
    pub rope: Buffer,
    pub kv: KvLayer<Buffer>,
}

/// What commands work on.
#[derive(Default)]
pub struct Machine {
    pub memory: Memory,
    pub weights: Vec<Matrix>,
    model: Option<Sizes>,
}

#[derive(Clone, Copy)]
struct Sizes {
    dims: Dims,
    /// `[threads, vocab]`: candidates of a row being sampled.
    candidates: Buffer,
}

impl Machine {
    /// Plans the scratch memory for a model.
    pub fn reserve(&mut self, dims: &Dims, limits: &Limits, threads: usize) -> Result<(), CpuError> {
        let rows = threads.min(limits.running as usize);
        let candidates = self.memory.alloc(Purpose::Scratch, rows * dims.vocab as usize)?;
        self.model = Some(Sizes { dims: *dims, candidates });
        Ok(())
    }

    /// Runs a command to its end.
    pub fn run(&mut self, command: &Command) -> Result<(), CpuError> {
        let Machine { memory, weights, model } = self;
        let Sizes { dims, candidates } = model.ok_or(CpuError::NotReserved)?;
        let (hidden, eps) = (dims.hidden as usize, dims.norm_eps);
        match *command {
            Command::BeginStep { step } => {
                let [words, page_table] = memory.borrow([step.batch, step.page_table])?;
                ops::update_pages(batch::packed_updates(&step.layout, words), page_table);
            }
            Command::Embed { step, table, out } => {
                let [words, pool, out] = memory.borrow([step.batch, step.token_pool, out])?;
                let tokens = tokens(&step, words);
                ops::embed(tokens, pool, &weights[table.0], &mut floats(out)[..tokens.len() * hidden]);
            }
            Command::RmsNorm { tokens, x, weight, out } => {
                let [x, out] = memory.borrow([x, out])?;
                let scale = &weights[weight.0].scale;
                let len = tokens as usize * scale.len();
                ops::rms_norm(&floats(x)[..len], scale, eps, &mut floats(out)[..len]);
            }
            Command::AddRmsNorm { tokens, residual, delta, weight, out } => {
                let [residual, delta, out] = memory.borrow([residual, delta, out])?.map(floats);
                let scale = &weights[weight.0].scale;
                let len = tokens as usize * scale.len();
                ops::add_rms_norm(&mut residual[..len], &delta[..len], scale, eps, &mut out[..len]);
            }
            Command::Linear { tokens, x, weight, out } => {
                let [x, out] = memory.borrow([x, out])?.map(floats);
                let (weight, tokens) = (&weights[weight.0], tokens as usize);
                matmul::linear(weight, &x[..tokens * weight.cols], &mut out[..tokens * weight.rows]);
            }
            Command::GateUpSilu { tokens, x, weight, out } => {
                let [x, out] = memory.borrow([x, out])?.map(floats);
                let (weight, tokens) = (&weights[weight.0], tokens as usize);
                let (x, out) = (&x[..tokens * weight.cols], &mut out[..tokens * weight.rows / 2]);
                matmul::gate_up_silu(weight, x, out);
            }
            Command::QkNormRopeStore(command) => command.run(memory, weights, &dims)?,
            Command::Attention { step, qkv, kv, out } => {
                let buffers = [step.batch, step.page_table, qkv, kv.k, kv.v, out];
                let [words, page_table, qkv, k, v, out] = memory.borrow(buffers)?;
                let shape = PageShape::new(&dims, step.page_size);
                let table_width = step.table_width as usize;
                let context = Context { shape, k: floats(k), v: floats(v), page_table, table_width };
                let tokens = tokens(&step, words);
                let len = tokens.len() * dims.q_width();
                ops::attention(&dims, tokens, floats(qkv), context, &mut floats(out)[..len]);
            }
            Command::FinalNorm { step, residual, delta, weight, out } => {
                let [words, residual, delta, out] = memory.borrow([step.batch, residual, delta, out])?;
                let rows = sampled_rows(&step, words);
                let out = &mut floats(out)[..rows.len() * hidden];
                let scale = &weights[weight.0].scale;
                ops::final_norm(rows, floats(residual), floats(delta), scale, eps, out);
            }
            Command::Sample { step, logits, tokens } => {
                let buffers = [step.batch, step.token_pool, logits, tokens, candidates];
                let [words, pool, logits, tokens, candidates] = memory.borrow(buffers)?;
                let rows = sampled_rows(&step, words);
                let tokens = &mut tokens[header(words).output as usize..][..rows.len()];
                let vocab = dims.vocab as usize;
                draw_rows(rows, floats(logits), vocab, floats(candidates), tokens);
                for (row, token) in rows.iter().zip(tokens) {
                    pool[row.slot as usize] = *token;
                }
            }
            Command::Logprobs { step, logits, tokens, out } => {
                let [words, logits, tokens, out] = memory.borrow([step.batch, logits, tokens, out])?;
                let rows = sampled_rows(&step, words);
                let first = header(words).output as usize;
                let out = &mut out[first * LOGPROB_WORDS..][..rows.len() * LOGPROB_WORDS];
                let out: &mut [RowLogprobs] = bytemuck::cast_slice_mut(out);
                let logits = floats(logits).par_chunks(dims.vocab as usize);
                let asked = out.par_iter_mut().zip(rows).zip(&tokens[first..][..rows.len()]).zip(logits);
                asked
                    .filter(|(((_, row), _), _)| row.logprobs > 0)
                    .for_each(|(((out, row), token), logits)| *out = sampling::logprobs(logits, row, *token));
            }
        }
        Ok(())
    }
}

impl QkNormRopeStore {
    fn run(&self, memory: &mut Memory, weights: &[Matrix], dims: &Dims) -> Result<(), CpuError> {
        let buffers = [self.step.batch, self.qkv, self.rope, self.kv.k, self.kv.v];
        let [words, qkv, rope, k, v] = memory.borrow(buffers)?;
        let tokens = tokens(&self.step, words);
        let heads = Heads {
            q_norm: &weights[self.q_norm.0].scale,
            k_norm: &weights[self.k_norm.0].scale,
            rope: floats(rope),
        };
        let qkv = &mut floats(qkv)[..tokens.len() * dims.qkv_width()];
        ops::qk_norm_rope(dims, tokens, &heads, qkv);
        ops::store(dims, PageShape::new(dims, self.step.page_size), tokens, qkv, floats(k), floats(v));
        Ok(())
    }
}

/// Draws each row's token; every thread takes a run of rows and one row of candidates.
fn draw_rows(rows: &[batch::Row], logits: &[f32], vocab: usize, candidates: &mut [f32], out: &mut [u32]) {
    let run = out.len().div_ceil(candidates.len() / vocab).max(1);
    let runs = out.par_chunks_mut(run).zip(candidates.par_chunks_mut(vocab)).enumerate();
    runs.for_each(|(i, (out, candidates))| {
        let rows = rows[i * run..].iter().zip(logits[i * run * vocab..].chunks(vocab));
        for (out, (row, logits)) in out.iter_mut().zip(rows) {
            *out = sampling::draw(logits, row, candidates);
        }
    });
}

fn header(words: &[u32]) -> Header {
    bytemuck::cast_slice(&words[..HEADER_WORDS])[0]
}

fn tokens<'a>(step: &Step<Buffer>, words: &'a [u32]) -> &'a [batch::Token] {
    batch::packed_tokens(&step.layout, step.shape.tokens as usize, words)
}

fn sampled_rows<'a>(step: &Step<Buffer>, words: &'a [u32]) -> &'a [batch::Row] {
    batch::packed_rows(&step.layout, step.shape.samples as usize, words)
}
