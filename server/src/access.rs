//! The access log: a line a request, when its answer is over, and the name by which both sides know it.
//!
//! A client's `x-request-id` is kept where it is short and plain; other requests get one. It stands in the answer's header
//! and in the log.

use std::pin::Pin;
use std::sync::{Arc, PoisonError};
use std::task::{Context, Poll};
use std::time::Instant;

use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue, Method};
use axum::middleware::Next;
use axum::response::Response;
use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};

use crate::app::App;
use crate::random::random_id;
use crate::stages::{SharedStages, Stages};

/// By which a request is found in logs, the client's and the service's.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Characters of a client's own name for a request at most.
const ID_MAX: usize = 128;

/// Names a request, passes it on and logs it.
pub async fn log(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let started = Instant::now();
    let given = request.headers().get(REQUEST_ID).filter(|id| is_plain(id)).cloned();
    let id = given.or_else(|| random_id("req").parse().ok()).unwrap_or(HeaderValue::from_static("req"));
    request.headers_mut().insert(REQUEST_ID, id.clone());
    let method = request.method().clone();
    // A path that nobody serves may be anything, and is not kept.
    let path = request.extensions().get::<MatchedPath>().map_or("other", MatchedPath::as_str).to_owned();
    let mut line = Line { method, path, status: None, id: id.clone(), started, stages: None, over: false };
    let mut response = next.run(request).await;
    response.headers_mut().insert(REQUEST_ID, id);
    let status = response.status().as_u16();
    app.metrics.answered(&line.path, status);
    line.status = Some(status);
    line.stages = response.extensions_mut().remove::<SharedStages>();
    // Nobody asks for a body that is not sent.
    line.over = line.method == Method::HEAD || response.body().is_end_stream();
    response.map(|body| Body::new(Logged { body, line }))
}

fn is_plain(id: &HeaderValue) -> bool {
    let id = id.as_bytes();
    !id.is_empty() && id.len() <= ID_MAX && id.iter().all(u8::is_ascii_graphic)
}

/// What will be logged.
struct Line {
    method: Method,
    path: String,
    /// `None` until there is an answer, which a client may not wait for.
    status: Option<u16>,
    id: HeaderValue,
    started: Instant,
    /// Of an answer that was generated.
    stages: Option<SharedStages>,
    /// All of the answer went out.
    over: bool,
}

impl Drop for Line {
    fn drop(&mut self) {
        let Line { method, path, status, id, started, stages, over } = self;
        let status = status.map_or("-".to_owned(), |status| status.to_string());
        let ms = started.elapsed().as_millis();
        let id = id.to_str().unwrap_or_default();
        let cut = if *over { "" } else { ", cut off" };
        let stages = stages.as_ref().map(|stages| *stages.lock().unwrap_or_else(PoisonError::into_inner));
        // Where there was no token, there are none.
        let stages = stages.filter(|stages| *stages != Stages::default());
        let stages = stages.map_or(String::new(), |stages| format!(", {stages}"));
        tracing::info!(target: "access", "{method} {path} {status} {ms} ms {id}{stages}{cut}");
    }
}

/// A body that is logged when it is over.
struct Logged {
    body: Body,
    line: Line,
}

impl http_body::Body for Logged {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        task: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let frame = Pin::new(&mut self.body).poll_frame(task);
        self.line.over |= matches!(frame, Poll::Ready(None)) || self.body.is_end_stream();
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
