//! API keys: where the service has any, all but the page and the probes asks for one.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use hyper::header::{AUTHORIZATION, HeaderMap};
use subtle::{Choice, ConstantTimeEq};

use crate::app::App;
use crate::error::ApiError;

/// Passes requests on that present a key, or all where none is asked for.
pub async fn check_key(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    match is_allowed(&app.settings.api_keys, request.headers()) {
        true => next.run(request).await,
        false => ApiError::unauthorized().into_response(),
    }
}

/// How long it takes tells nothing of the keys but their lengths.
fn is_allowed(keys: &[String], headers: &HeaderMap) -> bool {
    if keys.is_empty() {
        return true;
    }
    let value = headers.get(AUTHORIZATION).map(|value| value.as_bytes()).unwrap_or_default();
    let (scheme, given) = value.split_at(value.len().min(b"Bearer ".len()));
    let known = keys.iter().fold(Choice::from(0), |known, key| known | key.as_bytes().ct_eq(given));
    scheme.eq_ignore_ascii_case(b"Bearer ") && known.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_the_whole_key_behind_bearer() {
        let keys = ["sk-one".to_owned(), "sk-two".to_owned()];
        for (header, allowed) in [
            ("Bearer sk-one", true),
            ("bearer sk-two", true),
            ("Bearer sk-on", false),
            ("Bearer sk-one ", false),
            ("Bearer ", false),
            ("Basic sk-one", false),
            ("sk-one", false),
            ("", false),
        ] {
            let headers = HeaderMap::from_iter([(AUTHORIZATION, header.parse().unwrap())]);
            assert_eq!(is_allowed(&keys, &headers), allowed, "{header:?}");
        }
        assert!(!is_allowed(&keys, &HeaderMap::new()));
        assert!(is_allowed(&[], &HeaderMap::new()));
    }
}
