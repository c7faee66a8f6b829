//! What a transformer is, operation by operation, over slices.
//!
//! Shapes are in the comments; `tokens` is the step's, padding included. Matrix products are in [`crate::matmul`],
//! drawing tokens in [`crate::sampling`].

use minisgl_core::batch::{LAST_TOKEN, PageUpdate, Row, SlotUpdate, Token};
use minisgl_core::rules::RULE_WORDS;
use minisgl_core::sampling::SlotState;
use minisgl_core::spec::Dims;
use rayon::prelude::*;

use crate::simd::{Kernel, add_scaled_rows, dots, exp, fastest, largest, sum};
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

/// The KV pages of a layer as one sees them from a sequence: `[pages + 1, kv_heads, page_size, head_dim]`.
#[derive(Clone, Copy)]
pub struct PageShape {
    kv_heads: usize,
    page_size: usize,
    head_dim: usize,
}

impl PageShape {
    /// The layout of a model's pages.
    pub fn new(dims: &Dims, page_size: u32) -> Self {
        PageShape {
            kv_heads: dims.kv_heads as usize,
            page_size: page_size as usize,
            head_dim: dims.head_dim as usize,
        }
    }

    /// Where the head's elements for row `row` of page `page` begin.
    #[inline(always)]
    fn offset(self, page: usize, head: usize, row: usize) -> usize {
        ((page * self.kv_heads + head) * self.page_size + row) * self.head_dim
    }
}

/// Copies each token's keys and values to its location.
pub fn store(dims: &Dims, shape: PageShape, tokens: &[Token], qkv: &[f32], k: &mut [f32], v: &mut [f32]) {
    let kv_width = shape.kv_heads * shape.head_dim;
    for (qkv, token) in qkv.chunks(dims.qkv_width()).zip(tokens) {
        let (keys, values) = qkv[dims.q_width()..].split_at(kv_width);
        let (page, row) =
            (token.location as usize / shape.page_size, token.location as usize % shape.page_size);
        for head in 0..shape.kv_heads {
            let to = shape.offset(page, head, row);
            let from = head * shape.head_dim..(head + 1) * shape.head_dim;
            k[to..][..shape.head_dim].copy_from_slice(&keys[from.clone()]);
            v[to..][..shape.head_dim].copy_from_slice(&values[from]);
        }
    }
}

/// Where attention reads.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// How pages are laid out.
    pub shape: PageShape,
    /// Keys of the layer.
    pub k: &'a [f32],
    /// Values of the layer.
    pub v: &'a [f32],
    /// `[slots + 1, table_width]`.
    pub page_table: &'a [u32],
    /// Entries of a slot.
    pub table_width: usize,
    /// Positions that a token attends to at most.
    pub window: usize,
    /// What scores are multiplied by.
    pub scale: f32,
}

/// `out[t, h] = softmax(scale * q[t, h] . k) @ v` over the window's positions up to t's own, where the `heads / kv_heads`
/// query heads of a group share keys and values: `[tokens, heads, head_dim]`.
pub fn attention(dims: &Dims, tokens: &[Token], qkv: &[f32], context: Context<'_>, out: &mut [f32]) {
    let (kv_heads, head_dim) = (dims.kv_heads as usize, dims.head_dim as usize);
    let group = dims.heads as usize / kv_heads * head_dim;
    out.par_chunks_mut(group).enumerate().for_each(|(task, out)| {
        let (token, head) = (tokens[task / kv_heads], task % kv_heads);
        let q = &qkv[task / kv_heads * dims.qkv_width()..][head * group..][..group];
        fastest(Attend { context, token, head, q, out });
    });
}

/// One token's attention for the query heads that share one key head.
struct Attend<'a> {
    context: Context<'a>,
    token: Token,
    head: usize,
    /// `[group, head_dim]`.
    q: &'a [f32],
    /// `[group, head_dim]`.
    out: &'a mut [f32],
}

/// Positions whose scores are held at once.
const LEAF: usize = 64;
/// Query heads that share a pass over the keys.
const HEADS: usize = 8;

impl Kernel for Attend<'_> {
    /// The softmax is taken leaf by leaf: with `m` the largest score yet, `l` the sum of `exp(s - m)` and `out` the
    /// values so weighted, a larger `m` scales down what is there (Milakov and Gimelshein, 2018). Leaves are positions
    /// 0..64, 64..128, and so on, so the order of sums depends on the position alone.
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let head_dim = self.context.shape.head_dim;
        let len = self.token.position as usize + 1;
        let begin = len.saturating_sub(self.context.window);
        let scale = self.context.scale;
        let heads = self.q.chunks(HEADS * head_dim).zip(self.out.chunks_mut(HEADS * head_dim));
        for (q, out) in heads {
            out.fill(0.0);
            let (mut max, mut total) = ([f32::NEG_INFINITY; HEADS], [0.0f32; HEADS]);
            for leaf in (begin / LEAF * LEAF..len).step_by(LEAF) {
                let (first, end) = (leaf.max(begin), len.min(leaf + LEAF));
                let offsets = self.context.offsets(self.token.slot, self.head, first, end);
                let offsets = &offsets[..end - first];
                let mut scores = [[0.0f32; LEAF]; HEADS];
                self.context.score::<FMA>(q, offsets, &mut scores);
                for (h, out) in out.chunks_mut(head_dim).enumerate() {
                    let scores = &mut scores[h][..offsets.len()];
                    let top = max[h].max(largest(scores) * scale);
                    let shrink = exp::<FMA>(max[h] - top);
                    for score in scores.iter_mut() {
                        *score = exp::<FMA>(*score * scale - top);
                    }
                    total[h] = total[h] * shrink + sum(scores);
                    max[h] = top;
                    out.iter_mut().for_each(|out| *out *= shrink);
                    add_scaled_rows::<FMA>(out, scores, |j| &self.context.v[offsets[j]..][..head_dim]);
                }
            }
            for (out, total) in out.chunks_mut(head_dim).zip(total) {
                out.iter_mut().for_each(|out| *out /= total);
            }
        }
    }
}

impl Context<'_> {
    /// Where the keys and values of positions `first..end` of a slot begin. A page's size is a power of two.
    #[inline(always)]
    fn offsets(&self, slot: u32, head: usize, first: usize, end: usize) -> [usize; LEAF] {
        let pages = &self.page_table[slot as usize * self.table_width..][..self.table_width];
        let mut offsets = [0; LEAF];
        let (size_log2, row) = (self.shape.page_size.trailing_zeros(), self.shape.page_size - 1);
        for (position, offset) in (first..end).zip(&mut offsets) {
            *offset = self.shape.offset(pages[position >> size_log2] as usize, head, position & row);
        }
        offsets
    }

    /// `scores[h][j] = q[h] . key j`: four keys at a time, with two heads.
    #[inline(always)]
    fn score<const FMA: bool>(&self, q: &[f32], offsets: &[usize], scores: &mut [[f32; LEAF]; HEADS]) {
        let head_dim = self.shape.head_dim;
        for first in (0..offsets.len()).step_by(4) {
            let key = |j: usize| &self.k[offsets[(first + j).min(offsets.len() - 1)]..][..head_dim];
            let keys = [key(0), key(1), key(2), key(3)];
            let pairs = q.chunks(2 * head_dim).zip(scores.chunks_mut(2));
            for (q, scores) in pairs {
                if q.len() == 2 * head_dim {
                    let (low, high) = q.split_at(head_dim);
                    let [low, high] = dots::<FMA, 4, 2>(keys, [low, high]);
                    scores[0][first..first + 4].copy_from_slice(&low);
                    scores[1][first..first + 4].copy_from_slice(&high);
                } else {
                    let [only] = dots::<FMA, 4, 1>(keys, [q]);
                    scores[0][first..first + 4].copy_from_slice(&only);
                }
            }
        }
    }
}
