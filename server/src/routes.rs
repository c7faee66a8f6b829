//! Which path each handler has.
//!
//! | path | |
//! |---|---|
//! | `POST /v1/chat/completions`, `POST /v1/completions` | generate |
//! | `POST /v1/embeddings` | embed |
//! | `POST /tokenize`, `POST /detokenize` | text to token ids and back |
//! | `GET /v1/models`, `GET /v1/models/NAME` | the model |
//! | `GET /health`, `GET /ready`, `GET /version` | is it alive, does it take requests, which one is it |
//! | `GET /metrics` | numbers for Prometheus |
//! | `GET /` | a page to try it |

use std::sync::Arc;

use axum::Router;
use axum::http::Method;
use axum::middleware::from_fn_with_state;
use axum::routing::{get, post};
use hyper::StatusCode;
use hyper::header::{HeaderValue, RETRY_AFTER};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use crate::access::{REQUEST_ID, log};
use crate::app::App;
use crate::auth::check_key;
use crate::error::ApiError;
use crate::{completions, embeddings, models, page, state, tokenize};

/// All paths of the service.
pub fn router(app: Arc<App>) -> Router {
    let guarded = Router::new()
        .route("/v1/chat/completions", post(completions::chat))
        .route("/v1/completions", post(completions::text))
        .route("/v1/embeddings", post(embeddings::embeddings))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*name}", get(models::one))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/version", get(state::version))
        .route("/metrics", get(state::metrics))
        .layer(from_fn_with_state(app.clone(), check_key));
    let open = Router::new()
        .route("/", get(page::html))
        .route("/page.css", get(page::css))
        .route("/page.js", get(page::js))
        .route("/health", get(state::health))
        .route("/ready", get(state::ready));
    let mut router = guarded
        .merge(open)
        .method_not_allowed_fallback(|| async {
            let message = "the path takes another method; see docs/serving.md";
            ApiError::invalid(message).with_status(StatusCode::METHOD_NOT_ALLOWED)
        })
        .fallback(|| async {
            let message = "there is no such path; see docs/serving.md for those that there are";
            ApiError::invalid(message).with_status(StatusCode::NOT_FOUND)
        });
    if let Some(cors) = cors(&app.settings.cors_origins) {
        router = router.layer(cors);
    }
    router.layer(from_fn_with_state(app.clone(), log)).with_state(app)
}

/// Pages of these origins may use the service, or those of all (`*`); without any, browsers keep them out.
fn cors(origins: &[String]) -> Option<CorsLayer> {
    let allowed = match origins.iter().any(|origin| origin == "*") {
        true => AllowOrigin::any(),
        false => AllowOrigin::list(origins.iter().filter_map(|origin| origin.parse::<HeaderValue>().ok())),
    };
    (!origins.is_empty()).then(|| {
        CorsLayer::new()
            .allow_origin(allowed)
            .allow_methods([Method::GET, Method::POST])
            // Clients in pages send fields of their own: OpenAI's package what it runs on, and how often it tried.
            .allow_headers(AllowHeaders::mirror_request())
            .expose_headers([RETRY_AFTER, REQUEST_ID])
    })
}
