//! `minisgl.SamplingParams`, which Python defines, as the library has it.

use std::collections::BTreeMap;

use minisgl::{GenerateRequest, Given, Prompt, PromptLogprobs, SamplingParams, TokenRules};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyString;

use crate::prompt::prompt;

/// How a request's tokens are drawn.
#[derive(Clone)]
pub struct Sampling {
    pub params: SamplingParams,
    /// Whether `seed` was given.
    seeded: bool,
    stop: Vec<String>,
    include_stop: bool,
    rules: TokenRules,
}

impl Sampling {
    /// Reads the attributes of a `minisgl.SamplingParams`.
    pub fn of(given: &Bound<'_, PyAny>) -> PyResult<Self> {
        let seed: Option<u64> = given.getattr("seed")?.extract()?;
        // More than a sequence holds is as many as it holds.
        let max_tokens: Option<u32> = given.getattr("max_tokens")?.extract()?;
        let prompt_logprobs: Option<u32> = given.getattr("prompt_logprobs")?.extract()?;
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
            prompt_logprobs: prompt_logprobs.map(|top| PromptLogprobs { from: 1, top }),
            repetition_penalty: given.getattr("repetition_penalty")?.extract()?,
            presence_penalty: given.getattr("presence_penalty")?.extract()?,
            frequency_penalty: given.getattr("frequency_penalty")?.extract()?,
            min_tokens: given.getattr("min_tokens")?.extract()?,
        };
        let logit_bias: BTreeMap<u32, f32> = given.getattr("logit_bias")?.extract()?;
        let rules = TokenRules {
            logit_bias: logit_bias.into_iter().collect(),
            stop_token_ids: given.getattr("stop_token_ids")?.extract()?,
            bad_words: given.getattr("bad_words")?.extract()?,
        };
        Ok(Sampling {
            params,
            seeded: seed.is_some(),
            stop: given.getattr("stop")?.extract()?,
            include_stop: given.getattr("include_stop_str_in_output")?.extract()?,
            rules,
        })
    }

    /// A request for what comes behind a prompt; `seed` is for one that has none of its own.
    pub fn request(&self, prompt: Prompt, seed: u64) -> GenerateRequest {
        let seed = if self.seeded { self.params.seed } else { seed };
        GenerateRequest {
            stop: self.stop.clone(),
            include_stop: self.include_stop,
            rules: self.rules.clone(),
            ..GenerateRequest::new(prompt).sampling(SamplingParams { seed, ..self.params })
        }
    }
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
    fn new(completion: &Bound<'_, PyAny>, top: u32) -> PyResult<Self> {
        let completion = match completion.cast::<PyString>() {
            Ok(text) => Given::Text(text.to_str()?.to_owned()),
            Err(_) => match prompt(completion)? {
                Prompt::Tokens(ids) => Given::Tokens(ids),
                _ => return Err(PyValueError::new_err("a completion is a text or token ids")),
            },
        };
        Ok(Scored { completion, top })
    }
}

/// Checks the ranges of a `minisgl.SamplingParams`.
#[pyfunction]
pub fn check_sampling(given: &Bound<'_, PyAny>) -> PyResult<()> {
    let sampling = Sampling::of(given)?;
    sampling.params.check().map_err(|error| PyValueError::new_err(error.to_string()))
}
