//! Paged attention against float64, and against itself: no bit of a token depends on what runs beside it, nor how.
//!
//! A world is a set of slots whose queries, keys and values are functions of (slot, position), so that any step over it
//! can be made and judged. Pages are shuffled; whatever no sequence holds is NaN, and so is the output beforehand.

#[path = "support/fp8.rs"]
mod fp8;
mod support;

use std::time::{SystemTime, UNIX_EPOCH};

use fp8::What;
use half::bf16;
use minisgl_core::backend::{Device, Dims, Element, KvLayer, Purpose, Queue, Step};
use minisgl_core::batch::{Header, Layout, ROW_WORDS, Row, StepShape, zeroed_words};
use minisgl_core::config::Limits;
use minisgl_core::kv::{KvFormat, KvLayout};
use minisgl_core::tensor::splitmix64;
use minisgl_cuda::ops::attention::Attention;
use minisgl_cuda::ops::fp8_pages::Fp8Pages;
use minisgl_cuda::ops::halves::Part;
use minisgl_cuda::{Buffer, Cuda, KernelSet, Options};
use rayon::prelude::*;
use support::taken;

/// bf16 has 8 bits: rounding the output and each probability costs at most 2^-9 of it each, about half of that in the
/// mean over a head's elements; f32 sums and exponentials are far below.
const ERROR_MAX: f64 = 1.0 / 256.0;

/// Lengths around tiles, pages and leaves.
const LENGTHS: [u32; 13] = [1, 15, 16, 17, 63, 127, 128, 129, 255, 256, 257, 1000, 2047];

const NAN: bf16 = bf16::NAN;

#[derive(Clone, Copy, Debug)]
struct Heads {
    kv_heads: usize,
    group: usize,
    head_dim: usize,
}

/// No window: all positions up to a token's own.
const ALL: u32 = u32::MAX;

impl Heads {
    /// Elements of a token's queries, all heads.
    fn width(self) -> usize {
        self.kv_heads * self.group * self.head_dim
    }
}

/// `tokens` tokens of a slot from `position` on.
#[derive(Clone, Copy, Debug)]
struct Span {
    slot: u32,
    position: u32,
    tokens: u32,
}

/// The numbers of a world.
#[derive(Clone, Copy, Debug)]
struct Numbers {
    seed: u64,
    heads: Heads,
    /// Positions that a token sees.
    window: u32,
}

struct World {
    cuda: Cuda,
    attention: Attention,
    /// Where keys and values are fp8.
    pages: Option<Fp8Pages>,
    numbers: Numbers,
    limits: Limits,
    table: Buffer,
    kv: KvLayer<Buffer>,
}

fn fresh_seed() -> u64 {
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    println!("seed {seed}");
    seed
}

/// Uniform, with variance about 1.
fn value(seed: u64, what: u64, slot: u32, position: u32, element: usize) -> bf16 {
    let place = splitmix64(seed ^ (what << 60) ^ (u64::from(slot) << 32) ^ u64::from(position));
    let random = splitmix64(place.wrapping_add(element as u64)) >> 40;
    bf16::from_f32((random as f32 / (1 << 24) as f32 - 0.5) * 3.5)
}

fn upload(cuda: &mut Cuda, words: &[u32], to: Buffer) {
    let mut pinned = cuda.alloc_pinned(words.len()).unwrap();
    cuda.words_mut(&mut pinned).unwrap().copy_from_slice(words);
    cuda.upload(&mut pinned, 0..words.len(), to).unwrap();
    cuda.synchronize().unwrap();
}

impl Numbers {
    /// softmax(q K^T / sqrt(head_dim)) V over the window in float64.
    fn reference(&self, slot: u32, position: u32, head: usize) -> Vec<f64> {
        let Heads { group, head_dim, .. } = self.heads;
        let at = |what, position, head: usize, d| {
            value(self.seed, what, slot, position, head * head_dim + d).to_f64()
        };
        let query: Vec<f64> = (0..head_dim).map(|d| at(0, position, head, d)).collect();
        let begin = (position + 1).saturating_sub(self.window);
        let scores: Vec<f64> = (begin..=position)
            .map(|t| query.iter().enumerate().map(|(d, q)| q * at(1, t, head / group, d)).sum::<f64>())
            .map(|score| score / (head_dim as f64).sqrt())
            .collect();
        let max = scores.iter().copied().fold(f64::MIN, f64::max);
        let mut out = vec![0.0; head_dim];
        for (t, score) in scores.iter().enumerate() {
            let p = (score - max).exp();
            out.iter_mut().enumerate().for_each(|(d, o)| *o += p * at(2, begin + t as u32, head / group, d));
        }
        let sum: f64 = scores.iter().map(|score| (score - max).exp()).sum();
        out.iter().map(|o| o / sum).collect()
    }
}

/// What a world's keys and values are kept as: bf16, bf16 after they were rounded to fp8, and fp8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kept {
    Plain,
    Rounded,
    Fp8,
}

impl World {
    /// Slot i has room for, and keys and values of, `lengths[i]` tokens.
    fn new(kernels: KernelSet, heads: Heads, page_size: u32, lengths: &[u32]) -> World {
        World::windowed(kernels, heads, page_size, lengths, ALL, &vec![0; lengths.len()])
    }

    /// The same world twice on Hopper: with keys and values in fp8, and with those in bf16 that fp8 makes of them.
    fn in_fp8(heads: Heads, page_size: u32, lengths: &[u32], window: u32, begins: &[u32]) -> [World; 2] {
        let seed = fresh_seed();
        [Kept::Fp8, Kept::Rounded]
            .map(|kept| World::kept(kept, seed, KernelSet::Auto, heads, page_size, lengths, window, begins))
    }

    /// Tokens see a window; of slot i's positions those before `begins[i]` are nobody's any more: they hold NaN.
    fn windowed(
        kernels: KernelSet,
        heads: Heads,
        page_size: u32,
        lengths: &[u32],
        window: u32,
        begins: &[u32],
    ) -> World {
        World::kept(Kept::Plain, fresh_seed(), kernels, heads, page_size, lengths, window, begins)
    }

    #[expect(clippy::too_many_arguments, reason = "they are what a world is")]
    fn kept(
        kept: Kept,
        seed: u64,
        kernels: KernelSet,
        heads: Heads,
        page_size: u32,
        lengths: &[u32],
        window: u32,
        begins: &[u32],
    ) -> World {
        let mut cuda = Cuda::new(&Options { device: 0, kernels }).expect("a GPU");
        let slots = lengths.len();
        let longest = lengths.iter().copied().max().unwrap();
        let pages: u32 = lengths.iter().map(|length| length.div_ceil(page_size)).sum::<u32>() + 3;
        let limits = Limits {
            running: slots as u32,
            queued: 1,
            sequence: longest,
            prefill_tokens: 20_000,
            page_size,
            pages,
            graph_rows: 0,
        };
        let dims = Dims {
            layers: 1,
            hidden: 64,
            heads: (heads.kv_heads * heads.group) as u32,
            kv_heads: heads.kv_heads as u32,
            head_dim: heads.head_dim as u32,
            intermediate: 64,
            vocab: 64,
            norm_eps: 1e-6,
        };
        let window_of_it = Some(window).filter(|window| *window != ALL);
        let format = if kept == Kept::Fp8 { KvFormat::Fp8 } else { KvFormat::Bf16 };
        let attention = Attention::new(&mut cuda, &dims, window_of_it, format, &limits).unwrap();
        let table = shuffled_table(&limits, seed, lengths);
        let table_buffer = cuda.alloc(Purpose::Scratch, Element::Word, table.len()).unwrap();
        upload(&mut cuda, &table, table_buffer);
        let [k, v] = [1, 2].map(|what| {
            let world = Pages { seed, what, heads, limits: &limits, table: &table, begins, lengths };
            let bytes = match kept {
                Kept::Fp8 => world.in_fp8(),
                Kept::Plain | Kept::Rounded => {
                    bytemuck::cast_slice(&world.in_bf16(kept == Kept::Rounded)).to_vec()
                }
            };
            let words: Vec<u32> =
                bytes.as_chunks::<4>().0.iter().map(|four| u32::from_le_bytes(*four)).collect();
            let buffer = cuda.alloc(Purpose::KvCache, Element::Kv, words.len()).unwrap();
            upload(&mut cuda, &words, buffer);
            buffer
        });
        let wide_words = KvLayout::new(KvFormat::Bf16, &dims, page_size).words(pages as usize + 1);
        let poison = vec![u32::MAX; wide_words];
        let wide = (kept == Kept::Fp8).then(|| {
            [(); 2].map(|()| {
                let buffer = cuda.alloc(Purpose::KvCache, Element::Kv, wide_words).unwrap();
                upload(&mut cuda, &poison, buffer);
                buffer
            })
        });
        let pages = wide.map(|_| Fp8Pages::new(cuda.modules(), &dims, window_of_it).unwrap());
        World {
            cuda,
            attention,
            pages,
            numbers: Numbers { seed, heads, window },
            limits,
            table: table_buffer,
            kv: KvLayer { k, v, wide },
        }
    }

    fn width(&self) -> usize {
        self.numbers.heads.width()
    }

    /// Runs a step whose first rows are decode rows, one of decode rows alone whole and as two halves, and returns
    /// `[tokens, q_width]`.
    fn run(&mut self, decode_rows: usize, spans: &[Span]) -> Vec<bf16> {
        let plan_words = self.attention.plan_words(&self.limits);
        let layout = Layout::new(&self.limits, plan_words);
        let rows = rows_of(spans);
        let tokens: u32 = spans.iter().map(|span| span.tokens).sum();
        let (samples, decode_rows) = (rows.len() as u32, decode_rows as u32);
        let shape = StepShape { decode_rows, prefill_rows: samples - decode_rows, tokens, samples };
        let mut words = zeroed_words(&layout);
        let header = Header { rows: shape.rows(), tokens, samples: shape.samples, ..Header::default() };
        words[..16].copy_from_slice(bytemuck::cast_slice(&[header]));
        words[layout.rows..][..rows.len() * ROW_WORDS].copy_from_slice(bytemuck::cast_slice(&rows));

        let (width, seed) = (self.width(), self.numbers.seed);
        let places: Vec<_> = spans
            .iter()
            .flat_map(|span| {
                (span.position..span.position + span.tokens).map(|position| (span.slot, position))
            })
            .collect();
        let query = |(slot, position): (u32, u32)| (0..width).map(move |i| value(seed, 0, slot, position, i));
        let q: Vec<bf16> = places.into_par_iter().flat_map_iter(query).collect();
        let cuda = &mut self.cuda;
        let batch = cuda.alloc(Purpose::Scratch, Element::Word, words.len()).unwrap();
        let q_buffer = cuda.alloc(Purpose::Scratch, Element::Activation, q.len()).unwrap();
        upload(cuda, bytemuck::cast_slice(&q), q_buffer);
        // A token more, to see that nobody writes there.
        let poison = vec![NAN; q.len() + width];
        let out = cuda.alloc(Purpose::Scratch, Element::Activation, poison.len()).unwrap();
        let step = Step {
            shape,
            batch,
            layout,
            page_table: self.table,
            table_width: self.limits.table_width(),
            page_size: self.limits.page_size,
            token_pool: self.table,
            slots: self.table,
            rules: self.table,
            history: self.table,
            masks: self.table,
        };
        let whole: &[Part] = &[Part::Whole];
        let halves = if shape.is_decode() { &[Part::First, Part::Second] } else { whole };
        let mut results = [whole, halves].map(|parts| {
            self.attention.plan(shape, parts.len() > 1, &rows, &mut words[layout.plan..][..plan_words]);
            upload(cuda, &words, batch);
            upload(cuda, bytemuck::cast_slice(&poison), out);
            if let Some(pages) = self.pages.as_ref().filter(|_| shape.prefill_rows > 0) {
                pages.widen(cuda.launcher(), &step, true, self.kv).unwrap();
            }
            for part in parts {
                self.attention.attend(cuda.launcher(), &step, *part, q_buffer, self.kv, out).unwrap();
            }
            let mut pinned = cuda.alloc_pinned(poison.len() / 2).unwrap();
            cuda.download(Queue::Compute, out, poison.len() / 2, &mut pinned).unwrap();
            bytemuck::cast_slice::<u32, bf16>(cuda.words(&pinned).unwrap()).to_vec()
        });
        assert!(bits(&results[0]) == bits(&results[1]), "run again, a decode step as two halves");
        let mut result = std::mem::take(&mut results[0]);
        assert!(result.split_off(q.len()).iter().all(|x| x.is_nan()), "written behind the last token");
        result
    }

    fn prefill(&mut self, spans: &[Span]) -> Vec<bf16> {
        self.run(0, spans)
    }

    fn decode(&mut self, slots_and_lengths: impl Iterator<Item = (u32, u32)>) -> Vec<bf16> {
        let spans: Vec<_> =
            slots_and_lengths.map(|(slot, length)| Span { slot, position: length - 1, tokens: 1 }).collect();
        self.run(spans.len(), &spans)
    }

    /// Compares tokens of a step's result, at most `samples` of them, with float64.
    fn check(&self, spans: &[Span], result: &[bf16], samples: usize) {
        let tokens: Vec<_> = spans
            .iter()
            .flat_map(|span| (0..span.tokens).map(|i| (span.slot, span.position + i)))
            .zip(result.chunks_exact(self.width()))
            .collect();
        assert_eq!(tokens.len() * self.width(), result.len());
        assert!(result.iter().all(|x| x.is_finite()), "not written, or not finite: {}", first_bad(&tokens));
        let every = tokens.len().div_ceil(samples);
        let numbers = self.numbers;
        let offset = splitmix64(numbers.seed) as usize % every;
        let ends = [tokens.first().unwrap(), tokens.last().unwrap()];
        let some: Vec<_> = tokens.iter().skip(offset).step_by(every).chain(ends).collect();
        some.into_par_iter().for_each(|((slot, position), out)| {
            let dim = numbers.heads.head_dim;
            for head in 0..numbers.heads.kv_heads * numbers.heads.group {
                let error =
                    relative_error(&numbers.reference(*slot, *position, head), &out[head * dim..][..dim]);
                assert!(error < ERROR_MAX, "slot {slot}, position {position}, head {head}: error {error}");
            }
        });
    }
}

fn first_bad(tokens: &[((u32, u32), &[bf16])]) -> String {
    let bad = tokens.iter().find_map(|((slot, position), out)| {
        let element = out.iter().position(|x| !x.is_finite())?;
        Some(format!("slot {slot}, position {position}, element {element}"))
    });
    bad.unwrap_or_default()
}

fn relative_error(expected: &[f64], got: &[bf16]) -> f64 {
    let norm: f64 = expected.iter().map(|x| x * x).sum();
    let difference: f64 = expected.iter().zip(got).map(|(x, y)| (x - y.to_f64()).powi(2)).sum();
    (difference / norm).sqrt()
}

fn rows_of(spans: &[Span]) -> Vec<Row> {
    let mut first_token = 0;
    let row = |span: &Span| {
        let &Span { slot, position, tokens } = span;
        first_token += tokens;
        let first_token = first_token - tokens;
        Row { slot, first_token, tokens, position, kv_len: position + tokens, sampled: 1, ..Row::default() }
    };
    spans.iter().map(row).collect()
}

/// The page table of all slots, pages in random order; the dummy slot's entries name the dummy page.
fn shuffled_table(limits: &Limits, seed: u64, lengths: &[u32]) -> Vec<u32> {
    let mut pages: Vec<u32> = (0..limits.pages).collect();
    pages.sort_by_key(|page| splitmix64(seed.wrapping_add(u64::from(*page))));
    let mut pages = pages.into_iter();
    let width = limits.table_width() as usize;
    // Entries behind a sequence's end are never looked at: they name no page.
    let mut table = vec![u32::MAX; (lengths.len() + 1) * width];
    for (slot, length) in lengths.iter().enumerate() {
        let used = length.div_ceil(limits.page_size) as usize;
        table[slot * width..][..used].fill_with(|| pages.next().unwrap());
    }
    table[lengths.len() * width..].fill(limits.pages);
    table
}

/// What a world's pages of keys (`what` is 1) or values (2) hold.
struct Pages<'a> {
    seed: u64,
    what: u64,
    heads: Heads,
    limits: &'a Limits,
    table: &'a [u32],
    begins: &'a [u32],
    lengths: &'a [u32],
}

impl Pages<'_> {
    /// `[pages + 1, kv_heads, page_size, head_dim]`, chunks of 8 elements swizzled; NaN where no token is.
    fn in_bf16(&self, rounded: bool) -> Vec<bf16> {
        let Heads { kv_heads, head_dim, .. } = self.heads;
        let page_size = self.limits.page_size as usize;
        self.filled(NAN, kv_heads * page_size * head_dim, |page, [head, t], values| {
            let values = if rounded { fp8::meant(&values) } else { values };
            let row = &mut page[(head * page_size + t) * head_dim..][..head_dim];
            for (d, element) in row.iter_mut().enumerate() {
                *element = bf16::from_f32(values[((d / 8) ^ (t & 7)) * 8 + d % 8]);
            }
        })
    }

    /// The same as fp8 has it; scales are NaN where no token is.
    fn in_fp8(&self) -> Vec<u8> {
        let Heads { kv_heads, head_dim, .. } = self.heads;
        let layout = fp8::layout(kv_heads, head_dim, self.limits.page_size);
        let what = if self.what == 1 { What::Keys } else { What::Values };
        self.filled(0xff, layout.page_bytes(), |page, [head, t], values| {
            fp8::put(what, &layout, [0, head, t], &fp8::rounded(&values), page);
        })
    }

    /// All pages of `elements` each; `row` gets those that sequences have, and of each row its head, its place in the page and
    /// its elements. Pages are made side by side.
    fn filled<T: Copy + Send + Sync>(
        &self,
        empty: T,
        elements: usize,
        row: impl Fn(&mut [T], [usize; 2], Vec<f32>) + Sync,
    ) -> Vec<T> {
        let Heads { kv_heads, head_dim, .. } = self.heads;
        let (page_size, width) = (self.limits.page_size, self.limits.table_width() as usize);
        let mut owners = vec![None; self.limits.pages as usize + 1];
        for (slot, length) in self.lengths.iter().enumerate() {
            for entry in 0..length.div_ceil(page_size) {
                owners[self.table[slot * width + entry as usize] as usize] = Some((slot, entry));
            }
        }
        let mut pages = vec![empty; owners.len() * elements];
        pages.par_chunks_mut(elements).zip(owners).for_each(|(page, owner)| {
            let Some((slot, entry)) = owner else { return };
            let first = entry * page_size;
            let (begin, end) = (self.begins[slot].max(first), self.lengths[slot].min(first + page_size));
            for position in begin..end {
                for head in 0..kv_heads {
                    let element = |d| value(self.seed, self.what, slot as u32, position, head * head_dim + d);
                    let values = (0..head_dim).map(|d| element(d).to_f32()).collect();
                    row(page, [head, (position - first) as usize], values);
                }
            }
        });
        pages
    }
}

fn bits(values: &[bf16]) -> Vec<u16> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Random lengths, uniform in 1..=longest.
fn random_lengths(rows: usize, longest: u32) -> Vec<u32> {
    let seed = fresh_seed();
    (0..rows as u64).map(|i| 1 + (splitmix64(seed.wrapping_add(i)) % u64::from(longest)) as u32).collect()
}

fn decode_is_right(kernels: KernelSet, heads: Heads, page_size: u32, lengths: &[u32]) {
    let mut world = World::new(kernels, heads, page_size, lengths);
    let spans: Vec<_> =
        (0..).zip(lengths).map(|(slot, n)| Span { slot, position: n - 1, tokens: 1 }).collect();
    let result = world.run(spans.len(), &spans);
    println!("{heads:?}, page size {page_size}, {} rows", lengths.len());
    world.check(&spans, &result, 64);
}

/// Every head ratio that models have, one that is no power of two, and one beyond a tile's eight columns.
fn head_shapes() -> Vec<Heads> {
    let mut shapes = Vec::new();
    for head_dim in [64, 128] {
        shapes.extend(
            taken([(4, 4), (8, 2), (8, 1), (3, 5), (2, 8), (2, 12)]).map(|(kv_heads, group)| Heads {
                kv_heads,
                group,
                head_dim,
            }),
        );
    }
    shapes
}

const QWEN3: Heads = Heads { kv_heads: 8, group: 2, head_dim: 128 };

#[test]
#[ignore = "needs a GPU"]
fn decode_of_any_length_and_head_ratio_is_right() {
    for kernels in [KernelSet::Auto, KernelSet::Portable] {
        for (i, heads) in head_shapes().into_iter().enumerate() {
            decode_is_right(kernels, heads, [16, 32, 64][i % 3], &LENGTHS);
        }
        for page_size in taken([16, 32, 64]) {
            decode_is_right(kernels, QWEN3, page_size, &LENGTHS);
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn decode_of_one_row_is_right() {
    for kernels in [KernelSet::Auto, KernelSet::Portable] {
        for length in taken(LENGTHS) {
            decode_is_right(kernels, QWEN3, 16, &[length]);
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn decode_of_many_rows_is_right() {
    for kernels in [KernelSet::Auto, KernelSet::Portable] {
        for (rows, longest) in taken([(31, 700), (2, 3000), (255, 300), (256, 1100)]) {
            decode_is_right(kernels, QWEN3, 16, &random_lengths(rows, longest));
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn decode_of_a_long_sequence_is_right() {
    for kernels in [KernelSet::Auto, KernelSet::Portable] {
        decode_is_right(kernels, Heads { kv_heads: 2, group: 8, head_dim: 128 }, 16, &[20_011, 5, 300]);
    }
}

/// The share of a warp grows with the batch, so a row is cut elsewhere each time.
#[test]
#[ignore = "needs a GPU"]
fn a_row_decodes_to_the_same_bits_alone_and_among_255_others() {
    for kernels in [KernelSet::Auto, KernelSet::Portable] {
        for heads in taken([
            QWEN3,
            Heads { kv_heads: 2, group: 5, head_dim: 128 },
            Heads { kv_heads: 4, group: 1, head_dim: 64 },
            Heads { kv_heads: 4, group: 4, head_dim: 64 },
        ]) {
            let mut lengths = random_lengths(256, 600);
            lengths[..LENGTHS.len()].copy_from_slice(&LENGTHS);
            let mut world = World::new(kernels, heads, 16, &lengths);
            let width = world.width();
            let together = world.decode((0..).zip(lengths.iter().copied()));
            for count in [1, 7, 60] {
                for first in [0, 9, 11, 12, 150] {
                    let some = first..first + count;
                    let result = world.decode(some.clone().map(|slot| (slot as u32, lengths[slot])));
                    let expected = &together[some.start * width..some.end * width];
                    assert!(bits(&result) == bits(expected), "{heads:?}: rows {some:?}");
                }
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn padding_rows_harm_nobody() {
    for kernels in [KernelSet::Auto, KernelSet::Portable] {
        let lengths = random_lengths(5, 900);
        let mut world = World::new(kernels, QWEN3, 16, &lengths);
        let alone = world.decode((0..).zip(lengths.iter().copied()));
        // Slot 5 is the dummy, whose page holds NaN here.
        let rows = (0..).zip(lengths.iter().copied()).take(3).chain([(5, 1); 2]);
        let padded = world.decode(rows);
        let used = 3 * world.width();
        assert!(bits(&padded[..used]) == bits(&alone[..used]));
    }
}

/// Decodes the last token of each slot in both worlds; they must agree in every bit.
fn fp8_decodes_as_what_it_means(heads: Heads, page_size: u32, lengths: &[u32], window: u32, begins: &[u32]) {
    let [narrow, wide] = World::in_fp8(heads, page_size, lengths, window, begins)
        .map(|mut world| world.decode((0..).zip(lengths.iter().copied())));
    let label = format!("{heads:?}, page size {page_size}, window {window}, {} rows", lengths.len());
    assert!(wide.iter().all(|x| x.is_finite()), "{label}");
    assert!(bits(&narrow) == bits(&wide), "{label}");
}

#[test]
#[ignore = "needs a GPU"]
fn decode_of_fp8_has_the_bits_of_decode_of_what_fp8_means() {
    for (i, heads) in head_shapes().into_iter().enumerate() {
        let page_size = [16, 32, 64][i % 3];
        fp8_decodes_as_what_it_means(heads, page_size, &LENGTHS, ALL, &[0; LENGTHS.len()]);
        let begins: Vec<u32> = LENGTHS.iter().map(|length| length.saturating_sub(200)).collect();
        fp8_decodes_as_what_it_means(heads, page_size, &LENGTHS, 200, &begins);
    }
    for (rows, longest) in taken([(1, 5000), (31, 700), (2, 3000), (256, 1100)]) {
        let lengths = random_lengths(rows, longest);
        for page_size in [16, 256] {
            fp8_decodes_as_what_it_means(QWEN3, page_size, &lengths, ALL, &vec![0; rows]);
        }
    }
}

/// Prefills in both worlds; they must agree in every bit.
fn fp8_prefills_as_what_it_means(heads: Heads, page_size: u32, spans: &[(u32, u32)], window: u32) {
    let lengths: Vec<u32> = spans.iter().map(|(position, tokens)| position + tokens).collect();
    let begins: Vec<u32> =
        spans.iter().map(|(position, _)| (position + 1_u32).saturating_sub(window)).collect();
    let rows: Vec<_> =
        (0..).zip(spans).map(|(slot, &(position, tokens))| Span { slot, position, tokens }).collect();
    let [narrow, wide] =
        World::in_fp8(heads, page_size, &lengths, window, &begins).map(|mut world| world.prefill(&rows));
    let label = format!("{heads:?}, page size {page_size}, window {window}, {spans:?}");
    assert!(wide.iter().all(|x| x.is_finite()), "{label}");
    assert!(bits(&narrow) == bits(&wide), "{label}");
}

#[test]
#[ignore = "needs a GPU"]
fn prefill_of_fp8_has_the_bits_of_prefill_of_what_fp8_means() {
    let spans = [(0, 300), (16, 100), (100, 28), (127, 2), (128, 130), (300, 512), (1000, 1), (511, 77)];
    for (i, heads) in head_shapes().into_iter().enumerate() {
        fp8_prefills_as_what_it_means(heads, [16, 32, 64][i % 3], &spans, ALL);
        fp8_prefills_as_what_it_means(heads, [64, 16, 256][i % 3], &spans, 200);
    }
    for span in taken([(0, 1), (0, 5000), (9000, 64)]) {
        fp8_prefills_as_what_it_means(QWEN3, 16, &[span], ALL);
    }
}

fn prefill_is_right(kernels: KernelSet, heads: Heads, page_size: u32, spans: &[(u32, u32)]) {
    let lengths: Vec<u32> = spans.iter().map(|(position, tokens)| position + tokens).collect();
    let mut world = World::new(kernels, heads, page_size, &lengths);
    let spans: Vec<_> =
        (0..).zip(spans).map(|(slot, &(position, tokens))| Span { slot, position, tokens }).collect();
    let result = world.prefill(&spans);
    println!("{heads:?}, page size {page_size}, {} rows", spans.len());
    world.check(&spans, &result, 64);
}

#[test]
#[ignore = "needs a GPU"]
fn prefill_of_whole_prompts_chunks_and_prefix_hits_is_right() {
    let whole: Vec<_> = LENGTHS.iter().map(|length| (0, *length)).collect();
    let later = [(1, 1), (16, 100), (100, 28), (127, 2), (128, 130), (300, 512), (1000, 1), (511, 77)];
    for kernels in [KernelSet::Auto, KernelSet::Portable] {
        for (i, heads) in head_shapes().into_iter().enumerate() {
            let page_size = [16, 32, 64][i % 3];
            prefill_is_right(kernels, heads, page_size, &whole[..11]);
            prefill_is_right(kernels, heads, page_size, &later);
        }
        prefill_is_right(kernels, QWEN3, 16, &whole);
        prefill_is_right(kernels, QWEN3, 16, &[(0, 1)]);
    }
}

#[test]
#[ignore = "needs a GPU"]
fn a_prompt_gives_the_same_bits_whole_and_in_chunks() {
    for kernels in [KernelSet::Auto, KernelSet::Portable] {
        for heads in taken([
            QWEN3,
            Heads { kv_heads: 2, group: 5, head_dim: 128 },
            Heads { kv_heads: 2, group: 4, head_dim: 64 },
        ]) {
            let mut world = World::new(kernels, heads, 16, &[1111, 400]);
            let width = world.width();
            let whole = world.prefill(&[Span { slot: 0, position: 0, tokens: 1111 }]);
            for chunk in taken([333, 64, 100, 640]) {
                for position in (0..1111).step_by(chunk) {
                    let tokens = (chunk as u32).min(1111 - position);
                    let other = Span { slot: 1, position: 16, tokens: 370 };
                    let spans = [other, Span { slot: 0, position, tokens }];
                    let result = world.prefill(&spans);
                    let expected = &whole[position as usize * width..][..tokens as usize * width];
                    assert!(
                        bits(&result[370 * width..]) == bits(expected),
                        "{heads:?}: {chunk} from {position}"
                    );
                }
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn a_token_gives_the_same_bits_in_prefill_and_in_decode() {
    for kernels in [KernelSet::Auto, KernelSet::Portable] {
        for heads in head_shapes() {
            let length = LENGTHS[11];
            let mut world = World::new(kernels, heads, 16, &[length]);
            let width = world.width();
            let prefilled = world.prefill(&[Span { slot: 0, position: 0, tokens: length }]);
            for position in LENGTHS.iter().map(|n| n - 1).filter(|position| *position < length) {
                let decoded = world.decode([(0, position + 1)].into_iter());
                let expected = &prefilled[position as usize * width..][..width];
                assert!(bits(&decoded) == bits(expected), "{heads:?}: position {position}");
            }
        }
    }
}

/// Lengths around the ends of spans, and of many of them: decode cuts few rows into pieces and leaves many whole, prefill of few
/// tokens is split, and that of a whole prompt is not.
#[test]
#[ignore = "needs a GPU"]
fn tokens_of_long_sequences_give_the_same_bits_in_every_way() {
    for kernels in [KernelSet::Auto, KernelSet::Portable] {
        for (heads, window) in taken([
            (QWEN3, ALL),
            (Heads { kv_heads: 2, group: 5, head_dim: 128 }, 5000),
            (Heads { kv_heads: 4, group: 4, head_dim: 64 }, ALL),
        ]) {
            let slots = [&[9_000, 9_000, 4_200][..], &[1; 297]].concat(); // places for many rows
            let mut world = World::windowed(kernels, heads, 16, &slots, window, &vec![0; slots.len()]);
            let width = world.width();
            let whole = world.prefill(&[Span { slot: 0, position: 0, tokens: 9_000 }]);
            let expected = |position: u32, tokens: u32| {
                bits(&whole[position as usize * width..][..tokens as usize * width])
            };
            world.check(&[Span { slot: 0, position: 0, tokens: 9_000 }], &whole, 16);
            for (position, tokens) in
                [(2_000, 100), (2_047, 1), (4_000, 300), (8_190, 64), (8_191, 300), (6_144, 1)]
            {
                let span = Span { slot: 0, position, tokens };
                for _ in 0..2 {
                    let alone = world.prefill(&[span]);
                    assert!(bits(&alone) == expected(position, tokens), "{heads:?}: {span:?} alone");
                }
                let other = Span { slot: 2, position: 4_000, tokens: 200 };
                let mixed = world
                    .run(2, &[Span { tokens: 1, ..span }, Span { slot: 1, tokens: 1, ..span }, other, span]);
                assert!(bits(&mixed[..width]) == expected(position, 1), "{heads:?}: {span:?} decodes");
                assert!(
                    bits(&mixed[202 * width..]) == expected(position, tokens),
                    "{heads:?}: {span:?} beside others"
                );
            }
            let lengths = [2_048, 2_049, 4_096, 6_143, 8_192, 8_193, 9_000];
            for length in lengths {
                let decoded = world.decode([(0, length)].into_iter());
                assert!(bits(&decoded) == expected(length - 1, 1), "{heads:?}: {length} tokens");
            }
            let many = world.decode((0..slots.len()).map(|row| (0, lengths[row % lengths.len()])));
            for (row, decoded) in many.chunks(width).enumerate() {
                let length = lengths[row % lengths.len()];
                assert!(bits(decoded) == expected(length - 1, 1), "{heads:?}: {length} tokens in row {row}");
            }
        }
    }
}

/// Both kinds of rows share the step's plan words and queries, and each kernel counts turns of its own; the steps come twice,
/// so that a count that is not back at zero shows.
#[test]
#[ignore = "needs a GPU"]
fn rows_give_the_same_bits_in_a_mixed_step_and_in_steps_of_their_own() {
    let chunks = [(0, 300), (100, 28), (128, 130), (1000, 1), (511, 77), (0, 1), (300, 512)];
    for kernels in [KernelSet::Auto, KernelSet::Portable] {
        for (heads, window) in
            taken([(QWEN3, ALL), (Heads { kv_heads: 3, group: 3, head_dim: 64 }, ALL), (QWEN3, 200)])
        {
            for decode_rows in [1, 9, 70] {
                let mut lengths = random_lengths(decode_rows, 1500);
                lengths.extend(chunks.iter().map(|(position, tokens)| position + tokens));
                let begins = vec![0; lengths.len()];
                let mut world = World::windowed(kernels, heads, 16, &lengths, window, &begins);
                let split = decode_rows * world.width();
                let decoding = (0..).zip(&lengths[..decode_rows]);
                let decoding: Vec<_> =
                    decoding.map(|(slot, n)| Span { slot, position: n - 1, tokens: 1 }).collect();
                let prefilling: Vec<_> = (decode_rows as u32..)
                    .zip(chunks)
                    .map(|(slot, (position, tokens))| Span { slot, position, tokens })
                    .collect();
                let (alone, prompts) = (world.run(decode_rows, &decoding), world.prefill(&prefilling));
                for _ in 0..2 {
                    let mixed = world.run(decode_rows, &[&decoding[..], &prefilling].concat());
                    assert!(bits(&mixed[..split]) == bits(&alone), "{heads:?}: {decode_rows} decode rows");
                    assert!(bits(&mixed[split..]) == bits(&prompts), "beside {decode_rows} decode rows");
                }
            }
        }
    }
}

/// Windows within a tile, across tiles, a leaf and pages; and wider than most sequences.
const WINDOWS: [u32; 7] = [1, 31, 32, 128, 200, 700, 4096];
/// One of each decode kernel that knows windows.
const WINDOWED: [Heads; 3] =
    [QWEN3, Heads { kv_heads: 3, group: 3, head_dim: 64 }, Heads { kv_heads: 4, group: 4, head_dim: 64 }];

/// What lies before the window is NaN, as it may be once its page is somebody else's.
#[test]
#[ignore = "needs a GPU"]
fn decode_sees_its_window_alone() {
    for kernels in [KernelSet::Auto, KernelSet::Portable] {
        for (i, window) in taken(WINDOWS).enumerate() {
            let heads = WINDOWED[i % WINDOWED.len()];
            for lengths in [LENGTHS.to_vec(), random_lengths(70, 1500), vec![2047]] {
                let begins: Vec<u32> = lengths.iter().map(|length| length.saturating_sub(window)).collect();
                let mut world = World::windowed(kernels, heads, [16, 64][i % 2], &lengths, window, &begins);
                let spans: Vec<_> =
                    (0..).zip(&lengths).map(|(slot, n)| Span { slot, position: n - 1, tokens: 1 }).collect();
                let result = world.run(spans.len(), &spans);
                println!("window {window}, {heads:?}, {} rows", lengths.len());
                world.check(&spans, &result, 64);
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn prefill_sees_its_windows_alone() {
    let spans = [(0, 300), (1, 1), (300, 512), (1000, 1), (511, 77), (900, 300), (128, 128), (40, 1)];
    for kernels in [KernelSet::Auto, KernelSet::Portable] {
        for (i, window) in taken(WINDOWS).enumerate() {
            let heads = WINDOWED[i % WINDOWED.len()];
            let lengths: Vec<u32> = spans.iter().map(|(position, tokens)| position + tokens).collect();
            let begins: Vec<u32> =
                spans.iter().map(|(position, _)| (position + 1_u32).saturating_sub(window)).collect();
            let mut world = World::windowed(kernels, heads, [16, 64][i % 2], &lengths, window, &begins);
            let spans: Vec<_> =
                (0..).zip(spans).map(|(slot, (position, tokens))| Span { slot, position, tokens }).collect();
            let result = world.prefill(&spans);
            println!("window {window}, {heads:?}");
            world.check(&spans, &result, 64);
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn with_a_window_a_token_gives_the_same_bits_in_prefill_and_in_decode_alone_and_among_others() {
    for kernels in [KernelSet::Auto, KernelSet::Portable] {
        for window in taken(WINDOWS) {
            let lengths = [1000, 70, 333];
            let mut world = World::windowed(kernels, QWEN3, 16, &lengths, window, &[0; 3]);
            let width = world.width();
            let prefilled = world.prefill(&[Span { slot: 0, position: 0, tokens: 1000 }]);
            for position in LENGTHS.iter().map(|n| n - 1).filter(|position| *position < 1000) {
                let expected = &prefilled[position as usize * width..][..width];
                let alone = world.decode([(0, position + 1)].into_iter());
                assert!(bits(&alone) == bits(expected), "window {window}: position {position} alone");
                let beside = world.decode([(1, 70), (0, position + 1), (2, 333)].into_iter());
                assert!(
                    bits(&beside[width..2 * width]) == bits(expected),
                    "window {window}: position {position}"
                );
            }
            for chunk in [100, 640] {
                let span = Span { slot: 0, position: chunk, tokens: 333 };
                let result = world.prefill(&[span]);
                let expected = &prefilled[chunk as usize * width..][..333 * width];
                assert!(bits(&result) == bits(expected), "window {window}: from {chunk}");
            }
        }
    }
}
