//! `minisgl.SamplingParams`, which Python defines, as the library has it.

use std::collections::BTreeMap;

use minisgl::{EmbedRequest, GenerateRequest, Given, Prompt, PromptLogprobs, SamplingParams, TokenRules};
use pyo3::exceptions::{PyOverflowError, PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::prompt::prompt;

/// How a request's tokens are drawn.
#[derive(Clone)]
pub struct Sampling {
    pub params: SamplingParams,
    /// Outputs of a request.
    samples: u32,
    /// Whether `seed` was given.
    seeded: bool,
    stop: Vec<String>,
    include_stop: bool,
    rules: TokenRules,
}

impl Sampling {
    /// Reads the attributes of a `minisgl.SamplingParams`.
    pub fn of(given: &Bound<'_, PyAny>) -> PyResult<Self> {
        let seed: Option<u64> = field(given, "seed")?;
        let max_tokens: Option<u32> = field(given, "max_tokens")?;
        let prompt_logprobs: Option<u32> = field(given, "prompt_logprobs")?;
        let top_k: i64 = field(given, "top_k")?;
        if top_k < -1 {
            return Err(PyValueError::new_err(format!(
                "top_k is {top_k}; it must be 0 or -1 (all tokens), or above"
            )));
        }
        let params = SamplingParams {
            temperature: field(given, "temperature")?,
            // 0 and -1 keep all.
            top_k: top_k.clamp(0, u32::MAX.into()) as u32,
            top_p: field(given, "top_p")?,
            min_p: field(given, "min_p")?,
            seed: seed.unwrap_or_default(),
            max_tokens: max_tokens.unwrap_or(u32::MAX),
            ignore_eos: field(given, "ignore_eos")?,
            logprobs: field(given, "logprobs")?,
            prompt_logprobs: prompt_logprobs.map(|top| PromptLogprobs { from: 1, top }),
            repetition_penalty: field(given, "repetition_penalty")?,
            presence_penalty: field(given, "presence_penalty")?,
            frequency_penalty: field(given, "frequency_penalty")?,
            min_tokens: field(given, "min_tokens")?,
            embed: None,
        };
        let logit_bias: BTreeMap<u32, f32> = field(given, "logit_bias")?;
        let rules = TokenRules {
            logit_bias: logit_bias.into_iter().collect(),
            stop_token_ids: field(given, "stop_token_ids")?,
            bad_words: field(given, "bad_words")?,
            allowed_token_ids: field::<Option<Vec<u32>>>(given, "allowed_token_ids")?.map(Into::into),
        };
        let samples = field(given, "n")?;
        if samples == 0 {
            return Err(PyValueError::new_err("n is 0; ask for at least one output"));
        }
        Ok(Sampling {
            params,
            samples,
            seeded: seed.is_some(),
            stop: field(given, "stop")?,
            include_stop: field(given, "include_stop_str_in_output")?,
            rules,
        })
    }

    /// A request for what comes behind a prompt; `seed` is for one that has none of its own.
    pub fn request(&self, prompt: Prompt, seed: u64) -> GenerateRequest {
        let seed = if self.seeded { self.params.seed } else { seed };
        GenerateRequest {
            samples: self.samples,
            stop: self.stop.clone(),
            include_stop: self.include_stop,
            rules: self.rules.clone(),
            ..GenerateRequest::new(prompt).sampling(SamplingParams { seed, ..self.params })
        }
    }
}

/// A field of a `minisgl.SamplingParams`.
fn field<'py, T: FromPyObjectOwned<'py>>(given: &Bound<'py, PyAny>, name: &str) -> PyResult<T> {
    let value = given.getattr(name).map_err(|_| {
        PyTypeError::new_err(format!(
            "sampling is a minisgl.SamplingParams, and this one is a {}",
            given.get_type()
        ))
    })?;
    named(name, &value)
}

/// What Python gives under a name, which errors tell.
fn named<'py, T: FromPyObjectOwned<'py>>(name: &str, value: &Bound<'py, PyAny>) -> PyResult<T> {
    value.extract::<T>().map_err(Into::into).map_err(|error: PyErr| {
        match error.is_instance_of::<PyOverflowError>(value.py()) {
            true => PyValueError::new_err(format!(
                "{name} is {value}, which is out of range: whole numbers are 0 or above, below 2^32 (a seed 2^64)"
            )),
            false => PyTypeError::new_err(format!("{name} is {value:?}: {}", error.value(value.py()))),
        }
    })
}

/// In the place of sampling: a completion that is given, and scored.
#[pyclass(module = "minisgl._minisgl", frozen)]
pub struct Scored {
    pub completion: Given,
    /// The most probable tokens to be given beside each.
    pub top: u32,
}

#[pymethods]
impl Scored {
    #[new]
    fn new(completion: &Bound<'_, PyAny>, logprobs: &Bound<'_, PyAny>) -> PyResult<Self> {
        let top = named("logprobs", logprobs)?;
        let completion = match prompt(completion)? {
            Prompt::Text(text) => Given::Text(text),
            Prompt::Tokens(ids) => Given::Tokens(ids),
            Prompt::Chat(_) | Prompt::Rerank(_) => {
                return Err(PyValueError::new_err("a completion is a text or token ids"));
            }
        };
        Ok(Scored { completion, top })
    }
}

/// In the place of sampling: the prompt is embedded.
#[pyclass(module = "minisgl._minisgl", frozen)]
pub struct Embedded {
    dimensions: Option<u32>,
}

#[pymethods]
impl Embedded {
    #[new]
    fn new(dimensions: &Bound<'_, PyAny>) -> PyResult<Self> {
        Ok(Embedded { dimensions: named("dimensions", dimensions)? })
    }
}

impl Embedded {
    /// The request for a prompt's embedding.
    pub fn request(&self, prompt: Prompt) -> GenerateRequest {
        EmbedRequest { prompt, dimensions: self.dimensions }.into()
    }
}

/// Checks the ranges of a `minisgl.SamplingParams`.
#[pyfunction]
pub fn check_sampling(given: &Bound<'_, PyAny>) -> PyResult<()> {
    let sampling = Sampling::of(given)?;
    sampling.params.check().map_err(|error| PyValueError::new_err(error.to_string()))
}
