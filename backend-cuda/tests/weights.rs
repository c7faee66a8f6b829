//! Weights on the device are those of the checkpoint, wherever each row lies.

mod support;

use std::sync::Arc;

use half::bf16;
use minisgl_core::backend::{Device, Queue, WeightRole};
use minisgl_core::spec::NormForm;
use minisgl_core::tensor::{Dtype, HostTensor, TensorData, uniform_element};
use minisgl_cuda::{Cuda, Options, Weight};
use support::taken;

fn cuda() -> Cuda {
    Cuda::new(&Options::default()).expect("a GPU")
}

fn download(cuda: &mut Cuda, weight: Weight) -> Vec<bf16> {
    let words = weight.rows() * weight.cols() / 2;
    let mut pinned = cuda.alloc_pinned(words).unwrap();
    cuda.download(Queue::Compute, weight.into(), words, &mut pinned).unwrap();
    bytemuck::cast_slice(cuda.words(&pinned).unwrap()).to_vec()
}

fn dummy(rows: usize, cols: usize, seed: u64) -> HostTensor {
    let data = TensorData::Uniform { seed, low: -0.37, high: 0.41 };
    HostTensor { name: format!("dummy {seed}"), rows, cols, data }
}

fn dummy_value(cols: usize, seed: u64, row: usize, col: usize) -> bf16 {
    uniform_element(seed, (row * cols + col) as u64, -0.37, 0.41)
}

/// A tensor with bytes: element (row, col) is `value(row, col)`.
fn stored(rows: usize, cols: usize, dtype: Dtype, value: impl Fn(usize, usize) -> f32) -> HostTensor {
    // Three odd bytes in front, as a mapped file may have.
    let mut bytes = vec![0u8; 3];
    for row in 0..rows {
        for col in 0..cols {
            match dtype {
                Dtype::F32 => bytes.extend(value(row, col).to_le_bytes()),
                Dtype::Bf16 => bytes.extend(bf16::from_f32(value(row, col)).to_le_bytes()),
                Dtype::F16 => bytes.extend(half::f16::from_f32(value(row, col)).to_le_bytes()),
            }
        }
    }
    let range = 3..bytes.len();
    let data = TensorData::Bytes { owner: Arc::new(bytes), range, dtype };
    HostTensor { name: "stored".into(), rows, cols, data }
}

#[test]
#[ignore = "needs a GPU"]
fn dummy_weights_are_the_cpus_bit_for_bit() {
    let mut cuda = cuda();
    let parts = [dummy(100, 72, 5), dummy(36, 72, u64::MAX - 100)];
    let weight = cuda.load_weight(WeightRole::Linear, &parts).unwrap();
    let values = download(&mut cuda, weight);
    for (i, value) in values.iter().enumerate() {
        let (row, col) = (i / 72, i % 72);
        let expected = if row < 100 {
            dummy_value(72, 5, row, col)
        } else {
            dummy_value(72, u64::MAX - 100, row - 100, col)
        };
        assert_eq!(value.to_bits(), expected.to_bits(), "row {row}, column {col}");
    }
}

#[test]
#[ignore = "needs a GPU"]
fn gate_and_up_alternate_in_blocks_of_eight_and_are_padded_with_zeros() {
    let mut cuda = cuda();
    for (rows, cols) in taken([(36, 72), (8, 64), (200, 128), (3072, 1024)]) {
        let from_seed = [dummy(rows, cols, 1), dummy(rows, cols, 2)];
        let from_bytes = [1, 2].map(|seed| {
            stored(rows, cols, Dtype::Bf16, move |row, col| dummy_value(cols, seed, row, col).to_f32())
        });
        for parts in [from_seed, from_bytes] {
            let weight = cuda.load_weight(WeightRole::GateUp, &parts).unwrap();
            assert_eq!(weight.rows() % 128, 0);
            let values = download(&mut cuda, weight);
            for (place, row) in values.chunks_exact(cols).enumerate() {
                let (s, seed) = (place / 16 * 8 + place % 8, if place % 16 < 8 { 1 } else { 2 });
                for (col, value) in row.iter().enumerate() {
                    let expected = if s < rows { dummy_value(cols, seed, s, col) } else { bf16::ZERO };
                    assert_eq!(
                        value.to_bits(),
                        expected.to_bits(),
                        "{rows}x{cols}: place {place}, column {col}"
                    );
                }
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn a_matrix_larger_than_the_staging_memory_arrives_whole() {
    let mut cuda = cuda();
    let (rows, cols) = (30_011, 1024);
    let value = |row: usize, col: usize| ((row * 31 + col * 7) % 251) as f32 - 125.0;
    for dtype in taken([Dtype::Bf16, Dtype::F16, Dtype::F32]) {
        let weight = cuda.load_weight(WeightRole::Embedding, &[stored(rows, cols, dtype, value)]).unwrap();
        let values = download(&mut cuda, weight);
        let wrong = (0..rows * cols).find(|i| values[*i].to_f32() != value(i / cols, i % cols));
        assert_eq!(wrong, None, "{dtype:?}");
    }
}

#[test]
#[ignore = "needs a GPU"]
fn folding_a_norm_multiplies_the_columns() {
    let mut cuda = cuda();
    let (rows, cols) = (129, 200);
    let norm = cuda.load_weight(WeightRole::Norm(NormForm::Scale), &[dummy(1, cols, 9)]).unwrap();
    let matrix = cuda.load_weight(WeightRole::Linear, &[dummy(rows, cols, 10)]).unwrap();
    cuda.scale_columns(norm, matrix).unwrap();
    for (i, value) in download(&mut cuda, matrix).into_iter().enumerate() {
        let (row, col) = (i / cols, i % cols);
        let product = dummy_value(cols, 10, row, col).to_f32() * dummy_value(cols, 9, 0, col).to_f32();
        assert_eq!(value.to_bits(), bf16::from_f32(product).to_bits(), "row {row}, column {col}");
    }
}

#[test]
#[ignore = "needs a GPU"]
fn a_ranks_part_is_that_of_the_whole() {
    let mut cuda = cuda();
    let (rows, cols) = (192, 320);
    let value = |row: usize, col: usize| dummy_value(cols, 4, row, col).to_f32();
    let wholes =
        [dummy(rows, cols, 4), stored(rows, cols, Dtype::Bf16, value), stored(rows, cols, Dtype::F32, value)];
    for whole in wholes {
        for (part_rows, part_cols) in [(0..rows, 160..320), (64..128, 0..cols), (8..72, 64..128)] {
            let part = whole.window(part_rows.clone(), part_cols.clone());
            let weight = cuda.load_weight(WeightRole::Linear, &[part.clone(), part]).unwrap();
            let values = download(&mut cuda, weight);
            let (high, wide) = (part_rows.len(), part_cols.len());
            assert_eq!(values.len(), 2 * high * wide);
            for (i, value) in values.iter().enumerate() {
                let (row, col) = (part_rows.start + i / wide % high, part_cols.start + i % wide);
                let expected = dummy_value(cols, 4, row, col);
                assert_eq!(value.to_bits(), expected.to_bits(), "{whole:?}: row {row}, column {col}");
            }
        }
    }
}
