//! Slots whose queries, keys and values are functions of (slot, position), so that any step over them can be made and judged.
//!
//! Pages are shuffled; whatever no sequence holds is NaN, and so is the output beforehand.

use std::time::{SystemTime, UNIX_EPOCH};

use half::bf16;
use minisgl_core::backend::{Device, Dims, Element, KvLayer, Purpose, Queue, Step};
use minisgl_core::batch::{Header, Layout, ROW_WORDS, Row, StepShape, zeroed_words};
use minisgl_core::config::Limits;
use minisgl_core::kv::{KvFormat, KvLayout};
use minisgl_core::tensor::splitmix64;
use minisgl_cuda::ops::attention::Attention;
use minisgl_cuda::ops::fp8_pages::Fp8Pages;
use minisgl_cuda::ops::halves::{Division, Part};
use minisgl_cuda::{Buffer, Cuda, KernelSet, Options};
use rayon::prelude::*;

use super::fp8::{self, What};

/// bf16 has 8 bits: rounding the output and each probability costs at most 2^-9 of it each, about half of that in the
/// mean over a head's elements; f32 sums and exponentials are far below.
pub const ERROR_MAX: f64 = 1.0 / 256.0;

/// Lengths around tiles, pages and leaves.
pub const LENGTHS: [u32; 13] = [1, 15, 16, 17, 63, 127, 128, 129, 255, 256, 257, 1000, 2047];

pub const NAN: bf16 = bf16::NAN;

#[derive(Clone, Copy, Debug)]
pub struct Heads {
    pub kv_heads: usize,
    pub group: usize,
    pub head_dim: usize,
}

/// No window: all positions up to a token's own.
pub const ALL: u32 = u32::MAX;

impl Heads {
    /// Elements of a token's queries, all heads.
    pub fn width(self) -> usize {
        self.kv_heads * self.group * self.head_dim
    }
}

/// `tokens` tokens of a slot from `position` on.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    pub slot: u32,
    pub position: u32,
    pub tokens: u32,
}

/// The kernels that attend, and what keys and values are kept as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    pub kernels: KernelSet,
    pub kept: KvFormat,
}

/// All that there are: those of bf16, and Hopper's of fp8.
pub const KINDS: [Kind; 3] = [
    Kind { kernels: KernelSet::Auto, kept: KvFormat::Bf16 },
    Kind { kernels: KernelSet::Portable, kept: KvFormat::Bf16 },
    Kind { kernels: KernelSet::Auto, kept: KvFormat::Fp8 },
];

/// The numbers of a world.
#[derive(Clone, Copy, Debug)]
pub struct Numbers {
    pub seed: u64,
    pub kept: KvFormat,
    pub heads: Heads,
    /// Positions that a token sees.
    pub window: u32,
}

pub struct World {
    pub cuda: Cuda,
    pub attention: Attention,
    /// Where keys and values are fp8.
    pub pages: Option<Fp8Pages>,
    pub numbers: Numbers,
    pub limits: Limits,
    pub table: Buffer,
    pub kv: KvLayer<Buffer>,
}

pub fn fresh_seed() -> u64 {
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    println!("seed {seed}");
    seed
}

/// Uniform, with variance about 1.
pub fn value(seed: u64, what: u64, slot: u32, position: u32, element: usize) -> bf16 {
    let place = splitmix64(seed ^ (what << 60) ^ (u64::from(slot) << 32) ^ u64::from(position));
    let random = splitmix64(place.wrapping_add(element as u64)) >> 40;
    bf16::from_f32((random as f32 / (1 << 24) as f32 - 0.5) * 3.5)
}

pub fn upload(cuda: &mut Cuda, words: &[u32], to: Buffer) {
    let mut pinned = cuda.alloc_pinned(words.len()).unwrap();
    cuda.words_mut(&mut pinned).unwrap().copy_from_slice(words);
    cuda.upload(&mut pinned, 0..words.len(), to).unwrap();
    cuda.synchronize().unwrap();
}

impl Numbers {
    /// softmax(q K^T / sqrt(head_dim)) V over the window in float64.
    pub fn reference(&self, slot: u32, position: u32, head: usize) -> Vec<f64> {
        let Heads { group, head_dim, .. } = self.heads;
        let row = |what, position, head: usize| -> Vec<f64> {
            let element = |d| value(self.seed, what, slot, position, head * head_dim + d).to_f32();
            let row: Vec<f32> = (0..head_dim).map(element).collect();
            let is_plain = what == 0 || self.kept == KvFormat::Bf16;
            let row = if is_plain { row } else { meant_by_fp8(&row) };
            row.into_iter().map(f64::from).collect()
        };
        let query = row(0, position, head);
        let begin = (position + 1).saturating_sub(self.window);
        let scores: Vec<f64> = (begin..=position)
            .map(|t| query.iter().zip(row(1, t, head / group)).map(|(q, k)| q * k).sum::<f64>())
            .map(|score| score / (head_dim as f64).sqrt())
            .collect();
        let max = scores.iter().copied().fold(f64::MIN, f64::max);
        let mut out = vec![0.0; head_dim];
        for (t, score) in scores.iter().enumerate() {
            let p = (score - max).exp();
            out.iter_mut().zip(row(2, begin + t as u32, head / group)).for_each(|(o, v)| *o += p * v);
        }
        let sum: f64 = scores.iter().map(|score| (score - max).exp()).sum();
        out.iter().map(|o| o / sum).collect()
    }
}

/// What a row is once it was kept in fp8.
fn meant_by_fp8(row: &[f32]) -> Vec<f32> {
    let mut meant = vec![0.0; row.len()];
    KvFormat::Fp8.load(fp8::layout(1, row.len(), 1).place(0, 0, 0), &fp8::rounded(row), &mut meant);
    meant
}

impl World {
    /// Slot i has room for, and keys and values of, `lengths[i]` tokens.
    pub fn new(kind: Kind, heads: Heads, page_size: u32, lengths: &[u32]) -> World {
        World::windowed(kind, heads, page_size, lengths, ALL, &vec![0; lengths.len()])
    }

    /// Tokens see a window; of slot i's positions those before `begins[i]` are nobody's any more: they hold NaN.
    pub fn windowed(
        kind: Kind,
        heads: Heads,
        page_size: u32,
        lengths: &[u32],
        window: u32,
        begins: &[u32],
    ) -> World {
        let (Kind { kernels, kept }, seed) = (kind, fresh_seed());
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
        let attention = Attention::new(&mut cuda, &dims, window_of_it, kept, &limits).unwrap();
        let table = shuffled_table(&limits, seed, lengths);
        let table_buffer = cuda.alloc(Purpose::Scratch, Element::Word, table.len()).unwrap();
        upload(&mut cuda, &table, table_buffer);
        let [k, v] = [1, 2].map(|what| {
            let world = Pages { seed, what, heads, limits: &limits, table: &table, begins, lengths };
            let bytes = match kept {
                KvFormat::Fp8 => world.in_fp8(),
                _ => bytemuck::cast_slice(&world.in_bf16()).to_vec(),
            };
            let words: Vec<u32> =
                bytes.as_chunks::<4>().0.iter().map(|four| u32::from_le_bytes(*four)).collect();
            let buffer = cuda.alloc(Purpose::KvCache, Element::Kv, words.len()).unwrap();
            upload(&mut cuda, &words, buffer);
            buffer
        });
        let wide_words = KvLayout::new(KvFormat::Bf16, &dims, page_size).words(pages as usize + 1);
        let poison = vec![u32::MAX; wide_words];
        let wide = (kept == KvFormat::Fp8).then(|| {
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
            numbers: Numbers { seed, kept, heads, window },
            limits,
            table: table_buffer,
            kv: KvLayer { k, v, wide },
        }
    }

    pub fn width(&self) -> usize {
        self.numbers.heads.width()
    }

    /// Runs a step whose first rows are decode rows, one of decode rows alone whole and as two halves, and returns
    /// `[tokens, q_width]`.
    pub fn run(&mut self, decode_rows: usize, spans: &[Span]) -> Vec<bf16> {
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
            let division = if parts.len() > 1 { Division::Rows } else { Division::None };
            self.attention.plan(shape, division, &rows, &mut words[layout.plan..][..plan_words]);
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

    pub fn prefill(&mut self, spans: &[Span]) -> Vec<bf16> {
        self.run(0, spans)
    }

    pub fn decode(&mut self, slots_and_lengths: impl Iterator<Item = (u32, u32)>) -> Vec<bf16> {
        let spans: Vec<_> =
            slots_and_lengths.map(|(slot, length)| Span { slot, position: length - 1, tokens: 1 }).collect();
        self.run(spans.len(), &spans)
    }

    /// Compares tokens of a step's result, at most `samples` of them, with float64.
    pub fn check(&self, spans: &[Span], result: &[bf16], samples: usize) {
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

pub fn first_bad(tokens: &[((u32, u32), &[bf16])]) -> String {
    let bad = tokens.iter().find_map(|((slot, position), out)| {
        let element = out.iter().position(|x| !x.is_finite())?;
        Some(format!("slot {slot}, position {position}, element {element}"))
    });
    bad.unwrap_or_default()
}

pub fn relative_error(expected: &[f64], got: &[bf16]) -> f64 {
    let norm: f64 = expected.iter().map(|x| x * x).sum();
    let difference: f64 = expected.iter().zip(got).map(|(x, y)| (x - y.to_f64()).powi(2)).sum();
    (difference / norm).sqrt()
}

pub fn rows_of(spans: &[Span]) -> Vec<Row> {
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
pub fn shuffled_table(limits: &Limits, seed: u64, lengths: &[u32]) -> Vec<u32> {
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
pub struct Pages<'a> {
    pub seed: u64,
    pub what: u64,
    pub heads: Heads,
    pub limits: &'a Limits,
    pub table: &'a [u32],
    pub begins: &'a [u32],
    pub lengths: &'a [u32],
}

impl Pages<'_> {
    /// `[pages + 1, kv_heads, page_size, head_dim]`, chunks of 8 elements swizzled; NaN where no token is.
    pub fn in_bf16(&self) -> Vec<bf16> {
        let Heads { kv_heads, head_dim, .. } = self.heads;
        let page_size = self.limits.page_size as usize;
        self.filled(NAN, kv_heads * page_size * head_dim, |page, [head, t], values| {
            let row = &mut page[(head * page_size + t) * head_dim..][..head_dim];
            for (d, element) in row.iter_mut().enumerate() {
                *element = bf16::from_f32(values[((d / 8) ^ (t & 7)) * 8 + d % 8]);
            }
        })
    }

    /// The same as fp8 has it; scales are NaN where no token is.
    pub fn in_fp8(&self) -> Vec<u8> {
        let Heads { kv_heads, head_dim, .. } = self.heads;
        let layout = fp8::layout(kv_heads, head_dim, self.limits.page_size);
        let what = if self.what == 1 { What::Keys } else { What::Values };
        self.filled(0xff, layout.page_bytes(), |page, [head, t], values| {
            fp8::put(what, &layout, [0, head, t], &fp8::rounded(&values), page);
        })
    }

    /// All pages of `elements` each; `row` gets those that sequences have, and of each row its head, its place in the page and
    /// its elements. Pages are made side by side.
    pub fn filled<T: Copy + Send + Sync>(
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

pub fn bits(values: &[bf16]) -> Vec<u16> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Random lengths, uniform in 1..=longest.
pub fn random_lengths(rows: usize, longest: u32) -> Vec<u32> {
    let seed = fresh_seed();
    (0..rows as u64).map(|i| 1 + (splitmix64(seed.wrapping_add(i)) % u64::from(longest)) as u32).collect()
}
