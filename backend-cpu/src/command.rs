//! Each operation as plain data, and what it does to the machine.
//!
//! A command holds handles and padded counts, nothing of a step's contents; rows, tokens, updates and the output place
//! are read from the packed batch in device memory when it runs. So a recorded list of commands replays on whatever
//! the batch buffer then holds, as a GPU's graph does.

use minisgl_core::backend::{KvLayer, Purpose, Step};
use minisgl_core::batch::{self, HEADER_WORDS, Header};
use minisgl_core::config::Limits;
use minisgl_core::constraint::mask_words;
use minisgl_core::kv::{KvFormat, KvLayout};
use minisgl_core::sampling::{LOGPROB_WORDS, NO_TOKEN, RowLogprobs};
use minisgl_core::shard::Rank;
use minisgl_core::spec::{Activation, DecoderSpec, Dims, Inputs, WeightFormat};
use minisgl_core::stats::ExpertsRead;
use rayon::prelude::*;

use crate::attention::{self, Context, OWN_KV};
use crate::edits::Slots;
use crate::error::CpuError;
use crate::experts::{self, RunExperts};
use crate::linear::{Rounds, gate_up};
use crate::link::Link;
use crate::memory::{Buffer, Memory, floats};
use crate::ops;
use crate::weights::{Matrix, Weight};
use crate::{matmul, sampling};

/// One operation; see [`minisgl_core::backend::Ops`] and `layer.rs` for what each means.
#[derive(Clone, Copy, Debug)]
pub enum Command {
    TakeBatch {
        halves: Buffer,
        turn: Buffer,
        to: Buffer,
    },
    BeginStep {
        step: Step<Buffer>,
    },
    Embed {
        step: Step<Buffer>,
        table: Weight,
        scale: f32,
        out: Buffer,
    },
    RmsNorm {
        tokens: u32,
        x: Buffer,
        weight: Weight,
        out: Buffer,
    },
    AddRmsNorm {
        tokens: u32,
        residual: Buffer,
        delta: Buffer,
        weight: Weight,
        out: Buffer,
    },
    Add {
        tokens: u32,
        residual: Buffer,
        delta: Buffer,
    },
    AddBias {
        tokens: u32,
        x: Buffer,
        bias: Weight,
    },
    Linear {
        tokens: u32,
        x: Buffer,
        weight: Weight,
        out: Buffer,
    },
    GateUp {
        tokens: u32,
        activation: Activation,
        x: Buffer,
        weight: Weight,
        out: Buffer,
    },
    /// `x` becomes the sum of what all ranks have there.
    SumRanks {
        tokens: u32,
        x: Buffer,
    },
    /// `out` is `[rows, cols]`, `share` this rank's columns of it.
    JoinColumns {
        rows: u32,
        cols: u32,
        share: Buffer,
        out: Buffer,
    },
    Heads(Heads),
    Attend(Attend),
    Experts(RunExperts),
    FinalNorm {
        step: Step<Buffer>,
        residual: Buffer,
        delta: Buffer,
        weight: Weight,
        out: Buffer,
    },
    Sample {
        step: Step<Buffer>,
        logits: Buffer,
        tokens: Buffer,
    },
    Logprobs {
        step: Step<Buffer>,
        logits: Buffer,
        tokens: Buffer,
        out: Buffer,
    },
}

/// Norms and turns the heads of queries and keys, stores keys and values.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// The step.
    pub step: Step<Buffer>,
    /// `[tokens, qkv_width]`.
    pub qkv: Buffer,
    /// Of each head `[head_dim]`, or of all together `[q_width]`.
    pub q_norm: Option<Weight>,
    /// Likewise, or `[kv_width]`.
    pub k_norm: Option<Weight>,
    /// `[positions, rotated / 2]` pairs of cosine and sine.
    pub rope: Option<Buffer>,
    /// Elements of a head that turn; 0 without rope.
    pub rotated: u32,
    /// The layer's pages.
    pub kv: KvLayer<Buffer>,
}

/// Attention of each token over its slot's pages.
#[derive(Clone, Copy, Debug)]
pub struct Attend {
    pub step: Step<Buffer>,
    pub window: Option<u32>,
    pub scale: Option<f32>,
    pub qkv: Buffer,
    pub kv: KvLayer<Buffer>,
    pub out: Buffer,
}

/// What commands work on.
#[derive(Default)]
pub struct Machine {
    pub memory: Memory,
    pub weights: Vec<Matrix>,
    pub experts_read: ExpertsRead,
    /// To the other ranks, if there are any.
    pub link: Option<Link>,
    /// `[tokens]`: the largest magnitudes of rows that are rounded whole.
    magnitudes: Vec<f32>,
    model: Option<Sizes>,
}

#[derive(Clone, Copy)]
struct Sizes {
    dims: Dims,
    kv: KvFormat,
    /// The slot of padding tokens.
    nobody: u32,
    /// `[threads, vocab]`: candidates of a row being sampled.
    candidates: Buffer,
    /// `[tokens, widest input]`: what an e4m3 matrix is applied to; empty where nothing is rounded.
    rounded: Buffer,
}

impl Machine {
    /// Plans the scratch memory for a model.
    pub fn reserve(&mut self, spec: &DecoderSpec, limits: &Limits, threads: usize) -> Result<(), CpuError> {
        let (dims, rows) = (&spec.dims, threads.min(limits.running as usize));
        let candidates = self.memory.alloc(Purpose::Scratch, rows * dims.vocab as usize)?;
        let ranks = self.link.as_ref().map_or(1, |link| link.rank().count);
        let width = match spec.weights {
            WeightFormat::Fp8(fp8) if fp8.inputs != Inputs::Plain => {
                // What o and down get may be of all ranks.
                let widest = dims.q_width().max(spec.activated_width() as usize);
                (widest * ranks as usize).max(dims.hidden as usize)
            }
            WeightFormat::Fp8(_) | WeightFormat::Bf16 => 0,
        };
        let rounded = self.memory.alloc(Purpose::Scratch, limits.step_tokens() * width)?;
        self.magnitudes = vec![0.0; limits.step_tokens()];
        if let Some(link) = &self.link {
            let logits = limits.logit_rows() * dims.vocab.div_ceil(ranks) as usize;
            let width = dims.q_width().max(dims.hidden.max(spec.activated_width()) as usize);
            link.reserve(logits.max(limits.step_tokens() * width));
        }
        let kv = spec.kv.unwrap_or(OWN_KV);
        self.model = Some(Sizes { dims: *dims, kv, nobody: limits.running, candidates, rounded });
        Ok(())
    }

    /// Runs a command to its end.
    pub fn run(&mut self, command: &Command) -> Result<(), CpuError> {
        let Machine { memory, weights, experts_read, link, magnitudes, model } = self;
        let mut rounds = Rounds { link: link.as_mut(), magnitudes };
        let Sizes { dims, kv, nobody, candidates, rounded } = model.ok_or(CpuError::NotReserved)?;
        let (hidden, eps) = (dims.hidden as usize, dims.norm_eps);
        match *command {
            Command::TakeBatch { halves, turn, to } => take_batch(memory, halves, turn, to)?,
            Command::BeginStep { step } => begin_step(memory, &step)?,
            Command::Embed { step, table, scale, out } => {
                embed(memory, &weights[table.0], rounds.link, &dims, &step, scale, out)?
            }
            Command::SumRanks { tokens, x } => {
                let [x] = memory.borrow([x])?.map(floats);
                let len = tokens as usize * hidden;
                rounds.link.map_or(Ok(()), |link| link.sum(&mut x[..len]))?;
            }
            Command::JoinColumns { rows, cols, share, out } => {
                let [share, out] = memory.borrow([share, out])?.map(floats);
                if let Some(link) = rounds.link {
                    let (rows, cols) = (rows as usize, cols as usize);
                    let width = link.rank().share(cols).len();
                    link.join_columns(&share[..rows * width], cols, &mut out[..rows * cols])?;
                }
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
                let [x, out, rounded] = memory.borrow([x, out, rounded])?.map(floats);
                let (weight, tokens) = (&weights[weight.0], tokens as usize);
                let x = rounds.inputs(weight, &x[..tokens * weight.cols], rounded)?;
                matmul::linear(weight.all(), x, &mut out[..tokens * weight.rows]);
            }
            Command::Add { tokens, residual, delta } => {
                let [residual, delta] = memory.borrow([residual, delta])?.map(floats);
                let len = tokens as usize * hidden;
                ops::add(&mut residual[..len], &delta[..len]);
            }
            Command::AddBias { tokens, x, bias } => {
                let [x] = memory.borrow([x])?.map(floats);
                let bias = &weights[bias.0].scale;
                ops::add_bias(&mut x[..tokens as usize * bias.len()], bias);
            }
            Command::GateUp { tokens, activation, x, weight, out } => {
                let [x, out, rounded] = memory.borrow([x, out, rounded])?.map(floats);
                let (weight, tokens) = (&weights[weight.0], tokens as usize);
                let x = rounds.inputs(weight, &x[..tokens * weight.cols], rounded)?;
                gate_up(weight.all(), activation, x, &mut out[..tokens * weight.rows / 2]);
            }
            Command::Heads(command) => command.run(memory, weights, &dims, kv)?,
            Command::Attend(command) => command.run(memory, &dims, kv)?,
            Command::Experts(command) => {
                let read = command.run(memory, weights, &dims, nobody, rounded, rounds)?;
                experts::count(&command.step, read, experts_read);
            }
            Command::FinalNorm { step, residual, delta, weight, out } => {
                let [words, residual, delta, out] = memory.borrow([step.batch, residual, delta, out])?;
                let rows = sampled_rows(&step, words);
                let out = &mut floats(out)[..rows.len() * hidden];
                let scale = &weights[weight.0].scale;
                ops::final_norm(rows, floats(residual), floats(delta), scale, eps, out);
            }
            Command::Sample { step, logits, tokens } => {
                sample(memory, dims.vocab as usize, &step, logits, tokens, candidates)?
            }
            Command::Logprobs { step, logits, tokens, out } => {
                logprobs(memory, dims.vocab as usize, &step, logits, tokens, out)?
            }
        }
        Ok(())
    }
}

/// The batch whose turn it is.
fn take_batch(memory: &mut Memory, halves: Buffer, turn: Buffer, to: Buffer) -> Result<(), CpuError> {
    let [halves, turn, to] = memory.borrow([halves, turn, to])?;
    let waiting = &halves[turn[0] as usize * (halves.len() / 2)..];
    let words = bytemuck::from_bytes::<batch::Header>(bytemuck::cast_slice(&waiting[..batch::HEADER_WORDS]))
        .words as usize;
    to[..words].copy_from_slice(&waiting[..words]);
    turn[0] = 1 - turn[0];
    Ok(())
}

/// Changes of the page table, of slots and of their rules.
fn begin_step(memory: &mut Memory, step: &Step<Buffer>) -> Result<(), CpuError> {
    let buffers = [step.batch, step.page_table, step.slots, step.rules];
    let [words, page_table, slots, rules] = memory.borrow(buffers)?;
    ops::update_pages(batch::packed_updates(&step.layout, words), page_table);
    let updates = batch::packed_slot_updates(&step.layout, words);
    ops::update_slots(updates, bytemuck::cast_slice_mut(slots));
    ops::update_rules(updates, batch::packed_rules(&step.layout, words), rules);
    Ok(())
}

/// Rows of the table, of which a rank has a share.
fn embed(
    memory: &mut Memory,
    table: &Matrix,
    link: Option<&mut Link>,
    dims: &Dims,
    step: &Step<Buffer>,
    scale: f32,
    out: Buffer,
) -> Result<(), CpuError> {
    let (hidden, vocab) = (dims.hidden as usize, dims.vocab as usize);
    let [words, pool, history, out] = memory.borrow([step.batch, step.token_pool, step.history, out])?;
    let tokens = tokens(step, words);
    ops::remember(tokens, pool, history);
    let out = &mut floats(out)[..tokens.len() * hidden];
    let rank = link.as_ref().map_or(Rank::ALONE, |link| link.rank());
    ops::embed(tokens, pool, table, rank.share(vocab).start, scale, out);
    match link {
        Some(link) => {
            let id = |token: usize| ops::id_of(&tokens[token], pool) as usize;
            link.take_rows(out, hidden, |token| rank.owner(id(token), vocab))
        }
        None => Ok(()),
    }
}

/// Draws the sampled rows' tokens, which go to the pool too.
fn sample(
    memory: &mut Memory,
    vocab: usize,
    step: &Step<Buffer>,
    logits: Buffer,
    tokens: Buffer,
    candidates: Buffer,
) -> Result<(), CpuError> {
    let Step { batch, token_pool, slots, rules, page_table, history, masks, .. } = *step;
    let buffers = [batch, token_pool, slots, rules, page_table, history, masks, logits, tokens, candidates];
    let [words, pool, slots, rules, page_table, history, masks, logits, tokens, candidates] =
        memory.borrow(buffers)?;
    let rows = sampled_rows(step, words);
    let tokens = &mut tokens[header(words).output as usize..][..rows.len()];
    forbid_masked(rows, masks, vocab, floats(logits));
    let slots = Slots {
        states: bytemuck::cast_slice(slots),
        rules,
        page_table,
        table_width: step.table_width as usize,
        page_size: step.page_size,
        history,
    };
    draw_rows(rows, &slots, floats(logits), vocab, candidates, tokens);
    for (row, token) in rows.iter().zip(tokens) {
        pool[row.slot as usize] = if *token == NO_TOKEN { 0 } else { *token };
    }
    Ok(())
}

/// The log-probabilities of drawn tokens, for rows that ask for them.
fn logprobs(
    memory: &mut Memory,
    vocab: usize,
    step: &Step<Buffer>,
    logits: Buffer,
    tokens: Buffer,
    out: Buffer,
) -> Result<(), CpuError> {
    let [words, logits, tokens, out] = memory.borrow([step.batch, logits, tokens, out])?;
    let rows = sampled_rows(step, words);
    let first = header(words).output as usize;
    let out = &mut out[first * LOGPROB_WORDS..][..rows.len() * LOGPROB_WORDS];
    let out: &mut [RowLogprobs] = bytemuck::cast_slice_mut(out);
    let logits = floats(logits).par_chunks(vocab);
    let asked = out.par_iter_mut().zip(rows).zip(&tokens[first..][..rows.len()]).zip(logits);
    asked
        .filter(|(((_, row), token), _)| row.logprobs > 0 && **token != NO_TOKEN)
        .for_each(|(((out, row), token), logits)| *out = sampling::logprobs(logits, row.logprobs, *token));
    Ok(())
}

impl Heads {
    fn run(
        &self,
        memory: &mut Memory,
        weights: &[Matrix],
        dims: &Dims,
        kv: KvFormat,
    ) -> Result<(), CpuError> {
        let rope = self.rope.unwrap_or(self.qkv.slice(0..0));
        let buffers = [self.step.batch, self.qkv, rope, self.kv.k, self.kv.v];
        let [words, qkv, rope, k, v] = memory.borrow(buffers)?;
        let tokens = tokens(&self.step, words);
        let scale = |norm: Option<Weight>| norm.map(|norm| weights[norm.0].scale.as_slice());
        let heads = ops::Heads {
            q_norm: scale(self.q_norm),
            k_norm: scale(self.k_norm),
            rope: floats(rope),
            rotated: self.rotated as usize,
        };
        let qkv = &mut floats(qkv)[..tokens.len() * dims.qkv_width()];
        ops::norm_and_turn(dims, tokens, &heads, qkv);
        let layout = KvLayout::new(kv, dims, self.step.page_size);
        attention::store(dims, &layout, tokens, qkv, bytes(k), bytes(v));
        Ok(())
    }
}

impl Attend {
    fn run(&self, memory: &mut Memory, dims: &Dims, format: KvFormat) -> Result<(), CpuError> {
        let Attend { step, window, scale, qkv, kv, out } = *self;
        let buffers = [step.batch, step.page_table, qkv, kv.k, kv.v, out];
        let [words, page_table, qkv, k, v, out] = memory.borrow(buffers)?;
        let context = Context {
            layout: KvLayout::new(format, dims, step.page_size),
            k: bytes(k),
            v: bytes(v),
            page_table,
            table_width: step.table_width as usize,
            window: window.map_or(usize::MAX, |window| window as usize),
            scale: scale.unwrap_or(1.0 / (dims.head_dim as f32).sqrt()),
        };
        let tokens = tokens(&step, words);
        let len = tokens.len() * dims.q_width();
        attention::attention(dims, tokens, floats(qkv), context, &mut floats(out)[..len]);
        Ok(())
    }
}

/// Leaves rows with a mask no other tokens than it allows.
fn forbid_masked(rows: &[batch::Row], masks: &[u32], vocab: usize, logits: &mut [f32]) {
    let words = mask_words(vocab as u32);
    logits.par_chunks_mut(vocab).zip(rows).filter(|(_, row)| row.mask > 0).for_each(|(logits, row)| {
        sampling::forbid(logits, &masks[(row.mask as usize - 1) * words..][..words]);
    });
}

/// Edits each row's logits and draws its token; every thread takes a run of rows and one row of scratch.
fn draw_rows(
    rows: &[batch::Row],
    slots: &Slots<'_>,
    logits: &mut [f32],
    vocab: usize,
    scratch: &mut [u32],
    out: &mut [u32],
) {
    let run = out.len().div_ceil(scratch.len() / vocab).max(1);
    let runs = out.par_chunks_mut(run).zip(scratch.par_chunks_mut(vocab)).enumerate();
    runs.zip(logits.par_chunks_mut(run * vocab)).for_each(|((i, (out, scratch)), logits)| {
        let rows = rows[i * run..].iter().zip(logits.chunks_mut(vocab));
        for (out, (row, logits)) in out.iter_mut().zip(rows) {
            let state = &slots.states[row.slot as usize];
            slots.edit(row, logits, scratch);
            *out = sampling::draw(logits, state, row.kv_len, floats(scratch));
        }
    });
}

fn bytes(words: &mut [u32]) -> &mut [u8] {
    bytemuck::cast_slice_mut(words)
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
