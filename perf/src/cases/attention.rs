//! Cases of paged attention: decode over contexts of one length and over a mix, prefill of whole prompts and of
//! portions behind a context, and where it is asked for both beside each other (`attention_mixed`); all of it with a window too.
//!
//! Queries lie in [-8, 8), so that scores differ and the softmax has something to do; keys and values in [-1, 1).

use half::bf16;
use minisgl_core::backend::KvLayer;
use minisgl_core::kv::{KvFormat, KvLayout};
use minisgl_core::tensor::splitmix64;
use minisgl_cuda::ops::attention::Attention;
use minisgl_cuda::ops::halves::{Division, Part};
use minisgl_cuda::{Buffer, Cuda, CudaError};

use crate::case::{Case, Check, Filter, Run};
use crate::check::relative_error;
use crate::model::ModelShape;
use crate::random::{random, random_element, random_in, random_pages};
use crate::step::{PAGE_SIZE, StepOf, activations};

const QUERIES: u64 = 5 << 40;
const KEYS: u64 = 6 << 40;
const VALUES: u64 = 7 << 40;
/// Queries lie within this.
const QUERY_MAX: f32 = 8.0;
/// Tokens of a prompt in the prefill cases.
const PROMPT: u32 = 1024;
/// Queries (a token's head) that are checked.
const SAMPLES: usize = 8;
/// What bf16 queries, probabilities and results allow, relative to the norm of the sampled outputs.
const ERROR_MAX: f64 = 0.02;

pub(crate) fn cases(filter: &Filter) -> Vec<Case> {
    let mut cases = Vec::new();
    for model in filter.models().into_iter().flat_map(ModelShape::and_windowed) {
        // A window that holds all of a context is none.
        let contexts: Vec<u32> = filter
            .contexts()
            .into_iter()
            .filter(|context| model.window.is_none_or(|n| n < *context))
            .collect();
        for rows in filter.rows() {
            for &context in &contexts {
                let step = StepOf::decode(&vec![context; rows as usize], model.vocab);
                let shape = format!("rows={rows} context={context}");
                let fp8 = StepOf::decode(&vec![context; rows as usize], model.vocab);
                cases.push(case("attention_decode", shape.clone(), model, KvFormat::Bf16, step));
                cases.push(case("attention_decode_fp8", shape, model, KvFormat::Fp8, fp8));
            }
        }
        for (rows, tokens, behind) in super::mixed(filter) {
            let of_each = super::BESIDE_PROMPT;
            let step = StepOf::mixed(&vec![of_each; rows as usize], tokens, behind, model.vocab);
            let shape = format!("rows={rows} context={of_each} tokens={tokens} behind={behind}");
            cases.push(case("attention_mixed", shape, model, KvFormat::Bf16, step));
        }
        for step in [100, 500, 900] {
            let contexts = mix(step);
            let shape = format!("mix step={step} rows={}", contexts.len());
            let step = || StepOf::decode(&contexts, model.vocab);
            cases.push(case("attention_decode", shape.clone(), model, KvFormat::Bf16, step()));
            cases.push(case("attention_decode_fp8", shape, model, KvFormat::Fp8, step()));
        }
        for tokens in filter.tokens() {
            // So long that a window matters.
            let prompt = model.window.map_or(PROMPT, |window| (2 * window).max(PROMPT)).min(tokens);
            let prompts = tokens.div_ceil(prompt);
            let rows = (0..prompts).map(|i| (0, prompt.min(tokens - i * prompt))).collect();
            let step = StepOf { rows, ..StepOf::decode(&[], model.vocab) };
            let shape = format!("tokens={tokens} prompts={prompts}");
            cases.push(case("attention_prefill", shape, model, KvFormat::Bf16, step));
            for &context in contexts.iter().filter(|context| **context >= tokens) {
                let step = StepOf { rows: vec![(context, tokens)], ..StepOf::decode(&[], model.vocab) };
                cases.push(case(
                    "attention_prefill",
                    format!("tokens={tokens} behind={context}"),
                    model,
                    KvFormat::Bf16,
                    step,
                ));
            }
        }
    }
    cases
}

/// Contexts of those of 256 requests, with prompts and outputs of 100 to 1024 tokens, that still run after so many
/// steps.
fn mix(step: u32) -> Vec<u32> {
    let length = |i: u64| 100 + (splitmix64(i) % 925) as u32;
    let running = (0..256).filter(|i| length(2 * i) > step);
    running.map(|i| length(2 * i + 1) + step).collect()
}

fn case(family: &'static str, shape: String, model: ModelShape, format: KvFormat, step: StepOf) -> Case {
    let dims = model.dims();
    let kv_row = 2.0 * KvLayout::new(format, &dims, PAGE_SIZE).page_bytes() as f64 / f64::from(PAGE_SIZE);
    let q_row = dims.q_width() as f64 * 2.0;
    let window = model.window.unwrap_or(u32::MAX);
    // Positions that any of a row's tokens sees, and those that each sees, all in all: up to its own, within the window.
    let context =
        |(position, tokens): &(u32, u32)| (position + tokens).min(tokens.saturating_add(window - 1));
    let seen = |(position, tokens): &(u32, u32)| {
        (*position..position + tokens).map(|at| f64::from((at + 1).min(window))).sum::<f64>()
    };
    let all_context: f64 = step.rows.iter().map(|row| f64::from(context(row))).sum();
    let all_seen: f64 = step.rows.iter().map(seen).sum();
    let window = model.window.map(|window| format!(" window={window}")).unwrap_or_default();
    Case {
        family,
        shape: format!("model={} {shape}{window}", model.name),
        bytes: all_context * kv_row + f64::from(step.tokens()) * q_row * 2.0,
        flops: 4.0 * dims.q_width() as f64 * all_seen,
        setup: Box::new(move |cuda, copies| setup(cuda, model, format, &step, copies)),
    }
}

fn setup(
    cuda: &mut Cuda,
    model: ModelShape,
    format: KvFormat,
    step_of: &StepOf,
    copies: usize,
) -> Result<Run, CudaError> {
    let dims = model.dims();
    let (limits, tokens) = (step_of.limits(), step_of.tokens() as usize);
    let attention = Attention::new(cuda, &dims, model.window, format, &limits)?;
    let step = step_of.upload(cuda, attention.plan_words(&limits), |shape, rows, words| {
        attention.plan(shape, Division::None, rows, words)
    })?;
    let head_dim = dims.head_dim as usize;
    let kv_rows = (limits.pages as usize + 1) * (dims.kv_heads * PAGE_SIZE) as usize;
    let page_bytes = KvLayout::new(format, &dims, PAGE_SIZE).page_bytes();
    let mut kept = |seed| match format {
        KvFormat::Fp8 => random_pages(cuda, limits.pages as usize + 1, page_bytes, seed),
        KvFormat::F32 | KvFormat::Bf16 => random(cuda, kv_rows, head_dim, seed),
    };
    let caches = (0..copies)
        .map(|_| Ok(KvLayer { k: kept(KEYS)?.into(), v: kept(VALUES)?.into(), wide: None }))
        .collect::<Result<Vec<KvLayer<Buffer>>, CudaError>>()?;
    let q = random_in(cuda, tokens, dims.q_width(), QUERIES, QUERY_MAX)?.into();
    let out: Buffer = random(cuda, tokens, dims.q_width(), 0)?.into();
    let sampled = Sampled { model, pages: step_of.page_lists(), rows: step_of.rows.clone() };
    Ok(Run {
        call: Box::new(move |launcher, call| {
            attention.attend(launcher, &step, Part::Whole, q, caches[call % copies], out)
        }),
        check: match format {
            KvFormat::Fp8 => finite(out, tokens * dims.q_width()),
            KvFormat::F32 | KvFormat::Bf16 => sampled.check(out, tokens),
        },
        baseline: None,
    })
}

/// Of fp8 no more is asked here: the tests compare it with float64.
fn finite(out: Buffer, elements: usize) -> Check {
    Box::new(move |cuda| {
        let bad = activations(cuda, out, elements)?.iter().position(|x| !x.is_finite());
        Ok(bad.map(|i| format!("element {i} of the output is not finite")))
    })
}

/// What the host needs to know to attend by itself.
struct Sampled {
    model: ModelShape,
    /// The pages of each row.
    pages: Vec<Vec<u32>>,
    rows: Vec<(u32, u32)>,
}

impl Sampled {
    fn check(self, out: Buffer, tokens: usize) -> Check {
        Box::new(move |cuda| {
            let dims = self.model.dims();
            let (width, head_dim) = (dims.q_width(), dims.head_dim as usize);
            let values = activations(cuda, out, tokens * width)?;
            let pairs = (0..SAMPLES as u64).flat_map(|i| {
                let draw = |j: u64, below: usize| (splitmix64(1000 + 3 * i + j) % below as u64) as usize;
                let row = draw(0, self.rows.len());
                let within = draw(1, self.rows[row].1 as usize);
                let before: u32 = self.rows[..row].iter().map(|(_, tokens)| tokens).sum();
                let (token, head) = (before as usize + within, draw(2, dims.heads as usize));
                let got = values[token * width + head * head_dim..][..head_dim].to_vec();
                got.into_iter().map(bf16::to_f64).zip(self.attend(row, within, token, head))
            });
            Ok(relative_error(pairs, ERROR_MAX))
        })
    }

    /// Attention of one head of token `within` of a row, in f64.
    fn attend(&self, row: usize, within: usize, token: usize, head: usize) -> Vec<f64> {
        let dims = self.model.dims();
        let (head_dim, width) = (dims.head_dim as usize, dims.q_width());
        let kv_head = head / (dims.heads / dims.kv_heads) as usize;
        let query = |d: usize| {
            let index = (token * width + head * head_dim + d) as u64;
            let element = minisgl_core::tensor::uniform_element(QUERIES, index, -QUERY_MAX, QUERY_MAX);
            f64::from(element.to_f32())
        };
        // 16-byte chunk c of row t of a page lies at chunk c ^ (t % 8).
        let stored = |seed: u64, position: usize, d: usize| {
            let (page, t) =
                (self.pages[row][position / PAGE_SIZE as usize] as usize, position % PAGE_SIZE as usize);
            let kv_row = (page * dims.kv_heads as usize + kv_head) * PAGE_SIZE as usize + t;
            random_element(head_dim, seed, kv_row, ((d / 8) ^ (t % 8)) * 8 + d % 8)
        };
        let queries: Vec<f64> = (0..head_dim).map(query).collect();
        let end = self.rows[row].0 as usize + within + 1;
        let seen = end.saturating_sub(self.model.window.unwrap_or(u32::MAX) as usize)..end;
        let scores: Vec<f64> = seen
            .clone()
            .map(|p| {
                (0..head_dim).map(|d| queries[d] * stored(KEYS, p, d)).sum::<f64>() / (head_dim as f64).sqrt()
            })
            .collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
        let total: f64 = weights.iter().sum();
        (0..head_dim)
            .map(|d| {
                weights.iter().zip(seen.clone()).map(|(weight, p)| weight * stored(VALUES, p, d)).sum::<f64>()
                    / total
            })
            .collect()
    }
}
