//! Matrices of numbers that host and device make alike, each element by its place and a seed.

use std::sync::{Arc, LazyLock};

use half::bf16;
use minisgl_core::backend::WeightRole;
use minisgl_core::fp8;
use minisgl_core::spec::Inputs;
use minisgl_core::tensor::{HostTensor, Scales, TensorData, splitmix64, uniform_element};
use minisgl_cuda::{Cuda, CudaError, Weight};

/// A bf16 matrix of numbers in [-1, 1), made on the device; [`random_element`] gives the same.
pub(crate) fn random(cuda: &mut Cuda, rows: usize, cols: usize, seed: u64) -> Result<Weight, CudaError> {
    random_in(cuda, rows, cols, seed, 1.0)
}

/// A bf16 matrix of numbers in [-max, max), made on the device.
pub(crate) fn random_in(
    cuda: &mut Cuda,
    rows: usize,
    cols: usize,
    seed: u64,
    max: f32,
) -> Result<Weight, CudaError> {
    between(cuda, rows, cols, seed, [-max, max])
}

/// Bytes that do for pages of keys or values in fp8, of which a row has `bytes`: as codes and as scales, in bf16 and in f16, all of
/// them are numbers, for their bf16 numbers lie within 2 and 3.9.
pub(crate) fn random_pages(
    cuda: &mut Cuda,
    pages: usize,
    bytes: usize,
    seed: u64,
) -> Result<Weight, CudaError> {
    between(cuda, pages, bytes / 2, seed, [2.0, 3.9])
}

fn between(
    cuda: &mut Cuda,
    rows: usize,
    cols: usize,
    seed: u64,
    [low, high]: [f32; 2],
) -> Result<Weight, CudaError> {
    let data = TensorData::Uniform { seed, low, high };
    cuda.load_weight(WeightRole::Linear, &[HostTensor { name: "random".into(), rows, cols, data }])
}

/// Numbers in [-1, 1), not on the device yet.
pub(crate) fn random_part(rows: usize, cols: usize, seed: u64) -> HostTensor {
    let data = TensorData::Uniform { seed, low: -1.0, high: 1.0 };
    HostTensor { name: "random".into(), rows, cols, data }
}

/// Element `(row, col)` of a [`random`] matrix.
pub(crate) fn random_element(cols: usize, seed: u64, row: usize, col: usize) -> f64 {
    f64::from(uniform_element(seed, (row * cols + col) as u64, -1.0, 1.0).to_f32())
}

/// Codes of numbers up to 448, of which a matrix in e4m3 has one after the other, again and again. Their count is a prime, so no two rows are alike.
static CODES: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let code = |i| (splitmix64(i) >> 40) as u8;
    (0..65_521).map(code).map(|code| if code & 0x7f == fp8::NAN { code ^ 1 } else { code }).collect()
});

/// The scale of each block.
const FP8_SCALE: f32 = 1.0 / 512.0;

/// A matrix in e4m3 with such inputs, not on the device yet: [`fp8_element`] says what it means.
pub(crate) fn fp8_part(rows: usize, cols: usize, inputs: Inputs) -> HostTensor {
    let wide = if let Inputs::PerGroup(cols) = inputs { cols as usize } else { 128 };
    let block = [128, wide];
    let mut codes = Vec::with_capacity(rows * cols + CODES.len());
    while codes.len() < rows * cols {
        codes.extend_from_slice(&CODES);
    }
    let values = vec![FP8_SCALE; rows.div_ceil(block[0]) * cols.div_ceil(block[1])];
    let scales = Arc::new(Scales { values, block, inputs, input_scale: None });
    let data = TensorData::Fp8 { owner: Arc::new(codes), range: 0..rows * cols, scales };
    HostTensor { name: "random".into(), rows, cols, data }
}

/// Element `(row, col)` of an [`fp8_part`].
pub(crate) fn fp8_element(cols: usize, row: usize, col: usize) -> f64 {
    let code = CODES[(row * cols + col) % CODES.len()];
    bf16::from_f32(fp8::decode(code) * FP8_SCALE).to_f64()
}
