//! What a request is answered with that can't be served: a status and OpenAI's error object.
//!
//! | status | when |
//! |---|---|
//! | 400 | a field is wrong or asks for what is not done; the prompt can't run |
//! | 401 | no API key, or another one |
//! | 404, 405 | no such path, model or method |
//! | 408, 413, 415 | a body that comes too slowly, is too long, or is not said to be JSON |
//! | 429 | as many requests wait as may; `Retry-After` says when to try again |
//! | 500 | the request ran and the model's logits were not numbers |
//! | 503 | the model is being loaded, its engine has failed or it ends; with `Retry-After` |

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use hyper::StatusCode;
use hyper::header::{CONTENT_TYPE, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use minisgl::openai::{self, ErrorBody, ErrorObject, FieldError, INVALID_REQUEST, status};
use minisgl::{RequestError, SubmitError};

/// The fields that a request's prompt and its grammar came in: what an error that is found later is about.
#[derive(Clone, Copy, Debug)]
pub struct About {
    /// Of the prompt.
    pub prompt: &'static str,
    /// Of what the output is held to.
    pub grammar: Option<&'static str>,
}

impl About {
    /// Those of a body.
    pub fn of(body: &openai::Body) -> Self {
        About { prompt: body.prompt_field, grammar: body.grammar_field }
    }
}

/// Why a request is not served.
#[derive(Clone, Debug, PartialEq)]
pub struct ApiError {
    /// Of the answer.
    pub status: StatusCode,
    kind: &'static str,
    message: String,
    param: Option<String>,
    code: Option<&'static str>,
    retry_after_s: Option<u32>,
}

/// The seconds after which a client that found the queue full tries again: about as long as a few hundred tokens take.
const QUEUE_RETRY_S: u32 = 1;
/// And one that found the model not there.
const MODEL_RETRY_S: u32 = 5;

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        ApiError { status, kind, message: message.into(), param: None, code: None, retry_after_s: None }
    }

    /// The request itself is wrong.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, INVALID_REQUEST, message)
    }

    /// A field asks for what is not done.
    pub fn unsupported(field: &'static str, value: impl Into<String>, fix: impl Into<String>) -> Self {
        FieldError::Unsupported { field, value: value.into(), fix: fix.into() }.into()
    }

    /// The same under another status.
    pub fn with_status(self, status: StatusCode) -> Self {
        ApiError { status, ..self }
    }

    /// The same of this field.
    pub fn about(self, field: &str) -> Self {
        ApiError { param: Some(field.to_owned()), ..self }
    }

    /// As many requests wait as may.
    pub fn queue_full(waiting: usize) -> Self {
        let message = format!(
            "{waiting} requests run and wait, as many as may; try again later, or raise --max-queued or --max-running"
        );
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message);
        ApiError { code: Some("queue_full"), retry_after_s: Some(QUEUE_RETRY_S), ..error }
    }

    /// There is no engine now.
    pub fn unavailable(message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "service_unavailable", message);
        ApiError { retry_after_s: Some(MODEL_RETRY_S), ..error }
    }

    /// No key, or one that is not known.
    pub fn unauthorized() -> Self {
        let message =
            "an API key is needed: send the header `Authorization: Bearer KEY` with a key of this service";
        let error = Self::new(StatusCode::UNAUTHORIZED, "authentication_error", message);
        ApiError { code: Some("invalid_api_key"), ..error }
    }

    /// The service is at fault.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// The engine failed, or was closed, while the request ran.
    pub fn lost(cause: &minisgl::Error) -> Self {
        match cause {
            minisgl::Error::Closed => Self::unavailable("the service ended before the request did"),
            cause => Self::unavailable(format!("the request was lost with its engine, try again: {cause}")),
        }
    }

    /// The request can't run, or could not go on.
    pub fn of_request(error: &RequestError, about: About) -> Self {
        let message = error.to_string();
        match status(error) {
            (500, _) => return Self::internal(message),
            (503, _) => return Self::unavailable(message),
            _ => {}
        }
        let (param, code) = match error {
            RequestError::Refused(SubmitError::PromptTooLong { .. }) | RequestError::TextTooLong { .. } => {
                (Some(about.prompt), Some("context_length_exceeded"))
            }
            RequestError::Refused(SubmitError::EmptyPrompt | SubmitError::TokenOutsideVocabulary { .. })
            | RequestError::Encode(_) => (Some(about.prompt), Some("invalid_value")),
            RequestError::Refused(SubmitError::TooManySamples { .. }) | RequestError::Samples { .. } => {
                (Some("n"), Some("invalid_value"))
            }
            RequestError::Refused(SubmitError::Sampling(error)) => {
                (Some(error.field()), Some("invalid_value"))
            }
            RequestError::NoToolFormat => (Some("tools"), Some("unsupported_value")),
            RequestError::Grammar(_) | RequestError::GrammarFailed => (about.grammar, Some("invalid_value")),
            // Of several fields together.
            RequestError::NoTokenLeft => (None, Some("invalid_value")),
            RequestError::EmptyStop | RequestError::StopTexts { .. } => (Some("stop"), Some("invalid_value")),
            RequestError::NoChatTemplate
            | RequestError::BrokenChatTemplate(_)
            | RequestError::ChatTemplate(_) => (Some("messages"), None),
            _ => (None, None),
        };
        ApiError { param: param.map(str::to_owned), code, ..Self::invalid(message) }
    }

    /// The error object, as a JSON text.
    pub fn to_json(&self) -> String {
        let ApiError { kind, message, param, code, .. } = self;
        let error = ErrorObject { message, r#type: kind, param: param.as_deref(), code: *code };
        // Texts alone can always be written.
        serde_json::to_string(&ErrorBody { error }).unwrap_or_default()
    }
}

impl From<FieldError> for ApiError {
    fn from(error: FieldError) -> Self {
        let status = match error {
            FieldError::Model { .. } => StatusCode::NOT_FOUND,
            _ => StatusCode::BAD_REQUEST,
        };
        let (param, code) = (error.field().map(str::to_owned), error.code());
        ApiError { param, code, ..Self::invalid(error.to_string()).with_status(status) }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = Response::new(Body::from(self.to_json()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(seconds) = self.retry_after_s {
            headers.insert(RETRY_AFTER, seconds.into());
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_whose_engine_failed_may_be_sent_again_and_one_whose_grammar_failed_may_not() {
        let about = About { prompt: "prompt", grammar: None };
        let of = |error| ApiError::of_request(&error, about).into_response();
        let lost = of(RequestError::EngineFailed { cause: "x".to_owned() });
        assert_eq!((lost.status().as_u16(), lost.headers().contains_key(RETRY_AFTER)), (503, true));
        let wrong = of(RequestError::GrammarFailed);
        assert_eq!((wrong.status().as_u16(), wrong.headers().contains_key(RETRY_AFTER)), (400, false));
    }
}
