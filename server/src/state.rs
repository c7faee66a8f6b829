//! How the service is: probes for whoever runs it, its version, its metrics.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use serde::Serialize;

use crate::app::App;
use crate::body::{json, of_type};
use crate::engine::EngineState;
use crate::error::ApiError;
use crate::metrics::CONTENT_TYPE;

/// `GET /health`: is it alive? It is while the model is being loaded; an engine that failed is no sign of health until the
/// next one is there.
pub async fn health(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    match app.engines.state() {
        EngineState::Loading | EngineState::Ready(_) | EngineState::Ending => Ok(alive()),
        // Unless the next one has come meanwhile.
        EngineState::Failed(_) | EngineState::Gone(_) => app.engines.get().map(|_| alive()),
    }
}

fn alive() -> Response {
    of_type("text/plain", "alive\n")
}

/// `GET /ready`: would a request be taken?
pub async fn ready(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    app.engines.get().map(|_| of_type("text/plain", "ready\n"))
}

#[derive(Serialize)]
struct Version {
    version: &'static str,
}

/// `GET /version`
pub async fn version() -> Response {
    json(&Version { version: env!("CARGO_PKG_VERSION") })
}

/// `GET /metrics`
pub async fn metrics(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    if let Ok(engine) = app.engines.get() {
        let app = app.clone();
        // The engine answers between two steps.
        let ask = move || {
            let handle = &engine.handle;
            if let (Ok(stats), Ok(load)) = (handle.stats(), handle.load()) {
                app.metrics.engine(&stats, &load, handle.open_requests(), engine.info.pages());
            }
        };
        tokio::task::spawn_blocking(ask).await.map_err(|error| ApiError::internal(error.to_string()))?;
    }
    Ok(of_type(CONTENT_TYPE, app.metrics.encode()))
}
