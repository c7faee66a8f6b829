//! Attention over keys and values in pages, and how they get there.
//!
//! What is kept as f32 is read in place; a narrower format is widened some rows at a time, to numbers that f32 has
//! exactly. So formats differ in what was stored, and in nothing else: not in the order of sums.

use minisgl_core::batch::Token;
use minisgl_core::kv::{KvFormat, KvLayout, Place};
use minisgl_core::spec::Dims;
use rayon::prelude::*;

use crate::simd::{Kernel, add_scaled_rows, dots, exp, fastest, largest, sum};

/// What keys and values are kept as where a spec leaves it open.
pub const OWN_KV: KvFormat = KvFormat::F32;
/// Elements of the widest head that is kept in another format.
pub const WIDENED_MAX: usize = 256;

/// Rounds each token's keys and values to the layout's format, and leaves them at its location. `qkv` is `[tokens, qkv_width]`.
pub fn store(dims: &Dims, layout: &KvLayout, tokens: &[Token], qkv: &[f32], k: &mut [u8], v: &mut [u8]) {
    let (head_dim, page_size) = (layout.head_dim(), layout.page_size());
    for (qkv, token) in qkv.chunks(dims.qkv_width()).zip(tokens) {
        let (keys, values) = qkv[dims.q_width()..].split_at(dims.kv_width());
        let (page, row) = (token.location as usize / page_size, token.location as usize % page_size);
        for (head, (key, value)) in keys.chunks(head_dim).zip(values.chunks(head_dim)).enumerate() {
            let place = layout.place(page, head, row);
            layout.format().store(key, place, k);
            layout.format().store(value, place, v);
        }
    }
}

/// Where attention reads.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// How pages are laid out.
    pub layout: KvLayout,
    /// Keys of the layer.
    pub k: &'a [u8],
    /// Values of the layer.
    pub v: &'a [u8],
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
    match context.layout.format() {
        KvFormat::F32 => {
            let [k, v] = [context.k, context.v].map(|bytes| Floats(bytemuck::cast_slice(bytes)));
            attend(dims, tokens, qkv, context, [k, v], out);
        }
        format @ (KvFormat::Bf16 | KvFormat::Fp8) => {
            let [k, v] = [context.k, context.v].map(|bytes| Packed { format, bytes });
            attend(dims, tokens, qkv, context, [k, v], out);
        }
    }
}

fn attend<P: Rows>(
    dims: &Dims,
    tokens: &[Token],
    qkv: &[f32],
    context: Context<'_>,
    [k, v]: [P; 2],
    out: &mut [f32],
) {
    let (kv_heads, head_dim) = (dims.kv_heads as usize, dims.head_dim as usize);
    let group = dims.heads as usize / kv_heads * head_dim;
    out.par_chunks_mut(group).enumerate().for_each(|(task, out)| {
        let (token, head) = (tokens[task / kv_heads], task % kv_heads);
        let q = &qkv[task / kv_heads * dims.qkv_width()..][head * group..][..group];
        fastest(Attend { context, k, v, token, head, q, out });
    });
}

/// Rows of keys, or of values, as floats.
trait Rows: Copy + Send + Sync {
    /// How many are at hand at once.
    const AT_ONCE: usize;

    /// Brings the rows at these places to hand, at most [`Rows::AT_ONCE`].
    fn widen(self, places: &[Place], head_dim: usize, scratch: &mut Scratch);

    /// Row `j` of them.
    fn row<'s>(&'s self, places: &[Place], j: usize, head_dim: usize, scratch: &'s Scratch) -> &'s [f32];
}

/// Rows that were widened.
type Scratch = [[f32; WIDENED_MAX]; Packed::AT_ONCE];

/// Pages of f32.
#[derive(Clone, Copy)]
struct Floats<'a>(&'a [f32]);

impl Rows for Floats<'_> {
    const AT_ONCE: usize = LEAF;

    #[inline(always)]
    fn widen(self, _: &[Place], _: usize, _: &mut Scratch) {}

    #[inline(always)]
    fn row<'s>(&'s self, places: &[Place], j: usize, head_dim: usize, _: &'s Scratch) -> &'s [f32] {
        &self.0[places[j].row / size_of::<f32>()..][..head_dim]
    }
}

/// Pages in a narrower format.
#[derive(Clone, Copy)]
struct Packed<'a> {
    format: KvFormat,
    bytes: &'a [u8],
}

impl Rows for Packed<'_> {
    const AT_ONCE: usize = 8;

    #[inline(always)]
    fn widen(self, places: &[Place], head_dim: usize, scratch: &mut Scratch) {
        for (place, row) in places.iter().zip(scratch) {
            self.format.load(*place, self.bytes, &mut row[..head_dim]);
        }
    }

    #[inline(always)]
    fn row<'s>(&'s self, _: &[Place], j: usize, head_dim: usize, scratch: &'s Scratch) -> &'s [f32] {
        &scratch[j][..head_dim]
    }
}

/// One token's attention for the query heads that share one key head.
struct Attend<'a, P> {
    context: Context<'a>,
    k: P,
    v: P,
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

impl<P: Rows> Kernel for Attend<'_, P> {
    /// The softmax is taken leaf by leaf: with `m` the largest score yet, `l` the sum of `exp(s - m)` and `out` the
    /// values so weighted, a larger `m` scales down what is there (Milakov and Gimelshein, 2018). Leaves are positions
    /// 0..64, 64..128, and so on, so the order of sums depends on the position alone.
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let head_dim = self.context.layout.head_dim();
        let len = self.token.position as usize + 1;
        let begin = len.saturating_sub(self.context.window);
        let scale = self.context.scale;
        let scratch = &mut [[0.0; WIDENED_MAX]; Packed::AT_ONCE];
        let heads = self.q.chunks(HEADS * head_dim).zip(self.out.chunks_mut(HEADS * head_dim));
        for (q, out) in heads {
            out.fill(0.0);
            let (mut max, mut total) = ([f32::NEG_INFINITY; HEADS], [0.0f32; HEADS]);
            for leaf in (begin / LEAF * LEAF..len).step_by(LEAF) {
                let (first, end) = (leaf.max(begin), len.min(leaf + LEAF));
                let places = self.context.places(self.token.slot, self.head, first, end);
                let places = &places[..end - first];
                let mut scores = [[0.0f32; LEAF]; HEADS];
                score::<FMA, P>(self.k, q, places, head_dim, &mut scores, scratch);
                for (h, out) in out.chunks_mut(head_dim).enumerate() {
                    let scores = &mut scores[h][..places.len()];
                    let top = max[h].max(largest(scores) * scale);
                    let shrink = exp::<FMA>(max[h] - top);
                    for score in scores.iter_mut() {
                        *score = exp::<FMA>(*score * scale - top);
                    }
                    total[h] = total[h] * shrink + sum(scores);
                    max[h] = top;
                    out.iter_mut().for_each(|out| *out *= shrink);
                }
                for (i, places) in places.chunks(P::AT_ONCE).enumerate() {
                    self.v.widen(places, head_dim, scratch);
                    for (scores, out) in scores.iter().zip(out.chunks_mut(head_dim)) {
                        let shares = &scores[i * P::AT_ONCE..][..places.len()];
                        add_scaled_rows::<FMA>(out, shares, |j| self.v.row(places, j, head_dim, scratch));
                    }
                }
            }
            for (out, total) in out.chunks_mut(head_dim).zip(total) {
                out.iter_mut().for_each(|out| *out /= total);
            }
        }
    }
}

impl Context<'_> {
    /// Where the keys and values of positions `first..end` of a slot lie. A page's size is a power of two.
    #[inline(always)]
    fn places(&self, slot: u32, head: usize, first: usize, end: usize) -> [Place; LEAF] {
        let pages = &self.page_table[slot as usize * self.table_width..][..self.table_width];
        let mut places = [Place::default(); LEAF];
        let page_size = self.layout.page_size();
        let (size_log2, row) = (page_size.trailing_zeros(), page_size - 1);
        for (position, place) in (first..end).zip(&mut places) {
            *place = self.layout.place(pages[position >> size_log2] as usize, head, position & row);
        }
        places
    }
}

/// `scores[h][j] = q[h] . key j`: four keys at a time, with two heads.
#[inline(always)]
fn score<const FMA: bool, P: Rows>(
    k: P,
    q: &[f32],
    places: &[Place],
    head_dim: usize,
    scores: &mut [[f32; LEAF]; HEADS],
    scratch: &mut Scratch,
) {
    for (i, places) in places.chunks(4).enumerate() {
        let first = 4 * i;
        k.widen(places, head_dim, scratch);
        let key = |j: usize| k.row(places, j.min(places.len() - 1), head_dim, scratch);
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
