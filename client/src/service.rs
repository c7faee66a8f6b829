//! A service as its clients see it: asked one thing at a time, its answers read or refused by name.
//!
//! `chat` streams through here. `serve-bench` asks here what it must know before its clock starts; its load goes another
//! way ([`crate::bench::load`]).

use std::io::Read;
use std::time::Duration;

use minisgl_hub::{Authorities, BadAuthorities};
use serde::Deserialize;
use serde_json::{Value, json};
use thiserror::Error;
use ureq::http::{Response, StatusCode};
use ureq::tls::TlsConfig;
use ureq::{Agent, Body};

use crate::chunk::error_message;
use crate::endpoint::Endpoint;

/// How long connecting may take.
const CONNECT: Duration = Duration::from_secs(30);
/// Bytes of an answer that is read whole.
const ANSWER_BYTES_MAX: u64 = 64 << 20;

/// Why a service gives no answer.
#[derive(Debug, Error)]
pub enum ServiceError {
    /// No network, or nobody there.
    #[error("{url} can't be reached: {reason}; check --url, and that the service runs")]
    Unreachable {
        /// What was asked for.
        url: String,
        /// What the network says.
        reason: String,
    },
    /// The key is missing or wrong.
    #[error("{url} asks for another API key ({message}); set OPENAI_API_KEY or give --api-key")]
    Key {
        /// What was asked for.
        url: String,
        /// The service's words.
        message: String,
    },
    /// A refusal.
    #[error("{url} answers {status}: {message}")]
    Refused {
        /// What was asked for.
        url: String,
        /// The status.
        status: u16,
        /// The service's words.
        message: String,
    },
    /// An answer that nobody expects.
    #[error("{url} answers {reason}; is --url the address of a service with OpenAI's API?")]
    Answer {
        /// What was asked for.
        url: String,
        /// What is wrong with the answer.
        reason: String,
    },
    /// A service without a model.
    #[error("{0} lists no model; name one with --model")]
    NoModel(String),
}

/// A service.
#[derive(Clone)]
pub struct Service {
    endpoint: Endpoint,
    key: Option<String>,
    agent: Agent,
}

impl Service {
    /// A service at an address, with the key that it asks for, if it does.
    ///
    /// # Errors
    /// It is reached through TLS, and the environment names whom to trust in a way that is of no use.
    pub fn new(endpoint: Endpoint, key: Option<String>) -> Result<Self, BadAuthorities> {
        let tls = if endpoint.is_tls() { Authorities::from_env()?.of_agent() } else { TlsConfig::default() };
        let config = Agent::config_builder()
            .tls_config(tls)
            .user_agent(concat!("minisgl/", env!("CARGO_PKG_VERSION")))
            .http_status_as_error(false)
            .timeout_connect(Some(CONNECT))
            .build();
        Ok(Service { endpoint, key, agent: config.new_agent() })
    }

    /// Where it is.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// The name of the first model that it lists.
    ///
    /// # Errors
    /// It gives no list, or an empty one.
    pub fn first_model(&self) -> Result<String, ServiceError> {
        #[derive(Deserialize)]
        struct Models {
            data: Vec<Model>,
        }
        #[derive(Deserialize)]
        struct Model {
            id: String,
        }
        let url = self.endpoint.url("models");
        let mut request = self.agent.get(&url);
        if let Some(key) = &self.key {
            request = request.header("Authorization", format!("Bearer {key}"));
        }
        let models: Models = read(&url, succeed(&url, request.call())?)?;
        let first = models.data.into_iter().next();
        first.map(|model| model.id).ok_or(ServiceError::NoModel(url))
    }

    /// How many tokens a text is, by the service's own tokenizer, without special ones.
    ///
    /// # Errors
    /// It does not tell: not every service has this.
    pub fn count_tokens(&self, model: &str, text: &str) -> Result<u64, ServiceError> {
        #[derive(Deserialize)]
        struct Tokens {
            count: u64,
        }
        let url = self.endpoint.url_beside("tokenize");
        let body = json!({"model": model, "prompt": text, "add_special_tokens": false});
        let tokens: Tokens = read(&url, self.post(&url, &body)?)?;
        Ok(tokens.count)
    }

    /// The body of the answer to a request of an endpoint of the API, as it comes.
    ///
    /// # Errors
    /// It is refused.
    pub fn stream(&self, name: &str, body: &Value) -> Result<impl Read + Send + use<>, ServiceError> {
        let answer = self.post(&self.endpoint.url(name), body)?;
        Ok(answer.into_body().into_reader())
    }

    fn post(&self, url: &str, body: &Value) -> Result<Response<Body>, ServiceError> {
        let mut request = self.agent.post(url).header("Content-Type", "application/json");
        if let Some(key) = &self.key {
            request = request.header("Authorization", format!("Bearer {key}"));
        }
        succeed(url, request.send(body.to_string()))
    }
}

/// An answer that is a success.
fn succeed(url: &str, answer: Result<Response<Body>, ureq::Error>) -> Result<Response<Body>, ServiceError> {
    let url = url.to_owned();
    let answer =
        answer.map_err(|error| ServiceError::Unreachable { url: url.clone(), reason: error.to_string() })?;
    let status = answer.status();
    if status.is_success() {
        return Ok(answer);
    }
    let body =
        answer.into_body().into_with_config().limit(ANSWER_BYTES_MAX).read_to_vec().unwrap_or_default();
    let message = error_message(&body);
    Err(match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => ServiceError::Key { url, message },
        status => ServiceError::Refused { url, status: status.as_u16(), message },
    })
}

/// An answer read whole.
fn read<T: for<'de> Deserialize<'de>>(url: &str, answer: Response<Body>) -> Result<T, ServiceError> {
    let answer = answer.into_body().into_with_config().limit(ANSWER_BYTES_MAX).read_to_vec();
    let bad = |reason: String| ServiceError::Answer { url: url.to_owned(), reason };
    let body = answer.map_err(|error| bad(format!("with a body that can't be read: {error}")))?;
    serde_json::from_slice(&body).map_err(|error| bad(format!("what is not expected there: {error}")))
}
