//! Rows and logits as they are.

use half::f16;
use minisgl_cuda::ops::gemm::{Head, Linear};

use crate::bench::{BF16, F16, Gpu, Operands, bf16_rows, check, without_margin};

pub fn linear(gpu: &mut Gpu, rows: usize, cols: usize) {
    let operands = Operands::new(gpu, rows, cols);
    let (w, x) = operands.on_device;
    let label = format!("linear {rows}x{cols}");
    let run = |gpu: &mut Gpu, tokens: u32| {
        let out = gpu.poisoned(tokens as usize * rows);
        gpu.launch(w, x, tokens, &Linear { out: out.address() });
        bf16_rows(&without_margin(gpu.download(out), tokens as usize * rows, &label), rows)
    };
    check(gpu, &label, BF16, run, |t| operands.product(t));
}

pub fn head(gpu: &mut Gpu, rows: usize, cols: usize) {
    let operands = Operands::new(gpu, rows, cols);
    let (w, x) = operands.on_device;
    let label = format!("head {rows}x{cols}");
    let run = |gpu: &mut Gpu, tokens: u32| {
        let out = gpu.poisoned(tokens as usize * rows);
        gpu.launch(w, x, tokens, &Head { out: out.address() });
        let raw = without_margin(gpu.download(out), tokens as usize * rows, &label);
        let value = |bits: &u16| f16::from_bits(*bits).to_f32();
        raw.chunks_exact(rows).map(|row| row.iter().map(value).collect()).collect()
    };
    check(gpu, &label, F16, run, |t| operands.product(t));
}
