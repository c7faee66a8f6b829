//! `/v1/models`: the one model there is.

use std::sync::Arc;

use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::response::Response;
use hyper::StatusCode;
use minisgl::openai::created_now;
use serde::Serialize;

use crate::app::App;
use crate::body::json;
use crate::error::ApiError;

#[derive(Serialize)]
struct List<'a> {
    object: &'static str,
    data: [Model<'a>; 1],
}

#[derive(Serialize)]
struct Model<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    /// As vLLM gives it: tokens of a sequence.
    max_model_len: u32,
}

impl<'a> Model<'a> {
    fn of(app: &App, name: &'a str) -> Result<Self, ApiError> {
        let max_model_len = app.engines.get()?.info.limits.sequence;
        Ok(Model { id: name, object: "model", created: created_now(), owned_by: "minisgl", max_model_len })
    }
}

/// `GET /v1/models`
pub async fn list(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let data = [Model::of(&app, app.settings.model.first())?];
    Ok(json(&List { object: "list", data }))
}

/// `GET /v1/models/NAME`
pub async fn one(
    State(app): State<Arc<App>>,
    name: Result<Path<String>, PathRejection>,
) -> Result<Response, ApiError> {
    // One that is not UTF-8 is no model's.
    match name.ok().and_then(|Path(name)| app.settings.model.find(&name)) {
        Some(name) => Ok(json(&Model::of(&app, name)?)),
        None => {
            let message =
                format!("there is no model of this name; {:?} is served", app.settings.model.first());
            Err(ApiError::invalid(message).with_status(StatusCode::NOT_FOUND))
        }
    }
}
