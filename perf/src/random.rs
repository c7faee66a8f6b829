//! Matrices of numbers that host and device make alike, each element by its place and a seed.

use minisgl_core::backend::WeightRole;
use minisgl_core::tensor::{HostTensor, TensorData, uniform_element};
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
    let data = TensorData::Uniform { seed, low: -max, high: max };
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
