//! `minisgl.SamplingParams`, which Python defines, as the library has it.

use minisgl::SamplingParams;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// How a request's tokens are drawn.
#[derive(Clone)]
pub struct Sampling {
    pub params: SamplingParams,
    /// Whether `seed` was given.
    pub seeded: bool,
    pub stop: Vec<String>,
}

impl Sampling {
    /// Reads the attributes of a `minisgl.SamplingParams`.
    pub fn of(given: &Bound<'_, PyAny>) -> PyResult<Self> {
        let seed: Option<u64> = given.getattr("seed")?.extract()?;
        // More than a sequence holds is as many as it holds.
        let max_tokens: Option<u32> = given.getattr("max_tokens")?.extract()?;
        let top_k: i64 = given.getattr("top_k")?.extract()?;
        let params = SamplingParams {
            temperature: given.getattr("temperature")?.extract()?,
            // 0 and -1 keep all.
            top_k: top_k.clamp(0, u32::MAX.into()) as u32,
            top_p: given.getattr("top_p")?.extract()?,
            min_p: given.getattr("min_p")?.extract()?,
            seed: seed.unwrap_or_default(),
            max_tokens: max_tokens.unwrap_or(u32::MAX),
            ignore_eos: given.getattr("ignore_eos")?.extract()?,
            logprobs: given.getattr("logprobs")?.extract()?,
            ..SamplingParams::default()
        };
        Ok(Sampling { params, seeded: seed.is_some(), stop: given.getattr("stop")?.extract()? })
    }
}

/// Checks the ranges of a `minisgl.SamplingParams`.
#[pyfunction]
pub fn check_sampling(given: &Bound<'_, PyAny>) -> PyResult<()> {
    let sampling = Sampling::of(given)?;
    sampling.params.check().map_err(|error| PyValueError::new_err(error.to_string()))
}
