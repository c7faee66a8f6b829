//! Normed rows times gate and up.

use half::bf16;
use minisgl_cuda::ops::gemm::GateUp;

use crate::bench::{BF16, Gpu, Operands, bf16_rows, check, without_margin};

pub fn gate_up(gpu: &mut Gpu, intermediate: usize, cols: usize) {
    // As the loader stores them: 8 gates, their 8 ups, and zeros up to a multiple of 128 rows.
    let stored = (intermediate * 2).next_multiple_of(128);
    let mut operands = Operands::new(gpu, stored, cols);
    operands.w[intermediate * 2 * cols..].fill(bf16::ZERO);
    let w = gpu.weight(&operands.w, stored, cols);
    let x = operands.on_device.1;
    let (_, norm, scales) = operands.norm(gpu);
    let label = format!("gate_up 2x{intermediate}x{cols}");
    let run = |gpu: &mut Gpu, tokens: u32| {
        let out = gpu.poisoned(tokens as usize * intermediate);
        let epilogue = GateUp { norm, out: out.address(), intermediate: intermediate as u32, reserved: 0 };
        gpu.launch(w, x, tokens, &epilogue);
        bf16_rows(&without_margin(gpu.download(out), tokens as usize * intermediate, &label), intermediate)
    };
    let expected = |t: usize| {
        let y = operands.product(t);
        let output = |m: usize| {
            let gate = y[m / 8 * 16 + m % 8] * scales[t];
            gate / (1.0 + (-gate).exp()) * (y[m / 8 * 16 + 8 + m % 8] * scales[t])
        };
        (0..intermediate).map(output).collect()
    };
    check(gpu, &label, BF16, run, expected);
}
