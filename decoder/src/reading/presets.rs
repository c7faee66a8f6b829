//! Models by name, with dummy weights: the sizes of published models for benchmarks.
//!
//! Dummy weights are uniform. A matrix's have the standard deviation 1/sqrt(inputs), so that a row of ones' size stays
//! of that size; a norm's scales lie around 1, biases around 0. A tensor's seed is a hash of its name: the same on every
//! backend and in every run.
//!
//! Such a router would choose all experts equally often, which trained ones don't. So its rows differ in size, by up to 1.3 times
//! the usual one and down to 0.7 of it, evenly: of 128 experts with 8 a token the first are chosen by 12% of the tokens, the last by
//! 1.5%, where an even router has 6%. Which are which is drawn anew for each layer.

use minisgl_core::spec::NormForm;
use minisgl_core::tensor::{HostTensor, TensorData, fnv1a, splitmix64, uniform_element};

use crate::config::{Config, parse};
use crate::error::ConfigError;
use crate::family::{Family, Preset};
use crate::fields::Fields;
use crate::tensors::{MlpTensors, Shape, Tensors};

/// The presets' names, each family's smallest first.
pub fn names<'a>(families: &'a [&Family]) -> impl Iterator<Item = &'static str> + 'a {
    families.iter().flat_map(|family| family.presets.iter().map(|preset| preset.name))
}

/// A preset's configuration and its family, if there is one of this name. It has no end-of-sequence token: dummy weights
/// mean nothing by one.
pub(crate) fn config<'a>(
    name: &str,
    families: &[&'a Family],
) -> Option<Result<(Config, &'a Family), ConfigError>> {
    let find = |family: &&'a Family| {
        let preset = family.presets.iter().find(|preset| preset.name == name)?;
        Some(read(preset, family).map(|config| (config, *family)))
    };
    families.iter().find_map(find)
}

fn read(preset: &Preset, family: &Family) -> Result<Config, ConfigError> {
    let value = parse(preset.config.as_bytes())?;
    Config::read(&Fields::of(&value)?, family)
}

/// Divides routers that are dummies into rows of different sizes.
pub(crate) fn divide_routers(tensors: &mut Tensors) {
    for layer in &mut tensors.layers {
        if let MlpTensors::Experts { router, .. } = &mut layer.mlp
            && router.iter().all(|router| matches!(router.data, TensorData::Uniform { .. }))
        {
            *router = router.iter().flat_map(router_rows).collect();
        }
    }
}

/// A router's rows, one by one, of different sizes.
fn router_rows(router: &HostTensor) -> impl Iterator<Item = HostTensor> {
    let bound = (3.0 / router.cols as f32).sqrt();
    (0..router.rows).map(move |expert| {
        let name = format!("{}[{expert}]", router.name);
        let size = uniform_element(seed(&router.name), expert as u64, 0.7, 1.3).to_f32();
        let data = TensorData::Uniform { seed: seed(&name), low: -bound * size, high: bound * size };
        HostTensor { name, rows: 1, cols: router.cols, data }
    })
}

/// A dummy of this shape.
pub(crate) fn dummy(name: &str, shape: Shape, norm: NormForm) -> HostTensor {
    let (low, high) = match shape {
        Shape::Vector(_) if norm == NormForm::Scale => (0.9, 1.1),
        Shape::Vector(_) | Shape::Column(_) => (-0.1, 0.1),
        // A uniform variate on [-a, a) has the standard deviation a / sqrt(3).
        Shape::Matrix(_, inputs) | Shape::Stack(_, _, inputs) | Shape::Part { cols: inputs, .. } => {
            let bound = (3.0 / inputs as f32).sqrt();
            (-bound, bound)
        }
    };
    let (rows, cols) = shape.rows_cols();
    // A part's elements are those that the whole has there.
    let seed = match shape {
        Shape::Part { first, cols, .. } => seed(name).wrapping_add((first * cols) as u64),
        _ => seed(name),
    };
    HostTensor { name: name.to_owned(), rows, cols, data: TensorData::Uniform { seed, low, high } }
}

/// A hash of the name, mixed.
fn seed(name: &str) -> u64 {
    splitmix64(fnv1a(name.bytes()))
}
