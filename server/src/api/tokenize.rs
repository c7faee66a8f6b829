//! `/tokenize` and `/detokenize`, as vLLM has them: text or conversations to token ids, and back.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::Request;
use axum::response::Response;
use minisgl::openai::{Body as Asked, FieldError, Fields, ModelName, Prompts, Whole};
use minisgl::{EngineHandle, Prompt, SamplingParams};
use serde::Serialize;

use crate::app::App;
use crate::body::{json, json_text};
use crate::error::{About, ApiError};

#[derive(Serialize)]
struct Tokens {
    count: usize,
    max_model_len: u32,
    tokens: Vec<u32>,
    token_strs: Option<Vec<String>>,
}

#[derive(Serialize)]
struct Detokenized {
    prompt: String,
}

/// `POST /tokenize`
pub async fn tokenize(State(app): State<Arc<App>>, request: Request<Body>) -> Result<Response, ApiError> {
    let text = json_text(&app, request).await?;
    let (prompt, about, with_texts) = asked(&text, &app.settings.model)?;
    let engine = app.engines.get()?;
    let (handle, max_model_len) = (engine.handle, engine.info.limits.sequence);
    let encode = move || encode(&handle, prompt, about, with_texts, max_model_len);
    let tokens = tokio::task::spawn_blocking(encode).await;
    Ok(json(&tokens.map_err(|error| ApiError::internal(error.to_string()))??))
}

fn asked(text: &str, model: &ModelName) -> Result<(Prompt, About, bool), ApiError> {
    let mut fields = Fields::read(text).map_err(|error| ApiError::invalid(error.to_string()))?;
    let with_texts = fields.flag("return_token_strs")?.unwrap_or(false);
    let prompts = if fields.gives("messages") { Prompts::Chat } else { Prompts::Text };
    let mut asked = Asked::read(fields, prompts, &SamplingParams::default(), model)?;
    match (asked.prompts.pop(), asked.prompts.is_empty()) {
        (Some(prompt), true) => Ok((prompt, About::of(&asked), with_texts)),
        _ => Err(FieldError::Prompt { field: Some("prompt"), right: "one prompt, or messages" }.into()),
    }
}

fn encode(
    handle: &EngineHandle,
    prompt: Prompt,
    about: About,
    with_texts: bool,
    max_model_len: u32,
) -> Result<Tokens, ApiError> {
    let tokens = handle.text().encode(prompt).map_err(|error| ApiError::of_request(&error, about))?;
    let text_of =
        |id: &u32| String::from_utf8_lossy(&handle.token_bytes(*id).unwrap_or_default()).into_owned();
    let token_strs = with_texts.then(|| tokens.iter().map(text_of).collect());
    Ok(Tokens { count: tokens.len(), max_model_len, tokens, token_strs })
}

/// `POST /detokenize`
pub async fn detokenize(State(app): State<Arc<App>>, request: Request<Body>) -> Result<Response, ApiError> {
    const EXPECTED: &str = "a list of token ids";
    let text = json_text(&app, request).await?;
    let mut fields = Fields::read(&text).map_err(|error| ApiError::invalid(error.to_string()))?;
    fields.check_once()?;
    if let Some(name) = fields.text("model")?
        && app.settings.model.find(&name).is_none()
    {
        let loaded = app.settings.model.first().to_string();
        return Err(FieldError::Model { asked: name, loaded }.into());
    }
    let ids: Vec<Whole> = fields
        .take("tokens", EXPECTED)?
        .ok_or(FieldError::Missing { field: "tokens", fix: "give them as a list of token ids" })?;
    fields.finish()?;
    let is_none = |id: i128| FieldError::Wrong { field: "tokens", value: id.to_string(), expected: EXPECTED };
    let ids = ids.iter().map(|Whole(id)| u32::try_from(*id).map_err(|_| is_none(*id)));
    let ids = ids.collect::<Result<Vec<u32>, _>>()?;
    let handle = app.engines.get()?.handle;
    let decode = move || handle.text().decode(&ids);
    let prompt = tokio::task::spawn_blocking(decode).await;
    let prompt = prompt.map_err(|error| ApiError::internal(error.to_string()))?;
    let prompt =
        prompt.ok_or_else(|| ApiError::invalid("the model has no tokenizer, so tokens have no text"))?;
    Ok(json(&Detokenized { prompt }))
}
