//! Products with matrices in fp8 against those with the bf16 numbers that these mean, bit by bit: few tokens and many, matrices
//! whose rows and columns fill no tile, scales of every form that checkpoints have.

#[path = "support/products.rs"]
mod products;
mod support;

use std::sync::Arc;

use bytemuck::cast_slice;
use half::bf16;
use minisgl_core::backend::{Device, Element, WeightRole};
use minisgl_core::batch::Token;
use minisgl_core::fp8;
use minisgl_core::spec::Inputs;
use minisgl_core::tensor::{Dtype, HostTensor, Scales, TensorData};
use minisgl_cuda::ops::gemm::{GateUp, Qkv, RankSums, Residual, Rows, SmShare};
use minisgl_cuda::{Address, Buffer, Weight};
use products::Gpu;
use support::taken;

/// Both sides of every tile's tokens, and of where matrices are widened in memory.
const TOKENS: [u32; 16] = [1, 2, 8, 16, 17, 32, 33, 64, 65, 128, 129, 192, 193, 256, 257, 1000];
const TOKENS_MAX: usize = 1000;

fn gpu() -> Gpu {
    let mut gpu = Gpu::new();
    gpu.gemm.reserve_fp8(&mut gpu.cuda, 64 << 20).unwrap();
    gpu
}

/// A matrix of random codes, none of which is no number, and the same in bf16.
fn matrix(gpu: &mut Gpu, role: WeightRole, [rows, cols]: [usize; 2], block: [usize; 2]) -> [Weight; 2] {
    let codes: Vec<u8> = (0..rows * cols)
        .map(|_| gpu.next() as u8)
        .map(|code| if code & 0x7f == fp8::NAN { code ^ 1 } else { code })
        .collect();
    let scales = rows.div_ceil(block[0]) * cols.div_ceil(block[1]);
    let values: Vec<f32> =
        (0..scales).map(|_| 1e-4 + (gpu.next() >> 40) as f32 / (1 << 24) as f32 * 1e-2).collect();
    let meant: Vec<u8> = (0..rows * cols)
        .flat_map(|i| {
            let scale = values[i / cols / block[0] * cols.div_ceil(block[1]) + i % cols / block[1]];
            bf16::from_f32(fp8::decode(codes[i]) * bf16::from_f32(scale).to_f32()).to_le_bytes()
        })
        .collect();
    let (range, wide_range) = (0..codes.len(), 0..meant.len());
    let scales = Scales { values, block, inputs: Inputs::Plain, input_scale: None };
    let narrow = TensorData::Fp8 { owner: Arc::new(codes), range, scales: Arc::new(scales) };
    let wide = TensorData::Bytes { owner: Arc::new(meant), range: wide_range, dtype: Dtype::Bf16 };
    [narrow, wide].map(|data| {
        let tensor = HostTensor { name: "w".into(), rows, cols, data };
        gpu.cuda.load_weight(role, &[tensor]).unwrap()
    })
}

/// What a product writes, by both matrices; they must agree in every bit, and something finite must be there.
fn agree(gpu: &mut Gpu, label: &str, mut run: impl FnMut(&mut Gpu, usize, u32) -> Vec<u32>) {
    for tokens in taken(TOKENS) {
        let [narrow, wide] = [0, 1].map(|which| run(gpu, which, tokens));
        let differ = narrow.iter().zip(&wide).filter(|(a, b)| a != b).count();
        assert_eq!(differ, 0, "{label}, {tokens} tokens: words of {} that differ", wide.len());
        let half = |word: &u32| [*word as u16, (*word >> 16) as u16];
        let written = wide.iter().flat_map(half).filter(|bits| bf16::from_bits(*bits).is_finite()).count();
        assert!(written > tokens as usize, "{label}, {tokens} tokens: nothing finite is written");
    }
}

/// Scales of a row, of tiles, and of 128 columns of a row.
const BLOCKS: [[usize; 2]; 3] = [[1, 1 << 20], [128, 128], [1, 128]];

#[test]
#[ignore = "needs a GPU"]
fn rows_that_are_added_have_the_bits_of_what_fp8_means() {
    let gpu = &mut gpu();
    for (i, (rows, cols)) in
        taken([(192, 320), (64, 64), (1000, 1096), (1024, 3072), (4096, 4096), (4096, 7000)]).enumerate()
    {
        let both = matrix(gpu, WeightRole::Linear, [rows, cols], BLOCKS[i % 3]);
        let x = gpu.activations(TOKENS_MAX * cols);
        let before = gpu.activations(TOKENS_MAX * rows);
        let before = gpu.download(before);
        agree(gpu, &format!("residual {rows}x{cols}"), |gpu, which, tokens| {
            let residual = gpu.upload(Element::Activation, &before);
            let sumsq = gpu.upload(Element::Float, &vec![f32::NAN; TOKENS_MAX * rows.div_ceil(64)]);
            let added = Residual { residual: residual.address(), sumsq: sumsq.address() };
            launch(gpu, both[which], x, tokens, &added);
            [gpu.download(residual), gpu.download(sumsq)].concat()
        });
    }
}

#[test]
#[ignore = "needs a GPU"]
fn ranks_sums_have_the_bits_of_what_fp8_means() {
    let gpu = &mut gpu();
    for (i, (rows, cols, slices)) in
        taken([(192, 320, 2), (64, 64, 1), (1000, 1096, 2), (1024, 1536, 1), (4096, 2048, 2)]).enumerate()
    {
        let both = matrix(gpu, WeightRole::Sliced(slices), [rows, cols], BLOCKS[i % 3]);
        let x = gpu.activations(TOKENS_MAX * cols);
        agree(gpu, &format!("sums {rows}x{cols}"), |gpu, which, tokens| {
            let out = gpu.upload(Element::Float, &vec![f32::NAN; TOKENS_MAX * rows.next_multiple_of(64)]);
            launch(gpu, both[which], x, tokens, &RankSums::here(out.address()));
            gpu.download(out)
        });
    }
}

#[test]
#[ignore = "needs a GPU"]
fn gates_and_ups_have_the_bits_of_what_fp8_means() {
    let gpu = &mut gpu();
    for (i, (intermediate, cols)) in
        taken([(320, 192), (32, 64), (3072, 1024), (3000, 1096), (6144, 4096)]).enumerate()
    {
        let both = matrix(gpu, WeightRole::GateUp, [2 * intermediate, cols], BLOCKS[i % 3]);
        let x = gpu.activations(TOKENS_MAX * cols);
        let norm = gpu.norm(TOKENS_MAX, cols).0;
        agree(gpu, &format!("gate and up {intermediate}x{cols}"), |gpu, which, tokens| {
            let out = gpu.upload(Element::Activation, &vec![u32::MAX; TOKENS_MAX * intermediate / 2]);
            let intermediate = intermediate as u32;
            launch(
                gpu,
                both[which],
                x,
                tokens,
                &GateUp { norm, out: out.address(), intermediate, reserved: 0 },
            );
            gpu.download(out)
        });
    }
}

#[test]
#[ignore = "needs a GPU"]
fn queries_keys_and_values_have_the_bits_of_what_fp8_means() {
    let gpu = &mut gpu();
    for (i, (heads, kv_heads, head_dim, cols)) in
        taken([(2, 2, 128, 320), (3, 1, 64, 192), (16, 8, 128, 1024), (32, 4, 128, 2048), (32, 8, 128, 4096)])
            .enumerate()
    {
        let rows = (heads + 2 * kv_heads) * head_dim;
        let both = matrix(gpu, WeightRole::Linear, [rows, cols], BLOCKS[i % 3]);
        let x = gpu.activations(TOKENS_MAX * cols);
        let (norms, biases) = (gpu.activations(2 * head_dim), gpu.activations(rows));
        let rope = gpu.upload(Element::Float, &vec![0.6f32; 64 * head_dim]);
        let token = |i: u32| Token { id: 0, slot: 0, position: i % 64, location: i };
        let tokens: Vec<Token> = (0..TOKENS_MAX as u32).map(token).collect();
        let batch = gpu.upload(Element::Word, cast_slice::<Token, u32>(&tokens));
        let norm = gpu.norm(TOKENS_MAX, cols).0;
        for normed in [false, true] {
            let given = |address: Address| if normed { address } else { Address::NULL };
            agree(gpu, &format!("qkv {rows}x{cols}"), |gpu, which, tokens| {
                let mut out = |heads: usize| {
                    gpu.upload(Element::Activation, &vec![u32::MAX; 1024 * heads * head_dim / 2])
                };
                let [q, k, v] = [out(heads), out(kv_heads), out(kv_heads)];
                let epilogue = Qkv {
                    norm,
                    head_eps: 1e-6,
                    batch: batch.address(),
                    bias: if normed { Address::NULL } else { biases.address() },
                    q_norm: given(norms.address()),
                    k_norm: given(norms.address().offset(2 * head_dim)),
                    rope: given(rope.address()),
                    q: q.address(),
                    k: k.address(),
                    v: v.address(),
                    tokens_offset: 0,
                    heads: heads as u32,
                    kv_heads: kv_heads as u32,
                    head_dim: head_dim as u32,
                    page_shift: 4,
                    fp8: 0,
                };
                launch(gpu, both[which], x, tokens, &epilogue);
                [q, k, v].map(|out| gpu.download(out)).concat()
            });
        }
    }
}

fn launch<E: minisgl_cuda::ops::gemm::Epilogue>(
    gpu: &mut Gpu,
    w: Weight,
    x: Buffer,
    tokens: u32,
    epilogue: &E,
) {
    let x = Rows { address: x.address(), there: (x.elements() / w.cols()) as u32 };
    gpu.gemm.launch(gpu.cuda.launcher(), w, x, tokens, SmShare::Whole, epilogue).unwrap();
    gpu.cuda.synchronize().unwrap();
}
