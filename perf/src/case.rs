//! What is timed: a family of kernels at a shape, with the bytes and operations that it can't do without.

use minisgl_cuda::{Cuda, CudaError, Launcher};
use thiserror::Error;

use crate::model::{MODELS, ModelShape};

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
pub(crate) type Call = Box<dyn FnMut(&Launcher, usize) -> Result<(), CudaError>>;
/// Looks at what call 0 wrote; `Some` says what is wrong.
pub(crate) type Check = Box<dyn FnOnce(&mut Cuda) -> Result<Option<String>, CudaError>>;

/// Sets a case up with so many copies of its buffers.
pub(crate) type Setup = Box<dyn Fn(&mut Cuda, usize) -> Result<Run, CudaError>>;

/// A case set up on a device.
pub(crate) struct Run {
    pub(crate) call: Call,
    pub(crate) check: Check,
    /// Somebody else's way to the same result, or to the same bytes moved.
    pub(crate) baseline: Option<(&'static str, Call)>,
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
    pub(crate) setup: Setup,
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
    /// A model's sizes; without, those of the usual models.
    pub model: Option<ModelShape>,
}

impl Filter {
    pub(crate) fn rows(&self) -> Vec<u32> {
        self.rows_or(&[1, 8, 64, 128, 256])
    }

    pub(crate) fn rows_or(&self, usual: &[u32]) -> Vec<u32> {
        or_usual(&self.rows, usual)
    }

    pub(crate) fn contexts(&self) -> Vec<u32> {
        self.contexts_or(&[128, 1024, 4096])
    }

    pub(crate) fn contexts_or(&self, usual: &[u32]) -> Vec<u32> {
        or_usual(&self.contexts, usual)
    }

    pub(crate) fn tokens(&self) -> Vec<u32> {
        or_usual(&self.tokens, &[1024, 4096, 16_384])
    }

    pub(crate) fn models(&self) -> Vec<ModelShape> {
        self.model.map_or(MODELS.to_vec(), |model| vec![model])
    }

    /// Is there no word, or one of this in it?
    pub(crate) fn speaks_of(&self, what: &str) -> bool {
        self.words.is_empty() || self.words.iter().any(|word| word.contains(what))
    }

    pub(crate) fn takes(&self, case: &Case) -> bool {
        let text = format!("{} {}", case.family, case.shape);
        self.words.iter().all(|word| text.contains(word.as_str()))
    }
}

fn or_usual(given: &[u32], usual: &[u32]) -> Vec<u32> {
    if given.is_empty() { usual.to_vec() } else { given.to_vec() }
}
