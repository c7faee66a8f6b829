//! Models by name, with dummy weights: the sizes of published models for benchmarks.
//!
//! Dummy weights are uniform. A matrix's have the standard deviation 1/sqrt(inputs), so that a row of ones' size stays
//! of that size; a norm's scales lie around 1, biases around 0. A tensor's seed is a hash of its name: the same on every
//! backend and in every run.

use std::convert::Infallible;

use minisgl_core::spec::{DecoderSpec, NormForm};
use minisgl_core::tensor::{HostTensor, TensorData, splitmix64};

use crate::config::{Config, ConfigError, parse};
use crate::family::{Family, Preset};
use crate::fields::Fields;
use crate::tensors::{Shape, Tensors};

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

/// Dummy weights for any configuration.
pub(crate) fn dummy_tensors(spec: &DecoderSpec, family: &Family) -> Tensors {
    let made: Result<Tensors, Infallible> =
        Tensors::collect(spec, &family.names, |name, shape| Ok(dummy(name, shape, spec.norm)));
    match made {
        Ok(tensors) => tensors,
    }
}

fn dummy(name: &str, shape: Shape, norm: NormForm) -> HostTensor {
    let (low, high) = match shape {
        Shape::Vector(_) if norm == NormForm::Scale => (0.9, 1.1),
        Shape::Vector(_) | Shape::Column(_) => (-0.1, 0.1),
        // A uniform variate on [-a, a) has the standard deviation a / sqrt(3).
        Shape::Matrix(_, inputs) => {
            let bound = (3.0 / inputs as f32).sqrt();
            (-bound, bound)
        }
    };
    let (rows, cols) = shape.rows_cols();
    HostTensor {
        name: name.to_owned(),
        rows,
        cols,
        data: TensorData::Uniform { seed: seed(name), low, high },
    }
}

/// FNV-1a of the name (Fowler, Noll and Vo, 1991), mixed.
fn seed(name: &str) -> u64 {
    let hash = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    splitmix64(hash)
}
