//! A request on its way to an engine: token ids, how they are drawn, and the ends that are to come.

use std::sync::Arc;

use minisgl_core::constraint::Constraint;
use minisgl_core::request::Request;
use minisgl_core::rules::Rules;
use minisgl_core::sampling::SamplingParams;

use super::output::Output;
use crate::request::RequestError;

/// A request ready for the engine.
pub struct Ready {
    pub prompt: Vec<u32>,
    /// Of the first sample.
    pub params: SamplingParams,
    pub rules: Option<Arc<Rules>>,
    /// One for each sample, or none.
    pub constraints: Vec<Arc<dyn Constraint>>,
    /// One for each sample.
    pub outputs: Vec<Output>,
}

impl Ready {
    /// A prompt and what is given behind it. Of both, the latter alone is scored.
    pub fn new(
        mut prompt: Vec<u32>,
        given: Option<Vec<u32>>,
        mut params: SamplingParams,
        mut outputs: Vec<Output>,
    ) -> Self {
        if let Some(given) = given {
            if let Some(asked) = &mut params.prompt_logprobs {
                asked.from = prompt.len() as u32;
            }
            prompt.extend(given);
        }
        outputs.iter_mut().for_each(|output| output.set_prompt(&prompt));
        Ready { prompt, params, rules: None, constraints: Vec::new(), outputs }
    }

    /// The samples as the engine takes them.
    pub fn samples(&self) -> Vec<Request<'_>> {
        let of_sample = |sample| Request {
            rules: self.rules.as_ref(),
            constraint: self.constraints.get(sample as usize),
            ..Request::new(&self.prompt, self.params.of_sample(sample))
        };
        (0..self.outputs.len() as u32).map(of_sample).collect()
    }

    /// Is it one of a session's requests of this tag, if there is one?
    pub fn has_tag(&self, tag: Option<u64>) -> bool {
        self.outputs.iter().all(|output| tag.is_none_or(|tag| tag == output.tag()))
    }

    /// Need the request not run any more?
    pub fn is_unwanted(&self) -> bool {
        self.outputs.iter().all(|output| output.is_unwanted())
    }

    /// Ends all samples, which can't run.
    pub fn reject(self, error: &RequestError) {
        self.outputs.into_iter().for_each(|output| output.reject(error.clone()));
    }

    /// Whose it is.
    pub fn session(&self) -> u64 {
        self.outputs.first().map_or(0, |output| output.session().id)
    }

    /// Its samples.
    pub fn count(&self) -> usize {
        self.outputs.len()
    }

    /// How much work it is where a sequence has so many tokens at most: in tokens that its rows read, as if each sample got as many
    /// as it may.
    pub fn work(&self, sequence: u32) -> u64 {
        /// What a token takes beside those that it reads: Qwen3-0.6B's share of a full step, about.
        const BESIDE: u64 = 64;
        /// So that no sum of many overflows.
        const MOST: u64 = 1 << 20;
        let sequence = u64::from(sequence).min(MOST);
        let prompt = (self.prompt.len() as u64).min(sequence);
        let output = u64::from(self.params.max_tokens).min(sequence - prompt);
        (output * (prompt + output / 2) + BESIDE * (prompt + output)) * self.outputs.len() as u64
    }
}
