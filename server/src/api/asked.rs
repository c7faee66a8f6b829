//! What a request of the API asks for: the fields that only a service can serve, and those that lines have too.
//!
//! ```text
//!   body ── JSON ──> stream, echo, …                 taken here
//!                └─> all others                     minisgl::openai::Body
//! ```

use minisgl::openai::{Body, FieldError, Fields, ModelName, Prompts};
use minisgl::{ChatPrompt, GenerateRequest, Prompt, PromptLogprobs, SamplingParams};

use crate::error::ApiError;

/// A request that has been read.
#[derive(Clone, Debug, PartialEq)]
pub struct Asked {
    /// Prompts, how many outputs of each, sampling, stop texts, the model's name.
    pub body: Body,
    /// Send tokens as they come; `None`: one answer at the end.
    pub stream: Option<StreamOptions>,
    /// Let each output begin with its prompt.
    pub echo: bool,
    /// Give the prompts' log-probabilities in vLLM's form.
    pub prompt_logprobs: bool,
    /// Give token ids beside texts, as vLLM does.
    pub return_token_ids: bool,
}

/// How a stream is given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamOptions {
    /// End with a chunk that counts tokens.
    pub include_usage: bool,
}

impl Asked {
    /// Reads a request. Sampling that it leaves out is as in `sampling`, which has a seed of its own for each request.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(
        json: &str,
        prompts: Prompts,
        sampling: &SamplingParams,
        model: &ModelName,
    ) -> Result<Self, ApiError> {
        let mut fields = Fields::read(json).map_err(|error| ApiError::invalid(error.to_string()))?;
        fields.check_once()?;
        let stream = stream(&mut fields)?;
        let echo = match prompts {
            Prompts::Text => fields.flag("echo")?.unwrap_or(false),
            _ => false,
        };
        let return_token_ids = fields.flag("return_token_ids")?.unwrap_or(false);
        let explicit = fields.gives("prompt_logprobs");
        let scored = PromptLogprobs { from: 0, top: 0 };
        // With an echo no token need be drawn.
        let prompt_logprobs = echo.then_some(scored);
        let default = SamplingParams { prompt_logprobs, ..*sampling };
        let mut body = Body::read(fields, prompts, &default, model)?;
        let prompt_logprobs = score_prompt(&mut body.sampling, explicit, echo, stream.is_some())?;
        if body.prompts.is_empty() {
            return Err(FieldError::Missing { field: "prompt", fix: "give at least one" }.into());
        }
        Ok(Asked { body, stream, echo, prompt_logprobs, return_token_ids })
    }

    /// Does the request give the model tools?
    pub fn has_tools(&self) -> bool {
        matches!(self.body.prompts.as_slice(), [Prompt::Chat(ChatPrompt { tools: Some(_), .. })])
    }

    /// How many outputs it has in all.
    pub fn choices(&self) -> usize {
        self.body.prompts.len() * self.outputs()
    }

    /// How many of each prompt.
    pub fn outputs(&self) -> usize {
        self.body.samples as usize
    }

    /// See [`Body::requests`].
    pub fn requests(&self) -> impl ExactSizeIterator<Item = GenerateRequest> {
        self.body.clone().requests()
    }
}

/// Whether the prompts' log-probabilities are wanted for themselves; they are computed for an echo with `logprobs` too, and
/// where there is nothing else to do.
fn score_prompt(
    sampling: &mut SamplingParams,
    explicit: bool,
    echo: bool,
    stream: bool,
) -> Result<bool, ApiError> {
    let explicit = explicit && sampling.prompt_logprobs.is_some();
    let refused = |field, fix| Err(ApiError::unsupported(field, "true", fix));
    match (sampling.logprobs.filter(|_| echo), explicit) {
        (_, true) if stream => {
            refused("stream", "prompt_logprobs come with whole answers; leave one of them out")
        }
        (Some(_), _) if stream => refused(
            "stream",
            "an echo's log-probabilities come with whole answers; leave logprobs or echo out",
        ),
        (Some(_), true) => refused("echo", "with logprobs it has the prompt's; leave prompt_logprobs out"),
        (Some(top), false) => {
            sampling.prompt_logprobs = Some(PromptLogprobs { from: 0, top });
            Ok(false)
        }
        (None, explicit) => {
            if !explicit && sampling.max_tokens > 0 {
                sampling.prompt_logprobs = None;
            }
            Ok(explicit)
        }
    }
}

fn stream(fields: &mut Fields<'_>) -> Result<Option<StreamOptions>, ApiError> {
    let stream = fields.flag("stream")?.unwrap_or(false);
    let options: Option<Fields<'_>> = fields.take("stream_options", "an object")?;
    let Some(options) = options else { return Ok(stream.then(StreamOptions::default)) };
    if !stream {
        let fix = "it goes with \"stream\": true; leave it out";
        return Err(ApiError::unsupported("stream_options", "an object", fix));
    }
    let options = stream_options(options).map_err(|error| error.within("stream_options"))?;
    Ok(Some(options))
}

fn stream_options(mut options: Fields<'_>) -> Result<StreamOptions, FieldError> {
    let include_usage = options.flag("include_usage")?.unwrap_or(false);
    // It asks for padding against listeners, which changes nothing of what is said.
    options.flag("include_obfuscation")?;
    if options.flag("continuous_usage_stats")? == Some(true) {
        return Err(FieldError::Unsupported {
            field: "continuous_usage_stats",
            value: "true".to_owned(),
            fix: "tokens are counted at the end, with include_usage".to_owned(),
        });
    }
    options.finish()?;
    Ok(StreamOptions { include_usage })
}

#[cfg(test)]
mod tests {
    use minisgl::prompt_seed;

    use super::*;

    fn read(json: &str, prompts: Prompts) -> Result<Asked, ApiError> {
        Asked::read(
            json,
            prompts,
            &SamplingParams { seed: 40, ..SamplingParams::default() },
            &ModelName::new("m"),
        )
    }

    #[test]
    fn each_prompt_is_a_request_of_so_many_samples() {
        let asked = read(r#"{"prompt": [[1], [2]], "n": 3, "seed": 7}"#, Prompts::Text).unwrap();
        let requests: Vec<_> =
            asked.requests().map(|one| (one.prompt, one.sampling.seed, one.samples)).collect();
        let (a, b) = (Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2]));
        assert_eq!(requests, [(a, 7, 3), (b, prompt_seed(7, 1), 3)]);
        assert_eq!(asked.choices(), 6);
        assert_eq!(read(r#"{"prompt": "a"}"#, Prompts::Text).unwrap().body.sampling.seed, 40);
    }

    #[test]
    fn tools_that_are_not_to_be_used_are_kept_from_the_model() {
        let with = |choice: &str| {
            let messages =
                r#""messages": [{"role": "user", "content": "a"}], "tools": [{"function": {"name": "a"}}]"#;
            read(&format!("{{{messages}, \"tool_choice\": {choice}}}"), Prompts::Chat)
        };
        assert!(with(r#""auto""#).unwrap().has_tools() && with("null").unwrap().has_tools());
        assert!(!with(r#""none""#).unwrap().has_tools());
    }
}
