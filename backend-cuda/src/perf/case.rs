//! What is timed: a family of kernels at a shape, with the bytes and operations that it can't do without.

use std::str::FromStr;

use minisgl_core::backend::{Dims, WeightRole};
use minisgl_core::tensor::{HostTensor, TensorData, uniform_element};
use thiserror::Error;

use super::{attention, decode, products, small};
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
    /// A model's sizes; without, those of the usual models.
    pub model: Option<ModelShape>,
}

impl Filter {
    pub(super) fn rows(&self) -> Vec<u32> {
        self.rows_or(&[1, 8, 64, 128, 256])
    }

    pub(super) fn rows_or(&self, usual: &[u32]) -> Vec<u32> {
        or_usual(&self.rows, usual)
    }

    pub(super) fn contexts(&self) -> Vec<u32> {
        self.contexts_or(&[128, 1024, 4096])
    }

    pub(super) fn contexts_or(&self, usual: &[u32]) -> Vec<u32> {
        or_usual(&self.contexts, usual)
    }

    pub(super) fn tokens(&self) -> Vec<u32> {
        or_usual(&self.tokens, &[1024, 4096, 16_384])
    }

    pub(super) fn models(&self) -> Vec<ModelShape> {
        self.model.map_or(MODELS.to_vec(), |model| vec![model])
    }

    fn takes(&self, case: &Case) -> bool {
        let text = format!("{} {}", case.family, case.shape);
        self.words.iter().all(|word| text.contains(word.as_str()))
    }
}

fn or_usual(given: &[u32], usual: &[u32]) -> Vec<u32> {
    if given.is_empty() { usual.to_vec() } else { given.to_vec() }
}

/// Sizes of a model that cases are taken from.
#[derive(Clone, Copy, Debug)]
pub struct ModelShape {
    pub(super) name: &'static str,
    pub(super) layers: u32,
    pub(super) hidden: u32,
    pub(super) vocab: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    intermediate: u32,
    /// Positions that a token sees, where not all.
    pub(super) window: Option<u32>,
    /// Have q, k and v biases, and heads no norms?
    pub(super) bias: bool,
}

/// Positions that a token sees in cases of models that have no window of their own.
const USUAL_WINDOW: u32 = 1024;

const SMALL: ModelShape = ModelShape {
    name: "0.6b",
    layers: 28,
    hidden: 1024,
    vocab: 151_936,
    heads: 16,
    kv_heads: 8,
    head_dim: 128,
    intermediate: 3072,
    window: None,
    bias: false,
};

/// Qwen3-0.6B and Qwen3-14B.
pub(crate) const MODELS: [ModelShape; 2] =
    [SMALL, ModelShape { name: "14b", layers: 40, hidden: 5120, heads: 40, intermediate: 17_408, ..SMALL }];

impl ModelShape {
    pub(crate) fn dims(&self) -> Dims {
        let ModelShape { layers, hidden, vocab, heads, kv_heads, head_dim, intermediate, .. } = *self;
        Dims { layers, hidden, heads, kv_heads, head_dim, intermediate, vocab, norm_eps: 1e-6 }
    }

    /// The model, and where it has no window the same with one.
    pub(super) fn and_windowed(self) -> Vec<ModelShape> {
        let windows = self.window.map_or(vec![None, Some(USUAL_WINDOW)], |window| vec![Some(window)]);
        windows.into_iter().map(|window| ModelShape { window, ..self }).collect()
    }

    /// The model, and where it has no biases the same with them.
    pub(super) fn and_biased(self) -> Vec<ModelShape> {
        let biases: &[bool] = if self.bias { &[true] } else { &[false, true] };
        biases.iter().map(|bias| ModelShape { bias: *bias, ..self }).collect()
    }
}

/// Sizes that differ from those of Qwen3-0.6B, a window, and whether there are biases: `heads=32,head_dim=64`,
/// `window=4096,bias=1`.
impl FromStr for ModelShape {
    type Err = String;

    fn from_str(text: &str) -> Result<ModelShape, String> {
        let mut shape = ModelShape { name: "given", ..SMALL };
        for word in text.split(',') {
            let (name, value) = word.split_once('=').ok_or_else(|| format!("`{word}` is no NAME=NUMBER"))?;
            let value: u32 = value.parse().map_err(|_| format!("`{value}` in `{word}` is no number"))?;
            let size = match name {
                "layers" => &mut shape.layers,
                "hidden" => &mut shape.hidden,
                "vocab" => &mut shape.vocab,
                "heads" => &mut shape.heads,
                "kv_heads" => &mut shape.kv_heads,
                "head_dim" => &mut shape.head_dim,
                "intermediate" => &mut shape.intermediate,
                "window" => {
                    shape.window = Some(value).filter(|window| *window > 0);
                    continue;
                }
                "bias" => {
                    shape.bias = value > 0;
                    continue;
                }
                _ => return Err(format!("a model has no size `{name}`")),
            };
            *size = value;
        }
        if shape.kv_heads == 0 || !shape.heads.is_multiple_of(shape.kv_heads) {
            return Err(format!("{} heads can't share {} kv_heads", shape.heads, shape.kv_heads));
        }
        Ok(shape)
    }
}

/// The cases that a filter takes, small ones first.
pub fn cases(filter: &Filter) -> Vec<Case> {
    let mut cases = small::cases(filter);
    cases.extend(products::cases(filter));
    cases.extend(attention::cases(filter));
    cases.extend(decode::cases(filter));
    cases.retain(|case| filter.takes(case));
    cases
}

/// A bf16 matrix of numbers in [-1, 1), made on the device; [`random_element`] gives the same.
pub(super) fn random(cuda: &mut Cuda, rows: usize, cols: usize, seed: u64) -> Result<Weight, CudaError> {
    random_in(cuda, rows, cols, seed, 1.0)
}

/// A bf16 matrix of numbers in [-max, max), made on the device.
pub(super) fn random_in(
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
pub(super) fn random_part(rows: usize, cols: usize, seed: u64) -> HostTensor {
    let data = TensorData::Uniform { seed, low: -1.0, high: 1.0 };
    HostTensor { name: "random".into(), rows, cols, data }
}

/// Element `(row, col)` of a [`random`] matrix.
pub(super) fn random_element(cols: usize, seed: u64, row: usize, col: usize) -> f64 {
    f64::from(uniform_element(seed, (row * cols + col) as u64, -1.0, 1.0).to_f32())
}

/// A complaint where pairs of `(got, wanted)` differ by more than `max` of the wanted ones' norm.
pub(super) fn relative_error(pairs: impl Iterator<Item = (f64, f64)>, max: f64) -> Option<String> {
    let (wrong, all) = pairs.fold((0.0, 0.0), |(wrong, all), (got, wanted)| {
        (wrong + (got - wanted).powi(2), all + wanted * wanted)
    });
    let error = (wrong / all).sqrt();
    let fits = error <= max;
    (!fits).then(|| format!("the relative error is {error:.2e}, more than {max:.0e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_relative_to_the_norm_and_nan_is_one() {
        let wanted = [3.0, 4.0];
        let pairs = |off: f64| wanted.into_iter().map(move |value| (value + off, value));
        assert_eq!(relative_error(pairs(0.0), 0.01), None);
        assert_eq!(relative_error(pairs(0.03), 0.01), None);
        assert!(relative_error(pairs(0.04), 0.01).is_some());
        assert!(relative_error(pairs(f64::NAN), 0.01).is_some());
    }

    #[test]
    fn a_models_sizes_are_those_given_and_else_the_small_models() {
        let dims = "heads=32,head_dim=64".parse::<ModelShape>().unwrap().dims();
        assert_eq!((dims.heads, dims.head_dim, dims.kv_heads, dims.hidden), (32, 64, 8, 1024));
        let shape: ModelShape = "window=4096,bias=1".parse().unwrap();
        assert_eq!((shape.window, shape.bias), (Some(4096), true));
        for wrong in ["heads", "heads=x", "eyes=2", "heads=12"] {
            assert!(wrong.parse::<ModelShape>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_filter_takes_the_cases_that_hold_all_its_words() {
        let filter =
            Filter { words: vec!["gemm_".into(), "model=14b".into()], rows: vec![3], ..Filter::default() };
        let cases = cases(&filter);
        assert!(!cases.is_empty());
        assert!(
            cases.iter().all(|case| case.family.starts_with("gemm_") && case.shape.contains("model=14b"))
        );
        assert!(cases.iter().any(|case| case.shape.contains("tokens=3 ")));
    }

    #[test]
    fn windows_and_biases_have_cases_of_their_own_and_a_window_bounds_what_is_read() {
        let of = |words: &[&str], model: &str| {
            let words = words.iter().map(|word| (*word).to_owned()).collect();
            cases(&Filter { words, model: Some(model.parse().unwrap()), ..Filter::default() })
        };
        let plain = "heads=16";
        assert!(!of(&["attention_decode", "window=1024"], plain).is_empty());
        assert!(!of(&["attention_prefill", "window=1024"], plain).is_empty());
        assert!(!of(&["gemm_qkv", "bias"], plain).is_empty());
        let bytes = |model: &str| of(&["attention_decode", "rows=8 context=4096"], model)[0].bytes;
        assert!((0.24..0.26).contains(&(bytes("window=1024") / bytes(plain))));
        assert!(of(&["attention_"], "window=100").iter().all(|case| case.shape.contains("window=100")));
    }
}
