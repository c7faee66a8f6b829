//! Bodies of requests and answers: JSON, of bounded size, in bounded time.
//!
//! Small bodies are read at once. A large one waits for its turn behind its first [`SMALL_BYTES`], so that the memory of all
//! bodies on their way is bounded whatever the number of connections.

use axum::body::Body;
use axum::http::Request;
use axum::response::Response;
use http_body_util::BodyExt;
use hyper::StatusCode;
use hyper::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderValue};
use serde::Serialize;

use crate::app::App;
use crate::error::ApiError;
use crate::large_bodies::LargeBodies;

/// A body up to this size is read whatever else is going on.
const SMALL_BYTES: usize = 64 << 10;

/// A request's body as a text, which its header says is JSON.
///
/// # Errors
/// Another content type; too many bytes; too slow; no UTF-8; a client that went away.
pub async fn json_text(app: &App, request: Request<Body>) -> Result<String, ApiError> {
    check_type(request.headers())?;
    check_length(request.headers(), app.settings.body_bytes_max)?;
    let read = read(request.into_body(), app.settings.body_bytes_max, &app.large_bodies);
    let bytes = tokio::time::timeout(app.settings.body_timeout, read).await.map_err(|_| {
        let seconds = app.settings.body_timeout.as_secs();
        let message = format!("the body did not come within {seconds} s; send it at once");
        ApiError::invalid(message).with_status(StatusCode::REQUEST_TIMEOUT)
    })??;
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to() + 1;
        ApiError::invalid(format!("the body is not valid UTF-8 at byte {at}; send JSON as UTF-8"))
    })
}

/// Asked for, since a web page can send anything else to any address without being asked whether it may.
fn check_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let is_json = |value: &HeaderValue| {
        let essence = value.as_bytes().split(|byte| *byte == b';').next().unwrap_or_default();
        essence.trim_ascii().eq_ignore_ascii_case(b"application/json")
    };
    match headers.get(CONTENT_TYPE).is_some_and(is_json) {
        true => Ok(()),
        false => {
            let message =
                "the body must be JSON, and say so: send the header `Content-Type: application/json`";
            Err(ApiError::invalid(message).with_status(StatusCode::UNSUPPORTED_MEDIA_TYPE))
        }
    }
}

fn too_long(max: usize) -> ApiError {
    let message = format!("the body has more than {max} bytes; shorten it, or raise --max-body-bytes");
    ApiError::invalid(message).with_status(StatusCode::PAYLOAD_TOO_LARGE)
}

fn check_length(headers: &HeaderMap, max: usize) -> Result<(), ApiError> {
    let length = headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    match length.is_some_and(|length| length > max as u64) {
        true => Err(too_long(max)),
        false => Ok(()),
    }
}

async fn read(mut body: Body, max: usize, large: &LargeBodies) -> Result<Vec<u8>, ApiError> {
    let mut bytes = Vec::new();
    let mut turn = None;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| ApiError::invalid(format!("the body broke off: {error}")))?;
        let Ok(data) = frame.into_data() else { continue };
        if bytes.len() + data.len() > max {
            return Err(too_long(max));
        }
        if turn.is_none() && bytes.len() + data.len() > SMALL_BYTES {
            turn = large.turn().await;
        }
        bytes.extend_from_slice(&data);
    }
    drop(turn);
    Ok(bytes)
}

/// An answer of status 200.
pub fn json(answer: &impl Serialize) -> Response {
    match serde_json::to_vec(answer) {
        Ok(json) => of_type("application/json", json),
        Err(error) => {
            use axum::response::IntoResponse;
            ApiError::internal(format!("the answer can't be written: {error}")).into_response()
        }
    }
}

/// An answer of status 200 and this content type.
pub fn of_type(content_type: &'static str, body: impl Into<Body>) -> Response {
    let mut response = Response::new(body.into());
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
