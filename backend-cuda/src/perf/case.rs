//! What is timed: a family of kernels at a shape, with the bytes and operations that it can't do without.

use minisgl_core::backend::WeightRole;
use minisgl_core::tensor::{HostTensor, TensorData};
use thiserror::Error;

use super::small;
use crate::device::Cuda;
use crate::error::CudaError;
use crate::launch::Launcher;
use crate::weight::Weight;

/// Why a case gave no time.
#[derive(Debug, Error)]
pub enum PerfError {
    /// The device failed.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// The kernel's result is not what it should be, so its time means nothing.
    #[error("{family} at {shape}: wrong result: {complaint}")]
    Wrong {
        /// The kernels.
        family: &'static str,
        /// The shape.
        shape: String,
        /// What is wrong.
        complaint: String,
    },
}

/// Does a call find in the L2 cache what the call before it left there?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cold {
    /// No: buffers are used in rotation.
    Yes,
    /// Yes: every call uses the same.
    No,
}

/// Enqueues call number n.
pub(super) type Call = Box<dyn FnMut(&Launcher, usize) -> Result<(), CudaError>>;
/// Looks at what call 0 wrote; `Some` says what is wrong.
pub(super) type Check = Box<dyn FnOnce(&mut Cuda) -> Result<Option<String>, CudaError>>;

/// Sets a case up with so many copies of its buffers.
pub(super) type Setup = Box<dyn Fn(&mut Cuda, usize) -> Result<Run, CudaError>>;

/// A case set up on a device.
pub(super) struct Run {
    pub(super) call: Call,
    pub(super) check: Check,
    /// Somebody else's way to the same result, or to the same bytes moved.
    pub(super) baseline: Option<(&'static str, Call)>,
}

/// A family of kernels at a shape.
pub struct Case {
    /// Name of the family.
    pub family: &'static str,
    /// The shape, as `name=number` words.
    pub shape: String,
    /// Bytes that a call must move.
    pub bytes: f64,
    /// Operations of tensor cores that a call must do.
    pub flops: f64,
    /// Sets it up with so many copies of its buffers, for calls to use in rotation.
    pub(super) setup: Setup,
}

/// Which cases are wanted.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Words that all occur in `family shape`.
    pub words: Vec<String>,
    /// Rows of decode steps and of small operations; empty takes the usual ones.
    pub rows: Vec<u32>,
    /// Context lengths; empty takes the usual ones.
    pub contexts: Vec<u32>,
    /// Tokens of prefill steps; empty takes the usual ones.
    pub tokens: Vec<u32>,
}

impl Filter {
    pub(super) fn rows(&self) -> Vec<u32> {
        or_usual(&self.rows, &[1, 8, 64, 128, 256])
    }

    fn takes(&self, case: &Case) -> bool {
        let text = format!("{} {}", case.family, case.shape);
        self.words.iter().all(|word| text.contains(word.as_str()))
    }
}

fn or_usual(given: &[u32], usual: &[u32]) -> Vec<u32> {
    if given.is_empty() { usual.to_vec() } else { given.to_vec() }
}

/// Sizes of the models that the cases are taken from.
#[derive(Clone, Copy, Debug)]
pub(super) struct ModelShape {
    pub(super) name: &'static str,
    pub(super) hidden: u32,
    pub(super) vocab: u32,
}

pub(super) const MODELS: [ModelShape; 2] = [
    ModelShape { name: "0.6b", hidden: 1024, vocab: 151_936 },
    ModelShape { name: "14b", hidden: 5120, vocab: 151_936 },
];

/// The cases that a filter takes, in the order of a step.
pub fn cases(filter: &Filter) -> Vec<Case> {
    let mut cases = small::cases(filter);
    cases.retain(|case| filter.takes(case));
    cases
}

/// A bf16 matrix of numbers in [-1, 1), made on the device; [`random_element`] gives the same.
pub(super) fn random(cuda: &mut Cuda, rows: usize, cols: usize, seed: u64) -> Result<Weight, CudaError> {
    let data = TensorData::Uniform { seed, low: -1.0, high: 1.0 };
    cuda.load_weight(WeightRole::Linear, &[HostTensor { name: "random".into(), rows, cols, data }])
}

/// Element `(row, col)` of a [`random`] matrix.
pub(super) fn random_element(cols: usize, seed: u64, row: usize, col: usize) -> f64 {
    f64::from(minisgl_core::tensor::uniform_element(seed, (row * cols + col) as u64, -1.0, 1.0).to_f32())
}
