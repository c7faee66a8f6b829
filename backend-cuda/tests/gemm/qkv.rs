//! Queries, keys and values: biases, head norms and rope, and their places in pages of bf16 and fp8.

use bytemuck::cast_slice;
use half::{bf16, f16};
use minisgl_core::backend::{Device, Element, KvLayer, Step};
use minisgl_core::batch::{Layout, StepShape, Token};
use minisgl_core::config::Limits;
use minisgl_core::fp8::decode;
use minisgl_core::tensor::splitmix64;
use minisgl_cuda::ops::fp8_pages::Fp8Pages;
use minisgl_cuda::ops::gemm::Qkv;
use minisgl_cuda::{Address, Buffer};

use crate::bench::{BF16, EPS, Gpu, Operands, POISON, TOKENS, bf16_rows, check, without_margin};
use crate::fp8::{self, What};

/// What pages of fp8 hold before.
const POISON_BYTE: u8 = 0x5a;

/// Heads of a decoder's attention.
#[derive(Clone, Copy)]
pub struct Heads {
    pub q: usize,
    pub kv: usize,
    pub dim: usize,
    pub page_size: usize,
}

/// Tokens at random positions, each at a place of its own in the pages.
fn places(gpu: &mut Gpu, tokens: usize, positions: u64, capacity: usize) -> Vec<Token> {
    let mut locations: Vec<u32> = (0..capacity as u32).collect();
    let mut seed = gpu.seed;
    let mut below = |limit: u64| {
        seed = splitmix64(seed);
        seed % limit
    };
    for i in (1..capacity).rev() {
        locations.swap(i, below(i as u64 + 1) as usize);
    }
    let token =
        |i: usize| Token { id: 0, slot: 0, position: below(positions) as u32, location: locations[i] };
    (0..tokens).map(token).collect()
}

/// What happens to q, k and v beside the product.
#[derive(Clone, Copy, Debug)]
pub struct Has {
    pub bias: bool,
    pub norms: bool,
    pub rope: bool,
}

pub const ALL: Has = Has { bias: true, norms: true, rope: true };

pub fn qkv(gpu: &mut Gpu, heads: Heads, cols: usize, has: Has) {
    let Heads { q, kv, dim, page_size } = heads;
    let (tokens_max, positions, words_before) = (TOKENS[TOKENS.len() - 1] as usize, 500, 24);
    let operands = Operands::new(gpu, (q + 2 * kv) * dim, cols);
    let (w, x) = operands.on_device;
    let (_, norm, scales) = operands.norm(gpu);
    let norms: Vec<bf16> =
        gpu.random(2 * dim, 0.5).iter().map(|x| bf16::from_f32(1.0 + x.to_f32())).collect();
    let [q_norm, k_norm] = [0, dim].map(|at| gpu.upload(Element::Activation, &norms[at..at + dim]));
    let biases = gpu.random((q + 2 * kv) * dim, 1.0);
    let bias = gpu.upload(Element::Activation, &biases);
    let given = |has: bool, buffer: Buffer| if has { buffer.address() } else { Address::NULL };
    let angle = |i: usize| (i / (dim / 2)) as f64 * 1e4f64.powf(-((i % (dim / 2)) as f64) / (dim / 2) as f64);
    let angles: Vec<f32> =
        (0..positions * dim / 2).flat_map(|i| [angle(i).cos() as f32, angle(i).sin() as f32]).collect();
    let rope = gpu.upload(Element::Float, &angles);
    let pages = (tokens_max + 100).div_ceil(page_size);
    let places = places(gpu, tokens_max, positions as u64, pages * page_size);
    let mut batch = vec![0u32; words_before];
    batch.extend_from_slice(cast_slice(&places));
    let batch = gpu.upload(Element::Word, &batch);
    let label = format!("qkv {q}+2*{kv} heads of {dim}, pages of {page_size}, {cols} columns, {has:?}");
    let page_elements = pages * kv * page_size * dim;
    let run = |gpu: &mut Gpu, tokens: u32| {
        let q_out = gpu.poisoned(tokens as usize * q * dim);
        let (k_out, v_out) = (gpu.poisoned(page_elements), gpu.poisoned(page_elements));
        let epilogue = Qkv {
            norm,
            head_eps: EPS,
            batch: batch.address(),
            bias: given(has.bias, bias),
            q_norm: given(has.norms, q_norm),
            k_norm: given(has.norms, k_norm),
            rope: given(has.rope, rope),
            q: q_out.address(),
            k: k_out.address(),
            v: v_out.address(),
            tokens_offset: words_before as u32,
            heads: q as u32,
            kv_heads: kv as u32,
            head_dim: dim as u32,
            page_shift: page_size.trailing_zeros(),
            fp8: 0,
        };
        gpu.launch(w, x, tokens, &epilogue);
        let in_fp8 = gpu.cuda.properties().hopper;
        let layout = fp8::layout(kv, dim, page_size as u32);
        let empty = vec![POISON_BYTE; pages * layout.page_bytes()];
        let [k_fp8, v_fp8] = [(); 2].map(|()| gpu.upload(Element::Word, &empty));
        let [k_wide, v_wide] = [(); 2].map(|()| gpu.poisoned(page_elements));
        let keeps_fp8 = gpu.gemm.keeps_fp8(w, tokens, gpu.share);
        if in_fp8 && keeps_fp8 {
            let (k, v) = (k_fp8.address(), v_fp8.address());
            gpu.launch(w, x, tokens, &Qkv { k, v, fp8: 1, ..epilogue });
        } else if in_fp8 {
            let (k, v) = (k_wide.address(), v_wide.address());
            gpu.launch(w, x, tokens, &Qkv { k, v, ..epilogue });
            let kv = KvLayer { k: k_fp8, v: v_fp8, wide: Some([k_wide, v_wide]) };
            encode(gpu, heads, batch, words_before, tokens, kv);
        }
        let queries = without_margin(gpu.download(q_out), tokens as usize * q * dim, &label);
        let mut out = bf16_rows(&queries, q * dim);
        for (what, pages, narrow, wide) in
            [(What::Keys, k_out, k_fp8, k_wide), (What::Values, v_out, v_fp8, v_wide)]
        {
            let pages = without_margin(gpu.download(pages), page_elements, &label);
            let written = pages.iter().filter(|bits| **bits != POISON).count();
            assert_eq!(written, tokens as usize * kv * dim, "{label}, {tokens} tokens: values in pages");
            let mut expected = empty.clone();
            for (t, row) in out.iter_mut().enumerate() {
                let location = places[t].location as usize;
                let kept = kept(&pages, heads, location, bf16_of);
                for (head, kept) in kept.chunks_exact(dim).enumerate() {
                    let place = [location / page_size, head, location % page_size];
                    fp8::put(what, &layout, place, &fp8::rounded(kept), &mut expected);
                }
                row.extend(kept);
            }
            if in_fp8 {
                let narrow: Vec<u8> = gpu.download(narrow);
                assert!(narrow == expected, "{label}, {tokens} tokens: {what:?} in fp8");
            }
            if in_fp8 && !keeps_fp8 {
                let wide = without_margin(gpu.download(wide), page_elements, &label);
                for (t, place) in places[..tokens as usize].iter().enumerate() {
                    let location = place.location as usize;
                    let rows = self::kept(&pages, heads, location, bf16_of);
                    let codes: Vec<f32> = rows.chunks_exact(dim).flat_map(codes_of).collect();
                    let widened = self::kept(&wide, heads, location, f16_of);
                    assert!(widened == codes, "{label}, {tokens} tokens: {what:?} of token {t} widened");
                }
            }
        }
        out
    };
    let rotated = |t: usize| rope_row(&angles, places[t].position as usize, dim);
    let expected = |t: usize| {
        let added = |i: usize| if has.bias { f64::from(biases[i]) } else { 0.0 };
        let y: Vec<f64> =
            operands.product(t).iter().enumerate().map(|(i, y)| y * scales[t] + added(i)).collect();
        let head = |(h, y): (usize, &[f64])| {
            if h >= q + kv {
                return y.to_vec();
            }
            let norm = if h < q { &norms[..dim] } else { &norms[dim..] };
            let y = if has.norms { normed(y, norm) } else { y.to_vec() };
            if has.rope { turned(&y, &rotated(t)) } else { y }
        };
        y.chunks_exact(dim).enumerate().flat_map(head).collect()
    };
    check(gpu, &label, BF16, run, expected);
}

/// A token's `[kv, dim]` values in pages, whose 16-byte chunks are permuted within each row.
fn kept(pages: &[u16], heads: Heads, location: usize, number: fn(u16) -> f32) -> Vec<f32> {
    let Heads { kv, dim, page_size, .. } = heads;
    let (page, row) = (location / page_size, location % page_size);
    let value = |i: usize| {
        let (head, d) = (i / dim, i % dim);
        let line = (page * kv + head) * page_size + row;
        number(pages[line * dim + ((d / 8) ^ (row % 8)) * 8 + d % 8])
    };
    (0..kv * dim).map(value).collect()
}

/// The numbers that a row's codes are.
fn codes_of(row: &[f32]) -> Vec<f32> {
    fp8::rounded(row)[..row.len()].iter().map(|code| decode(*code)).collect()
}

fn bf16_of(bits: u16) -> f32 {
    bf16::from_bits(bits).to_f32()
}

fn f16_of(bits: u16) -> f32 {
    f16::from_bits(bits).to_f32()
}

fn rope_row(angles: &[f32], position: usize, dim: usize) -> Vec<(f64, f64)> {
    let row = &angles[position * dim..][..dim];
    row.chunks_exact(2).map(|pair| (f64::from(pair[0]), f64::from(pair[1]))).collect()
}

fn normed(x: &[f64], weight: &[bf16]) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let scale = (mean + f64::from(EPS)).sqrt().recip();
    x.iter().zip(weight).map(|(x, w)| x * scale * f64::from(*w)).collect()
}

/// Dims d and d + dim / 2 turned by the angle of d.
fn turned(x: &[f64], turns: &[(f64, f64)]) -> Vec<f64> {
    let half = x.len() / 2;
    let dim = |d: usize| {
        let (cos, sin) = turns[d % half];
        if d < half { x[d] * cos - x[d + half] * sin } else { x[d] * cos + x[d - half] * sin }
    };
    (0..x.len()).map(dim).collect()
}

/// Encodes the rows of the batch's tokens, which begin at word `at`.
fn encode(gpu: &mut Gpu, heads: Heads, batch: Buffer, at: usize, tokens: u32, kv: KvLayer<Buffer>) {
    let limits = Limits {
        running: 1,
        queued: 1,
        sequence: 16,
        prefill_tokens: 16,
        page_size: heads.page_size as u32,
        pages: 1,
        graph_rows: 0,
    };
    let step = Step {
        shape: StepShape { decode_rows: 0, prefill_rows: 1, tokens, samples: 1 },
        batch,
        layout: Layout { tokens: at, ..Layout::new(&limits, 0) },
        page_table: batch,
        table_width: 1,
        page_size: heads.page_size as u32,
        token_pool: batch,
        slots: batch,
        rules: batch,
        history: batch,
        masks: batch,
    };
    let dims = fp8::dims(heads.kv, heads.dim);
    let pages = Fp8Pages::new(gpu.cuda.modules(), &dims, None).unwrap();
    pages.encode(gpu.cuda.launcher(), &step, 0..tokens, kv).unwrap();
    gpu.cuda.synchronize().unwrap();
}
