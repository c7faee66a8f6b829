//! What a transformer is, operation by operation, over slices.
//!
//! Shapes are in the comments; `tokens` is the step's, padding included. Matrix products are in [`crate::matmul`],
//! attention in [`crate::attention`], drawing tokens in [`crate::sampling`].

use minisgl_core::batch::{LAST_TOKEN, PageUpdate, Row, SlotUpdate, Token};
use minisgl_core::rules::RULE_WORDS;
use minisgl_core::sampling::SlotState;
use minisgl_core::spec::Dims;
use rayon::prelude::*;

use crate::weights::Matrix;

/// Rows of an elementwise operation that are worth a task.
const ROWS_A_TASK: usize = 16;

/// `page_table[index] = page` for each update.
pub fn update_pages(updates: &[PageUpdate], page_table: &mut [u32]) {
    for update in updates {
        page_table[update.index as usize] = update.page;
    }
}

/// `slots[slot] = state` for each update.
pub fn update_slots(updates: &[SlotUpdate], slots: &mut [SlotState]) {
    for update in updates {
        slots[update.slot as usize] = update.state;
    }
}

/// The slots' words of rules, to their regions.
pub fn update_rules(updates: &[SlotUpdate], words: &[u32], rules: &mut [u32]) {
    for SlotUpdate { slot, rules: first, rule_words, .. } in updates {
        let own = &words[*first as usize..][..*rule_words as usize];
        rules[*slot as usize * RULE_WORDS..][..own.len()].copy_from_slice(own);
    }
}

/// A token's id: the batch's, or the one that its slot sampled last.
pub fn id_of(token: &Token, token_pool: &[u32]) -> u32 {
    if token.id == LAST_TOKEN { token_pool[token.slot as usize] } else { token.id }
}

/// `history[location of t] = id of t`.
pub fn remember(tokens: &[Token], token_pool: &[u32], history: &mut [u32]) {
    for token in tokens {
        history[token.location as usize] = id_of(token, token_pool);
    }
}

/// `out[t] = table[id of t - first] * scale`: `[tokens, hidden]`. Tokens that the table, one rank's, has not are left out.
pub fn embed(
    tokens: &[Token],
    token_pool: &[u32],
    table: &Matrix,
    first: usize,
    scale: f32,
    out: &mut [f32],
) {
    let rows = out.par_chunks_mut(table.cols).zip(tokens).with_min_len(ROWS_A_TASK);
    rows.for_each(|(out, token)| {
        let row = (id_of(token, token_pool) as usize).checked_sub(first);
        if let Some(row) = row.filter(|row| *row < table.rows) {
            table.widen(row, 0, out);
            out.iter_mut().for_each(|x| *x *= scale);
        }
    });
}

/// `out = x / sqrt(mean(x^2) + eps) * scale`, one row.
fn norm_row(x: &[f32], scale: &[f32], eps: f32, out: &mut [f32]) {
    let factor = norm_factor(x, eps);
    for ((out, x), scale) in out.iter_mut().zip(x).zip(scale) {
        *out = x * factor * scale;
    }
}

fn norm_factor(x: &[f32], eps: f32) -> f32 {
    let square_sum: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    (1.0 / (square_sum / x.len() as f64 + f64::from(eps)).sqrt()) as f32
}

/// `out[t] = rms_norm(x[t])`: `[tokens, width]`, where the scale is `[width]`.
pub fn rms_norm(x: &[f32], scale: &[f32], eps: f32, out: &mut [f32]) {
    let width = scale.len();
    let rows = out.par_chunks_mut(width).zip(x.par_chunks(width)).with_min_len(ROWS_A_TASK);
    rows.for_each(|(out, x)| norm_row(x, scale, eps, out));
}

/// `residual += delta`, `out = rms_norm(residual)`: `[tokens, width]`.
pub fn add_rms_norm(residual: &mut [f32], delta: &[f32], scale: &[f32], eps: f32, out: &mut [f32]) {
    let width = scale.len();
    let rows = out.par_chunks_mut(width).zip(residual.par_chunks_mut(width)).zip(delta.par_chunks(width));
    rows.with_min_len(ROWS_A_TASK).for_each(|((out, residual), delta)| {
        for (residual, delta) in residual.iter_mut().zip(delta) {
            *residual += delta;
        }
        norm_row(residual, scale, eps, out);
    });
}

/// `residual += delta`.
pub fn add(residual: &mut [f32], delta: &[f32]) {
    residual.par_iter_mut().zip(delta).with_min_len(1 << 14).for_each(|(x, delta)| *x += delta);
}

/// `x[t] += bias` for every row.
pub fn add_bias(x: &mut [f32], bias: &[f32]) {
    x.par_chunks_mut(bias.len()).with_min_len(ROWS_A_TASK).for_each(|row| {
        row.iter_mut().zip(bias).for_each(|(x, bias)| *x += bias);
    });
}

/// `x / (1 + exp(-x))`.
pub fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}

/// GELU by its tanh approximation (Hendrycks and Gimpel, 2016).
pub fn gelu_tanh(x: f32) -> f32 {
    const ROOT_2_OVER_PI: f32 = 0.797_884_6;
    0.5 * x * (1.0 + (ROOT_2_OVER_PI * (x + 0.044_715 * x * x * x)).tanh())
}

/// `out[i] = rms_norm(residual + delta)` of the last token of row i: `[samples, width]`.
pub fn final_norm(rows: &[Row], residual: &[f32], delta: &[f32], scale: &[f32], eps: f32, out: &mut [f32]) {
    let width = scale.len();
    out.par_chunks_mut(width).zip(rows).with_min_len(ROWS_A_TASK).for_each(|(out, row)| {
        let last = (row.first_token + row.tokens - 1) as usize * width;
        let sum = |i: usize| residual[last + i] + delta[last + i];
        for (i, out) in out.iter_mut().enumerate() {
            *out = sum(i);
        }
        let factor = norm_factor(out, eps);
        for (out, scale) in out.iter_mut().zip(scale) {
            *out = *out * factor * scale;
        }
    });
}

/// What happens to query and key heads.
pub struct Heads<'a> {
    /// Scales of each query head `[head_dim]`, or of all together `[q_width]`.
    pub q_norm: Option<&'a [f32]>,
    /// Likewise of key heads, `[head_dim]` or `[kv_width]`.
    pub k_norm: Option<&'a [f32]>,
    /// `[positions, rotated / 2]` pairs of cosine and sine.
    pub rope: &'a [f32],
    /// Elements of a head that turn.
    pub rotated: usize,
}

/// RMSNorm, then rotation, of query and key heads, in place: `qkv` is `[tokens, heads + 2 kv_heads, head_dim]`.
pub fn norm_and_turn(dims: &Dims, tokens: &[Token], heads: &Heads<'_>, qkv: &mut [f32]) {
    let (head_dim, q_width) = (dims.head_dim as usize, dims.q_width());
    let rows = qkv.par_chunks_mut(dims.qkv_width()).zip(tokens).with_min_len(ROWS_A_TASK);
    rows.for_each(|(qkv, token)| {
        let (q, kv) = qkv.split_at_mut(q_width);
        let k = &mut kv[..dims.kv_width()];
        for (x, scale) in [(&mut *q, heads.q_norm), (&mut *k, heads.k_norm)] {
            if let Some(scale) = scale {
                x.chunks_mut(scale.len()).for_each(|x| norm_in_place(x, scale, dims.norm_eps));
            }
        }
        if heads.rotated > 0 {
            let angles = &heads.rope[token.position as usize * heads.rotated..][..heads.rotated];
            let all = q.chunks_mut(head_dim).chain(k.chunks_mut(head_dim));
            all.for_each(|head| rotate(&mut head[..heads.rotated], angles));
        }
    });
}

fn norm_in_place(x: &mut [f32], scale: &[f32], eps: f32) {
    let factor = norm_factor(x, eps);
    for (x, scale) in x.iter_mut().zip(scale) {
        *x = *x * factor * scale;
    }
}

/// Rotates each pair `(x[i], x[i + len / 2])` by the position's angle i (Su et al., 2021).
fn rotate(head: &mut [f32], angles: &[f32]) {
    let (low, high) = head.split_at_mut(head.len() / 2);
    for ((low, high), angle) in low.iter_mut().zip(high).zip(angles.as_chunks::<2>().0) {
        let [cos, sin] = *angle;
        (*low, *high) = (*low * cos - *high * sin, *high * cos + *low * sin);
    }
}
