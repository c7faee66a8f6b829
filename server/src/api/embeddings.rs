//! `/v1/embeddings`.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::Request;
use axum::response::Response;
use minisgl::openai::{EmbedBody, Embeddings, Fields};

use crate::app::App;
use crate::body::{json, json_text};
use crate::error::{About, ApiError};
use crate::output::Outputs;
use crate::stages::with_stages;

/// The field of what is embedded.
const INPUT: &str = "input";

/// `POST /v1/embeddings`
pub async fn embeddings(State(app): State<Arc<App>>, request: Request<Body>) -> Result<Response, ApiError> {
    let text = json_text(&app, request).await?;
    let fields = Fields::read(&text).map_err(|error| ApiError::invalid(error.to_string()))?;
    let asked = EmbedBody::read(fields, INPUT, &app.settings.model)?;
    let engine = app.engines.get()?;
    let model = asked.model.as_ref().unwrap_or(app.settings.model.first()).clone();
    let encoding = asked.encoding;
    let outputs =
        Outputs::of(&app, engine, About { prompt: INPUT, grammar: None }, asked.requests(), 1, false)?;
    let stages = outputs.stages();
    let completions = outputs.whole().await?;
    // Of many embeddings that takes longer than a task may.
    let written = tokio::task::spawn_blocking(move || json(&Embeddings::new(&model, encoding, &completions)));
    let answer = written.await.map_err(|error| ApiError::internal(error.to_string()))?;
    Ok(with_stages(answer, stages))
}
