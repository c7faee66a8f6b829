//! `/v1/chat/completions` and `/v1/completions`.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::Request;
use axum::response::Response;
use minisgl::openai::{
    Answer, ChatChoice, ChatLogprobs, OutputFormat, PromptLogprobs, Prompts, Said, TextChoice, TextLogprobs,
    ToolCall, Usage,
};
use minisgl::{ChatPrompt, Completion, Grammar, Prompt, SamplingParams};
use serde::Serialize;

use crate::app::App;
use crate::asked::Asked;
use crate::body::{json, json_text};
use crate::engine::Engine;
use crate::error::{About, ApiError};
use crate::heading::{Heading, call_name, end_of};
use crate::output::Outputs;
use crate::random::random;
use crate::stages::with_stages;
use crate::stream::{Chunks, stream};

/// `POST /v1/chat/completions`
pub async fn chat(State(app): State<Arc<App>>, request: Request<Body>) -> Result<Response, ApiError> {
    let text = json_text(&app, request).await?;
    let sampling = SamplingParams { max_tokens: u32::MAX, ..default_sampling(&app) };
    let mut asked = Asked::read(&text, Prompts::Chat, &sampling, &app.settings.model)?;
    let engine = app.engines.get()?;
    let format = format_of(&app, &engine, &asked).await?;
    if let Some(Grammar::Calls(calls)) = &mut asked.body.grammar {
        calls.format = format.tools;
    }
    let heading = Heading::new(&app, &asked, "chatcmpl");
    let mut outputs = Outputs::submit(&app, engine, &asked)?;
    if let Some(options) = asked.stream {
        outputs.begun().await?;
        let chunks = Chunks::chat(heading, &asked, options, format);
        return Ok(stream(outputs, chunks));
    }
    let (engine, stages) = (outputs.engine().clone(), outputs.stages());
    let completions = outputs.whole().await?;
    Ok(with_stages(chat_answer(&heading, &asked, &engine, &completions, format), stages))
}

/// `POST /v1/completions`
pub async fn text(State(app): State<Arc<App>>, request: Request<Body>) -> Result<Response, ApiError> {
    let text = json_text(&app, request).await?;
    let sampling = SamplingParams { max_tokens: app.settings.text_tokens, ..default_sampling(&app) };
    let asked = Asked::read(&text, Prompts::Text, &sampling, &app.settings.model)?;
    let engine = app.engines.get()?;
    let echoes = echoes(&asked, &engine)?;
    let heading = Heading::new(&app, &asked, "cmpl");
    let mut outputs = Outputs::submit(&app, engine, &asked)?;
    if let Some(options) = asked.stream {
        outputs.begun().await?;
        return Ok(stream(outputs, Chunks::text(heading, &asked, options, &echoes)));
    }
    let (engine, stages) = (outputs.engine().clone(), outputs.stages());
    let completions = outputs.whole().await?;
    Ok(with_stages(text_answer(&heading, &asked, &engine, &completions, &echoes), stages))
}

/// A seed of its own for each request that has none.
fn default_sampling(app: &App) -> SamplingParams {
    SamplingParams { seed: random(), ..app.settings.sampling }
}

/// What the model is known to write in answer to a conversation.
async fn format_of(app: &App, engine: &Engine, asked: &Asked) -> Result<OutputFormat, ApiError> {
    let tools = match asked.has_tools() {
        false => None,
        true => Some(engine.tool_format.ok_or_else(|| {
            let fix = "the model's chat template shows no format of calls that is known (qwen3, llama3); leave it out, or say \
                       how the model calls tools (--tool-format)";
            ApiError::unsupported("tools", "a list of tools", fix)
        })?),
    };
    let reasoning = match asked.body.prompts.as_slice() {
        [Prompt::Chat(prompt)] if app.settings.separate_reasoning => {
            Some(ends_in_thought(engine, prompt.clone(), About::of(&asked.body)).await?)
        }
        _ => None,
    };
    Ok(OutputFormat { tools, reasoning })
}

/// Some templates write `<think>` themselves.
async fn ends_in_thought(engine: &Engine, prompt: ChatPrompt, about: About) -> Result<bool, ApiError> {
    let handle = engine.handle.clone();
    let rendered = tokio::task::spawn_blocking(move || handle.text().render(&prompt)).await;
    let rendered = rendered.map_err(|error| ApiError::internal(error.to_string()))?;
    Ok(rendered.map_err(|error| ApiError::of_request(&error, about))?.trim_end().ends_with("<think>"))
}

/// What each prompt's outputs begin with.
fn echoes(asked: &Asked, engine: &Engine) -> Result<Vec<String>, ApiError> {
    let echo = |prompt: &Prompt| match prompt {
        _ if !asked.echo => Ok(String::new()),
        Prompt::Text(text) => Ok(text.clone()),
        Prompt::Tokens(ids) => engine.handle.text().decode(ids).ok_or_else(|| {
            let fix = "the model has no tokenizer, so the prompt's tokens have no text; leave it out";
            ApiError::unsupported("echo", "true", fix)
        }),
        Prompt::Chat(_) | Prompt::Rerank(_) => Ok(String::new()),
    };
    asked.body.prompts.iter().map(echo).collect()
}

fn answer<'a, C>(heading: &'a Heading, object: &'static str, choices: Vec<C>, usage: Usage) -> Answer<'a, C> {
    let Heading { id, created, model } = heading;
    Answer { id: id.clone(), object, created: *created, model, choices, usage, prompt_logprobs: None }
}

fn chat_answer(
    heading: &Heading,
    asked: &Asked,
    engine: &Engine,
    completions: &[Completion],
    format: OutputFormat,
) -> Response {
    let token_bytes = |id| engine.handle.token_bytes(id);
    let said: Vec<Said> = completions.iter().map(|completion| Said::of(completion, format)).collect();
    let calls: Vec<Vec<ToolCall>> = said.iter().map(|said| said.named_calls(|_| call_name())).collect();
    let outputs = (0..).zip(completions).zip(said.iter().zip(&calls));
    let choices = outputs.map(|((index, completion), (said, calls))| ChatChoice {
        index,
        message: said.message(calls),
        logprobs: ChatLogprobs::new(completion, &token_bytes),
        finish_reason: end_of(completion, !calls.is_empty()),
    });
    let choices = with_token_ids(asked, completions, choices);
    let mut answer = answer(heading, "chat.completion", choices, Usage::of(completions));
    answer.prompt_logprobs = completions.first().and_then(|one| PromptLogprobs::new(one, &token_bytes));
    json(&answer)
}

fn text_answer(
    heading: &Heading,
    asked: &Asked,
    engine: &Engine,
    completions: &[Completion],
    echoes: &[String],
) -> Response {
    let token_bytes = |id| engine.handle.token_bytes(id);
    let outputs = asked.outputs();
    let text = |(at, completion): (usize, &Completion)| {
        echoes[at / outputs].clone() + completion.text.as_deref().unwrap_or_default()
    };
    let texts: Vec<String> = completions.iter().enumerate().map(text).collect();
    let logprobs = |index: u32, completion| match asked.echo {
        true => TextLogprobs::echoed(completion, &echoes[index as usize / outputs], &token_bytes),
        false => TextLogprobs::new(completion, &token_bytes),
    };
    let of_prompt = |completion| match asked.prompt_logprobs {
        true => PromptLogprobs::new(completion, &token_bytes),
        false => None,
    };
    let choices = (0..).zip(completions).zip(&texts).map(|((index, completion), text)| TextChoice {
        index,
        text,
        logprobs: logprobs(index, completion),
        prompt_logprobs: of_prompt(completion),
        finish_reason: end_of(completion, false),
    });
    let choices = with_token_ids(asked, completions, choices);
    json(&answer(heading, "text_completion", choices, Usage::of(completions)))
}

/// A choice with what vLLM adds to it.
#[derive(Serialize)]
struct WithTokenIds<'a, C> {
    #[serde(flatten)]
    choice: C,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<&'a [u32]>,
}

fn with_token_ids<'a, C>(
    asked: &Asked,
    completions: &'a [Completion],
    choices: impl Iterator<Item = C>,
) -> Vec<WithTokenIds<'a, C>> {
    let with = |(choice, completion): (C, &'a Completion)| WithTokenIds {
        choice,
        token_ids: asked.return_token_ids.then_some(completion.token_ids.as_slice()),
    };
    choices.zip(completions).map(with).collect()
}
